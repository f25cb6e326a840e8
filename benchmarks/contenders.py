"""The ways of adapting a model that are compared: what each trains, and the rate that its sweep starts from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import surgery
from benchmarks.adapted_tasks import Task

__all__ = ["CONTENDERS", "Contender"]

WARM_UP_STEPS = 30


@dataclass(frozen=True)
class Contender:
    """One way of adapting.

    Attributes:
        title: for people.
        rate: the middle of the learning rates tried: the published one, or the best known from earlier sweeps.
        prepare: gives the model with what trains set free, from a task and a seed.
    """

    title: str
    rate: float
    prepare: Callable[[Task, int], Any]


def trained_bytes(model: Any) -> int:
    """Size of the file that `save_pretrained` writes for an adapter, or of the parameters that train."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size
        path = Path(folder) / "trained.safetensors"
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, path)
        return path.stat().st_size


def _full(task: Task, seed: int) -> Any:
    return task.model(seed)


def _head(task: Task, seed: int) -> Any:
    model = task.model(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{task.head}."))
    return model


def _lora(rank: int) -> Callable[[Task, int], Any]:
    def prepare(task: Task, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        # The layers that `surgery init` adapts by default, so that all adapters have the same.
        planned, _ = surgery.init(task.base(seed), "vera", task=task.kind, dry_run=True)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=planned.config["target_modules"],
            modules_to_save=[task.head] if task.carried else None,
        )
        return get_peft_model(task.model(seed), config)

    return prepare


def _ours(method: str, **options: Any) -> Callable[[Task, int], Any]:
    def prepare(task: Task, seed: int) -> Any:
        data = {"data": [task.gradient_batch(seed)]} if method == "giva" else {}
        adapter, _ = surgery.init(task.base(seed), method, task=task.kind, seed=seed, **options, **data)
        return surgery.trainable(adapter, task.base(seed), task=task.kind)

    return prepare


def _giva_after_warm_up(rank: int) -> Callable[[Task, int], Any]:
    """GiVA from the gradient at a head that is trained a little, instead of a random one."""

    def prepare(task: Task, seed: int) -> Any:
        warm = _head(task, seed).train()
        parameters = [p for p in warm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _, batch in zip(range(WARM_UP_STEPS), task.batches(seed), strict=False):
            warm(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            warm.save_pretrained(folder)
            adapter, _ = surgery.init(
                folder, "giva", task=task.kind, seed=seed, rank=rank, data=[task.gradient_batch(seed)]
            )
            return surgery.trainable(adapter, folder, task=task.kind)

    return prepare


CONTENDERS: dict[str, Contender] = {
    "head": Contender("head only", 5e-2, _head),
    "full": Contender("full fine-tuning", 3e-4, _full),
    "lora-1": Contender("LoRA, r = 1", 2e-3, _lora(1)),
    "lora-8": Contender("LoRA, r = 8", 1e-3, _lora(8)),
    "lora-16": Contender("LoRA, r = 16", 1e-3, _lora(16)),
    "vera-64": Contender("VeRA, r = 64", 1e-2, _ours("vera", rank=64)),
    "vera-256": Contender("VeRA, r = 256", 1e-2, _ours("vera", rank=256)),
    "giva-8": Contender("GiVA, r = 8", 1e-2, _ours("giva", rank=8)),
    "giva-32": Contender("GiVA, r = 32", 1e-2, _ours("giva", rank=32)),
    "inilora-8": Contender("IniLoRA, r = 8", 2e-3, _ours("inilora", rank=8)),
    "inilora-alpha-8": Contender("IniLoRA-alpha, r = 8", 1e-3, _ours("inilora-alpha", rank=8)),
    "inilora-beta-8": Contender("IniLoRA-beta, r = 8", 1e-3, _ours("inilora-beta", rank=8)),
    "frod": Contender("FRoD, 1 % of S", 5e-3, _ours("frod")),
    "smoa-8": Contender("SMoA components, r = 8", 8e-3, _ours("smoa", rank=8, variant="components")),
    "smoa-blocks-8": Contender("SMoA, r = 8", 1e-3, _ours("smoa", rank=8)),
    "smoa-blocks-16": Contender("SMoA, r = 16", 1e-3, _ours("smoa", rank=16)),
    "giva-8-warm": Contender("GiVA, r = 8, head warmed up", 1e-2, _giva_after_warm_up(8)),
}
