"""Outages, partitions and copied disks while a control plane serves: what is billed, exactly.

Placer, sweep and biller are those of `serve`, at a quicker pace; the database's clock is the
test's. Hosts are clients by hand, so that they say at known times what a test wants them to say.
"""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cp_server
from proto import openinfra_pb2 as pb
from tests import billing_oracle as oracle
from tests.billing import Books, at
from tests.harness import (
    BOOT_ID,
    OTHER_WALLET,
    WALLET,
    ControlPlane,
    Postgres,
    change_scripts,
    check_refused,
    wait_for,
)
from tests.integration.test_billing import in_database
from tests.integration.test_workloads import REGISTRY, Machine, Tenant

S, MIN, HOUR = 1_000_000, 60_000_000, oracle.HOUR_US
T = int(dt.datetime(2026, 3, 10, 9, 50, tzinfo=dt.timezone.utc).timestamp()) * S
INTERVAL_S = 60  # asked for: 54 to 60 s, the longest of all
# Half a processor and 1 GB: 500 and 100 micro-units for each second, of which a host has four
# fifths; and 10,000 for a GB sent.
CARD = oracle.RateCard("1", None, T - 50 * MIN, 3_600_000, 360_000, 10_000, 800_000)
SIZE = {"cpu_milli": 500, "memory_bytes": 10**9}
SECOND_MICROS = 600
PACE = {"PLACE_S": "0.5", "SWEEP_S": "0.2", "USAGE_S": "0.3", "BATCH_S": "0.01"}
LOOKS = tuple(f"openinfra_{what}_time_seconds" for what in ("placed", "swept", "billed"))


class World:
    """A control plane that serves, a customer, and the hour."""

    def __init__(self, books: Books, cp: ControlPlane) -> None:
        self.books, self.cp = books, cp
        self.now_us = T
        books.set_time(T)
        in_database(books, lambda db: books.add_card(db, CARD))
        books.attach(cp)
        cp.start()
        self.tenant = Tenant(cp)
        (row,) = books.query("SELECT customer_id, name FROM customers")
        self.customer = row["name"]
        books.customers[self.customer] = row["customer_id"]

    def pass_to(self, time_us: int, is_away: bool = False) -> None:
        """Let it be this time; the control plane gave signs of life until now, or was away."""
        with self.books.owner.transaction():
            self.books.owner.execute("LOCK TABLE cp_state")
            self.books.set_time(time_us)
            if not is_away:
                self.books.owner.execute("UPDATE cp_state SET alive_at = %s", (at(time_us),))
        self.now_us = time_us

    def wait_looks(self) -> None:
        """Until placer, sweep and biller have each looked at this time from start to end."""
        for _ in range(2):  # the first may have begun before
            wait_for("a look", partial(self._have_looked, time.time()), 20)

    def _have_looked(self, since_s: float) -> bool:
        time.sleep(0.1)
        status, text = self.cp.call("GET", "/metrics")
        assert status == 200
        values = dict(line.split() for line in text.splitlines() if line.startswith(LOOKS))
        return min(float(values.get(name, 0)) for name in LOOKS) > since_s

    def copies(self) -> list[dict[str, Any]]:
        """All copies there ever were, oldest first."""
        return self.books.query(
            "SELECT assignment_id::text AS key, hostname AS host, replica, state,"
            " (extract(epoch FROM a.created_at) * 1000000)::bigint AS from_us,"
            " (extract(epoch FROM ended_at) * 1000000)::bigint AS ended_us,"
            " (extract(epoch FROM least(stop_at, ended_at)) * 1000000)::bigint AS end_us,"
            " namespace, cpu_milli, a.memory_bytes FROM assignments a JOIN hosts USING (host_no)"
            " ORDER BY assignment_no"
        )

    def order(self, replicas: int = 1) -> list[dict[str, Any]]:
        """The customer's workload; gives back its copies, once they are placed."""
        self.workload = self.tenant.post(replicas=replicas, **SIZE)

        def probe() -> list[dict[str, Any]] | None:
            found = self.copies()
            return found if len(found) == replicas else None

        return wait_for("placed", probe)

    def bill(self) -> dict[str, int]:
        """Seconds of each copy, once the workload is over; books and ledger are the oracle's."""
        self.tenant.call("DELETE", f"/{self.workload['workload_id']}")
        self.wait_looks()
        self.pass_to(self.now_us + 2 * HOUR)
        self.wait_looks()
        books = self.books
        for row in self.copies():
            key = row["key"]
            sizes = row["cpu_milli"], row["memory_bytes"]
            books.ids[key] = uuid.UUID(key)
            books.copies[key] = oracle.Copy(
                key, "web", self.customer, row["host"], row["namespace"], *sizes
            )
            if row["end_us"]:
                books.events.append(oracle.CopyEnded(row["end_us"], key))
        expected = books.check()
        found = dict.fromkeys(books.copies, 0)
        for line in expected.lines:
            assert line.billed_us % S == 0
            found[line.copy] += line.billed_us // S
        self.cp.check_invariants()
        return found

    def check_once(self) -> None:
        """No replica was in two windows for one time."""
        hours = self.books.query(
            "SELECT sum(billed_us)::bigint AS us FROM usage_windows"
            " JOIN assignments USING (assignment_no) GROUP BY workload_no, replica, hour_at"
        )
        assert max(row["us"] for row in hours) <= HOUR
        runs = self.books.query(
            "SELECT 1 FROM usage_runs r JOIN assignments a USING (assignment_no), usage_runs s"
            " JOIN assignments b USING (assignment_no) WHERE r.run_no < s.run_no"
            " AND (a.workload_no, a.replica) = (b.workload_no, b.replica) AND s.from_at < r.to_at"
        )
        assert runs == []


class Home(Machine):
    """A host whose accepted heartbeats are in the oracle's log; each tells all that it counted."""

    def __init__(self, world: World, name: str, wallet: str = WALLET) -> None:
        self.world, self.name, self.wallet = world, name, wallet
        self.boot_id, self.asked_ms = BOOT_ID, 0
        self.usage: tuple[pb.UsageCounter, ...] = ()
        super().__init__(world.cp, hostname=name)
        self.beat()

    def copy_disk(self) -> Home:
        """Another machine, with all that this one knows by now."""
        other = copy.copy(self)
        other.boot_id, other.revision, other.wanted = str(uuid.uuid4()), 0, {}
        return other

    def register(self, token: str, **changes: Any) -> pb.RegisterReply:
        return super().register(token, payout_pubkey=self.wallet, **changes)

    def count(self, key: str, tx_bytes: int) -> None:
        """Its container of this copy has sent so much since this machine booted."""
        container = hashlib.sha256(key.encode()).digest()
        mine = pb.UsageCounter(
            assignment_id=key, boot_id=self.boot_id, container_id=container, tx_bytes=tx_bytes
        )
        before = [each for each in self.usage if each.boot_id != self.boot_id]
        self.usage = (*before, mine)

    def heartbeat(self, **changes: Any) -> pb.HeartbeatReply:
        reply = super().heartbeat(boot_id=self.boot_id, usage=self.usage, **changes)
        self.asked_ms = reply.next_heartbeat_ms
        running = frozenset(
            each.assignment_id
            for each in changes["observed"].assignments
            if each.state == pb.ASSIGNMENT_STATE_RUNNING
        )
        counters = tuple(
            oracle.Counter(each.assignment_id, each.boot_id, "the one", 0, 0, 0, each.tx_bytes)
            for each in self.usage
        )
        now_us = self.world.now_us
        self.world.books.events.append(
            oracle.Heartbeat(now_us, self.name, self.asked_ms, running, counters, self.boot_id)
        )
        return reply

    def run(self, *keys: str) -> dict[str, pb.Assignment]:
        """A heartbeat that says that these run."""
        return self.beat(**dict.fromkeys(keys, "running"))

    def run_last(self, *keys: str) -> None:
        """The same, until the longest interval is asked for: with that its silence is counted."""
        while self.asked_ms != INTERVAL_S * 1000:
            self.run(*keys)


@pytest.fixture
def world(
    postgres: Postgres, make_cp: Callable[..., ControlPlane], tmp_path: Path
) -> Iterator[World]:
    books = Books(postgres)
    scripts = change_scripts(tmp_path / "scripts", "cp_server.py", **PACE)
    flags = (f"--heartbeat-s={INTERVAL_S}", f"--registry={REGISTRY}")
    yield World(books, make_cp(*flags, start=False, scripts=scripts))
    books.close()


RIGHT_US = (cp_server.LEASE_S + cp_server.LEASE_GRACE_S) * S  # of a copy, after a last heartbeat


def test_a_control_plane_that_is_away_for_an_hour(world: World) -> None:
    """Three hosts with a replica each: one goes on, one stops and starts, one comes back late.

    A silence between two heartbeats of an assignment counts up to three of the intervals that
    were asked for (section 7): 180 s of this hour, whatever ran in it. After its own absence the
    control plane gives hosts three intervals and the grace, then it places again (section 8); the
    one that comes back later has no second heartbeat of that assignment: nothing of it counts.
    """
    wallets = {"h1": WALLET, "h2": WALLET, "h3": OTHER_WALLET}
    homes = {name: Home(world, name, wallet) for name, wallet in wallets.items()}
    key = {row["host"]: row["key"] for row in world.order(replicas=3)}
    assert key.keys() == homes.keys()
    has = {name: {key[name]: "running"} for name in homes}

    def tell(time_us: int, *names: str) -> None:
        world.pass_to(time_us)
        for name in names:
            homes[name].beat(**has[name])

    away_us = T + 20 * MIN
    for time_us in range(T, away_us + 1, MIN):
        tell(time_us, *homes)
    for name, home in homes.items():
        home.run_last(key[name])
    world.cp.stop(signal.SIGKILL)
    back_us = away_us + HOUR
    world.pass_to(back_us, is_away=True)
    world.cp.start()
    world.wait_looks()  # the hour from 10 to 11 is closed now
    (ten,) = world.books.query(
        "SELECT sum(billed_us)::bigint AS us FROM usage_windows WHERE hour_at = '2026-03-10T10:00Z'"
    )
    assert ten == {"us": 3 * 10 * MIN}
    has["h2"][key["h2"]] = "waiting"  # it stopped 15 s before its lease was over
    tell(back_us + MIN, "h1", "h2")
    has["h2"][key["h2"]] = "running"
    for step in (2, 3):
        tell(back_us + step * MIN, "h1", "h2")
    for late_us in (0, 1):
        assert len(world.copies()) == 3
        world.pass_to(back_us + (3 * INTERVAL_S + cp_server.LEASE_GRACE_S) * S + late_us)
        world.wait_looks()
    *_, moved = copies = world.copies()
    (lost,) = (row for row in copies if row["host"] == "h3")
    assert (lost["state"], lost["ended_us"]) == ("lost", world.now_us)
    assert (moved["from_us"], moved["replica"]) == (world.now_us, lost["replica"])
    tell(world.now_us, moved["host"])
    assert moved["key"] in homes[moved["host"]].wanted
    has[moved["host"]][moved["key"]] = "running"  # half a minute later
    for step in range(4, 21):
        tell(back_us + step * MIN, "h1", "h2")
        if step == 5:
            assert homes["h3"].run(key["h3"]) == {}
    for home in homes.values():
        home.channel.close()
    seconds = world.bill()
    assert [seconds[key[name]] for name in homes] == [
        1_200 + 180 + 19 * 60,
        1_200 + 180 + 18 * 60,
        1_200,
    ]
    assert seconds[moved["key"]] == 16 * 60
    world.check_once()
    late = world.books.query("SELECT billed_us FROM usage_windows WHERE part = 2")
    assert late == [{"billed_us": 180 * S}] * 2
    assert -world.books.balances()["customer", world.customer] == 7_140 * SECOND_MICROS


def test_a_host_that_is_cut_off_for_a_day(world: World) -> None:
    """Its replica moves after lease and grace, and runs elsewhere while the first runs on.

    Billed is the time between accepted heartbeats of an assignment (section 8): of the first 20
    minutes, and nothing of its silence, for it ended before the next one. Its right is over 600 s
    after the last one and 30 s later, 630 s in all, another host gets it; that one is billed from
    its own first heartbeat, 30 s after that. Nobody is for the 660 s between: of the 24 h 30 min
    from start to end that leaves 1,200 s + 86,340 s = 87,540 s.
    """
    first = Home(world, "h1")
    (copy,) = world.order()
    second = Home(world, "h2", OTHER_WALLET)
    cut_us = T + 20 * MIN
    for time_us in range(T, cut_us + 1, MIN):
        world.pass_to(time_us)
        first.run(copy["key"])
        second.beat()
    for time_us in range(cut_us + MIN, cut_us + RIGHT_US, MIN):
        world.pass_to(time_us)
        second.beat()
    for late_us in (0, 1):
        assert [row["host"] for row in world.copies()] == ["h1"]
        world.pass_to(cut_us + RIGHT_US + late_us)
        world.wait_looks()
    assert {row["hostname"]: row["status"] for row in world.cp.hosts()} == {
        "h1": "offline",
        "h2": "online",
    }
    lost, moved = world.copies()
    assert (lost["state"], lost["ended_us"]) == ("lost", world.now_us)
    assert (moved["host"], moved["from_us"]) == ("h2", world.now_us)
    assert second.beat().keys() == {moved["key"]}
    back_us = cut_us + 24 * HOUR
    for time_us in range(cut_us + RIGHT_US + 30 * S, back_us, 150 * S):
        world.pass_to(time_us)
        second.run(moved["key"])
    world.wait_looks()  # of 24 hours and two of the first, while it runs
    assert world.books.query("SELECT count(*) AS n FROM usage_windows") == [{"n": 26}]
    for time_us in range(back_us, back_us + 10 * MIN + 1, MIN):
        world.pass_to(time_us)
        second.run(moved["key"])
        # It ran its late copy all day, and says so until it has heard that it is none.
        first.beat(**({copy["key"]: "running"} if time_us == back_us else {}))
    assert (list(first.wanted), list(second.wanted)) == ([], [moved["key"]])
    for home in (first, second):
        home.channel.close()
    seconds = world.bill()
    assert seconds == {copy["key"]: 1_200, moved["key"]: 86_340}
    world.check_once()
    assert -world.books.balances()["customer", world.customer] == 87_540 * SECOND_MICROS


def run_on(world: World, home: Home, key: str, first_us: int, last_us: int) -> None:
    """It says each minute that it runs this copy, which has sent half a GB at the end."""
    for time_us in range(first_us, last_us + 1, MIN):
        world.pass_to(time_us)
        home.count(key, 5 * 10**8 * (time_us - first_us) // (last_us - first_us))
        home.run(key)


def check_no_word(world: World, old: Home, key: str) -> None:
    """What the older session says that it runs and has sent counts nowhere."""
    stored = "SELECT * FROM usage_counters ORDER BY assignment_no, boot_id"
    before = world.books.query(stored)
    old.count(key, 9 * 10**9)
    check_refused("SESSION_SUPERSEDED", old.run, key)
    assert world.books.query(stored) == before


def test_a_copied_disk_that_goes_on_where_the_first_was(world: World) -> None:
    """It knows the live session, so that for the control plane the agent was started again.

    The first ran the copy for 600 s; half a minute later the other says that it does not yet: so
    much more is between two heartbeats of the assignment. It runs it for 600 s from the twelfth
    minute on. 1,230 s, and half a GB of either machine.
    """
    first = Home(world, "h1")
    (row,) = world.order()
    key = row["key"]
    run_on(world, first, key, T, T + 10 * MIN)
    second = first.copy_disk()
    world.pass_to(T + 10 * MIN + 30 * S)
    second.resume()
    assert second.beat(**{key: "waiting"}).keys() == {key}
    check_no_word(world, first, key)
    run_on(world, second, key, T + 12 * MIN, T + 22 * MIN)
    check_no_word(world, first, key)
    first.channel.close()
    assert world.bill() == {key: 1_230}
    assert -world.books.balances()["customer", world.customer] == 1_230 * SECOND_MICROS + 10_000


def test_a_copied_disk_that_takes_over(world: World) -> None:
    """It does not know the live session: no copy of the first may run beside its own (section 8).

    The first ran its copy for 600 s and sent half a GB; what the other repeats of that from the
    disk is the same half. Nobody may run the replica until 630 s after the first one's last
    heartbeat; half a minute later the other has it, for 900 s and half a GB.
    """
    first = Home(world, "h1")
    (row,) = world.order()
    old = row["key"]
    second = first.copy_disk()
    first.resume()  # a new session, which is on the first disk only
    first.revision = 0
    cut_us = T + 10 * MIN
    run_on(world, first, old, T, cut_us)
    second.usage = first.usage
    world.pass_to(cut_us + 30 * S)
    second.resume()
    for time_us in range(cut_us + MIN, cut_us + RIGHT_US, MIN):
        world.pass_to(time_us)
        check_no_word(world, first, old)
        assert second.run(old) == {}  # its disk says so, and it has no right to it
    for late_us in (0, 1):
        assert len(world.copies()) == 1
        world.pass_to(cut_us + RIGHT_US + late_us)
        world.wait_looks()
    lost, moved = world.copies()
    assert (lost["state"], lost["ended_us"]) == ("lost", world.now_us)
    new = moved["key"]
    assert second.beat().keys() == {new}
    run_on(world, second, new, cut_us + RIGHT_US + 30 * S, cut_us + RIGHT_US + 930 * S)
    for key in (old, new):
        check_no_word(world, first, key)
    first.channel.close()
    assert world.bill() == {old: 600, new: 900}
    world.check_once()
    assert -world.books.balances()["customer", world.customer] == 1_500 * SECOND_MICROS + 10_000
