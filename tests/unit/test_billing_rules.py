"""Tables for the rules of billing: cards, windows, months, shares, amounts, and how bills look."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import json
import re
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cp_server
from cp_server import Bill, BillLine, Due, Error, Meter, RateCard, Usage
from proto import openinfra_pb2 as pb

UTC = dt.timezone.utc
HOUR_US = cp_server.HOUR_US
T = dt.datetime(2026, 3, 31, 22, tzinfo=UTC)
HOUR = dt.timedelta(hours=1)
METER = Meter(1, 7, "solana:x", 3, 1000, 10**9)
NEVER: frozenset[dt.date] = frozenset()
MARCH, APRIL, MAY = (dt.date(2026, month, 1) for month in (3, 4, 5))


def card(number: int, customer_no: int | None, valid_from: dt.datetime, **prices: int) -> RateCard:
    values = {"cpu_hour_micros": 10, "gb_hour_micros": 1, "egress_gb_micros": 5, **prices}
    values.setdefault("provider_share_ppm", 800_000)
    return RateCard(number, customer_no, valid_from, **values)


CARDS = cp_server.sort_cards(
    [
        card(4, None, T + 2 * HOUR),
        card(1, None, T - 5 * HOUR),
        card(2, 7, T),
        card(3, 8, T - 9 * HOUR),
    ]
)


@pytest.mark.parametrize(
    ("customer_no", "hour_at", "expected"),
    [
        (7, T - 6 * HOUR, None),
        (7, T - HOUR, 1),
        (7, T, 2),
        (7, T + 5 * HOUR, 2),  # its own, though there is a newer one for all
        (8, T + 5 * HOUR, 3),
        (9, T + HOUR, 1),
        (9, T + 2 * HOUR, 4),
    ],
)
def test_whose_card_it_is(customer_no: int, hour_at: dt.datetime, expected: int | None) -> None:
    found = cp_server.find_card(CARDS, customer_no, hour_at)
    assert (found and found.card_no) == expected


ALL = cp_server.sort_cards([card(1, None, T - 5 * HOUR)])


def close(due: dict[dt.datetime, Due], **changes: Any) -> Any:
    values: dict[str, Any] = {
        "cards": ALL,
        "lines": {},
        "parts": {},
        "issued": NEVER,
        "now": T + 5 * HOUR,
        **changes,
    }
    return cp_server.decide_windows(values.pop("meter", METER), due, **values)


def test_windows_add_up_to_a_line_that_is_rounded_once() -> None:
    third = Due(HOUR_US // 3)
    meter, windows, lines = close({T - n * HOUR: third for n in range(3)})
    # A processor for three times a third of an hour, at 10 an hour.
    assert [window.usage.cpu_micros for window in windows] == [3, 3, 4]
    assert [window.usage.share_micros for window in windows] == [2, 2, 4]
    (line,) = lines.values()
    assert (line.cpu_micros, line.memory_micros, line.share_micros) == (10, 1, 8)
    meter, (window,), lines = close({T + HOUR: Due(HOUR_US)}, meter=meter, lines=lines)
    assert (meter.billed_us, window.usage.cpu_micros, window.month) == (2 * HOUR_US, 10, MARCH)
    assert lines[1, MARCH, 1].cpu_micros == 20
    # The next month's is another line, which begins at nothing.
    _, (window,), lines = close({T + 2 * HOUR: Due(HOUR_US // 6)}, meter=meter, lines=lines)
    assert (window.usage.cpu_micros, window.month) == (1, APRIL)


def test_each_resource_has_its_price() -> None:
    """Each is rounded down, as is the share of their sum; a window is what it adds to that."""
    prices = {"cpu_hour_micros": 1001, "gb_hour_micros": 333, "egress_gb_micros": 99}
    its = card(1, None, T, **prices, provider_share_ppm=750_000)
    meter = dataclasses.replace(METER, cpu_milli=250, memory_bytes=3 * 10**9)
    one = cp_server.price(meter, its, HOUR_US, 15 * 10**8)
    assert one == Usage(HOUR_US, 15 * 10**8, 250, 999, 148, 1_047)
    two = cp_server.price(meter, its, 2 * HOUR_US, 2 * 10**9)
    assert two == Usage(2 * HOUR_US, 2 * 10**9, 500, 1_998, 198, 2_022)
    assert cp_server.subtract_usage(two, one) == Usage(HOUR_US, 5 * 10**8, 250, 999, 50, 975)
    unpaid = dataclasses.replace(meter, namespace=None)
    assert cp_server.price(unpaid, its, HOUR_US, 15 * 10**8) == one._replace(share_micros=0)


@given(st.lists(st.integers(1, HOUR_US), min_size=1, max_size=20))
def test_in_whatever_parts_the_line_is_the_same(parts: list[int]) -> None:
    whole = Due(sum(parts))
    _, _, together = close({T: whole})
    meter: Meter = METER
    lines: dict[cp_server.LineKey, Usage] = {}
    for number, part in enumerate(parts):
        meter, windows, changed = close(
            {T: Due(part)}, meter=meter, lines=lines, parts={T: number} if number else {}
        )
        assert [window.part for window in windows] == [number + 1]
        assert min(windows[0].usage) >= 0
        lines |= changed
    assert lines == together


def test_egress_waits_for_its_room() -> None:
    gbit = cp_server.EGRESS_MAX_BYTES_PER_US
    meter, windows, _ = close({T: Due(10, 11 * gbit)})
    assert [w.usage.egress_bytes for w in windows] == [10 * gbit]
    meter, windows, _ = close({T: Due(0, 5)}, meter=meter)
    assert windows == []
    meter, windows, _ = close({T: Due(1, 0), T + HOUR: Due(1, 0)}, meter=meter)
    assert [w.usage.egress_bytes for w in windows] == [gbit, 5]
    assert meter.counted_bytes == 11 * gbit + 5


def test_counters_do_not_overflow() -> None:
    meter = METER
    for _ in range(3):
        meter, _, _ = close({T: Due(1, 2**62)}, meter=meter)
    assert meter.counted_bytes == 2**62


@pytest.mark.parametrize(
    ("hour_at", "now", "issued", "expected"),
    [
        (T, T + HOUR, NEVER, MARCH),
        (T, T + 40 * 24 * HOUR, NEVER, MARCH),
        (T, T + 24 * HOUR, frozenset({MARCH}), APRIL),
        (T + 2 * HOUR, T + 24 * HOUR, frozenset({MARCH}), APRIL),
        (T, T + 24 * HOUR, frozenset({MARCH, APRIL}), MAY),  # issued by a clock that was wrong
        (T, T - HOUR, frozenset({MARCH}), APRIL),
    ],
)
def test_the_month_that_an_hour_is_on(
    hour_at: dt.datetime, now: dt.datetime, issued: frozenset[dt.date], expected: dt.date
) -> None:
    assert cp_server.decide_month(hour_at, now, issued) == expected


def test_the_month_after() -> None:
    assert cp_server.next_month(dt.date(2026, 12, 1)) == dt.date(2027, 1, 1)
    assert cp_server.next_month(dt.date(2026, 1, 1)) == dt.date(2026, 2, 1)


def test_without_a_card_nothing_is_charged() -> None:
    _, (window,), lines = close({T: Due(5, 7)}, cards={})
    assert window.usage == Usage(5, 7)
    assert [*lines] == [(1, MARCH, 0)]
    assert cp_server.list_entries(METER, window.usage) == []


@pytest.mark.parametrize(
    ("share_ppm", "namespace", "expected"),
    [
        (800_000, "solana:x", {"customer": -10, "provider": 8, "fees": 2}),
        (1_000_000, "solana:x", {"customer": -10, "provider": 10}),
        (0, "solana:x", {"customer": -10, "fees": 10}),
        (800_000, None, {"customer": -10, "fees": 10}),
    ],
)
def test_entries_of_a_window(
    share_ppm: int, namespace: str | None, expected: dict[str, int]
) -> None:
    meter = dataclasses.replace(METER, namespace=namespace)
    cards = cp_server.sort_cards([card(1, None, T, gb_hour_micros=0, provider_share_ppm=share_ppm)])
    _, (window,), _ = close({T: Due(HOUR_US)}, meter=meter, cards=cards)
    found = {kind: micros for (kind, _), micros in cp_server.list_entries(meter, window.usage)}
    assert found == expected
    assert sum(found.values()) == 0


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("0", 0),
        ("12.5", 12_500_000),
        ("-0.000001", -1),
        ("999999999.999999", 999_999_999_999_999),
        ("007", 7_000_000),
    ],
)
def test_amounts(text: str, micros: int) -> None:
    assert cp_server.parse_money(text) == micros
    assert cp_server.parse_money(cp_server.render_money(micros)) == micros


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "1,5", "1.", ".5", "0.0000001", "1e3", "1e999999", "NaN", "1_000", "+1", " 1"),
        *("1234567890", "1\n", "\u0661"),
    ],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(Error, match="is no amount"):
        cp_server.parse_money(text)


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0.00"),
        (1, "0.000001"),
        (-1_500_000, "-1.50"),
        (16_000, "0.016"),
        (10**15, "1000000000.00"),
    ],
)
def test_money_for_people(micros: int, text: str) -> None:
    assert cp_server.render_money(micros) == text


@given(*[st.integers(0, 10**9)] * 3, st.integers(0, 10**6))
def test_shares_by_resource_add_up_and_are_no_more_than_their_charge(
    cpu: int, memory: int, egress: int, ppm: int
) -> None:
    share = (cpu + memory + egress) * ppm // 10**6
    line = make_line(Usage(1, 1, cpu, memory, egress, share))
    shares = cp_server.list_shares(line)
    assert sum(shares) == share
    assert all(0 <= a <= b for a, b in zip(shares, (cpu, memory, egress), strict=True))


def make_line(usage: Usage, **changes: Any) -> BillLine:
    values: dict[str, Any] = {
        "assignment_id": uuid.UUID(int=1),
        "workload": "kuma/web",
        "replica": 0,
        "hostname": "attic",
        "cpu_milli": 500,
        "memory_bytes": 10**9,
        "card_no": 3,
        "cpu_hour_micros": 20_000,
        "gb_hour_micros": 3_000,
        "egress_gb_micros": 0,
        "provider_share_ppm": 800_000,
        "usage": usage,
        **changes,
    }
    return BillLine(**values)


def make_bill(kind: str, *lines: BillLine, **changes: Any) -> Bill:
    values = {"whose": "Kuma", "whose_id": "7", "month": MARCH, "number": 17, **changes}
    total = sum(line.usage.charge_micros for line in lines)
    return Bill(kind, is_preliminary=False, lines=lines, total_micros=total, **values)


HOURS = Usage(HOUR_US * 3 // 2, 0, 15_000, 4_500, 0, 15_600)


def test_a_bill_line_by_line() -> None:
    rows = list(cp_server.list_bill_rows(make_bill("invoice", make_line(HOURS))))
    assert [row[5:] for row in rows] == [
        ["what", "quantity", "unit", "price", "charge"],
        ["cpu", "0.750000", "cpu-hour", "0.02", "0.015"],
        ["memory", "1.500000", "GB-hour", "0.003", "0.0045"],
    ]
    rows = list(cp_server.list_bill_rows(make_bill("statement", make_line(HOURS))))
    assert [row[-2:] for row in rows] == [["share", "owed"], ["80 %", "0.012"], ["80 %", "0.0036"]]


def read_table(text: str) -> list[list[str]]:
    return [re.split(" {2,}", line.strip()) for line in text.splitlines()]


USED = Usage(HOUR_US * 3 // 2, 25 * 10**8, 15_000, 4_500, 0, 15_600)
QUANTITY_NAMES = ["HOURS", "CPU-HOURS", "GB-HOURS", "EGRESS-GB"]
QUANTITIES = ["1.500000", "0.750000", "3.000000", "2.500000"]


def test_windows_as_a_table() -> None:
    """Of half a processor and two GB; the afternoon is not the night."""
    line = vars(make_line(USED, memory_bytes=2 * 10**9))
    late = cp_server.BillWindow(**line, hour_at=T, part=2)
    free = dataclasses.replace(late, part=1, card_no=0, usage=Usage(), provider_share_ppm=1)
    names = [*QUANTITY_NAMES, "CHARGE", "SHARE", "OWED"]
    assert read_table(cp_server.render_windows([late, free])) == [
        ["HOUR", "PART", "CARD", *names],
        ["2026-03-31T22:00Z", "2", "3", *QUANTITIES, "0.0195", "80 %", "0.0156"],
        ["2026-03-31T22:00Z", "1", "0", *["0.000000"] * 4, "0.00", "0.0001 %", "0.00"],
    ]


def test_usage_as_a_table() -> None:
    """What was billed, then what the host counted."""
    line = make_line(USED, memory_bytes=2 * 10**9, replica=4)
    counted = cp_server.Counted(
        assignment_id=line.assignment_id,
        cpu_milli=500,
        memory_bytes=2 * 10**9,
        life_us=2 * HOUR_US,
        cpu_ns=1_800 * 10**9,
        memory_byte_s=3_600 * 10**9,
        rx_bytes=7,
        tx_bytes=10**9,
        egress_bytes=10**9,
    )
    table = cp_server.render_usage([make_bill("invoice", line)], {line.assignment_id: counted})
    head, row = read_table(table)
    assert head[4:-2] == [*QUANTITY_NAMES, *(f"COUNTED-{name}" for name in QUANTITY_NAMES[1:])]
    which = ["Kuma", "kuma/web/4", "attic", str(line.assignment_id)]
    assert row == [*which, *QUANTITIES, "0.500000", "1.000000", "1.000000", "2.000000"]


# Of half a processor and two GB, in an hour; what is doubted is a tenth and two minutes more.
MOST = {"cpu_ns": 18 * 10**11, "memory_byte_s": 72 * 10**11}
MOST |= dict.fromkeys(("rx_bytes", "tx_bytes"), 45 * 10**10)
COUNTED = cp_server.Counted(uuid.UUID(int=1), 500, 2 * 10**9, HOUR_US, 0, 1, 0, 0, None)
TOO_MUCH = "its host counted more than its billed time allows"


@pytest.mark.parametrize("name", MOST)
def test_what_a_host_counted_is_capped_and_doubted(name: str) -> None:
    known, nothing = MOST[name] * 34 // 30, dict.fromkeys(MOST, 0)
    little = {**nothing, "memory_byte_s": 1}
    for value, shown, is_doubted in (
        (MOST[name] - 1, MOST[name] - 1, False),
        (known, MOST[name], False),
        (known + 1, MOST[name], True),
    ):
        change: Any = {name: value}
        copy = dataclasses.replace(COUNTED, **change)
        why = TOO_MUCH if is_doubted else ""
        assert cp_server.decide_counters(copy) == ({**little, name: shown}, why)
        begun = dataclasses.replace(copy, life_us=0)
        assert cp_server.decide_counters(begun) == (nothing, "")


@pytest.mark.parametrize(
    ("minutes", "cpu_ns", "memory_byte_s", "why"),
    [
        (10, 0, 0, ""),  # its counters may be on their way
        (11, 0, 0, "its host counted no memory in all of its billed time"),
        (11, 1, 0, "its host counted no memory in all of its billed time"),
        (11, 0, 1, ""),
        (11, 10**15, 0, TOO_MUCH),
    ],
)
def test_what_runs_has_some_memory(minutes: int, cpu_ns: int, memory_byte_s: int, why: str) -> None:
    life_us = minutes * 60 * 10**6
    copy = dataclasses.replace(COUNTED, life_us=life_us, cpu_ns=cpu_ns, memory_byte_s=memory_byte_s)
    assert cp_server.decide_counters(copy)[1] == why
    assert cp_server.render_counted(copy)["doubtful"] == bool(why)


@pytest.mark.parametrize(
    ("replicas", "cpu_milli", "memory_bytes", "expected"),
    [
        (2, 500, 1000, False),
        (3, 500, 1000, True),
        (1, 1000, 2000, False),
        (1, 1001, 1000, True),
        (1, 500, 2001, True),
        (4, 250, 500, False),
        (4, 251, 1, True),
        (0, 9999, 9999, False),
    ],
)
def test_which_order_reserves_more(
    replicas: int, cpu_milli: int, memory_bytes: int, expected: bool
) -> None:
    """Than two copies, by the sum of their copies; of what a customer without credit asks for."""
    spec = {"cpu_milli": cpu_milli, "memory_bytes": memory_bytes}
    order = cp_server.WorkloadOrder("kuma", "web", replicas, spec)
    now: Any = SimpleNamespace(replicas=2, spec={"cpu_milli": 500, "memory_bytes": 1000})
    assert cp_server.is_more(order, now) == expected


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("invoice", "GET /api/v1/usage?month=2026-03&amp;assignment_id=ASSIGNMENT"),
        ("statement", "sudo openinfra-agent earnings --month 2026-03 --assignment ASSIGNMENT"),
    ],
)
def test_each_line_of_a_bill_leads_to_its_windows(kind: str, how: str) -> None:
    """By what it has in common with them, in each of its files; the page says where they are."""
    bill = make_bill(kind, make_line(HOURS), make_line(HOURS, card_no=4))
    head, *rows = csv.reader("".join(cp_server.render_bill_csv(bill, "EUR")).splitlines())
    names = ["workload", "replica", "host", "assignment", "card"]
    assert head[:5] == names
    which = ["kuma/web", "0", "attic", str(uuid.UUID(int=1))]
    assert [row[:5] for row in rows] == [[*which, card] for card in "3344"]
    lines = cp_server.render_bill_json(bill, "EUR")["lines"]
    assert [(line["assignment_id"], line["card_no"]) for line in lines] == [
        (which[3], 3),
        (which[3], 4),
    ]
    page = "".join(cp_server.render_bill_html(bill, "EUR"))
    assert re.findall(r'data-name="(assignment|card)">(.*?)<', page) == [
        pair for card in "3344" for pair in (("assignment", which[3]), ("card", card))
    ]
    assert how in page
    assert "cp_server.py usage --month 2026-03 --assignment ASSIGNMENT" in page


EVIL = "-1+1;=cmd|' /C calc'!A0"


@pytest.mark.parametrize("hostname", [EVIL, "=1", "+1", "@x", "\tx", '"', "a,b\nc"])
def test_a_strange_host_name_is_no_formula_and_no_cell(hostname: str) -> None:
    text = "".join(
        cp_server.render_bill_csv(make_bill("invoice", make_line(HOURS, hostname=hostname)), "EUR")
    )
    rows = list(csv.reader(text.splitlines(keepends=True)))
    assert {len(row) for row in rows} == {13}
    assert rows[1][2].removeprefix("'") == hostname
    assert rows[1][2][0] not in "=+-@\t"
    assert text.count('"') >= 2 * 13 * 3


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"number": 7}, "7"),
        ({"number": None, "is_preliminary": True}, "preliminary"),
        ({"kind": "statement", "number": None}, "final"),
    ],
)
def test_each_row_of_a_sheet_says_of_which_bill_it_is(changes: dict[str, Any], state: str) -> None:
    bill = dataclasses.replace(make_bill("invoice", make_line(HOURS)), **changes)
    head, *rows = csv.reader("".join(cp_server.render_bill_csv(bill, "CHF")).splitlines())
    assert head[-3:] == ["month", "number", "currency"]
    assert [row[-3:] for row in rows] == [["2026-03", state, "CHF"]] * len(rows)
    assert rows


def test_a_page_shows_words_as_they_are() -> None:
    line = make_line(HOURS, hostname="<script>alert(1)</script>")
    page = "".join(cp_server.render_bill_html(make_bill("invoice", line, whose='<b>"&'), "E<R"))
    assert "<script" not in page
    assert "&lt;b&gt;&quot;&amp;" in page
    assert "E&lt;R" in page
    assert "Invoice 17, March 2026" in page
    assert "Preliminary" not in page
    assert "https://" not in page  # it needs nothing else


def test_an_invoice_does_not_say_what_the_provider_gets() -> None:
    shown = json.dumps(cp_server.render_bill_json(make_bill("invoice", make_line(HOURS)), "EUR"))
    assert "share" not in shown
    shown = json.dumps(cp_server.render_bill_json(make_bill("statement", make_line(HOURS)), "EUR"))
    assert '"share_micros": 15600' in shown


@pytest.mark.parametrize(
    "text",
    [
        "2026-13",
        "2026-1",
        "26-01",
        "2026-01-01",
        "1999-12",
        "",
        "\u0662\u0660\u0662\u0666-\u0660\u0661",
    ],
)
def test_what_is_no_month(text: str) -> None:
    with pytest.raises(cp_server.Refusal, match="is no month"):
        cp_server.parse_month(text)
    assert cp_server.parse_month("2026-03") == MARCH
    assert cp_server.parse_month("2026-12") == dt.date(2026, 12, 1)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"month": "2026-13"}, "month"),
        ({"cursor": 2**31}, "cursor"),
        ({"assignment_id": "web"}, "assignment_id"),
        ({"session": b"x"}, "session"),
    ],
)
def test_what_is_no_request_for_earnings(values: dict[str, Any], field: str) -> None:
    request = pb.EarningsRequest(**{"session": b"x" * 32, **values})
    with pytest.raises(cp_server.Refusal) as refused:
        cp_server.parse_earnings(request, "10.77.0.2")
    assert (refused.value.code, refused.value.field) == ("BAD_REQUEST", field)


@pytest.mark.parametrize(("possible", "is_doubted"), [(None, False), (9, True), (10, False)])
def test_what_was_sent_is_doubted_unless_all_of_it_was_possible(
    possible: int | None, is_doubted: bool
) -> None:
    copy = dataclasses.replace(COUNTED, tx_bytes=10, egress_bytes=possible)
    assert cp_server.decide_counters(copy)[1] == (TOO_MUCH if is_doubted else "")
