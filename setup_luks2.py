#!/usr/bin/python3 -I
"""Make one encrypted disk for the OpenInfra agent: LUKS2 and ext4, mounted at /var/lib/openinfra.

  setup_luks2.py /dev/sdb1             asks what it must, formats the partition, mounts it
  setup_luks2.py --dry-run /dev/sdb1   prints what it would do, changes nothing
  setup_luks2.py --status              what is there: exit 0 when the disk is open and mounted
  setup_luks2.py --drill               closes the disk, opens it again as a boot does

What it does to this machine
  It overwrites the partition, once, after you typed the serial number of its disk, and only when
  nothing is on it that any tool knows. It never formats a container that has been finished.
  What cannot be read is not taken for blank.
  A second run changes nothing, or mends what is missing.
  --header-backup writes the file that you name, mode 0400.
Files (mode)
  /etc/openinfra/luks.json       0600  which device is ours, written before it is formatted
  /etc/crypttab                        one line of it; as it was: crypttab.before-openinfra
  /etc/fstab                           one line of it; as it was: fstab.before-openinfra
  /var/lib/openinfra             0700  the mount point; immutable (chattr +i) while bare
  /run/openinfra-luks.lock       0600  held while this changes anything
Runs: blkid chattr chmod cryptsetup install lsblk mkfs.ext4 mount sync systemctl umount wipefs
  The passphrase goes to cryptsetup by a pipe, and to systemd by its password socket.

Needs: Debian 12 or newer, root, the packages cryptsetup-bin, e2fsprogs, mount and util-linux
  (and systemd-cryptsetup on Debian 13).
Exit codes: 0 ended well; 1 error; 2 usage; 3 refused, the device is as it was; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import getpass
import json
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM, socket
from typing import Any

NAME = "openinfra_data"
MAPPER = f"/dev/mapper/{NAME}"
MOUNT_POINT = Path("/var/lib/openinfra")
MOUNT_UNIT = "var-lib-openinfra.mount"
CRYPTTAB, FSTAB = Path("/etc/crypttab"), Path("/etc/fstab")
JOURNAL = Path("/etc/openinfra/luks.json")
LOCK = Path("/run/openinfra-luks.lock")
FORMATTING, READY, DATA = "openinfra-formatting", "openinfra-ready", "openinfra-data"  # labels

SIZE_MIN_BYTES = 1 << 30
PASSPHRASE_MIN = 8
PASSPHRASE_MAX = 512  # cryptsetup(8) takes no more at a prompt
KEY_FILE_MAX_BYTES = 8 << 20  # cryptsetup(8)
ARGON2_MAX_BYTES = 1 << 30
ITER_MS = 1000
QUESTION_S = 180  # how long a drill waits for the mount
REFUSED = 3

# tries=0: a passphrase may be mistyped as often as it takes. See crypttab(5) and systemd.mount(5):
# with nofail systemd waits 90 s for the mapper device, unless the mount says otherwise.
CRYPTTAB_OPTIONS = ("luks", "nofail", "tries=0")
FSTAB_OPTIONS = ("nofail", "nodev", "nosuid", "x-systemd.device-timeout=infinity")
MOUNT_OPTIONS = "nodev,nosuid"

# Types of partitions that may be blank: Linux, LUKS, and how USB disks are sold. Others belong to
# firmware, boot loaders or systems whose contents no tool here recognises.
PART_TYPES = {
    "",
    "0x83",
    "0x7",
    "0fc63daf-8483-4772-8e79-3d69d8477de4",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7",
}
EDGE_BYTES = 4 << 20  # read at both ends of a device before it is called blank
# Debian packages, and what is run of each.
TOOLS = {
    "cryptsetup-bin": ("cryptsetup",),
    "e2fsprogs": ("chattr", "mkfs.ext4"),
    "mount": ("mount", "umount"),
    "util-linux": ("blkid", "lsblk", "wipefs"),
}
GENERATOR = "/lib/systemd/system-generators/systemd-cryptsetup-generator"
FS_IOC_GETFLAGS, FS_IMMUTABLE_FL = 0x80086601, 0x10  # linux/fs.h


# ---------------------------------------------------------------------------------------------
# Copied helpers: the same text in every script; a test compares them. Not pure.
# ---------------------------------------------------------------------------------------------


class Error(Exception):
    """What failed and why, what to do about it, and the exit code that `main` gives back."""

    def __init__(self, what: str, todo: str, exit_code: int = 1, **pairs: object) -> None:
        super().__init__(f"{what}; {todo}")
        self.what = what
        self.todo = todo
        self.exit_code = exit_code
        self.pairs = pairs


def run(argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30, echo: bool = True) -> str:
    """Run one command without a shell, give back its stdout; raise Error when it fails."""
    if echo:
        print("+ " + shlex.join(argv), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Error(f"{argv[0]} is not installed", "install it and run this again") from None
    except OSError as error:
        raise Error(f"{argv[0]} does not start: {error.strerror}", "mend that") from None
    except subprocess.TimeoutExpired:
        raise Error(f"{argv[0]} gave no answer for {timeout_s:g} s", "run it by hand") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().replace("\n", " / ")
        what = f"{shlex.join(argv)} ended with {done.returncode}: {said}"
        raise Error(what, "mend that and run this again")
    return done.stdout.decode(errors="replace")


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file whole: after a power cut it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---------------------------------------------------------------------------------------------
# Types: what was found, and the steps of a plan.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Which device it is, whatever its name is after the next boot."""

    by_id: str
    serial: str
    part_uuid: str
    size_bytes: int


@dataclass(frozen=True)
class Device:
    """The partition or disk, as lsblk, wipefs and the kernel describe it."""

    node: str
    kind: str  # lsblk's TYPE
    part_type: str
    part_type_name: str
    read_only: bool
    identity: Identity
    uses: tuple[str, ...]  # who else uses it, our own container left out
    busy: bool  # it cannot be opened exclusively, and our own container is not why
    signatures: tuple[str, ...]
    ends: str  # "zero", "data" or "unreadable"


@dataclass(frozen=True)
class Container:
    """A LUKS header on the device."""

    version: int
    uuid: str
    label: str
    slots: tuple[str, ...] = ()
    has_recovery_key: bool = False


@dataclass(frozen=True)
class Text:
    """A file of settings; a missing one has no bytes."""

    path: Path  # links followed
    content: bytes
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Bare:
    """The mount point while nothing is mounted there."""

    exists: bool
    empty: bool
    mode: int
    immutable: bool | None  # None: its file system knows no such flag


@dataclass(frozen=True)
class Facts:
    """All that a plan looks at."""

    device: Device
    container: Container | None
    journal: Mapping[str, Any] | None
    open_uuid: str  # of the container of this device that is open as MAPPER
    mounted: str  # what is mounted at MOUNT_POINT
    mounted_mode: int
    bare: Bare | None  # None while something is mounted
    crypttab: Text
    fstab: Text
    backed_up: tuple[Path, ...]
    memory_bytes: int
    has_systemd: bool


@dataclass(frozen=True)
class Run:
    """One command; one with `secret` reads the passphrase or key from stdin."""

    argv: tuple[str, ...]
    why: str
    secret: bool = False
    destroys: bool = False

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)}  # {self.why}"


@dataclass(frozen=True)
class WriteFile:
    """One file, replaced whole."""

    path: Path
    content: bytes
    mode: int
    why: str
    owner: tuple[int, int] = (0, 0)
    old: bytes | None = None  # what must still be there

    def __str__(self) -> str:
        return f"write {self.path} (mode {self.mode:04o})  # {self.why}"


@dataclass(frozen=True)
class Unlock:
    """Let systemd open and mount the disk as at a boot; it asks for the passphrase."""

    uuid: str
    secret: bool  # False when the container is open

    def __str__(self) -> str:
        return f"systemctl start {MOUNT_UNIT}  # opened by crypttab, mounted by fstab"


@dataclass(frozen=True)
class Look:
    """See what an opened container holds, before it is mounted or a file system is made in it."""

    node: str
    unfinished: bool
    close: bool  # when it is refused; it was closed before

    def __str__(self) -> str:
        return f"blkid --probe {MAPPER}  # {'nothing used' if self.unfinished else 'ext4'} is in it"


Step = Run | WriteFile | Unlock | Look
CLOSE_TO_OTHERS = (
    Run(("chmod", "0700", str(MOUNT_POINT)), "root alone"),
    Run(("sync", "--file-system", str(MOUNT_POINT)), "also after a power cut"),
)


# ---------------------------------------------------------------------------------------------
# Rules and plan. Pure.
# ---------------------------------------------------------------------------------------------


def check_passphrase(text: str) -> bytes:
    """Give back the bytes of a new passphrase; raises Error."""
    todo = f"give {PASSPHRASE_MIN} characters or more on one line"
    if len(text) < PASSPHRASE_MIN:
        raise Error("the passphrase is too short", todo)
    if not text.isprintable():
        raise Error("the passphrase has a character that no keyboard types at a boot prompt", todo)
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > PASSPHRASE_MAX:
        raise Error(f"the passphrase is longer than {PASSPHRASE_MAX} bytes", "give a shorter one")
    return raw


def list_problems(facts: Facts, adopt: bool, whole: bool) -> Iterator[str]:
    """Name everything that forbids to touch the device."""
    device, container = facts.device, facts.container
    if device.kind == "disk" and not whole:
        yield "is a whole disk: name a partition, or add --whole-disk when it is blank"
    if device.kind not in ("part", "disk"):
        yield f"is a {device.kind} device, not a partition of a disk"
    if device.part_type not in PART_TYPES:
        name = device.part_type_name or device.part_type
        yield f"has the partition type {name!r}: when it is free, make it Linux with sfdisk"
    if device.ends == "unreadable":
        yield "cannot be read: is it failing?"
    if device.read_only:
        yield "is read-only"
    if device.identity.size_bytes < SIZE_MIN_BYTES:
        yield f"is smaller than {SIZE_MIN_BYTES >> 30} GiB"
    yield from device.uses
    if device.busy and not device.uses:
        yield "is in use (it cannot be opened exclusively)"
    foreign = [name for name in device.signatures if name != "crypto_LUKS"]
    if foreign:
        yield f"holds {', '.join(foreign)}"
    elif device.signatures and container is None:
        yield "holds a LUKS header that cryptsetup cannot read"
    if container:
        yield from list_container_problems(facts, container, adopt)
    yield from list_host_problems(facts)


def list_container_problems(facts: Facts, container: Container, adopt: bool) -> Iterator[str]:
    """Name what forbids to go on with the container that is there."""
    ours = facts.journal is not None and facts.journal["uuid"] == container.uuid
    if container.version != 2:
        yield f"holds a LUKS{container.version} container, and LUKS2 is needed"
    elif not ours and container.label == FORMATTING:
        yield (
            f"holds a container that was begun and never finished, and not by {JOURNAL}: "
            f"when nothing of yours is on it, wipefs -a {facts.device.node}"
        )
    elif not ours and not adopt:
        yield (
            f"holds a LUKS2 container that is not of this machine ({container.uuid}): with its "
            "passphrase, --adopt takes it as it is"
        )
    if container.label == FORMATTING and facts.mounted:
        yield f"is mounted at {MOUNT_POINT} and was never finished"


def list_host_problems(facts: Facts) -> Iterator[str]:
    """Name what on this machine stands in the way of this device."""
    uuid_here = facts.container.uuid if facts.container else None
    if facts.open_uuid and facts.open_uuid != uuid_here:
        yield (
            f"is not what is open as {MAPPER}; close that: "
            f"umount -l {MOUNT_POINT}; cryptsetup close {NAME}"
        )
    if facts.mounted and facts.mounted != MAPPER:
        yield f"cannot be mounted: {facts.mounted} is mounted at {MOUNT_POINT}"
    if facts.bare and facts.bare.exists and not facts.bare.empty:
        yield f"cannot be mounted: {MOUNT_POINT} holds files that it would hide; move them away"
    journal = facts.journal
    if journal and journal["uuid"] != uuid_here and not is_same(journal, facts.device.identity):
        yield (
            f"is not the disk of this machine, which is {journal['device']['by_id']} by {JOURNAL}: "
            "attach that, or remove this file when it is gone for good"
        )
    known = uuid_here or (journal["uuid"] if journal else "none")
    line = find_line(facts.crypttab.content, 0, NAME)
    if line and known not in split_fields(line)[1]:
        yield f"is not the {NAME} of {CRYPTTAB}: remove that line when its disk is gone for good"
    elif line and uuid_here is None:  # the line was written when the container was finished
        yield (
            "was finished, and its LUKS header is gone: restore it with cryptsetup "
            f"luksHeaderRestore, or remove the line of {NAME} from {CRYPTTAB} to begin anew"
        )
    line = find_line(facts.fstab.content, 1, str(MOUNT_POINT))
    if line and split_fields(line)[0] != MAPPER:
        yield f"is not what {FSTAB} mounts at {MOUNT_POINT}: remove that line"


def is_same(journal: Mapping[str, Any], identity: Identity) -> bool:
    """True when the journal means this device; its name under by-id may have changed."""
    noted = Identity(**journal["device"])
    return replace(noted, by_id="") == replace(identity, by_id="")


def plan(facts: Facts, new_uuid: str, adopt: bool, whole: bool, key: Path | None) -> list[Step]:
    """Give back what is left to do, nothing when all is there; raises Error 3 with every reason."""
    problems = list(list_problems(facts, adopt, whole))
    if problems:
        said = ", ".join(problems)
        raise Error(f"{facts.device.node} {said}", "nothing was changed", REFUSED)
    journal, container, node = facts.journal, facts.container, facts.device.node
    found = container.uuid if container else journal["uuid"] if journal else new_uuid
    unfinished = container is None or container.label == FORMATTING
    blank = container is None or (unfinished and not container.slots)
    noting = plan_journal(facts, found)
    steps: list[Step] = [*noting] if unfinished else []
    if blank:
        steps.append(plan_format(node, found, facts.memory_bytes))
    by_systemd = facts.has_systemd and not unfinished and find_line(facts.crypttab.content, 0, NAME)
    if not facts.open_uuid and not by_systemd:
        opening = ("cryptsetup", "open", "--type=luks2", "--key-file=-", node, NAME)
        steps.append(Run(opening, "needs the passphrase", secret=True))
    if not blank and not facts.mounted and not by_systemd:
        steps.append(Look(node, unfinished, close=not facts.open_uuid))
    if unfinished:
        steps.append(Run(("mkfs.ext4", "-q", "-F", "-m0", "-L", DATA, MAPPER), "the file system"))
        steps.append(Run(("sync", MAPPER), "before it is called finished"))
        relabel = ("cryptsetup", "config", "--label", READY, node)
        steps.append(Run(relabel, "finished: from here on nothing formats it"))
    steps += plan_bare(facts.bare)
    if not facts.mounted and not by_systemd:
        mounting = ("mount", "-t", "ext4", "-o", MOUNT_OPTIONS, MAPPER, str(MOUNT_POINT))
        steps.append(Run(mounting, "the data directory"))
        steps += CLOSE_TO_OTHERS
    if not unfinished:
        steps += noting
    steps += plan_boot(facts, found, key)
    if not facts.mounted and by_systemd:
        steps.append(Unlock(found, secret=not facts.open_uuid))
        steps += CLOSE_TO_OTHERS
    elif facts.mounted and facts.mounted_mode != 0o700:
        steps += CLOSE_TO_OTHERS
    return steps


def find_problem_inside(kind: str, used: bool, unfinished: bool) -> str:
    """What forbids to mount what is inside a container or, unfinished, to overwrite it; or ""."""
    if unfinished and kind and (used or kind != "ext4"):
        return f"was never finished by its label ({FORMATTING}), and {kind} that was used is inside"
    if not unfinished and kind != "ext4":
        return f"holds {kind or 'no file system'} inside its container, and ext4 is needed"
    return ""


def plan_journal(facts: Facts, uuid_text: str) -> list[Step]:
    """Note which device is ours."""
    wanted = {"uuid": uuid_text, "device": asdict(facts.device.identity)}
    if facts.journal == wanted:
        return []
    content = (json.dumps(wanted, indent=2) + "\n").encode()
    directory = Run(("install", "--directory", str(JOURNAL.parent)), "for the next line")
    return [directory, WriteFile(JOURNAL, content, 0o600, "which device is ours")]


def decide_argon2_kib(memory_bytes: int) -> int:
    """How much memory each unlock takes, in KiB: at most a quarter of the machine's."""
    return min(ARGON2_MAX_BYTES, memory_bytes // 4) >> 10


def plan_format(node: str, uuid_text: str, memory_bytes: int) -> Run:
    """The one command that destroys what is on the device."""
    memory_kib = decide_argon2_kib(memory_bytes)
    argv = ["cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--pbkdf=argon2id"]
    argv += [f"--iter-time={ITER_MS}", f"--pbkdf-memory={memory_kib}", f"--uuid={uuid_text}"]
    argv += [f"--label={FORMATTING}", "--key-file=-", node]
    return Run(tuple(argv), "OVERWRITES the device", secret=True, destroys=True)


def plan_bare(bare: Bare | None) -> list[Step]:
    """The mount point; what root writes to it while it is bare would be in clear."""
    steps: list[Step] = []
    if bare and (not bare.exists or bare.mode != 0o700) and not bare.immutable:
        argv = ("install", "--directory", "--mode=0700", str(MOUNT_POINT))
        steps.append(Run(argv, "the mount point"))
    if bare and bare.immutable is False:
        steps.append(Run(("chattr", "+i", str(MOUNT_POINT)), "nothing is written to it while bare"))
    return steps


def plan_boot(facts: Facts, uuid_text: str, key_file: Path | None) -> list[Step]:
    """Make each boot unlock and mount it."""
    changed: list[Step] = []
    for old, new in (
        (facts.crypttab, render_crypttab(facts.crypttab.content, uuid_text, key_file)),
        (facts.fstab, render_fstab(facts.fstab.content)),
    ):
        if new == old.content:
            continue
        backup = old.path.with_name(f"{old.path.name}.before-openinfra")
        if backup not in facts.backed_up and old.content:
            changed.append(WriteFile(backup, old.content, old.mode, "as it was", old.owner))
        changed.append(WriteFile(old.path, new, old.mode, "one line", old.owner, old.content))
    if changed and facts.has_systemd:
        changed.append(Run(("systemctl", "daemon-reload"), "it reads both files"))
    return changed


def find_line(content: bytes, field: int, key: str) -> bytes | None:
    """Give back the line, with its end, whose field number `field` is `key`; comments are none."""
    for line in content.splitlines(keepends=True):
        fields = line.split()
        is_there = len(fields) > field and not fields[0].startswith(b"#")
        if is_there and fields[field].rstrip(b"/") == key.encode():
            return line
    return None


def split_fields(line: bytes | None) -> list[str]:
    """The fields of a line of crypttab or fstab, at least four."""
    return [*(line or b"").decode("utf-8", "surrogateescape").split(), "", "", "", ""]


def merge_options(old: str, wanted: Sequence[str]) -> str:
    """Keep the options that are there; add each wanted one whose name is missing."""
    kept = [option for option in old.split(",") if option not in ("", "defaults", "none", "-")]
    names = {option.partition("=")[0] for option in kept}
    return ",".join(kept + [each for each in wanted if each.partition("=")[0] not in names])


def replace_line(content: bytes, old: bytes | None, new: str) -> bytes:
    """Put a line in the place of an old one, or at the end; all other bytes stay."""
    line = new.encode("utf-8", "surrogateescape")
    if old is None:
        return content + (b"\n" if content and not content.endswith(b"\n") else b"") + line + b"\n"
    if old.split() == line.split():
        return content
    lines = content.splitlines(keepends=True)
    lines[lines.index(old)] = line + b"\n"
    return b"".join(lines)


def render_crypttab(content: bytes, uuid_text: str, key_file: Path | None) -> bytes:
    """/etc/crypttab (crypttab(5)) with our line; what a person added to the line stays."""
    old = find_line(content, 0, NAME)
    fields = split_fields(old)
    key = str(key_file) if key_file else fields[2] or "none"
    options = merge_options(fields[3], CRYPTTAB_OPTIONS)
    return replace_line(content, old, f"{NAME} UUID={uuid_text} {key} {options}")


def render_fstab(content: bytes) -> bytes:
    """/etc/fstab (fstab(5)) with our line; what a person added to the line stays."""
    old = find_line(content, 1, str(MOUNT_POINT))
    fields = split_fields(old)
    options = merge_options(fields[3], FSTAB_OPTIONS)
    return replace_line(content, old, f"{MAPPER} {MOUNT_POINT} ext4 {options} 0 2")


def decide_confirmation(device: Device) -> str:
    """What a person types before this device is overwritten."""
    known = device.identity
    return known.serial or known.part_uuid[:8] or str(known.size_bytes)


def render_recovery_key(random: bytes) -> str:
    """32 bytes as systemd-cryptenroll(1) writes them: modhex, in groups of 8."""
    text = random.hex().translate(str.maketrans("0123456789abcdef", "cbdefghijklnrtuv"))
    return "-".join(text[at : at + 8] for at in range(0, len(text), 8))


def list_findings(facts: Facts) -> Iterator[tuple[str, bool, str]]:
    """Rows of `--status`: what, whether it is as it should be, what was found."""
    container = facts.container
    yield "device", True, f"{facts.device.node} {facts.device.identity.by_id}"
    label = container.label if container else "no LUKS container"
    yield "container", container is not None and container.label != FORMATTING, label
    slots = container.slots if container else ()
    yield "key slots", bool(slots), " ".join(slots) or "none"
    recovery = "yes" if container and container.has_recovery_key else "none: see --recovery-key"
    yield "recovery key", True, recovery
    is_open = container is not None and facts.open_uuid == container.uuid
    yield "open", is_open, MAPPER if is_open else "locked: systemd-tty-ask-password-agent --query"
    yield "mounted", facts.mounted == MAPPER, facts.mounted or f"nothing at {MOUNT_POINT}"
    for text, field, key in ((facts.crypttab, 0, NAME), (facts.fstab, 1, str(MOUNT_POINT))):
        said = (find_line(text.content, field, key) or b"").decode(errors="replace").strip()
        yield text.path.name, said != "", said or "no line of ours"


# ---------------------------------------------------------------------------------------------
# Inspect: looks, never changes.
# ---------------------------------------------------------------------------------------------


def read_command(*argv: str, nothing: int = 0) -> str:
    """The output of a command that only looks; `nothing` is its exit code for nothing found."""
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    if done.returncode not in (0, nothing):
        raise Error(f"{shlex.join(argv)}: {done.stderr.strip()}", "mend that and run this again")
    return done.stdout


def check_tools() -> None:
    """Raises Error naming every Debian package that is missing."""
    missing = [name for name, tools in TOOLS.items() if not all(map(shutil.which, tools))]
    if has_systemd() and not os.path.exists(GENERATOR):
        missing.append("systemd-cryptsetup")
    if missing:
        said = " ".join(missing)
        raise Error(f"not installed: {said}", f"run: apt-get install {said}")


def has_systemd() -> bool:
    """True when systemd is process 1 (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def hold_device(path: str) -> tuple[int, str]:
    """Open the device and keep it: its number goes to no other while we hold it. Its real node."""
    node, todo = os.path.realpath(path), "list the devices: lsblk"
    try:
        if not stat.S_ISBLK(os.stat(node).st_mode):  # not opened: a watchdog would start
            raise Error(f"{path} is not a block device", todo, REFUSED)
        return os.open(node, os.O_RDONLY | os.O_CLOEXEC), node
    except OSError as error:
        raise Error(f"{path}: {error.strerror}", todo, REFUSED) from None


def check_held(handle: int, path: str) -> None:
    """Raises Error 3 when the path leads to another device by now, or the device is gone."""
    held = os.fstat(handle).st_rdev
    there = os.path.exists(f"/sys/dev/block/{os.major(held)}:{os.minor(held)}")
    with contextlib.suppress(OSError):
        if there and os.stat(path).st_rdev == held:
            return
    what = f"{path} is not the device any more that it was when this began"
    raise Error(what, "look at lsblk, then run this again", REFUSED)


def read_tree(node: str, *options: str) -> dict[str, Any]:
    """What lsblk says of a device; `children` are what stands on it (or, inverse, under it)."""
    columns = "NAME,KNAME,TYPE,SIZE,RO,SERIAL,PARTUUID,PARTTYPE,PARTTYPENAME,MOUNTPOINTS"
    argv = ("lsblk", "--json", "--bytes", "--paths", "--output", columns, *options, node)
    tree: dict[str, Any] = json.loads(read_command(*argv))["blockdevices"][0]
    return tree


def list_uses(tree: Mapping[str, Any], open_node: str) -> Iterator[str]:
    """Who uses the device, but for our own open container."""
    for point in filter(None, tree["mountpoints"]):
        yield "is used as swap" if point == "[SWAP]" else f"is mounted at {point}"
    for child in tree.get("children", []):
        if child["kname"] != open_node:
            yield f"is used by {child['name']} ({child['type']})"
        for point in filter(None, child["mountpoints"]):
            if child["kname"] != open_node or point != str(MOUNT_POINT):
                yield f"is mounted at {point}"


def read_loops(node: str) -> Iterator[str]:
    """Loop devices that stand on this device."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        if os.path.realpath(path.read_text().strip()) == node:
            yield f"is used by /dev/{path.parts[3]} (loop)"


def read_by_id(node: str) -> str:
    """The shortest name under /dev/disk/by-id, or the node itself."""
    links = Path("/dev/disk/by-id")
    names = [str(each) for each in links.iterdir()] if links.is_dir() else []
    ours = [each for each in names if os.path.realpath(each) == node]
    return min(ours, key=lambda each: (len(each), each), default=node)


def read_ends(node: str, size_bytes: int) -> str:
    """What both ends of the device hold; a read error is nothing to blkid and wipefs."""
    found = b""
    try:
        with open(node, "rb", buffering=0) as file:
            for offset in (0, max(0, size_bytes - EDGE_BYTES)):
                part = os.pread(file.fileno(), EDGE_BYTES, offset)
                if len(part) < min(EDGE_BYTES, size_bytes):
                    return "unreadable"
                found += part
    except OSError:
        return "unreadable"
    return "data" if found.strip(b"\0") else "zero"


def read_device(node: str, open_node: str) -> Device:
    """Look at the device."""
    tree = read_tree(node)
    above = read_tree(node, "--inverse").get("children", [])
    found = json.loads(read_command("wipefs", "--no-act", "--json", node) or "{}")
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        busy = False
    except OSError:
        busy = not any(each["kname"] == open_node for each in tree.get("children", []))
    serial = next((each["serial"] for each in (tree, *above) if each["serial"]), "")
    kind = next((each["type"] for each in above if each["type"] != "disk"), tree["type"])
    return Device(
        node=node,
        kind=kind,
        part_type=tree["parttype"] or "",
        part_type_name=tree["parttypename"] or "",
        read_only=bool(tree["ro"]),
        identity=Identity(read_by_id(node), serial, tree["partuuid"] or "", tree["size"]),
        uses=(*list_uses(tree, open_node), *read_loops(node)),
        busy=busy,
        signatures=tuple(sorted({each["type"] for each in found.get("signatures", [])})),
        ends=read_ends(node, tree["size"]),
    )


def read_container(node: str, ours: str) -> Container | None:
    """Look at the LUKS header; None without one.

    cryptsetup may repair what it reads, so it is not let near a container that is not ours.
    """
    output = read_command("blkid", "--probe", "--output", "export", node, nothing=2)
    values = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    if values.get("TYPE") != "crypto_LUKS":
        return None
    found = Container(int(values["VERSION"]), values["UUID"], values.get("LABEL", ""))
    if found.version != 2 or found.uuid != ours:
        return found
    # Of one that is being formatted the header may be half written: then nothing opens it, ever.
    argv, invalid = ("cryptsetup", "luksDump", "--dump-json-metadata", node), 1
    output = read_command(*argv, nothing=invalid if found.label == FORMATTING else 0)
    dump = json.loads(output or '{"keyslots": {}, "tokens": {}}')
    recovery = any(each["type"] == "systemd-recovery" for each in dump["tokens"].values())
    return replace(found, slots=tuple(sorted(dump["keyslots"])), has_recovery_key=recovery)


def read_open(device_node: str) -> tuple[str, str]:
    """The kernel's name of MAPPER and the UUID of the container behind it; "" when it is closed.

    One that stands on another device than this has no UUID but a word for that.
    """
    if not os.path.exists(MAPPER):
        return "", ""
    node = os.path.realpath(MAPPER)
    block = Path("/sys/class/block", os.path.basename(node))
    known = (block / "dm/uuid").read_text().strip()
    match = re.fullmatch(rf"CRYPT-LUKS2-([0-9a-f]{{32}})-{NAME}", known)
    if match and (block / "slaves" / os.path.basename(device_node)).exists():
        return node, str(uuid.UUID(match[1]))
    return node, f"not on {device_node}"


def read_inside() -> tuple[str, bool]:
    """What MAPPER holds, and whether it was ever mounted as ext4; "" when nothing is known."""
    output = read_command("blkid", "--probe", "--output", "export", MAPPER, nothing=2)
    kind = next((each[5:] for each in output.splitlines() if each.startswith("TYPE=")), "")
    with open(MAPPER, "rb") as file:
        file.seek(1024 + 0x2C)  # s_mtime, the last mount time (ext4(5))
        return kind, file.read(4).strip(b"\0") != b""


def read_text(path: Path) -> Text:
    """Read a file of settings."""
    real = Path(os.path.realpath(path))
    try:
        seen = real.stat()
        owner = (seen.st_uid, seen.st_gid)
        return Text(real, real.read_bytes(), stat.S_IMODE(seen.st_mode), owner)
    except FileNotFoundError:
        return Text(real, b"")


def read_bare() -> Bare:
    """Look at the mount point, on which nothing is mounted."""
    try:
        handle = os.open(MOUNT_POINT, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Bare(False, True, 0, False)
    except OSError as error:
        raise Error(f"{MOUNT_POINT}: {error.strerror}", "it must be a directory") from None
    fixed: bool | None = None
    with contextlib.suppress(OSError):
        flags = fcntl.ioctl(handle, FS_IOC_GETFLAGS, b"\0" * 8)
        fixed = bool(int.from_bytes(flags[:4], sys.byteorder) & FS_IMMUTABLE_FL)
    try:
        return Bare(True, not os.listdir(handle), stat.S_IMODE(os.fstat(handle).st_mode), fixed)
    finally:
        os.close(handle)


def read_journal() -> dict[str, Any] | None:
    """Which device is ours; None before the first run."""
    try:
        journal = json.loads(JOURNAL.read_bytes())
        uuid.UUID(journal["uuid"]), Identity(**journal["device"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise Error(f"{JOURNAL} is damaged", "move it away, then run this again", REFUSED) from None
    return dict(journal)


def read_facts(node: str) -> Facts:
    """Look at all that a plan needs."""
    open_node, open_uuid = read_open(node)
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mounted = next((each[0] for each in reversed(mounts) if each[1] == str(MOUNT_POINT)), "")
    texts = read_text(CRYPTTAB), read_text(FSTAB)
    journal = read_journal()
    backups = [each.path.with_name(f"{each.path.name}.before-openinfra") for each in texts]
    return Facts(
        device=read_device(node, open_node),
        container=read_container(node, journal["uuid"] if journal else ""),
        journal=journal,
        open_uuid=open_uuid,
        mounted=mounted,
        mounted_mode=stat.S_IMODE(os.stat(MOUNT_POINT).st_mode) if mounted else 0,
        bare=None if mounted else read_bare(),
        crypttab=texts[0],
        fstab=texts[1],
        backed_up=tuple(path for path in backups if path.exists()),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        has_systemd=has_systemd(),
    )


# ---------------------------------------------------------------------------------------------
# Ask: what only the person knows.
# ---------------------------------------------------------------------------------------------


def ask(question: str, hidden: bool = False) -> str:
    """One line from the terminal, not from stdin; raises Error without one."""
    try:
        with open("/dev/tty", "w") as screen, open("/dev/tty", errors="surrogateescape") as keys:
            if hidden:
                return getpass.getpass(question, screen)
            screen.write(question)
            screen.flush()
            line = keys.readline()
    except OSError:
        todo = "give --passphrase-file or --key-file, and --confirm"
        raise Error("there is no terminal to ask at", todo) from None
    except UnicodeError:
        raise Error("that is not in this terminal's encoding", "type it again") from None
    except EOFError:
        raise KeyboardInterrupt from None
    if not line:
        raise KeyboardInterrupt
    return line.rstrip("\n")


def read_secret_file(path: Path) -> bytes:
    """The bytes of a passphrase or key file that only root can read; raises Error."""
    todo = "give the whole path, without spaces, of a file of root outside " + str(MOUNT_POINT)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            seen = os.fstat(file.fileno())
            raw = file.read(KEY_FILE_MAX_BYTES + 1) if stat.S_ISREG(seen.st_mode) else b""
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}", todo) from None
    inside = Path(os.path.realpath(path)).is_relative_to(MOUNT_POINT)
    plain = re.fullmatch(r"/[\w./+@-]+", str(path))  # what crypttab(5) takes as one field
    if not stat.S_ISREG(seen.st_mode) or not plain or inside:
        raise Error(f"{path} cannot be used at boot", todo)
    if seen.st_uid != 0 or seen.st_mode & 0o077:
        what = f"others than root may read {path}"
        raise Error(what, f"run: chown root {path}; chmod 600 {path}")
    if not raw or len(raw) > KEY_FILE_MAX_BYTES:
        raise Error(f"{path} is empty or over {KEY_FILE_MAX_BYTES >> 20} MiB", todo)
    return raw


def read_key(args: argparse.Namespace, key_file: Path | None) -> bytes | None:
    """The key in a file; None when a person has to type it."""
    if key_file:
        return read_secret_file(key_file)
    if args.passphrase_file:  # its line end is not a part of the passphrase
        return read_secret_file(args.passphrase_file).removesuffix(b"\n")
    return None


def find_key_file(args: argparse.Namespace, crypttab: bytes) -> Path | None:
    """The key file of the command line, else of crypttab."""
    if args.key_file or args.passphrase_file:
        return Path(args.key_file) if args.key_file else None
    named = split_fields(find_line(crypttab, 0, NAME))[2]
    return Path(named) if named.startswith("/") else None


def ask_new_key(args: argparse.Namespace, key_file: Path | None) -> bytes:
    """The key of a container that is about to be made."""
    given = read_key(args, key_file)
    if given is not None and key_file:
        return given
    if given is None:
        text = ask("New passphrase for the disk: ", hidden=True)
    else:
        text = given.decode("utf-8", "surrogateescape")
    raw = check_passphrase(text)
    if not text.isascii():
        say("note: at the boot prompt the console's keymap decides what letters outside ASCII are;")
        say("note: where it is not this one's, this passphrase cannot be typed there")
    if given is None and ask("The same again: ", hidden=True) != text:
        raise Error("the two passphrases differ", "nothing was changed; run this again")
    return raw


def ask_key(args: argparse.Namespace, key_file: Path | None, node: str) -> bytes:
    """The key of the container that is there; at a terminal it may be mistyped twice."""
    given = read_key(args, key_file)
    for tries_left in (2, 1, 0):
        raw = given
        if raw is None:
            raw = ask(f"Passphrase of {node}: ", hidden=True).encode("utf-8", "surrogateescape")
        try:
            test = ("cryptsetup", "open", "--test-passphrase", "--type=luks2", "--key-file=-", node)
            run(test, stdin=raw, timeout_s=300, echo=False)
            return raw
        except Error as error:
            if given is not None or not tries_left:
                file = key_file or args.passphrase_file or "what you typed"
                what = f"{file} does not open {node}"
                todo = "nothing was changed; with a key that opens it: cryptsetup luksAddKey; when"
                todo += f" its key is lost and nothing of yours is on it: wipefs -a {node}"
                raise Error(f"{what} ({error.what.rpartition(': ')[2]})", todo) from None
            say("that does not open it")
    raise AssertionError


def confirm(args: argparse.Namespace, device: Device) -> None:
    """Let the person type what is to be destroyed; raises Error 3."""
    wanted, known = decide_confirmation(device), device.identity
    size = f"{known.size_bytes / 1e9:.1f} GB"
    say(
        f"{device.node} ({known.by_id}, {size}, serial {known.serial or 'none'}, "
        f"PARTUUID {known.part_uuid or 'none'})"
    )
    if device.ends == "data":
        say("holds something that is NOT RECOGNISED: a damaged file system, or one without a name")
    say("ALL OF IT WILL BE OVERWRITTEN")
    typed = args.confirm
    if typed is None:
        typed = ask(f"To go on, type {wanted}: ").strip()
    if typed != wanted:
        what = f"{typed!r} is not {wanted!r}, which stands for {device.node}"
        raise Error(what, "nothing was changed", REFUSED)


# ---------------------------------------------------------------------------------------------
# Apply: the only place that changes the machine.
# ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print one line for the person."""
    print(f"setup_luks2: {text}", file=sys.stderr, flush=True)


def apply(step: Step, key: bytes) -> None:
    """Do one step."""
    if isinstance(step, Run):
        run(step.argv, stdin=key if step.secret else b"", timeout_s=3600)
    elif isinstance(step, Unlock):
        unlock(step.uuid, key)
    elif isinstance(step, Look):
        said = find_problem_inside(*read_inside(), step.unfinished)
        if said and step.close:
            run(["cryptsetup", "close", NAME])
        if said:
            raise Error(f"{step.node} {said}", "nothing was changed", REFUSED)
    else:
        say(str(step))
        if step.old is not None and read_text(step.path).content != step.old:
            raise Error(f"{step.path} changed meanwhile", "run this again; it goes on from here")
        try:
            write_file(step.path, step.content, step.mode)
            os.chown(step.path, *step.owner)
        except OSError as error:
            todo = "mend that and run this again; it goes on from here"
            raise Error(f"cannot write {step.path}: {error.strerror}", todo) from None


def add_recovery_key(container: Container, node: str, key: bytes) -> None:
    """Add a second key, show it once, and mark it as systemd-cryptenroll does."""
    phrase = render_recovery_key(secrets.token_bytes(32))
    slot = next(str(n) for n in range(32) if str(n) not in container.slots)
    argv = ["cryptsetup", "luksAddKey", "--batch-mode", f"--key-slot={slot}", "--pbkdf=pbkdf2"]
    argv += ["--pbkdf-force-iterations=1000"]  # the phrase is 256 random bits
    argv += ["--key-file=-", f"--keyfile-size={len(key)}", node, "-"]
    run(argv, stdin=key + phrase.encode(), timeout_s=300)
    say("a recovery key opens the disk as well; write it down now, it is shown only once:")
    print(f"\n    {phrase}\n", flush=True)
    token = json.dumps({"type": "systemd-recovery", "keyslots": [slot]}).encode()
    run(["cryptsetup", "token", "import", "--json-file=-", node], stdin=token)


def save_header(node: str, path: Path) -> None:
    """Copy the header, without which no passphrase helps, to a file that is not on this disk."""
    if Path(os.path.realpath(path)).is_relative_to(MOUNT_POINT):
        raise Error(f"{path} lies on the disk itself", "give a path elsewhere: a USB stick")
    run(["cryptsetup", "luksHeaderBackup", "--header-backup-file", str(path), node], timeout_s=60)
    say(f"keep {path} away from this machine; with the passphrase it opens the disk")


def list_questions(uuid_text: str) -> Iterator[tuple[str, str]]:
    """Name and socket of each of systemd's questions for the passphrase (PASSWORD_AGENTS)."""
    for path in Path("/run/systemd/ask-password").glob("ask.*"):
        with contextlib.suppress(OSError):  # answered by somebody else
            lines = path.read_text(errors="replace").splitlines()
            fields = dict(line.split("=", 1) for line in lines if "=" in line)
            if uuid_text in fields.get("Id", "") + fields.get("Message", ""):
                yield path.name, fields["Socket"]


def unlock(uuid_text: str, key: bytes) -> None:
    """Let systemd open and mount the disk as at a boot, without a key by itself; raises Error."""
    service = f"systemd-cryptsetup@{NAME}.service"
    run(["systemctl", "daemon-reload"])
    if not os.path.exists(MAPPER):  # it may count as open, or wait for an answer since the boot
        run(["systemctl", "stop", service], timeout_s=120)
    run(["systemctl", "start", "--no-block", "--no-ask-password", MOUNT_UNIT])
    answered: set[str] = set()
    until = time.monotonic() + QUESTION_S
    while time.monotonic() < until and len(answered) < 3:
        seen = read_command("systemctl", "show", "--property=ActiveState,Job", MOUNT_UNIT)
        if "ActiveState=active" in seen:
            say("opened through crypttab, mounted through fstab, as at each boot")
            return
        if not re.search(r"^Job=[1-9]", seen, re.MULTILINE):
            break
        questions = dict(list_questions(uuid_text))
        if questions and not key:
            say(f"the key file in {CRYPTTAB} does not open it: systemd asks for a passphrase")
            break
        for name in questions.keys() - answered:
            with contextlib.suppress(OSError), socket(AF_UNIX, SOCK_DGRAM) as sock:
                sock.sendto(b"+" + key, questions[name])
                answered.add(name)
        time.sleep(0.2)
    raise Error("systemd did not mount the disk", f"look: journalctl -u {service} -u {MOUNT_UNIT}")


def drill(facts: Facts, uuid_text: str, key: bytes) -> None:
    """Close the disk and have it opened as at a boot; raises Error."""
    if not facts.has_systemd:
        raise Error("systemd does not run here", "the drill needs a booted machine")
    if os.path.ismount(MOUNT_POINT):
        todo = "stop what uses it (systemctl stop openinfra-agent), then: setup_luks2.py --drill"
        try:
            run(["umount", str(MOUNT_POINT)], timeout_s=600)
        except Error as error:
            raise Error(error.what, todo) from None
    if os.path.exists(MAPPER):
        run(["cryptsetup", "close", NAME])
    unlock(uuid_text, key)


# ---------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """One device, unless only a look or a drill is asked for."""
    parser = argparse.ArgumentParser("setup_luks2.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("device", nargs="?", help="a blank partition (/dev/sdb1), or the disk of this machine")
    add("--dry-run", action="store_true", help="print what would be done")
    add("--status", action="store_true", help="print what is there")
    add("--drill", action="store_true", help="close the disk, and open it as a boot does")
    add("--passphrase-file", type=Path, metavar="FILE", help="the passphrase, on one line")
    add("--key-file", type=Path, metavar="FILE", help="a key that opens the disk at boot")
    add("--confirm", metavar="TEXT", help="what you would type before the device is overwritten")
    add("--adopt", action="store_true", help="take a LUKS2 container of another machine as it is")
    add("--whole-disk", action="store_true", help="allow a blank disk without partitions")
    add("--recovery-key", action="store_true", help="add a second key and print it once")
    add("--header-backup", type=Path, metavar="FILE", help="copy the LUKS header to this file")
    args = parser.parse_args(argv)
    if args.passphrase_file and args.key_file:
        parser.error("give --passphrase-file or --key-file, not both")
    if not args.device and not (args.status or args.drill):
        parser.error("name the device, such as /dev/sdb1 (list them: lsblk)")
    return args


def find_device(args: argparse.Namespace) -> str:
    """The device of the command line, else the one of the journal."""
    if args.device:
        return str(args.device)
    journal = read_journal()
    if journal is None:
        raise Error("this machine has no encrypted disk yet", "run: setup_luks2.py DEVICE")
    path = f"/dev/disk/by-uuid/{journal['uuid']}"
    if not os.path.exists(path):
        known = journal["device"]["by_id"]
        raise Error(f"the disk is not there: {known}", "attach it, then look: lsblk")
    return path


def take_lock() -> None:
    """Let only one of these change anything; the lock is held until this process ends."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error("setup_luks2.py runs already", "wait for its end") from None


def check_memory(memory_kib: int) -> None:
    """Raises Error when argon2id would not find the memory that each unlock needs."""
    match = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if match and int(match[1]) < memory_kib:
        what = f"argon2id needs {memory_kib >> 10} MiB of memory, {int(match[1]) >> 10} are free"
        raise Error(what, "stop what takes the most of it, then run this again")


def set_up(args: argparse.Namespace, facts: Facts, handle: int) -> int:
    """Plan, ask, look again, apply."""
    node, path = facts.device.node, args.device or facts.device.node
    key_file = find_key_file(args, facts.crypttab.content)
    steps = plan(facts, str(uuid.uuid4()), args.adopt, args.whole_disk, key_file)
    runs = [step for step in steps if isinstance(step, Run)]
    new = any(READY in step.argv for step in runs)
    if args.dry_run:
        print("\n".join(map(str, steps)) or "nothing to do")
        return 0
    used = new or args.drill or args.recovery_key or args.key_file  # a new one is drilled
    key = b""
    if any(step.destroys for step in runs):
        check_memory(decide_argon2_kib(facts.memory_bytes))
        confirm(args, facts.device)
        key = ask_new_key(args, key_file)
    elif used or any(isinstance(step, Run | Unlock) and step.secret for step in steps):
        key = ask_key(args, key_file, node)
    check_held(handle, path)
    if steps and read_facts(node) != facts:
        raise Error(f"{node} changed while you were asked", "nothing was changed", REFUSED)
    for step in steps:
        apply(step, b"" if key_file and isinstance(step, Unlock) else key)
    finish(args, node, key, key_file is not None, new)
    say("done" if steps else "nothing to do")
    return 0


def finish(args: argparse.Namespace, node: str, key: bytes, by_file: bool, new: bool) -> None:
    """The drill, the recovery key and the copy of the header."""
    facts = read_facts(node)
    container = facts.container
    if container is None:
        return
    if args.drill or (new and facts.has_systemd):
        drill(facts, container.uuid, b"" if by_file else key)
    at_terminal = new and args.confirm is None and sys.stdin.isatty()
    recovery = args.recovery_key
    if at_terminal and not recovery:
        recovery = ask("Make a recovery key? [Y/n] ").strip().lower() not in ("n", "no")
    if recovery and container.has_recovery_key:
        say("it has a recovery key already")
    elif recovery:
        add_recovery_key(container, node, key)
    path = args.header_backup
    if path is None and at_terminal:
        typed = ask("Copy the LUKS header to which file? (none: Enter) ").strip()
        path = Path(typed) if typed else None
    if path:
        save_header(node, path)
    if new and not (args.recovery_key or args.header_backup or at_terminal):
        say("later, if you wish: --recovery-key, --header-backup FILE")


def main(argv: list[str]) -> int:
    """Exit codes are in the docstring of this file."""
    args = parse_arguments(argv)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file with a passphrase in it
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        if os.geteuid() != 0:
            command = shlex.join([sys.argv[0], *argv])
            raise Error("this needs root", f"run: sudo python3 -I {command}")
        check_tools()
        handle, node = hold_device(find_device(args))
        if not (args.status or args.dry_run):
            take_lock()
        facts = read_facts(node)
        if not args.status:
            return set_up(args, facts, handle)
        findings = list(list_findings(facts))
        for what, good, said in findings:
            print(f"{'ok' if good else 'NO':3} {what:13} {said}")
        return 0 if all(good for _, good, _ in findings) else 1
    except Error as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
