"""A fleet in a database whose clock a test sets, and what an oracle makes of the same events.

Hosts, customers and copies are written by the superuser; heartbeats, ends and closed hours are the
operations of cp_server.py. Its statements say now(); a schema that is looked through before
pg_catalog has another one, which reads a row, and so do the columns that it is the default of.
"""

from __future__ import annotations

import asyncio
import collections
import datetime as dt
import hashlib
import json
import uuid
import zlib
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

import cp_server
from proto import openinfra_pb2 as pb
from tests import billing_oracle as oracle
from tests.harness import ControlPlane, Postgres

CLOCK = """
CREATE SCHEMA clock;
CREATE TABLE clock.time (at timestamptz NOT NULL);
INSERT INTO clock.time VALUES ('2026-03-01T00:00Z');
CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
  AS 'SELECT at FROM clock.time';
CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock.time';
GRANT USAGE ON SCHEMA clock TO openinfra;
GRANT SELECT ON clock.time TO openinfra;
DO $$
DECLARE c record;
BEGIN
  FOR c IN SELECT table_name, column_name FROM information_schema.columns
    WHERE table_schema = 'public' AND column_default = 'now()'
  LOOP
    EXECUTE format('ALTER TABLE public.%I ALTER %I SET DEFAULT clock.now()',
      c.table_name, c.column_name);
  END LOOP;
END $$;
"""
SPEC = json.dumps(
    {
        "image": "kuma/web@sha256:00",
        "command": [],
        "env": {},
        "ports": [],
        "arch": None,
        "provider": None,
        "cpu_milli": 500,
        "memory_bytes": 10**9,
        "egress": "internet",
        "restart": "always",
    }
)


LEDGER = {name for name, _, _ in cp_server.LEDGER_CHECKS} | {"copies_that_run_are_billed"}


def namespace_of(provider: str) -> str:
    """A provider's namespace; what is one already stays."""
    if provider.startswith("solana:"):
        return provider
    digest = hashlib.sha256(provider.encode()).hexdigest()
    return f"solana:{digest.replace('0', 'x')[:40]}"


def boot_id_of(boot: str) -> str:
    """A boot of the oracle's log, as hosts name theirs."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, boot))


def at(time_us: int) -> dt.datetime:
    """Microseconds since the epoch as the database has times."""
    return dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc) + dt.timedelta(microseconds=time_us)


def lay_clock(postgres: Postgres, database: str) -> None:
    """Give a database a clock that a test sets, for what connects from now on."""
    with psycopg.connect(postgres.dsn(database)) as connection:
        connection.execute(CLOCK)
        words = "ALTER ROLE openinfra IN DATABASE {} SET search_path = clock, pg_catalog, public"
        connection.execute(sql.SQL(words).format(sql.Identifier(database)))


class Books:
    """One database with its clock."""

    def __init__(self, postgres: Postgres, interval_ms: int = 30_000) -> None:
        self.postgres, self.interval_ms = postgres, interval_ms
        self.database = postgres.new_database()
        lay_clock(postgres, self.database)
        self.owner = psycopg.connect(postgres.dsn(self.database))
        self.connect()
        self.dsn = postgres.dsn(self.database, "openinfra")
        self.copies: dict[str, oracle.Copy] = {}
        self.ids: dict[str, uuid.UUID] = {}
        self.replicas: dict[str, int] = {}
        self.customers: dict[str, uuid.UUID] = {}
        self.sessions: dict[str, bytes] = {}
        self.hosts: dict[str, bytes] = {}
        self.cards: list[oracle.RateCard] = []
        self.events: list[oracle.Event] = []

    def connect(self) -> None:
        """The superuser's connection; again after the server was killed."""
        self.close()
        dsn = self.postgres.dsn(self.database)
        self.owner = psycopg.connect(dsn, autocommit=True)
        self.owner.execute("SET session_replication_role = replica")

    def close(self) -> None:
        """Let its connection go."""
        self.owner.close()

    def attach(self, cp: ControlPlane) -> None:
        """Let this be the database of a control plane that does not serve yet."""
        cp.database = self.database
        cp.set_dsn(self.dsn)

    def database_of(self, size: int = 4) -> cp_server.Database:
        """The control plane's own way to it."""
        return cp_server.Database(self.dsn, size)

    def query(self, text: str, *params: object) -> list[dict[str, Any]]:
        """Rows, as the superuser sees them."""
        with self.owner.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(text.encode(), params or None).fetchall()

    def set_time(self, time_us: int) -> None:
        """What the database's clock says from now on."""
        self.owner.execute("UPDATE clock.time SET at = %s", (at(time_us),))

    def add_host(self, host: str, provider: str) -> None:
        """A host of this provider, online."""
        name = namespace_of(provider)
        secret = hashlib.sha256(host.encode()).digest()
        session = cp_server.hash_session(secret)
        host_id = uuid.uuid5(uuid.NAMESPACE_DNS, host)
        self.owner.execute(
            "INSERT INTO namespaces (namespace, approved_at, approved_by)"
            " VALUES (%s, now(), 'test') ON CONFLICT DO NOTHING",
            (name,),
        )
        self.owner.execute(
            "INSERT INTO hosts (host_id, invite_id, host_secret_sha256, payout_pubkey, namespace,"
            " status, hostname, arch, kernel, agent_version, cpu_count, memory_bytes, disk_bytes,"
            " disk_encrypted, engine_version) VALUES (%s, %s, %s, %s, %s, 'online', %s, 'x86_64',"
            " '6', '1', 8, 1, 1, true, '20')",
            (host_id, session.hex()[:16], session, name[7:], name, host),
        )
        self.owner.execute(
            "INSERT INTO sessions (session_sha256, host_no, opened_by)"
            " SELECT %s, host_no, 'register' FROM hosts WHERE host_id = %s",
            (session, host_id),
        )
        self.owner.execute(
            "INSERT INTO liveness (host_no, interval_ms)"
            " SELECT host_no, %s FROM hosts WHERE host_id = %s",
            (self.interval_ms, host_id),
        )
        self.sessions[host], self.hosts[host] = secret, session

    def add_customer(self, customer: str, **columns: object) -> None:
        """A customer with a namespace and one workload of each name of its copies."""
        self.customers[customer] = uuid.uuid5(uuid.NAMESPACE_DNS, customer)
        self.owner.execute(
            "WITH c AS (INSERT INTO customers (customer_id, name, created_by,"
            " credit_limit_micros) VALUES (%s, %s, 'test', %s) RETURNING customer_no)"
            " INSERT INTO customer_namespaces (namespace, customer_no)"
            " SELECT %s, customer_no FROM c",
            (self.customers[customer], customer, columns.get("credit_limit_micros"), customer),
        )

    def add_copy(self, copy: oracle.Copy) -> None:
        """A copy that its host has, and that does not run yet."""
        self.copies[copy.copy], self.ids[copy.copy] = copy, uuid.uuid4()
        workload_id = uuid.uuid5(uuid.NAMESPACE_DNS, f"{copy.customer}/{copy.workload}")
        self.replicas[copy.copy] = sum(
            (each.customer, each.workload) == (copy.customer, copy.workload)
            for each in list(self.copies.values())[:-1]
        )
        self.owner.execute(
            "INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)"
            " VALUES (%s, %s, %s, 20, %s, 'test') ON CONFLICT DO NOTHING",
            (workload_id, copy.customer, copy.workload, SPEC),
        )
        self.owner.execute(
            "INSERT INTO assignments (assignment_id, workload_no, revision, replica, host_no,"
            " created_at, spec, cpu_milli, memory_bytes)"
            " SELECT %s, workload_no, 1, %s, h.host_no, %s, %s, %s, %s"
            " FROM workloads, hosts h WHERE workload_id = %s AND h.hostname = %s",
            (
                self.ids[copy.copy],
                self.replicas[copy.copy],
                at(copy.made_us),
                SPEC if copy.sends else SPEC.replace('"internet"', '"none"'),
                copy.cpu_milli,
                copy.memory_bytes,
                workload_id,
                copy.host,
            ),
        )

    async def add_card(self, db: cp_server.Database, card: oracle.RateCard) -> None:
        """A rate card, by the operation."""
        customer_id = self.customers[card.customer] if card.customer else None
        await cp_server.add_rate_card(
            db,
            cp_server.Actor("test"),
            customer_id,
            at(card.valid_from_us),
            cpu_hour_micros=card.cpu_hour_micros,
            gb_hour_micros=card.gb_hour_micros,
            egress_gb_micros=card.egress_gb_micros,
            provider_share_ppm=card.share_ppm,
        )
        self.cards.append(card)

    def request(self, event: oracle.Heartbeat, seq: int = 1) -> pb.HeartbeatRequest:
        """A heartbeat as its host sends it: with all that it has, if it says it."""
        mine = [copy for copy in self.copies.values() if copy.host == event.host]
        request = pb.HeartbeatRequest(
            session=self.sessions[event.host],
            seq=seq,
            boot_id=boot_id_of(event.boot_id),
            desired_revision=1,
            usage=[
                pb.UsageCounter(
                    assignment_id=str(self.ids[each.copy]),
                    boot_id=boot_id_of(each.boot_id),
                    container_id=hashlib.sha256(each.container_id.encode()).digest(),
                    cpu_ns=each.cpu_ns,
                    memory_byte_s=each.memory_byte_s,
                    rx_bytes=each.rx_bytes,
                    tx_bytes=each.tx_bytes,
                )
                for each in event.counters
            ],
        )
        if event.running is not None:
            request.observed.SetInParent()
            for copy in mine:
                state = pb.ASSIGNMENT_STATE_WAITING
                if copy.copy in event.running:
                    state = pb.ASSIGNMENT_STATE_RUNNING
                request.observed.assignments.add(
                    assignment_id=str(self.ids[copy.copy]), state=state
                )
        return request

    def beat(self, event: oracle.Heartbeat) -> cp_server.Beat:
        """The same as the edge hands it on."""
        return cp_server.parse_heartbeat(self.request(event), "10.77.0.2", event.interval_ms)

    async def apply(self, db: cp_server.Database, event: oracle.Event) -> None:
        """Let it happen, and note it for the oracle once it is committed."""
        self.set_time(event.at_us)
        if isinstance(event, oracle.Heartbeat):
            beats = [self.beat(event)]
            answers, _ = await cp_server.record_heartbeats(db, beats, peer_check=False)
            (answer,) = answers.values()
            assert isinstance(answer, cp_server.Accepted), answer
        else:
            self.end(event)
        self.events.append(event)

    def end(self, event: oracle.CopyEnded, how: str = "") -> None:
        """The control plane's own end of a copy, in one of its ways."""
        ways = {
            "lost": "ended_at = %s, state = 'lost'",
            "stop": "stop_at = %s, stop_reason = 'x', stop_revision = 1",
            "held": "held_until = %s",
        }
        way = ways[how or sorted(ways)[zlib.crc32(event.copy.encode()) % 3]]
        self.owner.execute("SET session_replication_role = origin")
        self.owner.execute(
            f"UPDATE assignments SET {way} WHERE assignment_id = %s".encode(),  # noqa: S608
            (at(event.at_us), self.ids[event.copy]),
        )
        self.owner.execute("SET session_replication_role = replica")

    def windows(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """(copy, hour): the sums of its windows."""
        names = {value: key for key, value in self.ids.items()}
        rows = self.query(
            "SELECT a.assignment_id, extract(epoch FROM hour_at)::bigint * 1000000 AS hour_us,"
            " sum(billed_us)::bigint AS a, sum(egress_bytes)::bigint AS b,"
            " sum(cpu_micros)::bigint AS c, sum(memory_micros)::bigint AS d,"
            " sum(egress_micros)::bigint AS e, sum(share_micros)::bigint AS f"
            " FROM usage_windows JOIN assignments a USING (assignment_no) GROUP BY 1, 2"
        )
        return {
            (names[row["assignment_id"]], row["hour_us"]): tuple(row[key] for key in "abcdef")
            for row in rows
        }

    def lines(self) -> dict[tuple[str, str, int | None], tuple[object, ...]]:
        """(copy, month, card): the line."""
        names = {value: key for key, value in self.ids.items()}
        rows = self.query(
            "SELECT a.assignment_id, to_char(month, 'YYYY-MM') AS month, nullif(card_no, 0) card,"
            " billed_us AS a, egress_bytes AS b, cpu_micros AS c, memory_micros AS d,"
            " egress_micros AS e, share_micros AS f, c.name AS g FROM usage_lines"
            " JOIN assignments a USING (assignment_no) JOIN customers c USING (customer_no)"
        )
        return {
            (names[row["assignment_id"]], row["month"], row["card"]): tuple(
                row[key] for key in "abcdefg"
            )
            for row in rows
        }

    def bill_lines(self, lines: Iterable[oracle.Line], kind: str) -> list[dict[str, Any]]:
        """Lines of the oracle as an invoice or a statement has them, in its order."""
        cards = {card.card: card for card in self.cards}
        free = oracle.RateCard("0", None, 0, 0, 0, 0, 0)
        shown = []
        for line in lines:
            copy, card = self.copies[line.copy], cards.get(line.card or "", free)
            row = {
                "workload": f"{copy.customer}/{copy.workload}",
                "replica": self.replicas[line.copy],
                "assignment_id": str(self.ids[line.copy]),
                "hostname": copy.host,
                "cpu_milli": copy.cpu_milli,
                "memory_bytes": copy.memory_bytes,
                "card_no": int(card.card),
                "cpu_hour_micros": card.cpu_hour_micros,
                "gb_hour_micros": card.gb_hour_micros,
                "egress_gb_micros": card.egress_gb_micros,
                "billed_us": line.billed_us,
                "egress_bytes": line.egress_bytes,
                "cpu_micros": line.cpu_micros,
                "memory_micros": line.memory_micros,
                "egress_micros": line.egress_micros,
                "charge_micros": line.cpu_micros + line.memory_micros + line.egress_micros,
            }
            if kind == "statement":
                row |= {"provider_share_ppm": card.share_ppm, "share_micros": line.share_micros}
            shown.append(row)
        return sorted(shown, key=lambda row: (row["workload"], row["replica"], row["card_no"]))

    def balances(self) -> dict[tuple[str, str], int]:
        """Each account's balance."""
        rows = self.query(
            "SELECT kind, coalesce(c.name, a.namespace, '') AS whose, sum(amount_micros)::bigint"
            " AS micros FROM ledger_entries JOIN ledger_accounts a USING (account_no)"
            " LEFT JOIN customers c USING (customer_no) GROUP BY 1, 2"
        )
        return {(row["kind"], row["whose"]): row["micros"] for row in rows}

    def check(self) -> oracle.Bill:
        """Windows and ledger are what the oracle says, to the micro-unit; invariants hold."""
        expected = oracle.bill(self.cards, list(self.copies.values()), self.events)
        windows = {
            (each.copy, each.hour_us): (
                each.billed_us,
                each.egress_bytes,
                each.cpu_micros,
                each.memory_micros,
                each.egress_micros,
                each.share_micros,
            )
            for each in expected.windows
        }
        assert self.windows() == windows
        invoices, statements, fees = oracle.totals(expected)
        balances = self.balances()
        assert sum(balances.values()) == 0
        paid: collections.Counter[str] = collections.Counter()
        for row in self.query(
            "SELECT c.name, amount_micros FROM ledger_transactions JOIN ledger_entries"
            " USING (transaction_no) JOIN ledger_accounts USING (account_no)"
            " JOIN customers c USING (customer_no) WHERE ledger_transactions.kind = 'payment'"
        ):
            paid[row["name"]] += row["amount_micros"]
        for customer in self.customers:
            due = sum(micros for (whose, _), micros in invoices.items() if whose == customer)
            assert balances.get(("customer", customer), 0) == paid[customer] - due
        for provider in {copy.provider for copy in self.copies.values()}:
            due = sum(micros for (whose, _), micros in statements.items() if whose == provider)
            assert balances.get(("provider", namespace_of(provider)), 0) == due
        assert balances.get(("fees", ""), 0) == sum(fees.values())
        lines = {
            (each.copy, each.month, each.card and int(each.card)): (
                *(each.billed_us, each.egress_bytes, each.cpu_micros, each.memory_micros),
                *(each.egress_micros, each.share_micros, each.customer),
            )
            for each in expected.lines
        }
        assert self.lines() == lines
        for name, _, text in cp_server.INVARIANTS:
            if name in LEDGER:
                assert self.query(text) == [], name
        return expected


async def close_all(db: cp_server.Database, most: int = cp_server.USAGE_BATCH) -> int:
    """All that is due, as the loop does it; gives back how many windows."""
    cursor: int | None = 0
    windows = 0
    while cursor is not None:
        done = await cp_server.close_windows(db, cursor, most)
        windows, cursor = windows + done.windows, done.cursor
    return windows


def run(
    books: Books,
    events: Iterable[oracle.Event | int],
    every: int = 0,
    is_closed: bool = True,
) -> None:
    """Apply events in order; close what is due after each `every` of them, and (or not) at the end.

    A number is a time at which what is due is closed, with no event.
    """

    async def work() -> None:
        db = books.database_of()
        await db.open()
        try:
            last_us = 0
            for number, event in enumerate(events, 1):
                last_us = event if isinstance(event, int) else event.at_us
                if isinstance(event, int):
                    books.set_time(event)
                else:
                    await books.apply(db, event)
                if isinstance(event, int) or (every and number % every == 0):
                    await close_all(db, 7)
            books.set_time(last_us + 2 * oracle.HOUR_US)
            if is_closed:
                await close_all(db, 2)
                assert await close_all(db) == 0
        finally:
            await db.close()

    asyncio.run(work())
