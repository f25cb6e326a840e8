"""Ranks within a budget: met, used, and never worse for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.errors import MethodError
from tests.helpers.conversions import WEIGHTS


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("lora", {"per_layer_ranks": True}),
        ("giva", {"bits": 16}),
        ("giva", {"bits": 8}),
        ("giva", {"bits": 3}),
        ("giva", {"bits": "auto"}),
    ],
)
@pytest.mark.parametrize("ratio", [4.0, 11.0])
def test_a_budget_in_bytes_is_met_and_used(ratio: float, to: str, options: Any, lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, to, tmp_path / "out", ratio=ratio, accept_loss=True, **options)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert size == report.bytes <= report.source_bytes / ratio
    everything = all(site.rank == site.source_rank for site in report.sites)
    assert everything or size > 0.85 * report.source_bytes / ratio


def test_a_larger_budget_never_gives_a_larger_error(lora: Path) -> None:
    source = (lora / WEIGHTS).stat().st_size
    errors = [surgery.convert(lora, "lora", size=source * share // 20)[1].weight_error for share in range(6, 20, 2)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]


def test_too_small_a_budget_names_the_smallest_that_works(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"is (\d+) bytes") as error:
        surgery.convert(lora, "lora", tmp_path / "out", size=100, per_layer_ranks=True)
    smallest = int(str(error.value).split(", is ")[1].split()[0])
    _, report = surgery.convert(lora, "lora", tmp_path / "out", size=smallest, per_layer_ranks=True, accept_loss=True)
    assert report.modules == 1 and report.bytes <= smallest
