"""The joint decomposition against a float64 QR reference, PEFT's own code, and shapes that hurt."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.frod.model import _projection_from_weights

from surgery.linalg import joint as joint_module
from surgery.linalg.joint import joint_basis, left_norms, right_inverse_transposed
from tests.helpers.joint_reference import category, reference_basis, separated, up_to_signs

# Tall weights take one inverse each, wide ones the smaller inverses of Woodbury's formula.
SHAPES = [(4, 48, 32), (4, 32, 32), (6, 12, 32), (3, 20, 32), (12, 3, 32)]


@pytest.mark.parametrize(("layers", "rows", "columns"), SHAPES)
def test_equals_float64_reference(layers: int, rows: int, columns: int) -> None:
    weights = category(layers, rows, columns)
    joint = joint_basis(lambda start: weights[start:], columns)
    expected, values = reference_basis(weights)
    assert joint.fallback is None
    clear = separated(values, 1e-6)
    assert clear.sum() > columns // 2
    assert float(up_to_signs(joint.V, expected)[clear].max()) < 1e-6
    identity = torch.eye(columns, dtype=torch.float64)
    assert float((joint.inverse_transposed.T @ joint.V - identity).abs().max()) < 1e-9


@pytest.mark.parametrize(("layers", "rows", "columns"), SHAPES)
def test_equals_peft_in_its_precision(layers: int, rows: int, columns: int) -> None:
    weights = category(layers, rows, columns)
    found = joint_basis(lambda start: weights[start:], columns).V
    peft = _projection_from_weights(weights, 1e-3)
    _, values = reference_basis(weights)
    clear = separated(values, 1e-3)
    assert float(up_to_signs(found, peft)[clear].max()) < 1e-2
    # Where eigenvalues come close, single columns are free; together they span what PEFT's do.
    close = ~clear
    if close.any():
        ours, theirs = torch.linalg.qr(found[:, close])[0], torch.linalg.qr(peft[:, close].double())[0]
        assert float(torch.linalg.svdvals(ours.T @ theirs).min()) > 1 - 1e-3


@pytest.mark.parametrize(("layers", "rows", "columns"), [*SHAPES, (1, 40, 32), (1, 12, 32), (2, 9, 32)])
def test_reconstructs_every_weight(layers: int, rows: int, columns: int) -> None:
    weights = category(layers, rows, columns, spread=2.0)
    joint = joint_basis(lambda start: weights[start:], columns)
    for weight in weights:
        product = weight.double() @ joint.inverse_transposed
        norms = left_norms(weight, joint.inverse_transposed)
        assert torch.allclose(norms.double(), product.norm(dim=0), rtol=1e-5)
        rebuilt = product @ joint.V.T
        assert float((rebuilt - weight.double()).norm() / weight.double().norm()) < 1e-10


@pytest.mark.parametrize("kept", [0, 1, 2, 99])
def test_kept_gram_matrices_change_nothing(kept: int, monkeypatch) -> None:
    """However many of them fit the allowance; and those that fit are not read again."""
    weights = category(4, 40, 24)
    expected = joint_basis(lambda start: weights[start:], 24).V
    monkeypatch.setattr(joint_module, "KEPT_BYTES", kept * 24 * 24 * 8)
    starts = []
    found = joint_basis(lambda start: starts.append(start) or weights[start:], 24).V
    assert starts == [0, min(kept, 4)]
    assert float((found - expected).abs().max()) < 1e-9


def test_signs_are_canonical() -> None:
    weights = category(3, 40, 24)
    V = joint_basis(lambda start: weights[start:], 24).V
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    flipped = [-weight for weight in weights]
    assert torch.allclose(joint_basis(lambda start: flipped[start:], 24).V, V, atol=1e-9)


def test_one_thread_and_two_agree() -> None:
    weights = category(4, 200, 96)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(joint_basis(lambda start: weights[start:], 96).V)
            assert torch.get_num_threads() == threads  # the setting is put back
    finally:
        torch.set_num_threads(before)
    assert float((found[0] - found[1]).abs().max()) < 1e-6


def zero_columns(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """All layers miss the same three directions."""
    for weight in weights:
        weight[:, :3] = 0
    return weights


def faint_column(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """All layers have so little of the last direction that a Cholesky factor exists, but says nothing of it."""
    for weight in weights:
        weight[:, -1] *= 8e-8
    return weights


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (faint_column(category(3, 40, 24)), "rank-deficient"),
        (zero_columns(category(3, 40, 24)), "rank-deficient"),
        ([torch.zeros(30, 24), torch.zeros(30, 24)], "rank-deficient"),
        ([torch.ones(30, 24), torch.ones(30, 24)], "rank-deficient"),
        (category(2, 5, 24), "few rows"),
        (category(1, 40, 24), "single matrix"),
        ([torch.zeros(30, 24)], "single matrix"),
    ],
)
def test_deficient_stacks_have_an_invertible_basis(weights: list[torch.Tensor], why: str) -> None:
    joint = joint_basis(lambda start: weights[start:], 24)
    assert joint.fallback == why
    assert float(torch.linalg.cond(joint.V)) < 1e8
    for weight in weights:
        rebuilt = weight.double() @ joint.inverse_transposed @ joint.V.T
        assert torch.allclose(rebuilt, weight.double(), atol=1e-9)


def test_nearly_dependent_layers_stay_exact() -> None:
    """Columns spread over seven orders of magnitude: the Gram matrix spreads over fourteen."""
    weights = category(4, 40, 24, spread=7.0)
    joint = joint_basis(lambda start: weights[start:], 24)
    for weight in weights:
        rebuilt = weight.double() @ joint.inverse_transposed @ joint.V.T
        assert float((rebuilt - weight.double()).norm() / weight.double().norm()) < 1e-9


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_of_the_weights_does_not_matter(scale: float) -> None:
    weights = category(3, 40, 24)
    V = joint_basis(lambda start: weights[start:], 24).V
    scaled = joint_basis(lambda start: [weight * scale for weight in weights[start:]], 24).V
    assert float((scaled / scale - V).abs().max() / V.abs().max()) < 1e-5


def test_inverse_is_of_the_stored_basis() -> None:
    V = joint_basis(lambda start: category(3, 40, 24)[start:], 24).V.float()
    product = right_inverse_transposed(V).T @ V
    assert float((product - torch.eye(24)).abs().max()) < 1e-4


def test_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        joint_basis(lambda start: [], 4)


def test_deficient_stacks_have_the_basis_of_what_there_is() -> None:
    """Where layers miss directions, V is the reference's in those that they have, in its order."""
    weights = zero_columns(category(3, 40, 24))
    joint = joint_basis(lambda start: weights[start:], 24)
    expected, values = reference_basis([weight[:, 3:] for weight in weights])
    clear = separated(values, 1e-6)
    assert joint.fallback == "rank-deficient" and clear.sum() > 10
    assert float(up_to_signs(joint.V[3:, :21], expected)[clear].max()) < 1e-6
    assert float(joint.V[:3, :21].abs().max()) < 1e-9
