"""Formats that serving tools read: the interface of an export target, and what a plain LoRA of one rank consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.format_registry import AdapterParts, Format
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.types.lora import A_NAME, B_NAME, LORA, lora_delta
from surgery.errors import AdapterError, OptionError
from surgery.models.sites import LINEAR
from surgery.system.dtypes import DTYPES
from surgery.system.tensors import MadeTensors, TensorMap, planned

if TYPE_CHECKING:
    from surgery.models.base_model import BaseModel

__all__ = [
    "FLOAT_TYPES",
    "Factors",
    "Place",
    "ServerFormat",
    "base_name",
    "cast",
    "factors_of",
    "read_factors",
    "saved_modules",
    "with_factors",
]

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r) with the scale in it, A (r, in)
FLOAT_TYPES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Place:
    """Where a tool has the weight change of one layer.

    Attributes:
        name: the layer's name in the tool's file.
        rows: the order of the rows of dW there; None for that of the checkpoint.
    """

    name: str
    rows: torch.Tensor | None = None


class ServerFormat(Format):
    """A format that a serving tool reads, written from a plain LoRA of one rank.

    Attributes:
        title: the tool.
        dtypes: the types of numbers that it reads, by the names that `--dtype` takes.
        needs_base: what the base model is needed for; None for a format that needs none.
        planned: why nothing is written yet; None for a format that is written.
        kinds: the kinds of layers whose changes the tool reads.
    """

    dtypes: tuple[str, ...] = tuple(FLOAT_TYPES)
    needs_base: str | None = None
    planned: str | None = None
    kinds: tuple[str, ...] = (LINEAR,)

    def recognises(self, folder: Path) -> bool:
        return False  # such a folder is PEFT's, or it is only written

    def read(self, folder: Path) -> AdapterParts:
        raise AdapterError(f"{folder}: adapters for {self.title} are written, not read; give the adapter itself")

    def refusals(self, parts: AdapterParts) -> list[str]:
        """Return what the tool cannot hold of a plain LoRA, a phrase with the name of the layer or tensor for each."""
        return []

    def pieces(self, module: str, height: int, base: BaseModel | None) -> list[Place]:
        """Return the layers of the tool that one layer of the model is: mostly the layer itself.

        Args:
            module: the layer's name.
            height: the rows of its change.
            base: the base model, where one was given.

        Raises:
            AdapterError: this depends on the base model, and there is none.
        """
        return [Place(module)]

    def prepared(self, parts: AdapterParts) -> AdapterParts:
        """Return the LoRA as the tool wants it, with the same weight changes: layers of zeros may come in.

        Raises:
            AdapterError: something that this needs is not known.
        """
        return parts

    def places(self, parts: AdapterParts) -> dict[str, Place]:
        """Return where each layer's change is in the tool's file, by the layer's name."""
        return {module: Place(module) for module in factors_of(parts)}

    def stored(self, parts: AdapterParts) -> dict[str, Factors]:
        """Return the factors of each layer as the file will hold them, rounded to its type, float32, scale in B."""
        dtype = FLOAT_TYPES[parts.dtype or "float32"]
        return {module: (B.to(dtype).float(), A.to(dtype).float()) for module, (B, A) in factors_of(parts).items()}

    def settings(self, parts: AdapterParts) -> dict[str, Any]:
        """Return the settings that the server must be started with, by name."""
        return {}

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        """Return the commands by which the written adapter is served."""
        return []

    def notes(self, parts: AdapterParts) -> list[str]:
        """Return what the user should know of this adapter on this server."""
        return []


class FactorsByLayer(Mapping[str, Factors]):
    """The factors of every layer of a plain LoRA, float32, the scale in B; computed when they are asked for."""

    def __init__(self, parts: AdapterParts) -> None:
        self._parts, self._names = parts, _layers(parts)

    def __getitem__(self, module: str) -> Factors:
        tensors = {short: self._parts.tensors[name] for short, name in self._names[module].items()}
        return lora_delta(self._parts.config, module, tensors).factors()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def factors_of(parts: AdapterParts) -> Mapping[str, Factors]:
    """Return the factors of every layer of a plain LoRA.

    Raises:
        AdapterError: a layer has other tensors than these two, or no pair of them.
    """
    return FactorsByLayer(parts)


def saved_modules(parts: AdapterParts) -> list[str]:
    """Return the tensors that are saved whole, by the names of the model's parameters."""
    return [name.removeprefix(MODEL_PREFIX) for name in parts.tensors if _split(name) is None]


def base_name(parts: AdapterParts) -> str:
    """Return the base model's name in a command."""
    return str(parts.config.get("base_model_name_or_path") or "MODEL")


def with_factors(parts: AdapterParts, added: Mapping[str, Factors]) -> AdapterParts:
    """Return a LoRA of the same rank with more layers, whose B has no scale in it."""
    new = {f"{MODEL_PREFIX}{module}.{B_NAME}": B for module, (B, _) in added.items()}
    new |= {f"{MODEL_PREFIX}{module}.{A_NAME}": A for module, (_, A) in added.items()}
    tensors = MadeTensors({**planned(parts.tensors), **new}, parts.tensors.__getitem__)
    targets = sorted({*parts.config["target_modules"], *added})
    return replace(parts, config={**parts.config, "target_modules": targets}, tensors=tensors)


def cast(parts: AdapterParts) -> TensorMap:
    """Return the tensors in the file's type, cast when they are asked for; those that are saved whole stay as they are.

    Raises:
        OptionError: the type is not known.
    """
    if parts.dtype is not None and parts.dtype not in FLOAT_TYPES:
        raise OptionError(f"unknown dtype {parts.dtype!r}: use {', '.join(FLOAT_TYPES)}")
    wanted = FLOAT_TYPES.get(parts.dtype or "")
    if wanted is None:
        return parts.tensors
    shapes = {
        name: torch.empty(tensor.shape, dtype=wanted, device="meta") if _split(name) is not None else tensor
        for name, tensor in planned(parts.tensors).items()
    }
    return MadeTensors(shapes, lambda name: parts.tensors[name].to(wanted))


def _split(name: str) -> tuple[str, str] | None:
    return LORA.short_name(name.removeprefix(MODEL_PREFIX))


def _layers(parts: AdapterParts) -> dict[str, dict[str, str]]:
    """Return the layers and the names of their tensors, by short names."""
    layers: dict[str, dict[str, str]] = {}
    for name in parts.tensors:
        found = _split(name)
        if found is not None:
            layers.setdefault(found[0], {})[found[1]] = name
    for module, tensors in layers.items():
        if set(tensors) != {A_NAME, B_NAME}:
            raise AdapterError(f"{module}: is no plain LoRA layer, it has {', '.join(sorted(tensors))}")
    return layers


def read_factors(tensors: TensorMap, where: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the layers of a file in PEFT's names as a server sees them: name, B and A, both dense and 2-D.

    Raises:
        AdapterError: a tensor of a layer is of another kind, or has no partner.
    """
    for name, A in tensors.items():
        if not name.endswith(f".{A_NAME}"):
            continue
        module = name.removeprefix(MODEL_PREFIX).removesuffix(f".{A_NAME}")
        B = tensors.get(f"{MODEL_PREFIX}{module}.{B_NAME}")
        if B is None or A.ndim != 2 or B.ndim != 2:
            raise AdapterError(f"{where}: {module} has no lora_A and lora_B of two dimensions")
        yield module, B.float(), A.float()
