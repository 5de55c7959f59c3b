"""Tables for the registry: what a request to it touches, and who may do that."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cp_server
from cp_server import (
    Refusal,
    RegistryCall,
    check_room,
    decide_registry,
    parse_basic,
    parse_registry_call,
)

DIGEST = "sha256:" + "ab" * 32
OCTETS = "application/octet-stream"
WEB = "/v2/kuma/web"


@pytest.mark.parametrize(
    ("method", "uri", "expected"),
    [
        ("GET", "/v2/", RegistryCall("", "", False)),
        ("HEAD", f"{WEB}/manifests/1.0", RegistryCall("kuma", "kuma/web", False)),
        ("GET", f"{WEB}/manifests/{DIGEST}", RegistryCall("kuma", "kuma/web", False, "", True)),
        ("PUT", f"{WEB}/manifests/latest", RegistryCall("kuma", "kuma/web", True)),
        ("GET", f"{WEB}/blobs/{DIGEST}", RegistryCall("kuma", "kuma/web", False, "", True)),
        ("GET", f"{WEB}/tags/list?n=9&last=a", RegistryCall("kuma", "kuma/web", False)),
        ("GET", f"{WEB}/tags/list?", RegistryCall("kuma", "kuma/web", False)),
        ("POST", f"{WEB}/blobs/uploads/", RegistryCall("kuma", "kuma/web", True, is_start=True)),
        (
            "POST",
            f"{WEB}/blobs/uploads/?mount={DIGEST}&from=boss%2Fdeep%2Fweb",
            RegistryCall("kuma", "kuma/web", True, "boss", is_start=True),
        ),
        (
            "PATCH",
            f"{WEB}/blobs/uploads/6f9b-1_2=?_state=abc%3D",
            RegistryCall("kuma", "kuma/web", True),
        ),
        ("GET", "/v2/kuma/a/b/c/tags/list", RegistryCall("kuma", "kuma/a/b/c", False)),
        # The first part decides, however the rest is read.
        (
            "GET",
            "/v2/kuma/blobs/uploads/manifests/x",
            RegistryCall("kuma", "kuma/blobs/uploads", False),
        ),
    ],
)
def test_what_a_request_touches(method: str, uri: str, expected: RegistryCall) -> None:
    assert parse_registry_call(method, uri, OCTETS) == expected


@pytest.mark.parametrize(
    ("method", "uri", "kind", "code"),
    [
        ("GET", "/v2", "", "NOT_FOUND"),
        ("GET", "", "", "NOT_FOUND"),
        ("GET", "/v2/_catalog", "", "NOT_FOUND"),
        ("GET", "/v2/kuma/tags/list", "", "NOT_FOUND"),  # no namespace of somebody's
        ("GET", "/v2/kuma//web/tags/list", "", "NOT_FOUND"),
        ("GET", "/v2/kuma/../boss/web/tags/list", "", "NOT_FOUND"),
        ("GET", "/v2/kuma/%2e%2e/boss/web/tags/list", "", "NOT_FOUND"),
        ("GET", "/v2/Kuma/web/tags/list", "", "NOT_FOUND"),
        ("GET", f"{WEB}/manifests/a/b", "", "NOT_FOUND"),
        ("GET", f"{WEB}/referrers/{DIGEST}", "", "NOT_FOUND"),
        ("GET", f"{WEB}/blobs/sha512:00", "", "NOT_FOUND"),
        ("GET", f"{WEB}/tags/list\n", "", "NOT_FOUND"),
        ("GET", f"https://x{WEB}/tags/list", "", "NOT_FOUND"),
        ("DELETE", f"{WEB}/manifests/{DIGEST}", "", "METHOD_NOT_ALLOWED"),
        ("DELETE", f"{WEB}/blobs/{DIGEST}", "", "METHOD_NOT_ALLOWED"),
        ("PUT", f"{WEB}/blobs/{DIGEST}", "", "METHOD_NOT_ALLOWED"),
        ("POST", f"{WEB}/manifests/1", "", "METHOD_NOT_ALLOWED"),
        ("PUT", f"{WEB}/blobs/uploads/", "", "METHOD_NOT_ALLOWED"),
        ("POST", "/v2/", "", "METHOD_NOT_ALLOWED"),
        ("", "/v2/", "", "METHOD_NOT_ALLOWED"),
        ("get", "/v2/", "", "METHOD_NOT_ALLOWED"),
        ("POST", f"{WEB}/blobs/uploads/", "application/x-www-form-urlencoded", "NOT_JSON"),
        ("POST", f"{WEB}/blobs/uploads/", "Application/X-WWW-Form-Urlencoded;a=b", "NOT_JSON"),
        ("POST", f"{WEB}/blobs/uploads/", "multipart/mixed; boundary=x", "NOT_JSON"),
        ("POST", f"{WEB}/blobs/uploads/?from=a/b&from=boss/web", "", "BAD_REQUEST"),
        ("POST", f"{WEB}/blobs/uploads/?%66rom=boss/web", "", "BAD_REQUEST"),
        ("POST", f"{WEB}/blobs/uploads/?mount=a;from=boss/web", "", "BAD_REQUEST"),
        ("POST", f"{WEB}/blobs/uploads/?from=boss", "", "BAD_REQUEST"),
        ("POST", f"{WEB}/blobs/uploads/?from=../boss/web", "", "BAD_REQUEST"),
        ("GET", f"{WEB}/tags/list?x=1", "", "BAD_REQUEST"),
    ],
)
def test_what_could_mean_something_else_is_refused(
    method: str, uri: str, kind: str, code: str
) -> None:
    with pytest.raises(Refusal) as refused:
        parse_registry_call(method, uri, kind)
    assert refused.value.code == code


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_uri_reaches_another_namespace(path: str, query: str) -> None:
    """Whatever is added to a path of one's own."""
    try:
        call = parse_registry_call("GET", f"/v2/kuma/web/{path}?{query}", "")
    except Refusal:
        return
    assert call.namespace == "kuma"


def test_a_namespace_is_its_customers() -> None:
    for call in (
        RegistryCall("", "", False),
        RegistryCall("kuma", "kuma/web", True),
        RegistryCall("kuma", "kuma/web", True, "two"),
    ):
        decide_registry(call, ["kuma", "two"])
    for call in (
        RegistryCall("boss", "boss/web", False),
        RegistryCall("kum", "kum/web", False),
        RegistryCall("kuma", "kuma/web", True, "boss"),
    ):
        with pytest.raises(Refusal, match="is not yours; yours: kuma or two"):
            decide_registry(call, ["two", "kuma"])
    with pytest.raises(Refusal, match="none yet: ask the operator"):
        decide_registry(RegistryCall("kuma", "kuma/web", False), [])


@pytest.mark.parametrize(
    ("free", "size", "is_room"),
    [
        (64 << 20, 1 << 30, True),
        ((64 << 20) - 1, 1 << 30, False),
        (1 << 30, 20 << 30, True),
        ((1 << 30) - 1, 20 << 30, False),
        (0, 0, False),
    ],
)
def test_a_push_needs_room(free: int, size: int, is_room: bool) -> None:
    if is_room:
        check_room(free, size)
        return
    with pytest.raises(Refusal, match=f"the registry is full: {free >> 20} MiB are free") as told:
        check_room(free, size)
    assert told.value.code == "FORBIDDEN"


@pytest.mark.parametrize(
    ("header", "password"),
    [
        ("Basic " + base64.b64encode(b"me:oik1_x").decode(), "oik1_x"),
        ("bAsIc   " + base64.b64encode(b"me:oik1_x").decode() + " ", "oik1_x"),
        ("Basic " + base64.b64encode(b":a:b").decode(), "a:b"),
        ("Basic " + base64.b64encode(b"oik1_x").decode(), ""),
        ("Basic " + base64.b64encode("me:ö".encode()).decode(), ""),
        ("Bearer " + base64.b64encode(b"me:oik1_x").decode(), ""),
        ("Basic ???", ""),
        ("Basic", ""),
        ("", ""),
    ],
)
def test_a_password_is_read(header: str, password: str) -> None:
    assert parse_basic(header) == password


def test_a_refusal_is_what_docker_reads() -> None:
    told = cp_server.render_registry_problem(Refusal("FORBIDDEN", "what", "todo"))
    assert told == {"errors": [{"code": "DENIED", "message": "what; todo"}]}
