"""The generated tables of README.md: what each script touches, and all that it may say.

    python -m tests.readme_tables --write     puts fresh tables into README.md

Files and ports come from the scripts' docstrings, the sentences from their source: each call of
Error, Refusal, HostReason and each row of `doctor` holds what is wrong and what to do.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("cp_server.py", "agent.py", "setup_luks2.py", "install_agent.py", "systemd/setup_cp.py")
# Calls that hold a sentence: at which argument it begins; what to do follows.
CALLS = {"Error": 0, "HostReason": 0, "Refusal": 1}
LEVELS = ("ERROR", "WARN", "INFO")


def read_docstring(script: str) -> str:
    """The manual at the top of a script."""
    return ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""


def list_files(script: str) -> list[tuple[str, str, str]]:
    """Rows (path, mode, what for) of the section `Files`; a deeper line names its directory."""
    rows: list[tuple[str, str, str]] = []
    directory = ""
    for line in section(read_docstring(script), "Files"):
        match = re.match(r"(\s+)(\S+)\s{2,}(?:(\d{4})\s\s)?\s*(\S.*)", line)
        if match and len(match[1]) <= 4:
            path = match[2]
            path = directory + path if len(match[1]) == 4 else path
            directory = path if path.endswith("/") else directory
            rows.append((path, match[3] or "", match[4]))
        elif rows and re.match(r"\s{20,}", line):
            path, mode, text = rows[-1]
            rows[-1] = (path, mode, f"{text} {line.strip()}")
    return rows


def list_ports(script: str) -> list[tuple[str, str]]:
    """Rows (address:port/protocol, what for) of the section `Ports`."""
    found = []
    for line in section(read_docstring(script), "Ports"):
        match = re.match(r"\s+(\S+:\d+/\w+)\s+(\S.*)", line)
        if match:
            found.append((match[1], match[2]))
    return found


def section(docstring: str, title: str) -> Iterator[str]:
    """The indented lines under a title."""
    is_inside = False
    for line in docstring.splitlines():
        if re.match(r"\S", line):
            is_inside = line.split(" ")[0] == title
        elif is_inside:
            yield line


def list_sentences(script: str) -> list[tuple[str, str]]:
    """Every (what is wrong, what to do) that a script may say, in the order of its source."""
    tree = ast.parse((ROOT / script).read_text())
    found: dict[tuple[str, str], None] = {}
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for scope in [tree, *functions]:
        for node in own_nodes(scope):
            pair = read_pair(node)
            if pair is None:
                continue
            for what in spell(pair[0], scope, node.lineno):
                for todo in spell(pair[1], scope, node.lineno):
                    if what.strip("<>") and not re.fullmatch(r"<[^<>]*>", what):
                        found[what, todo] = None
    return list(found)


def own_nodes(scope: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a scope without those of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.expr):
            yield child
        yield from own_nodes(child)


def read_pair(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """The two expressions of a sentence, if this expression makes one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        first = CALLS[node.func.id]
        if len(node.args) > first + 1:
            return node.args[first], node.args[first + 1]
    if isinstance(node, ast.Tuple) and len(node.elts) == 4:
        level = node.elts[1]
        if isinstance(level, ast.Constant) and level.value in LEVELS:
            return node.elts[2], node.elts[3]
    return None


def spell(node: ast.expr, scope: ast.AST, line: int) -> list[str]:
    """The texts that an expression may give; `<name>` stands for what is filled in."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(spell_part(part) for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*spell(node.body, scope, line), *spell(node.orelse, scope, line)]
    if isinstance(node, ast.Name):
        value = last_value(node.id, scope, line)
        if value is not None:
            return spell(value, scope, line)
    return [f"<{shorten(node)}>"]


def spell_part(part: ast.expr) -> str:
    """One piece of an f-string."""
    if isinstance(part, ast.FormattedValue):
        return f"<{shorten(part.value)}>"
    return str(part.value) if isinstance(part, ast.Constant) else ""


def shorten(node: ast.expr) -> str:
    """A name for a filled-in value."""
    text = ast.unparse(node)
    words = re.findall(r"[a-z_]{3,}", re.sub(r"[([].*", "", text.rpartition(".")[2]).lower())
    return (words[-1] if words else "…").replace("_", " ").strip()


def last_value(name: str, scope: ast.AST, line: int) -> ast.expr | None:
    """What was assigned to a name last before a line, in this scope."""
    found: list[tuple[int, ast.expr]] = []
    for node in ast.walk(scope):
        if not isinstance(node, ast.Assign) or node.lineno > line:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        else:
            pairs = [(target, value)]
        found += [(node.lineno, v) for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return re.sub(r"([|<>*_])", r"\\\1", " ".join(text.split()))


def render_touches() -> str:
    """The table of files and ports."""
    lines = ["| script | file or port | mode | what for |", "|---|---|---|---|"]
    for script in SCRIPTS:
        for path, mode, text in list_files(script):
            lines.append(f"| {script} | `{path}` | {mode} | {cell(text)} |")
        for port, text in list_ports(script):
            lines.append(f"| {script} | `{port}` | | {cell(text)} |")
    return "\n".join(lines)


def render_sentences() -> str:
    """The table of everything that a person may be told."""
    lines = ["| script | what it says | what to do |", "|---|---|---|"]
    for script in SCRIPTS:
        lines += [f"| {script} | {cell(a)} | {cell(b)} |" for a, b in list_sentences(script)]
    return "\n".join(lines)


TABLES = {"touches": render_touches, "sentences": render_sentences}


def insert_tables(readme: str) -> str:
    """README.md with fresh tables between its markers."""
    for name, render in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = before + begin + render() + end + after
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    fresh = insert_tables(path.read_text())
    if sys.argv[1:] == ["--write"]:
        path.write_text(fresh)
    else:
        print(fresh)
