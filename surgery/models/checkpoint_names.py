"""From the parameters of a model to the tensors of its checkpoint, by transformers' own conversion rules.

A checkpoint's names differ from the model's by more than a prefix: transformers 5 renames, splits, stacks and
permutes tensors while loading. The rules are transformers'; this module only asks them where a parameter comes
from, so that one parameter can be read without building the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

__all__ = ["Source", "parameter_sources"]


@dataclass
class Source:
    """Where one parameter's values come from.

    Attributes:
        keys: the checkpoint's tensor names, each with the pattern of the conversion rule that took it.
        first_target: the parameter under which the rule collects its tensors.
        converter: the rule that turns the tensors into the parameter, or None where it is one tensor as it is.
    """

    first_target: str
    keys: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None

    def read(self, parameter: str, model: Any, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The values of `parameter`, from tensors fetched by `read(checkpoint_key)`."""
        if self.converter is None:
            return read(self.keys[0][0])
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.first_target, key, pattern, lambda key=key: read(key))
        converted = converter.convert(self.first_target, model=model, config=model.config)
        value = converted[parameter]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor


def parameter_sources(model: Any, keys: Iterable[str]) -> dict[str, Source]:
    """Match the checkpoint's tensor names to the model's parameters.

    Args:
        model: a transformers model, on the meta device or not.
        keys: the checkpoint's tensor names.

    Returns:
        The source of every parameter of `model` that the checkpoint holds. Tied parameters share one source.
        Checkpoint tensors that the model has no place for are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if target not in parameters and key in parameters:
            target, pattern = rename_source_key(key, [], [], prefix, parameters)
        if target not in parameters:
            continue
        if pattern is None:
            sources[target] = Source(target, [(key, key)])
            continue
        converter = by_pattern[pattern]
        source = sources.setdefault(target, Source(target, converter=converter))
        source.keys.append((key, pattern))
        # One tensor may hold several parameters (a fused qkv): each of them is read through the same rule.
        for other in converter.target_patterns[1:]:
            sources.setdefault(target.replace(converter.target_patterns[0], other), source)
    for tied, original in getattr(model, "all_tied_weights_keys", {}).items():
        for parameter, other in ((tied, original), (original, tied)):
            if parameter not in sources and other in sources and sources[other].converter is None:
                sources[parameter] = sources[other]
    return sources
