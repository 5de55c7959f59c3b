"""The real agent and the real control plane: the main job, on both of the agent's runtimes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import OTHER_WALLET, WALLET, Agent, ControlPlane, Netns, Process, wait_for

RUNTIMES = [
    pytest.param("/usr/bin/python3", id="debian"),
    pytest.param(sys.executable, id="pypi"),
]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

MakeAgent = Callable[..., Agent]


def address(cp: ControlPlane) -> str:
    return f"127.0.0.1:{cp.grpc_port}"


def wait_status(cp: ControlPlane, status: str, timeout_s: float = 10) -> dict[str, Any]:
    """Wait until the only host has this status."""

    def probe() -> dict[str, Any] | None:
        _, answer = cp.call("GET", f"/api/v1/admin/hosts?status={status}")
        return answer["hosts"][0] if answer["hosts"] else None

    return wait_for(f"a host that is {status}", probe, timeout_s)


@pytest.mark.parametrize("python", RUNTIMES)
def test_the_documented_log_lines_and_a_restart(
    make_cp: Callable[..., ControlPlane], make_agent: MakeAgent, python: str
) -> None:
    cp = make_cp()  # the nominal 30 s
    token = cp.mint(payout_pubkey=WALLET)
    agent = make_agent(address(cp), token, python=python)
    spent = agent.env_file.open()
    agent.start()
    host = wait_status(cp, "online")
    assert host["assignable"] is True, host["reasons"]
    host_id = host["host_id"]
    agent.process.wait_log("INFO agent running")
    lines = [line for line in agent.log.splitlines() if not line.startswith("+")]
    expected = [
        rf"INFO agent starting control_plane={re.escape(address(cp))} .*",
        rf"INFO connected to control plane addr={re.escape(address(cp))}",
        rf"INFO registered with control plane host_id={host_id} onchain_payout=true",
        r"INFO agent running, sending heartbeats every 30s",
    ]
    assert re.fullmatch(UUID, host_id)
    for line, form in zip(lines[:4], expected, strict=True):
        assert re.fullmatch(form, line), line
    wait_for("scrub", lambda: "_used" in agent.env_file.read_text() or None)
    invite_id = token.split("_")[1]
    assert f"INVITE_TOKEN=oi1_{invite_id}_used\n" in agent.env_file.read_text()
    assert token not in agent.log + cp.log
    with spent:  # what the disk may still have of the file
        wait_for("zeros", lambda: not os.pread(spent.fileno(), 1000, 0).strip(b"\0"))

    agent.restart()
    resumed = f"INFO resuming with persisted host_id (skipping Register) host_id={host_id}"
    agent.process.wait_log(resumed)
    wait_for("running again", lambda: agent.log.count("INFO agent running") == 2 or None)
    assert "registered" not in agent.log.split(resumed)[1]
    assert [row["host_id"] for row in cp.hosts()] == [host_id]
    assert agent.process.stop() == 0
    cp.check_invariants()


def test_a_copy_of_the_env_file_is_left_as_it_is(
    make_cp: Callable[..., ControlPlane], make_agent: MakeAgent
) -> None:
    cp = make_cp()
    token = cp.mint(payout_pubkey=WALLET)
    agent = make_agent(address(cp), token)
    copy = agent.env_file.with_name("hard-link")
    copy.hardlink_to(agent.env_file)
    agent.start()
    wait_for("scrub", lambda: "_used" in agent.env_file.read_text() or None)
    agent.process.wait_log("INFO agent running")
    assert agent.process.stop() == 0
    assert token in copy.read_text()


@pytest.mark.parametrize("python", RUNTIMES)
def test_status_and_doctor_of_a_host_that_is_well(
    cp: ControlPlane, make_agent: MakeAgent, python: str
) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET), python=python)
    agent.start()
    host = wait_status(cp, "online")
    status = wait_for("status", lambda: agent.status().get("heartbeats") and agent.status())
    assert status["host_id"] == host["host_id"]
    assert status["status"] == "online"
    assert status["assignable"] is True
    done = agent.run_command("doctor", "--allow-unencrypted")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_engine_that_does_not_answer_is_said_everywhere(
    cp: ControlPlane, make_agent: MakeAgent
) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET))
    agent.engine_socket = agent.directory / "engine.sock"
    agent.start()
    wait_status(cp, "online")
    why = f"no container engine answers at {agent.engine_socket}: No such file or directory"
    host = wait_for("why", lambda: next((h for h in cp.hosts() if h["reasons"]), None))
    assert (host["assignable"], host["engine_version"]) == (False, "")
    assert host["reasons"] == [f"{why}; look on the host: sudo openinfra-agent doctor"]
    assert agent.status()["unready"] == why
    done = agent.run_command("doctor", "--allow-unencrypted", "--json")
    found = {each["command"]: each for each in json.loads(done.stdout)["findings"]}
    assert why in found["sudo systemctl restart openinfra-engine"]["sentence"]


@pytest.mark.parametrize("python", RUNTIMES)
def test_a_cp_restart_and_an_outage_make_nobody_resume(
    cp: ControlPlane, make_agent: MakeAgent, python: str
) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET), python=python)
    agent.start()
    host = wait_status(cp, "online")
    before = cp.query("SELECT session_sha256 FROM sessions")
    assert cp.stop(signal.SIGKILL) != 0
    agent.process.wait_log("cannot reach control plane")
    cp.start()

    def beat_again() -> bool | None:
        rows = cp.query(
            "SELECT l.last_heartbeat_at > c.serving_since AS new FROM liveness l, cp_state c"
        )
        return rows[0]["new"] or None

    wait_for("heartbeats again", beat_again, 30)
    assert cp.query("SELECT session_sha256 FROM sessions") == before
    assert [row["host_id"] for row in cp.hosts()] == [host["host_id"]]
    cp.check_invariants()


def test_a_wallet_that_is_not_the_invites_is_said_everywhere_and_healed(
    cp: ControlPlane, make_agent: MakeAgent
) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET), wallet=OTHER_WALLET)
    agent.start()
    host = wait_status(cp, "online")
    assert host["assignable"] is False
    agent.process.wait_log("WARN not assignable")
    for place in (host["reasons"][0], agent.log, str(agent.status()["reasons"])):
        assert WALLET in place, place
        assert OTHER_WALLET in place, place
    assert re.search(r"^WARN not assignable reason=", agent.log, re.MULTILINE)
    doctor = agent.run_command("doctor", "--allow-unencrypted")
    assert doctor.returncode == 1
    assert f"solana:{OTHER_WALLET}" in doctor.stdout
    assert "Agent runs" not in doctor.stdout
    mended = agent.env_file.read_text().replace(OTHER_WALLET, WALLET)
    agent.env_file.write_text(mended)
    agent.restart()
    healed = wait_for("assignable", lambda: next((h for h in cp.hosts() if h["assignable"]), None))
    assert healed["host_id"] == host["host_id"]
    cp.check_invariants()


def test_an_approved_namespace_heals_without_a_restart(
    cp: ControlPlane, make_agent: MakeAgent
) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET), wallet=OTHER_WALLET)
    agent.start()
    wait_status(cp, "online")
    agent.process.wait_log("WARN not assignable")
    status, _ = cp.call("POST", f"/api/v1/admin/namespaces/solana:{OTHER_WALLET}/approve")
    assert status == 200
    agent.process.wait_log("INFO assignable")


@pytest.mark.parametrize("python", RUNTIMES)
@pytest.mark.parametrize("why", ["used", "revoked", "expired", "unknown"])
def test_an_invite_that_is_no_good_ends_the_agent_with_78(
    cp: ControlPlane, make_agent: MakeAgent, why: str, python: str
) -> None:
    token = cp.mint()
    invite_id = token.split("_")[1]
    if why == "used":
        first = make_agent(address(cp), token)
        first.start()
        wait_status(cp, "online")
    if why == "revoked":
        assert cp.call("DELETE", f"/api/v1/admin/host-invites/{invite_id}")[0] == 200
    if why == "expired":
        sql = "UPDATE invites SET created_at = now() - interval '9h', expires_at = now()"
        cp.postgres.execute(cp.database, sql)
    if why == "unknown":
        cp.postgres.execute(cp.database, "DELETE FROM invites")
    hosts = len(cp.hosts())
    agent = make_agent(address(cp), token, python=python)
    assert agent.start().child.wait(10) == 78
    last = agent.log.splitlines()[-1]
    words = {
        "used": f"ERROR invite already used invite_id={invite_id} ; ask the operator for a fresh",
        "revoked": "ERROR operator revoked the invite",
        "expired": "ERROR invite expired",
        "unknown": "ERROR unknown invite",
    }
    assert last.startswith(words[why]), agent.log
    assert token not in agent.log + cp.log
    assert len(cp.hosts()) == hosts


def test_a_copied_disk_ends_one_agent_and_never_makes_a_second_host(
    cp: ControlPlane, make_agent: MakeAgent
) -> None:
    first = make_agent(address(cp), cp.mint(payout_pubkey=WALLET))
    first.start()
    host = wait_status(cp, "online")
    copy = make_agent(address(cp), "")
    copy.env_file.write_bytes(first.env_file.read_bytes().replace(b"agent0", b"agent1"))
    (copy.data / "identity.json").write_bytes((first.data / "identity.json").read_bytes())
    (copy.data / "identity.json").chmod(0o600)
    copy.start()
    assert first.process.child.wait(10) == 78
    assert "ERROR another agent holds this identity" in first.log
    assert [row["host_id"] for row in cp.hosts()] == [host["host_id"]]
    cp.check_invariants()


def test_a_revoked_host_ends_with_78_and_stays_out(cp: ControlPlane, make_agent: MakeAgent) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET))
    agent.start()
    host = wait_status(cp, "online")
    assert cp.command("revoke", host["host_id"]).returncode == 0
    assert agent.process.child.wait(10) == 78
    assert "ERROR operator revoked this host" in agent.log
    assert agent.start().child.wait(10) == 78
    assert cp.hosts()[0]["status"] == "revoked"
    cp.check_invariants()


def test_a_quarantined_host_waits_for_its_release(cp: ControlPlane, make_agent: MakeAgent) -> None:
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET))
    agent.start()
    host = wait_status(cp, "online")
    cp.postgres.execute(
        cp.database,
        "UPDATE hosts SET status = 'quarantined';"
        "UPDATE sessions SET ended_at = now() WHERE ended_at IS NULL",
    )
    agent.process.wait_log("ERROR host is quarantined")
    assert agent.process.child.poll() is None
    assert cp.call("POST", f"/api/v1/admin/hosts/{host['host_id']}/release")[0] == 200
    agent.restart()
    wait_status(cp, "online")
    cp.check_invariants()


def test_a_lost_identity_is_healed_by_a_fresh_invite_through_the_tunnel(
    make_cp: Callable[..., ControlPlane], make_agent: MakeAgent, netns: Netns
) -> None:
    cp = make_cp("--heartbeat-s=1", netns=netns)
    key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
    more = {"netns": netns, "wg_key": key}
    agent = make_agent("10.77.0.42:9092", cp.mint(payout_pubkey=WALLET), **more)
    agent.start()
    found = wait_for(
        "online", lambda: next((h for h in cp.hosts() if h["status"] == "online"), None)
    )
    assert found["wg_ip"] == "10.77.0.42"
    assert found["wg_pubkey"] == key
    assert agent.process.stop() == 0
    (agent.data / "identity.json").unlink()
    assert agent.start().child.wait(10) == 78  # the used token makes no new host
    assert "ERROR invite already used" in agent.log
    agent.write_env(cp.mint(payout_pubkey=WALLET), WALLET, "10.77.0.42:9092")
    agent.start()
    agent.process.wait_log(f"registered with control plane host_id={found['host_id']}")
    wait_for("one host", lambda: len(cp.hosts()) == 1 or None)
    cp.check_invariants()


def test_both_go_on_when_their_log_cannot_be_written(
    make_cp: Callable[..., ControlPlane], make_agent: MakeAgent, tmp_path: Path
) -> None:
    """As with a full disk under the journal."""
    mute = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"]
    cp = make_cp("--heartbeat-s=1", start=False)
    listen = [f"--grpc-listen=127.0.0.1:{cp.grpc_port}", f"--http-listen=127.0.0.1:{cp.http_port}"]
    argv = cp.argv("serve", "--peer-check=off", *cp.flags, *listen)
    cp.process = Process([*mute, *argv], tmp_path / "cp.out", {})

    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return cp.call("GET", "/readyz")[0] == 200
        return False

    wait_for("the control plane", is_ready)
    agent = make_agent(address(cp), cp.mint(payout_pubkey=WALLET))
    agent.started = Process(
        [*mute, *agent.argv("run", "--allow-unencrypted")], agent.directory / "agent.log", {}
    )
    wait_for("online", lambda: [host["status"] for host in cp.hosts()] == ["online"], 20)
    assert agent.process.stop() == 0
    assert "oi1_" in agent.env_file.read_text()
    assert "_used" in agent.env_file.read_text()
