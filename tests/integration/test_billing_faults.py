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
from proto import openinfra_pb2 as pb
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


@dataclasses.dataclass
class Answered:
    """A heartbeat, and the intervals that its answers asked for."""

    event: oracle.Heartbeat
    seq: int
    intervals: list[int]


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
        # What a host sent last with success: the same bytes may come once more, behind others.
        self.before: dict[str, tuple[oracle.Heartbeat, int]] = {}
        self.made = self.sent = self.lost = self.refused = self.twice = self.late = 0
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

    async def send(self, now_us: int, is_calm: bool) -> None:
        """What some hosts send at this moment, over three connections at once.

        `is_calm`: the database is not killed now, so that every call is answered.
        """
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
            before = self.before.get(host)
            if is_calm and before and before[0].boot_id == boot and self.chance.random() < 0.2:
                calls.append(
                    self._deliver_late(dataclasses.replace(before[0], at_us=now_us), before[1])
                )
        self.chance.shuffle(calls)
        answered = collections.defaultdict[str, list[Answered]](list)
        unknown: list[Answered] = []
        for one in await asyncio.gather(*calls):
            (answered[one.event.host] if one.intervals else unknown).append(one)
        rows = self.books.query(
            "SELECT hostname, seq, interval_ms FROM liveness JOIN hosts USING (host_no)"
        )
        stored = {row["hostname"]: (row["seq"], row["interval_ms"]) for row in rows}
        for host, group in answered.items():
            intervals = {interval for one in group for interval in one.intervals}
            # Each answer asks for another one: of those at one moment the last one counts.
            is_sure = is_calm and len(intervals) == 1
            interval_ms = min(intervals) if is_sure else stored[host][1]
            assert interval_ms in intervals or not is_calm
            for one in group:
                self._note(one.event, interval_ms)
        for one in unknown:  # the database was killed, and is there again
            seq, interval_ms = stored[one.event.host]
            if seq == one.seq:
                self._note(one.event, interval_ms)

    async def _deliver(
        self, event: oracle.Heartbeat, seq: int, report: Report, is_answer_lost: bool
    ) -> Answered:
        """One try; without an answer nobody knows whether it is committed."""
        again = dataclasses.replace(report, running=None)
        done = await self._call(event, seq)
        if not done.intervals:
            self.refused += 1
            self.queues[event.host].append(again)
            return done
        self.before[event.host] = (dataclasses.replace(event, running=None), seq)
        if is_answer_lost or report.more:
            again.more -= not is_answer_lost
            self.queues[event.host].append(again)
        return done

    async def _deliver_late(self, event: oracle.Heartbeat, seq: int) -> Answered:
        """Once more what was answered long ago, beside what its host sends now.

        A connection from before the last kill may be left, which takes nothing.
        """
        self.late += 1
        for _ in range(CHANNELS * 4):
            done = await self._call(event, seq)
            if done.intervals:
                return done
            self.refused += 1
        raise AssertionError("no answer, though the database is there")

    async def _call(self, event: oracle.Heartbeat, seq: int) -> Answered:
        """Some calls are made twice, at once, over two connections."""
        request = self.books.request(event, seq)
        times = 1 + (self.chance.random() < 0.2)
        self.twice += times - 1
        calls = [self._ask(request, (seq + number) % CHANNELS) for number in range(times)]
        intervals = [each for each in await asyncio.gather(*calls) if each]
        return Answered(event, seq, intervals)

    async def _ask(self, request: pb.HeartbeatRequest, channel: int) -> int | None:
        """The interval that the answer asks for; None: TRY_LATER."""
        stub: Any = self.stubs[channel]
        try:
            reply = await stub.Heartbeat(request, timeout=30)
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
            if (await self._call(event, self.seq)).intervals:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("no heartbeat is taken after a crash")


async def race(db: cp_server.Database) -> int:
    """One more that closes what is due, whatever becomes of it; gives back how many windows."""
    try:
        return await close_all(db, 7)
    except cp_server.Error:
        await asyncio.sleep(0.05)
        return 0


async def play(books: Books, port: int, chance: random.Random) -> Sender:
    sender = Sender(books, port, chance)
    dbs = [books.database_of(2) for _ in range(2)]
    for db in dbs:
        await db.open()
    time_us, steps, closed = T, 0, collections.Counter[int]()
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
        is_calm = not crashes or steps < crashes[0]
        dbs.reverse()  # who asks first closes most
        work = [race(dbs[0]), race(dbs[1]), sender.send(time_us, is_calm)]
        if is_calm:
            windows, more, _ = await asyncio.gather(*work)
            closed += collections.Counter({steps % 2: windows, (steps + 1) % 2: more})
        else:
            crashes.pop(0)
            await asyncio.gather(*work, killed(books, chance))
            await sender.wait_taken(time_us)
        assert sender.refused <= CRASHES * HOSTS, "refused though the database is there"
    assert crashes == []
    print(f"closed by the racers: {dict(closed)}")
    assert set(+closed) == {0, 1}
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
        f" {sender.refused} were refused, {sender.twice} came twice at once, {sender.late} late"
    )
    assert sender.twice > DELIVERIES / 10
    assert sender.late > DELIVERIES / 10
    assert sender.sent > 2 * DELIVERIES
    # Whether a call is refused depends on where a crash falls; that they were felt does not.
    assert "database gave no answer" in cp.log
    expected = books.check()
    assert sum(each.cpu_micros for each in expected.windows) > 0
    assert sum(each.egress_micros for each in expected.windows) > 0
