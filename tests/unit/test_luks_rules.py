"""setup_luks2.py: what it refuses, what is left to do in each state, the lines it writes."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import setup_luks2
from setup_luks2 import (
    CRYPTTAB,
    CRYPTTAB_OPTIONS,
    FORMATTING,
    FSTAB,
    MAPPER,
    MOUNT_POINT,
    NAME,
    READY,
    SIZE_MIN_BYTES,
    Bare,
    Container,
    Device,
    Error,
    Facts,
    Identity,
    Look,
    Run,
    Text,
    Unlock,
    WriteFile,
    check_passphrase,
    confirm,
    decide_confirmation,
    find_line,
    find_problem_inside,
    list_findings,
    list_problems,
    list_uses,
    merge_options,
    plan,
    render_crypttab,
    render_fstab,
    render_recovery_key,
)

UUID = "7f6c1fbb-5ac2-4cc6-8be6-2b3c9d6b2f10"
OTHER = "00000000-5ac2-4cc6-8be6-2b3c9d6b2f10"
IDENTITY = Identity("/dev/disk/by-id/usb-1-part1", "WX12", "0a0b0c0d-01", 64 << 30)
DEVICE = Device("/dev/sdb1", "part", "", "", False, IDENTITY, (), False, (), "zero")
JOURNAL = {"uuid": UUID, "device": asdict(IDENTITY)}
CONFIG: dict[str, Any] = {"adopt": False, "whole": False}
BLANK = Facts(
    device=DEVICE,
    container=None,
    journal=None,
    open_uuid="",
    mounted="",
    mounted_mode=0,
    bare=Bare(False, True, 0, False),
    crypttab=Text(CRYPTTAB, b"# none\n"),
    fstab=Text(FSTAB, b"UUID=1 / ext4 defaults 0 1\n", 0o644),
    backed_up=(),
    memory_bytes=8 << 30,
    has_systemd=True,
)
LUKS = replace(DEVICE, signatures=("crypto_LUKS",))
BEGUN = replace(BLANK, device=LUKS, container=Container(2, UUID, FORMATTING), journal=JOURNAL)
KEYED = replace(BEGUN, container=Container(2, UUID, FORMATTING, ("0",)))
MADE = replace(BEGUN, container=Container(2, UUID, READY, ("0",)))
DONE = replace(
    MADE,
    open_uuid=UUID,
    mounted=MAPPER,
    mounted_mode=0o700,
    bare=None,
    crypttab=Text(CRYPTTAB, render_crypttab(b"", UUID, None)),
    fstab=Text(FSTAB, render_fstab(b"")),
)


def words(facts: Facts, *, adopt: bool) -> list[str]:
    """The steps of a plan, each as the word that tells it."""
    said = []
    for step in plan(facts, UUID, adopt, False, None):
        if isinstance(step, WriteFile):
            said.append(step.path.name)
        elif isinstance(step, Look):
            said.append("look")
        elif isinstance(step, Unlock):
            said.append("Unlock" if step.secret else "Mount")
        else:
            said.append(step.argv[1] if step.argv[0] == "cryptsetup" else step.argv[0])
    return said


BOOT = ["crypttab.before-openinfra", "crypttab", "fstab.before-openinfra", "fstab", "systemctl"]
MOUNT = ["install", "chattr", "mount", "chmod", "sync"]
FINISH = ["mkfs.ext4", "sync", "config"]


@pytest.mark.parametrize(
    ("facts", "steps"),
    [
        (BLANK, ["install", "luks.json", "luksFormat", "open", *FINISH, *MOUNT, *BOOT]),
        (replace(BLANK, journal=JOURNAL), ["luksFormat", "open", *FINISH, *MOUNT, *BOOT]),
        (BEGUN, ["luksFormat", "open", *FINISH, *MOUNT, *BOOT]),
        (KEYED, ["open", "look", *FINISH, *MOUNT, *BOOT]),
        (replace(KEYED, open_uuid=UUID), ["look", *FINISH, *MOUNT, *BOOT]),
        (MADE, ["open", "look", *MOUNT, *BOOT]),
        (replace(MADE, open_uuid=UUID), ["look", *MOUNT, *BOOT]),
        (
            replace(MADE, open_uuid=UUID, bare=Bare(True, True, 0o700, True)),
            ["look", *MOUNT[2:], *BOOT],
        ),
        (
            replace(MADE, open_uuid=UUID, bare=Bare(True, True, 0o755, None)),
            ["look", "install", *MOUNT[2:], *BOOT],
        ),
        (replace(DONE, crypttab=BLANK.crypttab), [*BOOT[:2], "systemctl"]),
        (
            replace(DONE, fstab=BLANK.fstab, backed_up=(Path(f"{FSTAB}.before-openinfra"),)),
            ["fstab", "systemctl"],
        ),
        (replace(DONE, fstab=BLANK.fstab, has_systemd=False), BOOT[2:4]),
        (
            replace(DONE, bare=Bare(True, True, 0o700, True), mounted="", open_uuid=""),
            ["Unlock", "chmod", "sync"],
        ),
        (
            replace(DONE, journal=None, container=Container(2, UUID, "home")),
            ["install", "luks.json"],
        ),
        (replace(DONE, mounted="", bare=Bare(True, True, 0o700, True)), ["Mount", "chmod", "sync"]),
        (replace(DONE, mounted_mode=0o755), ["chmod", "sync"]),
        (DONE, []),
    ],
)
def test_what_is_left_to_do(facts: Facts, steps: list[str]) -> None:
    """Nothing formats or makes a file system once the label says finished."""
    assert words(facts, adopt=True) == steps


def test_a_format_is_asked_for_and_uses_argon2id() -> None:
    first = next(
        s for s in plan(BLANK, UUID, False, False, None) if isinstance(s, Run) and s.destroys
    )
    assert {"--pbkdf=argon2id", f"--uuid={UUID}", f"--label={FORMATTING}"} <= set(first.argv)
    assert "--pbkdf-memory=1048576" in first.argv  # KiB
    assert first.secret
    small = plan(replace(BLANK, memory_bytes=1 << 30), UUID, False, False, None)
    assert any("--pbkdf-memory=262144" in s.argv for s in small if isinstance(s, Run))


@pytest.mark.parametrize(
    ("kind", "used", "unfinished", "said"),
    [
        ("", False, True, ""),
        ("ext4", False, True, ""),  # killed between mkfs and the new label
        ("ext4", True, True, "ext4 that was used is inside"),
        ("xfs", False, True, "xfs that was used is inside"),
        ("ext4", False, False, ""),
        ("ext4", True, False, ""),
        ("xfs", False, False, "holds xfs inside"),
        ("", False, False, "holds no file system inside"),
    ],
)
def test_what_may_be_inside(kind: str, used: bool, unfinished: bool, said: str) -> None:
    problem = find_problem_inside(kind, used, unfinished)
    assert said in problem
    assert bool(said) is bool(problem)


def test_what_was_opened_to_look_is_closed_again() -> None:
    for facts, unfinished in ((KEYED, True), (MADE, False)):
        for open_uuid in ("", UUID):
            steps = plan(replace(facts, open_uuid=open_uuid), UUID, False, False, None)
            look = Look("/dev/sdb1", unfinished, close=not open_uuid)
            assert [step for step in steps if isinstance(step, Look)] == [look]


COMMANDS = f"""
install --directory /etc/openinfra
cryptsetup luksFormat --batch-mode --type=luks2 --pbkdf=argon2id --iter-time=1000
    --pbkdf-memory=1048576 --uuid={UUID} --label=openinfra-formatting --key-file=- /dev/sdb1
cryptsetup open --type=luks2 --key-file=- /dev/sdb1 openinfra_data
mkfs.ext4 -q -F -m0 -L openinfra-data /dev/mapper/openinfra_data
sync /dev/mapper/openinfra_data
cryptsetup config --label openinfra-ready /dev/sdb1
install --directory --mode=0700 /var/lib/openinfra
chattr +i /var/lib/openinfra
mount -t ext4 -o nodev,nosuid /dev/mapper/openinfra_data /var/lib/openinfra
chmod 0700 /var/lib/openinfra
sync --file-system /var/lib/openinfra
systemctl daemon-reload
"""


def test_the_commands_of_a_first_run() -> None:
    """In this order; two of them are given the key, one destroys."""
    runs = [step for step in plan(BLANK, UUID, False, False, None) if isinstance(step, Run)]
    lines = COMMANDS.strip().replace("\n    ", " ").splitlines()
    assert [shlex.join(step.argv) for step in runs] == lines
    assert [step.argv[1] for step in runs if step.secret] == ["luksFormat", "open"]
    assert [step.argv[1] for step in runs if step.destroys] == ["luksFormat"]


def test_a_container_that_was_begun_is_formatted_only_without_a_key() -> None:
    for facts, formats in ((BEGUN, True), (KEYED, False), (MADE, False), (DONE, False)):
        steps = [step for step in plan(facts, UUID, False, False, None) if isinstance(step, Run)]
        assert any(step.destroys for step in steps) is formats
        assert any(step.argv[0] == "mkfs.ext4" for step in steps) is (facts in (BEGUN, KEYED))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "disk"}, "is a whole disk"),
        ({"kind": "loop"}, "is a loop device"),
        ({"kind": "lvm"}, "is a lvm device"),
        ({"kind": "raid1"}, "is a raid1 device"),
        ({"part_type": "0xef", "part_type_name": "EFI (FAT-12/16)"}, "type 'EFI (FAT-12/16)'"),
        ({"part_type": "e75caf8f-f680-4cee-afa3-b001e56efc2d"}, "has the partition type 'e75caf8f"),
        ({"ends": "unreadable"}, "cannot be read"),
        ({"read_only": True}, "is read-only"),
        ({"identity": replace(IDENTITY, size_bytes=SIZE_MIN_BYTES - 512)}, "smaller than 1 GiB"),
        ({"uses": ("is mounted at /home",)}, "is mounted at /home"),
        ({"busy": True}, "is in use"),
        ({"signatures": ("ext4",)}, "holds ext4"),
        ({"signatures": ("dos", "vfat")}, "holds dos, vfat"),
        ({"signatures": ("crypto_LUKS", "ext4")}, "holds ext4"),
        ({"signatures": ("crypto_LUKS",)}, "cannot read"),
    ],
)
def test_a_device_is_refused(changed: dict[str, Any], said: str) -> None:
    facts = replace(BLANK, device=replace(DEVICE, **changed))
    with pytest.raises(Error, match=re.escape(said)) as caught:
        plan(facts, UUID, False, False, None)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(MADE, container=Container(1, UUID, "")), "holds a LUKS1 container"),
        (replace(MADE, journal=None), "--adopt takes it"),
        (
            replace(MADE, container=Container(2, OTHER, "")),
            "is not the disk of this machine|--adopt",
        ),
        (replace(KEYED, journal=None), "was begun and never finished"),
        (replace(KEYED, open_uuid=UUID, mounted=MAPPER, bare=None), "was never finished"),
        (replace(DONE, open_uuid="not on /dev/sdb1"), "close that"),
        (replace(DONE, container=None, device=DEVICE), "its LUKS header is gone"),
        (replace(BLANK, open_uuid=OTHER), "close that"),
        (replace(MADE, open_uuid=OTHER), "close that"),
        (replace(BLANK, mounted="/dev/sdc1", bare=None), "/dev/sdc1 is mounted at"),
        (replace(BLANK, bare=Bare(True, False, 0o700, False)), "holds files that it would hide"),
        *(
            (
                replace(BLANK, journal={**JOURNAL, "device": {**asdict(IDENTITY), **other}}),
                "is not the disk of",
            )
            for other in ({"serial": "x"}, {"part_uuid": "x"}, {"size_bytes": 1 << 40})
        ),
        (
            replace(BLANK, crypttab=Text(CRYPTTAB, f"{NAME} UUID={OTHER} none luks".encode())),
            "remove that line",
        ),
        (
            replace(MADE, crypttab=Text(CRYPTTAB, f"{NAME} UUID={OTHER} none luks".encode())),
            "remove that line",
        ),
        (
            replace(BLANK, fstab=Text(FSTAB, f"/dev/sdd1 {MOUNT_POINT} xfs".encode())),
            "remove that line",
        ),
    ],
)
def test_a_container_or_a_machine_is_refused(facts: Facts, said: str) -> None:
    with pytest.raises(Error, match=said) as caught:
        plan(facts, UUID, False, False, None)
    assert caught.value.exit_code == 3


def node(kname: str, kind: str, *points: str | None, **more: Any) -> dict[str, Any]:
    """As lsblk tells of a device; `children` are what stands on it."""
    return {"name": kname, "kname": kname, "type": kind, "mountpoints": list(points), **more}


OURS = node("/dev/dm-0", "crypt", str(MOUNT_POINT))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (node("/dev/sdb1", "part", None), []),
        (node("/dev/sdb1", "part", "/home", None), ["is mounted at /home"]),
        (node("/dev/sdb1", "part", "[SWAP]"), ["is used as swap"]),
        (node("/dev/sdb1", "part", None, children=[OURS]), []),
        (
            node("/dev/sdb1", "part", None, children=[node("/dev/md7", "raid1", None)]),
            ["is used by /dev/md7 (raid1)"],
        ),
        (
            node("/dev/sdb1", "part", None, children=[node("/dev/dm-1", "crypt", "/home")]),
            ["is used by /dev/dm-1 (crypt)", "is mounted at /home"],
        ),
        (
            node("/dev/sdb1", "part", None, children=[{**OURS, "kname": "/dev/dm-1"}]),
            ["is used by /dev/dm-0 (crypt)", f"is mounted at {MOUNT_POINT}"],
        ),
        (
            node("/dev/sdb1", "part", children=[{**OURS, "mountpoints": [None, "/mnt"]}]),
            ["is mounted at /mnt"],
        ),
    ],
)
def test_who_uses_a_device(tree: dict[str, Any], said: list[str]) -> None:
    """Everybody but our own open container, mounted nowhere else than it should be."""
    assert list(list_uses(tree, "/dev/dm-0")) == said


@pytest.mark.parametrize("typed", ["", "wx12", "WX1", "WX12 ", "yes"])
def test_a_wrong_confirmation(typed: str) -> None:
    with pytest.raises(Error, match="which stands for /dev/sdb1; nothing was changed") as caught:
        confirm(argparse.Namespace(confirm=typed), DEVICE)
    assert caught.value.exit_code == 3


def test_what_is_said_before_a_confirmation(capsys: pytest.CaptureFixture[str]) -> None:
    for ends, is_said in (("zero", False), ("data", True)):
        confirm(argparse.Namespace(confirm="WX12"), replace(DEVICE, ends=ends))
        said = capsys.readouterr().err
        assert "serial WX12" in said
        assert "ALL OF IT WILL BE OVERWRITTEN" in said
        assert ("NOT RECOGNISED" in said) is is_said


def test_what_may_be_gone_on_with() -> None:
    smallest = replace(IDENTITY, size_bytes=SIZE_MIN_BYTES)
    for facts, config in (
        (BLANK, CONFIG),
        (replace(BLANK, device=replace(DEVICE, identity=smallest)), CONFIG),
        (replace(BLANK, device=replace(DEVICE, kind="disk")), {**CONFIG, "whole": True}),
        (replace(MADE, journal=None), {**CONFIG, "adopt": True}),
        (replace(DONE, journal={**JOURNAL, "device": {**asdict(IDENTITY), "serial": "x"}}), CONFIG),
        (replace(BLANK, journal={**JOURNAL, "device": {**asdict(IDENTITY), "by_id": "x"}}), CONFIG),
    ):
        assert list(list_problems(facts, **config)) == []


def test_every_reason_is_named_at_once() -> None:
    facts = replace(BLANK, device=replace(DEVICE, kind="disk", signatures=("gpt",)))
    with pytest.raises(Error, match=r"is a whole disk.*holds gpt"):
        plan(facts, UUID, False, False, None)


LINES = st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b" ")), max_size=8)


@given(LINES, st.booleans(), st.sampled_from(["crypttab", "fstab"]))
def test_every_other_line_stays_byte_for_byte(lines: list[bytes], end: bool, name: str) -> None:
    content = b"\n".join(lines) + (b"\n" if end and lines else b"")

    def render(old: bytes) -> bytes:
        return render_crypttab(old, UUID, None) if name == "crypttab" else render_fstab(old)

    new = render(content)
    glued = content + (b"\n" if content and not content.endswith(b"\n") else b"")
    assert new.startswith(glued)
    assert new[len(glued) :].count(b"\n") == 1
    assert render(new) == new
    # Another boot's worth of lines after ours: only ours is replaced.
    around = new.replace(b"nofail", b"nofai1", 1) if b"nofail" not in glued else new
    assert render(around + b"later\n").endswith(b"later\n")
    assert render(around + b"later\n").startswith(glued)


def test_the_lines_of_the_document() -> None:
    assert (
        render_crypttab(b"", UUID, None)
        == f"{NAME} UUID={UUID} none luks,nofail,tries=0\n".encode()
    )
    fstab = render_fstab(b"").decode().split()
    assert fstab[:3] == [MAPPER, str(MOUNT_POINT), "ext4"]
    options = {"nofail", "nodev", "nosuid", "x-systemd.device-timeout=infinity"}
    assert set(fstab[3].split(",")) == options
    assert fstab[4:] == ["0", "2"]


def test_what_a_person_added_stays() -> None:
    old = f"a b c d\n{NAME}\tUUID={UUID}\t-\ttpm2-device=auto,tries=5\nz y x w\n".encode()
    new = render_crypttab(old, UUID, None)
    assert (
        new
        == f"a b c d\n{NAME} UUID={UUID} - tpm2-device=auto,tries=5,luks,nofail\nz y x w\n".encode()
    )
    keyed = render_crypttab(new, UUID, Path("/etc/openinfra/disk.key"))
    assert b"/etc/openinfra/disk.key tpm2-device=auto" in keyed
    assert render_crypttab(keyed, UUID, None) == keyed
    assert merge_options("defaults,noatime", ["nofail"]) == "noatime,nofail"
    assert merge_options("none", CRYPTTAB_OPTIONS) == ",".join(CRYPTTAB_OPTIONS)


def test_a_line_that_says_the_same_stays_as_it_is() -> None:
    crypttab = f"{NAME}\tUUID={UUID}  none\tluks,nofail,tries=0\n".encode()
    assert render_crypttab(crypttab, UUID, None) == crypttab
    fstab = render_fstab(b"").replace(b" ", b"\t")
    assert render_fstab(fstab) == fstab


def test_a_slash_at_the_end_is_the_same_mount_point() -> None:
    old = f"{MAPPER} {MOUNT_POINT}/ ext4 noatime 0 2\n".encode()
    assert render_fstab(old).count(b"\n") == 1
    assert b"noatime,nofail" in render_fstab(old)


def test_a_comment_is_no_line_of_ours() -> None:
    assert find_line(f"# {NAME} x\n#{NAME} x\n".encode(), 0, NAME) is None
    assert find_line(f"#{MAPPER} {MOUNT_POINT} ext4\n".encode(), 1, str(MOUNT_POINT)) is None
    assert find_line(f"  {NAME} x".encode(), 0, NAME) == f"  {NAME} x".encode()


def test_the_journal_is_for_root_alone() -> None:
    (journal,) = (
        s
        for s in plan(replace(DONE, journal=None), UUID, True, False, None)
        if isinstance(s, WriteFile)
    )
    assert (journal.path, journal.mode, journal.owner) == (setup_luks2.JOURNAL, 0o600, (0, 0))
    assert json.loads(journal.content) == JOURNAL


def test_files_keep_mode_and_owner_and_links() -> None:
    old = Text(Path("/etc/real/fstab"), b"x", 0o640, (0, 42))
    steps = plan(replace(DONE, fstab=old), UUID, False, False, None)
    backup, file = (step for step in steps if isinstance(step, WriteFile))
    assert (backup.path, backup.content) == (Path("/etc/real/fstab.before-openinfra"), b"x")
    assert (backup.old, file.old) == (None, b"x")  # what must still be there when it is written
    for step in (backup, file):
        assert (step.path.parent, step.mode, step.owner) == (Path("/etc/real"), 0o640, (0, 42))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "too short"),
        ("x", "too short"),
        ("1234567", "too short"),
        ("1234567\t8", "no keyboard"),
        ("line one\nline two", "no keyboard"),
        ("é" * 257, "longer than 512 bytes"),
    ],
)
def test_a_passphrase_is_refused(text: str, said: str) -> None:
    with pytest.raises(Error, match=said):
        check_passphrase(text)


def test_a_passphrase_is_taken_as_it_is() -> None:
    assert check_passphrase(" correct horse é ") == " correct horse é ".encode()


def test_what_is_typed_before_a_format() -> None:
    assert decide_confirmation(DEVICE) == "WX12"
    assert decide_confirmation(replace(DEVICE, identity=replace(IDENTITY, serial=""))) == "0a0b0c0d"
    nameless = Identity("/dev/sdb", "", "", 1 << 30)
    assert decide_confirmation(replace(DEVICE, identity=nameless)) == "1073741824"


def test_a_recovery_key_is_written_as_systemd_writes_it() -> None:
    """Modhex as in systemd's recovery-key.c: 64 letters in 8 groups."""
    text = render_recovery_key(bytes(range(0, 256, 8)))
    assert re.fullmatch("([cbdefghijklnrtuv]{8}-){7}[cbdefghijklnrtuv]{8}", text)
    assert text.startswith("cccjbcbj")
    assert render_recovery_key(bytes.fromhex("0123456789abcdef" * 4)).startswith(
        "cbdefghi-jklnrtuv"
    )


@pytest.mark.parametrize(
    ("facts", "bad"),
    [
        (DONE, []),
        (replace(DONE, open_uuid="", mounted=""), ["open", "mounted"]),
        (replace(DONE, crypttab=BLANK.crypttab), ["crypttab"]),
        (replace(DONE, container=None), ["container", "key slots", "open"]),
        (replace(DONE, container=KEYED.container), ["container"]),
        (replace(DONE, open_uuid="not on /dev/sdb1"), ["open"]),
        (replace(DONE, mounted="/dev/sdz1"), ["mounted"]),
    ],
)
def test_status(facts: Facts, bad: list[str]) -> None:
    assert [what for what, good, _ in list_findings(facts) if not good] == bad
