"""What servers have in common."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError
from tests.helpers.adapters import make_adapter


def test_a_score_goes_to_vllm_and_not_to_sglang(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification.from_pretrained(llama, num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    folder = make_adapter(tmp_path / "classifier", tmp_path / "lora", config)
    surgery.export(folder, "vllm", tmp_path / "out")
    old, new = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    name = next(name for name in old if "score" in name)
    assert torch.equal(old[name], new[name])
    with pytest.raises(AdapterError, match=r"score\.weight is saved whole, and SGLang reads factors alone"):
        surgery.export(folder, "sglang", tmp_path / "no")
