"""What comes from elsewhere, by the machine: decoders by coverage, HTTP by its OpenAPI document.

Both are short here and take an hour under `tests/run --bench`; OPENINFRA_FUZZ_S says how long in
all, OPENINFRA_SEED repeats a run (each prints its own).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.engine import running_registry
from tests.fuzz_tool import TARGETS
from tests.harness import WALLET, Client, ControlPlane, free_port
from tests.hostile import fuzz, read_seconds, run_schemathesis

FUZZ_S = 10.0


def test_no_bytes_break_a_decoder(tmp_path: Path) -> None:
    """Two targets at a time; each has its share of the time."""
    share_s = 2 * read_seconds(FUZZ_S) / len(TARGETS)

    def work(name: str) -> tuple[str, int]:
        directory = tmp_path / name
        directory.mkdir()
        return name, fuzz(name, share_s, directory)

    with ThreadPoolExecutor(2) as workers:
        counts = dict(workers.map(work, TARGETS))
    assert min(counts.values()) > 100, counts  # how many more is this machine's affair


def test_the_http_api_is_what_its_document_says(
    make_cp: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running_registry(tmp_path, address):
        flags = ("--registry=cp.example.com", f"--registry-url=http://{address}")
        cp = make_cp("--heartbeat-s=1", *flags)
        for _ in range(3):
            with Client(cp) as client:
                client.register(cp.mint(payout_pubkey=WALLET))
                client.heartbeat()
        run_schemathesis(cp, tmp_path, "--max-examples=5")
    assert "ERROR" not in cp.log
    made = cp.query("SELECT count(*) AS n FROM workloads")[0]["n"]
    print(f"{made} workloads were made")
    assert made > 0  # else nothing came past the first refusal
    cp.check_invariants()
