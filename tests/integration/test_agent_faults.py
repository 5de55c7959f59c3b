"""The agent under kill -9, stops, full and failing disks, a wrong clock and a spoiled identity.

A short draw of each sweep; tests/bench/test_faults.py has the whole ones. Every test ends with a
good host and the invariants.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psycopg
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
from tests.harness import ControlPlane, Postgres, serving, wait_for

__all__ = ["built", "make_host"]

MakeHost = Callable[..., Host]


@pytest.fixture(scope="module")
def cp(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for the hosts of this file."""
    with serving(postgres, tmp_path_factory.mktemp("cp"), "--heartbeat-s=1") as made:
        yield made


def test_kill_9_at_each_step_of_the_agent(
    cp: ControlPlane, make_host: MakeHost, built: Path, seed: str
) -> None:
    draw, jobs = random.Random(seed), {}
    for point in failpoints.AGENT:
        host = make_host(cp, draw.choice(RUNTIMES))
        passes = draw_passes(draw, point, 2)
        jobs[f"{point} {passes}"] = partial(kill_agent, host, built, point, passes)
    run_lanes(jobs)
    cp.check_invariants()


def test_kill_9_at_each_step_of_the_control_plane(
    make_cp: Callable[..., ControlPlane], make_host: MakeHost, built: Path, seed: str
) -> None:
    draw, jobs = random.Random(seed), {}
    for point in failpoints.CP:
        cp = make_cp("--heartbeat-s=1")
        host = make_host(cp, draw.choice(RUNTIMES))
        jobs[point] = partial(kill_cp, host, built, point, 1)
    run_lanes(jobs, len(jobs))


def test_a_stop_longer_than_three_intervals(
    make_cp: Callable[..., ControlPlane], make_host: MakeHost
) -> None:
    """SIGSTOP, as a suspend; the control plane's is longer than a call may take, too."""
    cps = [make_cp("--heartbeat-s=1"), make_cp("--heartbeat-s=1")]
    agent = partial(stop_agent, make_host(cps[0]))
    run_lanes({"agent": agent, "control plane": partial(stop_cp, make_host(cps[1]), 11)})
    for cp in cps:
        cp.check_invariants()


def test_a_heartbeat_that_is_not_committed_yet(
    make_cp: Callable[..., ControlPlane], make_host: MakeHost
) -> None:
    """The sweep sees the one before; it must neither judge by that nor wait."""
    cp = make_cp("--heartbeat-s=1")
    host = make_host(cp)
    host.go_on()
    host.agent.process.child.send_signal(signal.SIGSTOP)
    with psycopg.connect(cp.postgres.dsn(cp.database)) as connection:
        connection.execute("UPDATE liveness SET last_heartbeat_at = now() + interval '19 s'")
        wait_for_sweeps(cp, 9)
    assert host.read_status() == "online"
    wait_for("offline", lambda: host.read_status() == "offline" or None, 30)


def wait_for_sweeps(cp: ControlPlane, count: int) -> None:
    """Wait until the control plane has looked for silent hosts so many times more."""
    sql = "SELECT alive_at FROM cp_state"
    seen = {cp.query(sql)[0]["alive_at"]}

    def look() -> bool:
        seen.add(cp.query(sql)[0]["alive_at"])
        return len(seen) > count

    wait_for("sweeps", look, 60)


# ------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------


def write_all(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Callable[[bool], None]]:
    """Mount a tmpfs of 64 kB there; gives a function that fills it, or frees it."""
    argv = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", str(directory)]
    subprocess.run(argv, check=True)
    ballast = directory / "ballast"

    def fill(full: bool) -> None:
        ballast.unlink(missing_ok=True)
        if full:
            with pytest.raises(OSError, match="No space"):
                write_all(ballast)

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_under_the_identity(cp: ControlPlane, make_host: MakeHost, built: Path) -> None:
    """Full before the first start, between identity and registration, before a later start."""
    host = make_host(cp, RUNTIMES[0])
    agent = host.agent
    with small_disk(agent.data) as fill:
        fill(True)
        host.start()
        assert host.wait_end() == 1
        last = agent.log.splitlines()[-1]
        assert last.startswith("ERROR cannot save the identity: No space left on device ; free")
        fill(False)
        agent.scripts = built
        host.start(OPENINFRA_FAILPOINT="Register.before_send=stop")
        agent.process.wait_log("WARN failpoint")
        fill(True)
        agent.process.child.send_signal(signal.SIGCONT)
        for _ in range(2):  # and once more after a kill, the disk still full
            agent.process.wait_log("WARN cannot save the identity")
            host.wait_beats(2)
            assert host.read_status() == "online"
            assert host.ask()["token"] == "unspent"  # who could not save needs it again
            host.kill()
            agent.scripts = failpoints.ROOT
            host.start()
        host.wait_beats()
        fill(False)
        host.check_well()
        assert agent.log.count("INFO identity saved") == 1
        assert agent.process.stop() == 0
        fill(True)
        host.start()
        assert host.wait_end() == 1
        last = agent.log.splitlines()[-1]
        assert last.startswith("ERROR cannot save the next session: No space left on device ; free")
        fill(False)
        host.go_on()
        assert agent.process.stop() == 0
    cp.check_invariants()


def test_a_full_disk_under_the_env_file(
    cp: ControlPlane, make_host: MakeHost, tmp_path: Path
) -> None:
    host = make_host(cp, RUNTIMES[0])
    etc = tmp_path / "etc"
    etc.mkdir()
    with small_disk(etc) as fill:
        env_file = etc / "agent.env"
        env_file.write_bytes(host.agent.env_file.read_bytes())
        env_file.chmod(0o600)
        host.agent.env_file.unlink()
        host.agent.env_file = env_file
        fill(True)
        host.start()
        host.agent.process.wait_log("WARN cannot remove the spent invite from the env file")
        host.wait_beats(2)
        assert host.token in env_file.read_text()
        host.kill()
        fill(False)
        host.go_on()
        assert [path.name for path in etc.iterdir()] == ["agent.env"]
        assert env_file.stat().st_mode & 0o7777 == 0o600
        assert host.agent.process.stop() == 0
    cp.check_invariants()


@pytest.mark.parametrize("life", ["new", "registered"])
def test_a_fault_of_the_kernel_at_a_call_on_a_file(
    cp: ControlPlane, make_host: MakeHost, life: str, seed: str
) -> None:
    """A disk that fails or is full, and kill -9, at calls that were drawn."""
    draw = random.Random(seed + life)
    jobs: dict[str, Callable[[], int]] = {}
    first = make_host(cp, RUNTIMES[0])
    calls = list_calls(first)
    if life == "registered":
        first.go_on()
        first.kill()
        calls = list_calls(first)
    for kind in ("EIO", "ENOSPC", "KILL", "KILL"):
        host = make_host(cp, draw.choice(RUNTIMES))
        faults = [Fault(*call, kind) for call in draw.sample(calls, 2)]
        if life == "new":
            jobs[str(faults[0])] = partial(hurt, host, faults[0])
        else:
            jobs[" ".join(map(str, faults))] = partial(hurt_registered, host, faults)
    run_lanes(jobs)
    cp.check_invariants()


# ------------------------------------------------------------------------------------------------
# A wrong clock: libfaketime under the real agent, for CLOCK_REALTIME only, as a wrong clock is.
# Debian's grpcio 1.51 asks the kernel itself for the time, past every preloaded library: for that
# runtime the clock of a whole machine has to be wrong, which is for a virtual one.
# ------------------------------------------------------------------------------------------------

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), Path("none"))
DAY_S = 86_400


def set_clock(path: Path, offset_s: int) -> dict[str, str]:
    """Put an agent's clock off by some seconds, by the given environment; a running one follows."""
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{offset_s:+d}\n")
    fresh.rename(path)  # never half written
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def check_clock(python: str, environment: dict[str, str], offset_s: int) -> None:
    """Fails unless a program sees the wrong time in that environment, and the right uptime."""
    code = "import time; print(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))"
    said = [
        subprocess.run(
            [python, "-c", code],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in (environment, {})
    ]
    assert abs(float(said[0]) - float(said[1]) - offset_s) < 60, "the clock is not off"


def live_at(host: Host, path: Path, offset_s: int) -> None:
    """Register and resume at one wrong time, and go through a jump to another and back."""
    host.environment = set_clock(path, offset_s)
    check_clock(host.agent.python, host.environment, offset_s)
    host.go_on()
    assert host.agent.process.stop() == 0
    host.go_on()
    before = host.read_sessions()
    assert len(before) == 2
    for jump_s in (-offset_s, 0, offset_s):
        set_clock(path, jump_s)
        host.wait_beats(2)
    host.check_well()
    assert "WARN" not in host.said
    assert host.read_sessions() == before
    assert host.agent.process.stop() == 0


def test_a_clock_that_is_off(cp: ControlPlane, make_host: MakeHost, tmp_path: Path) -> None:
    """A day and ten years before and after, with jumps between them while the agent runs."""
    jobs = {}
    for n, days in enumerate((1, -1, 3650, -3650)):
        host = make_host(cp, RUNTIMES[1])
        jobs[f"{days:+d} days"] = partial(live_at, host, tmp_path / f"clock{n}", days * DAY_S)
    run_lanes(jobs)
    cp.check_invariants()
