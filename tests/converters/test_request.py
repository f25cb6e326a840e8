"""Requests: options that do not go together, and an output that is the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.errors import MethodError, OutputError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "pissa"}, "unknown form"),
        ({"to": "lora", "rank": 4, "ratio": 2}, "one of rank, ratio"),
        ({"to": "lora", "bits": 4}, "belongs to giva"),
        ({"to": "lora", "basis": "random"}, "belongs to vera"),
        ({"to": "giva", "bits": 5}, "bits must be"),
        ({"to": "giva", "dtype": "float16"}, "codes"),
        ({"to": "lora", "energy": 1.5}, "between 0 and 1"),
        ({"to": "lora", "rank": 0}, "at least 1"),
        ({"to": "giva", "recover": 10}, "give base and data"),
        ({"to": "lora", "data": "x.jsonl"}, "base"),
        ({"to": "lora", "samples": 0}, "samples"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=words):
        surgery.convert(lora, options.pop("to"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_the_output(lora: Path) -> None:
    for out in (lora, lora / ".", lora.parent):
        with pytest.raises(OutputError, match="holds the adapter"):
            surgery.convert(lora, "lora", out, force=True)
