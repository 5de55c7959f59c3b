"""What the tests of setup_luks2.py share: a machine with a blank disk, and how it is run there.

Also how it is cut short: killed, or its machine without power.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.scripts import run_killed, run_script, said
from tests.e2e.vm import Disk, Done, Vm
from tests.harness import ROOT

SCRIPT = "/root/setup_luks2.py"
SERIAL = "WX12"
BY_ID = f"/dev/disk/by-id/virtio-{SERIAL}"
PART = f"{BY_ID}-part1"
MAPPER = "/dev/mapper/openinfra_data"
MOUNT_POINT = "/var/lib/openinfra"
PASSPHRASE = "correct horse 42 canary"
# In memory, so that the passphrase is on no disk.
PASS_FILE = "/dev/shm/pass"
SIZE = 2 << 30
AGAIN = (f"--passphrase-file={PASS_FILE}", PART)
NEW = (f"--passphrase-file={PASS_FILE}", f"--confirm={SERIAL}", PART)
CHUNK = 1 << 16
# What the script says when it begins a step, and how long the step takes at most.
STEPS = {
    "+ cryptsetup luksFormat": 6.0,
    "+ mkfs.ext4": 1.5,
    "+ cryptsetup config": 1.0,
    "write /etc/fstab (": 0.3,
    "+ cryptsetup open": 4.0,
    "write /etc/crypttab (": 0.3,
    "luks.json": 0.3,
    "+ sync": 0.3,
    "+ chattr": 0.3,
    "+ mount": 0.5,
    "+ systemctl daemon-reload": 1.0,
    "+ umount": 0.3,
    "+ cryptsetup close": 0.5,
    "+ systemctl start": 6.0,
}
# What the next run says while a child of the killed one opens or formats the disk.
IN_ITS_WAY = ("is in use", "changed while you were asked")
ENDED = "the script has ended"
BLANK = f"""
umount {MOUNT_POINT} 2>/dev/null || true
systemctl stop systemd-cryptsetup@openinfra_data 2>/dev/null || true
[ ! -e {MAPPER} ] || cryptsetup close openinfra_data
chattr -i {MOUNT_POINT} 2>/dev/null || true
[ ! -e {MOUNT_POINT} ] || rmdir {MOUNT_POINT}
wipefs -qa {PART}
head -c 33554432 /dev/zero > {PART}
rm -rf /etc/openinfra
sed -i /openinfra/d /etc/fstab /etc/crypttab
systemctl daemon-reload
sync
"""


def prepare(vm: Vm) -> None:
    """Put the script, a disk with one blank partition, and the passphrase there."""
    put_script(vm)
    attach(vm, "data", serial=SERIAL)


def put_script(vm: Vm) -> None:
    """Put the script and the passphrase there."""
    vm.put((ROOT / "setup_luks2.py").read_bytes(), SCRIPT, 0o755)
    give_passphrase(vm)


def attach(
    vm: Vm,
    name: str,
    size_bytes: int = SIZE,
    *,
    serial: str | None = None,
    layout: str = "label: gpt\n,,L",
) -> str:
    """A new disk with these partitions; gives back its name in the machine."""
    vm.attach_disk(name, size_bytes, serial=serial)
    disk = f"/dev/disk/by-id/virtio-{serial or name}"
    vm.sh(f"udevadm wait {disk}")
    if layout:
        vm.sh(f"echo '{layout}' | sfdisk -q {disk}; udevadm wait {disk}-part1; udevadm settle")
    return disk


def give_passphrase(vm: Vm, text: str = PASSPHRASE) -> None:
    """Write it where `NEW` says it is."""
    vm.put(text.encode() + b"\n", PASS_FILE, 0o600)


def setup(vm: Vm, *arguments: str, timeout_s: float = 300) -> Done:
    """Run the script without a terminal."""
    return run_script(vm, SCRIPT, *arguments, timeout_s=timeout_s)


def unlock_late(vm: Vm) -> None:
    """Answer systemd's question, as a person does at any terminal; wait for the mount."""
    vm.sh(
        "for each in /run/systemd/ask-password/ask.*; do "
        'socket=$(sed -n "s/^Socket=//p" $each); '
        f"printf %s '{PASSPHRASE}' | /lib/systemd/systemd-reply-password 1 $socket; done"
    )
    vm.sh(f"until findmnt {MOUNT_POINT} >/dev/null; do sleep 0.5; done", timeout_s=60)


def wait_locked(vm: Vm) -> None:
    """Wait for a boot that is not over: systemd asks for a passphrase, or waits for the disk."""
    vm.wait_agent()
    vm.sh("until systemctl is-active -q multi-user.target; do sleep 0.5; done", timeout_s=120)


def restart(vm: Vm) -> None:
    """Boot again, with the disk locked."""
    vm.reboot(wait=False)
    wait_locked(vm)
    give_passphrase(vm)


def boot_without(vm: Vm) -> Disk:
    """Boot with the disk taken out; gives it back."""
    vm.shutdown()
    away = vm.detach_disk("data")
    vm.boot(wait=False)
    wait_locked(vm)
    return away


def wait_given_up(vm: Vm) -> None:
    """Wait until the place that the recovery table names says that the disk is not there."""
    why = "journalctl -u systemd-cryptsetup@openinfra_data --no-pager"
    vm.sh(f"until {why} | grep -q 'Dependency failed'; do sleep 1; done", timeout_s=150)
    print(vm.sh(why))


def set_up(vm: Vm) -> None:
    """Run it; it must do all."""
    done = setup(vm, *NEW)
    assert done.code == 0, said(done)


def check_ready(vm: Vm) -> None:
    """All is there, and the file system is clean; it is closed and opened on the way."""
    assert setup(vm, "--status").code == 0
    options = vm.sh(f"findmnt -no SOURCE,FSTYPE,OPTIONS {MOUNT_POINT}").split()
    assert options[:2] == [MAPPER, "ext4"]
    assert {"nodev", "nosuid"} <= set(options[2].split(","))
    assert vm.sh(f"stat -c '%a %U' {MOUNT_POINT}").split() == ["700", "root"]
    vm.sh(f"umount {MOUNT_POINT}; e2fsck -fn {MAPPER}; findmnt --verify")
    assert vm.sh(f"lsattr -d {MOUNT_POINT}; ls -A {MOUNT_POINT}").split()[0].count("i") == 1
    assert vm.exec(["touch", f"{MOUNT_POINT}/file"]).code != 0
    vm.sh(f"mount {MOUNT_POINT}")


def fingerprint(path: Path) -> str:
    """A hash of all that is not zero in a raw disk, with its place."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        at, end = 0, path.stat().st_size
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // CHUNK * CHUNK
            except OSError:  # ENXIO: only a hole is left
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < max(hole, at + 1) and at < end:
                chunk = os.pread(file.fileno(), CHUNK, at)
                if chunk.strip(b"\0"):
                    found.update(at.to_bytes(8, "big") + chunk)
                at += CHUNK
                if at >= hole:
                    break
    return found.hexdigest()


def draw(chance: random.Random, number: int) -> tuple[str, float]:
    """A step, and how long after its beginning."""
    step = list(STEPS)[number % len(STEPS)]
    return step, chance.uniform(0, STEPS[step])


def check_goes_on(vm: Vm, how: str, photo: bool = False) -> None:
    """The same command again ends with a container that opens and a clean file system.

    It may be refused for as long as a child of the killed one is still at work.
    """
    for _ in range(20):
        done = setup(vm, *NEW)
        if done.code != 3 or not any(each in said(done) for each in IN_ITS_WAY):
            break
        time.sleep(1)
    try:
        assert done.code == 0, said(done)
        if photo:
            assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
        check_ready(vm)
    except AssertionError as error:
        raise AssertionError(how) from error


def kill(vm: Vm, seed: int) -> Iterator[bool]:
    """End the script with kill -9 at each step in turn, and go on; gives whether it still ran."""
    chance = random.Random(seed)
    for number in itertools.count():
        step, delay_s = draw(chance, number)
        whole = chance.choice("01")
        how = f"seed {seed}, kill {number}: {step}, {delay_s:.2f} s, whole group: {whole}"
        vm.sh(BLANK)
        code = run_killed(vm, step, delay_s, whole, SCRIPT, *NEW, timeout_s=180)
        check_goes_on(vm, how)
        print(f"{how}: {code}", flush=True)
        yield code == "-9"


def cut_power(vm: Vm, seed: int) -> Iterator[bool]:
    """Take the machine's power at each step in turn, and go on; gives whether the script still ran.

    Each second one is on a disk that holds a photograph, when its lines are to be written again.
    """
    chance = random.Random(seed)
    full = False
    for number in itertools.count():
        step, delay_s = draw(chance, number // 2)
        vm.sh(BLANK if not full else "sed -i /openinfra/d /etc/fstab /etc/crypttab; sync")
        if full:
            vm.sh(f"umount {MOUNT_POINT}; cryptsetup close openinfra_data; systemctl daemon-reload")
            step = chance.choice(["+ cryptsetup open", "+ mount", "write /etc/fstab ("])
            delay_s = chance.uniform(0, STEPS[step])
        how = f"seed {seed}, power cut {number}: {step}, {delay_s:.2f} s, full: {full}"
        line = f"{shlex.join([SCRIPT, *NEW])} 2>/dev/console >/dev/null; echo {ENDED} >/dev/console"
        vm.sh(f"nohup setsid sh -c {shlex.quote(line)} </dev/null >/dev/null 2>&1 &")
        vm.wait_console(step, 90)
        time.sleep(delay_s)
        vm.power_cut()
        cut = ENDED not in vm.console.text
        vm.boot(wait=False)
        vm.wait_agent()
        give_passphrase(vm)
        check_goes_on(vm, how, photo=full)
        print(f"{how}: {'cut' if cut else 'it had ended'}", flush=True)
        yield cut
        vm.sh(f"echo precious > {MOUNT_POINT}/photo; sync")
        full = not full
