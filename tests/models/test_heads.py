"""Modules that are saved with an adapter: heads, and whatever the checkpoint lacks, seeded."""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.models.base_model import BaseModel
from surgery.models.heads import carried_modules, carried_tensors, missing_modules


def test_a_language_model_carries_nothing(llama: Path) -> None:
    base = BaseModel.open(llama)
    assert carried_modules(base) == [] and carried_tensors(base, 0) == ({}, []) and missing_modules(base) == []


def test_a_fresh_head_is_drawn_by_the_seed(llama: Path) -> None:
    base = BaseModel.open(llama, task="seq-cls", labels=["a", "b", "c"])
    assert carried_modules(base) == ["score"] and missing_modules(base) == ["score"]
    (one, fresh), (same, _), (other, _) = (carried_tensors(base, seed) for seed in (0, 0, 1))
    assert fresh == ["score"] and set(one) == {"score.weight"} and one["score.weight"].shape == (3, 32)
    assert torch.equal(one["score.weight"], same["score.weight"])
    assert not torch.equal(one["score.weight"], other["score.weight"])
