"""What a real container uses, counted by a real agent, until the control plane has it.

The agent is a copy that counts each second instead of each minute.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import REGISTRY, Engine
from tests.harness import WALLET, Agent, ControlPlane, change_scripts, wait_for
from tests.integration.test_first_container import Fleet, ask, run_fleet

ROWS = (
    "SELECT encode(container_id, 'hex') AS container, boot_id::text, cpu_ns, memory_byte_s,"
    " rx_bytes, tx_bytes FROM usage_counters ORDER BY tx_bytes"
)
# A page of 100 KB for each that asks, and some work for a processor.
WORK = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
PAGE = (
    "b=/bin/busybox; cd /tmp; $b head -c 100000 /dev/zero > page; exec $b httpd -f -p 8080 -h /tmp"
)
BUSY = ["/bin/sh", "-c", f"{WORK}; {PAGE}"]


@pytest.fixture
def fleet(
    make_cp: Callable[..., ControlPlane],
    make_agent: Callable[..., Agent],
    engine: Engine,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Fleet]:
    engine.clear()
    period = str(getattr(request, "param", 1.0))
    scripts = change_scripts(tmp_path / "scripts", "agent.py", METER_S=period)
    cp = make_cp(f"--registry={REGISTRY}", "--heartbeat-s=1")
    token = cp.mint(payout_pubkey=WALLET)
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", token, scripts=scripts)
    yield from run_fleet(cp, agent, engine)


def fetch(fleet: Fleet, workload: dict[str, Any], times: int) -> None:
    """Let it send so many pages."""
    (copy,) = fleet.tenant.get(workload)["assignments"]
    for _ in range(times):
        assert ask(fleet.engine, copy["endpoints"][0]["address"], "/page") == 200


def wait_sent(fleet: Fleet, least_bytes: int) -> list[dict[str, Any]]:
    """The counters, once so much was sent by all containers."""

    def probe() -> list[dict[str, Any]] | None:
        rows = fleet.cp.query(ROWS)
        return rows if sum(row["tx_bytes"] for row in rows) >= least_bytes else None

    return wait_for("what was sent", probe, 30)


def egress(fleet: Fleet) -> int:
    (row,) = fleet.cp.query("SELECT coalesce(sum(bytes), 0)::bigint AS bytes FROM usage_egress")
    return int(row["bytes"])


def usage_file(fleet: Fleet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((fleet.agent.data / "usage.json").read_text())
    return rows


def test_what_a_container_uses_is_counted_once(fleet: Fleet) -> None:
    made = fleet.post(command=BUSY, ports=[8080])
    fleet.tenant.wait(made, "running")
    wait_for("it answers", lambda: _answers(fleet, made) or None, 30)
    fetch(fleet, made, 5)
    (row,) = wait_sent(fleet, 500_000)
    assert row["tx_bytes"] < 800_000
    assert 10_000_000 < row["cpu_ns"] < 20_000_000_000
    assert row["memory_byte_s"] > 100_000
    assert egress(fleet) == row["tx_bytes"]
    earned = wait_for("earnings", lambda: fleet.agent.status().get("earnings"))
    assert earned.startswith("0.000000 EUR in 20")
    assert "earned" in fleet.agent.run_command("status").stdout

    # The agent is killed, and counts on where its file is.
    fleet.agent.process.stop(signal.SIGKILL)
    fetch(fleet, made, 5)
    fleet.start_agent()
    (later,) = wait_sent(fleet, 1_000_000)
    assert later["container"] == row["container"]
    assert later["tx_bytes"] < 1_500_000
    assert later["cpu_ns"] >= row["cpu_ns"]

    # The container is killed and started again: the engine counts from nothing, we do not.
    (container,) = fleet.engine.containers().values()
    status, _ = fleet.engine.call("POST", f"/containers/{container['Id']}/kill")
    assert status == 204
    wait_for("its restart", lambda: fleet.tenant.get(made)["state"] == "running" or None, 30)
    wait_for("again", lambda: _answers(fleet, made) or None, 30)
    fetch(fleet, made, 5)
    again = wait_sent(fleet, 1_450_000)
    assert sum(each["tx_bytes"] for each in again) < 2_100_000

    # The control plane is away, and so is the agent for a while; the workload ends meanwhile.
    fleet.cp.stop(signal.SIGKILL)
    before = egress(fleet)
    fetch_alone(fleet, 5)
    wait_for("it is on the disk", lambda: _saved(fleet) >= before + 500_000 or None, 30)
    fleet.agent.process.stop(signal.SIGKILL)
    fleet.start_agent()
    fleet.cp.start()
    final = wait_sent(fleet, before + 500_000)
    assert sum(each["tx_bytes"] for each in final) == egress(fleet)
    assert fleet.tenant.call("DELETE", f"/{made['workload_id']}")[0] == 200
    fleet.gone()
    wait_for("nothing is left to tell", lambda: usage_file(fleet) == [] or None, 30)
    assert egress(fleet) >= before + 500_000


def _answers(fleet: Fleet, made: dict[str, Any]) -> bool:
    try:
        fetch(fleet, made, 1)
    except (OSError, ValueError):
        return False
    return True


def _saved(fleet: Fleet) -> int:
    return sum(row["tx_bytes"] for row in usage_file(fleet))


def fetch_alone(fleet: Fleet, times: int) -> None:
    """The same without a control plane that says where it is."""
    (container,) = fleet.engine.containers().values()
    (bindings,) = container["NetworkSettings"]["Ports"].values()
    address = f"{bindings[0]['HostIp']}:{bindings[0]['HostPort']}"
    for _ in range(times):
        assert ask(fleet.engine, address, "/page") == 200


def test_a_broken_usage_file_is_moved_aside(fleet: Fleet) -> None:
    fleet.agent.process.stop()
    path = fleet.agent.data / "usage.json"
    path.write_text("[{]")
    path.chmod(0o600)
    fleet.start_agent()
    wait_for("it says so", lambda: "usage file cannot be read" in fleet.agent.log or None)
    assert path.with_name("usage.json.broken").read_text() == "[{]"


def test_a_container_of_before_a_reboot_is_counted_anew(fleet: Fleet) -> None:
    """Readings of the boot before were taken at later times of its clock than those of now."""
    made = fleet.post(command=BUSY, ports=[8080])
    fleet.tenant.wait(made, "running")
    wait_for("it answers", lambda: _answers(fleet, made) or None, 30)
    (now,) = wait_sent(fleet, 100_000)
    fleet.agent.process.stop()
    (row,) = usage_file(fleet)
    before = "5f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f0b"
    row |= {"boot_id": before, "read_s": row["read_s"] + 1e6, "tx_bytes": 300_000}
    (fleet.agent.data / "usage.json").write_text(json.dumps([row]))
    fleet.start_agent()
    fetch(fleet, made, 5)
    rows = wait_sent(fleet, 300_000 + now["tx_bytes"] + 500_000)
    assert {each["container"] for each in rows} == {now["container"]}
    assert [each["tx_bytes"] for each in rows if each["boot_id"] == before] == [300_000]
    assert {each["boot_id"] for each in rows} == {before, now["boot_id"]}

    def probe() -> bool | None:
        return {each["boot_id"] for each in usage_file(fleet)} == {now["boot_id"]} or None

    wait_for("the old count is over", probe, 30)


@pytest.mark.parametrize("fleet", [8.0], indirect=True)
def test_a_container_that_was_started_again_may_have_used_more(fleet: Fleet) -> None:
    """Between two readings: its counters began at 0, and are beyond those of its first run."""
    made = fleet.post(command=["/bin/sh", "-c", PAGE], ports=[8080])
    fleet.tenant.wait(made, "running")
    wait_for("it answers", lambda: _answers(fleet, made) or None, 30)
    fetch(fleet, made, 2)
    (row,) = wait_sent(fleet, 200_000)
    sent = row["tx_bytes"]
    (one,) = fleet.engine.containers().values()
    assert fleet.engine.call("POST", f"/containers/{one['Id']}/kill")[0] == 204
    wait_for("its end", lambda: not _answers(fleet, made) or None, 5)
    wait_for("it answers again", lambda: _answers(fleet, made) or None, 20)
    fetch(fleet, made, 5)
    (row,) = wait_sent(fleet, sent + 500_000)
    assert row["tx_bytes"] < sent + 800_000
