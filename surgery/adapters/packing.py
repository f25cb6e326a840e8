"""GiVA adapters in few bits: all layers' integer factors in one coded tensor, and back.

A packed file holds `base_model.giva_codes` (uint8: the integers and scales of all layers, entropy-coded, see
`surgery.codec.factors`), in the order of the names in the configuration's `packed`, which says `[out, in, rank]` of
each layer. Scales that are on no grid, since they have been trained, are in `base_model.giva_s` instead, and `o` is
in the file where it is not all ones. In memory every layer has its `giva_A`, `giva_B`, `giva_s` and `giva_o` as any
other GiVA adapter. With 16 or 32 `bits` the factors are plain floats, all in one `base_model.giva_factors`, beside
`giva_s`.

Layers that the configuration's `gains` names have gains on the base weight, all in one `base_model.giva_gains`: coded
(uint8, see `surgery.codec.gains`), or plain floats where `bits` says so or they have been trained. In memory they are
`giva_g`, the gains less one, and `giva_t`, the step of their grid, 0 where they are on none; a layer without gains has
empty ones. Such a layer may be of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.codec.entropy import LARGEST
from surgery.codec.factors import CodedFactors, decoded_layers, encode_factors, grid_of
from surgery.codec.gains import CodedGains, decode_gains, encode_gains
from surgery.deltas.operators import GAINS as KINDS
from surgery.deltas.operators import INPUTS
from surgery.errors import AdapterError
from surgery.system.tensors import MadeTensors, TensorMap, Tensors

__all__ = [
    "CODES",
    "FACTORS",
    "PLAIN",
    "codes_planned",
    "gain_tensors",
    "gain_values",
    "gains_in",
    "is_packed",
    "layer_tensors",
    "numbers_planned",
    "packed",
    "packed_config",
    "packed_prefix",
    "rank_bytes",
    "unpacked",
]

CODES, FACTORS, SCALES, GAINS = "giva_codes", "giva_factors", "giva_s", "giva_gains"
PLAIN = {16: torch.float16, 32: torch.float32}
PARTS = ("giva_A", "giva_B", "giva_s", "giva_o")
GAIN_PARTS = ("giva_g", "giva_t")
# More numbers than any adapter has: a configuration that asks for them is damaged.
MOST_NUMBERS = 1 << 36

Shape = tuple[int, int, int]  # out, in, rank
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # B, A, s


def packed_prefix(names: Iterable[str]) -> str | None:
    """Return what the names above the model begin with in a packed state dict; None in one that is not packed."""
    found = next((name for name in names if name.rpartition(".")[2] in {CODES, FACTORS, GAINS}), None)
    return None if found is None else found.removesuffix(found.rpartition(".")[2])


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's factors are integers that the file holds as codes."""
    return config.get("peft_type") == "GIVA" and bool(config.get("packed"))


def packed_config(shapes: Mapping[str, Shape], bits: int | str) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` for packed factors.

    Args:
        shapes: `(out, in, rank)` of each layer.
        bits: of a number, or "auto".
    """
    return {
        "peft_type": "GIVA",
        "r": max(rank for *_, rank in shapes.values()),  # 0 for gains alone
        "variant": "vr",
        "packed": {module: list(shape) for module, shape in shapes.items()},
        "bits": bits,
        "split": None,
        "dropout": 0.0,
        "fan_in_fan_out": False,
        "init_weights": False,
        "store_bases": True,
        "seed": 0,
        "base_fingerprint": None,
        "format_version": 1,
    }


def layer_tensors(name: str, B: torch.Tensor, A: torch.Tensor, s: torch.Tensor) -> Tensors:
    """Return the tensors in memory of the layer `name`, whose change is `B diag(s) A`."""
    return dict(zip((f"{name}.{part}" for part in PARTS), (A, B, s, torch.ones(B.shape[0])), strict=True))


def gain_tensors(name: str, values: torch.Tensor, step: float = 0.0) -> Tensors:
    """Return the tensors in memory of the gains of the layer `name`.

    Args:
        name: the layer's.
        values: the gains less one, float32 `(n,)`; empty for a layer that has none.
        step: of the grid that they are on, 0 for none.
    """
    return dict(zip((f"{name}.{part}" for part in GAIN_PARTS), (values, _step(values, step)), strict=True))


def _step(values: torch.Tensor, step: float) -> torch.Tensor:
    return torch.full((1 if values.numel() else 0,), step)


def codes_planned(count: int, above: str, gains: int = 0) -> Tensors:
    """Return the tensors of a file whose codes take `count` bytes, those of its gains `gains`, on the meta device."""
    sizes = {CODES: count, GAINS: gains}
    return {f"{above}{name}": torch.empty(n, dtype=torch.uint8, device="meta") for name, n in sizes.items() if n}


def numbers_planned(shapes: Sequence[Shape], bits: int, above: str, gains: int = 0) -> Tensors:
    """Return the tensors of a file of plain floats of 16 or 32 bits, `gains` of them gains, on the meta device."""
    count = sum((height + width) * rank for height, width, rank in shapes)
    found = {
        f"{above}{FACTORS}": torch.empty(count, dtype=PLAIN[bits], device="meta"),
        f"{above}{SCALES}": torch.empty(sum(rank for *_, rank in shapes), device="meta"),
    }
    if not gains:
        return found
    beside = found if count else {}
    return {**beside, f"{above}{GAINS}": torch.empty(gains, dtype=PLAIN[bits], device="meta")}


def rank_bytes(shape: tuple[int, int], bits: int) -> int:
    """Return the bytes of one rank of a layer of this shape in plain floats, its scale included."""
    return sum(shape) * bits // 8 + torch.float32.itemsize


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
    rest, gains = dict(tensors), gains_in(config)
    layers, own = [], []
    for module, shape in _layers(config):
        A, B, s = (rest.pop(f"{inside}{module}.{name}").detach().cpu().float() for name in PARTS[:3])
        if tuple(A.shape) != (shape[2], shape[1]) or tuple(B.shape) != (shape[0], shape[2]):
            found = f"{tuple(B.shape)} and {tuple(A.shape)}"
            raise AdapterError(f"{module}: has factors {found}, the configuration says {shape}")
        layers.append((module, B, A, s.reshape(-1)))
        o = rest.get(f"{inside}{module}.{PARTS[3]}")
        if o is not None and bool((o == 1).all()):
            del rest[f"{inside}{module}.{PARTS[3]}"]
        if gains:
            g, t = (rest.pop(f"{inside}{module}.{name}").detach().cpu().float().reshape(-1) for name in GAIN_PARTS)
            own += [(g, float(t[0]))] if module in gains else []
    if gains:
        rest[f"{above}{GAINS}"] = _packed_gains(own, config.get("bits"))
        if not any(shape[2] for _, shape in _layers(config)):
            return rest
    scales = torch.cat([s for *_, s in layers])
    if config.get("bits") in PLAIN:
        numbers = [part.reshape(-1) for _, B, A, _ in layers for part in (B.T, A)]
        rest[f"{above}{FACTORS}"] = torch.cat(numbers).to(PLAIN[config["bits"]])
        rest[f"{above}{SCALES}"] = _narrowest(scales)
        return rest
    grid = grid_of(scales.double().numpy())
    if grid is None:
        rest[f"{above}{SCALES}"] = _narrowest(scales)
    coded = [
        CodedFactors(
            _whole(module, B), _whole(module, A), (s if grid is not None else torch.ones_like(s)).double().numpy()
        )
        for module, B, A, s in layers
    ]
    rest[f"{above}{CODES}"] = torch.from_numpy(encode_factors(coded, grid or 0).copy())
    return rest


def _packed_gains(gains: Sequence[tuple[torch.Tensor, float]], bits: Any) -> torch.Tensor:
    """Return all layers' gains as the file holds them: codes where all of them are on their grids, otherwise floats.

    Args:
        gains: the gains less one, float32, and their step.
        bits: of a number, as the configuration says.
    """
    steps = np.array([step for _, step in gains])
    grid = grid_of(steps) if bits not in PLAIN else None
    coded = [_on_grid(values, step) for values, step in gains] if grid is not None else [None]
    if grid is not None and all(each is not None for each in coded):
        return torch.from_numpy(encode_gains([each for each in coded if each is not None], grid).copy())
    numbers = torch.cat([values for values, _ in gains])
    half = numbers.to(torch.float16)
    return half if bits == 16 and torch.equal(half.float(), numbers) else numbers


def _on_grid(values: torch.Tensor, step: float) -> CodedGains | None:
    """Return gains as codes; None where they are no multiples of their step any more."""
    whole = torch.round(values.double() / step)
    if float(whole.abs().max()) > LARGEST or not torch.equal(gain_values(whole.numpy(), step), values):
        return None
    return CodedGains(whole.to(torch.int32).numpy(), step)


def gain_values(whole: NDArray[Any], step: float) -> torch.Tensor:
    """Return the gains less one, float32 `(n,)`, from whole numbers of steps; the step as float32 has it."""
    return torch.from_numpy((whole.astype(np.float64) * float(np.float32(step))).astype(np.float32))


def unpacked(config: Mapping[str, Any], tensors: TensorMap, above: str, inside: str) -> MadeTensors:
    """The tensors in memory, float32, for those of the file; arguments as for `packed`.

    The factors are held as the whole numbers, or the floats, that the file has, and are made float32 when they are
    asked for.

    Raises:
        AdapterError: the codes are damaged, or do not fit the configuration.
    """
    rest, gains = dict(tensors), gains_in(config)
    layers = _layers(config)
    if sum(height * max(rank, 1) + width * max(rank, 1) for _, (height, width, rank) in layers) > MOST_NUMBERS:
        raise AdapterError("packed: the layers of the configuration have more numbers than any adapter")
    wanted = [FACTORS, SCALES] if config.get("bits") in PLAIN else [CODES]
    if not any(rank for _, (*_, rank) in layers):
        wanted = []
    for name in [*wanted, *([GAINS] if gains else [])]:
        if f"{above}{name}" not in rest:
            raise AdapterError(f"the file lacks {above}{name}, which its configuration says it has")
    if gains:
        rest.update(_unpacked_gains(rest.pop(f"{above}{GAINS}"), layers, gains, above, inside))
    shapes = [shape for _, shape in layers]
    ranks = [rank for *_, rank in shapes]
    factors: Iterable[Factors] = ((torch.zeros(h, 0), torch.zeros(0, w), torch.zeros(0)) for h, w, _ in shapes)
    scales = None
    if wanted:
        stored, scales = rest.pop(f"{above}{wanted[0]}"), rest.pop(f"{above}{SCALES}", None)
        if scales is not None and scales.numel() != sum(ranks):
            raise AdapterError(f"{above}{SCALES}: {scales.numel()} scales do not fit the layers of the configuration")
        factors = _plain(stored, shapes, above) if wanted[0] == FACTORS else _decoded(stored, shapes, above)
    trained = scales.float().reshape(-1).split(ranks) if scales is not None else [None] * len(layers)
    held: Tensors = {}
    for (module, (height, _, _)), (B, A, s), own in zip(layers, factors, trained, strict=True):
        name = f"{inside}{module}."
        held[f"{name}{PARTS[0]}"], held[f"{name}{PARTS[1]}"] = A, B
        rest[f"{name}{PARTS[0]}"], rest[f"{name}{PARTS[1]}"] = (torch.empty(f.shape, device="meta") for f in (A, B))
        rest[f"{name}{PARTS[2]}"] = s if own is None else own.clone()
        rest.setdefault(f"{name}{PARTS[3]}", torch.ones(height))

    def made(name: str) -> torch.Tensor:
        # In memory of its own, row by row: the held one may be float32 already, or a turned view.
        return held[name].to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    return MadeTensors(rest, made, held.pop)


def _unpacked_gains(
    stored: torch.Tensor, layers: Sequence[tuple[str, Shape]], gains: Mapping[str, str], above: str, inside: str
) -> Tensors:
    """Return the gains of all layers in memory, empty ones for layers that have none.

    Raises:
        AdapterError: they are damaged, or do not fit the configuration.
    """
    sizes = [shape[1] if gains[module] == INPUTS else shape[0] for module, shape in layers if module in gains]
    found: list[tuple[torch.Tensor, float]]
    if stored.dtype == torch.uint8:
        try:
            coded = decode_gains(stored.contiguous().cpu().numpy().reshape(-1), sizes)
        except ValueError as error:
            raise AdapterError(f"{above}{GAINS}: {error}") from None
        found = [(gain_values(each.whole, each.step), each.step) for each in coded]
    else:
        if not stored.is_floating_point() or stored.numel() != sum(sizes) or not bool(torch.isfinite(stored).all()):
            raise AdapterError(f"{above}{GAINS}: does not hold the gains of the layers that the configuration names")
        found = [(values.clone(), 0.0) for values in stored.float().reshape(-1).split(sizes)]
    with_gains = iter(found)
    tensors: Tensors = {}
    for module, _ in layers:
        values, step = next(with_gains) if module in gains else (torch.zeros(0), 0.0)
        tensors.update(gain_tensors(f"{inside}{module}", values, step))
    return tensors


def gains_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the gains of a packed adapter are on, by module; empty where it has none.

    Raises:
        AdapterError: the configuration names a layer that is not packed, or something else than these.
    """
    entries, listed = config.get("gains") or {}, config.get("packed")
    known = listed if isinstance(listed, Mapping) else {}
    if not isinstance(entries, Mapping):
        raise AdapterError(f"gains: is {entries!r:.80}, expected an object of {', '.join(KINDS)}")
    for module, kind in entries.items():
        if module not in known:
            raise AdapterError(f"gains: {module} is no packed layer of the configuration")
        if kind not in KINDS:
            raise AdapterError(f"gains: {module} has {kind!r:.80}, expected {', '.join(KINDS)}")
    return dict(entries)


def _plain(stored: torch.Tensor, shapes: Sequence[Shape], above: str) -> Iterator[Factors]:
    count = sum((height + width) * rank for height, width, rank in shapes)
    if not stored.is_floating_point() or stored.numel() != count or not bool(torch.isfinite(stored).all()):
        raise AdapterError(f"{above}{FACTORS}: does not hold the numbers of the layers that the configuration names")
    numbers, start = stored.reshape(-1), 0
    for height, width, rank in shapes:
        middle, end = start + height * rank, start + (height + width) * rank
        yield numbers[start:middle].reshape(rank, height).T, numbers[middle:end].reshape(rank, width), torch.ones(rank)
        start = end


def _decoded(stored: torch.Tensor, shapes: Sequence[Shape], above: str) -> Iterator[Factors]:
    if stored.dtype != torch.uint8:
        raise AdapterError(f"{above}{CODES}: is {stored.dtype}, expected bytes")
    try:
        for layer in decoded_layers(stored.contiguous().cpu().numpy().reshape(-1), shapes):
            B, A = (torch.from_numpy(_narrow(codes)) for codes in (layer.B, layer.A))
            yield B, A, torch.from_numpy(layer.s.astype(np.float32))
    except ValueError as error:
        raise AdapterError(f"{above}{CODES}: {error}") from None


def _narrow(codes: NDArray[np.int16]) -> NDArray[np.signedinteger]:
    """Return whole numbers in memory of their own, in one byte each where that holds them."""
    largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)))
    return codes.astype(np.int8 if largest <= 127 else np.int16)


def _layers(config: Mapping[str, Any]) -> list[tuple[str, Shape]]:
    found, gains = [], gains_in(config)
    entries = config.get("packed")
    for module, shape in entries.items() if isinstance(entries, Mapping) else ():
        sizes = tuple(shape) if isinstance(shape, (list, tuple)) else ()
        if len(sizes) != 3 or not all(isinstance(n, int) and 0 <= n < 1 << 24 for n in sizes) or not all(sizes[:2]):
            raise AdapterError(f"packed: {module} has {shape!r}, expected [out, in, rank]")
        if not sizes[2] and module not in gains:
            raise AdapterError(f"packed: {module} has {shape!r}, a rank of 0, and no gains")
        found.append((module, (sizes[0], sizes[1], sizes[2])))
    return sorted(found)


def _whole(module: str, values: torch.Tensor) -> NDArray[np.int16]:
    rounded = values.round()
    if not torch.equal(values, rounded) or float(rounded.abs().max()) > LARGEST:
        raise AdapterError(f"{module}: its factors are not whole numbers any more, and cannot be packed")
    return rounded.to(torch.int16).numpy()


def _narrowest(scales: torch.Tensor) -> torch.Tensor:
    """In half precision where that is exact, as it is until they are trained."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.float(), scales) else scales
