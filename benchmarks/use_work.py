"""Adapters in use, and merges, to be measured; each function runs in a process of its own, see workers.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.process import Measured, measured

__all__ = ["forward_pass", "loaded", "merge", "peft_merge", "stack_step", "started", "training_step"]

WARM_UP, STEPS = 2, 8


def started(model: str, form: str, out: str, device: str, rank: int = 8) -> Measured:
    """An adapter at its start, saved: of one of our methods, or `lora`, or `peft-frod` of stock PEFT."""
    import peft
    import transformers

    import surgery

    def work() -> None:
        if form not in {"lora", "peft-frod"}:
            ranked = {"rank": rank} if form not in {"frod"} else {}
            surgery.init(model, form, out, device=device, **ranked)
            return
        config = (
            peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            if form == "lora"
            else peft.FrodConfig(target_modules="all-linear", task_type="CAUSAL_LM", progressbar=False)
        )
        peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(model), config).save_pretrained(out)

    return measured(work, device)


def loaded(model: str, adapter: str, device: str) -> Measured:
    """`PeftModel.from_pretrained` on a base model that is in memory; the memory is that of the adapter alone."""
    base = _base(model, device)

    def work() -> None:
        _opened(base, adapter)

    return measured(work, device)


def training_step(model: str, adapter: str, device: str, samples: int, tokens: int) -> Measured:
    """One step of AdamW on random tokens, the median of several after the first ones."""
    import torch

    opened = _opened(_base(model, device), adapter, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in opened.parameters() if p.requires_grad], lr=1e-4)
    ids = _ids(opened, samples, tokens)

    def step() -> None:
        opened(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _repeated(step, device)


def stack_step(form: str, layers: int, size: int, rank: int, tokens: int, device: str) -> Measured:
    """Forward and backward pass of a stack of linears with an adapter, `lora` or `smoa`, the median of several."""
    import peft
    import torch

    from surgery.methods.smoa import SmoaConfig

    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(layers))).to(device)
    names = [str(number) for number in range(layers)]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": names}
    model = peft.get_peft_model(stack, (peft.LoraConfig if form == "lora" else SmoaConfig)(**settings))
    x = torch.randn(tokens, size, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    return _repeated(step, device)


def forward_pass(model: str, adapter: str | None, device: str, samples: int, tokens: int) -> Measured:
    """One pass without gradients, the median of several; without an adapter, the base model's."""
    import torch

    base = _base(model, device)
    opened = base if adapter is None else _opened(base, adapter)
    opened.eval()
    ids = _ids(opened, samples, tokens)

    def step() -> None:
        with torch.no_grad():
            opened(input_ids=ids)

    return _repeated(step, device)


def merge(model: str, adapter: str, out: str, device: str) -> Measured:
    """`surgery.merge`, from folders to verified folder."""
    import surgery

    def work() -> None:
        surgery.merge(adapter, model, out)

    return measured(work, device)


def peft_merge(model: str, adapter: str, out: str, device: str) -> Measured:
    """PEFT's `merge_and_unload` and `save_pretrained`, the model loaded in the dtype of its files."""
    import peft
    import transformers

    def work() -> None:
        base = transformers.LlamaForCausalLM.from_pretrained(model, dtype="auto").to(device)
        peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)

    return measured(work, device)


def _base(model: str, device: str) -> Any:
    """The model in memory, of the class that its configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(Path(model))
    return getattr(transformers, config.architectures[0]).from_pretrained(Path(model)).to(device)


def _opened(base: Any, adapter: str, **options: Any) -> Any:
    import peft

    import surgery

    assert surgery.__version__  # our types are known to PEFT once surgery is imported
    return peft.PeftModel.from_pretrained(base, adapter, **options)


def _ids(model: Any, samples: int, tokens: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (samples, tokens), generator=generator).to(model.device)


def _repeated(step: Callable[[], None], device: str) -> Measured:
    """The median time of several steps; memory is the peak of all."""
    import statistics

    import torch

    taken: list[float] = []

    def work() -> None:
        for _ in range(WARM_UP + STEPS):
            begun = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begun)

    return {**measured(work, device), "seconds": statistics.median(taken[WARM_UP:])}
