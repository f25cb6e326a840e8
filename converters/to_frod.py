"""Any adapter to FRoD: the best `U (diag(l) + S) V^T - W`, with U and V from the joint decomposition of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.converters.budget_search import largest
from surgery.converters.frod_fit import Problem, fit_role
from surgery.converters.request import Request, Result
from surgery.converters.type_config import own_keys
from surgery.errors import MethodError
from surgery.linalg.joint import joint_basis, right_inverse_transposed
from surgery.methods.frod import DEFAULT_SPARSE_RATE, METHODS, column_norms, narrow_positions, nonzeros
from surgery.models.base_model import BaseModel
from surgery.models.fingerprint import Fingerprint
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

__all__ = ["to_frod"]

METHOD = METHODS["frod"]
REGULARIZATION = 1e-3  # of the joint decomposition, as in `surgery init`
HIGHEST_RATE = 0.5
STEPS = 1 << 40  # of the rate, up to the highest one

Groups = Sequence[Sequence[Site]]


def to_frod(source: Source, request: Request) -> Result:
    """A `FROD_PORTABLE` adapter: per role V from the base's weights, stored; per layer the l and S that fit best.

    S has its entries where they explain most, in the same places for all layers of a role: 1 % of `in x in`, or as
    many as the budget in bytes allows. With data the fit is in the layers' outputs. What an adapter of low rank does
    seldom lies in this family: the error says how much is lost. Layers without a change leave the target list.

    Raises:
        MethodError: the budget is too small, or nothing changes.
    """
    assert source.base is not None
    limit = request.limit
    changes = _changes(source, request)
    groups = METHOD.groups(list(changes))
    rate = DEFAULT_SPARSE_RATE if limit is None else _rate_within(limit, changes, groups, request)
    tensors: Tensors = {}
    fingerprint = Fingerprint()
    for number, group in enumerate(groups, 1):
        name, parts = METHOD.group_key(group[0]), request.parts
        if name not in parts:
            made = _role(source.base, [changes[site] for site in group], group, rate, request)
            own = Fingerprint()
            for site in group:
                own.add(site.key, source.base.raw_weight(site, check=False))
            parts.add(name, made, {"digests": own.taken})
        tensors.update(parts.tensors(name))
        fingerprint.take(parts.facts(name)["digests"])
        if request.progress is not None:
            request.progress(number, len(groups), group[0].role)
    config = METHOD.make_config({"sparse_rate": rate}, {"seed": request.seed})
    config.base_fingerprint, config.init_weights = fingerprint.digests(), False
    return Result(
        config=own_keys(config, source),
        tensors=tensors,
        ranks={change.module: min(change.shape) for change in changes.values()},
        trainable=sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(("_l", "_s"))),
        notes=[
            f"S has {rate:.3%} of its entries, those that explain most "
            + ("of the layers' outputs on the data" if request.metric is not None else "of the weights' change"),
            "V, in x in for each role, takes most of the file; an adapter of low rank is smaller as --to giva",
        ],
    )


def _changes(source: Source, request: Request) -> dict[Site, Change]:
    """The changes that are any, in the model's order."""
    found = {change.site: change for change in source.changes(energy=1.0, seed=request.seed, parts=request.parts)}
    changes = {site: change for site, change in found.items() if site is not None and change.A.any() and change.B.any()}
    if not changes:
        raise MethodError("nothing is kept of any layer: the adapter changes nothing")
    return changes


def _role(base: BaseModel, changes: Sequence[Change], group: Sequence[Site], rate: float, request: Request) -> Tensors:
    """The tensors of the layers of one role, by name in the file."""
    size, device = group[0].in_features, request.device
    dtype = request.dtype or torch.float32
    joint = joint_basis(lambda start: (base.weight(site, device) for site in group[start:]), size, REGULARIZATION)
    stored_V = joint.V.to(torch.float32).to(dtype)
    # What is fitted is the change that the V in the file makes.
    V = stored_V.float()
    inverse = right_inverse_transposed(V)
    norms = [column_norms(base.weight(site, device), inverse) for site in group]
    moments = [request.metric.full(change).C if request.metric is not None else None for change in changes]

    def problem(layer: int) -> Problem:
        weight = base.weight(group[layer], device)
        return _problem(changes[layer], weight, V, inverse, norms[layer], moments[layer])

    fit = fit_role(nonzeros(size, rate), len(group), problem)
    tensors: Tensors = {}
    for index, (change, l0) in enumerate(zip(changes, norms, strict=True)):
        # l and l0 are all but equal: in half precision nothing of their difference would be left.
        own = {"l0": l0, "l": l0 + fit.diagonals[index].float(), "s": fit.values[index].to(dtype)}
        if index == 0:
            own.update(V=stored_V, positions=narrow_positions(fit.positions, size))
        made = {_name(change.module, name): tensor.cpu().contiguous() for name, tensor in own.items()}
        tensors.update(made)
    return tensors


def _problem(
    change: Change,
    weight: torch.Tensor,
    V: torch.Tensor,
    inverse: torch.Tensor,
    l0: torch.Tensor,
    C: torch.Tensor | None,
) -> Problem:
    gain = torch.where(l0 > 0, 1 / torch.where(l0 > 0, l0, 1.0), 0.0).double()
    U = (weight.double() @ inverse.double()) * gain
    B, A, V = (each.to(weight.device).double() for each in (change.B, change.A, V))
    metric = C.to(weight.device).double() if C is not None else None
    seen_V, seen_A = (V, A) if metric is None else (metric @ V, A @ metric)
    return Problem(
        U=U,
        right=V.T @ seen_V,
        target=(U.T @ B) @ (A @ seen_V),
        energy=float(((B.T @ B) * (seen_A @ A.T)).sum()),
    )


def _name(module: str, short: str) -> str:
    return f"{MODEL_PREFIX}{module}.{METHOD.prefix}{short}"


def _rate_within(limit: int, changes: Mapping[Site, Change], groups: Groups, request: Request) -> float:
    """Return the largest sparse rate with which the file fits.

    Raises:
        MethodError: it does not even without any S.
    """
    dtype = request.dtype or torch.float32

    def size(step: int) -> int:
        return request.file_size(_planned(changes, groups, HIGHEST_RATE * step / STEPS, dtype))

    step = largest(lambda step: size(step) <= limit, 0, STEPS)
    if step is None:
        raise request.too_small(size(0), "V and l alone")
    return HIGHEST_RATE * step / STEPS


def _planned(changes: Mapping[Site, Change], groups: Groups, rate: float, dtype: torch.dtype) -> Tensors:
    """The tensors of the file, on the meta device."""
    planned: Tensors = {}
    for group in groups:
        size = group[0].in_features
        count = nonzeros(size, rate)
        for index, site in enumerate(group):
            module = changes[site].module
            for short in ("l", "l0"):
                planned[_name(module, short)] = torch.empty(size, device="meta")
            planned[_name(module, "s")] = torch.empty(count, dtype=dtype, device="meta")
            if index == 0:
                places = narrow_positions(torch.empty(count, dtype=torch.int64, device="meta"), size)
                planned[_name(module, "positions")] = places
                planned[_name(module, "V")] = torch.empty(size, size, dtype=dtype, device="meta")
    return planned
