"""tests/run: reading the README's commands, and the plugin that makes a skip fail in CI."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "<!-- command: run -->\n```sh\n./cp_server.py pilot\n```\n"
TEST = "<!-- command: test -->\n\n```\ntests/run\n```\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Give tests/run as a module."""
    loader = SourceFileLoader("tests_run", str(ROOT / "tests" / "run"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_the_readmes_commands_are_found(script: ModuleType) -> None:
    other = "```sh\n./cp_server.py hosts\n```\n"
    found = script.parse_readme(f"# Title\n\n{RUN}\nText.\n\n{other}\n{TEST}")
    assert found == {"run": "./cp_server.py pilot --check", "test": "tests/run"}


@pytest.mark.parametrize("text", ["", RUN, TEST, RUN + RUN + TEST, RUN.replace("run", "x") + TEST])
def test_a_readme_without_both_commands_is_refused(script: ModuleType, text: str) -> None:
    with pytest.raises(script.Error, match=r"README.md must mark one `run` and one `test`"):
        script.parse_readme(text)


def test_missing_packages_are_found(script: ModuleType) -> None:
    wanted = {"dpkg": "there", "openinfra-no-such-package": "not there"}
    assert script.read_missing_packages(wanted) == ["openinfra-no-such-package"]


def test_one_kind_of_run_is_chosen_at_a_time(script: ModuleType) -> None:
    options = script.parse_arguments(["--e2e", "--", "-k", "disk"])
    assert (options.e2e, options.bench, options.fresh) == (True, False, False)
    assert options.pytest_arguments == ["-k", "disk"]
    with pytest.raises(SystemExit) as refused:
        script.parse_arguments(["--e2e", "--bench"])
    assert refused.value.code == 2


def test_a_plain_run_boots_no_machines() -> None:
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {name.rpartition("/")[0] for name in files} == {"tests/unit", "tests/integration"}


@pytest.mark.parametrize(
    ("failing", "code"), [("", 0), ("--fresh", 1), ("--e2e", 1), ("--fresh --e2e", 1)]
)
def test_ci_runs_everything_whatever_failed(tmp_path: Path, failing: str, code: int) -> None:
    for name in (".ci", "tests"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    stand_in = tmp_path / "tests" / "run"
    stand_in.write_text('#!/bin/sh\necho "$1"\ncase " $FAILING " in *" $1 "*) exit 1 ;; esac\n')
    stand_in.chmod(0o755)
    env = {**os.environ, "FAILING": failing}
    ran = subprocess.run(
        [tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout.split()) == (code, ["--fresh", "--e2e"])


MAKE = """
import runpy, sys
from pathlib import Path
script = runpy.run_path(sys.argv[1])
print(script["ensure_pinned_virtualenv"](Path(sys.argv[2]), "try"))
"""


def test_a_virtualenv_whose_maker_was_killed_is_made_anew(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("")
    argv = [sys.executable, "-c", MAKE, str(ROOT / "tests" / "run"), str(requirements)]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(argv, env=env, start_new_session=True) as maker:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("openinfra/try-*/bin/python")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(maker.pid, signal.SIGKILL)
    directory = next(path for path in tmp_path.glob("openinfra/try-*") if path.is_dir())
    assert not (directory / "complete").exists()
    (directory / "left-over").touch()

    made = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == str(directory / "bin" / "python")
    assert not (directory / "left-over").exists()
    assert subprocess.run([directory / "bin" / "pip", "--version"], check=False).returncode == 0

    again = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert (again.stdout, again.stderr) == (made.stdout, ""), "it ran a command again"


# Ways to skip and to fail as expected, a file each.
WAYS = {
    "mark": "import pytest\n@pytest.mark.skip(reason='tired')\ndef test_it(): pass\n",
    "call": "import pytest\ndef test_it(): pytest.skip('tired')\n",
    "fixture": "import pytest\n@pytest.fixture\ndef f(): pytest.skip('tired')\ndef test_it(f): 0\n",
    "module": "import pytest\npytest.skip('tired', allow_module_level=True)\n",
    "xfail": "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n",
}


@pytest.mark.parametrize(
    ("plugin", "code", "counts"),
    [
        ([], 0, "4 skipped, 1 xfailed"),
        (["-p", "tests.ci_plugin"], 1, "1 failed, 1 xfailed, 3 errors"),
    ],
)
def test_a_skip_fails_in_ci_only(tmp_path: Path, plugin: list[str], code: int, counts: str) -> None:
    for name, source in WAYS.items():
        (tmp_path / f"test_{name}.py").write_text(source)
    argv = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", *plugin]
    argv += ["--continue-on-collection-errors", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, counts in done.stdout) == (code, True), done.stdout
    failures = done.stdout.count("skipped, which CI does not allow: Skipped: tired")
    assert failures >= (4 if plugin else 0)
