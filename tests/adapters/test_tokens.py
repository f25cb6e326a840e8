"""Single tokens trained beside a LoRA: their rows are exact in every verb, tied heads and grown vocabularies too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError
from tests.helpers.kinds import trained, verbs
from tests.helpers.models import VOCAB, edit_tensors, llama_config, load_base

FILE = "adapter_model.safetensors"


def base_of(folder: Path, grown: int = 0, **settings: Any) -> Path:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(llama_config(**settings))
    if grown:
        model.resize_token_embeddings(VOCAB + grown)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[5, 3], {"embed_tokens": [3, 17, 60]}], ids=["list", "by name"])
def test_as_stock_peft_has_it(tokens: Any, tied: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens)
    trained(base, tmp_path / "made", config, 0.3)
    found = dict(verbs("llama", base, tmp_path / "made", tmp_path, ("lora", "giva")))
    assert max(found.values()) < 1e-4 and max(found["merge"], found["load"]) < 1e-5, found
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = load_file(tmp_path / "made" / FILE)[name]
    indices = tokens if isinstance(tokens, list) else tokens["embed_tokens"]
    assert torch.equal(load_base(tmp_path / "merged").get_input_embeddings().weight[indices], rows)
    giva = json.loads((tmp_path / "giva" / "adapter_config.json").read_text())
    assert giva["format_version"] == 3 and giva["trainable_token_indices"] == tokens
    same = surgery.compare(tmp_path / "made", tmp_path / "giva", base=base)
    assert [entry.state for entry in same.carried] == ["equal"] * (2 if tied else 1)
    assert any("token_adapter" in each for each in surgery.inspect(tmp_path / "made").carried)
    with pytest.raises(AdapterError, match=r"trains single tokens .* which vera does not hold"):
        surgery.convert(tmp_path / "made", "vera", rank=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_are_exact(tied: bool, tmp_path: Path) -> None:
    """PEFT saves the grown embedding and head, too; the base is resized first, as PEFT itself wants it."""
    base = base_of(tmp_path / "base", tie_word_embeddings=tied)
    grown = base_of(tmp_path / "grown", 3, tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[VOCAB, VOCAB + 2])
    trained(grown, tmp_path / "made", config)
    with pytest.raises(AdapterError, match=r"resize_token_embeddings\(6[34]\)"):
        surgery.merge(tmp_path / "made", base, tmp_path / "no")
    found = dict(verbs("llama", grown, tmp_path / "made", tmp_path, ("lora", "giva")))
    assert max(found.values()) < 1e-4, found
    rows = next(t for n, t in load_file(tmp_path / "made" / FILE).items() if n.endswith("trainable_tokens_delta"))
    merged = load_base(tmp_path / "merged")
    assert torch.equal(merged.get_input_embeddings().weight[[VOCAB, VOCAB + 2]], rows)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    trained(base, tmp_path / "made", config, 0.3)
    path = tmp_path / "made" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for tokens, message in (([3], "names 1 tokens"), ([3, 3], "no usable"), ([3, -1], "no usable"), ("3", "no usable")):
        path.write_text(json.dumps({**settings, "trainable_token_indices": tokens}))
        with pytest.raises(AdapterError, match=message):
            surgery.merge(tmp_path / "made", base, tmp_path / "merged")
    path.write_text(json.dumps({**settings, "trainable_token_indices": [3, VOCAB]}))
    with pytest.raises(AdapterError, match=f"trains token {VOCAB} of model.embed_tokens, the base has {VOCAB}"):
        surgery.merge(tmp_path / "made", base, tmp_path / "merged")
    path.write_text(json.dumps(settings))

    def broken(tensors: dict[str, torch.Tensor]) -> None:
        next(t for n, t in tensors.items() if "token_adapter" in n)[0, 0] = float("nan")

    edit_tensors(tmp_path / "made", broken, FILE)
    with pytest.raises(AdapterError, match="trainable_tokens_delta holds NaN"):
        surgery.merge(tmp_path / "made", base, tmp_path / "merged")
