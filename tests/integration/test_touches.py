"""What the scripts really touch, by strace, against the tables of README.md."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import readme_tables
from tests.harness import WALLET, Agent, ControlPlane, Process, wait_for

# Writing opens, renames, removals, new directories and sockets; the call, then its first string.
CALL = re.compile(r"^\S+\s+(?:<\S+>\s+)?(\w+)\((.*)\) = (\d+|-1 E(?!NOENT)\w+)")
CALLS = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,chmod,fchmodat"
CALLS += ",truncate,symlink,symlinkat,link,linkat,bind,connect,listen,execve"
# Nobody's property: the kernel's own, and temporary names of a file that is replaced whole.
NOT_OURS = re.compile(r"^(/dev/null|/dev/shm/.*|/proc/self/.*|.*/__pycache__.*)$")


def traced(argv: list[str], trace: Path) -> list[str]:
    """The command under strace."""
    return [
        "strace",
        "-f",
        "-qq",
        "-y",
        "-s",
        "300",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(trace),
        *argv,
    ]


def list_writes(trace: Path) -> set[str]:
    """The paths that were written, made, renamed or removed."""
    found = set()
    for line in trace.read_text().splitlines():
        match = CALL.match(line)
        if not match:
            continue
        name, arguments, _ = match.groups()
        if name in ("bind", "connect", "listen", "execve"):
            continue
        if name.startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", arguments):
            continue
        found |= {path for path in re.findall(r'"(/[^"]*)"', arguments) if not NOT_OURS.match(path)}
    return found


def list_sockets(trace: Path, call: str) -> set[str]:
    """The addresses of `bind` or `connect`: `127.0.0.1:9092`, or a path."""
    found = set()
    for line in trace.read_text().splitlines():
        match = CALL.match(line)
        if not match or match[1] != call:
            continue
        port = re.search(r"sin6?_port=htons\((\d+)\)", line)
        address = re.search(r'(?:inet_addr\("|inet_pton\(AF_INET6, "|AF_INET6, ")([^"]+)"', line)
        path = re.search(r'sun_path="([^"]+)"', line)
        if port and address:
            found.add(f"{address[1].removeprefix('::ffff:')}:{port[1]}")
        elif path:
            found.add(path[1])
    return found


def list_programs(trace: Path) -> list[str]:
    """The programs that were started, the first one left out."""
    calls = [CALL.match(line) for line in trace.read_text().splitlines()]
    paths = [m[2].split('"')[1] for m in calls if m and m[1] == "execve" and m[3] == "0"]
    return paths[1:]


def table(script: str, places: dict[str, str]) -> re.Pattern[str]:
    """One pattern of all paths in the script's page, with this test's directories put in."""
    forms = []
    for path, _, _ in readme_tables.list_files(script):
        moved = path
        for here, there in places.items():
            moved = moved.replace(here, there)
        form = re.sub(r"<\w+>", "[0-9a-z]+", re.escape(moved).replace(r"\<", "<"))
        directory, _, name = form.rpartition("/")
        forms += [form.rstrip("/"), rf"{directory}/\.{name}\.new"]  # write_file's temporary name
    return re.compile("|".join(forms))


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    assert shutil.which("strace"), "strace is not installed; run tests/run"
    return tmp_path


def test_the_agent_touches_what_its_page_says(
    cp: ControlPlane, make_agent: Callable[..., Agent], trace_dir: Path
) -> None:
    address = f"127.0.0.1:{cp.grpc_port}"
    agent = make_agent(address, cp.mint(payout_pubkey=WALLET), python="/usr/bin/python3")
    trace = trace_dir / "trace"
    argv = traced(agent.argv("run", "--allow-unencrypted"), trace)
    agent.started = Process(argv, agent.directory / "agent.log", {"PYTHONDONTWRITEBYTECODE": "1"})
    wait_for("scrub", lambda: "_used" in agent.env_file.read_text() or None, 20)
    # strace hands no signal on: end the agent itself.
    os.kill(agent.status()["pid"], signal.SIGTERM)
    assert agent.process.child.wait(20) == 0
    places = {
        "/etc/openinfra/agent.env": str(agent.env_file),
        "/etc/wireguard/openinfra.pub": str(agent.key_file),
        "/run/openinfra/agent.sock": str(agent.socket),
        "/run/openinfra/lease.json": str(agent.lease_file),
        "/var/lib/openinfra": str(agent.data),
    }
    allowed = table("agent.py", places)
    writes = list_writes(trace)
    assert [path for path in writes if not allowed.fullmatch(path)] == []
    assert str(agent.data / "identity.json") in writes  # the trace does see writes
    assert {a for a in list_sockets(trace, "bind") if not a.endswith(":0")} == {str(agent.socket)}
    assert {a for a in list_sockets(trace, "connect") if re.search(r":\d+$", a)} == {address}
    assert list_programs(trace) == []


def find_processes(program: str, word: str) -> list[int]:
    """The processes of this program with this word; others may end while one looks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0] == program and word in words:
                found.append(int(entry.name))
    return found


def test_the_control_plane_touches_what_its_page_says(
    make_cp: Callable[..., ControlPlane], trace_dir: Path
) -> None:
    cp = make_cp("--heartbeat-s=1")
    assert cp.stop() == 0
    trace = trace_dir / "trace"
    argv = traced(cp.argv("serve"), trace)
    argv += [f"--grpc-listen=127.0.0.1:{cp.grpc_port}", f"--http-listen=127.0.0.1:{cp.http_port}"]
    argv += ["--peer-check=off"]
    cp.process = Process(argv, cp.directory / "cp.log", {"PYTHONDONTWRITEBYTECODE": "1"})
    wait_for("ready", lambda: cp.log.count("INFO control plane ready") == 2 or None, 20)
    cp.mint()
    (pid,) = find_processes(sys.executable, f"--http-listen=127.0.0.1:{cp.http_port}")
    os.kill(pid, signal.SIGTERM)
    assert cp.process.child.wait(20) == 0
    allowed = table("cp_server.py", {"/etc/openinfra/cp/": f"{cp.directory}/"})
    assert [path for path in list_writes(trace) if not allowed.fullmatch(path)] == []
    listening = {f"127.0.0.1:{cp.grpc_port}", f"127.0.0.1:{cp.http_port}"}
    assert {a for a in list_sockets(trace, "bind") if not a.endswith(":0")} == listening
    connected = {a for a in list_sockets(trace, "connect") if not a.endswith(":0")}
    database = str(cp.postgres.directory)
    assert {a for a in connected if not a.startswith((database, "/var/run/nscd"))} == set()
    assert len(readme_tables.list_ports("cp_server.py")) == len(listening)
    assert list_programs(trace) == []
