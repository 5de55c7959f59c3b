"""Two home machines under load, each part killed at random: never two copies of one replica.

The right of a host to run a copy is 600 s long. Here it is 30 s, by a constant in a copy of
cp_server.py, so that it ends many times in one run; the guard, which a timer starts each 10 s, is
called each 2 s. OPENINFRA_CHAOS_S and OPENINFRA_CHAOS_WORKLOADS make it shorter.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import psycopg

import agent as agent_script
from tests.bench.conftest import Record
from tests.engine import REGISTRY, Engine
from tests.harness import (
    OTHER_WALLET,
    WALLET,
    Agent,
    ControlPlane,
    Postgres,
    change_scripts,
    make_netns,
    read_seed,
    wait_for,
)
from tests.integration.test_workloads import Tenant

CHAOS_S = float(os.environ.get("OPENINFRA_CHAOS_S", "600"))
WORKLOADS = int(os.environ.get("OPENINFRA_CHAOS_WORKLOADS", "100"))
LEASE_S, GRACE_S = 30, 6  # in place of 600 and 30
WAYS = 6  # to do harm
LOOP = ["/bin/sh", "-c", "trap exit TERM; while :; do sleep 1; done"]


def list_alive() -> dict[str, str]:
    """The containers that have a process, whatever their engines know of it, and what that is.

    Not `runc init`, whose program has not begun; one that never will is left when wait_all looks.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            match = re.search("/([0-9a-f]{64})$", path.read_text(), re.MULTILINE)
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ")
            if match and state not in ("Z", "X") and words != b"runc init ":
                found[match[1]] = f"{path.parent.name} {state} {words.decode()[:60]}"
    return found


class Home:
    """A home machine: an engine, an agent and its guard."""

    def __init__(self, cp: ControlPlane, directory: Path, wallet: str, engine: Engine) -> None:
        self.engine = engine
        target = f"127.0.0.1:{cp.grpc_port}"
        self.agent = Agent(directory, target, cp.mint(payout_pubkey=wallet), wallet=wallet)
        self.agent.engine_socket = engine.socket
        self.agent.limits_file.write_text("CPUS=2\nMEMORY=8G\n")
        self.names: dict[str, str] = {}  # container: its assignment
        self.ending = threading.Event()
        self.guard = threading.Thread(target=self._guard_forever)
        self.agent.start()
        self.guard.start()

    def _guard_forever(self) -> None:
        """What `agent.py guard` does for workloads; its firewall is not for this namespace."""
        engine = agent_script.Engine(self.engine.socket)
        while not self.ending.wait(2):
            agent_script.ensure_ended(engine, self.agent.lease_file)

    def look(self, alive: Mapping[str, str]) -> list[str]:
        """Whose containers of these are this engine's, by its files, which need no engine."""
        files = self.engine.directory / "root" / "100000.100000" / "containers"
        for each in alive.keys() - self.names.keys():
            with contextlib.suppress(OSError, ValueError):
                config = json.loads((files / each / "config.v2.json").read_text())["Config"]
                self.names[each] = config["Labels"]["openinfra.assignment"]
        return [self.names[each] for each in alive.keys() & self.names.keys()]

    def kill_agent(self, away_s: float) -> None:
        self.agent.process.stop(signal.SIGKILL)
        time.sleep(away_s)
        self.agent.start()

    def freeze_agent(self, away_s: float) -> None:
        """As a machine that hangs, or a partition: it goes on where it was."""
        self.agent.process.child.send_signal(signal.SIGSTOP)
        time.sleep(away_s)
        self.agent.process.child.send_signal(signal.SIGCONT)

    def kill_engine(self) -> None:
        self.engine.kill()
        self.engine.start()

    def close(self) -> None:
        self.ending.set()
        self.guard.join()
        self.agent.process.stop(signal.SIGKILL)


class Watch:
    """Looks each second which copies have a process."""

    def __init__(self, homes: list[Home]) -> None:
        self.homes = homes
        self.looks: list[tuple[str, list[str]]] = []
        self.at_s: list[float] = []  # when each was over
        self.took_s: list[float] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        due = time.monotonic()
        while not self.ending.wait(max(0.0, due - time.monotonic())):
            began = time.monotonic()
            alive = list_alive()
            found = [name for home in self.homes for name in home.look(alive)]
            self.looks.append((time.strftime("%T"), found))
            self.at_s.append(time.monotonic())
            self.took_s.append(self.at_s[-1] - began)
            due = max(due + 1, began)

    def close(self) -> None:
        self.ending.set()
        self.thread.join()

    def longest_gap_s(self, from_s: float, to_s: float) -> float:
        """How long nobody looked, between these two moments."""
        at_s = [from_s, *(each for each in self.at_s if from_s < each < to_s), to_s]
        return max(later - earlier for earlier, later in itertools.pairwise(at_s))


def list_doubles(looks: list[tuple[str, list[str]]], cp: ControlPlane) -> list[str]:
    """What must never be: looks that saw two copies of one replica."""
    sql = (
        "SELECT host_no, assignment_id::text, workload_no || '/' || replica AS replica, state,"
        " reason, stop_reason, stop_at::time(1)::text AS stop_at,"
        " ended_at::time(1)::text AS ended_at, created_at::time(1)::text AS created_at"
        " FROM assignments"
    )
    rows = {row["assignment_id"]: row for row in cp.query(sql)}
    doubles = []
    for at, found in looks:
        counts = collections.Counter(rows[name]["replica"] for name in found)
        for replica, count in counts.items():
            if count > 1:
                copies = [rows[name] for name in found if rows[name]["replica"] == replica]
                doubles.append(f"{at} {replica}: {copies}")
    return doubles


def change_orders(tenant: Tenant, image: str, chance: random.Random, until: float) -> None:
    """A customer that changes its mind each second."""
    number = 0
    while time.monotonic() < until:
        number += 1
        order = tenant.order(image=image, command=LOOP, cpu_milli=10, memory_bytes=16 << 20)
        name, env = f"w{chance.randrange(WORKLOADS)}", {"N": str(number)}
        with contextlib.suppress(OSError):  # the control plane may be down
            tenant.call("POST", "", {**order, "name": name, "env": env})
        time.sleep(1)


def test_copies(spare_postgres: Postgres, tmp_path: Path, record: Record) -> None:
    chance = random.Random(read_seed())
    with contextlib.ExitStack() as stack:
        engines = []
        for _ in range(2):
            engine = Engine(stack.enter_context(make_netns()))
            stack.callback(engine.close)
            engines.append(engine)
        lease = {"LEASE_S": str(LEASE_S), "LEASE_GRACE_S": str(GRACE_S)}
        scripts = change_scripts(tmp_path / "scripts", "cp_server.py", **lease)
        flags = ("--heartbeat-s=2", f"--registry={REGISTRY}")
        cp = ControlPlane(spare_postgres, tmp_path / "cp", *flags, scripts=scripts)
        cp.start()
        stack.callback(lambda: cp.stop(signal.SIGKILL))
        tenant = Tenant(cp)
        image = {engine.push(f"{tenant.namespace}/web") for engine in engines}.pop()
        image = image.removeprefix(f"{REGISTRY}/")
        homes = []
        for number, (engine, wallet) in enumerate(
            zip(engines, (WALLET, OTHER_WALLET), strict=True)
        ):
            home = Home(cp, tmp_path / f"home{number}", wallet, engine)
            stack.callback(home.close)
            homes.append(home)
        cp.wait_assignable(2)
        for number in range(WORKLOADS):
            tenant.post(
                name=f"w{number}", image=image, command=LOOP, cpu_milli=10, memory_bytes=16 << 20
            )
        watch = Watch(homes)
        stack.callback(watch.close)
        wait_all(cp, homes, 300)
        began_s = time.monotonic()
        until = began_s + CHAOS_S
        customer = threading.Thread(target=change_orders, args=(tenant, image, chance, until))
        customer.start()
        kills = harm(cp, spare_postgres, homes, chance, until)
        customer.join()
        gap_s = watch.longest_gap_s(began_s, time.monotonic())
        wait_all(cp, homes, 300)
        cp.check_invariants()
        watch.close()
        doubles = list_doubles(watch.looks, cp)
        for log in (cp.log, *(home.agent.process.log for home in homes)):
            assert "Traceback" not in log
    most = max(len(found) for _, found in watch.looks)
    looks = f"{len(watch.looks)} looks of at most {max(watch.took_s):.2f} s at up to {most} copies"
    print(f"\n{sum(kills.values())} harms: {dict(kills)}; {looks}")
    lost = cp.query("SELECT count(*) AS n FROM assignments WHERE state = 'lost'")[0]["n"]
    print(f"{lost} rights ended in silence; the longest time without a look: {gap_s:.2f} s")
    assert gap_s < 2
    assert most >= WORKLOADS
    assert len(kills) == WAYS or CHAOS_S < 300  # each of them
    assert lost > 0 or CHAOS_S < 300
    what = f"replicas with two copies in {CHAOS_S:.0f} s of kill -9, {WORKLOADS} workloads"
    record(what, len(doubles), "", 0)
    assert doubles == []


def harm(
    cp: ControlPlane,
    postgres: Postgres,
    homes: list[Home],
    chance: random.Random,
    until: float,
) -> collections.Counter[str]:
    """Kill one part after the other until the time is over; gives back how often which."""
    kills: collections.Counter[str] = collections.Counter()

    def kill_cp() -> None:
        cp.stop(signal.SIGKILL)
        time.sleep(chance.choice([0, 3]))
        cp.start()

    def kill_postgres() -> None:
        postgres.stop(signal.SIGKILL)
        time.sleep(chance.choice([0, 3]))
        postgres.start()

    def kill_backend() -> None:
        """One of the control plane's: PostgreSQL ends all others then, and recovers by itself."""
        sql = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"

        def find() -> int | None:
            with contextlib.suppress(psycopg.OperationalError):  # it recovers from the last time
                pids = [int(row["pid"]) for row in cp.query(sql, cp.database)]
                return chance.choice(pids) if pids else None
            return None

        with contextlib.suppress(ProcessLookupError):
            os.kill(wait_for("a backend", find), signal.SIGKILL)

    deck: list[str] = []
    while time.monotonic() < until:
        home = chance.choice(homes)
        away_s = chance.choice([0, 5, LEASE_S + GRACE_S + 10])
        ways: dict[str, Callable[[], None]] = {
            "agent": partial(home.kill_agent, away_s),
            "freeze": partial(home.freeze_agent, away_s),
            "engine": home.kill_engine,
            "control plane": kill_cp,
            "PostgreSQL": kill_postgres,
            "backend": kill_backend,
        }
        deck = deck or chance.sample([*ways], WAYS)
        name = deck.pop()
        print(f"{time.strftime('%T')} {name} of home {homes.index(home)}, away {away_s} s")
        ways[name]()
        kills[name] += 1
        time.sleep(chance.uniform(1, 6))
    return kills


def wait_all(cp: ControlPlane, homes: list[Home], timeout_s: float) -> None:
    """Wait until each workload runs once, of its present revision, and nothing else is left."""
    sql = (
        "SELECT count(*) AS n FROM workloads w JOIN assignments a USING (workload_no)"
        " WHERE a.ended_at IS NULL AND a.stop_at IS NULL AND a.state = 'running'"
        " AND a.revision = w.revision"
    )

    def is_whole() -> bool:
        if cp.query(sql)[0]["n"] != WORKLOADS:
            return False
        time.sleep(0.5)
        return sum(len(home.engine.processes()) for home in homes) == WORKLOADS

    try:
        wait_for("all run", is_whole, timeout_s)
    except AssertionError as error:
        rows = cp.query(
            "SELECT assignment_id::text, state, reason, stop_at::text FROM assignments"
            " WHERE ended_at IS NULL"
        )
        alive = list_alive()
        told = {row["assignment_id"] for row in rows if row["state"] == "running"}
        there = {name for home in homes for name in home.look(alive)}
        of = {h.names[each]: what for h in homes for each, what in alive.items() if each in h.names}
        strays = {name: of[name] for name in there - told}
        odd = [row for row in rows if row["state"] != "running" or row["stop_at"]]
        left = {each for home in homes for each in home.engine.processes()} - alive.keys()
        said = f"no process: {told - there}; no right: {strays}; left: {left}; {odd}"
        said += f"; {cp.query(sql)}"
        raise AssertionError(f"{error}: {said}") from None
