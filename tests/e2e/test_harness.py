"""The machines themselves: what the other tests here lean on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.network import Network
from tests.e2e.vm import Vm
from tests.harness import ROOT, wait_for

MakeVm = Callable[..., Vm]


def test_a_machine_boots_with_all_its_units(make_vm: MakeVm) -> None:
    vm = make_vm("cold", cold=True)
    vm.boot()
    assert vm.sh("systemctl is-system-running").strip() == "running"
    assert vm.sh("hostname; cat /etc/hostname").split() == ["cold", "cold"]
    assert vm.sh("ls /sys/class/net").split() == ["lo"], "it has a network that nobody asked for"
    assert "bookworm" in vm.sh("cat /etc/os-release")
    vm.sh("command -v vgcreate mdadm make-bcache mkfs.btrfs mkfs.xfs mkfs.ntfs mkfs.vfat")


def test_a_command_gives_its_code_and_both_outputs(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    done = vm.exec(["sh", "-c", "cat; echo no >&2; exit 3"], stdin=b"\x00\xff\n")
    assert (done.code, done.stdout, done.stderr) == (3, b"\x00\xff\n", b"no\n")
    assert not done.timed_out
    with pytest.raises(AssertionError, match=r"ended with 1:\nwords"):
        vm.sh("echo words; false; true")
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        vm.exec(["no-such-command"])


def test_a_command_is_killed_at_its_limit_with_its_children(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    started = time.monotonic()
    done = vm.exec(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], timeout_s=1)
    assert (done.code, done.stdout, done.timed_out) == (-9, b"begun\n", True)
    assert time.monotonic() - started < 10
    assert vm.exec(["pgrep", "sleep"]).code == 1


def test_what_a_command_leaves_running_holds_nobody_up(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    assert vm.sh("sleep 1000 & echo $!", timeout_s=10).strip() == vm.sh("pgrep sleep").strip()


def test_files_go_in_and_come_out_as_they_are(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    content = os.urandom(3 << 20)
    vm.put(content, "/root/new directory/file", 0o750)
    assert vm.sh("stat -c '%a %s' '/root/new directory/file'").split() == ["750", str(3 << 20)]
    assert vm.get("/root/new directory/file") == content
    with pytest.raises(AssertionError, match="No such file"):
        vm.get("/root/none")


def test_a_reboot_is_a_new_boot(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    before = vm.boot_id, vm.sh("cat /etc/machine-id")
    vm.sh("echo kept > /root/file; echo gone > /run/file")
    vm.reboot()
    after = vm.boot_id, vm.sh("cat /etc/machine-id")
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    assert vm.sh("hostname; cat /root/file; ls /run/file || true").split() == ["host1", "kept"]


def test_a_power_cut_loses_what_was_not_synced(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    vm.attach_disk("data", 64 << 20)
    disk = "/dev/disk/by-id/virtio-data"
    vm.sh(f"mkfs.ext4 -q {disk}; mount {disk} /mnt; sync")
    vm.sh("echo kept | tee /root/synced > /mnt/synced; sync")
    vm.sh("echo lost | tee /root/not-synced > /mnt/not-synced")
    vm.power_cut()
    vm.boot()
    vm.sh(f"mount {disk} /mnt")
    for directory in ("/root", "/mnt"):
        assert vm.get(f"{directory}/synced") == b"kept\n"
        assert vm.exec(["test", "-s", f"{directory}/not-synced"]).code == 1


def test_restored_machines_are_not_the_same_one(make_vm: MakeVm) -> None:
    asked = "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | base64; journalctl -n1 -o cat"
    one, other = (make_vm(name).sh(asked).split("\n") for name in ("host1", "host2"))
    assert [a == b for a, b in zip(one[:3], other[:3], strict=True)] == [False] * 3
    assert one[1:2] + other[1:2] == ["host1", "host2"]
    assert all((one[3], other[3])), "the journal is not to be read"


def test_a_restored_machine_has_the_right_time(make_vm: MakeVm) -> None:
    assert abs(float(make_vm("host1").sh("date +%s.%N")) - time.time()) < 2


@pytest.mark.parametrize("running", [True, False])
def test_a_disk_comes_and_goes(make_vm: MakeVm, running: bool) -> None:
    vm = make_vm("host1", cold=not running)
    vm.attach_disk("one", 8 << 20, serial="S3R1AL")
    vm.attach_disk("two", 16 << 20, serial="")
    if not running:
        vm.boot()
    assert vm.sh("ls /dev/disk/by-id").split() == ["virtio-S3R1AL"]
    assert vm.sh("lsblk -bdno NAME,SIZE,SERIAL /dev/vd[bc]").split() == (
        ["vdb", str(8 << 20), "S3R1AL", "vdc", str(16 << 20)]
    )
    vm.sh("echo written > /dev/vdb; sync /dev/vdb")
    disk = vm.detach_disk("one")
    assert disk.path.read_bytes()[:8] == b"written\n"
    assert vm.exec(["test", "-e", "/dev/vdb"]).code == 1
    # Another machine takes the disk as it is.
    other = make_vm("host2")
    other.attach_disk("old", path=disk.path)
    assert other.sh("head -c 8 /dev/disk/by-id/virtio-old") == "written\n"


def test_a_snapshot_keeps_its_disks(
    make_vm: MakeVm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = make_vm("first")
    first.attach_disk("data", 8 << 20)
    first.sh("echo mine > /dev/disk/by-id/virtio-data; sync")
    kept = first.snapshot(tmp_path_factory.mktemp("snapshots") / "kept")
    for name in ("host1", "host2"):  # the second finds what the first did not change
        vm = make_vm(name, snapshot=kept)
        assert vm.sh("head -n1 /dev/disk/by-id/virtio-data") == "mine\n"
        vm.sh("echo your > /dev/disk/by-id/virtio-data; sync")


def test_a_tpm_keeps_its_keys(make_vm: MakeVm) -> None:
    vm = make_vm("host1", cold=True, tpm=True)
    vm.attach_disk("data", 32 << 20)
    vm.boot()
    assert "/dev/tpmrm0" in vm.sh("systemd-cryptenroll --tpm2-device=list")
    disk = "/dev/disk/by-id/virtio-data"
    vm.sh(
        f"echo -n secret > /run/key; cryptsetup luksFormat -q "
        f"--pbkdf argon2id --pbkdf-memory 32768 --pbkdf-force-iterations 4 {disk} /run/key; "
        f"PASSWORD=secret systemd-cryptenroll --tpm2-device=auto {disk}; sync"
    )
    vm.power_cut()
    vm.boot()
    attach = f"/lib/systemd/systemd-cryptsetup attach data {disk} - tpm2-device=auto,headless=1"
    vm.sh(f"{attach}; test -b /dev/mapper/data")


def test_a_shut_down_machine_is_off(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    vm.attach_disk("data", 8 << 20)
    vm.sh("echo written > /root/file")
    vm.shutdown()
    with pytest.raises(AssertionError, match="the machine is off"):
        vm.exec(["true"])
    vm.detach_disk("data")
    vm.attach_disk("other", 16 << 20)
    vm.boot()
    assert vm.get("/root/file") == b"written\n"
    assert vm.sh("ls /dev/disk/by-id").split() == ["virtio-other"]


def test_a_boot_that_waits_can_be_looked_at(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    unit = "[Unit]\nBefore=basic.target\nDefaultDependencies=no\n"
    unit += "[Service]\nType=oneshot\nExecStart=/bin/sleep 1000\n[Install]\nWantedBy=sysinit.target"
    vm.put(unit.encode(), "/etc/systemd/system/slow.service")
    vm.sh("systemctl enable slow; sync")
    vm.reboot(wait=False)
    vm.wait_agent()
    vm.sh("until systemctl list-jobs | grep -q 'slow.service *start *running'; do sleep 0.2; done")
    with pytest.raises(AssertionError, match=r"after 1 s it waits for(?s:.)*slow.service"):
        vm.wait_up(1)
    vm.sh("systemctl stop slow")
    vm.wait_up()


def test_someone_logs_in_at_the_console(make_vm: MakeVm) -> None:
    vm = make_vm("host1")
    vm.log_in()
    vm.type("expr 2200 + 22\n")
    vm.wait_console("2222")
    assert "2222" in vm.screen()
    with pytest.raises(AssertionError, match=r"no 'never' in 0.1 s; its console says"):
        vm.wait_console("never", timeout_s=0.1)


@pytest.fixture
def pair(make_vm: MakeVm, network: Network) -> tuple[Vm, Vm]:
    """Two machines on one network, 192.0.2.1 and 192.0.2.2."""
    vms = make_vm("host1"), make_vm("host2")
    for number, vm in enumerate(vms, 1):
        vm.join(network, f"192.0.2.{number}/24")
    return vms


def test_two_machines_talk_by_wireguard(pair: tuple[Vm, Vm]) -> None:
    keys = [vm.sh("wg genkey | tee /root/key | wg pubkey").strip() for vm in pair]
    for here, there, vm in ((1, 2, pair[0]), (2, 1, pair[1])):
        config = f"""
            [Interface]
            PrivateKey = {vm.sh("cat /root/key").strip()}
            Address = 10.77.0.{here}/24
            ListenPort = 51820
            [Peer]
            PublicKey = {keys[there - 1]}
            AllowedIPs = 10.77.0.{there}/32
            Endpoint = 192.0.2.{there}:51820
        """
        vm.put(config.encode(), "/etc/wireguard/wg0.conf", 0o600)
        vm.sh("systemctl start wg-quick@wg0")
        assert "wireguard" in vm.sh("ip -details link show wg0")
    pair[0].sh("ping -c 3 -W 5 10.77.0.2")
    handshake = pair[1].sh("wg show wg0 latest-handshakes").split()
    assert (handshake[0], int(handshake[1]) > 0) == (keys[0], True)


def test_a_network_is_cut_healed_and_slow(pair: tuple[Vm, Vm], network: Network) -> None:
    ping = ["ping", "-q", "-c", "2", "-W", "1", "192.0.2.2"]
    assert pair[0].exec(ping).code == 0
    network.partition("host2")
    assert "100% packet loss" in pair[0].exec(ping).text
    network.heal("host2")
    assert pair[0].exec(ping).code == 0
    network.delay_ms = 150
    shortest = pair[0].sh("ping -c 3 192.0.2.2 | sed -En 's|^rtt.* = ([0-9.]+)/.*|\\1|p'")
    assert 300 <= float(shortest) < 400
    network.delay_ms = 0
    # Card and address are there again after the next boot.
    pair[1].power_cut()
    assert pair[0].exec(ping).code == 1
    pair[1].boot()
    assert pair[0].exec(ping).code == 0


BOOT_AND_SAY = """
import sys, time
from pathlib import Path
from tests.e2e.image import ensure_image
from tests.e2e.vm import Vm
vm = Vm(ensure_image(), Path(sys.argv[1]), "host1", tpm=True)
vm.boot(wait=False)
print(vm.process.pid, vm.swtpm.pid, flush=True)
time.sleep(1000)
"""


def test_no_process_outlives_a_killed_test(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", BOOT_AND_SAY, str(tmp_path / "vm")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout
        pids = child.stdout.readline().split()
        names = [Path(f"/proc/{int(pid)}/comm").read_text() for pid in pids]
        assert names == ["qemu-system-x86\n", "swtpm\n"]
        child.kill()
    wait_for("the end", lambda: not any(Path(f"/proc/{int(pid)}").exists() for pid in pids))


FAILING_TEST = """
def test_that_fails(make_vm):
    vm = make_vm("host1", cold=True)
    vm.boot(wait=False)
    vm.wait_agent()
    vm.sh("echo in the kernel log > /dev/kmsg; logger in the journal")
    vm.sh("echo on screen > /dev/console")
    assert False
"""


def test_a_failing_test_leaves_what_its_machines_said(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING_TEST)
    argv = [sys.executable, "-m", "pytest", "-p", "tests.e2e.conftest", "--rootdir", str(tmp_path)]
    argv += ["-c", "/dev/null", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'temporary'}"]
    env = {**os.environ, "OPENINFRA_E2E_FAILED": str(tmp_path / "failed")}
    done = subprocess.run(
        [*argv, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    assert (
        f"what the machines said is in {tmp_path}/failed/test_failing.test_that_fails"
        in done.stdout
    )
    directory = tmp_path / "failed" / "test_failing.test_that_fails" / "host1"
    assert "in the kernel log" in (directory / "dmesg.txt").read_text()
    assert "in the journal" in (directory / "journal.txt").read_text()
    assert "on screen" in (directory / "screen.txt").read_text()
    assert "on screen" in (directory / "console.log").read_text()
    assert (directory / "qemu.log").exists()


def test_a_killed_build_leaves_no_image(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "tests.e2e.image"]
    with subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True) as maker:
        wait_for("a tree", lambda: list(tmp_path.glob("openinfra/image-*.new/tree/etc")), 60)
        os.killpg(maker.pid, signal.SIGKILL)
    assert {path.suffix for path in tmp_path.glob("openinfra/image-*")} == {".new"}
