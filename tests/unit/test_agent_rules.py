"""Tables for the agent's pure rules, and the encryption walk over fake sysfs trees."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import agent
from proto import openinfra_pb2 as pb

ID = "abcdefghij234567"
SECRET = "A" * 43
HOST_ID = "2b6f0cc9-04ef-4e5d-9f4e-3d1c5a8b7e60"
WALLET = "4Nd1mYvL8wQ1eFvZ6h9vT2v5b3h1r7uQy5r9d3mF8x2A"
HEX = "ab" * 32


def make_token(invite_id: str = ID, secret: str = SECRET) -> str:
    body = f"oi1_{invite_id}_{secret}"
    return f"{body}_{zlib.crc32(body.encode()):08x}"


# ------------------------------------------------------------------------------------------------
# Invite
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret",
    [SECRET, "_" * 42 + "A", "-_" * 21 + "8", "_used_" * 7 + "Q", "deadbeef_" * 4 + "abcdef8"],
)
def test_token_with_any_secret_is_read(secret: str) -> None:
    text = make_token(secret=secret)
    token = agent.parse_token(text)
    assert token is not None
    assert (token.id, token.text) == (ID, text)
    assert agent.parse_token_state(token) == "unspent"
    assert secret not in repr(token)


def test_token_used_and_none() -> None:
    assert agent.parse_token("") is None
    assert agent.parse_token(f"oi1_{ID}_used") == agent.Token(ID, "")
    assert agent.parse_token_state(agent.Token(ID, "")) == "used"
    assert agent.parse_token_state(None) == "none"


GOOD = make_token()


@pytest.mark.parametrize(
    "text",
    [
        GOOD[:-1],
        GOOD + "0",
        GOOD[:-8] + "00000000",
        GOOD.replace("A", "B", 1),
        GOOD.upper(),
        GOOD.replace("oi1_", "oi2_"),
        GOOD.replace(ID, ID[:-1] + "1"),
        GOOD.replace(ID, ID[:-1]),
        GOOD.replace("_", "-"),
        GOOD + "\n",
        " " + GOOD,
        make_token(secret="A" * 42 + "B"),  # 258 bits whose last two are not zero
        make_token(secret="A" * 42),
        make_token(secret="A" * 44),
        f"oi1_{ID}_USED",
        f"oi1_{ID}_used_",
        "oi1_",
        "hello",
        "é" * 80,
    ],
)
def test_mistyped_token_is_refused_and_its_secret_not_shown(text: str) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.parse_token(text)
    assert caught.value.exit_code == 2
    assert "mistyped" in caught.value.what
    assert "AAAA" not in str(caught.value)


def test_mistyped_token_names_the_invite() -> None:
    with pytest.raises(agent.Error, match=ID):
        agent.parse_token(GOOD[:-1])


# ------------------------------------------------------------------------------------------------
# Firewall
# ------------------------------------------------------------------------------------------------

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
{rows}"""


def make_route(interface: str, network: str) -> str:
    """A line of /proc/net/route on this machine."""
    net = ipaddress.IPv4Network(network)
    words = [
        int.from_bytes(value.packed, sys.byteorder) for value in (net.network_address, net.netmask)
    ]
    return f"{interface}\t{words[0]:08X}\t00000000\t0001\t0\t0\t0\t{words[1]:08X}\t0\t0\t0\n"


@pytest.mark.parametrize(
    ("rows", "networks"),
    [
        ([], ()),
        ([("eth0", "0.0.0.0/0"), ("eth0", "203.0.113.0/24")], ("203.0.113.0/24",)),
        ([("eth0", "192.168.1.0/24"), ("wlan0", "10.0.0.0/16")], ()),  # closed anyway
        ([("tun0", "0.0.0.0/1"), ("tun0", "128.0.0.0/1"), ("tun0", "8.0.0.0/7")], ()),
        ([("tun0", "8.0.0.0/8")], ("8.0.0.0/8",)),
        ([("oi-abc", "203.0.113.0/29"), ("ox-abc", "203.0.113.8/29")], ()),
        ([("openinfra", "203.0.113.1/32")], ()),
        ([("a", "203.0.113.0/25"), ("b", "203.0.113.128/25"), ("c", "203.0.113.0/24")],) * 1
        + (("203.0.113.0/24",),),
    ],
)
def test_which_networks_are_the_homes(
    rows: list[tuple[str, str]], networks: tuple[str, ...]
) -> None:
    text = ROUTES.format(rows="".join(make_route(*row) for row in rows))
    assert agent.parse_routes(text) == networks
    table = agent.render_table(networks, (20_000, 20_001))
    assert all(network in table for network in networks)
    assert "ip saddr 10.77.0.1 tcp dport { 20000, 20001 } accept" in table


KEY = "A" * 43 + "="


@pytest.mark.parametrize(
    ("shown", "addresses"),
    [
        ("", ()),
        (f"{KEY}\t(none)\n", ()),
        (f"{KEY}\t203.0.113.7:51820\n", ("203.0.113.7",)),
        (f"{KEY}\t[2001:db8::7]:51820\n", ()),  # nothing of a workload goes by IPv6
        (f"{KEY}\t203.0.113.7:1\n{KEY}\t198.51.100.9:2\n", ("198.51.100.9", "203.0.113.7")),
        ("198.51.100.9 203.0.113.7", ("198.51.100.9", "203.0.113.7")),  # as guard.json has it
        ("203.0.113.7 } accept; 1.2.3", ("203.0.113.7",)),
    ],
)
def test_where_the_tunnel_sends_to_is_fenced(
    shown: str, addresses: tuple[str, ...], tmp_path: Path
) -> None:
    assert agent.parse_endpoints(shown) == addresses
    agent.save_guard(tmp_path / "guard.json", agent.Guard(1.0, endpoints=shown))
    table = agent.read_wanted(tmp_path / "guard.json", tmp_path / "lease.json")
    (fence,) = re.findall(r'iifname "oi-\*" ip daddr \{ (.*) \} drop', table)
    assert [each for each in addresses if each not in fence.split(", ")] == []
    assert "accept" not in fence


@pytest.mark.parametrize(
    ("seen", "fenced"),
    [("203.0.113.7", True), ("", False), ("[2001:db8::7]", False), ("0.0.0.0/0 } accept", False)],
)
def test_where_the_home_is_seen_from_outside_is_fenced(
    seen: str, fenced: bool, tmp_path: Path
) -> None:
    lease = tmp_path / "lease.json"
    lease.write_bytes(agent.render_lease("boot", agent.Lease(ports=(20_000,), seen=seen)))
    table = agent.read_wanted(tmp_path / "guard.json", lease)
    (fence,) = re.findall(r'iifname "oi-\*" ip daddr \{ (.*) \} drop', table)
    assert fence.endswith(", 203.0.113.7") == fenced
    assert "accept" not in fence
    assert "/0" not in fence.replace("/10", "")
    assert "tcp dport { 20000 } accept" in table


@pytest.mark.parametrize("text", ["", "\n", "Iface\n", ROUTES.format(rows="eth0\t00\n")])
def test_routes_that_cannot_be_read_are_none(text: str) -> None:
    assert agent.parse_routes(text) == ()


# ------------------------------------------------------------------------------------------------
# Env file
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        (b"", {}),
        (b"\n\n# x\n; y\n  # z\n", {}),
        (b"DATA_DIR=/x", {"DATA_DIR": "/x"}),
        (b"DATA_DIR=/x\r\nCONTROL_PLANE=a:1\r\n", {"DATA_DIR": "/x", "CONTROL_PLANE": "a:1"}),
        (b' DATA_DIR = "/a b" \n', {"DATA_DIR": "/a b"}),
        (b"DATA_DIR='/a # b'\n", {"DATA_DIR": "/a # b"}),
        (b"DATA_DIR=/a b\n", {"DATA_DIR": "/a b"}),
        (
            b"INVITE_TOKEN=\nSOLANA_PAYOUT_PUBKEY=''\n",
            {"INVITE_TOKEN": "", agent.OPTIONS[1].env: ""},
        ),
        (b"# \xff\xfe\nDATA_DIR=/x\n", {"DATA_DIR": "/x"}),
    ],
)
def test_env_file_is_read(raw: bytes, values: dict[str, str]) -> None:
    assert agent.parse_env(raw, "f") == values


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\nSECRET_X=hunter2\n", "f:2: unknown key SECRET_X"),
        (b"invite_token=hunter2\n", "f:1: unknown key invite_token"),
        (b"DATA_DIR=/hunter2\n#\nDATA_DIR=/hunter2\n", "f:3: DATA_DIR stands there twice"),
        (b"INVITE_TOKEN hunter2\n", "f:1: line is not KEY=VALUE"),
        (b"export DATA_DIR=hunter2\n", "f:1: line is not KEY=VALUE"),
        (b"=hunter2\n", "f:1: line is not KEY=VALUE"),
        (b"oi1_abc_hunter2" * 5 + b"=x\n", "f:1: line is not KEY=VALUE"),
        (b"DATA_DIR='hunter2\n", "f:1: value of DATA_DIR is malformed"),
        (b'DATA_DIR="\n', "f:1: value of DATA_DIR is malformed"),
        (b"DATA_DIR=hunter2'\n", "f:1: value of DATA_DIR is malformed"),
        (b"DATA_DIR=hunter2\\\n", "f:1: value of DATA_DIR is malformed"),
        (b"DATA_DIR=hunter2\0\n", "f:1: value of DATA_DIR is malformed"),
        (b"DATA_DIR=hunter2\xc3\xa9\n", "f:1: value of DATA_DIR is malformed"),
        (b"DATA_DIR=hunter2\x1b[2J\n", "f:1: value of DATA_DIR is malformed"),
        (b"\xef\xbb\xbfDATA_DIR=/hunter2\n", "f:1: line is not KEY=VALUE"),
    ],
)
def test_bad_env_file_names_the_line_and_never_the_value(raw: bytes, said: str) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.parse_env(raw, "f")
    assert caught.value.what == said
    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)


LINES = st.tuples(
    st.sampled_from([b"DATA_DIR", b"INVITE_TOKEN", b"X", b"#", b""]),
    st.sampled_from([b"=", b" = ", b"", b"\n"]),
    st.sampled_from([b"a/b", b"'a/b'", b'"a/b', b"a/b'", b" ", b"a/b\xff", b""]),
).map(b"".join)


@given(st.lists(LINES, max_size=4).map(b"\n".join))
def test_env_parser_gives_known_keys_or_an_error(raw: bytes) -> None:
    values, said = {}, ""
    try:
        values = agent.parse_env(raw, "f")
    except agent.Error as error:
        said = error.what
    assert "a/b" not in said
    assert set(values) <= {"DATA_DIR", "INVITE_TOKEN"}
    assert set(values.values()) <= {"a/b", ""}


KEEP = st.lists(st.one_of(st.just(b""), st.binary(max_size=20).map(lambda raw: b"#" + raw)))
QUOTES = st.sampled_from([b"", b"'", b'"'])
SPACES = st.sampled_from([b"", b" ", b"\t "])


@given(KEEP, KEEP, QUOTES, SPACES, SPACES, st.sampled_from([b"\n", b"\r\n", b""]))
@example([], [], b"", b"", b"", b"")
def test_scrub_changes_the_value_and_no_other_byte(
    before: list[bytes], after: list[bytes], quote: bytes, left: bytes, right: bytes, end: bytes
) -> None:
    # The token also stands in comments: these are other lines, and stay.
    head = b"".join(line.replace(b"\n", b"") + GOOD.encode() + b"\n" for line in before if line)
    tail = b"\n".join(line.replace(b"\n", b"") for line in after)
    start = left + b"INVITE_TOKEN" + right + b"=" + left + quote
    rest = quote + right + end + (tail if end else b"")
    token = agent.parse_token(GOOD)
    assert token is not None
    scrubbed = agent.scrub_env(head + start + GOOD.encode() + rest, token)
    assert scrubbed == head + start + f"oi1_{ID}_used".encode() + rest


# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["10.77.0.1:9092", "10.77.255.254:65535", "localhost:1", "127.9.9.9:80", "[::1]:9092"],
)
def test_control_plane_is_accepted(text: str) -> None:
    assert agent.parse_control_plane(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.77.0.1",
        ":9092",
        "10.77.0.1:",
        "10.77.0.1:0",
        "10.77.0.1:65536",
        "10.77.0.1:9092:1",
        "10.77.0.1:٣",
        "http://cp:9092",
        "unix:/run/x:1",
        "fd00::1:9092",
        "[fd00::g]:9092",
        "[10.0.0.1]:9092",
        "a b:1",
        "-a:1",
        "10.77.0.1:+1",
        "user@cp:1",
        "[:1",
    ],
)
def test_bad_control_plane_is_refused(text: str) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.parse_control_plane(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "cp.coledex.com:9092",
        "192.168.1.5:9092",
        "10.78.0.1:9092",
        "10.76.255.255:9092",
        "0.0.0.0:9092",
        "localhost.example.com:9092",
        "127.1:9092",
        "0x7f000001:9092",
        "[::]:9092",
        "[fd00::1]:9092",
        "[::ffff:10.77.0.1]:9092",
        "[127.0.0.1]:9092",
    ],
)
def test_control_plane_outside_the_tunnel_is_refused(text: str) -> None:
    with pytest.raises(agent.Error, match="outside the tunnel") as caught:
        agent.parse_control_plane(text)
    assert (caught.value.exit_code, caught.value.todo) == (2, "write 10.77.0.1:9092")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:1", "127.0.0.1"),
        ("localhost:1", "127.0.0.1"),
        ("[::1]:1", "::1"),
        ("10.77.0.1:1", "10.77.0.1"),
        ("cp.example.com:1", "::"),
        ("[::1:1", "::"),
    ],
)
def test_address(text: str, expected: str) -> None:
    assert str(agent.parse_address(text)) == expected


@pytest.mark.parametrize("text", ["", WALLET, "1" * 31 + "2"])
def test_wallet_is_accepted(text: str) -> None:
    assert agent.parse_wallet(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "1" * 32,
        "1" * 31,
        "1" * 33,
        "z" * 44,
        "z" * 43 + "0",
        WALLET[:-1],
        WALLET + "1",
        WALLET.replace("4", "0"),
        "l" * 43,
        "O" * 43,
        "é" * 43,
        "z" * 10000,
        "2",
        "-1",
    ],
)
def test_bad_wallet_is_refused(text: str) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.parse_wallet(text)
    assert caught.value.exit_code == 2
    assert text not in str(caught.value)


def test_flag_beats_env_file_beats_default() -> None:
    args = agent.make_parser().parse_args(["run", "--data-dir", "/flag"])
    values = {"DATA_DIR": "/env", "CONTROL_PLANE": "[::1]:1", "SOLANA_PAYOUT_PUBKEY": ""}
    config = agent.decide_config(args, agent.EnvFile(b"", values, 0o600, 0))
    assert str(config.data_dir) == "/flag"
    assert config.control_plane == "[::1]:1"
    assert str(config.socket) == "/run/openinfra/agent.sock"
    assert (config.wallet, config.token, config.allow_unencrypted) == ("", None, False)


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "--invite-token", GOOD],
        ["run", f"--token={GOOD}"],
        [GOOD],
        ["run", GOOD],
        [],
        ["status", "--data", "x"],
        ["run", "--json"],
    ],
)
def test_bad_command_line_is_a_usage_error_without_the_token(argv: list[str]) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.make_parser().parse_args(argv)
    assert caught.value.exit_code == 2
    assert SECRET not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Identity
# ------------------------------------------------------------------------------------------------

NEW = agent.Identity(HEX, None, None, None, "cd" * 32)
REGISTERED = agent.Identity(HEX, HOST_ID, ID, "ef" * 32, None)
RESUMING = dataclasses.replace(REGISTERED, next_session="01" * 32)


@pytest.mark.parametrize("identity", [NEW, REGISTERED, RESUMING])
def test_identity_comes_back_as_it_was_written(identity: agent.Identity) -> None:
    assert agent.parse_identity(agent.render_identity(identity)) == identity
    assert HEX not in repr(identity)


def spoil(**changes: Any) -> bytes:
    data = json.loads(agent.render_identity(REGISTERED))
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value != "drop"}).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 300,
        b"\n",
        agent.render_identity(REGISTERED)[:-3],
        agent.render_identity(REGISTERED)[:40],
        agent.render_identity(REGISTERED) * 2,
        agent.render_identity(REGISTERED) + b" " * 5000,
        b"[" * 4000,
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"\xff\xfe",
        spoil(format="1"),
        spoil(format=True),
        spoil(format=1.0),
        spoil(format=0),
        spoil(format=-1),
        spoil(format="drop"),
        spoil(host_secret=None),
        spoil(host_secret="drop"),
        spoil(host_secret=HEX.upper()),
        spoil(host_secret=HEX[:-1]),
        spoil(host_secret=HEX + "\n"),
        spoil(host_secret=[HEX]),
        spoil(host_id=HOST_ID.upper()),
        spoil(host_id=""),
        spoil(host_id=7),
        spoil(host_id=None),
        spoil(invite_id="x"),
        spoil(session=None),
        spoil(session="zz" * 32),
        spoil(next_session=""),
        spoil(next_session="drop"),
        spoil(extra=1),
        spoil(host_id=None, session=None),
    ],
)
def test_broken_identity_is_told(raw: bytes) -> None:
    with pytest.raises(agent.BrokenError) as caught:
        agent.parse_identity(raw)
    assert HEX not in str(caught.value)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_identity_parser(raw: bytes) -> None:
    with pytest.raises(agent.BrokenError):
        agent.parse_identity(raw)


@pytest.mark.parametrize("data", [{"format": 2}, {"format": 99, "anything": [1]}])
def test_newer_identity_is_not_broken(data: dict[str, Any]) -> None:
    with pytest.raises(agent.Error, match="newer") as caught:
        agent.parse_identity(json.dumps(data).encode())
    assert caught.value.exit_code == 78


FRESH, USED = agent.Token(ID, GOOD), agent.Token(ID, "")


@pytest.mark.parametrize(
    ("identity", "token", "said"),
    [
        (None, None, "no identity"),
        (None, USED, "invite already used"),
        (None, FRESH, ""),
        (NEW, None, "no identity"),
        (NEW, USED, "invite already used"),
        (NEW, FRESH, ""),
        (REGISTERED, None, ""),
        (REGISTERED, USED, ""),
        (REGISTERED, FRESH, ""),
    ],
)
def test_start(identity: agent.Identity | None, token: agent.Token | None, said: str) -> None:
    if not said:
        agent.decide_start(identity, token)
        return
    with pytest.raises(agent.Error, match=said) as caught:
        agent.decide_start(identity, token)
    assert caught.value.exit_code == 78
    assert caught.value.pairs == ({"invite_id": ID} if token else {})


# ------------------------------------------------------------------------------------------------
# Disk: trees made by hand that look like sysfs (fake)
# ------------------------------------------------------------------------------------------------

LUKS = "CRYPT-LUKS2-0123-openinfra_data"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"sda1": ("", [])}, False),
        ({"dm-0": (LUKS, ["sda1"]), "sda1": ("", [])}, True),
        ({"dm-0": ("CRYPT-LUKS1-x", ["sda1"]), "sda1": ("", [])}, True),
        ({"dm-0": ("CRYPT-PLAIN-x", [])}, True),
        ({"dm-0": ("LVM-abc", ["sda1"]), "sda1": ("", [])}, False),
        ({"dm-1": ("LVM-abc", ["dm-0"]), "dm-0": (LUKS, ["sda1"]), "sda1": ("", [])}, True),
        (
            {
                "dm-2": ("LVM-abc", ["dm-0", "sdb1"]),
                "dm-0": (LUKS, ["sda1"]),
                "sda1": ("", []),
                "sdb1": ("", []),
            },
            False,
        ),
        (
            {
                "md0": ("", ["dm-0", "dm-1"]),
                "dm-0": (LUKS, ["sda1"]),
                "dm-1": (LUKS, ["sdb1"]),
                "sda1": ("", []),
                "sdb1": ("", []),
            },
            True,
        ),
        ({"dm-0": ("CRYPT-VERITY-x", ["sda1"]), "sda1": ("", [])}, False),
        ({"dm-0": ("CRYPT-INTEGRITY-x", ["sda1"]), "sda1": ("", [])}, False),
        ({"dm-1": ("CRYPT-INTEGRITY-x", ["dm-0"]), "dm-0": (LUKS, [])}, True),
        ({"dm-0": ("MY-CRYPT-x", ["sda1"]), "sda1": ("", [])}, False),
        ({"dm-0": ("", ["dm-0"])}, False),  # a loop, which the kernel cannot make
    ],
)
def test_encryption_over_fake_sysfs(
    tmp_path: Path, tree: dict[str, tuple[str, list[str]]], expected: bool
) -> None:
    """The tree is fake; setup_luks2's tests look at real dm-crypt."""
    for name, (uuid, slaves) in tree.items():
        node = tmp_path / "devices" / name
        (node / "slaves").mkdir(parents=True)
        if uuid:
            (node / "dm").mkdir()
            (node / "dm" / "uuid").write_text(uuid + "\n")
        for slave in slaves:
            (node / "slaves" / slave).symlink_to(tmp_path / "devices" / slave)
    data = tmp_path / "data"
    data.mkdir()
    device = data.stat().st_dev
    block = tmp_path / "sys" / "dev" / "block"
    block.mkdir(parents=True)
    name = f"{os.major(device)}:{os.minor(device)}"
    (block / name).symlink_to(tmp_path / "devices" / next(iter(tree)))
    assert agent.is_encrypted(data, tmp_path / "sys") is expected


def test_no_device_in_fake_sysfs_is_not_encrypted(tmp_path: Path) -> None:
    assert agent.is_encrypted(tmp_path, tmp_path / "sys") is False
    assert agent.is_encrypted(tmp_path / "gone", tmp_path / "sys") is False


def test_refusal_of_a_plain_disk_says_later() -> None:
    agent.check_encrypted(Path("/x"), True, False)
    agent.check_encrypted(Path("/x"), False, True)
    with pytest.raises(agent.Error) as caught:
        agent.check_encrypted(Path("/x"), False, False)
    assert caught.value.exit_code == 75


# ------------------------------------------------------------------------------------------------
# Heartbeat
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("next_ms", "nominal_s", "expected_s"),
    [
        (0, 30, 30),
        (0, 90, 60),
        (1, 30, 0.2),
        (200, 30, 0.2),
        (31500, 30, 31.5),
        (60000, 30, 60),
        (60001, 30, 60),
        (2**32 - 1, 30, 60),
    ],
)
def test_interval_is_bounded(next_ms: int, nominal_s: float, expected_s: float) -> None:
    assert agent.decide_interval_s(next_ms, nominal_s) == expected_s


@given(st.integers(-1, 10**9), st.floats(0, 1))
def test_retry_is_bounded(attempt: int, unit: float) -> None:
    assert 0.2 <= agent.decide_retry_s(attempt, False, unit) <= 5
    assert 0.2 <= agent.decide_retry_s(attempt, True, unit) <= 60


def test_retry_grows_and_spreads() -> None:
    assert [agent.decide_retry_s(n, False, 1.0) for n in (1, 2, 3, 4, 9)] == [1, 2, 4, 5, 5]
    assert [agent.decide_retry_s(n, True, 1.0) for n in (1, 2, 5, 6, 99)] == [2, 4, 32, 60, 60]
    assert agent.decide_retry_s(9, True, 0.5) == 30
    assert agent.decide_retry_s(9, True, 0.0) == 0.2


# What the comments at pb.Reason say.
ACTIONS = {
    "REASON_UNSPECIFIED": agent.MINUTE,
    "BAD_REQUEST": agent.MINUTE,
    "UNKNOWN_INVITE": agent.STOP,
    "INVITE_USED": agent.STOP,
    "INVITE_REVOKED": agent.STOP,
    "INVITE_EXPIRED": agent.STOP,
    "INVITE_FOR_OTHER_KEY": agent.STOP,
    "ADDRESS_TAKEN": agent.MINUTE,
    "KEY_TAKEN": agent.STOP,
    "WRONG_ADDRESS": agent.MINUTE,
    "UNKNOWN_HOST": agent.MINUTE,
    "HOST_REVOKED": agent.STOP,
    "HOST_QUARANTINED": agent.MINUTE,
    "SESSION_SUPERSEDED": agent.STOP,
    "UNKNOWN_SESSION": agent.RESUME,
    "TRY_LATER": agent.BACK_OFF,
}


def test_every_reason_of_the_contract_has_its_action() -> None:
    assert list(ACTIONS) == list(pb.Reason.keys()) == list(agent.REFUSALS)
    assert {name: row.action for name, row in agent.REFUSALS.items()} == ACTIONS
    assert all(row.what and row.todo for row in agent.REFUSALS.values())


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("UNAVAILABLE", agent.BACK_OFF),
        ("DEADLINE_EXCEEDED", agent.BACK_OFF),
        ("CANCELLED", agent.BACK_OFF),
        ("RESOURCE_EXHAUSTED", agent.BACK_OFF),
        ("NO_TUNNEL", agent.BACK_OFF),
        ("UNIMPLEMENTED", agent.MINUTE),
        ("INTERNAL", agent.MINUTE),
        ("BAD_REPLY", agent.MINUTE),
    ],
)
def test_plain_codes(name: str, action: agent.Action) -> None:
    assert agent.decide_refusal(name).action is action


def test_delay() -> None:
    assert agent.decide_delay_s(agent.RESUME, 9, True, 0.5) == 0
    assert agent.decide_delay_s(agent.MINUTE, 1, False, 0.5) == 60
    assert agent.decide_delay_s(agent.BACK_OFF, 9, False, 1.0) == 5


def test_error_of_a_used_invite_is_the_documented_line(capsys: pytest.CaptureFixture[str]) -> None:
    refused = agent.RefusedError("INVITE_USED", "by another host")
    error = agent.decide_error(refused, agent.decide_refusal("INVITE_USED"), NEW, ID)
    agent.log("ERROR", error.what, error.todo, **error.pairs)
    expected = f"ERROR invite already used invite_id={ID} ; ask the operator for a fresh invite\n"
    assert capsys.readouterr().err == expected
    refused = agent.RefusedError("HOST_REVOKED", "said so")
    error = agent.decide_error(refused, agent.decide_refusal("HOST_REVOKED"), REGISTERED, ID)
    assert (error.pairs, error.exit_code) == ({"host_id": HOST_ID, "detail": "said so"}, 78)


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "unknown"), (1, "pending"), (2, "online"), (5, "quarantined"), (99, "unknown")],
)
def test_status_name(number: int, name: str) -> None:
    assert agent.parse_status(number) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("kuma", "kuma"), ("kümä\n", "k-m--"), ("a b", "a-b"), ("x" * 300, "x" * 253), ("", "")],
)
def test_hostname(text: str, expected: str) -> None:
    assert agent.parse_hostname(text) == expected


def test_memory() -> None:
    assert agent.parse_memory_bytes("MemTotal:        2048 kB\nMemFree: 1 kB\n") == 2_097_152
    assert agent.parse_memory_bytes("") == 0


def test_foreign_words_stay_on_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.parse_line("a\nERROR b\x1b[2J\u202e") == "a?ERROR b?[2J?"
    assert agent.parse_line("x" * 400) == "x" * 299 + "…"
    agent.log("WARN", "not assignable", reason=agent.parse_line("a\nERROR b=1"), n=1, ok=True)
    assert capsys.readouterr().err == 'WARN not assignable reason="a?ERROR b=1" n=1 ok=true\n'
    agent.log("INFO", "x", "do y", key="a\nERROR b")
    assert capsys.readouterr().err == 'INFO x key="a\\nERROR b" ; do y\n'


# ------------------------------------------------------------------------------------------------
# Control socket, status and doctor
# ------------------------------------------------------------------------------------------------

COPY_ID = "5f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f0b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[" * 4000, "JSON"),
        (b"\xff\n", "JSON"),
        (b"[]\n", "object"),
        (b"{}\n", "object"),
        (b'{"cmd":1}\n', "object"),
        (b'{"cmd":"status","x":1}\n', "fields"),
        (b'{"cmd":"fly"}\n', "unknown cmd, known: status, pause, unpause, leave, earnings"),
        (b'{"cmd":"status","month":"2026-11"}\n', "fields"),
        (b'{"cmd":"earnings","x":1}\n', "fields"),
        (b'{"cmd":"earnings","month":"2026-13"}\n', "month"),
        (b'{"cmd":"earnings","month":202611}\n', "month"),
        (b'{"cmd":"earnings","month":"2026-11-30"}\n', "month"),
        (b'{"cmd":"earnings","cursor":-1}\n', "cursor"),
        (b'{"cmd":"earnings","cursor":true}\n', "cursor"),
        (b'{"cmd":"earnings","cursor":2147483648}\n', "cursor"),
        (b'{"cmd":"earnings","assignment":"web"}\n', "assignment"),
        (b'{"cmd":"earnings","assignment":"\\ud800"}\n', "assignment"),
        (b'{"cmd":"earnings","assignment":7}\n', "assignment"),
        (b'{"cmd":"earnings","assignment":"%s0"}\n' % COPY_ID.encode(), "assignment"),
        (b'{"cmd":"pause","assignment":""}\n', "fields"),
    ],
)
def test_bad_request_is_told(line: bytes, said: str) -> None:
    with pytest.raises(agent.BrokenError, match=said):
        agent.parse_request(line)


def test_request() -> None:
    assert agent.parse_request(b'{"cmd":"status"}\n') == agent.Ask("status")
    assert agent.parse_request(b'{"cmd":"leave"}\n') == agent.Ask("leave")
    line = b'{"cmd":"earnings","month":"2026-11","cursor":2147483647}\n'
    assert agent.parse_request(line) == agent.Ask("earnings", "2026-11", 2**31 - 1)
    line = b'{"cmd":"earnings","assignment":"%s"}\n' % COPY_ID.encode()
    assert agent.parse_request(line) == agent.Ask("earnings", assignment=COPY_ID)


PAUSED = agent.Pause("2026-01-02 03:04 UTC")
LEAVING = agent.Pause("2026-01-02 03:04 UTC", True)
UNREADABLE = agent.Pause("")


@pytest.mark.parametrize("pause", [PAUSED, LEAVING])
def test_a_pause_is_read_back(pause: agent.Pause) -> None:
    assert agent.parse_pause(agent.render_pause(pause)) == pause


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0" * 60, b"{", b"[]", b"7", b'{"since": "x"}', b'{"leaving": true}', b"[" * 9999],
)
def test_what_cannot_be_read_is_a_pause_too(raw: bytes) -> None:
    assert agent.parse_pause(raw) == UNREADABLE


@pytest.mark.parametrize(
    ("cmd", "before", "after"),
    [
        ("pause", None, agent.Pause("now")),
        ("pause", PAUSED, PAUSED),
        ("pause", LEAVING, LEAVING),
        ("pause", UNREADABLE, agent.Pause("now")),
        ("leave", None, agent.Pause("now", True)),
        ("leave", PAUSED, LEAVING),
        ("leave", LEAVING, LEAVING),
        ("unpause", None, None),
        ("unpause", LEAVING, None),
        ("unpause", UNREADABLE, None),
    ],
)
def test_pause(cmd: str, before: agent.Pause | None, after: agent.Pause | None) -> None:
    assert agent.decide_pause(cmd, before, "now") == after


DONE = {"state": "running", "host_id": HOST_ID, "is_new": True, "has_ended": True, "is_told": True}
DEAF = {**DONE, "is_told": False}
ALONE = {"is_new": True, "has_ended": True, "is_told": False}


@pytest.mark.parametrize(
    ("cmd", "answer", "said"),
    [
        ("pause", DONE, "paused: no workload runs here; `sudo openinfra-agent unpause` takes"),
        ("pause", {**DONE, "is_new": False}, "already paused: no workload runs here; `sudo"),
        ("pause", DEAF, "paused: no workload runs here (the control plane cannot be reached now"),
        ("pause", ALONE, "paused: no workload runs here (the agent does not run; the control"),
        ("unpause", DONE, "not paused any more: workloads may come here"),
        ("unpause", {**DONE, "is_new": False}, "this host was not paused: workloads may come here"),
        ("leave", DONE, "nothing is assigned to this host and nothing runs here; now type: sudo "),
    ],
)
def test_what_pause_says(cmd: str, answer: dict[str, Any], said: str) -> None:
    shown = agent.render_change(cmd, answer)
    assert shown.startswith(said)
    assert (HOST_ID in shown) is (cmd == "leave")


@pytest.mark.parametrize(
    ("cmd", "answer", "said"),
    [
        ("pause", {**DONE, "has_ended": False}, "paused, and workloads may still run here: they"),
        (
            "pause",
            {**ALONE, "has_ended": False, "unready": "no engine"},
            "here: no engine; at once",
        ),
        ("leave", {**DONE, "has_ended": False}, "systemctl kill --signal=SIGKILL openinfra.slice"),
        ("leave", DEAF, "no workload runs here (the control plane cannot be reached now"),
        ("leave", ALONE, "within 10 minutes; wait, and type this again, or: sudo python3 -I ins"),
    ],
)
def test_what_is_not_done_yet_is_to_be_tried_again(
    cmd: str, answer: dict[str, Any], said: str
) -> None:
    with pytest.raises(agent.Error) as caught:
        agent.render_change(cmd, answer)
    assert said in str(caught.value)
    assert caught.value.exit_code == 75


ONLINE: dict[str, Any] = {
    "state": "running",
    "version": "1",
    "host_id": HOST_ID,
    "control_plane": "10.77.0.1:9092",
    "connected": True,
    "last_heartbeat_age_s": 12.0,
    "heartbeats": 7,
    "interval_s": 30.0,
    "status": "online",
    "assignable": True,
    "reasons": [],
    "onchain_payout": True,
    "disk_encrypted": True,
    "token": "used",
    "last_error": None,
    "pid": 1,
    "started_age_s": 60.0,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"status": "paused"}, True),
        ({"assignable": False}, True),
        ({"status": "quarantined"}, False),
        ({"state": "retrying"}, False),
        ({"last_heartbeat_age_s": 91}, False),
        ({"last_heartbeat_age_s": None}, False),
        ({"last_heartbeat_age_s": 170, "interval_s": 60}, True),
        ({"status": "unknown"}, False),
    ],
)
def test_online(change: dict[str, Any], expected: bool) -> None:
    assert agent.is_online({**ONLINE, **change}) is expected


def test_status_table_is_safe_and_whole() -> None:
    error = {"what": "w", "todo": "t"}
    shown = agent.render_status({**ONLINE, "reasons": ["a\x1b[2J"], "last_error": error})
    assert "\x1b" not in shown
    assert "online" in shown
    assert "w; t" in shown
    assert agent.render_status({"state": "starting"})
    assert "unpause" not in shown
    paused = agent.render_status({**ONLINE, "paused": "paused, since then"})
    assert "paused, since then; sudo openinfra-agent unpause" in paused


CALM = agent.Snapshot(
    control_plane="10.77.0.1:9092",
    env_file="/e",
    data_dir="/d",
    wallet=WALLET,
    invite="used",
    problems=(),
    identity="registered",
    mounted=True,
    encrypted=True,
    allow_unencrypted=False,
    unreachable="",
    wg="ok",
    handshake_age_s=10,
    firewall="",
    failed_units=(),
    runc="",
    status=ONLINE,
    refused=None,
    pause=None,
)
LAST = {"last_error": {"reason": "HOST_QUARANTINED", "what": "quarantined", "todo": "ask"}}


def test_nothing_is_wrong_with_a_good_host() -> None:
    assert agent.decide_findings(CALM) == []


@pytest.mark.parametrize(
    ("change", "level", "sentence", "command"),
    [
        ({"problems": (agent.Finding("ERROR", "p", "c"),)}, "ERROR", "p", "c"),
        ({"encrypted": False}, "ERROR", "does not lie on", "setup_luks2.py"),
        ({"encrypted": False, "mounted": False}, "ERROR", "Nothing is mounted", "openinfra_data"),
        ({"encrypted": False, "allow_unencrypted": True}, "INFO", "permits", "setup_luks2.py"),
        ({"identity": "absent"}, "ERROR", "already used", "sudoedit /e"),
        ({"identity": "unregistered"}, "ERROR", "already used", "sudoedit /e"),
        ({"identity": "absent", "invite": "none"}, "ERROR", "No identity", "sudoedit /e"),
        ({"identity": "absent", "invite": "unspent"}, "WARN", "not redeemed", "systemctl start"),
        (
            {"status": None, "refused": {"what": "another agent holds", "todo": "stop it"}},
            "ERROR",
            "another agent holds",
            "systemctl start",
        ),
        ({"runc": "1.1.5+ds1"}, "INFO", "by runc 1.1.5+ds1: below", "apt-cache policy runc"),
        ({"failed_units": ("a.service",)}, "ERROR", "a.service failed.", "-u a.service"),
        ({"wg": "absent", "unreachable": "timed out"}, "ERROR", "no WireGuard", "wg-quick"),
        ({"wg": "wg is not installed"}, "INFO", "not checked", "wg show"),
        ({"firewall": "guard ran last 60 s ago"}, "ERROR", "60 s ago", "openinfra-guard.timer"),
        ({"handshake_age_s": None}, "ERROR", "never", "wg show"),
        ({"handshake_age_s": 181}, "ERROR", "181 s old", "wg-quick"),
        ({"unreachable": "refused"}, "ERROR", "10.77.0.1:9092 cannot be reached", "wg show"),
        ({"unreachable": "refused", "wg": "skipped"}, "ERROR", "cannot be", "cp_server.py doctor"),
        (
            {"unreachable": f"{agent.NO_TUNNEL.what}: packets would leave from 192.168.1.9"},
            "ERROR",
            "no tunnel to the control plane: packets would leave from 192.168.1.9.",
            "restart wg-quick@openinfra",
        ),
        ({"status": {**ONLINE, "state": "retrying", **LAST}}, "ERROR", "quarantined", "journalctl"),
        ({"status": {**ONLINE, "state": "retrying"}}, "ERROR", "not online", "journalctl"),
        (
            {"wallet": "", "status": {**ONLINE, "onchain_payout": False}},
            "WARN",
            "No payout wallet",
            "sudoedit /e",
        ),
        (
            {"status": {**ONLINE, "assignable": False, "reasons": ["wallet x is not y"]}},
            "ERROR",
            f"solana:{WALLET}, or you correct",
            "restart openinfra-agent",
        ),
        (
            {"wg": "skipped", "status": {**ONLINE, "unready": "no engine"}},
            "INFO",
            "can take no workload: no engine.",
            "",
        ),
        (
            {"status": {**ONLINE, "unready": "no engine", "unready_todo": "start it"}},
            "ERROR",
            "can take no workload: no engine.",
            "start it",
        ),
        (
            {"status": {**ONLINE, "assignable": False, "reasons": ["disk is full"]}},
            "ERROR",
            "no workloads: disk is full.",
            "restart openinfra-agent",
        ),
        (
            {"pause": PAUSED, "status": {**ONLINE, "assignable": False, "reasons": ["paused"]}},
            "INFO",
            "takes no workload: paused, since 2026-01-02 03:04 UTC.",
            "sudo openinfra-agent unpause",
        ),
        (
            {"pause": LEAVING, "status": {**ONLINE, "unready": "its provider is leaving"}},
            "INFO",
            "takes no workload: paused, its provider is leaving, since 2026-01-02 03:04 UTC.",
            "sudo openinfra-agent unpause",
        ),
        ({"pause": UNREADABLE}, "INFO", "paused: paused.json is unreadable.", "agent unpause"),
    ],
)
def test_finding(change: dict[str, Any], level: str, sentence: str, command: str) -> None:
    findings = agent.decide_findings(dataclasses.replace(CALM, **change))
    told = [one for one in findings if sentence in one.sentence]
    assert [one.level for one in told] == [level]
    assert command in told[0].command


@pytest.mark.parametrize(
    "change",
    [
        {"wg": "absent", "handshake_age_s": None},
        {"wg": "skipped", "handshake_age_s": None},
        {"identity": "unknown", "invite": "unknown"},
        {"wallet": ""},
        {"encrypted": None},
        {"refused": {"what": "old", "todo": "old"}},
    ],
)
def test_no_finding_without_a_fault(change: dict[str, Any]) -> None:
    assert agent.decide_findings(dataclasses.replace(CALM, **change)) == []


SHOWN = """\
openinfra-guard.service     loaded failed     failed       Firewall of this host
wg-quick@openinfra.service  loaded activating auto-restart WireGuard
"""


@pytest.mark.parametrize(
    ("shown", "units"),
    [(SHOWN, ("openinfra-guard.service", "wg-quick@openinfra.service")), ("", ()), (None, ())],
)
def test_units_that_failed(
    shown: str | None, units: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemctl names them; it cannot where there is no systemd."""
    said = f"cat <<'end'\n{shown}end\n" if shown is not None else "exit 1\n"
    script = f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{said}'
    (tmp_path / "systemctl").write_text(script)
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert agent.read_failed_units() == units
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-2:] == ["openinfra-*", "wg-quick@openinfra.service"]
    assert {"--plain", "--no-legend", "--state=failed,auto-restart"} < {*asked}


@pytest.mark.parametrize(
    ("text", "newest"),
    [("", None), ("key=\t0\n", None), ("a=\t0\nb=\t1700\nc=\t1600\n", 1700), ("junk\n", None)],
)
def test_handshakes(text: str, newest: int | None) -> None:
    assert agent.parse_handshakes(text) == newest


@pytest.mark.parametrize(
    ("guard", "now_s", "expected"),
    [
        (None, 100, "guard has not run since boot"),
        (agent.Guard(100), 145, ""),
        (agent.Guard(100), 146, "guard ran last 46 s ago"),
        (agent.Guard(100, "nft is not installed"), 101, "nft is not installed"),
        (agent.Guard(100, "", "a", "b", "no name server"), 101, ""),
    ],
)
def test_the_firewall_is_in_place(guard: agent.Guard | None, now_s: float, expected: str) -> None:
    assert agent.decide_firewall(guard, now_s) == expected


KEY = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
PEER = f"[Interface]\nPublicKey = x\n[Peer]\nPublicKey = {KEY}\nEndpoint = "


@pytest.mark.parametrize(
    ("conf", "endpoint"),
    [
        (f"{PEER}cp.coledex.com:51820\n", "cp.coledex.com:51820"),
        (f"{PEER}[2001:db8::1]:51820 # home\n", "[2001:db8::1]:51820"),
        (f"[peer]\nendpoint=1.2.3.4:1\npublickey={KEY}", "1.2.3.4:1"),
        (f"{PEER}-rf:51820 x\n", ""),
        (f"{PEER}cp.coledex.com\n", ""),
        (PEER.replace(KEY, "short") + "1.2.3.4:1", ""),
        (f"[Peer]\nPublicKey = {KEY}\n[Interface]\nEndpoint = 1.2.3.4:1\n", ""),
        ("", ""),
    ],
)
def test_the_endpoint_of_a_file(conf: str, endpoint: str) -> None:
    if endpoint:
        assert agent.parse_peer(conf) == (KEY, endpoint)
    else:
        with pytest.raises(agent.Error, match="names no control plane"):
            agent.parse_peer(conf)


EARNED = [
    ["what", "hours", "cpu", "GB", "sent GB", "a cpu-hour", "a GB-hour", "a GB sent", "charge"],
    ["acme/web/0", "1.5000", "0.5", "0.067", "2.000", "0.020000", "0.003000", "0.010000"],
    ["a/b/1", "0.0000", "2", "1.000", "0.000", "0.000000", "0.000000", "0.000000", "0.000000"],
]
EARNED[0] += ["yours", "earned", "assignment"]
EARNED[1] += ["1.234567", "80 %", "0.987653", COPY_ID]
EARNED[2] += ["12.5 %", "0.000000", COPY_ID]


@pytest.mark.parametrize("is_preliminary", [False, True])
def test_earnings_as_a_table(is_preliminary: bool) -> None:
    lines = [
        pb.EarningsLine(
            assignment_id=COPY_ID,
            workload="acme/web",
            cpu_milli=500,
            memory_bytes=64 << 20,
            billed_us=5_400_000_000,
            egress_bytes=2 * 10**9,
            cpu_hour_micros=20_000,
            gb_hour_micros=3_000,
            egress_gb_micros=10_000,
            charge_micros=1_234_567,
            provider_share_ppm=800_000,
            share_micros=987_653,
        ),
        pb.EarningsLine(
            assignment_id=COPY_ID,
            workload="a/b",
            replica=1,
            cpu_milli=2000,
            memory_bytes=10**9,
            provider_share_ppm=125_000,
        ),
    ]
    reply = pb.EarningsReply(
        month="2026-11",
        currency="EUR",
        preliminary=is_preliminary,
        share_micros=5_000_010,  # of all pages
        lines=lines,
        next_cursor=7,
    )
    found = agent.render_earnings_page(reply)
    assert found["next_cursor"] == 7
    more = " so far, of hours that are closed" if is_preliminary else ""
    *rows, total = agent.render_earnings_table(found).splitlines()
    assert [re.split(" {2,}", row) for row in rows] == EARNED
    assert len({len(row) for row in rows}) == 1
    assert total == f"earned in 2026-11: 5.000010 EUR{more}"


def test_earnings_of_a_strange_control_plane() -> None:
    """It sends no more lines than a page has, and no word that a terminal obeys."""
    line = pb.EarningsLine(assignment_id="\x1b", workload="\x1b", hour_at="\x1b")
    reply = pb.EarningsReply(month="\x1b", currency="\x1b", lines=[line] * 201)
    found: Any = agent.render_earnings_page(reply)
    assert len(found["lines"]) == 200
    assert "\\u001b" not in json.dumps(found)


@pytest.mark.parametrize(
    ("micros", "text"),
    [(0, "0.000000"), (1, "0.000001"), (-1, "-0.000001"), (-1_500_000, "-1.500000")],
)
def test_millionths(micros: int, text: str) -> None:
    assert agent.render_micros(micros) == text


def test_what_was_earned_is_of_hours_that_are_closed() -> None:
    earned = pb.Earnings(month="2026-11", currency="EUR\x1b", micros=1_500_000)
    said = agent.render_earnings(earned)
    assert "\x1b" not in said
    assert said.startswith("1.500000 EUR")
    assert said.endswith(" in 2026-11, of hours that are closed")


def test_hours_as_a_table() -> None:
    """Each with the prices of its card; one that came late has another part."""
    which: Any = {"assignment_id": COPY_ID, "workload": "acme/web", "replica": 3}
    which["hour_at"] = "2026-11-30T20:00:00.000Z"
    lines = [pb.EarningsLine(**which, part=part, share_micros=part) for part in (1, 2)]
    found = agent.render_earnings_page(pb.EarningsReply(month="2026-11", lines=lines))
    rows = agent.render_earnings_table(found).splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["2026-11-30T20:00/1", "2026-11-30T20:00/2"]
    assert [row.split()[-2:] for row in rows[1:3]] == [
        ["0.000001", COPY_ID],
        ["0.000002", COPY_ID],
    ]


def test_a_systemd_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads what is sent, and soon there is no room for more; then there is no socket."""
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sender = threading.Thread(target=send_often, daemon=True)
        sender.start()
        sender.join(10)
        assert not sender.is_alive()
        assert sock.recv(100) == b"WATCHDOG=1"
    agent.sd_notify("WATCHDOG=1")


def send_often() -> None:
    for _ in range(2000):
        agent.sd_notify("WATCHDOG=1")
