"""Names of modules and parameters, looked up in a model by every name that transformers has given them.

An adapter carries the names of the class that it was trained on: of this transformers or of an older one, whose names
the base's files still have; of a model with a head or without; of a text model alone that is a part of the base. The
rules from old names to new ones are transformers' own (`conversion_mapping`), so that a name is understood here exactly
as transformers understands it in a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["FusedPart", "ModelNames"]

# Levels by which a composite model's names differ from those of its text model.
TEXT_LEVELS = ("language_model", "text_model")
# Levels of parts that are not the text model: a name through them never means a layer of a text model.
OTHER_PARTS = ("vision", "visual", "audio", "image", "speech", "qformer", "connector")
# The name of a weight, by which a module is looked up among parameters.
WEIGHT = ".weight"


@dataclass(frozen=True)
class FusedPart:
    """A tensor that transformers joins with others, or splits, while loading.

    Attributes:
        key: its name in the notation of the rule: as in the checkpoint, or with another prefix.
        target: the parameter under which the rule collects its tensors.
        pattern: the pattern of the rule that takes it.
        converter: the rule.
    """

    key: str
    target: str
    pattern: str
    converter: WeightConverter

    def targets(self) -> list[str]:
        """Names of all parameters that the rule makes, the first one first."""
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


class ModelNames:
    """The names of a model's modules and parameters, and the rules that lead to them.

    Args:
        model: the model, on the meta device or not; of transformers or any other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._renamings: list[WeightRenaming] = []
        self._converters: list[WeightConverter] = []
        if isinstance(model, PreTrainedModel):
            # A class of a model's own code may lack what the rules ask it for.
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                transforms = get_model_conversion_mapping(model)
                self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
                self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._known = dict(self.parameters)  # transformers asks for a dictionary
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def has(self, name: str, names: Collection[str]) -> bool:
        """Whether the model has a name as it is, or with or without the prefix of a class with a head."""
        return self._with_prefix(name, names) is not None

    def located(self, name: str, names: Collection[str]) -> str | None:
        """The model's own name for a module or a parameter of another one; None where it has none.

        Args:
            name: as an adapter has it.
            names: the model's modules, or its parameters.
        """
        plain = self._with_prefix(name, names)
        return plain if plain is not None else self.translated(name, names)

    def translated(self, name: str, names: Collection[str]) -> str | None:
        """As `located`, but only for names that differ by more than the prefix of a class with a head."""
        for candidate in self._candidates(name):
            found = self._with_prefix(candidate, names)
            if found is None:
                found = self._by_rules(candidate, names)
            if found is not None:
                return found
        return None

    def fused_part(self, parameter: str) -> FusedPart | None:
        """The rule that joins or splits a tensor of this name while loading; None where there is none."""
        for candidate in self._candidates(parameter):
            target, pattern = self._renamed(candidate)
            converter = self._by_pattern.get(pattern or "")
            if pattern is not None and converter is not None and target in self.parameters:
                return FusedPart(candidate, target, pattern, converter)
        return None

    def origins(self, part: FusedPart) -> dict[str, torch.Tensor]:
        """Where the numbers of each tensor go that the rule of a part joins or splits.

        Returns:
            Tensors of indices by the names of the rule's sources (as `same_key` compares them), of the sources' shapes:
            an index counts through the numbers of the rule's parameters (`part.targets()`), one after the other. Empty
            where the rule cannot be followed backwards.
        """
        indices, start = {}, 0
        for target in part.targets():
            if target not in self.parameters:
                return {}
            shape = self.parameters[target].shape
            indices[target] = torch.arange(start, start + shape.numel()).reshape(shape)
            start += shape.numel()
        try:
            return revert_weight_conversion(self.model, indices)
        except Exception:  # a rule of transformers that knows no way back, or takes floating-point numbers only
            return {}

    def same_key(self, one: str, other: str) -> bool:
        """Whether two names are those of one tensor of the checkpoint, by old and new names of what is around it."""
        return self._plain(one) == self._plain(other)

    def _plain(self, key: str) -> str:
        return rename_source_key(key, self._renamings, [])[0].removeprefix(f"{self.prefix}.")

    def _with_prefix(self, name: str, names: Collection[str]) -> str | None:
        """The name as it is, or with or without the prefix of a class with a head."""
        candidates = (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))
        return next((candidate for candidate in candidates if candidate in names), None)

    def _by_rules(self, name: str, names: Collection[str]) -> str | None:
        """The name that the rules give, where they only rename."""
        found, pattern = self._renamed(name)
        if pattern is None and found in names:
            return found
        # Rules are made for parameters: their patterns may end in the dot that follows a module.
        found, pattern = self._renamed(f"{name}{WEIGHT}")
        found = found.removesuffix(WEIGHT)
        return found if pattern is None and found in names else None

    def _renamed(self, key: str) -> tuple[str, str | None]:
        if not self._renamings and not self._converters:
            return key, None
        return rename_source_key(key, self._renamings, self._converters, self.prefix, self._known)

    def _candidates(self, name: str) -> Iterator[str]:
        """Names that may stand for this one: itself, in the text model of a composite, of a composite's text model."""
        yield name
        parts = name.split(".")
        if any(word in part for part in parts for word in OTHER_PARTS):
            return
        for inner, prefix in self._text_models:
            rest = name.removeprefix(f"{prefix}.") if prefix else name
            if not name.startswith(f"{inner}."):
                yield f"{inner}.{rest}"
        if any(part in TEXT_LEVELS for part in parts):
            rest = ".".join(part for part in parts if part not in TEXT_LEVELS)
            yield rest
            while rest.startswith("model."):
                rest = rest.removeprefix("model.")
                yield rest

    @cached_property
    def _text_models(self) -> list[tuple[str, str]]:
        """The text model inside a composite one: its name there, and the prefix of its own class with a head."""
        if not isinstance(self.model, PreTrainedModel):
            return []
        found = []
        for name, module in self.modules.items():
            if isinstance(module, PreTrainedModel) and name.rpartition(".")[2] in TEXT_LEVELS:
                found.append((name, str(getattr(module, "base_model_prefix", "") or "model")))
        return found
