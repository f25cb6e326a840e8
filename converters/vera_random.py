"""VeRA on its own random bases, its vectors fitted to another adapter where that matters to the layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.converters.request import Metric, Request, Result
from surgery.converters.type_config import own_keys, targets_of
from surgery.errors import MethodError
from surgery.methods.vera import METHODS, projections

__all__ = ["VectorFit", "fitted_vectors", "random_basis"]

# Sweeps of the alternating fit; it stops earlier where one gains less than this share of the energy.
SWEEPS = 20
WORTHWHILE = 1e-4
# Of the mean of the diagonal, so that directions which the inputs never take stay solvable.
RIDGE = 1e-10


def random_basis(source: Source, request: Request) -> Result:
    """A VeRA adapter of vectors alone: PEFT draws A and B from the seed.

    Its b and d minimise what the layers' outputs lose, `||(dW - diag(b) B diag(d) A) C^(1/2)||` with `C = E[x x^T]`,
    by alternating closed forms. This is a start for training more than a conversion: a few hundred random directions
    do not hold a trained change.

    Raises:
        MethodError: there is no data to fit on, or a budget other than a rank.
    """
    if source.base is None or request.metric is None:
        raise MethodError(
            "--basis random fits VeRA's vectors to what the adapter does on data: give --base and --data, or use "
            "--basis fitted"
        )
    budget = request.budget
    if budget.given and budget.rank is None:
        raise MethodError("--basis random takes --rank as its budget: its size follows from it alone")
    options = {"store_bases": False, **({} if budget.rank is None else {"rank": budget.rank})}
    config = METHODS["vera"].make_config(options, {"seed": request.seed})
    changes = list(source.changes(energy=1.0, seed=request.seed))
    bases = projections(config.r, list(source.sites), config.projection_prng_key)
    tensors = {}
    for number, change in enumerate(changes, 1):
        fit = _fitted(change, bases, request.metric, request.device)
        for name, vector in (("b", fit.b), ("d", fit.d)):
            stored = vector.to("cpu", request.dtype or torch.float32)
            tensors[f"{MODEL_PREFIX}{change.module}.vera_lambda_{name}"] = stored
        if request.progress is not None:
            request.progress(number, len(changes), change.module)
    return Result(
        config={**own_keys(config, source), **targets_of(source, [change.module for change in changes])},
        tensors=tensors,
        ranks=dict.fromkeys((change.module for change in changes), config.r),
        trainable=sum(tensor.numel() for tensor in tensors.values()),
        notes=[
            *METHODS["vera"].notes(config, list(source.sites)),
            "random bases hold little of a trained adapter: train the result on, or use --to giva",
        ],
    )


def _fitted(
    change: Change, bases: tuple[torch.Tensor, torch.Tensor], metric: Metric, device: torch.device
) -> VectorFit:
    A, B = bases
    out_features, in_features = change.shape
    return fitted_vectors(
        B[:out_features].to(device),
        A[:, :in_features].to(device),
        change.B.to(device),
        change.A.to(device),
        metric.full(change).C.to(device),
    )


@dataclass(frozen=True)
class VectorFit:
    """Vectors of one layer.

    Attributes:
        b: `(out,)`, float64.
        d: `(r,)`, float64.
        relative_error: what the layer's outputs lose, over what the change adds to them.
        errors: the same after each sweep.
    """

    b: torch.Tensor
    d: torch.Tensor
    relative_error: float
    errors: Sequence[float]


def fitted_vectors(
    B: torch.Tensor, A: torch.Tensor, change_B: torch.Tensor, change_A: torch.Tensor, C: torch.Tensor
) -> VectorFit:
    """The b and d for which `diag(b) B diag(d) A` comes closest to `dW` in the metric C, by alternating least squares.

    With `M = B diag(d) A`, `b_i = <dW_i, M_i>_C / <M_i, M_i>_C`; given b, d solves
    `((B^T diag(b^2) B) * (A C A^T)) d = diag(B^T diag(b) dW C A^T)`. Everything is done in r x r and `(out, r)`
    matrices, in float64. The starting d is all ones; each step can only lower the error.

    Args:
        B: `(out, r)`.
        A: `(r, in)`.
        change_B: `(out, k)`.
        change_A: `(k, in)`, the change is their product.
        C: `(in, in)`, second moment of the layer's inputs.

    Returns:
        The fit; zero vectors b for a change that does nothing to the outputs.
    """
    B, A, change_B, change_A, C = (each.double() for each in (B, A, change_B, change_A, C))
    right, across = A @ C @ A.T, change_B @ (change_A @ C @ A.T)  # (r, r), (out, r): dW C A^T
    energy = float(((change_B.T @ change_B) * (change_A @ C @ change_A.T)).sum())
    d = torch.ones_like(A[:, 0])
    if energy <= 0:
        return VectorFit(torch.zeros_like(B[:, 0]), d, 0.0, [0.0])
    best, errors = (torch.zeros_like(B[:, 0]), d), [1.0]
    for _ in range(SWEEPS):
        scaled = B * d
        among, with_change = ((scaled @ right) * scaled).sum(1), (across * scaled).sum(1)
        b = torch.where(among > 0, with_change / among.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        # For the best b what is gained is the energy of the projection.
        left = math.sqrt(max(1 - float((b * with_change).sum()) / energy, 0.0))
        gained = errors[-1] ** 2 - left**2
        if left < min(errors):
            best = (b, d)
        errors.append(left)
        if gained < WORTHWHILE:
            break
        weighted = B * b[:, None]
        system = (weighted.T @ weighted) * right
        system.diagonal().add_(RIDGE * float(system.diagonal().mean()))
        d = torch.linalg.solve(system, (weighted * across).sum(0))
    return VectorFit(*best, min(errors), errors[1:])
