"""What the integration tests start: a real PostgreSQL, control planes, agents, raw gRPC clients.

Everything is a process of its own in a temporary directory, and is ended by its process id.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psycopg
import pytest
from psycopg.rows import dict_row

import cp_server
from proto import openinfra_pb2 as pb
from proto import openinfra_pb2_grpc
from systemd.setup_cp import render_caddyfile

ROOT = Path(__file__).resolve().parent.parent
WALLET = "7YttLkHDoNj9wyDur5pM1ejNaAvT9X4eqaYcHQqtj2G5"
OTHER_WALLET = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"
BOOT_ID = "0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10"
WG_KEY = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 10) -> T:
    """The first result of `probe` that is true; fails the test when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout_s} s")


def read_seed() -> int:
    """Where the random choices of a test come from, printed: OPENINFRA_SEED, or a new one.

    With CI=true it goes by the commit, so that a run before and CI's make the same choices.
    """
    given = os.environ.get("OPENINFRA_SEED", "")
    if not given and os.environ.get("CI"):
        argv = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        given = str(int(subprocess.run(argv, capture_output=True, check=True).stdout[:7], 16))
    seed = int(given or secrets.randbelow(2**31 - 1) + 1)
    print(f"OPENINFRA_SEED={seed} repeats this test's choices")
    return seed


# Ports below those that the kernel gives to whoever asks for any (ip_local_port_range, from 32768
# on), so that no other test and no client's connection has one before it is used; each worker of
# pytest-xdist has two thousand of its own, and begins anywhere, for two runs at a time.
_FIRST_PORT = 12_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = (_FIRST_PORT + number % 2_000 for number in itertools.count(os.getpid()))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now, and nobody else is given."""
    for port in _PORTS:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def change_scripts(directory: Path, script: str, **constants: str) -> Path:
    """The scripts in a directory of their own, one of them with other constants."""
    directory.mkdir()
    for name in {"agent.py", "cp_server.py", "proto", "systemd"} - {script}:
        (directory / name).symlink_to(ROOT / name)
    text = (ROOT / script).read_text()
    for name, value in constants.items():
        text, count = re.subn(rf"(?m)^{name} = .*?(?=  #|$)", f"{name} = {value}", text)
        assert count == 1, name
    (directory / script).write_text(text)
    return directory


class Postgres:
    """A PostgreSQL cluster of the test session, on a unix socket only.

    Tests do without fsync and with little memory; a benchmark asks for a server as it is installed.
    """

    def __init__(self, directory: Path, *, fsync: bool = False) -> None:
        self.settings = [] if fsync else ["-c", "fsync=off", "-c", "shared_buffers=32MB"]
        binaries = cp_server.find_postgres()
        assert binaries, "PostgreSQL 15 or newer is not installed; run tests/run"
        self.binaries = binaries
        self.directory = directory
        self.user = "postgres" if os.geteuid() == 0 else None
        self.child: subprocess.Popen[bytes] | None = None
        self._databases = 0
        directory.mkdir(parents=True)
        if self.user:
            shutil.chown(directory, self.user, self.user)
        argv = ["initdb", "-D", str(directory / "data"), "-U", "postgres", "--auth=trust", "-N"]
        argv += ["--encoding=UTF8", "--locale=C.UTF-8"]
        subprocess.run(self._as_user(argv), check=True, stdout=subprocess.DEVNULL)
        self.start()
        self.execute("postgres", "CREATE DATABASE template_openinfra")
        asyncio.run(cp_server.migrate(self.dsn("template_openinfra"), "openinfra"))

    def _as_user(self, argv: Sequence[str]) -> list[str]:
        switch = [f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        full = [str(self.binaries / argv[0]), *argv[1:]]
        return ["setpriv", *(switch if self.user else []), "--pdeathsig=KILL", "--", *full]

    def start(self) -> None:
        """Start the server and wait until it answers.

        It ends at once while one that was killed has backends left: they see that soon, or when
        their statement is over. Then it is tried again.
        """

        def probe() -> bool | None:
            if self.child is None or self.child.poll() is not None:
                self._launch()
                time.sleep(0.1)
            return cp_server.can_connect(self.dsn("postgres"))

        wait_for("PostgreSQL", probe, 30)

    def _launch(self) -> None:
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={self.directory}"]
        options += ["-c", "max_connections=60", *self.settings]
        with (self.directory.parent / "postgres.log").open("ab") as output:
            self.child = subprocess.Popen(
                self._as_user(["postgres", "-D", str(self.directory / "data"), *options]),
                stderr=output,
                start_new_session=True,
            )

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT is its fast way, SIGQUIT its immediate one.

        SIGKILL ends the postmaster alone; the others see that, each when it next waits.
        """
        assert self.child
        self.child.send_signal(how)
        self.child.wait(30)

    def dsn(self, database: str, role: str = "postgres") -> str:
        """A connection string."""
        return f"host={self.directory} dbname={database} user={role}"

    def execute(self, database: str, sql: str, *params: object) -> None:
        """Run one statement as the superuser, outside a transaction."""
        with psycopg.connect(self.dsn(database), autocommit=True) as connection:
            connection.execute(sql.encode(), params or None)

    def force(self, database: str, sql: str, *params: object) -> None:
        """Run one statement as the superuser, past triggers: to move what happened into the past.

        Foreign keys are not looked at either.
        """
        with psycopg.connect(self.dsn(database)) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute(sql.encode(), params or None)

    def query(self, database: str, sql: str, *params: object) -> list[dict[str, Any]]:
        """The rows of one query as the superuser."""
        with psycopg.connect(self.dsn(database), autocommit=True, row_factory=dict_row) as c:
            return c.execute(sql.encode(), params or None).fetchall()

    def new_database(self) -> str:
        """A fresh database with the schema; gives back its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE template_openinfra")
        return name


@dataclasses.dataclass
class Netns:
    """A network namespace in which every address of 10.77.0.0/16 is local."""

    name: str

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command inside the namespace."""
        return ["ip", "netns", "exec", self.name, *argv]


@contextlib.contextmanager
def make_netns() -> Iterator[Netns]:
    """A network namespace for one test; a client that connects to 10.77.x.y comes from there."""
    netns = Netns(f"oi-{os.getpid()}-{secrets.token_hex(3)}")
    subprocess.run(["ip", "netns", "add", netns.name], check=True)
    try:
        for line in ("link set lo up", "route add local 10.77.0.0/16 dev lo"):
            subprocess.run(["ip", "-n", netns.name, *line.split()], check=True)
        yield netns
    finally:
        subprocess.run(["ip", "netns", "del", netns.name], check=True)


@contextlib.contextmanager
def inside(netns: Netns) -> Iterator[None]:
    """This thread's new sockets belong to the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    newnet = 0x40000000  # CLONE_NEWNET of sched.h

    def enter(file: int) -> None:
        if libc.setns(file, newnet) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{netns.name}") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


class Process:
    """A child with its output in a file."""

    def __init__(self, argv: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log_path = log
        self.argv = list(argv)
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd="/",
            )

    @property
    def log(self) -> str:
        """All that it printed."""
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text: str, timeout_s: float = 10) -> None:
        """Wait until a text stands in the log."""
        try:
            wait_for(text, lambda: text in self.log or None, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.log}") from None

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 15) -> int:
        """Send a signal; give back the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(how)
        return self.child.wait(timeout_s)


class ControlPlane:
    """One database and the `cp_server.py serve` on it; it can be started again."""

    def __init__(
        self,
        postgres: Postgres,
        directory: Path,
        *flags: str,
        netns: Netns | None = None,
        python: str = sys.executable,
        scripts: Path = ROOT,
    ) -> None:
        self.scripts = scripts  # ROOT, or what tests/failpoints.py built
        self.postgres = postgres
        self.database = postgres.new_database()
        self.directory = directory
        self.netns = netns
        self.python = python
        self.flags = flags
        directory.mkdir(parents=True, exist_ok=True)
        self.dsn_file = directory / "dsn"
        self.keys_file = directory / "jwt-keys.json"
        self.set_dsn(postgres.dsn(self.database, "openinfra"))
        self.secrets_key_file = directory / "secrets.key"
        cp_server.write_file(self.secrets_key_file, secrets.token_hex(32).encode(), 0o600)
        self.key = cp_server.add_jwt_key(self.keys_file, [])
        self.token = cp_server.mint_jwt(self.key, "tester", "admin", 3600)
        self.grpc_port = 9092 if netns else free_port()
        self.http_port = 8080 if netns else free_port()
        self.process: Process | None = None

    def set_dsn(self, dsn: str) -> None:
        """Write the connection string."""
        cp_server.write_file(self.dsn_file, dsn.encode(), 0o600)

    def argv(self, command: str, *more: str) -> list[str]:
        """A command line of cp_server.py on this database."""
        files = ["--env-file", os.devnull, "--dsn-file", str(self.dsn_file)]
        files += ["--jwt-keys-file", str(self.keys_file)]
        files += ["--secrets-key-file", str(self.secrets_key_file)]
        script = [self.python, "-W", "error", str(self.scripts / "cp_server.py")]
        return [*script, command, *files, *more]

    def start(self, *flags: str, **environment: str) -> None:
        """Start serving, wait until it is ready."""
        listen = "0.0.0.0" if self.netns else "127.0.0.1"
        argv = self.argv(
            "serve",
            f"--grpc-listen={listen}:{self.grpc_port}",
            f"--http-listen=127.0.0.1:{self.http_port}",
            f"--peer-check={'wg' if self.netns else 'off'}",
            *self.flags,
            *flags,
        )
        argv = self.netns.argv(argv) if self.netns else argv
        before = self.log.count("INFO control plane ready")
        process = self.process = Process(argv, self.directory / "cp.log", environment)

        def is_ready_or_dead() -> bool:
            is_ready = self.log.count("INFO control plane ready") > before
            return is_ready or process.child.poll() is not None

        try:
            wait_for("control plane", is_ready_or_dead, 15)
            assert process.child.poll() is None, "the control plane ended"
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.log}") from None

    @property
    def log(self) -> str:
        """All that it printed."""
        path = self.directory / "cp.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; give back its exit code."""
        assert self.process
        return self.process.stop(how)

    def command(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a subcommand on this database."""
        return subprocess.run(
            self.argv(command, *more), capture_output=True, text=True, timeout=30, check=False
        )

    def check_invariants(self) -> None:
        """Fails the test unless `doctor --invariants` finds nothing."""
        done = self.command("doctor", "--invariants")
        assert done.returncode == 0, done.stdout + done.stderr

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> tuple[int, Any]:
        """One HTTP request (not in a namespace); gives back status and JSON."""
        sent = {"Authorization": f"Bearer {self.token if token is None else token}"}
        data = raw if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        sent |= headers or {}
        url = f"http://127.0.0.1:{self.http_port}{path}"
        request = urllib.request.Request(url, data, sent, method=method)
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            where = inside(self.netns) if self.netns else contextlib.nullcontext()
            with where, opener.open(request) as got:
                return got.status, _decode(got.read())
        except urllib.error.HTTPError as error:
            return error.code, _decode(error.read())

    def mint(self, **order: object) -> str:
        """A fresh invite token, by `cp_server.py invite` when in a namespace, else by HTTP."""
        if self.netns is None:
            status, answer = self.call("POST", "/api/v1/admin/host-invites", order)
            assert status == 201, answer
            return str(answer["token"])
        words = [f"--{key.replace('_', '-')}={value}" for key, value in order.items()]
        done = self.command("invite", "--no-approve-first-wallet", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def query(self, sql: str, *params: object) -> list[dict[str, Any]]:
        """Rows of the database as the superuser sees them."""
        return self.postgres.query(self.database, sql, *params)

    def hosts(self) -> list[dict[str, Any]]:
        """All hosts as the CLI shows them."""
        done = self.command("hosts", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)["hosts"]
        return found

    def wait_assignable(self, count: int = 1) -> list[dict[str, Any]]:
        """Until so many hosts may get work: registered, and a heartbeat of theirs accepted."""

        def probe() -> list[dict[str, Any]] | None:
            found = [host for host in self.hosts() if host["assignable"]]
            return found if len(found) == count else None

        return wait_for(f"{count} assignable", probe)


def start_caddy(directory: Path, hostname: str, netns: Netns) -> tuple[Process, Path]:
    """Start a Caddy in a namespace with the deployment's own file; also its CA's certificate."""
    template = (ROOT / "systemd/Caddyfile").read_bytes()
    (directory / "Caddyfile").write_bytes(render_caddyfile(template, hostname, "internal"))
    argv = ["caddy", "run", "--adapter=caddyfile", f"--config={directory / 'Caddyfile'}"]
    home = {name: str(directory) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    process = Process(netns.argv(argv), directory / "caddy.log", home)
    process.wait_log("certificate obtained successfully", 20)
    root = directory / "caddy/pki/authorities/local/root.crt"
    wait_for("Caddy's CA", lambda: root.exists() or None, 20)
    return process, root


@contextlib.contextmanager
def serving(
    postgres: Postgres, directory: Path, *flags: str, **more: Any
) -> Iterator[ControlPlane]:
    """A started control plane for many tests; at the end its invariants hold, its log is clean."""
    cp = ControlPlane(postgres, directory, *flags, **more)
    cp.start()
    try:
        yield cp
        cp.check_invariants()
    finally:
        cp.stop(signal.SIGKILL)
    assert "Traceback" not in cp.log, cp.log


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


def facts(**changes: Any) -> pb.Facts:
    """Facts of a machine."""
    values: dict[str, Any] = {
        "hostname": "lab",
        "arch": "x86_64",
        "kernel": "6.1.0",
        "agent_version": "0.1.0",
        "cpu_count": 4,
        "memory_bytes": 8 << 30,
        "disk_bytes": 100 << 30,
        "disk_encrypted": True,
        "engine_version": "20.10.24",
        "offered_cpu_milli": 3000,
        "offered_memory_bytes": 6 << 30,
        "takes_secrets": True,
    }
    return pb.Facts(**{**values, **changes})


def new_wg_key() -> str:
    """A WireGuard public key that nobody has."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


class Refused(Exception):
    """A gRPC call that was refused."""

    def __init__(self, error: grpc.RpcError) -> None:
        call: Any = error
        trailing = dict(call.trailing_metadata() or ())
        self.reason = str(trailing.get("openinfra-reason", ""))
        self.status = call.code()
        self.message = str(call.details())
        super().__init__(f"{self.reason} {self.status}: {self.message}")


class Client:
    """An agent's end of the contract by hand: one identity, raw calls (not in a namespace)."""

    def __init__(self, cp: ControlPlane) -> None:
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{cp.grpc_port}",
            options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)],
        )
        self.stub = openinfra_pb2_grpc.AgentApiStub(self.channel)
        self.host_secret = secrets.token_bytes(32)
        self.session = secrets.token_bytes(32)
        self.seq = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=10)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def register(self, token: str, **changes: Any) -> pb.RegisterReply:
        """Register with this identity; raises Refused."""
        values: dict[str, Any] = {
            "invite_token": token,
            "host_secret": self.host_secret,
            "session": self.session,
            "payout_pubkey": WALLET,
            "facts": facts(),
        }
        reply: pb.RegisterReply = self._call(
            self.stub.Register, pb.RegisterRequest(**{**values, **changes})
        )
        return reply

    def resume(self, **changes: Any) -> pb.ResumeReply:
        """Resume with a fresh session, which is kept when it is accepted; raises Refused."""
        values: dict[str, Any] = {
            "host_secret": self.host_secret,
            "session": secrets.token_bytes(32),
            "previous_session": self.session,
            "payout_pubkey": WALLET,
            **changes,
        }
        reply: pb.ResumeReply = self._call(self.stub.Resume, pb.ResumeRequest(**values))
        self.session, self.seq = values["session"], 0
        return reply

    def heartbeat(self, **changes: Any) -> pb.HeartbeatReply:
        """One heartbeat; raises Refused."""
        self.seq += 1
        values = {"session": self.session, "seq": self.seq, "boot_id": BOOT_ID, **changes}
        reply: pb.HeartbeatReply = self._call(self.stub.Heartbeat, pb.HeartbeatRequest(**values))
        return reply


def check_refused(reason: str, call: Callable[..., Any], *args: Any, **more: Any) -> Refused:
    """The refusal of a call, which must have this reason, its status and a sentence."""
    with pytest.raises(Refused) as refused:
        call(*args, **more)
    found = refused.value
    assert (found.reason, found.status) == (reason, cp_server.REFUSALS[reason][0]), found
    assert pb.Reason.Value(found.reason)
    assert "; " in found.message  # what is wrong, and what to do
    return found


# Every row that a request could change, table by table.
STATE = {
    "invites": "invite_no",
    "hosts": "host_no",
    "sessions": "session_sha256",
    "liveness": "host_no",
    "namespaces": "namespace_no",
    "audit_log": "audit_id",
    "workloads": "workload_no",
    "assignments": "assignment_no",
}


def read_state(cp: ControlPlane) -> dict[str, list[dict[str, Any]]]:
    """Every row that a request could change."""
    return {
        table: cp.query(f"SELECT to_jsonb(t) AS row FROM {table} t ORDER BY {order}")  # noqa: S608
        for table, order in STATE.items()
    }


@contextlib.contextmanager
def unchanged(cp: ControlPlane) -> Iterator[None]:
    """Fails when the block changes anything in the database."""
    before = read_state(cp)
    yield
    assert read_state(cp) == before


def race(*calls: Callable[[], object]) -> list[object]:
    """What each of several calls at one time gave, or its refusal's reason."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return call()
        except Refused as refused:
            return refused.reason

    with ThreadPoolExecutor(len(calls)) as workers:
        return list(workers.map(run, calls))


class RemoteError(grpc.RpcError):
    """What `grpc.RpcError` says, of a call that `rpc_tool.py` made."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["message"])
        self._answer = answer

    def code(self) -> grpc.StatusCode:
        """The gRPC status."""
        return grpc.StatusCode[self._answer["code"]]

    def details(self) -> str:
        """The message for a person."""
        return str(self._answer["message"])

    def trailing_metadata(self) -> Any:
        """The reason for the program."""
        return (("openinfra-reason", self._answer["reason"]),)


class RpcTool:
    """A process inside a namespace that makes gRPC calls; safe for threads."""

    def __init__(self, netns: Netns) -> None:
        self.child = subprocess.Popen(
            [
                *netns.argv(["setpriv", "--pdeathsig=KILL", "--", sys.executable, "-W", "error"]),
                str(ROOT / "tests" / "rpc_tool.py"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._calls = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            answer = json.loads(line)
            with self._changed:
                self._answers[answer["id"]] = answer
                self._changed.notify_all()

    def call(self, target: str, method: str, request: bytes) -> bytes:
        """The reply's bytes; raises RemoteError."""
        assert self.child.stdin
        with self._changed:
            self._calls += 1
            number = self._calls
            order = {"id": number, "target": target, "method": method, "request": request.hex()}
            print(json.dumps(order), file=self.child.stdin, flush=True)
            assert self._changed.wait_for(lambda: number in self._answers, 15)
            answer = self._answers.pop(number)
        if "reply" not in answer:
            raise RemoteError(answer)
        return bytes.fromhex(answer["reply"])

    def close(self) -> None:
        """Let the process end."""
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.close()
        assert self.child.wait(15) == 0
        self._reader.join()
        self.child.stdout.close()


class RemoteStub:
    """The stub of AgentApi, through an RpcTool."""

    def __init__(self, tool: RpcTool, target: str) -> None:
        self._tool = tool
        self._target = target

    def Register(self, request: pb.RegisterRequest, **_: float) -> pb.RegisterReply:
        raw = self._tool.call(self._target, "Register", request.SerializeToString())
        return pb.RegisterReply.FromString(raw)

    def Resume(self, request: pb.ResumeRequest, **_: float) -> pb.ResumeReply:
        raw = self._tool.call(self._target, "Resume", request.SerializeToString())
        return pb.ResumeReply.FromString(raw)

    def Heartbeat(self, request: pb.HeartbeatRequest, **_: float) -> pb.HeartbeatReply:
        raw = self._tool.call(self._target, "Heartbeat", request.SerializeToString())
        return pb.HeartbeatReply.FromString(raw)


class RemoteClient(Client):
    """A Client whose calls come from an address inside a namespace."""

    def __init__(self, cp: ControlPlane, tool: RpcTool, address: str, wg_key: str = "") -> None:
        super().__init__(cp)
        self.tool = tool
        self.address = address
        self.wg_key = wg_key or new_wg_key()
        self.host_id = ""  # for the test to keep
        self.stub: Any = RemoteStub(tool, f"{address}:{cp.grpc_port}")

    def register(self, token: str, **changes: Any) -> pb.RegisterReply:
        """Register with this identity and its WireGuard key; raises Refused."""
        return super().register(token, **{"wg_pubkey": self.wg_key, **changes})

    def resume(self, **changes: Any) -> pb.ResumeReply:
        """Resume with its WireGuard key; raises Refused."""
        return super().resume(**{"wg_pubkey": self.wg_key, **changes})

    def at(self, cp: ControlPlane, address: str) -> RemoteClient:
        """The same identity at another address: a copied disk."""
        copy = RemoteClient(cp, self.tool, address, self.wg_key)
        copy.host_secret, copy.session, copy.seq = self.host_secret, self.session, self.seq
        return copy


class Agent:
    """A real agent with its own directories; it can be started again."""

    def __init__(
        self,
        directory: Path,
        control_plane: str,
        token: str,
        *,
        python: str = sys.executable,
        wallet: str = WALLET,
        netns: Netns | None = None,
        wg_key: str = "",
        scripts: Path = ROOT,
    ) -> None:
        self.scripts = scripts  # ROOT, or what tests/failpoints.py built
        self.directory = directory
        self.python = python
        self.netns = netns
        self.data = directory / "data"
        self.data.mkdir(mode=0o700, parents=True)
        self.env_file = directory / "agent.env"
        self.socket = directory / "agent.sock"
        self.key_file = directory / "openinfra.pub"
        self.lease_file = directory / "lease.json"
        self.secrets_dir = Path("/dev/shm", f"oi-secrets-{os.getpid()}-{secrets.token_hex(3)}")
        atexit.register(shutil.rmtree, self.secrets_dir, ignore_errors=True)
        self.engine_socket = Path("none")  # no engine, unless a test says
        self.cgroup = directory / "cgroup"
        self.limits_file = directory / "limits.conf"
        if wg_key:
            self.key_file.write_text(wg_key + "\n")
        self.write_env(token, wallet, control_plane)
        self.started: Process | None = None

    def write_env(self, token: str, wallet: str, control_plane: str) -> None:
        """Write agent.env as the installer does."""
        text = f"INVITE_TOKEN={token}\nSOLANA_PAYOUT_PUBKEY={wallet}\n"
        text += f"CONTROL_PLANE={control_plane}\nDATA_DIR={self.data}\n"
        cp_server.write_file(self.env_file, text.encode(), 0o600)

    def argv(self, command: str, *more: str) -> list[str]:
        """A command line of agent.py."""
        flags = [f"--env-file={self.env_file}", f"--socket={self.socket}"]
        flags += [f"--wg-pubkey-file={self.key_file}", f"--lease-file={self.lease_file}"]
        flags += [f"--engine-socket={self.engine_socket}", f"--limits={self.limits_file}"]
        flags += [f"--secrets-dir={self.secrets_dir}", f"--cgroup={self.cgroup}"]
        argv = [self.python, "-W", "error", str(self.scripts / "agent.py"), command, *flags, *more]
        return self.netns.argv(argv) if self.netns else argv

    def start(self, *more: str, prefix: Sequence[str] = (), **environment: str) -> Process:
        """Start it, if asked behind another command, such as strace."""
        argv = [*prefix, *self.argv("run", "--allow-unencrypted", *more)]
        self.started = Process(argv, self.directory / "agent.log", environment)
        return self.started

    @property
    def process(self) -> Process:
        """The process that was started last."""
        assert self.started
        return self.started

    def restart(self) -> Process:
        """SIGTERM, then start again."""
        assert self.process.stop() == 0
        return self.start()

    @property
    def log(self) -> str:
        """All that it printed."""
        return (self.directory / "agent.log").read_text(errors="replace")

    def run_command(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a subcommand to its end."""
        argv = self.argv(command, *more)
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)

    def status(self) -> dict[str, Any]:
        """What `agent.py status --json` prints."""
        done = self.run_command("status", "--json")
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return {}
        return found
