"""Many machines redeem few invites while PostgreSQL and the control plane break (small sizes).

The full size is in tests/bench/test_register_race.py. OPENINFRA_SEED repeats a run's plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Netns, Postgres
from tests.register_race import LOSE, Race, Size, racing

SMALL = Size(invites=40, racers=10, at_once=20, postgres_stops=3, cp_kills=1)
ONE_INVITE = Size(invites=1, racers=1_000, at_once=1, lose=0)


@pytest.fixture
def race(spare_postgres: Postgres, netns: Netns, tmp_path: Path) -> Iterator[Race]:
    """A race on the cluster that may be stopped."""
    with racing(spare_postgres, tmp_path, netns) as made:
        yield made


def test_the_register_race(race: Race) -> None:
    race.start_cp(f"kill@{race.dice.randint(2, 9)}")
    race.line_up(SMALL)
    race.run(SMALL)
    race.check()
    lost, replies = race.count_lost()
    assert 0.7 * LOSE < 100 * lost / replies < 1.3 * LOSE


def test_a_thousand_redeem_one_invite_at_one_time(race: Race) -> None:
    race.start_cp()
    race.line_up(ONE_INVITE)
    race.run(ONE_INVITE)
    answers = race.answers.values()
    # Each had sent its request before the first of them was answered.
    assert max(answer.began for answer in answers) < min(answer.ended for answer in answers)
    race.check()
