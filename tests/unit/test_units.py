"""The units of host and control plane, and the files beside them, as systemd and Caddy see them.

That they run under live systemd is for tests/e2e.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from systemd.setup_cp import NFT, OWN_UNITS, SOURCE, UNITS, render_caddyfile, render_nft

SYSTEMD = SOURCE / "systemd"
HELPERS = 3.0
# The greatest exposure that each may have; the helpers run as root.
EXPOSURES = {
    "openinfra-agent.service": 2.0,
    "openinfra-guard.service": HELPERS,
    "openinfra-watch.service": HELPERS,
    "openinfra-strays.service": HELPERS,
    "openinfra-cp.service": 1.2,
    "openinfra-firewall.service": HELPERS,
    "openinfra-wg.service": HELPERS,
}
# Debian's own units with our part below: they are not on every machine that runs the tests.
DROP_INS = {
    "caddy-openinfra.conf": "ExecStart=/usr/bin/caddy run\nUser=caddy\nPrivateTmp=true\n",
    "docker-registry-openinfra.conf": "ExecStart=/usr/bin/docker-registry\nUser=docker-registry\n",
}
# Directives of design.md and hardening.md, beside those that the score counts.
DIRECTIVES = """
Type=notify
User=openinfra
CapabilityBoundingSet=
AmbientCapabilities=
LoadCredential=dsn:/etc/openinfra/cp/dsn
LoadCredential=jwt-keys.json:/etc/openinfra/cp/jwt-keys.json
IPAddressDeny=any
IPAddressAllow=localhost
IPAddressAllow=10.77.0.0/16
SocketBindDeny=any
SocketBindAllow=ipv4:tcp:9092
SocketBindAllow=ipv4:tcp:8080
LimitNOFILE=131072
LimitCORE=0
Restart=always
StartLimitIntervalSec=0
ProcSubset=pid
PrivateUsers=yes
PrivateIPC=yes
MemoryDenyWriteExecute=yes
NoExecPaths=/
"""


HOST_UNITS = (
    "openinfra-agent.service",
    "openinfra-guard.service",
    "openinfra-watch.service",
    "openinfra-strays.service",
    "openinfra-guard.timer",
)
# Root to the workloads' kernel, as every dockerd is: no score tells anything of them.
ENGINE_UNITS = (
    "openinfra-containerd.service",
    "openinfra-engine.service",
    "openinfra-workloads.service",
    "openinfra.slice",
    "var-cache-openinfra.mount",
)
# As the onboarding document has them.
DOCUMENTED = ("ProtectSystem=strict", "NoNewPrivileges=yes")


def read_exposure(path: Path) -> float:
    """What systemd-analyze says of a unit's file."""
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match, done.stdout
    return float(match[1])


SERVICES = [name for name in (*HOST_UNITS, *OWN_UNITS) if name.endswith(".service")]


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_exposes_little(name: str) -> None:
    assert read_exposure(SYSTEMD / name) <= EXPOSURES[name]


def test_a_hosts_units_have_what_the_document_says() -> None:
    for name in HOST_UNITS[:4]:
        lines = (SYSTEMD / name).read_text().splitlines()
        assert [line for line in DOCUMENTED if line not in lines] == []
    lines = (SYSTEMD / "openinfra-agent.service").read_text().splitlines()
    assert "ReadWritePaths=/var/lib/openinfra /etc/openinfra" in lines


@pytest.mark.parametrize("name", DROP_INS)
def test_debians_services_expose_little_with_our_drop_in(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name.replace("-openinfra.conf", ".service")
    unit.write_text(f"[Service]\n{DROP_INS[name]}")
    assert read_exposure(unit) > 8
    unit.write_text(f"[Service]\n{DROP_INS[name]}{(SYSTEMD / name).read_text()}")
    assert read_exposure(unit) <= HELPERS


def test_the_daemon_has_the_directives_of_the_design() -> None:
    lines = (SYSTEMD / "openinfra-cp.service").read_text().splitlines()
    assert [line for line in DIRECTIVES.split() if line not in lines] == []


# Units of others that ours name, by our units.
BESIDE = {
    OWN_UNITS: ("postgresql.service", "wg-quick@wg0.service", "nftables.service"),
    (*HOST_UNITS, *ENGINE_UNITS): ("wg-quick@.service", "var-lib-openinfra.mount"),
}


# design.md, section 8: with a bridge or rules of its own it would break the provider's Docker.
ENGINE_FLAGS = (
    "--iptables=false",
    "--ip6tables=false",
    "--ip-masq=false",
    "--bridge=ox-engine",  # "none" removes the provider's docker0
    "--userns-remap=openinfra-engine",
    "--host=unix:///run/openinfra/engine.sock",
)


def test_the_engine_is_as_the_design_has_it() -> None:
    unit = (SYSTEMD / "openinfra-engine.service").read_text()
    flags = re.findall(r"--[a-z0-9-]+=\S+", unit)
    assert [flag for flag in ENGINE_FLAGS if flag not in flags] == []
    settings = json.loads((SYSTEMD / "openinfra-engine.json").read_text())
    assert settings["live-restore"] is True
    assert settings["group"] == "root"
    # Nothing of it lies where the provider's Docker or containerd has something.
    places = [settings[key] for key in ("data-root", "exec-root", "pidfile")]
    kept = (SYSTEMD / "openinfra-containerd.toml").read_text()
    places += re.findall(r'(?m)^(?:root|state|address) = "(.+)"$', kept)
    assert len(places) == 6
    assert {place.rpartition("/")[0] for place in places} == (
        {"/var/cache/openinfra", "/run/openinfra-engine"}
    )
    assert '"io.containerd.grpc.v1.cri"' in kept  # it would listen on TCP


@pytest.mark.parametrize("name", ENGINE_UNITS[:2])
def test_the_engine_has_no_mounts_of_its_own(name: str) -> None:
    """A restarted dockerd would not see those of the workloads that go on (live-restore)."""
    text = (SYSTEMD / name).read_text()
    own = r"(?m)^(?:Private|Protect|Read|Inaccessible|Temporary|BindP|BindR|Root)\w*=.*"
    assert re.findall(own, text) == []
    assert "KillMode=process\n" in text


@pytest.mark.parametrize("names", BESIDE)
def test_systemd_understands_the_units(names: tuple[str, ...], tmp_path: Path) -> None:
    """With commands and users that are on this machine in place of those on another."""
    for name in names:
        text = (SYSTEMD / name).read_text()
        text = re.sub(r"(?m)^(ExecStart(?:Pre)?=\+?-?)\S+", r"\1/bin/true", text)
        (tmp_path / name).write_text(re.sub(r"(?m)^((?:Socket)?Group|User)=openinfra$", "", text))
    for name in BESIDE[names]:
        text = "[Mount]\nWhat=/dev/mapper/openinfra_data\nWhere=/var/lib/openinfra\n"
        text = text if name.endswith(".mount") else "[Service]\nExecStart=/bin/true\n"
        (tmp_path / name).write_text(text)
    argv = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in names)]
    env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("tls", ["acme", "internal"])
def test_caddy_understands_its_file(tls: str, tmp_path: Path) -> None:
    template = (SYSTEMD / "Caddyfile").read_bytes()
    made = render_caddyfile(template, "cp.example.org", tls)
    assert b"@HOSTNAME@" not in made
    assert (b"\ttls internal\n" in made) == (tls == "internal")
    (tmp_path / "Caddyfile").write_bytes(made)
    argv = ["caddy", "validate", "--adapter=caddyfile", f"--config={tmp_path / 'Caddyfile'}"]
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    formatted = subprocess.run(
        ["caddy", "fmt", str(tmp_path / "Caddyfile")], capture_output=True, check=True
    )
    assert formatted.stdout == made


def test_the_firewall_is_of_one_table_and_says_what_it_opens() -> None:
    """That the kernel takes it, and what it does then, is seen in tests/e2e/test_vps.py."""
    text = render_nft((SYSTEMD / "cp.nft").read_bytes(), b"", []).decode()
    assert set(re.findall(r"(?m)^(?:delete )?table (\S+ \S+)", text)) == {"inet openinfra_cp"}
    assert text.count("policy drop") == 1
    assert f"--file {NFT}" in (SYSTEMD / "openinfra-firewall.service").read_text()
    assert shutil.which("systemd-analyze"), "install systemd"
    assert Path("/etc/systemd/system") == UNITS
