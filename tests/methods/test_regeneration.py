"""Bases that are computed again and are other ones: what the error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.errors import WrongBaseError
from surgery.methods.base import Bases
from surgery.methods.regeneration import CHECK, regenerate
from surgery.models.sites import Site

SITE = Site("fc", "fc", "fc", None, 3, 4)


class Method:
    """Recognises its bases, or does not."""

    def __init__(self, agrees: bool) -> None:
        self.agreeing = agrees

    def bases(self, *_: Any) -> Bases:
        return Bases(own=[{"B0": torch.ones(3, 1)}])

    def agrees(self, *_: Any) -> bool:
        return self.agreeing


@pytest.mark.parametrize(
    ("dtype", "why"),
    [(torch.float32, "arithmetic, differs"), (torch.bfloat16, "loaded in torch.bfloat16; load it in float32")],
)
def test_other_bases_are_refused_with_the_likeliest_reason(dtype: torch.dtype, why: str) -> None:
    def found(agrees: bool, stored: dict[str, torch.Tensor]) -> Bases:
        return regenerate(Method(agrees), None, [SITE], [stored], None, who="lora", dtype=dtype)

    check = {CHECK: torch.zeros(1, 9)}
    assert "B0" in found(True, check).own[0] and "B0" in found(False, {}).own[0]
    with pytest.raises(WrongBaseError, match=f"lora: the bases regenerated at fc .*{why}"):
        found(False, check)
