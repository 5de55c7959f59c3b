"""Tables for the agent's rules of workloads: what it takes, what it makes of it, what it does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.server
import io
import json
import math
import os
import random
import shutil
import socketserver
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent
from agent import Container, Count, Limits, Memory, Past, Reading, Restart, Verb, Wish
from proto import openinfra_pb2 as pb
from tests.fuzz_tool import check_container

ID = "3f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f01"
OTHER = "4f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f02"
WORKLOAD = "5f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f03"
IMAGE = f"registry.coledex.com/acme/web@sha256:{'ab' * 32}"
OFFERED = Limits(4000, 8 << 30)
ADDRESS = "10.77.16.5"
SECRETS = Path("/run/openinfra/secrets")


def make(**changes: Any) -> pb.Assignment:
    values: dict[str, Any] = {
        "assignment_id": ID,
        "fence": 7,
        "workload_id": WORKLOAD,
        "image": IMAGE,
        "command": ["serve", "--quick"],
        "env": {"B": "2", "A": "1"},
        "cpu_milli": 250,
        "memory_bytes": 64 << 20,
        "ports": [pb.Port(container_port=80, host_port=20_000)],
        "egress": pb.EGRESS_INTERNET,
        "restart": pb.RESTART_ALWAYS,
        **changes,
    }
    return pb.Assignment(**values)


def take(**changes: Any) -> Wish:
    (wish,), refused = agent.decide_wishes([make(**changes)], OFFERED, ADDRESS, SECRETS)
    assert refused == {}
    return wish


# ------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cpus", "expected"),
    [
        ("", 4, Limits(3000, 700)),
        ("", 1, Limits(500, 700)),
        ("# all\n\nCPUS=1.5\nMEMORY = 512\n", 4, Limits(1500, 512)),
        ("CPUS=0.25\n", 1, Limits(250, 700)),
        ("CPUS=64\nMEMORY=1G\n", 4, Limits(4000, 1000)),
    ],
)
def test_limits(text: str, cpus: int, expected: Limits) -> None:
    assert agent.parse_limits(text, "f", cpus, 1000) == expected


@pytest.mark.parametrize(("size", "expected"), [("3K", 3 << 10), ("2M", 2 << 20), ("1G", 1 << 30)])
def test_memory_has_a_suffix(size: str, expected: int) -> None:
    assert agent.parse_limits(f"MEMORY={size}", "f", 2, 1 << 40).memory_bytes == expected


@pytest.mark.parametrize(
    "line",
    [
        *("CPUS", "CPUS=", "CPUS=-1", "CPUS=0", "CPUS=nan", "CPUS=1e3", "CPUS=1\nCPUS=1"),
        *("MEMORY=1.5G", "MEMORY=0", "MEMORY=1T", "cpus=1", "DISK=1G", "MEMORY=1\nMEMORY=1"),
        *("REGISTRY=", "REGISTRY=https://r.example", "REGISTRY=r\nREGISTRY=r"),
    ],
)
def test_malformed_limits_say_what_to_do(line: str) -> None:
    with pytest.raises(agent.Error, match=r"f:[12]: line is no limit.*; write lines like") as error:
        agent.parse_limits(line, "f", 2, 1000)
    assert error.value.exit_code == 2


# ------------------------------------------------------------------------------------------------
# Assignments
# ------------------------------------------------------------------------------------------------


def test_a_good_assignment_is_taken() -> None:
    wish = take()
    assert dataclasses.replace(wish, sha256="") == Wish(
        assignment_id=ID,
        fence=7,
        workload_id=WORKLOAD,
        image=IMAGE,
        command=("serve", "--quick"),
        env=(("A", "1"), ("B", "2")),
        cpu_milli=250,
        memory_bytes=64 << 20,
        ports=((80, 20_000),),
        has_internet=True,
        restart=Restart.ALWAYS,
    )
    assert "quick" not in repr(wish)


def test_secrets_are_taken_and_not_shown() -> None:
    secrets = {"token": b"hunter2", "a.B_c-1": b"\0\xff", "x" * 63: b"", "big": b"x" * 16_297}
    wish = take(secrets=secrets)  # 16,384 bytes with their names
    assert (wish.has_secrets, dict(wish.secrets)) == (True, secrets)
    assert "hunter2" not in repr(wish)
    assert "hunter2" not in json.dumps(agent.render_container(wish, ADDRESS, SECRETS))
    withheld = take(secrets_withheld=True)
    assert (withheld.has_secrets, withheld.secrets) == (True, ())
    # It is the same container: what runs goes on.
    assert withheld.sha256 == wish.sha256 == take(secrets={"token": b"other"}).sha256
    assert (take().has_secrets, take().secrets) == (False, ())


@pytest.mark.parametrize(
    "name",
    ["docker.io/library/redis", "a:5000/b/c", "127.0.0.1:5000/acme/a_b__c-d.e", "x.y-z.io/a/b"],
)
def test_good_images(name: str) -> None:
    assert take(image=f"{name}@sha256:{'0' * 64}").image.startswith(name)


def port(inner: int, outer: int) -> pb.Port:
    return pb.Port(container_port=inner, host_port=outer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"assignment_id": ""}, "assignment_id is no UUID"),
        ({"assignment_id": ID.upper()}, "assignment_id is no UUID"),
        ({"assignment_id": ID + "\n"}, "assignment_id is no UUID"),
        ({"assignment_id": "../" + ID[3:]}, "assignment_id is no UUID"),
        ({"workload_id": "x"}, "workload_id is no UUID"),
        ({"image": ""}, "image is not"),
        ({"image": "redis"}, "image is not"),
        ({"image": "docker.io/library/redis:7"}, "image is not"),
        ({"image": IMAGE.replace("registry.coledex.com/", "")}, "image is not"),
        ({"image": IMAGE.replace("coledex", "Coledex")}, "image is not"),
        ({"image": IMAGE.replace("acme", "Acme")}, "image is not"),
        ({"image": IMAGE.replace("acme", "..")}, "image is not"),
        ({"image": IMAGE.replace("acme", "a/b")}, "image is not"),
        ({"image": IMAGE.replace("registry.coledex.com", "localhost")}, "image is not"),
        ({"image": IMAGE.replace("coledex.", "coledex..")}, "image is not"),
        ({"image": IMAGE[:-1]}, "image is not"),
        ({"image": IMAGE + "\n"}, "image is not"),
        ({"image": IMAGE.replace("web", "web?x=1")}, "image is not"),
        ({"image": IMAGE.replace("web", "w" * 250)}, "image is not"),
        ({"command": ["a\0", "b"]}, "command has a NUL"),
        ({"command": ["a" * 65_536]}, "command and env are over 65536 bytes"),
        ({"command": [""] * 65_537}, "command and env are over 65536 bytes"),
        ({"command": ["é" * 32_768]}, "command and env are over 65536 bytes"),
        ({"env": {"A": "a" * 65_536}}, "command and env are over 65536 bytes"),
        ({"env": {"A": "\0"}}, "env has a NUL in A"),
        ({"env": {"1A": ""}}, "env has a key that is no name: 1A"),
        ({"env": {"A=B": ""}}, "env has a key that is no name: A=B"),
        ({"env": {"": ""}}, "env has a key that is no name"),
        ({"env": {"--env": ""}}, "env has a key that is no name: --env"),
        ({"env": {"A\nB": ""}}, "env has a key that is no name: A?B"),
        ({"cpu_milli": 0}, "cpu_milli is under 10"),
        ({"cpu_milli": 9}, "cpu_milli is under 10"),
        ({"cpu_milli": 4001}, "cpu_milli is over the 4000"),
        ({"memory_bytes": 0}, "memory_bytes is under"),
        ({"memory_bytes": (6 << 20) - 1}, "memory_bytes is under"),
        ({"memory_bytes": (8 << 30) + 1}, "memory_bytes is over"),
        ({"memory_bytes": 2**64 - 1}, "memory_bytes is over"),
        ({"ports": [port(0, 20_000)]}, "ports has container_port 0"),
        ({"ports": [port(65_536, 20_000)]}, "ports has container_port 65536"),
        ({"ports": [port(80, 19_999)]}, "ports has host_port 19999"),
        ({"ports": [port(80, 28_192)]}, "ports has host_port 28192"),
        ({"ports": [port(80, 22)]}, "ports has host_port 22"),
        ({"ports": [port(80, 20_000), port(81, 20_000)]}, "ports has one twice"),
        ({"ports": [port(80, 20_000), port(80, 20_001)]}, "ports has one twice"),
        ({"ports": [port(80 + n, 20_000 + n) for n in range(9)]}, "ports are more than 8"),
        ({"egress": pb.EGRESS_UNSPECIFIED}, "egress is none that is known"),
        ({"egress": 3}, "egress is none that is known"),
        ({"restart": pb.RESTART_UNSPECIFIED}, "restart is none that is known"),
        ({"restart": 4}, "restart is none that is known"),
        ({"secrets": {str(n): b"" for n in range(17)}}, "secrets are more than 16"),
        *(
            ({"secrets": {name: b"hunter2"}}, "secrets have a name that is none of a file")
            for name in (
                "",
                ".",
                "..",
                ".x",
                "-",
                "a/b",
                "../x",
                "/etc/x",
                "a b",
                "é",
                "a\n",
                "a\0",
            )
        ),
        ({"secrets": {"a" * 64: b""}}, "secrets have a name that is none of a file"),
        ({"secrets": {"a": b"x" * 16_384}}, "secrets are over 16384 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(change: dict[str, Any], said: str) -> None:
    wishes, refused = agent.decide_wishes([make(**change)], OFFERED, ADDRESS, SECRETS)
    assert wishes == ()
    assert [reason for reason in refused.values() if said in reason], refused
    assert "hunter2" not in str(refused)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu_milli": 4000, "memory_bytes": 8 << 30},  # all that the host lends
        {"cpu_milli": 10, "memory_bytes": 6 << 20},
        {"image": IMAGE.replace("web", "w" * (255 - len("registry.coledex.com/acme/")))},
        {"env": {}, "command": ["a" * 65_535]},  # and a NUL at its end
        {"env": {"A": "a" * 32_765}, "command": ["é" * 16_383, ""]},
        {"ports": [port(1, 20_000), port(65_535, 28_191)]},
        {"ports": [port(80 + n, 20_000 + n) for n in range(8)]},
        {"secrets": {str(n): b"" for n in range(16)}},
    ],
)
def test_what_just_fits_is_taken(change: dict[str, Any]) -> None:
    take(**change)


# Field 100, a varint; in the assignment, and in its port.
UNKNOWN = b"\xa0\x06\x01"


@pytest.mark.parametrize(
    "raw",
    [
        make().SerializeToString() + UNKNOWN,
        make(ports=[]).SerializeToString()
        + bytes([9 << 3 | 2, len(port(80, 20_000).SerializeToString() + UNKNOWN)])
        + port(80, 20_000).SerializeToString()
        + UNKNOWN,
    ],
    ids=["assignment", "port"],
)
def test_what_a_newer_control_plane_asks_for_is_refused(raw: bytes) -> None:
    wishes, refused = agent.decide_wishes(
        [pb.Assignment.FromString(raw)], OFFERED, ADDRESS, SECRETS
    )
    assert (wishes, refused) == ((), {ID: "assignment has fields unknown here"})


def many(count: int, **changes: Any) -> list[pb.Assignment]:
    return [make(assignment_id=f"{n:08x}{ID[8:]}", ports=[], **changes) for n in range(count)]


def test_the_list_is_taken_as_far_as_it_fits() -> None:
    wishes, refused = agent.decide_wishes(many(4, cpu_milli=1500), OFFERED, ADDRESS, SECRETS)
    assert [wish.assignment_id[:8] for wish in wishes] == ["00000000", "00000001"]
    assert set(refused.values()) == {"cpu_milli is over the 1000 that this host has left to lend"}
    wishes, refused = agent.decide_wishes(many(2, memory_bytes=5 << 30), OFFERED, ADDRESS, SECRETS)
    assert (len(wishes), len(refused)) == (1, 1)
    wishes, refused = agent.decide_wishes(
        many(250, cpu_milli=10, memory_bytes=6 << 20), OFFERED, ADDRESS, SECRETS
    )
    assert (len(wishes), len(refused)) == (200, 50)
    # What has ended for good holds nothing of what is lent.
    ended = many(4, cpu_milli=1500)
    for each in ended[:3]:
        each.done = True
    wishes, refused = agent.decide_wishes(ended, OFFERED, ADDRESS, SECRETS)
    assert (len(wishes), refused) == (4, {})
    twice = [make(), make(assignment_id=OTHER), make()]
    wishes, refused = agent.decide_wishes(twice, OFFERED, ADDRESS, SECRETS)
    assert [wish.assignment_id for wish in wishes] == [ID]
    assert refused == {OTHER: "ports has a host_port of another assignment"}


def test_the_container_is_this_one() -> None:
    wish = take()
    assert agent.render_container(wish, ADDRESS, SECRETS) == {
        "Image": IMAGE,
        "User": "65534:65534",
        "Cmd": ["serve", "--quick"],
        "Env": ["OPENINFRA_FENCE=7", "A=1", "B=2"],
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": {
            "openinfra.assignment": ID,
            "openinfra.workload": WORKLOAD,
            "openinfra.fence": "7",
            "openinfra.wish": wish.sha256,
        },
        "HostConfig": {
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=33554432,uid=65534,gid=65534,mode=0700"},
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "Init": True,
            "PidsLimit": 128,
            "Memory": 67_108_864,
            "MemorySwap": 67_108_864,
            "NanoCpus": 250_000_000,
            "OomScoreAdj": 500,
            "Ulimits": [
                {"Name": "nofile", "Soft": 1024, "Hard": 4096},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "local", "Config": {"max-size": "5m", "max-file": "2"}},
            "NetworkMode": "oi-3f0c6c1e8d4",
            "Dns": ["9.9.9.9", "1.1.1.1"],
            "PortBindings": {"80/tcp": [{"HostIp": ADDRESS, "HostPort": "20000"}]},
        },
        "NetworkingConfig": {"EndpointsConfig": {"oi-3f0c6c1e8d4": {}}},
    }
    assert len(wish.sha256) == 64


def test_the_one_mount_is_the_assignments_own_directory() -> None:
    body = agent.render_container(take(secrets={"a": b"b"}), ADDRESS, SECRETS)
    plain = agent.render_container(take(), ADDRESS, SECRETS)
    assert body["HostConfig"].pop("Mounts") == [
        {
            "Type": "bind",
            "Source": f"/run/openinfra/secrets/{ID}",
            "Target": "/run/secrets",
            "ReadOnly": True,
        }
    ]
    for each in (body, plain):
        del each["Labels"]["openinfra.wish"]
    assert body == plain


def test_the_network_is_this_one() -> None:
    assert agent.render_network(take(egress=pb.EGRESS_NONE)) == {
        "Name": "ox-3f0c6c1e8d4",
        "CheckDuplicate": True,
        "Driver": "bridge",
        "EnableIPv6": False,
        "Options": {"com.docker.network.bridge.name": "ox-3f0c6c1e8d4"},
        "Labels": {"openinfra.assignment": ID},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"fence": 8},
        {"workload_id": OTHER},
        {"image": IMAGE.replace("ab", "cd")},
        {"command": ["serve"]},
        {"env": {"A": "2"}},
        {"cpu_milli": 251},
        {"memory_bytes": 65 << 20},
        {"ports": []},
        {"egress": pb.EGRESS_NONE},
        {"secrets": {"a": b"b"}},
    ],
)
def test_every_change_makes_another_container(change: dict[str, Any]) -> None:
    assert take(**change).sha256 != take().sha256
    assert take().sha256 == take().sha256


def test_another_policy_or_address() -> None:
    """What follows an end is no property of the container; the host's address is one."""
    assert take(restart=pb.RESTART_NEVER).sha256 == take().sha256
    (moved,), _ = agent.decide_wishes([make()], OFFERED, "10.77.16.6", SECRETS)
    assert moved.sha256 != take().sha256


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["Privileged", "/var/run/docker.sock:/s", "host", "--privileged", "ALL", IMAGE]
    ),
)
PORTS = st.builds(
    pb.Port,
    container_port=st.sampled_from([0, 22, 80, 65_535]),
    host_port=st.sampled_from([0, 22, 20_000, 20_001, 28_191]),
)
HOSTILE: dict[str, st.SearchStrategy[Any]] = {
    "assignment_id": st.one_of(st.just(OTHER), TEXTS),
    "fence": st.integers(0, 2**64 - 1),
    "image": TEXTS,
    "command": st.lists(TEXTS, max_size=3),
    "env": st.dictionaries(st.one_of(TEXTS, st.just("LD_PRELOAD")), TEXTS, max_size=2),
    "cpu_milli": st.sampled_from([0, 10, 4000, 2**32 - 1]),
    "memory_bytes": st.sampled_from([0, 6 << 20, 8 << 30, 2**64 - 1]),
    "ports": st.lists(PORTS, max_size=3),
    "egress": st.integers(0, 3),
    "restart": st.integers(0, 4),
    "secrets": st.dictionaries(
        st.one_of(TEXTS, st.sampled_from(["token", "..", ".", "../x", "/etc/passwd", "a/b", ".x"])),
        st.binary(max_size=9),
        max_size=3,
    ),
    "secrets_withheld": st.booleans(),
}
# One that this host would take, with a few things else: of those made of nothing but what is odd,
# none is taken, and nothing is seen of what becomes of it.
ALTERED = st.lists(
    st.one_of(*(st.tuples(st.just(name), odd) for name, odd in HOSTILE.items())), max_size=4
).map(lambda changes: make(**dict(changes)))


@given(st.lists(ALTERED, max_size=4))
def test_no_assignment_gets_anything_of_the_host(assignments: list[pb.Assignment]) -> None:
    wishes, refused = agent.decide_wishes(assignments, OFFERED, ADDRESS, SECRETS)
    assert all(reason.isprintable() for reason in refused.values())
    for wish in wishes:
        body = json.loads(json.dumps(agent.render_container(wish, ADDRESS, SECRETS)))
        check_container(body, wish, OFFERED, ADDRESS, SECRETS)


class Door(http.server.BaseHTTPRequestHandler):
    """In an engine's place: it has every image, and notes what it is asked for."""

    config: object = None
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_GET(self) -> None:
        self._answer({"Config": Door.config})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        Door.asked.append((self.path, json.loads(raw)))
        self._answer({})

    def _answer(self, what: object) -> None:
        raw = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[agent.Engine]:
    path = tmp_path_factory.mktemp("door") / "engine.sock"
    with socketserver.UnixStreamServer(str(path), Door) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield agent.Engine(path)
        server.shutdown()
        thread.join()


GOOD_PATHS, BAD_PATHS = ("/data", "/tmp/", "/run", "/var/run"), ("/a/../b", "/a,size=9g", "/x:/y")
SECRET_PATHS = ("/run/secrets", "/run/secrets/x", "/var/run/secrets/", "/run/./secrets")
VOLUMES: st.SearchStrategy[dict[str, dict[str, str]]] = st.dictionaries(
    st.sampled_from([*GOOD_PATHS, *BAD_PATHS, *SECRET_PATHS]), st.just({}), max_size=2
)
CONFIGS: st.SearchStrategy[object] = st.one_of(
    VOLUMES.map(lambda volumes: {"Volumes": volumes, "User": "0", "Privileged": True}),
    st.dictionaries(TEXTS, st.just({}), max_size=2).map(lambda volumes: {"Volumes": volumes}),
    st.one_of(st.none(), TEXTS, TEXTS.map(lambda text: {"Volumes": text})),
)


@settings(deadline=None, max_examples=300)
@given(st.booleans(), CONFIGS)
def test_no_image_gets_anything_of_the_host(
    door: agent.Engine, has_secrets: bool, config: object
) -> None:
    """What goes to the engine, once it was looked at what the image says."""
    wish = take(secrets={"token": b"one"} if has_secrets else {})
    Door.config = config
    Door.asked.clear()
    with contextlib.suppress(agent.Refuse):
        door.create(wish, ADDRESS, "", SECRETS)
    if not Door.asked:
        return
    network, container = Door.asked
    assert network == ("/v1.41/networks/create", agent.render_network(wish))
    assert container[0] == f"/v1.41/containers/create?name=oi-{wish.assignment_id}"
    check_container(container[1], wish, OFFERED, ADDRESS, SECRETS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ()),
        ({}, ()),
        ({"Volumes": None}, ()),
        ({"Volumes": {"/data": {}, "/var/lib/x": {}}}, ("/data", "/var/lib/x")),
        ({"Volumes": {"/run": {}, "/run/secrets2": {}}}, ("/run", "/run/secrets2")),
        ({"Volumes": {f"/{n:02}": {} for n in range(16)}}, tuple(f"/{n:02}" for n in range(16))),
    ],
)
def test_volumes(config: object, expected: tuple[str, ...]) -> None:
    assert agent.parse_volumes(config) == expected


@pytest.mark.parametrize(
    "path",
    [
        *("/", "data", "/a/../b", "/a:b", "/a,size=9g", "/a b", "/\n"),
        *(
            "/run/secrets",
            "/run/secrets/",
            "/run/secrets/x",
            "/var/run/secrets",
            "/var/run/secrets/x",
        ),
    ],
)
def test_bad_volumes(path: str) -> None:
    with pytest.raises(agent.Refuse, match="no place here"):
        agent.parse_volumes({"Volumes": {path: {}}})


def test_a_volume_that_may_hide_secrets() -> None:
    """Where /var/run leads to /run, as in most images."""
    config: dict[str, object] = {"Volumes": {"/var/run": {}}}
    assert agent.parse_volumes(config) == ("/var/run",)
    with pytest.raises(agent.Refuse, match="no place here"):
        agent.parse_volumes(config, has_secrets=True)


# ------------------------------------------------------------------------------------------------
# The engine's words
# ------------------------------------------------------------------------------------------------


def test_a_pull_says_how_far_it_is() -> None:
    layers: dict[str, tuple[int, int]] = {}
    for status, layer, current, total in (
        ("Pulling fs layer", "a", 0, 0),
        ("Downloading", "a", 3_000_000, 20_000_000),
        ("Downloading", "b", 20_000_000, 99_500_000),
        ("Download complete", "a", 0, 0),
        ("Extracting", "a", 1, 20_000_000),
    ):
        detail = {"current": current, "total": total} if total else {}
        event = {"status": status, "id": layer, "progressDetail": detail}
        assert agent.parse_pull(json.dumps(event).encode(), layers) == ""
    assert agent.render_progress(layers) == "40 of 120 MB"
    assert agent.parse_pull(b'{"error":"no\\nspace"}', layers) == "no?space"
    for junk in (b"{", b"[]", b"7", b"[" * 9999, b'{"progressDetail":7,"status":"Downloading"}'):
        assert agent.parse_pull(junk, layers) == "the engine's words could not be read"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("manifest for x not found: manifest unknown: manifest unknown", True),
        ("pull access denied for x, repository does not exist or may require 'docker login'", True),
        ("unauthorized: authentication required", False),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", True),
        ('Get "http://127.0.0.1:5001/v2/": dial tcp: connect: connection refused', False),
        ("dial tcp: lookup nowhere.example: no such host", False),
        ("net/http: TLS handshake timeout", False),
        ("no answer for 60 s", False),
    ],
)
def test_a_registry_that_says_no(words: str, expected: bool) -> None:
    assert agent.decide_pull_error(words) is expected


@pytest.mark.parametrize(
    ("minimum", "expected"),
    [
        ("1.12", "/v1.41"),
        ("1.41", "/v1.41"),
        ("1.44", "/v1.44"),  # Docker 29
        ("2.0", "/v2.0"),
        ("", "/v1.41"),
        ("None", "/v1.41"),
        ("1.44/../x", "/v1.41"),
        ("1.44\n", "/v1.41"),
    ],
)
def test_a_newer_engine_is_spoken_to_as_it_wants(minimum: str, expected: str) -> None:
    assert agent.decide_api(minimum) == expected


def frame(text: bytes, stream: int = 1) -> bytes:
    """What a container printed at once, as the engine sends it."""
    return bytes([stream, 0, 0, 0]) + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", b""),
        (frame(b"out\n") + frame(b"err\n", 2) + frame(b"in\n", 0), b"out\nerr\nin\n"),
        (frame(b"") + frame(b"a\n") + frame(b""), b"a\n"),
        (frame(b"x" * 100_000), b"x" * 100_000),
        (frame(b"a\n") + frame(b"lost")[:3], b"a\n"),  # a head that is cut
        (frame(b"a\n") + frame(b"lost")[:8], b"a\n"),
        (frame(b"a\n") + frame(b"kept")[:10], b"a\nke"),
        (b"\1\0\0\0\xff\xff\xff\xffto the end", b"to the end"),  # a length that is a lie
        (b"hi\n", b"hi\n"),  # of a terminal
        (b"\x1b[1mlonger than a head\n", b"\x1b[1mlonger than a head\n"),
        (frame(b"a\n") + b"\1\0\0\7" + b"no frame", b"a\n\1\0\0\7no frame"),
        (frame(b"a\n") + b"\3\0\0\0\0\0\0\1x", b"a\n\3\0\0\0\0\0\0\1x"),
    ],
)
def test_what_was_printed_is_taken_out_of_its_frames(raw: bytes, expected: bytes) -> None:
    assert b"".join(agent.parse_frames(io.BytesIO(raw).read)) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], (b"", False)),
        ([b"abcd"], (b"abcd", False)),
        ([b"abcde"], (b"bcde", True)),
        ([b"a", b"bcd", b"ef"], (b"cdef", True)),
        ([b"abcde", b""], (b"bcde", True)),
    ],
)
def test_the_end_of_a_log_is_kept(parts: list[bytes], expected: tuple[bytes, bool]) -> None:
    assert agent.cut_log(iter(parts), 4) == expected


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_stream_gives_more_than_is_asked_for(raw: bytes, limit_bytes: int) -> None:
    kept, is_cut = agent.cut_log(agent.parse_frames(io.BytesIO(raw).read), limit_bytes)
    assert kept in raw or not is_cut
    assert len(kept) <= limit_bytes


def test_images_go_that_nothing_uses_the_oldest_first() -> None:
    def image(n: int, size: int = 1, *names: str) -> dict[str, Any]:
        return {"Id": f"sha256:{n:064x}", "Size": size, "RepoDigests": list(names) or None}

    images = [image(1), image(2, 9), image(3, 5, "a@1", "b@1"), image(4, 5, "c@1"), image(5)]
    images += [image(6, 1, "d@1"), {"Id": "../containers/x", "Size": 1}]
    used_s = {"b@1": 50.0, "c@1": 20.0, "d@1": 1.0}
    in_use, wished = {images[4]["Id"]}, {"d@1"}
    order = [1, 0, 3, 2]  # never used, the larger first; then by the last use
    assert agent.plan_images(images, in_use, wished, used_s) == [images[n]["Id"] for n in order]
    assert agent.plan_images([], set(), set(), {}) == []


def test_a_failure_is_tried_again_three_times() -> None:
    step = agent.Step(Verb.PULL, ID, "", take())
    past, waits = Past(), []
    for _ in range(4):
        past = agent.decide_failure(past, step, agent.EngineError(500, "refused"), 100.0)
        waits.append(past.retry_at_s - 100)
    assert waits == [1, 3, 8, 8]
    assert past.rejected == "image cannot be fetched: refused"


def test_a_full_disk_is_tried_once_more() -> None:
    """Each try may write gigabytes; one comes after images went that nobody needs."""
    step, full = agent.Step(Verb.PULL, ID, "", take()), "write /x: no space left on device"
    past = agent.decide_failure(Past(), step, agent.EngineError(500, full), 100.0)
    assert (past.retry_at_s, past.rejected) == (108, "")
    past = agent.decide_failure(past, step, agent.EngineError(500, full), 200.0)
    assert past.rejected == f"image cannot be fetched: {full}"
    past = agent.decide_failure(Past(tries=9), step, agent.EngineError(500, full), 100.0)
    assert past.rejected


@pytest.mark.parametrize(
    ("verb", "status", "words", "expected"),
    [
        # Another port does not come free by waiting.
        (Verb.START, 500, "Bind for x: port is already allocated", {"rejected": "taken on this"}),
        (Verb.START, 500, "listen tcp: address already in use", {"rejected": "asks for 20000)"}),
        (Verb.START, 500, "no such file", {"tries": 0}),  # the container says it, as its end
        (Verb.START, 400, "bad parameter", {"tries": 0}),
        # Somebody removed the image: it is fetched again.
        (Verb.CREATE, 404, "No such image: x", {"has_image": False, "tries": 0}),
        (Verb.CREATE, 404, "no such network", {"trouble": "container cannot be made yet: no such"}),
        (Verb.CREATE, 500, "cannot mount", {"trouble": "container cannot be made yet: cannot"}),
        (Verb.CREATE, 400, "bad parameter", {"rejected": "container cannot be made: bad"}),
        (Verb.CREATE, 409, "name in use", {"rejected": "container cannot be made: name"}),
        (Verb.PULL, 404, "no such image", {"trouble": "image cannot be fetched yet: no such"}),
        (Verb.PULL, 400, "timed out", {"trouble": "image cannot be fetched yet: timed out"}),
        (Verb.PULL, 500, "manifest unknown", {"rejected": "image cannot be fetched: manifest"}),
    ],
)
def test_what_the_engine_could_not_do(
    verb: Verb, status: int, words: str, expected: dict[str, Any]
) -> None:
    step = agent.Step(verb, ID, "c1", take())
    past = agent.decide_failure(Past(has_image=True), step, agent.EngineError(status, words), 1.0)
    said = {"rejected": past.rejected, "trouble": past.trouble}
    assert [key for key, text in said.items() if text] == [*expected.keys() & said.keys()]
    assert past.has_image == expected.get("has_image", True)
    assert past.tries == ("trouble" in expected)
    for key in expected.keys() & said.keys():
        assert expected[key] in said[key]


@pytest.mark.parametrize("verb", [Verb.CREATE, Verb.START])
def test_without_its_secrets_nothing_is_started_here(verb: Verb) -> None:
    step, error = agent.Step(verb, ID, "c1", take()), agent.NoSecretsError("none are here")
    assert agent.decide_failure(Past(), step, error, 100.0).rejected == "none are here"


@pytest.mark.parametrize(
    ("end", "memory_bytes", "said"),
    [
        ({"exit_code": 3}, 0, "ended with exit code 3"),
        ({"exit_code": 137, "is_oom": True}, 64_000_000, "more than its 64 MB of memory"),
        ({"is_oom": True}, 1, "ended with exit code 0 after a process of it was killed for memory"),
        ({"exit_code": 3, "is_oom": True}, 0, "ended with exit code 3 after a process of it was"),
        ({"exit_code": 143, "is_oom": True}, 0, "SIGTERM (exit code 143) after a process of it"),
        ({"exit_code": 137}, 0, "ended by SIGKILL (exit code 137)"),
        ({"exit_code": 143}, 0, "ended by SIGTERM (exit code 143)"),
        ({"exit_code": 255}, 0, "ended with exit code 255"),
        ({"exit_code": 128, "error": "no such file"}, 0, "cannot start: no such file"),
    ],
)
def test_an_end_is_told(end: dict[str, Any], memory_bytes: int, said: str) -> None:
    found = dataclasses.replace(ENDED, **{"exit_code": 0, **end})
    assert said in agent.render_end(found, memory_bytes)


# ------------------------------------------------------------------------------------------------
# Plan
# ------------------------------------------------------------------------------------------------

WISH = take()
NAME = f"oi-{ID}"
RUNNING = Container("c1", NAME, ID, WISH.sha256, True)
CREATED = dataclasses.replace(RUNNING, is_running=False)
ENDED = dataclasses.replace(CREATED, has_ended=True, exit_code=1)
GOOD = dataclasses.replace(ENDED, exit_code=0)
TIGHT = dataclasses.replace(GOOD, is_oom=True)
ALIEN = dataclasses.replace(RUNNING, id="c2", name="oi-x")
NETWORK = {ID: "oi-3f0c6c1e8d4"}


def plan(
    wishes: list[Wish] | None, found: list[Container], past: Past | None = None, **more: Any
) -> list[tuple[str, str]]:
    kept, late = (frozenset(more.pop(name, ())) for name in ("kept", "late"))
    memory = Memory(stops=more.pop("stops", {}), kept=kept, late=late)
    if past:
        memory.pasts[ID] = past
    given = {"now_s": 1000.0, "right_until_s": 2000.0, "networks": NETWORK if found else {}}
    steps = agent.plan_containers(wishes, found, memory=memory, **{**given, **more})
    return [(step.verb.value, step.container_id or step.network) for step in steps]


def policy(restart: Restart) -> Wish:
    return dataclasses.replace(WISH, restart=restart)


@pytest.mark.parametrize(
    ("wishes", "found", "past", "expected"),
    [
        ([WISH], [], None, [("pull", "")]),
        ([WISH], [], Past(has_image=True), [("create", "")]),
        ([WISH], [], Past(retry_at_s=1001), []),
        ([WISH], [], Past(retry_at_s=1000), [("pull", "")]),
        ([WISH], [], Past(rejected="no"), []),
        ([WISH], [CREATED], None, [("start", "c1")]),
        ([WISH], [RUNNING], None, []),
        ([WISH], [RUNNING], Past(rejected="no"), [("term", "c1")]),
        ([WISH], [CREATED], Past(rejected="no"), [("remove", "c1")]),
        # A crash: 1, 2, 4, ... 300 s.
        ([WISH], [ENDED], Past(ended_s=999.5, streak=1), []),
        ([WISH], [ENDED], Past(ended_s=999, streak=1), [("start", "c1")]),
        ([WISH], [ENDED], Past(ended_s=996.5, streak=3), []),
        ([WISH], [ENDED], Past(ended_s=996, streak=3), [("start", "c1")]),
        ([WISH], [ENDED], Past(ended_s=701, streak=40), []),
        ([WISH], [ENDED], Past(ended_s=700, streak=40), [("start", "c1")]),
        ([WISH], [GOOD], Past(ended_s=900, streak=1), [("start", "c1")]),
        ([policy(Restart.ON_FAILURE)], [ENDED], Past(ended_s=900, streak=1), [("start", "c1")]),
        ([policy(Restart.ON_FAILURE)], [GOOD], Past(ended_s=900, streak=1), []),
        ([policy(Restart.NEVER)], [ENDED], Past(ended_s=900, streak=1), []),
        ([policy(Restart.NEVER)], [GOOD], Past(ended_s=900, streak=1), []),
        # We stopped it, since the right was over: it goes on, whatever its policy says.
        ([policy(Restart.NEVER)], [ENDED], Past(ended_s=1000, is_stopped=True), [("start", "c1")]),
        # Not wanted, or another one.
        ([], [RUNNING], None, [("term", "c1")]),
        ([], [ENDED], None, [("remove", "c1")]),
        ([], [CREATED], None, [("remove", "c1")]),
        ([dataclasses.replace(WISH, sha256="x")], [RUNNING], None, [("term", "c1")]),
        ([dataclasses.replace(WISH, sha256="x")], [ENDED], None, [("remove", "c1")]),
        ([WISH], [RUNNING, ALIEN], None, [("term", "c2")]),
    ],
)
def test_next_step(
    wishes: list[Wish], found: list[Container], past: Past | None, expected: list[tuple[str, str]]
) -> None:
    assert plan(wishes, found, past) == expected
    # Without the right all that runs is stopped, nothing begins, and what is not wanted still goes.
    ends = [("term", one.id) for one in found if one.is_running]
    gone = [step for step in expected if step[0] == "remove"]
    for now_s in (2000.0, 2000.1, 9e9):
        assert plan(wishes, found, past, now_s=now_s) == ends + gone
    without = [step for step in expected if step[0] in ("term", "remove")]
    assert plan(wishes, found, past, unready="no firewall") == without


def test_a_container_that_can_never_start_again_is_made_anew() -> None:
    """As an engine leaves it that was killed in the middle of its start."""
    leaked = dataclasses.replace(ENDED, error="task c1: already exists: unknown")
    past = Past(ended_s=900, streak=1)
    assert plan([WISH], [leaked], past) == [("remove", "c1")]
    assert plan([WISH], [leaked], past, now_s=900.5) == []
    assert plan([WISH], [leaked], past, now_s=2000.0) == []
    assert plan([WISH], [], past) == [("pull", "")]


@pytest.mark.parametrize(("told_s", "expected"), [(1000, []), (990.5, []), (990, [("kill", "c1")])])
def test_a_stop_becomes_a_kill(told_s: float, expected: list[tuple[str, str]]) -> None:
    assert plan([], [RUNNING], stops={"c1": told_s}) == expected


FROZEN = dataclasses.replace(RUNNING, is_frozen=True)


@pytest.mark.parametrize(
    ("wishes", "found", "now_s", "expected"),
    [
        ([WISH], RUNNING, 2010.0, [("term", "c1")]),
        ([WISH], RUNNING, 2011.0, [("kill", "c1")]),  # as after a suspend
        ([], RUNNING, 2011.0, [("kill", "c1")]),
        ([], RUNNING, 1000.0, [("term", "c1")]),
        ([], FROZEN, 1000.0, [("kill", "c1")]),  # SIGTERM would have it go on, with no firewall
        ([WISH], FROZEN, 1000.0, []),
        ([WISH], FROZEN, 2000.0, [("kill", "c1")]),
    ],
)
def test_some_are_not_asked_to_end(
    wishes: list[Wish], found: Container, now_s: float, expected: list[tuple[str, str]]
) -> None:
    assert plan(wishes, [found], now_s=now_s, late_s=2011.0) == expected


@pytest.mark.parametrize(
    ("wishes", "late", "expected"),
    [
        ([], {ID}, [("kill", "c1")]),
        ([], {OTHER}, [("term", "c1")]),
        ([WISH], {ID}, []),
    ],
)
def test_what_may_run_elsewhere_is_not_asked_to_end(
    wishes: list[Wish], late: set[str], expected: list[tuple[str, str]]
) -> None:
    assert plan(wishes, [RUNNING], late=late) == expected


@pytest.mark.parametrize(
    ("until_s", "listed", "late", "expected"),
    [
        (991.0, {ID}, set(), set()),  # they had their time to end, or still have it
        (991.0, set(), set(), set()),
        (991.0, set(), {OTHER}, {OTHER}),
        (990.0, {ID}, set(), set()),
        (990.0, set(), set(), {ID}),
        (400.0, {OTHER}, set(), {ID}),
        (400.0, {ID}, {OTHER}, {OTHER}),
        (400.0, set(), {OTHER}, {ID, OTHER}),
        (400.0, {ID, OTHER}, {ID, OTHER}, set()),
    ],
)
def test_what_may_run_elsewhere(
    until_s: float, listed: set[str], late: set[str], expected: set[str]
) -> None:
    lease = agent.Lease(until_s, frozenset({ID}))
    assert agent.decide_late(lease, frozenset(listed), frozenset(late), 1000.0) == expected


WITH_PORTS = dataclasses.replace(WISH, ports=((80, 20_000),))
WITHOUT = dataclasses.replace(WISH, ports=())


@pytest.mark.parametrize(
    ("wish", "found", "expected"),
    [
        (WITH_PORTS, RUNNING, [("term", "c1")]),
        (WITHOUT, RUNNING, []),
        (dataclasses.replace(WITH_PORTS, restart=Restart.NEVER), RUNNING, []),  # it would run twice
        (WITHOUT, CREATED, [("remove", "c1")]),
        (WITHOUT, ENDED, [("remove", "c1")]),
        (policy(Restart.NEVER), ENDED, []),
        (policy(Restart.ON_FAILURE), GOOD, []),
    ],
)
def test_what_lost_its_network_is_made_anew(
    wish: Wish, found: Container, expected: list[tuple[str, str]]
) -> None:
    past = Past(ended_s=500.0) if found.has_ended else None
    assert plan([wish], [found], past, networks={}) == expected
    is_made_anew = expected == [("remove", "c1")]
    assert plan([wish], [found], past) == [("start", "c1")] * is_made_anew


@pytest.mark.parametrize(
    ("wish", "found", "past", "is_idle"),
    [
        (WISH, None, Past(), True),
        (WISH, None, Past(rejected="no"), False),
        (WISH, RUNNING, Past(), False),
        (WISH, FROZEN, Past(), True),
        (WISH, ENDED, Past(ended_s=1.0), True),
        (policy(Restart.NEVER), ENDED, Past(ended_s=1.0), False),
        (dataclasses.replace(WISH, is_done=True), None, Past(), False),
    ],
)
def test_what_does_not_run_is_given_back(
    wish: Wish, found: Container | None, past: Past, is_idle: bool
) -> None:
    memory = Memory(pasts={ID: past})
    assert [*agent.list_idle([wish], [found] if found else [], memory)] == [wish] * is_idle


def test_before_the_list_is_known_the_lease_decides() -> None:
    assert plan(None, [RUNNING], kept=[ID]) == []
    assert plan(None, [RUNNING], kept=[ID], now_s=2000.0) == [("term", "c1")]
    assert plan(None, [RUNNING]) == [("term", "c1")]
    assert plan(None, [ENDED]) == plan(None, [CREATED], kept=[ID]) == []


SECRET = take(secrets={"a": b"b"})
ONCE = dataclasses.replace(SECRET, restart=Restart.NEVER)


@pytest.mark.parametrize(
    ("wishes", "found", "past", "is_held"),
    [
        ([SECRET], [], None, True),
        ([SECRET], [RUNNING], None, True),
        ([SECRET], [ENDED], Past(ended_s=1.0), True),  # it is started again
        ([WISH], [], None, False),
        ([ONCE], [ENDED], Past(ended_s=1.0), False),
        ([ONCE], [ENDED], Past(ended_s=1.0, is_stopped=True), True),
        ([dataclasses.replace(SECRET, is_done=True)], [ENDED], None, False),
        ([SECRET], [], Past(rejected="no"), False),
        ([SECRET], [RUNNING], Past(rejected="no"), True),
        ([], [RUNNING], None, True),  # until it has ended
        ([], [ENDED], None, False),
        ([], [], None, False),
        (None, [RUNNING], None, True),
        (None, [ENDED], None, False),
    ],
)
def test_secrets_stay_as_long_as_they_are_needed(
    wishes: list[Wish] | None, found: list[Container], past: Past | None, is_held: bool
) -> None:
    memory = Memory(pasts={ID: past} if past else {})
    assert agent.decide_held(wishes, found, memory) == ({ID} if is_held else set())


def test_before_the_list_is_known_the_leases_secrets_stay() -> None:
    memory = Memory(kept=frozenset([OTHER]))
    assert agent.decide_held(None, [RUNNING], memory) == {ID, OTHER}
    assert agent.decide_held([], [], memory) == set()


def test_secrets_are_laid_whole_and_removed(tmp_path: Path) -> None:
    here = tmp_path / ID
    (tmp_path / f".{ID}.new").mkdir()  # a kill left it
    (tmp_path / f".{ID}.new" / "half").touch()
    umask = os.umask(0o077)
    try:
        agent.ensure_secrets(tmp_path, take(secrets={"a": b"1", "b": b""}))
    finally:
        os.umask(umask)
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {"a": b"1", "b": b""}
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (here, here / "a", here / "b")]
    assert modes == [0o755, 0o444, 0o444]
    agent.ensure_secrets(tmp_path, take(secrets={"c": b"2"}))
    assert [path.name for path in here.iterdir()] == ["c"]
    agent.ensure_secrets(tmp_path, take(secrets_withheld=True))  # it has what there was
    assert (here / "c").read_bytes() == b"2"
    agent.ensure_secrets(tmp_path, take())
    (tmp_path / f".{OTHER}.new").mkdir()
    agent.remove_secrets(tmp_path, {ID})
    assert [path.name for path in tmp_path.iterdir()] == [ID]
    agent.remove_secrets(tmp_path, set())
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(agent.NoSecretsError, match="none are here"):
        agent.ensure_secrets(tmp_path, take(secrets_withheld=True))
    with pytest.raises(agent.NoSecretsError, match="cannot be laid: No such file"):
        agent.ensure_secrets(tmp_path / "gone", take(secrets={"a": b"1"}))
    agent.remove_secrets(tmp_path / "gone", set())


def test_only_memory_is_a_place_for_secrets(tmp_path: Path) -> None:
    in_memory = Path("/dev/shm", f"oi-{os.getpid()}")
    try:
        assert agent.ensure_memory(in_memory)
        in_memory.chmod(0o755)
        assert agent.ensure_memory(in_memory)
        assert stat.S_IMODE(in_memory.stat().st_mode) == 0o700
    finally:
        in_memory.rmdir()
    disk = Path(__file__).with_name(f".oi-{os.getpid()}")
    try:
        assert not agent.ensure_memory(disk)
    finally:
        disk.rmdir()
    assert not agent.ensure_memory(tmp_path / "gone" / "secrets")


def test_a_network_without_a_container_is_removed_when_nobody_wants_it() -> None:
    assert plan([], [], networks=NETWORK) == [("remove", NETWORK[ID])]
    assert plan(None, [], networks=NETWORK) == []
    assert plan([WISH], [], Past(rejected="no"), networks=NETWORK) == [("remove", NETWORK[ID])]
    assert plan([WISH], [], Past(has_image=True), networks=NETWORK) == [("create", NETWORK[ID])]


def test_the_streak_of_crashes_ends_after_ten_minutes() -> None:
    def end(ran_s: float, told: bool = False) -> Past:
        past = Past(started_s=1000.0, streak=4, restarts=4)
        return agent.decide_seen(past, ENDED, told, 1000.0 + ran_s)

    assert (end(1).streak, end(599).streak, end(600).streak) == (5, 5, 1)
    assert (end(1, told=True).streak, end(1, told=True).is_stopped) == (4, True)
    assert (end(1).exit_code, end(1).ended_s) == (1, 1001)
    assert [agent.decide_back_off_s(n) for n in (1, 2, 9, 10, 5000)] == [1, 2, 256, 300, 300]


def test_what_was_ended_for_its_excess_is_a_crash_whatever_time_it_took() -> None:
    past = Past(started_s=1000.0, streak=4, restarts=4, excess="it went on")
    found = dataclasses.replace(ENDED, exit_code=137)
    seen = agent.decide_seen(past, found, False, 9000.0)
    assert (seen.streak, seen.is_stopped, seen.excess) == (5, False, "it went on")
    wish = take()
    never = dataclasses.replace(wish, restart=agent.Restart.NEVER)
    found = dataclasses.replace(found, wish_sha256=wish.sha256)
    failed, waits = pb.ASSIGNMENT_STATE_FAILED, pb.ASSIGNMENT_STATE_WAITING
    said = (waits, "killed: it went on, started again after 16 s")
    assert agent.decide_report(wish, found, seen, "", "") == said
    assert agent.decide_report(never, found, seen, "", "") == (failed, "killed: it went on")
    found = dataclasses.replace(found, exit_code=3)  # it was faster
    assert agent.decide_report(never, found, seen, "", "") == (failed, "ended with exit code 3")
    assert agent.decide_seen(seen, RUNNING, False, 9100.0).excess == ""
    assert agent.parse_lease(
        agent.render_lease("b", agent.Lease(10.0, pasts={ID: seen})), "b", 1.0
    ).pasts == {ID: seen}


def test_what_takes_too_much_is_ended_at_once_and_what_was_started_is_not() -> None:
    assert plan([WISH], [RUNNING], Past()) == []
    assert plan([WISH], [RUNNING], Past(excess="x")) == [("kill", RUNNING.id)]
    assert plan(None, [RUNNING], Past(excess="x"), kept=[ID]) == [("kill", RUNNING.id)]


FULL = agent.LOG_FILE_BYTES


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        # each a second after the other: forks refused, the log's inode and bytes
        ([(0, 1, 0)] * 100, ""),
        ([(n * 2_000, 0, 0) for n in range(2)], "starting processes beyond its 128"),
        ([(n * 500, 0, 0) for n in range(4)], "starting processes beyond its 128"),
        ([(5_000, 0, 0)] * 100, ""),  # known since before this agent
        ([(n * 10, 0, 0) for n in range(1_000)], ""),
        ([(n % 2 * 900, 0, 0) for n in range(2)], ""),
        ([(900, 0, 0), (0, 0, 0), (900, 0, 0)], ""),  # another run
        ([(0, n, FULL) for n in range(1, 13)], "printing more than 250 kB a second"),
        ([(0, n, FULL) for n in range(1, 9)], ""),  # for so short a time
        ([(0, 1, n * 240_000) for n in range(1_000)], ""),
        ([(0, 1, n * 1_000_000) for n in range(100)], "printing more than 250 kB a second"),
        ([(0, 0, 0), (0, 1, 4_000_000)] * 50, ""),  # a log that cannot be seen
        ([(0, 1, 4_000_000), (0, 0, 0)] * 50, ""),
        ([(0, n % 2, FULL) for n in range(100)], ""),
    ],
)
def test_what_is_too_much(looks: list[tuple[int, int, int]], said: str) -> None:
    strain, found = None, []
    for now_s, taken in enumerate(looks):
        strain = agent.add_taken(strain, agent.Taken(*taken), float(now_s))
        found.append(agent.decide_excess(strain))
    assert found[0] == ""
    assert said in found[-1]
    assert bool(found[-1]) == bool(said), found


def test_a_look_that_comes_late_takes_nothing_for_more_than_it_is() -> None:
    strain = agent.add_taken(None, agent.Taken(), 0.0)
    strain = agent.add_taken(strain, agent.Taken(5_000, 1, FULL), 600.0)
    assert (strain.forks, strain.log_bytes) == (5_000, 0)
    strain = agent.add_taken(strain, agent.Taken(5_000, 2, 7), 1_200.0)
    assert (strain.forks, strain.log_bytes) == (0, 7)


def test_a_run_that_a_killed_agent_started_is_counted() -> None:
    """What was noted is of the run before; the engine tells runs apart by when they began."""
    noted = Past(started_s=990.0, ended_s=999.0, exit_code=1, restarts=3, streak=4, run_at_s=50.0)
    same, next_run = (
        dataclasses.replace(ENDED, started_at_s=50.0),
        dataclasses.replace(ENDED, started_at_s=60.0),
    )

    def see(found: Container, past: Past = noted) -> Past:
        return agent.decide_seen(past, found, False, 2000.0)

    assert see(same) == noted
    assert see(next_run) == dataclasses.replace(
        noted, ended_s=2000.0, restarts=4, streak=5, run_at_s=60.0
    )
    began = dataclasses.replace(noted, started_s=2000.0, ended_s=None, restarts=4)
    assert see(RUNNING) == began
    assert see(RUNNING, began) == began
    assert see(CREATED) == noted
    # A lease file of an older agent does not say which run it noted.
    assert see(next_run, dataclasses.replace(noted, run_at_s=0.0)) == dataclasses.replace(
        noted, run_at_s=0.0
    )


# ------------------------------------------------------------------------------------------------
# Reports and the lease
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "found", "past", "state", "reason"),
    [
        (WISH, None, Past(), "PULLING", "1 of 2 MB"),
        (WISH, None, Past(trouble="no: full"), "PULLING", "1 of 2 MB; before, no: full"),
        (WISH, None, Past(has_image=True), "STARTING", ""),
        (WISH, CREATED, Past(), "STARTING", ""),
        (WISH, RUNNING, Past(), "RUNNING", ""),
        (WISH, ENDED, Past(streak=4), "WAITING", "exit code 1, started again after 8 s"),
        (policy(Restart.NEVER), ENDED, Past(), "FAILED", "ended with exit code 1"),
        (policy(Restart.NEVER), GOOD, Past(), "FINISHED", "ended with exit code 0"),
        (policy(Restart.ON_FAILURE), GOOD, Past(), "FINISHED", "ended with exit code 0"),
        (policy(Restart.ON_FAILURE), TIGHT, Past(), "FINISHED", "code 0 after a process of it was"),
        (policy(Restart.NEVER), ENDED, Past(is_stopped=True), "WAITING", "right to run was over"),
        (WISH, None, Past(rejected="no"), "REJECTED", "no"),
        (WISH, CREATED, Past(rejected="no"), "STOPPING", "no"),
        (dataclasses.replace(WISH, sha256="x"), RUNNING, Past(), "STARTING", "stopped first"),
        (None, RUNNING, Past(), "RUNNING", ""),
    ],
)
def test_report(
    wish: Wish | None, found: Container | None, past: Past, state: str, reason: str
) -> None:
    number, said = agent.decide_report(wish, found, past, "1 of 2 MB", "")
    assert pb.AssignmentState.Name(number)[17:] == state  # type: ignore[arg-type]
    assert reason in said
    assert bool(said) == bool(reason)


@pytest.mark.parametrize(
    ("lease_s", "before_s", "expected"),
    [
        (600, 900, 1585),
        (15, 900, 1000),
        (20, 0, 1005),
        (2**32 - 1, 0, 4585),
        (0, 0, 0),
        (0, 900, 900),  # over since then
        (0, 1500, 1000),  # over from now on
    ],
)
def test_the_right_ends_before_the_lease(lease_s: int, before_s: float, expected: float) -> None:
    assert agent.decide_right_s(1000.0, lease_s, before_s) == expected


def test_a_lease_is_of_one_boot() -> None:
    past = Past("x", True, 1.5, None, 3, 7, 8, True, 12.5, "e", "t", 2, 3.5)
    lease = agent.Lease(1234.5, frozenset({OTHER, ID}), (20_001,), "203.0.113.7", {ID: past})
    raw = agent.render_lease("boot", lease)
    # What the engine could not do is tried again by another agent.
    pasts = {ID: dataclasses.replace(past, trouble="", tries=0, retry_at_s=0.0)}
    read = dataclasses.replace(lease, pasts=pasts)
    assert agent.parse_lease(raw, "boot", 1000) == read
    late = agent.render_lease("boot", agent.Lease(9e9))
    assert agent.parse_lease(late, "boot", 1000) == agent.Lease(4600)
    older = json.dumps({"boot_id": "boot", "until_s": 7, "assignments": [ID]}).encode()
    assert agent.parse_lease(older, "boot", 1000) == agent.Lease(7.0, frozenset({ID}))
    newer = raw.replace(b'"e"]', b'"e", 1, 2, 3, 4, 5, 6, 7, 8]')
    assert newer != raw
    assert agent.parse_lease(newer, "boot", 1000) == read
    before = {ID: dataclasses.replace(pasts[ID], run_at_s=0.0, excess="")}
    assert agent.parse_lease(raw.replace(b', 12.5, "e"]', b"]"), "boot", 1000).pasts == before
    odd: tuple[Any, ...] = ([], 7, None, {ID: 7}, {ID: None})
    broken = [json.dumps({**json.loads(raw), "pasts": each}).encode() for each in odd]
    broken += [raw.replace(b"boot_id", b"x"), raw[:-3], b"", b"[]", b"7", b"[" * 9999]
    broken += [raw.replace(b"1234.5", b"NaN"), raw.replace(b"[20001]", b"[1e999]")]
    for each in broken:
        assert agent.parse_lease(each, "boot", 1000) == agent.Lease()
    # No port of the machine's own is opened for what is in the file.
    ports = agent.render_lease("boot", dataclasses.replace(lease, ports=(22, 20_001, 65_535)))
    assert agent.parse_lease(ports, "boot", 1000) == read
    # What the firewall has is right after a boot too, until the agent says other.
    firewall = agent.Lease(ports=lease.ports, seen=lease.seen)
    assert agent.parse_lease(raw, "another", 1000) == firewall
    assert agent.parse_lease(agent.render_lease("", lease), "", 1000) == firewall


def test_the_largest_lease_is_one_that_is_read() -> None:
    """Else the guard would end all that runs."""
    ids = frozenset(str(uuid.uuid4()) for _ in range(agent.ASSIGNMENTS_MAX))
    past = Past("f" * 64, False, 1e8 / 3, 1e8 / 3, 255, 10**6, 10**6, False)
    ports = tuple(agent.HOST_PORTS[: agent.PORTS_MAX * len(ids)])
    lease = agent.Lease(1e8 / 3, ids, ports, "203.0.113.200", dict.fromkeys(ids, past))
    assert len(agent.render_lease(str(uuid.uuid4()), lease)) < agent.FILE_MAX_BYTES


@pytest.mark.parametrize(
    ("installed", "limits", "registry"),
    [
        ('{"url": "https://CP.example.com"}', "", "cp.example.com"),
        ('{"url": "https://cp.example.com:8443/x"}', "", "cp.example.com:8443"),
        ('{"url": "http://cp.example.com"}', "", "cp.example.com"),
        ('{"url": "https://cp.example.com"}', "REGISTRY=r.example:5000", "r.example:5000"),
        (None, "", ""),  # by hand
        ('{"url": ""}', "", ""),
        ("[" * 9999, "", ""),
    ],
)
def test_only_images_of_its_own_registry_are_taken(
    installed: str | None, limits: str, registry: str, tmp_path: Path
) -> None:
    (tmp_path / "installer").mkdir()
    if installed is not None:
        (tmp_path / "installer/install.json").write_text(installed)
    (tmp_path / "limits.conf").write_text(limits)
    lent = agent.read_limits(tmp_path / "limits.conf")
    assert lent.registry == registry
    offered = dataclasses.replace(OFFERED, registry=registry)
    digest = "@sha256:" + "ab" * 32
    for other in ("r.example:5000", "cp.example.com", "cp.example.com:8443", "x.cp.example.com"):
        own = make(image=f"{registry or other}/kuma/web{digest}", assignment_id=OTHER, ports=[])
        order = make(image=f"{other}/kuma/web{digest}")
        _, refused = agent.decide_wishes([own, order], offered, ADDRESS, SECRETS)
        why = f"image is of another registry than {registry}"
        assert refused == ({} if registry in ("", other) else {ID: why})


@pytest.mark.parametrize(
    ("leaving", "engine", "firewall", "lease", "offered", "said", "todo"),
    [
        (True, "none answers", "", "", OFFERED, "its provider is leaving", "unpause"),
        (False, "", "", "", OFFERED, "", ""),
        (False, "none answers", "x", "y", OFFERED, "none answers", "openinfra-engine"),
        (
            False,
            "",
            "guard has not run",
            "y",
            OFFERED,
            "guard has not run",
            "openinfra-guard.timer",
        ),
        (False, "", "", "cannot write", OFFERED, "cannot write", "restart openinfra-agent"),
        (False, "", "", "", Limits(5, 8 << 30), "lends too little", "limits.conf"),
    ],
)
def test_unready(
    leaving: bool, engine: str, firewall: str, lease: str, offered: Limits, said: str, todo: str
) -> None:
    found = agent.decide_unready(leaving, engine, firewall, lease, offered)
    assert (said in found[0], bool(found[0])) == (True, bool(said))
    assert todo in found[1]


@pytest.mark.parametrize(
    ("status", "raw", "result"),
    [
        (200, b'{"a": 1}', {"a": 1}),
        (204, b"", None),
        (399, b"7", 7),
        (400, b'{"message": "bad parameter"}', (400, "bad parameter")),
        (404, b'{"message": "No such image"}', (404, "No such image")),
        (500, b"[]", (500, "HTTP status 500")),
        (200, b"{", (502, "could not be read")),
        (200, b"7" + b" " * ((4 << 20) - 1), 7),
        (200, b" " * ((4 << 20) + 1), (502, "too long")),
    ],
)
def test_answers(status: int, raw: bytes, result: Any) -> None:
    read: Callable[[], Any] = lambda: agent.parse_answer(status, raw)  # noqa: E731
    if isinstance(result, tuple):
        with pytest.raises(agent.EngineError, match=result[1]) as error:
            read()
        assert error.value.status == result[0]
    else:
        assert read() == result


def test_nobody_says_that_it_runs_while_the_engine_is_silent() -> None:
    container = Container("c", f"oi-{ID}", ID, take().sha256, is_running=True)
    report = agent.decide_report(take(), container, Past(), "", "", "no answer for 30 s")
    assert report == (pb.ASSIGNMENT_STATE_WAITING, "no answer for 30 s")
    report = agent.decide_report(take(), container, Past(), "", "")
    assert report == (pb.ASSIGNMENT_STATE_RUNNING, "")
    frozen = dataclasses.replace(container, is_frozen=True)
    report = agent.decide_report(take(), frozen, Past(), "", "no firewall")
    assert report == (pb.ASSIGNMENT_STATE_WAITING, "frozen: no firewall")


# ------------------------------------------------------------------------------------------------
# Usage
# ------------------------------------------------------------------------------------------------

BOOT, FIRST, SECOND = "5f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f0b", "a" * 64, "b" * 64
COUNT = Count(ID, BOOT, FIRST)


def test_readings_add_up_and_a_start_begins_at_nothing() -> None:
    count = agent.add_reading(COUNT, Reading(100, 100, 10, 5, 7))
    assert (count.sums, count.last) == ((100, 0, 5, 7), (100, 5, 7))
    count = agent.add_reading(count, Reading(130, 150, 20, 5, 9))
    assert count.sums == (150, 600, 5, 9)
    count = agent.add_reading(count, Reading(140, 30, 40, 1, 0))  # it was started again
    assert count.sums == (180, 1000, 6, 9)
    assert agent.add_reading(count, Reading(141, 30, 0, 1, 0)).sums == count.sums
    # An hour of suspend is no hour of memory.
    assert agent.add_reading(count, Reading(3740, 30, 1, 1, 0)).memory_byte_s == 1120
    full = dataclasses.replace(COUNT, tx_bytes=2**63 - 2)
    assert agent.add_reading(full, Reading(1, 0, 0, 0, 9)).tx_bytes == 2**63 - 1


def test_a_reading_that_comes_late_is_no_start() -> None:
    """Right before a stop one is taken in another thread, and counted after a later one."""
    count = agent.add_reading(COUNT, Reading(10, 1000, 1, 1000, 1000))
    for late in (Reading(9.9, 990, 1, 990, 990), Reading(10, 1000, 1, 1000, 1000)):
        assert agent.add_reading(count, late) == count


@given(st.lists(st.integers(0, 50), max_size=20))
def test_sums_never_fall(readings: list[int]) -> None:
    count = COUNT
    for number, value in enumerate(readings):
        before = count
        count = agent.add_reading(count, Reading(number + 1, value, value, value, value))
        assert all(a >= b for a, b in zip(count.sums, before.sums, strict=True))


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({}, None),
        ({"cpu_stats": None, "memory_stats": None, "networks": None}, None),
        ({"cpu_stats": {"cpu_usage": {"total_usage": 0}}, "memory_stats": {}}, None),
        (
            {
                "cpu_stats": {"cpu_usage": {"total_usage": 5}},
                "memory_stats": {"usage": 6},
                "networks": {
                    "eth0": {"rx_bytes": 1, "tx_bytes": 2},
                    "eth1": {"rx_bytes": 10, "tx_bytes": 20},
                },
            },
            Reading(3.5, 5, 6, 11, 22),
        ),
    ],
)
def test_statistics_of_the_engine(stats: dict[str, Any], expected: Reading | None) -> None:
    assert agent.parse_reading(stats, 3.5) == expected


@pytest.mark.parametrize(
    "answer",
    [[], None, "x", {"networks": [1]}, {"cpu_stats": [1]}, {"memory_stats": {"usage": "x"}}],
)
def test_an_odd_answer_of_the_engine_is_its_error(answer: object) -> None:
    engine = agent.Engine(Path("none"))
    engine.ask = lambda *_, **__: answer  # type: ignore[method-assign]
    with pytest.raises(agent.EngineError):
        engine.read_stats("a")


RUNC = {"Name": "runc", "Version": "1.1.5\x1b"}


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ({"Components": [{"Name": "containerd", "Version": "1.6.20"}, RUNC]}, "1.1.5-"),
        ({"Components": [{"Name": "crun", "Version": "1.8"}]}, ""),
        ({"Components": None}, ""),
        ({"Components": [7]}, ""),
        ({"Components": [{"Name": "runc"}]}, ""),
        ({}, ""),
        ([], ""),
    ],
)
def test_which_runc_the_engine_has(answer: object, version: str) -> None:
    engine = agent.Engine(Path("none"))
    assert engine.read_runc() == ""
    engine.ask = lambda *_, **__: answer  # type: ignore[method-assign]
    assert engine.read_runc() == version


def make_counts(*rows: tuple[str, str, bool]) -> dict[tuple[str, str], Count]:
    """(container, assignment, was sent), one byte sent each."""
    return {
        (BOOT, name * 64): Count(assignment, BOOT, name * 64, tx_bytes=1, is_sent=sent)
        for name, assignment, sent in rows
    }


def test_only_what_was_never_sent_is_merged_into_another() -> None:
    counts = make_counts(("a", ID, False), ("b", OTHER, False), ("c", ID, True), ("d", ID, False))
    assert agent.merge_counts(counts, (), 4) == counts
    merged = agent.merge_counts(counts, (), 3)
    assert [name[0] for _, name in merged] == ["b", "c", "d"]
    assert [each.tx_bytes for each in merged.values()] == [1, 2, 1]
    # A container that is there, and one that was sent, stay what they are.
    a, b, c, _ = counts
    assert agent.merge_counts(counts, (a,), 0) == {
        **{key: counts[key] for key in (a, b, c)},
        a: dataclasses.replace(counts[a], tx_bytes=2),
    }
    # All in one round, and into one that may be known: what is greater counts there.
    for is_sent, left in ((False, "d"), (True, "c")):
        three = make_counts(("a", ID, False), ("c", ID, is_sent), ("d", ID, False))
        (last,) = agent.merge_counts(three, (), 1).values()
        assert (last.container_id[0], last.tx_bytes, last.is_sent) == (left, 3, is_sent)
    two = make_counts(("a", ID, True), ("b", ID, True))
    assert agent.merge_counts(two, (), 0) == two
    boots = [dataclasses.replace(each, boot_id=str(n)) for n, each in enumerate(counts.values())]
    other_boot = {each.key: each for each in boots}
    assert agent.merge_counts(other_boot, (), 0) == other_boot


async def tell(
    one: Any, known: dict[tuple[str, str, str], int], is_heard: bool, is_answered: bool
) -> int:
    """A heartbeat's usage: the control plane keeps what is greatest; gives back how much it was."""
    sent = await agent.pop_usage(one, agent.BEAT_MAX_BYTES)
    for count in sent if is_heard else ():
        name = (count.assignment_id, *count.key)
        known[name] = max(known.get(name, 0), count.tx_bytes)
    if is_answered:
        one.workloads.told |= {count.key: count.sums for count in sent}
    return len(sent)


def test_a_lease_that_cannot_be_saved_is_told_once_a_right_depends_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    config: Any = SimpleNamespace(
        engine_socket=Path("none"), cgroup=tmp_path, secrets_dir=tmp_path, data_dir=tmp_path
    )
    config.lease_file = place / "lease.json"
    workloads = agent.make_workloads(config, OFFERED)
    host: Any = SimpleNamespace(workloads=workloads, config=config, pause=None, boot_id="b")

    def save(until_s: float) -> tuple[str, int]:
        agent.ensure_lease(host, until_s, frozenset())
        said = "".join(capsys.readouterr())
        return workloads.lease_error[:12], said.count("WARN cannot write the lease file")

    place.write_text("in the way")
    assert [save(0.0), save(9.0), save(9.0)] == [(why := "cannot write", 0), (why, 1), (why, 0)]
    place.unlink()
    assert save(9.0) == ("", 0)
    shutil.rmtree(place)
    place.write_text("in the way again")
    assert [save(10.0), save(11.0)] == [(why, 1), (why, 0)]
    workloads.threads.shutdown()


@pytest.mark.parametrize(("lost", "unanswered"), [(1.0, 0.0), (0.5, 0.5), (0.6, 0.3)])
def test_nothing_is_lost_while_the_control_plane_is_away_for_long(
    tmp_path: Path, lost: float, unanswered: float
) -> None:
    """Forty minutes, in which half of 100 containers end each minute; of heartbeats so many get
    lost, and so many answers."""
    chance = random.Random(1)
    config: Any = SimpleNamespace(
        engine_socket=Path("none"), cgroup=tmp_path, secrets_dir=tmp_path, data_dir=tmp_path
    )
    known: dict[tuple[str, str, str], int] = {}

    def start() -> Any:
        workloads = agent.make_workloads(config, OFFERED)
        workloads.counts, workloads.metered_s = agent.read_counts(tmp_path), math.inf
        return SimpleNamespace(workloads=workloads, boot_id=BOOT, config=config)

    async def run() -> int:
        one, made, names = start(), 0, [str(uuid.uuid4()) for _ in range(100)]
        since: dict[str, tuple[str, int]] = {}
        for minute in range(40):
            for name in names:
                if name not in since or chance.random() < 0.5:
                    made += 1
                    since[name] = (f"{made:064x}", minute)
            one.workloads.containers = tuple(
                Container(each, f"oi-{name}", name, "", True) for name, (each, _) in since.items()
            )
            for name, (each, begun) in since.items():
                used = minute - begun + 1
                one.workloads.parting.append((each, name, Reading(minute + 1, 0, 0, 0, used)))
            await agent.meter(one)
            assert len(one.workloads.counts) <= agent.COUNTS_MAX
            fate = chance.random()
            await tell(one, known, fate >= lost, fate >= lost + unanswered)
            if minute == 30:
                one.workloads.threads.shutdown()
                one = start()
        while await tell(one, known, True, True):
            pass
        one.workloads.threads.shutdown()
        for name in names:
            assert sum(most for key, most in known.items() if key[0] == name) == 40
        return made

    assert asyncio.run(run()) > 1.5 * agent.COUNTS_MAX


def test_what_is_told_again() -> None:
    counts = make_counts(("a", ID, True), ("b", OTHER, False), ("d", ID, False))
    a, b, _ = counts
    counts[BOOT, "c" * 64] = Count(ID, BOOT, "c" * 64)
    live = {a, b}

    def due(told: dict[tuple[str, str], Any], told_s: dict[tuple[str, str], float]) -> str:
        found = agent.list_due(counts, told, told_s, live)
        return "".join(each.container_id[0] for each in found)

    assert due({}, {}) == "dab"  # what is over goes first
    assert due({}, {a: 2.0, b: 1.0}) == "dba"  # then what waited longest
    assert due({a: counts[a].sums, b: (0, 0, 0, 0)}, {}) == "db"


def test_the_file_of_usage_and_back() -> None:
    counts = make_counts(("a", ID, True), ("b", OTHER, False))
    rebooted = Count(ID, OTHER, "a" * 64)  # the same container in another boot
    counts[rebooted.key] = rebooted
    assert len(counts) == 3
    assert agent.parse_counts(agent.render_counts(counts)) == counts


def test_all_that_is_kept_of_usage_is_read_again(tmp_path: Path) -> None:
    """As many as there may be, each as long as it may be."""
    most, last = 2**63 - 1, (2**63 - 1,) * 3
    counts = {}
    for number in range(2 * agent.COUNTS_MAX):
        one = Count(ID, BOOT, f"{number:064x}", most, most, most, most, last, 1e9 / 3, True)
        counts[one.key] = one
    path = tmp_path / agent.USAGE_NAME
    path.write_bytes(agent.render_counts(counts))
    assert agent.read_counts(tmp_path) == counts


def test_usage_that_cannot_be_saved_is_kept_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk; once it has room again, the next time is told too."""
    counts = make_counts(("a", ID, True))
    workloads = SimpleNamespace(counts=counts, threads=None, is_usage_warned=False)
    home = tmp_path / "gone"
    host: Any = SimpleNamespace(config=SimpleNamespace(data_dir=home), workloads=workloads)

    async def save(times: int) -> str:
        workloads.saving = asyncio.Lock()
        for _ in range(times):
            await agent.save_counts(host)
        return capsys.readouterr().err

    said = asyncio.run(save(3))
    assert said.count("WARN usage cannot be saved") == 1
    assert "make room on that disk" in said
    assert workloads.counts == counts
    home.mkdir()
    assert asyncio.run(save(1)) == ""
    assert agent.read_counts(home) == counts
    (home / agent.USAGE_NAME).unlink()
    home.rmdir()
    assert asyncio.run(save(2)).count("WARN usage cannot be saved") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"container_id": "x"},
        {"assignment_id": "x"},
        {"boot_id": 7},
        {"boot_id": "x"},
        {"read_s": "x"},
        {"cpu_ns": -1},
        {"tx_bytes": 2**63},
        {"tx_bytes": 1.5},
        {"rx_bytes": True},
        {"last": [1, 2]},
        {"last": "123"},
        {"more": 1},
    ],
)
def test_a_broken_file_of_usage(change: dict[str, Any]) -> None:
    row = {**vars(COUNT), **change}
    with pytest.raises((ValueError, TypeError, KeyError)):
        agent.parse_counts(json.dumps([row]).encode())


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (f"docker-{'a1' * 32}.scope", "a1" * 32),
        ("a1" * 32, "a1" * 32),
        (f"docker-{'a1' * 31}.scope", ""),
        (f"docker-{'a1' * 32}", ""),
        (f"{'a1' * 32}.scope", ""),
        ("cgroup.procs", ""),
        ("", ""),
    ],
)
def test_whose_control_group_it_is(name: str, want: str) -> None:
    assert agent.parse_group(name) == want


@pytest.mark.parametrize(
    ("events", "until_s", "is_killed"),
    [
        ("populated 1", 1.0, True),
        ("populated 1", 1e9, False),
        ("populated 0", 1.0, False),
        ("", 1.0, False),
    ],
)
def test_workloads_without_a_right_are_ended_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    events: str,
    until_s: float,
    is_killed: bool,
) -> None:
    """By the file that the kernel has for it; here nothing empties the group after that."""
    monkeypatch.setattr(agent, "KILLED_S", 0.1)
    monkeypatch.setattr(agent, "LEASE_MAX_S", 1e12)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    lease = tmp_path / "lease.json"
    lease.write_bytes(agent.render_lease(boot_id, agent.Lease(until_s)))
    (tmp_path / "cgroup.events").write_text(f"{events}\nfrozen 0\n")
    (tmp_path / "cgroup.kill").write_text("")
    assert not agent.end_at_once(lease, tmp_path)
    assert (tmp_path / "cgroup.kill").read_text() == ("1" if is_killed else "")
    (tmp_path / "cgroup.kill").unlink()
    tmp_path.chmod(0o500)
    assert not agent.end_at_once(lease, tmp_path / "gone")
    lease.unlink()  # there is none after a boot, and while the host is paused
    assert agent.is_right_over(lease)


@pytest.mark.parametrize(
    ("before", "is_open", "after"), [("0\n", True, "1"), ("1\n", True, "1\n"), ("1\n", False, "0")]
)
def test_all_workloads_are_frozen_at_once(
    tmp_path: Path, before: str, is_open: bool, after: str
) -> None:
    """By the file that the kernel has for it; without it one by one, by the engine."""
    (tmp_path / "cgroup.freeze").write_text(before)
    assert agent.freeze_at_once(tmp_path, is_open)
    assert (tmp_path / "cgroup.freeze").read_text() == after
    assert not agent.freeze_at_once(tmp_path / "gone", is_open)


def test_nothing_runs_only_where_the_kernel_says_so(tmp_path: Path) -> None:
    group = tmp_path / "openinfra.slice"
    assert not agent.is_empty(group)  # cgroup v1
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert agent.is_empty(group)
    group.mkdir()
    for populated in (0, 1):
        (group / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
        assert agent.is_empty(group) == (not populated)


@pytest.mark.parametrize(
    ("blocks", "inodes", "used"),
    [((60, 100), (90, 100), 0.4), ((60, 100), (5, 100), 0.95), ((60, 100), (0, 0), 0.4)],
)
def test_a_disk_is_full_when_its_inodes_are(
    monkeypatch: pytest.MonkeyPatch,
    blocks: tuple[int, int],
    inodes: tuple[int, int],
    used: float,
) -> None:
    disk = SimpleNamespace(
        f_bavail=blocks[0], f_blocks=blocks[1], f_favail=inodes[0], f_files=inodes[1]
    )
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert agent.read_used("/x") == pytest.approx(used)
    assert agent.read_used("/x") <= 1


@pytest.mark.parametrize(
    ("populated", "silent_s", "pause", "is_installed", "is_given_back"),
    [
        (0, 601.0, None, True, True),
        (0, 599.0, None, True, False),
        (1, 9e9, None, True, False),
        (0, 9e9, None, False, False),  # of another engine nobody knows the group
        (0, 9e9, agent.Pause("now"), True, False),  # the control plane moves it
    ],
)
def test_what_a_dead_engine_ran_is_given_back_once_nothing_of_it_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    populated: int,
    silent_s: float,
    pause: agent.Pause | None,
    is_installed: bool,
    is_given_back: bool,
) -> None:
    group = tmp_path / "openinfra.slice"
    group.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    (group / "cgroup.events").write_text(f"populated {populated}\n")
    monkeypatch.setattr(agent, "WORKLOADS_CGROUP", group)
    workloads = SimpleNamespace(
        engine=agent.Engine(Path(agent.DEFAULTS["engine_socket"] if is_installed else "/x")),
        engine_error="no answer",
        wishes=(WISH,),
        containers=(RUNNING,),  # as it was seen last
        memory=Memory(),
        unready_s=agent.read_boot_s() - silent_s,
    )
    host: Any = SimpleNamespace(workloads=workloads, pause=pause)
    agent.note_idle(host, "no answer")
    given_back = [past.rejected for past in workloads.memory.pasts.values()]
    assert given_back == ["this host cannot run it: no answer"] * is_given_back
    assert workloads.containers == (() if is_given_back else (RUNNING,))
    agent.note_idle(host, "")
    assert workloads.unready_s is None


@pytest.mark.parametrize(
    ("started", "ended", "expected"),
    [
        ("10:00:00.5", "12:00:00.1", True),
        ("10:00:00.5", "12:00:59.9", True),
        ("10:00:00.5", "12:01:00", True),
        ("10:00:00.5", "11:59:59", True),  # the engine's times are of whole seconds here
        ("12:00:00.9", "12:00:05", True),
        ("10:00:00.5", "11:59:58", False),  # by itself, before
        ("10:00:00.5", "12:01:02", False),  # by itself, long after
        ("12:00:02", "12:00:05", False),  # it was started after it
    ],
)
def test_what_ended_right_after_all_were_told_to_did_not_choose_it(
    started: str, ended: str, expected: bool
) -> None:
    end = {"StartedAt": f"2026-11-30T{started}Z", "FinishedAt": f"2026-11-30T{ended}Z"}
    row = {"Id": "c1", "Names": ["/oi-x"], "State": "exited", "Labels": {}}
    found = agent.parse_container(row, end)
    noon_s = 1_796_040_000.0  # of that day
    assert agent.was_shut_down(found, noon_s) == expected
    assert not agent.was_shut_down(found, 0.0)
    assert agent.parse_engine_time("0001-01-01T00:00:00Z") < 0
    assert agent.parse_engine_time("never") == 0
