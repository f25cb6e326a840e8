"""Tests of what the entries of the adapter types say of PEFT, against PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

import surgery
import surgery.peft_types
from docs.generate import VERBS, verb_cells
from surgery.adapters.types.base import TensorType
from surgery.adapters.types.registry import ADAPTER_TYPES, all_types, readable_types, type_of
from surgery.errors import AdapterError
from tests.adapters.types.test_through_peft import TARGETS
from tests.helpers.kinds import base_of, trained, verbs
from tests.helpers.models import load_base, model_inputs, output
from tests.helpers.peft_kinds import KINDS
from tests.helpers.stock_adapters import OTHERS, saved
from tests.helpers.through_peft import KINDS as THROUGH

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_merged_loaded_and_converted_as_peft_has_it(name: str, model_folder, tmp_path: Path) -> None:
    kind, config, thin = KINDS[name]
    folder = model_folder(kind)
    model = saved(folder, config(), tmp_path / "made").eval()
    inputs = model_inputs(kind)
    with torch.no_grad():
        bare, want = output(load_base(folder), inputs), output(model, inputs)
        surgery.merge(tmp_path / "made", folder, tmp_path / "merged")
        merged = output(load_base(tmp_path / "merged"), inputs)
        loaded = output(surgery.load(tmp_path / "made", load_base(folder)).eval(), inputs)
    effect = (want - bare).norm()
    assert effect > 1e-2 and (merged - want).norm() <= 1e-5 * effect and (loaded - want).norm() <= 1e-5 * effect
    assert surgery.compare(tmp_path / "made", tmp_path / "made", base=folder).weight_error == 0
    if thin:
        surgery.convert(tmp_path / "made", "lora", tmp_path / "lora", base=folder, energy=1.0)
        with torch.no_grad():
            converted = output(surgery.load(tmp_path / "lora", load_base(folder)).eval(), inputs)
        assert (converted - want).norm() <= 1e-4 * effect


def test_every_type_of_the_table_is_tested() -> None:
    read = {kind.peft_type for kind in ADAPTER_TYPES if isinstance(kind, TensorType)}
    configs = [*OTHERS.values(), *(config() for _, config, _ in KINDS.values())]
    tested = {config.peft_type.value for config in configs}
    assert read == {"LORA", *tested}


# Stock types, by title.
STOCK = {kind.title: kind for kind in all_types() if kind.readable and kind.imported_by is None}


def config_of(title: str) -> peft.PeftConfig:
    peft_type = STOCK[title].peft_type
    if peft_type == "LORA":
        return peft.LoraConfig(r=3, use_dora=title == "DoRA")
    if peft_type == "VERA":
        return peft.VeraConfig(r=3)
    if peft_type in THROUGH:
        config, settings = THROUGH[peft_type]
        found: peft.PeftConfig = config(**settings)
        return found
    made = [*OTHERS.values(), *(make() for _, make, _ in KINDS.values())]
    return next(config for config in made if config.peft_type.value == peft_type)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", STOCK)
def test_each_cell(title: str, tmp_path: Path) -> None:
    kind, base, made = STOCK[title], base_of("llama", tmp_path / "base"), tmp_path / "made"
    config = config_of(title)
    trained(base, made, type(config)(**{**config.to_dict(), "target_modules": TARGETS["llama"]}), 0.3)
    cells = verb_cells(kind)
    assert tuple(cells) == VERBS
    exact = cells["convert --to lora"].startswith("exact")
    found = dict(verbs("llama", base, made, tmp_path, ("giva", "lora") if exact else ("giva",)))
    assert found["load"] < 1e-5 and found["merge"] < 2e-5 and max(found.values()) < 5e-4, found
    with_base = {verb for verb, cell in cells.items() if "--base" in cell}
    assert with_base == ({"inspect", "compare", "convert --to giva", "convert --to lora"} if kind.needs({}) else set())
    options: dict[str, Any] = {"energy": 1.0, "accept_loss": True}
    if not with_base:
        surgery.convert(made, "giva", **options)
    else:
        with pytest.raises(AdapterError, match="give it with --base"):
            surgery.convert(made, "giva", **options)
        with pytest.raises(AdapterError, match="give it with --base"):
            surgery.compare(made, made)
    unread = any("not read" in note for note in surgery.inspect(made).notes)
    assert unread == (cells["inspect"] != "yes")
    if not exact and with_base:  # products of two narrow LoRAs (LoHa, LoKr) have thin factors where they are narrow
        with pytest.raises(AdapterError, match="full rank; say with --rank or --energy"):
            surgery.convert(made, "lora", base=base)
    assert surgery.compare(made, made, base=base).weight_error == 0
    surgery.push(made, "org/name", dry_run=True, base_model="org/base")
