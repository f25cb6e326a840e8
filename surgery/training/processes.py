"""The processes of one run, as `torchrun` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from surgery.linalg.token_products import Reduce

__all__ = ["Processes", "processes"]


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


def processes(device: torch.device) -> Processes:
    """The processes that `torchrun` started, connected; one where it did not.

    Args:
        device: what they work on, which chooses how they talk: gloo on the CPU, nccl on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes)
