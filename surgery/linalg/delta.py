"""A weight change `dW (out, in)` without forming it.

A `Delta` is built from an adapter's tensors and stays differentiable in them, so that training and measuring use
the same formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["Delta", "Hadamard", "InputMap", "LowRank", "Sum"]


class Delta(ABC):
    """A linear map `(..., in) -> (..., out)` that is added to a layer."""

    shape: tuple[int, int]

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`x dW^T`: `(..., in)` to `(..., out)`."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """`dW` itself, `(out, in)`."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(B, A)` with `dW = B A` exactly, `B (out, k)` and `A (k, in)`; None where no thin factors exist."""
        return None

    def norm(self, metric: torch.Tensor | None = None) -> torch.Tensor:
        """Frobenius norm of `dW`, or of `dW C^(1/2)` for an input second moment `metric = C (in, in)`.

        Through the factors where they exist, in float64.
        """
        factors = self.factors()
        if factors is None:
            wide = self.dense().double()
            gram_trace = (wide * wide).sum() if metric is None else ((wide @ metric.double()) * wide).sum()
            return gram_trace.clamp_min(0).sqrt()
        B, A = (factor.double() for factor in factors)
        if metric is None:
            # The triangular factors keep what a Gram matrix of nearly cancelling terms would lose.
            return torch.linalg.matrix_norm(torch.linalg.qr(B, mode="r")[1] @ torch.linalg.qr(A.T, mode="r")[1].T)
        return ((B.T @ B) * (A @ metric.double() @ A.T)).sum().clamp_min(0).sqrt()

    def minus(self, other: Delta) -> Delta:
        """`dW - dW'`, again without forming it."""
        return Sum([(1.0, self), (-1.0, other)])


class LowRank(Delta):
    """`scale * B A`.

    Args:
        B: `(out, r)`.
        A: `(r, in)`.
        scale: a number.
    """

    def __init__(self, B: torch.Tensor, A: torch.Tensor, scale: float = 1.0) -> None:
        self.B, self.A, self.scale = B, A, scale
        self.shape = (B.shape[0], A.shape[1])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def dense(self) -> torch.Tensor:
        return (self.B @ self.A) * self.scale

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.B * self.scale, self.A


class Sum(Delta):
    """A sum of weighted changes of one shape."""

    def __init__(self, terms: Sequence[tuple[float, Delta]]) -> None:
        self.terms = list(terms)
        self.shape = self.terms[0][1].shape
        if any(delta.shape != self.shape for _, delta in self.terms):
            raise ValueError(f"cannot add weight changes of shapes {sorted({d.shape for _, d in self.terms})}")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        # Term by term, not over concatenated factors: equal terms of opposite weight cancel to the last bit.
        total = self.terms[0][1].apply(x) * self.terms[0][0]
        for weight, delta in self.terms[1:]:
            total = total + delta.apply(x) * weight
        return total

    def dense(self) -> torch.Tensor:
        total = self.terms[0][1].dense() * self.terms[0][0]
        for weight, delta in self.terms[1:]:
            total = total + delta.dense() * weight
        return total

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        pairs = [(weight, delta.factors()) for weight, delta in self.terms]
        found = [(weight, *pair) for weight, pair in pairs if pair is not None]
        if len(found) < len(pairs):
            return None
        return torch.cat([w * B for w, B, _ in found], 1), torch.cat([A for _, _, A in found], 0)


class Hadamard(Delta):
    """`sum_k M_k * (B_k A_k)`, elementwise products with masks that sum to a known whole.

    Args:
        whole: the sum of all K masks, `(out, in)`.
        top: the masks but the last, K - 1 tensors `(out, in)`; the last is what remains of `whole` and is never
            formed.
        factors: K pairs `B_k (out, r_k)`, `A_k (r_k, in)`.
    """

    def __init__(
        self,
        whole: torch.Tensor,
        top: Sequence[torch.Tensor],
        factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.whole, self.top, self.pairs = whole, list(top), list(factors)
        self.shape = (int(whole.shape[0]), int(whole.shape[1]))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.dense())
        # The product is as large as the weight: rebuilt in the backward pass instead of kept for every layer.
        flat = [tensor for pair in self.pairs for tensor in pair]
        result: torch.Tensor = checkpoint(self._apply, x, *flat, use_reentrant=False, preserve_rng_state=False)
        return result

    def dense(self) -> torch.Tensor:
        return self._dense(self.pairs)

    def _apply(self, x: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._dense(list(zip(flat[::2], flat[1::2], strict=True))))

    def _dense(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        *products, last = [B @ A for B, A in pairs]
        # sum_{k<K} M_k * P_k + (W - sum_{k<K} M_k) * P_K, with the masks' common factor taken out
        total = self.whole * last
        for mask, product in zip(self.top, products, strict=True):
            total = total + mask * (product - last)
        return total


class InputMap(Delta):
    """`W T` with `T = P diag(g) (diag(c) + S) Q`: a change that acts on the layer's input.

    `W x + dW x = W (x + T x)`, so a layer that has `W` needs no copy of it. FRoD's `U (diag(l) + S) V^T - W` is of
    this form, with `Q = V^T`, `P = V^-T`, `g = 1 / l0` and `c = l - l0`.

    Args:
        weight: `W (out, in)`, or None where only `input_shift` is wanted.
        P: `(in, in)`.
        gain: `(in,)`.
        diagonal: `(in,)`.
        values: nonzeros of `S`, `(nnz,)`.
        positions: their places `row * in + column`, int64 `(nnz,)`.
        Q_transposed: `Q^T (in, in)`.
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        P: torch.Tensor,
        gain: torch.Tensor,
        diagonal: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        Q_transposed: torch.Tensor,
    ) -> None:
        self.weight, self.P, self.gain, self.diagonal = weight, P, gain, diagonal
        self.values, self.positions, self.Q_transposed = values, positions, Q_transposed
        size = P.shape[0]
        self.shape = (weight.shape[0] if weight is not None else size, size)

    def input_shift(self, x: torch.Tensor) -> torch.Tensor:
        """`T x`: `(..., in)` to `(..., in)`."""
        z = x @ self.Q_transposed
        mixed = z * self.diagonal
        if self.values.numel():
            mixed = mixed + _ScatteredLinear.apply(z, self.values, self.positions)
        return F.linear(mixed * self.gain, self.P)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.input_shift(x), self._weight())

    def dense(self) -> torch.Tensor:
        size = self.P.shape[0]
        middle = torch.diag(self.diagonal).flatten()
        middle = middle.scatter_add(0, self.positions, self.values).reshape(size, size)
        return ((self._weight() @ self.P) * self.gain) @ middle @ self.Q_transposed.T

    def _weight(self) -> torch.Tensor:
        if self.weight is None:
            raise ValueError("this change needs the layer's weight")
        return self.weight


class _ScatteredLinear(torch.autograd.Function):
    """`x S^T` for a sparse square `S`, through a dense matrix that lives only inside each call.

    A dense product is faster than a sparse one at these densities; keeping the dense matrix for the backward pass
    would cost as much memory as the layer's weight, so it is scattered again there.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, values, positions)
        return F.linear(x, _scattered(values, positions, x.shape[-1], x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, values, positions = ctx.saved_tensors
        size = x.shape[-1]
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.to(x.dtype) @ _scattered(values, positions, size, x.dtype)
        if ctx.needs_input_grad[1]:
            outer = grad.reshape(-1, size).T.to(x.dtype) @ x.reshape(-1, size)  # (in, in)
            grad_values = outer.flatten()[positions].to(values.dtype)
        return grad_x, grad_values, None


def _scattered(values: torch.Tensor, positions: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    dense = torch.zeros(size * size, dtype=dtype, device=values.device)
    return dense.scatter_(0, positions, values.to(dtype)).reshape(size, size)
