"""Spectral components against the full decomposition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from surgery.linalg.spectral_groups import equal_share_cuts, top_components


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_components_are_those_of_the_decomposition(shape: tuple[int, int], groups: int) -> None:
    W = weight(*shape)
    cuts = equal_share_cuts(W, groups)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    edges = [0, *cuts, len(S)]
    shares = [float(S[a:b].sum() / S.sum()) for a, b in itertools.pairwise(edges)]
    assert max(shares) - min(shares) < 2 * float(S[0] / S.sum())
    for component, (start, stop) in zip(top_components(W, cuts), zip(edges, cuts, strict=False), strict=True):
        expected = (U[:, start:stop] * S[start:stop]) @ Vh[start:stop]
        assert float((component.double() - expected).abs().max()) < 1e-6


def test_masks_sum_to_the_weight() -> None:
    W = weight(48, 32)
    top = top_components(W, equal_share_cuts(W, 3))
    last = W - top.sum(0)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    cut = equal_share_cuts(W, 3)[-1]
    assert float((last.double() - (U[:, cut:] * S[cut:]) @ Vh[cut:]).abs().max()) < 1e-6
    assert float((top.sum(0) + last - W).abs().max()) < 1e-6


@pytest.mark.parametrize("W", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(4), weight(1, 9)])
def test_degenerate_weights_have_valid_cuts(W: torch.Tensor) -> None:
    cuts = equal_share_cuts(W, min(2, *W.shape))
    assert all(0 < cut <= min(W.shape) for cut in cuts)
    assert torch.isfinite(top_components(W, cuts)).all()


def test_every_group_keeps_a_value() -> None:
    """One singular value holds nearly everything: the shares cannot be equal, the groups still exist."""
    W = torch.diag(torch.tensor([1000.0, 1.0, 1.0, 1.0]))
    assert equal_share_cuts(W, 4) == [1, 2, 3]
