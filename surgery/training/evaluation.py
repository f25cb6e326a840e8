"""How a model with an adapter does on data, before and after it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from surgery.passes.examples import IGNORED, Examples, batches
from surgery.passes.fidelity import NUMBERS
from surgery.passes.loaded_model import on_device, prepared
from surgery.passes.moments import is_causal, predictions
from surgery.system.processes import Processes
from surgery.training.distillation import Teacher, divergence
from surgery.training.interruption import Interruption

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Means over all items (tokens, or samples) of the data.

    Attributes:
        items: how many there are.
        loss: the model's own loss against the labels; None without labels.
        score: `accuracy` or `perplexity`; None for what has neither.
        value: of it.
        kl: KL divergence of the predictions from the teacher's, in nats for each item; None without a teacher.
        agreement: share of items for which both find the same class most probable; None likewise.
        hidden: relative squared distance of the hidden states from the teacher's, mean over the layers; None likewise.
    """

    items: int
    loss: float | None = None
    score: str | None = None
    value: float | None = None
    kl: float | None = None
    agreement: float | None = None
    hidden: float | None = None


def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    group: Processes,
    *,
    teacher: Teacher | None = None,
    stop: Interruption | None = None,
) -> Evaluation | None:
    """Run data through a model, without dropout and without touching the random state.

    Args:
        model: the model with its adapter.
        examples: the data.
        batch_size: samples run at a time, over all processes.
        device: where the model is.
        group: the processes that share the samples.
        teacher: measure as well how far the model is from it.
        stop: leave off where this has come.

    Returns:
        The figures; None where it was left off.
    """
    sums = _Sums(model)
    feed = on_device(device, next(model.parameters()).dtype, batches(examples, batch_size, group.rank, group.count))
    with torch.no_grad(), prepared(model, False, examples):
        for batch in feed:
            share = batch.pop("share")
            sums.add(batch, share, teacher)
            if stop is not None and stop.arrived():
                return None
    return sums.result(group, device)


class _Sums:
    """Sums over the batches of this process."""

    NAMES = ("loss", "labelled", "right", "judged", "kl", "same", "compared", "hidden", "share")

    def __init__(self, model: Any) -> None:
        self.model, self.causal = model, is_causal(model)
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.classes = False

    def add(self, batch: Mapping[str, Any], share: float, teacher: Teacher | None) -> None:
        """One batch, which is this share of all items."""
        if share == 0:
            return
        wanted = teacher is not None
        output = self.model(**batch, output_hidden_states=True) if wanted else self.model(**batch)
        found = dict.fromkeys(self.NAMES, 0.0)
        found["share"] = share
        if "labels" in batch and getattr(output, "loss", None) is not None:
            found["loss"], found["labelled"] = float(output.loss) * share, share
        self._score(found, output, batch)
        if teacher is not None:
            apart = divergence(self.model, output, batch, teacher.answers(batch))
            found["kl"], found["same"], found["compared"] = apart.sums.tolist()
            found["hidden"] = float(apart.hidden) * share
        self.sums += torch.tensor([found[name] for name in self.NAMES], dtype=torch.float64)

    def _score(self, found: dict[str, float], output: Any, batch: Mapping[str, Any]) -> None:
        logits, labels = getattr(output, "logits", None), batch.get("labels")
        if logits is None or labels is None or logits.shape[-1] == 1:
            return
        if getattr(getattr(self.model, "config", None), "problem_type", None) in NUMBERS:
            return
        self.classes = logits.ndim == 2
        rows = predictions(logits, batch, self.causal).float()
        targets = labels[:, 1:] if self.causal and labels.ndim == 2 else labels
        targets = targets[targets != IGNORED]
        if targets.shape[0] != rows.shape[0] or targets.is_floating_point():
            return
        right = (rows.argmax(-1) == targets).sum() if self.classes else -F.cross_entropy(rows, targets, reduction="sum")
        found["right"], found["judged"] = float(right), rows.shape[0]

    def result(self, group: Processes, device: torch.device) -> Evaluation:
        """The means over all processes."""
        sums = self.sums.to(device) if device.type != "mps" else self.sums
        if group.reduce is not None:
            group.reduce(sums)
        found = dict(zip(self.NAMES, sums.tolist(), strict=True))
        compared = found["compared"]
        items = int(found["judged"] or compared)
        score = value = None
        if found["judged"]:
            mean = found["right"] / found["judged"]
            score, value = ("accuracy", mean) if self.classes else ("perplexity", math.exp(min(-mean, 700.0)))
        return Evaluation(
            items,
            found["loss"] / found["labelled"] if found["labelled"] else None,
            score,
            value,
            found["kl"] / compared if compared else None,
            found["same"] / compared if compared else None,
            found["hidden"] / found["share"] if found["hidden"] or compared else None,
        )
