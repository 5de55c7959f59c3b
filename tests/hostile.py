"""What the tests with hostile clients share: jobs in a namespace, honest hosts, what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cp_server
from proto import openinfra_pb2 as pb
from tests import hostile_tool as tool
from tests.harness import (
    BOOT_ID,
    ROOT,
    WALLET,
    WG_KEY,
    ControlPlane,
    Netns,
    facts,
    new_wg_key,
    read_seed,
    wait_for,
)

ACTOR = cp_server.Actor("cli:tester")
CROWD = "10.77.66.66"  # the address that all hostile calls come from
_MACHINE = ("lab", "x86_64", "6.1.0", "0.1.0", 4, 8 << 30, 100 << 30, True)
FACTS = cp_server.Facts(*_MACHINE, "20.10.24", "", 3000, 6 << 30, True)


class Job:
    """One process of hostile_tool.py in a namespace."""

    def __init__(self, netns: Netns, job: str, **order: Any) -> None:
        argv = netns.argv(["setpriv", "--pdeathsig=KILL", "--", sys.executable, "-W", "error"])
        argv += [str(ROOT / "tests" / "hostile_tool.py"), json.dumps({"job": job, **order})]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `kill` closes it
        self.child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=self._said)

    def _lines(self) -> list[str]:
        self._said.seek(0)
        return [line for line in self._said if line.endswith("\n")]

    def begin(self) -> Job:
        """Wait until it has begun."""
        wait_for("the job begins", self._lines, 60)
        return self

    def finish(self, timeout_s: float, *, now: bool = False) -> dict[str, Any]:
        """What it says at its end, which comes by itself unless it is wanted now."""
        assert self.child.stdin
        if now:
            self.child.stdin.close()
        try:
            assert self.child.wait(timeout_s) == 0
            found: dict[str, Any] = json.loads(self._lines()[-1])
        finally:
            self.kill()
        return found

    def kill(self) -> None:
        """End it whatever it does."""
        assert self.child.stdin
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.child.stdin.close()
        self._said.close()


@contextlib.contextmanager
def jobs() -> Iterator[list[Job]]:
    """A list of jobs of which none outlives the block."""
    made: list[Job] = []
    try:
        yield made
    finally:
        for job in made:
            job.kill()


@dataclasses.dataclass
class Host:
    """A host that was registered by the operation itself, at its own address."""

    host_id: str
    address: str
    host_secret: bytes
    session: bytes
    wg_key: str
    token: str

    def beat(self, seq: int = 1) -> bytes:
        """A heartbeat's bytes."""
        request = pb.HeartbeatRequest(session=self.session, seq=seq, boot_id=BOOT_ID)
        return request.SerializeToString()


def make_hosts(cp: ControlPlane, count: int, net: int = 100) -> list[Host]:
    """Hosts at 10.77.<net>.2 and on, each with a live session."""

    async def work(db: cp_server.Database) -> list[Host]:
        made = []
        for number in range(count):
            token, _ = await cp_server.mint_invite(
                db, ACTOR, cp_server.InviteOrder(payout_pubkey=WALLET)
            )
            secret, session = secrets.token_bytes(32), secrets.token_bytes(32)
            address = f"10.77.{net + number // 250}.{number % 250 + 2}"
            registration = cp_server.Registration(
                cp_server.parse_token("oi1", token),
                cp_server.sha256(secret),
                cp_server.hash_session(session),
                WALLET,
                address,
                new_wg_key(),
                FACTS,
            )
            host = await cp_server.register(db, registration, 1000)
            key = registration.wg_pubkey or ""
            made.append(Host(str(host.host_id), address, secret, session, key, token))
        return made

    return asyncio.run(cp_server.with_database(cp.dsn_file, work))


def start_honest(cp: ControlPlane, hosts: list[Host], seconds: float, every_s: float = 1.0) -> Job:
    """The honest hosts' heartbeats, and an operator who polls the list of hosts."""
    assert cp.netns
    head = "GET /api/v1/admin/hosts?limit=50 HTTP/1.1\r\nHost: cp\r\n"
    head += f"Authorization: Bearer {cp.token}\r\n\r\n"
    return Job(
        cp.netns,
        "honest",
        hosts=[{"address": host.address, "beat": host.beat().hex()} for host in hosts],
        port=cp.grpc_port,
        http=["127.0.0.1", cp.http_port],
        request=head.encode().hex(),
        seconds=seconds,
        every_s=every_s,
    )


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def read_rss_mb(cp: ControlPlane) -> float:
    """Resident memory of a control plane in MB (10^6 bytes)."""
    assert cp.process
    pages = int(Path(f"/proc/{cp.process.child.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def reset_peak(cp: ControlPlane) -> None:
    """Let the peak of a control plane's resident memory begin anew (proc(5), clear_refs)."""
    assert cp.process
    Path(f"/proc/{cp.process.child.pid}/clear_refs").write_text("5")


def read_peak_mb(cp: ControlPlane) -> float:
    """The peak of a control plane's resident memory in MB (10^6 bytes)."""
    assert cp.process
    status = Path(f"/proc/{cp.process.child.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def count_files(cp: ControlPlane) -> int:
    """How many files a control plane has open."""
    assert cp.process
    return len(os.listdir(f"/proc/{cp.process.child.pid}/fd"))


def read_seconds(default: float) -> float:
    """How long fuzzing takes in all, by OPENINFRA_FUZZ_S."""
    return float(os.environ.get("OPENINFRA_FUZZ_S", default))


def fuzz(name: str, seconds: float, directory: Path) -> int:
    """Fuzz one target of fuzz_tool.py; give back how many inputs it had."""
    # timeout(1) forks: a direct child would inherit this process's peak as its own ru_maxrss,
    # which is what libFuzzer holds against its limit.
    argv = ["timeout", str(2 * seconds + 60), sys.executable, "-W", "error"]
    argv += [str(ROOT / "tests" / "fuzz_tool.py"), name]
    argv += [str(max(1, round(seconds))), str(read_seed()), str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=directory, check=False)
    crashes = {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name[:5] == "crash"
    }
    assert done.returncode == 0, f"{name}: {crashes}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    match = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert match, done.stderr[-2000:]
    return int(match[1])


def run_schemathesis(cp: ControlPlane, directory: Path, *arguments: str) -> None:
    """The HTTP API against its own OpenAPI document, as schemathesis sees it."""
    url = f"http://127.0.0.1:{cp.http_port}/api/v1/openapi.json"
    argv = [
        str(Path(sys.executable).parent / "st"),
        "run",
        url,
        "--no-color",
        "--checks=all",
        "--workers=2",
    ]
    argv += ["--header", f"Authorization: Bearer {cp.token}", f"--seed={read_seed()}"]
    done = cp.command("add-customer", "--name=fuzz", "--namespace=fuzz")
    assert done.returncode == 0, done.stderr
    config = directory / "schemathesis.toml"  # what customers may do comes with a customer's key
    of_customers = sorted({route.path for route in cp_server.ROUTES if route.scope == "customer"})
    # A body can be too large as well as wrong.
    rejected = ["400", "401", "403", "404", "405", "409", "411", "413", "415", "429"]
    config.write_text(
        f"[checks.negative_data_rejection]\nexpected-statuses = {json.dumps(rejected)}\n"
        + "".join(
            f'[[operations]]\ninclude-path = "{path}"\n'
            f'headers = {{ Authorization = "Bearer {done.stdout.strip()}" }}\n'
            for path in of_customers
        )
    )
    argv.insert(1, f"--config-file={config}")
    argv += ["--suppress-health-check=all", "--warnings=off", "--continue-on-failure", *arguments]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.openapi_formats"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        argv, capture_output=True, text=True, env=environment, cwd=directory, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    match = re.search(r"(\d+) generated", done.stdout)
    assert match, done.stdout[-3000:]
    assert int(match[1]) > 300, done.stdout[-3000:]


# Attacks: each is a list of jobs of hostile_tool.py, all from CROWD, an address without a host.

HEARTBEAT = pb.HeartbeatRequest(session=b"S" * 32, seq=1, boot_id=BOOT_ID).SerializeToString()
REGISTER = pb.RegisterRequest(
    invite_token=cp_server.render_token("oi1", "abcdefghij234567", bytes(32)),
    host_secret=b"h" * 32,
    session=b"s" * 32,
    payout_pubkey=WALLET,
    wg_pubkey=WG_KEY,
    facts=facts(),
).SerializeToString()
RESUME = pb.ResumeRequest(
    host_secret=b"h" * 32, session=b"s" * 32, wg_pubkey=WG_KEY
).SerializeToString()
GREETING = tool.PREFACE + tool.frame(tool.SETTINGS, 0, 0)


def flood(kind: str, method: str, message: bytes, **more: Any) -> dict[str, Any]:
    """One process that calls and calls; by itself as many at once as the server lets it."""
    order = {"at_once": 1000, "connections": 20, "connects_per_s": 1000, "per_s": 100_000, **more}
    return {"job": "flood", "kind": kind, "method": method, "message": message.hex(), **order}


FLOODS: dict[str, dict[str, Any]] = {
    "sessions that nobody has": flood("calls", "Heartbeat", HEARTBEAT),
    "tokens that are no good": flood("calls", "Register", REGISTER),
    "secrets of no host": flood("calls", "Resume", RESUME),
    "new connections": flood("calls", "Heartbeat", HEARTBEAT, at_once=1, calls_each=2),
    "calls that are reset at once": flood("reset", "Heartbeat", b"", at_once=200, per_s=20_000),
}
# What a connection has sent before it says nothing more, on the port of the agents.
SILENCES: dict[str, bytes] = {
    "nothing": b"",
    "the preface": tool.PREFACE,
    "settings": GREETING,
    "half a head": GREETING + tool.frame(tool.HEADERS, 0, 1, tool.headers("Heartbeat")[:20]),
    "a call without an end": GREETING
    + tool.frame(tool.HEADERS, tool.END_HEADERS, 1, tool.headers("Heartbeat")),
}


@dataclasses.dataclass(repr=False)
class Seen:
    """How the honest ones fared meanwhile, and what it cost."""

    beats: list[float]
    polls: list[float]
    statuses: dict[str, int]
    failed: int
    errors: list[str]
    rss_mb: float
    files: int
    jobs: list[dict[str, Any]]

    def __repr__(self) -> str:
        return (
            f"{len(self.beats)} heartbeats p99 {percentile(self.beats, 0.99):.3f} s,"
            f" {self.failed} failed {self.errors[:3]}, {len(self.polls)} polls p99"
            f" {percentile(self.polls, 0.99):.3f} s {self.statuses}, {self.rss_mb:.0f} MB,"
            f" {self.files} files, {self.jobs}"
        )


def endure(
    cp: ControlPlane, hosts: list[Host], seconds: float, attack: list[dict[str, Any]]
) -> Seen:
    """Run hostile jobs, and honest hosts and an operator beside them."""
    assert cp.netns
    peak, files, stop = [read_rss_mb(cp)], [count_files(cp)], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            peak.append(read_rss_mb(cp))
            files.append(count_files(cp))

    watcher = threading.Thread(target=watch)
    with jobs() as running:
        watcher.start()
        try:
            for order in attack:
                begin = {"seconds": seconds + 30} if order["job"] == "flood" else {}
                running.append(Job(cp.netns, **{**order, **begin}))
            for job in running:
                job.begin()
            said = start_honest(cp, hosts, seconds).finish(seconds + 60)
            ended = [job.finish(30, now=True) for job in running]
        finally:
            stop.set()
            watcher.join()
    return Seen(
        beats=said["took"],
        polls=said["polls"],
        statuses=said["statuses"],
        failed=said["failed"],
        errors=said["errors"],
        rss_mb=max(peak),
        files=max(files),
        jobs=ended,
    )
