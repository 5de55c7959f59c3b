"""setup_luks2.py: every way that a machine boots with its encrypted disk, and one without it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable

from tests.e2e.disk import (
    AGAIN,
    BY_ID,
    MOUNT_POINT,
    NEW,
    PART,
    PASSPHRASE,
    boot_without,
    give_passphrase,
    prepare,
    restart,
    set_up,
    setup,
    unlock_late,
    wait_given_up,
)
from tests.e2e.scripts import said
from tests.e2e.vm import Vm

MakeVm = Callable[..., Vm]
# How long after its boot a machine is given the passphrase; the document's user may take longer.
LATE_S = float(os.environ.get("OPENINFRA_LATE_S", "100"))
# How long a drill may take that cannot succeed; the script would wait 180 s for an answer.
PATIENCE_S = 60.0


def test_boots_with_a_passphrase(make_vm: MakeVm) -> None:
    """At once, late, with the disk away, and with the disk back."""
    vm = make_vm("home")
    prepare(vm)
    set_up(vm)
    vm.sh(f"echo precious > {MOUNT_POINT}/photo")

    restart(vm)  # boot goes on, and nothing is written to the bare mount point
    assert vm.exec(["touch", f"{MOUNT_POINT}/photo"]).code != 0
    assert setup(vm, "--status").code == 1
    unlock_late(vm)
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"

    restart(vm)  # the same command instead of an answer
    assert setup(vm, *AGAIN).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    assert vm.sh("systemctl list-jobs").count("No jobs") == 1

    restart(vm)  # longer than any time limit that systemd has by itself (90 s)
    time.sleep(LATE_S)
    unlock_late(vm)
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"

    disk = vm.sh(f"readlink -f {BY_ID}").strip()
    away = boot_without(vm)
    assert vm.exec(["touch", f"{MOUNT_POINT}/photo"]).code != 0
    wait_given_up(vm)
    lost = setup(vm, "--status")
    assert (lost.code, "is not there" in said(lost)) == (1, True)

    vm.attach_disk("data", serial=away.serial, path=away.path)
    vm.sh(f"udevadm wait {PART}; echo {disk}")
    give_passphrase(vm)
    assert setup(vm, *AGAIN).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"


def test_boots_with_a_key_file(make_vm: MakeVm) -> None:
    vm = make_vm("home")
    prepare(vm)
    key = "/root/disk.key"
    new = [f"--key-file={key}", *NEW[1:]]
    missing = setup(vm, *new)
    assert (missing.code, f"cannot read {key}" in said(missing)) == (1, True)
    vm.sh(f"head -c 64 /dev/urandom > {key}")
    vm.sh(f"chmod 644 {key}")
    open_to_all = setup(vm, *new)
    assert (open_to_all.code, "others than root" in said(open_to_all)) == (1, True)
    vm.sh(f"chmod 600 {key}; cp {key} /root/right.key")
    done = setup(vm, *new, "--recovery-key", "--header-backup=/root/header")
    assert done.code == 0, said(done)
    phrase = done.text.strip()
    assert len(phrase) == 71
    assert phrase not in said(done)
    assert vm.sh("stat -c %a /root/header").strip() == "400"
    vm.sh(f"echo precious > {MOUNT_POINT}/photo")
    vm.reboot()
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    assert b"nothing to do" in setup(vm, PART).stderr

    vm.sh(f"head -c 64 /dev/urandom > {key}; umount {MOUNT_POINT}; cryptsetup close openinfra_data")
    wrong = setup(vm, PART)
    assert (wrong.code, "does not open" in said(wrong)) == (1, True)
    give_passphrase(vm, phrase)
    assert setup(vm, *AGAIN).code == 0  # systemd asks where the key file does not help
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    vm.sh(f"cp /root/right.key {key}")
    assert setup(vm, "--drill", PART).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"

    # The file opens it, and systemd is told to read only a part: nobody is there to be asked.
    vm.sh("cp /etc/crypttab /root; sed -i '/^openinfra_data /s/$/,keyfile-size=8/' /etc/crypttab")
    began = time.monotonic()
    part = setup(vm, "--drill", PART)
    assert (part.code, "the key file in /etc/crypttab does not open it" in said(part)) == (1, True)
    assert time.monotonic() - began < PATIENCE_S
    vm.sh("cp /root/crypttab /etc; systemctl daemon-reload")
    assert setup(vm, PART).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"


def test_boots_with_a_tpm(make_vm: MakeVm) -> None:
    """The document's other way without a console: nobody types, and our script keeps the option."""
    vm = make_vm("home", cold=True, tpm=True)
    vm.boot()
    prepare(vm)
    set_up(vm)
    vm.sh(f"echo precious > {MOUNT_POINT}/photo")
    vm.sh(f"PASSWORD='{PASSPHRASE}' systemd-cryptenroll --tpm2-device=auto {PART}")
    vm.sh("sed -i '/^openinfra_data /s/$/,tpm2-device=auto/' /etc/crypttab")
    files = "md5sum /etc/fstab /etc/crypttab /etc/openinfra/luks.json"
    before = vm.sh(files)
    again = setup(vm, PART)
    assert (again.code, "nothing to do" in said(again)) == (0, True)

    vm.reboot()
    assert vm.sh("ls /run/systemd/ask-password") == ""
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    again = setup(vm, PART)
    assert (again.code, "nothing to do" in said(again)) == (0, True)
    assert vm.sh(files) == before
    give_passphrase(vm)
    vm.sh("sed -i 's/,nofail//' /etc/crypttab")  # mended, and the rest of the line stays
    assert setup(vm, "--drill", *AGAIN).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
    options = vm.sh("grep ^openinfra_data /etc/crypttab").split()[3].split(",")
    assert {"nofail", "tpm2-device=auto"} <= set(options)

    # Another TPM, as after a new mainboard: the passphrase opens the disk as ever.
    vm.shutdown()
    shutil.rmtree(vm.directory / "tpm")
    vm.boot(wait=False)
    vm.wait_agent()
    vm.sh("until compgen -G '/run/systemd/ask-password/ask.*'; do sleep 0.5; done", timeout_s=120)
    unlock_late(vm)
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
