"""The whole sweeps of the fault tests; tests/integration/test_agent_faults.py draws from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests import failpoints
from tests.faults import (
    RUNTIMES,
    Fault,
    Host,
    built,
    draw_passes,
    hurt,
    hurt_registered,
    kill_agent,
    kill_cp,
    list_calls,
    make_host,
    run_lanes,
    stop_agent,
    stop_cp,
)
from tests.harness import ControlPlane, Postgres, serving

__all__ = ["built", "make_host"]

MakeHost = Callable[..., Host]

KILLS = 20
# Longer than three intervals of 30 s.
STOP_S = 180.0


@pytest.fixture(scope="module")
def cp(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for the hosts of this file."""
    with serving(postgres, tmp_path_factory.mktemp("cp"), "--heartbeat-s=1") as made:
        yield made


@pytest.mark.parametrize("point", failpoints.AGENT)
def test_kill_9_at_a_step_of_the_agent(
    cp: ControlPlane, make_host: MakeHost, built: Path, point: str, seed: str
) -> None:
    """Twenty kills: ten on one host, and one on each of ten."""
    draw, jobs = random.Random(f"{seed} {point}"), {}
    for n in range(1 + KILLS // 2):
        host = make_host(cp, draw.choice(RUNTIMES))
        passes = draw_passes(draw, point, 1 if n else KILLS // 2)
        jobs[f"{n} {passes}"] = partial(kill_agent, host, built, point, passes)
    run_lanes(jobs)
    cp.check_invariants()


def test_kill_9_at_drawn_steps_of_the_agent(
    cp: ControlPlane, make_host: MakeHost, built: Path, seed: str
) -> None:
    """Each of twenty hosts is killed six times, each time elsewhere."""
    draw, jobs = random.Random(seed), {}
    for n in range(20):
        host = make_host(cp, draw.choice(RUNTIMES))
        later = [point for point in failpoints.AGENT if not point.startswith("Register")]
        points = [draw.choice(failpoints.AGENT), *draw.choices(later, k=5)]
        steps = [partial(kill_agent, host, built, point, [1]) for point in points]
        jobs[f"{n} {points}"] = partial(run_steps, steps)
    run_lanes(jobs)
    cp.check_invariants()


def run_steps(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()


@pytest.mark.parametrize("point", failpoints.CP)
def test_kill_9_at_a_step_of_the_control_plane(
    make_cp: Callable[..., ControlPlane], make_host: MakeHost, built: Path, point: str, seed: str
) -> None:
    """Four control planes, each killed five times."""
    draw, jobs = random.Random(seed), {}
    for n in range(4):
        host = make_host(make_cp("--heartbeat-s=1"), draw.choice(RUNTIMES))
        jobs[str(n)] = partial(kill_cp, host, built, point, KILLS // 4)
    run_lanes(jobs)


@pytest.mark.parametrize("life", ["new", "registered"])
@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "KILL"])
def test_a_fault_of_the_kernel_at_each_call_on_a_file(
    cp: ControlPlane,
    make_host: MakeHost,
    life: str,
    kind: str,
    seed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = random.Random(f"{seed} {life}")
    jobs: dict[str, Callable[[], int]] = {}
    first = make_host(cp)
    calls = list_calls(first)
    if life == "registered":
        first.go_on()
        first.kill()
        calls = list_calls(first)
    faults = [Fault(*call, kind) for call in calls]
    # A host may open 30 sessions in ten minutes.
    size = 1 if life == "new" else 6
    for n in range(0, len(faults), size):
        host = make_host(cp, draw.choice(RUNTIMES))
        some = faults[n : n + size]
        jobs[" ".join(map(str, some))] = (
            partial(hurt, host, some[0]) if life == "new" else partial(hurt_registered, host, some)
        )
    came = sum(run_lanes(jobs))
    with capsys.disabled():
        print(f"\n{life} host, {kind}: {came} of {len(faults)} faults came", end="", flush=True)
    assert came > 0.8 * len(faults)
    cp.check_invariants()


def test_a_stop_of_three_minutes(make_cp: Callable[..., ControlPlane], make_host: MakeHost) -> None:
    """The nominal interval of 30 s; the agent and the control plane are stopped in turn."""
    cps = [make_cp(), make_cp()]
    hosts = [make_host(cp) for cp in cps]
    run_lanes(
        {
            "agent": partial(stop_agent, hosts[0], STOP_S),
            "control plane": partial(stop_cp, hosts[1], STOP_S),
        }
    )
    for cp in cps:
        cp.check_invariants()
