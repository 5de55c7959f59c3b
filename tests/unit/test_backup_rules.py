"""The pure parts of backup and dist: wg0.conf put together, manifests, an artifact's bytes."""

from __future__ import annotations

import io
import zipfile

import pytest

import cp_server
from cp_server import merge_wg_conf

NEW = "[Interface]\nAddress = 10.77.0.1/16\nPrivateKey = new\nPostUp = nft -f x\n"
PEERS = "[Peer]\nPublicKey = a\nAllowedIPs = 10.77.0.2/32\n\n[Peer]\nPublicKey = b\n"
OLD = f"[Interface]\nListenPort = 7\nPrivateKey = old\n\n{PEERS}"
MERGED = f"{NEW.replace('= new', '= old')}\n{PEERS}"


@pytest.mark.parametrize(
    ("current", "saved", "merged"),
    [
        (NEW, OLD, MERGED),
        (MERGED, OLD, MERGED),  # a second time changes nothing
        (OLD, OLD, OLD),
        ("", OLD, OLD),
        ("# nothing\n", OLD, OLD),
        (f"{NEW}\n[Peer]\nPublicKey = c\n", OLD, MERGED),
        (NEW, "[Interface]\nPrivateKey = old\n", NEW.replace("= new", "= old")),
        (
            "[Interface]\nListenPort = 1\n",
            OLD,
            f"[Interface]\nPrivateKey = old\nListenPort = 1\n\n{PEERS}",
        ),
        ("[Interface]\nprivatekey=\\1new", OLD, f"[Interface]\nPrivateKey = old\n\n{PEERS}"),
    ],
)
def test_merge_wg_conf(current: str, saved: str, merged: str) -> None:
    assert merge_wg_conf(current, saved) == merged


GOOD = {"format": 1, "schema": 3, "role": "openinfra", "version": "0.1.0"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format": None}, "form"),
        ({"format": 2}, "form"),
        ({"schema": "3"}, "form"),
        ({"schema": cp_server.SCHEMA_VERSION + 1}, "schema version"),
        ({"role": "other"}, "role other"),
    ],
)
def test_check_manifest(changes: dict[str, object], word: str) -> None:
    cp_server.check_manifest(GOOD, "openinfra")
    with pytest.raises(cp_server.Error, match=word) as refused:
        cp_server.check_manifest({**GOOD, **changes}, "openinfra")
    assert refused.value.exit_code == 3


def test_an_artifact_is_the_same_bytes_in_any_order() -> None:
    sources = {"b.py": b"2", "__main__.py": b"1", "a/c.py": b"3" * 1000}
    one = cp_server.render_artifact(sources)
    assert one == cp_server.render_artifact(dict(reversed(sources.items())))
    assert one.startswith(b"#!/usr/bin/python3 -I\nPK")
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == sources
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    ("dsn", "found"),
    [
        ("host=/run/pg dbname=x user=y", {"PGHOST": "/run/pg", "PGDATABASE": "x", "PGUSER": "y"}),
        ("postgresql://u:p%40ss@h:7/d", {"PGUSER": "u", "PGPASSWORD": "p@ss", "PGPORT": "7"}),
        ("dbname=d sslmode=require", {"PGDATABASE": "d", "PGSSLMODE": "require"}),
    ],
)
def test_a_connection_string_goes_by_the_environment(dsn: str, found: dict[str, str]) -> None:
    assert found.items() <= cp_server.read_postgres_environment(dsn).items()
