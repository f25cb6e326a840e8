"""A weight change `dW (out, in)` without forming it.

A `Delta` is built from an adapter's tensors and stays differentiable in them, so that training and measuring use
the same formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from surgery.deltas.sparse import Pattern
from surgery.deltas.sparse_autograd import mixed_product

__all__ = [
    "GAINS",
    "INPUTS",
    "OUTPUTS",
    "ROWS",
    "Delta",
    "Dense",
    "Gain",
    "Hadamard",
    "InputMap",
    "LowRank",
    "Sum",
    "WithBias",
]

# What one vector of gains is on: the rows of a weight, a layer's outputs (the rows and the bias), its inputs (columns).
ROWS, OUTPUTS, INPUTS = "rows", "outputs", "inputs"
GAINS = (ROWS, OUTPUTS, INPUTS)


class Delta(ABC):
    """A linear map `(..., in) -> (..., out)` that is added to a layer."""

    shape: tuple[int, int]

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`x dW^T`: `(..., in)` to `(..., out)`."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """`dW` itself, `(out, in)`."""

    def looked_up(self, index: torch.Tensor) -> torch.Tensor:
        """Columns of `dW`, `(..., out)` for an index `(...)`: what changes where an embedding is looked up."""
        return F.embedding(index, self.dense().T)

    def adapted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """`x (W + dW)^T + bias` in fewer products than base and change apart; None where there is no such form."""
        return None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(B, A)` with `dW = B A` exactly, `B (out, k)` and `A (k, in)`; None where no thin factors exist."""
        return None

    def gain_apart(self) -> tuple[Gain | None, Delta | None]:
        """The gain on the base weight that is a part of this change, and the rest; None for what is not there."""
        return None, self

    def transposed(self) -> Delta:
        """`dW^T`, for a change that has thin factors."""
        factors = self.factors()
        if factors is None:
            raise ValueError("only changes with thin factors are transposed")
        B, A = factors
        return LowRank(A.T, B.T)

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


class Dense(Delta):
    """A change that is formed: `dW (out, in)`."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix)

    def dense(self) -> torch.Tensor:
        return self.matrix.clone()  # callers write into what they get


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

    def looked_up(self, index: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(index, self.A.T), self.B) * self.scale

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

    def gain_apart(self) -> tuple[Gain | None, Delta | None]:
        gains = [delta for weight, delta in self.terms if isinstance(delta, Gain) and weight == 1.0]
        if len(gains) != 1:
            return None, self
        rest = [term for term in self.terms if term[1] is not gains[0]]
        if len(rest) == 1 and rest[0][0] == 1.0:
            return gains[0], rest[0][1]
        return gains[0], Sum(rest) if rest else None


class WithBias(Delta):
    """A weight change beside one of the layer's bias, which `surgery.deltas.on_layers.added_output` adds."""

    def __init__(self, change: Delta, bias: torch.Tensor) -> None:
        self.change, self.bias = change, bias
        self.shape = change.shape

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.change.apply(x)

    def looked_up(self, index: torch.Tensor) -> torch.Tensor:
        return self.change.looked_up(index)

    def dense(self) -> torch.Tensor:
        return self.change.dense()


class Gain(Delta):
    """`diag(1 + a) W diag(1 + b) - W`: gains on the rows and the columns of the base weight.

    Vectors hold the gains less one, which loses no digits where a gain is close to one.

    Args:
        weight: `W (out, in)`, or None where only the vectors are wanted.
        rows: `a (out,)`, or None for zeros.
        columns: `b (in,)`, or None for zeros.
        outputs: the rows are the layer's outputs: its bias has the gains, too. What that adds is no part of dW.
        shape: `(out, in)`, where there is no weight.
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        outputs: bool = False,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if weight is not None:
            shape = (int(weight.shape[0]), int(weight.shape[1]))
        if shape is None:
            raise ValueError("a gain without a weight needs its shape")
        self.weight, self.rows, self.columns, self.outputs = weight, rows, columns, outputs
        self.shape = shape

    @classmethod
    def of_kind(
        cls, kind: str, values: torch.Tensor, weight: torch.Tensor | None, shape: tuple[int, int] | None = None
    ) -> Gain:
        """One vector of gains, less one, on `rows`, `outputs` or `inputs`."""
        if kind == INPUTS:
            return cls(weight, columns=values, shape=shape)
        return cls(weight, rows=values, outputs=kind == OUTPUTS, shape=shape)

    @property
    def vector(self) -> tuple[str, torch.Tensor] | None:
        """What the gains are on and they, less one; None where they are on rows and columns at once."""
        if self.rows is not None:
            return None if self.columns is not None else (OUTPUTS if self.outputs else ROWS, self.rows)
        return None if self.columns is None else (INPUTS, self.columns)

    def on(self, weight: torch.Tensor | None) -> Gain:
        """The same gains on another weight `(out, in)`, or on none."""
        return Gain(weight, self.rows, self.columns, self.outputs, self.shape)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns is None and self.rows is not None:
            return F.linear(x, self._weight()) * self.rows
        if self.rows is None and self.columns is not None:
            return F.linear(x * self.columns, self._weight())
        return _product(x, self.dense)

    def looked_up(self, index: torch.Tensor) -> torch.Tensor:
        if self.rows is None or self.columns is not None:
            return super().looked_up(index)
        return F.embedding(index, self._weight().T) * self.rows

    def dense(self) -> torch.Tensor:
        weight = self._weight()
        if self.columns is None and self.rows is not None:
            return self.rows[:, None] * weight
        if self.rows is None and self.columns is not None:
            return weight * self.columns
        if self.rows is None or self.columns is None:
            return torch.zeros_like(weight)
        rows = self.rows[:, None]
        return (rows + self.columns + rows * self.columns) * weight

    def gain_apart(self) -> tuple[Gain, None]:
        return self, None

    def _weight(self) -> torch.Tensor:
        if self.weight is None:
            raise ValueError("this change needs the layer's weight")
        return self.weight


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
        return _product(x, self.dense)

    def adapted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _product(x, lambda: self.whole + self.dense(), bias)

    def dense(self) -> torch.Tensor:
        *products, last = [B @ A for B, A in self.pairs]
        # sum_{k<K} M_k * P_k + (W - sum_{k<K} M_k) * P_K, with the masks' common factor taken out
        total = self.whole * last
        for mask, product in zip(self.top, products, strict=True):
            total = total + mask * (product - last)
        return total


class InputMap(Delta):
    """`W T` with `T = P K Q`, `K = diag(g) (diag(c) + S)`: a change that acts on the layer's input.

    `W x + dW x = W (x + T x)`, so a layer that has `W` needs no copy of it. FRoD's `U (diag(l) + S) V^T - W` is of
    this form, with `Q = V^T`, `P = V^-T`, `g = 1 / l0` and `c = l - l0`. As `P Q = I`, with `W P` at hand
    `W x + dW x = W P (I + K) Q x` costs no more than two products.

    Args:
        weight: `W (out, in)`, or None where only `input_shift` is wanted.
        P: `(in, in)`.
        gain: `g (in,)`.
        diagonal: `c (in,)`.
        values: entries of `S`, `(nnz,)`, row by row.
        pattern: where these entries are.
        Q_transposed: `Q^T (in, in)`.
        left: `W P (out, in)`, for `adapted`.
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        P: torch.Tensor,
        gain: torch.Tensor,
        diagonal: torch.Tensor,
        values: torch.Tensor,
        pattern: Pattern,
        Q_transposed: torch.Tensor,
        left: torch.Tensor | None = None,
    ) -> None:
        self.weight, self.P, self.gain, self.diagonal, self.left = weight, P, gain, diagonal, left
        self.values, self.pattern, self.Q_transposed = values, pattern, Q_transposed
        size = P.shape[0]
        self.shape = (weight.shape[0] if weight is not None else size, size)

    def input_shift(self, x: torch.Tensor) -> torch.Tensor:
        """`T x`: `(..., in)` to `(..., in)`."""
        return F.linear(self._mixed(self._turned(x)).T, self.P).reshape(x.shape)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.input_shift(x), self._weight())

    def dense(self) -> torch.Tensor:
        left = self._weight() @ self.P if self.left is None else self.left
        return left @ self._mixed(self.Q_transposed.T)

    def adapted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        if self.left is None:
            return None
        (rows, size), tokens = self.shape, x.numel() // x.shape[-1]
        # Forward and backward products: with the factors, or with W + dW, formed twice and its gradient reduced once.
        if 2 * tokens * size * (size + rows) > 3 * tokens * size * rows + 3 * rows * size**2:
            return _product(x, lambda: self._weight() + self.dense(), bias)
        mixed = self._mixed(self._turned(x), identity=True)
        return F.linear(mixed.T, self.left, bias).reshape(*x.shape[:-1], rows)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """`Q x`, a column for each token."""
        return self.Q_transposed.T @ x.reshape(-1, x.shape[-1]).T

    def _mixed(self, z: torch.Tensor, identity: bool = False) -> torch.Tensor:
        """`K z`, or `(I + K) z`."""
        diagonal = self.gain * self.diagonal + float(identity)
        values = self.gain[self.pattern.rows()] * self.values
        return mixed_product(self.pattern, z, diagonal, values)

    def _weight(self) -> torch.Tensor:
        if self.weight is None:
            raise ValueError("this change needs the layer's weight")
        return self.weight


def _product(x: torch.Tensor, whole: Callable[[], torch.Tensor], bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x whole()^T + bias`, where the matrix is as large as the weight: rebuilt in the backward pass, not kept.

    Transforms, forward-mode differentiation and tracing go through the plain operations; so does a pass without
    gradients.
    """
    if not torch.is_grad_enabled() or _is_transformed(x):
        return F.linear(x, whole(), bias)
    result: torch.Tensor = checkpoint(lambda: F.linear(x, whole(), bias), use_reentrant=False, preserve_rng_state=False)
    return result


def _is_transformed(x: torch.Tensor) -> bool:
    """Return whether torch.func, forward-mode differentiation, torch.export or torch.jit.trace is at work."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
    )
