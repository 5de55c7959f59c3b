"""`cp_server.py backup` and `restore`: the drill with real agents, and all that can go wrong."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cp_server
from tests.harness import (
    WALLET,
    Agent,
    Client,
    ControlPlane,
    Netns,
    Postgres,
    facts,
    new_wg_key,
    wait_for,
)
from tests.hub import Hub, make_hub
from tests.integration.test_workloads import Tenant

Done = subprocess.CompletedProcess[str]
PASSPHRASE = "correct horse battery staple"
EXIT_ERROR, EXIT_USAGE, EXIT_PROTECT, EXIT_LATER = 1, 2, 3, 75


class Machine:
    """A VPS: a database, a control plane that is not started, the files of both."""

    def __init__(
        self, postgres: Postgres, directory: Path, *flags: str, netns: Netns | None = None
    ) -> None:
        self.cp = ControlPlane(postgres, directory, "--heartbeat-s=1", *flags, netns=netns)
        self.directory = directory
        self.owner_dsn = directory / "owner-dsn"
        dsn = f"{postgres.dsn(self.cp.database)} password=hunter2hunter2"
        cp_server.write_file(self.owner_dsn, dsn.encode(), 0o600)
        self.passphrase = directory / "passphrase"
        cp_server.write_file(self.passphrase, f"{PASSPHRASE}\n".encode(), 0o600)
        self.wg_conf = directory / "wg0.conf"
        self.env_file = directory / "cp.env"
        self.env_file.write_text(f"# settings of {directory}\nROLE=openinfra\n")

    def argv(self, command: str, *more: str) -> list[str]:
        """A command line of `backup` or `restore`."""
        argv = self.cp.argv(command, *more)
        argv[argv.index(os.devnull)] = str(self.env_file)
        files = [f"--owner-dsn-file={self.owner_dsn}", f"--passphrase-file={self.passphrase}"]
        files.append(f"--release-key={self.directory / 'release' / 'key.pem'}")
        if command == "restore":
            files.append(f"--dist={self.directory / 'dist'}")
        return [*argv, *files, f"--wg-conf={self.wg_conf if self.wg_conf.exists() else ''}"]

    def run(self, command: str, *more: str, prefix: tuple[str, ...] = ()) -> Done:
        """Run it to its end."""
        return subprocess.run(
            [*prefix, *self.argv(command, *more)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def make_release(self) -> bytes:
        """A release with a key of this machine's own; gives back the public half."""
        directory = self.directory / "release"
        directory.mkdir(mode=0o700)
        flags = [f"--out={self.directory / 'dist'}", f"--key={directory / 'key.pem'}"]
        done = self.cp.command("dist", *flags, "--new-key")
        assert done.returncode == 0, done.stderr
        return (self.directory / "dist" / "release.pub").read_bytes()

    def back_up(self, out: Path) -> Path:
        """A good backup."""
        done = self.run("backup", f"--out={out}")
        assert done.returncode == 0, done.stderr
        return out

    def restore(self, path: Path, *more: str) -> str:
        """A good restore; gives back what it said."""
        done = self.run("restore", str(path), *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self) -> dict[str, Any]:
        """All rows of all tables but the list of what was done."""
        return {
            name: self.cp.query(f"SELECT to_jsonb(t) AS row FROM {name} t ORDER BY 1")  # noqa: S608
            for name in ("hosts", "invites", "liveness", "namespaces", "schema_migrations")
        }


def check_failed(done: Done, code: int, *words: str) -> None:
    """One line that says what is wrong and what to do."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("+ ")]
    assert (done.returncode, done.stdout, len(lines)) == (code, "", 1), done
    for word in (*words, "ERROR ", " ; "):
        assert word in lines[0]


def decrypt(path: Path) -> bytes:
    """The tar inside, as a person gets it: the way that the README says works without us."""
    reader, writer = os.pipe()
    os.write(writer, PASSPHRASE.encode() + b"\n")
    os.close(writer)
    argv = ["gpg", "--batch", "--quiet", "--pinentry-mode=loopback", f"--passphrase-fd={reader}"]
    done = subprocess.run(
        [*argv, "--decrypt", str(path)], pass_fds=[reader], capture_output=True, check=True
    )
    os.close(reader)
    return done.stdout


@pytest.fixture(autouse=True)
def temporary(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The test's own /tmp; no agent of gpg's, none of its homes, and no plaintext is left there."""
    tmp_path_factory.getbasetemp()  # this one is pytest's, for all tests
    with tempfile.TemporaryDirectory(prefix="oi-", dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert os.listdir(name) == []
        argv = ["pgrep", "-fa", f"gpg-agent --homedir {name}"]
        done = subprocess.run(argv, capture_output=True, check=False)
        assert done.stdout == b""


# The drill


class Fleet:
    """Agents in one namespace, each at its own address, with its peer on the hub."""

    def __init__(self, machine: Machine, hub: Hub, netns: Netns, directory: Path) -> None:
        self.machine = machine
        self.hub = hub
        self.netns = netns
        self.directory = directory
        self.agents: dict[str, Agent] = {}

    def join(self, name: str) -> Agent:
        """A host that is online."""
        number = len(self.agents) + 40
        address, key = f"10.77.0.{number}", new_wg_key()
        self.hub.set(key, address)
        cp = self.machine.cp
        agent = Agent(
            self.directory / name,
            f"{address}:9092",
            cp.mint(payout_pubkey=WALLET),
            netns=self.netns,
            wg_key=key,
        )
        agent.start()
        agent.process.wait_log("INFO agent running")
        self.agents[name] = agent
        return agent

    def host_id(self, name: str) -> str:
        """The id that an agent keeps."""
        identity = json.loads((self.agents[name].data / "identity.json").read_text())
        return str(identity["host_id"])

    def key(self, name: str) -> str:
        """An agent's WireGuard key."""
        return self.agents[name].key_file.read_text().strip()

    def stop(self) -> None:
        """End all."""
        for agent in self.agents.values():
            if agent.started:
                agent.process.stop(signal.SIGKILL)


def save(hub: Hub, path: Path) -> None:
    """`wg-quick save`, without wg-quick's interface."""
    text = hub.wg("showconf")
    cp_server.write_file(
        path, text.replace("[Interface]", "[Interface]\nAddress = 10.77.0.1/16", 1).encode(), 0o600
    )


def test_yesterdays_backup_on_a_new_machine(
    postgres: Postgres, spare_postgres: Postgres, tmp_path: Path, netns: Netns
) -> None:
    with make_hub(netns, tmp_path / "hub1") as hub1, make_hub(netns, tmp_path / "hub2") as hub2:
        old = Machine(postgres, tmp_path / "old", f"--wg-socket={hub1.socket}", netns=netns)
        new = Machine(spare_postgres, tmp_path / "new", f"--wg-socket={hub2.socket}", netns=netns)
        for machine, hub in ((old, hub1), (new, hub2)):
            machine.wg_conf = machine.directory / f"{hub.name}.conf"
            save(hub, machine.wg_conf)
        assert hub1.wg("show", "public-key") != hub2.wg("show", "public-key")
        pinned = old.make_release()
        assert new.make_release() != pinned
        fleet = Fleet(old, hub1, netns, tmp_path)
        try:
            drill(old, new, fleet, hub1, hub2, tmp_path / "backup.gpg")
            check_release(new.directory / "dist", pinned)
        finally:
            fleet.stop()
            for machine in (old, new):
                if machine.cp.process:
                    machine.cp.stop(signal.SIGKILL)
                assert "Traceback" not in machine.cp.log, machine.cp.log


def drill(old: Machine, new: Machine, fleet: Fleet, hub1: Hub, hub2: Hub, backup: Path) -> None:
    old.cp.start()
    for name in ("steady", "restarted", "killed", "revoked"):
        fleet.join(name)
    stranger = new_wg_key()
    hub1.set(stranger, "10.77.0.99")  # for a host that comes later
    save(hub1, old.wg_conf)
    assert old.cp.command("revoke", fleet.host_id("revoked")).returncode == 0
    assert fleet.agents["revoked"].process.child.wait(30) == 78
    old.back_up(backup)
    # A day goes by: sessions are opened, one more host comes.
    for turn in range(5):
        fleet.agents["restarted"].restart()
        fleet.agents["killed"].process.stop(signal.SIGKILL)
        fleet.agents["killed"].start()
        for name in ("restarted", "killed"):
            log = "INFO agent running"
            agent = fleet.agents[name]
            wait_for(log, lambda a=agent, n=turn + 2: a.log.count("INFO agent running") >= n)  # type: ignore[misc]
    fleet.join("late")
    pids = {name: agent.process.child.pid for name, agent in fleet.agents.items()}
    took = [int(row["n"]) for row in old.cp.query("SELECT count(*) AS n FROM sessions")]
    assert took[0] >= 15
    old.cp.stop(signal.SIGKILL)  # the old machine is gone
    hub1.stop_interface()

    said = new.restore(backup)
    print(said)
    assert re.search(r"^database restored: 4 hosts as of 20", said, re.MULTILINE)
    assert f"{hub2.name} has the key and the peers of the backup" in said
    assert "mint a fresh invite" in said
    new.cp.start()
    began = time.monotonic()
    for name in ("steady", "restarted", "killed"):
        sql = "SELECT 1 FROM hosts JOIN liveness USING (host_no) JOIN cp_state ON true"
        sql += " WHERE host_id = %s AND status = 'online' AND last_heartbeat_at > serving_since"
        wait_for(name, lambda n=name, s=sql: new.cp.query(s, fleet.host_id(n)), 60)  # type: ignore[misc]
    print(f"all came back {time.monotonic() - began:.1f} s after the start")
    for name in ("steady", "restarted", "killed"):
        agent = fleet.agents[name]
        assert agent.process.child.pid == pids[name]
        assert agent.process.child.poll() is None
        assert agent.status()["state"] == "running"
    actions = {row["action"] for row in new.cp.query("SELECT action FROM audit_log")}
    assert actions == {"invite.mint", "host.register", "host.revoke", "backup.restore"}
    opened = new.cp.query("SELECT DISTINCT opened_by FROM sessions WHERE ended_at IS NULL")
    assert opened == [{"opened_by": "resume"}]
    # The hub is the old one to its hosts; the revoked host's peer of the file is gone again.
    assert hub2.wg("show", "public-key") == hub1_public(old)
    assert "Address = 10.77.0.1/16" in new.wg_conf.read_text()
    wait_for("the hub", lambda: fleet.key("revoked") not in hub2.peers())
    assert hub2.peers()[stranger] == "10.77.0.99"
    for number, name in enumerate(("steady", "restarted", "killed"), 40):
        assert hub2.peers()[fleet.key(name)] == f"10.77.0.{number}"
    fleet.agents["revoked"].start()
    assert fleet.agents["revoked"].process.child.wait(30) == 78
    heal(new, fleet, hub2)
    # Its files are those of yesterday; what the new machine had is beside them.
    assert new.env_file.read_bytes() == old.env_file.read_bytes()
    assert new.cp.keys_file.read_bytes() == old.cp.keys_file.read_bytes()
    for path in (new.env_file, new.cp.keys_file, new.wg_conf):
        kept = path.with_name(f"{path.name}.before-restore")
        assert kept.exists()
        wanted = 0o644 if path == new.env_file else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(kept.stat().st_mode) == wanted
    done = new.cp.command("doctor", "--invariants", *new.cp.flags[1:])
    assert done.returncode == 0, done.stdout


def heal(new: Machine, fleet: Fleet, hub: Hub) -> None:
    """Who came after the backup is told so, and joins by a fresh invite."""
    late, address = fleet.agents["late"], f"10.77.0.{40 + list(fleet.agents).index('late')}"
    wait_for("told", lambda: "reason=UNKNOWN_HOST" in late.log, 60)
    assert late.process.child.poll() is None
    # As install_agent.py --new-invite does it.
    assert late.process.stop() == 0
    (late.data / "identity.json").rename(late.data / "identity.json.replaced")
    hub.set(fleet.key("late"), address)
    late.write_env(new.cp.mint(payout_pubkey=WALLET), WALLET, f"{address}:9092")
    late.start()
    wait_for("it is a host again", lambda: late.log.count("INFO agent running") == 2)
    sql = "SELECT 1 FROM hosts WHERE host_id = %s AND status = 'online'"
    wait_for("online", lambda: new.cp.query(sql, fleet.host_id("late")))


def check_release(dist: Path, pinned: bytes) -> None:
    """What a host installs from there is signed with the key that it has pinned."""
    assert (dist / "release.pub").read_bytes() == pinned
    argv = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(dist / "release.pub")]
    argv += ["-rawin", "-in", str(dist / "release.json"), "-sigfile", f"{dist}/release.json.sig"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    described = json.loads((dist / "release.json").read_text())["files"]
    for name, row in described.items():
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == row["sha256"]


def hub1_public(old: Machine) -> str:
    """The public key of the hub that was saved."""
    match = re.search(r"PrivateKey = (\S+)", old.wg_conf.read_text())
    assert match
    return subprocess.run(
        ["wg", "pubkey"], input=match[1], capture_output=True, text=True, check=True
    ).stdout


# One machine with hosts, its backup, and a second machine that takes it


@pytest.fixture(scope="module")
def source(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with two hosts, one revoked, that is not served."""
    machine = Machine(postgres, tmp_path_factory.mktemp("source"))
    machine.cp.start()
    for name in ("one", "two"):
        with Client(machine.cp) as client:
            reply = client.register(machine.cp.mint(payout_pubkey=WALLET, note=name))
            client.heartbeat(facts=facts(hostname=name))
    machine.cp.call("POST", f"/api/v1/admin/hosts/{reply.host_id}/revoke")
    machine.cp.stop()
    text = "[Interface]\nPrivateKey = c2VjcmV0\nListenPort = 51820\n\n[Peer]\nPublicKey = abc\n"
    cp_server.write_file(machine.wg_conf, text.encode(), 0o600)
    return machine


@pytest.fixture(scope="module")
def backup(source: Machine) -> Path:
    """Its backup."""
    return source.back_up(source.directory / "backup.gpg")


@pytest.fixture
def target(spare_postgres: Postgres, tmp_path: Path) -> Machine:
    """A new machine after setup_cp.py."""
    machine = Machine(spare_postgres, tmp_path / "target")
    cp_server.write_file(machine.wg_conf, b"[Interface]\nPrivateKey = bmV3\n", 0o600)
    return machine


def test_what_a_backup_holds(source: Machine, backup: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert b"c2VjcmV0" not in backup.read_bytes()
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=decrypt(backup), check=True)
    assert sorted(os.listdir(tmp_path)) == [
        "cp.env",
        "database.dump",
        "jwt-keys.json",
        "manifest.json",
        "wg0.conf",
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["hosts"], manifest["schema"]) == (2, cp_server.SCHEMA_VERSION)
    for name, row in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert row == {"size_bytes": len(data), "sha256": cp_server.sha256(data).hex()}
    assert (tmp_path / "wg0.conf").read_bytes() == source.wg_conf.read_bytes()
    listing = ["pg_restore", "--list", str(tmp_path / "database.dump")]
    assert subprocess.run(listing, capture_output=True, check=True).stdout.count(b"TABLE DATA") >= 8


def test_a_restore_gives_all_rows_back(source: Machine, backup: Path, target: Machine) -> None:
    said = target.restore(backup)
    assert "database restored: 2 hosts" in said
    assert f"{target.wg_conf.stem} is not up: systemctl start wg-quick@wg0" in said
    assert target.rows() == source.rows()
    assert target.cp.query("SELECT 1 FROM sessions WHERE ended_at IS NULL") == []
    assert target.wg_conf.read_bytes() == source.wg_conf.read_bytes().replace(
        b"ListenPort = 51820\n", b""
    )  # the interface stays the machine's own, but for its key
    target.cp.start()
    target.cp.check_invariants()
    assert target.cp.call("GET", "/api/v1/admin/hosts")[0] == 401  # its keys are yesterday's now
    target.cp.token = source.cp.token
    assert target.cp.call("GET", "/api/v1/admin/hosts")[0] == 200
    with Client(target.cp) as client:  # identities and numbers go on
        client.register(target.cp.mint(payout_pubkey=WALLET))
        client.heartbeat()
    target.cp.stop()
    again = target.run("restore", str(backup))
    check_failed(again, EXIT_PROTECT, "has 3 hosts", "--replace")
    target.restore(backup, "--replace")
    assert target.rows() == source.rows()
    target.cp.start()
    target.cp.check_invariants()
    target.cp.stop()


def test_a_host_that_was_revoked_since_stays_revoked(
    source: Machine, backup: Path, target: Machine
) -> None:
    target.restore(backup)
    (alive,) = target.cp.query("SELECT host_id FROM hosts WHERE status <> 'revoked'")
    assert target.cp.command("revoke", str(alive["host_id"])).returncode == 0
    target.restore(backup, "--replace")
    left = target.cp.query("SELECT 1 FROM hosts WHERE status <> 'revoked'")
    assert left == []
    done = target.cp.command("doctor", "--invariants")
    assert done.returncode == 0, done.stdout


def test_customers_and_their_keys(source: Machine, target: Machine, tmp_path: Path) -> None:
    """They are in a backup, in the way of a restore, and a key that was revoked since stays so."""
    added = source.cp.command("add-customer", "--name=Kuma", "--namespace=kuma")
    assert added.returncode == 0, added.stderr
    key_id = added.stdout.split("_")[1]
    customer_id = str(source.cp.query("SELECT customer_id FROM customers")[0]["customer_id"])
    pay = ("add-payment", customer_id, "25", "--reference")
    assert source.cp.command(*pay, "one").returncode == 0
    target.restore(source.back_up(tmp_path / "with"))
    assert "was booked before" in target.cp.command(*pay, "one").stdout
    assert "is booked" in target.cp.command(*pay, "two").stdout
    done = target.cp.command("ledger", "verify")
    assert (done.returncode, "2 transactions, 4 entries" in done.stdout) == (0, True)
    assert target.cp.query("SELECT name FROM customers") == [{"name": "Kuma"}]
    assert target.cp.command("revoke-key", key_id).returncode == 0
    target.restore(tmp_path / "with", "--replace")
    left = target.cp.query("SELECT key_id FROM customer_keys WHERE revoked_at IS NULL")
    assert left == []
    done = target.cp.command("doctor", "--invariants")
    assert done.returncode == 0, done.stdout
    assert len(target.cp.query("SELECT 1 FROM audit_log WHERE action = 'key.revoke'")) == 1


def test_assignments_wait_for_their_hosts(source: Machine, target: Machine, tmp_path: Path) -> None:
    """What lives in a backup may be over since, and a copy of it may run elsewhere."""
    sql = """
    INSERT INTO customers (customer_id, name, created_by) VALUES (gen_random_uuid(), 'x', 'x');
    INSERT INTO customer_namespaces SELECT 'later', max(customer_no) FROM customers;
    INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
      VALUES (gen_random_uuid(), 'later', 'web', 2, '{}', 'x');
    INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli,
      memory_bytes, state, ended_at)
    SELECT max(workload_no), 1, 0, 1, '{}'::jsonb, 1, 1, 'lost', now() FROM workloads
    UNION ALL SELECT max(workload_no), 1, 1, 1, '{}', 1, 1, 'running', NULL FROM workloads"""
    source.cp.postgres.execute(source.cp.database, sql)
    target.restore(source.back_up(tmp_path / "backup.gpg"))
    rows = target.cp.query("SELECT state, restored FROM assignments ORDER BY replica")
    assert [(row["state"], row["restored"]) for row in rows] == [("lost", False), ("running", True)]
    now = "SELECT restored_at > now() - interval '1 min' AS now FROM cp_state"
    assert target.cp.query(now) == [{"now": True}]


def test_secrets_are_of_no_use_without_their_key(
    postgres: Postgres, target: Machine, tmp_path: Path
) -> None:
    """The key is not in the backup; with it, brought by hand, they are read."""
    source = Machine(postgres, tmp_path / "with secrets")
    cp = source.cp
    cp.start("--registry=cp.example.com")
    tenant = Tenant(cp)
    tenant.post(name="secret", secrets={"a": "hunter2"})
    cp.stop()
    key = cp.secrets_key_file.read_bytes()
    out = source.back_up(tmp_path / "secrets.gpg")
    inside = decrypt(out)
    assert key not in inside
    assert b"hunter2" not in inside
    target.restore(out)
    (row,) = target.cp.query("SELECT sealed, key_sha256 FROM workload_secrets")
    assert b"hunter2" not in row["sealed"]
    with psycopg.connect(target.cp.postgres.dsn(target.cp.database)) as connection:
        found = "SELECT open_secrets(workload_no, revision) FROM workload_secrets"
        assert connection.execute(found).fetchone() == (None,)
        other = target.cp.secrets_key_file.read_text()
        connection.execute("SELECT set_config('openinfra.secrets_key', %s, false)", [other])
        assert connection.execute(found).fetchone() == (None,)
        connection.execute("SELECT set_config('openinfra.secrets_key', %s, false)", [key.decode()])
        assert connection.execute(found).fetchone() == (b'{"a": "hunter2"}',)
    done = target.cp.command("doctor")
    assert "the secrets of 1 workloads cannot be read with" in done.stdout
    target.cp.start("--registry=cp.example.com")
    tenant.cp = target.cp
    (found,) = tenant.call("GET")[1]["workloads"]
    assert found["reasons"][0] == cp_server.SECRETS_LOST
    assert tenant.post(200, name="secret", secrets={"a": "hunter2"})["revision"] == 2
    assert target.cp.command("doctor", "--invariants").returncode == 0
    target.cp.stop()
    # Again, with the key.
    cp_server.write_file(target.cp.secrets_key_file, key, 0o600)
    target.restore(out, "--replace")
    assert target.cp.command("doctor", "--invariants").returncode == 0
    target.cp.start("--registry=cp.example.com")
    assert tenant.post(200, name="secret", secrets={"a": "hunter2"})["revision"] == 1
    target.cp.stop()


def test_customers_without_a_host_are_in_the_way(
    backup: Path, postgres: Postgres, tmp_path: Path
) -> None:
    machine = Machine(postgres, tmp_path / "other")
    added = machine.cp.command("add-customer", "--name=Kuma", "--namespace=kuma")
    assert added.returncode == 0, added.stderr
    done = machine.run("restore", str(backup))
    check_failed(done, EXIT_PROTECT, "this database has 0 hosts and 1 customers", "--replace")
    assert machine.cp.query("SELECT name FROM customers") == [{"name": "Kuma"}]


def test_an_owner_without_other_rights(
    source: Machine, backup: Path, spare_postgres: Postgres, tmp_path: Path
) -> None:
    """As setup_cp.py makes it: the owner of the database is no superuser, and logs in as itself."""
    target = Machine(spare_postgres, tmp_path / "target")
    spare_postgres.execute("postgres", "DROP ROLE IF EXISTS plain_owner")
    spare_postgres.execute("postgres", "CREATE ROLE plain_owner LOGIN")
    spare_postgres.execute("postgres", "CREATE DATABASE plain OWNER plain_owner TEMPLATE template0")
    dsn = spare_postgres.dsn("plain", "plain_owner")
    asyncio.run(cp_server.migrate(dsn, "openinfra"))
    target.cp.database = "plain"
    target.cp.set_dsn(spare_postgres.dsn("plain", "openinfra"))
    cp_server.write_file(target.owner_dsn, dsn.encode(), 0o600)
    assert "left out: wg0.conf" in target.restore(backup)
    assert target.rows() == source.rows()
    target.restore(target.back_up(tmp_path / "again.gpg"), "--replace")
    assert target.rows() == source.rows()
    target.cp.start()
    target.cp.check_invariants()
    target.cp.stop()


def test_an_older_schema_is_restored_and_migrated(
    spare_postgres: Postgres, target: Machine, source: Machine, tmp_path: Path
) -> None:
    old = Machine(spare_postgres, tmp_path / "old")
    tables = (
        "workload_secrets, assignments, workloads, customer_keys, customer_namespaces, customers,"
        " usage_hours, usage_runs, usage_counters, usage_egress, rate_cards, usage_windows,"
        " usage_lines, usage_totals, ledger_accounts, ledger_transactions, ledger_entries, invoices"
    )
    facts = ["engine_version", "unready", "offered_cpu_milli", "offered_memory_bytes"]
    facts += ["drained_at", "labels", "takes_secrets"]
    for sql in (
        "DROP INDEX hosts_revoked",
        "DROP INDEX audit_log_wg_key",
        f"DROP TABLE {tables}",
        f"ALTER TABLE hosts {', '.join(f'DROP {fact}' for fact in facts)}",
        "ALTER TABLE liveness DROP desired_revision, DROP seen_us, DROP session_at",
        "ALTER TABLE cp_state DROP restored_at, DROP secrets_key_sha256, DROP currency",
        "DROP FUNCTION secrets_key_sha256, seal_secrets, open_secrets, are_secrets_lost",
        "DROP FUNCTION prune_secrets, prune_hours, note_run, check_entries, check_transactions",
        "DROP FUNCTION check_invoice, check_month",
        "DROP EXTENSION pgcrypto",
        "DELETE FROM schema_migrations WHERE number >= 4",
    ):
        spare_postgres.execute(old.cp.database, sql)
    check_failed(old.run("backup", f"--out={tmp_path / 'x'}"), EXIT_ERROR, "migrate")
    path = forge(old, tmp_path / "old.gpg", schema=3)
    assert "applied 4 " in target.restore(path)
    newest = [{"n": cp_server.SCHEMA_VERSION}]
    assert target.cp.query("SELECT max(number) AS n FROM schema_migrations") == newest
    target.cp.start()
    target.cp.check_invariants()
    target.cp.stop()


def forge(machine: Machine, path: Path, **changes: Any) -> Path:
    """A backup by hand, with another manifest."""
    dsn = machine.cp.postgres.dsn(machine.cp.database)
    argv = ["pg_dump", "--format=custom", f"--dbname={dsn}"]
    dump = io.BytesIO(subprocess.run(argv, capture_output=True, check=True).stdout)
    files = {"jwt-keys.json": machine.cp.keys_file.read_bytes(), **changes.pop("files", {})}
    listed = {
        **cp_server.describe_files(files),
        "database.dump": cp_server.copy_hashed(dump, io.BytesIO()),
    }
    manifest = {"format": 1, "version": "9.9.9", "schema": 4, "role": "openinfra", "hosts": 0}
    manifest |= {"created_at": "2026-01-01T00:00:00Z", "files": listed, **changes}
    with path.open("wb") as target:
        pipes = {"stdin": subprocess.PIPE, "stdout": target}
        with cp_server.start_gpg(PASSPHRASE.encode(), *cp_server.GPG_ENCRYPT, **pipes) as gpg:
            cp_server._write_tar(gpg.stdin, manifest, files, dump)
    return path


# Refusals: what is there stays as it is


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": cp_server.SCHEMA_VERSION + 1}, ["schema version", "use cp_server.py 9.9.9"]),
        ({"format": 2}, ["a form that this program does not know"]),
        ({"schema": "4"}, ["a form that this program does not know"]),
        ({"role": "other"}, ["the role other"]),
        ({"files": {"cp.env": b"NEWER_KEY=1\n"}}, ["unknown key 'NEWER_KEY'"]),
    ],
)
def test_a_backup_of_another_program(
    source: Machine, target: Machine, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = forge(source, tmp_path / "forged.gpg", **changes)
    before = target.rows()
    code = EXIT_USAGE if "files" in changes else EXIT_PROTECT
    check_failed(target.run("restore", str(path)), code, *words)
    assert target.rows() == before


def test_a_backup_whose_manifest_does_not_fit(
    source: Machine, target: Machine, tmp_path: Path
) -> None:
    for number, changes in enumerate(({"files": {"../evil": b""}}, {"files": {"more": b""}})):
        path = forge(source, tmp_path / f"{number}.gpg", **changes)
        check_failed(target.run("restore", str(path)), EXIT_ERROR, "damaged")
    assert not (tmp_path.parent / "evil").exists()


def test_damage(source: Machine, backup: Path, target: Machine, tmp_path: Path) -> None:
    """Cut short, altered, no backup at all: said before anything is touched."""
    whole = backup.read_bytes()
    before = target.rows()
    bad = {f"cut at {n}": whole[:n] for n in (0, 1, 20, 1000, len(whole) // 2, len(whole) - 1)}
    for at in (30, 300, len(whole) // 2, len(whole) - 10):
        bad[f"altered at {at}"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    bad["no backup"] = b"hello\n" * 1000
    for what, raw in bad.items():
        path = tmp_path / "bad.gpg"
        path.write_bytes(raw)
        done = target.run("restore", str(path))
        assert done.returncode == EXIT_ERROR, (what, done)
        check_failed(done, EXIT_ERROR, "damaged or cut short" if what != "altered at 30" else "")
    check_failed(target.run("restore", str(tmp_path / "none")), EXIT_ERROR, "No such file")
    assert target.rows() == before


def test_passphrases(backup: Path, target: Machine) -> None:
    before = target.rows()
    cp_server.write_file(target.passphrase, b"another horse\n", 0o600)
    check_failed(target.run("restore", str(backup)), EXIT_ERROR, "passphrase is not the one")
    for raw in (b"", b"\n", b"short\n", b"two lines\nof them\n", b"with\0 a zero byte"):
        cp_server.write_file(target.passphrase, raw, 0o600)
        check_failed(target.run("restore", str(backup)), EXIT_ERROR, "one line of 8 bytes")
    target.passphrase.chmod(0o640)
    check_failed(target.run("restore", str(backup)), EXIT_PROTECT, "chmod 600")
    target.passphrase.unlink()
    check_failed(target.run("restore", str(backup)), EXIT_ERROR, "is missing")
    assert target.rows() == before


def test_a_database_that_is_served_or_away(
    spare_postgres: Postgres, source: Machine, backup: Path, target: Machine, tmp_path: Path
) -> None:
    target.cp.start()
    check_failed(target.run("restore", str(backup)), EXIT_LATER, "systemctl stop openinfra-cp")
    out = target.back_up(tmp_path / "while-served.gpg")  # a backup may be made at any time
    assert out.stat().st_size > 10_000
    target.cp.stop()
    spare_postgres.stop()
    try:
        check_failed(target.run("restore", str(backup)), EXIT_LATER, "cannot reach PostgreSQL")
        check_failed(target.run("backup", f"--out={out}"), EXIT_LATER, "cannot reach PostgreSQL")
    finally:
        spare_postgres.start()


def test_full_disks(source: Machine, backup: Path, target: Machine, tmp_path: Path) -> None:
    before = target.rows()
    small = tmp_path / "small"
    small.mkdir()
    for kib in (8, 40, 120):
        mount = f"mount -t tmpfs -o size={kib}k tmpfs"
        script = f'{mount} {small}; "$@"; code=$?; ls -A {small}; exit $code'
        done = source.run(
            "backup", f"--out={small}/b", prefix=("unshare", "-m", "sh", "-c", script, "sh")
        )
        check_failed(done, EXIT_ERROR, "No space left")
    script = 'mount -t tmpfs -o size=8k tmpfs /var/tmp; "$@"'
    done = target.run("restore", str(backup), prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    check_failed(done, EXIT_ERROR, "No space left")
    assert target.rows() == before


def test_a_database_that_refuses_in_the_middle(backup: Path, target: Machine) -> None:
    """At the last step, when all rows are there, an index is refused: all is as it was."""
    function = "CREATE FUNCTION other.veto() RETURNS event_trigger LANGUAGE plpgsql AS"
    function += " $$ BEGIN RAISE EXCEPTION 'not today'; END $$"
    trigger = "CREATE EVENT TRIGGER veto ON ddl_command_end WHEN TAG IN ('CREATE INDEX')"
    trigger += " EXECUTE FUNCTION other.veto()"
    for sql in ("CREATE SCHEMA other", function, trigger):
        target.cp.postgres.execute(target.cp.database, sql)
    before = target.rows()
    done = target.run("restore", str(backup))
    check_failed(done, EXIT_ERROR, "the database was left as it was", "not today")
    assert target.rows() == before


def test_kill_9_at_any_time_and_then_the_same_command(
    source: Machine, backup: Path, target: Machine, temporary: Path
) -> None:
    """The database is the old one or the restored one; the same command with --replace goes on."""
    empty = target.rows()
    wanted = source.rows()
    for number in range(12):
        argv = target.argv("restore", str(backup), "--replace")
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            time.sleep(0.3 + 0.1 * number)
            child.kill()
        time.sleep(0.3)
        with psycopg.connect(target.cp.postgres.dsn(target.cp.database)) as connection:
            connection.execute("SELECT count(*) FROM hosts")
        assert target.rows() in (empty, wanted)
    target.restore(backup, "--replace")
    assert target.rows() == wanted
    for path in temporary.glob("openinfra-gpg-*"):  # of those that were killed
        os.utime(path, (0, 0))
    target.restore(backup, "--replace")  # and nothing is left, which `temporary` sees


def test_only_own_and_old_homes_of_gpg_are_removed(
    source: Machine, tmp_path: Path, temporary: Path
) -> None:
    old, young, shared, other = (temporary / f"openinfra-gpg-test{number}" for number in range(4))
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    link = temporary / "openinfra-gpg-test-link"
    link.symlink_to(kept)
    for path in (old, young, shared, other):
        path.mkdir(mode=0o700)
        (path / "random_seed").touch()
    shared.chmod(0o755)
    os.chown(other, 1, 1)
    for path in (old, shared, other, kept):
        os.utime(path, (0, 0))
    os.utime(link, (0, 0), follow_symlinks=False)
    try:
        source.back_up(tmp_path / "b.gpg")
        assert [p for p in (old, young, shared, other, link, kept) if not p.exists()] == [old]
    finally:
        link.unlink()
        for path in (young, shared, other):
            shutil.rmtree(path, ignore_errors=True)


def test_no_secret_is_on_a_command_line(source: Machine, target: Machine, tmp_path: Path) -> None:
    out, trace = tmp_path / "b.gpg", tmp_path / "trace"
    strace = ("strace", "-f", "-qq", "-s", "4000", "-e", "trace=execve", "-o", str(trace))
    assert source.run("backup", f"--out={out}", prefix=strace).returncode == 0
    text = trace.read_text()
    assert target.run("restore", str(out), prefix=strace).returncode == 0
    text += trace.read_text()
    for program in ("pg_dump", "gpg", "pg_restore", "psql"):
        assert re.search(rf'execve\("[^"]*/{program}"', text), program
    for secret in (PASSPHRASE, "hunter2", "c2VjcmV0"):
        assert secret not in text
