"""The joint decomposition in float64, as its definition has it."""

from __future__ import annotations

import torch


def category(layers: int, rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    """Weights of one role: a shared right structure plus a part of their own, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -spread, columns)
    return [torch.randn(rows, columns, generator=generator) @ mixing / columns**0.5 for _ in range(layers)]


def reference_basis(weights: list[torch.Tensor], a: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """V and the eigenvalues of T, by the paper's formulas: one QR of the stack, one inverse for each slice."""
    stack = torch.cat([w.double() for w in weights])
    Q, R = torch.linalg.qr(stack)
    identity = torch.eye(R.shape[0], dtype=torch.float64)
    slices = Q.split([w.shape[0] for w in weights])
    T = torch.stack([torch.linalg.inv(q.T @ q + a * identity) for q in slices]).mean(0)
    values, Z = torch.linalg.eigh(T)
    return R.T @ Z, values


def up_to_signs(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative difference of each column, whatever its sign."""
    expected = expected.double()
    sign = torch.sign((found.double() * expected).sum(0))
    return (found.double() * sign - expected).norm(dim=0) / expected.norm(dim=0)


def separated(values: torch.Tensor, gap: float) -> torch.Tensor:
    """Columns whose eigenvalue is at least `gap` (relative) away from its neighbours."""
    distance = values.diff()
    padded = torch.cat([torch.tensor([torch.inf]), distance, torch.tensor([torch.inf])])
    return torch.minimum(padded[:-1], padded[1:]) > gap * values.abs().max()
