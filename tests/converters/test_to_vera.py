"""VeRA from other adapters: stock PEFT opens it and says what the source says; the stated loss is the true one."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MethodError
from tests.helpers.conversions import WEIGHTS, dense, logits, trained
from tests.helpers.models import load_base, relative_difference
from tests.helpers.stock_adapters import randomise
from tests.helpers.vera_cases import MODEL, modules_of


def vera_dense(folder: Path, module: str, columns: int) -> torch.Tensor:
    """`diag(b) B diag(d) A` of a file that stores its projections, by its definition, float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    name = f"{MODEL}{module}.vera_lambda_"
    if f"{name}b" not in tensors:
        return torch.zeros(1, columns, dtype=torch.float64)
    b, d = tensors[f"{name}b"], tensors[f"{name}d"]
    A, B = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    return torch.diag(b) @ B[: len(b)] @ torch.diag(d) @ A[:, :columns]


def true_error(source: Path, made: Path) -> float:
    """Relative error over all layers of a LoRA's conversion, from dense matrices in float64."""
    lost = total = 0.0
    for module in modules_of(source):
        dW = dense(source, module)
        lost += float((dW - vera_dense(made, module, dW.shape[1])).square().sum())
        total += float(dW.square().sum())
    return (lost / total) ** 0.5


def spectrum(source: Path) -> torch.Tensor:
    """All squared singular values of a LoRA's changes, falling; exact decompositions."""
    values = [torch.linalg.svdvals(dense(source, module)).square()[:6] for module in modules_of(source)]
    return torch.cat(values).sort(descending=True).values


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "llama-bf16-sharded"])
def test_stock_peft_says_what_the_lora_says(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    base = load_base(folder, torch.bfloat16 if "bf16" in kind else torch.float32)
    trained(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True), tmp_path / "source")
    _, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out", energy=1.0)
    assert report.peft_type == "VERA" and report.weight_error < 1e-6 and report.reload_difference == 0
    short = kind.removesuffix("-bf16-sharded")
    wanted = logits(folder, tmp_path / "source", short)
    assert relative_difference(logits(folder, tmp_path / "out", short), wanted) <= 2e-5
    # A control: less than all of it says something else.
    surgery.convert(tmp_path / "source", "vera", tmp_path / "less", energy=0.6)
    assert relative_difference(logits(folder, tmp_path / "less", short), wanted) > 1e-3


def test_the_file_is_as_peft_writes_it(vera_lora: Path, llama: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", energy=1.0)
    vectors = {name: t for name, t in load_file(tmp_path / "out" / WEIGHTS).items() if "lambda" in name}
    assert report.trainable_parameters == sum(tensor.numel() for tensor in vectors.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that PEFT does not know
        model = PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.keys() <= {field.name for field in dataclasses.fields(VeraConfig)}
    assert config["r"] == ours["base_model.vera_A"].shape[0] and config["save_projection"]


def test_without_a_budget_each_layer_keeps_99_percent(vera_lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out")
    for site in report.sites:
        squares = torch.linalg.svdvals(dense(vera_lora, site.module)).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[site.rank - 1] >= 0.99 - 1e-9 and (site.rank == 1 or kept[site.rank - 2] < 0.99)
    assert report.weight_error == pytest.approx(true_error(vera_lora, tmp_path / "out"), rel=1e-2, abs=1e-7)
    text = " ".join(report.notes)
    assert "--energy 0.99" in text and "larger than the source" in text and "--to giva" in text
    assert report.bytes > report.source_bytes


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_shared_ranks_go_to_what_counts_most(rank: int, vera_lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", rank=rank, accept_loss=True)
    assert sum(site.rank for site in report.sites) == rank
    squares = spectrum(vera_lora)
    best = float((squares[rank:].sum() / squares.sum()).sqrt())
    assert report.weight_error == pytest.approx(best, rel=1e-2)
    assert true_error(vera_lora, tmp_path / "out") == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("ratio", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_in_bytes_is_met_and_filled(ratio: float, dtype: str, vera_lora: Path, tmp_path: Path) -> None:
    limit = int((vera_lora / WEIGHTS).stat().st_size / ratio)
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", ratio=ratio, dtype=dtype, accept_loss=True)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == report.bytes <= limit
    rank = sum(site.rank for site in report.sites)
    _, more = surgery.convert(vera_lora, "vera", None, rank=rank + 1, dtype=dtype, accept_loss=True)
    assert more.bytes > limit or rank == 6 * len(report.sites)
    assert report.weight_error == pytest.approx(true_error(vera_lora, tmp_path / "out"), rel=1e-2, abs=1e-7)


def test_the_largest_error_is_met_with_no_rank_to_spare(vera_lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", max_error=0.2)
    rank = sum(site.rank for site in report.sites)
    squares = spectrum(vera_lora)
    lost = (squares.flip(0).cumsum(0).flip(0) / squares.sum()).sqrt()
    assert lost[rank] <= 0.2 < lost[rank - 1]
    assert report.weight_error == pytest.approx(float(lost[rank]), rel=1e-2)


def test_too_small_a_budget_names_the_smallest_that_works(vera_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"is (\d+) bytes") as error:
        surgery.convert(vera_lora, "vera", tmp_path / "out", size=500)
    smallest = int(str(error.value).split(", is ")[1].split()[0])
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", size=smallest, accept_loss=True)
    assert report.modules == 1 and report.bytes <= smallest
    with pytest.raises(MethodError, match="too small"):
        surgery.convert(vera_lora, "vera", None, size=smallest - 1, accept_loss=True)


def test_zero_and_rank_deficient_layers(vera_lora: Path, llama: Path, tmp_path: Path) -> None:
    tensors = load_file(vera_lora / WEIGHTS)
    zero, deficient = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    tensors[f"{MODEL}{zero}.lora_B.weight"].zero_()
    B = tensors[f"{MODEL}{deficient}.lora_B.weight"]
    B[:, 2:] = B[:, :1]
    save_file(tensors, vera_lora / WEIGHTS, metadata={"format": "pt"})
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", energy=1.0)
    sites = {site.module: site for site in report.sites}
    assert sites[zero].rank == 0 and sites[deficient].rank == 2 and report.modules == 20
    assert zero not in surgery.Adapter.open(tmp_path / "out").config["target_modules"]
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, vera_lora)) <= 1e-5
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    save_file(tensors, vera_lora / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MethodError, match="changes nothing"):
        surgery.convert(vera_lora, "vera", tmp_path / "none")


def test_a_half_precision_source_stays_so(vera_lora: Path, llama: Path, tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(vera_lora / WEIGHTS).items()}, vera_lora / WEIGHTS)
    made, report = surgery.convert(vera_lora, "vera", tmp_path / "out", energy=1.0)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < report.weight_error < 4e-3
    assert report.weight_error == pytest.approx(true_error(vera_lora, tmp_path / "out"), rel=1e-2, abs=1e-7)
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, vera_lora)) < 2e-2


def test_it_comes_back_as_the_lora_that_it_was(vera_lora: Path, llama: Path, tmp_path: Path) -> None:
    surgery.convert(vera_lora, "vera", tmp_path / "vera", energy=1.0)
    _, report = surgery.convert(tmp_path / "vera", "lora", tmp_path / "back", base=llama)
    assert {site.rank for site in report.sites} == {6}  # not the sum of all ranks
    assert relative_difference(logits(llama, tmp_path / "back"), logits(llama, vera_lora)) <= 1e-5


def test_a_change_of_full_rank_is_cut(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_base(llama), peft.LoHaConfig(r=6, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path / "source")
    _, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out")
    assert 0 < report.weight_error < 0.15 and all(site.rank > 6 for site in report.sites)


def test_data_moves_the_ranks_to_where_outputs_feel_them(
    vera_lora: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    options = {**calibration, "rank": 30, "accept_loss": True}
    _, measured = surgery.convert(vera_lora, "vera", tmp_path / "with", stats=stats, **options)
    surgery.convert(vera_lora, "vera", tmp_path / "without", rank=30, accept_loss=True)
    moments = {name: tensor.double() for name, tensor in load_file(stats).items()}
    lost, felt = ({"with": 0.0, "without": 0.0, "all": 0.0} for _ in range(2))
    for module in modules_of(vera_lora):
        C, F = (moments[f"{module.removeprefix('model.')}.{part}"] for part in "CF")
        dW = dense(vera_lora, module)
        for name in lost:
            difference = dW - vera_dense(tmp_path / name, module, dW.shape[1]) if name != "all" else dW
            lost[name] += float(((difference @ C) * difference).sum())
            felt[name] += float(((F @ difference @ C) * difference).sum())
    assert measured.output_error == pytest.approx((lost["with"] / lost["all"]) ** 0.5, rel=1e-2)
    # What predictions feel is what the ranks are chosen by.
    assert felt["with"] < 0.9 * felt["without"] and measured.kl is not None and measured.agreement is not None


def test_what_keeps_too_little_is_refused(vera_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"keeps .*--to giva|keeps .*--size .*--accept-loss"):
        surgery.convert(vera_lora, "vera", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    _, report = surgery.convert(vera_lora, "vera", tmp_path / "out", rank=1, accept_loss=True)
    assert report.weight_error**2 > 0.5 and (tmp_path / "out").is_dir()
