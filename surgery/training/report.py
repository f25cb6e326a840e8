"""What a training returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from surgery.training.evaluation import Evaluation

__all__ = ["TrainReport"]


@dataclass
class TrainReport:
    """The result of `surgery train`, with the keys of its `--json` output.

    Attributes:
        out: the folder written; None where nothing was.
        method: the method's name, or the PEFT type in small letters where it is none of ours.
        peft_type: PEFT type of the adapter.
        modules: number of layers that it changes.
        trainable_parameters: numbers that trained, heads included.
        trained: what trained, by the last part of the names in the file.
        bytes: size of `adapter_model.safetensors`.
        source_bytes: the same before.
        seconds: time from opening the inputs to the verified output.
        steps: steps to be done.
        steps_done: steps that were done; fewer where the training was interrupted.
        learning_rate: of the first step after the warm-up.
        batch_size: samples of a step, over all processes.
        samples: samples there are.
        seconds_per_step: mean time of a step of this run, without evaluation; None where it did none.
        before: evaluation of the adapter as it was.
        after: evaluation of the trained one; None where the training was interrupted.
        evaluated_on: `eval_data`, or `data` where there was none: these samples were trained on.
        loss: rows of the loss curve: step, loss, learning_rate, grad_norm, epoch.
        teacher: what the teacher was called; None without one.
        base: what the base model was called.
        model_class: its class.
        device: where it was trained.
        processes: how many took part.
        dry_run: nothing was trained.
        notes: what the user should know.
    """

    out: str | None
    method: str
    peft_type: str
    modules: int
    trainable_parameters: int
    trained: list[str]
    bytes: int
    source_bytes: int
    steps: int
    learning_rate: float
    batch_size: int
    samples: int
    base: str
    model_class: str
    device: str
    processes: int = 1
    seconds: float = 0.0
    steps_done: int = 0
    seconds_per_step: float | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    evaluated_on: str = "data"
    loss: list[dict[str, float]] = field(default_factory=list)
    teacher: str | None = None
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    command: str = "train"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
