"""How fast hours that are over become windows, lines and ledger; an invoice; the ledger's test.

A real PostgreSQL on this machine, as it is installed (with fsync), filled by the superuser: 1,000
hosts with ten copies each that ran for 100 hours, and sent something in each, from two containers
each. OPENINFRA_BENCH_WINDOWS makes it smaller.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.bench.conftest import Record
from tests.bench.fleet import postgres_that_syncs
from tests.billing import Books, close_all

V = TypeVar("V")
WINDOWS = int(os.environ.get("OPENINFRA_BENCH_WINDOWS", "1000000"))
HOSTS, COPIES = 1_000, 10
HOURS = max(WINDOWS // HOSTS // COPIES, 1)
S = 1_000_000
T = 1_772_323_200 * S  # 2026-03-01
FILL = """
INSERT INTO namespaces (namespace, approved_at, approved_by)
  SELECT 'solana:' || lpad(n::text, 40, '1'), now(), 'x' FROM generate_series(111, 131) n
  WHERE n::text !~ '0';
INSERT INTO hosts (host_id, invite_id, host_secret_sha256, payout_pubkey, namespace, status,
    hostname, arch, kernel, agent_version, cpu_count, memory_bytes, disk_bytes, disk_encrypted)
  SELECT gen_random_uuid(), n::text, sha256(n::text::bytea), substr(namespace, 8), namespace,
    'online', 'h' || n, 'x86_64', '6', '1', 8, 1, 1, true
  FROM generate_series(1, %(hosts)s) n, LATERAL (
    SELECT namespace FROM namespaces ORDER BY namespace OFFSET n %% 18 LIMIT 1) s;
INSERT INTO liveness (host_no, interval_ms, last_heartbeat_at, seen_us)
  SELECT host_no, 30000, '2026-03-01T00:00Z'::timestamptz + %(hours)s * interval '1 hour',
    %(hours)s * 3600000000::bigint FROM hosts;
INSERT INTO usage_hours SELECT host_no, '2026-03-01T00:00Z'::timestamptz + n * interval '1 hour',
    n * 3600000000::bigint FROM hosts, generate_series(1, %(hours)s) n;
INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
  SELECT gen_random_uuid(), 'kuma', 'w' || n, 20, '{}', 'x' FROM generate_series(1, 500) n;
INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes,
    state)
  SELECT 1 + (host_no * %(copies)s + n) %% 500, 1, host_no * %(copies)s + n, host_no, '{}',
    50 + n * 17, 100000000 + n * 1234567, 'running' FROM hosts, generate_series(1, %(copies)s) n;
INSERT INTO usage_runs (assignment_no, host_no, from_at, from_us, closed_hour, closed_us)
  SELECT assignment_no, host_no, '2026-03-01T00:00Z', 0, '2026-03-01T00:00Z', 0 FROM assignments;
INSERT INTO usage_counters
  SELECT assignment_no, gen_random_uuid(), sha256((assignment_no || '/' || n)::bytea),
    %(hours)s * 36 * 10^9, %(hours)s * 3600 * 4 * 10^7, 1,
    %(hours)s * (1 + assignment_no %% 499) * 1000003, now()
  FROM assignments, generate_series(1, 2) n;
INSERT INTO usage_egress (assignment_no, hour_at, bytes)
  SELECT assignment_no, '2026-03-01T00:00Z'::timestamptz + n * interval '1 hour',
    2 * (1 + assignment_no %% 499) * 1000003
  FROM assignments, generate_series(0, %(hours)s - 1) n;
"""


@pytest.fixture(scope="module")
def books() -> Iterator[Books]:
    with postgres_that_syncs() as cluster:
        made = Books(cluster)
        fill(made)
        yield made
        made.close()


def fill(made: Books) -> None:
    """Hosts, copies, and where their time stood at each hour."""
    made.set_time(T)
    made.add_customer("kuma")
    values = {"hosts": HOSTS, "copies": COPIES, "hours": HOURS}
    for statement in (FILL % values).split(";\n"):
        if statement.strip():
            made.owner.execute(statement.encode())
    made.owner.execute("VACUUM ANALYZE")


def timed(books: Books, work: Callable[[cp_server.Database], Awaitable[V]]) -> tuple[V, float]:
    async def run_it() -> tuple[V, float]:
        db = cp_server.Database(books.dsn, 2, options="-c statement_timeout=600s")
        await db.open()
        try:
            began = time.monotonic()
            found = await work(db)
            return found, time.monotonic() - began
        finally:
            await db.close()

    return asyncio.run(run_it())


def test_windows_are_closed(books: Books, record: Record) -> None:
    card = oracle.RateCard("1", None, T, 31_415, 2_718, 50_001, 850_000)
    timed(books, lambda db: books.add_card(db, card))
    books.set_time(T + HOURS * oracle.HOUR_US + 2 * oracle.HOUR_US)
    windows, took_s = timed(books, close_all)
    assert windows == HOSTS * COPIES * HOURS
    assert books.query("SELECT 1 FROM usage_windows WHERE egress_micros = 0") == []
    record(f"closing {windows:,} windows: each", took_s / windows * 1e6, "µs", 100)


def test_the_ledger_is_verified(books: Books, record: Record) -> None:
    (wrong, sums), took_s = timed(books, cp_server.verify_ledger)
    assert wrong == []
    record(f"ledger verify: {sums['entries']:,} entries", took_s, "s", 10 * sums["entries"] / 2e6)


LONG = """
INSERT INTO usage_lines
  SELECT assignment_no, '2026-04-01', n, customer_no, namespace, host_no, 3600000000 + n,
    10^9 + n, 1000 + n, 2000 + n, 3000 + n, 5000, hostname
  FROM usage_lines, generate_series(1, 4) n WHERE month = '2026-03-01' LIMIT 33334
"""


def test_an_invoice_of_100_000_lines(books: Books, record: Record, tmp_path: Path) -> None:
    """Of copies under many rate cards, each of them three lines: processor, memory, egress."""
    customer_id = books.customers["kuma"]
    books.owner.execute(LONG.encode())
    books.owner.execute("ANALYZE usage_lines")
    month = cp_server.parse_month("2026-04")

    async def work(db: cp_server.Database) -> int:
        bill = await cp_server.read_invoice(db, customer_id, month)
        for suffix, parts in cp_server.render_files(bill, "EUR").items():
            (tmp_path / suffix).write_text("".join(parts))
        return len(list(cp_server.list_bill_rows(bill))) - 1

    lines, took_s = timed(books, work)
    assert lines == 100_002
    record("an invoice of 100,000 lines as HTML, CSV and JSON", took_s, "s", 5)
