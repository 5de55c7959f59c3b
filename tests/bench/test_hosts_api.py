"""A page of hosts over HTTP when the fleet has 65,000."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.parse
from pathlib import Path
from typing import Any

from tests.bench.conftest import Record
from tests.bench.fleet import fill, postgres_that_syncs
from tests.bench.load import percentile
from tests.harness import ControlPlane, serving

HOSTS = 65_000
LIMIT = 100
REQUESTS = 400  # for each filter
WALLET = "Bench1" + "x" * 38  # of every fifth host, see fleet.py
FILTERS: dict[str, dict[str, str]] = {
    "no filter": {},
    "status": {"status": "online"},
    "status that few have": {"status": "quarantined"},
    "namespace": {"namespace": f"solana:{WALLET}"},
    "hostname": {"hostname": "host-170"},
    "hostname that nobody has": {"hostname": "nobody"},
    "status and namespace": {"status": "pending", "namespace": f"solana:{WALLET}"},
    "all three": {"status": "paused", "namespace": f"solana:{WALLET}", "hostname": "host-7"},
}


def get(cp: ControlPlane, query: dict[str, Any]) -> tuple[float, Any]:
    """Seconds that a request took, with its connection, and the answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", cp.http_port, timeout=10)
    path = f"/api/v1/admin/hosts?{urllib.parse.urlencode(query)}"
    connection.request("GET", path, headers={"Authorization": f"Bearer {cp.token}"})
    response = connection.getresponse()
    body = response.read()
    took = time.monotonic() - began
    connection.close()
    assert response.status == 200, body
    return took, json.loads(body)


def test_hosts_api(tmp_path: Path, record: Record) -> None:
    """At random cursors, each filter."""
    chance = random.Random(1)
    with postgres_that_syncs() as postgres, serving(postgres, tmp_path / "cp") as cp:
        fill(cp, HOSTS, 30, spread=True)
        for name, values in FILTERS.items():
            took = []
            for _ in range(REQUESTS):
                cursor = chance.randrange(HOSTS)
                seconds, answer = get(cp, {"limit": LIMIT, "cursor": cursor, **values})
                took.append(seconds)
                for host in answer["hosts"]:
                    assert all(host[key] == value for key, value in values.items())
                assert len(answer["hosts"]) <= LIMIT
            print(f"\n{name}: median {percentile(sorted(took), 0.5) * 1e3:.1f} ms", end="")
            p99 = percentile(sorted(took), 0.99) * 1e3
            what = f"a page of {LIMIT} of {HOSTS:,} hosts, {name}: 99 of 100 requests within"
            record(what, p99, "ms", 20)
