"""Runs in a test machine as root: takes requests from the host over a virtio-serial port.

A request and an answer are one line of JSON each; bytes travel in base64. It starts as early as
systemd starts anything, so a boot that waits for a passphrase can be looked at, and says hello
with the boot id. Requests run beside each other. Nothing but Python's own library is used.

    {"id": 1, "argv": [...], "stdin": BASE64, "timeout_s": 60}   run a command
    {"id": 2, "hostname": ..., "machine_id": ..., "seed": BASE64, "time": 1.5}
                                                                 become another machine
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

PORT = "openinfra.exec"
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "USER": "root",
}
# ioctls of /dev/urandom: add entropy, and make new numbers from it at once.
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207

write_lock = threading.Lock()


def find_port() -> str:
    """Wait for the port, give back its device; udev's link to it may not be there yet."""
    while True:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return f"/dev/{name.parent.name}"
        time.sleep(0.1)


def make_memory_file(name: str, content: bytes = b"") -> int:
    """Make a file in RAM: a full or a read-only disk does not matter."""
    fd = os.memfd_create(name)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_memory_file(fd: int) -> str:
    """Give back all of it in base64."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return base64.b64encode(file.read()).decode()


def run_command(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command until it ends by itself or its whole process group is killed at the limit.

    What it leaves in the background goes on, and nobody waits for it: its output is no pipe.
    """
    files = [make_memory_file("stdin", base64.b64decode(request["stdin"]))]
    files += [make_memory_file("stdout"), make_memory_file("stderr")]
    timed_out = False
    try:
        child = subprocess.Popen(
            request["argv"],
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            cwd="/root",
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            code = child.wait(request["timeout_s"])
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
        output = {"stdout": read_memory_file(files[1]), "stderr": read_memory_file(files[2])}
    finally:
        for fd in files:
            os.close(fd)
    return {"code": code, "timed_out": timed_out, **output}


def become(request: dict[str, Any]) -> dict[str, Any]:
    """Take a name, an id, random numbers and a clock, which all restored machines share else."""
    seed = base64.b64decode(request["seed"])
    with open("/dev/urandom", "wb") as random:
        entropy = struct.pack("ii", len(seed) * 8, len(seed)) + seed
        fcntl.ioctl(random, RNDADDENTROPY, entropy)
        fcntl.ioctl(random, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, request["time"])
    hostname = request["hostname"]
    Path("/proc/sys/kernel/hostname").write_text(hostname)
    Path("/etc/hostname").write_text(f"{hostname}\n")
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n")
    if "machine_id" in request:
        path = Path("/etc/machine-id")
        journal = Path("/run/log/journal")
        # The journal's directory is called by the id; journalctl looks only there.
        (journal / path.read_text().strip()).rename(journal / request["machine_id"])
        path.write_text(request["machine_id"] + "\n")
        subprocess.run(["systemctl", "restart", "systemd-journald"], check=True)
    os.sync()
    return {}


def answer(request: dict[str, Any], fd: int) -> None:
    """Do what one request asks, and send the answer."""
    try:
        done = run_command(request) if "argv" in request else become(request)
    except Exception as error:  # the test shows it
        done = {"error": f"{type(error).__name__}: {error}"}
    send(fd, {"id": request["id"], **done})


def send(fd: int, message: dict[str, Any]) -> None:
    """Write one line; the empty one before it ends what a message cut by a reboot left."""
    data = b"\n" + json.dumps(message).encode() + b"\n"
    with write_lock:
        while data:
            data = data[os.write(fd, data) :]


def main() -> None:
    """Say hello, then answer for ever."""
    fd = os.open(find_port(), os.O_RDWR)
    send(fd, {"hello": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
    with open(fd, "rb", closefd=False) as lines:
        while True:
            line = lines.readline()
            if not line:  # nobody holds the other end
                time.sleep(0.1)
                continue
            with contextlib.suppress(ValueError):  # a line cut by a reboot
                request = json.loads(line)
                threading.Thread(target=answer, args=(request, fd), daemon=True).start()


if __name__ == "__main__":
    main()
