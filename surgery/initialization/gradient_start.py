"""The gradient that a start needs: a base model loaded, its data made ready, one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.errors import DataError
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site
from surgery.passes.examples import Examples, batches
from surgery.passes.gradients import Gradients, Loss, Parts, gradients
from surgery.passes.loaded_model import RunSettings, _device_of, load_model, on_device, prepared
from surgery.system.processes import Processes, processes
from surgery.system.progress import Progress

__all__ = ["GradientRun", "RunSettings", "gradient_run"]


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
    settings: RunSettings,
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
    examples = settings.examples(data, base)
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


def _feed(data: Any, examples: Examples | None, size: int, group: Processes) -> Iterator[Any]:
    if examples is not None:
        return batches(examples, size, group.rank, group.count)
    if not isinstance(data, Iterable):
        raise DataError(f"data is a file or an iterable of batches, not {type(data).__name__}")
    return iter(data)


def _weighted(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """A batch's part of the mean loss over all items of the data."""
    features = {name: value for name, value in batch.items() if name != "share"}
    return model(**features).loss * batch["share"]


def _own_loss(model: Any, batch: Any) -> torch.Tensor:
    output = model(**batch)
    if getattr(output, "loss", None) is None:
        raise DataError("the model gives no loss for these batches: add labels to them, or give loss=")
    return output.loss
