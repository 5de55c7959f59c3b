"""Hostile hosts behind the tunnel: another host's ids in every call, and bytes that are no call.

One control plane with `--peer-check=wg` in a namespace, one honest host who goes on, and one who
puts each identity of each other host, whatever its state, into each field that takes one.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from typing import Any

import pytest

import cp_server
from tests.harness import (
    WALLET,
    ControlPlane,
    Refused,
    RemoteClient,
    RpcTool,
    check_refused,
    new_wg_key,
    unchanged,
)
from tests.hostile import ACTOR

STATES = ("online", "pending", "quarantined", "revoked", "resumed")


class Guest(RemoteClient):
    """A host with all that it ever was given."""

    def __init__(self, cp: ControlPlane, tool: RpcTool, address: str) -> None:
        super().__init__(cp, tool, address)
        self.token = mint(cp)
        self.first_session = self.session
        self.host_id = self.register(self.token).host_id


def mint(cp: ControlPlane) -> str:
    """An invite, by what the API and the command line call."""

    async def work(db: cp_server.Database) -> str:
        order = cp_server.InviteOrder(payout_pubkey=WALLET)
        return (await cp_server.mint_invite(db, ACTOR, order))[0]

    return asyncio.run(cp_server.with_database(cp.dsn_file, work))


@pytest.fixture(scope="module")
def cp(tunnel_cp: ControlPlane) -> ControlPlane:
    """The control plane of this file."""
    return tunnel_cp


@pytest.fixture(scope="module")
def victims(cp: ControlPlane, tool: RpcTool) -> dict[str, Guest]:
    """One host of each state; `resumed` has an older session, which its first_session is."""
    made = {state: Guest(cp, tool, f"10.77.30.{number}") for number, state in enumerate(STATES, 10)}
    for state in ("online", "quarantined", "revoked", "resumed"):
        made[state].heartbeat()
    made["resumed"].resume()
    for _ in range(3):
        made["quarantined"].resume(previous_session=b"")
    check_refused("HOST_QUARANTINED", made["quarantined"].resume, previous_session=b"")
    host_id = uuid.UUID(made["revoked"].host_id)
    asyncio.run(
        cp_server.with_database(cp.dsn_file, lambda db: cp_server.revoke_host(db, ACTOR, host_id))
    )
    return made


@pytest.fixture(scope="module")
def mallory(cp: ControlPlane, tool: RpcTool) -> Guest:
    """A host like any other, online, who now tries what others have."""
    made = Guest(cp, tool, "10.77.31.66")
    made.heartbeat()
    return made


@pytest.fixture(scope="module")
def fresh(cp: ControlPlane) -> str:
    """An invite that nobody redeems, since every try is refused."""
    return mint(cp)


# Which field of which call gets the other host's value; `from` is where the call comes from.
# Register is tried again (the same request as after a lost answer) and with a fresh invite.
CALLS: dict[tuple[str, str], str] = {
    ("heartbeat", "session"): "WRONG_ADDRESS",
    ("heartbeat", "from"): "WRONG_ADDRESS",
    ("resume", "host_secret"): "WRONG_ADDRESS",
    ("resume", "host_secret, session"): "WRONG_ADDRESS",
    ("resume", "host_secret, previous_session"): "WRONG_ADDRESS",
    ("resume", "host_secret, wg_pubkey"): "WRONG_ADDRESS",
    ("resume", "session"): "BAD_REQUEST",
    ("resume", "session, previous_session"): "BAD_REQUEST",
    ("resume", "session, from"): "WRONG_ADDRESS",
    ("resume", "wg_pubkey"): "KEY_TAKEN",
    ("resume", "from"): "WRONG_ADDRESS",
    ("resume", "wg_pubkey, from"): "WRONG_ADDRESS",
    ("register again", "invite_token"): "INVITE_USED",
    ("register again", "invite_token, session"): "INVITE_USED",
    ("register again", "invite_token, wg_pubkey"): "INVITE_USED",
    ("register again", "invite_token, wg_pubkey, from"): "INVITE_USED",
    ("register again", "invite_token, host_secret"): "KEY_TAKEN",  # its own key, another's host
    ("register again", "invite_token, host_secret, wg_pubkey"): "ADDRESS_TAKEN",
    ("register again", "host_secret"): "INVITE_USED",
    ("register again", "session"): "BAD_REQUEST",
    ("register again", "wg_pubkey"): "KEY_TAKEN",
    ("register again", "from"): "ADDRESS_TAKEN",
    ("register fresh", "session"): "BAD_REQUEST",
    ("register fresh", "wg_pubkey"): "KEY_TAKEN",
    ("register fresh", "from"): "ADDRESS_TAKEN",
}
# Where the state of the other host makes another answer; empty: it is no attack.
EXCEPTIONS: dict[tuple[str, str, str], str] = {
    ("heartbeat", "session", "quarantined"): "HOST_QUARANTINED",
    ("heartbeat", "session", "revoked"): "HOST_REVOKED",
    ("heartbeat", "session", "resumed"): "SESSION_SUPERSEDED",
    ("resume", "host_secret", "revoked"): "HOST_REVOKED",
    ("resume", "host_secret, session", "revoked"): "HOST_REVOKED",
    ("resume", "host_secret, previous_session", "revoked"): "HOST_REVOKED",
    ("resume", "host_secret, wg_pubkey", "revoked"): "HOST_REVOKED",
    ("register again", "invite_token, host_secret", "revoked"): "HOST_REVOKED",
    ("register again", "invite_token, host_secret, wg_pubkey", "revoked"): "HOST_REVOKED",
    ("register again", "from", "revoked"): "WRONG_ADDRESS",  # free, but not the caller's
    ("register fresh", "from", "revoked"): "",  # its address is free for everybody
}


def call_as(
    cp: ControlPlane, mallory: Guest, victim: Guest, fresh: str, rpc: str, fields: list[str]
) -> Any:
    """The call with the other host's value in each of these fields."""
    others = {
        "session": victim.first_session,
        "previous_session": victim.session,
        "host_secret": victim.host_secret,
        "wg_pubkey": victim.wg_key,
        "invite_token": victim.token,
    }
    changes: dict[str, Any] = {field: others[field] for field in fields if field != "from"}
    caller = mallory.at(cp, victim.address) if "from" in fields else mallory.at(cp, mallory.address)
    if rpc == "heartbeat":
        return caller.heartbeat(**changes)
    if rpc == "resume":
        return caller.resume(**changes)
    if rpc == "register again":
        return caller.register(changes.pop("invite_token", mallory.token), **changes)
    caller.host_secret, caller.session = secrets.token_bytes(32), secrets.token_bytes(32)
    caller.wg_key = new_wg_key()
    if "from" not in fields:
        caller = caller.at(cp, "10.77.31.99")
    return caller.register(fresh, **changes)


@pytest.mark.parametrize(("rpc", "field"), CALLS)
def test_another_hosts_value_is_of_no_use(
    cp: ControlPlane,
    mallory: Guest,
    victims: dict[str, Guest],
    fresh: str,
    rpc: str,
    field: str,
) -> None:
    wanted = {state: EXCEPTIONS.get((rpc, field, state), CALLS[rpc, field]) for state in STATES}
    tries = [(state, reason) for state, reason in wanted.items() if reason]
    for state, reason in tries:
        if reason == "INVITE_USED":  # the first time is audited, once an hour
            with pytest.raises(Refused):
                call_as(cp, mallory, victims[state], fresh, rpc, field.split(", "))
    with unchanged(cp):
        for state, reason in tries:
            victim = victims[state]
            refused = check_refused(
                reason, call_as, cp, mallory, victim, fresh, rpc, field.split(", ")
            )
            for theirs in (victim.host_id, victim.token, victim.wg_key):
                assert theirs not in refused.message, state
            for secret in (victim.host_secret, victim.session, victim.first_session):
                assert secret.hex() not in refused.message, state


def test_after_all_that_everybody_goes_on(
    cp: ControlPlane, mallory: Guest, victims: dict[str, Guest], fresh: str
) -> None:
    for state in ("online", "pending", "resumed"):
        victims[state].heartbeat()
    mallory.heartbeat()
    late = mallory.at(cp, "10.77.31.200")
    late.host_secret, late.session = secrets.token_bytes(32), secrets.token_bytes(32)
    late.wg_key = new_wg_key()
    assert late.register(fresh).host_id not in {victim.host_id for victim in victims.values()}


def test_the_session_of_another_as_the_last_known_one_is_a_takeover_of_ones_own_host(
    cp: ControlPlane, mallory: Guest, victims: dict[str, Guest]
) -> None:
    """A wrong previous_session is what a copied disk sends: it counts against the sender only."""
    victim = victims["online"]
    sql = "SELECT h.host_id::text, s.opened_by FROM sessions s JOIN hosts h USING (host_no)"
    before = cp.query(sql + " WHERE h.host_id = %s", victim.host_id)
    mallory.resume(previous_session=victim.session)
    last = sql + " WHERE h.host_id = %s AND s.ended_at IS NULL"
    assert cp.query(last, mallory.host_id)[0]["opened_by"] == "takeover"
    assert cp.query(sql + " WHERE h.host_id = %s", victim.host_id) == before
    victim.heartbeat()
    mallory.heartbeat()
