"""setup_cp.py: what it refuses, what is left to do in each state, what it writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import cp_server
from systemd import setup_cp
from systemd.setup_cp import (
    CA_FILE,
    CADDY_ROOT,
    CADDY_UNIT,
    CADDYFILE,
    CODE,
    CP_ENV,
    DIRECTORIES,
    DIST,
    DSN,
    DSN_TEXT,
    FIREWALL,
    JWT_KEYS,
    LAID,
    NFT,
    OWNER_DSN,
    PACKAGES,
    REGISTRY,
    REGISTRY_DISK,
    REGISTRY_IMAGE,
    RELEASE_KEY,
    RELEASED,
    SECRETS,
    SECRETS_KEY,
    SERVICES,
    SOURCE,
    UNITS,
    VENV,
    WG_CONF,
    WG_UNIT,
    WRAPPER,
    Config,
    Database,
    Error,
    Facts,
    File,
    Hub,
    Listener,
    Run,
    Step,
    Unit,
    WriteFile,
    is_hostname,
    list_ssh_ports,
    parse_arguments,
    parse_interface,
    parse_schema,
    parse_version,
    plan,
    plan_files,
    read_certificate,
    read_config,
    read_release,
    render_caddyfile,
    render_cp_env,
    render_nft,
    render_wg_conf,
)

PASSWORD = "made-up-canary"
CONFIG = replace(
    read_config(parse_arguments(["--hostname=cp.example.org", "--tls=internal"])),
    laid={path: File(b"text of %s\n" % path.name.encode(), 0o644) for path in LAID.values()},
)
KEY = "aDG1yNtBHjJJqLJGmSTtDkVPzgKvGLL4wXlKMCnPy1w="
NO_HUB = Hub(None, 0, False, False)
INTERFACE = parse_interface(render_wg_conf(KEY).decode())
FRESH = Facts(
    debian=12,
    has_systemd=True,
    has_wireguard=True,
    memory_bytes=4 << 30,
    free_bytes=30 << 30,
    now=1_795_000_000.0,
    resolves=True,
    networks=(),
    listeners=(Listener("tcp", 22, "ssh.service", "sshd (pid 601)"),),
    ssh_socket="",
    edited=(),
    missing=tuple(PACKAGES),
    user_no=None,
    directories={},
    files={},
    venv="",
    hub=NO_HUB,
    has_table=False,
    database=None,
    units={},
    has_registry=False,
    has_old_images=False,
    registry_owner=None,
)


UP = (*SERVICES, REGISTRY_DISK)


def settle(config: Config, facts: Facts) -> Facts:
    """The facts after all steps of a first plan."""
    files = {
        step.path: File(step.content, step.mode, 100.0)
        for step in plan(config, facts, PASSWORD)
        if isinstance(step, WriteFile)
    }
    made = {
        JWT_KEYS: b"{}",
        SECRETS_KEY: b"0",
        RELEASE_KEY: b"key",
        DIST / "release.json": b'{"version": "0.1.0"}',
    }
    made |= {CADDY_ROOT: b"ca", CA_FILE: b"ca", VENV: b""}
    return replace(
        facts,
        missing=(),
        user_no=105,
        directories={path: (mode, 0, 0) for path, mode in DIRECTORIES.items()},
        files=files | {path: File(content, 0o600, 100.0) for path, content in made.items()},
        venv=config.venv,
        hub=Hub(INTERFACE, 0o600, True, True),
        has_table=True,
        database=Database(True, True, config.schema),
        units={name: Unit(True, True, False, 200.0) for name in (*UP, FIREWALL, WG_UNIT)},
        has_registry=True,
        registry_owner=(0o700, "docker-registry", "docker-registry"),
    )


DONE = settle(CONFIG, FRESH)


def shown(steps: list[Step]) -> list[str]:
    """Steps without why."""
    return [str(step).partition("  # ")[0] for step in steps]


def files_without(*gone: Path) -> Mapping[Path, File]:
    """What is there when all is there, without some."""
    return {path: file for path, file in DONE.files.items() if path not in gone}


def test_nothing_is_left_to_do_when_all_is_there() -> None:
    assert plan(CONFIG, DONE, "another") == []


OWNERS = "--owner=docker-registry --group=docker-registry"
DIR = b"REGISTRY_DIR=/srv/registry\n"
OWN = f"install --directory --mode=0700 {OWNERS} /srv/registry"


def test_a_fresh_machine_gets_everything_in_order() -> None:
    steps = shown(plan(CONFIG, FRESH, PASSWORD))
    order = [
        f"write {CADDYFILE} (mode 0644)",  # before the packages, whose services start at once
        f"write {CADDY_UNIT} (mode 0644)",
        f"write {SECRETS_KEY} (mode 0600)",
        "systemctl daemon-reload",
        "fallocate --length=15032385536 /var/lib/.openinfra-registry.img.new",
        f"mv --no-target-directory -- /var/lib/.openinfra-registry.img.new {REGISTRY_IMAGE}",
        f"systemctl start {REGISTRY_DISK}",  # docker-registry is not to start without
        (
            "install these packages, and what they need: caddy (https), curl (to ask the control "
            "plane, as the document does), docker-registry (container images), gnupg (backups), jq "
            "(to read its answers), nftables (the firewall), openssl (signs releases), postgresql "
            "(the database), python3-venv (the virtualenv), wireguard-tools (the tunnel's hub)"
        ),
        OWN,
        f"systemctl start {FIREWALL}",
        f"write {WG_CONF} (mode 0600)",
        f"systemctl start {WG_UNIT}",
        f"make {CODE / CONFIG.venv}",
        f"write {OWNER_DSN} (mode 0600)",  # saved before the server is told
        (
            "setpriv --reuid=postgres --regid=postgres --init-groups -- psql --no-psqlrc --quiet "
            "--no-align --tuples-only --set=ON_ERROR_STOP=1 --dbname=postgres"
        ),
        "/usr/local/bin/openinfra-cp migrate",
        "/usr/local/bin/openinfra-cp token --new-key",
        (
            "/usr/local/bin/openinfra-cp dist --out=/srv/openinfra/dist "
            "--key=/etc/openinfra/release/key.pem --new-key"
        ),
        "systemctl start openinfra-cp.service",
        "systemctl start caddy.service",
        f"write {CA_FILE} (mode 0644)",
    ]
    assert [step for step in steps if step in order] == order


def test_what_a_release_is_made_of_is_laid() -> None:
    assert set(RELEASED) == {*cp_server.ARTIFACT_SOURCES, *cp_server.SCRIPTS}


def test_no_secret_is_shown_or_on_a_command_line() -> None:
    steps = plan(CONFIG, FRESH, PASSWORD)
    assert PASSWORD not in repr(steps) + " ".join(map(str, steps))
    told = [step.stdin for step in steps if isinstance(step, Run) and step.stdin]
    assert [PASSWORD.encode() in text for text in told] == [True]


@pytest.mark.parametrize("tls", ["acme", "internal"])
def test_where_the_certificate_comes_from_stays(
    tls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --tls, also for a hub on a LAN that was set up with it."""
    monkeypatch.setattr(setup_cp, "CADDYFILE", tmp_path / "Caddyfile")
    args = parse_arguments(["--hostname=cp.example.org"])
    assert read_config(args).tls == "acme"
    template = (SOURCE / "systemd/Caddyfile").read_bytes()
    (tmp_path / "Caddyfile").write_bytes(render_caddyfile(template, "cp.example.org", tls))
    assert read_config(args).tls == tls
    other = "acme" if tls == "internal" else "internal"
    assert read_config(parse_arguments(["--hostname=x.example.org", f"--tls={other}"])).tls == other


def test_of_caddys_files_a_certificate_is_taken_and_nothing_else(tmp_path: Path) -> None:
    """Whoever is Caddy may lay a link to a secret there, and the copy is for everybody."""
    good = b"-----BEGIN CERTIFICATE-----\nMIIB+/=\n-----END CERTIFICATE-----\n"
    path, other = tmp_path / "root.crt", tmp_path / "other"
    path.write_bytes(good)
    assert read_certificate(path) == good
    key = b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n"
    for bad in (b"", key, good + key, key + good, good + good, b"A" * 20_000):
        path.write_bytes(bad)
        with pytest.raises(Error, match="is no certificate"):
            read_certificate(path)
    path.rename(other)
    path.symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        read_certificate(path)


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (
            replace(DONE, files=files_without(CADDYFILE)),
            [f"write {CADDYFILE} (mode 0644)", "systemctl restart caddy.service"],
        ),
        (
            replace(DONE, files={**DONE.files, REGISTRY: File(b"edited", 0o644)}),
            [f"write {REGISTRY} (mode 0644)", "systemctl restart docker-registry.service"],
        ),
        (
            replace(DONE, files={**DONE.files, NFT: replace(DONE.files[NFT], mode=0o666)}),
            [f"write {NFT} (mode 0644)", f"systemctl start {FIREWALL}"],
        ),
        (
            replace(
                DONE,
                files={
                    **DONE.files,
                    CP_ENV: File(b"WG_SOCKET=\nREGISTRY=\n" + DIR, 0o644),
                },
            ),
            [],
        ),
        # Killed after the file was written and before the restart.
        (
            replace(
                DONE,
                files={
                    **DONE.files,
                    CODE / "cp_server.py": replace(
                        DONE.files[CODE / "cp_server.py"], changed_at=201.0
                    ),
                    DIST / "release.json": replace(
                        DONE.files[DIST / "release.json"], changed_at=202.0
                    ),
                },
            ),
            ["systemctl restart openinfra-cp.service"],
        ),
        (
            replace(DONE, files={**DONE.files, UNITS / "openinfra-wg.socket": File(b"old", 0o644)}),
            [
                f"write {UNITS}/openinfra-wg.socket (mode 0644)",
                "systemctl --no-reload reenable openinfra-wg.socket",
                "systemctl daemon-reload",
                "systemctl stop openinfra-wg.service",
                "systemctl restart openinfra-wg.socket",
            ],
        ),
        (
            replace(DONE, units={**DONE.units, "caddy.service": Unit(True, False, False, 0.0)}),
            ["systemctl start caddy.service"],
        ),
        (
            replace(DONE, units={**DONE.units, FIREWALL: Unit(False, False, True, 0.0)}),
            [f"systemctl --no-reload reenable {FIREWALL}", "systemctl daemon-reload"],
        ),
        # Cut after the file was written: it may be linked as the one before it.
        (
            replace(DONE, units={**DONE.units, FIREWALL: Unit(True, True, True, 0.0)}),
            [f"systemctl --no-reload reenable {FIREWALL}", "systemctl daemon-reload"],
        ),
        (
            replace(DONE, files={**DONE.files, DSN: File(DSN_TEXT, 0o644)}),
            [f"chmod 0600 {DSN}"],
        ),
        (replace(DONE, has_table=False), [f"systemctl start {FIREWALL}"]),
        (
            replace(DONE, units={**DONE.units, REGISTRY_DISK: Unit(True, False, False, 0.0)}),
            [f"systemctl start {REGISTRY_DISK}"],
        ),
        (
            replace(DONE, registry_owner=(0o755, "root", "root")),
            [OWN],
        ),
        (
            replace(DONE, directories={**DONE.directories, SECRETS: (0o700, 1000, 0)}),
            [f"install --directory --mode=0700 --owner=root --group=root {SECRETS}"],
        ),
        (replace(DONE, hub=Hub(INTERFACE, 0o644, True, True)), [f"chmod 0600 {WG_CONF}"]),
        (
            replace(DONE, hub=Hub(INTERFACE, 0o600, False, False)),
            [f"systemctl restart {WG_UNIT}"],
        ),
        (
            replace(DONE, database=Database(True, True, CONFIG.schema - 1)),
            [
                "systemctl stop openinfra-cp.service",  # it would serve the tables of before
                "/usr/local/bin/openinfra-cp migrate",
                "systemctl start openinfra-cp.service",
            ],
        ),
        (
            replace(DONE, has_old_images=True),
            [
                "systemctl stop docker-registry.service",
                "rm -rf -- /srv/registry/.docker.new",
                "cp --archive -- /var/lib/docker-registry/docker /srv/registry/.docker.new",
                "mv --no-target-directory -- /srv/registry/.docker.new /srv/registry/docker",
                "systemctl start docker-registry.service",
            ],
        ),
        (
            replace(DONE, files=files_without(JWT_KEYS)),
            ["/usr/local/bin/openinfra-cp token --new-key"],
        ),
        (
            replace(DONE, files=files_without(SECRETS_KEY)),
            [f"write {SECRETS_KEY} (mode 0600)", "systemctl restart openinfra-cp.service"],
        ),
        (
            replace(DONE, venv="venv-old"),
            [f"make {CODE / CONFIG.venv}", "systemctl restart openinfra-cp.service"],
        ),
        (
            replace(DONE, files={**DONE.files, CADDY_ROOT: File(b"new", 0o600)}),
            [f"write {CA_FILE} (mode 0644)"],
        ),
        # The key was moved to the operator's computer: releases come by --dist.
        (replace(DONE, files=files_without(RELEASE_KEY)), []),
        # Other files under a version that is served already are none of `dist`'s business.
        (
            replace(
                DONE,
                files={**DONE.files, CODE / "agent.py": File(b"old", 0o644)},
            ),
            [f"write {CODE / 'agent.py'} (mode 0644)"],
        ),
        (
            replace(
                DONE, files={**DONE.files, DIST / "release.json": File(b'"version": "0.0.9"', 420)}
            ),
            [
                (
                    "/usr/local/bin/openinfra-cp dist --out=/srv/openinfra/dist "
                    "--key=/etc/openinfra/release/key.pem"
                )
            ],
        ),
        (
            replace(DONE, files=files_without(DIST / "release.json")),
            [
                (
                    "/usr/local/bin/openinfra-cp dist --out=/srv/openinfra/dist "
                    "--key=/etc/openinfra/release/key.pem"
                )
            ],
        ),
    ],
)
def test_what_is_missing_is_mended_and_nothing_else(facts: Facts, wanted: list[str]) -> None:
    assert shown(plan(CONFIG, facts, PASSWORD)) == wanted


def test_a_lost_password_is_replaced_by_a_new_one_and_a_kept_one_is_told_again() -> None:
    lost = replace(DONE, files=files_without(OWNER_DSN))
    kept = replace(DONE, database=Database(True, False, CONFIG.schema))
    for facts, password in ((lost, b"second"), (kept, PASSWORD.encode())):
        (sql,) = [
            step.stdin
            for step in plan(CONFIG, facts, "second")
            if isinstance(step, Run) and step.stdin
        ]
        assert b"PASSWORD '%s'" % password in sql


HTTP = Listener("tcp", 80, "nginx.service", "nginx (pid 812)")
LOOSE = Listener("tcp", 443, "session-1.scope", "python3 (pid 9)")
WG = Listener("udp", 51820, "kernel", "the kernel")
PG = Listener("tcp", 5432, "docker-ab12.scope", "postgres (pid 44)")
CLUSTER = Listener("tcp", 5432, "postgresql@15-main.service", "postgres (pid 44)")
FOREIGN = parse_interface("[Interface]\nAddress = 10.0.0.1/24\nListenPort=51820\nPrivateKey=x\n")


@pytest.mark.parametrize(
    ("facts", "said", "code"),
    [
        (replace(FRESH, debian=11), "this is not Debian 12 or newer", 1),
        (replace(FRESH, has_systemd=False), "systemd does not run here", 1),
        (replace(FRESH, has_wireguard=False), "this kernel has no WireGuard", 1),
        (replace(FRESH, memory_bytes=512 << 20), "512 MB of memory are too few", 1),
        (replace(FRESH, free_bytes=1 << 30), "1024 MB of disk are free, 3072 are needed", 1),
        (
            replace(DONE, has_registry=False, free_bytes=3 << 29),
            "1536 MB of disk are free, 3072",
            1,
        ),
        (replace(DONE, free_bytes=1 << 20), "1 MB of disk are free, 200 are needed", 1),
        (replace(FRESH, now=1_000_000_000.0), "the clock is wrong, it says 2001-09-09", 1),
        (replace(FRESH, resolves=False), "cp.example.org has no address in DNS", 1),
        (replace(FRESH, user_no=1000), "the user openinfra is a person's", 3),
        (replace(FRESH, edited=(Path("/etc/caddy/Caddyfile"),)), "serves something of yours", 3),
        (
            replace(FRESH, listeners=(HTTP,)),
            (
                "port 80/tcp is taken by nginx (pid 812) (nginx.service); when it is not needed: "
                "systemctl disable --now nginx.service"
            ),
            1,
        ),
        (replace(FRESH, listeners=(LOOSE,)), "port 443/tcp is taken by python3 (pid 9)", 1),
        (replace(FRESH, listeners=(PG,)), "port 5432/tcp is taken by postgres (pid 44)", 1),
        (replace(FRESH, listeners=(WG,)), "port 51820/udp is taken by the kernel", 1),
        (
            replace(FRESH, networks=("10.77.3.0/24 on eth0",)),
            "a part of 10.77.0.0/16 is in use here: 10.77.3.0/24 on eth0",
            1,
        ),
        (replace(FRESH, hub=Hub(None, 0, True, False)), "a wg0 made by someone else", 3),
        (
            replace(FRESH, hub=Hub(FOREIGN, 0o600, False, False)),
            "its Address is 10.0.0.1/24, not 10.77.0.1/16; when it is not needed: systemctl",
            3,
        ),
        (replace(FRESH, hub=Hub({}, 0o600, False, False)), "its ListenPort is missing", 3),
        (replace(DONE, hub=Hub(INTERFACE, 0o600, True, False)), "wg-quick save wg0", 3),
        (
            replace(DONE, database=Database(True, True, 99)),
            f"has schema 99, this checkout knows only {CONFIG.schema}",
            3,
        ),
        (
            replace(DONE, files={CODE / "cp_server.py": File(b'VERSION = "9.10"\n', 0o755)}),
            "version 9.10 runs here, this checkout is 0.1.0; get a newer checkout: git pull",
            3,
        ),
    ],
)
def test_what_forbids_to_begin_is_named(facts: Facts, said: str, code: int) -> None:
    with pytest.raises(Error, match=re.escape(said)) as refused:
        plan(CONFIG, facts, PASSWORD)
    assert refused.value.exit_code == code
    assert "nothing was changed" in str(refused.value)


def test_every_problem_is_named_at_once() -> None:
    facts = replace(
        FRESH, debian=11, listeners=(HTTP, LOOSE, HTTP), hub=Hub(FOREIGN, 0, True, True)
    )
    with pytest.raises(Error) as refused:
        plan(CONFIG, facts, PASSWORD)
    assert len(str(refused.value).split("\n  ")) == 5
    assert refused.value.exit_code == 3


def test_what_is_ours_already_is_no_problem() -> None:
    ours = (WG, CLUSTER, Listener("tcp", 9092, "openinfra-cp.service", "python (pid 3)"))
    assert plan(CONFIG, replace(DONE, listeners=ours), PASSWORD) == []


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("cp.example.org", True),
        ("cp-1.xn--bcher-kva.example", True),
        ("cp", False),
        ("CP.example.org", False),
        ("192.0.2.1", False),
        ("cp.example.org.", False),
        ("https://cp.example.org", False),
        ("cp_1.example.org", False),
        ("-cp.example.org", False),
        ("a." * 127 + "org", False),
        ("cp.example.org\n}", False),
    ],
)
def test_hostnames(text: str, good: bool) -> None:
    assert is_hostname(text) == good


def test_a_wrong_command_line_is_a_usage_error() -> None:
    for argv in ([], ["--hostname=cp"], ["--hostname=cp.example.org", "--tls=none"]):
        with pytest.raises(SystemExit) as refused:
            parse_arguments(argv)
        assert refused.value.code == 2


def test_the_interface_is_read_as_wg_quick_writes_it() -> None:
    text = """# by hand
[Interface]
address = 10.77.0.1/16, fd00::1/64
ListenPort=51820 # the document's
PrivateKey = a=
[Peer]
PublicKey = b=
ListenPort = 1
"""
    assert parse_interface(text) == {
        "address": ["10.77.0.1/16", "fd00::1/64"],
        "listenport": ["51820"],
        "privatekey": ["a="],
    }


SSHD = Listener("tcp", 2022, "ssh.service", "sshd (pid 601)")
FORWARDED = Listener("tcp", 8443, "session-7.scope", "sshd (pid 702)")  # ssh -R 8443:…
SYSTEMD = [Listener("tcp", port, "init.scope", "systemd (pid 1)") for port in (111, 2222, 2223)]


@pytest.mark.parametrize(
    ("listeners", "ssh_socket", "ports"),
    [
        ((), "", []),
        ((SSHD, HTTP, LOOSE), "", [2022]),
        (SYSTEMD, "", []),  # rpcbind's, and others that are not ssh.socket's
        (SYSTEMD, "[::]:2222 (Stream)\n", [2222]),
        (SYSTEMD, "0.0.0.0:2222 (Stream)\n[::]:2222 (Stream)\n", [2222]),
        (SYSTEMD, "0.0.0.0:2222 (Stream)\n[fe80::1%eth0]:2223 (Stream)\n", [2222, 2223]),
        (SYSTEMD, "[::]:22 (Stream)\n", []),  # the unit is there, nobody listens
        (SYSTEMD, "[::]:2222 (Datagram)\n/run/x:2223\n[::]:12222 (Stream)\n", []),
        ((SSHD, *SYSTEMD), "[::]:2222 (Stream)\n", [2022, 2222]),
        ((LOOSE,), "[::]:443 (Stream)\n", []),  # another program's, whatever the unit says
        ((FORWARDED, SSHD), "", [2022]),
    ],
)
def test_ports_of_sshd(listeners: Sequence[Listener], ssh_socket: str, ports: list[int]) -> None:
    facts = replace(FRESH, listeners=tuple(listeners), ssh_socket=ssh_socket)
    assert list_ssh_ports(facts) == ports
    template = {NFT: File((SOURCE / "systemd/cp.nft").read_bytes(), 0o644)}
    steps = plan_files(replace(CONFIG, laid=template), facts)
    written = {step.path: step.content for step in steps if isinstance(step, WriteFile)}
    line = f"define ssh_ports = {{ {', '.join(map(str, [22, *ports]))} }}\n"
    assert line.encode() in written[NFT]


def test_ports_of_sshd_are_kept_and_added() -> None:
    template = (SOURCE / "systemd/cp.nft").read_bytes()
    first = render_nft(template, b"", [2222])
    assert b"define ssh_ports = { 22, 2222 }\n" in first
    assert render_nft(template, first, []) == first  # sshd is down just now
    assert render_nft(template, b"broken", []) == template


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, None),
        (b"HEARTBEAT_S=10", b"HEARTBEAT_S=10\nWG_SOCKET=/run/openinfra-wg/wg.sock\nREGISTRY=x.y\n"),
        (b" WG_SOCKET = /x\nREGISTRY=\n", b" WG_SOCKET = /x\nREGISTRY=\n"),
        (
            b"#WG_SOCKET=\nREGISTRY=a",
            b"#WG_SOCKET=\nREGISTRY=a\nWG_SOCKET=/run/openinfra-wg/wg.sock\n",
        ),
        (b"", b"WG_SOCKET=/run/openinfra-wg/wg.sock\nREGISTRY=x.y\n"),
    ],
)
def test_settings_of_the_operator_stay(old: bytes | None, new: bytes | None) -> None:
    made = render_cp_env(old, "x.y")
    assert made.startswith(b"# Settings") if new is None else made == new + DIR
    assert render_cp_env(made, "x.y") == made
    assert b"WG_SOCKET" in made
    assert b"REGISTRY" in made


def test_the_checkout_is_read() -> None:
    text = (SOURCE / "cp_server.py").read_bytes()
    assert parse_version(text) == (0, 1, 0)
    assert parse_version(b'{"version": "1.12"}') == (1, 12)
    assert parse_version(b"no version") == ()
    assert parse_schema(text) == text.count(b"\n    (\n        ") - text.count(
        b'\n    (\n        "'
    )
    with pytest.raises(Error, match="has no MIGRATIONS"):
        parse_schema(b"")
    assert [name for name in LAID if not (SOURCE / name).exists()] == []


def make_release(directory: Path) -> dict[str, bytes]:
    row = {"size_bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    files = {"openinfra-agent-linux-x86_64": b"abc", "release.pub": b"p", "release.json.sig": b"s"}
    about = {"version": "0.2.0", "files": {"openinfra-agent-linux-x86_64": row}}
    files["release.json"] = json.dumps(about).encode()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return files


def test_a_release_is_laid_whole_and_its_description_last(tmp_path: Path) -> None:
    make_release(tmp_path)
    config = replace(CONFIG, release=read_release(tmp_path))
    steps = shown(plan(config, DONE, PASSWORD))
    names = ("openinfra-agent-linux-x86_64", "release.pub", "release.json.sig", "release.json")
    assert steps == [f"write {DIST / name} (mode 0644)" for name in names]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("openinfra-agent-linux-x86_64", b"abd", "is not the one that release.json describes"),
        ("release.json", b'{"files": []}', "holds no release"),
        ("release.json", b'{"files": {"../x": {}}}', "a file is called '../x'"),
        ("release.json", b"{", "holds no release"),
        ("release.pub", None, "No such file"),
    ],
)
def test_a_broken_release_is_refused(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    make_release(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Error, match=said):
        read_release(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("release.json", b'{"version": "0.10.0"}', "serves release 0.10.0, the one of --dist is"),
        ("release.pub", b"other", "is signed with another key"),
    ],
)
def test_a_release_that_hosts_would_refuse_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    make_release(tmp_path)
    config = replace(CONFIG, release=read_release(tmp_path))
    served = replace(DONE, files={**DONE.files, DIST / name: File(content, 0o644)})
    with pytest.raises(Error, match=said) as refused:
        plan(config, served, PASSWORD)
    assert refused.value.exit_code == 3


def test_a_checkout_that_lacks_a_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = parse_arguments(["--hostname=cp.example.org", "--tls=internal"])
    assert set(read_config(arguments).laid) == {*LAID.values(), WRAPPER}
    monkeypatch.setattr(setup_cp, "SOURCE", tmp_path)
    with pytest.raises(Error, match="run this from a whole checkout"):
        read_config(arguments)
