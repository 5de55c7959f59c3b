"""A customer's container on a home machine: a push, a process, what it reaches, and its ends.

Four networks' worth of machines in three: the VPS, the home machine, and one that is the home's
router, a machine of the internet behind it, and the customer's.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent import DOCKER_USER_RULES
from cp_server import LEASE_S
from tests.cis import list_broken
from tests.e2e import disk
from tests.e2e.fleet import AGENT, CP_LAN, HOME_LAN, Operator, doctor, find_server, join_fleet
from tests.e2e.home import ADDRESS, CA_FILE, TOKEN_FILE, give_token, list_answers
from tests.e2e.home import install as run_installer
from tests.e2e.network import Network
from tests.e2e.scripts import said, wait_table
from tests.e2e.vm import Snapshot, Vm
from tests.e2e.vps import HOSTNAME, Vps, probe
from tests.engine import sha256
from tests.harness import WALLET, wait_for

MakeVm = Callable[..., Vm]
pytestmark = pytest.mark.alone
ROUTER_LAN, INTERNET = "192.0.2.9", "45.83.0.1"
# The control plane as the home sees it: behind the router, in no network of the home.
CP_WORLD, ROUTER_WORLD = "198.51.100.1", "198.51.100.9"
# The home as the world sees it: an address of its router, which answers there too.
HOME_WORLD = "203.0.113.7"
SERVER = """
import http.server, socketserver, sys, threading
for port in map(int, sys.argv[1:]):
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    server = socketserver.ThreadingTCPServer(("", port), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever).start()
"""
# Another machine of the home, and where a cloud has what its machines may know: the router too.
LAN_MACHINE, METADATA = "192.0.2.77", "169.254.169.254"
# The provider's own container, as the LAN reaches it.
OWN = f"http://{HOME_LAN}:8081/"
# Asks pages twice a second; a line for each: when, for how long, which, and what came of it.
ASKER = """
import http.client, sys, time, urllib.request
timeout_s, *urls = sys.argv[1:]
while True:
    for url in urls:
        at, began = time.strftime("%H:%M:%S"), time.monotonic()
        try:
            with urllib.request.urlopen(url, timeout=float(timeout_s)) as answer:
                said = answer.read().decode().strip()
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}"
        print(at, f"{time.monotonic() - began:.2f}", url, said, flush=True)
    time.sleep(0.5)
"""
# A slow machine answers within it; a first packet that was lost is sent again after 1 and 3 s.
ASK_TIMEOUT_S = 5
# Files of an image: busybox as the names that are needed.
IMAGE = """
mkdir -p /srv/image/bin /srv/image/www; cp /bin/busybox /srv/image/bin
echo hello > /srv/image/www/index.html
for name in sh sleep httpd cat; do ln -sf busybox /srv/image/bin/$name; done
tar -C /srv/image -c . | docker import - web:latest
"""
# Another one, which no host has yet.
SMALL_IMAGE = "echo small > /srv/image/www/small; tar -C /srv/image -c . | docker import - small"
HTTPD = ["/bin/sh", "-c", "echo at your service; exec /bin/httpd -f -p 8080 -h /www"]
# It is deaf to SIGTERM, as a signal that a shell ignores stays ignored in what takes its place.
DEAF = ["/bin/sh", "-c", "trap '' TERM; exec /bin/httpd -f -p 8080 -h /www"]
# A late copy is gone so long after the first heartbeat that its host's control plane hears: 10 s
# from SIGTERM to SIGKILL, and what a slow engine takes for either, and to say so.
LATE_MAX_S = 30
ENGINE = "docker --host=unix:///run/openinfra/engine.sock"
# IPv6, and IPv4 as IPv6 writes it, from inside a workload; each that answers is printed.
PROBE_6 = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition("]:")
    sock = socket.socket(socket.AF_INET6)
    sock.settimeout(2)
    try:
        where = socket.getaddrinfo(host[1:], int(port), socket.AF_INET6, socket.SOCK_STREAM)
        sock.connect(where[0][4])
        print(target)
    except ConnectionRefusedError:
        print(target, "refused")
    except OSError:
        pass
"""


def serve(vm: Vm, *ports: int) -> None:
    """Answer on these ports of every address."""
    vm.put(SERVER.encode(), "/srv/server.py")
    words = " ".join(map(str, ports))
    vm.sh(f"cd /srv; python3 server.py {words} > /dev/null 2>&1 < /dev/null &")
    vm.sh(f"until curl -s 127.0.0.1:{ports[0]} -o /dev/null; do sleep 0.3; done", timeout_s=60)


def start_docker(vm: Vm) -> None:
    """Debian's own Docker, as a person has it."""
    vm.sh(
        "systemctl unmask docker.service docker.socket containerd.service; systemctl start docker"
    )


def wait_calmly(what: str, probe: Callable[[], Any], timeout_s: float) -> Any:
    """Look now and then: asking again and again would be most of what a slow machine does."""

    def look() -> Any:
        time.sleep(3)
        return probe()

    return wait_for(what, look, timeout_s)


@contextlib.contextmanager
def kept_answering(vm: Vm, *urls: str) -> Iterator[None]:
    """While this goes on, the machine asks for the pages again and again, and no ask fails."""
    vm.put(ASKER.encode(), "/srv/asker.py")
    words = shlex.join([str(ASK_TIMEOUT_S), *urls])
    ask = f"python3 /srv/asker.py {words} >> /run/asked 2>&1 < /dev/null"
    vm.sh(f": > /run/asked; {ask} & echo $! > /run/asker.pid")

    def read_rows() -> list[str]:
        return vm.get("/run/asked").decode().splitlines()

    def wait_rows(more: int) -> None:
        wait_for("answers", lambda: len(read_rows()) >= more or None, 60)

    wait_rows(len(urls))
    yield
    wait_rows(len(read_rows()) + 2 * len(urls))  # of each one that began after the end
    vm.sh("kill $(cat /run/asker.pid)")  # which fails when it died before
    rows = read_rows()
    slowest_s = max(float(row.split()[1]) for row in rows)
    failed = [row for row in rows if not row.endswith(" hello")]
    print(f"{len(rows)} asks, {len(failed)} failed, the slowest took {slowest_s:.2f} s")
    assert not failed, "\n".join(failed)


def read_rules(machine: Vm) -> list[str]:
    """The rules of the provider's Docker, without counters and the two that let workloads pass."""
    rules = machine.sh("iptables-save | sed -e '/^#/d' -e 's/ \\[.*//'").splitlines()
    ours = [f"-A DOCKER-USER {rule}" for rule in DOCKER_USER_RULES]
    assert all(rules.count(each) <= 1 for each in ours), rules
    return [rule for rule in rules if rule not in ours]


class Customer:
    """A customer at a machine with Docker."""

    def __init__(self, vm: Vm, operator: Operator, server: str = CP_LAN) -> None:
        self.vm = vm
        words = "add-customer --name=Kuma --namespace=kuma 2>/dev/null"
        self.key = operator.vm.sh(f"openinfra-cp {words}").strip()
        vm.put(operator.ca, f"/etc/docker/certs.d/{HOSTNAME}/ca.crt")
        vm.put(operator.ca, CA_FILE)
        find_server(vm, server)
        start_docker(vm)
        vm.sh(IMAGE)

    def order(self, name: str, image: str, command: list[str], **more: Any) -> Any:
        """Post a small workload."""
        body = {"name": name, "image": image, "command": command, **more}
        return self.call("POST", "", {"cpu_milli": 50, "memory_bytes": 16 << 20, **body})

    def upload(self, path: str, blob: bytes, kind: str = "application/octet-stream") -> None:
        """Put a blob (or a manifest) into the registry as it is, without Docker."""
        self.vm.put(blob, "/run/blob")
        ask = f"curl -sSf --cacert {CA_FILE} -u kuma:{self.key}"
        where = f"https://{HOSTNAME}/v2/kuma/{path}"
        if path.endswith("/uploads/"):
            location = f"{ask} -X POST -o /dev/null -D - {where} | tr -d '\\r'"
            place = self.vm.sh(f"{location} | sed -n 's/^[Ll]ocation: //p'").strip()
            joint = "&" if "?" in place else "?"
            where = f"{place}{joint}digest={sha256(blob)}"
            where = where if where.startswith("http") else f"https://{HOSTNAME}{where}"
        self.vm.sh(
            f"{ask} -X PUT -H 'Content-Type: {kind}' --data-binary @/run/blob '{where}'",
            timeout_s=300,
        )

    def push(self, image: str = "web") -> str:
        """Push an image; gives back its name with its digest."""
        name = f"{HOSTNAME}/kuma/{image}:1"
        self.vm.sh(f"docker login {HOSTNAME} -u kuma --password-stdin", stdin=self.key.encode())
        told = self.vm.sh(f"docker tag {image}:latest {name}; docker push {name}", timeout_s=300)
        return f"kuma/{image}@{told[told.index('sha256:') :].split()[0]}"

    def call(self, method: str, path: str = "", body: object = None) -> Any:
        """One request to the API."""
        self.vm.put(json.dumps(body).encode(), "/run/body")
        data = "-H 'Content-Type: application/json' -d @/run/body" if body else ""
        told = self.vm.sh(
            f"curl -sS --cacert {CA_FILE} -X {method} -H 'Authorization: Bearer {self.key}' {data} "
            f"https://{HOSTNAME}/api/v1/workloads{path}"
        )
        return json.loads(told)

    def read_logs(self, workload: Any) -> list[list[str]]:
        """What each copy printed last."""
        found = self.call("GET", f"/{workload['workload_id']}/logs")["logs"]
        assert [each["reason"] for each in found] == [""] * len(found)
        return [each["lines"] for each in found]

    def wait(self, workload: Any, state: str, timeout_s: float = 120) -> Any:
        """The workload, once it is in this state."""

        def look() -> Any:
            found = self.call("GET", f"/{workload['workload_id']}")
            return found if found.get("state") == state else None  # it may say: try again

        try:
            return wait_calmly(state, look, timeout_s)
        except AssertionError as error:
            found = self.call("GET", f"/{workload['workload_id']}")
            raise AssertionError(f"{error}: {found}") from None


def inspect(home: Vm) -> list[dict[str, Any]]:
    """What the engine says of each workload that runs."""
    ids = home.sh(f"{ENGINE} ps -q --filter=label=openinfra.assignment").split()
    found = json.loads(home.sh(f"{ENGINE} inspect {' '.join(ids)}")) if ids else []
    assert isinstance(found, list)
    return found


def list_pids(home: Vm) -> list[str]:
    """The first process of each workload that runs; none while the engine is not up."""
    asked = home.exec([*ENGINE.split(), "ps", "-q", "--filter=label=openinfra.assignment"])
    found = []
    for each in asked.text.split():
        done = home.exec([*ENGINE.split(), "inspect", "--format={{.State.Pid}}", each])
        assert done.code == 0 or b"no such object" in done.stderr.lower(), done
        found.append(done.text.strip())
    return [pid for pid in found if pid not in ("", "0")]  # it ended meanwhile, and may be gone


Targets = tuple[tuple[str, tuple[int, ...]], ...]
# What only the fence keeps from a workload: the provider's own container reaches it.
OUTSIDE: Targets = (
    (ROUTER_LAN, (80, 443)),
    (LAN_MACHINE, (80, 443)),
    (HOME_LAN, (8000, 20000)),
    (CP_WORLD, (443,)),
    (HOME_WORLD, (80, 443)),
    (METADATA, (80,)),
    (INTERNET, (25, 465, 587)),
)
# IPv4 as IPv6 writes it, for which no address of IPv6 is needed.
MAPPED = (f"[::ffff:{HOME_LAN}]:8000", f"[::ffff:{ROUTER_LAN}]:80")
INTERNET_MAPPED = f"[::ffff:{INTERNET}]:80"
# What follows, and IPv6 link-local, would be silent without the fence too: the control plane's own
# firewall keeps these ports closed, and a container has no address of IPv6 and no way out by it.
CLOSED_ANYWAY: Targets = ((CP_WORLD, (51820,)), ("10.77.0.1", (443,)))
CLOSED_ANYWAY_6 = ("[fd00:77::2]:8000", "[2001:db8:77::2]:8000")


def list_inside(gateway: str, other: str) -> Targets:
    """What only the fence keeps from a workload, and from the provider's own container too.

    The machine itself reaches it: the bridge, the tunnel's both ends, another workload.
    """
    hub = ("10.77.0.1", (9092,))
    return ((ADDRESS, (8000, 20000)), (gateway, (8000, 20000)), hub, (other, (8080,)))


def ask_ports(home: Vm, pid: str, targets: Targets) -> dict[str, str]:
    """What the network of a process finds at these ports."""
    inside = f"nsenter --target {pid} --net python3 /run/probe.py"
    lines = [f"{inside} {host} {' '.join(map(str, ports))}" for host, ports in targets]
    told = home.sh("\n".join(lines), timeout_s=300).splitlines()
    return {
        f"{host}:{port}": what
        for (host, _), line in zip(targets, told, strict=True)
        for port, what in json.loads(line).items()
    }


def ask_ipv6(home: Vm, pid: str, *targets: str) -> list[str]:
    """Which of these answer the network of a process, be it with a refusal."""
    inside = f"nsenter --target {pid} --net python3 /run/probe6.py"
    return home.sh(f"{inside} {shlex.join(targets)}").splitlines()


def read_gateway(home: Vm, pid: str) -> str:
    """The address of a workload's bridge."""
    inside = f"nsenter --target {pid} --net"
    return home.sh(f"{inside} ip -4 route show default | cut -d ' ' -f 3").strip()


def read_address(home: Vm, pid: str) -> str:
    """A workload's own address."""
    return home.sh(f"nsenter --target {pid} --net hostname -I").split()[0]


def reached(home: Vm, pid: str, other: str) -> list[str]:
    """What answers a workload, be it with a refusal, of all that must not."""
    targets = (*OUTSIDE, *list_inside(read_gateway(home, pid), other), *CLOSED_ANYWAY)
    found = [each for each, what in ask_ports(home, pid, targets).items() if what != "silent"]
    link = home.sh("cat /sys/class/net/oi-*/address | sed -n 1p").strip()
    first, *rest = (int(each, 16) for each in link.split(":"))
    words = [first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]]
    local = "fe80::" + ":".join(
        f"{a:02x}{b:02x}" for a, b in zip(words[::2], words[1::2], strict=True)
    )
    return found + ask_ipv6(home, pid, *MAPPED, *CLOSED_ANYWAY_6, f"[{local}%eth0]:8000")


def list_silent(home: Vm, pid: str, targets: Targets) -> list[str]:
    """Which of these, and of MAPPED, do not answer the network of a process at all."""
    asked, mapped = ask_ports(home, pid, targets), ask_ipv6(home, pid, *MAPPED)
    answers = ("open", "ECONNREFUSED")
    silent = [f"{each} {what}" for each, what in asked.items() if what not in answers]
    return silent + [each for each in MAPPED if each not in mapped]


def is_online(home: Vm, pid: str) -> bool:
    """A workload reaches the internet, also by IPv4 as IPv6 writes it."""
    found = ask_ports(home, pid, ((INTERNET, (80,)),)), ask_ipv6(home, pid, INTERNET_MAPPED)
    return found == ({f"{INTERNET}:80": "open"}, [INTERNET_MAPPED])


class Scene:
    """The VPS, a home machine with its own Docker, the home's router, a workload of two copies."""

    def __init__(self, operator: Operator, machine: Vm, router: Vm) -> None:
        self.operator, self.machine, self.router = operator, machine, router
        self.serve()
        router.sh(
            f"ip address add {INTERNET}/32 dev lo; ip address add {ROUTER_WORLD}/24 dev eth0; "
            f"ip address add {HOME_WORLD}/32 dev lo; ip address add {METADATA}/32 dev lo; "
            f"ip address add {LAN_MACHINE}/24 dev eth0; sysctl -qw net.ipv4.ip_forward=1; "
            "iptables -t nat -A POSTROUTING "
            f"-s {HOME_LAN} -d {CP_WORLD} -j SNAT --to {HOME_WORLD}; "
            "sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0"
        )
        serve(router, 80, 443, 25, 465, 587)
        start_docker(machine)
        machine.sh(IMAGE)
        run = "docker run --detach --name=mine --restart=always --publish=8081:8080"
        run += " --stop-timeout=1 web:latest"  # its Docker gives all of them 15 s when it stops
        began = time.monotonic()
        machine.sh(f"{run} {shlex.join(HTTPD)}")
        run_s = time.monotonic() - began
        self.check_own()
        self.rules = read_rules(machine)
        with kept_answering(router, OWN):
            join_fleet(machine, operator, payout_pubkey=WALLET)
            assert operator.wait_host("assignable", True)["engine_version"]
        assert read_rules(machine) == self.rules
        self.customer = Customer(router, operator, CP_WORLD)
        self.image = self.customer.push()
        began = time.monotonic()
        self.workload = self.customer.order("web", self.image, HTTPD, replicas=2, ports=[8080])
        # Two start at once, and are pulled first: as many times what one took by `docker run` here.
        found = self.customer.wait(self.workload, "running", max(120, 8 * run_s))
        took = f"{time.monotonic() - began:.1f} s after the order, with the pull"
        print(f"both copies ran {took}; docker run took {run_s:.1f} s")
        self.addresses = [each["endpoints"][0]["address"] for each in found["assignments"]]
        assert {each.partition(":")[0] for each in self.addresses} == {ADDRESS}
        self.wait_answers()
        table = "nft list table inet openinfra"
        wait_calmly("the home's address", lambda: HOME_WORLD in machine.sh(table) or None, 120)

    def serve(self) -> None:
        """What the home machine has, and forgets at a boot: IPv6, and a port to be reached."""
        self.machine.sh(
            "ip -6 address add fd00:77::2/64 dev eth0; ip -6 address add 2001:db8:77::2/64 dev eth0"
        )
        serve(self.machine, 8000)
        probe(self.machine, "127.0.0.1", 8000)  # which lays probe.py
        self.machine.put(PROBE_6.encode(), "/run/probe6.py")

    def own_answers(self) -> bool:
        """The provider's own container answers the LAN."""
        return self.router.exec(["curl", "-sf", "--max-time", "5", OWN]).stdout == b"hello\n"

    def check_own(self) -> None:
        """It does again, once its Docker has started it."""
        wait_for("the provider's own", lambda: self.own_answers() or None, 60)

    def read(self) -> Any:
        """The workload as its customer sees it."""
        return self.customer.call("GET", f"/{self.workload['workload_id']}")

    def answers(self) -> bool:
        """Both copies answer the control plane at their addresses in the tunnel."""
        asks = [["curl", "-sf", "--max-time", "3", f"http://{each}/"] for each in self.addresses]
        return [self.operator.vm.exec(ask).stdout for ask in asks] == [b"hello\n"] * 2

    def wait_answers(self) -> None:
        """As soon as they run, and their ports are open."""
        wait_calmly("both copies", lambda: len(list_pids(self.machine)) == 2 or None, 120)
        wait_calmly("their ports", lambda: self.answers() or None, 60)

    def check_unfenced(self) -> None:
        """What the fence keeps from workloads answers the machine and the provider's container."""
        machine, (first, second) = self.machine, list_pids(self.machine)
        inside = list_inside(read_gateway(machine, first), read_address(machine, second))
        own = machine.sh("docker inspect -f '{{.State.Pid}}' mine").strip()
        for pid, targets in (("1", (*OUTSIDE, *inside)), (own, OUTSIDE)):
            for _ in range(3):  # a packet may be lost, or late
                silent = list_silent(machine, pid, targets)
                if not silent:
                    break
            assert silent == [], f"in the network of process {pid}"

    def check_fence(self) -> None:
        """Nothing of the home, of the fleet, of another workload; but the internet."""
        first, second = list_pids(self.machine)
        other = read_address(self.machine, second)
        wait_for("the internet", lambda: is_online(self.machine, first) or None, 60)
        assert reached(self.machine, first, other) == []


@pytest.fixture
def scene(make_vm: MakeVm, network: Network, vps: Vps, home: Snapshot) -> Scene:
    cp = make_vm("cp", snapshot=vps.snapshot)
    cp.join(network, f"{CP_WORLD}/24", ROUTER_WORLD)
    operator = Operator(cp)
    machine = make_vm("home", snapshot=home)
    machine.join(network, f"{HOME_LAN}/24", ROUTER_LAN)
    find_server(machine, CP_WORLD)
    machine.put(operator.ca, CA_FILE)
    router = make_vm("router")
    router.join(network, f"{ROUTER_LAN}/24")
    return Scene(operator, machine, router)


# What a workload may try; the end that its state then names, and what is looked at meanwhile.
BOMBS = {
    "fork": (
        ["/bin/busybox", "awk", 'BEGIN { while (1) system("exec /bin/sleep 999 &") }'],
        "it went on starting processes beyond its 128",
    ),
    "memory": (
        ["/bin/sh", "-c", "x=aaaaaaaa; while :; do x=$x$x; done"],
        "it used more than its 50 MB of memory",
    ),
    "flood": (
        ["/bin/sh", "-c", "while :; do /bin/cat /bin/busybox; done"],
        "it went on printing more than 250 kB a second",
    ),
    "tmpfs": (["/bin/sh", "-c", "/bin/cat /dev/zero > /tmp/x"], "exit code 1"),
}
LAYERS, LAYER_BYTES = 10, 5 << 30  # of 50 GiB


# In the engine's own file of a container, while the engine is down.
FORGET = """
import json, pathlib
(path,) = pathlib.Path("/var/cache/openinfra/engine").glob("*/containers/{id}/config.v2.json")
config = json.loads(path.read_text())
config["State"] |= {{"Running": False, "Pid": 0}}
path.write_text(json.dumps(config))
"""


def is_well(findings: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """These when none of them is a fault."""
    return None if [one for one in findings if one["level"] != "INFO"] else findings


def end_right(machine: Vm) -> None:
    """What the lease file says ten minutes after the control plane was heard last."""
    machine.sh(
        "cd /run/openinfra; jq -c '.until_s = 1' lease.json > new; cat new > lease.json; rm new"
    )


def make_layer_bomb(number: int) -> bytes:
    """A layer of 5 MB that is 5 GiB of zeros in one file (RFC 1952, of repeated blocks)."""
    info = tarfile.TarInfo(f"zeros{number}")
    info.size = LAYER_BYTES
    head, zeros = info.tobuf(), bytes(16 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"]
    parts += [packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)]
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    count, crc = LAYER_BYTES // len(zeros), zlib.crc32(head)
    for _ in range(count):
        crc = zlib.crc32(zeros, crc)
    end = bytes(1024)
    parts += [block] * count + [packer.compress(end) + packer.flush()]
    size = len(head) + LAYER_BYTES + len(end)
    return b"".join([*parts, struct.pack("<II", zlib.crc32(end, crc), size & 0xFFFFFFFF)])


def push_bomb(customer: Customer) -> str:
    """Push it without unpacking it anywhere; gives back the image's name."""
    layers = [make_layer_bomb(number) for number in range(LAYERS)]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [sha256(bytes([n])) for n in range(LAYERS)]},
        }
    ).encode()
    kind = "application/vnd.docker"
    rows = [
        {"mediaType": f"{kind}.{suffix}", "size": len(blob), "digest": sha256(blob)}
        for blob, suffix in (
            (config, "container.image.v1+json"),
            *((layer, "image.rootfs.diff.tar.gzip") for layer in layers),
        )
    ]
    form = f"{kind}.distribution.manifest.v2+json"
    body = {"schemaVersion": 2, "mediaType": form, "config": rows[0], "layers": rows[1:]}
    manifest = json.dumps(body).encode()
    for blob in (config, *layers):
        customer.upload("bomb/blobs/uploads/", blob)
    customer.upload("bomb/manifests/1", manifest, form)
    return f"kuma/bomb@{sha256(manifest)}"


def check_image_bomb(scene: Scene, check_machine: Callable[[], None]) -> None:
    """An image that fills the disk is tried twice and given up, and the next one is pulled."""
    machine, customer, cache = scene.machine, scene.customer, "/var/cache/openinfra"
    # Most of the disk is full already: to fill all of it takes an emulated machine ten minutes.
    left = f"df --output=avail -B1M {cache} | sed -n 2p"
    machine.sh(f"fallocate --length=$(($({left}) - 300))M {cache}/filler")
    bomb, began = customer.order("bomb", push_bomb(customer), ["/x"]), time.monotonic()
    reason = "no space left"

    def read_bomb() -> Any:
        return customer.call("GET", f"/{bomb['workload_id']}")  # it may say: try again

    def is_full() -> bool:
        return reason in " ".join(read_bomb().get("reasons", ()))

    def find_ended() -> Any:
        return next((one for one in read_bomb().get("assignments", ()) if one["ended_at"]), None)

    wait_calmly("the full disk", lambda: is_full() or None, 600)
    full_s = time.monotonic() - began
    check_machine()
    ended = wait_calmly("the end of the bomb's first copy", find_ended, 600)
    print(f"the disk was full after {full_s:.0f} s, given up {time.monotonic() - began:.0f} s")
    assert (ended["state"], reason in ended["reason"]) == ("rejected", True), ended
    customer.call("DELETE", f"/{bomb['workload_id']}")
    customer.wait(bomb, "deleted")
    machine.sh(f"rm {cache}/filler")
    used = f"df --output=pcent {cache} | sed -n 2p"
    wait_calmly("its room again", lambda: int(machine.sh(used).strip(" %\n")) < 80 or None, 120)
    customer.vm.sh(SMALL_IMAGE)
    made = customer.order("after", customer.push("small"), ["/bin/sleep", "9999"])
    customer.wait(made, "running", 180)


def test_what_a_workload_may_not_do_to_the_machine(scene: Scene) -> None:
    """The machine answers, the identity's disk has its room, and the end has its reason."""
    machine, customer = scene.machine, scene.customer
    room = "df --output=avail -B1M /var/lib/openinfra | sed -n 2p"
    free = int(machine.sh(room))

    def check_machine() -> None:
        began = time.monotonic()
        machine.sh("true")
        assert time.monotonic() - began < 5
        scene.operator.wait_heartbeat(60)
        assert abs(int(machine.sh(room)) - free) < 32
        assert scene.answers()

    for name, (command, why) in BOMBS.items():
        size, began = {"cpu_milli": 300, "memory_bytes": 48 << 20}, time.monotonic()
        made = customer.order(name, scene.image, command, restart="never", **size)
        check_machine()
        found = customer.wait(made, "failed", 240)
        print(f"{name}: it had ended after {time.monotonic() - began:.0f} s")
        assert why in " ".join(found["reasons"]), found
        check_machine()
        if name == "tmpfs":
            assert "No space left on device" in str(customer.read_logs(made))
        if name == "flood":
            logs = "/var/cache/openinfra/*/*/containers/*/local-logs"
            sizes = [int(line.split()[0]) for line in machine.sh(f"du -sm {logs}").splitlines()]
            assert 0 < max(sizes) <= 12
        customer.call("DELETE", f"/{made['workload_id']}")
        customer.wait(made, "deleted", 60)

    check_image_bomb(scene, check_machine)
    scene.operator.check()


def list_hosts(operator: Operator) -> list[dict[str, Any]]:
    """All hosts, as the operator sees them."""
    asked = "curl -sS https://cp.coledex.com/api/v1/admin/hosts -H 'Authorization: Bearer '"
    rows = json.loads(operator.say(f"{asked}$ADMIN_JWT"))["hosts"]
    assert isinstance(rows, list)
    return rows


def are_ready(operator: Operator) -> bool:
    """Both homes are online and take work."""
    rows = list_hosts(operator)
    return [row["assignable"] and row["status"] == "online" for row in rows] == [True, True]


def see_late_end(operator: Operator, late: Vm, pid: str) -> None:
    """Let a machine go on whose copy runs elsewhere by now, and see its own one, a process, end."""

    def read_heartbeat() -> str:
        (row,) = (row for row in list_hosts(operator) if row["hostname"] == late.name)
        return str(row["last_heartbeat_at"])

    before, began = read_heartbeat(), time.monotonic()
    late.thaw()
    wait_calmly("a heartbeat of that machine", lambda: read_heartbeat() != before or None, 90)
    touched = time.monotonic()
    try:
        there = ["test", "-e", f"/proc/{pid}"]
        wait_calmly("the end of its late copy", lambda: late.exec(there).code == 1, LATE_MAX_S)
    finally:
        ended = time.monotonic()
        how = f"{ended - touched:.0f} s after its machine was heard, {ended - began:.0f} s after"
        print(f"looked for a late copy until {how} it went on")


def see_it_move(operator: Operator, old: Vm | None, new: Vm) -> None:
    """Wait for the copy on the other machine; while the first one is there, never on both."""
    began, ended_s = time.monotonic(), 0.0

    def has_moved() -> bool | None:
        nonlocal ended_s
        runs = bool(list_pids(new))
        if old and list_pids(old):
            assert not runs, "it runs on both"
        elif old:
            ended_s = ended_s or time.monotonic() - began
        return runs or None

    try:
        wait_calmly("the copy elsewhere", has_moved, LEASE_S + 150)
    except AssertionError as error:
        told = operator.vm.sh("openinfra-cp workloads --json; openinfra-cp hosts --json")
        raise AssertionError(f"{error}: {told}") from None
    took_s = time.monotonic() - began
    print(f"the copy ran elsewhere after {took_s:.0f} s; it had ended after {ended_s:.0f} s")
    assert took_s >= LEASE_S - 30  # a right that was renewed 30 s before
    if old:
        assert LEASE_S - 60 <= ended_s < took_s


def test_a_home_goes_dark(make_vm: MakeVm, network: Network, vps: Vps, home: Snapshot) -> None:
    """Of one of two homes: the copy moves once its right is over, and comes back nowhere else.

    Without its network it ends the copy itself; stopped as a whole, with its clock, it cannot
    know, and ends its late copy when it is back; the plug pulled, it finds nothing to end.
    """
    cp = make_vm("cp", snapshot=vps.snapshot)
    cp.join(network, f"{CP_LAN}/24")
    operator = Operator(cp)
    homes: dict[str, Vm] = {}
    for number, address in ((2, ADDRESS), (3, "10.77.0.43")):
        machine = make_vm(f"home{number}", snapshot=home)
        machine.join(network, f"192.0.2.{number}/24")
        find_server(machine)
        machine.put(operator.ca, CA_FILE)
        give_token(machine, operator.mint(payout_pubkey=WALLET))
        cp_key = operator.vm.sh("wg show wg0 public-key").strip()
        answers = (*list_answers(WALLET, cp_key), f"--token-file={TOKEN_FILE}")
        done = run_installer(machine, *answers, f"--wg-address={address}")
        assert done.code == 0, said(done)
        key = machine.sh("cat /etc/wireguard/openinfra.pub").strip()
        operator.vm.sh(f"wg set wg0 peer {key} allowed-ips {address}/32; wg-quick save wg0")
        homes[address] = machine
    customer = Customer(homes[ADDRESS], operator)
    image = customer.push()
    wait_calmly("both homes", lambda: are_ready(operator) or None, 90)
    made = customer.order("web", image, DEAF, ports=[8080])
    found = customer.wait(made, "running")
    (address,) = {each["endpoints"][0]["address"] for each in found["assignments"]}
    first = homes[address.partition(":")[0]]
    (second,) = (each for each in homes.values() if each is not first)
    ask = ["curl", "-sf", "--max-time", "3", f"http://{address}/"]

    def is_serving() -> bool:
        return operator.vm.exec(ask).stdout == b"hello\n"

    wait_calmly("its port", lambda: is_serving() or None, 60)
    (pid,) = list_pids(first)
    first.sh(f"kill -TERM {pid}")
    wait_calmly("its port after a SIGTERM", lambda: is_serving() or None, 60)
    assert list_pids(first) == [pid]

    network.partition(first.name)
    see_it_move(operator, first, second)
    network.heal(first.name)
    wait_calmly("both again", lambda: are_ready(operator) or None, 200)
    assert (list_pids(first), len(list_pids(second))) == ([], 1)

    (late,) = list_pids(second)
    second.freeze()
    see_it_move(operator, None, first)
    (runs,) = list_pids(first)
    see_late_end(operator, second, late)
    wait_calmly("both again", lambda: are_ready(operator) or None, 200)
    assert (list_pids(first), list_pids(second)) == ([runs], [])

    first.power_cut()
    see_it_move(operator, None, second)
    first.boot(wait=False)
    disk.wait_locked(first)
    disk.unlock_late(first)
    wait_calmly("both again", lambda: are_ready(operator) or None, 200)
    until = time.monotonic() + 40
    while time.monotonic() < until:
        assert (list_pids(first), len(list_pids(second))) == ([], 1)
    for machine in homes.values():
        known = machine.sh(f"{ENGINE} ps -aq --filter=label=openinfra.assignment").split()
        assert len(known) == (machine is second)
    operator.check()


def check_both_dockers(scene: Scene) -> None:
    """Each Docker stops, starts and restarts, and what the other one runs answers all the time."""
    machine, pids = scene.machine, list_pids(scene.machine)
    with kept_answering(scene.router, OWN):
        for what in (
            *("stop openinfra-engine", "start openinfra-engine", "restart openinfra-engine"),
            # The engine stops and restarts with its containerd, and starts it.
            *("stop openinfra-containerd", "start openinfra-engine"),
            "restart openinfra-containerd",
        ):
            machine.sh(f"systemctl {what}", timeout_s=180)
        scene.wait_answers()
    assert list_pids(machine) == pids
    with kept_answering(scene.operator.vm, *(f"http://{each}/" for each in scene.addresses)):
        # Its socket would start it again.
        machine.sh("systemctl stop docker.socket docker containerd", timeout_s=180)
        assert not scene.own_answers()
        assert scene.answers()
        assert list_pids(machine) == pids
        machine.sh("systemctl start docker", timeout_s=180)
        scene.check_own()
        machine.sh("systemctl restart docker", timeout_s=180)
        scene.check_own()
    assert list_pids(machine) == pids
    assert read_rules(machine) == scene.rules


def check_cut_start(scene: Scene) -> None:
    """A start that a kill of the engine cut off: what its files say then, and what a unit does."""
    machine, pids = scene.machine, list_pids(scene.machine)
    one = inspect(machine)[0]
    forget = shlex.quote(FORGET.format(id=one["Id"]))
    machine.sh(
        f"systemctl stop openinfra-engine; python3 -c {forget}; systemctl start openinfra-engine"
    )
    journal, lost = "journalctl --boot --unit=openinfra-strays --output=cat", one["Id"]
    said_it = f"its start was cut off container={lost}"
    wait_calmly("the unit's words", lambda: said_it in machine.sh(journal) or None, 90)
    assert machine.exec(["test", "-e", f"/proc/{one['State']['Pid']}"]).code == 1
    scene.wait_answers()
    assert {*pids} - {*list_pids(machine)} == {str(one["State"]["Pid"])}
    # And when it cannot look, somebody is told.
    strays = "systemctl start openinfra-strays"
    machine.sh(f"chmod 0 /sys/fs/cgroup/openinfra.slice; {strays} || true")
    assert "openinfra-strays.service failed." in [one["sentence"] for one in doctor(machine)]
    machine.sh(f"chmod 755 /sys/fs/cgroup/openinfra.slice; {strays}")
    said = wait_calmly("nothing wrong", lambda: is_well(doctor(machine)), 60)
    assert "run by runc 1." in said[0]["sentence"]


def check_lost_networks(scene: Scene) -> None:
    """A kill of the engine while it removes a network, after which no start of it would succeed."""
    machine = scene.machine
    notes = machine.sh("ls /var/cache/openinfra/engine/*/network/files/local-kv.db").strip()
    pid = machine.sh("systemctl show -P MainPID openinfra-engine").strip()
    # The fifth is within the note that its addresses are free, before it is gone.
    inject = f"strace -f -qq --attach={pid} --trace-path={notes} --trace=fdatasync"
    inject += " --inject=fdatasync:signal=SIGKILL:when=5 --output=/dev/null"
    make = f"{ENGINE} network create --label openinfra.assignment=gone gone"
    cut = f"({inject} > /dev/null 2>&1 &); sleep 5; {ENGINE} network rm gone || true"
    machine.sh(f"{make}; {cut}", timeout_s=120)
    journal = "journalctl --boot --unit=openinfra-engine --output=cat"
    said = f"removed '{notes}'"
    wait_calmly("the unit's words", lambda: said in machine.sh(journal) or None, 90)
    assert "index out of range" in machine.sh(journal)
    scene.wait_answers()
    assert machine.sh("systemctl is-active openinfra-engine").strip() == "active"


def check_frozen(scene: Scene) -> None:
    """While the firewall cannot be looked at, nothing of a workload goes on."""
    machine, pids = scene.machine, list_pids(scene.machine)
    events = "cat /sys/fs/cgroup/openinfra.slice/cgroup.events"
    machine.sh("mv /usr/sbin/nft /usr/sbin/nft.away")
    wait_calmly("the freeze", lambda: "frozen 1" in machine.sh(events) or None, 60)
    assert not scene.answers()
    wait_calmly("its reason", lambda: "frozen: " in str(scene.read()) or None, 90)
    machine.sh("mv /usr/sbin/nft.away /usr/sbin/nft")
    wait_calmly("the thaw", lambda: "frozen 0" in machine.sh(events) or None, 60)
    scene.wait_answers()
    assert list_pids(machine) == pids
    scene.customer.wait(scene.workload, "running")


def check_ends(scene: Scene) -> None:
    """The agent is dead, and then the engine too, and the right ends."""
    machine = scene.machine
    machine.sh(f"systemctl stop {AGENT}")
    assert scene.answers()
    end_right(machine)
    wait_calmly("the guard's end of it", lambda: not list_pids(machine) or None, 60)
    machine.sh(f"systemctl start {AGENT}")
    scene.wait_answers()
    scene.customer.wait(scene.workload, "running")
    # And so is the engine, whose workloads go on without it.
    machine.sh(f"systemctl stop {AGENT} openinfra-engine")
    alive = "cat /sys/fs/cgroup/openinfra.slice/cgroup.events || echo populated 0"
    time.sleep(15)
    assert "populated 1" in machine.sh(alive)
    end_right(machine)
    wait_calmly("the guard's end of all", lambda: "populated 0" in machine.sh(alive) or None, 60)
    machine.sh(f"systemctl start openinfra-engine {AGENT}")
    scene.wait_answers()
    scene.customer.wait(scene.workload, "running")


def test_a_customers_container_on_a_home_machine(scene: Scene) -> None:
    machine = scene.machine
    pids = list_pids(machine)
    assert scene.customer.read_logs(scene.workload) == [["at your service"]] * 2
    for one in inspect(machine):
        assert (list_broken(one), one["AppArmorProfile"]) == ([], "docker-default")
    assert set(probe(scene.router, HOME_LAN, 20000, 20008).values()) <= {"silent", "ECONNREFUSED"}
    scene.check_unfenced()
    scene.check_fence()
    check_both_dockers(scene)
    machine.sh("iptables -F")
    scene.check_fence()
    machine.sh("nft flush ruleset")
    assert wait_table(machine, "openinfra") <= 15
    scene.check_fence()
    machine.sh("systemctl restart docker")
    machine.sh("systemctl restart openinfra-engine")
    scene.check_own()
    scene.check_fence()
    assert list_pids(machine) == pids
    assert scene.answers()

    with kept_answering(scene.router, OWN):
        check_frozen(scene)
        check_cut_start(scene)
        check_lost_networks(scene)
        check_ends(scene)

    # A boot: the disk opens late, and the copies are there again.
    began = time.monotonic()
    disk.restart(machine)
    # While the disk is locked there is no engine, and nothing of it on the root disk.
    look = "ls /var/cache/openinfra; systemctl is-active openinfra-engine || true"
    assert machine.sh(look).split() == ["inactive"]
    disk.unlock_late(machine)
    scene.wait_answers()
    print(f"both copies answer {time.monotonic() - began:.1f} s after the reboot was asked for")
    scene.serve()
    scene.check_fence()
    scene.operator.check()

    # The way out.
    scene.check_own()
    with kept_answering(scene.router, OWN):
        done = run_installer(machine, "--uninstall")
    assert done.code == 0, said(done)
    assert "0 left" in done.text.splitlines()
    left = machine.sh(
        "set +e; ls -d /run/openinfra* /var/cache/openinfra /etc/openinfra/installer 2>/dev/null; "
        "ls /sys/class/net | grep -e '^oi-' -e '^ox-'; losetup -a; grep openinfra /etc/passwd "
        "/etc/group /etc/subuid /etc/subgid; iptables -S | grep oi-; "
        "pgrep -a containerd-shim | grep openinfra; "
        "systemctl list-units --all --no-legend 'openinfra*' 'var-cache*' | grep -v guest-agent; "
        "true"
    )
    assert left == ""
