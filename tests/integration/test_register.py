"""Register, Resume and heartbeats on the wire, against a real control plane and PostgreSQL."""

from __future__ import annotations

import pytest

from tests.harness import OTHER_WALLET, WALLET, Client, ControlPlane, Refused


def test_an_invite_becomes_an_online_host(cp: ControlPlane) -> None:
    token = cp.mint(payout_pubkey=WALLET)
    with Client(cp) as client:
        reply = client.register(token)
        assert reply.onchain_payout is True
        assert [host["status"] for host in cp.hosts()] == ["pending"]
        beat = client.heartbeat()
    assert beat.standing.assignable is True
    assert cp.query("SELECT host_id::text, status FROM hosts") == [
        {"host_id": reply.host_id, "status": "online"}
    ]
    cp.check_invariants()


def test_a_repeated_register_gets_the_same_host(cp: ControlPlane) -> None:
    token = cp.mint()
    with Client(cp) as client:
        first = client.register(token)
        assert client.register(token).host_id == first.host_id
        client.heartbeat()
    with Client(cp) as thief, pytest.raises(Refused) as refused:
        thief.register(token)
    assert refused.value.reason == "INVITE_USED"
    assert "invite already used" in refused.value.message
    used = cp.query("SELECT detail FROM audit_log WHERE action = 'invite.reuse_refused'")
    assert used[0]["detail"]["host_id"] == first.host_id
    cp.check_invariants()


def test_another_wallet_is_online_but_not_assignable_until_healed(cp: ControlPlane) -> None:
    token = cp.mint(payout_pubkey=WALLET)
    with Client(cp) as client:
        client.register(token, payout_pubkey=OTHER_WALLET)
        standing = client.heartbeat().standing
        assert standing.assignable is False
        assert WALLET in standing.reasons[0]
        assert OTHER_WALLET in standing.reasons[0]
        status, _ = cp.call("POST", f"/api/v1/admin/namespaces/solana:{OTHER_WALLET}/approve")
        assert status == 200
        assert client.heartbeat().standing.assignable is True
    cp.check_invariants()
