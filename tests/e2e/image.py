"""The disk image, kernel and initramfs of the test machines: a Debian 12 made by mmdebstrap.

It is made once for each recipe (packages, files, the text of guest_agent.py) and kept under
~/.cache/openinfra. Making it takes about a minute and needs root, since files of many owners and
device nodes go into it; nothing is mounted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
SIZE_BYTES = 6 << 30  # sparse; what a machine's root file system may grow to
COMMAND_TIMEOUT_S = 900
UNUSED_MAX_AGE_S = 7 * 86400

# Debian packages in the machines, and what each is for.
PACKAGES = {
    "apparmor": "dockerd loads its profile where the kernel has AppArmor",
    "bcache-tools": "a kind of disk that is in use",
    "btrfs-progs": "a kind of disk that is in use",
    "busybox-static": "a shell that needs no library",
    "ca-certificates": "TLS",
    "cryptsetup": "LUKS2",
    "curl": "the lines of the onboarding document",
    "dbus": "systemctl and hostnamectl",
    "dmsetup": "disks that fail or lose writes",
    "docker.io": "the container engine, and the provider's own Docker",
    "dosfstools": "a kind of disk that is in use",
    "e2fsprogs": "file systems",
    "fdisk": "partitions",
    "initramfs-tools": "boots the root file system",
    "iproute2": "the network",
    "iptables": "the firewall as Docker sees it",
    "iputils-ping": "is the other machine there",
    "jq": "the lines of the onboarding document",
    "kmod": "kernel modules",
    "less": "a script is read before it is run",
    "libtss2-esys-3.0.2-0": "systemd-cryptenroll loads it to reach a TPM",
    "libtss2-mu0": "systemd-cryptenroll loads it to reach a TPM",
    "libtss2-rc0": "systemd-cryptenroll loads it to reach a TPM",
    "libtss2-tcti-device0": "systemd-cryptenroll loads it to reach a TPM",
    "linux-image-cloud-amd64": "the kernel, small, with WireGuard and dm-crypt",
    "lvm2": "a kind of disk that is in use",
    "mdadm": "a kind of disk that is in use",
    "nftables": "the firewall",
    "ntfs-3g": "a kind of disk that is in use",
    "parted": "partitions",
    "procps": "what runs",
    "python3": "the scripts",
    "python3-grpcio": "the agent's runtime",
    "python3-protobuf": "the agent's runtime",
    "python3-psycopg": "the control plane's runtime",
    "strace": "which files a process touches",
    "sudo": "the lines of the onboarding document",
    "systemd": "the init system",
    "systemd-sysv": "systemd as process 1",
    "tpm2-tools": "look at the TPM",
    "udev": "names of disks",
    "util-linux": "lsblk, mount and others",
    "wireguard-tools": "wg and wg-quick",
    "xfsprogs": "a kind of disk that is in use",
    "zstd": "the initramfs of the kernel package",
}

# Debian packages that the machines can install without a network, and what each is for: the
# product's own scripts install them. What they depend on is kept too.
DEBS = {
    "caddy": "the control plane's TLS",
    "docker-registry": "the control plane's images",
    "gnupg": "backups of the control plane",
    "nftables": "a host's firewall",
    "openssh-server": "a port of the home machine that nobody may reach",
    "openssl": "checks a release",
    "postgresql": "the control plane's database",
    "python3-grpcio": "the agent's runtime",
    "python3-protobuf": "the agent's runtime",
    "python3-venv": "the control plane's virtualenv",
    "wireguard-tools": "wg and wg-quick",
}
DEBS_PATH = "/opt/debs"
# The control plane's Python packages, where pip in the machines finds them.
WHEELS_PATH = "/opt/wheels"
REQUIREMENTS = Path(__file__).parents[2] / "systemd/cp-requirements.txt"

AGENT_PATH = "/usr/local/sbin/openinfra-guest-agent"
AGENT_UNIT = f"""
[Unit]
Description=Commands from the host of this test machine
DefaultDependencies=no
IgnoreOnIsolate=yes
[Service]
ExecStart=/usr/bin/python3 -I {AGENT_PATH}
KillMode=process
Restart=always
RestartSec=1
[Install]
WantedBy=sysinit.target
"""
# Loaded only when asked for by name: each costs time at boot, or spoils the random numbers.
UNWANTED_MODULES = "ata_piix evdev floppy i2c_piix4 kvm kvm_amd kvm_intel parport_pc pcspkr psmouse"
FILES = {
    "/etc/apt/sources.list": f"deb [trusted=yes] file:{DEBS_PATH} ./\n",
    "/etc/fstab": "/dev/vda / ext4 defaults,noatime 0 1\n",
    "/etc/hostname": "debian\n",
    "/etc/hosts": "127.0.0.1 localhost\n127.0.1.1 debian\n",
    "/etc/initramfs-tools/conf.d/test": "MODULES=list\nCOMPRESS=zstd\nBUSYBOX=n\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
    "/etc/machine-id": "",  # each machine makes its own
    "/etc/modprobe.d/test.conf": "".join(f"blacklist {m}\n" for m in UNWANTED_MODULES.split()),
    "/etc/pip.conf": f"[global]\nno-index = true\nfind-links = {WHEELS_PATH}\n",
    "/etc/resolv.conf": "",
    "/etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=volatile\n",
    "/etc/systemd/system/openinfra-guest-agent.service": AGENT_UNIT,
    AGENT_PATH: (Path(__file__).parent / "guest_agent.py").read_text(),
}
ENABLED = "openinfra-guest-agent.service systemd-networkd.service"
# What costs seconds at boot without KVM and serves no test. Commands of lvm2 and mdadm still work.
MASKED = """
apt-daily-upgrade.timer apt-daily.timer blk-availability.service console-setup.service
containerd.service dev-hugepages.mount docker.service docker.socket dpkg-db-backup.timer
e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service keyboard-setup.service
ldconfig.service lvm2-lvmpolld.socket lvm2-monitor.service mdcheck_continue.timer
mdcheck_start.timer mdmonitor-oneshot.timer modprobe@configfs.service modprobe@drm.service
modprobe@efi_pstore.service modprobe@fuse.service proc-sys-fs-binfmt_misc.automount
sys-fs-fuse-connections.mount sys-kernel-config.mount sys-kernel-debug.mount
sys-kernel-tracing.mount systemd-binfmt.service systemd-hwdb-update.service
systemd-journal-flush.service systemd-network-generator.service systemd-networkd-wait-online.service
systemd-pstore.service systemd-timesyncd.service systemd-update-done.service
systemd-update-utmp-runlevel.service systemd-update-utmp.service
"""
# At each boot and daemon-reload, a tenth of a second each without KVM, systemd.generator(7).
MASKED_GENERATORS = """
debug gpt-auto hibernate-resume integritysetup rc-local run system-update sysv veritysetup
"""
# Hooks of packages that look for a root file system on RAID, LVM and the like in the initramfs.
INITRAMFS_HOOKS = "bcache btrfs dmsetup fsck lvm2 mdadm ntfs_3g thermal"
# As one logs in at the console.
USER, PASSWORD = "root", "debian"


@dataclass(frozen=True)
class Image:
    """The files that a machine boots from; no machine changes them."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def root(self) -> Path:
        return self.directory / "root.ext4"


def read_cache_directory() -> Path:
    """Where OpenInfra keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openinfra"


def read_apt_sources() -> list[str]:
    """Give back this machine's own sources of Debian, to name them to mmdebstrap; none: its own."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if sources.exists() and SUITE in sources.read_text():
        return [str(sources)]
    return []


def read_recipe_key() -> str:
    """Give back a hash of all that decides what the image holds, this file's steps among it."""
    recipe = [Path(__file__).read_text(), REQUIREMENTS.read_text(), FILES]
    recipe += [*(Path(s).read_text() for s in read_apt_sources())]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def run(argv: list[str], stdin: str = "") -> None:
    """Run one command; when it fails, what it said is in the exception."""
    done = subprocess.run(
        ["setpriv", "--pdeathsig=KILL", "--", *argv],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(argv)} ended with {done.returncode}:\n{done.stdout}"


def make_tree(tree: Path) -> None:
    """Lay the machine's file system as a directory."""
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    argv += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")]
    # The initramfs is made once, below.
    argv += ["--essential-hook=mkdir -p $1/etc/initramfs-tools"]
    argv += [
        "--essential-hook=echo update_initramfs=no > $1/etc/initramfs-tools/update-initramfs.conf"
    ]
    argv += ["--dpkgopt=force-confold"]
    fetch = f"apt-get install --yes --download-only --reinstall {' '.join(DEBS)}"
    argv += [f'--customize-hook=APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" {fetch}']
    argv += [f'--customize-hook=mv "$1/var/cache/apt/archives" "$1{DEBS_PATH}"']
    argv += ['--customize-hook=mkdir -p "$1/var/cache/apt/archives/partial"']
    run([*argv, SUITE, str(tree), *read_apt_sources()])
    for name, text in FILES.items():
        path = tree / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    for deb in (tree / DEBS_PATH[1:]).glob("*.deb"):
        repack(deb)
    index_debs(tree / DEBS_PATH[1:])
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    run([*pip, "--require-hashes", f"--requirement={REQUIREMENTS}", f"--dest={tree}{WHEELS_PATH}"])
    masked = [f"system/{unit}" for unit in MASKED.split()]
    masked += [f"system-generators/systemd-{name}-generator" for name in MASKED_GENERATORS.split()]
    for name in masked:
        path = tree / "etc/systemd" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    for hook in INITRAMFS_HOOKS.split():
        for path in (tree / "usr/share/initramfs-tools").rglob(hook):
            path.chmod(0o644)
    inside = ["chroot", str(tree)]
    run([*inside, "systemctl", "enable", *ENABLED.split()])
    run([*inside, "chpasswd"], f"{USER}:{PASSWORD}\n")
    run([*inside, "update-initramfs", "-c", "-k", "all"])


def repack(deb: Path) -> None:
    """Pack a package anew, so that the machines unpack it in an eighth of the time."""
    with tempfile.TemporaryDirectory() as tree:
        run(["dpkg-deb", "--raw-extract", str(deb), tree])
        run(["dpkg-deb", "-Zzstd", "-z3", "--build", tree, str(deb)])


def index_debs(directory: Path) -> None:
    """Make apt's index of a directory of packages, deb822(5)."""
    with (directory / "Packages").open("w") as index:
        for deb in sorted(directory.glob("*.deb")):
            control = subprocess.check_output(["dpkg-deb", "--field", str(deb)], text=True)
            digest = hashlib.sha256(deb.read_bytes()).hexdigest()
            index.write(f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\n")
            index.write(f"SHA256: {digest}\n\n")


def make_image(directory: Path) -> None:
    """Make the files of the image in a directory."""
    tree = directory / "tree"
    make_tree(tree)
    image = Image(directory)
    shutil.copyfile(next((tree / "boot").glob("vmlinuz-*")), image.kernel)
    shutil.copyfile(next((tree / "boot").glob("initrd.img-*")), image.initramfs)
    with image.root.open("wb") as file:
        file.truncate(SIZE_BYTES)
    lazy = "lazy_itable_init=1,lazy_journal_init=1"
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-E", lazy]
    run([*argv, "-d", str(tree), str(image.root)])
    shutil.rmtree(tree)


def hash_files(salt: object, paths: Iterable[Path]) -> str:
    """A key for ensure_cached: of these files' names and contents, and of something else."""
    key = hashlib.sha256(str(salt).encode())
    for path in sorted(paths):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


def ensure_cached(kind: str, key: str, max_age_s: float, make: Callable[[Path], None]) -> Path:
    """Give back the directory of this kind and key; have it made when it is not there.

    A lock keeps a second maker waiting. What a killed maker left is never taken for a whole one,
    and is removed by the next maker, as is one that nobody used for `max_age_s`.
    """
    cache = read_cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"{kind}-{key}"
    with open(cache / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            oldest = time.time() - max_age_s
            for other in cache.glob(f"{kind}-*"):
                if other.suffix == ".new" or other.stat().st_mtime < oldest:
                    shutil.rmtree(other)
            temporary = directory.with_suffix(".new")
            temporary.mkdir()
            make(temporary)
            temporary.rename(directory)
        os.utime(directory)
    return directory


def ensure_image() -> Image:
    """Give back the image of this recipe; make it when it is not there."""

    def make(directory: Path) -> None:
        assert os.geteuid() == 0, "the image is made as root; run: sudo tests/run --e2e"
        print("tests/e2e: making the machines' image, about a minute", file=sys.stderr)
        make_image(directory)

    return Image(ensure_cached("image", read_recipe_key(), UNUSED_MAX_AGE_S, make))


if __name__ == "__main__":
    print(ensure_image().directory)
