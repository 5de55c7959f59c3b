"""Tables for the billing oracle: cases computed by hand, rule by rule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise

import pytest

from tests.billing_oracle import (
    COUNTER_MAX,
    HOUR_US,
    Bill,
    Copy,
    CopyEnded,
    Counter,
    Event,
    Heartbeat,
    Line,
    RateCard,
    Window,
    bill,
    card_for,
    month_of,
    totals,
)

S = 1_000_000  # a second
MIN = 60 * S
GB = 10**9
PPM = 10**6


def utc(month: int, day: int, hour: int = 0) -> int:
    """A full hour of 2026."""
    return int(datetime(2026, month, day, hour, tzinfo=timezone.utc).timestamp()) * S


T = utc(3, 10, 10)
FREE = RateCard("free", None, 0, 0, 0, 0, 0)
# One cpu, 1 GB: a cpu-hour and a GB-hour are one hour of it.
A = Copy("a", "web", "kuma", "h1", "mole", 1000, GB)
B = replace(A, copy="b")


def beat(
    at_us: int,
    running: str | None = "a",
    counters: tuple[Counter, ...] = (),
    interval_s: int = 30,
    host: str = "h1",
    boot: str = "b1",
) -> Heartbeat:
    """A heartbeat at T + at_us; each letter of `running` is a copy."""
    said = None if running is None else frozenset(running)
    return Heartbeat(T + at_us, host, interval_s * 1000, said, counters, boot)


def tx(value: int, container: str = "c1", boot: str = "b1", copy: str = "a") -> Counter:
    """A counter of which only the sent bytes matter."""
    return Counter(copy, boot, container, 0, 0, 0, value)


def times(made: Bill, copy: str = "a") -> dict[int, int]:
    """Billed time by hour after T."""
    windows = [window for window in made.windows if window.copy == copy]
    return {(window.hour_us - T) // HOUR_US: window.billed_us for window in windows}


def traffic(made: Bill, copy: str = "a") -> dict[int, int]:
    """Billed egress by hour after T, where there is any."""
    windows = [window for window in made.windows if window.copy == copy and window.egress_bytes]
    return {(window.hour_us - T) // HOUR_US: window.egress_bytes for window in windows}


def billed_us(events: Sequence[Event], copy: str = "a") -> int:
    """All the billed time of one copy."""
    return sum(times(bill([FREE], [A, B], events), copy).values())


def hours_run(first_us: int, hours: int, running: str = "a", host: str = "h1") -> list[Event]:
    """Heartbeats on each full hour, with an interval that just bridges it: 3 x 20 minutes."""
    return [
        Heartbeat(first_us + i * HOUR_US, host, 1_200_000, frozenset(running), ())
        for i in range(hours + 1)
    ]


# ---- rule 1: a host is seen from a heartbeat to the next, for 3 intervals at most ----


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([], 0),
        # One heartbeat: nothing is seen after the last.
        ([beat(0)], 0),
        ([beat(0), beat(30 * S)], 30 * S),
        # Exactly 3 intervals of 30 s, a microsecond less, a microsecond more.
        ([beat(0), beat(90 * S - 1)], 90 * S - 1),
        ([beat(0), beat(90 * S)], 90 * S),
        ([beat(0), beat(90 * S + 1)], 90 * S),
        # 0 to 90 of a gap of 300 s, then 300 to 330.
        ([beat(0), beat(300 * S), beat(330 * S)], 120 * S),
        # The interval of the earlier one counts: 60 of 60 (cap 90), then 30 of 60 (cap 3 x 10).
        ([beat(0), beat(60 * S, interval_s=10), beat(120 * S)], 90 * S),
        # The other way round: 30 of 60 (cap 3 x 10), then 60 of 60 (cap 90).
        ([beat(0, interval_s=10), beat(60 * S), beat(120 * S)], 90 * S),
        # The interval of the last one sees nothing.
        ([beat(0), beat(30 * S, interval_s=9999)], 30 * S),
        # An interval of nothing.
        ([beat(0, interval_s=0), beat(30 * S)], 0),
        # The same heartbeat again; in disorder; again with another body at the same time.
        ([beat(0), beat(0), beat(30 * S), beat(30 * S)], 30 * S),
        ([beat(60 * S), beat(0), beat(30 * S)], 60 * S),
        ([beat(0), beat(30 * S), beat(30 * S, counters=(tx(0),)), beat(60 * S)], 60 * S),
        # Of two at one time the later in the log brings the interval: 3 x 10, then 3 x 30.
        ([beat(0), beat(0, interval_s=10), beat(60 * S)], 30 * S),
        ([beat(0, interval_s=10), beat(0), beat(60 * S)], 60 * S),
        # One microsecond is one microsecond.
        ([beat(0), beat(1)], 1),
    ],
)
def test_seen_time(beats: list[Event], expected: int) -> None:
    assert billed_us(beats) == expected


# ---- rule 2: from the heartbeat that says it runs to the one that says it does not ----


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # One letter per heartbeat, 30 s apart: r says that the copy runs, s that it does not.
        ("ssss", 0),
        ("rrrr", 90),
        ("srrr", 60),
        ("rrrs", 90),
        ("rsss", 30),
        # Only at the last heartbeat: nothing seen after it.
        ("sssr", 0),
        # 0 to 60 and 90 to 120.
        ("rrsrs", 90),
        # 0 to 30, 60 to 90, 120 to 150.
        ("rsrsrs", 90),
    ],
)
def test_run_and_stop(said: str, expected: int) -> None:
    beats = [beat(30 * S * i, "a" if letter == "r" else "") for i, letter in enumerate(said)]
    assert billed_us(beats) == expected * S


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # A dot says nothing: as before, and before the first word nothing runs.
        ("r...", 90),
        ("..r.", 30),
        ("r.s.", 60),
        ("r.s.r.", 90),
        # A bar is a boot before the next heartbeat. After it nothing runs until that is said, and
        # what is said in its first heartbeat is as if nothing had happened.
        ("r.|..", 60),
        ("r|...", 30),
        ("r|..r.", 60),
        ("r|rr", 60),
        ("r|s.", 30),
        ("r|.|r.", 60),
        ("r|.|.r.", 60),
        ("s|..", 0),
        ("|r.|", 30),
    ],
)
def test_what_a_host_does_not_say(said: str, expected: int) -> None:
    beats: list[Event] = []
    words = {"r": "a", "s": "", ".": None}
    for boot, letters in enumerate(said.split("|")):
        for letter in letters:
            beats.append(beat(30 * S * len(beats), words[letter], boot=f"b{boot}"))
    assert billed_us(beats) == expected * S


def test_a_silence_with_a_boot_in_it() -> None:
    # Seen 0 to 90 of 300 s: that it was booted meanwhile is heard at their end only.
    for said in (None, ""):
        assert billed_us([beat(0), beat(300 * S, said, boot="b2"), beat(330 * S, None)]) == 90 * S
    # It runs again at 300 s, and 30 s more are seen.
    again = [beat(0), beat(300 * S, boot="b2"), beat(330 * S, None, boot="b2")]
    assert billed_us(again) == 120 * S


def test_a_boot_between_two_heartbeats_at_one_time() -> None:
    # At 30 s one that says nothing, of the same boot: as before; of another: nothing runs.
    for boot, expected in (("b1", 60), ("b2", 30)):
        beats = [beat(0), beat(30 * S), beat(30 * S, None, (tx(0),), boot=boot)]
        assert billed_us([*beats, beat(60 * S, None, boot=boot)]) == expected * S


def test_a_stop_that_is_heard_late() -> None:
    # It ran at 0; at 300 s it is said not to run; seen was 0 to 90.
    assert billed_us([beat(0), beat(300 * S, ""), beat(330 * S, "")]) == 90 * S


def test_of_two_heartbeats_at_one_time_the_later_in_the_log_says_what_runs() -> None:
    # Runs 0 to 30; at 30 first "runs", then "does not".
    assert billed_us([beat(0), beat(30 * S), beat(30 * S, ""), beat(60 * S)]) == 30 * S
    assert billed_us([beat(0), beat(30 * S, ""), beat(30 * S), beat(60 * S)]) == 60 * S
    # A repeat keeps its first place: the log is "runs", "does not", and then the "runs" again.
    repeated: list[Event] = [beat(0), beat(30 * S), beat(30 * S, ""), beat(30 * S), beat(60 * S)]
    assert billed_us(repeated) == 30 * S


RUN = [beat(30 * S * i) for i in range(5)]  # runs and is seen from 0 to 120 s


@pytest.mark.parametrize(
    ("ends_us", "expected"),
    [
        ([], 120),
        # Between heartbeats: only up to the one before.
        ([45 * S], 30),
        # At a heartbeat that one counts; a microsecond before it does not.
        ([60 * S], 60),
        ([60 * S - 1], 30),
        ([60 * S + 1], 60),
        # At the first heartbeat, and before it.
        ([0], 0),
        ([-1], 0),
        # At the last, and after all of them.
        ([120 * S], 120),
        ([999 * S], 120),
        # The first of several ends it.
        ([100 * S, 45 * S], 30),
        ([45 * S, 45 * S], 30),
    ],
)
def test_the_cp_ends_a_copy(ends_us: list[int], expected: int) -> None:
    ends = [CopyEnded(T + end, "a") for end in ends_us]
    assert billed_us([*RUN, *ends]) == expected * S
    assert billed_us([*ends, *RUN]) == expected * S


def test_an_end_after_a_stop_and_before_a_new_start() -> None:
    # Runs 0 to 30, stopped at 30, ended at 45; what is said at 60 and 90 is ignored.
    beats: list[Event] = [beat(0), beat(30 * S, ""), beat(60 * S), beat(90 * S)]
    assert billed_us(beats) == 60 * S
    assert billed_us([*beats, CopyEnded(T + 45 * S, "a")]) == 30 * S


def test_an_end_in_a_gap_takes_the_seen_time_of_the_gap() -> None:
    # Seen 0 to 30 and, but for the end, 30 to 120; the last heartbeat before the end is at 30.
    beats = [beat(0), beat(30 * S), beat(300 * S)]
    assert billed_us(beats) == 120 * S
    assert billed_us([*beats, CopyEnded(T + 200 * S, "a")]) == 30 * S


def test_two_copies_of_one_host() -> None:
    # a runs 0 to 60, b 30 to 90; the end of a is nothing to b.
    beats = [beat(0, "a"), beat(30 * S, "ab"), beat(60 * S, "b"), beat(90 * S, "")]
    assert billed_us(beats, "a") == 60 * S
    assert billed_us(beats, "b") == 60 * S
    ended: list[Event] = [*beats, CopyEnded(T + 30 * S, "a"), CopyEnded(T, "unknown")]
    assert billed_us(ended, "a") == 30 * S
    assert billed_us(ended, "b") == 60 * S


def test_only_its_own_host_speaks_for_a_copy() -> None:
    # h2 says that a runs, from 0 to 90; h1 says so from 30 to 60.
    other = [beat(30 * S * i, "a", host="h2") for i in range(4)]
    own = [beat(0, ""), beat(30 * S), beat(60 * S, ""), beat(90 * S, "")]
    assert billed_us(other) == 0
    assert billed_us([*other, *own]) == 30 * S
    # The last heartbeat before an end is the own host's too: at 30, not at 60.
    ended: list[Event] = [*other, beat(0), beat(30 * S), beat(90 * S), CopyEnded(T + 70 * S, "a")]
    assert billed_us(ended) == 30 * S


# ---- rule 3: windows are cut at every full hour ----


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        # 9:59:30 to 10:00:00 exactly: no window of 10:00.
        ([beat(-30 * S), beat(0)], {-1: 30 * S}),
        ([beat(0), beat(30 * S)], {0: 30 * S}),
        # One microsecond on either side.
        ([beat(-1), beat(1)], {-1: 1, 0: 1}),
        ([beat(-20 * S), beat(10 * S)], {-1: 20 * S, 0: 10 * S}),
        # A gap over the hour: 9:59:00 to 10:00:30 is seen, and again 10:05:00 to 10:05:30.
        ([beat(-60 * S), beat(300 * S), beat(330 * S)], {-1: 60 * S, 0: 60 * S}),
        # A gap that is seen to exactly the hour: 9:58:30 + 90 s.
        ([beat(-90 * S), beat(300 * S)], {-1: 90 * S}),
        # 9:30 to 12:15 in one piece, the interval being an hour.
        (
            [beat(-30 * MIN, interval_s=3600), beat(135 * MIN)],
            {-1: 30 * MIN, 0: HOUR_US, 1: HOUR_US, 2: 15 * MIN},
        ),
        # Two pieces of one hour are one window; an hour without billed time has none.
        (
            [
                beat(0),
                beat(MIN, ""),
                beat(10 * MIN),
                beat(11 * MIN, ""),
                beat(121 * MIN),
                beat(122 * MIN),
            ],
            {0: 2 * MIN, 2: MIN},
        ),
    ],
)
def test_windows(beats: list[Event], expected: dict[int, int]) -> None:
    assert times(bill([FREE], [A], beats)) == expected


# ---- rule 4: egress ----


def sent(*steps: tuple[Counter, ...]) -> list[Event]:
    """Heartbeats every 30 s from T on, with these counters: 3.75 GB of room per step."""
    return [beat(30 * S * i, counters=counters) for i, counters in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(), ()], 0),
        # The first value counts as a whole: the container's start is 0.
        ([(), (tx(700),)], 700),
        ([(tx(700),), ()], 700),
        ([(tx(100),), (tx(250),), (tx(700),)], 700),
        # The same value again adds nothing.
        ([(tx(700),), (tx(700),), (tx(700),)], 700),
        # Back to 200 adds nothing, nor does 650; 800 adds 100.
        ([(tx(700),), (tx(200),), (tx(650),), (tx(800),)], 800),
        # A new container, and a new boot, begin at 0: 700 + 40, then back at the first 5 more.
        ([(tx(700),), (tx(40, "c2"),)], 740),
        ([(tx(700),), (tx(40, boot="b2"),), (tx(705),)], 745),
        # Two containers of one copy in one heartbeat: 700 + 40.
        ([(tx(700), tx(40, "c2")), ()], 740),
        # One container twice in one heartbeat: the greatest.
        ([(tx(700), tx(300)), ()], 700),
        ([(tx(300), tx(700)), ()], 700),
        # Of another copy, of no copy.
        ([(tx(700, copy="b"), tx(9, copy="unknown")), ()], 0),
        # All four values are checked; 300 is of a sound counter before.
        ([(tx(300),), (Counter("a", "b1", "c1", -1, 0, 0, 700),)], 300),
        ([(tx(300),), (Counter("a", "b1", "c1", 0, -1, 0, 700),)], 300),
        ([(tx(300),), (Counter("a", "b1", "c1", 0, 0, -1, 700),)], 300),
        ([(tx(300),), (tx(-1),), (tx(301),)], 301),
        ([(tx(300),), (Counter("a", "b1", "c1", COUNTER_MAX + 1, 0, 0, 700),)], 300),
        ([(tx(300),), (Counter("a", "b1", "c1", 0, COUNTER_MAX + 1, 0, 700),)], 300),
        ([(tx(300),), (Counter("a", "b1", "c1", 0, 0, COUNTER_MAX + 1, 700),)], 300),
        ([(tx(300),), (tx(COUNTER_MAX + 1),), (tx(301),)], 301),
        # The greatest values that count; the other counters of that heartbeat count anyway.
        ([(Counter("a", "b1", "c1", COUNTER_MAX, COUNTER_MAX, COUNTER_MAX, 700),), ()], 700),
        ([(tx(-1), tx(40, "c2")), ()], 40),
        # 2^63-1 bytes counted, of which 30 s allow 125 x 30,000,000.
        ([(), (tx(COUNTER_MAX),)], 3_750_000_000),
    ],
)
def test_counters(steps: list[tuple[Counter, ...]], expected: int) -> None:
    assert sum(traffic(bill([FREE], [A], sent(*steps))).values()) == expected


def test_counters_begin_anew_with_a_boot() -> None:
    # 700 before it, 40 and then 90 after it; what was counted before and comes late, 20 more.
    beats = [
        beat(0, "a", (tx(700),)),
        beat(30 * S, None, (tx(40, boot="b2"), tx(720)), boot="b2"),
        beat(60 * S, "a", (tx(90, boot="b2"),), boot="b2"),
        beat(90 * S, None, (tx(700),), boot="b2"),
    ]
    made = bill([FREE], [A], beats)
    assert traffic(made) == {0: 720 + 90}
    assert times(made) == {0: 60 * S}


def test_counters_of_a_heartbeat_that_says_the_copy_does_not_run() -> None:
    # Before it runs 100, at its stop 100 more, after it 50 more: 250.
    beats = [
        beat(0, "", (tx(100),)),
        beat(30 * S, "a"),
        beat(60 * S, "", (tx(200),)),
        beat(90 * S, "", (tx(250),)),
    ]
    assert traffic(bill([FREE], [A], beats)) == {0: 250}


def test_counters_of_two_heartbeats_at_one_time_count_together() -> None:
    # 700 of c1 (not 900: the later one's c1 is lower but the greatest counts) and 40 of c2.
    first = beat(30 * S, counters=(tx(700),))
    second = beat(30 * S, "", counters=(tx(500), tx(40, "c2")))
    assert traffic(bill([FREE], [A], [beat(0), first, second])) == {0: 740}
    assert traffic(bill([FREE], [A], [beat(0), second, first])) == {0: 740}


def test_counters_of_two_copies_and_of_another_host() -> None:
    beats: list[Event] = [
        beat(0, "ab"),
        beat(30 * S, "ab", (tx(700), tx(40, copy="b"))),
        # Not on that host: nothing.
        beat(0, "ab", (tx(9_000), tx(9_000, copy="b")), host="h2"),
        beat(30 * S, "ab", (tx(9_000), tx(9_000, copy="b")), host="h2"),
    ]
    made = bill([FREE], [A, B], beats)
    assert traffic(made, "a") == {0: 700}
    assert traffic(made, "b") == {0: 40}


def test_counters_count_for_a_week_after_the_end() -> None:
    beats: list[Event] = [*sent((), (tx(100),)), CopyEnded(T + 60 * S, "a")]
    week = 7 * 24 * HOUR_US
    # In the hour in which they are heard, without any time of it.
    late = [*beats, beat(60 * S + week - 1, "", (tx(200),)), beat(60 * S + week, "", (tx(400),))]
    assert traffic(bill([FREE], [A], late)) == {0: 100, 168: 100}
    assert billed_us(late) == 30 * S


@pytest.mark.parametrize(
    ("at_us", "hour"), [(-1, -1), (0, 0), (1, 0), (HOUR_US - 1, 0), (HOUR_US, 1)]
)
def test_egress_is_of_the_hour_of_its_heartbeat(at_us: int, hour: int) -> None:
    # It ran from 8:00 on, so that there is room; on the full hour it is of the new hour.
    beats = [*hours_run(T - 2 * HOUR_US, 1), beat(at_us, "", (tx(700),))]
    assert traffic(bill([FREE], [A], beats)) == {hour: 700}


def test_a_window_with_egress_and_no_time() -> None:
    # Billed 9:59:30 to 10:00:00; the heartbeat of 10:00:00 says that 700 bytes were sent.
    made = bill([FREE], [A], [beat(-30 * S), beat(0, "", (tx(700),))])
    assert times(made) == {-1: 30 * S, 0: 0}
    assert traffic(made) == {0: 700}


ROOM = 3_750_000_000  # 30 s x 125 bytes per microsecond


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # Exactly at the cap, a byte less, a byte more: that byte never finds room.
        (ROOM - 1, {0: ROOM - 1}),
        (ROOM, {0: ROOM}),
        (ROOM + 1, {0: ROOM}),
    ],
)
def test_the_cap(value: int, expected: dict[int, int]) -> None:
    assert traffic(bill([FREE], [A], sent((), (tx(value),)))) == expected


def test_no_billed_time_no_egress_no_window() -> None:
    assert bill([FREE], [A], [beat(0, "", (tx(700),)), beat(30 * S, "")]) == Bill([], [])


def test_time_later_in_the_hour_gives_room_to_egress_before_it() -> None:
    # The bytes come at 0 with nothing billed yet; the hour as a whole has room for them.
    assert traffic(bill([FREE], [A], sent((tx(ROOM),), ()))) == {0: ROOM}


def test_what_exceeds_the_cap_is_billed_as_soon_as_there_is_room() -> None:
    # 9:59:30 to 10:00:00 billed, ROOM allowed; at 9:59:59 come 2.5 x ROOM (it runs on).
    # 10:00 to 11:00 not running. 11:00:00 to 11:00:30 billed: ROOM more.
    # 12:00:00 to 12:00:30 billed: the last half, and half of the room stays.
    # 13:00:00, stopped: 0.75 x ROOM more, of which that half finds room.
    # 14:00:00 to 14:00:30 billed: the last quarter.
    beats = [
        beat(-30 * S),
        beat(-1 * S, counters=(tx(5 * ROOM // 2),)),
        beat(0, ""),
    ]
    for hour in (1, 2):
        beats += [beat(hour * HOUR_US), beat(hour * HOUR_US + 30 * S, "")]
    beats += [beat(3 * HOUR_US, "", (tx(5 * ROOM // 2 + 3 * ROOM // 4),))]
    beats += [beat(4 * HOUR_US), beat(4 * HOUR_US + 30 * S, "")]
    made = bill([FREE], [A], beats)
    assert traffic(made) == {-1: ROOM, 1: ROOM, 2: ROOM // 2, 3: ROOM // 2, 4: ROOM // 4}
    assert times(made) == {-1: 30 * S, 1: 30 * S, 2: 30 * S, 3: 0, 4: 30 * S}


def test_pending_egress_is_billed_in_the_month_and_at_the_card_of_its_window() -> None:
    # 31 March 23:59:30 to midnight billed; 2 x ROOM reported at 23:59:59.
    # 1 April 0:00:00 to 0:00:30 billed, under a card that began there: the other ROOM.
    # 3.75 GB at 100 a GB are 375, at 200 a GB 750.
    march, april = utc(3, 31, 23), utc(4, 1)
    cards = [
        RateCard("old", None, march, 0, 0, 100, 0),
        RateCard("new", None, april, 0, 0, 200, 0),
    ]
    beats: list[Event] = [
        beat(april - T - 30 * S),
        beat(april - T - S, counters=(tx(2 * ROOM),)),
        beat(april - T),
        beat(april - T + 30 * S, ""),
    ]
    assert [
        (line.month, line.card, line.egress_bytes, line.egress_micros)
        for line in bill(cards, [A], beats).lines
    ] == [("2026-03", "old", ROOM, 375), ("2026-04", "new", ROOM, 750)]


def test_the_cap_is_of_each_copy() -> None:
    # a may send ROOM, b (60 s) 2 x ROOM; what a leaves pending is not billed to b.
    beats: list[Event] = [
        beat(0, "ab"),
        beat(30 * S, "b"),
        beat(60 * S, "", (tx(2 * ROOM), tx(2 * ROOM, copy="b"))),
    ]
    made = bill([FREE], [A, B], beats)
    assert traffic(made, "a") == {0: ROOM}
    assert traffic(made, "b") == {0: 2 * ROOM}


# ---- rule 5: rate cards ----


def card(name: str, customer: str | None, hour: int, price: int = 0, share: int = 0) -> RateCard:
    """A card valid from that many hours after T, with a price for the cpu only."""
    return RateCard(name, customer, T + hour * HOUR_US, price, 0, 0, share)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], None),
        ([card("g", None, 0)], "g"),
        # From exactly this hour on; not from the next.
        ([card("g", None, 1)], None),
        ([card("g0", None, -5), card("g1", None, -1), card("g2", None, 1)], "g1"),
        ([card("g1", None, -1), card("g0", None, -5)], "g1"),
        # The own card goes before a later general one.
        ([card("own", "kuma", -9), card("g", None, 0)], "own"),
        ([card("own0", "kuma", -9), card("own1", "kuma", -2), card("g", None, 0)], "own1"),
        # An own card that is not valid yet does not count, nor does another customer's.
        ([card("own", "kuma", 1), card("g", None, -3)], "g"),
        ([card("other", "boss", 0), card("g", None, -3)], "g"),
        ([card("other", "boss", 0)], None),
    ],
)
def test_which_card(cards: list[RateCard], expected: str | None) -> None:
    found = card_for(cards, "kuma", T)
    assert (None if found is None else found.card) == expected


def test_without_a_card_use_is_free_and_still_shown() -> None:
    # 10:00 to 12:00, the card begins at 11:00.
    made = bill([card("g", None, 1, price=7, share=PPM)], [A], hours_run(T, 2))
    assert made.windows == [
        Window("a", T, HOUR_US, 0, None, 0, 0, 0, 0),
        Window("a", T + HOUR_US, HOUR_US, 0, "g", 7, 0, 0, 7),
    ]
    assert [(line.card, line.billed_us, line.cpu_micros) for line in made.lines] == [
        (None, HOUR_US, 0),
        ("g", HOUR_US, 7),
    ]


def test_a_new_card_cuts_the_lines_at_its_hour() -> None:
    # 9:30 to 10:30 in one piece: half an hour at 10, half an hour at 30 an hour.
    cards = [card("old", None, -24, price=10), card("new", None, 0, price=30)]
    made = bill(cards, [A], [beat(-30 * MIN, interval_s=1200), beat(30 * MIN)])
    assert [(window.card, window.cpu_micros) for window in made.windows] == [
        ("old", 5),
        ("new", 15),
    ]


# ---- rule 6: charges ----


@pytest.mark.parametrize(
    ("cpu_milli", "memory_bytes", "billed", "sent_bytes", "expected"),
    [
        # Prices 3600, 7200, 50. One cpu and 1 GB for an hour and a GB sent.
        (1000, GB, HOUR_US, GB, (3600, 7200, 50)),
        # A second of one cpu is exactly 1, of 1 GB exactly 2; a microsecond less is a unit less.
        (1000, GB, S, 0, (1, 2, 0)),
        (1000, GB, S - 1, 0, (0, 1, 0)),
        # 250 milli: 4 s for 1. Half a GB: 1 s for 1.
        (250, GB // 2, 4 * S, 0, (1, 4, 0)),
        (250, GB // 2, 4 * S - 1, 0, (0, 3, 0)),
        # A fiftieth of a GB is exactly 1, a byte less is nothing.
        (0, 0, HOUR_US, GB // 50, (0, 0, 1)),
        (0, 0, HOUR_US, GB // 50 - 1, (0, 0, 0)),
        # Far beyond 64 bits: 10^6 cpus, 10^15 bytes for an hour.
        (10**9, 10**15, HOUR_US, 0, (3_600_000_000, 7_200_000_000, 0)),
    ],
)
def test_amounts(
    cpu_milli: int,
    memory_bytes: int,
    billed: int,
    sent_bytes: int,
    expected: tuple[int, int, int],
) -> None:
    copy = replace(A, cpu_milli=cpu_milli, memory_bytes=memory_bytes)
    # The bytes come just before the hour, so that the billed hour is still one window.
    beats = [
        beat(-2, "", (tx(sent_bytes),)),
        beat(0, interval_s=1200),
        beat(billed, "", interval_s=1200),
    ]
    (line,) = bill([RateCard("g", None, 0, 3600, 7200, 50, 0)], [copy], beats).lines
    assert (line.cpu_micros, line.memory_micros, line.egress_micros) == expected


def window_amounts(made: Bill) -> list[tuple[int, int]]:
    """Charge and share of each window."""
    return [
        (window.cpu_micros + window.memory_micros + window.egress_micros, window.share_micros)
        for window in made.windows
    ]


@pytest.mark.parametrize(
    ("cpu_milli", "price", "share", "expected"),
    [
        # Running 0.5, 1, 1.5, 2: 0, 1, 0, 1.
        (500, 1, 0, [(0, 0), (1, 0), (0, 0), (1, 0)]),
        # Running 0.333, 0.666, 0.999, 1.332: 0, 0, 0, 1.
        (333, 1, 0, [(0, 0), (0, 0), (0, 0), (1, 0)]),
        # Running 0.7, 1.4, 2.1, 2.8: 0, 1, 1, 0.
        (700, 1, 0, [(0, 0), (1, 0), (1, 0), (0, 0)]),
        # Charge 1, 2, 3, 4, half of it 0.5, 1, 1.5, 2.
        (1000, 1, 500_000, [(1, 0), (1, 1), (1, 0), (1, 1)]),
        # Charge 3, 6, 9, 12, 70 % of it 2.1, 4.2, 6.3, 8.4.
        (1000, 3, 700_000, [(3, 2), (3, 2), (3, 2), (3, 2)]),
        # Charge 3, 6, 9, 12, 90 % of it 2.7, 5.4, 8.1, 10.8.
        (1000, 3, 900_000, [(3, 2), (3, 3), (3, 3), (3, 2)]),
        # All of it, and of a million all but one.
        (1000, 3, PPM, [(3, 3), (3, 3), (3, 3), (3, 3)]),
        (1000, PPM, 999_999, [(PPM, PPM - 1)] * 4),
    ],
)
def test_windows_are_the_steps_of_the_running_totals(
    cpu_milli: int, price: int, share: int, expected: list[tuple[int, int]]
) -> None:
    copy = replace(A, cpu_milli=cpu_milli)
    made = bill([card("g", None, 0, price, share)], [copy], hours_run(T, 4))
    assert window_amounts(made) == expected


def test_the_three_amounts_are_rounded_each_and_the_share_of_their_sum_once() -> None:
    # An hour of half a cpu and half a GB at 3 each: 1.5 + 1.5, floors 1 + 1. 0.3 GB sent at 5:
    # 1.5, floor 1. Charge 3, half of it 1.5, share 1, fee 2.
    copy = replace(A, cpu_milli=500, memory_bytes=GB // 2)
    beats = [beat(0, counters=(tx(3 * GB // 10),), interval_s=1200), beat(HOUR_US, "")]
    (line,) = bill([RateCard("g", None, 0, 3, 3, 5, 500_000)], [copy], beats).lines
    assert (line.cpu_micros, line.memory_micros, line.egress_micros) == (1, 1, 1)
    assert (line.share_micros, line.fee_micros) == (1, 2)


def test_the_rest_of_a_month_does_not_go_into_the_next() -> None:
    # 31 March 22:00 to 1 April 3:00 at half a unit an hour: 0.5, 1 | 0.5, 1, 1.5.
    copy = replace(A, cpu_milli=500)
    made = bill([RateCard("g", None, 0, 1, 0, 0, 0)], [copy], hours_run(utc(3, 31, 22), 5))
    assert window_amounts(made) == [(0, 0), (1, 0), (0, 0), (1, 0), (0, 0)]
    assert [(line.month, line.billed_us, line.cpu_micros) for line in made.lines] == [
        ("2026-03", 2 * HOUR_US, 1),
        ("2026-04", 3 * HOUR_US, 1),
    ]


def test_the_rest_of_a_card_does_not_go_into_the_next() -> None:
    # Half a unit an hour under either card, an hour each: 0 and 0.
    copy = replace(A, cpu_milli=500)
    cards = [card("old", None, 0, 1), card("new", None, 1, 1)]
    assert window_amounts(bill(cards, [copy], hours_run(T, 2))) == [(0, 0), (0, 0)]


def test_the_rest_of_a_copy_does_not_go_into_another() -> None:
    # Two copies of one workload, half a unit each: 0 and 0.
    copies = [replace(A, cpu_milli=500), replace(B, cpu_milli=500)]
    made = bill([card("g", None, 0, 1)], copies, hours_run(T, 1, "ab"))
    assert window_amounts(made) == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("at_us", "month"),
    [
        (utc(4, 1) - 1, "2026-03"),
        (utc(4, 1), "2026-04"),
        (utc(1, 1) - HOUR_US, "2025-12"),
        (utc(1, 1), "2026-01"),
        # 2024 has a 29 February, 2026 has none.
        (utc(2, 28, 23) + HOUR_US, "2026-03"),
        (1_709_164_800 * S, "2024-02"),
        (1_709_251_199 * S, "2024-02"),
        (1_709_251_200 * S, "2024-03"),
        (0, "1970-01"),
    ],
)
def test_months(at_us: int, month: str) -> None:
    assert month_of(at_us) == month


# ---- rule 7: invoices and statements ----


def test_invoices_and_statements() -> None:
    # h1 of mole: a (kuma) 2 h, b (boss) 2 h; h2 of vole: c (kuma) 1 h. All 1 cpu, 1 GB.
    # kuma pays 10 + 3 an hour and 60 % goes to the provider; boss, of its own card, 5 + 0, 50 %.
    # a: 26, share 15.6 -> 15, fee 11. c: 13, share 7.8 -> 7, fee 6. b: 10, share 5, fee 5.
    cards = [
        RateCard("g", None, 0, 10, 3, 0, 600_000),
        RateCard("deal", "boss", 0, 5, 0, 0, 500_000),
    ]
    boss = replace(B, customer="boss", workload="db")
    far = replace(A, copy="c", host="h2", provider="vole")
    made = bill(cards, [far, boss, A], [*hours_run(T, 2, "ab"), *hours_run(T, 1, "c", "h2")])
    assert made.lines == [
        Line("2026-03", "kuma", "mole", "web", "a", "g", 2 * HOUR_US, 0, 20, 6, 0, 15, 11),
        Line("2026-03", "boss", "mole", "db", "b", "deal", 2 * HOUR_US, 0, 10, 0, 0, 5, 5),
        Line("2026-03", "kuma", "vole", "web", "c", "g", HOUR_US, 0, 10, 3, 0, 7, 6),
    ]
    assert [(window.copy, window.hour_us) for window in made.windows] == [
        ("a", T),
        ("a", T + HOUR_US),
        ("b", T),
        ("b", T + HOUR_US),
        ("c", T),
    ]
    # 26 + 13 and 10; 15 + 5 and 7; 11 + 6 + 5. 49 = 27 + 22.
    assert totals(made) == (
        {("kuma", "2026-03"): 39, ("boss", "2026-03"): 10},
        {("mole", "2026-03"): 20, ("vole", "2026-03"): 7},
        {"2026-03": 22},
    )


def test_totals_by_month() -> None:
    # 31 March 23:00 to 1 April 1:00 at 7 an hour, half of it 3.5 -> 3.
    made = bill([RateCard("g", None, 0, 7, 0, 0, 500_000)], [A], hours_run(utc(3, 31, 23), 2))
    assert totals(made) == (
        {("kuma", "2026-03"): 7, ("kuma", "2026-04"): 7},
        {("mole", "2026-03"): 3, ("mole", "2026-04"): 3},
        {"2026-03": 4, "2026-04": 4},
    )


def test_lines_without_a_card_come_first_and_are_totals_of_nothing() -> None:
    made = bill([card("g", None, 1)], [A], hours_run(T, 2))
    assert [line.card for line in made.lines] == [None, "g"]
    assert totals(made) == (
        {("kuma", "2026-03"): 0},
        {("mole", "2026-03"): 0},
        {"2026-03": 0},
    )


def test_nothing() -> None:
    assert bill([], [], []) == Bill([], [])
    assert bill([FREE], [A], []) == Bill([], [])
    assert totals(Bill()) == ({}, {}, {})


@pytest.mark.parametrize(
    ("cards", "copies"),
    [
        ([card("g", None, 0), card("g", None, 1)], []),
        ([card("g", None, 0), card("h", None, 0)], []),
        ([card("g", "kuma", 0), card("h", "kuma", 0)], []),
        ([replace(FREE, valid_from_us=T + 1)], []),
        ([replace(FREE, gb_hour_micros=-1)], []),
        ([replace(FREE, share_ppm=PPM + 1)], []),
        ([], [A, replace(A, host="h2")]),
        ([], [replace(A, cpu_milli=-1)]),
    ],
)
def test_input_that_is_refused(cards: list[RateCard], copies: list[Copy]) -> None:
    with pytest.raises(ValueError, match=r"card|cop"):
        bill(cards, copies, [])


# ---- the whole, against a second reading of the rules ----


CARDS = [
    RateCard("g0", None, utc(3, 1), 4_711, 1_303, 977, 700_000),
    RateCard("g1", None, utc(3, 31, 23), 5_003, 1_201, 1_009, 650_001),
    RateCard("own", "kuma", utc(4, 1, 1), 3_001, 907, 499, 333_333),
]
COPIES = [
    Copy("a", "web", "kuma", "h1", "mole", 250, 123_456_789, utc(3, 31, 20)),
    Copy("b", "web", "kuma", "h2", "vole", 250, 123_456_789),
    Copy("c", "db", "boss", "h1", "mole", 1_999, 2_000_000_001),
]


def random_log(seed: int) -> list[Event]:
    """Two hosts over the end of March: gaps, stops, boots, ends, counters that go astray."""
    rng = random.Random(seed)
    log: list[Event] = []
    for host in ("h1", "h2"):
        at_us, boots = utc(3, 31, 21) + rng.randrange(HOUR_US), [0]  # the bytes sent in each
        while at_us < utc(4, 1, 3):
            if rng.random() < 0.1:
                boots.append(0)
            boots[-1] += rng.choice([0, 0, 10**6, 10**9, 4 * 10**11])
            counters = []
            for copy in "abc":
                boot = rng.choice([len(boots) - 1, len(boots) - 1, rng.randrange(len(boots))])
                odd, sent = rng.choice([0, 0, 0, -1]), boots[boot] // rng.choice([1, 1, 2])
                if rng.random() < 0.5:
                    counters.append(Counter(copy, f"b{boot}", "c1", odd, 0, 0, sent))
            running = frozenset(copy for copy in "abc" if rng.random() < 0.8)
            beat = Heartbeat(
                at_us,
                host,
                rng.choice([30_000, 300_000]),
                rng.choice([running, running, None]),
                tuple(counters),
                f"b{len(boots) - 1}",
            )
            log.append(beat)
            to_the_hour = HOUR_US - at_us % HOUR_US
            at_us += rng.choice([to_the_hour, rng.randrange(1, 20 * MIN), 90 * S, 900 * S])
    if rng.random() < 0.5:
        log.append(CopyEnded(rng.choice(log).at_us + rng.choice([-1, 0, 1]), rng.choice("abc")))
    return log


def is_said_to_run(copy: str, beats: Sequence[Heartbeat]) -> bool:
    """By the last word of the last boot, of heartbeats in order."""
    of_boot = [said for said in beats if said.boot_id == beats[-1].boot_id]
    words = [said.running for said in of_boot if said.running is not None]
    return bool(words) and copy in words[-1]


def list_growth(copy: Copy, heard: dict[int, Heartbeat]) -> list[tuple[int, int, int]]:
    """When the greatest counters of a copy grew, since when they had not, and tx_bytes how much."""

    def best(until_us: int) -> dict[str, int]:
        said = [c for at_us in heard if at_us <= until_us for c in heard[at_us].counters]
        sound = [c for c in said if c.copy == copy.copy and c.cpu_ns >= 0]
        return {c.boot_id: max(d.tx_bytes for d in sound if d.boot_id == c.boot_id) for c in sound}

    found, since_us = [], copy.made_us
    for at_us in sorted(heard):
        old, new = best(at_us - 1), best(at_us)
        if old != new:
            found.append((at_us, since_us, sum(new.values()) - sum(old.values())))
            since_us = at_us
    return found


def possible_in(grown: Sequence[tuple[int, int, int]]) -> int:
    """The bytes of an hour's growth that 1 Gbit/s allows, and two minutes of it."""
    grown, had = [one for one in grown if one[2]], 0
    for at_us, since_us, added in grown:
        alone = min(added, 125 * (at_us - since_us + 120 * S))
        had = max(had, min(had + alone, 125 * (at_us - grown[0][1] + 120 * S)))
    return had


def second_reading(copy: Copy, log: Sequence[Event]) -> tuple[dict[int, int], dict[int, int]]:
    """Billed time and billed egress by hour, moment by moment between all cuts."""
    ends = [e.at_us for e in log if isinstance(e, CopyEnded) and e.copy == copy.copy]
    limit = min(ends, default=utc(5, 1))
    heard = {e.at_us: e for e in log if isinstance(e, Heartbeat) and e.host == copy.host}
    beats = {at_us: e for at_us, e in heard.items() if at_us <= limit}
    cuts = set(range(utc(3, 31, 20), utc(4, 1, 6), HOUR_US)) | beats.keys()
    cuts |= {at_us + 3000 * e.interval_ms for at_us, e in beats.items()}
    time: dict[int, int] = {}
    edges = sorted(cuts)
    for begin, end in pairwise(edges):
        before = [beats[at_us] for at_us in sorted(beats) if at_us <= begin]
        if not before or end > max(beats):
            continue
        seen_us = before[-1].at_us + 3000 * before[-1].interval_ms
        if is_said_to_run(copy.copy, before) and end <= seen_us:
            hour = begin - begin % HOUR_US
            time[hour] = time.get(hour, 0) + end - begin
    egress: dict[int, int] = {}
    before_sum = possible_sum = 0
    grown = list_growth(copy, heard)
    for hour in range(utc(3, 31, 20), utc(4, 1, 6), HOUR_US):
        possible_sum += possible_in([one for one in grown if hour <= one[0] < hour + HOUR_US])
        room = 125 * sum(us for at_us, us in time.items() if at_us <= hour)
        billed_sum = min(possible_sum, room)
        if billed_sum > before_sum:
            egress[hour] = billed_sum - before_sum
        before_sum = billed_sum
    return time, egress


@pytest.mark.parametrize("seed", range(40))
def test_a_second_reading_comes_to_the_same(seed: int) -> None:
    log = random_log(seed)
    made = bill(CARDS, COPIES, log)
    for copy in COPIES:
        windows = [window for window in made.windows if window.copy == copy.copy]
        time = {window.hour_us: window.billed_us for window in windows if window.billed_us}
        egress = {window.hour_us: window.egress_bytes for window in windows if window.egress_bytes}
        assert (time, egress) == second_reading(copy, log)


@pytest.mark.parametrize("seed", range(40))
def test_order_and_repeats_change_nothing(seed: int) -> None:
    log = random_log(seed)
    mixed = log + random.Random(seed).choices(log, k=20)
    random.Random(seed).shuffle(mixed)
    assert bill(CARDS[::-1], COPIES[::-1], mixed) == bill(CARDS, COPIES, log)


@pytest.mark.parametrize("seed", range(40))
def test_all_sums_agree(seed: int) -> None:
    made = bill(CARDS, COPIES, random_log(seed))
    assert made.lines
    for line in made.lines:
        parts = [
            window
            for window in made.windows
            if (window.copy, month_of(window.hour_us), window.card)
            == (line.copy, line.month, line.card)
        ]
        assert all(window.billed_us or window.egress_bytes for window in parts)
        assert all(0 <= window.billed_us <= HOUR_US for window in parts)
        assert sum(window.billed_us for window in parts) == line.billed_us
        assert sum(window.egress_bytes for window in parts) == line.egress_bytes
        assert sum(window.cpu_micros for window in parts) == line.cpu_micros
        assert sum(window.memory_micros for window in parts) == line.memory_micros
        assert sum(window.egress_micros for window in parts) == line.egress_micros
        assert sum(window.share_micros for window in parts) == line.share_micros
        assert all(0 <= share <= charge for charge, share in window_amounts(Bill(parts)))
    invoices, statements, fees = totals(made)
    for month, fee in fees.items():
        paid = sum(total for (_, of), total in invoices.items() if of == month)
        shares = sum(total for (_, of), total in statements.items() if of == month)
        assert paid == shares + fee
