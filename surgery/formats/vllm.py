"""vLLM: PEFT's folder, as far as its LoRA loader goes: dense 2-D factors, one rank, nothing saved whole but a score.

Its rule: `dW = s B A` with `s` from `lora_alpha`, `r` and the patterns, as in PEFT. The rank must not pass
`--max-lora-rank`, which takes a few values only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.format_registry import AdapterParts
from surgery.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from surgery.errors import AdapterError
from surgery.formats.server import (
    Factors,
    Place,
    ServerFormat,
    base_name,
    cast,
    factors_of,
    read_factors,
    saved_modules,
)
from surgery.models.sites import EXPERT, LINEAR
from surgery.storage.json_files import read_json
from surgery.storage.safetensors_read import read_tensors

if TYPE_CHECKING:
    from surgery.models.base_model import BaseModel

__all__ = ["VLLM", "PeftServerFormat"]

# What `--max-lora-rank` takes.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# One expert of a parameter in which transformers joins all of them.
FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<parameter>[A-Za-z]\w*)\.(?P<index>\d+)")
ONE_LAYER = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Models in whose `gate_up_proj` the rows of gate and up take turns.
IN_TURNS = ("gpt_oss",)
# Modules that vLLM reads from `modules_to_save`.
SAVED = ("classifier", "score")


class PeftServerFormat(ServerFormat):
    """PEFT's two files, for servers that read them."""

    def stored(self, parts: AdapterParts) -> dict[str, Factors]:
        # The scale is in the configuration, and not rounded.
        return dict(factors_of(replace(parts, tensors=cast(parts))))

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        made = Adapter(parts.config, cast(parts), parts.provenance, parts.card)
        made.companions = dict(parts.companions)
        return made.write(folder, label)


class VllmFormat(PeftServerFormat):
    """Adapters for vLLM."""

    title = "vLLM"
    kinds = (LINEAR, EXPERT)

    def pieces(self, module: str, height: int, base: BaseModel | None) -> list[Place]:
        """Return an expert of a fused parameter under vLLM's names: gate and up share A, and have half of B each."""
        found = FUSED.fullmatch(module)
        if found is None:
            return [Place(module)]
        name = f"{found['experts']}.{found['index']}"
        if found["parameter"] in ONE_LAYER:
            return [Place(f"{name}.{found['parameter']}")]
        if found["parameter"] != "gate_up_proj":
            raise AdapterError(f"{module}: vLLM's name for experts of {found['parameter']} is not known here")
        if base is None:
            raise AdapterError(
                f"{module}: whether gate and up take turns in its rows depends on the base model: give it with --base"
            )
        rows = torch.arange(height)
        in_turns = base.config.model_type in IN_TURNS
        gate, up = (rows[::2], rows[1::2]) if in_turns else rows.split(height // 2)
        return [Place(f"{name}.gate_proj", gate), Place(f"{name}.up_proj", up)]

    def refusals(self, parts: AdapterParts) -> list[str]:
        saved = [name for name in saved_modules(parts) if name.split(".")[-2] not in SAVED]
        found = [f"{name} is saved whole, and vLLM reads only {' and '.join(SAVED)} so" for name in saved]
        rank = int(parts.config["r"])
        if rank > MAX_RANKS[-1]:
            found.append(f"rank {rank} is above vLLM's largest max_lora_rank, {MAX_RANKS[-1]}; cut it with --rank")
        return found

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        config, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
        for key in ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora"):
            if config.get(key):
                raise AdapterError(f"{folder}: vLLM does not read adapters with {key}")
        if config.get("bias", "none") != "none":
            raise AdapterError(f"{folder}: vLLM does not read adapters with trained biases")
        for module, B, A in read_factors(tensors, folder):
            rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
            alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
            if A.shape[0] != rank:
                raise AdapterError(f"{folder}: {module} has rank {A.shape[0]}, the configuration says {rank}")
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            yield module, scale * (B @ A)

    def settings(self, parts: AdapterParts) -> dict[str, Any]:
        return {"max_lora_rank": next(size for size in MAX_RANKS if size >= int(parts.config["r"]))}

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        base, size = base_name(parts), self.settings(parts)["max_lora_rank"]
        return [f"vllm serve {base} --enable-lora --max-lora-rank {size} --lora-modules {Path(out).name}={out}"]

    def notes(self, parts: AdapterParts) -> list[str]:
        name = parts.config.get("base_model_name_or_path")
        if not name:
            return [
                "base_model_name_or_path is empty: vLLM's resolvers will not find the adapter; give --base ORG/NAME"
            ]
        return [
            f"vLLM's resolvers compare base_model_name_or_path, {name!r}, letter by letter with the model's name after "
            "`vllm serve`"
        ]


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the number of a layer by a pattern: vLLM takes the first that matches the end of its name at a dot."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


VLLM = VllmFormat()
