#!/usr/bin/python3 -I
"""Make this machine a host of an OpenInfra fleet: the agent, its tunnel, its units.

  install_agent.py              asks what it must; installs, mends or upgrades; starts the agent
  install_agent.py --dry-run    prints what it would do and changes nothing
  install_agent.py --check      prints what is not as it should be: exit 1 when anything is
  install_agent.py --uninstall  removes what it installed, and nothing else
  install_agent.py --new-invite the operator gave a fresh invite: asks for it, and joins with it
  install_agent.py --new-key    makes a new WireGuard key, which the operator has to be told

What it does to this machine
  It installs the Debian packages of the table PACKAGES that are missing, after naming them. It
  downloads the agent over https, and writes nothing of it before signature, size and sha256 are
  right; an older release, or one signed by another key than the first, is refused. It makes a
  WireGuard key, which never leaves this machine. What others made is refused, not overwritten.
  It makes the container engine of the workloads: a system user whose subordinate ids they get, and
  a disk image of fixed size for what they bring. A Docker that is here stays as it is; where there
  is none, docker.io is installed, and kept from starting. No package is removed for it.
  A second run asks nothing, changes nothing and restarts nothing, or mends what is missing.
Files (mode)
  /etc/openinfra/agent.env               0600  invite, wallet, CONTROL_PLANE and DATA_DIR
  /etc/openinfra/installer/              0755  what the agent itself may not write:
  /etc/openinfra/installer/install.json  0644  all that is installed, written before it is there
  /etc/openinfra/installer/release.pub   0644  the key that signs releases, kept from the first one
  /etc/openinfra/installer/ca.pem        0644  with --ca-file: who vouches for the control plane
  /etc/openinfra/installer/engine.json   0644  and containerd.toml: settings of the engine
  /etc/wireguard/openinfra.key           0600  and openinfra.conf 0600, openinfra.pub 0644
  /usr/local/bin/openinfra-agent         0755  the agent: a zip that Python runs
  /etc/systemd/system/openinfra*               the units that lie in that zip, and var-cache-…mount
  /etc/subuid                                  65,536 ids that nobody has, and /etc/subgid
  /var/lib/openinfra/engine.img          0600  the disk of the workloads, at /var/cache/openinfra
  /run/openinfra-install.lock            0600  held while this changes anything
Runs: apt-get dpkg dpkg-query fallocate find install ip iptables mkfs.ext4 modprobe mv nft openssl
  python3 rm rmdir sync systemctl useradd userdel usermod wg

The invite is typed at the prompt or comes from --token-file, never from the command line.
--new-invite moves the identity of before to identity.json.replaced. A host that the control plane
  still knows stays the same host, by its key and address; a revoked one needs --new-key as well.
--uninstall ends the workloads. It keeps /var/lib/openinfra (the identity, on the encrypted disk),
  the packages (but for --purge-packages) and each file that was changed by hand since; it names
  what it keeps.
Needs: Debian 12 or newer with systemd, root, an encrypted disk (setup_luks2.py).
Environment: OPENINFRA_AGENT_URL, where the agent is instead of https://HOSTNAME/dist/ .
Exit codes: 0 ended well; 1 error; 2 usage or a wrong answer; 3 refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import email.utils
import fcntl
import getpass
import grp
import hashlib
import http.client
import io
import ipaddress
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

BINARY = Path("/usr/local/bin/openinfra-agent")
ETC = Path("/etc/openinfra")
# The agent has to write agent.env, and thus into ETC; its unit keeps it out of this one.
KEPT = ETC / "installer"
MANIFEST, RELEASE_PUB, CA = KEPT / "install.json", KEPT / "release.pub", KEPT / "ca.pem"
ENV, LUKS_JOURNAL = ETC / "agent.env", ETC / "luks.json"
WG_DIR = Path("/etc/wireguard")
WG_KEY, WG_PUB = WG_DIR / "openinfra.key", WG_DIR / "openinfra.pub"
WG_CONF = WG_DIR / "openinfra.conf"
UNIT_DIR = Path("/etc/systemd/system")
LINK, TABLE = "openinfra", "openinfra"  # the interface; the nft table of family inet
WG, AGENT = f"wg-quick@{LINK}.service", "openinfra-agent.service"
GUARD, TIMER = "openinfra-guard.service", "openinfra-guard.timer"
WATCH = "openinfra-watch.service"
STRAYS = "openinfra-strays.service"
ENGINE, CONTAINERD = "openinfra-engine.service", "openinfra-containerd.service"
WORKLOADS, SLICE, DISK = (
    "openinfra-workloads.service",
    "openinfra.slice",
    "var-cache-openinfra.mount",
)
# The files of these lie in the agent's zip, under systemd/.
UNITS = (AGENT, GUARD, TIMER, WATCH, ENGINE, CONTAINERD, STRAYS, WORKLOADS, SLICE, DISK)
ENGINE_FILES = {  # settings that lie beside them, by their name there
    "openinfra-containerd.toml": KEPT / "containerd.toml",
    "openinfra-engine.json": KEPT / "engine.json",
}
ENABLED = (GUARD, WG, TIMER, WATCH, DISK, ENGINE, AGENT)
# What workloads bring goes into a file system of its own: it cannot fill the identity's.
ENGINE_IMAGE, ENGINE_ROOT = Path("/var/lib/openinfra/engine.img"), Path("/var/cache/openinfra")
ENGINE_IMAGE_NEW = ENGINE_IMAGE.with_name(f".{ENGINE_IMAGE.name}.new")  # until it is whole
DOCKER_KEY = Path("/etc/docker/key.json")
ENGINE_USER, ENGINE_IDS = "openinfra-engine", 65_536  # subordinate ids, subuid(5)
DROP_IN = UNIT_DIR / f"{AGENT}.d" / "allow-unencrypted.conf"
SETTINGS = (RELEASE_PUB, CA, BINARY, WG_KEY, WG_PUB, WG_CONF, ENV, *ENGINE_FILES.values())
OURS = (*SETTINGS, *(UNIT_DIR / name for name in UNITS), DROP_IN, ENGINE_IMAGE)
RUN_DIRS = (Path("/run/openinfra"), Path("/run/openinfra-engine"))
LOCK = Path("/run/openinfra-install.lock")
DATA_DIR = "/var/lib/openinfra"
MOUNT_UNIT = "var-lib-openinfra.mount"
MANIFEST_FORMAT = 1

TUNNEL = ipaddress.IPv4Network("10.77.0.0/16")
CP_ADDRESS = ipaddress.IPv4Address("10.77.0.1")
KEEPALIVE_S = 25  # home routers forget a UDP connection after 30 s and more
ARCHITECTURES = ("x86_64", "aarch64")
# Debian packages, and what shows that each is there: a command, or a module of /usr/bin/python3.
PACKAGES = {
    "apparmor": "apparmor_parser",  # where the kernel has it, dockerd runs no container without
    "dbus": "dbus-daemon",  # by which the engine asks systemd for its containers' limits
    "docker.io": "dockerd",
    "iproute2": "ip",
    "nftables": "nft",
    "openssl": "openssl",
    "python3-grpcio": "grpc",
    "python3-protobuf": "google.protobuf",
    "wireguard-tools": "wg",
}
ANY_MAKE = ("docker.io",)  # another's package of the same is as good, and apt would remove it
# Services that Debian's packages would start, and this machine did without so far.
UNWANTED = {
    "containerd": ("containerd.service",),
    "docker.io": ("docker.service", "docker.socket"),
}
OTHERS_DATA = {"containerd": Path("/var/lib/containerd"), "docker.io": Path("/var/lib/docker")}
UNIT_DIRS = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")  # …/systemd/system
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
FREE_MIN_BYTES = 64 << 20
FREE_PACKAGES_BYTES = 768 << 20  # what PACKAGES and all below them take, and their download
# Of the encrypted disk: the identity's share, and the least that is of any use to workloads.
DISK_KEPT_BYTES, ENGINE_MIN_BYTES = 256 << 20, 512 << 20

SMALL_MAX_BYTES = 64 << 10  # release.json, its signature and key, a unit, a file of settings
ARTIFACT_MAX_BYTES = 64 << 20
SILENCE_MAX_S = 20  # of a server, before it is given up
DOWNLOAD_MAX_S = 900
CLOCK_OFF_MAX_S = 300
APT_MAX_S = 1800
NO_EXTRAS = "--no-install-recommends"
APT_OPTIONS = ("--option=DPkg::Lock::Timeout=300",)  # somebody else's apt-get may run
START_MAX_S = 120  # wg-quick waits for the name server; the agent may wait for the disk

USAGE, REFUSED = 2, 3
TOKEN_RE = re.compile(
    r"(?P<body>oi1_(?P<id>[a-z2-7]{16})_[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048])_(?P<crc>[0-9a-f]{8})"
)
TOKEN_USED_RE = re.compile(r"oi1_([a-z2-7]{16})_used")
TOKEN_START_RE = re.compile(r"oi1_([a-z2-7]{16})_")
WG_KEY_RE = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
HOST_RE = re.compile(r"(?=.{1,253}(?::|$))[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")
CERTIFICATE_RE = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
SHA256_RE = re.compile(r"[0-9a-f]{64}")
URL_RE = re.compile(r"(https://[^/@\s]+|file://)/\S*[^/\s]")
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


# ------------------------------------------------------------------------------------------------
# From agent.py, so that what it would refuse is refused here: the same text; a test compares them.
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """An invite: its public id, and the whole text while it is unspent."""

    id: str
    text: str = field(repr=False)


def parse_line(text: str, limit: int = 300) -> str:
    """Make words from elsewhere safe for one line on a terminal or in a log."""
    line = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


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


def parse_env_value(value: str) -> str | None:
    """Take one pair of quotes off; None for what systemd might read otherwise than we do."""
    if value[:1] in ("'", '"') and value:
        if len(value) < 2 or value[-1] != value[0]:
            return None
        value = value[1:-1]
    if any(char in "'\"\\" or not " " <= char <= "~" for char in value):
        return None
    return value


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


# ------------------------------------------------------------------------------------------------
# Types: what was found, what was answered, and the steps of a plan. Secrets stay out of a repr.
# ------------------------------------------------------------------------------------------------


class UnreachableError(Error):
    """The control plane gave no answer at all."""


@dataclass(frozen=True)
class Manifest:
    """What install.json holds: all that this installer put here, and what it still has to do."""

    url: str = ""
    version: str = ""
    # SHA-256 of what we wrote; two between the beginning and the end of a run; none: not compared.
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()  # units that have to be restarted, or UNWANTED kept from it


@dataclass(frozen=True)
class Found:
    """A file that is there; one that is no regular file has the mode -1."""

    content: bytes = field(repr=False)
    mode: int
    uid: int


@dataclass(frozen=True)
class Unit:
    """A unit as systemd sees it."""

    active: str
    enabled: str


@dataclass(frozen=True)
class DataDir:
    """The agent's data directory; mode -1: not there."""

    path: str
    mode: int
    uid: int
    is_mount: bool
    is_encrypted: bool
    is_expected: bool  # setup_luks2.py made a disk for it
    is_registered: bool  # it holds the identity of a host
    invite_id: str = ""  # by which that became a host
    size_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class EngineUser:
    """The system user whose subordinate ids the workloads run as."""

    is_there: bool
    has_ids: bool
    first_free_id: int  # of as many that nobody has


@dataclass(frozen=True)
class Others:
    """What is here of the UNWANTED services: a Docker of the provider's, or what came with ours."""

    services: Mapping[str, bool]  # those that are there; True: it runs, or does at each boot
    data: frozenset[str] = frozenset()  # packages whose services have kept something
    has_key: bool = False  # DOCKER_KEY, which every dockerd makes


@dataclass(frozen=True)
class Facts:
    """All that a plan looks at."""

    arch: str
    now_s: float
    has_systemd: bool
    has_wireguard: bool
    has_apt: bool
    missing: tuple[str, ...]  # packages
    absent: tuple[Path, ...]  # directories
    is_dpkg_interrupted: bool
    free_bytes: Mapping[str, int]
    data: DataDir
    uses: tuple[str, ...]  # who else uses the tunnel's addresses
    files: Mapping[Path, Found]
    units: Mapping[str, Unit]
    dangling: tuple[Path, ...]  # links that enabled a unit of ours whose file is gone
    has_link: bool
    has_table: bool
    engine_user: EngineUser
    others: Others
    leftovers: tuple[tuple[str, ...], ...]  # commands that remove what workloads left, if asked for
    manifest: Manifest


@dataclass(frozen=True)
class Answers:
    """All that a person decided."""

    url: str
    control_plane: str
    token: str = field(repr=False)
    wallet: str
    wg_endpoint: str
    wg_public_key: str
    wg_address: str
    ca: bytes
    allow_unencrypted: bool
    is_new_host: bool = False  # a fresh invite takes the place of an identity that is there


@dataclass(frozen=True)
class Release:
    """One release, downloaded."""

    version: str
    raw: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    key: bytes
    artifact: bytes = field(repr=False)


@dataclass(frozen=True)
class Run:
    """One command."""

    argv: tuple[str, ...]
    why: str
    timeout_s: float = START_MAX_S
    may_fail: bool = False  # what it was to remove is then named as left

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)}  # {self.why}"


@dataclass(frozen=True)
class WriteFile:
    """One file, replaced whole."""

    path: Path
    content: bytes = field(repr=False)
    mode: int
    why: str
    old: bytes | None = field(default=None, repr=False)  # what must still be there

    def __str__(self) -> str:
        return f"write {self.path} (mode {self.mode:04o})  # {self.why}"


@dataclass(frozen=True)
class Remove:
    """One file, and what a killed run may have left beside it."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"remove {self.path}  # {self.why}"


Step = Run | WriteFile | Remove


# ------------------------------------------------------------------------------------------------
# Answers: how each is asked for and checked. Pure.
# ------------------------------------------------------------------------------------------------


def check_host_port(text: str, default_port: str) -> str:
    """Check HOST:PORT, where the host is a name, an IPv4 address or [an IPv6 address]."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, default_port
    number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host.strip("[]"))
            number *= "%" not in host  # anything could follow, a line of openinfra.conf too
        elif not HOST_RE.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
    except ValueError:
        number = 0
    if not 1 <= number <= 65_535:
        raise Error(f"{parse_line(text, 80)!r} is no name and port", "copy it again", USAGE)
    return text


def parse_ca(raw: bytes) -> bytes:
    """The certificates of a PEM file, which everybody may read, and nothing else of it."""
    found = re.findall(CERTIFICATE_RE, raw)
    if not found:
        todo = "give the PEM file of the control plane's CA"
        raise Error("the CA file holds no certificate", todo, USAGE)
    return b"".join(block + b"\n" for block in found)


def check_hostname(text: str) -> str:
    """Check the control plane's public name; a port may follow it."""
    if "/" in text:
        what = f"{parse_line(text, 80)!r} is a URL"
        raise Error(what, "give the name alone, such as cp.coledex.com", USAGE)
    return check_host_port(text, "443")


def check_endpoint(text: str) -> str:
    """Check the WireGuard endpoint, NAME:PORT."""
    return check_host_port(text, "")


def check_wallet(text: str) -> str:
    """Check a Solana address; here it has to be one."""
    if not text:
        raise Error("a host without a wallet earns nothing", "give your Solana address", USAGE)
    try:
        return parse_wallet(text)
    except Error as error:
        raise Error(error.what, "copy it again", USAGE) from None


def check_wg_key(text: str) -> str:
    """Check a WireGuard public key."""
    if not WG_KEY_RE.fullmatch(text):
        what = "that is no WireGuard public key: 44 characters that end with ="
        raise Error(what, "the operator's `wg show wg0 public-key` prints it", USAGE)
    return text


def check_wg_address(text: str) -> str:
    """Check this host's address in the tunnel; /32 may follow it."""
    try:
        address = ipaddress.IPv4Address(text.removesuffix("/32"))
    except ValueError:
        raise Error(
            f"{parse_line(text, 80)!r} is no IPv4 address", "copy it again", USAGE
        ) from None
    if address not in TUNNEL:
        raise Error(f"{address} is outside the tunnel's {TUNNEL}", "ask the operator", USAGE)
    if address in (CP_ADDRESS, TUNNEL[0], TUNNEL[-1]):
        raise Error(f"{address} is no host's address", "ask the operator", USAGE)
    return str(address)


def check_token(text: str) -> str:
    """Check an invite that somebody gives: it has to be whole."""
    token = parse_token(text)
    if token is None or not token.text:
        raise Error("there is no invite", "copy it from the operator's message", USAGE)
    return text


@dataclass(frozen=True)
class Question:
    """One answer: its name, flag, what is asked, and its check."""

    name: str
    flag: str
    text: str
    check: Callable[[str], str]
    default: str = ""  # {hostname} is the first answer


CP = "Control plane"
QUESTIONS = (
    Question("hostname", "--hostname", f"{CP} public hostname", check_hostname),
    Question(
        "control_plane",
        "--control-plane",
        f"{CP} gRPC endpoint",
        parse_control_plane,
        f"{CP_ADDRESS}:9092",
    ),
    Question("token", "--token-file", "Invite token (not shown)", check_token),
    Question("wallet", "--wallet", "Solana payout pubkey", check_wallet),
    Question(
        "wg_endpoint",
        "--wg-endpoint",
        f"{CP} WireGuard endpoint",
        check_endpoint,
        "{hostname}:51820",
    ),
    Question("wg_public_key", "--wg-public-key", f"{CP} WireGuard public key", check_wg_key),
    Question("wg_address", "--wg-address", "Your assigned WireGuard IP", check_wg_address),
)


def list_sections(lines: Sequence[str]) -> list[str]:
    """The [Section] of each line, in small letters."""
    found, section = [], ""
    for line in lines:
        section = line.strip().strip("[]").lower() if line.lstrip().startswith("[") else section
        found.append(section)
    return found


def parse_values(content: bytes) -> dict[tuple[str, str], str]:
    """Read KEY=VALUE lines by section and key in small letters; what stands there twice is ""."""
    lines = content.decode("utf-8", "replace").split("\n")
    values: dict[tuple[str, str], str] = {}
    for section, line in zip(list_sections(lines), lines, strict=True):
        key, equals, value = line.partition("=")
        name = (section, key.strip().lower())
        if equals and name[1][:1] not in ("#", ";", "["):
            parsed = parse_env_value(value.strip()) if not section else value.partition("#")[0]
            values[name] = "" if name in values else (parsed or "").strip()
    return values


def set_value(lines: list[str], section: str, key: str, line: str) -> list[str]:
    """Put a line in the place of those that set this key, or at the end of its section."""
    inside = [n for n, each in enumerate(list_sections(lines)) if each == section.lower()]
    at = [n for n in inside if lines[n].partition("=")[0].strip().lower() == key.lower()]
    if at:
        return [line if n == at[0] else lines[n] for n in range(len(lines)) if n not in at[1:]]
    filled = [n for n in inside if lines[n].strip()]
    if section and not filled:
        return [*lines, *([""] if lines else []), f"[{section}]", line]
    end = filled[-1] + 1 if filled else 0
    return [*lines[:end], line, *lines[end:]]


def render_values(content: bytes, wanted: Sequence[tuple[str, str, str]], equals: str) -> bytes:
    """Set values (section, key, value) in KEY=VALUE lines; every other line stays as it is."""
    there = parse_values(content)
    lines = content.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    lines = lines if content else []
    for section, key, value in wanted:
        if there.get((section.lower(), key.lower())) != value:
            lines = set_value(lines, section, key, f"{key}{equals}{value}")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def read_known(facts: Facts) -> dict[str, str]:
    """The answers that the files on disk hold. Pure."""
    env, conf = (parse_values(read_content(facts, path)) for path in (ENV, WG_CONF))
    return {
        "hostname": urllib.parse.urlsplit(facts.manifest.url).netloc,
        "control_plane": env.get(("", "control_plane"), ""),
        "token": env.get(("", "invite_token"), ""),
        "wallet": env.get(("", "solana_payout_pubkey"), ""),
        "wg_endpoint": conf.get(("peer", "endpoint"), ""),
        "wg_public_key": conf.get(("peer", "publickey"), ""),
        "wg_address": conf.get(("interface", "address"), "").removesuffix("/32"),
    }


# ------------------------------------------------------------------------------------------------
# Rules and plan. Pure.
# ------------------------------------------------------------------------------------------------


def parse_manifest(raw: bytes) -> Manifest:
    """Read install.json; raises Error 3."""
    todo = f"if nothing of OpenInfra is installed: mv {MANIFEST} {MANIFEST}.old"
    try:
        data = json.loads(raw)
        if data["format"] > MANIFEST_FORMAT:
            raise Error(f"{MANIFEST} is of a newer installer", "use that", REFUSED)
        files = {str(name): tuple(map(str, hashes)) for name, hashes in data["files"].items()}
        packages, pending = (tuple(map(str, data[key])) for key in ("packages", "pending"))
        version = str(data["version"])
        if not {DOCKER_KEY, *OURS}.issuperset(map(Path, files)) or (
            version and not parse_version(version)
        ):
            raise ValueError
        url = str(data["url"])
        if url and not URL_RE.fullmatch(url):
            raise ValueError
        return Manifest(url, version, files, packages, pending)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Error(f"{MANIFEST} is damaged", todo, REFUSED) from None


def render_manifest(manifest: Manifest) -> bytes:
    """Write install.json; parse_manifest reads it back."""
    return (json.dumps({"format": MANIFEST_FORMAT, **vars(manifest)}, indent=1) + "\n").encode()


def parse_version(text: str) -> tuple[int, ...]:
    """Read 1.2.3; raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}", text):
        raise ValueError
    return tuple(map(int, text.split(".")))


def parse_release(raw: bytes, name: str) -> tuple[str, int, int, str]:
    """Read release.json: version, when it was made, size and SHA-256 of one file of it."""
    try:
        data = json.loads(raw)
        entry = data["files"][name]
        size_bytes, sha256 = entry["size_bytes"], entry["sha256"]
        made = re.sub(r"\.[0-9]+Z", "Z", data["created_at"])
        created_s = calendar.timegm(time.strptime(made, "%Y-%m-%dT%H:%M:%SZ"))
        parse_version(data["version"])
        if type(size_bytes) is not int or not SHA256_RE.fullmatch(sha256):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        what = f"release.json does not describe {name}"
        raise Error(what, "tell the operator: cp_server.py dist makes it") from None
    if not 0 < size_bytes <= ARTIFACT_MAX_BYTES:
        what = f"{name} has {size_bytes} bytes by release.json"
        raise Error(what, f"tell the operator: at most {ARTIFACT_MAX_BYTES >> 20} MiB are taken")
    return data["version"], created_s, size_bytes, sha256


def decide_key(pinned: bytes, offered: bytes, wanted_sha256: str) -> bytes:
    """Which key has to have signed the release; raises Error 3."""
    found = hashlib.sha256(offered).hexdigest()
    if wanted_sha256 and found != wanted_sha256:
        what = f"release.pub has the sha256 {found}, not the one that you gave"
        raise Error(what, "ask the operator which is right; nothing was changed", REFUSED)
    if pinned and offered != pinned and not wanted_sha256:
        what = f"release.pub (sha256 {found}) is another key than {RELEASE_PUB}"
        todo = "ask the operator by another way than this; if it is theirs, add "
        raise Error(what, f"{todo}--release-key-sha256 {found}", REFUSED)
    return offered


def check_version(manifest: Manifest, release: Release, allow_downgrade: bool) -> None:
    """Refuse a release that is older than what is installed."""
    old = manifest.version
    if old and parse_version(release.version) < parse_version(old) and not allow_downgrade:
        what = f"the control plane has version {release.version}, and {old} is installed"
        raise Error(what, "when that is meant, add --allow-downgrade", REFUSED)


def check_clock(now_s: float, other_s: float, whose: str) -> None:
    """Refuse a clock that would break TLS or make the logs useless."""
    if abs(now_s - other_s) > CLOCK_OFF_MAX_S:
        times = [
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(each)) for each in (now_s, other_s)
        ]
        what = f"the clock of this machine says {times[0]}, {whose} {times[1]}"
        raise Error(what, "set it: timedatectl set-ntp true")


def list_problems(facts: Facts, allow_unencrypted: bool) -> Iterator[str]:
    """Name all that must be mended before this machine can be a host."""
    if not facts.has_systemd:
        yield "systemd does not run here, and the agent is one of its services"
        return
    if facts.arch not in ARCHITECTURES:
        yield f"there is no agent for {facts.arch}, only for {' and '.join(ARCHITECTURES)}"
    if not facts.has_wireguard:
        yield "the kernel has no WireGuard (modprobe wireguard); after an upgrade of it: reboot"
    if facts.missing and not facts.has_apt:
        yield f"not installed: {' '.join(facts.missing)} (Debian's names, and here is no apt-get)"
    yield from list_data_problems(facts.data, allow_unencrypted)
    image_bytes = decide_image_bytes(facts.data)
    if facts.data.is_mount and ENGINE_IMAGE not in facts.files and image_bytes < ENGINE_MIN_BYTES:
        free = f"{facts.data.free_bytes >> 20} MiB are free"
        needed = (facts.data.free_bytes - image_bytes + ENGINE_MIN_BYTES) >> 20
        yield f"{facts.data.path} has no room for workloads: {free}, {needed} are needed"
    for use in facts.uses:
        yield f"{TUNNEL} is the tunnel's, and here it is in use: {use}; give that another range"
    needed = FREE_PACKAGES_BYTES if facts.missing else FREE_MIN_BYTES
    for path, free_bytes in facts.free_bytes.items():
        if free_bytes < needed:
            free = f"{free_bytes >> 20} MiB are free, {needed >> 20} are needed"
            yield f"the disk of {path} is full: {free}"


def list_data_problems(data: DataDir, allow_unencrypted: bool) -> Iterator[str]:
    """Name what the agent would refuse its data directory for."""
    path = data.path
    if data.is_expected and not data.is_mount:
        yield f"{path} is not mounted: unlock its disk with systemctl start {MOUNT_UNIT}"
    elif not data.is_mount:
        yield f"nothing is mounted at {path}: make its encrypted disk with setup_luks2.py"
    elif not data.is_encrypted and not allow_unencrypted:
        yield (
            f"{path} is not on an encrypted disk: make one with setup_luks2.py (without it, "
            "--allow-unencrypted; then no workload with secrets comes here)"
        )
    elif data.uid != 0 or data.mode != 0o700:
        yield f"{path} is not root's alone: chown root {path}; chmod 0700 {path}"


def decide_image_bytes(data: DataDir) -> int:
    """How large the engine's disk image is made: what is free, but for the identity's share."""
    kept_bytes = max(DISK_KEPT_BYTES, data.size_bytes // 10)
    return max(0, data.free_bytes - kept_bytes) >> 20 << 20


def list_foreign(facts: Facts, new_key: bool = False) -> Iterator[str]:
    """Name what stands in our places and is not ours, or not as we can keep it."""
    for path in facts.files:
        if str(path) not in facts.manifest.files:
            yield f"{path} was not made by this installer: move it away (mv {path} {path}.old)"
    ours = str(WG_CONF) in facts.manifest.files
    if facts.has_link and not ours:
        yield f"an interface {LINK} is there that is not ours: ip link delete dev {LINK}"
    if facts.has_table and not ours:
        yield f"an nft table inet {TABLE} is there that is not ours: nft delete table inet {TABLE}"
    if facts.engine_user.is_there and str(ENGINE_IMAGE) not in facts.manifest.files:
        yield f"a user {ENGINE_USER} is there that is not ours: usermod --login NAME {ENGINE_USER}"
    if len(re.findall(rb"(?im)^\s*\[peer\]", read_content(facts, WG_CONF))) > 1:
        yield f"{WG_CONF} has a second [Peer]: give that one an interface of its own"
    key, used = read_wg_keys(facts)
    if key and used and key != used and not new_key:
        yield f"{WG_KEY} and {WG_CONF} hold two different keys: remove the one that is not in use"


def read_content(facts: Facts, path: Path) -> bytes:
    """What a file of ours holds; nothing when it is missing. Pure."""
    return facts.files[path].content if path in facts.files else b""


def read_wg_keys(facts: Facts) -> tuple[str, str]:
    """The private keys of openinfra.key and of openinfra.conf; "" without one. Pure."""
    key = read_content(facts, WG_KEY).decode("ascii", "replace").strip()
    used = parse_values(read_content(facts, WG_CONF)).get(("interface", "privatekey"), "")
    return key if WG_KEY_RE.fullmatch(key) else "", used if WG_KEY_RE.fullmatch(used) else ""


def read_units(artifact: bytes) -> dict[str, bytes]:
    """The files for systemd and the engine that lie in the agent's zip. Pure."""
    try:
        with zipfile.ZipFile(io.BytesIO(artifact)) as archive:
            return {name: archive.read(f"systemd/{name}") for name in (*UNITS, *ENGINE_FILES)}
    except (zipfile.BadZipFile, KeyError, ValueError, zlib.error) as error:
        what = f"the agent's file is no zip with its units ({parse_line(str(error))})"
        raise Error(what, "tell the operator: cp_server.py dist makes it") from None


def render_drop_in(unit: bytes) -> bytes:
    """The agent's unit with --allow-unencrypted."""
    start = re.search(rb"(?m)^ExecStart=(.+)$", unit)
    if not start:
        raise Error(f"{AGENT} has no ExecStart", "tell the operator: cp_server.py dist makes it")
    return b"[Service]\nExecStart=\nExecStart=" + start[1] + b" --allow-unencrypted\n"


def render_conf(old: bytes, answers: Answers, private_key: str) -> bytes:
    """openinfra.conf (wg-quick(8)); what a person added to it stays."""
    keepalive = parse_values(old).get(("peer", "persistentkeepalive")) or str(KEEPALIVE_S)
    wanted = (
        ("Interface", "Address", f"{answers.wg_address}/32"),
        ("Interface", "PrivateKey", private_key),
        ("Peer", "PublicKey", answers.wg_public_key),
        ("Peer", "AllowedIPs", f"{CP_ADDRESS}/32"),
        ("Peer", "PersistentKeepalive", keepalive),
        ("Peer", "Endpoint", answers.wg_endpoint),
    )
    return render_values(old, wanted, " = ")


def render_env(old: bytes, answers: Answers) -> bytes:
    """agent.env; other lines stay."""
    wanted = (
        ("", "INVITE_TOKEN", answers.token),
        ("", "SOLANA_PAYOUT_PUBKEY", answers.wallet),
        ("", "CONTROL_PLANE", answers.control_plane),
        ("", "DATA_DIR", parse_values(old).get(("", "data_dir")) or DATA_DIR),
    )
    return render_values(old, wanted, "=")


def render_files(
    facts: Facts, answers: Answers, release: Release, keys: tuple[str, str]
) -> Iterator[WriteFile]:
    """Every file of an installed host, in the order in which they are written."""
    private_key, public_key = keys
    yield WriteFile(RELEASE_PUB, release.key, 0o644, "the key of all later releases")
    if answers.ca:
        yield WriteFile(CA, answers.ca, 0o644, "who vouches for the control plane")
    yield WriteFile(BINARY, release.artifact, 0o755, f"the agent, version {release.version}")
    yield WriteFile(WG_KEY, f"{private_key}\n".encode(), 0o600, "it never leaves this machine")
    yield WriteFile(WG_PUB, f"{public_key}\n".encode(), 0o644, "the operator needs this one")
    old = facts.files.get(WG_CONF)
    conf = render_conf(old.content if old else b"", answers, private_key)
    yield WriteFile(WG_CONF, conf, 0o600, "the tunnel", old.content if old else None)
    old = facts.files.get(ENV)
    env = render_env(old.content if old else b"", answers)
    yield WriteFile(ENV, env, 0o600, "the agent's settings", old.content if old else None)
    units = read_units(release.artifact)
    for name, content in units.items():
        path = ENGINE_FILES.get(name, UNIT_DIR / name)
        yield WriteFile(path, content, 0o644, "out of the agent's zip")
    if answers.allow_unencrypted:
        yield WriteFile(DROP_IN, render_drop_in(units[AGENT]), 0o644, "--allow-unencrypted")


def is_as_written(manifest: Manifest, path: Path, found: Found) -> bool:
    """False for a file that somebody changed after this installer wrote it."""
    known = manifest.files.get(str(path), ())
    return not known or hashlib.sha256(found.content).hexdigest() in known


def plan(facts: Facts, answers: Answers, release: Release, keys: tuple[str, str]) -> list[Step]:
    """What is left to do; nothing when all is there.

    install.json is written first with all that will be there, and last as it is then.
    """
    manifest, files, changed = facts.manifest, dict(facts.manifest.files), []
    files[str(ENGINE_IMAGE)] = ()
    if not facts.others.has_key:
        files[str(DOCKER_KEY)] = ()
    for file in render_files(facts, answers, release, keys):
        is_fixed = file.path not in (WG_KEY, WG_CONF, ENV)  # these change, and hold secrets
        files[str(file.path)] = (hashlib.sha256(file.content).hexdigest(),) if is_fixed else ()
        found = facts.files.get(file.path)
        if found != Found(file.content, file.mode, 0):
            edited = found and not is_as_written(manifest, file.path, found)
            changed.append(replace(file, why=f"{file.why}; CHANGED BY HAND") if edited else file)
    commands = [*plan_engine(facts), *plan_commands(facts, {file.path for file in changed})]
    final = replace(manifest, url=answers.url, version=release.version, files=files, pending=())
    known = manifest.files
    both = {name: tuple(sorted({*known.get(name, ()), *new})) for name, new in files.items()}
    pending = tuple(step.argv[-1] for step in commands if step.argv[1] in ("start", "restart"))
    begun = replace(final, files=both, pending=(*list_owed(manifest), *pending))
    steps: list[Step] = [*plan_directories(facts, [MANIFEST, *(file.path for file in changed)])]
    if (changed or commands) and begun != manifest:
        steps.append(plan_manifest(begun, "what will be there"))
    token = parse_token(answers.token) if answers.is_new_host else None
    # The same command again: this invite made the identity that is there.
    is_done = token is not None and token.id == facts.data.invite_id
    if answers.is_new_host and facts.data.is_registered and not is_done:
        steps += plan_new_identity(facts.data.path)
    steps += [*changed, *commands]
    if steps or final != manifest:
        steps.append(plan_manifest(final, "what is there"))
    return steps


def plan_new_identity(data_dir: str) -> Iterator[Run]:
    """Put the identity aside, while no agent has it: the next one redeems the invite."""
    yield Run(("systemctl", "stop", AGENT), "it holds the identity")
    there = f"{data_dir}/identity.json"
    move = ("mv", "--no-target-directory", "--backup=numbered", "--", there, f"{there}.replaced")
    yield Run(move, "of before")


def plan_directories(facts: Facts, paths: Sequence[Path]) -> Iterator[Run]:
    """Make the directories of these files."""
    for path in dict.fromkeys(path.parent for path in paths):
        if path in facts.absent:
            mode = "0700" if path == WG_DIR else "0755"
            yield Run(("install", "--directory", f"--mode={mode}", str(path)), "for what follows")


def plan_manifest(manifest: Manifest, why: str) -> WriteFile:
    """Note what is ours."""
    return WriteFile(MANIFEST, render_manifest(manifest), 0o644, why)


def plan_packages(facts: Facts, new: Sequence[str]) -> list[Step]:
    """Install what is missing, once it is noted that this was us."""
    manifest = facts.manifest
    unwanted = [name for package in new for name in UNWANTED.get(package, ())]
    unwanted = [name for name in unwanted if name not in facts.others.services]
    packages = tuple(dict.fromkeys([*manifest.packages, *new]))
    pending = tuple(dict.fromkeys([*manifest.pending, *unwanted]))
    noted = replace(manifest, packages=packages, pending=pending)
    steps: list[Step] = [*plan_directories(facts, [MANIFEST])]
    if noted != manifest:
        steps.append(plan_manifest(noted, f"packages that come from here: {' '.join(new)}"))
    steps += plan_mask(noted)
    argv = ("apt-get", "install", "--yes", NO_EXTRAS, "--no-remove", *APT_OPTIONS, *facts.missing)
    steps.append(Run(argv, "Debian's own packages; this takes a minute", APT_MAX_S))
    return steps


def list_owed(manifest: Manifest) -> list[str]:
    """The services that a package of ours brought, and that are to be kept from starting."""
    unwanted = [name for names in UNWANTED.values() for name in names]
    return [name for name in manifest.pending if name in unwanted]


def list_used(facts: Facts) -> list[str]:
    """The packages whose services the provider uses, who came or stayed after ours did."""
    owed, others = list_owed(facts.manifest), facts.others
    used = [name for name, is_used in others.services.items() if is_used and name not in owed]
    return [
        package
        for package, names in UNWANTED.items()
        if package in others.data or not set(names).isdisjoint(used)
    ]


def plan_mask(manifest: Manifest) -> Iterator[Run]:
    """Keep them from starting while their package is being installed."""
    if owed := list_owed(manifest):
        mask = ("systemctl", "mask", "--runtime", *owed)
        yield Run(mask, "or Debian's package would start it")


def plan_unwanted(facts: Facts) -> Iterator[Run]:
    """Keep from starting what came with a package of ours; nothing masks it any more."""
    owed = list_owed(facts.manifest)
    if owed:
        yield Run(("systemctl", "unmask", "--runtime", *owed), "yours to start, whenever you like")
    if there := [name for name in owed if name in facts.others.services]:
        yield Run(("systemctl", "disable", "--now", *there), "this machine did without it so far")


def plan_engine(facts: Facts) -> Iterator[Run]:
    """Make what the container engine needs, and keep from starting what came with its package."""
    yield from plan_unwanted(facts)
    user = facts.engine_user
    if not user.is_there:
        add = ("useradd", "--system", "--user-group", "--no-create-home", "--shell=/bin/false")
        yield Run((*add, "--home-dir=/nonexistent", ENGINE_USER), "nobody logs in as it")
    if not user.has_ids:
        ids = f"{user.first_free_id}-{user.first_free_id + ENGINE_IDS - 1}"
        argv = ("usermod", f"--add-subuids={ids}", f"--add-subgids={ids}", ENGINE_USER)
        yield Run(argv, "root in a workload is one of these")
    if ENGINE_IMAGE not in facts.files:
        new = str(ENGINE_IMAGE_NEW)  # which Remove knows
        size_bytes = decide_image_bytes(facts.data)
        why = f"{size_bytes >> 20} MiB for what workloads bring"
        yield Run(("install", "--mode=0600", "/dev/null", new), "also when a cut left a part of it")
        yield Run(("fallocate", f"--length={size_bytes}", new), why)
        options = ("-E", "nodiscard", "-L", "openinfra-engine")  # to discard would give it back
        yield Run(("mkfs.ext4", "-q", "-F", "-m0", *options, new), "its file system")
        yield Run(("mv", "--no-target-directory", "--", new, str(ENGINE_IMAGE)), "now it is whole")
        yield Run(("sync", "--file-system", str(ENGINE_IMAGE)), "also after a power cut")


def plan_units(facts: Facts, changed: set[Path]) -> Iterator[Run]:
    """Have systemd know the units that are on disk."""
    pending, units = facts.manifest.pending, facts.units
    # After a run that was cut a unit may be new on disk, and linked as the one before it.
    new = [
        name
        for name in ENABLED
        if pending or UNIT_DIR / name in changed or units[name].enabled != "enabled"
    ]
    if new:
        yield Run(("systemctl", "--no-reload", "reenable", *new), "at each boot")
    if new or pending or any(UNIT_DIR in path.parents for path in changed):
        yield Run(("systemctl", "daemon-reload"), "it reads the units")


def plan_commands(facts: Facts, changed: set[Path]) -> list[Run]:
    """Make systemd run what is on disk: only what changed, is owed or is down is restarted."""
    pending, units = facts.manifest.pending, facts.units

    def is_due(name: str, *paths: Path) -> bool:
        return name in pending or not changed.isdisjoint({UNIT_DIR / name, *paths})

    steps = [*plan_units(facts, changed)]
    if units[WATCH].active == "active" and is_due(WATCH, BINARY):
        steps.append(
            Run(("systemctl", "stop", WATCH), "an older one would answer for the firewall")
        )
    is_up = units[WG].active == "active"
    new_tunnel = is_due(WG, WG_CONF) or not is_up or not facts.has_link
    if not new_tunnel and (steps or is_due(GUARD, BINARY) or not facts.has_table):
        steps.append(Run(("systemctl", "start", GUARD), "the firewall"))
    if new_tunnel and facts.has_link and not is_up:
        steps.append(Run(("ip", "link", "delete", "dev", LINK), f"it is not that of {WG}"))
    if new_tunnel:
        steps.append(Run(("systemctl", "restart", WG), "the firewall, which it needs; the tunnel"))
    is_up = units[TIMER].active == units[WATCH].active == "active"
    # A timer fails when its service is missing, which may be just now.
    if not is_up or is_due(TIMER, UNIT_DIR / GUARD) or is_due(WATCH, BINARY):
        steps.append(Run(("systemctl", "restart", TIMER, WATCH), "the firewall, from now on"))
    if is_due(DISK) and units[DISK].active == "active":
        steps.append(Run(("systemctl", "restart", DISK), "the disk of the workloads"))
    is_up = units[CONTAINERD].active == "active"
    if is_up and is_due(CONTAINERD, ENGINE_FILES["openinfra-containerd.toml"]):
        steps.append(Run(("systemctl", "restart", CONTAINERD), "the engine's part that keeps them"))
    is_up = units[ENGINE].active == "active"
    if not is_up or is_due(ENGINE, ENGINE_FILES["openinfra-engine.json"], CA):
        verb = "restart" if is_up else "start"
        steps.append(Run(("systemctl", verb, ENGINE), "the container engine, with all it needs"))
    if is_due(AGENT, BINARY, ENV, WG_PUB, DROP_IN) or units[AGENT].active != "active":
        steps.append(Run(("systemctl", "restart", AGENT), "the agent"))
    return steps


def list_kept(facts: Facts) -> list[Path]:
    """Files of ours that somebody changed since; they are not removed."""
    found = facts.files.items()
    return [path for path, seen in found if not is_as_written(facts.manifest, path, seen)]


def is_locked(facts: Facts) -> bool:
    """Tell whether the workloads' disk image lies on a disk that is not there now."""
    return str(ENGINE_IMAGE) in facts.manifest.files and not facts.data.is_mount


def plan_removal(facts: Facts) -> list[Step]:
    """Stop and remove all that install.json lists."""
    units, kept, ours = facts.units, list_kept(facts), facts.manifest.files.keys()
    is_unused = "docker.io" not in list_used(facts)  # by the provider, since
    places = {name: UNIT_DIR / name for name in UNITS} | {WG: WG_CONF}
    mine = [name for name, path in places.items() if str(path) in ours]
    off = ("inactive", "failed")
    on = [name for name in mine if units[name].active not in off]
    # These are started again and again, the guard to lay the table anew.
    again = {name for name in mine if name == STRAYS or (name == GUARD and units[name].enabled)}
    on += sorted(again - {*on})
    enabled = [name for name in mine if units[name].enabled == "enabled"]
    steps: list[Step] = [*plan_unwanted(facts)]
    for name, why in (  # each by itself, as a later one is needed for it, or undoes it
        (TIMER, "it would lay the firewall again"),
        (AGENT, "it would start the workloads again"),
        (WORKLOADS, "the engine puts away what they leave"),
    ):
        if name in on:
            on.remove(name)
            steps.append(Run(("systemctl", "stop", name), why))
    if on:
        steps.append(Run(("systemctl", "stop", *on), "nothing of it runs"))
    if enabled:
        steps.append(Run(("systemctl", "disable", *enabled), "nor starts at a boot"))
    is_stray = units[WG].active != "active" or WG_CONF not in facts.files
    if str(WG_CONF) in ours and facts.has_link and is_stray:
        steps.append(Run(("ip", "link", "delete", "dev", LINK), "the tunnel"))
    if str(WG_CONF) in ours and facts.has_table:
        steps.append(Run(("nft", "delete", "table", "inet", TABLE), "the firewall of the tunnel"))
    if str(ENGINE_IMAGE) in ours:
        mounts = r"run-openinfra\x2dengine-*.mount"
        steps.append(Run(("systemctl", "stop", mounts), "networks of workloads"))
        steps += [Run(argv, "it was for workloads") for argv in facts.leftovers]
        if facts.engine_user.is_there:
            why = "with its subordinate ids"
            steps.append(Run(("userdel", ENGINE_USER), why, may_fail=True))
    steps += [Remove(link, "its unit is gone") for link in facts.dangling]
    gone = [name for name in ours if Path(name) not in kept]
    steps += [Remove(Path(name), "ours") for name in gone if is_unused or Path(name) != DOCKER_KEY]
    if str(DOCKER_KEY) in ours and is_unused:  # every dockerd makes these
        argv = ("find", "/run", "-maxdepth", "2", "-path", "/run/docker*", "-type", "d", "-empty")
        steps.append(Run((*argv, "-delete"), "if nothing is in them"))
    steps.append(Run(("systemctl", "daemon-reload"), "the units are gone"))
    if mine:  # a guard that was just at work counts as failed, and would stay listed
        patterns = [f"{name.rpartition('.')[0]}.*" for name in UNITS]
        steps.append(Run(("systemctl", "reset-failed", *patterns), "nor are they listed"))
    steps.append(Run(("rm", "-rf", "--", *map(str, RUN_DIRS)), "sockets of agent and engine"))
    return steps


def plan_forgetting(facts: Facts) -> list[Step]:
    """Remove install.json itself, unless files stay that it has to list."""
    kept = {str(path): facts.manifest.files[str(path)] for path in list_kept(facts)}
    if is_locked(facts):
        kept[str(ENGINE_IMAGE)] = ()
    steps: list[Step] = [Remove(MANIFEST, "nothing is left")]
    if kept:
        steps = [plan_manifest(replace(facts.manifest, files=kept, pending=()), "what is left")]
    for path in (DROP_IN.parent, KEPT, ETC, ENGINE_ROOT):
        if path not in facts.absent:
            argv = ("rmdir", "--ignore-fail-on-non-empty", str(path))
            steps.append(Run(argv, "if it is empty"))
    return steps


def list_left(before: Facts, after: Facts) -> Iterator[str]:
    """Name what is still there after an uninstall."""
    ours = before.manifest.files.keys()
    for path in after.files:
        if str(path) in ours:
            yield f"{path}: somebody changed it; to remove it: rm {path}"
    if is_locked(before):
        yield f"{ENGINE_IMAGE}: its disk is not mounted; to remove it: mount that, run this again"
    if str(ENGINE_IMAGE) in ours and after.engine_user.is_there:
        yield f"the user {ENGINE_USER}; to remove it: userdel {ENGINE_USER}"
    if str(WG_CONF) in ours and after.has_link:
        yield f"the interface {LINK}; to remove it: ip link delete dev {LINK}"
    for argv in after.leftovers if str(ENGINE_IMAGE) in ours else ():
        yield f"something of workloads; to remove it: {shlex.join(argv)}"
    if str(WG_CONF) in ours and after.has_table:
        yield f"the firewall; to remove it: nft delete table inet {TABLE}"


def render_end(answers: Answers, public_key: str) -> str:
    """What the operator has to be told."""
    return f"""
The WireGuard public key of this machine is

    {public_key}

Send it to the operator, who runs on the control plane:

    sudo wg set wg0 peer {public_key} allowed-ips {answers.wg_address}/32
    sudo wg-quick save wg0

Within seconds this machine is online: sudo journalctl -u openinfra-agent -f
"""


# ------------------------------------------------------------------------------------------------
# Inspect: looks at this machine and at the release, never changes anything.
# ------------------------------------------------------------------------------------------------


def read_command(*argv: str) -> str | None:
    """The output of a command that only looks; None when it fails or is not there."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def read_file(path: Path, limit_bytes: int) -> Found | None:
    """Look at a file; what is none, or is larger than ours can be, has the mode -1."""
    try:
        seen = path.lstat()
        if not stat.S_ISREG(seen.st_mode) or seen.st_size > limit_bytes:
            return Found(b"", -1, seen.st_uid)
        return Found(path.read_bytes(), stat.S_IMODE(seen.st_mode), seen.st_uid)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_missing(has_apt: bool) -> tuple[str, ...]:
    """Packages that are not there; without apt: whose command or module is not there."""
    has_apparmor = read_file(Path("/sys/module/apparmor/parameters/enabled"), 4096)
    needed = dict(PACKAGES)
    if not has_apparmor or has_apparmor.content.strip() != b"Y":
        del needed["apparmor"]
    for name in ANY_MAKE:
        if shutil.which(needed[name], path=f"/usr/local/sbin:/usr/local/bin:{PATH}"):
            del needed[name]
    if has_apt:
        form = "--showformat=${Package} ${db:Status-Status}\n"
        argv = ["dpkg-query", "--show", form, *needed]
        shown = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
        return tuple(name for name in needed if f"{name} installed" not in shown.splitlines())
    python = ("/usr/bin/python3", "-I", "-c")
    return tuple(
        name
        for name, probe in needed.items()
        if not shutil.which(probe) and read_command(*python, f"import {probe}") is None
    )


def read_new_packages(missing: Sequence[str]) -> list[str]:
    """All packages that would be new here, with those that the missing ones need; raises Error."""
    argv = ("apt-get", "install", "--simulate", NO_EXTRAS, *missing)
    return decide_new_packages(missing, read_command(*argv) or "")


def decide_new_packages(missing: Sequence[str], simulated: str) -> list[str]:
    """Read what `apt-get install --simulate` says; raises Error when something would go. Pure."""
    if gone := re.findall(r"^Remv (\S+)", simulated, re.MULTILINE):
        what = f"to install {' '.join(missing)}, apt-get would remove {' '.join(gone)}"
        todo = "nothing was installed; install a Docker that suits it (docker-ce goes with "
        raise Error(what, f"{todo}containerd.io), or remove it yourself; then run this", REFUSED)
    return re.findall(r"^Inst (\S+) \(", simulated, re.MULTILINE) or list(missing)


def read_uses() -> tuple[str, ...]:
    """Addresses and routes of others in the tunnel's range."""
    uses = []
    for link in json.loads(read_command("ip", "-json", "-4", "address") or "[]"):
        for each in link.get("addr_info", []):
            address = ipaddress.IPv4Address(each["local"])
            if link.get("ifname") != LINK and address in TUNNEL:
                uses.append(f"{address} on {link.get('ifname')}")
    routes = json.loads(read_command("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    for each in routes:
        to = each.get("dst", "default")
        is_local = each.get("type") in ("local", "broadcast")  # those of the addresses above
        if to == "default" or is_local or each.get("dev") == LINK:
            continue
        network = ipaddress.IPv4Network(to)
        if network.subnet_of(TUNNEL):
            uses.append(f"a route to {network} by {each.get('dev', each.get('type'))}")
    return tuple(uses)


def read_data_dir(path: str) -> DataDir:
    """Look at the agent's data directory."""
    fstab = Path("/etc/fstab")
    text = fstab.read_text(errors="replace") if fstab.exists() else ""
    is_expected = any(line.split()[1:2] == [path] for line in text.splitlines())
    is_expected = is_expected or (LUKS_JOURNAL.exists() and path == DATA_DIR)
    try:
        seen = os.stat(path)
    except OSError:
        return DataDir(path, -1, 0, False, False, is_expected, False)
    identity = read_file(Path(path, "identity.json"), SMALL_MAX_BYTES)
    is_registered = bool(identity and re.search(rb'"host_id": *"', identity.content))
    invite = re.search(rb'"invite_id": *"([a-z2-7]{16})"', identity.content) if identity else None
    mode = stat.S_IMODE(seen.st_mode) if stat.S_ISDIR(seen.st_mode) else 0
    crypt, mount = is_encrypted(Path(path)), os.path.ismount(path)
    disk, cut_bytes = os.statvfs(path), 0
    with contextlib.suppress(OSError):  # what a cut run had of it is taken back
        cut_bytes = os.lstat(ENGINE_IMAGE_NEW).st_blocks * 512
    return DataDir(
        path,
        mode,
        seen.st_uid,
        mount,
        crypt,
        is_expected,
        is_registered,
        invite[1].decode() if invite else "",
        size_bytes=disk.f_blocks * disk.f_frsize,
        free_bytes=disk.f_bavail * disk.f_frsize + cut_bytes,
    )


def decide_engine_user(
    is_there: bool, subuid: str, subgid: str, ids: Sequence[int] = ()
) -> EngineUser:
    """Find its subordinate ids in subuid(5) and subgid(5), and the first that are free. Pure.

    `ids`: those of users and groups, which no workload may be.
    """
    taken, own = [(each, each + 1) for each in ids], []
    for text in (subuid, subgid):
        found = re.findall(r"^([^:\n]+):([0-9]{1,10}):([0-9]{1,10})$", text, re.MULTILINE)
        taken += [(int(first), int(first) + int(count)) for _, first, count in found]
        own.append(any(name == ENGINE_USER and int(n) >= ENGINE_IDS for name, _, n in found))
    first = 100_000  # where useradd(8) begins
    while any(first < end and start < first + ENGINE_IDS for start, end in taken):
        first += ENGINE_IDS
    return EngineUser(is_there, is_there and all(own), first)


def read_engine_user() -> EngineUser:
    """Look for the user whose subordinate ids the workloads run as."""
    try:
        is_there = pwd.getpwnam(ENGINE_USER) is not None
    except KeyError:
        is_there = False
    found = [read_file(Path(name), ARTIFACT_MAX_BYTES) for name in ("/etc/subuid", "/etc/subgid")]
    subuid, subgid = (each.content.decode(errors="replace") if each else "" for each in found)
    ids = [user.pw_uid for user in pwd.getpwall()] + [group.gr_gid for group in grp.getgrall()]
    return decide_engine_user(is_there, subuid, subgid, ids)


def read_others() -> Others:
    """Look at what is here of the UNWANTED services. One that is masked only is not there."""
    names = [name for each in UNWANTED.values() for name in each]
    paths = {name: [Path(top, "systemd/system", name) for top in UNIT_DIRS] for name in names}
    there = [name for name in names if any(path.is_file() for path in paths[name])]
    used = {
        name: unit.active in ("active", "activating") or unit.enabled.startswith("enabled")
        for name, unit in read_units_state(there).items()
    }
    kept = [name for name, path in OTHERS_DATA.items() if path.is_dir() and any(path.iterdir())]
    return Others(used, frozenset(kept), DOCKER_KEY.exists())


def read_leftovers() -> tuple[tuple[str, ...], ...]:
    """The commands that remove what workloads had: their bridges, and the guard's two rules."""
    links = sorted(name for name in os.listdir("/sys/class/net") if name[:3] in ("oi-", "ox-"))
    rules = (read_command("iptables", "-w", "5", "-S", "DOCKER-USER") or "").splitlines()
    return (
        *(("ip", "link", "delete", "dev", name) for name in links),
        *(("iptables", "-w", "5", "-D", *rule.split()[1:]) for rule in rules if " oi-+ " in rule),
    )


def read_units_state(names: Sequence[str]) -> dict[str, Unit]:
    """What systemd says of units; inactive and "" where it does not run."""
    if not names:
        return {}
    argv = ("systemctl", "show", "--property=ActiveState,UnitFileState", *names)
    blocks = [
        dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for block in (read_command(*argv) or "").strip().split("\n\n")
    ]
    blocks += [{} for _ in names]
    return {
        name: Unit(block.get("ActiveState", "inactive"), block.get("UnitFileState", ""))
        for name, block in zip(names, blocks, strict=False)
    }


def read_free() -> dict[str, int]:
    """Free bytes of each file system that something of ours goes to."""
    free: dict[int, tuple[str, int]] = {}
    for path in ("/usr", "/etc", "/var"):
        seen = os.statvfs(path)
        free.setdefault(os.stat(path).st_dev, (path, seen.f_bavail * seen.f_frsize))
    return dict(free.values())


def read_facts(with_leftovers: bool = False) -> Facts:
    """Look at all that a plan needs, but for the release."""
    found = {path: read_file(path, ARTIFACT_MAX_BYTES) for path in OURS}
    files = {path: each for path, each in found.items() if each}
    manifest = read_file(MANIFEST, SMALL_MAX_BYTES)
    env = parse_values(files[ENV].content) if ENV in files else {}
    has_apt = shutil.which("apt-get") is not None
    units = read_units_state((WG, *UNITS))
    names = [name for name, unit in units.items() if not unit.enabled]
    has_module = os.path.isdir("/sys/module/wireguard")
    return Facts(
        arch=os.uname().machine,
        now_s=time.time(),
        has_systemd=os.path.isdir("/run/systemd/system"),
        has_wireguard=has_module or read_command("modprobe", "-n", "wireguard") is not None,
        has_apt=has_apt,
        missing=read_missing(has_apt),
        is_dpkg_interrupted=has_apt and any(Path("/var/lib/dpkg/updates").iterdir()),
        free_bytes=read_free(),
        data=read_data_dir(env.get(("", "data_dir")) or DATA_DIR),
        uses=read_uses(),
        files=files,
        absent=tuple(p for p in {each.parent for each in OURS} | {ENGINE_ROOT} if not p.is_dir()),
        dangling=tuple(
            link
            for kind in ("wants", "requires")
            for link in UNIT_DIR.glob(f"*.{kind}/*")
            if link.name in names
        ),
        units=units,
        has_link=Path("/sys/class/net", LINK).exists(),
        has_table=read_command("nft", "list", "table", "inet", TABLE) is not None,
        engine_user=read_engine_user(),
        others=read_others(),
        leftovers=read_leftovers() if with_leftovers else (),
        manifest=parse_manifest(manifest.content) if manifest else Manifest(),
    )


def make_opener(ca: bytes) -> urllib.request.OpenerDirector:
    """What opens https and file URLs, and follows no redirect."""
    opener = urllib.request.OpenerDirector()
    context = ssl.create_default_context()
    if ca:
        try:
            context = ssl.create_default_context(cadata=ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            todo = "give the PEM file of the control plane's CA"
            raise Error("the CA file holds no good certificate", todo, USAGE) from None
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(context=context),
        urllib.request.FileHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def decide_fetch_error(url: str, error: Exception, now_s: float) -> Error:
    """What a failed download means to a person. Pure."""
    host = urllib.parse.urlsplit(url).netloc
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        what = f"{url} is answered with {error.code} {parse_line(str(error.reason), 80)}"
        return Error(what, "is the hostname that of the control plane? else tell the operator")
    if isinstance(reason, ssl.SSLCertVerificationError):
        what = f"the certificate of {host} does not verify: {reason.verify_message}"
        day = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        todo = f"look at the hostname and the clock ({day} here); a LAN with an own CA: --ca-file"
        return Error(what, todo)
    if isinstance(reason, socket.gaierror):
        what = f"there is no {host} in the DNS ({reason.strerror})"
        return UnreachableError(what, "look at --hostname and at this machine's network")
    said = getattr(reason, "strerror", None) or parse_line(str(reason)) or type(reason).__name__
    if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError):
        todo = "look at --hostname, or ask the operator whether the control plane is up"
        return UnreachableError(f"{url} cannot be reached: {said}", todo)
    return Error(f"{url} is answered with what cannot be read: {said}", "tell the operator")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer, wherever it waits."""

    def end(_number: int, _frame: object) -> None:
        raise TimeoutError("it comes too slowly")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fetch(opener: urllib.request.OpenerDirector, url: str, limit_bytes: int) -> tuple[bytes, float]:
    """Download into memory, at most so many bytes; also the server's clock, or 0."""
    content = bytearray()
    try:
        with deadline(DOWNLOAD_MAX_S), opener.open(url, timeout=SILENCE_MAX_S) as response:
            date = email.utils.parsedate_tz(response.headers.get("Date") or "")
            clock_s = email.utils.mktime_tz(date) if date else 0.0
            size_bytes = int(response.headers.get("Content-Length") or -1)
            while chunk := response.read1(1 << 16):
                content += chunk
                if len(content) > limit_bytes:
                    raise Error(f"{url} is larger than {limit_bytes} bytes", "tell the operator")
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        raise decide_fetch_error(url, error, time.time()) from None
    if size_bytes not in (-1, len(content)):
        what = f"{url} broke off after {len(content)} of {size_bytes} bytes"
        raise UnreachableError(what, "run this again")
    return bytes(content), clock_s


def read_installed(facts: Facts) -> Release | None:
    """The release that is installed and as it was written; None when it is not."""
    artifact, key = read_content(facts, BINARY), read_content(facts, RELEASE_PUB)
    known = facts.manifest.files.get(str(BINARY), ())
    if not key or hashlib.sha256(artifact).hexdigest() not in known:
        return None
    return Release(facts.manifest.version, b"", b"", key, artifact)


def read_release(facts: Facts, answers: Answers, key_sha256: str) -> Release:
    """Download what is not here of one release; raises Error unless size and sha256 are right."""
    opener, (base, name) = make_opener(answers.ca), answers.url.rsplit("/", 1)
    raw, clock_s = fetch(opener, f"{base}/release.json", SMALL_MAX_BYTES)
    if clock_s:
        check_clock(time.time(), clock_s, "that of the control plane")
    version, created_s, size_bytes, sha256 = parse_release(raw, name)
    if time.time() < created_s:
        check_clock(time.time(), created_s, "and the release was made at")
    artifact, installed = read_content(facts, BINARY), read_installed(facts)
    is_here = hashlib.sha256(artifact).hexdigest() == sha256
    if is_here and installed and installed.version == version and not key_sha256:
        return installed
    signature, _ = fetch(opener, f"{base}/release.json.sig", SMALL_MAX_BYTES)
    offered, _ = fetch(opener, f"{base}/release.pub", SMALL_MAX_BYTES)
    key = decide_key(read_content(facts, RELEASE_PUB), offered, key_sha256)
    if not is_here:
        artifact, _ = fetch(opener, answers.url, size_bytes)
    found = hashlib.sha256(artifact).hexdigest()
    if (len(artifact), found) != (size_bytes, sha256):
        what = f"{answers.url} is not the file of release.json ({len(artifact)} bytes, {found})"
        raise Error(what, "run this again; if it stays so, tell the operator")
    return Release(version, raw, signature, key, artifact)


def check_signature(release: Release) -> None:
    """Raises Error unless the key signed release.json; openssl reads memory, not the disk."""
    if not release.raw:
        return  # it was checked when it was installed
    with contextlib.ExitStack() as files:
        paths = []
        for content in (release.key, release.signature, release.raw):
            file = files.enter_context(open(os.memfd_create("release"), "wb"))
            file.write(content)
            file.flush()
            paths.append(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        argv = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", paths[0], "-rawin"]
        try:
            run([*argv, "-in", paths[2], "-sigfile", paths[1]], echo=False)
        except Error as error:
            what = f"the signature of release.json does not verify ({parse_line(error.what)})"
            todo = "tell the operator; nothing was installed"
            raise Error(what, todo, REFUSED) from None


def check_resolves(endpoint: str) -> None:
    """Raises Error for a WireGuard endpoint without an address: wg-quick would wait for it."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        what = f"there is no {host} in the DNS ({parse_line(str(error))})"
        raise Error(what, "look at --wg-endpoint and at this machine's network") from None


def read_keys(facts: Facts, new_key: bool) -> tuple[str, str]:
    """This host's WireGuard keys: those that are there, or new ones, which are nowhere yet."""
    there = "" if new_key else next(filter(None, read_wg_keys(facts)), "")
    private_key = there or run(["wg", "genkey"]).strip()
    return private_key, run(["wg", "pubkey"], stdin=private_key.encode(), echo=False).strip()


# ------------------------------------------------------------------------------------------------
# Apply: the only place that changes the machine.
# ------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print one line for the person."""
    print(f"install_agent: {text}", file=sys.stderr, flush=True)


def apply(step: Step) -> None:
    """Do one step."""
    if isinstance(step, Run):
        try:
            run(step.argv, timeout_s=step.timeout_s)
        except Error as error:
            if step.may_fail:
                say(error.what)
                return
            if step.argv[1] not in ("start", "restart"):
                raise
            guard = f" -u {GUARD}" if step.argv[-1] == WG else ""
            todo = f"look: journalctl -n 20 -u {step.argv[-1]}{guard}; then run this again"
            raise Error(error.what, todo) from None
        return
    say(str(step))
    try:
        if isinstance(step, Remove):
            step.path.unlink(missing_ok=True)
            step.path.with_name(f".{step.path.name}.new").unlink(missing_ok=True)
            return
        if step.old is not None and step.path.read_bytes() != step.old:
            raise Error(f"{step.path} changed meanwhile", "run this again; it goes on from here")
        write_file(step.path, step.content, step.mode)
    except OSError as error:
        todo = "mend that and run this again; it goes on from here"
        raise Error(f"cannot change {step.path}: {error.strerror}", todo) from None


# ------------------------------------------------------------------------------------------------
# Ask: what only the person knows.
# ------------------------------------------------------------------------------------------------


def ask(question: str, hidden: bool = False) -> str | None:
    """One line from the terminal, not from stdin; None without a terminal."""
    try:
        with open("/dev/tty", "w") as screen, open("/dev/tty", errors="surrogateescape") as keys:
            if hidden:
                return getpass.getpass(question, screen).strip()
            screen.write(question)
            screen.flush()
            line = keys.readline()
    except OSError:
        return None
    except EOFError:
        raise KeyboardInterrupt from None
    if not line:
        raise KeyboardInterrupt
    return line.strip()


def ask_question(question: Question, suggestion: str) -> str | None:
    """Ask until the answer is right; None without a terminal."""
    text = f"{question.text} [{suggestion}]: " if suggestion else f"{question.text}: "
    while True:
        typed = ask(text, hidden=question.name == "token")
        if typed is None:
            return None
        try:
            return question.check(typed or suggestion)
        except Error as error:
            say(str(error))


def read_token_file(path: str) -> str:
    """The invite in a file, or on stdin for "-"; the file stays."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            return file.read(SMALL_MAX_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        todo = "name the file with the invite, or - for stdin"
        raise Error(f"cannot read {path}: {error.strerror}", todo, USAGE) from None


def check_flags(args: argparse.Namespace) -> dict[str, str]:
    """The answers that are flags; raises Error 2 with all that is wrong with them."""
    given, wrong = {}, []
    for question in QUESTIONS:
        text = getattr(args, question.name)
        if text is None:
            continue
        try:
            text = read_token_file(text) if question.name == "token" else text.strip()
            given[question.name] = question.check(text)
        except Error as error:
            wrong.append(f"{question.flag}: {error}")
    if wrong:
        raise Error("; ".join(wrong), "nothing was changed", USAGE)
    return given


def settle_answers(args: argparse.Namespace, facts: Facts, given: Mapping[str, str]) -> Answers:
    """Flag, else what is on disk, else ask; raises Error 2 naming the flags of what is missing."""
    known, values, missing = read_known(facts), dict(given), []
    has_no_need = facts.data.is_registered or args.dry_run or args.check
    needs_token = args.new_invite or not has_no_need
    for question in QUESTIONS:
        name = question.name
        if name in values or (name == "hostname" and args.url):
            continue
        try:
            is_old = name == "token" and args.new_invite
            values[name] = "" if is_old else known[name] and question.check(known[name])
        except Error as error:
            if name == "token" and TOKEN_USED_RE.fullmatch(known[name]):
                values[name] = known[name]
            else:
                say(f"what is on disk is wrong: {error}")
        if values.get(name) or (name == "token" and not needs_token):
            values.setdefault(name, "")
            continue
        default = question.default.format(hostname=values.get("hostname", "").partition(":")[0])
        answer = ask_question(question, "" if default.startswith(":") else default)
        if answer is None and name == "control_plane":
            answer = default
        if answer is None:
            missing.append(question.flag)
        values[name] = answer or ""
    if missing:
        what = f"there is no terminal to ask at, and these are missing: {' '.join(missing)}"
        raise Error(what, "give them; nothing was changed", USAGE)
    url = args.url or facts.manifest.url
    if "hostname" in given or not url:
        url = args.url or f"https://{values['hostname']}/dist/openinfra-agent-linux-{facts.arch}"
    ca = read_file(args.ca_file, SMALL_MAX_BYTES) if args.ca_file else facts.files.get(CA)
    if args.ca_file and (ca is None or ca.mode == -1):
        raise Error(f"there is no file {args.ca_file}", "give the CA's PEM file", USAGE)
    values.pop("hostname", None)
    allow = args.allow_unencrypted or DROP_IN in facts.files
    pem = parse_ca(ca.content) if ca else b""
    new = args.new_invite
    return Answers(url=url, ca=pem, allow_unencrypted=allow, is_new_host=new, **values)


# ------------------------------------------------------------------------------------------------
# Command line.
# ------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Every answer has a flag but the invite, which others could read on a command line."""
    if any(re.search(r"(^|=)oi1_", each) for each in argv):
        what = "an invite on the command line stands in the list of processes and in the history"
        raise Error(what, "type it at the prompt, or use --token-file", USAGE)
    parser = argparse.ArgumentParser(
        prog="install_agent.py",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    for question in QUESTIONS:
        is_file = question.name == "token"
        text = "file with the invite, - for stdin" if is_file else question.text
        metavar = "PATH" if is_file else "VALUE"
        add(question.flag, dest=question.name, metavar=metavar, help=text)
    add("--ca-file", type=Path, metavar="PATH", help="PEM file of the control plane's own CA")
    add("--release-key-sha256", default="", metavar="HEX", help="sha256 of release.pub")
    add("--allow-downgrade", action="store_true", help="take an older release than is installed")
    add("--allow-unencrypted", action="store_true", help="for tests: no workload with secrets")
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument("--dry-run", action="store_true", help="print what would be done")
    looks.add_argument("--check", action="store_true", help="the same; exit 1 when it is anything")
    add("--new-invite", action="store_true", help="join with a fresh invite, as if it were new")
    add("--new-key", action="store_true", help="make a new WireGuard key")
    add("--uninstall", action="store_true", help="remove what this installed")
    add("--purge-packages", action="store_true", help="and the packages that it installed")
    args = parser.parse_args(argv)
    if args.purge_packages and not args.uninstall:
        parser.error("--purge-packages goes with --uninstall")
    if args.uninstall and (args.new_invite or args.new_key):
        parser.error("--uninstall goes with neither --new-invite nor --new-key")
    if args.release_key_sha256 and not SHA256_RE.fullmatch(args.release_key_sha256):
        parser.error("--release-key-sha256 takes 64 digits 0-9a-f")
    args.url = os.environ.get("OPENINFRA_AGENT_URL", "")
    if args.url and not URL_RE.fullmatch(args.url):
        parser.error("OPENINFRA_AGENT_URL is the https or file URL of the agent itself")
    return args


def take_lock() -> None:
    """Let only one of these change anything; the lock is held until this process ends."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error("install_agent.py runs already", "wait for its end") from None


def check_machine(facts: Facts, args: argparse.Namespace) -> None:
    """Raises Error with all that stands in the way, a line each."""
    foreign = list(list_foreign(facts, args.new_key))
    allow = args.allow_unencrypted or DROP_IN in facts.files
    problems = [*list_problems(facts, allow), *foreign]
    if problems:
        said = "".join(f"\n  - {problem}" for problem in problems)
        todo = "\nnothing was changed; mend this, then run the same command again"
        raise Error(f"this machine is not ready:{said}", todo, REFUSED if foreign else 1)


def install_packages(facts: Facts) -> Facts:
    """Install what is missing; look again."""
    say(f"not installed: {' '.join(facts.missing)}; apt-get installs them now")
    if facts.is_dpkg_interrupted:
        for step in plan_mask(facts.manifest):
            apply(step)
        apply(Run(("dpkg", "--configure", "-a"), "an earlier run was interrupted", APT_MAX_S))
    apply(Run(("apt-get", "update", *APT_OPTIONS), "lists of packages", APT_MAX_S))
    for each in plan_packages(facts, read_new_packages(facts.missing)):
        apply(each)
    return read_facts()


def install(args: argparse.Namespace) -> int:
    """Look, ask, download, plan, apply."""
    given, only_look = check_flags(args), args.dry_run or args.check
    facts = read_facts()
    check_machine(facts, args)
    answers = settle_answers(args, facts, given)
    try:
        release = read_release(facts, answers, args.release_key_sha256)
    except UnreachableError as error:
        installed = read_installed(facts)
        if not installed:
            raise
        say(f"{error}; going on with version {installed.version}, which is installed")
        release = installed
    if answers.wg_endpoint != read_known(facts)["wg_endpoint"]:
        check_resolves(answers.wg_endpoint)
    if "openssl" not in facts.missing:
        check_signature(release)
    check_version(facts.manifest, release, args.allow_downgrade)
    steps: list[Step] = []
    if facts.missing and only_look:
        steps = plan_packages(facts, read_new_packages(facts.missing))
    elif facts.missing:
        facts = install_packages(facts)
        check_machine(facts, args)
        check_signature(release)
    is_blind = "wireguard-tools" in facts.missing
    keys = ("", "made by wg genkey") if is_blind else read_keys(facts, args.new_key)
    if answers.wg_public_key == keys[1]:
        todo = "the operator's `wg show wg0 public-key` prints theirs"
        raise Error("that public key is this machine's own, not the control plane's", todo, USAGE)
    steps += plan(facts, answers, release, keys)
    if only_look:
        print("\n".join(str(step) for step in steps) or "nothing to do")
        return 1 if args.check and steps else 0
    for step in steps:
        apply(step)
    print(render_end(answers, keys[1]), flush=True)
    say(f"done: version {release.version}" if steps else "nothing to do")
    return 0


def leave_packages(facts: Facts, is_purge: bool) -> None:
    """Remove packages, or say how; those that others need or whose service is used stay."""
    used = list_used(facts)
    packages = [name for name in facts.manifest.packages if name not in used]
    if kept := [name for name in facts.manifest.packages if name in used]:
        say(f"{' '.join(kept)} and what it needs stay: you use it, or it has kept something")
    if not packages:
        return  # of no name at all dpkg-query shows every package of the machine
    if not is_purge:
        say(f"packages stay; to remove what nothing else needs: dpkg --purge {' '.join(packages)}")
        return
    argv = ("dpkg-query", "--show", "--showformat=${Package}\n", *packages)
    shown = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()
    try:
        run(["dpkg", "--purge", *shown], timeout_s=APT_MAX_S)
    except Error as error:
        say(f"some packages stay: {error.what}")


def uninstall(args: argparse.Namespace) -> int:
    """Remove what install.json lists; the last line is what is left."""
    facts = read_facts(with_leftovers=True)
    if facts.manifest == Manifest():
        say(f"there is no {MANIFEST}: nothing here was installed by this")
        print("0 left")
        LOCK.unlink(missing_ok=True)
        return 0
    steps, last = plan_removal(facts), plan_forgetting(facts)
    if args.dry_run or args.check:
        print("\n".join(map(str, [*steps, *last])))
        return 1 if args.check else 0
    for step in steps:
        apply(step)
    leave_packages(facts, args.purge_packages)
    for step in last:
        apply(step)
    say(f"{facts.data.path} stays, with the identity of this host and its encrypted disk")
    left = list(list_left(facts, read_facts(with_leftovers=True)))
    print("\n".join([f"{len(left)} left", *left]))
    LOCK.unlink(missing_ok=True)
    return 1 if left else 0


def main(argv: list[str]) -> int:
    """Exit codes are in the docstring of this file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file with an invite or a key in it
    os.environ.update(PATH=PATH, DEBIAN_FRONTEND="noninteractive")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        args = parse_arguments(argv)
        if os.geteuid() != 0:
            command = shlex.join([sys.argv[0], *argv])
            raise Error("this needs root", f"run: sudo python3 -I {command}")
        if not (args.dry_run or args.check):
            take_lock()
        return uninstall(args) if args.uninstall else install(args)
    except Error as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
