"""cp_server.py: the pure rules, each by a table or by random values; and what reads its files."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import json
import math
import os
import re
import string
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cp_server
from cp_server import Claimant, Error, Field, Host, JwtKey, Refusal
from proto import openinfra_pb2 as pb

WALLET = "7YttLkHDoNj9wyDur5pM1ejNaAvT9X4eqaYcHQqtj2G5"
OTHER_WALLET = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"
WG_KEY = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
BASE64URL = string.ascii_letters + string.digits + "-_"
NOW = 1_800_000_000
KEY = JwtKey("kid-one", "HS256", bytes(range(32)))
OTHER_KEY = JwtKey("kid-two", "HS256", bytes(range(32, 64)))
CLAIMS: dict[str, Any] = {
    "iss": "openinfra-cp",
    "aud": "openinfra-admin-api",
    "sub": "kuma",
    "scope": "admin",
    "jti": "j1",
    "iat": NOW - 10,
    "exp": NOW + 3600,
}
ABSENT = object()


def refused(error: pytest.ExceptionInfo[Refusal]) -> tuple[str, str]:
    """Name and field of a refusal; both of its sentences must be there."""
    assert error.value.what
    assert error.value.todo
    assert error.value.code in cp_server.REFUSALS
    return error.value.code, error.value.field


# Tokens ------------------------------------------------------------------------------------------


@given(st.text(BASE32, min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
def test_a_token_comes_back_whole(public_id: str, secret: bytes) -> None:
    text = cp_server.render_token("oi1", public_id, secret)
    assert re.fullmatch(r"oi1_[a-z2-7]{16}_[A-Za-z0-9_-]{43}_[0-9a-f]{8}", text)
    token = cp_server.parse_token("oi1", text)
    assert (token.public_id, token.secret) == (public_id, secret)
    assert cp_server.b64url(secret) not in repr(token)
    assert repr(secret) not in repr(token)


def mistype(text: str) -> Iterator[str]:
    """Every text with one character changed, lost, doubled or swapped with the next one."""
    for i, char in enumerate(text):
        yield from (
            text[:i] + other + text[i + 1 :] for other in BASE64URL + "= \n" if other != char
        )
        yield text[:i] + text[i + 1 :]
        yield text[:i] + char + text[i:]
        if text[i : i + 2] != text[i : i + 2][::-1]:
            yield text[:i] + text[i : i + 2][::-1] + text[i + 2 :]


def test_every_typing_error_in_a_token_is_found_and_not_repeated() -> None:
    text = cp_server.render_token("oi1", "abcdefghij234567", bytes(range(100, 132)))
    secret = text.split("_", 2)[2]
    for wrong in mistype(text):
        with pytest.raises(Refusal) as error:
            cp_server.parse_token("oi1", wrong)
        assert refused(error) == ("BAD_REQUEST", "invite_token")
        assert secret[:12] not in str(error.value)


def test_every_cut_token_is_refused() -> None:
    text = cp_server.render_token("oi1", "abcdefghij234567", bytes(range(100, 132)))
    cut = [text[:i] for i in range(len(text))] + [text[i:] for i in range(1, len(text))]
    for wrong in [*cut, text + "0", text + "\n", " " + text, text.upper(), text * 1000]:
        with pytest.raises(Refusal):
            cp_server.parse_token("oi1", wrong)


def test_a_token_of_another_kind_is_refused() -> None:
    text = cp_server.render_token("oik1", "abcdefghij234567", bytes(32))
    assert cp_server.parse_token("oik1", text).secret == bytes(32)
    with pytest.raises(Refusal):
        cp_server.parse_token("oi1", text)


def test_public_ids_are_of_the_form_that_the_database_takes() -> None:
    made = {cp_server.new_public_id() for _ in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch("[a-z2-7]{16}", one) for one in made)


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.hash_secret(b"s" * length, "session")
    assert refused(error) == ("BAD_REQUEST", "session")


def test_a_secret_is_kept_as_its_sha256() -> None:
    assert cp_server.hash_secret(b"s" * 32, "session") == hashlib.sha256(b"s" * 32).digest()
    assert cp_server.hash_session(b"s" * 32) == cp_server.sha256(cp_server.sha256(b"s" * 32))


# Wallets, keys, addresses, text ------------------------------------------------------------------


def base58(data: bytes) -> str:
    """base58 as Bitcoin defined it, by hand."""
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    value, text = int.from_bytes(data, "big"), ""
    while value:
        value, digit = divmod(value, 58)
        text = alphabet[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_every_wallet_of_32_bytes_is_taken(key: bytes) -> None:
    assert cp_server.check_payout_pubkey(base58(key), "payout_pubkey") == base58(key)


@given(st.binary(max_size=64).filter(lambda key: len(key) != 32))
def test_a_wallet_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(Refusal):
        cp_server.check_payout_pubkey(base58(key), "payout_pubkey")


@pytest.mark.parametrize(
    "text",
    [
        WALLET,
        OTHER_WALLET,
        "So11111111111111111111111111111111111111112",
        "1" * 31 + "2",  # 31 zero bytes and a one
        base58(b"\xff" * 32),
    ],
)
def test_known_wallets_are_taken(text: str) -> None:
    assert cp_server.check_payout_pubkey(text, "payout_pubkey") == text
    assert cp_server.parse_wallet(text) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name)
        for name, text in {
            "zero": "0" + WALLET[1:],
            "capital O": "O" + WALLET[1:],
            "capital I": "I" + WALLET[1:],
            "small l": "l" + WALLET[1:],
            "31 bytes": base58(b"\x01" * 31),
            "33 bytes": base58(b"\x01" * 33),
            "all zero": "1" * 32,
            "all zero, longer": "1" * 44,
            "empty": "",
            "space before": " " + WALLET,
            "newline after": WALLET + "\n",
            "hex": "ab" * 32,
            "not ASCII": WALLET[:-1] + "\N{FULLWIDTH DIGIT FIVE}",
            "lone surrogate": WALLET[:-1] + "\ud800",
            "0x": "0x" + WALLET,
            "one more": WALLET + "1",
        }.items()
    ],
)
def test_impossible_wallets_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.check_payout_pubkey(text, "payout_pubkey")
    assert refused(error) == ("BAD_REQUEST", "payout_pubkey")


@pytest.mark.parametrize("char", ["1", "2", "z", "0"])
def test_a_wallet_of_a_hundred_thousand_characters_is_refused_at_once(char: str) -> None:
    began = time.monotonic()
    with pytest.raises(Refusal):
        cp_server.check_payout_pubkey(char * 100_000, "payout_pubkey")
    with pytest.raises(Refusal):
        cp_server.check_payout_pubkey(WALLET + char * 100_000, "payout_pubkey")
    assert time.monotonic() - began < 0.2


def test_no_wallet_is_none() -> None:
    assert cp_server.parse_wallet("") is None
    assert cp_server.namespace_of(WALLET) == f"solana:{WALLET}"


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_every_wireguard_key_is_taken(key: bytes) -> None:
    text = base64.b64encode(key).decode()
    assert cp_server.check_wg_pubkey(text, "wg_pubkey") == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name)
        for name, text in {
            "empty": "",
            "no padding": WG_KEY[:-1],
            "newline": WG_KEY + "\n",
            "31 bytes": base64.b64encode(bytes(31)).decode(),
            "33 bytes": base64.b64encode(bytes(33)).decode(),
            "base64url": WG_KEY.replace(WG_KEY[0], "-", 1),
            "space": " " + WG_KEY[1:],
            "hex": "ab" * 32,
            "padding in the middle": WG_KEY[:20] + "=" + WG_KEY[21:],
            "not ASCII": "\N{LATIN SMALL LETTER E WITH ACUTE}" + WG_KEY[1:],
            "too long": WG_KEY * 10_000,
        }.items()
    ]
    + [
        pytest.param(
            WG_KEY[:-2] + "h=",
            id="another spelling of the same 32 bytes",
        )
    ],
)
def test_impossible_wireguard_keys_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.check_wg_pubkey(text, "wg_pubkey")
    assert refused(error) == ("BAD_REQUEST", "wg_pubkey")


@pytest.mark.parametrize("text", ["10.77.0.2", "10.77.0.42", "10.77.16.0", "10.77.255.254"])
def test_addresses_of_hosts_are_taken(text: str) -> None:
    assert cp_server.check_wg_ip(text, "wg_ip") == text


@pytest.mark.parametrize(
    "text",
    [
        *[
            "10.77.0.0",
            "10.77.0.1",
            "10.77.255.255",
            "10.76.255.255",
            "10.78.0.2",
            "127.0.0.1",
            "0.0.0.0",
        ],
        *[
            "010.77.0.2",
            "10.77.0.02",
            "10.77.0.042",
            "10.77.2",
            "10.77.0.2.3",
            "10.77.0.256",
            "10.77.0.-2",
        ],
        *[
            "10.77.0.2/32",
            "10.77.0.2:80",
            "0x0a.77.0.2",
            "172818434",
            "a.b.c.d",
            "10..0.2",
            "10.77.0.²",
        ],
        *["::1", "::ffff:10.77.0.2", "fd00::2", "10.77.0.٢"],
        *("", " 10.77.0.2", "10.77.0.2 ", "10.77. 0.2", "10.77.0.2\n", "10.77.0.2\0"),
        "1" * 100_000,
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.check_wg_ip(text, "wg_ip")
    assert refused(error) == ("BAD_REQUEST", "wg_ip")


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_an_address_is_taken_exactly_when_a_host_may_have_it(
    address: ipaddress.IPv4Address,
) -> None:
    first, last = ipaddress.IPv4Address("10.77.0.2"), ipaddress.IPv4Address("10.77.255.254")
    try:
        assert cp_server.check_wg_ip(str(address), "wg_ip") == str(address)
        assert first <= address <= last
    except Refusal:
        assert not first <= address <= last


@pytest.mark.parametrize(
    "text",
    [
        "",
        "provider@home \N{EM DASH} Kuma",
        "熊 \N{BEAR FACE}",
        'it\'s "quoted" <b> & \\ %s {x}',
        "cafe\N{COMBINING ACUTE ACCENT}",
        pytest.param(
            "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{WRENCH}",
            id="joined emoji",
        ),
        pytest.param(
            "Kuma\N{NO-BREAK SPACE}!",
            id="no-break space",
        ),
    ],
)
def test_printable_text_is_kept(text: str) -> None:
    assert cp_server.check_text(text, "note") == text


@pytest.mark.parametrize(
    "char",
    [
        "\0",
        "\a",
        "\t",
        "\n",
        "\r",
        "\x1b",
        "\x7f",
        "\x85",
        "\u2028",
        "\u2029",
        "\u202e",
        "\ud800",
    ],
    ids=ascii,
)
def test_control_characters_and_lone_surrogates_are_refused(char: str) -> None:
    for text in (char, f"a{char}b", f"{char}b", f"a{char}"):
        with pytest.raises(Refusal) as error:
            cp_server.check_text(text, "note")
        assert refused(error) == ("BAD_REQUEST", "note")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.77.0.42:53422", "10.77.0.42"),
        ("ipv4:127.0.0.1:1", "127.0.0.1"),
        ("ipv6:%5B::1%5D:53422", "::1"),
        ("ipv6:[::1]:53422", "::1"),
        ("ipv6:%5B::ffff:10.77.0.42%5D:53422", "10.77.0.42"),
        ("ipv6:[::ffff:10.77.0.42]:53422", "10.77.0.42"),
        ("ipv6:%5B2001:db8::1%5D:9", "2001:db8::1"),
        ("", "0.0.0.0"),
        ("unix:", "0.0.0.0"),
        ("unix:/run/x.sock", "0.0.0.0"),
        ("ipv4:", "0.0.0.0"),
        ("ipv4:10.77.0.42", "0.0.0.0"),
        ("ipv4:10.77.0.300:1", "0.0.0.0"),
        ("ipv4:10.77.0.042:1", "0.0.0.0"),
        ("garbage", "0.0.0.0"),
        (":::::", "0.0.0.0"),
        ("ipv4:10.77.0.42\n:1", "0.0.0.0"),
        ("%", "0.0.0.0"),
        pytest.param(
            "ipv6:%5Bfe80::1%25eth0%5D:53422",
            "fe80::1",
        ),
    ],
)
def test_the_peer_of_a_call(peer: str, address: str) -> None:
    assert cp_server.parse_peer(peer) == address


@given(st.text())
def test_a_peer_is_always_an_address(peer: str) -> None:
    ipaddress.ip_address(cp_server.parse_peer(peer))


GET = b"GET /api/v1/admin/hosts HTTP/1.1\r\nHost: cp\r\n"


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        # Not from this machine: what it says is nothing.
        ("198.51.100.7", b"", "198.51.100.7"),
        ("198.51.100.7", b"X-Forwarded-For: 203.0.113.9\r\n", "198.51.100.7"),
        ("198.51.100.7", b"X-Forwarded-For: 127.0.0.1\r\n", "198.51.100.7"),
        ("::ffff:198.51.100.7", b"", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", b"", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", b"", "fe80::/64"),
        # Caddy, by any of its ways to this machine.
        ("127.0.0.1", b"X-Forwarded-For: 203.0.113.9\r\n", "203.0.113.9"),
        ("127.0.0.1", b"x-forwarded-FOR:203.0.113.9  \nA: b\n", "203.0.113.9"),
        ("127.8.9.1", b"X-Forwarded-For: 203.0.113.9\r\n", "203.0.113.9"),
        ("::1", b"X-Forwarded-For: 203.0.113.9\r\n", "203.0.113.9"),
        ("::ffff:127.0.0.1", b"X-Forwarded-For: 203.0.113.9\r\n", "203.0.113.9"),
        ("127.0.0.1", b"X-Forwarded-For: 2001:db8::1\r\n", "2001:db8::/64"),
        ("127.0.0.1", b"X-Forwarded-For: 2001:DB8:0:0:ffff:0:0:1\r\n", "2001:db8::/64"),
        ("127.0.0.1", b"X-Forwarded-For: 2001:db8:0:1::1\r\n", "2001:db8:0:1::/64"),
        ("127.0.0.1", b"X-Forwarded-For: ::ffff:203.0.113.9\r\n", "203.0.113.9"),
        # Where Caddy trusts a proxy before it, the last address is what it saw itself.
        ("127.0.0.1", b"X-Forwarded-For: 127.0.0.1, 203.0.113.9\r\n", "203.0.113.9"),
        ("127.0.0.1", b"X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 1.1.1.2\r\n", "1.1.1.2"),
        # This machine's own.
        ("127.0.0.1", b"", ""),
        ("::1", b"", ""),
        ("127.0.0.1", b"X-Forwarded-For: 127.0.0.1\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: ::1\r\n", ""),
        # No address at all.
        ("127.0.0.1", b"X-Forwarded-For:\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: unknown\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: 203.0.113.9:4711\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: 203.0.113.009\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: \xff\xfe\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For: " + b"9," * 30_000 + b"\r\n", ""),
        ("127.0.0.1", b"X-Forwarded-For-Not: 203.0.113.9\r\n", ""),
        ("127.0.0.1", b"A: X-Forwarded-For: 203.0.113.9\r\n", ""),
        ("127.0.0.1", b"\r\nX-Forwarded-For: 203.0.113.9\r\n", ""),  # in the body
    ],
)
def test_what_a_client_is_counted_by(peer: str, lines: bytes, client: str) -> None:
    assert cp_server.parse_client(peer, GET + lines + b"\r\n") == client


@given(st.ip_addresses(), st.binary())
def test_a_client_is_always_somebody(peer: ipaddress.IPv4Address, lines: bytes) -> None:
    client = cp_server.parse_client(str(peer), GET + lines)
    assert client == "" or ipaddress.ip_network(client).prefixlen in (32, 64)


# JSON and fields ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", {}),
        (b' {"a" : [1, 2.5, null, true, "x"]}\n', {"a": [1, 2.5, None, True, "x"]}),
        (b'{"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 1}]}', None),
        ('{"note": "\N{EM DASH} \N{BEAR FACE}"}'.encode(), {"note": "\N{EM DASH} \N{BEAR FACE}"}),
        (b'{"a": "\\u2014"}', {"a": "\N{EM DASH}"}),
        (b'{"": 0}', {"": 0}),
    ],
)
def test_good_json_is_read(raw: bytes, value: dict[str, Any] | None) -> None:
    assert cp_server.parse_json(raw) == (json.loads(raw) if value is None else value)


BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "cut": b'{"a": 1',
    "two objects": b"{}{}",
    "text after": b"{} x",
    "NUL after": b"{}\0",
    "single quotes": b"{'a': 1}",
    "comma": b'{"a": 1,}',
    "comment": b"{} // x",
    "key twice": b'{"a": 1, "a": 1}',
    "key twice by escape": b'{"a": 1, "\\u0061": 2}',
    "key twice deeper": b'{"a": {"b": 1, "b": 2}}',
    "key twice in a list": b'{"a": [[{"b": 1, "c": 0, "b": 2}]]}',
    "key twice, deep": b'{"x":' * 50 + b'{"b": 1, "b": 2}' + b"}" * 50,
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b'{"a": [-Infinity]}',
    "list of depth 100,000": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "object of depth 100,000": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open list of depth 100,000": b"[" * 100_000,
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": b'{"a": "\xe9"}',
    "raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "control character": b'{"a": "\x01"}',
    "newline in text": b'{"a": "x\ny"}',
}


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in BAD_JSON.items()])
def test_bad_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its text goes nowhere
        cp_server.parse_json(raw)
    with pytest.raises(Refusal) as error:
        cp_server.parse_body(raw)
    assert refused(error) == ("BAD_REQUEST", "")


@given(st.binary() | st.text().map(lambda text: f'{{"a": {json.dumps(text)}}}'.encode()))
def test_any_bytes_are_an_object_or_a_value_error(raw: bytes) -> None:
    try:
        assert isinstance(cp_server.parse_json(raw), dict)
    except ValueError:
        pass


FIELDS = (
    Field("count", "integer", "a number", 1, 72, 24),
    Field("note", "string", "a text", 0, 5, "", cp_server.check_text),
    Field("flag", "boolean", "a switch", default=False),
    Field("state", "string", "one of two", 1, 16, None, values=("open", "used")),
)


def test_fields_have_defaults_and_are_taken() -> None:
    defaults = {"count": 24, "note": "", "flag": False, "state": None}
    assert cp_server.parse_fields(FIELDS, {}) == defaults
    given_all = {"count": 72, "note": "12345", "flag": True, "state": "used"}
    assert cp_server.parse_fields(FIELDS, given_all) == given_all
    assert cp_server.parse_fields(FIELDS, {"count": 1, "note": ""})["count"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", False),
        ("count", 24.5),
        ("count", 73.0),
        ("count", -0.0),
        ("count", 1e300),
        ("count", math.inf),
        ("count", math.nan),
        ("count", "24"),
        ("count", None),
        ("count", [24]),
        ("count", {"a": 1}),
        ("count", 0),
        ("count", -1),
        ("count", 73),
        ("count", 10**4000),
        ("count", -(10**4000)),
        ("note", 1),
        ("note", None),
        ("note", ["x"]),
        ("note", True),
        ("note", "123456"),
        ("note", "x" * 10**6),
        ("note", "a\0b"),
        ("note", "\ud800"),
        ("flag", 0),
        ("flag", 1),
        ("flag", "true"),
        ("flag", None),
        ("state", ""),
        ("state", "OPEN"),
        ("state", "gone"),
        ("state", None),
    ],
)
def test_a_field_of_a_wrong_type_or_size_is_refused(name: str, value: Any) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_fields(FIELDS, {name: value})
    assert refused(error) == ("BAD_REQUEST", name)
    assert len(str(error.value)) < 200


def test_an_integer_may_be_written_with_a_point() -> None:
    """As JSON Schema has it: 24.0 is an integer, and becomes one here."""
    found = cp_server.parse_fields(FIELDS, {"count": 24.0})["count"]
    assert (found, type(found)) == (24, int)


@pytest.mark.parametrize("name", ["Count", "count ", "", "__class__", "x" * 10**5, "\0", "\ud800"])
def test_an_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_fields(FIELDS, {"count": 2, name: 1})
    shown = name[:40].encode("ascii", "replace").decode()  # a lone surrogate is no text
    assert refused(error) == ("BAD_REQUEST", shown)
    assert "count, note, flag, state" in error.value.todo
    assert len(str(error.value)) < 400
    str(error.value).encode()


@pytest.mark.parametrize("name", ["payout_pubkey", "wg_ip", "wg_pubkey", "note", "ttl_hours"])
def test_the_fields_of_an_invite_are_checked(name: str) -> None:
    wrong = {"ttl_hours": 73, "note": "\n"}.get(name, "x")
    with pytest.raises(Refusal) as error:
        cp_server.parse_fields(cp_server.INVITE_FIELDS, {name: wrong})
    assert refused(error) == ("BAD_REQUEST", name)


def test_an_invite_with_every_field_is_taken() -> None:
    order: dict[str, Any] = {
        "ttl_hours": 72,
        "note": "x" * 500,
        "payout_pubkey": WALLET,
        "wg_ip": "10.77.0.42",
        "wg_pubkey": WG_KEY,
        "approve_first_wallet": True,
    }
    values = cp_server.parse_fields(cp_server.INVITE_FIELDS, order)
    assert cp_server.InviteOrder(**values) == cp_server.InviteOrder(**order)
    none = cp_server.parse_fields(cp_server.INVITE_FIELDS, {})
    assert cp_server.InviteOrder(**none) == cp_server.InviteOrder()


HOST_QUERY = (*cp_server.PAGE_FIELDS, *cp_server.HOST_FILTERS)


@pytest.mark.parametrize(
    ("query", "changed"),
    [
        ("", {}),
        ("limit=100", {"limit": 100}),
        ("limit=1&cursor=0", {"limit": 1}),
        ("limit=1000&cursor=999999999999999999", {"limit": 1000, "cursor": 10**18 - 1}),
        ("limit=007", {"limit": 7}),
        ("status=online&hostname=a%20b", {"status": "online", "hostname": "a b"}),
        ("hostname=a+b", {"hostname": "a b"}),
        ("hostname=%E2%80%94", {"hostname": "\N{EM DASH}"}),
        (f"namespace=solana%3A{WALLET}", {"namespace": f"solana:{WALLET}"}),
        ("&&", {}),
    ],
)
def test_good_queries_are_read(query: str, changed: Mapping[str, Any]) -> None:
    defaults = {"limit": 100, "cursor": 0, "status": None, "namespace": None, "hostname": None}
    assert cp_server.parse_query(HOST_QUERY, query) == {**defaults, **changed}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=%2B5", "limit"),
        ("limit=1.0", "limit"),
        ("limit=1e2", "limit"),
        ("limit=0x10", "limit"),
        ("limit=", "limit"),
        ("limit", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=" + "9" * 19, "limit"),
        ("limit=" + "9" * 10**5, "limit"),
        ("cursor=-1", "cursor"),
        ("cursor=x", "cursor"),
        ("limit=1&limit=1", "limit"),
        ("limit=1&status=online&limit=2", "limit"),
        ("status=", "status"),
        ("status=Online", "status"),
        ("status=online%00", "status"),
        ("hostname=", "hostname"),
        ("hostname=a%00", "hostname"),
        ("hostname=a%0A", "hostname"),
        ("hostname=" + "a" * 254, "hostname"),
        ("colour=red", "colour"),
        ("Limit=1", "Limit"),
        ("=1", ""),
        ("&".join(f"a{i}=1" for i in range(21)), ""),
    ],
)
def test_bad_queries_are_refused(query: str, field: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_query(HOST_QUERY, query)
    assert refused(error) == ("BAD_REQUEST", field)


# JWT ---------------------------------------------------------------------------------------------


def encode(part: object) -> str:
    """One part of a JWS in compact form (RFC 7515), by hand."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def hmac_sha256(secret: bytes, message: bytes) -> bytes:
    """HMAC with SHA-256 (RFC 2104), by hand: independent of what cp_server.py calls."""
    block = secret.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in block) + inner).digest()


def sign(header: object, claims: object, key: JwtKey = KEY) -> str:
    """A JWT with any header and any claims, well signed."""
    body = f"{encode(header)}.{encode(claims)}"
    return f"{body}.{encode(hmac_sha256(key.secret, body.encode()))}"


HEADER: dict[str, Any] = {"typ": "JWT", "kid": KEY.kid, "alg": "HS256"}


def jwt(**changes: Any) -> str:
    """A JWT with some claims changed or left out (ABSENT), well signed."""
    claims = {key: value for key, value in {**CLAIMS, **changes}.items() if value is not ABSENT}
    return sign(HEADER, claims)


def jwt_header(**changes: Any) -> str:
    """A JWT with some header members changed or left out (ABSENT), well signed."""
    header = {key: value for key, value in {**HEADER, **changes}.items() if value is not ABSENT}
    return sign(header, CLAIMS)


def test_a_token_made_by_hand_is_valid() -> None:
    claims = cp_server.parse_jwt(jwt(), [OTHER_KEY, KEY], NOW)
    assert claims == cp_server.Claims("kuma", "j1", frozenset({"admin"}))


def test_our_own_token_is_one_that_another_program_would_make() -> None:
    head, body, signature = cp_server.render_jwt(KEY, CLAIMS).split(".")
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == HEADER
    assert json.loads(base64.urlsafe_b64decode(body + "==")) == CLAIMS
    assert signature == encode(hmac_sha256(KEY.secret, f"{head}.{body}".encode()))


def test_a_minted_token_is_valid_now_and_has_its_scope() -> None:
    token = cp_server.mint_jwt(KEY, "kuma", "read", 60)
    claims = cp_server.parse_jwt(token, [KEY], time.time())
    assert (claims.sub, claims.scope) == ("kuma", frozenset({"read"}))
    again = cp_server.parse_jwt(cp_server.mint_jwt(KEY, "kuma", "read", 60), [KEY], time.time())
    assert again.jti != claims.jti
    with pytest.raises(ValueError, match="expired"):
        cp_server.parse_jwt(token, [KEY], time.time() + 61)


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "read admin"},
        {"scope": ""},
        {"iat": NOW + 60},
        {"iat": NOW, "exp": NOW + 12 * 3600},
        {"exp": NOW + 1},
        {"more": {"nested": [1]}},
        {"sub": "\N{EM DASH}"},
    ],
)
def test_these_claims_are_good(changes: Mapping[str, Any]) -> None:
    claims = cp_server.parse_jwt(jwt(**changes), [KEY], NOW)
    assert claims.scope == frozenset({**CLAIMS, **changes}["scope"].split())


NESTED = b"[" * 2900 + b"]" * 2900
BAD_JWTS: dict[str, str] = {
    "empty": "",
    "one part": "abc",
    "two parts": ".".join(jwt().split(".")[:2]),
    "four parts": jwt() + ".",
    "five parts": jwt() + ".." + "a",
    "no signature": jwt().rpartition(".")[0] + ".",
    "empty header": "." + jwt().partition(".")[2],
    "empty body": sign(HEADER, b""),
    "padding": jwt() + "=",
    "space": jwt() + " ",
    "newline": jwt() + "\n",
    "not ASCII": jwt() + "\N{EM DASH}",
    "header not base64": "!" + jwt()[1:],
    "base64, not base64url": jwt().replace("_", "/").replace("-", "+") + "/",
    "one character lost": jwt()[:-1],
    "one character more": jwt() + "A",
    "body of another": jwt().split(".")[0] + "." + jwt(sub="eve").split(".")[1] + ".AAAA",
    "alg none": jwt_header(alg="none"),
    "alg none, no signature": jwt_header(alg="none").rpartition(".")[0] + ".",
    "alg None": jwt_header(alg="None"),
    "alg hs256": jwt_header(alg="hs256"),
    "alg RS256": jwt_header(alg="RS256"),
    "alg HS512": jwt_header(alg="HS512"),
    "alg null": jwt_header(alg=None),
    "alg missing": jwt_header(alg=ABSENT),
    "alg list": jwt_header(alg=["HS256"]),
    "kid unknown": jwt_header(kid="kid-three"),
    "kid missing": jwt_header(kid=ABSENT),
    "kid null": jwt_header(kid=None),
    "kid list": jwt_header(kid=["kid-one"]),
    "kid of a path": jwt_header(kid="../../dev/null"),
    "typ missing": jwt_header(typ=ABSENT),
    "typ of another": jwt_header(typ="at+jwt"),
    "crit": jwt_header(crit=["exp"]),
    "jwk": jwt_header(jwk={"k": "AAAA"}),
    "jku": jwt_header(jku="https://example.com"),
    "b64 false": jwt_header(b64=False),
    "key of another kid": sign(HEADER, CLAIMS, OTHER_KEY),
    "kid of another key": sign({**HEADER, "kid": "kid-two"}, CLAIMS),
    "empty key": sign(HEADER, CLAIMS, JwtKey("kid-one", "HS256", b"")),
    "header key twice": sign(b'{"alg":"HS256","alg":"HS256","kid":"kid-one","typ":"JWT"}', CLAIMS),
    "header a list": sign([HEADER], CLAIMS),
    "header of nested brackets": sign(NESTED, CLAIMS),
    "header of nested brackets, short": sign(b"[" * 150, CLAIMS),
    "header over 256 bytes": sign(json.dumps(HEADER).encode() + b" " * 200, CLAIMS),
    "token over 2 KB": jwt(more="x" * 2000),
    "body of nested brackets": sign(HEADER, NESTED),
    "body a list": sign(HEADER, [CLAIMS]),
    "body key twice": sign(HEADER, json.dumps(CLAIMS)[:-1].encode() + b',"scope":"admin"}'),
    "body not JSON": sign(HEADER, b"x"),
    "exp past": jwt(exp=NOW - 1),
    "exp now": jwt(exp=NOW),
    "exp over 12 hours": jwt(iat=NOW, exp=NOW + 12 * 3600 + 1),
    "exp over 12 hours by iat": jwt(iat=NOW - 3600, exp=NOW + 11 * 3600 + 1),
    "exp of a year": jwt(exp=NOW + 365 * 86400),
    "exp huge": jwt(exp=10**300),
    "exp before iat": jwt(iat=NOW - 10, exp=NOW - 20),
    "iat in the future": jwt(iat=NOW + 61),
    "iat huge": jwt(iat=10**300, exp=10**300 + 1),
}
BAD_JWTS |= {f"{name} missing": jwt(**{name: ABSENT}) for name in CLAIMS}
BAD_JWTS |= {f"{name} null": jwt(**{name: None}) for name in CLAIMS}
BAD_JWTS |= {f"{name} a list": jwt(**{name: [CLAIMS[name]]}) for name in CLAIMS}
BAD_JWTS |= {f"{name} true": jwt(**{name: True}) for name in CLAIMS}
BAD_JWTS |= {f"{name} a float": jwt(**{name: NOW + 1.5}) for name in CLAIMS}
BAD_JWTS |= {f"{name} a text": jwt(**{name: str(NOW + 1)}) for name in ("iat", "exp")}
BAD_JWTS |= {f"{name} of another": jwt(**{name: "another"}) for name in ("iss", "aud")}


@pytest.mark.parametrize("text", [pytest.param(t, id=name) for name, t in BAD_JWTS.items()])
def test_every_other_token_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of them is 401
        cp_server.parse_jwt(text, [KEY, OTHER_KEY], NOW)


def test_no_key_makes_no_token_valid() -> None:
    with pytest.raises(ValueError, match="header"):
        cp_server.parse_jwt(jwt(), [], NOW)


def test_every_changed_character_of_a_token_is_refused() -> None:
    text = jwt()
    for i in range(len(text) - 1):  # the last one: see the next test
        for other in "AQz_.":
            if other != text[i]:
                with pytest.raises(ValueError):  # noqa: PT011
                    cp_server.parse_jwt(text[:i] + other + text[i + 1 :], [KEY], NOW)


def test_a_token_has_one_spelling() -> None:
    text = jwt()
    for other in BASE64URL.replace(text[-1], ""):
        with pytest.raises(ValueError):  # noqa: PT011
            cp_server.parse_jwt(text[:-1] + other, [KEY], NOW)


@pytest.mark.parametrize("sub", ["", "a\0b", "a\nb", "\ud800", "x" * 1000], ids=ascii)
def test_a_token_names_a_person(sub: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        cp_server.parse_jwt(jwt(sub=sub), [KEY], NOW)


@given(
    st.text()
    | st.text(BASE64URL + ".")
    | st.tuples(*[st.binary()] * 3).map(lambda parts: ".".join(map(encode, parts)))
)
def test_any_text_is_refused_without_another_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        cp_server.parse_jwt(text, [KEY], NOW)


def test_secrets_of_keys_are_not_shown() -> None:
    assert "secret" not in repr(KEY)


# What agents send --------------------------------------------------------------------------------


def make_facts(**changes: Any) -> pb.Facts:
    """Facts of a machine."""
    values: dict[str, Any] = {
        "hostname": "lab",
        "arch": "x86_64",
        "kernel": "6.1.0",
        "agent_version": "0.1.0",
        "cpu_count": 4,
        "memory_bytes": 8 << 30,
        "disk_bytes": 100 << 30,
        "disk_encrypted": True,
        "engine_version": "20.10.24",
        "offered_cpu_milli": 3000,
        "offered_memory_bytes": 6 << 30,
        "takes_secrets": True,
    }
    return pb.Facts(**{**values, **changes})


def test_facts_are_read() -> None:
    facts = cp_server.parse_facts(make_facts())
    machine = ("lab", "x86_64", "6.1.0", "0.1.0", 4, 8 << 30, 100 << 30, True)
    assert facts == cp_server.Facts(*machine, "20.10.24", "", 3000, 6 << 30, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "") for name in ("hostname", "arch", "kernel", "agent_version")],
        *[(name, "a\nb") for name in ("hostname", "arch", "kernel", "agent_version")],
        ("hostname", "a\0"),
        ("hostname", "\N{EM DASH}"),
        ("hostname", "h" * 254),
        ("arch", "a" * 33),
        ("kernel", "k" * 129),
        ("agent_version", "v" * 65),
    ],
)
def test_impossible_names_in_facts_are_refused(name: str, value: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_facts(make_facts(**{name: value}))
    assert refused(error) == ("BAD_REQUEST", f"facts.{name}")


@pytest.mark.parametrize(
    "changes", [{"memory_bytes": 2**63}, {"disk_bytes": 2**64 - 1}, {"cpu_count": 2**16 + 1}]
)
def test_impossible_sizes_in_facts_are_refused(changes: Mapping[str, int]) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_facts(make_facts(**changes))
    assert refused(error) == ("BAD_REQUEST", "facts")


TOKEN = cp_server.render_token("oi1", "abcdefghij234567", bytes(32))


def make_register(**changes: Any) -> pb.RegisterRequest:
    """A Register request that is taken."""
    values: dict[str, Any] = {
        "invite_token": TOKEN,
        "host_secret": b"h" * 32,
        "session": b"s" * 32,
        "payout_pubkey": WALLET,
        "wg_pubkey": WG_KEY,
        "facts": make_facts(),
    }
    return pb.RegisterRequest(**{**values, **changes})


def test_a_registration_is_read_and_holds_hashes_only() -> None:
    found = cp_server.parse_register(make_register(), "10.77.0.42", True)
    assert found.token.public_id == "abcdefghij234567"
    assert found.host_secret_sha256 == hashlib.sha256(b"h" * 32).digest()
    assert found.session_sha256 == cp_server.hash_session(b"s" * 32)
    assert (found.payout_pubkey, found.wg_ip, found.wg_pubkey) == (WALLET, "10.77.0.42", WG_KEY)
    assert "hhhhhhhh" not in repr(found)
    free = cp_server.parse_register(
        make_register(wg_pubkey="", payout_pubkey=""), "127.0.0.1", False
    )
    assert (free.payout_pubkey, free.wg_ip, free.wg_pubkey) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "peer", "code", "field"),
    [
        ({"invite_token": ""}, "10.77.0.42", "BAD_REQUEST", "invite_token"),
        ({"invite_token": TOKEN[:-1]}, "10.77.0.42", "BAD_REQUEST", "invite_token"),
        ({"host_secret": b"h"}, "10.77.0.42", "BAD_REQUEST", "host_secret"),
        ({"session": b""}, "10.77.0.42", "BAD_REQUEST", "session"),
        ({"payout_pubkey": "x"}, "10.77.0.42", "BAD_REQUEST", "payout_pubkey"),
        ({"wg_pubkey": "x"}, "10.77.0.42", "BAD_REQUEST", "wg_pubkey"),
        ({"wg_pubkey": ""}, "10.77.0.42", "BAD_REQUEST", "wg_pubkey"),
        ({"facts": None}, "10.77.0.42", "BAD_REQUEST", "facts.hostname"),
        ({}, "10.77.0.1", "WRONG_ADDRESS", ""),
        ({}, "127.0.0.1", "WRONG_ADDRESS", ""),
        ({}, "::1", "WRONG_ADDRESS", ""),
        ({}, "0.0.0.0", "WRONG_ADDRESS", ""),
    ],
)
def test_a_bad_registration_is_refused(
    changes: Mapping[str, Any], peer: str, code: str, field: str
) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.parse_register(make_register(**changes), peer, True)
    assert refused(error) == (code, field)
    assert TOKEN.split("_")[2][:12] not in str(error.value)


def test_a_resumption_is_read_and_holds_hashes_only() -> None:
    request = pb.ResumeRequest(host_secret=b"h" * 32, session=b"s" * 32, previous_session=b"p" * 32)
    found = cp_server.parse_resume(request, "127.0.0.1", False)
    assert found.previous_sha256 == cp_server.hash_session(b"p" * 32)
    assert (found.payout_pubkey, found.wg_ip, found.wg_pubkey) == (None, None, None)
    with pytest.raises(Refusal) as error:
        cp_server.parse_resume(pb.ResumeRequest(session=b"s" * 32), "127.0.0.1", False)
    assert refused(error) == ("BAD_REQUEST", "host_secret")


BOOT_ID = "0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10"


def test_a_heartbeat_is_read() -> None:
    request = pb.HeartbeatRequest(session=b"s" * 32, seq=2**63 - 1, boot_id=BOOT_ID, paused=True)
    beat = cp_server.parse_heartbeat(request, "10.77.0.42", 30_000)
    assert beat == cp_server.Beat(
        cp_server.hash_session(b"s" * 32),
        "10.77.0.42",
        2**63 - 1,
        BOOT_ID,
        "paused",
        30_000,
        None,
    )
    request.facts.CopyFrom(make_facts())
    assert cp_server.parse_heartbeat(request, "10.77.0.42", 1).facts is not None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"boot_id": ""}, "boot_id"),
        ({"boot_id": BOOT_ID.upper()}, "boot_id"),
        ({"boot_id": BOOT_ID + "\n"}, "boot_id"),
        ({"boot_id": BOOT_ID.replace("-", "")}, "boot_id"),
        ({"seq": 0}, "seq"),
        ({"seq": 2**63}, "seq"),
        ({"session": b"s" * 31}, "session"),
        ({"facts": pb.Facts()}, "facts.hostname"),
    ],
)
def test_a_bad_heartbeat_is_refused(changes: Mapping[str, Any], field: str) -> None:
    values = {"session": b"s" * 32, "seq": 1, "boot_id": BOOT_ID, **changes}
    with pytest.raises(Refusal) as error:
        cp_server.parse_heartbeat(pb.HeartbeatRequest(**values), "10.77.0.42", 30_000)
    assert refused(error) == ("BAD_REQUEST", field)


# Redemption, resume, wallet ----------------------------------------------------------------------

# A host that has the secret, the key, the address: `-` none, A and B two hosts, a and b the same
# ones revoked (these hold no address). Then what happens: the host that the invite re-keys, `new`,
# or the refusal.
REDEMPTIONS = """
- - -  new
- - A  ADDRESS_TAKEN
- A -  KEY_TAKEN
- A A  A
- A B  KEY_TAKEN
- b -  KEY_TAKEN
- b A  KEY_TAKEN
A - -  A
A - A  A
A - B  ADDRESS_TAKEN
A A -  A
A A A  A
A A B  ADDRESS_TAKEN
A B -  KEY_TAKEN
A B A  KEY_TAKEN
A B B  KEY_TAKEN
A b -  KEY_TAKEN
A b A  KEY_TAKEN
A b B  KEY_TAKEN
a - -  HOST_REVOKED
a - B  HOST_REVOKED
a a -  HOST_REVOKED
a a B  HOST_REVOKED
a B -  HOST_REVOKED
a B B  HOST_REVOKED
a b -  HOST_REVOKED
a b B  HOST_REVOKED
"""
CLAIMANTS = {
    "-": None,
    "A": Claimant(1, uuid.UUID(int=1), "offline"),
    "a": Claimant(1, uuid.UUID(int=1), "revoked"),
    "B": Claimant(2, uuid.UUID(int=2), "online"),
    "b": Claimant(2, uuid.UUID(int=2), "revoked"),
}


@pytest.mark.parametrize("line", REDEMPTIONS.strip().splitlines())
def test_who_gets_an_invite(line: str) -> None:
    secret, key, address, expected = line.split()
    claims = CLAIMANTS[secret], CLAIMANTS[key], CLAIMANTS[address]
    if len(expected) > 3:
        with pytest.raises(Refusal) as error:
            cp_server.decide_redemption(*claims)
        assert refused(error)[0] == expected
    else:
        host = cp_server.decide_redemption(*claims)
        assert host == (None if expected == "new" else CLAIMANTS[expected])


def make_registration(**changes: Any) -> cp_server.Registration:
    values: dict[str, Any] = {**vars(cp_server.parse_register(make_register(), "10.77.0.42", True))}
    return cp_server.Registration(**{**values, **changes})


@pytest.mark.parametrize(
    ("state", "key", "code"),
    [
        ("open", None, ""),
        ("open", WG_KEY, ""),
        ("open", base64.b64encode(bytes(32)).decode(), "INVITE_FOR_OTHER_KEY"),
        ("revoked", None, "INVITE_REVOKED"),
        ("expired", None, "INVITE_EXPIRED"),
        ("expired", base64.b64encode(bytes(32)).decode(), "INVITE_EXPIRED"),
    ],
)
def test_whether_an_invite_can_be_redeemed(state: str, key: str | None, code: str) -> None:
    expires_at = dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.timezone.utc)
    invite = {"state": state, "wg_pubkey": key, "expires_at": expires_at}
    if not code:
        cp_server.check_invite(invite, make_registration())
        return
    with pytest.raises(Refusal) as error:
        cp_server.check_invite(invite, make_registration())
    assert refused(error)[0] == code
    if code == "INVITE_EXPIRED":
        assert "2026-01-02 03:04 UTC" in error.value.what


def test_an_invite_for_a_key_is_not_for_a_host_without_one() -> None:
    invite = {"state": "open", "wg_pubkey": WG_KEY, "expires_at": None}
    with pytest.raises(Refusal):
        cp_server.check_invite(invite, make_registration(wg_pubkey=None))


QUESTION = f"GET {cp_server.REGISTRY_AUTH}?a=b HTTP/1.1\r\n".encode()
RIGHT, GUESS = (base64.b64encode(word) for word in (b"me:right", b"me:guess"))


@pytest.mark.parametrize(
    ("head", "password"),
    [
        (QUESTION + b"Authorization: Basic " + RIGHT, "right"),
        (QUESTION.replace(b"?a=b", b"") + b"X: y\r\nauthorization:basic " + RIGHT, "right"),
        (QUESTION.replace(b"GET", b"POST") + b"Authorization: Basic " + RIGHT, ""),
        (QUESTION.replace(b"?", b"x?") + b"Authorization: Basic " + RIGHT, ""),
        (b"GET /healthz HTTP/1.1\r\nAuthorization: Basic " + RIGHT, ""),
        (QUESTION + b"X: y", ""),
        (QUESTION + b"\r\nAuthorization: Basic " + RIGHT, ""),
        (QUESTION + b"Authorization: Bearer " + RIGHT, ""),
        # The handler could look at the other one; one with a space in its name it does not know.
        (QUESTION + b"Authorization: Basic %b\r\nAuthorization: Basic %b" % (RIGHT, GUESS), ""),
        (
            QUESTION + b"Authorization: Basic %b\r\nAuthorization : Basic %b" % (GUESS, RIGHT),
            "guess",
        ),
    ],
)
def test_whose_question_about_the_registry_it_is(head: bytes, password: str) -> None:
    assert cp_server.parse_registry_password(head + b"\r\n\r\n") == password


def test_the_passwords_that_were_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp_server, "REGISTRY_KNOWN_MAX", 2)
    known = cp_server.KnownPasswords()
    known.add("a", "customer 1")
    known.add("b", "customer 2")
    known.add("a", "customer 1")
    known.add("c", "customer 3")
    assert [known.find(word) for word in ("a", "b", "c", "")] == [
        "customer 1",
        "",
        "customer 3",
        "",
    ]
    known.remove("a")
    known.remove("x")
    assert known.find("a") == ""


PEER = (cp_server.PEER_CALLS_S, cp_server.PEER_BURST, cp_server.PEER_HOLD_S)
HTTP = (cp_server.HTTP_CALLS_S, cp_server.HTTP_BURST, 0.0)
REGISTRY = (cp_server.REGISTRY_CALLS_S, cp_server.REGISTRY_BURST, 0.0)


@pytest.mark.parametrize(("calls_s", "burst", "hold_s"), [PEER, HTTP, REGISTRY])
def test_an_address_that_calls_too_often_is_held_back(
    calls_s: float, burst: float, hold_s: float
) -> None:
    """A burst goes through, then one call each 1/calls_s; what is refused costs no turn."""
    due, waits = 0.0, []
    for _ in range(1000):
        wait_s, due = cp_server.decide_hold(due, 1000.0, calls_s, burst, hold_s)
        waits.append(wait_s)
    assert waits[: int(burst)] == [0.0] * int(burst)
    held = sum(0 < wait_s <= hold_s for wait_s in waits)
    assert held == pytest.approx(hold_s * calls_s, abs=1)
    for count, wait_s in enumerate(waits[int(burst) : int(burst) + held]):
        assert wait_s == pytest.approx(count / calls_s)
    refused = waits[int(burst) + held + 1 :]
    assert all(hold_s < wait_s <= hold_s + 1 / calls_s for wait_s in refused)
    back_s = hold_s + 2 / calls_s
    assert cp_server.decide_hold(due, 1000.0 + back_s, calls_s, burst, hold_s)[0] == 0.0


@pytest.mark.parametrize(("calls_s", "burst", "hold_s"), [PEER, HTTP, REGISTRY])
@pytest.mark.parametrize("per_s", [1, 19, 21, 1000])
def test_an_address_has_its_calls_a_second_and_no_more(
    calls_s: float, burst: float, hold_s: float, per_s: int
) -> None:
    due, taken, seconds = 0.0, 0, 60
    for number in range(seconds * per_s):
        now = 1000.0 + number / per_s
        wait_s, due = cp_server.decide_hold(due, now, calls_s, burst, hold_s)
        taken += wait_s <= hold_s
    most = burst + calls_s * (seconds + hold_s)
    assert taken == pytest.approx(min(seconds * per_s, most), abs=2)


@pytest.mark.parametrize(
    ("live", "previous", "ended", "takeovers", "opened", "decision"),
    [
        (None, b"p", False, 0, 0, "continue"),
        (None, b"p", False, 99, 29, "continue"),
        (None, b"p", False, 0, 30, "flood"),
        (b"a", b"p", False, 0, 0, "retry"),
        (b"a", b"a", False, 0, 0, "retry"),
        (b"a", b"p", False, 99, 99, "retry"),
        (b"p", b"p", False, 0, 29, "continue"),
        (b"p", b"p", False, 99, 29, "continue"),
        (b"p", b"p", False, 0, 30, "flood"),
        (b"l", b"p", False, 0, 0, "takeover"),
        (b"l", b"p", False, 2, 29, "takeover"),
        (b"l", b"p", False, 2, 30, "flood"),
        (b"l", b"p", False, 3, 0, "quarantine"),
        (b"l", b"p", False, 99, 99, "quarantine"),
        (b"l", b"p", True, 0, 0, "superseded"),
        (b"l", b"p", True, 99, 99, "superseded"),
        (b"p", b"p", True, 0, 0, "superseded"),
        (None, b"p", True, 0, 0, "superseded"),
    ],
)
def test_what_a_resume_is(
    live: bytes | None, previous: bytes, ended: bool, takeovers: int, opened: int, decision: str
) -> None:
    found = cp_server.decide_resume(live, b"a", previous, ended, takeovers, opened)
    assert found == decision


@pytest.mark.parametrize(
    ("current", "asked", "invited", "ever_assigned", "wallet", "unfulfilled"),
    [
        (None, None, None, False, None, None),
        (None, None, "I", False, "I", None),
        (None, "A", None, False, "A", None),
        (None, "A", "I", False, "A", None),
        ("C", None, None, False, "C", None),
        ("C", None, "I", False, "C", None),
        ("C", "C", "I", False, "C", None),
        ("C", "A", "I", False, "A", None),
        ("C", "A", None, True, "C", "A"),
        ("C", "A", "A", True, "C", "A"),
        ("C", "C", "A", True, "C", None),
        ("C", None, "A", True, "C", None),
        (None, "A", None, True, "A", None),
        (None, None, "I", True, "I", None),
        (None, None, None, True, None, None),
    ],
)
def test_which_wallet_a_host_gets(
    current: str | None,
    asked: str | None,
    invited: str | None,
    ever_assigned: bool,
    wallet: str | None,
    unfulfilled: str | None,
) -> None:
    got = cp_server.decide_wallet(current, asked, invited, ever_assigned)
    assert got == (wallet, unfulfilled)


# Standing ----------------------------------------------------------------------------------------

AT = dt.datetime(2026, 1, 2, 3, 4, 5, 678_999, tzinfo=dt.timezone.utc)


def make_host(**changes: Any) -> Host:
    """An online host with an approved wallet."""
    values: dict[str, Any] = {
        "host_no": 7,
        "host_id": uuid.UUID(int=7),
        "status": "online",
        "status_at": AT,
        "invite_id": "abcdefghij234567",
        "invite_payout_pubkey": WALLET,
        "payout_pubkey": WALLET,
        "requested_payout_pubkey": None,
        "namespace": f"solana:{WALLET}",
        "namespace_approved": True,
        "ever_assigned": False,
        "wg_ip": "10.77.0.42",
        "wg_pubkey": WG_KEY,
        "hostname": "lab",
        "arch": "x86_64",
        "kernel": "6.1.0",
        "agent_version": "0.1.0",
        "cpu_count": 4,
        "memory_bytes": 1,
        "disk_bytes": 2,
        "disk_encrypted": True,
        "engine_version": "20.10.24",
        "unready": "",
        "offered_cpu_milli": 3000,
        "offered_memory_bytes": 6 << 30,
        "takes_secrets": True,
        "drained_at": None,
        "labels": {},
        "assignments": 0,
        "created_at": AT,
        "revoked_at": None,
        "last_heartbeat_at": None,
        "heartbeat_interval_ms": 30_500,
    }
    return Host(**{**values, **changes})


STATUS_REASONS = {
    "pending": "no heartbeat has arrived yet",
    "online": None,
    "offline": "no heartbeat since 2026-01-02 03:04 UTC",
    "paused": "its provider paused it at 2026-01-02 03:04 UTC",
    "quarantined": "in quarantine",
    "revoked": "the operator revoked it at 2026-01-02 03:04 UTC",
}
UNAPPROVED = {"payout_pubkey": OTHER_WALLET, "namespace_approved": False}
WALLET_REASONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "approved": ({}, ()),
    "other wallet, approved": ({"payout_pubkey": OTHER_WALLET}, ()),
    "none": ({"payout_pubkey": None, "namespace_approved": False}, ("it has no payout wallet",)),
    "not the invite's": (UNAPPROVED, (OTHER_WALLET, f"is not the invite's {WALLET}")),
    "not named": ({**UNAPPROVED, "invite_payout_pubkey": None}, ("was not named in the invite",)),
    "asked too late": ({"requested_payout_pubkey": OTHER_WALLET}, (OTHER_WALLET, "already worked")),
    "both": ({**UNAPPROVED, "requested_payout_pubkey": "R"}, ("invite's", "names the wallet R")),
}


@pytest.mark.parametrize("wallet", WALLET_REASONS)
@pytest.mark.parametrize("status", STATUS_REASONS)
def test_why_a_host_gets_no_work(status: str, wallet: str) -> None:
    changes, said = WALLET_REASONS[wallet]
    host = make_host(status=status, **changes)
    reasons = cp_server.decide_reasons(host)
    text = "\n".join(map(str, reasons))
    wanted = [part for part in (STATUS_REASONS[status], *said) if part]
    assert all(part in text for part in wanted), text
    count = (status != "online") + (1 if said else 0) + (wallet == "both")
    assert len(reasons) == count
    assert all(reason.what and reason.todo and "; " in str(reason) for reason in reasons)
    standing = cp_server.decide_standing(host)
    assert standing == cp_server.Standing(status, not count, tuple(map(str, reasons)))
    assert cp_server.render_standing(standing).assignable is (count == 0)


def test_an_offline_host_says_when_it_was_seen_last() -> None:
    seen = dt.datetime(2026, 2, 3, 4, 5, tzinfo=dt.timezone.utc)
    (reason,) = cp_server.decide_reasons(make_host(status="offline", last_heartbeat_at=seen))
    assert "no heartbeat since 2026-02-03 04:05 UTC" in reason.what


def test_every_status_is_in_the_proto() -> None:
    assert set(STATUS_REASONS) == set(cp_server.HOST_STATUSES)
    for status in cp_server.HOST_STATUSES:
        shown = cp_server.render_standing(cp_server.Standing(status, False, ("a; b",)))
        assert pb.HostStatus.Name(shown.status) == f"HOST_STATUS_{status.upper()}"
        assert list(shown.reasons) == ["a; b"]


# Load --------------------------------------------------------------------------------------------


@given(st.floats(0.2, 60), st.floats(0, 1), st.floats(0, 1))
def test_the_interval_stays_in_its_bounds(nominal_s: float, busy: float, unit: float) -> None:
    interval_ms = cp_server.decide_interval_ms(nominal_s, busy, unit)
    assert isinstance(interval_ms, int)
    assert 0 < int(nominal_s * 900) - 1 <= interval_ms <= 60_000
    assert interval_ms <= nominal_s * 2 * 1100 + 1


@pytest.mark.parametrize(
    ("nominal_s", "busy", "unit", "interval_ms"),
    [
        (30, 0, 0.5, 30_000),
        (30, 0, 0, 27_000),
        (30, 0, 1, 33_000),
        (30, 0.5, 0.5, 45_000),
        (30, 1, 0, 54_000),
        (30, 1, 0.5, 60_000),
        (30, 1, 1, 60_000),
        (1, 1, 1, 2_200),
        (60, 0, 1, 60_000),
    ],
)
def test_the_interval_widens_with_the_load(
    nominal_s: float, busy: float, unit: float, interval_ms: int
) -> None:
    assert abs(cp_server.decide_interval_ms(nominal_s, busy, unit) - interval_ms) <= 1


@given(st.integers(0, 10**7), st.floats(0, 1e6))
def test_the_load_is_a_share(waiting: int, commit_s: float) -> None:
    assert 0 <= cp_server.decide_busy(waiting, commit_s) <= 1


@pytest.mark.parametrize(
    ("waiting", "commit_s", "busy"),
    [
        *((0, 0, 0), (0, 0.25, 0), (0, 0.625, 0.5), (0, 1, 1), (0, 30, 1)),
        *((500, 0.1, 0.1), (2500, 0, 0.5), (2500, 1, 1), (10_000, 0, 1)),
    ],
)
def test_the_load_by_queue_and_commit_time(waiting: int, commit_s: float, busy: float) -> None:
    assert cp_server.decide_busy(waiting, commit_s) == pytest.approx(busy)


# Renderers ---------------------------------------------------------------------------------------


def test_times_are_rfc_3339_in_utc() -> None:
    assert cp_server.render_time(None) is None
    assert cp_server.render_time(AT) == "2026-01-02T03:04:05.678Z"
    east = AT.astimezone(dt.timezone(dt.timedelta(hours=9)))
    assert cp_server.render_time(east) == "2026-01-02T03:04:05.678Z"
    assert cp_server.render_row({"a": 1, "at": AT, "no": 2}, "no") == {
        "a": 1,
        "at": "2026-01-02T03:04:05.678Z",
    }


def make_invite(**changes: Any) -> cp_server.Invite:
    """An open invite."""
    values: dict[str, Any] = {
        "invite_no": 3,
        "invite_id": "abcdefghij234567",
        "state": "open",
        "note": "",
        "payout_pubkey": None,
        "wg_ip": None,
        "wg_pubkey": None,
        "approve_first_wallet": False,
        "created_by": "cli:kuma",
        "created_at": AT,
        "expires_at": AT,
        "revoked_at": None,
        "consumed_at": None,
        "host_id": None,
    }
    return cp_server.Invite(**{**values, **changes})


def test_answers_have_exactly_the_fields_of_their_schema() -> None:
    schemas = cp_server.SCHEMAS
    assert list(cp_server.render_host(make_host())) == list(schemas["Host"])
    assert list(cp_server.render_invite(make_invite())) == list(schemas["Invite"])
    assert schemas["NewInvite"] == {"token": "string", **schemas["Invite"]}
    problem = cp_server.render_problem(Refusal("CONFLICT", "what", "todo", "field"))
    assert problem == {"error": {"code": "conflict", "message": "what; todo", "field": "field"}}
    assert list(problem) == list(schemas["Error"])
    assert list(problem["error"]) == list(schemas["Problem"])
    without = cp_server.render_problem(Refusal("CONFLICT", "what", "todo"))
    assert without["error"]["field"] is None


def test_a_host_and_an_invite_are_rendered() -> None:
    host = cp_server.render_host(make_host(status="paused", revoked_at=AT))
    assert host["host_id"] == str(uuid.UUID(int=7))
    assert host["heartbeat_interval_s"] == 30.5
    assert (host["status"], host["assignable"], len(host["reasons"])) == ("paused", False, 1)
    assert host["revoked_at"] == "2026-01-02T03:04:05.678Z"
    json.dumps(host)
    assert cp_server.render_invite(make_invite())["host_id"] is None
    used = cp_server.render_invite(make_invite(host_id=uuid.UUID(int=7)))
    assert used["host_id"] == str(uuid.UUID(int=7))


NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf'({NAME})(?:{{((?:{NAME}="(?:[^"\\\n]|\\[\\"n])*",?)*)}})? (\S+)')
UNESCAPE = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
LABEL = re.compile(rf'({NAME})="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')


def parse_metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples of a Prometheus text (format 0.0.4), which is checked on the way."""
    assert text.endswith("\n")
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    kinds: dict[str, str] = {}
    current = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in kinds, f"{current} stands in two groups"
            kinds[current] = ""
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current
            assert kind in ("counter", "gauge")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == current, line
            labels = tuple(
                (name, re.sub(r"\\.", lambda m: UNESCAPE[m[0]], value))
                for name, value in LABEL.findall(match[2] or "")
            )
            assert (current, labels) not in found, line
            found[current, labels] = float(match[3])
    return found


@given(st.text(string.printable[:95] + "\n"), st.floats(-1e9, 1e9))
def test_metrics_are_prometheus_text(label: str, value: float) -> None:
    samples = [
        ("a_total", "counter", "Things.", {"b": label, "a": "x"}, 1.0),
        ("a_total", "counter", "Things.", {"b": "two", "a": "x"}, 2.0),
        ("c", "gauge", "A level.", {}, value),
    ]
    if label == "two":
        return
    found = parse_metrics(cp_server.render_metrics(samples))
    assert found["a_total", (("a", "x"), ("b", label))] == 1
    assert found["a_total", (("a", "x"), ("b", "two"))] == 2
    assert found["c", ()] == pytest.approx(value)


def test_counters_count_and_gauges_are_set() -> None:
    metrics = cp_server.Metrics()
    metrics.define("b_total", "counter", "Things.")
    metrics.define("a", "gauge", "A level.")
    metrics.add("b_total", result="bad")
    metrics.set("a", 5)
    metrics.add("b_total", 2.5, result="ok")
    metrics.set("a", 4)
    metrics.add("b_total", result="ok")
    assert parse_metrics(metrics.render()) == {
        ("a", ()): 4,
        ("b_total", (("result", "bad"),)): 1,
        ("b_total", (("result", "ok"),)): 3.5,
    }


def test_every_metric_has_a_good_name_and_a_help() -> None:
    for name, kind, text in cp_server.METRICS:
        assert re.fullmatch(r"openinfra_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert re.fullmatch(r"[^\\\n]+\.", text)


def test_a_table_is_aligned() -> None:
    text = cp_server.render_table([("HOST", "NAME"), ("a", "long name"), ("longer", "")])
    assert text == "HOST    NAME\na       long name\nlonger"


# Pages, routes, OpenAPI --------------------------------------------------------------------------


def test_a_page_tells_the_next_cursor_only_when_there_is_more() -> None:
    rows = [{"no": 5}, {"no": 6}, {"no": 9}]
    assert cp_server.one_more({"limit": 2, "cursor": 4}) == {"limit": 3, "cursor": 4}
    assert cp_server.page("x", rows, rows, "no", 2) == (200, {"x": rows[:2], "next_cursor": 6})
    assert cp_server.page("x", rows, rows, "no", 3) == (200, {"x": rows, "next_cursor": None})
    assert cp_server.page("x", [], [], "no", 3) == (200, {"x": [], "next_cursor": None})
    host = make_host()
    assert cp_server.page("x", [host, host], [{}, {}], "host_no", 1)[1]["next_cursor"] == 7


@pytest.mark.parametrize("route", cp_server.ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_is_found_and_no_other_method_is(route: cp_server.Route) -> None:
    path = re.sub(r"{\w+}", "a%2Fb%3A%20c", route.path)
    found, values = cp_server.match_route(route.method, path)
    assert found is route
    assert set(values) == set(re.findall(r"{(\w+)}", route.path))
    assert set(values.values()) <= {"a/b: c"}
    methods = {other.method for other in cp_server.ROUTES if other.path == route.path}
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"} - methods:
        with pytest.raises(Refusal) as error:
            cp_server.match_route(method, path)
        assert refused(error)[0] == "METHOD_NOT_ALLOWED"
        assert set(error.value.todo.removeprefix("use ").split(" or ")) == methods


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/api/v1/admin/hosts/",
        "//api/v1/admin/hosts",
        "/api//v1/admin/hosts",
        "/API/v1/admin/hosts",
        "/api/v1/admin/hosts/a/b",
        "/api/v1/admin/hosts//revoke",
        "/api/v1/admin/hosts/" + "a" * 101,
        "/api/v1/admin/../admin/hosts",
        "/healthz/",
        "/healthz\n",
        pytest.param(
            "/api/v1/openapiXjson",
        ),
    ],
)
def test_other_paths_are_not_found(path: str) -> None:
    with pytest.raises(Refusal) as error:
        cp_server.match_route("GET", path)
    assert refused(error)[0] == "NOT_FOUND"


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The OpenAPI document as a client reads it."""
    rendered = cp_server.render_openapi(cp_server.ROUTES, cp_server.SCHEMAS)
    read: dict[str, Any] = json.loads(json.dumps(rendered))
    return read


def test_every_reference_in_the_openapi_document_resolves(document: dict[str, Any]) -> None:
    references = {item["$ref"] for item in walk(document) if "$ref" in item}
    for reference in references:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
        assert target["type"] == "object"
    used = {reference.rpartition("/")[2] for reference in references}
    assert set(document["components"]["schemas"]) == used


def test_the_openapi_document_has_every_route_and_no_other(document: dict[str, Any]) -> None:
    shown = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert shown == {(route.method, route.path) for route in cp_server.ROUTES}
    assert len(shown) == len(cp_server.ROUTES)
    operations = [op for item in document["paths"].values() for op in item.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == cp_server.VERSION


def test_the_openapi_operations_are_whole(document: dict[str, Any]) -> None:
    schemes = set(document["components"]["securitySchemes"])
    for route in cp_server.ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        scheme = "key" if route.scope == "customer" else "jwt"
        assert operation["security"] == ([{scheme: []}] if route.scope else [])
        assert {name for item in operation["security"] for name in item} <= schemes
        in_path = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert in_path == re.findall(r"{(\w+)}", route.path)
        in_query = [p["name"] for p in operation["parameters"] if p["in"] == "query"]
        assert in_query == [field.name for field in route.query]
        assert set(operation["responses"]) == {*map(str, route.statuses), "default"}
        assert all(response["description"] for response in operation["responses"].values())
        assert ("requestBody" in operation) == (route.body is not None)


def test_the_types_in_the_openapi_document_are_json_types(document: dict[str, Any]) -> None:
    known = {"object", "array", "string", "integer", "number", "boolean", "null"}
    schemas = [item for item in walk(document) if "type" in item and "scheme" not in item]
    for schema in schemas:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if "properties" not in schema and all(isinstance(kind, str) for kind in kinds):
            assert set(kinds) <= known, schema
        if "default" in schema and schema["type"] == "integer":
            assert schema["minimum"] <= schema["default"] <= schema["maximum"]


def test_the_body_of_an_invite_is_in_the_openapi_document(document: dict[str, Any]) -> None:
    operation = document["paths"]["/api/v1/admin/host-invites"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    ttl = body["properties"]["ttl_hours"]
    assert (ttl["type"], ttl["minimum"], ttl["maximum"], ttl["default"]) == ("integer", 1, 72, 24)
    assert body["properties"]["note"]["maxLength"] == 500
    assert set(body["properties"]) == {field.name for field in cp_server.INVITE_FIELDS}


# Versions, settings, files -----------------------------------------------------------------------


@pytest.mark.parametrize("version", [150_000, 150_003, 160_010, 180_000])
def test_a_new_postgresql_is_taken(version: int) -> None:
    cp_server.check_server_version(version)


@pytest.mark.parametrize("version", [0, 90_624, 130_022, 140_999])
def test_an_old_postgresql_is_refused(version: int) -> None:
    with pytest.raises(Error, match=r"too old; upgrade it to 15 or newer") as error:
        cp_server.check_server_version(version)
    assert error.value.exit_code == 1


def test_the_schema_version_must_be_the_programs() -> None:
    cp_server.check_schema_version(cp_server.SCHEMA_VERSION)
    with pytest.raises(Error, match=r"no OpenInfra schema; run: cp_server.py migrate"):
        cp_server.check_schema_version(None)
    with pytest.raises(Error, match=r"this program needs .*; run: cp_server.py migrate"):
        cp_server.check_schema_version(cp_server.SCHEMA_VERSION - 1)
    with pytest.raises(Error, match=r"this program knows only .*; upgrade cp_server.py"):
        cp_server.check_schema_version(cp_server.SCHEMA_VERSION + 1)


RELEASED = """
c2b3592670276bfa ea8c58bf4646670b 37a8866151a1910c 72be6d2fd74f6aa4 9c77cc62b8f0ab2e
4b67677c95d245a6 cfa09f0689a4c202 69e9d4b01f29ca70 e393d9a0e5dd89f7 859989972a6ae6c4
925eb4e16bda180c
"""


def test_a_migration_that_was_released_stays_as_it_was() -> None:
    """A database that has it would be refused, or lack what was put into it later."""
    released = RELEASED.split()
    for (number, _, text), start in zip(cp_server.MIGRATIONS, released, strict=False):
        assert hashlib.sha256(text.encode()).hexdigest().startswith(start), number
    assert len(released) == 11 <= cp_server.SCHEMA_VERSION


def test_migrations_are_numbered_without_gaps() -> None:
    assert [number for number, _, _ in cp_server.MIGRATIONS] == list(
        range(1, cp_server.SCHEMA_VERSION + 1)
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("# a comment\n\n  # another\n", {}),
        ("HTTP_LISTEN=127.0.0.1:1", {"HTTP_LISTEN": "127.0.0.1:1"}),
        ("  ROLE = \n", None),
        (" ROLE= cp \r\nPEER_CHECK=wg\r\n", {"ROLE": "cp", "PEER_CHECK": "wg"}),
        ("DSN_FILE=/a=b#c", {"DSN_FILE": "/a=b#c"}),
        ("ROLE=", {"ROLE": ""}),
        ("ROLE=a\nROLE=a", None),
        ("role=a", None),
        ("ROLES=a", None),
        ("export ROLE=a", None),
        ("ROLE", None),
        ("=a", None),
        ("ROLE=a\nINVITE_TOKEN=oi1_x", None),
    ],
)
def test_env_files(text: str, found: dict[str, str] | None) -> None:
    if found is not None:
        assert cp_server.parse_env(text, "cp.env") == found
        return
    with pytest.raises(Error, match=r"^cp.env:[0-9]+: ") as error:
        cp_server.parse_env(text, "cp.env")
    assert error.value.exit_code == 2
    assert error.value.todo


def test_an_env_file_tells_the_line_and_the_known_keys() -> None:
    with pytest.raises(Error) as error:
        cp_server.parse_env("ROLE=a\n\nPASSWORD=hunter2\n", "cp.env")
    assert error.value.what == "cp.env:3: unknown key 'PASSWORD'"
    assert "DSN_FILE, GRPC_LISTEN" in error.value.todo
    assert "hunter2" not in str(error.value)


def test_an_env_file_without_an_equals_sign_is_not_repeated() -> None:
    with pytest.raises(Error) as error:
        cp_server.parse_env(f"{TOKEN}\n", "cp.env")
    assert TOKEN[:25] not in str(error.value)


def read_settings(*flags: str) -> cp_server.Settings:
    """The settings that a command line gives."""
    return cp_server.read_settings(cp_server.make_parser().parse_args(["serve", *flags]))


def test_a_flag_goes_before_the_env_file_and_that_before_the_default(tmp_path: Path) -> None:
    env = tmp_path / "cp.env"
    env.write_text("HTTP_LISTEN=127.0.0.1:81\nHEARTBEAT_S=5\nPEER_CHECK=off\nROLE=\n")
    found = read_settings(f"--env-file={env}", "--heartbeat-s=7")
    assert found.http_listen == ("127.0.0.1", 81)
    assert found.heartbeat_s == 7
    assert found.peer_check is False
    assert found.grpc_listen == ("10.77.0.1", 9092)
    assert found.role == "openinfra"
    default = read_settings(f"--env-file={os.devnull}")
    assert (default.heartbeat_s, default.peer_check) == (30, True)
    assert default.dsn_file == Path("/etc/openinfra/cp/dsn")


def test_systemds_credentials_go_before_the_default_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dsn").write_text("x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    found = read_settings(f"--env-file={os.devnull}")
    assert found.dsn_file == tmp_path / "dsn"
    assert found.jwt_keys_file == Path("/etc/openinfra/cp/jwt-keys.json")
    assert read_settings(f"--env-file={os.devnull}", "--dsn-file=/x").dsn_file == Path("/x")


@pytest.mark.parametrize(
    "flag",
    [
        "--heartbeat-s=0",
        "--heartbeat-s=0.19",
        "--heartbeat-s=61",
        "--heartbeat-s=-5",
        "--heartbeat-s=nan",
        "--heartbeat-s=inf",
        "--heartbeat-s=soon",
        "--peer-check=on",
        "--peer-check=WG",
        "--grpc-listen=9092",
        "--http-listen=127.0.0.1:",
        "--env-file=/nonexistent/cp.env",
    ],
)
def test_settings_out_of_range_are_a_usage_error(flag: str) -> None:
    flags = [flag] if "env-file" in flag else [f"--env-file={os.devnull}", flag]
    with pytest.raises(Error) as error:
        read_settings(*flags)
    assert error.value.exit_code == 2
    assert error.value.todo


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_an_env_file_that_cannot_be_read_is_a_usage_error(
    tmp_path: Path, content: bytes | None
) -> None:
    env = tmp_path / "cp.env"
    if content is None:
        env.mkdir()
    else:
        env.write_bytes(content)
    with pytest.raises(Error, match="cannot read") as error:
        read_settings(f"--env-file={env}")
    assert error.value.exit_code == 2


def test_an_env_file_behind_a_closed_directory_is_a_usage_error(tmp_path: Path) -> None:
    closed = tmp_path / "etc"
    closed.mkdir(mode=0)
    user = os.geteuid()
    os.seteuid(user or 65_534)  # root may enter any directory
    try:
        with pytest.raises(Error, match="cannot read") as error:
            read_settings(f"--env-file={closed}/cp.env")
    finally:
        os.seteuid(user)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("10.77.0.1:1", ("10.77.0.1", 1)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:9092", ("[::1]", 9092)),
    ],
)
def test_addresses_to_listen_on(text: str, address: tuple[str, int]) -> None:
    assert cp_server.parse_address(text, "http-listen") == address
    assert cp_server.render_address(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "8080", ":8080", "127.0.0.1", "127.0.0.1:", "a:0", "a:65536", "a:100000"),
        *("a:-1", "a:+1", "a: 1", "a:1 ", "a:1\n", "a:x", "a:٣"),
    ],
)
def test_other_addresses_to_listen_on_are_refused(text: str) -> None:
    with pytest.raises(Error, match="http-listen") as error:
        cp_server.parse_address(text, "http-listen")
    assert error.value.exit_code == 2


def test_a_key_file_is_made_and_read_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "jwt-keys.json"
    first = cp_server.add_jwt_key(path, [])
    assert path.stat().st_mode & 0o777 == 0o600
    second = cp_server.add_jwt_key(path, [first])
    assert cp_server.read_jwt_keys(path) == [first, second]
    assert first.secret != second.secret


BAD_KEY_FILES: dict[str, str] = {
    "empty": "",
    "no JSON": "secret",
    "list": "[]",
    "no keys": "{}",
    "no key": '{"keys": []}',
    "not a list": '{"keys": 1}',
    "no object": '{"keys": [1]}',
    "no secret": '{"keys": [{"kid": "a", "alg": "HS256"}]}',
    "short secret": '{"keys": [{"kid": "a", "alg": "HS256", "secret": "QUJD"}]}',
    "no base64": '{"keys": [{"kid": "a", "alg": "HS256", "secret": "!"}]}',
    "alg none": json.dumps({"keys": [{"kid": "a", "alg": "none", "secret": "A" * 43}]}),
    "alg RS256": json.dumps({"keys": [{"kid": "a", "alg": "RS256", "secret": "A" * 43}]}),
    "secret a number": json.dumps({"keys": [{"kid": "a", "alg": "HS256", "secret": 1}]}),
    "binary": "\udcff",
}


@pytest.mark.parametrize("text", [pytest.param(t, id=name) for name, t in BAD_KEY_FILES.items()])
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "jwt-keys.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(Error, match="holds no usable signing key; make a new one"):
        cp_server.read_jwt_keys(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "dsn"
    path.write_text("dbname=x password=hunter2")
    path.chmod(mode)
    with pytest.raises(Error, match=rf"mode {mode:04o}; type: chmod 600") as error:
        cp_server.read_dsn(path)
    assert error.value.exit_code == 3
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_connection_string_is_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "dsn"
    path.write_text("host=/run/postgresql dbname=x password=hunter2\n")
    path.chmod(mode)
    assert cp_server.read_dsn(path) == "host=/run/postgresql dbname=x password=hunter2"


@pytest.mark.parametrize("text", ["", "\n", "a=1\nb=2", "hunter2 hunter2", "nonsense=hunter2"])
def test_another_connection_string_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dsn"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(Error, match="connection string") as error:
        cp_server.read_dsn(path)
    assert "hunter2" not in str(error.value)


def test_a_missing_secret_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"\(PostgreSQL connection string\) is missing"):
        cp_server.read_dsn(tmp_path / "dsn")


def test_a_directory_is_no_secret_file(tmp_path: Path) -> None:
    (tmp_path / "dsn").mkdir(mode=0o700)
    with pytest.raises(Error):
        cp_server.read_dsn(tmp_path / "dsn")


def test_every_refusal_has_its_two_statuses() -> None:
    for name, (status, code) in cp_server.REFUSALS.items():
        assert re.fullmatch("[A-Z_]+", name)
        assert status.name in ("INTERNAL", "UNAVAILABLE") if code >= 500 else 400 <= code < 500
