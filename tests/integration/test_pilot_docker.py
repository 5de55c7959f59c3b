"""The pilot where this machine has Docker: its workload is a real container there.

dockerd is one of the tests' own. What the pilot makes in it is gone afterwards, however it ends,
and what somebody else has there is left alone.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cp_server
from tests.engine import Engine
from tests.harness import wait_for
from tests.integration.test_pilot import (
    Start,
    check_bills,
    processes_in,
    read_cmdline,
    root_dir,
    start,
    start_pilot,
)

__all__ = ["root_dir", "start"]  # fixtures
LABEL = cp_server.DOCKER_LABEL


def list_images(engine: Engine) -> set[str]:
    return {row["Id"] for row in engine.call("GET", "/images/json?all=1")[1]}


@pytest.fixture
def theirs(engine: Engine) -> Iterator[str]:
    """A container, an image and a network of somebody else's, which stay as they are."""
    image = engine.push("theirs/web")
    name, _, digest = image.partition("@")
    assert engine.call("POST", f"/images/create?fromImage={name}&tag={digest}")[0] == 200
    assert engine.call("POST", "/networks/create", {"Name": "theirs"})[0] == 201
    body = {"Image": image, "Cmd": ["/bin/sleep", "1000"], "Labels": {"openinfra.assignment": "x"}}
    made = engine.call("POST", "/containers/create?name=theirs", body)[1]["Id"]
    assert engine.call("POST", f"/containers/{made}/start")[0] == 204
    before = engine.call("GET", f"/containers/{made}/json")[1]
    images = list_images(engine)
    yield made
    assert engine.call("GET", f"/containers/{made}/json")[1] == before
    assert [each for each in engine.networks() if each != "ox-engine"] == []
    assert engine.call("GET", "/networks/theirs")[0] == 200
    assert list_images(engine) == images
    assert engine.containers(LABEL) == {}
    engine.call("DELETE", f"/containers/{made}?force=1")
    engine.call("DELETE", "/networks/theirs")


def find_container(engine: Engine) -> dict[str, Any]:
    """The workload's, once it is there."""
    (found,) = wait_for("a container", lambda: engine.containers(LABEL) or None, 20).values()
    return found


@pytest.mark.usefixtures("theirs")
def test_the_workload_is_a_container_and_nothing_stays(
    engine: Engine, start: Start, root_dir: Path
) -> None:
    pilot = start_pilot(start, f"--docker={engine.socket}")
    said = f"a container of the Docker at {engine.socket}"
    assert f"a workload runs: {said}" in pilot.log
    container = find_container(engine)
    assert container["State"]["Running"]
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    assert container["Config"]["Cmd"] == cp_server.PILOT_ORDER["command"]
    started = container["State"]["StartedAt"]
    time.sleep(2.5)  # two heartbeats, for something to bill
    assert find_container(engine)["State"]["StartedAt"] == started
    assert pilot.stop(signal.SIGINT) == 0
    assert f"what the workload used, {said}:" in pilot.log
    assert check_bills(root_dir, pilot.log) > 0
    (row,) = re.findall(r"^Pilot +pilot/counter/0 .*$", pilot.log, re.MULTILINE)
    *_, counted_cpu_h, _, _, life_h = row.split()[:12]
    assert 0 < float(counted_cpu_h) <= float(life_h)
    assert processes_in(root_dir) == []


@pytest.mark.usefixtures("theirs")
def test_killed_it_leaves_nothing_in_docker(engine: Engine, start: Start, root_dir: Path) -> None:
    docker = f"--docker={engine.socket}"
    pilot = start_pilot(start, docker)
    assert find_container(engine)["State"]["Running"]
    pilot.stop(signal.SIGKILL)
    wait_for("the container's end", lambda: not engine.containers(LABEL) or None, 20)
    wait_for("the end of all", lambda: not processes_in(root_dir) or None, 20)
    # A power cut: nobody cleans up. The next run of the same directory does.
    pilot = start_pilot(start, docker)
    first = find_container(engine)["Id"]
    pilot.child.send_signal(signal.SIGSTOP)  # it does not see the door's end
    for pid in find_doors(root_dir):
        os.kill(pid, signal.SIGKILL)
    pilot.stop(signal.SIGKILL)
    wait_for("the end of all", lambda: not processes_in(root_dir) or None, 20)
    assert find_container(engine)["Id"] == first
    pilot = start_pilot(start, docker)
    assert find_container(engine)["Id"] != first
    assert pilot.stop(signal.SIGTERM) == 0


def find_doors(root_dir: Path) -> list[int]:
    """The process between a pilot and Docker."""
    words = f"pilot-engine --docker=.* --dir={re.escape(str(root_dir))}"
    entries = Path("/proc").glob("[0-9]*")
    found = [int(each.name) for each in entries if re.search(words, read_cmdline(each))]
    assert len(found) == 1
    return found


@contextlib.contextmanager
def between(engine: Engine, path: Path, makes: bool = True) -> Iterator[str]:
    """A Docker that knows no filter and, if so wanted, makes nothing; gives back the flag."""
    real = cp_server.DockerDoor(engine.socket, "")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            query.pop("filters", None)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_json = "json" in self.headers.get("Content-Type", "")
            body = json.loads(raw) if is_json else raw or None
            if url.path.endswith("/containers/create") and not makes:
                status, answer = 500, b'{"message": "no control groups here"}'
            else:
                status, answer = real.ask(self.command, url.path, body, **query)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None: ...

    with serving(Handler, path):
        yield f"--docker={path}"


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler], path: Path) -> Iterator[None]:
    """An HTTP server on a socket."""
    with socketserver.ThreadingUnixStreamServer(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("theirs")
def test_only_what_is_ours_is_removed_though_the_filter_is_ignored(
    engine: Engine, start: Start, tmp_path: Path
) -> None:
    with between(engine, tmp_path / "docker.sock") as docker:
        pilot = start_pilot(start, docker)
        assert find_container(engine)["State"]["Running"]
        assert pilot.stop(signal.SIGINT) == 0


@pytest.mark.usefixtures("theirs")
def test_a_docker_that_makes_nothing_is_named_with_its_reason(
    engine: Engine, start: Start, tmp_path: Path
) -> None:
    with between(engine, tmp_path / "docker.sock", makes=False) as docker:
        pilot = start(docker)
        assert pilot.child.wait(60) == 1
    words = r"^ERROR the workload did not come up in 30 s: .*no control groups"
    assert re.search(words, pilot.log, re.MULTILINE)
    assert "or run it with --docker=" in pilot.log


def test_what_is_no_docker_gets_a_stand_in(start: Start, tmp_path: Path) -> None:
    """A socket without a server, and one behind which is something else."""
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    pilot = start_pilot(start, f"--docker={path}")
    assert f"no Docker answers at {path}: " in pilot.log
    assert f"a workload runs: {cp_server.STAND_IN}" in pilot.log
    assert pilot.stop(signal.SIGINT) == 0
    path.unlink()

    class Other(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with serving(Other, path):
        pilot = start_pilot(start, f"--docker={path}")
        assert "Docker's /containers/json got 404: " in pilot.log
        assert pilot.stop(signal.SIGINT) == 0
