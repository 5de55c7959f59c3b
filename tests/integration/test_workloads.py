"""Workloads from the customer's request to the host's list and back, with hosts by hand."""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cp_server
from proto import openinfra_pb2 as pb
from tests.bench.fleet import fill
from tests.harness import Client, ControlPlane, Postgres, facts, race, unchanged, wait_for
from tests.integration.test_customers import add, mint
from tests.integration.test_http_api import check_shape
from tests.unit.test_workload_rules import REFUSED

WORKLOADS = "/api/v1/workloads"
REGISTRY = "cp.example.com"
DIGEST = "sha256:" + "ab" * 32
SPEC = {"cpu_milli": 500, "memory_bytes": 64 << 20, "ports": [], "arch": None, "provider": None}
MANY_SQL = """
UPDATE hosts SET engine_version = '20.10', offered_cpu_milli = 64000,
  offered_memory_bytes = 64::bigint << 30, status = 'online';
UPDATE liveness SET last_heartbeat_at = now();
INSERT INTO customers (customer_id, name, created_by) VALUES (gen_random_uuid(), 'Kuma', 'x');
INSERT INTO customer_namespaces (namespace, customer_no) SELECT 'kuma', customer_no FROM customers;
INSERT INTO workloads (workload_id, namespace, name, replicas, spec, unplaced_reason, created_by)
SELECT gen_random_uuid(), 'kuma', 'w' || n, 20, '{spec}', 'as before', 'x'
FROM generate_series(1, {count}) AS n;
"""
STATES: dict[str, Any] = {name: number for number, name in cp_server.OBSERVED_STATES.items()}


class Machine(Client):
    """A host by hand: it takes lists, and says what the test lets it have."""

    def __init__(self, cp: ControlPlane, **changes: Any) -> None:
        super().__init__(cp)
        made = self.register(cp.mint(approve_first_wallet=True), facts=facts(**changes))
        self.host_id = made.host_id
        self.revision = 0
        self.wanted: dict[str, pb.Assignment] = {}

    def beat(self, **have: str) -> dict[str, pb.Assignment]:
        """One heartbeat; `have` is state by assignment id. Gives back what it is to run."""
        return self.say(
            [pb.ObservedAssignment(assignment_id=k, state=STATES[v]) for k, v in have.items()]
        )

    def say(self, rows: list[pb.ObservedAssignment]) -> dict[str, pb.Assignment]:
        observed = pb.Observed(revision=self.revision, assignments=rows)
        reply = self.heartbeat(desired_revision=self.revision, observed=observed)
        assert reply.lease_s == cp_server.LEASE_S
        if reply.HasField("desired"):
            self.revision = reply.desired.revision
            self.wanted = {each.assignment_id: each for each in reply.desired.assignments}
        return self.wanted

    def obey(self) -> dict[str, pb.Assignment]:
        """Take the list and run all that is in it; gives back what it runs."""
        before = None
        while before != self.wanted:
            before = self.wanted
            self.beat(**dict.fromkeys(self.wanted, "running"))
        return self.wanted


@pytest.fixture
def cp(make_cp: Callable[..., ControlPlane]) -> Iterator[ControlPlane]:
    """A control plane with a registry and the usual interval; its invariants hold at the end."""
    made = make_cp(f"--registry={REGISTRY}")
    yield made
    made.check_invariants()


class Tenant:
    """A customer and its key."""

    def __init__(self, cp: ControlPlane) -> None:
        self.cp = cp
        customer = add(cp)
        self.namespace = customer["namespaces"][0]
        self.key = mint(cp, customer)

    def call(self, method: str, path: str = "", body: Any = None) -> tuple[int, Any]:
        return self.cp.call(method, WORKLOADS + path, body, token=self.key)

    def order(self, **changes: Any) -> dict[str, Any]:
        order = {
            "name": "web",
            "image": f"{self.namespace}/web@{DIGEST}",
            "cpu_milli": 500,
            "memory_bytes": 64 << 20,
        }
        return {**order, **changes}

    def post(self, status: int = 201, **changes: Any) -> dict[str, Any]:
        got, workload = self.call("POST", "", self.order(**changes))
        assert got == status, workload
        check_shape("Workload", workload)
        return dict(workload)

    def get(self, workload: dict[str, Any]) -> dict[str, Any]:
        status, found = self.call("GET", f"/{workload['workload_id']}")
        assert status == 200, found
        return dict(found)

    def wait(self, workload: dict[str, Any], state: str, timeout_s: float = 10) -> dict[str, Any]:
        """Until a workload is in this state; fails with what it is instead."""
        found: dict[str, Any] = {}

        def probe() -> dict[str, Any] | None:
            found.update(self.get(workload))
            return found if found["state"] == state else None

        try:
            return wait_for(state, probe, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}, and it is {found}") from None


@pytest.fixture
def tenant(cp: ControlPlane) -> Tenant:
    return Tenant(cp)


def wait_placed(tenant: Tenant, workload: dict[str, Any], copies: int = 1) -> dict[str, Any]:
    def probe() -> dict[str, Any] | None:
        found = tenant.get(workload)
        live = [each for each in found["assignments"] if each["ended_at"] is None]
        return found if len(live) == copies else None

    return wait_for("placed", probe)


def age_host(cp: ControlPlane, seconds: float) -> None:
    """Let all hosts have been heard that long ago, by a control plane that was there."""
    age = f"{seconds} seconds"
    cp.postgres.force(
        cp.database, "UPDATE liveness SET last_heartbeat_at = now() - %s::interval", age
    )
    cp.postgres.force(cp.database, "UPDATE cp_state SET serving_since = now() - interval '1 day'")


def test_an_older_heartbeat_changes_nothing_that_a_newer_one_said(
    cp: ControlPlane, tenant: Tenant
) -> None:
    """Also when both wait for the same batch, in whatever order they came."""
    machine = Machine(cp)
    machine.beat()
    wait_placed(tenant, tenant.post())
    (key,) = machine.beat()

    def say(seq: int, state: str, after_s: float) -> object:
        time.sleep(after_s)
        row = pb.ObservedAssignment(assignment_id=key, state=STATES[state])
        observed = pb.Observed(revision=machine.revision, assignments=[row])
        return machine.heartbeat(seq=seq, observed=observed)

    for number in range(6):
        seq, gap_s = 100 + 2 * number, (number - 2.5) * cp_server.BATCH_S / 5
        older = partial(say, seq, "running", max(0, gap_s))
        answers = race(older, partial(say, seq + 1, "waiting", max(0, -gap_s)))
        assert {type(each) for each in answers} == {pb.HeartbeatReply}
        (row,) = cp.query("SELECT state, seq FROM assignments JOIN liveness USING (host_no)")
        assert (row["state"], row["seq"]) == ("waiting", seq + 1)


def test_from_an_order_to_a_deleted_workload(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    assert machine.beat() == {}
    workload = tenant.post(command=["httpd"], env={"A": "1"}, ports=[8080], egress="none")
    assert (workload["state"], workload["assignments"]) == ("pending", [])
    placed = wait_placed(tenant, workload)
    (copy,) = placed["assignments"]
    assert placed["reasons"] == ["replica 0: its host is about to hear of it"]
    assert copy["host_id"] == cp.hosts()[0]["host_id"]
    assert copy["endpoints"] == [{"port": 8080, "address": "127.0.0.1:20000"}]
    wanted = machine.beat()
    (assignment,) = wanted.values()
    fence = cp.query("SELECT assignment_no FROM assignments")[0]["assignment_no"]
    assert assignment == pb.Assignment(
        assignment_id=copy["assignment_id"],
        fence=fence,
        workload_id=workload["workload_id"],
        image=f"{REGISTRY}/{tenant.namespace}/web@{DIGEST}",
        command=["httpd"],
        env={"A": "1"},
        cpu_milli=500,
        memory_bytes=64 << 20,
        ports=[pb.Port(container_port=8080, host_port=20_000)],
        egress=pb.EGRESS_NONE,
        restart=pb.RESTART_ALWAYS,
    )
    # What it knows is not sent again.
    reply = machine.heartbeat(desired_revision=machine.revision)
    assert not reply.HasField("desired")
    key = copy["assignment_id"]
    machine.say(
        [pb.ObservedAssignment(assignment_id=key, state=STATES["pulling"], reason="23 of 120 MB")]
    )
    assert tenant.get(workload)["reasons"] == ["replica 0: 23 of 120 MB"]
    machine.beat(**{key: "running"})
    running = tenant.get(workload)
    assert (running["state"], running["reasons"]) == ("running", [])
    _, listed = tenant.call("GET")
    check_shape("Workloads", listed)
    assert listed["workloads"] == [running]
    host = cp.call("GET", f"/api/v1/admin/hosts/{copy['host_id']}")[1]
    assert host["assignments"] == 1
    for _ in range(2):
        status, deleted = tenant.call("DELETE", f"/{workload['workload_id']}")
        assert (status, deleted["state"]) == (200, "deleting")
    wait_for("asked to stop", lambda: machine.beat(**{key: "running"}) == {} or None)
    (stopping,) = tenant.get(workload)["assignments"]
    assert stopping["reason"] == "it is being stopped: the workload was deleted"
    machine.beat(**{key: "stopping"})
    assert tenant.get(workload)["state"] == "deleting"
    machine.beat()
    gone = tenant.get(workload)
    assert (gone["state"], gone["reasons"]) == ("deleted", [])
    assert [each["state"] for each in gone["assignments"]] == ["stopped"]
    assert tenant.call("GET")[1]["workloads"] == []
    assert tenant.call("GET", "?deleted=true")[1]["workloads"][0]["state"] == "deleted"
    actions = cp.query("SELECT action FROM audit_log WHERE subject = %s", workload["workload_id"])
    assert [row["action"] for row in actions] == ["workload.add", "workload.delete"]
    machine.channel.close()


def test_the_same_order_again_changes_nothing(cp: ControlPlane, tenant: Tenant) -> None:
    first = tenant.post(env={"A": "1", "B": "2"})
    again = tenant.post(200, env={"B": "2", "A": "1"})
    assert again["workload_id"] == first["workload_id"]
    assert (again["revision"], again["changed_at"]) == (1, first["changed_at"])
    more = tenant.post(200, env={"A": "1", "B": "2"}, replicas=3)
    assert (more["revision"], more["replicas"]) == (1, 3)
    changed = tenant.post(200, env={"A": "2"}, replicas=3)
    assert (changed["revision"], changed["workload_id"]) == (2, first["workload_id"])
    tenant.call("DELETE", f"/{first['workload_id']}")
    assert tenant.post()["workload_id"] != first["workload_id"]


def test_what_cannot_be_asked_for_is_refused_by_its_field(cp: ControlPlane, tenant: Tenant) -> None:
    """Over HTTP: each refusal says which, and nothing of it is kept."""
    said = set()
    with unchanged(cp):
        for field, value, _ in REFUSED:
            order = {
                key: each for key, each in tenant.order(**{field: value}).items() if each != ...
            }
            if isinstance(value, str) and field == "image":
                order[field] = value.replace("kuma/", f"{tenant.namespace}/")
            status, answer = tenant.call("POST", "", order)
            check_shape("Error", answer)
            assert status in (400, 403), (field, value, answer)
            assert answer["error"]["field"].partition("[")[0] == field, (value, answer)
            said.add(status)
    assert said == {400, 403}


def test_one_name_posted_at_once_is_one_workload(cp: ControlPlane, tenant: Tenant) -> None:
    statuses = race(*[lambda: tenant.call("POST", "", tenant.order())[0]] * 8)
    assert sorted(map(int, map(str, statuses))) == [200] * 7 + [201]
    assert len(cp.query("SELECT 1 AS one FROM workloads")) == 1


def test_without_a_registry_there_are_no_images(make_cp: Callable[..., ControlPlane]) -> None:
    tenant = Tenant(make_cp())
    status, answer = tenant.call("POST", "", tenant.order())
    assert (status, answer["error"]["code"]) == (409, "conflict")
    assert "REGISTRY" in answer["error"]["message"]


def test_customers_see_and_change_their_own_only(cp: ControlPlane, tenant: Tenant) -> None:
    other = Tenant(cp)
    mine = tenant.post()
    theirs = other.post()
    for method in ("GET", "DELETE"):
        assert other.call(method, f"/{mine['workload_id']}")[0] == 404
    assert [w["workload_id"] for w in other.call("GET")[1]["workloads"]] == [theirs["workload_id"]]
    status, answer = other.call("POST", "", other.order(namespace=tenant.namespace))
    assert (status, answer["error"]["field"]) == (403, "namespace")
    status, answer = other.call("POST", "", other.order(image=f"{tenant.namespace}/web@{DIGEST}"))
    assert (status, answer["error"]["field"]) == (403, "image")
    assert tenant.get(mine)["deleted_at"] is None
    status, both = cp.call("GET", "/api/v1/admin/workloads")
    assert (status, len(both["workloads"])) == (200, 2)
    assert cp.call("GET", "/api/v1/admin/workloads", token=tenant.key)[0] == 401
    assert cp.call("POST", WORKLOADS, tenant.order())[0] == 401  # an operator is no customer
    done = cp.command("workloads", "--json", f"--namespace={tenant.namespace}")
    assert [w["workload_id"] for w in json.loads(done.stdout)["workloads"]] == [mine["workload_id"]]
    printed = cp.command("workloads").stdout
    assert f"{tenant.namespace}/web" in printed
    assert "no host is ready for work now" in printed or "about to get a host" in printed


def test_no_more_workloads_than_a_customer_may_have(
    cp: ControlPlane, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(cp_server.WORKLOADS_MAX):
        tenant.post(name=f"w{number}", replicas=0)
    status, answer = tenant.call("POST", "", tenant.order(name="one-more"))
    assert (status, answer["error"]["code"]) == (409, "conflict")
    tenant.post(200, name="w0", replicas=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unready": "its firewall is gone"}, "its firewall is gone"),
        ({"engine_version": ""}, ""),
    ],
)
def test_a_host_that_cannot_run_anything_gets_nothing(
    cp: ControlPlane, tenant: Tenant, changes: dict[str, Any], said: str
) -> None:
    machine = Machine(cp, **changes)
    machine.beat()
    host = cp.hosts()[0]
    assert (host["status"], host["assignable"]) == ("online", not said)
    assert said in str(host["reasons"])
    workload = tenant.post()
    wait_for("why", lambda: tenant.get(workload)["reasons"][0].endswith("work now") or None)
    reply = machine.heartbeat(desired_revision=machine.revision, facts=facts())
    assert reply.standing.assignable is True
    wait_placed(tenant, workload)
    machine.channel.close()


def test_a_host_gets_no_more_than_it_offers(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp, offered_cpu_milli=1000)
    machine.beat()
    workload = tenant.post(replicas=3)
    found = wait_placed(tenant, workload, 2)
    wait_for("why", lambda: "none of 1 hosts has" in str(tenant.get(workload)["reasons"]) or None)
    assert len(machine.obey()) == 2
    assert tenant.get(workload)["state"] == "degraded"
    other = Machine(cp)
    other.beat()
    found = wait_placed(tenant, workload, 3)
    assert len({copy["host_id"] for copy in found["assignments"]}) == 2
    other.obey()
    tenant.wait(workload, "running")
    assert cp.query("SELECT unplaced_reason FROM workloads")[0]["unplaced_reason"] == ""
    for each in (machine, other):
        each.channel.close()


def test_a_copy_that_a_host_cannot_run_goes_elsewhere(cp: ControlPlane, tenant: Tenant) -> None:
    machines = [Machine(cp), Machine(cp)]
    for machine in machines:
        machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    first, second = sorted(machines, key=lambda machine: not machine.beat())
    (key,) = first.wanted
    row = pb.ObservedAssignment(assignment_id=key, state=STATES["rejected"], reason="port taken")
    first.say([row])
    wait_for("elsewhere", lambda: second.beat() or None, 4)  # at once: 5 s are the next wait
    assert first.beat() == {}
    second.obey()
    found = tenant.wait(workload, "running")
    assert [each["state"] for each in found["assignments"]] == ["running", "rejected"]
    assert found["assignments"][1]["reason"] == "port taken"
    for each in machines:
        each.channel.close()


def test_ports_that_a_host_rejected_come_last(cp: ControlPlane, tenant: Tenant) -> None:
    """For an hour, and for each workload; they are not lost when nothing else is free."""
    machine = Machine(cp)
    machine.beat()

    def reject(want: pb.Assignment) -> None:
        row = pb.ObservedAssignment(assignment_id=want.assignment_id, state=STATES["rejected"])
        machine.say([row])

    def get_ports(workload: dict[str, Any]) -> list[int]:
        wait_placed(tenant, workload)
        wants = [w for w in machine.beat().values() if w.workload_id == workload["workload_id"]]
        return [port.host_port for want in wants for port in want.ports]

    first = tenant.post(ports=[8080])
    assert get_ports(first) == [20_000]
    reject(*machine.wanted.values())
    wait_for("another slot, at once", lambda: machine.beat() or None, 4)
    assert get_ports(first) == [20_008]
    machine.obey()
    second = tenant.post(name="second", ports=[8080])
    assert get_ports(second) == [20_016]
    cp.postgres.force(
        cp.database,
        "UPDATE assignments SET ended_at = ended_at - make_interval(secs => %s)"
        " WHERE state = 'rejected'",
        cp_server.REJECTED_S,
    )
    assert get_ports(tenant.post(name="third", ports=[8080])) == [20_000]
    machine.channel.close()


def test_a_new_revision_takes_one_copy_at_a_time(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post(replicas=2)
    wait_placed(tenant, workload, 2)
    old = set(machine.obey())
    tenant.wait(workload, "running")
    tenant.post(200, replicas=2, env={"A": "2"})
    wait_for(
        "one is to stop", lambda: len(machine.beat(**dict.fromkeys(old, "running"))) == 1 or None
    )
    time.sleep(1)
    assert len(machine.beat(**dict.fromkeys(old, "running"))) == 1  # and no more
    stays = set(machine.wanted)
    machine.beat(**dict.fromkeys(stays, "running"))  # the other has ended
    wait_for(
        "the new one", lambda: len(machine.beat(**dict.fromkeys(stays, "running"))) == 2 or None
    )
    new = set(machine.wanted) - old
    assert [machine.wanted[key].env["A"] for key in new] == ["2"]
    machine.obey()
    assert tenant.get(workload)["state"] == "updating"
    cp.postgres.force(cp.database, "UPDATE assignments SET state_at = now() - interval '9 s'")
    wait_for("the last old one", lambda: not old & set(machine.obey()) or None)
    wait_for("both new", lambda: len(machine.obey()) == 2 or None)
    found = tenant.wait(workload, "running")
    assert {each["revision"] for each in found["assignments"] if not each["ended_at"]} == {2}
    machine.channel.close()


def test_drain_moves_the_work_and_undrain_takes_it_again(cp: ControlPlane, tenant: Tenant) -> None:
    first = Machine(cp)
    first.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = first.obey()
    second = Machine(cp)
    second.beat()
    host_id = tenant.get(workload)["assignments"][0]["host_id"]
    done = cp.command("drain", host_id)
    assert done.stdout == f"host {host_id} is drained; 1 copies leave it\n"
    wait_for("stop", lambda: first.beat(**{key: "running"}) == {} or None)
    assert second.beat() == {}  # never two copies of one replica
    first.beat()
    wait_for("moved", lambda: second.obey() or None)
    tenant.wait(workload, "running")
    assert first.heartbeat(desired_revision=first.revision).standing.assignable is False
    status, host = cp.call("POST", f"/api/v1/admin/hosts/{host_id}/undrain")
    assert (status, host["assignable"], host["drained_at"]) == (200, True, None)
    wait_placed(tenant, tenant.post(200, replicas=2), 2)
    assert first.beat()
    for each in (first, second):
        each.channel.close()


def test_labels_say_where_a_copy_goes(cp: ControlPlane, tenant: Tenant) -> None:
    first, second = Machine(cp), Machine(cp)
    first.beat()
    second.beat()
    workload = tenant.post(201, labels={"region": "eu", "disk": "ssd"})
    assert workload["labels"] == {"region": "eu", "disk": "ssd"}
    why = "hosts is as asked: disk=ssd, region=eu"
    wait_for("the reason", lambda: why in "".join(tenant.get(workload)["reasons"]) or None)
    done = cp.command("label", second.host_id, "region=eu", "disk=ssd", "extra=1")
    assert done.stdout == f"host {second.host_id} has the labels disk=ssd extra=1 region=eu\n"
    wait_placed(tenant, workload)
    assert len(second.obey()) == 1
    assert first.beat() == {}
    # Taken away again, it stays where it is; the same order is still the same.
    path = f"/api/v1/admin/hosts/{second.host_id}/labels"
    assert cp.call("POST", path, {"labels": {"region": "us"}})[1]["labels"] == {"region": "us"}
    assert tenant.post(200, labels={"disk": "ssd", "region": "eu"})["revision"] == 1
    assert len(second.obey()) == 1
    assert tenant.post(200)["labels"] == {}  # another order: anywhere
    sql = "SELECT detail FROM audit_log WHERE action = 'host.label' ORDER BY audit_id"
    details = [row["detail"] for row in cp.query(sql)]
    assert details == [{"region": "eu", "disk": "ssd", "extra": "1"}, {"region": "us"}]
    for bad in (["region"], ["=eu"], ["a=b", "a=c"], ["A=b"], ["a=" + "b" * 64]):
        done = cp.command("label", second.host_id, *bad)
        assert (done.returncode, done.stdout) == (2, ""), bad
    assert cp.command("label", second.host_id).stdout == f"host {second.host_id} has none\n"
    for each in (first, second):
        each.channel.close()


def test_a_paused_host_gives_its_work_back(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    second = Machine(cp)
    second.beat()
    machine.heartbeat(desired_revision=machine.revision, paused=True)
    wait_for("stop", lambda: tenant.get(workload)["reasons"] or None)

    def reply() -> pb.Desired | None:
        got = machine.heartbeat(desired_revision=machine.revision, paused=True)
        return got.desired if got.HasField("desired") else None

    desired = wait_for("a list without it", reply)
    assert list(desired.assignments) == []
    assert "the provider paused its host" in tenant.get(workload)["reasons"][0]
    assert tenant.get(workload)["assignments"][0]["assignment_id"] == key
    # Never two copies of one replica: not before the host took the list, and has nothing of it.
    row = pb.ObservedAssignment(assignment_id=key, state=STATES["waiting"])
    for revision, rows in ((machine.revision, []), (desired.revision, [row])):
        observed = pb.Observed(revision=revision, assignments=rows)
        machine.heartbeat(desired_revision=desired.revision, paused=True, observed=observed)
        time.sleep(1)
        assert second.beat() == {}
    observed = pb.Observed(revision=desired.revision)
    machine.heartbeat(desired_revision=desired.revision, paused=True, observed=observed)
    wait_for("elsewhere", lambda: second.obey() or None)
    for each in (machine, second):
        each.channel.close()


def test_a_silent_host_keeps_its_copy_until_its_right_is_over(
    cp: ControlPlane, tenant: Tenant
) -> None:
    first = Machine(cp)
    first.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = first.obey()
    second = Machine(cp)
    second.beat()
    age_host(cp, cp_server.LEASE_S + cp_server.LEASE_GRACE_S - 14)
    cp.postgres.force(
        cp.database,
        "UPDATE liveness SET last_heartbeat_at = now()"
        " WHERE host_no = (SELECT max(host_no) FROM hosts)",
    )
    wait_for(
        "offline", lambda: "its host is offline" in str(tenant.get(workload)["reasons"]) or None
    )
    assert tenant.get(workload)["state"] == "pending"
    assert second.beat() == {}
    wait_for("lost and placed again", lambda: second.obey() or None, 25)
    found = tenant.wait(workload, "running")
    assert [each["state"] for each in found["assignments"]] == ["running", "lost"]
    assert second.wanted[found["assignments"][0]["assignment_id"]].fence > first.wanted[key].fence
    # The first comes back: it is told to stop its late copy, whatever it says of it.
    assert first.beat(**{key: "running"}) == {}
    assert tenant.get(workload)["assignments"][1]["state"] == "lost"
    for each in (first, second):
        each.channel.close()


def test_nothing_is_lost_for_the_control_planes_own_absence(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    cp.stop(signal.SIGKILL)
    cp.postgres.force(
        cp.database,
        "UPDATE liveness SET last_heartbeat_at = now() - interval '1 day'",
    )
    cp.start()
    time.sleep(cp_server.PLACE_S + 1)
    assert tenant.get(workload)["assignments"][0]["state"] == "running"
    assert set(machine.beat(**{key: "running"})) == {key}
    machine.channel.close()


def test_another_machine_with_the_identity_starts_nothing_before_the_right_is_over(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    machine.resume(previous_session=b"x" * 32)  # a copy of the disk: it does not know the session
    machine.revision = 0
    assert machine.beat() == {}
    machine.beat()  # it has nothing of it, and that says nothing about the first machine
    found = tenant.get(workload)
    assert "another machine took over" in found["reasons"][0]
    assert found["assignments"][0]["ended_at"] is None
    time.sleep(1)
    assert machine.beat() == {}
    (row,) = cp.query(
        "SELECT extract(epoch FROM held_until - now())::float AS left FROM assignments"
    )
    assert cp_server.LEASE_S - 30 < row["left"] <= cp_server.LEASE_S
    cp.postgres.force(cp.database, "UPDATE assignments SET held_until = now() - interval '31 s'")
    wait_for("placed again", lambda: machine.beat() or None)
    assert key not in machine.wanted
    machine.channel.close()


def test_a_restart_of_the_agent_keeps_its_copies(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    machine.resume()
    machine.revision, machine.wanted = 0, {}
    assert set(machine.beat()) == {key}
    assert tenant.get(workload)["state"] == "running"
    machine.channel.close()


def restore(cp: ControlPlane) -> None:
    """What `restore` leaves in a database that it took from a backup; and a new start."""
    cp.stop()
    for sql in (
        "DELETE FROM sessions WHERE ended_at IS NULL",
        "UPDATE assignments SET restored = true WHERE ended_at IS NULL",
        "UPDATE cp_state SET restored_at = now()",
    ):
        cp.postgres.execute(cp.database, sql)
    cp.start()


def test_after_a_restore_no_host_starts_what_another_may_run(
    cp: ControlPlane, tenant: Tenant
) -> None:
    has, has_not = Machine(cp), Machine(cp)
    for machine in (has, has_not):
        machine.beat()
    workload = tenant.post(replicas=2)
    wait_placed(tenant, workload, 2)
    (kept,) = has.obey()
    (over,) = has_not.obey()
    restore(cp)
    for machine in (has, has_not):
        machine.resume()
        machine.revision = 0
    has_not.wanted = {}
    # One still has its copy: it goes on. Of the other the copy was moved after the backup.
    assert set(has.beat(**{kept: "running"})) == {kept}
    assert has_not.beat() == {}
    found = tenant.get(workload)
    assert {each["assignment_id"]: each["state"] for each in found["assignments"]} == {
        kept: "running",
        over: "stopped",
    }
    wait_for("why", lambda: "a backup was restored" in str(tenant.get(workload)["reasons"]))
    assert has_not.beat() == {}
    sql = "UPDATE cp_state SET restored_at = now() - interval '631 s'"
    cp.postgres.execute(cp.database, sql)
    wait_placed(tenant, workload, 2)
    for machine in (has, has_not):
        machine.obey()
        machine.channel.close()
    tenant.wait(workload, "running")


def test_after_a_restore_a_silent_hosts_copy_is_not_lost_early(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    restore(cp)
    age_host(cp, 86_400)  # the backup is of yesterday
    time.sleep(cp_server.PLACE_S + 1)
    assert tenant.get(workload)["assignments"][0]["state"] == "running"
    machine.resume()
    machine.revision = 0
    assert set(machine.beat(**{key: "running"})) == {key}
    machine.channel.close()


def test_a_revoked_host_loses_its_copy_by_the_clock(cp: ControlPlane, tenant: Tenant) -> None:
    machine, other = Machine(cp), None
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    machine.obey()
    other = Machine(cp)
    other.beat()
    host_id = tenant.get(workload)["assignments"][0]["host_id"]
    assert cp.command("revoke", host_id).returncode == 0
    time.sleep(1)
    assert other.beat() == {}
    sql = "UPDATE liveness SET last_heartbeat_at = now() - interval '631 s' WHERE host_no = 1"
    cp.postgres.force(cp.database, sql)
    cp.postgres.force(cp.database, "UPDATE cp_state SET serving_since = now() - interval '1 day'")
    wait_for("moved", lambda: other.obey() or None)
    tenant.wait(workload, "running")
    for each in (machine, other):
        each.channel.close()


def test_a_host_cannot_speak_for_another(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    machine.beat()
    workload = tenant.post()
    wait_placed(tenant, workload)
    (key,) = machine.obey()
    liar = Machine(cp, engine_version="")
    liar.beat()
    for state in ("failed", "rejected"):
        liar.beat(**{key: state, str(uuid.uuid4()): state})
    assert tenant.get(workload)["state"] == "running"
    for each in (machine, liar):
        each.channel.close()


def test_a_finished_copy_holds_nothing_and_is_not_started_again(
    cp: ControlPlane, tenant: Tenant
) -> None:
    machine = Machine(cp, offered_cpu_milli=500)
    machine.beat()
    job = tenant.post(name="job", restart="never")
    wait_placed(tenant, job)
    (key,) = machine.beat()
    row = pb.ObservedAssignment(assignment_id=key, state=STATES["finished"], exit_code=0)
    machine.say([row])
    assert tenant.get(job)["state"] == "finished"
    wait_placed(tenant, tenant.post(name="next"))
    assert len(machine.beat(**{key: "finished"})) == 2  # it is kept for its logs
    machine.channel.close()


@pytest.mark.parametrize("how", ["silent", "drained", "paused", "taken over", "revoked", "unpaid"])
def test_a_job_that_ended_is_not_run_again_whatever_becomes_of_its_host(
    cp: ControlPlane, tenant: Tenant, how: str
) -> None:
    """Another host is there for it; and deleted it is gone all the same."""
    first = Machine(cp)
    first.beat()
    jobs = [tenant.post(name=name, restart="never") for name in ("good", "bad")]
    for job in jobs:
        wait_placed(tenant, job)
    ends = zip(sorted(first.beat()), ("finished", "failed"), strict=True)
    first.say([pb.ObservedAssignment(assignment_id=k, state=STATES[v]) for k, v in ends])
    before = [tenant.get(job) for job in jobs]
    assert {job["state"] for job in before} == {"finished", "failed"}
    second = Machine(cp)
    second.beat()
    if how == "drained":
        assert cp.command("drain", first.host_id).returncode == 0
    if how == "paused":
        first.heartbeat(paused=True)
    if how == "revoked":
        assert cp.command("revoke", first.host_id).returncode == 0
    if how == "unpaid":
        (customer,) = cp.query("SELECT customer_id::text FROM customers")
        assert cp.command("credit-limit", customer["customer_id"], "0").returncode == 0
        sql = "UPDATE customers SET out_of_credit_at = now() - interval '1 day'"
        cp.postgres.force(cp.database, sql)
    if how == "taken over":
        hold_assignments(cp)
    if how in ("silent", "taken over", "revoked"):
        age = cp_server.LEASE_S + cp_server.LEASE_GRACE_S + 60
        sql = "UPDATE liveness SET last_heartbeat_at = now() - %s::interval WHERE host_no = 1"
        cp.postgres.force(cp.database, sql, f"{age} seconds")
        sql = "UPDATE cp_state SET serving_since = now() - interval '1 day'"
        cp.postgres.force(cp.database, sql)
    time.sleep(2 * cp_server.PLACE_S + 1)
    assert second.beat() == {}
    after = [tenant.get(job) for job in jobs]
    assert [job["state"] for job in after] == [job["state"] for job in before]
    assert {len(job["assignments"]) for job in after} == {1}
    for job in jobs:
        assert tenant.call("DELETE", f"/{job['workload_id']}")[0] == 200
    if how in ("drained", "paused", "unpaid"):
        wait_for("the list without it", lambda: first.beat() == {} or None)
        first.beat()
    for job in jobs:
        tenant.wait(job, "deleted", 20)
    for each in (first, second):
        each.channel.close()


def hold_assignments(cp: ControlPlane) -> None:
    """What happens to them when another machine takes over their host's identity."""

    async def work(db: cp_server.Database) -> None:
        async with db.transaction() as tx:
            await tx.execute(cp_server.SQL_ASSIGNMENT_HOLD, host_no=1, lease_s=cp_server.LEASE_S)

    asyncio.run(cp_server.with_database(cp.dsn_file, work))


def test_a_kill_in_the_middle_of_placing_loses_nothing(
    make_cp: Callable[..., ControlPlane], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.failpoints import build

    scripts = build(tmp_path_factory.mktemp("kill") / "scripts")
    cp = make_cp(f"--registry={REGISTRY}", scripts=scripts)
    tenant, machine = Tenant(cp), Machine(cp)
    machine.beat()
    cp.stop()
    cp.start(OPENINFRA_FAILPOINT="place.before_commit=kill")
    assert cp.process
    workload = tenant.post()
    assert cp.process.child.wait(10) == -signal.SIGKILL
    assert cp.query("SELECT 1 FROM assignments") == []
    cp.start()
    wait_placed(tenant, workload)
    machine.obey()
    tenant.wait(workload, "running")
    cp.check_invariants()
    machine.channel.close()


def test_a_host_is_nudged_when_it_has_news(cp: ControlPlane, tenant: Tenant) -> None:
    machine = Machine(cp)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(2)
        machine.heartbeat(nudge_port=sock.getsockname()[1])
        began = time.monotonic()
        tenant.post()
        assert sock.recv(100) == b"openinfra"
        assert time.monotonic() - began < 1
        assert sock.recv(100) == b"openinfra"  # and again, in case it got lost
        assert machine.beat()
    machine.channel.close()


def test_a_round_that_is_cut_goes_on_in_the_next(postgres: Postgres, tmp_path: Path) -> None:
    """More than one round places; what was not looked at keeps its reason until it is."""
    cp = ControlPlane(postgres, tmp_path / "cp")
    fill(cp, 10, 30)
    count = cp_server.PLACE_COPIES_MAX // 20 + 5
    spec = json.dumps(SPEC)
    postgres.execute(cp.database, MANY_SQL.format(spec=spec, count=count))

    async def work(db: cp_server.Database) -> None:
        turns: Mapping[int, int] = {}
        for placed, kept, is_cut in ((cp_server.PLACE_COPIES_MAX, 5, True), (100, 0, False)):
            done = await cp_server.place(db, turns)
            assert (done.placed, done.unplaced, done.is_cut) == (placed, kept, is_cut)
            sql = "SELECT count(*) AS n FROM workloads WHERE unplaced_reason = 'as before'"
            assert cp.query(sql)[0]["n"] == kept
            turns = done.turns

    asyncio.run(cp_server.with_database(cp.dsn_file, work))


def test_two_that_place_at_once_give_no_copy_two_places(postgres: Postgres, tmp_path: Path) -> None:
    """As when one control plane is still there while another begins."""
    cp = ControlPlane(postgres, tmp_path / "cp")
    fill(cp, 40, 30)
    count = 4 * cp_server.PLACE_COPIES_MAX // 20
    postgres.execute(cp.database, MANY_SQL.format(spec=json.dumps(SPEC), count=count))
    placed: collections.Counter[int] = collections.Counter()

    async def work(number: int) -> None:
        async def rounds(db: cp_server.Database) -> None:
            turns: Mapping[int, int] = {}
            while sum(placed.values()) < 20 * count:
                done = await cp_server.place(db, turns)
                turns = done.turns or turns
                placed[number] += done.placed

        await cp_server.with_database(cp.dsn_file, rounds)

    async def both() -> None:
        await asyncio.wait_for(asyncio.gather(work(0), work(1)), 60)

    asyncio.run(both())
    sql = "SELECT count(*) AS n, count(DISTINCT (workload_no, replica)) AS copies FROM assignments"
    assert cp.query(sql) == [{"n": 20 * count, "copies": 20 * count}]
    assert len(+placed) == 2


def test_cut_rounds_follow_at_once(make_cp: Callable[..., ControlPlane]) -> None:
    """Three rounds' work does not wait for the placer's next look by the clock, or two."""
    cp = make_cp(f"--registry={REGISTRY}", start=False)
    fill(cp, 30, 30)
    total = 3 * cp_server.PLACE_COPIES_MAX
    cp.postgres.execute(cp.database, MANY_SQL.format(spec=json.dumps(SPEC), count=total // 20))
    cp.start()

    def count() -> int:
        return int(cp.query("SELECT count(*) AS n FROM assignments")[0]["n"])

    wait_for("the first round", count, 20)
    began = time.monotonic()
    wait_for("the last one", lambda: count() == total or None, 20)
    assert time.monotonic() - began < 2 * cp_server.PLACE_S - 2
