"""A model and a trained adapter that may be changed, and commands over them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub import make_adapter
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

BASE = "org/base"


class Folders:
    """A base model, a LoRA on it, a data file, and a place for outputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.lora, self.out = root / "model", root / "lora", root / "out"
        self.data = root / "data.jsonl"

    def commands(self, *flags: str) -> dict[str, list[Any]]:
        """Every command over the two folders, by name."""
        on_base = ["--base", self.model, *flags]
        small = ["--to", "giva", "--rank", 1, "--accept-loss"]
        train = ["train", self.lora, *on_base, "--data", self.data, "--steps", 1, "--batch-size", 2]
        return {
            "init": ["init", self.model, "--method", "inilora", "--rank", 2, "-o", self.out / "init", *flags],
            "init on data": [
                "init", self.model, "--method", "giva", "--rank", 2, "--data", self.data,
                "-o", self.out / "giva", *flags,
            ],
            "inspect": ["inspect", self.lora, *on_base],
            "inspect a model": ["inspect", self.model, *flags],
            "convert": ["convert", self.lora, *small, *on_base, "-o", self.out / "convert"],
            "convert on data": [
                "convert", self.lora, *small, *on_base, "--data", self.data, "--samples", 4,
                "-o", self.out / "converted",
            ],
            "merge": ["merge", self.lora, *on_base, "-o", self.out / "merge"],
            "compare": ["compare", self.lora, self.lora, *on_base, "--data", self.data, "--no-latency"],
            "train": [*train, "-o", self.out / "train"],
            "push": ["push", self.lora, "org/name", "--base-model", BASE, "--dry-run"],
        }  # fmt: skip


@pytest.fixture(scope="session")
def whole(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folders as they should be; not to be changed."""
    found = Folders(tmp_path_factory.mktemp("security"))
    shutil.copytree(model_folder("llama"), found.model)
    save_tokenizer(found.model)
    make_adapter("lora", found.model, found.lora)
    write_rows(found.data, text_rows(12))
    return found


@pytest.fixture
def folders(whole: Folders, tmp_path: Path) -> Folders:
    """A copy of the folders, to be changed."""
    shutil.copytree(whole.root, tmp_path / "place")
    return Folders(tmp_path / "place")
