"""Logs over the API: what a customer gets of its copies, with hosts by hand, honest or not."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from proto import openinfra_pb2 as pb
from tests.harness import ControlPlane, Refused, wait_for
from tests.integration.test_http_api import check_shape
from tests.integration.test_workloads import (
    REGISTRY,
    STATES,
    WORKLOADS,
    Machine,
    Tenant,
    age_host,
)

Answers = Callable[[pb.LogRequest], list[pb.LogAnswer]]


def nothing(_: pb.LogRequest) -> list[pb.LogAnswer]:
    return []


class Printer(Machine):
    """A host that heartbeats all the time, runs what it is to, and answers as the test says."""

    def __init__(self, cp: ControlPlane, answers: Answers) -> None:
        super().__init__(cp)
        self.answers = answers
        self.asked: dict[int, pb.LogRequest] = {}
        self.due: list[pb.LogAnswer] = []
        self.last: list[pb.LogRequest] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def step(self) -> None:
        """One heartbeat, with what is due."""
        due, self.due = self.due, []
        rows = [
            pb.ObservedAssignment(assignment_id=key, state=STATES["running"]) for key in self.wanted
        ]
        observed = pb.Observed(revision=self.revision, assignments=rows)
        reply = self.heartbeat(desired_revision=self.revision, observed=observed, logs=due)
        if reply.HasField("desired"):
            self.revision = reply.desired.revision
            self.wanted = {each.assignment_id: each for each in reply.desired.assignments}
        self.last = [*reply.log_requests]
        for request in self.last:
            if request.request_id not in self.asked:
                self.asked[request.request_id] = request
                self.due += self.answers(request)

    def _run(self) -> None:
        while not self.over.wait(0.02):
            with contextlib.suppress(Refused):  # the control plane may not be there
                self.step()

    def end(self) -> None:
        self.over.set()
        self.thread.join(10)
        self.channel.close()


def say(content: bytes, **more: Any) -> Answers:
    """Answers each request with this."""
    return lambda request: [pb.LogAnswer(request_id=request.request_id, content=content, **more)]


@pytest.fixture
def cp(make_cp: Callable[..., ControlPlane]) -> Iterator[ControlPlane]:
    made = make_cp(f"--registry={REGISTRY}")
    yield made
    made.check_invariants()


@pytest.fixture
def tenant(cp: ControlPlane) -> Tenant:
    return Tenant(cp)


@pytest.fixture
def make_printer(cp: ControlPlane) -> Iterator[Callable[..., Printer]]:
    """Makes hosts that end with the test."""
    made: list[Printer] = []

    def make(answers: Answers = nothing) -> Printer:
        made.append(Printer(cp, answers))
        made[-1].step()
        made[-1].thread.start()
        return made[-1]

    yield make
    for each in made:
        each.end()


def place(tenant: Tenant, **changes: Any) -> dict[str, Any]:
    """A workload that runs whole on the hosts that are there."""
    return tenant.wait(tenant.post(**changes), "running")


def read(tenant: Tenant, workload: dict[str, Any], query: str = "") -> list[dict[str, Any]]:
    status, answer = tenant.call("GET", f"/{workload['workload_id']}/logs{query}")
    assert status == 200, answer
    check_shape("Logs", answer)
    return list(answer["logs"])


def read_raw(tenant: Tenant, workload: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", tenant.cp.http_port, timeout=15)
    headers = {"Authorization": f"Bearer {tenant.key}"}
    connection.request("GET", f"{WORKLOADS}/{workload['workload_id']}/logs", None, headers)
    with connection.getresponse() as answer:
        found = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return found


def test_the_last_lines_of_each_copy(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    first, second = make_printer(say(b"one\ntwo\n")), make_printer(say(b"", reason="not yet"))
    workload = place(tenant, replicas=2)
    bystander = make_printer(say(b"never"))
    audited = cp.query("SELECT count(*) FROM audit_log")
    began = time.monotonic()
    logs = read(tenant, workload, "?tail=7")
    assert time.monotonic() - began < 2
    assert cp.query("SELECT count(*) FROM audit_log") == audited
    of_host = {each.wanted.popitem()[0]: each for each in (first, second)}
    for log, copy in zip(logs, workload["assignments"], strict=True):
        of = of_host[log["assignment_id"]]
        said = {"lines": ["one", "two"], "truncated": False, "reason": ""}
        if of is second:
            said = {"lines": [], "truncated": False, "reason": "not yet"}
        assert log == {**{k: copy[k] for k in ("assignment_id", "host_id", "replica")}, **said}
        (request,) = of.asked.values()
        assert (request.assignment_id, request.tail_lines) == (copy["assignment_id"], 7)
        assert request.limit_bytes == 32_768
    only = read(tenant, workload, f"?assignment_id={logs[1]['assignment_id'].upper()}")
    assert only == [logs[1]]
    assert [*of_host[only[0]["assignment_id"]].asked.values()][-1].tail_lines == 100
    assert bystander.asked == {}


def test_nobody_else_reads_them_and_no_host_is_asked(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    printer = make_printer(say(b"mine\n"))
    workload = place(tenant)
    path, other = f"/{workload['workload_id']}/logs", Tenant(cp)
    assert other.call("GET", path)[0] == 404
    assert other.call("GET", f"{path}?assignment_id={printer.wanted.popitem()[0]}")[0] == 404
    assert cp.call("GET", WORKLOADS + path)[0] == 401  # an operator is no customer
    assert cp.call("GET", WORKLOADS + path, token="")[0] == 401
    assert cp.call("GET", f"/api/v1/admin/workloads{path}")[0] == 404
    for query in ("tail=0", "tail=1001", "tail=x", "assignment_id=x", "follow=1", "tail=1&tail=2"):
        assert tenant.call("GET", f"{path}?{query}")[0] == 400, query
    assert tenant.call("GET", f"/{uuid.uuid4()}/logs")[0] == 404
    assert tenant.call("GET", f"{path}?assignment_id={uuid.uuid4()}")[0] == 404
    assert printer.asked == {}


def test_a_host_answers_for_itself_only(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    """Not for a request that another host got, nor for one that nobody made, nor twice."""
    liar = make_printer()

    def answers(request: pb.LogRequest) -> list[pb.LogAnswer]:
        number = request.request_id
        (own,) = wait_for("the liar is asked too", lambda: [*liar.asked])
        liar.due = [pb.LogAnswer(request_id=number, content=b"a lie")]
        wait_for("the lie is told", lambda: not liar.due)
        time.sleep(0.5)
        liar.due = [pb.LogAnswer(request_id=own, content=b"mine")]
        texts = [(number ^ 1, b"no"), (0, b"no"), (number, b"truth"), (number, b"afterthought")]
        return [pb.LogAnswer(request_id=which, content=text) for which, text in texts]

    printer = make_printer(answers)
    workload = place(tenant, replicas=2)
    logs = {log["assignment_id"]: log["lines"] for log in read(tenant, workload)}
    assert logs == {printer.wanted.popitem()[0]: ["truth"], liar.wanted.popitem()[0]: ["mine"]}
    # Too late, when nobody asks any more and when somebody asks for something else.
    (number,) = printer.asked
    for each in (printer, liar):
        each.due = [pb.LogAnswer(request_id=number, content=b"late")]
        each.answers = say(b"again")
    wait_for("it is told", lambda: not printer.due)
    assert [log["lines"] for log in read(tenant, workload)] == [["again"]] * 2


STRANGE: tuple[tuple[bytes, list[str] | None, bool], ...] = (
    (b"x" * 60_000, ["x" * 32_768], True),
    (b"a\n" * 20_000, ["a"] * 100, True),
    (b"\n" * 1_000, [""] * 100, False),
    (bytes(range(256)), None, False),
    (b"\x1b]0;title\x07\x1b[2J\r\x00\x7f\xc2\x9b2J\xff\xfe\xed\xa0\x80", None, False),
    ("\u202e\U0001f469\u2028".encode(), ["\u202e\U0001f469\u2028"], False),
)


def test_bytes_of_a_stranger_come_as_json(
    tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    printer = make_printer()
    workload = place(tenant)
    for content, lines, truncated in STRANGE:
        printer.answers = say(content, reason="a\nb\x1b" + "c" * 999)
        status, _, raw = read_raw(tenant, workload)
        assert status == 200
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", raw.decode().removesuffix("\n"))
        (log,) = json.loads(raw)["logs"]
        assert log["truncated"] is truncated
        assert log["reason"].startswith("a?b?ccc")
        assert len(log["reason"]) == 300
        assert lines in (None, log["lines"])


def test_what_is_no_answer_costs_no_heartbeat(
    cp: ControlPlane,
) -> None:
    """Nobody asked for it; what is larger than a message may be is refused, and the next is not."""
    machine = Machine(cp)
    for logs in (
        [pb.LogAnswer(request_id=n) for n in range(5_000)],
        [pb.LogAnswer(content=b"x" * 60_000, reason="y" * 1_000)],
    ):
        assert machine.heartbeat(logs=logs).next_heartbeat_ms
    with pytest.raises(Refused) as refused:
        machine.heartbeat(logs=[pb.LogAnswer(content=b"x" * 65_536)])
    assert refused.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert machine.heartbeat().next_heartbeat_ms
    machine.channel.close()
    assert "Traceback" not in cp.log


def test_who_waits_for_a_silent_host_holds_up_nobody(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    printer = make_printer()
    tenants = [tenant, Tenant(cp), Tenant(cp)]
    workloads = [place(each) for each in tenants]
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(read, tenant, workloads[0])]
        wait_for("one is asked for", lambda: len(printer.asked) == 1)
        assert read_raw(tenant, workloads[0])[0] == 429
        slow += [pool.submit(read, tenants[1], workloads[1])]
        wait_for("both are asked for", lambda: len(printer.asked) == 2)
        for one, workload in zip(tenants, workloads, strict=True):
            status, headers, raw = read_raw(one, workload)
            assert (status, headers["Retry-After"]) == (429, "1"), raw
            assert b"ask again in a moment" in raw
            assert one.get(workload)["state"] == "running"
        assert cp.call("GET", "/api/v1/admin/hosts")[0] == 200
        assert time.monotonic() - began < 3
        for each in slow:
            (log,) = each.result()
            assert log["reason"] == "its host did not answer within 5 s"
            assert log["lines"] == []
    assert 5 < time.monotonic() - began < 6.5
    # Nothing is left of them.
    wait_for("no more questions", lambda: not printer.last)
    before = len(printer.asked)
    printer.answers = say(b"now\n")
    assert read(tenants[2], workloads[2])[0]["lines"] == ["now"]
    assert len(printer.asked) == before + 1


def test_many_at_once_get_an_answer_or_are_told_to_ask_again(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    make_printer(say(b"\x01" * 29_000))
    tenants = [tenant, *(Tenant(cp) for _ in range(3))]
    workloads = [place(each) for each in tenants]
    read(tenant, workloads[0])
    rss = read_rss(cp)

    def work(number: int) -> Counter[int]:
        """Ask until there were a few answers."""
        which, seen = number % len(tenants), Counter[int]()
        while seen[200] < 4:
            seen[read_raw(tenants[which], workloads[which])[0]] += 1
        return seen

    with ThreadPoolExecutor(8) as pool:
        statuses = sum(pool.map(work, range(8)), Counter[int]())
    assert set(statuses) == {200, 429}
    grown = (read_rss(cp) - rss) / 1e6
    print(f"{dict(statuses)}; the control plane grew by {grown:.1f} MB")
    assert grown < 10


def read_rss(cp: ControlPlane) -> float:
    """Resident memory of a control plane."""
    assert cp.process
    path = f"/proc/{cp.process.child.pid}/statm"
    with open(path) as file:
        return int(file.read().split()[1]) * 4096.0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_the_control_plane_loses_a_log_and_nothing_else(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer], how: signal.Signals
) -> None:
    printer = make_printer()
    workload = place(tenant)
    with ThreadPoolExecutor(1) as pool:
        waits: Future[Any] = pool.submit(read_raw, tenant, workload)
        (number,) = wait_for("asked", lambda: [*printer.asked])
        began = time.monotonic()
        cp.stop(how)
        assert time.monotonic() - began < 4.5
        if how is signal.SIGTERM:
            (log,) = json.loads(waits.result()[2])["logs"]
            assert log["reason"] == "the control plane was stopping; ask again"
        else:
            assert isinstance(waits.exception(), http.client.HTTPException | OSError)
    printer.due = [pb.LogAnswer(request_id=number, content=b"too late")]
    cp.start()
    assert read(tenant, workload)[0]["lines"] == []
    printer.answers = say(b"again\n")
    assert read(tenant, workload)[0]["lines"] == ["again"]
    assert len(printer.asked) == 3


def test_why_there_is_no_log(
    cp: ControlPlane, tenant: Tenant, make_printer: Callable[..., Printer]
) -> None:
    workload = tenant.post()
    assert read(tenant, workload) == []  # no copy has a host
    printer = make_printer(say(b"words\n"))
    tenant.wait(workload, "running")
    (first,) = read(tenant, workload)
    tenant.call("DELETE", f"/{workload['workload_id']}")
    tenant.wait(workload, "deleted")
    assert read(tenant, workload) == []
    (log,) = read(tenant, workload, f"?assignment_id={first['assignment_id']}")
    assert (log["lines"], log["reason"]) == ([], "it has ended, and nothing of it is kept")
    workload = place(tenant)
    printer.over.set()
    printer.thread.join()
    age_host(cp, 91)
    wait_for("offline", lambda: cp.hosts()[0]["status"] == "offline" or None)
    began = time.monotonic()
    (log,) = read(tenant, workload)
    assert (log["lines"], log["reason"]) == ([], "its host is offline")
    assert time.monotonic() - began < 1
