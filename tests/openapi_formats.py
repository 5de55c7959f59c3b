"""Formats of our own in the OpenAPI document, for schemathesis (SCHEMATHESIS_HOOKS)."""

from __future__ import annotations

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


WALLETS = st.binary(min_size=32, max_size=32).filter(any).map(render_base58)
LINES = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), min_size=1, max_size=60)
schemathesis.openapi.format("solana-pubkey", WALLETS)
schemathesis.openapi.format("solana-namespace", WALLETS.map("solana:{}".format))
schemathesis.openapi.format("line", LINES.filter(is_line))
