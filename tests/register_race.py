"""The register race: many machines redeem few invites while everything breaks, and what must hold.

All racers of one invite hold its token and compete with secrets, sessions, keys and addresses of
their own. Each sends its own one request again until it has a final answer. Meanwhile PostgreSQL is
stopped in immediate mode, the control plane is killed, and replies are lost. The cluster runs with
fsync=off: what PostgreSQL has written is in the kernel's page cache, which outlives the postmaster,
so a stop without a crash of the machine loses no more than with fsync=on.

OPENINFRA_SEED repeats a run's plan: tokens' reservations, faults and the moments at which they come
(counted in racers that are done), the replies that are lost. The order in which the racers arrive
is the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cp_server
from proto import openinfra_pb2 as pb
from tests import failpoints
from tests.harness import (
    BOOT_ID,
    ROOT,
    WALLET,
    ControlPlane,
    Netns,
    Postgres,
    facts,
    new_wg_key,
    read_seed,
    wait_for,
)

ACTOR = cp_server.Actor("cli:tester")
LOSE = 30  # percent of the replies


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a race is, and how much breaks in it."""

    invites: int
    racers: int  # for each invite
    at_once: int  # invites that are raced for at one time
    postgres_stops: int = 0
    cp_kills: int = 0  # from outside; one more dies between commit and reply
    lose: int = LOSE
    deadline_s: float = 120


@dataclasses.dataclass(frozen=True)
class Racer:
    """One machine that wants to redeem an invite."""

    number: int
    invite_id: str
    address: str
    secret: bytes
    session: bytes
    wg_key: str
    request: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a racer was told in the end."""

    host_id: str  # or empty
    reason: str
    tries: int
    lost: int
    began: float
    ended: float


def mint(cp: ControlPlane, orders: list[dict[str, Any]]) -> list[str]:
    """A token for each order, by what the API and the command line call."""

    async def work(db: cp_server.Database) -> list[str]:
        made = [cp_server.InviteOrder(**order) for order in orders]
        return [(await cp_server.mint_invite(db, ACTOR, order))[0] for order in made]

    return asyncio.run(cp_server.with_database(cp.dsn_file, work))


class Runners:
    """The process with the racers; its answers come in as they end."""

    def __init__(self, netns: Netns, plan: dict[str, Any]) -> None:
        self.answers: dict[int, dict[str, Any]] = {}
        self.total = sum(len(calls) for calls in plan["groups"])
        tool = [sys.executable, "-W", "error", str(ROOT / "tests" / "race_tool.py")]
        self.child = subprocess.Popen(
            netns.argv(["setpriv", "--pdeathsig=KILL", "--", *tool]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.child.stdin
        json.dump(plan, self.child.stdin)
        self.child.stdin.close()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            answer = json.loads(line)
            self.answers[answer["id"]] = answer

    @property
    def done(self) -> int:
        """How many have their final answer."""
        return len(self.answers)

    def wait_done(self, count: int, timeout_s: float) -> None:
        """Wait until so many have their final answer."""
        wait_for(f"{count} answers", lambda: self.done >= count or None, timeout_s)

    def finish(self, timeout_s: float) -> dict[int, dict[str, Any]]:
        """Every answer; fails when one is missing at the end of the time."""
        try:
            code = self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"only {self.done} of {self.total} have an answer") from None
        self._reader.join()
        assert (code, self.done) == (0, self.total)
        return self.answers

    def close(self) -> None:
        """End the process, whatever it does."""
        self.child.kill()
        self.child.wait()
        self._reader.join()
        assert self.child.stdout
        self.child.stdout.close()


class Race:
    """One race on one control plane inside a namespace."""

    def __init__(self, postgres: Postgres, directory: Path, netns: Netns, scripts: Path) -> None:
        self.seed = read_seed()
        self.dice = random.Random(self.seed)
        self.cp = ControlPlane(postgres, directory, netns=netns, scripts=scripts)
        self.netns = netns
        self.racers: list[Racer] = []
        self.answers: dict[int, Answer] = {}
        self.spare: list[str] = []  # addresses held by invites that nobody races for

    def start_cp(self, what: str = "") -> None:
        """Serve, with a failpoint between commit and reply."""
        fails = {"OPENINFRA_FAILPOINT": f"Register.after_commit={what}"} if what else {}
        self.cp.start(**fails, OPENINFRA_SEED=str(self.seed))

    def line_up(self, size: Size) -> None:
        """Mint the invites and make the racers."""
        addresses = [
            f"10.77.{16 + n // 250}.{2 + n % 250}" for n in range(size.invites * size.racers)
        ]
        reserved = []
        for i in range(size.invites):  # half of them for one of the racers, half for nobody
            one = addresses[i * size.racers + self.dice.randrange(size.racers)]
            reserved.append(self.dice.choice((one, f"10.77.{200 + i // 250}.{2 + i % 250}")))
        self.spare = [f"10.77.250.{2 + n}" for n in range(3)]
        orders = [{"payout_pubkey": WALLET, "wg_ip": a} for a in (*reserved, *self.spare)]
        tokens = mint(self.cp, orders)
        for number, address in enumerate(addresses):
            token = tokens[number // size.racers]
            secret, session, key = secrets.token_bytes(32), secrets.token_bytes(32), new_wg_key()
            request = pb.RegisterRequest(
                invite_token=token, host_secret=secret, session=session, wg_pubkey=key
            )
            request.facts.CopyFrom(facts(hostname=f"racer-{number}"))
            invite_id, raw = token.split("_")[1], request.SerializeToString()
            self.racers.append(Racer(number, invite_id, address, secret, session, key, raw))
        self.reserved = reserved

    def plan(self, method: str, racers: list[Racer], group: int, **more: Any) -> dict[str, Any]:
        """What the racers' process reads."""
        calls = [
            {
                "id": racer.number,
                "target": f"{racer.address}:{self.cp.grpc_port}",
                "method": method,
                "request": (racer.request if method == "Register" else self.beat(racer)).hex(),
            }
            for racer in racers
        ]
        groups = [calls[i : i + group] for i in range(0, len(calls), group)]
        return {"seed": self.seed, "lose": 0, "at_once": 20, "groups": groups, **more}

    def beat(self, racer: Racer) -> bytes:
        """A heartbeat of this racer's session."""
        request = pb.HeartbeatRequest(session=racer.session, seq=1, boot_id=BOOT_ID)
        return request.SerializeToString()

    @contextlib.contextmanager
    def runners(self, plan: dict[str, Any]) -> Iterator[Runners]:
        """The racers, ended with the block."""
        made = Runners(self.netns, plan)
        try:
            yield made
        finally:
            made.close()

    def run(self, size: Size) -> None:
        """The race, to the last racer's final answer."""
        plan = self.plan("Register", self.racers, size.racers, at_once=size.at_once, lose=size.lose)
        with self.runners(plan) as runners:
            if size.cp_kills:
                self.die_before_the_reply()
            faults = ["postgres"] * size.postgres_stops + ["cp"] * size.cp_kills
            self.dice.shuffle(faults)
            # Spread over the race; the last one leaves enough racers for it to hit.
            steps = range(1, runners.total * 4 // 5)
            moments = sorted(self.dice.sample(steps, len(faults)))
            for fault, moment in zip(faults, moments, strict=True):
                runners.wait_done(moment, size.deadline_s)
                time.sleep(self.dice.uniform(0, 0.05))
                assert runners.done < runners.total, "the race was over before the fault"
                self.break_and_mend(fault)
            self.answers = {n: parse(a) for n, a in runners.finish(size.deadline_s).items()}

    def die_before_the_reply(self) -> None:
        """The control plane that serves now was told to die between a commit and its reply."""
        assert self.cp.process
        assert self.cp.process.child.wait(30) == -signal.SIGKILL
        self.start_cp(f"lose%{LOSE}")

    def break_and_mend(self, fault: str) -> None:
        """Stop one of the two without a word, and start it again."""
        if fault == "postgres":
            self.cp.postgres.stop(signal.SIGQUIT)
            self.cp.postgres.start()
        else:
            self.cp.stop(signal.SIGKILL)
            self.start_cp(f"lose%{LOSE}")

    # What must hold afterwards

    def check(self) -> None:
        """All that a race must leave behind."""
        self.check_answers()
        self.check_database()
        self.check_sessions()
        self.check_addresses()
        self.cp.check_invariants()
        assert "Traceback" not in self.cp.log, self.cp.log

    def winners(self) -> list[Racer]:
        """Who was told a host_id."""
        return [racer for racer in self.racers if self.answers[racer.number].host_id]

    def check_answers(self) -> None:
        """One winner for each invite; everyone else was told that the invite is used."""
        reasons = Counter(a.reason for a in self.answers.values())
        invites = Counter(racer.invite_id for racer in self.racers)
        assert Counter(r.invite_id for r in self.winners()) == Counter(invites.keys()), reasons
        assert reasons == {"": len(invites), "INVITE_USED": len(self.racers) - len(invites)}

    def check_database(self) -> None:
        """The hosts there are the ones that the winners know: none doubled, none stranded."""
        rows = self.cp.query("SELECT *, host(wg_ip) AS address FROM hosts")
        found = sorted(
            (r["invite_id"], str(r["host_id"]), r["host_secret_sha256"], r["address"]) for r in rows
        )
        told = sorted(
            (
                racer.invite_id,
                self.answers[racer.number].host_id,
                cp_server.sha256(racer.secret),
                racer.address,
            )
            for racer in self.winners()
        )
        assert found == told, f"only there: {set(found) - set(told)}; only told: " + str(
            set(told) - set(found)
        )
        assert {r["wg_pubkey"] for r in rows} == {racer.wg_key for racer in self.winners()}
        registered = "SELECT subject FROM audit_log WHERE action = 'host.register' ORDER BY 1"
        assert [r["subject"] for r in self.cp.query(registered)] == sorted(r[1] for r in told)
        used = "SELECT invite_id, host_id::text FROM invites WHERE consumed_at IS NOT NULL"
        assert sorted((r["invite_id"], r["host_id"]) for r in self.cp.query(used)) == [
            (invite_id, host_id) for invite_id, host_id, _, _ in told
        ]

    def check_sessions(self) -> None:
        """Every winner's first session is live; no loser has one."""
        with self.runners(self.plan("Heartbeat", self.racers, 20)) as runners:
            answers = runners.finish(120)
        won = {racer.number for racer in self.winners()}
        refused = {n: a["reason"] for n, a in answers.items() if "reason" in a}
        expected = {r.number: "UNKNOWN_SESSION" for r in self.racers if r.number not in won}
        assert refused == expected, Counter(refused.values())
        live = self.cp.query("SELECT count(*) AS n FROM sessions WHERE ended_at IS NULL")
        assert live[0]["n"] == len(won)

    def check_addresses(self) -> None:
        """Held are the winners' addresses and those of the open invites; the rest can be had."""
        held = self.cp.query("SELECT host(wg_ip) AS address FROM invites WHERE wg_ip_held")
        assert sorted(r["address"] for r in held) == sorted(self.spare), held
        taken = {racer.address for racer in self.winners()}
        free = [address for address in self.reserved if address not in taken]
        mint(self.cp, [{"wg_ip": address} for address in free])

    def count_lost(self) -> tuple[int, int]:
        """Replies that were lost on purpose, and all replies that there were."""
        accepted = self.cp.log.count("WARN failpoint name=Register.after_commit action=lose")
        refused = sum(answer.lost for answer in self.answers.values())
        total = accepted + refused + len(self.answers)
        print(f"{accepted} acceptances and {refused} refusals of {total} replies were lost")
        return accepted + refused, total


@contextlib.contextmanager
def racing(postgres: Postgres, directory: Path, netns: Netns) -> Iterator[Race]:
    """A race whose control plane is the test build, not started yet; it ends with the block."""
    race = Race(postgres, directory / "cp", netns, failpoints.build(directory / "scripts"))
    try:
        yield race
    finally:
        if race.cp.process:
            race.cp.stop(signal.SIGKILL)


def parse(raw: dict[str, Any]) -> Answer:
    """A final answer as the racers' process gives it."""
    host_id = ""
    if raw.get("reply"):
        host_id = pb.RegisterReply.FromString(bytes.fromhex(raw["reply"])).host_id
    keys = ("tries", "lost", "began", "ended")
    return Answer(host_id, raw.get("reason", ""), *(raw[key] for key in keys))
