"""Small integers in few bits, and rounding to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.linalg.fixed_width import largest_code, pack, rounded_columns, unpack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_round_trip_and_size(bits: int, count: int) -> None:
    limit = largest_code(bits)
    codes = np.random.default_rng(0).integers(-limit, limit + 1, count).astype(np.int16)
    data = pack(codes, bits)
    assert data.size == -(-count * bits // 8)
    assert np.array_equal(unpack(data, count, bits), codes)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than 7"):
        pack(np.array([8], dtype=np.int16), 4)
    data = pack(np.zeros(10, dtype=np.int16), 3)
    for damaged in (data[:-1], np.concatenate([data, data[:1]])):
        with pytest.raises(ValueError, match="do not hold"):
            unpack(damaged, 10, 3)
    with pytest.raises(ValueError, match="damaged"):
        unpack(np.full(4, 255, dtype=np.uint8), 10, 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_as_good_as_a_fine_search(bits: int) -> None:
    """Against a grid of 2,000 steps for each column; the control rounds without clipping."""
    matrix = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double()
    codes, steps = rounded_columns(matrix, bits)
    errors = (matrix - codes * steps).square().sum(0)
    limit = largest_code(bits)
    for column in range(3):
        reach = float(matrix[:, column].abs().max()) / limit
        x = matrix[:, column]
        grid = [float((x - (x / (reach * c)).round().clamp(-limit, limit) * reach * c).square().sum()) for c in
                torch.linspace(0.2, 1.0, 2000)]  # fmt: skip
        assert float(errors[column]) <= 1.05 * min(grid)
        if bits < 8:
            assert min(grid) < 0.95 * grid[-1]


def test_zero_columns() -> None:
    codes, steps = rounded_columns(torch.zeros(4, 2), 4)
    assert not codes.any() and torch.equal(steps, torch.ones(2).double())
