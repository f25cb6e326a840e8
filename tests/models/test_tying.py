"""Tied weights: which are one tensor, and what becomes of them once one changes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.errors import CheckpointError
from tests.helpers.merges import check_merged, outputs, tied_llama, trained
from tests.helpers.models import (
    edit_tensors,
    load_base,
    relative_difference,
)


class TestTiedWeights:
    """An adapter that changes one of two tied weights makes them two."""

    def test_lora_on_a_tied_output_head(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        assert "lm_head.weight" not in load_file(base / "model.safetensors")
        config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        assert any("tie_word_embeddings" in note for note in report.notes) and report.added == ["lm_head.weight"]
        # PEFT's own merge would change the embedding with the head; the adapter on the model does not.
        live = PeftModel.from_pretrained(load_base(base), adapter)
        merged = load_base(tmp_path / "merged")
        assert not merged.config.tie_word_embeddings
        assert relative_difference(outputs(merged), outputs(live)) < 2e-5
        assert torch.equal(merged.model.embed_tokens.weight, load_base(base).model.embed_tokens.weight)
        assert relative_difference(outputs(load_base(base)), outputs(live)) > 0.1

    @pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    def test_a_tied_weight_that_is_replaced(self, modules: list[str], tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
        adapter = trained(load_base(base), config, tmp_path / "lora")
        surgery.merge(adapter, base, tmp_path / "merged")
        live = PeftModel.from_pretrained(load_base(base), adapter)
        assert relative_difference(outputs(load_base(tmp_path / "merged")), outputs(live)) < 2e-5

    def test_equal_replacements_stay_tied(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
        edit_tensors(adapter, lambda t: t.update({head: t[embedding].clone()}), "adapter_model.safetensors")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        merged = load_base(tmp_path / "merged")
        assert merged.config.tie_word_embeddings and not report.added
        live = PeftModel.from_pretrained(load_base(base), adapter)
        assert relative_difference(outputs(merged), outputs(live)) < 2e-5

    def test_an_untied_head_is_merged_as_any_layer(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base", tie=False)
        config = peft.LoraConfig(r=4, target_modules=["lm_head"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        assert not check_merged(adapter, base, "llama", tmp_path / "merged").added

    def test_a_model_that_computes_otherwise_once_untied_is_refused(self, model_folder, tmp_path: Path) -> None:
        base = model_folder("t5")
        adapter = trained(load_base(base), peft.LoraConfig(r=4, target_modules=["lm_head"]), tmp_path / "lora")
        with pytest.raises(CheckpointError, match=r"lm_head.weight.*only used as an adapter"):
            surgery.merge(adapter, base, tmp_path / "merged")
