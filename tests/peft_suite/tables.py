"""The rows that our PEFT types get in the tables of PEFT's tests, derived there from the rows of LoRA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

from peft import FrodConfig, HiraConfig, LoraConfig, PeftConfig, VeraConfig

from surgery.methods.registry import load_formulas, own_infos

__all__ = ["CONFIGS", "OURS", "rows", "type_of"]

# Configuration class -> PEFT type: the controls first.
CONTROLS: dict[type[PeftConfig], str] = {
    LoraConfig: "LORA", VeraConfig: "VERA", HiraConfig: "HIRA", FrodConfig: "FROD"
}  # fmt: skip
OURS: dict[type[PeftConfig], str] = {
    load_formulas(info).config_class: info.peft_type  # type: ignore[attr-defined]
    for info in own_infos()
}
CONFIGS = {**CONTROLS, **OURS}
# Options of LoRA that every type has, by the name that ours give them; None where ours have none.
SAME = {
    "target_modules": "target_modules", "modules_to_save": "modules_to_save", "task_type": "task_type",
    "bias": "bias", "r": "r", "lora_dropout": "dropout", "init_lora_weights": "init_weights", "lora_alpha": None,
}  # fmt: skip
# Without it `init_weights=False` is a file of 0.1.0, and tests that make an adapter in both ways make two forms of it.
SPELLED_OUT = {"SMOA": {"variant": "blocks"}}
# Test models whose adapted layers are no linears; `EmbConv1D` has transformers' Conv1D, which is one.
OTHER_LAYERS = re.compile(r"(?i)conv\dd|mha$| mha")
OTHER_TARGETS = {"emb", "mha", "embed_tokens"}


def rows(values: Iterable[Any], left_out: Collection[Any] = ()) -> list[Any]:
    """Return the rows of a table that concern the controls or our types; other tables come back without `left_out`.

    LoRA's rows with an option that is LoRA's alone (DoRA, activated LoRA, trained tokens) are left out, so that all
    types meet the same cases. Of every other row of LoRA's, each of our types gets one.
    """
    table = list(values)
    if not any(_classes(row) for row in table):
        return [row for row in table if row not in left_out]
    kept = [row for row in table if _classes(row) <= CONTROLS.keys() and _classes(row) and _is_plain(row)]
    lora = [row for row in kept if _classes(row) == {LoraConfig}]
    return kept + [_of_type(row, config_class) for config_class in OURS for row in lora]


def type_of(parameters: Iterable[Any]) -> str | None:
    """Return the PEFT type that a test is about, from the values that it is run with."""
    classes = _classes(tuple(parameters))
    return CONFIGS.get(classes.pop()) if len(classes) == 1 else None


def _classes(row: Any) -> set[type[PeftConfig]]:
    cells = row if isinstance(row, tuple) else (row,)
    found = {cell if isinstance(cell, type) else type(cell) for cell in cells}
    return {cell for cell in found if issubclass(cell, PeftConfig)}


def _is_plain(row: Any) -> bool:
    """Whether a row is on linear layers, and a row of LoRA's without options of its own."""
    cells = row if isinstance(row, tuple) else (row,)
    options = [_options(cell) for cell in cells]
    if any(OTHER_LAYERS.search(cell) for cell in cells if isinstance(cell, str)):
        return False
    if any(OTHER_TARGETS & set(each.get("target_modules") or ()) for each in options):
        return False
    if _classes(row) != {LoraConfig}:
        return True
    named = [(key, value) for each in options for key, value in each.items()]
    return all(key in SAME and (key != "init_lora_weights" or value is False) for key, value in named)


def _options(cell: Any) -> dict[str, Any]:
    """Return the options in a cell: those of a dictionary, or those of a configuration that are not its defaults."""
    if isinstance(cell, dict):
        return cell
    if not isinstance(cell, PeftConfig):
        return {}
    defaults = type(cell)().to_dict()
    return {key: value for key, value in cell.to_dict().items() if value != defaults[key]}


def _of_type(row: Any, config_class: type[PeftConfig]) -> Any:
    if not isinstance(row, tuple):
        return _cell_of_type(row, config_class)
    return tuple(_cell_of_type(cell, config_class) for cell in row)


def _cell_of_type(cell: Any, config_class: type[PeftConfig]) -> Any:
    if isinstance(cell, type) and issubclass(cell, PeftConfig):
        return config_class
    if isinstance(cell, str):
        return OURS[config_class].lower() if cell == "lora" else cell.replace("LoRA", OURS[config_class])
    if isinstance(cell, (dict, PeftConfig)):
        known = {field.name for field in dataclasses.fields(config_class)}
        named = {SAME[key]: value for key, value in _options(cell).items()}
        options = {key: value for key, value in named.items() if key in known}
        options |= SPELLED_OUT.get(OURS[config_class], {})
        return options if isinstance(cell, dict) else config_class(**options)
    return cell
