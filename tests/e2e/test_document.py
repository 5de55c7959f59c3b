"""The onboarding document, sections 1 to 5, on two real machines, typed as it prints them.

The rest of it, reboots and the recovery table, is in test_fleet.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.e2e import disk
from tests.e2e.fleet import (
    CP_LAN,
    ENV_FILE,
    HOME_LAN,
    Operator,
    doctor,
    find_server,
    read_log,
    read_time,
    trust,
    wait_log,
)
from tests.e2e.home import ADDRESS
from tests.e2e.network import Network
from tests.e2e.vm import Vm
from tests.e2e.vps import HOSTNAME, Vps
from tests.harness import ROOT, WALLET, wait_for
from tests.readme import block

MakeVm = Callable[..., Vm]
pytestmark = pytest.mark.alone
# How long the agent waits for its peer; an hour was tried too.
WAIT_S = float(os.environ.get("OPENINFRA_PEER_WAIT_S", "20"))
INSTALL_S = 60.0  # "a minute", with a container engine that starts in it
PEER_S = 8.0  # from `wg set` to the first accepted heartbeat
LOOK = """
sudo systemctl status openinfra-agent
sudo journalctl -u openinfra-agent --since "5 min ago" --output=cat
sudo wg show openinfra
"""
# Where a shell, a daemon or a crash might have left the invite.
LEFT = (
    "cat /var/log/postgresql/* /root/.bash_history 2>/dev/null; journalctl --no-pager -o export; "
    "find / -xdev -name 'core*' -type f -size +1M; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline"
)


def answer(home: Vm, question: str, text: str) -> float:
    """Type an answer, once the echo of a secret one is off; how long the question took to come."""
    began = time.monotonic()
    home.wait_console(question, 180)
    took_s = time.monotonic() - began
    print(f"{took_s:5.1f} s until: {question}")
    home.sh("sleep 0.3")
    home.type(f"{text}\n")
    return took_s


def type_block(home: Vm, name: str) -> None:
    """Type the lines of README's block; what they ask is left to be answered."""
    home.type(f"clear; {block(name).strip().replace(chr(10), ' && ')}; echo code=$?\n")


def encrypt(home: Vm) -> None:
    """Section 2; the disk is the document's /dev/sdb1."""
    home.put((ROOT / "setup_luks2.py").read_bytes(), disk.SCRIPT, 0o755)
    disk.attach(home, "data", serial=disk.SERIAL)
    home.sh(f"ln -s $(readlink -f {disk.PART}) /dev/sdb1")
    home.log_in()
    type_block(home, "provider-disk")
    answer(home, f"type {disk.SERIAL}: ", disk.SERIAL)
    answer(home, "New passphrase", disk.PASSPHRASE)
    answer(home, "The same again", disk.PASSPHRASE)
    answer(home, "recovery key? [Y/n]", "n")
    answer(home, "to which file?", "")
    home.wait_console("code=0")


def install(home: Vm, operator: Operator, token: str) -> tuple[str, float]:
    """Section 3; gives back the public key and the seconds that it took, without the typing."""
    cp_key = operator.vm.sh("wg show wg0 public-key").strip()
    type_block(home, "provider-scripts")
    home.sh("until pgrep -x less; do sleep 0.2; done")
    home.type("q")
    home.wait_console("code=0")
    type_block(home, "provider-install")
    took_s = 0.0
    for question, text in (
        ("Control plane public hostname", HOSTNAME),
        ("Control plane gRPC endpoint", ""),
        ("Invite token", token),
        ("Solana payout pubkey", WALLET),
        ("Control plane WireGuard endpoint", ""),
        ("Control plane WireGuard public key", cp_key),
        ("Your assigned WireGuard IP", ADDRESS),
    ):
        took_s += answer(home, question, text)
    began = time.monotonic()
    home.wait_console("code=0", 120)
    took_s += time.monotonic() - began
    print(f"{time.monotonic() - began:5.1f} s until the end")
    key = home.sh("cat /etc/wireguard/openinfra.pub").strip()
    assert key in home.console.text
    return key, took_s


def check_first_lines(lines: list[str], host_id: str) -> None:
    """Section 5's log lines, exactly."""
    control_plane = "control_plane=10.77.0.1:9092"
    assert lines[0].startswith(f"INFO agent starting {control_plane} ")
    said = [line for line in lines if line.startswith("INFO")]
    assert said[1:4] == [
        "INFO connected to control plane addr=10.77.0.1:9092",
        f"INFO registered with control plane host_id={host_id} onchain_payout=true",
        "INFO agent running, sending heartbeats every 30s",
    ]


def check_nowhere(vm: Vm, token: str) -> None:
    """The invite is nowhere on a machine, nor on its disk, where it was once; switches it off."""
    secret = token.split("_", 2)[2].rpartition("_")[0].encode()
    said = vm.exec(["bash", "-c", LEFT]).stdout
    assert len(said) > 10_000
    assert secret not in said
    vm.shutdown()
    with (vm.directory / "root.qcow2").open("rb") as file:
        last = b""
        while chunk := file.read(1 << 22):
            assert secret not in last + chunk, vm.name
            last = chunk[-len(secret) :]


def test_the_document(make_vm: MakeVm, network: Network, vps: Vps) -> None:
    cp = make_vm("cp", snapshot=vps.snapshot)
    home = make_vm("home")
    operator = Operator(cp)
    cp.join(network, f"{CP_LAN}/24")
    home.join(network, f"{HOME_LAN}/24")
    find_server(home)
    trust(home, operator.ca)

    # Sections 1 to 4.
    token = operator.mint()
    encrypt(home)
    key, install_s = install(home, operator, token)
    env = dict(line.split("=", 1) for line in home.sh(f"cat {ENV_FILE}").split())
    assert env == {
        "INVITE_TOKEN": token,
        "SOLANA_PAYOUT_PUBKEY": WALLET,
        "CONTROL_PLANE": "10.77.0.1:9092",
        "DATA_DIR": "/var/lib/openinfra",
    }
    assert home.sh(f"stat -c %a {ENV_FILE}").strip() == "600"

    # Row 1 of section 6: the peer is missing; both machines say so, and the action heals it.
    time.sleep(WAIT_S)
    assert "latest handshake" not in home.sh("sudo wg show openinfra")
    assert any("never completed a handshake" in found["sentence"] for found in doctor(home))
    assert operator.host() == {}
    began = float(cp.sh("date +%s.%N"))
    operator.add_peer(key)
    row = operator.wait_host("status", "online", 60)
    wait_log(home, "INFO agent running")
    peer_s = read_time(home, "INFO agent running") - began
    print(f"install_agent.py {install_s:.1f} s; from wg set, {WAIT_S:g} s later: {peer_s:.1f} s")
    host_id = str(row["host_id"])
    assert (row["hostname"], row["wg_ip"]) == ("home", ADDRESS)

    # Section 5.
    check_first_lines([x for x in read_log(home) if not x.startswith("WARN")], host_id)
    looked = home.sh(LOOK)
    for text in ("active (running)", "latest handshake", f"host_id={host_id}"):
        assert text in looked, text
    spent = f"INVITE_TOKEN={token[:20]}_used\n"
    wait_for("the token is gone", lambda: spent in home.sh(f"cat {ENV_FILE}"))
    home.sh("sudo systemctl restart openinfra-agent")
    resumed = f"INFO resuming with persisted host_id (skipping Register) host_id={host_id}"
    assert wait_log(home, "INFO resuming") == resumed
    operator.wait_host("status", "online")
    assert f"{host_id} " in cp.sh("openinfra-cp hosts")
    operator.check()
    check_nowhere(home, token)
    check_nowhere(cp, token)
    assert install_s <= INSTALL_S
    assert peer_s <= PEER_S
