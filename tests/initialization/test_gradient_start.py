"""The model that a pass runs on: dropout, checkpointing, offloaded and quantised layers, and how it is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

import surgery
from surgery.errors import DataError, MethodError
from surgery.models.sites import select_sites, target_modules
from surgery.passes.loaded_model import _moved
from tests.helpers.gradient_starts import RANK, bases
from tests.helpers.models import build, labelled_inputs, load_base
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


def test_bfloat16_from_the_command_lines_words(tmp_path: Path) -> None:
    """The model runs in bfloat16 and the file is in it; A is close to that of float32."""
    build("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    path = write_rows(tmp_path / "data.jsonl", text_rows(8))
    wide, _ = surgery.init(tmp_path / "model", "giva", data=path, rank=RANK)
    narrow, _ = surgery.init(tmp_path / "model", "giva", data=path, rank=RANK, dtype="bf16")
    assert {tensor.dtype for tensor in narrow.tensors.values()} == {torch.bfloat16}
    model = load_base(tmp_path / "model")
    for module, tensors in narrow.modules.items():
        A, expected = tensors["giva_A"].float(), wide.modules[module]["giva_A"]
        assert float((A @ expected.T).square().sum()) > 0.8 * RANK, module
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "fp16"])
def test_float16_underflows(dtype: str) -> None:
    with pytest.raises(MethodError, match=r"float32 or bfloat16, not in torch\.float16: they would underflow"):
        bases(build("llama"), dtype=dtype)


def test_batch_of_a_tokenizer(tmp_path: Path) -> None:
    """`BatchEncoding` is a mapping, and no dictionary."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    batch = tokenizer(["w5 w6 w7 w8", "w9 w10 w11"], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    assert bases(build("llama"), data=[batch]).keys() == bases(build("llama")).keys()


class Pair(NamedTuple):
    """What a loader may give."""

    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("wrap", [dict, transformers.BatchEncoding, lambda found: [found], lambda found: (found, 3)])
def test_batches_go_where_the_model_is(wrap: Callable[[Any], Any]) -> None:
    tensors = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "weights": torch.ones(2)}
    moved = _moved(wrap(tensors), torch.device("meta"), torch.bfloat16)
    inner = moved[0] if isinstance(moved, (list, tuple)) else moved
    assert {value.device.type for value in inner.values()} == {"meta"}
    assert (inner["input_ids"].dtype, inner["weights"].dtype) == (torch.int64, torch.bfloat16)
    pair = _moved(Pair(*tensors.values()), torch.device("meta"), None)
    assert isinstance(pair, Pair) and pair.x.device.type == pair.y.device.type == "meta"


def test_loader_of_batches() -> None:
    rows = [{name: value[index] for name, value in labelled_inputs("llama", 6).items()} for index in range(6)]
    loader = torch.utils.data.DataLoader(rows, batch_size=3)
    expected = bases(build("llama"), data=[labelled_inputs("llama", 6)])
    found = bases(build("llama"), data=loader)
    assert all(float((A @ expected[module].T).square().sum()) > 0.5 * RANK for module, A in found.items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, MethodError, "starts from the gradient of a loss"),
        (5, DataError, "a file or an iterable of batches, not int"),
        ([], MethodError, "the data gave no batch"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.int64)}], DataError, "gives no loss for these batches"),
    ],
)
def test_bad_batches(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bases(build("llama"), data=data)


def test_other_methods_read_files() -> None:
    with pytest.raises(MethodError, match="inilora reads a model's files"):
        surgery.init(build("llama"), "inilora")


def test_layers_without_a_gradient_are_named_and_left_out(model_folder) -> None:
    """The loss sees the first two positions of the encoder's output alone, and a decoder that is not asked."""
    model = build("t5")
    loss = lambda model, batch: model.encoder(batch["input_ids"]).last_hidden_state.square().mean()  # noqa: E731
    adapter, report = surgery.init(model, "giva", data=[labelled_inputs("t5")], loss=loss)
    assert report.modules == 14
    assert all(module.startswith("encoder.") for module in adapter.modules)
    (note,) = [line for line in report.notes if "no gradient" in line]
    assert note.startswith("no gradient reaches decoder.block.0.layer.0.SelfAttention.q, ") and "left out" in note
    matched = [site for site in select_sites(model) if site.module in adapter.modules]
    assert adapter.config["target_modules"] == target_modules(model, matched)
