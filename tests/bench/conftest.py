"""Figures: each is one line on the screen, has its bound, and may be written into README.md.

tests/run --bench                        measures
tests/run --bench -- -k heartbeats       only these
tests/run --bench -- --write-figures     measures, and writes the table in README.md
tests/run --bench -- --json FILE         measures, and writes the figures as JSON
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.readme_tables import ROOT


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and the most that it may be; None when it is only to compare with."""

    name: str
    value: float
    unit: str
    at_most: float | None

    def __str__(self) -> str:
        bound = "" if self.at_most is None else f" (at most {self.at_most:g})"
        return f"figure {self.name}: {self.value:.3g} {self.unit}{bound}"

    def row(self) -> str:
        """As a row of the table in README.md."""
        bound = "" if self.at_most is None else f"{self.at_most:g} {self.unit}"
        return f"| {self.name} | {self.value:.3g} {self.unit} | {bound} |"


Record = Callable[[str, float, str, float | None], None]
FIGURES: list[Figure] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-figures", action="store_true", help="write them into README.md")
    parser.addoption("--json", help="write them into this file")


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Iterator[Record]:
    """Notes a figure, prints it, and fails the test at its end when a bound is broken."""
    made: list[Figure] = []

    def note(name: str, value: float, unit: str, at_most: float | None) -> None:
        figure = Figure(name, round(value, 4), unit, at_most)
        made.append(figure)
        FIGURES.append(figure)
        with capsys.disabled():
            print(f"\n{figure}", end="", flush=True)

    yield note
    for figure in made:
        assert figure.at_most is None or figure.value <= figure.at_most, str(figure)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the figures where they were asked for."""
    target = session.config.getoption("--json")
    if target:
        rows = [dataclasses.asdict(figure) for figure in FIGURES]
        Path(target).write_text(json.dumps(rows, indent=1) + "\n")
    if session.config.getoption("--write-figures") and FIGURES:
        readme = ROOT / "README.md"
        readme.write_text(insert_figures(readme.read_text(), FIGURES))


def insert_figures(readme: str, figures: Sequence[Figure]) -> str:
    """README.md with these figures; rows of benchmarks that did not run now stay."""
    begin, end = "<!-- table: figures -->\n", "\n<!-- end: figures -->"
    before, _, rest = readme.partition(begin)
    table, _, after = ("\n" + rest).partition(end)
    rows = {line.split(" | ")[0]: line for line in table.splitlines() if line.startswith("| ")}
    rows.pop("| figure", None)
    for figure in figures:
        rows[f"| {figure.name}"] = figure.row()
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.",
        "",
        "| figure | measured | at most |",
        "|---|---|---|",
        *rows.values(),
    ]
    return before + begin + "\n".join(lines) + end + after
