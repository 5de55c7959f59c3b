"""setup_luks2.py killed, and its machine without power, at each step: the same command goes on.

Afterwards the container opens, the file system is clean, and what was on it is there. A dozen in
each run; a sweep of a hundred is tests/run --bench -- -k disk_cuts. OPENINFRA_SEED repeats a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tests.e2e.disk import (
    MAPPER,
    MOUNT_POINT,
    NEW,
    PART,
    cut_power,
    kill,
    prepare,
    set_up,
    setup,
)
from tests.e2e.scripts import said
from tests.e2e.vm import Vm
from tests.harness import read_seed

MakeVm = Callable[..., Vm]
CUTS = 6  # of each kind


def test_kill_9(make_vm: MakeVm) -> None:
    vm = make_vm("home")
    prepare(vm)
    assert sum(itertools.islice(kill(vm, read_seed()), CUTS)) > CUTS / 2


def test_power_cuts(make_vm: MakeVm) -> None:
    vm = make_vm("home")
    prepare(vm)
    assert sum(itertools.islice(cut_power(vm, read_seed()), CUTS)) > CUTS / 2


def test_a_finished_disk_is_never_formatted(make_vm: MakeVm) -> None:
    """Whatever is lost around it: the journal, both lines, or all of them."""
    vm = make_vm("home")
    prepare(vm)
    set_up(vm)
    vm.sh(f"echo precious > {MOUNT_POINT}/photo; sync; cp -r /etc/openinfra /root/kept")
    closed = f"umount {MOUNT_POINT}; cryptsetup close openinfra_data; "
    lines = "sed -i /openinfra/d /etc/fstab /etc/crypttab; systemctl daemon-reload; "
    for script in ("rm -r /etc/openinfra", lines + "rm -r /etc/openinfra", lines + "true"):
        vm.sh(closed + script)
        done = setup(vm, *NEW)
        if "rm " in script:
            assert done.code == 3
            vm.sh("cp -r /root/kept /etc/openinfra")
            done = setup(vm, *NEW)
        assert done.code == 0
        assert "mkfs" not in said(done)
        assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"

    # Labelled by hand as if it had never been finished: what was mounted once is not overwritten.
    vm.sh(f"{closed} cryptsetup config --label openinfra-formatting {PART}")
    done = setup(vm, *NEW)
    assert (done.code, "ext4 that was used is inside" in said(done)) == (3, True)
    vm.sh(f"[ ! -e {MAPPER} ]; cryptsetup config --label openinfra-ready {PART}")
    assert setup(vm, *NEW).code == 0
    assert vm.sh(f"cat {MOUNT_POINT}/photo").strip() == "precious"
