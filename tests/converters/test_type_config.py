"""The configuration of the result: heads, biases and layers as in the source's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import surgery
from tests.helpers.conversions import WEIGHTS, logits, trained
from tests.helpers.models import load_base, relative_difference
from tests.helpers.stock_adapters import randomise


def test_heads_and_biases_are_carried_bit_for_bit(model_folder, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=5).eval()

    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", bias="lora_only")
    source = get_peft_model(model(), config)
    randomise(source)
    source.save_pretrained(tmp_path / "source")
    made, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out", energy=1.0)
    old, new = (load_file(tmp_path / folder / WEIGHTS) for folder in ("source", "out"))
    carried = [name for name in old if "lora_" not in name]
    assert len(carried) == 6 and all(torch.equal(old[name], new[name]) for name in carried)
    assert made.config["bias"] == "vera_only" and report.weight_error < 1e-6
    inputs = {"input_ids": torch.arange(3, 10)[None]}
    with torch.no_grad():
        wanted, found, plain = (
            m(**inputs).logits
            for m in (
                PeftModel.from_pretrained(model(), tmp_path / "source").eval(),
                PeftModel.from_pretrained(model(), tmp_path / "out").eval(),
                model(),
            )
        )
    assert relative_difference(found, wanted) <= 1e-5
    assert relative_difference(plain, wanted) > 1e-2


def test_modules_that_the_source_left_out_stay_out(llama: Path, tmp_path: Path) -> None:
    """VeRA knows no exclude_modules: its layers are named one by one."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.1.self_attn.q_proj"])
    trained(load_base(llama), config, tmp_path / "source")
    made, report = surgery.convert(tmp_path / "source", "vera", tmp_path / "out", energy=1.0)
    assert report.modules == 5 and "exclude_modules" not in made.config
    assert relative_difference(logits(llama, tmp_path / "out"), logits(llama, tmp_path / "source")) <= 1e-5
