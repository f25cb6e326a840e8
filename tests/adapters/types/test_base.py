"""Every stock type: its change is PEFT's, in every dtype, and broken files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.adapters.contents import contents_of
from surgery.errors import AdapterError
from tests.helpers.models import edit_tensors
from tests.helpers.stock_adapters import FILE, OTHERS, TARGETS, check_all, saved


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_stock_types(name: str, kind: str, model_folder, tmp_path: Path) -> None:
    if kind == "gpt2" and name.startswith("lo"):
        pytest.skip("PEFT adapts no Conv1D with LoHa and LoKr")
    config = type(OTHERS[name])(**{**OTHERS[name].to_dict(), "target_modules": TARGETS[kind]})
    saved(model_folder(kind), config, tmp_path)
    check_all(model_folder(kind), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_they_are(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]), tmp_path)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(tmp_path, halve, FILE)
    tensors = load_file(tmp_path / FILE)
    name = "model.layers.0.self_attn.q_proj"
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    torch.testing.assert_close(surgery.Adapter.open(tmp_path).delta(name).dense().double(), B @ A, atol=1e-6, rtol=0)


def test_what_is_carried_is_listed(model_folder, tmp_path: Path) -> None:
    folder = model_folder("bert")
    saved(folder, peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only"), tmp_path / "only")
    saved(folder, peft.LoraConfig(r=2, target_modules=["query"], bias="all"), tmp_path / "all")
    saved(model_folder("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "head")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    saved(model_folder("llama"), config, tmp_path / "embedding")
    carried = {name: contents_of(surgery.Adapter.open(tmp_path / name)).carried for name in ("only", "all", "head")}
    query = [f"encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 1)]
    assert sorted(carried["only"]) == query
    assert carried["only"][query[0]] == f"base_model.model.{query[0].replace('.bias', '.base_layer.bias')}"
    assert set(query) < set(carried["all"]) and "embeddings.LayerNorm.bias" in carried["all"]
    assert carried["head"] == {"lm_head.weight": "base_model.model.lm_head.base_layer.weight"}
    embedding = contents_of(surgery.Adapter.open(tmp_path / "embedding"))
    assert list(embedding.carried) == ["model.embed_tokens.weight"]
    assert embedding.modules == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


MODULE = "model.layers.1.self_attn.q_proj"
A, B = (f"base_model.model.{MODULE}.lora_{letter}.weight" for letter in "AB")
BROKEN: dict[str, tuple[Any, str]] = {
    "unpaired": (lambda t: t.pop(A), rf"the file lacks lora_A.weight of {MODULE}, which PEFT would draw at random"),
    "nan": (lambda t: t[A].__setitem__((0, 0), float("nan")), rf"{MODULE}.lora_A.weight holds NaN"),
    "inf": (lambda t: t[B].__setitem__((0, 0), float("inf")), rf"{MODULE}.lora_B.weight holds NaN or Inf"),
    "integers": (lambda t: t.update({A: t[A].to(torch.int8)}), rf"{MODULE}.lora_A.weight is torch.int8"),
    "ranks": (lambda t: t.update({A: t[A][:3].clone()}), rf"{MODULE}: lora_A \(3, 32\) and lora_B \(32, 8\)"),
    "other rank": (
        lambda t: t.update({A: t[A][:3].clone(), B: t[B][:, :3].clone()}),
        rf"{MODULE}: its factors have rank 3, adapter_config.json says 8",
    ),
    "vector": (lambda t: t.update({A: t[A][0].clone()}), rf"{MODULE}: is no matrix"),
    "unknown part": (lambda t: t.update({A.replace("lora_A", "lora_C"): t[A].clone()}), "lora_C is not known"),
    "above": (lambda t: t.update({"base_model.lora_A": t[A].clone()}), "has the tensor base_model.lora_A"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    contents_of(surgery.Adapter.open(tmp_path))  # whole, it is read
    edit_tensors(tmp_path, BROKEN[name][0], FILE)
    with pytest.raises(AdapterError, match=BROKEN[name][1]) as error:
        contents_of(surgery.Adapter.open(tmp_path))
    assert "\n" not in str(error.value)
