"""What the control plane has to answer and to keep, as plain Python: no SQL, no clock, no network.

Written from the design and from the comments of proto/openinfra.proto. Time is a number of seconds
that only `jump` moves: what one example takes on a real clock is less than DRIFT_S, and `jump`
never ends where that much could change an answer. Where several reasons for a refusal are true and
nothing says which one comes first, each of them is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

HOUR_S = 3600
DAY_S = 24 * HOUR_S
WINDOW_S = 600  # of takeovers and of sessions
TAKEOVERS = 3
SESSIONS = 30
CHANGES = 50  # of wallet and key, in a day
KEPT_S = 90 * DAY_S  # a session that ended
ONLINE_S = (
    81,
    200,
)  # silent for less: still online; for more: offline (three intervals with their jitter)
DRIFT_S = 30


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a Register or Resume says, and where it comes from; empty is None."""

    secret: bytes
    session: bytes
    wallet: str | None
    key: str | None
    address: str | None
    previous: bytes = b""
    hostname: str = "lab"


@dataclasses.dataclass(eq=False)
class Invite:
    """An invite as the operator minted it, and what became of it."""

    invite_id: str
    expires_s: float
    wallet: str | None
    address: str | None
    key: str | None
    approve_first: bool
    revoked: bool = False
    host: Host | None = None

    def state(self, now_s: float) -> str:
        """As the API names it."""
        if self.host:
            return "used"
        if self.revoked:
            return "revoked"
        return "expired" if self.expires_s <= now_s else "open"


@dataclasses.dataclass(eq=False)
class Host:
    """A host; `host_id` is empty until somebody was told it."""

    invite: Invite
    secret: bytes
    address: str | None
    key: str | None
    hostname: str
    host_id: str = ""
    wallet: str | None = None
    requested: str | None = None
    status: str = "pending"
    ever_assigned: bool = False
    heard_s: float = 0
    released: int = -1  # the tick of its last release
    changes: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Session:
    """A session that was opened once."""

    secret: bytes
    host: Host
    opened_s: float
    tick: int  # orders what happens at one time
    takeover: bool
    ended_s: float | None = None

    @property
    def live(self) -> bool:
        """It was not ended yet."""
        return self.ended_s is None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the call must give: the host, or a refusal for one of these reasons."""

    host: Host | None
    reasons: frozenset[str] = frozenset()


def refuse(*reasons: str) -> Answer:
    """A refusal."""
    return Answer(None, frozenset(reasons))


class Model:
    """The fleet as it must be. `tunnel`: calls come from addresses of hosts (--peer-check=wg)."""

    def __init__(self, tunnel: bool) -> None:
        self.tunnel = tunnel
        self.now_s = 0.0
        self.tick = 0
        self.serving_s = 0.0
        self.invites: dict[str, Invite] = {}
        self.hosts: list[Host] = []
        self.sessions: dict[bytes, Session] = {}
        self.namespaces: dict[str, bool] = {}  # wallet: approved

    # The operator

    def mint(self, invite: Invite) -> bool:
        """Keep a new invite; False: another open invite holds its address."""
        if invite.address and any(i.address == invite.address for i in self.open_invites()):
            return False
        if invite.wallet:
            self.namespaces[invite.wallet] = True
        self.invites[invite.invite_id] = invite
        return True

    def open_invites(self, but: Invite | None = None) -> Iterator[Invite]:
        """Those that can still be redeemed."""
        open_ones = (i for i in self.invites.values() if i.state(self.now_s) == "open")
        return (invite for invite in open_ones if invite is not but)

    def revoke_invite(self, invite: Invite) -> bool:
        """Take it back; False: it was redeemed."""
        if invite.host is None:
            invite.revoked = True
        return invite.revoked

    def revoke_host(self, host: Host) -> None:
        """Remove it for good."""
        host.status = "revoked"
        self.end_session(host)

    def release_host(self, host: Host) -> bool:
        """Out of quarantine; False: it is not there."""
        if host.status != "quarantined":
            return False
        self.tick += 1
        host.status, host.released = "offline", self.tick
        return True

    def approve(self, wallet: str) -> bool:
        """Approve a namespace; False: nobody has named it."""
        if wallet in self.namespaces:
            self.namespaces[wallet] = True
        return wallet in self.namespaces

    # Who has what

    def by_secret(self, secret: bytes) -> Host | None:
        """The host that has this secret now, revoked or not."""
        return next((host for host in self.hosts if host.secret == secret), None)

    def by_key(self, key: str | None) -> Host | None:
        """The host that has this WireGuard key, revoked or not."""
        return next((host for host in self.hosts if key and host.key == key), None)

    def by_address(self, address: str | None) -> Host | None:
        """The host at this address; a revoked one has none."""
        there = (host for host in self.hosts if address and host.address == address)
        return next((host for host in there if host.status != "revoked"), None)

    def live_session(self, host: Host) -> Session | None:
        """The one that is live."""
        return next((s for s in self.sessions.values() if s.host is host and s.live), None)

    def end_session(self, host: Host) -> None:
        """End the one that is live."""
        live = self.live_session(host)
        if live:
            live.ended_s = self.now_s

    def is_pinned(self, key: str | None, but: Invite | None = None) -> bool:
        """Another open invite was minted for this key."""
        return bool(key) and any(invite.key == key for invite in self.open_invites(but))

    def is_reserved(self, address: str | None, but: Invite) -> bool:
        """Another open invite holds this address."""
        return bool(address) and any(i.address == address for i in self.open_invites(but))

    def is_assignable(self, host: Host) -> bool:
        """Work may be placed on it."""
        approved = host.wallet is not None and self.namespaces[host.wallet]
        return host.status == "online" and approved and host.requested is None

    # Register

    def register(self, invite: Invite | None, asked: Asked) -> Answer:
        """Redeem an invite; None: the token is unknown or its secret is wrong."""
        if invite is None:
            return refuse("UNKNOWN_INVITE")
        if invite.host is not None:
            return self.register_again(invite, invite.host, asked)
        reasons = set()
        if invite.revoked:
            reasons.add("INVITE_REVOKED")
        elif invite.state(self.now_s) == "expired":
            reasons.add("INVITE_EXPIRED")
        if invite.key not in (None, asked.key):
            reasons.add("INVITE_FOR_OTHER_KEY")
        known = self.by_secret(asked.secret)
        if known and known.status == "revoked":
            reasons.add("HOST_REVOKED")
        host = known or self.lost_identity(asked)
        reasons |= self.claims(invite, host, asked)
        session = self.sessions.get(asked.session)
        if host is None or host.status != "quarantined":  # else it gets no session anyway
            reasons |= self.claims_session(host, session)
        if reasons:
            return refuse(*reasons)
        return self.redeem(invite, host, asked)

    def lost_identity(self, asked: Asked) -> Host | None:
        """The host whose address and key these are: the tunnel has proved the first."""
        host = self.by_address(asked.address)
        return host if host and host.key == asked.key else None

    def claims(self, invite: Invite, host: Host | None, asked: Asked) -> set[str]:
        """Why this host (or a new one) may not have this key and this address."""
        reasons = set()
        owner, neighbour = self.by_key(asked.key), self.by_address(asked.address)
        if owner and (owner is not host or owner.status == "revoked"):
            reasons.add("KEY_TAKEN")
        if neighbour and neighbour is not host:
            reasons.add("ADDRESS_TAKEN")
        if owner is None and invite.key is None and self.is_pinned(asked.key, invite):
            reasons.add("KEY_TAKEN")
        if neighbour is None and self.is_reserved(asked.address, invite):
            reasons.add("ADDRESS_TAKEN")
        return reasons

    def claims_session(self, host: Host | None, session: Session | None) -> set[str]:
        """Why this session cannot be the host's."""
        if session is None or (session.host is host and session.live):
            return set()
        return {"SESSION_SUPERSEDED" if session.host is host else "BAD_REQUEST"}

    def redeem(self, invite: Invite, host: Host | None, asked: Asked) -> Answer:
        """Make a host, or give one that is there this secret, key and address."""
        if host is None:
            host = Host(invite, asked.secret, asked.address, asked.key, asked.hostname)
            self.hosts.append(host)
            host.wallet = asked.wallet or invite.wallet
            self.name_wallet(host.wallet, invite)
        else:
            if host.key not in (None, asked.key):
                host.changes.append(self.now_s)
            host.invite, host.secret = invite, asked.secret
            host.address, host.key = asked.address, asked.key
            self.set_wallet(host, asked.wallet, invite)
        invite.host = host
        if host.status == "quarantined":
            return refuse("HOST_QUARANTINED")
        if asked.session not in self.sessions:
            self.open_session(host, asked.session, takeover=False)
        return Answer(host)

    def register_again(self, invite: Invite, host: Host, asked: Asked) -> Answer:
        """The same request once more, as after a lost reply; or somebody else's.

        A host that another invite has given a new secret is known by that one only.
        """
        if asked.secret != host.secret:
            return refuse("INVITE_USED")
        if invite.key not in (None, asked.key):
            return refuse("INVITE_FOR_OTHER_KEY")
        if host.status == "revoked":
            return refuse("HOST_REVOKED")
        reasons = self.claims(invite, host, asked)
        if asked.address != host.address:
            reasons.add("WRONG_ADDRESS")
        if host.status == "quarantined":
            reasons.add("HOST_QUARANTINED")
        return refuse(*reasons) if reasons else self.claim(host, asked)

    # Resume

    def resume(self, asked: Asked) -> Answer:
        """Open a session for a host that is there."""
        host = self.by_secret(asked.secret)
        if host is None:
            return refuse("UNKNOWN_HOST")
        if host.status == "revoked":
            return refuse("HOST_REVOKED")
        reasons = set()
        if asked.address != host.address:
            reasons.add("WRONG_ADDRESS")
        if host.status == "quarantined":
            reasons.add("HOST_QUARANTINED")
        return refuse(*reasons) if reasons else self.claim(host, asked)

    def claim(self, host: Host, asked: Asked) -> Answer:
        """The session, then wallet and key; all of it or nothing, but for a quarantine."""
        session, live = self.sessions.get(asked.session), self.live_session(host)
        takeover = live is not None and live.secret != asked.previous
        is_retry = session is not None and session is live
        reasons: set[str] = set()
        if session and session.host is host and not session.live:
            return refuse("SESSION_SUPERSEDED")
        if not is_retry:
            if takeover and self.count_takeovers(host) >= TAKEOVERS:
                host.status = "quarantined"
                self.end_session(host)
                return refuse("HOST_QUARANTINED")
            if len(self.recent_sessions(host)) >= SESSIONS:
                reasons.add("TRY_LATER")
            reasons |= self.claims_session(host, session)
        reasons |= self.claims_change(host, asked)
        if reasons:
            return refuse(*reasons)
        if not is_retry:
            self.open_session(host, asked.session, takeover)
        self.set_wallet(host, asked.wallet, None if host.wallet else host.invite)
        if asked.key and asked.key != host.key:
            host.key = asked.key
            host.changes.append(self.now_s)
        return Answer(host)

    def claims_change(self, host: Host, asked: Asked) -> set[str]:
        """Why the host may not have this key or wallet now."""
        reasons = set()
        is_new_key = asked.key not in (None, host.key)
        if is_new_key and (self.by_key(asked.key) or self.is_pinned(asked.key)):
            reasons.add("KEY_TAKEN")
        is_new_wallet = asked.wallet not in (None, host.wallet, host.requested)
        today = [at_s for at_s in host.changes if at_s > self.now_s - DAY_S]
        if (is_new_key or is_new_wallet) and len(today) >= CHANGES:
            reasons.add("TRY_LATER")
        return reasons

    def recent_sessions(self, host: Host) -> list[Session]:
        """What the host opened in the last ten minutes."""
        own = (session for session in self.sessions.values() if session.host is host)
        return [session for session in own if session.opened_s > self.now_s - WINDOW_S]

    def count_takeovers(self, host: Host) -> int:
        """Of the last ten minutes, and since the operator released it."""
        recent = self.recent_sessions(host)
        return sum(session.takeover and session.tick > host.released for session in recent)

    def open_session(self, host: Host, secret: bytes, takeover: bool) -> None:
        """Make it the live one."""
        self.tick += 1
        self.end_session(host)
        self.sessions[secret] = Session(secret, host, self.now_s, self.tick, takeover)

    def set_wallet(self, host: Host, asked: str | None, invite: Invite | None) -> None:
        """The one asked for, unless the host has worked for another."""
        before = (host.wallet, host.requested)
        wanted = asked or host.wallet or host.invite.wallet
        if host.ever_assigned and host.wallet and wanted != host.wallet:
            host.requested = wanted
        else:
            host.wallet, host.requested = wanted, None
        if (host.wallet, host.requested) != before:
            host.changes.append(self.now_s)
        elif invite is None:
            return
        self.name_wallet(host.wallet, invite)

    def name_wallet(self, wallet: str | None, invite: Invite | None) -> None:
        """Its namespace is known now; the invite may approve it."""
        if wallet is None:
            return
        first = invite is not None and invite.approve_first and invite.wallet is None
        self.namespaces[wallet] = self.namespaces.get(wallet, False) or first

    # Heartbeat

    def heartbeat(self, secret: bytes, address: str | None, status: str) -> Answer:
        """A sign of life; `status` is online or paused."""
        session = self.sessions.get(secret)
        if session is None:
            return refuse("UNKNOWN_SESSION")
        host = session.host
        if host.status in ("revoked", "quarantined"):
            return refuse(f"HOST_{host.status.upper()}")
        reasons = set()
        if not session.live:
            reasons.add("SESSION_SUPERSEDED" if self.live_session(host) else "UNKNOWN_SESSION")
        if address != host.address:
            reasons.add("WRONG_ADDRESS")
        if reasons:
            return refuse(*reasons)
        host.status, host.heard_s = status, self.now_s
        return Answer(host)

    # Time

    def jump(self, by_s: float) -> float:
        """Move the clock by about this much; gives back by how much."""
        while any(self.is_unsafe(by_s)):
            by_s += 17
        self.now_s += by_s
        for host in self.hosts:
            if host.status in ("online", "paused") and self.silence_s(host) >= ONLINE_S[1]:
                host.status = "offline"
        for session in list(self.sessions.values()):
            if session.ended_s is not None and self.now_s - session.ended_s >= KEPT_S:
                del self.sessions[session.secret]  # nobody knows it any more
        return by_s

    def silence_s(self, host: Host) -> float:
        """For how long the control plane could have heard the host and did not."""
        return self.now_s - max(host.heard_s, self.serving_s)

    def is_unsafe(self, by_s: float) -> Iterable[bool]:
        """Would the time on a real clock change an answer after such a jump."""
        then_s = self.now_s + by_s
        for host in self.hosts:
            if host.status in ("online", "paused"):
                yield ONLINE_S[0] - DRIFT_S <= self.silence_s(host) + by_s < ONLINE_S[1]
            yield from (DAY_S - DRIFT_S <= then_s - at_s < DAY_S for at_s in host.changes)
        for session in self.sessions.values():
            yield WINDOW_S - DRIFT_S <= then_s - session.opened_s < WINDOW_S
            if session.ended_s is not None:
                yield KEPT_S - DRIFT_S <= then_s - session.ended_s < KEPT_S
        for invite in self.invites.values():
            yield -DRIFT_S <= then_s - invite.expires_s < 0
