"""How long it takes to find a host: the pure choice, a whole round, and a lost host's copies."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from pathlib import Path

import pytest
from psycopg.types.json import Jsonb

import cp_server
from cp_server import Demand, Place
from tests.bench.conftest import Record
from tests.bench.fleet import fill, postgres_that_syncs
from tests.bench.load import percentile
from tests.harness import ControlPlane

HOSTS, COPIES = 1_000, 10_000
LARGEST, MISSING = 65_000, 4_000  # the size of the design; replicas of 200 workloads
LOST = 200  # copies of the host that falls silent
SPEC = {
    "image": f"kuma/web@sha256:{'ab' * 32}",
    "command": [],
    "env": {},
    "cpu_milli": 100,
    "memory_bytes": 64 << 20,
    "ports": [8080],
    "egress": "internet",
    "restart": "always",
    "arch": None,
    "provider": None,
}
# Workloads of two copies each, spread evenly; `one` is a host with more of them.
COPIES_SQL = """
INSERT INTO customers (customer_id, name, created_by) VALUES (gen_random_uuid(), 'Kuma', 'x');
INSERT INTO customer_namespaces (namespace, customer_no) SELECT 'kuma', customer_no FROM customers;
UPDATE hosts SET engine_version = '20.10', offered_cpu_milli = 64000,
  offered_memory_bytes = 64::bigint << 30, status = 'online';
UPDATE liveness SET last_heartbeat_at = now();
INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
SELECT gen_random_uuid(), 'kuma', 'w' || n, 2, '{spec}', 'x'
FROM generate_series(0, {copies} / 2 - 1) AS n;
INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes,
  port_slot, state)
SELECT w.workload_no, 1, r, 1 + (2 * (w.workload_no - 1) + r) % {hosts}, w.spec, 100, 67108864,
  (2 * (w.workload_no - 1) + r) / {hosts}, 'running'
FROM workloads w, generate_series(0, 1) AS r;
"""
ONE_SQL = """
INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
SELECT gen_random_uuid(), 'kuma', 'lost' || n, 1, '{spec}', 'x'
FROM generate_series(1, {lost}) AS n;
INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes,
  port_slot, state)
SELECT workload_no, 1, 0, {hosts}, spec, 100, 67108864, 500 + row_number() OVER (), 'running'
FROM workloads WHERE name LIKE 'lost%';
"""
# What hosts rejected: two copies each of late, and a hundred before.
PAST_SQL = """
INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes,
  port_slot, state, ended_at)
SELECT 1 + n % 5000, 1, 0, 1 + n % {hosts}, '{spec}', 100, 67108864, n % 1000, 'rejected',
  now() - CASE WHEN n < 2 * {hosts} THEN '1 min' ELSE '1 d' END::interval
FROM generate_series(0, 100 * {hosts} - 1) AS n;
"""


def test_the_choice(record: Record) -> None:
    """One copy at a time, on hosts as full as 10,000 copies make them."""
    chance = random.Random(1)
    places = [
        Place(
            number,
            chance.choice(["x86_64", "aarch64"]),
            f"solana:{number % 300}",
            4000 - 100 * COPIES // HOSTS - chance.randrange(2000),
            (8 << 30) - chance.randrange(6 << 30),
            COPIES // HOSTS,
            set(range(COPIES // HOSTS)),
            {},
        )
        for number in range(HOSTS)
    ]
    took = []
    for number in range(2_000):
        wish = {**SPEC, "arch": chance.choice([None, "x86_64"])}
        demand = Demand(number, 1, 1, wish, (), {}, frozenset())
        began = time.perf_counter()
        made, *_ = cp_server.decide_places([demand], places)
        took.append(time.perf_counter() - began)
        assert len(made) == 1
    p99 = percentile(sorted(took), 0.99) * 1e3
    record(f"a place for a copy, chosen of {HOSTS:,} hosts: 99 of 100 within", p99, "ms", 10)


@pytest.mark.parametrize(
    ("name", "needs", "fits"),
    [
        ("fit", {}, True),
        ("fit, each of a size", {"cpu_milli": 100}, True),
        ("fit nowhere", {"cpu_milli": 10**6}, False),
        ("fit nowhere, each of a size", {"cpu_milli": 10**6}, False),
    ],
)
def test_the_longest_choice(record: Record, name: str, needs: dict[str, int], fits: bool) -> None:
    """Far more to place than one round can: it ends all the same, for heartbeats wait for it."""
    chance = random.Random(1)
    places = [
        Place(
            number,
            "x86_64",
            f"solana:{number % 300}",
            4000 - chance.randrange(2000),
            (8 << 30) - chance.randrange(6 << 30),
            10,
            set(range(10)),
            {},
        )
        for number in range(LARGEST)
    ]
    step = int(name.endswith("size"))
    demands = [
        Demand(
            number,
            1,
            MISSING // 200,
            {**SPEC, **{key: value + step * number for key, value in needs.items()}},
            (),
            {},
            frozenset(),
        )
        for number in range(200)
    ]
    began = time.perf_counter()
    made, reasons, left = cp_server.decide_places(demands, places)
    seconds = time.perf_counter() - began
    assert (bool(made), bool(reasons)) == (fits, not fits)
    assert len(made) == MISSING or left or not fits
    what = f"{MISSING:,} copies of 200 workloads that {name}"
    record(f"one round's choice of {LARGEST:,} hosts for {what}", seconds, "s", 2)


def test_a_round_of_the_largest_fleet(tmp_path: Path, record: Record) -> None:
    """With its reads and writes: all get their places in a few rounds, each within its bound."""
    with postgres_that_syncs() as postgres:
        cp = ControlPlane(postgres, tmp_path / "cp")
        fill(cp, LARGEST, 30)
        sql = COPIES_SQL.format(spec=json.dumps(SPEC), hosts=LARGEST, copies=400)
        postgres.execute(cp.database, sql)
        sql = "UPDATE workloads SET replicas = 2 + %s"
        postgres.execute(cp.database, sql, MISSING // 200 - 2)
        postgres.execute(cp.database, "VACUUM ANALYZE")
        took = asyncio.run(cp_server.with_database(cp.dsn_file, measure_rounds))
        rows = cp.query("SELECT count(*) AS n FROM assignments WHERE ended_at IS NULL")
        assert rows[0]["n"] == MISSING
    what = f"{MISSING - 400:,} copies on {LARGEST:,} hosts"
    record(f"the longest of the rounds that place {what}", max(took), "s", 5)
    record(f"all rounds that place {what}, with their rests", sum(took), "s", 30)


async def measure_rounds(db: cp_server.Database) -> list[float]:
    """Seconds of each round until none is cut."""
    took, done = [], cp_server.Round(is_cut=True)
    while done.is_cut:
        began = time.perf_counter()
        done = await cp_server.place(db, done.turns)
        took.append(time.perf_counter() - began + cp_server.PLACE_REST_S)
        assert done.placed
    return took


def test_rounds(tmp_path: Path, record: Record) -> None:
    """A whole round with its reads and writes; then a host's copies after its right is over."""
    with postgres_that_syncs() as postgres:
        cp = ControlPlane(postgres, tmp_path / "cp")
        fill(cp, HOSTS, 30)
        sizes = {"hosts": HOSTS, "copies": COPIES, "lost": LOST}
        spec = json.dumps(SPEC)
        for sql in (COPIES_SQL, ONE_SQL, PAST_SQL):
            postgres.execute(cp.database, sql.format(spec=spec, **sizes))
        postgres.execute(cp.database, "VACUUM ANALYZE")
        asyncio.run(cp_server.with_database(cp.dsn_file, lambda db: measure(cp, db, record)))
        rows = cp.query("SELECT count(*) AS n FROM assignments WHERE ended_at IS NULL")
        assert rows[0]["n"] == COPIES + LOST + 200
        worst = cp.query(
            "SELECT max(n) AS n FROM (SELECT count(*) AS n FROM assignments"
            " WHERE ended_at IS NULL GROUP BY host_no) AS hosts"
        )
        assert worst[0]["n"] < COPIES // HOSTS + 5  # spread over the fleet


async def measure(cp: ControlPlane, db: cp_server.Database, record: Record) -> None:
    (customer,) = await cp_server.list_customers(db, {"limit": 1, "cursor": 0})
    actor, took, idle = cp_server.Actor("cli:bench"), [], []
    for number in range(200):
        order = cp_server.WorkloadOrder("kuma", f"new{number}", 1, SPEC)
        began = time.perf_counter()
        done = await cp_server.place(db)
        idle.append(time.perf_counter() - began)
        assert done.placed == 0
        # Straight into the table: a customer may not have so many.
        async with db.transaction() as tx:
            await tx.execute(
                cp_server.SQL_WORKLOAD_INSERT,
                workload_id=uuid.uuid4(),
                namespace=order.namespace,
                name=order.name,
                replicas=1,
                spec=Jsonb(SPEC),
                actor=actor.name,
            )
        began = time.perf_counter()
        done = await cp_server.place(db)
        took.append(time.perf_counter() - began)
        assert (done.placed, done.unplaced) == (1, 0)
    assert customer.namespaces == ["kuma"]
    what = f"at {HOSTS:,} hosts and {COPIES:,} copies"
    p99 = percentile(sorted(took), 0.99) * 1e3
    record(f"a round that places a copy, {what}: 99 of 100 within", p99, "ms", 250)
    record(
        f"a round with nothing to do, {what}: median",
        percentile(sorted(idle), 0.5) * 1e3,
        "ms",
        100,
    )
    age = f"{cp_server.LEASE_S + cp_server.LEASE_GRACE_S + 1} s"
    sql = "UPDATE liveness SET last_heartbeat_at = now() - %s::interval WHERE host_no = %s"
    cp.postgres.execute(cp.database, sql, age, HOSTS)
    sql = "UPDATE hosts SET status = 'offline' WHERE host_no = %s"
    cp.postgres.execute(cp.database, sql, HOSTS)
    cp.postgres.execute(cp.database, "UPDATE cp_state SET serving_since = now() - interval '1 d'")
    began = time.perf_counter()
    done = await cp_server.place(db)
    seconds = time.perf_counter() - began
    assert (done.lost, done.placed) == (LOST + COPIES // HOSTS, LOST + COPIES // HOSTS)
    name = f"{LOST + COPIES // HOSTS} copies of a lost host placed again, from when they may be"
    record(name, seconds + cp_server.PLACE_S, "s", 30)
