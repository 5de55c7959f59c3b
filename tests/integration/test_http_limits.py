"""One client address that asks the HTTP API too often, while others and the operator go on.

In part with the Caddy and the Caddyfile of a deployment, in a namespace where each client has an
address of its own; in part as Caddy calls, by the header alone.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests.harness import ControlPlane, start_caddy
from tests.hostile import Job, jobs, percentile

CALLS_S, BURST = cp_server.HTTP_CALLS_S, cp_server.HTTP_BURST
HOSTS = "/api/v1/admin/hosts"
SECONDS = 4.0
LATE_S = 2.0


def ask(cp: ControlPlane, client: str = "", path: str = "/healthz") -> tuple[int, str]:
    """One request as Caddy passes it on from a client, or from this machine itself."""
    lines = [f"GET {path} HTTP/1.1", "Host: cp"]
    lines += [f"X-Forwarded-For: {client}"] if client else []
    answer = b""
    with socket.create_connection(("127.0.0.1", cp.http_port), 10) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        while part := sock.recv(65_536):
            answer += part
    return int(answer[9:12]), answer.decode()


def exhaust(cp: ControlPlane, *clients: str) -> None:
    """Ask in turn from these addresses until one is refused."""
    for number in range(int(BURST + CALLS_S * 10)):
        if ask(cp, clients[number % len(clients)])[0] == 429:
            return
    raise AssertionError(f"{clients} were never refused")


def test_who_asks_too_often_is_refused_and_nobody_else(cp: ControlPlane) -> None:
    written = len(cp.log)
    for _ in range(int(BURST)):
        assert ask(cp, "203.0.113.9")[0] == 200
    exhaust(cp, "203.0.113.9")
    status, answer = ask(cp, "203.0.113.9")
    assert status == 429
    head, _, body = answer.partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert lines[0] == "HTTP/1.1 429 Too Many Requests"
    assert {"Retry-After: 1", f"Content-Length: {len(body)}", "Connection: close"} <= set(lines)
    assert json.loads(body) == {
        "error": {
            "code": "too_many_requests",
            "message": "too many requests from this address; ask less often",
            "field": None,
        }
    }
    for other in ("203.0.113.10", "2001:db8::1"):
        assert ask(cp, other)[0] == 200
    for _ in range(int(2 * BURST)):  # the operator's curl and Prometheus; no address at all
        assert ask(cp)[0] == 200
        assert ask(cp, "unknown")[0] == 200
    said = cp.log[written:]
    assert said == "WARN address refused: it asks too often client=203.0.113.9\n"
    status, metrics = ask(cp, path="/metrics")
    assert 'openinfra_http_requests_total{status="429"}' in metrics
    time.sleep(1)  # as Retry-After says
    assert ask(cp, "203.0.113.9")[0] == 200


def test_a_network_of_ipv6_is_one_client(cp: ControlPlane) -> None:
    exhaust(cp, *(f"2001:db8::{number:x}:1" for number in range(1, 1000)))
    assert ask(cp, "2001:db8::ffff")[0] == 429
    assert ask(cp, "2001:db8:0:1::1")[0] == 200


def test_a_flood_of_addresses_frees_none(cp: ControlPlane) -> None:
    began, taken = time.monotonic(), 0
    for number in range(1_500):
        ask(cp, f"2001:db8:{number:x}::1")
        taken += ask(cp, "203.0.113.9")[0] == 200
    assert taken <= BURST + CALLS_S * (time.monotonic() - began) + 2


# With Caddy --------------------------------------------------------------------------------------


@pytest.fixture
def caddy(tunnel_cp: ControlPlane, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A Caddy in the namespace with the deployment's own file; what a client has to know."""
    assert tunnel_cp.netns
    process, root = start_caddy(tmp_path, "cp.example.org", tunnel_cp.netns)
    yield {"target": ["10.77.0.1", 443], "name": "cp.example.org", "ca": str(root)}
    assert process.stop() == 0


def render(cp: ControlPlane, method: str, path: str, *lines: str, body: str = "") -> str:
    """A request in hex."""
    head = [f"{method} {path} HTTP/1.1", "Host: cp.example.org", f"Content-Length: {len(body)}"]
    return ("\r\n".join([*head, *lines, "", ""]) + body).encode().hex()


LIES = (
    ("X-Forwarded-For: 127.0.0.1",),
    ("X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 127.0.0.1"),
    ("Connection: X-Forwarded-For",),
    ("Connection: keep-alive, X-Forwarded-For", "X-Forwarded-For: ::1"),
    ("X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1"),
)


def test_one_address_floods_through_caddy_and_others_go_on(
    tunnel_cp: ControlPlane, caddy: dict[str, Any]
) -> None:
    cp, netns = tunnel_cp, tunnel_cp.netns
    assert netns
    token = f"Authorization: Bearer {cp.token}"
    hostile = [render(cp, "GET", HOSTS, *lie) for lie in LIES]
    hostile += [
        render(cp, "POST", "/api/v1/admin/host-invites", body="x" * 60_000),
        render(cp, "GET", "/api/v1/openapi.json"),
        render(cp, "GET", HOSTS, token),
    ]
    honest = [render(cp, "GET", f"{HOSTS}?limit=50", token)]
    with jobs() as running:

        def start(number: int, requests: list[str], connections: int, every_s: float) -> Job:
            job = Job(
                netns,
                "https",
                source=f"10.77.40.{number}",
                requests=requests,
                connections=connections,
                every_s=every_s,
                seconds=SECONDS,
                **caddy,
            )
            running.append(job)
            return job

        made = [start(number, honest, 1, 0.25) for number in range(1, 4)]
        crowd = start(66, hostile, 100, 0.0)
        began = time.monotonic()
        others = [job.finish(SECONDS + 30) for job in made]
        seen = crowd.finish(30)
        took = time.monotonic() - began
    for other in others:
        assert set(other["statuses"]) == {"200"}, other["last"]
        assert len(other["took"]) > SECONDS
        assert percentile(other["took"], 0.95) < LATE_S
    statuses = seen["statuses"]
    print(statuses, [round(percentile(other["took"], 0.95), 3) for other in others])
    assert set(statuses) == {"200", "401", "429"}, seen["last"]
    assert statuses["429"] > 500
    assert statuses["200"] + statuses["401"] <= BURST + CALLS_S * took + 2
    assert "too_many_requests" in seen["last"]["429"]
    assert "ERROR" not in cp.log
