"""`cp_server.py dist`: what hosts download, reproducible, signed, and run as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import cp_server
from tests.harness import ROOT, WALLET, Agent, ControlPlane, wait_for

Done = subprocess.CompletedProcess[str]
NAMES = {
    "install_agent.py",
    "openinfra-agent-linux-aarch64",
    "openinfra-agent-linux-x86_64",
    "release.json",
    "release.json.sig",
    "release.pub",
    "setup_luks2.py",
}
AGENT = "openinfra-agent-linux-x86_64"
EXIT_ERROR, EXIT_PROTECT, EXIT_LATER = 1, 3, 75


class Tree:
    """A copy of the repository's sources, which a test may change, and a place for releases."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "src"
        self.out = directory / "dist"
        self.key = directory / "key" / "key.pem"
        self.key.parent.mkdir(mode=0o700)
        for name in ("cp_server.py", *cp_server.ARTIFACT_SOURCES, *cp_server.SCRIPTS):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, target)
            else:  # not in this commit yet; any bytes do
                target.write_text(f"# {name}\n")

    def dist(self, *more: str) -> Done:
        """Run `dist` in the copy."""
        script = [sys.executable, "-W", "error", str(self.root / "cp_server.py"), "dist"]
        flags = [f"--env-file={os.devnull}", f"--out={self.out}", f"--key={self.key}"]
        return subprocess.run(
            [*script, *flags, *more], capture_output=True, text=True, timeout=60, check=False
        )

    def make(self) -> None:
        """A first release."""
        done = self.dist("--new-key")
        assert done.returncode == 0, done.stderr

    def raise_version(self, version: str) -> None:
        """Another version of the sources."""
        for name in ("agent.py", "cp_server.py"):
            text = (self.root / name).read_text()
            old = f'VERSION = "{cp_server.VERSION}"'
            assert text.count(f"\n{old}\n") == 1
            (self.root / name).write_text(text.replace(old, f'VERSION = "{version}"'))

    def files(self) -> dict[str, bytes]:
        """All that lies in the release's directory."""
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def verify(self) -> dict[str, object]:
        """Check the release as a host does; gives back release.json."""
        out = self.out
        argv = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(out / "release.pub")]
        argv += ["-rawin", "-in", str(out / "release.json")]
        subprocess.run([*argv, "-sigfile", str(out / "release.json.sig")], check=True)
        assert (out / "release.json.sig").stat().st_size == 64
        found: dict[str, object] = json.loads((out / "release.json").read_text())
        listed = found["files"]
        assert isinstance(listed, dict)
        assert set(listed) | {"release.json", "release.json.sig", "release.pub"} == NAMES
        for name, row in listed.items():
            data = (out / name).read_bytes()
            assert row == {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return found


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The sources and an empty place."""
    return Tree(tmp_path)


def check_failed(done: Done, code: int, *words: str) -> None:
    """One line that says what is wrong and what to do."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    for word in (*words, " ; "):
        assert word in done.stderr


def test_a_release(tree: Tree) -> None:
    done = tree.dist("--new-key")
    assert done.returncode == 0, done.stderr
    found = tree.verify()
    assert found["version"] == cp_server.VERSION
    assert set(tree.files()) == NAMES
    for path in tree.out.iterdir():
        wanted = 0o755 if path.name in cp_server.ARTIFACTS else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert stat.S_IMODE(tree.out.stat().st_mode) == 0o755
    assert stat.S_IMODE(tree.key.stat().st_mode) == 0o600
    assert os.listdir(tree.key.parent) == ["key.pem"]
    sha256 = hashlib.sha256((tree.out / "release.pub").read_bytes()).hexdigest()
    assert f"sha256 of release.pub: {sha256}\n" in done.stdout
    assert (tree.out / AGENT).read_bytes() == (tree.out / cp_server.ARTIFACTS[0]).read_bytes()
    with zipfile.ZipFile(tree.out / AGENT) as archive:
        assert archive.namelist() == sorted([*cp_server.ARTIFACT_SOURCES, "__main__.py"])
        for name in cp_server.ARTIFACT_SOURCES:
            assert archive.read(name) == (tree.root / name).read_bytes()


def test_a_second_run_changes_nothing_and_mends_what_is_missing(tree: Tree) -> None:
    tree.make()
    before = tree.files()
    times = {path.name: path.stat().st_mtime_ns for path in tree.out.iterdir()}
    done = tree.dist()
    assert done.stdout.startswith("nothing to do\n"), done
    assert {path.name: path.stat().st_mtime_ns for path in tree.out.iterdir()} == times
    (tree.out / "setup_luks2.py").unlink()
    (tree.out / AGENT).write_bytes(b"half")
    done = tree.dist("--new-key")  # the key that is there is used
    written = [line for line in done.stdout.splitlines() if line.startswith("wrote")]
    assert written == [f"wrote {tree.out / name}" for name in ("setup_luks2.py", AGENT)]
    assert tree.files() == before


def test_the_same_sources_give_the_same_bytes(tree: Tree, tmp_path: Path) -> None:
    tree.make()
    (tmp_path / "other").mkdir()
    other = Tree(tmp_path / "other")
    for path in other.root.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    other.make()
    for name in (*cp_server.ARTIFACTS, *cp_server.SCRIPTS):
        assert (tree.out / name).read_bytes() == (other.out / name).read_bytes()
    assert (tree.out / "release.pub").read_bytes() != (other.out / "release.pub").read_bytes()


def test_the_next_version_replaces_the_last(tree: Tree) -> None:
    tree.make()
    tree.raise_version("0.10.0")  # as numbers, not as text
    assert tree.dist().returncode == 0
    assert tree.verify()["version"] == "0.10.0"


# Refusals: what lies there stays as it is


@pytest.mark.parametrize("name", ["agent.py", "setup_luks2.py", "proto/openinfra_pb2.py"])
def test_a_version_never_changes(tree: Tree, name: str) -> None:
    tree.make()
    before = tree.files()
    with (tree.root / name).open("a") as file:
        file.write("# changed\n")
    check_failed(tree.dist(), EXIT_PROTECT, "other bytes", "higher VERSION")
    assert tree.files() == before


def test_an_older_version(tree: Tree) -> None:
    tree.make()
    before = tree.files()
    tree.raise_version("0.0.9")
    check_failed(tree.dist(), EXIT_PROTECT, "newer than 0.0.9")
    assert tree.files() == before


def test_another_key(tree: Tree) -> None:
    tree.make()
    before = tree.files()
    tree.key.unlink()
    tree.raise_version("0.2.0")
    check_failed(tree.dist("--new-key"), EXIT_PROTECT, "another key", "pinned")
    assert tree.files() == before


def test_a_damaged_list(tree: Tree) -> None:
    tree.make()
    (tree.out / "release.json").write_bytes(b"{")
    check_failed(tree.dist(), EXIT_PROTECT, "release.json cannot be read")


@pytest.mark.parametrize("name", [*cp_server.ARTIFACT_SOURCES, *cp_server.SCRIPTS])
def test_a_file_that_is_missing(tree: Tree, name: str) -> None:
    (tree.root / name).unlink()
    # Without its stubs the program itself does not start.
    done = tree.dist("--new-key")
    assert done.returncode == EXIT_ERROR
    assert name in done.stderr or name.startswith("proto/")
    assert not tree.out.exists()


def test_two_versions_in_one_tree(tree: Tree) -> None:
    text = (tree.root / "agent.py").read_text()
    (tree.root / "agent.py").write_text(text.replace('VERSION = "0', 'VERSION = "7', 1))
    check_failed(tree.dist("--new-key"), EXIT_ERROR, "of two versions")


def test_keys_that_are_none(tree: Tree, tmp_path: Path) -> None:
    check_failed(tree.dist(), EXIT_ERROR, str(tree.key), "--new-key")
    tree.key.write_bytes(b"not a key")
    tree.key.chmod(0o644)
    check_failed(tree.dist("--new-key"), EXIT_PROTECT, "chmod 600")
    tree.key.chmod(0o600)
    check_failed(tree.dist("--new-key"), EXIT_ERROR, "openssl")
    assert tree.key.read_bytes() == b"not a key"  # never overwritten
    tree.key.unlink()
    argv = ["openssl", "genpkey", "-algorithm", "x25519", "-out", str(tree.key)]
    subprocess.run(argv, check=True)
    tree.key.chmod(0o600)
    check_failed(tree.dist(), EXIT_ERROR, "no Ed25519 key")
    tree.key.unlink()
    tree.key.parent.rmdir()
    check_failed(tree.dist("--new-key"), EXIT_ERROR, "cannot write", "make its directory")
    assert not tree.out.exists()


def test_a_full_disk_leaves_the_last_release(tree: Tree) -> None:
    tree.make()
    tree.raise_version("0.2.0")
    before = tree.files()
    size = f"size={sum(map(len, before.values())) // 1024 + 64}k"  # for one release, not for two
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(tree.out)], check=True)
    try:
        for name, data in before.items():
            (tree.out / name).write_bytes(data)
        check_failed(tree.dist(), EXIT_ERROR, "No space left on device")
        assert tree.files() == before
    finally:
        subprocess.run(["umount", str(tree.out)], check=True)


def test_two_at_a_time(tree: Tree) -> None:
    tree.make()
    tree.raise_version("0.2.0")
    with cp_server.hold_directory(tree.out):
        check_failed(tree.dist(), EXIT_LATER, "another command writes")
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(tree.dist().returncode)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) <= {0, EXIT_LATER}
    assert 0 in results
    assert tree.verify()["version"] == "0.2.0"


def test_kill_9_at_any_time_and_then_the_same_command(tree: Tree) -> None:
    """What lies there is never a release.json whose signature is of another, once it is over."""
    tree.make()
    script = [sys.executable, str(tree.root / "cp_server.py"), "dist", f"--env-file={os.devnull}"]
    argv = [*script, f"--out={tree.out}", f"--key={tree.key}"]
    for number in range(1, 9):
        for name in ("agent.py", "cp_server.py"):
            text = (tree.root / name).read_text().splitlines()
            at = next(i for i, line in enumerate(text) if line.startswith("VERSION = "))
            text[at] = f'VERSION = "0.{number + 1}.0"'
            (tree.root / name).write_text("\n".join(text) + "\n")
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as child:
            until = tree.out / ".new" / ("release.json.sig" if number % 2 else "")
            while child.poll() is None and not until.exists():
                time.sleep(0.001)
            child.kill()
        done = tree.dist()
        assert done.returncode == 0, done.stderr
        assert tree.verify()["version"] == f"0.{number + 1}.0"
        assert set(tree.files()) == NAMES


# It runs


def test_the_artifact_on_debians_python(tree: Tree, tmp_path: Path) -> None:
    """As root runs it on a host: /usr/bin/python3 and Debian's packages, from any directory."""
    tree.make()
    path = tmp_path / "openinfra-agent"
    shutil.copy(tree.out / AGENT, path)
    assert path.read_bytes().startswith(b"#!/usr/bin/python3 -I\n")
    clean = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

    def run(*words: str) -> Done:
        return subprocess.run(
            [str(path), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
            env=clean,
        )

    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "The OpenInfra agent." in done.stdout
    done = run("--version")
    assert (done.returncode, done.stdout.split()[-1]) == (0, cp_server.VERSION)
    done = run("run", "--nonsense")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


class PackedAgent(Agent):
    """An agent that is the one file of a release."""

    packed = Path()

    def argv(self, command: str, *more: str) -> list[str]:
        argv = super().argv(command, *more)
        script = argv.index(str(self.scripts / "agent.py"))
        return [str(self.packed), *argv[script + 1 :]]


def test_the_artifact_joins_a_real_control_plane(
    tree: Tree, cp: ControlPlane, tmp_path: Path, make_agent: Callable[..., Agent]
) -> None:
    tree.make()
    token = cp.mint(payout_pubkey=WALLET)
    agent = PackedAgent(tmp_path / "host", f"127.0.0.1:{cp.grpc_port}", token)
    agent.packed = tree.out / AGENT
    agent.start()
    try:
        wait_for("online", lambda: [h for h in cp.hosts() if h["status"] == "online"])
        assert agent.status()["state"] == "running"
        agent.restart()
        agent.process.wait_log("INFO resuming with persisted host_id")
        assert agent.process.stop() == 0
        assert "Traceback" not in agent.log
    finally:
        agent.process.stop()
    cp.check_invariants()
