"""What a heartbeat costs, beside what etcd's keepalive of a lease costs under the same load.

Every host has its own connection and its own address in the tunnel, inside a network namespace. The
control plane checks the address and acknowledges what PostgreSQL has on the disk. etcd renews a
lease a host, on a stream a host, and writes nothing for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.conftest import Record
from tests.bench.fleet import (
    ETCD_PORT,
    Measured,
    etcd_server,
    fill,
    measure,
    postgres_that_syncs,
    read_tree_pss_bytes,
    server_pid,
)
from tests.bench.load import Spec
from tests.harness import Netns, serving

MEASURE_S = 30.0
FLEET = 65_533  # hosts of one hub
FLEET_INTERVAL_S = 30.0


def measure_cp(netns: Netns, directory: Path, hosts: int, rate: float) -> tuple[Measured, int]:
    """The control plane under load, and the resident bytes of it and PostgreSQL with all hosts."""
    period_s = hosts / rate
    with postgres_that_syncs() as postgres:
        flags = (f"--heartbeat-s={period_s:g}",)
        with serving(postgres, directory, *flags, netns=netns) as cp:
            fill(cp, hosts, period_s)
            assert cp.process
            assert postgres.child
            spec = Spec("cp", cp.grpc_port, hosts, rate, 1.5 * period_s, MEASURE_S)
            trees = {"cp": cp.process.child.pid, "postgres": postgres.child.pid}
            found = measure(netns, spec, server_pid(cp.process, "cp_server.py"), trees)
            memory = found.rss_bytes + read_tree_pss_bytes(postgres.child.pid)
            rows = cp.query(
                "SELECT count(*) AS hosts, count(*) FILTER (WHERE status = 'online') AS online,"
                " sum(seq) AS beats FROM hosts JOIN liveness USING (host_no)"
            )
            assert rows[0]["hosts"] == rows[0]["online"] == hosts
            assert rows[0]["beats"] >= found.end["replies"]
    return found, memory


def measure_etcd(netns: Netns, hosts: int, rate: float) -> Measured:
    """etcd under the same load."""
    with etcd_server(netns) as process:
        pid = server_pid(process, "--data-dir")
        spec = Spec("etcd", ETCD_PORT, hosts, rate, 1.5 * hosts / rate, MEASURE_S)
        return measure(netns, spec, pid, {"etcd": pid})


@pytest.mark.parametrize(("hosts", "rate"), [(10_000, 1_000), (10_000, 3_000)])
def test_heartbeats(tmp_path: Path, netns: Netns, record: Record, hosts: int, rate: int) -> None:
    """The control plane and etcd in turn; beyond 1,000/s only to compare."""
    cp, _ = measure_cp(netns, tmp_path / "cp", hosts, rate)
    etcd = measure_etcd(netns, hosts, rate)
    name = f"{hosts:,} hosts, {rate:,}/s"
    record(f"{name}: control plane, CPU a heartbeat", cp.cpu_us["cp"], "µs", 400)
    record(f"{name}: PostgreSQL, CPU a heartbeat", cp.cpu_us["postgres"], "µs", 100)
    record(f"{name}: etcd, CPU a keepalive", etcd.cpu_us["etcd"], "µs", None)
    demanded = rate == 1_000
    ratio = sum(cp.cpu_us.values()) / etcd.cpu_us["etcd"]
    what = f"{name}: CPU of control plane and PostgreSQL, of etcd's"
    record(what, ratio, "times", 1.5 if demanded else None)
    memory_kb = cp.host_bytes / 1e3
    record(f"{name}: control plane, memory a host", memory_kb, "KB", 20 if demanded else None)
    record(f"{name}: etcd, memory a host", etcd.host_bytes / 1e3, "KB", None)
    for server, found, p50_ms, p99_ms in (
        ("control plane", cp, 500, 1_000),
        ("etcd", etcd, None, None),
    ):
        record(f"{name}: {server}, median answer", found.end["p50_s"] * 1e3, "ms", p50_ms)
        what = f"{name}: {server}, 99 of 100 answers within"
        record(what, found.end["p99_s"] * 1e3, "ms", p99_ms)
        assert found.end["rate"] >= 0.97 * rate
    others = max(cp.others_cores, etcd.others_cores)
    record(f"{name}: what else the machine did meanwhile", others, "cores", None)


def test_whole_hub(tmp_path: Path, netns: Netns, record: Record) -> None:
    """15,000 hosts each 30 s; what 65,533 would need is calculated from it."""
    hosts = 15_000
    found, memory = measure_cp(netns, tmp_path / "cp", hosts, hosts / FLEET_INTERVAL_S)
    cores = sum(found.cpu_us.values()) / 1e6 * FLEET / FLEET_INTERVAL_S
    name = f"{FLEET:,} hosts each {FLEET_INTERVAL_S:g} s, extrapolated from {hosts:,}"
    record(f"{name}: control plane and PostgreSQL", cores, "cores", 1.2)
    whole = memory + (FLEET - hosts) * found.host_bytes
    record(f"{name}: their resident memory", whole / 1e9, "GB", 2.5)
