"""Students and teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.passes.examples import batches, read_examples
from surgery.training.preparing import Prepared, prepare
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


@pytest.fixture(scope="session")
def taught_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts without labels, students that start afresh, and teachers that have learnt something."""
    folder = tmp_path_factory.mktemp("distillation")
    write_rows(folder / "texts.jsonl", text_rows(40))
    write_rows(folder / "classes.jsonl", text_rows(40, labels=3))
    for kind, data in (("llama", "texts"), ("bert", "classes")):
        save_tokenizer(save_model(kind, folder / kind))
        labelled = {} if kind == "llama" else {"task": "seq-cls"}
        start = folder / f"{kind}-start"
        surgery.init(folder / kind, "giva", start, data=folder / f"{data}.jsonl", rank=4, **labelled)
        surgery.train(start, folder / kind, folder / f"{data}.jsonl", out=folder / f"{kind}-teacher", steps=20, lr=0.1)
    return folder


def prepared(kind: str, taught_place: Path, name: str = "start") -> Prepared:
    found = prepare(surgery.Adapter.open(taught_place / f"{kind}-{name}"), taught_place / kind)
    found.model.eval()
    return found


def some(kind: str, taught_place: Path, base: Any) -> dict[str, torch.Tensor]:
    examples = read_examples(taught_place / "texts.jsonl", base, 6, labelled=False)
    batch = next(batches(examples, 6))
    batch.pop("share")
    return batch


@pytest.fixture(scope="session")
def packed(taught_place: Path) -> Path:
    """The classifier's teacher in few bits, rank by rank cut down."""
    surgery.convert(taught_place / "bert-teacher", "giva", taught_place / "packed", rank=2, bits=3)
    return taught_place / "packed"


def learnt(packed: Path, taught_place: Path, out: Path | None = None, **options: Any) -> tuple[surgery.Adapter, Any]:
    options = {"steps": 40, "batch_size": 8, "lr": 0.05, **options}
    return surgery.train(
        packed,
        taught_place / "bert",
        taught_place / "texts.jsonl",
        teacher=taught_place / "bert-teacher",
        out=out,
        **options,
    )
