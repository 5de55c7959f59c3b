"""setup_luks2.py refuses what is not blank, in one line with its reason, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.disk import (
    MAPPER,
    MOUNT_POINT,
    PASS_FILE,
    PASSPHRASE,
    attach,
    fingerprint,
    put_script,
    setup,
)
from tests.e2e.scripts import said
from tests.e2e.vm import Vm

MakeVm = Callable[..., Vm]
# A pool of ZFS, whose tools Debian has not in main: the magic numbers of 32 uberblocks.
ZFS = """python3 - {part} <<'PY'
import struct, sys
with open(sys.argv[1], "r+b") as disk:
    size = disk.seek(0, 2) // 262144 * 262144
    for label in (0, 262144, size - 524288, size - 262144):
        for number in range(32):
            disk.seek(label + 131072 + 1024 * number)
            disk.write(struct.pack("<QQQ", 0x00BAB10C, 5000, 7))
PY"""
LUKS = (
    "echo passphrase-of-others | "
    "cryptsetup luksFormat -q --type={kind} --pbkdf-force-iterations=1000 {part} -"
)
LUKS1, LUKS2 = LUKS.replace("{kind}", "luks1"), LUKS.replace("{kind}", "luks2 --pbkdf=pbkdf2")
# Somebody who holds it without a trace that lsblk sees.
HOLD = """python3 - {part} <<'PY' >/dev/null 2>&1 &
import os, sys, time
os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
time.sleep(120)
PY
sleep 3"""
# Name: what is done to the partition {part} of {disk}, what is refused, why, how to let go of it.
PARTITIONS: dict[str, tuple[str, str, str]] = {
    "mounted": ("mkfs.xfs -q {part}; mount -o ro {part} /mnt", "is mounted at /mnt", "umount /mnt"),
    "mapped": (
        'dmsetup create mine --table "0 $(blockdev --getsz {part}) linear {part} 0"',
        "is used by /dev/mapper/mine",
        "dmsetup remove mine",
    ),
    "swap": ("mkswap -q {part}; swapon {part}", "is used as swap", "swapoff {part}"),
    "swap-off": ("mkswap -q {part}", "holds swap", ""),
    "lvm": ("pvcreate -qq {part}", "holds LVM2_member", ""),
    "lvm-used": (
        "vgcreate -qq box {part}; lvcreate -qq -n home -L 64M box",
        "is used by /dev/mapper/box-home",
        "vgchange -qq -an box",
    ),
    "md": (
        "mdadm -q --create /dev/md7 --level=1 --raid-devices=2 --metadata=1.2 --run {part} missing",
        "is used by /dev/md7",
        "mdadm -q --stop /dev/md7",
    ),
    "zfs": (ZFS, "holds zfs_member", ""),
    "bcache": (
        "make-bcache -B {part} >/dev/null; udevadm settle",
        "holds bcache",
        "for each in /sys/block/bcache*/bcache/stop; do [ ! -e $each ] || echo 1 > $each; done",
    ),
    "btrfs": ("mkfs.btrfs -q {part}", "holds btrfs", ""),
    "ext4": ("mkfs.ext4 -q {part}", "holds ext4", ""),
    "xfs": ("mkfs.xfs -q {part}", "holds xfs", ""),
    "ntfs": ("mkfs.ntfs -q -f -F {part} >/dev/null", "ntfs", ""),
    "vfat": ("mkfs.vfat {part} >/dev/null", "vfat", ""),
    "gpt-inside": ("echo 'label: gpt' | sfdisk -q {part}", "gpt", ""),
    "mbr-inside": ("echo 'label: dos' | sfdisk -q {part}", "dos", ""),
    "esp": (
        "sfdisk -q --part-type {disk} 1 U; udevadm settle",
        "has the partition type 'EFI System'",
        "",
    ),
    "read-only": ("blockdev --setro {part}", "is read-only", "blockdev --setrw {part}"),
    "luks1": (LUKS1, "holds a LUKS1 container", ""),
    "luks2": (LUKS2, "holds a LUKS2 container that is not of this machine", ""),
    "held": (HOLD, "is in use", "pkill -f '^python3 - '"),
}


def start(make_vm: MakeVm) -> Vm:
    vm = make_vm("home")
    put_script(vm)
    return vm


def refuse(vm: Vm, name: str, target: str, reason: str, *more: str) -> str:
    """Run it; give back what is wrong with how it refused, or nothing."""
    vm.sh("sync; sleep 0.2; sync")
    before = fingerprint(vm.disks[name].path) if name in vm.disks else ""
    confirm = [] if any(each.startswith("--confirm") for each in more) else [f"--confirm={name}"]
    done = setup(vm, f"--passphrase-file={PASS_FILE}", *confirm, *more, target)
    vm.sh("sync")
    after = fingerprint(vm.disks[name].path) if name in vm.disks else ""
    last = said(done).strip().splitlines()[-1:]
    wrong = [
        *([] if done.code == 3 else [f"code {done.code}"]),
        *([] if last and reason in last[0] else [f"{reason!r} is not in {last}"]),
        *([] if before == after else ["the disk was changed"]),
        *(
            []
            if "/etc/openinfra" not in vm.sh("ls -d /etc/openinfra 2>/dev/null || true")
            else ["a journal"]
        ),
    ]
    return f"{name}: {', '.join(wrong)}" if wrong else ""


@pytest.mark.parametrize("part", range(2))
def test_what_is_on_a_partition(make_vm: MakeVm, part: int) -> None:
    vm = start(make_vm)
    wrong = []
    for name in list(PARTITIONS)[part::2]:
        script, reason, undo = PARTITIONS[name]
        disk = attach(vm, name)
        values = {"disk": disk, "part": f"{disk}-part1"}
        vm.sh(script.replace("{part}", values["part"]).replace("{disk}", disk))
        vm.sh("udevadm settle")
        wrong.append(refuse(vm, name, values["part"], reason))
        vm.sh(undo.replace("{part}", values["part"]) or "true")
        vm.detach_disk(name)
    assert list(filter(None, wrong)) == []


def test_what_a_device_is(make_vm: MakeVm) -> None:
    vm = start(make_vm)
    small = attach(vm, "small", layout="label: gpt\n,512M,L\n,,L")
    blank = attach(vm, "blank", layout="")
    logical = attach(vm, "logical", layout="label: dos\n,,E\n,,L")
    vm.sh(f"mkfs.ext4 -q {blank}; mount {blank} /mnt; truncate -s 1200M /mnt/file")
    vm.sh("mkfs.ext4 -q /mnt/file; mkdir /other; losetup /dev/loop0 /mnt/file")
    vm.sh("mount -o ro,noload,loop /mnt/file /other; losetup -a >&2")
    vm.sh("truncate -s 1200M /root/file; mkfifo /root/fifo")
    wrong = [
        refuse(vm, "small", f"{small}-part1", "is smaller than 1 GiB"),
        refuse(vm, "small", small, "is a whole disk", "--confirm=small"),
        refuse(vm, "small", small, "holds", "--whole-disk"),
        refuse(vm, "logical", f"{logical}-part1", "has the partition type 'Extended'"),
        refuse(vm, "blank", blank, "is mounted at /mnt", "--whole-disk"),
        refuse(vm, "root", "/dev/vda", "is mounted at /", "--whole-disk"),
        refuse(vm, "loop", "/dev/loop0", "is a loop device"),
        refuse(vm, "file", "/root/file", "is not a block device"),
        refuse(vm, "directory", "/root", "is not a block device"),
        refuse(vm, "fifo", "/root/fifo", "is not a block device"),
        refuse(vm, "character device", "/dev/null", "is not a block device"),
        refuse(vm, "nothing", "/dev/sdz9", "No such file"),
    ]
    assert list(filter(None, wrong)) == []


# What a container of another machine holds: how it came there as {inside}, and why it is refused.
INSIDE = {
    "xfs": ("mkfs.xfs -q {inside}", "holds xfs inside its container, and ext4 is needed"),
    "lvm": ("pvcreate -qq {inside}; udevadm settle", "holds LVM2_member inside its container"),
    "nothing": ("true", "holds no file system inside its container"),
}


def test_what_is_in_a_container_that_is_adopted(make_vm: MakeVm) -> None:
    """Anything but ext4 is refused once the passphrase has opened it, and it is closed again."""
    vm = start(make_vm)
    key = f"head -c -1 {PASS_FILE} | cryptsetup"
    wrong = []
    for name, (script, reason) in {**INSIDE, "ext4": ("mkfs.ext4 -q {inside}", "")}.items():
        part = f"{attach(vm, name)}-part1"
        vm.sh(
            f"{key} luksFormat -q --pbkdf=pbkdf2 --pbkdf-force-iterations=1000 {part} -; "
            f"{key} open --key-file=- {part} theirs; "
            + script.replace("{inside}", "/dev/mapper/theirs")
            + "; cryptsetup close theirs"
        )
        if reason:
            wrong.append(refuse(vm, name, part, reason, "--adopt"))
            assert vm.sh(f"ls -d {MAPPER} {MOUNT_POINT} 2>/dev/null || true") == ""
            vm.detach_disk(name)
    assert list(filter(None, wrong)) == []
    vm.sh(f"{key} open --key-file=- {part} theirs; mount /dev/mapper/theirs /mnt")
    vm.sh("echo precious > /mnt/photo; umount /mnt; cryptsetup close theirs")
    done = setup(vm, f"--passphrase-file={PASS_FILE}", "--adopt", part)
    assert done.code == 0, said(done)
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    assert "nothing to do" in said(setup(vm, part))


def test_what_the_machine_has_already(make_vm: MakeVm) -> None:
    """Files that a mount would hide, another mount, lines of somebody else, a wrong word."""
    vm = start(make_vm)
    disk = attach(vm, "data")
    part = f"{disk}-part1"
    hidden = "mkdir -p /var/lib/openinfra; touch /var/lib/openinfra/photo"
    lines = {
        hidden: ("holds files that it would hide", "rm /var/lib/openinfra/photo"),
        "mount -t tmpfs none /var/lib/openinfra": (
            "none is mounted at",
            "umount /var/lib/openinfra",
        ),
        "cp /etc/crypttab /root; echo openinfra_data UUID=1 none luks >> /etc/crypttab": (
            "remove that line",
            "cp /root/crypttab /etc",
        ),
        "cp /etc/fstab /root; echo /dev/vda /var/lib/openinfra ext4 ro >> /etc/fstab": (
            "remove that line",
            "cp /root/fstab /etc",
        ),
    }
    wrong = []
    for script, (reason, undo) in lines.items():
        vm.sh(script)
        wrong.append(refuse(vm, "data", part, reason))
        vm.sh(undo)
    wrong.append(refuse(vm, "data", part, "is not 'data'", "--confirm=Data"))
    wrong.append(refuse(vm, "data", part, "is not 'data'", "--confirm="))
    assert list(filter(None, wrong)) == []
    assert PASSPHRASE not in vm.sh("journalctl -b")
