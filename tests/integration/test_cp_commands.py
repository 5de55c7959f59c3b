"""The control plane's commands as a person meets them: start, stop, wrong files and databases."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cp_server
from tests.harness import ROOT, WALLET, Client, ControlPlane, Postgres, Refused, wait_for

Make = Callable[..., ControlPlane]


def check_ends(
    cp: ControlPlane, code: int, words: str, *flags: str, command: str = "serve"
) -> None:
    """The command ends with this code and one line that says this."""
    done = cp.command(command, *flags)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert re.match(rf"ERROR .*{words}.* ; \S", lines[0]), lines[0]


@pytest.fixture
def idle(make_cp: Make) -> ControlPlane:
    """A control plane that was not started."""
    return make_cp(start=False)


def test_a_database_that_is_not_there(idle: ControlPlane, tmp_path: Path) -> None:
    idle.set_dsn(f"host={tmp_path} dbname=openinfra user=openinfra")
    for command in ("serve", "hosts", "invite"):
        check_ends(idle, 75, "cannot reach PostgreSQL", command=command)


def test_wrong_files(idle: ControlPlane) -> None:
    idle.dsn_file.chmod(0o644)
    check_ends(idle, 3, "can be read by others, mode 0644")
    for content in ("", "what is this", "host=a\nhost=b"):
        idle.set_dsn(content)
        check_ends(idle, 1, "connection string")
    idle.dsn_file.unlink()
    check_ends(idle, 1, "is missing")
    idle.keys_file.write_text('{"keys": []}')
    check_ends(idle, 1, "no usable signing key")
    idle.keys_file.chmod(0o640)
    check_ends(idle, 3, "mode 0640")


def test_wrong_settings(idle: ControlPlane, tmp_path: Path) -> None:
    env = tmp_path / "cp.env"
    secret = "postgres://me:hunter2@db"
    for text, words in (
        ("COLOUR=red\n", r"cp.env:1: unknown key 'COLOUR'"),
        ("# fine\nHEARTBEAT_S=30\nHEARTBEAT_S=30\n", "cp.env:3: HEARTBEAT_S stands there twice"),
        (f"{secret}\n", "cp.env:1: line is not KEY=value"),
        ("HEARTBEAT_S=600\n", "heartbeat-s is out of range"),
        ("PEER_CHECK=maybe\n", "peer-check is neither"),
        ("GRPC_LISTEN=everywhere\n", "is no address:port"),
    ):
        env.write_text(text)
        check_ends(idle, 2, words, "--env-file", str(env))
        assert secret not in idle.command("serve", "--env-file", str(env)).stderr
    check_ends(idle, 2, "is missing", "--env-file", str(tmp_path / "none"))


def test_schemas_of_another_version(idle: ControlPlane, postgres: Postgres) -> None:
    postgres.execute("postgres", f"CREATE DATABASE {idle.database}_empty")
    owner = idle.directory / "owner-dsn"
    good = idle.dsn_file.read_text()
    idle.set_dsn(postgres.dsn(f"{idle.database}_empty", "openinfra"))
    check_ends(idle, 1, "no OpenInfra schema")
    idle.set_dsn(good)
    cp_server.write_file(owner, postgres.dsn(idle.database).encode(), 0o600)
    again = idle.command("migrate", f"--owner-dsn-file={owner}")
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")
    postgres.execute(
        idle.database, "INSERT INTO schema_migrations VALUES (99, 'later', sha256('x'))"
    )
    check_ends(idle, 1, "schema is version 99, this program knows only")
    postgres.execute(idle.database, "DELETE FROM schema_migrations WHERE number = 99")
    postgres.execute(idle.database, "UPDATE schema_migrations SET sha256 = sha256('x')")
    flag = f"--owner-dsn-file={owner}"
    check_ends(idle, 3, "migration 1 in the database is not", flag, command="migrate")
    postgres.execute(idle.database, "DELETE FROM schema_migrations")
    check_ends(idle, 1, "no OpenInfra schema")


def test_migrations_race_and_need_rights(idle: ControlPlane, postgres: Postgres) -> None:
    name = f"{idle.database}_race"
    postgres.execute("postgres", f"CREATE DATABASE {name}")
    owner = idle.directory / "owner-dsn"
    cp_server.write_file(owner, postgres.dsn(name, "openinfra").encode(), 0o600)
    flag = f"--owner-dsn-file={owner}"
    check_ends(idle, 1, "may not make the schema", flag, command="migrate")
    cp_server.write_file(owner, postgres.dsn(name).encode(), 0o600)
    argv = idle.argv("migrate", flag)
    racers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(racer.communicate(timeout=30)[0].splitlines()[-1] for racer in racers)
    assert said == [
        "nothing to do",
        "nothing to do",
        f"schema is version {cp_server.SCHEMA_VERSION}",
    ]


@pytest.mark.parametrize("flag", ["grpc-listen", "http-listen"])
def test_a_port_in_use(idle: ControlPlane, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = "http-listen" if flag == "grpc-listen" else "grpc-listen"
        flags = (f"--{flag}=127.0.0.1:{port}", f"--{other}=127.0.0.1:{idle.grpc_port}")
        check_ends(idle, 1, f"cannot listen on 127.0.0.1:{port}: Address already in use", *flags)


def test_start_is_quick_and_sigterm_loses_nothing(cp: ControlPlane) -> None:
    """Heartbeats go on while it stops: each is accepted and committed, or told to try later."""
    accepted: list[int] = []
    others: list[str] = []
    with Client(cp) as client:
        client.register(cp.mint(payout_pubkey=WALLET))
        client.heartbeat()

        def beat_forever() -> None:
            while True:
                client.heartbeat()
                accepted.append(client.seq)

        def beat() -> None:
            with pytest.raises(Refused) as refused:
                beat_forever()
            others.append(refused.value.reason or str(refused.value.status))

        beating = threading.Thread(target=beat)
        beating.start()
        wait_for("heartbeats", lambda: len(accepted) > 5)
        began = time.monotonic()
        assert cp.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10
        beating.join()
    assert others in (["TRY_LATER"], ["StatusCode.UNAVAILABLE"]), others
    (row,) = cp.query("SELECT seq FROM liveness")
    assert row["seq"] >= accepted[-1]
    began = time.monotonic()
    cp.start()
    assert time.monotonic() - began <= 3
    assert "INFO control plane stopped" in cp.log


def test_a_second_signal_kills(make_cp: Make) -> None:
    """A call that hangs in the database keeps the first SIGTERM waiting."""
    cp = make_cp()
    with Client(cp) as client:
        client.register(cp.mint(payout_pubkey=WALLET))
        lock = "BEGIN; LOCK TABLE liveness IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(8)"
        holding = threading.Thread(target=cp.postgres.execute, args=(cp.database, lock))
        holding.start()
        wait_for(
            "the lock",
            lambda: cp.query("SELECT 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock'"),
        )

        def hang() -> None:
            with pytest.raises(Refused):
                client.heartbeat()

        hanging = threading.Thread(target=hang)
        hanging.start()
        time.sleep(0.5)
        assert cp.process
        cp.process.child.send_signal(signal.SIGTERM)
        wait_for("stopping", lambda: "INFO control plane stopping" in cp.log or None)
        assert cp.process.child.poll() is None
        assert cp.stop(signal.SIGTERM) == -signal.SIGTERM
        hanging.join()
        holding.join()


def test_postgresql_restarts_under_it(tmp_path: Path) -> None:
    root = Path("/tmp") / f"oi-pg-{os.getpid()}-restart"
    root.mkdir(mode=0o711)
    postgres = Postgres(root / "cluster")
    cp = ControlPlane(postgres, tmp_path / "cp")
    try:
        cp.start()
        with Client(cp) as client:
            client.register(cp.mint(payout_pubkey=WALLET))
            for how in (signal.SIGINT, signal.SIGQUIT):
                client.heartbeat()
                postgres.stop(how)
                postgres.start()
                client.heartbeat()
        cp.check_invariants()
    finally:
        cp.stop(signal.SIGKILL)
        postgres.stop(signal.SIGQUIT)
        cp_server.run(["rm", "-r", str(root)], echo=False)


BREAKS = {
    "one_host_per_invite": "UPDATE invites SET host_id = gen_random_uuid()",
    "host_has_consumed_invite": "UPDATE invites SET consumed_at = NULL, host_id = NULL",
    "one_live_session": "UPDATE hosts SET status = 'quarantined'",
    "one_host_per_address": "UPDATE hosts SET wg_pubkey = 'same'",
    "address_held_once": "UPDATE invites SET wg_ip = '10.77.0.9', wg_ip_held = true",
    "wallet_is_namespace": "UPDATE hosts SET namespace = NULL",
    "host_has_liveness": "DELETE FROM liveness",
    "changes_are_audited": "DELETE FROM audit_log",
    "role_cannot_rewrite": "GRANT UPDATE ON audit_log TO openinfra",
}


@pytest.mark.parametrize("name", [name for name, _, _ in cp_server.INVARIANTS])
def test_doctor_sees_a_broken_invariant(idle: ControlPlane, name: str) -> None:
    cp = idle
    cp.start()
    for _ in range(2):
        with Client(cp) as client:
            client.register(cp.mint(payout_pubkey=WALLET))
            client.heartbeat()
    cp.check_invariants()
    free = (
        "ALTER TABLE invites DROP CONSTRAINT invites_check1, DROP CONSTRAINT invites_check3;"
        "ALTER TABLE hosts DROP CONSTRAINT hosts_check1, DROP CONSTRAINT hosts_wg_pubkey_key,"
        " DROP CONSTRAINT hosts_wg_pubkey_check;"
        "DROP INDEX invites_wg_ip_held; SET session_replication_role = replica;"
    )
    cp.postgres.execute(cp.database, free + BREAKS[name])
    done = cp.command("doctor", "--invariants")
    assert done.returncode == 1, done.stdout
    assert f"WRONG {name}: it must hold that" in done.stdout


def test_no_secret_is_an_argument_or_printed_twice(cp: ControlPlane) -> None:
    done = cp.command("invite", "--note=x", f"--payout-pubkey={WALLET}")
    token = done.stdout.strip()
    assert re.fullmatch(r"oi1_\S+", token)
    assert token not in done.stderr + cp.log
    assert "token" not in cp.command("hosts").stdout
    help_text = subprocess.run(
        [cp.python, str(ROOT / "cp_server.py"), "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not re.search(r"--(password|secret|token|dsn)\b(?!-)", help_text)


def test_the_list_is_safe_for_a_terminal(cp: ControlPlane) -> None:
    with Client(cp) as client:
        client.register(cp.mint(payout_pubkey=WALLET))
    cp.postgres.execute(cp.database, "UPDATE hosts SET hostname = E'a\\x1b[2Jb'")
    shown = cp.command("hosts")
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
