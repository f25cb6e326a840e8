"""Tests of what the entries of the adapter types say of PEFT, against PEFT itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

import surgery.peft_types  # noqa: F401 - PEFT knows our types
from surgery.adapters.types.registry import readable_types, type_of

OF_PEFT = {str(getattr(key, "value", key)): key for key in PEFT_TYPE_TO_CONFIG_MAPPING}
READ = sorted(set(readable_types()) & set(OF_PEFT))
# What a type's configuration must say besides its targets.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "RANDLORA": {"r": 2},
}


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def _started(peft_type: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = _Model()
    settings = {"target_modules": ["first", "second"], **SETTINGS.get(peft_type, {})}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[OF_PEFT[peft_type]](**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, get_peft_model(model, config)


@pytest.mark.parametrize("peft_type", READ)
def test_prefix_is_that_of_pefts_table(peft_type: str) -> None:
    entry = type_of({"peft_type": peft_type})
    assert entry is not None
    assert entry.prefix == PEFT_TYPE_TO_PREFIX_MAPPING[OF_PEFT[peft_type]]


@pytest.mark.parametrize("peft_type", [name for name in READ if type_of({"peft_type": name}).starts_idle])  # type: ignore[union-attr]
def test_a_type_that_starts_idle_computes_what_the_base_does(peft_type: str) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    expected = _Model()(x)
    _, adapted = _started(peft_type)
    torch.testing.assert_close(adapted(x), expected)


def test_a_type_that_does_not_start_idle_is_told_apart() -> None:
    entry = type_of({"peft_type": "SHIRA"})
    assert entry is not None
    assert not entry.starts_idle
