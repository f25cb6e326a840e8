"""Values of single layers: PEFT's own rule of matching, and numbers that are none are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from surgery.adapters.types.patterns import factor_pair, number_of, pattern_value, rank_scale
from surgery.errors import AdapterError


def test_ranks_and_scales_are_those_that_peft_gives() -> None:
    model = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(9, 9), "kq": nn.Linear(9, 9)}) for name in ("a", "b")})
    patterns: dict[str, Any] = {"rank_pattern": {"a.q": 2, "q": 3}, "alpha_pattern": {"^b.q": 12, "kq": 5}}
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "kq"], **patterns))
    config = {"r": 4, "alpha": 8, **patterns}
    for module in ("a.q", "a.kq", "b.q", "b.kq"):
        layer = peft_model.base_model.model.get_submodule(module)
        assert pattern_value(config, "rank_pattern", module, 4) == layer.r["default"]
        assert rank_scale(config, module) == layer.scaling["default"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "x", None, [1]])
def test_a_value_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(AdapterError, match=r"q: adapter_config.json .*alpha_pattern"):
        pattern_value({"alpha_pattern": {"q": value}}, "alpha_pattern", "q", 8)


def test_ranks_that_are_not_positive_and_factors_that_are_no_pair() -> None:
    with pytest.raises(AdapterError, match=r"q: adapter_config\.json says rank 0"):
        rank_scale({"r": 0}, "q")
    with pytest.raises(AdapterError, match=r"q: B \(5, 2\) and A \(3, 7\) are no pair of factors"):
        factor_pair("q", {"B": torch.ones(5, 2), "A": torch.ones(3, 7)}, "B", "A")
    with pytest.raises(AdapterError, match="has scale 'x', expected a number"):
        number_of({"scale": "x"}, "scale", 1.0)
    assert number_of({}, "scale", 1.5) == 1.5
