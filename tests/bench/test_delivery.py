"""How soon an order is a process on an idle host, and what 50 of them cost the agent.

Control plane, agent, dockerd and registry are real, on this machine. Heartbeats are 30 s apart, so
that what is quick came by a nudge.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Record
from tests.bench.load import percentile
from tests.engine import Engine, running_engine
from tests.harness import WALLET, Agent, ControlPlane, wait_for
from tests.integration.test_first_container import Fleet

ORDERS = 100
SLEEP = ["/bin/sleep", "100000"]
MANY = 50


@pytest.fixture
def engine() -> Iterator[Engine]:
    with running_engine() as made:
        yield made


@pytest.fixture(params=["/usr/bin/python3", sys.executable], ids=["Debian's", "PyPI's newest"])
def fleet(
    make_cp: Callable[..., ControlPlane],
    make_agent: Callable[..., Agent],
    engine: Engine,
    request: pytest.FixtureRequest,
) -> Fleet:
    cp = make_cp("--registry=127.0.0.1:5000")
    token = cp.mint(payout_pubkey=WALLET)
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", token, python=request.param)
    (agent.directory / "limits.conf").write_text("CPUS=8\nMEMORY=4G\n")
    made = Fleet(cp, agent, engine)
    made.start_agent()
    cp.wait_assignable()
    return made


def wait_seconds(probe: Callable[[], object], began: float) -> float:
    """How long it took until something was so; looked at each 20 ms."""
    while not probe():
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    return time.monotonic() - began


def run_by_hand(fleet: Fleet, image: str) -> float:
    """`docker run` of the same image, and its end."""
    docker = ["docker", f"--host=unix://{fleet.engine.socket}"]
    began = time.monotonic()
    name = ["--name=by-hand", "--network=none", "--detach"]
    subprocess.run([*docker, "run", *name, image, *SLEEP], check=True, capture_output=True)
    took_s = time.monotonic() - began
    subprocess.run([*docker, "rm", "--force", "by-hand"], check=True, capture_output=True)
    return took_s


def known(fleet: Fleet) -> set[str]:
    """The assignments that the agent has in its list."""
    rows = fleet.agent.status()["assignments"]
    return {str(each["id"]) for each in rows if each["state"] != "stopping"}


@pytest.mark.parametrize("fleet", ["/usr/bin/python3"], indirect=True, ids=["Debian's"])
def test_an_order_and_its_end(fleet: Fleet, record: Record) -> None:
    reached: list[float] = []
    ended: list[float] = []
    ran: list[float] = []
    by_hand: list[float] = []
    order: dict[str, Any] = {"command": SLEEP, "cpu_milli": 50, "memory_bytes": 16 << 20}
    first = fleet.post(**order)  # it pulls the image
    fleet.tenant.wait(first, "running")
    (container,) = fleet.engine.containers().values()
    image = container["Config"]["Image"]
    fleet.tenant.call("DELETE", f"/{first['workload_id']}")
    fleet.tenant.wait(first, "deleted")
    for number in range(ORDERS):
        by_hand.append(run_by_hand(fleet, image))
        time.sleep(1 + number % 10 / 10)  # the host is idle, and not in step with its clock
        began = time.monotonic()
        made = fleet.post(**order, name=f"w{number}")
        reached.append(wait_seconds(lambda: known(fleet), began))
        ran.append(
            wait_seconds(
                lambda: any(c["State"]["Running"] for c in fleet.engine.containers().values()),
                began,
            )
        )
        time.sleep(1 + number % 7 / 10)
        began = time.monotonic()
        fleet.tenant.call("DELETE", f"/{made['workload_id']}")
        ended.append(wait_seconds(lambda: not known(fleet), began))
        fleet.gone()
    for name, took in (("a new", reached), ("a deleted", ended)):
        what = f"{name} workload reaches an idle host: 99 of {ORDERS} within"
        record(what, percentile(sorted(took), 0.99), "s", 2)
    usual_s = percentile(sorted(by_hand), 0.5)
    record("docker run of an image that is there: median", usual_s, "s", None)
    record("from POST to a process: median", percentile(sorted(ran), 0.5), "s", None)
    what = f"from POST to a process, beyond docker run: 99 of {ORDERS} within"
    record(what, percentile(sorted(ran), 0.99) - usual_s, "s", 1.5)


def test_fifty_workloads(fleet: Fleet, record: Record, request: pytest.FixtureRequest) -> None:
    for number in range(MANY // 10):
        fleet.post(
            name=f"w{number}",
            replicas=10,
            command=SLEEP,
            cpu_milli=10,
            memory_bytes=16 << 20,
            ports=[8080],
        )
    wait_for("all run", lambda: len(known(fleet)) == MANY or None, 60)

    def all_run() -> bool:
        found = fleet.engine.containers().values()
        return len([c for c in found if c["State"]["Running"]]) == MANY

    wait_for("all run", lambda: all_run() or None, 180)
    time.sleep(60)  # two heartbeats that say all of it
    status = Path(f"/proc/{fleet.agent.process.child.pid}/status").read_text()
    rss_kb = int(status.partition("VmRSS:")[2].split()[0])
    runtime = request.node.callspec.id
    record(f"agent on {runtime} packages, {MANY} workloads: memory", rss_kb / 1e3, "MB", 64)
    fleet.cp.check_invariants()
