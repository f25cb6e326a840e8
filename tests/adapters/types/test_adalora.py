"""AdaLoRA that was pruned to nothing in a layer."""

from __future__ import annotations

from pathlib import Path

import torch

import surgery
from tests.helpers.peft_kinds import KINDS
from tests.helpers.stock_adapters import saved


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
