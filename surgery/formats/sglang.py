"""SGLang: PEFT's folder under two rules of its own.

The scale of every layer is `lora_alpha / r` of the configuration, and every factor has that rank. q, k and v of a block
are stacked, as are gate and up: where one of them is adapted, q and v, or gate and up, must be there; zeros will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from surgery.adapters.format_registry import AdapterParts
from surgery.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from surgery.errors import AdapterError
from surgery.formats.server import Factors, base_name, factors_of, read_factors, saved_modules, with_factors
from surgery.formats.vllm import PeftServerFormat
from surgery.storage.json_files import read_json
from surgery.storage.safetensors_read import read_tensors

__all__ = ["SGLANG"]

# Layers that SGLang stacks into one -> those that must be there where one of them is adapted (k may be left out).
STACKED = {("q_proj", "k_proj", "v_proj"): ("q_proj", "v_proj"), ("gate_proj", "up_proj"): ("gate_proj", "up_proj")}
SAME_HEIGHT = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


class SglangFormat(PeftServerFormat):
    """Adapters for SGLang."""

    title = "SGLang"

    def refusals(self, parts: AdapterParts) -> list[str]:
        return [f"{name} is saved whole, and SGLang reads factors alone" for name in saved_modules(parts)]

    def prepared(self, parts: AdapterParts) -> AdapterParts:
        factors = factors_of(parts)
        added: dict[str, Factors] = {}
        for module, sibling in _missing(factors):
            height = _height(parts, factors, sibling)
            if height is None:
                raise AdapterError(
                    f"{module}: is adapted without {sibling}, which SGLang reads with it; give the model with --base, "
                    "so that zeros of its size can be written"
                )
            A = factors[module][1]
            added[sibling] = torch.zeros(height, A.shape[0]), torch.zeros_like(A)
        return with_factors(parts, added) if added else parts

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        config, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
        layers = {module: (B, A) for module, B, A in read_factors(tensors, folder)}
        lost = next(_missing(layers), None)
        if lost is not None:
            raise AdapterError(f"{folder}: SGLang stacks {lost[0]} with {lost[1]}, which the file lacks")
        for module, (B, A) in layers.items():
            if A.shape[0] != config["r"]:
                raise AdapterError(f"{folder}: {module} has rank {A.shape[0]}, SGLang asserts r, {config['r']}")
            yield module, float(config["lora_alpha"]) / config["r"] * (B @ A)

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        name = Path(out).name
        load = f'{{"lora_name": "{name}", "lora_path": "{out}"}}'
        return [
            f"python -m sglang.launch_server --model-path {base_name(parts)} --enable-lora --lora-paths {name}={out} "
            f"--max-lora-rank {parts.config['r']}",
            f"curl -X POST http://127.0.0.1:30000/load_lora_adapter -H 'Content-Type: application/json' -d '{load}'",
        ]

    def notes(self, parts: AdapterParts) -> list[str]:
        zeros = [module for module, (B, _) in factors_of(parts).items() if not bool(B.any())]
        if not zeros:
            return []
        return [f"{len(zeros)} layers are zeros (first {zeros[0]}): SGLang stacks them with their neighbours"]


def _missing(layers: Mapping[str, Factors]) -> Iterator[tuple[str, str]]:
    """Yield an adapted layer and one that SGLang stacks with it and that is not adapted, for each of the latter."""
    seen = set()
    for module in layers:
        parent, _, name = module.rpartition(".")
        for group, needed in STACKED.items():
            for other in needed if name in group else ():
                sibling = f"{parent}.{other}"
                if sibling not in layers and sibling not in seen:
                    seen.add(sibling)
                    yield module, sibling


def _height(parts: AdapterParts, factors: Mapping[str, Factors], module: str) -> int | None:
    """Return how many rows a layer has: by the base, by the layer of that name elsewhere, or by one as high."""
    if parts.base is not None:
        shape = parts.base.shapes.get(f"{module}.weight")
        return int(shape[0]) if shape is not None else None
    role = re.sub(r"\.\d+\.", ".*.", module)
    parent, _, name = module.rpartition(".")
    twins = [other for other in factors if re.sub(r"\.\d+\.", ".*.", other) == role]
    twins += [twin for twin in [f"{parent}.{SAME_HEIGHT.get(name)}"] if twin in factors]
    return int(factors[twins[0]][0].shape[0]) if twins else None


SGLANG = SglangFormat()
