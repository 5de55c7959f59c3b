"""What a test and a machine tell each other: qemu's monitor, the serial console, the guest agent.

Each is a pair of connected sockets of which qemu has one end, so no path can be too long.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

QMP_TIMEOUT_S = 60.0
# How long a machine may not take what is sent to it.
SEND_TIMEOUT_S = 60


class Qmp:
    """The monitor of one qemu process."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(QMP_TIMEOUT_S)
        self.sock = sock
        self.lines = sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._read()  # the greeting
        self.run("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self.lines.readline()
        assert line, "qemu ended"
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, command: str, *, fds: Sequence[int] = (), **arguments: object) -> Any:
        """Run one command; fails the test when qemu refuses it."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": named}).encode()
        socket.send_fds(self.sock, [message], list(fds))
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
                continue
            assert "return" in answer, f"qemu: {command} {named}: {answer}"
            return answer["return"]

    def wait_event(self, name: str, **data: object) -> None:
        """Wait for an event with this data, also one that already came."""
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event["data"].items():
                    self.events.remove(event)
                    return
            self.events.append(self._read())

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


class Channel:
    """A socket that a thread of its own reads, and what came, to wait on."""

    def __init__(self, sock: socket.socket, take: Callable[[bytes], None]) -> None:
        # Only sending has a limit; the thread reads for as long as the machine is there.
        limit = struct.pack("ll", SEND_TIMEOUT_S, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.sock = sock
        self.take = take
        self.changed = threading.Condition()
        self.open = True
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except OSError:
                data = b""
            with self.changed:
                if data:
                    self.take(data)
                else:
                    self.open = False
                self.changed.notify_all()
            if not data:
                return

    def send(self, data: bytes) -> None:
        """Send all of it; fails the test when the other end is gone or does not take it."""
        try:
            with self._send_lock:
                self.sock.sendall(data)
        except OSError as error:
            raise AssertionError(f"the machine is off, or takes no input: {error}") from error

    def wait(self, probe: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `probe` is true; False when it is not and the other end is gone or late."""
        found = False

        def look() -> bool:
            nonlocal found
            found = probe()
            return found or not self.open

        with self.changed:
            self.changed.wait_for(look, timeout_s)
        return found

    def close(self) -> None:
        """Close it when the other end is gone; what it sent before is taken."""
        self._thread.join(5)
        self.sock.close()


class Console(Channel):
    """The serial console: all its text, in a file too."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self.path = path
        self.text = ""
        self.seen = 0  # as far as wait_console() looked
        super().__init__(sock, self._take)

    def _take(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
        self.text += data.decode("ascii", errors="replace")

    def find(self, text: str) -> bool:
        """Is the text there, after what an earlier call found?"""
        at = self.text.find(text, self.seen)
        if at >= 0:
            self.seen = at + len(text)
        return at >= 0


class Guest(Channel):
    """The agent in the machine: requests and answers."""

    def __init__(self, sock: socket.socket) -> None:
        self.boot_id = ""  # of the last hello
        self.hellos = 0
        self.answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._rest = b""
        super().__init__(sock, self._take)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # empty, or cut by a reboot
                continue
            if "hello" in message:
                self.boot_id = message["hello"]
                self.hellos += 1
            else:
                self.answers[message["id"]] = message

    def ask(self, limit_s: float, **request: object) -> dict[str, Any]:
        """Send one request, wait for its answer."""
        with self.changed:
            self._number += 1
            number, hellos = self._number, self.hellos
        # The empty line ends what a request cut by a reboot left.
        self.send(b"\n" + json.dumps({"id": number, **request}).encode() + b"\n")
        self.wait(lambda: number in self.answers or self.hellos > hellos, limit_s)
        answer = self.answers.pop(number, None)
        assert answer is not None, (
            "the machine is gone"
            if not self.open
            else "the machine started again"
            if self.hellos > hellos
            else f"the machine gave no answer for {limit_s:g} s"
        )
        assert "error" not in answer, answer["error"]
        return answer
