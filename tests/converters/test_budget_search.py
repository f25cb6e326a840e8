"""The search finds the largest value that fits."""

from __future__ import annotations

import pytest

from surgery.converters.budget_search import largest


@pytest.mark.parametrize("most", [0, 1, 37, 100])
def test_the_search_finds_the_largest_that_fits(most: int) -> None:
    asked = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= most

    assert largest(fits, 0, 100) == most and len(asked) <= 9
    assert largest(lambda number: False, 0, 9) is None and largest(fits, 3, 2) is None
