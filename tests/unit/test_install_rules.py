"""install_agent.py: how answers are checked, what it refuses, what is left to do in each state."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent
import install_agent
from install_agent import (
    AGENT,
    BINARY,
    CA,
    CONTAINERD,
    DISK,
    DOCKER_KEY,
    DROP_IN,
    ENGINE,
    ENGINE_IMAGE,
    ENGINE_USER,
    ENV,
    GUARD,
    KEPT,
    MANIFEST,
    QUESTIONS,
    RELEASE_PUB,
    SLICE,
    STRAYS,
    TIMER,
    UNIT_DIR,
    UNITS,
    WATCH,
    WG,
    WG_CONF,
    WG_DIR,
    WG_KEY,
    WG_PUB,
    WORKLOADS,
    Answers,
    DataDir,
    EngineUser,
    Error,
    Facts,
    Found,
    Manifest,
    Others,
    Release,
    Remove,
    Run,
    Unit,
    WriteFile,
    check_clock,
    check_flags,
    check_version,
    decide_engine_user,
    decide_image_bytes,
    decide_key,
    decide_new_packages,
    leave_packages,
    list_foreign,
    list_kept,
    list_left,
    list_problems,
    list_used,
    parse_arguments,
    parse_ca,
    parse_manifest,
    parse_release,
    parse_values,
    plan,
    plan_forgetting,
    plan_packages,
    plan_removal,
    read_known,
    read_units,
    render_conf,
    render_end,
    render_env,
    render_manifest,
    render_values,
)
from tests.e2e.home import TOKEN, TOKEN_ID, UNIT_TEXTS, render_artifact
from tests.harness import OTHER_WALLET, WALLET
from tests.harness import WG_KEY as CP_KEY

PRIVATE = "2GfvcIfrLgCQg5aCyFwLpgRD4nJmVXDGwo5QI+Xq5kg="
PUBLIC = "N0vJcXlrPLs5FXaAH9rJCf0fhCwJw5i2LQ9B3q1v6Ds="
KEYS = (PRIVATE, PUBLIC)
URL = "https://cp.coledex.com/dist/openinfra-agent-linux-x86_64"
USED = f"oi1_{TOKEN_ID}_used"
ANSWERS = Answers(
    url=URL,
    control_plane="10.77.0.1:9092",
    token=TOKEN,
    wallet=WALLET,
    wg_endpoint="cp.coledex.com:51820",
    wg_public_key=CP_KEY,
    wg_address="10.77.0.42",
    ca=b"",
    allow_unencrypted=False,
)
RELEASE = Release("0.1.0", b"{}", b"", b"key\n", render_artifact("0.1.0"))
NEWER = Release("0.2.0", b"{}", b"", b"key\n", render_artifact("0.2.0"))
DATA = DataDir("/var/lib/openinfra", 0o700, 0, True, True, True, False, "", 20 << 30, 18 << 30)
FRESH = Facts(
    arch="x86_64",
    now_s=1_800_000_000.0,
    has_systemd=True,
    has_wireguard=True,
    has_apt=True,
    missing=(),
    absent=(DROP_IN.parent,),
    is_dpkg_interrupted=False,
    free_bytes={"/usr": 1 << 40},
    data=DATA,
    uses=(),
    files={},
    units={name: Unit("inactive", "") for name in (WG, *UNITS)},
    dangling=(),
    has_link=False,
    has_table=False,
    engine_user=EngineUser(False, False, 100_000),
    others=Others({}),
    leftovers=(),
    manifest=Manifest(),
)
RUNNING = {
    WG: Unit("active", "enabled"),
    AGENT: Unit("active", "enabled"),
    GUARD: Unit("inactive", "enabled"),
    TIMER: Unit("active", "enabled"),
    WATCH: Unit("active", "enabled"),
    DISK: Unit("active", "enabled"),
    CONTAINERD: Unit("active", "static"),
    ENGINE: Unit("active", "enabled"),
    STRAYS: Unit("inactive", "static"),
    WORKLOADS: Unit("active", "static"),
    SLICE: Unit("inactive", "static"),
}


def play(facts: Facts, steps: list[Any]) -> Facts:
    """The facts after these steps."""
    files, manifest = dict(facts.files), facts.manifest
    for step in steps:
        if isinstance(step, WriteFile) and step.path == MANIFEST:
            manifest = parse_manifest(step.content)
        elif isinstance(step, WriteFile):
            files[step.path] = Found(step.content, step.mode, 0)
        elif isinstance(step, Remove) and step.path == MANIFEST:
            manifest = Manifest()
        elif isinstance(step, Remove):
            files.pop(step.path, None)
        elif step.argv[:2] == ("mv", "--no-target-directory") and step.argv[-1] == str(
            ENGINE_IMAGE
        ):
            files[ENGINE_IMAGE] = Found(b"", -1, 0)
        elif step.argv[0] == "userdel":
            facts = replace(facts, engine_user=EngineUser(False, False, 100_000))
        elif step.argv[0] == "usermod":
            facts = replace(facts, engine_user=EngineUser(True, True, 165_536))
    return replace(facts, files=files, manifest=manifest)


def installed(answers: Answers = ANSWERS, release: Release = RELEASE) -> Facts:
    """The facts of a machine on which all went well."""
    facts = play(FRESH, plan(FRESH, answers, release, KEYS))
    return replace(facts, units=RUNNING, has_link=True, has_table=True)


def changed(facts: Facts, path: Path, content: bytes, mode: int | None = None) -> Facts:
    """The facts after somebody wrote to one file."""
    old = facts.files[path]
    found = Found(content, old.mode if mode is None else mode, old.uid)
    return replace(facts, files={**facts.files, path: found})


def words(steps: list[Any]) -> list[str]:
    """The steps of a plan, each as the word that tells it."""
    said = []
    for step in steps:
        if isinstance(step, Run):
            said.append(" ".join(step.argv[1:] if step.argv[0] == "systemctl" else step.argv))
        else:
            said.append(step.path.name)
    return said


# The parts that are agent.py's.


@pytest.mark.parametrize(
    "name",
    [
        "Token",
        "parse_line",
        "parse_wallet",
        "parse_token",
        "parse_address",
        "parse_control_plane",
        "parse_env_value",
        "has_crypt",
        "is_encrypted",
    ],
)
def test_the_agents_checks_are_the_same_here(name: str) -> None:
    mine, theirs = (getattr(module, name) for module in (install_agent, agent))
    assert inspect.getsource(mine) == inspect.getsource(theirs)


def test_the_agents_constants_are_the_same_here() -> None:
    for name in ("TOKEN_RE", "TOKEN_USED_RE", "TOKEN_START_RE", "WG_KEY_RE", "BASE58", "TUNNEL"):
        assert getattr(install_agent, name) == getattr(agent, name)


# Answers.


def check_of(name: str) -> Callable[[str], str]:
    return next(question.check for question in QUESTIONS if question.name == name)


BAD_TOKEN = TOKEN[:-1] + ("0" if TOKEN[-1] != "0" else "1")


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("hostname", "cp.coledex.com", "cp.coledex.com"),
        ("hostname", "cp", "cp"),
        ("hostname", "192.0.2.1", "192.0.2.1"),
        ("hostname", "cp.coledex.com:8443", "cp.coledex.com:8443"),
        ("hostname", "[2001:db8::1]:8443", "[2001:db8::1]:8443"),
        ("control_plane", "10.77.0.1:9092", "10.77.0.1:9092"),
        ("token", TOKEN, TOKEN),
        ("wallet", WALLET, WALLET),
        ("wg_endpoint", "cp.coledex.com:51820", "cp.coledex.com:51820"),
        ("wg_endpoint", "[2001:db8::1]:51820", "[2001:db8::1]:51820"),
        ("wg_public_key", CP_KEY, CP_KEY),
        ("wg_address", "10.77.0.42", "10.77.0.42"),
        ("wg_address", "10.77.255.254/32", "10.77.255.254"),
    ],
)
def test_a_good_answer_is_taken(name: str, text: str, result: str) -> None:
    assert check_of(name)(text) == result


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("hostname", "", "is no name and port"),
        ("hostname", "https://cp.coledex.com/", "is a URL; give the name alone"),
        ("hostname", "cp.coledex.com/dist", "is a URL"),
        ("hostname", "-cp.com", "is no name"),
        ("hostname", "cp coledex.com", "is no name"),
        ("hostname", "cp.coledex.com:0", "is no name and port"),
        ("hostname", "cp.coledex.com:65536", "is no name and port"),
        ("hostname", "1.2.3", "is no name"),
        ("hostname", "user@cp.coledex.com", "is no name"),
        ("hostname", "a" * 300, "is no name"),
        ("hostname", "cp\x1b[2J.com", "is no name"),
        ("control_plane", "10.77.0.1", "is not host:port"),
        ("control_plane", "192.0.2.1:9092", "is outside the tunnel"),
        ("token", "", "there is no invite"),
        ("token", BAD_TOKEN, f"mistyped (invite {TOKEN_ID})"),
        ("token", TOKEN[:-9], "mistyped"),
        ("token", USED, "there is no invite"),
        ("token", "hunter2", "mistyped"),
        ("wallet", "", "earns nothing"),
        ("wallet", WALLET[:-2], "is not a Solana address"),
        ("wallet", WALLET[:-1] + "0", "is not a Solana address"),
        ("wallet", WALLET + "1", "is not a Solana address"),
        ("wg_endpoint", "cp.coledex.com", "is no name and port"),
        ("wg_endpoint", "cp.coledex.com:", "is no name and port"),
        ("wg_endpoint", "[fe80::1%eth0]:51820", "is no name and port"),
        ("wg_endpoint", "[fe80::1%x\nPostUp = id\n]:51820", "is no name and port"),
        ("wg_endpoint", "2001:db8::1", "is no name"),
        ("wg_public_key", "", "no WireGuard public key"),
        ("wg_public_key", CP_KEY[:-1], "no WireGuard public key"),
        ("wg_public_key", CP_KEY[:-2] + "h=", "no WireGuard public key"),  # not 32 bytes
        ("wg_address", "", "is no IPv4 address"),
        ("wg_address", "10.77.0", "is no IPv4 address"),
        ("wg_address", "10.77.0.42/24", "is no IPv4 address"),
        ("wg_address", "10.78.0.42", "outside the tunnel's 10.77.0.0/16"),
        ("wg_address", "192.168.1.5", "outside the tunnel's"),
        ("wg_address", "10.77.0.1", "is no host's address"),
        ("wg_address", "10.77.0.0", "is no host's address"),
        ("wg_address", "10.77.255.255", "is no host's address"),
    ],
)
def test_a_bad_answer_is_refused_with_its_reason(name: str, text: str, said: str) -> None:
    with pytest.raises(Error, match=re.escape(said)) as caught:
        check_of(name)(text)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()


def test_all_wrong_flags_are_named_at_once(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(BAD_TOKEN)
    argv = [f"--token-file={token}", "--wallet=x", "--wg-address=1.2.3.4", "--hostname=cp.com"]
    with pytest.raises(Error) as caught:
        check_flags(parse_arguments(argv))
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert re.findall(r"--[a-z-]+(?=: )", said) == ["--token-file", "--wallet", "--wg-address"]
    assert BAD_TOKEN not in said


@pytest.mark.parametrize("argv", [[TOKEN], [f"--token={TOKEN}"], ["--token", TOKEN[:9]]])
def test_an_invite_on_the_command_line_is_refused(argv: list[str]) -> None:
    with pytest.raises(Error) as caught:
        parse_arguments(argv)
    assert caught.value.exit_code == 2
    assert "--token-file" in str(caught.value)
    assert TOKEN[:9] not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--purge-packages"],
        ["--dry-run", "--check"],
        ["--release-key-sha256=abc"],
        ["--wal", WALLET],
        ["cp.coledex.com"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("url", "good"),
    [
        (URL, True),
        ("file:///root/dist/openinfra-agent-linux-x86_64", True),
        ("", True),
        ("http://cp.coledex.com/dist/openinfra-agent-linux-x86_64", False),
        ("https://user:pass@cp.coledex.com/dist/a", False),
        ("https://cp.coledex.com/dist/", False),
        ("file://cp/dist/a", False),
        ("ftp://cp/dist/a", False),
    ],
)
def test_the_agents_url_is_https_or_a_file(
    monkeypatch: pytest.MonkeyPatch, url: str, good: bool
) -> None:
    monkeypatch.setenv("OPENINFRA_AGENT_URL", url)
    if good:
        assert parse_arguments([]).url == url
    else:
        with pytest.raises(SystemExit):
            parse_arguments([])


# Files of settings.


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"", b"[A]\nX = 1\nY = 2\n"),
        (b"[A]\nX = 1\nY = 2\n", b"[A]\nX = 1\nY = 2\n"),
        (b"[a]\nx=1 # mine\ny =2\n", b"[a]\nx=1 # mine\ny =2\n"),
        (b"# top\n[A]\nX = 3\n\n[B]\nX = 4\n", b"# top\n[A]\nX = 1\nY = 2\n\n[B]\nX = 4\n"),
        (b"[A]\nX = 3\nX = 4\nZ = 5", b"[A]\nX = 1\nZ = 5\nY = 2\n"),
        (b"[B]\nX = 4\n", b"[B]\nX = 4\n\n[A]\nX = 1\nY = 2\n"),
        (b"[A]\r\nX = 1\r\nZ\x0b\xff\r\n", b"[A]\r\nX = 1\r\nZ\x0b\xff\r\nY = 2\n"),
        (b"[A]\n#X = 9\n", b"[A]\n#X = 9\nX = 1\nY = 2\n"),
    ],
)
def test_keys_are_set_and_all_else_stays(old: bytes, new: bytes) -> None:
    wanted = (("A", "X", "1"), ("A", "Y", "2"))
    assert render_values(old, wanted, " = ") == new
    assert render_values(new, wanted, " = ") == new


@given(st.binary(max_size=200))
def test_any_file_ends_up_with_the_values(old: bytes) -> None:
    wanted = (("", "KEY", "value"), ("", "OTHER", "1"))
    new = render_values(old, wanted, "=")
    assert render_values(new, wanted, "=") == new
    section_free = parse_values(new)
    assert (section_free["", "key"], section_free["", "other"]) == ("value", "1")


def test_the_env_file_is_what_the_agent_reads() -> None:
    text = render_env(b"", ANSWERS)
    assert agent.parse_env(text, "agent.env") == {
        "INVITE_TOKEN": TOKEN,
        "SOLANA_PAYOUT_PUBKEY": WALLET,
        "CONTROL_PLANE": "10.77.0.1:9092",
        "DATA_DIR": "/var/lib/openinfra",
    }
    assert text.count(b"\n") == 4
    mine = b"# mine\n\nSOLANA_PAYOUT_PUBKEY = 'x'\nDATA_DIR=\"/srv/oi\"\n"
    kept = render_env(mine, ANSWERS)
    assert kept.startswith(b"# mine\n\nSOLANA_PAYOUT_PUBKEY=" + WALLET.encode() + b'\nDATA_DIR="')
    assert agent.parse_env(kept, "agent.env")["DATA_DIR"] == "/srv/oi"


def test_the_tunnels_file_is_the_documented_one() -> None:
    assert (
        render_conf(b"", ANSWERS, PRIVATE).decode()
        == f"""[Interface]
Address = 10.77.0.42/32
PrivateKey = {PRIVATE}

[Peer]
PublicKey = {CP_KEY}
AllowedIPs = 10.77.0.1/32
PersistentKeepalive = 25
Endpoint = cp.coledex.com:51820
"""
    )


def test_what_a_person_added_to_the_tunnel_stays() -> None:
    old = render_conf(b"", ANSWERS, PRIVATE).replace(b"[Peer]", b"MTU = 1380\n[Peer]")
    old = old.replace(b"10.77.0.1/32", b"0.0.0.0/0").replace(b"= 25", b"= 15")
    new = render_conf(old, replace(ANSWERS, wg_endpoint="other:1"), PRIVATE)
    assert b"MTU = 1380\n" in new
    assert b"PersistentKeepalive = 15\n" in new
    assert b"AllowedIPs = 10.77.0.1/32\n" in new  # never more than the control plane
    assert b"Endpoint = other:1\n" in new


def test_what_is_on_disk_is_known() -> None:
    assert read_known(FRESH) == {question.name: "" for question in QUESTIONS}
    known = read_known(installed())
    assert known.pop("hostname") == "cp.coledex.com"
    assert all(getattr(ANSWERS, name) == value for name, value in known.items())


# Manifest and release.


def test_the_manifest_is_read_back() -> None:
    manifest = installed().manifest
    assert parse_manifest(render_manifest(manifest)) == manifest
    assert PRIVATE not in repr(manifest)


EMPTY = json.loads(render_manifest(Manifest()))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 5000,
        b'{"format": "1"}',
        b'{"format": 1}',
        json.dumps({**EMPTY, "files": {"/etc/passwd": []}}).encode(),
        json.dumps({**EMPTY, "files": {str(ENV): None}}).encode(),
        json.dumps({**EMPTY, "version": "new"}).encode(),
        json.dumps({**EMPTY, "packages": 1}).encode(),
    ],
)
def test_a_damaged_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(Error, match="is damaged") as caught:
        parse_manifest(raw)
    assert caught.value.exit_code == 3


def test_a_newer_manifest_is_refused() -> None:
    with pytest.raises(Error, match="newer installer"):
        parse_manifest(b'{"format": 2}')


GOOD = {
    "version": "0.1.0",
    "created_at": "2026-11-24T20:00:00Z",
    "files": {"a": {"size_bytes": 5, "sha256": "0" * 64}},
}


def test_a_release_is_read() -> None:
    found = parse_release(json.dumps(GOOD).encode(), "a")
    assert found == ("0.1.0", 1795550400, 5, "0" * 64)
    split = {**GOOD, "created_at": "2026-11-24T20:00:00.25Z"}
    assert parse_release(json.dumps(split).encode(), "a") == found


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "1.0-beta"},
        {"version": 1},
        {"version": ""},
        {"created_at": "yesterday"},
        {"created_at": None},
        {"files": {}},
        {"files": {"b": {}}},
        {"files": {"a": {"size_bytes": "5", "sha256": "0" * 64}}},
        {"files": {"a": {"size_bytes": True, "sha256": "0" * 64}}},
        {"files": {"a": {"size_bytes": 5, "sha256": "0" * 63}}},
        {"files": {"a": {"size_bytes": 5, "sha256": 5}}},
    ],
)
def test_a_release_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Error, match="does not describe a"):
        parse_release(json.dumps({**GOOD, **wrong}).encode(), "a")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000])
def test_a_release_that_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(Error, match="does not describe a"):
        parse_release(raw, "a")


@pytest.mark.parametrize("size_bytes", [0, -1, (64 << 20) + 1])
def test_a_size_out_of_bounds_is_refused(size_bytes: int) -> None:
    files = {"a": {"size_bytes": size_bytes, "sha256": "0" * 64}}
    with pytest.raises(Error, match="bytes by release"):
        parse_release(json.dumps({**GOOD, "files": files}).encode(), "a")


SHA = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of b"key"


@pytest.mark.parametrize(
    ("pinned", "offered", "sha256", "good"),
    [
        (b"", b"key", "", True),
        (b"", b"key", SHA, True),
        (b"", b"other", SHA, False),
        (b"key", b"key", "", True),
        (b"key", b"key", SHA, True),
        (b"key", b"other", "", False),
        (b"other", b"key", SHA, True),  # the person says that this is the new one
        (b"key", b"other", SHA, False),
    ],
)
def test_the_first_key_is_kept(pinned: bytes, offered: bytes, sha256: str, good: bool) -> None:
    if good:
        assert decide_key(pinned, offered, sha256) == offered
    else:
        with pytest.raises(Error, match=r"release\.pub") as caught:
            decide_key(pinned, offered, sha256)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        ("", "0.1.0", True),
        ("0.1.0", "0.1.0", True),
        ("0.9.0", "0.10.0", True),
        ("0.10.0", "0.9.0", False),
        ("1.0", "0.9.9", False),
        ("0.1.0", "0.1", False),
    ],
)
def test_an_older_release_is_refused(old: str, new: str, good: bool) -> None:
    release = replace(RELEASE, version=new)
    check_version(Manifest(version=old), release, True)
    if good:
        check_version(Manifest(version=old), release, False)
    else:
        with pytest.raises(Error, match="--allow-downgrade") as caught:
            check_version(Manifest(version=old), release, False)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(("off_s", "good"), [(0, True), (-300, True), (301, False), (-9e8, False)])
def test_a_wrong_clock_is_refused(off_s: float, good: bool) -> None:
    if good:
        check_clock(1.8e9, 1.8e9 + off_s, "that of the control plane")
    else:
        with pytest.raises(Error, match=r"2027-01-15 08:00 UTC.*timedatectl set-ntp true"):
            check_clock(1.8e9, 1.8e9 + off_s, "that of the control plane")


def test_units_come_out_of_the_artifact() -> None:
    assert read_units(RELEASE.artifact) == {n: t.encode() for n, t in UNIT_TEXTS.items()}
    for wrong in (b"", b"#!/bin/sh\n", render_artifact("1", {}), RELEASE.artifact[:-40]):
        with pytest.raises(Error, match="no zip with its units"):
            read_units(wrong)


# Preflight.

GONE = replace(DATA, mode=-1, is_mount=False, is_encrypted=False, is_expected=False)
PLAIN = replace(DATA, is_encrypted=False, is_expected=False)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"has_systemd": False}, "systemd does not run here"),
        ({"arch": "armv7l"}, "no agent for armv7l, only for x86_64 and aarch64"),
        ({"has_wireguard": False}, "the kernel has no WireGuard"),
        ({"missing": ("openssl", "nftables"), "has_apt": False}, "not installed: openssl nftables"),
        ({"data": replace(DATA, is_mount=False)}, "is not mounted: unlock its disk"),
        ({"data": GONE}, "nothing is mounted at /var/lib/openinfra: make its encrypted disk"),
        ({"data": PLAIN}, "is not on an encrypted disk"),
        ({"data": replace(DATA, mode=0o755)}, "chmod 0700 /var/lib/openinfra"),
        ({"data": replace(DATA, uid=1000)}, "chown root /var/lib/openinfra"),
        ({"uses": ("10.77.3.1 on eth0",)}, "10.77.0.0/16 is the tunnel's, and here it is in use"),
        ({"free_bytes": {"/usr": 1 << 20}}, "the disk of /usr is full: 1 MiB are free, 64"),
        (
            {"free_bytes": {"/usr": 1 << 27}, "missing": ("openssl",)},
            "128 MiB are free, 768 are needed",
        ),
    ],
)
def test_a_machine_is_refused(wrong: dict[str, Any], said: str) -> None:
    problems = list(list_problems(replace(FRESH, **wrong), False))
    assert len(problems) == 1
    assert said in problems[0]


def test_all_problems_are_named_at_once() -> None:
    facts = replace(FRESH, arch="sparc", has_wireguard=False, data=GONE, uses=("a", "b"))
    assert len(list(list_problems(facts, False))) == 5


def test_a_good_machine_has_no_problem() -> None:
    assert list(list_problems(FRESH, False)) == []
    assert list(list_problems(replace(FRESH, data=PLAIN), True)) == []
    assert len(list(list_problems(replace(FRESH, data=GONE), True))) == 1


@pytest.mark.parametrize("path", [WG_CONF, WG_KEY, ENV, BINARY, UNIT_DIR / AGENT, DROP_IN])
def test_what_others_made_is_refused(path: Path) -> None:
    facts = replace(FRESH, files={path: Found(b"theirs", 0o644, 0)})
    assert list(list_foreign(facts)) == [
        f"{path} was not made by this installer: move it away (mv {path} {path}.old)"
    ]
    assert list(list_foreign(replace(facts, manifest=Manifest(files={str(path): ()})))) == []


def test_an_interface_or_table_of_others_is_refused() -> None:
    found = list(list_foreign(replace(FRESH, has_link=True, has_table=True)))
    assert [each.split(": ")[1] for each in found] == [
        "ip link delete dev openinfra",
        "nft delete table inet openinfra",
    ]
    assert list(list_foreign(installed())) == []


def test_a_tunnel_that_cannot_be_kept_is_refused() -> None:
    facts = installed()
    conf = facts.files[WG_CONF].content
    two = changed(facts, WG_CONF, conf + b"[Peer]\nPublicKey = x\n")
    assert "has a second [Peer]" in next(list_foreign(two))
    other = changed(facts, WG_KEY, f"{PUBLIC}\n".encode())
    assert "hold two different keys" in next(list_foreign(other))


# Plan.

FILES = ["release.pub", "openinfra-agent", "openinfra.key", "openinfra.pub", "openinfra.conf"]
FILES += ["agent.env", *UNITS, "containerd.toml", "engine.json"]
IMAGE, NEW_IMAGE = "/var/lib/openinfra/engine.img", "/var/lib/openinfra/.engine.img.new"
USER = [
    "useradd --system --user-group --no-create-home --shell=/bin/false --home-dir=/nonexistent "
    + ENGINE_USER,
    "usermod --add-subuids=100000-165535 --add-subgids=100000-165535 openinfra-engine",
]
MAKE_IMAGE = [
    f"install --mode=0600 /dev/null {NEW_IMAGE}",
    f"fallocate --length={16 << 30} {NEW_IMAGE}",  # of 18 GiB that are free on a disk of 20
    f"mkfs.ext4 -q -F -m0 -E nodiscard -L openinfra-engine {NEW_IMAGE}",
    f"mv --no-target-directory -- {NEW_IMAGE} {IMAGE}",
    f"sync --file-system {IMAGE}",
]
ENABLE = [
    f"--no-reload reenable {GUARD} {WG} {TIMER} {WATCH} {DISK} {ENGINE} {AGENT}",
    "daemon-reload",
]
START = [
    f"restart {WG}",
    f"restart {TIMER} {WATCH}",
    f"start {ENGINE}",
    f"restart {AGENT}",
]
NOTED = "install.json"


def test_a_fresh_machine() -> None:
    steps = plan(FRESH, ANSWERS, RELEASE, KEYS)
    assert words(steps) == [NOTED, *FILES, *USER, *MAKE_IMAGE, *ENABLE, *START, NOTED]
    modes = {step.path: step.mode for step in steps if isinstance(step, WriteFile)}
    secret = {path for path, mode in modes.items() if mode == 0o600}
    assert secret == {WG_KEY, WG_CONF, ENV}
    assert {path for path, mode in modes.items() if mode == 0o755} == {BINARY}
    absent = replace(FRESH, absent=(KEPT, WG_DIR, UNIT_DIR))
    first, second = words(plan(absent, ANSWERS, RELEASE, KEYS))[:2]
    assert first == "install --directory --mode=0755 /etc/openinfra/installer"
    assert second == "install --directory --mode=0700 /etc/wireguard"


def test_a_fresh_invite_puts_the_identity_aside() -> None:
    """While no agent runs, and before the agent starts with the invite."""
    old = replace(ANSWERS, token=USED)
    there = replace(installed(old), data=replace(DATA, is_registered=True))
    steps = words(plan(there, replace(ANSWERS, is_new_host=True), RELEASE, KEYS))
    identity = "/var/lib/openinfra/identity.json"
    assert steps == [
        NOTED,
        f"stop {AGENT}",
        f"mv --no-target-directory --backup=numbered -- {identity} {identity}.replaced",
        "agent.env",
        f"restart {AGENT}",
        NOTED,
    ]
    lost = replace(there, data=DATA)
    again = words(plan(lost, replace(ANSWERS, is_new_host=True), RELEASE, KEYS))
    # The same command again, as after a cut: this very invite made the identity that is there.
    token = install_agent.parse_token(ANSWERS.token)
    assert token
    done = replace(there, data=replace(there.data, invite_id=token.id))
    repeated = words(plan(done, replace(ANSWERS, is_new_host=True), RELEASE, KEYS))
    assert not [step for step in repeated if "identity.json" in step or "stop" in step.split()]
    assert again == [NOTED, "agent.env", f"restart {AGENT}", NOTED]


def test_a_new_wireguard_key() -> None:
    """Tunnel and agent get it; a run that was killed between its files goes on."""
    there, new = installed(), (CP_KEY, PUBLIC[::-1][1:] + "=")
    steps = plan(there, ANSWERS, RELEASE, new)
    files = ["openinfra.key", "openinfra.pub", "openinfra.conf"]
    restarts = [f"restart {WG}", f"restart {AGENT}"]
    assert words(steps) == [NOTED, *files, *restarts, NOTED]
    cut = play(there, steps[:2])
    assert list(list_foreign(cut, new_key=True)) == []
    assert "two different keys" in "".join(list_foreign(cut))


def test_no_secret_is_shown() -> None:
    shown = repr(plan(FRESH, ANSWERS, RELEASE, KEYS)) + repr(ANSWERS) + repr(installed())
    shown += "\n".join(map(str, plan(FRESH, ANSWERS, RELEASE, KEYS)))
    assert TOKEN not in shown
    assert PRIVATE not in shown


@pytest.mark.parametrize("answers", [ANSWERS, replace(ANSWERS, ca=b"PEM", allow_unencrypted=True)])
def test_an_installed_machine_is_left_alone(answers: Answers) -> None:
    assert plan(installed(answers), answers, RELEASE, KEYS) == []


def test_each_file_is_listed_before_it_is_there() -> None:
    answers = replace(ANSWERS, ca=b"PEM", allow_unencrypted=True)
    listed: set[str] = set()
    for step in plan(FRESH, answers, RELEASE, KEYS):
        if isinstance(step, WriteFile) and step.path == MANIFEST:
            listed = set(parse_manifest(step.content).files)
        elif isinstance(step, WriteFile):
            assert str(step.path) in listed


@pytest.mark.parametrize("release", [RELEASE, NEWER])
def test_a_run_that_is_cut_anywhere_goes_on(release: Release) -> None:
    """After each step: nothing counts as foreign, and the rest of the work is still planned."""
    before = FRESH if release is RELEASE else installed()
    steps = plan(before, ANSWERS, release, KEYS)
    for cut in range(len(steps) + 1):
        facts = play(before, steps[:cut])
        if cut == 0:
            facts = before
        assert list(list_foreign(replace(facts, has_link=False, has_table=False))) == [] or cut == 0
        again = plan(facts, ANSWERS, release, KEYS)
        done, rest = words(steps[:cut]), words(again)
        for command in words(steps):
            if command.startswith(("restart", "start")) and cut < len(steps) and cut > 0:
                assert command in rest, (cut, done)
        assert list_kept(facts) == []
        end = replace(play(facts, again), units=RUNNING, has_link=True, has_table=True)
        assert plan(end, ANSWERS, release, KEYS) == []
        assert end.files == play(before, steps).files


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"units": {**RUNNING, AGENT: Unit("failed", "enabled")}}, [f"restart {AGENT}"]),
        (
            {"units": {**RUNNING, AGENT: Unit("active", "disabled")}},
            [f"--no-reload reenable {AGENT}", "daemon-reload", f"start {GUARD}"],
        ),
        ({"units": {**RUNNING, TIMER: Unit("inactive", "enabled")}}, [f"restart {TIMER} {WATCH}"]),
        ({"units": {**RUNNING, WATCH: Unit("failed", "enabled")}}, [f"restart {TIMER} {WATCH}"]),
        ({"has_table": False}, [f"start {GUARD}"]),
        ({"has_link": False}, [f"restart {WG}"]),
        (
            {"units": {**RUNNING, WG: Unit("inactive", "enabled")}},
            ["ip link delete dev openinfra", f"restart {WG}"],
        ),
        (
            {"units": {**RUNNING, WG: Unit("failed", "enabled")}, "has_link": False},
            [f"restart {WG}"],
        ),
    ],
)
def test_what_is_down_is_started_and_nothing_else(change: dict[str, Any], steps: list[str]) -> None:
    found = words(plan(replace(installed(), **change), ANSWERS, RELEASE, KEYS))
    assert found == [NOTED, *steps, NOTED]


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        (RELEASE_PUB, ["release.pub"]),
        (
            BINARY,
            [
                "openinfra-agent",
                f"stop {WATCH}",
                f"start {GUARD}",
                f"restart {TIMER} {WATCH}",
                f"restart {AGENT}",
            ],
        ),
        (WG_PUB, ["openinfra.pub", f"restart {AGENT}"]),
        (
            UNIT_DIR / AGENT,
            [
                AGENT,
                f"--no-reload reenable {AGENT}",
                "daemon-reload",
                f"start {GUARD}",
                f"restart {AGENT}",
            ],
        ),
        (
            UNIT_DIR / GUARD,
            [
                GUARD,
                f"--no-reload reenable {GUARD}",
                "daemon-reload",
                f"start {GUARD}",
                f"restart {TIMER} {WATCH}",
            ],
        ),
    ],
)
def test_a_changed_file_is_mended(path: Path, steps: list[str]) -> None:
    facts = changed(installed(), path, b"by hand\n")
    found = plan(facts, ANSWERS, RELEASE, KEYS)
    assert [word for word in words(found) if word != NOTED] == steps
    mended = next(step for step in found if isinstance(step, WriteFile) and step.path == path)
    assert mended.why.endswith("; CHANGED BY HAND")
    assert list_kept(facts) == [path]


def test_a_mode_is_mended() -> None:
    facts = changed(installed(), ENV, installed().files[ENV].content, 0o644)
    assert "agent.env" in words(plan(facts, ANSWERS, RELEASE, KEYS))
    facts = replace(facts, files={**installed().files, WG_KEY: Found(b"", -1, 0)})
    assert "openinfra.key" in words(plan(facts, ANSWERS, RELEASE, KEYS))


@pytest.mark.parametrize(
    ("answers", "steps"),
    [
        (replace(ANSWERS, wallet=OTHER_WALLET), ["agent.env", f"restart {AGENT}"]),
        (replace(ANSWERS, token=USED), ["agent.env", f"restart {AGENT}"]),
        (
            replace(ANSWERS, wg_address="10.77.0.43"),
            ["openinfra.conf", f"restart {WG}"],
        ),
        (
            replace(ANSWERS, allow_unencrypted=True),
            [
                "install --directory --mode=0755 /etc/systemd/system/openinfra-agent.service.d",
                "allow-unencrypted.conf",
                "daemon-reload",
                f"start {GUARD}",
                f"restart {AGENT}",
            ],
        ),
        (replace(ANSWERS, ca=b"PEM"), ["ca.pem", f"restart {ENGINE}"]),
        (replace(ANSWERS, url="file:///x/openinfra-agent-linux-x86_64"), []),
    ],
)
def test_a_new_answer_changes_what_it_must(answers: Answers, steps: list[str]) -> None:
    found = words(plan(installed(), answers, RELEASE, KEYS))
    assert [word for word in found if word != NOTED] == steps
    assert found[-1] == NOTED


def test_the_drop_in_repeats_the_units_command() -> None:
    content = installed(replace(ANSWERS, allow_unencrypted=True)).files[DROP_IN].content
    start = "ExecStart=/usr/local/bin/openinfra-agent run --env-file /etc/openinfra/agent.env"
    assert start in UNIT_TEXTS[AGENT]
    assert content.decode() == f"[Service]\nExecStart=\n{start} --allow-unencrypted\n"


def test_an_upgrade_restarts_the_agent() -> None:
    steps = plan(installed(), ANSWERS, NEWER, KEYS)
    assert words(steps) == [
        NOTED,
        "openinfra-agent",
        f"stop {WATCH}",
        f"start {GUARD}",
        f"restart {TIMER} {WATCH}",
        f"restart {AGENT}",
        NOTED,
    ]
    begun, final = (parse_manifest(steps[at].content) for at in (0, -1))  # type: ignore[union-attr]
    assert (begun.version, final.version) == ("0.2.0", "0.2.0")
    assert len(begun.files[str(BINARY)]) == 2
    assert begun.pending == (GUARD, WATCH, AGENT)
    assert (len(final.files[str(BINARY)]), final.pending) == (1, ())


def test_a_run_that_was_cut_links_the_units_again() -> None:
    """Its new unit is on disk, and still linked as the one before it."""
    facts = installed()
    cut = replace(facts, manifest=replace(facts.manifest, pending=(AGENT,)))
    assert words(plan(cut, ANSWERS, RELEASE, KEYS)) == [
        NOTED,
        *ENABLE,
        f"start {GUARD}",
        f"restart {AGENT}",
        NOTED,
    ]


def test_packages_are_noted_before_they_are_installed() -> None:
    facts = replace(FRESH, missing=("nftables",))
    steps = plan_packages(facts, ["nftables", "libnftables1"])
    assert words(steps)[0] == NOTED
    assert words(steps)[1].startswith("apt-get install --yes --no-install-recommends --no-remove ")
    assert words(steps)[1].endswith(" nftables")
    noted = play(facts, steps).manifest
    assert noted.packages == ("nftables", "libnftables1")
    end = play(replace(facts, manifest=noted), plan(replace(facts, manifest=noted), *GIVEN))
    assert end.manifest.packages == noted.packages


GIVEN = (ANSWERS, RELEASE, KEYS)


# The container engine.


def test_subordinate_ids_are_no_users() -> None:
    found = decide_engine_user(True, "anna:100000:65536\n", "", [0, 1000, 165_536, 4_000_000_000])
    assert found.first_free_id == 231_072
    assert decide_engine_user(True, "", "", [99_999, 165_536]).first_free_id == 100_000


@pytest.mark.parametrize(
    ("subuid", "subgid", "has_ids", "first"),
    [
        ("", "", False, 100_000),
        ("anna:100000:65536\n", "anna:100000:65536\n", False, 165_536),
        ("anna:100000:65536\n", "bert:165536:65536\n", False, 231_072),
        ("anna:165000:1\nbert:99999:2\n", "", False, 165_536),
        ("anna:100000:4000000000\n", "", False, 4_000_155_296),
        ("openinfra-engine:100000:65536", "openinfra-engine:100000:65536", True, 165_536),
        ("openinfra-engine:100000:65536", "", False, 165_536),
        ("openinfra-engine:100000:65535", "openinfra-engine:100000:65536", False, 165_536),
        ("words\nanna:x:1\n:100000:1\n", "", False, 100_000),
    ],
)
def test_subordinate_ids_are_nobody_elses(
    subuid: str, subgid: str, has_ids: bool, first: int
) -> None:
    assert decide_engine_user(True, subuid, subgid) == EngineUser(True, has_ids, first)
    assert not decide_engine_user(False, subuid, subgid).has_ids


@pytest.mark.parametrize(
    ("size", "free", "image"),
    [
        (20 << 30, 18 << 30, 16 << 30),
        (2 << 30, (2 << 30) - 1, (2 << 30) - (256 << 20) - (1 << 20)),
        (1 << 40, 1 << 40, ((1 << 40) * 9 // 10) >> 20 << 20),
        (1 << 30, 200 << 20, 0),
        (0, 0, 0),
    ],
)
def test_the_identity_keeps_its_share_of_the_disk(size: int, free: int, image: int) -> None:
    assert decide_image_bytes(replace(DATA, size_bytes=size, free_bytes=free)) == image


def test_a_disk_without_room_is_refused_until_the_image_is_there() -> None:
    facts = replace(FRESH, data=replace(DATA, size_bytes=1 << 30, free_bytes=700 << 20))
    assert list(list_problems(facts, False)) == [
        "/var/lib/openinfra has no room for workloads: 700 MiB are free, 768 are needed"
    ]
    there = {Path(IMAGE): Found(b"", -1, 0)}
    assert list(list_problems(replace(facts, files=there), False)) == []


def test_a_half_made_image_is_made_again_and_a_whole_one_never() -> None:
    facts = replace(installed(), files={**installed().files})
    del facts.files[Path(IMAGE)]  # type: ignore[attr-defined]
    assert words(plan(facts, ANSWERS, RELEASE, KEYS)) == [*MAKE_IMAGE, NOTED]
    assert plan(installed(), ANSWERS, RELEASE, KEYS) == []


def test_the_docker_of_debian_is_kept_from_starting_where_there_was_none() -> None:
    steps = plan_packages(
        replace(FRESH, missing=("docker.io",)), ["containerd", "docker.io", "runc"]
    )
    names = "containerd.service docker.service docker.socket"
    assert words(steps)[:2] == [NOTED, f"mask --runtime {names}"]
    assert "docker.io" in words(steps)[2]
    noted = replace(play(FRESH, steps), others=Others(dict.fromkeys(names.split(), True)))
    after = words(plan(noted, ANSWERS, RELEASE, KEYS))
    assert after[after.index(USER[0]) - 2 :][:2] == (
        [f"unmask --runtime {names}", f"disable --now {names}"]
    )
    assert play(noted, plan(noted, ANSWERS, RELEASE, KEYS)).manifest.pending == ()


def test_services_stay_owed_until_they_are_disabled() -> None:
    """Also by a run that is cut and one that removes all: at a boot nothing masks them."""
    names = ("containerd.service", "docker.service", "docker.socket")
    there = Others(dict.fromkeys(names, True))
    cut = replace(FRESH, missing=("docker.io",), manifest=Manifest(pending=names), others=there)
    steps = plan_packages(cut, ["docker.io"])  # containerd is there by now
    assert words(steps)[1] == f"mask --runtime {' '.join(names)}"
    noted = play(cut, steps)
    begun = next(
        parse_manifest(step.content)
        for step in plan(noted, ANSWERS, RELEASE, KEYS)
        if isinstance(step, WriteFile) and step.path == MANIFEST
    )
    assert set(names) < set(begun.pending)
    for facts in (noted, replace(noted, manifest=begun)):
        assert words(plan_removal(facts))[:2] == [
            f"unmask --runtime {' '.join(names)}",
            f"disable --now {' '.join(names)}",
        ]
    masked = replace(noted, others=Others({}))  # the package was never unpacked
    assert words(plan_removal(masked))[0] == f"unmask --runtime {' '.join(names)}"
    assert not any("disable" in word for word in words(plan_removal(masked)))


@pytest.mark.parametrize(
    ("others", "used"),
    [
        (Others({}), []),
        (Others({"docker.service": False, "containerd.service": False}), []),
        (Others({"docker.service": True}), ["docker.io"]),
        (Others({"docker.service": False, "docker.socket": True}), ["docker.io"]),
        (Others({"containerd.service": True}), ["containerd"]),
        (Others({"docker.service": False}, frozenset({"docker.io"})), ["docker.io"]),
        (Others({}, frozenset({"containerd"})), ["containerd"]),
    ],
)
def test_a_docker_of_ours_that_the_provider_uses_by_now_stays(
    others: Others, used: list[str]
) -> None:
    facts = installed()
    manifest = replace(facts.manifest, packages=("containerd", "docker.io", "runc"))
    facts = replace(facts, manifest=manifest, others=others)
    assert list_used(facts) == used
    assert ("key.json" in words(plan_removal(facts))) == ("docker.io" not in used)


@pytest.mark.parametrize("is_purge", [False, True])
@pytest.mark.parametrize("others", [(), ("base-files",)])
def test_a_docker_in_use_is_neither_purged_nor_named_to_be(
    others: tuple[str, ...],
    is_purge: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(install_agent, "run", lambda argv, **_: ran.append(" ".join(argv)))
    facts = replace(installed(), others=Others({"docker.service": True}))
    facts = replace(facts, manifest=replace(facts.manifest, packages=("docker.io", *others)))
    leave_packages(facts, is_purge)
    said = capsys.readouterr().err
    assert "docker.io and what it needs stay" in said
    assert ("dpkg --purge base-files\n" in said) == (bool(others) and not is_purge)
    # With nothing to purge there is no purge: dpkg-query of no name shows all packages.
    assert [each.split()[:2] for each in ran] == [["dpkg", "--purge"]] * (is_purge and bool(others))


def test_what_is_owed_is_not_used() -> None:
    names = ("docker.service", "docker.socket")
    facts = replace(
        FRESH, manifest=Manifest(pending=names), others=Others(dict.fromkeys(names, True))
    )
    assert list_used(facts) == []


@pytest.mark.parametrize(
    ("said", "new"),
    [
        ("Inst runc (1.1 Debian)\nInst docker.io (20.10 Debian)\n", ["runc", "docker.io"]),
        ("", ["docker.io"]),
        ("Remv containerd.io [1.7]\nInst containerd (1.6 Debian)\n", None),
        ("Inst docker.io (20.10 Debian)\nRemv podman-docker [4.3]\n", None),
    ],
)
def test_no_package_is_removed_for_ours(said: str, new: list[str] | None) -> None:
    if new is not None:
        assert decide_new_packages(["docker.io"], said) == new
        return
    with pytest.raises(
        Error, match=r"apt-get would remove (containerd.io|podman-docker);"
    ) as error:
        decide_new_packages(["docker.io"], said)
    assert error.value.exit_code == 3


def test_a_user_of_the_same_name_is_not_taken() -> None:
    user = EngineUser(True, True, 165_536)
    assert list(list_foreign(replace(FRESH, engine_user=user))) == [
        f"a user {ENGINE_USER} is there that is not ours: usermod --login NAME {ENGINE_USER}"
    ]
    assert list(list_foreign(replace(installed(), engine_user=user))) == []


def test_the_docker_that_was_there_is_left_alone() -> None:
    """Also the containerd that something else needs, of Debian's package or not."""
    steps = plan_packages(replace(FRESH, missing=("docker.io",)), ["docker.io"])
    assert "mask --runtime docker.service docker.socket" in words(steps)
    own = replace(FRESH, missing=("docker.io",), others=Others({"containerd.service": True}))
    steps = plan_packages(own, ["containerd", "docker.io"])
    assert "mask --runtime docker.service docker.socket" in words(steps)
    assert "containerd.service" not in play(own, steps).manifest.pending
    own = replace(own, others=Others({"docker.service": False, "docker.socket": False}))
    steps = plan_packages(own, ["docker.io"])
    assert [word for word in words(steps) if "mask" in word] == []
    steps = plan_packages(replace(FRESH, missing=("openssl",)), ["openssl"])
    assert not any(
        "docker" in word for word in [*words(steps), *words(plan(FRESH, ANSWERS, RELEASE, KEYS))]
    )


def test_what_every_dockerd_makes_goes_where_it_was_not() -> None:
    there = replace(FRESH, others=Others({}, has_key=True))
    facts = play(there, plan(there, ANSWERS, RELEASE, KEYS))
    assert not any("docker" in word or word == "key.json" for word in words(plan_removal(facts)))
    facts = installed()
    # The engine has made it by the second run.
    facts = replace(facts, others=Others({}, has_key=True))
    assert plan(facts, ANSWERS, RELEASE, KEYS) == []
    said = words(plan_removal(facts))
    find = "find /run -maxdepth 2 -path /run/docker* -type d -empty -delete"
    assert said.index("key.json") < said.index(find)


# Uninstall.


def test_the_image_on_a_locked_disk_stays_in_the_manifest() -> None:
    locked = replace(installed(), data=replace(DATA, is_mount=False), absent=())
    left = play(locked, [*plan_removal(locked), *plan_forgetting(locked)])
    assert left.manifest.files == {IMAGE: ()}
    assert [line.partition(":")[0] for line in list_left(locked, FRESH)] == [IMAGE]
    again = replace(FRESH, manifest=left.manifest, files={ENGINE_IMAGE: Found(b"", -1, 0)})
    assert list(list_foreign(again)) == []
    steps = [*plan_removal(again), *plan_forgetting(again)]
    end = play(again, steps)
    assert (end.files, end.manifest) == ({}, Manifest())


def test_a_user_that_cannot_be_removed_is_named() -> None:
    facts = replace(installed(), engine_user=EngineUser(True, True, 165_536))
    steps = [step for step in plan_removal(facts) if isinstance(step, Run)]
    assert [step.may_fail for step in steps if step.argv[0] == "userdel"] == [True]
    left = list(list_left(facts, replace(FRESH, engine_user=facts.engine_user)))
    assert left == [f"the user {ENGINE_USER}; to remove it: userdel {ENGINE_USER}"]


def test_all_that_is_ours_is_removed() -> None:
    facts = replace(installed(replace(ANSWERS, ca=b"PEM", allow_unencrypted=True)), absent=())
    steps = [*plan_removal(facts), *plan_forgetting(facts)]
    # The agent before the workloads, or it would start them; these before the engine, which clears.
    assert words(steps)[:6] == [
        f"stop {TIMER}",
        f"stop {AGENT}",
        f"stop {WORKLOADS}",
        f"stop {WATCH} {ENGINE} {CONTAINERD} {DISK} {WG} {GUARD} {STRAYS}",
        f"disable {AGENT} {GUARD} {TIMER} {WATCH} {ENGINE} {DISK} {WG}",
        "nft delete table inet openinfra",
    ]
    assert "userdel openinfra-engine" in words(steps)
    removed = {step.path for step in steps if isinstance(step, Remove)}
    assert removed == {*facts.files, MANIFEST, DOCKER_KEY}
    assert CA in removed
    assert words(steps)[-5:] == [
        NOTED,
        "rmdir --ignore-fail-on-non-empty /etc/systemd/system/openinfra-agent.service.d",
        "rmdir --ignore-fail-on-non-empty /etc/openinfra/installer",
        "rmdir --ignore-fail-on-non-empty /etc/openinfra",
        "rmdir --ignore-fail-on-non-empty /var/cache/openinfra",
    ]
    assert play(facts, steps).files == {}
    assert not any("luks" in word for word in words(steps))


def test_a_file_that_was_changed_stays_and_is_still_listed() -> None:
    path = UNIT_DIR / AGENT
    facts = changed(installed(), path, b"by hand\n")
    after = play(facts, [*plan_removal(facts), *plan_forgetting(facts)])
    left = replace(after, has_link=False, has_table=False)
    assert list(list_left(facts, left)) == [f"{path}: somebody changed it; to remove it: rm {path}"]
    assert len(list(list_left(facts, after))) == 3  # the interface and the table, if they stay
    assert list(after.files) == [path]
    assert list(after.manifest.files) == [str(path)]
    assert list_kept(after) == [path]
    assert f"stop {AGENT}" in words(plan_removal(facts))[1]


def test_nothing_of_others_is_removed() -> None:
    """What a killed first run had listed and not yet made may be somebody else's by now."""
    left = (("ip", "link", "delete", "dev", "oi-theirs"),)
    facts = replace(FRESH, has_link=True, has_table=True, leftovers=left)
    facts = replace(facts, manifest=Manifest(packages=("nftables",)))
    assert not any("oi-theirs" in word for word in words(plan_removal(facts)))
    steps = [*plan_removal(facts), *plan_forgetting(facts)]
    assert list(list_left(facts, facts)) == []
    assert [word for word in words(steps) if "openinfra" in word] == [
        "rm -rf -- /run/openinfra /run/openinfra-engine",
        "rmdir --ignore-fail-on-non-empty /etc/openinfra/installer",
        "rmdir --ignore-fail-on-non-empty /etc/openinfra",
        "rmdir --ignore-fail-on-non-empty /var/cache/openinfra",
    ]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"units": {**RUNNING, WG: Unit("inactive", "enabled")}}, "ip link delete dev openinfra"),
        (
            {"units": {**RUNNING, AGENT: Unit("activating", "")}},  # its file is gone
            f"disable {GUARD} {TIMER} {WATCH} {ENGINE} {DISK} {WG}",
        ),
        ({"dangling": (UNIT_DIR / "multi-user.target.wants" / AGENT,)}, AGENT),
    ],
)
def test_half_an_installation_is_removed(change: dict[str, Any], word: str) -> None:
    assert word in words(plan_removal(replace(installed(), **change)))


@pytest.mark.parametrize("cut", range(29))
def test_an_uninstall_that_is_cut_anywhere_goes_on(cut: int) -> None:
    steps = [*plan_removal(installed()), *plan_forgetting(installed())]
    facts = play(installed(), steps[:cut])
    assert play(facts, [*plan_removal(facts), *plan_forgetting(facts)]).files == {}


def test_the_operator_gets_the_exact_lines() -> None:
    said = render_end(ANSWERS, PUBLIC)
    assert f"\n    {PUBLIC}\n" in said
    assert f"\n    sudo wg set wg0 peer {PUBLIC} allowed-ips 10.77.0.42/32\n" in said
    assert "\n    sudo wg-quick save wg0\n" in said


def test_every_path_is_in_the_manual() -> None:
    manual = (install_agent.__doc__ or "").replace("and openinfra.", "/etc/wireguard/openinfra.")
    manual = manual.replace("0600, openinfra.", "0600, /etc/wireguard/openinfra.")
    for path in (MANIFEST, RELEASE_PUB, CA, ENV, WG_KEY, WG_PUB, WG_CONF, BINARY):
        assert str(path) in manual, path


def test_of_a_ca_file_the_certificates_are_taken() -> None:
    """It is copied to where everybody may read; a key that lies in it stays away."""
    one = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
    key = b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----"
    assert parse_ca(b"\n".join([key, one, b"words", one, key])) == one + b"\n" + one + b"\n"
    assert parse_ca(parse_ca(one)) == one + b"\n"
    for bad in (b"", key, b"-----BEGIN CERTIFICATE-----\nMIIB"):
        with pytest.raises(Error, match="holds no certificate"):
            parse_ca(bad)


@pytest.mark.parametrize(
    "url", ["http://x/y", "x", "https://user@x/y", "https://x/y z", "https://x/"]
)
def test_a_manifest_with_another_url_is_damaged(url: str) -> None:
    raw = render_manifest(Manifest(url=URL)).replace(URL.encode(), url.encode())
    with pytest.raises(Error, match="is damaged"):
        parse_manifest(raw)
