"""The history beside an output: the command, our version, and what the verb adds."""

from __future__ import annotations

import surgery
from surgery.storage.format_version import BLOCKS_VERSION, FIRST_VERSION
from surgery.storage.provenance import provenance_of


def test_it_says_what_made_the_output() -> None:
    made = provenance_of("init", rank=4)
    assert made == {
        "format_version": FIRST_VERSION, "tool": "surgery", "version": surgery.__version__,
        "command": "init", "rank": 4,
    }  # fmt: skip
    assert provenance_of("convert", BLOCKS_VERSION)["format_version"] == BLOCKS_VERSION
