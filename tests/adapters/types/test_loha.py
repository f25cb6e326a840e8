"""LoHa: `dW = s (w1_a w1_b) * (w2_a w2_b)`, plain and in Tucker form, against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch

from surgery.adapters.types.loha import LOHA
from surgery.errors import AdapterError
from surgery.models.sites import CONVOLUTION

CONFIG = {"r": 2, "alpha": 6}


def drawn(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"hada_{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_change_is_the_scaled_product_of_two_products() -> None:
    tensors = drawn(w1_a=(5, 2), w1_b=(2, 7), w2_a=(5, 2), w2_b=(2, 7))
    a, b, c, d = (tensors[f"hada_{name}"].double() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    found = LOHA.formula(CONFIG, "q", tensors, None).dense().double()
    torch.testing.assert_close(found, 3 * (a @ b) * (c @ d), rtol=1e-5, atol=1e-5)


def test_tucker_form_is_summed_over_both_ranks() -> None:
    shapes = {"t1": (2, 2, 3, 3), "w1_a": (2, 5), "w1_b": (2, 4), "t2": (2, 2, 3, 3), "w2_a": (2, 5), "w2_b": (2, 4)}
    tensors = drawn(**shapes)
    sides = []
    for side in "12":
        t, a, b = (tensors[f"hada_{name}"].double() for name in (f"t{side}", f"w{side}_a", f"w{side}_b"))
        whole = torch.zeros(5, 4, 3, 3, dtype=torch.float64)
        for i in range(2):
            for j in range(2):
                whole += a[i].reshape(5, 1, 1, 1) * b[j].reshape(1, 4, 1, 1) * t[i, j]
        sides.append(whole)
    found = LOHA.formula(CONFIG, "q", tensors, None).dense().double()
    torch.testing.assert_close(found, 3 * (sides[0] * sides[1]).flatten(1), rtol=1e-4, atol=1e-4)
    form = LOHA.forms(CONFIG, "q", tensors)
    assert (form.kind, form.kernel) == (CONVOLUTION, (3, 3))


def test_factors_that_do_not_fit_are_named() -> None:
    with pytest.raises(AdapterError, match=r"q: hada_w1 \(5, 7\) and hada_w2 \(5, 6\) are of different shapes"):
        LOHA.formula(CONFIG, "q", drawn(w1_a=(5, 2), w1_b=(2, 7), w2_a=(5, 2), w2_b=(2, 6)), None)
