"""What the benchmarks of the control plane share: a filled database, etcd, the load, readings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.load import Spec
from tests.harness import ROOT, ControlPlane, Netns, Postgres, Process, wait_for

ETCD_PORT = 2379
WALLETS = 5

# Hosts as if each had redeemed an invite of its own; `n` counts from 0, as in load.py. Wallets are
# base58 of the right length that nobody has. Addresses begin at 10.77.16.0, as in load.py; when
# they are used up, those below follow. With `spread` every status is there.
FILL = """
CREATE TEMPORARY TABLE fleet AS
SELECT n, gen_random_uuid() AS host_id,
  translate(lpad(n::text, 16, '0'), '0123456789', 'abcdefghij') AS invite_id,
  rpad('Bench' || n % {wallets} + 1, 44, 'x') AS wallet,
  CASE WHEN {spread} AND n % 1000 = 0 THEN 'quarantined'
    WHEN NOT {spread} OR n % 10 < 6 THEN {status}
    ELSE (ARRAY['offline', 'paused', 'pending', 'revoked'])[n % 10 - 5] END AS status
FROM generate_series(0, {hosts} - 1) AS n;

INSERT INTO namespaces (namespace, approved_at, approved_by)
SELECT DISTINCT 'solana:' || wallet, now(), 'cli:bench' FROM fleet;

INSERT INTO invites (invite_id, secret_sha256, note, payout_pubkey, wg_ip_held,
  approve_first_wallet, created_by, expires_at, consumed_at, host_id)
SELECT invite_id, sha256(('invite ' || n)::bytea), '', wallet, false, false, 'cli:bench',
  now() + interval '24 hours', now(), host_id FROM fleet ORDER BY n;

INSERT INTO hosts (host_id, invite_id, host_secret_sha256, wg_ip, wg_pubkey, payout_pubkey,
  namespace, status, revoked_at, hostname, arch, kernel, agent_version, cpu_count, memory_bytes,
  disk_bytes, disk_encrypted)
SELECT host_id, invite_id, sha256(('host ' || n)::bytea),
  inet '10.77.0.0' + CASE WHEN n < 61440 THEN n + 4096 ELSE n - 61438 END,
  encode(sha256(('key ' || n)::bytea), 'base64'), wallet,
  'solana:' || wallet, status, CASE WHEN status = 'revoked' THEN now() END, 'host-' || n % 1000,
  'x86_64', '6.1.0', '0.1.0', 4, 8::bigint << 30, 100::bigint << 30, true
FROM fleet ORDER BY n;

INSERT INTO sessions (session_sha256, host_no, opened_by, ended_at)
SELECT sha256(sha256(sha256(('bench session ' || n)::bytea))), host_no, 'register',
  CASE WHEN hosts.status IN ('quarantined', 'revoked') THEN now() END
FROM fleet JOIN hosts USING (host_id) ORDER BY n;

INSERT INTO liveness (host_no, interval_ms, last_heartbeat_at)
SELECT host_no, {interval_ms}, CASE WHEN hosts.status <> 'pending' THEN now() END
FROM fleet JOIN hosts USING (host_id) ORDER BY n;

INSERT INTO audit_log (actor, action, subject, detail)
SELECT 'cli:bench', 'invite.mint', invite_id, '{{}}'::jsonb FROM fleet
UNION ALL SELECT 'host:' || host_id, 'host.register', host_id::text, '{{}}' FROM fleet
UNION ALL SELECT 'cli:bench', 'host.revoke', host_id::text, '{{}}' FROM fleet
  WHERE status = 'revoked';

DROP TABLE fleet;
"""


def fill(cp: ControlPlane, hosts: int, interval_s: float, spread: bool = False) -> None:
    """Write hosts with sessions straight into the database; then its statistics are fresh."""
    sql = FILL.format(
        hosts=hosts,
        wallets=WALLETS,
        spread=spread,
        status="'online'" if spread else "'pending'",
        interval_ms=int(interval_s * 1000),
    )
    cp.postgres.execute(cp.database, sql)
    cp.postgres.execute(cp.database, "VACUUM ANALYZE")
    cp.check_invariants()


# ---------------------------------------------------------------------------------------------
# Readings of processes (proc(5)).
# ---------------------------------------------------------------------------------------------


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def read_children(pid: int) -> list[int]:
    """The children of a process that live now."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def read_tree_cpu_s(pid: int) -> float:
    """Processor seconds of a process and its children, also of those that have ended.

    A child that ended stands in its parent's cutime and cstime; one that lives in its own utime
    and stime. The children of a PostgreSQL server have none of their own.
    """
    ticks = sum(int(field) for field in read_stat(pid)[11:15])
    for child in read_children(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ticks += sum(int(field) for field in read_stat(child)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def read_machine_cpu_s() -> float:
    """Processor seconds that the machine was busy since it started."""
    user, nice, system, _idle, _iowait, irq, softirq = (
        int(word) for word in Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def read_rss_bytes(pid: int) -> int:
    """Resident memory of one process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_tree_pss_bytes(pid: int) -> int:
    """Resident memory of a process and its children in bytes, what they share counted once."""
    total = 0
    for each in [pid, *read_children(pid)]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


# ---------------------------------------------------------------------------------------------
# The load and its results.
# ---------------------------------------------------------------------------------------------


class Load:
    """A process of tests/bench/load.py inside the namespace."""

    def __init__(self, netns: Netns, spec: Spec) -> None:
        argv = ["setpriv", "--pdeathsig=KILL", "--", sys.executable, "-W", "error", "-m"]
        argv.append("tests.bench.load")
        self.child = subprocess.Popen(
            netns.argv([*argv, json.dumps(dataclasses.asdict(spec))]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def wait(self, step: str) -> dict[str, Any]:
        """The line of this step."""
        assert self.child.stdout
        line = self.child.stdout.readline()
        assert line, f"the load ended with {self.child.wait(15)} before {step}"
        found: dict[str, Any] = json.loads(line)
        assert found["at"] == step, found
        return found

    def close(self) -> None:
        """End it."""
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.close()
        try:
            self.child.wait(15)
        except subprocess.TimeoutExpired:
            self.child.kill()
        self.child.stdout.close()


@dataclasses.dataclass(frozen=True)
class Measured:
    """One server under one load; `cpu_us` is processor microseconds an accepted call."""

    cpu_us: dict[str, float]  # by part: cp and postgres, or etcd
    host_bytes: float  # resident memory a connected host
    rss_bytes: int  # of the server with all hosts, PostgreSQL apart
    others_cores: float  # what the machine did meanwhile that was neither server nor load
    end: dict[str, Any]  # what the load said at its end


def measure(netns: Netns, spec: Spec, server: int, trees: dict[str, int]) -> Measured:
    """Run one load against a server (a process id); `trees` are the processes whose time counts."""
    empty = read_rss_bytes(server)
    load = Load(netns, spec)
    try:
        load.wait("connected")
        load.wait("begin")
        before = {name: read_tree_cpu_s(pid) for name, pid in trees.items()}
        machine = read_machine_cpu_s()
        end = load.wait("end")
        after = {name: read_tree_cpu_s(pid) for name, pid in trees.items()}
        others_s = read_machine_cpu_s() - machine - end["own_cpu_s"]
        rss = read_rss_bytes(server)
    finally:
        load.close()
    others_s -= sum(after.values()) - sum(before.values())
    print(f"\n{spec} {end} others: {others_s / end['took_s']:.2f} cores")
    assert end["errors"] == {}, end
    # The calls that are under way at the end have cost something, too; they are few.
    assert end["calls"] - end["replies"] < spec.rate, end
    spent = {name: (after[name] - before[name]) / end["replies"] * 1e6 for name in trees}
    return Measured(spent, (rss - empty) / spec.hosts, rss, others_s / end["took_s"], end)


# ---------------------------------------------------------------------------------------------
# Servers.
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def postgres_that_syncs() -> Iterator[Postgres]:
    """A cluster where a commit is on the disk before it is acknowledged."""
    root = Path(tempfile.mkdtemp(prefix="oi-pg-", dir="/tmp"))
    root.chmod(0o711)
    cluster = Postgres(root / "cluster", fsync=True)
    try:
        yield cluster
    finally:
        cluster.stop(signal.SIGQUIT)
        shutil.rmtree(root)


@contextlib.contextmanager
def etcd_server(netns: Netns) -> Iterator[Process]:
    """Debian's etcd with its defaults, on the same disk as PostgreSQL; it ends with the block."""
    root = Path(tempfile.mkdtemp(prefix="oi-etcd-", dir="/tmp"))
    argv = ["etcd", f"--data-dir={root / 'data'}", "--logger=zap", "--log-level=warn"]
    argv += [f"--listen-client-urls=http://0.0.0.0:{ETCD_PORT}"]
    argv += [f"--advertise-client-urls=http://127.0.0.1:{ETCD_PORT}"]
    process = Process(netns.argv(argv), root / "log", {})

    def is_ready() -> bool:
        probe = ["curl", "--silent", "--fail", f"http://127.0.0.1:{ETCD_PORT}/health"]
        done = subprocess.run(netns.argv(probe), capture_output=True, check=False)
        return done.returncode == 0

    try:
        deadline = time.monotonic() + 30
        while not is_ready():
            assert time.monotonic() < deadline, process.log
            time.sleep(0.2)
        yield process
    finally:
        process.stop(signal.SIGKILL)
        shutil.rmtree(root)


def server_pid(process: Process, name: str) -> int:
    """The process id of the server itself: setpriv and `ip netns exec` replace themselves."""
    pid = process.child.pid
    wait_for(name, lambda: name in Path(f"/proc/{pid}/cmdline").read_text() or None)
    return pid
