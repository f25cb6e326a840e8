"""Ctrl-C and SIGTERM while a training runs: the step is finished, and what it made is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from surgery.system.processes import Processes

__all__ = ["Interruption", "TrainingInterrupted"]


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted, and its adapter saved.

    Attributes:
        signal: by which signal.
        out: the folder with the adapter as it is after `step` steps; None where no step was done.
        step: how many steps were done.
    """

    def __init__(self, number: int, out: str | None, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the adapter as it is: {out}")
        self.signal, self.out, self.step = number, out, step


class Interruption:
    """Takes note of a signal for the time of a block. A second one ends the program at once.

    Args:
        group: the processes that must stop at the same step.
        device: on which they talk.
    """

    def __init__(self, group: Processes, device: torch.device) -> None:
        self.group, self.device = group, device
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def arrived(self) -> bool:
        """Whether any of the processes has been told to stop. All of them must ask."""
        if self.group.reduce is not None:
            highest = torch.tensor(self.number or 0, device=self.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            self.number = int(highest) or None
        return self.number is not None
