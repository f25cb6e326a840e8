"""Numbers that are not finite are found wherever they stand."""

from __future__ import annotations

import pytest
import torch

from surgery.adapters.types import tensor_checks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_that_are_not_finite_are_found_anywhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_checks, "CHUNK", 7)
    for shape in ((), (0, 3), (5,), (7, 3), (4, 2, 5)):
        clean = torch.ones(shape).to(dtype)
        assert tensor_checks.is_finite(clean)
        for place in {0, clean.numel() // 2, clean.numel() - 1} if clean.numel() else ():
            bad_values = (
                (float("nan"),) if dtype == torch.float8_e4m3fn else (float("nan"), float("inf"), -float("inf"))
            )
            for value in bad_values:
                bad = torch.ones(shape).reshape(-1)
                bad[place] = value
                assert not tensor_checks.is_finite(bad.to(dtype).reshape(shape)), (shape, place, value)
