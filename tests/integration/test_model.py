"""A model test: operators, agents, copied disks, clocks and crashes in any order.

Hypothesis draws the steps; tests/model.py says what each must answer and what must be kept; real
control planes and a real PostgreSQL do it. After every step the database is as the model is.

There are two control planes on the one database: a call whose reply is to be lost goes to the
second, a test build that drops each reply after its commit (`=lose`). The clock of the database is
jumped by moving all times that it has stored into the past, as the superuser, in one transaction;
then what the control planes do from time to time (marking silent hosts, forgetting old sessions) is
done at once. The copies of cp_server.py that serve here have the times of TUNED.

OPENINFRA_SEED repeats a run. A failure is made as short as it gets and printed step by step.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import math
import secrets
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import hypothesis
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import cp_server
from proto import openinfra_pb2 as pb
from tests import failpoints
from tests.harness import (
    BOOT_ID,
    Client,
    ControlPlane,
    Netns,
    Postgres,
    Refused,
    RemoteStub,
    RpcTool,
    facts,
    make_netns,
    read_seed,
)
from tests.model import DAY_S, HOUR_S, Asked, Invite, Model
from tests.model import Answer as Expected
from tests.model import Host as ModelHost

T = TypeVar("T")

STEPS = {"tunnel": 7_000, "no tunnel": 3_000}  # in each run; together 10,000
STEPS_IN_EXAMPLE = 50
EXAMPLES_IN_ROUND = 20
EXAMPLE_S = 20  # real seconds after which an example does nothing more (see DRIFT_S)
BACK_S = 10  # for the control plane to find a PostgreSQL that was started again

# So that 10,000 steps take minutes: a heartbeat waits 2 ms for others instead of 100, and calls of
# one address are not held back, since a step here is what a host does in a day.
TUNED = {"BATCH_S = 0.1": "BATCH_S = 0.002", "PEER_CALLS_S = 20.0": "PEER_CALLS_S = 1e6"}

WALLETS = (
    "7YttLkHDoNj9wyDur5pM1ejNaAvT9X4eqaYcHQqtj2G5",
    "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM",
    "4Nd1mBQtrMJVYVfKf2PJy9NZUZdTAsp7D4xWLs4gDB4T",
)
KEYS = tuple(base64.b64encode(bytes([n]) * 32).decode() for n in range(1, 6))
ADDRESSES = tuple(f"10.77.16.{n}" for n in range(2, 6))
DISKS = 3
ACTOR = cp_server.Actor("cli:tester")
LOST = "the reply was lost by a failpoint"
METHODS = ("Register", "Resume", "Heartbeat")
LOSE = ",".join(f"{method}.after_commit=lose" for method in METHODS)

# All that the model knows, as the database has it.
SQL_STATE = """
SELECT jsonb_build_object(
  'invites', (SELECT jsonb_object_agg(invite_id, jsonb_build_array(
      CASE WHEN consumed_at IS NOT NULL THEN 'used' WHEN revoked_at IS NOT NULL THEN 'revoked'
        WHEN expires_at <= now() THEN 'expired' ELSE 'open' END,
      host_id, CASE WHEN wg_ip_held AND expires_at > now() THEN host(wg_ip) END)) FROM invites),
  'hosts', (SELECT jsonb_object_agg(encode(host_secret_sha256, 'hex'), jsonb_build_array(
      host_id, status, invite_id, host(wg_ip), wg_pubkey, payout_pubkey, requested_payout_pubkey,
      ever_assigned, hostname)) FROM hosts),
  'sessions', (SELECT jsonb_object_agg(encode(session_sha256, 'hex'), jsonb_build_array(
      host_id, ended_at IS NULL, opened_by = 'takeover')) FROM sessions JOIN hosts USING (host_no)),
  'namespaces', (SELECT jsonb_object_agg(namespace, approved_at IS NOT NULL) FROM namespaces)
) AS state
"""
SQL_TIMES = """
SELECT table_name, string_agg(format('%1$I = %1$I - make_interval(secs => %%(by_s)s)', column_name),
  ', ') AS changes
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND data_type LIKE 'timestamp%%'
  AND table_name <> 'schema_migrations' AND column_name <> 'alive_at'
GROUP BY table_name ORDER BY table_name
"""
TABLES = ("sessions", "liveness", "hosts", "invites", "namespaces", "audit_log")


class Door:
    """The control plane's own operations, on a loop of this process."""

    def __init__(self, dsn: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.db = self.run(self.make(dsn))

    async def make(self, dsn: str) -> cp_server.Database:
        """The database; it has to be made on the loop."""
        db = cp_server.Database(dsn, size=1)
        await db.open()
        return db

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        """Let go of all of it."""
        self.run(self.db.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class World:
    """The real parts: PostgreSQL, two control planes, and the ways to them."""

    def __init__(self, postgres: Postgres, directory: Path, netns: Netns | None) -> None:
        scripts = failpoints.build(directory / "scripts")
        source = (scripts / "cp_server.py").read_text()
        for before, after in TUNED.items():
            assert source.count(f"\n{before} ") == 1
            source = source.replace(f"\n{before} ", f"\n{after} ")
        (scripts / "cp_server.py").write_text(source)
        self.postgres = postgres
        self.tunnel = netns is not None
        self.cp = ControlPlane(postgres, directory / "cp", netns=netns, scripts=scripts)
        self.losing = ControlPlane(postgres, directory / "losing", netns=netns, scripts=scripts)
        self.losing.database = self.cp.database
        self.losing.set_dsn(postgres.dsn(self.cp.database, "openinfra"))
        if netns:
            self.losing.grpc_port, self.losing.http_port = 9093, 8081
        self.cp.start()
        self.losing.start(OPENINFRA_FAILPOINT=LOSE)
        self.door = Door(postgres.dsn(self.cp.database, "openinfra"))
        self.tool = RpcTool(netns) if netns else None
        self.clients = [] if netns else [Client(self.cp), Client(self.losing)]
        self.connect()
        times = self.super.execute(SQL_TIMES).fetchall()
        self.jumps = [f"UPDATE {table} SET {changes}" for table, changes in times]  # noqa: S608
        self.steps = 0
        self.examples = 0
        self.seen: Counter[str] = Counter()
        self.shaken_until = 0.0  # PostgreSQL was restarted: the pools may not know yet

    def connect(self) -> None:
        """The superuser's connection."""
        dsn = self.postgres.dsn(self.cp.database)
        self.super = psycopg.connect(dsn, autocommit=True)

    def close(self) -> None:
        """End all of it."""
        self.super.close()
        self.door.close()
        for client in self.clients:
            client.channel.close()
        if self.tool:
            self.tool.close()
        for cp in (self.cp, self.losing):
            cp.stop(signal.SIGKILL)
            assert "Traceback" not in cp.log, cp.log

    def force(self, statements: list[str], **values: object) -> None:
        """Change the database past its triggers; the lock keeps the sweeps out, which lock more."""
        with self.super.transaction():
            self.super.execute("SET LOCAL session_replication_role = replica")
            self.super.execute("LOCK TABLE cp_state IN EXCLUSIVE MODE")
            for statement in statements:
                self.super.execute(statement.encode(), values or None)

    def reset(self) -> None:
        """An empty database for the next example."""
        self.examples += 1
        self.force([f"DELETE FROM {table}" for table in TABLES])  # noqa: S608

    def jump(self, by_s: float) -> None:
        """Move the database's clock; look for silent hosts and for what may be forgotten."""
        self.force(self.jumps, by_s=by_s)
        self.operate(lambda: cp_server.sweep(self.door.db, gap_s=HOUR_S))
        self.operate(lambda: cp_server.prune(self.door.db))

    def operate(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """One operation as the operator; raises cp_server.Refusal."""
        return self.insist(lambda: self.door.run(make()), cp_server.Refusal)

    def call(self, method: str, request: Any, address: str | None, lose: bool) -> Any:
        """One RPC; raises Refused."""
        cp = self.losing if lose else self.cp
        stub: Any
        if self.tool:
            stub = RemoteStub(self.tool, f"{address}:{cp.grpc_port}")
        else:
            stub = self.clients[lose].stub

        def send() -> Any:
            try:
                return getattr(stub, method)(request, timeout=10)
            except grpc.RpcError as error:
                raise Refused(error) from None

        return self.insist(send, Refused)

    def insist(self, work: Callable[[], T], refused: type[Exception]) -> T:
        """Its result; after a restart of PostgreSQL it may be told for a while to try later."""
        while True:
            try:
                found = work()
            except refused as error:
                is_away = "database gives no answer" in str(error)
                if is_away and time.monotonic() < self.shaken_until:
                    time.sleep(0.05)
                    continue
                raise
            return found

    def restart(self, what: str) -> None:
        """Stop and start one of the parts; nothing is in flight."""
        if what.startswith("postgres"):
            self.postgres.stop(signal.SIGQUIT if "crash" in what else signal.SIGINT)
            self.postgres.start()
            self.super.close()
            self.connect()
            self.shaken_until = time.monotonic() + BACK_S
        elif "crash" in what:
            self.cp.stop(signal.SIGKILL)
            self.cp.start()
        else:
            assert self.cp.stop() == 0
            self.cp.start()

    def read_state(self) -> dict[str, Any]:
        """What the database holds."""
        row = self.super.execute(SQL_STATE).fetchone()
        assert row
        return {name: rows or {} for name, rows in row[0].items()}


@dataclasses.dataclass
class Disk:
    """A data directory and agent.env, as agent.py keeps them, and the machine that it is in."""

    address: str | None
    key: str | None
    wallet: str | None
    token: int = -1  # index of the invite, or none yet
    secret: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(32))
    session: bytes = b""
    proposed: bytes | None = dataclasses.field(default_factory=lambda: secrets.token_bytes(32))
    registered: bool = False


def throw(error: Exception) -> Any:
    """Raise it."""
    raise error


def pick(choices: Any, number: int) -> Any:
    """One of them."""
    return choices[number % len(choices)]


def has_hosts(fleet: Fleet) -> bool:
    """There are hosts that were not revoked."""
    return any(host.status != "revoked" for host in fleet.model.hosts)


N = st.integers(0, 59)  # indexes of anything, and dice
LOSES = st.sampled_from((False, False, False, True))


class Fleet(RuleBasedStateMachine):
    """The steps."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.reset()
        self.began = time.monotonic()
        tunnel = self.world.tunnel
        self.model = Model(tunnel)
        self.addresses: tuple[str | None, ...] = ADDRESSES if tunnel else (None,)
        self.keys: tuple[str | None, ...] = KEYS if tunnel else (None, *KEYS)
        self.wallets: tuple[str | None, ...] = (None, *WALLETS)
        self.disks = [
            Disk(pick(self.addresses, n), pick(self.keys, n), pick(WALLETS, n // 2))
            for n in range(DISKS)
        ]
        self.tokens: list[tuple[str, Invite]] = []
        self.secrets = [disk.secret for disk in self.disks]
        self.sessions: list[bytes] = []
        self.sent: list[tuple[str, Invite | None, Any, Asked]] = []
        self.steps = 0
        self.restarts = 0
        self.bursts = 0

    # What every step does

    def can(self) -> bool:
        """There is time left for another step; counts it."""
        if time.monotonic() - self.began > EXAMPLE_S:
            return False
        self.steps += 1
        self.world.steps += 1
        return True

    def check(self, what: str, expected: Expected, call: Callable[[], Any], lose: bool) -> Any:
        """Make a call and compare its answer; gives back the reply, or None."""
        try:
            reply = call()
            got = "accepted"
        except Refused as refused:
            reply, got = None, refused.reason or str(refused)
            note(f"  {what}: {refused.message}")
            if lose and LOST in refused.message:
                got = "lost"
        self.world.seen[f"{what} {got}"] += 1
        note(f"  {what}: {got}")
        if expected.host is None:
            assert got in expected.reasons, f"{got}, not one of {sorted(expected.reasons)}"
        else:
            assert got == ("lost" if lose else "accepted"), got
        return reply

    def check_standing(self, host: ModelHost, standing: pb.Standing) -> None:
        """What the host is told of itself."""
        assert standing.status == pb.HostStatus.Value(f"HOST_STATUS_{host.status.upper()}")
        assert standing.assignable == self.model.is_assignable(host)
        assert bool(standing.reasons) == (not standing.assignable)

    def check_opened(self, expected: Expected, reply: Any) -> None:
        """The reply of Register or Resume."""
        host = expected.host
        assert host
        host.host_id = host.host_id or reply.host_id
        assert reply.host_id == host.host_id
        assert reply.onchain_payout == (host.wallet is not None)
        assert reply.heartbeat_interval_s == 30
        self.check_standing(host, reply.standing)

    def send(
        self, method: str, token: tuple[str, Invite | None], asked: Asked, lose: bool
    ) -> Expected | None:
        """Register or Resume; gives back what it was, None when the reply was lost."""
        text, invite = token
        common: dict[str, Any] = {"host_secret": asked.secret, "session": asked.session}
        common |= {"payout_pubkey": asked.wallet or "", "wg_pubkey": asked.key or ""}
        request: Any
        if method == "Register":
            told = facts(hostname=asked.hostname)
            request = pb.RegisterRequest(invite_token=text, facts=told, **common)
            expected = self.model.register(invite, asked)
        else:
            request = pb.ResumeRequest(previous_session=asked.previous, **common)
            expected = self.model.resume(asked)
        self.sent.append((method, invite, request, asked))
        self.sessions.append(asked.session)
        call = partial(self.world.call, method, request, asked.address, lose)
        reply = self.check(method, expected, call, lose)
        if reply is None:
            return None if expected.host else expected
        self.check_opened(expected, reply)
        if method == "Register":
            assert expected.host
            assert reply.invite_id == expected.host.invite.invite_id
        return expected

    def beat(self, session: bytes, address: str | None, paused: bool, lose: bool) -> None:
        """A heartbeat."""
        request = pb.HeartbeatRequest(session=session, seq=1, boot_id=BOOT_ID, paused=paused)
        call = partial(self.world.call, "Heartbeat", request, address, lose)
        self.check_beat(session, address, paused, call, lose)

    def check_beat(
        self, session: bytes, address: str | None, paused: bool, call: Callable[[], Any], lose: bool
    ) -> None:
        """Its answer."""
        expected = self.model.heartbeat(session, address, "paused" if paused else "online")
        reply = self.check("Heartbeat", expected, call, lose)
        if reply is not None:
            assert expected.host
            self.check_standing(expected.host, reply.standing)

    def operate(self, what: str, path: str, body: object, work: Any) -> str:
        """An act of the operator, by HTTP where it can be reached; gives back the refusal."""
        method, _, url = path.partition(" ")
        if self.world.tunnel:
            try:
                self.answer = self.world.operate(work)
                code = ""
            except cp_server.Refusal as refusal:
                code = refusal.code
        else:
            code = self.ask(method, f"/api/v1/admin/{url}", body)
        self.world.seen[f"{what} {code or 'done'}"] += 1
        note(f"  {what}: {code or 'done'}")
        return code

    def ask(self, method: str, path: str, body: object) -> str:
        """One HTTP request; gives back the refusal."""
        while True:
            status, self.answer = self.world.cp.call(method, path, body)
            if status != 503 or time.monotonic() > self.world.shaken_until:
                break
            time.sleep(0.05)
        return str(self.answer["error"]["code"]).upper() if status >= 400 else ""

    # The operator

    def mint(self, order: dict[str, Any]) -> None:
        """Mint an invite."""
        expected = Invite(
            "",
            self.model.now_s + order["ttl_hours"] * HOUR_S,
            order["payout_pubkey"],
            order["wg_ip"],
            order["wg_pubkey"],
            order["approve_first_wallet"],
        )
        db = self.world.door.db

        async def work() -> dict[str, str]:
            made = await cp_server.mint_invite(db, ACTOR, cp_server.InviteOrder(**order))
            return {"token": made[0]}

        body = {key: value for key, value in order.items() if value is not None}
        code = self.operate("mint", "POST host-invites", body, work)
        if not code:
            expected.invite_id = self.answer["token"].split("_")[1]
            self.tokens.append((self.answer["token"], expected))
        assert code == ("" if self.model.mint(expected) else "CONFLICT")

    @initialize(numbers=st.lists(N, min_size=4, max_size=4), wallets=N)
    def begin(self, numbers: list[int], wallets: int) -> None:
        """A few invites to begin with, and machines that have them."""
        self.can()
        for n, number in enumerate(numbers):
            order = self.make_order(wallets + n, number if number % 4 == 0 else 1, 1, number, 1)
            if n == 0 and wallets % 3 == 0:
                order["wg_pubkey"] = self.disks[0].key
            self.mint(order)
        for n, disk in enumerate(self.disks[:2]):
            disk.token = n % len(self.tokens)
            self.start(disk, lose=wallets % 8 == n)

    def make_order(self, wallet: int, address: int, key: int, approve: int, ttl: int) -> Any:
        """What an operator asks for; most invites keep no address and no key."""
        free = self.addresses if address % 3 == 0 else (None,)
        pinned = KEYS if key % 3 == 0 else (None,)
        return {
            "payout_pubkey": pick((None, *self.wallets), wallet),
            "wg_ip": pick(free, address // 3),
            "wg_pubkey": pick(pinned, key // 3),
            "approve_first_wallet": approve % 2 == 0,
            "ttl_hours": pick((24, 1, 72), ttl),
        }

    @precondition(lambda self: len(list(self.model.open_invites())) < 4)
    @rule(wallet=N, address=N, key=N, approve=N, ttl=N)
    def mint_one(self, wallet: int, address: int, key: int, approve: int, ttl: int) -> None:
        """The operator mints an invite."""
        if self.can():
            self.mint(self.make_order(wallet, address, key, approve, ttl))

    @precondition(lambda self: any(self.model.open_invites()))
    @rule(which=N)
    def revoke_invite(self, which: int) -> None:
        """The operator takes an invite back, perhaps one that does not exist."""
        if not self.can():
            return
        invite = pick([None, *(invite for _, invite in self.tokens)], which)
        invite_id = invite.invite_id if invite else "a" * 16
        db = self.world.door.db
        code = self.operate(
            "revoke invite",
            f"DELETE host-invites/{invite_id}",
            None,
            lambda: cp_server.revoke_invite(db, ACTOR, invite_id),
        )
        if invite is None:
            assert code == "NOT_FOUND"
        else:
            assert code == ("" if self.model.revoke_invite(invite) else "CONFLICT")

    @precondition(lambda self: len(self.model.hosts) > 1)
    @rule(which=N)
    def revoke_host(self, which: int) -> None:
        """The operator removes a host."""
        if which % 3 or not self.can():
            return
        host = pick(self.model.hosts, which // 3)
        db, host_id = self.world.door.db, uuid.UUID(host.host_id)
        code = self.operate(
            "revoke host",
            f"POST hosts/{host_id}/revoke",
            None,
            lambda: cp_server.revoke_host(db, ACTOR, host_id),
        )
        assert code == ""
        self.model.revoke_host(host)

    @precondition(lambda self: any(h.status == "quarantined" for h in self.model.hosts))
    @rule(which=N)
    def release_host(self, which: int) -> None:
        """The operator releases a host, most often one that needs it."""
        if not self.can():
            return
        quarantined = [host for host in self.model.hosts if host.status == "quarantined"]
        host = pick(quarantined if quarantined and which % 4 else self.model.hosts, which // 4)
        db, host_id = self.world.door.db, uuid.UUID(host.host_id)
        code = self.operate(
            "release host",
            f"POST hosts/{host_id}/release",
            None,
            lambda: cp_server.release_host(db, ACTOR, host_id),
        )
        assert code == ("" if self.model.release_host(host) else "CONFLICT")

    @precondition(lambda self: self.steps % 8 == 2 or not all(self.model.namespaces.values()))
    @rule(which=N)
    def approve(self, which: int) -> None:
        """The operator approves a wallet's namespace."""
        if not self.can():
            return
        wallet = pick(WALLETS, which)
        db, name = self.world.door.db, f"solana:{wallet}"
        code = self.operate(
            "approve",
            f"POST namespaces/{name}/approve",
            None,
            lambda: cp_server.approve_namespace(db, ACTOR, name),
        )
        assert code == ("" if self.model.approve(wallet) else "NOT_FOUND")

    @precondition(has_hosts)
    @rule(which=N)
    def assign(self, which: int) -> None:
        """A workload is assigned to a host (there are none yet: the superuser notes it)."""
        for host in self.one_host(which):
            host.ever_assigned = True
            self.world.super.execute(
                "UPDATE hosts SET ever_assigned = true WHERE host_id = %s", [host.host_id]
            )

    # Agents, as agent.py behaves

    @rule(which=N, invite=N, lose=LOSES)
    def agent_gets_an_invite(self, which: int, invite: int, lose: bool) -> None:
        """The provider puts another token into agent.env and starts the agent."""
        disk = pick(self.disks, which)
        if not self.tokens or not self.can():
            return
        disk.token = len(self.tokens) - 1 - invite % min(3, len(self.tokens))
        self.start(disk, lose)

    @rule(which=N, lose=LOSES)
    def agent_starts(self, which: int, lose: bool) -> None:
        """An agent starts on what is on its disk, or goes on trying."""
        disk = pick(self.disks, which)
        if (disk.token >= 0 or disk.registered) and self.can():
            self.start(disk, lose)

    def start(self, disk: Disk, lose: bool) -> None:
        """Register or Resume, and save what was agreed."""
        if disk.proposed is None:
            disk.proposed = secrets.token_bytes(32)
        method = "Resume" if disk.registered else "Register"
        asked = Asked(disk.secret, disk.proposed, disk.wallet, disk.key, disk.address, disk.session)
        token = ("", None) if disk.registered else self.tokens[disk.token]
        found = self.send(method, token, asked, lose)
        if found is None:
            return
        if found.host:
            disk.session, disk.proposed, disk.registered = asked.session, None, True
        elif "SESSION_SUPERSEDED" in found.reasons:  # the next start proposes another one
            disk.proposed = None

    @precondition(has_hosts)
    @rule(which=N, paused=N, lose=LOSES)
    def agent_beats(self, which: int, paused: int, lose: bool) -> None:
        """An agent that runs sends a heartbeat."""
        disk = pick(self.disks, which)
        if disk.session and self.can():
            self.beat(disk.session, disk.address, paused % 4 == 0, lose)

    @rule(which=N, paused=N)
    def agent_lives(self, which: int, paused: int) -> None:
        """An agent starts and sends a heartbeat."""
        disk = pick(self.disks, which)
        if (disk.token >= 0 or disk.registered) and self.can():
            self.start(disk, lose=False)
            if disk.session:
                self.beat(disk.session, disk.address, paused % 4 == 0, lose=False)

    @rule(which=N, over=N, moved=N)
    def copy_a_disk(self, which: int, over: int, moved: int) -> None:
        """A data directory and WireGuard key are copied over another's; at its address or not."""
        one, other = pick(self.disks, which), pick(self.disks, over)
        if one is other or not self.can():
            return
        address = other.address if moved % 2 else one.address
        self.disks[self.disks.index(other)] = dataclasses.replace(one, address=address)

    @rule(which=N, key=N, wallet=N)
    def lose_a_disk(self, which: int, key: int, wallet: int) -> None:
        """An agent without its identity at the same address; most often with the same key."""
        disk = pick(self.disks, which)
        if not self.can():
            return
        if key % 4 == 0:
            disk.key = pick(self.keys, key // 4)
        fresh = Disk(disk.address, disk.key, pick(self.wallets, wallet), disk.token)
        self.disks[self.disks.index(disk)] = fresh
        self.secrets.append(fresh.secret)

    # Anybody else: each field from what was ever used

    @rule(token=N, secret=N, session=N, wallet=N, twist=N, lose=LOSES)
    def register(
        self, token: int, secret: int, session: int, wallet: int, twist: int, lose: bool
    ) -> None:
        """A Register with any of the tokens and secrets."""
        if self.can():
            known = [self.bogus(token), *self.tokens[::-1]]
            asked = self.ask_for(secret, session, wallet, twist, 0)
            self.send("Register", pick(known, token), asked, lose)

    @precondition(lambda self: any(i.revoked and not i.host for _, i in self.tokens))
    @rule(which=N, secret=N, session=N, wallet=N, lose=LOSES)
    def register_revoked(
        self, which: int, secret: int, session: int, wallet: int, lose: bool
    ) -> None:
        """A Register with an invite that the operator took back."""
        if self.can():
            tokens = [token for token in self.tokens if token[1].revoked and not token[1].host]
            asked = self.ask_for(secret, session, wallet, 0, 0)
            self.send("Register", pick(tokens, which), asked, lose)

    def bogus(self, number: int) -> tuple[str, Invite | None]:
        """A token that nobody minted, with a secret or an id that somebody did."""
        invite_id = pick(self.tokens, number)[1].invite_id if self.tokens else "b" * 16
        invite_id = invite_id if number % 2 else cp_server.new_public_id()
        return cp_server.render_token("oi1", invite_id, secrets.token_bytes(32)), None

    @rule(secret=N, session=N, previous=N, wallet=N, twist=N, lose=LOSES)
    def resume(
        self, secret: int, session: int, previous: int, wallet: int, twist: int, lose: bool
    ) -> None:
        """A Resume with any of the secrets and sessions."""
        if self.can():
            asked = self.ask_for(secret, session, wallet, twist, previous)
            self.send("Resume", ("", None), asked, lose)

    def ask_for(self, secret: int, session: int, wallet: int, twist: int, previous: int) -> Asked:
        """Fields that fit the host with this secret, most often; `twist` says what does not."""
        chosen = pick([secrets.token_bytes(32), *self.secrets[::-1]], secret)
        if chosen not in self.secrets:
            self.secrets.append(chosen)
        host = self.model.by_secret(chosen)
        key, address = pick(self.keys, twist // 4), pick(self.addresses, twist // 5)
        if host and twist % 4:
            key = host.key
        if host and twist % 5:
            address = host.address
        if self.world.tunnel and key is None:
            key = KEYS[0]
        live = self.model.live_session(host) if host else None
        fresh = [secrets.token_bytes(32)]
        known = self.sessions[-6:]
        if live and previous % 3:
            before = live.secret
        else:
            before = pick([b"", *known], previous // 3)
        return Asked(
            secret=chosen,
            session=pick(fresh if session % 3 or not known else known, session // 3),
            wallet=pick(self.wallets, wallet // 2)
            if wallet % 2
            else (host.wallet if host else None),
            key=key,
            address=address,
            previous=before,
            hostname=f"lab-{secret % 3}",
        )

    @precondition(has_hosts)
    @rule(session=N, address=N, paused=N, lose=LOSES)
    def heartbeat(self, session: int, address: int, paused: int, lose: bool) -> None:
        """A heartbeat with any session, from any address."""
        if self.can():
            self.beat(*self.place(session, address), paused % 4 == 0, lose)

    def place(self, session: int, address: int) -> tuple[bytes, str | None]:
        """Any session, most often from its host's address."""
        chosen = pick([secrets.token_bytes(32), *self.sessions[::-1]], session)
        known = self.model.sessions.get(chosen)
        own = known is not None and address % 3
        return chosen, known.host.address if known and own else pick(self.addresses, address // 3)

    @precondition(has_hosts)
    @rule(sessions=st.lists(N, min_size=6, max_size=6), address=N, paused=N)
    def heartbeats_at_one_time(self, sessions: list[int], address: int, paused: int) -> None:
        """Heartbeats that share a transaction; each gets its own answer."""
        if not self.can():
            return
        places = {self.place(n, address + i): (paused + i) % 4 == 0 for i, n in enumerate(sessions)}
        with ThreadPoolExecutor(len(places)) as workers:
            futures = [
                workers.submit(self.try_beat, session, address, is_paused)
                for (session, address), is_paused in places.items()
            ]
            answers = [future.result() for future in futures]
        for ((session, place), is_paused), answer in zip(places.items(), answers, strict=True):
            self.check_beat(session, place, is_paused, answer, lose=False)

    def try_beat(self, session: bytes, address: str | None, paused: bool) -> Callable[[], Any]:
        """Send a heartbeat now; what it gave back or raised is for later."""
        request = pb.HeartbeatRequest(session=session, seq=1, boot_id=BOOT_ID, paused=paused)
        try:
            reply = self.world.call("Heartbeat", request, address, False)
        except Refused as refused:
            return partial(throw, refused)
        return lambda: reply

    @precondition(has_hosts)
    @rule(which=N, key=N, lose=LOSES)
    def register_again(self, which: int, key: int, lose: bool) -> None:
        """A host sends the token that it was made with once more, perhaps with another key."""
        for host in self.one_host(which):
            token = next(pair for pair in self.tokens if pair[1] is host.invite)
            live = self.model.live_session(host)
            session = live.secret if live else secrets.token_bytes(32)
            chosen = pick(KEYS, key // 2) if key % 2 else host.key
            asked = Asked(host.secret, session, None, chosen, host.address, hostname=host.hostname)
            self.send("Register", token, asked, lose)

    @rule(which=N, lose=LOSES)
    def send_again(self, which: int, lose: bool) -> None:
        """One of the last requests once more, as after a lost reply."""
        if not self.sent or not self.can():
            return
        method, invite, request, asked = pick(self.sent[-4:], which)
        token = getattr(request, "invite_token", "")
        self.send(method, (token, invite), asked, lose)

    # Bursts

    @precondition(has_hosts)
    @rule(which=N, count=st.integers(2, 5))
    def take_over(self, which: int, count: int) -> None:
        """Two machines use one identity in turn."""
        for host in self.one_host(which):
            for _ in range(count):
                self.resume_host(host, secrets.token_bytes(32), b"", None)

    @precondition(lambda self: has_hosts(self) and not self.bursts and self.steps % 8 == 7)
    @rule(which=N)
    def crash_loop(self, which: int) -> None:
        """An agent starts again and again, until it is told to slow down."""
        self.bursts += 1
        for host in self.one_host(which):
            for _ in range(32):
                live = self.model.live_session(host)
                previous = live.secret if live else b""
                if not self.resume_host(host, secrets.token_bytes(32), previous, None):
                    break

    @precondition(lambda self: has_hosts(self) and self.bursts < 2 and self.steps % 8 == 7)
    @rule(which=N)
    def change_again_and_again(self, which: int) -> None:
        """A host asks for another wallet each time in one session, until it is told to stop."""
        self.bursts += 1
        for host in self.one_host(which):
            live = self.model.live_session(host)
            session = live.secret if live else secrets.token_bytes(32)
            for n in range(52):
                if not self.resume_host(host, session, b"", pick(WALLETS, n)):
                    break

    @precondition(has_hosts)
    @rule(which=N, key=N)
    def change_key(self, which: int, key: int) -> None:
        """A host comes with any of the WireGuard keys, in the session that it has."""
        for host in self.one_host(which):
            live = self.model.live_session(host)
            session = live.secret if live else secrets.token_bytes(32)
            self.resume_host(host, session, b"", None, pick(KEYS, key))

    def resume_host(
        self,
        host: ModelHost,
        session: bytes,
        previous: bytes,
        wallet: str | None,
        key: str | None = None,
    ) -> bool:
        """A Resume from where the host is, most often with its own key; True: accepted."""
        key = key or (host.key if self.world.tunnel else None)
        asked = Asked(host.secret, session, wallet, key, host.address, previous)
        found = self.send("Resume", ("", None), asked, lose=False)
        return found is not None and found.host is not None

    def one_host(self, which: int) -> list[ModelHost]:
        """A host that was not revoked, rather one that is not in quarantine."""
        standing = [host for host in self.model.hosts if host.status != "revoked"]
        good = [host for host in standing if host.status != "quarantined"]
        return [pick(good or standing, which)] if self.can() else []

    # Time and crashes

    @rule(by_s=st.sampled_from((20, 300, 700, HOUR_S, 25 * HOUR_S, 85 * DAY_S)))
    def jump(self, by_s: int) -> None:
        """The clock moves on."""
        if self.can():
            self.world.jump(self.model.jump(by_s))

    @precondition(lambda self: self.restarts == 0 and self.steps % 6 == 5)
    @rule(what=st.sampled_from(("cp", "cp crash", "postgres", "postgres crash")))
    def restart(self, what: str) -> None:
        """A part ends and is started again; seldom, since it takes long."""
        if not self.can():
            return
        self.restarts += 1
        self.world.restart(what)
        if what.startswith("cp"):
            self.model.serving_s = self.model.now_s
        self.world.seen[f"restart {what}"] += 1

    # What must hold

    @invariant()
    def the_database_is_the_model(self) -> None:
        """Invites, hosts, sessions and namespaces, each with its state."""
        found = self.world.read_state()
        for host in self.model.hosts:  # one whose first reply was lost
            if not host.host_id:
                host.host_id = found["hosts"][cp_server.sha256(host.secret).hex()][0]
                assert uuid.UUID(host.host_id).version == 4
        expected = self.render()
        wrong = {
            f"{table} {key[:36]}": (found[table].get(key), rows.get(key))
            for table, rows in expected.items()
            for key in {*found[table], *rows}
            if found[table].get(key) != rows.get(key)
        }
        assert wrong == {}, "(in the database, in the model)"

    def render(self) -> dict[str, Any]:
        """The model as SQL_STATE gives it."""
        now_s = self.model.now_s
        return {
            "invites": {
                invite.invite_id: [
                    invite.state(now_s),
                    invite.host.host_id if invite.host else None,
                    invite.address if invite.state(now_s) == "open" else None,
                ]
                for invite in self.model.invites.values()
            },
            "hosts": {
                cp_server.sha256(host.secret).hex(): [
                    host.host_id,
                    host.status,
                    host.invite.invite_id,
                    host.address,
                    host.key,
                    host.wallet,
                    host.requested,
                    host.ever_assigned,
                    host.hostname,
                ]
                for host in self.model.hosts
            },
            "sessions": {
                cp_server.hash_session(s.secret).hex(): [s.host.host_id, s.live, s.takeover]
                for s in self.model.sessions.values()
            },
            "namespaces": {f"solana:{name}": yes for name, yes in self.model.namespaces.items()},
        }

    def teardown(self) -> None:
        """At the end of an example: the invariants, and what the operator is shown."""
        if sys.exc_info()[0] is not None:
            return
        db = self.world.door.db
        assert self.world.operate(lambda: cp_server.find_violations(db)) == []
        values = {"limit": 100, "cursor": 0, "status": None, "namespace": None, "hostname": None}
        hosts = self.world.operate(lambda: cp_server.list_hosts(db, values))
        shown = {str(h.host_id): cp_server.decide_standing(h) for h in hosts}
        assert {host_id: (s.status, s.assignable) for host_id, s in shown.items()} == {
            host.host_id: (host.status, self.model.is_assignable(host)) for host in self.model.hosts
        }


def find_unseen(world: World) -> set[str]:
    """What a run must have come to, and did not."""
    seen = {word for what in world.seen for word in (what, what.rpartition(" ")[2])}
    due = {"INVITE_USED", "INVITE_REVOKED", "INVITE_EXPIRED", "KEY_TAKEN"}
    due |= {"UNKNOWN_INVITE", "UNKNOWN_HOST", "UNKNOWN_SESSION"}
    due |= {"HOST_REVOKED", "HOST_QUARANTINED", "SESSION_SUPERSEDED", "TRY_LATER", "CONFLICT"}
    due |= {f"{method} {how}" for method in METHODS for how in ("accepted", "lost")}
    if world.tunnel:
        due |= {"ADDRESS_TAKEN", "WRONG_ADDRESS", "INVITE_FOR_OTHER_KEY"}
    parts = {what.split()[1] for what in world.seen if what.startswith("restart ")}
    return due - seen | {"cp", "postgres"} - parts


@contextlib.contextmanager
def make_world(postgres: Postgres, directory: Path, tunnel: bool) -> Iterator[World]:
    """The real parts, ended with the block."""
    with contextlib.ExitStack() as stack:
        netns = stack.enter_context(make_netns()) if tunnel else None
        world = World(postgres, directory, netns)
        stack.callback(world.close)
        yield world


@pytest.mark.parametrize("kind", STEPS)
def test_the_fleet_is_what_the_model_says(
    kind: str, spare_postgres: Postgres, tmp_path: Path
) -> None:
    seed = read_seed()
    options = settings(
        stateful_step_count=STEPS_IN_EXAMPLE,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    began = time.monotonic()
    with make_world(spare_postgres, tmp_path, kind == "tunnel") as world:
        rounds = 0
        while (left := max(STEPS[kind] - world.steps, 0)) or (
            find_unseen(world) and world.steps < 3 * STEPS[kind]
        ):  # what is rare may need more than its share
            left = math.ceil((left or STEPS[kind] // 4) / STEPS_IN_EXAMPLE)
            options = settings(options, max_examples=min(left, EXAMPLES_IN_ROUND))
            machine = type("Fleet", (Fleet,), {"world": world})
            run_state_machine_as_test(hypothesis.seed(seed + rounds)(machine), settings=options)
            rounds += 1
        world.cp.check_invariants()
        took_s = time.monotonic() - began
        print(f"{world.steps} steps in {world.examples} examples, {took_s:.0f} s")
        for what, count in sorted(world.seen.items()):
            print(f"{count:6} {what}")
        assert world.steps >= STEPS[kind]
        assert find_unseen(world) == set()
