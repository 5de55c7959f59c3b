"""Heartbeats to the ledger, on a real PostgreSQL whose clock the test sets, against the oracle."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import datetime as dt
import json
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.billing import Books, at, close_all, namespace_of, run
from tests.harness import ROOT, ControlPlane, Postgres, change_scripts, wait_for
from tests.integration.test_http_api import check_shape

V = TypeVar("V")
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


def in_database(books: Books, work: Callable[[cp_server.Database], Awaitable[V]]) -> V:
    """One operation on it."""

    async def run_it() -> V:
        db = books.database_of()
        await db.open()
        try:
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(run_it())


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


def test_an_hour_is_closed_five_minutes_after_it_and_not_before(books: Books) -> None:
    add_fleet(books, WEB)
    run(books, beats("h1", T, T + HOUR + 30 * S, {"a"}), is_closed=False)
    close_us = T + HOUR + cp_server.USAGE_GRACE_S * S
    for time_us, windows in ((close_us - 1, 0), (close_us, 1), (close_us + HOUR - 1, 0)):
        books.set_time(time_us)
        assert in_database(books, close_all) == windows
    (window,) = books.query("SELECT billed_us FROM usage_windows")
    assert window == {"billed_us": HOUR}


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
    """Six hours over a month's end: silences, stops, ends, boots, counters, cut at hours."""
    events: list[oracle.Event] = []
    ended: set[str] = set()
    for host in dict.fromkeys(copy.host for copy in copies):
        mine = [copy for copy in copies if copy.host == host]
        running: set[str] = set()
        told: set[str] | None = None  # what the control plane thinks that runs
        sent: dict[tuple[str, str, str], int] = {}
        time_us, boots = T + chance.randrange(600) * S, 1
        while time_us < T + 6 * HOUR:
            for copy in mine:
                if copy.copy not in ended and chance.random() < 0.05:
                    running ^= {copy.copy}
                if copy.copy not in ended and chance.random() < 0.004:
                    ended.add(copy.copy)
                    events.append(oracle.CopyEnded(time_us - 1, copy.copy))
                    running.discard(copy.copy)
            if chance.random() < 0.05:
                boots, told = boots + 1, set()
                running &= chance.choice([running, set()])
            counters = []
            for copy in mine:
                if chance.random() < 0.7:  # also after its end
                    continue
                # Those of a new boot begin at 0; what was counted before it may come late.
                boot = f"{host}/{max(boots - chance.choice([0, 0, 0, 1]), 1)}"
                key = (copy.copy, boot, f"c{chance.randrange(3)}")
                sent[key] = sent.get(key, 0) + chance.choice([0, 1, 10**6, 10**9, 4 * 10**9])
                counted = max(0, sent[key] - chance.choice([0, 0, 10**6]))
                counters.append(oracle.Counter(*key, 1, 1, 1, counted))
            is_silent = told == running and chance.random() < 0.5
            told = set(running)
            beat = oracle.Heartbeat(
                time_us,
                host,
                chance.choice([25_000, 30_000, 60_000]),
                None if is_silent else frozenset(running),
                tuple(counters),
                f"{host}/{boots}",
            )
            events.append(beat)
            step = chance.choice([30 * S, 30 * S, 31 * S + 7, 90 * S, 400 * S])
            if chance.random() < 0.01:
                step = chance.choice([HOUR, 2 * HOUR])
            time_us += step
            if chance.random() < 0.05:  # just on the hour, or beside it
                time_us += -(time_us - T) % HOUR + chance.choice([-1, 0, 0, 1])
    return sorted(events, key=lambda event: event.at_us)


def add_random_fleet(books: Books, chance: random.Random) -> list[oracle.Copy]:
    """Twelve copies of two customers on hosts of two providers; the first hour is free."""
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
        dataclasses.replace(CARD, valid_from_us=T + HOUR),
        oracle.RateCard("2", None, T + 2 * HOUR, 1, 99_999, 3, 0),
        oracle.RateCard("3", "gull", T + HOUR, 77_777, 5, 1, 1_000_000),
        oracle.RateCard("4", None, T + 3 * HOUR, 31_415, 2_718, 50_001, 333_333),
    )
    copies[0] = dataclasses.replace(copies[0], customer="kuma")
    copies[-1] = dataclasses.replace(copies[-1], customer="gull")
    add_fleet(books, *copies, cards=cards)
    return copies


@pytest.mark.parametrize("every", [1, 50, 0])
def test_any_events_are_billed_as_the_oracle_says(books: Books, seed: str, every: int) -> None:
    chance = random.Random(f"{seed}/{every}")
    run(books, random_events(chance, add_random_fleet(books, chance)), every=every)
    books.check()


def test_what_is_issued_is_what_the_oracle_says(
    books: Books, make_cp: Callable[..., ControlPlane], tmp_path: Path, seed: str
) -> None:
    """Each line and total of invoices and statements, by a control plane that serves."""
    chance = random.Random(seed)
    events = random_events(chance, add_random_fleet(books, chance))
    events += [
        event for host in books.hosts for event in beats(host, T + 6 * HOUR, T + 6 * HOUR, set())
    ]
    run(books, events, every=50)  # nothing runs at the end
    expected = books.check()
    invoices, statements, _ = oracle.totals(expected)
    months = ("2026-03", "2026-04")
    due = [(month, each) for month in months for each in books.customers]
    due = [(month, each) for month, each in due if invoices.get((each, month))]
    assert {month for month, _ in due} == set(months)
    numbers = {key: number for number, key in enumerate(due, 1)}
    cp = make_cp(start=False)
    books.attach(cp)
    issued_us = int(dt.datetime(2026, 5, 2, tzinfo=dt.timezone.utc).timestamp()) * S + 1
    books.set_time(issued_us)
    cp.start()
    issued = (
        "SELECT to_char(month, 'YYYY-MM') AS month, c.name, invoice_no, total_micros"
        " FROM invoices JOIN customers c USING (customer_no) ORDER BY invoice_no"
    )
    rows = wait_for("the invoices", lambda: books.query(issued))
    assert [tuple(row.values()) for row in rows] == [
        (month, each, number, invoices[each, month]) for (month, each), number in numbers.items()
    ]

    def check(found: Any, lines: list[dict[str, Any]], total_micros: int) -> None:
        shown = [{name: line[name] for name in lines[0]} for line in found["lines"]]
        assert shown == lines
        assert (found["total_micros"], found["preliminary"]) == (total_micros, False)

    for (customer, month), total_micros in invoices.items():
        key = cp.command("mint-key", str(books.customers[customer])).stdout.strip()
        status, invoice = cp.call("GET", f"/api/v1/invoices/{month}", token=key)
        assert (status, invoice["number"]) == (200, numbers.get((month, customer)))
        if invoice["number"]:
            assert invoice["issued_at"] == cp_server.render_time(at(issued_us))
        mine = [line for line in expected.lines if (line.customer, line.month) == (customer, month)]
        check(invoice, books.bill_lines(mine, "invoice"), total_micros)
    for month in months:
        done = cp.command("statements", f"--month={month}", f"--out={tmp_path}")
        assert done.returncode == 0, done.stderr
    files = [json.loads(path.read_text()) for path in tmp_path.glob("statement-*.json")]
    found = {(each["whose"], each["month"]): each for each in files}
    assert found.keys() == {(namespace_of(whose), month) for whose, month in statements}
    for (provider, month), total_micros in statements.items():
        mine = [line for line in expected.lines if (line.provider, line.month) == (provider, month)]
        statement = found[namespace_of(provider), month]
        check(statement, books.bill_lines(mine, "statement"), total_micros)
    assert cp.command("ledger", "verify").returncode == 0


@pytest.mark.parametrize("how", ["lost", "stop", "held"])
def test_a_copy_without_right_is_not_billed_whatever_its_host_says(books: Books, how: str) -> None:
    add_fleet(books, WEB)
    run(books, beats("h1", T, T + 600 * S, {"a"}), is_closed=False)
    end = oracle.CopyEnded(T + 615 * S, "a")
    books.set_time(end.at_us)
    books.end(end, how)
    books.events.append(end)
    run(books, beats("h1", T + 630 * S, T + HOUR, {"a"}))
    assert [each.billed_us for each in books.check().windows] == [600 * S]


def test_what_comes_late_opens_no_run(books: Books) -> None:
    """A number below the session's last, from its first moment on; a new session begins at 1."""
    add_fleet(books, WEB)

    async def say(db: cp_server.Database, seq: int, at_s: int, state: str) -> tuple[str, int]:
        books.set_time(T + at_s * S)
        running = frozenset("a" if state == "running" else "")
        event = oracle.Heartbeat(T, "h1", 30_000, running, ())
        beat = dataclasses.replace(books.beat(event), seq=seq)
        if not state:  # as the agent says it when nothing changed since an answer
            beat = dataclasses.replace(beat, observed=None)
        answers, _ = await cp_server.record_heartbeats(db, [beat], peer_check=False)
        assert [type(each) for each in answers.values()] == [cp_server.Accepted]
        (row,) = books.query("SELECT state, seq FROM assignments JOIN liveness USING (host_no)")
        return row["state"], row["seq"]

    def open_session(number: int) -> None:
        """As a resume does: the session before has ended, and no heartbeat is of the new one."""
        secret = bytes([number] * 32)
        books.sessions["h1"], books.hosts["h1"] = secret, cp_server.hash_session(secret)
        books.query("UPDATE sessions SET ended_at = clock.now() WHERE ended_at IS NULL RETURNING 1")
        books.query(
            "INSERT INTO sessions (session_sha256, host_no, opened_by, started_at)"
            " SELECT %s, host_no, 'resume', clock.now() FROM hosts RETURNING 1",
            books.hosts["h1"],
        )

    async def work(db: cp_server.Database) -> None:
        # The second try of the first heartbeat came, then the first one.
        assert await say(db, 2, 5, "waiting") == ("waiting", 2)
        assert await say(db, 1, 6, "running") == ("waiting", 2)
        for number in range(3, 120):
            assert await say(db, number, 30 * number, "") == ("waiting", number)
        assert books.query("SELECT 1 FROM usage_runs") == []
        assert await say(db, 907, 3600, "running") == ("running", 907)
        assert await say(db, 908, 3630, "waiting") == ("waiting", 908)
        assert await say(db, 907, 3631, "running") == ("waiting", 908)
        assert await say(db, 908, 3660, "running") == ("running", 908)  # a repeat
        # The last one is of the session before.
        open_session(7)
        assert await say(db, 1, 3661, "waiting") == ("waiting", 1)
        assert await say(db, 3, 3662, "running") == ("running", 3)
        assert await say(db, 2, 3663, "waiting") == ("running", 3)
        # And by a clock that was a year ahead.
        year = 365 * 86_400
        assert await say(db, 909, year, "running") == ("running", 909)
        books.set_time(T + 3690 * S)
        open_session(8)
        assert await say(db, 1, 3690, "waiting") == ("waiting", 1)
        # It could not save that it had this session, was started again, and asks for it again.
        assert await say(db, 50, 3691, "waiting") == ("waiting", 50)
        (host,) = books.query("SELECT host_no FROM hosts")
        async with db.transaction() as tx:
            await cp_server._open_session(tx, host["host_no"], books.hosts["h1"], "resume")
        assert await say(db, 1, 3692, "running") == ("running", 1)
        assert await say(db, 2, 3693, "waiting") == ("waiting", 2)

    in_database(books, work)
    runs = books.query("SELECT (to_us - from_us) / 1000000 AS s FROM usage_runs ORDER BY run_no")
    assert [row["s"] for row in runs] == [30, 1, 91, 1]


def test_hours_are_cut_in_many_small_transactions(
    books: Books, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp_server, "USAGE_PARTS", 3)
    copies = [oracle.Copy(f"c{n}", "w", "kuma", "h1", "p", 100, 10**9) for n in range(9)]
    add_fleet(books, *copies)
    run(books, random_events(random.Random(seed), copies))
    books.check()


def test_a_clock_of_the_control_plane_that_is_wrong_for_a_while(books: Books) -> None:
    """A year ahead for one heartbeat, then right again: what is too much is one silence's cap."""
    add_fleet(books, WEB, dataclasses.replace(WEB, copy="b"))
    run(books, beats("h1", T, T + HOUR // 2, {"a"}), is_closed=False)
    year = 365 * 24 * HOUR
    run(books, beats("h1", T + year, T + year, {"a", "b"}), is_closed=False)
    after = beats("h1", T + HOUR // 2 + 30 * S, T + 5 * HOUR // 2, {"a", "b"})
    run(books, [*after, *beats("h1", T + 5 * HOUR // 2 + 30 * S, T + 6 * HOUR, set())])
    books.set_time(T + 8 * HOUR)
    wrong, _ = in_database(books, cp_server.verify_ledger)
    assert wrong == []
    rows = books.query(
        "SELECT assignment_no, sum(billed_us)::bigint AS us, count(*) AS hours,"
        " max(hour_at) AS last FROM usage_windows GROUP BY 1 ORDER BY 1"
    )
    billed = 5 * HOUR // 2
    assert [row["us"] for row in rows] == [billed + 90 * S, 2 * HOUR]
    assert {row["hours"] for row in rows} == {3}
    assert books.query("SELECT 1 FROM usage_runs WHERE NOT is_closed") == []


def test_a_clock_of_the_control_plane_that_was_a_day_behind(books: Books) -> None:
    """For two hours, of which one is closed meanwhile: nothing is lost, nothing stands still."""
    add_fleet(books, WEB)
    day = 24 * HOUR
    run(books, beats("h1", T, T + 30 * HOUR, {"a"}))
    run(books, beats("h1", T + 6 * HOUR + 30 * S, T + 8 * HOUR + 30 * S, {"a"}))
    run(books, beats("h1", T + 32 * HOUR, T + 60 * HOUR, {"a"}))
    run(books, beats("h1", T + 60 * HOUR + 30 * S, T + 60 * HOUR + 60 * S, set()))
    books.set_time(T + 60 * HOUR + day)
    in_database(books, close_all)
    assert books.query("SELECT 1 FROM usage_runs WHERE NOT is_closed") == []
    (row,) = books.query("SELECT sum(billed_us)::bigint AS us FROM usage_windows")
    assert row["us"] == 30 * HOUR + 2 * HOUR + 90 * S + 28 * HOUR + 30 * S
    wrong, _ = in_database(books, cp_server.verify_ledger)
    assert wrong == []


def test_egress_of_a_clock_that_was_ahead(books: Books) -> None:
    """It is billed once the clock is right, not in a year."""
    add_fleet(books, WEB)
    run(books, beats("h1", T, T + HOUR, {"a"}), is_closed=False)
    ahead = oracle.Counter("a", "b", "c", 1, 1, 1, 10**9)
    year = 365 * 24 * HOUR
    run(
        books,
        [oracle.Heartbeat(T + year, "h1", 30_000, frozenset("a"), (ahead,))],
        is_closed=False,
    )
    run(books, beats("h1", T + HOUR + 30 * S, T + 3 * HOUR, {"a"}))
    (row,) = books.query("SELECT sum(egress_bytes)::bigint AS bytes FROM usage_windows")
    assert row["bytes"] == 10**9
    wrong, _ = in_database(books, cp_server.verify_ledger)
    assert wrong == []


def test_marks_that_are_needed_stay(books: Books) -> None:
    add_fleet(books, WEB)
    run(books, beats("h1", T, T + 3 * HOUR, {"a"}), is_closed=False)
    books.set_time(T + 9 * 24 * HOUR)
    assert in_database(books, cp_server.prune_hours) == 0
    run(books, beats("h1", T + 9 * 24 * HOUR, T + 9 * 24 * HOUR + HOUR, {"a"}))
    books.check()
    books.set_time(T + 20 * 24 * HOUR)
    assert in_database(books, cp_server.prune_hours) >= 3
    run(books, beats("h1", T + 20 * 24 * HOUR, T + 20 * 24 * HOUR + HOUR, {"a"}))
    books.check()


def test_one_copy_at_fault_holds_up_no_other(books: Books) -> None:
    copies = [oracle.Copy(f"c{n}", "w", "kuma", "h1", "p", 100, 10**9) for n in range(20)]
    add_fleet(books, *copies)
    names = {copy.copy for copy in copies}
    run(books, beats("h1", T, T + HOUR, names))
    bad = books.ids["c7"]
    books.owner.execute(
        "UPDATE usage_lines SET cpu_micros = 10^15 WHERE assignment_no ="
        " (SELECT assignment_no FROM assignments WHERE assignment_id = %s)",
        (bad,),
    )
    run(books, beats("h1", T + HOUR + 30 * S, T + 2 * HOUR, names), is_closed=False)
    books.set_time(T + 4 * HOUR)
    metrics = cp_server.Metrics()
    for name, kind, text in cp_server.METRICS:
        metrics.define(name, kind, text)
    is_whole = in_database(books, lambda db: cp_server.Biller(db, metrics)._close())
    assert is_whole
    assert "\nopeninfra_unbilled_copies 1\n" in metrics.render()
    rows = books.query(
        "SELECT assignment_id FROM assignments WHERE assignment_no NOT IN"
        " (SELECT assignment_no FROM usage_windows WHERE hour_at = '2026-03-31T21:00Z')"
    )
    assert [row["assignment_id"] for row in rows] == [bad]


@pytest.mark.parametrize(
    ("away_s", "interval_ms", "billed_s"),
    [
        (90, 30_000, 90),  # three intervals of silence count,
        (91, 30_000, 90),  # and no more of it: a busy minute,
        (3_600, 30_000, 90),  # an hour without a control plane,
        (86_400, 30_000, 90),  # a day without a network;
        (3_600, 60_000, 180),  # as the control plane asked last
        (3_600, 25_000, 75),
    ],
)
def test_a_silence_is_billed_up_to_three_intervals(
    books: Books, away_s: int, interval_ms: int, billed_s: int
) -> None:
    """A copy that goes on through it: the control plane was away, or the host was."""
    add_fleet(books, WEB)
    first = oracle.Heartbeat(T + 60 * S, "h1", interval_ms, frozenset("a"), ())
    again = dataclasses.replace(first, at_us=first.at_us + away_s * S)
    run(books, [first, again, dataclasses.replace(again, at_us=again.at_us, running=frozenset())])
    assert sum(each.billed_us for each in books.check().windows) == billed_s * S


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


def test_a_price_of_an_hour_can_be_set_until_it_is_closed(books: Books) -> None:
    """Which is five minutes after it; and once for all customers, and once for each of them."""
    add_fleet(books, WEB, cards=())

    def add(at_us: int, card: oracle.RateCard) -> str:
        async def work(db: cp_server.Database) -> str:
            try:
                await books.add_card(db, card)
            except cp_server.Refusal as refusal:
                return str(refusal)
            return ""

        books.set_time(at_us)
        return in_database(books, work)

    closes_us = T + HOUR + 300 * S
    of_all = oracle.RateCard("x", None, T, 1, 1, 1, 1)
    own = dataclasses.replace(of_all, customer="kuma")
    assert "are closed" in add(closes_us, of_all)
    assert "are closed" in add(closes_us, own)
    assert add(closes_us - 1, of_all) == ""
    assert add(closes_us - 1, own) == ""
    assert "already" in add(closes_us - 1, of_all)
    assert "already" in add(closes_us - 1, own)


def test_bills_by_the_command_line(books: Books, tmp_path: Path) -> None:
    """Prices, a payment, an hour of a copy, and the files that come of it."""
    cp = tmp_path / "dsn"
    cp_server.write_file(cp, books.dsn.encode(), 0o600)

    def command(*words: str, code: int = 0) -> str:
        argv = [sys.executable, "-W", "error", str(ROOT / "cp_server.py"), *words]
        argv += [f"--dsn-file={cp}", "--env-file=/dev/null"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    add_fleet(books, WEB, cards=())
    kuma = str(books.customers["kuma"])
    prices = ["--cpu-hour=0.02", "--gb-hour=0.003", "--egress-gb=0.01", "--provider-share=80"]
    said = command("add-rate-card", "--valid-from=2026-03-31T20:00Z", *prices)
    assert "valid from 2026-03-31T20:00Z on" in said
    books.cards.append(oracle.RateCard("1", None, T, 20_000, 3_000, 10_000, 800_000))
    assert "already" in command("add-rate-card", "--valid-from=2026-03-31T20:00Z", *prices, code=1)
    assert "is booked" in command("add-payment", kuma, "25", "--reference=SEPA 1")
    for reference in ("SEPA 1", "SEPA 1 ", "\tSEPA  1\n"):
        said = command("add-payment", kuma, "25", f"--reference={reference}")
        assert "was booked before" in said
    assert "another payment" in command("add-payment", kuma, "26", "--reference=SEPA 1", code=1)
    run(books, beats("h1", T, T + HOUR, {"a"}))
    books.check()
    # 0.5 processors for an hour at 0.02, 2 GB at 0.003: 0.016, of which 0.0128 for the provider.
    assert "0.016" in command("invoices", "--month=2026-03")
    assert "0.0128" in command("statements", "--month=2026-03")
    said = command("ledger", "verify")
    assert "the ledger holds" in said
    assert "24.984" in said
    out = tmp_path / "out"
    files = command("invoices", "--month=2026-03", f"--out={out}").split()
    files += command("statements", "--month=2026-03", f"--out={out}").split()
    assert len(files) == 6
    (invoice,) = out.glob("invoice*.json")
    bill = json.loads(invoice.read_text())
    assert (bill["total_micros"], bill["preliminary"]) == (16_000, True)
    page = next(out.glob("invoice*.html")).read_text()
    assert "Preliminary" in page
    assert '<td class="n">0.016</td>' in page
    rows = list(csv.reader(next(out.glob("statement*.csv")).read_text().splitlines()))
    assert [row[-4:] for row in rows] == [
        ["owed", "month", "number", "currency"],
        ["0.008", "2026-03", "preliminary", "EUR"],
        ["0.0048", "2026-03", "preliminary", "EUR"],
    ]
    for words in (
        ["add-rate-card", "--valid-from=2026-03-31T20:30Z", *prices],
        ["add-rate-card", "--valid-from=next", "--cpu-hour=-1", *prices[1:]],
        ["add-rate-card", "--valid-from=next", *prices[:3], "--provider-share=101"],
        ["add-rate-card", "--valid-from=next", *prices[:3], "--provider-share=33.33335"],
        ["add-payment", kuma, "0.0000001", "--reference=x"],
        ["add-payment", kuma, "NaN", "--reference=x"],
        ["add-payment", kuma, "1e999999", "--reference=x"],
        ["add-payment", kuma, "1_000", "--reference=x"],
        ["add-payment", kuma, "1234567890", "--reference=x"],
        ["credit-limit", kuma, "-1"],
        ["credit-limit", "kuma", "1"],
    ):
        assert "Traceback" not in command(*words, code=2)
    # Amounts that are there do not become others.
    for words in (
        ["add-rate-card", "--valid-from=next", *prices],
        ["add-payment", kuma, "1", "--reference=dollars"],
    ):
        assert "in EUR, not in USD ; set CURRENCY=EUR" in command(*words, "--currency=USD", code=2)


def test_a_customer_reads_what_it_pays(books: Books, make_cp: Callable[..., ControlPlane]) -> None:
    """The control plane that serves closes the hours; its API has account, usage and invoice."""
    gull = oracle.Copy("b", "api", "gull", "h1", "mole", 1000, 10**9)
    add_fleet(books, WEB, gull)
    run(books, beats("h1", T, T + HOUR, {"a", "b"}), is_closed=False)
    cp = make_cp(start=False)
    books.attach(cp)
    cp.start()
    done = cp.command("mint-key", str(books.customers["kuma"]))
    key = done.stdout.strip()

    def get(path: str, status: int = 200) -> Any:
        got, body = cp.call("GET", f"/api/v1/{path}", token=key)
        assert got == status, body
        return body

    months = wait_for("the hour is closed", lambda: get("invoices")["invoices"] or None)
    expected = books.check()
    (line,) = (each for each in expected.lines if each.customer == "kuma")
    charge = line.cpu_micros + line.memory_micros
    shown = {"month": "2026-03", "number": None, "issued_at": None, "total_micros": charge}
    assert months == [shown]
    account = get("account")
    check_shape("Customer", account)
    assert account["balance_micros"] == -charge
    invoice = get("invoices/2026-03")
    check_shape("Invoice", invoice)
    assert (invoice["total_micros"], invoice["preliminary"]) == (charge, True)
    (shown,) = invoice["lines"]
    check_shape("InvoiceLine", shown)
    assert shown["charge_micros"] == charge
    assert "share" not in json.dumps(invoice)
    windows = get("usage?month=2026-03")["windows"]
    for window in windows:
        check_shape("Window", window)
    assert sum(each["cpu_micros"] + each["memory_micros"] for each in windows) == charge
    assert {each["workload"] for each in windows} == {"web"}
    # A line leads to its windows.
    found = get(f"usage?month=2026-03&assignment_id={shown['assignment_id']}")["windows"]
    assert [each for each in found if each["card_no"] == shown["card_no"]] == windows
    assert get(f"usage?month=2026-03&assignment_id={uuid.uuid4()}")["windows"] == []
    get("usage?assignment_id=7", 400)
    assert get("usage?month=2026-02")["windows"] == []
    assert get("invoices/2026-02")["lines"] == []
    for path in ("usage?month=2026-13", "invoices/2026-1", "usage?month=x", "invoices/%00"):
        get(path, 400)
    cp.stop()
    with pytest.raises(AssertionError, match="in EUR, not in USD ; set CURRENCY=EUR"):
        cp.start("--currency=USD")
    assert cp.stop() == cp_server.USAGE


@pytest.fixture
def counted(books: Books, make_cp: Callable[..., ControlPlane]) -> ControlPlane:
    """A control plane with an hour of three copies, of which one's host counts what cannot be."""
    gull = oracle.Copy("b", "api", "gull", "h1", "mole", 1000, 10**9)
    add_fleet(books, WEB, dataclasses.replace(WEB, copy="c", workload="more"), gull)
    counters = (
        oracle.Counter("a", "boot", "1", 600 * 10**9, 10**12, 5, 10**9),
        oracle.Counter("a", "boot", "2", 60 * 10**9, 10**11, 5, 10**8),
        oracle.Counter("b", "boot", "3", 7, 7, 7, 10**15),
    )
    names = frozenset("abc")
    last = oracle.Heartbeat(T + HOUR - 30 * S, "h1", 30_000, names, counters)
    first = beats("h1", T, T + HOUR - 60 * S, {*names})
    run(books, [*first, last, *beats("h1", T + HOUR, T + HOUR, {*names})])
    books.check()
    cp = make_cp(start=False)
    cp.database = books.database
    cp.set_dsn(books.dsn)
    cp.start()
    return cp


def test_a_customer_reads_what_its_hosts_counted(books: Books, counted: ControlPlane) -> None:
    """Beside its windows: of its own copies on that page, capped, with a word where it is more."""

    def get(customer: str, query: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        key = counted.command("mint-key", str(books.customers[customer])).stdout.strip()
        path = f"/api/v1/usage?month=2026-03{query}"
        status, body = counted.call("GET", path, token=key)
        assert status == 200
        check_shape("Windows", body)
        ids = {window["assignment_id"] for window in body["windows"]}
        copies = {copy.pop("assignment_id"): copy for copy in body["copies"]}
        assert copies.keys() == ids
        return body, {name: copies.get(str(each)) for name, each in books.ids.items()}

    body, copies = get("kuma")
    honest = {"life_us": HOUR, "doubtful": False, "note": ""}
    assert copies == {
        "a": {
            **honest,
            "counted_cpu_ns": 660 * 10**9,
            "counted_memory_byte_s": 11 * 10**11,
            "counted_rx_bytes": 10,
            "counted_tx_bytes": 11 * 10**8,
        },
        "c": {
            "life_us": HOUR,
            "doubtful": True,
            "note": "its host counted no memory in all of its billed time",
            **dict.fromkeys((name for name in copies["a"] if "counted" in name), 0),
        },
        "b": None,
    }
    windows, copies = get("gull")
    assert (copies["a"], copies["c"]) == (None, None)
    assert (copies["b"]["counted_tx_bytes"], copies["b"]["counted_cpu_ns"]) == (125 * HOUR, 7)
    assert (copies["b"]["doubtful"], copies["b"]["note"]) == (
        True,
        "its host counted more than its billed time allows",
    )
    (window,) = windows["windows"]
    assert window["egress_bytes"] == 125 * HOUR
    # Not by asking for it, nor at a page's end.
    assert get("kuma", f"&assignment_id={books.ids['b']}")[0]["copies"] == []
    assert len(get("kuma", "&limit=1")[0]["copies"]) == 1 < len(body["copies"])


def test_pages_are_the_whole(books: Books, counted: ControlPlane) -> None:
    key = counted.command("mint-key", str(books.customers["kuma"])).stdout.strip()

    def get(path: str) -> Any:
        status, body = counted.call("GET", f"/api/v1/{path}", token=key)
        assert status == 200, body
        return body

    for path, name in (("usage?month=2026-03&", "windows"), ("invoices/2026-03?", "lines")):
        whole, cursor = get(path)[name], 0
        found: list[Any] = []
        while cursor is not None:
            body = get(f"{path}limit=1&cursor={cursor}")
            assert len(body[name]) == 1
            found, cursor = found + body[name], body["next_cursor"]
        assert found == whole
        assert len(found) == 2


def read_usage(cp: ControlPlane, *words: str) -> Any:
    """What `usage` prints for March: JSON, or the rows of its table by the names of columns."""
    done = cp.command("usage", "--month=2026-03", *words)
    assert done.returncode == 0, done.stderr
    if "--json" in words:
        found = json.loads(done.stdout)
        assert (found.pop("month"), found.pop("currency")) == ("2026-03", "EUR")
        ((_, rows),) = found.items()
        return rows
    head, *lines = (re.split(" {2,}", row) for row in done.stdout.splitlines())
    return [dict(zip(head, row, strict=False)) for row in lines]


def test_the_operator_sees_what_customers_see(books: Books, counted: ControlPlane) -> None:
    """What each copy used, and what its host counted, as a table and as JSON."""
    lines, rows = read_usage(counted, "--json"), read_usage(counted)
    assert sorted(line["customer"] for line in lines) == ["gull", "kuma", "kuma"]
    for line, row in zip(lines, rows, strict=True):
        key = counted.command("mint-key", line["customer_id"]).stdout.strip()
        query = f"month=2026-03&assignment_id={line['assignment_id']}"
        _, body = counted.call("GET", f"/api/v1/usage?{query}", token=key)
        (copy,) = body["copies"]
        assert copy == {name: line[name] for name in copy}
        for name in ("billed_us", "egress_bytes", "cpu_micros", "memory_micros", "egress_micros"):
            assert sum(window[name] for window in body["windows"]) == line[name]
        hours = line["billed_us"] / 3.6e9
        assert row == {
            "CUSTOMER": line["customer"],
            "WORKLOAD": f"{line['workload']}/{line['replica']}",
            "HOST": "h1",
            "ASSIGNMENT": line["assignment_id"],
            "HOURS": f"{hours:.6f}",
            "CPU-HOURS": f"{line['cpu_milli'] / 1000 * hours:.6f}",
            "GB-HOURS": f"{line['memory_bytes'] / 1e9 * hours:.6f}",
            "EGRESS-GB": f"{line['egress_bytes'] / 1e9:.6f}",
            "COUNTED-CPU-HOURS": f"{copy['counted_cpu_ns'] // 3_600_000 / 1e6:.6f}",
            "COUNTED-GB-HOURS": f"{copy['counted_memory_byte_s'] // 3_600_000 / 1e6:.6f}",
            "COUNTED-EGRESS-GB": f"{copy['counted_tx_bytes'] / 1e9:.6f}",
            "OF-HOURS": "1.000000",
            **({"NOTE": copy["note"]} if copy["doubtful"] else {}),
        }
    kuma = f"--customer-id={books.customers['kuma']}"
    assert [row["CUSTOMER"] for row in read_usage(counted, kuma)] == ["kuma"] * 2


def test_the_operator_sees_the_hours_of_a_copy(books: Books, counted: ControlPlane) -> None:
    """The windows that the API has, and with them what the provider gets."""
    only = f"--assignment={books.ids['b']}"
    (line,) = (each for each in read_usage(counted, "--json") if each["customer"] == "gull")
    key = counted.command("mint-key", str(books.customers["gull"])).stdout.strip()
    (theirs,) = counted.call("GET", "/api/v1/usage?month=2026-03", token=key)[1]["windows"]
    (window,) = read_usage(counted, only, "--json")
    both = theirs.keys() & window.keys() - {"workload"}
    assert {name: window[name] for name in both} == {name: theirs[name] for name in both}
    assert window["share_micros"] == line["share_micros"] == line["charge_micros"] * 85 // 100
    assert read_usage(counted, only) == [
        {
            "HOUR": "2026-03-31T20:00Z",
            "PART": "1",
            "CARD": str(line["card_no"]),
            "HOURS": "1.000000",
            "CPU-HOURS": "1.000000",
            "GB-HOURS": "1.000000",
            "EGRESS-GB": "450.000000",
            "CHARGE": cp_server.render_money(line["charge_micros"]),
            "SHARE": "85 %",
            "OWED": cp_server.render_money(line["share_micros"]),
        }
    ]
    for words in (("--month=2026-13",), ("--month=2026-03", "--assignment=web"), ()):
        done = counted.command("usage", *words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_without_credit_a_customer_is_told_and_then_stopped(
    books: Books, make_cp: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    """By the control plane that serves: notice, no new copies, the stop, and a payment."""
    assert cp_server.USAGE_S <= 60  # between two looks; here they are nearer
    add_fleet(books, WEB)
    scripts = change_scripts(tmp_path / "scripts", "cp_server.py", USAGE_S="0.2")
    cp = make_cp("--registry=registry.invalid", start=False, scripts=scripts)
    books.attach(cp)
    kuma = str(books.customers["kuma"])
    assert cp.command("credit-limit", kuma, "0").returncode == 0
    assert cp.command("add-payment", kuma, "0.03", "--reference=one").returncode == 0

    def use(first_us: int, last_us: int) -> None:
        async def work(db: cp_server.Database) -> None:
            for event in beats("h1", first_us, last_us, {"a"}):
                await books.apply(db, event)

        in_database(books, work)

    cp.start()
    time.sleep(1)  # the first looks are over
    use(T, T + HOUR * 3 // 2)  # at 21,143 micro-units an hour
    key = cp.command("mint-key", kuma).stdout.strip()
    order = {
        "name": "more",
        "image": f"kuma/web@sha256:{'0' * 64}",
        "cpu_milli": 100,
        "memory_bytes": 64 << 20,
    }

    def call(method: str, path: str, body: object = None) -> tuple[int, Any]:
        return cp.call(method, f"/api/v1/{path}", body, token=key)

    def notice() -> Any:
        account = call("GET", "account")[1]
        check_shape("Customer", account)
        return account["out_of_credit_at"] and account

    account = wait_for("notice", notice)
    since, stops = (
        dt.datetime.fromisoformat(account[name].replace("Z", "+00:00"))
        for name in ("out_of_credit_at", "stops_at")
    )
    assert stops - since == dt.timedelta(seconds=cp_server.CREDIT_NOTICE_S)
    status, answer = call("POST", "workloads", order)
    assert (status, answer["error"]["code"]) == (402, "no_credit")
    assert f"{stops:%Y-%m-%dT%H:%MZ}" in answer["error"]["message"]
    (web,) = call("GET", "workloads")[1]["workloads"]

    def state() -> str:
        (copy,) = call("GET", f"workloads/{web['workload_id']}")[1]["assignments"]
        return f"{copy['state']}: {copy['reason']}"

    assert state() == "running: "
    stops_us = round(stops.timestamp()) * S
    use(T + HOUR * 3 // 2, stops_us - 30 * S)
    time.sleep(2 * cp_server.PLACE_S)  # not a second before
    assert state() == "running: "
    use(stops_us, stops_us + 60 * S)
    wait_for("the stop", lambda: "the balance is used up" in state(), 4 * cp_server.PLACE_S)
    assert cp.command("add-payment", kuma, "1", "--reference=two").returncode == 0
    assert call("GET", "account")[1]["out_of_credit_at"] is None  # not in a minute: now
    assert call("POST", "workloads", order)[0] == 201


def test_a_payment_and_a_limit_count_at_once(books: Books) -> None:
    """Not with the next look: until then its copies might be stopped."""
    add_fleet(books, WEB, dataclasses.replace(WEB, copy="b", workload="x", customer="gull"))
    actor, kuma = cp_server.Actor("test"), books.customers["kuma"]

    def out() -> list[str]:
        sql = "SELECT name FROM customers WHERE out_of_credit_at IS NOT NULL ORDER BY name"
        return [row["name"] for row in books.query(sql)]

    async def work(db: cp_server.Database) -> None:
        for each in books.customers.values():
            await cp_server.set_credit_limit(db, actor, each, 0)
        assert out() == ["gull", "kuma"]  # nothing is paid
        await cp_server.add_payment(db, actor, kuma, 20_000, "one", "")
        assert out() == ["gull"]
        for event in beats("h1", T, T + HOUR * 3 // 2, {"a", "b"}):  # an hour is 21,143
            await books.apply(db, event)
        assert [row["name"] for row in await cp_server.check_credit(db)] == ["kuma"]
        await cp_server.add_payment(db, actor, kuma, 10_000, "two", "")
        assert out() == ["gull", "kuma"]  # it is not enough
        await cp_server.set_credit_limit(db, actor, kuma, 10_000)
        assert out() == ["gull"]
        await cp_server.set_credit_limit(db, actor, kuma, 0)
        assert out() == ["gull", "kuma"]
        await cp_server.set_credit_limit(db, actor, kuma, None)
        assert out() == ["gull"]

    in_database(books, work)


def counting(first_us: int, last_us: int, tx_bytes: int) -> list[oracle.Event]:
    """A heartbeat each 30 s, whose copy uses processor and memory, and sent this much."""
    return [
        dataclasses.replace(
            event, counters=(oracle.Counter("a", "b", "c", event.at_us - T, 1, 0, tx_bytes),)
        )
        for event in beats("h1", first_us, last_us, {"a"})
        if isinstance(event, oracle.Heartbeat)
    ]


def read_doubts(books: Books) -> list[tuple[int, bool]]:
    """What the copies of March sent as their hosts counted it, and whether that is doubtful."""
    customer, march = books.customers["kuma"], dt.date(2026, 3, 1)
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
    copies = in_database(books, lambda db: cp_server.read_counted(db, [bill]))
    found = [cp_server.decide_counters(copy) for copy in copies.values()]
    return [(counted["tx_bytes"], bool(why)) for counted, why in found]


def test_idle_hours_save_up_no_egress(books: Books) -> None:
    """A host is heard each 30 s: what it says then is at most what was possible since."""
    add_fleet(books, dataclasses.replace(WEB, made_us=T))
    honest = counting(T, T + 3 * HOUR - 30 * S, 1_000)
    lie = counting(T + 3 * HOUR, T + 3 * HOUR + 30 * S, 10**12)
    more = counting(T + 3 * HOUR + 60 * S, T + 4 * HOUR, 12 * 10**11)
    run(books, [*honest, *lie, *more])
    sent = [window.egress_bytes for window in books.check().windows]
    once = 125 * 150 * S
    assert sent == [1_000, 0, 0, 125 * (90 + 120) * S]
    assert once < sent[3] < 2 * once  # the second lie is within the same hour
    assert read_doubts(books) == [(12 * 10**11, True)]


def test_a_full_line_is_no_lie_and_a_silence_neither(books: Books) -> None:
    """1 Gbit/s all the time, through a minute and an hour in which nobody hears of it."""
    add_fleet(books, dataclasses.replace(WEB, made_us=T - 60 * S))
    spans = [*range(0, HOUR, 30 * S), *range(HOUR + 60 * S, 2 * HOUR + 1, 30 * S)]
    events = [event for us in spans for event in counting(T + us, T + us, 125 * us * 9 // 10 + 7)]
    run(books, events)
    assert read_doubts(books) == [(125 * 2 * HOUR * 9 // 10 + 7, False)]
    more = [
        event
        for us in range(3 * HOUR, 4 * HOUR + 1, 30 * S)
        for event in counting(T + us, T + us, 125 * us * 9 // 10 + 7)
    ]
    run(books, more)
    sent = sum(window.egress_bytes for window in books.check().windows)
    assert sent == 125 * (3 * HOUR + 90 * S)  # what is billed of the silence, and no more
    assert sent < 125 * 4 * HOUR * 9 // 10


def test_who_has_no_way_out_sends_nothing(books: Books) -> None:
    add_fleet(books, dataclasses.replace(WEB, sends=False))
    run(books, counting(T, T + HOUR, 10**9))
    assert [window.egress_bytes for window in books.check().windows] == [0]
    assert read_doubts(books) == [(10**9, False)]


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_a_counter_that_no_column_holds_harms_nobody(books: Books, value: int) -> None:
    """Its host stays online, and what comes in the same moment from others counts."""
    add_fleet(books, WEB, dataclasses.replace(WEB, copy="b", workload="x", host="h2"))
    sound = oracle.Counter("b", "b", "c", 7, 7, 7, 7)
    mad = [
        oracle.Counter("a", "b", "c", *(value if n == k else 1 for n in range(4))) for k in range(4)
    ]
    events = [
        oracle.Heartbeat(T + 30 * S, "h1", 30_000, frozenset("a"), tuple(mad)),
        oracle.Heartbeat(T + 30 * S, "h2", 30_000, frozenset("b"), (sound,)),
    ]
    both = [books.beat(event) for event in events]

    async def work(db: cp_server.Database) -> None:
        answers, _ = await cp_server.record_heartbeats(db, both, peer_check=False)
        assert [type(each) for each in answers.values()] == [cp_server.Accepted] * 2

    in_database(books, work)
    assert books.query("SELECT cpu_ns, tx_bytes FROM usage_counters") == [
        {"cpu_ns": 7, "tx_bytes": 7}
    ]
