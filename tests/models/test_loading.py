"""Bases that are not plain: with an adapter in the folder, without some weights, composite, quantised, old ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError
from surgery.models.base_model import BaseModel
from surgery.models.loading import lacking_note
from surgery.models.quantized import unquantized_name
from surgery.storage.hub_cache import check_names
from tests.architectures.specimens import save_specimen
from tests.helpers.models import load_base, model_inputs, output, relative_difference, save_model
from tests.helpers.stock_adapters import randomise


def _lora(base: Path, folder: Path, *targets: str) -> Path:
    model = get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=list(targets)))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_in_the_folder_of_a_base_is_left_alone(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    lora, other = _lora(base, tmp_path / "lora", "q_proj"), _lora(base, tmp_path / "other", "v_proj")
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(other, both, dirs_exist_ok=True)
    want = output(surgery.load(lora, base), model_inputs("llama"))
    loaded = surgery.load(lora, both)
    assert loaded.get_base_model().name_or_path == str(both)
    assert torch.equal(output(loaded, model_inputs("llama")), want)
    surgery.merge(lora, both, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter_*"))
    assert relative_difference(output(load_base(tmp_path / "merged"), model_inputs("llama")), want) < 1e-5


def test_weights_that_the_files_lack_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_model("llama", tmp_path / "base")
    lora = _lora(base, tmp_path / "lora", "q_proj")
    assert lacking_note(BaseModel.open(base)) == []
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert any("no weights for lm_head" in note for note in surgery.merge(lora, base, tmp_path / "merged").notes)
    surgery.load(lora, base)
    assert "no weights for lm_head" in caplog.text
    assert lacking_note(BaseModel.open(base), ["lm_head.weight"]) == []


def test_a_stale_index_is_not_copied(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    lora = _lora(base, tmp_path / "lora", "q_proj")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "gone.safetensors"}}))
    surgery.merge(lora, base, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("task", [None, "causal-lm"])
def test_the_text_part_of_a_composite_model_merges(tmp_path: Path, task: str | None) -> None:
    save_specimen("qwen3_5", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    base = BaseModel.open(tmp_path / "base", "causal-lm")
    assert base.is_text_part and type(base.model).__name__ == "Qwen3_5ForCausalLM"
    model = get_peft_model(
        type(base.model).from_pretrained(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"])
    )
    randomise(model)
    model.save_pretrained(tmp_path / "lora")
    surgery.merge(tmp_path / "lora", tmp_path / "base", tmp_path / "merged", task=task)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["architectures"] == config["architectures"]
    want = model.merge_and_unload().state_dict()
    found = type(base.model).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)


@pytest.mark.parametrize(
    ("name", "config", "found"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", {}, "unsloth/Llama-3.2-1B"),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", {}, "unsloth/Llama-3.2-1B"),
        ("models/mine", {"_name_or_path": "unsloth/mistral-7b-bnb-4bit"}, "unsloth/mistral-7b"),
        ("org/model-AWQ", {}, "org/model"),
        ("org/model", {}, None),
        ("/tmp/model-bnb-4bit", {}, None),
    ],
)
def test_the_original_of_a_quantised_copy(name: str, config: dict[str, str], found: str | None) -> None:
    assert unquantized_name(name, config) == found


def test_ids_without_an_organisation() -> None:
    check_names("gpt2", "bert-base-uncased", "t5-small@main")
    with pytest.raises(CheckpointError, match="no such folder"):
        check_names("gpt2-small")
