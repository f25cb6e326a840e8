"""Tests of `surgery.blend`, against dense sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import surgery
from surgery.errors import OptionError
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.dense_sums import difference, summed


@pytest.mark.parametrize(
    ("terms", "with_base"),
    [
        ([(0.7, "lora"), (-0.5, "rslora")], False),
        ([(1.0, "lora"), (2.0, "adalora"), (0.25, "rslora")], False),
        ([(0.7, "lora"), (0.5, "dora")], True),
        ([(0.5, "ia3"), (1.5, "dora")], True),
    ],
)
def test_the_sum_is_exact(
    llama: Path, members: dict[str, Path], tmp_path: Path, terms: list[tuple[float, str]], with_base: bool
) -> None:
    given = [(members[name], weight) for weight, name in terms]
    _, report = surgery.blend(given, tmp_path / "out", base=llama if with_base else None)
    expected = summed(llama, [(weight, members[name]) for weight, name in terms])
    assert difference(llama, tmp_path / "out", expected) < 1e-5
    assert difference(llama, tmp_path / "out", {name: 1.01 * each for name, each in expected.items()}) > 5e-3
    assert [each.weight for each in report.members] == [weight for weight, _ in terms]


def test_what_remains_of_each_member(llama: Path, members: dict[str, Path], tmp_path: Path) -> None:
    first, second = members["lora"], members["rslora"]
    _, report = surgery.blend([(first, 0.7), (second, -0.5)], tmp_path / "out")
    total = summed(llama, [(0.7, first), (-0.5, second)])
    for folder, row in zip((first, second), report.members, strict=True):
        own = weight_changes(llama, folder)
        inner = sum(float((total[name] * change).sum()) for name, change in own.items())
        squared = sum(float(change.square().sum()) for change in own.values())
        assert row.remains == pytest.approx(inner / squared, rel=1e-4)
        assert row.modules == len(own)


def test_budgets_and_forms_are_those_of_convert(llama: Path, members: dict[str, Path], tmp_path: Path) -> None:
    given = [members["lora"], members["rslora"]]
    _, report = surgery.blend(given, tmp_path / "cut", rank=3)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 3
    assert 0 < report.converted.weight_error < 1
    made, report = surgery.blend(given, tmp_path / "giva", "giva", ratio=4)
    assert made.peft_type == "GIVA" and report.converted.ratio >= 4
    expected = summed(llama, [(1.0, folder) for folder in given])
    found = surgery.Adapter.open(tmp_path / "giva")
    errors = sum(float((found.delta(m).dense().double() - each).square().sum()) for m, each in expected.items())
    norm = sum(float(each.square().sum()) for each in expected.values())
    assert (errors / norm) ** 0.5 == pytest.approx(report.converted.weight_error, rel=1e-3)


def test_a_head_is_taken_from_the_member_that_is_named(llama: Path, tmp_path: Path) -> None:
    both = [
        make_adapter(
            llama, tmp_path / f"m{seed}", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), seed
        )
        for seed in (1, 2)
    ]
    with pytest.raises(OptionError, match=r"--head"):
        surgery.blend(both, tmp_path / "out")
    with pytest.raises(OptionError, match="is no member"):
        surgery.blend(both, tmp_path / "out", head=tmp_path)
    made, report = surgery.blend(both, tmp_path / "out", head=both[1])
    name = "base_model.model.lm_head.weight"
    assert torch.equal(made.tensors[name], surgery.Adapter.open(both[1]).tensors[name])
    assert report.head == str(both[1]) and "left out" in report.notes[-1]
