"""Models with tied weights, and adapters put on them by hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import surgery
from surgery.adapters.source import Source
from surgery.models.base_model import BaseModel
from tests.helpers.merges import tied_llama, trained
from tests.helpers.models import load_base

CASES: dict[str, dict[str, Any]] = {
    "copy of the head": {"modules_to_save": ["lm_head"]},
    "copy of the embeddings": {"modules_to_save": ["embed_tokens"]},
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one copy for both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
}


@pytest.fixture(params=CASES)
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A Llama whose head is its embedding, and a LoRA that changes one or both of the two."""
    base = tied_llama(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "down_proj"], **CASES[request.param]}
    )
    return base, trained(load_base(base), config, tmp_path / "adapter")


def source_on(base: Path, adapter: Path) -> Source:
    return Source.open(surgery.Adapter.open(adapter), BaseModel.open(base), torch.device("cpu"))
