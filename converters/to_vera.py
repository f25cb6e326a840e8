"""Any adapter to a stock VeRA, `dW = diag(b) B diag(d) A` with one pair A, B for the whole model.

Fitted bases hold the directions that are kept of every layer, one after the other: a layer's d is one at its own and
zero elsewhere, its b is one. That is exact, and opens in stock PEFT, which stores b and d in full length for each
layer and pads A and B to the largest one. Fitting A, B, b and d further to what was cut gains nothing worth having: a
direction of one layer is of no use to another (measured in `docs/methods.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.source import Change, Source
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.converters.to_lora import balanced
from surgery.converters.type_config import own_keys, targets_of
from surgery.converters.vera_random import random_basis
from surgery.linalg.metric import MetricSVD
from surgery.methods.vera import METHODS
from surgery.system.tensors import Tensors
from surgery.system.text import human_bytes

__all__ = ["to_vera"]


def to_vera(source: Source, request: Request) -> Result:
    """A stock VeRA adapter, with bases made from the adapter and stored, or random ones that a seed draws again.

    Fitted: a budget in bytes or ranks is filled by the directions that count most in the whole model, each of which
    costs one rank of the shared bases; `rank` is theirs. Layers that keep nothing leave the target list. Random: see
    `random_basis`.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer; or random bases are asked for
            without data.
    """
    if request.options.get("basis") == "random":
        return random_basis(source, request)
    dtype = request.dtype or torch.float32
    changes = changes_of(source, request)
    svds = _decompositions(changes, request)

    def size(ranks: Mapping[str, int]) -> int:
        return request.file_size(_planned(changes, ranks, dtype))

    ranks = Spectra({module: svd.S for module, svd in svds.items()}).ranks(request, size)
    kept = [change for change in changes if ranks[change.module]]
    tensors = _tensors(kept, svds, ranks, dtype)
    config = METHODS["vera"].make_config({"rank": sum(ranks.values())}, {"seed": request.seed})
    names = [change.module for change in kept]
    return Result(
        config={**own_keys(config, source), **targets_of(source, names)},
        tensors=tensors,
        ranks={name: ranks[name] for name in names},
        trainable=sum(tensor.numel() for name, tensor in tensors.items() if "vera_lambda" in name),
        notes=_notes(kept, size(ranks), request),
    )


def _decompositions(changes: Sequence[Change], request: Request) -> dict[str, MetricSVD]:
    svds = {}
    for number, change in enumerate(changes, 1):
        svds[change.module] = decomposed(change, request)
        if request.progress is not None:
            request.progress(number, len(changes), change.module)
    return svds


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


def _notes(kept: Sequence[Change], size: int, request: Request) -> list[str]:
    rows, columns = max(change.shape[0] for change in kept), max(change.shape[1] for change in kept)
    notes = []
    if size > request.source_bytes:
        notes.append(
            f"larger than the source, {human_bytes(size)} to {human_bytes(request.source_bytes)}: each rank is padded "
            f"to the largest layer, {rows} x {columns}, and has a place in every layer's d; a budget (--ratio, --size) "
            "cuts it"
        )
    notes.append("--to giva holds the same directions in far fewer bytes; this form is for what loads stock VeRA alone")
    return notes
