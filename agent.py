#!/usr/bin/python3
"""The OpenInfra agent: makes this machine a host of one fleet, keeps it online, runs workloads.

  agent.py run       the daemon: redeems the invite once, then sends heartbeats, and runs what it is
                     assigned as containers (systemd starts it)
  agent.py status    what the running agent says: exit 0 when this host is online, else 1
  agent.py doctor    what is wrong and the command for each finding: exit 0 when nothing is
  agent.py earnings  what this host earned in a month as the control plane has it; hour by hour too
  agent.py pause     ends the workloads here at once and takes none; `unpause` takes some again
  agent.py leave     the same, and waits until the control plane has nothing assigned here
  agent.py guard     puts this host's firewall in place, and finds the control plane again when
                     its address changed; once, as root (a systemd timer starts it each 10 s
                     where none stays); with --watch it stays, does it again and again, and holds
                     a second copy that no flush removes;
                     with --strays it ends only what runs without the engine knowing of it (a unit
                     of its own, after each start of the engine)

What it does to this machine
  `run` starts no program: it tells the container engine what to pull, run and remove, and only of
  what carries its label `openinfra.assignment` and a name `oi-…`. It stops all of that when the
  control plane is silent for long, and leaves it running when it is itself stopped or upgraded.
  When the control plane asks what one of these printed, it reads the end of that and sends it.
  Each minute it asks the engine what each of these uses, and tells the control plane the sums.
  When the engine's disk is nearly full it has images removed that nothing uses, but only by an
  engine whose own label says `openinfra.engine=1`.
  Workloads answer on 20000 to 28191 of this host's address in the tunnel. The control socket is a
  unix socket. `doctor` starts `wg show` and `systemctl list-units`. `guard` starts `nft` and `wg`,
  and changes the nft tables `inet openinfra` and `inet openinfra_held` and the endpoint of the
  interface openinfra; where the provider's own Docker drops what workloads forward, it adds two
  rules to its chain DOCKER-USER with `iptables`. It stops the workloads whose time is over when the
  agent does not, and freezes them while it cannot put the firewall back. Nothing else.

Files (mode)
  /etc/openinfra/agent.env           0600  read; after the first accepted heartbeat the token in it
                                           is replaced by `oi1_<id>_used`, all else is kept
  /etc/openinfra/installer/install.json    read: where this agent came from; images are of there,
                                           unless limits.conf says REGISTRY=host:port
  /etc/openinfra/limits.conf               read: what is lent to workloads, CPUS=1.5 and MEMORY=2G;
                                           absent: all cores but one and 70 % of the memory
  /etc/wireguard/openinfra.pub             read: this host's WireGuard public key
  /var/lib/openinfra/                0700  must exist, and lie on dm-crypt
    identity.json                    0600  who this host is; losing it takes a fresh invite
    identity.json.broken-<n>         0600  an unreadable identity, moved aside, never deleted
    refused.json                     0600  why the control plane ended this agent, for `doctor`
    paused.json                      0600  while it is there this host is paused, whatever it holds
    usage.json                       0600  what workloads used, until the control plane has it
    usage.json.broken                0600  one that could not be read, moved aside
    workloads.ended                  0600  its time: when workloads that are wanted were last told
                                           to end; openinfra-workloads.service has it made too
    agent.lock                       0600  held while the agent runs
  /etc/wireguard/openinfra.conf            `guard` reads it: the control plane's endpoint
  /run/openinfra/agent.sock          0600  the control socket, one JSON line each way
  /run/openinfra/guard.json          0600  what `guard` found at its last run
  /run/openinfra/lease.json          0600  which workloads may run, until when, their ports and
                                           crashes; this home's address as the hub sees it
  /run/openinfra/guard.lock          0600  held while a guard is at work
  /run/openinfra/watch.lock          0600  held by `guard --watch` while the firewall is in place
  /run/openinfra/secrets/            0700  in memory: workloads' secrets, while they are held here
  /run/openinfra/secrets/*/*         0444  a workload sees its own, read-only, in /run/secrets
  /run/openinfra/engine.sock               the container engine; who can open it is root
  /sys/fs/cgroup/openinfra.slice/          `guard` ends and freezes workloads there, `pause` without
                                           an agent ends them; `run` reads whether they are frozen,
                                           and how many processes they were refused
  /var/cache/openinfra/*/*/containers/     `run` sees how long each workload's newest log is
  It reads /proc/meminfo, /proc/sys/kernel/random/boot_id and /sys/dev/block.
Ports
  10.77.0.1:9092/tcp       it calls the control plane there (CONTROL_PLANE), through the tunnel
  10.77.x.y:9093/udp       here, in the tunnel: any packet means "heartbeat now"

Needs: Python 3.10, grpcio 1.51, protobuf 4.21 or newer (Debian 12's own packages do).
Exit codes: 0 ended well; 1 error; 2 usage or configuration; 75 try later (data directory locked or
  not encrypted); 78 identity: a person must act, systemd does not start it again.

Examples
  agent.py run --env-file /etc/openinfra/agent.env
  agent.py run --control-plane 127.0.0.1:9092 --data-dir /tmp/oi --allow-unencrypted
  agent.py doctor --json
"""

from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import enum
import errno
import fcntl
import functools
import hashlib
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar, cast

if sys.argv[1:2] != ["guard"]:  # the tunnel waits for it at each boot, and it needs none of these
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    try:
        import grpc
        import grpc.aio

        from proto import openinfra_pb2 as pb
        from proto import openinfra_pb2_grpc
    except ImportError as error:
        if not {"-h", "--help"} & set(sys.argv):  # to read what it does must not need it
            todo = "type: apt-get install python3-grpcio python3-protobuf; proto/ lies beside it"
            print(f"ERROR agent.py lacks a Python package: {error} ; {todo}", file=sys.stderr)
            raise SystemExit(1) from None

VERSION = "0.1.0"

# ------------------------------------------------------------------------------------------------
# Constants: every number that somebody may want to question, with the reason for it. Pure.
# ------------------------------------------------------------------------------------------------

# Exit codes.
USAGE = 2
LATER = 75
IDENTITY = 78

IDENTITY_FORMAT = 1
IDENTITY_NAME = "identity.json"
LOCK_NAME = "agent.lock"
REFUSED_NAME = "refused.json"
PAUSED_NAME = "paused.json"
USAGE_NAME = "usage.json"

# Our own files are a few hundred bytes; more is not ours and is not read into memory.
FILE_MAX_BYTES = 65_536
IDENTITY_MAX_BYTES = 4_096

RPC_DEADLINE_S = 10.0
# The control plane names the interval; outside these bounds it is an error of its own.
INTERVAL_NOMINAL_S = 30.0
INTERVAL_MIN_S = 0.2
INTERVAL_MAX_S = 60.0
# "Within seconds" of `wg set`: a host that was never online asks at least this often.
RETRY_FIRST_MAX_S = 5.0
RETRY_LATER_MAX_S = 60.0
RETRY_MIN_S = 0.2
# A connection that came up ends a wait, but not sooner: a port that accepts and hangs up must not
# make the agent spin.
WAKE_AFTER_S = 1.0
# Waits are cut into pieces, since the loop's clock stands still during suspend.
WAIT_PIECE_S = 10.0
# One trouble that lasts is logged again this often.
LOG_AGAIN_S = 600.0
# The watchdog is fed only while the main loop moves: an RPC, a piece of a wait, slow disks.
STUCK_AFTER_S = 90.0

MONTH = "|20[0-9]{2}-(0[1-9]|1[0-2])"  # or none: this one
# Lines of what this host earned, in one answer; and the numbers of each.
EARNINGS_LINES, EARNINGS_PAGES, WORKLOAD_MAX = 200, 500, 128
EARNINGS_NUMBERS = (
    *("replica", "part", "card_no", "cpu_milli", "memory_bytes", "billed_us", "egress_bytes"),
    *("cpu_hour_micros", "gb_hour_micros", "egress_gb_micros", "charge_micros"),
    *("provider_share_ppm", "share_micros"),
)
SOCKET_LINE_MAX_BYTES = 4_096
SOCKET_ANSWER_MAX_BYTES = 262_144
SOCKET_TIMEOUT_S = 5.0
SOCKET_CLIENTS_MAX = 16
# sockaddr_un holds 108 bytes with the final zero, unix(7).
SOCKET_PATH_MAX_BYTES = 107

WG_INTERFACE = "openinfra"
# Calls are plaintext: they go to this machine or into the tunnel, and nowhere else.
TUNNEL = ipaddress.IPv4Network("10.77.0.0/16")
# WireGuard makes a new handshake every 120 s while there is traffic; the keepalive is 25 s.
HANDSHAKE_OLD_S = 180
PROBE_TIMEOUT_S = 3.0
# Then the control plane's name is looked up again: a handshake is due each 120 s.
ENDPOINT_OLD_S = 150
# A guard looks each 10 s at the latest; three looks may be lost before anybody is told.
GUARD_OLD_S = 45.0
# For one answer of the engine and one end, while what the engine has lost is looked for.
KNOWS_TIMEOUT_S, STRAY_TIMEOUT_S = 10.0, 10.0
# A guard that fails tries again, but only while it has not taken so long; systemd gives it 40 s.
GUARD_TRIES, GUARD_AGAIN_S, GUARD_AGAIN_MAX_S = 3, 2.0, 10.0
# All workloads, whatever the engine knows of them.
WORKLOADS_CGROUP = Path("/sys/fs/cgroup/openinfra.slice")
KILLED_S = 3.0  # for the kernel to end all of them
NFT_S = 5.0  # for nft, three times in a look at most; then workloads are frozen
NFT_TABLE = ("inet", "openinfra")
# nfnetlink says here what changes of nftables, linux/netfilter/nfnetlink.h; each with its table.
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
# The copy that the watch holds; what could not be put back is tried again so soon, and whether the
# copy is still held is looked at so often.
HELD_TABLE = "openinfra_held"
WATCH_AGAIN_S, WATCH_S, HELD_WAIT_S = 1.0, 10.0, 5.0
# What else a guard does takes the one that watches no longer than ROUND_MAX_S; when it is held up
# for SLOW_S itself, the timer's runs begin again.
ROUND_MAX_S, SLOW_S = 40.0, 5
# Connections of one workload at a time, those of UDP until 30 s after the last packet: the kernel
# follows no more than 65,536 of a machine with 1 GB of memory, and then its owner gets no new one.
FLOWS_SET, FLOWS_MAX = "oi_flows", 2_000
# Of workloads' bridges: a range for benchmarks (RFC 2544), so that no home's network is in it.
WORKLOADS = ipaddress.IPv4Network("198.18.0.0/15")
DOCKER_USER_RULES = (
    "-i oi-+ -j ACCEPT",
    "-o oi-+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
)
# What is not the internet (RFC 6890), whoever is there.
FENCED = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4"),
        "240.0.0.0/4",
    )
)

# What the provider lends when limits.conf does not say: all cores but one, and this of the memory.
LEND_MEMORY = 0.7
ASSIGNMENTS_MAX = 200
PORTS_MAX = 8
# Below those that the kernel gives to whoever asks for any (ip_local_port_range).
HOST_PORTS = range(20_000, 28_192)
# Command and environment of one workload; of what came, no more than this is named in a refusal.
COMMAND_MAX_BYTES = 65_536
NAMED_MAX = 64
# The control plane takes 64 KiB in one message; beyond this the reasons are cut, and logs have to
# wait for the next.
OBSERVED_MAX_BYTES = 48_000
BEAT_MAX_BYTES = 60_000
SECRETS_MAX = 16
SECRETS_MAX_BYTES = 16_384
SECRETS_TARGET = "/run/secrets"
# Docker makes no container with less memory; the kernel takes no smaller share of a processor.
MEMORY_MIN_BYTES = 6 << 20
CPU_MIN_MILLI = 10
# Nobody, in the container; on the host it is 65,534 above the engine's first subordinate id.
WORKLOAD_UID = 65_534
# An image's own volumes become files in memory, as /tmp is.
VOLUMES_MAX = 16
LABEL = "openinfra.assignment"
# The host stops this much before the control plane may place a workload elsewhere.
LEASE_MARGIN_S = 15.0
LEASE_MAX_S = 3_600.0
PAST_KEPT = 10  # of the first fields of Past
# From SIGTERM to SIGKILL.
STOP_S = 10.0
# Its time is when workloads were told to end last; what ended so soon after it ended by that.
ENDED_NAME = "workloads.ended"
ENDED_WITHIN_S = 60.0
# The agent ends what has no right any more by itself; later than this it is dead or stuck.
GUARD_LATE_S = STOP_S + 3
# A workload that ran this long is started again at once after its end.
STEADY_S = 600.0
BACK_OFF_MAX_S = 300.0
# Held is not enough: processes that the kernel refuses cost it work, and so do lines that nobody
# keeps the engine. A workload is ended that has so many too many, beyond so many each second.
PIDS_MAX = 128
FORKS_OVER_MAX, FORKS_PER_S = 1_000, 10.0
LOG_FILE_BYTES = 5 << 20  # "5m"
LOG_OVER_MAX_BYTES, LOG_BYTES_PER_S = 50_000_000, 250_000.0
# What the engine could not do is tried again after these waits, then another host may.
TRY_PAUSES_S = (1.0, 3.0, 8.0)
NO_SPACE = "no space left"  # in the engine's words, when its disk is full
# The containers are looked at this often: when something is about to change, while there are any,
# while there is none.
TEND_SOON_S = 0.5
TEND_S = 2.0
TEND_IDLE_S = 30.0
ENGINE_API = (1, 41)  # of Docker 20.10; a newer engine may want a newer one
ENGINE_START_S = 15.0
# Nobody pays for what may run while an engine is silent for this long.
ENGINE_LOST_S = 120.0
# A host that can run nothing for so long gives back what does not run.
GIVE_BACK_S = 600.0
NO_ENGINE = Path("none")
# `pause` waits so long for the ends, and this for the heartbeat that says so; `leave` for the
# control plane's round, its nudge (or the next heartbeat), and the heartbeat after it.
PAUSE_WAIT_S = 30.0
TELL_WAIT_S = 5.0
LEAVE_WAIT_S = 90.0
# Only an engine that says so with this label has images that are ours to remove: from this share of
# its disk until that one.
ENGINE_LABEL = "openinfra.engine=1"
DISK_HIGH, DISK_LOW = 0.8, 0.7
TIDY_S, USED_MAX_S = 60.0, 30 * 86_400.0
ENGINE_TIMEOUT_S = 30.0
ENGINE_VERSION_TIMEOUT_S = 10.0  # to tell all of theirs an engine starts three programs
ENGINE_VERSION_AGE_S = 10.0
# Pulls at once, other work, reads of logs, and threads in all: stops never wait for the others.
PULLS_MAX = 4
STEPS_MAX = 4
# The engine answers when one has ended, seconds later on a small machine; and all of them have to
# be gone before others may run what they ran, half a minute after the right is over.
STOPS_MAX = 16
LOG_READS_MAX = 2
THREADS_MAX = PULLS_MAX + STEPS_MAX + STOPS_MAX + LOG_READS_MAX + 2
# Logs asked for at once, and what is read of one, whatever is asked.
LOGS_MAX = 32
LOG_LINES_MAX = 1_000
LOG_MAX_BYTES = 32_768
LOG_TIMEOUT_S = 3.0
# While it pulls, the engine says something this often; the digits of one line are a few hundred.
PULL_SILENCE_S = 60.0
ENGINE_LINE_MAX_BYTES = 65_536
ENGINE_ANSWER_MAX_BYTES = 4 << 20
# What workloads use is read this often, for so long at a time; the engine has this long for one of
# them, and less right before a stop. So many go with one heartbeat, and are kept while the control
# plane is away.
METER_S = 60.0
METER_SLICE_S = 1.0
METER_TIMEOUT_S = 2.0
PARTING_TIMEOUT_S = 0.5
COUNTS_SENT_MAX, COUNTS_MAX = 64, 1_000
USAGE_MAX_BYTES = 1 << 20
# In the tunnel: any packet means "heartbeat now".
NUDGE_PORT = 9093

CHANNEL_OPTIONS = (
    # With gRPC's defaults a channel came up 23-33 s after a long blackhole ended.
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # These also set TCP_USER_TIMEOUT: a dead connection is given up after 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Nothing but CONTROL_PLANE decides where the session goes.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),
    # Not shared with anything else in the process, and no surprise in memory.
    ("grpc.use_local_subchannel_pool", 1),
    # ASSIGNMENTS_MAX with all the environment and all the secrets that the CP lets them have.
    ("grpc.max_receive_message_length", 8 << 20),
)

TOKEN_RE = re.compile(
    r"(?P<body>oi1_(?P<id>[a-z2-7]{16})_[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048])_(?P<crc>[0-9a-f]{8})"
)
TOKEN_USED_RE = re.compile(r"oi1_([a-z2-7]{16})_used")
TOKEN_START_RE = re.compile(r"oi1_([a-z2-7]{16})_")
INVITE_ID_RE = re.compile(r"[a-z2-7]{16}")
HOST_ID_RE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
UUID_RE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
# <registry>/<namespace>/<name>@<digest> in Docker's grammar: the registry has a dot or a port.
IMAGE_RE = re.compile(
    r"(?=[a-z0-9-]*[.:])[a-z0-9]+(?:-+[a-z0-9]+)*(?:\.[a-z0-9]+(?:-+[a-z0-9]+)*)*(?::[0-9]{1,5})?"
    r"(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*){2}@sha256:[0-9a-f]{64}"
)
WORKLOAD_ENV_RE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
SECRET_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
VOLUME_RE = re.compile(r"(?:/[A-Za-z0-9_.-]{1,64}){1,8}/?")
HEX_32_RE = re.compile(r"[0-9a-f]{64}")
INT64_MAX = 2**63 - 1
WG_KEY_RE = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
ENV_KEY_RE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


# ------------------------------------------------------------------------------------------------
# Copied helpers: the same text in every script; a test compares them. Not pure.
# ------------------------------------------------------------------------------------------------


class Error(Exception):
    """What failed and why, what to do about it, and the exit code that `main` gives back."""

    def __init__(self, what: str, todo: str, exit_code: int = 1, **pairs: object) -> None:
        super().__init__(f"{what}; {todo}")
        self.what = what
        self.todo = todo
        self.exit_code = exit_code
        self.pairs = pairs


def log(level: str, message: str, todo: str = "", **pairs: object) -> None:
    """Print one event as `LEVEL message key=value ; todo` on stderr; the journal adds the time."""
    line = f"{level} {message}"
    for key, value in pairs.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        plain = text != "" and all("!" <= char <= "~" and char not in '"=' for char in text)
        line += f" {key}={text if plain else json.dumps(text)}"
    with contextlib.suppress(OSError):  # a full disk under the journal ends no daemon
        print(line + (f" ; {todo}" if todo else ""), file=sys.stderr, flush=True)


def run(argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30, echo: bool = True) -> str:
    """Run one command without a shell, give back its stdout; raise Error when it fails."""
    if echo:
        print("+ " + shlex.join(argv), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Error(f"{argv[0]} is not installed", "install it and run this again") from None
    except OSError as error:
        raise Error(f"{argv[0]} does not start: {error.strerror}", "mend that") from None
    except subprocess.TimeoutExpired:
        raise Error(f"{argv[0]} gave no answer for {timeout_s:g} s", "run it by hand") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().replace("\n", " / ")
        what = f"{shlex.join(argv)} ended with {done.returncode}: {said}"
        raise Error(what, "mend that and run this again")
    return done.stdout.decode(errors="replace")


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file whole: after a power cut it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def sd_notify(state: str) -> None:
    """Tell systemd `READY=1`, `STOPPING=1` or `WATCHDOG=1`; nothing without it (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):  # it hangs
        sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def failpoint(_name: str) -> None:
    """A step at which tests let this program fail; only their copy of it has more here."""


def check_failpoints() -> None:
    """Raises Error when failpoints are asked for: this is no copy that the tests made."""
    if os.environ.get("OPENINFRA_FAILPOINT"):
        raise Error("OPENINFRA_FAILPOINT is set, and this is no test build", "unset it", 2)


# ------------------------------------------------------------------------------------------------
# Types: what the parts hand to each other; secrets stay out of every repr. Pure.
# ------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A call without an accepted answer: the CP's reason or gRPC's code, and the words of it."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(name)
        self.name = name
        self.detail = detail


class BrokenError(Exception):
    """A file of ours that cannot be what we wrote; says why."""


@dataclass(frozen=True)
class Option:
    """One setting: its name, flag, key in the env file, default and help."""

    name: str
    flag: str
    env: str
    default: str
    help: str


# The one table behind flags, env file, defaults and `--help`. Flag > env file > default.
OPTIONS = (
    Option("token", "", "INVITE_TOKEN", "", "the invite; never a flag"),
    Option("wallet", "", "SOLANA_PAYOUT_PUBKEY", "", "Solana address for the payout"),
    Option("control_plane", "--control-plane", "CONTROL_PLANE", "10.77.0.1:9092", "host:port"),
    Option("data_dir", "--data-dir", "DATA_DIR", "/var/lib/openinfra", "holds the identity"),
    Option("env_file", "--env-file", "", "/etc/openinfra/agent.env", "file of the keys below"),
    Option("socket", "--socket", "", "/run/openinfra/agent.sock", "the control socket"),
    Option("wg_pubkey_file", "--wg-pubkey-file", "", "/etc/wireguard/openinfra.pub", "our key"),
    Option("wg_conf", "--wg-conf", "", "/etc/wireguard/openinfra.conf", "settings of the tunnel"),
    Option("guard_file", "--guard-file", "", "/run/openinfra/guard.json", "what guard found"),
    Option("lease_file", "--lease-file", "", "/run/openinfra/lease.json", "the right to run"),
    Option("secrets_dir", "--secrets-dir", "", "/run/openinfra/secrets", "workloads' secrets"),
    Option(
        "engine_socket",
        "--engine-socket",
        "",
        "/run/openinfra/engine.sock",
        "the container engine; `none`: this host takes no workload",
    ),
    Option("cgroup", "--cgroup", "", str(WORKLOADS_CGROUP), "holds a group for each workload"),
    Option("limits", "--limits", "", "/etc/openinfra/limits.conf", "what this machine lends"),
)
DEFAULTS = {option.name: option.default for option in OPTIONS}


@dataclass(frozen=True)
class Token:
    """An invite: its public id, and the whole text while it is unspent."""

    id: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class EnvFile:
    """The env file as it was read."""

    raw: bytes = field(repr=False)
    values: Mapping[str, str] = field(repr=False)
    mode: int
    uid: int


@dataclass(frozen=True)
class Config:
    """All that a person decided."""

    env_file: Path
    control_plane: str
    data_dir: Path
    socket: Path
    wg_pubkey_file: Path
    guard_file: Path
    lease_file: Path
    secrets_dir: Path
    engine_socket: Path
    cgroup: Path
    limits: Path
    wallet: str
    token: Token | None
    allow_unencrypted: bool


@dataclass(frozen=True)
class Identity:
    """What identity.json holds."""

    host_secret: str = field(repr=False)
    host_id: str | None
    invite_id: str | None
    session: str | None = field(repr=False)
    next_session: str | None = field(repr=False)


class Action(enum.Enum):
    """What the agent does about a refusal."""

    STOP = "stops, exit 78"
    RESUME = "opens a new session"
    MINUTE = "tries again every minute"
    BACK_OFF = "tries again with back-off"


STOP, RESUME, MINUTE, BACK_OFF = Action


@dataclass(frozen=True)
class Pause:
    """What paused.json holds; empty `since`: it cannot be read, and is a pause all the same."""

    since: str
    is_leaving: bool = False


@dataclass(frozen=True)
class Refusal:
    """What a refusal means to a person."""

    action: Action
    what: str
    todo: str


@dataclass(frozen=True)
class Finding:
    """One thing that doctor has to say. INFO alone is no fault."""

    level: str
    sentence: str
    command: str


@dataclass(frozen=True)
class Snapshot:
    """What doctor could see."""

    control_plane: str
    env_file: str
    data_dir: str
    wallet: str
    # none, used, unspent or unknown.
    invite: str
    # Findings of the checks that `run` makes too.
    problems: tuple[Finding, ...]
    # absent, registered, unregistered, or unknown when it could not be read.
    identity: str
    mounted: bool
    # None: could not be told.
    encrypted: bool | None
    allow_unencrypted: bool
    # Why the control plane's port cannot be reached; empty when it can.
    unreachable: str
    # skipped (loopback), ok, absent (no such interface), or why it cannot be told.
    wg: str
    # None: never.
    handshake_age_s: int | None
    # Why the firewall is not known to be in place; empty when it is.
    firewall: str
    # Units of ours that failed, also those that systemd tries again.
    failed_units: tuple[str, ...]
    # The version of the engine's runc; empty when it is not known.
    runc: str
    # The running agent's own words; None when none answers.
    status: Mapping[str, Any] | None
    # Why the control plane ended the agent, if it did: reason, what, todo.
    refused: Mapping[str, str] | None
    pause: Pause | None


@dataclass(frozen=True)
class Guard:
    """What guard.json holds; seconds of CLOCK_BOOTTIME, and hashes of what was asked and found."""

    at_s: float
    error: str = ""
    wanted_sha256: str = ""
    listed_sha256: str = ""
    endpoint_error: str = ""
    endpoints: str = ""  # the control plane's addresses; of an interface that is gone the last ones


class EngineError(Exception):
    """What the container engine could not do: its HTTP status (0: none came), and its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class NoSecretsError(EngineError):
    """A workload's secrets are not here, so that it cannot be started."""

    def __init__(self, words: str) -> None:
        super().__init__(503, words)


class Refuse(Exception):
    """Why this host does not take an assignment: the field, and what is wrong with it."""


@dataclass(frozen=True)
class Limits:
    """What the provider lends, never more than the machine has; and whose images it takes."""

    cpu_milli: int
    memory_bytes: int
    registry: str = ""  # any, where no installer was


class Restart(enum.IntEnum):
    """What follows when a workload's process ends; the contract's numbers."""

    ALWAYS = 1
    ON_FAILURE = 2
    NEVER = 3


@dataclass(frozen=True)
class Wish:
    """An assignment that this host takes; `sha256` is of the container that it asks for."""

    assignment_id: str
    fence: int
    workload_id: str
    image: str
    command: tuple[str, ...] = field(repr=False)
    env: tuple[tuple[str, str], ...] = field(repr=False)
    cpu_milli: int
    memory_bytes: int
    # Inside, and on the host's address in the tunnel.
    ports: tuple[tuple[int, int], ...]
    has_internet: bool
    restart: Restart
    # It ended for good, as this host said once.
    is_done: bool = False
    # Contents of files by their names; none when they are withheld, and it has some all the same.
    has_secrets: bool = False
    secrets: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    sha256: str = ""


@dataclass(frozen=True)
class Container:
    """A container of ours as the engine has it; from `has_ended` on of its end."""

    id: str
    name: str
    assignment_id: str
    wish_sha256: str
    is_running: bool
    # It has a process, and the guard keeps that from going on.
    is_frozen: bool = False
    has_ended: bool = False
    exit_code: int = 0
    is_oom: bool = False
    error: str = ""
    # Seconds since the epoch, by this machine's clock; of its last run.
    started_at_s: float = 0.0
    ended_at_s: float = 0.0


@dataclass(frozen=True)
class Past:
    """What the agent remembers of one assignment; forgotten when its wish changes."""

    wish_sha256: str = ""
    has_image: bool = False
    # Of the last start, and of the end that followed; None: not yet.
    started_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    restarts: int = 0
    # Ends in a row, each after less than STEADY_S.
    streak: int = 0
    # True when we ended it ourselves, since the right to run was over.
    is_stopped: bool = False
    # When the run began whose end is noted here, as the engine says it; 0: of none.
    run_at_s: float = 0.0
    # Why this run is ended, or was: it took what nobody sells.
    excess: str = ""
    # What is above (PAST_KEPT) is in the lease file: the next agent of this boot has it too.
    # What the engine could not do, how often, and when it is tried again.
    trouble: str = ""
    tries: int = 0
    retry_at_s: float = 0.0
    was_full: bool = False
    # Why this host cannot run it.
    rejected: str = ""


@dataclass(frozen=True)
class Taken:
    """What a container took of the machine: forks that the kernel refused it since its start, and
    its newest log: the inode and the bytes, 0 for none."""

    refused: int = 0
    log_inode: int = 0
    log_bytes: int = 0


@dataclass(frozen=True)
class Strain:
    """What it took when it was looked at last (CLOCK_BOOTTIME), and how much too much that is."""

    at_s: float
    taken: Taken
    forks: float = 0.0
    log_bytes: float = 0.0


@dataclass(frozen=True)
class Lease:
    """What is in the lease file: the right to run, and what goes with it.

    `until_s` is of CLOCK_BOOTTIME. `ports` are published; `seen` is the home's address as the hub
    sees it; `pasts` are of those that ended of late and are started again.
    """

    until_s: float = 0.0
    kept: frozenset[str] = frozenset()
    ports: tuple[int, ...] = ()
    seen: str = ""
    pasts: Mapping[str, Past] = field(default_factory=dict)


class Verb(enum.Enum):
    """The steps from what the engine has to what is wished."""

    PULL = "pull"
    CREATE = "create"
    START = "start"
    TERM = "term"
    KILL = "kill"
    REMOVE = "remove"


@dataclass(frozen=True)
class Step:
    """One thing to do; no two with the same key at one time."""

    verb: Verb
    assignment_id: str
    container_id: str = ""
    wish: Wish | None = None
    network: str = ""

    @property
    def key(self) -> str:
        """A stop goes on beside what else is done to the same assignment."""
        is_stop = self.verb in (Verb.TERM, Verb.KILL)
        return f"stop {self.container_id}" if is_stop else self.assignment_id


@dataclass(frozen=True)
class Reading:
    """What the engine says of a container that runs: in all since its start, and memory now."""

    at_s: float
    cpu_ns: int
    memory_bytes: int
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True)
class Count:
    """What a container used in one boot; kept after its end until the control plane has it."""

    assignment_id: str
    boot_id: str
    container_id: str
    cpu_ns: int = 0
    memory_byte_s: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    # Of the last reading: cpu_ns, rx_bytes, tx_bytes; they begin at nothing when it starts again.
    last: tuple[int, int, int] = (0, 0, 0)
    # When that was, in this boot; 0: not yet.
    read_s: float = 0.0
    # True when a heartbeat may have brought it to the control plane.
    is_sent: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """A container that is there after a reboot has one of each boot."""
        return self.boot_id, self.container_id

    @property
    def sums(self) -> tuple[int, int, int, int]:
        """What is told."""
        return self.cpu_ns, self.memory_byte_s, self.rx_bytes, self.tx_bytes


@dataclass
class Memory:
    """What the agent remembers of its workloads, beside what the engine says."""

    pasts: dict[str, Past] = field(default_factory=dict)
    # When a container was told to stop.
    stops: dict[str, float] = field(default_factory=dict)
    # Of containers that run.
    strains: dict[str, Strain] = field(default_factory=dict)
    # Assignments of the lease: they run on while the list is not known.
    kept: frozenset[str] = frozenset()
    # Those that may run elsewhere by now.
    late: frozenset[str] = frozenset()


@dataclass
class Workloads:
    """All that the daemon knows of workloads. Times are seconds of CLOCK_BOOTTIME."""

    engine: Engine
    secrets_dir: Path
    ended_file: Path
    limits: Limits
    threads: ThreadPoolExecutor
    pulls: asyncio.Semaphore
    quick: asyncio.Semaphore
    stops: asyncio.Semaphore
    log_reads: asyncio.Semaphore
    saving: asyncio.Lock
    # Set when there is something to look at.
    stirred: asyncio.Event

    # What a pull shows to the registry; the session itself goes to CONTROL_PLANE alone.
    registry_password: str = field(default="", repr=False)
    engine_version: str = ""
    engine_home: str = ""
    engine_server: str = ""
    engine_error: str = "it was not asked yet"
    engine_asked_s: float = -ENGINE_VERSION_AGE_S
    # Since when it gives no answer; None: it does.
    engine_lost_s: float | None = None
    is_engine_logged: bool = False
    is_lost: bool = False
    # Since when this host can take no workload; None: it can.
    unready_s: float | None = None
    lease_error: str = ""
    lease_told: str = ""

    # This host's address in the tunnel, and its home's in the internet; empty while not known.
    address: str = ""
    seen: str = ""
    # Published ones, of the list that was known last.
    ports: tuple[int, ...] = ()
    revision: int = 0
    # The list that was known before the engine was last looked at, with nothing else under way:
    # what is not in that list and was not seen is gone.
    seen_revision: int = 0
    # None: the list did not come yet.
    wishes: tuple[Wish, ...] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    right_until_s: float = 0.0
    saved_lease: Lease | None = None
    # The wall clock's lead over that of the boot when a heartbeat was last answered.
    wall_lead_s: float = math.inf

    containers: tuple[Container, ...] = ()
    # Names of our networks, by assignment.
    networks: dict[str, str] = field(default_factory=dict)
    ends: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    looks: int = 0
    memory: Memory = field(default_factory=Memory)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    # When each image was last wished for, and when images were last looked through.
    used_s: dict[str, float] = field(default_factory=dict)
    tidied_s: float = -TIDY_S
    is_full: bool = False
    # Those that were at work when the engine was last looked at.
    busy: frozenset[str] = frozenset()
    # How far each image is that is pulled now: one pull serves all that wait for it.
    progress: dict[str, str] = field(default_factory=dict)
    # What ends a pull that nobody wants any more.
    sockets: dict[Wish, socket.socket] = field(default_factory=dict)
    # What the last accepted heartbeat said; None: nothing in this session.
    acknowledged: pb.Observed | None = None
    last_states: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    last_trouble: str = ""
    # What the control plane asks for, by its request_id, until the answer went out once.
    logs: dict[int, asyncio.Task[pb.LogAnswer]] = field(default_factory=dict)

    # By boot and container, in the order of their beginning; what the control plane acknowledged
    # of them, and when; what was read right before a stop; which are to be read, and since when.
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    told: dict[tuple[str, str], tuple[int, int, int, int]] = field(default_factory=dict)
    told_s: dict[tuple[str, str], float] = field(default_factory=dict)
    parting: list[tuple[str, str, Reading]] = field(default_factory=list)
    # When a container was started, until it was read after that.
    begun_s: dict[str, float] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    metered_s: float = 0.0
    is_usage_warned: bool = False

    nudge: socket.socket | None = None
    nudge_address: str = ""


@dataclass
class Agent:
    """The daemon's memory. Times are seconds of CLOCK_BOOTTIME, which counts through suspend."""

    config: Config
    identity: Identity
    wg_pubkey: str
    disk_encrypted: bool
    takes_secrets: bool
    boot_id: str
    started_s: float
    stub: openinfra_pb2_grpc.AgentApiAsyncStub
    channel: grpc.aio.Channel
    # Set when the channel comes up; ends a wait before the first accepted heartbeat.
    ready: asyncio.Event
    # Set by a nudge, and when what the host has of assignments changed; ends a wait between two
    # accepted heartbeats.
    wake: asyncio.Event
    workloads: Workloads
    # asyncio's clock at the last step of the main loop, for the watchdog.
    moved_s: float = 0.0

    # While the provider wants no workloads; since when they are to end; what was heard of it.
    pause: Pause | None = None
    paused_s: float = 0.0
    told_pause: Pause | None = None

    # The session: closed until Register or Resume was answered.
    is_open: bool = False
    seq: int = 1
    session_heartbeats: int = 0
    acknowledged_facts: pb.Facts | None = None
    # True while identity.json is older than `identity`.
    is_unsaved: bool = False
    is_save_warned: bool = False
    # True once the env file was scrubbed, or could not be.
    is_settled: bool = False

    state: str = "starting"
    is_connected: bool = False
    is_running_logged: bool = False
    nominal_s: float = INTERVAL_NOMINAL_S
    interval_s: float = INTERVAL_NOMINAL_S
    heartbeats: int = 0
    last_heartbeat_s: float | None = None
    standing: pb.Standing | None = None
    warned_reason: str = ""
    onchain_payout: bool | None = None
    # What the control plane said last: this month's.
    earnings: str = ""

    # The present trouble; attempt counts the tries that failed since the last accepted heartbeat.
    attempt: int = 0
    trouble: str = ""
    trouble_logged_s: float = 0.0
    # True when a connection that comes up should end the wait.
    is_wakeable: bool = False
    # True when the last heartbeat was accepted: then `wake` ends the wait.
    is_nudgeable: bool = False
    last_error: dict[str, str] | None = None
    clients: int = 0


# ------------------------------------------------------------------------------------------------
# Rules: what is right, decided from arguments alone, in the order of a host's life. Pure.
# ------------------------------------------------------------------------------------------------


def parse_env(raw: bytes, name: str) -> dict[str, str]:
    """Read the env file as systemd's EnvironmentFile would; values never reach an error."""
    known = {option.env for option in OPTIONS if option.env}
    values: dict[str, str] = {}
    for number, line in enumerate(raw.split(b"\n"), 1):
        text = line.strip(b" \t\r").decode("utf-8", "replace")
        if not text or text[0] in "#;":
            continue
        key, equals, value = text.partition("=")
        key = key.rstrip(" \t")
        if not equals or not ENV_KEY_RE.fullmatch(key):
            raise Error(f"{name}:{number}: line is not KEY=VALUE", "correct that line", USAGE)
        if key not in known:
            raise Error(f"{name}:{number}: unknown key {key}", "remove that line", USAGE)
        if key in values:
            raise Error(f"{name}:{number}: {key} stands there twice", "keep one line", USAGE)
        parsed = parse_env_value(value.lstrip(" \t"))
        if parsed is None:
            raise Error(
                f"{name}:{number}: value of {key} is malformed", "write it plainly, in ASCII", USAGE
            )
        values[key] = parsed
    return values


def parse_env_value(value: str) -> str | None:
    """Take one pair of quotes off; None for what systemd might read otherwise than we do."""
    if value[:1] in ("'", '"') and value:
        if len(value) < 2 or value[-1] != value[0]:
            return None
        value = value[1:-1]
    if any(char in "'\"\\" or not " " <= char <= "~" for char in value):
        return None
    return value


def scrub_env(raw: bytes, token: Token) -> bytes:
    """Put the used form in place of the token's value; every other byte stays."""
    lines = raw.split(b"\n")
    for number, line in enumerate(lines):
        if line.strip(b" \t\r").partition(b"=")[0].rstrip(b" \t") == b"INVITE_TOKEN":
            used = f"oi1_{token.id}_used".encode()
            lines[number] = line.replace(token.text.encode(), used)
    return b"\n".join(lines)


def parse_address(control_plane: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read the address in host:port; localhost is 127.0.0.1, and what is none is `::`, nowhere."""
    host = control_plane.rpartition(":")[0]
    try:
        if host[:1] == "[" and host[-1:] == "]":
            return ipaddress.IPv6Address(host[1:-1])
        return ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return ipaddress.IPv6Address(0)


def parse_control_plane(text: str) -> str:
    """Check host:port, which is on this machine or in the tunnel; give it back as it was."""
    host, _, port = text.rpartition(":")
    given, todo = parse_line(text, 80), "write 10.77.0.1:9092"
    if not (host and re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65_535):
        raise Error(f"CONTROL_PLANE {given} is not host:port", todo, USAGE)
    address = parse_address(text)
    if not address.is_loopback and address not in TUNNEL:
        what = f"CONTROL_PLANE {given} is outside the tunnel, which alone protects the calls"
        raise Error(what, todo, USAGE)
    return text


def parse_wallet(text: str) -> str:
    """Check a Solana address, base58 of 32 bytes; empty is none."""
    if not text:
        return ""
    number = 0
    for char in text[:64]:
        if char not in BASE58:
            number = -1
            break
        number = number * 58 + BASE58.index(char)
    zeros = len(text) - len(text.lstrip("1"))
    if number <= 0 or len(text) > 44 or zeros + (number.bit_length() + 7) // 8 != 32:
        raise Error(
            "SOLANA_PAYOUT_PUBKEY is not a Solana address", "copy it again, or empty it", USAGE
        )
    return text


def parse_token(text: str) -> Token | None:
    """Read INVITE_TOKEN: unspent, used (empty text) or none; refuse a mistyped one."""
    if not text:
        return None
    used = TOKEN_USED_RE.fullmatch(text)
    if used:
        return Token(used[1], "")
    match = TOKEN_RE.fullmatch(text)
    if match and f"{zlib.crc32(match['body'].encode()):08x}" == match["crc"]:
        return Token(match["id"], text)
    start = TOKEN_START_RE.match(text)
    shown = f" (invite {start[1]})" if start else ""
    raise Error(
        f"INVITE_TOKEN was mistyped{shown}", "copy it again from the operator's message", USAGE
    )


def parse_token_state(token: Token | None) -> str:
    """Say `none`, `used` or `unspent`."""
    if token is None:
        return "none"
    return "unspent" if token.text else "used"


def decide_config(args: argparse.Namespace, env: EnvFile) -> Config:
    """Settle every option: flag > env file > default."""
    value = {
        option.name: getattr(args, option.name, None)
        or env.values.get(option.env)
        or option.default
        for option in OPTIONS
    }
    return Config(
        env_file=Path(value["env_file"]),
        control_plane=parse_control_plane(value["control_plane"]),
        data_dir=Path(value["data_dir"]),
        socket=Path(value["socket"]),
        wg_pubkey_file=Path(value["wg_pubkey_file"]),
        guard_file=Path(value["guard_file"]),
        lease_file=Path(value["lease_file"]),
        secrets_dir=Path(value["secrets_dir"]),
        engine_socket=Path(value["engine_socket"]),
        cgroup=Path(value["cgroup"]),
        limits=Path(value["limits"]),
        wallet=parse_wallet(value["wallet"]),
        token=parse_token(value["token"]),
        allow_unencrypted=args.allow_unencrypted,
    )


def parse_identity(raw: bytes) -> Identity:
    """Read identity.json; raise BrokenError for what we cannot have written."""
    if len(raw) > IDENTITY_MAX_BYTES:
        raise BrokenError("too large")
    try:
        data = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError):
        raise BrokenError("empty" if not raw.strip(b"\0 \n") else "not JSON") from None
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise BrokenError("no format number")
    if data["format"] > IDENTITY_FORMAT:
        raise Error(
            f"{IDENTITY_NAME} is of a newer agent: format {data['format']}",
            "install that",
            IDENTITY,
        )
    if data.pop("format") != IDENTITY_FORMAT:
        raise BrokenError("unknown format number")
    forms = {
        "host_secret": HEX_32_RE,
        "host_id": HOST_ID_RE,
        "invite_id": INVITE_ID_RE,
        "session": HEX_32_RE,
        "next_session": HEX_32_RE,
    }
    if data.keys() != forms.keys():
        raise BrokenError("keys are missing or too many")
    for key, form in forms.items():
        value = data[key]
        if value is None and key != "host_secret":
            continue
        if not isinstance(value, str) or not form.fullmatch(value):
            raise BrokenError(f"{key} is malformed")
    is_registered = data["host_id"] is not None
    if is_registered != (data["session"] is not None) or not (
        is_registered or data["next_session"]
    ):
        raise BrokenError("host_id and sessions do not fit together")
    return Identity(**data)


def render_identity(identity: Identity) -> bytes:
    """Write identity.json; parse_identity reads it back."""
    data = {
        "format": IDENTITY_FORMAT,
        "host_secret": identity.host_secret,
        "host_id": identity.host_id,
        "invite_id": identity.invite_id,
        "session": identity.session,
        "next_session": identity.next_session,
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def parse_pause(raw: bytes) -> Pause:
    """Read paused.json: that it is there pauses, so what cannot be read is a pause too."""
    try:
        data = json.loads(raw)
        return Pause(parse_line(str(data["since"]), NAMED_MAX), data["leaving"] is True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Pause("")


def render_pause(pause: Pause) -> bytes:
    """Write paused.json; parse_pause reads it back."""
    return json.dumps({"since": pause.since, "leaving": pause.is_leaving}).encode() + b"\n"


def decide_pause(cmd: str, before: Pause | None, now: str) -> Pause | None:
    """What follows on `pause`, `unpause` or `leave`; a host that leaves does so until unpaused."""
    if cmd == "unpause":
        return None
    is_leaving = cmd == "leave" or (before is not None and before.is_leaving)
    return Pause(before.since if before and before.since else now, is_leaving)


def decide_start(identity: Identity | None, token: Token | None) -> None:
    """Refuse to start without a way to be some host."""
    if identity is not None and identity.host_id is not None:
        return
    if token is None:
        raise Error(
            "no identity and no invite",
            "ask the operator for an invite, put it into agent.env",
            IDENTITY,
        )
    if not token.text:
        raise Error(
            "invite already used",
            "ask the operator for a fresh invite",
            IDENTITY,
            invite_id=token.id,
        )


def parse_hostname(text: str) -> str:
    """Make a host name fit the contract: at most 253 printable ASCII characters."""
    return "".join(char if "!" <= char <= "~" else "-" for char in text)[:253]


def parse_memory_bytes(meminfo: str) -> int:
    """Find MemTotal in /proc/meminfo; 0 when it is not there."""
    match = re.search(r"^MemTotal:\s+([0-9]+) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def parse_status(status: int) -> str:
    """Name a HostStatus in lower case; a newer control plane may know more of them."""
    if status not in pb.HostStatus.values() or status == pb.HOST_STATUS_UNSPECIFIED:
        return "unknown"
    return pb.HostStatus.Name(cast("pb.HostStatus.ValueType", status))[12:].lower()


def parse_line(text: str, limit: int = 300) -> str:
    """Make words from elsewhere safe for one line on a terminal or in a log."""
    line = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def decide_interval_s(next_heartbeat_ms: int, nominal_s: float) -> float:
    """Bound what the control plane asked for; 0 is no answer and means the nominal interval."""
    asked_s = next_heartbeat_ms / 1000 if next_heartbeat_ms else nominal_s
    return min(INTERVAL_MAX_S, max(INTERVAL_MIN_S, asked_s))


def decide_retry_s(attempt: int, accepted_before: bool, random_unit: float) -> float:
    """Choose the wait after the attempt-th failure: short until the host was online, then polite.

    Full jitter up to 60 s spreads a fleet that lost its control plane over a minute.
    """
    step = float(2 ** min(max(attempt, 1), 6))
    if not accepted_before:
        return min(RETRY_FIRST_MAX_S, step / 2) * (0.5 + 0.5 * random_unit)
    return max(RETRY_MIN_S, min(RETRY_LATER_MAX_S, step) * random_unit)


def decide_delay_s(action: Action, attempt: int, accepted_before: bool, unit: float) -> float:
    """Choose the wait before the next call after a refusal that does not stop the agent."""
    if action is RESUME:
        return 0.0
    if action is MINUTE:
        return 55.0 + 10.0 * unit
    return decide_retry_s(attempt, accepted_before, unit)


ASK_FRESH = "ask the operator for a fresh invite"
# One row for each pb.Reason, in its order; the comments there say the same.
REFUSALS = {
    "REASON_UNSPECIFIED": Refusal(MINUTE, "control plane gave no reason", "ask the operator"),
    "BAD_REQUEST": Refusal(
        MINUTE, "control plane does not understand this agent", "upgrade: run install_agent.py"
    ),
    "UNKNOWN_INVITE": Refusal(STOP, "unknown invite", ASK_FRESH),
    "INVITE_USED": Refusal(STOP, "invite already used", ASK_FRESH),
    "INVITE_REVOKED": Refusal(STOP, "operator revoked the invite", ASK_FRESH),
    "INVITE_EXPIRED": Refusal(STOP, "invite expired before it was redeemed", ASK_FRESH),
    "INVITE_FOR_OTHER_KEY": Refusal(
        STOP,
        "invite was minted for another WireGuard key",
        "send the operator /etc/wireguard/openinfra.pub and ask for a fresh invite",
    ),
    "ADDRESS_TAKEN": Refusal(
        MINUTE, "another host has this tunnel address", "ask the operator to free it"
    ),
    "KEY_TAKEN": Refusal(
        STOP,
        "another host, perhaps a revoked one, has this WireGuard key",
        "ask the operator which host has it; if it is not yours, make a new key",
    ),
    "WRONG_ADDRESS": Refusal(
        MINUTE,
        "control plane sees another tunnel address than this host's",
        "compare Address in /etc/wireguard/openinfra.conf with what the operator gave you",
    ),
    "UNKNOWN_HOST": Refusal(
        MINUTE,
        "control plane knows no host with this identity",
        "ask the operator for a fresh invite, for: install_agent.py --new-invite",
    ),
    "HOST_REVOKED": Refusal(STOP, "operator revoked this host", "ask the operator why"),
    "HOST_QUARANTINED": Refusal(
        MINUTE,
        "host is quarantined: two machines used its identity in turn",
        "stop the other machine, then ask the operator to release this host",
    ),
    "SESSION_SUPERSEDED": Refusal(
        STOP,
        "another agent holds this identity",
        "stop the agent on the copy of this machine, then: systemctl start openinfra-agent",
    ),
    "UNKNOWN_SESSION": Refusal(
        RESUME, "control plane does not know this session", "wait: the agent opens a new one"
    ),
    "TRY_LATER": Refusal(
        BACK_OFF, "control plane cannot take requests now", "wait: the agent tries again"
    ),
}
UNREACHABLE = Refusal(
    BACK_OFF, "cannot reach control plane", "is the tunnel up? try: wg show openinfra"
)
NO_TUNNEL = Refusal(
    BACK_OFF, "no tunnel to the control plane", "sudo systemctl restart wg-quick@openinfra"
)


def decide_refusal(name: str) -> Refusal:
    """Look up a pb.Reason, NO_TUNNEL or a gRPC code (they share no name)."""
    if name in REFUSALS:
        return REFUSALS[name]
    if name == "NO_TUNNEL":
        return NO_TUNNEL
    if name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return UNREACHABLE
    if name in ("CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED"):
        return REFUSALS["TRY_LATER"]
    return Refusal(
        MINUTE, f"control plane gave no usable answer ({name})", "is CONTROL_PLANE its address?"
    )


def decide_error(
    refused: RefusedError, refusal: Refusal, identity: Identity, invite_id: str
) -> Error:
    """Make the error with which a refused agent ends."""
    pairs: dict[str, object] = {"host_id": identity.host_id}
    if identity.host_id is None:
        pairs = {"invite_id": invite_id}
    if refused.name != "INVITE_USED":
        pairs["detail"] = refused.detail
    return Error(refusal.what, refusal.todo, IDENTITY, **pairs)


def parse_installed(text: str) -> str:
    """The registry, from install.json: it is where this agent came from."""
    try:
        match = re.match(r"https?://([^/?#]+)", str(json.loads(text)["url"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return match[1].lower() if match else ""


def parse_limits(
    text: str, name: str, cpu_count: int, memory_bytes: int, registry: str = ""
) -> Limits:
    """Read limits.conf; what it does not say is all cores but one, and 70 % of the memory."""
    cpu_milli = max(500, (cpu_count - 1) * 1000)
    lent_bytes = int(memory_bytes * LEND_MEMORY)
    todo = "write lines like CPUS=1.5 and MEMORY=2G, then: sudo systemctl restart openinfra-agent"
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        key, _, value = (part.strip() for part in line.partition("="))
        if not key or key[0] in "#;":
            continue
        cpus = re.fullmatch(r"[0-9]{1,5}(?:\.[0-9]{1,3})?", value)
        size = re.fullmatch(r"([0-9]{1,18})([KMG]?)", value)
        if key == "CPUS" and cpus and float(value) > 0 and key not in seen:
            cpu_milli = round(float(value) * 1000)
        elif key == "MEMORY" and size and int(size[1]) > 0 and key not in seen:
            lent_bytes = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
        elif key == "REGISTRY" and re.fullmatch(r"[a-z0-9.:-]+", value) and key not in seen:
            registry = value
        else:
            raise Error(f"{name}:{number}: line is no limit, or a second one", todo, USAGE)
        seen.add(key)
    return Limits(min(cpu_milli, cpu_count * 1000), min(lent_bytes, memory_bytes), registry)


def parse_assignment(assignment: pb.Assignment, offered: Limits) -> Wish:
    """Take an assignment, or raise Refuse: the container is root's to make, so nothing is trusted.

    What a newer control plane asks for and this agent does not know is refused, not left out.
    """
    known = type(assignment)()
    known.CopyFrom(assignment)
    known.DiscardUnknownFields()
    named, image = assignment.assignment_id, assignment.image
    command, env = tuple(assignment.command), tuple(sorted(assignment.env.items()))
    texts = (*command, *(f"{key}={value}" for key, value in env))
    size = sum(len(text.encode()) + 1 for text in texts)
    over = "that this host has left to lend"
    check_fits("assignment has fields unknown here", known.ByteSize() == assignment.ByteSize())
    check_fits("assignment_id is no UUID", UUID_RE.fullmatch(named))
    check_fits("workload_id is no UUID", UUID_RE.fullmatch(assignment.workload_id))
    is_named = IMAGE_RE.fullmatch(image) and len(image.partition("@")[0]) <= 255
    check_fits("image is not <registry>/<namespace>/<name>@<digest>", is_named)
    of = f"image is of another registry than {offered.registry}"
    check_fits(of, offered.registry in ("", image.partition("/")[0]))
    check_fits("command has a NUL", not any("\0" in word for word in command))
    for key, value in env:
        shown = parse_line(key, NAMED_MAX)
        check_fits(f"env has a key that is no name: {shown}", WORKLOAD_ENV_RE.fullmatch(key))
        check_fits(f"env has a NUL in {shown}", "\0" not in value)
    check_fits(f"command and env are over {COMMAND_MAX_BYTES} bytes", size <= COMMAND_MAX_BYTES)
    cpus, memory = assignment.cpu_milli, assignment.memory_bytes
    check_fits(f"cpu_milli is under {CPU_MIN_MILLI}", cpus >= CPU_MIN_MILLI)
    check_fits(f"cpu_milli is over the {offered.cpu_milli} {over}", cpus <= offered.cpu_milli)
    check_fits(f"memory_bytes is under {MEMORY_MIN_BYTES}", memory >= MEMORY_MIN_BYTES)
    is_left = memory <= offered.memory_bytes
    check_fits(f"memory_bytes is over the {offered.memory_bytes} {over}", is_left)
    is_known = assignment.egress in (pb.EGRESS_NONE, pb.EGRESS_INTERNET)
    check_fits("egress is none that is known here", is_known)
    check_fits("restart is none that is known here", assignment.restart in [*Restart])
    return Wish(
        assignment_id=named,
        fence=assignment.fence,
        workload_id=assignment.workload_id,
        image=image,
        command=command,
        env=env,
        cpu_milli=cpus,
        memory_bytes=memory,
        ports=parse_ports(assignment.ports),
        has_internet=assignment.egress == pb.EGRESS_INTERNET,
        restart=Restart(assignment.restart),
        is_done=assignment.done,
        has_secrets=bool(assignment.secrets) or assignment.secrets_withheld,
        secrets=parse_secrets(assignment.secrets),
    )


def check_fits(why: str, is_right: object) -> None:
    """Raise Refuse with what is wrong, unless it is right."""
    if not is_right:
        raise Refuse(why)


def parse_secrets(secrets: Mapping[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    """Take the secrets of one assignment; no value is in a refusal."""
    check_fits(f"secrets are more than {SECRETS_MAX}", len(secrets) <= SECRETS_MAX)
    for name in secrets:
        shown = parse_line(name, NAMED_MAX)
        check_fits(
            f"secrets have a name that is none of a file: {shown}", SECRET_RE.fullmatch(name)
        )
    size = sum(len(name) + len(value) for name, value in secrets.items())
    check_fits(f"secrets are over {SECRETS_MAX_BYTES} bytes", size <= SECRETS_MAX_BYTES)
    return tuple(sorted(secrets.items()))


def parse_ports(ports: Sequence[pb.Port]) -> tuple[tuple[int, int], ...]:
    """Take the ports of one assignment."""
    check_fits(f"ports are more than {PORTS_MAX}", len(ports) <= PORTS_MAX)
    pairs = tuple((port.container_port, port.host_port) for port in ports)
    span = f"{HOST_PORTS[0]} to {HOST_PORTS[-1]}"
    for inside, outside in pairs:
        check_fits(f"ports has container_port {inside}, not 1 to 65535", 1 <= inside <= 65_535)
        check_fits(f"ports has host_port {outside}, not {span}", outside in HOST_PORTS)
    for each in zip(*pairs, strict=True):
        check_fits("ports has one twice", len(set(each)) == len(each))
    return pairs


def decide_wishes(
    assignments: Sequence[pb.Assignment], offered: Limits, address: str, secrets_dir: Path
) -> tuple[tuple[Wish, ...], dict[str, str]]:
    """Take the list as far as it fits, in its order; the others' reasons, by their ids."""
    wishes: dict[str, Wish] = {}
    refused: dict[str, str] = {}
    ports: set[int] = set()
    left = offered
    for assignment in assignments[: 2 * ASSIGNMENTS_MAX]:
        name = assignment.assignment_id[:NAMED_MAX]
        if name in wishes or name in refused:
            continue
        try:
            wish = parse_assignment(assignment, offered if assignment.done else left)
            check_fits("ports has a host_port of another assignment", not ports & {*outer(wish)})
            check_fits(
                f"assignment is beyond the first {ASSIGNMENTS_MAX}", len(wishes) < ASSIGNMENTS_MAX
            )
        except Refuse as why:
            refused[name] = str(why)
            continue
        if not wish.is_done:
            memory_bytes = left.memory_bytes - wish.memory_bytes
            left = replace(
                left, cpu_milli=left.cpu_milli - wish.cpu_milli, memory_bytes=memory_bytes
            )
        ports |= {*outer(wish)}
        sha256 = render_container(wish, address, secrets_dir)["Labels"]["openinfra.wish"]
        wishes[name] = replace(wish, sha256=sha256)
    return tuple(wishes.values()), refused


def outer(wish: Wish) -> Iterator[int]:
    """The ports that a workload has on the host."""
    return (port for _, port in wish.ports)


def render_network_name(wish: Wish) -> str:
    """Name a workload's bridge; the firewall knows by it what may pass, and 15 characters fit."""
    prefix = "oi-" if wish.has_internet else "ox-"
    return prefix + wish.assignment_id.replace("-", "")[:11]


def render_network(wish: Wish) -> dict[str, Any]:
    """Write the body of POST /networks/create: a bridge of its own, from the engine's addresses."""
    name = render_network_name(wish)
    return {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": "bridge",
        "EnableIPv6": False,
        "Options": {"com.docker.network.bridge.name": name},
        "Labels": {LABEL: wish.assignment_id},
    }


def render_container(wish: Wish, address: str, secrets_dir: Path) -> dict[str, Any]:
    """Write the body of POST /containers/create: the sandbox, whatever the assignment says.

    Of the host there is nothing in it but a directory with the workload's own secrets, no
    capability, no way to write but to memory; the default seccomp filter and the engine's user
    namespace are there because nothing here turns them off.
    """
    network = render_network_name(wish)
    body: dict[str, Any] = {
        "Image": wish.image,
        "User": f"{WORKLOAD_UID}:{WORKLOAD_UID}",
        "Env": [f"OPENINFRA_FENCE={wish.fence}", *(f"{key}={value}" for key, value in wish.env)],
        "ExposedPorts": {f"{inner}/tcp": {} for inner, _ in wish.ports},
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": {
            LABEL: wish.assignment_id,
            "openinfra.workload": wish.workload_id,
            "openinfra.fence": str(wish.fence),
        },
        "HostConfig": {
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": render_tmpfs(wish)},  # noqa: S108 the container's own
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "Init": True,
            "PidsLimit": PIDS_MAX,
            "Memory": wish.memory_bytes,
            "MemorySwap": wish.memory_bytes,
            "NanoCpus": wish.cpu_milli * 1_000_000,
            "OomScoreAdj": 500,
            "Ulimits": [
                {"Name": "nofile", "Soft": 1024, "Hard": 4096},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "local", "Config": {"max-size": "5m", "max-file": "2"}},
            "NetworkMode": network,
            "Dns": ["9.9.9.9", "1.1.1.1"],
            "PortBindings": {
                f"{inner}/tcp": [{"HostIp": address, "HostPort": str(port)}]
                for inner, port in wish.ports
            },
        },
        "NetworkingConfig": {"EndpointsConfig": {network: {}}},
    }
    if wish.command:
        body["Cmd"] = [*wish.command]
    if wish.has_secrets:
        source = str(secrets_dir / wish.assignment_id)  # a UUID
        mount = {"Type": "bind", "Source": source, "Target": SECRETS_TARGET, "ReadOnly": True}
        body["HostConfig"]["Mounts"] = [mount]
    text = json.dumps([body, render_network(wish)], sort_keys=True)
    body["Labels"]["openinfra.wish"] = hashlib.sha256(text.encode()).hexdigest()
    return body


def render_tmpfs(wish: Wish) -> str:
    """Write the options of a directory in memory; it counts as the workload's memory."""
    owner = f"uid={WORKLOAD_UID},gid={WORKLOAD_UID},mode=0700"
    return f"rw,noexec,nosuid,nodev,size={wish.memory_bytes // 2},{owner}"


def parse_volumes(config: object, has_secrets: bool = False) -> tuple[str, ...]:
    """List the volumes that an image declares; raise Refuse for those that have no place here."""
    volumes = config.get("Volumes") if isinstance(config, dict) else None
    found = tuple(sorted(volumes)) if isinstance(volumes, dict) else ()
    check_fits(f"image has more than {VOLUMES_MAX} volumes", len(found) <= VOLUMES_MAX)
    for path in found:
        is_right = VOLUME_RE.fullmatch(path) and not {".", ".."} & {*path.split("/")}
        # /var/run leads to /run in many images.
        below_run = re.sub("^/var/run(?=/)", "/run", f"{path}/")
        is_right = is_right and not below_run.startswith(f"{SECRETS_TARGET}/")
        is_right = is_right and not (has_secrets and path.rstrip("/") == "/var/run")
        check_fits(f"image has a volume with no place here: {parse_line(path, 80)}", is_right)
    return found


def parse_answer(status: int, raw: bytes) -> Any:
    """Read the engine's answer; raise EngineError with its words when it says no."""
    if len(raw) > ENGINE_ANSWER_MAX_BYTES:
        raise EngineError(502, "the engine's answer is too long")
    try:
        data = json.loads(raw) if raw.strip() else None
    except (ValueError, RecursionError):
        raise EngineError(502, "the engine's answer could not be read") from None
    if status >= 400:
        words = data.get("message") if isinstance(data, dict) else None
        raise EngineError(status, parse_line(str(words or f"HTTP status {status}"), 500))
    return data


def parse_container(row: Mapping[str, Any], end: Mapping[str, Any] | None) -> Container:
    """Read a row of GET /containers/json, and the State of its end where it has one."""
    labels, state = row.get("Labels") or {}, str(row.get("State"))
    found = Container(
        id=str(row.get("Id")),
        name=str((row.get("Names") or ["/"])[0])[1:],
        assignment_id=str(labels.get(LABEL)),
        wish_sha256=str(labels.get("openinfra.wish")),
        is_running=state in ("running", "paused", "restarting"),
        is_frozen=state == "paused",
    )
    if end is None or found.is_running:
        return found
    error = parse_line(str(end.get("Error") or ""), 200)
    return replace(
        found,
        has_ended=state in ("exited", "dead") or bool(error),
        exit_code=int(end.get("ExitCode") or 0),
        is_oom=bool(end.get("OOMKilled")),
        error=error,
        started_at_s=parse_engine_time(str(end.get("StartedAt"))),
        ended_at_s=parse_engine_time(str(end.get("FinishedAt"))),
    )


def parse_engine_time(text: str) -> float:
    """Read a time of the engine's (RFC 3339, UTC), to the second; 0 for what is none."""
    try:
        return float(calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0.0


def parse_group(name: str) -> str:
    """The container that a control group is of, by the drivers systemd and cgroupfs, or none."""
    match = re.fullmatch(r"docker-([0-9a-f]{64})\.scope|([0-9a-f]{64})", name)
    return match[1] or match[2] if match else ""


def decide_api(minimum: str) -> str:
    """Choose the version of the Docker Engine API: the oldest that both sides have, as a path."""
    match = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", minimum)
    oldest = (int(match[1]), int(match[2])) if match else ENGINE_API
    return "/v{}.{}".format(*max(oldest, ENGINE_API))


def decide_registry_password(session: str) -> str:
    """The hash of the session, of which the control plane stores a hash: good for pulls only."""
    return hashlib.sha256(bytes.fromhex(session)).hexdigest()


def render_registry_auth(image: str, password: str) -> str:
    """The header X-Registry-Auth of the Docker Engine API: base64url of a JSON object."""
    who = {"username": "host", "password": password, "serveraddress": image.partition("/")[0]}
    return base64.urlsafe_b64encode(json.dumps(who).encode()).decode()


def parse_pull(line: bytes, layers: dict[str, tuple[int, int]]) -> str:
    """Read one line of a pull's progress into `layers`; the engine's error, if it is one."""
    try:
        event = json.loads(line)
        if event.get("error"):
            return parse_line(str(event["error"]))
        detail, layer = event.get("progressDetail") or {}, str(event.get("id"))
        if event.get("status") == "Downloading" and detail.get("total"):
            layers[layer] = (int(detail.get("current") or 0), int(detail["total"]))
        elif event.get("status") == "Download complete" and layer in layers:
            layers[layer] = (layers[layer][1], layers[layer][1])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "the engine's words could not be read"
    return ""


def render_progress(layers: Mapping[str, tuple[int, int]]) -> str:
    """Say how far a pull is."""
    done, total = (sum(each) for each in zip(*layers.values(), strict=True))
    return f"{done // 1_000_000} of {-(-total // 1_000_000)} MB"


def parse_frames(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Take what was printed out of the engine's stream: frames of a number, 3 zeros, and a length.

    From the first bytes on that begin no frame, all is printed: so it is with a terminal.
    """
    is_raw = False
    while part := read(LOG_MAX_BYTES if is_raw else 8):
        is_raw = is_raw or part[0] > 2 or any(part[1:4])
        if is_raw:
            yield part
            continue
        left = int.from_bytes(part[4:], "big")
        while left and (part := read(min(left, LOG_MAX_BYTES))):
            left -= len(part)
            yield part


def cut_log(parts: Iterator[bytes], limit_bytes: int) -> tuple[bytes, bool]:
    """Keep the last bytes; tell whether there were others."""
    kept, is_cut = b"", False
    for part in parts:
        kept += part
        is_cut = is_cut or len(kept) > limit_bytes
        kept = kept[-limit_bytes:]
    return kept, is_cut


def plan_images(
    images: Sequence[Mapping[str, Any]],
    in_use: Collection[str],
    wished: Collection[str],
    used_s: Mapping[str, float],
) -> list[str]:
    """The ids of images that nothing uses, those first that were not used for longest."""
    unused = []
    for image in images:
        name, digests = str(image.get("Id")), [str(each) for each in image.get("RepoDigests") or ()]
        is_kept = name in in_use or any(digest in wished for digest in digests)
        if not is_kept and re.fullmatch(r"sha256:[0-9a-f]{64}", name):
            last_s = max((used_s.get(digest, 0.0) for digest in digests), default=0.0)
            unused.append((last_s, -int(image.get("Size") or 0), name))
    return [name for _, _, name in sorted(unused)]


def decide_pull_error(words: str) -> bool:
    """Tell whether another try gets the same answer: the registry said no, or it never fits."""
    # Not "unauthorized": what this host shows changes with its session.
    finals = ("manifest unknown", "not found", "denied", "no matching manifest", "unsupported")
    return any(final in words.lower() for final in (*finals, "invalid reference", "too large for"))


def decide_back_off_s(streak: int) -> float:
    """Choose the wait after the streak-th quick end in a row."""
    return min(BACK_OFF_MAX_S, 2.0 ** (min(streak, 20) - 1))


def decide_seen(past: Past, found: Container, was_told: bool, now_s: float) -> Past:
    """Note a run that began, or one that ended by itself or because it was told to.

    Also a run whose start is news: an agent that is killed right after it cannot note it.
    """
    is_noted = past.ended_s is not None
    if found.is_running and (is_noted or past.started_s is None):
        past = replace(past, started_s=now_s, ended_s=None, excess="")
        return replace(past, restarts=past.restarts + is_noted)
    is_news = is_noted and past.run_at_s not in (0.0, found.started_at_s)
    if not found.has_ended or (is_noted and not is_news):
        return past
    is_steady = past.started_s is not None and now_s - past.started_s >= STEADY_S
    is_steady = is_steady and not is_news and not past.excess
    streak = 1 if is_steady else past.streak + 1
    return replace(
        past,
        ended_s=now_s,
        exit_code=found.exit_code,
        restarts=past.restarts + is_news,
        streak=past.streak if was_told else streak,
        is_stopped=was_told,
        run_at_s=found.started_at_s,
    )


def add_taken(strain: Strain | None, taken: Taken, now_s: float) -> Strain:
    """Add what was taken since the last look, of a log that began anew only what is sure."""
    if strain is None:
        return Strain(now_s, taken)
    before, gone_s = strain.taken, now_s - strain.at_s
    written = taken.log_bytes - before.log_bytes
    if taken.log_inode != before.log_inode:
        written = taken.log_bytes + max(0, LOG_FILE_BYTES - before.log_bytes)
        written = written if before.log_inode and taken.log_inode else 0
    forks = max(0.0, strain.forks - FORKS_PER_S * gone_s) + max(0, taken.refused - before.refused)
    log_bytes = max(0.0, strain.log_bytes - LOG_BYTES_PER_S * gone_s) + max(0, written)
    return Strain(now_s, taken, forks, log_bytes)


def decide_excess(strain: Strain) -> str:
    """Say why a container is ended for what it takes; an empty text when it may go on."""
    if strain.forks > FORKS_OVER_MAX:
        return f"it went on starting processes beyond its {PIDS_MAX}"
    if strain.log_bytes > LOG_OVER_MAX_BYTES:
        return f"it went on printing more than {LOG_BYTES_PER_S / 1000:g} kB a second"
    return ""


def was_shut_down(found: Container, told_at_s: float) -> bool:
    """Tell whether a container ended because all were told to, of which this process knows no more.

    Times of one clock: a machine that shuts down, or an agent that was stopped after it.
    """
    is_soon = told_at_s - 1 <= found.ended_at_s <= told_at_s + ENDED_WITHIN_S
    return found.started_at_s <= told_at_s and is_soon


def is_final(wish: Wish, past: Past, found: Container) -> bool:
    """Tell whether a workload that ended stays ended."""
    if not found.has_ended or past.is_stopped or wish.restart is Restart.ALWAYS:
        return False
    return wish.restart is Restart.NEVER or (found.exit_code == 0 and not found.error)


def is_over(wish: Wish, past: Past, found: Container | None) -> bool:
    """Tell whether nothing of a workload runs here again."""
    return (
        wish.is_done or past.rejected != "" or (found is not None and is_final(wish, past, found))
    )


def decide_right_s(sent_s: float, lease_s: int, before_s: float) -> float:
    """Until when the host may run what is assigned to it: from now on not, when no lease came.

    An end that was said before stays, since what still runs has its time to end from there.
    """
    if not lease_s:
        return min(sent_s, before_s)
    return sent_s + min(float(lease_s), LEASE_MAX_S) - LEASE_MARGIN_S


def decide_late(
    lease: Lease, listed: frozenset[str], late: frozenset[str], now_s: float
) -> frozenset[str]:
    """The assignments that may run elsewhere: a list without them came when their right was over,
    as after a suspend, where it may come before the agent saw that and stopped them."""
    was_over = now_s >= lease.until_s + STOP_S
    return (late | lease.kept if was_over else late) - listed


def parse_lease(raw: bytes, boot_id: str, now_s: float) -> Lease:
    """Read the lease file. After a boot nothing has a right, and nothing was started yet."""
    try:
        data = json.loads(raw, parse_constant=int)  # NaN would be a right without an end
        ids = frozenset(str(each) for each in data["assignments"][: 2 * ASSIGNMENTS_MAX])
        ports = {int(port) for port in data.get("ports", ()) if int(port) in HOST_PORTS}
        lease = Lease(0.0, frozenset(), tuple(sorted(ports)), str(data.get("seen", "")))
        if data["boot_id"] != boot_id or boot_id == "":
            return lease
        until_s = min(float(data["until_s"]), now_s + LEASE_MAX_S)
        pasts = {name: Past(*row[:PAST_KEPT]) for name, row in data.get("pasts", {}).items()}
        return replace(lease, until_s=until_s, kept=ids, pasts=pasts)
    except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Lease()


def render_lease(boot_id: str, lease: Lease) -> bytes:
    """Write the lease file; `guard` opens the ports, and keeps workloads from what was seen."""
    data: dict[str, object] = {"boot_id": boot_id, "until_s": round(lease.until_s, 3)}
    data |= {"assignments": sorted(lease.kept), "ports": lease.ports, "seen": lease.seen}
    data["pasts"] = {key: [*vars(one).values()][:PAST_KEPT] for key, one in lease.pasts.items()}
    return json.dumps(data).encode() + b"\n"


def plan_containers(
    wishes: Sequence[Wish] | None,
    found: Sequence[Container],
    networks: Mapping[str, str],
    now_s: float,
    right_until_s: float,
    memory: Memory,
    unready: str = "",
    late_s: float = math.inf,
) -> list[Step]:
    """Decide the next step of each assignment; an empty list when nothing is to do now.

    Without the right to run, or before the list is known, nothing begins. From `late_s` on, as
    after a suspend, what has no right ends without being asked: it may run elsewhere by now.
    """
    steps: list[Step] = []
    wished = {wish.assignment_id: wish for wish in wishes or ()}
    has_right = now_s < right_until_s
    mine: dict[str, Container] = {}
    for each in found:
        wish = wished.get(each.assignment_id)
        past = memory.pasts.get(each.assignment_id, Past())
        is_named = each.name == f"oi-{each.assignment_id}"
        if wishes is None:
            is_wanted = is_named and each.assignment_id in memory.kept
        else:
            is_wanted = is_named and wish is not None and wish.sha256 == each.wish_sha256
            is_wanted = is_wanted and not past.rejected
        if wish is not None and each.is_running and each.assignment_id not in networks:
            # Nobody reaches its ports any more; a job is not to run twice for that.
            is_wanted = is_wanted and (not wish.ports or wish.restart is Restart.NEVER)
        if each.is_running and not (is_wanted and has_right):
            is_late = each.assignment_id in memory.late or (not has_right and now_s >= late_s)
            steps += plan_stop(each, now_s, memory, is_late)
        elif each.is_running and past.excess:
            steps.append(Step(Verb.KILL, each.assignment_id, each.id))
        elif wishes is not None and not is_wanted and not each.is_running:
            network = networks.get(each.assignment_id, "") if is_named else ""
            steps.append(Step(Verb.REMOVE, each.assignment_id, each.id, network=network))
        if is_named:
            mine[each.assignment_id] = each
    for assignment_id, network in networks.items():
        has_any = any(each.assignment_id == assignment_id for each in found)
        is_gone = wishes is not None and assignment_id not in wished
        if not has_any and (is_gone or memory.pasts.get(assignment_id, Past()).rejected):
            steps.append(Step(Verb.REMOVE, assignment_id, network=network))
    if has_right and not unready:
        for wish in wished.values():
            past = memory.pasts.get(wish.assignment_id, Past())
            network = networks.get(wish.assignment_id, "")
            steps += plan_start(wish, mine.get(wish.assignment_id), past, network, now_s)
    return steps


def decide_held(
    wishes: Sequence[Wish] | None, found: Sequence[Container], memory: Memory
) -> set[str]:
    """The assignments whose secrets stay on this host: of those that run, or may be started."""
    held = {each.assignment_id for each in found if each.is_running}
    if wishes is None:
        return held | memory.kept
    mine = {each.assignment_id: each for each in found}
    for wish in wishes:
        one, past = mine.get(wish.assignment_id), memory.pasts.get(wish.assignment_id, Past())
        if wish.has_secrets and not is_over(wish, past, one):
            held.add(wish.assignment_id)
    return held


def plan_stop(found: Container, now_s: float, memory: Memory, is_late: bool) -> Iterator[Step]:
    """Ask a container to end, then end it; at once when it is late, or too frozen to hear it."""
    told_s = memory.stops.get(found.id)
    if is_late or found.is_frozen:
        yield Step(Verb.KILL, found.assignment_id, found.id)
    elif told_s is None:
        yield Step(Verb.TERM, found.assignment_id, found.id)
    elif now_s >= told_s + STOP_S:
        yield Step(Verb.KILL, found.assignment_id, found.id)


def plan_start(
    wish: Wish, found: Container | None, past: Past, network: str, now_s: float
) -> Iterator[Step]:
    """Decide what brings a wished container nearer to running."""
    if wish.is_done or past.rejected or now_s < past.retry_at_s:
        return
    if found is None:
        verb = Verb.CREATE if past.has_image else Verb.PULL
        yield Step(verb, wish.assignment_id, "", wish, network)
        return
    if found.wish_sha256 != wish.sha256 or found.is_running or is_final(wish, past, found):
        return
    due_s = now_s
    if found.has_ended and not past.is_stopped:
        ended_s = now_s if past.ended_s is None else past.ended_s
        due_s = ended_s + decide_back_off_s(past.streak)
    if now_s >= due_s and (not network or "already exists" in found.error):
        # The engine lost its networks, or was killed in the middle of a start: it can never start
        # this one again.
        yield Step(Verb.REMOVE, wish.assignment_id, found.id, network=network)
    elif now_s >= due_s:
        yield Step(Verb.START, wish.assignment_id, found.id, wish)


def decide_failure(past: Past, step: Step, error: EngineError, now_s: float) -> Past:
    """Note what the engine could not do: tried again, or left to another host."""
    words = parse_line(str(error), 500)
    tries = past.tries + 1
    if "already allocated" in words or "address already in use" in words:
        ports = ", ".join(str(port) for port in outer(step.wish)) if step.wish else ""
        return replace(past, rejected=f"a port is taken on this host (it asks for {ports})")
    if isinstance(error, NoSecretsError):
        return replace(past, rejected=words)
    if step.verb is Verb.START:
        return past  # the container says it itself, as its end
    if step.verb is Verb.CREATE and "no such image" in words.lower():
        return replace(past, has_image=False)
    is_no = decide_pull_error(words) if step.verb is Verb.PULL else error.status in (400, 409)
    pause_s = TRY_PAUSES_S[min(tries, len(TRY_PAUSES_S)) - 1]
    if NO_SPACE in words:  # once more, when images that nobody needs are gone
        is_no, pause_s = is_no or past.was_full, TRY_PAUSES_S[-1]
        past = replace(past, was_full=True)
    what = "image cannot be fetched" if step.verb is Verb.PULL else "container cannot be made"
    if is_no or tries > len(TRY_PAUSES_S):
        return replace(past, rejected=parse_line(f"{what}: {words}"))
    past = replace(past, tries=tries, retry_at_s=now_s + pause_s)
    return replace(past, trouble=parse_line(f"{what} yet: {words}"))


def render_end(found: Container, memory_bytes: int, excess: str = "") -> str:
    """Say how a container ended; the engine notes any process of it that was killed for memory."""
    if found.error:
        return f"cannot start: {found.error}"
    if excess and found.exit_code == 137:
        return f"killed: {excess}"
    if found.is_oom and found.exit_code == 137:
        limit = f" its {memory_bytes // 1_000_000} MB of" if memory_bytes else " its"
        return f"killed: it used more than{limit} memory"
    said = f"ended with exit code {found.exit_code}"
    if found.exit_code > 128:
        with contextlib.suppress(ValueError):
            name = signal.Signals(found.exit_code - 128).name
            said = f"ended by {name} (exit code {found.exit_code})"
    return f"{said} after a process of it was killed for memory" if found.is_oom else said


def decide_report(
    wish: Wish | None,
    found: Container | None,
    past: Past,
    progress: str,
    unready: str,
    lost: str = "",
) -> tuple[int, str]:
    """Say how far a wished or kept assignment is, and why it does not run.

    `lost`: why the engine is silent for so long that nobody knows what runs.
    """
    if past.rejected:
        is_gone = found is None
        state = pb.ASSIGNMENT_STATE_REJECTED if is_gone else pb.ASSIGNMENT_STATE_STOPPING
        return state, past.rejected
    if found is None and not past.has_image:
        said = f"{progress}; before, {past.trouble}" if progress and past.trouble else progress
        return pb.ASSIGNMENT_STATE_PULLING, unready or said or past.trouble
    if found is None:
        return pb.ASSIGNMENT_STATE_STARTING, unready or past.trouble
    if wish is not None and found.wish_sha256 != wish.sha256:
        return pb.ASSIGNMENT_STATE_STARTING, "another container of it is stopped first"
    if found.is_running:
        frozen = f"frozen: {unready or 'the firewall was not in place'}" if found.is_frozen else ""
        why = lost or frozen
        return pb.ASSIGNMENT_STATE_WAITING if why else pb.ASSIGNMENT_STATE_RUNNING, why
    if past.is_stopped:
        return pb.ASSIGNMENT_STATE_WAITING, unready or "stopped: its right to run was over"
    if not found.has_ended:
        return pb.ASSIGNMENT_STATE_STARTING, unready or past.trouble
    said = render_end(found, wish.memory_bytes if wish else 0, past.excess)
    if wish is None or not is_final(wish, past, found):
        again = f", started again after {decide_back_off_s(past.streak):g} s"
        return pb.ASSIGNMENT_STATE_WAITING, said + again
    is_good = found.exit_code == 0 and not found.error
    return pb.ASSIGNMENT_STATE_FINISHED if is_good else pb.ASSIGNMENT_STATE_FAILED, said


def list_idle(wishes: Sequence[Wish], found: Sequence[Container], memory: Memory) -> Iterator[Wish]:
    """What should run here, or be about to, and does not."""
    mine = {each.assignment_id: each for each in found}
    for wish in wishes:
        one, past = mine.get(wish.assignment_id), memory.pasts.get(wish.assignment_id, Past())
        if not is_over(wish, past, one) and not (one and one.is_running and not one.is_frozen):
            yield wish


def render_observed(workloads: Workloads, unready: str) -> pb.Observed:
    """Say what the host has of each assignment, in the list's order, then of those to go."""
    observed = pb.Observed(revision=workloads.seen_revision)
    memory, found = workloads.memory, {}
    for each in workloads.containers:
        if not UUID_RE.fullmatch(each.assignment_id):
            continue  # it is ended, but no assignment
        if each.assignment_id not in found or each.name == f"oi-{each.assignment_id}":
            found[each.assignment_id] = each
    wished = {wish.assignment_id: wish for wish in workloads.wishes or ()}
    kept = memory.kept if workloads.wishes is None else frozenset[str]()
    there = [name for name, wish in wished.items() if name in found or not wish.is_done]
    for name in [*there, *sorted(kept & found.keys())]:
        past = memory.pasts.get(name, Past())
        wish, lost = wished.get(name), workloads.engine_error if workloads.is_lost else ""
        progress = workloads.progress.get(wish.image, "") if wish else ""
        state, reason = decide_report(wish, found.get(name), past, progress, unready, lost)
        one = observed.assignments.add(assignment_id=name, reason=reason, restarts=past.restarts)
        one.state = cast("pb.AssignmentState.ValueType", state)
        if past.exit_code is not None:
            one.exit_code = past.exit_code
    for name, reason in workloads.refused.items():
        if name not in found:
            rejected = pb.ASSIGNMENT_STATE_REJECTED
            observed.assignments.add(assignment_id=name, state=rejected, reason=reason)
    for name in sorted(found.keys() - wished.keys() - kept):
        stopping = pb.ASSIGNMENT_STATE_STOPPING
        observed.assignments.add(assignment_id=name, state=stopping)
    if observed.ByteSize() > OBSERVED_MAX_BYTES:
        for one in observed.assignments:
            one.reason = parse_line(one.reason, NAMED_MAX)
    return observed


def decide_unready(
    is_leaving: bool, engine_error: str, firewall: str, lease_error: str, offered: Limits
) -> tuple[str, str]:
    """Say why the host can take no workload, and what to type; two empty texts when it can."""
    if is_leaving:
        return "its provider is leaving: revoke it when nothing runs there any more", UNPAUSE
    guard = "sudo systemctl start openinfra-guard.service openinfra-guard.timer"
    if engine_error:
        return engine_error, "sudo systemctl restart openinfra-engine"
    if firewall:
        return f"the firewall is not known to be in place: {firewall}", guard
    if lease_error:
        return lease_error, "sudo systemctl restart openinfra-agent"
    if offered.cpu_milli < CPU_MIN_MILLI or offered.memory_bytes < MEMORY_MIN_BYTES:
        return "limits.conf lends too little", "sudoedit /etc/openinfra/limits.conf"
    return "", ""


def parse_reading(stats: Mapping[str, Any], at_s: float) -> Reading | None:
    """The engine's statistics of a container; None for one that does not run."""
    networks = (stats.get("networks") or {}).values()
    reading = Reading(
        at_s,
        int(((stats.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage") or 0),
        int((stats.get("memory_stats") or {}).get("usage") or 0),
        sum(int(each.get("rx_bytes") or 0) for each in networks),
        sum(int(each.get("tx_bytes") or 0) for each in networks),
    )
    return reading if reading.cpu_ns or reading.memory_bytes else None


def add_reading(count: Count, reading: Reading) -> Count:
    """Add what was used since the last reading; less than that is a container started again.

    One that was taken before the last is of no use any more.
    """
    if reading.at_s <= count.read_s:
        return count
    now = (reading.cpu_ns, reading.rx_bytes, reading.tx_bytes)
    pairs = zip(now, count.last, strict=True)
    cpu_ns, rx_bytes, tx_bytes = (new - old if new >= old else new for new, old in pairs)
    elapsed_s = reading.at_s - count.read_s if count.read_s else 0.0
    byte_s = int(reading.memory_bytes * min(elapsed_s, 2 * METER_S))
    count = add_sums(count, (cpu_ns, byte_s, rx_bytes, tx_bytes))
    return replace(count, last=now, read_s=reading.at_s)


def add_sums(count: Count, sums: tuple[int, int, int, int]) -> Count:
    """Add to what is told, up to what the message has room for."""
    pairs = zip(count.sums, sums, strict=True)
    cpu_ns, byte_s, rx_bytes, tx_bytes = (min(a + b, INT64_MAX) for a, b in pairs)
    return replace(count, cpu_ns=cpu_ns, memory_byte_s=byte_s, rx_bytes=rx_bytes, tx_bytes=tx_bytes)


def merge_counts(
    counts: Mapping[tuple[str, str], Count], live: Collection[tuple[str, str]], most: int
) -> dict[tuple[str, str], Count]:
    """No more than so many: of those that are over and were never sent, the oldest goes into
    another one of its assignment. A sent one may be known already, and would count twice; it may
    grow, since of what is told of one the greatest counts. Few are ever sent while no answer comes:
    `list_due` chooses the same again."""
    kept = dict(counts)
    for key in counts:
        count = kept[key]  # with what went into it
        if len(kept) <= most:
            break
        if count.is_sent or key in live:
            continue
        for other in kept.values():
            same = (other.assignment_id, other.boot_id) == (count.assignment_id, count.boot_id)
            if same and other.key != key:
                kept[other.key] = add_sums(other, count.sums)
                del kept[key]
                break
    return kept


def list_due(
    counts: Mapping[tuple[str, str], Count],
    told: Mapping[tuple[str, str], tuple[int, int, int, int]],
    told_s: Mapping[tuple[str, str], float],
    live: Collection[tuple[str, str]],
) -> list[Count]:
    """What the control plane does not have yet: of what is over first, then what waited longest."""
    due = [each for key, each in counts.items() if told.get(key) != each.sums and any(each.sums)]
    due.sort(key=lambda each: (each.key in live, told_s.get(each.key, 0.0)))
    return due[:COUNTS_SENT_MAX]


def render_counter(count: Count) -> pb.UsageCounter:
    """One for a heartbeat."""
    return pb.UsageCounter(
        assignment_id=count.assignment_id,
        boot_id=count.boot_id,
        container_id=bytes.fromhex(count.container_id),
        cpu_ns=count.cpu_ns,
        memory_byte_s=count.memory_byte_s,
        rx_bytes=count.rx_bytes,
        tx_bytes=count.tx_bytes,
    )


def render_counts(counts: Mapping[tuple[str, str], Count]) -> bytes:
    """usage.json."""
    return json.dumps([vars(count) for count in counts.values()]).encode() + b"\n"


def parse_counts(raw: bytes) -> dict[tuple[str, str], Count]:
    """The inverse; raises ValueError, TypeError or KeyError."""
    found = {}
    for row in json.loads(raw):
        count = Count(**{**row, "last": tuple(row["last"])})
        numbers = (*count.sums, *count.last)
        is_named = HEX_32_RE.fullmatch(count.container_id) and HOST_ID_RE.fullmatch(count.boot_id)
        is_named = is_named and UUID_RE.fullmatch(count.assignment_id)
        is_right = all(type(each) is int and 0 <= each <= INT64_MAX for each in numbers)
        is_right = is_right and isinstance(count.read_s, int | float)
        if not (is_named and is_right and len(numbers) == 7):
            raise ValueError("a count that cannot be")
        found[count.key] = count
    return found


def decide_tick_s(workloads: Workloads, now_s: float) -> float:
    """Choose how long the containers need not be looked at."""
    if workloads.memory.stops:
        tick_s = TEND_SOON_S
    elif workloads.containers or workloads.networks or workloads.wishes:
        tick_s = TEND_S
    else:
        tick_s = ENGINE_VERSION_AGE_S if workloads.engine_error else TEND_IDLE_S
    right_s = workloads.right_until_s - now_s
    return min(tick_s, right_s) if right_s > 0 else tick_s


def parse_handshakes(text: str) -> int | None:
    """Find the newest handshake in `wg show … latest-handshakes`, Unix seconds; None: never."""
    times = [int(last) for last in re.findall(r"^\S+\t([0-9]+)$", text, re.MULTILINE)]
    return max(times, default=0) or None


def parse_endpoints(text: str) -> tuple[str, ...]:
    """The IPv4 addresses in `wg show … endpoints`, or in what is kept of it; else none."""
    found = set()
    for word in text.split():
        with contextlib.suppress(ValueError):
            found.add(ipaddress.IPv4Address(word.partition(":")[0]))
    return tuple(map(str, sorted(found)))


UNPAUSE = "sudo openinfra-agent unpause"
REQUESTS = ("status", "pause", "unpause", "leave", "earnings")


@dataclass(frozen=True)
class Ask:
    """A request on the control socket; all but the first are of `earnings` only."""

    cmd: str
    month: str = ""
    cursor: int = 0
    assignment: str = ""


def parse_request(line: bytes) -> Ask:
    """Read one request of the control socket; raise BrokenError with what is wrong with it."""
    try:
        data = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BrokenError("request is not one line of JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("cmd"), str):
        raise BrokenError('request is not an object with a "cmd"')
    if data["cmd"] not in REQUESTS:
        raise BrokenError(f"unknown cmd, known: {', '.join(REQUESTS)}")
    if data.keys() - (vars(Ask("")).keys() if data["cmd"] == "earnings" else {"cmd"}):
        raise BrokenError("request has unknown fields")
    month, cursor, copy = data.get("month", ""), data.get("cursor", 0), data.get("assignment", "")
    if type(month) is not str or not re.fullmatch(MONTH, month):
        raise BrokenError("month is none like 2026-11")
    if type(cursor) is not int or not 0 <= cursor < 2**31:
        raise BrokenError("cursor is out of range")
    if type(copy) is not str or (copy and not HOST_ID_RE.fullmatch(copy)):
        raise BrokenError("assignment is no UUID")
    return Ask(data["cmd"], month, cursor, copy)


def render_answer(
    agent: Agent, unready: tuple[str, str], token: str, pid: int, now_s: float
) -> dict[str, object]:
    """Say what the agent knows, for `status` and `doctor`."""
    standing, workloads = agent.standing, agent.workloads
    images = {wish.assignment_id: wish.image for wish in workloads.wishes or ()}
    age = None if agent.last_heartbeat_s is None else round(now_s - agent.last_heartbeat_s, 1)
    return {
        "state": agent.state,
        "paused": render_paused(agent.pause),
        "version": VERSION,
        "host_id": agent.identity.host_id,
        "control_plane": agent.config.control_plane,
        "connected": agent.is_connected,
        "last_heartbeat_age_s": age,
        "heartbeats": agent.heartbeats,
        "interval_s": agent.interval_s,
        "status": parse_status(standing.status) if standing else "unknown",
        "assignable": standing.assignable if standing else False,
        "reasons": [parse_line(reason) for reason in standing.reasons[:16]] if standing else [],
        "onchain_payout": agent.onchain_payout,
        "earnings": agent.earnings,
        "disk_encrypted": agent.disk_encrypted,
        "engine_version": workloads.engine_version,
        "unready": unready[0],
        "unready_todo": unready[1],
        "offered": vars(workloads.limits),
        "assignments": [
            {
                "id": parse_line(one.assignment_id, NAMED_MAX),
                "image": images.get(one.assignment_id, ""),
                "state": parse_state(one.state),
                "reason": parse_line(one.reason),
                "restarts": one.restarts,
            }
            for one in render_observed(workloads, unready[0]).assignments
        ],
        "token": token,
        "last_error": agent.last_error,
        "pid": pid,
        "started_age_s": round(now_s - agent.started_s, 1),
    }


def render_micros(micros: int) -> str:
    """Millionths as a decimal number, exactly."""
    whole, rest = divmod(abs(micros), 1_000_000)
    return f"{'-' if micros < 0 else ''}{whole}.{rest:06}"


def render_earnings(earnings: pb.Earnings) -> str:
    """What this host earned in a month, for a person."""
    words = f"{render_micros(earnings.micros)} {earnings.currency} in {earnings.month}"
    return parse_line(f"{words}, of hours that are closed", NAMED_MAX)


def render_earnings_page(reply: pb.EarningsReply) -> dict[str, object]:
    """A page of a month's earnings, as the control socket has it."""
    return {
        "month": parse_line(reply.month, NAMED_MAX),
        "currency": parse_line(reply.currency, NAMED_MAX),
        "preliminary": reply.preliminary,
        "share_micros": reply.share_micros,
        "lines": [
            {
                "assignment_id": parse_line(line.assignment_id, NAMED_MAX),
                "workload": parse_line(line.workload, WORKLOAD_MAX),
                "hour_at": parse_line(line.hour_at, NAMED_MAX),
                **{name: getattr(line, name) for name in EARNINGS_NUMBERS},
            }
            for line in reply.lines[:EARNINGS_LINES]
        ],
        "next_cursor": reply.next_cursor,
    }


def render_earnings_table(found: Mapping[str, Any]) -> str:
    """A month's earnings for a person: what ran, for how long, at what price, and whose part."""
    names = ("hours", "cpu", "GB", "sent GB", "a cpu-hour", "a GB-hour", "a GB sent", "charge")
    rows = [("what", *names, "yours", "earned", "assignment")]
    prices = ("cpu_hour_micros", "gb_hour_micros", "egress_gb_micros", "charge_micros")
    for line in found["lines"]:
        rows.append(
            (
                f"{line['hour_at'][:16] or line['workload']}/{line['part'] or line['replica']}",
                f"{line['billed_us'] / 3.6e9:.4f}",
                f"{line['cpu_milli'] / 1000:g}",
                f"{line['memory_bytes'] / 1e9:.3f}",
                f"{line['egress_bytes'] / 1e9:.3f}",
                *(render_micros(line[name]) for name in prices),
                f"{line['provider_share_ppm'] / 10_000:g} %",
                render_micros(line["share_micros"]),
                line["assignment_id"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    so_far = " so far, of hours that are closed" if found["preliminary"] else ""
    total = f"{render_micros(found['share_micros'])} {found['currency']}"
    return "\n".join([*text, f"earned in {found['month']}: {total}{so_far}"])


def render_paused(pause: Pause | None) -> str:
    """Say that a host is paused, since when; empty when it is not."""
    if pause is None:
        return ""
    what = "paused, its provider is leaving" if pause.is_leaving else "paused"
    return f"{what}, since {pause.since}" if pause.since else f"{what}: {PAUSED_NAME} is unreadable"


def render_change(cmd: str, answer: Mapping[str, Any]) -> str:
    """Say what is true after `pause`, `unpause` or `leave`; raise Error while it is not all."""
    uninstall = "sudo python3 -I install_agent.py --uninstall"
    if not answer["has_ended"]:
        why = parse_line(str(answer.get("unready") or "they take long to end"))
        what = f"this host is paused, and workloads may still run here: {why}"
        todo = "at once: sudo systemctl kill --signal=SIGKILL openinfra.slice; then type this again"
        raise Error(what, todo, LATER)
    hears = "the agent does not run; the control plane hears of it when it does"
    if "state" in answer:
        hears = "the control plane cannot be reached now, and hears of it later"
    later = "" if answer["is_told"] else f" ({hears})"
    if cmd == "leave" and later:
        what = f"no workload runs here{later}, and something may still be assigned to this host"
        todo = f"that ends by itself within 10 minutes; wait, and type this again, or: {uninstall}"
        raise Error(what, todo, LATER)
    if cmd == "leave":
        said = "nothing is assigned to this host and nothing runs here; now type: "
        return f"{said}{uninstall}; then tell the operator, who revokes host {answer['host_id']}"
    if cmd == "unpause":
        said = "not paused any more" if answer["is_new"] else "this host was not paused"
        return f"{said}: workloads may come here{later}"
    said = "paused" if answer["is_new"] else "already paused"
    return f"{said}: no workload runs here{later}; `{UNPAUSE}` takes some again"


def parse_state(state: int) -> str:
    """Name an AssignmentState in lower case."""
    return pb.AssignmentState.Name(cast("pb.AssignmentState.ValueType", state))[17:].lower()


def is_online(answer: Mapping[str, Any]) -> bool:
    """Tell from the agent's answer whether this host is online now, as both sides see it."""
    age = answer.get("last_heartbeat_age_s")
    return (
        answer.get("state") == "running"
        and answer.get("status") in ("online", "paused")
        and isinstance(age, (int, float))
        and age <= 3 * max(float(answer.get("interval_s") or 0), INTERVAL_NOMINAL_S)
    )


def render_status(answer: Mapping[str, Any]) -> str:
    """Lay the agent's answer out for a person."""
    age, error = answer.get("last_heartbeat_age_s"), answer.get("last_error")
    offered = answer.get("offered") or {}
    lent = f"{offered.get('cpu_milli', 0) / 1000:g} processors, "
    lent += f"{offered.get('memory_bytes', 0) // 1_000_000} MB"
    beats = f"{answer.get('heartbeats')} accepted, every {answer.get('interval_s')} s"
    rows = [
        ("state", answer.get("state")),
        *((("", f"{answer['paused']}; {UNPAUSE}"),) if answer.get("paused") else ()),
        ("host_id", answer.get("host_id") or "none yet"),
        ("control plane", answer.get("control_plane")),
        ("connected", "yes" if answer.get("connected") else "no"),
        ("last heartbeat", "none yet" if age is None else f"{age} s ago ({beats})"),
        ("status", answer.get("status")),
        ("assignable", "yes" if answer.get("assignable") else "no"),
        *(("  reason", reason) for reason in answer.get("reasons") or ()),
        ("on-chain payout", "yes" if answer.get("onchain_payout") else "no"),
        *((("earned", answer["earnings"]),) if answer.get("earnings") else ()),
        ("disk encrypted", "yes" if answer.get("disk_encrypted") else "no"),
        ("engine", answer.get("engine_version") or "none"),
        ("lends", lent),
        *((("takes no work", answer["unready"]),) if answer.get("unready") else ()),
        *(("workload", render_row(one)) for one in answer.get("assignments") or ()),
        ("invite token", answer.get("token")),
        *((("last error", f"{error['what']}; {error['todo']}"),) if error else ()),
        ("agent", f"{answer.get('version')}, pid {answer.get('pid')}"),
        ("up", f"{answer.get('started_age_s')} s"),
    ]
    return "\n".join(f"{name:<16} {parse_line(str(value), 500)}" for name, value in rows)


def render_row(one: Mapping[str, Any]) -> str:
    """Say one line of an assignment."""
    words = (one.get("id"), one.get("state"), one.get("reason"), one.get("image"))
    return "  ".join(str(word) for word in words if word)


def parse_routes(text: str) -> tuple[str, ...]:
    """The networks that /proc/net/route leads to by more than a default route: not the internet.

    Those of workloads and of the tunnel have rules of their own. A network larger than a /8 is half
    a default route, as some VPNs set it.
    """
    found = set()
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 8 or words[0].startswith(("oi-", "ox-", WG_INTERFACE)):
            continue
        address, mask = (int.from_bytes(bytes.fromhex(words[n]), sys.byteorder) for n in (1, 7))
        network = ipaddress.IPv4Network((address, mask.bit_count()), strict=False)
        if network.prefixlen >= 8 and not any(network.subnet_of(known) for known in FENCED):
            found.add(network)
    return tuple(map(str, ipaddress.collapse_addresses(found)))


def render_table(
    homes: Sequence[str] = (), ports: Sequence[int] = (), is_router: bool = True
) -> str:
    """Render the host's firewall for `nft -f`, nft(8): one transaction, whatever was there before.

    Nothing comes in through the tunnel but answers, ping, nudges, and the hub to the published
    `ports`; nothing passes between the tunnel and any other network, also where this machine
    forwards; nobody else uses the tunnel's addresses. A workload reaches the internet by IPv4, and
    neither this machine nor the tunnel, a private network, one of `homes` (the public addresses of
    the control plane and of this home are among them), another workload or a mail server; one on a
    bridge ox-* reaches nothing. Only answers are forwarded to workloads.
    Of one workload FLOWS_MAX connections pass at a time; each is counted by its first packet.
    Where this machine was no router before the engine made it one, it forwards for bridges only:
    those of workloads, and of containers and machines that the provider has.
    """
    name = " ".join(NFT_TABLE)
    fenced = ", ".join([*map(str, FENCED), *homes])
    hub = parse_address(DEFAULTS["control_plane"])
    # Not also the first side's packets: what began while there was no table would go on for good.
    answers = "ct state established,related ct direction reply"
    to_ports = f"tcp dport {{ {', '.join(map(str, ports))} }} accept" if ports else "drop"
    bridges = ['meta iifkind "bridge" accept', 'meta oifkind "bridge" accept']
    bridges.append("meta nfproto ipv4 drop")  # IPv6 is not what the engine turns on
    others = "".join(f"\t\t{rule}\n" for rule in bridges if not is_router)
    first = "ct state new ct status & confirmed == 0"
    count = f"add @{FLOWS_SET} {{ ip saddr ct count over {FLOWS_MAX} }}"
    return f"""\
table {name}
delete table {name}
table {name} {{
\tset {FLOWS_SET} {{ type ipv4_addr; flags dynamic; }}
\tchain input {{
\t\ttype filter hook input priority -10; policy accept;
\t\tiifname "{WG_INTERFACE}" {answers} accept
\t\tiifname "{WG_INTERFACE}" icmp type echo-request limit rate 20/second accept
\t\tiifname "{WG_INTERFACE}" ip saddr {hub} udp dport {NUDGE_PORT} limit rate 20/second accept
\t\tiifname "{WG_INTERFACE}" ip saddr {hub} {to_ports}
\t\tiifname "{WG_INTERFACE}" drop
\t\tiifname "oi-*" {answers} accept
\t\tiifname "ox-*" {answers} accept
\t\tiifname "oi-*" drop
\t\tiifname "ox-*" drop
\t\tiifname != "lo" ip saddr {TUNNEL} drop
\t\tiifname != "lo" ip daddr {TUNNEL} drop
\t}}
\tchain forward {{
\t\ttype filter hook forward priority -10; policy accept;
\t\tiifname "{WG_INTERFACE}" drop
\t\toifname "{WG_INTERFACE}" drop
\t\toifname "oi-*" {answers} accept
\t\toifname "oi-*" drop
\t\toifname "ox-*" drop
\t\tiifname "ox-*" drop
\t\tiifname "oi-*" meta nfproto ipv6 drop
\t\tiifname "oi-*" ip daddr {{ {fenced} }} drop
\t\tiifname "oi-*" tcp dport {{ 25, 465, 587 }} drop
\t\tiifname "oi-*" {first} {count} drop
{others}\t}}
\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tip saddr {WORKLOADS} oifname != "oi-*" masquerade
\t}}
}}
"""


def render_unlimited(table: str) -> str:
    """The same table without its count of connections, which not every kernel can do."""
    return "".join(line for line in table.splitlines(True) if FLOWS_SET not in line)


def render_held(table: str) -> str:
    """The copy of the table that its maker owns, as one line: nobody else can change it then.

    `flush ruleset` leaves it out, and the kernel removes it when its maker ends (Linux 5.12). It
    counts no connections: the other table does, and is back in a moment.
    """
    body = render_unlimited(table).partition(" {\n")[2]
    lines = [f"table {NFT_TABLE[0]} {HELD_TABLE} {{", "flags owner", *body.splitlines()]
    return " ".join(line.strip() + ("" if line.endswith("{") else ";") for line in lines) + "\n"


def parse_peer(conf: str) -> tuple[str, str]:
    """Take key and endpoint of the one peer from a wg-quick(8) file; raises Error."""
    found: dict[str, str] = {}
    section = ""
    for line in conf.splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            section = text.lower()
        key, equals, value = text.partition("=")
        if section == "[peer]" and equals:
            found[key.strip().lower()] = value.strip()
    key, endpoint = found.get("publickey", ""), found.get("endpoint", "")
    if not WG_KEY_RE.fullmatch(key) or not re.fullmatch(r"[\w.:\[\]-]+:[0-9]{1,5}", endpoint):
        raise Error("openinfra.conf names no control plane", "run install_agent.py again")
    return key, endpoint


def parse_guard(raw: bytes) -> Guard | None:
    """What an earlier run left; None when that is not to be read."""
    try:
        data = json.loads(raw)
        texts = {key: str(data.pop(key)) for key in [*data] if key != "at_s"}
        return Guard(float(data["at_s"]), **texts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def decide_firewall(guard: Guard | None, now_s: float) -> str:
    """Say why the firewall is not known to be in place; empty when it is."""
    if guard is None:
        return "guard has not run since boot"
    if now_s - guard.at_s > GUARD_OLD_S:
        return f"guard ran last {now_s - guard.at_s:.0f} s ago"
    return guard.error


def decide_findings(seen: Snapshot) -> list[Finding]:
    """Say what is wrong, most basic first: a later finding may only follow from an earlier one."""
    rows = (*list_host_rows(seen), *list_tunnel_rows(seen), *list_fleet_rows(seen))
    return [*seen.problems, *(Finding(*row) for row in rows)]


def list_host_rows(seen: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Judge what lies on this machine: the disk, the identity, the invite."""
    start, restart = (f"sudo systemctl {verb} openinfra-agent" for verb in ("start", "restart"))
    edit = f"sudoedit {seen.env_file} && {restart}"
    if seen.encrypted is False and seen.allow_unencrypted:
        said = f"{seen.data_dir} is not encrypted, which --allow-unencrypted permits."
        yield "INFO", said, "setup_luks2.py --help"
    elif seen.encrypted is False and seen.mounted:
        said = f"{seen.data_dir} does not lie on an encrypted (dm-crypt) device."
        yield "ERROR", said, "sudo setup_luks2.py /dev/<partition>"
    elif seen.encrypted is False:
        said = f"Nothing is mounted at {seen.data_dir}: its partition is locked or absent."
        yield "ERROR", said, "journalctl -b -u systemd-cryptsetup@openinfra_data"
    if seen.identity in ("absent", "unregistered"):
        if seen.invite == "used":
            yield "ERROR", "Invite already used, identity gone: ask for a fresh invite.", edit
        elif seen.invite == "none":
            yield "ERROR", "No identity and no invite: ask the operator for an invite.", edit
        elif seen.invite == "unspent" and seen.refused is None:
            yield "WARN", "The invite was not redeemed yet: the agent does that by itself.", start
    if seen.refused is not None and seen.status is None:
        said = f"{seen.refused['what']}; {seen.refused['todo']}"
        yield "ERROR", f"The control plane ended the agent: {said}.", start
    if seen.runc:
        said = f"Workloads are run by runc {seen.runc}: below 1.2.8 they can break out of one"
        said += " that the distribution did not mend (CVE-2025-31133)."
        yield "INFO", said, "apt-cache policy runc"
    for unit in seen.failed_units:
        yield "ERROR", f"{unit} failed.", f"journalctl -n 50 -u {unit}"


def list_tunnel_rows(seen: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Judge the way to the control plane; on loopback there is no tunnel."""
    show, restart = "sudo wg show openinfra", "sudo systemctl restart wg-quick@openinfra"
    if seen.wg == "absent" and seen.unreachable:
        yield "ERROR", "There is no WireGuard interface openinfra.", restart
    elif seen.wg not in ("ok", "absent", "skipped"):
        yield "INFO", f"The tunnel was not checked: {seen.wg}.", show
    elif seen.wg == "ok" and seen.handshake_age_s is None:
        said = "the operator has not added our public key, or its UDP 51820 is closed"
        yield "ERROR", f"WireGuard never completed a handshake: {said}.", show
    elif seen.wg == "ok" and (seen.handshake_age_s or 0) > HANDSHAKE_OLD_S:
        yield "ERROR", f"The last WireGuard handshake is {seen.handshake_age_s} s old.", restart
    if seen.firewall:
        said = f"This host's firewall is not known to be in place: {seen.firewall}."
        yield "ERROR", said, "sudo systemctl start openinfra-guard.service openinfra-guard.timer"
    if seen.unreachable:
        command = "cp_server.py doctor" if seen.wg == "skipped" else show
        command = restart if seen.unreachable.startswith(NO_TUNNEL.what) else command
        yield "ERROR", f"{seen.control_plane} cannot be reached: {seen.unreachable}.", command


def list_fleet_rows(seen: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Judge what the agent and the control plane say of this host."""
    edit = f"sudoedit {seen.env_file} && sudo systemctl restart openinfra-agent"
    status = seen.status or {}
    if seen.status is not None and not is_online(status):
        error = status.get("last_error")
        said = f"{error['what']}; {error['todo']}" if error else f"it is {status.get('state')}"
        said = f"The agent runs, and this host is not online: {said}."
        yield "ERROR", said, "journalctl -u openinfra-agent -n 50"
    if seen.pause is not None:
        yield "INFO", f"This host takes no workload: {render_paused(seen.pause)}.", UNPAUSE
    if status.get("unready") and not seen.firewall and seen.pause is None:
        said = f"This host can take no workload: {status['unready']}."
        # A control plane on this machine is for a try, which may do without.
        level = "INFO" if seen.wg == "skipped" else "ERROR"
        yield level, said, str(status.get("unready_todo"))
    if not seen.wallet and not status.get("onchain_payout"):
        yield "WARN", "No payout wallet is set (SOLANA_PAYOUT_PUBKEY): nothing is paid out.", edit
    if is_online(status) and not status.get("assignable") and seen.pause is None:
        why = "; ".join(status.get("reasons") or ["the control plane gave no reason"])
        heal = ""
        if seen.wallet and re.search("wallet|namespace|payout", why, re.IGNORECASE):
            heal = f" Either the operator approves namespace solana:{seen.wallet}, or you correct"
            heal += " SOLANA_PAYOUT_PUBKEY and restart the agent."
        yield "ERROR", f"This host gets no workloads: {why}.{heal}", edit


# ------------------------------------------------------------------------------------------------
# Doors: the files, the clock and the kernel; the only places that look at the machine. Not pure.
# ------------------------------------------------------------------------------------------------


def read_boot_s() -> float:
    """Seconds since boot, suspend included; no change of the wall clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_random_unit() -> float:
    """A number from 0 to 1 for jitter."""
    return secrets.randbelow(1 << 20) / (1 << 20)


def read_small(path: Path, limit_bytes: int) -> tuple[bytes, os.stat_result]:
    """Read a regular file of bounded size, with the mode and owner of what was read."""
    # O_NONBLOCK: a FIFO in this place must not hang the agent.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(limit_bytes + 1), status


def read_env(path: Path) -> EnvFile:
    """Read and parse the env file."""
    try:
        raw, status = read_small(path, FILE_MAX_BYTES)
    except PermissionError:
        raise Error(f"{path} is for root only", "run this with sudo", USAGE) from None
    except OSError as error:
        raise Error(
            f"cannot read {path}: {error.strerror}",
            "run install_agent.py, or name the file with --env-file",
            USAGE,
        ) from None
    if len(raw) > FILE_MAX_BYTES:
        raise Error(f"{path} is too large", "is it the right file? see --env-file", USAGE)
    return EnvFile(raw, parse_env(raw, str(path)), stat.S_IMODE(status.st_mode), status.st_uid)


def check_env_mode(path: Path, env: EnvFile, token: Token | None) -> None:
    """Refuse an env file that others can change, or read while it holds a secret."""
    uid = os.geteuid()
    if env.uid not in (0, uid):
        raise Error(f"{path} belongs to uid {env.uid}", f"run: chown {uid} {path}", USAGE)
    if env.mode & 0o022:
        raise Error(f"{path} can be changed by others", f"run: chmod 0600 {path}", USAGE)
    if env.mode & 0o077 and token is not None and token.text:
        raise Error(
            f"{path} with its invite can be read by others", f"run: chmod 0600 {path}", USAGE
        )


def read_config(args: argparse.Namespace) -> Config:
    """Read the env file and settle every option; refuse what cannot be right."""
    env_file = Path(args.env_file or DEFAULTS["env_file"])
    env = read_env(env_file)
    config = decide_config(args, env)
    check_env_mode(env_file, env, config.token)
    return config


def read_wg_pubkey(path: Path) -> str:
    """Read this host's WireGuard public key; empty when there is no such file."""
    try:
        raw, _ = read_small(path, FILE_MAX_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}", "run install_agent.py again") from None
    text = raw.decode("ascii", "replace").strip()
    if not WG_KEY_RE.fullmatch(text):
        raise Error(f"{path} is no WireGuard public key", "run: wg show openinfra public-key")
    return text


def check_data_dir(path: Path, owners: Sequence[int]) -> None:
    """Refuse a data directory that is not there or not its owner's alone."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise Error(
            f"no data directory {path}: {error.strerror}",
            f"mount it, or: install -d -m 0700 {path}",
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise Error(f"{path} is not a directory", "correct DATA_DIR in agent.env")
    if status.st_uid not in owners:
        raise Error(f"{path} belongs to uid {status.st_uid}", f"run: chown {owners[0]} {path}")
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o700:
        raise Error(f"{path} has mode {mode:04o}, not 0700", f"run: chmod 0700 {path}")


def has_crypt(node: Path) -> bool:
    """Tell whether every path from this block device down passes dm-crypt."""
    try:
        uuid = (node / "dm" / "uuid").read_text()
    except OSError:
        uuid = ""
    # These three come from cryptsetup's tools as well and encrypt nothing.
    plain = ("CRYPT-VERITY-", "CRYPT-INTEGRITY-", "CRYPT-SUBDEV-")
    if uuid.startswith("CRYPT-") and not uuid.startswith(plain):
        return True
    try:
        below = sorted((node / "slaves").iterdir())
    except OSError:
        below = []
    return bool(below) and all(has_crypt(slave) for slave in below)


def is_encrypted(path: Path, sysfs: Path = Path("/sys")) -> bool:
    """Tell whether a directory lies on dm-crypt; no block device (tmpfs, overlay) means no."""
    try:
        device = os.stat(path).st_dev
    except OSError:
        return False
    return has_crypt(sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}")


def check_encrypted(path: Path, encrypted: bool, allowed: bool) -> None:
    """Refuse to write an identity where a thief of the disk could read it."""
    if not encrypted and not allowed:
        raise Error(
            f"{path} is not encrypted", "unlock and mount it, or use --allow-unencrypted", LATER
        )


def take_lock(data_dir: Path) -> int:
    """Lock the data directory for the life of this process; the descriptor holds the lock."""
    path = data_dir / LOCK_NAME
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(path, flags, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = parse_line(os.read(lock, 20).decode("ascii", "replace").strip()) or "unknown"
        os.close(lock)
        raise Error(
            f"another agent (pid {pid}) runs on {data_dir}", "stop that one first", LATER
        ) from None
    except OSError as error:
        raise Error(f"cannot lock {path}: {error.strerror}", "mend that and start again") from None
    # The pid is only for the message above; a full disk must not keep a host from running.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def check_identity_file(path: Path, status: os.stat_result) -> None:
    """Refuse an identity that somebody else could have read, written or put there."""
    if not stat.S_ISREG(status.st_mode):
        raise Error(
            f"{path} is not a plain file", "put it back, or ask for a fresh invite", IDENTITY
        )
    if status.st_uid != os.geteuid():
        raise Error(
            f"{path} belongs to uid {status.st_uid}", f"run: chown {os.geteuid()} {path}", IDENTITY
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Error(f"{path} can be read or changed by others", f"run: chmod 0600 {path}", IDENTITY)


def read_identity(data_dir: Path) -> Identity | None:
    """Read the identity; None when there is none; raise BrokenError when it is not readable."""
    path = data_dir / IDENTITY_NAME
    try:
        check_identity_file(path, os.lstat(path))
        # The file was not a symlink a moment ago, and the directory is ours alone.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            raw = file.read(IDENTITY_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise Error(f"{path} is for root only", "run this with sudo") from None
    except OSError as error:
        raise Error(
            f"cannot read {path}: {error.strerror}", "check the disk: journalctl -k -p warning"
        ) from None
    return parse_identity(raw)


def sync_directory(path: Path) -> None:
    """When this returns, a power cut cannot take back a rename or a removal."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def move_broken(data_dir: Path) -> Path:
    """Move a broken identity aside, never over an earlier one; the lock keeps others away."""
    path = data_dir / IDENTITY_NAME
    number = 1
    while os.path.lexists(aside := data_dir / f"{IDENTITY_NAME}.broken-{number}"):
        number += 1
    os.rename(path, aside)
    sync_directory(data_dir)
    return aside


def save_identity(data_dir: Path, identity: Identity) -> None:
    """Write identity.json; when this returns, a power cut cannot take it back."""
    write_file(data_dir / IDENTITY_NAME, render_identity(identity), 0o600)


def ensure_identity(data_dir: Path, token: Token | None) -> Identity:
    """Read the identity, or make and save one for an unspent invite, before anything is sent."""
    try:
        identity = read_identity(data_dir)
    except BrokenError as broken:
        name = f"{data_dir}/{IDENTITY_NAME} is broken ({broken})"
        try:
            aside = move_broken(data_dir)
        except OSError as error:
            raise Error(
                f"{name} and stays there: {error.strerror}",
                "mend the disk, then ask for a fresh invite",
                IDENTITY,
            ) from None
        raise Error(
            f"{name} and is now {aside}", "restore it, or ask for a fresh invite", IDENTITY
        ) from None
    decide_start(identity, token)
    if identity is None:
        identity = Identity(secrets.token_hex(32), None, None, None, secrets.token_hex(32))
        try:
            save_identity(data_dir, identity)
        except OSError as error:
            raise Error(
                f"cannot save the identity: {error.strerror}",
                f"free some space on {data_dir}, or mend its disk",
            ) from None
    return identity


def save_refused(data_dir: Path, reason: str, error: Error) -> None:
    """Leave for `doctor` why the control plane ended this agent; best effort."""
    data = {"reason": reason, "what": error.what, "todo": error.todo}
    with contextlib.suppress(OSError):
        write_file(data_dir / REFUSED_NAME, json.dumps(data).encode() + b"\n", 0o600)


def read_refused(data_dir: Path) -> dict[str, str] | None:
    """Read what save_refused left."""
    try:
        data = json.loads(read_small(data_dir / REFUSED_NAME, FILE_MAX_BYTES)[0])
        return {key: parse_line(str(data[key])) for key in ("reason", "what", "todo")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_pause(data_dir: Path) -> Pause | None:
    """Look whether the provider paused this host; what cannot be looked at counts as paused."""
    try:
        return parse_pause(read_small(data_dir / PAUSED_NAME, FILE_MAX_BYTES)[0])
    except FileNotFoundError:
        return None
    except OSError:
        return Pause("")


def save_pause(data_dir: Path, pause: Pause | None) -> None:
    """Pause, or end that; when this returns, a power cut cannot take it back."""
    path = data_dir / PAUSED_NAME
    try:
        if pause is not None:
            write_file(path, render_pause(pause), 0o600)
        else:
            path.unlink(missing_ok=True)
            sync_directory(data_dir)
    except OSError as error:
        todo = "is its disk unlocked, and not full? then type this again"
        raise Error(f"cannot change {path}: {error.strerror}", todo) from None


def read_counts(data_dir: Path) -> dict[tuple[str, str], Count]:
    """What was counted before; a file that cannot be read is moved aside."""
    path = data_dir / USAGE_NAME
    try:
        return parse_counts(read_small(path, USAGE_MAX_BYTES)[0])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log("WARN", "usage file cannot be read, moved aside", path=path, error=error)
        with contextlib.suppress(OSError):
            path.replace(path.with_name(f"{USAGE_NAME}.broken"))
        return {}


def read_text(path: str) -> str:
    """Read a file of /proc; empty when it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def read_limits(path: Path) -> Limits:
    """Read what this machine lends; beside it is the installer's directory."""
    try:
        raw, _ = read_small(path, FILE_MAX_BYTES)
    except FileNotFoundError:
        raw = b""
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}", "mend or remove it", USAGE) from None
    memory_bytes = parse_memory_bytes(read_text("/proc/meminfo"))
    cpu_count = len(os.sched_getaffinity(0))
    registry = parse_installed(read_text(str(path.parent / "installer/install.json")))
    text = raw.decode("ascii", "replace")
    return parse_limits(text, str(path), cpu_count, memory_bytes, registry)


def read_unready(agent: Agent) -> tuple[str, str]:
    """Look whether the host can take workloads: why not, and what to type."""
    workloads, firewall = agent.workloads, ""
    if not parse_address(agent.config.control_plane).is_loopback:
        guard, now_s = read_guard(agent.config.guard_file), read_boot_s()
        firewall = decide_firewall(guard, now_s)
        if guard and now_s - guard.at_s > GUARD_OLD_S:
            firewall = "guard does not run"  # a sentence that stays the same
    error = workloads.engine_error if workloads.engine.path != NO_ENGINE else ""
    is_leaving = agent.pause is not None and agent.pause.is_leaving
    return decide_unready(is_leaving, error, firewall, workloads.lease_error, workloads.limits)


def read_facts(agent: Agent) -> pb.Facts:
    """Look at the machine."""
    machine = os.uname()
    try:
        disk = os.statvfs(agent.config.data_dir)
        disk_bytes = disk.f_blocks * disk.f_frsize
    except OSError:
        disk_bytes = 0
    return pb.Facts(
        hostname=parse_hostname(machine.nodename),
        arch=parse_hostname(machine.machine),
        kernel=parse_hostname(machine.release),
        agent_version=VERSION,
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=parse_memory_bytes(read_text("/proc/meminfo")),
        disk_bytes=disk_bytes,
        disk_encrypted=agent.disk_encrypted,
        engine_version=agent.workloads.engine_version,
        unready=read_unready(agent)[0],
        offered_cpu_milli=agent.workloads.limits.cpu_milli,
        offered_memory_bytes=agent.workloads.limits.memory_bytes,
        takes_secrets=agent.takes_secrets,
    )


def ensure_memory(path: Path) -> bool:
    """Make a directory for root alone; tell whether what is in it is in memory, and on no disk."""
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
        device = path.stat().st_dev
        row = rf"^\d+ \d+ {os.major(device)}:{os.minor(device)} .* - (?:tmpfs|ramfs) "
        return re.search(row, read_text("/proc/self/mountinfo"), re.MULTILINE) is not None
    return False


def ensure_secrets(directory: Path, wish: Wish) -> None:
    """Lay a workload's secrets whole, or leave those that are there when they are withheld.

    Its user reads them; others of this machine do not get through the directory above.
    """
    path, new = directory / wish.assignment_id, directory / f".{wish.assignment_id}.new"
    try:
        if wish.secrets:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(mode=0o700)
            for name, value in wish.secrets:
                with open(new / name, "xb") as file:
                    os.fchmod(file.fileno(), 0o444)
                    file.write(value)
            new.chmod(0o755)
            shutil.rmtree(path, ignore_errors=True)
            new.rename(path)
    except OSError as error:
        raise NoSecretsError(f"secrets cannot be laid: {error.strerror}") from None
    if wish.has_secrets and not path.is_dir():
        raise NoSecretsError("the control plane cannot read its secrets now, and none are here")


def remove_secrets(directory: Path, held: Collection[str]) -> None:
    """Remove the secrets of all assignments but these."""
    with contextlib.suppress(OSError):
        for path in [*directory.iterdir()]:
            if path.name.removeprefix(".").removesuffix(".new") not in held:
                shutil.rmtree(path, ignore_errors=True)


def ensure_scrubbed(env_file: Path, invite_id: str | None) -> None:
    """Take the spent token out of the env file as it is now; it may have been edited meanwhile."""
    path = Path(os.path.realpath(env_file))
    try:
        env = read_env(path)
        token = parse_token(env.values.get("INVITE_TOKEN", ""))
        if token is None or not token.text:
            return
        if token.id != invite_id:
            log(
                "WARN",
                "the invite in the env file was not used: this host has an identity",
                "remove it from the file; it is still worth a host",
                invite_id=token.id,
                file=path,
            )
            return
        if env.uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"the file belongs to uid {env.uid}")
        with open(path, "r+b") as spent:
            write_file(path, scrub_env(env.raw, token), env.mode)
            if os.fstat(spent.fileno()).st_nlink == 0:  # else it has another name, and is not ours
                os.pwrite(spent.fileno(), bytes(len(env.raw)), 0)  # freed blocks keep what they had
                os.fsync(spent.fileno())
    except (Error, OSError) as error:
        why = error.what if isinstance(error, Error) else error.strerror
        log(
            "WARN",
            "cannot remove the spent invite from the env file",
            "replace it by hand",
            file=path,
            error=why,
        )


def read_token_state(env_file: Path) -> str:
    """Say what kind of token the env file holds now."""
    try:
        return parse_token_state(parse_token(read_env(env_file).values.get("INVITE_TOKEN", "")))
    except Error:
        return "unreadable"


def open_control_socket(path: Path) -> socket.socket:
    """Listen on the control socket, in place of a dead agent's; refuse a live one's."""
    if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
        raise Error(
            f"path of the control socket is too long: {path}", "give another --socket", USAGE
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir()
            path.parent.chmod(0o755)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(PROBE_TIMEOUT_S)
                if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
                    raise Error(
                        f"another agent answers on {path}",
                        "stop it, or give another --socket",
                        LATER,
                    )
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(SOCKET_CLIENTS_MAX)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise Error(
                f"cannot open the control socket {path}: {error}",
                "mend that, or give another --socket",
            ) from None
        raise
    listener.setblocking(False)
    return listener


def ask_agent(
    path: Path, cmd: str, timeout_s: float = SOCKET_TIMEOUT_S, **more: object
) -> dict[str, Any] | None:
    """Ask the running agent for one thing; None when none answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.sendall(json.dumps({"cmd": cmd, **more}).encode() + b"\n")
            raw = b""
            while len(raw) < SOCKET_ANSWER_MAX_BYTES and not raw.endswith(b"\n"):
                part = sock.recv(SOCKET_ANSWER_MAX_BYTES)
                if not part:
                    break
                raw += part
        answer = json.loads(raw)
    except PermissionError:
        raise Error(f"{path} is for root only", "run this with sudo") from None
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, ValueError):
        what = f"the agent gives no answer on {path}"
        raise Error(what, "try again; look: journalctl -n 20 -u openinfra-agent", LATER) from None
    if isinstance(answer, dict) and "todo" in answer:
        raise Error(str(answer.get("error")), str(answer["todo"]))
    if not isinstance(answer, dict) or "state" not in answer:
        raise Error(
            f"what answers on {path} is another version", "systemctl restart openinfra-agent"
        )
    return answer


def read_status(
    path: Path, cmd: str = "status", timeout_s: float = SOCKET_TIMEOUT_S, **more: object
) -> dict[str, Any]:
    """Ask the running agent for its status, or for that and more."""
    answer = ask_agent(path, cmd, timeout_s, **more)
    if answer is None:
        raise Error(
            f"no agent answers on {path}",
            "is the service running? systemctl status openinfra-agent",
        )
    return answer


def read_source(control_plane: str) -> str:
    """This host's address towards the control plane; raises OSError outside the tunnel.

    With the tunnel down the kernel's route is the home LAN's. Nothing is sent to find that out.
    """
    address = parse_address(control_plane)
    if address.is_loopback:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect((str(address), 9))
        source = str(sock.getsockname()[0])
    if ipaddress.IPv4Address(source) not in TUNNEL:
        raise OSError(errno.ENETUNREACH, f"packets would leave from {source}")
    return source


def read_stray(control_plane: str) -> str:
    """Say why a packet to the control plane would miss the tunnel; empty when it would not."""
    try:
        read_source(control_plane)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def read_unreachable(control_plane: str) -> str:
    """Try the control plane's port; empty when it can be reached, else why not."""
    stray = read_stray(control_plane)
    if stray:
        return f"{NO_TUNNEL.what}: {stray}"
    host, _, port = control_plane.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


def read_tunnel() -> tuple[str, int | None]:
    """Look at the WireGuard interface: ok, absent or why not; age of the newest handshake."""
    if not Path("/sys/class/net", WG_INTERFACE).exists():
        return "absent", None
    try:
        shown = run(["wg", "show", WG_INTERFACE, "latest-handshakes"], echo=False)
    except Error as error:
        return error.what, None
    newest = parse_handshakes(shown)
    return "ok", None if newest is None else max(0, int(time.time()) - newest)


def read_failed_units() -> tuple[str, ...]:
    """Ask systemd for our units that failed; none where there is no systemd."""
    argv = ["systemctl", "list-units", "--plain", "--no-legend", "--state=failed,auto-restart"]
    try:
        shown = run([*argv, "openinfra-*", "wg-quick@openinfra.service"], echo=False)
    except Error:
        return ()
    return tuple(line.split()[0] for line in shown.splitlines() if line.strip())


def read_guard(path: Path) -> Guard | None:
    """Read what the last run of guard left."""
    try:
        return parse_guard(read_small(path, FILE_MAX_BYTES)[0])
    except OSError:
        return None


def save_guard(path: Path, guard: Guard) -> None:
    """Leave what was found for the agent, `doctor` and the next run."""
    try:
        write_file(path, json.dumps(vars(guard)).encode() + b"\n", 0o600)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror}", "run this as root") from None


def read_table_sha256() -> str:
    """A hash of our nft table as the kernel has it, but for what it counts; empty: it has none."""
    try:
        argv = ["nft", "--stateless", "--terse", "list", "table", *NFT_TABLE]
        listed = run(argv, timeout_s=NFT_S, echo=False)
    except Error:
        return ""  # what is wrong with nft itself shows when the table is laid
    return hashlib.sha256(listed.encode()).hexdigest()


def open_lock(path: Path) -> int:
    """A file to lock, 0600: whoever can open one can hold its lock."""
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Error(f"cannot write {path.parent}: {error.strerror}", "run this as root") from None


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Be the only guard at work: the timer's, or the one that watches."""
    lock = open_lock(directory / "guard.lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def open_watch() -> socket.socket:
    """Hear from the kernel of each change of nftables, whoever makes it."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
    sock.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
    return sock


def open_held(table: str) -> subprocess.Popen[bytes] | None:
    """Lay the copy that this nft owns, for as long as it has something to read; None: it cannot."""
    asked = f"{render_held(table)}list table {NFT_TABLE[0]} {HELD_TABLE}\n"
    pipe, out = subprocess.PIPE, subprocess.STDOUT
    env = {**os.environ, "LC_ALL": "C", "HOME": "/nonexistent"}  # it would write a history there
    argv = ["nft", "--interactive"]
    try:
        nft = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=out, env=env)
    except OSError:
        return None
    said, deadline_s = b"", read_boot_s() + HELD_WAIT_S
    to_nft, from_nft = (cast("IO[bytes]", each).fileno() for each in (nft.stdin, nft.stdout))
    with contextlib.suppress(OSError):
        os.write(to_nft, asked.encode())
        while (left_s := deadline_s - read_boot_s()) > 0 and b"Error" not in said:
            if b"\tflags owner\n" in said:  # listed; an echo of what was asked has no tab
                return nft
            if select.select([from_nft], [], [], left_s)[0]:
                part = os.read(from_nft, 65_536)
                if not part:
                    break
                said += part
    close_held(nft)
    return None


def close_held(nft: subprocess.Popen[bytes]) -> None:
    """End it; its table goes with it."""
    nft.kill()
    nft.communicate()


def wait_touched(sock: socket.socket, until_s: float) -> None:
    """Wait until somebody touched our table, or the time is over, whatever is said of others."""
    named = f"{NFT_TABLE[1]}\0".encode()
    try:
        while (left_s := until_s - read_boot_s()) > 0:
            sock.settimeout(left_s)
            if named in sock.recv(65_536):
                return
    except TimeoutError:
        pass
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # there was too much to hear: it may have been ours
            raise


def read_endpoints() -> str:
    """The addresses that the tunnel sends to."""
    return run(["wg", "show", WG_INTERFACE, "endpoints"], echo=False)


class Engine:
    """The container engine on its unix socket, by the Docker Engine API; blocks, for a thread.

    It is asked only for what carries our label, and told only to change what it listed so.
    """

    def __init__(self, path: Path, cgroup: Path = WORKLOADS_CGROUP) -> None:
        self.path, self.cgroup = path, cgroup
        self.is_installed = str(path) == DEFAULTS["engine_socket"]
        self.api = decide_api("")

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: object,
        timeout_s: float,
        **headers: str,
    ) -> Iterator[tuple[Any, socket.socket]]:
        """Send one request; whatever goes wrong becomes an EngineError."""
        import http.client  # `guard` seldom needs these
        import urllib.parse

        connection = http.client.HTTPConnection("engine", timeout=timeout_s)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.sock = sock
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(self.path))
            target = path if path in ("/_ping", "/version") else self.api + path
            target += "?" + urllib.parse.urlencode(query) if query else ""
            raw = None if body is None else json.dumps(body).encode()
            if raw:
                headers["Content-Type"] = "application/json"
            connection.request(method, target, raw, headers)
            yield connection, sock
        except TimeoutError:
            raise EngineError(504, f"no answer for {timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            why = error.strerror if isinstance(error, OSError) else type(error).__name__
            what = f"no container engine answers at {self.path}: {why or error}"
            raise EngineError(0, what) from None
        finally:
            connection.close()
            sock.close()

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> Any:
        """Make one request; give back the JSON of the answer, None for an empty one."""
        with self.open(method, path, query or {}, body, timeout_s) as (connection, _):
            answer = connection.getresponse()
            raw = answer.read(ENGINE_ANSWER_MAX_BYTES + 1)
        return parse_answer(answer.status, raw)

    def ask_gone(self, method: str, path: str, query: Mapping[str, str] | None = None) -> None:
        """Make one request that is done as well when what it is about is gone."""
        try:
            self.ask(method, path, query)
        except EngineError as error:
            if error.status != 404:
                raise

    def read_object(self, path: str, timeout_s: float = ENGINE_TIMEOUT_S) -> dict[str, Any]:
        """One object of the engine's; it may be another program that answers."""
        answer = self.ask("GET", path, timeout_s=timeout_s)
        if not isinstance(answer, dict):
            raise EngineError(502, f"what answers at {self.path} is no container engine")
        return answer

    def read_ours(self, path: str, **query: str) -> list[dict[str, Any]]:
        """The rows of a list that carry our label."""
        query["filters"] = json.dumps({"label": [LABEL]})
        rows = self.ask("GET", path, query)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise EngineError(502, f"what answers at {self.path} is no container engine")
        return [row for row in rows if LABEL in (row.get("Labels") or {})]

    def read_version(self, timeout_s: float = ENGINE_VERSION_TIMEOUT_S) -> str:
        """The engine's version; from then on it is spoken to as it wants."""
        answer = self.read_object("/version", timeout_s)
        self.api = decide_api(str(answer.get("MinAPIVersion")))
        return parse_hostname(str(answer.get("Version")))[:NAMED_MAX]

    def read_server(self) -> str:
        """What answers, with its version; to tell the rest of it costs an engine three programs."""
        with self.open("GET", "/_ping", {}, None, ENGINE_VERSION_TIMEOUT_S) as (connection, _):
            answer = connection.getresponse()
            if answer.status != 200:
                parse_answer(answer.status, answer.read(ENGINE_LINE_MAX_BYTES))
            return parse_line(answer.getheader("Server") or "", NAMED_MAX)

    def read_runc(self) -> str:
        """The version of runc, which is what a workload would break out of; empty: not known."""
        try:
            parts = self.read_object("/version", ENGINE_VERSION_TIMEOUT_S).get("Components")
            found = [str(part["Version"]) for part in parts or () if part["Name"] == "runc"]
        except (EngineError, TypeError, KeyError):
            return ""
        return parse_hostname(found[0])[:NAMED_MAX] if found else ""

    def read_image(self, image: str) -> object:
        """The Config of an image that is here; EngineError 404 when it is not."""
        return self.read_object(f"/images/{image}/json").get("Config")

    def pull(
        self,
        image: str,
        password: str,
        opened: Callable[[socket.socket], None],
        note: Callable[[str], None],
    ) -> None:
        """Fetch an image by its digest; `opened` gets the socket, whose shutdown ends this.

        It goes no further once its compressed layers are known not to fit on the engine's disk.
        """
        name, _, digest = image.partition("@")
        room = math.inf  # of a disk that cannot be seen
        with contextlib.suppress(OSError):
            root = str(self.read_object("/info").get("DockerRootDir"))
            room = shutil.disk_usage(root).total or room
        layers: dict[str, tuple[int, int]] = {}
        query = {"fromImage": name, "tag": digest}
        auth = {"X-Registry-Auth": render_registry_auth(name, password)}
        create = self.open("POST", "/images/create", query, None, PULL_SILENCE_S, **auth)
        with create as (connection, sock):
            opened(sock)
            answer = connection.getresponse()
            if answer.status != 200:
                parse_answer(answer.status, answer.read(ENGINE_LINE_MAX_BYTES))
            while line := answer.readline(ENGINE_LINE_MAX_BYTES):
                words = parse_pull(line, layers)
                if words:
                    raise EngineError(500, words)
                if layers:
                    note(render_progress(layers))
                needed = sum(total for _, total in layers.values())
                if needed > room:
                    sizes = f"{needed / 1e9:.1f} GB compressed for a disk of {room / 1e9:.1f} GB"
                    raise EngineError(413, f"the image is too large for this host: {sizes}")

    def knows_running(self, container_id: str) -> tuple[bool, str]:
        """Whether a container runs, which waits while it is about to start or end.

        With why nobody knows, and then it may; raises EngineError when no engine answers at all.
        """
        try:
            path = f"/containers/{container_id}/json"
            state = self.read_object(path, KNOWS_TIMEOUT_S).get("State")
        except EngineError as error:
            if error.status == 0:
                raise
            return error.status != 404, "" if error.status == 404 else str(error)
        return not isinstance(state, dict) or state.get("Running") is not False, ""

    def read_log(self, container_id: str, lines: int, limit_bytes: int) -> tuple[bytes, bool]:
        """The end of what a container printed, and whether the limit cut it."""
        query = {"stdout": "1", "stderr": "1", "tail": str(lines)}
        path = f"/containers/{container_id}/logs"
        with self.open("GET", path, query, None, LOG_TIMEOUT_S) as (connection, _):
            answer = connection.getresponse()
            if answer.status != 200:
                parse_answer(answer.status, answer.read(ENGINE_LINE_MAX_BYTES))
            return cut_log(parse_frames(answer.read), limit_bytes)

    def read_stats(self, container_id: str, timeout_s: float = METER_TIMEOUT_S) -> Reading | None:
        """What a container used since its start; None: it does not run."""
        path, query = f"/containers/{container_id}/stats", {"stream": "0", "one-shot": "1"}
        stats = self.ask("GET", path, query, timeout_s=timeout_s)
        try:
            return parse_reading(stats, read_boot_s())
        except (AttributeError, TypeError, ValueError):
            raise EngineError(502, "the engine's statistics cannot be read") from None

    def read_some_stats(self, container_ids: Sequence[str]) -> tuple[dict[str, Reading], int]:
        """The same of as many as there is time for, and how many that were."""
        found, asked = {}, 0
        until_s = read_boot_s() + METER_SLICE_S
        for name in container_ids:
            asked += 1
            try:
                if reading := self.read_stats(name):
                    found[name] = reading
            except EngineError as error:
                if error.status in (0, 504):
                    break
            if read_boot_s() >= until_s:
                break
        return found, asked

    def read_home(self, container_id: str) -> str:
        """The directory in which the engine has one for each container; empty: not known yet.

        Of one that runs: to tell all of itself an engine starts programs.
        """
        with contextlib.suppress(EngineError):
            seen = self.read_object(f"/containers/{container_id}/json", METER_TIMEOUT_S)
            home, _, rest = str(seen.get("ResolvConfPath")).rpartition(f"/{container_id}/")
            return home if rest == "resolv.conf" else ""
        return ""

    def read_taken(self, container_ids: Sequence[str], home: str) -> dict[str, Taken]:
        """What they took, that have their directories there; of what cannot be read 0."""
        found = {}
        for name in container_ids:
            groups = (self.cgroup / f"docker-{name}.scope", self.cgroup / name)
            events = "".join(read_text(str(group / "pids.events")) for group in groups)
            match = re.search(r"(?m)^max ([0-9]{1,18})$", events)
            one = Taken(int(match[1]) if match else 0)
            with contextlib.suppress(OSError):
                log = os.stat(f"{home}/{name}/local-logs/container.log")
                one = replace(one, log_inode=log.st_ino, log_bytes=log.st_size)
            found[name] = one
        return found

    def create(self, wish: Wish, address: str, network: str, secrets_dir: Path) -> None:
        """Make a workload's container, and its network unless it is there."""
        volumes = parse_volumes(self.read_image(wish.image), wish.has_secrets)
        body = render_container(wish, address, secrets_dir)
        body["HostConfig"]["Tmpfs"] |= {path: render_tmpfs(wish) for path in volumes}
        if network != render_network_name(wish):
            self.ask("POST", "/networks/create", None, render_network(wish))
        self.ask("POST", "/containers/create", {"name": f"oi-{wish.assignment_id}"}, body)

    def remove(self, container_id: str, network: str) -> None:
        """Remove a container that ended, and its network."""
        if container_id:
            self.ask_gone("DELETE", f"/containers/{container_id}", {"v": "1"})
        if network:
            self.ask_gone("DELETE", f"/networks/{network}")

    def remove_images(
        self, wished: Collection[str], used_s: Mapping[str, float], high: float
    ) -> list[str]:
        """Remove what nothing uses, when `high` of the disk is used; gives back what."""
        about, removed = self.read_object("/info"), []
        root = str(about.get("DockerRootDir"))
        if ENGINE_LABEL not in (about.get("Labels") or ()) or read_used(root) < high:
            return []
        rows = self.ask("GET", "/containers/json", {"all": "1"})  # strangers' too
        in_use = {str(row.get("ImageID")) for row in rows}
        for name in plan_images(self.ask("GET", "/images/json"), in_use, wished, used_s):
            if read_used(root) <= DISK_LOW:
                break
            self.ask_gone("DELETE", f"/images/{name}", {"force": "1"})
            removed.append(name)
        return removed

    def read_workloads(
        self, ends: Mapping[str, Mapping[str, Any]], busy: frozenset[str]
    ) -> tuple[tuple[Container, ...], dict[str, str], dict[str, Mapping[str, Any]]]:
        """All containers and networks of ours, and how containers ended; known ends stay."""
        found, seen = [], {}
        for row in self.read_ours("/containers/json", all="1"):
            bare = parse_container(row, None)
            end = ends.get(bare.id)
            if not bare.is_running and end is None and bare.assignment_id not in busy:
                try:
                    end = self.read_object(f"/containers/{bare.id}/json").get("State")
                except EngineError as error:
                    if error.status == 404:
                        continue
                    raise
            each = parse_container(row, end)
            found.append(each)
            if each.has_ended and end is not None:
                seen[each.id] = end
        networks = {
            str(row["Labels"][LABEL]): str(row.get("Name"))
            for row in self.read_ours("/networks")
            if re.fullmatch(r"o[ix]-[0-9a-f]{11}", str(row.get("Name")))
        }
        return tuple(found), networks, seen


def read_used(path: str) -> float:
    """The share of a file system that is used, of its bytes or of its inodes, whichever is more.

    0 for one that cannot be seen.
    """
    try:
        disk = os.statvfs(path)
    except OSError:
        return 0.0
    pairs = ((disk.f_bavail, disk.f_blocks), (disk.f_favail, disk.f_files))
    return max(1 - free / whole if whole else 0.0 for free, whole in pairs)


def is_empty(cgroup: Path) -> bool:
    """Tell whether the kernel knows of no process in a control group; False where it cannot say."""
    if not (cgroup.parent / "cgroup.controllers").exists():
        return False  # cgroup v1
    return "populated 1" not in read_text(str(cgroup / "cgroup.events"))


def read_lease(path: Path, boot_id: str) -> Lease:
    """Read what an earlier run of the agent had the right to; without a boot id, no right."""
    try:
        return parse_lease(read_small(path, FILE_MAX_BYTES)[0], boot_id, read_boot_s())
    except OSError:
        return Lease()


# ------------------------------------------------------------------------------------------------
# Operations: one call, one refusal, one answer each, on the agent's memory. Not pure.
# ------------------------------------------------------------------------------------------------

Reply = TypeVar("Reply")


async def read_earnings(agent: Agent, ask: Ask) -> dict[str, object]:
    """A page of what this host earned; raises Error with what keeps it from that."""
    if not agent.is_open:
        raise Error("this host is not online", "sudo openinfra-agent doctor")
    session = bytes.fromhex(agent.identity.session or "")
    request = pb.EarningsRequest(session=session, month=ask.month, cursor=ask.cursor)
    request.assignment_id = ask.assignment
    try:
        reply = await call(agent, agent.stub.ReadEarnings, request)
        if ask.assignment and not all(line.hour_at for line in reply.lines):
            raise RefusedError("UNIMPLEMENTED", "it does not know of hours")
    except RefusedError as refused:
        if refused.name == "UNIMPLEMENTED":
            what = "the control plane is older than this agent, and does not say it"
            raise Error(what, "ask the operator for a statement") from None
        what = f"the control plane does not say it: {refused.detail or refused.name}"
        raise Error(what, "try again; sudo openinfra-agent doctor") from None
    return render_earnings_page(reply)


async def call(agent: Agent, method: Callable[..., Awaitable[Reply]], request: object) -> Reply:
    """Make one RPC; raise RefusedError with the CP's reason, or gRPC's code without one.

    No call begins without the tunnel. The channel may go on by itself when the tunnel goes: its
    pings and the greeting of a new connection hold no secret, and an old connection's packets
    keep its address in the tunnel, which Linux sends from only while this machine has it. A call
    under way at that moment is left; the unit's firewall rule is the second line.
    """
    stray = read_stray(agent.config.control_plane)
    if stray:
        raise RefusedError("NO_TUNNEL", stray)
    try:
        reply = await method(request, timeout=RPC_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        name = error.code().name
        for key, value in error.trailing_metadata() or ():
            if key == "openinfra-reason" and str(value) in REFUSALS:
                name = str(value)
        raise RefusedError(name, parse_line(error.details() or "")) from None
    if reply is None:  # grpc.aio gives None for bytes that are not the message
        raise RefusedError("BAD_REPLY", "the reply could not be read")
    return reply


async def register(agent: Agent) -> pb.RegisterReply:
    """Redeem the invite; the secret and the session are on disk already."""
    identity, token = agent.identity, agent.config.token
    request = pb.RegisterRequest(
        invite_token=token.text if token else "",
        host_secret=bytes.fromhex(identity.host_secret),
        session=bytes.fromhex(identity.next_session or ""),
        payout_pubkey=agent.config.wallet,
        wg_pubkey=agent.wg_pubkey,
        facts=read_facts(agent),
    )
    failpoint("Register.before_send")
    reply = await call(agent, agent.stub.Register, request)
    failpoint("Register.after_reply")
    if not HOST_ID_RE.fullmatch(reply.host_id) or not INVITE_ID_RE.fullmatch(reply.invite_id):
        raise RefusedError("BAD_REPLY", "host_id or invite_id is malformed")
    note_connected(agent)
    log(
        "INFO",
        "registered with control plane",
        host_id=reply.host_id,
        onchain_payout=reply.onchain_payout,
    )
    agent.identity = replace(
        identity,
        host_id=reply.host_id,
        invite_id=reply.invite_id,
        session=identity.next_session,
        next_session=None,
    )
    return reply


async def resume(agent: Agent) -> pb.ResumeReply:
    """Open a session; one that was proposed before is proposed again, since its reply was lost."""
    data_dir = agent.config.data_dir
    if agent.identity.next_session is None:
        proposed = replace(agent.identity, next_session=secrets.token_hex(32))
        try:
            save_identity(data_dir, proposed)
        except OSError as error:
            raise Error(
                f"cannot save the next session: {error.strerror}",
                f"free some space on {data_dir}, or mend its disk",
            ) from None
        agent.identity = proposed
        agent.is_unsaved = False
    identity = agent.identity
    request = pb.ResumeRequest(
        host_secret=bytes.fromhex(identity.host_secret),
        session=bytes.fromhex(identity.next_session or ""),
        previous_session=bytes.fromhex(identity.session or ""),
        payout_pubkey=agent.config.wallet,
        wg_pubkey=agent.wg_pubkey,
    )
    failpoint("Resume.before_send")
    reply = await call(agent, agent.stub.Resume, request)
    failpoint("Resume.after_reply")
    if reply.host_id != identity.host_id:
        other = parse_line(reply.host_id, 40)
        raise Error(
            f"control plane says that this is host {other}",
            "nothing was changed; ask the operator",
            IDENTITY,
        )
    note_connected(agent)
    log("INFO", "resuming with persisted host_id (skipping Register)", host_id=reply.host_id)
    agent.identity = replace(identity, session=identity.next_session, next_session=None)
    return reply


async def open_session(agent: Agent) -> None:
    """Register or resume, keep what was agreed, and begin to count heartbeats."""
    is_new = agent.identity.host_id is None
    agent.state = "registering" if is_new else "resuming"
    reply = await (register(agent) if is_new else resume(agent))
    agent.is_unsaved = True
    ensure_saved(agent)
    failpoint("session.after_save")
    agent.is_open = True
    agent.seq = 1
    agent.session_heartbeats = 0
    agent.acknowledged_facts = None
    agent.workloads.revision = agent.workloads.seen_revision = 0
    agent.workloads.acknowledged = None
    agent.workloads.registry_password = decide_registry_password(agent.identity.session or "")
    agent.onchain_payout = reply.onchain_payout
    nominal_s = reply.heartbeat_interval_s or INTERVAL_NOMINAL_S
    agent.nominal_s = agent.interval_s = decide_interval_s(0, nominal_s)
    note_standing(agent, reply.standing)
    if not agent.is_running_logged:
        agent.is_running_logged = True
        log("INFO", f"agent running, sending heartbeats every {agent.nominal_s:g}s")


async def beat(agent: Agent) -> None:
    """Send one heartbeat; each try has its number, and news go until they are acknowledged."""
    workloads = agent.workloads
    request = pb.HeartbeatRequest(
        session=bytes.fromhex(agent.identity.session or ""),
        seq=agent.seq,
        boot_id=agent.boot_id,
        paused=agent.pause is not None,
        desired_revision=workloads.revision,
        nudge_port=ensure_nudge(agent),
    )
    pause = agent.pause
    agent.wake.clear()
    facts = read_facts(agent)
    # Until an answer comes nobody knows which of both the control plane has.
    if facts != agent.acknowledged_facts:
        request.facts.CopyFrom(facts)
        agent.acknowledged_facts = None
    observed = render_observed(workloads, facts.unready) if workloads.looks else None
    if observed is not None and observed != workloads.acknowledged:
        request.observed.CopyFrom(observed)
        workloads.acknowledged = None
    usage = await pop_usage(agent, BEAT_MAX_BYTES - request.ByteSize())
    request.usage.extend(render_counter(each) for each in usage)
    request.logs.extend(pop_logs(workloads, BEAT_MAX_BYTES - request.ByteSize()))
    failpoint("Heartbeat.before_send")
    sent_s = read_boot_s()
    agent.seq += 1  # also when no answer comes: this one may arrive after the next
    reply = await call(agent, agent.stub.Heartbeat, request)
    failpoint("Heartbeat.after_reply")
    agent.session_heartbeats += 1
    agent.heartbeats += 1
    agent.acknowledged_facts = facts
    agent.told_pause = pause
    workloads.acknowledged = observed
    if reply.HasField("earnings"):
        agent.earnings = render_earnings(reply.earnings)
    workloads.told |= {each.key: each.sums for each in usage}
    workloads.told_s |= {each.key: read_boot_s() for each in usage}
    take_reply(agent, reply, sent_s)
    begin_logs(agent, reply.log_requests)
    agent.interval_s = decide_interval_s(reply.next_heartbeat_ms, agent.nominal_s)
    agent.last_heartbeat_s = read_boot_s()
    note_accepted(agent)
    note_standing(agent, reply.standing)
    ensure_saved(agent)
    if not agent.is_unsaved and not agent.is_settled:
        agent.is_settled = True
        failpoint("scrub.before")
        ensure_scrubbed(agent.config.env_file, agent.identity.invite_id)
        with contextlib.suppress(OSError):
            (agent.config.data_dir / REFUSED_NAME).unlink()
        failpoint("scrub.after")


def take_reply(agent: Agent, reply: pb.HeartbeatReply, sent_s: float) -> None:
    """Take the list and the right to run it from an accepted heartbeat."""
    workloads, address = agent.workloads, agent.workloads.address
    with contextlib.suppress(OSError):  # the tunnel may have gone just now
        address = read_source(agent.config.control_plane)
    if reply.HasField("desired") and address:
        workloads.revision, workloads.address = reply.desired.revision, address
        workloads.wishes, workloads.refused = decide_wishes(
            reply.desired.assignments, workloads.limits, address, workloads.secrets_dir
        )
        pasts = workloads.memory.pasts
        for wish in workloads.wishes:
            if pasts.get(wish.assignment_id, Past()).wish_sha256 != wish.sha256:
                pasts[wish.assignment_id] = Past(wish.sha256)
    elif workloads.revision == 0 and not reply.HasField(
        "desired"
    ):  # there is no list for this host
        workloads.wishes, workloads.refused = (), {}
    workloads.seen = reply.seen_address or workloads.seen
    kept = frozenset(wish.assignment_id for wish in workloads.wishes or ())
    before, now_s = workloads.saved_lease or Lease(), read_boot_s()
    # A virtual machine that was paused sees it by a wall clock that was set since, or not at all.
    # No right is by that clock; what is gone from the list may lose its time to end by it.
    lead_s, memory = time.time() - now_s, workloads.memory
    skipped_s, workloads.wall_lead_s = max(0.0, lead_s - workloads.wall_lead_s), lead_s
    memory.late = decide_late(before, kept, memory.late, now_s + skipped_s)
    ensure_lease(agent, decide_right_s(sent_s, reply.lease_s, before.until_s), kept)
    workloads.stirred.set()


def pop_logs(workloads: Workloads, room_bytes: int) -> Iterator[pb.LogAnswer]:
    """Take the answers that are there and for which there is room."""
    for request_id, task in [*workloads.logs.items()]:
        size_bytes = task.result().ByteSize() + 8 if task.done() else room_bytes + 1
        if size_bytes <= room_bytes:
            room_bytes -= size_bytes
            yield workloads.logs.pop(request_id).result()


def begin_logs(agent: Agent, asked: Sequence[pb.LogRequest]) -> None:
    """Read what the control plane asks for; forget what it asks for no more."""
    wanted, logs = {one.request_id: one for one in asked[:LOGS_MAX]}, agent.workloads.logs
    for request_id, task in [*logs.items()]:
        if task.done() and request_id in wanted:
            agent.wake.set()  # there was no room for it
        elif task.done():
            del logs[request_id]
    for request_id, one in wanted.items():
        if request_id not in logs and len(logs) < LOGS_MAX:
            logs[request_id] = asyncio.create_task(read_log(agent, one))


async def read_log(agent: Agent, request: pb.LogRequest) -> pb.LogAnswer:
    """Read the end of what a container printed, and let the control plane have it soon."""
    workloads, answer = agent.workloads, pb.LogAnswer(request_id=request.request_id)
    name = request.assignment_id
    is_held = any(wish.assignment_id == name for wish in workloads.wishes or ())
    found = [each.id for each in workloads.containers if each.name == f"oi-{name}" and is_held]
    lines = min(max(request.tail_lines, 1), LOG_LINES_MAX)
    limit_bytes = min(max(request.limit_bytes, 1), LOG_MAX_BYTES)
    try:
        if not found:
            raise EngineError(404, "its host has no container of it now")
        async with workloads.log_reads:
            answer.content, answer.truncated = await in_thread(
                workloads, workloads.engine.read_log, found[0], lines, limit_bytes
            )
    except EngineError as error:
        answer.reason = str(error)
    agent.wake.set()
    return answer


def ensure_lease(agent: Agent, until_s: float, kept: frozenset[str]) -> None:
    """Save the right to run, for the guard and for the next agent; it counts once it is saved.

    While the host is paused there is none.
    """
    workloads, path = agent.workloads, agent.config.lease_file
    if agent.pause is not None:
        until_s = min(until_s, agent.paused_s)
    if workloads.wishes is not None:
        workloads.ports = tuple(sorted(port for one in workloads.wishes for port in outer(one)))
    pasts = {key: one for key, one in workloads.memory.pasts.items() if key in kept and one.streak}
    lease = Lease(until_s, kept, workloads.ports, workloads.seen, pasts)
    if lease == workloads.saved_lease:
        return
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o755)
        write_file(path, render_lease(agent.boot_id, lease), 0o600)
    except OSError as error:
        why = f"cannot write the lease file {path}: {error.strerror}"
        if until_s and why != workloads.lease_told:  # else it keeps nothing from running
            workloads.lease_told = why
            log("WARN", why, "no workload is started", error=error.strerror)
        workloads.lease_error = why
        return
    workloads.lease_error, workloads.lease_told, workloads.saved_lease = "", "", lease
    workloads.right_until_s = 0.0 if agent.pause else until_s
    workloads.memory.kept = kept


def keep_lease(agent: Agent) -> None:
    """Save the same right with what else changed."""
    lease = agent.workloads.saved_lease or Lease()
    ensure_lease(agent, lease.until_s, lease.kept)


def note_pause(agent: Agent) -> None:
    """See whether the provider paused this host: also by a file that was laid without this agent.

    What runs then ends as if its right were over; the right comes back with a heartbeat.
    """
    pause, workloads = read_pause(agent.config.data_dir), agent.workloads
    if pause == agent.pause:
        return
    if pause is None:
        log("INFO", "not paused any more")
    else:
        agent.paused_s = agent.paused_s if agent.pause else read_boot_s()
        log("INFO" if pause.since else "WARN", render_paused(pause), UNPAUSE)
        workloads.right_until_s = 0.0
    agent.pause = pause
    keep_lease(agent)
    agent.wake.set()


def ensure_nudge(agent: Agent) -> int:
    """Hear nudges on this host's address in the tunnel; give back the port, 0 for none.

    After a packet no other is looked at before the next heartbeat is made.
    """
    workloads = agent.workloads
    try:
        address = read_source(agent.config.control_plane)
        if workloads.nudge is None or workloads.nudge_address != address:
            close_nudge(workloads)
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            workloads.nudge = socket.socket(socket.AF_INET, kind)
            workloads.nudge.bind((address, 0 if address == "127.0.0.1" else NUDGE_PORT))
            workloads.nudge_address = address
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                workloads.nudge.recv(1)
        asyncio.get_running_loop().add_reader(workloads.nudge, hear_nudge, agent)
        return int(workloads.nudge.getsockname()[1])
    except OSError:
        close_nudge(workloads)
        return 0


def close_nudge(workloads: Workloads) -> None:
    """Hear no nudges."""
    if workloads.nudge is not None:
        asyncio.get_running_loop().remove_reader(workloads.nudge)
        workloads.nudge.close()
        workloads.nudge = None


def hear_nudge(agent: Agent) -> None:
    """Let the next heartbeat go out at once."""
    if agent.workloads.nudge is not None:
        asyncio.get_running_loop().remove_reader(agent.workloads.nudge)
    agent.wake.set()


async def in_thread(workloads: Workloads, function: Callable[..., Reply], *args: object) -> Reply:
    """Do what blocks beside the loop; the thread ends with the process at the latest."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(workloads.threads, lambda: function(*args))


async def ask_version(workloads: Workloads) -> None:
    """Keep the engine's version: that of ten seconds ago at most, or the last one that it told.

    Until it told one no work comes here, so that this is an error, also when it answers else. It is
    asked again when another one answers.
    """
    now_s = read_boot_s()
    if now_s < workloads.engine_asked_s + ENGINE_VERSION_AGE_S:
        return
    workloads.engine_asked_s = now_s
    engine = workloads.engine
    try:
        server = await in_thread(workloads, engine.read_server)
        if not workloads.engine_version or server != workloads.engine_server:
            workloads.engine_version = await in_thread(workloads, engine.read_version)
            workloads.engine_server = server
        workloads.engine_error = ""
    except EngineError as error:
        workloads.engine_error = str(error)


async def look(workloads: Workloads) -> None:
    """See what the engine has of ours, and note what ended."""
    engine, memory = workloads.engine, workloads.memory
    workloads.busy, revision = frozenset(workloads.tasks), workloads.revision
    wished = {wish.assignment_id for wish in workloads.wishes or ()}
    is_calm = all(key in wished or key.startswith("stop ") for key in workloads.busy)
    workloads.containers, workloads.networks, workloads.ends = await in_thread(
        workloads, engine.read_workloads, workloads.ends, workloads.busy
    )
    workloads.looks += 1
    if is_calm and revision == workloads.revision:
        workloads.seen_revision = revision
    if engine.is_installed and "frozen 1" in read_text(str(WORKLOADS_CGROUP / "cgroup.events")):
        found = workloads.containers
        workloads.containers = tuple(replace(one, is_frozen=one.is_running) for one in found)
    running = [each.id for each in workloads.containers if each.is_running]
    some = [name for name in running if HEX_32_RE.fullmatch(name)]
    if some and not workloads.engine_home:
        workloads.engine_home = await in_thread(workloads, engine.read_home, some[-1])
    taken = await in_thread(workloads, engine.read_taken, some, workloads.engine_home)
    now_s = read_boot_s()
    memory.strains = {
        name: add_taken(memory.strains.get(name), one, now_s) for name, one in taken.items()
    }
    told_at_s = 0.0
    with contextlib.suppress(OSError):
        told_at_s = workloads.ended_file.stat().st_mtime
    for each in workloads.containers:
        past = memory.pasts.get(each.assignment_id, Past(each.wish_sha256))
        if past.wish_sha256 != each.wish_sha256 or each.assignment_id in workloads.busy:
            continue  # another one takes its place, or it is being started
        if each.id in memory.strains and not past.excess:
            past = replace(past, excess=decide_excess(memory.strains[each.id]))
        was_told = each.id in memory.stops or was_shut_down(each, told_at_s)
        was_told = was_told and not past.excess
        memory.pasts[each.assignment_id] = decide_seen(past, each, was_told, now_s)
    for name, told_s in [*memory.stops.items()]:
        if name not in running or now_s > told_s + 3 * STOP_S:
            del memory.stops[name]
    known = {each.assignment_id for each in workloads.containers}.union(
        workloads.networks, workloads.tasks, (w.assignment_id for w in workloads.wishes or ())
    )
    memory.pasts = {name: past for name, past in memory.pasts.items() if name in known}
    memory.late &= known


async def meter(agent: Agent) -> None:
    """Count what workloads use, each minute and right before a stop; and keep it on the disk."""
    workloads, now_s = agent.workloads, read_boot_s()
    parting, workloads.parting = workloads.parting, []
    running = {each.id: each.assignment_id for each in workloads.containers if each.is_running}
    if not workloads.unread and now_s >= workloads.metered_s + METER_S:
        workloads.metered_s, workloads.unread = now_s, [*running]
    chosen = [name for name in workloads.unread if name in running and HEX_32_RE.fullmatch(name)]
    if chosen:
        engine = workloads.engine
        readings, number = await in_thread(workloads, engine.read_some_stats, chosen)
        parting += [(name, running[name], reading) for name, reading in readings.items()]
        chosen = chosen[number:]
    workloads.unread = chosen
    counts = dict(workloads.counts)  # as a heartbeat may have left it meanwhile
    for name, assignment_id, reading in sorted(parting, key=lambda each: each[2].at_s):
        fresh = Count(assignment_id, agent.boot_id, name)
        count = counts.get(fresh.key, fresh)
        if reading.at_s >= workloads.begun_s.get(name, math.inf):  # the engine begins at 0 again
            count = replace(count, last=fresh.last)
            del workloads.begun_s[name]
        counts[fresh.key] = add_reading(count, reading)
    live = {(agent.boot_id, each.id) for each in workloads.containers}
    begun_s = workloads.begun_s
    workloads.begun_s = {
        one.id: begun_s[one.id] for one in workloads.containers if one.id in begun_s
    }
    nothing = (0, 0, 0, 0)
    for key, count in [*counts.items()]:
        if key not in live and workloads.told.get(key, nothing) == count.sums:
            del counts[key]
            workloads.told.pop(key, None)
            workloads.told_s.pop(key, None)
    counts = merge_counts(counts, live, COUNTS_MAX)
    if counts != workloads.counts:
        workloads.counts = counts
        await save_counts(agent)


async def save_counts(agent: Agent) -> None:
    """Write usage.json beside the loop; on a full disk the counts go on in memory."""
    workloads = agent.workloads
    async with workloads.saving:
        path, raw = agent.config.data_dir / USAGE_NAME, render_counts(workloads.counts)
        try:
            await in_thread(workloads, write_file, path, raw, 0o600)
            workloads.is_usage_warned = False
        except OSError as error:
            if not workloads.is_usage_warned:
                workloads.is_usage_warned = True
                todo = "what workloads used is lost when this agent ends; make room on that disk"
                log("WARN", "usage cannot be saved", todo, error=error.strerror)


async def pop_usage(agent: Agent, room_bytes: int) -> list[Count]:
    """What goes with a heartbeat; that it went is on the disk before it goes."""
    workloads, chosen = agent.workloads, []
    live = {(agent.boot_id, each.id) for each in workloads.containers}
    for count in list_due(workloads.counts, workloads.told, workloads.told_s, live):
        room_bytes -= render_counter(count).ByteSize() + 4
        if room_bytes < 0:
            break
        chosen.append(replace(count, is_sent=True))
    fresh = {each.key: each for each in chosen}
    if any(not workloads.counts[key].is_sent for key in fresh):
        workloads.counts = {**workloads.counts, **fresh}
        await save_counts(agent)
    return chosen


async def tidy(workloads: Workloads) -> None:
    """Remove images that nothing uses, when the engine's disk is nearly full or was just full."""
    now_s = read_boot_s()
    wished = {wish.image for wish in workloads.wishes or ()}
    workloads.used_s |= dict.fromkeys(wished, now_s)
    if workloads.wishes is None or (now_s < workloads.tidied_s + TIDY_S and not workloads.is_full):
        return
    used_s = {name: at_s for name, at_s in workloads.used_s.items() if at_s > now_s - USED_MAX_S}
    workloads.used_s = used_s
    high = DISK_LOW if workloads.is_full else DISK_HIGH
    workloads.tidied_s, workloads.is_full = now_s, False
    try:
        removed = await in_thread(workloads, workloads.engine.remove_images, wished, used_s, high)
    except EngineError as error:
        log("WARN", "images stay", error=error)
        return
    if removed:
        log("INFO", "images removed: the disk was nearly full", count=len(removed))


def begin_steps(workloads: Workloads, unready: str) -> None:
    """Begin what is to be done, each step beside the others; no two at once for one assignment."""
    memory, now_s = workloads.memory, read_boot_s()
    held = decide_held(workloads.wishes, workloads.containers, memory)
    remove_secrets(workloads.secrets_dir, held | {*workloads.tasks} | workloads.busy)
    right_until_s = workloads.right_until_s
    until_s = (workloads.saved_lease or Lease()).until_s
    for step in plan_containers(
        workloads.wishes,
        workloads.containers,
        workloads.networks,
        now_s,
        right_until_s,
        memory,
        unready,
        until_s + STOP_S,
    ):
        if step.key in workloads.tasks or step.key in workloads.busy:
            continue  # at work, or done by now, and what was seen is of before
        if step.wish is not None and step.verb is Verb.PULL:
            if step.wish.image in workloads.progress:
                continue
            workloads.progress[step.wish.image] = ""
        if step.verb in (Verb.TERM, Verb.KILL):
            memory.stops.setdefault(step.container_id, now_s)
        if step.verb is Verb.TERM and now_s >= right_until_s:
            with contextlib.suppress(OSError):  # for the agent after this one
                workloads.ended_file.touch(0o600)
        workloads.tasks[step.key] = asyncio.create_task(do_step(workloads, step))
    wanted = {*(workloads.wishes or ())} if now_s < right_until_s else set[Wish]()
    for wish in workloads.sockets.keys() - wanted:
        with contextlib.suppress(OSError):
            workloads.sockets[wish].shutdown(socket.SHUT_RDWR)


async def do_step(workloads: Workloads, step: Step) -> None:
    """Do one step in its turn, and note what came of it."""
    pools = {Verb.PULL: workloads.pulls, Verb.CREATE: workloads.quick, Verb.START: workloads.quick}
    try:
        async with pools.get(step.verb, workloads.stops):
            if step.wish is not None and (
                step.wish not in (workloads.wishes or ())
                or read_boot_s() >= workloads.right_until_s
            ):
                return
            await in_thread(workloads, run_step, workloads, step)
        settle_step(workloads, step, None)
        workloads.stirred.set()
    except EngineError as error:
        for each in (step, *list_followers(workloads, step)):
            settle_step(workloads, each, error)
    except Refuse as why:
        settle_step(workloads, step, EngineError(400, str(why)))
    finally:
        workloads.tasks.pop(step.key, None)
        if step.wish is not None and step.verb is Verb.PULL:
            workloads.progress.pop(step.wish.image, None)
            workloads.sockets.pop(step.wish, None)


def list_followers(workloads: Workloads, step: Step) -> list[Step]:
    """What waits for the same image: a pull that fails has failed for all of these.

    None when nobody wants this one any more, which ends its pull: it is the next one's turn.
    """
    wishes, found = workloads.wishes or (), {each.assignment_id for each in workloads.containers}
    if step.wish is None or step.verb is not Verb.PULL or step.wish not in wishes:
        return []
    pasts = workloads.memory.pasts
    return [
        replace(step, assignment_id=wish.assignment_id, wish=wish)
        for wish in wishes
        if wish != step.wish and wish.image == step.wish.image
        if not (wish.is_done or wish.assignment_id in found)
        if not pasts.get(wish.assignment_id, Past()).has_image
    ]


def run_step(workloads: Workloads, step: Step) -> None:
    """Tell the engine to do one step; in a thread."""
    engine, container = workloads.engine, f"/containers/{step.container_id}"
    if step.verb is Verb.REMOVE:
        engine.remove(step.container_id, step.network)
    elif step.verb in (Verb.TERM, Verb.KILL):
        if step.verb is Verb.TERM and read_boot_s() < workloads.right_until_s:
            with contextlib.suppress(EngineError):
                if reading := engine.read_stats(step.container_id, PARTING_TIMEOUT_S):
                    workloads.parting.append((step.container_id, step.assignment_id, reading))
        engine.ask_gone("POST", f"{container}/kill", {"signal": f"SIG{step.verb.name}"})
    elif step.wish is not None and step.verb is Verb.START:
        ensure_secrets(workloads.secrets_dir, step.wish)
        engine.ask("POST", f"{container}/start")
    elif step.wish is not None and step.verb is Verb.CREATE:
        ensure_secrets(workloads.secrets_dir, step.wish)
        engine.create(step.wish, workloads.address, step.network, workloads.secrets_dir)
    elif step.wish is not None:
        wish = step.wish
        try:
            engine.read_image(wish.image)
        except EngineError as error:
            if error.status != 404:
                raise
            opened = functools.partial(workloads.sockets.__setitem__, wish)
            noted = functools.partial(workloads.progress.__setitem__, wish.image)
            engine.pull(wish.image, workloads.registry_password, opened, noted)


def settle_step(workloads: Workloads, step: Step, error: EngineError | None) -> None:
    """Note what came of a step; an engine that is down is no fault of the assignment."""
    if error is not None and error.status == 0:
        return
    if step.wish is None:
        if error is not None and error.status != 409 and str(error) != workloads.last_trouble:
            workloads.last_trouble = str(error)
            log("WARN", "the engine cannot do it", verb=step.verb.value, error=error)
        return
    now_s = read_boot_s()
    past = workloads.memory.pasts.get(step.assignment_id, Past())
    if past.wish_sha256 != step.wish.sha256:
        return
    if step.verb is Verb.START:
        was_ended = workloads.ends.pop(step.container_id, None) is not None
        workloads.begun_s[step.container_id] = now_s
        past = replace(past, started_s=now_s, ended_s=None, is_stopped=False, excess="")
        past = replace(past, restarts=past.restarts + was_ended)
    if error is not None:
        workloads.is_full |= NO_SPACE in str(error)
        past = decide_failure(past, step, error, now_s)
    else:
        past = replace(past, tries=0, trouble="", has_image=True)
    workloads.memory.pasts[step.assignment_id] = past


def note_lost(workloads: Workloads) -> None:
    """See how long the engine gives no answer."""
    now_s = read_boot_s()
    since_s = now_s if workloads.engine_lost_s is None else workloads.engine_lost_s
    workloads.engine_lost_s = since_s if workloads.engine_error else None
    workloads.is_lost = bool(workloads.engine_error) and now_s - since_s >= ENGINE_LOST_S


def note_idle(agent: Agent, unready: str) -> None:
    """Give back what cannot run here for long, so that it runs elsewhere; what runs goes on.

    While the engine is silent only when the kernel has no process of any workload.
    """
    workloads, now_s = agent.workloads, read_boot_s()
    since_s = now_s if workloads.unready_s is None else workloads.unready_s
    workloads.unready_s = since_s if unready and agent.pause is None else None
    if workloads.unready_s is None or now_s < since_s + GIVE_BACK_S:
        return
    if workloads.engine_error:
        if not (workloads.engine.is_installed and is_empty(WORKLOADS_CGROUP)):
            return
        workloads.containers = ()
    pasts = workloads.memory.pasts
    for wish in list_idle(workloads.wishes or (), workloads.containers, workloads.memory):
        past = pasts.get(wish.assignment_id, Past(wish.sha256))
        pasts[wish.assignment_id] = replace(past, rejected=f"this host cannot run it: {unready}")


def note_engine(workloads: Workloads) -> None:
    """Log once that an engine that is needed does not answer, and once that it does again."""
    is_needed = bool(workloads.wishes or workloads.containers)
    if workloads.engine_error and is_needed and not workloads.is_engine_logged:
        workloads.is_engine_logged = True
        todo = "sudo systemctl restart openinfra-engine"
        log("WARN", "container engine does not answer", todo, error=workloads.engine_error)
    elif not workloads.engine_error and workloads.is_engine_logged:
        workloads.is_engine_logged = False
        log("INFO", "container engine answers again", version=workloads.engine_version)


def note_observed(agent: Agent, unready: str) -> None:
    """Log what changed of each assignment, and let the control plane hear it soon, but for how far
    a pull is."""
    workloads = agent.workloads
    states: dict[str, tuple[int, int, str]] = {}
    for one in render_observed(workloads, unready).assignments:
        reason = "" if one.state == pb.ASSIGNMENT_STATE_PULLING else one.reason
        now = states[one.assignment_id] = (one.state, one.restarts, reason)
        if workloads.last_states.get(one.assignment_id, ())[:2] != now[:2]:
            name, state = parse_line(one.assignment_id, NAMED_MAX), parse_state(one.state)
            log("INFO", f"workload {state}", assignment_id=name, reason=one.reason)
    facts = agent.acknowledged_facts
    said = workloads.acknowledged
    is_told = said is not None and said.revision == workloads.seen_revision
    is_told = is_told and states == workloads.last_states
    if not is_told or (facts is not None and facts.unready != unready):
        agent.wake.set()
    workloads.last_states = states


async def end_workloads(agent: Agent) -> None:
    """Stop and remove everything, since the control plane has ended this agent."""
    workloads = agent.workloads
    workloads.wishes, workloads.refused = (), {}
    ensure_lease(agent, read_boot_s(), frozenset())  # the guard gives them their time to end
    workloads.right_until_s = 0.0
    workloads.stirred.set()
    await wait_for_end(workloads, has_any, STOP_S + LEASE_MARGIN_S)
    if workloads.containers:
        log("ERROR", "workloads are left", "sudo systemctl stop openinfra-engine")


async def wait_for_end(
    workloads: Workloads, is_left: Callable[[Workloads], bool], timeout_s: float
) -> bool:
    """Look again and again until nothing is left and nothing under way; False: not in time."""
    deadline_s, looks = read_boot_s() + timeout_s, workloads.looks
    while read_boot_s() < deadline_s and not workloads.engine_error:
        # The look that began before this one may have seen what was before.
        if not workloads.tasks and not is_left(workloads) and workloads.looks > looks + 1:
            return True
        if workloads.tasks:
            looks = workloads.looks
        workloads.stirred.set()
        await asyncio.sleep(0.1)
    return workloads.engine.path == NO_ENGINE


def has_running(workloads: Workloads) -> bool:
    """Tell whether a container of ours runs."""
    return any(each.is_running for each in workloads.containers)


def has_any(workloads: Workloads) -> bool:
    """Tell whether anything of ours is there."""
    return bool(workloads.containers or workloads.networks)


def is_told(agent: Agent, cmd: str) -> bool:
    """Tell whether the control plane heard what `cmd` did, and for `leave` has nothing here to run.

    What ended for good stays on its list, and is no reason to stay.
    """
    workloads, said, wishes = agent.workloads, agent.workloads.acknowledged, agent.workloads.wishes
    if agent.state != "running" or agent.told_pause != agent.pause:
        return False
    if cmd != "leave":
        return True
    mine, pasts = {one.assignment_id: one for one in workloads.containers}, workloads.memory.pasts
    if wishes is None or not all(
        is_over(wish, pasts.get(wish.assignment_id, Past()), mine.get(wish.assignment_id))
        for wish in wishes
    ):
        return False
    over = (pb.ASSIGNMENT_STATE_FINISHED, pb.ASSIGNMENT_STATE_FAILED)
    if said is None or said.revision != workloads.revision:
        return workloads.looks == 0  # an engine that was never seen has nothing to be heard of
    return all(one.state in over for one in said.assignments)


def change_pause_file(data_dir: Path, cmd: str) -> tuple[Pause | None, bool]:
    """Do what `pause`, `unpause` or `leave` asks to paused.json: how it is now, and if it was not.

    First of all, so that it holds whatever comes: a crash of the agent's, or a power cut.
    """
    before = read_pause(data_dir)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    pause = decide_pause(cmd, before, now)
    if pause != before:
        save_pause(data_dir, pause)
    return pause, pause != before


async def change_pause(agent: Agent, cmd: str) -> dict[str, object]:
    """Do what `pause`, `unpause` or `leave` asks, and wait for what follows."""
    workloads, has_ended = agent.workloads, True
    pause, is_new = change_pause_file(agent.config.data_dir, cmd)
    note_pause(agent)
    if pause is not None:
        has_ended = await wait_for_end(workloads, has_running, PAUSE_WAIT_S)
    deadline_s = read_boot_s() + (LEAVE_WAIT_S if cmd == "leave" else TELL_WAIT_S)
    while not is_told(agent, cmd) and agent.state != "retrying":
        if read_boot_s() >= deadline_s:
            break
        workloads.stirred.set()
        await asyncio.sleep(0.1)
    return {"is_new": is_new, "has_ended": has_ended, "is_told": is_told(agent, cmd)}


def change_pause_alone(config: Config, cmd: str) -> dict[str, Any]:
    """The same while no agent runs: its workloads go on until their lease ends, so that is ended.

    An agent that starts meanwhile finds the file; the guard ends what is missed here.
    """
    check_data_dir(config.data_dir, (os.geteuid(),))
    pause, is_new = change_pause_file(config.data_dir, cmd)
    trouble = ""
    if pause is not None:
        with contextlib.suppress(FileNotFoundError):
            config.lease_file.unlink()
        trouble = ensure_ended(Engine(config.engine_socket), config.lease_file)
    return {"is_new": is_new, "has_ended": not trouble, "unready": trouble, "is_told": False}


def ensure_saved(agent: Agent) -> None:
    """Save the identity that the CP accepted; a full disk must not take a good host offline."""
    if not agent.is_unsaved:
        return
    try:
        save_identity(agent.config.data_dir, agent.identity)
    except OSError as error:
        if not agent.is_save_warned:
            log(
                "WARN",
                "cannot save the identity, trying again with every heartbeat",
                "free some space or mend the disk before this machine restarts",
                data_dir=agent.config.data_dir,
                error=error.strerror,
            )
        agent.is_save_warned = True
        return
    if agent.is_save_warned:
        log("INFO", "identity saved")
    agent.is_unsaved = agent.is_save_warned = False


def note_connected(agent: Agent) -> None:
    """Log once that the control plane can be reached, at first and after each loss."""
    if not agent.is_connected:
        agent.is_connected = True
        log("INFO", "connected to control plane", addr=agent.config.control_plane)


def note_accepted(agent: Agent) -> None:
    """Forget the trouble that an accepted heartbeat ended."""
    note_connected(agent)
    if agent.trouble not in ("", UNREACHABLE.what, NO_TUNNEL.what):
        log("INFO", "control plane accepts heartbeats again")
    agent.state = "running"
    agent.attempt = 0
    agent.trouble = ""
    agent.last_error = None


def note_standing(agent: Agent, standing: pb.Standing) -> None:
    """Keep the standing, and log a change of what keeps workloads away."""
    agent.standing = standing
    reason = "; ".join(parse_line(reason) for reason in standing.reasons[:16]) or "none given"
    if standing.status == pb.HOST_STATUS_ONLINE and not standing.assignable:
        if reason != agent.warned_reason:
            log("WARN", "not assignable", reason=reason)
        agent.warned_reason = reason
    elif standing.assignable and agent.warned_reason:
        log("INFO", "assignable")
        agent.warned_reason = ""


def note_trouble(agent: Agent, refused: RefusedError, refusal: Refusal) -> None:
    """Log a trouble when it begins or changes, and every ten minutes while it lasts."""
    agent.last_error = {"reason": refused.name, "what": refusal.what, "todo": refusal.todo}
    now_s = read_boot_s()
    if refusal.what == agent.trouble and now_s < agent.trouble_logged_s + LOG_AGAIN_S:
        return
    agent.trouble = refusal.what
    agent.trouble_logged_s = now_s
    log(
        "ERROR" if refusal.action is MINUTE else "WARN",
        refusal.what,
        refusal.todo,
        addr=agent.config.control_plane,
        reason=refused.name,
        detail=refused.detail,
    )


def settle_refusal(agent: Agent, refused: RefusedError) -> float:
    """Do what a refusal asks for; give back the wait before the next call, or raise the end."""
    refusal = decide_refusal(refused.name)
    if refusal in (UNREACHABLE, NO_TUNNEL):
        agent.is_connected = False
    else:
        note_connected(agent)
    if refusal.action is STOP:
        if refused.name == "SESSION_SUPERSEDED" and not agent.is_open:
            # That session is over for good: the next start has to propose another one.
            fresh = None if agent.identity.host_id else secrets.token_hex(32)
            with contextlib.suppress(OSError):
                save_identity(agent.config.data_dir, replace(agent.identity, next_session=fresh))
        token = agent.config.token
        error = decide_error(refused, refusal, agent.identity, token.id if token else "")
        save_refused(agent.config.data_dir, refused.name, error)
        raise error
    agent.state = "retrying"
    agent.attempt += 1
    note_trouble(agent, refused, refusal)
    action = refusal.action
    if action is RESUME:
        agent.is_open = False
        # "At once" is for a session that worked; else two sides could spin.
        if agent.session_heartbeats == 0:
            action = BACK_OFF
        agent.session_heartbeats = 0
    agent.is_wakeable = action is BACK_OFF and agent.heartbeats == 0
    return decide_delay_s(action, agent.attempt, agent.heartbeats > 0, read_random_unit())


def collect(problems: list[Finding], check: Callable[[], Reply], otherwise: Reply) -> Reply:
    """Run a check of the daemon's for doctor: its Error becomes a finding."""
    try:
        return check()
    except Error as error:
        problems.append(Finding("ERROR", f"{error.what}.", error.todo))
    return otherwise


def read_identity_state(data_dir: Path) -> str:
    """Say how far the identity got; raise Error for one that the agent would refuse."""
    try:
        identity = read_identity(data_dir)
    except BrokenError as broken:
        raise Error(
            f"{data_dir}/{IDENTITY_NAME} is broken ({broken})", "ask for a fresh invite"
        ) from None
    if identity is None:
        return "absent"
    return "unregistered" if identity.host_id is None else "registered"


def read_snapshot(args: argparse.Namespace) -> Snapshot:
    """Look at everything that doctor judges; change nothing."""
    problems: list[Finding] = []
    config = collect(problems, lambda: read_config(args), None)
    token = parse_token_state(config.token) if config else "unknown"
    if config is None:
        config = decide_config(args, EnvFile(b"", {}, 0o600, 0))
    owners = (0, os.geteuid())
    data_dir, identity = config.data_dir, "unknown"
    encrypted: bool | None = None
    before = len(problems)
    collect(problems, lambda: check_data_dir(data_dir, owners), None)
    if len(problems) == before:
        encrypted = is_encrypted(data_dir)
        identity = collect(problems, lambda: read_identity_state(data_dir), "unknown")
    status = collect(problems, lambda: read_status(config.socket), None)
    is_here = parse_address(config.control_plane).is_loopback
    wg, handshake_age_s = ("skipped", None) if is_here else read_tunnel()
    return Snapshot(
        control_plane=config.control_plane,
        env_file=str(config.env_file),
        data_dir=str(data_dir),
        wallet=config.wallet,
        invite=token,
        problems=tuple(problems),
        identity=identity,
        mounted=os.path.ismount(data_dir),
        encrypted=encrypted,
        allow_unencrypted=config.allow_unencrypted,
        unreachable=read_unreachable(config.control_plane),
        wg=wg,
        handshake_age_s=handshake_age_s,
        firewall="" if is_here else decide_firewall(read_guard(config.guard_file), read_boot_s()),
        failed_units=() if is_here else read_failed_units(),
        runc=Engine(config.engine_socket).read_runc(),
        status=status,
        refused=read_refused(data_dir),
        pause=read_pause(data_dir),
    )


def read_wanted(guard_file: Path, lease_file: Path) -> str:
    """The table that is right now, for this home's networks and the control plane's address."""
    lease, guard = read_lease(lease_file, ""), read_guard(guard_file)
    homes = parse_routes(read_text("/proc/net/route"))
    homes += parse_endpoints(f"{guard.endpoints if guard else ''} {lease.seen}")
    # The engine's unit leaves here what it found before the engine began to forward.
    is_router = read_text(str(guard_file.parent / "ip_forward")).strip() != "0"
    return render_table(homes, lease.ports, is_router)


def lay_table(table: str) -> str:
    """Have nft lay it; where it cannot count connections, without that, and say why."""
    try:
        run(["nft", "--file", "-"], table.encode(), NFT_S, echo=False)
        return ""
    except Error as error:
        run(["nft", "--file", "-"], render_unlimited(table).encode(), NFT_S, echo=False)
        return error.what


def ensure_firewall(before: Guard | None, wanted: str) -> Guard:
    """Lay the table where it is not as it was laid; what keeps it from that is in the answer."""
    wanted_sha256 = hashlib.sha256(wanted.encode()).hexdigest()
    found = read_table_sha256()
    guard = Guard(read_boot_s(), "", wanted_sha256, found)
    if found and before and (before.wanted_sha256, before.listed_sha256) == (wanted_sha256, found):
        return guard
    try:
        why = lay_table(wanted)
        found = read_table_sha256()
        if not found:
            raise Error("nft says that it laid the table, and it is not there", "nft list ruleset")
        # What it was the last time that this same one was laid; the next run takes what it finds.
        if before and before.wanted_sha256 == wanted_sha256 and before.listed_sha256 != found:
            raise Error("somebody changes the table while it is laid", "nft monitor")
    except Error as error:
        # What is loaded is not what is wanted, also for the next run.
        return replace(guard, error=error.what, wanted_sha256="")
    if why and not (before and before.listed_sha256):
        log("WARN", "workloads' connections are not limited: nft cannot count them", error=why)
    if before and before.listed_sha256 and before.wanted_sha256 != wanted_sha256:
        what = "this home's networks, published ports, or the control plane's address"
        log("INFO", f"firewall follows what changed: {what}")
    elif before and before.listed_sha256:
        log("WARN", "firewall was changed or gone, and is in place again")
    else:
        log("INFO", "firewall is in place")
    return replace(guard, listed_sha256=found)


def ensure_frozen(engine: Engine, is_open: bool) -> str:
    """Freeze the workloads while the firewall is not in place, and let them go on when it is.

    At once where the engine is the installed one, else one by one. Gives back what keeps it from
    that; without an engine there is nothing to freeze.
    """
    has_frozen = engine.is_installed and freeze_at_once(WORKLOADS_CGROUP, is_open)
    if has_frozen and is_open:
        return ""  # else what another process froze one by one, which could not do this
    if engine.is_installed and not is_open and not has_frozen and WORKLOADS_CGROUP.exists():
        return "this process cannot let them go on"  # one that can is to try it
    if not engine.path.exists():
        return ""
    verb, trouble = "pause" if is_open else "unpause", ""
    try:
        engine.read_version(ENGINE_START_S)
        rows = engine.read_ours("/containers/json")
    except EngineError as error:
        return str(error)
    for row in rows:
        if (row.get("State") == "paused") != is_open:
            try:
                engine.ask_gone("POST", f"/containers/{row['Id']}/{verb}")
            except EngineError as error:
                trouble = str(error)
                continue
            name = parse_container(row, None).name
            log("WARN", "workload frozen" if is_open else "workload goes on", name=name)
    return trouble


def keep_firewall(guard_file: Path, lease_file: Path, engine: Engine) -> Guard:
    """One look at the firewall: what is not right is put right, and what was found is left."""
    with alone(guard_file.parent):
        before = read_guard(guard_file)
        guard = ensure_firewall(before, read_wanted(guard_file, lease_file))
        # Last time it may have been open, or nobody knows.
        is_frozen = read_text(str(WORKLOADS_CGROUP / "cgroup.freeze")).strip() == "1"
        if guard.error or before is None or before.error or is_frozen:
            trouble = ensure_frozen(engine, bool(guard.error))
            if trouble:
                log("WARN", "cannot freeze workloads, or let them go on", error=trouble)
            if trouble and before is not None and not guard.error:
                guard = replace(guard, error=f"workloads are frozen: {trouble}")  # tried again
        guard = replace(guard, error=guard.error or ensure_docker_user())
        # The name server's trouble is the last run's: it takes time, and the firewall needs none.
        old = before or guard
        guard = replace(guard, endpoint_error=old.endpoint_error, endpoints=old.endpoints)
        save_guard(guard_file, guard)
    return guard


def watch_firewall(
    lock: int, keep: Callable[[], Guard], read: Callable[[], str], look_round: Callable[[], None]
) -> NoReturn:
    """Put the firewall back as soon as somebody changed it, and hold a copy meanwhile.

    Each WATCH_S the rest of what a guard does as well, so `lock` tells openinfra-guard.service,
    each run of which begins a Python, that there is nothing to do: while the firewall is in place,
    this process can end and freeze workloads, and nothing holds it up; until it ends, however.
    """
    said, held, nft, is_held, child, began_s = "", "", None, None, 0, -WATCH_S
    signal.signal(signal.SIGALRM, lambda *_: fcntl.flock(lock, fcntl.LOCK_UN))
    with open_watch() as sock:
        while True:
            sd_notify("WATCHDOG=1")
            signal.alarm(SLOW_S)
            error, wanted = keep().error, read()
            if error and error != said:
                log("ERROR", "firewall is not in place", "see: openinfra-agent doctor", error=error)
            said = error
            if held != wanted or nft is None or nft.poll() is not None:
                if nft is not None:
                    close_held(nft)
                nft, held = open_held(wanted), wanted
                if nft is not None and not is_held:
                    log("INFO", "firewall is held: no flush opens it")
                elif nft is None and is_held is not False:
                    log("WARN", "firewall is not held: a flush opens it for some milliseconds")
                is_held = nft is not None
            if child and has_ended(child, began_s + ROUND_MAX_S):
                child = 0
            if not child and read_boot_s() >= began_s + WATCH_S:
                child, began_s = begin_round(lock, look_round), read_boot_s()
            signal.alarm(0)
            is_able = not error and can_reach(WORKLOADS_CGROUP)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if is_able else fcntl.LOCK_UN)
            now_s = read_boot_s()
            again_s = now_s + (WATCH_AGAIN_S if error else WATCH_S)
            wait_touched(sock, min(again_s, max(began_s + WATCH_S, now_s + WATCH_AGAIN_S)))


def begin_round(lock: int, look_round: Callable[[], None]) -> int:
    """Do it in a process of its own: a name server that does not answer holds up no firewall."""
    try:
        child = os.fork()
    except OSError as error:
        log("WARN", "guard cannot look for what is late", "too many processes?", error=error)
        return 0
    if child:
        return child
    try:
        os.close(lock)  # or it would be held when the one that watches is dead
        look_round()
    except Error as error:
        log("WARN", error.what, error.todo)
    except Exception as error:
        log("ERROR", "guard has a bug", error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def has_ended(child: int, until_s: float) -> bool:
    """Whether that process is over; from then on it is told to end."""
    if read_boot_s() >= until_s:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, os.WNOHANG)[0] == child


def is_right_over(lease_file: Path) -> bool:
    """Whether the agent has no right to run anything, and should have ended all of it by now."""
    boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
    return read_boot_s() >= read_lease(lease_file, boot_id).until_s + GUARD_LATE_S


def can_reach(cgroup: Path) -> bool:
    """Whether this process can freeze what is there; of a group that its unit did not find at its
    start it has no view that can be written (systemd.exec(5), ReadWritePaths=)."""
    return not cgroup.exists() or os.access(cgroup / "cgroup.freeze", os.W_OK)


def freeze_at_once(cgroup: Path, is_open: bool) -> bool:
    """Freeze all workloads by the kernel, or let them go on: cgroup.freeze, Linux 5.2.

    Also while the engine is dead. False: there are none, or it cannot.
    """
    path, wanted = cgroup / "cgroup.freeze", "1" if is_open else "0"
    try:
        if path.read_text().strip() != wanted:
            with open(path, "w") as freeze:
                freeze.write(wanted)
            log("WARN", f"all workloads {'frozen' if is_open else 'go on'}")
    except OSError:
        return False
    return True


def end_at_once(lease_file: Path, cgroup: Path) -> bool:
    """End all workloads by the kernel when their right is over: cgroup.kill, Linux 5.14.

    Also those that the engine does not know, and while it is dead. False: it could not, or there
    are none, or they may run.
    """

    def is_populated() -> bool:
        return "populated 1" in read_text(str(cgroup / "cgroup.events"))

    if not is_populated() or not is_right_over(lease_file):
        return False
    try:
        with open(cgroup / "cgroup.kill", "w") as kill:
            kill.write("1")
    except OSError as error:
        log("WARN", "cannot end workloads without the engine", error=error.strerror)
        return False
    until_s = read_boot_s() + KILLED_S
    while is_populated() and read_boot_s() < until_s:
        time.sleep(0.05)
    log("WARN", "workloads ended: their right to run was over")
    return not is_populated()


def ensure_ended(engine: Engine, lease_file: Path) -> str:
    """End the workloads whose right is over, which is the agent's work while it lives.

    At once where the engine is the installed one, else one by one. Gives back what keeps it from
    that; without an engine there is nothing to end.
    """
    if engine.is_installed and (
        end_at_once(lease_file, WORKLOADS_CGROUP) or is_empty(WORKLOADS_CGROUP)
    ):
        return ""  # nor is an engine asked, each few seconds, where nothing runs
    if not engine.path.exists() or not is_right_over(lease_file):
        return ""
    try:
        engine.read_version(ENGINE_START_S)  # its socket is there before it listens
        found, _, _ = engine.read_workloads({}, frozenset())
    except EngineError as error:
        return str(error)
    running = [each for each in found if each.is_running]
    if not running:
        return ""
    from concurrent.futures import ThreadPoolExecutor  # the guard seldom needs it

    with ThreadPoolExecutor(STOPS_MAX) as pool:
        troubles = list(pool.map(functools.partial(end_late, engine), running))
    return next(filter(None, troubles), "")


def end_what_is_late(engine: Engine, lease_file: Path) -> None:
    """The same, and it is logged when nobody knows."""
    late = ensure_ended(engine, lease_file)
    if late:
        log("WARN", "cannot look for workloads whose right to run is over", error=late)


def end_late(engine: Engine, container: Container) -> str:
    """End one whose right to run is over; gives back what kept it from that."""
    try:
        engine.ask_gone("POST", f"/containers/{container.id}/kill", {"signal": "SIGKILL"})
    except EngineError as error:
        return str(error)
    log("WARN", "workload ended: its right to run was over", name=container.name)
    return ""


def end_strays(engine: Engine, cgroup: Path) -> str:
    """End what has a process in a group of these although the engine does not know that it runs.

    A start that a kill of the engine cut off leaves one, of the workload or the `runc init` before
    it, which nobody else would ever end. The engine answers for a container only when its start is
    over: who runs before and after it said "not running" is no start at work. Gives back what kept
    it from looking at all of them; raises OSError and EngineError when it can look at none.
    """
    trouble = ""
    for name in os.listdir(cgroup) if cgroup.exists() else ():
        container, procs = parse_group(name), str(cgroup / name / "cgroup.procs")
        pids = read_text(procs).split() if container else []
        if pids:
            is_known, why = engine.knows_running(container)
            why = why if is_known else end_stray(container, procs, pids)
            trouble = why or trouble
    return trouble


def end_stray(container: str, procs: str, pids: list[str]) -> str:
    """End these processes if they are still the container's; gives back what kept it from that."""
    has_ended = False
    for pid in pids:
        try:
            process = os.pidfd_open(int(pid))
        except ProcessLookupError:
            continue
        except OSError as error:
            return f"process {pid}: {error.strerror}"
        try:
            if pid not in read_text(procs).split():
                continue
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                has_ended = True
            if not select.select([process], [], [], STRAY_TIMEOUT_S)[0]:
                return f"process {pid} does not end"
        finally:
            os.close(process)
    if has_ended:
        log("WARN", "ended what the engine had lost: its start was cut off", container=container)
    return ""


def ensure_docker_user() -> str:
    """Let workloads' packets past the provider's own Docker, whose FORWARD drops all but its own.

    Only where workloads and that chain are; what may pass at all our own table has said before.
    Gives back what keeps it from that.
    """
    has_workloads = any(name.startswith("oi-") for name in os.listdir("/sys/class/net"))
    if not has_workloads or shutil.which("iptables") is None:
        return ""
    try:
        listed = run(["iptables", "-w", "2", "-S", "DOCKER-USER"], echo=False)
    except Error:
        return ""  # no Docker, or one that uses nftables and has no such chain
    try:
        for rule in DOCKER_USER_RULES:
            if f"-A DOCKER-USER {rule}" not in listed:
                run(["iptables", "-w", "2", "-I", "DOCKER-USER", *rule.split()], echo=False)
    except Error as error:
        return error.what
    return ""


def ensure_endpoint(wg_conf: Path) -> str:
    """Look the control plane's name up again when it is long silent; says what keeps it from that.

    WireGuard itself does it only when the interface is made, and a name may get another address.
    """
    state, handshake_age_s = read_tunnel()
    if state != "ok" or (handshake_age_s is not None and handshake_age_s <= ENDPOINT_OLD_S):
        return ""
    try:
        key, endpoint = parse_peer(read_small(wg_conf, FILE_MAX_BYTES)[0].decode(errors="replace"))
        before = read_endpoints()
        run(["wg", "set", WG_INTERFACE, "peer", key, "endpoint", endpoint], b"", 8, echo=False)
        now = read_endpoints()
    except OSError as error:
        return f"cannot read {wg_conf}: {error.strerror}"
    except Error as error:
        return error.what
    if now != before:
        log("INFO", "control plane has another address", endpoint=now.split()[-1])
    return ""


def keep_endpoint(guard_file: Path, wg_conf: Path, keep: Callable[[], Guard]) -> None:
    """Find the control plane again, and keep workloads from it wherever it is; raises Error."""
    # `wg` asks the name server 15 times by default, with longer and longer waits.
    os.environ["WG_ENDPOINT_RESOLUTION_RETRIES"] = "1"
    said, guard = ensure_endpoint(wg_conf), read_guard(guard_file)
    if guard is None:
        return  # somebody removed it: the next look at the firewall makes one
    if said and not guard.endpoint_error:
        log("WARN", "cannot look up the control plane", "guard tries again", error=said)
    endpoints = read_fenced(guard.endpoints)
    if (said, endpoints) != (guard.endpoint_error, guard.endpoints):
        with alone(guard_file.parent):
            found = replace(read_guard(guard_file) or guard, endpoint_error=said)
            save_guard(guard_file, replace(found, endpoints=endpoints))
    if endpoints != guard.endpoints:
        check_firewall(keep())


def read_fenced(before: str) -> str:
    """The control plane's addresses as the kernel has them now, for Guard.endpoints.

    Without an interface they are those from before: what runs then must not reach it either. After
    a boot the first table has none, since the tunnel waits for it; nothing runs before that tunnel
    is up, and the next run is 10 s away. A moved one takes the old one's place in one transaction.
    """
    try:
        return " ".join(parse_endpoints(read_endpoints())) or before
    except Error:
        return before


# ------------------------------------------------------------------------------------------------
# Edges: the control socket, where root asks the daemon; one JSON line each way. Not pure.
# ------------------------------------------------------------------------------------------------


async def read_request(agent: Agent, reader: asyncio.StreamReader) -> dict[str, object]:
    """Wait for one request and make its answer."""
    try:
        line = await asyncio.wait_for(reader.readline(), SOCKET_TIMEOUT_S)
        asked = parse_request(line)
    except asyncio.TimeoutError:
        return {"error": f"no request within {SOCKET_TIMEOUT_S:g} s"}
    except ValueError:
        return {"error": f"request is longer than {SOCKET_LINE_MAX_BYTES} bytes"}
    except BrokenError as broken:
        return {"error": str(broken)}
    try:
        done: dict[str, object] = {}
        if asked.cmd == "earnings":
            done = {"earnings_page": await read_earnings(agent, asked)}
        elif asked.cmd != "status":
            done = await change_pause(agent, asked.cmd)
    except Error as error:
        return {"error": error.what, "todo": error.todo}
    token = read_token_state(agent.config.env_file)
    return render_answer(agent, read_unready(agent), token, os.getpid(), read_boot_s()) | done


async def answer_client(
    agent: Agent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Serve one client of the control socket; nothing that it does reaches the main loop."""
    agent.clients += 1
    try:
        if agent.clients > SOCKET_CLIENTS_MAX:
            answer: dict[str, object] = {"error": "too many clients at once, try again"}
        else:
            answer = await read_request(agent, reader)
        writer.write(json.dumps(answer).encode() + b"\n")
        await asyncio.wait_for(writer.drain(), SOCKET_TIMEOUT_S)
    except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
        # Cancelled only when the daemon ends; asyncio would log it as an error of ours.
        pass
    finally:
        agent.clients -= 1
        writer.close()


# ------------------------------------------------------------------------------------------------
# Loops: what runs as long as the daemon does. Not pure.
# ------------------------------------------------------------------------------------------------


async def wait(agent: Agent, delay_s: float) -> None:
    """Wait by a clock that counts suspend; a connection, a nudge or news may end it early."""
    loop = asyncio.get_running_loop()
    started_s = read_boot_s()
    agent.ready.clear()
    while True:
        agent.moved_s = loop.time()
        gone_s = read_boot_s() - started_s
        if gone_s >= delay_s:
            return
        piece_s = min(delay_s - gone_s, WAIT_PIECE_S)
        event = agent.ready if agent.is_wakeable else agent.wake
        if not agent.is_wakeable and not agent.is_nudgeable:
            await asyncio.sleep(piece_s)
        elif gone_s < WAKE_AFTER_S:
            await asyncio.sleep(min(piece_s, WAKE_AFTER_S))
        else:
            try:
                await asyncio.wait_for(event.wait(), piece_s)
                return
            except asyncio.TimeoutError:
                pass


async def live(agent: Agent) -> NoReturn:
    """Open a session, send heartbeats, and begin again where a refusal says so."""
    while True:
        agent.moved_s = asyncio.get_running_loop().time()
        agent.is_wakeable = agent.is_nudgeable = False
        try:
            if not agent.is_open:
                await open_session(agent)
            await beat(agent)
            delay_s, agent.is_nudgeable = agent.interval_s, True
        except RefusedError as refused:
            try:
                delay_s = settle_refusal(agent, refused)
            except Error:
                await end_workloads(agent)
                raise
        await wait(agent, delay_s)


async def tend(agent: Agent) -> NoReturn:
    """Bring the containers to what is assigned, and end them when the right to run them does."""
    workloads = agent.workloads
    while True:
        workloads.stirred.clear()
        await ask_version(workloads)
        try:
            await look(workloads)
            if workloads.engine_version:
                workloads.engine_error = ""
        except EngineError as error:
            workloads.engine_error = str(error)
        note_lost(workloads)
        note_pause(agent)
        keep_lease(agent)
        unready = read_unready(agent)[0]
        note_idle(agent, unready)
        if not workloads.engine_error:
            begin_steps(workloads, unready)
            await tidy(workloads)
            await meter(agent)
        note_engine(workloads)
        note_observed(agent, read_unready(agent)[0])
        with contextlib.suppress(asyncio.TimeoutError):
            tick_s = decide_tick_s(workloads, read_boot_s())
            await asyncio.wait_for(workloads.stirred.wait(), tick_s)


async def watch_channel(agent: Agent) -> NoReturn:
    """See the connection come up. One watch for the life of the channel: an abandoned one leaks."""
    while True:
        state = agent.channel.get_state()
        if state is grpc.ChannelConnectivity.READY:
            note_connected(agent)
            agent.ready.set()
        await agent.channel.wait_for_state_change(state)


async def feed_watchdog(agent: Agent) -> None:
    """Feed systemd's watchdog while the main loop moves, not merely while asyncio does."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    if not period_us.isdigit() or os.environ.get("WATCHDOG_PID", "") not in ("", str(os.getpid())):
        return
    loop = asyncio.get_running_loop()
    while True:
        if loop.time() - agent.moved_s < STUCK_AFTER_S:
            sd_notify("WATCHDOG=1")
        await asyncio.sleep(max(0.05, int(period_us) / 2_000_000))


# ------------------------------------------------------------------------------------------------
# Wiring and command line: the subcommands, and the one place that prints errors. Not pure.
# ------------------------------------------------------------------------------------------------


def ensure_stop(stop: asyncio.Event, signum: int) -> None:
    """Begin to stop; the next signal kills at once."""
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(each)
        signal.signal(each, signal.SIG_DFL)
    log("INFO", "agent stopping", signal=signal.Signals(signum).name)
    stop.set()
    with contextlib.suppress(OSError):
        sd_notify("STOPPING=1")


def make_workloads(config: Config, limits: Limits) -> Workloads:
    """Make the memory of workloads, empty."""
    return Workloads(
        engine=Engine(config.engine_socket, config.cgroup),
        secrets_dir=config.secrets_dir,
        ended_file=config.data_dir / ENDED_NAME,
        limits=limits,
        threads=ThreadPoolExecutor(THREADS_MAX),
        pulls=asyncio.Semaphore(PULLS_MAX),
        quick=asyncio.Semaphore(STEPS_MAX),
        stops=asyncio.Semaphore(STOPS_MAX),
        log_reads=asyncio.Semaphore(LOG_READS_MAX),
        saving=asyncio.Lock(),
        stirred=asyncio.Event(),
    )


async def serve(
    config: Config,
    identity: Identity,
    wg_pubkey: str,
    encrypted: bool,
    limits: Limits,
    listener: socket.socket,
) -> None:
    """Run the daemon until a signal or an error ends it."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ensure_stop, stop, signum)
    # As an address, so that no name server decides where the session goes.
    target = f"ipv{parse_address(config.control_plane).version}:{config.control_plane}"
    target = target.replace("localhost", "127.0.0.1")
    channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
    agent = Agent(
        config=config,
        identity=identity,
        wg_pubkey=wg_pubkey,
        disk_encrypted=encrypted,
        takes_secrets=ensure_memory(config.secrets_dir),
        boot_id=read_text("/proc/sys/kernel/random/boot_id").strip(),
        started_s=read_boot_s(),
        stub=cast("openinfra_pb2_grpc.AgentApiAsyncStub", openinfra_pb2_grpc.AgentApiStub(channel)),
        channel=channel,
        ready=asyncio.Event(),
        wake=asyncio.Event(),
        workloads=make_workloads(config, limits),
        moved_s=loop.time(),
    )
    lease, workloads = read_lease(config.lease_file, agent.boot_id), agent.workloads
    workloads.ports, workloads.seen = lease.ports, lease.seen
    workloads.memory.pasts = {**lease.pasts}
    ensure_lease(agent, lease.until_s, lease.kept)
    note_pause(agent)
    agent.workloads.counts = read_counts(config.data_dir)
    await ask_version(agent.workloads)
    server = await asyncio.start_unix_server(
        lambda reader, writer: answer_client(agent, reader, writer),
        sock=listener,
        limit=SOCKET_LINE_MAX_BYTES,
    )
    sd_notify("READY=1")
    parts = [live(agent), tend(agent), watch_channel(agent), stop.wait(), feed_watchdog(agent)]
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks[:4], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1)
        server.close()
        with contextlib.suppress(OSError):
            config.socket.unlink()
        await channel.close()
        close_nudge(agent.workloads)
        agent.workloads.threads.shutdown(wait=False, cancel_futures=True)
    for task in done:
        task.result()


def command_run(args: argparse.Namespace) -> int:
    """Check everything, then be the daemon."""
    config = read_config(args)
    log(
        "INFO",
        "agent starting",
        control_plane=config.control_plane,
        version=VERSION,
        data_dir=config.data_dir,
        grpc=grpc.__version__,
    )
    wg_pubkey = read_wg_pubkey(config.wg_pubkey_file)
    limits = read_limits(config.limits)
    check_data_dir(config.data_dir, (os.geteuid(),))
    encrypted = is_encrypted(config.data_dir)
    check_encrypted(config.data_dir, encrypted, config.allow_unencrypted)
    lock = take_lock(config.data_dir)
    try:
        failpoint("start.before_identity")
        identity = ensure_identity(config.data_dir, config.token)
        failpoint("start.after_identity")
        listener = open_control_socket(config.socket)
        asyncio.run(serve(config, identity, wg_pubkey, encrypted, limits, listener))
    finally:
        os.close(lock)
    return 0


def command_status(args: argparse.Namespace) -> int:
    """Print what the running agent says."""
    answer = read_status(Path(args.socket or DEFAULTS["socket"]))
    print(json.dumps(answer) if args.json else render_status(answer))
    return 0 if is_online(answer) else 1


def command_earnings(args: argparse.Namespace) -> int:
    """Print what this host earned in a month."""
    path, month, copy = Path(args.socket or DEFAULTS["socket"]), args.month, args.assignment
    if not re.fullmatch(MONTH, month):
        raise Error(f"{parse_line(month, 40)} is no month", "give one like 2026-11", USAGE)
    if copy and not HOST_ID_RE.fullmatch(copy):
        raise Error(f"{parse_line(copy, 40)} is no assignment", "copy it from its line", USAGE)
    pages: list[dict[str, Any]] = []
    while not pages or (pages[-1]["next_cursor"] and pages[-1]["lines"]):
        if len(pages) == EARNINGS_PAGES:
            raise Error("the month has too many lines", "ask the operator for a statement")
        cursor = pages[-1]["next_cursor"] if pages else 0
        asked = {"month": month, "cursor": cursor, "assignment": copy}
        answer = read_status(path, "earnings", RPC_DEADLINE_S + SOCKET_TIMEOUT_S, **asked)
        pages.append(answer["earnings_page"])
        month = pages[0]["month"]
    if len({page["share_micros"] for page in pages}) > 1:
        raise Error("an hour was closed meanwhile, and the lines changed", "run this again")
    found = {**pages[0], "lines": [line for page in pages for line in page["lines"]]}
    del found["next_cursor"]
    print(json.dumps(found) if args.json else render_earnings_table(found))
    return 0


def command_doctor(args: argparse.Namespace) -> int:
    """Print what is wrong."""
    findings = decide_findings(read_snapshot(args))
    is_well = all(finding.level == "INFO" for finding in findings)
    if args.json:
        rows = [vars(finding) for finding in findings]
        print(json.dumps({"ok": is_well, "findings": rows}))
        return 0 if is_well else 1
    for finding in findings:
        print(f"{finding.level:<5} {parse_line(finding.sentence, 900)}\n      {finding.command}")
    if is_well:
        print("nothing is wrong")
    return 0 if is_well else 1


def command_pause(args: argparse.Namespace) -> int:
    """End the workloads here at once, and take none until `unpause`."""
    path = Path(args.socket or DEFAULTS["socket"])
    wait_s = PAUSE_WAIT_S + (LEAVE_WAIT_S if args.command == "leave" else TELL_WAIT_S)
    answer = ask_agent(path, args.command, wait_s + SOCKET_TIMEOUT_S)
    if answer is None:
        answer = change_pause_alone(read_config(args), args.command)
    print(render_change(args.command, answer))
    return 0


def command_unpause(args: argparse.Namespace) -> int:
    """Take workloads again."""
    return command_pause(args)


def command_leave(args: argparse.Namespace) -> int:
    """Pause, and wait until the control plane has nothing assigned here; then uninstall."""
    return command_pause(args)


def command_strays(engine: Engine, cgroup: Path) -> int:
    """`guard --strays`; an engine that is not up is looked at when it has started."""
    try:
        engine.read_version(ENGINE_START_S)
        trouble = end_strays(engine, cgroup)
    except EngineError as error:
        if error.status == 0:
            return 0
        trouble = str(error)
    except OSError as error:
        trouble = f"{cgroup}: {error.strerror}"
    if trouble:
        what = f"cannot look for what the engine has lost: {trouble}"
        raise Error(what, "sudo systemctl restart openinfra-engine")
    return 0


def check_firewall(guard: Guard) -> None:
    """Raise Error when the firewall is not in place."""
    if guard.error:
        raise Error(f"firewall is not in place: {guard.error}", "is nftables installed? see above")


def command_guard(args: argparse.Namespace) -> int:
    """Put the firewall in place, and find the control plane again; once, as root."""
    path = Path(args.guard_file or DEFAULTS["guard_file"])
    engine = Engine(Path(args.engine_socket or DEFAULTS["engine_socket"]))
    lease_file = Path(args.lease_file or DEFAULTS["lease_file"])
    if args.strays:
        return command_strays(engine, Path(args.cgroup or DEFAULTS["cgroup"]))

    def keep() -> Guard:
        if engine.is_installed:
            end_at_once(lease_file, WORKLOADS_CGROUP)  # before all that may fail, or take its time
        return keep_firewall(path, lease_file, engine)

    keep_found = functools.partial(
        keep_endpoint, path, Path(args.wg_conf or DEFAULTS["wg_conf"]), keep
    )
    if args.watch:

        def look_round() -> None:
            end_what_is_late(engine, lease_file)
            keep_found()

        lock = open_lock(path.parent / "watch.lock")
        watch_firewall(lock, keep, functools.partial(read_wanted, path, lease_file), look_round)
    began_s = read_boot_s()
    try:
        guard = keep()
    finally:
        end_what_is_late(engine, lease_file)
    for _ in range(GUARD_TRIES - 1):  # at boot the tunnel waits for this run, and for none after it
        if not guard.error or read_boot_s() > began_s + GUARD_AGAIN_MAX_S:
            break
        time.sleep(GUARD_AGAIN_S)
        guard = keep()
    check_firewall(guard)
    keep_found()
    return 0


class Parser(argparse.ArgumentParser):
    """An argument parser that answers in our own style and never repeats a token."""

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"oi1_\S*", "oi1_...", parse_line(message))
        raise Error(said, f"see: {self.prog} --help", USAGE)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser from OPTIONS."""
    common = Parser(add_help=False, allow_abbrev=False)
    keys = []
    for option in OPTIONS:
        default = f"default: {option.default}" if option.default else ""
        if option.flag:
            env = f"env: {option.env}; " if option.env else ""
            text = f"{option.help} ({env}{default})"
            common.add_argument(option.flag, dest=option.name, metavar="VALUE", help=text)
        if option.env:
            keys.append(f"  {option.env:<22} {option.help} {default}".rstrip())
    common.add_argument(
        "--allow-unencrypted",
        action="store_true",
        help="run on a disk without encryption, for tests: no workload with secrets comes here",
    )
    parser = Parser(prog="agent.py", description="The OpenInfra agent.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    epilog = "keys of the env file:\n" + "\n".join(keys)
    for name, function in COMMANDS.items():
        command = commands.add_parser(
            name,
            parents=[common],
            help=function.__doc__,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "earnings":
            command.add_argument("--month", default="", help="like 2026-11; default: this one")
            command.add_argument("--assignment", default="", help="hour by hour, of this one")
        if name in ("status", "doctor", "earnings"):
            command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "guard":
            command.add_argument(
                "--watch", action="store_true", help="stay, and put it back at once"
            )
            command.add_argument(
                "--strays", action="store_true", help="end what the engine has lost, nothing else"
            )
    return parser


COMMANDS = {
    "run": command_run,
    "status": command_status,
    "earnings": command_earnings,
    "doctor": command_doctor,
    "pause": command_pause,
    "unpause": command_unpause,
    "leave": command_leave,
    "guard": command_guard,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; print one line for a person when that fails."""
    # grpc logs a traceback for a reply that it cannot read; ours says that in one line.
    logging.getLogger("grpc").addHandler(logging.NullHandler())
    logging.getLogger("grpc").propagate = False
    try:
        check_failpoints()
        args = make_parser().parse_args(argv)
        return COMMANDS[args.command](args)
    except Error as error:
        log("ERROR", error.what, error.todo, **error.pairs)
        return error.exit_code


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Python's own end frees gRPC's channel, and then grpcio 1.51 now and then spins for ever.
    os._exit(code)
