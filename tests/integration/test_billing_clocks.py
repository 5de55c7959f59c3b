"""A real agent whose clock is wrong: what its copy is billed for is the same, to the micro-unit.

The control plane's database has a clock that the test sets. The copy is a plain process: the
pilot's stand-in for a container engine runs it. libfaketime changes the agent's CLOCK_REALTIME.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.billing import at, close_all, lay_clock
from tests.harness import WALLET, Agent, ControlPlane, wait_for
from tests.integration.test_agent_faults import check_clock, set_clock

S = 1_000_000
T = int(dt.datetime(2026, 3, 31, 23, 59, 50, tzinfo=dt.timezone.utc).timestamp()) * S
HOUR_US = T // oracle.HOUR_US * oracle.HOUR_US
STEP_US, STEPS = 2_500_000, 12  # below three intervals of a second; over a month's end
DAY_S = 86_400
SPEC: dict[str, Any] = cp_server.PILOT_ORDER
SEEN = "SELECT 1 FROM liveness, clock.time WHERE last_heartbeat_at = at"


def set_time(cp: ControlPlane, time_us: int) -> None:
    """What the database's clock says from now on."""
    cp.postgres.force(cp.database, "UPDATE clock.time SET at = %s", at(time_us))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, for a socket."""
    made = Path(tempfile.mkdtemp(prefix="oi-clock-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def post_workload(cp: ControlPlane) -> tuple[str, str]:
    """The pilot's workload; gives back its path, and the customer's key."""
    prices = ["--cpu-hour=3.6", "--gb-hour=0.36", "--egress-gb=0", "--provider-share=80"]
    done = cp.command("add-rate-card", f"--valid-from={at(HOUR_US):%Y-%m-%dT%H:%MZ}", *prices)
    assert done.returncode == 0, done.stderr
    key = asyncio.run(cp_server.with_database(cp.dsn_file, cp_server.add_pilot_customer))
    status, made = cp.call("POST", "/api/v1/workloads", SPEC, token=key)
    assert status == 201, made
    return f"/api/v1/workloads/{made['workload_id']}", key


def read_lines(cp: ControlPlane) -> list[tuple[Any, ...]]:
    rows = cp.query(
        "SELECT to_char(month, 'YYYY-MM') AS month, billed_us, cpu_micros, memory_micros,"
        " share_micros FROM usage_lines ORDER BY 1"
    )
    return [tuple(row.values()) for row in rows]


def expect() -> list[tuple[Any, ...]]:
    """The same by the oracle, from the heartbeats that the control plane took."""
    sizes = SPEC["cpu_milli"], SPEC["memory_bytes"]
    copy = oracle.Copy("c", "counter", "Pilot", "h", "w", *sizes)
    card = oracle.RateCard("1", None, HOUR_US, 3_600_000, 360_000, 0, 800_000)
    events = [
        oracle.Heartbeat(T + n * STEP_US, "h", 1_000, frozenset("c"), ()) for n in range(STEPS + 1)
    ]
    lines = oracle.bill([card], [copy], events).lines
    return sorted(
        (each.month, each.billed_us, each.cpu_micros, each.memory_micros, each.share_micros)
        for each in lines
    )


@pytest.mark.parametrize(
    "clock",
    [(0, 0), (1, -1), (3650, 3650), (-3650, 3650)],
    ids=["right", "a-day", "ten-years", "jump"],
)
def test_a_hosts_clock_changes_no_bill(
    make_cp: Callable[..., ControlPlane],
    make_agent: Callable[..., Agent],
    directory: Path,
    clock: tuple[int, int],
) -> None:
    cp = make_cp("--heartbeat-s=1", f"--registry={cp_server.PILOT_REGISTRY}")
    token = cp.mint(payout_pubkey=WALLET)
    cp.stop()
    lay_clock(cp.postgres, cp.database)
    set_time(cp, T)
    cp.start()
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", token)
    agent.engine_socket = directory / "engine.sock"
    agent.limits_file.write_text("CPUS=2\nMEMORY=2G\n")
    offset_file = directory / "offset"
    environment = set_clock(offset_file, clock[0] * DAY_S)
    with contextlib.closing(cp_server.StandIn(agent.engine_socket)):
        agent.start(**environment)
        cp.wait_assignable()
        path, key = post_workload(cp)

        def is_running() -> bool:
            return bool(cp.call("GET", path, token=key)[1]["state"] == "running")

        wait_for("it runs", is_running, 20)
        for number in range(1, STEPS + 1):
            set_time(cp, T + number * STEP_US)
            if number == STEPS // 2:
                check_clock(agent.python, environment, clock[0] * DAY_S)
                set_clock(offset_file, clock[1] * DAY_S)
                check_clock(agent.python, environment, clock[1] * DAY_S)
            wait_for("a heartbeat at this time", lambda: cp.query(SEEN))
        assert is_running()
        assert cp.call("DELETE", path, token=key)[0] == 200
        wait_for("it is gone", lambda: cp.call("GET", path, token=key)[1]["state"] == "deleted")
        assert agent.process.stop() == 0
    set_time(cp, T + 3 * oracle.HOUR_US)
    asyncio.run(cp_server.with_database(cp.dsn_file, close_all))
    lines = read_lines(cp)
    assert [line[0] for line in lines] == ["2026-03", "2026-04"]
    assert sum(line[1] for line in lines) == STEPS * STEP_US
    assert lines == expect()
    cp.check_invariants()
