"""One hostile or honest client for the tests, inside a network namespace (see Job in hostile.py).

Its argument is one JSON object: `job` names a function below, the rest are its arguments. It prints
one line of JSON when it has begun and one when its stdin ends or its time is over. The address that
it connects to is also the one that it comes from. All jobs are bounded in time and in count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
BLOCK = bytes(65_536)


def say(**values: object) -> None:
    """Print one line for the test."""
    print(json.dumps(values), flush=True)


def is_over() -> bool:
    """True once the test has closed this process's stdin."""
    return bool(select.select([0], [], [], 0)[0])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame (RFC 9113, section 4.1)."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def headers(method: str) -> bytes:
    """A gRPC call's header block, every field a literal without indexing (RFC 7541, 6.2.2)."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/openinfra.v1.AgentApi/{method}"),
        (":authority", "cp"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    block = b""
    for name, value in fields:
        block += bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


def call_frames(method: str, stream: int, message: bytes) -> bytes:
    """A whole unary call."""
    head = frame(HEADERS, END_HEADERS, stream, headers(method))
    return head + frame(DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message)


def connect(target: list[Any]) -> socket.socket:
    """A connection, or OSError after 5 s."""
    return socket.create_connection((str(target[0]), int(target[1])), 5)


def open_one(target: list[Any], first: bytes) -> socket.socket | None:
    """A connection on which something was sent, or None."""
    try:
        sock = connect(target)
        sock.sendall(first)
    except OSError:
        return None
    sock.setblocking(False)
    return sock


def drip_one(sock: socket.socket, byte: bytes) -> int:
    """Send a byte, read what has come; give back its length, or -1 when it is closed."""
    part = b" "
    try:
        with contextlib.suppress(BlockingIOError):
            part = sock.recv(65_536)
        sock.sendall(byte)
    except OSError:
        part = b""
    if not part:
        sock.close()
    return len(part) if part else -1


def hold(target: list[Any], count: int, first: str, drip: str = "", every_s: float = 1.0) -> None:
    """Open connections, send `first` on each, then one byte of `drip` at a time; keep them."""
    made = [open_one(target, bytes.fromhex(first)) for _ in range(count)]
    socks = [sock for sock in made if sock]
    opened, rest = len(socks), bytes.fromhex(drip)
    say(opened=opened, refused=count - opened)
    while not is_over():
        time.sleep(every_s)
        socks = [sock for sock in socks if drip_one(sock, rest[:1]) >= 0]
        rest = rest[1:]
    say(opened=opened, refused=count - opened, closed=opened - len(socks), open=len(socks))
    for sock in socks:
        sock.close()


def syn(target: list[Any], count: int, network: str) -> None:
    """Send SYNs from addresses of which none ever answers: half-open in the kernel."""
    say()
    to, port = socket.inet_aton(str(target[0])), int(target[1])
    base = struct.unpack(">I", socket.inet_aton(network))[0]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for number in range(count):
            source = struct.pack(">I", base + number % 250 + 1)
            ports = struct.pack(">HH", 1_024 + number // 250, port)
            tcp = ports + struct.pack(">IIBBHHH", number, 0, 5 << 4, 2, 64_240, 0, 0)
            pseudo = source + to + struct.pack(">BBH", 0, 6, len(tcp)) + tcp
            total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
            total = (total & 0xFFFF) + (total >> 16)
            checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
            tcp = tcp[:16] + struct.pack(">H", checksum) + tcp[18:]
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 0, number & 0xFFFF, 0, 64, 6, 0) + source + to
            raw.sendto(ip + tcp, (str(target[0]), 0))
            if number % 100 == 0:
                time.sleep(0.005)
    say(sent=count)


def body(
    target: list[Any], head: str, size: int, chunked: bool = False, frames: bool = False
) -> None:
    """Send a head, then as many bytes as are taken; say how many, and what was answered."""
    say()
    began, sent, answer = time.monotonic(), 0, b""
    block = b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK
    if frames:  # of one gRPC message
        block = frame(DATA, 0, 1, BLOCK[:16_384]) * 4
    with connect(target) as sock:
        try:
            sock.sendall(bytes.fromhex(head))
            if frames:
                sock.sendall(frame(DATA, 0, 1, struct.pack(">BI", 0, size)))
            while sent < size:
                sock.sendall(block)
                sent += len(BLOCK)
        except OSError:
            pass
        with contextlib.suppress(OSError):
            while part := sock.recv(65_536):
                answer += part
    say(sent=sent, answer=answer[:300].decode(errors="replace"), took_s=time.monotonic() - began)


class Flooder:
    """One HTTP/2 connection that keeps calls in flight and reads only how they end."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.stream, self.flying, self.ended = 1, 0, 0
        self.pending = b""
        self.sock = connect(order["target"])
        self.sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self.sock.setblocking(False)

    def message(self) -> bytes:
        """The request's bytes; a Heartbeat's session is another one each time."""
        raw = bytes.fromhex(self.order["message"])
        return raw.replace(b"S" * 32, os.urandom(32))

    def send(self) -> int:
        """Fill up to `at_once` calls; give back how many were sent."""
        count = min(int(self.order["at_once"]) - self.flying, 200)
        out = b""
        for _ in range(count):
            if self.order["kind"] == "reset":
                out += frame(HEADERS, END_HEADERS, self.stream, headers("Heartbeat"))
                out += frame(RST_STREAM, 0, self.stream, struct.pack(">I", 8))
            else:
                out += call_frames(self.order["method"], self.stream, self.message())
                self.flying += 1
            self.stream += 2
        self.sock.setblocking(True)
        self.sock.settimeout(2)
        self.sock.sendall(out)
        self.sock.setblocking(False)
        return count

    def read(self) -> None:
        """Count the streams that ended; answer what must be answered."""
        with contextlib.suppress(BlockingIOError):
            part = self.sock.recv(262_144)
            if not part:
                raise ConnectionError
            self.pending += part
        for kind, flags, payload in self.frames():
            if kind == SETTINGS and not flags & ACK:
                self.sock.sendall(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self.sock.sendall(frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                raise ConnectionError
            elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                self.flying = max(0, self.flying - 1)
                self.ended += 1

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """The whole frames that have come."""
        while len(self.pending) >= 9:
            size = int.from_bytes(self.pending[:3], "big")
            if len(self.pending) < 9 + size:
                return
            yield self.pending[3], self.pending[4], self.pending[9 : 9 + size]
            self.pending = self.pending[9 + size :]

    def step(self, may_send: bool) -> int:
        """Read, then send if it may; give back how many were sent, or -1 when it is closed."""
        try:
            self.read()
            sent = self.send() if may_send else 0
        except OSError:
            sent = -1
        if self.stream > int(self.order.get("calls_each", 1 << 30)):
            sent = -1  # it was meant to make no more
        if sent < 0:
            self.sock.close()
        return sent


def flood(**order: Any) -> None:
    """Calls from one address on several connections, at most `per_s` a second; no retry waits."""
    say()
    began, sent, ended, made, lost = time.monotonic(), 0, 0, 0, 0
    flooders: list[Flooder] = []
    while time.monotonic() < began + order["seconds"] and not is_over():
        try:
            fresh_s = time.monotonic() - began + 0.1
            while len(flooders) < order["connections"] and made < order["connects_per_s"] * fresh_s:
                flooders.append(Flooder(order))
                made += 1
        except OSError:
            lost += 1
        alive = []
        for flooder in flooders:
            count = flooder.step(sent < order["per_s"] * (time.monotonic() - began))
            if count < 0:
                ended += flooder.ended
            else:
                sent += count
                alive.append(flooder)
        flooders = alive
        time.sleep(0.002)
    for flooder in flooders:
        ended += flooder.ended
        flooder.sock.close()
    say(sent=sent, ended=ended, connections=made, lost=lost)


async def beat(host: dict[str, str], order: dict[str, Any], seen: dict[str, Any]) -> None:
    """One honest host on its own connection: a heartbeat each `every_s`, from its address."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 1000)]
    target = f"{host['address']}:{order['port']}"
    until = time.monotonic() + order["seconds"]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        call: Any = channel.unary_unary("/openinfra.v1.AgentApi/Heartbeat")
        await asyncio.sleep(random.random() * order["every_s"])
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                await call(bytes.fromhex(host["beat"]), timeout=10)
            except grpc.aio.AioRpcError as error:
                seen["errors"].append(f"{error.code().name}: {error.details()}")
            took = time.monotonic() - began
            seen["took"].append(took)
            await asyncio.sleep(max(0.0, order["every_s"] - took))


async def ask(order: dict[str, Any]) -> str:
    """One request on a connection of its own, as the reverse proxy makes them; its status."""
    reader, writer = await asyncio.open_connection(*order["http"])
    try:
        writer.write(bytes.fromhex(order["request"]))
        answer = await reader.read()
    finally:
        writer.close()
    return answer[9:12].decode() or "empty"


async def poll(order: dict[str, Any], seen: dict[str, Any]) -> None:
    """The operator, who asks four times a second."""
    until = time.monotonic() + order["seconds"]
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            status = await asyncio.wait_for(ask(order), 20)
        except (OSError, asyncio.TimeoutError) as error:
            status = type(error).__name__
        seen["polls"].append(time.monotonic() - began)
        seen["statuses"][status] = seen["statuses"].get(status, 0) + 1
        await asyncio.sleep(max(0.0, 0.25 - (time.monotonic() - began)))


async def honest_all(order: dict[str, Any]) -> None:
    """All honest hosts and the operator; the latencies of each call in seconds."""
    seen: dict[str, Any] = {"took": [], "errors": [], "polls": [], "statuses": {}}
    tasks = [asyncio.create_task(beat(host, order, seen)) for host in order["hosts"]]
    if order.get("http"):
        tasks.append(asyncio.create_task(poll(order, seen)))
    say()
    await asyncio.gather(*tasks)
    say(**{**seen, "errors": seen["errors"][:20], "failed": len(seen["errors"])})


def honest(**order: Any) -> None:
    """Honest hosts with one heartbeat each `every_s`, and an operator who polls."""
    asyncio.run(honest_all(order))


async def browse(order: dict[str, Any], raw: list[bytes], seen: dict[str, Any]) -> None:
    """One kept connection by TLS from `source`: each request once the answer before it is there."""
    context = ssl.create_default_context(cafile=order["ca"])
    number, until = 0, time.monotonic() + order["seconds"]
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection(
            *order["target"],
            ssl=context,
            server_hostname=order["name"],
            local_addr=(order["source"], 0),
        )
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while time.monotonic() < until:
                began, number = time.monotonic(), number + 1
                writer.write(raw[number % len(raw)])
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = head.lower().partition("content-length: ")[2].split()
                answer = await reader.readexactly(int(size[0]))
                seen["took"].append(time.monotonic() - began)
                seen["statuses"][head[9:12]] = seen["statuses"].get(head[9:12], 0) + 1
                seen["last"][head[9:12]] = head + answer.decode()[:300]
                await asyncio.sleep(order["every_s"])
        writer.transport.abort()
        await asyncio.sleep(0)  # it closes in the loop's next round


async def browse_all(order: dict[str, Any]) -> None:
    """All connections; the latencies and how often each status came, with its last answer."""
    seen: dict[str, Any] = {"took": [], "statuses": {}, "last": {}}
    raw = [bytes.fromhex(request) for request in order["requests"]]
    say()
    await asyncio.gather(*(browse(order, raw, seen) for _ in range(order["connections"])))
    say(**seen)


def https(**order: Any) -> None:
    """Requests in turn, on several connections at once."""
    asyncio.run(browse_all(order))


JOBS: dict[str, Callable[..., None]] = {
    "hold": hold,
    "syn": syn,
    "body": body,
    "flood": flood,
    "honest": honest,
    "https": https,
}


def main() -> None:
    """Run one job."""
    order = json.loads(sys.argv[1])
    JOBS[order.pop("job")](**order)


if __name__ == "__main__":
    main()
