"""What the database refuses to the control plane's own role; invoices, balances."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cp_server
from tests import billing_oracle as oracle
from tests.billing import Books, close_all, namespace_of, run
from tests.harness import ROOT, Postgres, facts
from tests.integration.test_billing import CARD, HOUR, WEB, S, T, add_fleet, beats, in_database


@pytest.fixture(scope="module")
def books(postgres: Postgres) -> Iterator[Books]:
    """An hour of a copy, booked."""
    made = Books(postgres)
    made.set_time(T)
    add_fleet(made, WEB)
    run(made, beats("h1", T, T + HOUR, {"a"}))
    made.check()
    yield made
    made.close()


@pytest.fixture
def fresh(postgres: Postgres) -> Iterator[Books]:
    """With nothing in it."""
    made = Books(postgres)
    made.set_time(T)
    yield made
    made.close()


def attempt(dsn: str, *statements: tuple[str, tuple[object, ...]]) -> None:
    """One transaction of these, committed."""
    with contextlib.closing(psycopg.connect(dsn)) as connection:
        for text, params in statements:
            connection.execute(text.encode(), params or None)
        connection.commit()


TABLES = (
    *("rate_cards", "usage_windows", "ledger_accounts", "ledger_transactions", "ledger_entries"),
    "invoices",
)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("verb", ["UPDATE {} SET xid = xid", "DELETE FROM {}", "TRUNCATE {}"])
def test_what_is_booked_is_never_changed(books: Books, table: str, verb: str) -> None:
    """Not by the role that serves; and not by mistake by the owner either."""
    columns = {"rate_cards": "valid_from", "usage_windows": "part", "invoices": "month"}
    columns["ledger_accounts"] = "kind"
    text = verb.format(table).replace("xid", columns.get(table, "xid"))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        attempt(books.dsn, (text, ()))
    if table == "invoices" and "TRUNCATE" not in verb:
        return  # there is none that a trigger could see
    no: type[psycopg.Error] = psycopg.errors.IntegrityConstraintViolation
    if "TRUNCATE" in verb and table not in ("ledger_entries", "invoices"):
        text += " CASCADE"  # else foreign keys refuse it
    with pytest.raises(no, match="append-only"):
        attempt(books.postgres.dsn(books.database), (text, ()))


@pytest.mark.parametrize("text", ["DELETE FROM usage_lines", "TRUNCATE usage_lines"])
def test_a_line_of_a_bill_grows_and_never_goes(books: Books, text: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        attempt(books.dsn, (text, ()))
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="are kept"):
        attempt(books.postgres.dsn(books.database), (text, ()))


PAYMENT = (
    "INSERT INTO ledger_transactions (transaction_no, kind, reference, actor, at)"
    " VALUES (%s, 'payment', %s, 'x', now())"
)
ENTRY = "INSERT INTO ledger_entries (transaction_no, account_no, amount_micros) VALUES (%s, %s, %s)"


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([], "at least two entries"),
        ([(1, 5)], "at least two entries"),
        ([(1, 5), (2, -4)], "at least two entries"),
        ([(1, 5), (2, 0)], "amount_micros_check"),
        ([(1, 5), (1, -5)], "ledger_entries_pkey"),
        ([(1, 2**63 - 1), (2, -(2**63 - 1)), (3, 1)], "at least two entries"),
        ([(1, 5), (99, -5)], "account that is there"),
    ],
)
def test_a_transaction_that_does_not_add_up_is_refused(
    books: Books, entries: list[tuple[int, int]], error: str
) -> None:
    rows = [(ENTRY, (900_001, account, amount)) for account, amount in entries]
    with pytest.raises(psycopg.errors.IntegrityError, match=error):
        attempt(books.dsn, *rows, (PAYMENT, (900_001, "r1")))
    assert books.query("SELECT 1 FROM ledger_entries WHERE transaction_no = 900001") == []


# What the statements of BROKEN say in a word.
WORDS = {
    "first": "transaction_no = (SELECT min(transaction_no) FROM ledger_transactions)",
    "of_kuma": "(SELECT min(account_no) FROM ledger_accounts WHERE kind = 'customer')",
    "of_other": "(SELECT max(account_no) FROM ledger_accounts)",
    "of_provider": "(SELECT account_no FROM ledger_accounts WHERE kind = 'provider')",
    "of_fees": "(SELECT account_no FROM ledger_accounts WHERE kind = 'fees')",
    "of_payments": "(SELECT account_no FROM ledger_accounts WHERE kind = 'payments')",
    "with_other": "INSERT INTO customers (customer_id, name, created_by)"
    " VALUES (gen_random_uuid(), 'other', 'x'); INSERT INTO ledger_accounts (kind, customer_no)"
    " SELECT 'customer', max(customer_no) FROM customers",
}
# Each of LEDGER_CHECKS, and what else must hold of runs, is broken here by the superuser.
BROKEN = (
    ("ledger_sums_to_zero", "UPDATE ledger_entries SET amount_micros = 9 WHERE {first}"),
    ("ledger_sums_to_zero", "DELETE FROM ledger_entries WHERE {first}"),
    ("entries_have_transactions", "DELETE FROM ledger_transactions WHERE {first}"),
    (
        "windows_are_charged",
        """UPDATE ledger_entries SET amount_micros = amount_micros + CASE account_no
        WHEN {of_provider} THEN 1 WHEN {of_fees} THEN -1 ELSE 0 END WHERE {first}""",
    ),
    (
        "windows_are_charged",
        """{with_other}; UPDATE ledger_entries SET account_no = {of_other}
        WHERE {first} AND account_no = {of_kuma}""",
    ),
    (
        "windows_are_charged",
        """UPDATE ledger_entries SET account_no = {of_payments}
        WHERE {first} AND account_no = {of_fees}""",
    ),
    ("lines_are_their_windows", "UPDATE usage_lines SET billed_us = billed_us + 1"),
    ("lines_are_priced", "UPDATE rate_cards SET cpu_hour_micros = cpu_hour_micros * 2"),
    ("lines_are_priced", "{with_other}; UPDATE usage_lines SET customer_no = customer_no + 1"),
    ("balances_are_the_ledgers", "DELETE FROM usage_lines"),
    ("time_is_billed_once", "UPDATE usage_runs SET from_us = from_us + 1 WHERE to_us IS NULL"),
    ("time_is_billed_once", "DELETE FROM usage_windows"),
    ("invoices_add_up", "INSERT INTO invoices VALUES (2, 1, '2026-03-01', 0, now(), 'x')"),
    (
        "copies_that_run_are_billed",
        "UPDATE usage_runs SET to_us = closed_us, to_at = from_at, is_closed = true",
    ),
    ("runs_are_closed", "UPDATE usage_runs SET to_us = closed_us + 5, to_at = from_at"),
)


@pytest.mark.parametrize(("name", "change"), BROKEN)
def test_what_does_not_hold_is_found(books: Books, name: str, change: str) -> None:
    (check,) = (sql for each, _, sql in cp_server.INVARIANTS if each == name)
    assert books.query(check) == []
    with books.owner.transaction(force_rollback=True):
        books.owner.execute(change.format(**WORDS).encode())
        assert books.query(check) != []


def test_a_ledger_that_does_not_hold_is_told(fresh: Books, tmp_path: Path) -> None:
    """`ledger verify` names the sentence that is false, and for what; and ends with 1."""
    add_fleet(fresh, WEB)
    run(fresh, beats("h1", T, T + HOUR, {"a"}))
    dsn = tmp_path / "dsn"
    cp_server.write_file(dsn, fresh.dsn.encode(), 0o600)
    argv = [sys.executable, str(ROOT / "cp_server.py"), "ledger", "verify", f"--dsn-file={dsn}"]

    def verify(*words: str) -> subprocess.CompletedProcess[str]:
        whole = [*argv, "--env-file=/dev/null", *words]
        return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)

    assert verify().returncode == 0
    fresh.owner.execute(b"UPDATE usage_lines SET billed_us = billed_us + 1")
    done = verify()
    assert done.returncode == 1
    assert "ERROR lines_are_their_windows: it must hold that" in done.stdout
    assert done.stdout.endswith("the ledger does not hold\n")


def test_entries_without_a_transaction_are_refused(books: Books) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        attempt(books.dsn, (ENTRY, (900_002, 1, 5)), (ENTRY, (900_002, 2, -5)))


def test_no_entry_joins_a_transaction_that_is_made(books: Books) -> None:
    """Neither later, nor from a database transaction that ran beside it."""
    (booked,) = books.query("SELECT min(transaction_no) AS number FROM ledger_transactions")
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="takes no more entries"):
        attempt(books.dsn, (ENTRY, (booked["number"], 2, 5)))
    with contextlib.closing(psycopg.connect(books.dsn)) as other:
        other.execute(ENTRY, (900_003, 3, 7))  # the transaction is not to be seen yet
        rows = [(ENTRY, (900_003, 1, 5)), (ENTRY, (900_003, 2, -5))]
        attempt(books.dsn, *rows, (PAYMENT, (900_003, "r3")))
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            other.commit()
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        attempt(books.dsn, ("INSERT INTO ledger_entries VALUES (900003, 3, 7, '1')", ()))


def test_a_run_is_begun_and_ended_by_what_hosts_say_only(books: Books) -> None:
    again = (
        "INSERT INTO usage_runs (assignment_no, host_no, from_at, from_us, closed_hour, closed_us)"
        " SELECT assignment_no, host_no, from_at, 0, closed_hour, 0 FROM usage_runs"
    )
    for text in (
        again,
        "UPDATE usage_runs SET to_us = 9223372036854775807",
        "UPDATE usage_runs SET from_us = 0",
        "DELETE FROM usage_hours",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            attempt(books.dsn, (text, ()))


async def issue(db: cp_server.Database) -> list[dict[str, Any]]:
    return await cp_server.issue_invoices(db)


def test_an_invoice_is_issued_once_and_stays(fresh: Books) -> None:
    """Two customers, a month's end, numbers without gaps; what is late is on the next invoice."""
    books = fresh
    gull = oracle.Copy("b", "api", "gull", "h2", "tern", 1000, 10**9)
    add_fleet(books, WEB, gull)
    end = T + 4 * HOUR  # the first of April
    run(books, beats("h1", T, end, {"a"}) + beats("h2", T, end - 30 * S, {"b"}))
    assert in_database(books, issue) == []
    books.set_time(end + 24 * HOUR)
    assert in_database(books, issue) == []
    books.set_time(end + 24 * HOUR + 1)
    issued = in_database(books, issue)
    assert [row["invoice_no"] for row in issued] == [1, 2]
    assert in_database(books, issue) == []
    # The second host comes back: the half minute up to midnight is in April now.
    run(books, [*beats("h2", end + 25 * HOUR, end + 25 * HOUR, {"b"})])
    parts = books.query("SELECT month::text, billed_us FROM usage_windows WHERE part = 2")
    assert [(row["month"], row["billed_us"]) for row in parts] == [("2026-04-01", 30 * S)]
    march = dt.date(2026, 3, 1)
    customer = books.customers["gull"]
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
    assert (bill.number, bill.is_preliminary) == (2, False)
    assert bill.issued_at == dt.datetime(2026, 4, 2, 0, 0, 0, 1, tzinfo=dt.timezone.utc)
    page = "".join(cp_server.render_bill_html(bill, "EUR"))
    assert "<p>Issued on 2026-04-02.</p>" in page
    assert bill.total_micros == issued[1]["total_micros"]
    # Who is called otherwise later was not then.
    before = cp_server.render_bill_json(bill, "EUR")
    assert (before["whose"], before["lines"][0]["hostname"]) == ("gull", "h2")
    books.query("UPDATE hosts SET hostname = 'other' RETURNING 1")
    books.query("UPDATE customers SET name = 'Other ' || name RETURNING 1")
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
    assert cp_server.render_bill_json(bill, "EUR") == before
    april = dt.date(2026, 4, 1)
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, april))
    assert bill.whose == "Other gull"
    # With it the two are what the oracle says of both, but for what is rounded down elsewhere.
    assert [line.usage.billed_us for line in bill.lines] == [30 * S + 60 * S]
    copies = list(books.copies.values())
    invoices, _, _ = oracle.totals(oracle.bill(books.cards, copies, books.events))
    due = invoices["gull", "2026-03"] + invoices["gull", "2026-04"]
    assert abs(due - issued[1]["total_micros"] - bill.total_micros) <= 2
    wrong, _ = in_database(books, cp_server.verify_ledger)
    assert wrong == []
    # Neither another number nor another sum of March.
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="without gaps"):
        attempt(books.dsn, ("INSERT INTO invoices SELECT 4, 1, '2026-05-01', 0, now(), 'x'", ()))
    for text in ("UPDATE invoices SET total_micros = 0", "DELETE FROM invoices"):
        with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="append-only"):
            attempt(books.postgres.dsn(books.database), (text, ()))
    text = "UPDATE usage_lines SET cpu_micros = 0 WHERE month = '2026-03-01'"
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="stays as it is"):
        attempt(books.dsn, (text, ()))


def test_invoices_have_no_gaps_whoever_issues_and_whatever_fails(fresh: Books) -> None:
    """Two control planes at once, while one more begins it and is gone."""
    names = [f"c{number}" for number in range(12)]
    copies = [oracle.Copy(each, each, each, "h1", "mole", 10, 10**9) for each in names]
    add_fleet(fresh, *copies)
    run(fresh, beats("h1", T, T + HOUR, set(names)))
    fresh.set_time(T + 4 * HOUR + 24 * HOUR + 1)
    which = {"after_s": cp_server.INVOICE_AFTER_S, "without": []}
    rolled_back = 0
    with contextlib.closing(psycopg.connect(fresh.dsn)) as gone:
        rolled_back = gone.execute(cp_server.SQL_INVOICE_ISSUE.encode(), which).rowcount
        gone.rollback()
    assert rolled_back == len(names)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(in_database, fresh, issue) for _ in range(2)]
        issued = [row["invoice_no"] for one in both for row in one.result()]
    issued += [row["invoice_no"] for row in in_database(fresh, issue)]
    assert sorted(issued) == list(range(1, len(names) + 1))
    found = fresh.query("SELECT invoice_no FROM invoices ORDER BY 1")
    assert [row["invoice_no"] for row in found] == sorted(issued)


def test_a_statement_is_final_once_all_of_its_month_is_booked(fresh: Books) -> None:
    """Also when one copy cannot be billed for days, whose customer gets no invoice meanwhile."""
    other = oracle.Copy("b", "b", "gull", "h2", "vole", 500, 10**9)
    add_fleet(fresh, WEB, other)
    march = dt.date(2026, 3, 1)

    def is_preliminary(provider: str, host: str) -> bool:
        """Of the provider's statement, and of what its one host is told."""
        name = namespace_of(provider)
        bill = in_database(fresh, lambda db: cp_server.read_statement(db, name, march))
        order = cp_server.EarningsOrder(fresh.hosts[host], "10.77.0.2", march, 0)
        part, _ = in_database(fresh, lambda db: cp_server.read_earnings(db, order, False))
        assert part.is_preliminary == bill.is_preliminary
        return bill.is_preliminary

    end = T + 4 * HOUR  # the first of April
    # What ran on the other host has ended, and is booked.
    run(fresh, [*beats("h2", T, T + 60 * S, {"b"}), *beats("h2", T + 90 * S, T + 90 * S, set())])
    first = beats("h1", T, T + 2 * HOUR, {"a"})
    later = beats("h1", T + 2 * HOUR + 30 * S, end + HOUR, {"a"})
    run(fresh, [*first, T + 2 * HOUR, *later], is_closed=False)
    for time_us, is_open in ((end + 24 * HOUR - 1, True), (end + 25 * HOUR, False)):
        fresh.set_time(time_us)
        assert is_preliminary("mole", "h1")
        assert is_preliminary("vole", "h2") == is_open
    # So is an invoice that is not issued, of a month that is over or has nothing yet.
    for name, month in (("kuma", march), ("gull", dt.date(2026, 4, 1))):
        which: dict[str, Any] = {"customer_id": fresh.customers[name], "month": month}
        bill = in_database(fresh, functools.partial(cp_server.read_invoice, **which))
        assert (bill.number, bill.is_preliminary) == (None, True)
    run(fresh, [end + 25 * HOUR])
    assert not is_preliminary("mole", "h1")


def test_the_currency_is_final_once_there_are_amounts(fresh: Books) -> None:
    def take(currency: str) -> str:
        try:
            in_database(fresh, lambda db: cp_server.ensure_currency(db, currency))
        except cp_server.Error as error:
            return f"{error.exit_code} {error}"
        return ""

    assert [take("EUR"), take("USD"), take("USD")] == ["", "", ""]
    add_fleet(fresh, WEB)
    said = "2 the amounts in this database are in USD, not in EUR; set CURRENCY=USD"
    assert [take("EUR"), take("USD"), take("EUR")] == [said, "", said]
    assert fresh.query("SELECT currency FROM cp_state") == [{"currency": "USD"}]


def test_a_balance_that_is_used_up(fresh: Books) -> None:
    """Notice, no new copies, the stop an hour later, and all again after a payment."""
    books = fresh
    add_fleet(books, WEB)
    kuma = books.customers["kuma"]
    actor = cp_server.Actor("test")

    async def pay(db: cp_server.Database, micros: int, reference: str) -> None:
        await cp_server.add_payment(db, actor, kuma, micros, reference, "")

    in_database(books, lambda db: cp_server.set_credit_limit(db, actor, kuma, 0))
    in_database(books, lambda db: pay(db, 30_000, "one"))
    assert in_database(books, cp_server.check_credit) == []

    async def use(db: cp_server.Database, first_us: int, last_us: int) -> None:
        for event in beats("h1", first_us, last_us, {"a"}):
            await books.apply(db, event)

    # 21,143 micro-units an hour: no window is closed yet, and the balance is used up all the same.
    in_database(books, lambda db: use(db, T, T + HOUR * 3 // 2))
    (changed,) = in_database(books, cp_server.check_credit)
    assert changed["customer_id"] == kuma
    assert in_database(books, cp_server.check_credit) == []
    customer = in_database(books, lambda db: cp_server.get_customer(db, kuma))
    assert customer.out_of_credit_at
    assert cp_server.decide_stop(customer) == customer.out_of_credit_at + dt.timedelta(hours=1)
    with pytest.raises(cp_server.Refusal, match="used up"):
        cp_server.check_credit_left(customer)
    stopped = "SELECT stop_reason FROM assignments WHERE stop_at IS NOT NULL"

    def stop() -> list[str]:
        async def work(db: cp_server.Database) -> None:
            async with db.transaction() as tx:
                await tx.execute(
                    cp_server.SQL_ASSIGNMENT_STOP,
                    replaced=[],
                    notice_s=cp_server.CREDIT_NOTICE_S,
                )

        in_database(books, work)
        return [row["stop_reason"] for row in books.query(stopped)]

    assert stop() == []
    in_database(books, lambda db: pay(db, 5_000, "two"))
    customer = in_database(books, lambda db: cp_server.get_customer(db, kuma))
    assert customer.out_of_credit_at is None
    assert in_database(books, cp_server.check_credit) == []
    in_database(books, lambda db: use(db, T + HOUR * 3 // 2, T + 2 * HOUR))
    assert len(in_database(books, cp_server.check_credit)) == 1
    in_database(books, lambda db: use(db, T + 2 * HOUR, T + 3 * HOUR + 60 * S))
    assert stop() == ["the balance is used up"]


OPEN_MICROS = 23_561 + 8_154  # cpu and memory of an hour and a half


@pytest.mark.parametrize(
    ("limit_micros", "is_out"),
    [(None, False), (0, True), (OPEN_MICROS - 10_000, True), (OPEN_MICROS - 9_999, False)],
)
def test_how_far_below_zero_a_customer_may_go(
    fresh: Books, limit_micros: int | None, is_out: bool
) -> None:
    """What is paid, less what is booked, less what is in no window yet, with the limit added."""
    books = fresh
    add_fleet(books, WEB)
    kuma, actor = books.customers["kuma"], cp_server.Actor("test")
    in_database(books, lambda db: cp_server.add_payment(db, actor, kuma, 10_000, "one", ""))
    run(books, beats("h1", T, T + HOUR * 3 // 2, {"a"}), is_closed=False)
    in_database(books, lambda db: cp_server.set_credit_limit(db, actor, kuma, limit_micros))
    assert in_database(books, cp_server.check_credit) == []  # that is known by then
    customer = in_database(books, lambda db: cp_server.get_customer(db, kuma))
    assert (customer.out_of_credit_at is not None) == is_out


def test_what_was_sent_in_the_open_hour_counts_for_the_balance(fresh: Books) -> None:
    """As much of it as closing would book: of what runs, of what ended, of what cannot be."""
    books = fresh
    names = {"a": "kuma", "b": "gull", "c": "mole", "d": "wren"}
    copies = [oracle.Copy(name, "w", whose, "h1", "p", 500, 10**9) for name, whose in names.items()]
    add_fleet(books, *copies)
    books.query("UPDATE customers SET credit_limit_micros = 0 RETURNING 1")

    def beat(minutes: int, running: str, **sent: int) -> oracle.Heartbeat:
        counters = (oracle.Counter(name, "b", name, 1, 1, 1, sent[name]) for name in sent)
        at_us = T + minutes * 60 * S
        return oracle.Heartbeat(at_us, "h1", 30_000, frozenset(running), tuple(counters))

    def out() -> list[str]:
        in_database(books, cp_server.check_credit)
        rows = books.query("SELECT name FROM customers WHERE out_of_credit_at IS NOT NULL")
        return sorted(row["name"] for row in rows)

    silent = [beat(minutes, "abcd") for minutes in range(1, 50)]
    run(books, [beat(0, "abcd"), *silent, beat(50, "abc", a=10**9), beat(60, "abc")])
    run(books, [beat(n, "abc") for n in range(61, 90)], is_closed=False)
    sent = {"a": 4 * 10**9, "c": 2**62, "d": 5 * 10**9}
    run(books, [beat(90, "abc", **sent)], is_closed=False)
    charges = oracle.totals(oracle.bill(books.cards, copies, books.events))[0]
    assert min(charges[whose, "2026-03"] for whose in ("kuma", "mole", "wren")) > 10 * 21_143

    async def book(db: cp_server.Database, of_charge: int, more: int) -> None:
        for (name, _), micros in charges.items():
            paid = (books.customers[name], of_charge * micros + more, f"{name} {more}", "")
            await cp_server.add_payment(db, cp_server.Actor("test"), *paid)

    def pay(of_charge: int, more: int) -> None:
        in_database(books, lambda db: book(db, of_charge, more))

    pay(1, -4)  # each resource of the open hour is rounded down once more
    assert out() == sorted(names.values())
    pay(0, 5)
    assert out() == []
    # Closing changes nothing of that.
    run(books, [T + 4 * HOUR])
    books.check()
    assert out() == []
    pay(0, -1)
    assert out() == sorted(names.values())


def test_a_month_counts_once_for_the_balance(fresh: Books) -> None:
    """By its lines until its invoice is issued, by that from then on."""
    books = fresh
    add_fleet(books, WEB)
    kuma, actor = books.customers["kuma"], cp_server.Actor("test")
    in_database(books, lambda db: cp_server.add_payment(db, actor, kuma, 500_000, "one", ""))
    run(books, beats("h1", T, T + 6 * HOUR, {"a"}))  # four hours of March, two of April
    due = sum(line.cpu_micros + line.memory_micros for line in books.check().lines)

    async def read(db: cp_server.Database) -> int:
        async with db.transaction() as tx:
            (row,) = await tx.dicts(cp_server.SQL_BALANCES, customer_nos=[1])
        balance: int = row["balance_micros"]
        return balance

    assert in_database(books, read) == 500_000 - due
    books.set_time(T + 4 * HOUR + 25 * HOUR)
    (invoice,) = in_database(books, issue)
    assert 0 < invoice["total_micros"] < due
    assert in_database(books, read) == 500_000 - due


@pytest.mark.parametrize(
    ("counter", "disagrees"),
    [
        (oracle.Counter("a", "b", "c", 0, 1, 0, 0), False),
        (oracle.Counter("a", "b", "c", 0, 0, 0, 0), True),
        # Half a processor and 2 GB for three hours are 5,400 s and 21,600 GB-s.
        (oracle.Counter("a", "b", "c", 5_400 * 10**9, 21_600 * 10**9, 7, 10**9), False),
        (oracle.Counter("a", "b", "c", 5_900 * 10**9, 23_000 * 10**9, 7, 10**9), False),
        (oracle.Counter("a", "b", "c", 7_000 * 10**9, 1, 7, 10**9), True),
        (oracle.Counter("a", "b", "c", 1, 30_000 * 10**9, 7, 10**9), True),
        (oracle.Counter("a", "b", "c", 1, 1, 7, 2 * 10**12), True),
        (oracle.Counter("a", "b", "c", 1, 1, 2 * 10**12, 7), True),
        (oracle.Counter("a", "b", "c", 2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1), True),
    ],
)
def test_counters_that_cannot_be_are_capped_and_said(
    fresh: Books, counter: oracle.Counter, disagrees: bool
) -> None:
    """What is billed is the time that the control plane saw; what is sent has its cap."""
    books = fresh
    add_fleet(books, WEB)
    events = beats("h1", T, T + 2 * HOUR - 30 * S, {"a"})
    last = oracle.Heartbeat(T + 2 * HOUR, "h1", 30_000, frozenset("a"), (counter,))
    run(books, [*events, last, *beats("h1", T + 2 * HOUR + 30 * S, T + 3 * HOUR, {"a"})])
    expected = books.check()
    egress = sum(each.egress_bytes for each in expected.windows)
    assert egress == min(counter.tx_bytes, 125 * 3 * HOUR, cp_server.EGRESS_MAX_BYTES)
    customer, march = books.customers["kuma"], dt.date(2026, 3, 1)
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
    (line,) = bill.lines
    copies = in_database(books, lambda db: cp_server.read_counted(db, [bill]))
    counted, doubt = cp_server.decide_counters(copies[line.assignment_id])
    assert counted["cpu_ns"] == min(counter.cpu_ns, 500 * 3 * HOUR)
    assert line.usage.billed_us == 3 * HOUR
    assert bool(doubt) == disagrees
    assert ("its host counted" in cp_server.render_usage([bill], copies)) == disagrees


def test_a_busy_copy_in_its_open_hour_is_no_reason_for_doubt(fresh: Books) -> None:
    """Its counters are of now, and one hour is closed: the open one counts for them too."""
    books = fresh
    add_fleet(books, WEB)
    end_us = T + HOUR * 3 // 2
    busy = oracle.Counter("a", "b", "c", 500 * HOUR * 3 // 2, 5_400 * 10**9, 7, 7)
    last = oracle.Heartbeat(end_us, "h1", 30_000, frozenset("a"), (busy,))
    run(books, [*beats("h1", T, end_us - 30 * S, {"a"}), last], is_closed=False)
    books.set_time(end_us)
    in_database(books, close_all)
    customer, march = books.customers["kuma"], dt.date(2026, 3, 1)
    bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
    copies = in_database(books, lambda db: cp_server.read_counted(db, [bill]))
    ((line,), (copy,)) = bill.lines, copies.values()
    assert (line.usage.billed_us, copy.life_us) == (HOUR, end_us - T)
    counted, doubt = cp_server.decide_counters(copy)
    assert (counted["cpu_ns"], doubt) == (busy.cpu_ns, "")
    assert cp_server.render_usage([bill], copies).splitlines()[1].split()[3:] == [
        str(line.assignment_id),
        *("1.000000", "0.500000", "2.000000", "0.000000"),
        *("0.750000", "1.500000", "0.000000", "1.500000"),
    ]


def test_what_was_issued_stays_while_counters_grow(fresh: Books) -> None:
    books = fresh
    add_fleet(books, WEB)
    first = oracle.Counter("a", "b", "c", 10**12, 10**12, 7, 10**9)
    beat = oracle.Heartbeat(T + HOUR, "h1", 30_000, frozenset("a"), (first,))
    run(books, [*beats("h1", T, T + HOUR - 30 * S, {"a"}), beat])
    later_us = T + 40 * 24 * HOUR
    books.set_time(later_us)
    assert len(in_database(books, issue)) == 1
    customer, march = books.customers["kuma"], dt.date(2026, 3, 1)

    def shown() -> str:
        bill = in_database(books, lambda db: cp_server.read_invoice(db, customer, march))
        assert bill.number == 1
        return json.dumps(cp_server.render_bill_json(bill, "EUR"))

    before = shown()
    more = oracle.Counter("a", "b", "c", 10**13, 10**13, 9, 10**10)
    late = oracle.Heartbeat(later_us + 30 * S, "h1", 30_000, frozenset("a"), (more,))
    run(books, [late, *beats("h1", later_us + 60 * S, later_us + HOUR, {"a"})])
    assert books.query("SELECT tx_bytes FROM usage_counters") == [{"tx_bytes": 10**10}]
    assert shown() == before


REVOKE = "UPDATE hosts SET status = 'revoked', revoked_at = now() WHERE hostname = 'h1' RETURNING 1"


def test_only_the_host_of_a_copy_counts_for_it(
    fresh: Books, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not another host, not one that was revoked; and for an ended copy no later than a week."""
    books = fresh
    other = oracle.Copy("b", "api", "kuma", "h2", "vole", 500, 10**9)
    add_fleet(books, WEB, other)

    async def say(db: cp_server.Database, host: str, at_us: int, tx_bytes: int) -> object:
        """A heartbeat of this host, with counters of the copy on h1."""
        books.set_time(at_us)
        counter = oracle.Counter("a", "boot", "box", 10**9, 10**9, 7, tx_bytes)
        event = oracle.Heartbeat(at_us, host, 30_000, frozenset("a"), (counter,))
        answers, _ = await cp_server.record_heartbeats(db, [books.beat(event)], peer_check=False)
        return next(iter(answers.values()))

    def counted() -> list[int]:
        return [row["tx_bytes"] for row in books.query("SELECT tx_bytes FROM usage_counters")]

    assert isinstance(in_database(books, lambda db: say(db, "h2", T, 100)), cp_server.Accepted)
    assert counted() == []
    assert isinstance(in_database(books, lambda db: say(db, "h1", T, 200)), cp_server.Accepted)
    assert counted() == [200]
    # What goes back stays.
    in_database(books, lambda db: say(db, "h1", T + S, 150))
    assert counted() == [200]
    books.set_time(T + 2 * S)
    books.query("UPDATE assignments SET ended_at = clock.now(), state = 'stopped' RETURNING 1")
    in_database(books, lambda db: say(db, "h1", T + 3 * S, 300))
    assert counted() == [300]
    late_us = T + (cp_server.USAGE_LATE_S + 2) * S
    in_database(books, lambda db: say(db, "h1", late_us - 1, 301))
    assert counted() == [301]
    assert "counters dropped" not in "".join(capsys.readouterr())
    in_database(books, lambda db: say(db, "h1", late_us, 400))
    assert counted() == [301]
    assert "containers late=1 too_many=0\n" in "".join(capsys.readouterr())
    books.query(REVOKE)
    books.query("UPDATE assignments SET ended_at = NULL, state = 'running' RETURNING 1")
    answer = in_database(books, lambda db: say(db, "h1", late_us + S, 500))
    assert isinstance(answer, cp_server.Refusal), answer
    assert counted() == [301]
    egress = books.query("SELECT sum(bytes)::bigint AS bytes FROM usage_egress")
    assert egress == [{"bytes": 301}]


def test_of_a_copy_so_many_containers_count(
    fresh: Books, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are known go on; of one more the log says that it is dropped."""
    monkeypatch.setattr(cp_server, "COUNTERS_KEPT", 2)
    books = fresh
    add_fleet(books, WEB)

    async def say(db: cp_server.Database, at_us: int, *boxes: str) -> None:
        counters = tuple(oracle.Counter("a", "boot", box, 1, 1, 1, at_us - T) for box in boxes)
        await books.apply(db, oracle.Heartbeat(at_us, "h1", 30_000, frozenset("a"), counters))

    in_database(books, lambda db: say(db, T + 1, "one"))
    in_database(books, lambda db: say(db, T + 2, "two"))
    assert "counters dropped" not in "".join(capsys.readouterr())
    in_database(books, lambda db: say(db, T + 3, "one", "two", "three"))
    said = "".join(capsys.readouterr())
    assert said.count("WARN counters dropped") == said.count("late=0 too_many=1\n") == 1
    assert books.query("SELECT tx_bytes FROM usage_counters") == [{"tx_bytes": 3}] * 2


def test_a_host_is_told_what_it_earned(fresh: Books) -> None:
    """In the answer to a heartbeat with counters, of this month; with facts, if it is anything."""
    books = fresh
    add_fleet(books, WEB)
    run(books, beats("h1", T, T + HOUR, {"a"}))
    (line,) = books.check().lines
    counter = oracle.Counter("a", "b", "c", 1, 1, 1, 1)

    async def earned(
        db: cp_server.Database, *counters: oracle.Counter, told: cp_server.Facts | None = None
    ) -> object:
        event = oracle.Heartbeat(T + 2 * HOUR, "h1", 30_000, frozenset("a"), counters)
        beat = dataclasses.replace(books.beat(event), facts=told)
        found, _ = await cp_server.record_heartbeats(db, [beat], peer_check=False)
        (answer,) = found.values()
        assert isinstance(answer, cp_server.Accepted)
        return answer.earnings

    assert in_database(books, earned) is None
    share = in_database(books, lambda db: earned(db, counter))
    assert share == ("2026-03", line.share_micros)
    told = cp_server.parse_facts(facts())  # the first of a session
    assert in_database(books, lambda db: earned(db, told=told)) == share
    books.set_time(T + 5 * HOUR)
    assert in_database(books, lambda db: earned(db, counter)) == ("2026-04", 0)
    assert in_database(books, lambda db: earned(db, told=told)) is None


def test_a_host_reads_its_part_of_the_statement(
    fresh: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page; what its provider's hosts have together is the statement."""
    monkeypatch.setattr(cp_server, "EARNINGS_LINES", 2)
    books = fresh
    more = [
        oracle.Copy(name, name, "kuma", host, "mole", 500, 10**9)
        for name, host in (("b", "h1"), ("c", "h1"), ("d", "h2"))
    ]
    other = oracle.Copy("e", "e", "kuma", "h3", "vole", 500, 10**9)
    add_fleet(books, WEB, *more, other)
    run(books, beats("h1", T, T + HOUR, {"a", "b", "c"}))
    run(books, beats("h2", T, T + HOUR, {"d"}))
    march = dt.date(2026, 3, 1)

    def read(host: str, cursor: int = 0, **more: Any) -> tuple[cp_server.Bill, int]:
        order = cp_server.EarningsOrder(books.hosts[host], "10.77.0.2", march, cursor)
        order = dataclasses.replace(order, **more)
        return in_database(books, lambda db: cp_server.read_earnings(db, order, False))

    first, cursor = read("h1")
    last, end = read("h1", cursor)
    assert (len(first.lines), cursor, len(last.lines), end) == (2, 2, 1, 0)
    assert [line.workload for line in (*first.lines, *last.lines)] == [
        "kuma/b",
        "kuma/c",
        "kuma/web",
    ]
    shares = [line.usage.share_micros for line in (*first.lines, *last.lines)]
    assert first.total_micros == last.total_micros == sum(shares) > 0
    name = namespace_of("mole")
    statement = in_database(books, lambda db: cp_server.read_statement(db, name, march))
    assert statement.total_micros == first.total_micros + read("h2")[0].total_micros
    assert read("h3")[0].lines == []
    assert read("h1", month=None)[0].month == march
    assert read("h1", month=dt.date(2026, 2, 1))[0].total_micros == 0
    with pytest.raises(cp_server.Refusal) as refused:
        read("h1", session_sha256=b"x" * 32)
    assert refused.value.code == "UNKNOWN_SESSION"
    ended = "UPDATE sessions SET ended_at = now() WHERE host_no = 1 RETURNING 1"
    again = "UPDATE sessions SET ended_at = NULL WHERE host_no = 1 RETURNING 1"
    quarantined = "UPDATE hosts SET status = 'quarantined' WHERE hostname = 'h1' RETURNING 1"
    for change, code in (
        (ended, "UNKNOWN_SESSION"),
        (quarantined, "HOST_QUARANTINED"),
        (REVOKE, "HOST_REVOKED"),
    ):
        books.query(change)
        with pytest.raises(cp_server.Refusal) as refused:
            read("h1")
        assert refused.value.code == code
        books.query(again)
    order = cp_server.EarningsOrder(books.hosts["h2"], "10.77.0.9", march, 0)
    with pytest.raises(cp_server.Refusal) as refused:
        in_database(books, lambda db: cp_server.read_earnings(db, order, True))
    assert refused.value.code == "WRONG_ADDRESS"


def test_a_host_reads_the_hours_of_a_line(fresh: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page; they add up to the statement's lines, one for each rate card.

    What came late of an hour follows it.
    """
    monkeypatch.setattr(cp_server, "EARNINGS_LINES", 3)
    books = fresh
    other = oracle.Copy("d", "d", "kuma", "h2", "mole", 500, 10**9)
    dear = oracle.RateCard("2", None, T + 2 * HOUR, 99_999, 7, 11, 500_000)
    add_fleet(books, WEB, other, cards=(CARD, dear))
    counter = oracle.Counter("a", "b", "c", 1, 1, 1, 10**9 + 1)
    last = oracle.Heartbeat(T + 3 * HOUR, "h1", 30_000, frozenset("a"), (counter,))
    before = beats("h1", T, T + HOUR - 30 * S, {"a"})
    after = beats("h1", T + 2 * HOUR + 600 * S, T + 3 * HOUR - 30 * S, {"a"})
    run(books, [*before, T + 2 * HOUR, *after, last])
    run(books, beats("h2", T + 3 * HOUR + 30 * S, T + 3 * HOUR + 60 * S, {"d"}))
    march, copy_id = dt.date(2026, 3, 1), str(books.ids["a"])

    def read(host: str, cursor: int = 0, **more: Any) -> tuple[cp_server.Bill, int]:
        order = cp_server.EarningsOrder(books.hosts[host], "10.77.0.2", march, cursor, copy_id)
        order = dataclasses.replace(order, **more)
        return in_database(books, lambda db: cp_server.read_earnings(db, order, False))

    first, cursor = read("h1")
    last_page, end = read("h1", cursor)
    hours = [*first.lines, *last_page.lines]
    assert (len(first.lines), cursor, end) == (3, 3, 0)
    assert hours == in_database(books, lambda db: cp_server.read_windows(db, copy_id, march))
    shown = [cp_server.render_bill_line("statement", hour) for hour in hours]
    assert [(each["hour_at"][:16], each["part"], each["card_no"]) for each in shown] == [
        ("2026-03-31T20:00", 1, 1),
        ("2026-03-31T20:00", 2, 1),
        ("2026-03-31T21:00", 1, 1),
        ("2026-03-31T22:00", 1, 2),
        ("2026-03-31T23:00", 1, 2),
    ]
    assert [each["egress_bytes"] for each in shown] == [0, 0, 0, 0, 10**9 + 1]
    lines = read("h1", assignment_id=None)[0].lines
    assert [line.card_no for line in lines] == [1, 2]
    for line in lines:
        mine = [hour.usage for hour in hours if hour.card_no == line.card_no]
        assert tuple(map(sum, zip(*mine, strict=True))) == line.usage
    assert first.total_micros == last_page.total_micros == sum(one["share_micros"] for one in shown)
    # What ran elsewhere is not its business, nor is another month on this page.
    for found, _ in (
        read("h2"),
        read("h1", assignment_id=str(books.ids["d"])),
        read("h1", month=dt.date(2026, 2, 1)),
    ):
        assert (found.lines, found.total_micros) == ([], 0)
