"""One layer through the codec, as users call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgery
from surgery.errors import OptionError


@pytest.mark.parametrize("goal", [{"error": 0.05}, {"energy": 0.99}, {"rank": 3}, {"size": 300}])
def test_one_layer_through_the_codec(goal: dict[str, Any]) -> None:
    torch.manual_seed(1)
    B, A = torch.randn(24, 4) * torch.tensor([1.0, 0.5, 0.2, 0.1]), torch.randn(4, 32)
    coded = surgery.codec.encode_layer(B, A, **goal)
    b, a = surgery.codec.decode_layer(coded.data, coded.shape)
    lost = (torch.linalg.norm(b.double() @ a.double() - B.double() @ A.double()) / torch.linalg.norm(B @ A)).item()
    assert lost == pytest.approx(coded.error, rel=1e-3, abs=1e-6) and coded.shape[:2] == (24, 32)
    assert all(torch.equal(one, two) for one, two in zip(coded.factors(), (b, a), strict=True))
    assert "error" not in goal or lost <= 0.05
    assert "energy" not in goal or lost**2 <= 0.01 + 1e-6
    assert "size" not in goal or coded.data.nbytes <= 300
    assert "rank" not in goal or coded.shape[2] == 3


def test_what_the_codec_refuses() -> None:
    B, A = torch.randn(4, 2), torch.randn(2, 4)
    with pytest.raises(OptionError, match="give one of size"):
        surgery.codec.encode_layer(B, A)
    with pytest.raises(OptionError, match="are no factors"):
        surgery.codec.encode_layer(B, A.T, error=0.1)
    with pytest.raises(OptionError, match="not finite"):
        surgery.codec.encode_layer(B * float("nan"), A, error=0.1)
    with pytest.raises(OptionError, match="bytes do"):
        surgery.codec.encode_layer(B, A, size=1)
    with pytest.raises(OptionError, match="2, 3, 4 or 8"):
        surgery.codec.encode_layer(B, A, error=0.1, bits=5)
    coded = surgery.codec.encode_layer(B, A, error=0.1)
    with pytest.raises(ValueError, match="damaged"):
        surgery.codec.decode_layer(coded.data[:-1], coded.shape)
    with pytest.raises(AttributeError):
        surgery.codec.no_such_name  # noqa: B018
