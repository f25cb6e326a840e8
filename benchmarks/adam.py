"""The reference for IniLoRA's start: the paper's fit of the factors by Adam (arXiv 2510.03731)."""

from __future__ import annotations

import torch

__all__ = ["LAYER_STEPS", "AdamFit"]

LAYER_STEPS = 20_000  # for every layer
LEARNING_RATE = 5e-4
DECAY, DECAY_EVERY = 0.9, 5_000


class AdamFit:
    """Factors `B (out, r)` and `A (r, in)` on their way to the least mean squared error of `B A`.

    Entries are drawn with the weight's own standard deviation.
    """

    def __init__(self, weight: torch.Tensor, rank: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        std = float(weight.std())
        shapes = (weight.shape[0], rank), (rank, weight.shape[1])
        drawn = [torch.empty(shape).normal_(0.0, std, generator=generator).to(weight.device) for shape in shapes]
        self.B, self.A = (torch.nn.Parameter(factor) for factor in drawn)
        self.weight = weight
        self.optimiser = torch.optim.Adam([self.B, self.A], lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, DECAY_EVERY, DECAY)

    def steps(self, count: int) -> None:
        """Take some steps."""
        for _ in range(count):
            self.optimiser.zero_grad()
            torch.nn.functional.mse_loss(self.B @ self.A, self.weight).backward()
            self.optimiser.step()
            self.schedule.step()

    def squared_error(self) -> float:
        """`|W - B A|^2`."""
        return squared_error(self.weight, self.B, self.A)


def squared_error(weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> float:
    """`|W - B A|^2`, Frobenius, in float64."""
    with torch.no_grad():
        return float((weight.double() - B.double() @ A.double()).square().sum())
