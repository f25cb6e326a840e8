"""The table of types and verbs in docs/files.md: each cell says what the verb does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import surgery
from docs.generate import VERBS, verb_cells
from surgery.adapters.types.registry import all_types
from surgery.errors import AdapterError
from tests.adapters.test_stock_types import OTHERS
from tests.adapters.types.test_pefts_types import KINDS
from tests.adapters.types.test_through_peft import KINDS as THROUGH
from tests.adapters.types.test_through_peft import TARGETS
from tests.helpers.kinds import base_of, trained, verbs

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
