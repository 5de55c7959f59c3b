"""Copies of the scripts that fail where and how a test says: the test build.

The scripts as they are shipped have an empty `failpoint` and refuse to start when
OPENINFRA_FAILPOINT is set. `build` makes a directory of copies in which BODY takes its place.
What the variable says: `name=action`, several with commas; an action is
  kill         SIGKILL to itself
  stop         SIGSTOP to itself
  eio, enospc  OSError, as from a disk
  lose         the control plane drops the reply of a call (the caller is told UNAVAILABLE)
and may be followed by `@3`: only at the third pass; or `%30`: at 30 of 100 passes, drawn by
OPENINFRA_SEED, so that a run can be repeated.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Every failpoint, in the order in which a host comes to it; test_failpoints.py compares.
AGENT = (
    "start.before_identity",
    "start.after_identity",
    "Register.before_send",
    "Register.after_reply",
    "session.after_save",
    "Heartbeat.before_send",
    "Heartbeat.after_reply",
    "scrub.before",
    "scrub.after",
    "Resume.before_send",
    "Resume.after_reply",
)
CP = (
    "Register.before_commit",
    "Register.after_commit",
    "Resume.before_commit",
    "Resume.after_commit",
    "Heartbeat.before_commit",
    "Heartbeat.after_commit",
    "http.after_commit",
)
PLACER = ("place.before_commit",)  # passed only where a customer has a workload
KNOWN = {"agent.py": AGENT, "cp_server.py": (*CP, *PLACER)}

# What takes the place of the two functions; in the copy `os`, `re`, `log`, … are there.
BODY = """
_FAILPOINTS = {names!r}
_PASSES: dict[str, int] = {{}}


def failpoint(name: str) -> None:
    if name not in _FAILPOINTS:
        raise SystemExit(f"tests/failpoints.py does not know {{name}}")
    count = _PASSES[name] = _PASSES.get(name, 0) + 1
    action, at, share = _read_failpoints().get(name, ("", "", ""))
    draw = f"{{os.environ.get('OPENINFRA_SEED', '')}} {{name}} {{count}}".encode()
    if not action or (at and int(at) != count) or (share and zlib.crc32(draw) % 100 >= int(share)):
        return
    log("WARN", "failpoint", name=name, action=action, passed=count)
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    elif action == "lose":
        raise Refusal("TRY_LATER", "the reply was lost by a failpoint", "try again")
    else:
        code = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(code, os.strerror(code))


def _read_failpoints() -> dict[str, tuple[str, str, str]]:
    found = {{}}
    for item in filter(None, os.environ.get("OPENINFRA_FAILPOINT", "").split(",")):
        form = r"([\\w.]+)=(kill|stop|eio|enospc|lose)(?:@([0-9]+)|%([0-9]+))?"
        match = re.fullmatch(form, item)
        if match is None or match[1] not in _FAILPOINTS:
            raise SystemExit(f"OPENINFRA_FAILPOINT: {{item!r}} is not name=action[@n|%n]")
        found[match[1]] = (match[2], match[3] or "", match[4] or "")
    return found


def check_failpoints() -> None:
    _read_failpoints()
"""
STUB = re.compile(r"\ndef failpoint\(.*?(?=\n\n\n(?!def check_failpoints))", re.DOTALL)


def build(directory: Path) -> Path:
    """Make the copies in a directory that does not exist yet; give it back."""
    directory.mkdir(parents=True)
    shutil.copytree(ROOT / "proto", directory / "proto", ignore=shutil.ignore_patterns("*cache*"))
    for name, names in KNOWN.items():
        source = (ROOT / name).read_text()
        before, after = STUB.split(source)
        target = directory / name
        target.write_text(before + BODY.format(names=names) + after)
        target.chmod(0o755)
    return directory
