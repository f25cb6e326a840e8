"""SMoA's blocks against the definition in float64: the change, outputs, gradients, and torch's transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.deltas import blocks
from surgery.deltas.blocks import Blocks
from surgery.linalg.spectral_scores import part_sizes
from tests.helpers.smoa_reference import block_change

CASES = {
    "two": ((10, 8), (2, 2)),
    "ragged": ((11, 7), (3, 1)),
    "one": ((6, 9), (3,)),
    "three": ((7, 11), (2, 1, 1)),
    "five, one of rank zero": ((13, 12), (1, 2, 0, 1, 1)),
}
SCALE = 1.7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts_and_delta(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Blocks]:
    """Random blocks, and the change with its padded factors; what pads them is not zero."""
    (rows, columns), ranks = CASES[name]
    count, generator = len(ranks), torch.Generator().manual_seed(1)
    order_rows, order_columns = (torch.randperm(size, generator=generator) for size in (rows, columns))
    parts = list(zip(order_rows.tensor_split(count), order_columns.tensor_split(count), strict=True))
    weight, B, A = draw(rows, columns), draw(-(-rows // count), sum(ranks)), draw(sum(ranks), -(-columns // count))
    tensors = [each.to(dtype) for each in (weight, B, A)]
    return parts, Blocks(tensors[0], order_rows, order_columns, tensors[1], tensors[2], ranks, SCALE)


def reference(parts: Any, delta: Blocks, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    count = len(parts)
    heights, widths = (part_sizes(size, count) for size in delta.shape)
    factors, start = [], 0
    for height, width, rank in zip(heights, widths, delta.layout.ranks, strict=True):
        factors.append((B[:height, start : start + rank], A[start : start + rank, :width]))
        start += rank
    return block_change(delta.whole, parts, factors, SCALE)


@pytest.mark.parametrize("name", CASES)
def test_change_norm_and_outputs_follow_the_definition(name: str) -> None:
    parts, delta = parts_and_delta(name)
    dense = reference(parts, delta, delta.B, delta.A)
    assert delta.shape == tuple(dense.shape) and torch.allclose(delta.dense(), dense)
    assert float(delta.norm()) == pytest.approx(float(dense.norm()))
    root = draw(dense.shape[1], dense.shape[1])
    assert float(delta.norm(root @ root.T)) == pytest.approx(float((dense @ root).norm()))
    outside = torch.ones_like(dense, dtype=torch.bool)
    for rows, columns in parts:
        outside[rows[:, None], columns] = False
    assert not dense[outside].any() and not delta.dense()[outside].any()
    for x in (draw(2, 3, dense.shape[1]), draw(dense.shape[1])):
        assert torch.allclose(delta.apply(x), x @ dense.T)
        with torch.no_grad():
            assert torch.allclose(delta.apply(x), x @ dense.T)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["apply", "adapted"])
def test_gradients_are_those_of_the_definition(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MANY_TOKENS", 1)
    parts, delta = parts_and_delta(name)
    x, bias = draw(2, 3, delta.shape[1]), draw(delta.shape[0])
    goal = draw(2, 3, delta.shape[0])
    found = []
    for ours in (True, False):
        leaves = [each.clone().requires_grad_() for each in (x, bias, delta.A, delta.B)]
        x_, bias_, delta_A, delta_B = leaves
        change = Blocks(delta.whole, delta.rows, delta.columns, delta_B, delta_A, delta.layout.ranks, SCALE)
        if ours:
            y = change.apply(x_) + bias_ if way == "apply" else change.adapted(x_, bias_)
        else:
            base = 0 if way == "apply" else delta.whole
            y = x_ @ (base + reference(parts, delta, delta_B, delta_A)).T + bias_
        assert y is not None
        (y * goal).sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    for ours_, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_few_tokens_have_no_form_with_the_base() -> None:
    _, delta = parts_and_delta("two")
    assert delta.adapted(draw(blocks.MANY_TOKENS - 1, 8)) is None
    assert delta.adapted(draw(4, blocks.MANY_TOKENS // 4, 8)) is not None


def test_a_bias_that_trains_and_an_input_that_does_not() -> None:
    _, delta = parts_and_delta("ragged")
    bias = draw(11).requires_grad_()
    y = delta.adapted(draw(blocks.MANY_TOKENS, 7), bias)
    assert y is not None
    y.sum().backward()
    assert torch.allclose(bias.grad, torch.full((11,), float(blocks.MANY_TOKENS), dtype=torch.float64))


@pytest.mark.parametrize("way", ["apply", "adapted"])
def test_transforms_of_torch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Double backward, torch.func.grad, vmap over samples and over adapters, jvp: as of the plain operations."""
    monkeypatch.setattr(blocks, "MANY_TOKENS", 1)
    parts, delta = parts_and_delta("three")
    x = draw(4, delta.shape[1])

    def ours(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        change = Blocks(delta.whole, delta.rows, delta.columns, B, A, delta.layout.ranks, SCALE)
        result = change.apply(x) if way == "apply" else change.adapted(x)
        assert result is not None
        return result

    def plain(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        base = 0 if way == "apply" else delta.whole
        return x @ (base + reference(parts, delta, B, A)).T

    def loss(f: Any) -> Any:
        return lambda A, B, x: f(A, B, x).square().sum()

    inputs = [each.clone().requires_grad_() for each in (delta.A, delta.B, x)]
    assert torch.autograd.gradgradcheck(loss(ours), inputs)
    for transformed in (
        lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2))(delta.A, delta.B, x),
        lambda f: torch.func.vmap(torch.func.grad(loss(f)), in_dims=(None, None, 0))(delta.A, delta.B, x[:, None]),
        lambda f: torch.func.vmap(f, in_dims=(0, 0, None))(
            torch.stack([delta.A, 2 * delta.A]), torch.stack([delta.B, delta.B]), x
        ),
        lambda f: torch.func.jvp(lambda A: f(A, delta.B, x), (delta.A,), (torch.ones_like(delta.A),)),
    ):
        torch.testing.assert_close(transformed(ours), transformed(plain))


@pytest.mark.parametrize("way", ["apply", "adapted"])
def test_autocast_and_mixed_dtypes(way: str) -> None:
    parts, delta = parts_and_delta("two", torch.float32)
    dense = reference(parts, delta, delta.B, delta.A)
    A, B = delta.A.clone().requires_grad_(), delta.B.clone().requires_grad_()
    x = draw(blocks.MANY_TOKENS, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        change = Blocks(delta.whole, delta.rows, delta.columns, B, A, delta.layout.ranks, SCALE)
        y = change.apply(x) if way == "apply" else change.adapted(x)
    assert y is not None and y.dtype == torch.bfloat16
    y.float().sum().backward()
    wanted = x @ (dense if way == "apply" else dense + delta.whole).T
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 2e-2
    assert A.grad is not None and A.grad.dtype == torch.float32 and bool(A.grad.isfinite().all())
    # A base in half precision under factors in float32: the change is made in float32.
    half = Blocks(delta.whole.bfloat16(), delta.rows, delta.columns, B, A, delta.layout.ranks, SCALE)
    widened = Blocks(half.whole.float(), half.rows, half.columns, B, A, half.layout.ranks, SCALE)
    found = half.apply(x)
    torch.testing.assert_close(found, x @ reference(parts, widened, B, A).T, rtol=1e-5, atol=1e-4)
    found.sum().backward()


@pytest.mark.parametrize("way", ["apply", "adapted"])
def test_compiled_in_one_graph_it_is_the_same(way: str) -> None:
    _, delta = parts_and_delta("three")
    x = draw(blocks.MANY_TOKENS, delta.shape[1])

    def product(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor | None:
        change = Blocks(delta.whole, delta.rows, delta.columns, B, A, delta.layout.ranks, SCALE)
        return change.apply(x) if way == "apply" else change.adapted(x)

    results = []
    for function in (product, torch.compile(product, backend="eager", fullgraph=True)):
        A, B = delta.A.clone().requires_grad_(), delta.B.clone().requires_grad_()
        y = function(x, A, B)
        y.square().sum().backward()
        results.append([y, A.grad, B.grad])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass() -> None:
    size = 64
    order = torch.arange(size)
    A, B = torch.randn(4, size // 2, requires_grad=True), torch.randn(size // 2, 4, requires_grad=True)
    delta = Blocks(torch.randn(size, size), order, order, B, A, (2, 2), 1.0)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        delta.apply(torch.randn(3, size)).sum()
        y = delta.adapted(torch.randn(blocks.MANY_TOKENS, size))
    assert y is not None
    large = [tensor for tensor in kept if tensor.numel() >= size * size and tensor.data_ptr() != delta.whole.data_ptr()]
    assert [tuple(tensor.shape) for tensor in large] == [(blocks.MANY_TOKENS, size)]  # the input
