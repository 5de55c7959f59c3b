#!/usr/bin/env python3
"""cp_server.py - the control plane (CP) of an OpenInfra fleet, in one file.

What it does
  serve     answers agents (gRPC), operator and customers (HTTP, JSON); keeps all in PostgreSQL,
            but for what workloads printed: that passes from host to customer and is not kept
  migrate   makes or upgrades the database schema; the only command that needs the owner's rights
  token     mints a JWT for the operator's HTTP API (--new-key adds a signing key first)
  invite    mints a single-use invite for a host
  hosts     lists the hosts, each with its status and why it is not assignable
  revoke    removes a host for good
  customers lists customers; add-customer, add-namespace, mint-key, revoke-key: with their keys
  workloads lists workloads, where each runs and why it does not
  invoices  prints what customers pay, statements what providers are owed, or writes each as
            files, mode 0600, into the directory of --out; rate-cards, add-rate-card, add-payment,
            credit-limit: what these come of; ledger verify adds it up
  usage     lists what each copy used in a month, and what its host counted; or a copy's hours
  drain     moves a host's workloads elsewhere and gives it no more; undrain: it may have them again
  label     says what a host is, KEY=VALUE, for workloads that ask for such ones only
  doctor    says what is wrong here; --invariants tests what must hold after every fault
  dist      makes and signs the release that hosts download from /dist/
  backup    writes one encrypted file with the database, the hub's key, signing keys and settings
  restore   takes such a file on a new machine: every host comes back by itself
  pilot     all of it on this one machine, for a newcomer: own PostgreSQL, CP, one agent, and a
            container in its Docker (or a plain process in its place), which it bills

Files (mode; under systemd the secrets come from $CREDENTIALS_DIRECTORY instead)
  /etc/openinfra/cp.env                    settings, KEY=value, each also a flag; `restore` writes
  /etc/openinfra/cp/dsn              0600  read: PostgreSQL connection string of the CP's own role
  /etc/openinfra/cp/owner-dsn        0600  the same of the owner: migrate, backup, restore read it
  /etc/openinfra/cp/jwt-keys.json    0600  of operators' tokens; `token --new-key`, `restore` write
  /etc/openinfra/cp/secrets.key      0600  read: encrypts workloads' secrets; in no backup
  /etc/wireguard/wg0.conf            0600  `backup` reads it, `restore` writes its key and peers
  /etc/openinfra/release/key.pem     0600  signs releases; `dist`, `backup` read, `restore` writes
  /etc/…/*.before-restore                  beside each of these: what `restore` found
  /var/lib/openinfra-pilot/          0711  pilot: all it has; ~/.local/share/… for a user, or --dir
  /run/docker.sock                         pilot: an image, a network, a container, gone at its end
  /tmp/openinfra-gpg-*/              0700  backup, restore: gpg's home; they remove what stayed
  ~/.cache/openinfra/cp-<hash>/      0755  pilot: its Python packages; beside it a .lock file
Ports
  10.77.0.1:9092/tcp     gRPC for the agents, inside the tunnel (pilot: 127.0.0.1)
  127.0.0.1:8080/tcp     HTTP for operator and customers, behind Caddy, which asks here as well
                         who may do what with the registry; and metrics for this machine
It runs as an ordinary user, without capabilities; root runs dist, backup, restore, and the pilot
may, which then installs packages (it says so first). For a tag's digest it asks the registry at
REGISTRY_URL (127.0.0.1:5000).
Runs, but not in `serve`: openssl (dist); pg_dump, pg_restore, psql, gpg, gpgconf, wg, wg-quick
  (backup, restore); apt-get, python3 -m venv, pip, setpriv, initdb, postgres, agent.py, ldd and,
  as nobody where root runs it, sh (pilot).
Needs: Python 3.10, PostgreSQL 15 or newer; packages grpcio, protobuf, psycopg, psycopg-pool.
Exit codes: 0; 1 error; 2 usage; 3 refused to protect data; 75 try later (database not there).

Examples
  ./cp_server.py pilot
  ./cp_server.py invite --note "provider@home" --payout-pubkey 7xKX...
  ./cp_server.py backup --out /root/cp.backup --passphrase-file /root/passphrase
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime as dt
import errno
import fcntl
import functools
import getpass
import glob
import hashlib
import heapq
import hmac
import html
import http
import http.client
import http.server
import io
import ipaddress
import json
import logging
import os
import random
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

VERSION = "0.1.0"


# ---------------------------------------------------------------------------------------------
# Errors and copied helpers: word for word the same in every script that has them.
# ---------------------------------------------------------------------------------------------


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


def read_cache_directory() -> Path:
    """Where OpenInfra keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openinfra"


def ensure_pinned_virtualenv(requirements: Path, name: str) -> Path:
    """Give back the Python of a virtualenv with exactly these hash-pinned packages; make it once.

    One that was not finished has no stamp and is made anew; a lock keeps a second maker waiting.
    """
    pins = requirements.read_bytes()
    key = hashlib.sha256(pins + sys.version.encode() + sys.executable.encode()).hexdigest()[:16]
    directory = read_cache_directory() / f"{name}-{key}"
    python = directory / "bin" / "python"
    stamp = directory / "complete"
    if stamp.exists():
        return python
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            shutil.rmtree(directory, ignore_errors=True)
            run([sys.executable, "-m", "venv", str(directory)], timeout_s=120)
            install = [str(python), "-m", "pip", "install", "--quiet", "--require-hashes"]
            install += ["--only-binary=:all:", "-r", str(requirements)]
            run(install, timeout_s=900)
            stamp.touch()
    return python


# ---------------------------------------------------------------------------------------------
# Runtime: finds the third-party packages; for the pilot it may install them. Changes the machine.
# ---------------------------------------------------------------------------------------------

REQUIREMENTS = Path(__file__).resolve().parent / "systemd" / "cp-requirements.txt"
POSTGRES_MIN = 15  # Debian 12's; the schema is tested on nothing older


def find_postgres() -> Path | None:
    """The directory of the newest usable PostgreSQL server binaries on this machine, or None."""
    found = {}
    on_path = shutil.which("postgres")
    for name in [*glob.glob("/usr/lib/postgresql/*/bin/postgres"), *([on_path] if on_path else [])]:
        binary = Path(name).resolve()
        match = re.search(r"\) (\d+)", run([str(binary), "--version"], echo=False))
        if match and int(match[1]) >= POSTGRES_MIN and (binary.parent / "initdb").exists():
            found[int(match[1])] = binary.parent
    return found[max(found)] if found else None


def ensure_packages(want_venv: bool) -> None:
    """Install Debian's packages that the pilot lacks, as root; else say the one line to type."""
    missing = [] if find_postgres() else ["postgresql"]
    if want_venv and not has_ensurepip():
        missing.append("python3-venv")
    if not missing:
        return
    line = "apt-get install -y --no-install-recommends " + " ".join(missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Error(
            f"the pilot needs {' and '.join(missing)}, and this user cannot install packages",
            f"type: sudo {line}",
        )
    print(f"The pilot needs {' and '.join(missing)}; installing with apt-get.", file=sys.stderr)
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run(["apt-get", "update", "-q"], timeout_s=600)
    run(shlex.split(line), timeout_s=1800)


def has_ensurepip() -> bool:
    """True when `python3 -m venv` can put pip into a virtualenv (Debian splits that off)."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        return False
    return True


def find_runtime(missing: ImportError) -> None:
    """Start this program again where its packages are, or end with what to type."""
    if {"-h", "--help"} & set(sys.argv):  # to read what it does must not need it
        print((__doc__ or "").strip())
        raise SystemExit(0) from None
    try:
        if sys.argv[1:2] != ["pilot"] or os.environ.get("OPENINFRA_RUNTIME") == "1":
            raise Error(
                f"cp_server.py lacks a Python package: {missing}",
                f"make a virtualenv and in it: pip install --require-hashes -r {REQUIREMENTS}",
            )
        if not REQUIREMENTS.exists():
            what = f"{REQUIREMENTS} is missing"
            raise Error(what, "copy the whole repository, then run this again")
        ensure_packages(want_venv=True)
        print("Looking for the private virtualenv, or making it once.", file=sys.stderr)
        python = ensure_pinned_virtualenv(REQUIREMENTS, "cp")
        os.environ["OPENINFRA_RUNTIME"] = "1"  # once: a broken virtualenv must not loop
        os.execv(python, [str(python), *sys.argv])
    except Error as error:
        log("ERROR", error.what, error.todo, **error.pairs)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it has a line for each malformed header
try:
    import grpc
    import grpc.aio
    import psycopg
    from google.protobuf.message import DecodeError, Message
    from psycopg.rows import class_row, dict_row
    from psycopg.types.json import Jsonb
    from psycopg_pool import AsyncConnectionPool, PoolTimeout

    from proto import openinfra_pb2 as pb
except ImportError as error:
    find_runtime(error)


# ---------------------------------------------------------------------------------------------
# Constants: names, limits and times of the control plane. Pure.
# ---------------------------------------------------------------------------------------------

USAGE = 2  # exit code
TUNNEL = ipaddress.IPv4Network("10.77.0.0/16")
HUB = ipaddress.IPv4Address("10.77.0.1")
INVITE_TTL_HOURS = 24
INVITE_TTL_MAX_HOURS = 72
HEARTBEAT_S = 30
HEARTBEAT_MAX_S = 60
OFFLINE_AFTER_INTERVALS = 3
CUSTOMER_KEYS_MAX = 50  # of one customer, without those that were revoked
CUSTOMER_NAMESPACES_MAX = 50  # of one customer
WORKLOADS_MAX = 200  # of one customer
REPLICAS_MAX = 20  # of one workload
LABELS_MAX = 16  # of a host, and of those that a workload asks for
PORTS_MAX = 8  # of one workload; an assignment has a slot of as many on its host
PORT_FIRST = 20_000  # of those on a host's tunnel address; up to PORT_FIRST + 8 * PORT_SLOTS - 1
PORT_SLOTS = 1_024
SPEC_BYTES = 16_384  # of a command and environment; a full host gets 3 MB of them in a reply
SECRETS_MAX = 16  # of one workload
SECRETS_BYTES = 16_384  # of them with their names; as much again in that reply
SECRETS_LOST = "its secrets cannot be read here: set all of them again by the same POST"
ASSIGNMENTS_MAX = 200  # of one host
LEASE_S = 600  # from an accepted heartbeat on; the host stops what it runs 15 s before the end
LEASE_GRACE_S = 30  # after that end a replica is placed again
READY_S = 10.0  # a new copy runs this long before the next old one is replaced
PLACE_S = 5.0  # between two looks for replicas without a place, when nothing wakes
PLACE_REST_S = 0.2  # and at least this when something does
PLACE_LOOKS_MAX = 300_000  # at hosts in one round: a second at most, as long as heartbeats wait
PLACE_COPIES_MAX = 1_000  # that one round places; the next goes on
REJECTED_S = 3600  # a host that rejected a workload comes last for it this long, as do its ports
NUDGE_AFTER_S = (0.0, 0.3, 0.9)  # packets get lost
LOG_LINES = 100
LOG_LINES_MAX = 1_000
LOG_BYTES = 32_768  # of all copies that are asked of one host at once: a heartbeat has twice that
LOG_S = 5.0  # the longest that a customer waits for hosts; an agent answers in one or two
LOG_READERS_MAX = 2  # customers that wait at once, each for one answer: each takes an HTTP worker
USAGE_GRACE_S = 300  # after a full hour its windows are closed; what comes later is another one
USAGE_S = 60.0  # between two looks for hours that are over, and at balances
CREDIT_LOOKS = 500  # open copies that a look takes at one go, for others wait meanwhile
USAGE_LATE_S = 7 * 86_400  # counters of a copy that ended are taken for so long
COUNTERS_MAX = 64  # in one heartbeat
COUNTERS_KEPT = 1_000  # containers of one copy
COUNTERS_SLACK_US = 120_000_000
COUNTERS_NONE_US = 600_000_000  # without any of a copy
USAGE_BATCH = 1_000  # copies in one transaction,
USAGE_PARTS = 5_000  # hours of them,
USAGE_HOURS = 6  # and of each
INVOICE_AFTER_S = 86_400  # after a month is over its invoices are issued
EARNINGS_LINES = 200  # of what a host earned, in one message
CREDIT_NOTICE_S = 3_600  # a customer without credit has this long before its copies stop
EGRESS_MAX_BYTES_PER_US = 125  # 1 Gbit/s: no copy sends or gets more, whatever its host says
HOUR_US = 3_600_000_000
CPU_HOUR = 1_000 * HOUR_US  # what a price is for: thousandths of a processor times microseconds,
GB_HOUR = 10**9 * HOUR_US  # bytes times microseconds,
GB = 10**9  # and bytes
INT64_MAX = 2**63 - 1
COUNTED_MAX_BYTES = 2**62
BILL_CLASSES = {"workload": "w", "host": "w", "assignment": "w", "what": "t", "unit": "t"}
EGRESS_MAX_BYTES = 1_000 * EGRESS_MAX_BYTES_PER_US * HOUR_US  # counted for a copy in an hour
PRICE_MAX = 10**12  # micro-units for one hour or GB
TAKEOVERS_MAX = 3  # more than these within TAKEOVER_WINDOW_S: quarantine
TAKEOVER_WINDOW_S = 600
BATCH_S = 0.1  # how long the first heartbeat of a batch waits for others
BATCH_MAX = 500
SWEEP_S = 5.0
PRUNE_S = 3600.0
PRUNE_MAX = 10_000
BATCH_DEADLINE_S = 10.0  # for a database that is there and says nothing
WAITING_MAX = 20 * BATCH_MAX  # heartbeats of all hosts that may wait for their batch
WAITING_PEER_MAX = 16  # and of one address: a host has one, a retry and a copy's
SESSIONS_MAX = 30  # a host may open within TAKEOVER_WINDOW_S: a crash loop goes on, a flood not
CHANGES_MAX = 50  # of its wallet and its key that a host may make in a day
STOP_S = 4.0  # in-flight calls have this long after SIGTERM, and the last batch as long again
STOP_ALL_S = 9.0  # then the process ends, whatever still hangs
GRPC_MESSAGE_BYTES = 65_536
GRPC_CALLS_MAX = 32  # at once on one connection: a host has one and its retry
GRPC_PENDING_MAX = 20_000  # calls that no handler has taken yet; about 4 KB each
GRPC_IDLE_S = 3 * HEARTBEAT_MAX_S  # a connection without any call is closed
PEER_CALLS_S = 20.0  # of one tunnel address; more are held back, so that others come first
PEER_BURST = 100.0  # calls of one address that are not held back
PEER_TELL_S = 600.0  # between two lines in the log about one address
PEER_HOLD_S = 10.0  # the longest that a call is held; then it is refused
PEERS_S = 60.0  # between two full comparisons of the hub with the database
PEERS_LOOK_S = 1.0  # between two looks for hosts that were revoked, whoever revoked them
PEERS_GONE_S = 300  # how far such a look goes back; no transaction is open this long
PEERS_PAGE = 5_000  # rows at a time, so that heartbeats come between
PEERS_RETRY_S = 5.0
PEERS_RENEW_S = 180  # a session is dead by then (REJECT_AFTER_TIME of the WireGuard paper)
PEERS_DEADLINE_S = 240.0  # for a whole comparison: 65,000 peers set anew take one or two minutes
HUB_S = 30.0  # for one answer of the WireGuard helper
HOLDERS_REST_MAX_S = 5.0  # between two readings of the hub for registrations; an agent waits 10 s
HUB_ANSWER_BYTES = 32 << 20  # 10 MB at 65,000 peers
HUB_CHANGES_MAX = 1_000  # in one question; the helper takes no more
LOG_AGAIN_S = 600.0  # a trouble that lasts is logged again this often
HTTP_BODY_BYTES = 65_536
REGISTRY_TIMEOUT_S = 5.0
# A push begins only while this is free, of the registry's disk and at least.
REGISTRY_FREE_SHARE, REGISTRY_FREE_MIN_BYTES = 0.05, 64 << 20
MANIFEST_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)
REGISTRY_AUTH = "/api/v1/registry/auth"  # Caddy's question, no route of the API
HTTP_WORKERS = 8
HTTP_QUEUE = 64
HTTP_DEADLINE_S = 10.0
HTTP_HEAD_BYTES = 2 * 65_536  # more than http.server takes in one line
HTTP_WAITING_MAX = 512  # connections whose head is not there yet; the oldest makes room
HTTP_LINGER_S = 0.2  # after an answer, for the client to close: a worker does nothing else then
HTTP_CALLS_S = 20.0  # of one client address for long: with HTTP_LINGER_S each, half the workers
HTTP_BURST = 48.0  # requests of one address at once; the queue has room for others beside them
# Of one customer or host at the registry, once its password was right: a layer takes five to push.
REGISTRY_CALLS_S, REGISTRY_BURST = 200.0, 400.0
REGISTRY_ROOM = 24  # of its requests under way at once, for others want the queue too
REGISTRY_KNOWN_MAX = 65_536  # passwords that were right; the one not seen for longest makes room
HTTP_PLACES = 65_536  # where addresses are counted; two may have one place, none is ever forgotten
JWT_ISSUER = "openinfra-cp"
JWT_AUDIENCE = "openinfra-admin-api"
JWT_MAX_S = 12 * 3600
JWT_LEEWAY_S = 60
JWT_HEADER_BYTES = 256
JWT_BYTES = 2_048
PAGE_DEFAULT = 100
PAGE_MAX = 1_000

# Every refusal that an edge gives: its name, gRPC status and HTTP status. The names that agents
# see are those of `Reason` in proto/openinfra.proto.
REFUSALS: dict[str, tuple[grpc.StatusCode, int]] = {
    "BAD_REQUEST": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "UNKNOWN_INVITE": (grpc.StatusCode.UNAUTHENTICATED, 404),
    "INVITE_USED": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "INVITE_REVOKED": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "INVITE_EXPIRED": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "INVITE_FOR_OTHER_KEY": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "ADDRESS_TAKEN": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "KEY_TAKEN": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "WRONG_ADDRESS": (grpc.StatusCode.PERMISSION_DENIED, 403),
    "UNKNOWN_HOST": (grpc.StatusCode.UNAUTHENTICATED, 404),
    "HOST_REVOKED": (grpc.StatusCode.PERMISSION_DENIED, 409),
    "HOST_QUARANTINED": (grpc.StatusCode.PERMISSION_DENIED, 409),
    "SESSION_SUPERSEDED": (grpc.StatusCode.ABORTED, 409),
    "UNKNOWN_SESSION": (grpc.StatusCode.UNAUTHENTICATED, 401),
    "TRY_LATER": (grpc.StatusCode.UNAVAILABLE, 503),
    "UNAUTHORIZED": (grpc.StatusCode.UNAUTHENTICATED, 401),
    "FORBIDDEN": (grpc.StatusCode.PERMISSION_DENIED, 403),
    "NOT_FOUND": (grpc.StatusCode.NOT_FOUND, 404),
    "METHOD_NOT_ALLOWED": (grpc.StatusCode.UNIMPLEMENTED, 405),
    "CONFLICT": (grpc.StatusCode.FAILED_PRECONDITION, 409),
    "NO_CREDIT": (grpc.StatusCode.FAILED_PRECONDITION, 402),
    "LENGTH_REQUIRED": (grpc.StatusCode.INVALID_ARGUMENT, 411),
    "TOO_LARGE": (grpc.StatusCode.INVALID_ARGUMENT, 413),
    "NOT_JSON": (grpc.StatusCode.INVALID_ARGUMENT, 415),
    "TOO_MANY_REQUESTS": (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    "INTERNAL": (grpc.StatusCode.INTERNAL, 500),
}


class Refusal(Error):
    """A request that is refused: its name in REFUSALS, what is wrong, what to do, the field."""

    def __init__(self, code: str, what: str, todo: str, field: str = "") -> None:
        super().__init__(what, todo)
        self.code = code
        self.field = field


class UnprovenKeyError(Exception):
    """A host came with a WireGuard key that is new for it: only the hub knows whether it has it."""


# ---------------------------------------------------------------------------------------------
# Types: what the rules and operations hand to each other. Pure, no behaviour.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Token:
    """A parsed bearer token: its public id and the 32 bytes that must never be logged."""

    public_id: str
    secret: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Actor:
    """Who asks for a change: `jwt:<sub>:<jti>`, `cli:<user>`, or `invite:`, `host:`, `customer:`.

    The last three with an id, the last with that of its key as well.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class InviteOrder:
    """What an operator asks for when minting an invite; checked values only."""

    ttl_hours: int = INVITE_TTL_HOURS
    note: str = ""
    payout_pubkey: str | None = None
    wg_ip: str | None = None
    wg_pubkey: str | None = None
    approve_first_wallet: bool = False


@dataclasses.dataclass(frozen=True)
class Invite:
    """A row of `invites` (without the secret's hash) with its state by the database's clock."""

    invite_no: int
    invite_id: str
    state: str
    note: str
    payout_pubkey: str | None
    wg_ip: str | None
    wg_pubkey: str | None
    approve_first_wallet: bool
    created_by: str
    created_at: dt.datetime
    expires_at: dt.datetime
    revoked_at: dt.datetime | None
    consumed_at: dt.datetime | None
    host_id: uuid.UUID | None


@dataclasses.dataclass(frozen=True)
class Customer:
    """A row of `customers` with its namespaces."""

    customer_no: int
    customer_id: uuid.UUID
    name: str
    namespaces: list[str]
    created_by: str
    created_at: dt.datetime
    credit_limit_micros: int | None
    out_of_credit_at: dt.datetime | None
    balance_micros: int = 0  # where it is asked for


@dataclasses.dataclass(frozen=True)
class CustomerKey:
    """A row of `customer_keys`, without the secret's hash."""

    key_no: int
    key_id: str
    customer_id: uuid.UUID
    note: str
    created_by: str
    created_at: dt.datetime
    revoked_at: dt.datetime | None


@dataclasses.dataclass(frozen=True)
class WorkloadOrder:
    """What a customer asks for; checked values only. `spec` is what a copy is made from."""

    namespace: str
    name: str
    replicas: int
    spec: Mapping[str, Any]
    # None: those that are there stay.
    secrets: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A row of `workloads`; of its secrets the names, in `spec`, and whether they can be read."""

    workload_no: int
    workload_id: uuid.UUID
    namespace: str
    name: str
    revision: int
    replicas: int
    spec: Mapping[str, Any]
    unplaced_reason: str
    created_by: str
    created_at: dt.datetime
    changed_at: dt.datetime
    deleted_at: dt.datetime | None
    secrets_lost: bool = False


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A row of `assignments` with what its workload's state depends on."""

    assignment_no: int  # the fencing number
    assignment_id: uuid.UUID
    workload_no: int
    revision: int
    replica: int
    host_no: int
    host_id: uuid.UUID
    wg_ip: str | None
    host_status: str
    state: str
    reason: str
    restarts: int
    exit_code: int | None
    stop_reason: str | None
    port_slot: int | None
    container_ports: Sequence[int]
    created_at: dt.datetime
    state_at: dt.datetime
    ended_at: dt.datetime | None


@dataclasses.dataclass(frozen=True)
class Log:
    """The end of what a copy printed, or why it is not known."""

    lines: Sequence[str] = ()
    truncated: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Copy:
    """A live assignment as the rollout looks at it."""

    assignment_no: int
    replica: int
    revision: int
    is_running: bool
    is_done: bool  # finished or failed, for good
    is_stopping: bool
    state_age_s: float
    host_no: int


@dataclasses.dataclass(frozen=True)
class Rejections:
    """How often hosts of late could not run a replica; the last one's age and reason."""

    times: int
    age_s: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Demand:
    """A workload of which a replica has no place, or runs as an old revision."""

    workload_no: int
    revision: int
    replicas: int
    spec: Mapping[str, Any]
    copies: tuple[Copy, ...]
    rejections: Mapping[int, Rejections]  # by replica
    rejected_by: frozenset[int]  # hosts that rejected it of late
    secrets_lost: bool = False
    out_of_credit: bool = False
    customer_no: int = 0


@dataclasses.dataclass
class Place:
    """A host that may get work, and what is free there; placing takes from it."""

    host_no: int
    arch: str
    namespace: str
    cpu_milli: int
    memory_bytes: int
    assignments: int
    port_slots: set[int]
    labels: Mapping[str, str]
    takes_secrets: bool = False  # its disk is encrypted, and its agent knows them
    refused_slots: Collection[int] = ()  # of what it rejected of late: they come last


Spot = tuple[int, int, Place]  # less memory_bytes, host_no: the one with most free comes first


@dataclasses.dataclass
class Shelf:
    """The places for copies of one kind, in heaps. What is free only falls, so that a heap is
    right once its top is: what it says of a place is that, or more than is left."""

    spec: Mapping[str, Any]
    fitting: Sequence[Place]  # with room or not
    heaps: Mapping[str, list[Spot]]  # by provider, those with room
    tops: list[tuple[int, int, str]]  # of these heaps, with their provider
    why_none: str = ""


@dataclasses.dataclass
class Market:
    """What is free in one round of the placer, and how many looks are left to it."""

    places: Sequence[Place]
    looks: int
    fitting: dict[object, list[Place]] = dataclasses.field(default_factory=dict)
    shelves: dict[object, Shelf] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A replica that gets a place."""

    workload_no: int
    revision: int
    replica: int
    host_no: int
    port_slot: int | None
    cpu_milli: int
    memory_bytes: int
    spec: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a host has of one assignment; checked values only."""

    assignment_id: str
    state: str
    reason: str
    restarts: int
    exit_code: int | None


@dataclasses.dataclass(frozen=True)
class Observed:
    """All that a host has, after it took the list with this revision."""

    revision: int
    assignments: tuple[Observation, ...]


@dataclasses.dataclass(frozen=True)
class Counter:
    """What a container used since it was made, as its host says; checked values only."""

    assignment_id: str
    boot_id: str
    container_id: bytes
    cpu_ns: int
    memory_byte_s: int
    rx_bytes: int
    tx_bytes: int


@dataclasses.dataclass(frozen=True)
class RateCard:
    """A row of `rate_cards`: prices in micro-units, from an hour on until a later one."""

    card_no: int
    customer_no: int | None
    valid_from: dt.datetime
    cpu_hour_micros: int
    gb_hour_micros: int
    egress_gb_micros: int
    provider_share_ppm: int


@dataclasses.dataclass(frozen=True)
class Meter:
    """A copy as it is billed, and what was so far."""

    assignment_no: int
    customer_no: int
    namespace: str | None
    host_no: int
    cpu_milli: int
    memory_bytes: int
    billed_us: int = 0
    counted_bytes: int = 0
    egress_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Due:
    """What of a copy's hour is not in a window yet: time that it ran, and bytes counted."""

    billed_us: int = 0
    counted_bytes: int = 0


class Usage(NamedTuple):
    """Quantities and amounts: of a window, or of all windows of a line of an invoice.

    A tuple, as Window: there are millions, and they are made several times as fast.
    """

    billed_us: int = 0
    egress_bytes: int = 0
    cpu_micros: int = 0
    memory_micros: int = 0
    egress_micros: int = 0
    share_micros: int = 0

    @property
    def charge_micros(self) -> int:
        """What the customer pays."""
        return self.cpu_micros + self.memory_micros + self.egress_micros


LineKey = tuple[int, dt.date, int]  # assignment_no, month, card_no; 0: there is no card


class Window(NamedTuple):
    """What a copy used in an hour, or what came late of it, and what that adds to its line."""

    assignment_no: int
    hour_at: dt.datetime
    part: int
    month: dt.date
    card_no: int
    usage: Usage


@dataclasses.dataclass(frozen=True)
class BillLine:
    """What one copy used in a month under one rate card."""

    assignment_id: uuid.UUID
    workload: str
    replica: int
    hostname: str
    cpu_milli: int
    memory_bytes: int
    card_no: int  # which its windows have too; 0: there was none
    cpu_hour_micros: int
    gb_hour_micros: int
    egress_gb_micros: int
    provider_share_ppm: int
    usage: Usage


@dataclasses.dataclass(frozen=True)
class BillWindow(BillLine):
    """A window, with all that its line has."""

    hour_at: dt.datetime
    part: int


Line = TypeVar("Line", bound=BillLine)


@dataclasses.dataclass(frozen=True)
class Counted:
    """What its host counted of a copy over its whole life: counters know no hours."""

    assignment_id: uuid.UUID
    cpu_milli: int
    memory_bytes: int
    life_us: int  # that it ran, with what is in no window yet
    cpu_ns: int
    memory_byte_s: int
    rx_bytes: int
    tx_bytes: int
    egress_bytes: int | None  # of tx_bytes what was possible when it was heard; None: not billed


@dataclasses.dataclass(frozen=True)
class Bill:
    """An invoice (of a customer) or a statement (of a provider): a month, and its lines."""

    kind: str  # invoice or statement
    whose: str
    whose_id: str  # which no other has
    month: dt.date
    number: int | None  # None: a statement, or preliminary
    is_preliminary: bool
    lines: Sequence[BillLine]
    total_micros: int  # what the customer pays, or what the provider is owed
    issued_at: dt.datetime | None = None


@dataclasses.dataclass(frozen=True)
class EarningsOrder:
    """A host asks what it earned."""

    session_sha256: bytes
    peer: str
    month: dt.date | None  # None: this one
    cursor: int
    assignment_id: str | None = None  # hour by hour by this copy


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The answer to a heartbeat that is committed."""

    host_no: int
    standing: Standing
    desired: pb.Desired | None = None
    earnings: tuple[str, int] | None = None  # month and micro-units


@dataclasses.dataclass(frozen=True)
class Host:
    """A row of `hosts` with what its standing depends on."""

    host_no: int
    host_id: uuid.UUID
    status: str
    status_at: dt.datetime
    invite_id: str
    invite_payout_pubkey: str | None
    payout_pubkey: str | None
    requested_payout_pubkey: str | None
    namespace: str | None
    namespace_approved: bool
    ever_assigned: bool
    wg_ip: str | None
    wg_pubkey: str | None
    hostname: str
    arch: str
    kernel: str
    agent_version: str
    cpu_count: int
    memory_bytes: int
    disk_bytes: int
    disk_encrypted: bool
    engine_version: str
    unready: str
    offered_cpu_milli: int
    offered_memory_bytes: int
    takes_secrets: bool
    drained_at: dt.datetime | None
    labels: Mapping[str, str]
    assignments: int
    created_at: dt.datetime
    revoked_at: dt.datetime | None
    last_heartbeat_at: dt.datetime | None
    heartbeat_interval_ms: int


@dataclasses.dataclass(frozen=True)
class Claimant:
    """A host that a registration touches, by its secret, its key or its address."""

    host_no: int
    host_id: uuid.UUID
    status: str


@dataclasses.dataclass(frozen=True)
class HostReason:
    """One reason why a host is not assignable, and what heals it."""

    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.what}; {self.todo}"


@dataclasses.dataclass(frozen=True)
class Standing:
    """How the control plane sees a host."""

    status: str
    assignable: bool
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a host says about its machine; checked values only."""

    hostname: str
    arch: str
    kernel: str
    agent_version: str
    cpu_count: int
    memory_bytes: int
    disk_bytes: int
    disk_encrypted: bool
    engine_version: str
    unready: str
    offered_cpu_milli: int
    offered_memory_bytes: int
    takes_secrets: bool


@dataclasses.dataclass(frozen=True)
class Registration:
    """A checked Register request; hashes only, but for the token."""

    token: Token
    host_secret_sha256: bytes
    session_sha256: bytes
    payout_pubkey: str | None
    wg_ip: str | None
    wg_pubkey: str | None
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Resumption:
    """A checked Resume request; hashes only, no secret."""

    host_secret_sha256: bytes
    session_sha256: bytes
    previous_sha256: bytes
    payout_pubkey: str | None
    wg_ip: str | None
    wg_pubkey: str | None


@dataclasses.dataclass(frozen=True)
class Beat:
    """A checked heartbeat."""

    session_sha256: bytes
    peer: str
    seq: int
    boot_id: str
    status: str  # online or paused
    interval_ms: int
    facts: Facts | None
    desired_revision: int = 0
    observed: Observed | None = None
    counters: tuple[Counter, ...] = ()


@dataclasses.dataclass(frozen=True)
class WantedPeer:
    """A host that is not revoked, as the hub must have it."""

    key: str
    ip: str
    is_up: bool  # its heartbeats come, or came until less than 3 intervals ago


@dataclasses.dataclass(frozen=True)
class PeerChange:
    """One change of the hub; `replaces` is the peer that may lose the address by it."""

    verb: str  # set or remove
    key: str
    ip: str = ""
    replaces: str = ""


@dataclasses.dataclass(frozen=True)
class PeerPlan:
    """What makes the hub as the database says, and what is left alone."""

    wanted: int
    changes: tuple[PeerChange, ...]
    unknown: tuple[str, ...]  # peers that nobody knows: set by hand for a host that comes later
    conflicts: tuple[PeerChange, ...]  # not made: an unknown peer has the address of a silent host
    renewals: tuple[PeerChange, ...] = ()  # of silent hosts, removed and set again
    seen: Mapping[str, str] = dataclasses.field(default_factory=dict)  # network -> its endpoint


@dataclasses.dataclass(frozen=True)
class JwtKey:
    """One signing key of the operators' tokens."""

    kid: str
    alg: str
    secret: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a valid JWT says: who, which token, which rights."""

    sub: str
    jti: str
    scope: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a request body or query: its type, its bounds, and its line in the OpenAPI.

    The bounds are of a number, of a text's characters, or of how many an array or a map has.
    """

    name: str
    kind: str  # integer, string, boolean; array and map have `item`
    help: str
    minimum: int = 0
    maximum: int = 0
    default: Any = None
    check: Callable[[Any, str], Any] | None = None  # (value, field name) -> value, or Refusal
    values: tuple[str, ...] = ()
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of it in the OpenAPI
    required: bool = False
    item: Field | None = None


# ---------------------------------------------------------------------------------------------
# Rules: tokens, wallets, addresses, JWTs, standing, redemption, requests, renderers. Pure.
# ---------------------------------------------------------------------------------------------

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
NAMESPACE = {"pattern": "^[a-z0-9][a-z0-9-]{0,38}[a-z0-9]$"}
NAME = {"pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
# Docker's grammar of a repository's name and of a reference by digest.
_IMAGE_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_IMAGE = re.compile(
    rf"(?:(?P<registry>[A-Za-z0-9.-]*[.:][A-Za-z0-9.:-]*|localhost)/)?"
    rf"(?P<namespace>{_IMAGE_PART})/(?P<name>{_IMAGE_PART}(?:/{_IMAGE_PART})*)"
    rf"(?::(?P<tag>{_TAG}))?(?:@(?P<digest>{_DIGEST}))?"
)
_REPOSITORY = re.compile(rf"{_IMAGE_PART}(?:/{_IMAGE_PART})+")
# Of the OCI distribution specification what push and pull need; nothing lists other repositories.
_REGISTRY_PATH = re.compile(
    rf"/v2/(?:(?P<repository>{_REPOSITORY.pattern})/(?:"
    rf"(?P<manifests>manifests/(?:{_TAG}|{_DIGEST}))"
    r"|(?P<uploads>blobs/uploads/)|(?P<upload>blobs/uploads/[A-Za-z0-9_=-]{1,200})"
    rf"|(?P<blobs>blobs/{_DIGEST})|(?P<tags>tags/list)))?"
)
_REGISTRY_METHODS = {
    "manifests": ("GET", "HEAD", "PUT"),
    "uploads": ("POST",),
    "upload": ("GET", "HEAD", "PATCH", "PUT", "DELETE"),
}
_REGISTRY_QUERY = {"_state", "digest", "from", "last", "mount", "n"}
NO_NUL = {"pattern": "^[^\\u0000]*$"}
# What a customer needs to know of it: its own namespace first, no registry, a tag or a digest.
IMAGE = {
    "pattern": rf"^(?!localhost/)[a-z0-9][a-z0-9-]{{0,38}}[a-z0-9](/{_IMAGE_PART})+"
    rf"(:{_TAG}|@{_DIGEST})?$"
}
LABEL = {"pattern": "^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"}
ENV_KEY = {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,99}$"}
SECRET_NAME = {"pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$"}
_UUID = _BOOT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def sha256(secret: bytes) -> bytes:
    """The hash under which a secret of 256 random bits is stored."""
    return hashlib.sha256(secret).digest()


def render_token(prefix: str, public_id: str, secret: bytes) -> str:
    """`<prefix>_<id>_<secret, base64url of 32 bytes>_<crc32>`; the checksum finds typing errors."""
    body = f"{prefix}_{public_id}_{b64url(secret)}"
    return f"{body}_{zlib.crc32(body.encode()):08x}"


def parse_token(prefix: str, text: str) -> Token:
    """The id and secret of a token; raises Refusal BAD_REQUEST that never repeats the text."""
    form = rf"{prefix}_([a-z2-7]{{16}})_([A-Za-z0-9_-]{{42}}[AEIMQUYcgkosw048])_([0-9a-f]{{8}})"
    match = re.fullmatch(form, text)
    if not match or zlib.crc32(text[:-9].encode()) != int(match[3], 16):
        raise Refusal(
            "BAD_REQUEST",
            "the token is incomplete or mistyped",
            "copy it again, whole, as the operator sent it",
            "invite_token",
        )
    return Token(match[1], parse_b64url(match[2]))


def new_public_id() -> str:
    """80 random bits as 16 base32 characters (RFC 4648, lower case): an id that may be logged."""
    return base64.b32encode(secrets.token_bytes(10)).decode().lower()


def check_payout_pubkey(text: str, field: str) -> str:
    """A Solana address: base58 of exactly 32 bytes, not the all-zero one; raises Refusal."""
    digits = [_BASE58.find(char) for char in text[:45]]
    value = functools.reduce(lambda total, digit: total * 58 + digit, digits, 0)
    leading = len(text) - len(text.lstrip("1"))
    size = leading + (value.bit_length() + 7) // 8
    if -1 in digits or value == 0 or size != 32:
        raise Refusal(
            "BAD_REQUEST",
            f"{field} is not a Solana address (base58 of 32 bytes)",
            "copy the public key from your wallet again, 32 to 44 characters",
            field,
        )
    return text


def check_wg_pubkey(text: str, field: str) -> str:
    """A WireGuard public key: base64 of 32 bytes, as `wg pubkey` prints it; raises Refusal."""
    try:
        raw = base64.b64decode(text, validate=True)
        good = len(raw) == 32 and base64.b64encode(raw).decode() == text and any(raw)
    except ValueError:
        good = False
    if not good:
        raise Refusal(
            "BAD_REQUEST",
            f"{field} is not a WireGuard public key (base64 of 32 bytes)",
            "print it on the host: sudo cat /etc/wireguard/openinfra.pub",
            field,
        )
    return text


def check_wg_ip(text: str, field: str) -> str:
    """A host's address in the tunnel, 10.77.0.2 to 10.77.255.254; raises Refusal."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        address = HUB
    if address not in TUNNEL or address in (HUB, TUNNEL[0], TUNNEL[-1]):
        raise Refusal(
            "BAD_REQUEST",
            f"{field} is not an address for a host",
            "give one from 10.77.0.2 to 10.77.255.254",
            field,
        )
    return str(address)


def check_text(text: str, field: str) -> str:
    """One line of Unicode without control, formatting or broken characters; raises Refusal.

    Joiners stay, since names and emoji are written with them; what turns text around does not.
    """
    bad = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
    if any(unicodedata.category(char) in bad and char not in "\u200c\u200d" for char in text):
        raise Refusal(
            "BAD_REQUEST",
            f"{field} holds a control character or a broken one",
            "send one line of printable text",
            field,
        )
    return text


def check_namespace(text: str, field: str) -> str:
    """A customer's namespace: a DNS label (RFC 1123) of 2 to 40 characters; raises Refusal."""
    if not re.fullmatch(NAMESPACE["pattern"], text):
        raise Refusal(
            "BAD_REQUEST",
            f"{field} is not 2 to 40 of a-z, 0-9 and -, which it neither begins nor ends with",
            "choose another; it stands in the names of the customer's images",
            field,
        )
    return text


def check_name(text: str, field: str) -> str:
    """A workload's name: a DNS label (RFC 1123); raises Refusal."""
    if not re.fullmatch(NAME["pattern"], text):
        what = f"{field} is not 1 to 63 of a-z, 0-9 and -, which it neither begins nor ends with"
        raise Refusal("BAD_REQUEST", what, "choose another", field)
    return text


def check_image(text: str, field: str) -> str:
    """An image, `[registry/]namespace/name[:tag][@sha256:…]`; raises Refusal."""
    if not _IMAGE.fullmatch(text):
        what = f"{field} is no image of a namespace"
        todo = "send namespace/name:tag or namespace/name@sha256:<64 hex digits>"
        raise Refusal("BAD_REQUEST", what, todo, field)
    return text


def parse_image(text: str, registry: str) -> tuple[str, str]:
    """The namespace of a checked image, and `namespace/name` with its digest, or else its tag.

    Only the control plane's own registry is taken; raises Refusal.
    """
    match = _IMAGE.fullmatch(text)
    if match is None:
        raise Refusal("INTERNAL", "the control plane has a bug", "an image that nobody checked")
    if match["registry"] not in (None, registry):
        what = f"image is of the registry {match['registry']}, which is not this one"
        todo = f"push it here first: {registry or 'the operator has to set one up'}"
        raise Refusal("BAD_REQUEST", what, todo, "image")
    of = f"@{match['digest']}" if match["digest"] else f":{match['tag'] or 'latest'}"
    return match["namespace"], f"{match['namespace']}/{match['name']}{of}"


@dataclasses.dataclass(frozen=True)
class RegistryCall:
    """What a request to the registry touches; `repository` is empty for the registry itself."""

    namespace: str
    repository: str
    is_write: bool
    source: str = ""  # the namespace that a blob is to be mounted from
    has_digest: bool = False  # it names one content, which is no way to find others
    is_start: bool = False  # of a push; what is under way may end


def parse_registry_call(method: str, uri: str, content_type: str) -> RegistryCall:
    """Read what Caddy tells of a request (OCI distribution specification); raises Refusal.

    Whatever could mean another thing to the registry than here is refused.
    """
    path, _, query = uri.partition("?")
    match = _REGISTRY_PATH.fullmatch(path)
    if match is None:
        raise Refusal("NOT_FOUND", "no such path in the registry", "there is no list of all images")
    allowed = _REGISTRY_METHODS.get(match.lastgroup or "", ("GET", "HEAD"))
    if method not in allowed:
        raise refuse_method(parse_said(method, 16), allowed)
    # It would read fields of a form as if they stood in the query, and the body is not seen here.
    if "form" in content_type.lower() or "multipart" in content_type.lower():
        raise Refusal("NOT_JSON", "the registry takes no forms", "use docker push")
    words = query.split("&") if query else []
    keys = [word.partition("=")[0] for word in words]
    if len(set(keys)) < len(keys) or not set(keys) <= _REGISTRY_QUERY or ";" in query:
        raise Refusal("BAD_REQUEST", "the registry does not know this query", "use docker push")
    values = dict(urllib.parse.parse_qsl(query))
    source = values.get("from", "")
    if source and not _REPOSITORY.fullmatch(source):
        raise Refusal("BAD_REQUEST", "from names no repository", "use docker push")
    repository = match["repository"] or ""
    is_write = method not in ("GET", "HEAD")
    of, origin = repository.partition("/")[0], source.partition("/")[0]
    has_digest = match.lastgroup in ("manifests", "blobs") and "/sha256:" in path
    is_start = match.lastgroup == "uploads"
    return RegistryCall(of, repository, is_write, origin, has_digest, is_start)


def decide_registry(call: RegistryCall, namespaces: Sequence[str]) -> None:
    """Let a customer push and pull in its own namespaces; raises Refusal FORBIDDEN."""
    for namespace in filter(None, (call.namespace, call.source)):
        if namespace not in namespaces:
            own = " or ".join(sorted(namespaces)) or "none yet: ask the operator"
            what = f"the namespace {namespace} is not yours"
            raise Refusal("FORBIDDEN", what, f"yours: {own}")


def check_room(free_bytes: int, size_bytes: int) -> None:
    """Refuse a push that the registry's disk may have no room for; raises Refusal FORBIDDEN."""
    if free_bytes < max(size_bytes * REGISTRY_FREE_SHARE, REGISTRY_FREE_MIN_BYTES):
        what = f"the registry is full: {free_bytes >> 20} MiB are free"
        raise Refusal("FORBIDDEN", what, "ask the operator; images that are there can be pulled")


def refuse_method(method: str, allowed: Sequence[str]) -> Refusal:
    """What is said to a method that is not of a path; HttpHandler makes `Allow` of it."""
    what = f"{method} is not possible here"
    return Refusal("METHOD_NOT_ALLOWED", what, f"use {' or '.join(allowed)}")


def parse_basic(header: str) -> str:
    """The password of an Authorization header (RFC 7617); empty when there is none."""
    scheme, _, text = header.partition(" ")
    try:
        decoded = base64.b64decode(text.strip(), validate=True).decode("ascii")
    except (ValueError, UnicodeDecodeError):
        return ""
    return decoded.partition(":")[2] if scheme.lower() == "basic" else ""


def check_words(value: Sequence[str] | Mapping[str, str], field: str) -> Any:
    """Arguments or an environment that execve(2) can take; raises Refusal."""
    words = list(value) if not isinstance(value, Mapping) else [*value, *value.values()]
    if any("\0" in word or not is_utf8(word) for word in words):
        what = f"{field} holds a NUL character or a broken one"
        raise Refusal("BAD_REQUEST", what, "send text", field)
    for key in value if isinstance(value, Mapping) else ():
        if not re.fullmatch(ENV_KEY["pattern"], key):
            what = f"{field} has a name that is none of a variable"
            todo = "begin with a letter or _, go on with letters, digits and _, at most 100"
            raise Refusal("BAD_REQUEST", what, todo, field)
    return value


def check_secrets(value: Mapping[str, str], field: str) -> Mapping[str, str]:
    """Secrets by the names of their files; raises Refusal that never repeats a value."""
    if not all(re.fullmatch(SECRET_NAME["pattern"], name) for name in value):
        what = f"{field} has a name that is none of a file"
        todo = "begin with a letter, digit or _, go on with these, . and -, at most 63"
        raise Refusal("BAD_REQUEST", what, todo, field)
    if not all(is_utf8(text) for text in value.values()):
        what = f"{field} holds a broken character"
        raise Refusal("BAD_REQUEST", what, "send text; what is none, in base64", field)
    if sum(len(text.encode()) for pair in value.items() for text in pair) > SECRETS_BYTES:
        what = f"{field} are larger than {SECRETS_BYTES} bytes together"
        raise Refusal("BAD_REQUEST", what, "put what is large and no secret into the image", field)
    return value


def is_utf8(text: str) -> bool:
    """True without the lone surrogates that JSON can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def check_labels(labels: Mapping[str, str], field: str) -> Mapping[str, str]:
    """Labels of a host, or those that a workload asks for; raises Refusal."""
    for text in (*labels, *labels.values()):
        if not re.fullmatch(LABEL["pattern"], text):
            what = f"{field} has a key or a value that is no label"
            todo = "send 1 to 63 of a-z, 0-9, ., _ and -, letters or digits at both ends"
            raise Refusal("BAD_REQUEST", what, todo, field)
    return labels


def check_ports(ports: list[int], field: str) -> list[int]:
    """Ports, each once; raises Refusal."""
    if len(set(ports)) != len(ports):
        raise Refusal("BAD_REQUEST", f"{field} has a port twice", "name each once", field)
    return ports


def check_uuid(text: str, field: str) -> str:
    """A UUID as this API writes it; raises Refusal."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise Refusal("BAD_REQUEST", f"{field} is not a UUID", "copy it again", field) from None


def check_provider(text: str, field: str) -> str:
    """A provider's namespace, `solana:<wallet>`; raises Refusal."""
    prefix, _, wallet = text.partition(":")
    if prefix != "solana":
        what = f"{field} is no namespace of a provider"
        raise Refusal("BAD_REQUEST", what, "send solana:<wallet>", field)
    return f"solana:{check_payout_pubkey(wallet, field)}"


def namespace_of(payout_pubkey: str) -> str:
    """The namespace of a provider's wallet."""
    return f"solana:{payout_pubkey}"


def parse_peer(peer: str) -> str:
    """The address in gRPC's peer string (`ipv4:10.77.0.42:53422`, `ipv6:%5B::1%5D:53422`)."""
    with contextlib.suppress(ValueError, OSError):  # almost all: IPv4, which has one spelling
        if peer.startswith("ipv4:"):
            socket.inet_pton(socket.AF_INET, peer[5 : peer.rfind(":")])
            return peer[5 : peer.rfind(":")]
    text = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        return str(parse_ip(text))
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - no host has it


def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address, without its zone; one of IPv4 inside IPv6 is IPv4; raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def parse_client(peer: str, head: bytes) -> str:
    """What a client is counted by: its IPv4 address, or its /64; empty for this machine itself.

    Caddy calls from this machine. The address that it saw is the last in X-Forwarded-For, whatever
    its client sent; an address that cannot be read is none.
    """
    address = parse_ip(peer)
    if address.is_loopback:
        lines = re.split(rb"\n\r?\n", head, maxsplit=1)[0]
        said = re.findall(rb"(?im)^X-Forwarded-For:([^\r\n]*)", lines)
        with contextlib.suppress(ValueError):
            last = b"".join(said[-1:]).rpartition(b",")[2]
            address = parse_ip(last.strip().decode("ascii"))
    if address.is_loopback:
        return ""
    bits = 64 if address.version == 6 else 32
    return str(ipaddress.ip_network((address, bits), strict=False)).removesuffix("/32")


def parse_registry_password(head: bytes) -> str:
    """The password of a question about the registry; empty for any other request.

    Of a head with two such lines the handler may take the other one, so it has none.
    """
    if not re.match(rb"GET %b[? ]" % re.escape(REGISTRY_AUTH.encode()), head):
        return ""
    lines = re.split(rb"\n\r?\n", head, maxsplit=1)[0]
    said = re.findall(rb"(?im)^Authorization:[ \t]*([^\r\n]*)", lines)
    return parse_basic(said[0].decode("latin-1")) if len(said) == 1 else ""


def b64url(data: bytes) -> str:
    """base64url without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def parse_b64url(text: str) -> bytes:
    """The bytes of an unpadded base64url text in its one spelling; raises ValueError (RFC 7515)."""
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if b64url(raw) != text:
        raise ValueError("not base64url")
    return raw


def render_jwt(key: JwtKey, claims: Mapping[str, Any]) -> str:
    """A signed JWT (RFC 7519, HS256)."""
    header = {"alg": key.alg, "kid": key.kid, "typ": "JWT"}
    parts = [b64url(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)]
    signature = hmac.digest(key.secret, ".".join(parts).encode(), "sha256")
    return ".".join([*parts, b64url(signature)])


def parse_jwt(text: str, keys: Sequence[JwtKey], now: float) -> Claims:
    """The claims of a valid token; ValueError for any other. `now` in Unix seconds.

    The algorithm is the key record's, never the token's; the payload is looked at only after the
    signature is known to be good, and the header only when it is at most 256 bytes long.
    """
    head, body, signature = text.split(".") if len(text) <= JWT_BYTES else ("", "", "")
    if not head or len(head) > JWT_HEADER_BYTES:
        raise ValueError("form")
    header = parse_json(parse_b64url(head))
    key = next((key for key in keys if key.kid == header.get("kid")), None)
    if key is None or header != {"alg": key.alg, "kid": key.kid, "typ": "JWT"}:
        raise ValueError("header")
    expected = hmac.digest(key.secret, f"{head}.{body}".encode(), "sha256")
    if not hmac.compare_digest(expected, parse_b64url(signature)):
        raise ValueError("signature")
    claims = parse_json(parse_b64url(body))
    sub, jti, scope = claims.get("sub"), claims.get("jti"), claims.get("scope")
    if claims.get("iss") != JWT_ISSUER or claims.get("aud") != JWT_AUDIENCE:
        raise ValueError("issuer or audience")
    if not (isinstance(sub, str) and isinstance(jti, str) and isinstance(scope, str)):
        raise ValueError("claims")
    if not all(0 < len(name) <= 100 and name.isprintable() for name in (sub, jti)):
        raise ValueError("names")
    iat, exp = claims.get("iat"), claims.get("exp")
    if type(iat) is not int or type(exp) is not int:
        raise ValueError("times")
    if not (iat - JWT_LEEWAY_S <= now < exp <= iat + JWT_MAX_S):
        raise ValueError("expired")
    return Claims(sub, jti, frozenset(scope.split()))


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or a depth that recursion fears; ValueError."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key stands there twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def parse_fields(fields: Sequence[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of a body or query, defaults filled in; raises Refusal with the field."""
    known = {field.name: field for field in fields}
    for name in given:
        if name not in known:
            raise Refusal(
                "BAD_REQUEST",
                f"unknown field {json.dumps(name[:40])}",
                f"known fields are: {', '.join(known) or 'none'}",
                name[:40].encode("ascii", "replace").decode(),
            )
    for field in fields:
        if field.required and field.name not in given:
            raise Refusal("BAD_REQUEST", f"{field.name} is missing", "send it", field.name)
    return {f.name: parse_field(f, given[f.name]) if f.name in given else f.default for f in fields}


def parse_field(field: Field, value: Any) -> Any:
    """One checked value; raises Refusal."""
    kinds: dict[str, Any] = {"integer": int, "string": str, "boolean": bool}
    kinds |= {"array": list, "map": dict}
    if field.kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON and its Schema know no other difference of 24.0 and 24
    if type(value) is not kinds[field.kind]:
        kind = "object" if field.kind == "map" else field.kind
        what, todo = f"{field.name} has the wrong type", f"send a JSON {kind}"
        raise Refusal("BAD_REQUEST", what, todo, field.name)
    unit = {"integer": "", "string": " characters"}.get(field.kind, " of them")
    size: int = value if field.kind in ("integer", "boolean") else len(value)
    if field.kind != "boolean" and not field.minimum <= size <= field.maximum:
        what, todo = (
            f"{field.name} is out of range",
            f"send {field.minimum} to {field.maximum}{unit}",
        )
        raise Refusal("BAD_REQUEST", what, todo, field.name)
    if field.values and value not in field.values:
        what, todo = f"{field.name} has no known value", f"send one of: {', '.join(field.values)}"
        raise Refusal("BAD_REQUEST", what, todo, field.name)
    if field.item is not None:
        value = parse_items(field, field.item, value)
    return field.check(value, field.name) if field.check else value


def parse_items(field: Field, item: Field, value: Any) -> Any:
    """The checked items of an array or a map, each named after its place; raises Refusal."""
    keys = value if field.kind == "map" else range(len(value))
    found = {}
    for key in keys:
        place = str(key)[:40].encode("ascii", "replace").decode()
        found[key] = parse_field(
            dataclasses.replace(item, name=f"{field.name}[{place}]"), value[key]
        )
    return found if field.kind == "map" else list(found.values())


SPEC_KEYS = (
    *("image", "command", "env", "cpu_milli", "memory_bytes", "ports", "egress", "restart"),
    *("arch", "provider"),
)
HOST_STATUSES = ("pending", "online", "offline", "paused", "quarantined", "revoked")
INVITE_STATES = ("open", "used", "revoked", "expired")
# What the checks above take, as the OpenAPI document says it: a pattern (ECMA-262) or a format of
# our own, `line` (printable, no control characters) or `solana-pubkey` (base58 of 32 bytes).
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
LINE = {"format": "line"}
WALLET = {"format": "solana-pubkey"}
WG_IP = {"pattern": rf"^(?!10\.77\.(0\.[01]|255\.255)$)10\.77\.{_OCTET}\.{_OCTET}$"}
WG_PUBKEY = {"pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"}
UUID = {"format": "uuid"}
MONTH = "20[0-9]{2}-(0[1-9]|1[0-2])"
PATH_FORMS: dict[str, Mapping[str, str]] = {
    "host_id": UUID,
    "customer_id": UUID,
    "workload_id": UUID,
    "month": {"pattern": f"^{MONTH}$"},
}
INVITE_FIELDS = (
    Field("ttl_hours", "integer", "hours until it expires", 1, INVITE_TTL_MAX_HOURS, 24),
    Field("note", "string", "for the operator only", 0, 500, "", check_text, form=LINE),
    Field("payout_pubkey", "string", "the wallet", 1, 64, None, check_payout_pubkey, form=WALLET),
    Field("wg_ip", "string", "tunnel address kept for it", 1, 15, None, check_wg_ip, form=WG_IP),
    Field("wg_pubkey", "string", "only this key", 1, 64, None, check_wg_pubkey, form=WG_PUBKEY),
    Field("approve_first_wallet", "boolean", "approve the wallet it arrives with", default=False),
)
CUSTOMER_FIELDS = (
    Field("name", "string", "who it is", 1, 100, None, check_text, form=LINE, required=True),
    Field(
        "namespace",
        "string",
        "where its workloads and images are",
        2,
        40,
        None,
        check_namespace,
        form=NAMESPACE,
        required=True,
    ),
)
PAYMENT_FIELDS = (
    Field("reference", "string", "the bank's or your own", 1, 100, None, check_text, required=True),
    Field("note", "string", "what it is for", 0, 200, "", check_text),
)
MONTH_FIELD = Field(
    "month",
    "string",
    "like 2026-11; default: this month",
    0,
    7,
    "",
    form={"pattern": f"^({MONTH})?$"},
)
KEY_FIELDS = (Field("note", "string", "what it is for", 0, 200, "", check_text, form=LINE),)
ARCHS = ("aarch64", "x86_64")
EGRESSES = ("none", "internet")
RESTARTS = ("always", "on-failure", "never")
LABELS: dict[str, Any] = {
    "minimum": 0,
    "maximum": LABELS_MAX,
    "check": check_labels,
    "form": {"propertyNames": LABEL},
    "item": Field("labels", "string", "", 1, 63, form=LABEL),
}
LABEL_FIELDS = (Field("labels", "map", "all that it has from now on", required=True, **LABELS),)
WORKLOAD_FIELDS = (
    Field("namespace", "string", "or the image's", 2, 40, None, check_namespace, form=NAMESPACE),
    Field("name", "string", "unique in it", 1, 63, None, check_name, form=NAME, required=True),
    Field(
        "image",
        "string",
        "namespace/name@sha256:…, or namespace/name:tag, whose digest is looked up now",
        1,
        272,  # 72 of them the digest; Docker takes 255 with the registry's name before it
        None,
        check_image,
        form=IMAGE,
        required=True,
    ),
    Field(
        "command",
        "array",
        "arguments in place of the image's own",
        0,
        64,
        [],
        check_words,
        item=Field("command", "string", "", 0, 4096, form=NO_NUL),
    ),
    Field(
        "env",
        "map",
        "environment; it is shown again: passwords belong into `secrets`",
        0,
        64,
        {},
        check_words,
        form={"propertyNames": ENV_KEY},
        item=Field("env", "string", "", 0, 4096, form=NO_NUL),
    ),
    Field(
        "secrets",
        "map",
        "files in /run/secrets by their names, never shown again, 16 KiB in all;"
        " absent: those that are there stay; {}: none",
        0,
        SECRETS_MAX,
        None,
        check_secrets,
        form={"propertyNames": SECRET_NAME, "writeOnly": True},
        item=Field("secrets", "string", "", 0, SECRETS_BYTES - 64),  # and its name
    ),
    Field("cpu_milli", "integer", "thousandths of a processor", 10, 64_000, None, required=True),
    Field(
        "memory_bytes",
        "integer",
        "its memory, files in /tmp included",
        16 << 20,
        1 << 40,
        None,
        required=True,
    ),
    Field("replicas", "integer", "copies to run", 0, REPLICAS_MAX, 1),
    Field(
        "ports",
        "array",
        "TCP ports that it listens on",
        0,
        PORTS_MAX,
        [],
        check_ports,
        form={"uniqueItems": True},
        item=Field("ports", "integer", "", 1, 65_535),
    ),
    Field("egress", "string", "what it may reach", 1, 16, "internet", values=EGRESSES),
    Field("restart", "string", "when it ends", 1, 16, "always", values=RESTARTS),
    Field("arch", "string", "only on such machines", 1, 16, None, values=ARCHS),
    Field(
        "provider",
        "string",
        "only on hosts of this provider's namespace",
        1,
        64,
        None,
        check_provider,
        form={"format": "solana-namespace"},
    ),
    Field("labels", "map", "only on hosts with all of these labels", default={}, **LABELS),
)
WORKLOAD_FILTERS = (
    Field("namespace", "string", "of this one", 2, 40, None, check_namespace, form=NAMESPACE),
    Field("name", "string", "with this name", 1, 63, None, check_name, form=NAME),
    Field("deleted", "boolean", "those too that were deleted", default=False),
)
COPY_FIELD = Field(
    "assignment_id", "string", "only of this copy", 36, 36, None, check_uuid, form=UUID
)
LOG_FILTERS = (
    Field("tail", "integer", "lines of each copy to give", 1, LOG_LINES_MAX, LOG_LINES),
    COPY_FIELD,
)
PAGE_FIELDS = (
    Field("limit", "integer", "rows to give", 1, PAGE_MAX, PAGE_DEFAULT),
    Field("cursor", "integer", "`next_cursor` of the page before", 0, 2**62, 0),
)
HOST_FILTERS = (
    Field("status", "string", "hosts of this status", 1, 16, None, values=HOST_STATUSES),
    Field("namespace", "string", "hosts of this namespace", 1, 64, None, check_text, form=LINE),
    Field("hostname", "string", "hosts of this exact name", 1, 253, None, check_text, form=LINE),
)
INVITE_FILTERS = (
    Field("state", "string", "only invites of this state", 1, 16, None, values=INVITE_STATES),
)
AUDIT_FILTERS = (
    Field(
        "subject",
        "string",
        "only this host, invite or namespace",
        1,
        100,
        None,
        check_text,
        form=LINE,
    ),
)


# pb.AssignmentState -> how the database and the API call it.
OBSERVED_STATES: dict[int, str] = {
    pb.ASSIGNMENT_STATE_PULLING: "pulling",
    pb.ASSIGNMENT_STATE_STARTING: "starting",
    pb.ASSIGNMENT_STATE_RUNNING: "running",
    pb.ASSIGNMENT_STATE_WAITING: "waiting",
    pb.ASSIGNMENT_STATE_FINISHED: "finished",
    pb.ASSIGNMENT_STATE_FAILED: "failed",
    pb.ASSIGNMENT_STATE_REJECTED: "rejected",
    pb.ASSIGNMENT_STATE_STOPPING: "stopping",
}
LIVE_STATES = ("assigned", *(s for s in OBSERVED_STATES.values() if s != "rejected"))
DONE_STATES = ("finished", "failed")  # it ended for good, and holds nothing but its logs


def parse_query(fields: Sequence[Field], query: str) -> dict[str, Any]:
    """The checked values of a URL's query string; raises Refusal."""
    given: dict[str, Any] = {}
    kinds = {field.name: field.kind for field in fields}
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refusal("BAD_REQUEST", "the query has too many fields", "send fewer") from None
    for name, value in pairs:
        if name in given:
            what = f"{json.dumps(name[:40])} stands twice in the query"
            raise Refusal("BAD_REQUEST", what, "send it once", name[:40])
        is_number = kinds.get(name) == "integer" and re.fullmatch("[0-9]{1,19}", value)
        is_flag = kinds.get(name) == "boolean" and value in ("true", "false")
        given[name] = int(value) if is_number else value == "true" if is_flag else value
    return parse_fields(fields, given)


def parse_facts(facts: pb.Facts) -> Facts:
    """The checked facts of a host; raises Refusal with the field."""
    limits = {"hostname": 253, "arch": 32, "kernel": 128, "agent_version": 64}
    for name, limit in limits.items():
        value = getattr(facts, name)
        if not (0 < len(value) <= limit and value.isascii() and value.isprintable()):
            raise Refusal(
                "BAD_REQUEST",
                f"facts.{name} is empty, too long or not printable ASCII",
                "upgrade the agent, or mend the name on the host",
                f"facts.{name}",
            )
    largest = max(facts.memory_bytes, facts.disk_bytes, facts.offered_memory_bytes)
    if largest >= 2**63 or facts.cpu_count > 2**16 or facts.offered_cpu_milli > 1000 * 2**16:
        what = "facts.cpu_count, memory_bytes, disk_bytes or what it offers is impossible"
        raise Refusal("BAD_REQUEST", what, "upgrade the agent", "facts")
    return Facts(
        facts.hostname,
        facts.arch,
        facts.kernel,
        facts.agent_version,
        facts.cpu_count,
        facts.memory_bytes,
        facts.disk_bytes,
        facts.disk_encrypted,
        parse_said(facts.engine_version, 64),
        parse_said(facts.unready, 300),
        facts.offered_cpu_milli,
        facts.offered_memory_bytes,
        facts.takes_secrets,
    )


def parse_said(text: str, limit: int) -> str:
    """Words of a host, fit for one line on a terminal or a page."""
    line = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def hash_secret(secret: bytes, field: str) -> bytes:
    """SHA-256 of a secret that must be 32 bytes; raises Refusal."""
    if len(secret) != 32:
        raise Refusal("BAD_REQUEST", f"{field} is not 32 bytes", "upgrade the agent", field)
    return sha256(secret)


def hash_session(session: bytes) -> bytes:
    """What is kept of a session, a hash of what it shows to the registry; raises Refusal."""
    return sha256(hash_secret(session, "session"))


def parse_wallet(text: str) -> str | None:
    """The wallet that an agent sends, or None for an empty one; raises Refusal."""
    return check_payout_pubkey(text, "payout_pubkey") if text else None


def parse_tunnel(peer: str, wg_pubkey: str, peer_check: bool) -> tuple[str | None, str | None]:
    """The WireGuard address and key that a host comes with; raises Refusal."""
    key = check_wg_pubkey(wg_pubkey, "wg_pubkey") if wg_pubkey else None
    if not peer_check:
        return None, key
    try:
        address = check_wg_ip(peer, "peer")
    except Refusal:
        raise Refusal(
            "WRONG_ADDRESS",
            f"the call came from {peer}, which is no host's address in the tunnel",
            "let the agent connect through WireGuard: sudo wg show openinfra",
        ) from None
    if key is None:
        raise Refusal(
            "BAD_REQUEST",
            "the agent sent no WireGuard public key",
            "is /etc/wireguard/openinfra.pub there? run install_agent.py again",
            "wg_pubkey",
        )
    return address, key


def parse_register(request: pb.RegisterRequest, peer: str, peer_check: bool) -> Registration:
    """A checked Register request; raises Refusal."""
    token = parse_token("oi1", request.invite_token)
    address, key = parse_tunnel(peer, request.wg_pubkey, peer_check)
    return Registration(
        token=token,
        host_secret_sha256=hash_secret(request.host_secret, "host_secret"),
        session_sha256=hash_session(request.session),
        payout_pubkey=parse_wallet(request.payout_pubkey),
        wg_ip=address,
        wg_pubkey=key,
        facts=parse_facts(request.facts),
    )


def parse_resume(request: pb.ResumeRequest, peer: str, peer_check: bool) -> Resumption:
    """A checked Resume request; raises Refusal."""
    address, key = parse_tunnel(peer, request.wg_pubkey, peer_check)
    return Resumption(
        host_secret_sha256=hash_secret(request.host_secret, "host_secret"),
        session_sha256=hash_session(request.session),
        previous_sha256=sha256(sha256(request.previous_session)),
        payout_pubkey=parse_wallet(request.payout_pubkey),
        wg_ip=address,
        wg_pubkey=key,
    )


def parse_heartbeat(request: pb.HeartbeatRequest, peer: str, interval_ms: int) -> Beat:
    """A checked heartbeat; raises Refusal."""
    if not _BOOT_ID.fullmatch(request.boot_id):
        raise Refusal("BAD_REQUEST", "boot_id is not a UUID", "upgrade the agent", "boot_id")
    if not 0 < request.seq < 2**63:
        raise Refusal("BAD_REQUEST", "seq is out of range", "upgrade the agent", "seq")
    return Beat(
        session_sha256=hash_session(request.session),
        peer=peer,
        seq=request.seq,
        boot_id=request.boot_id,
        status="paused" if request.paused else "online",
        interval_ms=interval_ms,
        facts=parse_facts(request.facts) if request.HasField("facts") else None,
        desired_revision=parse_revision(request.desired_revision),
        observed=parse_observed(request.observed) if request.HasField("observed") else None,
        counters=parse_counters(request.usage),
    )


def parse_earnings(request: pb.EarningsRequest, peer: str) -> EarningsOrder:
    """A checked request for a month's earnings; raises Refusal."""
    session = hash_session(request.session)
    month = parse_month(request.month) if request.month else None
    if request.cursor >= 2**31:
        raise Refusal("BAD_REQUEST", "cursor is out of range", "begin with 0", "cursor")
    copy = check_uuid(request.assignment_id, "assignment_id") if request.assignment_id else None
    return EarningsOrder(session, peer, month, request.cursor, copy)


def parse_revision(revision: int) -> int:
    """A revision that fits the database; raises Refusal."""
    if revision >= 2**63:
        what = "the revision of the desired list is impossible"
        raise Refusal("BAD_REQUEST", what, "upgrade the agent", "desired_revision")
    return revision


def parse_observed(observed: pb.Observed) -> Observed:
    """What a host says that it has of its assignments; raises Refusal with the field."""
    found: dict[str, Observation] = {}
    for each in observed.assignments:
        state = OBSERVED_STATES.get(each.state)
        if (
            len(found) > 2 * ASSIGNMENTS_MAX
            or state is None
            or not _UUID.fullmatch(each.assignment_id)
        ):
            what = "observed has too many assignments, or one with an impossible id or state"
            raise Refusal("BAD_REQUEST", what, "upgrade the agent", "observed")
        found[each.assignment_id] = Observation(
            each.assignment_id,
            state,
            parse_said(each.reason, 300),
            min(each.restarts, 2**31 - 1),
            each.exit_code if each.HasField("exit_code") else None,
        )
    return Observed(parse_revision(observed.revision), tuple(found.values()))


def parse_counters(usage: Sequence[pb.UsageCounter]) -> tuple[Counter, ...]:
    """Counters, without those that cannot be: a host that sends one stays online."""
    found = [
        Counter(
            each.assignment_id,
            each.boot_id,
            each.container_id,
            each.cpu_ns,
            each.memory_byte_s,
            each.rx_bytes,
            each.tx_bytes,
        )
        for each in usage[:COUNTERS_MAX]
        if _UUID.fullmatch(each.assignment_id)
        and _BOOT_ID.fullmatch(each.boot_id)
        and len(each.container_id) == 32
    ]
    return tuple(
        one
        for one in found
        if max(one.cpu_ns, one.memory_byte_s, one.rx_bytes, one.tx_bytes) <= INT64_MAX
    )


_BARE_CONTROLS = re.compile(r"[\x7f-\x9f]")  # a terminal obeys them, JSON does not escape them


def parse_log(answer: pb.LogAnswer, request: pb.LogRequest) -> Log:
    """What a host answers, no more than was asked for; the bytes may be anything."""
    content = answer.content[-request.limit_bytes :]
    text = _BARE_CONTROLS.sub("\ufffd", content.decode("utf-8", "replace"))
    lines = text.removesuffix("\n").split("\n")
    is_cut = answer.truncated or len(content) < len(answer.content)
    reason = parse_said(answer.reason, 300)
    return Log(lines[-request.tail_lines :] if content else [], is_cut, reason)


def decide_redemption(
    by_secret: Claimant | None,
    by_key: Claimant | None,
    by_address: Claimant | None,
    kept: frozenset[str] = frozenset(),
) -> Claimant | None:
    """The host that a valid invite gives its secret to, or None for a new host; raises Refusal.

    `by_address` counts hosts that are not revoked. The key alone proves nothing, since it is only
    said; the address is proved by the tunnel; so a lost identity is healed by both together.
    `kept` says what another open invite is for: `key`, `address`.
    """
    if by_secret is not None and by_secret.status == "revoked":
        raise revoked()
    if by_key is not None and by_key.status == "revoked":
        raise Refusal(
            "KEY_TAKEN",
            "this WireGuard key belongs to a host that was revoked",
            "make a new key: install_agent.py --new-key",
        )
    host = by_secret or (by_key if by_key == by_address else None)
    if by_key is not None and by_key != host:
        raise Refusal(
            "KEY_TAKEN",
            "another host has this WireGuard key, at another address",
            "connect from the address that the operator gave you, or make a new key",
        )
    if by_address is not None and by_address != host:
        raise Refusal(
            "ADDRESS_TAKEN",
            "another host has this address in the tunnel",
            "ask the operator for another address, or to revoke the host that has it",
        )
    if by_key is None and "key" in kept:
        raise key_kept()
    if by_address is None and "address" in kept:
        raise Refusal(
            "ADDRESS_TAKEN",
            "this address in the tunnel is kept for another open invite",
            "redeem that invite, or ask the operator to revoke it",
        )
    return host


def decide_resume(
    live: bytes | None, asked: bytes, previous: bytes, ended: bool, takeovers: int, opened: int
) -> str:
    """What a Resume is: `retry`, `superseded`, `flood`, `continue`, `takeover` or `quarantine`.

    `live` is the hash of the session that is live now; `ended` says that `asked` was live once;
    `takeovers` and `opened` count this host's sessions of the last 10 minutes.
    """
    if live == asked:
        return "retry"
    if ended:
        return "superseded"
    if live is not None and live != previous and takeovers >= TAKEOVERS_MAX:
        return "quarantine"
    if opened >= SESSIONS_MAX:
        return "flood"
    return "continue" if live is None or live == previous else "takeover"


def decide_wallet(
    current: str | None, asked: str | None, invited: str | None, ever_assigned: bool
) -> tuple[str | None, str | None]:
    """The wallet a host gets, and the one that it wants but may not have any more (or None)."""
    wanted = asked or current or invited
    if ever_assigned and current is not None and wanted != current:
        return current, wanted
    return wanted, None


def key_kept() -> Refusal:
    """The refusal of a key that another open invite was minted for."""
    return Refusal(
        "KEY_TAKEN",
        "another open invite is kept for this WireGuard key",
        "redeem that invite, or ask the operator to revoke it",
    )


def superseded() -> Refusal:
    """The refusal of a session after which a newer one was opened."""
    return Refusal(
        "SESSION_SUPERSEDED",
        "another agent holds this identity: a newer session was opened for this host",
        "is a copy of this machine's disk running somewhere? stop one of the two",
    )


def quarantined() -> Refusal:
    """The refusal of a quarantined host."""
    return Refusal(
        "HOST_QUARANTINED",
        "this host is in quarantine: two machines used its identity in turn",
        "stop the copy, then ask the operator to release the host",
    )


def revoked() -> Refusal:
    """The refusal of a revoked host."""
    return Refusal(
        "HOST_REVOKED",
        "the operator revoked this host",
        "ask the operator; a revoked host stays revoked",
    )


def decide_reasons(host: Host) -> list[HostReason]:
    """Every reason why no workload may be placed on a host; none for one that is assignable."""
    found = []
    since = f"{host.status_at:%Y-%m-%d %H:%M} UTC"
    if host.status == "pending":
        what = "it has registered, but no heartbeat has arrived yet"
        found.append(HostReason(what, "look on the host: sudo journalctl -u openinfra-agent"))
    if host.status == "offline":
        what = f"no heartbeat since {host.last_heartbeat_at or host.created_at:%Y-%m-%d %H:%M} UTC"
        found.append(HostReason(what, "is the machine on, its tunnel up? on the CP: wg show wg0"))
    if host.status == "paused":
        found.append(HostReason(f"its provider paused it at {since}", "only they can unpause it"))
    if host.status == "quarantined":
        what = f"since {since} it is in quarantine: two machines used its identity in turn"
        found.append(HostReason(what, "stop the copy, then release the host"))
    if host.status == "revoked":
        what = f"the operator revoked it at {since}"
        todo = "to join again it needs a fresh invite: install_agent.py --new-invite --new-key"
        found.append(HostReason(what, todo))
    if host.drained_at is not None and host.status != "revoked":
        what = f"the operator drains it since {host.drained_at:%Y-%m-%d %H:%M} UTC"
        found.append(HostReason(what, f"cp_server.py undrain {host.host_id}"))
    if host.payout_pubkey is None:
        what = "it has no payout wallet"
        todo = "set SOLANA_PAYOUT_PUBKEY in /etc/openinfra/agent.env, then restart openinfra-agent"
        found.append(HostReason(what, todo))
    elif not host.namespace_approved:
        invited = host.invite_payout_pubkey
        differs = f"is not the invite's {invited}" if invited else "was not named in the invite"
        what = f"its wallet {host.payout_pubkey} {differs}"
        todo = (
            f"the operator approves namespace {host.namespace}, or the provider mends"
            " SOLANA_PAYOUT_PUBKEY in /etc/openinfra/agent.env and restarts openinfra-agent"
        )
        found.append(HostReason(what, todo))
    if host.requested_payout_pubkey is not None:
        what = (
            f"agent.env names the wallet {host.requested_payout_pubkey}, but it has already"
            f" worked for {host.payout_pubkey}"
        )
        found.append(HostReason(what, "set the old wallet again, or ask the operator"))
    if host.unready and host.status in ("online", "paused"):
        found.append(HostReason(host.unready, "look on the host: sudo openinfra-agent doctor"))
    return found


def decide_standing(host: Host) -> Standing:
    """How the control plane sees a host."""
    reasons = tuple(str(reason) for reason in decide_reasons(host))
    return Standing(host.status, not reasons, reasons)


PLAIN_STANDING = Standing("online", True, ())  # of a host that workloads may be placed on


def plan_rollout(demand: Demand) -> tuple[list[int], list[int]]:
    """Which live copies to stop now (assignment_no), and which replicas have no copy at all.

    One replica at a time makes room for a new revision: only when all others run, so that a
    revision that does not come up takes down no more than one. What does not run anyway goes first.
    """
    live = {copy.replica: copy for copy in demand.copies}
    missing = [number for number in range(demand.replicas) if number not in live]
    if demand.secrets_lost or any(copy.is_stopping for copy in live.values()):
        return [], missing
    old = sorted(
        (copy for copy in live.values() if copy.revision != demand.revision),
        key=lambda copy: (copy.is_running, copy.replica),
    )
    idle = [copy for copy in old if not copy.is_running]
    if idle:
        return [copy.assignment_no for copy in idle], missing
    fresh = [copy for copy in live.values() if copy.revision == demand.revision]
    is_settled = not missing and all(
        copy.is_done or (copy.is_running and copy.state_age_s >= READY_S) for copy in fresh
    )
    return [copy.assignment_no for copy in old[:1] if is_settled], missing


def decide_wait_s(rejections: int) -> float:
    """Seconds that a replica waits after hosts of late could not run it; after the first, none."""
    return float(min(5 * 2 ** min(rejections - 2, 6), 300)) if rejections > 1 else 0.0


def order_demands(demands: Sequence[Demand], turns: Mapping[int, int]) -> list[Demand]:
    """Each customer's first, then each one's second: of one customer what waits longest is first.

    So neither what has no place anywhere nor a customer with much of it holds up the others.
    """
    now = max(turns.values(), default=0)
    ahead: collections.Counter[int] = collections.Counter()
    ranks = {}
    waiting = sorted(demands, key=lambda each: (turns.get(each.workload_no, now), each.workload_no))
    for demand in waiting:
        ranks[demand.workload_no] = ahead[demand.customer_no]
        ahead[demand.customer_no] += 1
    return sorted(waiting, key=lambda each: ranks[each.workload_no])


def plan_turns(
    demands: Sequence[Demand], left: Collection[int], turns: Mapping[int, int]
) -> dict[int, int]:
    """The round since which each waits, by workload_no: one that was looked at begins anew."""
    now = max(turns.values(), default=0)
    return {
        number: turns.get(number, now) if number in left else now + 1
        for number in (each.workload_no for each in demands)
    }


def decide_places(
    demands: Sequence[Demand],
    places: Sequence[Place],
    looks: int = PLACE_LOOKS_MAX,
    copies: int = PLACE_COPIES_MAX,
) -> tuple[list[Placement], dict[int, str], set[int]]:
    """A host for each replica that has none, and of the others the reason, by workload_no.

    Of the hosts that can take it, in this order: one that did not reject it of late, with fewest
    copies of the same workload, then of hosts of the same provider, then with most memory free.
    Ends after so many looks at hosts, or copies; the third is what was not looked at (whole).
    """
    made: list[Placement] = []
    reasons: dict[int, str] = {}
    left: set[int] = set()
    market = Market(places, looks)
    provider_of = {place.host_no: place.namespace for place in places}
    for demand in demands:
        _, missing = plan_rollout(demand)
        if not missing:
            continue
        if demand.secrets_lost or demand.out_of_credit:
            why = SECRETS_LOST if demand.secrets_lost else "the balance is used up"
            reasons[demand.workload_no] = why
            continue
        held = collections.Counter(copy.host_no for copy in demand.copies)
        providers = collections.Counter(provider_of.get(copy.host_no) for copy in demand.copies)
        for replica in missing:
            refused = demand.rejections.get(replica)
            wait_s = decide_wait_s(refused.times) if refused else 0.0
            if refused and refused.age_s < wait_s:
                reasons[demand.workload_no] = (
                    f"a host could not run it: {refused.reason}; tried {refused.times} times of"
                    f" late, again {wait_s:.0f} s after the last"
                )
                continue
            if market.looks <= 0 or len(made) >= copies:
                left.add(demand.workload_no)
                break
            shelf = find_shelf(market, demand.spec)
            best = find_place(market, shelf, demand, held, providers)
            if best is None:
                reasons[demand.workload_no] = explain_no_place(market, shelf)
                break
            made.append(take_place(demand, replica, best))
            held[best.host_no] += 1
            providers[best.namespace] += 1
    return made, reasons, left


def find_shelf(market: Market, spec: Mapping[str, Any]) -> Shelf:
    """The places for a copy of this kind: looked for once in a round."""
    labels = tuple(sorted(spec.get("labels", {}).items()))
    wish = (spec["arch"], spec["provider"], labels, "secrets" in spec)
    kind = (wish, spec["cpu_milli"], spec["memory_bytes"], bool(spec["ports"]))
    if kind in market.shelves:
        return market.shelves[kind]
    if wish not in market.fitting:
        market.looks -= len(market.places)
        market.fitting[wish] = [place for place in market.places if fits(spec, place)]
    fitting = market.fitting[wish]
    market.looks -= len(fitting)
    heaps: dict[str, list[Spot]] = {}
    for place in fitting:
        if has_room(spec, place):
            spot = (-place.memory_bytes, place.host_no, place)
            heaps.setdefault(place.namespace, []).append(spot)
    for heap in heaps.values():
        heapq.heapify(heap)
    tops = [(*heap[0][:2], provider) for provider, heap in heaps.items()]
    heapq.heapify(tops)
    return market.shelves.setdefault(kind, Shelf(spec, fitting, heaps, tops))


def find_place(
    market: Market,
    shelf: Shelf,
    demand: Demand,
    held: Mapping[int, int],
    providers: Mapping[str | None, int],
) -> Place | None:
    """The best place for one copy; None: there is none.

    Goes through providers, the one with the freest host first, up to one whose freest host is as
    good as any: without a copy of this workload, nor another host with one, and never rejected it.
    """

    def rank(place: Place) -> tuple[bool, int, int, int, int]:
        is_rejecting = place.host_no in demand.rejected_by
        copies = held.get(place.host_no, 0)
        beside = providers.get(place.namespace, 0)
        return is_rejecting, copies, beside, -place.memory_bytes, place.host_no

    seen, found = [], []
    while shelf.tops:
        market.looks -= 1
        memory, host_no, provider = heapq.heappop(shelf.tops)
        spot = find_top(market, shelf, provider)
        if spot and spot[:2] != (memory, host_no):  # less is free than when it was put here
            heapq.heappush(shelf.tops, (*spot[:2], provider))
        elif spot:
            seen.append((memory, host_no, provider))
            found.append(find_best(market, shelf, provider, rank))
            if rank(spot[2])[:3] == (False, 0, 0):
                break
    for top in seen:
        heapq.heappush(shelf.tops, top)
    return min(found, key=rank, default=None)


def find_best(
    market: Market,
    shelf: Shelf,
    provider: str,
    rank: Callable[[Place], tuple[bool, int, int, int, int]],
) -> Place:
    """The best of a provider's places, of which there is one."""
    seen = []
    while spot := find_top(market, shelf, provider):
        seen.append(heapq.heappop(shelf.heaps[provider]))
        if rank(spot[2])[:2] == (False, 0):
            break
    for each in seen:
        heapq.heappush(shelf.heaps[provider], each)
    return min((place for _, _, place in seen), key=rank)


def find_top(market: Market, shelf: Shelf, provider: str) -> Spot | None:
    """A provider's place with most memory free, of those that still have room."""
    heap = shelf.heaps[provider]
    while heap:
        market.looks -= 1
        memory, host_no, place = heap[0]
        if not has_room(shelf.spec, place):
            heapq.heappop(heap)
        elif memory != -place.memory_bytes:
            heapq.heapreplace(heap, (-place.memory_bytes, host_no, place))
        else:
            return heap[0]
    return None


def take_place(demand: Demand, replica: int, place: Place) -> Placement:
    """Put a replica there: what it needs is not free any more."""
    spec, slot = demand.spec, None
    if spec["ports"]:
        ways = (place.port_slots.union(place.refused_slots), place.port_slots)
        slot = next(n for held in ways for n in range(PORT_SLOTS) if n not in held)
        place.port_slots.add(slot)
    place.cpu_milli -= spec["cpu_milli"]
    place.memory_bytes -= spec["memory_bytes"]
    place.assignments += 1
    sizes = (spec["cpu_milli"], spec["memory_bytes"])
    return Placement(
        demand.workload_no, demand.revision, replica, place.host_no, slot, *sizes, spec
    )


def fits(spec: Mapping[str, Any], place: Place) -> bool:
    """True when a workload may run on this host at all, whatever is free."""
    is_asked = spec["arch"] in (None, place.arch) and spec["provider"] in (None, place.namespace)
    is_asked = is_asked and spec.get("labels", {}).items() <= place.labels.items()
    return is_asked and ("secrets" not in spec or place.takes_secrets)


def has_room(spec: Mapping[str, Any], place: Place) -> bool:
    """True when the host has what a copy needs."""
    return (
        place.cpu_milli >= spec["cpu_milli"]
        and place.memory_bytes >= spec["memory_bytes"]
        and place.assignments < ASSIGNMENTS_MAX
        and (not spec["ports"] or len(place.port_slots) < PORT_SLOTS)
    )


def explain_no_place(market: Market, shelf: Shelf) -> str:
    """Why no host takes a copy, a sentence for the customer; worked out once in a round."""
    spec, fitting = shelf.spec, shelf.fitting
    if not market.places:
        return "no host is ready for work now"
    if not fitting:
        wishes = [text for text in (spec["arch"], spec["provider"]) if text]
        wishes += [f"{key}={value}" for key, value in sorted(spec.get("labels", {}).items())]
        wishes += ["for its secrets an encrypted disk and a new agent"] * ("secrets" in spec)
        return f"none of {len(market.places)} hosts is as asked: {', '.join(wishes)}"
    if not shelf.why_none:
        market.looks -= len(fitting)
        cpu = max(place.cpu_milli for place in fitting)
        memory = max(place.memory_bytes for place in fitting)
        shelf.why_none = (
            f"none of {len(fitting)} hosts has {spec['cpu_milli']} cpu_milli and"
            f" {spec['memory_bytes']} memory_bytes free; the most of each is {max(cpu, 0)} and"
            f" {max(memory, 0)}"
        )
    return shelf.why_none


def render_assignment(row: Row, registry: str) -> pb.Assignment:
    """An assignment as its host gets it."""
    spec, opened = row["spec"], row["secrets"]
    first = PORT_FIRST + PORTS_MAX * (row["port_slot"] or 0)
    return pb.Assignment(
        assignment_id=str(row["assignment_id"]),
        fence=row["assignment_no"],
        workload_id=str(row["workload_id"]),
        image=f"{registry}/{spec['image']}",
        command=spec["command"],
        env=spec["env"],
        cpu_milli=spec["cpu_milli"],
        memory_bytes=spec["memory_bytes"],
        ports=[
            pb.Port(container_port=port, host_port=first + number)
            for number, port in enumerate(spec["ports"])
        ],
        egress=pb.Egress.Value(f"EGRESS_{spec['egress'].upper()}"),
        restart=pb.Restart.Value(f"RESTART_{spec['restart'].upper().replace('-', '_')}"),
        done=row["state"] in DONE_STATES,
        secrets={name: text.encode() for name, text in json.loads(opened or "{}").items()},
        secrets_withheld="secrets" in spec and opened is None,
    )


def decide_workload(workload: Workload, assignments: Sequence[Assignment]) -> tuple[str, list[str]]:
    """A workload's state and, unless it runs whole, why: a sentence for each replica."""
    live = {each.replica: each for each in assignments if each.ended_at is None}
    if workload.deleted_at is not None:
        return ("deleting" if live else "deleted"), [explain_copy(each) for each in live.values()]
    if workload.replicas == 0:
        return ("stopping" if live else "stopped"), [explain_copy(each) for each in live.values()]
    reasons = [
        f"replica {number}: {explain_copy(live[number])}"
        if number in live
        else f"replica {number}: {workload.unplaced_reason or 'it is about to get a host'}"
        for number in sorted({*range(workload.replicas), *live})
        if number not in live or explain_copy(live[number])
    ]
    reasons = [SECRETS_LOST, *reasons] if workload.secrets_lost else reasons
    wanted = [each for n, each in live.items() if n < workload.replicas and not each.stop_reason]
    # A copy that runs by the last word of an absent host does not count: explain_copy knows.
    states = [each.state for each in wanted if each.state != "running" or not explain_copy(each)]
    if any(each.revision != workload.revision for each in live.values()):
        return "updating", reasons
    for state in ("running", "finished", "failed"):
        if states == [state] * workload.replicas:
            return state, reasons
    return ("degraded" if "running" in states else "pending"), reasons


def explain_copy(copy: Assignment) -> str:
    """Why a copy does not run; empty when it does."""
    if copy.stop_reason:
        return f"it is being stopped: {copy.stop_reason}"
    if copy.host_status in ("offline", "quarantined", "revoked"):
        return f"its host is {copy.host_status}; it moves when the host's right to run it is over"
    if copy.state == "running":
        return ""
    return copy.reason or {"assigned": "its host is about to hear of it"}.get(
        copy.state, f"it is {copy.state}"
    )


def explain_no_log(copy: Assignment) -> str:
    """Why a copy's host is not asked what it printed; empty when it is."""
    if copy.ended_at is not None:
        return "it has ended, and nothing of it is kept"
    if copy.host_status in ("offline", "quarantined", "revoked"):
        return f"its host is {copy.host_status}"
    return ""


def render_log_requests(copies: Sequence[Assignment], tail_lines: int) -> list[pb.LogRequest]:
    """What to ask hosts for, in the order of copies: what is of one host shares a heartbeat."""
    of_host = collections.Counter(copy.host_no for copy in copies)
    return [
        pb.LogRequest(
            request_id=secrets.randbits(64),
            assignment_id=str(copy.assignment_id),
            tail_lines=tail_lines,
            limit_bytes=LOG_BYTES // of_host[copy.host_no],
        )
        for copy in copies
    ]


def decide_hold(
    due: float, now: float, calls_s: float, burst: float, hold_s: float
) -> tuple[float, float]:
    """Seconds to hold an address's call back, and when its next call is due (GCRA, ITU-T I.371).

    A call that would be held longer than `hold_s` is to be refused and leaves `due` as it is, so
    that an address comes back soon after it stops.
    """
    due = max(due, now - burst / calls_s)
    wait_s = max(0.0, due - now)
    return wait_s, due if wait_s > hold_s else due + 1 / calls_s


def plan_peers(
    wanted: Sequence[WantedPeer], on_hub: Mapping[str, Sequence[str]], lost: Mapping[str, str]
) -> PeerPlan:
    """What makes the hub as the database says; `on_hub` has the networks of each peer.

    `lost` says of peers that are no host's key: `revoked`, or `former` of a host that has another
    key now. One that nobody knows is left alone, even with the address of a host: that is how a
    host gets a new key by hand. But a host that is up keeps its address.
    """
    keys = {peer.key for peer in wanted}
    hosts_nets = {f"{peer.ip}/32" for peer in wanted}
    changes: list[PeerChange] = []
    conflicts: list[PeerChange] = []
    unknown: list[str] = []
    holder: dict[str, str] = {}
    for key, nets in on_hub.items():
        state = lost.get(key, "") if key not in keys else "host"
        if state == "revoked" or (state == "former" and hosts_nets.issuperset(nets)):
            changes.append(PeerChange("remove", key))
            continue
        holder.update(dict.fromkeys(nets, key))
        if state != "host":
            unknown.append(key)
    for peer in wanted:
        net = f"{peer.ip}/32"
        if list(on_hub.get(peer.key, ())) == [net]:
            continue
        other = holder.get(net, peer.key)
        change = PeerChange("set", peer.key, peer.ip, "" if other == peer.key else other)
        (changes if peer.is_up or other in keys else conflicts).append(change)
    return PeerPlan(len(wanted), tuple(changes), tuple(unknown), tuple(conflicts))


def plan_renewals(
    wanted: Sequence[WantedPeer], peers: Sequence[Row], now_s: float
) -> Iterator[PeerChange]:
    """Make the hub forget when silent hosts were connected last, each once.

    It refuses a handshake that is earlier by the host's clock than the last one (section 5.1 of the
    WireGuard paper): a host whose clock went back would be away until that time comes again.
    """
    dead = {p["key"]: p for p in peers if 0 < p["latest_handshake_at"] < now_s - PEERS_RENEW_S}
    found = [peer for peer in wanted if not peer.is_up and peer.key in dead]
    for peer in found[:PEERS_PAGE]:
        if list(dead[peer.key]["allowed_ips"]) == [f"{peer.ip}/32"]:
            yield PeerChange("remove", peer.key)
            yield PeerChange("set", peer.key, peer.ip)


def render_peer_change(change: PeerChange) -> dict[str, str]:
    """A change as the WireGuard helper takes it."""
    return {key: value for key, value in dataclasses.asdict(change).items() if value}


def decide_busy(waiting: int, commit_s: float) -> float:
    """How loaded the heartbeat path is, 0 to 1, from its queue and its last commit's time."""
    return min(1.0, max(waiting / (10 * BATCH_MAX), (commit_s - 0.25) / 0.75, 0.0))


def decide_interval_ms(nominal_s: float, busy: float, unit: float) -> int:
    """Milliseconds to a host's next heartbeat: nominal to double by load, jittered by 10 %.

    `unit` is a random number from 0 to 1. At most 60 s, the limit that the agent keeps as well.
    """
    return int(min(nominal_s * (1 + busy) * (0.9 + 0.2 * unit), HEARTBEAT_MAX_S) * 1000)


Cards = Mapping[int | None, Sequence[RateCard]]  # by customer, in the order of their hours


def sort_cards(cards: Sequence[RateCard]) -> Cards:
    """Cards as `find_card` looks through them."""
    found: dict[int | None, list[RateCard]] = {}
    for card in sorted(cards, key=lambda card: card.valid_from):
        found.setdefault(card.customer_no, []).append(card)
    return found


def find_card(cards: Cards, customer_no: int, hour_at: dt.datetime) -> RateCard | None:
    """The prices of an hour: the customer's own latest card, else the latest for all."""
    for whose in (customer_no, None):
        own = cards.get(whose, ())
        count = bisect.bisect_right(own, hour_at, key=lambda card: card.valid_from)
        if count:
            return own[count - 1]
    return None


def price(meter: Meter, card: RateCard | None, billed_us: int, egress_bytes: int) -> Usage:
    """What so much of a copy costs: each resource is rounded down once."""
    if card is None:
        return Usage(billed_us, egress_bytes)
    cpu = meter.cpu_milli * billed_us * card.cpu_hour_micros // CPU_HOUR
    memory = meter.memory_bytes * billed_us * card.gb_hour_micros // GB_HOUR
    egress = egress_bytes * card.egress_gb_micros // GB
    share = (cpu + memory + egress) * card.provider_share_ppm // 1_000_000 if meter.namespace else 0
    return Usage(billed_us, egress_bytes, cpu, memory, egress, share)


def subtract_usage(one: Usage, other: Usage) -> Usage:
    """What one has more than the other."""
    return Usage(
        one.billed_us - other.billed_us,
        one.egress_bytes - other.egress_bytes,
        one.cpu_micros - other.cpu_micros,
        one.memory_micros - other.memory_micros,
        one.egress_micros - other.egress_micros,
        one.share_micros - other.share_micros,
    )


def decide_stop(customer: Customer) -> dt.datetime | None:
    """When the copies of a customer without credit stop; None: it has some."""
    since = customer.out_of_credit_at
    return since + dt.timedelta(seconds=CREDIT_NOTICE_S) if since else None


def is_more(order: WorkloadOrder, workload: Workload) -> bool:
    """An order that reserves more than the workload does now."""
    return any(
        order.replicas * order.spec[name] > workload.replicas * workload.spec[name]
        for name in ("cpu_milli", "memory_bytes")
    )


def check_credit_left(customer: Customer) -> None:
    """Raises Refusal for a customer whose balance is used up."""
    if stop := decide_stop(customer):
        what = f"your balance is used up, and your copies stop at {stop:%Y-%m-%dT%H:%MZ}"
        raise Refusal("NO_CREDIT", what, "pay, or ask the operator for a higher limit")


def month_of(at: dt.datetime) -> dt.date:
    """The first day of its month, UTC."""
    return dt.date(at.year, at.month, 1)


def decide_month(hour_at: dt.datetime, now: dt.datetime, issued: frozenset[dt.date]) -> dt.date:
    """The month whose invoice an hour is on: its own, else the first from now that is open."""
    month = month_of(hour_at)
    if month in issued:
        month = month_of(now)
    while month in issued:
        month = next_month(month)
    return month


def next_month(month: dt.date) -> dt.date:
    """The first day of the month after."""
    return dt.date(month.year + month.month // 12, month.month % 12 + 1, 1)


def decide_windows(
    meter: Meter,
    due: Mapping[dt.datetime, Due],
    cards: Cards,
    lines: Mapping[LineKey, Usage],
    parts: Mapping[dt.datetime, int],
    issued: frozenset[dt.date],
    now: dt.datetime,
) -> tuple[Meter, list[Window], dict[LineKey, Usage]]:
    """Close hours of a copy: its sums after that, its windows, and the lines that they change.

    A window's amounts are the difference that it makes to its line, so that windows add up to the
    line, and a line is its quantity times its price. `parts`: how many windows these hours have
    already. `issued`: months whose invoice stays as it is; what is late for it is on this month's.
    """
    windows: list[Window] = []
    changed: dict[LineKey, Usage] = {}
    billed_us, counted, sent = meter.billed_us, meter.counted_bytes, meter.egress_bytes
    for hour_at, one in sorted(due.items()):
        billed_us += one.billed_us
        counted = min(counted + one.counted_bytes, COUNTED_MAX_BYTES)
        added = max(min(counted, EGRESS_MAX_BYTES_PER_US * billed_us) - sent, 0)
        sent += added
        if not (one.billed_us or added):
            continue
        month = decide_month(hour_at, now, issued)
        card = find_card(cards, meter.customer_no, hour_at)
        key = (meter.assignment_no, month, card.card_no if card else 0)
        before = changed.get(key) or lines.get(key) or Usage()
        after = price(meter, card, before.billed_us + one.billed_us, before.egress_bytes + added)
        changed[key] = after
        part, usage = parts.get(hour_at, 0) + 1, subtract_usage(after, before)
        windows.append(Window(meter.assignment_no, hour_at, part, month, key[2], usage))
    meter = dataclasses.replace(
        meter, billed_us=billed_us, counted_bytes=counted, egress_bytes=sent
    )
    return meter, windows, changed


def list_entries(meter: Meter, usage: Usage) -> list[tuple[tuple[str, object], int]]:
    """A window in the ledger: (account's kind and whose, micro-units); empty when it is free."""
    charge, share = usage.charge_micros, usage.share_micros
    entries: list[tuple[tuple[str, object], int]] = [
        (("customer", meter.customer_no), -charge),
        (("provider", meter.namespace), share),
        (("fees", None), charge - share),
    ]
    return [entry for entry in entries if entry[1]]


@functools.lru_cache(maxsize=1_024)
def render_standing(standing: Standing) -> pb.Standing:
    """The standing as an agent gets it."""
    status = pb.HostStatus.Value(f"HOST_STATUS_{standing.status.upper()}")
    return pb.Standing(
        status=status, assignable=standing.assignable, reasons=list(standing.reasons)
    )


def render_time(at: dt.datetime | None) -> str | None:
    """RFC 3339 in UTC with milliseconds, or None."""
    if at is None:
        return None
    return at.astimezone(dt.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_host(host: Host) -> dict[str, Any]:
    """A host as the HTTP API shows it."""
    standing = decide_standing(host)
    return {
        "host_id": str(host.host_id),
        "hostname": host.hostname,
        "status": standing.status,
        "status_at": render_time(host.status_at),
        "assignable": standing.assignable,
        "reasons": list(standing.reasons),
        "namespace": host.namespace,
        "namespace_approved": host.namespace_approved,
        "payout_pubkey": host.payout_pubkey,
        "requested_payout_pubkey": host.requested_payout_pubkey,
        "invite_id": host.invite_id,
        "invite_payout_pubkey": host.invite_payout_pubkey,
        "wg_ip": host.wg_ip,
        "wg_pubkey": host.wg_pubkey,
        "arch": host.arch,
        "kernel": host.kernel,
        "agent_version": host.agent_version,
        "cpu_count": host.cpu_count,
        "memory_bytes": host.memory_bytes,
        "disk_bytes": host.disk_bytes,
        "disk_encrypted": host.disk_encrypted,
        "engine_version": host.engine_version,
        "offered_cpu_milli": host.offered_cpu_milli,
        "offered_memory_bytes": host.offered_memory_bytes,
        "takes_secrets": host.takes_secrets,
        "assignments": host.assignments,
        "drained_at": render_time(host.drained_at),
        "labels": host.labels,
        "created_at": render_time(host.created_at),
        "revoked_at": render_time(host.revoked_at),
        "last_heartbeat_at": render_time(host.last_heartbeat_at),
        "heartbeat_interval_s": host.heartbeat_interval_ms / 1000,
    }


def render_invite(invite: Invite) -> dict[str, Any]:
    """An invite as the HTTP API shows it, without its token."""
    return {
        "id": invite.invite_id,
        "state": invite.state,
        "note": invite.note,
        "payout_pubkey": invite.payout_pubkey,
        "wg_ip": invite.wg_ip,
        "wg_pubkey": invite.wg_pubkey,
        "approve_first_wallet": invite.approve_first_wallet,
        "created_by": invite.created_by,
        "created_at": render_time(invite.created_at),
        "expires_at": render_time(invite.expires_at),
        "revoked_at": render_time(invite.revoked_at),
        "consumed_at": render_time(invite.consumed_at),
        "host_id": str(invite.host_id) if invite.host_id else None,
    }


def render_customer(customer: Customer) -> dict[str, Any]:
    """A customer as the HTTP API shows it."""
    return {
        "customer_id": str(customer.customer_id),
        "name": customer.name,
        "namespaces": customer.namespaces,
        "created_by": customer.created_by,
        "created_at": render_time(customer.created_at),
        "balance_micros": customer.balance_micros,
        "credit_limit_micros": customer.credit_limit_micros,
        "out_of_credit_at": render_time(customer.out_of_credit_at),
        "stops_at": render_time(decide_stop(customer)),
    }


def render_key(key: CustomerKey) -> dict[str, Any]:
    """A customer's key as the HTTP API shows it, without its secret."""
    return {
        "key_id": key.key_id,
        "customer_id": str(key.customer_id),
        "note": key.note,
        "created_by": key.created_by,
        "created_at": render_time(key.created_at),
        "revoked_at": render_time(key.revoked_at),
    }


def render_workload(workload: Workload, assignments: Sequence[Assignment]) -> dict[str, Any]:
    """A workload as the HTTP API shows it, with its copies that have not ended."""
    state, reasons = decide_workload(workload, assignments)
    return {
        "workload_id": str(workload.workload_id),
        "namespace": workload.namespace,
        "name": workload.name,
        "state": state,
        "reasons": reasons,
        "revision": workload.revision,
        "replicas": workload.replicas,
        **{key: workload.spec[key] for key in SPEC_KEYS},
        "labels": workload.spec.get("labels", {}),
        "secrets": workload.spec.get("secrets", []),
        "created_by": workload.created_by,
        "created_at": render_time(workload.created_at),
        "changed_at": render_time(workload.changed_at),
        "deleted_at": render_time(workload.deleted_at),
        "assignments": [render_copy(each) for each in assignments],
    }


def render_copy(copy: Assignment) -> dict[str, Any]:
    """An assignment as the HTTP API shows it."""
    first = PORT_FIRST + PORTS_MAX * (copy.port_slot or 0)
    return {
        "assignment_id": str(copy.assignment_id),
        "replica": copy.replica,
        "revision": copy.revision,
        "host_id": str(copy.host_id),
        "state": copy.state,
        "reason": explain_copy(copy) if copy.ended_at is None else copy.reason,
        "restarts": copy.restarts,
        "exit_code": copy.exit_code,
        "endpoints": [
            {"port": port, "address": f"{copy.wg_ip or '127.0.0.1'}:{first + number}"}
            for number, port in enumerate(copy.container_ports)
        ],
        "created_at": render_time(copy.created_at),
        "state_at": render_time(copy.state_at),
        "ended_at": render_time(copy.ended_at),
    }


def render_log(copy: Assignment, log: Log) -> dict[str, Any]:
    """What a copy printed, as the HTTP API shows it."""
    about = {"assignment_id": str(copy.assignment_id), "host_id": str(copy.host_id)}
    return {**about, "replica": copy.replica, **dataclasses.asdict(log)}


def render_row(row: Mapping[str, Any], without: str = "") -> dict[str, Any]:
    """A database row as JSON, times as RFC 3339, without its internal key."""
    shown = {}
    for key, value in row.items():
        if key != without:
            is_time = isinstance(value, dt.datetime)
            text = str(value) if isinstance(value, uuid.UUID) else value
            shown[key] = render_time(value) if is_time else text
    return shown


def render_metrics(samples: Sequence[tuple[str, str, str, Mapping[str, str], float]]) -> str:
    """Prometheus text format 0.0.4; a sample is (name, type, help, labels, value), by name."""
    lines: list[str] = []
    seen: set[str] = set()
    for name, kind, text, labels, value in samples:
        if name not in seen:
            seen.add(name)
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        inner = ",".join(f"{key}={json.dumps(label)}" for key, label in sorted(labels.items()))
        lines.append(f"{name}{'{' + inner + '}' if inner else ''} {value:.12g}")
    return "\n".join(lines) + "\n"


def parse_money(text: str) -> int:
    """An amount like 12.5 in micro-units, exactly; raises Error 2."""
    match = re.fullmatch(r"(-?)([0-9]{1,9})(?:\.([0-9]{1,6}))?", text, re.ASCII)
    if not match:
        what = f"{text!r} is no amount"
        raise Error(what, "give a number with at most 6 decimals, like 12.5", USAGE)
    sign, whole, rest = match.groups()
    micros = int(whole) * 1_000_000 + int((rest or "").ljust(6, "0"))
    return -micros if sign else micros


def render_money(micros: int) -> str:
    """Micro-units as a number with 2 to 6 decimals."""
    text = f"{abs(micros) // 1_000_000}.{abs(micros) % 1_000_000:06}"
    whole, _, rest = text.partition(".")
    return f"{'-' if micros < 0 else ''}{whole}.{rest[:2]}{rest[2:].rstrip('0')}"


def render_quantity(value: int, unit: int) -> str:
    """So many of a unit, with 6 decimals, rounded down."""
    micros = value * 1_000_000 // unit
    return f"{micros // 1_000_000}.{micros % 1_000_000:06}"


def parse_month(text: str, field: str = "month") -> dt.date:
    """A month like 2026-11, as its first day; raises Refusal."""
    if re.fullmatch(MONTH, text):
        return dt.date(int(text[:4]), int(text[5:]), 1)
    raise Refusal("BAD_REQUEST", f"{field} is no month", "give one like 2026-11", field)


def list_bill_rows(bill: Bill) -> Iterator[list[str]]:
    """A bill as rows of text, the head first: each line is one resource of one copy.

    The first three columns are others' words; by the next two a line's windows are found.
    """
    is_invoice = bill.kind == "invoice"
    head = ["workload", "replica", "host", "assignment", "card", "what", "quantity", "unit"]
    yield [*head, "price", "charge", *(() if is_invoice else ("share", "owed"))]
    for line in bill.lines:
        usage = line.usage
        cpu, memory = line.cpu_milli * usage.billed_us, line.memory_bytes * usage.billed_us
        rows = (
            ("cpu", cpu, CPU_HOUR, "cpu-hour", line.cpu_hour_micros, usage.cpu_micros),
            ("memory", memory, GB_HOUR, "GB-hour", line.gb_hour_micros, usage.memory_micros),
            ("egress", usage.egress_bytes, GB, "GB", line.egress_gb_micros, usage.egress_micros),
        )
        which = [line.workload, str(line.replica), line.hostname, str(line.assignment_id)]
        which.append(str(line.card_no))
        for row, share in zip(rows, list_shares(line), strict=True):
            name, value, unit, word, price_micros, charge = row
            if value:
                cells = [*which, name, render_quantity(value, unit), word]
                cells += [render_money(price_micros), render_money(charge)]
                if not is_invoice:
                    cells += [f"{line.provider_share_ppm / 10_000:g} %", render_money(share)]
                yield cells


def explain_windows(bill: Bill) -> str:
    """Where the hours of a line are found."""
    month = f"{bill.month:%Y-%m}"
    words = f"--month {month} --assignment ASSIGNMENT"
    how = f"on its host: sudo openinfra-agent earnings {words}"
    if bill.kind == "invoice":
        how = f"with your key: GET /api/v1/usage?month={month}&assignment_id=ASSIGNMENT"
    return f"The hours of a line, {how}. The operator: cp_server.py usage {words}."


def decide_counters(copy: Counted) -> tuple[dict[str, int], str]:
    """What a host counted of a copy, capped by what is possible; and why that is to be doubted.

    Possible is what is reserved, for as long as it was seen to run, the open hour included; a
    tenth and two minutes more are no reason to doubt a host, which looks once a minute. What was
    sent is also capped each time that a host is heard. And what runs has some memory.
    """
    most = {
        "cpu_ns": copy.cpu_milli * copy.life_us,
        "memory_byte_s": copy.memory_bytes * copy.life_us // 1_000_000,
        "rx_bytes": EGRESS_MAX_BYTES_PER_US * copy.life_us,
        "tx_bytes": EGRESS_MAX_BYTES_PER_US * copy.life_us,
    }
    life_us = copy.life_us * 11 // 10 + COUNTERS_SLACK_US
    doubt = any(getattr(copy, n) * copy.life_us > most[n] * life_us for n in most if copy.life_us)
    doubt = doubt or (copy.egress_bytes is not None and copy.tx_bytes > copy.egress_bytes)
    why = "its host counted more than its billed time allows" if doubt else ""
    if copy.memory_byte_s == 0 and copy.life_us > COUNTERS_NONE_US:
        why = why or "its host counted no memory in all of its billed time"
    return {name: min(getattr(copy, name), cap) for name, cap in most.items()}, why


def render_counted(copy: Counted) -> Row:
    """What a host counted of a copy, as the HTTP API shows it; `life_us`: while it ran so long."""
    counted, why = decide_counters(copy)
    return {
        "assignment_id": str(copy.assignment_id),
        "life_us": copy.life_us,
        **{f"counted_{name}": value for name, value in counted.items()},
        "doubtful": bool(why),
        "note": why,
    }


def list_shares(line: BillLine) -> tuple[int, int, int]:
    """A line's share by resource: each rounded down, and what is left of it to the first ones."""
    usage = line.usage
    amounts = (usage.cpu_micros, usage.memory_micros, usage.egress_micros)
    charge = max(usage.charge_micros, 1)
    shares = [each * usage.share_micros // charge for each in amounts]
    for number, amount in enumerate(amounts):
        more = min(amount - shares[number], usage.share_micros - sum(shares))
        shares[number] += more
    return shares[0], shares[1], shares[2]


def render_state(bill: Bill) -> str:
    """An invoice's number, or whether a bill may change yet."""
    return "preliminary" if bill.is_preliminary else str(bill.number or "final")


def render_bill_csv(bill: Bill, currency: str) -> Iterator[str]:
    """A bill for a spreadsheet (RFC 4180), a line at a time, all quoted; of which bill it is last.

    No word of others begins a formula there.
    """
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    which = ["month", "number", "currency"]
    for row in list_bill_rows(bill):
        words = ["'" + cell if cell[:1] in tuple("=+-@\t\r") else cell for cell in row[:3]]
        writer.writerow([*words, *row[3:], *which])
        which = [f"{bill.month:%Y-%m}", render_state(bill), currency]
        yield out.getvalue()
        out.seek(0)
        out.truncate()


def render_bill_json(bill: Bill, currency: str) -> Row:
    """A bill as the HTTP API has it."""
    return {
        "kind": bill.kind,
        "number": bill.number,
        "issued_at": render_time(bill.issued_at),
        "preliminary": bill.is_preliminary,
        "month": f"{bill.month:%Y-%m}",
        "whose": bill.whose,
        "currency": currency,
        "total_micros": bill.total_micros,
        "lines": [render_bill_line(bill.kind, line) for line in bill.lines],
    }


def render_bill_line(kind: str, line: BillLine) -> Row:
    """A line or window; what the provider gets is on its statement only."""
    shown = {**vars(line), **line.usage._asdict(), "charge_micros": line.usage.charge_micros}
    del shown["usage"]
    if kind == "invoice":
        del shown["provider_share_ppm"], shown["share_micros"]
    if isinstance(line, BillWindow):
        shown["hour_at"] = render_time(line.hour_at)
    return {**shown, "assignment_id": str(line.assignment_id)}


BILL_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 80rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } p { margin: .2rem 0; } .note { color: #8a4b00; }
table { border-collapse: collapse; width: 100%; margin-top: 1.2rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; } td.w, p { white-space: normal; overflow-wrap: anywhere; }
td[data-name=assignment] { font-size: .8em; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
tfoot td { font-weight: 600; border-top: 2px solid #1a1a1a; border-bottom: 0; }
thead { display: table-header-group; } tr { break-inside: avoid; }
@media print {
  body { margin: 0; max-width: none; font-size: 9px; } th, td { padding: .15rem .4rem; }
  tfoot { display: table-row-group; } @page { size: A4 landscape; margin: 12mm; }
}
@media screen and (max-width: 48rem) {
  table, tbody, tr, td, tfoot { display: block; } thead { display: none; }
  tr { border-bottom: 1px solid #ddd; padding: .5rem 0; } tfoot tr { border: 0; }
  td { border: 0; padding: .1rem 0; display: flex; justify-content: space-between; gap: 1rem;
    text-align: right; }
  td::before { content: attr(data-name); color: #666; flex: none; }
}
"""


def render_bill_html(bill: Bill, currency: str) -> Iterator[str]:
    """A bill as a page of its own, without scripts: for a browser, paper and a phone."""
    number = f" {bill.number}" if bill.number else ""
    title = html.escape(f"{bill.kind.capitalize()}{number}, {bill.month:%B %Y}")
    total = render_money(bill.total_micros)
    yield (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{BILL_STYLE}</style><h1>{title}</h1>"
        f"<p>{html.escape(bill.whose)}</p><p>All amounts in {html.escape(currency)}. "
        f"Times are UTC.</p><p><b>Total {total}</b></p>"
    )
    if bill.issued_at:
        yield f"<p>Issued on {bill.issued_at:%Y-%m-%d}.</p>"
    if bill.is_preliminary:
        yield '<p class="note">Preliminary: the month is not over, or not all of it is booked.</p>'
    rows = list_bill_rows(bill)
    head = next(rows)
    classes = [f' class="{BILL_CLASSES.get(each, "n")}"' for each in head]
    yield "<table><thead><tr>"
    yield "".join(f"<th{c}>{each}" for c, each in zip(classes, head, strict=True))
    yield "</thead><tbody>\n"
    cells = (f'<td{c} data-name="{each}">%s</td>' for c, each in zip(classes, head, strict=True))
    line = "<tr>" + "".join(cells) + "\n"
    for row in rows:
        yield line % (*map(html.escape, row[:3]), *row[3:])
    yield (
        f'</tbody><tfoot><tr><td colspan="{len(head) - 1}">Total</td>'
        f'<td class="n">{total}</td></tfoot></table>'
        f"<p>{html.escape(explain_windows(bill))}</p></html>\n"
    )


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns for a terminal, safe for it; the first row is the head."""
    safe = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in safe) for i in range(len(safe[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in safe
    )


# ---------------------------------------------------------------------------------------------
# SQL: the schema by numbered migrations, and every statement by name. Text only.
# ---------------------------------------------------------------------------------------------

# A landed migration is never edited; its checksum is kept in the database. @ROLE@ is the CP's role.
MIGRATIONS: tuple[tuple[int, str, str], ...] = (
    (
        1,
        "invites, hosts, sessions, liveness, namespaces, audit log",
        """
CREATE TABLE cp_state (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  serving_since timestamptz NOT NULL DEFAULT now(),
  alive_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO cp_state DEFAULT VALUES;
COMMENT ON TABLE cp_state IS 'One row: what the control plane knows of its own life';
COMMENT ON COLUMN cp_state.only_row IS 'Always true: there is one row';
COMMENT ON COLUMN cp_state.serving_since IS 'A host''s silence counts from here at the earliest';
COMMENT ON COLUMN cp_state.alive_at IS 'Last sign of life of `serve`; a gap moves serving_since';

CREATE TABLE namespaces (
  namespace_no integer GENERATED ALWAYS AS IDENTITY UNIQUE,
  namespace text PRIMARY KEY CHECK (namespace ~ '^solana:[1-9A-HJ-NP-Za-km-z]{32,44}$'),
  created_at timestamptz NOT NULL DEFAULT now(),
  approved_at timestamptz,
  approved_by text,
  CHECK ((approved_at IS NULL) = (approved_by IS NULL))
);
COMMENT ON TABLE namespaces IS 'Wallets of providers; in one not approved no host gets work';
COMMENT ON COLUMN namespaces.namespace_no IS 'Order of lists';
COMMENT ON COLUMN namespaces.namespace IS '`solana:` and the wallet''s public key, base58';
COMMENT ON COLUMN namespaces.created_at IS 'When an invite or a host named it first';
COMMENT ON COLUMN namespaces.approved_at IS 'When the operator approved it; null: not approved';
COMMENT ON COLUMN namespaces.approved_by IS 'Who approved it: the actor as in audit_log';

CREATE TABLE invites (
  invite_no bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
  invite_id text PRIMARY KEY CHECK (invite_id ~ '^[a-z2-7]{16}$'),
  secret_sha256 bytea NOT NULL CHECK (length(secret_sha256) = 32),
  note text NOT NULL CHECK (length(note) <= 500),
  payout_pubkey text,
  wg_ip inet CHECK (wg_ip << inet '10.77.0.0/16'),
  wg_ip_held boolean NOT NULL,
  wg_pubkey text CHECK (length(wg_pubkey) = 44),
  approve_first_wallet boolean NOT NULL,
  created_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz NOT NULL,
  revoked_at timestamptz,
  consumed_at timestamptz,
  host_id uuid,
  CHECK (expires_at > created_at AND expires_at <= created_at + interval '72 hours'),
  CHECK ((consumed_at IS NULL) = (host_id IS NULL)),
  CHECK (revoked_at IS NULL OR consumed_at IS NULL),
  CHECK (NOT wg_ip_held OR (wg_ip IS NOT NULL AND revoked_at IS NULL AND consumed_at IS NULL)),
  UNIQUE (invite_id, host_id)
);
CREATE UNIQUE INDEX invites_wg_ip_held ON invites (wg_ip) WHERE wg_ip_held;
COMMENT ON TABLE invites IS 'Single-use tokens that make a host, or give a lost one a new secret';
COMMENT ON COLUMN invites.invite_no IS 'Order of lists';
COMMENT ON COLUMN invites.invite_id IS 'Public part of the token, 16 base32 characters';
COMMENT ON COLUMN invites.secret_sha256 IS 'SHA-256 of the token''s secret; the secret is nowhere';
COMMENT ON COLUMN invites.note IS 'For the operator';
COMMENT ON COLUMN invites.payout_pubkey IS 'The wallet that the operator expects; null: none named';
COMMENT ON COLUMN invites.wg_ip IS 'Tunnel address meant for the host; null: none named';
COMMENT ON COLUMN invites.wg_ip_held IS 'The address is kept for this invite now';
COMMENT ON COLUMN invites.wg_pubkey IS 'Only this WireGuard key may redeem it; null: any';
COMMENT ON COLUMN invites.approve_first_wallet IS 'Without a named wallet: approve the first one';
COMMENT ON COLUMN invites.created_by IS 'Who minted it: the actor as in audit_log';
COMMENT ON COLUMN invites.created_at IS 'When it was minted';
COMMENT ON COLUMN invites.expires_at IS 'From then on it cannot be redeemed; at most 72 hours on';
COMMENT ON COLUMN invites.revoked_at IS 'When the operator took it back';
COMMENT ON COLUMN invites.consumed_at IS 'When a host redeemed it; once and for all';
COMMENT ON COLUMN invites.host_id IS 'The host that redeemed it';

CREATE TABLE hosts (
  host_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  host_id uuid NOT NULL UNIQUE,
  invite_id text NOT NULL UNIQUE,
  host_secret_sha256 bytea NOT NULL UNIQUE CHECK (length(host_secret_sha256) = 32),
  wg_ip inet CHECK (wg_ip << inet '10.77.0.0/16' AND wg_ip <> inet '10.77.0.1'),
  wg_pubkey text UNIQUE CHECK (length(wg_pubkey) = 44),
  payout_pubkey text,
  requested_payout_pubkey text CHECK (requested_payout_pubkey <> payout_pubkey),
  namespace text REFERENCES namespaces,
  ever_assigned boolean NOT NULL DEFAULT false,
  status text NOT NULL DEFAULT 'pending' CHECK (
    status IN ('pending', 'online', 'offline', 'paused', 'quarantined', 'revoked')),
  status_at timestamptz NOT NULL DEFAULT now(),
  released_at timestamptz,
  revoked_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  hostname text NOT NULL CHECK (length(hostname) BETWEEN 1 AND 253),
  arch text NOT NULL,
  kernel text NOT NULL,
  agent_version text NOT NULL,
  cpu_count integer NOT NULL CHECK (cpu_count >= 0),
  memory_bytes bigint NOT NULL CHECK (memory_bytes >= 0),
  disk_bytes bigint NOT NULL CHECK (disk_bytes >= 0),
  disk_encrypted boolean NOT NULL,
  FOREIGN KEY (invite_id, host_id) REFERENCES invites (invite_id, host_id)
    DEFERRABLE INITIALLY DEFERRED,
  CHECK (namespace IS NOT DISTINCT FROM 'solana:' || payout_pubkey),
  CHECK ((status = 'revoked') = (revoked_at IS NOT NULL))
);
ALTER TABLE invites ADD FOREIGN KEY (host_id) REFERENCES hosts (host_id)
  DEFERRABLE INITIALLY DEFERRED;
CREATE UNIQUE INDEX hosts_wg_ip ON hosts (wg_ip) WHERE status <> 'revoked';
CREATE INDEX hosts_status ON hosts (status, host_no);
CREATE INDEX hosts_namespace ON hosts (namespace, host_no);
CREATE INDEX hosts_hostname ON hosts (hostname, host_no);
COMMENT ON TABLE hosts IS 'Machines of the fleet; a row changes seldom (see liveness)';
COMMENT ON COLUMN hosts.host_no IS 'Short key for other tables; order of lists';
COMMENT ON COLUMN hosts.host_id IS 'UUID version 4 that the host is known by outside';
COMMENT ON COLUMN hosts.invite_id IS 'The invite that gave it its present secret';
COMMENT ON COLUMN hosts.host_secret_sha256 IS 'SHA-256 of the secret that the agent keeps';
COMMENT ON COLUMN hosts.wg_ip IS 'Its address in the tunnel; null: registered without one (pilot)';
COMMENT ON COLUMN hosts.wg_pubkey IS 'Its WireGuard public key, base64; never a revoked one';
COMMENT ON COLUMN hosts.payout_pubkey IS 'Wallet that its earnings go to; null: none given';
COMMENT ON COLUMN hosts.requested_payout_pubkey IS 'Wallet that it asked for after its first work';
COMMENT ON COLUMN hosts.namespace IS 'Namespace of its wallet';
COMMENT ON COLUMN hosts.ever_assigned IS 'A workload was assigned to it once: its wallet is fixed';
COMMENT ON COLUMN hosts.status IS 'pending, online, offline, paused, quarantined or revoked';
COMMENT ON COLUMN hosts.status_at IS 'When status changed last';
COMMENT ON COLUMN hosts.released_at IS 'When the operator released it from quarantine last';
COMMENT ON COLUMN hosts.revoked_at IS 'When the operator removed it; final';
COMMENT ON COLUMN hosts.created_at IS 'When it registered first';
COMMENT ON COLUMN hosts.hostname IS 'Fact: host name';
COMMENT ON COLUMN hosts.arch IS 'Fact: machine hardware name, as `uname -m`';
COMMENT ON COLUMN hosts.kernel IS 'Fact: kernel release, as `uname -r`';
COMMENT ON COLUMN hosts.agent_version IS 'Fact: version of the agent';
COMMENT ON COLUMN hosts.cpu_count IS 'Fact: logical processors';
COMMENT ON COLUMN hosts.memory_bytes IS 'Fact: physical memory in bytes';
COMMENT ON COLUMN hosts.disk_bytes IS 'Fact: size of the data directory''s file system in bytes';
COMMENT ON COLUMN hosts.disk_encrypted IS 'Fact: the data directory lies on dm-crypt';

CREATE TABLE sessions (
  session_sha256 bytea PRIMARY KEY CHECK (length(session_sha256) = 32),
  host_no integer NOT NULL REFERENCES hosts,
  opened_by text NOT NULL CHECK (opened_by IN ('register', 'resume', 'takeover')),
  started_at timestamptz NOT NULL DEFAULT now(),
  ended_at timestamptz
);
CREATE UNIQUE INDEX sessions_live ON sessions (host_no) WHERE ended_at IS NULL;
CREATE INDEX sessions_host ON sessions (host_no, started_at);
COMMENT ON TABLE sessions IS 'Sessions of agents; a host has at most one that is live';
COMMENT ON COLUMN sessions.session_sha256 IS 'SHA-256 of the session''s 32 bytes';
COMMENT ON COLUMN sessions.host_no IS 'The host';
COMMENT ON COLUMN sessions.opened_by IS 'takeover: a resume that did not know the live session';
COMMENT ON COLUMN sessions.started_at IS 'When it began';
COMMENT ON COLUMN sessions.ended_at IS 'When a newer one, quarantine or revocation ended it';

CREATE TABLE liveness (
  host_no integer PRIMARY KEY REFERENCES hosts,
  last_heartbeat_at timestamptz,
  interval_ms integer NOT NULL CHECK (interval_ms > 0),
  seq bigint NOT NULL DEFAULT 0,
  boot_id uuid
) WITH (fillfactor = 85);
COMMENT ON TABLE liveness IS 'One narrow row a host, rewritten by each heartbeat; no other index';
COMMENT ON COLUMN liveness.host_no IS 'The host';
COMMENT ON COLUMN liveness.last_heartbeat_at IS 'When the last heartbeat was accepted';
COMMENT ON COLUMN liveness.interval_ms IS 'Milliseconds to the next one, as the CP asked';
COMMENT ON COLUMN liveness.seq IS 'The last heartbeat''s number in its session';
COMMENT ON COLUMN liveness.boot_id IS 'The last heartbeat''s boot';

CREATE TABLE audit_log (
  audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at timestamptz NOT NULL DEFAULT now(),
  actor text NOT NULL,
  action text NOT NULL,
  subject text NOT NULL,
  detail jsonb NOT NULL
);
CREATE INDEX audit_log_subject ON audit_log (subject, audit_id);
COMMENT ON TABLE audit_log IS 'Every change that somebody asked for; the CP''s role can only add';
COMMENT ON COLUMN audit_log.audit_id IS 'Order of writing; gaps are rolled-back transactions';
COMMENT ON COLUMN audit_log.at IS 'When, by the database''s clock';
COMMENT ON COLUMN audit_log.actor IS 'jwt:<sub>:<jti>, cli:<user> or host:<host_id>';
COMMENT ON COLUMN audit_log.action IS 'What was done, as noun.verb';
COMMENT ON COLUMN audit_log.subject IS 'Id of the host, invite or namespace';
COMMENT ON COLUMN audit_log.detail IS 'What else is worth knowing; never a secret';

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE TRIGGER invites_final BEFORE UPDATE ON invites FOR EACH ROW
  WHEN (OLD.host_id IS NOT NULL AND NEW.host_id IS DISTINCT FROM OLD.host_id)
  EXECUTE FUNCTION refuse_change('a redeemed invite belongs to one host for good');
CREATE TRIGGER hosts_final BEFORE UPDATE ON hosts FOR EACH ROW
  WHEN (OLD.status = 'revoked')
  EXECUTE FUNCTION refuse_change('a revoked host stays as it is');
CREATE TRIGGER audit_log_final BEFORE UPDATE OR DELETE ON audit_log FOR EACH ROW
  EXECUTE FUNCTION refuse_change('the audit log is append-only');

GRANT SELECT ON ALL TABLES IN SCHEMA public TO @ROLE@;
GRANT UPDATE ON cp_state TO @ROLE@;
GRANT INSERT, UPDATE ON namespaces, invites, hosts, sessions, liveness TO @ROLE@;
GRANT INSERT ON audit_log TO @ROLE@;
""",
    ),
    (
        2,
        "rights by column; what is final stays final; keys that open invites keep",
        """
REVOKE INSERT, UPDATE ON ALL TABLES IN SCHEMA public FROM @ROLE@;
GRANT UPDATE (serving_since, alive_at) ON cp_state TO @ROLE@;
GRANT INSERT (namespace, approved_at, approved_by), UPDATE (approved_at, approved_by)
  ON namespaces TO @ROLE@;
GRANT INSERT (invite_id, secret_sha256, note, payout_pubkey, wg_ip, wg_ip_held, wg_pubkey,
  approve_first_wallet, created_by, expires_at),
  UPDATE (wg_ip_held, revoked_at, consumed_at, host_id) ON invites TO @ROLE@;
GRANT INSERT (host_id, invite_id, host_secret_sha256, wg_ip, wg_pubkey, payout_pubkey, namespace,
  hostname, arch, kernel, agent_version, cpu_count, memory_bytes, disk_bytes, disk_encrypted),
  UPDATE (invite_id, host_secret_sha256, wg_ip, wg_pubkey, payout_pubkey, requested_payout_pubkey,
  namespace, ever_assigned, status, status_at, released_at, revoked_at, hostname, arch, kernel,
  agent_version, cpu_count, memory_bytes, disk_bytes, disk_encrypted) ON hosts TO @ROLE@;
GRANT INSERT (session_sha256, host_no, opened_by), UPDATE (ended_at) ON sessions TO @ROLE@;
GRANT INSERT (host_no, interval_ms), UPDATE (last_heartbeat_at, interval_ms, seq, boot_id)
  ON liveness TO @ROLE@;
GRANT INSERT (actor, action, subject, detail) ON audit_log TO @ROLE@;

DROP TRIGGER invites_final ON invites;
CREATE TRIGGER invites_final BEFORE UPDATE ON invites FOR EACH ROW
  WHEN (OLD.host_id IS NOT NULL OR OLD.revoked_at IS NOT NULL)
  EXECUTE FUNCTION refuse_change('a redeemed or revoked invite stays as it is');
CREATE TRIGGER sessions_final BEFORE UPDATE ON sessions FOR EACH ROW
  WHEN (OLD.ended_at IS NOT NULL)
  EXECUTE FUNCTION refuse_change('a session that ended stays ended');
ALTER TABLE invites ADD CHECK (wg_ip <> inet '10.77.0.1');
CREATE INDEX invites_wg_pubkey_kept ON invites (wg_pubkey)
  WHERE consumed_at IS NULL AND revoked_at IS NULL;
""",
    ),
    (
        3,
        "sessions that ended long ago go away; tables that keep their size",
        """
-- Measured by tests/bench/test_tables.py: half empty pages let all updates stay in their page
-- (HOT), so that the index does not grow; only times change here, so statistics stay good.
ALTER TABLE liveness SET (fillfactor = 50, autovacuum_analyze_scale_factor = 1,
  autovacuum_analyze_threshold = 100000);
CREATE INDEX hosts_namespace_status ON hosts (namespace, status, host_no);

CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;
CREATE FUNCTION prune_sessions(most integer) RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  WITH gone AS (
    DELETE FROM public.sessions WHERE session_sha256 IN (
      SELECT session_sha256 FROM public.sessions
      WHERE ended_at < now() - interval '90 days' ORDER BY ended_at LIMIT most)
    RETURNING 1)
  SELECT count(*)::integer FROM gone
$$;
COMMENT ON FUNCTION prune_sessions IS 'The one way in which the CP''s role may delete anything';
REVOKE ALL ON FUNCTION prune_sessions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION prune_sessions TO @ROLE@;
""",
    ),
    (
        4,
        "ways to what the hub must forget: hosts revoked of late, keys of before",
        """
CREATE INDEX hosts_revoked ON hosts (revoked_at) WHERE revoked_at IS NOT NULL;
CREATE INDEX audit_log_wg_key ON audit_log ((detail->>'before')) WHERE action = 'host.wg_key';
""",
    ),
    (
        5,
        "customers, their namespaces and keys",
        """
CREATE TABLE customers (
  customer_no integer GENERATED ALWAYS AS IDENTITY UNIQUE,
  customer_id uuid PRIMARY KEY,
  name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
  created_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE customers IS 'Who posts workloads, and pays for them';
COMMENT ON COLUMN customers.customer_no IS 'Order of lists';
COMMENT ON COLUMN customers.customer_id IS 'Random id, shown to customer and operator';
COMMENT ON COLUMN customers.name IS 'For people';
COMMENT ON COLUMN customers.created_by IS 'The actor as in audit_log';
COMMENT ON COLUMN customers.created_at IS 'When it was added';

CREATE TABLE customer_namespaces (
  namespace text PRIMARY KEY CHECK (namespace ~ '^[a-z0-9][a-z0-9-]{0,38}[a-z0-9]$'),
  customer_no integer NOT NULL REFERENCES customers (customer_no),
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX customer_namespaces_customer ON customer_namespaces (customer_no);
COMMENT ON TABLE customer_namespaces IS 'Names under which a customer''s workloads and images are';
COMMENT ON COLUMN customer_namespaces.namespace IS 'A DNS label; a provider''s has a colon in it';
COMMENT ON COLUMN customer_namespaces.customer_no IS 'Whose it is, for good';
COMMENT ON COLUMN customer_namespaces.created_at IS 'When it was taken';

CREATE TABLE customer_keys (
  key_no bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
  key_id text PRIMARY KEY CHECK (key_id ~ '^[a-z2-7]{16}$'),
  customer_no integer NOT NULL REFERENCES customers (customer_no),
  secret_sha256 bytea NOT NULL CHECK (length(secret_sha256) = 32),
  note text NOT NULL CHECK (length(note) <= 200),
  created_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  revoked_at timestamptz
);
CREATE INDEX customer_keys_customer ON customer_keys (customer_no, key_no);
COMMENT ON TABLE customer_keys IS 'What a customer proves itself with: oik1_<id>_<secret>';
COMMENT ON COLUMN customer_keys.key_no IS 'Order of lists';
COMMENT ON COLUMN customer_keys.key_id IS 'Public part of the key, 16 base32 characters';
COMMENT ON COLUMN customer_keys.customer_no IS 'Whose it is';
COMMENT ON COLUMN customer_keys.secret_sha256 IS 'SHA-256 of its secret; the secret is nowhere';
COMMENT ON COLUMN customer_keys.note IS 'What it is for';
COMMENT ON COLUMN customer_keys.created_by IS 'The actor as in audit_log';
COMMENT ON COLUMN customer_keys.created_at IS 'When it was made';
COMMENT ON COLUMN customer_keys.revoked_at IS 'When it was taken back, for good; null: it is good';
CREATE TRIGGER customer_keys_final BEFORE UPDATE ON customer_keys FOR EACH ROW
  WHEN (OLD.revoked_at IS NOT NULL)
  EXECUTE FUNCTION refuse_change('a revoked key stays revoked');

GRANT SELECT ON customers, customer_namespaces, customer_keys TO @ROLE@;
GRANT INSERT (customer_id, name, created_by) ON customers TO @ROLE@;
GRANT INSERT (namespace, customer_no) ON customer_namespaces TO @ROLE@;
GRANT INSERT (key_id, customer_no, secret_sha256, note, created_by), UPDATE (revoked_at)
  ON customer_keys TO @ROLE@;
""",
    ),
    (
        6,
        "workloads, assignments, what hosts offer",
        """
CREATE TABLE workloads (
  workload_no bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
  workload_id uuid PRIMARY KEY,
  namespace text NOT NULL REFERENCES customer_namespaces,
  name text NOT NULL CHECK (name ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
  revision integer NOT NULL DEFAULT 1 CHECK (revision > 0),
  replicas integer NOT NULL CHECK (replicas BETWEEN 0 AND 20),
  spec jsonb NOT NULL,
  unplaced_reason text NOT NULL DEFAULT '',
  created_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  changed_at timestamptz NOT NULL DEFAULT now(),
  deleted_at timestamptz
);
CREATE UNIQUE INDEX workloads_name ON workloads (namespace, name) WHERE deleted_at IS NULL;
CREATE INDEX workloads_unplaced ON workloads (workload_no) WHERE unplaced_reason <> '';
CREATE INDEX workloads_namespace ON workloads (namespace, workload_no);
COMMENT ON TABLE workloads IS 'What customers want to run';
COMMENT ON COLUMN workloads.workload_no IS 'Order of lists; short key for other tables';
COMMENT ON COLUMN workloads.workload_id IS 'Random id that customers see';
COMMENT ON COLUMN workloads.namespace IS 'The customer''s namespace that it is in';
COMMENT ON COLUMN workloads.name IS 'Unique in the namespace among those that are not deleted';
COMMENT ON COLUMN workloads.revision IS 'Counts changes of spec; a copy of another one is replaced';
COMMENT ON COLUMN workloads.replicas IS 'How many copies are to run';
COMMENT ON COLUMN workloads.spec IS 'What a copy is made from: image, command, sizes, ports';
COMMENT ON COLUMN workloads.unplaced_reason IS 'Why a replica has no host; empty: each has one';
COMMENT ON COLUMN workloads.created_by IS 'The actor as in audit_log';
COMMENT ON COLUMN workloads.created_at IS 'When it was posted first';
COMMENT ON COLUMN workloads.changed_at IS 'When spec or replicas changed last';
COMMENT ON COLUMN workloads.deleted_at IS 'When the customer deleted it, for good';
CREATE TRIGGER workloads_final BEFORE UPDATE ON workloads FOR EACH ROW
  WHEN (OLD.deleted_at IS NOT NULL AND (OLD.spec, OLD.replicas, OLD.deleted_at)
    IS DISTINCT FROM (NEW.spec, NEW.replicas, NEW.deleted_at))
  EXECUTE FUNCTION refuse_change('a deleted workload stays as it is');

CREATE TABLE assignments (
  assignment_no bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
  assignment_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  workload_no bigint NOT NULL REFERENCES workloads (workload_no),
  revision integer NOT NULL,
  replica integer NOT NULL CHECK (replica >= 0),
  host_no integer NOT NULL REFERENCES hosts,
  spec jsonb NOT NULL,
  cpu_milli integer NOT NULL CHECK (cpu_milli > 0),
  memory_bytes bigint NOT NULL CHECK (memory_bytes > 0),
  port_slot integer CHECK (port_slot BETWEEN 0 AND 1023),
  state text NOT NULL DEFAULT 'assigned' CHECK (state IN ('assigned', 'pulling', 'starting',
    'running', 'waiting', 'finished', 'failed', 'rejected', 'stopping', 'stopped', 'lost')),
  reason text NOT NULL DEFAULT '',
  restarts integer NOT NULL DEFAULT 0,
  exit_code integer,
  created_at timestamptz NOT NULL DEFAULT now(),
  state_at timestamptz NOT NULL DEFAULT now(),
  stop_at timestamptz,
  stop_reason text,
  stop_revision bigint,
  held_until timestamptz,
  ended_at timestamptz,
  CHECK ((stop_at IS NULL) = (stop_reason IS NULL) AND (stop_at IS NULL) = (stop_revision IS NULL)),
  CHECK ((ended_at IS NULL) = (state NOT IN ('rejected', 'stopped', 'lost')))
);
CREATE UNIQUE INDEX assignments_live ON assignments (workload_no, replica) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX assignments_ports ON assignments (host_no, port_slot)
  WHERE ended_at IS NULL AND port_slot IS NOT NULL;
CREATE INDEX assignments_host ON assignments (host_no) WHERE ended_at IS NULL;
CREATE INDEX assignments_workload ON assignments (workload_no, assignment_no);
CREATE INDEX assignments_rejected ON assignments (workload_no, ended_at) WHERE state = 'rejected';
COMMENT ON TABLE assignments IS 'The right of a host to run one copy of a workload, and its end';
COMMENT ON COLUMN assignments.assignment_no IS 'Fencing number: a replica''s later one is higher';
COMMENT ON COLUMN assignments.assignment_id IS 'Random id that host and customer see';
COMMENT ON COLUMN assignments.workload_no IS 'What it is a copy of';
COMMENT ON COLUMN assignments.revision IS 'Revision of the workload that it was made from';
COMMENT ON COLUMN assignments.replica IS 'Which of the copies, from 0; one that lives at a time';
COMMENT ON COLUMN assignments.host_no IS 'Who may run it';
COMMENT ON COLUMN assignments.spec IS 'What it was made from';
COMMENT ON COLUMN assignments.cpu_milli IS 'Reserved thousandths of a processor';
COMMENT ON COLUMN assignments.memory_bytes IS 'Reserved memory in bytes';
COMMENT ON COLUMN assignments.port_slot IS 'Its ports are 20000 + 8 * slot and on; null: none';
COMMENT ON COLUMN assignments.state IS 'What the host said last; lost: its right ended in silence';
COMMENT ON COLUMN assignments.reason IS 'Why it is in that state, from the host';
COMMENT ON COLUMN assignments.restarts IS 'How often the host started it again';
COMMENT ON COLUMN assignments.exit_code IS 'Of its process'' last end; null: none yet';
COMMENT ON COLUMN assignments.created_at IS 'When it got this host';
COMMENT ON COLUMN assignments.state_at IS 'When state changed last';
COMMENT ON COLUMN assignments.stop_at IS 'When the host was to stop it; null: it is to run';
COMMENT ON COLUMN assignments.stop_reason IS 'Why it is to stop';
COMMENT ON COLUMN assignments.stop_revision IS 'The host''s first list without it';
COMMENT ON COLUMN assignments.held_until IS 'The right''s end when heartbeats prolong it no more';
COMMENT ON COLUMN assignments.ended_at IS 'From then on nobody runs it';
CREATE TRIGGER assignments_final BEFORE UPDATE ON assignments FOR EACH ROW
  WHEN (OLD.ended_at IS NOT NULL)
  EXECUTE FUNCTION refuse_change('an assignment that ended stays ended');
CREATE TRIGGER assignments_stop BEFORE UPDATE ON assignments FOR EACH ROW
  WHEN (OLD.stop_at IS NOT NULL AND NEW.stop_at IS DISTINCT FROM OLD.stop_at)
  EXECUTE FUNCTION refuse_change('an assignment that is to stop does not run again');

ALTER TABLE hosts ADD engine_version text NOT NULL DEFAULT '',
  ADD unready text NOT NULL DEFAULT '',
  ADD offered_cpu_milli integer NOT NULL DEFAULT 0 CHECK (offered_cpu_milli >= 0),
  ADD offered_memory_bytes bigint NOT NULL DEFAULT 0 CHECK (offered_memory_bytes >= 0),
  ADD drained_at timestamptz;
COMMENT ON COLUMN hosts.engine_version IS 'Fact: version of its container engine; empty: none';
COMMENT ON COLUMN hosts.unready IS 'Fact: why it can take no workload now; empty: it can';
COMMENT ON COLUMN hosts.offered_cpu_milli IS 'Fact: thousandths of a processor that it lends';
COMMENT ON COLUMN hosts.offered_memory_bytes IS 'Fact: bytes of memory that it lends';
COMMENT ON COLUMN hosts.drained_at IS 'Since when the operator keeps workloads away; null: not';
ALTER TABLE liveness ADD desired_revision bigint NOT NULL DEFAULT 1;
COMMENT ON COLUMN liveness.desired_revision IS 'Changes with the list of what the host is to run';

GRANT SELECT ON workloads, assignments TO @ROLE@;
GRANT INSERT (workload_id, namespace, name, replicas, spec, created_by),
  UPDATE (revision, replicas, spec, unplaced_reason, changed_at, deleted_at) ON workloads TO @ROLE@;
GRANT INSERT (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes, port_slot),
  UPDATE (state, reason, restarts, exit_code, state_at, stop_at, stop_reason, stop_revision,
  held_until, ended_at) ON assignments TO @ROLE@;
GRANT INSERT (engine_version, unready, offered_cpu_milli, offered_memory_bytes),
  UPDATE (engine_version, unready, offered_cpu_milli, offered_memory_bytes, drained_at)
  ON hosts TO @ROLE@;
GRANT UPDATE (desired_revision) ON liveness TO @ROLE@;
""",
    ),
    (
        7,
        "assignments after a restore",
        """
ALTER TABLE cp_state ADD restored_at timestamptz;
COMMENT ON COLUMN cp_state.restored_at IS 'When a backup took the place of this database';
ALTER TABLE assignments ADD restored boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN assignments.restored IS 'From a backup; its host has not said that it has it';
GRANT UPDATE (restored) ON assignments TO @ROLE@;
""",
    ),
    (
        8,
        "sessions, hashed once more",
        """
ALTER TABLE sessions DISABLE TRIGGER sessions_final;
UPDATE sessions SET session_sha256 = sha256(session_sha256);
ALTER TABLE sessions ENABLE TRIGGER sessions_final;
COMMENT ON COLUMN sessions.session_sha256 IS
  'SHA-256 of what the host shows to the registry, the SHA-256 of the session''s 32 bytes';
""",
    ),
    (
        9,
        "labels of hosts",
        """
ALTER TABLE hosts ADD labels jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN hosts.labels IS 'What the operator says of the host, key to value';
GRANT UPDATE (labels) ON hosts TO @ROLE@;
""",
    ),
    (
        10,
        "workloads' secrets",
        """
CREATE EXTENSION IF NOT EXISTS pgcrypto WITH SCHEMA public;
CREATE TABLE workload_secrets (
  workload_no bigint NOT NULL REFERENCES workloads (workload_no),
  revision integer NOT NULL CHECK (revision > 0),
  sealed bytea NOT NULL,
  key_sha256 bytea NOT NULL CHECK (length(key_sha256) = 32),
  PRIMARY KEY (workload_no, revision)
);
COMMENT ON TABLE workload_secrets IS 'Workloads'' secrets, encrypted with a key that is not here';
COMMENT ON COLUMN workload_secrets.workload_no IS 'Whose they are';
COMMENT ON COLUMN workload_secrets.revision IS 'The first with them; later ones have the same';
COMMENT ON COLUMN workload_secrets.sealed IS 'JSON object of names and values, OpenPGP (RFC 4880)';
COMMENT ON COLUMN workload_secrets.key_sha256 IS 'SHA-256 of the key, 64 hex digits of 256 bits';
CREATE FUNCTION secrets_key_sha256() RETURNS bytea LANGUAGE sql STABLE AS $$
  SELECT sha256(convert_to(current_setting('openinfra.secrets_key', true), 'UTF8'))
$$;
COMMENT ON FUNCTION secrets_key_sha256 IS 'Of the key that this connection came with; null: none';
CREATE FUNCTION seal_secrets() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.key_sha256 := public.secrets_key_sha256();
  NEW.sealed := public.pgp_sym_encrypt_bytea(NEW.sealed,
    current_setting('openinfra.secrets_key'), 'cipher-algo=aes256, s2k-mode=1');
  RETURN NEW;
END $$;
COMMENT ON FUNCTION seal_secrets IS 'Nothing is stored as it comes; the key is random: hashed once';
CREATE TRIGGER workload_secrets_seal BEFORE INSERT ON workload_secrets FOR EACH ROW
  EXECUTE FUNCTION seal_secrets();
CREATE FUNCTION open_secrets(no bigint, at integer) RETURNS bytea LANGUAGE plpgsql STABLE AS $$
BEGIN
  RETURN (SELECT public.pgp_sym_decrypt_bytea(sealed,
      current_setting('openinfra.secrets_key', true))
    FROM public.workload_secrets WHERE workload_no = no AND revision <= at
    ORDER BY revision DESC LIMIT 1);
EXCEPTION WHEN external_routine_invocation_exception THEN RETURN NULL;
END $$;
COMMENT ON FUNCTION open_secrets IS 'Those of a revision; null: there are none, or another key is';
CREATE FUNCTION are_secrets_lost(no bigint, at integer) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT coalesce((SELECT key_sha256 <> public.secrets_key_sha256()
    FROM public.workload_secrets WHERE workload_no = no AND revision <= at
    ORDER BY revision DESC LIMIT 1), true)
$$;
COMMENT ON FUNCTION are_secrets_lost IS 'This connection''s key is not theirs, or there are none';
CREATE FUNCTION prune_secrets() RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  WITH needed AS (
    SELECT workload_no, revision FROM public.workloads
    WHERE deleted_at IS NULL AND spec ? 'secrets'
    UNION SELECT workload_no, revision FROM public.assignments
    WHERE ended_at IS NULL AND spec ? 'secrets'
  ), gone AS (
    DELETE FROM public.workload_secrets s WHERE NOT EXISTS (
      SELECT FROM needed n WHERE n.workload_no = s.workload_no AND s.revision = (
        SELECT max(revision) FROM public.workload_secrets
        WHERE workload_no = n.workload_no AND revision <= n.revision))
    RETURNING 1)
  SELECT count(*)::integer FROM gone
$$;
COMMENT ON FUNCTION prune_secrets IS 'Deletes what no workload and no copy that lives has any more';
COMMENT ON FUNCTION prune_sessions IS 'With prune_secrets all that the CP''s role may delete';
REVOKE ALL ON FUNCTION prune_secrets FROM PUBLIC;
GRANT EXECUTE ON FUNCTION prune_secrets TO @ROLE@;
GRANT SELECT, INSERT (workload_no, revision, sealed) ON workload_secrets TO @ROLE@;

COMMENT ON COLUMN workloads.spec IS
  'What a copy is made from: image, command, sizes, ports, names of secrets';
ALTER TABLE hosts ADD takes_secrets boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN hosts.takes_secrets IS 'Fact: its agent knows secrets and keeps them in memory';
GRANT INSERT (takes_secrets), UPDATE (takes_secrets) ON hosts TO @ROLE@;
ALTER TABLE cp_state ADD secrets_key_sha256 bytea;
COMMENT ON COLUMN cp_state.secrets_key_sha256 IS 'Of the key that `serve` had last; null: none';
GRANT UPDATE (secrets_key_sha256) ON cp_state TO @ROLE@;
""",
    ),
    (
        11,
        "usage, rate cards, the ledger, invoices",
        """
ALTER TABLE liveness ADD seen_us bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN liveness.seen_us IS
  'Microseconds that its heartbeats covered so far: the clock of what is billed';

CREATE TABLE usage_hours (
  host_no integer NOT NULL REFERENCES hosts,
  hour_at timestamptz NOT NULL CHECK (date_trunc('hour', hour_at, 'UTC') = hour_at),
  seen_us bigint NOT NULL,
  PRIMARY KEY (host_no, hour_at)
);
CREATE INDEX usage_hours_hour ON usage_hours (hour_at);
COMMENT ON TABLE usage_hours IS 'Where seen_us of hosts with running copies stood at full hours';
COMMENT ON COLUMN usage_hours.host_no IS 'The host';
COMMENT ON COLUMN usage_hours.hour_at IS 'A full hour, UTC';
COMMENT ON COLUMN usage_hours.seen_us IS 'What of it was before that hour';

CREATE TABLE usage_runs (
  run_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  assignment_no bigint NOT NULL REFERENCES assignments (assignment_no),
  host_no integer NOT NULL REFERENCES hosts,
  from_at timestamptz NOT NULL,
  from_us bigint NOT NULL,
  to_at timestamptz,
  to_us bigint CHECK (to_us >= from_us),
  closed_hour timestamptz NOT NULL,
  closed_us bigint NOT NULL CHECK (closed_us >= from_us AND closed_us <= to_us),
  is_closed boolean NOT NULL DEFAULT false,
  CHECK ((to_at IS NULL) = (to_us IS NULL)),
  CHECK (NOT is_closed OR (to_us IS NOT NULL AND closed_us = to_us))
);
CREATE UNIQUE INDEX usage_runs_open ON usage_runs (host_no, assignment_no) WHERE to_us IS NULL;
CREATE INDEX usage_runs_due ON usage_runs (assignment_no) WHERE NOT is_closed;
CREATE INDEX usage_runs_host ON usage_runs (host_no) WHERE NOT is_closed;
COMMENT ON TABLE usage_runs IS 'From when to when a copy ran, as heartbeats of its host said';
COMMENT ON COLUMN usage_runs.run_no IS 'Order of beginning';
COMMENT ON COLUMN usage_runs.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_runs.host_no IS 'Its host';
COMMENT ON COLUMN usage_runs.from_at IS 'The first heartbeat that said that it runs';
COMMENT ON COLUMN usage_runs.from_us IS 'seen_us of the host then';
COMMENT ON COLUMN usage_runs.to_at IS 'The last heartbeat that counts for it; null: it goes on';
COMMENT ON COLUMN usage_runs.to_us IS 'seen_us of the host then';
COMMENT ON COLUMN usage_runs.closed_hour IS 'The hour of the last window that is closed';
COMMENT ON COLUMN usage_runs.closed_us IS 'Up to where of the host''s seen_us windows are closed';
COMMENT ON COLUMN usage_runs.is_closed IS 'It ended, and all of it is in windows';
CREATE FUNCTION note_run() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  UPDATE public.usage_runs r SET to_at = greatest(l.last_heartbeat_at, r.from_at),
    to_us = l.seen_us, is_closed = r.closed_us = l.seen_us
  FROM public.liveness l
  WHERE l.host_no = NEW.host_no AND r.host_no = NEW.host_no
    AND r.assignment_no = NEW.assignment_no AND r.to_us IS NULL;
  IF NEW.state = 'running' AND NEW.stop_at IS NULL AND NEW.ended_at IS NULL
      AND NEW.held_until IS NULL THEN
    INSERT INTO public.usage_runs (assignment_no, host_no, from_at, from_us, closed_hour, closed_us)
    SELECT NEW.assignment_no, NEW.host_no, l.last_heartbeat_at, l.seen_us,
      date_trunc('hour', l.last_heartbeat_at, 'UTC'), l.seen_us
    FROM public.liveness l WHERE l.host_no = NEW.host_no AND l.last_heartbeat_at IS NOT NULL;
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION note_run IS 'The one way in which a run begins and ends';
REVOKE ALL ON FUNCTION note_run FROM PUBLIC;
CREATE TRIGGER assignments_run AFTER UPDATE ON assignments FOR EACH ROW
  WHEN ((OLD.state = 'running' AND OLD.stop_at IS NULL AND OLD.ended_at IS NULL
      AND OLD.held_until IS NULL)
    <> (NEW.state = 'running' AND NEW.stop_at IS NULL AND NEW.ended_at IS NULL
      AND NEW.held_until IS NULL))
  EXECUTE FUNCTION note_run();
INSERT INTO usage_runs (assignment_no, host_no, from_at, from_us, closed_hour, closed_us)
SELECT a.assignment_no, a.host_no, l.last_heartbeat_at, 0,
  date_trunc('hour', l.last_heartbeat_at, 'UTC'), 0
FROM assignments a JOIN liveness l USING (host_no)
WHERE a.state = 'running' AND a.stop_at IS NULL AND a.ended_at IS NULL AND a.held_until IS NULL
  AND l.last_heartbeat_at IS NOT NULL;

CREATE TABLE usage_counters (
  assignment_no bigint NOT NULL REFERENCES assignments (assignment_no),
  boot_id uuid NOT NULL,
  container_id bytea NOT NULL CHECK (length(container_id) = 32),
  cpu_ns bigint NOT NULL CHECK (cpu_ns >= 0),
  memory_byte_s bigint NOT NULL CHECK (memory_byte_s >= 0),
  rx_bytes bigint NOT NULL CHECK (rx_bytes >= 0),
  tx_bytes bigint NOT NULL CHECK (tx_bytes >= 0),
  at timestamptz NOT NULL,
  PRIMARY KEY (assignment_no, boot_id, container_id)
);
COMMENT ON TABLE usage_counters IS 'What hosts counted: it only grows, whatever comes twice';
COMMENT ON COLUMN usage_counters.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_counters.boot_id IS 'The boot of its host';
COMMENT ON COLUMN usage_counters.container_id IS 'The container, of which a copy may have several';
COMMENT ON COLUMN usage_counters.cpu_ns IS 'Nanoseconds of processor time';
COMMENT ON COLUMN usage_counters.memory_byte_s IS 'Bytes of memory times seconds';
COMMENT ON COLUMN usage_counters.rx_bytes IS 'Bytes that it received';
COMMENT ON COLUMN usage_counters.tx_bytes IS 'Bytes that it sent';
COMMENT ON COLUMN usage_counters.at IS 'When any of it grew last';

CREATE TABLE usage_egress (
  assignment_no bigint NOT NULL REFERENCES assignments (assignment_no),
  hour_at timestamptz NOT NULL CHECK (date_trunc('hour', hour_at, 'UTC') = hour_at),
  bytes bigint NOT NULL CHECK (bytes >= 0),
  closed_bytes bigint NOT NULL DEFAULT 0 CHECK (closed_bytes BETWEEN 0 AND bytes),
  PRIMARY KEY (assignment_no, hour_at)
);
CREATE INDEX usage_egress_due ON usage_egress (assignment_no, hour_at) WHERE bytes > closed_bytes;
COMMENT ON TABLE usage_egress IS 'By how much tx_bytes of a copy grew in an hour';
COMMENT ON COLUMN usage_egress.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_egress.hour_at IS 'The hour, UTC, in which the control plane heard of it';
COMMENT ON COLUMN usage_egress.bytes IS 'By how much';
COMMENT ON COLUMN usage_egress.closed_bytes IS 'What of it is in windows';

CREATE TABLE rate_cards (
  card_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  customer_no integer REFERENCES customers (customer_no),
  valid_from timestamptz NOT NULL CHECK (date_trunc('hour', valid_from, 'UTC') = valid_from),
  cpu_hour_micros bigint NOT NULL CHECK (cpu_hour_micros BETWEEN 0 AND 1000000000000),
  gb_hour_micros bigint NOT NULL CHECK (gb_hour_micros BETWEEN 0 AND 1000000000000),
  egress_gb_micros bigint NOT NULL CHECK (egress_gb_micros BETWEEN 0 AND 1000000000000),
  provider_share_ppm integer NOT NULL CHECK (provider_share_ppm BETWEEN 0 AND 1000000),
  created_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE NULLS NOT DISTINCT (customer_no, valid_from)
);
COMMENT ON TABLE rate_cards IS 'Prices; never changed: a later one takes the place of an earlier';
COMMENT ON COLUMN rate_cards.card_no IS 'Order of making';
COMMENT ON COLUMN rate_cards.customer_no IS 'Whose it is; null: of all that have none of their own';
COMMENT ON COLUMN rate_cards.valid_from IS 'The first hour that it is for';
COMMENT ON COLUMN rate_cards.cpu_hour_micros IS 'Micro-units for a reserved processor and an hour';
COMMENT ON COLUMN rate_cards.gb_hour_micros IS 'Micro-units for 10^9 reserved bytes and an hour';
COMMENT ON COLUMN rate_cards.egress_gb_micros IS 'Micro-units for 10^9 bytes that were sent';
COMMENT ON COLUMN rate_cards.provider_share_ppm IS 'Of the charge to the provider, in millionths';
COMMENT ON COLUMN rate_cards.created_by IS 'The actor as in audit_log';
COMMENT ON COLUMN rate_cards.created_at IS 'When it was made';

CREATE SEQUENCE ledger_numbers;
COMMENT ON SEQUENCE ledger_numbers IS 'Numbers of ledger transactions, and of windows';
CREATE TABLE usage_windows (
  window_no bigint PRIMARY KEY,
  assignment_no bigint NOT NULL REFERENCES assignments (assignment_no),
  customer_no integer NOT NULL,
  hour_at timestamptz NOT NULL CHECK (date_trunc('hour', hour_at, 'UTC') = hour_at),
  part integer NOT NULL CHECK (part > 0),
  month date NOT NULL CHECK (extract(day FROM month) = 1),
  card_no integer NOT NULL,
  billed_us bigint NOT NULL CHECK (billed_us >= 0),
  egress_bytes bigint NOT NULL CHECK (egress_bytes >= 0),
  cpu_micros bigint NOT NULL CHECK (cpu_micros >= 0),
  memory_micros bigint NOT NULL CHECK (memory_micros >= 0),
  egress_micros bigint NOT NULL CHECK (egress_micros >= 0),
  share_micros bigint NOT NULL CHECK (share_micros BETWEEN 0
    AND cpu_micros + memory_micros + egress_micros),
  closed_at timestamptz NOT NULL,
  UNIQUE (assignment_no, hour_at, part),
  CHECK (billed_us > 0 OR egress_bytes > 0)
);
CREATE INDEX usage_windows_customer ON usage_windows (customer_no, month, window_no);
ALTER SEQUENCE ledger_numbers OWNED BY usage_windows.window_no;
COMMENT ON TABLE usage_windows IS 'What a copy used in an hour, and what that costs; never changed';
COMMENT ON COLUMN usage_windows.window_no IS 'Its number, and that of its ledger transaction';
COMMENT ON COLUMN usage_windows.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_windows.customer_no IS 'Who pays';
COMMENT ON COLUMN usage_windows.hour_at IS 'The hour, UTC';
COMMENT ON COLUMN usage_windows.part IS '1; what came when the hour was closed already: 2 and on';
COMMENT ON COLUMN usage_windows.month IS 'First day of the month whose invoice it is on';
COMMENT ON COLUMN usage_windows.card_no IS 'The rate card; 0: there was none, so it is free';
COMMENT ON COLUMN usage_windows.billed_us IS 'Microseconds that it ran, as the CP saw it';
COMMENT ON COLUMN usage_windows.egress_bytes IS 'Bytes that it sent';
COMMENT ON COLUMN usage_windows.cpu_micros IS 'Micro-units for its reserved processors';
COMMENT ON COLUMN usage_windows.memory_micros IS 'Micro-units for its reserved memory';
COMMENT ON COLUMN usage_windows.egress_micros IS 'Micro-units for what it sent';
COMMENT ON COLUMN usage_windows.share_micros IS 'Of these three, what the provider gets';
COMMENT ON COLUMN usage_windows.closed_at IS 'When it was closed';

CREATE TABLE usage_lines (
  assignment_no bigint NOT NULL REFERENCES assignments (assignment_no),
  month date NOT NULL,
  card_no integer NOT NULL,
  customer_no integer NOT NULL REFERENCES customers (customer_no),
  namespace text REFERENCES namespaces,
  host_no integer NOT NULL REFERENCES hosts,
  billed_us bigint NOT NULL,
  egress_bytes bigint NOT NULL,
  cpu_micros bigint NOT NULL,
  memory_micros bigint NOT NULL,
  egress_micros bigint NOT NULL,
  share_micros bigint NOT NULL,
  hostname text NOT NULL,
  PRIMARY KEY (assignment_no, month, card_no)
);
CREATE INDEX usage_lines_customer ON usage_lines (customer_no, month);
CREATE INDEX usage_lines_month ON usage_lines (month);
CREATE INDEX usage_lines_provider ON usage_lines (namespace, month);
CREATE INDEX usage_lines_host ON usage_lines (host_no, month);
COMMENT ON TABLE usage_lines IS 'Sums of windows: the lines of invoices and of statements';
COMMENT ON COLUMN usage_lines.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_lines.month IS 'First day of the month';
COMMENT ON COLUMN usage_lines.card_no IS 'The rate card; 0: none';
COMMENT ON COLUMN usage_lines.hostname IS 'The name of its host when the line began';
COMMENT ON COLUMN usage_lines.customer_no IS 'Who pays';
COMMENT ON COLUMN usage_lines.namespace IS 'The provider who earns; null: its host has no wallet';
COMMENT ON COLUMN usage_lines.host_no IS 'The host';
COMMENT ON COLUMN usage_lines.billed_us IS 'Sum over its windows, as all that follows';
COMMENT ON COLUMN usage_lines.egress_bytes IS 'Bytes that it sent';
COMMENT ON COLUMN usage_lines.cpu_micros IS 'Micro-units for processors: rounded down once, here';
COMMENT ON COLUMN usage_lines.memory_micros IS 'Micro-units for memory, rounded down once';
COMMENT ON COLUMN usage_lines.egress_micros IS 'Micro-units for egress, rounded down once';
COMMENT ON COLUMN usage_lines.share_micros IS 'What the provider gets, rounded down once';

CREATE TABLE usage_totals (
  assignment_no bigint PRIMARY KEY REFERENCES assignments (assignment_no),
  billed_us bigint NOT NULL CHECK (billed_us >= 0),
  counted_bytes bigint NOT NULL,
  egress_bytes bigint NOT NULL CHECK (egress_bytes BETWEEN 0 AND counted_bytes)
);
COMMENT ON TABLE usage_totals IS 'Sums over a copy''s whole life, for the limit of its egress';
COMMENT ON COLUMN usage_totals.assignment_no IS 'The copy';
COMMENT ON COLUMN usage_totals.billed_us IS 'Microseconds in its windows';
COMMENT ON COLUMN usage_totals.counted_bytes IS 'Bytes that its host counted in closed hours';
COMMENT ON COLUMN usage_totals.egress_bytes IS 'What of it is in windows; the rest was impossible';

CREATE TABLE ledger_accounts (
  account_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  kind text NOT NULL CHECK (kind IN ('customer', 'provider', 'fees', 'payments')),
  customer_no integer UNIQUE REFERENCES customers (customer_no),
  namespace text UNIQUE REFERENCES namespaces,
  CHECK ((kind = 'customer') = (customer_no IS NOT NULL)),
  CHECK ((kind = 'provider') = (namespace IS NOT NULL))
);
CREATE UNIQUE INDEX ledger_accounts_own ON ledger_accounts (kind)
  WHERE kind IN ('fees', 'payments');
COMMENT ON TABLE ledger_accounts IS 'Whose money it is';
COMMENT ON COLUMN ledger_accounts.account_no IS 'Short key for the entries';
COMMENT ON COLUMN ledger_accounts.kind IS 'fees: the operator''s; payments: from outside';
COMMENT ON COLUMN ledger_accounts.customer_no IS 'Its balance is what it may still use';
COMMENT ON COLUMN ledger_accounts.namespace IS 'Its balance is what the provider is owed';
INSERT INTO ledger_accounts (kind) VALUES ('fees'), ('payments');

CREATE TABLE ledger_transactions (
  transaction_no bigint PRIMARY KEY,
  kind text NOT NULL CHECK (kind IN ('usage', 'payment', 'correction')),
  window_no bigint CHECK (window_no = transaction_no),
  reference text CHECK (length(reference) BETWEEN 1 AND 100),
  note text NOT NULL DEFAULT '',
  actor text NOT NULL,
  at timestamptz NOT NULL,
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  UNIQUE (transaction_no, xid),
  CHECK ((kind = 'usage') = (window_no IS NOT NULL)),
  CHECK ((kind = 'usage') = (reference IS NULL))
);
CREATE UNIQUE INDEX ledger_transactions_reference ON ledger_transactions (reference)
  WHERE reference IS NOT NULL;
COMMENT ON TABLE ledger_transactions IS 'Groups of entries whose sum is zero; never changed';
COMMENT ON COLUMN ledger_transactions.transaction_no IS 'Its number; gaps mean nothing';
COMMENT ON COLUMN ledger_transactions.kind IS 'usage, payment or correction';
COMMENT ON COLUMN ledger_transactions.window_no IS 'The window that it charges for, once';
COMMENT ON COLUMN ledger_transactions.reference IS 'A payment with the same one is the same';
COMMENT ON COLUMN ledger_transactions.note IS 'For people';
COMMENT ON COLUMN ledger_transactions.actor IS 'Who made it, as in audit_log';
COMMENT ON COLUMN ledger_transactions.at IS 'When it was made';
COMMENT ON COLUMN ledger_transactions.xid IS 'Its database transaction, and its entries''';

CREATE TABLE ledger_entries (
  transaction_no bigint NOT NULL,
  account_no integer NOT NULL,
  amount_micros bigint NOT NULL CHECK (amount_micros <> 0),
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  PRIMARY KEY (transaction_no, account_no),
  FOREIGN KEY (transaction_no, xid) REFERENCES ledger_transactions (transaction_no, xid)
    DEFERRABLE INITIALLY DEFERRED
);
COMMENT ON TABLE ledger_entries IS 'Double entry: what an account got (or gave, below zero)';
COMMENT ON COLUMN ledger_entries.transaction_no IS 'The transaction, which comes after its entries';
COMMENT ON COLUMN ledger_entries.account_no IS 'The account';
COMMENT ON COLUMN ledger_entries.amount_micros IS 'Micro-units';
COMMENT ON COLUMN ledger_entries.xid IS 'Its database transaction';
CREATE FUNCTION check_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
SET enable_seqscan = off AS $$  -- row by row, by index: a plan of when it was empty is kept
BEGIN
  IF (SELECT bool_or((SELECT true FROM public.ledger_transactions t
      WHERE t.transaction_no = added.transaction_no)) FROM added) THEN
    RAISE EXCEPTION 'a ledger transaction that is made takes no more entries'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF (SELECT bool_or((SELECT account_no FROM public.ledger_accounts a
      WHERE a.account_no = added.account_no) IS NULL) FROM added) THEN
    RAISE EXCEPTION 'a ledger entry is for an account that is there'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION check_entries IS 'Entries come first; all at once, as a foreign key is slower';
CREATE TRIGGER ledger_entries_open AFTER INSERT ON ledger_entries
  REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION check_entries();
CREATE FUNCTION check_transactions() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
SET enable_seqscan = off AS $$
BEGIN
  IF (SELECT bool_or(coalesce((SELECT count(*) < 2 OR sum(e.amount_micros) <> 0
      FROM public.ledger_entries e WHERE e.transaction_no = t.transaction_no), true))
      FROM added t) THEN
    RAISE EXCEPTION 'a ledger transaction has at least two entries, and their sum is zero'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF (SELECT bool_or((SELECT window_no FROM public.usage_windows w
      WHERE w.window_no = t.window_no) IS NULL) FROM added t WHERE t.window_no IS NOT NULL) THEN
    RAISE EXCEPTION 'a ledger transaction is for a window that is there'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION check_transactions IS 'Then they are all there, and their sum is zero';
CREATE TRIGGER ledger_transactions_sum AFTER INSERT ON ledger_transactions
  REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION check_transactions();

CREATE TABLE invoices (
  invoice_no integer PRIMARY KEY CHECK (invoice_no > 0),
  customer_no integer NOT NULL REFERENCES customers (customer_no),
  month date NOT NULL CHECK (extract(day FROM month) = 1),
  total_micros bigint NOT NULL,
  issued_at timestamptz NOT NULL,
  customer_name text NOT NULL,
  currency text NOT NULL,
  UNIQUE (customer_no, month)
);
COMMENT ON TABLE invoices IS 'What was issued; its lines are the usage_lines of that month';
COMMENT ON COLUMN invoices.invoice_no IS 'From 1, without gaps';
COMMENT ON COLUMN invoices.customer_no IS 'Who pays';
COMMENT ON COLUMN invoices.month IS 'First day of the month';
COMMENT ON COLUMN invoices.total_micros IS 'Sum of its lines';
COMMENT ON COLUMN invoices.issued_at IS 'When; usage that comes later is on a later one';
COMMENT ON COLUMN invoices.customer_name IS 'Its name then';
COMMENT ON COLUMN invoices.currency IS 'What amounts were in then';
CREATE FUNCTION check_invoice() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF NEW.invoice_no <> (SELECT coalesce(max(invoice_no), 0) + 1 FROM public.invoices) THEN
    RAISE EXCEPTION 'invoices are numbered without gaps'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION check_invoice IS 'The next number and no other';
CREATE TRIGGER invoices_number BEFORE INSERT ON invoices FOR EACH ROW
  EXECUTE FUNCTION check_invoice();
CREATE FUNCTION check_month() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM added JOIN public.invoices USING (customer_no, month)) THEN
    RAISE EXCEPTION 'an invoice that was issued stays as it is'
      USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION check_month IS 'What is on an invoice stays';
CREATE TRIGGER usage_lines_new AFTER INSERT ON usage_lines
  REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION check_month();
CREATE TRIGGER usage_lines_more AFTER UPDATE ON usage_lines
  REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION check_month();

DO $$
DECLARE name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['rate_cards', 'usage_windows', 'ledger_accounts',
      'ledger_transactions', 'ledger_entries', 'invoices'] LOOP
    EXECUTE format('CREATE TRIGGER %I BEFORE UPDATE OR DELETE ON %I FOR EACH ROW
      EXECUTE FUNCTION refuse_change(%L)', name || '_final', name, name || ' is append-only');
    EXECUTE format('CREATE TRIGGER %I BEFORE TRUNCATE ON %I FOR EACH STATEMENT
      EXECUTE FUNCTION refuse_change(%L)', name || '_kept', name, name || ' is append-only');
  END LOOP;
END $$;

ALTER TABLE customers ADD credit_limit_micros bigint CHECK (credit_limit_micros >= 0),
  ADD out_of_credit_at timestamptz;
COMMENT ON COLUMN customers.credit_limit_micros IS 'How far below zero it may go; null: no limit';
COMMENT ON COLUMN customers.out_of_credit_at IS 'Since when nothing is left; null: there is';

CREATE FUNCTION prune_hours(before timestamptz, most integer) RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  WITH gone AS (
    DELETE FROM public.usage_hours WHERE (host_no, hour_at) IN (
      SELECT h.host_no, h.hour_at FROM public.usage_hours h
      WHERE h.hour_at < before AND NOT EXISTS (
        SELECT FROM public.usage_runs r
        WHERE r.host_no = h.host_no AND NOT r.is_closed AND r.closed_hour <= h.hour_at)
      ORDER BY h.hour_at LIMIT most)
    RETURNING 1)
  SELECT count(*)::integer FROM gone
$$;
COMMENT ON FUNCTION prune_hours IS 'Deletes marks of hours that are in windows';
REVOKE ALL ON FUNCTION prune_hours FROM PUBLIC;
GRANT EXECUTE ON FUNCTION prune_hours TO @ROLE@;
COMMENT ON FUNCTION prune_sessions IS
  'With prune_secrets and prune_hours all that the CP''s role may delete';

GRANT SELECT ON usage_hours, usage_runs, usage_counters, usage_egress, rate_cards, usage_windows,
  usage_lines, usage_totals, ledger_accounts, ledger_transactions, ledger_entries, invoices
  TO @ROLE@;
GRANT USAGE ON SEQUENCE ledger_numbers TO @ROLE@;
GRANT UPDATE (seen_us) ON liveness TO @ROLE@;
GRANT INSERT, UPDATE (seen_us) ON usage_hours TO @ROLE@;
GRANT UPDATE (closed_hour, closed_us, is_closed) ON usage_runs TO @ROLE@;
GRANT INSERT, UPDATE (cpu_ns, memory_byte_s, rx_bytes, tx_bytes, at) ON usage_counters TO @ROLE@;
GRANT INSERT (assignment_no, hour_at, bytes), UPDATE (bytes, closed_bytes)
  ON usage_egress TO @ROLE@;
GRANT INSERT (customer_no, valid_from, cpu_hour_micros, gb_hour_micros, egress_gb_micros,
  provider_share_ppm, created_by) ON rate_cards TO @ROLE@;
GRANT INSERT ON usage_windows, invoices TO @ROLE@;
GRANT INSERT, UPDATE (billed_us, egress_bytes, cpu_micros, memory_micros, egress_micros,
  share_micros) ON usage_lines TO @ROLE@;
GRANT INSERT, UPDATE (billed_us, counted_bytes, egress_bytes) ON usage_totals TO @ROLE@;
GRANT INSERT (kind, customer_no, namespace) ON ledger_accounts TO @ROLE@;
GRANT INSERT (transaction_no, kind, window_no, reference, note, actor, at)
  ON ledger_transactions TO @ROLE@;
GRANT INSERT (transaction_no, account_no, amount_micros) ON ledger_entries TO @ROLE@;
GRANT UPDATE (credit_limit_micros, out_of_credit_at) ON customers TO @ROLE@;
""",
    ),
    (
        12,
        "sessions of heartbeats, one currency, possible egress, rejected ports",
        """
ALTER TABLE liveness ADD session_at timestamptz;
COMMENT ON COLUMN liveness.session_at IS 'When the session began that seq is of';

ALTER TABLE cp_state ADD currency text;
COMMENT ON COLUMN cp_state.currency IS 'What amounts are in; final once there are any';
UPDATE cp_state SET currency = (SELECT currency FROM invoices ORDER BY invoice_no DESC LIMIT 1);
ALTER TABLE invoices DROP currency;

ALTER TABLE usage_egress ADD since timestamptz NOT NULL DEFAULT now();
UPDATE usage_egress SET since = hour_at;
COMMENT ON COLUMN usage_egress.since IS 'When the copy was last heard of before that';

CREATE TRIGGER usage_lines_final BEFORE DELETE ON usage_lines FOR EACH ROW
  EXECUTE FUNCTION refuse_change('usage_lines are kept');
CREATE TRIGGER usage_lines_whole BEFORE TRUNCATE ON usage_lines FOR EACH STATEMENT
  EXECUTE FUNCTION refuse_change('usage_lines are kept');

CREATE INDEX assignments_refused ON assignments (ended_at)
  WHERE state = 'rejected' AND port_slot IS NOT NULL;

GRANT UPDATE (session_at) ON liveness TO @ROLE@;
GRANT UPDATE (currency) ON cp_state TO @ROLE@;
GRANT INSERT (since) ON usage_egress TO @ROLE@;
""",
    ),
)
SCHEMA_VERSION = MIGRATIONS[-1][0]

SQL_MIGRATIONS_TABLE = """
-- the list of applied migrations
CREATE TABLE IF NOT EXISTS schema_migrations (
  number integer PRIMARY KEY,
  name text NOT NULL,
  sha256 bytea NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE schema_migrations IS 'Migrations that were applied, in their order';
COMMENT ON COLUMN schema_migrations.number IS 'Number of the migration, from 1';
COMMENT ON COLUMN schema_migrations.name IS 'What it brought';
COMMENT ON COLUMN schema_migrations.sha256 IS 'SHA-256 of its text: a landed one is never edited';
COMMENT ON COLUMN schema_migrations.applied_at IS 'When it was applied'
"""

SQL_MIGRATION_LOCK = """
-- one migration at a time, whoever started it
SELECT pg_advisory_xact_lock(7726001)
"""

SQL_MIGRATION_LIST = """
-- what is applied
SELECT number, sha256 FROM schema_migrations ORDER BY number
"""

SQL_MIGRATION_NOTE = """
-- note a migration as applied
INSERT INTO schema_migrations (number, name, sha256) VALUES (%(number)s, %(name)s, %(sha256)s)
"""

SQL_AUDIT = """
-- add a line to the audit log
INSERT INTO audit_log (actor, action, subject, detail)
VALUES (%(actor)s, %(action)s, %(subject)s, %(detail)s)
"""

SQL_AUDIT_ONCE = """
-- the same, but only once an hour for one subject and detail
INSERT INTO audit_log (actor, action, subject, detail)
SELECT %(actor)s, %(action)s, %(subject)s, %(detail)s WHERE NOT EXISTS (
  SELECT 1 FROM audit_log WHERE subject = %(subject)s AND action = %(action)s
    AND detail = %(detail)s AND at > now() - interval '1 hour')
"""

SQL_AUDIT_LIST = """
-- a page of the audit log, newest first
SELECT audit_id, at, actor, action, subject, detail FROM audit_log
WHERE (%(cursor)s = 0 OR audit_id < %(cursor)s)
  AND (%(subject)s::text IS NULL OR subject = %(subject)s)
ORDER BY audit_id DESC LIMIT %(limit)s
"""

SQL_INVITE_FREE_ADDRESS = """
-- let go of an address that only an expired invite still holds
UPDATE invites SET wg_ip_held = false
WHERE wg_ip_held AND wg_ip = %(wg_ip)s AND expires_at <= now()
"""

SQL_INVITE_INSERT = """
-- mint an invite
INSERT INTO invites (invite_id, secret_sha256, note, payout_pubkey, wg_ip, wg_ip_held, wg_pubkey,
  approve_first_wallet, created_by, expires_at)
VALUES (%(invite_id)s, %(secret_sha256)s, %(note)s, %(payout_pubkey)s, %(wg_ip)s,
  %(wg_ip)s::inet IS NOT NULL, %(wg_pubkey)s, %(approve_first_wallet)s, %(actor)s,
  now() + make_interval(hours => %(ttl_hours)s))
"""

INVITE_STATE = """CASE WHEN consumed_at IS NOT NULL THEN 'used'
  WHEN revoked_at IS NOT NULL THEN 'revoked'
  WHEN expires_at <= now() THEN 'expired' ELSE 'open' END"""

INVITE_COLUMNS = f"""invite_no, invite_id, {INVITE_STATE} AS state, note, payout_pubkey,
  host(wg_ip) AS wg_ip, wg_pubkey, approve_first_wallet, created_by, created_at, expires_at,
  revoked_at, consumed_at, host_id"""

SQL_INVITE_GET = f"""
-- one invite
SELECT {INVITE_COLUMNS} FROM invites WHERE invite_id = %(invite_id)s
"""

SQL_INVITE_LIST = f"""
-- a page of invites, newest first
SELECT {INVITE_COLUMNS} FROM invites
WHERE (%(cursor)s = 0 OR invite_no < %(cursor)s)
  AND (%(state)s::text IS NULL OR {INVITE_STATE} = %(state)s)
ORDER BY invite_no DESC LIMIT %(limit)s
"""

SQL_INVITE_REVOKE = """
-- take back an invite that nobody redeemed
UPDATE invites SET revoked_at = now(), wg_ip_held = false
WHERE invite_id = %(invite_id)s AND consumed_at IS NULL AND revoked_at IS NULL
RETURNING invite_id
"""

SQL_INVITE_LOCK = f"""
-- lock an invite for its redemption
SELECT {INVITE_COLUMNS}, secret_sha256 FROM invites WHERE invite_id = %(invite_id)s FOR UPDATE
"""

SQL_INVITE_CONSUME = """
-- redeem an invite, once
UPDATE invites SET consumed_at = now(), host_id = %(host_id)s, wg_ip_held = false
WHERE invite_id = %(invite_id)s AND consumed_at IS NULL AND revoked_at IS NULL
RETURNING invite_id
"""

SQL_NAMESPACE_ADD = """
-- a namespace that somebody named; approving an approved one changes nothing
INSERT INTO namespaces (namespace, approved_at, approved_by)
VALUES (%(namespace)s, CASE WHEN %(approved_by)s::text IS NOT NULL THEN now() END, %(approved_by)s)
ON CONFLICT (namespace) DO UPDATE
  SET approved_at = EXCLUDED.approved_at, approved_by = EXCLUDED.approved_by
  WHERE namespaces.approved_at IS NULL AND EXCLUDED.approved_at IS NOT NULL
RETURNING approved_at
"""

SQL_NAMESPACE_APPROVE = """
-- approve a namespace that is known
UPDATE namespaces SET approved_at = now(), approved_by = %(actor)s
WHERE namespace = %(namespace)s AND approved_at IS NULL RETURNING namespace
"""

SQL_NAMESPACE_LIST = """
-- a page of namespaces with their hosts counted
SELECT n.namespace_no, n.namespace, n.created_at, n.approved_at, n.approved_by,
  (SELECT count(*) FROM hosts h WHERE h.namespace = n.namespace AND h.status <> 'revoked') AS hosts
FROM namespaces n
WHERE n.namespace_no > %(cursor)s
  AND (%(namespace)s::text IS NULL OR n.namespace = %(namespace)s)
ORDER BY n.namespace_no LIMIT %(limit)s
"""

SQL_CLAIMANTS = """
-- lock the hosts that a registration touches, in one order for all
SELECT host_no, host_id, status,
  host_secret_sha256 = %(host_secret_sha256)s AS by_secret,
  coalesce(wg_pubkey = %(wg_pubkey)s, false) AS by_key,
  coalesce(wg_ip = %(wg_ip)s AND status <> 'revoked', false) AS by_address
FROM hosts WHERE host_secret_sha256 = %(host_secret_sha256)s OR wg_pubkey = %(wg_pubkey)s
  OR (wg_ip = %(wg_ip)s AND status <> 'revoked')
ORDER BY host_no FOR UPDATE
"""

SQL_INVITE_KEPT = """
-- what open invites other than this one keep: their key, their address
SELECT coalesce(wg_pubkey = %(wg_pubkey)s, false) AS key,
  coalesce(wg_ip_held AND wg_ip = %(wg_ip)s, false) AS address
FROM invites WHERE consumed_at IS NULL AND revoked_at IS NULL AND expires_at > now()
  AND invite_id <> %(invite_id)s AND (wg_pubkey = %(wg_pubkey)s OR wg_ip_held AND wg_ip = %(wg_ip)s)
"""

SQL_HOST_INSERT = """
-- a new host
INSERT INTO hosts (host_id, invite_id, host_secret_sha256, wg_ip, wg_pubkey, payout_pubkey,
  namespace, hostname, arch, kernel, agent_version, cpu_count, memory_bytes, disk_bytes,
  disk_encrypted, engine_version, unready, offered_cpu_milli, offered_memory_bytes, takes_secrets)
VALUES (%(host_id)s, %(invite_id)s, %(host_secret_sha256)s, %(wg_ip)s, %(wg_pubkey)s,
  %(payout_pubkey)s, %(namespace)s, %(hostname)s, %(arch)s, %(kernel)s, %(agent_version)s,
  %(cpu_count)s, %(memory_bytes)s, %(disk_bytes)s, %(disk_encrypted)s, %(engine_version)s,
  %(unready)s, %(offered_cpu_milli)s, %(offered_memory_bytes)s, %(takes_secrets)s)
RETURNING host_no
"""

SQL_LIVENESS_INSERT = """
-- the liveness row of a new host
INSERT INTO liveness (host_no, interval_ms) VALUES (%(host_no)s, %(interval_ms)s)
"""

SQL_HOST_REKEY = """
-- a new secret for a host that lost its identity; its earnings and its id stay
UPDATE hosts h SET invite_id = %(invite_id)s, host_secret_sha256 = %(host_secret_sha256)s,
  wg_ip = %(wg_ip)s, wg_pubkey = %(wg_pubkey)s
FROM hosts before WHERE before.host_no = h.host_no AND h.host_no = %(host_no)s
  AND h.status <> 'revoked' RETURNING before.wg_pubkey
"""

SQL_HOST_WALLET = """
-- the wallet of a host, and the one that it may not have any more
UPDATE hosts SET payout_pubkey = %(payout_pubkey)s, namespace = %(namespace)s,
  requested_payout_pubkey = %(requested)s
WHERE host_no = %(host_no)s AND (payout_pubkey, requested_payout_pubkey)
  IS DISTINCT FROM (%(payout_pubkey)s, %(requested)s::text)
RETURNING host_no
"""

SQL_HOST_KEY = """
-- another WireGuard key for a host
UPDATE hosts SET wg_pubkey = %(wg_pubkey)s
WHERE host_no = %(host_no)s AND wg_pubkey IS DISTINCT FROM %(wg_pubkey)s RETURNING host_no
"""

SQL_HOST_FACTS = """
-- what a host says about its machine
UPDATE hosts SET hostname = %(hostname)s, arch = %(arch)s, kernel = %(kernel)s,
  agent_version = %(agent_version)s, cpu_count = %(cpu_count)s, memory_bytes = %(memory_bytes)s,
  disk_bytes = %(disk_bytes)s, disk_encrypted = %(disk_encrypted)s,
  engine_version = %(engine_version)s, unready = %(unready)s,
  offered_cpu_milli = %(offered_cpu_milli)s, offered_memory_bytes = %(offered_memory_bytes)s,
  takes_secrets = %(takes_secrets)s
WHERE host_no = %(host_no)s AND status <> 'revoked' AND (hostname, arch, kernel, agent_version,
  cpu_count, memory_bytes, disk_bytes, disk_encrypted, engine_version, unready, offered_cpu_milli,
  offered_memory_bytes, takes_secrets) IS DISTINCT FROM (
  %(hostname)s, %(arch)s, %(kernel)s, %(agent_version)s,
  %(cpu_count)s::integer, %(memory_bytes)s::bigint, %(disk_bytes)s::bigint, %(disk_encrypted)s,
  %(engine_version)s, %(unready)s, %(offered_cpu_milli)s::integer,
  %(offered_memory_bytes)s::bigint, %(takes_secrets)s)
"""

HOST_COLUMNS = """h.host_no, h.host_id, h.status, h.status_at, h.invite_id,
  i.payout_pubkey AS invite_payout_pubkey, h.payout_pubkey, h.requested_payout_pubkey,
  h.namespace, coalesce(n.approved_at IS NOT NULL, false) AS namespace_approved, h.ever_assigned,
  host(h.wg_ip) AS wg_ip, h.wg_pubkey, h.hostname, h.arch, h.kernel, h.agent_version, h.cpu_count,
  h.memory_bytes, h.disk_bytes, h.disk_encrypted, h.engine_version, h.unready,
  h.offered_cpu_milli, h.offered_memory_bytes, h.takes_secrets, h.drained_at, h.labels,
  (SELECT count(*) FROM assignments a
    WHERE a.host_no = h.host_no AND a.ended_at IS NULL
      AND a.state NOT IN ('finished', 'failed')) AS assignments, h.created_at, h.revoked_at,
  l.last_heartbeat_at, l.interval_ms AS heartbeat_interval_ms"""

HOST_JOINS = """JOIN invites i ON i.invite_id = h.invite_id
  JOIN liveness l ON l.host_no = h.host_no LEFT JOIN namespaces n ON n.namespace = h.namespace"""

HOST_TABLES = f"hosts h {HOST_JOINS}"

SQL_HOST_GET = f"""
-- one host
SELECT {HOST_COLUMNS} FROM {HOST_TABLES} WHERE h.host_id = %(host_id)s
"""

SQL_HOST_LOCK_BY_SECRET = f"""
-- lock the host that has this secret
SELECT {HOST_COLUMNS} FROM {HOST_TABLES}
WHERE h.host_secret_sha256 = %(host_secret_sha256)s FOR UPDATE OF h
"""

# The filters of SQL_HOST_LIST, each added only when it is asked for, so that its index is used.
HOST_LIST_FILTERS = {
    "status": "AND h.status = %(status)s",
    "namespace": "AND h.namespace = %(namespace)s",
    "hostname": "AND h.hostname = %(hostname)s",
}

SQL_HOST_LIST = f"""
-- a page of hosts in the order of registration: the page first, then what is joined to its rows
SELECT {HOST_COLUMNS} FROM (
  SELECT * FROM hosts h WHERE h.host_no > %(cursor)s
  {{filters}}
  ORDER BY h.host_no LIMIT %(limit)s
) h {HOST_JOINS}
ORDER BY h.host_no
"""

SQL_HOST_REVOKE = """
-- remove a host for good
UPDATE hosts SET status = 'revoked', status_at = now(), revoked_at = now()
WHERE host_id = %(host_id)s AND status <> 'revoked' RETURNING host_no
"""

SQL_HOST_RELEASE = """
-- release a host from quarantine; its next heartbeat makes it online
UPDATE hosts SET status = 'offline', status_at = now(), released_at = now()
WHERE host_id = %(host_id)s AND status = 'quarantined' RETURNING host_no
"""

SQL_HOST_DRAIN = """
-- give a host no more work, and take what it has elsewhere
UPDATE hosts SET drained_at = now()
WHERE host_id = %(host_id)s AND drained_at IS NULL AND status <> 'revoked' RETURNING host_no
"""

SQL_HOST_UNDRAIN = """
-- a host may have work again
UPDATE hosts SET drained_at = NULL
WHERE host_id = %(host_id)s AND drained_at IS NOT NULL AND status <> 'revoked' RETURNING host_no
"""

SQL_HOST_LABEL = """
-- say what a host is
UPDATE hosts SET labels = %(labels)s
WHERE host_id = %(host_id)s AND labels <> %(labels)s AND status <> 'revoked' RETURNING host_no
"""

SQL_HOST_QUARANTINE = """
-- no session for this host until the operator clears it
UPDATE hosts SET status = 'quarantined', status_at = now()
WHERE host_no = %(host_no)s AND status NOT IN ('quarantined', 'revoked') RETURNING host_no
"""

SQL_SESSION_FIND = """
-- whose session is this, and is it live
SELECT host_no, ended_at IS NULL AS live FROM sessions WHERE session_sha256 = %(session_sha256)s
"""

SQL_SESSION_LIVE = """
-- a host's live session; has the asked one ended; its sessions and takeovers of late
SELECT
  (SELECT session_sha256 FROM sessions
   WHERE host_no = %(host_no)s AND ended_at IS NULL) AS session_sha256,
  EXISTS (SELECT 1 FROM sessions WHERE host_no = %(host_no)s AND session_sha256 = %(asked)s
     AND ended_at IS NOT NULL) AS ended,
  count(*) FILTER (WHERE s.opened_by = 'takeover'
    AND s.started_at > coalesce(h.released_at, '-infinity')) AS takeovers,
  count(*) AS opened
FROM sessions s JOIN hosts h USING (host_no)
WHERE s.host_no = %(host_no)s AND s.started_at > now() - make_interval(secs => %(window_s)s)
"""

SQL_HOST_CHANGES = """
-- how often a host changed its wallet or key in the last day
SELECT count(*) AS changes FROM audit_log WHERE subject = %(host_id)s
  AND action IN ('host.wallet', 'host.wg_key') AND at > now() - interval '1 day'
"""

SQL_SESSION_END = """
-- end a host's live session
UPDATE sessions SET ended_at = now() WHERE host_no = %(host_no)s AND ended_at IS NULL
"""

SQL_SESSION_OPEN = """
-- open a session
INSERT INTO sessions (session_sha256, host_no, opened_by)
VALUES (%(session_sha256)s, %(host_no)s, %(opened_by)s)
"""

SQL_SESSION_AGAIN = """
-- a session that its host asks for again: it counts its heartbeats from 1 again
UPDATE liveness l SET session_at = NULL FROM sessions s WHERE l.host_no = s.host_no
  AND s.session_sha256 = %(session_sha256)s AND l.session_at = s.started_at
"""

# What `decide_reasons` finds nothing in, once a host is online; most hosts of a fleet are so.
HOST_IS_PLAIN = """h.payout_pubkey IS NOT NULL AND h.requested_payout_pubkey IS NULL
    AND n.approved_at IS NOT NULL AND h.unready = '' AND h.drained_at IS NULL"""

# What a heartbeat adds to the time in which its host was seen.
SEEN_US = """coalesce(least(greatest(
      (extract(epoch FROM {at} - {before}.last_heartbeat_at) * 1000000)::bigint, 0),
      %(intervals)s * 1000 * {before}.interval_ms::bigint), 0)"""

# That a heartbeat is older than the last one, which was of the same session.
IS_LATE = "(good.seq < b.seq AND good.started_at = b.session_at)"

SQL_HEARTBEATS = f"""
-- accept a batch of heartbeats: liveness, the time that they cover and where it stood at a full
-- hour, status; after a boot nothing runs until the host says so. One that is missing was refused.
-- Late is one with a smaller number than the last of its session. The last of all may be of the
-- session before, committed after this one was opened: by that none is late
WITH beat AS (
  SELECT * FROM unnest(%(session_sha256)s::bytea[], %(peer)s::inet[], %(interval_ms)s::integer[],
    %(seq)s::bigint[], %(boot_id)s::uuid[], %(status)s::text[]) WITH ORDINALITY
    AS t (session_sha256, peer, interval_ms, seq, boot_id, status, number)
), good AS (
  SELECT beat.*, s.host_no, s.started_at, h.host_id, h.status AS old_status,
    {HOST_IS_PLAIN} AS is_plain FROM beat
  JOIN sessions s ON s.session_sha256 = beat.session_sha256 AND s.ended_at IS NULL
  JOIN hosts h ON h.host_no = s.host_no
  LEFT JOIN namespaces n ON n.namespace = h.namespace
  WHERE h.status NOT IN ('quarantined', 'revoked')
    AND (NOT %(peer_check)s OR h.wg_ip = beat.peer)
), alive AS (
  UPDATE liveness l SET last_heartbeat_at = now(), interval_ms = good.interval_ms,
    seq = CASE WHEN {IS_LATE} THEN b.seq ELSE good.seq END, session_at = good.started_at,
    boot_id = good.boot_id, seen_us = l.seen_us + {SEEN_US.format(before="l", at="now()")}
  FROM good JOIN liveness b USING (host_no) WHERE l.host_no = good.host_no
  RETURNING l.host_no, l.desired_revision, b.last_heartbeat_at, b.interval_ms, b.seen_us,
    b.boot_id <> good.boot_id AS is_other_boot, {IS_LATE} AS is_late
), marked AS (
  INSERT INTO usage_hours (host_no, hour_at, seen_us)
  SELECT b.host_no, h.hour_at, b.seen_us + {SEEN_US.format(before="b", at="h.hour_at")}
  FROM alive b, LATERAL (SELECT date_trunc('hour', now(), 'UTC') AS hour_at UNION
    SELECT date_trunc('hour', b.last_heartbeat_at, 'UTC') + interval '1 hour') h
  WHERE b.last_heartbeat_at < date_trunc('hour', now(), 'UTC') AND EXISTS (
    SELECT FROM usage_runs r WHERE r.host_no = b.host_no AND r.to_us IS NULL)
  ON CONFLICT (host_no, hour_at) DO UPDATE SET seen_us = EXCLUDED.seen_us
), rebooted AS (
  UPDATE assignments a SET state = 'starting', reason = 'its host was started again',
    state_at = now()
  FROM alive WHERE a.host_no = alive.host_no AND alive.is_other_boot AND a.state = 'running'
    AND a.ended_at IS NULL AND a.held_until IS NULL
), flipped AS (
  UPDATE hosts h SET status = good.status, status_at = now()
  FROM good WHERE h.host_no = good.host_no AND good.status <> good.old_status
    AND h.status NOT IN ('quarantined', 'revoked')
)
SELECT number, host_no, old_status, is_plain AND status = 'online' AS is_plain, desired_revision,
  coalesce(is_late, false) AS is_late,
  CASE WHEN status <> old_status THEN host_id END AS flipped_host_id
FROM good JOIN alive USING (host_no)
"""

SQL_HEARTBEAT_HOSTS = f"""
-- the hosts of a batch whose standing has something to say
SELECT {HOST_COLUMNS} FROM {HOST_TABLES} WHERE h.host_no = ANY(%(host_nos)s)
"""

SQL_HEARTBEAT_WHY = """
-- why the heartbeats of these sessions were not accepted
SELECT s.session_sha256, s.ended_at, h.status, host(h.wg_ip) AS wg_ip, EXISTS (
  SELECT 1 FROM sessions n WHERE n.host_no = s.host_no AND n.ended_at IS NULL) AS superseded
FROM sessions s JOIN hosts h USING (host_no) WHERE s.session_sha256 = ANY(%(sessions)s)
"""

SQL_PEERS_WANTED = """
-- a page of the peers that the hub must have
SELECT host_no, wg_pubkey AS key, host(wg_ip) AS ip, status IN ('online', 'paused') AS is_up
FROM hosts WHERE host_no > %(cursor)s AND status <> 'revoked' AND wg_ip IS NOT NULL
  AND wg_pubkey IS NOT NULL
ORDER BY host_no LIMIT %(limit)s
"""

SQL_PEERS_LOST = """
-- of these keys, which are or were a revoked host's, and which are a host's of before
SELECT wg_pubkey AS key, 'revoked' AS state FROM hosts
WHERE wg_pubkey = ANY(%(keys)s) AND status = 'revoked'
UNION ALL
SELECT a.detail->>'before', CASE WHEN h.status = 'revoked' THEN 'revoked' ELSE 'former' END
FROM audit_log a JOIN hosts h ON h.host_id = a.subject::uuid
WHERE a.action = 'host.wg_key' AND a.detail->>'before' = ANY(%(keys)s)
ORDER BY state
"""

SQL_PEERS_REVOKED = """
-- the keys of hosts that were revoked of late, by whatever door
SELECT wg_pubkey AS key FROM hosts
WHERE revoked_at > now() - make_interval(secs => %(window_s)s) AND wg_pubkey IS NOT NULL
"""

CUSTOMER_COLUMNS = """c.customer_no, c.customer_id, c.name, ARRAY(
    SELECT n.namespace FROM customer_namespaces n WHERE n.customer_no = c.customer_no
    ORDER BY n.namespace) AS namespaces, c.created_by, c.created_at, c.credit_limit_micros,
  c.out_of_credit_at"""

SQL_CUSTOMER_INSERT = """
-- a new customer
INSERT INTO customers (customer_id, name, created_by) VALUES (%(customer_id)s, %(name)s, %(actor)s)
RETURNING customer_no
"""

SQL_CUSTOMER_NAMESPACE_INSERT = """
-- a namespace of a customer, unless somebody has it
INSERT INTO customer_namespaces (namespace, customer_no) VALUES (%(namespace)s, %(customer_no)s)
ON CONFLICT DO NOTHING
"""

SQL_CUSTOMER_LIST = f"""
-- a page of customers, or one
SELECT {CUSTOMER_COLUMNS} FROM customers c
WHERE c.customer_no > %(cursor)s
  AND (%(customer_id)s::uuid IS NULL OR c.customer_id = %(customer_id)s)
ORDER BY c.customer_no LIMIT %(limit)s
"""

SQL_CUSTOMER_LOCK = """
-- one new key or namespace of a customer at a time, so that they can be counted
SELECT pg_advisory_xact_lock(7726002, %(customer_no)s)
"""

SQL_KEY_COUNT = """
-- a customer's keys that are good
SELECT count(*) AS keys FROM customer_keys
WHERE customer_no = %(customer_no)s AND revoked_at IS NULL
"""

KEY_COLUMNS = """k.key_no, k.key_id, c.customer_id, k.note, k.created_by, k.created_at,
  k.revoked_at"""

SQL_KEY_INSERT = """
-- a new key of a customer
INSERT INTO customer_keys (key_id, customer_no, secret_sha256, note, created_by)
VALUES (%(key_id)s, %(customer_no)s, %(secret_sha256)s, %(note)s, %(actor)s)
"""

SQL_KEY_LIST = f"""
-- a page of a customer's keys, newest first; or one key
SELECT {KEY_COLUMNS} FROM customer_keys k JOIN customers c USING (customer_no)
WHERE (%(cursor)s = 0 OR k.key_no < %(cursor)s)
  AND (%(customer_id)s::uuid IS NULL OR c.customer_id = %(customer_id)s)
  AND (%(key_id)s::text IS NULL OR k.key_id = %(key_id)s)
ORDER BY k.key_no DESC LIMIT %(limit)s
"""

SQL_KEY_REVOKE = """
-- take a key back
UPDATE customer_keys SET revoked_at = now() WHERE key_id = %(key_id)s AND revoked_at IS NULL
"""

SQL_KEY_FIND = f"""
-- whose key this is, unless it was revoked
SELECT k.secret_sha256, {CUSTOMER_COLUMNS} FROM customer_keys k JOIN customers c USING (customer_no)
WHERE k.key_id = %(key_id)s AND k.revoked_at IS NULL
"""

WORKLOAD_COLUMNS = """w.workload_no, w.workload_id, w.namespace, w.name, w.revision, w.replicas,
  w.spec, w.unplaced_reason, w.created_by, w.created_at, w.changed_at, w.deleted_at,
  w.spec ? 'secrets' AND are_secrets_lost(w.workload_no, w.revision) AS secrets_lost"""

SQL_WORKLOAD_LOCK = f"""
-- the workload of this name, for a change
SELECT {WORKLOAD_COLUMNS} FROM workloads w
WHERE w.namespace = %(namespace)s AND w.name = %(name)s AND w.deleted_at IS NULL FOR UPDATE
"""

SQL_WORKLOAD_COUNT = """
-- a customer's workloads
SELECT count(*) AS workloads FROM workloads JOIN customer_namespaces USING (namespace)
WHERE customer_no = %(customer_no)s AND deleted_at IS NULL
"""

SQL_WORKLOAD_INSERT = """
-- a new workload
INSERT INTO workloads (workload_id, namespace, name, replicas, spec, created_by)
VALUES (%(workload_id)s, %(namespace)s, %(name)s, %(replicas)s, %(spec)s, %(actor)s)
RETURNING workload_no, revision
"""

SQL_WORKLOAD_CHANGE = """
-- another spec or secret is another revision; another count of replicas alone is not
UPDATE workloads SET replicas = %(replicas)s, spec = %(spec)s, changed_at = now(),
  revision = revision + CASE WHEN spec = %(spec)s::jsonb AND NOT %(is_secret)s THEN 0 ELSE 1 END
WHERE workload_no = %(workload_no)s RETURNING workload_no, revision
"""

SQL_SECRETS_OPEN = """
-- the secrets of a revision, to compare with those of an order
SELECT open_secrets(%(workload_no)s, %(revision)s) AS secrets
"""

SQL_SECRETS_INSERT = """
-- the secrets of a revision, as they come: a trigger encrypts them
COPY workload_secrets (workload_no, revision, sealed) FROM STDIN (FORMAT binary)
"""

SQL_SECRETS_PRUNE = """
-- delete the secrets of what is gone
SELECT prune_secrets() AS gone
"""

SQL_SECRETS_KEY = """
-- with another key than the last time the hosts get their lists again: secrets were withheld
WITH other AS (
  UPDATE cp_state SET secrets_key_sha256 = secrets_key_sha256()
  WHERE secrets_key_sha256 IS DISTINCT FROM secrets_key_sha256() RETURNING only_row
)
UPDATE liveness SET desired_revision = desired_revision + 1
WHERE EXISTS (SELECT FROM other) AND host_no IN (
  SELECT host_no FROM assignments WHERE ended_at IS NULL AND spec ? 'secrets')
"""

SQL_SECRETS_LOST = """
-- how many workloads have secrets that cannot be read with this connection's key
SELECT count(*) AS workloads FROM workloads
WHERE deleted_at IS NULL AND spec ? 'secrets' AND are_secrets_lost(workload_no, revision)
"""

SQL_WORKLOAD_DELETE = """
-- delete a workload; its copies end by themselves
UPDATE workloads SET deleted_at = now() WHERE workload_no = %(workload_no)s AND deleted_at IS NULL
"""

SQL_WORKLOAD_LIST = f"""
-- a page of workloads, newest first: a customer's, or all
SELECT {WORKLOAD_COLUMNS} FROM workloads w JOIN customer_namespaces n USING (namespace)
WHERE (%(cursor)s = 0 OR w.workload_no < %(cursor)s)
  AND (%(customer_no)s::integer IS NULL OR n.customer_no = %(customer_no)s)
  AND (%(workload_id)s::uuid IS NULL OR w.workload_id = %(workload_id)s)
  AND (%(namespace)s::text IS NULL OR w.namespace = %(namespace)s)
  AND (%(name)s::text IS NULL OR w.name = %(name)s)
  AND (%(deleted)s OR w.deleted_at IS NULL OR w.workload_id = %(workload_id)s)
ORDER BY w.workload_no DESC LIMIT %(limit)s
"""

SQL_WORKLOAD_UNPLACED = """
-- say why a replica has no host, where that changed; nothing of workloads that are not named,
-- and as before of those that were left for the next round
WITH due AS (
  SELECT * FROM unnest(%(workload_nos)s::bigint[], %(reasons)s::text[]) AS t (workload_no, reason)
  UNION ALL SELECT workload_no, '' FROM workloads
  WHERE unplaced_reason <> '' AND workload_no <> ALL(%(workload_nos)s)
    AND workload_no <> ALL(%(left)s)
)
UPDATE workloads w SET unplaced_reason = due.reason
FROM due WHERE w.workload_no = due.workload_no AND w.unplaced_reason <> due.reason
"""

ASSIGNMENT_COLUMNS = """a.assignment_no, a.assignment_id, a.workload_no, a.revision, a.replica,
  h.host_no, h.host_id, host(h.wg_ip) AS wg_ip, h.status AS host_status, a.state, a.reason,
  a.restarts, a.exit_code, a.stop_reason, a.port_slot, ARRAY(
    SELECT jsonb_array_elements_text(a.spec->'ports')::integer) AS container_ports,
  a.created_at, a.state_at, a.ended_at"""

SQL_ASSIGNMENT_LIST = f"""
-- the copies of these workloads that have not ended
SELECT {ASSIGNMENT_COLUMNS} FROM assignments a JOIN hosts h USING (host_no)
WHERE a.workload_no = ANY(%(workload_nos)s) AND a.ended_at IS NULL
ORDER BY a.workload_no, a.replica
"""

SQL_ASSIGNMENT_PAST = f"""
-- the last copies of a workload that ended, newest first
SELECT {ASSIGNMENT_COLUMNS} FROM assignments a JOIN hosts h USING (host_no)
WHERE a.workload_no = %(workload_no)s AND a.ended_at IS NOT NULL
ORDER BY a.assignment_no DESC LIMIT 20
"""

SQL_PLACER_LOCK = """
-- one control plane places at a time; and not while hosts may have what no backup knew of
SELECT pg_try_advisory_xact_lock(7726003) AS is_mine,
  restored_at + make_interval(secs => %(lease_s)s + %(grace_s)s) AS from_at,
  coalesce(restored_at + make_interval(secs => %(lease_s)s + %(grace_s)s) > now(), false)
    AS is_too_early
FROM cp_state
"""

SQL_ASSIGNMENT_EXPIRE = """
-- nobody runs what has no right any more: the lease after the host's last heartbeat is over, and
-- the grace; after this CP's own absence hosts have three intervals to come back. A host that
-- comes back later gets another list by that, and stops its late copy. What ended for good stays
-- so, for it is not to run again
WITH over AS (
  SELECT a.assignment_no, a.host_no FROM assignments a JOIN liveness l USING (host_no), cp_state c
  WHERE a.ended_at IS NULL AND (a.state NOT IN ('finished', 'failed') OR a.stop_at IS NOT NULL)
    AND coalesce(a.held_until, greatest(
      coalesce(l.last_heartbeat_at, a.created_at) + make_interval(secs => %(lease_s)s),
      c.serving_since + make_interval(secs => %(intervals)s * l.interval_ms / 1000.0)))
    < now() - make_interval(secs => %(grace_s)s)
  FOR UPDATE OF a SKIP LOCKED
), told AS (
  UPDATE liveness l SET desired_revision = l.desired_revision + 1
  WHERE l.host_no IN (SELECT host_no FROM over)
)
UPDATE assignments a SET ended_at = now(), state_at = now(), state = 'lost',
  reason = 'its host fell silent, and its right to run it is over'
FROM over WHERE a.assignment_no = over.assignment_no RETURNING a.assignment_id
"""

# What a copy that is to run is stopped for, by what changed around it.
SQL_ASSIGNMENT_STOP = """
-- ask hosts to stop what is not to run there any more; each gets another list by that. What ended
-- for good stays so while it is wanted, for it is not to run again elsewhere
WITH gone AS (
  SELECT a.assignment_no, a.host_no, CASE
      WHEN w.deleted_at IS NOT NULL THEN 'the workload was deleted'
      WHEN a.replica >= w.replicas THEN 'fewer replicas are wanted'
      WHEN a.assignment_no = ANY(%(replaced)s) THEN 'a newer revision takes its place'
      WHEN c.out_of_credit_at < now() - make_interval(secs => %(notice_s)s)
        THEN 'the balance is used up'
      WHEN h.drained_at IS NOT NULL THEN 'the operator drains its host'
      WHEN h.status = 'paused' THEN 'the provider paused its host'
      WHEN h.status = 'revoked' THEN 'its host was removed from the fleet'
      WHEN a.spec ? 'secrets' AND NOT (h.disk_encrypted AND h.takes_secrets)
        THEN 'its host takes no secrets any more'
      ELSE 'its host''s namespace is not approved' END AS why
  FROM assignments a JOIN workloads w USING (workload_no) JOIN hosts h USING (host_no)
  JOIN customer_namespaces cn ON cn.namespace = w.namespace JOIN customers c USING (customer_no)
  LEFT JOIN namespaces n ON n.namespace = h.namespace
  WHERE a.ended_at IS NULL AND a.stop_at IS NULL AND (w.deleted_at IS NOT NULL
    OR a.replica >= w.replicas OR a.assignment_no = ANY(%(replaced)s)
    OR a.state NOT IN ('finished', 'failed') AND (
      c.out_of_credit_at < now() - make_interval(secs => %(notice_s)s)
      OR h.drained_at IS NOT NULL OR h.status IN ('paused', 'revoked') OR n.approved_at IS NULL
      OR (a.spec ? 'secrets' AND NOT (h.disk_encrypted AND h.takes_secrets))))
  FOR UPDATE OF a SKIP LOCKED
), told AS (
  UPDATE liveness l SET desired_revision = l.desired_revision + 1
  WHERE l.host_no IN (SELECT host_no FROM gone) RETURNING l.host_no, l.desired_revision
)
UPDATE assignments a SET stop_at = now(), stop_reason = gone.why,
  stop_revision = told.desired_revision
FROM gone JOIN told USING (host_no) WHERE a.assignment_no = gone.assignment_no
RETURNING a.host_no
"""

SQL_ASSIGNMENT_HOLD = """
-- another machine has this host's identity now: what the first may still run ends by the clock
WITH told AS (
  UPDATE liveness l SET desired_revision = l.desired_revision + 1
  WHERE l.host_no = %(host_no)s AND EXISTS (
    SELECT 1 FROM assignments a WHERE a.host_no = l.host_no AND a.ended_at IS NULL
      AND a.state NOT IN ('finished', 'failed'))
  RETURNING l.host_no, l.desired_revision, l.last_heartbeat_at
)
UPDATE assignments a SET stop_at = coalesce(a.stop_at, now()),
  stop_reason = coalesce(a.stop_reason, 'another machine took over its host''s identity'),
  stop_revision = coalesce(a.stop_revision, told.desired_revision),
  held_until = greatest(told.last_heartbeat_at, a.created_at) + make_interval(secs => %(lease_s)s)
FROM told WHERE a.host_no = told.host_no AND a.ended_at IS NULL AND a.held_until IS NULL
  AND a.state NOT IN ('finished', 'failed')
"""

SQL_DEMANDS = """
-- workloads of which a replica has no copy, or one of an old revision; with their live copies
WITH due AS (
  SELECT w.workload_id FROM workloads w LEFT JOIN assignments a
    ON a.workload_no = w.workload_no AND a.ended_at IS NULL AND a.stop_at IS NULL
    AND a.revision = w.revision
  WHERE w.deleted_at IS NULL AND w.replicas > 0
  GROUP BY w.workload_id HAVING count(a.assignment_no) < w.replicas
)
SELECT w.workload_no, w.revision, w.replicas, w.spec, c.customer_no,
  c.out_of_credit_at IS NOT NULL AS out_of_credit,
  w.spec ? 'secrets' AND are_secrets_lost(w.workload_no, w.revision) AS secrets_lost,
  coalesce(jsonb_agg(jsonb_build_object('assignment_no', a.assignment_no, 'replica', a.replica,
    'revision', a.revision, 'state', a.state, 'is_stopping', a.stop_at IS NOT NULL,
    'state_age_s', extract(epoch FROM now() - a.state_at), 'host_no', a.host_no))
    FILTER (WHERE a.assignment_no IS NOT NULL), '[]') AS copies
FROM due JOIN workloads w USING (workload_id)
JOIN customer_namespaces n ON n.namespace = w.namespace
JOIN customers c ON c.customer_no = n.customer_no
LEFT JOIN assignments a ON a.workload_no = w.workload_no AND a.ended_at IS NULL
GROUP BY w.workload_id, c.customer_id ORDER BY w.workload_no
"""

SQL_REJECTIONS = """
-- of these workloads' present revisions, what hosts could not run of late
SELECT a.workload_no, a.replica, a.host_no, a.reason,
  extract(epoch FROM now() - a.ended_at)::float AS age_s
FROM assignments a JOIN workloads w USING (workload_no)
WHERE a.workload_no = ANY(%(workload_nos)s) AND a.state = 'rejected' AND a.revision = w.revision
  AND a.ended_at > now() - make_interval(secs => %(window_s)s)
ORDER BY a.assignment_no
"""

SQL_PLACES = f"""
-- hosts that may get work, and what is free there
SELECT h.host_no, h.arch, h.namespace, h.labels,
  (h.offered_cpu_milli - coalesce(u.cpu_milli, 0))::integer AS cpu_milli,
  (h.offered_memory_bytes - coalesce(u.memory_bytes, 0))::bigint AS memory_bytes,
  coalesce(u.assignments, 0)::integer AS assignments, coalesce(u.port_slots, '{{}}') AS port_slots,
  coalesce(r.port_slots, '{{}}') AS refused_slots,
  h.disk_encrypted AND h.takes_secrets AS takes_secrets
FROM hosts h LEFT JOIN namespaces n ON n.namespace = h.namespace LEFT JOIN (
  SELECT host_no, count(*) AS assignments,
    sum(cpu_milli) FILTER (WHERE state NOT IN ('finished', 'failed')) AS cpu_milli,
    sum(memory_bytes) FILTER (WHERE state NOT IN ('finished', 'failed')) AS memory_bytes,
    array_agg(port_slot) FILTER (WHERE port_slot IS NOT NULL) AS port_slots
  FROM assignments WHERE ended_at IS NULL GROUP BY host_no) u USING (host_no) LEFT JOIN (
  SELECT host_no, array_agg(DISTINCT port_slot) AS port_slots FROM assignments
  WHERE state = 'rejected' AND port_slot IS NOT NULL
    AND ended_at > now() - make_interval(secs => %(window_s)s) GROUP BY host_no) r USING (host_no)
WHERE h.status = 'online' AND h.engine_version <> '' AND {HOST_IS_PLAIN}
"""

SQL_ASSIGNMENT_INSERT = """
-- give replicas their places; each host gets another list by that
WITH made AS (
  INSERT INTO assignments (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes,
    port_slot)
  SELECT workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes, port_slot
  FROM unnest(%(workload_no)s::bigint[], %(revision)s::integer[], %(replica)s::integer[],
    %(host_no)s::integer[], %(spec)s::jsonb[], %(cpu_milli)s::integer[],
    %(memory_bytes)s::bigint[], %(port_slot)s::integer[])
    AS t (workload_no, revision, replica, host_no, spec, cpu_milli, memory_bytes, port_slot)
  RETURNING host_no
), told AS (
  UPDATE liveness l SET desired_revision = l.desired_revision + 1
  WHERE l.host_no IN (SELECT host_no FROM made)
)
UPDATE hosts h SET ever_assigned = true
WHERE h.host_no IN (SELECT host_no FROM made) AND NOT h.ever_assigned
"""

SQL_DESIRED = """
-- all that these hosts are to run; secrets for none that may not have them
SELECT a.host_no, a.assignment_no, a.assignment_id, w.workload_id, a.spec, a.port_slot, a.state,
  CASE WHEN a.spec ? 'secrets' AND a.state NOT IN ('finished', 'failed')
    THEN open_secrets(a.workload_no, a.revision) END AS secrets
FROM assignments a JOIN workloads w USING (workload_no) JOIN hosts h USING (host_no)
WHERE a.host_no = ANY(%(host_nos)s) AND a.ended_at IS NULL AND a.stop_at IS NULL
  AND NOT a.restored
  AND (NOT a.spec ? 'secrets' OR (h.disk_encrypted AND h.takes_secrets))
ORDER BY a.assignment_no
"""

SQL_PULL_RIGHT = """
-- whether a host, by the hash of its session, has something to run out of this repository
SELECT h.status <> 'revoked' AND EXISTS (
  SELECT 1 FROM assignments a
  WHERE a.host_no = h.host_no AND a.ended_at IS NULL AND a.stop_at IS NULL
    AND split_part(a.spec->>'image', '@', 1) = %(repository)s
) AS may
FROM sessions s JOIN hosts h USING (host_no)
WHERE s.session_sha256 = %(session_sha256)s AND s.ended_at IS NULL
"""

SQL_OBSERVED = """
-- what hosts say of their assignments; one that is rejected is over: the host has nothing of it
WITH seen AS (
  SELECT * FROM unnest(%(host_no)s::integer[], %(assignment_id)s::uuid[], %(state)s::text[],
    %(reason)s::text[], %(restarts)s::integer[], %(exit_code)s::integer[])
    AS t (host_no, assignment_id, state, reason, restarts, exit_code)
), changed AS (
  UPDATE assignments a SET state = seen.state, reason = seen.reason, restarts = seen.restarts,
    exit_code = seen.exit_code, restored = false,
    state_at = CASE WHEN a.state = seen.state THEN a.state_at ELSE now() END,
    ended_at = CASE WHEN seen.state = 'rejected' THEN now() END
  FROM seen WHERE a.assignment_id = seen.assignment_id AND a.host_no = seen.host_no
    AND a.ended_at IS NULL AND a.held_until IS NULL
  RETURNING a.host_no, a.state
), told AS (
  UPDATE liveness l SET desired_revision = l.desired_revision + 1
  WHERE l.host_no IN (SELECT host_no FROM changed WHERE state = 'rejected')
)
SELECT count(*) AS changed FROM changed
"""

SQL_OBSERVED_GONE = """
-- what hosts were to stop and have nothing of any more, after they took a list without it; and
-- what only a backup says that they have
UPDATE assignments a SET ended_at = now(), state_at = now(), state = 'stopped',
  reason = coalesce(a.stop_reason, 'it was over when the backup was restored')
FROM unnest(%(host_no)s::integer[], %(revision)s::bigint[]) AS t (host_no, revision)
WHERE a.host_no = t.host_no AND a.ended_at IS NULL AND a.held_until IS NULL
  AND (a.restored OR a.stop_revision <= t.revision)
  AND a.assignment_id <> ALL(%(assignment_id)s::uuid[])
"""

USAGE_SENDS = "(a.spec->>'egress' <> 'none' OR a.spec->'ports' <> '[]')"
USAGE_POSSIBLE = """least((extract(epoch FROM now() - {since}) + %(slack_s)s) * %(bytes_s)s,
    %(most)s)::bigint"""

SQL_USAGE_COUNT = f"""
-- counters as hosts say them: what is greater counts, and by how much tx_bytes grew in this hour,
-- up to what is possible since the copy was last heard of; gives back how many count for nothing.
-- The hosts' rows of liveness are locked by their heartbeat, so that none is counted twice
WITH said AS (
  SELECT a.assignment_no, s.boot_id, s.container_id, max(s.cpu_ns) AS cpu_ns,
    max(s.memory_byte_s) AS memory_byte_s, max(s.rx_bytes) AS rx_bytes, max(s.tx_bytes) AS tx_bytes,
    coalesce(a.ended_at <= now() - make_interval(secs => %(late_s)s), false) AS is_late,
    a.created_at, {USAGE_SENDS} AS sends
  FROM unnest(%(host_no)s::integer[], %(assignment_id)s::uuid[], %(boot_id)s::uuid[],
    %(container_id)s::bytea[], %(cpu_ns)s::bigint[], %(memory_byte_s)s::bigint[],
    %(rx_bytes)s::bigint[], %(tx_bytes)s::bigint[]) AS s (host_no, assignment_id, boot_id,
    container_id, cpu_ns, memory_byte_s, rx_bytes, tx_bytes)
  JOIN assignments a ON a.assignment_id = s.assignment_id AND a.host_no = s.host_no
  GROUP BY a.assignment_no, a.ended_at, a.created_at, a.spec, s.boot_id, s.container_id
), known AS (
  SELECT said.*, c.tx_bytes AS old_bytes FROM said
  LEFT JOIN usage_counters c USING (assignment_no, boot_id, container_id)
  WHERE NOT said.is_late AND (c.assignment_no IS NOT NULL OR %(kept)s > (
    SELECT count(*) FROM usage_counters k WHERE k.assignment_no = said.assignment_no))
), counted AS (
  INSERT INTO usage_counters AS c (assignment_no, boot_id, container_id, cpu_ns, memory_byte_s,
    rx_bytes, tx_bytes, at)
  SELECT assignment_no, boot_id, container_id, cpu_ns, memory_byte_s, rx_bytes, tx_bytes, now()
  FROM known
  ON CONFLICT (assignment_no, boot_id, container_id) DO UPDATE
    SET cpu_ns = greatest(c.cpu_ns, EXCLUDED.cpu_ns),
    memory_byte_s = greatest(c.memory_byte_s, EXCLUDED.memory_byte_s),
    rx_bytes = greatest(c.rx_bytes, EXCLUDED.rx_bytes),
    tx_bytes = greatest(c.tx_bytes, EXCLUDED.tx_bytes), at = EXCLUDED.at
  WHERE (c.cpu_ns, c.memory_byte_s, c.rx_bytes, c.tx_bytes) <> (
    greatest(c.cpu_ns, EXCLUDED.cpu_ns), greatest(c.memory_byte_s, EXCLUDED.memory_byte_s),
    greatest(c.rx_bytes, EXCLUDED.rx_bytes), greatest(c.tx_bytes, EXCLUDED.tx_bytes))
), sent AS (
  INSERT INTO usage_egress AS e (assignment_no, hour_at, since, bytes)
  SELECT assignment_no, date_trunc('hour', now(), 'UTC'), since,
    least(bytes, {USAGE_POSSIBLE.format(since="since")})
  FROM (
    SELECT assignment_no, sum(tx_bytes - coalesce(old_bytes, 0)) AS bytes,
      least(now(), coalesce((SELECT max(k.at) FROM usage_counters k
        WHERE k.assignment_no = known.assignment_no), created_at)) AS since
    FROM known WHERE sends AND tx_bytes > coalesce(old_bytes, 0)
    GROUP BY assignment_no, created_at) grown
  ON CONFLICT (assignment_no, hour_at) DO UPDATE SET bytes = greatest(e.bytes,
    least(e.bytes::numeric + EXCLUDED.bytes, {USAGE_POSSIBLE.format(since="e.since")})::bigint)
)
SELECT count(*) FILTER (WHERE is_late) AS late,
  count(*) FILTER (WHERE NOT is_late) - (SELECT count(*) FROM known) AS too_many FROM said
"""

SQL_CURRENCY_SET = """
-- what amounts are in; no row when there are some, in another currency
UPDATE cp_state SET currency = %(currency)s
WHERE currency IS NULL OR currency = %(currency)s
  OR NOT EXISTS (SELECT FROM rate_cards) AND NOT EXISTS (SELECT FROM ledger_transactions)
RETURNING currency
"""

SQL_CURRENCY_FIND = """
-- what amounts are in
SELECT currency FROM cp_state
"""

SQL_CARD_INSERT = """
-- new prices
INSERT INTO rate_cards (customer_no, valid_from, cpu_hour_micros, gb_hour_micros, egress_gb_micros,
  provider_share_ppm, created_by)
VALUES (%(customer_no)s, %(valid_from)s, %(cpu_hour_micros)s, %(gb_hour_micros)s,
  %(egress_gb_micros)s, %(provider_share_ppm)s, %(actor)s)
RETURNING card_no
"""

SQL_CARD_LIST = """
-- all prices
SELECT card_no, customer_no, valid_from, cpu_hour_micros, gb_hour_micros, egress_gb_micros,
  provider_share_ppm
FROM rate_cards ORDER BY valid_from, card_no
"""

SQL_BILLING_LOCK = """
-- one at a time closes windows, issues invoices, makes rate cards; and what is over by now
SELECT pg_try_advisory_xact_lock(7726004) AS is_mine, now() AS now,
  date_trunc('hour', now() - make_interval(secs => %(grace_s)s), 'UTC') - interval '1 hour' AS until
"""

SQL_BILLING_WAIT = """
-- the same, waiting for it
SELECT pg_advisory_xact_lock(7726004)
"""

SQL_BILLING_OPEN = """
-- the first hour that is not closed, by the time after that wait
SELECT date_trunc('hour', statement_timestamp() - make_interval(secs => %(grace_s)s), 'UTC')
  AS open_from
"""

METER_COLUMNS = """a.assignment_no, n.customer_no, h.namespace, h.host_no, a.cpu_milli,
  a.memory_bytes, coalesce(t.billed_us, 0) AS billed_us,
  coalesce(t.counted_bytes, 0) AS counted_bytes, coalesce(t.egress_bytes, 0) AS egress_bytes"""
METER_TABLES = """JOIN assignments a USING (assignment_no) JOIN workloads w USING (workload_no)
JOIN customer_namespaces n ON n.namespace = w.namespace JOIN hosts h USING (host_no)
LEFT JOIN usage_totals t USING (assignment_no)"""

SQL_USAGE_COPIES = f"""
-- copies of which an hour may be due, and what was billed of them
WITH due AS (
  (SELECT DISTINCT assignment_no FROM usage_runs
   WHERE NOT is_closed AND (closed_hour <= %(until)s OR closed_hour > now())
     AND assignment_no > %(cursor)s
   ORDER BY assignment_no LIMIT %(most)s)
  UNION
  (SELECT DISTINCT assignment_no FROM usage_egress
   WHERE bytes > closed_bytes AND (hour_at <= %(until)s OR hour_at > now())
     AND assignment_no > %(cursor)s
   ORDER BY assignment_no LIMIT %(most)s)
  ORDER BY assignment_no LIMIT %(most)s
)
SELECT {METER_COLUMNS} FROM due {METER_TABLES} ORDER BY a.assignment_no
"""

SQL_USAGE_HOLD = """
-- runs that may have time in no window yet; one that somebody changes now waits. A statement of its
-- own, so that the next one sees of one moment a run's end and the marks up to there
SELECT run_no FROM usage_runs WHERE assignment_no = ANY(%(assignment_nos)s) AND NOT is_closed
FOR UPDATE SKIP LOCKED
"""

SQL_USAGE_TIME = """
-- by run and hour, the time that is in no window yet: a run from where windows end, cut at marks.
-- A clock that was wrong for a while left marks, and ends of windows, that are not yet: no mark
-- of later counts, nor one below an earlier one
WITH run AS (
  SELECT * FROM usage_runs WHERE run_no = ANY(%(run_nos)s::bigint[])
), cut AS (
  SELECT r.run_no, r.assignment_no, c.hour_at, coalesce(r.to_us, l.seen_us) AS end_us,
    max(greatest(c.seen_us, r.closed_us)) OVER (PARTITION BY r.run_no ORDER BY c.hour_at) AS from_us
  FROM run r JOIN liveness l USING (host_no), LATERAL (
    SELECT CASE WHEN r.closed_hour <= now() THEN r.closed_hour ELSE coalesce((
      SELECT min(h.hour_at) - interval '1 hour' FROM usage_hours h WHERE h.host_no = r.host_no
        AND h.seen_us > r.closed_us AND h.hour_at <= now()), date_trunc('hour', now(), 'UTC'))
      END AS hour_at) f, LATERAL (
    SELECT f.hour_at, r.closed_us AS seen_us
    UNION ALL (SELECT h.hour_at, h.seen_us FROM usage_hours h
    WHERE h.host_no = r.host_no AND h.hour_at > f.hour_at AND h.hour_at <= now()
      AND h.seen_us >= r.closed_us  -- else it is of a clock that was wrong
    ORDER BY h.hour_at LIMIT %(hours)s)) c
), part AS (
  SELECT run_no, assignment_no, hour_at, from_us, least(end_us, next_us) AS to_us,
    next_us IS NULL AND cuts > %(hours)s AS is_open, cuts > %(hours)s AS is_cut
  FROM (SELECT *, lead(from_us) OVER (PARTITION BY run_no ORDER BY hour_at) AS next_us,
    count(*) OVER (PARTITION BY run_no) AS cuts FROM cut) c
)
SELECT run_no, assignment_no, hour_at, to_us, to_us - from_us AS billed_us, is_cut FROM part
WHERE to_us > from_us AND hour_at <= %(until)s AND NOT is_open
ORDER BY hour_at, run_no LIMIT %(most)s
"""

SQL_USAGE_EGRESS = """
-- bytes counted that are in no window yet
SELECT assignment_no, hour_at, CASE WHEN hour_at > now() THEN %(until)s ELSE hour_at END AS due_at,
  bytes, bytes - closed_bytes AS counted_bytes
FROM usage_egress WHERE assignment_no = ANY(%(assignment_nos)s) AND bytes > closed_bytes
  AND (hour_at <= %(until)s OR hour_at > now())  -- a clock was wrong
FOR UPDATE
"""

SQL_USAGE_LINES = """
-- the lines of these copies
SELECT assignment_no, month, card_no, billed_us, egress_bytes, cpu_micros, memory_micros,
  egress_micros, share_micros
FROM usage_lines WHERE assignment_no = ANY(%(assignment_nos)s)
"""

SQL_USAGE_PARTS = """
-- how many windows these hours of copies have
SELECT assignment_no, hour_at, max(part) AS part FROM usage_windows
WHERE (assignment_no, hour_at) IN (
  SELECT * FROM unnest(%(assignment_nos)s::bigint[], %(hours)s::timestamptz[]))
GROUP BY assignment_no, hour_at
"""

SQL_INVOICED = """
-- months of customers whose invoice is issued
SELECT customer_no, month FROM invoices WHERE customer_no = ANY(%(customer_nos)s)
"""

SQL_LEDGER_NUMBERS = """
-- numbers for transactions
SELECT nextval('ledger_numbers') AS number FROM generate_series(1, %(count)s)
"""

SQL_WINDOW_INSERT = """
-- windows
INSERT INTO usage_windows (window_no, customer_no, assignment_no, hour_at, part, month, card_no,
  billed_us, egress_bytes, cpu_micros, memory_micros, egress_micros, share_micros, closed_at)
SELECT *, now() FROM unnest(%(window_no)s::bigint[], %(customer_no)s::integer[],
  %(assignment_no)s::bigint[],
  %(hour_at)s::timestamptz[], %(part)s::integer[], %(month)s::date[], %(card_no)s::integer[],
  %(billed_us)s::bigint[], %(egress_bytes)s::bigint[], %(cpu_micros)s::bigint[],
  %(memory_micros)s::bigint[], %(egress_micros)s::bigint[], %(share_micros)s::bigint[])
"""

SQL_LINE_SET = """
-- lines, as they are with new windows
INSERT INTO usage_lines (assignment_no, month, card_no, customer_no, namespace, host_no, billed_us,
  egress_bytes, cpu_micros, memory_micros, egress_micros, share_micros, hostname)
SELECT l.*, h.hostname FROM unnest(%(assignment_no)s::bigint[], %(month)s::date[],
  %(card_no)s::integer[], %(customer_no)s::integer[], %(namespace)s::text[],
  %(host_no)s::integer[], %(billed_us)s::bigint[], %(egress_bytes)s::bigint[],
  %(cpu_micros)s::bigint[], %(memory_micros)s::bigint[], %(egress_micros)s::bigint[],
  %(share_micros)s::bigint[]) AS l (assignment_no, month, card_no, customer_no, namespace, host_no,
  billed_us, egress_bytes, cpu_micros, memory_micros, egress_micros, share_micros)
JOIN hosts h USING (host_no)
ON CONFLICT (assignment_no, month, card_no) DO UPDATE SET billed_us = EXCLUDED.billed_us,
  egress_bytes = EXCLUDED.egress_bytes, cpu_micros = EXCLUDED.cpu_micros,
  memory_micros = EXCLUDED.memory_micros, egress_micros = EXCLUDED.egress_micros,
  share_micros = EXCLUDED.share_micros
"""

SQL_TOTAL_SET = """
-- what is billed of copies in all
INSERT INTO usage_totals (assignment_no, billed_us, counted_bytes, egress_bytes)
SELECT * FROM unnest(%(assignment_no)s::bigint[], %(billed_us)s::bigint[],
  %(counted_bytes)s::bigint[], %(egress_bytes)s::bigint[])
ON CONFLICT (assignment_no) DO UPDATE SET billed_us = EXCLUDED.billed_us,
  counted_bytes = EXCLUDED.counted_bytes, egress_bytes = EXCLUDED.egress_bytes
"""

SQL_RUN_CLOSE = """
-- up to where runs are in windows now
UPDATE usage_runs r SET closed_hour = t.hour_at, closed_us = t.to_us,
  is_closed = coalesce(r.to_us = t.to_us, false)
FROM unnest(%(run_no)s::bigint[], %(hour_at)s::timestamptz[], %(to_us)s::bigint[])
  AS t (run_no, hour_at, to_us)
WHERE r.run_no = t.run_no AND r.closed_us < t.to_us
"""

SQL_EGRESS_CLOSE = """
-- bytes that are in windows now
UPDATE usage_egress e SET closed_bytes = t.bytes
FROM unnest(%(assignment_no)s::bigint[], %(hour_at)s::timestamptz[], %(bytes)s::bigint[])
  AS t (assignment_no, hour_at, bytes)
WHERE e.assignment_no = t.assignment_no AND e.hour_at = t.hour_at
"""

SQL_ACCOUNT_ADD = """
-- accounts that are not there yet
INSERT INTO ledger_accounts (kind, customer_no, namespace)
SELECT DISTINCT * FROM unnest(%(kind)s::text[], %(customer_no)s::integer[], %(namespace)s::text[])
ON CONFLICT DO NOTHING
"""

SQL_ACCOUNT_LIST = """
-- the accounts of these
SELECT account_no, kind, customer_no, namespace FROM ledger_accounts
WHERE kind IN ('fees', 'payments') OR customer_no = ANY(%(customer_nos)s)
  OR namespace = ANY(%(namespaces)s)
"""

SQL_ENTRY_INSERT = """
-- entries, before their transactions
INSERT INTO ledger_entries (transaction_no, account_no, amount_micros)
SELECT * FROM unnest(%(transaction_no)s::bigint[], %(account_no)s::integer[],
  %(amount_micros)s::bigint[])
"""

SQL_LEDGER_USAGE = """
-- the transactions of windows: with them the entries must add up to nothing
INSERT INTO ledger_transactions (transaction_no, kind, window_no, actor, at)
SELECT number, 'usage', number, 'cp', now() FROM unnest(%(numbers)s::bigint[]) AS t (number)
"""

SQL_PAYMENT_FIND = """
-- a payment or correction that is made already
SELECT t.transaction_no, t.kind, c.customer_id, e.amount_micros
FROM ledger_transactions t JOIN ledger_entries e USING (transaction_no)
JOIN ledger_accounts a USING (account_no) JOIN customers c USING (customer_no)
WHERE t.reference = %(reference)s
"""

SQL_PAYMENT_INSERT = """
-- the transaction of a payment
INSERT INTO ledger_transactions (transaction_no, kind, reference, note, actor, at)
VALUES (%(number)s, %(kind)s, %(reference)s, %(note)s, %(actor)s, now())
"""

SQL_ONE_PICTURE = """
-- all that follows sees the same
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ
"""

LINE_COLUMNS = """a.assignment_id, l.workload, l.replica, l.hostname,
  a.cpu_milli, a.memory_bytes, l.card_no, coalesce(c.cpu_hour_micros, 0) AS cpu_hour_micros,
  coalesce(c.gb_hour_micros, 0) AS gb_hour_micros,
  coalesce(c.egress_gb_micros, 0) AS egress_gb_micros,
  coalesce(c.provider_share_ppm, 0) AS provider_share_ppm,
  l.billed_us, l.egress_bytes, l.cpu_micros, l.memory_micros, l.egress_micros, l.share_micros"""

SQL_BILL_LINES = f"""
-- the lines of a customer's or a provider's month: the page first
SELECT {LINE_COLUMNS} FROM (
  SELECT l.*, n.namespace || '/' || n.name AS workload, b.replica FROM usage_lines l
  JOIN assignments b USING (assignment_no) JOIN workloads n USING (workload_no)
  WHERE l.month = %(month)s AND (l.customer_no = %(customer_no)s OR l.namespace = %(namespace)s
    OR l.host_no = %(host_no)s)
  ORDER BY workload, b.replica, l.assignment_no, l.card_no LIMIT %(limit)s OFFSET %(cursor)s
) l JOIN assignments a USING (assignment_no) LEFT JOIN rate_cards c ON c.card_no = l.card_no
ORDER BY l.workload, l.replica, l.assignment_no, l.card_no
"""

SQL_BILL_WINDOWS = f"""
-- the windows of a copy's month, each with what its line has; of a host's copies only, or of all
SELECT {LINE_COLUMNS}, l.hour_at, l.part FROM (
  SELECT u.*, s.hostname, n.namespace || '/' || n.name AS workload, b.replica
  FROM assignments b JOIN usage_windows u USING (assignment_no)
  JOIN usage_lines s USING (assignment_no, month, card_no) JOIN workloads n USING (workload_no)
  WHERE b.assignment_id = %(assignment_id)s AND u.month = %(month)s
    AND (%(host_no)s::integer IS NULL OR b.host_no = %(host_no)s)
  ORDER BY u.hour_at, u.part LIMIT %(limit)s OFFSET %(cursor)s
) l JOIN assignments a USING (assignment_no) LEFT JOIN rate_cards c ON c.card_no = l.card_no
ORDER BY l.hour_at, l.part
"""

SQL_COUNTED = f"""
-- what hosts counted of these copies, and how long they ran until now
SELECT a.assignment_id, a.cpu_milli, a.memory_bytes,
  coalesce(t.billed_us, 0) + o.open_us AS life_us, k.*, g.egress_bytes
FROM assignments a LEFT JOIN usage_totals t USING (assignment_no), LATERAL (
  SELECT least(coalesce(sum(cpu_ns), 0), %(most)s)::bigint AS cpu_ns,
    least(coalesce(sum(memory_byte_s), 0), %(most)s)::bigint AS memory_byte_s,
    least(coalesce(sum(rx_bytes), 0), %(most)s)::bigint AS rx_bytes,
    least(coalesce(sum(tx_bytes), 0), %(most)s)::bigint AS tx_bytes
  FROM usage_counters u WHERE u.assignment_no = a.assignment_no) k, LATERAL (
  SELECT CASE WHEN {USAGE_SENDS} THEN coalesce(t.counted_bytes, 0) + coalesce(
    sum(bytes - closed_bytes), 0)::bigint END AS egress_bytes
  FROM usage_egress g WHERE g.assignment_no = a.assignment_no AND bytes > closed_bytes) g, LATERAL (
  SELECT coalesce(sum(coalesce(r.to_us, v.seen_us) - r.closed_us), 0)::bigint AS open_us
  FROM usage_runs r JOIN liveness v USING (host_no)
  WHERE r.assignment_no = a.assignment_no AND NOT r.is_closed) o
WHERE a.assignment_id = ANY(%(assignment_ids)s)
"""

SQL_BILL_TOTAL = """
-- what a customer's month comes to
SELECT coalesce(sum(cpu_micros + memory_micros + egress_micros), 0)::bigint AS total_micros
FROM usage_lines WHERE customer_no = %(customer_no)s AND month = %(month)s
"""

SQL_SESSION_HOST = """
-- the host of a live session, and what month it is
SELECT h.host_no, h.namespace, date_trunc('month', now(), 'UTC')::date AS month
FROM sessions s JOIN hosts h USING (host_no)
WHERE s.session_sha256 = %(session)s AND s.ended_at IS NULL
  AND h.status NOT IN ('quarantined', 'revoked')
  AND (NOT %(peer_check)s OR h.wg_ip = %(peer)s::inet)
"""

SQL_HOST_TOTAL = """
-- what a host earned in a month, by one copy or by all
SELECT coalesce(sum(share_micros), 0)::bigint AS micros FROM usage_lines
JOIN assignments a USING (assignment_no)
WHERE usage_lines.host_no = %(host_no)s AND month = %(month)s
  AND (%(assignment_id)s::uuid IS NULL OR a.assignment_id = %(assignment_id)s)
"""

SQL_EARNINGS = """
-- what hosts earned in this month so far
SELECT host_no, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM') AS month,
  coalesce((SELECT sum(share_micros) FROM usage_lines l WHERE l.host_no = h.host_no
    AND l.month = date_trunc('month', now(), 'UTC')::date), 0)::bigint AS micros
FROM unnest(%(host_nos)s::integer[]) AS h (host_no)
"""

SQL_INVOICE_LIST = """
-- a customer's months, newest first
SELECT to_char(l.month, 'YYYY-MM') AS month, i.invoice_no AS number, i.issued_at,
  sum(l.cpu_micros + l.memory_micros + l.egress_micros)::bigint AS total_micros
FROM usage_lines l LEFT JOIN invoices i USING (customer_no, month)
WHERE l.customer_no = %(customer_no)s GROUP BY l.month, i.invoice_no, i.issued_at
ORDER BY l.month DESC
"""

SQL_BILL_OWNERS = """
-- who has lines in this month
SELECT DISTINCT c.customer_id, l.namespace FROM usage_lines l JOIN customers c USING (customer_no)
WHERE l.month = %(month)s
"""

SQL_INVOICE_FIND = """
-- a customer's invoice of a month, and whether the month is over
SELECT i.invoice_no, i.customer_name, i.issued_at,
  (%(month)s::date + interval '1 month') AT TIME ZONE 'UTC'
    + make_interval(secs => %(after_s)s) > now() AS is_preliminary
FROM (SELECT) AS one LEFT JOIN invoices i
  ON i.customer_no = %(customer_no)s AND i.month = %(month)s
"""

SQL_STATEMENT_OPEN = """
-- whether a provider's month, or a host's, may still grow: it was over just now, or what ran in it
-- is not all in windows
SELECT month.end_at + make_interval(secs => %(after_s)s) > now() OR EXISTS (
  SELECT FROM hosts h JOIN usage_runs r USING (host_no)
  WHERE (h.namespace = %(namespace)s OR h.host_no = %(host_no)s)
    AND NOT r.is_closed AND r.closed_hour < month.end_at
) AS is_preliminary
FROM (SELECT (%(month)s::date + interval '1 month') AT TIME ZONE 'UTC' AS end_at) month
"""

SQL_USAGE_LIST = """
-- windows of a customer's month, newest first
SELECT u.window_no, a.assignment_id, w.workload_id, w.name AS workload, u.hour_at, u.part,
  u.card_no, u.billed_us, u.egress_bytes, u.cpu_micros, u.memory_micros, u.egress_micros,
  u.closed_at
FROM usage_windows u JOIN assignments a USING (assignment_no) JOIN workloads w USING (workload_no)
WHERE u.customer_no = %(customer_no)s AND u.month = %(month)s
  AND (%(assignment_id)s::uuid IS NULL OR a.assignment_id = %(assignment_id)s)
  AND (%(cursor)s = 0 OR u.window_no < %(cursor)s)
ORDER BY u.window_no DESC LIMIT %(limit)s
"""

SQL_INVOICE_ISSUE = """
-- invoices of months that are over for long enough, numbered on
INSERT INTO invoices (invoice_no, customer_no, month, total_micros, issued_at, customer_name)
SELECT (SELECT coalesce(max(invoice_no), 0) FROM invoices)
    + row_number() OVER (ORDER BY l.month, l.customer_no),
  l.customer_no, l.month, sum(l.cpu_micros + l.memory_micros + l.egress_micros), now(), c.name
FROM usage_lines l JOIN customers c USING (customer_no)
LEFT JOIN invoices i USING (customer_no, month)
WHERE i.invoice_no IS NULL AND (l.month + interval '1 month') AT TIME ZONE 'UTC'
  < now() - make_interval(secs => %(after_s)s)
  AND l.month > now() - interval '1 year' AND l.customer_no <> ALL(%(without)s)
GROUP BY l.customer_no, l.month, c.name
HAVING sum(l.cpu_micros + l.memory_micros + l.egress_micros) > 0
ORDER BY l.month, l.customer_no
RETURNING invoice_no, customer_no, month, total_micros
"""

SQL_BALANCES = """
-- what customers have: these, or all that have a limit; the ledger without a sum over all of it
WITH paid AS (
  SELECT e.account_no, sum(e.amount_micros) AS micros
  FROM ledger_transactions t JOIN ledger_entries e USING (transaction_no)
  WHERE t.reference IS NOT NULL GROUP BY e.account_no
)
SELECT c.customer_no, c.credit_limit_micros, (coalesce(p.micros, 0) - coalesce((
    SELECT sum(i.total_micros) FROM invoices i WHERE i.customer_no = c.customer_no), 0) - coalesce((
    SELECT sum(l.cpu_micros + l.memory_micros + l.egress_micros) FROM usage_lines l
    WHERE l.customer_no = c.customer_no AND NOT EXISTS (SELECT FROM invoices i
      WHERE i.customer_no = l.customer_no AND i.month = l.month)), 0))::bigint AS balance_micros
FROM customers c LEFT JOIN ledger_accounts a USING (customer_no) LEFT JOIN paid p USING (account_no)
WHERE c.customer_no = ANY(%(customer_nos)s::integer[])
  OR (%(customer_nos)s::integer[] IS NULL AND c.credit_limit_micros IS NOT NULL)
"""

SQL_USAGE_OPEN = f"""
-- copies of customers with a limit, what was billed of them, and what is in no window yet
WITH due AS (
  SELECT assignment_no, sum(us)::bigint AS due_us, sum(bytes)::bigint AS due_bytes FROM (
    SELECT r.assignment_no, coalesce(r.to_us, l.seen_us) - r.closed_us AS us, 0 AS bytes
    FROM usage_runs r JOIN liveness l USING (host_no) WHERE NOT r.is_closed
    UNION ALL
    SELECT assignment_no, 0, bytes - closed_bytes FROM usage_egress WHERE bytes > closed_bytes
  ) each GROUP BY assignment_no
)
SELECT {METER_COLUMNS}, due.due_us, due.due_bytes FROM due {METER_TABLES}
JOIN customers c ON c.customer_no = n.customer_no WHERE c.credit_limit_micros IS NOT NULL
  AND (%(customer_nos)s::integer[] IS NULL OR c.customer_no = ANY(%(customer_nos)s::integer[]))
"""

SQL_CREDIT_SET = """
-- since when these have no credit; all others that were looked at have some
UPDATE customers SET out_of_credit_at =
  CASE WHEN customer_no = ANY(%(customer_nos)s) THEN coalesce(out_of_credit_at, now()) END
WHERE (out_of_credit_at IS NOT NULL) <> (customer_no = ANY(%(customer_nos)s))
  AND (%(looked_at)s::integer[] IS NULL OR customer_no = ANY(%(looked_at)s::integer[]))
RETURNING customer_id, name, out_of_credit_at
"""

SQL_CREDIT_LIMIT = """
-- how far a customer may go below zero
UPDATE customers SET credit_limit_micros = %(credit_limit_micros)s
WHERE customer_id = %(customer_id)s
  AND credit_limit_micros IS DISTINCT FROM %(credit_limit_micros)s::bigint RETURNING customer_no
"""

SQL_SERVE_START = """
-- nobody is marked offline for what happened while this CP was away
UPDATE cp_state SET serving_since = now(), alive_at = now()
"""

SQL_ALIVE = """
-- a sign of life of this CP; after a gap of its own or the database's, silence counts from now
UPDATE cp_state SET alive_at = now(),
  serving_since = CASE WHEN alive_at < now() - make_interval(secs => %(gap_s)s)
    THEN now() ELSE serving_since END
"""

SQL_SWEEP_OFFLINE = """
-- hosts that were silent for three of the intervals that the CP asked for; a row that somebody
-- changes at this moment is left to the next sweep, else it would be judged by what it was before
WITH silent AS (
  SELECT h.host_no FROM hosts h JOIN liveness l USING (host_no), cp_state c
  WHERE h.status IN ('online', 'paused') AND greatest(l.last_heartbeat_at, c.serving_since)
    < now() - make_interval(secs => %(intervals)s * l.interval_ms / 1000.0)
  FOR UPDATE OF h, l SKIP LOCKED
)
UPDATE hosts h SET status = 'offline', status_at = now() FROM silent
WHERE h.host_no = silent.host_no RETURNING h.host_id
"""

SQL_PRUNE = """
-- forget sessions that ended 90 days ago: an agent that comes back with one resumes instead
SELECT prune_sessions(%(most)s) AS gone
"""

SQL_PRUNE_HOURS = """
-- forget where hosts' seen_us stood a week ago and more, at hours that are in windows
SELECT prune_hours(now() - interval '7 days', %(most)s) AS gone
"""

SQL_TABLES = """
-- size and dead rows of each table
SELECT relname AS name, n_dead_tup AS dead_rows, pg_total_relation_size(relid) AS bytes
FROM pg_stat_user_tables WHERE schemaname = 'public'
"""

SQL_OLDEST_SNAPSHOT = """
-- how many transactions ago the oldest snapshot was taken: vacuum can remove nothing since
SELECT greatest(
  (SELECT max(age(backend_xmin)) FROM pg_stat_activity WHERE datname = current_database()),
  (SELECT max(age(xmin)) FROM pg_replication_slots),
  (SELECT max(age(transaction)) FROM pg_prepared_xacts WHERE database = current_database()),
  0) AS transactions
"""

SQL_WORKLOAD_COUNTS = """
-- workloads, and their copies by state
SELECT 'workloads' AS state, count(*) AS number FROM workloads WHERE deleted_at IS NULL
UNION ALL SELECT state, count(*) FROM assignments WHERE ended_at IS NULL GROUP BY state
"""

SQL_COUNTS = """
-- hosts by status
SELECT status, count(*) AS hosts FROM hosts GROUP BY status
"""

SQL_LEDGER_SUMS = """
-- the ledger in numbers
SELECT (SELECT count(*) FROM ledger_transactions) AS transactions, count(*) AS entries,
  coalesce(sum(amount_micros), 0)::bigint AS sum_micros,
  coalesce(sum(amount_micros) FILTER (WHERE kind = 'customer'), 0)::bigint AS customers_micros,
  coalesce(sum(amount_micros) FILTER (WHERE kind = 'provider'), 0)::bigint AS providers_micros,
  coalesce(sum(amount_micros) FILTER (WHERE kind = 'fees'), 0)::bigint AS fees_micros,
  coalesce(sum(amount_micros) FILTER (WHERE kind = 'payments'), 0)::bigint AS payments_micros
FROM ledger_entries JOIN ledger_accounts USING (account_no)
"""

# What must hold of the ledger, as INVARIANTS below; over all of it, so that it takes a while.
LEDGER_CHECKS: tuple[tuple[str, str, str], ...] = (
    (
        "ledger_sums_to_zero",
        "each transaction has at least two entries, and their sum is zero",
        """SELECT t.transaction_no AS subject FROM ledger_transactions t LEFT JOIN (
             SELECT transaction_no, count(*) AS entries, sum(amount_micros) AS micros
             FROM ledger_entries GROUP BY transaction_no) e USING (transaction_no)
           WHERE e.entries IS NULL OR e.entries < 2 OR e.micros <> 0 LIMIT 100""",
    ),
    (
        "entries_have_transactions",
        "no entry is without its transaction",
        """SELECT DISTINCT e.transaction_no AS subject FROM ledger_entries e
           LEFT JOIN ledger_transactions t USING (transaction_no)
           WHERE t.transaction_no IS NULL LIMIT 100""",
    ),
    (
        "windows_are_charged",
        "each window's charge and share are those of its transaction",
        """SELECT w.window_no AS subject FROM usage_windows w LEFT JOIN (
             SELECT transaction_no, -coalesce(sum(amount_micros)
                 FILTER (WHERE kind = 'customer'), 0) AS charge, min(customer_no) AS customer_no,
               coalesce(sum(amount_micros) FILTER (WHERE kind = 'provider'), 0) AS share,
               min(namespace) AS namespace, count(DISTINCT customer_no) > 1
                 OR count(DISTINCT namespace) > 1 OR bool_or(kind = 'payments') AS is_odd
             FROM ledger_entries JOIN ledger_accounts USING (account_no)
             GROUP BY transaction_no) e ON e.transaction_no = w.window_no
           JOIN usage_lines l USING (assignment_no, month, card_no)
           WHERE coalesce(e.charge, 0) <> w.cpu_micros + w.memory_micros + w.egress_micros
             OR coalesce(e.share, 0) <> w.share_micros
             OR e.is_odd OR (e.charge > 0 AND e.customer_no <> l.customer_no)
             OR (e.share > 0 AND e.namespace <> l.namespace)
             OR w.customer_no <> l.customer_no LIMIT 100""",
    ),
    (
        "lines_are_their_windows",
        "the lines of invoices are the sums of their windows",
        """SELECT assignment_no || '/' || month || '/' || card_no AS subject FROM (
             SELECT assignment_no, month, card_no, sum(billed_us) AS a, sum(egress_bytes) AS b,
               sum(cpu_micros) AS c, sum(memory_micros) AS d, sum(egress_micros) AS e,
               sum(share_micros) AS f
             FROM usage_windows GROUP BY assignment_no, month, card_no) w
           FULL JOIN usage_lines l USING (assignment_no, month, card_no)
           WHERE (a, b, c, d, e, f) IS DISTINCT FROM (l.billed_us::numeric,
             l.egress_bytes::numeric, l.cpu_micros::numeric, l.memory_micros::numeric,
             l.egress_micros::numeric, l.share_micros::numeric) LIMIT 100""",
    ),
    (
        "lines_are_priced",
        "a line is its customer's and its provider's, and its quantities times its prices",
        """SELECT l.assignment_no || '/' || l.month || '/' || l.card_no AS subject
           FROM usage_lines l JOIN assignments a USING (assignment_no)
           JOIN workloads w USING (workload_no) JOIN hosts h ON h.host_no = a.host_no
           JOIN customer_namespaces n ON n.namespace = w.namespace
           LEFT JOIN rate_cards c ON c.card_no = l.card_no
           WHERE l.customer_no <> n.customer_no OR l.host_no <> a.host_no
             OR l.namespace IS DISTINCT FROM h.namespace OR (l.card_no > 0 AND c.card_no IS NULL)
             OR (c.customer_no IS NOT NULL AND c.customer_no <> l.customer_no)
             OR l.cpu_micros <> floor(a.cpu_milli::numeric * l.billed_us
               * coalesce(c.cpu_hour_micros, 0) / 3600000000000)
             OR l.memory_micros <> floor(a.memory_bytes::numeric * l.billed_us
               * coalesce(c.gb_hour_micros, 0) / 3600000000000000000)
             OR l.egress_micros <> floor(l.egress_bytes::numeric
               * coalesce(c.egress_gb_micros, 0) / 1000000000)
             OR (l.namespace IS NOT NULL AND l.share_micros <> floor(
               (l.cpu_micros + l.memory_micros + l.egress_micros)::numeric
               * coalesce(c.provider_share_ppm, 0) / 1000000)) LIMIT 100""",
    ),
    (
        "balances_are_the_ledgers",
        "an account's entries are its payments and its lines",
        """WITH sums AS (
             SELECT e.account_no, sum(e.amount_micros) AS micros, sum(e.amount_micros)
               FILTER (WHERE t.kind <> 'usage') AS paid
             FROM ledger_entries e JOIN ledger_transactions t USING (transaction_no)
             GROUP BY e.account_no
           ), used AS (
             SELECT customer_no, NULL AS namespace,
               -sum(cpu_micros + memory_micros + egress_micros) AS micros
             FROM usage_lines GROUP BY customer_no
             UNION ALL SELECT NULL, namespace, sum(share_micros) FROM usage_lines
             WHERE namespace IS NOT NULL GROUP BY namespace
           )
           SELECT a.account_no AS subject FROM ledger_accounts a LEFT JOIN sums s USING (account_no)
           LEFT JOIN used u ON u.customer_no = a.customer_no OR u.namespace = a.namespace
           WHERE a.kind IN ('customer', 'provider')
             AND coalesce(s.micros, 0) <> coalesce(s.paid, 0) + coalesce(u.micros, 0) LIMIT 100""",
    ),
    (
        "time_is_billed_once",
        "the windows of a copy have just the time of its runs that is closed",
        """SELECT assignment_no AS subject FROM (
             SELECT assignment_no, sum(closed_us - from_us) AS ran_us FROM usage_runs
             GROUP BY assignment_no) r
           FULL JOIN (SELECT assignment_no, sum(billed_us) AS billed_us FROM usage_windows
             GROUP BY assignment_no) w USING (assignment_no)
           WHERE coalesce(ran_us, 0) <> coalesce(billed_us, 0) LIMIT 100""",
    ),
    (
        "invoices_add_up",
        "invoices are numbered without gaps, and each is the sum of its lines",
        """SELECT i.invoice_no AS subject FROM (
             SELECT *, row_number() OVER (ORDER BY invoice_no) AS number FROM invoices) i
           LEFT JOIN usage_lines l USING (customer_no, month)
           GROUP BY i.invoice_no, i.number, i.total_micros HAVING i.invoice_no <> i.number
             OR i.total_micros <> coalesce(sum(l.cpu_micros + l.memory_micros + l.egress_micros), 0)
           LIMIT 100""",
    ),
)

# What must hold after every fault: a name, a sentence, and a query that finds each violation.
INVARIANTS: tuple[tuple[str, str, str], ...] = (
    (
        "one_host_per_invite",
        "a redeemed invite belongs to exactly one host that exists",
        """SELECT i.invite_id AS subject FROM invites i LEFT JOIN hosts h ON h.host_id = i.host_id
           WHERE (i.consumed_at IS NULL) <> (i.host_id IS NULL)
             OR (i.host_id IS NOT NULL AND h.host_id IS NULL)""",
    ),
    (
        "host_has_consumed_invite",
        "every host's invite was redeemed by that host",
        """SELECT h.host_id::text AS subject FROM hosts h LEFT JOIN invites i
             ON i.invite_id = h.invite_id AND i.host_id = h.host_id WHERE i.consumed_at IS NULL""",
    ),
    (
        "one_live_session",
        "a host has at most one live session, a revoked or quarantined one none",
        """SELECT h.host_id::text AS subject FROM hosts h JOIN sessions s USING (host_no)
           WHERE s.ended_at IS NULL GROUP BY h.host_id, h.status
           HAVING count(*) > 1 OR h.status IN ('revoked', 'quarantined')""",
    ),
    (
        "one_host_per_address",
        "no two hosts that are not revoked share a tunnel address or a WireGuard key",
        """SELECT coalesce(host(wg_ip), wg_pubkey) AS subject FROM hosts WHERE status <> 'revoked'
           GROUP BY GROUPING SETS ((wg_ip), (wg_pubkey))
           HAVING count(*) > 1 AND coalesce(host(wg_ip), wg_pubkey) IS NOT NULL""",
    ),
    (
        "address_held_once",
        "only an open invite holds an address",
        """SELECT invite_id AS subject FROM invites WHERE wg_ip_held
           AND (consumed_at IS NOT NULL OR revoked_at IS NOT NULL)""",
    ),
    (
        "wallet_is_namespace",
        "a host's namespace is that of its wallet",
        """SELECT host_id::text AS subject FROM hosts
           WHERE namespace IS DISTINCT FROM 'solana:' || payout_pubkey""",
    ),
    (
        "host_has_liveness",
        "every host has its liveness row, and one that was ever seen is not pending",
        """SELECT h.host_id::text AS subject FROM hosts h LEFT JOIN liveness l USING (host_no)
           WHERE l.host_no IS NULL OR (h.status = 'pending' AND l.last_heartbeat_at IS NOT NULL)
             OR (h.status IN ('online', 'paused') AND l.last_heartbeat_at IS NULL)""",
    ),
    (
        "one_copy_per_replica",
        "a replica has at most one copy that lives, and only of a workload that has it",
        """SELECT w.workload_id::text || '/' || a.replica AS subject
           FROM assignments a JOIN workloads w USING (workload_no) WHERE a.ended_at IS NULL
           GROUP BY w.workload_id, a.replica HAVING count(*) > 1""",
    ),
    (
        "hosts_within_their_offer",
        "no two copies share a port of a host, and its list is not older than what is in it",
        """SELECT a.assignment_id::text AS subject
           FROM assignments a JOIN liveness l USING (host_no)
           WHERE a.ended_at IS NULL AND (a.stop_revision > l.desired_revision OR EXISTS (
             SELECT 1 FROM assignments b WHERE b.host_no = a.host_no AND b.ended_at IS NULL
               AND b.port_slot = a.port_slot AND b.assignment_no <> a.assignment_no))""",
    ),
    (
        "changes_are_audited",
        "each invite, host, customer, key, workload, revocation has its line in the audit log",
        """SELECT subject FROM (
             SELECT invite_id AS subject, 'invite.mint' AS action FROM invites
             UNION ALL SELECT host_id::text, 'host.register' FROM hosts
             UNION ALL SELECT host_id::text, 'host.revoke' FROM hosts WHERE status = 'revoked'
             UNION ALL SELECT invite_id, 'invite.revoke' FROM invites WHERE revoked_at IS NOT NULL
             UNION ALL SELECT customer_id::text, 'customer.add' FROM customers
             UNION ALL SELECT key_id, 'key.mint' FROM customer_keys
             UNION ALL SELECT workload_id::text, 'workload.add' FROM workloads
             UNION ALL SELECT workload_id::text, 'workload.delete' FROM workloads
               WHERE deleted_at IS NOT NULL
             UNION ALL SELECT key_id, 'key.revoke' FROM customer_keys WHERE revoked_at IS NOT NULL
           ) AS due WHERE NOT EXISTS (SELECT 1 FROM audit_log a
             WHERE a.subject = due.subject AND a.action = due.action)""",
    ),
    (
        "role_cannot_rewrite",
        "the control plane's own role cannot change what is final, nor delete anything",
        """SELECT table_name || '.' || privilege AS subject FROM information_schema.tables,
             unnest(ARRAY['DELETE', 'TRUNCATE', 'UPDATE']) AS privilege
           WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
             AND has_table_privilege(current_user, 'public.' || table_name, privilege)
           UNION ALL SELECT table_name || '.' || column_name FROM information_schema.columns
           WHERE table_schema = 'public' AND (table_name IN ('audit_log', 'schema_migrations',
               'rate_cards', 'usage_windows', 'ledger_transactions', 'ledger_entries', 'invoices')
             OR column_name IN ('created_at', 'created_by', 'expires_at', 'secret_sha256',
               'session_sha256', 'started_at', 'host_no', 'opened_by', 'customer_no', 'key_id',
               'workload_no', 'workload_id', 'assignment_no', 'assignment_id', 'replica'))
             AND has_column_privilege(current_user, 'public.' || table_name, column_name,
               'UPDATE')""",
    ),
    (
        "runs_are_closed",
        "the time of a copy that ended is in windows a day later",
        """SELECT run_no AS subject FROM usage_runs
           WHERE to_at < now() - interval '1 day' AND NOT is_closed LIMIT 100""",
    ),
    (
        "copies_that_run_are_billed",
        "a copy has an open run just while its host says that it runs and nobody stops it",
        """SELECT a.assignment_id::text AS subject FROM assignments a LEFT JOIN usage_runs r
             ON r.assignment_no = a.assignment_no AND r.to_us IS NULL
           WHERE (r.run_no IS NOT NULL)
             <> (a.state = 'running' AND a.stop_at IS NULL AND a.ended_at IS NULL
               AND a.held_until IS NULL)""",
    ),
    *LEDGER_CHECKS,
)


# ---------------------------------------------------------------------------------------------
# Store: the way to PostgreSQL. Its faults become Refusal TRY_LATER or Error, never a traceback.
# ---------------------------------------------------------------------------------------------

T = TypeVar("T")
Row = dict[str, Any]
BeatFuture = asyncio.Future[Accepted | Refusal]
BeatKey = tuple[bytes, str]  # session's hash and peer: a copy elsewhere gets its own answer


class Transaction:
    """One open transaction; every statement goes through here."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    async def rows(self, sql: str, kind: type[T], **params: object) -> list[T]:
        """The rows of a query, each as a `kind`."""
        async with self._connection.cursor(row_factory=class_row(kind)) as cursor:
            await cursor.execute(sql.encode(), params)
            return await cursor.fetchall()

    async def dicts(self, sql: str, **params: object) -> list[Row]:
        """The rows of a query as dicts."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(sql.encode(), params)
            return await cursor.fetchall()

    async def one(self, sql: str, **params: object) -> Row | None:
        """The only row of a query, or None."""
        found = await self.dicts(sql, **params)
        return found[0] if found else None

    async def the(self, sql: str, **params: object) -> Row:
        """The row of a query that always has exactly one."""
        (found,) = await self.dicts(sql, **params)
        return found

    async def copy_row(self, sql: str, types: Sequence[str], row: Sequence[object]) -> None:
        """Store a row by COPY: other than parameters, its values are never in PostgreSQL's log."""
        async with self._connection.cursor() as cursor, cursor.copy(sql.encode()) as copy:
            copy.set_types(types)
            await copy.write_row(row)

    async def execute(self, sql: str, **params: object) -> int:
        """Run a statement; give back how many rows it touched."""
        cursor = await self._connection.execute(sql.encode(), params or None)
        return cursor.rowcount


class Database:
    """A small pool of connections; `transaction()` is the only door.

    A caller waits `wait_s` for a connection. When that was too short, callers of the next `rest_s`
    are sent away at once, so that a database that is away does not hold every worker.

    The key of secrets comes with each connection, in its first message, which no log repeats.
    """

    def __init__(
        self,
        dsn: str,
        size: int = 4,
        wait_s: float = 5,
        rest_s: float = 0,
        options: str = "",
        secrets_key: str = "",
    ) -> None:
        self._dsn = dsn
        self._rest_s = rest_s
        self._away_until = 0.0
        limits = "-c statement_timeout=8s -c lock_timeout=4s -c timezone=UTC"
        options += f" -c openinfra.secrets_key={secrets_key}" if secrets_key else ""
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            dsn,
            min_size=1,
            max_size=size,
            timeout=wait_s,
            max_waiting=1_000,
            reconnect_timeout=1,
            open=False,
            check=AsyncConnectionPool.check_connection,
            kwargs={
                "options": f"{limits} -c idle_in_transaction_session_timeout=10s {options}",
                "application_name": "openinfra-cp",
                "connect_timeout": 5,
                "tcp_user_timeout": 10_000,  # a server whose machine went away without a word
                "keepalives_idle": 20,
            },
        )

    async def open(self) -> None:
        """Connect; raises Error 75 when PostgreSQL is not there, 1 when it is too old."""
        try:  # once without the pool, which hides the reason
            async with await psycopg.AsyncConnection.connect(self._dsn, connect_timeout=5) as first:
                check_server_version(first.info.server_version)
            await self._pool.open(wait=True, timeout=5)
        except (psycopg.OperationalError, PoolTimeout) as error:
            said = " ".join(str(error).split())
            await self._pool.close()
            raise Error(
                f"cannot reach PostgreSQL: {said}",
                "is it running, and is the connection string in the dsn file right?",
                75,
            ) from None

    def waiting(self) -> int:
        """How many callers wait for a connection now."""
        return self._pool.get_stats().get("requests_waiting", 0)

    async def close(self) -> None:
        """Let the connections go."""
        await self._pool.close()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction: committed at the end of the block, rolled back when it raises."""
        what, todo = "the control plane's database gives no answer", "try again in a moment"
        if time.monotonic() < self._away_until:
            raise Refusal("TRY_LATER", what, todo)
        try:
            async with self._pool.connection() as connection:
                yield Transaction(connection)
        except (psycopg.OperationalError, PoolTimeout) as error:
            if isinstance(error, PoolTimeout):
                self._away_until = time.monotonic() + self._rest_s
            log("WARN", "database gave no answer", error=type(error).__name__, said=str(error))
            raise Refusal("TRY_LATER", what, todo) from None
        except (psycopg.ProgrammingError, psycopg.InternalError) as error:
            raise Error(
                f"the database is not as it should be: {error.diag.message_primary}",
                "run: cp_server.py migrate",
            ) from None


def check_server_version(version: int) -> None:
    """Raises Error when the server is older than the schema was tested on (`150003` is 15.3)."""
    if version // 10_000 < POSTGRES_MIN:
        what = f"PostgreSQL {version // 10_000} is too old"
        raise Error(what, f"upgrade it to {POSTGRES_MIN} or newer")


def check_schema_version(found: int | None) -> None:
    """Raises Error when the database's schema is not the one of this program."""
    if found is None:
        raise Error("the database has no OpenInfra schema", "run: cp_server.py migrate")
    if found < SCHEMA_VERSION:
        what = f"the database schema is version {found}, this program needs {SCHEMA_VERSION}"
        raise Error(what, "run: cp_server.py migrate")
    if found > SCHEMA_VERSION:
        what = f"the database schema is version {found}, this program knows only {SCHEMA_VERSION}"
        raise Error(what, "upgrade cp_server.py")


async def read_schema_version(tx: Transaction) -> int | None:
    """The newest applied migration, or None without a schema."""
    there = await tx.the("SELECT to_regclass('public.schema_migrations') IS NOT NULL AS there")
    if not there["there"]:
        return None
    newest = await tx.the("SELECT max(number) AS version FROM schema_migrations")
    version: int | None = newest["version"]
    return version


# ---------------------------------------------------------------------------------------------
# Operations: one transaction each, the same ones for every edge and loop. They change the database.
# ---------------------------------------------------------------------------------------------


async def audit(tx: Transaction, actor: Actor, action: str, subject: str, **detail: object) -> None:
    """Note a change in the transaction that makes it."""
    await tx.execute(
        SQL_AUDIT, actor=actor.name, action=action, subject=subject, detail=Jsonb(detail)
    )


async def migrate(dsn: str, role: str) -> list[str]:
    """Apply what is missing, all in one transaction; give back the names; raises Error.

    `role` is the CP's own role; it is made when it is not there, and may then log in.
    """
    if not re.fullmatch("[a-z_][a-z0-9_]{0,62}", role):
        raise Error(f"{role!r} is no role name", "give lower-case letters, digits and _")
    try:
        connection = await psycopg.AsyncConnection.connect(dsn, connect_timeout=5)
    except psycopg.OperationalError as error:
        said = str(error).strip().replace("\n", " ")
        raise Error(f"cannot reach PostgreSQL: {said}", "is it running?", 75) from None
    try:
        async with connection:
            check_server_version(connection.info.server_version)
            return await _migrate(Transaction(connection), role)
    except psycopg.errors.InsufficientPrivilege as error:
        raise Error(
            f"this role may not make the schema: {error.diag.message_primary}",
            "let the owner-dsn file name the owner of the database (or a superuser)",
        ) from None
    except psycopg.Error as error:
        what = f"cannot make the schema: {error.diag.message_primary or error}"
        raise Error(what, "nothing was changed; give OpenInfra a database of its own") from None


async def _migrate(tx: Transaction, role: str) -> list[str]:
    await tx.execute(SQL_MIGRATION_LOCK)
    if not await tx.one("SELECT 1 AS found FROM pg_roles WHERE rolname = %(role)s", role=role):
        await tx.execute(f"CREATE ROLE {role} LOGIN")
    if await read_schema_version(tx) is None:
        await tx.execute(SQL_MIGRATIONS_TABLE)
        await tx.execute(f"GRANT SELECT ON schema_migrations TO {role}")
    applied = {row["number"]: bytes(row["sha256"]) for row in await tx.dicts(SQL_MIGRATION_LIST)}
    done = []
    for number, name, sql in MIGRATIONS:
        if number not in applied:
            await tx.execute(sql.replace("@ROLE@", role))
            digest = sha256(sql.encode())
            await tx.execute(SQL_MIGRATION_NOTE, number=number, name=name, sha256=digest)
            done.append(f"{number} {name}")
        elif applied[number] != sha256(sql.encode()):
            what = f"migration {number} in the database is not the one of this program"
            raise Error(what, "use the cp_server.py that made this database", 3)
    if applied and max(applied) > SCHEMA_VERSION:
        check_schema_version(max(applied))
    return done


async def mint_invite(db: Database, actor: Actor, order: InviteOrder) -> tuple[str, Invite]:
    """Mint an invite; the token is given back here and nowhere else, ever."""
    invite_id, secret = new_public_id(), secrets.token_bytes(32)
    async with db.transaction() as tx:
        if order.wg_ip:
            await tx.execute(SQL_INVITE_FREE_ADDRESS, wg_ip=order.wg_ip)
        if order.payout_pubkey:
            namespace = namespace_of(order.payout_pubkey)
            await tx.execute(SQL_NAMESPACE_ADD, namespace=namespace, approved_by=actor.name)
        try:
            await tx.execute(
                SQL_INVITE_INSERT,
                invite_id=invite_id,
                secret_sha256=sha256(secret),
                actor=actor.name,
                **dataclasses.asdict(order),
            )
        except psycopg.errors.UniqueViolation:
            what = f"another open invite holds the address {order.wg_ip}"
            raise Refusal(
                "CONFLICT", what, "revoke that invite or choose another", "wg_ip"
            ) from None
        await audit(tx, actor, "invite.mint", invite_id, **dataclasses.asdict(order))
        invite = (await tx.rows(SQL_INVITE_GET, Invite, invite_id=invite_id))[0]
    return render_token("oi1", invite_id, secret), invite


async def list_invites(db: Database, values: Mapping[str, Any]) -> list[Invite]:
    """A page of invites, newest first."""
    async with db.transaction() as tx:
        return await tx.rows(SQL_INVITE_LIST, Invite, **values)


async def revoke_invite(db: Database, actor: Actor, invite_id: str) -> Invite:
    """Take an invite back; doing it twice changes nothing; raises Refusal for a redeemed one."""
    async with db.transaction() as tx:
        if await tx.execute(SQL_INVITE_REVOKE, invite_id=invite_id):
            await audit(tx, actor, "invite.revoke", invite_id)
        found = await tx.rows(SQL_INVITE_GET, Invite, invite_id=invite_id)
    if not found:
        raise Refusal("NOT_FOUND", "no such invite", "list them: GET /api/v1/admin/host-invites")
    if found[0].state == "used":
        what = f"this invite was redeemed by host {found[0].host_id}"
        raise Refusal("CONFLICT", what, "revoke the host instead")
    return found[0]


def check_invite(invite: Row, registration: Registration) -> None:
    """Raises Refusal when an invite that nobody redeemed cannot be redeemed by this one."""
    todo = "ask the operator for a fresh invite"
    if invite["state"] == "revoked":
        raise Refusal("INVITE_REVOKED", "the operator took this invite back", todo)
    if invite["state"] == "expired":
        when = f"{invite['expires_at']:%Y-%m-%d %H:%M} UTC"
        raise Refusal("INVITE_EXPIRED", f"this invite expired at {when}", todo)
    check_invite_key(invite, registration)


def check_invite_key(invite: Row, registration: Registration) -> None:
    """Raises Refusal when an invite was minted for another WireGuard key."""
    if invite["wg_pubkey"] not in (None, registration.wg_pubkey):
        todo = "ask the operator for a fresh invite"
        raise Refusal("INVITE_FOR_OTHER_KEY", "this invite is for another WireGuard key", todo)


async def register(
    db: Database, registration: Registration, interval_ms: int, is_proven: bool = True
) -> Host:
    """Redeem an invite; raises Refusal. A repeated request gets the same host.

    Raises UnprovenKeyError, with nothing done, when all is well but for the proof of its key.
    """
    try:
        async with db.transaction() as tx:
            outcome = await _redeem(tx, registration, interval_ms)
            if not (is_proven or isinstance(outcome, Refusal)):
                raise UnprovenKeyError
            failpoint("Register.before_commit")
    except psycopg.errors.UniqueViolation:
        what = "another registration with the same key or address came at the same time"
        raise Refusal("TRY_LATER", what, "try again in a moment") from None
    if isinstance(outcome, Refusal):  # its line in the audit log is committed
        raise outcome
    return outcome


async def _redeem(tx: Transaction, reg: Registration, interval_ms: int) -> Host | Refusal:
    token = reg.token
    invite = await tx.one(SQL_INVITE_LOCK, invite_id=token.public_id)
    known = bytes(invite["secret_sha256"]) if invite else bytes(32)
    if not hmac.compare_digest(known, sha256(token.secret)) or invite is None:
        raise Refusal("UNKNOWN_INVITE", "unknown invite", "ask the operator for a fresh invite")
    if invite["host_id"] is None:
        check_invite(invite, reg)
    claims = await tx.dicts(
        SQL_CLAIMANTS,
        host_secret_sha256=reg.host_secret_sha256,
        wg_ip=reg.wg_ip,
        wg_pubkey=reg.wg_pubkey,
    )
    by = {
        how: next(
            (Claimant(c["host_no"], c["host_id"], c["status"]) for c in claims if c[how]), None
        )
        for how in ("by_secret", "by_key", "by_address")
    }
    if invite["host_id"] is not None:
        if by["by_secret"] is None or by["by_secret"].host_id != invite["host_id"]:
            detail = Jsonb({"peer": reg.wg_ip, "host_id": str(invite["host_id"])})
            await tx.execute(
                SQL_AUDIT_ONCE,
                actor=f"invite:{token.public_id}",
                action="invite.reuse_refused",
                subject=token.public_id,
                detail=detail,
            )
            return Refusal("INVITE_USED", "invite already used", "ask the operator for a fresh one")
        check_invite_key(invite, reg)
    # An invite that was itself minted for the key has the right to it, whatever others say.
    key = None if invite["wg_pubkey"] else reg.wg_pubkey
    kept = await tx.dicts(
        SQL_INVITE_KEPT, invite_id=token.public_id, wg_ip=reg.wg_ip, wg_pubkey=key
    )
    kinds = frozenset(kind for row in kept for kind in row if row[kind])
    claimant = decide_redemption(by["by_secret"], by["by_key"], by["by_address"], kinds)
    if invite["host_id"] is not None:  # the same request again, as after a lost answer
        secret, session, peer_check = reg.host_secret_sha256, reg.session_sha256, bool(reg.wg_ip)
        again = Resumption(secret, session, b"", reg.payout_pubkey, reg.wg_ip, reg.wg_pubkey)
        return await _resume(tx, again, peer_check)
    if claimant is None:
        host_no, host_id = await _insert_host(tx, reg, invite, interval_ms)
    else:
        host_no, host_id = claimant.host_no, claimant.host_id
        await _rekey_host(tx, reg, invite, claimant)
    await tx.execute(SQL_INVITE_CONSUME, invite_id=token.public_id, host_id=host_id)
    host = await _get_host(tx, host_id)
    if host.status == "quarantined":
        return quarantined()
    await _open_session(tx, host_no, reg.session_sha256, "register")
    return host


async def _insert_host(
    tx: Transaction, reg: Registration, invite: Row, interval_ms: int
) -> tuple[int, uuid.UUID]:
    host_id, invite_id = uuid.uuid4(), reg.token.public_id
    wallet, _ = decide_wallet(None, reg.payout_pubkey, invite["payout_pubkey"], False)
    await _name_wallet(tx, invite, wallet)
    row = await tx.the(
        SQL_HOST_INSERT,
        host_id=host_id,
        invite_id=invite_id,
        host_secret_sha256=reg.host_secret_sha256,
        wg_ip=reg.wg_ip,
        wg_pubkey=reg.wg_pubkey,
        payout_pubkey=wallet,
        namespace=namespace_of(wallet) if wallet else None,
        **dataclasses.asdict(reg.facts),
    )
    await tx.execute(SQL_LIVENESS_INSERT, host_no=row["host_no"], interval_ms=interval_ms)
    detail = {"invite_id": invite_id, "wg_ip": reg.wg_ip, "payout_pubkey": wallet}
    await audit(tx, Actor(f"invite:{invite_id}"), "host.register", str(host_id), **detail)
    return row["host_no"], host_id


async def _rekey_host(tx: Transaction, reg: Registration, invite: Row, host: Claimant) -> None:
    before = await tx.the(
        SQL_HOST_REKEY,
        host_no=host.host_no,
        invite_id=reg.token.public_id,
        host_secret_sha256=reg.host_secret_sha256,
        wg_ip=reg.wg_ip,
        wg_pubkey=reg.wg_pubkey,
    )
    await tx.execute(SQL_ASSIGNMENT_HOLD, host_no=host.host_no, lease_s=LEASE_S)
    current = (await tx.rows(SQL_HOST_GET, Host, host_id=host.host_id))[0]
    await _set_wallet(tx, current, reg.payout_pubkey, invite)
    actor = Actor(f"invite:{reg.token.public_id}")
    await audit(tx, actor, "host.rekey", str(host.host_id), wg_ip=reg.wg_ip)
    keys = {"before": before["wg_pubkey"], "after": reg.wg_pubkey}
    if keys["before"] not in (None, reg.wg_pubkey):
        await audit(tx, actor, "host.wg_key", str(host.host_id), **keys)


async def _name_wallet(tx: Transaction, invite: Row | None, wallet: str | None) -> None:
    """Make a wallet's namespace known; approve it when the invite says so."""
    if wallet is None:
        return
    first = invite is not None and invite["approve_first_wallet"] and not invite["payout_pubkey"]
    approver = f"invite:{invite['invite_id']}" if invite is not None and first else None
    await tx.execute(SQL_NAMESPACE_ADD, namespace=namespace_of(wallet), approved_by=approver)


async def _set_wallet(tx: Transaction, host: Host, asked: str | None, invite: Row | None) -> None:
    """Give a host the wallet that it asks for, as far as it still may."""
    current, invited = host.payout_pubkey, host.invite_payout_pubkey
    wallet, refused = decide_wallet(current, asked, invited, host.ever_assigned)
    is_same = (wallet, refused) == (current, host.requested_payout_pubkey)
    if invite is not None or not is_same:  # an invite may approve the wallet that stays
        await _name_wallet(tx, invite, wallet)
    if is_same:
        return
    await tx.execute(
        SQL_HOST_WALLET,
        host_no=host.host_no,
        payout_pubkey=wallet,
        namespace=namespace_of(wallet) if wallet else None,
        requested=refused,
    )
    actor, subject = Actor(f"host:{host.host_id}"), str(host.host_id)
    detail = {"before": current, "after": wallet, "refused": refused}
    await audit(tx, actor, "host.wallet", subject, **detail)


async def _claim_session(
    tx: Transaction, host: Host, asked: bytes, previous: bytes, peer: str | None
) -> Refusal | None:
    """Open a session for a host that has one; too many takeovers quarantine it, which is kept."""
    live = await tx.the(
        SQL_SESSION_LIVE, host_no=host.host_no, asked=asked, window_s=TAKEOVER_WINDOW_S
    )
    live_sha256 = bytes(live["session_sha256"]) if live["session_sha256"] else None
    decision = decide_resume(
        live_sha256, asked, previous, live["ended"], live["takeovers"], live["opened"]
    )
    actor, subject = Actor(f"host:{host.host_id}"), str(host.host_id)
    if decision == "superseded":
        raise superseded()
    if decision == "flood":
        what = f"this host opened {live['opened']} sessions in {TAKEOVER_WINDOW_S // 60} minutes"
        raise Refusal("TRY_LATER", what, "look why the agent starts again and again")
    if decision == "quarantine":
        await tx.execute(SQL_HOST_QUARANTINE, host_no=host.host_no)
        await tx.execute(SQL_SESSION_END, host_no=host.host_no)
        await audit(tx, actor, "host.quarantine", subject, peer=peer)
        log("WARN", "host quarantined", host_id=subject)
        return quarantined()
    how = "takeover" if decision == "takeover" else "resume"
    await _open_session(tx, host.host_no, asked, how)
    if decision == "takeover":
        await tx.execute(SQL_ASSIGNMENT_HOLD, host_no=host.host_no, lease_s=LEASE_S)
        await audit(tx, actor, "host.takeover", subject, peer=peer)
    return None


async def _open_session(tx: Transaction, host_no: int, session: bytes, opened_by: str) -> None:
    """Make this the host's live session, or go on with it when it is; raises Refusal."""
    known = await tx.one(SQL_SESSION_FIND, session_sha256=session)
    if known is not None and known["host_no"] == host_no and known["live"]:
        await tx.execute(SQL_SESSION_AGAIN, session_sha256=session)
        return
    if known is not None and known["host_no"] == host_no:
        raise superseded()
    if known is not None:
        what = "this session belongs to another host"
        raise Refusal("BAD_REQUEST", what, "restart the agent", "session")
    await tx.execute(SQL_SESSION_END, host_no=host_no)
    await tx.execute(SQL_SESSION_OPEN, session_sha256=session, host_no=host_no, opened_by=opened_by)


async def resume(db: Database, res: Resumption, peer_check: bool, is_proven: bool = True) -> Host:
    """Open a session for a host; raises Refusal. A repeated request changes nothing.

    Raises UnprovenKeyError, with nothing done, when it comes with another key than it had.
    """
    try:
        async with db.transaction() as tx:
            outcome = await _resume(tx, res, peer_check, is_proven)
            failpoint("Resume.before_commit")
    except psycopg.errors.UniqueViolation:
        what = "another host has this WireGuard key"
        todo = "make a new key: install_agent.py --new-key"
        raise Refusal("KEY_TAKEN", what, todo) from None
    if isinstance(outcome, Refusal):  # the quarantine is committed
        raise outcome
    return outcome


async def _resume(
    tx: Transaction, res: Resumption, peer_check: bool, is_proven: bool = True
) -> Host | Refusal:
    secret = res.host_secret_sha256
    found = await tx.rows(SQL_HOST_LOCK_BY_SECRET, Host, host_secret_sha256=secret)
    if not found:
        what = "the control plane knows no host with this identity"
        raise Refusal("UNKNOWN_HOST", what, "ask the operator whether a backup was restored")
    host = found[0]
    if host.status == "revoked":
        raise revoked()
    if peer_check and host.wg_ip != res.wg_ip:
        what = f"this host's address in the tunnel is {host.wg_ip}, the call came from {res.wg_ip}"
        raise Refusal("WRONG_ADDRESS", what, "set the address in /etc/wireguard/openinfra.conf")
    if host.status == "quarantined":
        raise quarantined()
    asked, previous = res.session_sha256, res.previous_sha256
    refused = await _claim_session(tx, host, asked, previous, res.wg_ip)
    if refused:
        return refused
    await _check_changes(tx, host, res)
    if not is_proven and res.wg_pubkey not in (None, host.wg_pubkey):
        raise UnprovenKeyError
    first = host.payout_pubkey is None  # then the invite may say that it is approved
    invite = await tx.one(SQL_INVITE_GET, invite_id=host.invite_id) if first else None
    await _set_wallet(tx, host, res.payout_pubkey, invite)
    actor, subject = Actor(f"host:{host.host_id}"), str(host.host_id)
    if res.wg_pubkey and await tx.execute(
        SQL_HOST_KEY, host_no=host.host_no, wg_pubkey=res.wg_pubkey
    ):
        await audit(tx, actor, "host.wg_key", subject, before=host.wg_pubkey, after=res.wg_pubkey)
    return (await tx.rows(SQL_HOST_GET, Host, host_id=host.host_id))[0]


async def _check_changes(tx: Transaction, host: Host, res: Resumption) -> None:
    """Raises Refusal when a host may not change to this key, or changes too often."""
    new_key = res.wg_pubkey not in (None, host.wg_pubkey)
    if new_key:
        kept = await tx.dicts(
            SQL_INVITE_KEPT, invite_id=host.invite_id, wg_ip=None, wg_pubkey=res.wg_pubkey
        )
        if kept:
            raise key_kept()
    known = (None, host.payout_pubkey, host.requested_payout_pubkey)
    if new_key or res.payout_pubkey not in known:
        count = await tx.the(SQL_HOST_CHANGES, host_id=str(host.host_id))
        if count["changes"] >= CHANGES_MAX:
            what = f"this host changed its wallet or key {count['changes']} times in a day"
            raise Refusal("TRY_LATER", what, "set them for good, and try again tomorrow")


async def record_heartbeats(
    db: Database, beats: Sequence[Beat], peer_check: bool, registry: str = ""
) -> tuple[dict[BeatKey, Accepted | Refusal], int]:
    """Commit a batch of heartbeats, one a session and peer; give back an answer for each.

    And how many assignments changed by what the hosts have of them.
    """
    answers: dict[BeatKey, Accepted | Refusal] = {}
    flipped: list[tuple[str, uuid.UUID, str]] = []
    told: dict[int, list[Beat]] = {}  # by host_no: those whose standing has reasons
    async with db.transaction() as tx:
        rows = await tx.dicts(
            SQL_HEARTBEATS,
            intervals=OFFLINE_AFTER_INTERVALS,
            peer_check=peer_check,
            session_sha256=[beat.session_sha256 for beat in beats],
            peer=[beat.peer for beat in beats],
            interval_ms=[beat.interval_ms for beat in beats],
            seq=[beat.seq for beat in beats],
            boot_id=[beat.boot_id for beat in beats],
            status=[beat.status for beat in beats],
        )
        accepted = [(row, beats[row["number"] - 1]) for row in rows]
        for row, beat in accepted:
            answers[beat.session_sha256, beat.peer] = Accepted(row["host_no"], PLAIN_STANDING)
            if beat.facts:
                values = dataclasses.asdict(beat.facts)
                await tx.execute(SQL_HOST_FACTS, host_no=row["host_no"], **values)
            if not row["is_plain"] or beat.facts:
                told.setdefault(row["host_no"], []).append(beat)
            if row["flipped_host_id"]:
                flipped.append((beat.status, row["flipped_host_id"], row["old_status"]))
        if told:
            for host in await tx.rows(SQL_HEARTBEAT_HOSTS, Host, host_nos=list(told)):
                for beat in told[host.host_no]:
                    standing = decide_standing(dataclasses.replace(host, status=beat.status))
                    answers[beat.session_sha256, beat.peer] = Accepted(host.host_no, standing)
        changed = await _record_observed(tx, accepted)
        await _record_counters(tx, accepted)
        await _add_earnings(tx, accepted, answers)
        await _add_desired(tx, accepted, answers, registry)
        refused = [beat for beat in beats if (beat.session_sha256, beat.peer) not in answers]
        if refused:
            sessions = [beat.session_sha256 for beat in refused]
            found = await tx.dicts(SQL_HEARTBEAT_WHY, sessions=sessions)
            why = {bytes(row["session_sha256"]): row for row in found}
            for beat in refused:
                key = (beat.session_sha256, beat.peer)
                answers[key] = decide_heartbeat_refusal(why.get(beat.session_sha256), beat.peer)
        failpoint("Heartbeat.before_commit")
    for status, host_id, old in flipped:
        log("INFO", f"host {status}", host_id=host_id, was=old)
    return answers, changed


async def _record_observed(tx: Transaction, accepted: Sequence[tuple[Row, Beat]]) -> int:
    """Keep what hosts have of their assignments; give back how many of these changed.

    Not what comes late: a copy that ended since would run, and be billed, until it changes again.
    """
    said = [
        (row["host_no"], beat.observed)
        for row, beat in accepted
        if beat.observed and not row["is_late"]
    ]
    if not said:
        return 0
    each = [(host_no, one) for host_no, observed in said for one in observed.assignments]
    ids = [one.assignment_id for _, one in each]
    changed = 0
    if each:
        row = await tx.the(
            SQL_OBSERVED,
            host_no=[host_no for host_no, _ in each],
            assignment_id=ids,
            state=[one.state for _, one in each],
            reason=[one.reason for _, one in each],
            restarts=[one.restarts for _, one in each],
            exit_code=[one.exit_code for _, one in each],
        )
        changed = row["changed"]
    return changed + await tx.execute(
        SQL_OBSERVED_GONE,
        host_no=[host_no for host_no, _ in said],
        revision=[observed.revision for _, observed in said],
        assignment_id=ids,
    )


async def _record_counters(tx: Transaction, accepted: Sequence[tuple[Row, Beat]]) -> None:
    """Keep what hosts counted."""
    each = [
        {"host_no": row["host_no"], **vars(one)} for row, beat in accepted for one in beat.counters
    ]
    if each:
        limits = {"late_s": USAGE_LATE_S, "kept": COUNTERS_KEPT, "most": EGRESS_MAX_BYTES}
        limits["slack_s"] = COUNTERS_SLACK_US // 1_000_000
        limits["bytes_s"] = EGRESS_MAX_BYTES_PER_US * 1_000_000
        dropped = await tx.the(SQL_USAGE_COUNT, **columns_of(each, *each[0]), **limits)
        if any(dropped.values()):
            log("WARN", "counters dropped: they are too late, or of too many containers", **dropped)


async def _add_earnings(
    tx: Transaction,
    accepted: Sequence[tuple[Row, Beat]],
    answers: dict[BeatKey, Accepted | Refusal],
) -> None:
    """Add what its provider earned this month to the answer of each host that sent counters.

    And once in a session, with its facts, if it is anything: an agent that starts has forgotten it.
    """
    asked = {row["host_no"]: beat for row, beat in accepted if beat.counters or beat.facts}
    rows = await tx.dicts(SQL_EARNINGS, host_nos=list(asked)) if asked else []
    for row in rows:
        beat = asked[row["host_no"]]
        key = (beat.session_sha256, beat.peer)
        answer = answers[key]
        if isinstance(answer, Accepted) and (beat.counters or row["micros"]):
            earned = (row["month"], row["micros"])
            answers[key] = dataclasses.replace(answer, earnings=earned)


async def _add_desired(
    tx: Transaction,
    accepted: Sequence[tuple[Row, Beat]],
    answers: dict[BeatKey, Accepted | Refusal],
    registry: str,
) -> None:
    """Add the list of what it is to run to the answer of each host that has another one."""
    late = [(row, b) for row, b in accepted if row["desired_revision"] != b.desired_revision]
    if not late:
        return
    wanted: dict[int, list[pb.Assignment]] = {row["host_no"]: [] for row, _ in late}
    for found in await tx.dicts(SQL_DESIRED, host_nos=list(wanted)):
        wanted[found["host_no"]].append(render_assignment(found, registry))
    for row, beat in late:
        key = (beat.session_sha256, beat.peer)
        answer = answers[key]
        if isinstance(answer, Accepted):
            desired = pb.Desired(
                revision=row["desired_revision"], assignments=wanted[row["host_no"]]
            )
            answers[key] = dataclasses.replace(answer, desired=desired)


def decide_heartbeat_refusal(row: Row | None, peer: str) -> Refusal:
    """Why a session's heartbeat was not accepted; None: there is no such session."""
    if row is None:
        return Refusal("UNKNOWN_SESSION", "no such session", "the agent resumes by itself")
    if row["status"] == "revoked":
        return revoked()
    if row["status"] == "quarantined":
        return quarantined()
    if row["ended_at"] is not None and row["superseded"]:
        return superseded()
    if row["ended_at"] is not None:
        return Refusal("UNKNOWN_SESSION", "this session is over", "the agent resumes by itself")
    what = f"this host's address in the tunnel is {row['wg_ip']}, the call came from {peer}"
    return Refusal("WRONG_ADDRESS", what, "set the address in /etc/wireguard/openinfra.conf")


async def sweep(db: Database, gap_s: float) -> list[str]:
    """Give a sign of life, then mark the silent hosts offline; give back their ids."""
    async with db.transaction() as tx:
        await tx.execute(SQL_ALIVE, gap_s=gap_s)
        rows = await tx.dicts(SQL_SWEEP_OFFLINE, intervals=OFFLINE_AFTER_INTERVALS)
    return [str(row["host_id"]) for row in rows]


async def prune(db: Database) -> int:
    """Forget sessions that ended long ago; give back how many, at most PRUNE_MAX."""
    async with db.transaction() as tx:
        row = await tx.the(SQL_PRUNE, most=PRUNE_MAX)
    gone: int = row["gone"]
    return gone


async def list_hosts(db: Database, values: Mapping[str, Any]) -> list[Host]:
    """A page of hosts in the order of registration."""
    used = [sql for name, sql in HOST_LIST_FILTERS.items() if values[name] is not None]
    async with db.transaction() as tx:
        return await tx.rows(SQL_HOST_LIST.format(filters="\n".join(used)), Host, **values)


async def get_host(db: Database, host_id: uuid.UUID) -> Host:
    """One host; raises Refusal."""
    async with db.transaction() as tx:
        return await _get_host(tx, host_id)


async def _get_host(tx: Transaction, host_id: uuid.UUID) -> Host:
    found = await tx.rows(SQL_HOST_GET, Host, host_id=host_id)
    if not found:
        raise Refusal("NOT_FOUND", "no such host", "list them: GET /api/v1/admin/hosts")
    return found[0]


async def revoke_host(db: Database, actor: Actor, host_id: uuid.UUID) -> Host:
    """Remove a host for good: state, then session; doing it twice changes nothing."""
    async with db.transaction() as tx:
        changed = await tx.one(SQL_HOST_REVOKE, host_id=host_id)
        if changed:
            await tx.execute(SQL_SESSION_END, host_no=changed["host_no"])
            await audit(tx, actor, "host.revoke", str(host_id))
        return await _get_host(tx, host_id)


async def release_host(db: Database, actor: Actor, host_id: uuid.UUID) -> Host:
    """Release a host from quarantine; raises Refusal when it is not there."""
    async with db.transaction() as tx:
        if await tx.one(SQL_HOST_RELEASE, host_id=host_id):
            await audit(tx, actor, "host.release", str(host_id))
            return await _get_host(tx, host_id)
        host = await _get_host(tx, host_id)
    what = f"this host is {host.status}, not quarantined"
    raise Refusal("CONFLICT", what, "nothing needs to be released")


async def drain_host(db: Database, actor: Actor, host_id: uuid.UUID, drain: bool) -> Host:
    """Move a host's work elsewhere and give it no more, or end that; twice changes nothing."""
    sql, action = (SQL_HOST_DRAIN, "host.drain") if drain else (SQL_HOST_UNDRAIN, "host.undrain")
    async with db.transaction() as tx:
        if await tx.one(sql, host_id=host_id):
            await audit(tx, actor, action, str(host_id))
        host = await _get_host(tx, host_id)
    if host.status == "revoked":
        what = "this host is revoked"
        raise Refusal("CONFLICT", what, "it gets no work any more, whatever is drained")
    return host


async def label_host(
    db: Database, actor: Actor, host_id: uuid.UUID, labels: Mapping[str, str]
) -> Host:
    """Give a host these labels and no others; what runs there stays; raises Refusal."""
    async with db.transaction() as tx:
        if await tx.one(SQL_HOST_LABEL, host_id=host_id, labels=Jsonb(dict(labels))):
            await audit(tx, actor, "host.label", str(host_id), **labels)
        host = await _get_host(tx, host_id)
    if host.status == "revoked":
        raise Refusal("CONFLICT", "this host is revoked", "it gets no work any more")
    return host


async def list_namespaces(db: Database, values: Mapping[str, Any]) -> list[Row]:
    """A page of namespaces."""
    async with db.transaction() as tx:
        return await tx.dicts(SQL_NAMESPACE_LIST, namespace=None, **values)


async def approve_namespace(db: Database, actor: Actor, namespace: str) -> Row:
    """Approve a known namespace; doing it twice changes nothing; raises Refusal."""
    async with db.transaction() as tx:
        if await tx.execute(SQL_NAMESPACE_APPROVE, namespace=namespace, actor=actor.name):
            await audit(tx, actor, "namespace.approve", namespace)
        page = {"limit": 1, "cursor": 0}
        found = await tx.one(SQL_NAMESPACE_LIST, namespace=namespace, **page)
    if found is None:
        raise Refusal("NOT_FOUND", "no such namespace", "list: GET /api/v1/admin/namespaces")
    return found


async def add_customer(db: Database, actor: Actor, name: str, namespace: str) -> Customer:
    """Add a customer with its first namespace; raises Refusal."""
    customer_id = uuid.uuid4()
    async with db.transaction() as tx:
        row = await tx.the(
            SQL_CUSTOMER_INSERT, customer_id=customer_id, name=name, actor=actor.name
        )
        await _insert_namespace(tx, namespace, row["customer_no"])
        names = {"name": name, "namespace": namespace}
        await audit(tx, actor, "customer.add", str(customer_id), **names)
        return await _get_customer(tx, customer_id)


async def add_namespace(
    db: Database, actor: Actor, customer_id: uuid.UUID, namespace: str
) -> Customer:
    """Add a namespace to a customer, for good; one that it has is no change. Raises Refusal."""
    async with db.transaction() as tx:
        customer = await _get_customer(tx, customer_id)
        await tx.execute(SQL_CUSTOMER_LOCK, customer_no=customer.customer_no)
        customer = await _get_customer(tx, customer_id)
        if namespace in customer.namespaces:
            return customer
        if len(customer.namespaces) >= CUSTOMER_NAMESPACES_MAX:
            what = f"this customer has {len(customer.namespaces)} namespaces already"
            raise Refusal("CONFLICT", what, "use one of them", "namespace")
        await _insert_namespace(tx, namespace, customer.customer_no)
        await audit(tx, actor, "customer.namespace", str(customer_id), namespace=namespace)
        return await _get_customer(tx, customer_id)


async def _insert_namespace(tx: Transaction, namespace: str, customer_no: int) -> None:
    which = {"namespace": namespace, "customer_no": customer_no}
    if not await tx.execute(SQL_CUSTOMER_NAMESPACE_INSERT, **which):
        what = f"another customer has the namespace {namespace}"
        raise Refusal("CONFLICT", what, "choose another", "namespace")


async def _get_customer(tx: Transaction, customer_id: uuid.UUID) -> Customer:
    page = {"limit": 1, "cursor": 0}
    found = await tx.rows(SQL_CUSTOMER_LIST, Customer, customer_id=customer_id, **page)
    if not found:
        raise Refusal("NOT_FOUND", "no such customer", "list them: GET /api/v1/admin/customers")
    return found[0]


async def get_customer(db: Database, customer_id: uuid.UUID) -> Customer:
    """One customer; raises Refusal."""
    async with db.transaction() as tx:
        return (await _add_balances(tx, [await _get_customer(tx, customer_id)]))[0]


async def list_customers(db: Database, values: Mapping[str, Any]) -> list[Customer]:
    """A page of customers in the order in which they were added."""
    async with db.transaction() as tx:
        found = await tx.rows(SQL_CUSTOMER_LIST, Customer, customer_id=None, **values)
        return await _add_balances(tx, found)


async def _add_balances(tx: Transaction, customers: Sequence[Customer]) -> list[Customer]:
    """The same with their balances, which the ledger tells."""
    rows = await tx.dicts(SQL_BALANCES, customer_nos=[each.customer_no for each in customers])
    found = {row["customer_no"]: row["balance_micros"] for row in rows}
    return [dataclasses.replace(each, balance_micros=found[each.customer_no]) for each in customers]


async def mint_key(
    db: Database, actor: Actor, customer_id: uuid.UUID, note: str
) -> tuple[str, CustomerKey]:
    """Make a key of a customer; its text is given back here and nowhere else, ever."""
    key_id, secret = new_public_id(), secrets.token_bytes(32)
    async with db.transaction() as tx:
        customer = await _get_customer(tx, customer_id)
        await tx.execute(SQL_CUSTOMER_LOCK, customer_no=customer.customer_no)
        row = await tx.the(SQL_KEY_COUNT, customer_no=customer.customer_no)
        if row["keys"] >= CUSTOMER_KEYS_MAX:
            what = f"this customer has {row['keys']} keys already"
            raise Refusal("CONFLICT", what, "revoke those that are not needed")
        await tx.execute(
            SQL_KEY_INSERT,
            key_id=key_id,
            customer_no=customer.customer_no,
            secret_sha256=sha256(secret),
            note=note,
            actor=actor.name,
        )
        await audit(tx, actor, "key.mint", key_id, customer_id=str(customer_id), note=note)
        key = await _get_key(tx, key_id, customer_id)
    return render_token("oik1", key_id, secret), key


async def _get_key(tx: Transaction, key_id: str, customer_id: uuid.UUID | None) -> CustomerKey:
    which = {"key_id": key_id, "customer_id": customer_id}
    found = await tx.rows(SQL_KEY_LIST, CustomerKey, limit=1, cursor=0, **which)
    if not found:
        todo = "list them: GET /api/v1/admin/customers/{customer_id}/keys"
        raise Refusal("NOT_FOUND", "no such key", todo)
    return found[0]


async def list_keys(
    db: Database, customer_id: uuid.UUID, values: Mapping[str, Any]
) -> list[CustomerKey]:
    """A page of a customer's keys, newest first; raises Refusal."""
    async with db.transaction() as tx:
        await _get_customer(tx, customer_id)
        which = {"key_id": None, "customer_id": customer_id}
        return await tx.rows(SQL_KEY_LIST, CustomerKey, **which, **values)


async def revoke_key(
    db: Database, actor: Actor, key_id: str, customer_id: uuid.UUID | None = None
) -> CustomerKey:
    """Take a key back for good; doing it twice changes nothing; raises Refusal."""
    async with db.transaction() as tx:
        await _get_key(tx, key_id, customer_id)
        if await tx.execute(SQL_KEY_REVOKE, key_id=key_id):
            await audit(tx, actor, "key.revoke", key_id)
        return await _get_key(tx, key_id, customer_id)


async def find_customer(db: Database, token: Token) -> Customer | None:
    """The customer whose key this is; None for an unknown or revoked one."""
    async with db.transaction() as tx:
        row = await tx.one(SQL_KEY_FIND, key_id=token.public_id)
    known = bytes(row.pop("secret_sha256")) if row else bytes(32)
    if not hmac.compare_digest(known, sha256(token.secret)) or row is None:
        return None
    return Customer(**row)


def read_room(directory: str) -> tuple[int, int]:
    """Free and all bytes of the disk that the registry fills; raises Refusal."""
    try:
        disk = os.statvfs(directory)
    except OSError as error:
        log("ERROR", "the registry's disk is not there", path=directory, error=error.strerror)
        what = "the registry's disk is not there"
        raise Refusal("TRY_LATER", what, "the operator has to look") from None
    return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


def read_digest(registry_url: str, image: str) -> str:
    """Look up which digest `name:tag` has in the registry just now; raises Refusal. Blocks.

    A tag may be another image tomorrow, and all copies of a workload are of one.
    """
    name, _, tag = image.rpartition(":")
    url = urllib.parse.urlsplit(f"{registry_url}/v2/{name}/manifests/{tag}")
    connection = http.client.HTTPConnection(url.netloc, timeout=REGISTRY_TIMEOUT_S)
    try:
        connection.request("HEAD", url.path, headers={"Accept": ", ".join(MANIFEST_TYPES)})
        answer = connection.getresponse()
        digest = answer.headers.get("Docker-Content-Digest", "")
    except (OSError, http.client.HTTPException) as error:
        log("ERROR", "the registry does not answer", "look: systemctl status docker-registry")
        what = f"the registry does not answer ({type(error).__name__})"
        raise Refusal("TRY_LATER", what, "try again, or name the digest", "image") from None
    finally:
        connection.close()
    if answer.status == 404:
        todo = f"push it, or look: GET /v2/{name}/tags/list"
        raise Refusal("BAD_REQUEST", f"the registry has no {image}", todo, "image")
    if answer.status != 200 or not re.fullmatch(_DIGEST, digest):
        what = f"the registry's answer for {image} cannot be read (HTTP status {answer.status})"
        raise Refusal("TRY_LATER", what, "name the digest", "image")
    return f"{name}@{digest}"


async def check_pull(db: Database, shown: bytes, call: RegistryCall) -> None:
    """Let a host pull what it is to run; raises Refusal.

    It shows the hash of its session: that is nothing to send a heartbeat with. The database has a
    hash of that only.
    """
    async with db.transaction() as tx:
        row = await tx.one(SQL_PULL_RIGHT, session_sha256=sha256(shown), repository=call.repository)
    if row is None:
        raise Refusal("UNAUTHORIZED", "no such host", "the agent sends what it has")
    if call.is_write or (call.repository and not (row["may"] and call.has_digest)):
        what = f"this host has nothing to run out of {call.repository}"
        raise Refusal("FORBIDDEN", what, "a host pulls, by digest, what its assignments need")


async def put_workload(
    db: Database, actor: Actor, customer: Customer, order: WorkloadOrder
) -> tuple[bool, Workload]:
    """Make a workload, or change the one of this name; twice changes nothing; raises Refusal.

    True when it was made.
    """
    names = {"namespace": order.namespace, "name": order.name}
    async with db.transaction() as tx:
        await tx.execute(SQL_CUSTOMER_LOCK, customer_no=customer.customer_no)
        found = await tx.rows(SQL_WORKLOAD_LOCK, Workload, **names)
        if not found or is_more(order, found[0]):
            check_credit_left(customer)
        secret_names, is_secret = await _compare_secrets(tx, found, order.secrets)
        spec = {**order.spec, **({"secrets": secret_names} if secret_names else {})}
        values = {"replicas": order.replicas, "spec": Jsonb(spec)}
        detail = {"replicas": order.replicas, "image": spec["image"], "secrets": secret_names}
        row: Row = {}
        if found:
            workload_id, workload_no = found[0].workload_id, found[0].workload_no
            if is_secret or (found[0].replicas, found[0].spec) != (order.replicas, spec):
                which = {"workload_no": workload_no, "is_secret": is_secret}
                row = await tx.the(SQL_WORKLOAD_CHANGE, **which, **values)
                await audit(tx, actor, "workload.change", str(workload_id), **detail)
        else:
            count = await tx.the(SQL_WORKLOAD_COUNT, customer_no=customer.customer_no)
            if count["workloads"] >= WORKLOADS_MAX:
                what = f"you have {count['workloads']} workloads, which is the most"
                raise Refusal("CONFLICT", what, "delete those that are not needed")
            workload_id = uuid.uuid4()
            row = await tx.the(
                SQL_WORKLOAD_INSERT,
                workload_id=workload_id,
                actor=actor.name,
                **names,
                **values,
            )
            await audit(tx, actor, "workload.add", str(workload_id), **names, **detail)
        if is_secret:
            text = json.dumps(order.secrets, ensure_ascii=False).encode()
            columns = (row["workload_no"], row["revision"], text)
            await tx.copy_row(SQL_SECRETS_INSERT, ("int8", "int4", "bytea"), columns)
        return not found, await _get_workload(tx, customer, workload_id)


async def _compare_secrets(
    tx: Transaction, found: Sequence[Workload], given: Mapping[str, str] | None
) -> tuple[list[str], bool]:
    """The names of the secrets that a workload is to have, and whether there is one to store."""
    there = found[0].spec.get("secrets", []) if found else []
    if given is None:
        return there, False
    opened = None
    if given and there:
        which = {"workload_no": found[0].workload_no, "revision": found[0].revision}
        opened = (await tx.the(SQL_SECRETS_OPEN, **which))["secrets"]
    return sorted(given), bool(given) and (opened is None or json.loads(opened) != given)


def decide_order(
    values: Mapping[str, Any], namespaces: Sequence[str], registry: str, has_key: bool = True
) -> WorkloadOrder:
    """What a checked body asks for, in one of the customer's namespaces; raises Refusal."""
    if not registry:
        what = "this control plane has no registry, so there are no images"
        raise Refusal("CONFLICT", what, "ask the operator to set REGISTRY in cp.env")
    of, image = parse_image(values["image"], registry)
    namespace = values["namespace"] or of
    if of not in namespaces:
        what = f"the image is of the namespace {of}, which is none of yours"
        raise Refusal("FORBIDDEN", what, f"push it to one of: {', '.join(namespaces)}", "image")
    if namespace not in namespaces:
        what = "that is none of your namespaces"
        raise Refusal("FORBIDDEN", what, f"send one of: {', '.join(namespaces)}", "namespace")
    size = len(json.dumps([values["command"], values["env"]], ensure_ascii=False).encode())
    if size > SPEC_BYTES:
        what = f"command and env are larger than {SPEC_BYTES} bytes together"
        raise Refusal("BAD_REQUEST", what, "put what is large into the image", "env")
    if values["secrets"] and not has_key:
        what = "this control plane has no key for secrets, so it takes none"
        raise Refusal("CONFLICT", what, "ask the operator to run setup_cp.py", "secrets")
    spec = {key: values[key] for key in SPEC_KEYS} | {"image": image}  # its tag is still one
    if values["labels"]:
        spec["labels"] = values["labels"]
    if values["secrets"]:
        spec["secrets"] = sorted(values["secrets"])
    return WorkloadOrder(namespace, values["name"], values["replicas"], spec, values["secrets"])


async def _get_workload(
    tx: Transaction, customer: Customer | None, workload_id: uuid.UUID
) -> Workload:
    found = await tx.rows(
        SQL_WORKLOAD_LIST,
        Workload,
        workload_id=workload_id,
        customer_no=customer.customer_no if customer else None,
        namespace=None,
        name=None,
        deleted=True,
        limit=1,
        cursor=0,
    )
    if not found:
        raise Refusal("NOT_FOUND", "no such workload", "list them: GET /api/v1/workloads")
    return found[0]


async def get_workload(
    db: Database, customer: Customer | None, workload_id: uuid.UUID
) -> tuple[Workload, list[Assignment]]:
    """A workload with its copies, those that ended of late last; raises Refusal."""
    async with db.transaction() as tx:
        workload = await _get_workload(tx, customer, workload_id)
        live = await tx.rows(SQL_ASSIGNMENT_LIST, Assignment, workload_nos=[workload.workload_no])
        past = await tx.rows(SQL_ASSIGNMENT_PAST, Assignment, workload_no=workload.workload_no)
    return workload, [*live, *past]


async def list_workloads(
    db: Database, customer: Customer | None, values: Mapping[str, Any]
) -> list[tuple[Workload, list[Assignment]]]:
    """A page of workloads with their live copies, newest first: a customer's, or all."""
    which = {"workload_id": None, "customer_no": customer.customer_no if customer else None}
    async with db.transaction() as tx:
        found = await tx.rows(SQL_WORKLOAD_LIST, Workload, **which, **values)
        numbers = [workload.workload_no for workload in found]
        copies = await tx.rows(SQL_ASSIGNMENT_LIST, Assignment, workload_nos=numbers)
    return [
        (workload, [each for each in copies if each.workload_no == workload.workload_no])
        for workload in found
    ]


async def delete_workload(
    db: Database, actor: Actor, customer: Customer, workload_id: uuid.UUID
) -> None:
    """Delete a workload for good; doing it twice changes nothing; raises Refusal."""
    async with db.transaction() as tx:
        workload = await _get_workload(tx, customer, workload_id)
        if await tx.execute(SQL_WORKLOAD_DELETE, workload_no=workload.workload_no):
            await audit(tx, actor, "workload.delete", str(workload_id))


@dataclasses.dataclass(frozen=True)
class Round:
    """What one look of the placer did."""

    hosts: frozenset[int] = frozenset()  # that have another list now
    placed: int = 0
    unplaced: int = 0
    lost: int = 0
    turns: Mapping[int, int] = dataclasses.field(default_factory=dict)  # for the next look
    is_cut: bool = False  # it ended before all were looked at


async def place(db: Database, turns: Mapping[int, int] | None = None) -> Round:
    """End what has no right any more, stop what is not wanted, give places to what has none."""
    async with db.transaction() as tx:
        times = {"lease_s": LEASE_S, "grace_s": LEASE_GRACE_S}
        turn = await tx.the(SQL_PLACER_LOCK, **times)
        if not turn["is_mine"]:
            return Round()
        lost = 0
        if not turn["is_too_early"]:
            lost = await tx.execute(
                SQL_ASSIGNMENT_EXPIRE, intervals=OFFLINE_AFTER_INTERVALS, **times
            )
        demands = await _read_demands(tx)
        replaced = [number for demand in demands for number in plan_rollout(demand)[0]]
        rows = await tx.dicts(SQL_ASSIGNMENT_STOP, replaced=replaced, notice_s=CREDIT_NOTICE_S)
        touched = {row["host_no"] for row in rows}
        made: list[Placement] = []
        reasons: dict[int, str] = {}
        left: set[int] = set()
        if demands and turn["is_too_early"]:
            why = f"a backup was restored; places are given from {turn['from_at']:%H:%M:%S} UTC on"
            reasons = {each.workload_no: why for each in demands if plan_rollout(each)[1]}
        elif demands:
            places = [
                Place(**{**row, "port_slots": set(row["port_slots"])})
                for row in await tx.dicts(SQL_PLACES, window_s=REJECTED_S)
            ]
            demands = order_demands(demands, turns or {})
            made, reasons, left = await asyncio.to_thread(decide_places, demands, places)
        if made:
            columns = [dataclasses.asdict(each) for each in made]
            params = {key: [row[key] for row in columns] for key in columns[0]}
            params["spec"] = [Jsonb(dict(each.spec)) for each in made]
            await tx.execute(SQL_ASSIGNMENT_INSERT, **params)
            touched |= {each.host_no for each in made}
        await tx.execute(
            SQL_WORKLOAD_UNPLACED,
            workload_nos=list(reasons),
            reasons=list(reasons.values()),
            left=list(left - set(reasons)),
        )
        await tx.execute(SQL_SECRETS_PRUNE)
        if made:
            failpoint("place.before_commit")
    unplaced = len(left | set(reasons))
    turns = plan_turns(demands, left, turns or {})
    return Round(frozenset(touched), len(made), unplaced, lost, turns, bool(left))


async def _read_demands(tx: Transaction) -> list[Demand]:
    rows = await tx.dicts(SQL_DEMANDS)
    if not rows:
        return []
    refused: dict[int, list[Row]] = {}
    numbers = [row["workload_no"] for row in rows]
    for one in await tx.dicts(SQL_REJECTIONS, workload_nos=numbers, window_s=REJECTED_S):
        refused.setdefault(one["workload_no"], []).append(one)
    demands = []
    for row in rows:
        rejections: dict[int, Rejections] = {}
        for one in refused.get(row["workload_no"], ()):
            before = rejections.get(one["replica"])
            times = before.times + 1 if before else 1
            rejections[one["replica"]] = Rejections(times, one["age_s"], one["reason"])
        by = frozenset(one["host_no"] for one in refused.get(row["workload_no"], ()))
        copies = tuple(parse_copy(copy) for copy in row.pop("copies"))
        demands.append(Demand(**row, copies=copies, rejections=rejections, rejected_by=by))
    return demands


def parse_copy(row: Row) -> Copy:
    """A live assignment as SQL_DEMANDS gives it."""
    state = row.pop("state")
    return Copy(**row, is_running=state == "running", is_done=state in DONE_STATES)


async def ensure_currency(db: Database, currency: str) -> None:
    """Note what amounts are in; raises Error when there are some, in another currency."""
    async with db.transaction() as tx:
        if not await tx.one(SQL_CURRENCY_SET, currency=currency):
            found = (await tx.the(SQL_CURRENCY_FIND))["currency"]
            what = f"the amounts in this database are in {found}, not in {currency}"
            raise Error(what, f"set CURRENCY={found}", USAGE)


async def add_rate_card(
    db: Database,
    actor: Actor,
    customer_id: uuid.UUID | None,
    valid_from: dt.datetime,
    **prices: int,
) -> RateCard:
    """New prices from a full hour on, for a customer or for all; raises Refusal."""
    async with db.transaction() as tx:
        await tx.execute(SQL_BILLING_WAIT)
        first = (await tx.the(SQL_BILLING_OPEN, grace_s=USAGE_GRACE_S))["open_from"]
        if valid_from < first:
            what = f"hours before {first:%Y-%m-%dT%H:%MZ} are closed"
            raise Refusal("CONFLICT", what, "give a later hour", "valid_from")
        customer = await _get_customer(tx, customer_id) if customer_id else None
        try:
            row = await tx.the(
                SQL_CARD_INSERT,
                customer_no=customer.customer_no if customer else None,
                valid_from=valid_from,
                actor=actor.name,
                **prices,
            )
        except psycopg.errors.UniqueViolation:
            what = f"there is a rate card from {valid_from:%Y-%m-%dT%H:%MZ} on already"
            raise Refusal("CONFLICT", what, "give another hour", "valid_from") from None
        subject = str(customer_id) if customer_id else "all"
        when = f"{valid_from:%Y-%m-%dT%H:%MZ}"
        await audit(tx, actor, "rate_card.add", subject, valid_from=when, **prices)
        found = await tx.rows(SQL_CARD_LIST, RateCard)
        return next(card for card in found if card.card_no == row["card_no"])


async def list_rate_cards(db: Database) -> list[tuple[RateCard, str | None]]:
    """All of them, each with its customer's name."""
    async with db.transaction() as tx:
        page = {"limit": 2**31 - 1, "cursor": 0}
        names = {
            each.customer_no: each.name
            for each in await tx.rows(SQL_CUSTOMER_LIST, Customer, customer_id=None, **page)
        }
        cards = await tx.rows(SQL_CARD_LIST, RateCard)
    return [(card, names.get(card.customer_no or 0)) for card in cards]


async def add_payment(
    db: Database,
    actor: Actor,
    customer_id: uuid.UUID,
    amount_micros: int,
    reference: str,
    note: str,
) -> tuple[int, bool]:
    """Book what a customer paid (or got back, below zero), once for each reference.

    Gives back the transaction's number, and whether it is new; raises Refusal.
    """
    async with db.transaction() as tx:
        customer = await _get_customer(tx, customer_id)
        await tx.execute(SQL_BILLING_WAIT)
        known = await tx.one(SQL_PAYMENT_FIND, reference=reference)
        if known:
            if (known["customer_id"], known["amount_micros"]) != (customer_id, amount_micros):
                what = f"the reference {reference} is that of another payment"
                raise Refusal("CONFLICT", what, "each payment has its own", "reference")
            return known["transaction_no"], False
        (row,) = await tx.dicts(SQL_LEDGER_NUMBERS, count=1)
        of_customer: AccountKey = ("customer", customer.customer_no)
        accounts = await ensure_accounts(tx, [of_customer, ("payments", None)])
        number: int = row["number"]
        amounts = {of_customer: amount_micros, ("payments", None): -amount_micros}
        await write_entries(tx, [(number, accounts[key], each) for key, each in amounts.items()])
        words = {"kind": "payment", "reference": reference, "note": note, "actor": actor.name}
        await tx.execute(SQL_PAYMENT_INSERT, number=number, **words)
        detail = {"amount_micros": amount_micros, "reference": reference}
        await audit(tx, actor, "payment.add", str(customer_id), **detail)
        await _check_credit(tx, [customer.customer_no])
    return number, True


async def set_credit_limit(
    db: Database, actor: Actor, customer_id: uuid.UUID, micros: int | None
) -> Customer:
    """How far below zero a customer may go; None: as far as it likes; raises Refusal."""
    async with db.transaction() as tx:
        limit = {"customer_id": customer_id, "credit_limit_micros": micros}
        if await tx.one(SQL_CREDIT_LIMIT, **limit):
            await audit(
                tx, actor, "customer.credit_limit", str(customer_id), credit_limit_micros=micros
            )
        customer = await _get_customer(tx, customer_id)
        await _check_credit(tx, [customer.customer_no])
        return customer


async def verify_ledger(db: Database) -> tuple[list[str], Row]:
    """What is wrong with the ledger, a line each; and its sums."""
    wrong = []
    async with db.transaction() as tx:
        for name, sentence, sql in LEDGER_CHECKS:
            found = [str(row["subject"]) for row in await tx.dicts(sql)]
            wrong += [
                f"{name}: it must hold that {sentence}, but not so for {each}" for each in found
            ]
        return wrong, await tx.the(SQL_LEDGER_SUMS)


@dataclasses.dataclass(frozen=True)
class Closing:
    """What one transaction of closing windows did; the next one begins at `cursor`."""

    windows: int = 0
    charge_micros: int = 0
    cursor: int | None = None  # None: nothing is left, or another process does it
    is_mine: bool = True


async def close_windows(
    db: Database, cursor: int = 0, most: int = USAGE_BATCH, grace_s: float = USAGE_GRACE_S
) -> Closing:
    """Put hours that are over into windows, lines and ledger, for so many copies from there on.

    A part of a copy's time is closed once: the run says up to where, in the same transaction.
    """
    async with db.transaction() as tx:
        turn = await tx.the(SQL_BILLING_LOCK, grace_s=grace_s)
        if not turn["is_mine"]:
            return Closing(is_mine=False)
        until = turn["until"]
        found = await tx.rows(SQL_USAGE_COPIES, Meter, cursor=cursor, most=most, until=until)
        if not found:
            return Closing()
        meters = {meter.assignment_no: meter for meter in found}
        asked = {"assignment_nos": list(meters)}
        limits = {"most": USAGE_PARTS, "hours": USAGE_HOURS}
        runs = arrays_of(await tx.dicts(SQL_USAGE_HOLD, **asked), "run_no")
        times = await tx.dicts(SQL_USAGE_TIME, run_nos=runs["run_no"], until=until, **limits)
        is_full = len(times) == USAGE_PARTS
        is_cut = is_full or any(row["is_cut"] for row in times)
        if is_full:  # so many hours that the next transaction goes on with these copies
            until = times[-1]["hour_at"]
            times = [row for row in times if row["hour_at"] < until] or times
            until = times[-1]["hour_at"]
        egress = await tx.dicts(SQL_USAGE_EGRESS, **asked, until=until)
        due: dict[int, dict[dt.datetime, Due]] = {}
        for row in (*times, *egress):
            hours, hour_at = due.setdefault(row["assignment_no"], {}), row["hour_at"]
            hour_at = row.get("due_at", hour_at)
            one = hours.get(hour_at, Due())
            hours[hour_at] = Due(
                one.billed_us + row.get("billed_us", 0),
                one.counted_bytes + row.get("counted_bytes", 0),
            )
        if due:
            windows, charge = await _close_windows(tx, meters, due, turn["now"])
            await tx.execute(
                SQL_RUN_CLOSE,
                **arrays_of(
                    list({r["run_no"]: r for r in times}.values()), "run_no", "hour_at", "to_us"
                ),
            )
            await tx.execute(
                SQL_EGRESS_CLOSE, **arrays_of(egress, "assignment_no", "hour_at", "bytes")
            )
        else:
            windows, charge = 0, 0
    if is_cut:
        return Closing(windows, charge, cursor)
    return Closing(windows, charge, max(meters) if len(found) == most else None)


async def find_due(db: Database, cursor: int) -> Meter | None:
    """The next copy of which something may be due."""
    async with db.transaction() as tx:
        turn = await tx.the(SQL_BILLING_LOCK, grace_s=USAGE_GRACE_S)
        found = await tx.rows(SQL_USAGE_COPIES, Meter, cursor=cursor, most=1, until=turn["until"])
    return found[0] if found else None


def columns_of(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[str, list[Any]]:
    """Rows as one list for each column, for unnest."""
    return {name: [row[name] for row in rows] for name in names}


def render_array(values: Sequence[object]) -> str:
    """Numbers or times as PostgreSQL writes an array: many times as fast as a list of psycopg."""
    if values and isinstance(values[0], dt.date):  # few, and slow to write
        texts = {value: str(value) for value in set(values)}
        return "{" + ",".join([texts[value] for value in values]) + "}"
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def arrays_of(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[str, str]:
    """The same for numbers and times only, when there are many."""
    return {name: render_array([row[name] for row in rows]) for name in names}


async def _close_windows(
    tx: Transaction,
    meters: Mapping[int, Meter],
    due: Mapping[int, Mapping[dt.datetime, Due]],
    now: dt.datetime,
) -> tuple[int, int]:
    """Write what the rules make of what is due; give back how many windows, and their charge."""
    cards = sort_cards(await tx.rows(SQL_CARD_LIST, RateCard))
    lines: dict[int, dict[LineKey, Usage]] = {}
    for row in await tx.dicts(SQL_USAGE_LINES, assignment_nos=list(due)):
        key = (row.pop("assignment_no"), row.pop("month"), row.pop("card_no"))
        lines.setdefault(key[0], {})[key] = Usage(**row)
    pairs = [(number, hour_at) for number, hours in due.items() for hour_at in hours]
    parts: dict[int, dict[dt.datetime, int]] = {}
    numbers, hours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    known = {"assignment_nos": render_array(numbers), "hours": render_array(hours)}
    for row in await tx.dicts(SQL_USAGE_PARTS, **known):
        parts.setdefault(row["assignment_no"], {})[row["hour_at"]] = row["part"]
    customers = list({meters[number].customer_no for number in due})
    issued: dict[int, set[dt.date]] = {}
    for row in await tx.dicts(SQL_INVOICED, customer_nos=customers):
        issued.setdefault(row["customer_no"], set()).add(row["month"])
    made: list[tuple[Meter, Window]] = []
    changed: list[Row] = []
    totals: list[Meter] = []
    for number, of_hours in due.items():
        meter = meters[number]
        meter, windows, after = decide_windows(
            meter,
            of_hours,
            cards,
            lines.get(number, {}),
            parts.get(number, {}),
            frozenset(issued.get(meter.customer_no, ())),
            now,
        )
        totals.append(meter)
        made += [(meter, window) for window in windows]
        changed += [render_line(meter, key, usage) for key, usage in after.items()]
    await tx.execute(
        SQL_TOTAL_SET,
        **arrays_of(
            [vars(each) for each in totals],
            "assignment_no",
            "billed_us",
            "counted_bytes",
            "egress_bytes",
        ),
    )
    if made:
        await _write_windows(tx, made, changed)
    return len(made), sum(window.usage.charge_micros for _, window in made)


def render_line(meter: Meter, key: LineKey, usage: Usage) -> Row:
    """A row of `usage_lines`."""
    who = {name: getattr(meter, name) for name in ("customer_no", "namespace", "host_no")}
    names = ("assignment_no", "month", "card_no")
    return {**dict(zip(names, key, strict=True)), **who, **usage._asdict()}


async def _write_windows(
    tx: Transaction, made: Sequence[tuple[Meter, Window]], lines: Sequence[Row]
) -> None:
    numbers = [row["number"] for row in await tx.dicts(SQL_LEDGER_NUMBERS, count=len(made))]
    windows = [window for _, window in made]
    columns = {
        "window_no": render_array(numbers),
        "customer_no": render_array([meter.customer_no for meter, _ in made]),
    }
    for place, name in enumerate(Window._fields[:-1]):
        columns[name] = render_array([window[place] for window in windows])
    for place, name in enumerate(Usage._fields):
        columns[name] = render_array([window.usage[place] for window in windows])
    await tx.execute(SQL_WINDOW_INSERT, **columns)
    names = [name for name in lines[0] if name != "namespace"]
    namespaces = [line["namespace"] for line in lines]
    await tx.execute(SQL_LINE_SET, namespace=namespaces, **arrays_of(lines, *names))
    entries = [
        (number, account, amount)
        for number, (meter, window) in zip(numbers, made, strict=True)
        for account, amount in list_entries(meter, window.usage)
    ]
    accounts = await ensure_accounts(tx, {account for _, account, _ in entries})
    charged = sorted({number for number, _, _ in entries})
    await write_entries(
        tx, [(number, accounts[whose], micros) for number, whose, micros in entries]
    )
    await tx.execute(SQL_LEDGER_USAGE, numbers=render_array(charged))


AccountKey = tuple[str, object]  # kind, and customer_no or namespace


async def ensure_accounts(tx: Transaction, wanted: Collection[AccountKey]) -> dict[AccountKey, int]:
    """The numbers of these accounts; those that are missing are made."""
    customers = [whose for kind, whose in wanted if kind == "customer"]
    namespaces = [whose for kind, whose in wanted if kind == "provider"]

    async def read() -> dict[AccountKey, int]:
        rows = await tx.dicts(SQL_ACCOUNT_LIST, customer_nos=customers, namespaces=namespaces)
        return {(r["kind"], r["customer_no"] or r["namespace"]): r["account_no"] for r in rows}

    found = await read()
    if missing := [key for key in wanted if key not in found]:
        await tx.execute(
            SQL_ACCOUNT_ADD,
            kind=[kind for kind, _ in missing],
            customer_no=[whose if kind == "customer" else None for kind, whose in missing],
            namespace=[whose if kind == "provider" else None for kind, whose in missing],
        )
        found = await read()
    return found


async def write_entries(tx: Transaction, entries: Sequence[tuple[int, int, int]]) -> None:
    """Entries (transaction, account, micro-units); their transactions come after them."""
    numbers, accounts, amounts = zip(*entries, strict=True) if entries else ((), (), ())
    await tx.execute(
        SQL_ENTRY_INSERT,
        transaction_no=render_array(numbers),
        account_no=render_array(accounts),
        amount_micros=render_array(amounts),
    )


async def prune_hours(db: Database) -> int:
    """Forget marks of hours that are in windows; give back how many, at most PRUNE_MAX."""
    async with db.transaction() as tx:
        gone: int = (await tx.the(SQL_PRUNE_HOURS, most=PRUNE_MAX))["gone"]
    return gone


async def issue_invoices(db: Database, without: Collection[int] = ()) -> list[Row]:
    """Issue invoices of months that are over, but for some customers; give back the new ones."""
    async with db.transaction() as tx:
        turn = await tx.the(SQL_BILLING_LOCK, grace_s=USAGE_GRACE_S)
        which = {"after_s": INVOICE_AFTER_S, "without": list(without)}
        return await tx.dicts(SQL_INVOICE_ISSUE, **which) if turn["is_mine"] else []


async def read_invoice(
    db: Database,
    customer_id: uuid.UUID,
    month: dt.date,
    limit: int | None = None,
    cursor: int = 0,
) -> Bill:
    """A customer's month, issued or preliminary, with some of its lines or all; raises Refusal."""
    async with db.transaction() as tx:
        await tx.execute(SQL_ONE_PICTURE)
        customer = await _get_customer(tx, customer_id)
        which = {"customer_no": customer.customer_no, "month": month}
        found = await tx.the(SQL_INVOICE_FIND, after_s=INVOICE_AFTER_S, **which)
        total = await tx.the(SQL_BILL_TOTAL, **which)
        lines = await _read_lines(tx, BillLine, limit=limit, cursor=cursor, **which)
    number = found["invoice_no"]
    is_preliminary = number is None and bool(found["is_preliminary"] or total["total_micros"])
    money = total["total_micros"]
    whose = (found["customer_name"] or customer.name, str(customer_id))
    at = found["issued_at"]
    return Bill("invoice", *whose, month, number, is_preliminary, lines, money, at)


async def read_statement(db: Database, namespace: str, month: dt.date) -> Bill:
    """A provider's month."""
    async with db.transaction() as tx:
        await tx.execute(SQL_ONE_PICTURE)
        which = {"namespace": namespace, "host_no": None, "month": month}
        found = await tx.the(SQL_STATEMENT_OPEN, after_s=INVOICE_AFTER_S, **which)
        lines = await _read_lines(tx, BillLine, **which)
    total = sum(line.usage.share_micros for line in lines)
    whose = (namespace, namespace.replace(":", "-"))
    return Bill("statement", *whose, month, None, found["is_preliminary"], lines, total)


async def read_earnings(db: Database, order: EarningsOrder, peer_check: bool) -> tuple[Bill, int]:
    """What a host earned in a month, a page of lines or windows; and where the next begins, or 0.

    Raises Refusal as a heartbeat would.
    """
    async with db.transaction() as tx:
        await tx.execute(SQL_ONE_PICTURE)
        who = {"session": order.session_sha256, "peer": order.peer, "peer_check": peer_check}
        host = await tx.one(SQL_SESSION_HOST, **who)
        if host is None:
            why = await tx.one(SQL_HEARTBEAT_WHY, sessions=[order.session_sha256])
            raise decide_heartbeat_refusal(why, order.peer)
        month: dt.date = order.month or host["month"]
        which = {"namespace": None, "host_no": host["host_no"], "month": month}
        found = await tx.the(SQL_STATEMENT_OPEN, after_s=INVOICE_AFTER_S, **which)
        which["assignment_id"] = order.assignment_id
        page = {"limit": EARNINGS_LINES + 1, "cursor": order.cursor}
        kind: type[BillLine] = BillWindow if order.assignment_id else BillLine
        lines = await _read_lines(tx, kind, **page, **which)
        total = (await tx.the(SQL_HOST_TOTAL, **which))["micros"]
    more = order.cursor + EARNINGS_LINES if len(lines) > EARNINGS_LINES else 0
    whose = (host["namespace"], host["namespace"])
    shown = lines[:EARNINGS_LINES]
    return Bill("statement", *whose, month, None, found["is_preliminary"], shown, total), more


async def read_windows(db: Database, assignment_id: str, month: dt.date) -> list[BillWindow]:
    """The windows of a copy's month."""
    async with db.transaction() as tx:
        return await _read_lines(tx, BillWindow, assignment_id=assignment_id, month=month)


async def _read_lines(tx: Transaction, kind: type[Line], **which: object) -> list[Line]:
    asked = dict.fromkeys(("customer_no", "namespace", "host_no", "limit")) | {"cursor": 0} | which
    rows = await tx.dicts(SQL_BILL_WINDOWS if kind is BillWindow else SQL_BILL_LINES, **asked)
    return [kind(usage=Usage(*(row.pop(name) for name in Usage._fields)), **row) for row in rows]


async def read_counted(db: Database, bills: Iterable[Bill]) -> dict[uuid.UUID, Counted]:
    """What hosts counted of the copies on bills, by their ids."""
    async with db.transaction() as tx:
        found = {line.assignment_id for bill in bills for line in bill.lines}
        return await _read_counted(tx, found)


async def _read_counted(tx: Transaction, ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Counted]:
    rows = await tx.rows(SQL_COUNTED, Counted, assignment_ids=list(ids), most=INT64_MAX)
    return {copy.assignment_id: copy for copy in rows}


async def list_invoices(db: Database, customer: Customer) -> list[Row]:
    """A customer's months, newest first; one without a number is preliminary."""
    async with db.transaction() as tx:
        return await tx.dicts(SQL_INVOICE_LIST, customer_no=customer.customer_no)


async def list_bill_owners(db: Database, month: dt.date) -> tuple[list[uuid.UUID], list[str]]:
    """The customers and providers of a month."""
    async with db.transaction() as tx:
        rows = await tx.dicts(SQL_BILL_OWNERS, month=month)
    customers = dict.fromkeys(row["customer_id"] for row in rows)
    return list(customers), sorted({row["namespace"] for row in rows if row["namespace"]})


async def list_usage(
    db: Database, customer: Customer, values: Mapping[str, Any]
) -> tuple[list[Row], list[Counted]]:
    """A page of the windows of a customer's month, newest first; and what was counted of them."""
    async with db.transaction() as tx:
        rows = await tx.dicts(SQL_USAGE_LIST, customer_no=customer.customer_no, **values)
        shown = rows[: values["limit"] - 1]  # the last one only says that there are more
        copies = await _read_counted(tx, {row["assignment_id"] for row in shown})
    return rows, [*copies.values()]


async def check_credit(db: Database) -> list[Row]:
    """Look whose balance is used up, with what is in no window yet; give back what changed."""
    async with db.transaction() as tx:
        return await _check_credit(tx, None)


async def _check_credit(tx: Transaction, customer_nos: list[int] | None) -> list[Row]:
    """The same of these customers, or of all."""
    limits = [
        row
        for row in await tx.dicts(SQL_BALANCES, customer_nos=customer_nos)
        if row["credit_limit_micros"] is not None
    ]
    cards = sort_cards(await tx.rows(SQL_CARD_LIST, RateCard)) if limits else {}
    now = (await tx.the("SELECT now() AS now"))["now"]
    left = {
        row["customer_no"]: row["credit_limit_micros"] + row["balance_micros"] for row in limits
    }
    opened = await tx.dicts(SQL_USAGE_OPEN, customer_nos=customer_nos) if limits else []
    for number, row in enumerate(opened):
        if number % CREDIT_LOOKS == 0:
            await asyncio.sleep(0)  # heartbeats are answered in between
        due, meter = {now: Due(row.pop("due_us"), row.pop("due_bytes"))}, Meter(**row)
        if meter.customer_no in left:  # else it has a limit since a moment ago
            _, windows, _ = decide_windows(meter, due, cards, {}, {}, frozenset(), now)
            left[meter.customer_no] -= sum(one.usage.charge_micros for one in windows)
    out = [customer_no for customer_no, micros in left.items() if micros <= 0]
    return await tx.dicts(SQL_CREDIT_SET, customer_nos=out, looked_at=customer_nos)


async def count_lost_secrets(db: Database) -> int:
    """How many workloads have secrets that cannot be read with the key at hand."""
    async with db.transaction() as tx:
        row = await tx.the(SQL_SECRETS_LOST)
    count: int = row["workloads"]
    return count


async def list_audit(db: Database, values: Mapping[str, Any]) -> list[Row]:
    """A page of the audit log, newest first."""
    async with db.transaction() as tx:
        return await tx.dicts(SQL_AUDIT_LIST, **values)


async def find_violations(db: Database) -> list[tuple[str, str, str]]:
    """Every violation of an invariant: (name, sentence, subject); empty when all hold."""
    found = []
    async with db.transaction() as tx:
        for name, sentence, sql in INVARIANTS:
            rows = await tx.dicts(sql)
            found += [(name, sentence, str(row["subject"])) for row in rows]
    return found


# ---------------------------------------------------------------------------------------------
# The serving process: settings, counters, the hub's peers, heartbeat batches; all that it shares.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line and cp.env say; see OPTIONS."""

    dsn_file: Path
    owner_dsn_file: Path
    jwt_keys_file: Path
    secrets_key_file: Path
    grpc_listen: tuple[str, int]
    http_listen: tuple[str, int]
    peer_check: bool
    heartbeat_s: float
    role: str
    wg_socket: str
    registry: str
    registry_url: str
    registry_dir: str
    currency: str


class Metrics:
    """Counters of this process, safe for threads; rendered for Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._about: dict[str, tuple[str, str]] = {}

    def define(self, name: str, kind: str, text: str) -> None:
        """Announce a metric: counter or gauge, and its help."""
        self._about[name] = (kind, text)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] = value

    def render(self) -> str:
        """All of it as Prometheus text."""
        with self._lock:
            items = sorted(self._values.items())
        return render_metrics(
            [(name, *self._about[name], dict(labels), value) for (name, labels), value in items]
        )


METRICS = (
    ("openinfra_info", "gauge", "Always 1; the label says the version."),
    ("openinfra_database_up", "gauge", "1 when the database answered just now, else 0."),
    ("openinfra_hosts", "gauge", "Hosts by status."),
    ("openinfra_heartbeats_total", "counter", "Heartbeats, by result."),
    ("openinfra_heartbeat_batches_total", "counter", "Database transactions with heartbeats."),
    ("openinfra_heartbeat_commit_seconds_total", "counter", "Time those transactions took."),
    ("openinfra_heartbeat_waiting", "gauge", "Heartbeats that wait for their transaction."),
    ("openinfra_rpcs_total", "counter", "gRPC calls, by method and result."),
    ("openinfra_rpcs_held_total", "counter", "gRPC calls held back: too many of one address."),
    ("openinfra_http_requests_total", "counter", "HTTP requests, by status."),
    ("openinfra_hosts_marked_offline_total", "counter", "Hosts that fell silent."),
    ("openinfra_swept_time_seconds", "gauge", "When silent hosts were last looked for, Unix time."),
    ("openinfra_sessions_pruned_total", "counter", "Sessions forgotten 90 days after their end."),
    ("openinfra_table_bytes", "gauge", "Size of a table with its indexes."),
    ("openinfra_table_dead_rows", "gauge", "Dead rows of a table that vacuum has not removed."),
    ("openinfra_oldest_snapshot_transactions", "gauge", "Transactions since the oldest snapshot."),
    ("openinfra_pool_waiting", "gauge", "Callers that wait for a database connection, by pool."),
    ("openinfra_peers", "gauge", "Peers of the hub by state: wanted, set, unknown, conflict."),
    ("openinfra_peers_checked_time_seconds", "gauge", "When the hub was last right, Unix time."),
    ("openinfra_workloads", "gauge", "Workloads of customers that are not deleted."),
    ("openinfra_assignments", "gauge", "Copies of workloads that have not ended, by state."),
    ("openinfra_unplaced_workloads", "gauge", "Workloads of which a replica has no host."),
    ("openinfra_placements_total", "counter", "Replicas that got a host."),
    ("openinfra_assignments_lost_total", "counter", "Copies whose host fell silent for too long."),
    ("openinfra_placed_time_seconds", "gauge", "When places were last looked for, Unix time."),
    ("openinfra_place_seconds_total", "counter", "Time those looks took."),
    ("openinfra_nudges_total", "counter", "Hosts asked by a packet for a heartbeat."),
    ("openinfra_usage_windows_total", "counter", "Hours of copies that were closed."),
    ("openinfra_usage_charged_micros_total", "counter", "What customers were charged for them."),
    ("openinfra_invoices_total", "counter", "Invoices that were issued."),
    ("openinfra_unbilled_copies", "gauge", "Copies whose hours could not be closed just now."),
    ("openinfra_billed_time_seconds", "gauge", "When usage was last closed, Unix time."),
    ("openinfra_start_time_seconds", "gauge", "When this process began to serve, Unix time."),
    ("openinfra_cpu_seconds_total", "counter", "Processor time of this process."),
    ("openinfra_resident_memory_bytes", "gauge", "Resident memory of this process."),
)


async def ask_hub(path: str, order: Mapping[str, Any]) -> Row:
    """One question to the WireGuard helper (systemd/openinfra_wg.py); raises Error."""
    todo = "systemctl status openinfra-wg.socket; journalctl -u openinfra-wg -n 20"
    try:
        line = await asyncio.wait_for(_exchange(path, json.dumps(order).encode() + b"\n"), HUB_S)
        answer = await asyncio.to_thread(parse_json, line)
    except asyncio.TimeoutError:
        raise Error(f"the WireGuard helper gave no answer for {HUB_S:g} s", todo) from None
    except OSError as error:
        raise Error(f"cannot reach the WireGuard helper: {error.strerror}", todo) from None
    except ValueError:
        raise Error("the WireGuard helper gave no whole answer", todo) from None
    if answer.get("ok") is not True:
        raise Error(f"the WireGuard helper refused: {answer.get('error')}", todo)
    return answer


async def _exchange(path: str, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, limit=HUB_ANSWER_BYTES)
    try:
        writer.write(line)
        return await reader.readline()
    finally:
        writer.close()


async def read_peer_plan(db: Database, path: str) -> PeerPlan:
    """Compare the hub with the database; raises Error."""
    wanted: list[WantedPeer] = []
    cursor = 0
    while True:  # by pages: a host that changes meanwhile is right in the next comparison
        async with db.transaction() as tx:
            rows = await tx.dicts(SQL_PEERS_WANTED, cursor=cursor, limit=PEERS_PAGE)
        wanted += [WantedPeer(row["key"], row["ip"], row["is_up"]) for row in rows]
        if len(rows) < PEERS_PAGE:
            break
        cursor = rows[-1]["host_no"]
    dump = await ask_hub(path, {"verb": "dump"})
    on_hub = {peer["key"]: peer["allowed_ips"] for peer in dump["peers"]}
    keys = list(set(on_hub) - {peer.key for peer in wanted})
    async with db.transaction() as tx:
        rows = await tx.dicts(SQL_PEERS_LOST, keys=keys) if keys else []
    lost = {row["key"]: row["state"] for row in rows}
    plan = await asyncio.to_thread(plan_peers, wanted, on_hub, lost)
    renewals = tuple(plan_renewals(wanted, dump["peers"], time.time()))
    ends = [(net, peer["endpoint"]) for peer in dump["peers"] for net in peer["allowed_ips"]]
    seen = {net: endpoint.rpartition(":")[0] for net, endpoint in ends if endpoint}
    return dataclasses.replace(plan, renewals=renewals, seen=seen)


class Peers:
    """Keeps the hub as the database says, by the WireGuard helper; without one it does nothing."""

    def __init__(self, path: str, db: Database, metrics: Metrics) -> None:
        self._path = path
        self._db = db
        self._metrics = metrics
        self._look_now, self._compare_now = asyncio.Event(), asyncio.Event()
        self._asking = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._holders: dict[str, str] = {}  # network -> the peer that has it, as last read
        self._seen: Mapping[str, str] = {}  # network -> where its packets come from
        self._read_s, self._next_read_s = 0.0, 0.0
        self._revoked: set[str] = set()  # of late: a comparison begun before must not set them
        self._removed: set[str] = set()  # of those, the ones that the hub has forgotten
        self._trouble, self._told_s = "", 0.0
        self._told: set[PeerChange] = set()

    def host_came(self) -> None:
        """A host registered or resumed: compare soon."""
        self._compare_now.set()

    def host_revoked(self) -> None:
        """A host was revoked here: look at once."""
        self._look_now.set()

    def find_seen(self, ip: str) -> str:
        """Where the tunnel of the host with this address comes from; empty while not known."""
        return self._seen.get(f"{ip}/32", "")

    async def check_key(self, ip: str, key: str) -> None:
        """Raises Refusal unless what comes from this address is encrypted with this key.

        A host could claim the key of another, and the hub would move that to the host's address.
        Callers share what is read; one that goes away ends no reading, and begins none the sooner.
        """
        came_s = time.monotonic()
        while self._read_s < came_s:
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read_holders())
                self._reader.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._reader)
        if self._holders.get(f"{ip}/32") != key:
            what = f"the tunnel's peer at {ip} has another key than the agent says"
            todo = "does /etc/wireguard/openinfra.pub belong to openinfra.conf? see: wg show"
            raise Refusal("WRONG_ADDRESS", what, todo)

    async def _read_holders(self) -> None:
        """Read who has which address; raises Refusal. After it the hub has a rest from this."""
        await asyncio.sleep(max(0.0, self._next_read_s - time.monotonic()))
        began_s = time.monotonic()
        try:
            peers = (await ask_hub(self._path, {"verb": "dump"}))["peers"]
        except Error as error:
            what = "the control plane cannot read the peers of its tunnel now"
            raise Refusal("TRY_LATER", what, error.todo) from None
        finally:
            now_s = time.monotonic()
            self._next_read_s = now_s + min(9 * (now_s - began_s), HOLDERS_REST_MAX_S)
        self._holders = {net: peer["key"] for peer in peers for net in peer["allowed_ips"]}
        self._read_s = began_s

    def loops(self) -> list[asyncio.Task[None]]:
        """Start the loops; none without a helper."""
        if not self._path:
            return []
        self._metrics.set("openinfra_peers_checked_time_seconds", time.time())
        return [asyncio.create_task(loop()) for loop in (self._look_forever, self._compare_forever)]

    async def _look_forever(self) -> None:
        """Within PEERS_LOOK_S a revoked host's key is gone, also when a CLI revoked it.

        A look by the index on revoked_at needs no connection of its own and misses nothing: a
        notification is lost with its connection, and the audit log's numbers come out of order.
        """
        is_good = True
        while True:
            was_good, is_good = is_good, await self._attempt(self._look())
            if is_good and not was_good:
                self._compare_now.set()  # the hub is reached again: is it as it was left?
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), PEERS_LOOK_S)
            self._look_now.clear()

    async def _compare_forever(self) -> None:
        while True:
            self._compare_now.clear()
            began = time.monotonic()
            is_good = await self._attempt(self._compare())
            # Registrations that come one after the other cost a tenth of the time, not all of it.
            pause_s = max(PEERS_LOOK_S, 10 * (time.monotonic() - began))
            await asyncio.sleep(pause_s)
            with contextlib.suppress(asyncio.TimeoutError):
                wait_s = (PEERS_S if is_good else PEERS_RETRY_S) - pause_s
                await asyncio.wait_for(self._compare_now.wait(), max(wait_s, 0.0))

    async def _attempt(self, work: Awaitable[None]) -> bool:
        """True when it went well; a trouble is logged when it begins, and while it lasts."""
        try:
            await asyncio.wait_for(work, PEERS_DEADLINE_S)
            return True
        except Refusal:
            return False  # the store has logged it
        except Error as error:
            fault, todo = error.what, error.todo
        except Exception as error:  # whatever it is: heartbeats go on, and it is tried again
            fault, todo = f"peers cannot be kept: {error!r}", "report this as a bug"
        if fault != self._trouble or time.monotonic() > self._told_s + LOG_AGAIN_S:
            self._trouble, self._told_s = fault, time.monotonic()
            log("WARN", fault, todo)
        return False

    async def _look(self) -> None:
        async with self._db.transaction() as tx:
            rows = await tx.dicts(SQL_PEERS_REVOKED, window_s=PEERS_GONE_S)
        self._revoked = {row["key"] for row in rows}
        self._removed &= self._revoked
        due = self._revoked - self._removed
        await self._apply([PeerChange("remove", key) for key in sorted(due)])
        self._removed |= due

    async def _compare(self) -> None:
        plan = await read_peer_plan(self._db, self._path)
        self._seen = plan.seen
        counts = {"wanted": plan.wanted, "unknown": len(plan.unknown)}
        counts["conflict"] = len(plan.conflicts)
        for change in set(plan.conflicts) - self._told:
            todo = f"is that its new key? let it connect; else: wg set wg0 peer {change.key} remove"
            pairs = {"ip": change.ip, "host": change.key, "peer": change.replaces}
            log("WARN", "an unknown peer has the address of a host that is silent", todo, **pairs)
        self._told = set(plan.conflicts)
        missing = sum(change.verb == "set" for change in plan.changes) + len(plan.conflicts)
        for state, count in {**counts, "set": plan.wanted - missing}.items():
            self._metrics.set("openinfra_peers", count, state=state)
        await self._apply(plan.changes)
        await self._apply(plan.renewals, is_routine=True)
        self._metrics.set("openinfra_peers", plan.wanted - len(plan.conflicts), state="set")
        self._metrics.set("openinfra_peers_checked_time_seconds", time.time())
        if self._trouble:
            self._trouble = ""
            log("INFO", "the hub is as the database says again")

    async def _apply(self, changes: Sequence[PeerChange], is_routine: bool = False) -> None:
        """Let the hub make changes, each verified by the helper; raises Error."""
        refused: list[Row] = []
        for start in range(0, len(changes), HUB_CHANGES_MAX):
            async with self._asking:
                part = [
                    change
                    for change in changes[start : start + HUB_CHANGES_MAX]
                    if change.verb == "remove" or change.key not in self._revoked
                ]
                order = {"verb": "apply", "changes": [render_peer_change(c) for c in part]}
                refused += (await ask_hub(self._path, order))["refused"]
        for change in () if is_routine else changes[:20]:
            log("INFO", f"peer {change.verb}", key=change.key, ip=change.ip or "-")
        if len(changes) > 20 and not is_routine:
            log("WARN", "many peers changed at once", peers=len(changes))
        if refused:
            what = f"the hub did not take {len(refused)} peers: {refused[0]['error']}"
            raise Error(what, "look: wg show wg0; what did not change is tried again")


class Placer:
    """Gives replicas their hosts, in rounds; and asks hosts for a heartbeat when they have news."""

    def __init__(self, db: Database, judging: asyncio.Lock, metrics: Metrics) -> None:
        self._db = db
        self._judging = judging
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._turns: Mapping[int, int] = {}  # by workload_no, see plan_turns
        for name in ("nudges", "placements", "assignments_lost"):
            metrics.add(f"openinfra_{name}_total", 0)
        self._nudges: dict[int, tuple[str, int]] = {}  # by host_no: where it listens
        self._socket: socket.socket | None = None

    def wake(self) -> None:
        """Something changed: look soon."""
        self._wake.set()

    def host_listens(self, host_no: int, peer: str, port: int) -> None:
        """A heartbeat came from there; port 0: it hears no nudge."""
        if port:
            self._nudges[host_no] = (peer, port)
        else:
            self._nudges.pop(host_no, None)

    async def place_forever(self) -> None:
        """Look again and again; a fault is logged and tried again."""
        while True:
            self._wake.clear()
            began = time.monotonic()
            try:
                async with self._judging:
                    work = place(self._db, self._turns)
                    done = await asyncio.wait_for(work, BATCH_DEADLINE_S)
                self._turns = done.turns
                if done.is_cut:
                    self.wake()
                self._note(done, time.monotonic() - began)
                for host_no in done.hosts:
                    self.nudge(host_no)
            except Refusal:
                pass  # the store has logged it
            except Exception as error:  # the loop must not end before the process does
                log("ERROR", "placing failed", error=type(error).__name__, said=str(error))
            await asyncio.sleep(PLACE_REST_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), PLACE_S - PLACE_REST_S)

    def _note(self, done: Round, took_s: float) -> None:
        self._metrics.add("openinfra_place_seconds_total", took_s)
        self._metrics.add("openinfra_placements_total", done.placed)
        self._metrics.add("openinfra_assignments_lost_total", done.lost)
        self._metrics.set("openinfra_unplaced_workloads", done.unplaced)
        self._metrics.set("openinfra_placed_time_seconds", time.time())
        if done.lost:
            log("WARN", "copies lost with their hosts", copies=done.lost)

    def nudge(self, host_no: int) -> None:
        """Ask a host for a heartbeat now: a packet, sent again in case it gets lost."""
        if host_no in self._nudges:
            self._metrics.add("openinfra_nudges_total")
            loop = asyncio.get_running_loop()
            for delay_s in NUDGE_AFTER_S:
                loop.call_later(delay_s, self._send, host_no)

    def _send(self, host_no: int) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        with contextlib.suppress(OSError, KeyError):  # nothing depends on it
            self._socket.sendto(b"openinfra", self._nudges[host_no])


class Biller:
    """Closes hours that are over and issues invoices; beside it looks whose balance is used up."""

    def __init__(self, db: Database, metrics: Metrics) -> None:
        self._db = db
        self._metrics = metrics
        self._without: set[int] = set()  # customers of copies that cannot be billed
        metrics.set("openinfra_unbilled_copies", 0)
        for name in ("usage_windows", "usage_charged_micros", "invoices"):
            metrics.add(f"openinfra_{name}_total", 0)

    async def bill_forever(self) -> None:
        """Look again and again; a fault of one part is logged, and holds up no other."""
        while True:
            is_whole = await self._try("closing hours", self._close) or False
            if is_whole:
                await self._try("issuing invoices", self._issue)
                await self._try("forgetting marks", self._prune)
                self._metrics.set("openinfra_billed_time_seconds", time.time())
            await asyncio.sleep(USAGE_S)

    async def check_forever(self) -> None:
        """Look at balances again and again, also while many hours are closed."""
        while True:
            await self._try("looking at credit", self._check_credit)
            await asyncio.sleep(USAGE_S)

    async def _try(self, what: str, work: Callable[[], Awaitable[T]]) -> T | None:
        try:
            return await work()
        except Refusal:
            return None  # the store has logged it
        except Exception as error:  # the loop must not end before the process does
            log("ERROR", f"{what} failed", error=type(error).__name__, said=str(error))
            return None

    async def _close(self) -> bool:
        """Close what is due; False when another process does it.

        A batch that fails is tried again in halves, down to the one copy that is at fault: its
        customer gets no invoice while that is so.
        """
        cursor: int | None = 0
        most, is_whole, unbilled = USAGE_BATCH, True, 0
        self._without.clear()
        while cursor is not None:
            try:
                done = await close_windows(self._db, cursor, most)
            except Exception as error:
                if most > 1:
                    most //= 2
                    continue
                what = {"error": type(error).__name__, "said": str(error)}
                found = await find_due(self._db, cursor)
                if found is None:
                    raise
                self._without.add(found.customer_no)
                cursor, unbilled = found.assignment_no, unbilled + 1
                log("ERROR", "a copy cannot be billed", assignment_no=cursor, **what)
                continue
            cursor, most = done.cursor, min(2 * most, USAGE_BATCH)
            is_whole = is_whole and done.is_mine
            self._metrics.add("openinfra_usage_windows_total", done.windows)
            self._metrics.add("openinfra_usage_charged_micros_total", done.charge_micros)
        self._metrics.set("openinfra_unbilled_copies", unbilled)
        return is_whole

    async def _prune(self) -> None:
        while await prune_hours(self._db) == PRUNE_MAX:
            pass

    async def _issue(self) -> None:
        for row in await issue_invoices(self._db, self._without):
            self._metrics.add("openinfra_invoices_total")
            log("INFO", "invoice issued", number=row["invoice_no"], month=f"{row['month']:%Y-%m}")

    async def _check_credit(self) -> None:
        for row in await check_credit(self._db):
            is_out = row["out_of_credit_at"] is not None
            what = "customer has no credit" if is_out else "customer has credit again"
            log("WARN" if is_out else "INFO", what, customer_id=row["customer_id"])


AskedLog = tuple[pb.LogRequest, "asyncio.Future[Log]"]


class Logs:
    """What customers ask hosts for; in memory only, and for LOG_S at most."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer
        # By host_no, then request_id: only the host that is asked can answer.
        self._asked: dict[int, dict[int, AskedLog]] = {}
        self._readers: set[int] = set()  # customer_no of those that wait
        self._is_over = False

    async def read(
        self, customer_no: int, copies: Sequence[Assignment], tail_lines: int
    ) -> list[Log]:
        """The end of what each copy printed; raises Refusal when too many wait."""
        if self._is_over:
            raise Refusal("TRY_LATER", "the control plane is stopping", "try again in a moment")
        if customer_no in self._readers or len(self._readers) >= LOG_READERS_MAX:
            what = "too many logs are being read at once"
            raise Refusal("TOO_MANY_REQUESTS", what, "ask again in a moment")
        self._readers.add(customer_no)
        live = [copy for copy in copies if not explain_no_log(copy)]
        requests = render_log_requests(live, tail_lines)
        futures: dict[uuid.UUID, asyncio.Future[Log]] = {}
        try:
            for copy, request in zip(live, requests, strict=True):
                futures[copy.assignment_id] = future = asyncio.get_running_loop().create_future()
                self._asked.setdefault(copy.host_no, {})[request.request_id] = (request, future)
            for host_no in {copy.host_no for copy in live}:
                self._placer.nudge(host_no)
            if futures:
                await asyncio.wait(futures.values(), timeout=LOG_S)
        finally:
            self._readers.remove(customer_no)
            for copy, request in zip(live, requests, strict=True):
                self._forget(copy.host_no, request.request_id)
        late = f"its host did not answer within {LOG_S:g} s"
        found = {key: future.result() for key, future in futures.items() if future.done()}
        return [
            found.get(copy.assignment_id) or Log(reason=explain_no_log(copy) or late)
            for copy in copies
        ]

    def requests(self, host_no: int) -> list[pb.LogRequest]:
        """What a host is asked for now."""
        return [request for request, _ in self._asked.get(host_no, {}).values()]

    def take(self, host_no: int, answers: Sequence[pb.LogAnswer]) -> None:
        """Take what a host answers to what it was asked for; all else is nothing."""
        for answer in answers if host_no in self._asked else ():
            asked = self._forget(host_no, answer.request_id)
            if asked is not None and not asked[1].done():
                asked[1].set_result(parse_log(answer, asked[0]))

    def _forget(self, host_no: int, request_id: int) -> AskedLog | None:
        of_host = self._asked.get(host_no, {})
        found = of_host.pop(request_id, None)
        if not of_host:
            self._asked.pop(host_no, None)
        return found

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._is_over = True
        for of_host in self._asked.values():
            for _, future in of_host.values():
                if not future.done():
                    future.set_result(Log(reason="the control plane was stopping; ask again"))


class ControlPlane:
    """One serving process: what its edges and loops share.

    Six small pools, so that no crowd at one door holds up another: `beat_db` for heartbeats and
    the sweep, `db` for joining agents, `admin_db` for the operator, `customer_db` for customers,
    `bill_db` for closing hours, `earn_db` for hosts that ask what they earned.
    """

    def __init__(
        self,
        settings: Settings,
        db: Database,
        beat_db: Database,
        admin_db: Database,
        customer_db: Database,
        bill_db: Database,
        earn_db: Database,
    ) -> None:
        self.settings = settings
        self.db = db
        self.beat_db = beat_db
        self.admin_db = admin_db
        self.customer_db = customer_db
        self.earn_db = earn_db
        self.asking: set[str] = set()  # peers that are being told what they earned
        self.has_key = False  # of workloads' secrets
        self.stopping = False
        self.busy = 0.0
        self.metrics = Metrics()
        for name, kind, text in METRICS:
            self.metrics.define(name, kind, text)
        self.metrics.set("openinfra_info", 1, version=VERSION)
        self.metrics.set("openinfra_start_time_seconds", time.time())
        self.peers = Peers(settings.wg_socket, beat_db, self.metrics)
        self._keys: tuple[tuple[int, int], list[JwtKey]] = ((0, 0), [])
        self._keys_fault = ""
        self._waiting: dict[BeatKey, tuple[Beat, list[BeatFuture]]] = {}
        self._waiting_of: dict[str, int] = {}  # by peer
        self._wake = asyncio.Event()
        self._judging = asyncio.Lock()  # heartbeats and sweep in turn: neither misses a flip
        self.placer = Placer(beat_db, self._judging, self.metrics)
        self.logs = Logs(self.placer)
        self.biller = Biller(bill_db, self.metrics)
        self._due: dict[str, float] = {}  # by peer, at most one for each tunnel address
        self._told: dict[str, float] = {}

    def jwt_keys(self) -> list[JwtKey]:
        """The signing keys; the file is read again when it changed; raises Refusal, and logs it."""
        path = self.settings.jwt_keys_file
        try:
            stat = path.stat()
            seen = (stat.st_ctime_ns, stat.st_ino)  # a changed mode counts too
            if self._keys[0] != seen:
                self._keys = (seen, read_jwt_keys(path))
                self._keys_fault = ""
            return self._keys[1]
        except (OSError, Error) as error:
            fault = str(error)
            if fault != self._keys_fault:  # once, not at each request
                todo = "mend it, or make a new one: cp_server.py token --new-key"
                log("ERROR", "signing keys cannot be read", todo, said=fault)
            self._keys, self._keys_fault = ((0, 0), []), fault
        what = "the control plane cannot read its signing keys"
        raise Refusal("TRY_LATER", what, "the operator sees why in its log")

    def next_interval_ms(self) -> int:
        """Milliseconds that a host is to wait for its next heartbeat."""
        return decide_interval_ms(self.settings.heartbeat_s, self.busy, random.random())  # noqa: S311

    async def admit(self, peer: str) -> None:
        """Hold back an address that calls more often than a host does; raises Refusal."""
        if not self.settings.peer_check:
            return
        now = asyncio.get_running_loop().time()
        due = self._due.get(peer, 0.0)
        wait_s, self._due[peer] = decide_hold(due, now, PEER_CALLS_S, PEER_BURST, PEER_HOLD_S)
        if wait_s == 0:
            return
        self.metrics.add("openinfra_rpcs_held_total")
        if now > self._told.get(peer, -PEER_TELL_S) + PEER_TELL_S:
            self._told[peer] = now
            log("WARN", "address held back: it calls too often", peer=peer)
        await asyncio.sleep(min(wait_s, PEER_HOLD_S))
        if wait_s > PEER_HOLD_S:
            raise Refusal("TRY_LATER", "too many calls from this address", "call less often")

    async def heartbeat(self, beat: Beat) -> Accepted:
        """Wait until a heartbeat is committed; raises Refusal."""
        key = (beat.session_sha256, beat.peer)
        known = self._waiting.get(key)
        of_peer = self._waiting_of.get(beat.peer, 0)
        is_full = self.settings.peer_check and of_peer >= WAITING_PEER_MAX
        if known is None and (is_full or len(self._waiting) >= WAITING_MAX):
            raise Refusal("TRY_LATER", "too many heartbeats are waiting", "the agent tries again")
        future: BeatFuture = asyncio.get_running_loop().create_future()
        if known is None:
            self._waiting_of[beat.peer] = of_peer + 1
            self._waiting[key] = (beat, [future])
        else:  # a retry overtook the first try: one commit answers both
            earlier, futures = known
            older, newer = sorted((earlier, beat), key=lambda each: each.seq)
            merged = dataclasses.replace(
                newer,
                facts=newer.facts or older.facts,
                observed=newer.observed or older.observed,
                counters=(newer.counters + older.counters)[: 4 * COUNTERS_MAX],
            )
            self._waiting[key] = (merged, [*futures, future])
        self._wake.set()
        answer = await future
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def stop(self) -> None:
        """Refuse new calls; the heartbeats that wait are committed at once."""
        self.stopping = True
        self.logs.stop()
        self._wake.set()

    async def flush_forever(self) -> None:
        """Commit waiting heartbeats in batches until there are none and the CP stops."""
        while not (self.stopping and not self._waiting):
            await self._wake.wait()
            if len(self._waiting) < BATCH_MAX and not self.stopping:
                await asyncio.sleep(BATCH_S)
            batch = dict(list(self._waiting.items())[:BATCH_MAX])
            for key in batch:
                del self._waiting[key]
                self._waiting_of[key[1]] -= 1
                if not self._waiting_of[key[1]]:
                    del self._waiting_of[key[1]]
            if not self._waiting and not self.stopping:
                self._wake.clear()
            if batch:
                await self._flush(batch)

    async def _flush(self, batch: Mapping[BeatKey, tuple[Beat, list[BeatFuture]]]) -> None:
        began = time.monotonic()
        answers: Mapping[BeatKey, Accepted | Refusal] = {}
        fault: Refusal | None = None
        try:
            beats = [beat for beat, _ in batch.values()]
            settings = self.settings
            work = record_heartbeats(self.beat_db, beats, settings.peer_check, settings.registry)
            async with self._judging:
                answers, changed = await asyncio.wait_for(work, BATCH_DEADLINE_S)
            if changed:
                self.placer.wake()
        except Refusal as refusal:
            fault = refusal
        except Exception as error:  # whatever it is: the next batch gets its chance
            log("ERROR", "heartbeat batch failed", error=type(error).__name__, said=str(error))
            fault = Refusal("TRY_LATER", "the heartbeat was not committed", "the agent tries again")
        took = time.monotonic() - began
        self.busy = decide_busy(len(self._waiting), took)
        self.metrics.add("openinfra_heartbeat_batches_total")
        self.metrics.add("openinfra_heartbeat_commit_seconds_total", took)
        results: collections.Counter[str] = collections.Counter()
        for key, (_, futures) in batch.items():
            answer = fault or answers[key]
            results[answer.code.lower() if isinstance(answer, Refusal) else "accepted"] += 1
            for future in futures:
                if not future.done():  # its caller may be gone
                    future.set_result(answer)
        for result, count in results.items():
            self.metrics.add("openinfra_heartbeats_total", count, result=result)

    async def sweep_forever(self) -> None:
        """Mark silent hosts offline, again and again; a fault is logged and tried again."""
        period_s = min(SWEEP_S, self.settings.heartbeat_s)
        next_prune_s = time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            try:
                async with self._judging:
                    gone = await asyncio.wait_for(
                        sweep(self.beat_db, gap_s=2 * period_s), BATCH_DEADLINE_S
                    )
                if time.monotonic() >= next_prune_s:
                    next_prune_s = time.monotonic() + PRUNE_S
                    pruned = await asyncio.wait_for(prune(self.beat_db), BATCH_DEADLINE_S)
                    self.metrics.add("openinfra_sessions_pruned_total", pruned)
            except Refusal:
                continue  # the store has logged it; the gap moves serving_since
            except Exception as error:  # the loop must not end before the process does
                log("ERROR", "sweep failed", error=type(error).__name__, said=str(error))
                continue
            self.metrics.set("openinfra_swept_time_seconds", time.time())
            self.metrics.add("openinfra_hosts_marked_offline_total", len(gone))
            for host_id in gone[:20]:
                log("INFO", "host offline", host_id=host_id)
            if len(gone) > 20:
                log("WARN", "many hosts went offline at once", hosts=len(gone))

    async def render_metrics(self) -> str:
        """The counters, with what the kernel says now, and the database if it answers."""
        try:
            async with self.admin_db.transaction() as tx:
                rows = await tx.dicts(SQL_COUNTS)
                copies = {r["state"]: r["number"] for r in await tx.dicts(SQL_WORKLOAD_COUNTS)}
                tables = await tx.dicts(SQL_TABLES)
                oldest = await tx.the(SQL_OLDEST_SNAPSHOT)
            counts = {row["status"]: row["hosts"] for row in rows}
            for status in HOST_STATUSES:
                self.metrics.set("openinfra_hosts", counts.get(status, 0), status=status)
            self.metrics.set("openinfra_workloads", copies.pop("workloads"))
            for state in LIVE_STATES:
                self.metrics.set("openinfra_assignments", copies.get(state, 0), state=state)
            for row in tables:
                for key in ("bytes", "dead_rows"):
                    self.metrics.set(f"openinfra_table_{key}", row[key], table=row["name"])
            snapshot = "openinfra_oldest_snapshot_transactions"
            self.metrics.set(snapshot, oldest["transactions"])
            self.metrics.set("openinfra_database_up", 1)
        except Error:  # the store has logged it; the last counts stay
            self.metrics.set("openinfra_database_up", 0)
        pools = {"beats": self.beat_db, "agents": self.db, "admin": self.admin_db}
        pools |= {"customers": self.customer_db, "earnings": self.earn_db}
        for name, db in pools.items():
            self.metrics.set("openinfra_pool_waiting", db.waiting(), pool=name)
        self.metrics.set("openinfra_heartbeat_waiting", len(self._waiting))
        self.metrics.set("openinfra_cpu_seconds_total", time.process_time())
        self.metrics.set("openinfra_resident_memory_bytes", read_resident_bytes())
        return self.metrics.render()


def read_resident_bytes() -> int:
    """Resident memory of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_secret_file(path: Path, what: str, make: str) -> bytes:
    """A file that only its owner may read; raises Error; `make` says how to get one."""
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except FileNotFoundError:
        raise Error(f"{path} ({what}) is missing", make) from None
    except OSError as error:
        what = f"{path} ({what}) cannot be read: {error.strerror}"
        raise Error(what, "name a file that this user may read") from None
    if mode & 0o077:
        todo = f"type: chmod 600 {path}"
        raise Error(f"{path} ({what}) can be read by others, mode {mode:04o}", todo, 3)
    return content


def read_secrets_key(path: Path) -> str:
    """The key of workloads' secrets; empty when there is none; raises Error."""
    if not path.exists():
        return ""
    what, todo = "key of workloads' secrets", "put the right one back"
    key = read_secret_file(path, what, todo).decode(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}|", key):
        raise Error(f"{path} ({what}) is not one line of 64 hex digits", todo)
    return key


DSN_EXAMPLE = "write for example: host=/run/postgresql dbname=openinfra user=openinfra"


def read_dsn(path: Path) -> str:
    """The connection string in a file; raises Error."""
    raw = read_secret_file(path, "PostgreSQL connection string", DSN_EXAMPLE)
    dsn = raw.decode(errors="replace").strip()
    try:
        if not dsn or "\n" in dsn:
            raise ValueError("not one line")
        psycopg.conninfo.conninfo_to_dict(dsn)
    except (psycopg.ProgrammingError, ValueError):
        raise Error(f"{path} holds no PostgreSQL connection string", DSN_EXAMPLE) from None
    return dsn


def read_jwt_keys(path: Path) -> list[JwtKey]:
    """The signing keys, newest last; raises Error."""
    raw = read_secret_file(path, "JWT signing keys", "make one: cp_server.py token --new-key")
    try:
        keys = [
            JwtKey(key["kid"], key["alg"], parse_b64url(key["secret"]))
            for key in parse_json(raw)["keys"]
        ]
    except (ValueError, KeyError, TypeError):
        keys = []
    if not keys or any(key.alg != "HS256" or len(key.secret) < 32 for key in keys):
        todo = "make a new one: cp_server.py token --new-key"
        raise Error(f"{path} holds no usable signing key", todo)
    return keys


def add_jwt_key(path: Path, keys: Sequence[JwtKey]) -> JwtKey:
    """Append a new signing key to the file (made 0600 when it is missing)."""
    key = JwtKey(new_public_id(), "HS256", secrets.token_bytes(32))
    rows = [{"kid": k.kid, "alg": k.alg, "secret": b64url(k.secret)} for k in [*keys, key]]
    try:
        write_file(path, json.dumps({"keys": rows}, indent=1).encode() + b"\n", 0o600)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror}"
        raise Error(what, "make its directory, or name another --jwt-keys-file") from None
    return key


# ---------------------------------------------------------------------------------------------
# gRPC edge: decodes, calls one operation, encodes; refusals carry `openinfra-reason`.
# ---------------------------------------------------------------------------------------------


class AgentEdge:
    """The service AgentApi of proto/openinfra.proto."""

    def __init__(self, cp: ControlPlane) -> None:
        self.cp = cp

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, with decoding left to `_call` so that bad bytes get a good answer."""
        methods: dict[str, tuple[type[Any], Callable[[Any, str], Awaitable[Message]]]] = {
            "Register": (pb.RegisterRequest, self._register),
            "Resume": (pb.ResumeRequest, self._resume),
            "Heartbeat": (pb.HeartbeatRequest, self._heartbeat),
            "ReadEarnings": (pb.EarningsRequest, self._read_earnings),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self._call, name, kind, operation)
            )
            for name, (kind, operation) in methods.items()
        }
        return grpc.method_handlers_generic_handler("openinfra.v1.AgentApi", handlers)

    async def _call(
        self,
        name: str,
        kind: type[Any],
        operation: Callable[[Any, str], Awaitable[Message]],
        raw: bytes,
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> bytes:
        try:
            if self.cp.stopping:
                raise Refusal("TRY_LATER", "the control plane is stopping", "try again in a moment")
            peer = parse_peer(context.peer())
            await self.cp.admit(peer)
            reply = await operation(kind.FromString(raw), peer)
            failpoint(f"{name}.after_commit")
            self.cp.metrics.add("openinfra_rpcs_total", method=name, result="ok")
            return reply.SerializeToString()
        except DecodeError:
            what = f"the bytes are no {kind.__name__}"
            refusal = Refusal("BAD_REQUEST", what, "use the agent that this control plane offers")
        except Refusal as refused:
            refusal = refused
        except Error as error:  # a database without its schema or rights
            log("ERROR", error.what, error.todo, method=name)
            refusal = Refusal("TRY_LATER", error.what, error.todo)
        except Exception:
            log("ERROR", "call failed", method=name, traceback=traceback.format_exc())
            refusal = Refusal("INTERNAL", "the control plane has a bug", "its log says more")
        self.cp.metrics.add("openinfra_rpcs_total", method=name, result=refusal.code.lower())
        status, _ = REFUSALS[refusal.code]
        known = refusal.code in pb.Reason.keys()  # noqa: SIM118 - no dict
        reason = (("openinfra-reason", refusal.code),) if known else ()
        return await context.abort(status, str(refusal), reason)

    async def _register(self, request: pb.RegisterRequest, peer: str) -> Message:
        settings = self.cp.settings
        registration = parse_register(request, peer, settings.peer_check)
        interval_ms = int(settings.heartbeat_s * 1000)
        is_proven = not (settings.peer_check and settings.wg_socket)
        try:
            host = await register(self.cp.db, registration, interval_ms, is_proven)
        except UnprovenKeyError:
            await self.cp.peers.check_key(peer, request.wg_pubkey)
            host = await register(self.cp.db, registration, interval_ms)
        self.cp.peers.host_came()
        log("INFO", "host registered", host_id=host.host_id, invite_id=host.invite_id, peer=peer)
        return pb.RegisterReply(
            host_id=str(host.host_id),
            invite_id=host.invite_id,
            heartbeat_interval_s=max(1, round(settings.heartbeat_s)),
            onchain_payout=host.payout_pubkey is not None,
            standing=render_standing(decide_standing(host)),
        )

    async def _resume(self, request: pb.ResumeRequest, peer: str) -> Message:
        settings = self.cp.settings
        resumption = parse_resume(request, peer, settings.peer_check)
        is_proven = not (settings.peer_check and settings.wg_socket)
        try:
            host = await resume(self.cp.db, resumption, settings.peer_check, is_proven)
        except UnprovenKeyError:
            await self.cp.peers.check_key(peer, request.wg_pubkey)
            host = await resume(self.cp.db, resumption, settings.peer_check)
        self.cp.peers.host_came()
        return pb.ResumeReply(
            host_id=str(host.host_id),
            heartbeat_interval_s=max(1, round(settings.heartbeat_s)),
            onchain_payout=host.payout_pubkey is not None,
            standing=render_standing(decide_standing(host)),
        )

    async def _heartbeat(self, request: pb.HeartbeatRequest, peer: str) -> Message:
        beat = parse_heartbeat(request, peer, self.cp.next_interval_ms())
        accepted = await self.cp.heartbeat(beat)
        self.cp.placer.host_listens(accepted.host_no, peer, request.nudge_port % 65_536)
        self.cp.logs.take(accepted.host_no, request.logs)
        earned = None
        if accepted.earnings:
            month, micros = accepted.earnings
            earned = pb.Earnings(month=month, micros=micros, currency=self.cp.settings.currency)
        return pb.HeartbeatReply(
            earnings=earned,
            next_heartbeat_ms=beat.interval_ms,
            standing=render_standing(accepted.standing),
            desired=accepted.desired,
            lease_s=LEASE_S,
            log_requests=self.cp.logs.requests(accepted.host_no),
            seen_address=self.cp.peers.find_seen(peer),
        )

    async def _read_earnings(self, request: pb.EarningsRequest, peer: str) -> Message:
        settings, order = self.cp.settings, parse_earnings(request, peer)
        if peer in self.cp.asking:
            raise Refusal("TRY_LATER", "this host asks already what it earned", "one at a time")
        self.cp.asking.add(peer)
        try:
            bill, more = await read_earnings(self.cp.earn_db, order, settings.peer_check)
        finally:
            self.cp.asking.discard(peer)
        names = pb.EarningsLine.DESCRIPTOR.fields_by_name
        lines = [render_bill_line(bill.kind, line) for line in bill.lines]
        return pb.EarningsReply(
            month=f"{bill.month:%Y-%m}",
            currency=settings.currency,
            preliminary=bill.is_preliminary,
            share_micros=bill.total_micros,
            lines=[
                pb.EarningsLine(**{name: line[name] for name in names if name in line})
                for line in lines
            ],
            next_cursor=more,
        )


def make_grpc_server(cp: ControlPlane) -> grpc.aio.Server:
    """The gRPC server, bound but not started."""
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),  # a second server must fail, not share
            ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES),
            ("grpc.max_metadata_size", 8_192),
            ("grpc.max_concurrent_streams", GRPC_CALLS_MAX),
            # Above these (by default 1,000 and 3,000) gRPC cancels calls at random, whoever made
            # them: the honest ones in a flood, and many of a fleet that comes back.
            ("grpc.server.max_pending_requests", GRPC_PENDING_MAX),
            ("grpc.server.max_pending_requests_hard_limit", 2 * GRPC_PENDING_MAX),
            ("grpc.server_handshake_timeout_ms", 10_000),  # a connection that never says hello
            ("grpc.max_connection_idle_ms", GRPC_IDLE_S * 1000),
            ("grpc.keepalive_time_ms", 600_000),  # finds hosts that went away without a word
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.bdp_probe", 0),  # a ping beside each small request would measure nothing
        )
    )
    server.add_generic_rpc_handlers((AgentEdge(cp).handler(),))
    server.add_insecure_port(render_address(cp.settings.grpc_listen))
    return server


def probe_port(address: str, port: int, flag: str) -> None:
    """Raises Error when a port cannot be bound, with the kernel's reason, which gRPC hides."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address.strip("[]"), port))
        except OSError as error:
            todo = f"free it (ss -ltnp shows who has it), or choose another with --{flag}"
            if error.errno != errno.EADDRINUSE:
                todo = f"name an address of this machine (ip address) with --{flag}"
            raise Error(f"cannot listen on {address}:{port}: {error.strerror}", todo) from None


# ---------------------------------------------------------------------------------------------
# HTTP edge: the operator's JSON API on loopback; each request becomes one coroutine on the loop.
# ---------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A request whose token, path, query and body are checked."""

    actor: Actor
    path: Mapping[str, str]
    values: Mapping[str, Any] = dataclasses.field(repr=False)  # there may be secrets
    customer: Customer | None = None  # whose key it came with

    def host_id(self) -> uuid.UUID:
        """The host in the path; raises Refusal."""
        return self._id("host")

    def customer_id(self) -> uuid.UUID:
        """The customer in the path; raises Refusal."""
        return self._id("customer")

    def _id(self, of: str) -> uuid.UUID:
        try:
            return uuid.UUID(self.path[f"{of}_id"])
        except ValueError:
            what = f"the {of} id in the path is not a UUID"
            path = "" if of == "workload" else "admin/"
            raise Refusal("BAD_REQUEST", what, f"copy it from GET /api/v1/{path}{of}s") from None

    def workload_id(self) -> uuid.UUID:
        """The workload in the path; raises Refusal."""
        return self._id("workload")

    def of_customer(self) -> Customer:
        """The customer that asks, on a route for customers."""
        if self.customer is None:
            raise Refusal("INTERNAL", "the control plane has a bug", "a route without its customer")
        return self.customer


@dataclasses.dataclass(frozen=True)
class Route:
    """One line of the API, for the dispatcher and for the OpenAPI document."""

    method: str
    path: str
    scope: str  # admin, read; customer: a customer's key; empty: no token needed
    summary: str
    handler: Callable[[ControlPlane, Request], Awaitable[Answer]]
    answer: str  # name in SCHEMAS
    statuses: tuple[int, ...] = (200,)
    query: tuple[Field, ...] = ()
    body: tuple[Field, ...] | None = None


def page(name: str, rows: Sequence[Any], shown: Sequence[Row], key: str, limit: int) -> Answer:
    """A page of a list: `next_cursor` is null on the last one (`rows` has one more than shown)."""
    more = len(rows) > limit
    last = rows[limit - 1] if more else None
    cursor = None if last is None else last[key] if isinstance(last, dict) else getattr(last, key)
    return 200, {name: list(shown[:limit]), "next_cursor": cursor}


def one_more(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same page with one row more, which tells whether there is a next page."""
    return {**values, "limit": values["limit"] + 1}


async def http_mint_invite(cp: ControlPlane, request: Request) -> Answer:
    token, invite = await mint_invite(cp.admin_db, request.actor, InviteOrder(**request.values))
    return 201, {"token": token, **render_invite(invite)}


async def http_list_invites(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_invites(cp.admin_db, one_more(request.values))
    shown = [render_invite(row) for row in rows]
    return page("invites", rows, shown, "invite_no", request.values["limit"])


async def http_revoke_invite(cp: ControlPlane, request: Request) -> Answer:
    return 200, render_invite(
        await revoke_invite(cp.admin_db, request.actor, request.path["invite_id"])
    )


async def http_list_hosts(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_hosts(cp.admin_db, one_more(request.values))
    shown = [render_host(row) for row in rows]
    return page("hosts", rows, shown, "host_no", request.values["limit"])


async def http_get_host(cp: ControlPlane, request: Request) -> Answer:
    return 200, render_host(await get_host(cp.admin_db, request.host_id()))


async def http_revoke_host(cp: ControlPlane, request: Request) -> Answer:
    host = await revoke_host(cp.admin_db, request.actor, request.host_id())
    cp.peers.host_revoked()
    return 200, render_host(host)


async def http_release_host(cp: ControlPlane, request: Request) -> Answer:
    return 200, render_host(await release_host(cp.admin_db, request.actor, request.host_id()))


async def http_list_namespaces(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_namespaces(cp.admin_db, one_more(request.values))
    shown = [render_row(row, "namespace_no") for row in rows]
    return page("namespaces", rows, shown, "namespace_no", request.values["limit"])


async def http_approve_namespace(cp: ControlPlane, request: Request) -> Answer:
    row = await approve_namespace(cp.admin_db, request.actor, request.path["namespace"])
    return 200, render_row(row, "namespace_no")


async def http_add_customer(cp: ControlPlane, request: Request) -> Answer:
    return 201, render_customer(await add_customer(cp.admin_db, request.actor, **request.values))


async def http_list_customers(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_customers(cp.admin_db, one_more(request.values))
    shown = [render_customer(row) for row in rows]
    return page("customers", rows, shown, "customer_no", request.values["limit"])


async def http_get_customer(cp: ControlPlane, request: Request) -> Answer:
    return 200, render_customer(await get_customer(cp.admin_db, request.customer_id()))


async def http_add_namespace(cp: ControlPlane, request: Request) -> Answer:
    namespace = request.values["namespace"]
    found = await add_namespace(cp.admin_db, request.actor, request.customer_id(), namespace)
    return 200, render_customer(await get_customer(cp.admin_db, found.customer_id))


async def http_mint_key(cp: ControlPlane, request: Request) -> Answer:
    note = request.values["note"]
    key, row = await mint_key(cp.admin_db, request.actor, request.customer_id(), note)
    return 201, {"key": key, **render_key(row)}


async def http_list_keys(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_keys(cp.admin_db, request.customer_id(), one_more(request.values))
    shown = [render_key(row) for row in rows]
    return page("keys", rows, shown, "key_no", request.values["limit"])


async def http_revoke_key(cp: ControlPlane, request: Request) -> Answer:
    which = (request.path["key_id"], request.customer_id())
    return 200, render_key(await revoke_key(cp.admin_db, request.actor, *which))


async def http_get_account(cp: ControlPlane, request: Request) -> Answer:
    customer = await get_customer(cp.customer_db, request.of_customer().customer_id)
    return 200, render_customer(customer)


async def http_drain_host(cp: ControlPlane, request: Request) -> Answer:
    host = await drain_host(cp.admin_db, request.actor, request.host_id(), True)
    cp.placer.wake()
    return 200, render_host(host)


async def http_undrain_host(cp: ControlPlane, request: Request) -> Answer:
    host = await drain_host(cp.admin_db, request.actor, request.host_id(), False)
    cp.placer.wake()
    return 200, render_host(host)


async def http_label_host(cp: ControlPlane, request: Request) -> Answer:
    labels = request.values["labels"]
    host = await label_host(cp.admin_db, request.actor, request.host_id(), labels)
    cp.placer.wake()
    return 200, render_host(host)


async def http_put_workload(cp: ControlPlane, request: Request) -> Answer:
    customer = request.of_customer()
    order = decide_order(request.values, customer.namespaces, cp.settings.registry, cp.has_key)
    image = order.spec["image"]
    if "@" not in image:
        image = await asyncio.to_thread(read_digest, cp.settings.registry_url, image)
        order = dataclasses.replace(order, spec={**order.spec, "image": image})
    is_new, workload = await put_workload(cp.customer_db, request.actor, customer, order)
    cp.placer.wake()
    found = await get_workload(cp.customer_db, customer, workload.workload_id)
    return (201 if is_new else 200), render_workload(*found)


async def http_list_workloads(cp: ControlPlane, request: Request) -> Answer:
    found = await list_workloads(cp.customer_db, request.of_customer(), one_more(request.values))
    return _page_of_workloads(found, request)


async def http_list_all_workloads(cp: ControlPlane, request: Request) -> Answer:
    found = await list_workloads(cp.admin_db, None, one_more(request.values))
    return _page_of_workloads(found, request)


def _page_of_workloads(
    found: Sequence[tuple[Workload, list[Assignment]]], request: Request
) -> Answer:
    shown = [render_workload(*each) for each in found]
    rows = [workload for workload, _ in found]
    return page("workloads", rows, shown, "workload_no", request.values["limit"])


async def http_get_workload(cp: ControlPlane, request: Request) -> Answer:
    which = (request.of_customer(), request.workload_id())
    return 200, render_workload(*await get_workload(cp.customer_db, *which))


async def http_list_usage(cp: ControlPlane, request: Request) -> Answer:
    values = {**one_more(request.values), "month": month_or_now(request.values["month"])}
    rows, copies = await list_usage(cp.customer_db, request.of_customer(), values)
    shown = [render_row(row) for row in rows]
    status, answer = page("windows", rows, shown, "window_no", request.values["limit"])
    return status, {**answer, "copies": [render_counted(copy) for copy in copies]}


def month_or_now(text: str) -> dt.date:
    """The month that is asked for, or this one; raises Refusal."""
    return parse_month(text) if text else month_of(dt.datetime.now(dt.timezone.utc))


async def http_list_invoices(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_invoices(cp.customer_db, request.of_customer())
    return 200, {"invoices": [render_row(row) for row in rows]}


async def http_get_invoice(cp: ControlPlane, request: Request) -> Answer:
    customer_id, month = request.of_customer().customer_id, parse_month(request.path["month"])
    limit, cursor = request.values["limit"], request.values["cursor"]
    bill = await read_invoice(cp.customer_db, customer_id, month, limit + 1, cursor)
    shown = render_bill_json(bill, cp.settings.currency)
    more = len(bill.lines) > limit
    lines = shown["lines"][:limit]
    return 200, {**shown, "lines": lines, "next_cursor": cursor + limit if more else None}


async def http_read_logs(cp: ControlPlane, request: Request) -> Answer:
    customer, only = request.of_customer(), request.values["assignment_id"]
    _, copies = await get_workload(cp.customer_db, customer, request.workload_id())
    if only is None:
        copies = [each for each in copies if each.ended_at is None]
    else:
        copies = [each for each in copies if str(each.assignment_id) == only]
        if not copies:
            what, todo = "this workload has no such assignment", "leave it out for those it has"
            raise Refusal("NOT_FOUND", what, todo, "assignment_id")
    logs = await cp.logs.read(customer.customer_no, copies, request.values["tail"])
    return 200, {"logs": [render_log(*each) for each in zip(copies, logs, strict=True)]}


async def http_delete_workload(cp: ControlPlane, request: Request) -> Answer:
    customer, workload_id = request.of_customer(), request.workload_id()
    await delete_workload(cp.customer_db, request.actor, customer, workload_id)
    cp.placer.wake()
    return 200, render_workload(*await get_workload(cp.customer_db, customer, workload_id))


async def http_list_audit(cp: ControlPlane, request: Request) -> Answer:
    rows = await list_audit(cp.admin_db, one_more(request.values))
    shown = [render_row(row) for row in rows]
    return page("entries", rows, shown, "audit_id", request.values["limit"])


async def http_health(_cp: ControlPlane, _request: Request) -> Answer:
    return 200, {"ok": True, "version": VERSION}


async def http_ready(cp: ControlPlane, _request: Request) -> Answer:
    if cp.stopping:
        raise Refusal("TRY_LATER", "the control plane is stopping", "try again in a moment")
    async with cp.admin_db.transaction() as tx:
        check_schema_version(await read_schema_version(tx))
    return 200, {"ok": True, "version": VERSION}


async def http_openapi(_cp: ControlPlane, _request: Request) -> Answer:
    return 200, render_openapi(ROUTES, SCHEMAS)


ROUTES = (
    Route(
        "POST",
        "/api/v1/admin/host-invites",
        "admin",
        "Mint a single-use invite; the token is in this answer and nowhere else",
        http_mint_invite,
        "NewInvite",
        (201,),
        body=INVITE_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/host-invites",
        "read",
        "List invites, newest first",
        http_list_invites,
        "Invites",
        query=(*PAGE_FIELDS, *INVITE_FILTERS),
    ),
    Route(
        "DELETE",
        "/api/v1/admin/host-invites/{invite_id}",
        "admin",
        "Take an invite back",
        http_revoke_invite,
        "Invite",
    ),
    Route(
        "GET",
        "/api/v1/admin/hosts",
        "read",
        "List hosts in the order of registration",
        http_list_hosts,
        "Hosts",
        query=(*PAGE_FIELDS, *HOST_FILTERS),
    ),
    Route("GET", "/api/v1/admin/hosts/{host_id}", "read", "One host", http_get_host, "Host"),
    Route(
        "POST",
        "/api/v1/admin/hosts/{host_id}/revoke",
        "admin",
        "Remove a host for good",
        http_revoke_host,
        "Host",
    ),
    Route(
        "POST",
        "/api/v1/admin/hosts/{host_id}/release",
        "admin",
        "Release a host from quarantine",
        http_release_host,
        "Host",
    ),
    Route(
        "POST",
        "/api/v1/admin/hosts/{host_id}/drain",
        "admin",
        "Move a host's workloads elsewhere and give it no more",
        http_drain_host,
        "Host",
    ),
    Route(
        "POST",
        "/api/v1/admin/hosts/{host_id}/undrain",
        "admin",
        "Give a host that was drained workloads again",
        http_undrain_host,
        "Host",
    ),
    Route(
        "POST",
        "/api/v1/admin/hosts/{host_id}/labels",
        "admin",
        "Give a host these labels and no others; what runs there stays",
        http_label_host,
        "Host",
        body=LABEL_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/namespaces",
        "read",
        "List providers' namespaces",
        http_list_namespaces,
        "Namespaces",
        query=PAGE_FIELDS,
    ),
    Route(
        "POST",
        "/api/v1/admin/namespaces/{namespace}/approve",
        "admin",
        "Approve a namespace: its hosts may get workloads",
        http_approve_namespace,
        "Namespace",
    ),
    Route(
        "POST",
        "/api/v1/admin/customers",
        "admin",
        "Add a customer",
        http_add_customer,
        "Customer",
        (201,),
        body=CUSTOMER_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/customers",
        "read",
        "List customers in the order in which they were added",
        http_list_customers,
        "Customers",
        query=PAGE_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/customers/{customer_id}",
        "read",
        "One customer",
        http_get_customer,
        "Customer",
    ),
    Route(
        "POST",
        "/api/v1/admin/customers/{customer_id}/namespaces",
        "admin",
        "Add a namespace to a customer, for good",
        http_add_namespace,
        "Customer",
        body=CUSTOMER_FIELDS[1:],
    ),
    Route(
        "POST",
        "/api/v1/admin/customers/{customer_id}/keys",
        "admin",
        "Make a key of a customer; it is in this answer and nowhere else",
        http_mint_key,
        "NewCustomerKey",
        (201,),
        body=KEY_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/customers/{customer_id}/keys",
        "read",
        "List a customer's keys, newest first",
        http_list_keys,
        "CustomerKeys",
        query=PAGE_FIELDS,
    ),
    Route(
        "DELETE",
        "/api/v1/admin/customers/{customer_id}/keys/{key_id}",
        "admin",
        "Take a key back for good",
        http_revoke_key,
        "CustomerKey",
    ),
    Route(
        "GET",
        "/api/v1/account",
        "customer",
        "Who the key of this request belongs to",
        http_get_account,
        "Customer",
    ),
    Route(
        "POST",
        "/api/v1/workloads",
        "customer",
        "Make a workload, or change the one of this name (200); the same twice changes nothing",
        http_put_workload,
        "Workload",
        (201, 200),
        body=WORKLOAD_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/workloads",
        "customer",
        "List your workloads, newest first",
        http_list_workloads,
        "Workloads",
        query=(*PAGE_FIELDS, *WORKLOAD_FILTERS),
    ),
    Route(
        "GET",
        "/api/v1/workloads/{workload_id}",
        "customer",
        "One workload: its copies, where each is, and why it does not run",
        http_get_workload,
        "Workload",
    ),
    Route(
        "GET",
        "/api/v1/workloads/{workload_id}/logs",
        "customer",
        "The last lines that each copy of a workload printed, or why they are not known",
        http_read_logs,
        "Logs",
        query=LOG_FILTERS,
    ),
    Route(
        "DELETE",
        "/api/v1/workloads/{workload_id}",
        "customer",
        "Delete a workload for good; its copies are stopped",
        http_delete_workload,
        "Workload",
    ),
    Route(
        "GET",
        "/api/v1/admin/workloads",
        "read",
        "List the workloads of all customers, newest first",
        http_list_all_workloads,
        "Workloads",
        query=(*PAGE_FIELDS, *WORKLOAD_FILTERS),
    ),
    Route(
        "GET",
        "/api/v1/usage",
        "customer",
        "Hours of copies of a month and what they cost, newest first; what hosts counted beside it",
        http_list_usage,
        "Windows",
        query=(*PAGE_FIELDS, MONTH_FIELD, COPY_FIELD),
    ),
    Route(
        "GET",
        "/api/v1/invoices",
        "customer",
        "Your months, newest first",
        http_list_invoices,
        "Invoices",
    ),
    Route(
        "GET",
        "/api/v1/invoices/{month}",
        "customer",
        "A month, line by line; without a number it is preliminary",
        http_get_invoice,
        "Invoice",
        query=PAGE_FIELDS,
    ),
    Route(
        "GET",
        "/api/v1/admin/audit-log",
        "read",
        "Who changed what, newest first",
        http_list_audit,
        "AuditLog",
        query=(*PAGE_FIELDS, *AUDIT_FILTERS),
    ),
    Route("GET", "/api/v1/openapi.json", "", "This document", http_openapi, "Object"),
    Route("GET", "/healthz", "", "The process lives", http_health, "Health"),
    Route("GET", "/readyz", "", "It can serve: database and schema are good", http_ready, "Health"),
)

# Shapes of the answers: field -> type, `?` when it may be null.
SCHEMAS: dict[str, dict[str, str]] = {
    "Invite": {
        "id": "string",
        "state": "string",
        "note": "string",
        "payout_pubkey": "string?",
        "wg_ip": "string?",
        "wg_pubkey": "string?",
        "approve_first_wallet": "boolean",
        "created_by": "string",
        "created_at": "date-time",
        "expires_at": "date-time",
        "revoked_at": "date-time?",
        "consumed_at": "date-time?",
        "host_id": "uuid?",
    },
    "Host": {
        "host_id": "uuid",
        "hostname": "string",
        "status": "string",
        "status_at": "date-time",
        "assignable": "boolean",
        "reasons": "strings",
        "namespace": "string?",
        "namespace_approved": "boolean",
        "payout_pubkey": "string?",
        "requested_payout_pubkey": "string?",
        "invite_id": "string",
        "invite_payout_pubkey": "string?",
        "wg_ip": "string?",
        "wg_pubkey": "string?",
        "arch": "string",
        "kernel": "string",
        "agent_version": "string",
        "cpu_count": "integer",
        "memory_bytes": "integer",
        "disk_bytes": "integer",
        "disk_encrypted": "boolean",
        "engine_version": "string",
        "offered_cpu_milli": "integer",
        "offered_memory_bytes": "integer",
        "takes_secrets": "boolean",
        "assignments": "integer",
        "drained_at": "date-time?",
        "labels": "Object",
        "created_at": "date-time",
        "revoked_at": "date-time?",
        "last_heartbeat_at": "date-time?",
        "heartbeat_interval_s": "number",
    },
    "Namespace": {
        "namespace": "string",
        "created_at": "date-time",
        "approved_at": "date-time?",
        "approved_by": "string?",
        "hosts": "integer",
    },
    "AuditEntry": {
        "audit_id": "integer",
        "at": "date-time",
        "actor": "string",
        "action": "string",
        "subject": "string",
        "detail": "Object",
    },
    "Health": {"ok": "boolean", "version": "string"},
    "Problem": {"code": "string", "message": "string", "field": "string?"},
    "Error": {"error": "Problem"},
    "Invites": {"invites": "[Invite]", "next_cursor": "integer?"},
    "Hosts": {"hosts": "[Host]", "next_cursor": "integer?"},
    "Namespaces": {"namespaces": "[Namespace]", "next_cursor": "integer?"},
    "AuditLog": {"entries": "[AuditEntry]", "next_cursor": "integer?"},
    "Customer": {
        "customer_id": "uuid",
        "name": "string",
        "namespaces": "strings",
        "created_by": "string",
        "created_at": "date-time",
        "balance_micros": "integer",
        "credit_limit_micros": "integer?",
        "out_of_credit_at": "date-time?",
        "stops_at": "date-time?",
    },
    "Customers": {"customers": "[Customer]", "next_cursor": "integer?"},
    "CustomerKey": {
        "key_id": "string",
        "customer_id": "uuid",
        "note": "string",
        "created_by": "string",
        "created_at": "date-time",
        "revoked_at": "date-time?",
    },
    "CustomerKeys": {"keys": "[CustomerKey]", "next_cursor": "integer?"},
    "Endpoint": {"port": "integer", "address": "string"},
    "Assignment": {
        "assignment_id": "uuid",
        "replica": "integer",
        "revision": "integer",
        "host_id": "uuid",
        "state": "string",
        "reason": "string",
        "restarts": "integer",
        "exit_code": "integer?",
        "endpoints": "[Endpoint]",
        "created_at": "date-time",
        "state_at": "date-time",
        "ended_at": "date-time?",
    },
    "Workload": {
        "workload_id": "uuid",
        "namespace": "string",
        "name": "string",
        "state": "string",
        "reasons": "strings",
        "revision": "integer",
        "replicas": "integer",
        "image": "string",
        "command": "strings",
        "env": "Object",
        "cpu_milli": "integer",
        "memory_bytes": "integer",
        "ports": "integers",
        "egress": "string",
        "restart": "string",
        "arch": "string?",
        "provider": "string?",
        "labels": "Object",
        "secrets": "strings",
        "created_by": "string",
        "created_at": "date-time",
        "changed_at": "date-time",
        "deleted_at": "date-time?",
        "assignments": "[Assignment]",
    },
    "Window": {
        "window_no": "integer",
        "assignment_id": "uuid",
        "workload_id": "uuid",
        "workload": "string",
        "hour_at": "date-time",
        "part": "integer",
        "card_no": "integer",
        "billed_us": "integer",
        "egress_bytes": "integer",
        "cpu_micros": "integer",
        "memory_micros": "integer",
        "egress_micros": "integer",
        "closed_at": "date-time",
    },
    "Counted": {
        "assignment_id": "uuid",
        "life_us": "integer",
        "counted_cpu_ns": "integer",
        "counted_memory_byte_s": "integer",
        "counted_rx_bytes": "integer",
        "counted_tx_bytes": "integer",
        "doubtful": "boolean",
        "note": "string",
    },
    "Windows": {"windows": "[Window]", "next_cursor": "integer?", "copies": "[Counted]"},
    "InvoiceMonth": {
        "month": "string",
        "number": "integer?",
        "issued_at": "date-time?",
        "total_micros": "integer",
    },
    "Invoices": {"invoices": "[InvoiceMonth]"},
    "InvoiceLine": {
        "assignment_id": "uuid",
        "workload": "string",
        "replica": "integer",
        "hostname": "string",
        "cpu_milli": "integer",
        "memory_bytes": "integer",
        "card_no": "integer",
        "cpu_hour_micros": "integer",
        "gb_hour_micros": "integer",
        "egress_gb_micros": "integer",
        "billed_us": "integer",
        "egress_bytes": "integer",
        "cpu_micros": "integer",
        "memory_micros": "integer",
        "egress_micros": "integer",
        "charge_micros": "integer",
    },
    "Invoice": {
        "kind": "string",
        "number": "integer?",
        "issued_at": "date-time?",
        "preliminary": "boolean",
        "month": "string",
        "whose": "string",
        "currency": "string",
        "total_micros": "integer",
        "lines": "[InvoiceLine]",
        "next_cursor": "integer?",
    },
    "Workloads": {"workloads": "[Workload]", "next_cursor": "integer?"},
    "Log": {
        "assignment_id": "uuid",
        "host_id": "uuid",
        "replica": "integer",
        "lines": "strings",
        "truncated": "boolean",
        "reason": "string",
    },
    "Logs": {"logs": "[Log]"},
    "Object": {},
}
SCHEMAS["NewInvite"] = {"token": "string", **SCHEMAS["Invite"]}
SCHEMAS["NewCustomerKey"] = {"key": "string", **SCHEMAS["CustomerKey"]}


def render_shape(text: str) -> Row:
    """One entry of SCHEMAS as OpenAPI."""
    kind = text.rstrip("?")
    if kind.startswith("["):
        return {"type": "array", "items": {"$ref": f"#/components/schemas/{kind[1:-1]}"}}
    if kind in ("strings", "integers"):
        return {"type": "array", "items": {"type": kind[:-1]}}
    if kind in SCHEMAS:
        return {"$ref": f"#/components/schemas/{kind}"}
    shape: Row = {"type": kind}
    if kind in ("date-time", "uuid"):
        shape = {"type": "string", "format": kind}
    if text.endswith("?"):
        shape["type"] = [shape["type"], "null"]
    return shape


def render_field(field: Field) -> Row:
    """One request field as OpenAPI."""
    shape: Row = {"type": "object" if field.kind == "map" else field.kind}
    shape |= {"description": field.help} if field.help else {}
    bounds = {
        "integer": ("minimum", "maximum"),
        "string": ("minLength", "maxLength"),
        "array": ("minItems", "maxItems"),
        "map": ("minProperties", "maxProperties"),
    }
    if field.kind in bounds:
        shape |= dict(zip(bounds[field.kind], (field.minimum, field.maximum), strict=True))
    if field.item is not None:
        name = "items" if field.kind == "array" else "additionalProperties"
        shape[name] = render_field(field.item)
    if field.values:
        shape["enum"] = list(field.values)
    shape |= field.form
    return shape if field.default is None else shape | {"default": field.default}


def render_path_value(name: str) -> Row:
    """A value in a route's path as OpenAPI."""
    return {"type": "string", "minLength": 1, "maxLength": 100, **PATH_FORMS.get(name, LINE)}


SCHEMES = {"customer": "key"}  # scope -> what proves it, but for operators' JWTs


def render_openapi(routes: Sequence[Route], schemas: Mapping[str, Mapping[str, str]]) -> Row:
    """The OpenAPI 3.1 document of the HTTP API, from the same tables that serve it."""
    paths: dict[str, dict[str, Row]] = {}
    for route in routes:
        operation: Row = {
            "summary": route.summary,
            "operationId": route.handler.__name__.removeprefix("http_"),
            "security": [{SCHEMES.get(route.scope, "jwt"): []}] if route.scope else [],
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": render_path_value(name)}
                for name in re.findall(r"{(\w+)}", route.path)
            ]
            + [{"name": f.name, "in": "query", "schema": render_field(f)} for f in route.query],
            "responses": {
                **{str(n): _render_response("The answer", route.answer) for n in route.statuses},
                "default": _render_response("What is wrong and what to do", "Error"),
            },
        }
        if route.body is not None:
            properties = {field.name: render_field(field) for field in route.body}
            needed = [field.name for field in route.body if field.required]
            shape = {"type": "object", "additionalProperties": False, "properties": properties}
            shape |= {"required": needed} if needed else {}
            content = {"application/json": {"schema": shape}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    components = {
        name: {
            "type": "object",
            "required": list(fields),
            "properties": {key: render_shape(text) for key, text in fields.items()},
        }
        for name, fields in schemas.items()
    }
    bearer = {"type": "http", "scheme": "bearer"}
    schemes = {"jwt": {**bearer, "bearerFormat": "JWT"}, "key": {**bearer, "bearerFormat": "oik1"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenInfra control plane", "version": VERSION},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
    }


def _render_response(text: str, schema: str) -> Row:
    shape = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": text, "content": {"application/json": {"schema": shape}}}


def match_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of a request and the values in its path; raises Refusal NOT_FOUND or 405."""
    allowed = []
    for route in ROUTES:
        form = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]{1,100})", re.escape(route.path))
        match = re.fullmatch(form, path)
        if match and route.method == method:
            values = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items()}
            return route, {name: check_text(value, name) for name, value in values.items()}
        if match:
            allowed.append(route.method)
    if allowed:
        raise refuse_method(method, allowed)
    raise Refusal("NOT_FOUND", "no such path", "see /api/v1/openapi.json")


class DeadlineReader(io.RawIOBase):
    """Reads what has come, then from a socket until one deadline, so nobody drips bytes."""

    def __init__(self, head: bytes, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._head = memoryview(head)
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._head:
            size = min(len(buffer), len(self._head))
            buffer[:size], self._head = self._head[:size], self._head[size:]
            return size
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


class HttpHandler(http.server.BaseHTTPRequestHandler):
    """One request on one connection; the reverse proxy opens a new one for the next."""

    protocol_version = "HTTP/1.1"
    server_version = "openinfra"
    sys_version = ""
    server: HttpServer

    def setup(self) -> None:
        super().setup()
        head, deadline = self.server.heads.pop(self.connection)
        self.rfile = io.BufferedReader(DeadlineReader(head, self.connection, deadline))

    def do_any(self) -> None:
        """Answer one request, whatever its method."""
        self.close_connection = True
        headers: dict[str, str] = {}
        try:
            status, body = self._answer()
        except Refusal as refusal:
            status = REFUSALS[refusal.code][1]
            scheme, body = "Bearer", render_problem(refusal)
            if self.path.partition("?")[0] == REGISTRY_AUTH:
                scheme, body = "Basic", render_registry_problem(refusal)
                headers["Docker-Distribution-Api-Version"] = "registry/2.0"
            if refusal.code == "UNAUTHORIZED":
                headers["WWW-Authenticate"] = f'{scheme} realm="openinfra"'
            if refusal.code == "TOO_MANY_REQUESTS":
                headers["Retry-After"] = "1"
            if refusal.code == "METHOD_NOT_ALLOWED":
                headers["Allow"] = refusal.todo.removeprefix("use ").replace(" or ", ", ")
        except Error as error:  # a database without its schema or rights
            log("ERROR", error.what, error.todo, path=self.path)
            status, body = 503, render_problem(Refusal("TRY_LATER", error.what, error.todo))
        except ConnectionError:
            raise  # the client went away: there is nobody to answer
        except TimeoutError:
            status, body = 408, render_problem(Refusal("TRY_LATER", "too slow", "send it at once"))
        except Exception as error:
            log("ERROR", "request failed", path=self.path, traceback=traceback.format_exc())
            kind = type(error).__name__
            what, todo = "the control plane has a bug", f"its log says more ({kind})"
            status, body = 500, render_problem(Refusal("INTERNAL", what, todo))
        self._reply(status, body, headers)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do_any
    do_TRACE = do_QUERY = do_any

    def _answer(self) -> tuple[int, dict[str, Any] | str]:
        cp = self.server.cp
        path, _, query = self.path.partition("?")
        if self.command == "GET" and path == "/metrics":
            return 200, self.server.call(cp.render_metrics())
        if self.command == "GET" and path == REGISTRY_AUTH:
            return self._check_registry()
        route, in_path = match_route(self.command, path)
        actor, customer = Actor("anonymous"), None
        if route.scope == "customer":
            actor, customer = self._check_key(self._read_bearer())
        elif route.scope:
            actor = self._check_token(route.scope)
        values = parse_query(route.query, query)
        raw = self._read_body() if route.scope else b""
        if route.body is None:
            if raw not in (b"", b"{}"):
                raise Refusal("BAD_REQUEST", "this request takes no body", "send none")
        else:
            values |= parse_fields(route.body, parse_body(raw))
        request = Request(actor, in_path, values, customer)
        status, body = self.server.call(route.handler(cp, request))
        failpoint("http.after_commit")
        return status, body

    def _read_bearer(self) -> str:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""

    def _check_key(self, text: str) -> tuple[Actor, Customer]:
        refusal = Refusal(
            "UNAUTHORIZED", "no valid key", "send yours: Authorization: Bearer oik1_…"
        )
        try:
            key = parse_token("oik1", text)
        except Refusal:
            raise refusal from None
        customer = self.server.call(find_customer(self.server.cp.customer_db, key))
        if customer is None:
            raise refusal
        return Actor(f"customer:{customer.customer_id}:{key.public_id}"), customer

    def _check_registry(self) -> tuple[int, dict[str, Any]]:
        """Answer Caddy's `forward_auth`: whether this caller may do that with the registry.

        Caddy keeps the query of the original request, which X-Forwarded-Uri holds as well.
        """
        password = parse_basic(self.headers.get("Authorization", ""))
        if not password:
            todo = "docker login, any user name, and your key oik1_… as the password"
            raise Refusal("UNAUTHORIZED", "the registry wants a customer's key", todo)
        names = ("X-Forwarded-Method", "X-Forwarded-Uri", "Content-Type")
        call = parse_registry_call(*(self.headers.get(name, "") for name in names))
        try:
            self._check_registry_call(password, call)
        except Refusal as refusal:
            if refusal.code == "UNAUTHORIZED":
                self.server.known.remove(password)
            raise
        return 200, {}

    def _check_registry_call(self, password: str, call: RegistryCall) -> None:
        if re.fullmatch("[0-9a-f]{64}", password):
            db = self.server.cp.customer_db
            self.server.call(check_pull(db, bytes.fromhex(password), call))
            self.server.known.add(password, f"host {sha256(password.encode()).hex()[:16]}")
        else:
            _, customer = self._check_key(password)
            self.server.known.add(password, f"customer {customer.customer_id}")
            decide_registry(call, customer.namespaces)
            directory = self.server.cp.settings.registry_dir
            if call.is_start and directory:
                check_room(*read_room(directory))

    def _check_token(self, scope: str) -> Actor:
        keys = self.server.cp.jwt_keys()
        try:
            claims = parse_jwt(self._read_bearer(), keys, time.time())
        except (ValueError, RecursionError):
            what, todo = "no valid token", "make one: cp_server.py token"
            raise Refusal("UNAUTHORIZED", what, todo) from None
        if not claims.scope & {scope, "admin"}:
            what = f"this token may not do that: it lacks the scope {scope}"
            raise Refusal("FORBIDDEN", what, f"make one: cp_server.py token --scope {scope}")
        return Actor(f"jwt:{claims.sub}:{claims.jti}")

    def _read_body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            what = "a body without Content-Length is not taken"
            raise Refusal("LENGTH_REQUIRED", what, "send Content-Length")
        lengths = self.headers.get_all("Content-Length", ["0"])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,12}", lengths[0]):
            raise Refusal("BAD_REQUEST", "Content-Length is no number", "send it once, in digits")
        length = int(lengths[0])
        if length > HTTP_BODY_BYTES:
            what = f"the body is larger than {HTTP_BODY_BYTES} bytes"
            raise Refusal("TOO_LARGE", what, "send less")
        kind = self.headers.get_content_type()
        if length and kind != "application/json":
            raise Refusal("NOT_JSON", "the body is not JSON", "send Content-Type: application/json")
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refusal("BAD_REQUEST", "the body ended early", "send it whole")
        return body

    def _reply(self, status: int, body: dict[str, Any] | str, headers: Mapping[str, str]) -> None:
        text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False) + "\n"
        kind = "text/plain; version=0.0.4" if isinstance(body, str) else "application/json"
        raw = text.encode()
        self.server.cp.metrics.add("openinfra_http_requests_total", status=str(status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind + "; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def send_error(
        self, code: int, _message: str | None = None, _explain: str | None = None
    ) -> None:
        """The standard library's own refusals (a bad request line, headers too long) as JSON.

        Its words are left out: they repeat the request, which may hold a secret.
        """
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        self.request_version = "HTTP/1.1"
        what = f"the request cannot be read: {http.HTTPStatus(code).phrase}"
        self._reply(code, render_problem(Refusal("BAD_REQUEST", what, "send HTTP/1.1")), {})

    def log_message(self, *_args: object) -> None:
        """Silent: Caddy logs requests, this file's errors go through `log`."""


def parse_body(raw: bytes) -> dict[str, Any]:
    """A request's JSON object; raises Refusal."""
    try:
        return parse_json(raw)
    except ValueError as error:
        what = f"the body is no JSON object: {type(error).__name__}"
        raise Refusal("BAD_REQUEST", what, "send one JSON object with each key once") from None


def render_problem(refusal: Refusal) -> dict[str, Any]:
    """A refusal as the API shows it."""
    problem = {"code": refusal.code.lower(), "message": str(refusal)}
    return {"error": {**problem, "field": refusal.field or None}}


def render_registry_problem(refusal: Refusal) -> dict[str, Any]:
    """A refusal as `docker` shows it (OCI distribution specification, error codes)."""
    codes = {"UNAUTHORIZED": "UNAUTHORIZED", "FORBIDDEN": "DENIED", "NOT_FOUND": "NAME_UNKNOWN"}
    codes |= {"TOO_MANY_REQUESTS": "TOOMANYREQUESTS", "TRY_LATER": "UNAVAILABLE"}
    code = codes.get(refusal.code, "UNSUPPORTED")
    return {"errors": [{"code": code, "message": str(refusal)}]}


def render_refused(status: int, refusal: Refusal, is_registry: bool) -> bytes:
    """A whole answer to who shall ask again later."""
    render = render_registry_problem if is_registry else render_problem
    body = json.dumps(render(refusal)) + "\n"
    return (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
        "Retry-After: 1\r\nCache-Control: no-store\r\n"
        f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


@dataclasses.dataclass
class Caller:
    """A connection whose request's head is not there yet, or which was refused."""

    address: Any
    until: float
    head: bytearray = dataclasses.field(default_factory=bytearray)
    is_refused: bool = False


class KnownPasswords:
    """Whose passwords were right at the registry, by their hashes.

    It decides only how often one may ask: each request is looked up in the database all the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[bytes, str] = {}  # what was seen last comes last

    def add(self, password: str, owner: str) -> None:
        """This one is right."""
        key = sha256(password.encode())
        with self._lock:
            self._owners.pop(key, None)
            self._owners[key] = owner
            if len(self._owners) > REGISTRY_KNOWN_MAX:
                del self._owners[next(iter(self._owners))]

    def remove(self, password: str) -> None:
        """This one is wrong, or not right any more."""
        with self._lock:
            self._owners.pop(sha256(password.encode()), None)

    def find(self, password: str) -> str:
        """Whose it is; empty when that is not known."""
        with self._lock:
            return self._owners.get(sha256(password.encode()), "") if password else ""


class HttpServer(http.server.HTTPServer):
    """HTTP on loopback with a fixed number of workers and a bounded queue.

    One thread accepts and collects heads; a worker gets a connection once its head is whole, so
    that who says nothing or drips holds up nobody. Who asks too often is refused by that thread.
    """

    request_queue_size = 128

    def __init__(self, cp: ControlPlane, loop: asyncio.AbstractEventLoop) -> None:
        self.cp = cp
        self.heads: dict[socket.socket, tuple[bytes, float]] = {}  # what HttpHandler takes over
        self._loop = loop
        self._workers = concurrent.futures.ThreadPoolExecutor(HTTP_WORKERS, "http")
        self._room = threading.BoundedSemaphore(HTTP_WORKERS + HTTP_QUEUE)
        self._open: set[socket.socket] = set()
        self._callers: dict[socket.socket, Caller] = {}  # in the order of `until`
        self._due = [0.0] * HTTP_PLACES  # by the hash of a client
        self.known = KnownPasswords()
        self._owner_of: dict[socket.socket, str] = {}  # of requests of the registry under way
        self._tell_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = threading.Event(), threading.Event()
        host, port = cp.settings.http_listen
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), HttpHandler)

    def server_bind(self) -> None:
        """Without http.server's look-up of this machine's name, which may hang."""
        socketserver.TCPServer.server_bind(self)

    def call(self, work: Any) -> Any:
        """Run a coroutine on the loop and wait for its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(HTTP_DEADLINE_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise Refusal("TRY_LATER", "the database is too slow", "try again") from None

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Accept and collect heads until `shutdown`."""
        self.socket.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ)
        while not self._stop.is_set():
            for key, _ in self._selector.select(poll_interval):
                if key.fileobj is self.socket:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._callers:
                    self._collect(key.fileobj)
            now = time.monotonic()
            while self._callers and next(iter(self._callers.values())).until < now:
                self._drop_oldest()
        while self._callers:
            self._drop_oldest()
        self._selector.close()
        self._stopped.set()

    def shutdown(self) -> None:
        """End `serve_forever` and wait for it."""
        self._stop.set()
        self._stopped.wait()

    def _accept(self) -> None:
        try:
            request, address = self.socket.accept()
        except BlockingIOError:
            return
        except OSError:  # it went away at once, or there are no more files
            if self._callers:
                self._drop_oldest()
            else:
                time.sleep(0.05)
            return
        if len(self._callers) >= HTTP_WAITING_MAX:
            self._drop_oldest()
        request.setblocking(False)
        self._wait_for(request, Caller(address, time.monotonic() + HTTP_DEADLINE_S))

    def _drop_oldest(self) -> None:
        self._forget(next(iter(self._callers))).close()

    def _wait_for(self, request: socket.socket, caller: Caller) -> None:
        self._callers[request] = caller
        self._selector.register(request, selectors.EVENT_READ)

    def _forget(self, request: socket.socket) -> socket.socket:
        del self._callers[request]
        self._selector.unregister(request)
        return request

    def _collect(self, request: socket.socket) -> None:
        """Read what has come; a head that is whole, or too long, or the last word, goes on."""
        caller = self._callers[request]
        try:
            part = request.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if caller.is_refused:  # what was not read would reset the answer away
            if not part:
                self._forget(request).close()
            return
        seen = max(0, len(caller.head) - 3)
        caller.head += part
        is_whole = re.search(rb"\n\r?\n", memoryview(caller.head)[seen:]) is not None
        if part and not is_whole and len(caller.head) < HTTP_HEAD_BYTES:
            return
        now, head = time.monotonic(), bytes(caller.head)
        self._forget(request)
        owner = self.known.find(parse_registry_password(head))
        try:
            self._admit(owner or parse_client(caller.address[0], head), bool(owner), now)
        except Refusal as refusal:
            status = REFUSALS[refusal.code][1]
            self.cp.metrics.add("openinfra_http_requests_total", status=str(status))
            with contextlib.suppress(OSError):
                is_registry = head.startswith(b"GET " + REGISTRY_AUTH.encode())
                request.send(render_refused(status, refusal, is_registry))
                request.shutdown(socket.SHUT_WR)
            self._wait_for(request, Caller(None, now + HTTP_DEADLINE_S, is_refused=True))
            return
        self.heads[request] = head, now + (HTTP_DEADLINE_S if is_whole else 1)
        request.settimeout(HTTP_DEADLINE_S)
        self._open.add(request)
        if owner:
            self._owner_of[request] = owner
        self._workers.submit(self._work, request, caller.address)

    def _admit(self, client: str, is_known: bool, now: float) -> None:
        """Take a place in the queue; raises Refusal for who asks too often, or when it is full."""
        if is_known and list(self._owner_of.values()).count(client) >= REGISTRY_ROOM:
            raise Refusal("TRY_LATER", "too many requests at once", "try again in a moment")
        limits = (REGISTRY_CALLS_S, REGISTRY_BURST) if is_known else (HTTP_CALLS_S, HTTP_BURST)
        if client:
            place = hash(client) % HTTP_PLACES  # by a secret of this process
            due = self._due[place]
            wait_s, self._due[place] = decide_hold(due, now, *limits, 0.0)
            if wait_s > 0:
                if now >= self._tell_at:
                    self._tell_at = now + LOG_AGAIN_S
                    log("WARN", "address refused: it asks too often", client=client)
                caller = "key" if is_known else "address"
                what = f"too many requests from this {caller}"
                raise Refusal("TOO_MANY_REQUESTS", what, "ask less often")
        if not self._room.acquire(blocking=False):
            raise Refusal("TRY_LATER", "too many requests at once", "try again in a moment")

    def _work(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
            request.shutdown(socket.SHUT_WR)
            until = time.monotonic() + HTTP_LINGER_S
            for _ in range(64):  # 4 MiB at most; what was not read would reset the answer
                request.settimeout(max(0.001, until - time.monotonic()))
                if not request.recv(65_536):
                    break
        except OSError:
            pass  # the client went away
        finally:
            self.heads.pop(request, None)
            self._owner_of.pop(request, None)
            self._open.discard(request)
            self.close_request(request)
            self._room.release()

    def close(self) -> None:
        """Stop taking connections; what was read whole is answered, what drips is cut off."""
        self.shutdown()
        self.server_close()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RD)
        self._workers.shutdown(wait=True, cancel_futures=True)
        for request in self._open:
            request.close()


# ---------------------------------------------------------------------------------------------
# Wiring: starts and stops the serving process.
# ---------------------------------------------------------------------------------------------


async def serve(settings: Settings) -> None:
    """Run the control plane until SIGTERM or SIGINT; a second signal kills."""
    read_jwt_keys(settings.jwt_keys_file)
    dsn, key = read_dsn(settings.dsn_file), read_secrets_key(settings.secrets_key_file)
    # A plan made once for any filter reads the whole table for some of them (test_hosts_api.py).
    custom = "-c plan_cache_mode=force_custom_plan"
    admin_db = Database(dsn, 2, wait_s=1, rest_s=1, options=custom, secrets_key=key)
    # Batches and sweeps do not wait for it one by one.
    beat_db = Database(dsn, 2, rest_s=1, secrets_key=key)
    customer_db = Database(dsn, 2, wait_s=1, rest_s=1, options=custom, secrets_key=key)
    bill_db = Database(dsn, 1, options=custom)
    earn_db = Database(dsn, 1, wait_s=1, rest_s=1, options=custom)
    db = Database(dsn, 4)
    pools = (db, beat_db, admin_db, customer_db, bill_db, earn_db)
    cp = ControlPlane(settings, *pools)
    cp.has_key = bool(key)
    try:
        for pool in pools:
            await pool.open()
        async with cp.beat_db.transaction() as tx:
            check_schema_version(await read_schema_version(tx))
        await run_server(cp)
    finally:
        for pool in pools:
            await pool.close()


def silence_broken_calls() -> None:
    """Keep grpc.aio from printing a traceback for a call that went away before its refusal.

    It does so by `traceback.print_exc` (grpcio 1.83, server.pyx, _handle_exceptions) for a call
    whose path is not UTF-8: anybody in the tunnel could fill the log with it.
    """
    show = traceback.print_exc

    def print_exc(*args: Any, **named: Any) -> None:
        if type(sys.exc_info()[1]).__name__ != "ExecuteBatchError":
            show(*args, **named)

    vars(traceback)["print_exc"] = print_exc


async def run_server(cp: ControlPlane) -> None:
    """Open both ports, run the loops until a signal or a fault ends them, close in order."""
    silence_broken_calls()
    settings, loop = cp.settings, asyncio.get_running_loop()
    probe_port(*settings.grpc_listen, "grpc-listen")
    probe_port(*settings.http_listen, "http-listen")
    await ensure_currency(cp.beat_db, settings.currency)
    web = HttpServer(cp, loop)
    server = make_grpc_server(cp)
    async with cp.beat_db.transaction() as tx:  # both ports are ours: it will serve
        await tx.execute(SQL_SERVE_START)
        await tx.execute(SQL_SECRETS_KEY)
    await server.start()
    threading.Thread(target=web.serve_forever, args=(0.1,), name="http-accept").start()
    flusher = asyncio.create_task(cp.flush_forever())
    loops = [cp.sweep_forever, cp.placer.place_forever]
    loops += [cp.biller.bill_forever, cp.biller.check_forever]
    keepers = [*(asyncio.create_task(each()) for each in loops), *cp.peers.loops()]
    ended = asyncio.create_task(server.wait_for_termination())  # without being told to
    stop = catch_signals(loop)
    log(
        "INFO",
        "control plane ready",
        version=VERSION,
        grpc=render_address(settings.grpc_listen),
        http=render_address(settings.http_listen),
        peer_check="wg" if settings.peer_check else "off",
    )
    sd_notify("READY=1")
    tasks = (flusher, *keepers, ended)
    await asyncio.wait({asyncio.create_task(stop.wait()), *tasks}, return_when="FIRST_COMPLETED")
    await stop_serving(cp, server, web, flusher, keepers)
    for task in tasks:  # one that ended by itself is a bug to be seen
        if task.done() and not task.cancelled():
            task.result()


def catch_signals(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets once; after that the signal has its default effect."""
    stop = asyncio.Event()

    def on_signal() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


async def stop_serving(
    cp: ControlPlane,
    server: grpc.aio.Server,
    web: HttpServer,
    flusher: asyncio.Task[None],
    keepers: Sequence[asyncio.Task[None]],
) -> None:
    """Not ready, in-flight calls end, heartbeats are flushed; STOP_ALL_S for all of it."""
    log("INFO", "control plane stopping")
    sd_notify("STOPPING=1")
    last = threading.Timer(STOP_ALL_S, end_now)
    last.daemon = True
    last.start()
    cp.stop()
    for keeper in keepers:
        keeper.cancel()
    await server.stop(STOP_S)  # until then /readyz says that it stops
    await asyncio.get_running_loop().run_in_executor(None, web.close)
    _, late = await asyncio.wait({flusher, *keepers}, timeout=STOP_S)
    for task in late:
        task.cancel()
    if late:
        log("WARN", "the database gave no answer before the end", "agents repeat their heartbeats")
    log("INFO", "control plane stopped")


def end_now() -> None:
    """End the process although something hangs; nothing that was acknowledged is lost by it."""
    log("WARN", "control plane ended while a call or the database hung")
    os._exit(0)


def render_address(address: tuple[str, int]) -> str:
    """`host:port`."""
    return f"{address[0]}:{address[1]}"


# ---------------------------------------------------------------------------------------------
# Pilot: the whole thing on one machine for a newcomer. Starts processes, writes one directory.
# ---------------------------------------------------------------------------------------------

PILOT_WALLET = "So11111111111111111111111111111111111111112"  # Solana's well-known wrapped SOL mint
PILOT_START_S = 30.0  # each part has this long to come up
PILOT_BEATS = 2  # so many more heartbeats, so that there is something to bill
PILOT_REGISTRY = "registry.invalid"  # there is none (RFC 2606): nothing is pulled
PILOT_DIGEST = hashlib.sha256(b"a plain process").hexdigest()
PILOT_IMAGE = f"{PILOT_REGISTRY}/pilot/counter@sha256:{PILOT_DIGEST}"
PILOT_ORDER = {
    "name": "counter",
    "image": PILOT_IMAGE,
    "command": [
        "/bin/sh",
        "-c",
        "while :; do n=$((n + 1)); [ $((n % 9999)) = 0 ] && sleep 1; done",
    ],
    "cpu_milli": 500,
    "memory_bytes": 64 << 20,
}
# So dear that seconds show.
PILOT_PRICES = {
    "cpu_hour_micros": 3_600_000,
    "gb_hour_micros": 360_000,
    "egress_gb_micros": 0,
    "provider_share_ppm": 800_000,
}
STAND_IN_USER = 65534  # nobody; what the workload is when root runs the pilot
STAND_IN = "a plain process that stands in for a container"
DOCKER_SOCKET = "/run/docker.sock"
DOCKER_LABEL = "openinfra.pilot"  # on all that a pilot makes there, with a name of its directory
DOCKER_TIMEOUT_S = 20.0
PILOT_PROGRAMS = ("/bin/sh", "/bin/sleep")  # of this machine: what the workload's image has


@dataclasses.dataclass(frozen=True)
class PilotPlan:
    """Where the pilot keeps what, and how it runs each part."""

    root: Path
    postgres_bin: Path
    postgres_user: str  # initdb refuses root; empty: the user who started the pilot
    grpc_port: int
    http_port: int
    heartbeat_s: float
    currency: str
    docker: str  # its socket; where none answers, a plain process stands in

    @property
    def cluster(self) -> Path:
        return self.root / "pg" / "postgres"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def cp_dir(self) -> Path:
        return self.root / "cp"

    @property
    def agent_dir(self) -> Path:
        return self.root / "agent"

    def dsn(self, role: str, database: str = "openinfra") -> str:
        return f"host={self.run_dir} port=5432 dbname={database} user={role}"

    def bound(self, argv: Sequence[str | Path], end: str = "TERM", user: str = "") -> list[str]:
        """The command as `user`, with a signal that reaches it when the pilot is killed."""
        switch = [f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        return ["setpriv", *switch, f"--pdeathsig={end}", "--", *map(str, argv)]

    def postgres_argv(self) -> list[str]:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.run_dir),
            "unix_socket_permissions": "0700",
            "max_connections": "20",
            "shared_buffers": "32MB",
        }
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        argv: list[str | Path] = [self.postgres_bin / "postgres", "-D", self.cluster, *flags]
        return self.bound(argv, "INT", self.postgres_user)

    def cp_argv(self) -> list[str]:
        argv = [
            sys.executable,
            str(Path(__file__).resolve()),
            "serve",
            f"--env-file={os.devnull}",
            f"--dsn-file={self.cp_dir / 'dsn'}",
            f"--jwt-keys-file={self.cp_dir / 'jwt-keys.json'}",
            f"--secrets-key-file={self.cp_dir / 'secrets.key'}",
            f"--grpc-listen=127.0.0.1:{self.grpc_port}",
            f"--http-listen=127.0.0.1:{self.http_port}",
            f"--registry={PILOT_REGISTRY}",
            f"--currency={self.currency}",
            "--peer-check=off",
            f"--heartbeat-s={self.heartbeat_s:g}",
        ]
        return self.bound(argv)

    def engine_argv(self) -> list[str]:
        argv: list[str | Path] = [sys.executable, Path(__file__).resolve(), "pilot-engine"]
        return self.bound([*argv, f"--docker={self.docker}", f"--dir={self.root}"])

    def agent_argv(self, command: str) -> list[str]:
        script = Path(__file__).resolve().parent / "agent.py"
        return [sys.executable, str(script), command, f"--socket={self.agent_dir / 'agent.sock'}"]

    def agent_run_argv(self) -> list[str]:
        flags = [
            f"--env-file={self.agent_dir / 'agent.env'}",
            # The machine's own key, engine and limits are not ours.
            f"--wg-pubkey-file={self.agent_dir / 'openinfra.pub'}",
            f"--lease-file={self.agent_dir / 'lease.json'}",
            f"--secrets-dir={self.agent_dir / 'secrets'}",
            f"--engine-socket={self.agent_dir / 'engine.sock'}",
            f"--limits={self.agent_dir / 'limits.conf'}",
            "--allow-unencrypted",
        ]
        return self.bound([*self.agent_argv("run"), *flags])


class EngineDoor:
    """Where the pilot's agent finds its container engine: part of Docker's Engine API."""

    server: socketserver.UnixStreamServer | None = None

    def open(self, path: Path) -> None:
        """Answer on a socket from now on."""
        path.unlink(missing_ok=True)
        self.server = socketserver.UnixStreamServer(str(path), self._make_handler())
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
        self.thread.start()

    def _make_handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                words = re.sub("^/v[0-9.]+", "", url.path).strip("/").split("/")
                query = dict(urllib.parse.parse_qsl(url.query))
                body = json.loads(raw) if raw else {}
                status, answer = door.answer(self.command, words, query, body)
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the agent may be gone by now
                    self.wfile.write(text)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                """Be silent."""

        return Handler

    def answer(
        self, method: str, words: Sequence[str], query: Mapping[str, str], body: Row
    ) -> tuple[int, object]:
        """Status and JSON for one request, or bytes as they are; 204 has none of these."""
        raise NotImplementedError

    def close(self) -> None:
        """Answer no more."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()


class StandIn(EngineDoor):
    """Without an engine the pilot's workload is a plain process, in no sandbox.

    This runs the pilot's own image and no other. One thread makes all the processes: when it ends,
    the kernel ends them.
    """

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, Row] = {}
        self.networks: list[Row] = []
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.open(path)

    def answer(
        self, method: str, words: Sequence[str], query: Mapping[str, str], body: Row
    ) -> tuple[int, object]:
        """Answer as an engine does that has one image."""
        match (method, *words):
            case ("GET", "_ping"):
                return 200, b"OK"
            case ("GET", "version"):
                return 200, {"Version": "stand-in", "MinAPIVersion": "1.41"}
            case ("GET", "info"):
                return 200, {}
            case ("GET", "images", *name, "json") if "/".join(name) == PILOT_IMAGE:
                return 200, {"Config": {}}
            case ("GET", "networks"):
                return 200, self.networks
            case ("POST", "networks", "create"):
                self.networks.append(body)
                return 201, {}
            case ("DELETE", "networks", name):
                self.networks = [each for each in self.networks if each["Name"] != name]
                return 204, b""
            case ("GET", "containers", "json"):
                return 200, [self._look(name) for name in self.rows]
            case ("POST", "containers", "create"):
                return 201, self._create(query["name"], body)
            case (_, "containers", name, *what) if name in self.rows:
                return self._answer_of(name, "".join(what) or method, query)
        return 404, {"message": "no such image, container or call"}

    def _answer_of(self, name: str, what: str, query: Mapping[str, str]) -> tuple[int, object]:
        child, is_running = self.children.get(name), self._state(name)["Running"]
        if what == "json":
            return 200, self._look(name) | {"State": self._state(name)}
        if what == "stats":
            return 200, read_process_stats(child.pid) if child and is_running else {}
        if what == "start" and not is_running:
            self.children[name] = self._start(self.rows[name]["Cmd"])
        if what == "kill" and child:
            child.send_signal(signal.Signals[query.get("signal", "SIGKILL")])
        if what == "DELETE":
            del self.rows[name]
        return (204, b"") if what in ("start", "kill", "DELETE") else (404, {"message": what})

    def _create(self, name: str, body: Row) -> Row:
        made = hashlib.sha256(f"{name} {time.time_ns()}".encode()).hexdigest()
        self.rows[made] = {"Id": made, "Names": [f"/{name}"], **body}
        return {"Id": made}

    def _state(self, name: str) -> Row:
        child = self.children.get(name)
        code = child.poll() if child else None
        exit_code = 128 - code if code is not None and code < 0 else code or 0
        return {"Running": child is not None and code is None, "ExitCode": exit_code}

    def _look(self, name: str) -> Row:
        state = "running" if self._state(name)["Running"] else "exited"
        return self.rows[name] | {"State": state if name in self.children else "created"}

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        nobody = f"--reuid={STAND_IN_USER} --regid={STAND_IN_USER} --clear-groups".split()
        switch = [*(nobody if os.geteuid() == 0 else ()), "--pdeathsig=KILL", "--no-new-privs"]
        quiet = subprocess.DEVNULL
        full = ["setpriv", *switch, "--", *argv]
        return subprocess.Popen(full, stdin=quiet, stdout=quiet, stderr=quiet, cwd="/", env={})

    def close(self) -> None:
        """End it, and the processes with it."""
        super().close()
        for child in self.children.values():
            child.kill()
            child.wait()


class DockerDoor(EngineDoor):
    """Between the pilot's agent and this machine's Docker, of which it shows only what is ours.

    The workload's image is made from two programs of this machine. What is made there carries a
    label, is removed at the end, and what an earlier run left there is removed at the start.
    """

    def __init__(self, docker: Path, name: str) -> None:
        self.docker, self.name, self.image = docker, name, ""
        self.label = f"{DOCKER_LABEL}={name}"

    def open(self, path: Path) -> None:
        """Begin with nothing of an earlier run there, and with the image; raises Error."""
        self.sweep()
        self.image = self._import_image()
        super().open(path)

    def ask(self, method: str, path: str, body: object = None, **query: str) -> tuple[int, bytes]:
        """One request to Docker, in its own version of the API; raises Error."""
        connection = http.client.HTTPConnection("docker", timeout=DOCKER_TIMEOUT_S)
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection.sock:
            try:
                connection.sock.settimeout(DOCKER_TIMEOUT_S)
                connection.sock.connect(str(self.docker))
                target = f"{path}?{urllib.parse.urlencode(query)}"
                connection.request(method, target, raw, {"Content-Type": kind} if raw else {})
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                what = f"no Docker answers at {self.docker}: {error}"
                raise Error(what, "give the path of another socket, or --docker=") from None

    def read_ours(self, path: str) -> list[Row]:
        """The rows of a list that carry our label, whatever Docker makes of the filter."""
        filters = json.dumps({"label": [self.label]})
        status, raw = self.ask("GET", path, None, filters=filters, all="1")
        try:
            rows: list[Row] = json.loads(raw) if status == 200 else []
            found = [row for row in rows if (row["Labels"] or {}).get(DOCKER_LABEL) == self.name]
        except (ValueError, TypeError, KeyError, AttributeError):
            status = 502
        if status != 200:
            raise Error(f"Docker's {path} got {status}: {raw[:200]!r}", "run it with --docker=")
        return found

    def sweep(self) -> None:
        """Remove what pilots of this directory made there."""
        for kind, listed in (("containers", "/json"), ("networks", ""), ("images", "/json")):
            for row in self.read_ours(f"/{kind}{listed}"):
                self.ask("DELETE", f"/{kind}/{row['Id']}", None, force="1")

    def _import_image(self) -> str:
        image = make_pilot_image(PILOT_PROGRAMS)
        query = {"fromSrc": "-", "repo": "openinfra-pilot", "tag": self.name}
        query["changes"] = f"LABEL {self.label}"
        status, raw = self.ask("POST", "/images/create", image, **query)
        found = re.findall(rb'"status": *"(sha256:[0-9a-f]{64})"', raw)
        if status != 200 or not found:
            raise Error(f"Docker takes no image: {raw[:200]!r}", "run it with --docker=")
        return str(found[-1].decode())

    def answer(
        self, method: str, words: Sequence[str], query: Mapping[str, str], body: Row
    ) -> tuple[int, object]:
        """Pass on what is about the pilot's own containers and networks, and nothing else."""
        try:
            return self._pass_on(method, words, query, body)
        except Error as error:
            return 503, {"message": error.what}

    def _pass_on(
        self, method: str, words: Sequence[str], query: Mapping[str, str], body: Row
    ) -> tuple[int, object]:
        path = "/" + "/".join(words)
        match (method, *words):
            case ("GET", "images", *name, "json") if "/".join(name) == PILOT_IMAGE:
                return 200, {"Config": {}}
            case ("GET", "containers", "json") | ("GET", "networks"):
                return 200, self.read_ours(path)
            case ("GET", "_ping" | "version" | "info"):
                pass
            case ("POST", "containers" | "networks", "create"):
                body = {**body, "Labels": {**body["Labels"], DOCKER_LABEL: self.name}}
                if words[0] == "containers":
                    body["Image"] = self.image
            case (_, "containers", name, *_) if self._has("/containers/json", "Id", name):
                pass
            case ("DELETE", "networks", name) if self._has("/networks", "Name", name):
                pass
            case _:
                return 404, {"message": "no such image, container or call"}
        return self.ask(method, path, body or None, **query)

    def _has(self, path: str, key: str, value: str) -> bool:
        return any(row[key] == value for row in self.read_ours(path))

    def close(self) -> None:
        """Answer no more, and leave nothing there."""
        super().close()
        self.sweep()


def make_pilot_image(programs: Sequence[str]) -> bytes:
    """A tar of programs with the libraries they need (ldd(1)), as `docker import` takes it."""
    paths = set(programs)
    for program in programs:
        done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        paths |= set(re.findall(r"(?:=> |^\s*)(/\S+) \(0x", done.stdout, re.MULTILINE))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for path in sorted(paths):
            raw = Path(path).read_bytes()
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(raw), 0o755
            tar.addfile(entry, io.BytesIO(raw))
    return made.getvalue()


def read_process_stats(pid: int) -> Row:
    """What a process used, as Docker's statistics have it (proc(5): stat, statm)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return {}  # it has just ended
    cpu_ns = (int(stat[11]) + int(stat[12])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    memory = {"usage": pages * os.sysconf("SC_PAGE_SIZE")}
    return {"cpu_stats": {"cpu_usage": {"total_usage": cpu_ns}}, "memory_stats": memory}


class Pilot:
    """Runs PostgreSQL, control plane, engine and one agent as children, and ends them in order."""

    def __init__(self, plan: PilotPlan) -> None:
        self.began = time.monotonic()
        self.since = dt.datetime.now(dt.timezone.utc).date()
        self.cp_ready_s = 0.0
        self.plan = plan
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.stand_in: StandIn | None = None
        self.token = self.key = self.workload = ""
        self.kind = STAND_IN

    def say(self, text: str) -> None:
        """Print progress with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def log_path(self, name: str) -> Path:
        return self.plan.root / "log" / f"{name}.log"

    def start(self, name: str, argv: Sequence[str]) -> None:
        """Start a child, away from the terminal's Ctrl-C, its output in the log directory."""
        with open(self.log_path(name), "ab") as output:
            self.children[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )

    def stop(self, name: str) -> None:
        """End a child: SIGTERM (PostgreSQL: SIGINT, its fast way), SIGKILL after 15 s."""
        child = self.children.pop(name, None)
        if child is None:
            return
        child.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def stop_all(self) -> None:
        """End what was started, in the reverse order."""
        for name in reversed(list(self.children)):
            self.stop(name)
        if self.stand_in is not None:
            self.stand_in.close()

    def check_children(self) -> None:
        """Raises Error when a child has ended by itself, with the last line of its log."""
        for name, child in self.children.items():
            code = child.poll()
            if code is not None:
                tail = self.log_path(name).read_text(errors="replace").strip().splitlines()[-3:]
                what = f"{name} ended with {code}: {' / '.join(tail) or 'it said nothing'}"
                raise Error(what, f"read {self.log_path(name)}")

    def wait_for(self, what: str, probe: Callable[[], T | None]) -> T:
        """The first result of `probe` that is not None; raises Error when it takes too long."""
        deadline = time.monotonic() + PILOT_START_S
        while time.monotonic() < deadline:
            self.check_children()
            found = probe()
            if found is not None:
                return found
            time.sleep(0.05)
        todo = f"read what is in {self.plan.root / 'log'}"
        raise Error(f"{what} did not come up in {PILOT_START_S:g} s", todo)

    def start_postgres(self) -> None:
        """Make the cluster once, start it, make database, roles and schema."""
        plan = self.plan
        if not (plan.cluster / "PG_VERSION").exists():
            self.say("making a PostgreSQL cluster")
            fresh = plan.cluster.with_name("postgres.new")
            shutil.rmtree(fresh, ignore_errors=True)
            flags = "-U postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-instructions"
            argv: list[str | Path] = [plan.postgres_bin / "initdb", "-D", fresh, *flags.split()]
            run(plan.bound(argv, "KILL", plan.postgres_user), timeout_s=120, echo=False)
            os.rename(fresh, plan.cluster)
        self.start("postgres", plan.postgres_argv())
        superuser = plan.dsn("postgres", "postgres")
        self.wait_for("PostgreSQL", lambda: can_connect(superuser))
        with psycopg.connect(superuser, autocommit=True) as connection:
            if not connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = 'openinfra'"
            ).fetchone():
                connection.execute("CREATE DATABASE openinfra")
        applied = asyncio.run(migrate(plan.dsn("postgres"), "openinfra"))
        self.say(f"PostgreSQL is up{', schema made' if applied else ''}")

    def start_cp(self) -> None:
        """Start the control plane and wait until it is ready."""
        plan = self.plan
        write_file(plan.cp_dir / "dsn", plan.dsn("openinfra").encode() + b"\n", 0o600)
        key_file = plan.cp_dir / "jwt-keys.json"
        key = read_jwt_keys(key_file)[-1] if key_file.exists() else add_jwt_key(key_file, [])
        self.token = mint_jwt(key, "pilot", "admin", JWT_MAX_S)
        write_file(plan.cp_dir / "admin.jwt", self.token.encode() + b"\n", 0o600)
        began = time.monotonic()
        self.start("control-plane", plan.cp_argv())
        # Another one, quicker at the same port, does not take our token.
        ours = "/api/v1/admin/hosts"
        self.wait_for("the control plane", lambda: self.get("/readyz") and self.get(ours))
        self.cp_ready_s = time.monotonic() - began
        self.say(f"control plane is ready: {self.url('')}")

    def start_agent(self) -> None:
        """Start the agent; with an invite when it has no identity yet."""
        plan = self.plan
        environment = plan.agent_dir / "agent.env"
        if not (plan.agent_dir / "data" / "identity.json").exists():
            order = {"note": "pilot", "ttl_hours": 1, "payout_pubkey": PILOT_WALLET}
            invite = self.request("POST", "/api/v1/admin/host-invites", order)
            lines = {
                "INVITE_TOKEN": invite["token"],
                "SOLANA_PAYOUT_PUBKEY": PILOT_WALLET,
                "CONTROL_PLANE": f"127.0.0.1:{plan.grpc_port}",
                "DATA_DIR": str(plan.agent_dir / "data"),
            }
            text = "".join(f"{key}={value}\n" for key, value in lines.items())
            write_file(environment, text.encode(), 0o600)
            self.say(f"invite minted: {invite['id']}")
            write_file(plan.agent_dir / "limits.conf", b"CPUS=0.5\nMEMORY=128M\n", 0o644)
        self.start("agent", plan.agent_run_argv())

    def start_engine(self) -> None:
        """A door to this machine's Docker; without one, a plain process stands in."""
        plan, door = self.plan, self.plan.agent_dir / "engine.sock"
        door.unlink(missing_ok=True)
        why = f"no Docker is at {plan.docker}" if plan.docker else "without Docker"
        if Path(plan.docker).is_socket():
            self.start("engine", plan.engine_argv())
            try:
                self.wait_for("the door to Docker", lambda: door.is_socket() or None)
            except Error as error:
                self.stop("engine")
                why = error.what
            else:
                self.kind = f"a container of the Docker at {plan.docker}"
                return
        self.say(f"{why}: the workload will be {STAND_IN}")
        self.stand_in = StandIn(door)

    def wait_online(self) -> Row:
        """The pilot's host, online by a heartbeat to this run's control plane."""
        self.wait_for("the first heartbeat", lambda: count_heartbeats(self, 1))
        found = self.wait_for("the host", self._online)
        self.say(f"host {found['host_id']} is online, assignable: {found['assignable']}")
        return found

    def order(self) -> Row:
        """Post the pilot's workload as its customer does, and wait until it runs."""
        key_file = self.plan.cp_dir / "customer.key"
        if not key_file.exists():
            key = asyncio.run(with_database(self.plan.cp_dir / "dsn", add_pilot_customer))
            write_file(key_file, key.encode() + b"\n", 0o600)
        self.key = key_file.read_text().strip()
        made: Row = self.request("POST", "/api/v1/workloads", PILOT_ORDER, self.key)
        self.workload = f"/api/v1/workloads/{made['workload_id']}"
        try:
            self.wait_for("the workload", lambda: self.get_workload("running"))
        except Error as error:
            found = self.request("GET", self.workload, key=self.key)
            reasons = {each["reason"] for each in found["assignments"] if each["reason"]}
            what = f"{error.what}: {'; '.join(sorted(reasons)) or found['state']}"
            raise Error(what, f"{error.todo}, or run it with --docker=") from None
        self.say(f"a workload runs: {self.kind}")
        return made

    def get_workload(self, state: str) -> Row | None:
        """The workload, once it is in this state."""
        try:
            found = self.request("GET", self.workload, key=self.key)
        except Error:
            return None
        return found if found["state"] == state else None

    def bill(self) -> tuple[list[Bill], list[Path]]:
        """End the workload, close its hour early, and write invoice and statement."""
        self.request("DELETE", self.workload, key=self.key)
        self.wait_for("the workload's end", lambda: self.get_workload("deleted"))
        read = functools.partial(read_pilot_bills, since=self.since)
        bills = asyncio.run(with_database(self.plan.cp_dir / "dsn", read))
        print(f"\nwhat the workload used, {self.kind}:")
        invoices = [bill for bill in bills if bill.kind == "invoice"]
        counted = functools.partial(read_counted, bills=invoices)
        print(render_usage(invoices, asyncio.run(with_database(self.plan.cp_dir / "dsn", counted))))
        print("\nits customer's invoice, and its provider's statement:")
        print(render_bills(bills, self.plan.currency), flush=True)
        return bills, write_bills(bills, self.plan.root / "bills", self.plan.currency)

    def _online(self) -> Row | None:
        hosts = (self.get("/api/v1/admin/hosts?status=online") or {"hosts": []})["hosts"]
        return hosts[0] if hosts else None

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.plan.http_port}{path}"

    def request(self, method: str, path: str, body: object = None, key: str = "") -> Any:
        """One call of the HTTP API, as an operator would make it, or with a customer's key."""
        bearer = f"Bearer {key or self.token}"
        headers = {"Authorization": bearer, "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url(path), data, headers, method=method)  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise Error(f"{method} {path} got {error.code}: {said}", "report this bug") from None
        except OSError as error:
            todo = f"read {self.log_path('control-plane')}"
            raise Error(f"{method} {path}: {error}", todo) from None
        return json.loads(raw) if "json" in answer.headers["Content-Type"] else raw.decode()

    def get(self, path: str) -> Any:
        """The answer of a GET, or None when there is none yet."""
        try:
            return self.request("GET", path)
        except Error:
            return None


async def add_pilot_customer(db: Database) -> str:
    """The pilot's customer and its prices; gives back a key."""
    if not await list_rate_cards(db):
        hour = dt.datetime.now(dt.timezone.utc).replace(minute=0, second=0, microsecond=0)
        await add_rate_card(db, cli_actor(), None, hour, **PILOT_PRICES)
    found = await list_customers(db, {"limit": 2**31 - 1, "cursor": 0})
    known = [each for each in found if "pilot" in each.namespaces]  # its key was lost
    customer = known[0] if known else await add_customer(db, cli_actor(), "Pilot", "pilot")
    return (await mint_key(db, cli_actor(), customer.customer_id, "pilot"))[0]


async def read_pilot_bills(db: Database, since: dt.date) -> list[Bill]:
    """Close this hour early, since nothing runs any more; then read the bills of all months."""
    cursor: int | None = 0
    while cursor is not None:
        done = await close_windows(db, cursor, grace_s=-3600)
        cursor = done.cursor if done.is_mine else cursor
        await asyncio.sleep(0 if done.is_mine else 0.1)
    month, bills = since.replace(day=1), []
    while month <= dt.datetime.now(dt.timezone.utc).date():
        customers, providers = await list_bill_owners(db, month)
        bills += [await read_invoice(db, each, month) for each in customers]
        bills += [await read_statement(db, each, month) for each in providers]
        month = (month + dt.timedelta(days=31)).replace(day=1)
    return bills


def can_connect(dsn: str) -> bool | None:
    """True when PostgreSQL answers, else None."""
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return None
    return True


def free_port(wanted: int) -> int:
    """The wanted port on loopback when it is free, else one that is."""
    for port in (wanted, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise Error("no port of 127.0.0.1 is free", "end a program that listens: ss -ltnp")


def plan_pilot(root: Path, heartbeat_s: float, currency: str, docker: str) -> PilotPlan:
    """Lay out the pilot's directory, choose user and ports; a later run keeps its ports."""
    ensure_packages(want_venv=False)
    postgres_bin = find_postgres()
    if postgres_bin is None:
        todo = "type: sudo apt-get install -y --no-install-recommends postgresql"
        raise Error("PostgreSQL was not found on this machine", todo)
    if len(str(root / "run" / ".s.PGSQL.5432")) > 100:
        raise Error(f"the path {root} is too long for a socket", "choose a shorter --dir")
    user = "postgres" if os.geteuid() == 0 else ""
    os.chmod(root, 0o711)  # noqa: S103 - PostgreSQL's user passes through
    for name in ("log", "cp", "agent", "agent/data"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    for name in ("pg", "run"):
        path = root / name
        path.mkdir(mode=0o700, exist_ok=True)
        if user:
            shutil.chown(path, user, user)
    saved = root / "ports.json"
    is_default = root == default_pilot_dir()
    ports = {"grpc": 9092, "http": 8080} if is_default else {"grpc": 0, "http": 0}
    ports = json.loads(saved.read_text()) if saved.exists() else ports
    chosen = {name: free_port(port) for name, port in ports.items()}
    if saved.exists() and chosen != ports:
        busy = next(ports[name] for name in ports if chosen[name] != ports[name])
        what = f"port {busy} of 127.0.0.1, which this pilot used before, is taken"
        raise Error(what, f"end what has it (ss -ltnp), or remove {root} to start anew")
    write_file(saved, json.dumps(chosen).encode() + b"\n", 0o644)
    pair = (chosen["grpc"], chosen["http"])
    return PilotPlan(root, postgres_bin, user, *pair, heartbeat_s, currency, docker)


@contextlib.contextmanager
def hold_pilot(root: Path) -> Iterator[None]:
    """Make the directory, ours alone, and keep a second pilot out; raises Error 3 or 75."""
    root.mkdir(parents=True, exist_ok=True)
    if os.lstat(root).st_uid != os.geteuid():  # its owner could put links where root writes
        raise Error(f"{root} belongs to another user", "choose another --dir", 3)
    with open(root / "pilot.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another pilot runs in {root}"
            raise Error(what, "stop that one, or choose another --dir", 75) from None
        yield


def default_pilot_dir() -> Path:
    """Where the pilot keeps its data: for root a place that PostgreSQL's user can reach."""
    if os.geteuid() == 0:
        return Path("/var/lib/openinfra-pilot")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "openinfra-pilot"


def run_pilot(plan: PilotPlan) -> None:
    """Bring everything up and keep it up until Ctrl-C or SIGTERM; bill the workload at the end."""
    pilot = Pilot(plan)
    try:
        bring_up(pilot)
        pilot.order()
        here = Path(__file__).resolve()
        print(
            f"""
The pilot runs, for this machine only: no tunnel and no encryption, and its one workload is
{pilot.kind}. Ctrl-C stops all of it, with an invoice for the workload.
  what the agent says   {shlex.join(pilot.plan.agent_argv("status"))}
  the hosts             curl -sS {pilot.url("/api/v1/admin/hosts")} \\
                          -H "Authorization: Bearer $(cat {pilot.plan.cp_dir / "admin.jwt"})"
  the workload          curl -sS {pilot.url(pilot.workload)} \\
                          -H "Authorization: Bearer $(cat {pilot.plan.cp_dir / "customer.key"})"
  another invite        {sys.executable} {here} invite --dsn-file {pilot.plan.cp_dir / "dsn"}
  logs and data         {plan.root}
""",
            flush=True,
        )
        while True:
            pilot.check_children()
            time.sleep(0.5)
    except KeyboardInterrupt:
        pilot.say("stopping")
        try:
            for path in pilot.bill()[1] if pilot.workload else ():
                print(f"  {path}", flush=True)
        except Error as error:  # a shutdown ends the control plane at the same time
            pilot.say(f"no bill: {error.what}")
    finally:
        pilot.stop_all()


def bring_up(pilot: Pilot) -> Row:
    """PostgreSQL, control plane, engine, agent; give back the host once it is online."""
    pilot.start_postgres()
    pilot.start_cp()
    pilot.start_engine()
    pilot.start_agent()
    return pilot.wait_online()


def check_pilot(plan: PilotPlan) -> Row:
    """Bring everything up, with a workload; restart the agent once, bill, take everything down.

    Gives back the figures.
    """
    pilot = Pilot(plan)
    try:
        host = bring_up(pilot)
        online_s = time.monotonic() - pilot.began
        pilot.order()
        ran = time.monotonic()
        beats = pilot.wait_for("a second heartbeat", lambda: count_heartbeats(pilot, 2))
        pilot.stop("agent")
        log_before = pilot.log_path("agent").stat().st_size
        pilot.start_agent()
        again = time.monotonic()
        seen = pilot.wait_for("another heartbeat", lambda: count_heartbeats(pilot, beats + 1))
        resumed_s = time.monotonic() - again
        seen = pilot.wait_for("some more", lambda: count_heartbeats(pilot, seen + PILOT_BEATS))
        said = pilot.log_path("agent").read_bytes()[log_before:].decode()
        line = f"INFO resuming with persisted host_id (skipping Register) host_id={host['host_id']}"
        known = pilot.request("GET", "/api/v1/admin/hosts")["hosts"]
        resumed = line in said.splitlines() and [h["host_id"] for h in known] == [host["host_id"]]
        if not resumed:
            raise Error(
                "the agent did not resume as the same host", f"read {pilot.log_path('agent')}"
            )
        bills, files = pilot.bill()
        ran_s = time.monotonic() - ran
        violations = asyncio.run(with_database(pilot.plan.cp_dir / "dsn", find_violations))
        if violations:
            raise Error(f"an invariant does not hold: {violations[0]}", "report this as a bug")
    finally:
        pilot.stop_all()
    return {
        "online_s": round(online_s, 2),
        "cp_ready_s": round(pilot.cp_ready_s, 2),
        "heartbeats": seen,
        "resumed": resumed,
        "resume_s": round(resumed_s, 2),
        "ran_s": round(ran_s, 2),
        "workload": pilot.kind,
        **{
            kind: render_money(sum(bill.total_micros for bill in bills if bill.kind == kind))
            for kind in ("invoice", "statement")
        },
        "files": [path.name for path in files],
        "host_id": host["host_id"],
        "total_s": round(time.monotonic() - pilot.began, 2),
    }


def count_heartbeats(pilot: Pilot, least: int) -> int | None:
    """How many heartbeats the control plane has accepted, when it is at least `least`."""
    text = pilot.get("/metrics") or ""
    match = re.search(r'^openinfra_heartbeats_total{result="accepted"} (\d+)', text, re.MULTILINE)
    count = int(match[1]) if match else 0
    return count if count >= least else None


# ---------------------------------------------------------------------------------------------
# Dist: makes and signs what hosts download. Writes one directory; runs openssl.
# ---------------------------------------------------------------------------------------------

ARTIFACTS = ("openinfra-agent-linux-aarch64", "openinfra-agent-linux-x86_64")  # `uname -m`
ARTIFACT_SOURCES = (
    "agent.py",
    "proto/__init__.py",
    "proto/openinfra_pb2.py",
    "proto/openinfra_pb2_grpc.py",
    "systemd/openinfra-agent.service",
    "systemd/openinfra-containerd.service",
    "systemd/openinfra-containerd.toml",
    "systemd/openinfra-engine.json",
    "systemd/openinfra-engine.service",
    "systemd/openinfra-guard.service",
    "systemd/openinfra-guard.timer",
    "systemd/openinfra-strays.service",
    "systemd/openinfra-watch.service",
    "systemd/openinfra-workloads.service",
    "systemd/openinfra.slice",
    "systemd/var-cache-openinfra.mount",
)
ARTIFACT_MAIN = b'''"""Starts agent.py, which lies beside this file in a zip that Python runs."""

import runpy

runpy.run_module("agent", run_name="__main__", alter_sys=True)
'''
SCRIPTS = ("install_agent.py", "setup_luks2.py")


def render_artifact(sources: Mapping[str, bytes]) -> bytes:
    """One file that Python runs: the same bytes for the same sources, on any machine."""
    buffer = io.BytesIO(b"#!/usr/bin/python3 -I\n")
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o100644 << 16
            archive.writestr(info, sources[name])
    return buffer.getvalue()


def read_sources(names: Sequence[str]) -> dict[str, bytes]:
    """Files beside this one; raises Error."""
    here = Path(__file__).resolve().parent
    try:
        return {name: (here / name).read_bytes() for name in names}
    except OSError as error:
        what = f"cannot read {error.filename}: {error.strerror}"
        raise Error(what, "run this where the whole repository lies") from None


def describe_files(files: Mapping[str, bytes]) -> dict[str, Row]:
    """Size and SHA-256 of each file, as release.json lists them."""
    return {
        name: {"size_bytes": len(data), "sha256": sha256(data).hex()}
        for name, data in sorted(files.items())
    }


def ensure_release_key(path: Path, new_key: bool) -> bytes:
    """Give back the public half of a signing key, PEM; make the key when asked; raises Error."""
    if new_key and not path.exists():
        fresh = run(["openssl", "genpkey", "-algorithm", "ed25519"], echo=False).encode()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            write_file(temporary, fresh, 0o600)
            os.link(temporary, path)  # never over a key that is there
        except OSError as error:
            what = f"cannot write {path}: {error.strerror}"
            raise Error(what, "make its directory, for root alone (mode 0700)") from None
        finally:
            temporary.unlink(missing_ok=True)
    read_secret_file(path, "signing key of releases", "make one with --new-key, once")
    public = run(["openssl", "pkey", "-in", str(path), "-pubout"], echo=False).encode()
    if b"MCowBQYDK2VwAyEA" not in public:  # RFC 8410: what the DER of each Ed25519 key begins with
        raise Error(f"{path} is no Ed25519 key", "name another file with --key, and --new-key")
    return public


def check_release(out: Path, version: str, files: Mapping[str, Row], public: bytes) -> bytes | None:
    """The release.json in a directory when it is of these very files; raises Error 3 or None."""
    if not (out / "release.json").exists():
        return None
    pinned = out / "release.pub"
    if pinned.exists() and pinned.read_bytes() != public:
        what = f"{out} holds a release that was signed with another key, which hosts have pinned"
        raise Error(what, "sign with that key, or name an empty directory with --out", 3)
    raw = (out / "release.json").read_bytes()
    try:
        known = parse_json(raw)
        numbers = [tuple(map(int, text.split("."))) for text in (known["version"], version)]
    except (ValueError, KeyError, AttributeError):
        what = f"{out}/release.json cannot be read"
        raise Error(what, "move it away if nobody has downloaded it", 3) from None
    if numbers[0] > numbers[1]:
        what = f"{out} holds version {known['version']}, which is newer than {version}"
        raise Error(what, "hosts refuse an older one; give the sources a higher VERSION", 3)
    if numbers[0] == numbers[1] and known["files"] != files:
        what = f"{out} holds a version {version} with other bytes"
        raise Error(what, "a version never changes: give the sources a higher VERSION", 3)
    return raw if numbers[0] == numbers[1] else None


def make_release(out: Path, key: Path, new_key: bool) -> tuple[str, list[str], bytes]:
    """Write a signed release; give back its version, the files that changed, the public key.

    All is written before the first rename, and release.json is renamed last: a downloader between
    two renames finds a file that does not fit its list, and refuses; the list fits again at once.
    """
    sources = read_sources(ARTIFACT_SOURCES)
    found = re.search(rb'^VERSION = "([0-9]+(?:\.[0-9]+)*)"$', sources["agent.py"], re.MULTILINE)
    if found is None or found[1].decode() != VERSION:
        raise Error("agent.py and cp_server.py are of two versions", "take both from one commit")
    artifact = render_artifact({"__main__.py": ARTIFACT_MAIN, **sources})
    files = {**read_sources(SCRIPTS), **dict.fromkeys(ARTIFACTS, artifact)}
    public = ensure_release_key(key, new_key)
    listed = describe_files(files)
    now = dt.datetime.now(dt.timezone.utc)
    fresh = {"version": VERSION, "created_at": f"{now:%Y-%m-%dT%H:%M:%SZ}", "files": listed}
    if not out.exists():
        out.mkdir(parents=True)
        out.chmod(0o755)  # Caddy's user reads it
    staging = out / ".new"
    with hold_directory(out):
        text = check_release(out, VERSION, listed, public)
        text = text or json.dumps(fresh, indent=1).encode() + b"\n"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        try:
            for name, data in {**files, "release.pub": public, "release.json": text}.items():
                write_file(staging / name, data, 0o755 if name in ARTIFACTS else 0o644)
            sign_file(staging / "release.json", key, staging / "release.pub")
            order = [*files, "release.pub", "release.json.sig", "release.json"]
            changed = [name for name in order if not is_same_file(staging / name, out / name)]
            for name in changed:
                os.rename(staging / name, out / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return VERSION, changed, public


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Keep a second writer out of a directory, and sync it at the end; raises Error 75."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        os.fsync(descriptor)
    except BlockingIOError:
        raise Error(f"another command writes to {path}", "wait for its end", 75) from None
    finally:
        os.close(descriptor)


def sign_file(path: Path, key: Path, public: Path) -> None:
    """Write `<path>.sig`, 64 bytes of Ed25519, and check it as a host does; raises Error."""
    signature = path.with_name(f"{path.name}.sig")
    names = ["-in", str(path), "-rawin"]
    sign = ["openssl", "pkeyutl", "-sign", "-inkey", str(key), *names, "-out", str(signature)]
    run(sign, echo=False)
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), *names]
    run([*verify, "-sigfile", str(signature)], echo=False)
    os.chmod(signature, 0o644)


def is_same_file(one: Path, other: Path) -> bool:
    """True when two files have the same bytes and mode."""
    return (
        other.is_file()
        and one.stat().st_mode == other.stat().st_mode
        and one.read_bytes() == other.read_bytes()
    )


# ---------------------------------------------------------------------------------------------
# Backup and restore: one encrypted file with all that a new machine needs. Changes the machine.
# ---------------------------------------------------------------------------------------------

BACKUP_FORMAT = 1
BACKUP_DUMP = "database.dump"
BACKUP_FILES = ("wg0.conf", "jwt-keys.json", "cp.env", "release-key.pem")
RELEASE_KEY = "/etc/openinfra/release/key.pem"
BACKUP_FILE_MAX_BYTES = 64 << 20  # but for the dump; wg0.conf has 8 MB at 65,000 peers
CHUNK_BYTES = 1 << 20
DUMP_S = 3600.0
GPG_HOME_MAX_S = 86_400.0  # an older one belongs to no run that still goes on
GPG = ("gpg", "--batch", "--no-tty", "--quiet", "--no-options", "--no-symkey-cache")
GPG_ENCRYPT = ("--symmetric", "--cipher-algo", "AES256", "--s2k-digest-algo", "SHA512")

# Around what pg_restore prints, in one transaction. A revoked host or key stays revoked, also one
# that only the database of before knew. Live sessions are forgotten, not ended: a host opens a new
# one, and neither counts as a takeover nor is told that another agent has its identity.
RESTORE_BEGIN = """
BEGIN;
SET LOCAL client_min_messages = warning;
SET LOCAL lock_timeout = '10s';
SELECT pg_advisory_xact_lock(7726001) \\g /dev/null
CREATE TEMP TABLE revoked_here (host_id uuid) ON COMMIT DROP;
CREATE TEMP TABLE revoked_keys (key_id text) ON COMMIT DROP;
DO $$ DECLARE command text; BEGIN
  IF to_regclass('public.hosts') IS NOT NULL THEN
    LOCK TABLE public.hosts IN EXCLUSIVE MODE;
    IF EXISTS (SELECT 1 FROM public.hosts) AND NOT @REPLACE@ THEN
      RAISE EXCEPTION 'this database has hosts';
    END IF;
    INSERT INTO revoked_here SELECT host_id FROM public.hosts WHERE status = 'revoked';
  END IF;
  IF to_regclass('public.customer_keys') IS NOT NULL THEN
    LOCK TABLE public.customers, public.customer_keys IN EXCLUSIVE MODE;
    IF EXISTS (SELECT 1 FROM public.customers) AND NOT @REPLACE@ THEN
      RAISE EXCEPTION 'this database has customers';
    END IF;
    INSERT INTO revoked_keys SELECT key_id FROM public.customer_keys WHERE revoked_at IS NOT NULL;
  END IF;
  FOR command IN SELECT format('DROP TABLE %s CASCADE', oid::regclass) FROM pg_class
      WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'  -- and their sequences
    UNION ALL SELECT format('DROP FUNCTION %s CASCADE', p.oid::regprocedure) FROM pg_proc p
      WHERE pronamespace = 'public'::regnamespace AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')  -- an extension's
  LOOP EXECUTE command; END LOOP;
END $$;
"""
RESTORE_END = """
SET LOCAL client_min_messages = warning;
DELETE FROM public.sessions WHERE ended_at IS NULL;
WITH again AS (
  UPDATE public.hosts SET status = 'revoked', status_at = now(), revoked_at = now()
  WHERE status <> 'revoked' AND host_id IN (SELECT host_id FROM pg_temp.revoked_here)
  RETURNING host_id)
INSERT INTO public.audit_log (actor, action, subject, detail)
SELECT :'actor', 'host.revoke', host_id::text, '{"why": "it was revoked before a restore"}'
FROM again;
SELECT set_config('openinfra.actor', :'actor', true) \\g /dev/null
DO $$ BEGIN
  IF to_regclass('public.customer_keys') IS NOT NULL THEN
    WITH again AS (
      UPDATE public.customer_keys SET revoked_at = now()
      WHERE revoked_at IS NULL AND key_id IN (SELECT key_id FROM pg_temp.revoked_keys)
      RETURNING key_id)
    INSERT INTO public.audit_log (actor, action, subject, detail)
    SELECT current_setting('openinfra.actor'), 'key.revoke', key_id,
      '{"why": "it was revoked before a restore"}' FROM again;
  END IF;
END $$;
DO $$ BEGIN
  IF EXISTS (SELECT 1 FROM information_schema.columns WHERE table_schema = 'public'
      AND table_name = 'assignments' AND column_name = 'restored') THEN
    UPDATE public.assignments SET restored = true WHERE ended_at IS NULL;
    UPDATE public.cp_state SET restored_at = now();
  END IF;
END $$;
INSERT INTO public.audit_log (actor, action, subject, detail)
VALUES (:'actor', 'backup.restore', 'database', jsonb_build_object('created_at', :'created_at'));
COMMIT;
ANALYZE;
"""


@dataclasses.dataclass(frozen=True)
class Backup:
    """A backup that was read whole and is as it was written."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]
    dump: IO[bytes]  # a file without a name: it is gone with the process


def merge_wg_conf(current: str, saved: str) -> str:
    """wg0.conf with the [Interface] of this machine, and the private key and peers of a saved one.

    What follows the first [Peer] is the peers; without a current file the saved one is taken whole.
    """
    if "[Interface]" not in current:
        return saved
    private = re.search(r"^[ \t]*PrivateKey[ \t]*=.*$", saved, re.MULTILINE | re.IGNORECASE)
    line = private[0].strip() if private else ""
    head, peers = (re.split(r"(?m)^(?=\s*\[Peer\])", text, maxsplit=1) for text in (current, saved))
    form = r"(?im)^[ \t]*PrivateKey[ \t]*=.*$"
    interface, found = re.subn(form, lambda _: line, head[0])
    if not found:
        interface = interface.replace("[Interface]", f"[Interface]\n{line}", 1)
    return interface.rstrip("\n") + "\n" + "".join("\n" + text.lstrip("\n") for text in peers[1:])


def check_manifest(manifest: Mapping[str, Any], role: str) -> None:
    """Raises Error 3 for a backup that this program cannot restore."""
    schema = manifest.get("schema")
    if manifest.get("format") != BACKUP_FORMAT or not isinstance(schema, int):
        what = "this backup has a form that this program does not know"
        raise Error(what, "restore it with the cp_server.py that made it", 3)
    if schema > SCHEMA_VERSION:
        what = f"this backup has schema version {schema}, this program knows only {SCHEMA_VERSION}"
        raise Error(what, f"use cp_server.py {manifest.get('version')} or newer", 3)
    if manifest.get("role") != role:
        what = f"this backup is of a control plane with the role {manifest.get('role')}"
        raise Error(what, f"this machine's is {role}; set ROLE in cp.env, then migrate", 3)


def read_postgres_environment(dsn: str) -> dict[str, str]:
    """A connection string as environment variables: a password is on no command line."""
    names = {o.keyword.decode(): o.envvar for o in psycopg.pq.Conninfo.get_defaults() if o.envvar}
    pairs = psycopg.conninfo.conninfo_to_dict(dsn).items()
    settings = {names[key].decode(): str(value) for key, value in pairs if key in names}
    return {**os.environ, "LC_ALL": "C", "PGCONNECT_TIMEOUT": "5", **settings}


def read_passphrase(path: Path) -> bytes:
    """The passphrase of a backup, one line of a file that only its owner may read; raises Error."""
    raw = read_secret_file(path, "passphrase", "write it there, one line, mode 0600").rstrip(b"\n")
    if len(raw) < 8 or b"\n" in raw or b"\0" in raw:
        raise Error(f"{path} is not one line of 8 bytes or more", "write a longer passphrase there")
    return raw


def remove_gpg_homes() -> None:
    """Remove what killed runs left behind; a gpg-agent ends by itself without its home."""
    for path in Path(tempfile.gettempdir()).glob("openinfra-gpg-*"):
        with contextlib.suppress(OSError):
            seen = path.lstat()
            is_ours = (seen.st_uid, seen.st_mode) == (os.geteuid(), 0o040700)  # a directory
            if is_ours and seen.st_mtime < time.time() - GPG_HOME_MAX_S:
                shutil.rmtree(path)


@contextlib.contextmanager
def start_gpg(passphrase: bytes, *words: str, **files: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run gpg with a home of its own; the passphrase goes by a pipe; raises Error when it fails."""
    remove_gpg_homes()
    home = tempfile.mkdtemp(prefix="openinfra-gpg-")
    reader, writer = os.pipe()
    os.write(writer, passphrase + b"\n")
    os.close(writer)
    argv = [*GPG, "--homedir", home, "--pinentry-mode=loopback", f"--passphrase-fd={reader}"]
    try:
        with tempfile.TemporaryFile() as said:
            try:
                child = subprocess.Popen([*argv, *words], stderr=said, pass_fds=[reader], **files)
            except FileNotFoundError:
                raise Error("gpg is not installed", "type: apt-get install gnupg") from None
            with child:
                try:
                    yield child
                finally:
                    for pipe in (child.stdin, child.stdout):
                        with contextlib.suppress(OSError):
                            pipe.close() if pipe else None
                    code = child.wait(DUMP_S)
            said.seek(0)
            text = " / ".join(said.read(4_000).decode(errors="replace").split("\n")).strip(" /")
            if "Bad session key" in text:
                raise Error("the passphrase is not the one of this backup", "name its own file")
            if code != 0:
                raise Error(f"gpg ended with {code}: {text}", "mend that and run this again")
    finally:
        os.close(reader)
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)


def read_said(said: IO[bytes]) -> str:
    """What one of PostgreSQL's programs printed, in one line."""
    said.seek(0)
    return " ".join(said.read(2_000).decode(errors="replace").split())


def run_on_database(argv: Sequence[str], dsn: str, **files: Any) -> None:
    """Run one of PostgreSQL's programs with files as its stdin and stdout; raises Error."""
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(
                argv,
                stderr=said,
                env=read_postgres_environment(dsn),
                timeout=DUMP_S,
                check=False,
                **files,
            ).returncode
        except FileNotFoundError:
            todo = "type: apt-get install postgresql-client"
            raise Error(f"{argv[0]} is not installed", todo) from None
        text = read_said(said)
    if code != 0:
        raise Error(f"{argv[0]} ended with {code}: {text}", "mend that and run this again")


def copy_hashed(source: IO[bytes], target: IO[bytes]) -> Row:
    """Copy a stream; give back its size and SHA-256 as the manifest lists them."""
    digest, size = hashlib.sha256(), 0
    while part := source.read(CHUNK_BYTES):
        digest.update(part)
        size += target.write(part)
    return {"size_bytes": size, "sha256": digest.hexdigest()}


def write_backup(
    out: Path, passphrase: bytes, manifest: Row, files: Mapping[str, bytes], dump: IO[bytes]
) -> None:
    """Write an encrypted tar beside, read it back, then give it its name; raises Error."""
    staged = out.with_name(f".{out.name}.new")
    staged.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(staged, flags, 0o600), "wb") as target:
            pipes = {"stdin": subprocess.PIPE, "stdout": target}
            with start_gpg(passphrase, *GPG_ENCRYPT, "--compress-algo=none", **pipes) as gpg:
                _write_tar(gpg.stdin, manifest, files, dump)
            os.fsync(target.fileno())
        with read_backup(staged, passphrase, out.parent) as again:
            listing = ["pg_restore", "--list"]
            run_on_database(listing, "", stdin=again.dump, stdout=subprocess.DEVNULL)
        with hold_directory(out.parent):
            os.rename(staged, out)
    finally:
        staged.unlink(missing_ok=True)


def _write_tar(target: Any, manifest: Row, files: Mapping[str, bytes], dump: IO[bytes]) -> None:
    texts = {"manifest.json": json.dumps(manifest, indent=1).encode() + b"\n", **files}
    with (
        contextlib.suppress(BrokenPipeError),  # gpg says why it ended
        tarfile.open(fileobj=target, mode="w|", bufsize=CHUNK_BYTES) as tar,
    ):
        for name, content in (*((n, io.BytesIO(t)) for n, t in texts.items()), (BACKUP_DUMP, dump)):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = content.seek(0, io.SEEK_END), 0o600, int(time.time())
            content.seek(0)
            tar.addfile(info, content)


@contextlib.contextmanager
def read_backup(path: Path, passphrase: bytes, directory: Path) -> Iterator[Backup]:
    """A backup, decrypted and compared with its manifest; raises Error before anything is used."""
    damaged = Error(f"{path} is damaged or cut short", "take another copy of it, or an older one")
    files: dict[str, bytes] = {}
    found: dict[str, Row] = {}
    with open(path, "rb") as source, tempfile.TemporaryFile(dir=directory) as dump:
        try:
            with start_gpg(passphrase, "--decrypt", stdin=source, stdout=subprocess.PIPE) as gpg:
                with contextlib.suppress(tarfile.TarError):  # gpg may say why
                    _read_tar(gpg.stdout, files, found, dump)
                while gpg.stdout and gpg.stdout.read(CHUNK_BYTES):
                    pass  # to its end, where gpg sees whether it is whole
        except Error as error:
            raise damaged if error.what.startswith("gpg ended") else error from None
        try:
            manifest = parse_json(files.pop("manifest.json", b""))
        except ValueError:
            raise damaged from None
        del found["manifest.json"]
        if manifest.get("files") != found or BACKUP_DUMP not in found:
            raise damaged
        dump.seek(0)
        yield Backup(manifest, files, dump)


def _read_tar(source: Any, files: dict[str, bytes], found: dict[str, Row], dump: IO[bytes]) -> None:
    with tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK_BYTES) as tar:
        for member in tar:
            content = tar.extractfile(member)
            is_known = member.name in ("manifest.json", BACKUP_DUMP, *BACKUP_FILES)
            if content is None or not is_known or member.name in found:
                raise tarfile.TarError("a member that no backup has")
            if member.name == BACKUP_DUMP:
                found[member.name] = copy_hashed(content, dump)
            elif member.size <= BACKUP_FILE_MAX_BYTES:
                text = io.BytesIO()
                found[member.name] = copy_hashed(content, text)
                files[member.name] = text.getvalue()


def read_backup_facts(dsn: str, role: str) -> Row:
    """Schema, hosts and time of a database, and whether a CP is connected; raises Error."""
    sql = """SELECT now() AS at, EXISTS (SELECT 1 FROM pg_roles WHERE rolname = %s) AS has_role,
      to_regclass('public.hosts') IS NOT NULL AS has_schema, EXISTS (SELECT 1 FROM pg_stat_activity
        WHERE application_name = 'openinfra-cp' AND datname = current_database()) AS is_served"""
    try:
        with psycopg.connect(dsn, connect_timeout=5, row_factory=dict_row) as connection:
            check_server_version(connection.info.server_version)
            row = connection.execute(sql, [role]).fetchone() or {}
            facts: Row = {**row, "schema": None, "hosts": 0, "customers": 0}
            if row["has_schema"]:
                sql = "SELECT max(number) AS schema, (SELECT count(*) FROM hosts) AS hosts"
                found = connection.execute(f"{sql} FROM schema_migrations").fetchone()
                facts |= found or {}
            if (facts["schema"] or 0) >= 5:
                found = connection.execute("SELECT count(*) AS customers FROM customers").fetchone()
                facts |= found or {}
    except psycopg.OperationalError as error:
        said = " ".join(str(error).split())
        raise Error(f"cannot reach PostgreSQL: {said}", "is it running?", 75) from None
    except psycopg.Error as error:
        what = f"the database is not as it should be: {error.diag.message_primary}"
        raise Error(what, "is this OpenInfra's own database, and this its owner?") from None
    return facts


def back_up(out: Path, passphrase: bytes, settings: Settings, paths: Mapping[str, Path]) -> Row:
    """Write a backup of the database and the files; give back its manifest; raises Error."""
    dsn = read_dsn(settings.owner_dsn_file)
    facts = read_backup_facts(dsn, settings.role)
    check_schema_version(facts["schema"])
    files = {name: path.read_bytes() for name, path in paths.items()}
    with tempfile.TemporaryFile(dir=out.parent) as dump:
        argv = ["pg_dump", "--format=custom", "--lock-wait-timeout=10s"]
        run_on_database(argv, dsn, stdin=subprocess.DEVNULL, stdout=dump)
        dump.seek(0)
        with open(os.devnull, "wb") as nowhere:
            listed = {**describe_files(files), BACKUP_DUMP: copy_hashed(dump, nowhere)}
        manifest = {
            "format": BACKUP_FORMAT,
            "version": VERSION,
            "schema": facts["schema"],
            "role": settings.role,
            "hosts": facts["hosts"],
            "created_at": render_time(facts["at"]),
            "files": listed,
        }
        write_backup(out, passphrase, manifest, files, dump)
    return manifest


def restore_database(backup: Backup, dsn: str, replace: bool) -> None:
    """Put a backup's database in the place of this one, all or nothing; raises Error."""
    begin = RESTORE_BEGIN.replace("@REPLACE@", str(replace).lower())
    argv = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", f"actor={cli_actor().name}"]
    argv += ["-v", f"created_at={backup.manifest['created_at']}"]
    environment = read_postgres_environment(dsn)
    with tempfile.TemporaryFile() as said:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": said, "env": environment}
        with (
            subprocess.Popen(argv, stdin=subprocess.PIPE, **pipes | {"stdout": said}) as psql,
            subprocess.Popen(
                ["pg_restore", "--no-owner", "--file=-"], stdin=backup.dump, **pipes
            ) as dump,
        ):
            assert psql.stdin is not None  # noqa: S101 - for mypy
            assert dump.stdout is not None  # noqa: S101
            try:
                psql.stdin.write(begin.encode())
                shutil.copyfileobj(dump.stdout, psql.stdin, CHUNK_BYTES)
                if dump.wait(DUMP_S) == 0:  # else it ends without COMMIT
                    psql.stdin.write(RESTORE_END.encode())
                psql.stdin.close()
            except BrokenPipeError:
                dump.kill()  # psql has ended, and says why
            code = psql.wait(DUMP_S)
        text = read_said(said)
    if code != 0 or dump.returncode != 0:
        refused = re.search("this database has (hosts|customers)", text)
        what = f"the database was left as it was: {text}"
        raise Error(what, "mend that and run this again", 3 if refused else 1)


def restore_file(path: Path, content: bytes, mode: int) -> bool:
    """Write a file of a backup, the one that is there kept beside it; False when it is the same."""
    try:
        current = path.read_bytes()
    except FileNotFoundError:
        current = None
    if current == content:
        return False
    kept = path.with_name(f"{path.name}.before-restore")
    if current is not None and not kept.exists():
        write_file(kept, current, mode)
    write_file(path, content, mode)
    return True


def apply_wg_conf(path: Path) -> str:
    """Give the running hub the key and peers of its file, without down and up; says what it did.

    `addconf`, not `syncconf`: peers that only the running hub has are somebody's, and stay.
    """
    try:
        run(["wg", "show", path.stem, "public-key"])
    except Error:
        return f"{path.stem} is not up: systemctl start wg-quick@{path.stem}"
    stripped = run(["wg-quick", "strip", str(path)], echo=False)
    run(["wg", "addconf", path.stem, "/dev/stdin"], stdin=stripped.encode())
    return f"{path.stem} has the key and the peers of the backup"


def sign_again(dist: Path, key: Path) -> str:
    """Make the release anew that setup_cp.py made with a key of its own, which no host knows."""
    public = ensure_release_key(key, False)
    pinned, described = dist / "release.pub", dist / "release.json"
    if not pinned.exists():
        return f"{dist} holds no release yet: setup_cp.py makes it"
    if pinned.read_bytes() == public:
        return f"unchanged: {dist}"
    described.unlink(missing_ok=True)  # first: without it there is nothing to refuse, or to install
    pinned.unlink()
    version, _, _ = make_release(dist, key, False)
    return f"release {version} in {dist} is signed with the key of the backup"


def restore(
    backup: Backup, settings: Settings, paths: Mapping[str, Path], replace: bool
) -> Iterator[str]:
    """Restore all of a backup; yields what it did, a line each; raises Error."""
    manifest, dsn = backup.manifest, read_dsn(settings.owner_dsn_file)
    check_manifest(manifest, settings.role)
    env = backup.files.get("cp.env", b"").decode(errors="replace")
    parse_env(env, "cp.env of the backup")
    facts = read_backup_facts(dsn, settings.role)
    if not facts["has_role"]:
        what = f"this PostgreSQL has no role {settings.role}"
        raise Error(what, "run: setup_cp.py, or cp_server.py migrate")
    if facts["is_served"]:
        what = "a control plane is connected to this database"
        raise Error(what, "stop it: systemctl stop openinfra-cp; then run this again", 75)
    if (facts["hosts"] or facts["customers"]) and not replace:
        what = f"this database has {facts['hosts']} hosts and {facts['customers']} customers, which"
        what += " a restore would remove"
        raise Error(what, "is this the new machine? to replace them: --replace", 3)
    restore_database(backup, dsn, replace)
    yield f"database restored: {manifest['hosts']} hosts as of {manifest['created_at']}"
    for name in asyncio.run(migrate(dsn, settings.role)):
        yield f"applied {name}"
    for name, content in backup.files.items():
        if name not in paths:
            yield f"left out: {name}"
            continue
        path, mode, saved = paths[name], 0o644 if name == "cp.env" else 0o600, content
        if name == "wg0.conf":
            current = path.read_text() if path.exists() else ""
            saved = merge_wg_conf(current, content.decode()).encode()
        yield f"{'wrote' if restore_file(path, saved, mode) else 'unchanged:'} {path}"
        if name == "wg0.conf":
            yield apply_wg_conf(path)


# ---------------------------------------------------------------------------------------------
# Command line: settings from flags and cp.env, the subcommands, main.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting: its flag (`--dsn-file`), its key in cp.env (`DSN_FILE`), default and help."""

    name: str
    default: str
    help: str


OPTIONS = (
    Option("dsn-file", "/etc/openinfra/cp/dsn", "file with the CP's connection string"),
    Option("owner-dsn-file", "/etc/openinfra/cp/owner-dsn", "the same of the schema's owner"),
    Option("jwt-keys-file", "/etc/openinfra/cp/jwt-keys.json", "keys that sign operators' tokens"),
    Option("secrets-key-file", "/etc/openinfra/cp/secrets.key", "key of workloads' secrets"),
    Option("grpc-listen", f"{HUB}:9092", "address and port for the agents"),
    Option("http-listen", "127.0.0.1:8080", "address and port for the operator's API"),
    Option("peer-check", "wg", "wg: a host must come from its own tunnel address; off: pilot only"),
    Option("heartbeat-s", str(HEARTBEAT_S), "nominal seconds between a host's heartbeats"),
    Option("wg-socket", "", "socket of the WireGuard helper; empty: this CP keeps no hub"),
    Option("registry", "", "host name of the registry that customers push to; empty: none"),
    Option("registry-url", "http://127.0.0.1:5000", "where that registry is on this machine"),
    Option("registry-dir", "", "on the disk that it fills; empty: nobody looks how full that is"),
    Option("currency", "EUR", "what amounts are in; final once there are any"),
    Option("role", "openinfra", "the CP's own database role; `migrate` grants it its rights"),
)


def parse_env(text: str, path: str) -> dict[str, str]:
    """The keys of an env file; raises Error 2 for an unknown, doubled or malformed line."""
    known = {option.name.replace("-", "_").upper() for option in OPTIONS}
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, equals, value = line.strip().partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals:
            raise Error(f"{path}:{number}: line is not KEY=value", "correct that line", 2)
        if key not in known:
            what = f"{path}:{number}: unknown key {key[:40]!r}"
            raise Error(what, f"known keys are: {', '.join(sorted(known))}", 2)
        if key in found:
            raise Error(f"{path}:{number}: {key} stands there twice", "keep one of the lines", 2)
        found[key] = value.strip()
    return found


def read_settings(args: argparse.Namespace) -> Settings:
    """Flag over env file over default; raises Error 2."""
    path = Path(args.env_file or "/etc/openinfra/cp.env")
    env: dict[str, str] = {}
    try:
        env = parse_env(path.read_text(), str(path))
    except FileNotFoundError:
        if args.env_file:
            raise Error(f"{path} is missing", "name an env file that exists", 2) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"cannot read {path}: {error}", "mend its mode or its text", 2) from None
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    chosen = {}
    for option in OPTIONS:
        default = option.default
        in_credentials = Path(credentials, Path(default).name)
        if credentials and option.name.endswith("-file") and in_credentials.exists():
            default = str(in_credentials)
        flag = getattr(args, option.name.replace("-", "_"))
        chosen[option.name] = flag or env.get(option.name.replace("-", "_").upper()) or default
    if chosen["peer-check"] not in ("wg", "off"):
        raise Error("peer-check is neither wg nor off", "set it to wg", 2)
    try:
        heartbeat_s = float(chosen["heartbeat-s"])
    except ValueError:
        heartbeat_s = 0
    if not 0.2 <= heartbeat_s <= HEARTBEAT_MAX_S:
        raise Error("heartbeat-s is out of range", f"give 0.2 to {HEARTBEAT_MAX_S} seconds", 2)
    return Settings(
        dsn_file=Path(chosen["dsn-file"]),
        owner_dsn_file=Path(chosen["owner-dsn-file"]),
        jwt_keys_file=Path(chosen["jwt-keys-file"]),
        secrets_key_file=Path(chosen["secrets-key-file"]),
        grpc_listen=parse_address(chosen["grpc-listen"], "grpc-listen"),
        http_listen=parse_address(chosen["http-listen"], "http-listen"),
        peer_check=chosen["peer-check"] == "wg",
        heartbeat_s=heartbeat_s,
        role=chosen["role"],
        wg_socket=chosen["wg-socket"],
        registry=parse_registry(chosen["registry"]),
        registry_url=parse_registry_url(chosen["registry-url"]),
        registry_dir=chosen["registry-dir"],
        currency=chosen["currency"],
    )


def parse_registry(text: str) -> str:
    """The name of the registry, with its port if it has one; raises Error 2."""
    if not re.fullmatch(r"|[A-Za-z0-9.-]+(:[0-9]{1,5})?", text):
        raise Error("registry is no host name", "give one such as cp.example.com, or none", 2)
    return text


def parse_registry_url(text: str) -> str:
    """Where the registry is on this machine; raises Error 2."""
    if not re.fullmatch(r"http://[A-Za-z0-9.-]+:[0-9]{1,5}", text):
        todo = "write for example http://127.0.0.1:5000"
        raise Error("registry-url is no http://address:port", todo, 2)
    return text


def parse_address(text: str, name: str) -> tuple[str, int]:
    """`10.77.0.1:9092`, `[::1]:9092` or `localhost:9092` in two parts; raises Error 2."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[0-9A-Za-z.-]+):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise Error(
            f"{name} {text!r} is no address:port", "write for example 127.0.0.1:8080", USAGE
        )
    return match[1], int(match[2])


def mint_jwt(key: JwtKey, sub: str, scope: str, ttl_s: int) -> str:
    """A token for the HTTP API, valid from now."""
    now = int(time.time())
    claims = {"iss": JWT_ISSUER, "aud": JWT_AUDIENCE, "sub": sub, "scope": scope}
    return render_jwt(key, {**claims, "jti": new_public_id(), "iat": now, "exp": now + ttl_s})


PATIENT = "-c statement_timeout=600s"  # for what looks at all of the ledger


async def with_database(
    dsn_file: Path,
    work: Callable[[Database], Awaitable[T]],
    secrets_key: str = "",
    options: str = "",
) -> T:
    """Open the database, check its schema, run one operation, close it."""
    db = Database(read_dsn(dsn_file), size=1, options=options, secrets_key=secrets_key)
    await db.open()
    try:
        async with db.transaction() as tx:
            check_schema_version(await read_schema_version(tx))
        return await work(db)
    finally:
        await db.close()


def command_serve(_args: argparse.Namespace, settings: Settings) -> int:
    """Run the control plane."""
    asyncio.run(serve(settings))
    return 0


def command_migrate(_args: argparse.Namespace, settings: Settings) -> int:
    """Make or upgrade the schema."""
    applied = asyncio.run(migrate(read_dsn(settings.owner_dsn_file), settings.role))
    for name in applied:
        print(f"applied {name}")
    print(f"schema is version {SCHEMA_VERSION}" if applied else "nothing to do")
    return 0


def command_token(args: argparse.Namespace, settings: Settings) -> int:
    """Print a JWT."""
    path = settings.jwt_keys_file
    keys = read_jwt_keys(path) if path.exists() or not args.new_key else []
    key = add_jwt_key(path, keys) if args.new_key else keys[-1]
    if args.new_key:  # systemd gives it a copy of the file
        print("The service takes the new key: systemctl restart openinfra-cp", file=sys.stderr)
    print(mint_jwt(key, args.sub or getpass.getuser(), args.scope, args.ttl_hours * 3600))
    return 0


def command_invite(args: argparse.Namespace, settings: Settings) -> int:
    """Mint an invite; the token alone goes to stdout."""
    given = {f.name: getattr(args, f.name) for f in INVITE_FIELDS if hasattr(args, f.name)}
    values = parse_fields(INVITE_FIELDS, {k: v for k, v in given.items() if v is not None})
    order = InviteOrder(**values)
    token, invite = asyncio.run(
        with_database(settings.dsn_file, lambda db: mint_invite(db, cli_actor(), order))
    )
    if args.json:
        print(json.dumps({"token": token, **render_invite(invite)}, ensure_ascii=False))
        return 0
    print(token)
    until = f"{invite.expires_at:%Y-%m-%d %H:%M} UTC"
    print(f"Invite {invite.invite_id}, single use, until {until}.", file=sys.stderr)
    print("This is shown once. Send it over a secure channel.", file=sys.stderr)
    return 0


def command_hosts(args: argparse.Namespace, settings: Settings) -> int:
    """List hosts."""
    filters = {field.name: getattr(args, field.name) for field in HOST_FILTERS}
    values = parse_fields(
        (*PAGE_FIELDS, *HOST_FILTERS),
        {"limit": args.limit, **{k: v for k, v in filters.items() if v is not None}},
    )
    hosts = asyncio.run(with_database(settings.dsn_file, lambda db: list_hosts(db, values)))
    if args.json:
        print(json.dumps({"hosts": [render_host(host) for host in hosts]}, indent=1))
        return 0
    rows = [("HOST", "NAME", "STATUS", "ADDRESS", "LAST HEARTBEAT", "WHY IT GETS NO WORK")]
    for host in hosts:
        seen = f"{host.last_heartbeat_at:%Y-%m-%d %H:%M:%S}" if host.last_heartbeat_at else "never"
        why = " | ".join(decide_standing(host).reasons) or "-"
        address = host.wg_ip or "-"
        rows.append((str(host.host_id), host.hostname, host.status, address, seen, why))
    print(render_table(rows))
    return 0


def command_customers(args: argparse.Namespace, settings: Settings) -> int:
    """List customers."""
    values = parse_fields(PAGE_FIELDS, {"limit": args.limit})
    found = asyncio.run(with_database(settings.dsn_file, lambda db: list_customers(db, values)))
    if args.json:
        print(json.dumps({"customers": [render_customer(each) for each in found]}, indent=1))
        return 0
    rows = [("CUSTOMER", "NAME", "NAMESPACES", "SINCE")]
    for each in found:
        since = f"{each.created_at:%Y-%m-%d}"
        rows.append((str(each.customer_id), each.name, " ".join(each.namespaces), since))
    print(render_table(rows))
    return 0


def command_add_customer(args: argparse.Namespace, settings: Settings) -> int:
    """Add a customer and make its first key; the key alone goes to stdout."""
    values = parse_fields(CUSTOMER_FIELDS, {"name": args.name, "namespace": args.namespace})

    async def work(db: Database) -> tuple[Customer, str]:
        customer = await add_customer(db, cli_actor(), **values)
        return customer, (await mint_key(db, cli_actor(), customer.customer_id, "the first"))[0]

    customer, key = asyncio.run(with_database(settings.dsn_file, work))
    print(key)
    print(f"Customer {customer.customer_id}. The key is shown once.", file=sys.stderr)
    return 0


def parse_id(text: str) -> uuid.UUID:
    """A customer's id; raises Error 2."""
    try:
        return uuid.UUID(text)
    except ValueError:
        what = "the customer id is not a UUID"
        raise Error(what, "copy it from: cp_server.py customers", USAGE) from None


def command_add_namespace(args: argparse.Namespace, settings: Settings) -> int:
    """Add a namespace to a customer."""
    namespace = parse_fields(CUSTOMER_FIELDS[1:], {"namespace": args.namespace})["namespace"]
    customer_id = parse_id(args.customer_id)
    customer = asyncio.run(
        with_database(
            settings.dsn_file, lambda db: add_namespace(db, cli_actor(), customer_id, namespace)
        )
    )
    print(f"customer {customer.customer_id} has {', '.join(customer.namespaces)}")
    return 0


def command_mint_key(args: argparse.Namespace, settings: Settings) -> int:
    """Make another key of a customer; the key alone goes to stdout."""
    note = parse_fields(KEY_FIELDS, {"note": args.note})["note"]
    customer_id = parse_id(args.customer_id)
    key, row = asyncio.run(
        with_database(settings.dsn_file, lambda db: mint_key(db, cli_actor(), customer_id, note))
    )
    print(key)
    print(f"Key {row.key_id}. It is shown once.", file=sys.stderr)
    return 0


def command_revoke_key(args: argparse.Namespace, settings: Settings) -> int:
    """Take a customer's key back for good."""
    key = asyncio.run(
        with_database(settings.dsn_file, lambda db: revoke_key(db, cli_actor(), args.key_id))
    )
    print(f"key {key.key_id} of customer {key.customer_id} is revoked")
    return 0


def parse_host_id(text: str) -> uuid.UUID:
    """A host's id; raises Error 2."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise Error("the host id is not a UUID", "copy it from: cp_server.py hosts", 2) from None


def command_workloads(args: argparse.Namespace, settings: Settings) -> int:
    """List workloads of all customers."""
    filters = {field.name: getattr(args, field.name) for field in WORKLOAD_FILTERS}
    values = parse_fields(
        (*PAGE_FIELDS, *WORKLOAD_FILTERS),
        {"limit": args.limit, **{k: v for k, v in filters.items() if v is not None}},
    )
    found = asyncio.run(
        with_database(
            settings.dsn_file,
            lambda db: list_workloads(db, None, values),
            read_secrets_key(settings.secrets_key_file),
        )
    )
    shown = [render_workload(*each) for each in found]
    if args.json:
        print(json.dumps({"workloads": shown}, indent=1))
        return 0
    rows = [("WORKLOAD", "NAME", "STATE", "REPLICAS", "ON HOSTS", "WHY IT DOES NOT RUN")]
    for each in shown:
        hosts = " ".join(sorted({copy["host_id"] for copy in each["assignments"]})) or "-"
        name, why = f"{each['namespace']}/{each['name']}", " | ".join(each["reasons"]) or "-"
        state, replicas = each["state"], str(each["replicas"])
        rows.append((each["workload_id"], name, state, replicas, hosts, why))
    print(render_table(rows))
    return 0


def command_rate_cards(args: argparse.Namespace, settings: Settings) -> int:
    """List prices."""
    found = asyncio.run(with_database(settings.dsn_file, list_rate_cards))
    if args.json:
        rows = [{**vars(card), "customer": name} for card, name in found]
        shown = [{**row, "valid_from": render_time(row["valid_from"])} for row in rows]
        print(json.dumps({"currency": settings.currency, "rate_cards": shown}, indent=1))
        return 0
    table: list[tuple[str, ...]] = [
        ("CARD", "FROM", "CUSTOMER", "CPU-HOUR", "GB-HOUR", "EGRESS-GB", "PROVIDER")
    ]
    for card, name in found:
        prices = (card.cpu_hour_micros, card.gb_hour_micros, card.egress_gb_micros)
        table.append(
            (
                str(card.card_no),
                f"{card.valid_from:%Y-%m-%dT%H:%MZ}",
                name or "all",
                *map(render_money, prices),
                f"{card.provider_share_ppm / 10_000:g} %",
            )
        )
    print(render_table(table))
    return 0


def command_add_rate_card(args: argparse.Namespace, settings: Settings) -> int:
    """Add prices, from a full hour on, for all customers or for one."""
    customer_id = parse_id(args.customer_id) if args.customer_id else None
    share, rest = divmod(parse_money(args.provider_share), 100)
    if rest:
        what = "the provider's share has more than four decimals"
        raise Error(what, "give a percentage like 80 or 66.6667", USAGE)
    prices = [parse_money(each) for each in (args.cpu_hour, args.gb_hour, args.egress_gb)]
    if min(prices) < 0 or max(prices) > PRICE_MAX:
        raise Error("a price is out of range", "give 0 to 1000000", USAGE)
    if not 0 <= share <= 1_000_000:
        raise Error("the provider's share is out of range", "give 0 to 100 percent", USAGE)
    valid_from = parse_hour(args.valid_from)
    names = ("cpu_hour_micros", "gb_hour_micros", "egress_gb_micros")
    values = dict(zip(names, prices, strict=True))

    async def work(db: Database) -> RateCard:
        await ensure_currency(db, settings.currency)
        actor = cli_actor()
        return await add_rate_card(
            db, actor, customer_id, valid_from, provider_share_ppm=share, **values
        )

    card = asyncio.run(with_database(settings.dsn_file, work))
    print(f"rate card {card.card_no} is valid from {card.valid_from:%Y-%m-%dT%H:%MZ} on")
    return 0


def parse_hour(text: str) -> dt.datetime:
    """A full hour like 2026-12-01T00:00Z, or `next`; raises Error 2."""
    if text == "next":
        now = dt.datetime.now(dt.timezone.utc)
        return now.replace(minute=0, second=0, microsecond=0) + dt.timedelta(hours=1)
    if re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:00(:00)?Z", text):
        with contextlib.suppress(ValueError):
            return dt.datetime.fromisoformat(text[:-1]).replace(tzinfo=dt.timezone.utc)
    raise Error(f"{text!r} is no full hour", "give one like 2026-12-01T00:00Z, or next", USAGE)


def command_add_payment(args: argparse.Namespace, settings: Settings) -> int:
    """Book what a customer paid, or got back (below zero); once for each reference."""
    micros = parse_money(args.amount)
    if micros == 0:
        raise Error("the amount is zero", "give what was paid", USAGE)
    reference = " ".join(args.reference.split())  # else a space more is another payment
    values = parse_fields(PAYMENT_FIELDS, {"reference": reference, "note": args.note})
    customer_id = parse_id(args.customer_id)

    async def work(db: Database) -> tuple[int, bool]:
        await ensure_currency(db, settings.currency)
        return await add_payment(db, cli_actor(), customer_id, micros, **values)

    number, is_new = asyncio.run(with_database(settings.dsn_file, work))
    print(f"payment {number} " + ("is booked" if is_new else "was booked before"))
    return 0


def command_credit_limit(args: argparse.Namespace, settings: Settings) -> int:
    """Say how far below zero a customer may go: 0 is prepaid, none is without limit."""
    micros = None if args.amount == "none" else parse_money(args.amount)
    if micros is not None and micros < 0:
        raise Error("the limit is below zero", "give 0 or more, or none", USAGE)
    customer_id = parse_id(args.customer_id)

    async def work(db: Database) -> Customer:
        return await set_credit_limit(db, cli_actor(), customer_id, micros)

    customer = asyncio.run(with_database(settings.dsn_file, work))
    limit = "no limit" if micros is None else f"a limit of {render_money(micros)}"
    print(f"customer {customer.customer_id} has {limit}")
    return 0


def command_ledger(_args: argparse.Namespace, settings: Settings) -> int:
    """Test all of the ledger, and print its sums."""
    wrong, sums = asyncio.run(with_database(settings.dsn_file, verify_ledger, options=PATIENT))
    for line in wrong:
        print(f"ERROR {line}")
    print(f"{sums['transactions']} transactions, {sums['entries']} entries")
    for name in ("customers", "providers", "fees", "payments", "sum"):
        print(f"  {name:<10} {render_money(sums[f'{name}_micros']):>24} {settings.currency}")
    print("the ledger does not hold" if wrong else "the ledger holds")
    return 1 if wrong else 0


def read_invoices(args: argparse.Namespace, settings: Settings) -> list[Bill]:
    """The invoices of a month, of all customers or the one that is asked for."""
    month = parse_month(args.month)

    async def work(db: Database) -> list[Bill]:
        owners, _ = await list_bill_owners(db, month)
        wanted = [parse_id(args.customer_id)] if args.customer_id else owners
        return [await read_invoice(db, each, month) for each in wanted]

    return asyncio.run(with_database(settings.dsn_file, work))


def command_invoices(args: argparse.Namespace, settings: Settings) -> int:
    """Print or write the invoices of a month."""
    return show_bills(read_invoices(args, settings), args, settings)


def command_usage(args: argparse.Namespace, settings: Settings) -> int:
    """List what copies used in a month and hosts counted in all; or one copy's hours."""
    found: Row = {"month": args.month, "currency": settings.currency}
    if args.assignment:
        which = (check_uuid(args.assignment, "assignment"), parse_month(args.month))
        windows = asyncio.run(with_database(settings.dsn_file, lambda db: read_windows(db, *which)))
        found["windows"] = [render_bill_line("statement", window) for window in windows]
        print(json.dumps(found, indent=1) if args.json else render_windows(windows))
        return 0
    bills = read_invoices(args, settings)
    copies = asyncio.run(with_database(settings.dsn_file, lambda db: read_counted(db, bills)))
    found["lines"] = [
        {
            **render_bill_line("statement", line),
            **render_counted(copies[line.assignment_id]),
            "customer": bill.whose,
            "customer_id": bill.whose_id,
        }
        for bill in bills
        for line in bill.lines
    ]
    print(json.dumps(found, indent=1) if args.json else render_usage(bills, copies))
    return 0


QUANTITIES = ("HOURS", "CPU-HOURS", "GB-HOURS", "EGRESS-GB")


def list_quantities(line: BillLine) -> tuple[str, ...]:
    """What was used, by the names above."""
    billed_us = line.usage.billed_us
    return (
        render_quantity(billed_us, HOUR_US),
        render_quantity(line.cpu_milli * billed_us, CPU_HOUR),
        render_quantity(line.memory_bytes * billed_us, GB_HOUR),
        render_quantity(line.usage.egress_bytes, GB),
    )


def render_usage(bills: Sequence[Bill], copies: Mapping[uuid.UUID, Counted]) -> str:
    """What the lines of invoices were billed for, and what hosts counted, as a table."""
    counted_names = (f"COUNTED-{name}" for name in QUANTITIES[1:])
    head = ("CUSTOMER", "WORKLOAD", "HOST", "ASSIGNMENT", *QUANTITIES)
    table = [(*head, *counted_names, "OF-HOURS", "NOTE")]
    for bill in bills:
        for line in bill.lines:
            counted = render_counted(copies[line.assignment_id])
            table.append(
                (
                    bill.whose,
                    f"{line.workload}/{line.replica}",
                    line.hostname,
                    str(line.assignment_id),
                    *list_quantities(line),
                    render_quantity(counted["counted_cpu_ns"], CPU_HOUR),
                    render_quantity(counted["counted_memory_byte_s"] * 1_000_000, GB_HOUR),
                    render_quantity(counted["counted_tx_bytes"], GB),
                    render_quantity(counted["life_us"], HOUR_US),
                    counted["note"],
                )
            )
    return render_table(table)


def render_windows(windows: Sequence[BillWindow]) -> str:
    """Windows from what was used to what is owed, as a table."""
    head = ("HOUR", "PART", "CARD", *QUANTITIES, "CHARGE", "SHARE", "OWED")
    rows = (
        (
            *(f"{one.hour_at:%Y-%m-%dT%H:%MZ}", str(one.part), str(one.card_no)),
            *list_quantities(one),
            render_money(one.usage.charge_micros),
            f"{one.provider_share_ppm / 10_000:g} %",
            render_money(one.usage.share_micros),
        )
        for one in windows
    )
    return render_table([head, *rows])


def command_statements(args: argparse.Namespace, settings: Settings) -> int:
    """Print or write what providers are owed for a month."""

    async def work(db: Database) -> list[Bill]:
        _, owners = await list_bill_owners(db, parse_month(args.month))
        wanted = [args.namespace] if args.namespace else owners
        return [await read_statement(db, each, parse_month(args.month)) for each in wanted]

    return show_bills(asyncio.run(with_database(settings.dsn_file, work)), args, settings)


def show_bills(bills: Sequence[Bill], args: argparse.Namespace, settings: Settings) -> int:
    """Bills as a table, or each as files."""
    if args.out:
        for path in write_bills(bills, Path(args.out), settings.currency):
            print(path)
    else:
        print(render_bills(bills, settings.currency))
    return 0


def write_bills(bills: Sequence[Bill], directory: Path, currency: str) -> list[Path]:
    """Write each bill as HTML, CSV and JSON; gives back the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for bill in bills:
        stem = f"{bill.kind}-{bill.month:%Y-%m}-{bill.whose_id}-{render_state(bill)}"
        for suffix, parts in render_files(bill, currency).items():
            path = directory / f"{stem}.{suffix}"
            write_file(path, "".join(parts).encode(), 0o600)
            written.append(path)
    return written


def render_bills(bills: Sequence[Bill], currency: str) -> str:
    """One line for each bill."""
    rows = [("NUMBER", "WHOSE", "MONTH", "LINES", "TOTAL")]
    for bill in bills:
        total = f"{render_money(bill.total_micros)} {currency}"
        rows.append(
            (render_state(bill), bill.whose, f"{bill.month:%Y-%m}", str(len(bill.lines)), total)
        )
    return render_table(rows)


def render_files(bill: Bill, currency: str) -> dict[str, Iterable[str]]:
    """A bill as the files that it is given out as, by suffix."""
    return {
        "html": render_bill_html(bill, currency),
        "csv": render_bill_csv(bill, currency),
        "json": [json.dumps(render_bill_json(bill, currency), indent=1), "\n"],
    }


def command_drain(args: argparse.Namespace, settings: Settings) -> int:
    """Move a host's workloads elsewhere and give it no more."""
    return _drain(args, settings, True)


def command_undrain(args: argparse.Namespace, settings: Settings) -> int:
    """Give a host that was drained workloads again."""
    return _drain(args, settings, False)


def _drain(args: argparse.Namespace, settings: Settings, drain: bool) -> int:
    host_id = parse_host_id(args.host_id)
    host = asyncio.run(
        with_database(settings.dsn_file, lambda db: drain_host(db, cli_actor(), host_id, drain))
    )
    what = f"drained; {host.assignments} copies leave it" if drain else "not drained any more"
    print(f"host {host.host_id} is {what}")
    return 0


def command_label(args: argparse.Namespace, settings: Settings) -> int:
    """Give a host these labels and no others; what runs there stays."""
    host_id = parse_host_id(args.host_id)
    pairs = [text.partition("=") for text in args.labels]
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise Error("a key stands there twice", "give each once", 2)
    given = {"labels": {key: value for key, _, value in pairs}}
    try:
        labels = parse_fields(LABEL_FIELDS, given)["labels"]
    except Refusal as refusal:
        raise Error(refusal.what, refusal.todo, 2) from None
    host = asyncio.run(
        with_database(settings.dsn_file, lambda db: label_host(db, cli_actor(), host_id, labels))
    )
    has = " ".join(f"{key}={value}" for key, value in sorted(host.labels.items()))
    print(f"host {host.host_id} has the labels {has}" if has else f"host {host.host_id} has none")
    return 0


def command_revoke(args: argparse.Namespace, settings: Settings) -> int:
    """Remove a host for good."""
    host_id = parse_host_id(args.host_id)
    host = asyncio.run(
        with_database(settings.dsn_file, lambda db: revoke_host(db, cli_actor(), host_id))
    )
    print(f"host {host.host_id} ({host.hostname}) is revoked")
    return 0


def command_doctor(args: argparse.Namespace, settings: Settings) -> int:
    """Say what is wrong, a sentence and what to do each; 1 when there is anything."""
    findings, notes = asyncio.run(diagnose(settings, args.invariants))
    if args.json:
        print(json.dumps({"ok": not findings, "findings": findings, "notes": notes}))
    else:
        for finding in findings:
            print(f"WRONG {finding['what']}\n      {finding['todo']}")
        for note in notes:
            print(f"NOTE  {note}")
        count = len(INVARIANTS) + bool(settings.wg_socket)
        checked = f"{count} invariants hold" if args.invariants else "all is well"
        print(f"{len(findings)} findings" if findings else checked)
    return 1 if findings else 0


async def diagnose(settings: Settings, invariants: bool) -> tuple[list[dict[str, str]], list[str]]:
    """What is wrong with files, database, hub and, when asked for, the invariants; and notes."""
    problems: list[Error] = []
    notes: list[str] = []
    try:
        read_jwt_keys(settings.jwt_keys_file)
    except Error as error:
        problems.append(error)
    try:
        key = read_secrets_key(settings.secrets_key_file)
        count = await with_database(settings.dsn_file, count_lost_secrets, key)
        if count:
            what = (
                f"the secrets of {count} workloads cannot be read with {settings.secrets_key_file}"
            )
            todo = "put the key there that they were set with, and restart openinfra-cp; without it"
            problems.append(Error(what, f"{todo} their customers set them again"))
        work = find_violations if invariants else no_rows
        found = await with_database(settings.dsn_file, work, options=PATIENT)
        for name, sentence, subject in found:
            what = f"{name}: it must hold that {sentence}, but not so for {subject}"
            problems.append(Error(what, "keep a copy of the database and report this as a bug"))
        if settings.wg_socket:
            check = functools.partial(diagnose_hub, path=settings.wg_socket)
            wrong, notes = await with_database(settings.dsn_file, check)
            problems += wrong
    except Error as error:
        problems.append(error)
    return [{"what": problem.what, "todo": problem.todo} for problem in problems], notes


async def diagnose_hub(db: Database, path: str) -> tuple[list[Error], list[str]]:
    """Every host that has not exactly its peer, every peer that must not be; and the unknown."""
    first = await read_peer_plan(db, path)
    if first.changes:  # `serve` may be at it
        await asyncio.sleep(2 * PEERS_LOOK_S)
    plan = await read_peer_plan(db, path) if first.changes else first
    problems = []
    for change in (*plan.changes, *plan.conflicts):
        if change in plan.changes and change not in first.changes:
            continue  # it has just come
        what = f"the hub has peer {change.key}, which belongs to a revoked host or to none now"
        if change.verb == "set":
            what = f"the hub has not exactly {change.ip} for its host's peer {change.key}"
            what += f", but for {change.replaces}" if change.replaces else ""
        todo = "does serve run with --wg-socket? it says why: journalctl -u openinfra-cp -n 50"
        if change in plan.conflicts:
            todo = f"if that is not the host's new key: wg set wg0 peer {change.replaces} remove"
        problems.append(Error(what, todo))
    notes = [f"unknown peer {key}: no host has registered with this key" for key in plan.unknown]
    return problems, notes


async def no_rows(_db: Database) -> list[tuple[str, str, str]]:
    """Nothing: the connection was what had to be tried."""
    return []


def command_dist(args: argparse.Namespace, _settings: Settings) -> int:
    """Make and sign the release that hosts download."""
    out = Path(args.out)
    try:
        version, changed, public = make_release(out, Path(args.key), args.new_key)
    except OSError as error:
        what = f"cannot write {error.filename or out}: {error.strerror}"
        raise Error(what, "mend that and run this again") from None
    for name in changed:
        print(f"wrote {out / name}")
    print(f"release {version} is in {out}" if changed else "nothing to do")
    print(f"sha256 of release.pub: {sha256(public).hex()}")
    return 0


def list_backup_paths(args: argparse.Namespace, settings: Settings) -> dict[str, Path]:
    """Where the files of a backup lie on this machine."""
    env_file = args.env_file or "/etc/openinfra/cp.env"
    paths = (args.wg_conf, settings.jwt_keys_file, env_file, args.release_key)
    found = {name: Path(path) for name, path in zip(BACKUP_FILES, paths, strict=True) if path}
    if args.command == "backup" and not Path(args.release_key).exists():  # it is elsewhere
        found.pop("release-key.pem", None)
    return found


def command_backup(args: argparse.Namespace, settings: Settings) -> int:
    """Write one encrypted file with the database, the hub's key, signing keys and settings."""
    out = Path(args.out).absolute()
    paths = list_backup_paths(args, settings)
    try:
        manifest = back_up(out, read_passphrase(Path(args.passphrase_file)), settings, paths)
        size = out.stat().st_size
    except OSError as error:
        what = f"cannot back up: {error.filename or out}: {error.strerror}"
        raise Error(what, "mend that and run this again; without a hub: --wg-conf ''") from None
    print(f"{out}: {manifest['hosts']} hosts, {size} bytes, read back and whole")
    return 0


def command_restore(args: argparse.Namespace, settings: Settings) -> int:
    """Restore a backup on a machine after setup_cp.py, or with --replace over what is there."""
    paths = list_backup_paths(args, settings)
    passphrase = read_passphrase(Path(args.passphrase_file))
    try:
        with read_backup(Path(args.file), passphrase, Path("/var/tmp")) as backup:  # noqa: S108
            for line in restore(backup, settings, paths, args.replace):
                print(line, flush=True)
            if "release-key.pem" in backup.files and "release-key.pem" in paths:
                print(sign_again(Path(args.dist), paths["release-key.pem"]), flush=True)
    except OSError as error:
        what = f"cannot restore: {error.filename or args.file}: {error.strerror}"
        raise Error(what, "mend that and run this again, with --replace if it was begun") from None
    at = backup.manifest["created_at"]
    print(
        f"Start it: systemctl restart openinfra-cp. Every host comes back by itself, but:\n"
        f"- a host that registered after {at}, or got a new secret, address or key by an invite\n"
        "  since, is not known: mint a fresh invite for install_agent.py --new-invite there;\n"
        f"- a host that was revoked after {at} on a machine that is gone is active again: revoke it"
    )
    return 0


def command_pilot(args: argparse.Namespace, settings: Settings) -> int:
    """Everything on one machine."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(number, signal.default_int_handler)
    heartbeat_s = float(args.heartbeat_s or (1 if args.check else HEARTBEAT_S))
    if not args.check:
        root = Path(args.dir).resolve() if args.dir else default_pilot_dir()
        with hold_pilot(root):
            run_pilot(plan_pilot(root, heartbeat_s, settings.currency, args.docker))
        return 0
    root = Path(args.dir or tempfile.mkdtemp(prefix="openinfra-pilot-")).resolve()
    with hold_pilot(root):
        figures = check_pilot(plan_pilot(root, heartbeat_s, settings.currency, args.docker))
    if not args.dir:
        shutil.rmtree(root)
    print(json.dumps(figures))
    return 0


def command_pilot_engine(args: argparse.Namespace, _settings: Settings) -> int:
    """The pilot starts it: its agent's door to this machine's Docker."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    root = Path(args.dir)
    door = DockerDoor(Path(args.docker), hashlib.sha256(os.fsencode(root)).hexdigest()[:12])
    try:
        door.open(root / "agent" / "engine.sock")
        while True:
            signal.pause()
    finally:
        door.close()


def cli_actor() -> Actor:
    """The user of this command, for the audit log."""
    return Actor(f"cli:{getpass.getuser()}")


HOST_COMMANDS = {
    "revoke": command_revoke,
    "drain": command_drain,
    "undrain": command_undrain,
    "label": command_label,
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--env-file", help="settings file (default: /etc/openinfra/cp.env)")
    for option in OPTIONS:
        common.add_argument(f"--{option.name}", help=f"{option.help} (default: {option.default})")
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, work: Callable[[argparse.Namespace, Settings], int]) -> Any:
        sub = commands.add_parser(
            name, help=work.__doc__, parents=[common], description=work.__doc__
        )
        sub.set_defaults(work=work)
        return sub

    add("serve", command_serve)
    add("migrate", command_migrate)
    token = add("token", command_token)
    token.add_argument("--new-key", action="store_true", help="add a signing key to the file first")
    token.add_argument("--sub", help="whose token it is (default: this user)")
    token.add_argument("--scope", choices=("admin", "read"), default="admin")
    token.add_argument("--ttl-hours", type=int, choices=range(1, 13), default=12, metavar="1-12")
    invite = add("invite", command_invite)
    for field in INVITE_FIELDS:
        if field.kind != "boolean":
            kind = int if field.kind == "integer" else str
            invite.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=field.help)
    invite.add_argument(
        "--approve-first-wallet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without --payout-pubkey: approve the wallet that the host arrives with",
    )
    invite.add_argument("--json", action="store_true", help="print one JSON object")
    hosts = add("hosts", command_hosts)
    for field in HOST_FILTERS:
        hosts.add_argument(f"--{field.name}", help=field.help)
    hosts.add_argument("--limit", type=int, default=PAGE_MAX, help="rows to show")
    hosts.add_argument("--json", action="store_true", help="print one JSON object")
    add_host_commands(add)
    add_customer_commands(add)
    doctor = add("doctor", command_doctor)
    doctor.add_argument("--invariants", action="store_true", help="test what must always hold")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    dist = add("dist", command_dist)
    dist.add_argument("--out", required=True, help="the directory that Caddy serves as /dist/")
    dist.add_argument("--key", required=True, help="file with the Ed25519 key that signs, 0600")
    dist.add_argument("--new-key", action="store_true", help="make that file when it is missing")
    backup = add("backup", command_backup)
    backup.add_argument("--out", required=True, help="the file to write, mode 0600")
    restore = add("restore", command_restore)
    restore.add_argument("file", help="what `backup` wrote")
    restore.add_argument("--dist", default="/srv/openinfra/dist", help="signed again when need be")
    restore.add_argument("--replace", action="store_true", help="also over a database with hosts")
    for command in (backup, restore):
        command.add_argument("--passphrase-file", required=True, help="one line, mode 0600")
        command.add_argument("--wg-conf", default="/etc/wireguard/wg0.conf", help="empty: no hub")
        command.add_argument("--release-key", default=RELEASE_KEY, help="if it is on this machine")
    add_pilot_commands(add)
    return parser


def add_pilot_commands(add: Callable[..., Any]) -> None:
    """The pilot, and the part of it that is a process of its own."""
    pilot = add("pilot", command_pilot)
    pilot.add_argument("--dir", help="its directory (default: /var/lib/openinfra-pilot for root)")
    pilot.add_argument("--check", action="store_true", help="try it all, take it down, say figures")
    engine = add("pilot-engine", command_pilot_engine)
    engine.add_argument("--dir", required=True, help="the pilot's directory")
    for command in (pilot, engine):
        command.add_argument(
            "--docker",
            default=DOCKER_SOCKET,
            help=f"socket of the Docker that runs the workload (default: {DOCKER_SOCKET}); where"
            " there is none, a plain process stands in",
        )


def add_host_commands(add: Callable[..., Any]) -> None:
    """The commands that take one host."""
    for name, work in HOST_COMMANDS.items():
        host = add(name, work)
        host.add_argument("host_id", help="the host's UUID")
    host.add_argument(
        "labels", nargs="*", metavar="KEY=VALUE", help="all of them; none: it has none"
    )


def add_customer_commands(add: Callable[..., Any]) -> None:
    """The command line for customers and their keys."""
    customers = add("customers", command_customers)
    customers.add_argument("--limit", type=int, default=PAGE_MAX, help="rows to show")
    customers.add_argument("--json", action="store_true", help="print one JSON object")
    customer = add("add-customer", command_add_customer)
    for field in CUSTOMER_FIELDS:
        customer.add_argument(f"--{field.name}", required=True, help=field.help)
    namespace = add("add-namespace", command_add_namespace)
    namespace.add_argument("customer_id", help="the customer's UUID")
    namespace.add_argument("namespace", help=CUSTOMER_FIELDS[1].help)
    key = add("mint-key", command_mint_key)
    key.add_argument("customer_id", help="the customer's UUID")
    key.add_argument("--note", default="", help="what it is for")
    add("revoke-key", command_revoke_key).add_argument("key_id", help="its 16 characters")
    workloads = add("workloads", command_workloads)
    for field in WORKLOAD_FILTERS:
        if field.kind == "boolean":
            workloads.add_argument(f"--{field.name}", action="store_true", help=field.help)
        else:
            workloads.add_argument(f"--{field.name}", help=field.help)
    workloads.add_argument("--limit", type=int, default=PAGE_MAX, help="rows to show")
    workloads.add_argument("--json", action="store_true", help="print one JSON object")
    add_billing_commands(add)


def add_billing_commands(add: Callable[..., Any]) -> None:
    """The command line for prices, payments and what comes of them."""
    add("rate-cards", command_rate_cards).add_argument("--json", action="store_true")
    card = add("add-rate-card", command_add_rate_card)
    card.add_argument("--valid-from", required=True, help="2026-12-01T00:00Z, or next: next hour")
    card.add_argument("--customer-id", help="for this customer; default: for all")
    card.add_argument("--cpu-hour", required=True, help="price of a reserved processor and an hour")
    card.add_argument("--gb-hour", required=True, help="price of 10^9 reserved bytes and an hour")
    card.add_argument("--egress-gb", required=True, help="price of 10^9 bytes sent")
    card.add_argument("--provider-share", required=True, help="percent of it to the provider")
    payment = add("add-payment", command_add_payment)
    payment.add_argument("customer_id", help="the customer's UUID")
    payment.add_argument("amount", help="what was paid, like 12.5")
    payment.add_argument("--reference", required=True, help="the bank's; twice is once")
    payment.add_argument("--note", default="", help="what it is for")
    limit = add("credit-limit", command_credit_limit)
    limit.add_argument("customer_id", help="the customer's UUID")
    limit.add_argument("amount", help="0: prepaid; none: no limit")
    add("ledger", command_ledger).add_argument("what", choices=("verify",))
    invoices = add("invoices", command_invoices)
    invoices.add_argument("--customer-id", help="of this customer only")
    statements = add("statements", command_statements)
    statements.add_argument("--namespace", help="of this provider only, solana:...")
    usage = add("usage", command_usage)
    usage.add_argument("--customer-id", help="of this customer only")
    usage.add_argument("--assignment", help="the hours of this copy, with what its provider gets")
    usage.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (invoices, statements, usage):
        command.add_argument("--month", required=True, help="like 2026-11")
    for command in (invoices, statements):
        command.add_argument("--out", help="directory for HTML, CSV and JSON files")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the only place that prints an Error and decides the exit code."""
    args = make_parser().parse_args(argv)
    logging.getLogger("psycopg").addHandler(logging.NullHandler())  # the store says it once
    logging.getLogger("psycopg").propagate = False
    try:
        check_failpoints()
        return int(args.work(args, read_settings(args)))
    except Error as error:
        log("ERROR", error.what, error.todo, **error.pairs)
        is_usage = isinstance(error, Refusal) and error.code == "BAD_REQUEST"
        return USAGE if is_usage else error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
