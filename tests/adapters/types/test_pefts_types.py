"""Types of PEFT that are read by a formula of ours, each against PEFT's own merge and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import surgery
from surgery.adapters.types.base import TensorType
from surgery.adapters.types.registry import ADAPTER_TYPES
from surgery.errors import AdapterError
from tests.adapters.test_stock_types import OTHERS
from tests.helpers.models import load_base, model_inputs, output
from tests.helpers.stock_adapters import saved

NAMES = ["q_proj", "k_proj", "down_proj"]


def ia3(targets: list[str], feedforward: list[str]) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def randlora(**settings: Any) -> peft.PeftConfig:
    return peft.RandLoraConfig(save_projection=False, target_modules=NAMES, **settings)


# A base model, the adapter's configuration, and whether a LoRA holds it.
KINDS: dict[str, tuple[str, Any, bool]] = {
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=NAMES), True),
    "ia3": ("llama", lambda: ia3(NAMES, ["down_proj"]), False),
    "ia3 with biases": ("bert", lambda: ia3(["key", "value"], []), False),
    "ia3 of Conv1D": ("gpt2", lambda: ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), False),
    "randlora drawn again": ("llama", lambda: randlora(r=4), True),
    "sparse randlora": ("llama", lambda: randlora(r=5, sparse=True), True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_merged_loaded_and_converted_as_peft_has_it(name: str, model_folder, tmp_path: Path) -> None:
    kind, config, thin = KINDS[name]
    folder = model_folder(kind)
    model = saved(folder, config(), tmp_path / "made").eval()
    inputs = model_inputs(kind)
    with torch.no_grad():
        bare, want = output(load_base(folder), inputs), output(model, inputs)
        surgery.merge(tmp_path / "made", folder, tmp_path / "merged")
        merged = output(load_base(tmp_path / "merged"), inputs)
        loaded = output(surgery.load(tmp_path / "made", load_base(folder)).eval(), inputs)
    effect = (want - bare).norm()
    assert effect > 1e-2 and (merged - want).norm() <= 1e-5 * effect and (loaded - want).norm() <= 1e-5 * effect
    assert surgery.compare(tmp_path / "made", tmp_path / "made", base=folder).weight_error == 0
    if thin:
        surgery.convert(tmp_path / "made", "lora", tmp_path / "lora", base=folder, energy=1.0)
        with torch.no_grad():
            converted = output(surgery.load(tmp_path / "lora", load_base(folder)).eval(), inputs)
        assert (converted - want).norm() <= 1e-4 * effect


def test_adalora_pruned_to_nothing_in_a_layer(llama: Path, tmp_path: Path) -> None:
    """As PEFT saves it after `update_and_allocate`: ranks by a pattern of switches."""
    saved(llama, KINDS["adalora"][1](), tmp_path)
    adapter = surgery.Adapter.open(tmp_path)
    kept = {"model.layers.0.self_attn.q_proj": [0, 2], "model.layers.1.self_attn.q_proj": []}
    whole = {module: adapter.delta(module).dense() for module in kept}
    for module, ranks in kept.items():
        for short in ("lora_A", "lora_E", "lora_B"):
            name = f"base_model.model.{module}.{short}"
            tensor = adapter.tensors[name]
            adapter.tensors[name] = tensor[:, ranks].clone() if short == "lora_B" else tensor[ranks].clone()
    adapter.config["rank_pattern"] = {f"{m}.lora_E": [i in ranks for i in range(4)] for m, ranks in kept.items()}
    adapter.save(tmp_path / "pruned")
    pruned = surgery.Adapter.open(tmp_path / "pruned")
    for module, ranks in kept.items():
        B, A = (adapter.tensors[f"base_model.model.{module}.{short}"].double() for short in ("lora_B", "lora_A"))
        E = adapter.tensors[f"base_model.model.{module}.lora_E"].double()
        want = B @ (A * E) * 6 / (4 + 1e-5)
        assert torch.allclose(pruned.delta(module).dense().double(), want, atol=1e-7) and whole[module].norm() > 0
        assert len(ranks) or not pruned.delta(module).dense().any()


def test_ia3_needs_its_base(llama: Path, tmp_path: Path) -> None:
    saved(llama, KINDS["ia3"][1](), tmp_path)
    with pytest.raises(AdapterError, match="IA3 adapter depends on its base model: give it with --base"):
        surgery.convert(tmp_path, "lora", rank=2)
    with pytest.raises(AdapterError, match="multiple of the base weight"):
        surgery.Adapter.open(tmp_path).delta("model.layers.0.self_attn.q_proj")


def test_every_type_of_the_table_is_tested() -> None:
    read = {kind.peft_type for kind in ADAPTER_TYPES if isinstance(kind, TensorType)}
    configs = [*OTHERS.values(), *(config() for _, config, _ in KINDS.values())]
    tested = {config.peft_type.value for config in configs}
    assert read == {"LORA", *tested}
