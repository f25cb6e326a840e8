"""From data files to batches: every format and task, what is masked, how batches are weighted."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import surgery
from surgery.errors import DataError
from surgery.models.base_model import BaseModel
from surgery.passes.examples import batches, labels_in, read_examples
from tests.helpers.models import build, load_base
from tests.helpers.reference import own_loss
from tests.helpers.texts import END, MASK, PAD, save_tokenizer, text_rows, write_rows


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function from a kind of model to a folder of it with a tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str, **settings: Any) -> Path:
        key = f"{kind}{settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind) / "model"
            build(kind).save_pretrained(made[key])
            save_tokenizer(made[key], **settings)
        return made[key]

    return folder


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the file's name says."""
    if path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows) + "\n\n")
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_rows(path, rows)
    return path


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def as_lists(examples: Any) -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in each.items()} for each in examples.features]


# Formats


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt", "data.csv", "data.parquet", "DATA.JSONL"])
def test_every_format_gives_the_same_samples(name: str, with_tokenizer, tmp_path: Path) -> None:
    rows = text_rows(9)
    path = save(tmp_path / name, rows)
    examples = read_examples(path, BaseModel.open(with_tokenizer("llama")), 32)
    found = sorted(each["input_ids"] for each in as_lists(examples))
    assert found == sorted(ids(row["text"]) for row in rows)
    assert examples.notes == ["the data has 9 samples, 32 were asked for: all of them are used"]


def test_samples_are_drawn_by_the_seed(with_tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", text_rows(40))
    base = BaseModel.open(with_tokenizer("llama"))
    first, again, other = (as_lists(read_examples(path, base, 6, seed=seed)) for seed in (0, 0, 1))
    assert len(first) == 6 and first == again and first != other
    assert [each["input_ids"] for each in first] != [ids(row["text"]) for row in text_rows(40)[:6]]


# Causal language models


@pytest.mark.parametrize("ends_texts", [False, True])
def test_prompts_are_masked(ends_texts: bool, with_tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", [{"prompt": "w5 w6 w7", "completion": "w8 w9"}])
    base = BaseModel.open(with_tokenizer("llama", ends_texts=ends_texts))
    examples = read_examples(path, base, 1)
    assert as_lists(examples) == [
        {
            "input_ids": [5, 6, 7, 8, 9, END],
            "attention_mask": [1] * 6,
            "labels": [-100, -100, -100, 8, 9, END],
        }
    ]
    assert examples.counts == [3]


def test_texts_are_learnt_whole(with_tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", [{"text": "w5 w6 w7"}])
    (row,) = as_lists(read_examples(path, BaseModel.open(with_tokenizer("llama")), 1))
    assert row["input_ids"] == row["labels"] == [5, 6, 7]


def test_texts_and_prompts_in_one_file(with_tokenizer, tmp_path: Path) -> None:
    rows = [
        {"text": "w5 w6 w7", "prompt": None, "completion": None},
        {"text": None, "prompt": "w5", "completion": "w8"},
    ]
    path = save(tmp_path / "data.jsonl", rows)
    found = as_lists(read_examples(path, BaseModel.open(with_tokenizer("llama")), 2))
    assert sorted(each["labels"] for each in found) == [[-100, 8, END], [5, 6, 7]]


def test_cut_samples_are_counted(with_tokenizer, tmp_path: Path) -> None:
    long = " ".join(["w5"] * 12)
    rows = [
        {"prompt": "w5 w6", "completion": long},
        {"prompt": long, "completion": "w8"},
        {"prompt": "w5", "completion": "w6"},
    ]
    path = save(tmp_path / "data.jsonl", rows)
    examples = read_examples(path, BaseModel.open(with_tokenizer("llama")), 3, max_length=8)
    assert sorted(each["labels"] for each in as_lists(examples)) == [[-100, -100, 5, 5, 5, 5, 5, 5], [-100, 6, END]]
    assert examples.notes == [
        "2 of 3 samples were cut at 8 tokens",
        "<end> is appended to 3 completions, and is learnt",
        "1 samples have no token to learn from and are left out",
    ]


def test_length_defaults_to_the_models_positions(with_tokenizer, tmp_path: Path) -> None:
    """GPT-2 here has 32."""
    path = save(tmp_path / "data.jsonl", [{"text": " ".join(["w5"] * 50)}])
    examples = read_examples(path, BaseModel.open(with_tokenizer("gpt2")), 1)
    assert len(as_lists(examples)[0]["input_ids"]) == 32
    assert examples.notes == ["1 of 1 samples were cut at 32 tokens; --max-length changes that"]


def test_positions_that_are_counted_after_padding(tmp_path: Path) -> None:
    """RoBERTa has two positions less than it says; one token more would be an index out of range."""
    settings = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**settings, intermediate_size=16, max_position_embeddings=20, pad_token_id=1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    path = save(tmp_path / "data.jsonl", [{"text": " ".join(["w5"] * 50), "label": 1}] * 2)
    examples = read_examples(path, BaseModel.open(tmp_path / "model"), 1)
    assert len(as_lists(examples)[0]["input_ids"]) == 18
    surgery.init(tmp_path / "model", "giva", data=path)
    with pytest.raises(DataError, match="takes at most 18 tokens"):
        read_examples(path, BaseModel.open(tmp_path / "model"), 1, max_length=19)


# Classes


def test_pairs_of_texts(with_tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "w5 w6", "text_pair": "w7", "label": 1}]
    folder = with_tokenizer(
        "bert", ends_texts=True, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    examples = read_examples(save(tmp_path / "data.jsonl", rows), BaseModel.open(folder, "seq-cls"), 1)
    assert as_lists(examples) == [
        {
            "input_ids": [5, 6, END, 7, END],
            "token_type_ids": [0, 0, 0, 1, 1],
            "attention_mask": [1] * 5,
            "labels": 1,
        }
    ]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([0, 2, 1, 2], [0, 2, 1, 2], None),
        ([3, 0, 3, 0], [3, 0, 3, 0], None),
        (["no", "yes", "maybe", "no"], [1, 2, 0, 1], {"maybe": 0, "no": 1, "yes": 2}),
        ([False, True, True, False], [0, 1, 1, 0], None),
    ],
)
def test_new_head_has_the_datas_labels(labels, expected: list[int], names, with_tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"w{5 + index}", "label": label} for index, label in enumerate(labels)]
    path = save(tmp_path / "data.jsonl", rows)
    folder = with_tokenizer("bert")
    base = BaseModel.open(folder, "seq-cls", labels=labels_in(path, BaseModel.open(folder, "seq-cls")))
    found = {row["input_ids"][0]: row["labels"] for row in as_lists(read_examples(path, base, 9))}
    assert [found[5 + index] for index in range(4)] == expected
    if names:
        assert base.config.label2id == names
    count = max(expected) + 1
    adapters = [surgery.init(folder, "giva", data=path, task="seq-cls", seed=seed) for seed in (0, 0, 1)]
    heads = [adapter.modules["classifier"]["weight"] for adapter, _ in adapters]
    assert heads[0].shape == (count, 32)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert adapters[0][1].labels == count
    assert adapters[0][0].config["modules_to_save"] == ["classifier"]
    assert adapters[0][0].provenance["labels"] == sorted(set(labels))


def labelled_folder(folder: Path, **config: Any) -> Path:
    """A Llama classifier whose classes have names."""
    settings = transformers.LlamaConfig.from_pretrained(folder, **config)
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(settings).save_pretrained(folder)
    return folder


@pytest.fixture
def named(with_tokenizer, tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "named")
    save_tokenizer(tmp_path / "named")
    names = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    return labelled_folder(tmp_path / "named", **names)


@pytest.mark.parametrize(("label", "expected"), [("dog", 0), ("cat", 1), (1, 1), ("bird", None), (2, None), (-1, None)])
def test_labels_of_a_model_that_has_them(label, expected: int | None, named: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", [{"text": "w5", "label": label}])
    base = BaseModel.open(named)
    if expected is not None:
        assert as_lists(read_examples(path, base, 1))[0]["labels"] == expected
        return
    with pytest.raises(DataError, match=rf"label '?{label}'? is none of the model's 2 classes \(dog, cat\)"):
        read_examples(path, base, 1)


def test_label_out_of_range_is_found_wherever_it_stands(named: Path, tmp_path: Path) -> None:
    rows = text_rows(50, labels=2)
    rows[-1]["label"] = 7
    path = save(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match="label 7"):
        read_examples(path, BaseModel.open(named), 1)


def test_regression(with_tokenizer, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    labelled_folder(tmp_path / "model", num_labels=1)
    path = save(tmp_path / "data.jsonl", [{"text": "w5 w6", "label": 0.25}, {"text": "w7", "label": 3.0}])
    found = as_lists(read_examples(path, BaseModel.open(tmp_path / "model"), 2))
    assert sorted(each["labels"] for each in found) == [0.25, 3.0]
    for dtype in ("float32", "bfloat16"):
        _, report = surgery.init(tmp_path / "model", "giva", data=path, dtype=dtype)
        assert report.loss > 0


# The other tasks


def test_masked_lm(with_tokenizer, tmp_path: Path) -> None:
    """About 15 % of the tokens, the same whichever batch a sample is in."""
    path = save(tmp_path / "data.jsonl", text_rows(60, shortest=20, longest=24))
    base = BaseModel.open(with_tokenizer("bert"), "masked-lm")
    examples = read_examples(path, base, 60)
    rows = as_lists(examples)
    tokens = [pair for row in rows for pair in zip(row["input_ids"], row["labels"], strict=True)]
    chosen = [(found, label) for found, label in tokens if label != -100]
    assert 0.1 < len(chosen) / len(tokens) < 0.2
    assert 0.6 < sum(found == MASK for found, _ in chosen) / len(chosen) < 0.95
    assert examples.counts == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert as_lists(read_examples(path, base, 60)) == rows
    assert as_lists(read_examples(path, base, 60, seed=1)) != rows


def test_seq2seq_lm(with_tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", [{"prompt": "w5 w6", "completion": "w7 w8 w9"}])
    examples = read_examples(path, BaseModel.open(with_tokenizer("t5", ends_texts=True)), 1)
    assert as_lists(examples) == [{"input_ids": [5, 6, END], "attention_mask": [1, 1, 1], "labels": [7, 8, 9, END]}]
    assert examples.counts == [4]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (10, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images whose classes have names, not in the order of the alphabet."""
    folder = tmp_path_factory.mktemp("vit") / "model"
    model = build("vit")
    names = ["zebra", "ape", "cow", "bee", "dog"]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def image_folder(place: Path, names: dict[str, int]) -> Path:
    """A folder of folders with one picture each, drawn from the seed given."""
    for name, seed in names.items():
        (place / name).mkdir(parents=True)
        picture(seed).save(place / name / "picture.png")
    return place


def check_pixels(examples: Any, folder: Path, expected: dict[int, int]) -> None:
    """Every picture, by the seed it was drawn from, has its label."""
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    for seed, label in expected.items():
        pixels = processor(picture(seed), return_tensors="pt")["pixel_values"][0]
        (found,) = [each for each in examples.features if torch.allclose(each["pixel_values"], pixels, atol=1e-5)]
        assert int(found["labels"]) == label


def test_image_folder_by_the_models_names(vit: Path, tmp_path: Path) -> None:
    """The folders' own order is the alphabet's: the model's names decide."""
    path = image_folder(tmp_path / "images", {"zebra": 1, "bee": 2, "ape": 3})
    check_pixels(read_examples(path, BaseModel.open(vit), 9), vit, {1: 0, 2: 3, 3: 1})
    adapter, report = surgery.init(vit, "giva", data=path)
    assert report.modules == 12 and report.samples == 3 and "classifier" in adapter.modules


def test_image_folder_with_another_name(vit: Path, tmp_path: Path) -> None:
    path = image_folder(tmp_path / "images", {"zebra": 1, "unicorn": 2})
    with pytest.raises(DataError, match="label 'unicorn' is none"):
        read_examples(path, BaseModel.open(vit), 9)


def test_image_folder_of_numbers(model_folder, tmp_path: Path) -> None:
    """`10` comes before `2` in the folders' order."""
    folder = tmp_path / "model"
    build("vit").save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    path = image_folder(tmp_path / "images", {"0": 1, "2": 2, "04": 3})
    check_pixels(read_examples(path, BaseModel.open(folder), 9), folder, {1: 0, 2: 2, 3: 4})


def test_image_folder_for_a_new_head(vit: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    config = transformers.ViTConfig.from_pretrained(vit)
    config.id2label, config.label2id = {}, {}
    transformers.ViTModel(config).save_pretrained(bare)
    settings = json.loads((bare / "config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        settings.pop(key, None)
    (bare / "config.json").write_text(json.dumps(settings))
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(bare)
    path = image_folder(tmp_path / "images", {"zebra": 1, "bee": 2, "ape": 3})
    adapter, report = surgery.init(bare, "giva", data=path, task="image-cls")
    assert report.labels == 3 and adapter.provenance["labels"] == ["ape", "bee", "zebra"]
    assert adapter.modules["classifier"]["weight"].shape == (3, 32)


def test_images_for_a_model_in_bfloat16(tmp_path: Path) -> None:
    """Swin, unlike ViT, does not cast its pixels."""
    settings = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**settings, window_size=4, num_labels=2))
    model.save_pretrained(tmp_path / "swin")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "swin")
    path = image_folder(tmp_path / "images", {"0": 1, "1": 2})
    _, report = surgery.init(tmp_path / "swin", "giva", data=path, dtype="bf16")
    assert report.samples == 2


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_with_images(typed: bool, vit: Path, tmp_path: Path) -> None:
    """Labels as numbers of the file's own names, or as the model's numbers."""
    import datasets

    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    if typed:
        features["label"] = datasets.ClassLabel(names=["ape", "bee", "zebra"])
    rows = {"image": [picture(1), picture(2)], "label": [0, 2]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "images.parquet")
    examples = read_examples(tmp_path / "images.parquet", BaseModel.open(vit), 9)
    check_pixels(examples, vit, {1: 1, 2: 0} if typed else {1: 0, 2: 2})


# Batches


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize(("size", "processes"), [(32, 1), (4, 1), (1, 1), (4, 2), (7, 3)])
def test_weighted_losses_sum_to_the_mean_over_all_items(
    kind: str, size: int, processes: int, with_tokenizer, tmp_path: Path
) -> None:
    """However samples of unequal length are cut into batches and shared out."""
    rows = text_rows(9, labels=2)
    rows = [{**row, "prompt": row["text"][:5], "completion": row["text"][6:]} for row in rows] if kind == "t5" else rows
    path = save(tmp_path / "data.jsonl", rows)
    task = "seq-cls" if kind == "bert" else None
    base = BaseModel.open(with_tokenizer(kind), task)
    examples = read_examples(path, base, 32)
    torch.manual_seed(0)
    model = type(base.model).from_pretrained(base.folder).eval()
    total = counts = 0.0
    shares = [list(batches(examples, size, rank, processes)) for rank in range(processes)]
    assert len({len(each) for each in shares}) == 1
    with torch.no_grad():
        for each in features_one_by_one(examples):
            items = examples.counts[each[0]]
            total += float(own_loss(model, each[1])) * items
            counts += items
        found = sum(
            float(own_loss(model, {k: v for k, v in batch.items() if k != "share"})) * batch["share"]
            for share in shares
            for batch in share
        )
    assert found == pytest.approx(total / counts, rel=1e-5)
    assert sum(batch["share"] for share in shares for batch in share) == pytest.approx(1)


def features_one_by_one(examples: Any) -> list[tuple[int, dict[str, torch.Tensor]]]:
    return [(i, {name: value[None] for name, value in each.items()}) for i, each in enumerate(examples.features)]


def test_padding(with_tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", [{"text": "w5 w6 w7"}, {"text": "w8 w9"}])
    examples = read_examples(path, BaseModel.open(with_tokenizer("llama")), 2)
    (batch,) = batches(examples, 2)
    order = batch["attention_mask"].sum(1).argsort(descending=True)
    assert batch["input_ids"][order].tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert batch["attention_mask"][order].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][order].tolist() == [[5, 6, 7], [8, 9, -100]]


def test_padding_that_the_model_has_no_row_for(with_tokenizer, tmp_path: Path) -> None:
    """A tokenizer may have been given a token for it after the model was made."""
    base = BaseModel.open(with_tokenizer("llama"))
    rows = base.model.get_input_embeddings().num_embeddings
    base.config.pad_token_id = rows
    path = save(tmp_path / "data.jsonl", [{"text": "w5 w6 w7"}, {"text": "w8 w9"}])
    (batch,) = batches(read_examples(path, base, 2), 2)
    assert int(batch["input_ids"].max()) < rows


def test_classes_without_names(with_tokenizer, tmp_path: Path) -> None:
    base = BaseModel.open(with_tokenizer("bert"), "seq-cls")
    path = save(tmp_path / "data.jsonl", text_rows(2, labels=2))
    for names in (math.inf, ["a", "b"], {"a": None}, {"a": math.inf}):
        base.config.label2id = names
        with pytest.raises(DataError, match="label2id is no table of names and numbers"):
            read_examples(path, base, 2)


@pytest.mark.parametrize("config_pad", [None, 60])
@pytest.mark.parametrize("without", [(), ("pad",)])
def test_classifier_that_finds_the_end_by_its_padding(config_pad: int | None, without, tmp_path: Path) -> None:
    """A Llama classifier reads a text's last token; with others in a batch it must find the same one."""
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    save_tokenizer(folder, without=without)
    labelled_folder(folder, num_labels=3, pad_token_id=config_pad)
    path = save(tmp_path / "data.jsonl", text_rows(6, labels=3))
    runs = [surgery.init(folder, "giva", data=path, batch_size=size) for size in (1, 6)]
    assert runs[0][1].loss == pytest.approx(runs[1][1].loss, rel=1e-5)
    # And the model's files are what they were.
    assert load_base(folder).config.pad_token_id == config_pad
