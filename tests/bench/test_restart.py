"""15,000 connected hosts, and a control plane that goes away and comes back."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.bench.conftest import Record
from tests.bench.fleet import Load, fill, postgres_that_syncs
from tests.bench.load import Spec
from tests.harness import ControlPlane, Netns, serving

HOSTS = 15_000
INTERVAL_S = 30.0
SETTLE_S = 5.0  # heartbeats go on for this long before the control plane is ended


def check_nothing_lost(cp: ControlPlane, accepted: list[int]) -> None:
    """What was acknowledged stands in the database; nobody resumed, nobody was marked offline."""
    rows = cp.query(
        "SELECT l.seq, h.status FROM liveness l JOIN hosts h USING (host_no) ORDER BY host_no"
    )
    assert len(rows) == len(accepted) == HOSTS
    assert all(row["seq"] >= seq > 0 for row, seq in zip(rows, accepted, strict=True))
    assert {row["status"] for row in rows} == {"online"}
    sessions = cp.query("SELECT opened_by, count(*) AS n FROM sessions GROUP BY opened_by")
    assert sessions == [{"opened_by": "register", "n": HOSTS}]
    assert "offline" not in cp.log


def test_restart(tmp_path: Path, netns: Netns, record: Record) -> None:
    """SIGTERM and start, then kill -9 and start; all hosts reconnect within 5 s of the cut."""
    ways = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}
    with (
        postgres_that_syncs() as postgres,
        serving(postgres, tmp_path / "cp", f"--heartbeat-s={INTERVAL_S:g}", netns=netns) as cp,
    ):
        fill(cp, HOSTS, INTERVAL_S)
        rate = HOSTS / INTERVAL_S
        spec = Spec("cp", cp.grpc_port, HOSTS, rate, 15, SETTLE_S, restarts=len(ways))
        load = Load(netns, spec)
        try:
            load.wait("ready")
            for name, how in ways.items():
                time.sleep(SETTLE_S)
                began = time.monotonic()
                cp.stop(how)
                cp.start()
                back = load.wait("back")
                print(f"\n{name}: {back['errors']}")
                what = f"{HOSTS:,} hosts, control plane {name} and started: all back"
                record(what, back["at_s"] - began, "s", 30)
                check_nothing_lost(cp, back["accepted"])
            check_nothing_lost(cp, load.wait("end")["accepted"])
        finally:
            load.close()
