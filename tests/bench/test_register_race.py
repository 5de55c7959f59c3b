"""The register race at its full size; see tests/register_race.py for what it is."""

from __future__ import annotations

import time
from pathlib import Path

from tests.bench.conftest import Record
from tests.harness import Netns, Postgres
from tests.register_race import LOSE, Size, racing

FULL = Size(invites=400, racers=30, at_once=20, postgres_stops=12, cp_kills=3, deadline_s=900)


def test_the_register_race(
    spare_postgres: Postgres, netns: Netns, tmp_path: Path, record: Record
) -> None:
    with racing(spare_postgres, tmp_path, netns) as race:
        race.start_cp(f"kill@{race.dice.randint(2, 9)}")
        race.line_up(FULL)
        began = time.monotonic()
        race.run(FULL)
        took_s = time.monotonic() - began
        race.check()
        lost, replies = race.count_lost()
    assert 0.9 * LOSE < 100 * lost / replies < 1.1 * LOSE
    record("register race: 12,000 racers, 400 invites, 12 crashes of PostgreSQL", took_s, "s", 240)
