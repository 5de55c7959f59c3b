"""A hundred cuts of setup_luks2.py on a real machine, and how many the same command recovers from.

That is: a container that opens, a clean file system, and the data that was there. Takes an hour and
root. OPENINFRA_SEED repeats a sweep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench.conftest import Record
from tests.e2e.disk import cut_power, kill, prepare
from tests.e2e.image import ensure_image
from tests.e2e.vm import FAILED, Vm
from tests.harness import read_seed

CUTS = 50  # of each kind


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    """A machine with a blank disk; what it said is kept when the sweep ended early."""
    assert os.geteuid() == 0, "the machine's image holds files of many owners; run: sudo tests/run"
    made = Vm(ensure_image(), tmp_path / "home", "home")
    try:
        made.boot()
        prepare(made)
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize(("what", "cut"), [("kill -9", kill), ("power cuts", cut_power)])
def test_disk_cuts(
    vm: Vm,
    record: Record,
    capsys: pytest.CaptureFixture[str],
    what: str,
    cut: Callable[[Vm, int], Iterator[bool]],
) -> None:
    """Until there were enough that met a script at work; the first that fails ends the sweep."""
    seed, recovered, failed = read_seed(), 0, 0
    with capsys.disabled():
        print(f"\n{what}: OPENINFRA_SEED={seed}", flush=True)
    try:
        for still_ran in cut(vm, seed):
            recovered += still_ran
            with capsys.disabled():
                print("." if still_ran else "-", end="", flush=True)
            if recovered == CUTS:
                break
    except AssertionError:
        failed = 1
        vm.save_state(FAILED / "disk_cuts")
        raise
    finally:
        record(f"{what} at the steps of setup_luks2.py: recovered from", recovered, "cuts", None)
        record(f"{what} at the steps of setup_luks2.py: not recovered from", failed, "cuts", 0)
