"""setup_luks2.py on real machines: section 2 of the document, second runs, questions, secrets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.e2e.disk import (
    AGAIN,
    MAPPER,
    MOUNT_POINT,
    NEW,
    PART,
    PASS_FILE,
    PASSPHRASE,
    SCRIPT,
    SERIAL,
    attach,
    check_ready,
    give_passphrase,
    prepare,
    set_up,
    setup,
)
from tests.e2e.scripts import said
from tests.e2e.vm import Vm
from tests.readme import block

MakeVm = Callable[..., Vm]
SECOND_RUN_S = 10.0


def check_undone(vm: Vm) -> None:
    """README's way to have the partition back."""
    vm.sh(block("provider-disk-undo").replace("/dev/sdb1", PART))
    assert vm.sh(f"wipefs -n {PART}") == ""
    assert vm.exec(["test", "-e", MAPPER]).code == 1
    assert vm.sh("grep -c openinfra /etc/fstab /etc/crypttab || true").split(":0")[1:] != []
    assert vm.sh("readlink /etc/fstab").strip() == "fstab.real"
    assert setup(vm, "--status").code == 1
    assert "luksFormat" in setup(vm, "--dry-run", PART).text


@pytest.mark.alone
def test_the_document(make_vm: MakeVm) -> None:
    """First run, second run, and each thing that a second run has to mend."""
    vm = make_vm("home")
    prepare(vm)
    vm.sh("printf '# no line end' > /etc/fstab.real; chmod 640 /etc/fstab.real")
    vm.sh("cat /etc/fstab.real > /root/fstab; chgrp disk /etc/fstab.real")
    vm.sh("cat /etc/fstab >> /root/fstab; ln -sf fstab.real /etc/fstab")
    dry = setup(vm, "--dry-run", PART)
    assert dry.code == 0
    assert "luksFormat" in dry.text
    assert (
        vm.sh("ls /etc/openinfra /etc/crypttab.before-openinfra 2>&1 || true").count("No such") == 2
    )
    began = time.monotonic()
    set_up(vm)
    print(f"first run, with its drill: {time.monotonic() - began:.1f} s")
    check_ready(vm)
    assert vm.sh("stat -c '%a %G' /etc/fstab.real").split() == ["640", "disk"]
    assert (
        vm.sh("head -1 /etc/fstab; cat /etc/fstab.real.before-openinfra").count("# no line end")
        == 2
    )
    assert vm.sh("readlink /etc/fstab").strip() == "fstab.real"
    dump = vm.sh(f"cryptsetup luksDump {PART}")
    assert "argon2id" in dump
    assert "label=openinfra-data" in vm.sh(f"blkid -o export {MAPPER}").lower()
    assert vm.sh("stat -c '%a %U' /etc/openinfra/luks.json").split() == ["600", "root"]

    before = vm.sh("md5sum /etc/fstab /etc/crypttab /etc/openinfra/luks.json")
    vm.sh(f"echo precious > {MOUNT_POINT}/photo; sync")
    began = time.monotonic()
    done = setup(vm, PART)
    took_s = time.monotonic() - began
    assert (done.code, "nothing to do" in said(done)) == (0, True)
    print(f"second run: {took_s:.1f} s (at most {SECOND_RUN_S:g})")
    assert took_s <= SECOND_RUN_S, took_s
    assert vm.sh("md5sum /etc/fstab /etc/crypttab /etc/openinfra/luks.json") == before

    # What may be missing: each is mended, and the photo is there.
    for script in (
        f"umount {MOUNT_POINT}",
        f"umount {MOUNT_POINT}; systemctl stop systemd-cryptsetup@openinfra_data",
        f"umount {MOUNT_POINT}; cryptsetup close openinfra_data; cp /root/fstab /etc/fstab",
        "sed -i /openinfra_data/d /etc/crypttab; systemctl daemon-reload",
        # The line was away and is back, and systemd was not told.
        (
            f"umount {MOUNT_POINT}; systemctl stop systemd-cryptsetup@openinfra_data; "
            "cp /etc/crypttab /root; echo > /etc/crypttab; systemctl daemon-reload; "
            "cp /root/crypttab /etc"
        ),
        f"umount {MOUNT_POINT}; chattr -i {MOUNT_POINT}; rmdir {MOUNT_POINT}",
        "rm -r /etc/openinfra",
    ):
        vm.sh(script)
        adopt = ["--adopt"] if script.startswith("rm ") else []
        done = setup(vm, *adopt, *AGAIN)
        assert done.code == 0, script
        assert "luksFormat" not in said(done)
        assert "mkfs" not in said(done)
        assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious", script
    assert b"nothing to do" in setup(vm, *AGAIN).stderr
    check_ready(vm)
    for _ in range(2):
        assert setup(vm, "--drill", *AGAIN).code == 0
    assert (
        vm.sh("ls /etc/fstab.real.before-openinfra* /etc/crypttab.before-openinfra*").count("\n")
        == 2
    )

    check_undone(vm)


def test_the_passphrase_is_nowhere(make_vm: MakeVm) -> None:
    """Not in an argument, an environment, a log or a file: strace, the journal, the raw disks."""
    vm = make_vm("home")
    prepare(vm)
    calls = "execve,openat,write,pwrite64,sendto,sendmsg"
    strace = f"strace -f -o /dev/shm/trace -s 65536 -v -e trace={calls}".split()
    done = vm.exec([*strace, SCRIPT, *NEW, "--recovery-key"], timeout_s=300)
    assert done.code == 0, said(done)
    recovery = done.text.strip()
    secrets = (PASSPHRASE, recovery)
    trace = vm.get("/dev/shm/trace").decode(errors="replace").splitlines()
    assert not [line for line in trace if "execve" in line and any(s in line for s in secrets)]
    leaks = [line for line in trace if any(each in line for each in secrets)]
    assert leaks, "strace saw nothing"
    # Pipes to cryptsetup, systemd's password socket, and the one line on stdout.
    for each in leaks:
        call = each.split(maxsplit=1)[1]
        assert call.startswith(("write(", "sendto(")), each
        assert "pwrite64" not in call
        number = int(call.partition("(")[2].partition(",")[0])
        assert number != 2, each
    assert vm.sh(f"journalctl -b | grep -cF '{PASSPHRASE}' || true").strip() == "0"
    assert vm.sh("find /var/lib/systemd/coredump / -xdev -maxdepth 1 -type f -name 'core*'") == ""
    vm.sh("sync")
    vm.shutdown()
    for path in (vm.disks["data"].path, vm.directory / "root.qcow2"):
        for secret in secrets:
            found = os.spawnlp(os.P_WAIT, "grep", "grep", "-qaF", secret, str(path))
            assert found == 1, (path.name, "holds it" if found == 0 else found)


def test_a_device_that_is_another_by_now(make_vm: MakeVm) -> None:
    """While the person is asked: the link leads elsewhere, or the disk went and another came."""
    vm = make_vm("home")
    prepare(vm)
    other = attach(vm, "other")
    vm.log_in()
    vm.sh(f"ln -s {PART} /root/link")
    vm.type(f"{SCRIPT} --passphrase-file={PASS_FILE} /root/link; echo code=$?\n")
    vm.wait_console("To go on, type WX12")
    vm.sh(f"ln -sfn {other}-part1 /root/link")
    vm.type("WX12\n")
    vm.wait_console("not the device any more")
    vm.wait_console("code=3")

    vm.type(f"{SCRIPT} --passphrase-file={PASS_FILE} {PART}; echo code=$?\n")
    vm.wait_console("To go on, type WX12")
    vm.detach_disk("data")
    attach(vm, "data2", serial=SERIAL)
    vm.type("WX12\n")
    vm.wait_console("not the device any more")
    vm.wait_console("code=3")
    assert "crypto_LUKS" not in vm.sh("lsblk -no FSTYPE")


def test_at_a_terminal(make_vm: MakeVm) -> None:
    """The document's way: every question, a mistake at each, Ctrl-C at each."""
    vm = make_vm("home")
    prepare(vm)
    vm.log_in()
    dry, do, status = (
        line.replace("sudo python3 -I setup_luks2.py", SCRIPT).replace("/dev/sdb1", PART)
        for line in block("provider-disk").splitlines()
    )
    assert vm.exec(dry.split()).code == 0
    command = f"{do}; echo code=$?\n"
    question, first, second = "type WX12: ", "New passphrase", "The same again"

    def run(*steps: tuple[str, str], end: str) -> None:
        vm.type(command)
        for wait, typed in steps:
            vm.wait_console(wait)
            vm.sh("sleep 0.3")  # until the echo is off
            vm.type(typed)
        vm.wait_console(end)

    run((question, "\x03"), end="code=130")
    run((question, "wx12\n"), end="code=3")
    run((question, "\x04"), end="code=130")
    run((question, "WX12\n"), (first, "\x03"), end="code=130")
    run((question, "WX12\n"), (first, "\n"), end="too short")
    run((question, "WX12\n"), (first, "x\n"), end="too short")
    run((question, "WX12\n"), (first, PASSPHRASE + "\n"), (second, "\x03"), end="code=130")
    run((question, "WX12\n"), (first, PASSPHRASE + "\n"), (second, "other\n"), end="differ")
    vm.wait_console("code=1")
    assert vm.sh(f"wipefs -n {PART}") == ""
    assert vm.exec(["ls", "/etc/openinfra"]).code != 0
    run(
        (question, "WX12\n"),
        (first, PASSPHRASE + "\n"),
        (second, PASSPHRASE + "\n"),
        end="as at each boot",
    )
    vm.wait_console("recovery key? [Y/n]")
    vm.type("\n")
    vm.wait_console("shown only once")
    vm.wait_console("to which file?")
    vm.type("/root/header\n")
    vm.wait_console("code=0")
    vm.sh("test -s /root/header")
    assert PASSPHRASE not in vm.console.text
    check_ready(vm)
    assert vm.exec(status.split()).code == 0

    vm.sh(f"umount {MOUNT_POINT}; cryptsetup close openinfra_data")
    asked = "Passphrase of"
    run((asked, "wrong\n"), (asked, "\x03"), end="code=130")
    run((asked, "wrong\n"), (asked, "wrong\n"), (asked, "wrong\n"), end="does not open")
    run((asked, "wrong\n"), (asked, PASSPHRASE + "\n"), end="code=0")
    check_ready(vm)


def test_what_is_missing_on_the_machine(make_vm: MakeVm) -> None:
    """No terminal and no file, no root, no cryptsetup, no memory, two runs at once."""
    vm = make_vm("home")
    prepare(vm)
    ask = setup(vm, PART)
    assert (ask.code, "no terminal to ask at" in said(ask)) == (1, True)
    ask = setup(vm, "--confirm=WX12", PART)
    assert (ask.code, "no terminal to ask at" in said(ask)) == (1, True)
    for text, reason in (("", "too short"), ("x", "too short"), ("two\nlines are two", "keyboard")):
        give_passphrase(vm, text)
        short = setup(vm, *NEW)
        assert (short.code, reason in said(short)) == (1, True)
    give_passphrase(vm)
    vm.sh(f"chmod 755 /root; cp {SCRIPT} /usr/local/bin/setup")
    user = vm.exec(["setpriv", "--reuid=nobody", "--clear-groups", "/usr/local/bin/setup", PART])
    assert (user.code, "needs root" in said(user)) == (1, True)
    vm.sh("mv /sbin/cryptsetup /sbin/cryptsetup.away")
    tools = setup(vm, *NEW)
    assert (tools.code, "apt-get install cryptsetup-bin" in said(tools)) == (1, True)
    vm.sh("mv /sbin/cryptsetup.away /sbin/cryptsetup")
    vm.sh("mount -o remount,size=95% /dev/shm")
    free = int(vm.sh("awk '/MemAvailable/ {print $2}' /proc/meminfo"))
    vm.sh(f"head -c {(free - 180_000) * 1024} /dev/zero > /dev/shm/full")
    memory = setup(vm, *NEW)
    assert (memory.code, "argon2id needs" in said(memory)) == (1, True)
    vm.sh("rm /dev/shm/full")
    vm.sh("(flock 9; sleep 30) 9>/run/openinfra-luks.lock & sleep 0.5")
    twice = setup(vm, *NEW)
    assert (twice.code, "runs already" in said(twice)) == (1, True)
    assert vm.sh(f"wipefs -n {PART}") == ""
    assert vm.exec(["ls", "/etc/openinfra"]).code != 0
