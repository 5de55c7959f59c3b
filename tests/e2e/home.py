"""What the tests of install_agent.py share: a home machine with its encrypted disk, a release
signed by a key of their own, and a web server with TLS from a CA of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import cp_server
from tests.e2e import disk
from tests.e2e.image import Image
from tests.e2e.scripts import run_script
from tests.e2e.vm import Done, Snapshot, Vm, make_snapshot
from tests.harness import ROOT, WALLET, WG_KEY

SCRIPT = "/root/install_agent.py"
HOST = "cp.coledex.com"
ADDRESS = "10.77.0.42"
CA_FILE = "/root/ca.pem"
DIST = "/srv/dist"
KILLED_SCRIPT = "/srv/install_killed.py"
TOKEN_FILE = "/dev/shm/token"
BINARY = "openinfra-agent-linux-x86_64"


def list_answers(wallet: str = WALLET, wg_key: str = WG_KEY) -> tuple[str, ...]:
    """Every answer but the invite."""
    return (
        f"--hostname={HOST}",
        f"--wallet={wallet}",
        f"--wg-endpoint={HOST}:51820",
        f"--wg-public-key={wg_key}",
        f"--wg-address={ADDRESS}",
        f"--ca-file={CA_FILE}",
    )


ANSWERS = list_answers()
ALL = (*ANSWERS, f"--token-file={TOKEN_FILE}")

TOKEN_ID = "abcdefghijklmn23"
TOKEN = cp_server.render_token("oi1", TOKEN_ID, b"canary of an invite, 32 bytes...")

UNITS = tuple(
    path.removeprefix("systemd/") for path in cp_server.ARTIFACT_SOURCES if path[:8] == "systemd/"
)
UNIT_TEXTS = {name: (ROOT / "systemd" / name).read_text() for name in UNITS}
# A web server with TLS, in the machine itself: /dist/ on 443.
SERVER = """
import functools, http.server, ssl
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/srv")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/tls/cert.pem", "/srv/tls/key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def run(*argv: str, stdin: bytes = b"") -> bytes:
    """Run a command on this machine."""
    return subprocess.run(argv, input=stdin, check=True, capture_output=True).stdout


def render_artifact(version: str, units: Mapping[str, str] = UNIT_TEXTS) -> bytes:
    """The agent as one executable file."""
    sources = {name: (ROOT / name).read_bytes() for name in cp_server.ARTIFACT_SOURCES[:4]}
    old, new = (f'VERSION = "{each}"'.encode() for each in (cp_server.VERSION, version))
    sources["agent.py"] = sources["agent.py"].replace(old, new)
    sources |= {f"systemd/{name}": text.encode() for name, text in units.items()}
    return cp_server.render_artifact({"__main__.py": cp_server.ARTIFACT_MAIN, **sources})


def make_key(directory: Path, name: str = "release") -> Path:
    """A key that signs releases."""
    path = directory / f"{name}.pem"
    run("openssl", "genpkey", "-algorithm", "ed25519", "-out", str(path))
    return path


def make_release(
    directory: Path, key: Path, version: str = "0.1.0", created_s: float | None = None
) -> Path:
    """A release directory by `cp_server.py dist`, from these sources but for their version."""
    with tempfile.TemporaryDirectory() as name:
        for path in ("cp_server.py", *cp_server.ARTIFACT_SOURCES, *cp_server.SCRIPTS):
            text = (ROOT / path).read_text()
            copy = Path(name, path)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(
                text.replace(f'VERSION = "{cp_server.VERSION}"', f'VERSION = "{version}"')
            )
        argv = [sys.executable, f"{name}/cp_server.py", "dist"]
        run(*argv, f"--out={directory}", f"--key={key}")
    if created_s is not None:
        release = json.loads((directory / "release.json").read_text())
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created_s))
        sign(directory, key, {**release, "created_at": made})
    return directory


def sign(directory: Path, key: Path, release: object) -> None:
    """Write release.json, its signature and the public key."""
    (directory / "release.json").write_text(json.dumps(release, indent=1) + "\n")
    argv = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(key)]
    argv += ["-in", str(directory / "release.json"), "-out", str(directory / "release.json.sig")]
    run(*argv)
    run("openssl", "pkey", "-in", str(key), "-pubout", "-out", str(directory / "release.pub"))


def make_tls(directory: Path, *names: str, days: int = 30) -> Path:
    """ca.pem, and cert.pem with key.pem for these names."""
    directory.mkdir(parents=True, exist_ok=True)
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    new += ["-nodes", "-days", str(days)]
    ca = ["-subj", "/CN=test CA", "-keyout", f"{directory}/ca.key", "-out", f"{directory}/ca.pem"]
    run(*new, *ca, "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    alt = ",".join(f"IP:{name}" if name[0].isdigit() else f"DNS:{name}" for name in names)
    leaf = ["-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={alt}"]
    leaf += ["-CA", f"{directory}/ca.pem", "-CAkey", f"{directory}/ca.key"]
    leaf += ["-addext", "basicConstraints=critical,CA:FALSE"]
    run(*new, *leaf, "-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem")
    return directory


def make_home(image: Image, booted: Snapshot, directory: Path) -> Snapshot:
    """A machine right after section 2 of the document: its disk is encrypted, open and mounted."""

    def prepare(vm: Vm) -> None:
        vm.restore(booted)
        disk.prepare(vm)
        disk.set_up(vm)
        vm.sh(f"rm {disk.PASS_FILE} {disk.SCRIPT}")
        vm.put((ROOT / "install_agent.py").read_bytes(), SCRIPT, 0o755)

    return make_snapshot(image, directory, "home", prepare)


def put_release(vm: Vm, release: Path) -> None:
    """Lay a release where the web server has it."""
    vm.sh(f"rm -rf {DIST}")
    for path in release.iterdir():
        vm.put(path.read_bytes(), f"{DIST}/{path.name}")


def serve(vm: Vm, release: Path, tls: Path) -> None:
    """The control plane's web server, in the machine itself."""
    put_release(vm, release)
    for name in ("cert.pem", "key.pem"):
        vm.put((tls / name).read_bytes(), f"/srv/tls/{name}", 0o600)
    vm.put((tls / "ca.pem").read_bytes(), CA_FILE)
    vm.put(SERVER.encode(), "/srv/server.py")
    unit = "[Service]\nExecStart=/usr/bin/python3 /srv/server.py\nRestart=always\n"
    vm.put(unit.encode(), "/etc/systemd/system/test-web.service")
    vm.sh("systemctl daemon-reload; systemctl start test-web")
    name_server(vm)
    vm.sh(
        f"until curl -sS --cacert {CA_FILE} https://{HOST}/dist/release.json -o /dev/null; "
        "do sleep 0.2; done"
    )


def name_server(vm: Vm) -> None:
    """Let the machine know where its control plane is; a restored machine has forgotten it."""
    vm.sh(f"echo 127.0.0.1 {HOST} >> /etc/hosts")


def give_token(vm: Vm, token: str) -> None:
    """Write the invite where `ALL` says it is, in memory."""
    vm.put(token.encode() + b"\n", TOKEN_FILE, 0o600)


def install(
    vm: Vm, *arguments: str, script: str = SCRIPT, timeout_s: float = 300, **environment: str
) -> Done:
    """Run the script without a terminal."""
    return run_script(vm, script, *arguments, timeout_s=timeout_s, **environment)


# What the script killed itself at: before its step number KILL_AT.
KILLED = """
    global _steps
    _steps = globals().get("_steps", 0) + 1
    if str(_steps) == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def put_killed(vm: Vm) -> str:
    """A copy of the script that kills itself before a step; gives back its path."""
    head = 'def apply(step: Step) -> None:\n    """Do one step."""\n'
    before, after = (ROOT / "install_agent.py").read_text().split(head)
    vm.put((before + head + KILLED.lstrip("\n") + after).encode(), KILLED_SCRIPT, 0o755)
    return KILLED_SCRIPT


# Names, kinds, modes and owners of all files, and what is in those that are not of packages; also
# links, tables, users and units. What any machine changes by itself is left out.
TREE = """
import hashlib, os, stat, subprocess
SKIP = (
    "/boot /dev /etc/group- /etc/gshadow- /etc/passwd- /etc/shadow- /etc/subgid- /etc/subuid- "
    "/etc/ld.so.cache /opt /proc /root/.cache /run/credentials /run/dbus "
    "/run/initramfs /run/lock /run/log /run/mount /run/openinfra-install.lock "
    "/run/openinfra-luks.lock "
    "/run/systemd /run/udev /srv /sys /tmp /usr/share /var/cache /var/lib/apt /var/lib/dpkg "
    "/var/lib/openinfra /var/lib/systemd /var/log /var/tmp "
).split()
READ = ("/etc", "/root", "/usr/local", "/run")
for top, directories, files in os.walk("/"):
    directories[:] = [d for d in directories if os.path.join(top, d) not in SKIP]
    if top.endswith("__pycache__"):
        continue
    for name in directories + files:
        path = os.path.join(top, name)
        if path in SKIP or name == "__pycache__":
            continue
        seen = os.lstat(path)
        row = [path, oct(seen.st_mode), str(seen.st_uid), str(seen.st_gid)]
        if stat.S_ISLNK(seen.st_mode):
            row.append(os.readlink(path))
        elif stat.S_ISREG(seen.st_mode) and path.startswith(READ):
            row.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
        print(*row)
for command in ("ip -o link | cut -d' ' -f2", "nft list ruleset", "getent passwd", "getent group",
                "systemctl list-unit-files --no-pager --no-legend --plain",
                "systemctl list-units --all --no-pager --no-legend --plain --full '*openinfra*' "
                "| awk '{print $1, $3}'"):
    print(subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout)
"""


def read_tree(vm: Vm) -> set[str]:
    """A line each of all that an uninstall must leave as it was before the install."""
    vm.sh("systemctl daemon-reload")
    return set(vm.sh("python3 -", stdin=TREE.encode(), timeout_s=120).splitlines())
