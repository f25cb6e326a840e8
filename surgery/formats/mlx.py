"""MLX (mlx-lm): `adapters.safetensors` with `lora_a (in, r)` and `lora_b (r, out)`, one scale for all layers.

Its rule: `dW = scale (lora_a lora_b)^T`; with DoRA's `m`, `W + dW = diag(m / |W + scale (lora_a lora_b)^T|_row) (...)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.companions import companion_files
from surgery.adapters.format_registry import AdapterParts
from surgery.adapters.names import CONFIG_FILE, MODEL_PREFIX
from surgery.adapters.types.lora import A_NAME, B_NAME
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.formats.server import FLOAT_TYPES, ServerFormat, base_name, factors_of, saved_modules
from surgery.storage.folder_checks import check_link
from surgery.storage.json_files import read_json, write_json
from surgery.storage.safetensors_read import read_tensors
from surgery.storage.safetensors_write import verify_file, write_tensors

__all__ = ["MLX"]

MLX_FILE = "adapters.safetensors"
# Layers that mlx-lm has under the names of transformers: those of Llama and of the models shaped like it.
KNOWN = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+|lm_head")
NAMES = {"lora_a": A_NAME, "lora_b": B_NAME, "m": "lora_magnitude_vector"}


class MlxFormat(ServerFormat):
    """Adapters of mlx-lm."""

    title = "MLX (mlx-lm)"

    def recognises(self, folder: Path) -> bool:
        if not (folder / MLX_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
            return False
        try:
            config = read_json(folder / CONFIG_FILE)
        except CheckpointError:
            return True  # its own reader names what is broken
        return "peft_type" not in config

    def read(self, folder: Path) -> AdapterParts:
        kind, settings, model = _settings(folder)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in read_tensors(folder / MLX_FILE).items():
            module, _, short = name.rpartition(".")
            if short not in NAMES or tensor.ndim != (1 if short == "m" else 2):
                raise AdapterError(
                    f"{folder / MLX_FILE}: {name} {tuple(tensor.shape)} is no part of a LoRA on a linear layer; train "
                    "without fused experts and with fine_tune_type lora or dora"
                )
            value = tensor if short == "m" else tensor.T.contiguous()
            tensors[f"{MODEL_PREFIX}{module}.{NAMES[short]}"] = value
        modules = sorted({name.removeprefix(MODEL_PREFIX).rpartition(".lora_")[0] for name in tensors})
        ranks = {module: int(tensors[f"{MODEL_PREFIX}{module}.{A_NAME}"].shape[0]) for module in _with_factors(tensors)}
        if not ranks or set(ranks) != set(modules):
            lost = listing(set(modules) - set(ranks), 3) or "every layer"
            raise AdapterError(f"{folder / MLX_FILE}: lacks lora_a or lora_b of {lost}; save the adapter again")
        rank, scale = max(ranks.values()), _number(folder, settings, "scale")
        others = {module: own for module, own in ranks.items() if own != rank}
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": scale * rank,
            "rank_pattern": others,
            "alpha_pattern": {module: scale * own for module, own in others.items()},
            "target_modules": modules,
            "use_dora": kind == "dora",
            "base_model_name_or_path": model,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }
        return AdapterParts(
            config,
            tensors,
            folder / MLX_FILE,
            notes=["read from the files of mlx-lm"],
            companions=companion_files(folder),
        )

    def refusals(self, parts: AdapterParts) -> list[str]:
        found = [f"{name} is saved whole, and mlx-lm reads factors alone" for name in saved_modules(parts)]
        odd = [module for module in factors_of(parts) if not KNOWN.fullmatch(module)]
        return [*found, *(f"{module} is a layer that mlx-lm may have under another name" for module in odd)]

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        return [f"mlx_lm.generate --model {base_name(parts)} --adapter-path {out} --prompt ..."]

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        factors = self.stored(parts) if parts.dtype is not None else factors_of(parts)
        lost = saved_modules(parts)
        if lost:
            raise AdapterError(f"{label}: {lost[0]} is saved whole, and mlx-lm reads factors alone")
        dtype = FLOAT_TYPES[parts.dtype or "float32"]
        tensors = {}
        for module, (B, A) in factors.items():  # the scale is in B
            tensors[f"{module}.lora_a"] = A.T.to(dtype).contiguous()
            tensors[f"{module}.lora_b"] = B.T.to(dtype).contiguous()
        ranks = {int(A.shape[0]) for _, A in factors.values()}
        if len(ranks) != 1:
            raise AdapterError(
                f"{label}: mlx-lm reads one rank for all layers, this adapter has "
                f"{listing(map(str, sorted(ranks)), 4)}; bring it to one rank with surgery convert --to lora"
            )
        digests = write_tensors(folder / MLX_FILE, tensors, {"format": "mlx"})
        config = {
            "fine_tune_type": "lora",
            "model": parts.config.get("base_model_name_or_path"),
            "num_layers": -1,  # all blocks: a number counts from the last one, and weights of others are refused
            "lora_parameters": {
                "rank": ranks.pop(),
                "scale": 1.0,
                "dropout": 0.0,
                "keys": sorted({_inside_block(module) for module in factors}),
            },
        }
        write_json(folder / CONFIG_FILE, config)
        verify_file(folder / MLX_FILE, digests, label)
        return (folder / MLX_FILE).stat().st_size

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        _, settings, _ = _settings(folder)
        scale = _number(folder, settings, "scale")
        tensors = read_tensors(folder / MLX_FILE)
        for name, first in tensors.items():
            if name.endswith(".lora_a"):
                module = name.removesuffix(".lora_a")
                yield module, scale * (first.float() @ tensors[f"{module}.lora_b"].float()).T


def _settings(folder: Path) -> tuple[str, Mapping[str, Any], str | None]:
    """Return the kind of fine-tuning, its parameters, and the base model's name."""
    check_link(folder / CONFIG_FILE, folder)
    config = read_json(folder / CONFIG_FILE)
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):  # whatever is there, tables too
        raise AdapterError(
            f"{folder}: was made by mlx-lm with fine_tune_type {kind!r:.40}: only lora and dora are adapters; fuse it "
            "with mlx_lm.fuse"
        )
    if not isinstance(settings, dict):
        raise AdapterError(f"{folder / CONFIG_FILE}: has no lora_parameters; save the adapter with mlx-lm again")
    model = config.get("model")
    return str(kind), settings, model if isinstance(model, str) else None


def _number(folder: Path, settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise AdapterError(f"{folder / CONFIG_FILE}: lora_parameters has {key} {value!r:.40}, expected a number")
    return float(value)


def _with_factors(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    ends = f".{A_NAME}", f".{B_NAME}"
    first, second = (
        {name.removeprefix(MODEL_PREFIX).removesuffix(end) for name in tensors if name.endswith(end)} for end in ends
    )
    return sorted(first & second)


def _inside_block(module: str) -> str:
    """Return a layer's name after the number of its block, as mlx-lm lists its keys."""
    parts = module.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


MLX = MlxFormat()
