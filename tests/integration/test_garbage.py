"""Bytes that are no call, and bodies without an end, on both ports of one control plane.

After each of them nothing has changed, the log has no line more, memory is what it was, and an
honest host and the operator go on.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests import hostile_tool as tool
from tests.harness import Client, ControlPlane, Postgres, read_seed, serving, unchanged
from tests.hostile import HEARTBEAT, read_peak_mb, read_rss_mb, reset_peak

GREETING = tool.PREFACE + tool.frame(tool.SETTINGS, 0, 0)
CALL = tool.headers("Heartbeat")
WINDOW_UPDATE, CONTINUATION, PUSH_PROMISE, PRIORITY = 8, 9, 5, 2
BODY_BYTES = int(float(os.environ.get("OPENINFRA_BODY_BYTES", "50e6")))
GROWTH_MB = 30.0  # that one attack may cost at its height


@pytest.fixture(scope="module")
def cp(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of these tests."""
    with serving(postgres, tmp_path_factory.mktemp("cp")) as made:
        yield made


@pytest.fixture(scope="module")
def host(cp: ControlPlane) -> Iterator[Client]:
    """An honest host."""
    with Client(cp) as client:
        client.register(cp.mint())
        client.heartbeat()
        yield client


@pytest.fixture(autouse=True)
def nothing_happened(cp: ControlPlane, host: Client) -> Iterator[None]:
    """Each test leaves rows, log and memory as they were, and the honest ones go on."""
    written, rss_mb = len(cp.log), read_rss_mb(cp)
    reset_peak(cp)
    with unchanged(cp):
        yield
    assert cp.log[written:] == ""
    assert read_peak_mb(cp) < rss_mb + GROWTH_MB
    began = time.monotonic()
    host.heartbeat()
    assert cp.call("GET", "/api/v1/admin/hosts")[0] == 200
    assert time.monotonic() - began < 1


def message(size: int, flags: int = 0) -> bytes:
    """The five bytes before a gRPC message."""
    return struct.pack(">BI", flags, size)


def open_call(*frames: bytes) -> bytes:
    """A call that has begun, and what follows."""
    return GREETING + tool.frame(tool.HEADERS, tool.END_HEADERS, 1, CALL) + b"".join(frames)


def data(payload: bytes, flags: int = tool.END_STREAM, stream: int = 1) -> bytes:
    """A DATA frame."""
    return tool.frame(tool.DATA, flags, stream, payload)


def field(name: bytes, value: bytes) -> bytes:
    """One header field as a literal; both shorter than 127 bytes."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def with_headers(block: bytes, *frames: bytes) -> bytes:
    """A call with these headers instead."""
    head = tool.frame(tool.HEADERS, tool.END_HEADERS, 1, block)
    return GREETING + head + b"".join(frames)


GARBAGE: dict[str, bytes] = {
    "a request of HTTP/1.1": b"GET / HTTP/1.1\r\nHost: cp\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030102000100") + bytes(250),
    "noise": secrets.token_bytes(100_000),
    "half a preface, then noise": tool.PREFACE[:12] + secrets.token_bytes(1000),
    "a preface of HTTP/3": tool.PREFACE.replace(b"2.0", b"3.0"),
    "noise after the preface": tool.PREFACE + secrets.token_bytes(50_000),
    "zeros after the greeting": GREETING + bytes(100_000),
    "a frame of 16 MB": GREETING + b"\xff\xff\xff" + bytes(6) + bytes(200_000),
    "settings of 5 bytes": GREETING + tool.frame(tool.SETTINGS, 0, 0, bytes(5)),
    "settings on a stream": GREETING + tool.frame(tool.SETTINGS, 0, 1),
    "a window of 2^31": GREETING + tool.frame(tool.SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)),
    "frames of 2^24": GREETING + tool.frame(tool.SETTINGS, 0, 0, struct.pack(">HI", 5, 2**24)),
    "ten thousand settings": GREETING + tool.frame(tool.SETTINGS, 0, 0) * 10_000,
    "ten thousand pings": GREETING + tool.frame(tool.PING, 0, 0, bytes(8)) * 10_000,
    "a ping of 7 bytes": GREETING + tool.frame(tool.PING, 0, 0, bytes(7)),
    "a window update of 0": GREETING + tool.frame(WINDOW_UPDATE, 0, 0, bytes(4)),
    "windows too wide": GREETING
    + tool.frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 100,
    "data on no stream": GREETING + data(bytes(10), stream=0),
    "data before its head": GREETING + data(bytes(10)),
    "a head on an even stream": GREETING + tool.frame(tool.HEADERS, 5, 2, CALL),
    "a head on no stream": GREETING + tool.frame(tool.HEADERS, 5, 0, CALL),
    "streams that go back": GREETING
    + tool.call_frames("Heartbeat", 5, b"")
    + tool.call_frames("Heartbeat", 3, b""),
    "a continuation of nothing": GREETING + tool.frame(CONTINUATION, 4, 1, CALL),
    "continuations without an end": GREETING
    + tool.frame(tool.HEADERS, 0, 1, CALL)
    + tool.frame(CONTINUATION, 0, 1, field(b"a", b"b" * 100) * 100) * 500,
    "empty continuations": GREETING
    + tool.frame(tool.HEADERS, 0, 1, CALL)
    + tool.frame(CONTINUATION, 0, 1) * 50_000,
    "a frame between head and continuation": GREETING
    + tool.frame(tool.HEADERS, 0, 1, CALL[:20])
    + tool.frame(tool.PING, 0, 0, bytes(8)),
    "a head that no decoder takes": with_headers(b"\xff\xff\xff\xff\xff\xff"),
    "a table entry that is not there": with_headers(b"\xfe\xff\x03"),
    "Huffman noise": with_headers(b"\x00\x83\xff\xff\xff\x83\xff\xff\xff"),
    "padding longer than its frame": GREETING + tool.frame(tool.HEADERS, 12, 1, b"\xff" + CALL),
    "a promise": GREETING + tool.frame(PUSH_PROMISE, 4, 1, struct.pack(">I", 2) + CALL),
    "a stream that depends on itself": GREETING
    + tool.frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 1)),
    "frames of no known type": GREETING + tool.frame(0x77, 0xFF, 0, bytes(100)) * 1000,
    "goodbye, then a call": GREETING
    + tool.frame(tool.GOAWAY, 0, 0, bytes(8))
    + tool.call_frames("Heartbeat", 1, b""),
    "no method": with_headers(CALL.replace(b":method\x04POST", b":method\x03GET")),
    "no path": with_headers(b"".join(field(b":method", b"POST") for _ in range(3))),
    "a path that is not UTF-8": with_headers(
        CALL.replace(b"Heartbeat", b"Heart\xffbea"), data(b"")
    ),
    "a path that is not UTF-8, of no service": with_headers(
        CALL.replace(b"AgentApi/", b"AgentApi\x82"), data(b"")
    ),
    "an authority that is not UTF-8": with_headers(
        CALL.replace(b"\x02cp", b"\x02\xff\xfe"), data(b"")
    ),
    "a path without a name": with_headers(CALL.replace(b"Heartbeat", b"/////////"), data(b"")),
    "a type that is not gRPC": with_headers(
        CALL.replace(b"application/grpc", b"application/json"), data(b"{}")
    ),
    "a length that is a lie": open_call(data(message(100) + bytes(10))),
    "a message of 4 GB": open_call(data(message(2**32 - 1) + bytes(1000), flags=0)),
    "two messages": open_call(data((message(len(HEARTBEAT)) + HEARTBEAT) * 2)),
    "half a length": open_call(data(b"\0\0\0")),
    "compressed, but nobody says how": open_call(data(message(10, 1) + bytes(10))),
    "an odd flag": open_call(data(message(10, 0x7F) + bytes(10))),
    "compressed noise": with_headers(
        CALL + field(b"grpc-encoding", b"gzip"), data(message(50, 1) + secrets.token_bytes(50))
    ),
    "an unknown compression": with_headers(
        CALL + field(b"grpc-encoding", b"rot13"), data(message(4, 1) + bytes(4))
    ),
    "a timeout of noise": with_headers(
        CALL + field(b"grpc-timeout", b"99999999999999H"), data(message(0))
    ),
    "trailers that are a head again": open_call(
        tool.frame(tool.HEADERS, 5, 1, CALL), tool.frame(tool.HEADERS, 5, 1, CALL)
    ),
}


def throw(cp: ControlPlane, raw: bytes) -> None:
    """Send bytes, read until the control plane says no more, go away."""
    with socket.create_connection(("127.0.0.1", cp.grpc_port), 5) as sock:
        sock.settimeout(0.15)
        with contextlib.suppress(OSError):
            sock.sendall(raw)
        with contextlib.suppress(OSError):
            while sock.recv(65_536):
                pass


def test_what_is_no_call_leaves_no_trace(cp: ControlPlane) -> None:
    for name, raw in GARBAGE.items():
        written = len(cp.log)
        throw(cp, raw)
        assert cp.log[written:] == "", name
        assert cp.process
        assert cp.process.child.poll() is None, name


@pytest.mark.parametrize("seed", [None, 507040531], ids=["drawn", "path not UTF-8, and gone"])
def test_mutations_of_what_is_a_call_leave_no_trace(cp: ControlPlane, seed: int | None) -> None:
    source = random.Random(seed or read_seed())
    whole = GREETING + tool.call_frames("Heartbeat", 1, HEARTBEAT)
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(tool.PREFACE), len(raw))
            raw[at : at + source.randint(0, 2)] = source.randbytes(source.randint(0, 3))
        throw(cp, bytes(raw))


def call(cp: ControlPlane, raw: bytes, **more: Any) -> grpc.StatusCode:
    """How a call by gRPC's own client ends."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    options += [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{cp.grpc_port}", options=options) as channel:
        method: Any = channel.unary_unary("/openinfra.v1.AgentApi/Heartbeat")
        with pytest.raises(grpc.RpcError) as error:
            method(raw, timeout=20, **more)
    failed: Any = error.value
    code: grpc.StatusCode = failed.code()
    return code


@pytest.mark.parametrize("size", [65_537, 1_000_000, BODY_BYTES])
def test_a_message_that_is_too_large_is_refused(cp: ControlPlane, size: int) -> None:
    assert call(cp, bytes(size)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_that_is_too_large_once_it_is_unpacked_is_refused(cp: ControlPlane) -> None:
    bomb = bytes(60_000_000)  # 60 KB when packed
    code = call(cp, bomb, compression=grpc.Compression.Gzip)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_without_measure_is_refused(cp: ControlPlane) -> None:
    metadata = tuple((f"x-{number}", "v" * 1000) for number in range(100))
    assert call(cp, HEARTBEAT, metadata=metadata) is grpc.StatusCode.RESOURCE_EXHAUSTED


def pour(port: int, head: bytes, block: bytes, wait_s: float = 15) -> tuple[int, bytes]:
    """Send a head and then blocks until BODY_BYTES or until nobody takes them; sent and answer."""
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), 15) as sock:
        sock.settimeout(wait_s)
        with contextlib.suppress(OSError):
            sock.sendall(head)
            while sent < BODY_BYTES:
                sock.sendall(block)
                sent += len(block)
        with contextlib.suppress(OSError):
            while part := sock.recv(65_536):
                answer += part
    return sent, answer


HTTP_HEAD = b"POST /api/v1/admin/host-invites HTTP/1.1\r\nHost: cp\r\n"
HTTP_BODIES: dict[str, tuple[bytes, int]] = {
    "declared": (b"Content-Length: 1000000000\r\n", 413),
    "chunked": (b"Transfer-Encoding: chunked\r\n", 411),
    "neither": (b"", 400),
    "without a token": (b"Content-Length: 1000000000\r\nAuthorization: none\r\n", 401),
}


@pytest.mark.parametrize("name", HTTP_BODIES)
def test_a_body_without_an_end_is_cut_off(cp: ControlPlane, name: str) -> None:
    """Refused by its head; of the rest a few megabytes are thrown away, then it is cut off."""
    more, status = HTTP_BODIES[name]
    token = b"" if status == 401 else f"Authorization: Bearer {cp.token}\r\n".encode()
    block = b"10000\r\n" + bytes(65_536) + b"\r\n" if status == 411 else bytes(65_536)
    began = time.monotonic()
    head = HTTP_HEAD + b"Content-Type: application/json\r\n" + token + more + b"\r\n"
    sent, answer = pour(cp.http_port, head, block)
    assert sent < BODY_BYTES
    assert time.monotonic() - began < 5
    assert answer == b"" or answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("length", [10**9, 60_000])
def test_a_call_without_an_end_is_thrown_away(cp: ControlPlane, length: int) -> None:
    """DATA frames that no window allows, of one message or of one after the other."""
    block = data(message(length) + bytes(16_379), flags=0)
    sent, answer = pour(cp.grpc_port, open_call(), block, wait_s=1)
    assert sent > 16_384
    assert answer.startswith(b"\0\0")  # frames
