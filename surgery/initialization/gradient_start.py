"""The gradient that a start needs: a base model loaded, its data made ready, one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from surgery.errors import CheckpointError, DataError, MethodError
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site
from surgery.passes.examples import Examples, batches, read_examples
from surgery.passes.gradients import Gradients, Loss, Parts, Progress, gradients
from surgery.system.processes import Processes, processes

__all__ = ["GradientRun", "GradientSettings", "gradient_run", "is_file", "load_model", "on_device", "prepared"]

# Share of a GPU's free memory that weights may take: activations need the rest.
WEIGHT_SHARE = 0.7


@dataclass(frozen=True)
class GradientSettings:
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
    """

    samples: int = 32
    batch_size: int = 32
    max_length: int | None = None
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spread: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in {torch.float32, torch.bfloat16}:
            raise MethodError(
                f"gradients are computed in float32 or bfloat16, not in {self.dtype}: they would underflow"
            )

    def examples(self, data: Any, base: BaseModel) -> Examples | None:
        """The samples of a data file; None for batches that the caller brings."""
        if not is_file(data):
            return None
        return read_examples(data, base, self.samples, self.max_length, self.seed)


@dataclass
class GradientRun:
    """What came out.

    Attributes:
        found: the gradients.
        samples: how many samples they come from, or None where the batches were the caller's own.
        processes: who took part.
        notes: what the user should know.
    """

    found: Gradients
    samples: int | None
    processes: Processes
    notes: list[str] = field(default_factory=list)


def gradient_run(
    base: BaseModel,
    sites: Sequence[Site],
    rank: int,
    parts: Parts,
    data: str | Path | Iterable[Any],
    loss: Loss | None,
    settings: GradientSettings,
    *,
    carried: dict[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> GradientRun:
    """Load a base model, run it on data, and reduce the gradient of every site.

    Dropout is off: what is reduced is the gradient of the mean loss over all items (tokens, or samples) of the data,
    however the samples are cut into batches or shared out to processes.

    Args:
        base: the model; where it was opened from a live one, that is used.
        sites: the layers.
        rank: singular triplets wanted for each part of a layer.
        parts: heights of the parts of fused layers, by module name.
        data: a file (see `read_examples`), or batches: dictionaries of a model's arguments, or whatever `loss` takes.
        loss: `loss(model, batch)` for own batches; default the model's own.
        settings: how.
        carried: parameters to set after loading, by name: heads that the checkpoint lacks.
        progress: called after each layer that is reduced.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: the model cannot be loaded.
        MethodError: a loss is not finite.
    """
    group = processes(settings.device)
    examples = (
        read_examples(data, base, settings.samples, settings.max_length, settings.seed) if is_file(data) else None
    )
    model = base.live if base.live is not None else load_model(base, settings, carried or {})
    where = _device_of(model)
    # The dtype that files are read into; the caller's own batches are as they should be.
    dtype = next(model.parameters()).dtype if examples is not None else None
    with prepared(model, settings.gradient_checkpointing, examples):
        found = gradients(
            model,
            on_device(where, dtype, _feed(data, examples, settings.batch_size, group)),
            _weighted if examples is not None else (loss or _own_loss),
            sites,
            rank,
            parts=parts,
            seed=settings.seed,
            reduce=group.reduce,
            progress=progress if group.first else None,
        )
    total = torch.tensor(found.loss, device=where)
    if group.reduce is not None:
        group.reduce(total)
    found.loss = float(total) if examples is not None else float(total) / (found.batches * group.count)
    return GradientRun(found, len(examples.features) if examples else None, group, examples.notes if examples else [])


def is_file(data: Any) -> TypeGuard[str | Path]:
    """Whether data is named, as against batches that the caller brings."""
    return isinstance(data, (str, Path))


def _feed(data: Any, examples: Examples | None, size: int, group: Processes) -> Iterator[Any]:
    if examples is not None:
        return batches(examples, size, group.rank, group.count)
    if not isinstance(data, Iterable):
        raise DataError(f"data is a file or an iterable of batches, not {type(data).__name__}")
    return iter(data)


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


def _weighted(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """A batch's part of the mean loss over all items of the data."""
    features = {name: value for name, value in batch.items() if name != "share"}
    return model(**features).loss * batch["share"]


def _own_loss(model: Any, batch: Any) -> torch.Tensor:
    output = model(**batch)
    if getattr(output, "loss", None) is None:
        raise DataError("the model gives no loss for these batches: add labels to them, or give loss=")
    return output.loss


def load_model(base: BaseModel, settings: GradientSettings, carried: dict[str, torch.Tensor]) -> Any:
    """A base model in the asked dtype on the asked device, with these parameters in place of its own.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    device_map: Any = "auto" if settings.spread and not _fits(base, settings) else None
    if base.is_quantized and device_map is None:
        device_map = {"": settings.device}  # quantised layers are not moved once they are made
    try:
        # A seed for whatever transformers draws because the checkpoint lacks it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = type(base.model).from_pretrained(
                base.folder,
                config=base.config,
                dtype=settings.dtype,
                device_map=device_map,
                use_safetensors=True,
                ignore_mismatched_sizes=bool(carried),  # of a head of other labels, which `carried` replaces
            )
    # Of its configurations transformers makes errors of every kind.
    except (ImportError, OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{base.folder}: cannot be loaded ({str(error).strip().split(chr(10))[0]})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.load_state_dict(carried, strict=False)
    return model if device_map else model.to(settings.device)


def _fits(base: BaseModel, settings: GradientSettings) -> bool:
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
        raise MethodError(f"{type(model).__name__} does not support gradient checkpointing")
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
