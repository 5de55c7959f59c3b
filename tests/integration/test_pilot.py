"""The pilot: all of it on one machine, checked, stopped, killed, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cp_server
from tests.harness import ROOT, Process, wait_for

SCRIPT = str(ROOT / "cp_server.py")


@pytest.fixture
def root_dir() -> Iterator[Path]:
    """A directory that PostgreSQL's user can reach, and that is gone afterwards."""
    directory = Path("/tmp") / f"oi-pilot-{os.getpid()}"
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def read_cmdline(entry: Path) -> str:
    """The words of a process; empty when it is gone."""
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes_in(directory: Path) -> list[str]:
    """The command lines that name a directory, zombies left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        words = read_cmdline(entry)
        if str(directory) in words and entry.name != str(os.getpid()):
            found.append(words)
    return found


def counters(pilot: Process) -> list[Path]:
    """The processes of a pilot's workload."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pilot.child.pid and "n % 9999" in read_cmdline(each):
                found.append(each)
    return found


def check_bills(root_dir: Path, log: str) -> int:
    """Invoice and statement on the screen and as files add up; gives back the invoice's total."""
    files = sorted((root_dir / "bills").iterdir())
    assert [each.name.partition("-")[0] for each in files] == ["invoice"] * 3 + ["statement"] * 3
    assert {each.suffix for each in files} == {".csv", ".html", ".json"}
    assert all(f"  {each}\n" in log for each in files)
    assert {each.stat().st_mode & 0o777 for each in files} == {0o600}
    invoice, statement = (json.loads(each.read_text()) for each in files if each.suffix == ".json")
    charges = [line["charge_micros"] for line in invoice["lines"]]
    assert invoice["total_micros"] == sum(charges) > 0
    shares = sum(line["share_micros"] for line in statement["lines"])
    assert statement["total_micros"] == shares
    assert 0 <= invoice["total_micros"] * 0.8 - shares < len(charges)
    assert f"{cp_server.render_money(invoice['total_micros'])} EUR" in log
    assert f"{cp_server.render_money(shares)} EUR" in log
    return int(invoice["total_micros"])


def check_earnings(root_dir: Path, log: str) -> None:
    """What the host says that it earned is what the provider's statement of the run before says."""
    status = re.search(r"^  what the agent says +(\S.*) status (\S+)$", log, re.MULTILINE)
    assert status, log
    (path,) = (root_dir / "bills").glob("statement-*.json")
    statement = json.loads(path.read_text())
    argv = [*shlex.split(status[1]), "earnings", status[2]]
    month = f"--month={statement['month']}"
    done = subprocess.run([*argv, month, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["share_micros"] == statement["total_micros"] > 0
    for mine, theirs in zip(found["lines"], statement["lines"], strict=True):
        assert {**theirs, "hour_at": "", "part": 0} == {**theirs, **mine}
        only = f"--assignment={mine['assignment_id']}"
        hours = json.loads(subprocess.check_output([*argv, month, only, "--json"]))
        assert hours["share_micros"] == mine["share_micros"]
        assert {hour["card_no"] for hour in hours["lines"]} == {mine["card_no"]}
        for name in ("billed_us", "charge_micros", "share_micros"):
            assert sum(hour[name] for hour in hours["lines"]) == mine[name]
    text = subprocess.check_output([*argv, month], text=True)
    assert f"earned in {statement['month']}: {found['share_micros'] / 1e6:.6f} EUR" in text
    told = subprocess.check_output([*shlex.split(status[1]), "status", status[2]], text=True)
    shown = re.search(r"^earned +(\d+\.\d{6}) EUR in (\d{4}-\d\d)", told, re.MULTILINE)
    assert shown, told
    print(shown[0])
    if shown[2] == statement["month"]:  # else it began a minute ago
        assert float(shown[1]) >= found["share_micros"] / 1e6
    done = subprocess.run([*argv, "--month=x"], capture_output=True, text=True, check=False)
    assert (done.returncode, "no month" in done.stderr) == (2, True)


Start = Callable[..., Process]
NO_DOCKER = "--docker=/nonexistent/docker.sock"  # whatever this machine has


@pytest.fixture
def start(root_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the pilot in its directory; none outlives the test."""
    made: list[Process] = []

    def begin(docker: str = NO_DOCKER) -> Process:
        argv = [sys.executable, SCRIPT, "pilot", f"--dir={root_dir}", "--heartbeat-s=1", docker]
        made.append(Process(argv, tmp_path / f"pilot{len(made)}.log", {}))
        return made[-1]

    yield begin
    for pilot in made:
        pilot.stop(signal.SIGKILL)
    wait_for("the end of all", lambda: not processes_in(root_dir) or None, 20)


def start_pilot(start: Start, *flags: str) -> Process:
    """Start the pilot and wait until it says that it runs."""
    pilot = start(*flags)
    pilot.wait_log("Ctrl-C stops all of it, with an invoice", 30)
    return pilot


def run_printed(log: str, what: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the pilot's screen shows it."""
    found = re.search(rf"^  {what} {{2,}}(\S(?:\\\n|.)*)$", log, re.MULTILINE)
    assert found, log
    return subprocess.run(
        ["bash", "-c", found[1]], capture_output=True, text=True, timeout=20, check=False
    )


def test_the_check_goes_online_in_time_and_leaves_nothing() -> None:
    before = set(Path("/tmp").glob("openinfra-pilot-*"))
    done = subprocess.run(
        [sys.executable, SCRIPT, "pilot", "--check", NO_DOCKER],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["resumed"] is True
    assert figures["heartbeats"] >= 3
    assert figures["online_s"] <= 5
    assert figures["cp_ready_s"] <= 3
    assert 0 < float(figures["statement"]) < float(figures["invoice"])
    assert figures["workload"] == cp_server.STAND_IN
    assert cp_server.STAND_IN in done.stdout
    assert set(Path("/tmp").glob("openinfra-pilot-*")) == before
    assert processes_in(Path("/tmp/openinfra-pilot-")) == []


def test_stopped_and_killed_the_same_command_goes_on(start: Start, root_dir: Path) -> None:
    pilot = start_pilot(start)
    first = re.search(r"host (\S+) is online", pilot.log)
    assert first
    host_id = first[1]
    status = run_printed(pilot.log, "what the agent says")
    assert status.returncode == 0, status.stderr
    assert host_id in status.stdout
    hosts = run_printed(pilot.log, "the hosts")
    assert [host["host_id"] for host in json.loads(hosts.stdout)["hosts"]] == [host_id]
    invite = run_printed(pilot.log, "another invite")
    assert re.fullmatch(r"oi1_\S+\n", invite.stdout), invite.stderr
    workload = run_printed(pilot.log, "the workload")
    assert json.loads(workload.stdout)["state"] == "running", workload.stderr
    (first_process,) = counters(pilot)
    assert first_process.stat().st_uid == (65534 if os.geteuid() == 0 else os.geteuid())
    time.sleep(2.5)
    assert pilot.stop(signal.SIGINT) == 0
    assert processes_in(root_dir) == []
    assert not first_process.exists()
    first_micros = check_bills(root_dir, pilot.log)

    pilot = start_pilot(start)
    check_earnings(root_dir, pilot.log)
    assert f"host {host_id} is online" in pilot.log
    assert "invite minted" not in pilot.log
    (process,) = counters(pilot)
    pilot.stop(signal.SIGKILL)  # the children must not outlive it
    wait_for("the workload's end", lambda: not process.exists() or None)
    wait_for("the end of all", lambda: not processes_in(root_dir) or None, 20)

    pilot = start_pilot(start)
    assert f"host {host_id} is online" in pilot.log
    assert pilot.stop(signal.SIGTERM) == 0
    agent_log = (root_dir / "log" / "agent.log").read_text()
    assert agent_log.count("INFO resuming with persisted host_id") == 2
    assert agent_log.count("INFO registered with control plane") == 1
    assert check_bills(root_dir, pilot.log) > first_micros


def test_killed_while_it_makes_its_cluster_it_begins_again(start: Start, root_dir: Path) -> None:
    pilot = start()
    wait_for("initdb", lambda: (root_dir / "pg" / "postgres.new").exists() or None, 20)
    pilot.stop(signal.SIGKILL)
    wait_for("the end of initdb", lambda: not processes_in(root_dir) or None, 20)
    pilot = start_pilot(start)
    assert pilot.stop(signal.SIGINT) == 0


def test_two_pilots_in_one_directory_are_refused(start: Start, root_dir: Path) -> None:
    pilot = start_pilot(start)
    second = subprocess.run(
        [sys.executable, SCRIPT, "pilot", f"--dir={root_dir}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 75, second.stderr
    assert re.search(r"^ERROR another pilot runs in ", second.stderr, re.MULTILINE)
    assert pilot.child.poll() is None
    assert pilot.stop(signal.SIGINT) == 0


def test_a_child_that_dies_ends_the_pilot_with_its_last_words(start: Start, root_dir: Path) -> None:
    pilot = start_pilot(start)
    environment = f"--env-file={root_dir}/agent/agent.env"
    entries = Path("/proc").glob("[0-9]*")
    (agent,) = [int(entry.name) for entry in entries if environment in read_cmdline(entry)]
    os.kill(agent, signal.SIGKILL)
    assert pilot.child.wait(20) == 1
    assert "ERROR agent ended with -9" in pilot.log
    assert processes_in(root_dir) == []


def test_without_rights_and_without_postgresql_it_prints_the_one_line() -> None:
    tree = Path("/tmp") / f"oi-bare-{os.getpid()}"
    shutil.copytree(ROOT / "proto", tree / "proto")
    shutil.copytree(ROOT / "systemd", tree / "systemd")
    shutil.copy(SCRIPT, tree)
    tree.chmod(0o755)
    hide = "mount -t tmpfs none /usr/lib/postgresql && mount -t tmpfs none /usr/local/bin && "
    run = f"setpriv --reuid=65534 --regid=65534 --clear-groups {tree}/cp_server.py pilot"
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", hide + run],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        shutil.rmtree(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    line = "type: sudo apt-get install -y --no-install-recommends postgresql"
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_of_another_user_is_refused_before_anything_is_written(
    root_dir: Path, tmp_path: Path
) -> None:
    """Its owner could put a link where root writes; the lock file is the first such place."""
    bait = tmp_path / "bait"
    bait.write_text("precious")
    root_dir.mkdir()
    (root_dir / "pilot.lock").symlink_to(bait)
    os.chown(root_dir, 65_534, 65_534)
    argv = [sys.executable, SCRIPT, "pilot", f"--dir={root_dir}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3, done.stderr
    assert "belongs to another user" in done.stderr
    assert bait.read_text() == "precious"
    assert [path.name for path in root_dir.iterdir()] == ["pilot.lock"]
