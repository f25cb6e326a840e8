"""An adapter to push, and the call."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from tests.helpers.hub import make_adapter

WEIGHTS = "adapter_model.safetensors"
FILES = {"README.md", "adapter_config.json", WEIGHTS, "plot.png"}
REPO, BASE = "org/small", "bases/llama"


@pytest.fixture(scope="session")
def adapter(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA, as PEFT saves it: its base model is a path. With a picture, so that none is drawn."""
    folder = make_adapter("lora", model_folder("llama"), tmp_path_factory.mktemp("lora") / "small")
    (folder / "plot.png").write_bytes(bytes(range(256)) * 12)
    return folder


def push(adapter: Path, **options):
    """Push to the usual place."""
    return surgery.push(adapter, REPO, **{"base_model": BASE, **options})
