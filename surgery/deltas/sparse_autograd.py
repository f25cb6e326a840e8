"""`(diag(d) + S) z` for a sparse square S, differentiable as often and in every mode that torch knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from surgery.deltas.sparse import Pattern, sampled_outer, sparse_product

__all__ = ["mixed_product"]

Gradients = tuple[torch.Tensor | None, ...]


def mixed_product(pattern: Pattern, z: torch.Tensor, diagonal: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `(diag(d) + S) z`, `(n, k)` in z's dtype, differentiable in z, d and the entries of S.

    Args:
        pattern: where the entries of S are.
        z: `(n, k)`.
        diagonal: `d (n,)`.
        values: the entries of S, `(nnz,)`, row by row.
    """
    mixed: torch.Tensor = _mixed(z, diagonal, values, *pattern, False)
    return mixed


class _Mixed(torch.autograd.Function):
    """`(diag(d) + S) z`, or `(diag(d) + S^T) z`; without a diagonal `S z` or `S^T z`."""

    @staticmethod
    def forward(
        z: torch.Tensor,
        diagonal: torch.Tensor | None,
        values: torch.Tensor,
        starts: torch.Tensor,
        columns: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        # The sparse products take rows: of columns, as a linear's gradient comes, they are ten times slower.
        product = sparse_product(Pattern(starts, columns), values, z.contiguous() if transposed else z, transposed)
        return product if diagonal is None else product.addcmul_(z, diagonal[:, None].to(z.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, transposed = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.transposed = transposed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        z, diagonal, values, *places = ctx.saved_tensors
        grad = grad.to(z.dtype)
        grad_z = grad_diagonal = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_z = _mixed(grad, diagonal, values, *places, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            grad_diagonal = torch.linalg.vecdot(grad, z, dim=1).to(diagonal.dtype)
        if ctx.needs_input_grad[2]:
            left, right = (z, grad) if ctx.transposed else (grad, z)
            grad_values = _sampled_outer(left, right, *places).to(values.dtype)
        return grad_z, grad_diagonal, grad_values, None, None, None


class _SampledOuter(torch.autograd.Function):
    """The entries of `u x^T` at the places of S, `(nnz,)`."""

    @staticmethod
    def forward(u: torch.Tensor, x: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return sampled_outer(Pattern(starts, columns), u.contiguous(), x.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        u, x, *places = ctx.saved_tensors
        grad_u = _mixed(x, None, grad, *places, False) if ctx.needs_input_grad[0] else None
        grad_x = _mixed(u, None, grad, *places, True) if ctx.needs_input_grad[1] else None
        return grad_u, grad_x, None, None


class _MixedInEveryMode(_Mixed):
    """As `_Mixed`, also for forward-mode differentiation and over samples; torch.compile knows neither."""

    @staticmethod
    def jvp(ctx: Any, of_z: Any, of_diagonal: Any, of_values: Any, *_: Any) -> torch.Tensor:
        z, diagonal, values, *places = ctx.saved_tensors
        tangent = torch.zeros_like(z)
        if of_z is not None:
            tangent = tangent + _mixed(of_z, diagonal, values, *places, ctx.transposed)
        if of_diagonal is not None:
            tangent = tangent + of_diagonal[:, None].to(z.dtype) * z
        if of_values is not None:
            tangent = tangent + _mixed(z, None, of_values, *places, ctx.transposed)
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        z, *rest = inputs
        if in_dims[0] is None or any(axis is not None for axis in in_dims[1:]):
            return _one_by_one(_mixed, info, in_dims, inputs)
        # All samples have the same matrix: their columns side by side.
        z = z.movedim(in_dims[0], 1)  # (n, samples, k)
        product = _mixed(z.reshape(z.shape[0], -1), *rest)
        return product.reshape(z.shape), 1


class _SampledOuterInEveryMode(_SampledOuter):
    """As `_SampledOuter`, also for forward-mode differentiation and over samples."""

    @staticmethod
    def jvp(ctx: Any, of_u: Any, of_x: Any, *_: Any) -> torch.Tensor | None:
        u, x, *places = ctx.saved_tensors
        tangents = [_sampled_outer(of_u, x, *places)] if of_u is not None else []
        tangents += [_sampled_outer(u, of_x, *places)] if of_x is not None else []
        return torch.stack(tangents).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        return _one_by_one(_sampled_outer, info, in_dims, inputs)


def _mixed(*inputs: Any) -> Any:
    return (_Mixed if torch.compiler.is_compiling() else _MixedInEveryMode).apply(*inputs)


def _sampled_outer(*inputs: Any) -> Any:
    return (_SampledOuter if torch.compiler.is_compiling() else _SampledOuterInEveryMode).apply(*inputs)


def _one_by_one(
    function: Callable[..., torch.Tensor], info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[torch.Tensor, int]:
    """Apply a function to each sample of a batch: no sparse kernel takes several matrices at once."""
    samples = [
        function(
            *(given if axis is None else given.select(axis, index) for given, axis in zip(inputs, in_dims, strict=True))
        )
        for index in range(info.batch_size)
    ]
    return torch.stack(samples), 0
