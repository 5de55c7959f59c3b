"""A fleet of one home machine: reboots, the recovery table, both firewalls, revoking, a new VPS."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e import disk
from tests.e2e.fleet import (
    AGENT,
    CP_LAN,
    ENV_FILE,
    HOME_LAN,
    IDENTITY,
    Operator,
    doctor,
    find_server,
    join_fleet,
    read_log,
    read_run,
    wait_log,
)
from tests.e2e.home import ADDRESS, CA_FILE, TOKEN_FILE, give_token
from tests.e2e.home import install as run_installer
from tests.e2e.network import Network
from tests.e2e.scripts import said, wait_table
from tests.e2e.vm import Snapshot, Vm
from tests.e2e.vps import Vps, probe
from tests.harness import OTHER_WALLET, WALLET, wait_for
from tests.readme import block

MakeVm = Callable[..., Vm]
# Two machines to a test: beside others Caddy would give up on handshakes that take ten seconds.
pytestmark = pytest.mark.alone
GONE_S = 2.0  # for the peer of a revoked host
NEW_LAN = "192.0.2.3"
HOME_NET = "198.51.100"
DAY_S = 86_400
# A session is dead after 180 s, and the hub is compared each minute.
FORGOTTEN_S = 300
# The guard asks the name server once the last handshake is 150 s old, each 10 s.
FOLLOWED_S = 200


@pytest.fixture
def operator(make_vm: MakeVm, network: Network, vps: Vps) -> Operator:
    """The operator of a control plane without hosts."""
    cp = make_vm("cp", snapshot=vps.snapshot)
    cp.join(network, f"{CP_LAN}/24")
    return Operator(cp)


@pytest.fixture
def provider(make_vm: MakeVm, network: Network, home: Snapshot, operator: Operator) -> Vm:
    """A home machine that is about to install the agent."""
    vm: Vm = make_vm("home", snapshot=home)
    vm.join(network, f"{HOME_LAN}/24")
    find_server(vm)
    vm.put(operator.ca, CA_FILE)
    return vm


@pytest.fixture(autouse=True)
def _check(operator: Operator) -> Iterator[None]:
    """What must hold after every test."""
    yield
    if operator.vm.process:
        operator.check()


def resume(operator: Operator, home: Vm, host_id: str, timeout_s: float = 120) -> None:
    """It goes on as the host that it was, without a fresh invite."""
    line = f"INFO resuming with persisted host_id (skipping Register) host_id={host_id}"
    assert wait_log(home, "INFO resuming", timeout_s) == line
    wait_log(home, "INFO agent running", 120)
    assert operator.wait_host("status", "online")["host_id"] == host_id


def test_a_wallet_an_identity_and_the_way_out(operator: Operator, provider: Vm) -> None:
    """Rows 4 and 2 of the recovery table; then the provider looks, and leaves."""
    host_id = join_fleet(provider, operator, OTHER_WALLET, payout_pubkey=WALLET)
    home = provider

    def is_refused() -> None:
        """Online, but no workloads, and why."""
        row = operator.wait_host("assignable", False)
        assert row["status"] == "online"
        assert f"solana:{OTHER_WALLET}" in str(row["reasons"]), row
        wait_log(home, "WARN not assignable")

    # The provider mends it, and so does the operator.
    is_refused()
    home.sh(f"sed -i s/{OTHER_WALLET}/{WALLET}/ {ENV_FILE}; systemctl restart {AGENT}")
    assert operator.wait_host("assignable", True)["status"] == "online"
    home.sh(f"sed -i s/{WALLET}/{OTHER_WALLET}/ {ENV_FILE}; systemctl restart {AGENT}")
    is_refused()
    operator.say(
        "curl -fsS -X POST https://cp.coledex.com/api/v1/admin/namespaces/"
        f'solana:{OTHER_WALLET}/approve -H "Authorization: Bearer $ADMIN_JWT"'
    )
    assert operator.wait_host("assignable", True)["status"] == "online"
    wait_log(home, "INFO assignable")

    # The identity is gone: the agent ends, and the named place says why.
    wait_for("the token is gone", lambda: "_used\n" in home.sh(f"cat {ENV_FILE}"))
    home.sh(f"systemctl stop {AGENT}; rm {IDENTITY}")
    assert home.exec(["systemctl", "start", AGENT]).code != 0
    wait_log(home, "ERROR invite already used")
    found = doctor(home)
    assert any("fresh invite" in each["sentence"] for each in found), found
    give_token(home, operator.mint(payout_pubkey=OTHER_WALLET))
    done = run_installer(home, f"--token-file={TOKEN_FILE}")
    assert done.code == 0, said(done)
    wait_log(home, "INFO registered with control plane")
    wait_log(home, "INFO agent running")
    # From the same address with the same key: the same host, with all that it earned.
    assert operator.wait_host("status", "online")["host_id"] == host_id

    # README's commands of each day, and of the last.
    home.sh(f"rm {TOKEN_FILE}; cd /root\n" + block("provider-daily") + block("provider-pause"))
    home.sh("cd /root\n" + block("provider-leave"))
    assert home.exec(["systemctl", "cat", AGENT]).code == 1
    home.sh(f"test -e {IDENTITY}; ! ip link show openinfra 2>/dev/null")


def test_boots_and_a_revoked_host(operator: Operator, provider: Vm) -> None:
    """A boot without the disk (row 3), one with it, one of the VPS; and the end of a host."""
    host_id = join_fleet(provider, operator)
    cp, home = operator.vm, provider

    # The boot goes on, and the named place says why the disk is not there.
    away = disk.boot_without(home)
    disk.wait_given_up(home)
    assert home.exec(["systemctl", "is-active", AGENT]).code != 0
    assert home.exec(["touch", f"{disk.MOUNT_POINT}/file"]).code != 0
    found = doctor(home)
    assert any("locked or absent" in each["sentence"] for each in found), found
    home.attach_disk("data", serial=away.serial, path=away.path)
    home.sh(f"udevadm wait {disk.PART}")
    disk.put_script(home)
    assert disk.setup(home, *disk.AGAIN).code == 0
    resume(operator, home, host_id)

    disk.restart(home)
    assert home.exec(["systemctl", "is-active", AGENT]).code != 0
    disk.unlock_late(home)  # all that a person does
    resume(operator, home, host_id)
    assert home.sh("systemctl --failed --no-legend") == ""

    run = read_run(home)
    cp.reboot()
    began = time.monotonic()
    operator.wait_heartbeat()
    print(f"a heartbeat {time.monotonic() - began:.1f} s after the VPS was up")
    assert read_run(home) == run
    assert cp.sh("systemctl --failed --no-legend") == ""

    invite = operator.say(block("operator-vps-daily")).splitlines()[0]  # it keeps the address
    cp.sh(f"openinfra-cp revoke {host_id}")
    began = time.monotonic()
    cp.sh("while wg show wg0 peers | grep -q .; do sleep 0.05; done")
    gone_s = time.monotonic() - began
    print(f"the peer of a revoked host was gone after {gone_s:.2f} s")
    assert gone_s <= GONE_S
    assert operator.host()["status"] == "revoked"

    # The way back: a fresh invite and a new key; a host of its own beside the revoked one.
    give_token(home, invite)
    done = run_installer(home, "--new-invite", "--new-key", f"--token-file={TOKEN_FILE}")
    assert done.code == 0, said(done)
    operator.add_peer(home.sh("cat /etc/wireguard/openinfra.pub").strip())

    def hosts() -> dict[str, str]:
        rows = json.loads(cp.sh("openinfra-cp hosts --json"))["hosts"]
        return {row["status"]: row["host_id"] for row in rows}

    both = wait_for("online again", lambda: h if "online" in (h := hosts()) else None, 90)
    assert both["revoked"] == host_id != both["online"]
    assert host_id in home.sh(f"cat {IDENTITY}.replaced")


def test_a_clock_that_is_off(operator: Operator, provider: Vm) -> None:
    """The whole machine's, by a day and ten years: what its own grpcio and WireGuard make of it.

    The hub refuses a handshake that is earlier than the last one by the host's clock, until the
    control plane lets it forget that one.
    """
    host_id = join_fleet(provider, operator)
    for days in (-3650, -1, 1, 3650):
        provider.sh(f"date --set=@{time.time() + days * DAY_S:.0f}")
        operator.wait_heartbeat()  # the agent goes on
        provider.sh(f"systemctl restart wg-quick@openinfra; systemctl restart {AGENT}")
        began = time.monotonic()
        resume(operator, provider, host_id, FORGOTTEN_S)
        print(f"clock off by {days} days: back after {time.monotonic() - began:.1f} s")


def check_reach(operator: Operator, home: Vm) -> None:
    """From the VPS through the tunnel: no port, sshd's among them, and none of its LAN."""
    cp = operator.vm
    home.sh("apt-get -qq update; apt-get -qqy install openssh-server 2>&1", timeout_s=300)
    home.sh(
        "sysctl -qw net.ipv4.ip_forward=1; ip netns add lan; ip link add lan0 type veth peer lan1 "
        f"netns lan; ip address add {HOME_NET}.1/24 dev lan0; ip link set lan0 up\n"
        f"ip -n lan address add {HOME_NET}.7/24 dev lan1; ip -n lan link set lan1 up\n"
        f"ip -n lan route add default via {HOME_NET}.1\n"
        "ip netns exec lan python3 -m http.server 80 > /dev/null 2>&1 < /dev/null &"
    )
    (key,) = operator.peers()
    cp.sh(
        "systemctl stop openinfra-wg.socket openinfra-wg.service\n"  # it would take that back
        f"wg set wg0 peer {key} allowed-ips {ADDRESS}/32,{HOME_NET}.0/24\n"
        f"ip route add {HOME_NET}.0/24 dev wg0"
    )
    wait_for("sshd", lambda: "0.0.0.0:22 " in home.sh("ss -Hltn"))
    assert home.sh(f"until curl -sf {HOME_NET}.7 -o /dev/null; do sleep 0.5; done; ss -Hltn")

    def reached(*ports: int) -> list[str]:
        """Where something answered, be it with a refusal."""
        found = []
        for host in (ADDRESS, f"{HOME_NET}.1", f"{HOME_NET}.7"):
            for at in range(0, len(ports), 500):
                answers = probe(cp, host, *ports[at : at + 500])
                found += [f"{host}:{port}" for port, what in answers.items() if what != "silent"]
        return found

    assert reached(*range(1, 1001), 2375, 5000, 8080, 9092, 51820) == []
    # Not by stopping the guard: that takes the tunnel down.
    state = "systemctl show --value --property=ActiveState openinfra-guard"
    both = "openinfra-guard.timer openinfra-watch"
    home.sh(f"systemctl stop {both}; until {state} | grep -q inactive; do :; done")
    home.sh("nft delete table inet openinfra")
    without = {f"{ADDRESS}:22", f"{HOME_NET}.1:22", f"{HOME_NET}.7:80"}
    assert without <= set(reached(22, 80)), "this test would see nothing"
    home.sh(f"systemctl start {both}")
    wait_table(home, "openinfra")  # how soon: see test_units.py, which runs alone
    assert reached(22, 80) == []
    cp.sh(f"ping -c 1 -W 5 {ADDRESS}")  # ping may come in
    # Out of it the machine reaches the control plane, and nothing else of the VPS.
    assert probe(home, "10.77.0.1", 22, 80, 443, 5432, 8080, 9092) == {
        **dict.fromkeys((22, 80, 443, 5432, 8080), "silent"),
        9092: "open",
    }
    cp.sh(f"ip route delete {HOME_NET}.0/24 dev wg0; systemctl start openinfra-wg.socket")
    cp.sh(
        f"until wg show wg0 allowed-ips | grep -q '{ADDRESS}/32$'; do sleep 1; done", timeout_s=90
    )


def test_what_reaches_a_host_and_yesterdays_backup_on_a_new_vps(
    make_vm: MakeVm, network: Network, vps: Vps, operator: Operator, provider: Vm
) -> None:
    """README's commands; the host comes back with no action on its side."""
    host_id = join_fleet(provider, operator)
    cp, home = operator.vm, provider
    check_reach(operator, home)
    cp.sh(block("operator-backup"), timeout_s=120)
    kept, passphrase = cp.get("/root/cp.backup"), cp.get("/root/passphrase")
    # After the backup the host opened another session, of which the backup knows nothing.
    home.sh(f"systemctl restart {AGENT}")
    resume(operator, home, host_id)
    run = read_run(home)
    jwt = operator.jwt
    operator.check()
    cp.stop()

    new = make_vm("new", snapshot=vps.snapshot)
    new.join(network, f"{NEW_LAN}/24")
    new.put(kept, "/root/cp.backup", 0o600)
    new.put(b"not that passphrase\n", "/root/passphrase", 0o600)
    restore = block("operator-restore")
    refused = new.exec(["bash", "-euc", restore], timeout_s=120)
    assert refused.code == 1, said(refused)
    assert "passphrase" in said(refused)
    new.put(passphrase, "/root/passphrase", 0o600)
    new.sh(restore, timeout_s=120)
    find_server(home, NEW_LAN)  # the DNS
    began = time.monotonic()
    after = Operator(new)
    after.wait_heartbeat(FOLLOWED_S)
    print(f"a heartbeat {time.monotonic() - began:.1f} s after the name led to the new VPS")
    assert after.wait_host("status", "online")["host_id"] == host_id
    assert read_run(home) == run
    assert jwt != after.jwt
    after.jwt = jwt  # the signing keys are those of the backup
    assert after.host()["host_id"] == host_id
    assert not [line for line in read_log(home) if line.startswith("ERROR")]
    after.check()
