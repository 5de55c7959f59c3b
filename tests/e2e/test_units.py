"""The units of a host under live systemd, every directive on: agent, guard and its timer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.disk import restart, unlock_late
from tests.e2e.home import (
    ALL,
    HOST,
    TOKEN,
    give_token,
    install,
    make_key,
    make_release,
    make_tls,
    serve,
)
from tests.e2e.scripts import wait_table
from tests.e2e.vm import Snapshot, Vm

MakeVm = Callable[..., Vm]
pytestmark = pytest.mark.alone
AGENT_MAY_NOT = (
    "echo >> /etc/openinfra/installer/release.pub",
    "touch /etc/openinfra/installer/ca.pem",
    "mv /etc/openinfra/installer /etc/openinfra/other",
    "touch /etc/wireguard/openinfra.conf",
    "ls /run/dbus || ls /run/systemd/private || ls /run/docker.sock",
    "touch /run/here",
)
BACK_S, TIMER_S = 15.0, 10  # for a table that was lost while nobody watches


def read_property(vm: Vm, unit: str, name: str) -> str:
    return vm.sh(f"systemctl show --value --property={name} {unit}").strip()


def journal(vm: Vm, unit: str) -> list[str]:
    """What a unit said, and what systemd said of it."""
    return vm.sh(f"journalctl --boot --no-pager --output=cat --unit={unit}").splitlines()


def wait_active(vm: Vm, unit: str, timeout_s: float = 60) -> None:
    vm.sh(f"until systemctl is-active -q {unit}; do sleep 0.2; done", timeout_s=timeout_s)


def check_sandbox(vm: Vm, pid: str) -> None:
    """What the agent can do to this machine, were it another program: as root, in its namespace."""
    for script in AGENT_MAY_NOT:
        assert vm.exec(["nsenter", f"--target={pid}", "--mount", "sh", "-c", script]).code, script
    vm.sh(
        "cd /etc/openinfra/installer && cp release.pub new && mv new release.pub"
    )  # as on upgrade
    inside = f"nsenter --target={pid} --mount"
    assert vm.exec([*inside.split(), "sh", "-c", AGENT_MAY_NOT[0]]).code
    vm.sh(
        f"{inside} sh -c 'cp /etc/openinfra/agent.env /etc/openinfra/new && rm /etc/openinfra/new'"
    )


def check_fails_closed(vm: Vm) -> None:
    """Without the firewall there is no tunnel, and with it again there is."""
    # The guard too: a run that began while there was an nft would do.
    vm.sh("systemctl stop openinfra-guard.timer openinfra-watch wg-quick@openinfra openinfra-guard")
    vm.sh("mv /usr/sbin/nft /usr/sbin/away")
    assert vm.exec(["systemctl", "start", "wg-quick@openinfra"]).code
    assert vm.exec(["ip", "link", "show", "openinfra"]).code
    # Nor where one watches, which spares the guard its runs while the firewall is in place.
    vm.sh("rm /run/openinfra/guard.json; systemctl start openinfra-watch")
    vm.sh("until test -e /run/openinfra/guard.json; do sleep 1; done")
    assert vm.exec(["systemctl", "start", "wg-quick@openinfra"]).code
    vm.sh(
        "mv /usr/sbin/away /usr/sbin/nft; systemctl start wg-quick@openinfra openinfra-guard.timer"
    )
    vm.sh("ip link show openinfra; systemctl reset-failed")


def check_flushes(vm: Vm) -> None:
    """The firewall stays, and comes back by itself."""
    # A copy is held over a flush, and what was flushed is put back at once.
    wait_active(vm, "openinfra-watch")
    vm.sh("until journalctl -b -u openinfra-watch | grep -q 'no flush opens it'; do sleep 1; done")
    vm.sh("systemctl stop openinfra-guard.timer")  # by the watch alone, which hears of it
    # Beside it the guard's unit does nothing: what is left by either is as the watch left it.
    vm.sh("systemctl kill --signal=STOP openinfra-watch")
    left = vm.get("/run/openinfra/guard.json")
    vm.sh("systemctl start openinfra-guard")
    assert vm.get("/run/openinfra/guard.json") == left
    vm.sh("systemctl kill --signal=CONT openinfra-watch")
    for _ in range(2):
        vm.sh("nft flush ruleset; nft list table inet openinfra_held")
        assert wait_table(vm, "openinfra") <= 5
    assert "WARN firewall was changed or gone, and is in place again" in journal(
        vm, "openinfra-watch"
    )
    # It freezes what there is to freeze while the firewall cannot be put back, and no longer.
    freeze = "grep -qx {} /sys/fs/cgroup/openinfra.slice/cgroup.freeze"
    vm.sh("mv /usr/sbin/nft /usr/sbin/away; away delete table inet openinfra")
    vm.sh(f"until {freeze.format(1)}; do sleep 1; done", timeout_s=60)
    vm.sh("mv /usr/sbin/away /usr/sbin/nft")
    assert wait_table(vm, "openinfra") <= 10
    vm.sh(f"until {freeze.format(0)}; do sleep 1; done", timeout_s=60)
    vm.sh('until grep -q \'"error": ""\' /run/openinfra/guard.json; do sleep 1; done', timeout_s=60)
    vm.sh("systemctl stop openinfra-watch")
    left, began_s = vm.get("/run/openinfra/guard.json"), time.monotonic()
    vm.sh("systemctl start openinfra-guard")
    run_s = time.monotonic() - began_s
    assert vm.get("/run/openinfra/guard.json") != left
    back_s = max(BACK_S, TIMER_S + 2 * run_s)  # some seconds where a processor is emulated
    vm.sh("systemctl start openinfra-guard.timer")
    assert vm.exec(["nft", "list", "table", "inet", "openinfra_held"]).code

    # The firewall comes back by itself, and the journal is not filled by the timer.
    vm.sh("nft flush ruleset")
    assert wait_table(vm, "openinfra") <= back_s
    said = [line for line in journal(vm, "openinfra-guard") if "follows what changed" not in line]
    assert said == [
        "INFO firewall is in place",
        "WARN firewall was changed or gone, and is in place again",
    ]
    vm.sh("systemctl restart nftables")  # Debian's own way to lose it
    assert wait_table(vm, "openinfra") <= back_s
    vm.sh("systemctl stop nftables")
    assert json.loads(vm.get("/run/openinfra/guard.json"))["error"] == ""


def test_a_hosts_units_live(make_vm: MakeVm, home: Snapshot, tmp_path: Path) -> None:
    vm = make_vm("home", snapshot=home)
    release = make_release(tmp_path / "dist", make_key(tmp_path))
    serve(vm, release, make_tls(tmp_path / "tls", HOST))
    give_token(vm, TOKEN)
    assert install(vm, *ALL).code == 0
    vm.sh("systemd-analyze verify --man=no --generators=yes /etc/systemd/system/openinfra-*")

    # There is no control plane: the agent tries, and nothing in its sandbox keeps it from that.
    vm.sh("until journalctl -b -u openinfra-agent | grep -q 'WARN cannot reach'; do sleep 1; done")
    said = journal(vm, "openinfra-agent")
    assert any(line.startswith("INFO agent starting control_plane=10.77.0.1:9092") for line in said)
    assert [line for line in said if "Traceback" in line or "denied" in line] == []
    pid = read_property(vm, "openinfra-agent", "MainPID")
    rows = [line.split(":", 1) for line in vm.sh(f"cat /proc/{pid}/status").splitlines()]
    status = {row[0]: row[1].strip() for row in rows}
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    check_sandbox(vm, pid)
    paths = "/var/lib/openinfra/identity.json /run/openinfra/agent.sock /run/openinfra/guard.json"
    assert vm.sh(f"stat -c %a {paths}").split() == ["600"] * 3
    answer = json.loads(vm.exec(["openinfra-agent", "status", "--json"]).stdout)
    assert answer["state"] == "retrying"

    check_flushes(vm)
    check_fails_closed(vm)

    # A boot: firewall, then tunnel; the agent waits for the disk, and comes with it.
    restart(vm)
    vm.sh("until ip link show openinfra; do sleep 1; done", timeout_s=60)
    vm.sh("nft list table inet openinfra")
    units = "-u openinfra-guard.service -u wg-quick@openinfra.service"
    first = vm.sh(f"journalctl --boot --output=short-monotonic --no-pager {units}")
    assert first.index("firewall is in place") < first.index("ip link add openinfra")
    assert read_property(vm, "openinfra-agent", "ActiveState") != "active"
    unlock_late(vm)
    wait_active(vm, "openinfra-agent")
    wait_active(vm, "openinfra-workloads", 120)  # and with it the engine
    assert vm.sh("systemctl --failed --no-legend --plain").split() == []

    # The disk goes: the agent ends; it comes back: the agent is there.
    vm.sh("systemctl stop var-lib-openinfra.mount")
    for unit in ("openinfra-agent", "openinfra-engine", "var-cache-openinfra.mount"):
        assert read_property(vm, unit, "ActiveState") == "inactive"
    assert vm.sh("losetup --all") == ""
    vm.sh("systemctl start var-lib-openinfra.mount")
    wait_active(vm, "openinfra-agent")

    # The identity is lost and the invite spent: it ends with 78, and systemd leaves it at that.
    vm.sh("systemctl stop openinfra-agent; rm /var/lib/openinfra/identity.json")
    vm.sh(f"sed -i 's/{TOKEN}/{TOKEN[:20]}_used/' /etc/openinfra/agent.env")
    vm.exec(["systemctl", "start", "openinfra-agent"])
    time.sleep(8)  # longer than RestartSec
    assert read_property(vm, "openinfra-agent", "ExecMainStatus") == "78"
    assert read_property(vm, "openinfra-agent", "NRestarts") == "0"
    assert any("invite already used" in line for line in journal(vm, "openinfra-agent"))
