"""What holds for every route and every bad request of the HTTP API, table by table."""

from __future__ import annotations

import datetime as dt
import json
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

import cp_server
from tests.harness import (
    OTHER_WALLET,
    WALLET,
    Client,
    ControlPlane,
    Postgres,
    check_refused,
    facts,
    serving,
    unchanged,
    wait_for,
)

INVITES, HOSTS = "/api/v1/admin/host-invites", "/api/v1/admin/hosts"
NAMESPACES, AUDIT = "/api/v1/admin/namespaces", "/api/v1/admin/audit-log"


ORDER = {
    "name": "web",
    "image": f"kuma/web@sha256:{'ab' * 32}",
    "cpu_milli": 500,
    "memory_bytes": 64 << 20,
}
KEYS: dict[str, str] = {}  # scope -> what opens its routes, but for operators' tokens


@pytest.fixture(scope="module")
def api(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with seven hosts, one of them revoked, and invites of every state.

    Their last heartbeats lie ahead, so that nothing changes by itself while the tests look.
    """
    with serving(postgres, tmp_path_factory.mktemp("edge"), "--registry=cp.example.com") as cp:
        for number in range(6):
            with Client(cp) as client:
                wallet = OTHER_WALLET if number == 5 else WALLET
                token = cp.mint(payout_pubkey=WALLET, note=f"host {number}")
                named = facts(hostname=f"n{number % 2}")
                client.register(token, payout_pubkey=wallet, facts=named)
                if number < 3:
                    client.heartbeat()
        later = "UPDATE liveness SET last_heartbeat_at = now() + interval '1 day'"
        cp.postgres.force(cp.database, f"{later} WHERE last_heartbeat_at IS NOT NULL")
        with Client(cp) as client:
            gone = client.register(cp.mint(note="gone"), payout_pubkey=OTHER_WALLET).host_id
        assert cp.call("POST", f"{HOSTS}/{gone}/revoke")[0] == 200
        for note in ("old", "taken back", "waiting"):
            cp.mint(note=note)
        back = cp.query("SELECT invite_id FROM invites WHERE note = 'taken back'")[0]["invite_id"]
        assert cp.call("DELETE", f"{INVITES}/{back}")[0] == 200
        done = cp.command("add-customer", "--name=Kuma", "--namespace=kuma")
        assert done.returncode == 0, done.stderr
        KEYS["customer"] = done.stdout.strip()
        workload = {**ORDER, "name": "waiting", "replicas": 0}
        token = KEYS["customer"]
        assert cp.call("POST", "/api/v1/workloads", workload, token=token)[0] == 201
        for name in ("one", "two"):
            workload = {**ORDER, "name": name}
            assert cp.call("POST", "/api/v1/workloads", workload, token=token)[0] == 201
        settled = (
            "SELECT 1 AS one FROM workloads w WHERE unplaced_reason <> ''"
            " OR EXISTS (SELECT 1 FROM assignments a WHERE a.workload_no = w.workload_no)"
        )
        wait_for("places or reasons", lambda: len(cp.query(settled)) == 2)
        cp.postgres.execute(
            cp.database,
            "UPDATE invites SET created_at = now() - interval '2 h',"
            " expires_at = now() - interval '1 h' WHERE note = 'old'",
        )
        yield cp


def exchange(cp: ControlPlane, raw: bytes, *, end: bool = False) -> tuple[int, dict[str, str], Any]:
    """Send bytes as they are; gives back status, headers and JSON; the answer must be whole."""
    with socket.create_connection(("127.0.0.1", cp.http_port), 15) as sock:
        sock.sendall(raw)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65_536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    match = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+", first)
    assert match, answer[:200]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert headers["connection"] == "close"
    assert headers["cache-control"] == "no-store"
    assert int(headers["content-length"]) == len(body)
    return int(match[1]), headers, json.loads(body)


def check_type(kind: str, value: Any) -> None:
    """Fails unless a value is of a type as cp_server.SCHEMAS writes it."""
    if value is None:
        assert kind.endswith("?")
        return
    kind = kind.removesuffix("?")
    if kind.startswith("["):
        for one in value:
            check_type(kind[1:-1], one)
    elif kind == "date-time":
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value)
        dt.datetime.strptime(value, "%Y-%m-%dT%H:%M:%S.%f%z")
    elif kind == "uuid":
        assert str(uuid.UUID(value)) == value
    elif kind in ("strings", "integers"):
        assert all(type(one) is {"strings": str, "integers": int}[kind] for one in value)
    elif kind in cp_server.SCHEMAS:
        fields = cp_server.SCHEMAS[kind]
        assert isinstance(value, dict)
        assert not fields or list(value) == list(fields), kind
        for name, inner in fields.items():
            check_type(inner, value[name])
    else:
        kinds = {"string": (str,), "integer": (int,), "boolean": (bool,), "number": (int, float)}
        assert type(value) in kinds[kind], f"{value!r} is no {kind}"


def head(
    cp: ControlPlane,
    method: str,
    path: str,
    *lines: str,
    length: int | None = None,
    scope: str = "",
) -> bytes:
    """The head of a request with a good token."""
    token = KEYS.get(scope, cp.token)
    fields = [f"{method} {path} HTTP/1.1", "Host: cp", f"Authorization: Bearer {token}", *lines]
    if length is not None:
        fields += ["Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(fields) + "\r\n\r\n").encode()


# Every route -------------------------------------------------------------------------------------


def fill(cp: ControlPlane, path: str) -> str:
    """A route's path with values that are there."""
    host_id = cp.query("SELECT host_id FROM hosts ORDER BY host_no LIMIT 1")[0]["host_id"]
    invite_id = cp.query("SELECT invite_id FROM invites WHERE note = 'waiting'")[0]["invite_id"]
    customer_id = cp.query("SELECT customer_id FROM customers")[0]["customer_id"]
    values = {
        "host_id": host_id,
        "invite_id": invite_id,
        "namespace": f"solana:{WALLET}",
        "customer_id": customer_id,
        "key_id": KEYS["customer"].split("_")[1],
        "workload_id": cp.query("SELECT workload_id FROM workloads")[0]["workload_id"],
        "month": "2026-11",
    }
    return re.sub(r"{(\w+)}", lambda match: str(values[match[1]]), path)


READS = [route for route in cp_server.ROUTES if route.method == "GET"]


@pytest.mark.parametrize("route", READS, ids=lambda route: route.path)
def test_every_answer_has_the_types_of_the_document(
    api: ControlPlane, route: cp_server.Route
) -> None:
    with unchanged(api):
        request = head(api, "GET", fill(api, route.path), scope=route.scope)
        status, headers, answer = exchange(api, request)
    assert status in route.statuses
    assert headers["content-type"] == "application/json; charset=utf-8"
    check_type(route.answer, answer)


@pytest.mark.parametrize(
    "route", cp_server.ROUTES, ids=lambda route: f"{route.method} {route.path}"
)
def test_every_route_wants_the_right_token(api: ControlPlane, route: cp_server.Route) -> None:
    path = fill(api, route.path)
    with unchanged(api):
        status, headers, answer = exchange(api, f"{route.method} {path} HTTP/1.1\r\n\r\n".encode())
        if not route.scope:
            assert status == 200
            return
        assert (status, answer["error"]["code"]) == (401, "unauthorized")
        assert headers["www-authenticate"] == 'Bearer realm="openinfra"'
        for scheme in ("Basic", "Token", "Bearerx", ""):
            given = {"Authorization": f"{scheme} {api.token}".strip()}
            assert api.call(route.method, path, headers=given)[0] == 401
        if route.scope in KEYS:  # no operator's token, however far it reaches
            assert api.call(route.method, path)[0] == 401
            if route.method == "GET":
                assert api.call("GET", path, token=KEYS[route.scope])[0] in route.statuses
            return
        for key in KEYS.values():
            assert api.call(route.method, path, token=key)[0] == 401
        nobody = cp_server.mint_jwt(api.key, "nobody", "", 60)
        assert api.call(route.method, path, token=nobody)[0] == 403
        reader = cp_server.mint_jwt(api.key, "reader", "read", 60)
        status, answer = api.call(route.method, path, token=reader)
    if route.scope == "read":
        assert status == 200
    else:
        assert (status, answer["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("path", sorted({route.path for route in cp_server.ROUTES}))
def test_other_methods_are_refused_with_those_that_are_possible(
    api: ControlPlane, path: str
) -> None:
    possible = {route.method for route in cp_server.ROUTES if route.path == path}
    with unchanged(api):
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - possible:
            status, headers, answer = exchange(api, head(api, method, fill(api, path)))
            assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
            assert set(headers["allow"].split(", ")) == possible


# Lists -------------------------------------------------------------------------------------------


def read_pages(cp: ControlPlane, path: str, name: str, limit: int) -> list[dict[str, Any]]:
    """All rows of a list, page by page; no page is empty and all but the last are full."""
    found: list[dict[str, Any]] = []
    cursor: int | None = 0
    while cursor is not None:
        status, answer = cp.call("GET", f"{path}?limit={limit}&cursor={cursor}")
        assert status == 200
        rows, cursor = answer[name], answer["next_cursor"]
        assert len(rows) == limit or (rows and cursor is None)
        found += rows
    return found


LISTS = ((INVITES, "invites"), (HOSTS, "hosts"), (NAMESPACES, "namespaces"), (AUDIT, "entries"))


@pytest.mark.parametrize(("path", "name"), LISTS)
@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_pages_together_are_the_whole_list(
    api: ControlPlane, path: str, name: str, limit: int
) -> None:
    whole = api.call("GET", path)[1][name]
    assert len(whole) > 1
    assert read_pages(api, path, name, limit) == whole
    exact = api.call("GET", f"{path}?limit={len(whole)}")[1]
    assert (exact[name], exact["next_cursor"]) == (whole, None)


@pytest.mark.parametrize(("path", "name"), LISTS)
def test_what_is_added_meanwhile_shifts_no_page(cp: ControlPlane, path: str, name: str) -> None:
    def add(wallet: str) -> None:
        with Client(cp) as client:
            client.register(cp.mint(), payout_pubkey=wallet)

    add(WALLET)
    add(OTHER_WALLET)
    before = cp.call("GET", path)[1][name]
    first = cp.call("GET", f"{path}?limit=1")[1]
    add("So11111111111111111111111111111111111111112")
    second = cp.call("GET", f"{path}?limit=1&cursor={first['next_cursor']}")[1]
    keys = [next(iter(row.values())) for row in (*first[name], *second[name])]
    assert keys == [next(iter(row.values())) for row in before[:2]]


@pytest.mark.parametrize(
    ("state", "notes"),
    [
        ("open", ["waiting"]),
        ("revoked", ["taken back"]),
        ("expired", ["old"]),
        ("used", ["gone", *(f"host {number}" for number in (5, 4, 3, 2, 1, 0))]),
    ],
)
def test_invites_by_state(api: ControlPlane, state: str, notes: list[str]) -> None:
    found = api.call("GET", f"{INVITES}?state={state}")[1]["invites"]
    assert [invite["note"] for invite in found] == notes
    assert {invite["state"] for invite in found} == {state}
    assert all((invite["host_id"] is not None) == (state == "used") for invite in found)


def test_the_audit_log_of_one_subject(api: ControlPlane) -> None:
    host_id = api.call("GET", f"{HOSTS}?limit=1")[1]["hosts"][0]["host_id"]
    found = api.call("GET", f"{AUDIT}?subject={host_id}")[1]["entries"]
    assert [entry["action"] for entry in found] == ["host.register"]
    assert api.call("GET", f"{AUDIT}?subject=nobody")[1] == {"entries": [], "next_cursor": None}


# Changes -----------------------------------------------------------------------------------------


def read_audit(cp: ControlPlane, subject: str) -> list[tuple[str, str]]:
    """What was done to a subject and by whom, oldest first."""
    sql = "SELECT action, actor FROM audit_log WHERE subject = %s ORDER BY audit_id"
    return [(row["action"], row["actor"]) for row in cp.query(sql, subject)]


def test_a_token_is_given_once_and_is_nowhere_else(cp: ControlPlane) -> None:
    minted = [cp.call("POST", INVITES, {"note": "x"})[1] for _ in range(2)]
    assert minted[0]["token"] != minted[1]["token"]
    with Client(cp) as client:
        client.register(minted[0]["token"])
        thief = Client(cp)
        check_refused("INVITE_USED", thief.register, minted[0]["token"])
        thief.channel.close()
    seen = cp.log + "".join(json.dumps(cp.call("GET", path)[1]) for path, _ in LISTS)
    tables = cp.query("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 2200")
    for table in tables:
        sql = f"SELECT string_agg(t::text, ' ') AS rows FROM {table['relname']} t"  # noqa: S608
        seen += str(cp.query(sql)[0]["rows"])
    for invite in minted:
        secret = cp_server.parse_token("oi1", invite["token"]).secret
        assert invite["id"] in seen
        for spelling in (invite["token"], invite["token"].split("_", 2)[2][:43], secret.hex()):
            assert spelling not in seen
    for secret in (client.host_secret, client.session):
        assert secret.hex() not in seen
    assert cp.token not in seen


def test_a_quarantined_host_is_released_once(cp: ControlPlane) -> None:
    with Client(cp) as client:
        host_id = client.register(cp.mint()).host_id
        client.heartbeat()
        for _ in range(3):
            client.resume(previous_session=b"x" * 32)
        check_refused("HOST_QUARANTINED", client.resume, previous_session=b"x" * 32)
        shown = cp.call("GET", f"{HOSTS}/{host_id}")[1]
        assert (shown["status"], shown["assignable"]) == ("quarantined", False)
        assert "in quarantine" in shown["reasons"][0]
        status, shown = cp.call("POST", f"{HOSTS}/{host_id}/release")
        assert (status, shown["status"]) == (200, "offline")
        with unchanged(cp):
            assert cp.call("POST", f"{HOSTS}/{host_id}/release")[0] == 409
        client.resume()
        client.heartbeat()
    assert cp.call("GET", f"{HOSTS}/{host_id}")[1]["status"] == "online"
    action, actor = read_audit(cp, host_id)[-1]
    assert action == "host.release"
    assert re.fullmatch("jwt:tester:[a-z2-7]{16}", actor)
    cp.check_invariants()


def test_the_second_time_nothing_changes(cp: ControlPlane) -> None:
    with Client(cp) as client:
        token = cp.mint()
        host_id = client.register(token, payout_pubkey=OTHER_WALLET).host_id
        spare = str(cp.call("POST", INVITES, {})[1]["id"])
        for method, path, subject, action in (
            ("DELETE", f"{INVITES}/{spare}", spare, "invite.revoke"),
            ("POST", f"{NAMESPACES}/solana:{OTHER_WALLET}/approve", None, "namespace.approve"),
            ("POST", f"{HOSTS}/{host_id}/revoke", host_id, "host.revoke"),
        ):
            status, first = cp.call(method, path)
            assert status == 200
            with unchanged(cp):
                assert cp.call(method, path) == (200, first)
            done, actor = read_audit(cp, subject or f"solana:{OTHER_WALLET}")[-1]
            assert done == action
            assert actor.startswith("jwt:tester:")
        with unchanged(cp):
            assert cp.call("DELETE", f"{INVITES}/{token.split('_')[1]}")[0] == 409
            assert cp.call("POST", f"{HOSTS}/{host_id}/release")[0] == 409
        check_refused("HOST_REVOKED", client.heartbeat)
    cp.check_invariants()


@pytest.mark.parametrize(
    "note",
    ["provider@home \N{EM DASH} Kuma", "\N{BEAR FACE} 熊", "\\ \" ' % {} <b>", "x" * 500, ""],
)
def test_a_note_is_kept_as_it_was_sent(cp: ControlPlane, note: str) -> None:
    for ascii_only in (True, False):
        raw = json.dumps({"note": note}, ensure_ascii=ascii_only).encode()
        status, made = cp.call("POST", INVITES, raw=raw)
        assert (status, made["note"]) == (201, note)
    assert {row["note"] for row in cp.query("SELECT note FROM invites")} == {note}


# Bad requests: the right status, a sentence, no change, no log line, no secret --------------------

SECRET = cp_server.render_token("oi1", "abcdefghij234567", bytes(range(32)))


def post(body: bytes, *lines: str, path: str = INVITES) -> Callable[[ControlPlane], bytes]:
    """A POST with a good token and a length that is true."""
    return lambda cp: head(cp, "POST", path, *lines, length=len(body)) + body


def plain(method: str, path: str, *lines: str) -> Callable[[ControlPlane], bytes]:
    """A request without a body, with a good token."""
    return lambda cp: head(cp, method, path, *lines)


def raw(text: bytes) -> Callable[[ControlPlane], bytes]:
    """A request as it is."""
    return lambda _: text


BAD_REQUESTS: dict[str, tuple[int, Callable[[ControlPlane], bytes]]] = {
    "depth 30,000": (400, post(b'{"note": ' + b"[" * 30_000 + b"]" * 30_000 + b"}")),
    "key twice": (400, post(b'{"note": "a", "note": "b"}')),
    "key twice by escape": (400, post(b'{"note": "a", "n\\u006fte": "b"}')),
    "surrogate key": (400, post(b'{"\\ud800": 1}')),
    "surrogate note": (400, post(b'{"note": "\\udfff"}')),
    "NUL in a note": (400, post(b'{"note": "a\\u0000"}')),
    "escape in a note": (400, post(b'{"note": "\\u001b[31m"}')),
    "BOM": (400, post(b"\xef\xbb\xbf{}")),
    "UTF-16": (400, post("{}".encode("utf-16"))),
    "huge number": (400, post(b'{"ttl_hours": ' + b"9" * 60_000 + b"}")),
    "infinite number": (400, post(b'{"ttl_hours": 1e999}')),
    "secret in a field": (400, post(json.dumps({SECRET: SECRET}).encode())),
    "secret in a value": (400, post(json.dumps({"payout_pubkey": SECRET}).encode())),
    "body where none is taken": (400, post(b'{"a": 1}', path=f"{NAMESPACES}/x/approve")),
    "body of a GET": (400, lambda cp: head(cp, "GET", HOSTS, length=7) + b'{"a":1}'),
    "65,537 bytes": (413, post(b" " * 65_537)),
    "a terabyte": (413, lambda cp: head(cp, "POST", INVITES, length=10**12 - 1)),
    "length of 13 digits": (400, lambda cp: head(cp, "POST", INVITES, length=10**12)),
    "length negative": (400, plain("POST", INVITES, "Content-Length: -1")),
    "length with a sign": (400, plain("POST", INVITES, "Content-Length: +2")),
    "length in hex": (400, plain("POST", INVITES, "Content-Length: 0x2")),
    "length a list": (400, plain("POST", INVITES, "Content-Length: 2, 2")),
    "two lengths": (400, plain("POST", INVITES, "Content-Length: 2", "Content-Length: 3")),
    "the same length twice": (
        400,
        plain("POST", INVITES, "Content-Length: 2", "content-length: 2"),
    ),
    "chunked": (411, plain("POST", INVITES, "Transfer-Encoding: chunked")),
    "chunked and a length": (411, post(b"{}", "Transfer-Encoding: chunked")),
    "chunked, odd spelling": (411, post(b"{}", "tRANSFER-eNCODING: xchunked")),
    "text": (415, plain("POST", INVITES, "Content-Type: text/plain", "Content-Length: 2")),
    "no type": (415, plain("POST", INVITES, "Content-Length: 2")),
    "form": (
        415,
        plain(
            "POST", INVITES, "Content-Type: application/x-www-form-urlencoded", "Content-Length: 2"
        ),
    ),
    "no body": (400, plain("POST", INVITES)),
    "unknown parameter": (400, plain("GET", f"{HOSTS}?colour=red")),
    "parameter twice": (400, plain("GET", f"{HOSTS}?limit=1&limit=1")),
    "parameter of a POST": (400, post(b"{}", path=f"{INVITES}?limit=1")),
    "NUL parameter": (400, plain("GET", f"{HOSTS}?hostname=a%00")),
    "21 parameters": (400, plain("GET", f"{HOSTS}?" + "&".join(f"a{i}=" for i in range(21)))),
    "no UUID": (400, plain("GET", f"{HOSTS}/42")),
    "no UUID to revoke": (400, plain("POST", f"{HOSTS}/*/revoke")),
    "no UUID to release": (400, plain("POST", f"{HOSTS}/%C3%A9/release")),
    "slash in an id": (404, plain("DELETE", f"{INVITES}/a%2Fb")),
    "dots": (404, plain("GET", f"{HOSTS}/../hosts")),
    "NUL in an id": (400, plain("DELETE", f"{INVITES}/%00")),
    "NUL in a namespace": (400, plain("POST", f"{NAMESPACES}/solana:%00/approve")),
    "newline in a namespace": (400, plain("POST", f"{NAMESPACES}/solana:%0A/approve")),
    "bytes in a namespace": (404, plain("POST", f"{NAMESPACES}/%ff%fe/approve")),
    "SQL in an id": (404, plain("DELETE", f"{INVITES}/x';DROP%20TABLE%20invites;--")),
    "101 characters": (404, plain("DELETE", f"{INVITES}/{'a' * 101}")),
    "absolute form, broken": (404, raw(b"GET http://[ HTTP/1.1\r\n\r\n")),
    "one word": (400, raw(b"hello\r\n\r\n")),
    "three words": (400, raw(b"GET / HTTQ/1.1\r\n\r\n")),
    "binary": (400, raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")),
    "version 1.x": (400, raw(b"GET / HTTP/1.x\r\n\r\n")),
    "version 2.0": (505, raw(b"GET / HTTP/2.0\r\n\r\n")),
    "unknown method": (501, raw(b"FROB / HTTP/1.1\r\n\r\n")),
    "lower-case method": (501, raw(b"get /healthz HTTP/1.1\r\n\r\n")),
    "path too long": (414, raw(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")),
    "header too long": (431, raw(b"GET /healthz HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n")),
    "200 headers": (431, raw(b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n")),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_leaves_no_trace(api: ControlPlane, name: str) -> None:
    wanted, make = BAD_REQUESTS[name]
    written = len(api.log)
    with unchanged(api):
        status, _, answer = exchange(api, make(api))
    assert status == wanted, answer
    check_type("Error", answer)
    what, _, todo = answer["error"]["message"].partition("; ")
    assert what
    assert todo
    assert api.log[written:] == ""
    text = json.dumps(answer)
    assert SECRET.split("_", 2)[2][:20] not in text
    assert api.token not in text


@pytest.mark.parametrize("sent", [b"", b"{", b'{"note": "x"', b'{"note": "x"}'])
def test_a_body_that_ends_early_is_refused(api: ControlPlane, sent: bytes) -> None:
    with unchanged(api):
        request = head(api, "POST", INVITES, length=len(sent) + 1) + sent
        status, _, answer = exchange(api, request, end=True)
    assert (status, answer["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize("line", [b"GET / %s", b"%s", b"%s / HTTP/1.1", b"GET /%s x HTTP/1.1"])
def test_an_unreadable_request_line_is_not_repeated(api: ControlPlane, line: bytes) -> None:
    status, _, answer = exchange(api, line % SECRET.encode() + b"\r\n\r\n")
    assert status in (400, 501)
    # a path that is only not found is not repeated at all
    assert SECRET[:30] not in json.dumps(answer)


def test_a_client_that_goes_away_is_no_error(cp: ControlPlane) -> None:
    written = len(cp.log)
    sock = socket.create_connection(("127.0.0.1", cp.http_port), 5)
    sock.sendall(head(cp, "POST", INVITES, length=100) + b'{"note')
    time.sleep(0.2)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()  # resets the connection
    assert cp.call("GET", "/healthz")[0] == 200
    time.sleep(0.2)
    assert "ERROR" not in cp.log[written:]


def test_old_and_odd_clients_are_answered(api: ControlPlane) -> None:
    authorization = f"Authorization: Bearer {api.token}\r\n".encode()
    for request in (
        b"GET %s HTTP/1.0\r\n%s\r\n",
        b"GET %s HTTP/1.1\r\nConnection: keep-alive\r\n%s\r\n",
        b"GET %s HTTP/1.1\r\n%s\r\nGET /healthz HTTP/1.1\r\n\r\n",  # the second one is not read
        b"GET %s HTTP/1.1\nHost: cp\n%s\n",
        b"GET %s HTTP/1.1\r\nExpect: 100-continue-not\r\n%s\r\n",
    ):
        status, _, answer = exchange(api, request % (HOSTS.encode(), authorization))
        assert status == 200
        assert len(answer["hosts"]) == 7
    for scheme in ("Bearer", "bearer", "BEARER", "bEARER  "):
        given = {"Authorization": f"{scheme} {api.token}"}
        assert api.call("GET", HOSTS, headers=given)[0] == 200


def test_a_body_in_pieces_is_read(cp: ControlPlane) -> None:
    body = '{"note": "provider@home \N{EM DASH} Kuma"}'.encode()
    with socket.create_connection(("127.0.0.1", cp.http_port), 5) as sock:
        for byte in head(cp, "POST", INVITES, length=len(body)) + body:
            sock.sendall(bytes([byte]))
        assert sock.recv(65_536).startswith(b"HTTP/1.1 201 ")
    assert [row["note"] for row in cp.query("SELECT note FROM invites")] == [
        json.loads(body)["note"]
    ]


# Metrics, stopping --------------------------------------------------------------------------------


def read_metrics(cp: ControlPlane) -> dict[str, float]:
    """The samples of a scrape."""
    status, text = cp.call("GET", "/metrics", token="")
    assert status == 200
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_and_calls_are_counted(cp: ControlPlane) -> None:
    read_metrics(cp)
    before = read_metrics(cp)
    for _ in range(3):
        assert cp.call("GET", "/healthz")[0] == 200
    assert cp.call("GET", "/nowhere")[0] == 404
    exchange(cp, b"hello\r\n\r\n")
    with Client(cp) as client:
        check_refused("UNKNOWN_SESSION", client.heartbeat)
        client.register(cp.mint())
        client.heartbeat()
    after = read_metrics(cp)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    for name, count in {
        'openinfra_http_requests_total{status="200"}': 4,  # with the scrape before
        'openinfra_http_requests_total{status="201"}': 1,
        'openinfra_http_requests_total{status="400"}': 1,
        'openinfra_http_requests_total{status="404"}': 1,
        'openinfra_heartbeats_total{result="accepted"}': 1,
        'openinfra_heartbeats_total{result="unknown_session"}': 1,
        'openinfra_rpcs_total{method="Register",result="ok"}': 1,
        'openinfra_rpcs_total{method="Heartbeat",result="ok"}': 1,
        'openinfra_rpcs_total{method="Heartbeat",result="unknown_session"}': 1,
        'openinfra_hosts{status="online"}': 1,
        'openinfra_hosts{status="pending"}': 0,
    }.items():
        assert grown[name] == count, name
    assert 1e7 < after["openinfra_resident_memory_bytes"] < 1e9
    assert abs(after["openinfra_start_time_seconds"] - time.time()) < 60


def test_signing_keys_that_cannot_be_read_are_named_in_the_log(cp: ControlPlane) -> None:
    """Nobody gets in meanwhile; who holds a good token is not told that it is none."""
    good = cp.keys_file.read_bytes()
    for spoil in (
        lambda: cp.keys_file.write_bytes(b"{"),
        lambda: cp.keys_file.chmod(0o644),
        cp.keys_file.unlink,
    ):
        spoil()
        written = len(cp.log)
        for _ in range(3):
            status, answer = cp.call("GET", HOSTS)
            assert (status, answer["error"]["code"]) == (503, "try_later"), answer
        assert cp.log[written:].count("ERROR signing keys cannot be read") == 1
        cp_server.write_file(cp.keys_file, good, 0o600)
        assert cp.call("GET", HOSTS)[0] == 200


def test_it_listens_on_an_ipv6_address(make_cp: Callable[..., ControlPlane]) -> None:
    cp = make_cp(start=False)
    cp.start(f"--http-listen=[::1]:{cp.http_port}", f"--grpc-listen=[::1]:{cp.grpc_port}")
    with socket.create_connection(("::1", cp.http_port), 5) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    socket.create_connection(("::1", cp.grpc_port), 5).close()
    taken = cp.command(
        "serve",
        f"--http-listen=[::1]:{cp.http_port}",
        "--grpc-listen=127.0.0.1:1",
        "--peer-check=off",
    )
    assert (taken.returncode, "cannot listen on [::1]" in taken.stderr) == (1, True), taken.stderr


def test_a_body_without_a_token_is_not_waited_for(api: ControlPlane) -> None:
    """The answer comes before the body was sent."""
    began = time.monotonic()
    request = f"POST {INVITES} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
    assert exchange(api, request.encode())[0] == 401
    assert time.monotonic() - began < 3


def test_bodies_after_the_answer_hold_no_worker(cp: ControlPlane) -> None:
    """Refused for want of a token, each goes on to send its body, byte by byte."""
    head = f"POST {HOSTS}/x/revoke HTTP/1.1\r\nContent-Length: 60000\r\n\r\n".encode()
    stop, polls = threading.Event(), []

    def drip() -> None:
        while not stop.is_set():
            with socket.create_connection(("127.0.0.1", cp.http_port), 10) as sock:
                sock.sendall(head)
                try:
                    while not stop.wait(0.15):
                        sock.sendall(b"x")
                except OSError:
                    pass  # closed: the next one

    dripping = [threading.Thread(target=drip) for _ in range(2 * cp_server.HTTP_WORKERS)]
    for thread in dripping:
        thread.start()
    try:
        for _ in range(10):
            began = time.monotonic()
            assert cp.call("GET", "/healthz")[0] == 200
            polls.append(time.monotonic() - began)
    finally:
        stop.set()
        for thread in dripping:
            thread.join()
    assert max(polls) < 4 * cp_server.HTTP_LINGER_S + 0.5, polls


def test_connections_that_say_nothing_do_not_delay_the_end(cp: ControlPlane) -> None:
    silent = [socket.create_connection(("127.0.0.1", cp.http_port), 5) for _ in range(40)]
    time.sleep(0.3)
    began = time.monotonic()
    assert cp.stop() == 0
    for sock in silent:
        sock.close()
    assert time.monotonic() - began < 5  # nothing was asked: there is nothing to wait for


# The database itself: what the control plane's own role cannot do ---------------------------------

REWRITES: dict[type[psycopg.Error], dict[str, str]] = {
    errors.CheckViolation: {
        "an invite of 73 hours": """INSERT INTO invites (invite_id, secret_sha256, note, wg_ip_held,
          approve_first_wallet, created_by, expires_at) VALUES ('aaaaaaaaaaaaaaaa', sha256('x'), '',
          false, false, 'x', now() + interval '73 h')""",
        "revoked without its time": "UPDATE hosts SET status = 'revoked' WHERE host_no = 1",
        "a wallet of another namespace": """UPDATE hosts SET payout_pubkey = namespace
          WHERE host_no = 1""",
        "a status that is none": "UPDATE hosts SET status = 'happy' WHERE host_no = 1",
        "an invite for the hub's address": """INSERT INTO invites (invite_id, secret_sha256, note,
          wg_ip, wg_ip_held, approve_first_wallet, created_by, expires_at) VALUES
          ('aaaaaaaaaaaaaaaa', sha256('x'), '', '10.77.0.1', true, false, 'x', now() + interval
          '1 h')""",
        "a host at the hub's address": "UPDATE hosts SET wg_ip = '10.77.0.1' WHERE host_no = 1",
        "an interval of zero": "UPDATE liveness SET interval_ms = 0",
    },
    errors.IntegrityConstraintViolation: {
        "a used invite revoked": "UPDATE invites SET revoked_at = now() WHERE note = 'host 0'",
        "a revoked invite used": """UPDATE invites SET consumed_at = now(), host_id =
          (SELECT host_id FROM hosts LIMIT 1) WHERE note = 'taken back'""",
        "a revoked invite opened": "UPDATE invites SET revoked_at = NULL WHERE note = 'taken back'",
        "a session revived": "UPDATE sessions SET ended_at = NULL WHERE ended_at IS NOT NULL",
        "an invite moved to another host": """UPDATE invites SET host_id =
          (SELECT host_id FROM hosts WHERE host_no = 2) WHERE note = 'host 0'""",
        "a used invite opened": """UPDATE invites SET host_id = NULL, consumed_at = NULL
          WHERE note = 'host 0'""",
        "a revoked host back": """UPDATE hosts SET status = 'online', revoked_at = NULL
          WHERE status = 'revoked'""",
        "a revoked host's key": "UPDATE hosts SET wg_pubkey = NULL WHERE status = 'revoked'",
    },
    errors.ForeignKeyViolation: {
        "a host without its invite": """UPDATE hosts SET invite_id = 'aaaaaaaaaaaaaaaa'
          WHERE host_no = 1""",
        "an invite used by nobody": """UPDATE invites SET consumed_at = now(),
          host_id = '00000000-0000-4000-8000-000000000000' WHERE note = 'waiting'""",
    },
    errors.UniqueViolation: {
        "two live sessions": """INSERT INTO sessions (session_sha256, host_no, opened_by)
          SELECT sha256('x'), host_no, 'resume' FROM sessions WHERE ended_at IS NULL LIMIT 1""",
        "two hosts by one invite": """UPDATE hosts SET invite_id =
          (SELECT invite_id FROM hosts WHERE host_no = 2) WHERE host_no = 1""",
    },
    errors.InsufficientPrivilege: {
        "a longer invite": "UPDATE invites SET expires_at = expires_at + interval '1 s'",
        "an invite's times moved": """UPDATE invites SET created_at = created_at + interval '1 h',
          expires_at = expires_at + interval '1 h' WHERE note = 'waiting'""",
        "an invite with another secret": "UPDATE invites SET secret_sha256 = sha256('x')",
        "an invite's address moved": "UPDATE invites SET wg_ip = '10.77.0.9'",
        "an audit line of another time": """INSERT INTO audit_log (actor, action, subject, detail,
          at) VALUES ('a', 'b', 'c', '{}', now() - interval '1 year')""",
        "a session of another time": "UPDATE sessions SET started_at = now()",
        "a host of another id": "UPDATE hosts SET host_id = gen_random_uuid()",
        "an older host": "UPDATE hosts SET created_at = '2020-01-01'",
        "the audit log changed": "UPDATE audit_log SET actor = 'x'",
        "the audit log emptied": "TRUNCATE audit_log",
        "a trigger off": "ALTER TABLE audit_log DISABLE TRIGGER ALL",
        "all triggers off": "SET session_replication_role = replica",
        "a table made": "CREATE TABLE public.x (y int)",
        "a migration noted": """INSERT INTO schema_migrations (number, name, sha256)
          VALUES (9, 'x', 'x')""",
        "two rows of state": "INSERT INTO cp_state DEFAULT VALUES",
        "audit_log deleted": "DELETE FROM audit_log",
        "cp_state deleted": "DELETE FROM cp_state",
        "hosts deleted": "DELETE FROM hosts",
        "invites deleted": "DELETE FROM invites",
        "liveness deleted": "DELETE FROM liveness",
        "namespaces deleted": "DELETE FROM namespaces",
        "schema_migrations deleted": "DELETE FROM schema_migrations",
        "sessions deleted": "DELETE FROM sessions",
    },
}


@pytest.mark.parametrize(
    ("kind", "sql"),
    [
        *(
            pytest.param(kind, sql, id=name)
            for kind, table in REWRITES.items()
            for name, sql in table.items()
        ),
    ],
)
def test_the_role_cannot_rewrite_the_past(
    api: ControlPlane, kind: type[psycopg.Error], sql: str
) -> None:
    both = f"{sql}; SET CONSTRAINTS ALL IMMEDIATE"
    with unchanged(api), psycopg.connect(api.postgres.dsn(api.database, "openinfra")) as connection:
        try:
            with pytest.raises(kind) as error:
                connection.execute(both.encode())
            assert error.type is kind
        finally:
            connection.rollback()
