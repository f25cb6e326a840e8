"""The sparse product's derivatives against those of the dense matrix, in every mode: twice, forward, over samples."""

from __future__ import annotations

import pytest
import torch

from surgery.deltas import sparse
from surgery.deltas.sparse import Pattern
from surgery.deltas.sparse_autograd import mixed_product

SIZE, COLUMNS, ENTRIES = 30, 4, 25


@pytest.fixture(params=[True, False], ids=["kernels", "none"])
def inputs(request, monkeypatch):
    """A pattern with its positions, and z, d and the entries of S, float64."""
    if not request.param:
        monkeypatch.setattr(sparse, "_has_kernels", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(SIZE * SIZE, generator=generator)[:ENTRIES].sort().values
    shapes = [(SIZE, COLUMNS), (SIZE,), (ENTRIES,)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return Pattern.of(positions, SIZE), positions, drawn


def dense(positions: torch.Tensor, z: torch.Tensor, diagonal: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    S = torch.zeros(SIZE * SIZE, dtype=z.dtype).index_add(0, positions, values).reshape(SIZE, SIZE)
    return (torch.diag(diagonal) + S) @ z


def test_first_and_second_derivatives(inputs) -> None:
    pattern, positions, drawn = inputs
    assert torch.autograd.gradcheck(lambda *given: mixed_product(pattern, *given), drawn, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *given: mixed_product(pattern, *given), drawn)
    assert torch.allclose(mixed_product(pattern, *drawn), dense(positions, *drawn))


@pytest.mark.parametrize("batched", [(0, None, None), (0, 0, None), (None, None, 0), (2, 0, 0)], ids=str)
def test_over_samples(inputs, batched: tuple[int | None, ...]) -> None:
    pattern, positions, drawn = inputs
    many = [
        torch.stack([t.detach() * (1 + i) for i in range(3)], axis) if axis is not None else t.detach()
        for t, axis in zip(drawn, batched, strict=True)
    ]
    for of in (lambda f: f, lambda f: torch.func.grad(lambda *given: f(*given).square().sum(), argnums=(0, 1, 2))):
        found = torch.vmap(of(lambda *given: mixed_product(pattern, *given)), in_dims=batched)(*many)
        expected = torch.vmap(of(lambda *given: dense(positions, *given)), in_dims=batched)(*many)
        torch.testing.assert_close(found, expected)
