"""Heads of a start: as many classes as asked for, those that are named, or those of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from surgery.errors import DataError, MethodError, OptionError
from surgery.methods.registry import method_names
from tests.helpers.command_line import invoke
from tests.helpers.models import build
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

METHODS = tuple(method_names())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare BERT with a tokenizer; beside it is data of three classes."""
    place = tmp_path_factory.mktemp("bert")
    write_rows(place / "classes.jsonl", text_rows(9, labels=3))
    build("bert").save_pretrained(place / "model")
    return save_tokenizer(place / "model")


def start(bert: Path, method: str, **options: Any) -> tuple[Any, Any]:
    if method == "giva":
        options.setdefault("data", bert.parent / "classes.jsonl")
    return surgery.init(bert, method, task="seq-cls", **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("options", "count"), [({"num_labels": 8}, 8), ({"labels": ["c", "a", "b", "d"]}, 4), ({}, 3)])
def test_every_method_has_the_head(method: str, options, count: int, bert: Path, tmp_path: Path) -> None:
    if not options:
        options = {"data": bert.parent / "classes.jsonl"}
    adapter, report = start(bert, method, **options, out=tmp_path / "out")
    assert report.labels == count and adapter.modules["classifier"]["weight"].shape == (count, 32)
    model = surgery.load(tmp_path / "out", bert, task="seq-cls")
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, count)


def test_names_keep_their_order(bert: Path, tmp_path: Path) -> None:
    result = invoke(
        *("init", bert, "--method", "vera", "--task", "seq-cls", "--labels", "no, yes,maybe", "-o", tmp_path / "out")
    )
    assert result.exit_code == 0, result.stderr
    assert surgery.Adapter.open(tmp_path / "out").provenance["labels"] == ["no", "yes", "maybe"]


def test_a_head_of_other_classes_than_the_checkpoints_is_fresh(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(build("bert").config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    count = surgery.BaseModel.open(tmp_path / "model").config.num_labels
    own = surgery.init(tmp_path / "model", "vera")[0]
    same, _ = surgery.init(tmp_path / "model", "vera", num_labels=count)
    other, report = surgery.init(tmp_path / "model", "vera", num_labels=count + 3)
    name = next(module for module in own.modules if own.modules[module].get("weight") is not None)
    assert torch.equal(own.modules[name]["weight"], same.modules[name]["weight"])
    assert other.modules[name]["weight"].shape[0] == count + 3
    assert any("fresh one" in note for note in report.notes)


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("vera", {"num_labels": 3}, OptionError, "LlamaForCausalLM has no classes"),
        ("vera", {"num_labels": 3, "labels": ["a", "b"], "task": "seq-cls"}, OptionError, "not both"),
        ("vera", {"num_labels": 0, "task": "seq-cls"}, OptionError, "at least 1"),
        ("vera", {"labels": ["a", "a"], "task": "seq-cls"}, OptionError, "different names"),
        ("frod", {"data": "texts.jsonl"}, MethodError, "method frod takes no data but for the labels"),
        ("frod", {"data": "missing.jsonl", "task": "seq-cls"}, DataError, "no such data file"),
    ],
)
def test_what_makes_no_head_is_refused(method: str, options, error, words: str, llama: Path) -> None:
    with pytest.raises(error, match=words):
        surgery.init(llama, method, **options)


def test_data_that_changes_no_head_is_refused(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(build("bert").config).save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "a.jsonl", text_rows(9, labels=3))
    with pytest.raises(OptionError, match="--num-labels or --labels"):
        surgery.init(tmp_path / "model", "vera", data=rows)
