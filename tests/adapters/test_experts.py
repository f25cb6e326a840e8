"""LoRA on fused experts (`target_parameters`) in every verb, against stock PEFT and dense arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.adapters.experts import experts_apart, experts_joined
from surgery.errors import AdapterError, OptionError
from tests.helpers.expert_cases import BOTH, made_on_experts
from tests.helpers.kinds import base_of, trained, verbs
from tests.helpers.models import edit_tensors, load_base

FILE = "adapter_model.safetensors"
# Base, target modules, target parameters, further settings.
KINDS: dict[str, tuple[str, list[str], list[str], dict[str, Any]]] = {
    "both parameters and attention": ("qwen_moe", ["q_proj"], BOTH, {}),
    "one parameter alone": ("qwen_moe", [], BOTH[1:], {"use_rslora": True}),
    "ranks and scales by pattern": (
        "qwen_moe", ["v_proj"], BOTH, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    ),
    "in, out": ("gpt_oss", ["q_proj"], BOTH, {}),
    "stacked from the files": ("mixtral", ["embed_tokens"], BOTH, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_as_stock_peft_has_it(name: str, tmp_path: Path) -> None:
    kind, modules, parameters, settings = KINDS[name]
    base = base_of(kind, tmp_path / "base")
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, **settings}, target_modules=modules, target_parameters=parameters
    )
    trained(base, tmp_path / "made", config, 0.3)
    found = dict(verbs(kind, base, tmp_path / "made", tmp_path, ("lora", "giva")))
    assert max(found.values()) < 1e-4 and max(found["merge"], found["load"]) < 2e-5, found
    assert surgery.compare(tmp_path / "made", tmp_path / "giva", base=base).weight_error < 1e-5
    old, new = load_file(tmp_path / "made" / FILE), load_file(tmp_path / "lora" / FILE)
    factors = {name for name in old if ".lora_" in name}
    assert factors == {name for name in new if ".lora_" in name}
    if "rank_pattern" not in settings:
        assert {name: old[name].shape for name in factors} == {name: new[name].shape for name in factors}
    surgery.convert(tmp_path / "made", "lora", tmp_path / "each", base=base, energy=0.5, per_layer_ranks=True)
    each = surgery.compare(tmp_path / "made", tmp_path / "each", base=base).weight_error
    assert 0 < each < 0.8
    peft.PeftModel.from_pretrained(load_base(base), tmp_path / "each")


@pytest.mark.filterwarnings("ignore")
def test_each_expert_is_a_layer(tmp_path: Path) -> None:
    _, made = made_on_experts(tmp_path)
    stored, adapter = load_file(made / FILE), surgery.Adapter.open(made)
    module = "model.layers.1.mlp.experts"
    A = stored[f"base_model.model.{module}.base_layer.lora_A.weight"].double().reshape(4, 3, 32)
    B = stored[f"base_model.model.{module}.base_layer.lora_B.weight"].double().reshape(24, 3, 4)
    for expert in range(4):
        want = 2 * B[..., expert] @ A[expert]
        found = adapter.delta(f"{module}.gate_up_proj.{expert}").dense().double()
        assert torch.allclose(found, want, atol=1e-6)
    assert any("assumed" in note for note in adapter.notes)
    assert surgery.push(made, "org/name", dry_run=True, base_model="org/base").dry_run
    joined = adapter.file_tensors()
    assert joined.keys() == stored.keys() and all(torch.equal(joined[name], stored[name]) for name in stored)


@pytest.mark.filterwarnings("ignore")
def test_layouts_of_older_tools(tmp_path: Path) -> None:
    """PEFT 0.18: in and out the other way round, which shapes tell; older Unsloth: experts slowest in B."""
    base, made = made_on_experts(tmp_path)
    surgery.merge(made, base, tmp_path / "right")
    want = load_file(tmp_path / "right" / "model.safetensors")

    def swapped(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            A, B = tensors[name].reshape(4, 3, -1), tensors[other].reshape(-1, 3, 4)
            tensors[name] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
            tensors[other] = A.permute(2, 1, 0).flatten(1).contiguous()

    def slowest(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name and "lora_B" in name]:
            tensors[name] = tensors[name].reshape(-1, 3, 4).transpose(1, 2).flatten(1).contiguous()

    edit_tensors(made, swapped, FILE)
    surgery.merge(made, base, tmp_path / "swapped")
    found = load_file(tmp_path / "swapped" / "model.safetensors")
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)
    loaded = surgery.load(made, load_base(base)).merge_and_unload().state_dict()
    right = load_base(tmp_path / "right").state_dict()
    assert all(torch.allclose(loaded[name], right[name], atol=1e-5) for name in right)
    edit_tensors(made, swapped, FILE)
    edit_tensors(made, slowest, FILE)
    opened = surgery.Adapter.open(made, layout="unsloth")
    assert not any("assumed" in note for note in opened.notes)
    surgery.merge(opened, base, tmp_path / "slowest")
    found = load_file(tmp_path / "slowest" / "model.safetensors")
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)
    loaded = surgery.load(opened, load_base(base)).merge_and_unload().state_dict()
    assert all(torch.allclose(loaded[name], right[name], atol=1e-5) for name in right)
    surgery.merge(made, base, tmp_path / "by option", layout="unsloth")
    assert load_file(tmp_path / "by option" / "model.safetensors").keys() == want.keys()
    surgery.convert(made, "lora", tmp_path / "plain", base=base, layout="unsloth", energy=1.0, dtype="float32")
    surgery.merge(tmp_path / "plain", base, tmp_path / "from plain")
    for folder in ("by option", "from plain"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.allclose(found[name], want[name], atol=1e-5) for name in want)
    with pytest.raises(OptionError, match="unknown layout 'other': use peft, unsloth"):
        surgery.Adapter.open(made, layout="other")


@pytest.mark.filterwarnings("ignore")
def test_broken_files_are_named(tmp_path: Path) -> None:
    _, made = made_on_experts(tmp_path)
    tensors, config = load_file(made / FILE), surgery.Adapter.open(made).config
    name = "base_model.model.model.layers.0.mlp.experts"
    for key in (f"{name}.lora_B.weight", f"{name}.base_layer.lora_A.weight"):
        less = {other: tensor for other, tensor in tensors.items() if other != key}
        with pytest.raises(AdapterError, match=r"lacks lora_B|has 1 LoRAs on parameters of model.layers.0.mlp.experts"):
            experts_apart(config, less, "made")
    with pytest.raises(AdapterError, match="are not those of experts of rank 5"):
        experts_apart({**config, "r": 5}, tensors, "made")
    apart, _ = experts_apart(config, tensors, "made")
    del apart[f"{name}.down_proj.2.lora_A.weight"]
    with pytest.raises(AdapterError, match="experts are missing"):
        experts_joined(config, apart)
