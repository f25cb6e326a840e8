"""The processes of one run, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from surgery.errors import SurgeryError

__all__ = ["Processes", "processes"]

# One process may wait for another's work for as long as that takes.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process and how many there are.

    Attributes:
        rank: this process's number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def reduce(self) -> Reduce | None:
        """Sums a tensor over the processes, in place; None where there is one process."""
        if self.count == 1:
            return None

        def add_up(tensor: torch.Tensor) -> None:
            torch.distributed.all_reduce(tensor)

        return add_up

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            torch.distributed.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """What all processes say, in their order."""
        if self.count == 1:
            return [value]
        said: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(said, value)
        return said

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """A block that all processes come through, or none: a named error of one of them is raised in all.

        In all but the first it has `told` set: one process tells the user.
        """
        failure: SurgeryError | None = None
        try:
            yield
        except SurgeryError as error:
            if self.count == 1:
                raise
            failure = error
        first = next((error for error in self.gathered(failure) if error is not None), None)
        if first is not None:
            first.told = not self.first
            raise first

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which of several pieces of work are this process's: the dearest first, each to whom has least to do.

        Args:
            costs: of the pieces, the same in all processes.
        """
        loads, mine = [0.0] * self.count, []
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            taker = loads.index(min(loads))
            loads[taker] += costs[piece]
            if taker == self.rank:
                mine.append(piece)
        return sorted(mine)


def processes(device: torch.device) -> Processes:
    """The processes that `torchrun` started, connected; one where it did not.

    Args:
        device: what they work on, which chooses how they talk: gloo on the CPU, nccl on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)


# Sums a tensor over all processes, in place.
Reduce = Callable[[torch.Tensor], None]
