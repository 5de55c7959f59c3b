"""A customer's order becomes a process: control plane, agent and container engine, all real.

The control plane and the agent are on loopback; engine and registry in a namespace of their own.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests.engine import REGISTRY, Engine, slow_registry
from tests.harness import WALLET, Agent, ControlPlane, change_scripts, inside, wait_for
from tests.integration.test_http_api import check_shape
from tests.integration.test_http_edge import read_metrics
from tests.integration.test_workloads import Tenant
from tests.readme import block

HTTPD = ["/bin/httpd", "-f", "-p", "8080", "-h", "/bin"]


class Fleet:
    """One home machine, and a customer with an image."""

    def __init__(self, cp: ControlPlane, agent: Agent, engine: Engine) -> None:
        self.cp, self.agent, self.engine = cp, agent, engine
        self.tenant = Tenant(cp)
        self.image = engine.push(f"{self.tenant.namespace}/web").removeprefix(f"{REGISTRY}/")

    def start_agent(self) -> None:
        self.agent.start(
            f"--engine-socket={self.engine.socket}",
            f"--lease-file={self.agent.directory / 'lease.json'}",
            f"--limits={self.agent.directory / 'limits.conf'}",
        )

    def post(self, status: int = 201, **changes: Any) -> dict[str, Any]:
        order = {"image": self.image, "command": HTTPD, "cpu_milli": 50, "memory_bytes": 32 << 20}
        return self.tenant.post(status, **{**order, **changes})

    def running(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many containers run, and no other is there."""

        def probe() -> list[dict[str, Any]] | None:
            found = list(self.engine.containers().values())
            is_right = len(found) == count and all(each["State"]["Running"] for each in found)
            return found if is_right else None

        return wait_for(f"{count} containers", probe, 20) if count else self.gone()

    def list_past(self, workload: dict[str, Any]) -> list[dict[str, Any]]:
        """Its copies that have ended."""
        return [each for each in self.tenant.get(workload)["assignments"] if each["ended_at"]]

    def gone(self) -> list[dict[str, Any]]:
        wait_for("no container", lambda: not self.engine.containers() or None, 20)
        return []


def run_fleet(cp: ControlPlane, agent: Agent, engine: Engine) -> Iterator[Fleet]:
    """A fleet that is ready for work, for a fixture; what must hold at its end is checked."""
    agent.limits_file.write_text("CPUS=2\nMEMORY=2G\n")
    made = Fleet(cp, agent, engine)
    made.start_agent()
    cp.wait_assignable()
    yield made
    cp.check_invariants()


@pytest.fixture
def fleet(
    make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent], engine: Engine
) -> Iterator[Fleet]:
    engine.clear()
    cp = make_cp(f"--registry={REGISTRY}")  # the nominal 30 s: what is quick comes by nudges
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET))
    yield from run_fleet(cp, agent, engine)


def ask(engine: Engine, address: str, path: str = "/busybox") -> int:
    """The HTTP status of what answers at an endpoint."""
    host, _, port = address.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    with inside(engine.netns):
        connection.connect()
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_a_provider_pauses_takes_work_again_and_leaves(fleet: Fleet) -> None:
    """With one machine there is no other place: the copy waits for it."""
    workload = fleet.post()
    fleet.tenant.wait(workload, "running")
    engine = f"--engine-socket={fleet.engine.socket}"
    flags = [engine, f"--limits={fleet.agent.directory / 'limits.conf'}"]
    done = fleet.agent.run_command("pause", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(each["State"]["Running"] for each in fleet.engine.containers().values())
    fleet.gone()
    (host,) = fleet.cp.hosts()
    assert (host["status"], len(host["reasons"])) == ("paused", 1)
    fleet.agent.run_command("unpause", *flags)
    fleet.running(1)
    began_s = time.monotonic()
    done = fleet.agent.run_command("leave", *flags)
    print(f"leave: {time.monotonic() - began_s:.2f} s")
    assert done.returncode == 0, done.stderr
    assert f"who revokes host {host['host_id']}" in done.stdout
    assert fleet.engine.containers() == {}
    (host,) = fleet.cp.hosts()
    assert "its provider is leaving: revoke it" in host["reasons"][1]
    found = fleet.tenant.get(workload)
    assert {each["state"] for each in found["assignments"]} == {"stopped"}
    (held,) = fleet.cp.hosts()
    assert held["status"] == "paused"


def test_a_job_that_ended_keeps_nobody_from_leaving(fleet: Fleet) -> None:
    """It is not run again on this machine or another one, and its state stays."""
    job = fleet.post(command=["/bin/sh", "-c", "exit 3"], restart="never")
    fleet.tenant.wait(job, "failed", 20)
    engine = f"--engine-socket={fleet.engine.socket}"
    flags = [engine, f"--limits={fleet.agent.directory / 'limits.conf'}"]
    for command in ("pause", "unpause", "leave"):
        done = fleet.agent.run_command(command, *flags)
        assert (done.returncode, done.stderr) == (0, "")
        time.sleep(2 * cp_server.PLACE_S)
        (copy,) = fleet.tenant.get(job)["assignments"]
        assert (copy["state"], copy["exit_code"], copy["restarts"]) == ("failed", 3, 0)
    (host,) = fleet.cp.hosts()
    assert host["assignments"] == 0


def test_from_an_order_to_a_process_and_away(fleet: Fleet) -> None:
    (host,) = fleet.cp.hosts()
    assert (host["assignable"], host["offered_memory_bytes"]) == (True, 2 << 30)
    workload = fleet.post(ports=[8080], replicas=2)
    found = fleet.tenant.wait(workload, "running")
    ports = [each["endpoints"][0]["address"] for each in found["assignments"]]
    assert ports == ["127.0.0.1:20000", "127.0.0.1:20008"]
    assert [ask(fleet.engine, each) for each in ports] == [200, 200]
    first = fleet.running(2)
    ids = {each["Id"] for each in first}
    status = fleet.agent.status()
    assert {each["state"] for each in status["assignments"]} == {"running"}
    # A new revision, one copy at a time; then fewer; then none.
    fleet.post(200, ports=[8080], replicas=2, env={"A": "2"})
    wait_for(
        "both are new",
        lambda: not ids & {c["Id"] for c in fleet.engine.containers().values()} or None,
        60,
    )
    found = fleet.tenant.wait(workload, "running")
    assert found["revision"] == 2
    second = fleet.running(2)
    assert all("A=2" in each["Config"]["Env"] for each in second)
    assert min(map(read_fence, second)) > max(map(read_fence, first))
    fleet.post(200, ports=[8080], replicas=1, env={"A": "2"})
    fleet.running(1)
    fleet.tenant.call("DELETE", f"/{workload['workload_id']}")
    fleet.gone()
    fleet.tenant.wait(workload, "deleted")
    assert fleet.engine.networks() == []


@pytest.fixture
def far_fleet(
    make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent], engine: Engine
) -> Iterator[Fleet]:
    """One whose registry is behind a slow line."""
    engine.clear()
    with slow_registry(engine.netns, 5997, 2e6) as registry:
        cp = make_cp(f"--registry={registry}", "--heartbeat-s=0.5")
        agent = make_agent(f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET))
        yield from run_fleet(cp, agent, engine)


def test_a_pull_says_how_far_it_is(far_fleet: Fleet) -> None:
    """To the customer with each heartbeat, to the provider at any time, of each copy that waits for
    it; then they run."""
    name = f"{far_fleet.tenant.namespace}/large"
    image = far_fleet.engine.push(name, extra=os.urandom(15_000_000))
    workload = far_fleet.post(image=image.removeprefix(f"{REGISTRY}/"), replicas=2)
    said: list[str] = []

    def runs() -> dict[str, Any] | None:
        found = far_fleet.tenant.get(workload)
        copies = sorted(found["assignments"], key=lambda each: each["replica"])
        if [each["state"] for each in copies] == ["pulling", "pulling"]:
            said.append(copies[0]["reason"])
            assert copies[1]["reason"] == said[-1]
            assert found["reasons"] == [f"replica {n}: {said[-1]}" for n in (0, 1)]
            assert found["state"] == "pending"
        return found if found["state"] == "running" else None

    wait_for("some of it", lambda: runs() or " of " in "".join(said), 20)
    shown = far_fleet.agent.status()["assignments"]
    assert [each["state"] for each in shown] == ["pulling", "pulling"]
    assert re.fullmatch("[0-9]+ of 1[67] MB", shown[0]["reason"])
    found = wait_for("running", runs, 30)
    assert (found["reasons"], found["assignments"][0]["reason"]) == ([], "")
    parsed = [re.fullmatch("([0-9]+) of ([0-9]+) MB", each) for each in said]
    steps = [(int(each[1]), int(each[2])) for each in parsed if each]
    print(f"a pull of some seconds said {[*dict.fromkeys(said)]}")
    assert steps == sorted(steps)
    assert len({*steps}) >= 4
    assert {whole for _, whole in steps} <= {16, 17}


def test_what_cannot_run_says_the_true_reason(fleet: Fleet) -> None:
    ends = fleet.post(name="ends", command=["/bin/sh", "-c", "exit 3"], restart="never")
    hungry = "x=a; while :; do x=$x$x; done"
    hog = fleet.post(name="hog", command=["/bin/sh", "-c", hungry], restart="never")
    gone = fleet.post(name="gone", image=f"{fleet.tenant.namespace}/no@sha256:{'0' * 64}")
    loop = fleet.post(name="loop", command=["/bin/sh", "-c", "exit 1"])
    with inside(fleet.engine.netns):
        other = socket.create_server(("127.0.0.1", 20_000))
    with other:
        taken = fleet.post(name="taken", ports=[8080])
        now, past = fleet.tenant.wait(taken, "running", 30)["assignments"]
        after = fleet.post(name="after", ports=[8080])
        (later,) = fleet.tenant.wait(after, "running", 30)["assignments"]
    said = "a port is taken on this host (it asks for 20000)"
    assert (past["state"], past["reason"]) == ("rejected", said)
    assert now["endpoints"][0]["address"].endswith(":20008")
    assert later["endpoints"][0]["address"].endswith(":20016")  # it was not tried at 20000
    assert "exit code 3" in fleet.tenant.wait(ends, "failed")["reasons"][0]
    assert "memory" in fleet.tenant.wait(hog, "failed")["reasons"][0]
    assert fleet.tenant.get(hog)["assignments"][0]["exit_code"] == 137
    wait_for("restarts", lambda: fleet.tenant.get(loop)["assignments"][0]["restarts"] or None, 20)
    wait_for("why", lambda: "exit code 1" in str(fleet.tenant.get(loop)["reasons"]), 20)

    def probe() -> bool:
        return "a host could not run it" in str(fleet.tenant.get(gone)["reasons"])

    wait_for("rejected", probe, 30)
    (past, *_) = fleet.list_past(gone)
    assert past["state"] == "rejected"
    assert past["reason"]


def read_logs(fleet: Fleet, workload: dict[str, Any], query: str = "") -> dict[str, Any]:
    """What the one copy of a workload printed, over the API."""
    status, answer = fleet.tenant.call("GET", f"/{workload['workload_id']}/logs{query}")
    assert status == 200, answer
    check_shape("Logs", answer)
    (log,) = answer["logs"]
    return dict(log)


def test_a_customer_reads_what_its_container_printed(fleet: Fleet) -> None:
    script = "for n in 1 2 3; do echo out $n; echo err $n >&2; done; exec sleep 1000"
    workload = fleet.post(command=["/bin/sh", "-c", script])
    found = fleet.tenant.wait(workload, "running")
    took = []
    for _ in range(3):
        began = time.monotonic()
        log = read_logs(fleet, workload)
        took.append(time.monotonic() - began)
    print(f"logs over the API after {[f'{s:.2f}' for s in took]} s")
    assert max(took) < 3
    assert sorted(log["lines"]) == [f"{kind} {n}" for kind in ("err", "out") for n in (1, 2, 3)]
    about = {key: found["assignments"][0][key] for key in ("assignment_id", "host_id", "replica")}
    assert log == {**about, "lines": log["lines"], "truncated": False, "reason": ""}
    assert read_logs(fleet, workload, "?tail=2")["lines"] == log["lines"][-2:]
    # As the README says it.
    url = f"http://127.0.0.1:{fleet.cp.http_port}/api"
    script = block("customer-logs").replace("https://cp.coledex.com/api", url)
    names = {"OPENINFRA_KEY": fleet.tenant.key, "WORKLOAD_ID": workload["workload_id"]}
    argv = ["env", *(f"{key}={value}" for key, value in names.items()), "bash", "-euc", script]
    shown = json.loads(subprocess.check_output(argv, timeout=15))
    assert shown == {key: log[key] for key in ("replica", "lines", "truncated", "reason")}
    only = f"?assignment_id={log['assignment_id']}"
    assert read_logs(fleet, workload, only) == log


def test_whatever_a_container_prints_is_an_answer(fleet: Fleet) -> None:
    """A megabyte, with and without lines, and bytes that are no text; of jobs that ended."""
    text = "x" * 100
    flood = f"n=0; while [ $n -lt 10000 ]; do echo {text} $n; n=$((n+1)); done"
    strange = r"echo -ne '\x1b[2J\x00\xff\xc2\x9b\r\n'; echo -n last"
    long = "dd if=/dev/zero bs=1000 count=1000 2>/dev/null"
    jobs = {
        name: fleet.post(
            name=name, command=["/bin/sh", "-c", script], restart="never", cpu_milli=300
        )
        for name, script in (("flood", flood), ("strange", strange), ("long", long))
    }
    for job in jobs.values():
        fleet.tenant.wait(job, "finished")
    log = read_logs(fleet, jobs["flood"])
    assert log["lines"] == [f"{text} {n}" for n in range(9_900, 10_000)]
    assert log["truncated"] is False
    log = read_logs(fleet, jobs["flood"], "?tail=1000")
    assert log["lines"][-1] == f"{text} 9999"
    assert log["truncated"] is True
    assert sum(len(line) + 1 for line in log["lines"]) == 32_768
    log = read_logs(fleet, jobs["strange"])
    assert log["lines"] == ["\x1b[2J\0\ufffd\ufffd\r", "last"]
    log = read_logs(fleet, jobs["long"])
    assert ("".join(log["lines"]), log["truncated"]) == ("\0" * 32_768, True)


def test_a_job_that_ended_is_not_run_again(fleet: Fleet) -> None:
    """Not by a restarted agent, and not when its container is gone; and it holds nothing."""
    job = fleet.post(name="job", command=["/bin/true"], restart="never", cpu_milli=1500)
    fleet.tenant.wait(job, "finished")
    other = fleet.post(name="other", cpu_milli=1500)
    fleet.tenant.wait(other, "running")
    fleet.engine.clear()
    fleet.agent.process.stop(signal.SIGKILL)
    fleet.start_agent()
    fleet.running(1)  # the other one's, made anew
    time.sleep(3)
    (found,) = fleet.running(1)
    assert found["Config"]["Labels"]["openinfra.workload"] == other["workload_id"]
    assert fleet.tenant.get(job)["state"] == "finished"


def test_kill_9_of_each_part_keeps_the_process(fleet: Fleet) -> None:
    workload = fleet.post()
    fleet.tenant.wait(workload, "running")
    (before,) = fleet.running()
    fleet.agent.process.stop(signal.SIGKILL)
    fleet.start_agent()
    fleet.engine.kill()
    fleet.engine.start()
    fleet.cp.stop(signal.SIGKILL)
    fleet.cp.start()
    wait_for("heard", lambda: fleet.cp.log.count("host online") or None)
    time.sleep(3)
    (after,) = fleet.running()
    assert (after["Id"], after["State"]["Pid"]) == (before["Id"], before["State"]["Pid"])
    assert fleet.tenant.get(workload)["state"] == "running"


def test_drain_and_revoke_take_the_process_away(fleet: Fleet) -> None:
    workload = fleet.post()
    fleet.tenant.wait(workload, "running")
    (host,) = fleet.cp.hosts()
    assert fleet.cp.command("drain", host["host_id"]).returncode == 0
    fleet.gone()
    fleet.cp.command("undrain", host["host_id"])
    fleet.running()
    fleet.tenant.wait(workload, "running")
    assert fleet.cp.command("revoke", host["host_id"]).returncode == 0
    assert fleet.agent.process.child.wait(60) == 78  # at its next heartbeat
    assert [each["State"]["Running"] for each in fleet.engine.containers().values()] in (
        [],
        [False],
    )


def test_a_post_is_a_process_soon(fleet: Fleet) -> None:
    """Beside what `docker run` takes for the same image on this machine."""
    workload = fleet.post(name="first")  # the image is there from then on
    fleet.tenant.wait(workload, "running")
    argv = ["docker", f"--host=unix://{fleet.engine.socket}", "run", "--detach", "--network=none"]
    argv += [f"{REGISTRY}/{fleet.image}", *HTTPD]
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True)
    docker_run_s = time.monotonic() - began
    took = []
    for number in range(5):
        began = time.monotonic()
        fleet.post(name=f"w{number}")
        fleet.running(2 + number)
        took.append(time.monotonic() - began)
    print(f"docker run {docker_run_s:.2f} s; post to process {[f'{s:.2f}' for s in took]} s")
    assert sorted(took)[2] <= 1.5 + docker_run_s


def read_fence(container: Any) -> int:
    """The fencing number that the workload reads in its environment."""
    (found,) = (e for e in container["Config"]["Env"] if e.startswith("OPENINFRA_FENCE="))
    return int(found.partition("=")[2])


def test_the_engine_refuses_nothing_that_cp_and_agent_agree_on(fleet: Fleet) -> None:
    """The largest and the oddest order that the API takes."""
    order: dict[str, Any] = {
        "command": ["/bin/sh", "-c", 'echo "$A"; sleep 1000', "--privileged", "\u00e9\n\t", ""],
        "env": {"A": "x" * 4000 + "\n=é", "_": "--cap-add=ALL", "B" * 100: ""},
        "ports": [1, 80, 65_535],
        "egress": "none",
        "cpu_milli": 10,
        "memory_bytes": 16 << 20,
        "restart": "on-failure",
    }
    workload = fleet.post(**order)
    fleet.tenant.wait(workload, "running")
    (found,) = fleet.running()
    assert found["Config"]["Cmd"] == order["command"]
    assert set(found["Config"]["Env"]) >= {f"{k}={v}" for k, v in order["env"].items()}
    assert fleet.engine.networks()[0].startswith("ox-")
    host = found["HostConfig"]
    assert (host["Privileged"], host["CapAdd"], host["Binds"]) == (False, None, None)
    assert json.dumps(host["PortBindings"]).count('"127.0.0.1"') == 3
    assert Path("/proc", str(found["State"]["Pid"])).exists()


BEAT_S = 6


@pytest.fixture
def deaf_fleet(
    tmp_path: Path,
    make_cp: Callable[..., ControlPlane],
    make_agent: Callable[..., Agent],
    engine: Engine,
) -> Iterator[Fleet]:
    engine.clear()
    scripts = change_scripts(tmp_path / "scripts", "cp_server.py", NUDGE_AFTER_S="()")
    cp = make_cp(f"--registry={REGISTRY}", f"--heartbeat-s={BEAT_S}", scripts=scripts)
    agent = make_agent(f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET))
    yield from run_fleet(cp, agent, engine)


def test_without_a_nudge_the_next_heartbeat_brings_the_list(deaf_fleet: Fleet) -> None:
    """A new and a deleted copy reach the host within one interval, with its jitter of 10 %."""
    lease = deaf_fleet.agent.directory / "lease.json"

    def time_until(assignment_id: str, is_there: bool) -> float:
        began_s = time.monotonic()
        wait_for(
            f"{assignment_id} in the list: {is_there}",
            lambda: (lease.exists() and assignment_id in lease.read_text()) == is_there or None,
            3 * BEAT_S,
        )
        return time.monotonic() - began_s

    def list_copies(workload: dict[str, Any]) -> list[dict[str, Any]]:
        return list(deaf_fleet.tenant.get(workload)["assignments"])

    def wait_for_beat() -> None:
        """Until a heartbeat was just accepted: the next is a whole interval away."""
        before = deaf_fleet.cp.hosts()[0]["last_heartbeat_at"]
        wait_for(
            "a heartbeat",
            lambda: deaf_fleet.cp.hosts()[0]["last_heartbeat_at"] != before or None,
            3 * BEAT_S,
        )

    new_s, gone_s = [], []
    for number in range(2):
        wait_for_beat()
        ordered_s = time.monotonic()
        workload = deaf_fleet.post(name=f"web{number}")
        copy = wait_for("a place", functools.partial(list_copies, workload))[0]
        time_until(copy["assignment_id"], True)
        new_s.append(time.monotonic() - ordered_s)
        deaf_fleet.tenant.wait(workload, "running")
        wait_for_beat()
        deaf_fleet.tenant.call("DELETE", f"/{workload['workload_id']}")
        gone_s.append(time_until(copy["assignment_id"], False))
        deaf_fleet.tenant.wait(workload, "deleted")
    print(f"without nudges: new after {new_s} s, gone after {gone_s} s")
    for took in (new_s, gone_s):
        assert max(took) < 1.1 * BEAT_S + 1
        assert max(took) > 2  # no nudge came
    nudges = read_metrics(deaf_fleet.cp)["openinfra_nudges_total"]
    assert nudges >= 4  # not for want of trying
