"""README.md: its generated tables are fresh, and it names nothing of the machine it was made on."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

from tests import readme_tables
from tests.readme_tables import ROOT, list_files, list_ports, list_sentences


def test_the_generated_tables_are_fresh() -> None:
    readme = (ROOT / "README.md").read_text()
    fresh = readme_tables.insert_tables(readme)
    assert readme == fresh, "run: python -m tests.readme_tables --write"


DAEMONS = ("agent.py", "cp_server.py")


@pytest.mark.parametrize("script", readme_tables.SCRIPTS)
def test_every_line_of_the_files_section_became_a_row(script: str) -> None:
    lines = list(readme_tables.section(readme_tables.read_docstring(script), "Files"))
    starts = [line for line in lines if re.match(r" {2,4}[/~a-z]", line)]
    assert len(list_files(script)) == len(starts)
    assert bool(list_ports(script)) == (script in DAEMONS)


@pytest.mark.parametrize("script", readme_tables.SCRIPTS)
def test_every_error_says_what_to_do(script: str) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / script).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in readme_tables.CALLS
    ]
    for call in calls:
        first = readme_tables.CALLS[call.func.id] if isinstance(call.func, ast.Name) else 0
        assert len(call.args) >= first + 2, f"{script}:{call.lineno}"
    rows = list_sentences(script)
    assert len(rows) > (50 if script in DAEMONS else 20)
    for what, todo in rows:
        assert not what.endswith("."), what
        assert todo, what


def test_a_sentence_in_a_variable_is_found() -> None:
    rows = list_sentences("cp_server.py")
    assert ("the body is not JSON", "send Content-Type: application/json") in rows
    assert ("no such host", "list them: GET /api/v1/admin/hosts") in rows
    assert ("this request takes no body", "send none") in rows


def test_no_committed_file_names_this_machine() -> None:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = re.compile(
        r"/work/" + r"main|/root/work|pypi\.org|deb\.debian\.org|files\.python" + "hosted"
    )
    for name in done.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and name != "tests/unit/test_readme.py":
            found = words.search(path.read_text(errors="replace"))
            assert not found, f"{name}: {found}"
