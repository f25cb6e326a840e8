"""Any adapter to a packed GiVA one: integer factors of few bits, with scales, ranks and bits for the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.packing import (
    PLAIN,
    codes_planned,
    gain_tensors,
    gain_values,
    layer_tensors,
    numbers_planned,
    packed_config,
    rank_bytes,
)
from surgery.adapters.source import Change, Source
from surgery.codec.gains import GainVector
from surgery.codec.model import Compressed, DoesNotFit, Goal, Moment, compress
from surgery.converters.budget import Budget
from surgery.converters.gain_metric import GainMetric
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.errors import AdapterError, MethodError
from surgery.models.sites import EXPERT, LINEAR, PARAMETER
from surgery.storage.format_version import GAINS_VERSION, KINDS_VERSION

__all__ = ["to_giva"]

# Of codes that nothing limits, where only a rank is asked for: what is left of it is what counts then.
BITS_AT_RANK = 8
# How often a budget is tightened until layers with gains lose no more than it allows, and by how much more each time.
TRIES, CLOSER = 4, 1.01


@dataclass
class _Parts:
    """What is left of the layers, by module.

    Attributes:
        factors: B `(out, r)`, A `(r, in)`, s `(r,)`, of rank 0 where gains alone are left.
        gains: the gains less one, float32 `(n,)`, and the step of their grid, 0 for none.
        bits: mean bits of a stored number.
        sizes: bytes.
        gain_bytes: of the whole file, for gains.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    gains: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    gain_bytes: int = 0


def to_giva(source: Source, request: Request) -> Result:
    """A GiVA adapter `diag(o) B diag(s) A` with o = 1, which is not stored, and packed factors; with gains on the base
    weight besides, where the source has some.

    The factors are integers, as large in each column as its weight is worth; `bits` limits them. With 16 or 32 bits
    they are floats, as they are where nothing may be lost. Layers that keep nothing leave the target list.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer, or asks for what codes of so few
            bits cannot hold.
    """
    changes = changes_of(source, request, gains=True)
    lone = next((change.module for change in changes if change.form.kind == PARAMETER), None)
    if lone is not None:
        raise AdapterError(f"{lone}: is a parameter of a module that is no layer, for which GiVA has no place; use "
                           "--to lora, or leave it out")  # fmt: skip
    exact = request.budget.energy == 1 or request.budget.max_error == 0
    asked = request.options.get("bits", "auto")
    bits: int | str = (32 if exact else "auto") if asked == "auto" else int(asked)
    if bits not in PLAIN:
        # The file has its layers in the order of their names; a layer's description starts from that of the one before.
        changes = sorted(changes, key=lambda change: change.module)
    metric = GainMetric.of(source, changes, request.metric)
    parts = _as_promised(request, changes, metric, bits)
    if not parts.factors:
        raise MethodError("nothing is kept of any layer: the adapter changes nothing, or the budget is too small")
    return _result(parts, changes, bits)


def _as_promised(request: Request, changes: list[Change], metric: GainMetric | None, bits: int | str) -> _Parts:
    """The layers within the budget. The search takes errors of gains and factors to be independent, and a budget of
    loss that this does not meet is tightened.

    Raises:
        MethodError: nothing meets it.
    """
    budget = request.budget
    for _ in range(TRIES):
        asked = dataclasses.replace(request, budget=budget)
        if bits in PLAIN:
            parts = _plain(asked, changes, int(bits))
        else:
            parts = _coded(asked, changes, None if bits == "auto" else int(bits), metric.vectors if metric else None)
        if metric is None or bits == 32 or (budget.max_error is None and budget.energy is None):
            return parts
        excess = metric.excess(request.budget, parts.factors, parts.gains)
        if excess <= 1:
            return parts
        if budget.max_error is not None:
            budget = Budget(max_error=budget.max_error / (excess * CLOSER) ** 0.5)
        elif budget.energy is not None:
            budget = Budget(energy=1 - (1 - budget.energy) / (excess * CLOSER))
    raise MethodError(f"no codes of {bits} bits lose so little: use --bits 32")


def _kinds(changes: list[Change]) -> dict[str, str]:
    """The kinds of the layers that are no linears, as the configuration says them."""
    return {change.module: str(change.form) for change in changes if change.form.kind != LINEAR}


def _coded(
    request: Request, changes: list[Change], bits: int | None, vectors: Sequence[GainVector | None] | None
) -> _Parts:
    """The changes as integers, within the request's budget."""
    coded = _compressed(request, changes, bits, vectors)
    parts = _Parts(gain_bytes=int(coded.gain_data.size))
    gains = coded.gains or [None] * len(changes)
    for change, factors, own, spent in zip(changes, coded.layers, gains, coded.bits, strict=True):
        if not factors.rank and own is None:
            continue
        module = change.module
        B, A = (torch.from_numpy(codes).float() for codes in (factors.B, factors.A))
        parts.factors[module] = B, A.contiguous(), torch.from_numpy(factors.s).float()
        if own is not None:
            parts.gains[module] = gain_values(own.whole, own.step), own.step
        numbers = B.numel() + A.numel() + (own.whole.size if own is not None else 0)
        parts.bits[module], parts.sizes[module] = spent / numbers, round(spent / 8)
    return parts


def _compressed(
    request: Request, changes: list[Change], bits: int | None, vectors: Sequence[GainVector | None] | None
) -> Compressed:
    budget, metric, progress = request.budget, request.metric, request.progress

    def moments(index: int) -> tuple[Moment, Moment]:
        if metric is None:
            return None, None
        full = metric.full(changes[index])
        return full.C, full.F

    def fixed(limit: int) -> int:
        if vectors is None:
            return request.file_size(codes_planned(limit, TUNER_PREFIX)) - limit
        # Codes and gains are two tensors, the larger of which is no larger than both.
        return request.file_size(codes_planned(limit, TUNER_PREFIX, limit)) - 2 * limit

    limit = request.limit
    if budget.rank is not None:
        bits = bits or BITS_AT_RANK
    try:
        return compress(
            [(change.B, change.A) for change in changes],
            Goal(None if limit is None else max(limit - fixed(limit), 1), budget.max_error, budget.energy, budget.rank),
            bits=bits,
            metric=moments,
            gains=vectors,
            progress=None if progress is None else lambda done, whole: progress(done, whole, "coding"),
        )
    except DoesNotFit as error:
        if not error.enough:
            raise MethodError("nothing is kept of any layer: the adapter changes nothing") from None
        raise request.too_small(error.enough + fixed(error.enough), "something of the change") from None
    except ValueError:
        wider = "leave out --bits, or store plain numbers with --bits 32" if bits else "use --bits 32"
        raise MethodError(f"codes of {bits or 'any'} bits lose more than that: {wider}") from None


def _plain(request: Request, changes: list[Change], bits: int) -> _Parts:
    """Factors as floats, of ranks for the budget; gains as floats, all of them."""
    thin = [change for change in changes if change.rank or change.gain is None]
    svds = {change.module: decomposed(change, request) for change in thin}
    shapes = {change.module: change.shape for change in changes}
    costs = {module: rank_bytes(shape, bits) for module, shape in shapes.items()}
    gains = {change.module: _gain_of(change, PLAIN[bits]) for change in changes if change.gain is not None}
    numbers = sum(values.numel() for values in gains.values())
    spectra = Spectra({module: svd.S for module, svd in svds.items()}, costs)

    def size(ranks: Mapping[str, int]) -> int:
        layers = [(*shapes[module], rank) for module, rank in ranks.items()]
        return request.file_size(numbers_planned(layers, bits, TUNER_PREFIX, numbers))

    ranks = spectra.ranks(request, size) if any(len(svd.S) for svd in svds.values()) or not gains else {}
    if request.limit is not None and size(ranks) > request.limit:
        raise request.too_small(size(ranks), "the gains")
    parts = _Parts(gain_bytes=numbers * bits // 8)
    for change in changes:
        module, rank = change.module, ranks.get(change.module, 0)
        if not rank and module not in gains:
            continue
        if rank:
            B, A = svds[module].cut(change.B, change.A, rank)
            parts.factors[module] = _floats(B, A, PLAIN[bits])
        else:
            parts.factors[module] = change.B[:, :0], change.A[:0], torch.zeros(0)
        if module in gains:
            parts.gains[module] = gains[module], 0.0
        own = gains[module].numel() * bits // 8 if module in gains else 0
        parts.bits[module], parts.sizes[module] = float(bits), costs[module] * rank + own
    return parts


def _gain_of(change: Change, dtype: torch.dtype) -> torch.Tensor:
    """A layer's gains less one, as the file holds them."""
    assert change.gain is not None and change.gain.vector is not None
    return change.gain.vector[1].to(dtype).float()


def _floats(B: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors whose largest entries are 1, as the file holds them, so that what is measured is what is read."""
    in_B, in_A = B.abs().amax(0).clamp_min(1e-30), A.abs().amax(1).clamp_min(1e-30)
    return (B / in_B).to(dtype).float(), (A / in_A[:, None]).to(dtype).float(), in_B * in_A


def _result(parts: _Parts, changes: list[Change], bits: int | str) -> Result:
    """The adapter of these factors and gains."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (B, A, s) in parts.factors.items():
        tensors.update(layer_tensors(f"{MODEL_PREFIX}{module}", B, A, s))
        if parts.gains:
            tensors.update(gain_tensors(f"{MODEL_PREFIX}{module}", *parts.gains.get(module, (torch.zeros(0), 0.0))))
    shapes = {module: (B.shape[0], A.shape[1], A.shape[0]) for module, (B, A, _) in parts.factors.items()}
    ranks = {module: rank for module, (*_, rank) in shapes.items()}
    trainable = sum(height + rank for height, _, rank in shapes.values())
    trainable += sum(values.numel() for values, _ in parts.gains.values())
    config = packed_config(shapes, bits)
    kept = {module: kind for module, kind in _kinds(changes).items() if module in shapes}
    if kept:
        config |= {"kinds": kept, "format_version": KINDS_VERSION}
    gains = {c.module: c.gain.vector[0] for c in changes if c.module in parts.gains and c.gain and c.gain.vector}
    if gains:
        config |= {"gains": gains, "format_version": GAINS_VERSION}
    experts = sorted({module.rpartition(".")[0] for module, kind in kept.items() if kind == EXPERT})
    if experts:
        config["target_parameters"] = experts
        config["target_modules"] = sorted(module for module in shapes if kept.get(module) != EXPERT)
    return Result(config, tensors, ranks, trainable, parts.bits, parts.sizes, gains=gains, gain_bytes=parts.gain_bytes)
