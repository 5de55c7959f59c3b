"""Fixtures: machines that end with the test, most of them restored from one booted snapshot.

When a test fails, what each of its machines said is kept in a directory under tests/e2e/failed, or
under the one that OPENINFRA_E2E_FAILED names.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import ensure_home
from tests.e2e.image import Image, ensure_image
from tests.e2e.network import Network
from tests.e2e.vm import FAILED, Snapshot, Vm, ensure_booted
from tests.e2e.vps import Vps, ensure_vps

FAILED_PHASES = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remember which phases of a test failed, for its fixtures to see."""
    report = yield
    if report.failed:
        item.stash.setdefault(FAILED_PHASES, []).append(report.when)
    return report


@pytest.fixture(scope="session")
def image() -> Image:
    """What all machines boot from."""
    return ensure_image()


@pytest.fixture(scope="session")
def snapshot(image: Image) -> Snapshot:
    """A machine right after its boot."""
    return ensure_booted(image)


@pytest.fixture(scope="session")
def home(image: Image, snapshot: Snapshot) -> Snapshot:
    """A home machine with its encrypted disk."""
    return ensure_home(image, snapshot)


@pytest.fixture(scope="session")
def vps(image: Image) -> Vps:
    """A control plane, set up once."""
    return ensure_vps(image)


@pytest.fixture
def make_vm(
    request: pytest.FixtureRequest, image: Image, tmp_path: Path
) -> Iterator[Callable[..., Vm]]:
    """Makes machines that end with the test: `make_vm("host1")` is up in 3 s, from the snapshot.

    `make_vm("host1", cold=True, tpm=True, memory_mb=2048)` is off, with an empty past.
    """
    made: list[Vm] = []
    failed = FAILED / re.sub(r"[^\w.-]+", "-", f"{request.node.path.stem}.{request.node.name}")
    shutil.rmtree(failed, ignore_errors=True)

    def make(name: str, *, cold: bool = False, snapshot: Snapshot | None = None, **more: Any) -> Vm:
        if not cold:
            snapshot = snapshot or request.getfixturevalue("snapshot")
            more = {"memory_mb": snapshot.memory_mb, "cpus": snapshot.cpus, **more}
        vm = Vm(image, tmp_path / name, name, **more)
        made.append(vm)
        if snapshot:
            vm.restore(snapshot)
        return vm

    yield make
    if FAILED_PHASES in request.node.stash:
        for vm in made:
            vm.save_state(failed / vm.name)
        print(f"what the machines said is in {failed}")
    for vm in made:
        vm.stop()
        shutil.rmtree(vm.directory)


@pytest.fixture
def network() -> Iterator[Network]:
    """A private network without machines."""
    made = Network()
    yield made
    made.close()
