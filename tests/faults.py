"""What the fault tests share: hosts that are hurt, and what must hold once they run unhurt again.

The short tests stand in tests/integration/test_agent_faults.py, the whole sweeps in
tests/bench/test_faults.py. Each takes its random choices from OPENINFRA_SEED and prints it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

import agent as script
from tests import failpoints
from tests.harness import ROOT, WALLET, Agent, ControlPlane, Process, wait_for

T = TypeVar("T")

RUNTIMES = ("/usr/bin/python3", sys.executable)
# A host that was never online asks again every 5 s at most.
ONLINE_S = 30.0
# What a refused start may give back; 78 needs a person, and no passing fault does.
EXIT_CODES = (1, script.USAGE, script.LATER)

SPENT_STAYS = "cannot remove the spent invite"

SQL_HOST = """
SELECT h.host_id::text, h.status,
  count(*) FILTER (WHERE s.ended_at IS NULL) AS live,
  count(*) FILTER (WHERE s.opened_by = 'takeover') AS takeovers
FROM hosts h JOIN sessions s USING (host_no) WHERE h.invite_id = %s GROUP BY h.host_no
"""


class Host:
    """One host: its invite, its agent, and who it is once it was online."""

    def __init__(self, cp: ControlPlane, directory: Path, python: str = RUNTIMES[0]) -> None:
        self.cp = cp
        self.token = cp.mint(payout_pubkey=WALLET)
        address = f"127.0.0.1:{cp.grpc_port}"
        self.agent = Agent(directory, address, self.token, python=python)
        self.identity = self.agent.data / "identity.json"
        self.host_id = ""
        self.environment: dict[str, str] = {}
        self._log = directory / "agent.log"
        self._log.touch()
        self._offset = 0

    def start(self, prefix: Sequence[str] = (), **environment: str) -> Process:
        """Start the agent."""
        self._offset = self._log.stat().st_size
        return self.agent.start(prefix=prefix, **self.environment, **environment)

    @property
    def said(self) -> str:
        """What the agent printed since it was started last."""
        return self._log.read_bytes()[self._offset :].decode()

    def ask(self) -> dict[str, Any]:
        """What the agent says of itself; nothing when none answers."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            try:
                sock.connect(str(self.agent.socket))
                sock.sendall(b'{"cmd":"status"}\n')
                with sock.makefile("rb") as file:
                    found: dict[str, Any] = json.loads(file.readline())
            except (OSError, ValueError):
                return {}
        return found

    def wait_settled(self) -> dict[str, Any]:
        """Wait until the host is online and its token gone, or said to stay; or the agent ended.

        Gives back what the agent says; nothing when it ended.
        """
        process = self.agent.process

        def probe() -> tuple[dict[str, Any]] | None:
            if process.child.poll() is not None:
                return ({},)
            is_spent = self.token not in self.agent.env_file.read_text() or SPENT_STAYS in self.said
            if not is_spent or "INFO agent running" not in self.said:
                return None
            answer = self.ask()
            return (answer,) if answer.get("state") == "running" else None

        return wait_for(f"{self.agent.directory.name} online", probe, ONLINE_S)[0]

    def check_well(self) -> None:
        """The agent, unhurt, is online as the one host of its invite, and nothing lies about."""
        answer = self.wait_settled()
        assert answer, f"the agent ended; it said:\n{self.agent.log}"
        self.host_id = self.host_id or answer["host_id"]
        expected = {"host_id": self.host_id, "status": "online", "live": 1, "takeovers": 0}
        assert self.cp.query(SQL_HOST, self.token.split("_")[1]) == [expected], self.agent.log
        assert (answer["host_id"], answer["token"]) == (self.host_id, "used")
        identity = script.parse_identity(self.identity.read_bytes())
        assert (identity.host_id, identity.next_session) == (self.host_id, None)
        for word in ("another agent", "quarantine", "Traceback", "broken"):
            assert word not in self.agent.log, self.agent.log
        self.check_files(identity)

    def check_files(self, identity: script.Identity) -> None:
        """The data directory holds what the manual lists, and no secret is anywhere else."""
        modes = {
            path.name: stat.S_IMODE(path.lstat().st_mode) for path in self.agent.data.iterdir()
        }
        assert modes == {"identity.json": 0o600, "agent.lock": 0o600}
        secret = self.token.split("_", 2)[2][:43]
        hidden = [secret, identity.host_secret, identity.session or ""]
        for path in self.agent.directory.iterdir():
            if path.is_file():
                text = path.read_text(errors="replace")
                assert not [word for word in hidden if word in text], path
        assert not list(self.agent.directory.glob(".*")), "a temporary file was left"

    def wait_end(self) -> int:
        """Wait until the agent ended by itself; its exit code."""
        try:
            return self.agent.process.child.wait(ONLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end; it said:\n{self.agent.log}") from None

    def kill(self) -> None:
        """SIGKILL to the agent itself, not to an strace before it."""
        pid = self.ask().get("pid")
        if pid:
            os.kill(pid, signal.SIGKILL)
        self.agent.process.child.wait(15)

    def go_on(self) -> None:
        """The same command again, as shipped, must end with a good host."""
        self.agent.scripts = ROOT
        self.start()
        self.check_well()

    def count_beats(self) -> int:
        """How many heartbeats of this run were accepted."""
        return int(self.ask().get("heartbeats", 0))

    def wait_beats(self, more: int = 1, timeout_s: float = 2 * ONLINE_S) -> None:
        """Wait for this many more accepted heartbeats."""
        enough = self.count_beats() + more
        wait_for("heartbeats", lambda: self.count_beats() >= enough, timeout_s)

    def read_sessions(self) -> list[dict[str, Any]]:
        """Every session that this host ever had."""
        sql = "SELECT s.* FROM sessions s JOIN hosts h USING (host_no) WHERE h.invite_id = %s"
        return self.cp.query(sql + " ORDER BY started_at", self.token.split("_")[1])

    def read_status(self) -> str:
        """The host's status in the database."""
        return str(self.cp.query(SQL_HOST, self.token.split("_")[1])[0]["status"])


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Makes hosts that end with the test."""
    made: list[Host] = []

    def make(cp: ControlPlane, python: str = RUNTIMES[0]) -> Host:
        made.append(Host(cp, tmp_path / f"h{len(made)}", python))
        return made[-1]

    yield make
    for host in made:
        if host.agent.started:
            host.agent.process.stop(signal.SIGKILL)


def run_lanes(jobs: Mapping[str, Callable[[], T]], lanes: int = 4) -> list[T]:
    """Run jobs beside each other, since they wait more than they work; fails with what failed.

    A child dies with the thread that started it.
    """
    with ThreadPoolExecutor(lanes) as workers:
        futures = {name: workers.submit(job) for name, job in jobs.items()}
    errors = {name: future.exception() for name, future in futures.items() if future.exception()}
    for error in errors.values():
        raise AssertionError("\n".join(f"{name}: {e}" for name, e in errors.items())) from error
    return [future.result() for future in futures.values()]


# ------------------------------------------------------------------------------------------------
# kill -9 at failpoints
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test build of the scripts."""
    return failpoints.build(tmp_path_factory.mktemp("build") / "scripts")


def kill_agent(host: Host, built: Path, point: str, passes: Sequence[int]) -> None:
    """Kill the agent at a failpoint again and again; then the same command goes on."""
    if point.startswith("Resume"):
        host.go_on()
        host.kill()
    for number in passes:
        host.agent.scripts = built
        host.start(OPENINFRA_FAILPOINT=f"{point}=kill@{number}")
        assert host.wait_end() == -signal.SIGKILL, host.agent.log
    host.go_on()
    assert host.agent.process.stop() == 0


def draw_passes(draw: random.Random, point: str, times: int) -> list[int]:
    """At which pass to kill: every start comes once to each point, to Heartbeat's many times."""
    most = 3 if point.startswith("Heartbeat") else 1
    return [draw.randint(1, most) for _ in range(times)]


def kill_cp(host: Host, built: Path, point: str, times: int) -> None:
    """Kill the control plane at a failpoint under a running agent, which goes on by itself."""
    cp, agent = host.cp, host.agent
    is_new = point.startswith("Register")
    if not is_new:
        host.go_on()
    if point.startswith("Resume"):
        assert agent.process.stop() == 0
    before = host.read_sessions()
    cp.scripts = built
    for number in range(times):
        cp.stop(signal.SIGKILL)
        with contextlib.suppress(AssertionError):  # it may die before it says that it is ready
            cp.start(OPENINFRA_FAILPOINT=f"{point}=kill")
        if number == 0 and (is_new or point.startswith("Resume")):
            host.start()
        if point.startswith("http"):
            with pytest.raises(OSError, match=r"Remote end closed|Connection reset"):
                cp.mint()
        assert cp.process
        assert cp.process.child.wait(ONLINE_S * 2) == -signal.SIGKILL, cp.log
    resumed = agent.log.count("INFO resuming")
    cp.scripts = ROOT
    cp.start()
    host.wait_beats()
    host.check_well()
    after = host.read_sessions()
    if point.startswith(("Heartbeat", "http")):
        assert after == before
        assert agent.log.count("INFO resuming") == resumed
    assert len(after) == 1 + point.startswith("Resume")
    assert agent.process.stop() == 0
    cp.check_invariants()
    cp.stop(signal.SIGKILL)


def stop_agent(host: Host, stop_s: float = 0) -> None:
    """SIGSTOP the agent until its host is offline, and for some time; it goes on by itself."""
    host.go_on()
    before = host.read_sessions()
    child = host.agent.process.child
    child.send_signal(signal.SIGSTOP)
    ends_s = time.monotonic() + stop_s
    wait_for("offline", lambda: host.read_status() == "offline" or None, 150)
    time.sleep(max(0, ends_s - time.monotonic()))
    child.send_signal(signal.SIGCONT)
    wait_for("online", lambda: host.read_status() == "online" or None, 2 * ONLINE_S)
    host.check_well()
    assert host.read_sessions() == before
    assert host.agent.process.stop() == 0


def stop_cp(host: Host, stop_s: float) -> None:
    """SIGSTOP the control plane; the agent goes on by itself, and its host was never offline."""
    host.go_on()
    before = host.read_sessions()
    assert host.cp.process
    child = host.cp.process.child
    child.send_signal(signal.SIGSTOP)
    time.sleep(stop_s)
    host.agent.process.wait_log("WARN cannot reach control plane", 2 * ONLINE_S)
    enough = host.count_beats() + 2
    child.send_signal(signal.SIGCONT)
    seen = set()

    def probe() -> bool:
        seen.add(host.read_status())
        return host.count_beats() >= enough

    wait_for("heartbeats", probe, 2 * ONLINE_S + 60)
    assert seen == {"online"}
    host.check_well()
    assert host.read_sessions() == before
    assert host.agent.process.stop() == 0


# ------------------------------------------------------------------------------------------------
# A fault of the kernel at one call of the shipped agent, by strace
# ------------------------------------------------------------------------------------------------

CALLS = "openat,read,write,pwrite64,fsync,rename,ftruncate,unlink,fchmod,flock"
# Of these a failure may pass without a word: the pid in the lock file, which is for a message;
# removing what is no longer needed; reading the env file for somebody who asks for the status; and
# the lease file (in a host's directory, h<n>) while there is no right to run in it.
QUIET = r"agent.lock|unlink\(\"[^\"]*/refused.json|agent.env\", O_RDONLY|read\(.*/agent.env"
QUIET += r"|/lease\.json|/h[0-9]+\", O_RDONLY\|O_CLOEXEC\|O_DIRECTORY"


@dataclass(frozen=True)
class Fault:
    """The nth of these calls on a file of ours fails, or kills the agent."""

    call: str
    number: int
    kind: str  # EIO, ENOSPC, KILL

    def __str__(self) -> str:
        return f"{self.call}@{self.number}={self.kind}"


def trace(host: Host, fault: Fault | None = None) -> list[str]:
    """The command that comes before the agent's: strace of what touches its files."""
    agent = host.agent
    written = [agent.env_file, agent.data / "identity.json", agent.data / "refused.json"]
    files = [agent.data, agent.directory, agent.socket, agent.data / "agent.lock", *written]
    files += [path.with_name(f".{path.name}.new") for path in written]
    argv = ["strace", "-f", "-y", "-qq", "-o", str(agent.directory / "trace"), "-e", "signal=none"]
    argv += [word for path in files for word in ("-P", str(path))]
    argv += ["-e", f"trace={CALLS}"]
    if fault is None or fault.kind != "KILL":
        argv += ["--seccomp-bpf"]  # faster, and it delivers no signal
    if fault is not None:
        how = "signal=SIGKILL" if fault.kind == "KILL" else f"error={fault.kind}"
        argv += ["-e", f"inject={fault.call}:{how}:when={fault.number}"]
    return [*argv, "setpriv", "--pdeathsig=KILL", "--"]


def list_calls(host: Host) -> list[tuple[str, int]]:
    """Run the agent once under strace; each call that it made on its files, by name and number."""
    host.start(trace(host))
    assert host.wait_settled(), host.agent.log
    host.kill()
    path = host.agent.directory / "trace"
    found = Counter(re.findall(r"^\d+ +(\w+)\(", path.read_text(), re.MULTILINE))
    path.unlink()
    return [(call, n) for call, count in sorted(found.items()) for n in range(1, count + 1)]


def hurt(host: Host, fault: Fault) -> bool:
    """Run the agent with one fault; then the same command without it goes on.

    Gives back whether the agent made the call at all: not every start makes the same calls.
    """
    path = host.agent.directory / "trace"
    process = host.start(trace(host, fault))
    is_running = bool(host.wait_settled())
    if is_running:
        host.kill()
    said, code = host.said, process.child.returncode
    injected = [line for line in path.read_text().splitlines() if line.endswith("(INJECTED)")]
    assert "Traceback" not in said, f"{fault}: {said}"
    if fault.kind == "KILL":
        assert code == -signal.SIGKILL, said
    elif is_running:
        is_told = re.search(r"^WARN ", said, re.MULTILINE) or re.search(QUIET, "".join(injected))
        assert is_told or not injected, f"{injected}: no word of it:\n{said}"
    else:
        assert code in EXIT_CODES, said
        errors = [line for line in said.splitlines() if line.startswith("ERROR ")]
        assert len(errors) == 1, said
        assert said.endswith(errors[0] + "\n"), said
        assert " ; " in errors[0]
    path.unlink()
    host.go_on()
    host.kill()
    return bool(injected) or not is_running


def hurt_registered(host: Host, faults: Sequence[Fault]) -> int:
    """One fault after another on a host that was online before; how many of them came."""
    host.go_on()
    host.kill()
    return sum(hurt(host, fault) for fault in faults)
