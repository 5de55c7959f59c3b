"""What makes the hub as the database says: tables for `plan_peers` and the helper's rules."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from typing import Any

import pytest

import cp_server
from cp_server import (
    PeerChange,
    PeerPlan,
    WantedPeer,
    plan_peers,
    plan_renewals,
    render_peer_change,
)
from systemd import openinfra_wg


def up(key: str, ip: str) -> WantedPeer:
    return WantedPeer(key, ip, is_up=True)


def silent(key: str, ip: str) -> WantedPeer:
    return WantedPeer(key, ip, is_up=False)


def put(key: str, ip: str, replaces: str = "") -> PeerChange:
    return PeerChange("set", key, ip, replaces)


def drop(key: str) -> PeerChange:
    return PeerChange("remove", key)


A, B = "10.77.0.2", "10.77.0.3"
Nets = dict[str, list[str]]


def nets(**peers: str) -> Nets:
    """`a="2 3"`: peer a has 10.77.0.2/32 and 10.77.0.3/32."""
    return {key: [f"10.77.0.{last}/32" for last in text.split()] for key, text in peers.items()}


@pytest.mark.parametrize(
    ("wanted", "on_hub", "lost", "plan"),
    [
        # Nothing to do.
        ([], {}, {}, PeerPlan(0, (), (), ())),
        ([up("a", A)], nets(a="2"), {}, PeerPlan(1, (), (), ())),
        # A hub that rebooted without a save.
        ([up("a", A), silent("b", B)], {}, {}, PeerPlan(2, (put("a", A), put("b", B)), (), ())),
        # Without its address, with another, with one too many.
        ([silent("a", A)], nets(a=""), {}, PeerPlan(1, (put("a", A),), (), ())),
        ([silent("a", A)], nets(a="9"), {}, PeerPlan(1, (put("a", A),), (), ())),
        ([silent("a", A)], nets(a="2 9"), {}, PeerPlan(1, (put("a", A),), (), ())),
        # Unknown peers are left alone.
        ([], nets(x="2", y=""), {}, PeerPlan(0, (), ("x", "y"), ())),
        ([up("a", A)], nets(a="2", x="9"), {}, PeerPlan(1, (), ("x",), ())),
        # One that took the address of a host: from one that is up it goes back.
        ([up("a", A)], nets(a="", x="2"), {}, PeerPlan(1, (put("a", A, "x"),), ("x",), ())),
        ([silent("a", A)], nets(a="", x="2"), {}, PeerPlan(1, (), ("x",), (put("a", A, "x"),))),
        ([silent("a", A)], nets(x="2"), {}, PeerPlan(1, (), ("x",), (put("a", A, "x"),))),
        # Hosts among themselves, also when they are silent.
        (
            [silent("a", A), silent("b", B)],
            nets(a="3", b="2"),
            {},
            PeerPlan(2, (put("a", A, "b"), put("b", B, "a")), (), ()),
        ),
        (
            [silent("a", A), up("b", B)],
            nets(a="2 3"),
            {},
            PeerPlan(2, (put("a", A), put("b", B, "a")), (), ()),
        ),
        # A revoked host's key goes, whatever address it has; first, so that its address is free.
        ([], nets(r="7"), {"r": "revoked"}, PeerPlan(0, (drop("r"),), (), ())),
        ([], nets(r=""), {"r": "revoked"}, PeerPlan(0, (drop("r"),), (), ())),
        (
            [silent("a", A)],
            nets(r="2"),
            {"r": "revoked"},
            PeerPlan(1, (drop("r"), put("a", A)), (), ()),
        ),
        # A host's key of before goes with the address of a host or none, else it is unknown.
        (
            [silent("a", A)],
            nets(f="2"),
            {"f": "former"},
            PeerPlan(1, (drop("f"), put("a", A)), (), ()),
        ),
        ([up("a", A)], nets(a="2", f=""), {"f": "former"}, PeerPlan(1, (drop("f"),), (), ())),
        ([up("a", A)], nets(a="2", f="9"), {"f": "former"}, PeerPlan(1, (), ("f",), ())),
        # A key that is a host's now is not lost, whatever it was before.
        ([up("a", A)], nets(a="2"), {"a": "former"}, PeerPlan(1, (), (), ())),
        # Wider networks are somebody's own affair: the more exact one counts.
        ([up("a", A)], {"a": ["10.77.0.2/32"], "x": ["10.77.0.0/16"]}, {}, None),
    ],
)
def test_plan_peers(
    wanted: list[WantedPeer], on_hub: Nets, lost: dict[str, str], plan: PeerPlan | None
) -> None:
    assert plan_peers(wanted, on_hub, lost) == (plan or PeerPlan(1, (), ("x",), ()))


def apply(on_hub: Nets, plan: PeerPlan) -> tuple[Nets, list[dict[str, str]]]:
    """The hub after a plan, by the helper's own rule."""
    after = {key: list(ips) for key, ips in on_hub.items()}
    order = [render_peer_change(change) for change in plan.changes]
    _, _, refused = openinfra_wg.plan_changes(order, after)
    return after, refused


@pytest.mark.parametrize("seed", range(200))
def test_any_hub_becomes_right_in_one_plan(seed: int) -> None:
    """Hosts, revoked, former and unknown keys with any addresses; then nothing is left to do."""
    draw = random.Random(seed)
    keys = ["a", "b", "c", "r", "f", "x"]
    on_hub: Nets = {key: [] for key in keys if draw.random() < 0.8}
    for last in range(2, 10):
        if on_hub and draw.random() < 0.8:
            on_hub[draw.choice(list(on_hub))].append(f"10.77.0.{last}/32")
    wanted = [
        WantedPeer(key, f"10.77.0.{n}", draw.random() < 0.7) for n, key in enumerate("abc", 2)
    ]
    lost = {"r": "revoked", "f": "former"}
    plan = plan_peers(wanted, on_hub, lost)
    after, refused = apply(on_hub, plan)
    assert refused == []
    again = plan_peers(wanted, after, lost)
    assert again.changes == ()
    assert "r" not in after
    for peer in wanted:
        if peer.is_up:
            assert after[peer.key] == [f"{peer.ip}/32"]
    assert on_hub.get("x", []) == after.get("x", []) or any(c.replaces == "x" for c in plan.changes)


def test_a_dump_is_read_without_its_secrets() -> None:
    key = base64.b64encode(bytes(range(32))).decode()
    text = f"PRIVATE\tPUBLIC\t51820\toff\n{key}\tPSK\t[2001:db8::1]:7\t10.77.0.2/32,10.77.0.3/32\t"
    text += f"1700000000\t1\t2\t25\n{key}\t(none)\t(none)\t(none)\t0\t0\t0\toff\n"
    found = openinfra_wg.parse_dump(text)
    assert found == [
        {
            "key": key,
            "allowed_ips": ["10.77.0.2/32", "10.77.0.3/32"],
            "endpoint": "[2001:db8::1]:7",
            "latest_handshake_at": 1700000000,
        },
        {"key": key, "allowed_ips": [], "endpoint": None, "latest_handshake_at": 0},
    ]
    assert openinfra_wg.parse_dump("PRIVATE\tPUBLIC\t51820\toff\n") == []


@pytest.mark.parametrize(
    ("wanted", "handshake_at", "nets", "renewed"),
    [
        (silent("a", A), 819, [f"{A}/32"], True),
        (silent("a", A), 820, [f"{A}/32"], False),  # its session may live
        (silent("a", A), 0, [f"{A}/32"], False),  # never connected, or renewed already
        (up("a", A), 819, [f"{A}/32"], False),
        (silent("b", A), 819, [f"{A}/32"], False),  # of another one
        (silent("a", A), 819, [], False),  # is set in any case, or a conflict
    ],
)
def test_silent_hosts_are_renewed(
    wanted: WantedPeer, handshake_at: int, nets: list[str], renewed: bool
) -> None:
    peer = {"key": "a", "allowed_ips": nets, "latest_handshake_at": handshake_at}
    expected = [drop("a"), put("a", A)] if renewed else []
    assert list(plan_renewals([wanted], [peer], 1000)) == expected


def test_comparisons_take_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often hosts come; one comparison is made to take 0.2 s."""
    began: list[float] = []

    async def scenario() -> None:
        peers = cp_server.Peers("/nonexistent", None, cp_server.Metrics())  # type: ignore[arg-type]

        async def compare() -> None:
            began.append(time.monotonic())
            await asyncio.sleep(0.2)

        monkeypatch.setattr(peers, "_compare", compare)
        (look, loop) = peers.loops()
        look.cancel()
        until = time.monotonic() + 3.2
        while time.monotonic() < until:
            peers.host_came()
            await asyncio.sleep(0.01)
        loop.cancel()

    asyncio.run(scenario())
    assert len(began) == 2
    assert 2.2 <= began[1] - began[0] < 2.6


def test_who_proves_a_key_shares_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait have one look at the hub together, and looks take a tenth of the time."""
    asked: list[float] = []

    async def ask(_path: str, _order: Any) -> dict[str, Any]:
        asked.append(time.monotonic())
        await asyncio.sleep(0.1)
        return {"peers": [{"key": "k", "allowed_ips": ["10.77.0.2/32", "10.77.0.3/32"]}]}

    async def scenario() -> list[Any]:
        peers = cp_server.Peers("/nonexistent", None, cp_server.Metrics())  # type: ignore[arg-type]
        right = [peers.check_key("10.77.0.2", "k") for _ in range(50)]
        wrong = [peers.check_key("10.77.0.2", "other"), peers.check_key("10.77.0.4", "k")]
        first = await asyncio.gather(*right, *wrong, return_exceptions=True)
        await peers.check_key("10.77.0.3", "k")
        return first

    monkeypatch.setattr(cp_server, "ask_hub", ask)
    answers = asyncio.run(scenario())
    assert answers[:50] == [None] * 50
    assert [answer.code for answer in answers[50:]] == ["WRONG_ADDRESS"] * 2
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 1.0  # an answer of before is no proof; the look waits its turn
