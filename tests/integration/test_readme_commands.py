"""Every command that README.md prints is run here as it stands there, in its order.

The two commands at its top are run by `tests/run --fresh` on a bare machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cp_server
from tests.harness import ROOT, Postgres, free_port, wait_for
from tests.readme import BLOCKS, README, block

# The blocks that `tests/run --fresh` runs on a bare machine.
FRESH = {"run", "test"}


def test_every_block_of_commands_is_marked_and_run() -> None:
    assert README.count("```sh") == len(BLOCKS)
    names = [name for _, name, _ in BLOCKS]
    assert len(set(names)) == len(names) > 15
    tests = [*(ROOT / "tests/e2e").glob("test_*.py"), *Path(__file__).parent.glob("test_re*.py")]
    code = "".join(path.read_text() for path in tests)
    assert [name for name in names if f'"{name}"' not in code and name not in FRESH] == []


class Shell:
    """A directory with the scripts in it, where blocks are run with other ports and places."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        port = free_port()
        self.changes = {
            ":9092": f":{free_port()}",
            ":8080": f":{port}",
            "https://cp.coledex.com/api": f"http://127.0.0.1:{port}/api",
            "/var/lib/openinfra": str(directory / "data"),
        }
        for name in ("cp_server.py", "agent.py", "proto", "systemd", *cp_server.SCRIPTS):
            (directory / name).symlink_to(ROOT / name)

    def text(self, name: str) -> str:
        """A block with this test's ports and directories."""
        text = block(name)
        for old, new in self.changes.items():
            text = text.replace(old, new)
        return text

    def run(self, name: str, **environment: str) -> str:
        """Run a block; gives back what it prints."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.text(name)],
            cwd=self.directory,
            env={**os.environ, "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Run a block that leaves a process behind; the shell stays its parent until it ends."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(self.directory / f"{name}.log", "ab") as output:
            script = f"trap 'kill $!' TERM\n{self.text(name)}\nwait $!"
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", "bash", "-euc", script],
                cwd=self.directory,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def log(self, name: str) -> str:
        """What a started block printed."""
        return (self.directory / f"{name}.log").read_text()


@pytest.fixture
def shell(tmp_path: Path, postgres: Postgres) -> Shell:
    """A shell with the two connection strings that the README asks for."""
    postgres.execute("postgres", "CREATE DATABASE readme")
    shell = Shell(tmp_path)
    for name, role in (("owner-dsn", "postgres"), ("dsn", "openinfra")):
        (tmp_path / name).write_text(postgres.dsn("readme", role))
        (tmp_path / name).chmod(0o600)
    return shell


def test_the_readme_from_a_control_plane_to_a_host_that_is_well(shell: Shell) -> None:
    serving = shell.start("operator")
    running = None
    try:
        wait_for("ready", lambda: "INFO control plane ready" in shell.log("operator") or None)
        token = shell.run("operator-daily").splitlines()[0]
        assert re.fullmatch(r"oi1_\S+", token)
        key, *table = shell.run("operator-customer").splitlines()
        assert "kuma" in table[-1]
        assert '"kuma"' in shell.run("customer", OPENINFRA_KEY=key)
        money = shell.run("operator-money", CUSTOMER_ID=table[-1].split()[0])
        assert "is booked" in money
        assert "the ledger holds" in money
        account = shell.run("customer", OPENINFRA_KEY=key)
        assert '"balance_micros": 25000000' in account
        assert '"invoices": []' in shell.run("customer-invoice", OPENINFRA_KEY=key)
        posted = shell.run("customer-post", OPENINFRA_KEY=key)
        assert posted.count('"pending"') == 2
        assert "replica 1: " in posted
        workload_id = re.findall(r'"workload_id": "([0-9a-f-]{36})"', posted)[0]
        logs = {"OPENINFRA_KEY": key, "WORKLOAD_ID": workload_id}
        assert shell.run("customer-logs", **logs) == ""  # no copy has a host yet
        (shell.directory / "db-password").write_text("correct horse\n")
        kept = json.loads(shell.run("customer-secrets", OPENINFRA_KEY=key))
        assert (kept["secrets"], kept["revision"]) == (["db-password"], 1)
        jwt = (shell.directory / "admin.jwt").read_text().strip()
        printed = shell.run("operator-http", ADMIN_JWT=jwt)
        assert re.match(r"oi1_\S+\n", printed)

        data = shell.directory / "data"
        data.mkdir(mode=0o700)
        environment = shell.text("agent.env").replace("oi1_…", token)
        (shell.directory / "agent.env").write_text(environment)
        (shell.directory / "agent.env").chmod(0o600)
        running = shell.start("provider")
        wait_for("online", lambda: "INFO agent running" in shell.log("provider") or None)
        wait_for("scrub", lambda: token not in (shell.directory / "agent.env").read_text() or None)
        looked = shell.run("provider-look")
        assert "online" in looked
        assert "nothing is wrong" in looked
        printed = shell.run("operator-http", ADMIN_JWT=jwt)
        assert '"status": "online"' in printed
        assert '"assignable": true' in printed
        assert "invariants hold" in shell.run("operator-daily")
        paused, unpaused, left = shell.run("provider-hand").splitlines()
        assert paused.startswith("paused: no workload runs here; ")
        assert unpaused == "not paused any more: workloads may come here"
        assert left.startswith("nothing is assigned to this host and nothing runs here; ")
        printed = shell.run("operator-http", ADMIN_JWT=jwt)
        assert "its provider is leaving: revoke it" in printed
    finally:
        for child in (running, serving):
            if child is not None:
                child.terminate()
                child.wait(20)


def test_a_release_that_hosts_take(tmp_path: Path) -> None:
    """With the key that setup_cp.py made, which the operator took along."""
    shell = Shell(tmp_path)
    argv = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / "release.pem")]
    subprocess.run(argv, check=True, capture_output=True)
    shell.run("operator-release")
    verify = "openssl pkeyutl -verify -pubin -inkey release.pub -rawin -in release.json"
    argv = ["bash", "-c", f"cd dist && {verify} -sigfile release.json.sig && sha256sum *"]
    done = subprocess.run(argv, cwd=shell.directory, capture_output=True, text=True, check=True)
    release = json.loads((shell.directory / "dist" / "release.json").read_text())
    assert release["files"]
    for name, entry in release["files"].items():
        assert f"{entry['sha256']}  {name}" in done.stdout


def test_the_commands_in_the_text_exist() -> None:
    for command in re.findall(r"`(\./\S+\.py [^`]+|tests/run[^`]*)`", README):
        words = shlex.split(command)
        program = str(ROOT / words[0])
        done = subprocess.run(
            [sys.executable, program, *words[1:2], "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, command
        for flag in words[2:]:
            assert flag in done.stdout, command
