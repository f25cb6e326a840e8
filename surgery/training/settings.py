"""How an adapter is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.errors import OptionError
from surgery.system.processes import Processes

__all__ = ["CACHE", "Schedule", "TrainSettings"]

# The best known of transformers' schedules; the others are taken as well.
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"] | str

# Bytes of a teacher's answers that are kept, where that is asked for.
CACHE = 1 << 30


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        max_steps: optimizer steps.
        learning_rate: None takes the one of the adapter's method.
        batch_size: samples of a step, over all processes.
        gradient_accumulation_steps: parts in which they are run, one after the other.
        lr_scheduler_type: of the learning rate, one of transformers' (`linear`, `cosine`, `constant`, ...).
        warmup_ratio: share of the steps in which the rate rises from 0.
        hidden_weight: distillation: weight of the hidden states' distance beside the predictions' KL divergence.
        cache_teacher: distillation: keep up to 1 GiB of the teacher's answers for samples that come again.
        save_steps: steps between checkpoints; None takes a tenth of them, but at least ten.
        gradient_checkpointing: compute activations twice instead of holding them.
        seed: of the order of the samples, and of dropout.
        arguments: other `transformers.TrainingArguments`, by name.
    """

    max_steps: int = 200
    learning_rate: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: Schedule = "linear"
    warmup_ratio: float = 0.0
    hidden_weight: float = 1.0
    cache_teacher: bool = False
    save_steps: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.save_steps is not None and self.save_steps < 1:
            raise OptionError(f"save_steps must be at least 1, got {self.save_steps}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise OptionError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.warmup_ratio < 1:
            raise OptionError(f"warmup_ratio is a share of the steps, from 0 to below 1, got {self.warmup_ratio}")
        if not self.hidden_weight >= 0:
            raise OptionError(f"hidden_weight must not be negative, got {self.hidden_weight}")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"seed must be at least 0 and below 2^32, got {self.seed}")

    def described(self, lr: float, chosen: bool, samples: int) -> str:
        """Return learning rate, schedule and steps in a line.

        Args:
            lr: the learning rate.
            chosen: whether the user gave it.
            samples: how many samples there are.
        """
        rising = round(self.warmup_ratio * self.max_steps)
        ends = {"linear": "falls to 0 in a line", "cosine": "falls to 0 by a cosine", "constant": "stays as it is"}
        course = ends.get(self.lr_scheduler_type, f"follows the schedule {self.lr_scheduler_type}")
        warm = f"rises for {rising:,} steps, then " if rising else ""
        epochs = self.max_steps * self.batch_size / samples
        return (
            f"{self.max_steps:,} steps of {self.batch_size:,} samples: {epochs:.3g} times through {samples:,} samples; "
            f"the learning rate {lr:g} ({'--lr' if chosen else 'the default of this adapter'}) {warm}{course}"
        )

    def part(self, group: Processes) -> int:
        """Samples that a process runs at a time.

        Raises:
            MethodError: the batch does not divide into equal parts.
        """
        parts = group.count * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise OptionError(
                f"batch_size {self.batch_size} does not divide into {group.count} processes times "
                f"{self.gradient_accumulation_steps} parts"
            )
        return self.batch_size // parts
