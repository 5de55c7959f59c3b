"""An oracle for billing tests: from a log of events to windows and lines, by definition.

Pure and slow on purpose. Times are integer microseconds since the epoch by the control plane's
clock, money is integer micro-units, and every stretch of time is a half-open (from, to).
Input that no control plane should hold (two rate cards for one moment, say) is a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import pairwise

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
SEEN_INTERVALS = 3  # after a heartbeat a host counts as seen for at most so many intervals
EGRESS_BYTES_PER_US = 125  # 1 Gbit/s
SLACK_US = 120 * SECOND_US
LATE_US = 7 * 24 * HOUR_US  # counters are heard for so long after a copy's end
COUNTER_MAX = 2**63 - 1
MILLION = 10**6

CPU_HOUR = 1000 * HOUR_US  # in milli-cpu microseconds
GB_HOUR = 10**9 * HOUR_US  # in byte microseconds
GB = 10**9  # in bytes

Span = tuple[int, int]


# ---- input ----


@dataclass(frozen=True)
class RateCard:
    """Prices from a full hour on, for one customer or (None) for all."""

    card: str
    customer: str | None
    valid_from_us: int
    cpu_hour_micros: int
    gb_hour_micros: int
    egress_gb_micros: int
    share_ppm: int


@dataclass(frozen=True)
class Copy:
    """One running replica of a workload: one assignment, on one host for all its life."""

    copy: str
    workload: str
    customer: str
    host: str
    provider: str
    cpu_milli: int
    memory_bytes: int
    made_us: int = 0  # when it got its host
    sends: bool = True  # it has a way out, or ports


@dataclass(frozen=True)
class Counter:
    """What one container has used since its start."""

    copy: str
    boot_id: str
    container_id: str
    cpu_ns: int
    memory_byte_s: int
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True)
class Heartbeat:
    """An accepted heartbeat, with the interval that the CP asked for in its answer.

    `running` is None when the host says nothing of its copies: they are as it said last.
    """

    at_us: int
    host: str
    interval_ms: int
    running: frozenset[str] | None
    counters: tuple[Counter, ...]
    boot_id: str = "boot"


@dataclass(frozen=True)
class CopyEnded:
    """The CP's own end of a copy."""

    at_us: int
    copy: str


Event = Heartbeat | CopyEnded


# ---- output ----


@dataclass(frozen=True)
class Window:
    """One copy in one hour; the amounts are what it adds to the running totals of its line."""

    copy: str
    hour_us: int
    billed_us: int
    egress_bytes: int
    card: str | None
    cpu_micros: int
    memory_micros: int
    egress_micros: int
    share_micros: int


@dataclass(frozen=True)
class Line:
    """One copy under one rate card in one month: a line of an invoice and of a statement."""

    month: str
    customer: str
    provider: str
    workload: str
    copy: str
    card: str | None
    billed_us: int
    egress_bytes: int
    cpu_micros: int
    memory_micros: int
    egress_micros: int
    share_micros: int
    fee_micros: int


@dataclass(frozen=True)
class Bill:
    """Every window and every line that a log of events leads to."""

    windows: list[Window] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


# ---- the log ----


def check_input(cards: Sequence[RateCard], copies: Sequence[Copy]) -> None:
    """Refuse what would leave the bill undefined."""
    if len({card.card for card in cards}) != len(cards):
        raise ValueError("two rate cards have one name")
    if len({(card.customer, card.valid_from_us) for card in cards}) != len(cards):
        raise ValueError("two rate cards of one customer begin at one time")
    if len({copy.copy for copy in copies}) != len(copies):
        raise ValueError("two copies have one name")
    for card in cards:
        if card.valid_from_us % HOUR_US != 0:
            raise ValueError(f"rate card {card.card} does not begin on a full hour")
        if min(card.cpu_hour_micros, card.gb_hour_micros, card.egress_gb_micros) < 0:
            raise ValueError(f"rate card {card.card} has a negative price")
        if not 0 <= card.share_ppm <= MILLION:
            raise ValueError(f"rate card {card.card} has a share outside 0..{MILLION}")
    for copy in copies:
        if min(copy.cpu_milli, copy.memory_bytes) < 0:
            raise ValueError(f"copy {copy.copy} has a negative size")


def ordered(events: Iterable[Event]) -> list[Event]:
    """Every event once (its first place in the log), by time; ties stay in the log's order."""
    return sorted(dict.fromkeys(events), key=lambda event: event.at_us)


def heartbeats_by_host(log: Sequence[Event]) -> dict[str, list[Heartbeat]]:
    """Each host's heartbeats, at most one per time: the later one with the counters of both.

    Each with what runs: no copy outlives a boot, after which none does until the host says so.
    """
    hosts: dict[str, list[Heartbeat]] = {}
    for event in log:
        if not isinstance(event, Heartbeat):
            continue
        beats = hosts.setdefault(event.host, [])
        running = event.running
        if running is None and beats and beats[-1].boot_id == event.boot_id:
            running = beats[-1].running
        said = replace(event, running=running or frozenset())
        if beats and beats[-1].at_us == event.at_us:
            beats[-1] = replace(said, counters=beats[-1].counters + event.counters)
        else:
            beats.append(said)
    return hosts


def ends_by_copy(log: Sequence[Event]) -> dict[str, int]:
    """The first end of each copy that has one."""
    ends: dict[str, int] = {}
    for event in log:
        if isinstance(event, CopyEnded):
            ends.setdefault(event.copy, event.at_us)
    return ends


# ---- rules 1 to 3: time ----


def seen_spans(beats: Sequence[Heartbeat]) -> list[Span]:
    """When the host was seen; nothing after the last of these heartbeats."""
    spans = []
    for a, b in pairwise(beats):
        spans.append((a.at_us, min(b.at_us, a.at_us + SEEN_INTERVALS * a.interval_ms * 1000)))
    return spans


def run_spans(copy: str, beats: Sequence[Heartbeat]) -> list[Span]:
    """From each heartbeat that says the copy runs to the next that says it does not."""
    spans = []
    since: int | None = None
    for beat in beats:
        is_running = copy in (beat.running or ())
        if is_running and since is None:
            since = beat.at_us
        elif not is_running and since is not None:
            spans.append((since, beat.at_us))
            since = None
    if since is not None:
        spans.append((since, beats[-1].at_us))
    return spans


def common(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """The time that is in both lists; each list is in order and does not overlap itself."""
    spans = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            spans.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return spans


def hour_of(at_us: int) -> int:
    """The full hour UTC in which a moment lies; the full hour itself lies in the new one."""
    return at_us // HOUR_US * HOUR_US


def month_of(at_us: int) -> str:
    """The calendar month UTC, as YYYY-MM."""
    moment = datetime.fromtimestamp(at_us // SECOND_US, tz=timezone.utc)
    return f"{moment.year:04d}-{moment.month:02d}"


def time_by_hour(spans: Sequence[Span]) -> dict[int, int]:
    """Microseconds per hour, the spans cut at every full hour."""
    hours: dict[int, int] = {}
    for begin, end in spans:
        for hour in range(hour_of(begin), end, HOUR_US):
            part = min(end, hour + HOUR_US) - max(begin, hour)
            hours[hour] = hours.get(hour, 0) + part
    return hours


# ---- rule 4: egress ----


def is_sound(counter: Counter) -> bool:
    """Whether all four values are within 0 and 2^63-1."""
    values = (counter.cpu_ns, counter.memory_byte_s, counter.rx_bytes, counter.tx_bytes)
    return all(0 <= value <= COUNTER_MAX for value in values)


def egress_by_hour(copy: Copy, beats: Sequence[Heartbeat]) -> dict[int, int]:
    """Bytes per hour by which heartbeats raised the greatest tx_bytes of the copy's containers.

    An hour's sum, and what a heartbeat adds to it, is at most what 1 Gbit/s allows, and two minutes
    of it more, since anything of the copy's counters grew last: before the hour's first growth, or
    before that heartbeat. Before the first growth of all that is since the copy was made.
    """
    hours: dict[int, int] = {}
    since: dict[int, int] = {}
    heard_us = copy.made_us
    greatest: dict[tuple[str, str], tuple[int, ...]] = {}
    for beat in beats:
        added, has_grown = 0, False
        for counter in beat.counters:
            if counter.copy != copy.copy or not is_sound(counter):
                continue
            container = (counter.boot_id, counter.container_id)
            old = greatest.get(container, (-1, -1, -1, 0))
            said = (counter.cpu_ns, counter.memory_byte_s, counter.rx_bytes, counter.tx_bytes)
            new = tuple(map(max, old, said))
            added += new[3] - old[3]
            has_grown = has_grown or new != old
            greatest[container] = new
        if added and copy.sends:
            hour = hour_of(beat.at_us)
            begun = since.setdefault(hour, heard_us)
            before = hours.get(hour, 0)
            more = min(added, possible_egress(beat.at_us - heard_us))
            hours[hour] = max(before, min(before + more, possible_egress(beat.at_us - begun)))
        heard_us = beat.at_us if has_grown else heard_us
    return hours


def possible_egress(span_us: int) -> int:
    return EGRESS_BYTES_PER_US * (span_us + SLACK_US)


def capped_egress(time: dict[int, int], egress: dict[int, int]) -> dict[int, int]:
    """Bytes billed per hour: by the end of any hour no more than the billed time allows."""
    hours: dict[int, int] = {}
    time_sum = egress_sum = billed_sum = 0
    for hour in sorted(time.keys() | egress.keys()):
        time_sum += time.get(hour, 0)
        egress_sum += egress.get(hour, 0)
        billed = min(egress_sum, EGRESS_BYTES_PER_US * time_sum)
        hours[hour] = billed - billed_sum
        billed_sum = billed
    return hours


# ---- rules 5 and 6: money ----


def card_for(cards: Sequence[RateCard], customer: str, hour_us: int) -> RateCard | None:
    """The customer's own latest card of that hour, else the general latest, else none."""
    valid = [card for card in cards if card.valid_from_us <= hour_us]
    own = [card for card in valid if card.customer == customer]
    general = [card for card in valid if card.customer is None]
    return max(own or general, key=lambda card: card.valid_from_us, default=None)


@dataclass(frozen=True)
class Amounts:
    """Three amounts and the provider's share of their sum."""

    cpu: int = 0
    memory: int = 0
    egress: int = 0
    share: int = 0


def amounts_of(copy: Copy, card: RateCard | None, billed_us: int, egress_bytes: int) -> Amounts:
    """What so much use costs under a card, each amount rounded down once."""
    if card is None:
        return Amounts()
    cpu = copy.cpu_milli * billed_us * card.cpu_hour_micros // CPU_HOUR
    memory = copy.memory_bytes * billed_us * card.gb_hour_micros // GB_HOUR
    egress = egress_bytes * card.egress_gb_micros // GB
    share = (cpu + memory + egress) * card.share_ppm // MILLION
    return Amounts(cpu, memory, egress, share)


@dataclass
class Running:
    """The running totals of one line."""

    billed_us: int = 0
    egress_bytes: int = 0
    amounts: Amounts = field(default_factory=Amounts)


def bill_copy(
    copy: Copy, cards: Sequence[RateCard], time: dict[int, int], egress: dict[int, int]
) -> Bill:
    """The windows of one copy in order of time, and its lines."""
    made = Bill()
    sums: dict[tuple[str, str | None], Running] = {}
    for hour, egress_bytes in sorted(capped_egress(time, egress).items()):
        billed_us = time.get(hour, 0)
        if billed_us == 0 and egress_bytes == 0:
            continue
        card = card_for(cards, copy.customer, hour)
        name = None if card is None else card.card
        total = sums.setdefault((month_of(hour), name), Running())
        total.billed_us += billed_us
        total.egress_bytes += egress_bytes
        old = total.amounts
        new = total.amounts = amounts_of(copy, card, total.billed_us, total.egress_bytes)
        window = Window(
            copy=copy.copy,
            hour_us=hour,
            billed_us=billed_us,
            egress_bytes=egress_bytes,
            card=name,
            cpu_micros=new.cpu - old.cpu,
            memory_micros=new.memory - old.memory,
            egress_micros=new.egress - old.egress,
            share_micros=new.share - old.share,
        )
        made.windows.append(window)
    for (month, name), total in sums.items():
        amounts = total.amounts
        line = Line(
            month=month,
            customer=copy.customer,
            provider=copy.provider,
            workload=copy.workload,
            copy=copy.copy,
            card=name,
            billed_us=total.billed_us,
            egress_bytes=total.egress_bytes,
            cpu_micros=amounts.cpu,
            memory_micros=amounts.memory,
            egress_micros=amounts.egress,
            share_micros=amounts.share,
            fee_micros=amounts.cpu + amounts.memory + amounts.egress - amounts.share,
        )
        made.lines.append(line)
    return made


# ---- the whole ----


def bill(cards: Sequence[RateCard], copies: Sequence[Copy], events: Iterable[Event]) -> Bill:
    """All windows by (copy, hour) and all lines by (month, copy, card)."""
    check_input(cards, copies)
    log = ordered(events)
    hosts = heartbeats_by_host(log)
    ends = ends_by_copy(log)
    windows: list[Window] = []
    lines: list[Line] = []
    for copy in copies:
        beats = heard = hosts.get(copy.host, [])
        if copy.copy in ends:
            # For an ended copy its host is seen no further; what it sent may be told later.
            beats = [beat for beat in beats if beat.at_us <= ends[copy.copy]]
            heard = [beat for beat in heard if beat.at_us < ends[copy.copy] + LATE_US]
        time = time_by_hour(common(seen_spans(beats), run_spans(copy.copy, beats)))
        one = bill_copy(copy, cards, time, egress_by_hour(copy, heard))
        windows += one.windows
        lines += one.lines
    windows.sort(key=lambda window: (window.copy, window.hour_us))
    lines.sort(key=lambda line: (line.month, line.copy, line.card or ""))
    return Bill(windows, lines)


def totals(
    bill: Bill,
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int], dict[str, int]]:
    """Invoices by (customer, month), statements by (provider, month), fees by month."""
    invoices: dict[tuple[str, str], int] = {}
    statements: dict[tuple[str, str], int] = {}
    fees: dict[str, int] = {}
    for line in bill.lines:
        customer = (line.customer, line.month)
        provider = (line.provider, line.month)
        amount = line.cpu_micros + line.memory_micros + line.egress_micros
        invoices[customer] = invoices.get(customer, 0) + amount
        statements[provider] = statements.get(provider, 0) + line.share_micros
        fees[line.month] = fees.get(line.month, 0) + line.fee_micros
    return invoices, statements, fees
