"""Sums of the weight changes of several adapters, formed by PEFT in float64."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.adapters import weight_changes

__all__ = ["difference", "summed"]


def summed(base: Path, terms: list[tuple[float, Path]]) -> dict[str, torch.Tensor]:
    """Return the weighted sum by layer, `(out, in)`, float64."""
    total: dict[str, torch.Tensor] = {}
    for weight, folder in terms:
        for module, change in weight_changes(base, folder).items():
            total[module] = total.get(module, torch.zeros_like(change)) + weight * change
    return total


def difference(base: Path, made: Path, expected: dict[str, torch.Tensor]) -> float:
    """Return how far what PEFT merges from a folder is from what is expected, over the norm of that."""
    found = weight_changes(base, made)
    assert found.keys() == expected.keys()
    errors = sum(float((found[name] - change).square().sum()) for name, change in expected.items())
    return (errors / sum(float(change.square().sum()) for change in expected.values())) ** 0.5
