"""Customers and their keys: the operator's API and commands, and what a key opens."""

from __future__ import annotations

import json
import re
import signal
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

import cp_server
from tests.harness import ControlPlane, wait_for
from tests.integration.test_http_api import check_shape

CUSTOMERS, ACCOUNT = "/api/v1/admin/customers", "/api/v1/account"
KEY = r"oik1_[a-z2-7]{16}_[\w-]{43}_[0-9a-f]{8}"


def add(cp: ControlPlane, namespace: str = "") -> dict[str, Any]:
    """A new customer."""
    order = {"name": "Kuma & Söhne", "namespace": namespace or f"n-{uuid.uuid4().hex[:12]}"}
    status, customer = cp.call("POST", CUSTOMERS, order)
    assert status == 201, customer
    check_shape("Customer", customer)
    assert customer["namespaces"] == [order["namespace"]]
    return dict(customer)


def mint(cp: ControlPlane, customer: dict[str, Any], note: str = "ci") -> str:
    """A new key of a customer."""
    status, made = cp.call("POST", f"{CUSTOMERS}/{customer['customer_id']}/keys", {"note": note})
    assert status == 201, made
    check_shape("NewCustomerKey", made)
    assert re.fullmatch(KEY, made["key"])
    assert made["key"].split("_")[1] == made["key_id"]
    return str(made["key"])


def open_account(cp: ControlPlane, key: str) -> int:
    """The status of a request with this key."""
    return cp.call("GET", ACCOUNT, token=key)[0]


WAITING = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"


def post_together(cp: ControlPlane, table: str, path: str, *orders: dict[str, Any]) -> list[int]:
    """The statuses of two requests; both are to write to this table before one of them may."""
    with psycopg.connect(cp.postgres.dsn(cp.database)) as holder, ThreadPoolExecutor(2) as pool:
        holder.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        asked = [pool.submit(cp.call, "POST", path, order) for order in orders]
        wait_for("both wait", lambda: len(cp.query(WAITING, cp.database)) == 2 or None)
        holder.rollback()
        return [each.result()[0] for each in asked]


def test_from_a_customer_to_a_revoked_key(cp: ControlPlane) -> None:
    customer = add(cp)
    key, other = mint(cp, customer), mint(cp, customer, "laptop")
    status, account = cp.call("GET", ACCOUNT, token=key)
    assert (status, account) == (200, customer)
    keys = f"{CUSTOMERS}/{customer['customer_id']}/keys"
    _, listed = cp.call("GET", keys)
    check_shape("CustomerKeys", listed)
    assert [row["note"] for row in listed["keys"]] == ["laptop", "ci"]
    _, first = cp.call("GET", f"{keys}?limit=1")
    _, second = cp.call("GET", f"{keys}?limit=1&cursor={first['next_cursor']}")
    assert [*first["keys"], *second["keys"]] == listed["keys"]
    for _ in range(2):
        status, gone = cp.call("DELETE", f"{keys}/{key.split('_')[1]}")
        assert status == 200
        check_shape("CustomerKey", gone)
        assert gone["revoked_at"]
    assert (open_account(cp, key), open_account(cp, other)) == (401, 200)
    sql = "SELECT actor, action FROM audit_log WHERE subject = %s ORDER BY audit_id"
    noted = cp.query(sql, key.split("_")[1])
    assert [row["action"] for row in noted] == ["key.mint", "key.revoke"]
    assert all(re.fullmatch("jwt:tester:[a-z2-7]{16}", row["actor"]) for row in noted)
    shown = json.dumps([listed, gone, cp.query("SELECT * FROM audit_log")], default=str) + cp.log
    for each in (key, other):
        assert each.split("_", 2)[2] not in shown


def test_customers_are_listed_in_pages(cp: ControlPlane) -> None:
    made = [add(cp) for _ in range(3)]
    found: list[dict[str, Any]] = []
    cursor = 0
    while cursor is not None:
        status, part = cp.call("GET", f"{CUSTOMERS}?limit=2&cursor={cursor}")
        assert status == 200
        check_shape("Customers", part)
        found, cursor = found + part["customers"], part["next_cursor"]
    assert [row for row in found if row in made] == made
    assert cp.call("GET", f"{CUSTOMERS}/{made[1]['customer_id']}") == (200, made[1])


@pytest.mark.parametrize(
    ("order", "field"),
    [
        ({}, "name"),
        ({"name": "x"}, "namespace"),
        ({"namespace": "xx"}, "name"),
        ({"name": "", "namespace": "xx"}, "name"),
        ({"name": "a\nb", "namespace": "xx"}, "name"),
        *(
            ({"name": "x", "namespace": bad}, "namespace")
            for bad in (
                "x",
                "-a",
                "a-",
                "A",
                "a_b",
                "a.b",
                "solana:x",
                "ä",
                "x" * 41,
                "a/b",
                "aa\n",
            )
        ),
        ({"name": "x", "namespace": 7}, "namespace"),
        ({"name": "x", "namespace": "xx", "admin": True}, "admin"),
    ],
)
def test_a_bad_customer(cp: ControlPlane, order: dict[str, Any], field: str) -> None:
    before = cp.query("SELECT count(*) AS n FROM customers")
    status, answer = cp.call("POST", CUSTOMERS, order)
    assert (status, answer["error"]["field"]) == (400, field)
    assert cp.query("SELECT count(*) AS n FROM customers") == before


def test_a_namespace_has_one_owner(cp: ControlPlane) -> None:
    name = f"n-{uuid.uuid4().hex[:12]}"

    def one(_: int) -> int:
        return cp.call("POST", CUSTOMERS, {"name": "x", "namespace": name})[0]

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(one, range(16)))
    assert found == [201, *[409] * 15]
    sql = "SELECT count(*) AS n FROM customer_namespaces WHERE namespace = %s"
    assert cp.query(sql, name) == [{"n": 1}]
    sql = "SELECT count(*) AS n FROM customers c WHERE NOT EXISTS (SELECT 1 FROM"
    sql += " customer_namespaces n WHERE n.customer_no = c.customer_no)"
    assert cp.query(sql) == [{"n": 0}]  # who lost is not there either


def test_a_customer_has_so_many_keys(cp: ControlPlane) -> None:
    """Also when they are asked for at once."""
    customer = add(cp)
    path = f"{CUSTOMERS}/{customer['customer_id']}/keys"
    keys = cp_server.CUSTOMER_KEYS_MAX
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cp.call("POST", path, {}), range(keys + 10)))
    statuses = [status for status, _ in found]
    assert (statuses.count(201), statuses.count(409)) == (keys, 10)
    good = next(answer for status, answer in found if status == 201)
    assert cp.call("DELETE", f"{path}/{good['key_id']}")[0] == 200
    assert sorted(post_together(cp, "customer_keys", path, {}, {})) == [201, 409]


def test_a_customer_has_namespaces(cp: ControlPlane) -> None:
    """More than one, for good, each of one customer; so many, also when asked for at once."""
    one, other = add(cp), add(cp)
    path = f"{CUSTOMERS}/{one['customer_id']}/namespaces"
    name = f"n-{uuid.uuid4().hex[:12]}"
    for _ in range(2):
        status, found = cp.call("POST", path, {"namespace": name})
        assert (status, found["namespaces"]) == (200, sorted([*one["namespaces"], name]))
        check_shape("Customer", found)
    key = mint(cp, one)
    assert cp.call("GET", ACCOUNT, token=key)[1]["namespaces"] == found["namespaces"]
    sql = "SELECT detail->>'namespace' AS name FROM audit_log WHERE subject = %s AND action = %s"
    noted = cp.query(sql, one["customer_id"], "customer.namespace")
    assert [row["name"] for row in noted] == [name]
    for theirs in (name, one["namespaces"][0]):
        status, answer = cp.call(
            "POST", f"{CUSTOMERS}/{other['customer_id']}/namespaces", {"namespace": theirs}
        )
        assert (status, answer["error"]["field"]) == (409, "namespace")
    for bad in ("x", "-a", "Kuma", "solana:x"):
        assert cp.call("POST", path, {"namespace": bad})[0] == 400
    names = [f"{name}-{number}" for number in range(cp_server.CUSTOMER_NAMESPACES_MAX - 1)]
    for each in names[2:]:
        assert cp.call("POST", path, {"namespace": each})[0] == 200
    orders = [{"namespace": each} for each in names[:2]]
    assert sorted(post_together(cp, "customer_namespaces", path, *orders)) == [200, 409]
    assert len(cp.call("GET", ACCOUNT, token=key)[1]["namespaces"]) == len(names) + 1


def test_what_opens_nothing(cp: ControlPlane) -> None:
    """Every other token at a customer's door, a customer's key at every other door."""
    customer = add(cp)
    key = mint(cp, customer)
    key_id = key.split("_")[1]
    foreign = cp_server.render_token("oik1", key_id, b"x" * 32)
    unknown = cp_server.render_token("oik1", "a" * 16, b"x" * 32)
    as_invite = cp_server.render_token("oi1", key_id, b"x" * 32)
    for bad in ("", cp.token, foreign, unknown, as_invite, key[:-1], key + "0", key.upper()):
        status, answer = cp.call("GET", ACCOUNT, token=bad)
        assert (status, answer["error"]["code"]) == (401, "unauthorized"), bad
    for headers in ({"Authorization": f"Basic {key}"}, {"Authorization": key}):
        assert cp.call("GET", ACCOUNT, headers=headers)[0] == 401
    for route in cp_server.ROUTES:
        if route.scope in ("admin", "read"):
            path = re.sub(r"{\w+}", customer["customer_id"], route.path)
            assert cp.call(route.method, path, token=key)[0] == 401, path
    assert open_account(cp, key) == 200


def test_keys_of_another_customer(cp: ControlPlane) -> None:
    one, other = add(cp), add(cp)
    key = mint(cp, one)
    path = f"{CUSTOMERS}/{other['customer_id']}/keys/{key.split('_')[1]}"
    assert cp.call("DELETE", path)[0] == 404
    assert open_account(cp, key) == 200
    for bad in (str(uuid.uuid4()), "x"):
        status = 404 if bad != "x" else 400
        assert cp.call("POST", f"{CUSTOMERS}/{bad}/keys", {})[0] == status
        assert cp.call("GET", f"{CUSTOMERS}/{bad}/keys")[0] == status
        assert cp.call("GET", f"{CUSTOMERS}/{bad}")[0] == status


def test_the_commands(cp: ControlPlane) -> None:
    name = f"n-{uuid.uuid4().hex[:12]}"
    done = cp.command("add-customer", "--name=Kuma", f"--namespace={name}")
    assert (done.returncode, bool(re.fullmatch(KEY + "\n", done.stdout))) == (0, True), done
    key = done.stdout.strip()
    assert cp.call("GET", ACCOUNT, token=key)[1]["namespaces"] == [name]
    again = cp.command("add-customer", "--name=Kuma", f"--namespace={name}")
    assert (again.returncode, again.stdout) == (1, "")
    assert f"another customer has the namespace {name}" in again.stderr
    listed = cp.command("customers")
    (row,) = [line for line in listed.stdout.splitlines() if name in line]
    customer_id = row.split()[0]
    found = json.loads(cp.command("customers", "--json").stdout)["customers"]
    assert customer_id in [each["customer_id"] for each in found]
    done = cp.command("add-namespace", customer_id, f"{name}-2")
    assert done.stdout == f"customer {customer_id} has {name}, {name}-2\n"
    second = cp.command("mint-key", customer_id, "--note=laptop").stdout.strip()
    assert open_account(cp, second) == 200
    done = cp.command("revoke-key", second.split("_")[1])
    assert (done.returncode, "is revoked" in done.stdout) == (0, True)
    assert (open_account(cp, second), open_account(cp, key)) == (401, 200)
    for words in (
        ["mint-key", "x"],
        ["mint-key", str(uuid.uuid4())],
        ["revoke-key", "x"],
        ["add-namespace", "x", "kuma"],
        ["add-namespace", str(uuid.uuid4()), "kuma"],
        ["add-namespace", customer_id, "Kuma"],
    ):
        done = cp.command(*words)
        assert (done.returncode in (1, 2), done.stdout) == (True, "")
        assert " ; " in done.stderr


def test_what_the_database_refuses_its_own_role(cp: ControlPlane) -> None:
    customer = add(cp)
    mint(cp, customer)
    key = mint(cp, customer).split("_")[1]
    cp.call("DELETE", f"{CUSTOMERS}/{customer['customer_id']}/keys/{key}")
    for sql in (
        "UPDATE customers SET name = 'x'",
        "DELETE FROM customers",
        "UPDATE customer_namespaces SET customer_no = 1",
        "DELETE FROM customer_keys",
        "UPDATE customer_keys SET secret_sha256 = secret_sha256",
        "UPDATE customer_keys SET customer_no = customer_no",
        "UPDATE customer_keys SET revoked_at = NULL WHERE revoked_at IS NOT NULL",
    ):
        with (
            psycopg.connect(cp.postgres.dsn(cp.database, "openinfra")) as connection,
            pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.IntegrityError)),
        ):
            connection.execute(sql.encode())


def test_a_lost_answer_leaves_no_half_customer(make_cp: Callable[..., ControlPlane]) -> None:
    """kill -9 in the middle of many: what is there is whole, and the same key works afterwards."""
    cp = make_cp("--heartbeat-s=1")
    kept = mint(cp, add(cp))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            pool.submit(add, cp)
        time.sleep(0.2)
        cp.stop(signal.SIGKILL)
    cp.start()
    assert open_account(cp, kept) == 200
    cp.check_invariants()
