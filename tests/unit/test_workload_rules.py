"""Tables for workloads: what may be asked for, where copies go, what is replaced when."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import json
import random
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import agent
import cp_server
from cp_server import Assignment, Copy, Demand, Place, Refusal, Rejections, Workload
from proto import openinfra_pb2 as pb
from tests.fuzz_tool import check_container

DIGEST = "sha256:" + "ab" * 32
WALLET = "7YttLkHDoNj9wyDur5pM1ejNaAvT9X4eqaYcHQqtj2G5"
AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)
ORDER: dict[str, Any] = {
    "name": "web",
    "image": f"kuma/web@{DIGEST}",
    "cpu_milli": 500,
    "memory_bytes": 64 << 20,
}


def parse(**changes: Any) -> cp_server.WorkloadOrder:
    """A body as the API reads it, from a customer with the namespace kuma."""
    given = {key: value for key, value in {**ORDER, **changes}.items() if value is not ...}
    values = cp_server.parse_fields(cp_server.WORKLOAD_FIELDS, given)
    return cp_server.decide_order(values, ["kuma"], "cp.example.com")


def test_the_smallest_order() -> None:
    order = parse()
    assert (order.namespace, order.name, order.replicas) == ("kuma", "web", 1)
    assert order.spec == {
        "image": f"kuma/web@{DIGEST}",
        "command": [],
        "env": {},
        "cpu_milli": 500,
        "memory_bytes": 64 << 20,
        "ports": [],
        "egress": "internet",
        "restart": "always",
        "arch": None,
        "provider": None,
    }
    assert order.secrets is None


@pytest.mark.parametrize(
    ("given", "image", "found"),
    [
        ({}, "kuma/web", "kuma"),
        ({}, "panda/web", "panda"),
        ({"namespace": "panda"}, "kuma/web", "panda"),
        ({"namespace": "kuma"}, "panda/web", "kuma"),
    ],
)
def test_a_workload_is_in_the_images_namespace_unless_it_names_another(
    given: dict[str, str], image: str, found: str
) -> None:
    values = cp_server.parse_fields(
        cp_server.WORKLOAD_FIELDS, {**ORDER, **given, "image": f"{image}@{DIGEST}"}
    )
    assert cp_server.decide_order(values, ["kuma", "panda"], "cp.example.com").namespace == found


@pytest.mark.parametrize(
    "image",
    [
        f"kuma/web@{DIGEST}",
        f"kuma/a/b.c_d-e@{DIGEST}",
        f"kuma/web:v1@{DIGEST}",
        f"cp.example.com/kuma/web@{DIGEST}",
    ],
)
def test_an_image_of_the_own_registry(image: str) -> None:
    is_documented = re.fullmatch(cp_server.IMAGE["pattern"], image) is not None
    assert is_documented is not (image.startswith("cp.") or ":v1@" in image)
    kept = parse(image=image).spec["image"]
    assert kept == image.removeprefix("cp.example.com/").replace(":v1@", "@")


@pytest.mark.parametrize(
    ("image", "kept"),
    [
        ("kuma/web", "kuma/web:latest"),
        ("kuma/web:1.0_a-B", "kuma/web:1.0_a-B"),
        ("cp.example.com/kuma/a/b:2", "kuma/a/b:2"),
    ],
)
def test_an_image_by_its_tag(image: str, kept: str) -> None:
    is_documented = re.fullmatch(cp_server.IMAGE["pattern"], image) is not None
    assert is_documented is not image.startswith("cp.")
    assert parse(image=image).spec["image"] == kept


# Each with its field, which the refusal names; also over HTTP.
REFUSED: list[tuple[str, Any, str]] = [
    ("name", "Web", "is not 1 to 63"),
    ("name", "-web", "is not 1 to 63"),
    ("name", "a" * 64, "out of range"),
    ("name", "web\n", "is not 1 to 63"),
    ("name", ..., "missing"),
    ("namespace", "other", "none of your namespaces"),
    ("namespace", "solana:x", "is not 2 to 40"),
    ("image", "kuma/web:", "no image"),
    ("image", "kuma/web:-x", "no image"),
    ("image", f"kuma/web:{'x' * 129}", "no image"),
    ("image", "other/web:1", "none of yours"),
    ("image", f"web@{DIGEST}", "no image of a namespace"),
    ("image", f"other/web@{DIGEST}", "none of yours"),
    ("image", f"docker.io/kuma/web@{DIGEST}", "registry docker.io"),
    ("image", f"localhost/kuma/web@{DIGEST}", "registry localhost"),
    ("image", f"cp.example.com:443/kuma/web@{DIGEST}", "registry cp.example.com:443"),
    ("image", f"kuma/web@{DIGEST[:-1]}", "no image"),
    ("image", f"kuma/web@{DIGEST.upper()}", "no image"),
    ("image", f"kuma/../web@{DIGEST}", "no image"),
    ("image", f"--privileged/kuma/web@{DIGEST}", "no image"),
    ("image", f" kuma/web@{DIGEST}", "no image"),
    ("image", f"kuma/{'a' * 200}@{DIGEST}", "out of range"),
    ("image", 7, "wrong type"),
    ("command", "sh", "wrong type"),
    ("command", [1], "wrong type"),
    ("command", ["a\0b"], "NUL"),
    ("command", ["\ud800"], "broken one"),
    ("command", ["x"] * 65, "out of range"),
    ("command", ["x" * 4097], "out of range"),
    ("env", ["A=1"], "wrong type"),
    ("env", {"A": 1}, "wrong type"),
    ("env", {"--env": "x"}, "none of a variable"),
    ("env", {"A=B": "x"}, "none of a variable"),
    ("env", {"": "x"}, "none of a variable"),
    ("env", {"A\n": "x"}, "none of a variable"),
    ("env", {"A": "\0"}, "NUL"),
    ("env", {f"A{n}": "x" * 4096 for n in range(5)}, "larger than"),
    ("cpu_milli", ..., "missing"),
    ("cpu_milli", 0, "out of range"),
    ("cpu_milli", -500, "out of range"),
    ("cpu_milli", 1.5, "wrong type"),
    ("cpu_milli", True, "wrong type"),
    ("cpu_milli", "500", "wrong type"),
    ("cpu_milli", 10**30, "out of range"),
    ("memory_bytes", 1 << 20, "out of range"),
    ("memory_bytes", 1 << 50, "out of range"),
    ("replicas", -1, "out of range"),
    ("replicas", 21, "out of range"),
    ("ports", [0], "out of range"),
    ("ports", [65_536], "out of range"),
    ("ports", [80, 80], "twice"),
    ("ports", ["80/tcp"], "wrong type"),
    ("ports", list(range(1, 10)), "out of range"),
    ("egress", "lan", "no known value"),
    ("restart", "unless-stopped", "no known value"),
    ("arch", "riscv64", "no known value"),
    ("provider", "kuma", "no namespace of a provider"),
    ("provider", "solana:x", "not a Solana address"),
    ("labels", ["region=eu"], "wrong type"),
    ("labels", {"region": 1}, "wrong type"),
    ("labels", {"region": ""}, "out of range"),
    ("labels", {"": "eu"}, "no label"),
    ("labels", {"Region": "eu"}, "no label"),
    ("labels", {"region": "eu west"}, "no label"),
    ("labels", {"region": "-eu"}, "no label"),
    ("labels", {"region": "--privileged"}, "no label"),
    ("labels", {"--privileged": "eu"}, "no label"),
    ("labels", {"region\n": "eu"}, "no label"),
    ("labels", {"a" * 64: "eu"}, "no label"),
    ("labels", {str(n): "x" for n in range(17)}, "out of range"),
    *[
        (name, True, "unknown field")
        for name in (
            *("privileged", "Privileged", "cap_add", "CapAdd", "devices", "volumes", "mounts"),
            *(
                "network_mode",
                "host_network",
                "pid",
                "ipc",
                "HostConfig",
                "user",
                "security_opt",
            ),
            *("binds", "runtime", "sysctls", "host_ip", "host_port"),
        )
    ],
    ("secrets", True, "wrong type"),
    ("secrets", None, "wrong type"),
    ("secrets", {"a": 1}, "secrets[a] has the wrong type"),
    ("secrets", {str(n): "" for n in range(17)}, "send 0 to 16 of them"),
    *(
        ("secrets", {name: ""}, "none of a file")
        for name in (
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "/a",
            "a\\b",
            "a b",
            "é",
            "a\n",
            "a" * 64,
        )
    ),
    ("secrets", {"a": "\ud800"}, "broken character"),
    ("secrets", {"a": "x" * 16_321}, "secrets[a] is out of range"),
    ("secrets", {"a": "x" * 8192, "b": "x" * 8191}, "larger than 16384 bytes"),
    ("secrets", {"a": "é" * 5000, "b": "é" * 3192}, "larger than 16384 bytes"),
]


@pytest.mark.parametrize(("field", "value", "said"), REFUSED)
def test_what_cannot_be_asked_for(field: str, value: Any, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(**{field: value})
    code = "FORBIDDEN" if "of yours" in said or "of your" in said else "BAD_REQUEST"
    assert (refused.value.code, refused.value.field.partition("[")[0]) == (code, field)
    assert said in str(refused.value)


SECRETS = {"b_1.Key-x": "hunter2", "_": "", "0": "\0\n\u202eé"}
SECRETS |= {"big": "x" * 16_000, "more": "x" * 352}


def test_secrets_are_a_part_of_an_order_and_not_of_its_spec() -> None:
    order = parse(secrets=SECRETS)
    assert order.secrets == SECRETS  # 16,384 bytes with their names
    assert order.spec["secrets"] == ["0", "_", "b_1.Key-x", "big", "more"]
    assert "hunter2" not in repr(order)
    assert "hunter2" not in json.dumps(order.spec)
    assert parse(secrets={}).secrets == {}


@pytest.mark.parametrize(
    "secrets", [{"a/b": "hunter2"}, {"a": "hunter2" * 3000}, {"a": "hunter2\ud800"}, ["hunter2"]]
)
def test_a_refusal_repeats_no_secret(secrets: Any) -> None:
    with pytest.raises(Refusal) as refused:
        parse(secrets=secrets)
    assert "hunter2" not in str(refused.value) + repr(refused.value)


def test_without_a_key_no_secrets_are_taken() -> None:
    values = cp_server.parse_fields(cp_server.WORKLOAD_FIELDS, {**ORDER, "secrets": {"a": "b"}})
    with pytest.raises(Refusal, match="has no key for secrets") as refused:
        cp_server.decide_order(values, ["kuma"], "cp.example.com", has_key=False)
    assert (refused.value.code, refused.value.field) == ("CONFLICT", "secrets")
    more: dict[str, Any]
    for more in ({}, {"secrets": {}}):
        values = cp_server.parse_fields(cp_server.WORKLOAD_FIELDS, {**ORDER, **more})
        cp_server.decide_order(values, ["kuma"], "cp.example.com", has_key=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


WORDS = st.one_of(
    st.text(max_size=9),
    st.sampled_from(["--privileged", "-v=/:/host", "$(id)", "host", "ALL", "/run/docker.sock:/s"]),
)
VARIABLES = st.sampled_from(["A", "_", "LD_PRELOAD", "DOCKER_HOST"])
# What may be asked for, the oddest of it.
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "command": st.lists(WORDS, max_size=3),
    "env": st.dictionaries(VARIABLES, WORDS, max_size=2),
    "secrets": st.dictionaries(st.sampled_from(["token", "a.b", "_"]), WORDS, max_size=2),
    "cpu_milli": st.sampled_from([10, 64_000]),
    "memory_bytes": st.sampled_from([16 << 20, 1 << 40]),
    "replicas": st.integers(0, 20),
    "ports": st.lists(st.sampled_from([1, 22, 80, 65_535]), max_size=4, unique=True),
    "egress": st.sampled_from(cp_server.EGRESSES),
    "restart": st.sampled_from(cp_server.RESTARTS),
    "arch": st.sampled_from(cp_server.ARCHS),
    "labels": st.dictionaries(st.sampled_from(["region", "a.b"]), st.just("eu"), max_size=2),
}
NAMES = [field.name for field in cp_server.WORKLOAD_FIELDS]
FIELDS = [st.tuples(st.just(name), values) for name, values in GOOD.items()]
ODD = st.tuples(st.sampled_from(NAMES), json_values)


@given(st.lists(st.one_of(*FIELDS), max_size=6), st.lists(ODD, max_size=1))
def test_no_body_breaks_the_check_and_what_passes_fits_the_contract(
    good: list[tuple[str, Any]], odd: list[tuple[str, Any]]
) -> None:
    """And its host takes that too, and makes the sandbox of it and nothing else."""
    body = dict([*good, *odd])
    refused = None
    try:
        order = parse(**body)
    except Refusal as error:
        refused = error
    if refused is not None:
        assert refused.code in ("BAD_REQUEST", "FORBIDDEN")
        assert refused.field
        return
    row = {
        "spec": json.loads(json.dumps(dict(order.spec))),
        "port_slot": 1023,
        "assignment_id": uuid.UUID(int=1, version=4),
        "assignment_no": 1,
        "workload_id": uuid.UUID(int=2, version=4),
        "state": "running",
        "secrets": json.dumps(order.secrets) if order.secrets else None,
    }
    made = cp_server.render_assignment(row, "cp.example.com")
    assert pb.Assignment.FromString(made.SerializeToString()) == made
    offered, place = agent.Limits(64_000, 1 << 40), ("10.77.16.5", Path("/run/openinfra/secrets"))
    (wish,), host_refused = agent.decide_wishes([made], offered, *place)
    assert host_refused == {}
    check_container(agent.render_container(wish, *place), wish, offered, *place)


WISHES_OF_POWER = st.sampled_from(
    [
        *("privileged", "cap_add", "cap-drop", "devices", "pid", "ipc", "uts", "userns_mode"),
        *("network", "security_opt", "volumes", "binds", "mounts", "tmpfs", "read_only", "user"),
        *("host config", "entrypoint", "sysctls", "ulimits", "cgroup_parent", "runtime", *NAMES),
    ]
)
SPELLINGS = st.sampled_from(
    [
        *(str, str.upper, str.title, lambda text: text.title().replace("_", "")),
        *(lambda text: text.replace("_", "-"), lambda text: f"--{text}", lambda text: f" {text}"),
        *(
            lambda text: f"HostConfig.{text}",
            lambda text: f"{text}\0",
            lambda text: f"{text}\u200b",
        ),
        lambda text: "".join(chr(ord(one) + 0xFEE0) if one > " " else one for one in text),
    ]
)


@given(
    st.one_of(st.builds(lambda how, text: how(text), SPELLINGS, WISHES_OF_POWER), st.text()),
    json_values,
)
def test_no_field_is_taken_by_another_name(name: str, value: Any) -> None:
    assume(name not in NAMES)
    with pytest.raises(Refusal, match="unknown field") as refused:
        parse(**{name: value})
    shown = name[:40].encode("ascii", "replace").decode()
    assert (refused.value.code, refused.value.field) == ("BAD_REQUEST", shown)
    assert str(refused.value).isprintable()


def test_an_assignment_as_its_host_gets_it() -> None:
    spec = parse(
        command=["httpd", "-f"],
        env={"A": "1"},
        ports=[8080, 9090],
        egress="none",
        restart="on-failure",
    ).spec
    row = {
        "spec": spec,
        "port_slot": 3,
        "assignment_id": uuid.UUID(int=1),
        "assignment_no": 77,
        "workload_id": uuid.UUID(int=2),
        "state": "failed",
        "secrets": None,
    }
    assert cp_server.render_assignment(row, "cp.example.com") == pb.Assignment(
        assignment_id=str(uuid.UUID(int=1)),
        fence=77,
        workload_id=str(uuid.UUID(int=2)),
        image=f"cp.example.com/kuma/web@{DIGEST}",
        command=["httpd", "-f"],
        env={"A": "1"},
        cpu_milli=500,
        memory_bytes=64 << 20,
        ports=[
            pb.Port(container_port=8080, host_port=20_024),
            pb.Port(container_port=9090, host_port=20_025),
        ],
        egress=pb.EGRESS_NONE,
        restart=pb.RESTART_ON_FAILURE,
        done=True,
    )
    row["spec"] = parse(secrets={"a": "1", "b": "ä"}).spec
    withheld = cp_server.render_assignment(row, "cp.example.com")
    assert (dict(withheld.secrets), withheld.secrets_withheld) == ({}, True)
    row["secrets"] = b'{"a": "1", "b": "\xc3\xa4"}'
    opened = cp_server.render_assignment(row, "cp.example.com")
    assert dict(opened.secrets) == {"a": b"1", "b": "ä".encode()}
    assert not opened.secrets_withheld


# Placement ---------------------------------------------------------------------------------------


def make_place(host_no: int, **changes: Any) -> Place:
    values: dict[str, Any] = {
        "host_no": host_no,
        "arch": "x86_64",
        "namespace": f"solana:{host_no}",
        "cpu_milli": 1000,
        "memory_bytes": 1 << 30,
        "assignments": 0,
        "port_slots": set(),
        "labels": {},
    }
    return Place(**{**values, **changes})


def make_copy(replica: int, **changes: Any) -> Copy:
    values: dict[str, Any] = {
        "assignment_no": 100 + replica,
        "replica": replica,
        "revision": 1,
        "is_running": True,
        "is_done": False,
        "is_stopping": False,
        "state_age_s": 60.0,
        "host_no": 900 + replica,
    }
    return Copy(**{**values, **changes})


def make_demand(replicas: int = 1, *copies: Copy, workload_no: int = 1, **changes: Any) -> Demand:
    spec = dict(parse().spec) | changes.pop("spec", {})
    values: dict[str, Any] = {"revision": 1, "rejections": {}, "rejected_by": frozenset()}
    return Demand(workload_no, replicas=replicas, spec=spec, copies=copies, **{**values, **changes})


def place(demands: list[Demand], places: list[Place]) -> tuple[dict[tuple[int, int], int], Any]:
    """(workload_no, replica) -> host_no, and the reasons."""
    made, reasons, _ = cp_server.decide_places(demands, places)
    return {(each.workload_no, each.replica): each.host_no for each in made}, reasons


OTHER_PROVIDER = {"provider": "solana:2"}
EU = {"region": "eu"}
WITH_SECRETS = {"secrets": ["token"]}
PRIVATE = make_place(1, takes_secrets=True)


@pytest.mark.parametrize(
    ("demand", "places", "host"),
    [
        (make_demand(), [make_place(1)], 1),
        # Most memory free; of the same, the one that came first.
        (make_demand(), [make_place(1), make_place(2, memory_bytes=2 << 30)], 2),
        (make_demand(), [make_place(2), make_place(1)], 1),
        # What does not fit is no place, however much of the rest is free.
        (make_demand(), [make_place(1, cpu_milli=499), make_place(2)], 2),
        (make_demand(), [make_place(1, memory_bytes=(64 << 20) - 1), make_place(2)], 2),
        (make_demand(), [make_place(1, cpu_milli=500, memory_bytes=64 << 20)], 1),
        (make_demand(), [make_place(1, assignments=200), make_place(2, assignments=199)], 2),
        (make_demand(spec={"ports": [80]}), [make_place(1, port_slots=set(range(1024)))], None),
        (make_demand(), [make_place(1, port_slots=set(range(1024)))], 1),
        # As asked.
        (make_demand(spec={"arch": "aarch64"}), [make_place(1)], None),
        (make_demand(spec=WITH_SECRETS), [make_place(1)], None),
        (make_demand(spec=WITH_SECRETS), [make_place(1), make_place(2, takes_secrets=True)], 2),
        (make_demand(spec=WITH_SECRETS, secrets_lost=True), [PRIVATE], None),
        (make_demand(spec={"arch": "aarch64"}), [make_place(1), make_place(2, arch="aarch64")], 2),
        (make_demand(spec={"labels": EU}), [make_place(1)], None),
        (make_demand(spec={"labels": EU}), [make_place(1, labels=EU | {"disk": "ssd"})], 1),
        (make_demand(spec={"labels": EU | {"disk": "ssd"}}), [make_place(1, labels=EU)], None),
        (make_demand(spec={"labels": EU}), [make_place(1, labels={"region": "us"})], None),
        (make_demand(), [make_place(1, labels=EU)], 1),
        (make_demand(spec=OTHER_PROVIDER), [make_place(1), make_place(2, memory_bytes=1 << 27)], 2),
        # Who rejected it of late comes last, but comes.
        (make_demand(rejected_by=frozenset({1})), [make_place(1), make_place(2, cpu_milli=600)], 2),
        (make_demand(rejected_by=frozenset({1})), [make_place(1)], 1),
        # Away from a copy of the same, then from the same provider.
        (
            make_demand(2, make_copy(0, host_no=1)),
            [make_place(1, memory_bytes=8 << 30), make_place(2)],
            2,
        ),
        (make_demand(2, make_copy(0, host_no=1)), [make_place(1)], 1),
        (
            make_demand(2, make_copy(0, host_no=1)),
            [
                make_place(1, namespace="solana:a"),
                make_place(2, namespace="solana:a", memory_bytes=8 << 30),
                make_place(3),
            ],
            3,
        ),
    ],
)
def test_where_a_copy_goes(demand: Demand, places: list[Place], host: int | None) -> None:
    made, reasons = place([demand], places)
    assert list(made.values()) == ([] if host is None else [host])
    assert bool(reasons) == (host is None)


def test_replicas_spread_and_take_what_is_free() -> None:
    places = [make_place(1), make_place(2), make_place(3)]
    demands = [make_demand(4, spec={"ports": [80]}), make_demand(4, workload_no=2)]
    made, reasons = place(demands, places)
    assert sorted(made) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    assert {made[1, n] for n in range(3)} == {1, 2, 3}
    assert [each.cpu_milli for each in places] == [0, 0, 0]  # six copies of 500
    assert set(reasons) == {2}
    assert "none of 3 hosts has 500 cpu_milli" in reasons[2]


def test_ports_of_one_host_are_not_given_twice() -> None:
    spot = make_place(1, cpu_milli=10**6, port_slots={0, 2})
    made, *_ = cp_server.decide_places([make_demand(3, spec={"ports": [80]})], [spot])
    assert [each.port_slot for each in made] == [1, 3, 4]


@pytest.mark.parametrize(
    ("held", "refused", "slots"),
    [
        (set(), {0}, [1, 2]),
        ({1}, {0, 2}, [3, 4]),
        ({*range(1_021)}, {1_021, 1_023}, [1_022, 1_021]),  # all that is left
        ({*range(1_022)}, {*range(1_024)}, [1_022, 1_023]),
    ],
)
def test_ports_that_a_host_refused_of_late_come_last(
    held: set[int], refused: set[int], slots: list[int]
) -> None:
    spot = make_place(1, port_slots=held, refused_slots=refused)
    made, *_ = cp_server.decide_places([make_demand(2, spec={"ports": [80]})], [spot])
    assert [each.port_slot for each in made] == slots


@pytest.mark.parametrize(
    ("demand", "places", "said"),
    [
        (make_demand(), [], "no host is ready for work now"),
        (make_demand(spec={"arch": "aarch64"}), [make_place(1)], "none of 1 hosts is as asked"),
        (
            make_demand(spec=WITH_SECRETS),
            [make_place(1)],
            "none of 1 hosts is as asked: for its secrets an encrypted disk and a new agent",
        ),
        (make_demand(spec=WITH_SECRETS, secrets_lost=True), [PRIVATE], cp_server.SECRETS_LOST),
        (make_demand(), [make_place(1, cpu_milli=-5)], "the most of each is 0 and 1073741824"),
        (
            make_demand(rejections={0: Rejections(3, 9.0, "image not found")}),
            [make_place(1)],
            "a host could not run it: image not found; tried 3 times of late, again 10 s after",
        ),
    ],
)
def test_why_there_is_no_place(demand: Demand, places: list[Place], said: str) -> None:
    made, reasons = place([demand], places)
    assert made == {}
    assert said in reasons[1]


@pytest.mark.parametrize(
    ("times", "wait_s"), [(0, 0), (1, 0), (2, 5), (3, 10), (4, 20), (7, 160), (8, 300), (99, 300)]
)
def test_how_long_a_rejected_replica_waits(times: int, wait_s: float) -> None:
    assert cp_server.decide_wait_s(times) == wait_s


def choose(demands: list[Demand], places: list[Place]) -> list[tuple[int, int, int]]:
    """What decide_places has to find, by looking at each host for each copy."""
    made = []
    provider_of = {place.host_no: place.namespace for place in places}
    for demand in demands:
        hosts = [copy.host_no for copy in demand.copies]
        for replica in cp_server.plan_rollout(demand)[1]:
            fitting = [
                place
                for place in places
                if cp_server.fits(demand.spec, place) and cp_server.has_room(demand.spec, place)
            ]
            if not fitting:
                break
            beside = [provider_of.get(host) for host in hosts]
            ranked = [
                (
                    place.host_no in demand.rejected_by,
                    hosts.count(place.host_no),
                    beside.count(place.namespace),
                    -place.memory_bytes,
                    place.host_no,
                )
                for place in fitting
            ]
            best = fitting[ranked.index(min(ranked))]
            cp_server.take_place(demand, replica, best)
            hosts.append(best.host_no)
            made.append((demand.workload_no, replica, best.host_no))
    return made


@given(st.randoms(use_true_random=False))
def test_the_best_place_is_found_without_a_look_at_each(chance: random.Random) -> None:
    hosts, providers = chance.randint(1, 12), chance.randint(1, 6)

    def make_places() -> list[Place]:
        dice = random.Random(seed)
        return [
            make_place(
                number,
                arch=dice.choice(["x86_64", "aarch64"]),
                namespace=f"solana:{dice.randrange(providers)}",
                cpu_milli=500 * dice.randint(0, 8),
                memory_bytes=dice.randint(0, 20) << 26,
                assignments=dice.choice([0, 0, 198]),
            )
            for number in range(hosts)
        ]

    seed = chance.random()
    demands = [
        make_demand(
            chance.randint(1, 6),
            *([make_copy(0, host_no=chance.randrange(hosts + 1))] * chance.randint(0, 1)),
            workload_no=number,
            rejected_by=frozenset(chance.sample(range(hosts), chance.randint(0, min(3, hosts)))),
            spec={
                "arch": chance.choice([None, None, "x86_64"]),
                "cpu_milli": chance.choice([500, 1000]),
                "memory_bytes": chance.choice([64 << 20, 256 << 20]),
                "ports": chance.choice([[], [80]]),
            },
        )
        for number in range(chance.randint(1, 8))
    ]
    made, _, left = cp_server.decide_places(demands, make_places())
    found = [(each.workload_no, each.replica, each.host_no) for each in made]
    assert (found, left) == (choose(demands, make_places()), set())


class SeenPlace(Place):
    """A host that counts how often anybody looks whether it fits or has room."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("arch", "cpu_milli"):
            SeenPlace.looks += 1
        return super().__getattribute__(name)


HOSTS = 5_000


@pytest.mark.parametrize(
    ("name", "needs", "placed", "looks"),
    [
        # One kind of copy: a look at each host, and few more for each copy.
        ("fit", {}, 1_000, 2 * HOSTS + 100_000),
        ("fit nowhere", {"cpu_milli": 10**6}, 0, 3 * HOSTS),
        ("are as no host", {"arch": "aarch64"}, 0, 2 * HOSTS),
        # A kind for each workload: the round ends, whatever is left.
        ("fit, each of a size", {"cpu_milli": None}, None, 100_000 + 5 * HOSTS),
        ("fit nowhere, each of a size", {"memory_bytes": None}, 0, 100_000 + 5 * HOSTS),
    ],
)
def test_a_round_has_an_end(
    name: str, needs: dict[str, Any], placed: int | None, looks: int
) -> None:
    places: list[Place] = [
        SeenPlace(n, "x86_64", f"solana:{n % 50}", 4000, (4 << 30) + n, 0, set(), {})
        for n in range(HOSTS)
    ]
    demands = [
        make_demand(
            20,
            workload_no=number,
            spec={
                k: v or {"cpu_milli": 100, "memory_bytes": 1 << 40}[k] + number
                for k, v in needs.items()
            },
        )
        for number in range(200)
    ]
    SeenPlace.looks = 0
    made, reasons, left = cp_server.decide_places(demands, places, 100_000)
    assert SeenPlace.looks <= looks, name
    assert placed in (None, len(made))
    assert len(made) <= cp_server.PLACE_COPIES_MAX
    done = {each.workload_no for each in made if each.replica == 19}
    assert left == {demand.workload_no for demand in demands} - set(reasons) - done


def test_what_fits_nowhere_holds_up_nobody() -> None:
    """Two customers whose many workloads fit nowhere, and a third with one that fits."""
    needs = {"memory_bytes": 1 << 40}
    greedy = [
        make_demand(workload_no=n, customer_no=n % 2, spec={**needs, "cpu_milli": 100 + n})
        for n in range(100)
    ]
    turns: dict[int, int] = {}
    seen: collections.Counter[int] = collections.Counter()
    for number in range(40):
        late = [make_demand(workload_no=1_000 + number, customer_no=7)]
        places = [make_place(n) for n in range(100)]
        demands = cp_server.order_demands([*greedy, *late], turns)
        made, reasons, left = cp_server.decide_places(demands, places, 1_000)
        assert [each.workload_no for each in made] == [1_000 + number]
        assert 90 < len(left) < 100
        turns = cp_server.plan_turns(demands, left, turns)
        seen.update(list(reasons))
    assert set(seen) == set(range(100))  # all had their turn, and in turn
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ({}, [1, 3, 2]),  # each customer's first
        ({1: 4, 2: 1, 3: 4}, [2, 3, 1]),  # what waits longest is a customer's first
        ({2: 1, 3: 4}, [2, 3, 1]),  # a new one waits since now
        ({1: 4, 2: 5, 3: 1}, [3, 1, 2]),
    ],
)
def test_whose_turn_it_is(turns: dict[int, int], expected: list[int]) -> None:
    demands = [make_demand(workload_no=n, customer_no=c) for n, c in ((3, 2), (2, 1), (1, 1))]
    assert [each.workload_no for each in cp_server.order_demands(demands, turns)] == expected
    # Who was looked at begins anew, behind all others; a new one that was not waits since now.
    assert cp_server.plan_turns(demands, {2, 3}, {1: 4, 2: 1}) == {1: 5, 2: 1, 3: 4}
    assert cp_server.plan_turns(demands, {2}, {}) == {1: 1, 2: 0, 3: 1}


def test_a_replica_that_waits_does_not_hold_up_the_others() -> None:
    demand = make_demand(2, rejections={0: Rejections(2, 4.0, "x")})
    made, reasons = place([demand], [make_place(1)])
    assert made == {(1, 1): 1}
    assert set(reasons) == {1}
    demand = dataclasses.replace(demand, rejections={0: Rejections(2, 5.0, "x")})
    assert place([demand], [make_place(1)]) == ({(1, 0): 1, (1, 1): 1}, {})


# Rollout -----------------------------------------------------------------------------------------

old_running = make_copy
NEW: dict[str, Any] = {"revision": 2}
IDLE: dict[str, Any] = {"is_running": False}


@pytest.mark.parametrize(
    ("replicas", "copies", "stopped", "missing"),
    [
        (2, [], [], [0, 1]),
        (2, [make_copy(0, **NEW)], [], [1]),
        (3, [make_copy(0), make_copy(1), make_copy(2)], [0], []),
        # The new copy must run, and for a while, before the next one goes.
        (2, [make_copy(0, **NEW, **IDLE), make_copy(1)], [], []),
        (2, [make_copy(0, **NEW, state_age_s=9.9), make_copy(1)], [], []),
        (2, [make_copy(0, **NEW, state_age_s=10.0), make_copy(1)], [1], []),
        (2, [make_copy(0, **NEW, is_done=True, is_running=False), make_copy(1)], [1], []),
        (3, [make_copy(1), make_copy(2)], [], [0]),
        (2, [make_copy(0, is_stopping=True), make_copy(1)], [], []),
        # What does not run anyway goes at once, and first.
        (3, [make_copy(0), make_copy(1, **IDLE), make_copy(2, **IDLE)], [1, 2], []),
        (1, [make_copy(0, **IDLE)], [0], []),
        (1, [make_copy(0, is_running=False, is_done=True)], [0], []),
        (1, [make_copy(0)], [0], []),
    ],
)
def test_a_new_revision_replaces_one_copy_at_a_time(
    replicas: int, copies: list[Copy], stopped: list[int], missing: list[int]
) -> None:
    got = cp_server.plan_rollout(make_demand(replicas, *copies, revision=2))
    assert got == ([100 + replica for replica in stopped], missing)


def test_what_runs_stays_when_its_secrets_cannot_be_read() -> None:
    demand = make_demand(3, make_copy(0), make_copy(1, **IDLE), revision=2, secrets_lost=True)
    assert cp_server.plan_rollout(demand) == ([], [2])


@given(st.data())
def test_a_rollout_never_stops_more_than_one_copy_that_runs(data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, 6))
    copies = [
        make_copy(
            number,
            revision=data.draw(st.sampled_from([1, 2])),
            is_running=data.draw(st.booleans()),
            is_stopping=data.draw(st.booleans()),
            state_age_s=data.draw(st.sampled_from([0.0, 60.0])),
        )
        for number in range(replicas)
        if data.draw(st.booleans())
    ]
    stopped, missing = cp_server.plan_rollout(make_demand(replicas, *copies, revision=2))
    by_no = {copy.assignment_no: copy for copy in copies}
    running = [by_no[number] for number in stopped if by_no[number].is_running]
    assert len(running) <= 1
    assert not (running and missing)
    assert all(by_no[number].revision == 1 for number in stopped)
    assert sorted([*missing, *(copy.replica for copy in copies)]) == list(range(replicas))


# State -------------------------------------------------------------------------------------------


def make_workload(**changes: Any) -> Workload:
    values: dict[str, Any] = {
        "workload_no": 1,
        "workload_id": uuid.UUID(int=1),
        "namespace": "kuma",
        "name": "web",
        "revision": 1,
        "replicas": 1,
        "spec": parse().spec,
        "unplaced_reason": "",
        "created_by": "customer:x:y",
        "created_at": AT,
        "changed_at": AT,
        "deleted_at": None,
    }
    return Workload(**{**values, **changes})


def make_assignment(replica: int = 0, **changes: Any) -> Assignment:
    values: dict[str, Any] = {
        "assignment_no": 100 + replica,
        "assignment_id": uuid.UUID(int=100 + replica),
        "workload_no": 1,
        "revision": 1,
        "replica": replica,
        "host_no": 7,
        "host_id": uuid.UUID(int=7),
        "wg_ip": "10.77.0.42",
        "host_status": "online",
        "state": "running",
        "reason": "",
        "restarts": 0,
        "exit_code": None,
        "stop_reason": None,
        "port_slot": 2,
        "container_ports": [8080],
        "created_at": AT,
        "state_at": AT,
        "ended_at": None,
    }
    return Assignment(**{**values, **changes})


RUNS = make_assignment
WAITS: dict[str, Any] = {"state": "waiting", "reason": "ended with exit code 1"}


def say_away(status: str) -> str:
    return f"its host is {status}; it moves when the host's right to run it is over"


@pytest.mark.parametrize(
    ("workload", "copies", "state", "reasons"),
    [
        (make_workload(), [RUNS()], "running", []),
        (make_workload(), [], "pending", ["replica 0: it is about to get a host"]),
        (make_workload(unplaced_reason="full"), [], "pending", ["replica 0: full"]),
        (
            make_workload(),
            [RUNS(state="assigned")],
            "pending",
            ["replica 0: its host is about to hear of it"],
        ),
        (
            make_workload(),
            [RUNS(state="pulling", reason="2 of 9 MB")],
            "pending",
            ["replica 0: 2 of 9 MB"],
        ),
        (make_workload(), [RUNS(state="starting")], "pending", ["replica 0: it is starting"]),
        (make_workload(), [RUNS(**WAITS)], "pending", ["replica 0: ended with exit code 1"]),
        (
            make_workload(replicas=2),
            [RUNS(), RUNS(1, **WAITS)],
            "degraded",
            ["replica 1: ended with exit code 1"],
        ),
        (make_workload(replicas=2), [RUNS(), RUNS(1)], "running", []),
        *(
            (
                make_workload(),
                [RUNS(host_status=status)],
                "pending",
                [f"replica 0: {say_away(status)}"],
            )
            for status in ("offline", "quarantined", "revoked")
        ),
        (make_workload(), [RUNS(host_status="paused")], "running", []),
        (
            make_workload(replicas=2),
            [RUNS(), RUNS(1, host_status="offline")],
            "degraded",
            [f"replica 1: {say_away('offline')}"],
        ),
        (
            make_workload(replicas=2),
            [RUNS(host_status="offline"), RUNS(1, host_status="offline")],
            "pending",
            [f"replica {number}: {say_away('offline')}" for number in range(2)],
        ),
        # What ended has ended, wherever its host is.
        (
            make_workload(),
            [RUNS(state="finished", host_status="offline")],
            "finished",
            [f"replica 0: {say_away('offline')}"],
        ),
        (
            make_workload(),
            [RUNS(), RUNS(1, stop_reason="fewer replicas are wanted")],
            "running",
            ["replica 1: it is being stopped: fewer replicas are wanted"],
        ),
        (make_workload(revision=2), [RUNS()], "updating", []),
        (make_workload(), [RUNS(state="finished")], "finished", ["replica 0: it is finished"]),
        (
            make_workload(),
            [RUNS(state="failed", reason="ended with exit code 3")],
            "failed",
            ["replica 0: ended with exit code 3"],
        ),
        (make_workload(replicas=0), [], "stopped", []),
        (
            make_workload(replicas=0),
            [RUNS(stop_reason="fewer")],
            "stopping",
            ["it is being stopped: fewer"],
        ),
        (make_workload(secrets_lost=True), [RUNS()], "running", [cp_server.SECRETS_LOST]),
        (
            make_workload(secrets_lost=True, unplaced_reason="why"),
            [],
            "pending",
            [cp_server.SECRETS_LOST, "replica 0: why"],
        ),
        (make_workload(deleted_at=AT, secrets_lost=True), [], "deleted", []),
        (
            make_workload(deleted_at=AT),
            [RUNS(stop_reason="the workload was deleted")],
            "deleting",
            ["it is being stopped: the workload was deleted"],
        ),
        # What ended does not count.
        (
            make_workload(),
            [RUNS(state="lost", ended_at=AT)],
            "pending",
            ["replica 0: it is about to get a host"],
        ),
    ],
)
def test_the_state_of_a_workload_and_why(
    workload: Workload, copies: list[Assignment], state: str, reasons: list[str]
) -> None:
    assert cp_server.decide_workload(workload, copies) == (state, reasons)


def test_a_workload_as_the_api_shows_it() -> None:
    shown = cp_server.render_workload(make_workload(), [RUNS(), RUNS(wg_ip=None)])
    assert set(shown) == set(cp_server.SCHEMAS["Workload"])
    first, second = shown["assignments"]
    assert set(first) == set(cp_server.SCHEMAS["Assignment"])
    assert first["endpoints"] == [{"port": 8080, "address": "10.77.0.42:20016"}]
    assert second["endpoints"] == [{"port": 8080, "address": "127.0.0.1:20016"}]
    json.dumps(shown)


# What hosts say ----------------------------------------------------------------------------------

ID = str(uuid.UUID(int=5))


def observe(*changes: dict[str, Any]) -> pb.Observed:
    rows = [
        pb.ObservedAssignment(
            **{"assignment_id": ID, "state": pb.ASSIGNMENT_STATE_RUNNING, **change}
        )
        for change in changes
    ]
    return pb.Observed(revision=3, assignments=rows)


def test_what_a_host_has_is_read() -> None:
    got = cp_server.parse_observed(
        observe(
            {
                "state": pb.ASSIGNMENT_STATE_FAILED,
                "reason": "a\nb",
                "restarts": 2**32 - 1,
                "exit_code": -1,
            }
        )
    )
    (one,) = got.assignments
    assert got.revision == 3
    assert one == cp_server.Observation(ID, "failed", "a?b", 2**31 - 1, -1)
    assert cp_server.parse_observed(observe({})).assignments[0].exit_code is None
    long = cp_server.parse_observed(observe({"reason": "x" * 9999})).assignments[0].reason
    assert len(long) == 300


def one_more_than_fit() -> pb.Observed:
    return observe(*({"assignment_id": str(uuid.UUID(int=n))} for n in range(402)))


ASKED = pb.LogRequest(request_id=1, assignment_id="a", tail_lines=3, limit_bytes=20)


@pytest.mark.parametrize(
    ("answer", "lines", "truncated", "reason"),
    [
        ({}, [], False, ""),
        ({"reason": "no \x1b[1mcontainer"}, [], False, "no ?[1mcontainer"),
        ({"reason": "x" * 301}, [], False, "x" * 299 + "…"),
        ({"content": b"a\nb\n"}, ["a", "b"], False, ""),
        ({"content": b"a\nb"}, ["a", "b"], False, ""),
        ({"content": b"\n\n"}, ["", ""], False, ""),
        ({"content": b"a\nb\nc\nd\n"}, ["b", "c", "d"], False, ""),
        ({"content": b"a\n", "truncated": True}, ["a"], True, ""),
        ({"content": b"x" * 10 + b"\n" + b"y" * 19 + b"\n"}, ["y" * 19], True, ""),
        ({"content": b"\xff\xc3\n"}, ["\ufffd\ufffd"], False, ""),
        ({"content": "ü\r\t\x1b[2J\0".encode()}, ["ü\r\t\x1b[2J\0"], False, ""),  # JSON's to escape
        ({"content": "\x7f\x9b2J\x85\n".encode()}, ["\ufffd\ufffd2J\ufffd"], False, ""),
        ({"content": "a\u2028b\x0b\x0cc".encode()}, ["a\u2028b\x0b\x0cc"], False, ""),  # one line
    ],
)
def test_a_log_is_what_was_asked_for(
    answer: dict[str, Any], lines: list[str], truncated: bool, reason: str
) -> None:
    found = cp_server.parse_log(pb.LogAnswer(request_id=1, **answer), ASKED)
    assert found == cp_server.Log(lines, truncated, reason)


def test_logs_of_one_host_share_a_heartbeat() -> None:
    copies = [make_assignment(0), make_assignment(1), make_assignment(2, host_no=8)]
    requests = cp_server.render_log_requests(copies, 5)
    assert [each.assignment_id for each in requests] == [str(c.assignment_id) for c in copies]
    assert [each.limit_bytes for each in requests] == [16_384, 16_384, 32_768]
    assert {each.tail_lines for each in requests} == {5}
    assert len({each.request_id for each in requests}) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *[({"host_status": status}, "") for status in ("online", "paused", "pending")],
        *[
            ({"host_status": status}, f"its host is {status}")
            for status in ("offline", "quarantined", "revoked")
        ],
        ({"state": "assigned"}, ""),
        ({"ended_at": AT}, "it has ended, and nothing of it is kept"),
    ],
)
def test_whose_host_is_not_asked(changes: dict[str, Any], reason: str) -> None:
    assert cp_server.explain_no_log(make_assignment(0, **changes)) == reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: observe({"state": 0}),
        lambda: observe({"state": 99}),
        lambda: observe({"assignment_id": ""}),
        lambda: observe({"assignment_id": ID.upper().replace("0", "A")}),
        lambda: observe({"assignment_id": ID + "\n"}),
        one_more_than_fit,
        lambda: pb.Observed(revision=2**64 - 1),
    ],
)
def test_what_a_host_cannot_have(make: Callable[[], pb.Observed]) -> None:
    with pytest.raises(Refusal) as refused:
        cp_server.parse_observed(make())
    assert refused.value.code == "BAD_REQUEST"
