"""The test build: the shipped scripts refuse failpoints, their copies fail as they are told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import failpoints
from tests.failpoints import KNOWN, ROOT, build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test build."""
    return build(tmp_path_factory.mktemp("build") / "scripts")


def run(code: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a directory, with what `import` finds there."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("script", KNOWN)
def test_the_table_names_every_failpoint(script: str) -> None:
    found = re.findall(r'\bfailpoint\(f?"([^"]+)"\)', (ROOT / script).read_text())
    methods = ("Register", "Resume", "Heartbeat")
    names = [name.replace("{name}", m) for name in found for m in methods]
    assert sorted(set(names)) == sorted(KNOWN[script])
    assert len(found) == len(set(found))


@pytest.mark.parametrize("script", KNOWN)
def test_a_shipped_script_refuses_failpoints(script: str) -> None:
    argv = [sys.executable, str(ROOT / script), "doctor"]
    environment = {**os.environ, "OPENINFRA_FAILPOINT": "Register.after_commit=kill"}
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    said = "ERROR OPENINFRA_FAILPOINT is set, and this is no test build ; unset it\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("script", KNOWN)
@pytest.mark.parametrize("wanted", ["x=kill", "{name}=explode", "{name}", "{name}=kill@", "a b"])
def test_a_mistyped_failpoint_ends_the_copy(built: Path, script: str, wanted: str) -> None:
    text = wanted.replace("{name}", KNOWN[script][0])
    code = f"import {script[:-3]} as script; script.check_failpoints()"
    done = run(code, built, OPENINFRA_FAILPOINT=text)
    assert done.returncode == 1
    assert repr(text) in done.stderr


PASS = "import {module} as script\nfor n in range(1, 101):\n    print(n, flush=True)\n"


@pytest.mark.parametrize(
    ("action", "code", "passed"),
    [
        ("kill", -signal.SIGKILL, 1),
        ("kill@3", -signal.SIGKILL, 3),
        ("eio", 1, 1),
        ("enospc@7", 1, 7),
        ("lose@2", 1, 2),
        ("kill@101", 0, 100),
    ],
)
def test_a_copy_fails_at_the_pass(built: Path, action: str, code: int, passed: int) -> None:
    name = failpoints.CP[0]
    text = PASS.format(module="cp_server") + f"    script.failpoint({name!r})\n"
    done = run(text, built, OPENINFRA_FAILPOINT=f"{name}={action}")
    assert (done.returncode, done.stdout.split()[-1]) == (code, str(passed)), done.stderr
    for word, said in (("eio", "Input/output"), ("enospc", "No space"), ("lose", "TRY_LATER")):
        assert word not in action or said in done.stderr or "Refusal" in done.stderr


def test_a_share_is_drawn_by_the_seed(built: Path) -> None:
    name = failpoints.CP[1]
    text = PASS.format(module="cp_server")
    text += f"    try:\n        script.failpoint({name!r})\n    except script.Refusal:\n"
    text += "        print('lost')\n"

    def draw(seed: str) -> str:
        asked = {"OPENINFRA_FAILPOINT": f"{name}=lose%30", "OPENINFRA_SEED": seed}
        return run(text, built, **asked).stdout

    first = draw("7")
    assert 15 <= first.count("lost") <= 45
    assert draw("7") == first
    assert draw("8") != first
