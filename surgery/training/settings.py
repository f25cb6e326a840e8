"""How an adapter is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import OptionError
from surgery.system.processes import Processes

__all__ = ["CACHE", "TrainSettings"]

# Bytes of a teacher's answers that are kept, where that is asked for.
CACHE = 1 << 30


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        steps: optimizer steps.
        lr: learning rate; None takes the one of the adapter's method.
        batch_size: samples of a step, over all processes.
        accumulate: parts in which they are run, one after the other.
        schedule: of the learning rate, one of transformers' (`linear`, `cosine`, `constant`, ...).
        warmup: share of the steps in which the rate rises from 0.
        hidden_weight: distillation: weight of the hidden states' distance beside the predictions' KL divergence.
        cache: distillation: bytes of the teacher's answers that are kept for samples that come again.
        save_every: steps between checkpoints; None takes a tenth of them, but at least ten.
        gradient_checkpointing: compute activations twice instead of holding them.
        seed: of the order of the samples, and of dropout.
        arguments: other `transformers.TrainingArguments`, by name.
    """

    steps: int = 200
    lr: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    schedule: str = "linear"
    warmup: float = 0.0
    hidden_weight: float = 1.0
    cache: int = 0
    save_every: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.save_every is not None and self.save_every < 1:
            raise OptionError(f"save_every must be at least 1, got {self.save_every}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise OptionError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup is a share of the steps, from 0 to below 1, got {self.warmup}")
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
        rising = round(self.warmup * self.steps)
        ends = {"linear": "falls to 0 in a line", "cosine": "falls to 0 by a cosine", "constant": "stays as it is"}
        course = ends.get(self.schedule, f"follows the schedule {self.schedule}")
        warm = f"rises for {rising:,} steps, then " if rising else ""
        epochs = self.steps * self.batch_size / samples
        return (
            f"{self.steps:,} steps of {self.batch_size:,} samples: {epochs:.3g} times through {samples:,} samples; the "
            f"learning rate {lr:g} ({'--lr' if chosen else 'the default of this adapter'}) {warm}{course}"
        )

    def part(self, group: Processes) -> int:
        """Samples that a process runs at a time.

        Raises:
            MethodError: the batch does not divide into equal parts.
        """
        parts = group.count * self.accumulate
        if self.batch_size % parts:
            raise OptionError(
                f"batch_size {self.batch_size} does not divide into {group.count} processes times {self.accumulate} "
                "parts"
            )
        return self.batch_size // parts
