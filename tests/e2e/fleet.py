"""What the tests of a whole fleet share: an operator's control plane, a provider's home machine.

The control plane was made by setup_cp.py, with a release of these sources. The document's commands
stand here as it prints them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.e2e import disk, home, vm
from tests.e2e.image import Image, ensure_cached, hash_files
from tests.e2e.scripts import said
from tests.e2e.vm import UNUSED_MAX_AGE_S, Snapshot, Vm
from tests.e2e.vps import HOSTNAME
from tests.harness import ROOT, WALLET, wait_for

CP_LAN, HOME_LAN = "192.0.2.1", "192.0.2.2"
AGENT = "openinfra-agent"
IDENTITY = "/var/lib/openinfra/identity.json"
ENV_FILE = "/etc/openinfra/agent.env"
# As section 1, 4 and 5 of the document have them.
MINT = r"""
curl -sS -X POST https://cp.coledex.com/api/v1/admin/host-invites \
  -H "Authorization: Bearer $ADMIN_JWT" \
  -H "Content-Type: application/json" \
  -d '{"ttl_hours": 24, "note": "provider@home — Kuma"}' \
  | jq -r '.token'
"""
ADD_PEER = r"""
sudo wg set wg0 \
  peer <provider-wg-pubkey> \
  allowed-ips 10.77.0.42/32
# persist across reboots
sudo wg-quick save wg0
"""
HOSTS = r"""
curl -sS https://cp.coledex.com/api/v1/admin/hosts?limit=100 \
  -H "Authorization: Bearer $ADMIN_JWT" | jq '.hosts[] | select(.hostname=="home")'
"""


def trust(vm: Vm, ca: bytes) -> None:
    """Let a machine take an authority's certificates as those of a public one.

    As update-ca-certificates(8) does it, without its minute for the authorities that are there.
    """
    vm.put(ca, "/etc/ssl/certs/openinfra.pem")
    vm.sh(
        "cd /etc/ssl/certs; cat openinfra.pem >> ca-certificates.crt; "
        "ln -s openinfra.pem $(openssl x509 -noout -hash -in openinfra.pem).0"
    )


def find_server(vm: Vm, address: str = CP_LAN) -> None:
    """The DNS: where the control plane is."""
    vm.sh(f"sed -i '/ {HOSTNAME}$/d' /etc/hosts; echo {address} {HOSTNAME} >> /etc/hosts")


class Operator:
    """The operator at the control plane."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.ca = vm.get("/etc/openinfra/ca.crt")
        self.jwt = vm.sh("openinfra-cp token").strip()
        find_server(vm, "127.0.0.1")

    def say(self, script: str) -> str:
        """Lines of the document, with the token and the authority that setup_cp.py made."""
        before = f"export CURL_CA_BUNDLE=/etc/openinfra/ca.crt ADMIN_JWT={self.jwt}\n"
        return self.vm.sh(before + script)

    def mint(self, **more: object) -> str:
        """An invite, as the document mints it, or with more in its body."""
        command = MINT
        if more:
            head, _, tail = MINT.partition("}'")
            command = f"{head}, {json.dumps(more)[1:-1]}}}'{tail}"
        token = self.say(command).strip()
        assert re.fullmatch(r"oi1_[a-z2-7]{16}_[\w-]{43}_[0-9a-f]{8}", token), token
        return token

    def host(self) -> dict[str, object]:
        """The row of the home machine; empty before it is there."""
        found = self.say(HOSTS)
        row = json.loads(found) if found.strip() else {}
        assert isinstance(row, dict)
        return row

    def wait_host(self, what: str, value: object, timeout_s: float = 90) -> dict[str, object]:
        """The row, once one of its fields is so."""

        def look() -> dict[str, object] | None:
            row = self.host()
            return row if row.get(what) == value else None

        return wait_for(f"{what} is {value}", look, timeout_s)

    def heartbeats(self) -> object:
        """When the last heartbeat of the home machine was accepted."""
        return self.host()["last_heartbeat_at"]

    def wait_heartbeat(self, timeout_s: float = 90) -> None:
        """Wait for a heartbeat that is yet to come."""
        before = self.heartbeats()
        wait_for("a heartbeat", lambda: self.heartbeats() != before, timeout_s)

    def add_peer(self, key: str) -> None:
        """Section 4."""
        self.vm.sh(ADD_PEER.replace("<provider-wg-pubkey>", key))

    def peers(self) -> list[str]:
        """The keys of the peers of the hub."""
        return self.vm.sh("sudo wg show wg0 peers").split()

    def check(self) -> None:
        """What must hold after every fault."""
        assert "invariants hold" in self.vm.sh("openinfra-cp doctor --invariants")


def ensure_home(image: Image, booted: Snapshot) -> Snapshot:
    """A machine right after section 2 of the document; kept for a day for these very scripts."""
    scripts = [ROOT / "setup_luks2.py", ROOT / "install_agent.py", Path(__file__)]
    scripts += [Path(module.__file__ or "") for module in (disk, home, vm)]
    key = hash_files(image.directory, scripts)

    def make(directory: Path) -> None:
        home.make_home(image, booted, directory)

    directory = ensure_cached("home", key, UNUSED_MAX_AGE_S, make)
    return Snapshot.load(directory / "kept")


def install(vm: Vm, operator: Operator, token: str, wallet: str = WALLET) -> str:
    """Section 3 without a terminal; gives back the public key that it prints."""
    home.give_token(vm, token)
    cp_key = operator.vm.sh("wg show wg0 public-key").strip()
    answers = home.list_answers(wallet, cp_key)
    done = home.install(vm, *answers, f"--token-file={home.TOKEN_FILE}")
    assert done.code == 0, said(done)
    key = vm.sh("cat /etc/wireguard/openinfra.pub").strip()
    assert key in done.text
    vm.sh(f"rm {home.TOKEN_FILE}")
    return key


def join_fleet(vm: Vm, operator: Operator, wallet: str = WALLET, **invite: object) -> str:
    """Sections 1, 3 and 4; gives back the host's id once it is online."""
    operator.add_peer(install(vm, operator, operator.mint(**invite), wallet))
    return str(operator.wait_host("status", "online")["host_id"])


def read_run(vm: Vm) -> str:
    """Which run of the agent this is."""
    return vm.sh(f"systemctl show --value --property=InvocationID {AGENT}").strip()


def read_log(vm: Vm) -> list[str]:
    """What the agent said since it was started last."""
    found = vm.sh(f"journalctl --no-pager --output=cat _SYSTEMD_INVOCATION_ID={read_run(vm)}")
    return [line for line in found.splitlines() if re.match("[A-Z]+ ", line)]


def read_time(vm: Vm, text: str) -> float:
    """When the agent said this last, in seconds of the clock that all test machines share."""
    unit = f"-u {AGENT} --no-pager --output=short-unix"
    return float(vm.sh(f"journalctl {unit} | grep -F '{text}' | tail -n 1").split()[0])


def wait_log(vm: Vm, text: str, timeout_s: float = 60) -> str:
    """The first line of the agent, since it was started last, that has this in it."""

    def look() -> str | None:
        return next((line for line in read_log(vm) if text in line), None)

    return wait_for(f"{text!r} in the log", look, timeout_s)


def doctor(vm: Vm) -> list[dict[str, str]]:
    """The findings of the host, each a sentence and a command."""
    done = vm.exec(["openinfra-agent", "doctor", "--json"])
    found = json.loads(done.stdout)["findings"]
    assert isinstance(found, list)
    return found
