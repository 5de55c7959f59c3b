"""The rules of the code base that ruff cannot check: budgets, and no shell."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lines of a file. Raised only by a change that says why.
BUDGETS = {
    "agent.py": 5_630,
    "cp_server.py": 12_520,
    "install_agent.py": 1970,
    "setup_luks2.py": 1205,
    "systemd/openinfra_wg.py": 310,
    "systemd/setup_cp.py": 1350,
}
MAX_FUNCTION_LINES = 70
SHELLS = {
    "asyncio.create_subprocess_shell",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
# Not written by hand.
GENERATED = {"proto/openinfra_pb2.py", "proto/openinfra_pb2_grpc.py"}


def list_sources() -> list[str]:
    """Give back the path of every Python file of ours, from the root."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    visible = {str(path) for path in found if not any(part[0] == "." for part in path.parts)}
    return sorted(visible - GENERATED | {"tests/run"})


def find_long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines"


def find_shells(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SHELLS:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                if f"{node.module}.{name.name}" in SHELLS:
                    yield f"line {node.lineno}: {node.module}.{name.name}"
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            value = ast.unparse(node.value)
            if value != "False":
                yield f"line {node.value.lineno}: shell={value}"


@pytest.mark.parametrize("name", list_sources())
def test_functions_are_short_and_use_no_shell(name: str) -> None:
    source = (ROOT / name).read_text()
    assert [*find_long_functions(source), *find_shells(source)] == []


def test_files_are_within_their_budgets() -> None:
    lengths = {
        name: len((ROOT / name).read_text().splitlines())
        for name in BUDGETS
        if (ROOT / name).exists()
    }
    assert {name: length for name, length in lengths.items() if length > BUDGETS[name]} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("subprocess.run(x, shell=True)", ["line 1: shell=True"]),
        ("subprocess.run(x, shell=flag)", ["line 1: shell=flag"]),
        ("subprocess.run(x, shell=False)", []),
        ("import os\nos.system('x')", ["line 2: os.system"]),
        ("from os import system", ["line 1: os.system"]),
        ("run = subprocess.getoutput", ["line 1: subprocess.getoutput"]),
        ("'shell=True, os.system'", []),
    ],
)
def test_a_shell_is_found(source: str, found: list[str]) -> None:
    assert list(find_shells(source)) == found


@pytest.mark.parametrize(("lines", "found"), [(70, []), (71, ["line 1: f has 71 lines"])])
@pytest.mark.parametrize("start", ["def", "async def"])
def test_a_long_function_is_found(start: str, lines: int, found: list[str]) -> None:
    source = f"{start} f():\n" + "    pass\n" * (lines - 1)
    assert list(find_long_functions(source)) == found


@pytest.mark.parametrize(
    "name",
    ["install_agent.py", "setup_luks2.py", "systemd/setup_cp.py", "systemd/openinfra_wg.py"],
)
def test_a_script_of_root_takes_no_module_from_its_directory(name: str, tmp_path: Path) -> None:
    """Somebody else may have put one beside it: `curl -O` in /tmp, then sudo."""
    script = tmp_path / Path(name).name
    shutil.copy(ROOT / name, script)
    script.chmod(0o755)
    for module in ("__future__", "argparse"):
        (tmp_path / f"{module}.py").write_text(f"open('{tmp_path}/taken', 'w')\n")
    for argv in ([str(script), "--help"], ["/usr/bin/python3", "-I", script.name, "--help"]):
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, "usage: " in done.stdout) == (0, True), done.stderr
        assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("name", ["cp_server.py", "agent.py"])
def test_help_needs_no_package(name: str, tmp_path: Path) -> None:
    """On a machine where nothing is installed; -S leaves Debian's and pip's packages away."""
    argv = ["/usr/bin/python3", "-S", str(ROOT / name)]
    for words in (["--help"], ["pilot" if name == "cp_server.py" else "status", "-h"]):
        done = subprocess.run(
            [*argv, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout) > 300
    done = subprocess.run([*argv, "status"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"ERROR {name} lacks a Python package: .* ; .*\n", done.stderr)
