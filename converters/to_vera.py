"""Any adapter to a stock VeRA, `dW = diag(b) B diag(d) A` with one pair A, B for the whole model.

Fitted bases hold the directions that are kept of every layer, one after the other: a layer's d is one at its own and
zero elsewhere, its b is one. That is exact, and opens in stock PEFT, which stores b and d in full length for each
layer and pads A and B to the largest one. Fitting A, B, b and d further to what was cut gains nothing worth having: a
direction of one layer is of no use to another (measured in `docs/methods.md`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.source import Change, Source
from surgery.converters.ranks import changes_of, decomposed
from surgery.converters.request import Budget, Request, Result
from surgery.converters.to_lora import balanced
from surgery.converters.type_config import own_keys, targets_of
from surgery.converters.vera_random import random_basis
from surgery.errors import MethodError
from surgery.linalg.metric import MetricSVD, energy_rank, greedy_ranks
from surgery.methods.vera import METHODS
from surgery.storage.safetensors_read import file_bytes
from surgery.system.text import human_bytes

__all__ = ["to_vera"]

# Of each layer, without a budget.
DEFAULT_ENERGY = 0.99

Tensors = dict[str, torch.Tensor]
Size = Callable[[Mapping[str, int]], int]


def to_vera(source: Source, request: Request) -> Result:
    """A stock VeRA adapter, with bases made from the adapter and stored, or random ones that a seed draws again.

    Fitted: a budget in bytes or ranks is filled by the directions that count most in the whole model, each of which
    costs one rank of the shared bases; `rank` is theirs. Without a budget each layer keeps 99 % of its energy.
    Layers that keep nothing leave the target list. Random: see `random_basis`.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer; or random bases are asked for
            without data.
    """
    if request.basis == "random":
        return random_basis(source, request)
    given = request.budget.given
    if not given:
        request = dataclasses.replace(request, budget=Budget(energy=DEFAULT_ENERGY))
    dtype = request.dtype or torch.float32
    changes = changes_of(source, request)
    svds = _decompositions(changes, request)

    def size(ranks: Mapping[str, int]) -> int:
        return file_bytes({**source.carried, **_planned(changes, ranks, dtype)})

    ranks = _ranks(svds, request, size)
    kept = [change for change in changes if ranks[change.module]]
    tensors = _tensors(kept, svds, ranks, dtype)
    config = METHODS["vera"].make_config({"rank": sum(ranks.values())}, {"seed": request.seed})
    names = [change.module for change in kept]
    return Result(
        config={**own_keys(config, source), **targets_of(source, names)},
        tensors=tensors,
        ranks={name: ranks[name] for name in names},
        trainable=sum(tensor.numel() for name, tensor in tensors.items() if "vera_lambda" in name),
        notes=_notes(kept, size(ranks), request, given),
    )


def _decompositions(changes: Sequence[Change], request: Request) -> dict[str, MetricSVD]:
    svds = {}
    for number, change in enumerate(changes, 1):
        svds[change.module] = decomposed(change, request)
        if request.progress is not None:
            request.progress(number, len(changes), change.module)
    return svds


def _ranks(svds: Mapping[str, MetricSVD], request: Request, size: Size) -> dict[str, int]:
    """How many directions each layer keeps.

    Raises:
        MethodError: none of any layer.
    """
    values = {module: svd.S for module, svd in svds.items()}
    budget = request.budget
    limit = budget.bytes(request.source_bytes)
    # A direction is one rank of the shared bases, whatever the layer.
    alike = dict.fromkeys(values, 1)
    if budget.energy is not None:
        ranks = {module: energy_rank(S, budget.energy) for module, S in values.items()}
    elif budget.max_error is not None:
        ranks = greedy_ranks(values, alike, max_error=budget.max_error)
    elif limit is None:
        ranks = greedy_ranks(values, alike, budget=budget.rank)
    else:
        ranks = _filled(values, limit, size)
    if not any(ranks.values()):
        what = f"a file of {human_bytes(limit)} is too small" if limit is not None else "nothing is kept of any layer"
        raise MethodError(f"{what}: {_smallest(values, size)}")
    return ranks


def _filled(values: Mapping[str, torch.Tensor], limit: int, size: Size) -> dict[str, int]:
    """The first directions of the model-wide list that fit, and of those after them whatever still does."""
    order = [module for _, module in sorted(((float(v), m) for m, S in values.items() for v in S), reverse=True)]

    def first(count: int) -> dict[str, int]:
        ranks = dict.fromkeys(values, 0)
        for module in order[:count]:
            ranks[module] += 1
        return ranks

    low, high = 0, len(order)
    while low < high:  # the file grows with every direction
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(first(middle)) <= limit else (low, middle - 1)
    ranks = first(low)
    for module in order[low:]:
        more = {**ranks, module: ranks[module] + 1}
        if size(more) <= limit:
            ranks = more
        elif ranks[module]:
            break  # one of a layer that is there already costs least
    return ranks


def _smallest(values: Mapping[str, torch.Tensor], size: Size) -> str:
    present = [module for module, S in values.items() if len(S)]
    if not present:
        return "the adapter changes nothing"
    least = min(size({**dict.fromkeys(values, 0), module: 1}) for module in present)
    return f"the smallest that holds what must be carried and one direction is {least} bytes"


def _planned(changes: Sequence[Change], ranks: Mapping[str, int], dtype: torch.dtype) -> Tensors:
    """The tensors of the file, on the meta device."""
    kept = [change for change in changes if ranks[change.module]]
    return _empty(kept, sum(ranks.values()), dtype, "meta") if kept else {}


def _empty(kept: Sequence[Change], rank: int, dtype: torch.dtype, device: str) -> Tensors:
    """All the tensors, named as PEFT names them: b ones, all else zeros."""
    tensors = {
        f"{TUNER_PREFIX}vera_A": torch.zeros(rank, max(c.shape[1] for c in kept), dtype=dtype, device=device),
        f"{TUNER_PREFIX}vera_B": torch.zeros(max(c.shape[0] for c in kept), rank, dtype=dtype, device=device),
    }
    for change in kept:
        b, d = _vectors(change.module)
        tensors[b] = torch.ones(change.shape[0], dtype=dtype, device=device)
        tensors[d] = torch.zeros(rank, dtype=dtype, device=device)
    return tensors


def _vectors(module: str) -> tuple[str, str]:
    return f"{MODEL_PREFIX}{module}.vera_lambda_b", f"{MODEL_PREFIX}{module}.vera_lambda_d"


def _tensors(
    kept: Sequence[Change], svds: Mapping[str, MetricSVD], ranks: Mapping[str, int], dtype: torch.dtype
) -> Tensors:
    tensors = _empty(kept, sum(ranks.values()), dtype, "cpu")
    shared_A, shared_B = tensors[f"{TUNER_PREFIX}vera_A"], tensors[f"{TUNER_PREFIX}vera_B"]
    start = 0
    for change in kept:
        out_features, in_features = change.shape
        end = start + ranks[change.module]
        # All scale is in the bases: ones and zeros are exact in every dtype.
        B, A = balanced(*svds[change.module].cut(change.B, change.A, end - start))
        shared_B[:out_features, start:end], shared_A[start:end, :in_features] = B, A
        tensors[_vectors(change.module)[1]][start:end] = 1
        start = end
    return tensors


def _notes(kept: Sequence[Change], size: int, request: Request, given: bool) -> list[str]:
    rows, columns = max(change.shape[0] for change in kept), max(change.shape[1] for change in kept)
    padded = f"each rank is padded to the largest layer, {rows} x {columns}, and has a place in every layer's d"
    notes = []
    if not given:
        relation = f"{size / request.source_bytes:.2f} times the source's {human_bytes(request.source_bytes)}"
        notes.append(
            f"each layer keeps {DEFAULT_ENERGY:.0%} of its energy: {human_bytes(size)}, {relation}; {padded}. "
            "A budget (--ratio, --size) cuts it"
        )
    elif size > request.source_bytes:
        notes.append(f"larger than the source, {human_bytes(size)} to {human_bytes(request.source_bytes)}: {padded}")
    notes.append("--to giva holds the same directions in far fewer bytes; this form is for what loads stock VeRA alone")
    return notes
