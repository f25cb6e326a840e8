"""Budgets: one at most, each within its range, as text where that is a size."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.converters.budget import Budget
from surgery.errors import MethodError


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 4, "ratio": 2}, "one of rank, ratio"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"energy": 0.0}, "between 0 and 1"),
        ({"energy": 1.5}, "between 0 and 1"),
        ({"max_error": 1.0}, "between 0 and 1"),
        ({"size": 0}, "positive, got 0"),
        ({"size": "many"}, "size: "),
        ({"ratio": float("inf")}, "positive, got inf"),
        ({"ratio": -1}, "positive, got -1"),
    ],
)
def test_what_is_no_budget_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Budget(**given)


def test_budgets_say_what_they_are() -> None:
    assert not Budget().given and Budget().describe() == ""
    assert Budget(size="64KiB").size == 65536 and Budget(size="64KiB").describe() == "--size 65536"
    assert Budget(max_error=0).describe() == "--max-error 0" and Budget(ratio=20).describe() == "--ratio 20"
