"""The gradient of a weight from its tokens: each road to its leading triplets against the exact decomposition."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from surgery.linalg import token_products
from surgery.linalg.token_products import TokenProduct, leading_svd
from tests.helpers.reference import angle

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def tokens(count: int, rows: int, columns: int, decay: float = 1.0, seed: int = 0) -> Pairs:
    """Inputs and output gradients whose product has singular values that fall like `k^-decay`; 0 is noise."""
    generator = torch.Generator().manual_seed(seed)
    D, X = (torch.randn(count, width, generator=generator) for width in (rows, columns))
    if decay:
        shared = torch.randn(count, min(count, rows, columns), generator=generator)
        scales = torch.arange(1, shared.shape[1] + 1) ** -decay
        U, V = (torch.randn(shared.shape[1], width, generator=generator) for width in (rows, columns))
        D, X = shared * scales @ U, shared @ V
    return [(D, X)]


def exact(pairs: Pairs) -> torch.Tensor:
    return sum(D.double().T @ X.double() for D, X in pairs)


def captured(G: torch.Tensor, Vh: torch.Tensor, rank: int) -> float:
    best = torch.linalg.svdvals(G)[:rank].square().sum()
    return float((G @ Vh.double().T).square().sum() / best)


def check(pairs: Pairs, rank: int, share: float = 0.995) -> None:
    """Both sides orthonormal, as much energy as the exact vectors hold, and triplets that belong together."""
    svd = leading_svd(TokenProduct(pairs), rank)
    G = exact(pairs)
    kept = min(rank, *G.shape)
    assert svd.U.shape == (G.shape[0], kept) and svd.Vh.shape == (kept, G.shape[1]) and svd.S.shape == (kept,)
    for Q in (svd.U.T, svd.Vh):
        assert torch.allclose(Q @ Q.T, torch.eye(kept), atol=1e-4)
    if float(G.norm()) == 0:
        assert not svd.S.any()
        return
    assert captured(G, svd.Vh, kept) >= share
    assert captured(G.T, svd.U.T, kept) >= share
    core = svd.U.double().T @ G @ svd.Vh.double().T
    assert torch.allclose(core, torch.diag(svd.S.double()), atol=2e-3 * float(torch.linalg.svdvals(G)[0]))


@pytest.fixture
def road(monkeypatch) -> Callable[[], list[str]]:
    """Which roads were taken."""
    taken: list[str] = []
    for name in ("svd_of_product", "svd_of_map", "truncated_svd"):
        function = getattr(token_products, name)

        def noted(*args, name: str = name, function=function):
            taken.append(name)
            return function(*args)

        monkeypatch.setattr(token_products, name, noted)
    return lambda: taken


# tokens, rows, columns, rank, road
SHAPES = [
    (20, 300, 200, 8, "svd_of_product"),
    (32, 100, 90, 8, "svd_of_product"),
    (1, 60, 50, 4, "svd_of_product"),
    (5, 200, 300, 32, "svd_of_product"),
    (200, 600, 500, 8, "svd_of_map"),
    (3000, 500, 600, 8, "svd_of_map"),
    (3000, 500, 600, 48, "truncated_svd"),
    (300, 40, 30, 8, "truncated_svd"),
    (900, 200, 1, 8, "truncated_svd"),
    (900, 1, 200, 8, "truncated_svd"),
    (400, 64, 48, 200, "truncated_svd"),
]


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("count", "rows", "columns", "rank", "expected"), SHAPES)
def test_each_road(count: int, rows: int, columns: int, rank: int, expected: str, decay: float, road) -> None:
    check(tokens(count, rows, columns, decay), rank, 0.995 if decay else 0.99)  # noise has no leading directions
    assert road() == [expected]


def test_control_a_random_basis_captures_less() -> None:
    G = exact(tokens(200, 600, 500, 0.5))
    Q = torch.linalg.qr(torch.randn(500, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert captured(G, Q.T, 8) < 0.3


@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("count", [300, 3000])
def test_fewer_directions_than_asked_for(count: int, rank: int) -> None:
    """Tokens that are all multiples of three."""
    generator = torch.Generator().manual_seed(2)
    shares = torch.randn(count, 3, generator=generator)
    D, X = (shares @ torch.randn(3, width, generator=generator) for width in (400, 300))
    check([(D, X)], rank)


@pytest.mark.parametrize("count", [4, 300, 3000])
def test_zero(count: int) -> None:
    check([(torch.zeros(count, 400), tokens(count, 400, 300)[0][1])], 8)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_does_not_matter(scale: float) -> None:
    """Gradients of a mean over many tokens are tiny."""
    ((D, X),) = tokens(200, 600, 500, 0.5)
    check([(D * scale, X)], 8)


@pytest.mark.parametrize("count", [10, 200, 3000])
def test_several_pairs_are_one(count: int) -> None:
    """A layer that is called several times: the gradient is the sum."""
    pairs = tokens(count, 300, 200, seed=1) + tokens(count + 7, 300, 200, seed=2) + tokens(1, 300, 200, seed=3)
    check(pairs, 8)
    G = exact(pairs)
    assert captured(G, leading_svd(TokenProduct(pairs[:1]), 8).Vh, 8) < 0.9
    product = TokenProduct(pairs)
    Q = torch.randn(200, 5, generator=torch.Generator().manual_seed(4))
    P = torch.randn(300, 5, generator=torch.Generator().manual_seed(5))
    for found, expected in ((product.dense(), G), (product @ Q, G @ Q.double()), (product.T @ P, G.T @ P.double())):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [10, 200, 3000])
def test_other_dtypes_are_summed_in_float32(count: int, dtype: torch.dtype, monkeypatch) -> None:
    """In pieces, so that no whole copy in float32 is made; the reference sums the same rounded numbers."""
    monkeypatch.setattr(token_products, "CHUNK", 64)
    ((D, X),) = tokens(count, 300, 200)
    D, X = D.to(dtype), X.to(dtype)
    check([(D, X)], 8)
    product = TokenProduct([(D, X), (D.float(), X.float())])
    assert torch.allclose(product.dense().double(), 2 * exact([(D, X)]), atol=1e-4 * float(exact([(D, X)]).abs().max()))


def test_same_seed_same_result() -> None:
    pairs = tokens(200, 600, 500, 0.5)
    first, second = (leading_svd(TokenProduct(pairs), 8, seed=3) for _ in range(2))
    assert torch.equal(first.Vh, second.Vh) and torch.equal(first.U, second.U)


# Other processes: their share is added by a function that is given


@pytest.mark.parametrize(
    ("counts", "rows", "columns", "rank"),
    [((90, 110), 600, 500, 8), ((1500, 1500), 500, 600, 8), ((3, 9), 300, 200, 8), ((20, 15), 60, 50, 8)],
)
def test_sums_over_processes(counts: tuple[int, int], rows: int, columns: int, rank: int) -> None:
    """Two threads stand for two processes; both must come to the decomposition of all tokens."""
    shares = [tokens(count, rows, columns, 0.5, seed=number) for number, count in enumerate(counts)]
    barrier = threading.Barrier(2)
    posted: list[torch.Tensor | None] = [None, None]
    found: list[Any] = [None, None]

    def run(me: int) -> None:
        def reduce(tensor: torch.Tensor) -> None:
            posted[me] = tensor.clone()
            barrier.wait(20)
            total = posted[0] + posted[1]
            barrier.wait(20)
            tensor.copy_(total)

        found[me] = leading_svd(TokenProduct(shares[me], reduce), rank)

    threads = [threading.Thread(target=run, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    G = exact(shares[0] + shares[1])
    assert torch.equal(found[0].Vh, found[1].Vh)
    assert captured(G, found[0].Vh, rank) >= 0.995
    alone = leading_svd(TokenProduct(shares[0] + shares[1]), rank)
    assert angle(found[0].Vh, alone.Vh) < 1e-3
    assert torch.allclose(found[0].S, alone.S, rtol=1e-3)
    # The control: one process's tokens alone are not enough.
    assert captured(G, leading_svd(TokenProduct(shares[0]), rank).Vh, rank) < 0.99
