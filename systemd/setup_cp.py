#!/usr/bin/python3 -I
"""Make this fresh Debian the control plane of an OpenInfra fleet, from a checkout, in one command.

  setup_cp.py --hostname cp.example.org                   certificates by ACME (Let's Encrypt)
  setup_cp.py --hostname cp.example.org --tls internal    on a LAN: with its own authority
  setup_cp.py --hostname cp.example.org --dry-run         prints what it would do, changes nothing

What it does to this machine
  Installs Debian's packages of the table PACKAGES, after naming them. Makes the user openinfra, a
  PostgreSQL database with its roles, the WireGuard hub wg0 (10.77.0.1/16), a firewall, and the
  services openinfra-cp, openinfra-wg (its helper for wg0), openinfra-firewall (laid each 10 s),
  caddy, docker-registry. A second run changes nothing, or mends what is missing; one from a newer
  checkout upgrades. No peer of wg0 is ever touched.
Files (mode)
  /opt/openinfra/                  0755  the code, and a virtualenv with hash-pinned packages
  /usr/local/bin/openinfra-cp      0755  runs cp_server.py
  /etc/openinfra/cp.env            0644  settings; yours to edit
  /etc/openinfra/cp/               0700  dsn, owner-dsn, jwt-keys.json, secrets.key, each 0600
  /etc/openinfra/release/key.pem   0600  signs releases, unless --dist brings one
  /etc/openinfra/                  0755  Caddyfile, cp.nft, registry.yml, ca.crt (--tls internal)
  /etc/wireguard/wg0.conf          0600  made once; afterwards only its [Interface] is looked at
  /etc/systemd/system/                   openinfra-*, srv-registry.mount, caddy.service.d,
                                         docker-registry.service.d
  /srv/openinfra/dist/             0755  what https://HOSTNAME/dist/ serves
  /var/lib/openinfra-registry.img  0600  the registry's disk, of fixed size, at /srv/registry
  /run/openinfra-setup-cp.lock     0600  held while this changes anything
Runs: apt-get chmod cp dpkg fallocate install ln mkfs.ext4 mv openinfra-cp pip psql python3 rm
  setpriv sync systemctl useradd wg
  and to look: dpkg-query ip modprobe nft ss timedatectl
  Secrets go by stdin, the environment or a 0600 file, never by a command line.

Needs: Debian 12 or newer with systemd, root, 1 GB of memory, 3 GB of free disk.
Exit codes: 0; 1 error, or this machine is not ready (every reason is named, nothing was changed);
  2 usage; 3 refused to protect what is there; 75 try later; 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import glob
import hashlib
import ipaddress
import json
import os
import pwd
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
ETC, CODE, DIST = Path("/etc/openinfra"), Path("/opt/openinfra"), Path("/srv/openinfra/dist")
SECRETS, RELEASE_KEY = ETC / "cp", ETC / "release" / "key.pem"
DSN, OWNER_DSN, JWT_KEYS = SECRETS / "dsn", SECRETS / "owner-dsn", SECRETS / "jwt-keys.json"
SECRETS_KEY = SECRETS / "secrets.key"
CP_ENV, CADDYFILE, NFT, CA_FILE = (ETC / n for n in ("cp.env", "Caddyfile", "cp.nft", "ca.crt"))
CADDY_ROOT = Path("/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt")
WG_CONF, WG_UNIT = Path("/etc/wireguard/wg0.conf"), "wg-quick@wg0.service"
UNITS, WRAPPER, VENV = (
    Path("/etc/systemd/system"),
    Path("/usr/local/bin/openinfra-cp"),
    CODE / "venv",
)
LOCK = Path("/run/openinfra-setup-cp.lock")
USER, OWNER = "openinfra", "openinfra_owner"
HUB, TUNNEL, WG_PORT = "10.77.0.1/16", ipaddress.IPv4Network("10.77.0.0/16"), 51820

DEBIAN_MIN = 12
MEMORY_MIN_BYTES = 900 << 20
FRESH_MIN_BYTES, LATER_MIN_BYTES = 3 << 30, 200 << 20  # of free disk
# The registry gets half of what is free beyond the first.
REGISTRY_KEPT_BYTES, REGISTRY_MIN_BYTES = 2 << 30, 512 << 20
CLOCK_MIN, CLOCK_MAX = 1_767_225_600, 2_524_608_000  # 2026 and 2050: outside, a clock is wrong
DPKG_WAIT_S = 600  # a new machine upgrades itself first
READY_S = 60
REFUSED, LATER = 3, 75

# Debian packages, and what each is for.
PACKAGES = {
    "caddy": "https",
    "curl": "to ask the control plane, as the document does",
    "docker-registry": "container images",
    "gnupg": "backups",
    "jq": "to read its answers",
    "nftables": "the firewall",
    "openssl": "signs releases",
    "postgresql": "the database",
    "python3-venv": "the virtualenv",
    "wireguard-tools": "the tunnel's hub",
}
DIRECTORIES = {
    ETC: 0o755,
    SECRETS: 0o700,
    RELEASE_KEY.parent: 0o700,
    CODE: 0o755,
    CODE / "proto": 0o755,
    CODE / "systemd": 0o755,
    DIST.parent: 0o755,
    DIST: 0o755,
    UNITS / "caddy.service.d": 0o755,
    UNITS / "docker-registry.service.d": 0o755,
}
HELPER = "systemd/openinfra_wg.py"
# What `cp_server.py dist` puts into a release.
RELEASED = (
    "agent.py",
    "install_agent.py",
    "proto/__init__.py",
    "proto/openinfra_pb2.py",
    "proto/openinfra_pb2_grpc.py",
    "setup_luks2.py",
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
FIREWALL = "openinfra-firewall.service"
OWN_UNITS = (
    "openinfra-cp.service",
    FIREWALL,
    "openinfra-firewall.timer",
    "openinfra-wg.service",
    "openinfra-wg.socket",
    "srv-registry.mount",
)
CADDY_UNIT = UNITS / "caddy.service.d/openinfra.conf"
REGISTRY, REGISTRY_UNIT = (
    ETC / "registry.yml",
    UNITS / "docker-registry.service.d/openinfra.conf",
)
OLD_IMAGES = Path("/var/lib/docker-registry/docker")
REGISTRY_IMAGE, REGISTRY_ROOT = Path("/var/lib/openinfra-registry.img"), Path("/srv/registry")
REGISTRY_IMAGE_NEW = REGISTRY_IMAGE.with_name(f".{REGISTRY_IMAGE.name}.new")  # until it is whole
REGISTRY_DISK, REGISTRY_OWNER = "srv-registry.mount", (0o700, "docker-registry", "docker-registry")
# In the checkout, and where it goes. What services start with comes before the code.
LAID = {
    "systemd/Caddyfile": CADDYFILE,
    "systemd/cp.nft": NFT,
    "systemd/registry.yml": REGISTRY,
    "systemd/caddy-openinfra.conf": CADDY_UNIT,
    "systemd/docker-registry-openinfra.conf": REGISTRY_UNIT,
    **{f"systemd/{name}": UNITS / name for name in OWN_UNITS},
    **{name: CODE / name for name in RELEASED},
    **{name: CODE / name for name in ("cp_server.py", "systemd/cp-requirements.txt", HELPER)},
}
# A configuration that somebody may have made before us, and what makes its service read ours.
PACKAGED = {
    Path("/etc/caddy/Caddyfile"): CADDY_UNIT,
    Path("/etc/docker/registry/config.yml"): REGISTRY_UNIT,
}
# Services in the order of their start, and the files whose change restarts each.
SERVICES = {
    "openinfra-firewall.timer": (UNITS / "openinfra-firewall.timer",),
    "docker-registry.service": (REGISTRY, REGISTRY_UNIT),
    "openinfra-wg.socket": (
        UNITS / "openinfra-wg.socket",
        UNITS / "openinfra-wg.service",
        CODE / HELPER,
    ),
    "openinfra-cp.service": (
        UNITS / "openinfra-cp.service",
        CODE / "cp_server.py",
        CODE / "proto/openinfra_pb2.py",
        CODE / "proto/openinfra_pb2_grpc.py",
        VENV,
        CP_ENV,
        DSN,
        JWT_KEYS,
        SECRETS_KEY,
    ),
    "caddy.service": (CADDYFILE, CADDY_UNIT),
}
# Who may have a port already: units by their beginning; the kernel has WireGuard's.
PORTS = {
    ("tcp", 80): "caddy.service",
    ("tcp", 443): "caddy.service",
    ("tcp", 5000): "docker-registry.service",
    ("tcp", 5432): "postgresql@",
    ("tcp", 8080): "openinfra-cp.service",
    ("tcp", 9092): "openinfra-cp.service",
    ("udp", WG_PORT): "kernel",
}
WRAPPER_TEXT = b"""#!/bin/sh
# Laid by setup_cp.py: the control plane's commands, such as: sudo openinfra-cp hosts
exec /opt/openinfra/venv/bin/python -B /opt/openinfra/cp_server.py "$@"
"""
# Without user=: the daemon logs in as its own user, and root, for the commands, as root.
DSN_TEXT = f"host=/run/postgresql dbname={USER}\n".encode()
PSQL = (
    *("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"),
    *("psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only"),
)
# The first line keeps the password out of the server's log, also when the statement fails.
SQL_ROLES = """
SET log_statement = 'none'; SET log_min_error_statement = 'panic';
SELECT 'CREATE ROLE openinfra_owner' WHERE to_regrole('openinfra_owner') IS NULL \\gexec
ALTER ROLE openinfra_owner LOGIN PASSWORD '@PASSWORD@';
SELECT 'CREATE ROLE openinfra LOGIN' WHERE to_regrole('openinfra') IS NULL \\gexec
SELECT 'CREATE ROLE root LOGIN' WHERE to_regrole('root') IS NULL \\gexec
GRANT openinfra TO root;
SELECT $$CREATE DATABASE openinfra OWNER openinfra_owner TEMPLATE template0
  ENCODING 'UTF8' LOCALE 'C.UTF-8'$$
  WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'openinfra') \\gexec
REVOKE ALL ON DATABASE openinfra FROM PUBLIC;
GRANT CONNECT ON DATABASE openinfra TO openinfra;
"""
# 1 when all of that is there, then the schema's number.
SQL_LOOK = """
SELECT count(*) FROM pg_database
  CROSS JOIN pg_auth_members
  WHERE datname = 'openinfra' AND pg_get_userbyid(datdba) = 'openinfra_owner'
    AND roleid = to_regrole('openinfra') AND member = to_regrole('root')
    AND EXISTS (SELECT FROM aclexplode(datacl) WHERE grantee = to_regrole('openinfra'))
    AND NOT EXISTS (SELECT FROM aclexplode(datacl) WHERE grantee = 0);
\\connect openinfra
SELECT max(number) FROM schema_migrations;
"""


# ---------------------------------------------------------------------------------------------
# Copied helpers: the same text in every script; a test compares them. Not pure.
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Types: what was found, and the steps of a plan.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file as it is, or as it shall be."""

    content: bytes = field(repr=False)
    mode: int
    changed_at: float = 0.0
    by_root: bool = True


@dataclass(frozen=True)
class Listener:
    """A port of this machine that somebody has; `unit` is "kernel" without a process."""

    protocol: str
    port: int
    unit: str
    process: str


@dataclass(frozen=True)
class Unit:
    """A unit as systemd knows it."""

    enabled: bool = False
    active: bool = False
    outdated: bool = False  # its file changed since systemd read it
    started_at: float = 0.0


@dataclass(frozen=True)
class Hub:
    """WireGuard's wg0: the keys of [Interface] in its file, and whether it is there."""

    interface: Mapping[str, Sequence[str]] | None = field(repr=False)
    mode: int
    link: bool
    same: bool  # the link runs with the file's key and port


@dataclass(frozen=True)
class Database:
    """PostgreSQL as it was found."""

    has_roles: bool
    owner_logs_in: bool
    schema: int  # 0 without one


@dataclass(frozen=True)
class Facts:
    """All that a plan looks at."""

    debian: int
    has_systemd: bool
    has_wireguard: bool
    memory_bytes: int
    free_bytes: int
    now: float
    resolves: bool
    networks: tuple[str, ...]  # in use here, inside the tunnel's
    listeners: tuple[Listener, ...]
    ssh_socket: str  # what it listens on, a line each
    edited: tuple[Path, ...]  # of PACKAGED, by somebody else
    missing: tuple[str, ...]  # packages
    user_no: int | None
    directories: Mapping[Path, tuple[int, int, int]]  # mode, user, group
    files: Mapping[Path, File]
    venv: str  # the directory that VENV leads to
    hub: Hub
    has_table: bool  # of the firewall
    database: Database | None  # None: it gives no answer
    units: Mapping[str, Unit]
    has_registry: bool  # its disk image
    has_old_images: bool  # of a registry without it, which are not on it yet
    registry_owner: tuple[int, str, str] | None  # mode, user and group of what is mounted there


@dataclass(frozen=True)
class Config:
    """What the command line asked for, and what the checkout brings."""

    hostname: str
    tls: str
    laid: Mapping[Path, File]
    release: Mapping[str, bytes] | None  # of --dist
    version: tuple[int, ...]
    schema: int
    venv: str


@dataclass(frozen=True)
class Run:
    """One command; what goes to its stdin may be secret."""

    argv: tuple[str, ...]
    why: str
    stdin: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)}  # {self.why}"


@dataclass(frozen=True)
class WriteFile:
    """One file, replaced whole."""

    path: Path
    content: bytes = field(repr=False)
    mode: int
    why: str

    def __str__(self) -> str:
        return f"write {self.path} (mode {self.mode:04o})  # {self.why}"


@dataclass(frozen=True)
class Install:
    """Debian packages, once nobody else installs any."""

    packages: tuple[str, ...]

    def __str__(self) -> str:
        what = ", ".join(f"{name} ({PACKAGES[name]})" for name in self.packages)
        return f"install these packages, and what they need: {what}"


@dataclass(frozen=True)
class MakeVenv:
    """The virtualenv, made beside the old one and put in its place."""

    name: str

    def __str__(self) -> str:
        return f"make {CODE / self.name}  # Python packages, pinned by hash"


@dataclass(frozen=True)
class MakeHub:
    """A new key, and the file of wg0."""

    def __str__(self) -> str:
        return f"write {WG_CONF} (mode 0600)  # its key is made by wg genkey"


@dataclass(frozen=True)
class MakeKey:
    """A new key of workloads' secrets; made once, since another one cannot read them."""

    path: Path = SECRETS_KEY

    def __str__(self) -> str:
        return f"write {self.path} (mode 0600)  # 256 random bits for workloads' secrets"


@dataclass(frozen=True)
class CopyCa:
    """Caddy's certificate authority, for everybody who shall trust it."""

    def __str__(self) -> str:
        return f"write {CA_FILE} (mode 0644)  # the certificate authority that Caddy made"


Step = Run | WriteFile | Install | MakeVenv | MakeHub | MakeKey | CopyCa


# ---------------------------------------------------------------------------------------------
# Rules and plan. Pure.
# ---------------------------------------------------------------------------------------------


def is_hostname(text: str) -> bool:
    """True for a name in DNS with a dot, in lower case, that is no address."""
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    name = rf"({label}\.)+[a-z]([a-z0-9-]{{0,61}}[a-z0-9])?"
    return len(text) <= 253 and re.fullmatch(name, text) is not None


def parse_version(text: bytes) -> tuple[int, ...]:
    """The version that cp_server.py (`VERSION = "0.1.0"`) or release.json says."""
    match = re.search(rb'(?:^VERSION =|"version":) ?"(\d+(?:\.\d+)*)"', text, re.MULTILINE)
    return tuple(int(part) for part in match[1].split(b".")) if match else ()


def render_version(version: tuple[int, ...]) -> str:
    """`0.1.0`."""
    return ".".join(str(part) for part in version) or "unknown"


def parse_schema(text: bytes) -> int:
    """The number of the newest migration in cp_server.py."""
    match = re.search(rb"^MIGRATIONS: .*? = (\(\n.*?^\))$", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise Error("cp_server.py of this checkout has no MIGRATIONS", "get a whole checkout")
    return int(ast.literal_eval(match[1].decode())[-1][0])


def parse_interface(text: str) -> dict[str, list[str]]:
    """The keys of [Interface] of a wg-quick file, in lower case, each with its values."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        words = line.partition("#")[0].strip()
        if words.startswith("["):
            section = words.lower()
        elif section == "[interface]" and "=" in words:
            key, _, value = words.partition("=")
            values = [each.strip() for each in value.split(",")]
            found.setdefault(key.strip().lower(), []).extend(values)
    return found


def list_problems(config: Config, facts: Facts) -> Iterator[Error]:
    """Name everything that forbids to begin."""
    if facts.debian < DEBIAN_MIN:
        yield Error(f"this is not Debian {DEBIAN_MIN} or newer", "take a machine with Debian 12")
    if not facts.has_systemd:
        yield Error("systemd does not run here", "take a machine that systemd boots")
    if not facts.has_wireguard:
        todo = "install Debian's kernel (linux-image-amd64 or -arm64) and reboot"
        yield Error("this kernel has no WireGuard", todo)
    if facts.memory_bytes < MEMORY_MIN_BYTES:
        yield Error(f"{facts.memory_bytes >> 20} MB of memory are too few", "take 1 GB or more")
    is_fresh = facts.missing or not facts.venv or not facts.has_registry
    needed = FRESH_MIN_BYTES if is_fresh else LATER_MIN_BYTES
    if facts.free_bytes < needed:
        what = f"{facts.free_bytes >> 20} MB of disk are free, {needed >> 20} are needed"
        yield Error(what, "free some; look: df -h / /var /opt /srv")
    if not CLOCK_MIN < facts.now < CLOCK_MAX:
        what = f"the clock is wrong, it says {time.strftime('%Y-%m-%d', time.gmtime(facts.now))}"
        yield Error(what, "set it: timedatectl set-ntp true")
    if not facts.resolves:
        todo = "set its A record to this machine's address; on a LAN take --tls internal"
        yield Error(f"{config.hostname} has no address in DNS", todo)
    if facts.user_no is not None and facts.user_no >= 1000:
        yield Error(f"the user {USER} is a person's", "rename it: usermod --login", REFUSED)
    for path in facts.edited:
        todo = "give the control plane a machine of its own, or move that file away"
        yield Error(f"{path} serves something of yours", todo, REFUSED)
    yield from list_port_problems(facts)
    yield from list_hub_problems(facts)
    yield from list_older(config, facts)


def list_port_problems(facts: Facts) -> Iterator[Error]:
    """Name who has a port that is needed."""
    for each in dict.fromkeys(facts.listeners):
        allowed = PORTS.get((each.protocol, each.port), each.unit)
        if each.unit.startswith(allowed) and (each.port != WG_PORT or facts.hub.link):
            continue
        todo = "find it: wg show all listen-port"
        if each.unit.endswith((".service", ".socket")):
            todo = f"when it is not needed: systemctl disable --now {each.unit}"
        elif each.unit != "kernel":
            todo = "end it, or take another machine"
        where = f"port {each.port}/{each.protocol}"
        yield Error(f"{where} is taken by {each.process} ({each.unit})", todo)


def list_hub_problems(facts: Facts) -> Iterator[Error]:
    """Name what is wrong with a wg0 that is there: it is never overwritten."""
    for network in facts.networks:
        todo = "the tunnels of the hosts need all of it: remove that"
        yield Error(f"a part of {TUNNEL} is in use here: {network}", todo)
    hub = facts.hub
    if hub.interface is None:
        if hub.link:
            what = f"there is a wg0 made by someone else, without {WG_CONF}"
            yield Error(what, "when it is not needed: ip link delete wg0", REFUSED)
        return
    away = f"when it is not needed: systemctl disable --now wg-quick@wg0; mv {WG_CONF} /root/"
    for key, value in {"Address": HUB, "ListenPort": str(WG_PORT)}.items():
        has = hub.interface.get(key.lower(), ())
        if value not in has:
            what = f"{WG_CONF} was made by someone else: its {key} is {', '.join(has) or 'missing'}"
            yield Error(f"{what}, not {value}", away, REFUSED)
    if not hub.interface.get("privatekey"):
        yield Error(f"{WG_CONF} has no PrivateKey", away, REFUSED)
    elif hub.link and not hub.same:
        what = f"wg0 runs with another key or port than {WG_CONF} says"
        yield Error(what, "keep what runs: wg-quick save wg0", REFUSED)


def list_older(config: Config, facts: Facts) -> Iterator[Error]:
    """Name what this checkout, or the release of --dist, would set back."""
    todo = "get a newer checkout: git pull"
    there = facts.files.get(CODE / "cp_server.py")
    runs = parse_version(there.content) if there else ()
    if runs > config.version:
        what = f"version {render_version(runs)} runs here"
        yield Error(f"{what}, this checkout is {render_version(config.version)}", todo, REFUSED)
    if facts.database and facts.database.schema > config.schema:
        what = f"the database has schema {facts.database.schema}"
        yield Error(f"{what}, this checkout knows only {config.schema}", todo, REFUSED)
    if config.release is None:
        return
    old, key = (facts.files.get(DIST / name) for name in ("release.json", "release.pub"))
    if old and parse_version(old.content) > parse_version(config.release["release.json"]):
        what = f"/dist/ serves release {render_version(parse_version(old.content))}"
        yield Error(f"{what}, the one of --dist is older", "give a newer one", REFUSED)
    if key and key.content != config.release["release.pub"]:
        what = "the release of --dist is signed with another key than the one in /dist/"
        todo = "sign it with that key: the hosts that are there take no other"
        yield Error(what, todo, REFUSED)


def render_caddyfile(template: bytes, hostname: str, tls: str) -> bytes:
    """The Caddyfile with its name, and where its certificate comes from."""
    line = b"tls internal" if tls == "internal" else b"# Its certificate comes by ACME."
    return template.replace(b"@HOSTNAME@", hostname.encode()).replace(b"@TLS@", line)


CERTIFICATE_MAX_BYTES = 16 << 10
CERTIFICATE_RE = re.compile(
    rb"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n"
)
SSH_PORTS = re.compile(rb"^define ssh_ports = \{ ([0-9, ]+) \}$", re.MULTILINE)


def list_ssh_ports(facts: Facts) -> list[int]:
    """Ports of sshd, and those that systemd has for it by ssh.socket; not what a login forwards."""
    by_socket = re.findall(r":([0-9]+) \(Stream\)$", facts.ssh_socket, re.MULTILINE)
    return [
        each.port
        for each in facts.listeners
        if (each.process.startswith("sshd ") and not each.unit.endswith(".scope"))
        or (each.process.endswith("(pid 1)") and str(each.port) in by_socket)
    ]


def render_nft(template: bytes, old: bytes, found: Sequence[int]) -> bytes:
    """cp.nft with the ports of sshd: those of the template, of the file here, and those found."""
    ports = set(found)
    for text in (template, old):
        match = SSH_PORTS.search(text)
        ports |= {int(each) for each in match[1].split(b",")} if match else set()
    line = f"define ssh_ports = {{ {', '.join(str(port) for port in sorted(ports))} }}"
    return SSH_PORTS.sub(line.encode(), template)


def render_cp_env(old: bytes | None, hostname: str) -> bytes:
    """cp.env: what is there stays; a key that is needed and not there is added."""
    text = b"# Settings of the control plane, KEY=value; all keys: openinfra-cp serve --help\n"
    text = text if old is None else old
    needed = {
        "WG_SOCKET": "/run/openinfra-wg/wg.sock",
        "REGISTRY": hostname,
        "REGISTRY_DIR": str(REGISTRY_ROOT),
    }
    for key, value in needed.items():
        if not re.search(rf"^\s*{key}\s*=".encode(), text, re.MULTILINE):
            text += b"\n" if text and not text.endswith(b"\n") else b""
            text += f"{key}={value}\n".encode()
    return text


def render_wg_conf(private_key: str) -> bytes:
    """wg0.conf, as wg-quick(8) reads it."""
    lines = (f"Address = {HUB}", f"ListenPort = {WG_PORT}", f"PrivateKey = {private_key}")
    return "\n".join(("[Interface]", *lines, "")).encode()


def plan(config: Config, facts: Facts, password: str) -> list[Step]:
    """Give back what is left to do, nothing when all is there; raises Error with every reason."""
    problems = list(list_problems(config, facts))
    if problems:
        what = "this machine is not ready:\n  " + "\n  ".join(str(each) for each in problems)
        code = max(each.exit_code for each in problems)
        raise Error(f"{what}\nnothing was changed", "mend that, then run this again", code)
    steps: list[Step] = [*plan_places(facts), *plan_files(config, facts)]
    written = {step.path for step in steps if isinstance(step, WriteFile | MakeKey)}
    wanted = (FIREWALL, WG_UNIT, REGISTRY_DISK, *SERVICES)
    units = {name: facts.units.get(name, Unit()) for name in wanted}
    # Before systemd reads the units: after a cut in between they are outdated, and linked again.
    ours = [
        name
        for name in wanted
        if UNITS / name in config.laid
        and (UNITS / name in written or units[name].outdated or not units[name].enabled)
    ]
    if ours:
        steps.append(Run(("systemctl", "--no-reload", "reenable", *ours), "at each boot"))
    outdated = any(unit.outdated for unit in facts.units.values())
    if ours or outdated or any(UNITS in path.parents for path in written):
        steps.append(Run(("systemctl", "daemon-reload"), "it reads the units"))
    steps += plan_registry(facts)
    if facts.missing:
        steps.append(Install(facts.missing))
    if facts.registry_owner != REGISTRY_OWNER:
        own = ("--mode=0700", "--owner=docker-registry", "--group=docker-registry")
        steps.append(Run(("install", "--directory", *own, str(REGISTRY_ROOT)), "the registry's"))
    disabled = [
        name for name in wanted if UNITS / name not in config.laid and not units[name].enabled
    ]
    if disabled:
        steps.append(Run(("systemctl", "enable", *disabled), "at each boot"))
    if not facts.has_table or NFT in written:
        steps.append(Run(("systemctl", "start", FIREWALL), "the firewall"))
    steps += plan_hub(facts)
    if facts.venv != config.venv:
        steps.append(MakeVenv(config.venv))
        written.add(VENV)
    steps += plan_database(config, facts, password)
    if JWT_KEYS not in facts.files:
        argv = (str(WRAPPER), "token", "--new-key")
        steps.append(Run(argv, "the key of operators' tokens; the token is thrown away"))
    steps += plan_release(config, facts)
    written |= {step.path for step in steps if isinstance(step, WriteFile)}
    runs = [step.argv for step in steps if isinstance(step, Run)]
    stopped = {argv[2] for argv in runs if argv[:2] == ("systemctl", "stop")}
    steps += plan_services(facts, written, stopped)
    root, copy = facts.files.get(CADDY_ROOT), facts.files.get(CA_FILE)
    if config.tls == "internal" and (not root or not copy or copy.content != root.content):
        steps.append(CopyCa())
    return steps


def plan_places(facts: Facts) -> Iterator[Step]:
    """The user and the directories."""
    if facts.user_no is None:
        options = ("--system", "--user-group", "--no-create-home", "--home-dir=/nonexistent")
        yield Run(("useradd", *options, "--shell=/usr/sbin/nologin", USER), "the daemon's user")
    for path, mode in DIRECTORIES.items():
        if facts.directories.get(path) != (mode, 0, 0):
            owner = ("--owner=root", "--group=root")
            yield Run(("install", "--directory", f"--mode={mode:04o}", *owner, str(path)), "root's")


def plan_registry(facts: Facts) -> Iterator[Step]:
    """The registry's disk, before its package is installed and starts it."""
    if not facts.has_registry:
        size_bytes = max(REGISTRY_MIN_BYTES, (facts.free_bytes - REGISTRY_KEPT_BYTES) // 2)
        size_bytes = size_bytes >> 20 << 20
        new = str(REGISTRY_IMAGE_NEW)
        why = f"{size_bytes >> 20} MiB for images"
        yield Run(("install", "--mode=0600", "/dev/null", new), "also when a cut left a part of it")
        yield Run(("fallocate", f"--length={size_bytes}", new), why)
        options = ("-E", "nodiscard", "-L", "openinfra-reg")  # to discard would give it back
        yield Run(("mkfs.ext4", "-q", "-F", "-m0", *options, new), "its file system")
        move = ("mv", "--no-target-directory", "--", new, str(REGISTRY_IMAGE))
        yield Run(move, "now it is whole")
        yield Run(("sync", "--file-system", str(REGISTRY_IMAGE)), "also after a power cut")
    if not facts.units.get(REGISTRY_DISK, Unit()).active:
        yield Run(("systemctl", "start", REGISTRY_DISK), "the registry's disk")
    if facts.has_old_images:
        there, copy = str(REGISTRY_ROOT / "docker"), str(REGISTRY_ROOT / ".docker.new")
        yield Run(("systemctl", "stop", "docker-registry.service"), "its images move")
        yield Run(("rm", "-rf", "--", copy), "what a cut run left")
        yield Run(("cp", "--archive", "--", str(OLD_IMAGES), copy), "they stay there as well")
        yield Run(("mv", "--no-target-directory", "--", copy, there), "now they are whole")


def plan_files(config: Config, facts: Facts) -> Iterator[Step]:
    """What is laid whole, the settings, and the modes of what is secret."""
    ports = list_ssh_ports(facts)
    for path, wanted in config.laid.items():
        content, found = wanted.content, facts.files.get(path)
        if path == NFT:
            content = render_nft(content, found.content if found else b"", ports)
        elif path == CADDYFILE:
            content = render_caddyfile(content, config.hostname, config.tls)
        same = found and (found.content, found.mode) == (content, wanted.mode) and found.by_root
        if not same:
            yield WriteFile(path, content, wanted.mode, "it is another" if found else "new")
    env = facts.files.get(CP_ENV)
    settings = render_cp_env(env.content if env else None, config.hostname)
    if not env or settings != env.content:
        yield WriteFile(CP_ENV, settings, 0o644, "settings of the control plane")
    if SECRETS_KEY not in facts.files:
        yield MakeKey()
    for path in (DSN, OWNER_DSN, JWT_KEYS, SECRETS_KEY, RELEASE_KEY):
        if path in facts.files and facts.files[path].mode != 0o600:
            yield Run(("chmod", "0600", str(path)), "it is secret")


def plan_hub(facts: Facts) -> Iterator[Step]:
    """wg0: made once, never taken down."""
    hub, unit = facts.hub, facts.units.get(WG_UNIT, Unit())
    if hub.interface is None:
        yield MakeHub()
    elif hub.mode != 0o600:
        yield Run(("chmod", "0600", str(WG_CONF)), "it holds a key")
    if not hub.link:
        verb = "restart" if unit.active else "start"
        yield Run(("systemctl", verb, WG_UNIT), "the hub")


def plan_database(config: Config, facts: Facts, password: str) -> Iterator[Step]:
    """Roles, database, schema."""
    found, secret = facts.database, facts.files.get(OWNER_DSN)
    if secret:
        match = re.search(rb"\bpassword=([A-Za-z0-9_-]+)", secret.content)
        if match is None:
            raise Error(f"{OWNER_DSN} has no password", f"remove it: rm {OWNER_DSN}")
        password = match[1].decode()
    else:
        text = f"host=127.0.0.1 dbname={USER} user={OWNER} password={password}\n"
        yield WriteFile(OWNER_DSN, text.encode(), 0o600, "how `migrate` logs in")
    if DSN not in facts.files:
        yield WriteFile(DSN, DSN_TEXT, 0o600, "how the daemon logs in: by its user's name")
    if found is None:
        yield Run(("systemctl", "start", "postgresql.service"), "the database server")
    if found is None or not (found.has_roles and found.owner_logs_in and secret):
        sql = SQL_ROLES.replace("@PASSWORD@", password).encode()
        strict = ("--set=ON_ERROR_STOP=1", "--dbname=postgres")
        yield Run((*PSQL, *strict), "roles and the database", sql)
    if found is None or found.schema < config.schema:
        # One that serves on would read and write the tables of before.
        if found is not None and facts.units.get("openinfra-cp.service", Unit()).active:
            yield Run(("systemctl", "stop", "openinfra-cp.service"), "while its tables change")
        yield Run((str(WRAPPER), "migrate"), f"schema {config.schema}")


def plan_release(config: Config, facts: Facts) -> Iterator[Step]:
    """What /dist/ serves: the files of --dist, or a release that is built and signed here."""
    if config.release is not None:
        for name, content in config.release.items():
            found = facts.files.get(DIST / name)
            if not found or found.content != content:
                yield WriteFile(DIST / name, content, 0o644, "the release")
        return
    key, release = facts.files.get(RELEASE_KEY), facts.files.get(DIST / "release.json")
    if release and not key:
        return  # it was signed elsewhere
    # A version never changes: `dist` refuses to make the one that is served out of other files.
    if not release or parse_version(release.content) != config.version:
        argv = (str(WRAPPER), "dist", f"--out={DIST}", f"--key={RELEASE_KEY}")
        yield Run((*argv, *(() if key else ("--new-key",))), "the release that /dist/ serves")


def is_newer(facts: Facts, written: set[Path], paths: Sequence[Path], at: float) -> bool:
    """True when one of these files is about to change, or changed after that time."""
    return any(
        path in written or (path in facts.files and facts.files[path].changed_at > at)
        for path in paths
    )


def plan_services(facts: Facts, written: set[Path], stopped: set[str]) -> Iterator[Step]:
    """Start, and restart what runs with something older than is there now."""
    for name, reads in SERVICES.items():
        unit = facts.units.get(name, Unit())
        if not unit.active or name in stopped:
            yield Run(("systemctl", "start", name), "now")
        elif is_newer(facts, written, reads, unit.started_at):
            if name.endswith(".socket"):  # it cannot be restarted under its service
                yield Run(("systemctl", "stop", name.replace(".socket", ".service")), "it changed")
            yield Run(("systemctl", "restart", name), "what it reads is newer than it")


# ---------------------------------------------------------------------------------------------
# Inspect: looks, never changes.
# ---------------------------------------------------------------------------------------------


def look(
    *argv: str, stdin: str = "", failing: bool = False, environment: Mapping[str, str] | None = None
) -> str | None:
    """The output of a command that only looks; None when it is not there, or fails and may not."""
    env = {**os.environ, "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, env=env, timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 or failing else None


def read_config(args: argparse.Namespace) -> Config:
    """Read the checkout, and the release of --dist; raises Error."""
    laid = {}
    for name, path in LAID.items():
        source = SOURCE / name
        try:
            mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
            laid[path] = File(source.read_bytes(), mode)
        except OSError as error:
            todo = "run this from a whole checkout of the repository"
            raise Error(f"{source}: {error.strerror}", todo) from None
    laid[WRAPPER] = File(WRAPPER_TEXT, 0o755)
    program = laid[CODE / "cp_server.py"].content
    pins = laid[CODE / "systemd/cp-requirements.txt"].content
    here = CADDYFILE.read_bytes() if CADDYFILE.exists() else b""
    key = hashlib.sha256(pins + str(sys.version_info[:2]).encode()).hexdigest()[:16]
    return Config(
        hostname=args.hostname,
        tls=args.tls or ("internal" if b"\n\ttls internal\n" in here else "acme"),
        laid=laid,
        release=read_release(args.dist) if args.dist else None,
        version=parse_version(program),
        schema=parse_schema(program),
        venv=f"venv-{key}",
    )


def read_release(directory: Path) -> dict[str, bytes]:
    """The files that release.json names, then it, its signature and key; raises Error."""
    found = {}
    try:
        described = (directory / "release.json").read_bytes()
        for name, row in json.loads(described)["files"].items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise ValueError(f"a file is called {name!r}")
            found[name] = (directory / name).read_bytes()
            if hashlib.sha256(found[name]).hexdigest() != row["sha256"]:
                raise ValueError(f"{name} is not the one that release.json describes")
        for name in ("release.pub", "release.json.sig", "release.json"):
            found[name] = (directory / name).read_bytes()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        todo = "make one: cp_server.py dist --out DIR --key FILE"
        raise Error(f"{directory} holds no release: {error}", todo) from None
    return found


def read_facts(config: Config) -> Facts:
    """Look at everything, once."""
    lines = Path("/etc/os-release").read_text().splitlines()
    release = dict(line.replace('"', "").partition("=")[::2] for line in lines)
    debian = release.get("VERSION_ID", "") if release.get("ID") == "debian" else ""
    roots = [path for path in ("/", "/var", "/opt", "/srv") if os.path.exists(path)]
    files, missing = read_files(config), tuple(read_missing())
    return Facts(
        debian=int(debian) if debian.isdecimal() else 0,
        has_systemd=os.path.isdir("/run/systemd/system"),
        has_wireguard=os.path.exists("/sys/module/wireguard")
        or look("modprobe", "--dry-run", "--quiet", "wireguard") is not None,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        free_bytes=min(shutil.disk_usage(path).free for path in roots) + read_cut_bytes(),
        now=time.time(),
        resolves=config.tls == "internal" or can_resolve(config.hostname),
        networks=tuple(read_networks()),
        listeners=tuple(read_listeners()),
        ssh_socket=look("systemctl", "show", "--property=Listen", "--value", "ssh.socket") or "",
        edited=tuple(read_edited()),
        missing=missing,
        user_no=next((each.pw_uid for each in pwd.getpwall() if each.pw_name == USER), None),
        directories=read_directories(),
        files=files,
        venv=os.readlink(VENV) if os.path.exists(VENV / "bin/python") else "",
        hub=read_hub(),
        has_table=look("nft", "list", "table", "inet", "openinfra_cp") is not None,
        database=None if "postgresql" in missing else read_database(files.get(OWNER_DSN)),
        units=read_units(),
        has_registry=REGISTRY_IMAGE.exists(),
        has_old_images=OLD_IMAGES.is_dir() and not (REGISTRY_ROOT / "docker").is_dir(),
        registry_owner=read_registry_owner(),
    )


def read_files(config: Config) -> dict[Path, File]:
    """Every file that a plan looks at and that is there."""
    paths = {*config.laid, *(path for reads in SERVICES.values() for path in reads)}
    paths |= {DIST / name for name in (*(config.release or ()), "release.json")}
    found = {}
    for path in sorted(paths | {OWNER_DSN, RELEASE_KEY, CADDY_ROOT, CA_FILE}):
        with contextlib.suppress(FileNotFoundError):
            seen = path.lstat()  # of a link, its own time
            content = path.read_bytes() if stat.S_ISREG(seen.st_mode) else b""
            by_root = (seen.st_uid, seen.st_gid) == (0, 0)
            found[path] = File(content, stat.S_IMODE(seen.st_mode), seen.st_mtime, by_root)
    return found


def read_directories() -> dict[Path, tuple[int, int, int]]:
    """Mode, user and group of each directory that is there and no link."""
    seen = {path: path.lstat() for path in DIRECTORIES if path.is_dir() and not path.is_symlink()}
    return {path: (stat.S_IMODE(it.st_mode), it.st_uid, it.st_gid) for path, it in seen.items()}


def read_cut_bytes() -> int:
    """What a run that was cut had of the registry's image; the next one takes it back."""
    with contextlib.suppress(OSError):
        return REGISTRY_IMAGE_NEW.lstat().st_blocks * 512
    return 0


def read_registry_owner() -> tuple[int, str, str] | None:
    """Mode, user and group of the registry's disk; None where it is not mounted."""
    if not os.path.ismount(REGISTRY_ROOT):
        return None
    seen = REGISTRY_ROOT.stat()
    with contextlib.suppress(KeyError):  # of a user that is gone
        return stat.S_IMODE(seen.st_mode), REGISTRY_ROOT.owner(), REGISTRY_ROOT.group()
    return None


def can_resolve(hostname: str) -> bool:
    """True when the name has an address."""
    try:
        return bool(socket.getaddrinfo(hostname, 443))
    except OSError:
        return False


def read_networks() -> Iterator[str]:
    """Routes and addresses inside the tunnel's network that are not wg0's."""
    for route in json.loads(look("ip", "-4", "-json", "route", "show", "table", "all") or "[]"):
        to = "0.0.0.0/0" if route["dst"] == "default" else route["dst"]
        inside = ipaddress.IPv4Network(to).subnet_of(TUNNEL)
        if inside and route.get("dev") != "wg0" and route.get("type") != "broadcast":
            yield f"{route['dst']} on {route.get('dev', route.get('type'))}"


def read_listeners() -> Iterator[Listener]:
    """Who listens on this machine."""
    for line in sorted((look("ss", "-Hltnup") or "").splitlines()):
        protocol, _, _, _, address, *_ = line.split()
        port = int(address.rpartition(":")[2])
        match = re.search(r'\(\("([^"]*)",pid=(\d+)', line)
        if match is None:
            yield Listener(protocol, port, "kernel", "the kernel")
            continue
        with contextlib.suppress(OSError):  # it is gone
            group = Path(f"/proc/{match[2]}/cgroup").read_text().strip()
            process = f"{match[1]} (pid {match[2]})"
            yield Listener(protocol, port, group.rpartition("/")[2], process)


def read_edited() -> Iterator[Path]:
    """Configurations that are not the packages' own any more, and not replaced by ours yet."""
    for path, ours in PACKAGED.items():
        if path.exists() and not ours.exists():
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            told = look("dpkg-query", "--show", "--showformat=${Conffiles}", *PACKAGES) or ""
            if f"{path} {digest}" not in told:
                yield path


def read_missing() -> Iterator[str]:
    """Packages that are not installed, or not wholly."""
    form = "--showformat=${Package} ${db:Status-Status}\\n"
    told = look("dpkg-query", "--show", form, *PACKAGES, failing=True) or ""
    for name in PACKAGES:
        if f"{name} installed\n" not in told:
            yield name


def read_hub() -> Hub:
    """Look at wg0 and its file."""
    link = os.path.isdir("/sys/class/net/wg0")
    try:
        mode = stat.S_IMODE(WG_CONF.stat().st_mode)
        found = parse_interface(WG_CONF.read_text())
    except FileNotFoundError:
        return Hub(None, 0, link, False)
    runs = [
        (look("wg", "show", "wg0", what) or "").split() for what in ("private-key", "listen-port")
    ]
    same = runs == [found.get("privatekey"), found.get("listenport")]
    return Hub(found, mode, link, link and same)


def read_database(secret: File | None) -> Database | None:
    """Look at PostgreSQL; None when it gives no answer."""
    # Not by Debian's `psql`, a script in front of it that takes longer than the rest of this.
    psql = max(glob.glob("/usr/lib/postgresql/*/bin/psql"), default="psql")
    argv = [psql if word == "psql" else word for word in PSQL]
    told = (look(*argv, "--dbname=postgres", stdin=SQL_LOOK, failing=True) or "").split()
    if not told:
        return None
    words = secret.content.decode(errors="replace").split() if secret else ()
    names = {"host": "HOST", "dbname": "DATABASE", "user": "USER", "password": "PASSWORD"}
    pairs = [word.partition("=") for word in words]
    login = {f"PG{names[key]}": value for key, _, value in pairs if key in names}
    probe = (psql, "--no-psqlrc", "--no-password", "--command=SELECT 1")
    logs_in = secret is not None and look(*probe, environment=login) is not None
    return Database(told[0] == "1", logs_in, int(told[1]) if len(told) > 1 else 0)


def read_units() -> dict[str, Unit]:
    """Ask systemd for the units."""
    names = (*SERVICES, FIREWALL, WG_UNIT, REGISTRY_DISK)
    asked = "Id,UnitFileState,ActiveState,NeedDaemonReload,ActiveEnterTimestampMonotonic"
    boot = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    found = {}
    for block in (look("systemctl", "show", f"--property={asked}", *names) or "").split("\n\n"):
        said = dict(line.partition("=")[::2] for line in block.splitlines())
        if said:
            found[said["Id"]] = Unit(
                enabled=said["UnitFileState"] == "enabled",
                active=said["ActiveState"] == "active",
                outdated=said["NeedDaemonReload"] == "yes",
                started_at=boot + int(said["ActiveEnterTimestampMonotonic"] or 0) / 1e6,
            )
    return found


# ---------------------------------------------------------------------------------------------
# Apply: the only place that changes the machine.
# ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print one line for the person."""
    print(f"setup_cp: {text}", file=sys.stderr, flush=True)


def apply(step: Step) -> None:
    """Do one step."""
    if isinstance(step, Run):
        run(step.argv, stdin=step.stdin, timeout_s=300)
        return
    say(str(step))
    if isinstance(step, Install):
        install(step.packages)
    elif isinstance(step, MakeVenv):
        make_venv(step.name)
    else:
        lay(step)


def lay(step: WriteFile | MakeHub | MakeKey | CopyCa) -> None:
    """Write a file."""
    try:
        if isinstance(step, WriteFile):
            write_file(step.path, step.content, step.mode)
        elif isinstance(step, MakeHub):
            write_file(WG_CONF, render_wg_conf(run(["wg", "genkey"]).strip()), 0o600)
        elif isinstance(step, MakeKey):
            write_file(step.path, secrets.token_hex(32).encode() + b"\n", 0o600)
        else:
            until = time.monotonic() + READY_S
            while not CADDY_ROOT.exists() and time.monotonic() < until:
                time.sleep(0.2)
            write_file(CA_FILE, read_certificate(CADDY_ROOT), 0o644)
    except OSError as error:
        todo = "mend that and run this again; it goes on from here"
        raise Error(f"cannot write {error.filename}: {error.strerror}", todo) from None


def read_certificate(path: Path) -> bytes:
    """One certificate from a directory of Caddy's, which could have put anything there."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        content = file.read(CERTIFICATE_MAX_BYTES)
    if not CERTIFICATE_RE.fullmatch(content):
        raise Error(f"{path} is no certificate", "look what it is; Caddy makes it")
    return content


def wait_dpkg() -> None:
    """Wait until nobody else installs packages; raises Error."""
    until = time.monotonic() + DPKG_WAIT_S
    with open("/var/lib/dpkg/lock-frontend", "r+b") as lock:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(1)
    what = f"something else has been installing packages for {DPKG_WAIT_S // 60} minutes"
    raise Error(what, "look: ps -ef | grep -E 'apt|dpkg'", LATER)


def install(packages: Sequence[str]) -> None:
    """Install packages; what a run of dpkg that was killed has begun is finished first."""
    wait_dpkg()
    run(["dpkg", "--configure", "-a", "--force-confold"], timeout_s=1800)
    run(["apt-get", "update", "-q"], timeout_s=600)
    options = ["-q", "--yes", "--no-install-recommends", "-o", f"DPkg::Lock::Timeout={DPKG_WAIT_S}"]
    options += ["-o", "Dpkg::Options::=--force-confold"]
    run(["apt-get", "install", *options, *packages], timeout_s=3600)


def make_venv(name: str) -> None:
    """Make a virtualenv that is there whole or not at all; its makers die with this."""
    die, new, link = ("setpriv", "--pdeathsig=KILL", "--"), CODE / f"{name}.new", CODE / "venv.new"
    keep = os.readlink(VENV) if os.path.islink(VENV) else ""
    old = [str(path) for path in CODE.glob("venv-*") if path.name != keep]
    run(["rm", "--recursive", "--force", "--", str(link), *old], timeout_s=120)
    run([*die, "/usr/bin/python3", "-I", "-m", "venv", "--without-pip", str(new)], timeout_s=120)
    # Debian's own pip, out of its wheel: to copy it into the virtualenv takes longer than all else.
    wheel = max(glob.glob("/usr/share/python-wheels/pip-*.whl"), default="/no-python3-pip-whl")
    argv = [*die, str(new / "bin/python"), f"{wheel}/pip", "install", "--quiet", "--require-hashes"]
    argv += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    run([*argv, f"--requirement={CODE / 'systemd/cp-requirements.txt'}"], timeout_s=1800)
    run(["mv", "--no-target-directory", str(new), str(CODE / name)])
    run(["ln", "--symbolic", name, str(link)])
    run(["mv", "--no-target-directory", str(link), str(VENV)])


# ---------------------------------------------------------------------------------------------
# After it: waits until all answers, and says what the operator does next.
# ---------------------------------------------------------------------------------------------


def is_ok(sock: socket.socket, host: str, path: str) -> bool:
    """True when a web server answers this request with 200."""
    head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    sock.sendall(head.encode())
    return sock.recv(64).startswith(b"HTTP/1.1 200 ")


def is_ready(_config: Config) -> bool:
    """True when the control plane serves."""
    with socket.create_connection(("127.0.0.1", 8080), timeout=5) as plain:
        return is_ok(plain, "127.0.0.1:8080", "/readyz")


def is_served(config: Config) -> bool:
    """True when https answers under the hostname, with a certificate that verifies."""
    context = ssl.create_default_context(cafile=CA_FILE if config.tls == "internal" else None)
    plain = socket.create_connection(("127.0.0.1", 443), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname=config.hostname) as tls:
        return is_ok(tls, config.hostname, "/api/v1/openapi.json")


def finish(config: Config, changed: bool) -> None:
    """Wait until it answers, then print what the operator needs; raises Error."""
    what = {
        is_ready: Error("the control plane is not ready", "look: journalctl -u openinfra-cp -n 50"),
        is_served: Error("https does not answer", "look: journalctl -u caddy -n 50"),
    }
    for check, error in what.items():
        until = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError):  # ssl's errors are such
                if check(config):
                    break
            if time.monotonic() < until:
                time.sleep(0.3)
            elif check is is_served and config.tls == "acme":
                say(f"note: {error}; to get a certificate, ports 80 and 443 of {config.hostname}")
                say("note: must lead here from everywhere; Caddy goes on trying")
                break
            else:
                raise error
    print_notes(config, changed)
    print_next(config, changed)


def print_notes(config: Config, changed: bool) -> None:
    """Say what is not as good as it could be."""
    if look("timedatectl", "show", "--property=NTPSynchronized", "--value") == "no\n":
        say("note: no time server sets this clock; tokens and certificates need a right one")
    if changed and RELEASE_KEY.exists():
        say(f"note: {RELEASE_KEY} signs what every host runs: move it to your own computer,")
        say("note: make releases there (cp_server.py dist), and bring them with --dist")
    served = parse_version((DIST / "release.json").read_bytes())
    if served != config.version:
        versions = f"{render_version(served)}, this checkout is {render_version(config.version)}"
        say(f"note: /dist/ serves release {versions}; bring a newer one with --dist")


def print_next(config: Config, changed: bool) -> None:
    """Print what the operator and the hosts need from here."""
    key = run(["wg", "show", "wg0", "public-key"], echo=False).strip()
    print(f"WireGuard public key: {key}\nWireGuard endpoint:   {config.hostname}:{WG_PORT}")
    release = hashlib.sha256((DIST / "release.pub").read_bytes()).hexdigest()
    print(f"sha256 of release.pub: {release}")
    trust = ""
    if config.tls == "internal":
        trust = f" --cacert {CA_FILE}"
        digest = hashlib.sha256(CA_FILE.read_bytes()).hexdigest()
        print(f"Hosts need the file {CA_FILE} (install_agent.py --ca-file), over a secure channel;")
        print(f"its sha256: {digest}")
    shown = "$(sudo openinfra-cp token)"
    if changed:
        shown = run([str(WRAPPER), "token"], timeout_s=120, echo=False).strip()
        print("Your token, for 12 hours (another one: sudo openinfra-cp token):")
    print(f"""  ADMIN_JWT={shown}
Mint an invite:
  curl -sS{trust} -X POST https://{config.hostname}/api/v1/admin/host-invites \\
    -H "Authorization: Bearer $ADMIN_JWT" \\
    -H "Content-Type: application/json" \\
    -d '{{"ttl_hours": 24, "note": "provider@home"}}' \\
    | jq -r '.token'""")


# ---------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """A hostname, and how it gets its certificate."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="setup_cp.py", description=summary)
    add = parser.add_argument
    add("--hostname", required=True, help="the name that people and hosts reach this machine by")
    add("--tls", choices=("acme", "internal"), help="internal: on a LAN (else as it is, or acme)")
    add("--dist", type=Path, metavar="DIR", help="a signed release to serve; else one is made here")
    add("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args(argv)
    if not is_hostname(args.hostname):
        parser.error(f"{args.hostname!r} is no name in DNS, such as cp.example.org")
    if args.dist:
        args.dist = args.dist.resolve()
    return args


def take_lock() -> None:
    """Let only one of these change anything; the lock is held until this process ends."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error("setup_cp.py runs already", "wait for its end", LATER) from None


def main(argv: list[str]) -> int:
    """Exit codes are in the docstring of this file."""
    args = parse_arguments(argv)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file with a password or a key in it
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", DEBIAN_FRONTEND="noninteractive")
    os.umask(0o022)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        if os.geteuid() != 0:
            raise Error("this needs root", f"run: sudo {shlex.join([sys.argv[0], *argv])}")
        config = read_config(args)
        os.chdir("/")
        if not args.dry_run:
            take_lock()
        steps = plan(config, read_facts(config), secrets.token_urlsafe(32))
        if args.dry_run:
            print("\n".join(str(step) for step in steps) or "nothing to do")
            return 0
        for step in steps:
            apply(step)
        finish(config, bool(steps))
        say("done" if steps else "nothing to do")
        return 0
    except Error as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
