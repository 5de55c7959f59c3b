"""Who calls from where: `serve --peer-check=wg` in a network namespace, as behind the tunnel.

Each client has the source address that it connects to. The tests share one control plane; each has
addresses of its own.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
import pytest

import cp_server
from proto import openinfra_pb2 as pb
from tests.harness import (
    BOOT_ID,
    OTHER_WALLET,
    WALLET,
    ControlPlane,
    RemoteClient,
    RemoteError,
    RpcTool,
    check_refused,
    facts,
    new_wg_key,
    race,
    unchanged,
    wait_for,
)

Join = Callable[..., RemoteClient]


@pytest.fixture(scope="module")
def cp(tunnel_cp: ControlPlane) -> ControlPlane:
    """The control plane of this file."""
    return tunnel_cp


@pytest.fixture(scope="module")
def addresses() -> Iterator[str]:
    """Addresses that no test has used."""
    return (f"10.77.{n // 250 + 20}.{n % 250 + 2}" for n in itertools.count())


@pytest.fixture
def make_client(cp: ControlPlane, tool: RpcTool, addresses: Iterator[str]) -> Join:
    """Makes clients, each at its own address unless one is given."""

    def make(address: str = "", wg_key: str = "") -> RemoteClient:
        return RemoteClient(cp, tool, address or next(addresses), wg_key)

    return make


@pytest.fixture
def join(cp: ControlPlane, make_client: Join) -> Join:
    """Makes clients whose host is online."""

    def make(address: str = "", wg_key: str = "") -> RemoteClient:
        client = make_client(address, wg_key)
        client.host_id = client.register(mint(cp, payout_pubkey=WALLET)).host_id
        client.heartbeat(facts=facts())
        return client

    return make


def get_host(cp: ControlPlane, client: RemoteClient) -> dict[str, Any]:
    """The row of a client's host."""
    sql = "SELECT *, host(wg_ip) AS address FROM hosts WHERE host_id = %s"
    return cp.query(sql, client.host_id)[0]


def list_audit(cp: ControlPlane, client: RemoteClient) -> list[tuple[str, dict[str, Any]]]:
    """What was done to a client's host after it registered, in order."""
    sql = "SELECT action, detail FROM audit_log WHERE subject = %s ORDER BY audit_id OFFSET 1"
    return [(row["action"], row["detail"]) for row in cp.query(sql, client.host_id)]


ACTOR = cp_server.Actor("cli:tester")


def mint(cp: ControlPlane, **order: Any) -> str:
    """A token, by what the API and the command line call: HTTP does not reach out of there."""

    async def work(db: cp_server.Database) -> str:
        token, _ = await cp_server.mint_invite(db, ACTOR, cp_server.InviteOrder(**order))
        return token

    return asyncio.run(cp_server.with_database(cp.dsn_file, work))


def revoke(cp: ControlPlane, client: RemoteClient) -> None:
    """Remove a client's host."""
    host_id = uuid.UUID(client.host_id)
    asyncio.run(
        cp_server.with_database(cp.dsn_file, lambda db: cp_server.revoke_host(db, ACTOR, host_id))
    )


def release(cp: ControlPlane, client: RemoteClient) -> None:
    """Release a client's host from quarantine."""
    host_id = uuid.UUID(client.host_id)
    asyncio.run(
        cp_server.with_database(cp.dsn_file, lambda db: cp_server.release_host(db, ACTOR, host_id))
    )


# Where a call comes from


def test_the_address_is_the_peers_and_the_key_is_stored(cp: ControlPlane, join: Join) -> None:
    client = join("10.77.0.42")
    found = get_host(cp, client)
    assert (found["address"], found["wg_pubkey"]) == ("10.77.0.42", client.wg_key)
    assert found["status"] == "online"


def test_a_register_without_a_key(cp: ControlPlane, make_client: Join) -> None:
    client, token = make_client(), mint(cp)
    with unchanged(cp):
        refused = check_refused("BAD_REQUEST", client.register, token, wg_pubkey="")
    assert "openinfra.pub" in refused.message
    client.register(token)


def test_a_resume_without_a_key(cp: ControlPlane, join: Join) -> None:
    client = join()
    with unchanged(cp):
        check_refused("BAD_REQUEST", client.resume, wg_pubkey="")


@pytest.mark.parametrize("outside", ["127.0.0.1", "10.77.0.1", "10.77.255.255", "10.77.0.0"])
def test_a_call_from_no_hosts_address(
    cp: ControlPlane, make_client: Join, join: Join, outside: str
) -> None:
    host, token = join(), mint(cp)
    stranger, copy = make_client(outside), host.at(cp, outside)
    with unchanged(cp):
        refused = check_refused("WRONG_ADDRESS", stranger.register, token)
        assert outside in refused.message
        check_refused("WRONG_ADDRESS", copy.resume)
        check_refused("WRONG_ADDRESS", copy.heartbeat)
        check_refused("UNKNOWN_SESSION", stranger.heartbeat)
    host.heartbeat()


def test_a_session_or_identity_used_from_another_address(
    cp: ControlPlane, join: Join, make_client: Join
) -> None:
    host, other = join(), join()
    copies = [host.at(cp, make_client().address), host.at(cp, other.address)]
    with unchanged(cp):
        for copy in copies:
            refused = check_refused("WRONG_ADDRESS", copy.heartbeat)
            assert host.address in refused.message
            assert copy.address in refused.message
            check_refused("WRONG_ADDRESS", copy.resume)
            check_refused("WRONG_ADDRESS", copy.resume, previous_session=b"")
    host.heartbeat()
    other.heartbeat()


def test_a_copy_at_another_address_changes_no_answer(cp: ControlPlane, join: Join) -> None:
    """Heartbeats with one session, from two addresses, in one batch: each gets its own answer."""
    host = join()
    copy = host.at(cp, "10.77.1.77")
    for calls in ((host, copy), (copy, host)) * 4:
        answers = race(*(partial(client.heartbeat, seq=2) for client in calls))
        by_client = dict(zip((client.address for client in calls), answers, strict=True))
        assert by_client[copy.address] == "WRONG_ADDRESS"
        assert isinstance(by_client[host.address], pb.HeartbeatReply), by_client


def test_a_register_repeated_from_another_address(cp: ControlPlane, make_client: Join) -> None:
    host, token = make_client(), mint(cp, payout_pubkey=WALLET)
    host.host_id = host.register(token).host_id
    copy = host.at(cp, make_client().address)
    with unchanged(cp):
        check_refused("WRONG_ADDRESS", copy.register, token)
        check_refused("WRONG_ADDRESS", copy.register, token, wg_pubkey=new_wg_key())
    host.heartbeat()
    assert get_host(cp, host)["address"] == host.address


def test_a_register_repeated_with_another_key_replaces_it(
    cp: ControlPlane, make_client: Join
) -> None:
    host, token, before = make_client(), mint(cp, payout_pubkey=WALLET), new_wg_key()
    host.host_id = host.register(token, wg_pubkey=before).host_id
    host.register(token)
    assert get_host(cp, host)["wg_pubkey"] == host.wg_key
    assert list_audit(cp, host) == [("host.wg_key", {"before": before, "after": host.wg_key})]


# Addresses and keys that are taken


def test_an_address_that_another_host_has(cp: ControlPlane, join: Join, make_client: Join) -> None:
    host, token = join(), mint(cp)
    stranger = make_client(host.address)
    with unchanged(cp):
        refused = check_refused("ADDRESS_TAKEN", stranger.register, token)
        assert "operator" in refused.message
    host.heartbeat()
    revoke(cp, host)
    reply = stranger.register(token)  # the operator has freed it
    assert reply.host_id != host.host_id
    stranger.heartbeat()


def test_a_key_that_another_host_has(cp: ControlPlane, join: Join, make_client: Join) -> None:
    host, token = join(), mint(cp)
    with unchanged(cp):
        stranger = make_client(wg_key=host.wg_key)
        check_refused("KEY_TAKEN", stranger.register, token)
    host.heartbeat()


def test_the_key_and_address_of_two_hosts(cp: ControlPlane, join: Join, make_client: Join) -> None:
    first, second, token = join(), join(), mint(cp)
    with unchanged(cp):
        mixed = make_client(first.address, second.wg_key)
        check_refused("KEY_TAKEN", mixed.register, token)
        check_refused("KEY_TAKEN", first.register, token, wg_pubkey=second.wg_key)
        check_refused("ADDRESS_TAKEN", first.at(cp, second.address).register, token)


def test_the_key_of_a_revoked_host(cp: ControlPlane, join: Join, make_client: Join) -> None:
    host, other, token = join(), join(), mint(cp)
    revoke(cp, host)
    with unchanged(cp):
        for address in (host.address, make_client().address):
            check_refused("KEY_TAKEN", make_client(address, host.wg_key).register, token)
        check_refused("KEY_TAKEN", other.resume, wg_pubkey=host.wg_key)
    other.heartbeat()


def test_a_revoked_host_at_its_address_is_told_so(cp: ControlPlane, join: Join) -> None:
    host = join()
    revoke(cp, host)
    with unchanged(cp):
        check_refused("HOST_REVOKED", host.heartbeat)
        check_refused("HOST_REVOKED", host.resume)


def test_a_revoked_host_that_repeats_its_register_is_told_so(
    cp: ControlPlane, make_client: Join
) -> None:
    """KEY_TAKEN would tell its provider to make a new key, which helps nothing."""
    host, token = make_client(), mint(cp)
    host.host_id = host.register(token).host_id
    revoke(cp, host)
    with unchanged(cp):
        check_refused("HOST_REVOKED", host.register, token)


def test_two_invites_that_race_for_one_address(cp: ControlPlane, make_client: Join) -> None:
    first = make_client()
    second = make_client(first.address)
    tokens = [mint(cp), mint(cp)]
    pairs = list(zip((first, second), tokens, strict=True))
    answers = race(*(partial(client.register, token) for client, token in pairs))
    lost = [i for i, answer in enumerate(answers) if answer in ("ADDRESS_TAKEN", "TRY_LATER")]
    assert len(lost) == 1, answers
    check_refused("ADDRESS_TAKEN", pairs[lost[0]][0].register, pairs[lost[0]][1])


def test_an_address_that_an_open_invite_keeps(
    cp: ControlPlane, join: Join, make_client: Join, addresses: Iterator[str]
) -> None:
    """It goes to who comes with that invite; its own host may come back meanwhile."""
    address = next(addresses)
    token = mint(cp, wg_ip=address)
    thief, other = make_client(address), mint(cp)
    with unchanged(cp):
        refused = check_refused("ADDRESS_TAKEN", thief.register, other)
        assert "open invite" in refused.message
    owner = make_client(address)
    owner.register(token)
    owner.heartbeat()
    host = join()
    mint(cp, wg_ip=host.address)  # to heal it, and not used yet
    host.resume()
    host.host_secret = secrets.token_bytes(32)
    host.register(mint(cp))  # healed by another invite
    host.heartbeat()


def test_heartbeats_of_one_address_that_wait_are_counted(cp: ControlPlane, join: Join) -> None:
    """More than 16 at one time are sent away; those of others are not."""
    flood, honest = join(), join()
    tool = flood.tool

    def beat() -> str:
        request = pb.HeartbeatRequest(session=secrets.token_bytes(32), seq=1, boot_id=BOOT_ID)
        target = f"{flood.address}:{cp.grpc_port}"
        try:
            tool.call(target, "Heartbeat", request.SerializeToString())
        except RemoteError as error:
            return str(dict(error.trailing_metadata())["openinfra-reason"])
        return ""

    with psycopg.connect(cp.postgres.dsn(cp.database)) as connection:
        connection.execute("LOCK TABLE liveness")  # the batch waits
        with ThreadPoolExecutor(40) as workers:
            first = workers.submit(honest.heartbeat)
            time.sleep(0.5)
            calls = [workers.submit(beat) for _ in range(31)]  # one connection takes 32
            wait_for("refusals", lambda: sum(call.done() for call in calls) >= 15)
            connection.rollback()
            first.result()
            got = collections.Counter(call.result() for call in calls)
    assert set(got) == {"UNKNOWN_SESSION", "TRY_LATER"}
    assert got["TRY_LATER"] >= 15
    flood.heartbeat()
    honest.heartbeat()


def test_a_reservation_that_does_not_match_is_released(cp: ControlPlane, make_client: Join) -> None:
    for matches in (True, False):
        client = make_client()
        reserved = client.address if matches else make_client().address
        token = mint(cp, wg_ip=reserved)
        done = cp.command("invite", f"--wg-ip={reserved}")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"another open invite holds the address {reserved}" in done.stderr
        client.host_id = client.register(token).host_id
        assert get_host(cp, client)["address"] == client.address
        held = "SELECT 1 FROM invites WHERE wg_ip_held AND wg_ip = %s"
        assert cp.query(held, reserved) == []


# A lost identity


def test_a_fresh_invite_heals_a_lost_identity(
    cp: ControlPlane, join: Join, make_client: Join
) -> None:
    old = join()
    before = get_host(cp, old)
    cp.postgres.execute(
        cp.database, "UPDATE hosts SET ever_assigned = true WHERE host_id = %s", old.host_id
    )
    new = make_client(old.address, old.wg_key)
    token = mint(cp)
    reply = new.register(token)
    new.host_id = reply.host_id
    assert new.host_id == old.host_id
    check_refused("SESSION_SUPERSEDED", old.heartbeat)
    check_refused("UNKNOWN_HOST", old.resume)
    assert new.heartbeat().standing.assignable is True
    assert new.register(token) == new.register(token)
    after = get_host(cp, new)
    kept = ("host_no", "created_at", "payout_pubkey", "namespace", "address", "wg_pubkey", "status")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    assert (after["ever_assigned"], after["invite_id"]) == (True, reply.invite_id)
    assert [action for action, _ in list_audit(cp, new)] == ["host.rekey"]
    new.resume()
    new.heartbeat()


def test_a_healed_host_keeps_the_wallet_that_it_worked_for(
    cp: ControlPlane, join: Join, make_client: Join
) -> None:
    old = join()
    cp.postgres.execute(
        cp.database, "UPDATE hosts SET ever_assigned = true WHERE host_id = %s", old.host_id
    )
    new = make_client(old.address, old.wg_key)
    new.host_id = new.register(mint(cp), payout_pubkey=OTHER_WALLET).host_id
    found = get_host(cp, new)
    assert (found["payout_pubkey"], found["requested_payout_pubkey"]) == (WALLET, OTHER_WALLET)


def test_a_healing_invite_approves_the_wallet_that_it_is_redeemed_with(
    cp: ControlPlane, join: Join, make_client: Join
) -> None:
    """The recovery of the document with `cp_server.py invite` as it is: nothing else to do."""
    old, wallet = join(), OTHER_WALLET
    old.resume(payout_pubkey=wallet)
    assert old.heartbeat().standing.assignable is False
    done = cp.command("invite")
    new = make_client(old.address, old.wg_key)
    new.register(done.stdout.strip(), payout_pubkey=wallet)
    assert new.heartbeat().standing.assignable is True


def test_the_token_of_before_heals_nothing(cp: ControlPlane, make_client: Join) -> None:
    old, token = make_client(), mint(cp)
    old.register(token)
    new = make_client(old.address, old.wg_key)
    check_refused("INVITE_USED", new.register, token)
    old.heartbeat()


def test_a_fresh_invite_frees_no_host_from_quarantine(
    cp: ControlPlane, join: Join, make_client: Join
) -> None:
    old = join()
    for _ in range(3):
        old.resume(previous_session=b"")
    check_refused("HOST_QUARANTINED", old.resume, previous_session=b"")
    new, token = make_client(old.address, old.wg_key), mint(cp)
    for _ in range(2):
        check_refused("HOST_QUARANTINED", new.register, token)
    assert get_host(cp, old)["status"] == "quarantined"
    release(cp, old)
    assert new.register(token).host_id == old.host_id
    new.heartbeat()
    check_refused("UNKNOWN_HOST", old.resume)


# Another key on Resume


def test_a_new_key_on_resume_replaces_the_old_one(cp: ControlPlane, join: Join) -> None:
    host, key = join(), new_wg_key()
    before = host.wg_key
    host.resume(wg_pubkey=key)
    assert get_host(cp, host)["wg_pubkey"] == key
    assert list_audit(cp, host) == [("host.wg_key", {"before": before, "after": key})]
    host.heartbeat()
    join(wg_key=before)  # the old one is free again


def test_a_key_of_another_host_is_not_taken_on_resume(cp: ControlPlane, join: Join) -> None:
    host, other = join(), join()
    with unchanged(cp):
        refused = check_refused("KEY_TAKEN", host.resume, wg_pubkey=other.wg_key)
    assert "install_agent.py --new-key" in refused.message
    host.heartbeat()  # the session of before goes on
    host.resume(session=secrets.token_bytes(32))
