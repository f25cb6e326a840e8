"""Metrics of few samples: what no sample has moved is left out, not divided by its rounding."""

from __future__ import annotations

import pytest
import torch

from surgery.linalg.metric import _root, metric_svd


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("samples", [0, 2, 7])
def test_root_of_a_moment_has_its_rank(samples: int, scale: float) -> None:
    X = torch.randn(samples, 12, generator=torch.Generator().manual_seed(samples), dtype=torch.float64) * scale
    moment = X.T @ X
    R, inverse = _root(moment)
    assert R.shape == (samples, 12) and inverse.shape == (12, samples)
    torch.testing.assert_close(R.T @ R, moment, rtol=1e-6, atol=1e-9 * scale**2)
    torch.testing.assert_close(R @ inverse, torch.eye(samples, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_what_no_sample_reaches_is_cut_without_growing() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 5, generator=generator), torch.randn(5, 12, generator=generator)
    X = torch.randn(3, 12, generator=generator)
    X_of_A = (X @ A.T).double()  # what the samples are after A
    svd = metric_svd(B, A, None, X_of_A.T @ X_of_A)
    assert int((1e-5 * svd.S[0] < svd.S).sum()) == 3
    cut_B, cut_A = svd.cut(B, A, 3)
    whole, cut = (B @ A).double(), (cut_B @ cut_A).double()
    torch.testing.assert_close(X.double() @ cut.T, X.double() @ whole.T, rtol=1e-4, atol=1e-4)
    assert float(cut.norm()) <= 1.5 * float(whole.norm())
