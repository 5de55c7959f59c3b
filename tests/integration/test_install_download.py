"""The download of install_agent.py against a real Caddy with TLS from a CA of its own.

Each is a process of its own under strace: whatever comes from the server, no file is opened for
writing, so that nothing can be executable before signature, size and sha256 were right.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.home import BINARY, make_key, make_release, make_tls, run, sign
from tests.harness import ROOT, Process, free_port, wait_for

CADDYFILE = """{
  admin off
  auto_https disable_redirects
  skip_install_trust
  storage file_system %(directory)s/storage
}
https://localhost:%(port)d, https://127.0.0.1:%(port)d {
  tls %(directory)s/tls/cert.pem %(directory)s/tls/key.pem
  redir /moved/* http://localhost:%(port)d/dist/ 302
  handle /dist/* {
    root * %(directory)s
    file_server
  }
  respond 404
}
"""
# What the child does: the part of install_agent.py from the answers to the checked release.
CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
from dataclasses import replace
from pathlib import Path
import install_agent
from install_agent import *
install_agent.DOWNLOAD_MAX_S = int(os.environ.get("DOWNLOAD_MAX_S", "900"))
url, ca, pinned, installed, key_sha256, downgrade = sys.argv[2:]
files = {RELEASE_PUB: Found(Path(pinned).read_bytes(), 0o644, 0)} if pinned else {}
if installed:
    files[BINARY] = Found(Path(installed).read_bytes(), 0o755, 0)
known = {str(path): (hashlib.sha256(each.content).hexdigest(),) for path, each in files.items()}
manifest = Manifest(version="0.2.0", files=known) if installed else Manifest()
facts = replace(read_facts(), files=files, manifest=manifest)
ca = Path(ca).read_bytes() if ca else b""
answers = Answers(url, "", "", "", "", "", "", ca, False)
try:
    release = read_release(facts, answers, key_sha256)
    check_version(facts.manifest, release, downgrade == "yes")
    check_signature(release)
    print(release.version, len(release.artifact))
except Error as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|rename|chmod|link\(")


class Site:
    """A release behind Caddy."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.key = make_key(directory)
        self.dist = make_release(directory / "dist", self.key)
        self.tls = make_tls(directory / "tls", "localhost")
        self.caddy: Process | None = None

    def start(self) -> Site:
        names = {"directory": self.directory, "port": self.port}
        (self.directory / "Caddyfile").write_text(CADDYFILE % names)
        argv = ["caddy", "run", "--adapter=caddyfile", f"--config={self.directory / 'Caddyfile'}"]
        home = {"HOME": str(self.directory)}
        self.caddy = Process(argv, self.directory / "caddy.log", home)

        def answers() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for("Caddy", answers, 20)
        return self

    def url(self, host: str = "localhost", path: str = "dist") -> str:
        return f"https://{host}:{self.port}/{path}/{BINARY}"

    def change(self, change: Callable[[dict[str, object]], None]) -> None:
        """Change one file's entry in release.json and sign it again."""
        release = json.loads((self.dist / "release.json").read_text())
        change(release["files"][BINARY])
        sign(self.dist, self.key, release)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made.start()
    assert made.caddy
    made.caddy.stop()


def download(
    site: Site,
    url: str = "",
    *,
    ca: bool = True,
    pinned: Path | str = "",
    installed: Path | str = "",
    sha256: str = "",
    downgrade: str = "",
    prefix: tuple[str, ...] = (),
) -> tuple[int, str]:
    """The exit code and what was said; fails when anything was opened for writing."""
    log = site.directory / "strace.log"
    watch = ["strace", "-f", "-qq", "-o", str(log), "-e"]
    watch += ["trace=open,openat,creat,rename,renameat,renameat2,link,linkat,chmod,fchmod,fchmodat"]
    argv = [*watch, *prefix, "/usr/bin/python3", "-SI", "-c", CHILD, str(ROOT), url or site.url()]
    argv += [str(site.tls / "ca.pem") if ca else "", str(pinned), str(installed), sha256, downgrade]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    lines = log.read_text().splitlines()
    assert any("release" in line or "python3" in line for line in lines)
    for line in lines:
        harmless = any(word in line for word in ('"/dev/null"', '"/proc/', "ENOENT"))
        harmless = harmless or (prefix != () and '"/dev/shm/' in line)  # faketime's own
        assert harmless or not WRITES.search(line), line
    return done.returncode, done.stdout.strip()


def test_a_good_release_is_taken(site: Site) -> None:
    size_bytes = (site.dist / BINARY).stat().st_size
    good = (0, f"0.1.0 {size_bytes}")
    assert download(site) == good
    pub = site.dist / "release.pub"
    assert download(site, pinned=pub) == good
    sha256 = run("sha256sum", str(pub)).split()[0].decode()
    assert download(site, sha256=sha256) == good
    assert download(site, url=f"file://{site.dist}/{BINARY}", ca=False) == good


def test_what_is_installed_is_not_downloaded_again(site: Site) -> None:
    kept = site.directory / "installed"
    (site.dist / BINARY).rename(kept)
    make = make_release(site.directory / "next", site.key, "0.2.0")
    same = {name: make / name for name in ("release.json", "release.json.sig", "release.pub")}
    for name, path in same.items():
        path.rename(site.dist / name)
    code, said = download(site, installed=make / BINARY)
    assert (code, said.split()[0]) == (0, "0.2.0")
    # A run of nothing to do asks for one file.
    pub = site.directory / "pinned.pub"
    (site.dist / "release.pub").rename(pub)
    assert download(site, installed=make / BINARY, pinned=pub)[0] == 0
    assert download(site, installed=make / BINARY)[0] == 1
    other = site.directory / "other"
    other.write_bytes((make / BINARY).read_bytes() + b"x")
    assert download(site, installed=other, pinned=pub)[0] == 1


def truncate(site: Site) -> None:
    content = (site.dist / BINARY).read_bytes()
    (site.dist / BINARY).write_bytes(content[:-1000])


def alter(site: Site) -> None:
    content = bytearray((site.dist / BINARY).read_bytes())
    content[5000] ^= 1
    (site.dist / BINARY).write_bytes(content)


def enlarge(site: Site) -> None:
    with (site.dist / BINARY).open("ab") as file:
        file.write(b"\0" * 50_000_000)


def claim_too_much(site: Site) -> None:
    site.change(lambda entry: entry.update(size_bytes=1 << 40))


def claim_too_little(site: Site) -> None:
    site.change(lambda entry: entry.update(size_bytes=10))


def edit_release(site: Site) -> None:
    path = site.dist / "release.json"
    path.write_text(path.read_text().replace("0.1.0", "0.1.1"))


def sign_with_another(site: Site) -> None:
    """Whoever holds the web server has its TLS, and not the operator's key."""
    other = make_key(site.directory, "other")
    pub = (site.dist / "release.pub").read_bytes()
    sign(site.dist, other, json.loads((site.dist / "release.json").read_text()))
    (site.dist / "release.pub").write_bytes(pub)


def cut_signature(site: Site) -> None:
    path = site.dist / "release.json.sig"
    path.write_bytes(path.read_bytes()[:63])


def empty_signature(site: Site) -> None:
    (site.dist / "release.json.sig").write_bytes(b"")


def spoil_key(site: Site) -> None:
    (site.dist / "release.pub").write_bytes(b"no key\n")


def remove_release(site: Site) -> None:
    (site.dist / "release.json").unlink()


def make_release_huge(site: Site) -> None:
    (site.dist / "release.json").write_bytes(b"{" + b" " * 10_000_000)


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (truncate, 1, "is not the file of release.json"),
        (alter, 1, "is not the file of release.json"),
        (enlarge, 1, "is larger than"),
        (claim_too_much, 1, "bytes by release.json"),
        (claim_too_little, 1, "is larger than 10 bytes"),
        (edit_release, 3, "the signature of release.json does not verify"),
        (sign_with_another, 3, "the signature of release.json does not verify"),
        (cut_signature, 3, "the signature of release.json does not verify"),
        (empty_signature, 3, "the signature of release.json does not verify"),
        (spoil_key, 3, "the signature of release.json does not verify"),
        (remove_release, 1, "release.json is answered with 404"),
        (make_release_huge, 1, "release.json is larger than 65536 bytes"),
    ],
)
def test_a_bad_release_is_refused(
    site: Site, spoil: Callable[[Site], None], code: int, said: str
) -> None:
    spoil(site)
    found, text = download(site)
    assert (found, said in text) == (code, True), text
    assert text.isprintable()


def test_another_key_than_the_pinned_one_is_refused(site: Site) -> None:
    old = site.directory / "old.pub"
    old.write_bytes((site.dist / "release.pub").read_bytes())
    new = make_key(site.directory, "new")
    sign(site.dist, new, json.loads((site.dist / "release.json").read_text()))
    code, said = download(site, pinned=old)
    assert (code, "is another key than /etc/openinfra/installer/release.pub" in said) == (3, True)
    sha256 = said.split("--release-key-sha256 ")[1].split()[0]
    assert download(site, pinned=old, sha256=sha256)[0] == 0
    code, said = download(site, sha256="0" * 64)
    assert (code, "not the one that you gave" in said) == (3, True)


def test_an_old_release_is_refused(site: Site) -> None:
    code, said = download(site, installed=site.dist / BINARY)
    assert (code, "has version 0.1.0, and 0.2.0 is installed" in said) == (3, True)
    assert download(site, installed=site.dist / BINARY, downgrade="yes")[0] == 0


def test_a_certificate_that_does_not_verify_is_refused(site: Site) -> None:
    code, said = download(site, ca=False)
    assert (code, "the certificate of localhost" in said, "--ca-file" in said) == (1, True, True)
    code, said = download(site, url=site.url("127.0.0.1"))
    assert code == 1
    assert "does not verify" in said
    assert "127.0.0.1" in said
    (site.tls / "ca.pem").write_bytes(b"no certificate\n")
    code, said = download(site)
    assert (code, "holds no good certificate" in said) == (2, True)


def test_a_certificate_of_the_past_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    script = "import sys; from pathlib import Path; from tests.e2e.home import make_tls; "
    script += "make_tls(Path(sys.argv[1]), 'localhost')"
    argv = ["faketime", "2020-01-01", "/usr/bin/env", f"PYTHONPATH={ROOT}"]
    run(*argv, sys.executable, "-c", script, str(site.tls))
    site.start()
    code, said = download(site)
    assert site.caddy
    site.caddy.stop()
    assert (code, "expired" in said, "clock" in said) == (1, True, True), said


def test_a_server_that_is_not_there(site: Site) -> None:
    code, said = download(site, url=f"https://localhost:{free_port()}/dist/{BINARY}")
    assert (code, said.startswith("UnreachableError: ")) == (1, True)
    assert "cannot be reached: Connection refused" in said
    code, said = download(site, url=f"https://no-such-host.invalid/dist/{BINARY}")
    assert (code, "there is no no-such-host.invalid in the DNS" in said) == (1, True), said
    code, said = download(site, url=site.url(path="moved"))
    assert (code, "is answered with 302" in said) == (1, True)
    code, said = download(site, url=f"http://localhost:{site.port}/dist/{BINARY}")
    assert code == 1
    assert "unknown url type" in said


def test_a_clock_that_is_an_hour_off(site: Site) -> None:
    code, said = download(site, prefix=("faketime", "-f", "+1h"))
    assert (code, "timedatectl set-ntp true" in said) == (1, True), said


def test_a_release_of_the_future(site: Site) -> None:
    """Nothing but the release says what time it is: from a file."""
    make_release(site.dist, site.key, created_s=4e9)
    code, said = download(site, url=f"file://{site.dist}/{BINARY}")
    assert (code, "2096-10-02" in said) == (1, True), said


def serve_once(site: Site, answer: bytes) -> int:
    """A TLS server that gives every request these bytes and hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.tls / "cert.pem", site.tls / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as raw, context.wrap_socket(raw, server_side=True) as s:
            s.recv(4096)
            s.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "broke off after 1 of 500 bytes"),
        (b"", "cannot be reached: "),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nDate: x\r\n\r\n{}", "release.json does not describe"),
        (b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 999999999 0:0:0 GMT\r\n\r\n{}", "cannot be read"),
        (b"HTTP/1.1 500 \x1b[2J\r\n\r\n", "is answered with 500"),
    ],
)
def test_a_server_that_talks_nonsense(site: Site, answer: bytes, said: str) -> None:
    port = serve_once(site, answer)
    code, text = download(site, url=f"https://localhost:{port}/dist/{BINARY}")
    assert (code, said in text, text.isprintable()) == (1, True, True), text


def test_a_server_that_drips_its_headers(site: Site) -> None:
    """Each byte ends a silence; the whole has its limit, here 2 s."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.tls / "cert.pem", site.tls / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as raw, context.wrap_socket(raw, server_side=True) as s:
            s.recv(4096)
            s.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            with contextlib.suppress(OSError):
                while True:
                    s.sendall(b"x")
                    time.sleep(0.2)

    threading.Thread(target=serve, daemon=True).start()
    url = f"https://localhost:{listener.getsockname()[1]}/dist/{BINARY}"
    began = time.monotonic()
    code, said = download(site, url=url, prefix=("env", "DOWNLOAD_MAX_S=2"))
    assert (code, "it comes too slowly" in said) == (1, True), said
    assert time.monotonic() - began < 10
