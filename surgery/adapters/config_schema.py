"""The check of `adapter_config.json` against the rules of its adapter type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.adapters.types.config_rules import COMMON_RULES
from surgery.adapters.types.registry import type_of
from surgery.errors import AdapterError

__all__ = ["check_adapter_config"]


def check_adapter_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check that `adapter_config.json` holds values of the kinds that PEFT writes, under the keys that are read.

    Raises:
        AdapterError: it does not.
    """
    if "peft_type" not in config:
        raise AdapterError(f"{path}: has no peft_type")
    _check_keys(path, config, {"peft_type": COMMON_RULES["peft_type"]})
    kind = type_of(config)
    _check_keys(path, config, {**COMMON_RULES, **(kind.rules if kind is not None else {})})


def _check_keys(path: Path, config: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
    for key, (fits, expected) in rules.items():
        if key in config and not fits(config[key]):
            raise AdapterError(f"{path}: {key} is {config[key]!r:.80}, expected {expected}")
