"""VeRA on the random basis that PEFT draws."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.converters.vera_random import fitted_vectors
from surgery.errors import MethodError
from tests.helpers.conversions import dense
from tests.helpers.models import load_base
from tests.helpers.vera_cases import modules_of


class TestRandomBasis:
    """Vectors on PEFT's seeded projections."""

    def test_it_needs_data(self, vera_lora: Path, llama: Path, tmp_path: Path) -> None:
        for options in ({}, {"base": llama}):
            with pytest.raises(MethodError, match="--data"):
                surgery.convert(vera_lora, "vera", tmp_path / "out", basis="random", **options)

    def test_it_takes_a_rank_alone(self, vera_lora: Path, calibration: dict[str, Any]) -> None:
        for budget in ({"ratio": 2}, {"size": 5000}, {"energy": 0.5}, {"max_error": 0.5}):
            with pytest.raises(MethodError, match="takes --rank"):
                surgery.convert(vera_lora, "vera", None, basis="random", **calibration, **budget)

    def test_vectors_alone_are_stored_and_peft_draws_the_rest(
        self, vera_lora: Path, calibration: dict[str, Any], tmp_path: Path
    ) -> None:
        stats = tmp_path / "stats.safetensors"
        made, report = surgery.convert(
            vera_lora,
            "vera",
            tmp_path / "out",
            basis="random",
            rank=16,
            seed=3,
            accept_loss=True,
            stats=stats,
            **calibration,
        )
        assert all(".vera_lambda_" in name for name in made.tensors)
        assert made.config["projection_prng_key"] == 3 and made.config["save_projection"] is False
        model = PeftModel.from_pretrained(load_base(calibration["base"]), tmp_path / "out")
        moments = load_file(stats)
        lost = total = 0.0
        for module in modules_of(vera_lora):
            C = moments[f"{module.removeprefix('model.')}.C"].double()
            dW = dense(vera_lora, module)
            difference = dW - model.base_model.model.get_submodule(module).get_delta_weight("default").double()
            lost += float(((difference @ C) * difference).sum())
            total += float(((dW @ C) * dW).sum())
        error = (lost / total) ** 0.5
        assert report.output_error == pytest.approx(error, rel=1e-2) and 0.05 < error < 0.95
        # Fitted without C the same vectors do less for the outputs.
        assert report.weight_error > error

    def test_vectors_have_the_dtype_that_is_asked_for(self, vera_lora: Path, calibration: dict[str, Any]) -> None:
        for dtype in ("float32", "bfloat16"):
            options = {**calibration, "basis": "random", "rank": 4, "accept_loss": True, "dtype": dtype}
            made, _ = surgery.convert(vera_lora, "vera", None, **options)
            assert {tensor.dtype for tensor in made.tensors.values()} == {getattr(torch, dtype)}

    def test_each_half_of_a_sweep_is_a_least_squares_solution(self) -> None:
        """After one sweep from d = 1: b, by a row's own projection in the dense metric."""
        B, A, change_B, change_A, C = problem()
        root = torch.linalg.cholesky(C)
        fit = fitted_vectors(B, A, change_B, change_A, C)
        first = (B @ A) @ root
        target = change_B @ change_A @ root
        rows = [torch.linalg.lstsq(m[:, None], t[:, None]).solution.item() for m, t in zip(first, target, strict=True)]
        left = float((target - torch.tensor(rows)[:, None] * first).norm() / target.norm())
        assert fit.errors[0] == pytest.approx(left, rel=1e-6)
        # d for that b, from all entries at once, then b again.
        columns = torch.stack(
            [(torch.tensor(rows)[:, None] * B[:, [j]] @ A[[j]] @ root).flatten() for j in range(B.shape[1])], 1
        )
        d = torch.linalg.lstsq(columns, target.flatten()[:, None]).solution[:, 0]
        second = (B * d) @ A @ root
        b = (second * target).sum(1) / second.square().sum(1)
        left = float((target - b[:, None] * second).norm() / target.norm())
        assert fit.errors[1] == pytest.approx(left, rel=1e-5)

    def test_sweeps_lower_the_error_and_the_best_is_returned(self) -> None:
        B, A, change_B, change_A, C = problem()
        fit = fitted_vectors(B, A, change_B, change_A, C)
        assert len(fit.errors) > 3
        assert all(later <= before + 1e-9 for before, later in itertools.pairwise(fit.errors))
        difference = change_B @ change_A - fit.b[:, None] * B @ (fit.d[:, None] * A)
        whole = change_B @ change_A
        stated = float((((difference @ C) * difference).sum() / ((whole @ C) * whole).sum()).sqrt())
        assert fit.relative_error == pytest.approx(stated, rel=1e-6) == min(fit.errors)
        assert fitted_vectors(B, A, change_B * 0, change_A, C).b.any().item() is False

    def test_what_lies_in_the_family_is_found(self) -> None:
        B, A, _, _, C = problem()
        generator = torch.Generator().manual_seed(7)
        b = torch.rand(B.shape[0], generator=generator, dtype=torch.float64) + 0.5
        d = torch.rand(B.shape[1], generator=generator, dtype=torch.float64) + 0.5
        found = fitted_vectors(B, A, b[:, None] * B, d[:, None] * A, C)
        assert found.relative_error < 0.05
        # A control: of other bases it does not lie in the family.
        other = torch.randn(B.shape, generator=generator, dtype=torch.float64)
        assert fitted_vectors(other, A, b[:, None] * B, d[:, None] * A, C).relative_error > 0.3


def problem() -> tuple[torch.Tensor, ...]:
    """B (20, 6), A (6, 14), a change of rank 3 and a metric with one strong direction."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 6), (6, 14), (20, 3), (3, 14), (14, 14))
    B, A, change_B, change_A, root = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    mean = torch.randn(14, generator=generator, dtype=torch.float64)
    return B, A, change_B, change_A, root @ root.T / 14 + torch.outer(mean, mean)
