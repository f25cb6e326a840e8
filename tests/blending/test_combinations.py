"""Tests of the ways to combine changes, against PEFT's own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils.merge_utils import ties

import surgery
from tests.helpers.adapters import weight_changes
from tests.helpers.dense_sums import difference, summed


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_that_of_peft_on_the_changes(
    llama: Path, members: dict[str, Path], tmp_path: Path, density: float
) -> None:
    names = ["lora", "adalora"]
    surgery.blend([(members[name], 1.0) for name in names], tmp_path / "out", how="ties", density=density)
    opened = [surgery.Adapter.open(members[name]) for name in names]
    expected = {
        # From the same numbers to the bit: which entries are the largest depends on the last one.
        module: ties([each.delta(module).dense() for each in opened], torch.ones(2), density).double()
        for module in weight_changes(llama, members["lora"])
    }
    assert difference(llama, tmp_path / "out", expected) < 1e-4


def test_dare_is_drawn_from_its_seed_and_keeps_what_it_expects(
    llama: Path, members: dict[str, Path], tmp_path: Path
) -> None:
    given = [(members["lora"], 1.0), (members["adalora"], 1.0)]
    made = [
        surgery.blend(given, None, how="dare", density=0.5, seed=seed, dry_run=True)[0]
        .delta("model.layers.0.self_attn.q_proj")
        .dense()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    average = torch.stack(
        [
            surgery.blend(given, None, how="dare", seed=seed, dry_run=True)[0]
            .delta("model.layers.0.self_attn.q_proj")
            .dense()
            for seed in range(12)
        ]
    ).mean(0)
    whole = summed(llama, [(1.0, members["lora"]), (1.0, members["adalora"])])["model.layers.0.self_attn.q_proj"]
    assert float(torch.nn.functional.cosine_similarity(average.flatten().double(), whole.flatten(), dim=0)) > 0.9
