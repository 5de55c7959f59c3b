"""The WireGuard helper on a real interface (wireguard-go): what it does and what it refuses."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, WG_KEY, make_netns, new_wg_key
from tests.hub import SYSTEM_PYTHON, Hub, make_hub

UNITS = ROOT / "systemd"


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One hub for this file."""
    with make_netns() as netns, make_hub(netns, tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest.fixture
def hub(shared_hub: Hub) -> Hub:
    """The hub without peers."""
    for key in shared_hub.peers():
        shared_hub.remove(key)
    return shared_hub


def test_a_peer_is_set_dumped_and_removed(hub: Hub) -> None:
    key, other = new_wg_key(), new_wg_key()
    hub.set(other, "10.77.0.9", "10.77.0.10")
    assert hub.ask(verb="set", key=key, ip="10.77.16.5") == {"ok": True}
    assert hub.ask(verb="set", key=key, ip="10.77.16.5") == {"ok": True}
    hub.wg("set", "peer", key, "endpoint", "192.0.2.7:51820")
    peers = {peer.pop("key"): peer for peer in hub.ask(verb="dump")["peers"]}
    assert peers[key] == {
        "allowed_ips": ["10.77.16.5/32"],
        "endpoint": "192.0.2.7:51820",
        "latest_handshake_at": 0,
    }
    assert sorted(peers[other]["allowed_ips"]) == ["10.77.0.10/32", "10.77.0.9/32"]
    assert peers[other]["endpoint"] is None
    assert hub.ask(verb="remove", key=key) == {"ok": True}
    assert hub.ask(verb="remove", key=key) == {"ok": True}  # gone is gone
    assert set(hub.peers()) == {other}


def test_no_private_key_comes_out(hub: Hub) -> None:
    key = new_wg_key()
    secret = new_wg_key()
    hub.wg("set", "peer", key, "preshared-key", "/dev/stdin", stdin=secret)
    private = hub.wg("show", "private-key").strip()
    raw = hub.ask_raw(b'{"verb":"dump"}\n')
    assert key.encode() in raw
    assert private.encode() not in raw
    assert secret.encode() not in raw


def test_an_address_is_not_taken_from_another_peer(hub: Hub) -> None:
    first, second, third = new_wg_key(), new_wg_key(), new_wg_key()
    hub.set(first, "10.77.0.42", "10.77.0.43")
    before = hub.peers()
    answer = hub.ask(verb="set", key=second, ip="10.77.0.42")
    assert answer == {"ok": False, "error": f"10.77.0.42 belongs to peer {first}"}
    answer = hub.ask(verb="set", key=second, ip="10.77.0.42", replaces=third)
    assert answer["ok"] is False
    assert hub.peers() == before
    assert hub.ask(verb="set", key=second, ip="10.77.0.42", replaces=first) == {"ok": True}
    assert hub.peers() == {first: "10.77.0.43", second: "10.77.0.42"}


def test_many_changes_at_once(hub: Hub) -> None:
    """Two hosts whose addresses were exchanged, one that goes, one that cannot be: in one line."""
    a, b, gone, stranger, late = (new_wg_key() for _ in range(5))
    hub.set(a, "10.77.0.3")
    hub.set(b, "10.77.0.2")
    hub.set(gone, "10.77.0.4")
    hub.set(stranger, "10.77.0.5")
    changes = [
        {"verb": "remove", "key": gone},
        {"verb": "set", "key": a, "ip": "10.77.0.2", "replaces": b},
        {"verb": "set", "key": b, "ip": "10.77.0.3", "replaces": a},
        {"verb": "set", "key": late, "ip": "10.77.0.5"},
        {"verb": "set", "key": late, "ip": "10.77.0.4"},
    ]
    error = f"10.77.0.5 belongs to peer {stranger}"
    answer = hub.ask(verb="apply", changes=changes)
    assert answer == {"ok": True, "refused": [{"key": late, "error": error}]}
    assert hub.peers() == {
        a: "10.77.0.2",
        b: "10.77.0.3",
        stranger: "10.77.0.5",
        late: "10.77.0.4",
    }


KEY = WG_KEY  # the same in each worker of pytest-xdist: it is in names of tests
BAD = {
    "no JSON": b"peers please\n",
    "not UTF-8": b"\xff\xfe\n",
    "nested": b"[" * 100_000 + b"\n",
    "a list": b"[]\n",
    "no verb": b"{}\n",
    "another verb": b'{"verb": "down"}\n',
    "dump with more": b'{"verb": "dump", "interface": "eth0"}\n',
    "a number as a key": b'{"verb": "remove", "key": 7}\n',
    "a verb as a list": b'{"verb": ["set"], "key": "x", "ip": "x"}\n',
    "set with more": f'{{"verb":"set","key":"{KEY}","ip":"10.77.0.2","endpoint":"a"}}\n'.encode(),
    "apply without a list": b'{"verb": "apply", "changes": {}}\n',
    "too many": b'{"verb": "apply", "changes": [' + b"0," * 1_000 + b"0]}\n",
    "too long": b'{"verb": "dump"' + b" " * 262_200 + b"}\n",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line(hub: Hub, what: str) -> None:
    raw = hub.ask_raw(BAD[what])
    assert raw.startswith(b'{"ok":false,"error":"')
    assert raw.count(b"\n") == 1
    assert hub.peers() == {}


@pytest.mark.parametrize(
    "ip",
    [
        *("10.77.0.1", "10.77.0.0", "10.77.255.255", "10.78.0.2", "192.168.1.1", "::1", "", "x"),
        *("10.77.0.2/32", "10.77.0.02", "10.77.0.2,0.0.0.0/0", "10.77.0.2 peer", "0.0.0.0/0"),
    ],
)
def test_a_bad_address(hub: Hub, ip: str) -> None:
    assert "10.77.255.254" in hub.ask(verb="set", key=KEY, ip=ip)["error"]
    assert hub.peers() == {}


@pytest.mark.parametrize(
    "key",
    [
        *("", "x", KEY[:-1], KEY + "=", KEY[:-2] + "B=", " " + KEY, KEY + "\n", "A" * 43 + "="),
        *("/dev/stdin", "--help", KEY.replace(KEY[0], "\u00e9", 1)),
    ],
)
def test_a_bad_key(hub: Hub, key: str) -> None:
    for request in ({"verb": "set", "key": key, "ip": "10.77.0.2"}, {"verb": "remove", "key": key}):
        assert "key" in hub.ask(**request)["error"]
    assert hub.peers() == {}
    changes: list[dict[str, Any]] = [{"verb": "remove", "key": key}]
    changes += [{"verb": "set", "key": key, "ip": "10.77.0.2"}, {"verb": "apply", "changes": []}]
    changes += [{"verb": "set", "key": KEY, "ip": "10.77.0.2"}]
    answer = hub.ask(verb="apply", changes=changes)
    assert (answer["ok"], len(answer["refused"])) == (True, 3)
    assert hub.peers() == {KEY: "10.77.0.2"}  # what is wrong in a list holds up nothing of it
    hub.remove(KEY)


def test_who_says_nothing_or_reads_nothing_holds_up_nobody_for_long(hub: Hub) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for sock in silent:
        sock.connect(str(hub.socket))
        sock.sendall(b'{"verb"')
    gone = socket.socket(socket.AF_UNIX)
    gone.connect(str(hub.socket))
    gone.sendall(b'{"verb":"dump"}\n')
    gone.close()
    began = time.monotonic()
    assert hub.ask(verb="dump") == {"ok": True, "peers": []}
    assert 3 < time.monotonic() - began < 6  # two times READ_S
    for sock in silent:
        sock.close()
    assert hub.ask(verb="dump")["ok"] is True


def test_an_interface_that_is_away(hub: Hub) -> None:
    hub.stop_interface()
    try:
        for request in ({"verb": "dump"}, {"verb": "set", "key": KEY, "ip": "10.77.0.2"}):
            answer = hub.ask(**request)
            assert answer["ok"] is False
            assert "wg" in answer["error"]
    finally:
        hub.start_interface()
    assert hub.ask(verb="set", key=KEY, ip="10.77.0.2") == {"ok": True}


def test_the_socket_is_roots_alone_unless_systemd_gives_it(hub: Hub) -> None:
    assert stat.S_IMODE(os.stat(hub.socket).st_mode) & 0o077 == 0
    script = [SYSTEM_PYTHON, "-SI", str(UNITS / "openinfra_wg.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "openinfra-wg.socket" in done.stderr


def test_it_takes_the_socket_that_systemd_gives(hub: Hub, tmp_path: Path) -> None:
    """As sd_listen_fds(3) says: descriptor 3, for this process id."""
    path = tmp_path / "given.sock"
    code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ |= {'LISTEN_FDS': '1',"
    code += " 'LISTEN_PID': str(os.getpid())}; os.execv(sys.argv[2], sys.argv[2:])"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = [SYSTEM_PYTHON, "-SI", str(UNITS / "openinfra_wg.py"), f"--interface={hub.name}"]
        argv = hub.netns.argv([SYSTEM_PYTHON, "-c", code, str(listener.fileno()), *script])
        with subprocess.Popen(argv, pass_fds=[listener.fileno()]) as child:
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    sock.connect(str(path))
                    sock.sendall(b'{"verb":"dump"}\n')
                    assert sock.recv(1000) == b'{"ok":true,"peers":[]}\n'
            finally:
                child.terminate()


@pytest.mark.parametrize("unit", ["openinfra-wg.service", "openinfra-wg.socket"])
def test_the_units_are_well_formed(unit: str) -> None:
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(UNITS / unit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_exposure_of_the_helper() -> None:
    path = UNITS / "openinfra-wg.service"
    argv = ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager"]
    done = subprocess.run(
        [*argv, str(path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout[-300:]
    assert "CapabilityBoundingSet=CAP_NET_ADMIN\n" in path.read_text()
