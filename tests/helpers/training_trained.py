"""A place with models, adapters and data to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

STEPS, BATCH, LR = 6, 4, 1e-2
QUICK: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "lr": LR}


@pytest.fixture(scope="session")
def trained_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
