"""Gradients the plain way: backward through every weight in float64, and exact decompositions of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from surgery.models.sites import Site

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass
class Spectrum:
    """The singular value decomposition of one gradient, float64."""

    G: torch.Tensor
    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    def captured_by(self, A: torch.Tensor) -> float:
        """The energy in the span of the rows of A, over what as many of the leading right vectors hold."""
        A = torch.linalg.qr(A.double().T)[0].T
        return float((self.G @ A.T).square().sum() / self.S[: A.shape[0]].square().sum())

    def has_gap(self, rank: int, ratio: float) -> bool:
        """Whether the singular value after the first `rank` is smaller by this factor: then these are well defined."""
        return rank < len(self.S) and float(self.S[rank]) * ratio < float(self.S[rank - 1])


def true_gradients(model: Any, batches: Iterable[Any], loss: Loss, sites: Iterable[Site]) -> dict[str, torch.Tensor]:
    """Gradient of the summed losses with respect to the weight of each site, `(out, in)`, float64, dropout off."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    weights = {site: model.get_submodule(site.module).weight.requires_grad_() for site in sites}
    for batch in batches:
        loss(model, in_double(batch)).backward()
    return {
        site.module: (weight.grad.T if site.transposed else weight.grad).clone()
        for site, weight in weights.items()
        if weight.grad is not None
    }


def spectrum(G: torch.Tensor) -> Spectrum:
    """The exact decomposition."""
    return Spectrum(G, *torch.linalg.svd(G, full_matrices=False))


def in_double(batch: Any) -> Any:
    """A batch, a dictionary or one tensor, with its floating-point tensors in float64."""
    if isinstance(batch, torch.Tensor):
        return batch.double()
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def own_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss that the model returns."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def angle(A: torch.Tensor, B: torch.Tensor) -> float:
    """Sine of the largest principal angle between the spans of the rows of two matrices of equally many rows."""
    Q, P = (torch.linalg.qr(each.double().T)[0] for each in (A, B))
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), 2))
