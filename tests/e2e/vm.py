"""Real Debian 12 machines for the tests, in qemu without KVM and without privileges.

A machine has no network but the private ones it joins, and leaves nothing behind but its directory:
its processes end with the test, also when pytest is killed. All waiting has a limit, and what a
machine said is in the exception.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.e2e.channels import Console, Guest, Qmp
from tests.e2e.guest_agent import PORT
from tests.e2e.image import PASSWORD, USER, Image, ensure_cached, hash_files
from tests.e2e.network import Network

# A boot takes 20 s on a quiet machine.
BOOT_TIMEOUT_S = 150.0
# How long an answer may take beyond the time limit of the command.
ANSWER_TIMEOUT_S = 15.0
# Places on the PCI bus are fixed, so that a restored machine finds its disks where they were.
FIRST_NIC_SLOT, FIRST_DISK_SLOT = 0x8, 0x10
MAX_DISKS = 14
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet mitigations=off tsc=reliable selinux=0"
)
CONTROL_SEQUENCES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])|\r")
SCREEN_LINES = 25
# Where what a failed test's machines said is kept.
FAILED = Path(os.environ.get("OPENINFRA_E2E_FAILED") or Path(__file__).parent / "failed")
# What a machine is asked for after a failure, and the file that it goes to.
QUESTIONS = {
    "journal.txt": "journalctl --boot --no-pager",
    "dmesg.txt": "dmesg",
    "units.txt": "systemctl list-units --all --no-pager; systemctl list-jobs --no-pager",
    "disks.txt": "lsblk --all; cat /proc/mounts",
}


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command in a machine ended; -9 when it was killed at its time limit."""

    code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool

    @property
    def text(self) -> str:
        """What it printed."""
        return self.stdout.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A raw file that is a virtio disk of a machine."""

    name: str
    path: Path
    serial: str
    slot: int

    def backend(self) -> dict[str, Any]:
        """For -blockdev: past the host's page cache, as cache=none."""
        direct = {"direct": True}
        file = {"driver": "file", "filename": str(self.path), "cache": direct, "discard": "unmap"}
        return {"driver": "raw", "node-name": self.name, "cache": direct, "file": file}

    def device(self) -> dict[str, Any]:
        """For -device."""
        serial = {"serial": self.serial} if self.serial else {}
        place = {"id": self.name, "drive": self.name, "addr": hex(self.slot)}
        return {"driver": "virtio-blk-pci", **place, **serial}


@dataclasses.dataclass(frozen=True)
class Nic:
    """A network card of a machine."""

    network: Network
    mac: str
    slot: int

    def backend(self, fd: str) -> dict[str, Any]:
        """For -netdev: a cable that is an open socket."""
        return {"type": "dgram", "id": f"net{self.slot}", "local": {"type": "fd", "str": fd}}

    def device(self) -> dict[str, Any]:
        """For -device."""
        place = {"id": f"nic{self.slot}", "netdev": f"net{self.slot}", "addr": hex(self.slot)}
        return {"driver": "virtio-net-pci", **place, "mac": self.mac, "romfile": ""}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """RAM and disks of a machine that ran; any number of machines may start from it."""

    directory: Path
    memory_mb: int
    cpus: int
    disks: tuple[Disk, ...]

    def save(self) -> None:
        """Write down what it is, for `load`."""
        said = {"memory_mb": self.memory_mb, "cpus": self.cpus}
        disks = [{**vars(disk), "path": disk.path.name} for disk in self.disks]
        (self.directory / "snapshot.json").write_text(json.dumps({**said, "disks": disks}))

    @classmethod
    def load(cls, directory: Path) -> Snapshot:
        """One that was kept, also when its directory was moved."""
        said = json.loads((directory / "snapshot.json").read_text())
        disks = (Disk(**{**disk, "path": directory / disk["path"]}) for disk in said["disks"])
        return cls(directory, said["memory_mb"], said["cpus"], tuple(disks))


def check_direct_io(directory: Path) -> None:
    """Fail the test unless files there can be opened as disks are: past the page cache."""
    probe = directory / "direct-io"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        message = f"{directory} is on a file system without O_DIRECT; name another with --basetemp"
        raise AssertionError(message) from error
    finally:
        probe.unlink(missing_ok=True)


def fd_chardev(name: str, fd: int, option: str, value: str) -> list[str]:
    """Options of qemu: a socket that is open already, and what is at it."""
    return ["-chardev", f"socket,id={name},fd={fd}", option, value]


# How long what can be made again is kept when no test uses it.
UNUSED_MAX_AGE_S = 86400


def ensure_booted(image: Image) -> Snapshot:
    """Give back a machine right after its boot; make it when it is not there."""

    def make(directory: Path) -> None:
        make_snapshot(image, directory, "booted", lambda vm: vm.boot())

    modules = [Path(__file__).parent / f"{name}.py" for name in ("vm", "channels")]
    key = hash_files(image.directory, modules)
    return Snapshot.load(ensure_cached("booted", key, UNUSED_MAX_AGE_S, make) / "kept")


class Vm:
    """One machine: its root disk, its other disks, and the qemu process while it is on."""

    def __init__(
        self,
        image: Image,
        directory: Path,
        name: str,
        *,
        memory_mb: int = 1024,
        cpus: int = 1,
        tpm: bool = False,
    ) -> None:
        self.image = image
        self.directory = directory
        self.name = name
        self.memory_mb = memory_mb
        self.cpus = cpus
        self.tpm = tpm
        self.disks: dict[str, Disk] = {}
        self.nics: list[Nic] = []
        self.boot_id = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.swtpm: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)
        check_direct_io(directory)

    # On and off.

    def boot(self, *, kernel_arguments: str = "", wait: bool = True) -> None:
        """Switch it on, over the disks as they are; wait until all units have started or failed."""
        if not self._root.exists():
            self._make_root(self.image.root, "raw")
        self._start([], kernel_arguments)
        if wait:
            self.wait_booted()

    def wait_booted(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until a machine that was switched on, or starts again, is up in its new boot."""
        self.wait_agent(timeout_s)
        self.wait_up(timeout_s)

    def wait_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until all units have started or failed."""
        done = self.exec(["systemctl", "is-system-running", "--wait"], timeout_s=timeout_s)
        if done.timed_out:
            jobs = self.exec(["systemctl", "list-jobs", "--no-pager"]).text
            raise AssertionError(f"{self.name}: after {timeout_s:g} s it waits for\n{jobs}")

    def wait_agent(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until it takes commands in a new boot; it does long before all units are up.

        In its first boot it is given its name.
        """
        old = self.boot_id
        if not self.guest.wait(lambda: self.guest.boot_id not in ("", old), timeout_s):
            raise AssertionError(f"{self.name}: no boot in {timeout_s:g} s; {self._last_words()}")
        self.boot_id = self.guest.boot_id
        if not old:
            self._become()

    def restore(self, snapshot: Snapshot) -> None:
        """Switch it on in the state of a snapshot, but as another machine than all others.

        Name, machine id, random numbers and clock are its own; the boot id is that of the snapshot
        until it starts again.
        """
        assert not self._root.exists(), "a machine with a past cannot become another"
        assert (self.memory_mb, self.cpus, self.tpm) == (snapshot.memory_mb, snapshot.cpus, False)
        self._make_root(snapshot.directory / "root.qcow2", "qcow2")
        for disk in snapshot.disks:
            mine = dataclasses.replace(disk, path=self.directory / disk.path.name)
            argv = ["cp", "--sparse=always", str(disk.path), str(mine.path)]
            subprocess.run(argv, check=True)
            self.disks[mine.name] = mine
        with (snapshot.directory / "ram").open("rb") as ram:
            self._start(["-incoming", f"fd:{ram.fileno()}"], "", [ram.fileno()])
            while self.qmp.run("query-status")["status"] == "inmigrate":
                time.sleep(0.02)
        self.qmp.run("cont")
        self._become(machine_id=secrets.token_hex(16))
        self.boot_id = self.sh("cat /proc/sys/kernel/random/boot_id").strip()

    def snapshot(self, directory: Path) -> Snapshot:
        """Keep RAM and disks in a directory; this machine is off afterwards, and gone."""
        assert not self.nics, "a network does not survive in a snapshot; join it later"
        assert not self.tpm, "the state of a TPM is not kept in a snapshot"
        directory.mkdir(parents=True)
        self.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sync")
        self.qmp.run("stop")
        with (directory / "ram").open("wb") as ram:
            self.qmp.run("getfd", fds=[ram.fileno()], fdname="ram")
            self.qmp.run("migrate-set-parameters", max_bandwidth=1 << 40)
            self.qmp.run("migrate", uri="fd:ram")
            while (status := self.qmp.run("query-migrate")["status"]) != "completed":
                assert status not in ("failed", "cancelled"), self.qmp.run("query-migrate")
                time.sleep(0.02)
        self.qmp.run("quit")
        self._off()
        self._root.rename(directory / "root.qcow2")
        disks = []
        for disk in self.disks.values():
            kept = dataclasses.replace(disk, path=directory / disk.path.name)
            disks.append(kept)
            disk.path.rename(kept.path)
        made = Snapshot(directory, self.memory_mb, self.cpus, tuple(disks))
        made.save()
        return made

    def power_cut(self) -> None:
        """Take its power: what it had not written to its disks is lost."""
        assert self.process
        self.process.kill()
        self._off()

    def reboot(self, *, wait: bool = True) -> None:
        """Have it start again in the ordinary way; wait for a new boot id and all units."""
        with contextlib.suppress(AssertionError):  # it may be gone before it answers
            self.exec(["systemctl", "--no-block", "reboot"], timeout_s=20)
        if wait:
            self.wait_booted()

    def shutdown(self, timeout_s: float = 90) -> None:
        """Switch it off in the ordinary way."""
        with contextlib.suppress(AssertionError):
            self.exec(["systemctl", "--no-block", "poweroff"], timeout_s=20)
        self.wait_off(timeout_s)

    def wait_off(self, timeout_s: float = 90) -> None:
        """Wait until it has switched itself off."""
        assert self.process
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            message = f"{self.name} is still on after {timeout_s:g} s; {self._last_words()}"
            raise AssertionError(message) from None
        self._off()

    def freeze(self) -> None:
        """Let nothing of it go on, its clock neither; the others find it gone."""
        self.qmp.run("stop")

    def thaw(self) -> None:
        """Let it go on where it was."""
        self.qmp.run("cont")

    def stop(self) -> None:
        """End all processes of it, whatever state it is in."""
        if self.process:
            self.power_cut()

    # Commands and files.

    def exec(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60) -> Done:
        """Run a command as root; at the time limit all its process group is killed."""
        answer = self.guest.ask(
            timeout_s + ANSWER_TIMEOUT_S,
            argv=list(argv),
            stdin=base64.b64encode(stdin).decode(),
            timeout_s=timeout_s,
        )
        stdout, stderr = (base64.b64decode(answer[name]) for name in ("stdout", "stderr"))
        return Done(answer["code"], stdout, stderr, answer["timed_out"])

    def sh(self, script: str, *, stdin: bytes = b"", timeout_s: float = 60) -> str:
        """Run lines of bash that must succeed; give back what they print."""
        argv = ["bash", "-euo", "pipefail", "-c", script]
        done = self.exec(argv, stdin=stdin, timeout_s=timeout_s)
        how = f"was killed after {timeout_s:g} s" if done.timed_out else f"ended with {done.code}"
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert done.code == 0, f"{self.name}: {script!r} {how}:\n{said}"
        return done.text

    def put(self, content: bytes, path: str, mode: int = 0o644) -> None:
        """Write a file; its directory is made when missing."""
        quoted = shlex.quote(path)
        self.sh(f"install -D -m {mode:o} /dev/stdin {quoted}", stdin=content)

    def get(self, path: str) -> bytes:
        """Read a file."""
        done = self.exec(["cat", path])
        assert done.code == 0, f"{self.name}: {done.stderr.decode(errors='replace')}"
        return done.stdout

    # The console.

    def type(self, text: str) -> None:
        """Type at the serial console."""
        self.console.send(text.encode())

    def wait_console(self, text: str, timeout_s: float = 60) -> None:
        """Wait for a text on the console, after the one that an earlier call found."""
        if not self.console.wait(lambda: self.console.find(text), timeout_s):
            raise AssertionError(
                f"{self.name}: no {text!r} in {timeout_s:g} s; {self._last_words()}"
            )

    def log_in(self) -> None:
        """Log in as root at the serial console; its shell repeats what is typed as it is."""
        self.type("\n")
        self.wait_console("login: ")
        self.type(f"{USER}\n")
        self.wait_console("Password: ")
        self.type(f"{PASSWORD}\n")
        self.wait_console("# ")
        self.type("bind 'set enable-bracketed-paste off'\n")
        self.wait_console("# ")

    def screen(self) -> str:
        """The last lines of the console, without control sequences."""
        path = self.directory / "console.log"
        raw = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(CONTROL_SEQUENCES.sub("", raw).split("\n")[-SCREEN_LINES:])

    def save_state(self, directory: Path) -> None:
        """Keep what it says about itself; one that gives no answer has at least its console."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "screen.txt").write_text(self.screen())
        for log in self.directory.glob("*.log"):
            shutil.copyfile(log, directory / log.name)
        if not self.process:
            return
        with contextlib.suppress(AssertionError):  # it gives no answer
            for name, question in QUESTIONS.items():
                done = self.exec(["bash", "-c", question], timeout_s=20)
                (directory / name).write_bytes(done.stdout + done.stderr)

    # Disks.

    def attach_disk(
        self, name: str, size_bytes: int = 0, *, serial: str | None = None, path: Path | None = None
    ) -> Disk:
        """Add a disk, also while it runs: an empty one, or an existing file of another machine.

        Its serial number is its name unless given; an empty one is none. In the machine it is
        /dev/disk/by-id/virtio-SERIAL.
        """
        assert name not in self.disks
        if path is None:
            path = self.directory / f"{name}.raw"
            with path.open("wb") as file:
                file.truncate(size_bytes)
        used = {disk.slot for disk in self.disks.values()}
        slot = next(s for s in range(FIRST_DISK_SLOT, FIRST_DISK_SLOT + MAX_DISKS) if s not in used)
        disk = Disk(name, path, name if serial is None else serial, slot)
        if self.process:
            self.qmp.run("blockdev-add", **disk.backend())
            self.qmp.run("device_add", **disk.device())
            there = f"/sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block"
            self.sh(f"until compgen -G '{there}' > /dev/null; do sleep 0.05; done; udevadm settle")
        self.disks[name] = disk
        return disk

    def detach_disk(self, name: str) -> Disk:
        """Take a disk out, also while it runs; its file stays."""
        disk = self.disks.pop(name)
        if self.process:
            self.qmp.run("device_del", id=name)
            self.qmp.wait_event("DEVICE_DELETED", device=name)
            self.qmp.run("blockdev-del", node_name=name)
        return disk

    # Networks.

    def join(self, network: Network, address: str, gateway: str = "") -> None:
        """Put a network card into the running machine; it, its address (CIDR) and way out stay."""
        slot = FIRST_NIC_SLOT + len(self.nics)
        digest = hashlib.sha256(f"{self.name} {slot}".encode()).hexdigest()
        mac = f"52:54:00:{digest[:2]}:{digest[2:4]}:{digest[4:6]}"
        nic = Nic(network, mac, slot)
        with network.plug(self.name) as cable:
            self.qmp.run("getfd", fds=[cable.fileno()], fdname="cable")
        self.qmp.run("netdev_add", **nic.backend("cable"))
        self.qmp.run("device_add", **nic.device())
        self.nics.append(nic)
        link = f"[Match]\nMACAddress={mac}\n[Network]\nLinkLocalAddressing=no\nAddress={address}\n"
        link += f"Gateway={gateway}\n" if gateway else ""
        self.put(link.encode(), f"/etc/systemd/network/{mac.replace(':', '')}.network")
        self.sh(
            f"networkctl reload; until ip -o addr | grep -qF {address}; do sleep 0.1; done; sync"
        )

    # Inside.

    @property
    def _root(self) -> Path:
        return self.directory / "root.qcow2"

    def _make_root(self, back: Path, form: str) -> None:
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(back), "-F", form]
        subprocess.run([*argv, str(self._root)], check=True)

    def _start(self, more: list[str], kernel_arguments: str, fds: Sequence[int] = ()) -> None:
        """Start qemu, and its TPM before it."""
        assert self.process is None, f"{self.name} is on"
        with contextlib.ExitStack() as theirs:

            def pair() -> tuple[socket.socket, int]:
                ours, other = socket.socketpair()
                return ours, theirs.enter_context(other).fileno()

            (qmp, qmp_fd), (console, console_fd), (guest, guest_fd) = pair(), pair(), pair()
            argv = ["qemu-system-x86_64", *self._machine(kernel_arguments), *more]
            argv += fd_chardev("qmp", qmp_fd, "-mon", "chardev=qmp,mode=control")
            argv += fd_chardev("console", console_fd, "-serial", "chardev:console")
            port = f"virtserialport,chardev=guest,name={PORT}"
            argv += ["-device", "virtio-serial-pci,addr=0x3"]
            argv += fd_chardev("guest", guest_fd, "-device", port)
            fds = [*fds, qmp_fd, console_fd, guest_fd]
            for nic in self.nics:
                cable = theirs.enter_context(nic.network.plug(self.name)).fileno()
                argv += ["-netdev", json.dumps(nic.backend(str(cable)))]
                argv += ["-device", json.dumps(nic.device())]
                fds.append(cable)
            if self.tpm:
                tpm, tpm_fd = socket.socketpair()
                theirs.enter_context(tpm)
                theirs.enter_context(tpm_fd)
                self.swtpm = self._start_swtpm(tpm_fd.fileno())
                argv += fd_chardev("tpm", tpm.fileno(), "-tpmdev", "emulator,id=tpm,chardev=tpm")
                argv += ["-device", "tpm-tis,tpmdev=tpm"]
                fds.append(tpm.fileno())
            self.process = self._spawn(argv, fds, "qemu.log")
        self.console = Console(console, self.directory / "console.log")
        self.guest = Guest(guest)
        try:
            self.qmp = Qmp(qmp)
        except AssertionError:
            said = (self.directory / "qemu.log").read_text()
            raise AssertionError(f"{self.name}: qemu did not start: {said}") from None

    def _machine(self, kernel_arguments: str) -> list[str]:
        """Give back the hardware for qemu's command line."""
        argv = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc"]
        argv += ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-smp", str(self.cpus)]
        argv += ["-m", str(self.memory_mb), "-name", self.name]
        argv += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)]
        argv += ["-append", f"{KERNEL_ARGUMENTS} {kernel_arguments}"]
        argv += ["-device", "virtio-rng-pci,addr=0x2"]
        root = {"driver": "file", "filename": str(self._root), "discard": "unmap"}
        argv += ["-blockdev", json.dumps({"driver": "qcow2", "node-name": "root", "file": root})]
        argv += ["-device", "virtio-blk-pci,drive=root,addr=0x4"]
        for disk in self.disks.values():
            argv += ["-blockdev", json.dumps(disk.backend())]
            argv += ["-device", json.dumps(disk.device())]
        return argv

    def _start_swtpm(self, fd: int) -> subprocess.Popen[bytes]:
        state = self.directory / "tpm"
        state.mkdir(exist_ok=True)
        argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--terminate"]
        argv += ["--ctrl", f"type=unixio,clientfd={fd}", "--flags", "startup-clear"]
        return self._spawn(argv, [fd], "swtpm.log")

    def _spawn(self, argv: list[str], fds: Sequence[int], log: str) -> subprocess.Popen[bytes]:
        """Start a process that ends when the thread that started it does, at the latest."""
        with (self.directory / log).open("ab") as output:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
            )

    def _off(self) -> None:
        """Clear up after qemu ended."""
        assert self.process
        self.process.wait(30)
        self.process = None
        for channel in (self.console, self.guest, self.qmp):
            channel.close()
        if self.swtpm:
            self.swtpm.wait(10)  # it ends by itself, once its state is written
            self.swtpm = None

    def _become(self, **more: str) -> None:
        seed = base64.b64encode(secrets.token_bytes(32)).decode()
        self.guest.ask(30, hostname=self.name, seed=seed, time=time.time(), **more)

    def _last_words(self) -> str:
        return f"its console says:\n{self.screen()}"


def make_snapshot(
    image: Image, directory: Path, name: str, prepare: Callable[[Vm], None], **more: Any
) -> Snapshot:
    """Have a machine started and prepared, and keep it in a directory.

    When that fails, what the machine said is kept instead.
    """
    vm = Vm(image, directory / "vm", name, **more)
    try:
        prepare(vm)
        return vm.snapshot(directory / "kept")
    except AssertionError:
        vm.save_state(FAILED / name)
        raise
    finally:
        vm.stop()
