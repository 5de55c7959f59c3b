"""The committed stubs are what the generator makes, and load on old and new runtimes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
STUBS = {f"proto/openinfra_pb2{end}" for end in (".py", ".pyi", "_grpc.py", "_grpc.pyi")}

# Prints the runtime's major versions, after a message and a service went through both stubs.
LOAD = """
import grpc
import google.protobuf
from proto import openinfra_pb2 as pb
from proto import openinfra_pb2_grpc as rpc

sent = pb.HeartbeatRequest(session=bytes(32), seq=1, facts=pb.Facts(hostname="a", cpu_count=2))
assert pb.HeartbeatRequest.FromString(sent.SerializeToString()) == sent
assert pb.HOST_STATUS_ONLINE == pb.HostStatus.Value("HOST_STATUS_ONLINE")
channel = grpc.insecure_channel("127.0.0.1:1")
assert rpc.AgentApiStub(channel).Heartbeat
channel.close()
assert rpc.AgentApiServicer().Heartbeat
print(google.protobuf.__version__.split(".")[0], grpc.__version__.split(".")[1])
"""


def load(python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-W", "error", "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=False
    )


def generate(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the generator with the Python for which tests/run made its virtualenv."""
    argv = [SYSTEM_PYTHON, str(root / "proto" / "generate.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.fixture
def copied_root(tmp_path: Path) -> Path:
    """Give a directory with a copy of proto/ that a test may spoil."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    return tmp_path


def read_stubs(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in STUBS if (root / name).exists()}


def test_loads_on_debians_own_packages() -> None:
    done = load(SYSTEM_PYTHON)
    assert (done.returncode, done.stderr) == (0, "")
    protobuf, grpcio = map(int, done.stdout.split())
    assert (protobuf, grpcio) < (5, 60), "this is not the old runtime that the test is for"


def test_loads_on_the_newest_packages() -> None:
    done = load(sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    protobuf, grpcio = map(int, done.stdout.split())
    # The newest whose server lives through every call: see pyproject.toml.
    assert (protobuf, grpcio) >= (7, 83), "this is not the new runtime that the test is for"


def test_committed_stubs_are_up_to_date() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spoiled", sorted(STUBS))
def test_check_names_a_stale_stub_and_changes_nothing(copied_root: Path, spoiled: str) -> None:
    with open(copied_root / spoiled, "a") as file:
        file.write("# edited by hand\n")
    before = read_stubs(copied_root)
    done = generate("--check", root=copied_root)
    assert done.returncode == 1
    assert {word.strip(";") for word in done.stderr.split() if word.strip(";") in STUBS} == {
        spoiled
    }
    assert read_stubs(copied_root) == before


def test_generate_writes_what_an_edit_of_the_source_asks_for(copied_root: Path) -> None:
    source = copied_root / "proto" / "openinfra.proto"
    source.write_text(source.read_text().replace("bool paused = 5;", "bool resting = 5;"))
    assert generate("--check", root=copied_root).returncode == 1
    assert generate(root=copied_root).returncode == 0
    assert b"resting" in read_stubs(copied_root)["proto/openinfra_pb2.pyi"]
    assert generate("--check", root=copied_root).returncode == 0


def test_generate_makes_missing_stubs(copied_root: Path) -> None:
    for name in STUBS:
        os.unlink(copied_root / name)
    assert generate(root=copied_root).returncode == 0
    assert read_stubs(copied_root) == read_stubs(ROOT)
