"""Fuzzes one decoder with coverage as its guide (atheris): bytes from elsewhere, to a rule.

    fuzz_tool.py TARGET SECONDS SEED DIRECTORY

Ends with 0, or with another code and the bytes that did it in DIRECTORY. Where atheris has no wheel
the same inputs are mutated without guidance. In each target only the named exceptions may come out;
what comes out instead must be fit for the database, a terminal and the log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import json
import random
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
try:
    import atheris  # type: ignore[import-untyped]
except ImportError:  # no wheel for this processor
    atheris = None

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # Counts which branches an input took; only here, so that no importer is slowed down.
    guide = atheris.instrument_imports(include=["cp_server", "agent"]) if atheris else None
    with guide or contextlib.nullcontext():
        import agent
        import cp_server
else:
    import agent
    import cp_server
from google.protobuf.message import DecodeError  # noqa: E402

from proto import openinfra_pb2 as pb  # noqa: E402

TOKEN = cp_server.render_token("oi1", "abcdefghij234567", bytes(range(32)))
WALLET = "7YttLkHDoNj9wyDur5pM1ejNaAvT9X4eqaYcHQqtj2G5"
WG_KEY = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
HOST_ID = "5f6a9a4e-0c0b-4e1c-9d6b-3a1f0a3f9b11"
BOOT_ID = "0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10"
HEX = "ab" * 32
FACTS = pb.Facts(
    hostname="lab",
    arch="x86_64",
    kernel="6.1.0",
    agent_version="0.1.0",
    cpu_count=4,
    memory_bytes=8 << 30,
    disk_bytes=100 << 30,
    disk_encrypted=True,
)
EDGES = (  # what a mutation seldom comes to
    pb.Facts(hostname="a" * 254, arch="a" * 33, kernel="a" * 129, agent_version="a" * 65),
    pb.Facts(hostname="a\x1bb", arch="\u00e9", kernel=" ", agent_version="\0", disk_bytes=2**63),
    pb.Facts(hostname="a", arch="a", kernel="a", agent_version="a", memory_bytes=2**64 - 1),
    pb.Facts(hostname="a", arch="a", kernel="a", agent_version="a", cpu_count=2**32 - 1),
)
LOG_REQUEST = pb.LogRequest(
    request_id=2**64 - 1, assignment_id=HOST_ID, tail_lines=3, limit_bytes=20
)
STANDING = pb.Standing(status=pb.HOST_STATUS_ONLINE, reasons=["its wallet is not approved"])


def check_plain(text: str) -> None:
    """Fails unless a text is fit for one line on a terminal."""
    assert text.isprintable(), repr(text)


def check_facts(facts: cp_server.Facts) -> None:
    """Fails unless facts fit the database's columns."""
    for text in (facts.hostname, facts.arch, facts.kernel, facts.agent_version):
        assert text
        assert text.isascii()
        check_plain(text)
    assert facts.cpu_count in range(2**31)
    assert min(facts.memory_bytes, facts.disk_bytes) >= 0
    assert max(facts.memory_bytes, facts.disk_bytes) < 2**63


def check_refusal(refusal: cp_server.Refusal) -> None:
    """Fails unless a refusal can be sent and printed."""
    assert refusal.code in cp_server.REFUSALS
    check_plain(str(refusal))
    assert TOKEN.split("_", 2)[2] not in str(refusal)


def register(data: bytes) -> None:
    """The control plane's path of a Register."""
    try:
        request = pb.RegisterRequest.FromString(data)
        found = cp_server.parse_register(request, "10.77.0.42", True)
    except DecodeError:
        return
    except cp_server.Refusal as refusal:
        check_refusal(refusal)
        return
    assert len(found.host_secret_sha256) == len(found.session_sha256) == len(found.token.secret)
    assert found.wg_ip == "10.77.0.42"
    assert found.wg_pubkey
    check_plain(found.wg_pubkey + (found.payout_pubkey or ""))
    check_facts(found.facts)


def resume(data: bytes) -> None:
    """The control plane's path of a Resume."""
    try:
        request = pb.ResumeRequest.FromString(data)
        found = cp_server.parse_resume(request, "10.77.0.42", True)
    except DecodeError:
        return
    except cp_server.Refusal as refusal:
        check_refusal(refusal)
        return
    assert len(found.host_secret_sha256) == len(found.session_sha256) == 32
    assert len(found.previous_sha256) == 32
    check_plain((found.wg_pubkey or "") + (found.payout_pubkey or ""))


def heartbeat(data: bytes) -> None:
    """The control plane's path of a heartbeat."""
    try:
        request = pb.HeartbeatRequest.FromString(data)
        beat = cp_server.parse_heartbeat(request, "10.77.0.42", 30_000)
    except DecodeError:
        return
    except cp_server.Refusal as refusal:
        check_refusal(refusal)
        return
    assert 0 < beat.seq < 2**63
    assert str(uuid.UUID(str(beat.boot_id))) == str(beat.boot_id)  # as PostgreSQL reads it
    if beat.facts:
        check_facts(beat.facts)
    for answer in request.logs:
        log = cp_server.parse_log(answer, LOG_REQUEST)
        check_plain(log.reason)
        assert len(log.lines) <= LOG_REQUEST.tail_lines
        assert len("\n".join(log.lines).encode()) <= 3 * LOG_REQUEST.limit_bytes  # U+FFFD has 3
        assert not re.search("[\n\x7f-\x9f]", "".join(log.lines))


class Stub:
    """Answers each call with the bytes at hand, as grpc.aio does: None for what is no message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def _decode(self, kind: Any) -> Any:
        try:
            return kind.FromString(self.data)
        except DecodeError:
            return None

    async def Register(self, _request: object, **_: object) -> Any:
        return self._decode(pb.RegisterReply)

    async def Resume(self, _request: object, **_: object) -> Any:
        return self._decode(pb.ResumeReply)

    async def Heartbeat(self, _request: object, **_: object) -> Any:
        return self._decode(pb.HeartbeatReply)


def make_agent(data: bytes, registered: bool) -> agent.Agent:
    """An agent's memory over a control plane that answers with these bytes."""
    host_id = HOST_ID if registered else None
    token = agent.parse_token(TOKEN)
    config = agent.Config(
        env_file=DIRECTORY / "agent.env",
        control_plane="10.77.0.1:9092",
        data_dir=DIRECTORY,
        socket=DIRECTORY / "agent.sock",
        wg_pubkey_file=DIRECTORY / "key",
        guard_file=DIRECTORY / "guard.json",
        lease_file=DIRECTORY / "lease.json",
        secrets_dir=DIRECTORY / "secrets",
        engine_socket=Path("none"),
        cgroup=DIRECTORY / "cgroup",
        limits=DIRECTORY / "limits.conf",
        wallet=WALLET,
        token=token,
        allow_unencrypted=True,
    )
    identity = agent.Identity(
        HEX, host_id, "abcdefghij234567" if registered else None, HEX if registered else None, HEX
    )
    return agent.Agent(
        config=config,
        identity=identity,
        wg_pubkey=WG_KEY,
        disk_encrypted=True,
        takes_secrets=True,
        boot_id=BOOT_ID,
        started_s=0.0,
        stub=Stub(data),  # type: ignore[arg-type]
        channel=None,  # type: ignore[arg-type]
        ready=asyncio.Event(),
        wake=asyncio.Event(),
        workloads=agent.make_workloads(config, agent.Limits(2000, 4 << 30)),
        is_settled=True,
    )


@functools.cache
def get_loop() -> asyncio.AbstractEventLoop:
    """One loop for all inputs: a new one costs more than all the rest."""
    return asyncio.new_event_loop()


def run_agent(data: bytes, work: Callable[[agent.Agent], Any], registered: bool) -> None:
    """One operation of the agent, then all that it shows of it; Error may end it as it may."""
    one = make_agent(data, registered)
    settled: list[float] = []
    written, sys.stderr = sys.stderr, io.StringIO()
    try:
        try:
            get_loop().run_until_complete(work(one))
        except agent.RefusedError as refused:
            check_plain(refused.detail)
            with contextlib.suppress(agent.Error):
                settled.append(agent.settle_refusal(one, refused))
        except agent.Error as error:
            check_plain(str(error))
        answer = json.loads(json.dumps(agent.render_answer(one, ("", ""), "unspent", 1, 5.0)))
        for line in agent.render_status(answer).splitlines():
            check_plain(line)
        assert all(delay_s >= 0 for delay_s in settled)
        assert agent.INTERVAL_MIN_S <= one.interval_s <= agent.INTERVAL_MAX_S
        for line in sys.stderr.getvalue().splitlines():
            check_plain(line)
    finally:
        sys.stderr = written


def register_reply(data: bytes) -> None:
    """What the agent does with the answer to a Register."""
    run_agent(data, agent.open_session, registered=False)


def resume_reply(data: bytes) -> None:
    """What the agent does with the answer to a Resume."""
    run_agent(data, agent.open_session, registered=True)


def heartbeat_reply(data: bytes) -> None:
    """What the agent does with the answer to a heartbeat."""
    run_agent(data, agent.beat, registered=True)


# Of a container's options, those that differ from one workload to the next.
FREE = {"Memory", "MemorySwap", "NanoCpus", "NetworkMode", "PortBindings", "Tmpfs"}


@functools.cache
def make_plain(offered: agent.Limits, address: str, secrets: Path) -> dict[str, Any]:
    """The body of a container that asks for nothing odd."""
    (wish,), _ = agent.decide_wishes([BARE], offered, address, secrets)
    return agent.render_container(wish, address, secrets)


def check_container(
    body: dict[str, Any], wish: agent.Wish, offered: agent.Limits, address: str, secrets: Path
) -> None:
    """Fails unless a body is the sandbox: of the host there are the wish's own secrets in it."""
    plain, host = make_plain(offered, address, secrets), dict(body["HostConfig"])
    source = str(secrets / str(uuid.UUID(wish.assignment_id)))
    mount = {"Type": "bind", "Source": source, "Target": "/run/secrets", "ReadOnly": True}
    assert host.pop("Mounts", []) == [mount] * wish.has_secrets
    for name, _ in wish.secrets:
        assert (secrets / name).parent == secrets
        assert name not in ("", ".", "..")
    # No other option than those of the plain body, and all but a few with its values.
    assert body.keys() - {"Cmd"} == plain.keys()
    assert body["Labels"].keys() == plain["Labels"].keys()
    assert (body["User"], body["Healthcheck"]) == ("65534:65534", {"Test": ["NONE"]})
    golden = plain["HostConfig"]
    assert host.keys() == golden.keys()
    assert {k: host[k] for k in golden.keys() - FREE} == {
        k: golden[k] for k in golden.keys() - FREE
    }
    assert re.fullmatch(r"o[ix]-[0-9a-f]{11}", host["NetworkMode"])
    assert body["NetworkingConfig"] == {"EndpointsConfig": {host["NetworkMode"]: {}}}
    assert 0 < host["Memory"] == host["MemorySwap"] <= offered.memory_bytes
    assert 0 < host["NanoCpus"] <= offered.cpu_milli * 1_000_000
    for (binding,) in host["PortBindings"].values():
        assert binding == {"HostIp": address, "HostPort": binding["HostPort"]}
        assert int(binding["HostPort"]) in range(20_000, 28_192)
    for path, options in host["Tmpfs"].items():
        assert options == agent.render_tmpfs(wish)
        assert re.fullmatch("(/[A-Za-z0-9_.-]+)+/?", path)
        assert not {".", ".."} & {*path.split("/")}
        assert not re.match("(/var)?/run/secrets(/|$)", path)


def desired(data: bytes) -> None:
    """What the agent makes of a list."""
    try:
        found = pb.Desired.FromString(data)
    except DecodeError:
        return
    secrets, limits = Path("/run/openinfra/secrets"), agent.Limits(2000, 4 << 30)
    wishes, refused = agent.decide_wishes(found.assignments, limits, "10.77.16.5", secrets)
    for why in refused.values():
        check_plain(why)
    for wish in wishes:
        body = agent.render_container(wish, "10.77.16.5", secrets)
        check_container(body, wish, limits, "10.77.16.5", secrets)


def refusal(data: bytes) -> None:
    """What the agent does with a refusal's reason and words."""
    name, _, detail = data.decode("utf-8", "replace").partition("\n")

    async def refuse(_one: agent.Agent) -> None:
        raise agent.RefusedError(agent.parse_line(name), agent.parse_line(detail))

    run_agent(data, refuse, registered=True)


def env_file(data: bytes) -> None:
    """agent.env, then all that is made of it."""
    arguments = argparse.Namespace(allow_unencrypted=True)
    try:
        values = agent.parse_env(data, "agent.env")
        agent.decide_config(arguments, agent.EnvFile(data, values, 0o600, 0))
    except agent.Error as error:
        check_plain(str(error))
        return
    for value in values.values():
        check_plain(value)


def identity(data: bytes) -> None:
    """identity.json: what is read is what was written, or is refused."""
    try:
        found = agent.parse_identity(data)
    except (agent.BrokenError, agent.Error) as error:
        check_plain(str(error))
        return
    assert agent.parse_identity(agent.render_identity(found)) == found


def request(data: bytes) -> None:
    """One line on the agent's control socket."""
    try:
        assert agent.parse_request(data).cmd in agent.REQUESTS
    except agent.BrokenError as error:
        check_plain(str(error))


def log_stream(data: bytes) -> None:
    """What the engine sends of a container's log."""
    kept, _ = agent.cut_log(agent.parse_frames(io.BytesIO(data).read), 20)
    assert len(kept) <= 20


IDENTITY = agent.Identity(HEX, HOST_ID, "abcdefghij234567", HEX, None)
SECRETS: dict[str, Any] = {"host_secret": b"h" * 32, "session": b"s" * 32}
BOTH: dict[str, Any] = {"payout_pubkey": WALLET, "wg_pubkey": WG_KEY}
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "register": (
        register,
        [
            pb.RegisterRequest(
                invite_token=TOKEN, facts=facts, **SECRETS, **BOTH
            ).SerializeToString()
            for facts in (FACTS, *EDGES)
        ],
    ),
    "resume": (
        resume,
        [pb.ResumeRequest(previous_session=b"p" * 32, **SECRETS, **BOTH).SerializeToString()],
    ),
    "heartbeat": (
        heartbeat,
        [
            pb.HeartbeatRequest(
                session=b"s" * 32, seq=seq, boot_id=BOOT_ID, facts=facts, paused=True
            ).SerializeToString()
            for facts in (FACTS, *EDGES)
            for seq in (7, 2**63, 2**64 - 1)
        ]
        + [
            pb.HeartbeatRequest(
                session=b"s" * 32,
                seq=7,
                boot_id=BOOT_ID,
                logs=[
                    pb.LogAnswer(request_id=1, content=b"a\n\xff\xc2\x9b\n" * 9, truncated=True),
                    pb.LogAnswer(request_id=2, reason="its host has no container of it now"),
                ],
            ).SerializeToString()
        ],
    ),
    "register_reply": (
        register_reply,
        [
            pb.RegisterReply(
                host_id=HOST_ID,
                heartbeat_interval_s=30,
                onchain_payout=True,
                standing=STANDING,
                invite_id="abcdefghij234567",
            ).SerializeToString()
        ],
    ),
    "resume_reply": (
        resume_reply,
        [
            pb.ResumeReply(
                host_id=HOST_ID, heartbeat_interval_s=30, standing=STANDING
            ).SerializeToString()
        ],
    ),
    "heartbeat_reply": (
        heartbeat_reply,
        [
            pb.HeartbeatReply(
                next_heartbeat_ms=30_000, standing=STANDING, log_requests=[LOG_REQUEST]
            ).SerializeToString()
        ],
    ),
    "refusal": (refusal, [f"{name}\nwhy; what to do".encode() for name in agent.REFUSALS]),
    "env_file": (
        env_file,
        [
            f"INVITE_TOKEN={TOKEN}\nSOLANA_PAYOUT_PUBKEY='{WALLET}'\n# x\n\n"
            f"CONTROL_PLANE=[::1]:9092\nDATA_DIR=/var/lib/openinfra\n".encode(),
            b"INVITE_TOKEN=oi1_abcdefghij234567_used\nCONTROL_PLANE=cp.example:9092",
        ],
    ),
    "identity": (identity, [agent.render_identity(IDENTITY)]),
    "request": (request, [b'{"cmd": "status"}\n']),
    "log_stream": (log_stream, [b"\1\0\0\0\0\0\0\3out\2\0\0\0\0\0\0\4err\n", b"of a terminal\n"]),
}
ASSIGNMENT = pb.Assignment(
    assignment_id="3f0c6c1e-8d4b-4a7e-9f21-5b6d7c8e9f01",
    workload_id=BOOT_ID,
    image=f"registry.coledex.com/acme/web@sha256:{'ab' * 32}",
    env={"A": "1"},
    cpu_milli=250,
    memory_bytes=64 << 20,
    egress=pb.EGRESS_INTERNET,
    restart=pb.RESTART_ALWAYS,
    ports=[pb.Port(container_port=80, host_port=20_000)],
    secrets={"token": b"hunter2"},
)
BARE = pb.Assignment()
BARE.CopyFrom(ASSIGNMENT)
BARE.ClearField("secrets")
TARGETS["desired"] = (
    desired,
    [
        pb.Desired(revision=2, assignments=[ASSIGNMENT]).SerializeToString(),
        pb.Desired(
            assignments=[pb.Assignment(assignment_id="../..", secrets={"../x": b""})]
        ).SerializeToString(),
    ],
)
DIRECTORY = Path()


def mutate(data: bytes, source: random.Random) -> bytes:
    """A few bytes changed, taken away or put in."""
    raw = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(raw) + 1)
        how = source.randrange(4)
        raw[at : at + how] = source.randbytes(source.randint(0, 3)) if how else b"\xff\n\0"
    return bytes(raw)


def fuzz_blindly(target: Callable[[bytes], None], seeds: list[bytes], until: float) -> None:
    """Without atheris: mutations of what is valid."""
    source, count = random.Random(int(sys.argv[3])), 0
    while time.monotonic() < until:
        data = source.choice(seeds)
        for _ in range(source.randint(1, 3)):
            data = mutate(data, source)
        (DIRECTORY / "crash").write_bytes(data)
        target(data)
        count += 1
    print(f"stat::number_of_executed_units: {count}", file=sys.stderr)


def main() -> None:
    """Fuzz one target."""
    global DIRECTORY
    name, seconds, seed, directory = sys.argv[1:5]
    DIRECTORY = Path(directory)
    target, seeds = TARGETS[name]
    for one in seeds:
        target(one)
    if atheris is None:
        fuzz_blindly(target, seeds, time.monotonic() + int(seconds))
        return
    corpus = DIRECTORY / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, one in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(one)
    flags = [f"-max_total_time={seconds}", f"-seed={seed}", "-print_final_stats=1", "-max_len=4096"]
    flags += [f"-artifact_prefix={DIRECTORY}/", "-timeout=5", "-rss_limit_mb=600"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
