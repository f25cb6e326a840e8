"""VeRA from other adapters: stock PEFT opens it and says what the source says; the stated loss is the true one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.converters.vera_random import fitted_vectors
from surgery.errors import MethodError
from tests.helpers.conversions import WEIGHTS, dense, logits, trained
from tests.helpers.models import load_base, relative_difference, save_model
from tests.helpers.stock_adapters import randomise
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

MODEL = "base_model.model."


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    """A LoRA on all linears of the tiny grouped-query Llama."""
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, Any]:
    """The tiny Llama with a tokenizer, and texts."""
    base = save_tokenizer(save_model("llama", tmp_path / "text-llama"))
    return {"base": base, "data": write_rows(tmp_path / "texts.jsonl", text_rows(96)), "samples": 48}


def modules_of(folder: Path) -> list[str]:
    names = load_file(folder / WEIGHTS)
    return [name[len(MODEL) : -len(".lora_A.weight")] for name in names if name.endswith(".lora_A.weight")]


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


def test_the_file_is_as_peft_writes_it(lora: Path, llama: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "vera", tmp_path / "out", energy=1.0)
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


def test_without_a_budget_each_layer_keeps_99_percent(lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "vera", tmp_path / "out")
    for site in report.sites:
        squares = torch.linalg.svdvals(dense(lora, site.module)).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[site.rank - 1] >= 0.99 - 1e-9 and (site.rank == 1 or kept[site.rank - 2] < 0.99)
    assert report.weight_error == pytest.approx(true_error(lora, tmp_path / "out"), rel=1e-2, abs=1e-7)
    text = " ".join(report.notes)
    assert "--energy 0.99" in text and "larger than the source" in text and "--to giva" in text
    assert report.bytes > report.source_bytes


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_shared_ranks_go_to_what_counts_most(rank: int, lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "vera", tmp_path / "out", rank=rank, accept_loss=True)
    assert sum(site.rank for site in report.sites) == rank
    squares = spectrum(lora)
    best = float((squares[rank:].sum() / squares.sum()).sqrt())
    assert report.weight_error == pytest.approx(best, rel=1e-2)
    assert true_error(lora, tmp_path / "out") == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("ratio", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_in_bytes_is_met_and_filled(ratio: float, dtype: str, lora: Path, tmp_path: Path) -> None:
    limit = int((lora / WEIGHTS).stat().st_size / ratio)
    _, report = surgery.convert(lora, "vera", tmp_path / "out", ratio=ratio, dtype=dtype, accept_loss=True)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == report.bytes <= limit
    rank = sum(site.rank for site in report.sites)
    _, more = surgery.convert(lora, "vera", None, rank=rank + 1, dtype=dtype, accept_loss=True)
    assert more.bytes > limit or rank == 6 * len(report.sites)
    assert report.weight_error == pytest.approx(true_error(lora, tmp_path / "out"), rel=1e-2, abs=1e-7)


def test_the_largest_error_is_met_with_no_rank_to_spare(lora: Path, tmp_path: Path) -> None:
    _, report = surgery.convert(lora, "vera", tmp_path / "out", max_error=0.2)
    rank = sum(site.rank for site in report.sites)
    squares = spectrum(lora)
    lost = (squares.flip(0).cumsum(0).flip(0) / squares.sum()).sqrt()
    assert lost[rank] <= 0.2 < lost[rank - 1]
    assert report.weight_error == pytest.approx(float(lost[rank]), rel=1e-2)


def test_too_small_a_budget_names_the_smallest_that_works(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"is (\d+) bytes") as error:
        surgery.convert(lora, "vera", tmp_path / "out", size=500)
    smallest = int(str(error.value).split(", is ")[1].split()[0])
    _, report = surgery.convert(lora, "vera", tmp_path / "out", size=smallest, accept_loss=True)
    assert report.modules == 1 and report.bytes <= smallest
    with pytest.raises(MethodError, match="too small"):
        surgery.convert(lora, "vera", None, size=smallest - 1, accept_loss=True)


def test_zero_and_rank_deficient_layers(lora: Path, llama: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    zero, deficient = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    tensors[f"{MODEL}{zero}.lora_B.weight"].zero_()
    B = tensors[f"{MODEL}{deficient}.lora_B.weight"]
    B[:, 2:] = B[:, :1]
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    _, report = surgery.convert(lora, "vera", tmp_path / "out", energy=1.0)
    sites = {site.module: site for site in report.sites}
    assert sites[zero].rank == 0 and sites[deficient].rank == 2 and report.modules == 20
    assert zero not in surgery.Adapter.open(tmp_path / "out").config["target_modules"]
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, lora)) <= 1e-5
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MethodError, match="changes nothing"):
        surgery.convert(lora, "vera", tmp_path / "none")


def test_heads_and_biases_are_carried_bit_for_bit(model_folder, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=5).eval()

    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", bias="lora_only")
    source = get_peft_model(model(), config)
    randomise(source)
    source.save_pretrained(tmp_path / "source")
    made, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out", energy=1.0)
    old, new = (load_file(tmp_path / folder / WEIGHTS) for folder in ("source", "out"))
    carried = [name for name in old if "lora_" not in name]
    assert len(carried) == 6 and all(torch.equal(old[name], new[name]) for name in carried)
    assert made.config["bias"] == "vera_only" and report.weight_error < 1e-6
    inputs = {"input_ids": torch.arange(3, 10)[None]}
    with torch.no_grad():
        wanted, found, plain = (
            m(**inputs).logits
            for m in (
                PeftModel.from_pretrained(model(), tmp_path / "source").eval(),
                PeftModel.from_pretrained(model(), tmp_path / "out").eval(),
                model(),
            )
        )
    assert relative_difference(found, wanted) <= 1e-5
    assert relative_difference(plain, wanted) > 1e-2


def test_modules_that_the_source_left_out_stay_out(llama: Path, tmp_path: Path) -> None:
    """VeRA knows no exclude_modules: its layers are named one by one."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.1.self_attn.q_proj"])
    trained(load_base(llama), config, tmp_path / "source")
    made, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out", energy=1.0)
    assert report.modules == 5 and "exclude_modules" not in made.config
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, tmp_path / "source")) <= 1e-5


def test_a_half_precision_source_stays_so(lora: Path, llama: Path, tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(lora / WEIGHTS).items()}, lora / WEIGHTS)
    made, report = surgery.convert(lora, "vera", tmp_path / "out", energy=1.0)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < report.weight_error < 4e-3
    assert report.weight_error == pytest.approx(true_error(lora, tmp_path / "out"), rel=1e-2, abs=1e-7)
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, lora)) < 2e-2


def test_it_comes_back_as_the_lora_that_it_was(lora: Path, llama: Path, tmp_path: Path) -> None:
    surgery.convert(lora, "vera", tmp_path / "vera", energy=1.0)
    _, report = surgery.convert(tmp_path / "vera", "lora", tmp_path / "back", base=llama)
    assert {site.rank for site in report.sites} == {6}  # not the sum of all ranks
    assert relative_difference(logits(llama, tmp_path / "back"), logits(llama, lora)) <= 1e-5


def test_a_change_of_full_rank_is_cut(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_base(llama), peft.LoHaConfig(r=6, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path / "source")
    _, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out")
    assert 0 < report.weight_error < 0.15 and all(site.rank > 6 for site in report.sites)


def test_data_moves_the_ranks_to_where_outputs_feel_them(
    lora: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    options = {**calibration, "rank": 30, "accept_loss": True}
    _, measured = surgery.convert(lora, "vera", tmp_path / "with", stats=stats, **options)
    surgery.convert(lora, "vera", tmp_path / "without", rank=30, accept_loss=True)
    moments = {name: tensor.double() for name, tensor in load_file(stats).items()}
    lost, felt = ({"with": 0.0, "without": 0.0, "all": 0.0} for _ in range(2))
    for module in modules_of(lora):
        C, F = (moments[f"{module.removeprefix('model.')}.{part}"] for part in "CF")
        dW = dense(lora, module)
        for name in lost:
            difference = dW - vera_dense(tmp_path / name, module, dW.shape[1]) if name != "all" else dW
            lost[name] += float(((difference @ C) * difference).sum())
            felt[name] += float(((F @ difference @ C) * difference).sum())
    assert measured.output_error == pytest.approx((lost["with"] / lost["all"]) ** 0.5, rel=1e-2)
    # What predictions feel is what the ranks are chosen by.
    assert felt["with"] < 0.9 * felt["without"] and measured.kl is not None and measured.agreement is not None


def test_what_keeps_too_little_is_refused(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"keeps .*--to giva|keeps .*--size .*--accept-loss"):
        surgery.convert(lora, "vera", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    _, report = surgery.convert(lora, "vera", tmp_path / "out", rank=1, accept_loss=True)
    assert report.weight_error**2 > 0.5 and (tmp_path / "out").is_dir()


class TestRandomBasis:
    """Vectors on PEFT's seeded projections."""

    def test_it_needs_data(self, lora: Path, llama: Path, tmp_path: Path) -> None:
        for options in ({}, {"base": llama}):
            with pytest.raises(MethodError, match="--data"):
                surgery.convert(lora, "vera", tmp_path / "out", basis="random", **options)

    def test_it_takes_a_rank_alone(self, lora: Path, calibration: dict[str, Any]) -> None:
        for budget in ({"ratio": 2}, {"size": 5000}, {"energy": 0.5}, {"max_error": 0.5}):
            with pytest.raises(MethodError, match="takes --rank"):
                surgery.convert(lora, "vera", None, basis="random", **calibration, **budget)

    def test_vectors_alone_are_stored_and_peft_draws_the_rest(
        self, lora: Path, calibration: dict[str, Any], tmp_path: Path
    ) -> None:
        stats = tmp_path / "stats.safetensors"
        made, report = surgery.convert(
            lora,
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
        for module in modules_of(lora):
            C = moments[f"{module.removeprefix('model.')}.C"].double()
            dW = dense(lora, module)
            difference = dW - model.base_model.model.get_submodule(module).get_delta_weight("default").double()
            lost += float(((difference @ C) * difference).sum())
            total += float(((dW @ C) * dW).sum())
        error = (lost / total) ** 0.5
        assert report.output_error == pytest.approx(error, rel=1e-2) and 0.05 < error < 0.95
        # Fitted without C the same vectors do less for the outputs.
        assert report.weight_error > error

    def test_vectors_have_the_dtype_that_is_asked_for(self, lora: Path, calibration: dict[str, Any]) -> None:
        for dtype in ("float32", "bfloat16"):
            options = {**calibration, "basis": "random", "rank": 4, "accept_loss": True, "dtype": dtype}
            made, _ = surgery.convert(lora, "vera", None, **options)
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
