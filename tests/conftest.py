"""Fixtures: a PostgreSQL for the session, control planes and agents for a test."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import Engine, running_engine
from tests.harness import (
    Agent,
    ControlPlane,
    Netns,
    Postgres,
    RpcTool,
    make_netns,
    read_seed,
    serving,
)

# What it asserts is shown like a test's own.
pytest.register_assert_rewrite("tests.faults")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A container engine with a registry, for one file of tests."""
    with running_engine() as made:
        yield made


def make_postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster; its directory is one that PostgreSQL's user can reach."""
    root = Path(tempfile.mkdtemp(prefix="oi-pg-", dir="/tmp"))
    root.chmod(0o711)
    cluster = Postgres(root / "cluster")
    try:
        yield cluster
    finally:
        cluster.stop(signal.SIGQUIT)
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The cluster of almost all tests."""
    yield from make_postgres()


@pytest.fixture(scope="session")
def stoppable_postgres() -> Iterator[Postgres]:
    """The cluster behind `spare_postgres`."""
    yield from make_postgres()


@pytest.fixture
def spare_postgres(stoppable_postgres: Postgres) -> Postgres:
    """A cluster that tests stop; it runs again for the next one, also when this one failed."""
    child = stoppable_postgres.child
    if child is None or child.poll() is not None:
        stoppable_postgres.start()
    return stoppable_postgres


@pytest.fixture
def seed() -> str:
    """Where the random choices of a test come from; the environment repeats them."""
    return str(read_seed())


@pytest.fixture(scope="module")
def tunnel_cp(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane in a namespace, for the tests of one file."""
    directory = tmp_path_factory.mktemp("cp")
    with make_netns() as netns, serving(postgres, directory, netns=netns) as made:
        yield made


@pytest.fixture(scope="module")
def tool(tunnel_cp: ControlPlane) -> Iterator[RpcTool]:
    """The process that makes the calls inside the namespace."""
    assert tunnel_cp.netns
    made = RpcTool(tunnel_cp.netns)
    yield made
    made.close()


@pytest.fixture
def make_cp(postgres: Postgres, tmp_path: Path) -> Iterator[Callable[..., ControlPlane]]:
    """Makes control planes that end with the test; each on a fresh database."""
    made: list[ControlPlane] = []

    def make(*flags: str, start: bool = True, **more: Any) -> ControlPlane:
        on = more.pop("postgres", postgres)
        cp = ControlPlane(on, tmp_path / f"cp{len(made)}", *flags, **more)
        made.append(cp)
        if start:
            cp.start()
        return cp

    yield make
    for cp in made:
        if cp.process:
            cp.stop(signal.SIGKILL)
        assert "Traceback" not in cp.log, cp.log


@pytest.fixture
def cp(make_cp: Callable[..., ControlPlane]) -> ControlPlane:
    """A control plane with heartbeats each second and no tunnel."""
    return make_cp("--heartbeat-s=1")


@pytest.fixture
def netns() -> Iterator[Netns]:
    """A network namespace where 10.77.0.0/16 is local."""
    with make_netns() as made:
        yield made


@pytest.fixture
def make_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Makes agents that end with the test."""
    made: list[Agent] = []

    def make(control_plane: str, token: str, **more: Any) -> Agent:
        agent = Agent(tmp_path / f"agent{len(made)}", control_plane, token, **more)
        made.append(agent)
        return agent

    yield make
    for agent in made:
        if agent.started:
            agent.process.stop(signal.SIGKILL)
            assert "Traceback" not in agent.log, agent.log
