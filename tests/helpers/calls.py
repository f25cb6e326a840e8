"""A calls_place for calls of every verb, and the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

VERBS = ("init", "convert", "train", "merge", "export", "compare", "inspect", "push", "load", "trainable")


@pytest.fixture(scope="session")
def calls_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, a LoRA of it, and texts."""
    folder = tmp_path_factory.mktemp("api")
    save_tokenizer(save_model("llama", folder / "model"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_base(folder / "model"), config).save_pretrained(folder / "lora")
    write_rows(folder / "texts.jsonl", text_rows(24))
    return folder
