"""Every structured weight change against its dense form, with gradients, on all shapes."""

from __future__ import annotations

import pytest
import torch

from surgery.deltas.operators import Delta, Hadamard, InputMap, LowRank, Sum
from surgery.deltas.sparse import Pattern

OUT, IN = 7, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def low_rank() -> LowRank:
    return LowRank(draw(OUT, 3), draw(3, IN), scale=0.5)


def hadamard() -> Hadamard:
    whole, top = draw(OUT, IN), [draw(OUT, IN, seed=1), draw(OUT, IN, seed=2)]
    return Hadamard(whole, top, [(draw(OUT, 2, seed=k), draw(2, IN, seed=k)) for k in range(3)])


def input_map() -> InputMap:
    pattern = Pattern.of(torch.tensor([1, 8, 14, 20]), IN)
    return InputMap(draw(OUT, IN), draw(IN, IN), draw(IN), draw(IN, seed=1), draw(4), pattern, draw(IN, IN, seed=1))


def difference() -> Delta:
    return low_rank().minus(LowRank(draw(OUT, 2, seed=4), draw(2, IN, seed=4)))


CASES = {"low rank": low_rank, "hadamard": hadamard, "input map": input_map, "difference": difference}


def test_dense_forms_follow_the_definitions() -> None:
    d = low_rank()
    assert torch.allclose(d.dense(), 0.5 * d.B @ d.A)
    h = hadamard()
    masks = [*h.top, h.whole - h.top[0] - h.top[1]]
    naive = sum(mask * (B @ A) for mask, (B, A) in zip(masks, h.pairs, strict=True))
    assert torch.allclose(h.dense(), naive)
    m = input_map()
    S = torch.zeros(IN * IN, dtype=torch.float64)
    S[[1, 8, 14, 20]] = m.values
    middle = torch.diag(m.diagonal) + S.reshape(IN, IN)
    assert torch.allclose(m.dense(), m.weight @ m.P @ torch.diag(m.gain) @ middle @ m.Q_transposed.T)


@pytest.mark.parametrize("name", CASES)
def test_apply_factors_norm_and_minus_agree_with_dense(name: str) -> None:
    delta = CASES[name]()
    dense = delta.dense()
    assert delta.shape == tuple(dense.shape) == (OUT, IN)
    x = draw(2, 3, IN)
    assert torch.allclose(delta.apply(x), x @ dense.T)
    with torch.no_grad():
        assert torch.allclose(delta.apply(x), x @ dense.T)
    factors = delta.factors()
    if factors is not None:
        assert torch.allclose(factors[0] @ factors[1], dense)
    assert float(delta.norm()) == pytest.approx(float(dense.norm()))
    root = draw(IN, IN, seed=9)
    metric = root @ root.T
    assert float(delta.norm(metric)) == pytest.approx(float((dense @ root).norm()))
    other = low_rank()
    assert torch.allclose(delta.minus(other).dense(), dense - other.dense())
    assert float(delta.minus(delta).norm()) < 1e-9 * float(dense.norm())


@pytest.mark.parametrize("name", ["low rank", "hadamard", "input map"])
def test_gradients_are_those_of_the_dense_form(name: str) -> None:
    def parameters(delta: Delta) -> list[torch.Tensor]:
        if isinstance(delta, LowRank):
            return [delta.A, delta.B]
        if isinstance(delta, Hadamard):
            return [t for pair in delta.pairs for t in pair]
        assert isinstance(delta, InputMap)
        return [delta.diagonal, delta.values]

    grads = []
    for use in ("apply", "dense"):
        delta = CASES[name]()
        x = draw(4, IN).requires_grad_()
        leaves = [x, *parameters(delta)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = delta.apply(x) if use == "apply" else x @ delta.dense().T
        (y * draw(4, OUT)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for fused, plain in zip(*grads, strict=True):
        assert torch.allclose(fused, plain)


def test_equal_terms_cancel_to_the_last_bit() -> None:
    B, A = draw(OUT, 3).float(), draw(3, IN).float()
    delta = Sum([(0.3, LowRank(B, A)), (-0.3, LowRank(B.clone(), A.clone()))])
    assert bool((delta.apply(draw(50, IN).float()) == 0).all())


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="shapes"):
        low_rank().minus(LowRank(draw(3, 1), draw(1, IN)))


def test_an_input_map_without_weight_only_shifts() -> None:
    full = input_map()
    bare = InputMap(None, full.P, full.gain, full.diagonal, full.values, full.pattern, full.Q_transposed)
    x = draw(2, IN)
    assert torch.equal(bare.input_shift(x), full.input_shift(x))
    with pytest.raises(ValueError, match="weight"):
        bare.apply(x)


def with_left() -> InputMap:
    """`P` the inverse of `Q`, as `adapted` presumes, and `W P` at hand."""
    m, weight = input_map(), draw(OUT, IN)
    P = torch.linalg.inv(m.Q_transposed.T)
    return InputMap(weight, P, m.gain, m.diagonal, m.values, m.pattern, m.Q_transposed, weight @ P)


@pytest.mark.parametrize("tokens", [1, 3, 400])  # by factors, and by the whole matrix
@pytest.mark.parametrize("make", [with_left, hadamard])
@pytest.mark.parametrize("biased", [True, False])
def test_base_and_change_in_one_product(make, tokens: int, biased: bool) -> None:
    grads = []
    bias = draw(OUT) if biased else None
    for one in (True, False):
        delta = make()
        weight = delta.whole if isinstance(delta, Hadamard) else delta.weight
        trained = [t for p in delta.pairs for t in p] if isinstance(delta, Hadamard) else [delta.diagonal, delta.values]
        x = draw(2, tokens, IN).requires_grad_()
        leaves = [x, *(t.requires_grad_() for t in trained)]
        plain = torch.nn.functional.linear(x, weight + delta.dense(), bias)
        y = delta.adapted(x, bias) if one else plain
        assert y.shape == (2, tokens, OUT)
        assert torch.allclose(y, plain)
        with torch.no_grad():
            assert torch.allclose(delta.adapted(x, bias), plain)
        (y * draw(2, tokens, OUT)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected)


def test_what_has_no_form_in_one_product_says_so() -> None:
    x = draw(4, IN)
    assert low_rank().adapted(x) is None
    assert input_map().adapted(x) is None  # without W P
