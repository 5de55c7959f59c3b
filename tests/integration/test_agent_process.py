"""The real agent process on both runtimes, in all that needs no control plane."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

import agent as module

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = {
    "debian": ["/usr/bin/python3", "-W", "error"],
    "pypi": [sys.executable, "-W", "error"],
}
WALLET = "4Nd1mYvL8wQ1eFvZ6h9vT2v5b3h1r7uQy5r9d3mF8x2A"
HOST_ID = "2b6f0cc9-04ef-4e5d-9f4e-3d1c5a8b7e60"
ID = "abcdefghij234567"
# Nobody listens there: RFC 863's port, below 1024.
NOWHERE = "127.0.0.1:9"

T = TypeVar("T")


def wait_for(probe: Callable[[], T], timeout_s: float = 10) -> T:
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return found


class Host:
    """One machine's directories, and the agent on them."""

    def __init__(self, directory: Path, runtime: Sequence[str]) -> None:
        body = f"oi1_{ID}_{secrets.token_urlsafe(32)}"
        self.token = f"{body}_{zlib.crc32(body.encode()):08x}"
        self.runtime = runtime
        self.env_file = directory / "agent.env"
        self.data = directory / "data"
        self.socket = directory / "run" / "agent.sock"
        self.identity = self.data / "identity.json"
        self.log_path = directory / "log"
        self.children: list[subprocess.Popen[bytes]] = []
        self.data.mkdir(mode=0o700)
        self.write_env(self.token)

    def write_env(self, token: str, mode: int = 0o600) -> None:
        text = f"INVITE_TOKEN={token}\nSOLANA_PAYOUT_PUBKEY={WALLET}\n"
        text += f"CONTROL_PLANE={NOWHERE}\nDATA_DIR={self.data}\n"
        self.env_file.write_text(text)
        self.env_file.chmod(mode)

    def argv(self, command: str, *more: str) -> list[str]:
        flags = [f"--env-file={self.env_file}", f"--socket={self.socket}"]
        flags.append(f"--wg-pubkey-file={self.env_file.parent / 'wg.pub'}")
        for name in ("lease-file", "limits"):
            flags.append(f"--{name}={self.env_file.parent / name}")
        flags.append("--engine-socket=none")
        return [*self.runtime, str(ROOT / "agent.py"), command, *flags, *more]

    def call(
        self, command: str, *more: str, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        argv = [*prefix, *self.argv(command, *more)]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=20, check=False, env=make_env({}), cwd="/"
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert self.token[21:64] not in done.stdout + done.stderr
        return done

    def run(self, *more: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        return self.call("run", "--allow-unencrypted", *more, prefix=prefix)

    def start(self, env: Mapping[str, str] | None = None, *more: str) -> subprocess.Popen[bytes]:
        """Start the daemon and wait until it answers on its socket."""
        argv = self.argv("run", "--allow-unencrypted", *more)
        with self.log_path.open("wb") as log:
            child = subprocess.Popen(argv, stderr=log, env=make_env(env or {}), cwd="/")
        self.children.append(child)
        wait_for(lambda: self.answers() or child.poll() is not None)
        assert child.poll() is None, self.log
        return child

    def answers(self) -> bool:
        """Say whether the daemon runs: the socket listens before that, and a signal kills it."""
        try:
            return "state" in self.ask(b'{"cmd":"status"}\n')
        except (OSError, ValueError):
            return False

    def ask(self, request: bytes) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.socket))
            sock.sendall(request)
            with sock.makefile("rb") as file:
                answer: dict[str, Any] = json.loads(file.readline())
        return answer

    @property
    def log(self) -> str:
        return self.log_path.read_text()


def make_env(more: Mapping[str, str]) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    return {**plain, "PYTHONDONTWRITEBYTECODE": "1", **more}


@pytest.fixture(params=list(RUNTIMES.values()), ids=list(RUNTIMES))
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path, request.param)
    yield made
    for child in made.children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait(10)
    if made.log_path.exists():
        assert "Traceback" not in made.log
        assert made.token[21:64] not in made.log


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 65_534, -1)


def make_identity(**changes: Any) -> bytes:
    data = {
        "format": 1,
        "host_secret": "ab" * 32,
        "host_id": HOST_ID,
        "invite_id": ID,
        "session": "cd" * 32,
        "next_session": None,
        **changes,
    }
    return json.dumps(data).encode()


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PASSWORD=hunter2", "agent.env:5: unknown key PASSWORD"),
        ("DATA_DIR=/hunter2", "agent.env:5: DATA_DIR stands there twice"),
        ("hunter2", "agent.env:5: line is not KEY=VALUE"),
    ],
)
def test_bad_env_file_stops_the_program(host: Host, line: str, said: str) -> None:
    with host.env_file.open("a") as file:
        file.write(line + "\n")
    done = host.run()
    assert done.returncode == 2
    assert said in done.stderr
    assert "hunter2" not in done.stderr
    assert list(host.data.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (NOWHERE, "10.77.0.1", "CONTROL_PLANE 10.77.0.1 is not host:port"),
        (NOWHERE, "cp.coledex.com:9092", "outside the tunnel"),
        (NOWHERE, "192.168.1.5:9092", "; write 10.77.0.1:9092"),
        (WALLET, "1" * 32, "SOLANA_PAYOUT_PUBKEY is not a Solana address"),
        (f"oi1_{ID}", f"oi1_{ID[::-1]}", f"INVITE_TOKEN was mistyped (invite {ID[::-1]})"),
    ],
)
def test_bad_value_stops_the_program(host: Host, old: str, new: str, said: str) -> None:
    host.env_file.write_text(host.env_file.read_text().replace(old, new))
    done = host.run()
    assert done.returncode == 2
    assert said in done.stderr
    assert list(host.data.iterdir()) == []


def test_env_file_that_is_no_file(host: Host) -> None:
    host.env_file.unlink()
    assert (host.run().returncode, host.run().stderr.count("--env-file")) == (2, 1)
    os.mkfifo(host.env_file, 0o600)
    assert host.run().returncode == 2
    host.env_file.unlink()
    host.env_file.write_bytes(b"#" * 70_000)
    assert "too large" in host.run().stderr


@pytest.mark.parametrize(
    ("used", "mode", "code"),
    [(False, 0o640, 2), (False, 0o604, 2), (True, 0o644, 78), (True, 0o664, 2), (True, 0o602, 2)],
)
def test_env_file_of_others(host: Host, used: bool, mode: int, code: int) -> None:
    host.write_env(f"oi1_{ID}_used" if used else host.token, mode)
    done = host.run()
    assert done.returncode == code
    assert ("chmod 0600" in done.stderr) == (code == 2)


@pytest.mark.parametrize("used", [False, True])
def test_env_file_that_belongs_to_another(host: Host, used: bool) -> None:
    if used:
        host.write_env(f"oi1_{ID}_used")
    give_away(host.env_file)
    done = host.run()
    assert done.returncode == 2
    said = f"{host.env_file} belongs to uid 65534"
    assert f"{said} ; run: chown {os.geteuid()} {host.env_file}\n" in done.stderr
    assert list(host.data.iterdir()) == []
    assert said in host.call("doctor", f"--data-dir={host.data}").stdout


def test_wg_key_that_is_none(host: Host) -> None:
    (host.env_file.parent / "wg.pub").write_text("not a key\n")
    done = host.run()
    assert done.returncode == 1
    assert "wg show openinfra public-key" in done.stderr


def test_usage(host: Host) -> None:
    done = host.run(f"--invite-token={host.token}")
    assert (done.returncode, done.stderr[:6]) == (2, "ERROR ")
    shown = host.call("run", "--help").stdout
    assert all(option.flag in shown and option.env in shown for option in module.OPTIONS)


# ------------------------------------------------------------------------------------------------
# Data directory
# ------------------------------------------------------------------------------------------------


def test_data_directory_must_be_there_and_ours(host: Host) -> None:
    host.data.chmod(0o750)
    done = host.run()
    assert done.returncode == 1
    assert f"chmod 0700 {host.data}" in done.stderr
    host.data.chmod(0o700)
    give_away(host.data)
    assert "belongs to uid 65534" in host.run().stderr
    host.data.rmdir()
    assert "install -d -m 0700" in host.run().stderr
    host.data.write_text("")
    assert "is not a directory" in host.run().stderr


def test_plain_disk_is_refused_and_nothing_is_written(host: Host) -> None:
    if module.is_encrypted(host.data):
        pytest.skip("this machine's temporary directory is encrypted")
    done = host.call("run")
    assert done.returncode == 75
    assert "--allow-unencrypted" in done.stderr
    assert list(host.data.iterdir()) == []


def test_second_agent_on_one_data_directory(host: Host) -> None:
    first = host.start()
    done = host.run("--socket", f"{host.socket}2")
    assert done.returncode == 75
    assert f"pid {first.pid}" in done.stderr
    first.kill()
    first.wait()
    host.start()


# ------------------------------------------------------------------------------------------------
# Identity
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "no identity and no invite"),
        (
            f"oi1_{ID}_used",
            f"ERROR invite already used invite_id={ID} ; ask the operator for a fresh invite\n",
        ),
    ],
)
def test_no_way_to_be_a_host(host: Host, token: str, said: str) -> None:
    host.write_env(token)
    done = host.run()
    assert done.returncode == 78
    assert said in done.stderr
    assert not host.identity.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 200,
        b"{",
        make_identity()[:-9],
        make_identity(host_id=5),
        b"[" * 4000,
        make_identity(format=0),
        b"x" * 100000,
    ],
    ids=["empty", "zeros", "cut", "truncated", "type", "deep", "format", "huge"],
)
def test_broken_identity_is_moved_aside_and_never_replaced(host: Host, raw: bytes) -> None:
    (host.data / "identity.json.broken-1").write_text("earlier")
    host.identity.write_bytes(raw)
    host.identity.chmod(0o600)
    done = host.run()
    assert done.returncode == 78
    assert "fresh invite" in done.stderr
    assert not host.identity.exists()
    assert (host.data / "identity.json.broken-1").read_text() == "earlier"
    assert (host.data / "identity.json.broken-2").read_bytes() == raw
    host.write_env("")
    assert host.run().returncode == 78
    host.write_env(host.token)
    host.start()
    assert host.identity.exists()


def make_symlink(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(make_identity())
    path.symlink_to("elsewhere")


def make_foreign(path: Path) -> None:
    path.write_bytes(make_identity())
    give_away(path)


def make_readable(path: Path) -> None:
    path.write_bytes(make_identity())
    path.chmod(0o640)


def make_newer(path: Path) -> None:
    path.write_bytes(b'{"format": 2}')
    path.chmod(0o600)


def look_at(path: Path) -> tuple[int, ...]:
    seen = path.lstat()
    return seen.st_ino, seen.st_mode, seen.st_uid, seen.st_size, seen.st_mtime_ns


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_symlink, "fresh invite"),
        (make_foreign, "run: chown"),
        (make_readable, "run: chmod 0600"),
        (make_newer, "newer agent"),
        (Path.mkdir, "not a plain file"),
    ],
)
def test_doubtful_identity_stays_where_it_is(
    host: Host, make: Callable[[Path], None], said: str
) -> None:
    make(host.identity)
    before = look_at(host.identity)
    done = host.run()
    assert done.returncode == 78
    assert said in done.stderr
    assert look_at(host.identity) == before
    assert not list(host.data.glob("*.broken-*"))


def test_secret_is_on_disk_before_any_request_and_outlives_kills(host: Host) -> None:
    first = host.start()
    saved = json.loads(host.identity.read_bytes())
    assert host.identity.stat().st_mode & 0o7777 == 0o600
    assert (saved["host_id"], saved["session"]) == (None, None)
    assert re.fullmatch("[0-9a-f]{64}", saved["host_secret"])
    assert re.fullmatch("[0-9a-f]{64}", saved["next_session"])
    for _ in range(3):
        first.kill()
        first.wait()
        first = host.start()
        assert json.loads(host.identity.read_bytes()) == saved
    # The token of a host without an id is still needed.
    assert host.token in host.env_file.read_text()


def test_disk_full_before_the_first_request(host: Host) -> None:
    done = host.run(prefix=["prlimit", "--fsize=0"])
    assert done.returncode == 1
    assert "cannot save the identity" in done.stderr
    assert sorted(path.name for path in host.data.iterdir()) == ["agent.lock"]


def test_an_agent_that_gives_up_at_once_is_gone(tmp_path: Path) -> None:
    """Grpcio 1.51 spins at the end of one such process in some, when they share a processor."""

    def give_up(number: int) -> None:
        (tmp_path / str(number)).mkdir()
        host = Host(tmp_path / str(number), RUNTIMES["debian"])
        host.identity.write_bytes(make_identity())
        host.identity.chmod(0o600)
        done = host.run(prefix=["prlimit", "--fsize=0", "taskset", "--cpu-list", processor])
        assert done.returncode == 1
        assert "cannot save the next session" in done.stderr

    processor = str(min(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(give_up, range(40)))


# ------------------------------------------------------------------------------------------------
# Life as a daemon
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_notify(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(10)
        yield sock


def test_systemd_hears_ready_watchdog_and_stopping(host: Host, tmp_path: Path) -> None:
    with open_notify(tmp_path / "notify") as sock:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        child = host.start(env)
        assert sock.recv(99) == b"READY=1"
        started = time.monotonic()
        assert [sock.recv(99) for _ in range(5)] == [b"WATCHDOG=1"] * 5
        assert 0.6 < time.monotonic() - started < 2
        child.terminate()
        wait_for(lambda: sock.recv(99) == b"STOPPING=1")
        assert child.wait(5) == 0


def test_no_ready_for_a_refused_start(host: Host, tmp_path: Path) -> None:
    with open_notify(tmp_path / "notify") as sock:
        host.write_env("")
        env = make_env({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        argv = host.argv("run", "--allow-unencrypted")
        assert subprocess.run(argv, env=env, capture_output=True, check=False).returncode == 78
        assert select.select([sock], [], [], 0)[0] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_two_seconds(host: Host, signum: signal.Signals) -> None:
    child = host.start()
    wait_for(lambda: "cannot reach control plane" in host.log)
    started = time.monotonic()
    child.send_signal(signum)
    assert child.wait(5) == 0
    assert time.monotonic() - started < 2
    assert not host.socket.exists()
    assert host.log.splitlines()[-1] == f"INFO agent stopping signal={signum.name}"


def test_log_without_a_control_plane_is_short_and_no_proxy_is_asked(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        host.start({"http_proxy": url, "https_proxy": url, "grpc_proxy": url})
        wait_for(lambda: "cannot reach" in host.log)
        time.sleep(4)
        assert select.select([proxy], [], [], 0)[0] == []
    lines = host.log.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"INFO agent starting control_plane={NOWHERE} version=")
    assert lines[1].startswith(f"WARN cannot reach control plane addr={NOWHERE} reason=UNAVAILABLE")
    assert "refused" in lines[1].lower()


# ------------------------------------------------------------------------------------------------
# Control socket
# ------------------------------------------------------------------------------------------------


def test_socket_is_for_root_only_and_replaces_a_dead_one(host: Host) -> None:
    first = host.start()
    assert host.socket.stat().st_mode & 0o7777 == 0o600
    assert host.socket.parent.stat().st_mode & 0o7777 == 0o755
    first.kill()
    first.wait()
    assert host.socket.exists()
    host.start()


def test_socket_that_cannot_be_removed_at_the_end(host: Host) -> None:
    child = host.start()
    host.socket.unlink()
    host.socket.mkdir()
    child.terminate()
    assert child.wait(5) == 0
    assert "INFO agent stopping signal=SIGTERM" in host.log.splitlines()
    assert "ERROR" not in host.log


def test_socket_paths_that_cannot_be(host: Host, tmp_path: Path) -> None:
    host.start()
    done = host.call("run", "--allow-unencrypted", "--data-dir", str(make_dir(tmp_path / "d2")))
    assert done.returncode == 75
    assert "another agent answers on" in done.stderr
    flags = ["--allow-unencrypted", "--data-dir", str(tmp_path / "d2"), "--socket"]
    assert host.call("run", *flags, "/tmp/" + "x" * 103).returncode == 2
    (tmp_path / "file").write_text("keep")
    assert host.call("run", *flags, str(tmp_path / "file")).returncode == 1
    assert (tmp_path / "file").read_text() == "keep"
    assert host.call("run", *flags, str(tmp_path / "no" / "such" / "s")).returncode == 1


def make_dir(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def test_status_answer(host: Host) -> None:
    child = host.start()
    answer = host.ask(b'{"cmd":"status"}\n')
    assert set(answer) == {
        *("state", "version", "host_id", "control_plane", "connected", "last_heartbeat_age_s"),
        *("heartbeats", "interval_s", "status", "assignable", "reasons", "onchain_payout"),
        *("paused", "disk_encrypted", "token", "last_error", "pid", "started_age_s"),
        *("engine_version", "unready", "unready_todo", "offered", "assignments", "earnings"),
    }
    assert (answer["pid"], answer["token"], answer["host_id"]) == (child.pid, "unspent", None)
    assert answer["connected"] is False
    host.write_env(f"oi1_{ID}_used")
    assert host.ask(b'{"cmd":"status"}\n')["token"] == "used"


def test_bad_requests_get_an_error_and_harm_nobody(host: Host) -> None:
    host.start()
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(host.socket))
        slow.sendall(b'{"cmd":')
        for request in (b"\n", b"x\n", b'{"cmd":"fly"}\n', b"[" * 3000 + b"\n", b"\xff\0\n"):
            assert list(host.ask(request)) == ["error"]
        assert "longer" in host.ask(b"x" * 9000)["error"]
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(host.socket))
        assert host.ask(b'{"cmd":"status"}\n')["state"]
        slow.settimeout(10)
        assert b"no request within" in slow.recv(999)


def test_many_clients_at_once(host: Host) -> None:
    host.start()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(10)]
        for sock in socks:
            sock.settimeout(10)
            sock.connect(str(host.socket))
        for sock in reversed(socks):
            sock.sendall(b'{"cmd":"status"}\n')
            assert json.loads(sock.recv(65_536))["state"]


# ------------------------------------------------------------------------------------------------
# status and doctor
# ------------------------------------------------------------------------------------------------


def test_status_and_doctor_with_a_dead_agent(host: Host) -> None:
    done = host.call("status")
    assert done.returncode == 1
    assert "is the service running? systemctl status openinfra-agent" in done.stderr
    done = host.call("doctor", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert all(set(row) == {"level", "sentence", "command"} for row in found["findings"])
    said = "\n".join(row["sentence"] for row in found["findings"])
    assert "no agent answers" in said
    assert f"{NOWHERE} cannot be reached: Connection refused" in said
    assert "not redeemed yet" in said
    before = sorted(host.data.iterdir())
    assert host.call("doctor").stdout.count("\n") == 2 * len(found["findings"])
    assert sorted(host.data.iterdir()) == before


def test_status_and_doctor_with_an_agent_that_is_not_online(host: Host) -> None:
    host.start()
    wait_for(lambda: "cannot reach" in host.log)
    done = host.call("status")
    assert done.returncode == 1
    assert re.search(r"^state +retrying$", done.stdout, re.MULTILINE)
    done = host.call("status", "--json")
    assert json.loads(done.stdout)["last_error"]["reason"] == "UNAVAILABLE"
    assert "not online: cannot reach control plane" in host.call("doctor").stdout


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda host: host.env_file.write_text("X=1\n"), "agent.env:1: unknown key X"),
        (lambda host: host.data.rmdir(), "no data directory"),
        (lambda host: host.identity.write_text("{"), "can be read or changed by others"),
        (lambda host: make_newer(host.identity), "newer agent"),
        (lambda host: host.write_env(f"oi1_{ID}_used"), "Invite already used"),
        (lambda host: host.write_env(""), "No identity and no invite"),
    ],
)
def test_doctor_sees_what_run_would_refuse(
    host: Host, spoil: Callable[[Host], object], said: str
) -> None:
    spoil(host)
    done = host.call("doctor", f"--data-dir={host.data}", f"--control-plane={NOWHERE}")
    assert done.returncode == 1
    assert said in done.stdout


def test_doctor_leaves_a_broken_identity_alone(host: Host) -> None:
    host.identity.write_text("{")
    host.identity.chmod(0o600)
    assert "is broken (not JSON)" in host.call("doctor").stdout
    assert host.identity.read_text() == "{"
