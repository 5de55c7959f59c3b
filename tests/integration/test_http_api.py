"""The operator's HTTP API: every route, and every way in which a request can be wrong."""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cp_server
from tests.harness import OTHER_WALLET, WALLET, Client, ControlPlane, Postgres, facts, wait_for

INVITES, HOSTS = "/api/v1/admin/host-invites", "/api/v1/admin/hosts"
COUNTS = """SELECT (SELECT count(*) FROM invites) AS invites, (SELECT count(*) FROM hosts) AS hosts,
  (SELECT count(*) FROM namespaces) AS namespaces, (SELECT count(*) FROM audit_log) AS audits"""


def check_shape(name: str, value: dict[str, Any]) -> None:
    """Fails unless an answer has exactly the fields that the OpenAPI document promises."""
    fields = cp_server.SCHEMAS[name]
    assert list(value) == list(fields), name
    for key, kind in fields.items():
        if value[key] is None:
            assert kind.endswith("?"), f"{name}.{key}"
        elif kind.startswith("["):
            for one in value[key]:
                check_shape(kind[1:-1], one)


def test_invites_from_mint_to_revocation(cp: ControlPlane) -> None:
    order = {"payout_pubkey": WALLET, "wg_ip": "10.77.0.9", "note": "ünï 👩‍🚀 — ok"}
    status, made = cp.call("POST", INVITES, order)
    assert status == 201
    check_shape("NewInvite", made)
    assert made["note"] == order["note"]
    assert made["state"] == "open"
    clash = cp.call("POST", INVITES, {"wg_ip": "10.77.0.9"})
    assert (clash[0], clash[1]["error"]["field"]) == (409, "wg_ip")
    _, listed = cp.call("GET", INVITES)
    check_shape("Invites", listed)
    assert made["token"] not in json.dumps(listed) + cp.log
    path = f"{INVITES}/{made['id']}"
    for _ in range(2):
        status, gone = cp.call("DELETE", path)
        assert (status, gone["state"]) == (200, "revoked")
    assert cp.call("POST", INVITES, {"wg_ip": "10.77.0.9"})[0] == 201
    actions = cp.query("SELECT actor, action FROM audit_log WHERE subject = %s", made["id"])
    assert [row["action"] for row in actions] == ["invite.mint", "invite.revoke"]
    assert all(re.fullmatch("jwt:tester:[a-z2-7]{16}", row["actor"]) for row in actions)
    assert cp.call("DELETE", f"{INVITES}/aaaaaaaaaaaaaaaa")[0] == 404


def test_hosts_namespaces_and_the_audit_log(cp: ControlPlane) -> None:
    with Client(cp) as client:
        token = cp.mint(payout_pubkey=WALLET)
        host_id = client.register(token, payout_pubkey=OTHER_WALLET).host_id
        client.heartbeat()
    used = cp.call("DELETE", f"{INVITES}/{token.split('_')[1]}")
    assert used[0] == 409
    status, host = cp.call("GET", f"{HOSTS}/{host_id}")
    assert status == 200
    check_shape("Host", host)
    status, spaces = cp.call("GET", "/api/v1/admin/namespaces")
    check_shape("Namespaces", spaces)
    assert [row["approved_at"] is None for row in spaces["namespaces"]] == [False, True]
    path = f"/api/v1/admin/namespaces/solana:{OTHER_WALLET}/approve"
    for _ in range(2):
        status, space = cp.call("POST", path)
        assert (status, space["hosts"]) == (200, 1)
        check_shape("Namespace", space)
    assert cp.call("POST", f"/api/v1/admin/namespaces/solana:{WALLET[:-1]}1/approve")[0] == 404
    assert cp.call("POST", f"{HOSTS}/{host_id}/release")[0] == 409
    for _ in range(2):
        status, host = cp.call("POST", f"{HOSTS}/{host_id}/revoke")
        assert (status, host["status"]) == (200, "revoked")
    status, log = cp.call("GET", f"/api/v1/admin/audit-log?subject={host_id}")
    check_shape("AuditLog", log)
    assert [row["action"] for row in log["entries"]] == ["host.revoke", "host.register"]
    assert cp.call("GET", f"{HOSTS}/00000000-0000-4000-8000-000000000000")[0] == 404
    assert cp.call("POST", f"{HOSTS}/00000000-0000-4000-8000-000000000000/revoke")[0] == 404
    cp.check_invariants()


def test_lists_are_paged_and_filtered(cp: ControlPlane) -> None:
    made = []
    with Client(cp) as client:
        for number in range(7):
            client.host_secret = secrets.token_bytes(32)
            client.session = secrets.token_bytes(32)
            reply = client.register(cp.mint(), facts=facts(hostname=f"n{number % 2}"))
            made.append(reply.host_id)
            client.seq = 0
            if number < 3:
                client.heartbeat()
    seen: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        _, answer = cp.call("GET", f"{HOSTS}?limit=3&cursor={cursor}")
        seen += [host["host_id"] for host in answer["hosts"]]
        cursor = answer["next_cursor"]
    assert seen == made
    for query, count in (
        ("status=online", 3),
        ("status=pending", 4),
        ("hostname=n1", 3),
        (f"namespace=solana:{WALLET}", 7),
        ("hostname=n1&status=online", 1),
        ("hostname=nobody", 0),
    ):
        assert len(cp.call("GET", f"{HOSTS}?{query}")[1]["hosts"]) == count, query
    ids: list[str] = []
    cursor = 0
    while cursor is not None:
        _, answer = cp.call("GET", f"{INVITES}?limit=2&cursor={cursor}&state=used")
        ids += [invite["id"] for invite in answer["invites"]]
        cursor = answer["next_cursor"]
    assert len(set(ids)) == len(ids) == 7


BAD_BODIES = {
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "empty": b"",
    "twice": b'{"note": "a", "note": "b"}',
    "NaN": b'{"ttl_hours": NaN}',
    "deep": b'{"note": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "digits": b'{"ttl_hours": ' + b"9" * 20_000 + b"}",
    "no UTF-8": b'{"note": "\xff"}',
    "surrogate": b'{"note": "\\ud800"}',
    "surrogate key": b'{"\\ud800": 1}',
    "NUL": b'{"note": "a\\u0000b"}',
    "newline": b'{"note": "a\\nb"}',
    "bidi": b'{"note": "a\\u202eb"}',
    "unknown": b'{"ttl": 1}',
    "bool": b'{"ttl_hours": true}',
    "float": b'{"ttl_hours": 1.5}',
    "null": b'{"ttl_hours": null}',
    "text": b'{"ttl_hours": "24"}',
    "zero": b'{"ttl_hours": 0}',
    "too long": b'{"ttl_hours": 73}',
    "long note": b'{"note": "' + b"x" * 501 + b'"}',
    "wallet": b'{"payout_pubkey": "0OIl"}',
    "zero wallet": b'{"payout_pubkey": "11111111111111111111111111111111"}',
    "address": b'{"wg_ip": "10.78.0.2"}',
    "hub": b'{"wg_ip": "10.77.0.1"}',
    "key": b'{"wg_pubkey": "abc"}',
}


def test_bad_bodies_change_nothing(cp: ControlPlane) -> None:
    before = cp.query(COUNTS)
    for name, raw in BAD_BODIES.items():
        status, answer = cp.call("POST", INVITES, raw=raw)
        assert status == 400, f"{name}: {status} {answer}"
        check_shape("Error", answer)
        assert "; " in answer["error"]["message"], name
    assert cp.call("POST", INVITES, raw=b" " * 65_537)[0] == 413
    status, _ = cp.call("POST", INVITES, raw=b"{}", headers={"Content-Type": "text/plain"})
    assert status == 415
    assert cp.query(COUNTS) == before


def test_bad_paths_and_queries(cp: ControlPlane) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "//[", 404),
        ("GET", "/api/v1/admin/hostsX", 404),
        ("GET", f"{HOSTS}/", 404),
        ("GET", f"{HOSTS}/not-a-uuid", 400),
        ("GET", f"{HOSTS}/%00", 400),
        ("DELETE", f"{INVITES}/%00", 400),
        ("DELETE", f"{INVITES}/a%2Fb", 404),
        ("POST", "/api/v1/admin/namespaces/%ff%00/approve", 400),
        ("GET", f"{HOSTS}?limit=0", 400),
        ("GET", f"{HOSTS}?limit=1001", 400),
        ("GET", f"{HOSTS}?limit=ten", 400),
        ("GET", f"{HOSTS}?limit=1&limit=2", 400),
        ("GET", f"{HOSTS}?cursor=-1", 400),
        ("GET", f"{HOSTS}?cursor={'9' * 40}", 400),
        ("GET", f"{HOSTS}?status=happy", 400),
        ("GET", f"{HOSTS}?colour=red", 400),
        ("GET", f"{HOSTS}?hostname=%00", 400),
        ("GET", f"{HOSTS}?{'&'.join(f'a{n}=1' for n in range(30))}", 400),
        ("PUT", INVITES, 405),
        ("HEAD", HOSTS, 405),
        ("POST", "/healthz", 405),
    ):
        got, answer = cp.call(method, path)
        assert got == status, f"{method} {path}: {got} {answer}"


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


def test_tokens_that_are_no_good(cp: ControlPlane) -> None:
    now = int(time.time())
    good: dict[str, object] = {"iss": "openinfra-cp", "aud": "openinfra-admin-api"}
    good |= {"sub": "t", "jti": "j", "scope": "admin", "iat": now, "exp": now + 600}
    assert cp.call("GET", HOSTS, token=cp_server.render_jwt(cp.key, good))[0] == 200
    other = cp_server.JwtKey(cp.key.kid, "HS256", bytes(32))
    stranger = cp_server.JwtKey("stranger", "HS256", cp.key.secret)
    bad = [
        "",
        "x",
        "a.b.c",
        cp_server.render_jwt(other, good),
        cp_server.render_jwt(stranger, good),
        f"{encode({'alg': 'none', 'kid': cp.key.kid, 'typ': 'JWT'})}.{encode(good)}.",
        encode("[" * 2900) + "." + encode(good) + ".x",
        *(
            cp_server.render_jwt(cp.key, {**good, **change})
            for change in (
                {"aud": "another"},
                {"iss": "another"},
                {"exp": now - 1},
                {"exp": now + 13 * 3600},
                {"iat": now + 600, "exp": now + 900},
                {"exp": True},
                {"sub": None},
                {"scope": ["admin"]},
            )
        ),
    ]
    for token in bad:
        status, answer = cp.call("GET", HOSTS, token=token)
        assert status == 401, token
        assert token not in json.dumps(answer) or not token
    reader = cp_server.mint_jwt(cp.key, "reader", "read", 600)
    assert cp.call("GET", HOSTS, token=reader)[0] == 200
    assert cp.call("POST", INVITES, {}, token=reader)[0] == 403
    nobody = cp_server.mint_jwt(cp.key, "nobody", "", 600)
    assert cp.call("GET", HOSTS, token=nobody)[0] == 403
    headers = {"Authorization": f"bearer {cp.token}"}
    assert cp.call("GET", HOSTS, headers=headers)[0] == 200


def send(cp: ControlPlane, raw: bytes, timeout_s: float = 15) -> bytes:
    """Send bytes as they are; gives back the answer to its end."""
    with socket.create_connection(("127.0.0.1", cp.http_port), timeout_s) as sock:
        sock.sendall(raw)
        answer = b""
        while part := sock.recv(65_536):
            answer += part
    return answer


def test_requests_that_are_no_http(cp: ControlPlane) -> None:
    head = f"POST {INVITES} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {cp.token}\r\n"
    kind = "Content-Type: application/json\r\n"
    before = cp.query(COUNTS)
    for text, status in (
        ("hello\r\n\r\n", 400),
        ("GET / HTTP/9.9\r\n\r\n", 505),
        ("GET /" + "a" * 70_000 + " HTTP/1.1\r\n\r\n", 414),
        ("GET / HTTP/1.1\r\n" + "a: b\r\n" * 200 + "\r\n", 431),
        ("GET / HTTP/1.1\r\na: " + "b" * 70_000 + "\r\n\r\n", 431),
        ("FROB / HTTP/1.1\r\n\r\n", 501),
        (head + kind + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (head + kind + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (head + kind + "Content-Length: -1\r\n\r\n{}", 400),
        (head + kind + "Content-Length: 999999999\r\n\r\n{}", 413),
    ):
        answer = send(cp, text.encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (text[:60], answer[:200])
    with socket.create_connection(("127.0.0.1", cp.http_port), 15) as sock:
        sock.sendall((head + kind + "Content-Length: 9\r\n\r\n{}").encode())
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert send(cp, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert cp.query(COUNTS) == before


def test_a_request_that_drips_ends_at_its_deadline_and_others_go_on(cp: ControlPlane) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", cp.http_port), 15) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\n")
        try:
            while time.monotonic() - began < 14:
                sock.sendall(b"a: b\r\n")
                assert cp.call("GET", "/healthz")[0] == 200
                time.sleep(0.5)
        except OSError:
            pass
    assert 9 < time.monotonic() - began < 12


def test_a_crowd_is_answered_and_a_larger_one_sent_away(cp: ControlPlane) -> None:
    """Up to its room everybody is answered; beyond it each is answered or told so at once."""
    room = cp_server.HTTP_WORKERS + cp_server.HTTP_QUEUE
    with ThreadPoolExecutor(room - 8) as crowd:
        answers = list(crowd.map(lambda _: cp.call("GET", HOSTS)[0], range(300)))
    assert answers == [200] * 300
    with ThreadPoolExecutor(3 * room) as crowd:
        answers = list(crowd.map(lambda _: cp.call("GET", HOSTS)[0], range(600)))
    assert set(answers) == {200, 503}
    assert cp.call("GET", HOSTS)[0] == 200


def test_health_metrics_and_the_document(cp: ControlPlane) -> None:
    status, document = cp.call("GET", "/api/v1/openapi.json", token="")
    assert status == 200
    assert document["openapi"] == "3.1.0"
    assert cp.call("GET", "/healthz", token="")[0] == 200
    with Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
    status, text = cp.call("GET", "/metrics", token="")
    assert status == 200
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{.*\})? [0-9.e+-]+", line), line
    assert 'openinfra_hosts{status="online"} 1' in text
    assert 'openinfra_heartbeats_total{result="accepted"} 1' in text


def test_readiness_follows_the_database(tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="oi-pg-", dir="/tmp"))
    root.chmod(0o711)
    postgres = Postgres(root / "cluster")
    cp = ControlPlane(postgres, tmp_path / "cp")
    try:
        cp.start()
        assert cp.call("GET", "/readyz")[0] == 200
        postgres.stop(signal.SIGQUIT)
        assert cp.call("GET", "/readyz")[0] == 503
        assert cp.call("GET", HOSTS)[0] == 503
        assert cp.call("GET", "/healthz")[0] == 200
        postgres.start()
        wait_for("ready again", lambda: cp.call("GET", "/readyz")[0] == 200, 15)
        assert cp.call("GET", HOSTS)[0] == 200
        assert "Traceback" not in cp.log
    finally:
        cp.stop(signal.SIGKILL)
        postgres.stop(signal.SIGQUIT)
        shutil.rmtree(root)


FORBIDDEN = (
    "UPDATE audit_log SET actor = 'x'",
    "DELETE FROM audit_log",
    "TRUNCATE audit_log",
    "DELETE FROM hosts",
    "DELETE FROM invites",
    "UPDATE hosts SET status = 'online' WHERE status = 'revoked'",
    "UPDATE invites SET host_id = NULL, consumed_at = NULL",
    "UPDATE invites SET expires_at = created_at + interval '73 hours'",
    "UPDATE hosts SET namespace = NULL",
    "UPDATE hosts SET status = 'happy'",
    """INSERT INTO sessions (session_sha256, host_no, opened_by)
       SELECT sha256('a'), host_no, 'resume' FROM sessions WHERE ended_at IS NULL""",
    "INSERT INTO schema_migrations (number, name, sha256) VALUES (9, 'x', '')",
    "CREATE TABLE x (y int)",
)


def test_the_database_refuses_what_must_never_be(cp: ControlPlane) -> None:
    with Client(cp) as client, Client(cp) as second:
        gone = client.register(cp.mint()).host_id
        second.register(cp.mint())
    assert cp.call("POST", f"{HOSTS}/{gone}/revoke")[0] == 200
    dsn = cp.postgres.dsn(cp.database, "openinfra")
    for sql in FORBIDDEN:
        with psycopg.connect(dsn, autocommit=True) as connection, pytest.raises(psycopg.Error):
            connection.execute(sql.encode())
    cp.check_invariants()


def test_every_table_and_column_has_a_comment(cp: ControlPlane) -> None:
    rows = cp.query(
        "SELECT c.relname, a.attname FROM pg_class c LEFT JOIN pg_attribute a"
        " ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace"
        " AND (obj_description(c.oid) IS NULL OR col_description(c.oid, a.attnum) IS NULL)"
    )
    assert rows == []


Make = Callable[..., ControlPlane]


def test_a_new_signing_key_works_without_a_restart(make_cp: Make) -> None:
    cp = make_cp()
    done = cp.command("token", "--new-key", "--scope=read", "--sub=rotated")
    assert done.returncode == 0, done.stderr
    fresh = done.stdout.strip()
    assert cp.call("GET", HOSTS, token=fresh)[0] == 200
    assert cp.call("GET", HOSTS)[0] == 200  # the old one still
    assert cp.keys_file.stat().st_mode & 0o777 == 0o600
