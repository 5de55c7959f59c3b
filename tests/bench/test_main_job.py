"""How long the main job takes, and what an agent costs the machine that it runs on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.conftest import Record
from tests.harness import ROOT, WALLET, Agent, ControlPlane, Process, make_netns, wait_for

RUNTIMES = {"Debian's packages": "/usr/bin/python3", "PyPI's newest": sys.executable}
IDLE_S = 120.0
TIMER_S = 10  # openinfra-guard.timer


def read_cpu_s(pid: int, with_children: bool = False) -> float:
    """Processor time of a process so far (proc(5), stat: utime, stime; of ended children, too)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_children else 13])) / os.sysconf("SC_CLK_TCK")


def read_rss_mb(pid: int) -> float:
    """Resident memory of a process in MB (10^6 bytes)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_pilot(record: Record) -> None:
    """Three runs of `pilot --check`, packages present; the median of each time."""
    runs = []
    for _ in range(3):
        argv = [sys.executable, str(ROOT / "cp_server.py"), "pilot", "--check"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        key: statistics.median(run[key] for run in runs) for key in ("online_s", "cp_ready_s")
    }
    record("pilot: from its start to an online host", median["online_s"], "s", 5)
    record("control plane: from its start to ready", median["cp_ready_s"], "s", 3)


def test_agent(
    make_cp: Callable[..., ControlPlane], make_agent: Callable[..., Agent], record: Record
) -> None:
    """Both runtimes beside each other, heartbeats every 30 s, idle for two minutes."""
    cp = make_cp()
    agents = {}
    for name, python in RUNTIMES.items():
        agent = make_agent(
            f"127.0.0.1:{cp.grpc_port}", cp.mint(payout_pubkey=WALLET), python=python
        )
        began = time.monotonic()
        agent.start()
        agent.process.wait_log("INFO agent running")
        record(f"agent on {name}: start to running", time.monotonic() - began, "s", 3)
        agents[name] = agent
    wait_for("online", lambda: len([h for h in cp.hosts() if h["status"] == "online"]) == 2 or None)
    time.sleep(2)
    before = {name: read_cpu_s(agent.process.child.pid) for name, agent in agents.items()}
    time.sleep(IDLE_S)
    for name, agent in agents.items():
        pid = agent.process.child.pid
        share = (read_cpu_s(pid) - before[name]) / IDLE_S * 100
        record(f"agent on {name}: resident memory", read_rss_mb(pid), "MB", 48)
        record(f"agent on {name}: of one core, idle for {IDLE_S:g} s", share, "%", 0.1)


def test_guard(tmp_path: Path, record: Record) -> None:
    """The one that watches, with all that it starts; and what the timer's runs would be instead."""
    with make_netns() as netns:
        argv = [RUNTIMES["Debian's packages"], str(ROOT / "agent.py"), "guard"]
        argv = netns.argv([*argv, f"--guard-file={tmp_path}/guard.json"])
        watch = Process([*argv, "--watch"], tmp_path / "watch", {})
        try:
            watch.wait_log("flush opens it")
            pid = watch.child.pid
            time.sleep(2)
            before = read_cpu_s(pid, with_children=True)
            time.sleep(IDLE_S)
            took_s = read_cpu_s(pid, with_children=True) - before
            record("guard that watches: resident memory", read_rss_mb(pid), "MB", 48)
        finally:
            watch.stop()
        before = sum(os.times()[2:4])
        for _ in range(10):
            subprocess.run(argv, capture_output=True, check=True)
        share = (sum(os.times()[2:4]) - before) / (10 * TIMER_S) * 100
    record(
        f"guard by the timer each {TIMER_S} s, while none watches: of one core", share, "%", None
    )
    share = took_s / IDLE_S * 100
    record(f"guard that watches: of one core, idle for {IDLE_S:g} s", share, "%", 0.5)
