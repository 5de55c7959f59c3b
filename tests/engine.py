"""A real container engine for tests: dockerd, a registry and an image, in a network namespace.

dockerd runs as `openinfra-engine.service` starts it on a host, without systemd. All of it lies in
one directory and is ended by process ids; `close` fails when anything is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import agent as agent_script
from tests.harness import ROOT, Netns, Process, inside, make_netns, wait_for

USER = "openinfra-engine"
REGISTRY = "127.0.0.1:5000"
APPLETS = (
    "sh",
    "cat",
    "dd",
    "echo",
    "grep",
    "httpd",
    "id",
    "ls",
    "nc",
    "nslookup",
    "sleep",
    "tail",
    "touch",
    "true",
)


def ensure_user() -> None:
    """The system user whose subordinate ids the engine maps root to."""
    with Path("/run/lock/openinfra-tests-engine").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = ["getent", "passwd", USER]
        if subprocess.run(argv, stdout=subprocess.DEVNULL, check=False).returncode:
            argv = ["useradd", "--system", "--no-create-home", "--shell=/usr/sbin/nologin", USER]
            subprocess.run(argv, check=True)
        for name in ("/etc/subuid", "/etc/subgid"):
            path = Path(name)
            text = path.read_text() if path.exists() else ""
            if f"{USER}:" not in text:
                path.write_text(f"{text}{USER}:100000:65536\n")


def make_layer(extra: bytes = b"") -> bytes:
    """A tar of busybox, a few of its names, and something else; the same bytes each time."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in ("bin", "data", "proc", "sys", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        program = Path("/bin/busybox").read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
        for name in APPLETS:
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        if extra:
            entry = tarfile.TarInfo("data/extra")
            entry.size = len(extra)
            tar.addfile(entry, io.BytesIO(extra))
    return raw.getvalue()


def sha256(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def start_registry(directory: Path, address: str, *prefix: str) -> Process:
    """Start a docker-registry that keeps all in a directory, if asked behind another command."""
    path = directory / "registry.yml"
    store = f"{{filesystem: {{rootdirectory: {directory}/registry}}}}"
    path.write_text(f"version: 0.1\nstorage: {store}\nhttp: {{addr: {address}}}\n")
    argv = [*prefix, "docker-registry", "serve", str(path)]
    return Process(argv, directory / "registry.log", {"OTEL_TRACES_EXPORTER": "none"})


@contextlib.contextmanager
def running_registry(directory: Path, address: str) -> Iterator[Process]:
    """A docker-registry on this machine."""
    process = start_registry(directory, address)
    process.wait_log("listening on")
    yield process
    process.stop(signal.SIGKILL)


@contextlib.contextmanager
def slow_registry(netns: Netns, port: int, bytes_s: float) -> Iterator[str]:
    """The registry of a namespace behind a slow line; gives back its address there."""

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # who pulls hangs up as it likes
            while part := source.recv(65_536):
                sink.sendall(part)
                time.sleep(len(part) / bytes_s)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        host, _, number = REGISTRY.partition(":")
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            while True:
                client = stack.enter_context(server.accept()[0])
                with inside(netns):
                    there = stack.enter_context(socket.create_connection((host, int(number))))
                for pair in ((client, there), (there, client)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    with inside(netns):
        server = socket.create_server(("127.0.0.1", port))
    with server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{port}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


class Engine:
    """dockerd and a registry inside a namespace."""

    def __init__(
        self, netns: Netns, disk_bytes: int = 0, label: str = "openinfra.engine=1"
    ) -> None:
        ensure_user()
        self.netns, self.label = netns, label
        # dockerd's remapped root must reach it, and containerd's socket wants a short path.
        self.directory = Path(tempfile.mkdtemp(prefix="oi-engine-", dir="/tmp"))
        self.directory.chmod(0o711)
        self.socket = self.directory / "engine.sock"
        # Its containers' control groups; of cgroup v1 those that count processes.
        v1, v2 = Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")
        self.cgroup = (v1 if v1.exists() else v2) / self.directory.name
        if disk_bytes:  # a disk of its own, as a host's engine has one
            (self.directory / "root").mkdir(mode=0o711)
            options = f"--options=size={disk_bytes},mode=0711"
            argv = ["mount", "--types=tmpfs", options, "oi-engine", f"{self.directory}/root"]
            subprocess.run(argv, check=True)
        self.registry = start_registry(self.directory, REGISTRY, *self.enter([]))
        self.start()

    def processes(self) -> dict[str, list[int]]:
        """Those of each container that has any, whatever dockerd knows of it."""
        found = {}
        for path in self.cgroup.glob("*/cgroup.procs"):
            with contextlib.suppress(OSError):  # it is gone
                found[path.parent.name] = [int(pid) for pid in path.read_text().split()]
        return {container: pids for container, pids in found.items() if pids}

    def enter(self, argv: list[str]) -> list[str]:
        """A command in the namespace; `ip netns exec` would hide mounts from dockerd."""
        return ["nsenter", f"--net=/run/netns/{self.netns.name}", "--", *argv]

    def start(self, ends_strays: bool = True) -> None:
        """Start dockerd, again if it ends before it answers; then what its unit does."""
        if not self._has_started():
            self._mend()
            assert self._has_started(), self.dockerd.log
        if ends_strays:
            trouble = agent_script.end_strays(agent_script.Engine(self.socket), self.cgroup)
            assert trouble == ""

    def _mend(self) -> None:
        """What the unit does when dockerd has ended, word for word."""
        unit = (ROOT / "systemd" / "openinfra-engine.service").read_text()
        (line,) = re.findall(r"(?ms)^ExecStopPost=-(.*?[^\\])$", unit)
        for there, here in (
            ("/run/openinfra-engine", ""),
            ("/var/cache/openinfra/engine", "/root"),
        ):
            line = line.replace(there, f"{self.directory}{here}")
        argv = shlex.split(line.replace("\\\n", " ").replace("$$", "$"))
        environment = {**os.environ, "EXIT_STATUS": str(self.dockerd.child.returncode)}
        subprocess.run(argv, env=environment, check=False)

    def _has_started(self) -> bool:
        at = self.directory
        (at / "up").unlink(missing_ok=True)
        argv = ["dockerd", f"--host=unix://{self.socket}", f"--data-root={at}/root"]
        argv += [f"--exec-root={at}/exec", f"--pidfile={at}/pid", "--iptables=false"]
        argv += [
            "--ip6tables=false",
            "--ip-masq=false",
            "--bridge=ox-engine",
            f"--userns-remap={USER}",
        ]
        argv += ["--live-restore", "--log-driver=local", f"--label={self.label}"]
        argv += [f"--cgroup-parent=/{at.name}", "--exec-opt=native.cgroupdriver=cgroupfs"]
        argv += ["--default-address-pool=base=198.18.0.0/15,size=29"]
        (at / "pid").unlink(missing_ok=True)
        ip = ["ip", "-netns", self.netns.name]
        subprocess.run([*ip, "link", "add", "ox-engine", "type", "bridge"], check=False)
        address = ["address", "replace", "198.19.255.253/30", "dev", "ox-engine"]
        subprocess.run([*ip, *address], check=True)
        self.dockerd = Process(self.enter(argv), at / "dockerd.log", {})

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.call("GET", "/version")[0] == 200
            return self.dockerd.child.poll() is not None

        wait_for("dockerd", answers, 30)
        if self.dockerd.child.poll() is None:
            (at / "up").touch()
        return self.dockerd.child.poll() is None

    def kill(self) -> None:
        """SIGKILL to dockerd; its containers go on.

        Its containerd gets the same by the kernel; a dockerd that starts before that one is gone
        would wait for it in vain (under systemd it starts a second later).
        """
        self.dockerd.stop(signal.SIGKILL)
        path = self.directory / "exec/containerd/containerd.pid"
        pid = int(path.read_text()) if path.exists() else 0
        wait_for("containerd's end", lambda: pid == 0 or not Path(f"/proc/{pid}").exists() or None)

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request to dockerd; gives back status and JSON."""
        connection = http.client.HTTPConnection("engine", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.settimeout(30)
            connection.sock.connect(str(self.socket))
            raw = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} if raw else {}
            connection.request(method, f"/v1.41{path}", raw, headers)
            answer = connection.getresponse()
            text = answer.read()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode(errors="replace")

    def containers(self, label: str = "openinfra.assignment") -> dict[str, dict[str, Any]]:
        """What `inspect` says of each container with this label (empty: of all), by its name."""
        wanted = json.dumps({"label": [label]} if label else {})
        _, rows = self.call("GET", f"/containers/json?all=1&filters={urllib.parse.quote(wanted)}")
        found = [self.call("GET", f"/containers/{row['Id']}/json") for row in rows]
        return {one["Name"][1:]: one for status, one in found if status == 200}

    def networks(self) -> list[str]:
        """Names of the networks that are ours."""
        names = [row["Name"] for row in self.call("GET", "/networks")[1]]
        return sorted(name for name in names if name[:3] in ("oi-", "ox-"))

    def logs(self, container: str) -> str:
        """What a container printed."""
        text = self.call("GET", f"/containers/{container}/logs?stdout=1&stderr=1")[1]
        return str(text)

    def push(
        self,
        name: str,
        config: Mapping[str, object] | None = None,
        extra: bytes = b"",
        layers: Sequence[tuple[str, int]] = (),
    ) -> str:
        """Put an image of busybox into the registry; gives back its reference by digest.

        `layers` are there already, each with its size.
        """
        layer = make_layer(extra)
        packed = gzip.compress(layer, 1, mtime=0)
        diffs = [sha256(layer), *(digest for digest, _ in layers)]
        rootfs = {"type": "layers", "diff_ids": diffs}
        image = {"architecture": "amd64", "os": "linux", "config": config or {}, "rootfs": rootfs}
        raw = json.dumps(image).encode()
        parts = []
        kind = "application/vnd.docker"
        for blob, suffix in (
            (raw, "container.image.v1+json"),
            (packed, "image.rootfs.diff.tar.gzip"),
        ):
            parts.append(
                {"mediaType": f"{kind}.{suffix}", "size": len(blob), "digest": sha256(blob)}
            )
            self._upload(name, blob)
        parts += [{**parts[1], "size": size, "digest": digest} for digest, size in layers]
        manifest = {"schemaVersion": 2, "mediaType": f"{kind}.distribution.manifest.v2+json"}
        text = json.dumps({**manifest, "config": parts[0], "layers": parts[1:]}).encode()
        self._put(f"/v2/{name}/manifests/latest", text, str(manifest["mediaType"]))
        return f"{REGISTRY}/{name}@{sha256(text)}"

    def push_huge(self, name: str, size: int) -> str:
        """An image with one layer more of so many zeros, which take no room at the registry."""
        store = self.directory / "registry/docker/registry/v2"
        digest = hashlib.sha256(name.encode()).hexdigest()
        data = store / f"blobs/sha256/{digest[:2]}/{digest}/data"
        link = store / f"repositories/{name}/_layers/sha256/{digest}/link"
        for path in (data, link):
            path.parent.mkdir(parents=True)
        link.write_text(f"sha256:{digest}")
        with data.open("wb") as file:
            file.truncate(size)
        return self.push(name, layers=[(f"sha256:{digest}", size)])

    def _upload(self, name: str, blob: bytes) -> None:
        path = self._put(f"/v2/{name}/blobs/uploads/", b"", "", "POST")
        joint = "&" if "?" in path else "?"
        self._put(f"{path}{joint}digest={sha256(blob)}", blob, "application/octet-stream")

    def _put(self, path: str, body: bytes, kind: str, method: str = "PUT") -> str:
        """One request to the registry; gives back where it says to go on."""
        host, _, port = REGISTRY.partition(":")

        def connect() -> bool:
            with inside(self.netns), contextlib.suppress(OSError):
                connection.connect()
                return True
            return False

        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        with contextlib.closing(connection):
            wait_for("registry", connect)
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            text = answer.read()
        assert answer.status in (201, 202), (answer.status, text)
        parsed = urllib.parse.urlsplit(answer.headers["Location"])
        return f"{parsed.path}?{parsed.query}" if parsed.query else parsed.path

    def clear(self) -> None:
        """Remove every container and every network of ours."""
        for row in self.call("GET", "/containers/json?all=1")[1]:
            self.call("DELETE", f"/containers/{row['Id']}?force=1&v=1")
        for name in self.networks():
            self.call("DELETE", f"/networks/{name}")

    def _list_processes(self) -> list[int]:
        """Everything that runs in the namespace, in a container or for this directory."""
        argv = ["ip", "netns", "pids", self.netns.name]
        found = {int(pid) for pid in subprocess.check_output(argv).split()}
        found.update(*self.processes().values())
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.directory).encode() in path.read_bytes():
                    found.add(int(path.parent.name))
        return sorted(found - {os.getpid()})

    def _list_mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        found = [line.split()[1] for line in lines]
        return [mount for mount in reversed(found) if mount.startswith(f"{self.directory}/")]

    def close(self) -> None:
        """End everything and remove it; fails when something is left."""
        if self.dockerd.child.poll() is None:
            self.clear()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.dockerd.stop(signal.SIGTERM, 15)
        self.registry.stop(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (left := self._list_processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.dockerd.child.wait(10)
        for mount in self._list_mounts():
            subprocess.run(["umount", "--lazy", mount], check=True)
        assert (self._list_processes(), self._list_mounts()) == ([], [])
        for group in {self.cgroup, *Path("/sys/fs/cgroup").glob(f"*/{self.cgroup.name}")}:
            for path in sorted(group.glob("**"), reverse=True):
                path.rmdir()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine in a namespace of its own."""
    with make_netns() as netns:
        made = Engine(netns)
        try:
            yield made
        finally:
            made.close()
