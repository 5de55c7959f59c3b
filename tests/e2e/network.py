"""Private networks of test machines: frames go by sockets, the host has no address in them."""

from __future__ import annotations

import contextlib
import heapq
import select
import socket
import threading
import time


class Network:
    """A switch without memory: a thread that gives each frame to all the other machines."""

    def __init__(self) -> None:
        self.delay_ms = 0.0  # of each frame, so a ping takes twice as long
        self._ports: dict[str, socket.socket] = {}
        self._old: list[socket.socket] = []
        self._cut: set[str] = set()
        self._waiting: list[tuple[float, int, str, bytes]] = []
        self._frames = 0
        self._lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def plug(self, name: str) -> socket.socket:
        """Give back qemu's end of a new cable; the old one of that name is taken out."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        with self._lock:
            if name in self._ports:
                self._old.append(self._ports[name])  # the thread may be looking at it
            self._ports[name] = ours
        self._wake.send(b"+")
        return theirs

    def partition(self, name: str) -> None:
        """Cut one machine off from all others."""
        self._cut.add(name)

    def heal(self, name: str) -> None:
        """Join it again."""
        self._cut.discard(name)

    def close(self) -> None:
        self._wake.close()
        self._thread.join()
        for sock in [self._woken, *self._old, *self._ports.values()]:
            sock.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                names = {sock: name for name, sock in self._ports.items()}
            now = time.monotonic()
            until = max(0.0, self._waiting[0][0] - now) if self._waiting else None
            ready, _, _ = select.select([self._woken, *names], [], [], until)
            if self._woken in ready and not self._woken.recv(100):
                return
            for sock in ready:
                if sock in names:
                    self._receive(sock, names[sock])
            self._deliver()

    def _receive(self, sock: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):  # the machine is gone
            while frame := sock.recv(1 << 17):
                due = time.monotonic() + self.delay_ms / 1000
                heapq.heappush(self._waiting, (due, self._frames, name, frame))
                self._frames += 1

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, sender, frame = heapq.heappop(self._waiting)
            with self._lock:
                others = {n: s for n, s in self._ports.items() if n != sender}
            for name, sock in others.items():
                if not {sender, name} & self._cut:
                    with contextlib.suppress(OSError):  # gone, or too slow: the frame is lost
                        sock.send(frame)
