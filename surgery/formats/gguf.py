"""GGUF, which llama.cpp and Ollama read: `<tensor>.lora_a (r, in)` and `.lora_b (out, r)` under llama.cpp's names.

Its rule: `dW = s B A` with `s = alpha / (the rank of that tensor)`, and `s = 1` for `alpha = 0`. The files written here
have alpha 0 and the scale in B. Llama's q and k have their rows in another order than in the checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.adapters.companions import copy_companions
from surgery.adapters.format_registry import AdapterParts
from surgery.errors import AdapterError, MethodError, OptionError, OutputError, first_line
from surgery.formats.server import Factors, Place, ServerFormat, factors_of, saved_modules
from surgery.system.extras import extra_package

__all__ = ["GGUF_FILE", "LLAMA_CPP", "GgufFormat"]

GGUF_FILE = "adapter.gguf"
BLOCK = 32  # numbers of q8_0 that share a scale


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a model.

    Attributes:
        name: of its `MODEL_ARCH` in the gguf package.
        rotated: whether the rows of q and k are in the order of pairs instead of halves.
    """

    name: str
    rotated: bool = False


# transformers' `model_type` -> llama.cpp's. Only models whose linear weights keep their shapes in llama.cpp.
ARCHITECTURES = {
    "llama": Architecture("LLAMA", rotated=True),
    "mistral": Architecture("LLAMA", rotated=True),
    "granite": Architecture("GRANITE", rotated=True),
    "smollm3": Architecture("SMOLLM3", rotated=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA"),
    "gemma2": Architecture("GEMMA2"),
    "gemma3_text": Architecture("GEMMA3"),
    "phi": Architecture("PHI2"),
    "phi3": Architecture("PHI3"),
    "gpt2": Architecture("GPT2"),
    "starcoder2": Architecture("STARCODER2"),
    "stablelm": Architecture("STABLELM"),
    "olmo2": Architecture("OLMO2"),
}
# What llama.cpp does not adapt, by the end of its name for the tensor.
NOT_ADAPTED = {"output": "the output head", "token_embd": "the embeddings"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


class GgufFormat(ServerFormat):
    """Adapters for llama.cpp."""

    title = "llama.cpp"
    dtypes = tuple(TYPES)
    needs_base = "its names of tensors follow the model's architecture"

    def recognises(self, folder: Path) -> bool:
        return (folder / GGUF_FILE).is_file()

    def refusals(self, parts: AdapterParts) -> list[str]:
        found = [f"{name} is saved whole, and a GGUF adapter has factors alone" for name in saved_modules(parts)]
        architecture, names = _architecture(parts), _names(parts)
        for module in factors_of(parts):
            name = names(module)
            if name is None:
                found.append(f"{module} has no name in llama.cpp's {architecture.name}")
            elif name in NOT_ADAPTED:
                found.append(f"{module} is {NOT_ADAPTED[name]}, which llama.cpp does not adapt")
        return found

    def places(self, parts: AdapterParts) -> dict[str, Place]:
        names, architecture = _names(parts), _architecture(parts)
        placed = {}
        for module, (B, _) in factors_of(parts).items():
            heads = _rotated_heads(parts, module) if architecture.rotated else None
            placed[module] = Place(f"{names(module)}.weight", None if heads is None else _rotated_rows(B, heads))
        return placed

    def stored(self, parts: AdapterParts) -> dict[str, Factors]:
        quants = _package().quants
        found = {}
        for module, pair in factors_of(parts).items():
            types = _types(parts.dtype, pair)
            B, A = (
                torch.from_numpy(quants.dequantize(quants.quantize(factor.numpy(), kind), kind).copy())
                for factor, kind in zip(pair, types, strict=True)
            )
            found[module] = B, A
        return found

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        gguf, places = _package(), self.places(parts)
        path = folder / GGUF_FILE
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[_architecture(parts).name]])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp's word for: the scale is in B
        for module, (B, A) in factors_of(parts).items():
            place, types = places[module], _types(parts.dtype, (B, A))
            rows = B if place.rows is None else B[place.rows]
            for short, factor, kind in (("lora_a", A, types[1]), ("lora_b", rows, types[0])):
                data = gguf.quants.quantize(np.ascontiguousarray(factor.numpy()), kind)
                writer.add_tensor(f"{place.name}.{short}", data, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            raise OutputError(f"{label}: {GGUF_FILE} cannot be written ({error.strerror or error})") from None
        finally:
            writer.close()
        copy_companions(parts.companions, folder)
        return path.stat().st_size

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        gguf, path = _package(), folder / GGUF_FILE
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise AdapterError(f"{path}: is no GGUF file ({first_line(error)})") from None
        field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
        if field is None:
            raise AdapterError(f"{path}: has no {gguf.Keys.Adapter.LORA_ALPHA}, it is no LoRA")
        alpha = float(field.contents())
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        for name in tensors:
            if name.endswith(".lora_a"):
                stem = name.removesuffix(".lora_a")
                if f"{stem}.lora_b" not in tensors:
                    raise AdapterError(f"{path}: {name} has no lora_b")
                A, B = (_numbers(tensors[each]) for each in (name, f"{stem}.lora_b"))
                yield stem, (alpha / B.shape[1] if alpha else 1.0) * (B @ A)

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        return [f"llama-server -m BASE.gguf --lora {out}/{GGUF_FILE}"]


def _package() -> Any:
    """Import the gguf package.

    Raises:
        MethodError: it is not installed.
    """
    gguf = extra_package("gguf", "a GGUF file", MethodError)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def _architecture(parts: AdapterParts) -> Architecture:
    assert parts.base is not None
    kind = parts.base.config.model_type
    if kind not in ARCHITECTURES:
        raise AdapterError(
            f"{parts.base.name}: models of the type {kind} are not exported to llama.cpp yet, only "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[kind]


def _names(parts: AdapterParts) -> Any:
    """Return a function from a module's name to that of its tensor in llama.cpp, or None."""
    gguf = _package()
    assert parts.base is not None
    blocks = int(getattr(parts.base.config, "num_hidden_layers", 0))
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[_architecture(parts).name], blocks).get_name


def _rotated_heads(parts: AdapterParts, module: str) -> int | None:
    """Return how many heads a q or k projection has; None for another layer."""
    assert parts.base is not None
    config, name = parts.base.config, module.rpartition(".")[2]
    if name == "q_proj":
        return int(config.num_attention_heads)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) if name == "k_proj" else None


def _rotated_rows(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the order of the rows in which llama.cpp has q or k of Llama: halves of a head as pairs."""
    rows = torch.arange(B.shape[0])
    return rows.reshape(heads, 2, B.shape[0] // heads // 2).transpose(1, 2).reshape(-1)


def _types(dtype: str | None, pair: Factors) -> list[Any]:
    """Return gguf's types of B and A: rows that q8_0 cannot divide into blocks are left in half precision."""
    kinds = _package().GGMLQuantizationType
    if dtype is not None and dtype not in TYPES:
        raise OptionError(f"unknown dtype {dtype!r}: use {', '.join(TYPES)}")
    name = TYPES[dtype or "float32"]
    return [kinds[name if name != "Q8_0" or factor.shape[1] % BLOCK == 0 else "F16"] for factor in pair]


def _numbers(tensor: Any) -> torch.Tensor:
    quants, shape = _package().quants, [int(n) for n in reversed(tensor.shape)]
    numbers = quants.dequantize(tensor.data, tensor.tensor_type)
    if math.prod(shape) != numbers.size or len(shape) != 2:
        raise AdapterError(f"{tensor.name}: has shape {shape}, expected a matrix")
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(shape)


LLAMA_CPP = GgufFormat()
