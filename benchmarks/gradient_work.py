"""The work behind GiVA, ours and what it is measured against, each to be run in a process of its own.

All three load the same model and run the same batch; loading is not part of what is measured.
"""

from __future__ import annotations

from typing import Any

from benchmarks.process import Measured, measured

__all__ = ["frozen_step", "giva_bases", "giva_energy", "plain_recipe"]

LABELS = 8


def giva_bases(**options: Any) -> Measured:
    """Our gradient pass, from the loaded model to every layer's singular vectors."""
    from surgery.passes.gradients import gradients

    rank = options.pop("rank")
    model, batch, sites, device = _prepared(**options)

    def work() -> dict[str, Any]:
        return {"modules": len(gradients(model, [batch], _loss, sites, rank).svds)}

    return measured(work, device)


def frozen_step(**options: Any) -> Measured:
    """One forward and backward pass with frozen weights: what training an adapter costs at least."""
    options.pop("rank")
    model, batch, _, device = _prepared(**options)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()

    def work() -> None:
        _loss(model, batch).backward()

    return measured(work, device)


def plain_recipe(**options: Any) -> Measured:
    """A backward pass that keeps every weight's gradient, then `torch.svd_lowrank(q=4r, niter=4)` of each layer's."""
    import torch

    rank = options.pop("rank")
    model, batch, sites, device = _prepared(**options)

    def work() -> dict[str, Any]:
        _loss(model, batch).backward()
        for site in sites:
            torch.svd_lowrank(model.get_submodule(site.module).weight.grad.float(), q=4 * rank, niter=4)
        return {"modules": len(sites)}

    try:
        return measured(work, device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def giva_energy(**options: Any) -> Measured:
    """How much of each layer's gradient our vectors hold, and `torch.svd_lowrank`'s, over what the exact ones hold."""
    import torch

    from surgery.passes.gradients import gradients

    rank = options.pop("rank")
    model, batch, sites, _ = _prepared(**options)
    found = gradients(model, [batch], _loss, sites, rank)
    _loss(model, batch).backward()
    ours, plain = [], []
    for site in sites:
        G = model.get_submodule(site.module).weight.grad.double()
        best = torch.linalg.svdvals(G)[:rank].square().sum()
        V = torch.svd_lowrank(G.float(), q=4 * rank, niter=4)[2][:, :rank].double()
        ours.append(float((G @ found.svds[site.module][0].Vh.double().T).square().sum() / best))
        plain.append(float((G @ V).square().sum() / best))
    return {
        "least": min(ours),
        "mean": sum(ours) / len(ours),
        "plain_least": min(plain),
        "plain_mean": sum(plain) / len(plain),
    }


def _prepared(
    model: str,
    device: str,
    samples: int,
    tokens: int,
    checkpointing: bool = False,
    dtype: str = "float32",
    **shape: Any,
) -> tuple[Any, dict[str, Any], list[Any], str]:
    """The model, a random batch, the layers, the device. `model` is a folder, or `random` for one of this shape."""
    import torch
    import transformers

    from surgery.models.sites import linear_sites

    torch.manual_seed(0)
    if model == "random":
        config = transformers.LlamaConfig(**shape)
        with torch.device(device):
            loaded = transformers.LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    else:
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=LABELS, dtype=getattr(torch, dtype)
        ).to(device)
    loaded.eval()
    loaded.config.use_cache = False
    for decompose in (torch.linalg.qr, torch.linalg.eigh, torch.linalg.svd):
        decompose(torch.eye(8, device=device))  # loads what it needs, which is no part of the work
    ids = torch.randint(1000, loaded.config.vocab_size, (samples, tokens), device=device)
    labels = ids if model == "random" else torch.randint(0, LABELS, (samples,), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in loaded.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # which transformers asks for; dropout stays off
    return loaded, batch, [site for site in linear_sites(loaded) if site.layer is not None], device


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss
