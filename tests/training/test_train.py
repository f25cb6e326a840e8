"""`surgery.train`: the same as a stock Trainer, the rest of the adapter untouched, and nothing lost on the way."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, Trainer, TrainingArguments

import surgery
from surgery.cli.main import cli
from surgery.errors import AdapterError, CheckpointError, MethodError, OutputError
from surgery.methods.registry import info_for_config, method_info, method_infos, method_names, training_rate
from surgery.training.preparing import trained_parameters
from tests.helpers.command_line import contents, invoke
from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

STEPS, BATCH, LR = 6, 4, 1e-2
QUICK: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "lr": LR}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and a classifier with adapters, and data."""
    folder = tmp_path_factory.mktemp("train")
    for kind in ("llama", "bert"):
        save_tokenizer(save_model(kind, folder / kind))
    write_rows(folder / "texts.jsonl", text_rows(24))
    write_rows(folder / "classes.jsonl", text_rows(24, labels=3))
    write_rows(folder / "others.jsonl", text_rows(10, labels=3, seed=5))
    surgery.init(folder / "llama", "giva", folder / "giva", data=folder / "texts.jsonl", rank=2)
    surgery.init(folder / "bert", "giva", folder / "classifier", task="seq-cls", data=folder / "classes.jsonl", rank=2)
    return folder


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
def test_a_stock_trainer_comes_to_the_same(kind: str, adapter: str, data: str, place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / f"{data}.jsonl").read_text().splitlines()]
    trained, _ = surgery.train(place / adapter, place / kind, place / f"{data}.jsonl", seed=3, **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(place / kind)
    stock = trained_by_hand(surgery.trainable(place / adapter, place / kind), tokenizer, rows, tmp_path / "t")
    start = surgery.Adapter.open(place / adapter)
    for name, expected in stock.items():
        torch.testing.assert_close(trained.tensors[name], expected, rtol=0, atol=0)
    assert any(not torch.equal(start.tensors[name], stock[name]) for name in stock)
    other, _ = surgery.train(place / adapter, place / kind, place / f"{data}.jsonl", seed=4, **QUICK)
    assert any(not torch.equal(other.tensors[name], stock[name]) for name in stock)


def test_a_model_loaded_with_peft_alone_comes_to_the_same(place: Path, tmp_path: Path) -> None:
    """Nothing but `import surgery` and stock calls outside of the command."""
    rows = [json.loads(line) for line in (place / "texts.jsonl").read_text().splitlines()]
    model = PeftModel.from_pretrained(load_base(place / "llama"), place / "giva", is_trainable=True)
    stock = trained_by_hand(model, AutoTokenizer.from_pretrained(place / "llama"), rows, tmp_path / "t")
    trained, _ = surgery.train(place / "giva", place / "llama", place / "texts.jsonl", seed=3, **QUICK)
    assert all(torch.equal(trained.tensors[name], expected) for name, expected in stock.items())


@pytest.mark.parametrize("method", method_names())
def test_every_method(method: str, place: Path, tmp_path: Path) -> None:
    """Trained, written, opened again by PEFT; what does not train is as it was to the last bit."""
    if method == "giva":
        source = surgery.Adapter.open(place / "giva")
    else:
        source, _ = surgery.init(place / "llama", method, tmp_path / "start")
    trains = set(trained_parameters(surgery.trainable(source, place / "llama")))
    out = tmp_path / "out"
    trained, report = surgery.train(
        source, place / "llama", place / "texts.jsonl", out=out, steps=3, batch_size=8, lr=1e-3
    )
    written = surgery.Adapter.open(out)
    assert written.tensors.keys() == source.tensors.keys() and written.config == source.config
    for name, tensor in written.tensors.items():
        assert torch.equal(tensor, trained.tensors[name])
        assert torch.equal(tensor, source.tensors[name]) == (name not in trains), name
    assert (report.method, report.bytes) == (method, (out / "adapter_model.safetensors").stat().st_size)
    model = PeftModel.from_pretrained(load_base(place / "llama"), out).eval()
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - load_base(place / "llama")(input_ids=ids).logits).abs().max()
    assert moved > 0


def test_half_precision_stays_half(place: Path) -> None:
    source = surgery.Adapter.open(place / "giva")
    source.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in source.tensors.items()}
    source.folder = None
    trained, report = surgery.train(source, place / "llama", place / "texts.jsonl", **QUICK)
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.bfloat16}
    assert report.bytes == report.source_bytes


# Evaluation


def naive_scores(adapter: Path, place: Path) -> tuple[float, float]:
    """Loss and accuracy on the other texts, sample by sample in double precision."""
    model = surgery.load(adapter, place / "bert").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    losses, right = [], 0
    for line in (place / "others.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(float(F.cross_entropy(logits, torch.tensor([row["label"]]))))
        right += int(logits.argmax()) == row["label"]
    return sum(losses) / len(losses), right / len(losses)


def test_evaluation_before_and_after(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(
        place / "classifier", place / "bert", place / "classes.jsonl", place / "others.jsonl", out, **QUICK
    )
    assert report.evaluated_on == "eval_data"
    for adapter, found in ((place / "classifier", report.before), (out, report.after)):
        loss, accuracy = naive_scores(adapter, place)
        assert found.items == 10 and found.score == "accuracy"
        assert found.loss == pytest.approx(loss, rel=1e-5) and found.value == pytest.approx(accuracy)
    assert report.before.loss != report.after.loss


def test_perplexity_is_a_mean_over_tokens(place: Path) -> None:
    _, report = surgery.train(place / "giva", place / "llama", place / "texts.jsonl", **{**QUICK, "batch_size": 5})
    assert report.before.value == pytest.approx(math.exp(report.before.loss), rel=1e-5)
    tokens = sum(len(json.loads(line)["text"].split()) - 1 for line in (place / "texts.jsonl").read_text().splitlines())
    assert report.before.items == tokens


# What is written


def test_the_loss_curve(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(place / "giva", place / "llama", place / "texts.jsonl", out=out, **QUICK)
    rows = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert rows == report.loss and [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["learning_rate"] == LR and (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(contents(out)) == {
        "adapter_config.json", "adapter_model.safetensors", "loss.jsonl", "loss.png", "surgery.json"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [out]
    history = json.loads((out / "surgery.json").read_text())
    assert history["command"] == "train" and str(tmp_path) not in json.dumps(history)


def test_dry_run_and_no_output_write_nothing(place: Path, tmp_path: Path) -> None:
    _, planned = surgery.train(
        place / "giva", place / "llama", place / "texts.jsonl", out=tmp_path / "out", dry_run=True, **QUICK
    )
    assert planned.dry_run and planned.steps_done == 0 and not list(tmp_path.iterdir())
    with contextlib.chdir(tmp_path):
        _, report = surgery.train(place / "giva", place / "llama", place / "texts.jsonl", **QUICK)
    assert report.out is None and not list(tmp_path.iterdir())


def test_an_output_is_not_replaced_without_force(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.train(place / "giva", place / "llama", place / "texts.jsonl", out=out, **QUICK)
    before = contents(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        surgery.train(place / "giva", place / "llama", place / "texts.jsonl", out=out, **QUICK)
    assert contents(out) == before
    surgery.train(place / "giva", place / "llama", place / "texts.jsonl", out=out, force=True, seed=1, **QUICK)
    assert contents(out) != before


# Rates


def test_learning_rates() -> None:
    assert training_rate({"peft_type": "GIVA"}) == method_info("giva").learning_rate
    for variant, name in (("svd", "inilora"), ("alpha", "inilora-alpha"), ("beta", "inilora-beta")):
        assert info_for_config({"peft_type": "INILORA", "variant": variant}) is method_info(name)
    for info in method_infos():
        assert info.learning_rate in (None, info.training_rate), "a published rate is the default"
    assert training_rate({"peft_type": "LORA"}) > 0 and info_for_config({"peft_type": "LORA"}) is None


def test_a_rate_for_packed_factors_is_in_proportion_to_their_scale(place: Path, tmp_path: Path) -> None:
    """A step of 1e-2 would be many times s, the scale of whole numbers."""
    learned, _ = surgery.train(place / "giva", place / "llama", place / "texts.jsonl", **QUICK)
    packed, _ = surgery.convert(learned, "giva", tmp_path / "packed", rank=1, bits=4, accept_loss=True)
    trained, report = surgery.train(packed, place / "llama", place / "texts.jsonl", steps=3, batch_size=8)
    scales = torch.cat([t for name, t in packed.tensors.items() if name.endswith("giva_s")])
    assert report.learning_rate == pytest.approx(method_info("giva").training_rate * float(scales.abs().median()))
    for name, tensor in packed.tensors.items():
        same = torch.equal(tensor, trained.tensors[name])
        assert same == name.endswith(("giva_A", "giva_B")), name


# Refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 0}, "max_steps must be at least 1"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size 3 does not divide into 1 processes times 2 parts"),
        ({"lr": 0.0}, "learning_rate must be positive"),
        ({"lr": float("nan")}, "learning_rate must be positive"),
        ({"warmup": 1.0}, "warmup_ratio is a share"),
        ({"cache_teacher": True}, "cache_teacher belongs to a training with a teacher"),
        ({"schedule": "nope"}, "TrainingArguments"),
        ({"arguments": {"nope": 1}}, "TrainingArguments"),
        ({"save_every": 0}, "save_steps must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str, place: Path) -> None:
    with pytest.raises(MethodError, match=reason):
        surgery.train(place / "giva", place / "llama", place / "texts.jsonl", **{**QUICK, **options})


def test_a_loss_that_is_not_finite(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"the loss is nan at step \d+: the learning rate 1e\+30 is too high"):
        surgery.train(
            place / "giva", place / "llama", place / "texts.jsonl", out=tmp_path / "out", **{**QUICK, "lr": 1e30}
        )
    assert not list(tmp_path.iterdir())  # no step was kept that one could go on from


def test_a_base_whose_weights_are_not_finite(place: Path, tmp_path: Path) -> None:
    """It is the base that is named, not the learning rate."""
    shutil.copytree(place / "llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the base model's model\.layers\.1\.mlp\.up_proj\.weight holds values"):
        surgery.train(place / "giva", tmp_path / "base", place / "texts.jsonl", out=tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_of_another_model(place: Path) -> None:
    with pytest.raises(AdapterError):
        surgery.train(place / "giva", place / "bert", place / "classes.jsonl", **QUICK)


# The command


def test_command(place: Path, tmp_path: Path) -> None:
    options = ["--steps", STEPS, "--batch-size", BATCH, "--lr", LR, "--seed", 3]
    data = ["--base", place / "bert", "--data", place / "classes.jsonl", "--eval-data", place / "others.jsonl"]
    result = invoke("train", place / "classifier", *data, "-o", tmp_path / "a", *options, "--json")
    announced = result.stderr.splitlines()
    assert result.exit_code == 0 and len(announced) == 1, result.stderr
    assert (
        announced[0].startswith(f"{STEPS} steps of {BATCH} samples: ")
        and f"learning rate {LR:g} (--lr)" in announced[0]
    )
    found = json.loads(result.stdout)
    keys = {"command", "out", "method", "peft_type", "modules", "trainable_parameters", "bytes", "seconds"}
    assert keys <= set(found) and found["command"] == "train"
    trained, report = surgery.train(
        place / "classifier", place / "bert", place / "classes.jsonl", place / "others.jsonl", seed=3, **QUICK
    )
    written = surgery.Adapter.open(tmp_path / "a")
    assert all(torch.equal(written.tensors[name], tensor) for name, tensor in trained.tensors.items())
    assert found["after"]["loss"] == report.after.loss
    shown = invoke("train", place / "classifier", *data, "-o", tmp_path / "b", *options)
    assert shown.exit_code == 0
    for word in ("before", "after", "accuracy", "giva_o, giva_s", "held-out data", f"{STEPS} of {STEPS}"):
        assert word in shown.stdout
    quiet = invoke("train", place / "classifier", *data, "-o", tmp_path / "c", *options, "-q")
    assert quiet.stdout == f"{tmp_path / 'c'}\n"


def test_command_refuses_idle_options(place: Path) -> None:
    data = ["--base", place / "llama", "--data", place / "texts.jsonl"]
    result = invoke("train", place / "giva", *data, "--cache-teacher")
    assert result.exit_code == 2 and "belong to a training with --teacher" in result.stderr
    assert cli.name == "cli"
