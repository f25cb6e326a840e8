"""Conversions to LoRA: exact without a budget, otherwise with the stated error and no rank to spare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import AdapterError
from tests.helpers.conversions import WEIGHTS, dense, logits, readers, trained
from tests.helpers.models import (
    load_base,
    model_inputs,
    output,
    relative_difference,
)


def test_without_a_budget_lora_to_lora_is_exact(lora: Path, llama: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "lora", tmp_path / "out")
    assert report.weight_error < 1e-7 and report.reload_difference == 0
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, lora)) <= 1e-5


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_rank_by_energy_is_tight(energy: float, lora: Path, tmp_path: Path) -> None:
    """The chosen rank keeps the share, one less does not; against an exact SVD of each layer."""
    _, report = surgery.convert(lora, "lora", tmp_path / "out", energy=energy)
    assert len({site.rank for site in report.sites}) > 1
    for site in report.sites:
        squares = torch.linalg.svdvals(dense(lora, site.module)).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[site.rank - 1] >= energy - 1e-9
        assert site.rank == 1 or kept[site.rank - 2] < energy
        # The error in the report is the one of the best approximation of this rank.
        best = (1 - kept[site.rank - 1]).clamp_min(0).sqrt()
        assert site.weight_error == pytest.approx(float(best), rel=1e-2, abs=1e-6)


def test_energy_one_keeps_every_direction(lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "lora", tmp_path / "out", energy=1.0)
    assert report.weight_error < 1e-6 and {site.rank for site in report.sites} == {8}


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_largest_error_holds_over_all_layers_and_no_rank_is_to_spare(limit: float, lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "lora", tmp_path / "out", max_error=limit)
    total = sum(float(dense(lora, site.module).square().sum()) for site in report.sites)
    lost = 0.0
    least = []
    for site in report.sites:
        squares = torch.linalg.svdvals(dense(lora, site.module)).square()
        lost += float(squares[site.rank :].sum())
        if site.rank:
            least.append(float(squares[site.rank - 1]))
    assert (lost / total) ** 0.5 <= limit
    assert ((lost + max(least)) / total) ** 0.5 > limit
    assert report.weight_error == pytest.approx((lost / total) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "llama-bf16-sharded"])
def test_other_shapes(kind: str, model_folder, tmp_path: Path) -> None:
    """Conv1D, encoder-decoder, a bare model, bfloat16: PEFT's logits with the converted adapter."""
    folder = model_folder(kind)
    base = load_base(folder, torch.bfloat16 if "bf16" in kind else torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)
    trained(base, config, tmp_path / "source")
    short = kind.removesuffix("-bf16-sharded")
    for to, options in (("lora", {}), ("giva", {"bits": 32, "energy": 1.0})):
        surgery.convert(tmp_path / "source", to, tmp_path / to, **options)
        found, wanted = logits(folder, tmp_path / to, short), logits(folder, tmp_path / "source", short)
        assert relative_difference(found, wanted) <= 1e-4


def test_patterns_and_scales_of_single_layers(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    trained(load_base(llama), config, tmp_path / "source")
    surgery.convert(tmp_path / "source", "lora", tmp_path / "out", energy=1.0)
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, tmp_path / "source")) <= 1e-5


def test_zero_and_rank_deficient_layers(lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    zero, deficient = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    tensors[f"base_model.model.{zero}.lora_B.weight"].zero_()
    B = tensors[f"base_model.model.{deficient}.lora_B.weight"]
    B[:, 2:] = B[:, :1]
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    for to, options in (("lora", {}), ("giva", {"bits": 32})):
        _, report = surgery.convert(lora, to, tmp_path / to, energy=1.0, **options)
        sites = {site.module: site for site in report.sites}
        assert sites[zero].rank == 0 and sites[zero].weight_error == 0
        assert sites[deficient].rank == 2 and sites[deficient].weight_error < 1e-5
        assert zero not in surgery.Adapter.open(tmp_path / to).config["target_modules"]
        assert report.modules == 20


def test_narrow_dtypes_load_in_peft_and_state_their_error(lora: Path, llama: Path, tmp_path: Path) -> None:
    wanted = logits(llama, lora)
    errors = {}
    for dtype in ("float32", "float16", "bfloat16", "float8_e4m3fn"):
        _, report = surgery.convert(lora, "lora", tmp_path / dtype, dtype=dtype)
        errors[dtype] = report.weight_error
        assert relative_difference(logits(llama, tmp_path / dtype), wanted) <= max(10 * report.weight_error, 1e-5)
    assert (
        errors["float32"] < 1e-7 < errors["float16"] < 1e-3 < errors["bfloat16"] < 1e-2 < errors["float8_e4m3fn"] < 0.06
    )


@pytest.mark.parametrize("method", ["vera", "inilora", "giva"])
def test_our_starts_become_loras_exactly(method: str, llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 4}
    if method == "giva":
        inputs = model_inputs("llama")
        options["data"] = [{**inputs, "labels": inputs["input_ids"]}]
    surgery.init(llama, method, tmp_path / "start", **options)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "start", is_trainable=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        wanted = output(model, model_inputs("llama"))
        plain = output(load_base(llama), model_inputs("llama"))
    model.save_pretrained(tmp_path / "trained")
    _, report = surgery.convert(tmp_path / "trained", "lora", tmp_path / "out", base=llama)
    assert report.peft_type == "LORA" and report.weight_error < 1e-6
    assert relative_difference(logits(llama, tmp_path / "out"), wanted) <= 1e-5
    assert relative_difference(plain, wanted) > 1e-2  # the control: the adapter does something


@pytest.mark.parametrize("method", ["frod", "smoa"])
def test_full_rank_changes_are_cut_at_the_stated_error(method: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "start", **({} if method == "frod" else {"rank": 4}))
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "start", is_trainable=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterError, match="--base"):
        surgery.convert(tmp_path / "trained", "lora", tmp_path / "out")
    with pytest.raises(AdapterError, match="--rank or --energy"):
        surgery.convert(tmp_path / "trained", "lora", tmp_path / "out", base=llama)
    _, report = surgery.convert(tmp_path / "trained", "lora", tmp_path / "out", base=llama, rank=6)
    for site in report.sites[:4]:
        layer = model.base_model.model.get_submodule(site.module)
        squares = torch.linalg.svdvals(layer.get_delta_weight("default").double()).square()
        best = float((squares[6:].sum() / squares.sum()).sqrt())
        assert site.weight_error == pytest.approx(best, rel=0.02) and best > 0.05


def test_export_is_the_lora_that_peft_makes_but_through_the_factors(llama: Path, tmp_path: Path) -> None:
    """Against PEFT's own convert_to_lora on a trained VeRA."""
    surgery.init(llama, "vera", tmp_path / "start", rank=4)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "start", is_trainable=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(tmp_path / "trained")
    _, state = peft.convert_to_lora(model, rank=4)
    surgery.convert(tmp_path / "trained", "lora", tmp_path / "out", base=llama)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        A = next(v for k, v in state.items() if module in k and "lora_A" in k)
        B = next(v for k, v in state.items() if module in k and "lora_B" in k)
        torch.testing.assert_close(dense(tmp_path / "out", module), (B @ A).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [{"energy": 0.9}, {"max_error": 0.2}, {"rank": 3}, {"ratio": 2}, {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_reader_finds_the_same_change(
    budget: dict[str, Any],
    dtype: str,
    lora: Path,
    tmp_path: Path,
) -> None:
    _, report = surgery.convert(lora, "lora", tmp_path / "out", dtype=dtype, **budget)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {t.shape[0] for name, t in load_file(tmp_path / "out" / WEIGHTS).items() if "lora_A" in name}
    assert ranks == {config["r"]} and not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and (config["lora_alpha"] == config["r"] or dtype.startswith("float8"))
    for changes in readers(tmp_path / "out").values():
        for site in report.sites:
            wanted = dense(lora, site.module)
            error = float((changes[site.module] - wanted).norm() / wanted.norm())
            assert error == pytest.approx(site.weight_error, rel=1e-2, abs=1e-6)
    assert report.padding_bytes == sum(
        (config["r"] - site.rank) * sum(site.shape) * getattr(torch, dtype).itemsize for site in report.sites
    )
    if "ratio" in budget:
        assert report.padding_bytes == 0 and {site.rank for site in report.sites} == {config["r"]}


def test_per_layer_ranks_leave_the_zeros_out(lora: Path, tmp_path: Path) -> None:
    _, padded = surgery.convert(lora, "lora", tmp_path / "padded", energy=0.9)
    _, own = surgery.convert(lora, "lora", tmp_path / "own", energy=0.9, per_layer_ranks=True)
    assert own.bytes < padded.bytes - 0.9 * padded.padding_bytes and own.weight_error == pytest.approx(
        padded.weight_error
    )
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["rank_pattern"]
