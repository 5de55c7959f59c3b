"""install_agent.py on real machines: the first run, all later ones, cuts, bad input, the way out.

The control plane's web server is in the machine itself; a control plane there is none, so the agent
goes on asking for it. tests/e2e/test_document.py has both.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.home import (
    ADDRESS,
    ALL,
    ANSWERS,
    BINARY,
    DIST,
    HOST,
    SCRIPT,
    TOKEN,
    TOKEN_FILE,
    TOKEN_ID,
    give_token,
    install,
    make_key,
    make_release,
    make_tls,
    name_server,
    put_killed,
    put_release,
    read_tree,
    serve,
)
from tests.e2e.image import Image
from tests.e2e.scripts import said
from tests.e2e.vm import Snapshot, Vm, make_snapshot
from tests.harness import OTHER_WALLET, WALLET, WG_KEY

MakeVm = Callable[..., Vm]
SECOND_RUN_S = 10.0
AGENT, WG = "openinfra-agent.service", "wg-quick@openinfra.service"
ENGINE, DISK = "openinfra-engine.service", "var-cache-openinfra.mount"
TIMER, AGENT_FILE = "openinfra-guard.timer", "/usr/local/bin/openinfra-agent"
MODES = {
    "/etc/openinfra/agent.env": "600 root",
    "/etc/openinfra/installer/ca.pem": "644 root",
    "/etc/openinfra/installer/containerd.toml": "644 root",
    "/etc/openinfra/installer/engine.json": "644 root",
    "/etc/openinfra/installer/install.json": "644 root",
    "/etc/openinfra/installer/release.pub": "644 root",
    "/etc/systemd/system/openinfra-agent.service": "644 root",
    "/etc/systemd/system/openinfra-containerd.service": "644 root",
    "/etc/systemd/system/openinfra-engine.service": "644 root",
    "/etc/systemd/system/openinfra-guard.service": "644 root",
    "/etc/systemd/system/openinfra-guard.timer": "644 root",
    "/etc/systemd/system/openinfra-strays.service": "644 root",
    "/etc/systemd/system/openinfra-watch.service": "644 root",
    "/etc/systemd/system/openinfra-workloads.service": "644 root",
    "/etc/systemd/system/openinfra.slice": "644 root",
    "/etc/systemd/system/var-cache-openinfra.mount": "644 root",
    "/etc/wireguard/openinfra.conf": "600 root",
    "/etc/wireguard/openinfra.key": "600 root",
    "/etc/wireguard/openinfra.pub": "644 root",
    "/usr/local/bin/openinfra-agent": "755 root",
    "/var/lib/openinfra/engine.img": "600 root",
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's key."""
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def served(
    image: Image, home: Snapshot, key: Path, tmp_path_factory: pytest.TempPathFactory
) -> Snapshot:
    """A home machine with its encrypted disk, and a web server that has version 0.1.0."""
    directory = tmp_path_factory.mktemp("served")

    def prepare(vm: Vm) -> None:
        vm.restore(home)
        serve(vm, make_release(directory / "dist", key), make_tls(directory / "tls", HOST))

    return make_snapshot(image, directory, "served", prepare)


@pytest.fixture
def vm(make_vm: MakeVm, served: Snapshot) -> Vm:
    """Such a machine, with the invite where `ALL` says it is."""
    made: Vm = make_vm("home", snapshot=served)
    name_server(made)
    give_token(made, TOKEN)
    return made


def check_installed(vm: Vm) -> str:
    """All is there and as it should be; gives back the public key."""
    paths = " ".join(MODES)
    found = vm.sh(f"stat -c '%n %a %U' {paths}").splitlines()
    assert dict(line.split(" ", 1) for line in found) == MODES
    left = vm.sh("find /etc/openinfra /etc/wireguard /etc/systemd/system -name '.*.new'")
    assert left == ""
    units = [WG, "openinfra-guard.timer", "openinfra-watch", DISK, ENGINE, AGENT]
    assert vm.sh(f"systemctl is-enabled {' '.join(units)} openinfra-guard").split() == (
        ["enabled"] * 7
    )
    assert vm.sh(f"systemctl is-active {' '.join(units)}").split() == ["active"] * 6
    env = vm.sh("cat /etc/openinfra/agent.env").splitlines()
    assert [line.partition("=")[0] for line in env] == (
        ["INVITE_TOKEN", "SOLANA_PAYOUT_PUBKEY", "CONTROL_PLANE", "DATA_DIR"]
    )
    public = vm.sh("wg pubkey < /etc/wireguard/openinfra.key").strip()
    assert vm.sh("cat /etc/wireguard/openinfra.pub").strip() == public
    assert vm.sh("wg show openinfra public-key").strip() == public
    assert vm.sh("wg show openinfra allowed-ips").split() == [WG_KEY, "10.77.0.1/32"]
    assert f"inet {ADDRESS}/32" in vm.sh("ip -o -4 address show dev openinfra")
    vm.sh("nft list table inet openinfra")
    return public


def read_runs(vm: Vm) -> str:
    """What tells that something was restarted, or a file written."""
    return vm.sh(
        f"systemctl show --property=InvocationID,ExecMainStartTimestampMonotonic {AGENT} {WG} "
        "openinfra-guard.timer; find /etc /usr/local -newermt @0 -printf '%p %T@ %C@ %i\\n' | sort"
    )


@pytest.mark.alone
def test_the_first_run_and_those_after_it(vm: Vm) -> None:
    before = read_tree(vm)
    dry = install(vm, *ANSWERS, "--dry-run")
    assert dry.code == 0
    assert f"systemctl restart {AGENT}" in dry.text
    assert install(vm, *ANSWERS, "--check").code == 1
    assert read_tree(vm) == before

    started = time.monotonic()
    done = install(vm, *ALL)
    print(f"first run: {time.monotonic() - started:.1f} s")
    assert done.code == 0
    public = check_installed(vm)
    line = f"    sudo wg set wg0 peer {public} allowed-ips {ADDRESS}/32\n"
    assert line + "    sudo wg-quick save wg0\n" in done.text
    assert TOKEN in vm.sh("cat /etc/openinfra/agent.env")
    assert TOKEN not in done.text + said(done)
    vm.sh(f"rm {TOKEN_FILE}")

    for arguments in ((), ANSWERS, ("--dry-run",), ("--check",)):
        runs = read_runs(vm)
        started = time.monotonic()
        done = install(vm, *arguments)
        took_s = time.monotonic() - started
        assert (done.code, "nothing to do" in said(done) + done.text) == (0, True)
        assert took_s <= SECOND_RUN_S
        assert read_runs(vm) == runs
    assert public in install(vm).text

    done = install(vm, "--uninstall")
    assert (done.code, done.text) == (0, "0 left\n")
    assert "/var/lib/openinfra stays" in said(done)
    assert read_tree(vm) == before
    assert vm.sh("ls /var/lib/openinfra/identity.json; findmnt -no SOURCE /var/lib/openinfra")
    again = install(vm, "--uninstall")
    assert (again.code, again.text) == (0, "0 left\n")
    assert read_tree(vm) == before


IDENTITY = {
    "format": 1,
    "host_secret": "1" * 64,
    "host_id": "0b8c4a52-0a6b-4f8e-9b1e-2d6f5c3a7e10",
    "invite_id": TOKEN_ID,
    "session": "2" * 64,
    "next_session": None,
}
# What a person or a fault may do to an installed host.
DAMAGE = (
    "systemctl stop openinfra-agent",
    "systemctl disable --now openinfra-agent openinfra-guard.timer wg-quick@openinfra",
    f"ip link delete dev openinfra; rm {AGENT_FILE}; chmod 644 /etc/openinfra/agent.env",
    "wg-quick down openinfra; rm /etc/wireguard/openinfra.pub /etc/openinfra/installer/release.pub",
    "systemctl stop wg-quick@openinfra; wg-quick up openinfra; rm /etc/wireguard/openinfra.key",
    f"systemctl stop {TIMER}; nft delete table inet openinfra; rm /etc/systemd/system/{AGENT}",
    "rm /etc/wireguard/openinfra.conf; printf x >> /usr/local/bin/openinfra-agent",
    "rm /etc/systemd/system/openinfra-guard.service; systemctl daemon-reload",
)


def test_damage_is_mended(vm: Vm) -> None:
    """The key and the invite are never made anew; what is lost for good is asked for again."""
    assert install(vm, *ALL).code == 0
    public = check_installed(vm)
    for damage in DAMAGE:
        vm.sh(damage)
        lost = damage.startswith("rm /etc/wireguard/openinfra.conf")
        assert install(vm, *(ANSWERS if lost else ())).code == 0, damage
        assert check_installed(vm) == public, damage
    assert "nothing to do" in said(install(vm))

    # A used invite is kept, and none is asked for: there is the identity that came of it.
    used = f"oi1_{TOKEN_ID}_used"
    vm.sh("systemctl stop openinfra-agent")
    vm.put(json.dumps(IDENTITY).encode(), "/var/lib/openinfra/identity.json", 0o600)
    vm.sh("systemctl start openinfra-agent")
    vm.sh(f"sed -i 's/^INVITE_TOKEN=.*/INVITE_TOKEN={used}/' /etc/openinfra/agent.env")
    assert "nothing to do" in said(install(vm))
    assert install(vm, f"--wallet={OTHER_WALLET}").code == 0
    env = vm.sh("cat /etc/openinfra/agent.env")
    assert used in env
    assert OTHER_WALLET in env
    # What a person added stays.
    vm.sh("sed -i 's/^.Interface.$/&\\nMTU = 1380/' /etc/wireguard/openinfra.conf")
    vm.sh("sed -i '1i # mine' /etc/openinfra/agent.env")
    assert install(vm, "--wg-address=10.77.0.43").code == 0
    assert "mtu 1380" in vm.sh("ip -o link show dev openinfra")
    assert "inet 10.77.0.43/32" in vm.sh("ip -o -4 address show dev openinfra")
    assert vm.sh("head -1 /etc/openinfra/agent.env").strip() == "# mine"
    assert vm.sh("wg show openinfra public-key").strip() == public
    # Without the control plane it is mended all the same.
    vm.sh("systemctl stop test-web; rm /etc/wireguard/openinfra.pub")
    done = install(vm)
    assert (done.code, "going on with version 0.1.0" in said(done)) == (0, True)
    vm.sh("test -s /etc/wireguard/openinfra.pub; echo more >> /usr/local/bin/openinfra-agent")
    assert install(vm).code == 1
    # A file that somebody changed is not removed, and named.
    done = install(vm, "--uninstall")
    assert done.code == 1
    path = "/usr/local/bin/openinfra-agent"
    assert done.text == f"1 left\n{path}: somebody changed it; to remove it: rm {path}\n"
    vm.sh("rm /usr/local/bin/openinfra-agent")
    assert install(vm, "--uninstall").text == "0 left\n"


def test_an_upgrade_and_a_refused_downgrade(vm: Vm, key: Path, tmp_path: Path) -> None:
    assert install(vm, *ALL).code == 0
    public = check_installed(vm)
    version = "/usr/local/bin/openinfra-agent --version"
    assert vm.sh(version).strip() == "0.1.0"
    tunnel = vm.sh(f"systemctl show --property=InvocationID {WG}")
    put_release(vm, make_release(tmp_path / "new", key, "0.2.0"))
    assert install(vm, "--check").code == 1
    assert install(vm).code == 0
    assert vm.sh(version).strip() == "0.2.0"
    assert check_installed(vm) == public
    assert vm.sh(f"systemctl show --property=InvocationID {WG}") == tunnel
    assert "version=0.2.0" in vm.sh("journalctl -u openinfra-agent -o cat")

    put_release(vm, make_release(tmp_path / "old", key, "0.1.0"))
    runs = read_runs(vm)
    done = install(vm)
    assert (done.code, "--allow-downgrade" in said(done)) == (3, True)
    assert read_runs(vm) == runs
    other = make_key(tmp_path, "other")
    put_release(vm, make_release(tmp_path / "foreign", other, "0.3.0"))
    done = install(vm)
    assert (done.code, "is another key than" in said(done)) == (3, True)
    assert read_runs(vm) == runs
    put_release(vm, tmp_path / "old")
    assert install(vm, "--allow-downgrade").code == 0
    assert vm.sh(version).strip() == "0.1.0"
    assert "nothing to do" in said(install(vm))


def test_a_run_that_is_killed_goes_on(vm: Vm) -> None:
    """Killed before step 1, 2, 3 … of what is left each time, until there are fewer steps."""
    before = read_tree(vm)
    script = put_killed(vm)
    keys = set()
    for at in range(1, 30):
        done = install(vm, *ALL, script=script, KILL_AT=str(at))
        keys.add(vm.sh("cat /etc/wireguard/openinfra.key 2>/dev/null || true").strip())
        if done.code == 0:
            break
        assert done.code == -9
    assert at > 5
    assert len(keys - {""}) == 1, "a second key was made"
    check_installed(vm)
    assert "nothing to do" in said(install(vm))
    assert vm.sh("ls /var/lib/openinfra | grep -c identity.json").strip() == "1"

    for at in range(1, 40, 3):
        done = install(vm, "--uninstall", script=script, KILL_AT=str(at))
        if done.code == 0:
            break
        assert done.code == -9
    assert done.text == "0 left\n"
    assert read_tree(vm) == before


def test_a_run_that_is_killed_anywhere_goes_on(vm: Vm, seed: str) -> None:
    """Its whole process group, after any time; systemd and what it started go on."""
    draw = random.Random(seed)
    for _ in range(4):
        after_s = draw.uniform(3, 14)
        shown = " ".join(ALL)
        kill = draw.choice(["KILL", "INT", "TERM"])
        code = vm.exec(
            ["timeout", "--kill-after=20", f"--signal={kill}", f"{after_s:.2f}", SCRIPT, *ALL]
        )
        print(f"{kill} after {after_s:.2f} s of {shown}: {code.code}\n{said(code)}")
        if kill != "KILL" and code.code == 124:
            assert said(code).endswith("interrupted; the same command goes on from here\n")
        assert "Traceback" not in said(code)
    assert install(vm, *ALL).code == 0
    check_installed(vm)
    assert "nothing to do" in said(install(vm))


def test_packages_are_installed_and_purged(vm: Vm) -> None:
    docker = "docker.service docker.socket containerd.service"
    gone = "docker.io nftables python3-grpcio python3-protobuf wireguard-tools"
    vm.sh(f"systemctl unmask {docker}; dpkg --purge {gone}", timeout_s=200)
    vm.sh("apt-get autoremove --purge --yes -qq; rm -rf /var/lib/docker /etc/docker", timeout_s=200)
    before, packages = read_tree(vm), vm.sh("dpkg-query -Wf '${Package}\\n'")
    dry = install(vm, *ANSWERS, "--dry-run")
    assert dry.code == 0
    assert "apt-get install --yes --no-install-recommends" in dry.text
    done = install(vm, *ALL, timeout_s=500)
    assert done.code == 0
    assert f"not installed: {gone}; apt-get installs them now" in said(done)
    check_installed(vm)
    # Debian's package would have started a Docker that nobody here has asked for.
    states = vm.sh(f"systemctl show --value -p UnitFileState -p ActiveEnterTimestamp {docker}")
    assert states.split() == ["disabled"] * 3
    assert "docker0" not in vm.sh("ls /sys/class/net")
    new = set(vm.sh("dpkg-query -Wf '${Package}\\n'").split()) - set(packages.split())
    listed = json.loads(vm.get("/etc/openinfra/installer/install.json"))["packages"]
    assert new <= set(listed)
    kept = install(vm, "--uninstall", "--dry-run")
    assert "purge" not in kept.text
    done = install(vm, "--uninstall", "--purge-packages", timeout_s=300)
    assert (done.code, done.text) == (0, "0 left\n")
    assert vm.sh("dpkg-query -Wf '${Package}\\n'") == packages
    assert read_tree(vm) == before


CONTAINERD = """
[Service]
ExecStart=/usr/local/bin/containerd
Delegate=yes
KillMode=process
[Install]
WantedBy=multi-user.target
"""


def test_what_the_provider_has_or_takes_into_use_stays(vm: Vm) -> None:
    """A containerd of theirs by hand, and later the Docker that came with ours."""
    gone = "docker.io containerd runc"
    vm.sh("systemctl unmask docker.service docker.socket containerd.service")
    vm.sh("cp /usr/bin/containerd* /usr/local/bin/")
    vm.sh(f"dpkg --purge {gone}; rm -rf /var/lib/docker /var/lib/containerd", timeout_s=200)
    vm.put(CONTAINERD.encode(), "/etc/systemd/system/containerd.service", 0o644)
    vm.sh("systemctl daemon-reload; systemctl enable --now containerd.service")
    of_theirs = "systemctl show -p InvocationID -p ActiveState -p UnitFileState containerd.service"
    before = vm.sh(of_theirs)
    assert "ActiveState=active\nUnitFileState=enabled" in before
    done = install(vm, *ALL, timeout_s=500)
    assert done.code == 0
    check_installed(vm)
    assert vm.sh(of_theirs) == before
    off = "systemctl show --value -p UnitFileState docker.service docker.socket"
    assert vm.sh(off).split() == ["disabled", "disabled"]
    vm.sh("systemctl enable --now docker.service; docker volume create theirs", timeout_s=100)
    done = install(vm, "--uninstall", "--purge-packages", timeout_s=300)
    assert (done.code, done.text) == (0, "0 left\n")
    assert "stay: you use it" in said(done)
    assert vm.sh("docker volume ls --quiet").strip() == "theirs"
    assert vm.sh(of_theirs) == before
    assert vm.sh("dpkg-query -Wf '${db:Status-Status} ' " + gone).split() == ["installed"] * 3


def test_a_disk_that_is_cut_off_or_locked(vm: Vm) -> None:
    """Cut while the image is made: the same command goes on. Locked: the image is not forgotten."""
    vm.sh(
        "cd /var/lib/openinfra && fallocate -l "
        "$(($(df --output=avail -B1 . | sed -n 2p) * 9 / 10)) .engine.img.new"
    )
    assert install(vm, *ALL).code == 0
    check_installed(vm)
    vm.sh("systemctl stop var-lib-openinfra.mount")
    for _ in range(2):
        done = install(vm, "--uninstall")
        assert done.code == 1
        assert done.text.startswith("1 left\n/var/lib/openinfra/engine.img: its disk is not ")
    vm.sh("systemctl start var-lib-openinfra.mount")
    assert install(vm, *ALL).code == 0  # it is known as ours
    check_installed(vm)
    vm.sh("systemctl stop var-lib-openinfra.mount")
    assert install(vm, "--uninstall").code == 1
    vm.sh("systemctl start var-lib-openinfra.mount")
    done = install(vm, "--uninstall")
    assert (done.code, done.text) == (0, "0 left\n")
    assert vm.sh("ls -A /var/lib/openinfra /etc/openinfra").count("engine") == 0


def test_a_person_at_a_terminal(vm: Vm) -> None:
    """Wrong answers are asked for again, defaults are taken, the invite is not shown."""
    typed = [
        "https://cp.coledex.com/",
        HOST,
        "",
        TOKEN[:-1],
        TOKEN,
        "not a wallet",
        WALLET,
        "",
        WG_KEY,
        "192.168.1.7",
        ADDRESS,
    ]
    command = f"{SCRIPT} --ca-file=/root/ca.pem"
    script = '(for each in "$@"; do sleep 1.5; printf \'%s\\n\' "$each"; done; sleep 60) | '
    script += f"timeout 120 script -qec '{command}' /root/typescript"
    done = vm.exec(["bash", "-c", script, "bash", *typed], timeout_s=150)
    print(done.text)
    check_installed(vm)
    assert TOKEN not in vm.sh("cat /root/typescript")
    assert "Invite token (not shown): " in done.text
    assert "[10.77.0.1:9092]" in done.text
    assert f"[{HOST}:51820]" in done.text
    for reason in ("is a URL", "was mistyped", "not a Solana address", "outside the tunnel"):
        assert done.text.count(reason) == 1, reason
    assert TOKEN in vm.sh("cat /etc/openinfra/agent.env")


WATCH = rb"""
while sleep 0.2; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; done 2>/dev/null |
tr '\0' '\n' | grep -a -o --line-buffered 'oi1_[a-z2-7]*_.*' > /run/seen
"""


def test_the_invite_is_nowhere_but_in_its_file(vm: Vm) -> None:
    secret = TOKEN.split("_")[2]
    vm.sh(
        "cat > /run/watch.sh; systemd-run --quiet --unit=test-watch bash /run/watch.sh",
        stdin=WATCH,
    )
    assert install(vm, *ALL).code == 0
    vm.sh(f"rm {TOKEN_FILE}")
    assert vm.sh("systemctl stop test-watch; cat /run/seen") == ""
    assert vm.sh(f"journalctl -o export | grep -a -c {secret} || true").strip() == "0"
    assert vm.sh(f"dmesg | grep -c {secret} || true").strip() == "0"
    found = vm.sh(f"grep -rlF {secret} /etc /root /run /tmp /var /usr/local 2>/dev/null || true")
    assert found.split() == ["/etc/openinfra/agent.env"]
    vm.sh("sync; echo 3 > /proc/sys/vm/drop_caches")
    count = f"tr '\\0' '\\n' < /dev/vda | grep -a -o {secret} | wc -l"
    assert vm.sh(count, timeout_s=500).strip() == "1"
    env = "/proc/$(systemctl show -P MainPID openinfra-agent)/environ"
    assert vm.sh(f"grep -c oi1_ {env} || true").strip() == "0"


CONF, RUN = "/etc/wireguard/openinfra.conf", "/run/systemd/system"
MODULES = "/lib/modules/$(uname -r)/kernel/drivers/net"
BAD_MACHINES = (
    # what is wrong, how it is put right, exit code, what is said
    ("umount /var/lib/openinfra", "mount /var/lib/openinfra", 1, "unlock its disk"),
    (
        "umount /var/lib/openinfra; mount -t tmpfs -o mode=700 none /var/lib/openinfra",
        "umount /var/lib/openinfra; mount /var/lib/openinfra",
        1,
        "is not on an encrypted disk",
    ),
    ("ip a add 10.77.9.9/24 dev lo", "ip a del 10.77.9.9/24 dev lo", 1, "10.77.9.9 on lo"),
    (
        "ip link add lan9 type dummy; ip link set lan9 up; ip route add 10.77.128.0/17 dev lan9",
        "ip link del lan9",
        1,
        "a route to 10.77.128.0/17 by lan9",
    ),
    (f"echo theirs > {CONF}", f"rm {CONF}", 3, f"mv {CONF} {CONF}.old"),
    (
        "ip link add openinfra type dummy",
        "ip link del openinfra",
        3,
        "ip link delete dev openinfra",
    ),
    (
        "nft add table inet openinfra",
        "nft delete table inet openinfra",
        3,
        "nft delete table inet openinfra",
    ),
    (
        "mkdir -p /etc/openinfra; echo X=1 > /etc/openinfra/agent.env",
        "rm /etc/openinfra/agent.env",
        3,
        "agent.env was not made by this installer",
    ),
    (
        f"modprobe -r wireguard; mv {MODULES}/wireguard /root; depmod",
        f"mv /root/wireguard {MODULES}; depmod",
        1,
        "the kernel has no WireGuard",
    ),
    (
        "mv /run/systemd/system /run/systemd/s",
        "mv /run/systemd/s /run/systemd/system",
        1,
        "systemd",
    ),
    (
        "fallocate -l $(($(df --output=avail -B1 / | tail -1) - 1000000)) /root/big",
        "rm /root/big",
        1,
        "is full: 0 MiB are free",
    ),
    ("date -s '-2 hours'", "date -s '+2 hours'", 1, "certificate|timedatectl set-ntp true"),
    ("systemctl stop test-web", "systemctl start test-web", 1, "cannot be reached"),
    (f"truncate -s -1 {DIST}/{BINARY}", f"printf '\\0' >> {DIST}/{BINARY}", 1, "is not the file"),
    (
        f"printf ' ' >> {DIST}/release.json",
        f"truncate -s -1 {DIST}/release.json",
        3,
        "does not verify",
    ),
)
BAD_ANSWERS = (
    ("--hostname=nowhere.invalid", 1, "there is no nowhere.invalid in the DNS"),
    ("--hostname=localhost", 1, "the certificate of localhost does not verify"),
    ("--wallet=abc", 2, "--wallet: SOLANA_PAYOUT_PUBKEY is not a Solana address"),
    ("--wg-address=10.78.0.1", 2, "--wg-address: 10.78.0.1 is outside the tunnel's"),
    ("--wg-public-key=abc", 2, "--wg-public-key: that is no WireGuard public key"),
    ("--wg-endpoint=nowhere.invalid:51820", 1, "there is no nowhere.invalid in the DNS"),
    ("--wg-endpoint=cp", 2, "--wg-endpoint: 'cp' is no name and port"),
    ("--token-file=/root/none", 2, "--token-file: cannot read /root/none"),
    ("--token-file=/etc/hostname", 2, "--token-file: INVITE_TOKEN was mistyped"),
    (f"--token={TOKEN}", 2, "use --token-file"),
    ("--ca-file=/root/none", 2, "there is no file /root/none"),
    ("--release-key-sha256=" + "0" * 64, 3, "not the one that you gave"),
)


def test_bad_input_changes_nothing(vm: Vm) -> None:
    vm.sh("mkdir -p /etc/openinfra; modprobe wireguard")
    before = read_tree(vm)
    for argument, code, text in BAD_ANSWERS:
        done = install(vm, *ALL, argument)
        assert (done.code, text in said(done)) == (code, True), argument
        assert TOKEN not in said(done)
    done = install(vm, ANSWERS[0])
    assert done.code == 2
    missing = "--token-file --wallet --wg-endpoint --wg-public-key --wg-address"
    assert f"these are missing: {missing};" in said(done)
    nobody = ["setpriv", "--reuid=nobody", "--clear-groups", "python3", "-SI", "-"]
    done = vm.exec(nobody, stdin=vm.get(SCRIPT))
    assert (done.code, "this needs root; run: sudo" in said(done)) == (1, True)
    assert read_tree(vm) == before
    for wrong, right, code, text in BAD_MACHINES:
        vm.sh(wrong)
        done = install(vm, *ALL)
        vm.sh(right)
        assert done.code == code, wrong
        assert re.search(text, said(done)), (wrong, said(done))
        assert "Traceback" not in said(done)
    assert read_tree(vm) == before
    assert install(vm, *ALL).code == 0
    check_installed(vm)


def test_a_lan_without_an_encrypted_disk(vm: Vm) -> None:
    vm.sh("umount /var/lib/openinfra; mount -t tmpfs -o mode=700 none /var/lib/openinfra")
    assert install(vm, *ALL, "--allow-unencrypted").code == 0
    check_installed(vm)
    start = vm.sh("systemctl show --property=ExecStart openinfra-agent")
    assert start.count("--allow-unencrypted") == 1
    assert "nothing to do" in said(install(vm))
    assert install(vm, "--uninstall").text == "0 left\n"
    assert vm.exec(["ls", "/etc/systemd/system/openinfra-agent.service.d"]).code == 2
