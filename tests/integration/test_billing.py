"""Heartbeats to the ledger, on a real PostgreSQL whose clock the test sets, against the oracle."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Iterator

import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.billing import Books, run
from tests.harness import Postgres

S = 1_000_000
HOUR = oracle.HOUR_US
T = int(dt.datetime(2026, 3, 31, 20, tzinfo=dt.timezone.utc).timestamp()) * S
CARD = oracle.RateCard("1", None, T, 31_415, 2_718, 50_001, 850_000)


@pytest.fixture
def books(postgres: Postgres) -> Iterator[Books]:
    made = Books(postgres)
    made.set_time(T)
    yield made
    made.close()


def add_fleet(
    books: Books, *copies: oracle.Copy, cards: tuple[oracle.RateCard, ...] = (CARD,)
) -> None:
    for host, provider in dict.fromkeys((copy.host, copy.provider) for copy in copies):
        books.add_host(host, provider)
    for customer in dict.fromkeys(copy.customer for copy in copies):
        books.add_customer(customer)
    for copy in copies:
        books.add_copy(copy)

    async def work() -> None:
        db = books.database_of()
        await db.open()
        for card in cards:
            await books.add_card(db, card)
        await db.close()

    asyncio.run(work())


WEB = oracle.Copy("a", "web", "kuma", "h1", "mole", 500, 2 * 10**9)


def beats(host: str, first_us: int, last_us: int, running: set[str]) -> list[oracle.Event]:
    """A heartbeat each 30 s."""
    return [
        oracle.Heartbeat(time_us, host, 30_000, frozenset(running), ())
        for time_us in range(first_us, last_us + 1, 30 * S)
    ]


def test_an_hour_and_a_half(books: Books) -> None:
    add_fleet(books, WEB)
    run(books, beats("h1", T + 60 * S, T + 60 * S + HOUR * 3 // 2, {"a"}))
    expected = books.check()
    assert [each.billed_us for each in expected.windows] == [HOUR - 60 * S, HOUR // 2 + 60 * S]


def test_a_partition_over_closed_hours_comes_late(books: Books) -> None:
    """The rest of the gap lies in an hour that is closed: another window of it, not an edit."""
    add_fleet(books, WEB)
    before = beats("h1", T, T + HOUR - 30 * S, {"a"})
    after = beats("h1", T + 4 * HOUR, T + 5 * HOUR, {"a"})
    run(books, [*before, T + 2 * HOUR, *after])
    books.check()
    parts = books.query("SELECT part, billed_us FROM usage_windows ORDER BY hour_at, part")
    found = [(row["part"], row["billed_us"] // S) for row in parts]
    assert found == [(1, 3570), (2, 30), (1, 60), (1, 3600)]


def random_events(chance: random.Random, copies: list[oracle.Copy]) -> list[oracle.Event]:
    """Six hours over a month's end: silences, stops, ends, counters of all kinds, cut at hours."""
    events: list[oracle.Event] = []
    ended: dict[str, int] = {}
    for host in {copy.host for copy in copies}:
        mine = [copy for copy in copies if copy.host == host]
        running: set[str] = set()
        sent: dict[tuple[str, str], int] = {}
        time_us = T + chance.randrange(600) * S
        while time_us < T + 6 * HOUR:
            for copy in mine:
                if copy.copy not in ended and chance.random() < 0.05:
                    running ^= {copy.copy}
                if copy.copy not in ended and chance.random() < 0.004:
                    ended[copy.copy] = time_us
                    events.append(oracle.CopyEnded(time_us - 1, copy.copy))
                    running.discard(copy.copy)
            counters = []
            for copy in mine:
                if copy.copy in ended or chance.random() < 0.7:
                    continue
                key = (copy.copy, f"c{chance.randrange(3)}")
                sent[key] = sent.get(key, 0) + chance.choice([0, 1, 10**6, 10**9, 4 * 10**9])
                told = max(0, sent[key] - chance.choice([0, 0, 10**6]))
                counters.append(oracle.Counter(*key[:1], "boot", key[1], 1, 1, 1, told))
            beat = oracle.Heartbeat(
                time_us,
                host,
                chance.choice([25_000, 30_000, 60_000]),
                frozenset(running),
                tuple(counters),
            )
            events.append(beat)
            step = chance.choice([30 * S, 30 * S, 31 * S + 7, 90 * S, 400 * S])
            if chance.random() < 0.01:
                step = chance.choice([HOUR, 2 * HOUR])
            time_us += step
            if chance.random() < 0.05:  # just on the hour, or beside it
                time_us += -(time_us - T) % HOUR + chance.choice([-1, 0, 0, 1])
    return sorted(events, key=lambda event: event.at_us)


@pytest.mark.parametrize("every", [1, 50, 0])
def test_any_events_are_billed_as_the_oracle_says(books: Books, seed: str, every: int) -> None:
    chance = random.Random(f"{seed}/{every}")
    copies = [
        oracle.Copy(
            f"{host}-{number}",
            f"w{number % 2}",
            chance.choice(["kuma", "gull"]),
            host,
            f"p-{host[:1]}",
            chance.choice([50, 333, 1000]),
            chance.choice([16 << 20, 10**9, 3 * 10**9 + 1]),
        )
        for host in ("h1", "h2", "k1")
        for number in range(4)
    ]
    cards = (
        CARD,
        oracle.RateCard("2", None, T + 2 * HOUR, 1, 99_999, 3, 0),
        oracle.RateCard("3", "gull", T + HOUR, 77_777, 5, 1, 1_000_000),
    )
    add_fleet(books, *copies, cards=cards)
    run(books, random_events(chance, copies), every=every)
    books.check()


def test_hours_without_a_rate_card_are_free(books: Books) -> None:
    add_fleet(books, WEB, cards=())
    run(books, beats("h1", T, T + HOUR, {"a"}))
    books.check()
    assert books.balances() == {}


@pytest.mark.parametrize(
    ("valid_from", "said"),
    [
        (T - 2 * HOUR, "are closed"),
        (T, "already"),
    ],
)
def test_a_rate_card_that_would_change_what_was(books: Books, valid_from: int, said: str) -> None:
    add_fleet(books, WEB)
    card = oracle.RateCard("x", None, valid_from, 1, 1, 1, 1)

    async def work() -> None:
        db = books.database_of()
        await db.open()
        with pytest.raises(cp_server.Refusal, match=said):
            await books.add_card(db, card)
        await db.close()

    asyncio.run(work())
