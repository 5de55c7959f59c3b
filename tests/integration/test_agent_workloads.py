"""The real agent with a real engine: assignments become containers, and end with their right.

The control plane is a script here: what it asks for, how long it lets the host run it, and when it
falls silent. It heartbeats each 30 s, so that all that is quick comes by nudges and by news.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message

import agent as agent_script
from proto import openinfra_pb2 as pb
from proto import openinfra_pb2_grpc
from tests.cis import list_broken
from tests.engine import REGISTRY, Engine
from tests.fuzz_tool import mutate
from tests.harness import (
    ROOT,
    Agent,
    Netns,
    Process,
    change_scripts,
    inside,
    make_netns,
    read_seed,
    wait_for,
)
from tests.integration.test_agent_faults import check_clock, set_clock

BODY = "oi1_abcdefghij234567_" + "A" * 43
TOKEN = f"{BODY}_{zlib.crc32(BODY.encode()):08x}"
HOST_ID = "2b6f0cc9-04ef-4e5d-9f4e-3d1c5a8b7e60"
ADDRESS = "10.77.0.1"
LOOP = ["sh", "-c", "trap exit TERM; while :; do sleep 0.1; done"]
SELF = "id; cat /proc/self/status; touch /tmp/x && echo tmp; touch /x; touch /data/x && echo data"
SLEEP = ["sleep", "1000"]
PYTHON = "/usr/bin/python3"


class Plane(openinfra_pb2_grpc.AgentApiServicer):
    """A control plane of a few words, at 10.77.0.1 in a namespace."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self.desired = pb.Desired()
        self.lease_s = 600
        self.next_ms = 30_000
        self.refusal = ""
        self.is_silent = False
        self.log_requests: dict[int, pb.LogRequest] = {}
        self.logs: list[pb.LogAnswer] = []
        self.losses = 0  # heartbeats with logs that will get lost
        self.is_losing = False  # every answer gets lost
        self.earnings: dict[int, pb.EarningsReply] = {}  # by cursor
        self.asked: list[tuple[str, int, str]] = []
        self.beats: list[tuple[float, pb.HeartbeatRequest]] = []
        self.observed = pb.Observed()
        self.facts = pb.Facts()
        self.server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        openinfra_pb2_grpc.add_AgentApiServicer_to_server(self, self.server)
        with inside(netns):
            assert self.server.add_insecure_port(f"{ADDRESS}:9092")
        self.server.start()

    def _check(self, context: grpc.ServicerContext) -> None:
        reason = "TRY_LATER" if self.is_silent else self.refusal
        if reason:
            context.set_trailing_metadata((("openinfra-reason", reason),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "as the test says; wait")

    def Register(
        self, request: pb.RegisterRequest, context: grpc.ServicerContext
    ) -> pb.RegisterReply:
        self._check(context)
        self.facts = request.facts
        invite = request.invite_token.split("_")[1]
        return pb.RegisterReply(host_id=HOST_ID, heartbeat_interval_s=30, invite_id=invite)

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        self._check(context)
        assert len(request.session) == 32
        return pb.ResumeReply(host_id=HOST_ID, heartbeat_interval_s=30)

    def ReadEarnings(
        self, request: pb.EarningsRequest, context: grpc.ServicerContext
    ) -> pb.EarningsReply:
        self._check(context)
        self.asked.append((request.month, request.cursor, request.assignment_id))
        if not self.earnings:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return self.earnings[request.cursor]

    def Heartbeat(
        self, request: pb.HeartbeatRequest, context: grpc.ServicerContext
    ) -> pb.HeartbeatReply:
        self._check(context)
        if request.HasField("observed"):
            self.observed = request.observed
        if request.HasField("facts"):
            self.facts = request.facts
        self.beats.append((time.monotonic(), request))
        standing = pb.Standing(status=pb.HOST_STATUS_ONLINE, assignable=True)
        reply = pb.HeartbeatReply(
            next_heartbeat_ms=self.next_ms, standing=standing, lease_s=self.lease_s
        )
        if self.is_losing or (request.logs and self.losses):
            self.losses -= bool(request.logs)
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        for answer in request.logs:
            self.log_requests.pop(answer.request_id, None)
            self.logs.append(answer)
        reply.log_requests.extend(self.log_requests.values())
        if request.desired_revision != self.desired.revision:
            reply.desired.CopyFrom(self.desired)
        return reply

    def post(self, *assignments: pb.Assignment) -> None:
        """Assign this and nothing else, and say so."""
        revision = self.desired.revision + 1
        self.desired = pb.Desired(revision=revision, assignments=assignments)
        self.nudge()

    def nudge(self) -> None:
        if self.beats and self.beats[-1][1].nudge_port:
            with inside(self.netns), socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.sendto(b"", (ADDRESS, self.beats[-1][1].nudge_port))

    def ask(self, assignment_id: str, lines: int = 100, limit_bytes: int = 32_768) -> None:
        """Ask for a log with the next reply."""
        number = len(self.logs) + len(self.log_requests) + 2**63
        self.log_requests[number] = pb.LogRequest(
            request_id=number,
            assignment_id=assignment_id,
            tail_lines=lines,
            limit_bytes=limit_bytes,
        )

    def read_log(self, assignment_id: str, *limits: int) -> pb.LogAnswer:
        """What the host answers; it may be no more than one answer."""
        before = len(self.logs)
        self.ask(assignment_id, *limits)
        self.nudge()
        wait_for("an answer", lambda: len(self.logs) > before, 15)
        time.sleep(0.1)
        (answer,) = self.logs[before:]
        return answer

    def state(self, assignment: pb.Assignment) -> pb.ObservedAssignment | None:
        """What the host said last of an assignment."""
        name = assignment.assignment_id
        return next((one for one in self.observed.assignments if one.assignment_id == name), None)

    def wait_state(
        self, assignment: pb.Assignment, state: str, timeout_s: float = 15
    ) -> pb.ObservedAssignment:
        """Wait until the host says that an assignment is so far."""
        wanted = pb.AssignmentState.Value(f"ASSIGNMENT_STATE_{state}")

        def probe() -> pb.ObservedAssignment | None:
            seen = self.state(assignment)
            return seen if seen is not None and seen.state == wanted else None

        try:
            return wait_for(f"{state}", probe, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said last: {self.state(assignment)}") from None


class World:
    """A namespace with an engine, an image, a control plane and one host."""

    def __init__(self, engine: Engine, image: str, plane: Plane, agent: Agent) -> None:
        self.engine, self.image, self.plane, self.agent = engine, image, plane, agent
        self.guard = f"--guard-file={agent.directory / 'guard.json'}"

    def assignment(self, command: list[str], **changes: Any) -> pb.Assignment:
        values: dict[str, Any] = {
            "assignment_id": str(uuid.uuid4()),
            "fence": 7,
            "workload_id": str(uuid.uuid4()),
            "image": self.image,
            "command": command,
            "env": {"GREETING": "hello"},
            "cpu_milli": 400,
            "memory_bytes": 16 << 20,
            "egress": pb.EGRESS_INTERNET,
            "restart": pb.RESTART_ALWAYS,
            **changes,
        }
        return pb.Assignment(**values)

    def start(self) -> None:
        """Start the agent; wait until it was heard."""
        before = len(self.plane.beats)
        self.agent.start(self.guard)
        self.agent.process.wait_log("INFO agent starting")
        try:
            wait_for("a heartbeat", lambda: len(self.plane.beats) > before, 15)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.agent.log}") from None

    def container(self, assignment: pb.Assignment) -> dict[str, Any]:
        return self.engine.containers().get(f"oi-{assignment.assignment_id}", {})

    def run(self, command: list[str], **changes: Any) -> pb.Assignment:
        """Assign one workload; wait until it runs."""
        made = self.assignment(command, **changes)
        self.plane.post(made)
        self.plane.wait_state(made, "RUNNING")
        return made

    def fetch(self, port: int) -> str:
        """What the host's port answers."""
        with inside(self.engine.netns), socket.create_connection((ADDRESS, port), 5) as sock:
            sock.settimeout(5)
            return sock.recv(100).decode()


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    health = {"Test": ["CMD", "touch", "/tmp/health"], "Interval": 1_000_000_000}
    config = {"Volumes": {"/data": {}}, "Env": ["PATH=/bin"], "Healthcheck": health}
    return engine.push("acme/box", config)


@pytest.fixture
def world(
    engine: Engine, image: str, make_agent: Callable[..., Agent], request: pytest.FixtureRequest
) -> Iterator[World]:
    python = getattr(request, "param", PYTHON)
    with running_world(engine, image, make_agent, python) as made:
        yield made


@contextlib.contextmanager
def running_world(
    engine: Engine, image: str, make_agent: Callable[..., Agent], python: str
) -> Iterator[World]:
    """A host on this engine; all that is on it goes at the end."""
    plane = Plane(engine.netns)
    agent = make_agent(f"{ADDRESS}:9092", TOKEN, netns=engine.netns, python=python)
    agent.engine_socket = engine.socket
    # `ip netns exec` has a /sys of its own.
    agent.cgroup = Path(f"/proc/{os.getpid()}/root{engine.cgroup}")
    (agent.directory / "guard.json").write_text('{"at_s": 1e12}')
    agent.limits_file.write_text("CPUS=2\nMEMORY=200M\n")
    made = World(engine, image, plane, agent)
    try:
        made.start()
        yield made
    finally:
        if agent.started:
            agent.process.stop(signal.SIGKILL)
        plane.server.stop(0).wait()
        engine.clear()


@pytest.mark.parametrize("world", [PYTHON, sys.executable], indirect=True)
def test_an_assignment_runs_in_its_sandbox_until_it_leaves_the_list(world: World) -> None:
    plane, engine = world.plane, world.engine
    assert (plane.facts.engine_version[:2], plane.facts.unready) == ("20", "")
    assert (plane.facts.offered_cpu_milli, plane.facts.offered_memory_bytes) == (2000, 200 << 20)
    script = f"{SELF}; echo $GREETING; while :; do echo served | nc -l -p 80; done"
    made = world.assignment(
        ["sh", "-c", script], ports=[pb.Port(container_port=80, host_port=20_000)]
    )
    posted_s = time.monotonic()
    plane.post(made)
    wait_for("running", lambda: world.container(made).get("State", {}).get("Running"), 6)
    ran_s = time.monotonic() - posted_s
    print(f"post to running: {ran_s:.2f} s")
    assert ran_s < 4  # 1.5 s, and the time of an engine on two busy processors
    seen = plane.wait_state(made, "RUNNING")
    assert (seen.reason, seen.restarts, seen.HasField("exit_code")) == ("", 0, False)
    assert wait_for("port", lambda: world.fetch(20_000)) == "served\n"
    said = engine.logs(f"oi-{made.assignment_id}")
    for line in (
        "uid=65534 gid=65534",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ):
        assert line in said, said
    for line in (
        "CapBnd:\t0000000000000000",
        "/x: Read-only file system",
        "tmp\n",
        "data\n",
        "hello\n",
    ):
        assert line in said, said
    # Its root, if it had one, would be nobody here.
    pid = world.container(made)["State"]["Pid"]
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "100000", "65536"]
    name = "oi-" + made.assignment_id.replace("-", "")[:11]
    assert engine.networks() == [name]
    status = world.agent.status()["assignments"]
    assert [(one["id"], one["state"], one["image"]) for one in status] == [
        (made.assignment_id, "running", world.image)
    ]
    assert world.image in world.agent.run_command("status").stdout

    plane.post()
    wait_for("gone", lambda: not engine.containers() and not engine.networks(), 5)
    wait_for("empty", lambda: not plane.observed.assignments and plane.observed.revision == 2)


RESOLVERS, ROUTER, OUTSIDE, ANSWER = ("9.9.9.9", "1.1.1.1"), "45.83.0.1", "45.83.0.2", "45.83.0.7"


class Resolver(threading.Thread):
    """A public name server of the internet behind the engine's namespace: each name is ANSWER."""

    def __init__(self, netns: Netns, address: str) -> None:
        super().__init__(daemon=True)
        self.asked: list[tuple[str, bytes]] = []
        with inside(netns):
            self.sock = socket.socket(type=socket.SOCK_DGRAM)
            self.sock.bind((address, 53))

    def run(self) -> None:
        """RFC 1035: the question again, and an address if it is one for that."""
        while (got := self.sock.recvfrom(512))[0]:
            raw, peer = got
            end = raw.index(0, 12) + 5
            self.asked.append((peer[0], raw[12 : end - 5]))
            is_a = raw[end - 4 : end - 2] == b"\0\x01"
            row = b"\xc0\x0c\0\x01\0\x01\0\0\x0e\x10\0\x04" + socket.inet_aton(ANSWER)
            head = raw[:2] + b"\x81\x80\0\x01\0" + bytes([is_a]) + bytes(4)
            self.sock.sendto(head + raw[12:end] + row * is_a, peer)

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it says that nobody is connected, and wakes the thread
            self.sock.shutdown(socket.SHUT_RDWR)
        self.join()
        self.sock.close()


@pytest.fixture
def resolvers(engine: Engine) -> Iterator[dict[str, Resolver]]:
    """The internet and both name servers, behind the host's own firewall."""
    table = agent_script.render_table()
    with make_netns() as internet, contextlib.ExitStack() as stack:
        name = engine.netns.name
        for line in (
            f"-n {name} link add lan type veth peer name lan netns {internet.name}",
            f"-n {name} addr add {OUTSIDE}/24 dev lan",
            f"-n {name} link set lan up",
            f"-n {internet.name} addr add {ROUTER}/24 dev lan",
            *(f"-n {internet.name} addr add {each}/32 dev lo" for each in RESOLVERS),
            f"-n {internet.name} link set lan up",
            f"-n {name} route add default via {ROUTER}",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        nft = engine.netns.argv(["nft", "--file", "-"])
        subprocess.run(nft, input=table.encode(), check=True)
        delete = engine.netns.argv(["nft", "delete", "table", *agent_script.NFT_TABLE])
        stack.callback(subprocess.run, delete, check=True)
        made = {each: Resolver(internet, each) for each in RESOLVERS}
        for each in made.values():
            each.start()
            stack.callback(each.stop)
        yield made


def test_a_workload_resolves_names(world: World, resolvers: dict[str, Resolver]) -> None:
    """By the engine's own resolver, from its namespace, at the public ones and no other."""
    script = "cat /etc/resolv.conf; while :; do nslookup -type=a a.example.org && break; done"
    made = world.run(["sh", "-c", f"{script}; sleep 1000"])
    name = f"oi-{made.assignment_id}"
    wait_for("an address", lambda: f"Address: {ANSWER}" in world.engine.logs(name) or None, 20)
    assert "nameserver 127.0.0.11" in world.engine.logs(name)
    first, second = resolvers.values()
    assert first.asked[0] == (OUTSIDE, b"\x01a\x07example\x03org")  # masqueraded
    assert second.asked == []


def test_a_workload_without_egress_resolves_nothing(
    world: World, resolvers: dict[str, Resolver]
) -> None:
    """A name is a way out too."""
    script = "nslookup -type=a secret.example.org; echo done; sleep 1000"
    made = world.run(["sh", "-c", script], egress=pb.EGRESS_NONE)
    name = f"oi-{made.assignment_id}"
    wait_for("its end", lambda: "done" in world.engine.logs(name) or None, 60)
    assert ANSWER not in world.engine.logs(name)
    assert [each.asked for each in resolvers.values()] == [[], []]


# What would break each rule, in the body of a container.
LOOSE: dict[str, dict[str, Any]] = {
    "5.2": {"HostConfig": {"SecurityOpt": ["no-new-privileges", "apparmor=unconfined"]}},
    "5.4": {"HostConfig": {"CapAdd": ["NET_RAW"]}},
    "5.5": {"HostConfig": {"Privileged": True, "UsernsMode": "host"}},
    "5.6": {"HostConfig": {"Binds": ["/etc:/host:ro"]}},
    "5.8": {"HostConfig": {"PortBindings": {"80/tcp": [{"HostIp": ADDRESS, "HostPort": "80"}]}}},
    "5.9": {"HostConfig": {"PublishAllPorts": True}},
    "5.10": {"HostConfig": {"NetworkMode": "none"}, "NetworkingConfig": {}},
    "5.11": {"HostConfig": {"MemorySwap": -1}},
    "5.12": {"HostConfig": {"NanoCpus": 0}},
    "5.13": {"HostConfig": {"ReadonlyRootfs": False}},
    "5.14": {"HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "20009"}]}}},
    "5.15": {"HostConfig": {"RestartPolicy": {"Name": "always"}}},
    "5.16": {"HostConfig": {"PidMode": "host", "UsernsMode": "host"}},
    "5.17": {"HostConfig": {"IpcMode": "shareable"}},
    "5.18": {"HostConfig": {"DeviceCgroupRules": ["c 1:3 rwm"]}},
    "5.19": {"HostConfig": {"Ulimits": []}},
    "5.20": {"HostConfig": {"Binds": ["/tmp:/host:rshared"]}},
    "5.21": {"HostConfig": {"UTSMode": "host"}},
    "5.22": {"HostConfig": {"SecurityOpt": ["no-new-privileges", "seccomp=unconfined"]}},
    "5.25": {"HostConfig": {"CgroupParent": "/elsewhere"}},
    "5.26": {"HostConfig": {"SecurityOpt": []}},
    "5.29": {"HostConfig": {"PidsLimit": 0}},
    "5.30": {"HostConfig": {"NetworkMode": "default"}, "NetworkingConfig": {}},
    "5.31": {"HostConfig": {"UsernsMode": "host"}},
    "5.32": {"HostConfig": {"Binds": ["/run/x.sock:/x.sock:ro"]}},
    "no": {"Healthcheck": None},
    "nobody": {"User": "0"},
    "": {},
}


def test_the_rules_of_the_cis_benchmark_are_met_and_seen_to_be_broken(world: World) -> None:
    """By a container of the agent's, and each by the same with one thing else in its body."""
    made = world.run(SLEEP, ports=[pb.Port(container_port=80, host_port=20_008)])
    seen = world.container(made)
    assert list_broken(seen) == []
    assert seen["Id"] in Path(f"/proc/{seen['State']['Pid']}/cgroup").read_text()
    wish = agent_script.parse_assignment(made, agent_script.Limits(2000, 200 << 20))
    for rule, change in LOOSE.items():
        body = agent_script.render_container(wish, ADDRESS, world.agent.secrets_dir)
        body |= {key: value for key, value in change.items() if key != "HostConfig"}
        body["HostConfig"] |= change.get("HostConfig", {})
        body["HostConfig"]["Tmpfs"]["/data"] = ""  # the image's volume, as the agent has it
        body["Labels"] = {}
        status, told = world.engine.call("POST", f"/containers/create?name=loose-{rule}", body)
        assert status == 201, (rule, told)
        seen = world.engine.containers("")[f"loose-{rule}"]
        broken = [re.split("[ ,]", name)[0] for name in list_broken(seen)]
        assert (rule in broken) if rule else (broken == []), (rule, broken)


def test_slow_ends_and_slow_pulls_hold_up_nobody(world: World) -> None:
    """Who ignores SIGTERM is killed; a registry that does not answer is tried some times."""
    deaf = world.run(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    left_s = time.monotonic()
    pull = world.assignment(SLEEP, image=f"127.0.0.1:5999/acme/box@sha256:{'0' * 64}")
    other = world.assignment(LOOP)
    world.plane.post(pull, other)
    world.plane.wait_state(deaf, "STOPPING")
    world.plane.wait_state(pull, "PULLING")
    world.plane.wait_state(other, "RUNNING", 5)
    wait_for("gone", lambda: not world.container(deaf) and len(world.engine.networks()) == 1, 15)
    assert 10 <= time.monotonic() - left_s < 13
    world.plane.nudge()
    wait_for("news", lambda: "connection refused" in str(world.plane.state(pull)))


def test_a_changed_wish_replaces_and_a_stranger_is_left_alone(world: World) -> None:
    engine = world.engine
    body = {"Image": world.image, "Cmd": LOOP, "HostConfig": {"NetworkMode": "none"}}
    made = world.run(LOOP)
    assert engine.call("POST", "/containers/create?name=stranger", body)[0] == 201
    assert engine.call("POST", "/containers/stranger/start")[0] == 204
    first = world.container(made)
    made.env["GREETING"] = "bye"
    made.egress = pb.EGRESS_NONE
    world.plane.post(made)

    def replaced() -> bool:
        found = world.container(made)
        return bool(found) and found["Id"] != first["Id"] and found["State"]["Running"]

    wait_for("another container", replaced)
    assert "GREETING=bye" in world.container(made)["Config"]["Env"]
    assert engine.networks() == ["ox-" + made.assignment_id.replace("-", "")[:11]]
    world.plane.wait_state(made, "RUNNING")
    world.plane.post()
    wait_for("gone", lambda: not engine.containers())
    assert engine.containers("")["stranger"]["State"]["Running"]


def test_an_agent_that_was_killed_adopts_what_runs(world: World) -> None:
    made = world.run(LOOP, ports=[pb.Port(container_port=8080, host_port=20_000)])
    before = world.container(made)
    lease = json.loads(world.agent.lease_file.read_text())
    assert (lease["assignments"], lease["ports"]) == ([made.assignment_id], [20_000])
    assert world.agent.lease_file.stat().st_mode & 0o777 == 0o600
    world.agent.process.stop(signal.SIGKILL)
    world.plane.is_silent = True  # the right of the lease file is enough
    world.agent.start(world.guard)
    wait_for("trouble", lambda: "cannot take requests now" in world.agent.log)
    time.sleep(2)
    assert world.container(made)["State"] == before["State"]
    # Nor does its port close, which the guard opens by that file.
    assert json.loads(world.agent.lease_file.read_text()) == lease
    world.plane.is_silent = False
    beats = len(world.plane.beats)
    wait_for("a heartbeat", lambda: len(world.plane.beats) > beats)
    assert world.plane.beats[beats][1].desired_revision == 0
    world.plane.wait_state(made, "RUNNING")
    time.sleep(1)
    after = world.container(made)
    assert (after["Id"], after["State"]) == (before["Id"], before["State"])
    # An ordinary stop leaves it too.
    assert world.agent.process.stop() == 0
    assert world.container(made)["State"] == before["State"]


def test_a_lease_of_another_boot_is_no_right(world: World) -> None:
    made = world.run(LOOP)
    world.agent.process.stop(signal.SIGKILL)
    lease = json.loads(world.agent.lease_file.read_text())
    world.agent.lease_file.write_text(json.dumps({**lease, "boot_id": "another"}))
    world.plane.is_silent = True
    world.agent.start(world.guard)
    wait_for("stopped", lambda: not world.container(made)["State"]["Running"])


def test_a_workload_outlives_its_engine(world: World) -> None:
    made = world.run(LOOP)
    before = world.container(made)
    world.engine.kill()
    try:
        wait_for("trouble", lambda: "container engine does not answer" in world.agent.log, 15)
        wait_for("facts", lambda: "no container engine answers" in world.plane.facts.unready)
        done = world.agent.run_command("doctor", "--allow-unencrypted", world.guard)
        assert "sudo systemctl restart openinfra-engine" in done.stdout
    finally:
        world.engine.start()
    wait_for("facts", lambda: not world.plane.facts.unready, 20)
    assert "container engine answers again" in world.agent.log
    after = world.container(made)
    assert (after["Id"], after["State"]["StartedAt"]) == (
        before["Id"],
        before["State"]["StartedAt"],
    )
    assert world.plane.wait_state(made, "RUNNING").restarts == 0


def list_secrets(world: World) -> list[str]:
    """All secrets on the host."""
    directory = world.agent.secrets_dir
    return sorted(str(path.relative_to(directory)) for path in directory.glob("*/*"))


READS = ["sh", "-c", "cat /run/secrets/*; trap exit TERM; while :; do sleep 0.1; done"]


def test_secrets_are_there_as_long_as_their_workload(world: World) -> None:
    """An agent that was killed adopts what runs with its files, and ends what is over."""
    assert world.plane.facts.takes_secrets
    made = world.run(READS, secrets={"token": b"one\n"})
    path = world.agent.secrets_dir / made.assignment_id
    before, inode = world.container(made), path.stat().st_ino
    assert list_broken(before, world.agent.secrets_dir) == []
    (rule,) = list_broken(before, world.agent.secrets_dir / "x")
    assert rule.startswith("5.6 nothing of the host")
    wait_for("its words", lambda: "one" in world.engine.logs(f"oi-{made.assignment_id}"))
    world.agent.process.stop(signal.SIGKILL)
    (world.agent.secrets_dir / f".{made.assignment_id}.new").mkdir()
    stray = world.agent.secrets_dir / str(uuid.uuid4())
    stray.mkdir()
    (stray / "token").write_text("of another life")
    world.plane.is_silent = True
    world.agent.start(world.guard)
    wait_for("the stray is gone", lambda: not stray.exists())
    time.sleep(2)
    assert world.container(made)["State"] == before["State"]
    assert (path.stat().st_ino, list_secrets(world)) == (inode, [f"{made.assignment_id}/token"])
    world.plane.is_silent = False
    world.plane.wait_state(made, "RUNNING", 20)
    assert (path.stat().st_ino, world.container(made)["Id"]) == (inode, before["Id"])
    world.plane.post()
    wait_for("gone", lambda: not world.engine.containers() or None)
    wait_for("its files too", lambda: not [*world.agent.secrets_dir.iterdir()] or None)


def test_after_a_boot_nothing_starts_before_its_secrets_are_here(world: World) -> None:
    made = world.run(READS, secrets={"token": b"one\n"})
    world.agent.process.stop(signal.SIGKILL)
    # What a boot leaves: containers that have ended, and nothing in memory.
    world.engine.call("POST", f"/containers/oi-{made.assignment_id}/kill")
    shutil.rmtree(world.agent.secrets_dir)
    lease = json.loads(world.agent.lease_file.read_text())
    world.agent.lease_file.write_text(json.dumps({**lease, "boot_id": "another"}))
    world.plane.is_silent = True
    world.agent.start(world.guard)
    wait_for("trouble", lambda: "cannot take requests now" in world.agent.log)
    time.sleep(2)
    assert not world.container(made)["State"]["Running"]
    # The engine does not start it either, whoever asks.
    status, said = world.engine.call("POST", f"/containers/oi-{made.assignment_id}/start")
    assert status >= 400, said
    world.plane.observed = pb.Observed()  # what it said before
    world.plane.is_silent = False
    world.plane.wait_state(made, "RUNNING", 30)
    assert list_secrets(world) == [f"{made.assignment_id}/token"]
    said = world.engine.logs(f"oi-{made.assignment_id}")
    assert said.count("one") == 2


def test_withheld_secrets_are_those_that_are_here_or_none(world: World) -> None:
    made = world.run(READS, secrets={"token": b"one\n"})
    before = world.container(made)
    made.ClearField("secrets")
    made.secrets_withheld = True
    other = world.assignment(READS, secrets_withheld=True)
    world.plane.post(made, other)
    rejected = world.plane.wait_state(other, "REJECTED")
    assert "cannot read its secrets now" in rejected.reason
    assert (world.container(made)["Id"], world.container(other)) == (before["Id"], {})
    world.engine.call("POST", f"/containers/oi-{made.assignment_id}/kill")
    wait_for("again", lambda: world.container(made)["RestartCount"] == 0 or None)
    wait_for(
        "another run of it",
        lambda: world.engine.logs(f"oi-{made.assignment_id}").count("one") == 2 or None,
        15,
    )
    # Its files are lost as well: it cannot be started here any more.
    shutil.rmtree(world.agent.secrets_dir / made.assignment_id)
    world.engine.call("POST", f"/containers/oi-{made.assignment_id}/kill")
    assert "none are here" in world.plane.wait_state(made, "REJECTED", 20).reason
    assert world.container(made) == {}


def test_secrets_that_no_file_may_hold_are_refused_here_too(world: World) -> None:
    bad = world.assignment(SLEEP, secrets={"../token": b"one"})
    image = world.engine.push("acme/greedy", {"Volumes": {"/run/secrets/x": {}}})
    greedy = world.assignment(SLEEP, image=image, secrets={"token": b"one"})
    ended = world.assignment(["true"], restart=pb.RESTART_NEVER, secrets={"token": b"one"})
    world.plane.post(bad, greedy, ended)
    assert "none of a file" in world.plane.wait_state(bad, "REJECTED").reason
    assert "no place here" in world.plane.wait_state(greedy, "REJECTED").reason
    world.plane.wait_state(ended, "FINISHED")
    wait_for("no file", lambda: not [*world.agent.secrets_dir.iterdir()] or None)


@contextlib.contextmanager
def empty_engine(path: Path, asks: int) -> Iterator[threading.Event]:
    """A socket in an engine's place that has nothing, and takes a moment to say so.

    It answers so many requests, all of which have to come; the event is set at each.
    """
    asked = threading.Event()

    def serve() -> None:
        for _ in range(asks):
            with server.accept()[0] as client:
                client.recv(65_536)
                asked.set()
                time.sleep(0.1)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join()


def make_workloads(path: Path) -> agent_script.Workloads:
    """What an agent knows of workloads at its start, with the engine at a socket."""
    return agent_script.Workloads(
        engine=agent_script.Engine(path),
        ended_file=Path("none"),
        secrets_dir=path.with_name("secrets"),
        limits=agent_script.Limits(1000, 1 << 30),
        threads=ThreadPoolExecutor(2),
        pulls=asyncio.Semaphore(1),
        quick=asyncio.Semaphore(1),
        stops=asyncio.Semaphore(1),
        log_reads=asyncio.Semaphore(1),
        saving=asyncio.Lock(),
        stirred=asyncio.Event(),
    )


def test_the_version_is_asked_for_when_another_engine_answers(tmp_path: Path) -> None:
    """Not each time: an engine starts three programs to tell it."""
    asked: list[str] = []
    told = {"server": "Docker/20.10.24 (linux)", "version": "20.10.24"}

    def serve() -> None:
        for _ in range(7):
            with server.accept()[0] as client:
                asked.append(client.recv(65_536).split()[1].decode())
                body = json.dumps({"Version": told["version"], "MinAPIVersion": "1.12"})
                body = "OK" if asked[-1] == "/_ping" else body
                head = f"Server: {told['server']}\r\nContent-Length: {len(body)}"
                client.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}".encode())

    async def see() -> list[str]:
        workloads, seen = make_workloads(tmp_path / "engine"), []
        for version in ("20.10.24", "20.10.24", "20.10.24", "26.1.5", "26.1.5"):
            told.update(server=f"Docker/{version} (linux)", version=version)
            workloads.engine_asked_s = -agent_script.ENGINE_VERSION_AGE_S
            await agent_script.ask_version(workloads)
            assert workloads.engine_error == ""
            seen.append(workloads.engine_version)
        workloads.threads.shutdown()
        return seen

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "engine"))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        assert asyncio.run(see()) == ["20.10.24"] * 3 + ["26.1.5"] * 2
        thread.join()
    ping, version = "/_ping", "/version"
    assert asked == [ping, version, ping, ping, ping, version, ping]


def test_answers_go_out_as_far_as_there_is_room() -> None:
    async def pop(*rooms: int) -> list[list[int]]:
        one = make_workloads(Path("none"))
        sizes = {1: 50_000, 2: 20_000, 3: 5_000}

        async def answer(number: int) -> pb.LogAnswer:
            if number == 4:
                await asyncio.sleep(9)
            return pb.LogAnswer(request_id=number, content=b"x" * sizes[number])

        one.logs = {number: asyncio.create_task(answer(number)) for number in (1, 2, 3, 4)}
        await asyncio.sleep(0)
        popped = [[each.request_id for each in agent_script.pop_logs(one, room)] for room in rooms]
        assert 4 in one.logs
        one.logs[4].cancel()
        one.threads.shutdown()
        return popped

    assert asyncio.run(pop(60_000, 60_000, 60_000)) == [[1, 3], [2], []]
    assert asyncio.run(pop(10, 5_020, -1, 20_020)) == [[], [3], [], [2]]


def test_what_carries_our_label_and_no_assignment_is_not_told() -> None:
    """The control plane would refuse the whole heartbeat, again and again."""
    workloads = make_workloads(Path("none"))
    row = {"Id": "1", "Names": ["/x"], "Labels": {agent_script.LABEL: "x"}, "State": "running"}
    workloads.containers = (agent_script.parse_container(row, None),)
    assert not agent_script.render_observed(workloads, "").assignments
    workloads.threads.shutdown()


@pytest.mark.parametrize(("state", "hastens"), [("WAITING", True), ("PULLING", False)])
def test_a_new_reason_is_told_soon_unless_it_is_how_far_a_pull_is(
    monkeypatch: pytest.MonkeyPatch, state: str, hastens: bool
) -> None:
    one = make_workloads(Path("none"))
    one.acknowledged = pb.Observed(revision=one.seen_revision)
    said = pb.Observed()
    row = said.assignments.add(
        assignment_id="a", state=pb.AssignmentState.Value(f"ASSIGNMENT_STATE_{state}")
    )
    monkeypatch.setattr(agent_script, "render_observed", lambda *_: said)
    agent: Any = SimpleNamespace(workloads=one, acknowledged_facts=None, wake=asyncio.Event())
    told = []
    for reason in ("after 8 s", "after 16 s", "after 16 s"):
        row.reason = reason
        agent.wake.clear()
        agent_script.note_observed(agent, "")
        told.append(agent.wake.is_set())
    assert told == [True, hastens, False]
    one.threads.shutdown()


def test_what_was_not_looked_for_is_not_said_to_be_gone(tmp_path: Path) -> None:
    """A start may be under way, or the list may be newer than what was seen of the engine."""
    path = tmp_path / "engine.sock"

    async def look() -> list[int]:
        loop = asyncio.get_running_loop()
        workloads = make_workloads(path)
        said = []

        async def see() -> None:
            await agent_script.look(workloads)
            said.append(agent_script.render_observed(workloads, "").revision)

        workloads.revision = 1
        await see()
        workloads.revision = 2
        workloads.tasks[str(uuid.uuid4())] = loop.create_task(asyncio.sleep(9))
        await see()  # something that is not in the list is being made
        for task in workloads.tasks.values():
            task.cancel()
        workloads.tasks = {}
        asked.clear()
        seeing = loop.create_task(see())
        await loop.run_in_executor(None, asked.wait, 5)
        workloads.revision = 3  # a list that came while the engine was looked at
        await seeing
        await see()
        workloads.threads.shutdown()
        return said

    with empty_engine(path, 8) as asked:
        assert asyncio.run(look()) == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("left_s", "skipped_s", "is_late"),
    [
        (585.0, 0.0, False),
        (585.0, -9e6, False),
        (585.0, 590.0, False),  # they may still be ending
        (585.0, 600.0, True),
        (-9.0, 0.0, False),
        (-10.0, 0.0, True),
    ],
)
def test_a_list_that_comes_late_tells_what_may_run_elsewhere(
    tmp_path: Path, left_s: float, skipped_s: float, is_late: bool
) -> None:
    """By the clock of the boot; or by a wall clock that was set, as after a pause of the machine.

    Nothing else is by that one: the right is what it is.
    """
    name, now_s = str(uuid.uuid4()), agent_script.read_boot_s()
    workloads = make_workloads(tmp_path / "engine.sock")
    workloads.saved_lease = agent_script.Lease(now_s + left_s, frozenset({name}))
    config = SimpleNamespace(control_plane="127.0.0.1:9092", lease_file=tmp_path / "lease.json")
    agent: Any = SimpleNamespace(
        workloads=workloads, config=config, pause=None, paused_s=0.0, boot_id="this"
    )
    workloads.wall_lead_s = time.time() - now_s - skipped_s
    reply = pb.HeartbeatReply(lease_s=600, desired=pb.Desired(revision=1))
    agent_script.take_reply(agent, reply, now_s)
    assert workloads.memory.late == ({name} if is_late else set())
    assert workloads.right_until_s == now_s + 585
    # The next list is in time.
    workloads.saved_lease = agent_script.Lease(now_s + 585, frozenset({"next"}))
    agent_script.take_reply(agent, reply, now_s)
    assert "next" not in workloads.memory.late
    workloads.threads.shutdown()


def test_what_was_done_while_the_engine_was_looked_at_is_not_done_again(
    world: World, tmp_path: Path
) -> None:
    """A container that is made between question and answer is in neither list."""
    path = tmp_path / "engine.sock"
    made = world.assignment(SLEEP)
    wish = agent_script.parse_assignment(made, agent_script.Limits(1000, 1 << 30))

    async def see() -> tuple[bool, bool]:
        loop = asyncio.get_running_loop()
        workloads = make_workloads(path)
        workloads.quick = asyncio.Semaphore(0)  # no step gets its turn
        key = made.assignment_id
        workloads.wishes, workloads.right_until_s = (wish,), agent_script.read_boot_s() + 600
        workloads.memory.pasts[key] = agent_script.Past(wish.sha256, has_image=True)
        workloads.tasks[key] = loop.create_task(asyncio.sleep(9))  # it makes the container
        looking = loop.create_task(agent_script.look(workloads))
        await loop.run_in_executor(None, asked.wait, 5)
        workloads.tasks.pop(key).cancel()
        await looking
        agent_script.begin_steps(workloads, "")
        first = key in workloads.tasks
        await agent_script.look(workloads)
        agent_script.begin_steps(workloads, "")
        second = key in workloads.tasks
        workloads.tasks.pop(key).cancel()
        workloads.threads.shutdown()
        return first, second

    with empty_engine(path, 4) as asked:
        assert asyncio.run(see()) == (False, True)


@pytest.mark.parametrize("stays", [False, True])
def test_the_guard_ends_what_a_dead_agent_does_not(
    world: World, tmp_path: Path, stays: bool
) -> None:
    """Only when the right is over: until then an agent may be restarted."""
    guard = world.agent
    flags = [f"--engine-socket={world.engine.socket}", f"--lease-file={guard.lease_file}"]
    flags += [f"--guard-file={guard.directory / 'guard.json'}"]
    argv = [sys.executable, str(ROOT / "agent.py"), "guard", *flags]
    argv = world.engine.netns.argv(argv)
    world.plane.lease_s = 30
    made = world.run(SLEEP, ports=[pb.Port(container_port=80, host_port=20_007)])
    until_s = json.loads(guard.lease_file.read_text())["until_s"]
    guard.process.stop(signal.SIGKILL)
    body = {"Image": world.image, "Cmd": SLEEP}
    _, stranger = world.engine.call("POST", "/containers/create", body)
    world.engine.call("POST", f"/containers/{stranger['Id']}/start")
    with contextlib.ExitStack() as stack:
        if stays:
            watch = Process([*argv, "--watch"], tmp_path / "watch", {})
            stack.callback(watch.stop)
            wait_for("the copy", lambda: "flush opens it" in watch.log or None)
        else:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        table = ["nft", "list", "table", "inet", "openinfra"]
        listed = subprocess.check_output(world.engine.netns.argv(table), text=True)
        assert "tcp dport 20007 accept" in listed
        time.sleep(max(0.0, until_s + agent_script.GUARD_LATE_S - agent_script.read_boot_s() - 0.5))
        assert world.container(made)["State"]["Running"]
        time.sleep(0.5)
        name = f"oi-{made.assignment_id}"
        said = f"WARN workload ended: its right to run was over name={name}\n"
        if stays:
            wait_for("its end", lambda: said in watch.log, agent_script.WATCH_S + 2)
        else:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            # The stranger's bridge may have come up meanwhile: news of a network is told too.
            news = re.sub("INFO firewall follows what changed: .*\n", "", done.stderr)
            assert news == said, done.stderr
        assert not world.container(made)["State"]["Running"]
    assert world.engine.call("GET", f"/containers/{stranger['Id']}/json")[1]["State"]["Running"]
    subprocess.run(world.engine.netns.argv(["nft", "flush", "ruleset"]), check=True)


def test_earnings_come_page_by_page(world: World) -> None:
    """Also from a control plane that knows of none, that changes meanwhile, or goes on for ever."""

    def ask(*words: str) -> tuple[int, str]:
        world.plane.asked.clear()
        done = world.agent.run_command("earnings", "--allow-unencrypted", *words)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    code, said = ask()
    assert (code, "the control plane is older than this agent" in said) == (1, True)
    workload = f"{'n' * 40}/{'w' * 63}"
    for cursor, more in ((0, 2), (2, 0)):
        line = pb.EarningsLine(workload=workload, replica=cursor, share_micros=5)
        world.plane.earnings[cursor] = pb.EarningsReply(
            month="2026-10", currency="EUR", share_micros=10, lines=[line], next_cursor=more
        )
    code, said = ask("--json")
    assert code == 0
    found = json.loads(said)
    assert [(line["workload"], line["replica"]) for line in found["lines"]] == [
        (workload, 0),
        (workload, 2),
    ]
    assert world.plane.asked == [("", 0, ""), ("2026-10", 2, "")]
    assert "earned in 2026-10: 0.000010 EUR" in ask("--month=2026-10")[1]
    world.plane.earnings[2].share_micros = 11
    code, said = ask()
    assert (code, "an hour was closed meanwhile" in said) == (1, True)
    world.plane.earnings[2].share_micros = 10
    world.plane.earnings[2].next_cursor = 2
    del world.plane.earnings[2].lines[:]
    assert len(json.loads(ask("--json")[1])["lines"]) == 1
    assert len(world.plane.asked) == 2
    world.plane.earnings[2].lines.append(pb.EarningsLine(workload="\x1b[2J", replica=1))
    code, said = ask()
    assert (code, "too many lines" in said, "\x1b" in said) == (1, True, False)
    assert len(world.plane.asked) == agent_script.EARNINGS_PAGES
    world.plane.earnings[2].next_cursor = 0
    code, said = ask()
    assert (code, "\x1b" in said) == (0, False)
    # Hour by hour: a control plane that does not know of hours answers with lines.
    copy = str(uuid.uuid4())
    for _ in range(2):
        code, said = ask(f"--assignment={copy}")
        assert (code, "the control plane is older than this agent" in said) == (1, True)
        for page in world.plane.earnings.values():
            page.lines.add(hour_at="2026-10-31T20:00:00.000Z")
    for page in world.plane.earnings.values():
        for line in page.lines:
            line.hour_at, line.part = "2026-10-31T20:00:00.000Z\x1b", 1
    code, said = ask("--month=2026-10", f"--assignment={copy}")
    assert (code, said.count("\n2026-10-31T20:00/1 "), "\x1b" in said) == (0, 6, False)
    assert world.plane.asked == [("2026-10", 0, copy), ("2026-10", 2, copy)]
    code, said = ask("--assignment=web")
    assert (code, "no assignment" in said, world.plane.asked) == (2, True, [])


LOST = "WARN ended what the engine had lost: its start was cut off container={}\n"


def end_strays(engine: Engine, cgroup: Path | None = None, *more: str) -> tuple[int, str]:
    """Run `guard --strays` as its unit does: exit code and words."""
    argv = [sys.executable, str(ROOT / "agent.py"), "guard", "--strays", *more]
    argv[4:4] = [f"--engine-socket={engine.socket}", f"--cgroup={cgroup or engine.cgroup}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def forget_running(engine: Engine, container: str) -> None:
    """What dockerd's files say after a kill between containerd's start and its own note of it."""
    (path,) = engine.directory.glob(f"root/*/containers/{container}/config.v2.json")
    config = json.loads(path.read_text())
    config["State"] |= {"Running": False, "Pid": 0, "StartedAt": "0001-01-01T00:00:00Z"}
    path.write_text(json.dumps(config))


def test_a_start_that_the_engines_end_cut_off_is_ended(world: World) -> None:
    """Nothing of Docker's API shows that process, or ends it; others go on."""
    engine = world.engine
    made, other = (world.assignment(SLEEP) for _ in range(2))
    world.plane.post(made, other)
    for each in (made, other):
        world.plane.wait_state(each, "RUNNING")
    ids = [world.container(each)["Id"] for each in (made, other)]
    before = engine.processes()
    assert before.keys() >= {*ids}
    world.agent.process.stop(signal.SIGKILL)
    engine.kill()
    forget_running(engine, ids[0])
    engine.start(ends_strays=False)
    assert [is_running(world, each) for each in (made, other)] == [False, True]
    assert engine.processes() == before
    assert [end_strays(engine) for _ in range(2)] == [(0, LOST.format(ids[0])), (0, "")]
    assert engine.processes() == {key: pids for key, pids in before.items() if key != ids[0]}
    world.start()
    wait_for("it runs again", lambda: is_running(world, made), 20)
    assert engine.processes()[ids[1]] == before[ids[1]]


def test_a_start_that_was_cut_off_before_its_program_is_ended(world: World) -> None:
    """What is left of it waits for ever, and containerd does not list it either."""
    engine, made = world.engine, world.run(SLEEP)
    lost = world.container(made)["Id"]
    world.agent.process.stop(signal.SIGKILL)
    assert engine.call("POST", f"/containers/{lost}/kill")[0] == 204
    wait_for("its end", lambda: not is_running(world, made))
    # `runc create` is held up in its last step, and the end of containerd ends it there.
    bundle = engine.directory / "exec/containerd/daemon/io.containerd.runtime.v2.task/moby" / lost
    pid = (engine.directory / "exec/containerd/containerd.pid").read_text()
    argv = ["strace", "-f", "-qq", f"--attach={pid}", f"--trace-path={bundle}/init.pid"]
    argv += ["--trace=renameat", "--inject=renameat:delay_enter=60s", "--output=/dev/null"]
    with ThreadPoolExecutor(1) as worker, subprocess.Popen(argv) as strace:
        status = Path(f"/proc/{pid}/status")
        wait_for("strace", lambda: "TracerPid:\t0\n" not in status.read_text())
        starting = worker.submit(engine.call, "POST", f"/containers/{lost}/start")
        wait_for("the last step", (bundle / ".init.pid").exists)
        engine.kill()
        assert isinstance(starting.exception(), (OSError, http.client.HTTPException))
        strace.kill()
    engine.start(ends_strays=False)
    assert not is_running(world, made)
    (left,) = engine.processes()[lost]
    assert Path(f"/proc/{left}/cmdline").read_bytes() == b"runc\0init\0"
    argv = ["ctr", f"--address={engine.directory}/exec/containerd/containerd.sock"]
    assert lost not in subprocess.check_output(
        [*argv, "--namespace=moby", "tasks", "ls"], text=True
    )
    time.sleep(2)
    assert engine.processes()[lost] == [left]
    assert end_strays(engine) == (0, LOST.format(lost))
    assert lost not in engine.processes()
    world.start()
    wait_for("it runs again", lambda: is_running(world, made), 20)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_strays_are_found_as_systemd_names_their_groups(engine: Engine, is_frozen: bool) -> None:
    """In real groups of cgroup v2; what the engine has never heard of is ended, frozen or not."""
    v2 = Path("/sys/fs/cgroup/unified")
    cgroup = (v2 if v2.exists() else v2.parent) / f"oi-{uuid.uuid4()}.slice"
    names = [f"docker-{uuid.uuid4().hex * 2}.scope", f"other-{uuid.uuid4().hex * 2}.scope"]
    children = []
    try:
        for name in names:
            (cgroup / name).mkdir(parents=True)
            children.append(subprocess.Popen(["sleep", "1000"]))
            (cgroup / name / "cgroup.procs").write_text(str(children[-1].pid))
        (cgroup / "cgroup.freeze").write_text(f"{is_frozen:d}")
        elsewhere = str(cgroup / names[1] / "cgroup.procs")
        assert agent_script.end_stray("", elsewhere, [str(children[0].pid)]) == ""
        assert children[0].poll() is None
        assert end_strays(engine, cgroup) == (0, LOST.format(names[0][7:-6]))
        assert [child.poll() for child in children] == [-signal.SIGKILL, None]
    finally:
        for child in children:
            child.kill()
            child.wait()
        for path in (*map(cgroup.joinpath, names), cgroup):
            path.rmdir()


def test_strays_that_cannot_be_looked_for(engine: Engine, tmp_path: Path) -> None:
    """Of an engine that is not up nothing is lost yet, and without groups nothing runs."""
    assert end_strays(engine, tmp_path / "none") == (0, "")
    (tmp_path / "file").touch()
    code, said = end_strays(engine, tmp_path / "file")
    assert code == 1
    assert "cannot look for what the engine has lost: " in said
    assert end_strays(engine, tmp_path / "file", "--engine-socket=/nonexistent") == (0, "")


def test_an_engine_that_is_killed_while_it_removes_a_network_starts_again(world: World) -> None:
    """With what it leaves then, every start of it ends in a panic."""
    engine, door = world.engine, agent_script.Engine(world.engine.socket)
    served = ["sh", "-c", "while :; do echo served | nc -l -p 80; done"]
    port = [pb.Port(container_port=80, host_port=20_000)]
    web, other = world.assignment(served, ports=port), world.assignment(SLEEP)
    job = world.assignment(["sh", "-c", "exit 0"], restart=pb.RESTART_NEVER)
    world.plane.post(web, other, job)
    for each in (web, other):
        world.plane.wait_state(each, "RUNNING")
    world.plane.wait_state(job, "FINISHED")

    def serves() -> bool:
        with contextlib.suppress(OSError):
            return world.fetch(20_000) == "served\n"
        return False

    wait_for("port", serves)
    before = {name: one["Id"] for name, one in engine.containers().items()}
    gone = "oi-00000000000"
    body = {"Name": gone, "Labels": {agent_script.LABEL: "gone"}}
    assert engine.call("POST", "/networks/create", body)[0] == 201
    (notes,) = engine.directory.glob("root/*/network/files/local-kv.db")
    # Each note is two calls of fdatasync: it is being removed; its addresses are free; it is gone.
    argv = ["strace", "-f", "-qq", f"--attach={engine.dockerd.child.pid}", f"--trace-path={notes}"]
    argv += ["--trace=fdatasync", "--inject=fdatasync:signal=SIGKILL:when=5", "--output=/dev/null"]
    with subprocess.Popen(argv) as strace:
        pid = f"/proc/{engine.dockerd.child.pid}/status"
        wait_for("strace", lambda: "TracerPid:\t0\n" not in Path(pid).read_text())
        with pytest.raises(agent_script.EngineError):
            door.ask("DELETE", f"/networks/{gone}")
        assert engine.dockerd.child.wait(10) == -signal.SIGKILL
        strace.wait(10)
    engine.kill()
    engine.start()
    assert "index out of range" in engine.dockerd.log  # of the first start
    # What has a port is made anew, what runs without one runs on, and no job runs twice.
    wait_for("port", serves, 40)
    after = {name: one["Id"] for name, one in engine.containers().items()}
    assert after.keys() == before.keys()
    changed = {name for name, each in after.items() if before[name] != each}
    assert changed == {f"oi-{web.assignment_id}"}
    assert is_running(world, other)
    subprocess.run(["kill", str(world.container(other)["State"]["Pid"])], check=True)
    wait_for("it is made anew", lambda: is_running(world, other), 20)
    world.plane.post()
    wait_for("all is gone", lambda: engine.containers() == {} and engine.networks() == [], 30)
    # Its own networks, which no workload uses, are there after the next start with none running.
    engine.kill()
    engine.start()
    names = {row["Name"] for row in engine.call("GET", "/networks")[1]}
    assert names == {"bridge", "host", "none"}


def test_a_start_at_work_is_no_stray(world: World) -> None:
    """Containers start and end all the while; none of them is taken for a lost one."""
    engine, until = agent_script.Engine(world.engine.socket), time.monotonic() + 8
    body = {"Image": world.image, "Cmd": ["/bin/sh", "-c", "sleep 0.3; exit 7"]}
    troubles, codes = [], []

    def look() -> None:
        while time.monotonic() < until:
            troubles.append(agent_script.end_strays(engine, world.engine.cgroup))

    thread = threading.Thread(target=look)
    thread.start()
    while time.monotonic() < until:
        _, made = world.engine.call("POST", "/containers/create", body)
        world.engine.call("POST", f"/containers/{made['Id']}/start")
        codes.append(world.engine.call("POST", f"/containers/{made['Id']}/wait")[1]["StatusCode"])
        world.engine.call("DELETE", f"/containers/{made['Id']}")
    thread.join()
    assert set(troubles) == {""}
    assert len(codes) > 3
    assert set(codes) == {7}  # and not 137


def is_running(world: World, assignment: pb.Assignment) -> bool:
    return bool(world.container(assignment).get("State", {}).get("Running"))


def pause(world: World, command: str = "pause", *more: str) -> tuple[int, str, float]:
    """Run `pause`, `unpause` or `leave`: exit code, words and time."""
    began_s = time.monotonic()
    done = world.agent.run_command(command, "--allow-unencrypted", world.guard, *more)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began_s


def test_a_pause_ends_what_runs_at_once_and_outlives_the_agent(world: World) -> None:
    made = world.run(LOOP)
    code, said, took_s = pause(world)
    print(f"pause: {took_s:.2f} s")
    assert not is_running(world, made)
    assert (code, said) == (
        0,
        "paused: no workload runs here; `sudo openinfra-agent unpause` takes some again\n",
    )
    assert took_s < 8
    assert world.plane.beats[-1][1].paused
    assert pause(world)[:2] == (0, f"already {said}")
    assert (world.agent.data / "paused.json").stat().st_mode & 0o777 == 0o600
    world.agent.process.stop(signal.SIGKILL)
    world.start()
    assert "INFO paused, since " in world.agent.log
    assert world.plane.beats[-1][1].paused
    world.plane.post(made, world.assignment(LOOP))
    wait_for("the list", lambda: world.plane.observed.revision == 2)
    time.sleep(2 * agent_script.TEND_S)
    assert not any(one["State"]["Running"] for one in world.engine.containers().values())
    assert "unpause" in world.agent.run_command("status").stdout
    assert pause(world, "unpause")[:2] == (0, "not paused any more: workloads may come here\n")
    wait_for("both", lambda: len(world.engine.containers()) == 2 and is_running(world, made), 15)
    assert not world.plane.beats[-1][1].paused
    assert "not paused: workloads may come" in pause(world, "unpause")[1]


DEAF = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]


def is_left_to_the_agent(world: World) -> bool:
    """Whether a run of the guard would still leave it to the agent to end what runs."""
    return not agent_script.is_right_over(world.agent.lease_file)


def test_a_pause_ends_the_deaf(world: World) -> None:
    """And the guard leaves them the time to end."""
    deaf = world.run(DEAF)
    with ThreadPoolExecutor(1) as worker:
        pausing = worker.submit(pause, world)
        wait_for("told", lambda: world.plane.beats[-1][1].paused)
        until_s = json.loads(world.agent.lease_file.read_text())["until_s"]
        assert until_s < agent_script.read_boot_s()
        while is_running(world, deaf):
            assert is_left_to_the_agent(world)
        code, _, took_s = pausing.result()
    assert not is_running(world, deaf)
    assert (code, 10 < took_s < 16) == (0, True)


def test_who_slept_through_the_end_of_its_right_ends_at_once_what_went_elsewhere(
    world: World,
) -> None:
    """Also the deaf, and when the list without it came before the agent looked at what runs."""
    deaf = world.run(DEAF)
    kept = world.assignment(LOOP)
    world.plane.post(deaf, kept)
    world.plane.wait_state(kept, "RUNNING")
    before = world.container(kept)["State"]["StartedAt"]
    world.plane.lease_s, world.plane.next_ms = 20, 500  # 15 of them are the margin
    beats = len(world.plane.beats)
    world.plane.nudge()
    wait_for("a short right", lambda: len(world.plane.beats) > beats + 1)
    sleepers = (world.agent.process.child, world.engine.dockerd.child)
    try:
        for each in sleepers:
            each.send_signal(signal.SIGSTOP)
        world.plane.lease_s = 600
        world.plane.post(kept)
        beats = len(world.plane.beats)
        time.sleep(20 - agent_script.LEASE_MARGIN_S + agent_script.STOP_S + 1)
        world.agent.process.child.send_signal(signal.SIGCONT)
        wait_for("a heartbeat", lambda: len(world.plane.beats) > beats + 1, 20)
    finally:
        for each in sleepers:
            each.send_signal(signal.SIGCONT)
    began_s = time.monotonic()
    wait_for("its end", lambda: not is_running(world, deaf), 20)
    took_s = time.monotonic() - began_s
    print(f"ended after {took_s:.2f} s")
    assert took_s < 5 < agent_script.STOP_S  # which is what SIGTERM would have left it
    assert world.container(kept)["State"]["StartedAt"] == before  # it is in the list, and goes on


def test_a_pause_ends_a_pull(world: World) -> None:
    """From a registry that greets and then says no more."""
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            client = registry.accept()[0]
            request = client.recv(65_536)
            if request.startswith(b"GET /v2/ "):
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                request = client.recv(65_536)
            if b"/manifests/" in request:
                held.append(client)
                return
            client.close()

    with inside(world.engine.netns):
        registry = socket.create_server(("127.0.0.1", 5998))
    with registry:
        thread = threading.Thread(target=serve)
        thread.start()
        image = f"127.0.0.1:5998/acme/box@sha256:{'0' * 64}"
        world.plane.post(world.assignment(SLEEP, image=image))
        thread.join()
        code, said, took_s = pause(world)
        held[0].close()
    assert (code, took_s < 8) == (0, True), said


@pytest.mark.parametrize("content", [b"", b"\0" * 40])
def test_a_broken_file_is_a_pause(world: World, content: bytes) -> None:
    """Also one that was laid without the agent."""
    made = world.run(LOOP)
    path = world.agent.data / "paused.json"
    path.write_bytes(content)
    wait_for("its end", lambda: not is_running(world, made))
    said = "WARN paused: paused.json is unreadable ; sudo openinfra-agent unpause"
    assert said in world.agent.log
    assert pause(world, "unpause")[0] == 0
    assert not path.exists()
    wait_for("running", lambda: is_running(world, made))


def test_a_pause_needs_no_control_plane(world: World) -> None:
    made = world.run(LOOP)
    world.plane.is_silent = True
    world.plane.nudge()
    wait_for("trouble", lambda: "cannot take requests now" in world.agent.log)
    code, said, took_s = pause(world)
    assert (code, is_running(world, made), took_s < 8) == (0, False, True)
    assert "(the control plane cannot be reached now, and hears of it later)" in said
    code, said, _ = pause(world, "leave")
    assert code == 75
    assert "that ends by itself within 10 minutes" in said
    world.plane.is_silent = False
    wait_for("heard", lambda: world.plane.beats[-1][1].paused, 90)
    assert world.plane.facts.unready.startswith("its provider is leaving")


def test_a_pause_needs_no_agent(world: World) -> None:
    made = world.run(LOOP)
    world.agent.process.stop(signal.SIGKILL)
    code, said, _ = pause(world)
    assert (code, is_running(world, made)) == (0, False), said
    assert "(the agent does not run; the control plane hears of it when it does)" in said
    assert not world.agent.lease_file.exists()
    assert pause(world, "leave")[0] == 75
    world.start()
    world.plane.nudge()
    time.sleep(2 * agent_script.TEND_S)
    assert not is_running(world, made)
    assert world.plane.beats[-1][1].paused


def test_a_pause_says_when_the_engine_does_not_answer(world: World) -> None:
    made = world.run(LOOP)
    world.engine.kill()
    try:
        wait_for("trouble", lambda: "container engine does not answer" in world.agent.log, 15)
        code, said, _ = pause(world)
        assert code == 75
        assert "workloads may still run here: no container engine answers at" in said
    finally:
        world.engine.start()
    wait_for("its end", lambda: not is_running(world, made), 20)


def test_who_leaves_waits_until_nothing_is_assigned(world: World) -> None:
    made = world.run(LOOP)

    def take_back() -> None:
        wait_for("a paused host", lambda: world.plane.beats[-1][1].paused)
        time.sleep(1)
        assert not leaving.done()
        world.plane.post()

    with ThreadPoolExecutor(1) as worker:
        leaving = worker.submit(pause, world, "leave")
        take_back()
        code, said, took_s = leaving.result()
    print(f"leave: {took_s:.2f} s")
    assert code == 0, said
    assert said.startswith("nothing is assigned to this host and nothing runs here; now type: ")
    assert said.endswith(f"--uninstall; then tell the operator, who revokes host {HOST_ID}\n")
    assert world.container(made) == {}
    assert (world.plane.observed.revision, len(world.plane.observed.assignments)) == (2, 0)
    assert pause(world, "leave")[:2] == (0, said)


@pytest.fixture
def guard(world: World, tmp_path: Path) -> Callable[[bool], subprocess.CompletedProcess[str]]:
    """One run of the guard, if asked with an nft that fails."""
    argv = [sys.executable, str(ROOT / "agent.py"), "guard", world.guard]
    argv += [f"--engine-socket={world.engine.socket}", f"--lease-file={world.agent.lease_file}"]
    argv = world.engine.netns.argv(argv)
    broken = tmp_path / "nft"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)

    def run_guard(is_broken: bool) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path}:{os.environ['PATH']}" if is_broken else os.environ["PATH"]
        environment = {**os.environ, "PATH": path}
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)

    return run_guard


def test_workloads_are_frozen_while_the_firewall_cannot_be_put_back(
    world: World, guard: Callable[[bool], subprocess.CompletedProcess[str]]
) -> None:
    """And what is frozen can be ended."""

    def is_frozen(made: pb.Assignment) -> bool:
        return bool(world.container(made)["State"]["Paused"])

    made, other = world.assignment(LOOP), world.assignment(LOOP)
    world.plane.post(made, other)
    for each in (made, other):
        world.plane.wait_state(each, "RUNNING")
    assert guard(False).returncode == 0
    assert not is_frozen(made)
    for words in (["workload frozen"] * 2, []):
        done = guard(True)
        assert done.returncode == 1
        assert re.findall("workload [a-z]+", done.stderr) == words
        assert is_frozen(made)
    wait_for("facts", lambda: "firewall is not known" in world.plane.facts.unready)
    said = world.plane.wait_state(made, "WAITING").reason
    assert said.startswith("frozen: the firewall is not known to be in place")
    world.plane.post(made)
    wait_for("its end", lambda: not world.container(other), 20)
    assert guard(False).stderr.count("workload goes on") == 1
    assert not is_frozen(made)
    assert is_running(world, made)
    wait_for("facts", lambda: not world.plane.facts.unready)
    world.plane.wait_state(made, "RUNNING")
    subprocess.run(world.engine.netns.argv(["nft", "flush", "ruleset"]), check=True)


def test_a_host_that_can_run_nothing_for_long_gives_it_back(
    world: World, tmp_path: Path, guard: Callable[[bool], subprocess.CompletedProcess[str]]
) -> None:
    """What is frozen, and what would begin; the ten minutes are four seconds here."""
    short = change_scripts(tmp_path / "scripts", "agent.py", GIVE_BACK_S="4.0")
    made, job = world.run(DEAF), world.assignment(SLEEP)
    world.agent.process.stop(signal.SIGKILL)
    assert guard(True).returncode == 1
    world.agent.scripts = short
    world.start()
    world.plane.post(made, job)
    assert world.plane.wait_state(made, "WAITING").reason.startswith("frozen: ")
    for each in (made, job):
        said = world.plane.wait_state(each, "REJECTED").reason
        assert said.startswith("this host cannot run it: the firewall is not known to be in place")
    assert world.engine.containers() == {}
    assert guard(False).returncode == 0
    subprocess.run(world.engine.netns.argv(["nft", "flush", "ruleset"]), check=True)


def test_what_is_as_before_a_lost_answer_is_said_again(world: World) -> None:
    made = world.run(LOOP)
    path = f"/containers/oi-{made.assignment_id}"
    wait_for("it is known", lambda: not world.agent.status()["last_error"])
    world.plane.is_losing = True
    assert world.engine.call("POST", f"{path}/pause")[0] == 204
    world.plane.wait_state(made, "WAITING", 30)
    assert world.engine.call("POST", f"{path}/unpause")[0] == 204
    seen = len(world.plane.beats)
    wait_for("it is seen to run", lambda: len(world.plane.beats) > seen + 1, 60)
    world.plane.is_losing = False
    world.plane.wait_state(made, "RUNNING", 60)


def test_workloads_end_before_their_lease_does(world: World) -> None:
    world.plane.lease_s = 20  # 15 of them are the margin
    world.plane.next_ms = 500
    made = world.run(LOOP)
    assert world.container(made)["State"]["Running"]
    world.plane.is_silent = True
    last_s = world.plane.beats[-1][0]
    wait_for("stopped", lambda: not world.container(made)["State"]["Running"], 20)
    assert 4 <= time.monotonic() - last_s < 8
    world.plane.is_silent = False
    wait_for("running", lambda: world.container(made)["State"]["Running"], 30)


def test_a_revoked_host_ends_its_workloads_before_itself(world: World) -> None:
    made = world.run(DEAF, secrets={"token": b"one"})
    assert list_secrets(world) == [f"{made.assignment_id}/token"]
    world.plane.refusal = "HOST_REVOKED"
    world.plane.nudge()
    began_s = time.monotonic()
    while is_running(world, made):
        assert is_left_to_the_agent(world)
    assert 9 < time.monotonic() - began_s < 16
    assert world.agent.process.child.wait(20) == 78
    assert world.container(made) == {}
    assert [*world.agent.secrets_dir.iterdir()] == []
    assert world.engine.networks() == []


def test_who_crashes_waits_longer_each_time_and_who_ends_stays_ended(world: World) -> None:
    def make(code: int, restart: int) -> pb.Assignment:
        script = ["sh", "-c", f"echo said; exit {code}"]
        return world.assignment(script, restart=restart)

    crash = make(3, pb.RESTART_ALWAYS)
    good = make(0, pb.RESTART_ON_FAILURE)
    bad = make(9, pb.RESTART_NEVER)
    small = {"restart": pb.RESTART_NEVER, "cpu_milli": 200}
    hog = world.assignment(["tail", "/dev/zero"], **small)
    tight = world.assignment(["sh", "-c", "tail /dev/zero; exit 3"], **small)
    killed = world.assignment(["sh", "-c", "kill -SEGV $$"], restart=pb.RESTART_NEVER)
    world.plane.post(crash, good, bad, hog, killed)
    assert world.plane.wait_state(good, "FINISHED").exit_code == 0
    seen = world.plane.wait_state(bad, "FAILED")
    assert (seen.exit_code, seen.reason) == (9, "ended with exit code 9")
    seen = world.plane.wait_state(hog, "FAILED")
    assert seen.reason == "killed: it used more than its 16 MB of memory"
    seen = world.plane.wait_state(killed, "FAILED")
    assert seen.reason == "ended by SIGSEGV (exit code 139)"
    world.plane.post(crash, good, bad, hog, killed, tight)
    seen = world.plane.wait_state(tight, "FAILED")
    assert seen.reason == "ended with exit code 3 after a process of it was killed for memory"

    def restarted() -> pb.ObservedAssignment | None:
        seen = world.plane.state(crash)
        return seen if seen and seen.restarts >= 2 else None

    wait_for("restarts", restarted, 20)
    seen = world.plane.wait_state(crash, "WAITING")
    assert seen.exit_code == 3
    assert seen.reason.startswith("ended with exit code 3, started again after ")
    assert world.container(good)["State"]["ExitCode"] == 0
    assert "said" in world.engine.logs(f"oi-{bad.assignment_id}")


def list_told(message: Message) -> Iterator[int | float | str]:
    """Every number and text in a message, of the messages in it too."""
    for field, value in message.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        parts = value.values() if is_map else value if field.is_repeated else [value]
        for part in parts:
            if isinstance(part, Message):
                yield from list_told(part)
            elif isinstance(part, (int, float, str)):
                yield part


def test_nothing_that_a_host_tells_is_of_its_clock(world: World) -> None:
    """Ten years off, over a run with its usage: so no bill of any month can have it from there."""
    world.agent.process.stop()
    environment = set_clock(world.agent.directory / "offset", 3_650 * 86_400)
    check_clock(PYTHON, environment, 3_650 * 86_400)
    before = len(world.plane.beats)
    world.agent.start(world.guard, **environment)
    made = world.run(["sh", "-c", "echo said; while :; do :; done"])
    world.plane.read_log(made.assignment_id)
    world.plane.post()
    wait_for("its usage", lambda: any(beat.usage for _, beat in world.plane.beats[before:]), 30)
    told = [each for _, beat in world.plane.beats[before:] for each in list_told(beat)]
    assert max(each for each in told if isinstance(each, int)) > 1e6  # numbers of usage are there
    now_s = time.time() + 3_650 * 86_400
    for each in told:
        if isinstance(each, str):
            assert time.strftime("%Y-%m-", time.gmtime(now_s)) not in each
        else:
            assert all(abs(each / unit - now_s) > 2 * 86_400 for unit in (1, 1e3, 1e6, 1e9)), each


def test_who_takes_what_nobody_sells_is_ended_with_the_reason(world: World) -> None:
    """A fork bomb and a flood of lines; who is merely at a limit, or prints much once, goes on."""
    small, many = [{"cpu_milli": 200, "memory_bytes": size << 20} for size in (12, 40)]
    bomb = """BEGIN { while (1) system("exec sleep 999 &") }"""  # no shell that dies of a refusal
    full = "while :; do sleep 999 & done & exec sleep 999"
    fork = world.assignment(["busybox", "awk", bomb], restart=pb.RESTART_NEVER, **many)
    flood = world.assignment(["sh", "-c", "while :; do cat /bin/busybox; done"], **small)
    still = [
        world.assignment(["sh", "-c", full], **many),
        world.assignment(["sh", "-c", "head -c 20000000 /dev/zero; exec sleep 999"], **small),
    ]
    world.plane.post(fork, flood, *still)
    seen = world.plane.wait_state(fork, "FAILED", 60)
    assert seen.reason == "killed: it went on starting processes beyond its 128"
    assert world.engine.processes().get(world.container(fork)["Id"], []) == []
    printing = "killed: it went on printing more than 250 kB a second, started again after "
    wait_for("its end", lambda: str(world.plane.state(flood)).count(printing) or None, 120)
    ended_s = time.monotonic()
    wait_for("its next run", lambda: world.container(flood)["State"]["Running"] or None, 10)
    wait_for("its next end", lambda: str(world.plane.state(flood)).count(f"{printing}2 s"), 120)
    print(f"one run of a flood took {time.monotonic() - ended_s:.1f} s to its end")
    for made in still:
        seen = world.plane.wait_state(made, "RUNNING")
        assert (seen.reason, seen.restarts) == ("", 0), world.agent.process.log
    group = world.engine.cgroup / world.container(still[0])["Id"]
    assert (group / "pids.events").read_text() != "max 0\n"  # it was at its limit
    assert int((group / "pids.current").read_text()) <= 128


def test_a_restart_of_the_agent_hastens_no_crash_loop(world: World) -> None:
    """It knows how often each crashed, and when; the engine knows neither."""

    def wait_end(made: pb.Assignment, again_s: int, runs: int) -> dict[str, Any]:
        """Until its next run is so far away; it has run so often by then."""
        said = f"ended with exit code 3, started again after {again_s} s"
        wait_for(said, lambda: said in str(world.plane.state(made)) or None, 40)
        assert world.engine.logs(f"oi-{made.assignment_id}").count("run") == runs
        return dict(world.container(made)["State"])

    policies = (pb.RESTART_ALWAYS, pb.RESTART_ON_FAILURE)
    loops = [world.assignment(["sh", "-c", "echo run; exit 3"], restart=each) for each in policies]
    steady = world.assignment(SLEEP)
    cut = world.assignment(["sh", "-c", "echo run; exit 3"])
    world.plane.post(steady, *loops, cut)
    fourth = [wait_end(made, 8, 4) for made in loops]
    wait_end(cut, 8, 4)
    world.agent.process.stop(signal.SIGKILL)
    # What an agent leaves that is killed right after it started one: nobody noted that.
    assert world.engine.call("POST", f"/containers/oi-{cut.assignment_id}/start")[0] == 204
    wait_for("its end", lambda: not world.container(cut)["State"]["Running"])
    world.start()
    wait_end(cut, 16, 5)
    assert world.plane.wait_state(cut, "WAITING").restarts == 4
    for how in (signal.SIGKILL, signal.SIGTERM):
        world.agent.process.stop(how)
        world.start()
        time.sleep(0.5)
    for made, before in zip(loops, fourth, strict=True):
        fifth = wait_end(made, 16, 5)
        assert parse_time(fifth["StartedAt"]) - parse_time(before["FinishedAt"]) > 7.9
        seen = world.plane.wait_state(made, "WAITING")
        assert (seen.restarts, seen.exit_code) == (4, 3)
    assert world.plane.wait_state(steady, "RUNNING").restarts == 0


def parse_time(text: str) -> float:
    """A time of the engine's."""
    return datetime.datetime.fromisoformat(f"{text[:26].rstrip('Z')}+00:00").timestamp()


@pytest.mark.parametrize("is_noted", [False, True])
def test_a_job_that_a_shutdown_ended_goes_on(world: World, is_noted: bool) -> None:
    """It leaves with 0 when it is told to end, as openinfra-workloads.service does at a boot."""
    polite = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]
    made = world.run(polite, restart=pb.RESTART_ON_FAILURE)
    world.agent.process.stop(signal.SIGKILL)
    time.sleep(1.1)  # the engine's times are of whole seconds here
    if is_noted:
        (world.agent.data / "workloads.ended").touch()
    name = f"oi-{made.assignment_id}"
    assert world.engine.call("POST", f"/containers/{name}/kill?signal=SIGTERM")[0] == 204
    wait_for("its end", lambda: not is_running(world, made))
    world.start()
    if is_noted:
        wait_for("it goes on", lambda: is_running(world, made), 15)
    else:
        world.plane.wait_state(made, "FINISHED")


def test_what_this_host_cannot_run_is_rejected_with_the_reason(world: World) -> None:
    port = [pb.Port(container_port=80, host_port=20_001)]
    nowhere = f"@sha256:{'0' * 64}"
    missing = world.assignment(SLEEP, image=f"{REGISTRY}/acme/none{nowhere}")
    program = world.assignment(["/no/such/program"], restart=pb.RESTART_NEVER)
    taken = world.assignment(SLEEP, ports=port)
    hostile = world.assignment(SLEEP, image="alpine:latest")
    greedy = world.assignment(SLEEP, memory_bytes=1 << 40)
    with inside(world.engine.netns), socket.create_server((ADDRESS, 20_001)):
        world.plane.post(missing, program, taken, hostile, greedy)
        seen = world.plane.wait_state(missing, "REJECTED")
        assert seen.reason.startswith("image cannot be fetched: manifest for ")
        assert "unknown" in seen.reason
        seen = world.plane.wait_state(taken, "REJECTED")
        assert seen.reason == "a port is taken on this host (it asks for 20001)"
    assert world.plane.wait_state(hostile, "REJECTED").reason.startswith("image is not <registry>")
    assert world.plane.wait_state(greedy, "REJECTED").reason.startswith("memory_bytes is over the")
    assert world.plane.wait_state(program, "FAILED").exit_code == 127
    assert list(world.engine.containers()) == [f"oi-{program.assignment_id}"]
    assert len(world.engine.networks()) == 1


# What follows an assignment on the wire is of it: the last of a value counts, lists grow.
FORGED: list[tuple[bytes | dict[str, Any], str]] = [
    (b"\xa0\x06\x01", "fields unknown here"),
    (b"\xa2\x06\x0aPrivileged", "fields unknown here"),
    ({"assignment_id": "../../etc"}, "assignment_id is no UUID"),
    ({"image": "alpine:latest"}, "image is not <registry>"),
    ({"memory_bytes": 1 << 40}, "memory_bytes is over"),
    ({"env": {"--memory": "-1"}}, "env has a key that is no name: --memory"),
    ({"ports": [pb.Port(host_port=22, container_port=22)]}, "ports has host_port 22"),
    ({"egress": 7}, "egress is none that is known"),
    ({"secrets": {"../../x": b""}}, "secrets have a name that is none of a file"),
]
TAKEN: list[dict[str, Any]] = [
    {"command": ["--privileged", "-v=/:/host"], "env": {"A": "--cap-add=ALL", "DOCKER_HOST": "x"}},
    {"fence": 2**64 - 1, "egress": pb.EGRESS_NONE, "cpu_milli": 10, "memory_bytes": 64 << 20},
    {"ports": [pb.Port(host_port=28_191, container_port=22)], "secrets": {"shadow": b"root::0:"}},
]


def mutate_assignment(given: pb.Assignment, source: random.Random) -> pb.Assignment:
    """Another one, whose bytes can still be read: one in some sixty can."""
    raw = given.SerializeToString()
    while True:
        with contextlib.suppress(DecodeError):
            read = pb.Assignment.FromString(mutate(raw, source))
            if read != given:
                return read


def test_what_was_altered_on_the_wire_gets_nothing_of_the_host(world: World) -> None:
    """It is refused with the reason, or runs in the sandbox; and the agent goes on."""
    source, plane = random.Random(read_seed()), world.plane
    port = [pb.Port(container_port=80, host_port=20_009)]
    good = [world.assignment(LOOP, ports=port, secrets={"a": b"b"}), world.assignment(SLEEP)]

    def post(altered: pb.Desired) -> None:
        altered.revision = plane.desired.revision + 1
        plane.desired = altered
        plane.nudge()
        wait_for("the list", lambda: plane.observed.revision == altered.revision, 30)

    def check() -> None:
        for name, seen in world.engine.containers().items():
            assert name == f"oi-{uuid.UUID(seen['Config']['Labels'][agent_script.LABEL])}"
            assert list_broken(seen, world.agent.secrets_dir) == [], seen

    for more, said in FORGED:
        raw = more if isinstance(more, bytes) else pb.Assignment(**more).SerializeToString()
        one = pb.Assignment.FromString(good[1].SerializeToString() + raw)
        post(pb.Desired(assignments=[one]))
        (refused,) = plane.observed.assignments
        assert refused.state == pb.ASSIGNMENT_STATE_REJECTED
        assert said in refused.reason
        assert world.engine.containers() == {}
    odd = [world.assignment(LOOP) for _ in TAKEN]
    for each, more in zip(odd, TAKEN, strict=True):
        each.MergeFrom(pb.Assignment(**more))
    plane.post(*odd)
    for each in odd:
        plane.wait_state(each, "RUNNING", 30)
    check()
    assert len(world.engine.containers()) == len(odd)
    for altered, whole in 6 * [(good[0], good[1]), (good[1], good[0])]:
        post(pb.Desired(assignments=[whole, mutate_assignment(altered, source)]))
        plane.wait_state(whole, "RUNNING", 30)
        check()
    plane.post(*good)
    for made in good:
        plane.wait_state(made, "RUNNING", 30)
    check()


def test_nothing_starts_while_the_firewall_is_not_known_to_be_in_place(world: World) -> None:
    guard = world.agent.directory / "guard.json"
    guard.write_text('{"at_s": 1}')
    made = world.assignment(LOOP)
    world.plane.post(made)
    seen = world.plane.wait_state(made, "PULLING")
    assert seen.reason == "the firewall is not known to be in place: guard does not run"
    wait_for("facts", lambda: "guard does not run" in world.plane.facts.unready)
    guard.write_text('{"at_s": 1e12}')
    world.plane.wait_state(made, "RUNNING")


def test_a_nudge_brings_one_heartbeat_a_second_and_many_workloads_little_memory(
    world: World,
) -> None:
    many = [world.assignment(SLEEP, cpu_milli=200) for _ in range(5)]
    world.plane.post(*many)
    for made in many:
        world.plane.wait_state(made, "RUNNING", 30)
    time.sleep(2)
    before, stop = len(world.plane.beats), threading.Event()

    def flood() -> None:
        with inside(world.plane.netns), socket.socket(type=socket.SOCK_DGRAM) as sock:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    sock.sendto(b"x" * 500, (ADDRESS, 9093))

    asked_s = time.monotonic()
    world.plane.nudge()
    wait_for("a heartbeat", lambda: len(world.plane.beats) > before)
    assert time.monotonic() - asked_s < 1
    thread = threading.Thread(target=flood)
    thread.start()
    time.sleep(3)
    stop.set()
    thread.join()
    times = [at_s for at_s, _ in world.plane.beats[before:]]
    gaps = [later - at_s for at_s, later in itertools.pairwise(times)]
    assert 2 <= len(gaps) <= 4
    assert min(gaps) >= 0.99
    status = Path(f"/proc/{world.agent.process.child.pid}/status").read_text()
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    print(f"agent with 5 workloads: {resident_kb / 1024:.1f} MB")
    assert resident_kb < 64 * 1024
    assert "observed" not in [field.name for field, _ in world.plane.beats[-1][1].ListFields()]


def test_a_log_is_what_its_own_container_printed(world: World) -> None:
    made = world.run(["sh", "-c", "for n in 1 2 3; do echo $n; done; exec sleep 1000"])
    name, plane = made.assignment_id, world.plane
    answer = plane.read_log(name)
    assert (answer.content, answer.truncated, answer.reason) == (b"1\n2\n3\n", False, "")
    assert plane.read_log(name, 2).content == b"2\n3\n"
    cut = plane.read_log(name, 2**32 - 1, 3)
    assert (cut.content, cut.truncated) == (b"\n3\n", True)
    assert plane.read_log(name, 0, 0).content == b"\n"
    # What left the list, or never began, has none; and nobody else's container is read.
    ours = world.container(made)
    deaf = "trap '' TERM; echo gone; while :; do sleep 0.1; done"
    leaves = world.run(["sh", "-c", deaf])
    (world.agent.directory / "guard.json").unlink()
    waits = world.assignment(SLEEP)
    plane.post(made, waits)
    plane.wait_state(waits, "PULLING")
    plane.wait_state(leaves, "STOPPING")
    for each in (leaves, waits):
        answer = plane.read_log(each.assignment_id)
        assert answer.reason == "its host has no container of it now"
    assert world.container(leaves)["State"]["Running"]
    stranger = {"Image": world.image, "Labels": {}, "Cmd": ["echo", "secret"]}
    world.engine.call("POST", f"/containers/create?name=oi-{uuid.uuid4()}", stranger)
    for other in ("", "../x", ours["Id"], ours["Name"], str(uuid.uuid4())):
        answer = plane.read_log(other)
        assert answer.reason == "its host has no container of it now"
        assert (answer.content, answer.truncated) == (b"", False)


def test_a_log_that_was_lost_is_read_again_while_it_is_asked_for(world: World) -> None:
    made = world.run(["sh", "-c", "echo hello; exec sleep 1000"])
    plane = world.plane
    plane.losses = 2
    assert plane.read_log(made.assignment_id).content == b"hello\n"
    assert plane.losses == 0
    numbers = [request.seq for _, request in plane.beats]
    assert numbers == sorted({*numbers})  # one that got lost may still come: it has its own
    world.engine.kill()
    try:
        assert "no container engine answers" in plane.read_log(made.assignment_id).reason
    finally:
        world.engine.start()


def test_logs_hasten_one_heartbeat_a_second_and_take_little_memory(world: World) -> None:
    flood = "n=0; while [ $n -lt 10000 ]; do echo $n; n=$((n+1)); done"
    made = world.run(["sh", "-c", f"{flood}; dd if=/dev/zero bs=1000 count=2000; exec sleep 999"])
    plane = world.plane
    assert len(plane.read_log(made.assignment_id, 1000).content) == 32_768
    for _ in range(2):
        plane.ask(made.assignment_id, 1000)
    plane.nudge()
    wait_for("both, one after the other", lambda: len(plane.logs) == 3, 5)
    status = Path(f"/proc/{world.agent.process.child.pid}/status")
    began, resident_kb = len(plane.beats), read_resident_kb(status)
    until_s = time.monotonic() + 8
    while time.monotonic() < until_s:
        while len(plane.log_requests) < 40:
            plane.ask(made.assignment_id, 1000, 2**32 - 1)
        plane.nudge()
        time.sleep(0.05)
    plane.log_requests.clear()
    until_s, asked_for = time.monotonic() + 3, len(plane.beats)
    while time.monotonic() < until_s:
        plane.nudge()
        time.sleep(0.05)
    # One may have been on its way; the others are forgotten.
    assert sum(len(request.logs) for _, request in plane.beats[asked_for:]) <= 1
    del plane.beats[asked_for:]
    beats = plane.beats[began:]
    gaps = [later[0] - first[0] for first, later in itertools.pairwise(beats)]
    assert min(gaps) >= 0.99
    assert 5 <= len(gaps) <= 8
    assert [len(request.logs) for _, request in beats[2:]] == [1] * len(beats[2:])
    assert max(request.ByteSize() for _, request in beats) < 60_000
    grown_kb = read_resident_kb(status) - resident_kb
    print(f"{len(beats)} heartbeats with 32 KiB each: the agent grew by {grown_kb} KB")
    assert grown_kb < 6_000


def read_resident_kb(status: Path) -> int:
    """Resident memory of a process."""
    return int(status.read_text().split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize(
    ("answer", "readable"),
    [
        (b"", 0),
        (b"SSH-2.0-OpenSSH\r\n", 0),
        # An empty list is one of no containers; an empty object a version without words; and each
        # is what a container may have printed.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", 3),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", 1),
        (b"HTTP/1.1 500 No\r\nContent-Length: 99\r\n\r\n{", 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 0),
    ],
)
def test_what_is_no_engine_is_no_crash(tmp_path: Path, answer: bytes, readable: int) -> None:
    path = tmp_path / "engine.sock"

    def serve() -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                with server.accept()[0] as client:
                    client.recv(65_536)
                    client.sendall(answer)

    def can(call: Callable[..., object], *args: object) -> bool:
        with contextlib.suppress(agent_script.EngineError):
            call(*args)
            return True
        return False

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.5)
        thread = threading.Thread(target=serve)
        thread.start()
        engine = agent_script.Engine(path)
        found = [can(engine.read_version), can(engine.read_image, "x")]
        found.append(can(engine.read_workloads, {}, frozenset()))
        found.append(can(engine.read_log, "x", 1, 1))
        thread.join()
    assert found.count(True) == readable


def read_images(engine: Engine) -> set[str]:
    """The images that are there, by their digests."""
    rows = engine.call("GET", "/images/json")[1]
    return {digest for row in rows for digest in row["RepoDigests"] or ()}


def has_image(engine: Engine, name: str) -> bool:
    return name in read_images(engine)


def test_an_image_is_pulled_once_for_all_that_wait_for_it(world: World) -> None:
    image = world.engine.push("acme/common", extra=os.urandom(15_000_000))
    began_s = time.time()
    many = [world.assignment(SLEEP, image=image, cpu_milli=200) for _ in range(4)]
    world.plane.post(*many)
    for made in many:
        world.plane.wait_state(made, "RUNNING", 30)
    filters = urllib.parse.quote(json.dumps({"type": ["image"], "event": ["pull"]}))
    times = f"since={began_s:.3f}&until={time.time():.3f}"
    _, told = world.engine.call("GET", f"/events?{times}&filters={filters}")
    assert isinstance(told, dict), told  # one line: a second one is not JSON any more
    assert told["id"] == image
    assert told["Action"] == "pull"


def test_a_pull_that_fails_has_failed_for_all_that_wait_for_it(world: World) -> None:
    """They give up together, not one after the other; what has its image goes on."""
    runs = world.run(SLEEP)
    image = f"127.0.0.1:5999/acme/box@sha256:{'0' * 64}"  # nobody listens there
    many = [world.assignment(SLEEP, image=image, cpu_milli=200) for _ in range(4)]
    world.plane.post(runs, *many)
    world.plane.wait_state(many[0], "REJECTED", 60)
    began_s = time.monotonic()
    for made in many:
        assert "connection refused" in world.plane.wait_state(made, "REJECTED", 60).reason
    assert time.monotonic() - began_s < 5
    assert world.container(runs)["State"]["Running"]


def test_who_follows_a_pull(tmp_path: Path) -> None:
    workloads = make_workloads(tmp_path / "engine")
    one = agent_script.Wish(
        "a", 1, "w", "acme/box", (), (), 100, 1, (), True, agent_script.Restart.ALWAYS
    )
    waits, has, there, done = (replace(one, assignment_id=name) for name in "bcde")
    other = replace(one, assignment_id="f", image="acme/other")
    wishes = (one, waits, has, there, replace(done, is_done=True), other)
    workloads.wishes = wishes
    workloads.memory.pasts["c"] = agent_script.Past(has_image=True)
    workloads.containers = (agent_script.Container("id", "oi-d", "d", "", True),)
    step = agent_script.Step(agent_script.Verb.PULL, "a", wish=one)
    assert agent_script.list_followers(workloads, step) == [
        replace(step, assignment_id="b", wish=waits)
    ]
    assert agent_script.list_followers(workloads, replace(step, verb=agent_script.Verb.START)) == []
    workloads.wishes = wishes[1:]  # its pull was ended
    assert agent_script.list_followers(workloads, step) == []
    workloads.threads.shutdown()


def test_a_full_disk_loses_images_that_nothing_uses(make_agent: Callable[..., Agent]) -> None:
    """Those first that were wished for longest ago; and one that never fits says why."""
    with make_netns() as netns:
        engine = Engine(netns, disk_bytes=100 << 20)
        try:
            names = [f"acme/box{n}" for n in range(6)]
            first, second, *rest = [engine.push(name, extra=os.urandom(12 << 20)) for name in names]
            huge = engine.push("acme/huge", extra=bytes(120 << 20))  # but it is small to fetch
            with running_world(engine, first, make_agent, PYTHON) as world:
                kept = world.run(SLEEP)
                job = world.assignment(["true"], image=second, restart=pb.RESTART_NEVER)
                world.plane.post(kept, job)
                world.plane.wait_state(job, "FINISHED")
                for image in rest:
                    # Each is removed with its assignment; its image stays.
                    world.plane.post(kept, world.assignment(SLEEP, image=image))
                    wait_for("image", functools.partial(has_image, engine, image), 30)
                assert read_images(engine) >= {first, rest[-1]}
                too_large = world.assignment(SLEEP, image=huge)
                world.plane.post(kept, too_large)
                seen = world.plane.wait_state(too_large, "REJECTED", 60)
                assert "no space left" in seen.reason
                world.plane.wait_state(kept, "RUNNING")
                wait_for("room", lambda: second not in read_images(engine) or None, 30)
                assert first in read_images(engine)
                assert "images removed: the disk was nearly full" in world.agent.log
                # There is room again for one that fits.
                world.plane.post(kept, fits := world.assignment(SLEEP, image=second))
                world.plane.wait_state(fits, "RUNNING", 30)
        finally:
            engine.close()


def read_names(engine: Engine) -> set[str]:
    """The same by what they are called."""
    return {name.partition("@")[0].rpartition("/")[2] for name in read_images(engine)}


def fill(root: Path, share: float) -> None:
    """A file that makes this share of a disk used, to the block."""
    path = root / "ballast"
    path.unlink(missing_ok=True)
    disk = os.statvfs(root)
    with path.open("wb") as file:
        size = disk.f_bavail - round(disk.f_blocks * (1 - share))
        os.posix_fallocate(file.fileno(), 0, size * disk.f_frsize)
    # Of the disk as it was: the agent may make room before the next line.
    used = disk.f_blocks - disk.f_bavail + size
    assert used / disk.f_blocks == pytest.approx(share, abs=1e-4)
    assert path.stat().st_blocks * 512 == size * disk.f_frsize


def test_an_image_that_never_fits_is_not_fetched(make_agent: Callable[..., Agent]) -> None:
    """50 GB for a disk of 100 MB: given up by its size, long before the disk is full."""
    with make_netns() as netns, contextlib.ExitStack() as stack:
        engine = Engine(netns, disk_bytes=100 << 20)
        stack.callback(engine.close)
        image = engine.push("acme/small")
        huge = engine.push_huge("acme/huge", 50 * 10**9)
        world = stack.enter_context(running_world(engine, image, make_agent, PYTHON))
        made, other = world.assignment(SLEEP, image=huge), world.assignment(SLEEP)
        world.plane.post(made, other)
        seen = world.plane.wait_state(made, "REJECTED")
        sizes = "50.0 GB compressed for a disk of 0.1 GB"
        assert f"the image is too large for this host: {sizes}" in seen.reason
        world.plane.wait_state(other, "RUNNING")
        disk = os.statvfs(engine.directory / "root")
        assert (disk.f_blocks - disk.f_bfree) * disk.f_frsize < 50 << 20


def test_images_go_from_80_percent_of_the_disk_down_to_70(
    make_agent: Callable[..., Agent], tmp_path: Path
) -> None:
    """Those that were wished for longest ago, and none that is in use, whosever it is."""
    short = {"TIDY_S, USED_MAX_S": "0.5, 1e9"}
    scripts = change_scripts(tmp_path / "scripts", "agent.py", **short)
    sizes = {"used": 1, "held": 1, "theirs": 1, "a": 6, "b": 7, "c": 8, "d": 9}  # the newest last
    with make_netns() as netns, contextlib.ExitStack() as stack:
        engine = Engine(netns, disk_bytes=100 << 20)
        stack.callback(engine.close)
        root = engine.directory / "root"
        used, held, theirs, *old = [
            engine.push(f"acme/{name}", extra=os.urandom(size << 20))
            for name, size in sizes.items()
        ]
        world = stack.enter_context(
            running_world(engine, used, functools.partial(make_agent, scripts=scripts), PYTHON)
        )
        name, _, digest = theirs.partition("@")
        assert engine.call("POST", f"/images/create?fromImage={name}&tag={digest}")[0] == 200
        assert engine.call("POST", "/containers/create", {"Image": theirs, "Cmd": SLEEP})[0] == 201
        with inside(netns):
            stack.enter_context(socket.create_server((ADDRESS, 20_001)))
        # Its port is taken: it has an image here, and no container.
        taken = world.assignment(
            SLEEP, image=held, ports=[pb.Port(container_port=80, host_port=20_001)]
        )
        kept = world.run(SLEEP)
        for image in old:
            other = world.assignment(SLEEP, image=image)
            world.plane.post(kept, taken, other)
            world.plane.wait_state(other, "RUNNING", 30)
        world.plane.post(kept, taken)
        wait_for("it is alone", lambda: len(engine.containers()) == 1 or None, 30)
        world.plane.wait_state(taken, "REJECTED")

        def check_left(*names: str) -> None:
            """These and no others, also after three more looks."""
            with contextlib.suppress(AssertionError):
                wait_for("images", lambda: read_names(engine) == {*names} or None, 15)
            time.sleep(3 * agent_script.TEND_S)
            assert read_names(engine) == {*names}

        fill(root, 0.799)
        check_left(*sizes)
        fill(root, 0.8)
        check_left("used", "held", "theirs", "c", "d")
        assert 0.7 - 9 / 100 < agent_script.read_used(str(root)) <= 0.7
        fill(root, 0.98)
        check_left("used", "held", "theirs")
        fill(root, 0.9)
        check_left("used", "held", "theirs")
        assert is_running(world, kept)
        # Nor while the agent does not know yet what is in use.
        world.agent.process.stop(signal.SIGKILL)
        world.plane.is_silent = True
        world.agent.start(world.guard)
        wait_for("trouble", lambda: "cannot take requests now" in world.agent.log)
        check_left("used", "held", "theirs")


def test_images_of_an_engine_that_is_not_ours_stay() -> None:
    with make_netns() as netns:
        engine = Engine(netns, disk_bytes=30 << 20, label="openinfra.engine=0")
        try:
            image, door = engine.push("acme/box"), agent_script.Engine(engine.socket)
            door.pull(image, "00", lambda _: None, lambda _: None)
            fill(engine.directory / "root", 0.9)
            assert door.remove_images((), {}, 0.8) == []
            assert read_images(engine) == {image}
            engine.kill()
            engine.label = agent_script.ENGINE_LABEL
            engine.start()
            assert len(door.remove_images((), {}, 0.8)) == 1
            assert read_images(engine) == set()
        finally:
            engine.close()


def test_the_bridge_of_the_providers_own_docker_stays() -> None:
    """With `--bridge=none` a dockerd removes docker0, whose ever it is."""
    with make_netns() as netns:
        ip = ["ip", "-netns", netns.name]
        subprocess.run([*ip, "link", "add", "docker0", "type", "bridge"], check=True)
        subprocess.run([*ip, "address", "add", "172.17.0.1/16", "dev", "docker0"], check=True)
        subprocess.run([*ip, "link", "set", "docker0", "up"], check=True)
        show = [*ip, "-oneline", "-4", "address", "show", "dev", "docker0"]
        before = subprocess.check_output([*ip, "-json", "link", "show", "docker0"])
        engine = Engine(netns)
        try:
            assert b"172.17.0.1/16" in subprocess.check_output(show)
            engine.kill()
            engine.start()
            assert b"172.17.0.1/16" in subprocess.check_output(show)
            assert subprocess.check_output([*ip, "-json", "link", "show", "docker0"]) == before
        finally:
            engine.close()


def test_doctor_knows_which_runc(engine: Engine) -> None:
    said = subprocess.run(["runc", "--version"], capture_output=True, text=True, check=True)
    assert f"runc version {agent_script.Engine(engine.socket).read_runc()}\n" in said.stdout


def test_a_closed_engine_leaves_nothing() -> None:
    """Also what a dead dockerd ran, whose processes are in other namespaces."""
    with make_netns() as netns:
        engine = Engine(netns)
        try:
            image = engine.push("acme/box").partition("@")
            engine.call("POST", f"/images/create?fromImage={image[0]}&tag={image[2]}")
            body = {"Image": "".join(image), "Cmd": SLEEP, "HostConfig": {"NetworkMode": "none"}}
            made = engine.call("POST", "/containers/create", body)[1]["Id"]
            assert engine.call("POST", f"/containers/{made}/start")[0] == 204
            engine.kill()
            assert engine.processes().keys() == {made}
        finally:
            engine.close()
        assert not engine.cgroup.exists()  # the kernel removes none that has a process


def test_an_engine_that_is_slow_to_tell_its_version_keeps_the_one_it_told(tmp_path: Path) -> None:
    """A busy machine takes its time for that: it is not without an engine."""
    path = tmp_path / "engine.sock"
    no, ping, version = (500, {"message": "no"}), (200, "OK"), (200, {"Version": "20.10.24"})
    looks = ((no,), (ping, no), (ping, version), (ping,), (no,))

    def serve() -> None:
        for status, body in itertools.chain(*looks):
            with server.accept()[0] as client:
                client.recv(65_536)
                raw = json.dumps(body)
                head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(raw)}\r\n\r\n"
                client.sendall((head + raw).encode())

    async def ask() -> list[tuple[str, str]]:
        workloads, said = make_workloads(path), []
        for _ in looks:
            workloads.engine_asked_s = -100.0
            workloads.engine_error = ""
            await agent_script.ask_version(workloads)
            said.append((workloads.engine_version, workloads.engine_error))
        workloads.threads.shutdown()
        return said

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        known = ("20.10.24", "")
        assert asyncio.run(ask()) == [("", "no"), ("", "no"), known, known, ("20.10.24", "no")]
        thread.join()
