"""The keys of `adapter_config.json` that are a PEFT type's own; what all types have comes from the source."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig

from surgery.adapters.source import Source
from surgery.adapters.types.registry import type_of

__all__ = ["own_keys", "targets_of"]

TARGETS = ("target_modules", "layers_to_transform", "layers_pattern")


def own_keys(config: PeftConfig, source: Source) -> dict[str, Any]:
    """What a type's configuration says besides its targets and what all types have, as JSON values.

    Args:
        config: the configuration, complete but for those.
        source: the adapter it is made from: how its layers lie, and whether its biases are trained.
    """
    left_out = {"bias", "modules_to_save", "exclude_modules", *TARGETS}
    left_out |= {field.name for field in dataclasses.fields(PeftConfig)}
    names = [field.name for field in dataclasses.fields(config) if field.name not in left_out]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    found = {"peft_type": kind, **{name: getattr(config, name) for name in names}}
    if "fan_in_fan_out" in found:
        found["fan_in_fan_out"] = _transposed(source)
    bias = str(source.adapter.config.get("bias") or "none")
    if bias.endswith("_only"):
        entry = type_of({"peft_type": kind})
        assert entry is not None  # a form makes adapters of a type that is read
        found["bias"] = entry.bias_setting
    return found


def targets_of(source: Source, modules: list[str]) -> dict[str, Any]:
    """How a type that knows no `exclude_modules` says which layers it adapts.

    Args:
        source: the adapter whose layers they are.
        modules: those that have a change left.
    """
    old = source.adapter.config
    same = set(modules) == set(source.contents.modules) and not source.lacking.notes
    if same and old.get("target_modules") and not old.get("exclude_modules"):
        return {name: old.get(name) for name in TARGETS}
    return {"target_modules": sorted(modules), "layers_to_transform": None, "layers_pattern": None}


def _transposed(source: Source) -> bool:
    """Whether all layers are stored `(in, out)`; PEFT corrects it layer by layer where it loads them."""
    if source.sites:
        return all(site.transposed for site in source.sites)
    return bool(source.adapter.config.get("fan_in_fan_out", False))
