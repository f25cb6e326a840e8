"""Budgets that mean something: factors and heads apart, what is kept, sizes that work, one rank for every reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.converters.budget_search import largest
from surgery.converters.kept import smallest_keeping
from surgery.converters.report import ConvertReport
from surgery.converters.request import Budget
from surgery.errors import MethodError
from surgery.system.text import parse_bytes
from tests.helpers.conversions import WEIGHTS, dense, trained
from tests.helpers.models import llama_config, load_base
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """A LoRA beside a head that is most of its file."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=700, pad_token_id=0))
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    return trained(model, config, tmp_path / "headed")


def head_bytes(folder: Path) -> int:
    return sum(t.nbytes for name, t in load_file(folder / WEIGHTS).items() if "score" in name)


@pytest.mark.parametrize("most", [0, 1, 37, 100])
def test_the_search_finds_the_largest_that_fits(most: int) -> None:
    asked = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= most

    assert largest(fits, 0, 100) == most and len(asked) <= 9
    assert largest(lambda number: False, 0, 9) is None and largest(fits, 3, 2) is None


def test_ratio_counts_factors_and_shows_the_head_apart(headed: Path, tmp_path: Path) -> None:
    head, size = head_bytes(headed), (headed / WEIGHTS).stat().st_size
    assert head > 0.7 * size
    _, report = surgery.convert(headed, "giva", tmp_path / "out", ratio=4)
    written = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert (size - head) / 4.6 < written - head <= (size - head) / 4 + 200
    assert report.ratio == pytest.approx(4, rel=0.1) and report.saved_modules == ["score"]
    assert head < report.saved_bytes < head + 300
    assert any("--ratio counts the factors" in note for note in report.notes)
    assert report.source_bytes_bf16 == size - (size - head - (size - head) % 4) // 2 or report.source_bytes_bf16 < size


def test_the_default_gives_way_where_it_keeps_too_little(lora: Path) -> None:
    draws, tensors = torch.Generator().manual_seed(0), load_file(lora / WEIGHTS)
    flat = {name: torch.randn(tensor.shape, generator=draws) for name, tensor in tensors.items()}
    save_file(flat, lora / WEIGHTS, metadata={"format": "pt"})
    _, report = surgery.convert(lora, "giva")
    _, twentieth = surgery.convert(lora, "giva", ratio=20, accept_loss=True)
    assert twentieth.kept < 0.8 and report.kept >= 0.9
    assert report.notes[0].startswith("the default, --ratio 20, keeps ")
    size = re.search(r"--size ([\d.]+KiB)", report.notes[0])
    assert size is not None and report.bytes <= parse_bytes(size[1])
    # It is the smallest: a tenth less keeps less.
    assert surgery.convert(lora, "giva", size=int(report.bytes * 0.88), accept_loss=True)[1].kept < 0.9


@pytest.mark.parametrize("to", ["giva", "lora", "vera"])
@pytest.mark.parametrize("budget", [{"size": 300}, {"size": "1KiB"}, {"ratio": 120}, {"rank": 1}])
def test_a_refusal_names_a_size_that_keeps_ninety_percent(
    to: str,
    budget: dict[str, Any],
    lora: Path,
    tmp_path: Path,
) -> None:
    try:
        _, report = surgery.convert(lora, to, tmp_path / "out", **budget)
    except MethodError as error:
        message = str(error)
    else:
        assert report.kept >= 0.5 and budget != {"size": 300}
        return
    assert message.startswith("source: ") and not (tmp_path / "out").exists()
    size = re.findall(r"--size ([\d.]+KiB)", message)[-1]
    _, report = surgery.convert(lora, to, tmp_path / "out", size=size)
    assert report.kept >= 0.9 and report.bytes <= parse_bytes(size)
    assert report.kept == pytest.approx(1 - report.weight_error**2)


def test_little_is_noted_with_the_option_that_helps(lora: Path) -> None:
    _, report = surgery.convert(lora, "lora", max_error=0.6)
    assert 0.5 < report.kept < 0.8
    assert any("--ratio" in note and "--base" in note for note in report.notes)


def test_with_data_kept_is_a_share_of_the_divergence(
    lora: Path,
    text_llama: Path,
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "texts.jsonl", text_rows(48))
    _, report = surgery.convert(lora, "giva", base=text_llama, data=data, samples=24, ratio=8)
    tensors = load_file(lora / WEIGHTS)
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    nothing = surgery.Adapter(surgery.Adapter.open(lora).config, zero)
    whole = surgery.compare(lora, nothing, base=text_llama, data=data, samples=48, latency=False).kl
    assert report.kl is not None and whole is not None and report.perplexity is not None
    # Half of the samples that `compare` sees are held out here.
    assert 1 - report.kept == pytest.approx(report.kl / whole, rel=0.5) and report.kept > 0.5


def test_a_bare_encoder_reports_its_cosine(model_folder: Any, tmp_path: Path) -> None:
    folder = save_tokenizer(model_folder("bert"))
    config = LoraConfig(r=4, target_modules=["query", "pooler.dense"])
    trained(load_base(folder), config, tmp_path / "source")
    data = write_rows(tmp_path / "texts.jsonl", text_rows(32))
    _, report = surgery.convert(tmp_path / "source", "giva", base=folder, data=data, samples=16, ratio=3)
    assert report.kl is None and report.cosine is not None and report.cosine > 0.9
    assert any("no gradient reaches" in note and "pooler.dense" in note for note in report.notes)
    sites = {site.module: site for site in report.sites}
    assert sites["pooler.dense"].output_error is None and sites["pooler.dense"].weight_error < 0.9


def test_what_is_the_bases_own_is_not_carried(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trained(load_base(llama), config, tmp_path / "source")
    name = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    tensors.setdefault(name, load_base(llama).lm_head.weight.detach().clone())
    save_file(tensors, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    made, report = surgery.convert(tmp_path / "source", "lora", base=llama)
    assert name not in made.tensors and any(name in note for note in report.notes)
    assert name in surgery.convert(tmp_path / "source", "lora")[0].tensors  # without a base it is not known
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    assert name in surgery.convert(tmp_path / "source", "lora", base=llama)[0].tensors


def readers(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """dW of every layer by the rules of llama.cpp (alpha / own rank) and of SGLang (alpha / r)."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    found: dict[str, dict[str, torch.Tensor]] = {"llama.cpp": {}, "sglang": {}}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = tensors[name.replace("lora_A", "lora_B")].double() @ A.double()
            found["llama.cpp"][module] = config["lora_alpha"] / A.shape[0] * product
            found["sglang"][module] = config["lora_alpha"] / config["r"] * product
    return found


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


def test_a_form_that_cannot_hold_so_much_has_no_size_worth_having() -> None:
    class Made:
        def __init__(self, budget: Budget) -> None:
            size = budget.size or 1000
            self.report = ConvertReport(None, "x", "X", "s", "LORA", 1, 1, min(size, 1000), 4000, 4.0, 0.6, kept=0.64)

    assert smallest_keeping(0.9, Made) is None
