"""The registry behind Caddy's own file: who may push, pull and mount what, with real `docker`.

Control plane, Caddy, docker-registry and dockerd are in one network namespace, on the ports that a
deployment has.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import json
import os
import socket
import ssl
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests.engine import Engine, make_layer, sha256
from tests.harness import (
    WALLET,
    Agent,
    ControlPlane,
    Postgres,
    free_port,
    inside,
    make_netns,
    serving,
    start_caddy,
)
from tests.integration.test_customers import add, mint
from tests.integration.test_http_edge import read_metrics
from tests.integration.test_workloads import Tenant
from tests.readme import block

# Docker does not ask who vouches for the certificate of a loopback address.
HOST = "127.0.0.1"


class Registry:
    """A control plane with its registry, as the world sees it."""

    def __init__(self, cp: ControlPlane, engine: Engine, directory: Path) -> None:
        self.cp, self.engine, self.directory = cp, engine, directory
        self.caddy, _ = start_caddy(directory, HOST, engine.netns)

    def ask(
        self, method: str, path: str, password: str = "", body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """One request through Caddy: status, headers, and the JSON of the answer."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(HOST, 443, timeout=20, context=context)
        if password:
            word = base64.b64encode(f"any:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {word}"
        with contextlib.closing(connection):
            with inside(self.engine.netns):
                connection.connect()
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            raw = answer.read()
        try:
            told = json.loads(raw)
        except ValueError:
            told = raw
        return answer.status, dict(answer.headers), told

    def docker(self, *argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The customer's `docker`, with settings of its own."""
        line = ["docker", f"--config={self.directory}", f"--host=unix://{self.engine.socket}"]
        return subprocess.run([*line, *argv], input=stdin, capture_output=True, check=False)


@pytest.fixture(scope="module")
def registry(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp("registry")
    flags = ("--peer-check=off", f"--registry={HOST}", f"--registry-dir={directory}/disk")
    (directory / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "disk", str(directory / "disk")]
    subprocess.run(mount, check=True)
    with make_netns() as netns, serving(postgres, directory / "cp", *flags, netns=netns) as cp:
        engine = Engine(netns)
        made = Registry(cp, engine, directory)
        try:
            yield made
        finally:
            made.caddy.stop()
            engine.close()
            subprocess.run(["umount", str(directory / "disk")], check=True)


def code(answer: tuple[int, dict[str, str], Any]) -> tuple[int, str]:
    """Status and the registry's own word for an answer that is no."""
    return answer[0], answer[2]["errors"][0]["code"]


def push(registry: Registry, tenant: Tenant, name: str, extra: bytes = b"") -> str:
    """Push busybox as a customer does; gives back its digest."""
    tag = f"{HOST}/{name}:1"
    assert registry.docker("import", "-", tag, stdin=make_layer(extra)).returncode == 0
    key = tenant.key.encode()
    done = registry.docker("login", HOST, "--username=me", "--password-stdin", stdin=key)
    assert done.returncode == 0, done.stderr
    done = registry.docker("push", tag)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode()
    return said[said.index("sha256:") :].split()[0]


def test_from_a_push_to_a_process(registry: Registry, make_agent: Callable[..., Agent]) -> None:
    """The host pulls with what only it has, and only what it is to run."""
    tenant, other = Tenant(registry.cp), Tenant(registry.cp)
    digest = push(registry, tenant, f"{tenant.namespace}/web")
    agent = make_agent(
        "127.0.0.1:9092", registry.cp.mint(payout_pubkey=WALLET), netns=registry.engine.netns
    )
    agent.engine_socket = registry.engine.socket
    agent.limits_file.write_text("CPUS=2\nMEMORY=2G\n")
    agent.start()
    registry.cp.wait_assignable()
    for row in registry.engine.call("GET", "/images/json")[1]:
        registry.engine.call("DELETE", f"/images/{row['Id']}?force=1")
    assert registry.engine.call("GET", "/images/json")[1] == []
    order = {"image": f"{tenant.namespace}/web@{digest}", "cpu_milli": 50}
    order |= {"command": ["/bin/sleep", "999"], "memory_bytes": 32 << 20}
    workload = tenant.post(201, **order)
    tenant.wait(workload, "running")
    session = json.loads((agent.data / "identity.json").read_text())["session"]
    password = hashlib.sha256(bytes.fromhex(session)).hexdigest()
    ours, web = f"/v2/{tenant.namespace}", f"/v2/{tenant.namespace}/web"
    assert registry.ask("GET", f"{web}/manifests/{digest}", password)[0] == 200
    assert registry.ask("GET", "/v2/", password)[0] == 200
    # Neither the session itself, nor what the database holds, nor another repository, nor a write.
    (row,) = registry.cp.query("SELECT session_sha256 FROM sessions WHERE ended_at IS NULL")
    for wrong in (session, bytes(row["session_sha256"]).hex()):
        assert code(registry.ask("GET", "/v2/", wrong))[0] == 401
    # Nor what else is in its repository.
    for path in ("tags/list", "manifests/1"):
        assert code(registry.ask("GET", f"{web}/{path}", password)) == (403, "DENIED")
        assert registry.ask("GET", f"{web}/{path}", tenant.key)[0] == 200
    later = push(registry, tenant, f"{tenant.namespace}/other")
    refused = registry.ask("GET", f"{ours}/other/manifests/{later}", password)
    assert code(refused) == (403, "DENIED")
    assert code(registry.ask("POST", f"{web}/blobs/uploads/", password)) == (403, "DENIED")
    # Nor anything once it is not to run it any more; nor another customer.
    assert code(registry.ask("GET", f"{web}/tags/list", other.key)) == (403, "DENIED")
    tenant.call("DELETE", f"/{workload['workload_id']}")
    tenant.wait(workload, "deleted")
    assert code(registry.ask("GET", f"{web}/manifests/{digest}", password)) == (403, "DENIED")
    assert registry.ask("GET", "/v2/", password)[0] == 200
    assert password not in registry.cp.log + (registry.directory / "caddy.log").read_text()


def test_who_is_not_known_gets_nothing(registry: Registry) -> None:
    tenant = Tenant(registry.cp)
    status, headers, told = registry.ask("GET", "/v2/")
    assert (status, told["errors"][0]["code"]) == (401, "UNAUTHORIZED")
    assert headers["Www-Authenticate"] == 'Basic realm="openinfra"'
    assert "docker login" in told["errors"][0]["message"]
    for wrong in ("x", "oik1_x", tenant.key[:-1] + "A", "0" * 64, "f" * 63):
        assert code(registry.ask("GET", "/v2/", wrong)) == (401, "UNAUTHORIZED")
    assert registry.ask("GET", "/v2/", tenant.key)[0] == 200
    key_id = tenant.key.split("_")[1]
    done = registry.cp.command("revoke-key", key_id)
    assert done.returncode == 0, done.stderr
    assert code(registry.ask("GET", "/v2/", tenant.key)) == (401, "UNAUTHORIZED")


def test_a_customer_reaches_its_own_images_only(registry: Registry) -> None:
    mine, theirs = Tenant(registry.cp), Tenant(registry.cp)
    digest = push(registry, theirs, f"{theirs.namespace}/web")
    other = f"/v2/{theirs.namespace}/web"
    manifest = registry.ask(
        "GET",
        f"{other}/manifests/{digest}",
        theirs.key,
        Accept="application/vnd.docker.distribution.manifest.v2+json",
    )[2]
    layer = manifest["layers"][0]["digest"]
    own = f"/v2/{mine.namespace}/web"
    for path in (
        f"{other}/manifests/{digest}",
        f"{other}/manifests/1",
        f"{other}/blobs/{layer}",
        f"{other}/tags/list",
        f"{own}/../../{theirs.namespace}/web/tags/list",
        f"/v2//{theirs.namespace}/web/tags/list",
        f"/v2/{theirs.namespace}%2fweb/tags/list",
        f"/v2/%2e%2e/{theirs.namespace}/web/tags/list",
        "/v2/_catalog",
        "/v2/_catalog?n=1",
    ):
        status = registry.ask("GET", path, mine.key)[0]
        assert status in (403, 404), path
    # A blob whose digest is known is not to be had by mounting it.
    upload = f"{own}/blobs/uploads/"
    mount = f"?mount={layer}&from={theirs.namespace}/web"
    assert code(registry.ask("POST", upload + mount, mine.key)) == (403, "DENIED")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert registry.ask("POST", upload, mine.key, mount[1:].encode(), **form)[0] == 415
    form = {"Content-Type": 'Multipart/Form-Data; boundary="x"'}
    assert registry.ask("POST", upload, mine.key, b"--x--", **form)[0] == 415
    twice = f"?from={mine.namespace}/web&mount={layer}&from={theirs.namespace}/web"
    assert registry.ask("POST", upload + twice, mine.key)[0] == 400
    assert registry.ask("GET", f"{own}/blobs/{layer}", mine.key)[0] == 404
    # What is pushed cannot be taken away from under those who run it.
    status, headers, _ = registry.ask("DELETE", f"{own}/manifests/{digest}", mine.key)
    assert (status, headers["Allow"]) == (405, "GET, HEAD, PUT")
    # Its own: a blob, and the same by a mount from its other repository.
    status, headers, _ = registry.ask("POST", upload, mine.key)
    assert status == 202
    blob = b"mine"
    where = f"{headers['Location']}&digest={sha256(blob)}"
    kind = {"Content-Type": "application/octet-stream"}
    assert registry.ask("PUT", where, mine.key, blob, **kind)[0] == 201
    mount = f"?mount={sha256(blob)}&from={mine.namespace}/web"
    path = f"/v2/{mine.namespace}/second/blobs/uploads/{mount}"
    assert registry.ask("POST", path, mine.key)[0] == 201


def test_the_readmes_way_to_push(registry: Registry) -> None:
    key = mint(registry.cp, add(registry.cp, "kuma"))
    assert registry.docker("import", "-", "web:latest", stdin=make_layer()).returncode == 0
    where = {"DOCKER_HOST": f"unix://{registry.engine.socket}", "OPENINFRA_KEY": key}
    where |= {"DOCKER_CONFIG": str(registry.directory / "readme"), "PATH": os.environ["PATH"]}
    script = block("customer-push").replace("cp.coledex.com", HOST)
    argv = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(argv, env=where, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"digest: sha256:" in done.stdout
    assert registry.ask("GET", "/v2/kuma/web/tags/list", key)[2]["tags"] == ["1"]


def test_a_tag_is_looked_up_once(registry: Registry) -> None:
    """Its copies stay what they are, until the same order comes again after another push."""
    tenant = Tenant(registry.cp)
    first = push(registry, tenant, f"{tenant.namespace}/web")
    workload = tenant.post(201, image=f"{tenant.namespace}/web:1")
    assert workload["image"] == f"{tenant.namespace}/web@{first}"
    assert tenant.post(200, image=f"{tenant.namespace}/web:1")["revision"] == 1
    second = push(registry, tenant, f"{tenant.namespace}/web", b"another")
    assert second != first
    assert tenant.get(workload)["image"].endswith(first)
    changed = tenant.post(200, image=f"{HOST}/{tenant.namespace}/web:1")
    assert (changed["revision"], changed["image"]) == (2, f"{tenant.namespace}/web@{second}")
    status, told = tenant.call("POST", "", tenant.order(image=f"{tenant.namespace}/web"))
    assert (status, told["error"]["field"]) == (400, "image")
    assert f"the registry has no {tenant.namespace}/web:latest; push it" in told["error"]["message"]
    # Whether another's tag is there is not told.
    other = Tenant(registry.cp)
    for name in ("web:1", "no:1"):
        order = other.order(image=f"{tenant.namespace}/{name}")
        status, told = other.call("POST", "", order)
        assert (status, told["error"]["code"]) == (403, "forbidden")
        assert "which is none of yours" in told["error"]["message"]


def test_without_its_registry_a_tag_is_not_taken(make_cp: Callable[..., ControlPlane]) -> None:
    cp = make_cp(f"--registry={HOST}", f"--registry-url=http://127.0.0.1:{free_port()}")
    tenant = Tenant(cp)
    status, told = tenant.call("POST", "", tenant.order(image=f"{tenant.namespace}/web:1"))
    assert (status, told["error"]["code"]) == (503, "try_later")
    assert "name the digest" in told["error"]["message"]
    tenant.post(201)  # by its digest


def test_a_full_registry_takes_no_push_and_serves_on(registry: Registry) -> None:
    tenant = Tenant(registry.cp)
    digest = push(registry, tenant, f"{tenant.namespace}/web")
    filler = registry.directory / "disk/filler"
    filler.write_bytes(bytes(70 << 20))
    try:
        registry.docker("import", "-", f"{HOST}/{tenant.namespace}/web:2", stdin=make_layer(b"2"))
        done = registry.docker("push", f"{HOST}/{tenant.namespace}/web:2")
        assert done.returncode != 0
        assert b"the registry is full: 58 MiB are free; ask the operator" in done.stderr
        path = f"/v2/{tenant.namespace}/web/manifests/{digest}"
        assert registry.ask("GET", path, tenant.key)[0] == 200
    finally:
        filler.unlink()
    assert registry.docker("push", f"{HOST}/{tenant.namespace}/web:2").returncode == 0


def test_docker_says_why(registry: Registry) -> None:
    mine, theirs = Tenant(registry.cp), Tenant(registry.cp)
    push(registry, mine, f"{mine.namespace}/web")
    name = f"{HOST}/{theirs.namespace}/web:1"
    registry.docker("tag", f"{HOST}/{mine.namespace}/web:1", name)
    done = registry.docker("push", name)
    assert done.returncode != 0
    assert f"the namespace {theirs.namespace} is not yours".encode() in done.stderr


# What asks Caddy comes from there: this machine itself is not counted.
AWAY_NFT = """
table ip away {
  chain source {
    type nat hook postrouting priority 100;
    ip daddr HOST tcp dport 443 snat to AWAY
  }
}
"""
AWAY = (f"203.0.113.{last}" for last in range(1, 255))


@pytest.fixture
def from_away(registry: Registry) -> Iterator[str]:
    """All who ask the registry have one address, which asked nothing in another test."""
    nft, away = ["nft", "-f", "-"], next(AWAY)
    table = AWAY_NFT.replace("HOST", HOST).replace("AWAY", away)
    with inside(registry.engine.netns):
        subprocess.run(["ip", "addr", "add", f"{away}/32", "dev", "lo"], check=True)
        subprocess.run(nft, input=table.encode(), check=True)
    yield away
    with inside(registry.engine.netns):
        subprocess.run(nft, input=b"delete table ip away", check=True)
        subprocess.run(["ip", "addr", "del", f"{away}/32", "dev", "lo"], check=True)


def make_image(tag: str, count: int) -> bytes:
    """An image of so many small layers, as `docker load` takes it."""
    layers = {}
    for number in range(count):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(f"{number}"))
        layers[f"{number}.tar"] = made.getvalue()
    ids = [sha256(raw) for raw in layers.values()]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ids},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": list(layers)}]
    files = {"config.json": json.dumps(config).encode(), **layers}
    files["manifest.json"] = json.dumps(manifest).encode()
    image = io.BytesIO()
    with tarfile.open(fileobj=image, mode="w") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return image.getvalue()


def count_refused(registry: Registry) -> float:
    return read_metrics(registry.cp).get('openinfra_http_requests_total{status="429"}', 0.0)


@pytest.mark.usefixtures("from_away")
def test_an_image_of_many_layers_meets_no_limit(registry: Registry) -> None:
    """Five requests a layer, and far more of them than one address may make elsewhere."""
    tenant = Tenant(registry.cp)
    tag = f"{HOST}/{tenant.namespace}/many:1"
    assert registry.docker("load", stdin=make_image(tag, 60)).returncode == 0
    key = tenant.key.encode()
    before = count_refused(registry)
    done = registry.docker("login", HOST, "--username=me", "--password-stdin", stdin=key)
    assert done.returncode == 0, done.stderr
    done = registry.docker("push", tag)
    assert done.returncode == 0, done.stderr
    assert registry.docker("image", "rm", tag).returncode == 0
    done = registry.docker("pull", tag)
    assert done.returncode == 0, done.stderr
    assert count_refused(registry) == before


def test_who_guesses_keys_is_as_slow_as_ever(registry: Registry, from_away: str) -> None:
    """Whoever has a right key too: only that one is asked for more often."""
    tenant = Tenant(registry.cp)
    assert registry.ask("GET", "/v2/", tenant.key)[0] == 200
    wrong = tenant.key[:-1] + ("A" if tenant.key[-1] != "A" else "B")
    began = time.monotonic()
    statuses = ask_at_once(registry, wrong, from_away, 300)
    looked = cp_server.HTTP_BURST + cp_server.HTTP_CALLS_S * (time.monotonic() - began) + 1
    assert statuses[401] <= looked
    assert statuses[429] >= 300 - looked
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # one after the other is slower
        flood = pool.submit(ask_at_once, registry, wrong, from_away, 1_000)
        answers = (registry.ask("GET", "/v2/", wrong) for _ in range(100))
        status, headers, told = next(answer for answer in answers if answer[0] != 401)
        assert flood.result()[429] > 100
    assert (status, headers["Retry-After"]) == (429, "1")
    what = "too many requests from this address; ask less often"
    assert told == {"errors": [{"code": "TOOMANYREQUESTS", "message": what}]}
    assert registry.ask("GET", "/v2/", tenant.key)[0] == 200
    # A key that is right no more is one of these.
    key_id = tenant.key.split("_")[1]
    assert registry.cp.command("revoke-key", key_id).returncode == 0
    assert registry.ask("GET", "/v2/", tenant.key)[0] == 401
    assert ask_at_once(registry, tenant.key, from_away, 300)[429] > 100


def test_a_right_key_has_its_limit_too(registry: Registry, from_away: str) -> None:
    """What is asked at once has one as well, so that others find room in the queue."""
    tenant, other = Tenant(registry.cp), Tenant(registry.cp)
    for each in (tenant, other):
        assert registry.ask("GET", "/v2/", each.key)[0] == 200
    socks = [send_question(registry, tenant.key, from_away) for _ in range(60)]
    assert registry.ask("GET", "/v2/", other.key)[0] == 200
    with concurrent.futures.ThreadPoolExecutor(60) as pool:  # who does not close is waited for
        statuses = collections.Counter(pool.map(read_status, socks))
    assert statuses.keys() == {200, 503}
    assert cp_server.REGISTRY_ROOM <= statuses[200] < 60
    statuses = ask_at_once(registry, tenant.key, from_away, 1_500)
    assert statuses[200] >= cp_server.REGISTRY_BURST - 60
    assert statuses.keys() <= {200, 429, 503}
    assert registry.ask("GET", "/v2/", other.key)[0] == 200


def send_question(registry: Registry, key: str, away: str) -> socket.socket:
    """Ask as Caddy does."""
    word = base64.b64encode(f"any:{key}".encode()).decode()
    lines = [f"GET {cp_server.REGISTRY_AUTH} HTTP/1.1", "Host: cp", f"Authorization: Basic {word}"]
    lines += [f"X-Forwarded-For: {away}", "X-Forwarded-Method: GET", "X-Forwarded-Uri: /v2/"]
    with inside(registry.engine.netns):
        sock = socket.create_connection((HOST, registry.cp.http_port), 10)
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    return sock


def read_status(sock: socket.socket) -> int:
    with sock:
        answer = b"".join(iter(lambda: sock.recv(65_536), b""))
    return int(answer[9:12])


def ask_at_once(registry: Registry, key: str, away: str, count: int) -> collections.Counter[int]:
    """Questions, sixteen at a time: how often each status came."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = pool.map(lambda _: read_status(send_question(registry, key, away)), range(count))
        return collections.Counter(asked)
