"""Distillation of adapters that are in memory: what a conversion lost, learnt again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.fitting import fit_to_model
from surgery.adapters.names import MODEL_PREFIX
from surgery.models.base_model import BaseModel
from surgery.passes.examples import Examples
from surgery.passes.loaded_model import RunSettings, load_model
from surgery.peft_types.loading import load
from surgery.system.processes import Processes
from surgery.system.progress import Progress
from surgery.training.preparing import Prepared
from surgery.training.run import Feed, Run
from surgery.training.settings import TrainSettings

__all__ = ["Distilled", "distil"]


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation.

    Attributes:
        adapter: the student.
        loss: rows of the loss curve.
        seconds_per_step: mean time of a step.
    """

    adapter: Adapter
    loss: list[dict[str, float]]
    seconds_per_step: float | None


def distil(
    student: Adapter,
    teacher: Adapter,
    base: BaseModel,
    examples: Examples,
    settings: TrainSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> Distilled:
    """Let one adapter learn another's answers, without files.

    Packed GiVA codes take no more bytes afterwards, and nothing that is carried changes.

    Args:
        student: what learns.
        teacher: whose answers are learnt.
        base: their base model, under the class and with the labels that both are for; its weights are loaded.
        examples: the samples, as `read_examples` makes them for the base.
        settings: how. A rate of None is that of the student's method.
        device: where.
        progress: called after each step.

    Raises:
        AdapterError: an adapter does not fit the base.
        MethodError: the loss is not finite.
    """
    model = load_model(base, RunSettings(device=device), {})
    fitted = fit_to_model(student, model)
    prepared = Prepared.of(fitted, base, load(fitted, model, is_trainable=True))
    for name, inner in list(prepared.names.items()):
        if any(name.startswith(f"{MODEL_PREFIX}{module}.") for module in student.config.get("modules_to_save") or ()):
            prepared.model.get_parameter(inner).requires_grad_(False)
            del prepared.names[name]
    run = Run(prepared, Feed(examples, None, []), settings, Processes(), device, teacher, progress)
    report = run.report(base.name, own_eval=False)
    run.go(report, None, resume=False, overwrite=False, identity={})
    return Distilled(run.adapter, report.loss, report.seconds_per_step)
