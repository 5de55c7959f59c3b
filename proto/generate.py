#!/usr/bin/env python3
"""Generate the Python stubs of proto/openinfra.proto, or check that they are up to date.

    proto/generate.py            write the four openinfra_pb2* files beside this script
    proto/generate.py --check    write them elsewhere, name those that differ, change nothing

The generator is old on purpose: its stubs load with Debian 12's own python3-protobuf and
python3-grpcio as well as with the newest from PyPI. It is pinned, with the hashes of its files, in
proto/requirements.txt, and lives in a virtualenv of its own under ~/.cache/openinfra, which the
first run makes. Later runs need no network.

Needs: Python 3.8 to 3.12 (the pinned generator has no files for later ones) with its venv module:
Debian's python3-venv. Runs: python -m venv, pip install, python -m grpc_tools.protoc.
Exit codes: 0; 1 error, or --check found a stale file; 2 usage.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "proto" / "requirements.txt"
SOURCE = "proto/openinfra.proto"
STUBS = (
    "openinfra_pb2.py",
    "openinfra_pb2.pyi",
    "openinfra_pb2_grpc.py",
    "openinfra_pb2_grpc.pyi",
)
# The generator's files on PyPI end with this version of Python.
NEWEST_PYTHON = (3, 12)


# ---------------------------------------------------------------------------------------------
# Copied helpers: word for word as in the other scripts; a test compares them. Some run commands.
# ---------------------------------------------------------------------------------------------


class Error(Exception):
    """What failed and why, what to do about it, and the exit code that `main` gives back."""

    def __init__(self, what: str, todo: str, exit_code: int = 1, **pairs: object) -> None:
        super().__init__(f"{what}; {todo}")
        self.what = what
        self.todo = todo
        self.exit_code = exit_code
        self.pairs = pairs


def run(argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30, echo: bool = True) -> str:
    """Run one command without a shell, give back its stdout; raise Error when it fails."""
    if echo:
        print("+ " + shlex.join(argv), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Error(f"{argv[0]} is not installed", "install it and run this again") from None
    except OSError as error:
        raise Error(f"{argv[0]} does not start: {error.strerror}", "mend that") from None
    except subprocess.TimeoutExpired:
        raise Error(f"{argv[0]} gave no answer for {timeout_s:g} s", "run it by hand") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().replace("\n", " / ")
        what = f"{shlex.join(argv)} ended with {done.returncode}: {said}"
        raise Error(what, "mend that and run this again")
    return done.stdout.decode(errors="replace")


def read_cache_directory() -> Path:
    """Where OpenInfra keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openinfra"


def ensure_pinned_virtualenv(requirements: Path, name: str) -> Path:
    """Give back the Python of a virtualenv with exactly these hash-pinned packages; make it once.

    One that was not finished has no stamp and is made anew; a lock keeps a second maker waiting.
    """
    pins = requirements.read_bytes()
    key = hashlib.sha256(pins + sys.version.encode() + sys.executable.encode()).hexdigest()[:16]
    directory = read_cache_directory() / f"{name}-{key}"
    python = directory / "bin" / "python"
    stamp = directory / "complete"
    if stamp.exists():
        return python
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            shutil.rmtree(directory, ignore_errors=True)
            run([sys.executable, "-m", "venv", str(directory)], timeout_s=120)
            install = [str(python), "-m", "pip", "install", "--quiet", "--require-hashes"]
            install += ["--only-binary=:all:", "-r", str(requirements)]
            run(install, timeout_s=900)
            stamp.touch()
    return python


# ---------------------------------------------------------------------------------------------
# Generate: runs the generator into a directory.
# ---------------------------------------------------------------------------------------------


def ensure_generator() -> Path:
    """Give back the Python that has the generator."""
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        mine = f"this is Python {sys.version_info[0]}.{sys.version_info[1]}"
        raise Error(
            f"the pinned generator needs Python {newest} or older, {mine}",
            f"run: python{newest} proto/generate.py",
        )
    return ensure_pinned_virtualenv(REQUIREMENTS, "proto")


def generate(python: Path, out: Path) -> None:
    """Write the stubs into `out`, under the same path as the source has below the root."""
    outputs = ("python", "grpc_python", "mypy", "mypy_grpc")
    options = {"mypy": "quiet:", "mypy_grpc": "quiet:"}
    argv = [str(python), "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{ROOT}"]
    for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        argv.append(f"--plugin={plugin}={python.parent / plugin}")
    argv += [f"--{name}_out={options.get(name, '')}{out}" for name in outputs]
    run([*argv, str(ROOT / SOURCE)], timeout_s=120, echo=False)


def read_stale(made: Path) -> list[str]:
    """Names of the committed stubs that are missing or not what was made now."""
    stale = []
    for name in STUBS:
        committed = ROOT / "proto" / name
        if not committed.exists() or committed.read_bytes() != (made / name).read_bytes():
            stale.append(f"proto/{name}")
    return stale


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="name stale stubs, change nothing")
    options = parser.parse_args(argv)
    try:
        python = ensure_generator()
        with tempfile.TemporaryDirectory(prefix="openinfra-proto-") as temporary:
            generate(python, Path(temporary))
            made = Path(temporary) / "proto"
            stale = read_stale(made)
            if options.check and stale:
                raise Error(f"not what {SOURCE} gives: {' '.join(stale)}", "run proto/generate.py")
            for name in stale:
                shutil.copyfile(made / Path(name).name, ROOT / name)
                print(f"wrote {name}")
    except Error as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return error.exit_code
    print("the stubs are up to date" if not stale else f"{len(stale)} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
