"""Usage that is shuffled, repeated, lost, with closers that race and a database that is killed."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import signal
from collections.abc import Iterator

import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.billing import Books, close_all
from tests.harness import Postgres
from tests.integration.test_billing import CARD, HOUR, S, T, add_fleet

DELIVERIES = 10_000
CRASHES = 6
HOSTS = 50


@pytest.fixture
def books(spare_postgres: Postgres) -> Iterator[Books]:
    made = Books(spare_postgres)
    made.set_time(T)
    yield made
    made.close()


@dataclasses.dataclass
class Report:
    """What a host counted at one time; sent until it is acknowledged, and some more times."""

    counters: tuple[oracle.Counter, ...]
    running: frozenset[str] | None
    more: int


class Sender:
    """The hosts: what each still has to send, in an order of its own."""

    def __init__(self, books: Books, chance: random.Random) -> None:
        self.books, self.chance = books, chance
        self.queues: dict[str, list[Report]] = {host: [] for host in books.hosts}
        self.grown: collections.Counter[tuple[str, str]] = collections.Counter()
        self.runs: dict[str, frozenset[str]] = {host: frozenset() for host in books.hosts}
        self.made = self.sent = self.lost = 0
        self.seq = 0

    def make(self, host: str) -> None:
        """One report more: counters that grew, and perhaps another set of copies that run."""
        mine = [copy for copy in self.books.copies.values() if copy.host == host]
        counters = []
        for copy in mine:
            key = (copy.copy, f"c{self.chance.randrange(3)}")
            self.grown[key] += self.chance.choice([0, 1, 999, 10**6, 10**8])
            counters.append(oracle.Counter(copy.copy, "b", key[1], 1, 1, 1, self.grown[key]))
        running = None
        if self.chance.random() < 0.2:
            running = frozenset(copy.copy for copy in mine if self.chance.random() < 0.8)
        self.queues[host].append(Report(tuple(counters), running, self.chance.randrange(4)))
        self.made += 1

    async def send(self, dbs: list[cp_server.Database], now_us: int) -> None:
        """What some hosts send at this moment, in three batches at once."""
        chosen: list[tuple[str, Report]] = []
        for host, queue in self.queues.items():
            if queue and self.chance.random() < 0.9:
                report = queue.pop(self.chance.randrange(len(queue)))
                chosen.append((host, report))
        self.chance.shuffle(chosen)
        await asyncio.gather(*(self._batch(dbs[i], chosen[i::3], now_us) for i in range(3)))

    async def _batch(
        self, db: cp_server.Database, chosen: list[tuple[str, Report]], now_us: int
    ) -> None:
        events: dict[str, tuple[oracle.Heartbeat, int]] = {}
        beats = []
        for host, report in chosen:
            self.sent += 1
            is_acknowledged = self.chance.random() >= 0.3
            if not is_acknowledged or report.more:
                report.more -= is_acknowledged
                self.queues[host].append(dataclasses.replace(report, running=None))
            if not is_acknowledged and self.chance.random() < 0.5:
                self.lost += 1
                continue  # it did not even arrive
            running = self.runs[host] if report.running is None else report.running
            event = oracle.Heartbeat(now_us, host, 30_000, running, report.counters)
            self.seq += 1
            events[host] = (event, self.seq)
            beat = dataclasses.replace(self.books.beat(event), seq=self.seq)
            if report.running is None:
                beat = dataclasses.replace(beat, observed=None)
            beats.append(beat)
        try:
            await cp_server.record_heartbeats(db, beats, peer_check=False)
            landed = set(events)
        except (cp_server.Refusal, OSError):
            seqs = self._read_seqs()
            landed = {host for host, (_, seq) in events.items() if seqs[host] == seq}
        for host in sorted(landed):
            self.books.events.append(events[host][0])
            self.runs[host] = events[host][0].running or frozenset()

    def _read_seqs(self) -> dict[str, int]:
        """The last heartbeat of each host; the database is there again."""
        rows = self.books.query("SELECT hostname, seq FROM liveness JOIN hosts USING (host_no)")
        return {row["hostname"]: row["seq"] for row in rows}


async def race(db: cp_server.Database) -> None:
    """One more that closes what is due, whatever becomes of it."""
    try:
        await close_all(db, 7)
    except cp_server.Error:
        await asyncio.sleep(0.05)


async def play(books: Books, chance: random.Random) -> Sender:
    sender = Sender(books, chance)
    dbs = [books.database_of(2) for _ in range(5)]
    for db in dbs:
        await db.open()
    time_us, steps = T, 0
    crashes = sorted(chance.randrange(50, 400) for _ in range(CRASHES))
    while sender.made < DELIVERIES or any(sender.queues.values()):
        for host in books.hosts:
            if sender.made < DELIVERIES and chance.random() < 0.5:
                sender.make(host)
        time_us += chance.choice([5, 30, 31, 60, 90, 200]) * S + chance.randrange(1000)
        steps += 1
        books.set_time(time_us)
        work = [sender.send(dbs[:3], time_us), race(dbs[3]), race(dbs[4])]
        if crashes and steps >= crashes[0]:
            crashes.pop(0)
            await asyncio.gather(*work, killed(books, chance))
        else:
            await asyncio.gather(*work)
    assert crashes == []
    books.set_time(time_us + 2 * HOUR)
    await close_all(dbs[3])
    for db in dbs:
        await db.close()
    return sender


async def killed(books: Books, chance: random.Random) -> None:
    """In the middle of it; not in a thread, with whose end the server would end."""
    await asyncio.sleep(chance.random() * 0.05)
    books.postgres.stop(signal.SIGQUIT)
    books.postgres.start()
    books.connect()


def test_the_ledger_is_the_oracles_after_all_of_it(books: Books, seed: str) -> None:
    chance = random.Random(seed)
    copies = [
        oracle.Copy(
            f"{host}-{number}",
            f"w{number}",
            chance.choice(["kuma", "gull"]),
            f"h{host}",
            f"p{host % 7}",
            chance.choice([50, 333, 1000]),
            chance.choice([16 << 20, 10**9]),
        )
        for host in range(HOSTS)
        for number in range(2)
    ]
    add_fleet(books, *copies, cards=(CARD, dataclasses.replace(CARD, card="2", customer="gull")))
    sender = asyncio.run(play(books, chance))
    print(f"{sender.made} reports, sent {sender.sent} times, {sender.lost} never arrived")
    assert sender.made >= DELIVERIES
    assert sender.sent > 2 * DELIVERIES
    expected = books.check()
    assert sum(each.cpu_micros for each in expected.windows) > 0
    assert sum(each.egress_micros for each in expected.windows) > 0
    windows = books.query(
        "SELECT count(*) AS windows, count(DISTINCT (assignment_no, hour_at, part)) AS keys,"
        " (SELECT count(*) FROM ledger_transactions WHERE kind = 'usage') AS charged"
        " FROM usage_windows"
    )[0]
    assert windows["windows"] == windows["keys"]
    assert windows["charged"] <= windows["windows"]
