"""Workloads' secrets in the control plane: kept encrypted, told to those that may have them.

Hosts are by hand.
"""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import cp_server
from proto import openinfra_pb2 as pb
from tests.harness import ControlPlane, facts, wait_for
from tests.integration.test_workloads import REGISTRY, Machine, Tenant, cp, tenant, wait_placed

__all__ = ["cp", "tenant"]  # fixtures
LOST = cp_server.SECRETS_LOST
OLD: dict[str, Any] = {"takes_secrets": False}


def list_sealed(cp: ControlPlane) -> list[int]:
    """The revisions of which secrets are kept."""
    rows = cp.query("SELECT revision FROM workload_secrets ORDER BY workload_no, revision")
    return [row["revision"] for row in rows]


def wait_sealed(cp: ControlPlane, *revisions: int) -> None:
    wait_for(
        f"secrets of {revisions}, not {list_sealed(cp)}",
        lambda: list_sealed(cp) == [*revisions] or None,
        15,
    )


def wait_list(machine: Machine, count: int) -> list[pb.Assignment]:
    """Beat until the list has so many assignments."""
    return wait_for(
        f"{count} assignments",
        lambda: ([*machine.beat().values()], 1) if len(machine.beat()) == count else None,
    )[0]


def test_who_may_have_a_secret_gets_it_and_nobody_is_shown_it(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post(secrets={"b": "hunter2", "a": "ä"})
    assert workload["secrets"] == ["a", "b"]
    wait_placed(tenant, workload)
    (assignment,) = machine.beat().values()
    assert dict(assignment.secrets) == {"a": "ä".encode(), "b": b"hunter2"}
    (row,) = cp.query("SELECT sealed, key_sha256 FROM workload_secrets")
    assert b"hunter2" not in row["sealed"]
    assert row["key_sha256"] == cp_server.sha256(cp.secrets_key_file.read_bytes())
    _, shown = tenant.call("GET")
    _, all_shown = cp.call("GET", "/api/v1/admin/workloads")
    _, audit = cp.call("GET", "/api/v1/admin/audit-log")
    by_cli = cp.command("workloads", "--json").stdout
    for text in (json.dumps([shown, all_shown, audit]), by_cli, cp.log):
        assert "hunter2" not in text
    (entry,) = [one for one in audit["entries"] if one["action"] == "workload.add"]
    assert entry["detail"]["secrets"] == ["a", "b"]
    assert shown["workloads"][0]["secrets"] == ["a", "b"]


def test_the_same_secrets_change_nothing_and_others_are_a_revision(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    first = tenant.post(secrets={"a": "1"})
    wait_placed(tenant, first)
    machine.obey()
    before = cp.query("SELECT xmin::text, * FROM workload_secrets")
    assert tenant.post(200, secrets={"a": "1"})["changed_at"] == first["changed_at"]
    # Absent: they stay, also when something else changes.
    assert tenant.post(200)["changed_at"] == first["changed_at"]
    assert tenant.post(200, replicas=2)["revision"] == 1
    assert cp.query("SELECT xmin::text, * FROM workload_secrets") == before
    kept = tenant.post(200, cpu_milli=400)
    assert (kept["revision"], kept["secrets"], list_sealed(cp)) == (2, ["a"], [1])
    assert tenant.post(200, cpu_milli=400, secrets={"a": "2"})["revision"] == 3
    assert tenant.post(200, cpu_milli=400, secrets={"b": "2"})["revision"] == 4
    assert tenant.post(200, cpu_milli=400, secrets={"b": "2", "c": ""})["revision"] == 5
    gone = tenant.post(200, cpu_milli=400, secrets={})
    assert (gone["revision"], gone["secrets"]) == (6, [])
    assert tenant.post(200, cpu_milli=400)["secrets"] == []
    assert tenant.post(200, cpu_milli=400, secrets={"b": "2", "c": ""})["revision"] == 7


def test_each_copy_keeps_the_values_of_its_revision_until_it_ends(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post(replicas=2, secrets={"a": "old"})
    wait_placed(tenant, workload, 2)
    machine.obey()
    tenant.post(200, replicas=2, cpu_milli=400)  # a revision with the same
    tenant.post(200, replicas=2, cpu_milli=400, secrets={"a": "new"})

    def obey() -> dict[str, int]:
        cp.postgres.force(
            cp.database,
            "UPDATE assignments SET state_at = state_at - interval '10 s'"
            " WHERE state = 'running' AND ended_at IS NULL",
        )
        values = [dict(each.secrets)["a"].decode() for each in machine.obey().values()]
        seen.append(sorted(values))
        return {value: values.count(value) for value in values}

    seen: list[list[str]] = []
    wait_for("both are new", lambda: obey() == {"new": 2} or None, 30)
    assert ["new", "old"] in seen
    assert all(value in ("old", "new") for values in seen for value in values)
    wait_sealed(cp, 3)
    tenant.call("DELETE", f"/{workload['workload_id']}")
    assert list_sealed(cp) == [3]  # its copies have not ended
    tenant.wait(workload, "deleting")
    wait_for("deleted", lambda: not machine.obey() or None)
    tenant.wait(workload, "deleted")
    wait_sealed(cp)


@pytest.mark.parametrize(
    "changes", [{"disk_encrypted": False}, OLD], ids=["unencrypted", "old agent"]
)
def test_a_host_that_may_not_have_secrets_gets_none(
    cp: ControlPlane, tenant: Tenant, changes: dict[str, Any]
) -> None:
    machine = Machine(cp, **changes)
    machine.beat()
    workload = tenant.post(secrets={"a": "hunter2"})
    plain = tenant.post(name="plain")
    wait_placed(tenant, plain)
    said = "for its secrets an encrypted disk and a new agent"
    wait_for("why", lambda: said in str(tenant.get(workload)["reasons"]))
    assert [one.workload_id for one in machine.obey().values()] == [plain["workload_id"]]
    # One that may, and then may not any more: the list is without it in the same heartbeat.
    reply = machine.heartbeat(facts=facts(), desired_revision=machine.revision)
    wait_placed(tenant, workload)
    assert len(wait_list(machine, 2)) == 2
    reply = machine.heartbeat(facts=facts(**changes), desired_revision=0)
    assert [one.workload_id for one in reply.desired.assignments] == [plain["workload_id"]]
    assert "hunter2" not in str(reply)

    def probe() -> bool:
        machine.obey()
        past = tenant.get(workload)["assignments"]
        return [each["reason"] for each in past] == ["its host takes no secrets any more"]

    wait_for("stopped", probe)


def test_without_a_key_secrets_are_refused_and_all_else_works(
    make_cp: Callable[..., ControlPlane],
) -> None:
    cp = make_cp(f"--registry={REGISTRY}", start=False)
    cp.secrets_key_file.unlink()
    cp.start()
    tenant = Tenant(cp)
    status, answer = tenant.call("POST", "", tenant.order(secrets={"a": "hunter2"}))
    assert (status, answer["error"]["field"]) == (409, "secrets")
    assert "no key" in answer["error"]["message"]
    tenant.post(secrets={})
    assert cp.command("doctor").returncode == 0
    cp.secrets_key_file.write_text("\n")
    cp.secrets_key_file.chmod(0o600)
    assert cp.command("doctor").returncode == 0
    cp.stop()
    for text, mode, said in (
        ("0" * 63, 0o600, "is not one line of 64 hex digits"),
        ("0" * 64, 0o644, "can be read by others"),
    ):
        cp.secrets_key_file.write_text(text)
        cp.secrets_key_file.chmod(mode)
        for command in ("doctor", "serve"):
            done = cp.command(command)
            assert done.returncode != 0
            assert said in done.stdout + done.stderr
            assert text not in done.stdout + done.stderr


def test_with_another_key_what_runs_goes_on_and_nothing_else_is_placed(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post(replicas=2, secrets={"a": "hunter2"})
    plain = tenant.post(name="plain", replicas=1)
    wait_placed(tenant, workload, 2)
    wait_placed(tenant, plain)
    assert len(machine.obey()) == 3
    right = cp.secrets_key_file.read_bytes()
    cp_server.write_file(cp.secrets_key_file, secrets.token_hex(32).encode(), 0o600)
    cp.stop(signal.SIGKILL)
    cp.start()
    # The host hears at once that they are withheld, and what it has stays.
    wanted = {each.workload_id: each for each in machine.obey().values()}
    held = wanted[workload["workload_id"]]
    assert (dict(held.secrets), held.secrets_withheld) == ({}, True)
    assert not wanted[plain["workload_id"]].secrets_withheld
    found = tenant.get(workload)
    assert (found["state"], found["reasons"]) == ("running", [LOST])
    assert tenant.get(plain)["reasons"] == []
    # No place for another one, nor for a new revision; others are served.
    tenant.post(200, replicas=3)
    tenant.post(200, replicas=3, cpu_milli=400)
    tenant.post(200, name="plain", replicas=2)
    wait_placed(tenant, plain, 2)
    reasons = wait_for("why", lambda: [r for r in tenant.get(workload)["reasons"] if "2:" in r])
    assert reasons == [f"replica 2: {LOST}"]
    live = [each for each in tenant.get(workload)["assignments"] if each["ended_at"] is None]
    assert [each["revision"] for each in live] == [1, 1]
    done = cp.command("doctor")
    assert done.returncode == 1
    assert "the secrets of 1 workloads cannot be read with" in done.stdout
    # The same POST heals it.
    healed = tenant.post(200, replicas=3, cpu_milli=400, secrets={"a": "hunter2"})
    assert healed["revision"] == 3
    assert LOST not in healed["reasons"]
    wait_placed(tenant, workload, 3)
    assert b"hunter2" in [dict(each.secrets).get("a") for each in machine.obey().values()]
    assert cp.command("doctor").returncode == 0
    other = cp.secrets_key_file.read_bytes()
    cp_server.write_file(cp.secrets_key_file, right, 0o600)
    assert cp.command("doctor").returncode == 1
    cp_server.write_file(cp.secrets_key_file, other, 0o600)


def test_the_key_that_comes_back_brings_the_secrets(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post(secrets={"a": "hunter2"})
    wait_placed(tenant, workload)
    machine.obey()
    revision = machine.revision
    cp.stop()
    cp.start()
    machine.beat()
    assert machine.revision == revision  # the same key is no news
    kept = cp.secrets_key_file.rename(cp.secrets_key_file.with_suffix(".kept"))
    for is_there in (False, True):
        if is_there:
            kept.rename(cp.secrets_key_file)
        cp.stop()
        cp.start()
        (held,) = machine.beat().values()
        assert (dict(held.secrets), held.secrets_withheld) == (
            {"a": b"hunter2"} if is_there else {},
            not is_there,
        )
    assert tenant.get(workload)["reasons"] == []


def test_damaged_secrets_are_withheld_and_harm_nobody(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload, plain = tenant.post(secrets={"a": "hunter2"}), tenant.post(name="plain")
    wait_placed(tenant, workload)
    wait_placed(tenant, plain)
    for sealed in ("overlay(sealed placing '\\x00' from 60)", "'\\x'", "'\\xff'"):
        cp.postgres.force(cp.database, f"UPDATE workload_secrets SET sealed = {sealed}")  # noqa: S608
        reply = machine.heartbeat(desired_revision=0)
        withheld = {one.workload_id: one.secrets_withheld for one in reply.desired.assignments}
        assert withheld == {workload["workload_id"]: True, plain["workload_id"]: False}
    assert tenant.post(200, secrets={"a": "hunter2"})["revision"] == 2


def test_the_control_planes_role_can_neither_change_nor_delete_them(
    cp: ControlPlane, tenant: Tenant
) -> None:
    tenant.post(secrets={"a": "hunter2"})
    dsn = cp.postgres.dsn(cp.database, "openinfra")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for sql in (
            "UPDATE workload_secrets SET revision = 9",
            "UPDATE workload_secrets SET sealed = ''",
            "DELETE FROM workload_secrets",
            "TRUNCATE workload_secrets",
            "INSERT INTO workload_secrets VALUES (1, 1, '', '')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.encode())
        assert connection.execute("SELECT prune_secrets()").fetchone() == (0,)
        # Without a key nothing is stored as it comes.
        with pytest.raises(psycopg.errors.UndefinedObject, match="secrets_key"):
            connection.execute(
                "INSERT INTO workload_secrets (workload_no, revision, sealed) VALUES (1, 2, 'x')"
            )
    assert list_sealed(cp) == [1]


def test_many_secrets_take_little_time(cp: ControlPlane, tenant: Tenant) -> None:
    """A full host's list with all the secrets that 200 workloads may have."""
    machine = Machine(cp, offered_cpu_milli=64_000, offered_memory_bytes=64 << 30)
    machine.beat()
    big = {"a": "x" * 8191, "b": "x" * 8191}
    began = time.monotonic()
    for number in range(10):
        small = {"cpu_milli": 10, "memory_bytes": 16 << 20}
        tenant.post(201, name=f"w{number}", replicas=20, secrets=big, **small)
    posted_s = time.monotonic() - began
    wait_for("all placed", lambda: len(machine.beat()) == 200 or None, 20)
    began = time.monotonic()
    reply = machine.heartbeat(desired_revision=0)
    took_s = time.monotonic() - began
    print(f"a POST {posted_s / 10:.3f} s; {reply.ByteSize()} bytes in {took_s:.2f} s")
    assert len(reply.desired.assignments) == 200
    assert reply.ByteSize() < 8 << 20  # what the agent takes
    assert took_s < 2
