"""The rules of the CIS Docker Benchmark 1.6.0, section 5, that apply to a container of ours.

Each looks at what `docker inspect` says of one. Not in it: what is about the daemon's command line
(5.23, 5.24: `docker exec`; nobody runs one), what is the customer's (5.7: no sshd inside), and 5.3
where the kernel has no SELinux. 5.27 is not met as it is written: an image's health check would be
one more thing that runs as the image says, so that none is on; that a process ended is seen by the
agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Inspected = Mapping[str, Any]
LABEL = "openinfra.assignment"
# A directory of the host with one for each workload's own secrets, which it may read.
SECRETS = Path("/run/openinfra/secrets")


def host(seen: Inspected) -> Mapping[str, Any]:
    """Its HostConfig."""
    found: Mapping[str, Any] = seen["HostConfig"]
    return found


def bindings(seen: Inspected) -> list[Mapping[str, str]]:
    """Every port of the host that it has."""
    return [one for each in (host(seen)["PortBindings"] or {}).values() for one in each]


RULES: dict[str, Callable[[Inspected], bool]] = {
    "5.2 AppArmor is not switched off": lambda c: (
        c["AppArmorProfile"] in ("", "docker-default")
        and "apparmor=unconfined" not in host(c)["SecurityOpt"]
    ),
    "5.4 capabilities are restricted": lambda c: (
        host(c)["CapDrop"] == ["ALL"] and not host(c)["CapAdd"]
    ),
    "5.5 it is not privileged": lambda c: host(c)["Privileged"] is False,
    "5.8 no privileged port of the host": lambda c: all(
        int(each["HostPort"]) >= 1024 for each in bindings(c)
    ),
    "5.9 only the ports that are asked for": lambda c: (
        host(c)["PublishAllPorts"] is False
        and set(c["Config"].get("ExposedPorts") or {}) >= set(host(c)["PortBindings"] or {})
    ),
    "5.10 a network of its own": lambda c: host(c)["NetworkMode"][:3] in ("oi-", "ox-"),
    "5.11 memory is limited": lambda c: (
        0 < host(c)["Memory"] == host(c)["MemorySwap"] and not host(c)["OomKillDisable"]
    ),
    "5.12 the processor is limited": lambda c: host(c)["NanoCpus"] > 0,
    "5.13 the root is read-only": lambda c: host(c)["ReadonlyRootfs"] is True,
    "5.14 ports are on one address": lambda c: all(
        each["HostIp"] not in ("", "0.0.0.0", "::") for each in bindings(c)
    ),
    "5.15 docker restarts it not at all": lambda c: host(c)["RestartPolicy"]["Name"] in ("", "no"),
    "5.16 its own processes only": lambda c: host(c)["PidMode"] == "",
    "5.17 its own shared memory only": lambda c: host(c)["IpcMode"] == "private",
    "5.18 no device of the host": lambda c: (
        not host(c)["Devices"]
        and not host(c)["DeviceRequests"]
        and not host(c)["DeviceCgroupRules"]
    ),
    "5.19 ulimits are set": lambda c: (
        {each["Name"] for each in host(c)["Ulimits"]} == ({"core", "nofile"})
    ),
    "5.20 no mount is shared": lambda c: all(
        each["Propagation"] in ("", "rprivate", "private") for each in c["Mounts"]
    ),
    "5.21 its own host name": lambda c: host(c)["UTSMode"] == "",
    "5.22 the default seccomp filter": lambda c: (
        not any(each.startswith("seccomp") for each in host(c)["SecurityOpt"])
    ),
    "5.25 its control group is the engine's to choose": lambda c: host(c)["CgroupParent"] == "",
    "5.26 no new privileges": lambda c: "no-new-privileges" in host(c)["SecurityOpt"],
    "5.28 an image by its digest": lambda c: "@sha256:" in c["Config"]["Image"],
    "5.29 processes are limited": lambda c: 0 < (host(c)["PidsLimit"] or 0) <= 128,
    "5.30 not on the default bridge": lambda c: (
        not {"bridge", "default", "host"}
        & {host(c)["NetworkMode"], *c["NetworkSettings"]["Networks"]}
    ),
    "5.31 the engine's user namespace": lambda c: host(c)["UsernsMode"] == "",
    "5.32 no engine's socket": lambda c: (
        not any(each["Source"].endswith(".sock") for each in c["Mounts"])
    ),
    "no health check of the image": lambda c: (
        c["Config"]["Healthcheck"]["Test"] == ["NONE"] and "Health" not in c["State"]
    ),
    "nobody, in a control group of its own": lambda c: (
        c["Config"]["User"] == "65534:65534" and host(c)["CgroupnsMode"] == "private"
    ),
}


def list_broken(seen: Inspected, secrets: Path = SECRETS) -> list[str]:
    """The rules that a container breaks, on a host that keeps secrets in that directory."""
    broken = [name for name, is_met in RULES.items() if not is_met(seen)]
    own = ("bind", str(secrets / seen["Config"]["Labels"].get(LABEL, "none")), False)
    if any((each["Type"], each["Source"], each["RW"]) != own for each in seen["Mounts"]):
        broken.append("5.6 nothing of the host is mounted but its own secrets, to be read")
    return broken
