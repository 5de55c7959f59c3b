"""Usage that is shuffled, repeated, lost, with closers that race and a database that is killed.

It goes through gRPC to a control plane that serves, with all its loops.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import cp_server
from proto import openinfra_pb2_grpc
from tests import billing_oracle as oracle
from tests.billing import Books, close_all
from tests.harness import ControlPlane, Postgres, change_scripts
from tests.integration.test_billing import CARD, HOUR, S, T, add_fleet

DELIVERIES = 10_000
CRASHES = 6
HOSTS = 50
CHANNELS = 3
SPARE = "spare"  # a host without copies: whoever asks with it learns whether heartbeats are taken
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
PACE = {"USAGE_S": "0.2", "BATCH_S": "0.01"}


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

    def __init__(self, books: Books, port: int, chance: random.Random) -> None:
        self.books, self.chance = books, chance
        self.channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS) for _ in range(CHANNELS)
        ]
        self.stubs = [openinfra_pb2_grpc.AgentApiStub(channel) for channel in self.channels]
        hosts = [host for host in books.hosts if host != SPARE]
        self.queues: dict[str, list[Report]] = {host: [] for host in hosts}
        self.boots = dict.fromkeys(hosts, 1)
        self.grown: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.made = self.sent = self.lost = self.refused = 0
        self.seq = 0

    def make(self, host: str) -> None:
        """One report more: counters that grew, and perhaps another set of copies that run."""
        if self.chance.random() < 0.01:
            self.boots[host] += 1
        mine = [copy for copy in self.books.copies.values() if copy.host == host]
        counters = []
        for copy in mine:
            key = (copy.copy, f"{host}/{self.boots[host]}", f"c{self.chance.randrange(3)}")
            self.grown[key] += self.chance.choice([0, 1, 999, 10**6, 10**8])
            counters.append(oracle.Counter(*key, 1, 1, 1, self.grown[key]))
        running = None
        if self.chance.random() < 0.2:
            running = frozenset(copy.copy for copy in mine if self.chance.random() < 0.8)
        self.queues[host].append(Report(tuple(counters), running, self.chance.randrange(4)))
        self.made += 1

    async def send(self, now_us: int) -> None:
        """What some hosts send at this moment, over three connections at once."""
        calls = []
        for host, queue in self.queues.items():
            if not queue or self.chance.random() >= 0.9:
                continue
            report = queue.pop(self.chance.randrange(len(queue)))
            self.sent += 1
            if self.chance.random() < 0.15:  # it does not even arrive
                self.lost += 1
                queue.append(dataclasses.replace(report, running=None))
                continue
            self.seq += 1
            boot = f"{host}/{self.boots[host]}"
            event = oracle.Heartbeat(now_us, host, 0, report.running, report.counters, boot)
            calls.append(self._deliver(event, self.seq, report, self.chance.random() < 0.15 / 0.85))
        self.chance.shuffle(calls)
        unknown = [each for each in await asyncio.gather(*calls) if each]
        if unknown:  # the database was killed, and is there again
            rows = self.books.query(
                "SELECT hostname, seq, interval_ms FROM liveness JOIN hosts USING (host_no)"
            )
            stored = {(row["hostname"], row["seq"]): row["interval_ms"] for row in rows}
            for event, seq in unknown:
                if (event.host, seq) in stored:
                    self._note(event, stored[event.host, seq])

    async def _deliver(
        self, event: oracle.Heartbeat, seq: int, report: Report, is_answer_lost: bool
    ) -> tuple[oracle.Heartbeat, int] | None:
        """One try; gives it back when nobody said whether it is committed."""
        again = dataclasses.replace(report, running=None)
        interval_ms = await self._call(event, seq)
        if interval_ms is None:
            self.refused += 1
            self.queues[event.host].append(again)
            return event, seq
        self._note(event, interval_ms)
        if is_answer_lost or report.more:
            again.more -= not is_answer_lost
            self.queues[event.host].append(again)
        return None

    async def _call(self, event: oracle.Heartbeat, seq: int) -> int | None:
        """The interval that the answer asks for; None: TRY_LATER."""
        stub: Any = self.stubs[seq % CHANNELS]
        try:
            reply = await stub.Heartbeat(self.books.request(event, seq), timeout=30)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return None
        interval_ms: int = reply.next_heartbeat_ms
        return interval_ms

    def _note(self, event: oracle.Heartbeat, interval_ms: int) -> None:
        self.books.events.append(dataclasses.replace(event, interval_ms=interval_ms))

    async def wait_taken(self, now_us: int) -> None:
        """Until heartbeats are taken again: no host is silent because of a crash."""
        event = oracle.Heartbeat(now_us, SPARE, 0, None, ())
        for _ in range(200):
            self.seq += 1
            if await self._call(event, self.seq):
                return
            await asyncio.sleep(0.05)
        raise AssertionError("no heartbeat is taken after a crash")


async def race(db: cp_server.Database) -> None:
    """One more that closes what is due, whatever becomes of it."""
    try:
        await close_all(db, 7)
    except cp_server.Error:
        await asyncio.sleep(0.05)


async def play(books: Books, port: int, chance: random.Random) -> Sender:
    sender = Sender(books, port, chance)
    dbs = [books.database_of(2) for _ in range(2)]
    for db in dbs:
        await db.open()
    time_us, steps = T, 0
    crashes = sorted(chance.randrange(50, 400) for _ in range(CRASHES))
    for host in sender.queues:
        sender.make(host)
    while sender.made < DELIVERIES or any(sender.queues.values()):
        for host in sender.queues:
            if sender.made < DELIVERIES and chance.random() < 0.5:
                sender.make(host)
        # Some are silent for more than three intervals, nobody until its lease is over.
        time_us += chance.choice([5, 30, 31, 60, 90]) * S + chance.randrange(1000)
        steps += 1
        books.set_time(time_us)
        work = [sender.send(time_us), race(dbs[0]), race(dbs[1])]
        if crashes and steps >= crashes[0]:
            crashes.pop(0)
            await asyncio.gather(*work, killed(books, chance))
            await sender.wait_taken(time_us)
        else:
            await asyncio.gather(*work)
        assert sender.refused <= CRASHES * HOSTS, "refused though the database is there"
    assert crashes == []
    for channel in sender.channels:
        await channel.close()
    for db in dbs:
        await db.close()
    books.set_time(time_us + 2 * HOUR)
    return sender


async def killed(books: Books, chance: random.Random) -> None:
    """In the middle of it; not in a thread, with whose end the server would end."""
    await asyncio.sleep(chance.random() * 0.02)
    books.postgres.stop(signal.SIGQUIT)
    books.postgres.start()
    books.connect()


def close(books: Books) -> None:
    """What is due at the end; the copies that were lost then, for the oracle."""

    async def work() -> None:
        db = books.database_of()
        await db.open()
        await close_all(db)
        await db.close()

    asyncio.run(work())
    names = {value: key for key, value in books.ids.items()}
    for row in books.query(
        "SELECT assignment_id, state, stop_at, (extract(epoch FROM ended_at) * 1000000)::bigint"
        " AS ended_us FROM assignments WHERE stop_at IS NOT NULL OR ended_at IS NOT NULL"
    ):
        assert (row["state"], row["stop_at"]) == ("lost", None)
        books.events.append(oracle.CopyEnded(row["ended_us"], names[row["assignment_id"]]))


def test_the_ledger_is_the_oracles_after_all_of_it(
    books: Books, make_cp: Callable[..., ControlPlane], tmp_path: Path, seed: str
) -> None:
    chance = random.Random(seed)
    copies = [
        oracle.Copy(
            f"{host}-{number}",
            f"w{number}-{host % 5}",
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
    books.add_host(SPARE, "p0")
    scripts = change_scripts(tmp_path / "scripts", "cp_server.py", **PACE)
    cp = make_cp(start=False, postgres=books.postgres, scripts=scripts)
    books.attach(cp)
    cp.start()
    sender = asyncio.run(play(books, cp.grpc_port, chance))
    assert cp.stop() == 0
    close(books)
    print(
        f"{sender.made} reports, sent {sender.sent} times, {sender.lost} never arrived,"
        f" {sender.refused} were refused"
    )
    assert sender.made >= DELIVERIES
    assert sender.sent > 2 * DELIVERIES
    # Whether a call is refused depends on where a crash falls; that they were felt does not.
    assert "database gave no answer" in cp.log
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
