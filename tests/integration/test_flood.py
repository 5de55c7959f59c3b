"""One address that floods or stalls the control plane, while fifty hosts and an operator go on.

A few seconds each; `tests/run --bench` has them for a minute and with all that a machine can open.
All of it happens in a network namespace: each host has its own address, the crowd another one.
"""

from __future__ import annotations

import pytest

from tests.harness import ControlPlane
from tests.hostile import CROWD, FLOODS, SILENCES, Host, Seen, endure, make_hosts, percentile

SECONDS = 4.0
HOSTS = 50
LATE_S = 1.0
RSS_MB = 160.0  # 65 MB at rest


@pytest.fixture(scope="module")
def cp(tunnel_cp: ControlPlane) -> ControlPlane:
    """The control plane of this file."""
    return tunnel_cp


@pytest.fixture(scope="module")
def hosts(cp: ControlPlane) -> list[Host]:
    """The honest ones."""
    return make_hosts(cp, HOSTS)


def check_honest(cp: ControlPlane, seen: Seen) -> None:
    """Fails unless every honest call was accepted in time, with the control plane in bounds."""
    print(seen)
    assert len(seen.beats) > HOSTS * (SECONDS - 1), seen
    assert seen.failed == 0, seen
    assert percentile(seen.beats, 0.99) <= LATE_S, seen
    assert set(seen.statuses) == {"200"}, seen
    assert percentile(seen.polls, 0.99) <= LATE_S, seen
    assert seen.rss_mb <= RSS_MB, seen
    assert "Traceback" not in cp.log
    assert "ERROR" not in cp.log


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_holds_up_nobody_else(cp: ControlPlane, hosts: list[Host], name: str) -> None:
    order = {**FLOODS[name], "target": [CROWD, cp.grpc_port]}
    seen = endure(cp, hosts, SECONDS, [order])
    assert max(seen.jobs[0]["sent"], seen.jobs[0]["connections"]) > 2_000, seen
    check_honest(cp, seen)


def test_connections_to_the_agents_port_that_stall_hold_up_nobody(
    cp: ControlPlane, hosts: list[Host]
) -> None:
    target = [CROWD, cp.grpc_port]
    attack = [
        {"job": "hold", "target": target, "count": 200, "first": first.hex()}
        for first in SILENCES.values()
    ]
    preface = SILENCES["the preface"]
    attack.append(
        {"job": "hold", "target": target, "count": 50, "first": "", "drip": preface.hex()}
    )
    seen = endure(cp, hosts, SECONDS, attack)
    assert [job["opened"] for job in seen.jobs] == [200] * len(SILENCES) + [50]
    assert seen.files > 1050
    check_honest(cp, seen)


def test_connections_to_the_operators_port_that_stall_hold_up_nobody(
    cp: ControlPlane, hosts: list[Host]
) -> None:
    target, request = ["127.0.0.1", cp.http_port], b"GET /healthz HTTP/1.1\r\nHost: cp\r\n"
    attack = [
        {"job": "hold", "target": target, "count": 100, "first": first.hex(), "drip": drip.hex()}
        for first, drip in ((b"", b""), (b"", request), (request[:9], b""), (request, b"a: b\r\n"))
    ]
    seen = endure(cp, hosts, SECONDS, attack)
    assert [job["opened"] for job in seen.jobs] == [100] * 4
    check_honest(cp, seen)
