"""setup_cp.py on real machines: a fresh Debian becomes the control plane, and stays it."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from systemd.setup_cp import parse_schema
from tests.e2e.network import Network
from tests.e2e.scripts import run_killed, said, wait_table
from tests.e2e.vm import Vm
from tests.e2e.vps import (
    CHECKOUT,
    CURL,
    HOSTNAME,
    INTERNAL,
    SCRIPT,
    Vps,
    prepare,
    probe,
    setup,
)
from tests.harness import read_seed, wait_for
from tests.readme import block

MakeVm = Callable[..., Vm]

MODES = {
    "/etc/openinfra": "755 root:root",
    "/etc/openinfra/cp": "700 root:root",
    "/etc/openinfra/cp/dsn": "600 root:root",
    "/etc/openinfra/cp/jwt-keys.json": "600 root:root",
    "/etc/openinfra/cp/owner-dsn": "600 root:root",
    "/etc/openinfra/cp.env": "644 root:root",
    "/etc/openinfra/release": "700 root:root",
    "/etc/wireguard/wg0.conf": "600 root:root",
    "/opt/openinfra": "755 root:root",
    "/opt/openinfra/cp_server.py": "755 root:root",
    "/srv/openinfra/dist/release.json": "644 root:root",
    "/usr/local/bin/openinfra-cp": "755 root:root",
}
# What Caddy answers on https, without a token.
ROUTES = {
    "/": 404,
    "/api/v1/admin/hosts": 401,
    "/api/v1/openapi.json": 200,
    "/dist/": 404,
    "/dist/../cp.env": 404,
    "/dist/openinfra-agent-linux-x86_64": 200,
    "/dist/release.json": 200,
    "/dist/release.json.sig": 200,
    "/dist/release.pub": 200,
    "/healthz": 404,
    "/install_agent.py": 200,
    "/metrics": 404,
    "/readyz": 404,
    "/setup_luks2.py": 200,
    "/v2/": 401,
    "/v2/_catalog": 401,
}


@pytest.fixture
def cp(make_vm: MakeVm, vps: Vps) -> Vm:
    """A control plane of this test's own."""
    made: Vm = make_vm("cp", snapshot=vps.snapshot)
    return made


def test_a_fresh_debian_becomes_the_control_plane(cp: Vm, vps: Vps) -> None:
    print(f"setup_cp.py took {vps.seconds:.0f} s")
    listing = cp.sh(f"stat -c '%n %a %U:%G' {' '.join(MODES)}").splitlines()
    assert dict(line.split(" ", 1) for line in listing) == MODES
    paths = " ".join(ROUTES)
    code = f"{CURL} -o /dev/null -w '%{{http_code}}\\n' --path-as-is https://{HOSTNAME}$path"
    found = cp.sh(f"for path in {paths}; do {code}; done").split()
    assert dict(zip(ROUTES, map(int, found), strict=True)) == ROUTES
    assert cp.sh("curl -s 127.0.0.1:5000/v2/").strip() == "{}"
    assert cp.sh(
        f"curl -s -o /dev/null -w '%{{redirect_url}}' -H 'Host: {HOSTNAME}' 127.0.0.1/x"
    ) == (f"https://{HOSTNAME}/x")
    assert cp.sh("systemctl --failed --no-legend") == ""
    assert "invariants hold" in cp.sh("openinfra-cp doctor --invariants")
    assert cp.sh("runuser -u postgres -- psql -Atc 'SHOW server_encoding' openinfra") == "UTF8\n"
    # No role may more than it must, and nobody but ours may connect.
    roles = cp.sh("cd /; runuser -u postgres -- psql -Atc '\\du'")
    assert {line.split("|")[0]: line.split("|")[1] for line in roles.splitlines()}["root"] == ""


def test_what_it_prints_works_as_printed(cp: Vm, vps: Vps) -> None:
    printed = vps.first.text
    key = re.search(r"public key: (\S+)", printed)
    assert key
    assert key[1] == cp.sh("wg show wg0 public-key").strip()
    assert f"{HOSTNAME}:51820" in printed
    digest = re.search(r"sha256: ([0-9a-f]{64})", printed)
    assert digest
    assert cp.sh("sha256sum /etc/openinfra/ca.crt").split()[0] == digest[1]
    cp.sh(f"echo 127.0.0.1 {HOSTNAME} >> /etc/hosts")
    token = re.search(r"ADMIN_JWT=\S+", printed)
    command = printed[printed.index("  curl ") :]
    assert token
    invite = cp.sh(f"{token[0]}\n{command}")
    assert re.fullmatch(r"oi1_[a-z2-7]{16}_[\w-]{43}_[0-9a-f]{8}\n", invite)
    hosts = cp.sh(
        f'{token[0]}\ncurl -sS --cacert /etc/openinfra/ca.crt "https://{HOSTNAME}/api/v1/admin/hosts?'
        'limit=100" -H "Authorization: Bearer $ADMIN_JWT"'
    )
    assert json.loads(hosts)["hosts"] == []
    # A new signing key, once the service has it; the token of before stays good.
    fresh = cp.sh("openinfra-cp token --new-key; systemctl restart openinfra-cp").strip()
    url = f"https://{HOSTNAME}/api/v1/admin/hosts"
    for jwt in (fresh, token[0][10:]):
        cp.sh(
            f"curl -sSf --retry 9 --retry-connrefused --cacert /etc/openinfra/ca.crt {url} "
            f"-H 'Authorization: Bearer {jwt}'"
        )
    # Secrets are in their files and nowhere in a log.
    cp.sh(f"curl -sk 'https://{HOSTNAME}/x?token=canary-query' -H 'X-Key: canary-header' || true")
    cp.sh("systemctl stop openinfra-cp")
    cp.sh(f'{token[0]}\ncurl -sk https://{HOSTNAME}/api/x -H "Authorization: Bearer $ADMIN_JWT"')
    log = cp.sh("journalctl --no-pager -o cat; cat /var/log/postgresql/*")
    assert '"uri":"/x?-"' in log
    assert '"status":502' in log
    secret = cp.sh("sed -n 's/.*password=//p' /etc/openinfra/cp/owner-dsn").strip()
    for canary in (token[0][10:], invite.strip(), "canary-query", "canary-header", secret):
        assert canary
        assert canary not in log
        assert canary not in said(vps.first)


def test_nothing_listened_to_the_world_at_any_moment_of_it(vps: Vps) -> None:
    wide = {(host, port) for host, port in vps.listened if not host.startswith(("127.", "::1"))}
    assert wide == {("::", 80), ("::", 443), ("10.77.0.1", 9092)}


# Units that must not restart when there is nothing to do.
RUNNING = (
    "openinfra-cp caddy docker-registry postgresql@15-main wg-quick@wg0 openinfra-firewall.timer"
)
# All that the script lays, but the time at which a file was read.
TREES = "/etc /opt /srv /usr/local /srv/registry /var/lib/caddy"
FILES = f"find {TREES} -xdev -printf '%p %y %m %U %s %T@ %i\\n' | sort"


def read_runs(vm: Vm) -> dict[str, str]:
    """Which run of each unit this is."""
    told = vm.sh(f"systemctl show -p Id,InvocationID {RUNNING}").split("\n\n")
    pairs = [dict(line.split("=", 1) for line in block.splitlines()) for block in told]
    return {each["Id"].removesuffix(".service"): each["InvocationID"] for each in pairs}


def check_nothing_to_do(vm: Vm, *arguments: str) -> float:
    """The command changes no file and restarts nothing; how long it took."""
    before = read_runs(vm), vm.sh(FILES)
    started = time.monotonic()
    done = setup(vm, *(arguments or INTERNAL))
    seconds = time.monotonic() - started
    assert (done.code, said(done).splitlines()[-1]) == (0, "setup_cp: nothing to do")
    assert (read_runs(vm), vm.sh(FILES)) == before
    print(f"a run with nothing to do took {seconds:.1f} s")
    return seconds


@pytest.mark.alone
def test_a_second_run_changes_nothing(cp: Vm) -> None:
    seconds = check_nothing_to_do(cp)
    check_nothing_to_do(cp, INTERNAL[0])  # without --tls: as it is
    # Without --dist: the release that is there stays.
    assert min(seconds, check_nothing_to_do(cp, *INTERNAL[:2])) <= 10
    # The document's way to add a peer rewrites the file that the script made.
    made = cp.get("/etc/wireguard/wg0.conf")
    key = cp.sh("wg genkey | wg pubkey").strip()
    cp.sh(f"wg set wg0 peer {key} allowed-ips 10.77.0.42/32; wg-quick save wg0")
    saved = cp.get("/etc/wireguard/wg0.conf")
    assert saved != made
    check_nothing_to_do(cp)
    assert cp.get("/etc/wireguard/wg0.conf") == saved
    assert key in cp.sh("wg show wg0 allowed-ips")
    assert setup(cp, *INTERNAL, "--dry-run").text == "nothing to do\n"


def test_without_a_release_one_is_made_and_signed_here(cp: Vm) -> None:
    cp.sh("rm -r /srv/openinfra/dist/*")
    done = setup(cp, *INTERNAL[:2])
    assert done.code == 0
    assert "release/key.pem signs what every host runs: move it to your own computer" in said(done)
    assert cp.sh("stat -c '%a %U' /etc/openinfra/release/key.pem").split() == ["600", "root"]
    daemon = ["setpriv", "--reuid=openinfra", "--clear-groups", "--"]
    assert cp.exec([*daemon, "cat", "/etc/openinfra/release/key.pem"]).code == 1
    cp.sh(
        "cd /srv/openinfra/dist; openssl pkeyutl -verify -pubin -inkey release.pub -rawin "
        "-in release.json -sigfile release.json.sig; ./openinfra-agent-linux-x86_64 --version; "
        f"{CURL} -f https://{HOSTNAME}/dist/openinfra-agent-linux-aarch64 | cmp - *-x86_64"
    )
    check_nothing_to_do(cp, *INTERNAL[:2])


def test_what_was_changed_is_mended_and_the_rest_left_alone(cp: Vm) -> None:
    key = cp.sh("wg genkey | wg pubkey").strip()
    cp.sh(f"wg set wg0 peer {key} allowed-ips 10.77.0.42/32; wg-quick save wg0")
    # Without the firewall there is no hub, and with it again there is.
    cp.sh("systemctl stop wg-quick@wg0; cp /etc/openinfra/cp.nft /root/")
    cp.sh("echo nonsense >> /etc/openinfra/cp.nft")
    assert cp.exec(["systemctl", "start", "wg-quick@wg0"]).code
    assert cp.exec(["ip", "link", "show", "wg0"]).code
    cp.sh("mv /root/cp.nft /etc/openinfra/; systemctl reset-failed; systemctl start wg-quick@wg0")
    cp.sh("ip link show wg0")
    before = read_runs(cp)
    cp.sh(
        "echo '# edited' >> /etc/openinfra/Caddyfile; chmod 644 /etc/openinfra/cp/dsn; "
        "systemctl disable --now docker-registry; ip link delete wg0; "
        "rm /usr/local/bin/openinfra-cp; cd /; runuser -u postgres -- psql -c 'DROP ROLE root'"
    )
    planned = setup(cp, *INTERNAL, "--dry-run")
    assert cp.exec(["test", "-e", "/usr/local/bin/openinfra-cp"]).code == 1
    assert len(planned.text.splitlines()) == 8, planned.text
    done = setup(cp, *INTERNAL)
    assert (done.code, said(done).splitlines()[-1]) == (0, "setup_cp: done")
    after = read_runs(cp)
    restarted = {name for name in before if before[name] != after[name]}
    assert restarted == {"caddy", "docker-registry", "wg-quick@wg0"}
    assert key in cp.sh("wg show wg0 allowed-ips")
    assert cp.sh("openinfra-cp hosts").startswith("HOST")
    check_nothing_to_do(cp)


def test_a_full_registry_leaves_the_database_its_disk(cp: Vm) -> None:
    free = "df --output=avail -B1M /var/lib/postgresql | sed -n 2p"
    before = int(cp.sh(free))
    daemon = ["setpriv", "--reuid=docker-registry", "--clear-groups", "--"]
    done = cp.exec([*daemon, "dd", "if=/dev/zero", "of=/srv/registry/x", "bs=1M"], timeout_s=300)
    assert done.code == 1
    assert int(cp.sh("df --output=avail -B1M /srv/registry | sed -n 2p")) == 0
    assert abs(int(cp.sh(free)) - before) < 100
    assert cp.sh("openinfra-cp doctor --invariants").endswith("invariants hold\n")
    # Without its disk the registry does not run, and writes to no other.
    cp.sh("rm /srv/registry/x; systemctl stop srv-registry.mount")
    assert cp.exec(["systemctl", "is-active", "docker-registry"]).text == "inactive\n"
    done = setup(cp, *INTERNAL)
    assert (done.code, said(done).splitlines()[-1]) == (0, "setup_cp: done")
    assert cp.sh("systemctl is-active docker-registry srv-registry.mount").split() == ["active"] * 2
    check_nothing_to_do(cp)


LAN, ELSEWHERE = "192.0.2.1", "198.51.100.2"
PORTS = (22, 80, 443, 2019, 5000, 5432, 8080, 9092, 9999)
# Others than ours that listen to every address: the firewall is what they are kept behind.
SERVERS = "".join(
    f"systemd-run -q --unit=any{port} python3 -m http.server {port}\n" for port in (22, 9999)
)


def make_host(vm: Vm, cp: Vm, number: int, namespace: str = "") -> None:
    """A host's end of the tunnel that sends all it can into it; in a namespace, or not."""
    name = f"wg{number}"
    key = vm.sh(f"wg genkey | tee /root/{name} | wg pubkey").strip()
    cp.sh(f"wg set wg0 peer {key} allowed-ips 10.77.0.{number}/32")
    hub = cp.sh("wg show wg0 public-key").strip()
    inside = f"ip -n {namespace}" if namespace else "ip"
    move = f"ip link set {name} netns {namespace}; ip -n {namespace} link set lo up"
    vm.sh(
        f"ip link add {name} type wireguard; wg set {name} private-key /root/{name} peer {hub} "
        f"allowed-ips 10.77.0.0/16,198.51.100.0/24 endpoint {LAN}:51820 persistent-keepalive 5\n"
        f"{move if namespace else 'true'}\n"
        f"{inside} address add 10.77.0.{number}/32 dev {name}; {inside} link set {name} up\n"
        f"{inside} route add 10.77.0.0/16 dev {name}; {inside} route add 198.51.100.0/24 dev {name}"
    )


@pytest.mark.alone
def test_what_can_be_reached(cp: Vm, make_vm: MakeVm, network: Network) -> None:
    """From its LAN, through the tunnel, and from host to host; and without the firewall."""
    home = make_vm("home")
    cp.join(network, f"{LAN}/24")
    home.join(network, "192.0.2.2/24")
    cp.sh(SERVERS)
    wait_for(
        "the servers", lambda: cp.sh("ss -Hltn 'sport = 22 or sport = 9999'").count("\n") == 2, 60
    )
    wanted = dict.fromkeys(PORTS, "silent") | {22: "open", 80: "open", 443: "open"}
    assert probe(home, LAN, *PORTS) == wanted
    # Linux answers for the address of wg0 on every interface.
    home.sh(f"ip route add 10.77.0.1 via {LAN}")
    assert probe(home, "10.77.0.1", 9092, 9999) == {9092: "silent", 9999: "silent"}
    cp.sh("systemctl stop openinfra-firewall.timer; nft flush ruleset")
    without = probe(home, "10.77.0.1", 9092, 9999)
    # The daemon's unit has a lock of its own on :9092 (IPAddressDeny); 9999 has none.
    assert without == {9092: "silent", 9999: "open"}, "this test would see nothing"
    cp.sh("systemctl start openinfra-firewall.timer")
    wait_table(cp, "openinfra_cp")
    cp.sh("nft flush ruleset")
    seconds = wait_table(cp, "openinfra_cp")
    print(f"the firewall was back {seconds:.1f} s after a flush")
    assert seconds <= 15
    assert probe(home, "10.77.0.1", 9092, 9999) == {9092: "silent", 9999: "silent"}
    home.sh("ip route delete 10.77.0.1; ip netns add other")
    # Two hosts that do not keep to AllowedIPs, on a hub that forwards by sysctl.
    make_host(home, cp, 42)
    make_host(home, cp, 43, "other")
    cp.sh(
        "sysctl -qw net.ipv4.ip_forward=1; ip netns add lan; ip link add lan0 type veth peer lan1 "
        f"netns lan; ip address add 198.51.100.1/24 dev lan0; ip link set lan0 up\n"
        f"ip -n lan address add {ELSEWHERE}/24 dev lan1; ip -n lan link set lan1 up\n"
        "ip -n lan route add default via 198.51.100.1"
    )
    home.sh("ping -c 2 -W 5 10.77.0.1; ip netns exec other ping -c 2 -W 5 10.77.0.1")
    wanted = dict.fromkeys(PORTS, "silent") | {9092: "open"}
    assert probe(home, "10.77.0.1", *PORTS) == wanted
    assert probe(home, "10.77.0.1", *PORTS, namespace="other") == wanted

    def reaches() -> list[bool]:
        """Host to host, host to the hub's LAN, LAN to host."""
        ping = "ping -c 1 -W 2"
        lines = [f"{ping} 10.77.0.43", f"{ping} {ELSEWHERE}"]
        codes = [home.exec(["bash", "-c", line]).code for line in lines]
        codes.append(cp.exec(["bash", "-c", f"ip netns exec lan {ping} 10.77.0.42"]).code)
        return [code == 0 for code in codes]

    assert reaches() == [False] * 3
    cp.sh("systemctl stop openinfra-firewall.timer; nft delete table inet openinfra_cp")
    assert reaches() == [True] * 3, "this test would see nothing"
    cp.sh("systemctl start openinfra-firewall.timer")
    assert wait_table(cp, "openinfra_cp") <= 15
    assert reaches() == [False] * 3
    # What goes through the tunnel to :9092, and the tunnel itself, fills no table of connections.
    tracked = cp.sh("cat /proc/net/nf_conntrack 2>/dev/null || conntrack -L 2>/dev/null || true")
    assert not re.search(r"dport=(9092|51820) ", tracked)


def test_a_reboot_brings_all_back(cp: Vm) -> None:
    key = cp.sh("wg genkey | wg pubkey").strip()
    cp.sh(f"wg set wg0 peer {key} allowed-ips 10.77.0.42/32; wg-quick save wg0")
    token = cp.sh("openinfra-cp token").strip()
    cp.reboot()
    started = time.monotonic()
    ask = f"{CURL} -f https://{HOSTNAME}/api/v1/admin/hosts -H 'Authorization: Bearer {token}'"
    wait_for("the API", lambda: cp.exec(["bash", "-c", ask]).code == 0, 60)
    print(f"the API answered {time.monotonic() - started:.1f} s after all units were up")
    assert cp.sh("systemctl --failed --no-legend") == ""
    assert key in cp.sh("wg show wg0 allowed-ips")
    assert "policy drop" in cp.sh("nft list table inet openinfra_cp")
    assert cp.sh("curl -s 127.0.0.1:5000/v2/").strip() == "{}"
    check_nothing_to_do(cp)


def test_what_is_in_the_way_is_named_and_nothing_changed(make_vm: MakeVm, tmp_path: Path) -> None:
    vm = make_vm("other")
    prepare(vm, tmp_path)
    vm.sh("".join(f"systemd-run -q --unit=any{n} python3 -m http.server {n}\n" for n in (80, 5432)))
    vm.sh(
        "setsid python3 -m http.server 443 > /dev/null 2>&1 < /dev/null &\n"
        "ip link add wg9 type wireguard; wg set wg9 listen-port 51820; ip link set wg9 up\n"
        "ip link add lan0 type dummy; ip address add 10.77.5.1/24 dev lan0; ip link set lan0 up"
    )
    conf = b"[Interface]\nAddress = 10.9.0.1/24\nListenPort = 51820\nPrivateKey = x\n"
    vm.put(conf, "/etc/wireguard/wg0.conf", 0o600)
    vm.sh("fallocate -l 3400M /var/filler")
    wait_for("the servers", lambda: vm.sh("ss -Hltn").count("\n") >= 3, 60)
    before = vm.sh(FILES.replace("/srv/registry /var/lib/caddy", "/var/lib/dpkg"))
    done = setup(vm, f"--hostname={HOSTNAME}")
    assert done.code == 3
    told = said(done)
    for sentence in (
        "port 80/tcp is taken by python3 (pid ",
        "systemctl disable --now any80.service",
        "port 443/tcp is taken by python3 (pid ",
        "port 5432/tcp is taken by python3 (pid ",
        "port 51820/udp is taken by the kernel",
        "a part of 10.77.0.0/16 is in use here: 10.77.5.0/24 on lan0",
        "/etc/wireguard/wg0.conf was made by someone else: its Address is 10.9.0.1/24",
        "MB of disk are free, 3072 are needed",
        f"{HOSTNAME} has no address in DNS",
        "nothing was changed",
    ):
        assert sentence in told
    after = vm.sh(FILES.replace("/srv/registry /var/lib/caddy", "/var/lib/dpkg"))
    assert after == before
    # One by one, on a machine that is free otherwise.
    vm.sh("systemctl stop any80 any5432; pkill -f '[h]ttp.server 443'; ip link delete wg9")
    vm.sh("ip link delete lan0; rm /var/filler /etc/wireguard/wg0.conf")
    assert setup(vm, *INTERNAL, "--dry-run").code == 0
    vm.sh("ip link add wg0 type wireguard")
    done = setup(vm, *INTERNAL)
    assert (done.code, "a wg0 made by someone else" in said(done)) == (3, True)
    vm.sh("ip link delete wg0; modprobe -r wireguard")
    vm.sh("mv $(modinfo -n wireguard) /root/; depmod; date -s 2019-01-01")
    done = setup(vm, *INTERNAL)
    assert done.code == 1
    assert "this kernel has no WireGuard" in said(done)
    assert "the clock is wrong, it says 2019-01-01" in said(done)
    vm.sh(f"cp {SCRIPT} /run/")  # nobody reads what is in /root
    argv = ["setpriv", "--reuid=65534", "--clear-groups", "--", "python3", "/run/setup_cp.py"]
    done = vm.exec([*argv, *INTERNAL])
    assert (done.code, "this needs root; run: sudo" in said(done)) == (1, True)


def test_a_newer_checkout_upgrades_and_an_older_one_is_refused(cp: Vm) -> None:
    before = read_runs(cp)
    text = cp.get(f"{CHECKOUT}/cp_server.py").decode()
    newest = parse_schema(text.encode())
    one_more = f'    ({newest + 1}, "made up", "CREATE TABLE made_up (x integer)"),\n'
    newer, count = re.subn(r"(?m)^(?=\)\nSCHEMA_VERSION)", one_more, text)
    assert count == 1
    newer = newer.replace('VERSION = "0.1.0"', 'VERSION = "0.2.0"', 1)
    cp.sh(f"cp -r {CHECKOUT} /root/newer")
    cp.put(newer.encode(), "/root/newer/cp_server.py", 0o755)
    done = cp.exec(["/root/newer/systemd/setup_cp.py", *INTERNAL], timeout_s=120)
    print(said(done))
    assert done.code == 0
    assert "/dist/ serves release 0.1.0, this checkout is 0.2.0" in said(done)
    after = read_runs(cp)
    assert {name for name in before if before[name] != after[name]} == {"openinfra-cp"}
    assert "version=0.2.0" in cp.sh("journalctl -u openinfra-cp --no-pager -o cat")
    assert cp.exec(["/root/newer/systemd/setup_cp.py", *INTERNAL, "--dry-run"]).text == (
        "nothing to do\n"
    )
    files = cp.sh(FILES)
    done = setup(cp, *INTERNAL)
    assert done.code == 3
    assert "version 0.2.0 runs here, this checkout is 0.1.0; get a newer checkout" in said(done)
    assert f"the database has schema {newest + 1}, this checkout knows only {newest}" in said(done)
    assert (cp.sh(FILES), read_runs(cp)) == (files, after)


def test_without_a_certificate_it_says_what_is_missing(cp: Vm) -> None:
    """README's command, with ACME, where no certificate authority can be reached."""
    cp.sh(f"echo 127.0.0.1 {HOSTNAME} >> /etc/hosts; rm /etc/openinfra/Caddyfile")
    script = f"cd {CHECKOUT}\n" + block("operator-vps")
    done = cp.exec(["bash", "-euc", script], timeout_s=200)
    assert done.code == 0, said(done)
    assert "note: https does not answer" in said(done)
    assert f"ports 80 and 443 of {HOSTNAME}" in said(done)
    assert "--cacert" not in done.text
    assert cp.sh("grep -c 'tls internal' /etc/openinfra/Caddyfile || true").strip() == "0"


CUTS = int(os.environ.get("OPENINFRA_CUTS", "6"))
SEED = read_seed()
# A machine on which only the packages are, and of these not the two that are small.
BLANK = """
systemctl disable -q --now openinfra-firewall.timer openinfra-firewall openinfra-cp wg-quick@wg0 \
  caddy docker-registry srv-registry.mount
cd /
runuser -u postgres -- psql -qc 'DROP DATABASE openinfra' -c 'DROP ROLE root' \
  -c 'DROP ROLE openinfra' -c 'DROP ROLE openinfra_owner'
nft delete table inet openinfra_cp
userdel openinfra
apt-get -qy purge caddy docker-registry > /dev/null 2>&1
rm -rf /etc/openinfra /opt/openinfra /srv/openinfra /etc/wireguard/wg0.conf /var/lib/caddy \
  /etc/systemd/system/openinfra-* /etc/systemd/system/caddy.service.d \
  /etc/systemd/system/docker-registry.service.d /usr/local/bin/openinfra-cp \
  /etc/systemd/system/srv-registry.mount /srv/registry /var/lib/openinfra-registry.img
systemctl daemon-reload
"""


def read_steps(cp: Vm) -> list[str]:
    """What is left to do."""
    planned = setup(cp, *INTERNAL, "--dry-run")
    assert planned.code == 0, (SEED, said(planned))
    return [line.partition("  # ")[0] for line in planned.text.splitlines()]


def list_cuts(cp: Vm, chance: random.Random) -> Iterator[tuple[str, float, str]]:
    """At which step to kill, after how long, and whether with its children."""
    for number in range(CUTS):
        steps = read_steps(cp)
        # From the first steps to the last, so that each run leaves something for the next.
        step = steps[chance.randrange(max(1, len(steps) // max(1, CUTS - number)))]
        if number == 1 and any(each.startswith("install these") for each in steps):
            yield "+ apt-get install", round(chance.uniform(2, 15), 2), "1"
        else:
            yield step, round(chance.uniform(0, 3), 2), chance.choice("01")
    done: set[str] = set()
    while not CUTS and (left := [step for step in read_steps(cp) if step not in done]):
        done.add(left[0])
        if left[0] != "nothing to do":
            yield left[0], round(chance.uniform(0, 0.2), 2), chance.choice("01")


def test_kill_9_at_any_step_and_the_same_command_again(cp: Vm) -> None:
    """Each run is killed at one of the steps that are left, with its children or without.

    OPENINFRA_CUTS=0 takes all steps, one after the other, which takes many minutes.
    """
    cp.sh(BLANK, timeout_s=300)
    codes = []
    for number, (step, delay_s, whole) in enumerate(list_cuts(cp, random.Random(SEED))):
        code = run_killed(cp, step, delay_s, whole, SCRIPT, *INTERNAL, timeout_s=400)
        print(f"kill {number}: {step}, {delay_s} s, whole group: {whole}: {code}")
        codes.append(code)
    done = setup(cp, *INTERNAL)
    assert done.code == 0, (SEED, said(done))
    check_nothing_to_do(cp)
    listing = cp.sh(f"stat -c '%n %a %U:%G' {' '.join(MODES)}").splitlines()
    assert dict(line.split(" ", 1) for line in listing) == MODES
    assert cp.sh(
        f"{CURL} -f -o /dev/null -w '%{{http_code}}' https://{HOSTNAME}/dist/release.json"
    ) == ("200")
    assert cp.sh(
        "ls -A /opt/openinfra /etc/openinfra /srv/openinfra/dist | grep -c new || true"
    ) == ("0\n")
    assert "invariants hold" in cp.sh("openinfra-cp doctor --invariants")
    assert "-9" in codes, codes
