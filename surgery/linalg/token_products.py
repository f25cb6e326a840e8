"""The gradient of a linear layer's weight, from what its tokens hold, without forming it.

For a layer `y = W x` and N tokens with inputs `X (N, in)` and output gradients `D (N, out)` the gradient is
`G = D^T X`. Its leading singular vectors need only products: `G Q = D^T (X Q)` costs `N (in + out) q` where forming G
costs `N in out`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from surgery.linalg.low_rank import TruncatedSVD, orthonormal_to, svd_of_map, svd_of_product, truncated_svd
from surgery.system.processes import Reduce

__all__ = ["TokenProduct", "leading_svd"]

# Tokens that are worked on at a time where they must be cast to float32 first.
CHUNK = 4096
# What the choice of road reckons with: blocks of the iteration, products for each; and how much slower an operation is
# in a product with a few columns than in one of two large matrices.
BLOCKS = 2.5
SKINNY = 1.6
# About what share of the energy that the exact vectors hold may be missed. On noise, the flattest spectrum there is, it
# is up to 0.7 %, on real gradients up to 0.2 %.
MISSING = 4e-3

Pair = tuple[torch.Tensor, torch.Tensor]


class TokenProduct:
    """`G = sum_i D_i^T X_i (out, in)` as a `LinearMap`, float32.

    Args:
        pairs: `(D_i (N_i, out), X_i (N_i, in))`, of any floating dtype, all on one device.
        reduce: sums products over the processes that hold other tokens of the same layer; None for one process.
    """

    dtype = torch.float32

    def __init__(self, pairs: Sequence[Pair], reduce: Reduce | None = None) -> None:
        self.pairs = list(pairs)
        self.reduce = reduce
        D, X = self.pairs[0]
        self.shape = (int(D.shape[1]), int(X.shape[1]))
        self.device = D.device

    @property
    def T(self) -> TokenProduct:
        """`G^T`."""
        return TokenProduct([(X, D) for D, X in self.pairs], self.reduce)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        """`G Q`: `(in, q)` to `(out, q)`."""
        total = torch.zeros(self.shape[0], other.shape[1], device=self.device)
        for D, X in self._chunks():
            total.addmm_(D.T, X @ other)
        if self.reduce is not None:
            self.reduce(total)
        return total

    def dense(self) -> torch.Tensor:
        """G itself, `(out, in)`."""
        total = torch.zeros(self.shape, device=self.device)
        for D, X in self._chunks():
            total.addmm_(D.T, X)
        if self.reduce is not None:
            self.reduce(total)
        return total

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(D^T, X)` of this process's tokens, stacked: `(out, N)` and `(N, in)`, float32."""
        return torch.cat([D.float() for D, _ in self.pairs]).T, torch.cat([X.float() for _, X in self.pairs])

    @property
    def tokens(self) -> int:
        """Rows of all the pairs, on this process."""
        return sum(int(D.shape[0]) for D, _ in self.pairs)

    def _chunks(self) -> Iterable[Pair]:
        if all(D.dtype == X.dtype == torch.float32 for D, X in self.pairs):
            return self.pairs
        return _Casts(self.pairs)


class _Casts:
    """The pairs in float32, some tokens at a time."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[Pair]:
        for D, X in self.pairs:
            for D_part, X_part in zip(D.split(CHUNK), X.split(CHUNK), strict=True):
                yield D_part.float(), X_part.float()


def leading_svd(product: TokenProduct, rank: int, seed: int = 0) -> TruncatedSVD:
    """The leading singular triplets of `G = D^T X`, by the cheapest of three roads.

    With few tokens, the decomposition of the whole product, which is exact; else block Krylov iteration, on
    G's products or on G formed for the time of the call, whichever takes fewer operations.

    Args:
        product: G.
        rank: at least 1; capped at min(out, in).
        seed: of the iteration's starting block.

    Returns:
        The decomposition, float32. `energy` is NaN where G was not formed.
    """
    rank = min(rank, *product.shape)
    block = rank + 8
    tokens = product.tokens
    if product.reduce is not None:
        # Processes must take the same road, though they hold different numbers of tokens.
        count = torch.tensor(float(tokens), device=product.device)
        product.reduce(count)
        tokens = int(count)
    if tokens <= 2 * block:
        # No process has all the factors where there are several, but a block of so many columns spans all of G.
        whole = min(tokens, *product.shape)
        few = svd_of_product(*product.factors()) if product.reduce is None else svd_of_map(product, whole, seed)
        return _completed(few, rank, seed)
    rows, columns = product.shape
    by_products = 2 * BLOCKS * SKINNY * block * tokens * (rows + columns)
    by_forming = tokens * rows * columns + 4 * BLOCKS * SKINNY * block * rows * columns
    if by_forming <= by_products or 3 * block >= min(rows, columns):
        return truncated_svd(product.dense(), rank, seed)
    return svd_of_map(product, rank, seed, MISSING)


def _completed(svd: TruncatedSVD, rank: int, seed: int) -> TruncatedSVD:
    """Cut to `rank` triplets; where there are fewer, random orthonormal directions of singular value 0 are added."""
    missing = rank - svd.S.shape[0]
    if missing <= 0:
        return TruncatedSVD(svd.U[:, :rank], svd.S[:rank], svd.Vh[:rank], svd.energy)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def more(basis: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(basis.shape[0], missing, generator=generator).to(basis)
        return torch.cat([basis, orthonormal_to(basis, drawn)], 1)

    S = torch.cat([svd.S, svd.S.new_zeros(missing)])
    return TruncatedSVD(more(svd.U), S, more(svd.Vh.T).T, svd.energy)
