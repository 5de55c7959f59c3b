"""What the tests of setup_cp.py share: a checkout in a machine, and how the script is run there."""

from __future__ import annotations

import dataclasses
import io
import ipaddress
import json
import pickle
import tarfile
import time
from pathlib import Path
from typing import Any

from tests.e2e.home import make_key, make_release
from tests.e2e.image import Image, ensure_cached, hash_files
from tests.e2e.scripts import run_script, said
from tests.e2e.vm import UNUSED_MAX_AGE_S, Done, Snapshot, Vm, make_snapshot
from tests.harness import ROOT

HOSTNAME = "cp.coledex.com"
CHECKOUT = "/root/openinfra"
SCRIPT = f"{CHECKOUT}/systemd/setup_cp.py"
RELEASE = "/root/release"
INTERNAL = (f"--hostname={HOSTNAME}", "--tls=internal", f"--dist={RELEASE}")
CURL = f"curl -sS --cacert /etc/openinfra/ca.crt --resolve {HOSTNAME}:443:127.0.0.1"
MEMORY_MB = 2048
# All that a checkout has and a control plane needs.
PARTS = ("*.py", "proto/*.py", "systemd/*")


def pack_checkout() -> bytes:
    """The working tree's scripts, stubs and units as a tar file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for pattern in PARTS:
            for path in sorted(ROOT.glob(pattern)):
                if path.is_file():
                    tar.add(path, str(path.relative_to(ROOT)))
    return packed.getvalue()


def put_release(vm: Vm, directory: Path, path: str = RELEASE) -> None:
    """Copy a release into the machine."""
    for file in directory.iterdir():
        vm.put(file.read_bytes(), f"{path}/{file.name}")


def put_checkout(vm: Vm, path: str = CHECKOUT) -> None:
    """Put the working tree there."""
    vm.sh(f"mkdir -p {path}; tar -xzC {path} --no-same-owner", stdin=pack_checkout())


def prepare(vm: Vm, directory: Path) -> None:
    """Put there what an operator has before the command: a checkout and a release."""
    put_checkout(vm)
    make_release(directory / "release", make_key(directory))
    put_release(vm, directory / "release")


def setup(vm: Vm, *arguments: str, timeout_s: float = 900) -> Done:
    """Run the script without a terminal."""
    return run_script(vm, SCRIPT, *arguments, timeout_s=timeout_s)


# Notes every socket that listens to more than this machine, from now until the machine is off.
WATCHER = """
import time
seen = set()
while True:
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").readlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and address not in seen:
                seen.add(address)
                print(address, flush=True)
    time.sleep(0.2)
"""


@dataclasses.dataclass(frozen=True)
class Vps:
    """A control plane that was set up by one command, kept to be restored; how that went."""

    snapshot: Snapshot
    first: Done
    seconds: float
    listened: tuple[tuple[str, int], ...]  # addresses and ports, at any moment of it


def parse_address(text: str) -> tuple[str, int]:
    """An address of /proc/net/tcp or tcp6 as others write it."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
    host = ipaddress.ip_address(b"".join(words))
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return str(mapped or host), int(port, 16)


def make_vps(image: Image, directory: Path) -> Vps:
    """Set one up on a fresh machine, and keep it in a directory."""
    found: dict[str, Any] = {}

    def set_up(vm: Vm) -> None:
        vm.boot()
        prepare(vm, directory)
        vm.put(WATCHER.encode(), "/run/watcher.py")
        vm.sh(
            "python3 /run/watcher.py > /run/listened 2>&1 < /dev/null & echo $! > /run/watcher.pid"
        )
        started = time.monotonic()
        found["first"] = first = setup(vm, *INTERNAL)
        found["seconds"] = time.monotonic() - started
        assert first.code == 0, said(first)
        print(f"setup_cp.py took {found['seconds']:.0f} s")
        vm.sh("kill $(cat /run/watcher.pid)")
        lines = vm.get("/run/listened").decode().split()
        found["listened"] = tuple(parse_address(line) for line in lines)

    snapshot = make_snapshot(image, directory, "vps", set_up, memory_mb=MEMORY_MB)
    return Vps(snapshot, **found)


def ensure_vps(image: Image) -> Vps:
    """Give back the control plane of these very sources; make it when it is not there.

    It takes minutes, so that it is shared by the processes of one run, and by later runs for a day.
    """
    sources = [Path(__file__), Path(__file__).with_name("vm.py")]
    sources += [path for part in PARTS for path in ROOT.glob(part)]
    key = hash_files(image.directory, (path for path in sources if path.is_file()))

    def make(directory: Path) -> None:
        (directory / "vps.pickle").write_bytes(pickle.dumps(make_vps(image, directory)))

    directory = ensure_cached("vps", key, UNUSED_MAX_AGE_S, make)
    found: Vps = pickle.loads((directory / "vps.pickle").read_bytes())  # noqa: S301
    return dataclasses.replace(found, snapshot=Snapshot.load(directory / "kept"))


# Says which of these ports answer: open, refused, or silent for three seconds.
PROBE = """
import errno, json, select, socket, sys, time
host, *ports = sys.argv[1:]
waiting, found = {}, {}
for port in ports:
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex((host, int(port)))
    waiting[sock] = port
until = time.monotonic() + 3
while waiting and time.monotonic() < until:
    for sock in select.select([], list(waiting), [], until - time.monotonic())[1]:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        found[waiting.pop(sock)] = errno.errorcode.get(error, "open")
print(json.dumps(found | {port: "silent" for port in waiting.values()}))
"""


def probe(vm: Vm, host: str, *ports: int, namespace: str = "") -> dict[int, str]:
    """What a machine, or a network namespace in it, finds at these ports."""
    vm.put(PROBE.encode(), "/run/probe.py")
    inside = f"ip netns exec {namespace} " if namespace else ""
    told = vm.sh(f"{inside}python3 /run/probe.py {host} {' '.join(map(str, ports))}")
    return {int(port): said for port, said in json.loads(told).items()}
