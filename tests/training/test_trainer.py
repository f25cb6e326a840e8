"""Our training is the stock trainer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, Trainer, TrainingArguments

import surgery
from surgery.errors import MethodError
from surgery.methods.registry import method_info
from surgery.training.preparing import trained_parameters
from tests.helpers.models import load_base
from tests.helpers.training_trained import BATCH, LR, QUICK, STEPS


def trained_by_hand(model: PeftModel, tokenizer: Any, rows: list[dict[str, Any]], out: Path) -> dict[str, torch.Tensor]:
    """What a stock Trainer makes of a PEFT model, with everything but the arguments at its defaults."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = dict(tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt"))
        if "label" in batch[0]:
            return found | {"labels": torch.tensor([row["label"] for row in batch])}
        return found | {"labels": torch.where(found["attention_mask"] == 1, found["input_ids"], -100)}

    model.get_base_model().config.pad_token_id = tokenizer.pad_token_id
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=LR, seed=3,
        use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    return {name: parameter.detach() for name, parameter in trained_parameters(model).items()}


@pytest.mark.parametrize(("kind", "adapter", "data"), [("llama", "giva", "texts"), ("bert", "classifier", "classes")])
def test_a_stock_trainer_comes_to_the_same(
    kind: str, adapter: str, data: str, trained_place: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (trained_place / f"{data}.jsonl").read_text().splitlines()]
    trained, _ = surgery.train(
        trained_place / adapter, trained_place / kind, trained_place / f"{data}.jsonl", seed=3, **QUICK
    )
    tokenizer = AutoTokenizer.from_pretrained(trained_place / kind)
    stock = trained_by_hand(
        surgery.trainable(trained_place / adapter, trained_place / kind), tokenizer, rows, tmp_path / "t"
    )
    start = surgery.Adapter.open(trained_place / adapter)
    for name, expected in stock.items():
        torch.testing.assert_close(trained.tensors[name], expected, rtol=0, atol=0)
    assert any(not torch.equal(start.tensors[name], stock[name]) for name in stock)
    other, _ = surgery.train(
        trained_place / adapter, trained_place / kind, trained_place / f"{data}.jsonl", seed=4, **QUICK
    )
    assert any(not torch.equal(other.tensors[name], stock[name]) for name in stock)


def test_a_model_loaded_with_peft_alone_comes_to_the_same(trained_place: Path, tmp_path: Path) -> None:
    """Nothing but `import surgery` and stock calls outside of the command."""
    rows = [json.loads(line) for line in (trained_place / "texts.jsonl").read_text().splitlines()]
    model = PeftModel.from_pretrained(load_base(trained_place / "llama"), trained_place / "giva", is_trainable=True)
    stock = trained_by_hand(model, AutoTokenizer.from_pretrained(trained_place / "llama"), rows, tmp_path / "t")
    trained, _ = surgery.train(
        trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", seed=3, **QUICK
    )
    assert all(torch.equal(trained.tensors[name], expected) for name, expected in stock.items())


def test_half_precision_stays_half(trained_place: Path) -> None:
    source = surgery.Adapter.open(trained_place / "giva")
    source.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in source.tensors.items()}
    source.folder = None
    trained, report = surgery.train(source, trained_place / "llama", trained_place / "texts.jsonl", **QUICK)
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.bfloat16}
    assert report.bytes == report.source_bytes


def test_a_rate_for_packed_factors_is_in_proportion_to_their_scale(trained_place: Path, tmp_path: Path) -> None:
    """A step of 1e-2 would be many times s, the scale of whole numbers."""
    learned, _ = surgery.train(trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", **QUICK)
    packed, _ = surgery.convert(learned, "giva", tmp_path / "packed", rank=1, bits=4, accept_loss=True)
    trained, report = surgery.train(
        packed, trained_place / "llama", trained_place / "texts.jsonl", steps=3, batch_size=8
    )
    scales = torch.cat([t for name, t in packed.tensors.items() if name.endswith("giva_s")])
    assert report.learning_rate == pytest.approx(method_info("giva").training_rate * float(scales.abs().median()))
    for name, tensor in packed.tensors.items():
        same = torch.equal(tensor, trained.tensors[name])
        assert same == name.endswith(("giva_A", "giva_B")), name


def test_a_loss_that_is_not_finite(trained_place: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"the loss is nan at step \d+: the learning rate 1e\+30 is too high"):
        surgery.train(
            trained_place / "giva",
            trained_place / "llama",
            trained_place / "texts.jsonl",
            out=tmp_path / "out",
            **{**QUICK, "lr": 1e30},
        )
    assert not list(tmp_path.iterdir())  # no step was kept that one could go on from
