"""SMoA's weight change: low-rank factors on the diagonal blocks of a weight, each multiplied by its block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from surgery.deltas.operators import Delta
from surgery.linalg.spectral_scores import part_sizes

__all__ = ["Blocks"]

# From so many tokens on, base and change are one product. Block by block a training step multiplies `4 / K` times
# more numbers for each token; one product copies the weight twice, whatever the number of tokens.
# Measured on stacks of 1024-wide linears, K = 2, r = 32, one thread: equal at 256 tokens, and 1.9 against 2.3 of a
# LoRA's step at 512.
MANY_TOKENS = 256


class Layout(NamedTuple):
    """How factors and blocks lie.

    Attributes:
        ranks: K ranks; block k has the next `ranks[k]` rows of A and columns of B.
        scale: `alpha / r`.
    """

    ranks: tuple[int, ...]
    scale: float


class Block(NamedTuple):
    """One block: its rows and columns in the weight `(m,)`, `(n,)`, and where its factors are."""

    rows: torch.Tensor
    columns: torch.Tensor
    ranks: slice


class Blocks(Delta):
    """`dW[rows_k, columns_k] = scale * (B_k A_k) * W[rows_k, columns_k]`, zero outside the K blocks.

    Args:
        whole: `W (out, in)`.
        rows: the rows' indices, block after block, `(out,)`; the first `out mod K` blocks have one row more.
        columns: the same of the columns, `(in,)`.
        B: `(ceil(out / K), r)`: `B_k` is the first rows of the next `ranks[k]` columns.
        A: `(r, ceil(in / K))`: `A_k` is the first columns of the next `ranks[k]` rows.
        ranks: K ranks; their sum is r.
        scale: a number.
    """

    def __init__(
        self,
        whole: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        B: torch.Tensor,
        A: torch.Tensor,
        ranks: Sequence[int],
        scale: float,
    ) -> None:
        self.whole, self.rows, self.columns, self.B, self.A = whole, rows, columns, B, A
        self.layout = Layout(tuple(ranks), scale)
        self.shape = (int(whole.shape[0]), int(whole.shape[1]))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, None, _by_block, _BlockwiseProduct)

    def adapted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        if x.numel() < MANY_TOKENS * x.shape[-1]:
            return None
        return self._product(x, bias, _at_once, _ProductAtOnce)

    def dense(self) -> torch.Tensor:
        changes = _changes(self.A, self.B, self.whole, self.rows, self.columns, self.layout)
        nothing = torch.zeros(self.shape, dtype=changes[0][1].dtype, device=self.whole.device)
        return _replaced(nothing, changes)

    def norm(self, metric: torch.Tensor | None = None) -> torch.Tensor:
        if metric is not None:
            return super().norm(metric)
        changes = _changes(self.A, self.B, self.whole, self.rows, self.columns, self.layout)
        squares = [change.double().square().sum() for _, change in changes]
        return torch.stack(squares).sum().sqrt()

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, plain: Any, function: Any) -> torch.Tensor:
        inputs = (x, bias, self.A, self.B, self.whole, self.rows, self.columns, self.layout)
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if not torch.is_grad_enabled() or tracing or _has_tangent(x, self.A, self.B):
            result: torch.Tensor = plain(*inputs)
        elif torch.is_autocast_enabled(x.device.type):
            # Rebuilt in the backward pass under the same autocast, not kept.
            result = checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            result = function.apply(*inputs)
        return result


class _Rebuilding(torch.autograd.Function):
    """A product whose matrix, as large as the weight, is built in the forward and again in the backward pass.

    Of the gradient of that matrix only the blocks are computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, bias, A, B, whole, rows, columns, layout = inputs
        ctx.save_for_backward(x, A, B, whole, rows, columns)
        ctx.layout, ctx.bias_shape = layout, None if bias is None else bias.shape

    @classmethod
    def gradients(cls, ctx: Any, grad: torch.Tensor, blockwise: bool) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, bias, A and B, and None for what is frozen. Differentiable."""
        x, A, B, whole, rows, columns = ctx.saved_tensors
        wants_x, wants_bias, wants_A, wants_B = ctx.needs_input_grad[:4]
        changes = _changes(A, B, whole, rows, columns, ctx.layout)
        grad_x = grad_bias = grad_A = grad_B = None
        if wants_x and blockwise:
            found = [grad.index_select(-1, block.rows) @ change.to(grad.dtype) for block, change in changes]
            grad_x = torch.cat(found, -1).index_select(-1, torch.argsort(columns))
        elif wants_x:
            grad_x = grad @ _merged(whole, changes).to(grad.dtype)
        if wants_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).reshape(ctx.bias_shape)
        if wants_A or wants_B:
            grad_A, grad_B = _factor_gradients(x, grad, A, B, whole, changes, ctx.layout)
        return grad_x, grad_bias, grad_A, grad_B, None, None, None, None


class _BlockwiseProduct(_Rebuilding):
    """`x dW^T`, block by block."""

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return _by_block(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Rebuilding.gradients(ctx, grad, blockwise=True)


class _ProductAtOnce(_Rebuilding):
    """`x (W + dW)^T + bias`."""

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return _at_once(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Rebuilding.gradients(ctx, grad, blockwise=False)


def _by_block(
    x: torch.Tensor,
    bias: None,
    A: torch.Tensor,
    B: torch.Tensor,
    whole: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    layout: Layout,
) -> torch.Tensor:
    """`x dW^T`: `(..., in)` to `(..., out)`."""
    changes = _changes(A, B, whole, rows, columns, layout)
    parts = [F.linear(x.index_select(-1, block.columns), change.to(x.dtype)) for block, change in changes]
    return torch.cat(parts, -1).index_select(-1, torch.argsort(rows))


def _at_once(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    whole: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    layout: Layout,
) -> torch.Tensor:
    """`x (W + dW)^T + bias`: `(..., in)` to `(..., out)`."""
    merged = _merged(whole, _changes(A, B, whole, rows, columns, layout))
    return F.linear(x, merged.to(x.dtype), bias)


def _changes(
    A: torch.Tensor, B: torch.Tensor, whole: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, layout: Layout
) -> list[tuple[Block, torch.Tensor]]:
    """The blocks, and the change `(m, n)` of each."""
    count = len(layout.ranks)
    parts = zip(
        rows.split(part_sizes(rows.numel(), count)), columns.split(part_sizes(columns.numel(), count)), strict=True
    )
    found, start = [], 0
    for (its_rows, its_columns), rank in zip(parts, layout.ranks, strict=True):
        block = Block(its_rows, its_columns, slice(start, start + rank))
        B_k, A_k = B[: its_rows.numel(), block.ranks], A[block.ranks, : its_columns.numel()]
        found.append((block, (B_k * layout.scale) @ A_k * _anchor(whole, block)))
        start += rank
    return found


def _anchor(whole: torch.Tensor, block: Block) -> torch.Tensor:
    """`W[rows, columns]`, `(m, n)`."""
    return whole[block.rows[:, None], block.columns]


def _merged(whole: torch.Tensor, changes: Sequence[tuple[Block, torch.Tensor]]) -> torch.Tensor:
    """`W + dW`."""
    wide = whole.to(torch.promote_types(whole.dtype, changes[0][1].dtype))
    return _replaced(wide, [(block, _anchor(whole, block) + change) for block, change in changes])


def _replaced(matrix: torch.Tensor, values: Sequence[tuple[Block, torch.Tensor]]) -> torch.Tensor:
    """A copy of a matrix with other values in its blocks."""
    (first, value), *others = values
    # The first call copies; what it returns carries every dimension that vmap adds, so that the others may write.
    result = matrix.index_put((first.rows[:, None], first.columns), value)
    for block, other in others:
        result.index_put_((block.rows[:, None], block.columns), other)
    return result


def _factor_gradients(
    x: torch.Tensor,
    grad: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    whole: torch.Tensor,
    changes: Sequence[tuple[Block, torch.Tensor]],
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A and B."""
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    of_A, of_B = [], []
    for block, _ in changes:
        seen = grad.index_select(1, block.rows).T @ x.index_select(1, block.columns)  # (m, n)
        seen = (seen.to(A.dtype) * _anchor(whole, block)).to(A.dtype) * layout.scale
        (m, n), ranks = seen.shape, block.ranks
        of_A.append(F.pad(B[:m, ranks].T @ seen, (0, A.shape[1] - n)))
        of_B.append(F.pad(seen @ A[ranks, :n].T, (0, 0, 0, B.shape[0] - m)))
    return torch.cat(of_A, 0), torch.cat(of_B, 1)


def _has_tangent(*tensors: torch.Tensor) -> bool:
    """Whether forward-mode differentiation is at work, which goes through the plain operations."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
