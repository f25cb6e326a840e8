"""Eigenvectors in float32 under outliers of the spectrum, and what is refused."""

from __future__ import annotations

import pytest
import torch

from surgery.linalg.single_spectrum import single_spectrum


def gram(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower triangle of a matrix with these rising eigenvalues, and its eigenvectors."""
    size = values.numel()
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = torch.linalg.qr(drawn).Q
    return ((vectors * values) @ vectors.T).tril(), vectors


@pytest.mark.parametrize("outliers", [0, 1, 7])
def test_outliers_do_not_drown_the_rest(outliers: int) -> None:
    values = torch.linspace(0.5, 1, 160, dtype=torch.float64)
    values[160 - outliers :] *= torch.logspace(4, 6, outliers + 1, dtype=torch.float64)[1:]
    matrix, vectors = gram(values)
    found = single_spectrum(matrix)
    assert found is not None and found.dtype == torch.float32
    overlaps = (found.double() * vectors).sum(0).abs()
    assert float(overlaps.min()) > 1 - 1e-6
    assert torch.equal(matrix, matrix.T)
    if outliers:
        naive = torch.linalg.eigh(matrix.float())[1]
        assert float((naive.double() * vectors).sum(0).abs().min()) < 0.9


@pytest.mark.parametrize("kind", ["equal", "steep", "zero"])
def test_what_float32_cannot_tell_is_refused(kind: str) -> None:
    values = torch.linspace(0.5, 1, 300, dtype=torch.float64)
    if kind == "equal":
        values[60:70] = 0.8
    elif kind == "steep":
        values = torch.logspace(-26, 0, 300, dtype=torch.float64)
    else:
        values.zero_()
    assert single_spectrum(gram(values)[0]) is None


def test_a_null_space_is_no_degenerate_eigenvalue() -> None:
    values = torch.linspace(0.5, 1, 160, dtype=torch.float64)
    values[:40] = 0
    assert single_spectrum(gram(values)[0]) is not None
