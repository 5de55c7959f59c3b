"""The agent when its tunnel goes away: no call leaves through the home's network.

The home has a veth for its network, and at the other end a machine that is 10.77.0.1 too and
speaks as much HTTP/2 as makes gRPC send a call. The tunnel is a route: up, it leads to a real
control plane.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import WALLET, Agent, ControlPlane, Netns, Process, make_netns, wait_for

CP_ADDRESS = "10.77.0.42:9092"
# Accepts, answers HTTP/2 settings, and prints all that comes.
STRANGER = """
import socket, threading
def serve(sock):
    sock.sendall(bytes.fromhex("000000040000000000"))
    while part := sock.recv(65536):
        print("received", part.hex(), flush=True)
with socket.create_server(("0.0.0.0", 9092)) as server:
    print("listening", flush=True)
    while True:
        sock, peer = server.accept()
        print("accepted", peer, flush=True)
        threading.Thread(target=serve, args=(sock,), daemon=True).start()
"""
# HTTP/2 frame type 1, HEADERS, begins a call.
HEADERS = 1


def ip(netns: Netns, *lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", "-n", netns.name, *line.split()], check=True)


class Home:
    """A home whose tunnel a test takes down, and the stranger in its network."""

    def __init__(self, netns: Netns, stranger: Process) -> None:
        self.netns = netns
        self.stranger = stranger

    def tunnel_up(self) -> None:
        ip(self.netns, "route add local 10.77.0.0/16 dev lo")

    def tunnel_down(self) -> None:
        ip(self.netns, "route del local 10.77.0.0/16 dev lo")

    def received(self) -> bytes:
        """All that the stranger got."""
        rows = [line.split() for line in self.stranger.log.splitlines()]
        return b"".join(bytes.fromhex(row[1]) for row in rows if row[0] == "received")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with make_netns() as inside, make_netns() as outside:
        ip(inside, "link add lan type veth peer name far", f"link set far netns {outside.name}")
        ip(inside, "addr add 192.168.77.2/24 dev lan", "link set lan up")
        ip(outside, "addr add 192.168.77.1/24 dev far", "link set far up")
        ip(inside, "route add default via 192.168.77.1")
        argv = outside.argv([sys.executable, "-c", STRANGER])
        stranger = Process(argv, tmp_path / "stranger.log", {})
        stranger.wait_log("listening")
        yield Home(inside, stranger)
        stranger.stop()


def list_frames(raw: bytes) -> list[int]:
    """The types of the HTTP/2 frames that follow the client's greeting."""
    assert raw.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    found, at = [], 24
    while at + 9 <= len(raw):
        found.append(raw[at + 3])
        at += 9 + int.from_bytes(raw[at : at + 3], "big")
    return found


def read_online(cp: ControlPlane) -> str:
    return next((host["host_id"] for host in cp.hosts() if host["status"] == "online"), "")


def make_key_agent(home: Home, cp: ControlPlane, make_agent: Callable[..., Agent]) -> Agent:
    key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
    return make_agent(CP_ADDRESS, cp.mint(payout_pubkey=WALLET), netns=home.netns, wg_key=key)


def test_an_agent_that_starts_without_its_tunnel_sends_nothing(
    home: Home, make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent]
) -> None:
    cp = make_cp("--heartbeat-s=1", netns=home.netns)
    agent = make_key_agent(home, cp, make_agent)
    home.tunnel_down()
    agent.start()
    agent.process.wait_log("WARN no tunnel to the control plane")
    last = agent.log.splitlines()[-1]
    assert f'addr={CP_ADDRESS} reason=NO_TUNNEL detail="packets would leave from 192.168' in last
    assert last.endswith(" ; sudo systemctl restart wg-quick@openinfra")
    assert agent.status()["last_error"]["what"] == "no tunnel to the control plane"
    doctor = json.loads(agent.run_command("doctor", "--json").stdout)
    told = [row for row in doctor["findings"] if "packets would leave" in row["sentence"]]
    assert [row["command"] for row in told] == ["sudo systemctl restart wg-quick@openinfra"]
    time.sleep(3)  # some more tries
    assert home.stranger.log == "listening\n"
    home.tunnel_up()
    host_id = wait_for("online", lambda: read_online(cp))
    agent.process.wait_log(f"registered with control plane host_id={host_id}")
    assert home.stranger.log == "listening\n"
    cp.check_invariants()


def test_a_host_whose_tunnel_goes_away_calls_nobody_else(
    home: Home, make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent]
) -> None:
    cp = make_cp("--heartbeat-s=1", netns=home.netns)
    agent = make_key_agent(home, cp, make_agent)
    agent.start()
    host_id = wait_for("online", lambda: read_online(cp))
    agent.process.wait_log("INFO agent running")
    home.tunnel_down()
    agent.process.wait_log("WARN no tunnel to the control plane", 20)
    time.sleep(5)
    raw = home.received()
    # The channel may greet whom it meets. It makes no call.
    assert HEADERS not in (list_frames(raw) if raw else [])
    identity = json.loads((agent.data / "identity.json").read_bytes())
    for name in ("session", "host_secret"):
        assert bytes.fromhex(identity[name]) not in raw
    home.tunnel_up()
    wait_for("accepted again", lambda: agent.status().get("state") == "running" or None, 75)
    assert [host["host_id"] for host in cp.hosts()] == [host_id]
    assert "resuming" not in agent.log
    assert HEADERS not in (list_frames(home.received()) if raw else [])
    cp.check_invariants()
