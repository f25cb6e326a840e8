"""Low-rank factors seen through second moments: which directions of a weight change matter to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["MetricSVD", "energy_rank", "greedy_ranks", "metric_svd"]

# Directions whose share of the moment is below this are rounding.
NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class MetricSVD:
    """The singular value decomposition of `F^(1/2) B A C^(1/2)`, told in terms of B and A. Float64.

    Attributes:
        S: singular values `(k,)`, in falling order.
        left: `(r, k)`: `B left` are the left singular directions, orthonormal in F.
        right: `(k, r)`: `right A` are the right ones, orthonormal in C.
    """

    S: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def cut(self, B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best rank-`rank` version of `B A` in the metric, as factors of equal norm there, in their dtype.

        Args:
            B: `(out, r)`.
            A: `(r, in)`.
            rank: how many directions to keep.
        """
        root = self.S[:rank].sqrt()
        left, right = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return (B.double() @ left).to(B.dtype), (right @ A.double()).to(A.dtype)


def metric_svd(
    B: torch.Tensor, A: torch.Tensor, F: torch.Tensor | None = None, C: torch.Tensor | None = None
) -> MetricSVD:
    """Decompose `B A` in a metric from r x r matrices alone.

    With `R_b^T R_b = B^T F B` and `R_a^T R_a = A C A^T` the singular values are those of `R_b R_a^T`.

    Args:
        B: `(out, r)`.
        A: `(r, in)`.
        F: second moment `(r, r)` of `B^T g`, that is `B^T F B`; None for the identity metric.
        C: second moment `(r, r)` of `A x`, that is `A C A^T`; None for the identity metric.

    Returns:
        As many directions as the factors have within rounding; none for a change of zero.
    """
    B, A = B.double(), A.double()
    R_b, inverse_b = _root(B.T @ B if F is None else F.double())
    R_a, inverse_a = _root(A @ A.T if C is None else C.double())
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
    rank = int((S[0] * NEGLIGIBLE**0.5 < S).sum()) if len(S) and float(S[0]) > 0 else 0
    return MetricSVD(S[:rank], inverse_b @ U[:, :rank], Vh[:rank] @ inverse_a.T)


def _root(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`R (k, r)` with `R^T R` the moment, and its pseudo-inverse `(r, k)`."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    kept = values > max(float(values[-1]), 0.0) * NEGLIGIBLE
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    return root[:, None] * vectors.T, vectors / root


def energy_rank(S: torch.Tensor, energy: float) -> int:
    """The lowest rank whose squared singular values hold this share of all; 0 for a change of zero.

    Args:
        S: singular values in falling order.
        energy: a share in (0, 1]; 1 keeps every direction.
    """
    squares = S.double().square()
    total = float(squares.sum())
    if total == 0:
        return 0
    if energy >= 1:
        return len(S)
    # What is left out, summed from the small end: exact where the sum from the large end would round.
    left_out = squares.flip(0).cumsum(0).flip(0)  # [k]: lost by keeping k
    enough = (left_out <= (1 - energy) * total).nonzero()
    return int(enough[0]) if len(enough) else len(S)


def greedy_ranks(
    spectra: Mapping[str, torch.Tensor],
    costs: Mapping[str, int],
    *,
    entries: Mapping[str, int] | None = None,
    budget: int | None = None,
    max_error: float | None = None,
) -> dict[str, int]:
    """Ranks for a whole model, by one list of all layers' directions: most squared singular value for its bytes first.

    Args:
        spectra: by layer, singular values in falling order, in a metric that all layers share.
        costs: by layer, bytes of one rank.
        entries: by layer, bytes of having it at all.
        budget: bytes for all of them. The list is followed up to the first direction that does not fit, so that a
            larger budget keeps all that a smaller one keeps.
        max_error: instead of a budget: the largest allowed root of the share of all squared singular values that is
            left out. The list is followed up to the direction that meets it.

    Returns:
        Rank by layer, zeros included.
    """
    order = sorted(
        ((float(value) ** 2, layer) for layer, S in spectra.items() for value in S),
        key=lambda item: -item[0] / costs[item[1]],
    )
    ranks = dict.fromkeys(spectra, 0)
    spent, left = 0, [value for value, _ in order]
    lost = _tails(left)
    total = lost[0] if lost else 0.0
    for index, (value, layer) in enumerate(order):
        if value == 0:
            break
        if max_error is not None and lost[index] <= max_error**2 * total:
            break
        cost = costs[layer] + (entries[layer] if entries is not None and not ranks[layer] else 0)
        if budget is not None and spent + cost > budget:
            break
        spent += cost
        ranks[layer] += 1
    return ranks


def _tails(values: Sequence[float]) -> list[float]:
    """`[k]`: the sum of all but the first k."""
    tails = [0.0]
    for value in reversed(values):
        tails.append(tails[-1] + value)
    return tails[::-1]
