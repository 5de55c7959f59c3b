#!/usr/bin/python3 -I
"""openinfra_wg.py - reads and sets the peers of the hub for the control plane, which may not.

It listens on a unix socket (from openinfra-wg.socket), takes one line of JSON from each connection,
runs `wg`, and answers one line: {"ok": true, ...} or {"ok": false, "error": "one sentence"}.
  {"verb": "dump"}                              every peer: key, allowed_ips, endpoint, handshake
  {"verb": "set", "key": K, "ip": "10.77.0.42"} K may use exactly this address
  {"verb": "remove", "key": K}                  K is no peer any more
  {"verb": "apply", "changes": [...]}           many sets and removes in their order; what cannot
                                                be done is listed in "refused", the rest is done
`wg set` silently moves an address away from another peer. So `set` is refused when another key has
the address, unless it says "replaces": <that key>, and afterwards every change is read back.
Keys stay as they are known to wg: it gives out no private and no preshared key.

What it does to this machine: `wg set`, nothing else; it writes no file.
Runs: wg
Needs: root with CAP_NET_ADMIN, wireguard-tools, Python 3.10.
Exit codes: 1 error; 2 usage; it runs until SIGTERM.

Examples
  systemctl start openinfra-wg.socket
  openinfra_wg.py --socket /tmp/wg.sock --interface wg-test
"""

from __future__ import annotations

import argparse
import base64
import ipaddress
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINE_MAX_BYTES = 262_144
CHANGES_MAX = 1_000  # of one `apply`: 200 KB of JSON, 90 KB of arguments
READ_S = 2.0  # for the whole line: who says nothing holds up the next one this long
WRITE_S = 10.0  # for the whole answer: 10 MB at 65,000 peers
WG_S = 20.0
TUNNEL = ipaddress.IPv4Network("10.77.0.0/16")
HUB = ipaddress.IPv4Address("10.77.0.1")


# ---------------------------------------------------------------------------------------------
# Copied helpers: the same text in every script; a test compares them. Not pure.
# ---------------------------------------------------------------------------------------------


class Error(Exception):
    """What failed and why, what to do about it, and the exit code that `main` gives back."""

    def __init__(self, what: str, todo: str, exit_code: int = 1, **pairs: object) -> None:
        super().__init__(f"{what}; {todo}")
        self.what = what
        self.todo = todo
        self.exit_code = exit_code
        self.pairs = pairs


def run(argv: Sequence[str], stdin: bytes = b"", timeout_s: float = 30, echo: bool = True) -> str:
    """Run one command without a shell, give back its stdout; raise Error when it fails."""
    if echo:
        print("+ " + shlex.join(argv), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Error(f"{argv[0]} is not installed", "install it and run this again") from None
    except OSError as error:
        raise Error(f"{argv[0]} does not start: {error.strerror}", "mend that") from None
    except subprocess.TimeoutExpired:
        raise Error(f"{argv[0]} gave no answer for {timeout_s:g} s", "run it by hand") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().replace("\n", " / ")
        what = f"{shlex.join(argv)} ended with {done.returncode}: {said}"
        raise Error(what, "mend that and run this again")
    return done.stdout.decode(errors="replace")


# ---------------------------------------------------------------------------------------------
# Rules: what a caller may ask for, and what becomes of it. Pure; ValueError says what is wrong.
# ---------------------------------------------------------------------------------------------


def check_key(key: Any) -> str:
    """A WireGuard public key in its one spelling."""
    try:
        raw = base64.b64decode(key, validate=True) if isinstance(key, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != 32 or base64.b64encode(raw).decode() != key or not any(raw):
        raise ValueError("a key is not base64 of 32 bytes")
    return str(key)


def check_ip(ip: Any) -> str:
    """The address of a host, 10.77.0.2 to 10.77.255.254."""
    try:
        address = ipaddress.IPv4Address(ip if isinstance(ip, str) else "")
    except ValueError:
        address = HUB
    if address not in TUNNEL or address in (HUB, TUNNEL[0], TUNNEL[-1]):
        raise ValueError("an address is not from 10.77.0.2 to 10.77.255.254")
    return str(address)


def parse_change(change: Any) -> dict[str, str]:
    """One checked `set` or `remove`."""
    names = set(change) if isinstance(change, dict) else set()
    is_set = names - {"replaces"} == {"verb", "key", "ip"} and change["verb"] == "set"
    if not is_set and not (names == {"verb", "key"} and change["verb"] == "remove"):
        raise ValueError("a change is neither verb set with key and ip nor verb remove with key")
    found = {"verb": change["verb"], "key": check_key(change["key"])}
    if is_set:
        found["ip"] = check_ip(change["ip"])
        found["replaces"] = check_key(change["replaces"]) if change.get("replaces") else ""
    return found


def parse_request(line: bytes) -> tuple[list[dict[str, str]], list[dict[str, str]]] | None:
    """The checked changes that a line asks for, and what is refused; or None for a dump."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("the line is no JSON") from None
    if request == {"verb": "dump"}:
        return None
    if isinstance(request, dict) and request.get("verb") == "apply":
        changes = request.get("changes")
        if set(request) != {"verb", "changes"} or not isinstance(changes, list):
            raise ValueError("apply takes a list of changes")
        if len(changes) > CHANGES_MAX:
            raise ValueError(f"apply takes at most {CHANGES_MAX} changes")
        good, refused = [], []
        for change in changes:  # what one caller wrote must not hold up the others
            try:
                good.append(parse_change(change))
            except ValueError as error:  # noqa: PERF203 - each has its own fault
                key = change.get("key") if isinstance(change, dict) else None
                refused.append({"key": str(key)[:64], "error": str(error)})
        return good, refused
    return [parse_change(request)], []


def plan_changes(
    changes: Sequence[dict[str, str]], allowed: dict[str, list[str]]
) -> tuple[list[str], set[str], list[dict[str, str]]]:
    """Arguments for `wg set`, the peers that they touch, and what is refused.

    `allowed` is what each peer has now; it becomes what each must have afterwards.
    """
    holder = {ip: key for key, ips in allowed.items() for ip in ips}
    argv: list[str] = []
    touched: set[str] = set()
    refused = []
    for change in changes:
        key, net = change["key"], change.get("ip", "") + "/32"
        other = holder.get(net, key)
        if other not in (key, change.get("replaces")):
            refused.append({"key": key, "error": f"{change['ip']} belongs to peer {other}"})
            continue
        touched |= {key, other}
        if other != key:
            allowed[other].remove(net)
        for ip in allowed.pop(key, []):
            del holder[ip]
        if change["verb"] == "remove":
            argv += ["peer", key, "remove"]
        else:
            argv += ["peer", key, "allowed-ips", net]
            allowed[key], holder[net] = [net], key
    return argv, touched, refused


def parse_allowed(text: str) -> dict[str, list[str]]:
    """Peer -> its networks, from `wg show <interface> allowed-ips`."""
    rows = (line.split("\t") for line in text.splitlines())
    return {key: [ip for ip in ips.split() if ip != "(none)"] for key, ips in rows}


def parse_dump(text: str) -> list[dict[str, Any]]:
    """The peers of `wg show <interface> dump`; its first line holds the private key: left out."""
    found = []
    for line in text.splitlines()[1:]:
        key, _psk, endpoint, ips, handshake, _rx, _tx, _keepalive = line.split("\t")
        found.append(
            {
                "key": key,
                "allowed_ips": [] if ips == "(none)" else ips.split(","),
                "endpoint": None if endpoint == "(none)" else endpoint,
                "latest_handshake_at": int(handshake),
            }
        )
    return found


# ---------------------------------------------------------------------------------------------
# Doors: wg, and the socket. The only place that changes the machine.
# ---------------------------------------------------------------------------------------------


def read_allowed(interface: str) -> dict[str, list[str]]:
    return parse_allowed(run(["wg", "show", interface, "allowed-ips"], timeout_s=WG_S, echo=False))


def apply_changes(interface: str, changes: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Change peers and read them back; gives back what was not done; raises Error."""
    only_removes = all(change["verb"] == "remove" for change in changes)
    wanted = {} if only_removes else read_allowed(interface)  # 0.5 s at 65,000 peers
    argv, touched, refused = plan_changes(changes, wanted)
    if argv:
        run(["wg", "set", interface, *argv], timeout_s=WG_S, echo=False)
        found = read_allowed(interface)
        for key in sorted(touched):
            if found.get(key) != wanted.get(key):
                refused.append({"key": key, "error": f"wg has something else for peer {key}"})
    print(f"INFO peers set={len(touched)} refused={len(refused)}", file=sys.stderr, flush=True)
    return refused


def answer(interface: str, line: bytes) -> dict[str, Any]:
    """The answer to one line, whatever it is."""
    try:
        changes = parse_request(line)
        if changes is None:
            dump = run(["wg", "show", interface, "dump"], timeout_s=WG_S, echo=False)
            return {"ok": True, "peers": parse_dump(dump)}
        refused = changes[1] + apply_changes(interface, changes[0])
        if json.loads(line)["verb"] == "apply":
            return {"ok": True, "refused": refused}
        return {"ok": False, "error": refused[0]["error"]} if refused else {"ok": True}
    except ValueError as error:
        return {"ok": False, "error": str(error)}
    except Error as error:
        return {"ok": False, "error": error.what[-300:]}  # the command may be long


def handle(sock: socket.socket, interface: str) -> None:
    """One line in, one line out; a caller that is slow or gone is left alone."""
    deadline = time.monotonic() + READ_S
    line = bytearray()
    try:
        while not line.endswith(b"\n") and len(line) <= LINE_MAX_BYTES:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            part = sock.recv(65_536)
            if not part:
                return
            line += part
        is_long = len(line) > LINE_MAX_BYTES
        error = f"the line is longer than {LINE_MAX_BYTES} bytes"
        said = {"ok": False, "error": error} if is_long else answer(interface, bytes(line))
        sock.settimeout(WRITE_S)
        sock.sendall(json.dumps(said, separators=(",", ":")).encode() + b"\n")
    except OSError as error:
        print(f"WARN a caller went away: {error}", file=sys.stderr, flush=True)


def open_socket(path: str) -> socket.socket:
    """The listening socket: systemd's when there is one, else at a path; raises Error."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return socket.socket(fileno=3)
    if not path:
        raise Error("no socket was given", "start openinfra-wg.socket, or name --socket PATH", 2)
    Path(path).unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    os.umask(0o077)
    sock.bind(path)
    sock.listen(16)
    return sock


def main() -> int:
    """Answer one caller after the other until SIGTERM."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", default="", help="listen here (default: systemd's socket)")
    parser.add_argument("--interface", default="wg0", help="the hub (default: wg0)")
    args = parser.parse_args()
    try:
        listener = open_socket(args.socket)
    except (Error, OSError) as error:
        print(f"ERROR {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, Error) else 1
    while True:
        connection, _ = listener.accept()
        with connection:
            handle(connection, args.interface)


if __name__ == "__main__":
    sys.exit(main())
