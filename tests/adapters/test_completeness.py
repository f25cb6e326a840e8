"""Files that lack a part of what their configuration says: refused by name, or noted where PEFT opens them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import surgery
from surgery.adapters.adapter import Adapter
from surgery.adapters.lacking import lacking_in
from surgery.errors import AdapterError
from tests.helpers.models import edit_tensors, load_base, model_inputs, output, relative_difference, save_model
from tests.helpers.stock_adapters import randomise

MODULE = "model.layers.2.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base") / "llama")


def _made(base: Path, folder: Path, edit: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(load_base(base), peft.LoraConfig(**settings))
    randomise(model)
    model.save_pretrained(folder)
    if edit is not None:
        edit_tensors(folder, edit, "adapter_model.safetensors")
    return folder


def _drop(words: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if words in name]:
            del tensors[name]

    return edit


@pytest.mark.parametrize("words", ["layers.2", "v_proj", f"{MODULE}.lora_B"])
def test_what_peft_leaves_alone_is_noted_by_every_verb(base: Path, tmp_path: Path, words: str) -> None:
    lora = _made(base, tmp_path / "lora", _drop(words))
    named = r"layers\.2|v_proj"
    merged = surgery.merge(lora, base, tmp_path / "merged")
    _, converted = surgery.convert(lora, to="giva", energy=1.0, bits=32, out=tmp_path / "giva")
    pushed = surgery.push(lora, "a/b", base_model="o/b", dry_run=True)
    for report in (surgery.inspect(lora), merged, converted, pushed):
        assert any("lacks" in note and re.search(named, note) for note in report.notes), report.notes
    want = output(PeftModel.from_pretrained(load_base(base), lora).eval(), model_inputs("llama"))
    for found in (surgery.load(lora, base), PeftModel.from_pretrained(load_base(base), tmp_path / "giva")):
        assert relative_difference(output(found.eval(), model_inputs("llama")), want) < 1e-5
    assert relative_difference(output(load_base(tmp_path / "merged"), model_inputs("llama")), want) < 1e-5


def test_a_whole_file_lacks_nothing(base: Path, tmp_path: Path) -> None:
    lora = _made(base, tmp_path / "lora", modules_to_save=["lm_head"], layers_to_transform=[0, 2])
    assert lacking_in(Adapter.open(lora)).notes == [] == Adapter.open(lora).notes


REFUSED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "placeholder": (lambda t: t.update({name: torch.zeros(0) for name in t}), {}, "q_proj.* has size 0: a placeholder"),
    "saved module": (_drop("lm_head"), {"modules_to_save": ["lm_head"]}, "lists lm_head in modules_to_save"),
    "A": (_drop(f"{MODULE}.lora_A"), {}, f"lacks lora_A.weight of {MODULE}"),
    "random start": (_drop("layers.2"), {"init_lora_weights": False}, r"lacks 2 of the layers .*layers\.2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_is_refused(base: Path, tmp_path: Path, kind: str) -> None:
    edit, config, message = REFUSED[kind]
    lora = _made(base, tmp_path / "lora", edit, **config)
    for verb in (
        surgery.inspect,
        lambda one: surgery.load(one, base),
        lambda one: surgery.merge(one, base, tmp_path / "m"),
    ):
        with pytest.raises(AdapterError, match=message):
            verb(lora)


def test_missing_biases_are_noted(tmp_path: Path) -> None:
    base = save_model("bert", tmp_path / "bert")
    model = get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only"))
    model.save_pretrained(tmp_path / "lora")
    assert Adapter.open(tmp_path / "lora").notes + lacking_in(Adapter.open(tmp_path / "lora")).notes == []
    edit_tensors(tmp_path / "lora", _drop("layer.1.attention.self.query.b"), "adapter_model.safetensors")
    (note,) = lacking_in(Adapter.open(tmp_path / "lora")).notes
    assert "lacks 1 biases" in note and "layer.1.attention.self.query" in note


def test_a_shard_is_noted_without_the_base(base: Path, tmp_path: Path) -> None:
    name = f"base_model.model.{MODULE}.lora_B.weight"
    lora = _made(base, tmp_path / "lora", lambda t: t.update({name: t[name][:16].clone()}))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    (note,) = lacking_in(Adapter.open(lora)).notes
    assert note.startswith(f"{MODULE}: its factors make 16 x 32, the layer has the shape 32 x 32")
    shutil.rmtree(lora)
