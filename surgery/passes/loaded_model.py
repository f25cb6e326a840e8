"""A base model loaded for a pass over data: placed, fitted into memory, checkpointed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from surgery.errors import OptionError
from surgery.models.base_model import BaseModel
from surgery.models.loading import load_from_files
from surgery.passes.examples import Examples, read_examples

__all__ = ["is_file", "load_model", "on_device", "prepared"]

# Share of a GPU's free memory that weights may take: activations need the rest.
WEIGHT_SHARE = 0.7


@dataclass(frozen=True)
class RunSettings:
    """How the pass is made.

    Attributes:
        samples: how many samples are drawn from a data file.
        batch_size: how many of them make a batch, over all processes.
        max_length: tokens of the longest sample.
        gradient_checkpointing: compute activations twice instead of holding them.
        dtype: of the model while it runs.
        seed: of everything drawn.
        device: where.
        spread: let transformers spread a model that does not fit the device over all devices there are.
        chat_template: a file with the chat template to use in place of the tokenizer's.
    """

    samples: int = 32
    batch_size: int = 32
    max_length: int | None = None
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spread: bool = False
    chat_template: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in {torch.float32, torch.bfloat16}:
            raise OptionError(
                f"gradients are computed in float32 or bfloat16, not in {self.dtype}: they would underflow"
            )

    def examples(self, data: Any, base: BaseModel, labelled: bool = True) -> Examples | None:
        """The samples of a data file; None for batches that the caller brings."""
        if not is_file(data):
            return None
        return read_examples(data, base, self.samples, self.max_length, self.seed, labelled, self.chat_template)


def is_file(data: Any) -> TypeGuard[str | Path]:
    """Whether data is named, as against batches that the caller brings."""
    return isinstance(data, (str, Path))


def on_device(device: torch.device, dtype: torch.dtype | None, feed: Iterator[Any]) -> Iterator[Any]:
    """Batches moved to a device, their floating-point tensors cast where a dtype is given."""
    for batch in feed:
        yield _moved(batch, device, dtype)


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch on a device, and its floating-point tensors in a dtype where one is given."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: _moved(each, device, dtype) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [_moved(each, device, dtype) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where a model takes its inputs. Weights that accelerate keeps elsewhere until they are used are on `meta`."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def load_model(base: BaseModel, settings: RunSettings, carried: dict[str, torch.Tensor]) -> Any:
    """A base model in the asked dtype on the asked device, with these parameters in place of its own.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    device_map: Any = "auto" if settings.spread and not _fits(base, settings) else None
    if base.is_quantized and device_map is None:
        device_map = {"": settings.device}  # quantised layers are not moved once they are made
    # A seed for whatever transformers draws because the checkpoint lacks it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = load_from_files(
            base,
            dtype=settings.dtype,
            device_map=device_map,
            ignore_mismatched_sizes=bool(carried),  # of a head of other labels, which `carried` replaces
        )
    model.load_state_dict(carried, strict=False)
    return model if device_map else model.to(settings.device)


def _fits(base: BaseModel, settings: RunSettings) -> bool:
    if settings.device.type != "cuda":
        return True
    size = sum(tensor.numel() for tensor in base.model.parameters()) * settings.dtype.itemsize
    return size <= WEIGHT_SHARE * torch.cuda.mem_get_info(settings.device)[0]


@contextlib.contextmanager
def prepared(model: Any, checkpointing: bool, examples: Examples | None) -> Iterator[None]:
    """A model without dropout and without a cache, checkpointing if wanted; afterwards it is as it was."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    changes: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
    if examples is not None and "input_ids" in examples.padding:
        # Models that look for the last token, or count positions, do so by this number.
        changes["pad_token_id"] = examples.padding["input_ids"]
    before = {name: getattr(config, name, None) for name in changes}
    model.eval()
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        with _checkpointing(model) if checkpointing else contextlib.nullcontext():
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Checkpointing in evaluation mode, for as long as it lasts.

    transformers' blocks ask for training mode, which would bring dropout: they see it until their work begins.

    Raises:
        MethodError: the model has no such blocks.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise OptionError(f"{type(model).__name__} does not support gradient checkpointing")
    before = [(layer.gradient_checkpointing, getattr(layer, "_gradient_checkpointing_func", None)) for layer in layers]
    try:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _checkpointed(layer)
        yield
    finally:
        for layer, (wanted, function) in zip(layers, before, strict=True):
            layer.training, layer.gradient_checkpointing = False, wanted
            layer._gradient_checkpointing_func = function


def _checkpointed(layer: Any) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        def without_dropout(*args: Any) -> Any:
            layer.training = False
            try:
                return function(*args)
            finally:
                layer.training = True

        return checkpoint(without_dropout, *args, use_reentrant=False)

    return run
