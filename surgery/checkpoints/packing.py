"""GiVA adapters in few bits: all layers' integer factors in one coded tensor, and back.

A packed file holds `base_model.giva_codes` (uint8: the integers of all layers, each in the configuration's `bits`, B's
columns before A's rows) and `base_model.giva_s` (all layers' s), in the order of the configuration's `packed`, which
names the layers and says `[out, in, rank]` of each. `o` is in the file where it is not all ones. In memory every layer
has its `giva_A`, `giva_B`, `giva_s` and `giva_o` as any other GiVA adapter. With 16 or 32 bits the factors are plain
floats, all in one `base_model.giva_factors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from surgery.errors import AdapterError
from surgery.linalg.fixed_width import pack, unpack

__all__ = ["CODES", "FACTORS", "PLAIN", "SCALES", "WIDTHS", "is_packed", "packed", "unpacked"]

CODES, FACTORS, SCALES = "giva_codes", "giva_factors", "giva_s"
PLAIN = {16: torch.float16, 32: torch.float32}
WIDTHS = (2, 3, 4, 8)
PARTS = ("giva_A", "giva_B", "giva_s", "giva_o")
# More numbers than any adapter has: a configuration that asks for them is damaged.
MOST_NUMBERS = 1 << 36

Tensors = dict[str, torch.Tensor]


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's factors are integers that the file holds as codes."""
    return config.get("peft_type") == "GIVA" and bool(config.get("packed"))


def packed(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], above: str, inside: str) -> Tensors:
    """The tensors of the file for the tensors in memory.

    Args:
        config: `adapter_config.json`.
        tensors: by name in the file.
        above: what the names of tensors above the model start with, `base_model.` or nothing.
        inside: what the names of the model's modules start with, `base_model.model.`.

    Raises:
        AdapterError: a factor is not of whole numbers, or not of the shape that the configuration says.
    """
    rest = dict(tensors)
    segments: list[torch.Tensor] = []
    scales = []
    for module, shape in _layers(config):
        out_features, in_features, rank = shape
        A, B, s = (rest.pop(f"{inside}{module}.{name}") for name in PARTS[:3])
        if tuple(A.shape) != (rank, in_features) or tuple(B.shape) != (out_features, rank):
            found = f"{tuple(B.shape)} and {tuple(A.shape)}"
            raise AdapterError(f"{module}: has factors {found}, the configuration says {shape}")
        plain = config.get("bits") in PLAIN
        columns = [*B.detach().cpu().float().T, *A.detach().cpu().float()]
        segments += columns if plain else [_whole(module, each) for each in columns]
        scales.append(s.detach().to("cpu", torch.float32).reshape(-1))
        o = rest.get(f"{inside}{module}.{PARTS[3]}")
        if o is not None and bool((o == 1).all()):
            del rest[f"{inside}{module}.{PARTS[3]}"]
    if config.get("bits") in PLAIN:
        rest[f"{above}{FACTORS}"] = torch.cat(segments).to(PLAIN[config["bits"]])
    else:
        rest[f"{above}{CODES}"] = _coded([segment.numpy() for segment in segments], config.get("bits"))
    rest[f"{above}{SCALES}"] = _narrowest(torch.cat(scales))
    return rest


def _coded(segments: list[np.ndarray[Any, Any]], bits: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(pack(np.concatenate(segments), _width(bits)))
    except ValueError as error:
        raise AdapterError(f"the factors cannot be packed: {error}") from None


def _width(bits: Any) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        raise AdapterError(f"packed factors of {bits!r} bits are not known here: {known} are")
    return bits


def unpacked(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], above: str, inside: str) -> Tensors:
    """The tensors in memory, float32, for those of the file; arguments as for `packed`.

    Raises:
        AdapterError: the codes are damaged, or do not fit the configuration.
    """
    rest = dict(tensors)
    plain = config.get("bits") in PLAIN
    try:
        stored = rest.pop(f"{above}{FACTORS if plain else CODES}")
        scales = rest.pop(f"{above}{SCALES}").float()
    except KeyError as error:
        raise AdapterError(f"the file lacks {error.args[0]}, which its configuration says it has") from None
    layers = _layers(config)
    lengths = [n for _, (height, width, rank) in layers for n in [height] * rank + [width] * rank]
    if sum(lengths) > MOST_NUMBERS or scales.numel() != sum(rank for _, (_, _, rank) in layers):
        raise AdapterError(f"{above}{SCALES}: {scales.numel()} scales do not fit the layers of the configuration")
    numbers = (
        _plain(stored, sum(lengths), above) if plain else _decoded(stored, sum(lengths), config.get("bits"), above)
    )
    start = first = 0
    for module, (height, width, rank) in layers:
        middle, end = start + height * rank, start + (height + width) * rank
        name = f"{inside}{module}."
        rest[f"{name}{PARTS[1]}"] = numbers[start:middle].reshape(rank, height).T.contiguous()
        rest[f"{name}{PARTS[0]}"] = numbers[middle:end].reshape(rank, width).clone()
        rest[f"{name}{PARTS[2]}"] = scales[first : first + rank].clone()
        rest.setdefault(f"{name}{PARTS[3]}", torch.ones(height))
        start, first = end, first + rank
    return rest


def _plain(stored: torch.Tensor, count: int, above: str) -> torch.Tensor:
    if not stored.is_floating_point() or stored.numel() != count or not bool(torch.isfinite(stored).all()):
        raise AdapterError(f"{above}{FACTORS}: does not hold the numbers of the layers that the configuration names")
    return stored.float().reshape(-1)


def _decoded(stored: torch.Tensor, count: int, bits: Any, above: str) -> torch.Tensor:
    if stored.dtype != torch.uint8:
        raise AdapterError(f"{above}{CODES}: is {stored.dtype}, expected bytes")
    try:
        found = unpack(stored.contiguous().cpu().numpy().reshape(-1), count, _width(bits))
    except ValueError as error:
        raise AdapterError(f"{above}{CODES}: {error}") from None
    return torch.from_numpy(found.astype(np.float32))


def _layers(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, int, int]]]:
    found = []
    entries = config.get("packed")
    for module, shape in entries.items() if isinstance(entries, Mapping) else ():
        sizes = tuple(shape) if isinstance(shape, (list, tuple)) else ()
        if len(sizes) != 3 or not all(isinstance(n, int) and 0 < n < 1 << 24 for n in sizes):
            raise AdapterError(f"packed: {module} has {shape!r}, expected [out, in, rank]")
        found.append((module, (sizes[0], sizes[1], sizes[2])))
    return sorted(found)


def _whole(module: str, values: torch.Tensor) -> torch.Tensor:
    rounded = values.round()
    if not torch.equal(values, rounded):
        raise AdapterError(f"{module}: its factors are not whole numbers any more, and cannot be packed")
    return rounded.to(torch.int16)


def _narrowest(scales: torch.Tensor) -> torch.Tensor:
    """In half precision where that is exact, as it is until they are trained."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.float(), scales) else scales
