"""The work that is measured. Each function runs in a process of its own, imports what it needs, and only then starts.

Every one of them imports the same modules first, so that memory is above the same baseline on both sides.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conversion_work import convert, exported, peft_exported, trained_vera
from benchmarks.gradient_work import frozen_step, giva_bases, giva_energy, plain_recipe
from benchmarks.process import Measured, measured
from benchmarks.use_work import forward_pass, loaded, merge, peft_merge, stack_step, started, training_step

__all__ = ["WORKERS", "run"]

FEW_LAYERS = 3
WARM_UP = 20


def run(name: str, options: str) -> None:
    """Do one piece of work and print what was measured as one line of JSON."""
    import peft
    import transformers

    for module in ("bert", "llama"):
        importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    importlib.import_module("surgery.initialization.init")
    importlib.import_module("surgery.passes.gradients")
    for method in ("frod", "giva", "inilora", "smoa", "vera"):
        importlib.import_module(f"surgery.methods.{method}")
    # transformers finds its classes when they are first asked for.
    assert transformers.LlamaForCausalLM and transformers.BertModel and transformers.AutoModel and peft.PeftModel
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(WORKERS[name](**json.loads(options))))


def init(model: str, method: str, out: str, device: str, **options: Any) -> Measured:
    """`surgery.init`, from the folder of the base model to the folder of the adapter."""
    import surgery

    def work() -> dict[str, Any]:
        _, report = surgery.init(model, method, out, device=device, **options)
        return {"modules": report.modules, "file_bytes": report.bytes}

    return measured(work, device)


def peft_frod(model: str, device: str) -> Measured:
    """PEFT's FRoD: the model loaded, and its adapter made; nothing is saved."""
    from peft import FrodConfig

    return _peft_start("LlamaForCausalLM", model, FrodConfig(target_modules="all-linear", progressbar=False), device)


def peft_pissa(model: str, rank: int, targets: str, device: str) -> Measured:
    """PEFT's PiSSA: a LoRA that starts at the truncated SVD, taken from the full one."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="pissa")
    return _peft_start("AutoModel", model, config, device)


def peft_vera(model: str, rank: int, targets: str, device: str) -> Measured:
    """PEFT's VeRA, drawn from its seed; nothing is saved."""
    from peft import VeraConfig

    return _peft_start("AutoModel", model, VeraConfig(r=rank, target_modules=targets), device)


def _peft_start(model_class: str, model: str, config: Any, device: str) -> Measured:
    import peft
    import transformers

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        base = getattr(transformers, model_class).from_pretrained(model).to(device)
        loading = time.perf_counter() - started
        adapted = peft.get_peft_model(base, config)
        layers = sum(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in adapted.modules())
        return {"loading": loading, "modules": layers}

    return measured(work, device)


def frod_errors(model: str, out: str, device: str) -> Measured:
    """How well our FRoD and PEFT's reconstruct the weights of one small model, and whether they agree.

    For each: `max |W - U diag(l) V^T| / |W|` over the layers, the largest deviation of a column of U from unit
    length; the largest relative difference of our V from PEFT's up to the signs of columns, and the same from what
    PEFT's procedure gives in double precision.
    """
    import peft
    import torch
    import transformers
    from peft.tuners.frod.model import _projection_from_weights

    import surgery

    adapter, _ = surgery.init(model, "frod", out, device=device)
    ours = adapter.modules
    base = transformers.LlamaForCausalLM.from_pretrained(model)
    config = peft.FrodConfig(target_modules="all-linear", progressbar=False)
    theirs = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft.get_peft_model(base, config).named_modules()
        if isinstance(layer, peft.tuners.frod.layer.FrodLayer)
    }
    largest = dict.fromkeys(("error", "peft_error", "unit", "peft_unit", "V", "V_double"), 0.0)
    for name, layer in theirs.items():
        role = [module for module in ours if module.split(".", 3)[-1] == name.split(".", 3)[-1]]
        first = role[0]  # which holds the role's V
        V, l0 = ours[first]["frod_portable_V"].double(), ours[name]["frod_portable_l0"].double()
        W = layer.get_base_layer().weight.detach().double()
        U = W @ torch.linalg.inv(V).T / l0
        their_V, their_U = layer.frod_V["default"].double(), layer.frod_U["default"].double()
        their_l = layer.frod_lambda_l["default"].detach().double()
        weights = [theirs[module].get_base_layer().weight.detach().double() for module in role]
        found = {
            "error": (W - (U * ours[name]["frod_portable_l"].double()) @ V.T).norm() / W.norm(),
            "peft_error": (W - (their_U * their_l) @ their_V.T).norm() / W.norm(),
            "unit": (U.norm(dim=0) - 1).abs().max(),
            "peft_unit": (their_U.norm(dim=0) - 1).abs().max(),
            "V": _difference(V, their_V),
            "V_double": _difference(V, _projection_from_weights(weights, config.regularization_alpha)),
        }
        largest = {key: max(value, float(found[key])) for key, value in largest.items()}
    return {**largest, "modules": len(theirs)}


def _difference(V: Any, reference: Any) -> Any:
    """`|V - V'| / |V|`, up to the signs of columns."""
    turned = ((V * reference).sum(0) < 0).to(V)  # 1 where a column points the other way
    return (V - reference * (1 - 2 * turned)).norm() / V.norm()


def inilora_factors(model: str, rank: int, targets: list[str], device: str) -> Measured:
    """The factors of every layer alone, from weights that are in memory: what the Adam fit does too."""
    from surgery.linalg.low_rank import truncated_svd

    weights = list(_weights(model, targets, device).values())

    def work() -> None:
        for weight in weights:
            truncated_svd(weight, rank).balanced()

    return measured(work, device)


def adam_factors(model: str, rank: int, targets: list[str], device: str, steps: int, error_steps: int) -> Measured:
    """Some steps of the Adam fit on a few layers, and what all steps on all layers take at that speed.

    Apart from the measurement, `error_steps` are taken on the first layer, for the squared error that they reach,
    beside what our factors reach and the least there is.
    """
    import torch

    from benchmarks.adam import LAYER_STEPS, AdamFit, squared_error
    from surgery.linalg.low_rank import truncated_svd

    weights = list(_weights(model, targets, device).values())
    fits = [AdamFit(weight, rank) for weight in weights[:FEW_LAYERS]]
    for fit in fits:
        fit.steps(WARM_UP)

    def work() -> None:
        for fit in fits:
            fit.steps(steps)

    result = measured(work, device)
    result["step_seconds"] = result["seconds"] / (steps * len(fits))
    result["seconds"] = result["step_seconds"] * LAYER_STEPS * len(weights)
    fit = AdamFit(weights[0], rank)
    fit.steps(error_steps)
    values = torch.linalg.svdvals(weights[0].double())
    ours = squared_error(weights[0], *truncated_svd(weights[0], rank).balanced())
    errors = {"adam": fit.squared_error(), "ours": ours, "least": float(values[rank:].square().sum())}
    return {**result, "layers": len(weights), "errors": errors}


def joint(layers: int, shapes: dict[str, tuple[int, int]], device: str) -> Measured:
    """The joint decomposition of every role of a model whose weights are drawn when they are asked for.

    A weight is drawn on the device from a seed of its own at every visit, so none is stored. Reading a checkpoint
    and writing the adapter are left out. Where a GPU is asked for and there is none, nothing is measured.
    """
    import torch

    from surgery.linalg.joint import joint_basis, left_norms

    if device.startswith("cuda") and not torch.cuda.is_available():
        return {}

    def weights(role: int, shape: tuple[int, int], start: int = 0) -> Iterator[torch.Tensor]:
        for layer in range(start, layers):
            generator = torch.Generator(device=device).manual_seed(1000 * role + layer)
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            yield drawn.mul_(0.02).float()

    def work() -> dict[str, Any]:
        seconds = {}
        for role, (name, shape) in enumerate(shapes.items()):
            started = time.perf_counter()
            basis = joint_basis(lambda start, role=role, shape=shape: weights(role, shape, start), shape[1])
            inverse = basis.inverse_transposed.float()
            norms = [left_norms(weight, inverse).cpu() for weight in weights(role, shape)]
            assert all(bool(torch.isfinite(norm).all()) for norm in norms)
            seconds[name] = time.perf_counter() - started
        return {"role_seconds": seconds}

    result = measured(work, device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"
    return {**result, "device_name": name}


def smoa_scores(rows: int, columns: int, device: str) -> Measured:
    """Which block each row and column of one weight is in."""
    from surgery.methods.smoa import block_order

    weight = _drawn(rows, columns, device)
    return measured(lambda: {"words": block_order(weight, 2).numel()}, device)


def smoa_full_svd(rows: int, columns: int, device: str) -> Measured:
    """The order of rows and columns from a full decomposition of one weight."""
    import torch

    weight = _drawn(rows, columns, device)

    def work() -> None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        index = torch.arange(S.numel(), dtype=S.dtype, device=S.device)
        for vectors in (U, Vh.T):
            energy = vectors.square() * S.square()
            torch.argsort((energy * index).sum(1) / energy.sum(1))

    return measured(work, device)


def _drawn(rows: int, columns: int, device: str) -> Any:
    """A weight of that many rows and columns whose singular values fall, as trained ones do, below some outliers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns) // 8
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    outliers = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return (torch.randn(rows, columns, generator=generator) + 0.1 * low + outliers).to(device)


def _weights(model: str, targets: list[str], device: str) -> dict[str, Any]:
    from surgery.models.base_model import BaseModel

    base = BaseModel.open(Path(model))
    return {site.module: base.weight(site, device).clone() for site in base.select(targets)}


WORKERS: dict[str, Callable[..., Measured]] = {
    worker.__name__: worker
    for worker in (
        init,
        peft_frod,
        peft_pissa,
        peft_vera,
        frod_errors,
        inilora_factors,
        adam_factors,
        joint,
        smoa_scores,
        smoa_full_svd,
        giva_bases,
        frozen_step,
        plain_recipe,
        giva_energy,
        convert,
        trained_vera,
        exported,
        peft_exported,
        started,
        loaded,
        training_step,
        stack_step,
        forward_pass,
        merge,
        peft_merge,
    )
}

if __name__ == "__main__":
    run(*sys.argv[1:])
