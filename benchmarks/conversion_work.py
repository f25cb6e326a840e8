"""Conversions to be measured; each function runs in a process of its own, see workers.py."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import Measured, measured

__all__ = ["convert", "exported", "peft_exported", "trained_vera"]


def convert(adapter: str, to: str, device: str, out: str | None = None, **options: Any) -> Measured:
    """`surgery.convert`, from folder to verified folder, which goes again unless `out` says where it is kept."""
    import surgery

    with tempfile.TemporaryDirectory() as folder:

        def work() -> dict[str, Any]:
            _, report = surgery.convert(adapter, to, out or Path(folder) / "out", device=device, **options)
            return {
                "modules": report.modules,
                "file_bytes": report.bytes,
                "source_bytes": report.source_bytes,
                "weight_error": report.weight_error,
            }

        result = measured(work, device)
    return {**result, "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def trained_vera(model: str, out: str, rank: int, device: str) -> Measured:
    """A VeRA adapter with vectors as if it had been trained."""
    import torch

    import surgery

    def work() -> None:
        adapter, _ = surgery.init(model, "vera", None, rank=rank, device=device)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in adapter.tensors.items():
            if "lambda_b" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        adapter.save(out)

    return measured(work, device)


def exported(adapter: str, model: str, device: str) -> Measured:
    """Our factors of every layer, from an opened adapter; how far their product is from the change in float64."""
    import torch

    import surgery
    from surgery.adapters.source import Source
    from surgery.models.base_model import BaseModel

    base, opened = BaseModel.open(Path(model)), surgery.Adapter.open(adapter)
    found: dict[str, Any] = {}

    def work() -> dict[str, Any]:
        source = Source.open(opened, base, torch.device(device))
        found.update({change.module: (change.B, change.A) for change in source.changes()})
        return {"modules": len(found)}

    result = measured(work, device)
    return {**result, "error": _error(found, adapter, model)}


def peft_exported(adapter: str, model: str, rank: int, device: str) -> Measured:
    """PEFT's `convert_to_lora`, from a loaded model."""
    import peft
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base, adapter).to(device)
    states: dict[str, Any] = {}

    def work() -> None:
        _, state = peft.convert_to_lora(adapted, rank=rank)
        states.update(state)

    result = measured(work, device)
    found = {}
    for name, A in states.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = states[name.replace("lora_A", "lora_B")], A
    return {**result, "modules": len(found), "error": _error(found, adapter, model)}


def _error(factors: dict[str, Any], adapter: str, model: str) -> float:
    """The largest relative difference of a layer's `B A` from `diag(b) B diag(d) A`, by its definition in float64."""
    import peft
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(model)
    layers = dict(peft.PeftModel.from_pretrained(base, adapter).base_model.model.named_modules())
    worst = 0.0
    for module, (B, A) in factors.items():
        layer = layers[module]
        out_features, in_features = layer.get_base_layer().weight.shape
        b, d = layer.vera_lambda_b["default"].double(), layer.vera_lambda_d["default"].double()
        full_A, full_B = layer.vera_A["default"].double(), layer.vera_B["default"].double()
        wanted = (b[:, None] * full_B[:out_features]) @ (d[:, None] * full_A[:, :in_features])
        worst = max(worst, float((wanted - B.double() @ A.double()).norm() / wanted.norm()))
    return worst
