"""Whatever is wrong with training data: one line that names it, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import surgery
from surgery.errors import DataError, MethodError
from tests.helpers.bad_input import Edit, case, check_refused, check_usage_error, nothing
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, write_rows


def as_class(task: str, **settings: Any) -> Edit:
    """Save another class of model in place of the Llama."""

    def edit(folder: Path) -> None:
        if task == "seq-cls":
            config = transformers.LlamaConfig.from_pretrained(folder, **settings)
            transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
        elif task == "bert":
            save_model("bert", folder)
        elif task == "gpt2":
            save_model("gpt2", folder)
        else:
            save_model("vit", folder)
            (folder / "tokenizer.json").unlink()

    return edit


def rows(*found: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda place: write_rows(place / "data.jsonl", found)


def data_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def empty_folder(place: Path) -> Path:
    (place / "data").mkdir()
    return place / "data"


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def bert_without_mask(folder: Path) -> None:
    save_tokenizer(save_model("bert", folder), without=["mask"])


TEXT = {"text": "w5 w6 w7"}
LABELLED = ({**TEXT, "label": 0}, {**TEXT, "label": 1})
BAD_DATA = [
    case("no-such-file", nothing, lambda place: place / "no.jsonl", {}, ("PLACE/no.jsonl: no such data file",)),
    case("other-kind", nothing, data_file("a.pdf", b"x"), {}, ("PLACE/a.pdf", ".jsonl, .json, .txt, .csv, .parquet")),
    case("folder-for-text", nothing, empty_folder, {}, ("PLACE/data: data is read from .jsonl",)),
    *(
        case(f"empty-{kind}", nothing, data_file(f"a.{kind}", b""), {}, (f"PLACE/a.{kind}: is empty",))
        for kind in ("jsonl", "txt", "csv", "parquet")
    ),
    case("blank-lines", nothing, data_file("a.txt", b"\n \n\n"), {}, ("PLACE/a.txt: is empty",)),
    case("header-alone", nothing, data_file("a.csv", b"text,label\n"), {}, ("PLACE/a.csv: is empty",)),
    case("broken-json", nothing, data_file("a.jsonl", b'{"text": "w5"}\n{nope\n'), {}, ("PLACE/a.jsonl", "as json")),
    case("broken-parquet", nothing, data_file("a.parquet", b"PAR1 nope"), {}, ("PLACE/a.parquet", "as parquet")),
    case("no-column", nothing, rows({"body": "w5", "id": 3}), {}, ("columns body, id", "text or prompt + completion")),
    case("half-a-pair", nothing, rows({"prompt": "w5"}), {}, ("has the columns prompt", "prompt + completion")),
    case("text-a-number", nothing, rows({"text": 5}), {}, ("expected text, found int ('5')",)),
    case("text-null", nothing, rows(TEXT, {"text": None}), {}, ("expected text, found NoneType",)),
    case("prompt-null", nothing, rows({"prompt": None, "completion": "w5"}), {}, ("expected text, found NoneType",)),
    case(
        "completion-null", nothing, rows({"prompt": "w5", "completion": None}), {}, ("expected text, found NoneType",)
    ),
    case("nothing-to-learn", nothing, rows({"text": "w5"}), {}, ("none of 1 samples has anything to learn from",)),
    case("no-tokenizer", without_tokenizer, rows(TEXT), {}, ("PLACE/model: has no usable tokenizer",)),
    case("too-long", as_class("gpt2"), rows(TEXT), {"max_length": 33}, ("--max-length 33", "at most 32 tokens")),
    case("too-short", nothing, rows(TEXT), {"max_length": 1}, ("--max-length must be at least 2, got 1",)),
    case("bare-model", as_class("bert"), rows(TEXT), {}, ("BertModel (feature-extraction)", "--task", "masked-lm")),
    case("no-loss", nothing, rows(TEXT), {"task": "token-cls"}, ("token-cls", "has no loss for a data file", "--task")),
    case("no-label", nothing, rows(TEXT), {"task": "seq-cls"}, ("has the columns text", "needs label")),
    case("label-too-large", as_class("seq-cls"), rows({**TEXT, "label": 2}), {}, ("label 2 is none", "2 classes")),
    case("label-null", as_class("seq-cls"), rows(*LABELLED, {**TEXT, "label": None}), {}, ("label None is none",)),
    case(
        "label-text", as_class("seq-cls"), rows({**TEXT, "label": "a"}), {}, ("label 'a' is none", "LABEL_0, LABEL_1")
    ),
    case("label-negative", as_class("seq-cls"), rows({**TEXT, "label": -1}), {}, ("label -1 is none",)),
    case(
        "regression-on-text",
        as_class("seq-cls", num_labels=1),
        rows({**TEXT, "label": "a"}),
        {},
        ("label 'a' is none of the model's 1 classes",),
    ),
    case(
        "new-head-one-label",
        nothing,
        rows(LABELLED[0], LABELLED[0]),
        {"task": "seq-cls"},
        ("has the label 0 alone",),
    ),
    case(
        "new-head-floats",
        nothing,
        rows({**TEXT, "label": 0.5}, {**TEXT, "label": 1.5}),
        {"task": "seq-cls"},
        ("floating-point numbers, not classes",),
    ),
    case(
        "new-head-huge-label",
        nothing,
        rows(LABELLED[0], {**TEXT, "label": 10**9}),
        {"task": "seq-cls"},
        ("2 labels up to 1000000000",),
    ),
    case(
        "new-head-negative",
        nothing,
        rows(LABELLED[0], {**TEXT, "label": -3}),
        {"task": "seq-cls"},
        ("has the label -3", "counted from 0"),
    ),
    case("no-mask", bert_without_mask, rows(TEXT), {"task": "masked-lm"}, ("no mask token",)),
    case("images-no-processor", as_class("vit"), rows(*LABELLED), {}, ("PLACE/model: has no usable image processor",)),
]


@pytest.mark.parametrize(("edit", "make", "options", "words"), BAD_DATA)
def test_bad_data(edit: Edit, make, options, words: tuple[str, ...], learner: Path, tmp_path: Path) -> None:
    edit(learner)
    check_refused(tmp_path, DataError, words, learner, "giva", data=make(tmp_path), **options)


def test_no_data(learner: Path, tmp_path: Path) -> None:
    word = "method giva starts from the gradient of a loss: give its data with --data FILE"
    check_usage_error(tmp_path, word, "init", learner, "--method", "giva")
    with pytest.raises(MethodError, match="with --data FILE"):
        surgery.init(learner, "giva", tmp_path / "out")
