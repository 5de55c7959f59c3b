"""Workloads' secrets: a customer's values, and where they are found on both machines.

The whole way with a real engine; what the control plane keeps and tells, with hosts by hand.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

import pytest

from tests.engine import REGISTRY, Engine
from tests.harness import WALLET, Agent, ControlPlane, make_netns, wait_for
from tests.integration.test_first_container import Fleet

CANARY = "canary-4d1f0c9be7"
SHOW = "cd /run/secrets; id -u; ls -ldn . *; cat db.key token; echo; touch x; sleep 1000"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make_netns() as netns:
        made = Engine(netns)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def fleet(
    make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent], engine: Engine
) -> Iterator[Fleet]:
    engine.clear()
    cp = make_cp(f"--registry={REGISTRY}")
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET))
    (agent.directory / "limits.conf").write_text("CPUS=2\nMEMORY=2G\n")
    made = Fleet(cp, agent, engine)
    made.start_agent()
    wait_for("online", lambda: [h for h in cp.hosts() if h["engine_version"]] or None)
    # The test's disk is not encrypted, and says so.
    cp.postgres.force(cp.database, "UPDATE hosts SET disk_encrypted = true")
    yield made
    cp.check_invariants()


def list_files(agent: Agent) -> dict[str, bytes]:
    """All secrets on the host, by assignment and name."""
    paths = [path for path in agent.secrets_dir.rglob("*") if path.is_file()]
    return {str(path.relative_to(agent.secrets_dir)): path.read_bytes() for path in paths}


def test_a_secret_is_a_file_of_its_workload_alone(fleet: Fleet) -> None:
    secrets = {"token": CANARY, "db.key": "ä\n", "empty": ""}
    workload = fleet.post(command=["/bin/sh", "-c", SHOW], secrets=secrets)
    other = fleet.post(name="other", command=["/bin/sh", "-c", "ls /run/secrets; sleep 1000"])
    assert (workload["secrets"], other["secrets"]) == (["db.key", "empty", "token"], [])
    found = fleet.tenant.wait(workload, "running")
    fleet.tenant.wait(other, "running")
    containers = {c["Config"]["Labels"]["openinfra.workload"]: c for c in fleet.running(2)}
    mine, others = (containers[each["workload_id"]] for each in (workload, other))

    def said() -> str:
        text = fleet.engine.logs(mine["Id"])
        return text if "Read-only" in text else ""

    lines = wait_for("its words", said)
    for line in (
        "65534\n",
        "drwxr-xr-x",
        *("-r--r--r--    1 65534    65534            3", "            0 "),
        *(f"{CANARY}\n", "ä\n", "touch: x: Read-only file system"),
    ):
        assert line in lines, lines
    name = found["assignments"][0]["assignment_id"]
    directory = fleet.agent.secrets_dir
    assert list_files(fleet.agent) == {f"{name}/{k}": v.encode() for k, v in secrets.items()}
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (directory, directory / name)]
    assert modes == [0o700, 0o755]
    (mount,) = mine["HostConfig"]["Mounts"]
    assert (mount["Source"], mount["ReadOnly"]) == (str(directory / name), True)
    assert (others["Mounts"], others["HostConfig"]["Binds"]) == ([], None)
    assert "No such file" in fleet.engine.logs(others["Id"])
