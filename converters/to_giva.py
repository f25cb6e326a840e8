"""Any adapter to a packed GiVA one: integer factors of few bits, with scales, ranks and bits for the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.packing import PLAIN, codes_planned, layer_tensors, numbers_planned, packed_config, rank_bytes
from surgery.adapters.source import Change, Source
from surgery.codec.model import Compressed, DoesNotFit, Goal, Moment, compress
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.errors import AdapterError, MethodError
from surgery.models.sites import EXPERT, LINEAR, PARAMETER
from surgery.storage.format_version import KINDS_VERSION

__all__ = ["to_giva"]

# Of codes that nothing limits, where only a rank is asked for: what is left of it is what counts then.
BITS_AT_RANK = 8

Parts = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # module -> B (out, r), A (r, in), s (r,)


def to_giva(source: Source, request: Request) -> Result:
    """A GiVA adapter `diag(o) B diag(s) A` with o = 1, which is not stored, and packed factors.

    The factors are integers, as large in each column as its weight is worth; `bits` limits them. With 16 or 32 bits
    they are floats, as they are where nothing may be lost. Layers that keep nothing leave the target list.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer, or asks for what codes of so few
            bits cannot hold.
    """
    changes = changes_of(source, request)
    lone = next((change.module for change in changes if change.form.kind == PARAMETER), None)
    if lone is not None:
        raise AdapterError(f"{lone}: is a parameter of a module that is no layer, for which GiVA has no place; use "
                           "--to lora, or leave it out")  # fmt: skip
    exact = request.budget.energy == 1 or request.budget.max_error == 0
    asked = request.options.get("bits", "auto")
    bits: int | str = (32 if exact else "auto") if asked == "auto" else int(asked)
    if bits in PLAIN:
        return _plain(request, changes, int(bits))
    # The file has its layers in the order of their names; a layer's description starts from that of the one before.
    changes = sorted(changes, key=lambda change: change.module)
    coded = _coded(request, changes, None if bits == "auto" else int(bits))
    parts: Parts = {}
    mean_bits, sizes = {}, {}
    for change, factors, spent in zip(changes, coded.layers, coded.bits, strict=True):
        if factors.rank:
            B, A = (torch.from_numpy(codes).float() for codes in (factors.B, factors.A))
            parts[change.module] = B, A.contiguous(), torch.from_numpy(factors.s).float()
            mean_bits[change.module] = spent / (B.numel() + A.numel())
            sizes[change.module] = round(spent / 8)
    if not parts:
        raise MethodError("nothing is kept of any layer: the adapter changes nothing, or the budget is too small")
    return _result(parts, _kinds(changes), bits, mean_bits, sizes)


def _kinds(changes: list[Change]) -> dict[str, str]:
    """The kinds of the layers that are no linears, as the configuration says them."""
    return {change.module: str(change.form) for change in changes if change.form.kind != LINEAR}


def _coded(request: Request, changes: list[Change], bits: int | None) -> Compressed:
    """The changes as integers, within the request's budget."""
    budget, metric, progress = request.budget, request.metric, request.progress

    def moments(index: int) -> tuple[Moment, Moment]:
        if metric is None:
            return None, None
        full = metric.full(changes[index])
        return full.C, full.F

    def fixed(limit: int) -> int:
        return request.file_size(codes_planned(limit, TUNER_PREFIX)) - limit

    limit = request.limit
    if budget.rank is not None:
        bits = bits or BITS_AT_RANK
    try:
        return compress(
            [(change.B, change.A) for change in changes],
            Goal(None if limit is None else max(limit - fixed(limit), 1), budget.max_error, budget.energy, budget.rank),
            bits=bits,
            metric=moments,
            progress=None if progress is None else lambda done, whole: progress(done, whole, "coding"),
        )
    except DoesNotFit as error:
        if not error.enough:
            raise MethodError("nothing is kept of any layer: the adapter changes nothing") from None
        raise request.too_small(error.enough + fixed(error.enough), "something of the change") from None
    except ValueError:
        wider = "leave out --bits, or store plain numbers with --bits 32" if bits else "use --bits 32"
        raise MethodError(f"codes of {bits or 'any'} bits lose more than that: {wider}") from None


def _plain(request: Request, changes: list[Change], bits: int) -> Result:
    """Factors as floats, of ranks for the budget."""
    svds = {change.module: decomposed(change, request) for change in changes}
    shapes = {change.module: change.shape for change in changes}
    costs = {module: rank_bytes(shape, bits) for module, shape in shapes.items()}
    spectra = Spectra({module: svd.S for module, svd in svds.items()}, costs)

    def size(ranks: Mapping[str, int]) -> int:
        return request.file_size(numbers_planned([(*shapes[m], rank) for m, rank in ranks.items()], bits, TUNER_PREFIX))

    ranks = spectra.ranks(request, size)
    parts: Parts = {}
    for change in changes:
        if rank := ranks[change.module]:
            B, A = svds[change.module].cut(change.B, change.A, rank)
            parts[change.module] = _floats(B, A, PLAIN[bits])
    sizes = {module: costs[module] * len(s) for module, (*_, s) in parts.items()}
    return _result(parts, _kinds(changes), bits, dict.fromkeys(parts, float(bits)), sizes)


def _floats(B: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors whose largest entries are 1, as the file holds them, so that what is measured is what is read."""
    in_B, in_A = B.abs().amax(0).clamp_min(1e-30), A.abs().amax(1).clamp_min(1e-30)
    return (B / in_B).to(dtype).float(), (A / in_A[:, None]).to(dtype).float(), in_B * in_A


def _result(
    factors: Parts,
    kinds: Mapping[str, str],
    bits: int | str,
    mean_bits: dict[str, float],
    sizes: dict[str, int],
) -> Result:
    """The adapter of these factors."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (B, A, s) in factors.items():
        tensors.update(layer_tensors(f"{MODEL_PREFIX}{module}", B, A, s))
    shapes = {module: (B.shape[0], A.shape[1], A.shape[0]) for module, (B, A, _) in factors.items()}
    ranks = {module: rank for module, (*_, rank) in shapes.items()}
    trainable = sum(height + rank for height, _, rank in shapes.values())
    config = packed_config(shapes, bits)
    kept = {module: kind for module, kind in kinds.items() if module in shapes}
    if kept:
        config |= {"kinds": kept, "format_version": KINDS_VERSION}
    experts = sorted({module.rpartition(".")[0] for module, kind in kept.items() if kind == EXPERT})
    if experts:
        config["target_parameters"] = experts
        config["target_modules"] = sorted(module for module in shapes if kept.get(module) != EXPERT)
    return Result(config, tensors, ranks, trainable, mean_bits, sizes)
