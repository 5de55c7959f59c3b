"""The two `curl | jq` commands of the onboarding document, as printed, through a real Caddy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import WALLET, Client, ControlPlane, Process, facts, free_port, wait_for

MINT = """curl -sS -X POST https://cp.coledex.com/api/v1/admin/host-invites \\
  -H "Authorization: Bearer $ADMIN_JWT" \\
  -H "Content-Type: application/json" \\
  -d '{"ttl_hours": 24, "note": "provider@home — Kuma"}' \\
  | jq -r '.token'
"""
LIST = """curl -sS https://cp.coledex.com/api/v1/admin/hosts?limit=100 \\
  -H "Authorization: Bearer $ADMIN_JWT" | jq '.hosts[] | select(.hostname=="...")'
"""
CADDYFILE = """{
  admin off
  skip_install_trust
  auto_https disable_redirects
  storage file_system %(storage)s
}
https://cp.coledex.com:%(port)d {
  tls internal
  handle /api/* {
    reverse_proxy 127.0.0.1:%(http)d
  }
  respond 404
}
"""


class Operator:
    """A shell as an operator has it: curl finds cp.coledex.com at a Caddy on this machine."""

    def __init__(self, cp: ControlPlane, directory: Path) -> None:
        port, storage = free_port(), directory / "storage"
        names = {"storage": storage, "port": port, "http": cp.http_port}
        (directory / "Caddyfile").write_text(CADDYFILE % names)
        argv = ["caddy", "run", "--adapter=caddyfile", f"--config={directory / 'Caddyfile'}"]
        self.caddy = Process(argv, directory / "caddy.log", {"HOME": str(directory)})
        root = storage / "pki" / "authorities" / "local" / "root.crt"
        wait_for("Caddy's CA", lambda: root.exists() or None, 20)
        curlrc = f'connect-to = "cp.coledex.com:443:127.0.0.1:{port}"\ncacert = "{root}"\n'
        (directory / ".curlrc").write_text(curlrc)
        foreign = ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "https_proxy", "HTTPS_PROXY", "all_proxy")
        keep = {name: value for name, value in os.environ.items() if name not in foreign}
        self.environment = {**keep, "CURL_HOME": str(directory), "ADMIN_JWT": cp.token}
        self.environment["LC_ALL"] = "C.UTF-8"
        wait_for("Caddy", lambda: self.run("curl -sS https://cp.coledex.com/").returncode == 0, 20)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line in bash."""
        return subprocess.run(
            ["bash", "-c", command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )


@pytest.fixture
def operator(cp: ControlPlane, tmp_path: Path) -> Iterator[Operator]:
    made = Operator(cp, tmp_path)
    yield made
    assert made.caddy.stop() == 0


def test_the_documents_two_commands(cp: ControlPlane, operator: Operator) -> None:
    minted = operator.run(MINT)
    assert minted.returncode == 0, minted.stderr
    token = minted.stdout.removesuffix("\n")
    assert cp.query("SELECT note FROM invites") == [{"note": "provider@home — Kuma"}]
    with Client(cp) as client:
        host_id = client.register(token, facts=facts(hostname="kuma")).host_id
        client.heartbeat()
    listed = operator.run(LIST.replace('"..."', '"kuma"'))
    assert listed.returncode == 0, listed.stderr
    assert f'"host_id": "{host_id}"' in listed.stdout
    assert '"status": "online"' in listed.stdout
    assert operator.run(LIST).stdout == ""  # no host is called "..."


def test_nothing_but_the_api_is_reached(
    cp: ControlPlane, operator: Operator, make_cp: Callable[..., ControlPlane]
) -> None:
    for path, code in (("/metrics", 404), ("/healthz", 404), ("/readyz", 404), ("/api/v1/no", 404)):
        done = operator.run(
            f"curl -sS -o /dev/null -w '%{{http_code}}' https://cp.coledex.com{path}"
        )
        assert done.stdout == str(code), path
    refused = operator.run(MINT.replace("$ADMIN_JWT", "no"))
    assert refused.stdout == "null\n"
    assert cp.call("POST", "/api/v1/admin/host-invites", {"payout_pubkey": WALLET})[0] == 201
