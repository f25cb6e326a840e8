"""An adapter under other names of its modules: tensors, targets, patterns and all else that names a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.types.patterns import pattern_value
from surgery.adapters.wrapper_names import type_prefix
from surgery.models.sites import EXPERT, shortest_targets

__all__ = ["adapted_modules", "renamed_adapter"]

# Keys that choose among the targets by the names of before; the new targets say the same by themselves.
CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Settings of single layers, and the setting of all other layers.
PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
DEFAULT = 8


def adapted_modules(adapter: Adapter) -> list[str]:
    """The modules that have tensors of the adapter's own type, in the file's order; saved modules are none."""
    if adapter.type is not None:
        return list(dict.fromkeys(filter(None, adapter.names.owners.values())))
    prefix = type_prefix(adapter.peft_type)
    return [
        module
        for module, tensors in adapter.modules.items()
        if module and prefix and any(short.startswith(prefix) for short in tensors)
    ]


def renamed_adapter(adapter: Adapter, names: Mapping[str, str], model: nn.Module) -> Adapter:
    """A copy of an adapter under the names that its modules have in a model.

    Args:
        adapter: the adapter.
        names: the adapter's module name -> the model's; what is not there keeps its name.
        model: the model, which decides how short a target may be.
    """
    tensors = {}
    for module, parts in adapter.modules.items():
        start = f"{MODEL_PREFIX}{names.get(module, module)}." if module else TUNER_PREFIX
        tensors.update({f"{start}{short}": tensor for short, tensor in parts.items()})
    return adapter.like(_config(adapter, names, model), tensors)


def _config(adapter: Adapter, names: Mapping[str, str], model: nn.Module) -> dict[str, Any]:
    config = dict(adapter.config)
    adapted = adapted_modules(adapter)
    experts = [module for module in adapted if adapter.form(module).kind == EXPERT]
    modules = [names.get(module, module) for module in adapted if module not in set(experts)]
    config["target_modules"] = shortest_targets(model, modules)
    if experts:
        config["target_parameters"] = sorted({names.get(m, m).rpartition(".")[0] for m in experts})
    config.update({key: None for key in CHOICES if config.get(key) is not None})
    for key, settings in PATTERNS.items():
        if config.get(key):
            default = next((config[setting] for setting in settings if config.get(setting) is not None), DEFAULT)
            config[key] = _pattern(adapter, key, default, names, adapted)
    for key in ("packed", "kinds", "gains"):
        if config.get(key):
            config[key] = {names.get(module, module): value for module, value in config[key].items()}
    return config


def _pattern(
    adapter: Adapter, key: str, default: Any, names: Mapping[str, str], adapted: list[str]
) -> dict[str, float | int]:
    """The values that differ from the default, by the new names of the layers."""
    values = {module: pattern_value(adapter.config, key, module, default) for module in adapted}
    return {
        names.get(module, module): int(value) if value == int(value) else value
        for module, value in values.items()
        if value != default
    }
