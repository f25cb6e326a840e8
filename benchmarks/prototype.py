"""What our codec is measured against: fixed-width grids.

The prototype is the best known way without entropy coding: one greedy rank list in the Fisher metric, a random
rotation inside the rank space, one bit width for the whole model, and rounding with error feedback (GPTQ, arXiv
2210.17323) of B in F and of A in C, with closed-form refits of the other factor in between. Uniform truncation is the
plain way: truncated singular value decompositions, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["SCALE_BYTES", "prototype", "truncated", "uniform"]

Factors = tuple[torch.Tensor, torch.Tensor]
Metric = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # layer name to C (in, in), F (out, out)

SCALE_BYTES = 4  # a float32 for every rank of either factor
RIDGE = 0.01
CLIPS = torch.linspace(0.3, 1.0, 29, dtype=torch.float64)
SWEEPS = 3


def prototype(
    factors: Mapping[str, Factors], metric: Metric, size: int, bits: Sequence[int] = (2, 3, 4), seed: int = 0
) -> dict[int, dict[str, Factors]]:
    """The factors after coding, for every bit width, in `size` bytes of codes and scales."""
    parts = {name: _whitened(B.double(), A.double(), *_ridged(*metric(name))) for name, (B, A) in factors.items()}
    result = {}
    for width in bits:
        ranks = _greedy({name: part[2] for name, part in parts.items()}, factors, size, width)
        coded = {}
        for name, rank in ranks.items():
            B, A, S = parts[name]
            if rank:
                root = S[:rank].sqrt()
                generator = torch.Generator().manual_seed(seed)
                Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
                coded[name] = _coded((B[:, :rank] * root) @ Q, Q.T @ (root[:, None] * A[:rank]), metric(name), width)
        result[width] = coded
    return result


def uniform(factors: Mapping[str, Factors], size: int, width: int = 4) -> dict[str, Factors]:
    """Truncated SVD by one greedy list without data, every factor rounded to nearest at one scale for each rank."""
    return {
        name: (_nearest(B, _scales(B, width), width), _nearest(A.T, _scales(A.T, width), width).T)
        for name, (B, A) in _cut(factors, size, width).items()
    }


def truncated(factors: Mapping[str, Factors], size: int) -> dict[str, Factors]:
    """Truncated SVD by one greedy list without data, in bfloat16."""
    return {name: (B.bfloat16(), A.bfloat16()) for name, (B, A) in _cut(factors, size, 16).items()}


def _cut(factors: Mapping[str, Factors], size: int, width: int) -> dict[str, Factors]:
    eye = {name: (torch.eye(A.shape[1]).double(), torch.eye(B.shape[0]).double()) for name, (B, A) in factors.items()}
    parts = {name: _whitened(B.double(), A.double(), *eye[name]) for name, (B, A) in factors.items()}
    ranks = _greedy({name: part[2] for name, part in parts.items()}, factors, size, width)
    roots = {name: parts[name][2][:rank].sqrt() for name, rank in ranks.items() if rank}
    return {
        name: (parts[name][0][:, : len(root)] * root, root[:, None] * parts[name][1][: len(root)])
        for name, root in roots.items()
    }


def _ridged(C: torch.Tensor, F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    C, F = C.double(), F.double()
    return (
        C + RIDGE * C.diagonal().mean() * torch.eye(C.shape[0], dtype=C.dtype),
        F + RIDGE * F.diagonal().mean() * torch.eye(F.shape[0], dtype=F.dtype),
    )


def _whitened(
    B: torch.Tensor, A: torch.Tensor, C: torch.Tensor, F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`B diag(S) A` with `B^T F B = A C A^T = 1`."""
    R_F, R_C = torch.linalg.cholesky(F).T, torch.linalg.cholesky(C).T
    Q_B, R_B = torch.linalg.qr(R_F @ B)
    Q_A, R_A = torch.linalg.qr(R_C @ A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    left = torch.linalg.solve_triangular(R_F, Q_B @ U, upper=True)
    right = torch.linalg.solve_triangular(R_C, Q_A @ Vh.T, upper=True)
    return left, right.T, S


def _greedy(
    spectra: Mapping[str, torch.Tensor], factors: Mapping[str, Factors], size: int, width: int
) -> dict[str, int]:
    cost = {name: sum(factors[name][0].shape[:1] + factors[name][1].shape[1:]) * width / 8 for name in spectra}
    entries = [
        (-(float(value) ** 2) / cost[name], name) for name, S in spectra.items() for value in S if float(value) > 0
    ]
    ranks = dict.fromkeys(spectra, 0)
    left = float(size)
    for _, name in sorted(entries):
        need = cost[name] + 2 * SCALE_BYTES
        if need <= left:
            ranks[name] += 1
            left -= need
    return ranks


def _coded(B: torch.Tensor, A: torch.Tensor, metric: Factors, width: int) -> Factors:
    C, F = _ridged(*metric)
    whole = B, A
    best, least = whole, float("inf")
    coded_A = A
    for _ in range(SWEEPS):
        coded_B = _feedback(B, F, width)
        A = torch.linalg.solve(coded_B.T @ F @ coded_B, coded_B.T @ F @ whole[0]) @ whole[1]
        coded_A = _feedback(A.T, C, width).T
        error = _error(whole, (coded_B, coded_A), C, F)
        if error < least:
            best, least = (coded_B, coded_A), error
        B = whole[0] @ torch.linalg.solve(coded_A @ C @ coded_A.T, coded_A @ C @ whole[1].T).T
    return best


def _error(whole: Factors, coded: Factors, C: torch.Tensor, F: torch.Tensor) -> float:
    B, A = torch.cat([whole[0], -coded[0]], 1), torch.cat([whole[1], coded[1]])
    return float(((B.T @ F @ B) * (A @ C @ A.T)).sum())


def _scales(columns: torch.Tensor, width: int) -> torch.Tensor:
    """For each column `(n, r)` the scale of the least squared error."""
    top = 2 ** (width - 1) - 1
    candidates = CLIPS[:, None] * (columns.abs().amax(0) / top).clamp_min(1e-30)
    rounded = (columns[None] / candidates[:, None]).round().clamp(-top - 1, top) * candidates[:, None]
    choice = (rounded - columns).square().sum(1).argmin(0)
    return candidates.gather(0, choice[None])[0]


def _nearest(columns: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    top = 2 ** (width - 1) - 1
    return (columns / scales).round().clamp(-top - 1, top) * scales


def _feedback(columns: torch.Tensor, H: torch.Tensor, width: int) -> torch.Tensor:
    """Columns `(n, r)` rounded row by row, each row's error spread over the rows to come."""
    scales = _scales(columns, width)
    upper = torch.linalg.cholesky(torch.linalg.inv(H)).T  # H^-1 = upper^T upper
    left, result = columns.clone(), torch.empty_like(columns)
    for row in range(columns.shape[0]):
        result[row] = _nearest(left[row : row + 1], scales, width)[0]
        error = (left[row] - result[row]) / upper[row, row]
        left[row:] -= upper[row, row:, None] * error
    return result
