"""Types of PEFT whose weight change PEFT itself computes, on one layer of the right shape at a time.

Where no formula of ours is worth writing, the layer's tensors are put on a single linear layer with the base weight (or
with zeros, where the change depends on nothing but the shape), under the layer's own name, so that patterns by name
hold; PEFT merges it in float64, and what the weight has moved by is the change.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.adapters.types.base import (
    MERGE_IN_PEFT,
    AdapterFile,
    AdapterType,
    BaseWeights,
    Changes,
    Needs,
    in_float32,
    with_shared,
)
from surgery.adapters.types.config_rules import Rule
from surgery.deltas.operators import Delta, Dense
from surgery.errors import AdapterError
from surgery.models.sites import Site
from surgery.system.tensors import TensorMap
from surgery.system.threads import one_torch_thread

__all__ = ["THROUGH_PEFT", "PeftType"]

MODEL_PREFIX, TUNER_PREFIX = "base_model.model.", "base_model."
# Choices of layers by name or number: here one layer is meant.
CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")


@dataclass(frozen=True)
class PeftType(AdapterType):
    """A type that is read through PEFT.

    Attributes:
        base_needs: what the change needs of the base weight.
        shared: names of tensors that stand once above the model.
        dtype: in which PEFT computes it.
        turns_bias: whether it changes what a layer's own bias adds, so that only layers without one are read.
        values_when: settings under which it needs the base weight's values: key -> values.
    """

    peft_type: str
    title: str
    prefix: str
    base_needs: Needs = Needs.SHAPE
    paper: str | None = None
    change: str | None = None
    shared: frozenset[str] = frozenset()
    values_when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    turns_bias: bool = False
    starts_idle: bool = False
    bias_setting: str = "adapter_only"
    thin: bool = False
    whole_numbers: bool = True  # positions of the numbers that are trained
    rules: Mapping[str, Rule] = field(default_factory=dict)

    def needs(self, config: Mapping[str, Any]) -> Needs:
        if any(config.get(key) in values for key, values in self.values_when.items()):
            return Needs.VALUES
        return self.base_needs

    def short_name(self, stem: str) -> tuple[str, str] | None:
        parts = stem.split(".")
        place = next((i for i, part in enumerate(parts) if part.startswith(self.prefix)), None)
        return None if place is None else (".".join(parts[:place]), ".".join(parts[place:]))

    @property
    def shared_names(self) -> frozenset[str]:
        return self.shared

    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        empty = next((name for name, tensor in tensors.items() if not tensor.numel()), None)
        if empty is not None:
            raise AdapterError(f"{module}: {empty} is empty; the file is incomplete; save the adapter again")

    def output_bias(
        self, config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.turns_bias and bias is not None:
            raise AdapterError(f"{module}: a {self.title} adapter changes the layer's own bias, too; {MERGE_IN_PEFT}")
        return None

    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        return _PeftChanges(self, file)


class _PeftChanges(Changes):
    def __init__(self, kind: PeftType, file: AdapterFile) -> None:
        self.kind, self.file = kind, file

    def delta(self, module: str, weight: torch.Tensor | None = None, site: Site | None = None) -> Delta:
        parts = with_shared(self.kind, self.file, self.file.layer(module))
        self.kind.check_layer(self.file.config, module, parts)
        for name, tensor in parts.items():
            self.kind.check_numbers(f"{module}.{name}", tensor)
        if weight is None:
            raise AdapterError(f"{module}: the change of a {self.kind.title} layer depends on its base weight; give it")
        # PEFT's own start draws numbers, which the file's replace: the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_torch_thread():
            warnings.simplefilter("ignore")
            dense = self._merged(module, in_float32(parts, "cpu"), weight.detach().cpu())
        return Dense(dense.float().to(weight.device))

    def _merged(self, module: str, tensors: TensorMap, weight: torch.Tensor) -> torch.Tensor:
        """Return what PEFT's merge adds to the weight of one layer."""
        from peft import get_peft_model, set_peft_model_state_dict
        from peft.utils import get_peft_model_state_dict

        reads_values = self.kind.needs(self.file.config) is Needs.VALUES
        dtype = self.kind.dtype
        base = weight.to(dtype) if reads_values else torch.zeros(weight.shape, dtype=dtype)
        named = {_file_name(module, name, self.kind): tensor for name, tensor in tensors.items()}
        try:
            model: Any = get_peft_model(_holder(module, base.clone()), self._config(module)).to(dtype).eval()
            known = get_peft_model_state_dict(model, save_embedding_layers=False)
            set_peft_model_state_dict(model, dict(named))
            merged = model.merge_and_unload().get_submodule(module).weight.detach()
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise AdapterError(f"{module}: PEFT cannot compute its {self.kind.title} change ({reason})") from None
        lost = sorted(set(known) - set(named))
        if lost or not set(named) <= set(known):
            odd = lost[0] if lost else min(set(named) - set(known))
            what = "lacks" if lost else "has"
            raise AdapterError(
                f"{self.file.label}: the file {what} {odd}, unlike PEFT's {self.kind.title}; save the adapter again"
            )
        return merged - base

    def _config(self, module: str) -> Any:
        """The file's configuration, for one layer that is trained."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = next(
            key for key in PEFT_TYPE_TO_CONFIG_MAPPING if str(getattr(key, "value", key)) == self.kind.peft_type
        )
        settings = {key: value for key, value in self.file.config.items() if key not in CHOICES}
        settings |= {"target_modules": [module], "inference_mode": False, "task_type": None, "bias": "none"}
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_peft_type(**settings)


def _holder(module: str, weight: torch.Tensor) -> nn.Module:
    """A model that is one linear layer, under its own name."""
    line = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    line.weight = nn.Parameter(weight, requires_grad=False)
    inner: nn.Module = line
    for part in reversed(module.split(".")):
        outer = nn.Module()
        outer.add_module(part, inner)
        inner = outer
    return inner


def _file_name(module: str, short: str, kind: PeftType) -> str:
    return f"{TUNER_PREFIX}{short}" if short in kind.shared else f"{MODEL_PREFIX}{module}.{short}"


THROUGH_PEFT = {
    kind.peft_type: kind
    for kind in (
        PeftType(
            "MISS", "MiSS", "miss_", paper="arXiv 2409.15371", starts_idle=True, values_when={"init_weights": ("bat",)}
        ),
        PeftType("C3A", "C3A", "c3a_", paper="arXiv 2407.19342"),
        PeftType("DELORA", "DeLoRA", "delora_", Needs.VALUES, paper="arXiv 2503.18225"),
        PeftType("FOURIERFT", "FourierFT", "fourierft_", paper="arXiv 2405.03003"),
        PeftType("GRALORA", "GraLoRA", "gralora_", paper="arXiv 2505.20355"),
        PeftType("PSOFT", "PSOFT", "psoft_", Needs.VALUES, paper="arXiv 2505.11235", dtype=torch.float32),
        PeftType("SHIRA", "SHiRA", "shira_", paper="arXiv 2406.13175"),
        PeftType("VBLORA", "VB-LoRA", "vblora_", paper="arXiv 2405.15179", shared=frozenset({"vblora_vector_bank"})),
        PeftType("WAVEFT", "WaveFT", "waveft_", paper="arXiv 2505.12532"),
        PeftType("DEFT", "DEFT", "deft_", Needs.VALUES),
        PeftType("PEANUT", "PEANuT", "peanut_", Needs.VALUES),
        PeftType("ROAD", "RoAd", "road_", Needs.VALUES, paper="arXiv 2409.00119", turns_bias=True),
    )
}
