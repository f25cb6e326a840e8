"""LoKr: `dW = s w1 ⊗ w2`, each side whole or in two factors, against `torch.kron` in float64."""

from __future__ import annotations

import pytest
import torch

from surgery.adapters.types.lokr import LOKR
from surgery.models.sites import CONVOLUTION, LINEAR

CONFIG = {"r": 2, "alpha": 3}


@pytest.mark.parametrize("whole_1", [True, False])
@pytest.mark.parametrize("whole_2", [True, False])
def test_change_is_the_scaled_kronecker_product(whole_1: bool, whole_2: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, sides = {}, []
    for name, (rows, columns), whole in (("lokr_w1", (3, 2), whole_1), ("lokr_w2", (4, 5), whole_2)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((rows, 2), (2, columns)))
        tensors.update({name: a @ b} if whole else {f"{name}_a": a, f"{name}_b": b})
        sides.append(a.double() @ b.double())
    found = LOKR.formula(CONFIG, "q", tensors, None).dense().double()
    torch.testing.assert_close(found, 1.5 * torch.kron(*sides), rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_whole_says_its_form() -> None:
    form = LOKR.forms(CONFIG, "q", {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 3, 3, 1)})
    assert (form.kind, form.kernel) == (CONVOLUTION, (3, 1))
    assert LOKR.forms(CONFIG, "q", {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 3)}).kind == LINEAR
