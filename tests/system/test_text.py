"""Numbers as text."""

from __future__ import annotations

import pytest

from surgery.system.text import human_bytes, human_seconds, size_change


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2000, 100, "20 x smaller"),
        (4, 300, "75 x larger"),
        (100, 100, "the same size"),
        (1000, 999, "about the same size"),
        (999, 1000, "about the same size"),
        (1, 10_000, "10000 x larger"),
    ],
)
def test_size_change(before: int, after: int, text: str) -> None:
    assert size_change(before, after) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
