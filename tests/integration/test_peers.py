"""The hub's peers as the database says: a real WireGuard interface, the helper and `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests.harness import (
    ROOT,
    WALLET,
    ControlPlane,
    Netns,
    Postgres,
    Process,
    Refused,
    RemoteClient,
    RpcTool,
    make_netns,
    new_wg_key,
    serving,
    wait_for,
)
from tests.hub import Hub, make_hub, start_wireguard

GONE_S = 2.0  # a revoked host's peer is gone within this time
SILENCE = "UPDATE hosts SET status = 'offline' WHERE host_id = %s"


class World:
    """A control plane, its hub, and hosts in one namespace."""

    def __init__(self, cp: ControlPlane, hub: Hub, tool: RpcTool) -> None:
        self.cp = cp
        self.hub = hub
        self.tool = tool
        self.used = 20

    def new_ip(self) -> str:
        """An address that no host has."""
        self.used += 1
        return f"10.77.0.{self.used}"

    def host(self) -> RemoteClient:
        """A host that is online; its peer was set by hand, as the document says."""
        client = RemoteClient(self.cp, self.tool, self.new_ip())
        self.hub.set(client.wg_key, client.address)
        client.host_id = client.register(self.cp.mint(payout_pubkey=WALLET)).host_id
        client.heartbeat()
        return client

    def set_new(self, client: RemoteClient) -> str:
        """The operator sets a new key for a host that fell silent; gives it back.

        For one that is up the next comparison would take it for a typing error.
        """
        self.cp.postgres.execute(self.cp.database, SILENCE, client.host_id)
        key = new_wg_key()
        self.hub.set(key, client.address)
        return key

    def revoke(self, client: RemoteClient) -> None:
        """`cp_server.py revoke`: straight on the database."""
        done = self.cp.command("revoke", client.host_id)
        assert done.returncode == 0, done.stderr

    def wait_peer(self, key: str, ip: str | None, timeout_s: float = 10) -> float:
        """Wait until a peer has exactly this address (None: is gone); gives back the seconds."""
        began = time.monotonic()
        wait_for(f"peer {key} {ip}", lambda: self.hub.peers().get(key) == ip or None, timeout_s)
        return time.monotonic() - began

    def doctor(self, *more: str) -> dict[str, Any]:
        """What `doctor --invariants` finds."""
        done = self.cp.command("doctor", "--invariants", "--json", *more, *self.cp.flags)
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (not found["ok"])
        return found

    def check(self) -> None:
        """The database's and the hub's invariants hold."""
        found = self.doctor()
        assert found["ok"], found

    def metric(self, name: str) -> float:
        """One value of /metrics."""
        assert self.cp.netns
        url = f"http://127.0.0.1:{self.cp.http_port}/metrics"
        done = subprocess.run(
            self.cp.netns.argv(["curl", "-sS", "--noproxy", "*", url]),
            capture_output=True,
            text=True,
            check=True,
        )
        match = re.search(rf"^{re.escape(name)} (\S+)$", done.stdout, re.MULTILINE)
        assert match, done.stdout
        return float(match[1])

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """The control plane ends and starts again: its first act is a full comparison."""
        self.cp.stop(how)
        self.cp.start()


@pytest.fixture(scope="module")
def world(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for this file; each test leaves it as the database says."""
    directory = tmp_path_factory.mktemp("world")
    with make_netns() as netns, make_hub(netns, directory / "hub") as hub:
        flags = (f"--wg-socket={hub.socket}",)
        with serving(postgres, directory / "cp", *flags, netns=netns) as cp:
            tool = RpcTool(netns)
            yield World(cp, hub, tool)
            tool.close()


@pytest.fixture(autouse=True)
def _left_well(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of the shared world the invariants hold."""
    yield
    if "world" in request.fixturenames:
        request.getfixturevalue("world").check()


# The manual way, and what the database adds


def test_a_peer_set_by_hand_is_adopted(world: World) -> None:
    """Set before the host registers: unknown, listed, left alone; then the host's."""
    key, ip = new_wg_key(), world.new_ip()
    world.hub.set(key, ip)
    world.restart()
    note = f"unknown peer {key}: no host has registered with this key"
    assert note in world.doctor()["notes"]
    assert world.hub.peers()[key] == ip
    client = RemoteClient(world.cp, world.tool, ip, key)
    client.register(world.cp.mint(payout_pubkey=WALLET))
    client.heartbeat()
    assert note not in world.doctor()["notes"]
    assert world.hub.peers()[key] == ip
    done = world.cp.command("doctor", *world.cp.flags)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is well")


def test_a_host_whose_peer_is_missing_or_has_more_than_its_address(world: World) -> None:
    bare = world.host()
    world.hub.remove(bare.wg_key)
    wide = world.host()
    world.hub.set(wide.wg_key, wide.address, "10.77.9.9")
    world.restart()
    world.wait_peer(bare.wg_key, bare.address)
    world.wait_peer(wide.wg_key, wide.address)


def test_a_hub_that_rebooted_without_a_save(world: World) -> None:
    hosts = [world.host() for _ in range(3)]
    before = {client.wg_key: client.address for client in hosts}
    world.hub.stop_interface()
    world.hub.start_interface()
    assert world.hub.peers() == {}
    world.restart()
    wait_for("peers", lambda: before.items() <= world.hub.peers().items() or None)
    for client in hosts:
        client.heartbeat()


def test_a_host_learns_where_it_is_seen(world: World) -> None:
    """A home's public address, at which its router may answer its workloads."""
    there, nowhere = world.host(), world.host()
    world.hub.wg("set", "peer", there.wg_key, "endpoint", "203.0.113.7:4711")

    def learn() -> bool:
        return there.heartbeat().seen_address == "203.0.113.7"

    world.restart()
    wait_for("the first look", lambda: learn() or None)
    assert nowhere.heartbeat().seen_address == ""


def connect(world: World, private: str, directory: Path) -> Process:
    """A host's end of the tunnel, beside the hub; it begins a handshake at once."""
    assert world.cp.netns
    name = f"oi{secrets.token_hex(4)}"
    interface = start_wireguard(world.cp.netns, name, directory)
    (directory / "key").write_text(private)
    world.hub.wg("set", "listen-port", "51820")
    peer = ["peer", world.hub.wg("show", "public-key").strip(), "allowed-ips", "10.77.0.1/32"]
    peer += ["endpoint", "127.0.0.1:51820", "persistent-keepalive", "1"]
    subprocess.run(["wg", "set", name, "private-key", str(directory / "key"), *peer], check=True)
    for each in (world.hub.name, name):
        subprocess.run(["ip", "-n", world.cp.netns.name, "link", "set", each, "up"], check=True)
    return interface


def test_a_silent_host_may_begin_with_an_earlier_time(world: World, tmp_path: Path) -> None:
    """The hub forgets its last handshake, once; e2e/test_fleet.py turns the clock of a machine.

    A copy of the control plane to which a session is dead after 3 s.
    """
    text = (ROOT / "cp_server.py").read_text()
    changed = text.replace("PEERS_RENEW_S = 180", "PEERS_RENEW_S = 3")
    assert changed != text
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "cp_server.py").write_text(changed)
    (scripts / "proto").symlink_to(ROOT / "proto")
    private = world.hub.wg_key()
    argv = ["wg", "pubkey"]
    key = subprocess.run(argv, input=private, capture_output=True, text=True, check=True).stdout
    client = RemoteClient(world.cp, world.tool, world.new_ip(), key.strip())
    world.hub.set(client.wg_key, client.address)
    client.host_id = client.register(world.cp.mint(payout_pubkey=WALLET)).host_id
    client.heartbeat()

    def read_handshake() -> int:
        rows = (line.split() for line in world.hub.wg("show", "latest-handshakes").splitlines())
        return int(dict(rows)[client.wg_key])

    interface = connect(world, private, tmp_path)
    wait_for("a handshake", read_handshake)
    interface.stop(signal.SIGKILL)
    time.sleep(4)
    world.cp.scripts = scripts
    try:
        world.restart()
        time.sleep(2)
        assert read_handshake() > 0  # it is up
        world.cp.postgres.execute(world.cp.database, SILENCE, client.host_id)
        world.restart()
        wait_for("a hub that has forgotten", lambda: read_handshake() == 0)
        world.wait_peer(client.wg_key, client.address)
    finally:
        world.cp.scripts = ROOT
        world.restart()


# Revocation


def test_a_host_that_is_revoked_by_the_cli(world: World) -> None:
    client = world.host()
    world.revoke(client)
    took_s = world.wait_peer(client.wg_key, None, GONE_S)
    print(f"gone {took_s:.2f} s after the command")
    said = f'INFO peer remove key="{client.wg_key}"'
    wait_for(said, lambda: said in world.cp.log)  # said after it is done


def test_a_host_that_is_revoked_by_the_api(world: World) -> None:
    client = world.host()
    assert world.cp.netns
    url = f"http://127.0.0.1:{world.cp.http_port}/api/v1/admin/hosts/{client.host_id}/revoke"
    argv = ["curl", "-sSf", "--noproxy", "*", "-X", "POST", url]
    argv += ["-H", f"Authorization: Bearer {world.cp.token}"]
    subprocess.run(world.cp.netns.argv(argv), check=True, stdout=subprocess.DEVNULL)
    world.wait_peer(client.wg_key, None, GONE_S)


def test_a_host_that_is_revoked_in_the_database_itself(world: World) -> None:
    client = world.host()
    sql = "UPDATE hosts SET status = 'revoked', status_at = now(), revoked_at = now()"
    world.cp.postgres.execute(world.cp.database, f"{sql} WHERE host_id = '{client.host_id}'")
    sql = "UPDATE sessions SET ended_at = now() FROM hosts h WHERE h.host_no = sessions.host_no"
    world.cp.postgres.execute(
        world.cp.database, f"{sql} AND h.status = 'revoked' AND sessions.ended_at IS NULL"
    )
    sql = "INSERT INTO audit_log (actor, action, subject, detail)"
    world.cp.postgres.execute(
        world.cp.database, f"{sql} VALUES ('psql', 'host.revoke', '{client.host_id}', '{{}}')"
    )
    world.wait_peer(client.wg_key, None, GONE_S)


def test_a_revoked_hosts_key_that_somebody_sets_again(world: World) -> None:
    client = world.host()
    world.revoke(client)
    world.wait_peer(client.wg_key, None, GONE_S)
    world.cp.stop()  # a comparison may be due, and would be first
    world.hub.set(client.wg_key, "10.77.7.7")  # also at another address
    found = world.doctor()
    assert [f"the hub has peer {client.wg_key}" in row["what"] for row in found["findings"]] == [
        True
    ]
    world.cp.start()
    world.wait_peer(client.wg_key, None)


def test_a_comparison_that_began_before_a_revocation_sets_no_peer_after_it(world: World) -> None:
    client = world.host()

    async def work(db: cp_server.Database) -> None:
        peers = cp_server.Peers(str(world.hub.socket), db, cp_server.Metrics())
        world.revoke(client)
        await peers._look()
        assert client.wg_key not in world.hub.peers()
        late = cp_server.PeerChange("set", client.wg_key, client.address)
        await peers._apply([late])

    asyncio.run(cp_server.with_database(world.cp.dsn_file, work))
    assert client.wg_key not in world.hub.peers()


def test_a_revoked_hosts_address_goes_to_the_next(world: World) -> None:
    old = world.host()
    world.revoke(old)
    world.wait_peer(old.wg_key, None, GONE_S)
    new = RemoteClient(world.cp, world.tool, old.address)
    world.hub.set(new.wg_key, new.address)
    new.register(world.cp.mint(payout_pubkey=WALLET))
    new.heartbeat()
    world.wait_peer(new.wg_key, new.address)


# Moved by hand


def test_a_wg_set_that_takes_the_address_of_a_host_that_is_up(world: World) -> None:
    """A typing error: the host gets its address back, the other peer stays without one."""
    client, stranger = world.host(), new_wg_key()
    world.cp.stop()
    world.hub.set(stranger, client.address)
    assert world.hub.peers()[client.wg_key] == ""
    found = world.doctor()
    assert stranger in found["findings"][0]["what"]
    world.cp.start()
    world.wait_peer(client.wg_key, client.address)
    assert world.hub.peers()[stranger] == ""
    world.hub.remove(stranger)


def test_two_hosts_whose_addresses_were_exchanged(world: World) -> None:
    a, b = world.host(), world.host()
    world.hub.set(a.wg_key, b.address)
    world.hub.set(b.wg_key, a.address)
    world.restart()
    world.wait_peer(a.wg_key, a.address)
    world.wait_peer(b.wg_key, b.address)


def test_a_new_key_by_hand_for_a_host_that_is_silent(world: World) -> None:
    """The operator's `wg set` is left alone, said, and right once the host comes with that key."""
    client, key = world.host(), new_wg_key()
    world.cp.postgres.execute(world.cp.database, SILENCE, client.host_id)
    world.hub.set(key, client.address)
    world.restart()
    said = "WARN an unknown peer has the address of a host that is silent"
    wait_for(said, lambda: said in world.cp.log)
    assert f'ip={client.address} host="{client.wg_key}" peer="{key}"' in world.cp.log
    assert world.metric('openinfra_peers{state="conflict"}') == 1
    assert key in world.doctor()["findings"][0]["todo"]
    assert world.hub.peers()[key] == client.address
    former, client.wg_key = client.wg_key, key
    client.resume()
    client.heartbeat()
    wait_for("well", lambda: world.metric('openinfra_peers{state="conflict"}') == 0 or None)
    world.wait_peer(former, None)  # a host has one peer
    assert world.hub.peers()[key] == client.address


def test_a_host_that_says_another_key(world: World) -> None:
    """Resume with a new key: its peer is replaced, the former key is gone."""
    client = world.host()
    former, client.wg_key = client.wg_key, world.set_new(client)
    client.resume()
    world.wait_peer(client.wg_key, client.address)
    world.wait_peer(former, None)
    world.hub.set(former, "10.77.8.8")  # set again, for another machine: as good as unknown
    world.restart()
    world.wait_peer(client.wg_key, client.address)
    assert f"unknown peer {former}" in " ".join(world.doctor()["notes"])
    world.revoke(client)
    world.wait_peer(client.wg_key, None, GONE_S)
    world.restart()
    world.wait_peer(former, None)  # also a key of before of a revoked host


def test_a_lost_identity_that_comes_with_its_secret_and_another_key(world: World) -> None:
    client = world.host()
    former, client.wg_key = client.wg_key, world.set_new(client)
    client.register(world.cp.mint(payout_pubkey=WALLET))
    world.wait_peer(client.wg_key, client.address)
    world.wait_peer(former, None)


# Keys that a host has not


@pytest.mark.parametrize("whose", ["nobody's", "a peer set by hand", "the hub's", "another host's"])
def test_a_host_that_claims_a_key_that_is_not_its_own(world: World, whose: str) -> None:
    """Neither at its first call nor later; the hub stays as it is, and others are set."""
    stranger = RemoteClient(world.cp, world.tool, world.new_ip())
    world.hub.set(stranger.wg_key, stranger.address)
    thief, ip = world.host(), world.new_ip()
    own = new_wg_key()
    world.hub.set(own, ip)
    claimed = {
        "nobody's": new_wg_key(),
        "a peer set by hand": stranger.wg_key,
        "the hub's": world.hub.wg("show", "public-key").strip(),
        "another host's": world.host().wg_key,
    }[whose]
    before = world.hub.peers()
    newcomer = RemoteClient(world.cp, world.tool, ip, claimed)
    token = world.cp.mint(payout_pubkey=WALLET)
    with pytest.raises(Refused) as caught:
        newcomer.register(token)
    assert caught.value.reason == ("KEY_TAKEN" if whose == "another host's" else "WRONG_ADDRESS")
    with pytest.raises(Refused) as caught:
        thief.resume(wg_pubkey=claimed)
    assert caught.value.reason == "WRONG_ADDRESS"
    thief.heartbeat()  # its session is the one of before
    newcomer.wg_key = own
    newcomer.register(token)  # the invite is unspent
    world.restart()
    world.wait_peer(own, ip)
    assert world.hub.peers() == before
    world.hub.remove(stranger.wg_key)


def test_a_key_that_no_tunnel_can_have(world: World) -> None:
    """32 zero bytes: refused at the door; in the database by whatever way, it holds up nobody."""
    client = RemoteClient(world.cp, world.tool, world.new_ip(), "A" * 43 + "=")
    with pytest.raises(Refused) as caught:
        client.register(world.cp.mint(payout_pubkey=WALLET))
    assert caught.value.reason == "BAD_REQUEST"
    odd, client = world.host(), world.host()
    key = "UPDATE hosts SET wg_pubkey = %s WHERE host_id = %s"
    world.cp.postgres.execute(world.cp.database, key, "A" * 43 + "=", odd.host_id)
    world.hub.remove(client.wg_key)
    try:
        world.restart()
        world.wait_peer(client.wg_key, client.address)
        said = "the hub did not take 1 peers: a key is not base64 of 32 bytes"
        wait_for(said, lambda: said in world.cp.log)
    finally:
        world.cp.postgres.execute(world.cp.database, key, odd.wg_key, odd.host_id)
        world.restart()


def test_a_new_key_while_the_helper_is_away(world: World) -> None:
    """It cannot be proved, so it waits; the key that is known needs no proof."""
    client = world.host()
    key = world.set_new(client)
    assert world.hub.helper
    world.hub.helper.stop(signal.SIGKILL)
    try:
        client.resume()
        with pytest.raises(Refused) as caught:
            client.resume(wg_pubkey=key)
        assert caught.value.reason == "TRY_LATER"
    finally:
        world.hub.start_helper()
    client.wg_key = key
    client.resume()
    world.wait_peer(key, client.address)


# Faults


def test_a_helper_that_is_away(world: World) -> None:
    """Said once, heartbeats go on, a revoked host is gone once the helper is back."""
    client, other = world.host(), world.host()
    world.wait_peer(other.wg_key, other.address)
    compared = "openinfra_peers_checked_time_seconds"

    def is_quiet() -> bool:
        before = world.metric(compared)
        time.sleep(3)
        return world.metric(compared) == before

    wait_for("no comparison is due for a minute", is_quiet, 30)
    assert world.hub.helper
    before = world.cp.log.count("cannot reach the WireGuard helper")
    world.hub.helper.stop(signal.SIGKILL)
    world.revoke(client)
    wait_for("said", lambda: world.cp.log.count("cannot reach the WireGuard helper") > before)
    time.sleep(3)
    other.heartbeat()
    assert world.cp.log.count("cannot reach the WireGuard helper") == before + 1
    assert any("cannot reach the WireGuard" in row["what"] for row in world.doctor()["findings"])
    checked = world.metric(compared)
    world.hub.start_helper()
    world.wait_peer(client.wg_key, None, GONE_S)
    wait_for("well", lambda: world.metric(compared) > checked)
    said = "INFO the hub is as the database says again"
    wait_for(said, lambda: said in world.cp.log)


def test_a_helper_that_says_nothing(world: World) -> None:
    """SIGSTOP: heartbeats go on, `serve` ends in time, and all is right after SIGCONT."""
    client, other = world.host(), world.host()
    assert world.hub.helper
    world.hub.helper.child.send_signal(signal.SIGSTOP)
    try:
        world.revoke(client)
        for _ in range(5):
            other.heartbeat()
            time.sleep(0.2)
        began = time.monotonic()
        assert world.cp.stop() == 0
        assert time.monotonic() - began < 5
    finally:
        world.hub.helper.child.send_signal(signal.SIGCONT)
    world.cp.start()
    world.wait_peer(client.wg_key, None, GONE_S)


def test_an_interface_that_is_away(world: World) -> None:
    client = world.host()
    before = world.cp.log.count("the WireGuard helper refused")
    world.hub.stop_interface()
    world.restart()
    wait_for("said", lambda: world.cp.log.count("the WireGuard helper refused") > before)
    client.heartbeat()
    world.hub.start_interface()
    world.wait_peer(client.wg_key, client.address, 15)  # PEERS_RETRY_S


@pytest.mark.parametrize("who", ["cp", "helper"])
def test_kill_9_in_the_middle_of_many_changes(world: World, who: str) -> None:
    hosts = [world.host() for _ in range(12)]
    for turn in range(3):
        world.hub.stop_interface()
        world.hub.start_interface()
        world.revoke(hosts.pop())
        world.restart(signal.SIGKILL)
        time.sleep(0.03 * turn)
        if who == "cp":
            world.restart(signal.SIGKILL)
        else:
            assert world.hub.helper
            world.hub.helper.stop(signal.SIGKILL)
            world.hub.start_helper()
        wanted = {client.wg_key: client.address for client in hosts}
        for key, ip in wanted.items():
            world.wait_peer(key, ip, 15)
    world.check()


def test_answers_that_are_none(
    world: World, tmp_path: Path, make_cp: Callable[..., ControlPlane]
) -> None:
    """A helper gone mad ends nothing."""
    for number, said in enumerate((b"", b"{}", b'{"ok":true}\n', b'{"ok":true,"peers":[1]}\n')):
        path = tmp_path / f"mad{number}.sock"
        code = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()"
        code += "\nwhile True:\n c,_=s.accept()\n c.recv(999)\n c.sendall(eval(sys.argv[2]))\n"
        code += " c.close()"
        with subprocess.Popen(["/usr/bin/python3", "-c", code, str(path), repr(said)]) as child:
            try:
                wait_for("the socket", path.exists)
                cp = make_cp("--heartbeat-s=1", f"--wg-socket={path}")
                assert cp.process
                cp.process.wait_log("WARN")
                time.sleep(0.5)
                assert cp.call("GET", "/readyz")[0] == 200
                assert cp.stop() == 0
            finally:
                child.terminate()


def test_a_database_that_is_away(spare_postgres: Postgres, tmp_path: Path, netns: Netns) -> None:
    with make_hub(netns, tmp_path / "hub") as hub:
        flags = (f"--wg-socket={hub.socket}",)
        with serving(spare_postgres, tmp_path / "cp", *flags, netns=netns) as cp:
            tool = RpcTool(netns)
            world = World(cp, hub, tool)
            client, other = world.host(), world.host()
            spare_postgres.stop(signal.SIGQUIT)
            time.sleep(2)
            assert set(hub.peers()) == {client.wg_key, other.wg_key}
            spare_postgres.start()
            world.revoke(client)
            world.wait_peer(client.wg_key, None, 5)  # the pool comes back first
            other.heartbeat()
            world.check()
            tool.close()


def test_without_a_socket_nothing_is_kept(make_cp: Callable[..., ControlPlane]) -> None:
    cp = make_cp("--heartbeat-s=1")
    assert "openinfra_peers" not in cp.call("GET", "/metrics")[1].replace("HELP", "")
    done = cp.command("doctor", "--invariants", "--json", "--wg-socket=/nonexistent/wg.sock")
    found = json.loads(done.stdout)
    assert "cannot reach the WireGuard helper: No such file" in found["findings"][0]["what"]
    assert done.returncode == 1


# Keys that are new for a host ---------------------------------------------------------------------


class SlowHub:
    """The helper's socket, where a dump takes its time, one after the other, as the real one's."""

    def __init__(self, path: Path, takes_s: float) -> None:
        self.path, self.takes_s = path, takes_s
        self.dumps = 0
        self.turn = asyncio.Lock()

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._answer, str(self.path))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        async with self.turn:  # also for who has gone meanwhile
            self.dumps += 1
            await asyncio.sleep(self.takes_s)
        peers = [{"key": "k" * 43 + "=", "allowed_ips": ["10.77.0.42/32"]}]
        writer.write(json.dumps({"ok": True, "peers": peers}).encode() + b"\n")
        writer.close()


def make_peers(path: Path) -> cp_server.Peers:
    metrics = cp_server.Metrics()
    for name, kind, text in cp_server.METRICS:
        metrics.define(name, kind, text)
    nowhere: Any = None  # it is not asked for here
    return cp_server.Peers(str(path), nowhere, metrics)


def test_callers_that_go_away_keep_nobody_from_the_proof(tmp_path: Path) -> None:
    """A host that asks again and again with a deadline of 50 ms; and each of them costs nothing."""

    async def ask() -> tuple[float, int]:
        hub = SlowHub(tmp_path / "hub", 0.4)
        server = await hub.serve()
        peers = make_peers(hub.path)
        loop = asyncio.get_running_loop()
        ending = asyncio.Event()

        async def flood() -> None:
            while not ending.is_set():
                with contextlib.suppress(asyncio.TimeoutError, cp_server.Refusal):
                    await asyncio.wait_for(peers.check_key("10.77.0.9", "x"), 0.05)

        crowd = [loop.create_task(flood()) for _ in range(20)]
        await asyncio.sleep(0.2)
        took = []
        for _ in range(2):
            began = loop.time()
            await asyncio.wait_for(peers.check_key("10.77.0.42", "k" * 43 + "="), 10)
            took.append(loop.time() - began)
        ending.set()
        await asyncio.gather(*crowd)
        server.close()
        return max(took), hub.dumps

    longest_s, dumps = asyncio.run(ask())
    assert longest_s < 10
    assert dumps <= 4


def test_a_hub_that_cannot_be_read_refuses_all_who_wait(tmp_path: Path) -> None:
    async def ask() -> list[object]:
        peers = make_peers(tmp_path / "nobody")
        calls = [peers.check_key("10.77.0.42", "k" * 43 + "=") for _ in range(3)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    refused = asyncio.run(ask())
    assert [isinstance(each, cp_server.Refusal) and each.code for each in refused] == [
        "TRY_LATER"
    ] * 3
