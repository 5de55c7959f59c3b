"""The control plane as its operator meets it: commands, exit codes, files, start, stop, outages."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

import agent
import cp_server
from tests.harness import (
    ROOT,
    WALLET,
    Client,
    ControlPlane,
    Postgres,
    Refused,
    check_refused,
    facts,
    serving,
    wait_for,
)
from tests.integration import test_ledger

NEWEST = cp_server.SCHEMA_VERSION
MakeCp = Callable[..., ControlPlane]
Done = subprocess.CompletedProcess[str]
EXIT_ERROR, EXIT_USAGE, EXIT_PROTECT, EXIT_LATER = 1, 2, 3, 75


@pytest.fixture(scope="module")
def idle(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> ControlPlane:
    """A control plane that is not started; its tests leave its files and database as they were."""
    return ControlPlane(postgres, tmp_path_factory.mktemp("idle"))


@pytest.fixture(scope="module")
def running(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that runs and that no test stops."""
    with serving(postgres, tmp_path_factory.mktemp("running")) as made:
        yield made


def serve_flags(cp: ControlPlane) -> tuple[str, ...]:
    """The flags of `serve` with its ports."""
    grpc, http = f"127.0.0.1:{cp.grpc_port}", f"127.0.0.1:{cp.http_port}"
    return ("serve", f"--grpc-listen={grpc}", f"--http-listen={http}", "--peer-check=off")


def check_failed(done: Done, code: int, *words: str) -> str:
    """The one line that a command says which ends with this code and does nothing else."""
    assert (done.returncode, done.stdout) == (code, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ERROR ")
    assert " ; " in lines[0]  # what is wrong, and what to do
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


# Files and settings


@pytest.mark.parametrize(("what", "mode"), [("dsn_file", 0o644), ("keys_file", 0o640)])
def test_a_secret_file_that_others_can_read(idle: ControlPlane, what: str, mode: int) -> None:
    path: Path = getattr(idle, what)
    path.chmod(mode)
    try:
        check_failed(idle.command(*serve_flags(idle)), EXIT_PROTECT, str(path), "chmod 600")
    finally:
        path.chmod(0o600)


@pytest.mark.parametrize("what", ["dsn_file", "keys_file"])
def test_a_secret_file_that_is_missing_or_no_file(
    idle: ControlPlane, tmp_path: Path, what: str
) -> None:
    flag = {"dsn_file": "--dsn-file", "keys_file": "--jwt-keys-file"}[what]
    for path in (tmp_path / "none", tmp_path, idle.dsn_file / "below-a-file"):
        done = idle.command(*serve_flags(idle), f"{flag}={path}")
        check_failed(done, EXIT_ERROR, str(path))


GARBAGE = (b"\n", b"a\nb\n", bytes(range(256)))


def test_a_dsn_file_that_holds_garbage(idle: ControlPlane, tmp_path: Path) -> None:
    for content in (*GARBAGE, b"password=hunter2 nonsense=1"):
        path = tmp_path / "dsn"
        cp_server.write_file(path, content, 0o600)
        done = idle.command("hosts", f"--dsn-file={path}")
        check_failed(done, EXIT_ERROR, str(path))
        assert "hunter2" not in done.stderr


def test_a_key_file_that_holds_garbage(idle: ControlPlane, tmp_path: Path) -> None:
    short = b'{"keys": [{"kid": "a", "alg": "HS256", "secret": "c2hvcnQ"}]}'
    other = short.replace(b"HS256", b"none")
    for content in (GARBAGE[-1], b'{"keys": [1]}', short, other):
        path = tmp_path / "keys"
        cp_server.write_file(path, content, 0o600)
        done = idle.command("token", f"--jwt-keys-file={path}")
        check_failed(done, EXIT_ERROR, str(path), "token --new-key")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("DSN_FIEL=/x\n", "unknown key 'DSN_FIEL'"),
        ("DSN_FILE\n", "KEY=value"),
        ("ROLE=a\n# fine\n\nROLE=b\n", ":4: ROLE stands there twice"),
        ("PEER_CHECK=maybe\n", "peer-check"),
        ("HEARTBEAT_S=nan\n", "heartbeat-s"),
        ("GRPC_LISTEN=9092\n", "grpc-listen"),
        ("HTTP_LISTEN=127.0.0.1:65536\n", "http-listen"),
    ],
)
def test_settings_that_make_no_sense(
    idle: ControlPlane, tmp_path: Path, text: str, word: str
) -> None:
    path = tmp_path / "cp.env"
    path.write_text(text)
    line = check_failed(idle.command("serve", f"--env-file={path}"), EXIT_USAGE, word)
    assert "hunter2" not in line


def test_an_env_file_that_is_missing_or_no_text(idle: ControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "cp.env"
    check_failed(idle.command("serve", f"--env-file={path}"), EXIT_USAGE, str(path))
    path.write_bytes(b"\xff\xfe")
    check_failed(idle.command("serve", f"--env-file={path}"), EXIT_USAGE, str(path))
    check_failed(idle.command("serve", f"--env-file={tmp_path}"), EXIT_USAGE, str(tmp_path))


def test_the_env_file_is_used_and_a_flag_wins(idle: ControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "cp.env"
    path.write_text(f"DSN_FILE={idle.dsn_file}\nJWT_KEYS_FILE={tmp_path / 'none'}\n")
    argv = [argument for argument in idle.argv("hosts") if "file" not in argument]
    argv = [*argv[: argv.index("hosts") + 1], f"--env-file={path}"]
    assert subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0
    argv += [f"--dsn-file={tmp_path / 'other'}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    check_failed(done, EXIT_ERROR, str(tmp_path / "other"))


def test_credentials_of_systemd_are_found(idle: ControlPlane, tmp_path: Path) -> None:
    shutil.copy(idle.dsn_file, tmp_path / "dsn")
    argv = [*idle.argv("hosts")[:4], "hosts", f"--env-file={os.devnull}"]
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr


# PostgreSQL and the schema


def test_postgresql_is_not_there(idle: ControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "dsn"
    good = idle.dsn_file.read_text()
    wrong = {
        f"host={tmp_path} dbname=x user=x": str(tmp_path),
        "host=127.0.0.1 port=1 dbname=x user=x password=hunter2": "127.0.0.1",
        good.replace(idle.database, "nonesuch"): "nonesuch",
        good.replace("user=openinfra", "user=stranger"): "stranger",
    }
    for dsn, word in wrong.items():
        cp_server.write_file(path, dsn.encode(), 0o600)
        for command in (serve_flags(idle), ("hosts",), ("migrate", f"--owner-dsn-file={path}")):
            began = time.monotonic()
            done = idle.command(*command, f"--dsn-file={path}")
            check_failed(done, EXIT_LATER, "cannot reach PostgreSQL", word)
            assert "hunter2" not in done.stderr
            assert time.monotonic() - began < 8


@pytest.fixture
def bare(postgres: Postgres, tmp_path: Path) -> ControlPlane:
    """A control plane that is not started, on a database without a schema."""
    made = ControlPlane(postgres, tmp_path / "bare")
    postgres.execute("postgres", f"DROP DATABASE {made.database}")
    postgres.execute("postgres", f"CREATE DATABASE {made.database}")
    return made


# A redeemed invite, its host online with two sessions, and a revoked invite.
FLEET = """
INSERT INTO invites (invite_id, secret_sha256, note, wg_ip_held, approve_first_wallet, created_by,
  expires_at, consumed_at, host_id, revoked_at) VALUES
  ('aaaaaaaaaaaaaaaa', sha256('a'), 'used', false, false, 'x', now() + interval '1 h', now(),
   '0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10', NULL),
  ('bbbbbbbbbbbbbbbb', sha256('b'), 'taken back', false, false, 'x', now() + interval '1 h', NULL,
   NULL, now());
INSERT INTO hosts (host_id, invite_id, host_secret_sha256, status, hostname, arch, kernel,
  agent_version, cpu_count, memory_bytes, disk_bytes, disk_encrypted) VALUES
  ('0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10', 'aaaaaaaaaaaaaaaa', sha256('c'), 'online', 'lab',
   'x86_64', '6.1', '0.1.0', 1, 1, 1, true);
INSERT INTO liveness (host_no, interval_ms, last_heartbeat_at) VALUES (1, 30000, now());
INSERT INTO sessions (session_sha256, host_no, opened_by, ended_at) VALUES
  (sha256('d'), 1, 'register', now()), (sha256('e'), 1, 'resume', NULL);
INSERT INTO audit_log (actor, action, subject, detail) VALUES
  ('x', 'invite.mint', 'aaaaaaaaaaaaaaaa', '{}'), ('x', 'invite.mint', 'bbbbbbbbbbbbbbbb', '{}'),
  ('x', 'invite.revoke', 'bbbbbbbbbbbbbbbb', '{}'),
  ('x', 'host.register', '0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10', '{}');
"""


BILLED = """
INSERT INTO customers (customer_id, name, created_by) VALUES (gen_random_uuid(), 'kuma', 'x');
INSERT INTO invoices (invoice_no, customer_no, month, currency, total_micros, issued_at,
  customer_name) SELECT 1, customer_no, '2026-03-01', 'CHF', 0, now(), 'kuma' FROM customers;
INSERT INTO audit_log (actor, action, subject, detail)
  SELECT 'x', 'customer.add', customer_id::text, '{}' FROM customers;
"""


def owner_flag(cp: ControlPlane, role: str = "postgres") -> str:
    """A flag that names the database as its owner connects to it."""
    path = cp.directory / "owner-dsn"
    cp_server.write_file(path, cp.postgres.dsn(cp.database, role).encode(), 0o600)
    return f"--owner-dsn-file={path}"


def test_the_schema_is_missing_made_and_there(bare: ControlPlane) -> None:
    for command in (serve_flags(bare), ("hosts",), ("invite",)):
        check_failed(bare.command(*command), EXIT_ERROR, "no OpenInfra schema", "migrate")
    done = bare.command("migrate", owner_flag(bare))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"schema is version {cp_server.SCHEMA_VERSION}"
    done = bare.command("migrate", owner_flag(bare))
    assert (done.returncode, done.stdout) == (0, "nothing to do\n")
    done = bare.command("doctor", "--invariants")
    assert (done.returncode, done.stdout) == (0, f"{len(cp_server.INVARIANTS)} invariants hold\n")


def test_a_database_of_each_earlier_version_is_upgraded(bare: ControlPlane) -> None:
    """With the rows of a fleet in it; the rights are then those of a new database."""
    rights = """SELECT table_name, column_name, privilege_type FROM
      information_schema.column_privileges WHERE grantee = 'openinfra' ORDER BY 1, 2, 3"""
    assert bare.command("migrate", owner_flag(bare)).returncode == 0
    newest = bare.query(rights)
    for version in range(1, NEWEST):
        old = ControlPlane(bare.postgres, bare.directory / f"from{version}")
        bare.postgres.execute("postgres", f"DROP DATABASE {old.database}")
        bare.postgres.execute("postgres", f"CREATE DATABASE {old.database} TEMPLATE template0")
        known = cp_server.MIGRATIONS[:version]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cp_server, "MIGRATIONS", known)
            asyncio.run(cp_server.migrate(old.postgres.dsn(old.database), "openinfra"))
        done = old.command("invite", "--note=of before")
        assert (done.returncode, f"needs {NEWEST}" in done.stderr) == (1, True), done.stderr
        old.postgres.execute(old.database, FLEET)
        if version == 11:  # it had a currency on each invoice
            old.postgres.execute(old.database, BILLED)
        done = old.command("migrate", owner_flag(old))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("applied") == NEWEST - version
        assert old.query(rights) == newest
        assert (
            old.query("SELECT 1 FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'O'") == []
        )
        if version < 8:  # a session goes on: its hash is hashed
            live = "SELECT 1 FROM sessions WHERE session_sha256 = sha256(sha256('e'))"
            assert len(old.query(f"{live} AND ended_at IS NULL")) == 1
        assert old.command("invite", "--note=of now").returncode == 0
        old.check_invariants()
        assert [host["hostname"] for host in old.hosts()] == ["lab"]
        currency = [{"currency": "CHF" if version == 11 else None}]
        assert old.query("SELECT currency FROM cp_state") == currency


def test_two_migrations_at_once(bare: ControlPlane) -> None:
    flag = owner_flag(bare)
    with ThreadPoolExecutor(3) as workers:
        done = list(workers.map(lambda _: bare.command("migrate", flag), range(3)))
    assert [each.returncode for each in done] == [0, 0, 0], done
    said = sorted(each.stdout.splitlines()[-1] for each in done)
    version = f"schema is version {cp_server.SCHEMA_VERSION}"
    assert said == ["nothing to do", "nothing to do", version]
    assert len(bare.query("SELECT 1 FROM schema_migrations")) == cp_server.SCHEMA_VERSION


def test_a_migration_needs_an_owner_and_no_more(bare: ControlPlane) -> None:
    bare.postgres.execute("postgres", "CREATE ROLE landlord LOGIN")
    flag = owner_flag(bare, "landlord")
    check_failed(bare.command("migrate", flag), EXIT_ERROR, "may not make the schema", "owner")
    assert bare.query("SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
    bare.postgres.execute("postgres", f"ALTER DATABASE {bare.database} OWNER TO landlord")
    assert bare.command("migrate", flag).returncode == 0
    bare.check_invariants()


def test_a_migration_of_a_role_without_a_name(bare: ControlPlane) -> None:
    for role in ("x; DROP TABLE hosts", "Öl", "a" * 64):
        done = bare.command("migrate", owner_flag(bare), f"--role={role}")
        check_failed(done, EXIT_ERROR, "no role name")


def test_a_database_that_is_somebody_elses(bare: ControlPlane) -> None:
    bare.postgres.execute(bare.database, "CREATE TABLE hosts (name text)")
    check_failed(bare.command("migrate", owner_flag(bare)), EXIT_ERROR, "hosts")
    assert len(bare.query("SELECT 1 FROM pg_tables WHERE schemaname = 'public'")) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("DELETE FROM schema_migrations", "no OpenInfra schema"),
        ("UPDATE schema_migrations SET number = number - 9", f"version {NEWEST - 9}"),
        ("UPDATE schema_migrations SET number = number + 97", f"version {NEWEST + 97}"),
    ],
)
def test_a_schema_of_another_version(make_cp: MakeCp, change: str, word: str) -> None:
    cp = make_cp(start=False)
    cp.postgres.execute(cp.database, change)
    check_failed(cp.command(*serve_flags(cp)), EXIT_ERROR, word)
    check_failed(cp.command("hosts"), EXIT_ERROR, word)
    done = cp.command("doctor")
    assert done.returncode == 1
    assert word in done.stdout


def test_a_migration_does_not_touch_a_newer_or_an_edited_schema(make_cp: MakeCp) -> None:
    cp = make_cp(start=False)
    sql = "INSERT INTO schema_migrations VALUES (99, 'later', '')"
    cp.postgres.execute(cp.database, sql)
    check_failed(cp.command("migrate", owner_flag(cp)), EXIT_ERROR, "99", "upgrade cp_server.py")
    cp.postgres.execute(cp.database, "DELETE FROM schema_migrations WHERE number = 99")
    cp.postgres.execute(cp.database, "UPDATE schema_migrations SET sha256 = 'x' WHERE number = 1")
    done = cp.command("migrate", owner_flag(cp))
    check_failed(done, EXIT_PROTECT, "migration 1", "not the one of this program")


# Start


def test_it_is_ready_within_three_seconds(make_cp: MakeCp) -> None:
    cp = make_cp(start=False)
    began = time.monotonic()
    cp.start()
    assert cp.call("GET", "/readyz") == (200, {"ok": True, "version": cp_server.VERSION})
    assert time.monotonic() - began <= 3
    with Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_port_that_is_taken(running: ControlPlane, idle: ControlPlane, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        done = idle.command(*serve_flags(idle), f"--{which}-listen=127.0.0.1:{port}")
        line = check_failed(done, EXIT_ERROR, f"127.0.0.1:{port}", "Address already in use")
        assert f"--{which}-listen" in line
    port = running.grpc_port if which == "grpc" else running.http_port
    done = idle.command(*serve_flags(idle), f"--{which}-listen=127.0.0.1:{port}")
    check_failed(done, EXIT_ERROR, f"127.0.0.1:{port}", "Address already in use")


def test_a_second_server_that_cannot_start_changes_nothing(
    running: ControlPlane,
) -> None:
    """Else one that is started again and again keeps silent hosts online for ever."""
    before = running.query("SELECT serving_since FROM cp_state")
    check_failed(running.command(*serve_flags(running)), EXIT_ERROR, "Address already in use")
    assert running.query("SELECT serving_since FROM cp_state") == before


def test_an_address_that_this_machine_does_not_have(idle: ControlPlane) -> None:
    """Such as 10.77.0.1 before wg0 is up."""
    for which in ("grpc", "http"):
        done = idle.command(*serve_flags(idle), f"--{which}-listen=192.0.2.1:9092")
        line = check_failed(done, EXIT_ERROR, "192.0.2.1:9092", "Cannot assign")
        assert "who has it" not in line  # nobody has it
    for listen, code in (("nonesuch.invalid:9092", EXIT_ERROR), ("[::1:9092", EXIT_USAGE)):
        check_failed(idle.command(*serve_flags(idle), f"--grpc-listen={listen}"), code)


# Rights taken away, a schema that changes under a running server


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (
            "UPDATE schema_migrations SET number = number + 99",
            "UPDATE schema_migrations SET number = number - 99",
        ),
        (
            "REVOKE SELECT ON schema_migrations FROM openinfra",
            "GRANT SELECT ON schema_migrations TO openinfra",
        ),
        ("ALTER TABLE schema_migrations RENAME TO x", "ALTER TABLE x RENAME TO schema_migrations"),
    ],
    ids=["newer", "no right", "gone"],
)
def test_not_ready_when_the_schema_is_not_good(make_cp: MakeCp, change: str, mend: str) -> None:
    cp = make_cp()
    cp.postgres.execute(cp.database, change)
    status, answer = cp.call("GET", "/readyz")
    assert status == 503, answer
    assert answer["error"]["code"] == "try_later"
    cp.postgres.execute(cp.database, mend)
    assert cp.call("GET", "/readyz")[0] == 200


def reconnect(cp: ControlPlane) -> None:
    """End the control plane's connections, so that the settings of its role count."""
    sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    sql += " WHERE datname = %s AND pid <> pg_backend_pid()"
    cp.postgres.execute(cp.database, sql, cp.database)


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ("REVOKE UPDATE ON cp_state FROM openinfra", "GRANT UPDATE ON cp_state TO openinfra"),
        (
            "ALTER ROLE openinfra IN DATABASE {} SET default_transaction_read_only = on",
            "ALTER ROLE openinfra IN DATABASE {} RESET default_transaction_read_only",
        ),
    ],
    ids=["no right", "read-only"],
)
def test_it_lives_through_a_fault_of_a_loop(make_cp: MakeCp, change: str, mend: str) -> None:
    cp = make_cp("--heartbeat-s=0.3")
    with Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
        cp.postgres.execute(cp.database, change.format(cp.database))
        reconnect(cp)
        time.sleep(1)
        assert cp.process
        assert cp.process.child.poll() is None, cp.log
        cp.postgres.execute(cp.database, mend.format(cp.database))
        reconnect(cp)
        wait_for("a heartbeat", lambda: try_heartbeat(client) == "")
        wait_for("offline", lambda: cp.query("SELECT 1 FROM hosts WHERE status = 'offline'"), 5)


def try_heartbeat(client: Client) -> str:
    """The reason why a heartbeat is refused (or its status, without a reason), or nothing."""
    try:
        client.heartbeat()
    except Refused as refused:
        return refused.reason or str(refused.status.name)
    return ""


def test_a_right_that_is_missing_is_no_bug(make_cp: MakeCp) -> None:
    cp = make_cp()
    with Client(cp) as client:
        client.register(cp.mint())
        for table in ("hosts", "liveness"):
            cp.postgres.execute(cp.database, f"REVOKE UPDATE ON {table} FROM openinfra")
            check_refused("TRY_LATER", client.heartbeat)
            cp.postgres.execute(cp.database, f"GRANT UPDATE ON {table} TO openinfra")
        cp.postgres.execute(cp.database, "REVOKE INSERT ON sessions FROM openinfra")
        check_refused("TRY_LATER", client.resume)
        cp.postgres.execute(cp.database, "GRANT INSERT ON sessions TO openinfra")
        cp.postgres.execute(cp.database, "REVOKE SELECT ON hosts FROM openinfra")
        assert cp.call("GET", "/api/v1/admin/hosts")[0] == 503
    assert "permission denied for table hosts" in cp.log
    assert "migrate" in cp.log


# Outages


def test_postgresql_restarts_while_it_serves(spare_postgres: Postgres, tmp_path: Path) -> None:
    """All that needs it says so, the rest goes on, and it heals by itself (immediate mode)."""
    with serving(spare_postgres, tmp_path / "cp") as cp, Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
        spare_postgres.stop(signal.SIGQUIT)
        with ThreadPoolExecutor(4) as workers:
            beat = workers.submit(try_heartbeat, client)
            paths = ("/readyz", "/api/v1/admin/hosts", "/metrics", "/healthz")
            got = list(workers.map(lambda path: cp.call("GET", path)[0], paths))
            assert got == [503, 503, 200, 200]
            assert "\nopeninfra_database_up 0\n" in cp.call("GET", "/metrics")[1]
            assert beat.result() == "TRY_LATER"
        spare_postgres.start()
        back = time.monotonic()
        wait_for("a heartbeat", lambda: try_heartbeat(client) == "", 5)
        wait_for("ready", lambda: cp.call("GET", "/readyz")[0] == 200, 2)  # its pool rests for 1 s
        assert time.monotonic() - back < 5
        assert cp.process
        assert cp.process.child.poll() is None


def test_health_is_told_while_the_database_is_away(
    spare_postgres: Postgres, tmp_path: Path
) -> None:
    with serving(spare_postgres, tmp_path / "cp") as cp:
        spare_postgres.stop()
        with ThreadPoolExecutor(60) as workers:
            calls = [workers.submit(cp.call, "GET", "/api/v1/admin/hosts") for _ in range(60)]
            time.sleep(0.3)
            began = time.monotonic()
            status, _ = cp.call("GET", "/healthz")
            took_s = time.monotonic() - began
            got = {call.result()[0] for call in calls}
        spare_postgres.start()
    assert (status, got) == (200, {503})
    assert took_s < 3


def test_a_database_that_hangs_is_outlived(spare_postgres: Postgres, tmp_path: Path) -> None:
    """PostgreSQL stands still with its connections open; then it goes on, and nothing was lost."""
    with serving(spare_postgres, tmp_path / "cp", "--heartbeat-s=1") as cp, Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
        stopped = stop_still(spare_postgres, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(20) as workers:
                calls = [workers.submit(cp.call, "GET", "/api/v1/admin/hosts") for _ in range(16)]
                beat = workers.submit(try_heartbeat, client)
                assert {call.result()[0] for call in calls} == {503}
                assert beat.result() in ("DEADLINE_EXCEEDED", "TRY_LATER")
                assert cp.call("GET", "/healthz")[0] == 200
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        wait_for("a heartbeat", lambda: try_heartbeat(client) == "", 30)
        wait_for("the API", lambda: cp.call("GET", "/api/v1/admin/hosts")[0] == 200, 30)


def test_connections_that_hang_are_given_up(make_cp: MakeCp) -> None:
    """The server lives, but those who serve this control plane stand still, as on a dead link."""
    cp = make_cp("--heartbeat-s=1")
    with Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'openinfra-cp'"
        sql += " AND datname = current_database()"
        stopped = [int(row["pid"]) for row in cp.query(sql)]
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            assert try_heartbeat(client) != ""
            wait_for("a heartbeat", lambda: try_heartbeat(client) == "", 30)
            wait_for("the API", lambda: cp.call("GET", "/api/v1/admin/hosts")[0] == 200, 30)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


def test_sigterm_while_the_server_stands_still(spare_postgres: Postgres, tmp_path: Path) -> None:
    """With calls of both kinds under way: the end comes within 10 s all the same."""
    cp = ControlPlane(spare_postgres, tmp_path / "cp")
    cp.start()
    with Client(cp) as client:
        client.register(cp.mint())
        stopped = stop_still(spare_postgres, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(9) as workers:
                workers.submit(try_heartbeat, client)
                for _ in range(8):
                    workers.submit(try_get, cp)
                time.sleep(0.5)
                began = time.monotonic()
                assert cp.stop() == 0
                assert time.monotonic() - began < 10
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    assert "Traceback" not in cp.log, cp.log


def try_get(cp: ControlPlane) -> None:
    """A list of hosts, whatever comes of it."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        cp.call("GET", "/api/v1/admin/hosts")


def stop_still(postgres: Postgres, how: signal.Signals) -> list[int]:
    """Send a signal to the server and all its children; give back their process ids."""
    assert postgres.child
    main = postgres.child.pid
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    pids = [main, *map(int, children)]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
    return pids


def test_a_server_that_is_too_old(idle: ControlPlane) -> None:
    """Debian has none: to this copy of the script the newest one is too old."""
    code = "import sys, cp_server; cp_server.POSTGRES_MIN = 99; sys.exit(cp_server.main())"
    for command in (serve_flags(idle), ("hosts",), ("migrate", owner_flag(idle))):
        argv = [idle.python, "-c", code, *idle.argv(command[0], *command[1:])[4:]]
        done = subprocess.run(
            argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        check_failed(done, EXIT_ERROR, "is too old", "upgrade it to 99 or newer")


# Stop


@pytest.fixture
def locked(make_cp: MakeCp) -> Iterator[tuple[ControlPlane, psycopg.Connection[Any]]]:
    """A control plane, and a connection that keeps its heartbeats from being committed."""
    cp = make_cp()
    with psycopg.connect(cp.postgres.dsn(cp.database)) as connection:
        yield cp, connection


def test_sigterm_with_heartbeats_in_flight(
    locked: tuple[ControlPlane, psycopg.Connection[Any]],
) -> None:
    cp, connection = locked
    clients = [Client(cp) for _ in range(20)]
    for client in clients:
        client.register(cp.mint())
    connection.execute("LOCK TABLE liveness")
    with ThreadPoolExecutor(20) as workers:
        beats = [workers.submit(try_heartbeat, client) for client in clients]
        time.sleep(0.5)
        assert cp.process
        began = time.monotonic()
        cp.process.child.send_signal(signal.SIGTERM)
        cp.process.wait_log("INFO control plane stopping")
        status, answer = cp.call("GET", "/readyz")
        assert (status, answer["error"]["code"]) == (503, "try_later")
        with Client(cp) as late:
            with pytest.raises(Refused) as refused:
                late.heartbeat()
            assert refused.value.status.name == "UNAVAILABLE"
        connection.rollback()
        answers = [beat.result() for beat in beats]
        assert cp.process.child.wait(10) == 0
        assert time.monotonic() - began < 10
    for client in clients:
        client.channel.close()
    assert answers == [""] * 20
    assert cp.query("SELECT 1 FROM liveness WHERE last_heartbeat_at IS NULL") == []
    assert cp.log.splitlines()[-1] == "INFO control plane stopped"
    cp.check_invariants()


def test_sigterm_under_a_steady_load_loses_no_acknowledged_heartbeat(make_cp: MakeCp) -> None:
    cp = make_cp()
    clients = [Client(cp) for _ in range(8)]
    for client in clients:
        client.register(cp.mint())
    sent: dict[int, int] = {}

    def beat(number: int) -> str:
        while not (reason := try_heartbeat(clients[number])):
            sent[number] = clients[number].seq
        return reason

    with ThreadPoolExecutor(8) as workers:
        loops = [workers.submit(beat, number) for number in range(8)]
        wait_for("every host was heard", lambda: len(sent) == 8)
        began = time.monotonic()
        assert cp.stop() == 0
        assert time.monotonic() - began < 10
        reasons = {loop.result() for loop in loops}
    # gRPC says UNAVAILABLE of a closed port and CANCELLED of a call that came while it closed.
    assert reasons <= {"TRY_LATER", "UNAVAILABLE", "CANCELLED"}, reasons
    for name in reasons:  # the agent does the same about all three
        assert agent.decide_refusal(name).action is agent.BACK_OFF
    for number, client in enumerate(clients):
        sql = "SELECT seq FROM liveness JOIN hosts USING (host_no) WHERE host_secret_sha256 = %s"
        stored = cp.query(sql, cp_server.sha256(client.host_secret))[0]["seq"]
        assert sent[number] <= stored <= sent[number] + 1
        client.channel.close()


def test_sigterm_while_the_database_hangs(
    locked: tuple[ControlPlane, psycopg.Connection[Any]],
) -> None:
    cp, connection = locked
    with Client(cp) as client, ThreadPoolExecutor(1) as workers:
        client.register(cp.mint())
        connection.execute("LOCK TABLE liveness")
        beat = workers.submit(try_heartbeat, client)
        time.sleep(0.5)
        began = time.monotonic()
        assert cp.stop() == 0
        assert time.monotonic() - began < 10
        assert beat.result() == "TRY_LATER"


def test_sigterm_with_clients_of_the_http_api_that_say_nothing(make_cp: MakeCp) -> None:
    cp = make_cp()
    socks = [socket.create_connection(("127.0.0.1", cp.http_port)) for _ in range(4)]
    socks[0].sendall(b"GET /healthz HTTP/1.1\r\n")
    time.sleep(0.3)
    began = time.monotonic()
    assert cp.stop() == 0
    assert time.monotonic() - began < 8
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills(
    locked: tuple[ControlPlane, psycopg.Connection[Any]], second: signal.Signals
) -> None:
    cp, connection = locked
    with Client(cp) as client, ThreadPoolExecutor(1) as workers:
        client.register(cp.mint())
        connection.execute("LOCK TABLE liveness")
        beat = workers.submit(try_heartbeat, client)
        time.sleep(0.3)
        assert cp.process
        cp.process.child.send_signal(signal.SIGINT)
        cp.process.wait_log("INFO control plane stopping")
        began = time.monotonic()
        assert cp.stop(second) == -second
        assert time.monotonic() - began < 1
        beat.result()


# Keys of operators' tokens


def test_a_new_key_is_seen_by_the_running_server_and_old_tokens_stay_good(
    make_cp: MakeCp,
) -> None:
    cp = make_cp()
    old = cp.command("token").stdout.strip()
    done = cp.command("token", "--new-key", "--sub", "alice", "--scope", "read")
    assert done.returncode == 0
    assert done.stderr == "The service takes the new key: systemctl restart openinfra-cp\n"
    new = done.stdout.strip()
    assert cp.keys_file.stat().st_mode & 0o777 == 0o600
    secrets_in_file = [key["secret"] for key in json.loads(cp.keys_file.read_text())["keys"]]
    assert len(secrets_in_file) == 2
    for token in (cp.token, old, new):
        assert cp.call("GET", "/api/v1/admin/hosts", token=token)[0] == 200
    assert cp.call("POST", "/api/v1/admin/host-invites", {}, token=new)[0] == 403
    assert cp.command("token").stdout.strip().split(".")[0] == new.split(".")[0]
    for secret in secrets_in_file:
        assert secret not in cp.log + done.stdout
    kept = json.loads(cp.keys_file.read_text())["keys"][1:]
    cp_server.write_file(cp.keys_file, json.dumps({"keys": kept}).encode(), 0o600)
    assert cp.call("GET", "/api/v1/admin/hosts", token=old)[0] == 401  # its key was taken out
    assert cp.call("GET", "/api/v1/admin/hosts", token=new)[0] == 200
    assert old not in cp.log


def test_a_first_key(idle: ControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    flag = f"--jwt-keys-file={path}"
    check_failed(idle.command("token", flag), EXIT_ERROR, str(path), "token --new-key")
    assert idle.command("token", flag, "--new-key").returncode == 0
    assert path.stat().st_mode & 0o777 == 0o600
    flag = f"--jwt-keys-file={tmp_path / 'none' / 'keys'}"
    check_failed(idle.command("token", flag, "--new-key"), EXIT_ERROR, str(tmp_path / "none"))


# invite, hosts, revoke


def test_invite_prints_the_token_alone(idle: ControlPlane) -> None:
    done = idle.command("invite", "--note", "provider@home — Kuma", "--ttl-hours", "1")
    assert done.returncode == 0
    token = done.stdout.strip()
    parsed = cp_server.parse_token("oi1", token)
    assert done.stdout == token + "\n"
    assert parsed.public_id in done.stderr
    assert token.split("_", 2)[2] not in done.stderr
    row = idle.query("SELECT * FROM invites WHERE invite_id = %s", parsed.public_id)[0]
    assert (row["note"], row["approve_first_wallet"]) == ("provider@home — Kuma", True)
    assert re.fullmatch(r"cli:\w+", row["created_by"])
    assert (row["expires_at"] - row["created_at"]).total_seconds() == 3600
    answer = json.loads(idle.command("invite", "--json", "--no-approve-first-wallet").stdout)
    assert cp_server.parse_token("oi1", answer["token"]).public_id == answer["id"]
    assert answer["approve_first_wallet"] is False


@pytest.mark.parametrize(
    "flag",
    [
        "--ttl-hours=73",
        "--note=a\x1bb",
        "--payout-pubkey=x",
        "--wg-ip=10.77.0.1",
    ],
)
def test_an_invite_that_cannot_be(idle: ControlPlane, flag: str) -> None:
    before = idle.query("SELECT count(*) AS n FROM invites")
    field = flag[2:].partition("=")[0].replace("-", "_")
    check_failed(idle.command("invite", flag), EXIT_USAGE, field)
    assert idle.query("SELECT count(*) AS n FROM invites") == before


def test_hosts_is_aligned_and_safe_for_a_terminal(make_cp: MakeCp) -> None:
    cp = make_cp()
    names = ["a", "a-rather-long-name.example.org", "b"]
    with Client(cp) as client:
        for name in names:
            client.host_secret, client.session = os.urandom(32), os.urandom(32)
            client.register(cp.mint(), facts=facts(hostname=name))
        client.heartbeat()
        hostile = facts(hostname="\x1b]0;owned\x07\x1b[2J")
        check_refused("BAD_REQUEST", client.register, cp.mint(), facts=hostile)
        check_refused("BAD_REQUEST", client.heartbeat, facts=hostile)
    sql = "UPDATE hosts SET hostname = %s WHERE hostname = 'b'"  # by another program
    cp.postgres.execute(cp.database, sql, "\x1b[31mb\n\u202eb")
    done = cp.command("hosts")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert done.stdout.replace("\n", "").isprintable()
    starts = [lines[0].index(word) for word in ("NAME", "STATUS", "ADDRESS", "LAST", "WHY")]
    for line in lines[1:]:
        assert all(line[start - 2 : start] == "  " for start in starts)
        assert all(line[start] != " " for start in starts)
    assert lines[2][starts[0] :].startswith(names[1])
    found = json.loads(cp.command("hosts", "--json", "--status=online").stdout)["hosts"]
    assert len(found) == 1
    check_failed(cp.command("hosts", "--status=gone"), EXIT_USAGE, "status")
    check_failed(cp.command("hosts", "--limit=0"), EXIT_USAGE, "limit")


def test_revoke(running: ControlPlane) -> None:
    with Client(running) as client:
        host_id = client.register(running.mint()).host_id
        for _ in range(2):
            done = running.command("revoke", host_id)
            assert (done.returncode, done.stdout) == (0, f"host {host_id} (lab) is revoked\n")
        check_refused("HOST_REVOKED", client.heartbeat)
    rows = running.query("SELECT actor FROM audit_log WHERE action = 'host.revoke'")
    assert [row["actor"].partition(":")[0] for row in rows] == ["cli"]
    check_failed(running.command("revoke", "lab"), EXIT_USAGE, "UUID")
    nobody = "00000000-0000-4000-8000-000000000000"
    check_failed(running.command("revoke", nobody), EXIT_ERROR, "no such host")


# doctor

# A workload, and a copy of it on the first host.
WORK = """INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
  VALUES (gen_random_uuid(), 'kuma', 'web', 2, '{}', 'x');"""
COPY = """INSERT INTO assignments
  (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes, port_slot)
  SELECT 1, 1, {}, min(host_no), '{{}}', 1, 1, 5 FROM hosts;"""
LATE = "UPDATE assignments SET stop_at = now(), stop_reason = 'x', stop_revision = 9"
# The invariant, and what breaks it as a superuser can. `one` is a host's row.
BREAKS = (
    ("one_host_per_invite", "DELETE FROM hosts WHERE one"),
    ("host_has_consumed_invite", "UPDATE hosts SET host_id = gen_random_uuid() WHERE one"),
    (
        "one_live_session",
        """DROP INDEX sessions_live;
        INSERT INTO sessions SELECT sha256('x'), host_no, 'resume' FROM hosts WHERE one""",
    ),
    ("one_live_session", "UPDATE hosts SET status = 'quarantined' WHERE one"),
    ("one_live_session", "UPDATE hosts SET status = 'revoked', revoked_at = now() WHERE one"),
    ("one_host_per_address", "DROP INDEX hosts_wg_ip; UPDATE hosts SET wg_ip = '10.77.0.9'"),
    (
        "one_host_per_address",
        """ALTER TABLE hosts DROP CONSTRAINT hosts_wg_pubkey_key;
        UPDATE hosts SET wg_pubkey = 'xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg='""",
    ),
    (
        "address_held_once",
        """ALTER TABLE invites DROP CONSTRAINT invites_check3;
        UPDATE invites SET wg_ip = '10.77.0.9', wg_ip_held = true WHERE invite_no = 1""",
    ),
    (
        "wallet_is_namespace",
        """ALTER TABLE hosts DROP CONSTRAINT hosts_check1;
        UPDATE hosts SET namespace = NULL WHERE one""",
    ),
    ("host_has_liveness", "DELETE FROM liveness WHERE one"),
    ("host_has_liveness", "UPDATE liveness SET last_heartbeat_at = now() WHERE one"),
    ("host_has_liveness", "UPDATE hosts SET status = 'online' WHERE one"),
    (
        "one_copy_per_replica",
        f"DROP INDEX assignments_live, assignments_ports; {WORK} {COPY.format(0)} {COPY.format(0)}",
    ),
    (
        "hosts_within_their_offer",
        f"DROP INDEX assignments_ports; {WORK} {COPY.format(0)} {COPY.format(1)}",
    ),
    (
        "hosts_within_their_offer",
        f"{WORK} {COPY.format(0)} {LATE}",
    ),
    ("changes_are_audited", "DELETE FROM audit_log WHERE audit_id = 1"),
    (
        "changes_are_audited",
        """UPDATE invites SET consumed_at = NULL, host_id = NULL, revoked_at = now()
        WHERE invite_no = 1""",
    ),
    ("role_cannot_rewrite", "GRANT DELETE ON hosts TO openinfra"),
    ("role_cannot_rewrite", "GRANT UPDATE ON audit_log TO openinfra"),
    ("role_cannot_rewrite", "GRANT TRUNCATE ON hosts TO PUBLIC"),
)


@pytest.fixture(scope="module")
def sound(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with two hosts, stopped: a template for broken databases."""
    with serving(postgres, tmp_path_factory.mktemp("sound")) as cp:
        for _ in range(2):
            with Client(cp) as client:
                client.register(cp.mint(payout_pubkey=WALLET))
        cp.check_invariants()
        cp.stop()
        yield cp
        cp.start()


def test_every_invariant_is_broken_by_a_test() -> None:
    broken = {name for name, _ in (*BREAKS, *test_ledger.BROKEN)}
    assert broken == {name for name, _, _ in cp_server.INVARIANTS}


@pytest.fixture
def copy_of(sound: ControlPlane, tmp_path: Path) -> ControlPlane:
    """A control plane that is not started, on a copy of the sound database."""
    cp = ControlPlane(sound.postgres, tmp_path / "copy")
    cp.postgres.execute("postgres", f"DROP DATABASE {cp.database}")
    cp.postgres.execute("postgres", f"CREATE DATABASE {cp.database} TEMPLATE {sound.database}")
    return cp


def break_rule(cp: ControlPlane, change: str) -> None:
    """Change the database as nothing but a superuser can."""
    change = change.replace("WHERE one", "WHERE host_no = (SELECT min(host_no) FROM hosts)")
    cp.postgres.execute(cp.database, f"SET session_replication_role = replica; {change}")


@pytest.mark.parametrize(("name", "change"), BREAKS, ids=[name for name, _ in BREAKS])
def test_an_invariant_that_does_not_hold_is_found(
    copy_of: ControlPlane, name: str, change: str
) -> None:
    break_rule(copy_of, change)
    found = asyncio.run(cp_server.with_database(copy_of.dsn_file, cp_server.find_violations))
    assert name in [violation for violation, _, _ in found]


def test_doctor_names_the_invariants_that_do_not_hold(copy_of: ControlPlane) -> None:
    assert copy_of.command("doctor", "--invariants").returncode == 0
    broken = {
        "host_has_liveness": "DELETE FROM liveness WHERE one",
        "role_cannot_rewrite": "GRANT DELETE ON hosts TO openinfra",
    }
    for change in broken.values():
        break_rule(copy_of, change)
    done = copy_of.command("doctor", "--invariants")
    assert (done.returncode, done.stderr) == (1, "")
    said = [line for line in done.stdout.splitlines() if line.startswith("WRONG ")]
    assert [line.split()[1].rstrip(":") for line in said] == list(broken)
    assert done.stdout.endswith("2 findings\n")
    done = copy_of.command("doctor", "--invariants", "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["findings"]) == 2
    assert copy_of.command("doctor").returncode == 0  # without --invariants nobody asked


def test_doctor_names_every_problem_at_once(make_cp: MakeCp, tmp_path: Path) -> None:
    cp = make_cp(start=False)
    assert cp.command("doctor").stdout == "all is well\n"
    done = cp.command("doctor", f"--dsn-file={tmp_path / 'a'}", f"--jwt-keys-file={tmp_path / 'b'}")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("WRONG ") == 2
    assert done.stdout.splitlines()[-1] == "2 findings"


# Secrets


def test_no_secret_is_asked_for_on_the_command_line(idle: ControlPlane) -> None:
    for command in ("serve", "migrate", "invite"):
        shown = idle.command(command, "--help").stdout
        assert "--dsn-file" in shown
        assert not re.search(r"--(dsn|password|secret|token|key)\b(?!-)", shown)


def test_no_secret_in_argv_environment_or_log(running: ControlPlane) -> None:
    assert running.process
    token = running.mint()
    with Client(running) as client:
        client.register(token)
        client.heartbeat()
    running.call("GET", "/api/v1/admin/hosts", token=running.token + "x")
    running.call("GET", f"/api/v1/admin/hosts?hostname={token}")
    running.call("POST", "/api/v1/admin/host-invites", {"note": 1, token: token})
    key = json.loads(running.keys_file.read_text())["keys"][0]["secret"]
    signature = running.token.split(".")[2]
    found = [token, token.split("_", 2)[2], key, signature, client.host_secret.hex()]
    texts = {"log": running.log}
    for name in ("cmdline", "environ"):
        path = Path(f"/proc/{running.process.child.pid}/{name}")
        texts[name] = path.read_bytes().decode(errors="replace")
    assert [(n, s) for n, text in texts.items() for s in found if s in text] == []
    rows = running.query("SELECT to_jsonb(a)::text AS row FROM audit_log a")
    assert [row for row in rows if any(secret in row["row"] for secret in found)] == []
