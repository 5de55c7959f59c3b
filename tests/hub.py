"""A real WireGuard interface (wireguard-go) in a namespace, and the helper that keeps its peers."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness import ROOT, Netns, Process, wait_for

SYSTEM_PYTHON = "/usr/bin/python3"


def start_wireguard(netns: Netns, name: str, directory: Path) -> Process:
    """A WireGuard interface of this name, unique among all namespaces."""
    argv = netns.argv(["wireguard-go", "-f", name])
    process = Process(argv, directory / f"{name}.log", {})
    wait_for("wireguard-go", Path(f"/run/wireguard/{name}.sock").exists)
    return process


class Hub:
    """The hub's interface and its helper; each can be ended and started again."""

    def __init__(self, netns: Netns, directory: Path) -> None:
        self.netns = netns
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.name = f"oi{secrets.token_hex(4)}"  # unique among all namespaces
        self.socket = directory / "wg.sock"
        self.interface: Process | None = None
        self.helper: Process | None = None

    def start_interface(self) -> None:
        """A fresh interface, without peers: the hub after a reboot."""
        self.interface = start_wireguard(self.netns, self.name, self.directory)
        self.wg("set", "private-key", "/dev/stdin", stdin=self.wg_key())

    def stop_interface(self) -> None:
        """The interface is gone with its peers."""
        if self.interface:
            self.interface.stop(signal.SIGTERM)
            wait_for("its end", lambda: not Path(f"/run/wireguard/{self.name}.sock").exists())

    def start_helper(self) -> None:
        """Start the helper and wait until it listens."""
        script = [SYSTEM_PYTHON, "-SI", str(ROOT / "systemd" / "openinfra_wg.py")]
        flags = [f"--socket={self.socket}", f"--interface={self.name}"]
        self.socket.unlink(missing_ok=True)
        argv = self.netns.argv([*script, *flags])
        self.helper = Process(argv, self.directory / "helper.log", {})
        wait_for("the helper", self.socket.exists)

    @staticmethod
    def wg_key() -> str:
        """A private key."""
        return subprocess.run(["wg", "genkey"], capture_output=True, text=True, check=True).stdout

    def wg(self, verb: str, *words: str, stdin: str = "") -> str:
        """Run `wg`, as the operator does."""
        argv = ["wg", verb, self.name, *words]
        return subprocess.run(
            argv, input=stdin, capture_output=True, text=True, check=True, timeout=20
        ).stdout

    def set(self, key: str, *ips: str) -> None:
        """`wg set` of one peer by hand."""
        self.wg("set", "peer", key, "allowed-ips", ",".join(f"{ip}/32" for ip in ips))

    def remove(self, key: str) -> None:
        """Take a peer away by hand."""
        self.wg("set", "peer", key, "remove")

    def peers(self) -> dict[str, str]:
        """Peer -> its networks."""
        rows = (line.split("\t") for line in self.wg("show", "allowed-ips").splitlines())
        return {key: ips.replace("(none)", "").replace("/32", "") for key, ips in rows}

    def ask_raw(self, raw: bytes) -> bytes:
        """What the helper answers to bytes."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(self.socket))
            sock.sendall(raw)
            parts = []
            while part := sock.recv(65_536):
                parts.append(part)
            return b"".join(parts)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One question to the helper."""
        raw = self.ask_raw(json.dumps(request).encode() + b"\n")
        assert raw.endswith(b"\n")
        assert raw.count(b"\n") == 1
        answer: dict[str, Any] = json.loads(raw)
        return answer

    def stop(self) -> None:
        """End both."""
        if self.helper:
            self.helper.stop(signal.SIGKILL)
            assert "Traceback" not in self.helper.log, self.helper.log
        self.stop_interface()


@contextlib.contextmanager
def make_hub(netns: Netns, directory: Path) -> Iterator[Hub]:
    """A hub with its helper, for as long as the block runs."""
    hub = Hub(netns, directory)
    try:
        hub.start_interface()
        hub.start_helper()
        yield hub
    finally:
        hub.stop()
