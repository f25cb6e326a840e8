"""What a conversion loses, layer by layer, from the adapters themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from surgery.checkpoints.adapter import MODEL_PREFIX, Adapter
from surgery.converters.changes import Source
from surgery.converters.request import Result
from surgery.linalg.delta import Delta
from surgery.reports.convert_report import ConvertedSite

__all__ = ["converted_sites", "largest_difference", "overall"]

# (module) -> C (in, in), or None without data
InputMoments = Callable[[str], torch.Tensor | None]


def converted_sites(source: Source, made: Adapter, result: Result, moments: InputMoments) -> list[ConvertedSite]:
    """One entry for each layer of the source, its error taken between the two adapters' weight changes."""
    shares = _bytes(made)
    entries = []
    for module, old, new in source.beside(source.with_same_layers(made)):
        C = moments(module)
        energy, lost = squared_norms(old, new, None)
        output = _relative(*squared_norms(old, new, C)) if C is not None else None
        out_features, in_features = old.shape
        factors = old.factors()
        entries.append(
            ConvertedSite(
                module=module,
                shape=(int(out_features), int(in_features)),
                source_rank=int(factors[1].shape[0]) if factors is not None else min(old.shape),
                rank=result.ranks.get(module, 0),
                bits=result.bits.get(module),
                energy=energy,
                weight_error=_relative(energy, lost),
                output_error=output,
                bytes=result.sizes.get(module, shares.get(module, 0)),
            )
        )
        if C is not None:
            entries[-1].output_energy = squared_norms(old, None, C)[0]
    return entries


def overall(sites: Sequence[ConvertedSite]) -> tuple[float, float | None]:
    """Relative errors over all layers together: of the weights, and of the outputs where all layers have one."""
    weight = _ratio([(s.energy, s.weight_error) for s in sites])
    pairs = [(s.output_energy, s.output_error) for s in sites if s.output_error is not None]
    return weight, _ratio(pairs) if len(pairs) == len(sites) else None


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    total = sum(energy for energy, _ in pairs)
    return math.sqrt(sum(energy * error**2 for energy, error in pairs) / total) if total > 0 else 0.0


def squared_norms(old: Delta, new: Delta | None, C: torch.Tensor | None) -> tuple[float, float]:
    """`|dW|^2` and `|dW - dW'|^2`, in the metric C of the inputs where it is given; float64, through the factors.

    Gram matrices of the factors: what they lose to cancellation is below 1e-8 of the change.
    """
    first = old.factors()
    second = new.factors() if new is not None else None
    if first is None or (new is not None and second is None):
        whole = old.dense().double()
        difference = whole - new.dense().double() if new is not None else whole
        return tuple(_dense_norm(each, C) for each in (whole, difference))  # type: ignore[return-value]
    B, A = (factor.detach().double().cpu() for factor in first)
    if second is None:
        energy = _gram(B, A, B, A, C)
        return energy, energy
    B2, A2 = (factor.detach().double().cpu() for factor in second)
    energy, cross, other = _gram(B, A, B, A, C), _gram(B, A, B2, A2, C), _gram(B2, A2, B2, A2, C)
    return energy, max(energy - 2 * cross + other, 0.0)


def _gram(B: torch.Tensor, A: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor, C: torch.Tensor | None) -> float:
    right = A @ A2.T if C is None else A @ C.double() @ A2.T
    return float(((B.T @ B2) * right).sum())


def _dense_norm(matrix: torch.Tensor, C: torch.Tensor | None) -> float:
    metric = matrix if C is None else matrix @ C.double().to(matrix.device)
    return float((metric * matrix).sum().clamp_min(0))


def _relative(energy: float, lost: float) -> float:
    return math.sqrt(lost / energy) if energy > 0 else 0.0


def largest_difference(reopened: Adapter, meant: Adapter, source: Source) -> float:
    """The largest relative difference of a layer's change between what was reopened and what was meant."""
    pairs = source.with_same_layers(meant).beside(source.with_same_layers(reopened))
    differences = [_relative(*squared_norms(delta, found, None)) for _, delta, found in pairs]
    return max(differences, default=0.0)


def _bytes(made: Adapter) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in made.tensors.items():
        module = name.removeprefix(MODEL_PREFIX).rpartition(".")[0]
        module = module.removesuffix(".lora_A").removesuffix(".lora_B")
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    return sizes
