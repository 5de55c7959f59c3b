"""Helpers that stand in several scripts have the same text in each: they are copies.

A helper is what stands in a script's section "Copied helpers", and the names in EVERYWHERE.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "agent.py",
    "cp_server.py",
    "install_agent.py",
    "setup_luks2.py",
    "systemd/openinfra_wg.py",
    "systemd/setup_cp.py",
    "proto/generate.py",
    "tests/run",
)
EVERYWHERE = {"Error", "log", "run", "write_file", "require_root", "sd_notify"}
BANNER = re.compile(r"^# -{20,}\n# (.+)\n# -{20,}$", re.MULTILINE)


def read_definitions(source: str) -> dict[str, tuple[str, str]]:
    """Give back section and text of every function and class at the top level, by name."""
    banners = [(source.count("\n", 0, m.start()) + 1, m[1]) for m in BANNER.finditer(source)]
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            section = [title for line, title in banners if line < node.lineno]
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
            found[node.name] = (section[-1] if section else "", text)
    return found


def find_differing_copies(sources: dict[str, str]) -> list[str]:
    """Name every helper whose text is not the same in all scripts that have it."""
    scripts = {name: read_definitions(source) for name, source in sources.items()}
    helpers = EVERYWHERE | {
        name
        for definitions in scripts.values()
        for name, (section, _) in definitions.items()
        if section.lower().startswith("copied helpers")
    }
    differing = []
    for helper in sorted(helpers):
        texts = {name: found[helper][1] for name, found in scripts.items() if helper in found}
        if len(set(texts.values())) > 1:
            differing.append(f"{helper}: {', '.join(sorted(texts))}")
    return differing


def test_copies_have_the_same_text() -> None:
    sources = {name: (ROOT / name).read_text() for name in SCRIPTS if (ROOT / name).exists()}
    assert len(sources) >= 2
    assert find_differing_copies(sources) == []


COPIED = "# " + "-" * 30 + "\n# Copied helpers: x.\n# " + "-" * 30 + "\n"
OWN = "# " + "-" * 30 + "\n# Rules: x. Pure.\n# " + "-" * 30 + "\n"


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ("def run(): return 1", "def run(): return 1", []),
        ("def run(): return 1", "def run(): return 2", ["run: a, b"]),
        ("def run():\n    return 1", "def run():\n    return 1  # why", ["run: a, b"]),
        ("def mine(): return 1", "def mine(): return 2", []),
        (COPIED + "def help(): return 1", OWN + "def help(): return 2", ["help: a, b"]),
        (COPIED + OWN + "def help(): return 1", OWN + "def help(): return 2", []),
        ("@a\nclass Error: pass", "class Error: pass", ["Error: a, b"]),
    ],
)
def test_a_difference_is_found(one: str, other: str, differing: list[str]) -> None:
    assert find_differing_copies({"a": one, "b": other}) == differing
