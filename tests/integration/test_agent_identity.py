"""A spoiled identity of a host that was online: refused, kept, and never replaced by a new one.

The env file has an invite that is still worth a host, so that a new identity would show.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import RUNTIMES, Host, make_host
from tests.harness import ControlPlane, Postgres, serving

__all__ = ["make_host"]

HEX = "ab" * 32
# What may stand in the place of each value, beside nothing at all.
WRONG: dict[str, list[Any]] = {
    "format": [None, "1", 1.0, True, 0, -1, [1]],
    "host_secret": [None, "", HEX[1:], HEX + "0", HEX.upper(), 5, [HEX], {}],
    "host_id": [None, "", "x", 7, HEX, ["x"]],
    "invite_id": ["", "x", 7, "ABCDEFGHIJ234567", []],
    "session": [None, "", HEX[1:], 7, {}],
    "next_session": ["", HEX[1:], 7, False],
}


@pytest.fixture(scope="module")
def cp(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for the hosts of this file."""
    with serving(postgres, tmp_path_factory.mktemp("cp"), "--heartbeat-s=1") as made:
        yield made


def list_broken(good: bytes, draw: random.Random) -> dict[str, bytes]:
    """Contents that no agent wrote; these are moved aside."""
    data = json.loads(good)
    found = {f"cut to {n}": good[:n] for n in (0, 1, *draw.sample(range(2, len(good) - 2), 4))}
    found |= {
        "zeros": bytes(len(good)),
        "a zeroed end": good[:256] + bytes(len(good) - 256),
        "random": draw.randbytes(300),
        "text": b"hello\n",
        "a list": b"[]\n",
        "a number": b"7\n",
        "deep": b"[" * 4000,
        "other JSON": b'{"reason": "x"}\n',
        "twice": good * 2,
        "one key more": json.dumps({**data, "extra": 1}).encode(),
        "huge": good + b" " * 50_000_000,
    }
    for key, values in WRONG.items():
        missing = {name: value for name, value in data.items() if name != key}
        found[f"no {key}"] = json.dumps(missing).encode()
        value = draw.choice(values)
        found[f"{key}={value!r}"] = json.dumps({**data, key: value}).encode()
    return found


def write_symlink(path: Path, good: bytes) -> None:
    path.with_name("elsewhere").write_bytes(good)
    path.with_name("elsewhere").chmod(0o600)
    path.symlink_to("elsewhere")


def write_owned(path: Path, good: bytes) -> None:
    path.write_bytes(good)
    path.chmod(0o600)
    os.chown(path, 65_534, -1)


def write_open(path: Path, good: bytes) -> None:
    path.write_bytes(good)
    path.chmod(0o604)


def write_newer(path: Path, good: bytes) -> None:
    path.write_bytes(json.dumps({**json.loads(good), "format": 2}).encode())
    path.chmod(0o600)


# What is in doubt stays where it is, for a person to look at.
DOUBTFUL: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "symlink": (write_symlink, "not a plain file"),
    "dangling symlink": (lambda path, _: path.symlink_to("nowhere"), "not a plain file"),
    "device": (lambda path, _: path.symlink_to("/dev/zero"), "not a plain file"),
    "directory": (lambda path, _: path.mkdir(), "not a plain file"),
    "FIFO": (lambda path, _: os.mkfifo(path, 0o600), "not a plain file"),
    "owner": (write_owned, "run: chown"),
    "mode": (write_open, "run: chmod 0600"),
    "newer": (write_newer, "is of a newer agent: format 2"),
}


def make_online(cp: ControlPlane, make_host: Callable[..., Host], python: str) -> tuple[Host, str]:
    """A host that was online, and an unspent invite, which now stands in its env file."""
    host, token = make_host(cp, python), cp.mint()
    host.go_on()
    assert host.agent.process.stop() == 0
    text = host.agent.env_file.read_text()
    used = f"oi1_{host.token.split('_')[1]}_used"
    assert used in text
    host.agent.env_file.write_text(text.replace(used, token))
    return host, token


def check_heals(host: Host, good: bytes, token: str) -> None:
    """With its identity put back, the host is the same; the invite is as good as before."""
    host.identity.write_bytes(good)
    host.identity.chmod(0o600)
    used = f"oi1_{host.token.split('_')[1]}_used"
    host.agent.env_file.write_text(host.agent.env_file.read_text().replace(token, used))
    sql = "SELECT consumed_at, host_id FROM invites WHERE invite_id = %s"
    rows = host.cp.query(sql, token.split("_")[1])
    assert rows == [{"consumed_at": None, "host_id": None}]
    for path in host.agent.data.glob("*"):
        if path.name not in ("identity.json", "agent.lock"):
            path.unlink()
    host.go_on()
    assert host.agent.process.stop() == 0
    host.cp.check_invariants()


def start_refused(host: Host) -> str:
    """Start the agent, which must end with 78 and one line; give it back."""
    argv = host.agent.argv("run", "--allow-unencrypted")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    start, last = done.stderr.splitlines()
    assert start.startswith("INFO agent starting")
    assert last.startswith("ERROR "), last
    assert " ; " in last
    return last


def test_a_spoiled_identity_is_refused_and_kept(
    cp: ControlPlane, make_host: Callable[..., Host], seed: str
) -> None:
    draw = random.Random(seed)
    host, token = make_online(cp, make_host, RUNTIMES[0])
    good, hosts = host.identity.read_bytes(), len(cp.hosts())
    for n, (name, raw) in enumerate(list_broken(good, draw).items(), 1):
        host.agent.python = draw.choice(RUNTIMES)
        host.identity.write_bytes(raw)
        host.identity.chmod(0o600)
        aside = host.agent.data / f"identity.json.broken-{n}"
        assert f"is now {aside} ; restore it, or ask for a fresh invite" in start_refused(host), (
            name
        )
        assert aside.read_bytes() == raw, name
        assert not os.path.lexists(host.identity), name
    for name, (write, said) in DOUBTFUL.items():
        write(host.identity, good)
        before = host.identity.lstat()
        assert said in start_refused(host), name
        after = host.identity.lstat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), name
        if host.identity.is_dir():
            host.identity.rmdir()
        else:
            host.identity.unlink()
    assert len(cp.hosts()) == hosts
    check_heals(host, good, token)


def test_a_secret_that_was_changed_makes_no_host(
    cp: ControlPlane, make_host: Callable[..., Host]
) -> None:
    """A digit of it: nothing shows that here, but the control plane knows no such host."""
    host, token = make_online(cp, make_host, RUNTIMES[0])
    good, hosts = host.identity.read_bytes(), len(cp.hosts())
    secret = json.loads(good)["host_secret"]
    changed = ("0" if secret[0] != "0" else "1") + secret[1:]
    host.identity.write_bytes(good.replace(secret.encode(), changed.encode()))
    host.start()
    host.agent.process.wait_log("ERROR control plane knows no host with this identity")
    assert host.agent.process.stop() == 0
    assert json.loads(host.identity.read_bytes())["host_secret"] == changed
    assert len(cp.hosts()) == hosts
    check_heals(host, good, token)


def test_the_files_of_two_hosts_mixed(cp: ControlPlane, make_host: Callable[..., Host]) -> None:
    """As after a torn write: the first lines are one host's, the others another's."""
    one, _ = make_online(cp, make_host, RUNTIMES[0])
    other, token = make_online(cp, make_host, RUNTIMES[1])
    hosts, other_good = len(cp.hosts()), other.identity.read_bytes()
    first, second = one.identity.read_bytes().splitlines(True), other_good.splitlines(True)
    # The other's host_id with this one's secret: the control plane's answer names this one.
    one.identity.write_bytes(b"".join(first[:3] + second[3:]))
    one.start()
    assert one.wait_end() == 78, one.said
    last = one.said.splitlines()[-1]
    assert last.startswith(f"ERROR control plane says that this is host {one.host_id} ; ")
    # Only the other's invite and session: this one's secret makes it this host.
    one.identity.write_bytes(b"".join(first[:4] + second[4:]))
    one.start()
    one.agent.process.wait_log(f"(skipping Register) host_id={one.host_id}")
    one.wait_beats()
    assert one.read_status() == "online"
    assert one.agent.process.stop() == 0
    assert len(cp.hosts()) == hosts
    check_heals(other, other_good, token)
