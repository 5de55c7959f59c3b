"""The alert rules for Prometheus, by its own `promtool`: each fires for its fault, else none."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import psycopg
import pytest

import cp_server
from tests.harness import WALLET, Client, ControlPlane, facts, wait_for

RULES = cp_server.REQUIREMENTS.with_name("prometheus-alerts.yml")
MINUTES = 60
# A fleet of 1,000 hosts that is well; values as promtool writes them, one a minute.
WELL: dict[str, str | None] = {
    'up{job="openinfra-cp"}': "1x60",
    "openinfra_database_up": "1x60",
    'openinfra_rpcs_total{result="ok"}': "0+2000x60",
    'openinfra_http_requests_total{status="200"}': "0+10x60",
    "openinfra_start_time_seconds": "0x60",
    "openinfra_swept_time_seconds": "0+60x60",
    "openinfra_placed_time_seconds": "0+60x60",
    "openinfra_workloads": "1000x60",
    "openinfra_unplaced_workloads": "6x60",
    "openinfra_billed_time_seconds": "0+60x60",
    "openinfra_unbilled_copies": "0x60",
    'openinfra_heartbeats_total{result="accepted"}': "0+2000x60",
    'openinfra_heartbeats_total{result="try_later"}': "0+20x60",
    "openinfra_heartbeat_commit_seconds_total": "0+30x60",
    "openinfra_heartbeat_batches_total": "0+300x60",
    "openinfra_hosts_marked_offline_total": "0+0.4x60",
    'openinfra_hosts{status="online"}': "1000x60",
    'openinfra_hosts{status="quarantined"}': "0x60",
    "openinfra_peers_checked_time_seconds": "0+60x60",
    'openinfra_peers{state="conflict"}': "0x60",
    "openinfra_oldest_snapshot_transactions": "500x60",
    'openinfra_table_dead_rows{table="liveness"}': "900x60",
    "openinfra_resident_memory_bytes": "200000000x60",
}
# Alert -> the series that go wrong from the 20th minute on; `None`: no such series any more.
FAULTS: dict[str, dict[str, str | None]] = {
    "OpenInfraDown": {'up{job="openinfra-cp"}': "1x20 0x40"},
    "OpenInfraDatabaseDown": {"openinfra_database_up": "1x20 0x40"},
    "OpenInfraBug": {'openinfra_rpcs_total{result="internal"}': "0x20 1x40"},
    "OpenInfraSweepStands": {"openinfra_swept_time_seconds": "0+60x20 1200x40"},
    "OpenInfraPlacementStands": {"openinfra_placed_time_seconds": "0+60x20 1200x40"},
    "OpenInfraWorkloadsWait": {"openinfra_unplaced_workloads": "6x20 60x40"},
    "OpenInfraBillingStands": {"openinfra_billed_time_seconds": "0+60x20 1200x40"},
    "OpenInfraCopiesNotBilled": {"openinfra_unbilled_copies": "0x20 1x40"},
    "OpenInfraHeartbeatsRefused": {
        'openinfra_heartbeats_total{result="try_later"}': "0+20x20 400+200x40"
    },
    "OpenInfraCommitsSlow": {"openinfra_heartbeat_commit_seconds_total": "0+30x20 600+200x40"},
    "OpenInfraHostsFellSilent": {"openinfra_hosts_marked_offline_total": "0+0.4x20 8+40x40"},
    "OpenInfraHostQuarantined": {'openinfra_hosts{status="quarantined"}': "0x20 1x40"},
    "OpenInfraHubNotKept": {"openinfra_peers_checked_time_seconds": "0+60x20 1200x40"},
    "OpenInfraPeerConflict": {'openinfra_peers{state="conflict"}': "0x20 1x40"},
    "OpenInfraOldSnapshot": {"openinfra_oldest_snapshot_transactions": "500x20 0+10000x40"},
    "OpenInfraTableBloat": {'openinfra_table_dead_rows{table="liveness"}': "900x20 200000x40"},
    "OpenInfraMemory": {"openinfra_resident_memory_bytes": "200000000x20 3000000000x40"},
}
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())


def promtool(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    return subprocess.run(
        ["promtool", *words], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def fires(alert: str, series: dict[str, str | None], directory: Path) -> bool:
    """True when exactly this alert fires for these series, false when none does."""
    names = sorted(series)
    shown = [{"series": name, "values": series[name]} for name in names if series[name]]

    def expect(expression: str, value: int | None) -> dict[str, object]:
        samples = [] if value is None else [{"labels": "{}", "value": value}]
        return {"expr": expression, "eval_time": f"{MINUTES - 1}m", "exp_samples": samples}

    every = 'count(max_over_time(ALERTS{alertstate="firing"}[55m]))'
    this = f'count(max_over_time(ALERTS{{alertname="{alert}", alertstate="firing"}}[55m]))'
    answers = []
    for wanted in (None, 1):
        test = {
            "interval": "1m",
            "input_series": shown,
            "promql_expr_test": [expect(every, wanted), expect(this, wanted)],
        }
        file = directory / "test.yml"
        file.write_text(
            json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]})
        )
        answers.append(promtool("test", "rules", str(file)))
    none, one = answers
    assert {none.returncode, one.returncode} == {0, 1}, none.stderr + one.stderr
    return one.returncode == 0


def test_the_rules_are_well_formed() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
    assert sorted(ALERTS) == sorted(FAULTS)
    text = RULES.read_text()
    assert text.count("summary:") == text.count("todo:") == len(ALERTS)


def test_the_rules_know_every_metric_that_they_name() -> None:
    known = {name for name, _, _ in cp_server.METRICS}
    named = set(re.findall(r"openinfra_\w+", RULES.read_text()))
    assert named <= known
    assert named == {name.partition("{")[0] for name in WELL} - {"up"}


def test_nothing_fires_for_a_fleet_that_is_well(tmp_path: Path) -> None:
    assert not fires("OpenInfraDown", dict(WELL), tmp_path)


@pytest.mark.parametrize("alert", FAULTS)
def test_each_alert_fires_for_its_fault(alert: str, tmp_path: Path) -> None:
    assert fires(alert, WELL | FAULTS[alert], tmp_path)


@pytest.mark.parametrize(
    ("alert", "name"),
    [
        ("OpenInfraSweepStands", "openinfra_swept_time_seconds"),
        ("OpenInfraPlacementStands", "openinfra_placed_time_seconds"),
        ("OpenInfraBillingStands", "openinfra_billed_time_seconds"),
    ],
)
def test_what_never_began_is_seen_as_well(alert: str, name: str, tmp_path: Path) -> None:
    assert fires(alert, WELL | {name: None}, tmp_path)


def test_a_held_snapshot_and_dead_rows_are_seen(cp: ControlPlane) -> None:
    """What keeps vacuum from its work, and the work that is left."""

    def read(name: str) -> float:
        text = cp.call("GET", "/metrics")[1]
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert match, text
        return float(match[1])

    with Client(cp) as client, psycopg.connect(cp.postgres.dsn(cp.database)) as holder:
        client.register(cp.mint(payout_pubkey=WALLET))
        client.heartbeat()
        before = read("openinfra_oldest_snapshot_transactions")
        assert before < 100
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1")
        for _ in range(150):
            cp.postgres.execute(cp.database, "UPDATE liveness SET seq = seq + 1")
        assert read("openinfra_oldest_snapshot_transactions") >= 150
        dead = 'openinfra_table_dead_rows{table="liveness"}'
        wait_for("dead rows", lambda: read(dead) >= 100)
        assert read('openinfra_table_bytes{table="liveness"}') > 8_000
        holder.rollback()
        assert read("openinfra_oldest_snapshot_transactions") < 100


def test_the_metrics_of_a_control_plane_pass_promtool(cp: ControlPlane) -> None:
    with Client(cp) as client:
        client.register(cp.mint(payout_pubkey=WALLET))
        client.heartbeat(facts=facts())
        status, text = cp.call("GET", "/metrics")
    assert status == 200, text
    done = promtool("check", "metrics", stdin=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shown = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    late = {"openinfra_swept_time_seconds", "openinfra_sessions_pruned_total"}  # after a sweep
    late |= {"openinfra_hosts_marked_offline_total", "openinfra_rpcs_held_total"}
    late |= {"openinfra_peers", "openinfra_peers_checked_time_seconds"}  # with a hub
    assert {name for name, _, _ in cp_server.METRICS} - shown <= late
