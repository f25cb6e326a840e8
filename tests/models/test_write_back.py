"""Parameters that transformers makes from several tensors are written back into these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from surgery.errors import CheckpointError
from tests.helpers.merges import check_merged, trained
from tests.helpers.models import (
    load_base,
    spread,
)


def test_weights_that_are_fused_in_the_file_are_written_back(tmp_path: Path) -> None:
    """NomicBert's file holds q, k and v in one tensor, which transformers splits while loading."""
    if not hasattr(tf, "NomicBertConfig"):
        pytest.skip("this transformers has no NomicBert")
    torch.manual_seed(0)
    config = tf.NomicBertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = tf.NomicBertModel(config)
    spread(model)
    model.save_pretrained(tmp_path / "base")
    fused = [name for name in load_file(tmp_path / "base" / "model.safetensors") if "qkv" in name.lower()]
    assert len(fused) == 2
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    adapter = trained(load_base(tmp_path / "base"), config, tmp_path / "lora")
    check_merged(adapter, tmp_path / "base", "bert", tmp_path / "merged")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert old.keys() == new.keys()
    q, k, v = (old[fused[0]] - new[fused[0]]).chunk(3)
    assert q.any() and v.any() and not k.any()


def test_a_rule_that_computes_is_not_inverted() -> None:
    from surgery.models.write_back import written_back

    class Doubling:
        keys = (("a", "a"),)

        def read(self, parameter: str, model: Any, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
            return read("a") * 2

    with pytest.raises(CheckpointError, match="p: cannot be written back into a"):
        written_back(Doubling(), None, lambda key: torch.ones(3), {"p": torch.zeros(3)})  # type: ignore[arg-type]
