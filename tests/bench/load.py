"""The load of many hosts: each on its own kept connection and address, one process, raw HTTP/2.

    python -m tests.bench.load '{"server": "cp", "port": 9092, "hosts": 100, "rate": 10, ...}'

It speaks plain gRPC to the control plane (unary Heartbeat) and to etcd (LeaseKeepAlive on one
stream a host), with the same code, so that their figures can stand beside each other. A real gRPC
client would cost more than the servers that it measures. Calls go out at random times (exponential
gaps), whether or not the server keeps up; a latency counts from the time at which the call was due.
A call is right only when the server's message came, was decoded and says so.

Its one argument is a `Spec` as JSON. It prints a JSON line at each step, the figures in the last.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import errno
import hashlib
import heapq
import json
import os
import random
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

from proto import openinfra_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 1, 1, 4
FIRST_ADDRESS = 0x0A4D1000  # 10.77.16.0, the first that the control plane hands out by itself
BOOT_ID = "0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10"
LEASE_TTL_S = 120
CALL_TIMEOUT_S = 10.0
CONNECTING_MAX = 200  # handshakes under way at one time while the fleet connects
RETRY_S = (1.0, 5.0)  # a host that was cut off or refused comes again after such a time


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to do; times in seconds, rate in calls per second over all hosts."""

    server: str  # cp or etcd
    port: int
    hosts: int
    rate: float
    warm_s: float = 0
    measure_s: float = 0
    restarts: int = 0  # how often the server will go away and come back
    seed: int = 1


def address_of(number: int) -> str:
    """The tunnel address of host `number`, which counts from 0."""
    return socket.inet_ntoa(struct.pack("!I", FIRST_ADDRESS + number))


def session_of(number: int) -> bytes:
    """The session of host `number`; tests/bench/fleet.py writes its hash into the database."""
    return hashlib.sha256(b"bench session %d" % number).digest()


# ---------------------------------------------------------------------------------------------
# HTTP/2 and gRPC: the little that a client needs (RFC 9113, RFC 7541).
# ---------------------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def message(payload: bytes) -> bytes:
    """One gRPC message, not compressed."""
    return b"\0" + struct.pack("!I", len(payload)) + payload


def header_blocks(path: str, authority: str, is_unary: bool) -> tuple[bytes, bytes]:
    """The headers of a connection's first call, which fill the table, and of all later ones."""
    fields = {
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "grpc-bench",
    }
    if is_unary:
        fields["grpc-timeout"] = f"{CALL_TIMEOUT_S:.0f}S"
    fixed = b"\x83\x86"  # :method POST, :scheme http
    first = fixed + b"".join(
        bytes([0x40, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    newest = 62  # the table's newest entry; older ones follow it
    later = fixed + bytes(0x80 | newest + age for age in reversed(range(len(fields))))
    return first, later


OPENING = (
    PREFACE
    + frame(SETTINGS, 0, 0, struct.pack("!HIHI", 2, 0, 4, 1 << 20))  # no push, stream window
    + frame(8, 0, 0, struct.pack("!I", 1 << 30))  # the connection's window: never full here
)
CALLS = {
    "heartbeat": "/openinfra.v1.AgentApi/Heartbeat",
    "grant": "/etcdserverpb.Lease/LeaseGrant",
    "keepalive": "/etcdserverpb.Lease/LeaseKeepAlive",
}


def varint(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class Host:
    """One host: its connection, its HTTP/2 state and its call under way."""

    __slots__ = (
        "accepted",
        "buffer",
        "due",
        "later",
        "number",
        "reply",
        "seq",
        "session",
        "settled",
        "sock",
        "stream",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.session = session_of(number)
        self.seq = 0  # of the heartbeat that was sent last
        self.accepted = 0  # seq of the one that was acknowledged last
        self.due = 0.0  # when the call under way was due; 0: none is
        self.sock: socket.socket | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the connection's state."""
        self.buffer = b""
        self.reply = b""
        self.stream = -1
        self.settled = False  # the server's settings came
        self.later: bytes = b""

    def connect(self, port: int) -> socket.socket:
        """Begin to connect from the host's own address, without waiting."""
        self.reset()
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex((address_of(self.number), port))
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, os.strerror(code))
        self.sock = sock
        return sock

    def open_stream(self, name: str, end: bool, payload: bytes, port: int) -> bytes:
        """The frames of a new call with its first message."""
        self.stream += 2
        block = self.later
        if not block:
            authority = f"{address_of(self.number)}:{port}"
            block, self.later = header_blocks(CALLS[name], authority, end)
        flags = END_STREAM if end else 0
        return frame(HEADERS, END_HEADERS, self.stream, block) + frame(
            DATA, flags, self.stream, message(payload)
        )

    def heartbeat(self, port: int) -> bytes:
        """The frames of a heartbeat with the present seq."""
        request = pb.HeartbeatRequest(session=self.session, seq=self.seq, boot_id=BOOT_ID)
        return self.open_stream("heartbeat", True, request.SerializeToString(), port)

    def grant(self, port: int) -> bytes:
        """The frames that make the host's lease."""
        payload = b"\x08" + varint(LEASE_TTL_S) + b"\x10" + varint(self.number + 1)
        frames = self.open_stream("grant", True, payload, port)
        self.later = b""  # another method follows
        return frames

    def keepalive(self, port: int) -> bytes:
        """The frames of one keepalive, on a stream that stays open."""
        payload = b"\x08" + varint(self.number + 1)
        if not self.later:
            return self.open_stream("keepalive", False, payload, port)
        return frame(DATA, 0, self.stream, message(payload))


# ---------------------------------------------------------------------------------------------
# The fleet: one epoll loop over all hosts.
# ---------------------------------------------------------------------------------------------


class Fleet:
    """All hosts, and what became of their calls."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.hosts = [Host(number) for number in range(spec.hosts)]
        self.by_fd: dict[int, Host] = {}
        self.epoll = select.epoll()
        self.latencies_s = array.array("d")
        self.errors: collections.Counter[str] = collections.Counter()
        self.random = random.Random(spec.seed)
        self.order = self.hosts.copy()  # in which hosts take their turns, round and round
        self.random.shuffle(self.order)
        self.made = 0
        self.is_right: Callable[[bytes], bool] = lambda _reply: True
        self.on_settled: Callable[[Host], None] = lambda _host: None
        self.on_reply: Callable[[Host], None] = self.note_latency
        self.on_lost: Callable[[Host], None] = self.note_lost
        self.on_refused: Callable[[Host], None] = lambda _host: None

    @staticmethod
    def is_heartbeat(reply: bytes) -> bool:
        """The control plane accepted it, and says when the next one is due."""
        return pb.HeartbeatReply.FromString(reply).next_heartbeat_ms > 0

    @staticmethod
    def is_lease(reply: bytes) -> bool:
        """The lease lives, with its full time."""
        return (b"\x18" + varint(LEASE_TTL_S)) in reply

    def note_latency(self, host: Host) -> None:
        """The time from when the call was due."""
        self.latencies_s.append(time.monotonic() - host.due)

    def note_lost(self, _host: Host) -> None:
        """A connection that ended by itself."""
        self.errors["connection lost"] += 1

    def connect(self, host: Host) -> None:
        """Begin a connection."""
        try:
            sock = host.connect(self.spec.port)
        except OSError:
            self.on_lost(host)
            return
        self.by_fd[sock.fileno()] = host
        self.epoll.register(sock.fileno(), select.EPOLLOUT)

    def drop(self, host: Host) -> None:
        """Close a connection, if there is one."""
        if host.sock is not None:
            del self.by_fd[host.sock.fileno()]
            host.sock.close()  # epoll forgets it
            host.sock = None

    def send(self, host: Host, data: bytes) -> None:
        """Send all of it; it is far smaller than a socket's buffer."""
        assert host.sock is not None
        try:
            sent = host.sock.send(data)
        except OSError:
            self.lose(host)
            return
        assert sent == len(data), "a socket's buffer is full"

    def call(self, host: Host, due: float) -> None:
        """Make the server's call for one host."""
        if host.due:
            self.errors["still under way when the next was due"] += 1
            return
        host.due = due
        if self.spec.server == "cp":
            host.seq += 1
            self.send(host, host.heartbeat(self.spec.port))
        else:
            self.send(host, host.keepalive(self.spec.port))

    def lose(self, host: Host) -> None:
        """The connection is gone, with it what was under way."""
        self.drop(host)
        host.due = 0.0
        self.on_lost(host)

    def poll(self, timeout_s: float) -> None:
        """Take what comes within this time."""
        for fd, events in self.epoll.poll(max(timeout_s, 0)):
            host = self.by_fd.get(fd)
            if host is None or host.sock is None:
                continue
            if events & select.EPOLLOUT and not events & (select.EPOLLERR | select.EPOLLHUP):
                self.epoll.modify(fd, select.EPOLLIN)
                self.send(host, OPENING)
            else:
                self.receive(host, host.sock)

    def receive(self, host: Host, sock: socket.socket) -> None:
        """Take the frames of one host."""
        try:
            data = sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lose(host)
            return
        data = host.buffer + data
        at = 0
        while len(data) - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            self.take(host, data[at + 3], data[at + 4], data[at + 9 : end])
            if host.sock is not sock:
                return
            at = end
        host.buffer = data[at:]

    def take(self, host: Host, kind: int, flags: int, payload: bytes) -> None:
        """One frame."""
        if kind == DATA:
            host.reply += payload
            if (
                len(host.reply) >= 5
                and len(host.reply) >= 5 + struct.unpack("!I", host.reply[1:5])[0]
                and self.spec.server == "etcd"
                and host.later
            ):
                self.finish(host, b"")  # its stream stays open
        elif kind == HEADERS and flags & END_STREAM:
            self.finish(host, payload)
        elif kind == SETTINGS and not flags & ACK:
            self.send(host, frame(SETTINGS, ACK, 0))
            if not host.settled:
                host.settled = True
                self.on_settled(host)
        elif kind == PING and not flags & ACK:
            self.send(host, frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM and host.due:
            self.finish(host, b"reset %d" % int.from_bytes(payload, "big"))
        elif kind == GOAWAY:
            self.lose(host)

    def finish(self, host: Host, trailers: bytes) -> None:
        """A call ended: with a message, or refused with the reason in its trailers."""
        reply, host.reply = host.reply[5:], b""
        if reply and self.is_right(reply):
            host.accepted = host.seq
            self.on_reply(host)
        else:
            words = re.findall(rb"[ -~]{4,}", trailers)
            self.errors[b" ".join(words).decode() or "no message"] += 1
            self.on_refused(host)
        host.due = 0.0

    def connect_all(self) -> None:
        """Connect every host, with a lease each at etcd; raises when it takes longer than 120 s."""
        settled = 0

        def on_settled(host: Host) -> None:
            nonlocal settled
            settled += 1
            if self.spec.server == "etcd":
                host.due = time.monotonic()
                self.send(host, host.grant(self.spec.port))

        self.on_settled = on_settled
        self.on_reply = lambda _host: None
        self.is_right = lambda _reply: True
        deadline = time.monotonic() + 120
        begun = 0
        while settled < len(self.hosts) or any(host.due for host in self.hosts):
            while begun < len(self.hosts) and begun - settled < CONNECTING_MAX:
                self.connect(self.hosts[begun])
                begun += 1
            self.poll(0.1)
            assert time.monotonic() < deadline, f"{settled} hosts connected, {self.errors}"
        self.on_settled = lambda _host: None
        self.on_reply = self.note_latency
        self.is_right = self.is_heartbeat if self.spec.server == "cp" else self.is_lease

    def run(self, duration_s: float) -> int:
        """Make calls at the asked rate for this long; give back how many were made."""
        began = now = due = time.monotonic()
        before = self.made
        while now - began < duration_s:
            while due <= now:
                self.call(self.order[self.made % len(self.order)], due)
                self.made += 1
                due += self.random.expovariate(self.spec.rate)
            self.poll(due - now)
            now = time.monotonic()
        return self.made - before


class Restarts(Fleet):
    """A fleet that goes on by itself: who is cut off or refused comes again, with a heartbeat.

    An agent that is cut off waits until its next heartbeat is due; these hosts do not, so that all
    of them come at one time, which is the worst case for the server.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.again: list[tuple[float, int]] = []  # a heap of when which host comes again
        self.lost: set[int] = set()  # cut off since the server went away
        self.back: set[int] = set()  # of these: accepted since

    def begin(self) -> None:
        """From here on hosts come again."""
        self.on_lost = self.on_refused = self.note_fault
        self.on_settled = self.beat
        self.on_reply = self.note_back

    def note_fault(self, host: Host) -> None:
        """The connection or the call came to nothing."""
        if host.sock is None:
            self.lost.add(host.number)
            self.back.discard(host.number)
        due = time.monotonic() + self.random.uniform(*RETRY_S)
        heapq.heappush(self.again, (due, host.number))

    def note_back(self, host: Host) -> None:
        """A heartbeat was accepted."""
        if host.number in self.lost:
            self.back.add(host.number)

    def beat(self, host: Host) -> None:
        """A heartbeat at once; one that was not acknowledged is repeated with its number."""
        if host.sock is None or host.due:
            return
        host.due = time.monotonic()
        if host.seq == host.accepted:
            host.seq += 1
        self.send(host, host.heartbeat(self.spec.port))

    def come_again(self) -> None:
        """Hosts whose time has come: a connection, or a heartbeat on the one that they have."""
        while self.again and self.again[0][0] <= time.monotonic():
            host = self.hosts[heapq.heappop(self.again)[1]]
            if host.sock is None:
                self.connect(host)
            else:
                self.beat(host)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Heartbeats at the asked rate from hosts that are connected."""
        due = time.monotonic()
        while not is_over():
            now = time.monotonic()
            self.come_again()
            while due <= now:
                host = self.order[self.made % len(self.order)]
                if host.settled and host.number not in self.lost - self.back:
                    self.beat(host)
                self.made += 1
                due += self.random.expovariate(self.spec.rate)
            self.poll(min(due - now, 0.01))


def follow(spec: Spec) -> None:
    """Connect, then say each time when all hosts were cut off and are back."""
    fleet = Restarts(spec)
    fleet.connect_all()
    fleet.begin()
    for host in fleet.hosts:
        due = time.monotonic() + host.number / spec.hosts * spec.warm_s
        heapq.heappush(fleet.again, (due, host.number))
    fleet.run_until(lambda: all(host.accepted for host in fleet.hosts))
    report(at="ready")
    for _ in range(spec.restarts):
        fleet.run_until(lambda: len(fleet.back) == spec.hosts)
        at_s = time.monotonic()
        accepted = [host.accepted for host in fleet.hosts]
        report(at="back", at_s=at_s, accepted=accepted, errors=dict(fleet.errors))
        fleet.lost.clear()
        fleet.back.clear()
        fleet.errors.clear()
    until_s = time.monotonic() + spec.measure_s
    fleet.run_until(lambda: time.monotonic() > until_s)
    report(at="end", accepted=[host.accepted for host in fleet.hosts], errors=dict(fleet.errors))
    sys.stdin.read()
    for host in fleet.hosts:
        fleet.drop(host)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed; they are sorted."""
    return values[min(int(len(values) * share), len(values) - 1)]


def report(**pairs: object) -> None:
    """One JSON line."""
    print(json.dumps(pairs), flush=True)


def measure(spec: Spec) -> None:
    """Connect, warm up, measure."""
    fleet = Fleet(spec)
    fleet.connect_all()
    report(at="connected")
    fleet.run(spec.warm_s)
    fleet.latencies_s = array.array("d")
    warm_errors = dict(fleet.errors)
    report(at="begin")
    cpu_s, began = time.process_time(), time.monotonic()
    made = fleet.run(spec.measure_s)
    took_s = time.monotonic() - began
    latencies = sorted(fleet.latencies_s)
    report(
        at="end",
        calls=made,
        replies=len(latencies),
        rate=len(latencies) / took_s,
        p50_s=percentile(latencies, 0.5),
        p99_s=percentile(latencies, 0.99),
        max_s=latencies[-1],
        errors=dict(fleet.errors),
        warm_errors=warm_errors,
        own_cpu_s=time.process_time() - cpu_s,
        took_s=took_s,
    )
    sys.stdin.read()  # the connections stay until the other side has looked at the memory
    for host in fleet.hosts:
        fleet.drop(host)


if __name__ == "__main__":
    SPEC = Spec(**json.loads(sys.argv[1]))
    (follow if SPEC.restarts else measure)(SPEC)
