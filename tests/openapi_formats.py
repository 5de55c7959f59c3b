"""Formats of our own in the OpenAPI document, for schemathesis (SCHEMATHESIS_HOOKS)."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import schemathesis
from hypothesis import strategies as st
from hypothesis.internal import lambda_sources

import cp_server

# Python 3.11.2 cannot always parse a large module again (gh-106905: SystemError), which hypothesis
# does for the words of a lambda in its reports.
lambda_sources.lambda_description = lambda _function: "lambda"

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def render_base58(raw: bytes) -> str:
    """A Solana address: 32 bytes in base58."""
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = BASE58[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def is_line(text: str) -> bool:
    """True for what the API takes as one line of text."""
    try:
        return cp_server.check_text(text, "line") == text
    except cp_server.Refusal:
        return False


LINED = {
    field.name
    for fields in vars(cp_server).values()
    if isinstance(fields, tuple)
    for field in fields
    if isinstance(field, cp_server.Field) and field.form is cp_server.LINE
}
WORKLOADS = "/api/v1/workloads"
WALLETS = st.binary(min_size=32, max_size=32).filter(any).map(render_base58)
LINES = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), min_size=1, max_size=60)
schemathesis.openapi.format("solana-pubkey", WALLETS)
schemathesis.openapi.format("solana-namespace", WALLETS.map("solana:{}".format))
schemathesis.openapi.format("line", LINES.filter(is_line))


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Drop what is meant to be no `line` and is one by chance.

    Schemathesis takes whatever it drew for a breach of a format that it does not know.
    """
    mutations = getattr(case.meta and case.meta.phase.data, "mutations", ())
    of_format = [each.parameter for each in mutations if "format" in each.keywords]
    values = [part for part in (case.body, case.query) if isinstance(part, dict)]
    drawn = (part.get(name) for part in values for name in LINED.intersection(of_format))
    return not any(isinstance(value, str) and is_line(value) for value in drawn)


@schemathesis.hook
def before_call(
    context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, object]
) -> None:
    """Give most orders an image that the customer may run: chance finds none.

    What is wrong with the rest of it stays wrong.
    """
    body = case.body
    if case.operation.path != WORKLOADS or not isinstance(body, dict):
        return
    image, namespace = body.get("image"), body.get("namespace", "fuzz")
    if not isinstance(image, str) or not isinstance(namespace, str):
        return
    if zlib.crc32(repr(body).encode()) % 4 == 0:  # not by the image: most of a run share one
        return
    with contextlib.suppress(cp_server.Refusal):
        cp_server.check_image(image, "image")
        cp_server.check_namespace(namespace, "namespace")
        case.body = {**body, "namespace": "fuzz", "image": "fuzz/web@sha256:" + 64 * "0"}
