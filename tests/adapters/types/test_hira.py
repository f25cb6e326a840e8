"""HiRA: `dW = W * (B A)`, against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch

from surgery.adapters.types.hira import HIRA
from surgery.errors import AdapterError


def test_change_is_the_weight_times_the_product() -> None:
    torch.manual_seed(0)
    weight, B, A = torch.randn(5, 7), torch.randn(5, 2), torch.randn(2, 7)
    found = HIRA.formula({}, "q", {"hira_B": B, "hira_A": A}, weight).dense()
    torch.testing.assert_close(found.double(), weight.double() * (B.double() @ A.double()), rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_not_given_or_does_not_fit_is_named() -> None:
    tensors = {"hira_B": torch.ones(5, 2), "hira_A": torch.ones(2, 7)}
    with pytest.raises(AdapterError, match="q: a HiRA change is a multiple of the base weight"):
        HIRA.formula({}, "q", tensors, None)
    with pytest.raises(AdapterError, match=r"its factors make \(5, 7\), the base weight is \(4, 7\)"):
        HIRA.formula({}, "q", tensors, torch.ones(4, 7))
