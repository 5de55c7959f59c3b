"""The blocks of commands that README.md marks, for the tests that run them as they stand there."""

from __future__ import annotations

import re

from tests.harness import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- (command|file|shell): (\S+) -->\n```sh\n(.*?)```\n", README, re.DOTALL)


def block(name: str) -> str:
    """The text of one marked block."""
    (found,) = [text for _, this, text in BLOCKS if this == name]
    return str(found)
