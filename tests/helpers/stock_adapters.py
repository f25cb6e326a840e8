"""Adapters of stock PEFT types with a value in every tensor, saved by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import surgery
from surgery.adapters.contents import contents_of
from tests.helpers.models import load_base


def randomise(model: PeftModel) -> None:
    """Give every tensor of the adapter a value of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def saved(folder: Path, config: peft.PeftConfig, out: Path) -> PeftModel:
    """A PEFT adapter with values, saved by PEFT."""
    model = get_peft_model(load_base(folder), config)
    randomise(model)
    model.save_pretrained(out)
    return model


TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "dense"]}
OTHERS: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=2, alpha=3, rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 5}),
    "loha full": peft.LoHaConfig(r=8),
    "lokr": peft.LoKrConfig(r=2, alpha=3, alpha_pattern={"k_proj": 5}, rank_pattern={"down_proj": 3}),
    "lokr whole": peft.LoKrConfig(r=32, alpha=3),
    "lokr both": peft.LoKrConfig(r=1, decompose_both=True),
    "lokr factor": peft.LoKrConfig(r=1, decompose_factor=2, decompose_both=True),
    "hira": peft.HiraConfig(r=3, rank_pattern={"k_proj": 2}),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=7),
    "randlora even": peft.RandLoraConfig(r=4, randlora_alpha=7, sparse=True),
}
FILE = "adapter_model.safetensors"


def change(layer: Any) -> torch.Tensor:
    """What PEFT adds to a layer's weight, `(out, in)`, found by merging: the reference for every type."""
    base = layer.get_base_layer()
    before = base.weight.detach().clone().double()
    base.weight.data = before.clone()
    for parameter in layer.parameters():
        parameter.data = parameter.data.double()
    for name in ("randlora_A", "randlora_B"):
        if hasattr(layer, name):
            buffers = getattr(layer, name)._buffers
            buffers["default"] = buffers["default"].double()
    layer.merge()
    result = base.weight.detach() - before
    return result.T if type(base).__name__ == "Conv1D" else result


def check_all(base: Path, folder: Path) -> None:
    """Every layer's change from the file, against PEFT's merge of the opened adapter in double precision.

    Opened, not as trained: PEFT sorts the patterns when it saves them, which can change the first that matches.
    """
    model = PeftModel.from_pretrained(load_base(base), folder)
    adapter = surgery.Adapter.open(folder)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers and contents_of(adapter).modules == sorted(layers)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().clone()
        delta = adapter.delta(name, weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight)
        expected = change(layer)
        size = float(expected.abs().max())
        assert size > 1e-3
        assert delta.shape == tuple(expected.shape)
        assert float((delta.dense().double() - expected).abs().max()) < 2e-6 * max(size, 1), name
        # A control: another layer's change is not this one's.
        assert float((delta.dense().double() * 1.01 - expected).abs().max()) > 2e-6 * max(size, 1)


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "rank pattern": {"rank_pattern": {"k_proj": 2, "query": 3, "c_attn": 6}},
    "alpha pattern": {"alpha_pattern": {r"(layers|h|layer)\.1\..*": 5, "q_proj": 7}},
    "first pattern wins": {"alpha_pattern": {"proj": 2, "q_proj": 7, ".*": 5}},
    "both": {"rank_pattern": {"^.*1.*$": 2}, "alpha_pattern": {"^.*1.*$": 9}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
REFUSED: dict[str, tuple[peft.PeftConfig, str, str]] = {
    "alora": (
        peft.LoraConfig(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "q_proj",
        "aLoRA.*invocation",
    ),
    "bdlora": (
        peft.LoraConfig(use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        "q_proj",
        "BD-LoRA",
    ),
    "kasa": (peft.LoraConfig(kasa_config=peft.KasaConfig()), "q_proj", "KaSA"),
    "pissa": (peft.LoraConfig(init_lora_weights="pissa"), "q_proj", "path_initial_model_for_weight_conversion"),
    "pissa fast": (peft.LoraConfig(init_lora_weights="pissa_niter_2"), "q_proj", "pissa_niter_2.*base weight"),
    "olora": (peft.LoraConfig(init_lora_weights="olora"), "q_proj", "path_initial_model_for_weight_conversion"),
    "oft": (peft.OFTConfig(oft_block_size=4), "q_proj", "OFT.*rotation.*merge_and_unload"),
}
