"""The agent's API on the wire: invites, wallets, sessions, heartbeats and bad bytes.

Against a real control plane and PostgreSQL, without a tunnel (see test_peer_check.py for that one).
Most tests share one control plane whose hosts are asked for a heartbeat each 30 s.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

import cp_server
from proto import openinfra_pb2 as pb
from tests.harness import (
    BOOT_ID,
    OTHER_WALLET,
    WALLET,
    Client,
    ControlPlane,
    Postgres,
    Refused,
    check_refused,
    facts,
    new_wg_key,
    race,
    serving,
    unchanged,
    wait_for,
)

MESSAGE_BYTES = 65_536  # the largest message that the control plane takes


@pytest.fixture(scope="module")
def cp(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for the tests of this file that leave it as it was."""
    with serving(postgres, tmp_path_factory.mktemp("cp")) as made:
        yield made


@pytest.fixture
def make_client(cp: ControlPlane) -> Iterator[Callable[[], Client]]:
    """Makes clients of the shared control plane, each with an identity of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Client(cp))


@pytest.fixture
def client(make_client: Callable[[], Client]) -> Client:
    """A client that has no host yet."""
    return make_client()


@pytest.fixture
def host(cp: ControlPlane, client: Client) -> Client:
    """A client whose host is registered, its wallet approved, and online."""
    client.register(cp.mint(payout_pubkey=WALLET))
    client.heartbeat(facts=facts())
    return client


def count_hosts(cp: ControlPlane) -> int:
    """How many hosts there are."""
    return int(cp.query("SELECT count(*) AS n FROM hosts")[0]["n"])


def get_host(cp: ControlPlane, client: Client) -> dict[str, Any]:
    """A client's host as the HTTP API shows it."""
    secret = cp_server.sha256(client.host_secret)
    row = cp.query("SELECT host_id FROM hosts WHERE host_secret_sha256 = %s", secret)[0]
    status, found = cp.call("GET", f"/api/v1/admin/hosts/{row['host_id']}")
    assert status == 200, found
    return dict(found)


def change_host(cp: ControlPlane, client: Client, change: str) -> None:
    """Change a client's host row as the superuser."""
    sql = f"UPDATE hosts SET {change} WHERE host_secret_sha256 = %s"  # noqa: S608
    cp.postgres.execute(cp.database, sql, cp_server.sha256(client.host_secret))


def expire(cp: ControlPlane, token: str) -> None:
    """Move an invite two days into the past."""
    sql = "UPDATE invites SET created_at = created_at - interval '2 days',"
    sql += " expires_at = expires_at - interval '2 days' WHERE invite_id = %s"
    cp.postgres.force(cp.database, sql, token.split("_")[1])


def revoke_invite(cp: ControlPlane, token: str) -> int:
    """The HTTP status of taking an invite back."""
    status, _ = cp.call("DELETE", f"/api/v1/admin/host-invites/{token.split('_')[1]}")
    return status


def list_audit(cp: ControlPlane, subject: str) -> list[str]:
    """What was done to a subject, in order."""
    rows = cp.query("SELECT action FROM audit_log WHERE subject = %s ORDER BY audit_id", subject)
    return [row["action"] for row in rows]


# Invites


def test_an_invite_becomes_an_online_host(cp: ControlPlane, client: Client) -> None:
    reply = client.register(cp.mint(payout_pubkey=WALLET))
    assert uuid.UUID(reply.host_id).version == 4
    assert reply.onchain_payout is True
    assert reply.heartbeat_interval_s == 30
    assert reply.standing.status == pb.HOST_STATUS_PENDING
    assert get_host(cp, client)["status"] == "pending"
    beat = client.heartbeat()
    assert beat.standing == pb.Standing(status=pb.HOST_STATUS_ONLINE, assignable=True)
    assert get_host(cp, client)["status"] == "online"  # committed before it was answered


def test_an_unknown_invite_and_a_wrong_secret_get_one_answer(
    cp: ControlPlane, client: Client
) -> None:
    _, invite_id, _ = cp.mint().split("_", 2)
    ids = (invite_id, cp_server.new_public_id())
    tokens = [cp_server.render_token("oi1", text, secrets.token_bytes(32)) for text in ids]
    with unchanged(cp):
        answers = [check_refused("UNKNOWN_INVITE", client.register, token) for token in tokens]
    assert answers[0].message == answers[1].message
    assert answers[0].message.startswith("unknown invite;")


@pytest.mark.parametrize(
    "mistype",
    [
        lambda token: token[:-1],
        lambda token: token + "0",
        lambda token: token + "\n",
        lambda token: token.replace("oi1_", "oi2_"),
        lambda token: token[:30] + ("A" if token[30] != "A" else "B") + token[31:],
        lambda token: token.upper(),
        lambda token: token.replace("_", "-", 1),
        lambda _token: "",
        lambda token: "oi1_" + token.split("_")[1] + "_used",
        lambda token: token * 100,
    ],
)
def test_a_mistyped_token_is_named_and_not_repeated(
    cp: ControlPlane, client: Client, mistype: Callable[[str], str]
) -> None:
    token = cp.mint()
    with unchanged(cp):
        refused = check_refused("BAD_REQUEST", client.register, mistype(token))
    assert "token is incomplete or mistyped" in refused.message
    assert token.split("_", 2)[2] not in refused.message


def test_an_expired_invite(cp: ControlPlane, client: Client) -> None:
    token = cp.mint()
    expire(cp, token)
    with unchanged(cp):
        refused = check_refused("INVITE_EXPIRED", client.register, token)
    assert "expired at" in refused.message


def test_a_revoked_invite(cp: ControlPlane, client: Client) -> None:
    token = cp.mint()
    assert revoke_invite(cp, token) == 200
    with unchanged(cp):
        check_refused("INVITE_REVOKED", client.register, token)
    expire(cp, token)
    check_refused("INVITE_REVOKED", client.register, token)


def test_a_used_invite_and_another_secret(
    cp: ControlPlane, make_client: Callable[[], Client]
) -> None:
    token = cp.mint()
    reply, thief = make_client().register(token), make_client()
    hosts = count_hosts(cp)
    refused = check_refused("INVITE_USED", thief.register, token)
    assert "invite already used" in refused.message
    assert reply.host_id not in refused.message
    with unchanged(cp):  # the audit log has it once an hour
        check_refused("INVITE_USED", thief.register, token)
    assert count_hosts(cp) == hosts
    sql = "SELECT detail FROM audit_log WHERE action = 'invite.reuse_refused' AND subject = %s"
    assert cp.query(sql, reply.invite_id)[0]["detail"]["host_id"] == reply.host_id
    expire(cp, token)
    check_refused("INVITE_USED", thief.register, token)


def test_a_repeated_register_gets_the_same_answer(cp: ControlPlane, client: Client) -> None:
    token = cp.mint(payout_pubkey=WALLET)
    first = client.register(token)
    with unchanged(cp):
        assert client.register(token) == first
    expire(cp, token)
    assert client.register(token) == first
    assert revoke_invite(cp, token) == 409  # a redeemed one cannot be taken back
    assert client.register(token) == first
    client.heartbeat()
    again = client.register(token)
    assert (again.host_id, again.standing.status) == (first.host_id, pb.HOST_STATUS_ONLINE)
    client.heartbeat()  # its session goes on


def test_an_invite_bound_to_a_key(cp: ControlPlane, client: Client) -> None:
    key = new_wg_key()
    token = cp.mint(wg_pubkey=key)
    with unchanged(cp):
        check_refused("INVITE_FOR_OTHER_KEY", client.register, token)
        check_refused("INVITE_FOR_OTHER_KEY", client.register, token, wg_pubkey=new_wg_key())
    client.register(token, wg_pubkey=key)
    assert get_host(cp, client)["wg_pubkey"] == key


def test_a_reserved_address_is_held_until_the_invite_is_used(
    cp: ControlPlane, client: Client
) -> None:
    order = {"wg_ip": "10.77.3.4"}
    token = cp.mint(**order)
    assert cp.call("POST", "/api/v1/admin/host-invites", order)[0] == 409
    client.register(token)  # comes from no tunnel, so the reservation does not match
    assert get_host(cp, client)["wg_ip"] is None
    assert revoke_invite(cp, cp.mint(**order)) == 200
    expire(cp, cp.mint(**order))
    cp.mint(**order)


def test_one_invite_and_twenty_racers(cp: ControlPlane, make_client: Callable[[], Client]) -> None:
    token, before = cp.mint(), count_hosts(cp)
    answers = race(*(partial(make_client().register, token) for _ in range(20)))
    assert answers.count("INVITE_USED") == 19
    assert count_hosts(cp) == before + 1


def test_two_invites_that_race_for_one_key(
    cp: ControlPlane, make_client: Callable[[], Client]
) -> None:
    for _ in range(8):
        key, calls = new_wg_key(), [partial(make_client().register, cp.mint()) for _ in range(2)]
        answers = race(*(partial(call, wg_pubkey=key) for call in calls))
        lost = [i for i, answer in enumerate(answers) if answer in ("KEY_TAKEN", "TRY_LATER")]
        assert len(lost) == 1, answers
        check_refused("KEY_TAKEN", calls[lost[0]], wg_pubkey=key)
        calls[lost[0]](wg_pubkey=new_wg_key())  # the invite was not used up


# Impossible fields

BAD_WALLETS = (
    "x",
    "1" * 32,  # all zero: the system program
    WALLET + "1",
    WALLET[:-3],
    WALLET.replace("t", "0"),  # no base58
    "0x52908400098527886E0F7030069857D2E4169EE7",
    " " + WALLET,
    "z" * 44,  # 33 bytes
    "1" * 5000,
)
GOOD_KEY = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
BAD_KEYS = (
    "x",
    GOOD_KEY[:-1],
    GOOD_KEY + "=",
    "*" + GOOD_KEY[1:],
    " " + GOOD_KEY[:-1],
    base64.b64encode(bytes(31)).decode(),
    base64.b64encode(bytes(33)).decode(),
)
BAD_FACTS: tuple[dict[str, Any], ...] = (
    {"hostname": ""},
    {"hostname": "a" * 254},
    {"hostname": "lab\n"},
    {"hostname": "lab\x1b[31m"},
    {"hostname": "läb"},
    {"hostname": "lab\x00"},
    {"arch": "x" * 33},
    {"kernel": "x" * 129},
    {"agent_version": "x" * 65},
    {"agent_version": ""},
    {"memory_bytes": 2**63},
    {"disk_bytes": 2**64 - 1},
    {"cpu_count": 2**16 + 1},
)
BAD_REGISTERS: list[tuple[str, dict[str, Any]]] = [
    *(("payout_pubkey", {"payout_pubkey": wallet}) for wallet in BAD_WALLETS),
    *(("wg_pubkey", {"wg_pubkey": key}) for key in BAD_KEYS),
    *(("host_secret", {"host_secret": bytes(size)}) for size in (0, 31, 33, 4096)),
    *(("session", {"session": bytes(size)}) for size in (0, 31, 33)),
    *((f"facts.{next(iter(bad))}"[:12], {"facts": facts(**bad)}) for bad in BAD_FACTS),
    ("facts", {"facts": None}),
]
BAD_RESUMES: list[tuple[str, dict[str, Any]]] = [
    row for row in BAD_REGISTERS if not row[0].startswith("facts")
]
BAD_HEARTBEATS: list[tuple[str, dict[str, Any]]] = [
    *(("session", {"session": bytes(size)}) for size in (0, 31, 33)),
    *(("seq", {"seq": seq}) for seq in (0, 2**63, 2**64 - 1)),
    *(
        ("boot_id", {"boot_id": text})
        for text in ("", "x", BOOT_ID.upper(), BOOT_ID + "0", BOOT_ID.replace("-", ""))
    ),
    *(("facts", {"facts": facts(**bad)}) for bad in BAD_FACTS),
]


def test_a_register_with_an_impossible_field(cp: ControlPlane, client: Client) -> None:
    token = cp.mint()
    with unchanged(cp):
        for field, bad in BAD_REGISTERS:
            refused = check_refused("BAD_REQUEST", client.register, token, **bad)
            assert field.partition(".")[0] in refused.message, bad
    client.register(token)  # the invite and the identity are as good as before


def test_a_resume_with_an_impossible_field(cp: ControlPlane, host: Client) -> None:
    with unchanged(cp):
        for field, bad in BAD_RESUMES:
            refused = check_refused("BAD_REQUEST", host.resume, **bad)
            assert field in refused.message, bad
    host.heartbeat()


def test_a_heartbeat_with_an_impossible_field(cp: ControlPlane, host: Client) -> None:
    with unchanged(cp):
        for field, bad in BAD_HEARTBEATS:
            refused = check_refused("BAD_REQUEST", host.heartbeat, **bad)
            assert field in refused.message, bad
    host.heartbeat()


def test_a_key_has_one_spelling(cp: ControlPlane, host: Client, client: Client) -> None:
    """Base64 of 32 bytes has two bits to spare; `wg` takes a key only with both of them zero."""
    twin = GOOD_KEY.replace("Dg=", "Dh=")
    assert base64.b64decode(twin) == base64.b64decode(GOOD_KEY)
    check_refused("BAD_REQUEST", host.resume, wg_pubkey=twin)


# Wallets


def test_an_empty_wallet_gets_the_invites(cp: ControlPlane, client: Client) -> None:
    reply = client.register(cp.mint(payout_pubkey=OTHER_WALLET), payout_pubkey="")
    assert reply.onchain_payout is True
    assert client.heartbeat().standing.assignable is True
    assert get_host(cp, client)["namespace"] == f"solana:{OTHER_WALLET}"


def test_no_wallet_at_all(cp: ControlPlane, client: Client) -> None:
    reply = client.register(cp.mint(), payout_pubkey="")
    assert reply.onchain_payout is False
    standing = client.heartbeat().standing
    assert (standing.status, standing.assignable) == (pb.HOST_STATUS_ONLINE, False)
    assert standing.reasons == [
        (
            "it has no payout wallet; set SOLANA_PAYOUT_PUBKEY in /etc/openinfra/agent.env,"
            " then restart openinfra-agent"
        )
    ]
    reply_2 = client.resume(payout_pubkey=WALLET)
    assert reply_2.onchain_payout is True


def new_wallet() -> str:
    """A Solana address that nobody has named yet."""
    value, text = int.from_bytes(b"\x01" + secrets.token_bytes(31), "big"), ""
    while value:
        value, digit = divmod(value, 58)
        text = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[digit] + text
    return text


def is_approved(cp: ControlPlane, wallet: str) -> bool:
    """Whether a wallet's namespace is approved."""
    sql = "SELECT approved_at FROM namespaces WHERE namespace = %s"
    return bool(cp.query(sql, f"solana:{wallet}")[0]["approved_at"])


def test_another_wallet_is_online_but_not_assignable_until_approved(
    cp: ControlPlane, client: Client
) -> None:
    wallet, other = new_wallet(), new_wallet()
    client.register(cp.mint(payout_pubkey=wallet), payout_pubkey=other)
    standing = client.heartbeat().standing
    assert (standing.status, standing.assignable) == (pb.HOST_STATUS_ONLINE, False)
    assert wallet in standing.reasons[0]
    assert other in standing.reasons[0]
    assert get_host(cp, client)["reasons"] == list(standing.reasons)
    assert not is_approved(cp, other)
    path = f"/api/v1/admin/namespaces/solana:{other}/approve"
    assert [cp.call("POST", path)[0] for _ in range(2)] == [200, 200]
    assert client.heartbeat().standing.assignable is True
    assert list_audit(cp, f"solana:{other}") == ["namespace.approve"]


def test_the_invite_approves_the_first_wallet_when_it_says_so(
    cp: ControlPlane, make_client: Callable[[], Client]
) -> None:
    for approve in (True, False):
        wallet, client = new_wallet(), make_client()
        client.register(cp.mint(approve_first_wallet=approve), payout_pubkey=wallet)
        assert client.heartbeat().standing.assignable is approve
        assert is_approved(cp, wallet) is approve


def test_the_invite_approves_the_first_wallet_of_a_later_resume(
    cp: ControlPlane, client: Client
) -> None:
    wallets = [new_wallet(), new_wallet()]
    client.register(cp.mint(approve_first_wallet=True), payout_pubkey="")
    for wallet in wallets:
        client.resume(payout_pubkey=wallet)
    assert [is_approved(cp, wallet) for wallet in wallets] == [True, False]


def test_the_invite_approves_no_second_wallet(cp: ControlPlane, client: Client) -> None:
    wallets, token = [new_wallet(), new_wallet()], cp.mint(approve_first_wallet=True)
    for wallet in wallets:
        client.register(token, payout_pubkey=wallet)
    assert [is_approved(cp, wallet) for wallet in wallets] == [True, False]
    assert client.heartbeat().standing.assignable is False


def test_a_mended_wallet_moves_the_host(cp: ControlPlane, client: Client) -> None:
    wallet, wrong = new_wallet(), new_wallet()
    reply = client.register(cp.mint(payout_pubkey=wallet), payout_pubkey=wrong)
    assert client.heartbeat().standing.assignable is False
    client.resume(payout_pubkey=wallet)
    assert client.heartbeat().standing.assignable is True
    assert get_host(cp, client)["namespace"] == f"solana:{wallet}"
    sql = "SELECT detail FROM audit_log WHERE action = 'host.wallet' AND subject = %s"
    detail = {"before": wrong, "after": wallet, "refused": None}
    assert cp.query(sql, reply.host_id) == [{"detail": detail}]


def test_a_wallet_is_fixed_once_it_has_worked(cp: ControlPlane, client: Client) -> None:
    wallet, other = new_wallet(), new_wallet()
    client.register(cp.mint(payout_pubkey=wallet), payout_pubkey=wallet)
    change_host(cp, client, "ever_assigned = true")
    client.resume(payout_pubkey=other)
    standing = client.heartbeat().standing
    assert standing.assignable is False
    assert wallet in standing.reasons[0]
    assert other in standing.reasons[0]
    found = get_host(cp, client)
    assert (found["payout_pubkey"], found["requested_payout_pubkey"]) == (wallet, other)
    client.resume(payout_pubkey="")  # an empty one asks for nothing
    assert client.heartbeat().standing.assignable is True


# Sessions


def test_a_resume_goes_on_with_a_new_session(cp: ControlPlane, host: Client) -> None:
    before, old = get_host(cp, host), host.session
    reply = host.resume()
    assert reply.host_id == before["host_id"]
    assert reply.standing.status == pb.HOST_STATUS_ONLINE
    assert (reply.onchain_payout, reply.heartbeat_interval_s) == (True, 30)
    host.heartbeat()
    check_refused("SESSION_SUPERSEDED", host.heartbeat, session=old)
    sql = "SELECT opened_by FROM sessions WHERE session_sha256 = %s"
    assert cp.query(sql, cp_server.hash_session(host.session)) == [{"opened_by": "resume"}]
    assert list_audit(cp, before["host_id"]) == ["host.register"]


def test_a_repeated_resume_changes_nothing(cp: ControlPlane, host: Client) -> None:
    previous = host.session
    first = host.resume()
    with unchanged(cp):
        again = host.resume(session=host.session, previous_session=previous)
        stranger = host.resume(session=host.session, previous_session=bytes(32))
    assert first == again == stranger
    host.heartbeat()


def test_an_ended_session_cannot_be_opened_again(cp: ControlPlane, host: Client) -> None:
    old = host.session
    host.resume()
    with unchanged(cp):
        check_refused("SESSION_SUPERSEDED", host.resume, session=old, previous_session=host.session)
        check_refused("SESSION_SUPERSEDED", host.resume, session=old, previous_session=b"")
    host.heartbeat()


def test_sessions_and_secrets_of_nobody_or_of_another_host(
    cp: ControlPlane, host: Client, make_client: Callable[[], Client]
) -> None:
    other, nobody, token = make_client(), make_client(), cp.mint()
    other.register(cp.mint(payout_pubkey=WALLET))
    with unchanged(cp):
        check_refused("UNKNOWN_HOST", nobody.resume)
        check_refused("UNKNOWN_SESSION", nobody.heartbeat)
        check_refused("UNKNOWN_SESSION", nobody.heartbeat, session=host.host_secret)
        check_refused("UNKNOWN_HOST", nobody.resume, host_secret=host.session)
        check_refused("BAD_REQUEST", other.resume, session=host.session)
        check_refused("BAD_REQUEST", nobody.register, token, session=host.session)
    host.heartbeat()


WALLETS = (  # payout_pubkey, whether its namespace is approved, requested_payout_pubkey
    [(None, False, asked) for asked in (None, WALLET)]
    + [(WALLET, True, asked) for asked in (None, OTHER_WALLET)]
    + [(OTHER_WALLET, False, asked) for asked in (None, WALLET)]
)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(("wallet", "approved", "asked"), WALLETS)
def test_a_heartbeat_says_what_the_api_says(
    cp: ControlPlane,
    host: Client,
    wallet: str | None,
    approved: bool,
    asked: str | None,
    paused: bool,
) -> None:
    """The heartbeat's short way, for a host with no reasons, is taken for no other."""
    namespace = wallet and f"solana:{wallet}"
    if namespace:
        sql = "INSERT INTO namespaces (namespace) VALUES (%s) ON CONFLICT DO NOTHING"
        cp.postgres.execute(cp.database, sql, namespace)
        sql = "UPDATE namespaces SET approved_at = CASE WHEN %s THEN now() END,"
        sql += " approved_by = CASE WHEN %s THEN 'cli:test' END WHERE namespace = %s"
        cp.postgres.execute(cp.database, sql, approved, approved, namespace)
    sql = "UPDATE hosts SET payout_pubkey = %s, namespace = %s, requested_payout_pubkey = %s"
    sql += " WHERE host_secret_sha256 = %s"
    values = (wallet, namespace, asked, cp_server.sha256(host.host_secret))
    cp.postgres.execute(cp.database, sql, *values)

    standing = host.heartbeat(paused=paused).standing
    found = get_host(cp, host)
    assert list(standing.reasons) == found["reasons"]
    assert standing.assignable == found["assignable"] == (approved and not asked and not paused)
    assert pb.HostStatus.Name(standing.status) == f"HOST_STATUS_{found['status'].upper()}"


def take_over(host: Client) -> None:
    """Resume as a copy does, which does not know the live session."""
    host.resume(previous_session=secrets.token_bytes(32))


def test_the_fourth_takeover_in_ten_minutes_quarantines(cp: ControlPlane, host: Client) -> None:
    host_id = get_host(cp, host)["host_id"]
    for _ in range(3):
        old = host.session
        take_over(host)
        check_refused("SESSION_SUPERSEDED", host.heartbeat, session=old)
        host.heartbeat()
    refused = check_refused("HOST_QUARANTINED", take_over, host)
    assert "release" in refused.message
    with unchanged(cp):
        check_refused("HOST_QUARANTINED", host.heartbeat)
        check_refused("HOST_QUARANTINED", host.resume)
    found = get_host(cp, host)
    assert (found["status"], found["assignable"]) == ("quarantined", False)
    assert "two machines" in found["reasons"][0]
    takeovers = ["host.register", *["host.takeover"] * 3, "host.quarantine"]
    assert list_audit(cp, host_id) == takeovers
    path = f"/api/v1/admin/hosts/{host_id}/release"
    assert cp.call("POST", path)[0] == 200
    assert cp.call("POST", path)[0] == 409
    check_refused("UNKNOWN_SESSION", host.heartbeat)  # so the agent resumes by itself
    host.resume()
    assert host.heartbeat().standing.status == pb.HOST_STATUS_ONLINE
    for _ in range(3):  # those before the release do not count
        take_over(host)
    check_refused("HOST_QUARANTINED", take_over, host)
    assert list_audit(cp, host_id)[5] == "host.release"


def test_old_takeovers_do_not_count(cp: ControlPlane, host: Client) -> None:
    for _ in range(3):
        take_over(host)
    sql = "UPDATE sessions SET started_at = started_at - interval '601 s' WHERE host_no ="
    sql += " (SELECT host_no FROM hosts WHERE host_secret_sha256 = %s)"
    cp.postgres.force(cp.database, sql, cp_server.sha256(host.host_secret))
    take_over(host)
    host.heartbeat()


def test_an_ended_session_that_comes_back_is_no_takeover(cp: ControlPlane, host: Client) -> None:
    """The losing copy sends its last Resume again, since it never saw the answer."""
    old = host.session
    for _ in range(3):
        take_over(host)
    with unchanged(cp):
        check_refused("SESSION_SUPERSEDED", host.resume, session=old, previous_session=b"")
    host.heartbeat()


def test_a_host_opens_thirty_sessions_in_ten_minutes(cp: ControlPlane, host: Client) -> None:
    """Each is a row for good; a crash loop is sent to wait, and goes on when it has waited."""
    for _ in range(29):  # the first was opened by Register
        host.resume()
    with unchanged(cp):
        refused = check_refused("TRY_LATER", host.resume)
        assert "opened 30 sessions" in refused.message
    host.heartbeat()  # the session that is live goes on
    sql = "UPDATE sessions SET started_at = started_at - interval '601 s' WHERE host_no ="
    sql += " (SELECT host_no FROM hosts WHERE host_secret_sha256 = %s)"
    cp.postgres.force(cp.database, sql, cp_server.sha256(host.host_secret))
    host.resume()
    host.heartbeat()


def test_a_host_changes_its_wallet_fifty_times_a_day(cp: ControlPlane, host: Client) -> None:
    """Each wallet is a namespace that nobody can delete."""
    sql = "INSERT INTO audit_log (actor, action, subject, detail)"
    sql += " SELECT 'x', 'host.wallet', host_id::text, '{}' FROM hosts, generate_series(1, 49)"
    sql += " WHERE host_secret_sha256 = %s"
    cp.postgres.execute(cp.database, sql, cp_server.sha256(host.host_secret))
    host.resume(payout_pubkey=new_wallet())  # the fiftieth
    for change in ({"payout_pubkey": new_wallet()}, {"wg_pubkey": new_wg_key()}):
        with unchanged(cp):
            refused = check_refused("TRY_LATER", host.resume, **change)
            assert "50 times in a day" in refused.message
    wallet = get_host(cp, host)["payout_pubkey"]
    host.resume(payout_pubkey=wallet)  # without a change it goes on
    host.heartbeat()


def test_a_key_that_an_open_invite_is_kept_for(
    cp: ControlPlane, host: Client, make_client: Callable[[], Client]
) -> None:
    key = new_wg_key()
    token = cp.mint(wg_pubkey=key)
    thief = make_client()
    other = cp.mint()
    for call in (
        partial(thief.register, other, wg_pubkey=key),
        partial(host.resume, wg_pubkey=key),
    ):
        with unchanged(cp):
            refused = check_refused("KEY_TAKEN", call)
            assert "open invite" in refused.message
    owner = make_client()
    owner.register(token, wg_pubkey=key)
    with unchanged(cp):  # the answer was lost, and the key is another one now
        check_refused("INVITE_FOR_OTHER_KEY", owner.register, token, wg_pubkey=new_wg_key())
    owner.register(token, wg_pubkey=key)
    twice = new_wg_key()  # the operator minted again, since the first token got lost
    tokens = [cp.mint(wg_pubkey=twice) for _ in range(2)]
    make_client().register(tokens[1], wg_pubkey=twice)
    free = new_wg_key()
    assert revoke_invite(cp, cp.mint(wg_pubkey=free)) == 200
    host.resume(wg_pubkey=free)  # an invite that was taken back keeps nothing
    expired = new_wg_key()
    expire(cp, cp.mint(wg_pubkey=expired))
    host.resume(wg_pubkey=expired)


def test_sessions_that_ended_long_ago_are_forgotten(make_cp: Callable[..., ControlPlane]) -> None:
    """90 days after their end; before that an old copy is still told that it was superseded."""
    cp = make_cp("--heartbeat-s=0.5")
    with Client(cp) as client:
        client.register(cp.mint())
        oldest = client.session
        client.resume()
        old = client.session
        client.resume()
        sql = "UPDATE sessions SET ended_at = now() - %s::interval WHERE session_sha256 = %s"
        cp.postgres.force(cp.database, sql, "91 days", cp_server.hash_session(oldest))
        cp.postgres.force(cp.database, sql, "89 days", cp_server.hash_session(old))
        assert cp.stop() == 0
        cp.start()

        def left() -> int:
            return len(cp.query("SELECT 1 FROM sessions"))

        wait_for("the oldest is gone", lambda: left() == 2)
        check_refused("SESSION_SUPERSEDED", client.resume, session=old)
        client.resume()
        client.heartbeat()
    sql = "SELECT prune_sessions(1000)"
    with psycopg.connect(cp.postgres.dsn(cp.database, "openinfra")) as connection:
        connection.execute(sql)  # whatever the role asks for: no younger one goes
    assert left() == 3
    cp.check_invariants()


def test_takeovers_that_race_quarantine_once(cp: ControlPlane, host: Client) -> None:
    host_id = get_host(cp, host)["host_id"]
    race(*(partial(take_over, host) for _ in range(12)))
    found = list_audit(cp, host_id)
    assert found == ["host.register", *["host.takeover"] * 3, "host.quarantine"]


def test_a_repeated_register_with_another_session_is_a_takeover(
    cp: ControlPlane, client: Client
) -> None:
    token = cp.mint(payout_pubkey=WALLET)
    host_id = client.register(token).host_id
    client.heartbeat()
    for _ in range(3):
        client.register(token, session=secrets.token_bytes(32))
    check_refused("HOST_QUARANTINED", client.register, token, session=secrets.token_bytes(32))
    assert list_audit(cp, host_id) == [
        "host.register",
        *["host.takeover"] * 3,
        "host.quarantine",
    ]


def test_a_quarantined_host_cannot_register_again(cp: ControlPlane, client: Client) -> None:
    token = cp.mint(payout_pubkey=WALLET)
    client.register(token)
    for _ in range(3):
        take_over(client)
    check_refused("HOST_QUARANTINED", take_over, client)
    with unchanged(cp):
        check_refused("HOST_QUARANTINED", client.register, token)
        check_refused("HOST_QUARANTINED", client.register, token, session=secrets.token_bytes(32))


def test_a_revoked_host_gets_in_nowhere(cp: ControlPlane, client: Client) -> None:
    key = new_wg_key()
    token = cp.mint(payout_pubkey=WALLET)
    host_id = client.register(token, wg_pubkey=key).host_id
    client.heartbeat()
    path, fresh = f"/api/v1/admin/hosts/{host_id}/revoke", cp.mint()
    assert [cp.call("POST", path)[0] for _ in range(2)] == [200, 200]
    assert list_audit(cp, host_id) == ["host.register", "host.revoke"]
    with unchanged(cp):
        check_refused("HOST_REVOKED", client.heartbeat)
        check_refused("HOST_REVOKED", client.heartbeat, facts=facts(hostname="other"))
        check_refused("HOST_REVOKED", client.resume)
        check_refused("HOST_REVOKED", client.register, token)
        check_refused("HOST_REVOKED", client.register, fresh)
        with Client(cp) as other:
            check_refused("KEY_TAKEN", other.register, fresh, wg_pubkey=key)
        assert cp.call("POST", f"/api/v1/admin/hosts/{host_id}/release")[0] == 409
    assert "revoked" in get_host(cp, client)["reasons"][0]


# Heartbeats


def test_facts_are_stored_when_they_change(cp: ControlPlane, host: Client) -> None:
    new = {
        "hostname": "attic",
        "arch": "aarch64",
        "kernel": "6.12.1",
        "agent_version": "0.2.0",
        "cpu_count": 65_536,
        "memory_bytes": 2**63 - 1,
        "disk_bytes": 1,
        "disk_encrypted": False,
    }
    host.heartbeat(facts=facts(**new))
    assert get_host(cp, host).items() >= new.items()
    host.heartbeat()
    assert get_host(cp, host).items() >= new.items()


def test_paused_and_unpaused(cp: ControlPlane, host: Client) -> None:
    change_host(cp, host, "status_at = now() - interval '3 days'")
    standing = host.heartbeat(paused=True).standing
    found = get_host(cp, host)
    assert (found["status"], found["assignable"]) == ("paused", False)
    assert (standing.status, standing.assignable) == (pb.HOST_STATUS_PAUSED, False)
    since = found["status_at"][:16].replace("T", " ")
    assert standing.reasons == [f"its provider paused it at {since} UTC; only they can unpause it"]
    assert host.heartbeat().standing.assignable is True
    assert get_host(cp, host)["status"] == "online"


def test_one_session_from_two_addresses_in_one_batch(cp: ControlPlane, client: Client) -> None:
    """Where addresses do not count (pilot: 127.0.0.1 and ::1), each gets the same answer."""
    client.register(cp.mint(), payout_pubkey=new_wallet())  # not approved: it has reasons
    request = pb.HeartbeatRequest(session=client.session, seq=1, boot_id=BOOT_ID)
    beats = [cp_server.parse_heartbeat(request, peer, 1000) for peer in ("127.0.0.1", "::1")]
    got, _ = asyncio.run(
        cp_server.with_database(
            cp.dsn_file, lambda db: cp_server.record_heartbeats(db, beats, False)
        )
    )
    first, second = got.values()
    assert isinstance(first, cp_server.Accepted)
    assert first == second
    assert first.standing.reasons


def test_facts_of_a_refused_heartbeat_are_not_stored(
    cp: ControlPlane, host: Client, make_client: Callable[[], Client]
) -> None:
    """In one batch with an accepted one, and with a session that nobody has."""
    old = host.session
    host.resume()
    copy, stranger = make_client(), make_client()
    copy.session = old
    before = get_host(cp, host)
    got = race(
        partial(copy.heartbeat, facts=facts(hostname="stolen")),
        partial(stranger.heartbeat, facts=facts(hostname="stranger")),
        host.heartbeat,
    )
    assert got[:2] == ["SESSION_SUPERSEDED", "UNKNOWN_SESSION"]
    after = get_host(cp, host)
    assert (after["hostname"], after["status"]) == (before["hostname"], "online")


def test_a_repeated_or_older_number_is_accepted(cp: ControlPlane, host: Client) -> None:
    boot_id = str(uuid.uuid4())
    for seq in (7, 7, 3):
        assert host.heartbeat(seq=seq, boot_id=boot_id).standing.assignable is True
    sql = "SELECT l.boot_id::text FROM liveness l JOIN hosts USING (host_no)"
    sql += " WHERE host_secret_sha256 = %s"
    assert cp.query(sql, cp_server.sha256(host.host_secret)) == [{"boot_id": boot_id}]


def test_one_heartbeat_twice_in_one_batch_gets_two_answers(cp: ControlPlane, host: Client) -> None:
    beat = partial(host.heartbeat, seq=9)
    answers = race(*[beat] * 5, partial(host.heartbeat, seq=9, facts=facts(hostname="cellar")))
    standings = [reply.standing for reply in answers if isinstance(reply, pb.HeartbeatReply)]
    assert standings == [pb.Standing(status=pb.HOST_STATUS_ONLINE, assignable=True)] * 6
    assert get_host(cp, host)["hostname"] == "cellar"  # whichever of them came last


def test_three_hundred_heartbeats_at_once_each_get_their_own_answer(
    cp: ControlPlane, make_client: Callable[[], Client]
) -> None:
    """Every third host is paused and every third one unapproved, so that answers can be told."""
    clients = [make_client() for _ in range(50)]
    wallets = [new_wallet() if number % 3 == 1 else WALLET for number in range(50)]
    expected = [("", wallets[number], "paused")[number % 3] for number in range(50)]

    def join(number: int) -> None:
        clients[number].register(cp.mint(payout_pubkey=WALLET), payout_pubkey=wallets[number])
        clients[number].heartbeat(paused=number % 3 == 2)

    with ThreadPoolExecutor(8) as workers:
        list(workers.map(join, range(50)))
    numbers = [number for number in range(50) for _ in range(6)]
    calls = [partial(clients[number].heartbeat, paused=number % 3 == 2) for number in numbers]
    for number, reply in zip(numbers, race(*calls), strict=True):
        assert isinstance(reply, pb.HeartbeatReply), reply
        assert expected[number] in " ".join(reply.standing.reasons)
        assert reply.standing.assignable is (number % 3 == 0)


def test_the_next_heartbeat_is_asked_for_with_jitter(cp: ControlPlane, host: Client) -> None:
    asked = [host.heartbeat().next_heartbeat_ms for _ in range(25)]
    assert all(27_000 <= ms <= 33_000 for ms in asked), asked
    assert len(set(asked)) > 20
    assert max(asked) - min(asked) > 2_000  # fails once in about 10^7 runs
    assert round(get_host(cp, host)["heartbeat_interval_s"] * 1000) == asked[-1]


def test_acknowledged_is_committed(make_cp: Callable[..., ControlPlane]) -> None:
    cp = make_cp()
    sql = "SELECT last_heartbeat_at FROM liveness"
    with Client(cp) as client:
        client.register(cp.mint())
        for _ in range(3):
            before = cp.query(sql)
            client.heartbeat()
            cp.stop(signal.SIGKILL)
            assert cp.query(sql) != before
            cp.start()
    assert [row["opened_by"] for row in cp.query("SELECT opened_by FROM sessions")] == ["register"]
    cp.check_invariants()


# Online and offline: a control plane that asks for a heartbeat each 0.5 s

INTERVAL_S = 0.5
OFFLINE_S = 3 * INTERVAL_S


def count_status(cp: ControlPlane, status: str) -> int:
    """How many hosts have this status."""
    return int(cp.query("SELECT count(*) AS n FROM hosts WHERE status = %s", status)[0]["n"])


def beat_until_accepted(client: Client) -> None:
    """Heartbeats as an agent sends them while the control plane cannot take them."""

    def accepted() -> bool:
        try:
            client.heartbeat()
        except Refused as refused:
            if refused.status is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    wait_for("a heartbeat is accepted", accepted)


@pytest.fixture
def quick(make_cp: Callable[..., ControlPlane]) -> ControlPlane:
    """A control plane of its own that asks for a heartbeat each 0.5 s."""
    return make_cp(f"--heartbeat-s={INTERVAL_S}")


def test_offline_after_three_intervals_and_online_again(quick: ControlPlane) -> None:
    with Client(quick) as client, Client(quick) as pending, Client(quick) as paused:
        for each in (client, pending, paused):
            each.register(quick.mint(payout_pubkey=WALLET))
        client.heartbeat()
        paused.heartbeat(paused=True)
        began = time.monotonic()
        wait_for("offline", lambda: count_status(quick, "offline") == 2, 4)
        # jitter 10 % either way, a sweep each interval
        assert 0.9 * OFFLINE_S - 0.1 <= time.monotonic() - began <= 1.1 * OFFLINE_S + 1.2
        found = get_host(quick, client)
        assert (found["status"], found["assignable"]) == ("offline", False)
        assert "no heartbeat since" in found["reasons"][0]
        assert get_host(quick, pending)["status"] == "pending"
        assert client.heartbeat().standing.assignable is True
        assert get_host(quick, client)["status"] == "online"
        assert "INFO host offline" in quick.log
    quick.check_invariants()


def check_silence_forgiven(cp: ControlPlane, client: Client) -> None:
    """From now on nobody is marked offline for three intervals; then who is silent, not `client`.

    The client goes on with its session: nobody has to resume.
    """
    back = time.monotonic()
    while time.monotonic() < back + 0.9 * OFFLINE_S - 0.2:
        assert count_status(cp, "offline") == 0
        beat_until_accepted(client)
        time.sleep(0.05)
    left = 1.1 * OFFLINE_S + 1.5

    def is_silent_one_offline() -> bool:
        client.heartbeat()
        return count_status(cp, "offline") == 1

    wait_for("offline", is_silent_one_offline, left)
    assert get_host(cp, client)["status"] == "online"
    assert len(cp.query("SELECT 1 FROM sessions")) == 2
    cp.check_invariants()


def test_a_control_plane_that_was_down_marks_nobody_offline(quick: ControlPlane) -> None:
    with Client(quick) as client, Client(quick) as silent:
        for each in (client, silent):
            each.register(quick.mint(payout_pubkey=WALLET))
            each.heartbeat()
        quick.stop(signal.SIGKILL)
        time.sleep(1.3 * OFFLINE_S)
        quick.start()
        check_silence_forgiven(quick, client)


def test_a_postgresql_that_was_down_marks_nobody_offline(
    spare_postgres: Postgres, tmp_path: Path
) -> None:
    flag = f"--heartbeat-s={INTERVAL_S}"
    with serving(spare_postgres, tmp_path / "cp", flag) as cp, Client(cp) as client:
        with Client(cp) as silent:
            for each in (client, silent):
                each.register(cp.mint(payout_pubkey=WALLET))
                each.heartbeat()
        spare_postgres.stop()
        refused = check_refused("TRY_LATER", client.heartbeat)
        assert "database" in refused.message
        spare_postgres.start()
        check_silence_forgiven(cp, client)


def test_heartbeats_behind_others_hear_that_the_database_is_away(
    spare_postgres: Postgres, tmp_path: Path
) -> None:
    """Each batch and each sweep waits for a connection; not one after the other."""
    flag = f"--heartbeat-s={INTERVAL_S}"
    with serving(spare_postgres, tmp_path / "cp", flag) as cp, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(cp)) for _ in range(3)]
        for client in clients:
            client.register(cp.mint(payout_pubkey=WALLET))
        spare_postgres.stop()

        def beat(number: int) -> Refused:
            time.sleep(number * INTERVAL_S)
            return check_refused("TRY_LATER", clients[number].heartbeat)

        with ThreadPoolExecutor(len(clients)) as workers:
            for refused in workers.map(beat, range(len(clients))):
                assert "database" in refused.message
        spare_postgres.start()


def test_a_control_plane_that_stood_still_marks_nobody_offline(quick: ControlPlane) -> None:
    """As after a suspend of the machine, or a disk that hung."""
    with Client(quick) as client, Client(quick) as silent:
        for each in (client, silent):
            each.register(quick.mint(payout_pubkey=WALLET))
            each.heartbeat()
        assert quick.process
        quick.process.child.send_signal(signal.SIGSTOP)
        time.sleep(1.3 * OFFLINE_S)
        quick.process.child.send_signal(signal.SIGCONT)
        check_silence_forgiven(quick, client)


# Bad bytes


def send_bytes(client: Client, method: str, raw: bytes) -> Refused:
    """How a call with these bytes is refused."""
    call: Any = client.channel.unary_unary(method)
    with pytest.raises(grpc.RpcError) as error:
        call(raw, timeout=10)
    return Refused(error.value)


METHODS = ("Register", "Resume", "Heartbeat", "ReadEarnings")
BAD_BYTES = (
    b"",
    b"\xff" * 40,
    b"\x0a\xff\xff\xff\xff\x0f",  # a string of 4 GB
    b"\x0a\x02\xc3\x28",  # no UTF-8
    b"\x22\x02\xc3\x28",
    b"\x32" + b"\x02\x0a" * 30_000,
    b"\x0b" * 20_000,  # groups that never end
    secrets.token_bytes(60_000),
    bytes(MESSAGE_BYTES - 16),
)


def test_bytes_that_are_no_request(cp: ControlPlane, host: Client) -> None:
    with unchanged(cp):
        for name in METHODS:
            for raw in BAD_BYTES:
                refused = send_bytes(host, f"/openinfra.v1.AgentApi/{name}", raw)
                assert (refused.reason, refused.status.name) == ("BAD_REQUEST", "INVALID_ARGUMENT")
    host.heartbeat()
    assert "Traceback" not in cp.log
    assert "call failed" not in cp.log


def test_a_request_with_a_field_of_a_later_version_is_taken(cp: ControlPlane, host: Client) -> None:
    request = pb.HeartbeatRequest(session=host.session, seq=2, boot_id=BOOT_ID)
    later = b"\x7a\x04\x08\x01\x10\x02" + b"\xa2\x06\x03new"  # fields 15 and 100
    call: Any = host.channel.unary_unary("/openinfra.v1.AgentApi/Heartbeat")
    reply = pb.HeartbeatReply.FromString(call(request.SerializeToString() + later, timeout=10))
    assert reply.standing.assignable is True


def test_a_message_that_is_too_large(cp: ControlPlane, host: Client) -> None:
    with unchanged(cp):
        for name in METHODS:
            refused = send_bytes(host, f"/openinfra.v1.AgentApi/{name}", bytes(70_000))
            assert refused.status == grpc.StatusCode.RESOURCE_EXHAUSTED
    host.heartbeat()


def test_an_unknown_method(cp: ControlPlane, host: Client) -> None:
    for method in ("/openinfra.v1.AgentApi/Leave", "/openinfra.v2.AgentApi/Register", "/x"):
        refused = send_bytes(host, method, b"")
        assert refused.status == grpc.StatusCode.UNIMPLEMENTED
    host.heartbeat()


# Secrets


def dump(cp: ControlPlane) -> str:
    """The whole database as text."""
    binaries = (cp.postgres.binaries / "postgres").resolve().parent
    argv = [str(binaries / "pg_dump"), "--dbname", cp.postgres.dsn(cp.database)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout


def spell(secret: bytes) -> list[str]:
    """How a secret could stand in a text."""
    plain = base64.b64encode(secret).decode().rstrip("=")
    return [secret.hex(), plain, cp_server.b64url(secret), repr(secret)[2:-1], secret.hex(" ")]


def test_no_secret_in_the_log_or_in_the_database(
    cp: ControlPlane, make_client: Callable[[], Client]
) -> None:
    host, thief = make_client(), make_client()
    token, unused = cp.mint(payout_pubkey=WALLET), cp.mint()
    said = [host.register(token)]
    host.heartbeat()
    found = [token, unused, *spell(host.host_secret), *spell(host.session)]
    host.resume()
    refusals = [
        check_refused("INVITE_USED", thief.register, token),
        check_refused("BAD_REQUEST", thief.register, unused, payout_pubkey="x"),
        check_refused("BAD_REQUEST", thief.register, unused[:-1]),
        check_refused("UNKNOWN_HOST", thief.resume),
        check_refused("UNKNOWN_SESSION", thief.heartbeat),
    ]
    for client in (host, thief):
        found += [*spell(client.host_secret), *spell(client.session)]
    for each in (token, unused):
        found += [each.split("_", 2)[2], *spell(cp_server.parse_token("oi1", each).secret)]
    text, log = dump(cp), cp.log
    assert said[0].host_id in text
    assert said[0].host_id in log
    assert [secret for secret in found if secret in text] == []
    assert [secret for secret in found if secret in log] == []
    assert [r for r in refusals if any(secret in r.message for secret in found)] == []
    assert cp.process
    for name in ("cmdline", "environ"):
        known = Path(f"/proc/{cp.process.child.pid}/{name}").read_bytes().decode()
        assert [secret for secret in found if secret in known] == []
