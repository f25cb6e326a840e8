"""VeRA (arXiv 2310.11454), PEFT's own type: `dW = diag(b) B diag(d) A` with one pair A, B for the whole model.

The pair stands above the model in the file, or is drawn again from its seed at the widths of the adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import AdapterFile, AdapterType, BaseWeights, Changes, Needs, in_float32
from surgery.adapters.types.config_rules import A_SEED, A_SWITCH
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, listing
from surgery.methods.registry import method_named
from surgery.methods.vera import projections
from surgery.models.sites import Site
from surgery.system.tensors import TensorMap

__all__ = ["VERA"]

LAYER_NAMES = frozenset({"vera_lambda_b", "vera_lambda_d"})


class VeraType(AdapterType):
    """VeRA's files: two vectors for each layer, and the shared projections where they are stored."""

    peft_type = "VERA"
    title = "VeRA"
    paper = "arXiv 2310.11454"
    change = "diag(b) B diag(d) A"
    prefix = "vera_lambda_"
    starts_idle = True
    bias_setting = "vera_only"
    rules = {"projection_prng_key": A_SEED, "save_projection": A_SWITCH}  # noqa: RUF012 - an entry is never changed

    def needs(self, config: Mapping[str, Any]) -> Needs:
        return Needs.SHAPE

    def short_name(self, stem: str) -> tuple[str, str] | None:
        module, _, last = stem.rpartition(".")
        return (module, last) if last in LAYER_NAMES else None

    @property
    def shared_names(self) -> frozenset[str]:
        return frozenset({"vera_A", "vera_B"})

    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        own = set(tensors) - self.shared_names
        if own != LAYER_NAMES:
            raise AdapterError(f"{module}: expected {listing(sorted(LAYER_NAMES))}, found {listing(sorted(own))}")

    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        return _VeraChanges(file, base)


class _VeraChanges(Changes):
    def __init__(self, file: AdapterFile, base: BaseWeights | None) -> None:
        self.file, self.method = file, method_named("vera")
        self.projections = self._projections(base)

    def delta(self, module: str, weight: torch.Tensor | None = None, site: Site | None = None) -> Delta:
        parts = self.file.layer(module)
        VERA.check_layer(self.file.config, module, parts)
        for name, tensor in parts.items():
            VERA.check_numbers(f"{module}.{name}", tensor)
        if weight is None:
            raise AdapterError(f"{module}: a VeRA file does not say how wide the layer is; give its base weight")
        return self.method.delta(None, in_float32({**parts, **self.projections}, weight.device), weight)

    def _projections(self, base: BaseWeights | None) -> TensorMap:
        stored = self.file.layer("")
        if "vera_A" in stored:
            return stored
        if base is None:
            raise AdapterError("the VeRA adapter stores no projections; open it with surgery.load")
        rank, key = self.file.config.get("r"), self.file.config.get("projection_prng_key")
        if not rank or key is None:
            raise AdapterError(f"{self.file.label}: adapter_config.json lacks r or projection_prng_key")
        A, B = projections(rank, list(base.sites), key)
        return {"vera_A": A, "vera_B": B}


VERA = VeraType()
