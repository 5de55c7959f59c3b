"""The liveness table after millions of heartbeats, also while somebody holds an old snapshot.

The heartbeats go through `record_heartbeats`, as fast as it goes: hours of a fleet in minutes. So
autovacuum looks each second here, where it would look each minute.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import psycopg

import cp_server
from tests.bench.conftest import Record
from tests.bench.fleet import fill, postgres_that_syncs
from tests.bench.load import BOOT_ID, address_of, session_of
from tests.harness import ControlPlane, wait_for

HOSTS = 10_000
UPDATES = 3_000_000
HELD_UPDATES = 500_000
SIZE = """
SELECT pg_table_size('liveness') AS table_bytes, pg_indexes_size('liveness') AS index_bytes,
  n_dead_tup AS dead, autovacuum_count AS vacuums, n_tup_upd AS updates, n_tup_hot_upd AS hot
FROM pg_stat_user_tables WHERE relname = 'liveness'
"""


async def beat(cp: ControlPlane, updates: int) -> float:
    """Record this many heartbeats in batches of the control plane's size; microseconds a row."""
    db = cp_server.Database(cp.postgres.dsn(cp.database, "openinfra"))
    beats = [
        cp_server.Beat(
            cp_server.sha256(session_of(n)), address_of(n), 1, BOOT_ID, "online", 30_000, None
        )
        for n in range(HOSTS)
    ]
    random.Random(1).shuffle(beats)
    await db.open()
    took = 0.0
    for start in range(0, updates, cp_server.BATCH_MAX):
        at = start % HOSTS
        batch = [
            dataclasses.replace(each, seq=start // HOSTS + 1)
            for each in beats[at : at + cp_server.BATCH_MAX]
        ]
        began = time.monotonic()
        answers, _ = await cp_server.record_heartbeats(db, batch, peer_check=True)
        took += time.monotonic() - began
        assert all(
            isinstance(answer, cp_server.Accepted) and answer.standing is cp_server.PLAIN_STANDING
            for answer in answers.values()
        )
    await db.close()
    return took / updates * 1e6


def read_size(cp: ControlPlane) -> dict[str, Any]:
    """Sizes and counters of the table; they are a second old at most."""
    time.sleep(1.5)
    return cp.query(SIZE)[0]


def test_tables(tmp_path: Path, record: Record) -> None:
    """3,000,000 updates; then with a held snapshot; then after it has ended."""
    with postgres_that_syncs() as postgres:
        postgres.execute("postgres", "ALTER SYSTEM SET autovacuum_naptime = '1s'")
        postgres.execute("postgres", "SELECT pg_reload_conf()")
        cp = ControlPlane(postgres, tmp_path / "cp")
        fill(cp, HOSTS, 30)
        asyncio.run(beat(cp, HOSTS))  # from pending to online
        before = read_size(cp)
        took_us = asyncio.run(beat(cp, UPDATES))
        after = read_size(cp)
        print(f"\n{before}\n{after}")
        growth = after["table_bytes"] / before["table_bytes"]
        name = f"liveness of {HOSTS:,} hosts"
        record(f"{name}: an update in a batch", took_us, "µs", 60)
        record(f"{name}: table after {UPDATES:,} updates, of before", growth, "times", 2)
        growth = after["index_bytes"] / before["index_bytes"]
        record(f"{name}: index after {UPDATES:,} updates, of before", growth, "times", 2)

        with psycopg.connect(postgres.dsn(cp.database)) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM liveness")
            held_us = asyncio.run(beat(cp, HELD_UPDATES))
            held = read_size(cp)
        print(held)
        grown = (held["table_bytes"] - after["table_bytes"]) / HELD_UPDATES
        grown += (held["index_bytes"] - after["index_bytes"]) / HELD_UPDATES
        record(f"{name}, a snapshot held: an update in a batch", held_us, "µs", 120)
        record(f"{name}, a snapshot held: growth an update", grown, "bytes", 150)

        wait_for("vacuum", lambda: read_size(cp)["dead"] < HOSTS or None, 60)
        later_us = asyncio.run(beat(cp, HELD_UPDATES))
        later = read_size(cp)
        print(later)
        record(f"{name}, after it ended: an update in a batch", later_us, "µs", 60)
        growth = later["table_bytes"] / held["table_bytes"]
        record(f"{name}, after it ended: table after as many, of then", growth, "times", 1.1)
        cp.check_invariants()
