"""What a conversion loses, layer by layer, from the adapters themselves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Source
from surgery.adapters.types.base import Needs
from surgery.converters.report import ConvertedSite
from surgery.converters.request import Result
from surgery.deltas.operators import Delta
from surgery.system.threads import one_torch_thread

__all__ = ["converted_sites", "largest_difference", "overall"]

# (module) -> C (in, in), or None without data
InputMoments = Callable[[str], torch.Tensor | None]
# So many rows of a dense change, or columns of a layer's moments, are in float64 at a time.
AT_A_TIME = 1024


def converted_sites(source: Source, made: Adapter, result: Result, moments: InputMoments) -> list[ConvertedSite]:
    """One entry for each layer of the source, its error taken between the two adapters' weight changes."""
    shares = _bytes(made)
    return [
        _site(module, old, new, moments(module), result, shares.get(module, 0))
        for module, old, new in source.beside(_opened_like(source, made))
    ]


def _site(
    module: str, old: Delta, new: Delta | None, C: torch.Tensor | None, result: Result, share: int
) -> ConvertedSite:
    energy, lost = squared_norms(old, new, None)
    output_energy, output_lost = squared_norms(old, new, C) if C is not None else (0.0, 0.0)
    return ConvertedSite(
        module=module,
        shape=(int(old.shape[0]), int(old.shape[1])),
        source_rank=_rank(old),
        rank=result.ranks.get(module, 0),
        bits=result.bits.get(module),
        energy=energy,
        weight_error=_relative(energy, lost),
        output_error=_relative(output_energy, output_lost) if C is not None else None,
        bytes=result.sizes.get(module, share),
        output_energy=output_energy,
        gains=result.gains.get(module),
    )


def _rank(delta: Delta) -> int:
    factors = _factors(delta)
    return int(factors[1].shape[0]) if factors is not None else min(delta.shape)


def overall(sites: Sequence[ConvertedSite]) -> tuple[float, float | None]:
    """Return relative errors over all layers: of the weights, and of the outputs of those that have one."""
    weight = _ratio([(s.energy, s.weight_error) for s in sites])
    pairs = [(s.output_energy, s.output_error) for s in sites if s.output_error is not None]
    return weight, _ratio(pairs) if pairs else None


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    total = sum(energy for energy, _ in pairs)
    return math.sqrt(sum(energy * error**2 for energy, error in pairs) / total) if total > 0 else 0.0


def squared_norms(old: Delta, new: Delta | None, C: torch.Tensor | None) -> tuple[float, float]:
    """`|dW|^2` and `|dW - dW'|^2`, in the metric `C (in, in)` of the inputs where it is given; float64.

    Through Gram matrices of the factors where both have them: what they lose to cancellation is below 1e-8 of the
    change.
    """
    first = _factors(old)
    second = _factors(new) if new is not None else None
    if first is None or (new is not None and second is None):
        return _dense_norms(old, new, C)
    with one_torch_thread() if C is None else contextlib.nullcontext():
        B, A = first
        AC = A if C is None else _times(A, C)
        energy = _product(B, AC, B, A)
        if second is None:
            return energy, energy
        B2, A2 = second
        A2C = A2 if C is None else _times(A2, C)
        return energy, max(energy - 2 * _product(B, AC, B2, A2) + _product(B2, A2C, B2, A2), 0.0)


def _factors(delta: Delta) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Thin factors in float64 on the CPU: for so few numbers, waking another thread takes longer."""
    with one_torch_thread():
        factors = delta.factors()
        if factors is None:
            return None
        B, A = (factor.detach().double().cpu() for factor in factors)
        return B, A


def _product(B: torch.Tensor, A: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor) -> float:
    """`<B A, B2 A2>`."""
    return float(((B.T @ B2) * (A @ A2.T)).sum())


def _times(A: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """`A C` in float64, some columns at a time: C, as wide as a layer, is not copied whole."""
    return torch.cat([A @ part.to(A) for part in C.split(AT_A_TIME, 1)], 1)


def _dense_norms(old: Delta, new: Delta | None, C: torch.Tensor | None) -> tuple[float, float]:
    whole, other = old.dense().detach(), new.dense().detach() if new is not None else None
    sums = [0.0, 0.0]
    for start in range(0, whole.shape[0], AT_A_TIME):
        rows = whole[start : start + AT_A_TIME].double()
        difference = rows if other is None else rows - other[start : start + AT_A_TIME].to(rows)
        for index, each in enumerate((rows, difference)):
            sums[index] += float(((each if C is None else _times(each, C)) * each).sum().clamp_min(0))
    return sums[0], sums[1]


def _relative(energy: float, lost: float) -> float:
    return math.sqrt(lost / energy) if energy > 0 else 0.0


def largest_difference(reopened: Adapter, meant: Adapter, source: Source) -> float:
    """The largest relative difference of a layer's change between what was reopened and what was meant.

    The same settings and the same tensors, to the last bit, are the same changes.
    """
    if reopened.same_as(meant):
        return 0.0
    pairs = _opened_like(source, meant).beside(_opened_like(source, reopened))
    differences = [_relative(*squared_norms(delta, found, None)) for _, delta, found in pairs]
    return max(differences, default=0.0)


def _opened_like(source: Source, adapter: Adapter) -> Source:
    """Return another adapter of the source's layers, whose shapes are looked up for types whose files lack them."""
    kind = adapter.type
    if kind is not None and kind.needs(adapter.config) is Needs.SHAPE:
        return source.with_same_layers(adapter)
    return Source.open(adapter, source.base, source.device)


def _bytes(made: Adapter) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in made.tensors.items():
        module = name.removeprefix(MODEL_PREFIX).rpartition(".")[0]
        module = module.removesuffix(".lora_A").removesuffix(".lora_B")
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    return sizes
