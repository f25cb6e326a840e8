"""Any adapter to SMoA: the best factors through the spectral components, or the blocks, of the base weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.converters.budget_search import largest
from surgery.converters.request import Request, Result
from surgery.converters.smoa_fit import fit_masked
from surgery.converters.to_lora import balanced
from surgery.converters.type_config import own_keys
from surgery.deltas.operators import Delta
from surgery.errors import MethodError
from surgery.linalg.seeded import generator_for, kaiming_uniform
from surgery.linalg.spectral_groups import equal_share_cuts, top_components
from surgery.linalg.spectral_scores import part_sizes
from surgery.methods.smoa import DEFAULT_GROUPS, METHODS, VARIANTS, SmoaConfig, block_order, split_rank
from surgery.models.fingerprint import Fingerprint
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

__all__ = ["to_smoa"]

METHOD = METHODS["smoa"]


def to_smoa(source: Source, request: Request) -> Result:
    """An `SMOA` adapter of two spectral groups, components or blocks, whose factors fit the change best.

    The rank is the budget's, or the highest that a budget in bytes allows, or the source's, or 32. With data, input
    features count by their mean square. What an adapter of low rank does is not a multiple of its base's weights,
    entry by entry: the error says how much is lost. Layers without a change leave the target list.

    Raises:
        MethodError: the budget is too small, a layer has fewer singular values than there are groups, or nothing
            changes.
    """
    base = source.base
    assert base is not None
    modules = _changed(source)
    config = _config(_rank(source, modules, request), request)
    notes = METHOD.notes(config, list(modules))
    dtype = request.dtype or torch.float32
    tensors: Tensors = {}
    fingerprint = Fingerprint()
    parts, finished = request.parts, {module for module in modules.values() if module in request.parts}
    for number, (module, site, delta) in enumerate(_of(modules, source.deltas(without=finished)), len(finished) + 1):
        raw = base.raw_weight(site)
        own = Fingerprint()
        own.add(site.key, raw)
        moments = _mean_squares(source, module, site, request)
        target, weight = delta.dense().to(request.device), raw.to(request.device, torch.float32)
        fitted, share = FITS[request.options.get("variant", "components")](config, site, target, weight, moments)
        made: Tensors = {}
        for name, tensor in fitted.items():
            stored = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor
            if not bool(torch.isfinite(stored).all()):
                raise MethodError(f"{module}: its factors are not finite in {dtype}: give --dtype float32")
            made[_name(module, name)] = stored.contiguous()
        parts.add(module, made, {"digests": own.taken, "share": share})
        if request.progress is not None:
            request.progress(number, len(modules), module)
    for module in modules.values():
        tensors.update(parts.tensors(module))
        fingerprint.take(parts.facts(module)["digests"])
    config.base_fingerprint, config.init_weights = fingerprint.digests(), False
    return Result(
        config=own_keys(config, source),
        tensors=tensors,
        ranks={module: METHOD.rank_at(config, site) for site, module in modules.items()},
        trainable=sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        notes=[*notes, *_share_note(request, [parts.facts(module)["share"] for module in modules.values()])],
    )


def _config(rank: int, request: Request) -> SmoaConfig:
    return METHOD.make_config(
        {"rank": rank, "variant": request.options.get("variant", "components")}, {"seed": request.seed}
    )


def _share_note(request: Request, shares: Sequence[tuple[float, float]]) -> list[str]:
    """How much any factors could hold, of the form that was chosen."""
    inside, total = (sum(pair[part] for pair in shares) for part in (0, 1))
    if request.options.get("variant", "components") == "components":
        return ["a change of low rank is seldom a multiple of the base's weights: --to giva holds it"]
    return [
        f"variant blocks, as published, changes nothing outside {DEFAULT_GROUPS} diagonal blocks, where "
        f"{inside / total:.0%} of this change's energy lies: --variant components reaches all of it, --to giva holds it"
    ]


def _of(
    modules: Mapping[Site, str], deltas: Iterator[tuple[str, Site | None, Delta]]
) -> Iterator[tuple[str, Site, Delta]]:
    """The layers that are fitted."""
    return ((module, site, delta) for module, site, delta in deltas if site is not None and site in modules)


def _changed(source: Source) -> dict[Site, str]:
    """The layers whose change is any, in the model's order -> their names."""
    found = {site: module for module, site, delta in source.deltas() if site is not None and float(delta.norm()) > 0}
    if not found:
        raise MethodError("nothing is kept of any layer: the adapter changes nothing")
    return found


def _fitted_components(
    config: SmoaConfig, site: Site, target: torch.Tensor, weight: torch.Tensor, mean_squares: torch.Tensor | None
) -> tuple[Tensors, tuple[float, float]]:
    """The tensors of a layer, and how much of the change's energy is where they can reach, of how much."""
    cuts = equal_share_cuts(weight, config.groups)
    top = list(top_components(weight, cuts))
    masks = [*top, weight - torch.stack(top).sum(0)] if top else [weight]
    rank = min(config.r, site.max_rank)
    generator = generator_for(config.seed, site.key)
    start = kaiming_uniform((rank, site.in_features), generator).to(target.device)
    fit = fit_masked(target, masks, start.split(split_rank(rank, config.groups)), mean_squares)
    B, A = balanced(fit.B, fit.A)
    energy = float(target.double().square().sum())
    return {"A": A.float(), "B": B.float(), "cuts": torch.tensor(cuts, dtype=torch.int32)}, (energy, energy)


def _fitted_blocks(
    config: SmoaConfig, site: Site, target: torch.Tensor, weight: torch.Tensor, mean_squares: torch.Tensor | None
) -> tuple[Tensors, tuple[float, float]]:
    """The same of the blocks: each is fitted by itself."""
    tensors = {**METHOD.trainables(config, site, {}), "order": block_order(weight, config.groups)}
    A, B, order = tensors["A"], tensors["B"], VARIANTS["blocks"].derived(config, tensors, weight)
    rows, columns = (order[name].split(part_sizes(order[name].numel(), config.groups)) for name in ("rows", "columns"))
    inside, start = 0.0, 0
    for its_rows, its_columns, rank in zip(rows, columns, config.ranks, strict=True):
        height, width, ranks = its_rows.numel(), its_columns.numel(), slice(start, start + rank)
        wanted, anchor = (matrix[its_rows[:, None], its_columns] for matrix in (target, weight))
        begin = A[ranks, :width].to(target.device)
        weights = mean_squares[its_columns] if mean_squares is not None else None
        fit = fit_masked(wanted, [anchor], [begin], weights)  # the scale is 1: alpha is the rank
        B[:height, ranks], A[ranks, :width] = (factor.float().cpu() for factor in balanced(fit.B, fit.A))
        inside, start = inside + float(wanted.double().square().sum()), start + rank
    return tensors, (inside, float(target.double().square().sum()))


# By variant.
FITS = {"components": _fitted_components, "blocks": _fitted_blocks}


def _mean_squares(source: Source, module: str, site: Site, request: Request) -> torch.Tensor | None:
    """`E[x_i^2] (in,)`. The features' correlations would couple all columns of A in one system."""
    if request.metric is None:
        return None
    return request.metric.full(Change.none(module, site)).C.diagonal().to(request.device)


def _rank(source: Source, modules: Mapping[Site, str], request: Request) -> int:
    """The rank over all groups.

    Raises:
        MethodError: the budget is too small.
    """
    limit = request.limit
    if request.budget.rank is not None:
        return request.budget.rank
    if limit is None:
        old = source.adapter.config.get("r")
        return max(old, DEFAULT_GROUPS) if isinstance(old, int) and old > 0 else METHOD.info.rank or 32
    dtype = request.dtype or torch.float32

    def size(rank: int) -> int:
        return request.file_size(_planned(modules, _config(rank, request), dtype))

    low, high = DEFAULT_GROUPS, max(DEFAULT_GROUPS, *(site.max_rank for site in modules))
    rank = largest(lambda rank: size(rank) <= limit, low, high)
    if rank is None:
        raise request.too_small(size(low), f"rank {low} (one for each group)")
    return rank


def _planned(modules: Mapping[Site, str], config: SmoaConfig, dtype: torch.dtype) -> Tensors:
    """The tensors of the file, on the meta device."""
    planned: Tensors = {}
    for site, module in modules.items():
        shapes = METHOD.shapes(config, site)
        for name in METHOD.stored(config, owner=True):
            kind = METHOD.dtype(name, site)
            planned[_name(module, name)] = torch.empty(
                shapes[name], dtype=dtype if kind.is_floating_point else kind, device="meta"
            )
    return planned


def _name(module: str, short: str) -> str:
    return f"{MODEL_PREFIX}{module}.{METHOD.prefix}{short}"
