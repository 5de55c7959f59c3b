"""Secrets on their way into a container, with a real engine: files in memory, and nowhere else."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import REGISTRY, Engine
from tests.harness import WALLET, Agent, ControlPlane, Postgres, wait_for
from tests.integration.test_first_container import Fleet

CANARY = "canary-4d1f0c9be7"
SHOW = "cd /run/secrets; id -u; ls -ldn . *; cat db.key token; echo; touch x; sleep 1000"


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
    cp.wait_assignable()
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


def test_new_values_roll_and_the_old_ones_go(fleet: Fleet) -> None:
    command = ["/bin/sh", "-c", "cat /run/secrets/token; echo; sleep 1000"]
    workload = fleet.post(command=command, replicas=2, secrets={"token": f"{CANARY}-old"})
    fleet.tenant.wait(workload, "running")
    before = {each["Id"] for each in fleet.running(2)}
    assert sorted({*list_files(fleet.agent).values()}) == [f"{CANARY}-old".encode()]
    fleet.post(200, command=command, replicas=2, secrets={"token": f"{CANARY}-new"})
    time.sleep(2)
    assert len(before & {each["Id"] for each in fleet.engine.containers().values()}) == 1
    files = wait_for("both", lambda: [b for b in list_files(fleet.agent).values() if b"new" in b])
    assert len(files) <= 2

    def are_new() -> bool:
        found = fleet.engine.containers().values()
        is_new = len(found) == 2 and not before & {each["Id"] for each in found}
        return is_new and all(f"{CANARY}-new" in fleet.engine.logs(each["Id"]) for each in found)

    wait_for("both are new", are_new, 60)
    wait_for("old files go", lambda: {*list_files(fleet.agent).values()} == {files[0]} or None)
    # The same again, and one that says nothing of secrets, restart nobody.
    ids = {each["Id"] for each in fleet.running(2)}
    more: dict[str, Any]
    for more in ({"secrets": {"token": f"{CANARY}-new"}}, {}):
        fleet.post(200, command=command, replicas=2, **more)
    time.sleep(3)
    assert {each["Id"] for each in fleet.running(2)} == ids
    fleet.tenant.call("DELETE", f"/{workload['workload_id']}")
    fleet.gone()
    wait_for("no file", lambda: not [*fleet.agent.secrets_dir.iterdir()] or None)


@pytest.fixture
def loud_postgres() -> Iterator[Postgres]:
    """A PostgreSQL that logs as much as it can."""
    root = Path(tempfile.mkdtemp(prefix="oi-pg-", dir="/tmp"))
    root.chmod(0o711)
    cluster = Postgres(root / "cluster")
    cluster.stop()
    for setting in (
        *("log_statement=all", "log_parameter_max_length_on_error=-1", "log_min_messages=debug5"),
        *("log_min_duration_statement=0", "log_connections=on", "debug_print_plan=on"),
        *("debug_print_parse=on", "session_preload_libraries=auto_explain"),
        *("auto_explain.log_min_duration=0", "auto_explain.log_nested_statements=on"),
        "auto_explain.log_verbose=on",
    ):
        cluster.settings += ["-c", setting]
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop(signal.SIGQUIT)
        shutil.rmtree(root)


def spell(text: str) -> list[bytes]:
    """A text as it is found in logs, arguments and dumps."""
    raw = text.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw)[:-4], raw[::-1]]


def list_processes() -> dict[str, bytes]:
    """Arguments and environment of all that runs here but this test."""
    found = {}
    for pid in [
        each for each in os.listdir("/proc") if each.isdigit() and each != str(os.getpid())
    ]:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                found[f"/proc/{pid}/{name}"] = Path("/proc", pid, name).read_bytes()
    return found


def read_tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    found = {}
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                found[str(path)] = path.read_bytes()
    return found


def post_badly(fleet: Fleet) -> list[Any]:
    """The answers to what is no order and has the canary in it."""
    answers: list[Any] = []
    for body in (
        {"secrets": {"a/b": CANARY}},
        {"secrets": {"a": CANARY * 2000}},
        {"secrets": {"a": [CANARY]}},
        {"secrets": [CANARY]},
        {"secrets": CANARY},
        {"secrets": {"a": CANARY + "\ud800"}},
        {"secrets": {"a": CANARY}, "image": "no/such@sha256:" + "0" * 64},
        {"secrets": {"a": CANARY}, "cpu_milli": -1},
    ):
        answers += [fleet.tenant.call("POST", "", fleet.tenant.order(**body))]
    for raw in (b'{"secrets": {"a": "' + CANARY.encode(), b"secrets=" + CANARY.encode()):
        answers += [fleet.cp.call("POST", "/api/v1/workloads", raw=raw, token=fleet.tenant.key)]
    assert all(status >= 400 for status, _ in answers)
    return answers


def ask_all(fleet: Fleet) -> list[Any]:
    """What the API and the commands of both machines say."""
    cp, agent = fleet.cp, fleet.agent
    answers: list[Any] = [fleet.tenant.call("GET")]
    for path in ("workloads", "audit-log", "hosts", "customers", "host-invites"):
        answers += [cp.call("GET", f"/api/v1/admin/{path}")]
    answers += [cp.call("GET", path) for path in ("/metrics", "/api/v1/openapi.json")]
    answers += [cp.command(*words.split()).stdout for words in ("workloads --json", "doctor")]
    answers += [agent.run_command(*words.split()).stdout for words in ("status --json", "doctor")]
    return answers


def test_a_secret_is_found_nowhere_else(
    loud_postgres: Postgres,
    make_cp: Callable[..., ControlPlane],
    make_agent: Callable[..., Agent],
    engine: Engine,
    tmp_path: Path,
) -> None:
    """A canary is looked for in logs, arguments, environments, dumps and all answers."""
    engine.clear()
    cp = make_cp(f"--registry={REGISTRY}", start=False, postgres=loud_postgres)
    cp.start()
    key = cp.secrets_key_file.read_text()
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET))
    agent.limits_file.write_text("CPUS=2\nMEMORY=2G\n")
    fleet = Fleet(cp, agent, engine)
    fleet.start_agent()
    cp.wait_assignable()
    cp.postgres.force(cp.database, "UPDATE hosts SET disk_encrypted = true")
    command = ["/bin/sh", "-c", "test -s /run/secrets/token && echo read; sleep 1000"]
    secrets = {"token": CANARY}
    workload = fleet.post(command=command, secrets=secrets)
    answers: list[Any] = [workload]
    fleet.tenant.wait(workload, "running")
    (container,) = fleet.running()
    wait_for("it reads", lambda: "read" in engine.logs(container["Id"]))
    name = fleet.tenant.get(workload)["assignments"][0]["assignment_id"]
    answers += [fleet.post(200, command=command, secrets=secrets), *post_badly(fleet)]
    # A statement with secrets that fails in PostgreSQL.
    loud_postgres.execute(cp.database, "ALTER TABLE workload_secrets ADD CHECK (revision < 2)")
    changed = {**fleet.tenant.order(), "image": fleet.image, "secrets": {"token": CANARY + "2"}}
    failed = fleet.tenant.call("POST", "", changed)
    assert failed[0] >= 500, failed
    answers += [failed]
    answers += ask_all(fleet)
    dump = subprocess.run(
        [loud_postgres.binaries / "pg_dump", cp.postgres.dsn(cp.database)],
        check=True,
        capture_output=True,
    ).stdout
    assert b"workload_secrets" in dump
    places = {
        "answers": json.dumps(answers, default=str).encode(),
        "dump": dump,
        "inspect": json.dumps(engine.containers("")).encode(),
        "dockerd's log": engine.dockerd.log.encode(),
        "PostgreSQL's log": (loud_postgres.directory.parent / "postgres.log").read_bytes(),
        **list_processes(),
        **read_tree(loud_postgres.directory / "data"),
        **read_tree(tmp_path),
        **read_tree(engine.directory / "root" / "100000.100000" / "containers"),
    }
    for where, content in places.items():
        for word in spell(CANARY):
            assert word not in content, where
        if where != str(cp.secrets_key_file):
            assert all(word not in content for word in spell(key)), where
    assert b"COPY workload_secrets" in places["PostgreSQL's log"]
    assert list_files(agent) == {f"{name}/token": CANARY.encode()}
    (cp.directory / "cp.log").write_bytes(b"")  # the fault above has a traceback, without values
