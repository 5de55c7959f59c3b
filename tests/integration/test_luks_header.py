"""setup_luks2.py with cryptsetup on plain files: headers, kills, a second key. No device mapper.

Also the other files that it reads and writes, and what a container is asked for its contents.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import setup_luks2
from setup_luks2 import FORMATTING, READY, Error, add_recovery_key, read_container, save_header
from tests.harness import ROOT

KEY = b"correct horse battery \xc3\xa9"
UUID = str(uuid.UUID(int=7))
SIZE = 32 << 20
KILLS = 24


def make(tmp_path: Path) -> Path:
    """A blank disk that is a file."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def format_argv(path: Path, *, fast: bool = False) -> list[str]:
    """The one command that destroys, as a small host gets it; `fast` measures no unlock time."""
    argv = list(setup_luks2.plan_format(str(path), UUID, 256 << 20).argv)
    measured = argv.index(f"--iter-time={setup_luks2.ITER_MS}")
    return [*argv[:measured], "--pbkdf-force-iterations=4", *argv[measured + 1 :]] if fast else argv


def opens(path: Path, key: bytes) -> bool:
    """Whether this key opens the container."""
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(path)]
    return subprocess.run(argv, input=key, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = make(tmp_path)
    subprocess.run(format_argv(path), input=KEY, check=True)
    return path


def test_what_is_made(disk: Path) -> None:
    found = read_container(str(disk), UUID)
    assert found == setup_luks2.Container(2, UUID, FORMATTING, ("0",))
    argv = ["cryptsetup", "luksDump", str(disk)]
    dump = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "argon2id" in dump
    assert int(dump.split("Memory:")[1].split()[0]) <= 65536  # KiB: a quarter of 256 MiB
    assert opens(disk, KEY)
    assert not opens(disk, KEY[:-1])
    subprocess.run(["cryptsetup", "config", "--label", READY, str(disk)], check=True)
    found = read_container(str(disk), UUID)
    assert found is not None
    assert found.label == READY


def test_nothing_is_seen_on_a_blank_one(tmp_path: Path) -> None:
    assert read_container(str(make(tmp_path)), UUID) is None


def test_a_luks1_header_is_seen(tmp_path: Path) -> None:
    """Its version is all that is asked, also where its UUID is ours: it has no metadata to dump."""
    path = make(tmp_path)
    argv = ["cryptsetup", "luksFormat", "-q", "--type=luks1", "--pbkdf-force-iterations=1000"]
    subprocess.run([*argv, f"--uuid={UUID}", path, "-"], input=KEY, check=True)
    assert read_container(str(path), UUID) == setup_luks2.Container(1, UUID, "")


def test_a_foreign_header_is_not_even_repaired(disk: Path) -> None:
    """cryptsetup writes a damaged first header anew from the second when it looks at it."""
    with disk.open("r+b") as file:
        file.seek(0x1000 + 100)
        file.write(b"x" * 64)
    before = disk.read_bytes()
    foreign = read_container(str(disk), str(uuid.UUID(int=8)))
    assert foreign == setup_luks2.Container(2, UUID, FORMATTING)
    assert disk.read_bytes() == before
    ours = read_container(str(disk), UUID)
    assert ours == setup_luks2.Container(2, UUID, FORMATTING, ("0",))


@pytest.mark.parametrize("label", [FORMATTING, READY])
def test_a_header_that_was_half_written(disk: Path, label: str) -> None:
    """As by a kill between the writes of luksFormat: the first copy without its checksum, and the
    second not yet. It is blank when it was being formatted, and else nothing touches it."""
    subprocess.run(["cryptsetup", "config", "--label", label, str(disk)], check=True)
    with disk.open("r+b") as file:
        file.seek(0x1C0)  # csum, of the binary header (LUKS2 On-Disk Format Specification, 2.1)
        file.write(bytes(64))
        file.seek(0x4000)
        file.write(bytes(0x4000))
    before = disk.read_bytes()
    if label == READY:
        with pytest.raises(Error, match="is not a valid LUKS device"):
            read_container(str(disk), UUID)
    else:
        assert read_container(str(disk), UUID) == setup_luks2.Container(2, UUID, FORMATTING)
    assert disk.read_bytes() == before
    subprocess.run(format_argv(disk, fast=True), input=KEY, check=True)
    assert opens(disk, KEY)


def test_kill_9_while_it_formats(tmp_path: Path) -> None:
    """After each kill the header is one of three; with a key in it, it opens."""
    chance = random.Random(1)
    states = set()
    path = make(tmp_path)
    began = time.monotonic()
    subprocess.run(format_argv(path, fast=True), input=KEY, check=True)
    whole_s = time.monotonic() - began
    for _ in range(KILLS):
        path = make(tmp_path)
        with subprocess.Popen(format_argv(path, fast=True), stdin=subprocess.PIPE) as process:
            assert process.stdin
            process.stdin.write(KEY)
            process.stdin.close()
            time.sleep(chance.uniform(0, whole_s))
            process.kill()
        found = read_container(str(path), UUID)
        states.add(len(found.slots) if found else None)
        if found:
            assert (found.uuid, found.label) == (UUID, FORMATTING)
            assert opens(path, KEY) is bool(found.slots)
        subprocess.run(format_argv(path, fast=True), input=KEY, check=True)
        assert opens(path, KEY)
    assert {None, 0} <= states, "the kills came too late"


def test_recovery_key(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = read_container(str(disk), UUID)
    assert made
    add_recovery_key(made, str(disk), KEY)
    phrase = capsys.readouterr().out.strip()
    assert opens(disk, phrase.encode())
    assert opens(disk, KEY)
    found = read_container(str(disk), UUID)
    assert found == setup_luks2.Container(2, UUID, FORMATTING, ("0", "1"), has_recovery_key=True)
    with pytest.raises(Error, match="No key available"):
        add_recovery_key(found, str(disk), b"another passphrase")


def test_header_backup(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "header"
    save_header(str(disk), copy)
    assert copy.stat().st_mode & 0o077 == 0
    with disk.open("r+b") as file:
        file.write(bytes(1 << 20))
    assert not opens(disk, KEY)
    argv = ["cryptsetup", "luksHeaderRestore", "-q", "--header-backup-file", str(copy), str(disk)]
    subprocess.run(argv, check=True)
    assert opens(disk, KEY)
    with pytest.raises(Error, match="exists"):
        save_header(str(disk), copy)
    with pytest.raises(Error, match="lies on the disk itself"):
        save_header(str(disk), setup_luks2.MOUNT_POINT / "header")


def test_what_cannot_be_read_is_not_blank(tmp_path: Path) -> None:
    """A bad sector is nothing to wipefs and blkid; here each of the first reads fails in turn."""
    path = make(tmp_path)
    assert setup_luks2.read_ends(str(path), SIZE) == "zero"
    assert setup_luks2.read_ends(str(path), 2 * SIZE) == "unreadable"
    program = "import sys, setup_luks2; print(setup_luks2.read_ends(sys.argv[1], int(sys.argv[2])))"
    for number in (1, 2):
        argv = ["strace", "-qqo", "/dev/null", "-e", f"inject=pread64:error=EIO:when={number}"]
        argv += ["-P", str(path), sys.executable, "-c", program, str(path), str(SIZE)]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "unreadable"
    with path.open("r+b") as file:
        file.seek(SIZE - 1)
        file.write(b"x")
    assert setup_luks2.read_ends(str(path), SIZE) == "data"


def test_what_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that was only made is not one that was used."""
    path = make(tmp_path)
    monkeypatch.setattr(setup_luks2, "MAPPER", str(path))
    assert setup_luks2.read_inside() == ("", False)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    assert setup_luks2.read_inside() == ("ext4", False)
    subprocess.run(["debugfs", "-w", "-R", "set_super_value mtime 20260101", path], check=True)
    assert setup_luks2.read_inside() == ("ext4", True)
    subprocess.run(["mkswap", "-q", path], check=True)
    assert setup_luks2.read_inside()[0] == "swap"


def test_a_key_is_tried(disk: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's files hold keys")
    file = tmp_path / "pass"
    args = argparse.Namespace(passphrase_file=file, key_file=None)
    for text, opens_it in ((KEY + b"\n", True), (KEY, True), (KEY + b"\n\n", False), (b"x", False)):
        file.write_bytes(text)
        file.chmod(0o600)
        if opens_it:
            assert setup_luks2.ask_key(args, None, str(disk)) == KEY
        else:
            with pytest.raises(Error, match=rf"{file} does not open {disk} \(No key available"):
                setup_luks2.ask_key(args, None, str(disk))


def test_a_passphrase_file_for_a_new_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has to be one that a person can type; a key file may hold anything."""
    if os.geteuid() != 0:
        pytest.skip("only root's files hold keys")
    file = tmp_path / "pass"
    args = argparse.Namespace(passphrase_file=file, key_file=None)
    for text, said in ((b"\n", "too short"), (b"x\n", "too short"), (b"two\nlines\n", "keyboard")):
        file.write_bytes(text)
        file.chmod(0o600)
        with pytest.raises(Error, match=said):
            setup_luks2.ask_new_key(args, None)
        assert setup_luks2.ask_new_key(args, file) == text
    for text, warned in ((b"correct horse\n", False), (KEY + b"\n", True)):
        file.write_bytes(text)
        assert setup_luks2.ask_new_key(args, None) == text.removesuffix(b"\n")
        assert ("keymap" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("name", "content", "mode", "owner", "said"),
    [
        ("key", b"k" * 64, 0o600, 0, ""),
        ("key", b"k" * setup_luks2.KEY_FILE_MAX_BYTES, 0o400, 0, ""),
        ("key", b"k" * 64, 0o640, 0, "others than root may read"),
        ("key", b"k" * 64, 0o604, 0, "others than root may read"),
        ("key", b"k" * 64, 0o600, 65534, "others than root may read"),
        ("key", b"", 0o600, 0, "is empty or over 8 MiB"),
        ("key", b"k" * (setup_luks2.KEY_FILE_MAX_BYTES + 1), 0o600, 0, "is empty or over 8 MiB"),
        ("key 1", b"k" * 64, 0o600, 0, "cannot be used at boot"),
        ("mount/key", b"k" * 64, 0o600, 0, "cannot be used at boot"),
    ],
)
def test_a_key_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    mode: int,
    owner: int,
    said: str,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's files hold keys")
    monkeypatch.setattr(setup_luks2, "MOUNT_POINT", tmp_path / "mount")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    os.chown(path, owner, -1)
    if not said:
        assert setup_luks2.read_secret_file(path) == content
        return
    with pytest.raises(Error, match=said):
        setup_luks2.read_secret_file(path)


def test_whose_key_file() -> None:
    """The command line's, else the one in crypttab; without one a passphrase is asked for."""
    line = f"{setup_luks2.NAME} UUID={UUID} {{}} luks\n"
    for named, args, wanted in (
        ("/root/key", {}, Path("/root/key")),
        ("none", {}, None),
        ("-", {}, None),
        ("/root/key", {"key_file": Path("/root/new")}, Path("/root/new")),
        ("/root/key", {"passphrase_file": Path("/root/pass")}, None),
    ):
        given = argparse.Namespace(**{"key_file": None, "passphrase_file": None, **args})
        assert setup_luks2.find_key_file(given, line.format(named).encode()) == wanted


def test_what_is_no_key_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "cannot be used at boot"),
        (Path("/dev/zero"), "cannot be used at boot"),
        (tmp_path / "none", "cannot read .*none: No such file"),
    ):
        with pytest.raises(Error, match=said):
            setup_luks2.read_secret_file(path)


def test_what_is_no_block_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(make(tmp_path))
    for path, said in (
        (tmp_path / "disk", "is not a block device"),
        (tmp_path / "link", "is not a block device"),
        (tmp_path, "is not a block device"),
        (tmp_path / "fifo", "is not a block device"),
        (Path("/dev/null"), "is not a block device"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(Error, match=said) as caught:
            setup_luks2.hold_device(str(path))
        assert caught.value.exit_code == 3


def test_a_damaged_journal_is_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "luks.json"
    monkeypatch.setattr(setup_luks2, "JOURNAL", path)
    assert setup_luks2.read_journal() is None
    for text in ("", "{", "[]", "null", "{}", '{"uuid": "1", "device": {}}'):
        path.write_text(text)
        with pytest.raises(Error, match="is damaged") as caught:
            setup_luks2.read_journal()
        assert caught.value.exit_code == 3


def test_a_file_of_settings_is_written_where_it_is(tmp_path: Path) -> None:
    """Behind a link, with its mode and owner, and only while it is what was read."""
    real, link = tmp_path / "real", tmp_path / "crypttab"
    link.symlink_to("real")
    assert setup_luks2.read_text(link) == setup_luks2.Text(real, b"")
    real.write_bytes(b"old")
    real.chmod(0o640)
    owner = (65534, 65533) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(real, *owner)
    found = setup_luks2.read_text(link)
    assert found == setup_luks2.Text(real, b"old", 0o640, owner)
    step = setup_luks2.WriteFile(found.path, b"new", found.mode, "why", found.owner, b"old")
    setup_luks2.apply(step, b"")
    assert link.is_symlink()
    assert setup_luks2.read_text(link) == setup_luks2.Text(real, b"new", 0o640, owner)
    with pytest.raises(Error, match="changed meanwhile"):
        setup_luks2.apply(step, b"")
    assert real.read_bytes() == b"new"


def test_no_core_file_and_no_half_end() -> None:
    """Whatever it is asked for: a signal ends it as Ctrl-C does, and it leaves no core file."""
    program = (
        "import resource, setup_luks2, signal, sys; setup_luks2.main(['/dev/null']); "
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0); "
        "assert {signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)} "
        "== {signal.default_int_handler}"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def type_at(program: str, *steps: tuple[str, str]) -> tuple[str, int]:
    """Run a program at a terminal, type what its questions wait for; gives what was seen."""
    ours, theirs = pty.openpty()
    argv = ["setsid", "--ctty", "timeout", "--foreground", "60", sys.executable, "-c", program]
    seen, at = "", 0
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: it has ended
            for question, typed in (*steps, ("no question is this", "")):
                while question not in seen[at:]:
                    seen += os.read(ours, 4096).decode()
                at = seen.index(question, at) + len(question)
                os.write(ours, typed.encode())
        os.close(ours)
    return seen, process.returncode


ASK_NEW = """
import argparse, setup_luks2
print(setup_luks2.ask_new_key(argparse.Namespace(passphrase_file=None), None))
"""


def test_a_new_passphrase_is_typed_twice() -> None:
    first, second = "New passphrase for the disk: ", "The same again: "
    seen, code = type_at(ASK_NEW, (first, "correct horse\n"), (second, "correct horse\n"))
    assert (code, seen.count("correct horse")) == (0, 1)  # what the program printed at its end
    for typed in ("correct hors\n", "\n", "correct horse \n"):
        seen, code = type_at(ASK_NEW, (first, "correct horse\n"), (second, typed))
        assert (code, "the two passphrases differ; nothing was changed" in seen) == (1, True)
    seen, code = type_at(ASK_NEW, (first, "x\n"))
    assert (code, "too short" in seen, second in seen) == (1, True, False)
    argv = [sys.executable, "-c", ASK_NEW]
    alone = subprocess.run(argv, cwd=ROOT, start_new_session=True, capture_output=True, check=False)
    assert (alone.returncode, b"there is no terminal to ask at" in alone.stderr) == (1, True)


def test_a_passphrase_may_be_mistyped_twice(disk: Path) -> None:
    program = (
        "import argparse, setup_luks2; setup_luks2.ask_key("
        f"argparse.Namespace(passphrase_file=None), None, {str(disk)!r})"
    )
    wrong, right = ((f"Passphrase of {disk}: ", each + "\n") for each in ("no", KEY.decode()))
    assert type_at(program, right)[1] == 0
    assert type_at(program, wrong, wrong, right)[1] == 0
    seen, code = type_at(program, wrong, wrong, wrong)
    assert (code, "what you typed does not open" in seen) == (1, True)


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_luks2, "LOCK", tmp_path / "lock")
    setup_luks2.take_lock()
    with pytest.raises(Error, match="runs already"):
        setup_luks2.take_lock()


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_luks2.check_memory(1 << 10)
    with pytest.raises(Error, match=r"argon2id needs 1048576 MiB of memory, \d+ are free"):
        setup_luks2.check_memory(1 << 30)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Error, match="apt-get install cryptsetup-bin e2fsprogs mount util-linux"):
        setup_luks2.check_tools()
