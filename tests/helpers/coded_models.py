"""Layers and moments of a model to code, and what a coded model loses."""

from __future__ import annotations

import torch

from surgery.codec.model import Compressed, Goal, Metric, compress

Factors = tuple[torch.Tensor, torch.Tensor]


def layer_of(out: int, into: int, rank: int, seed: int, power: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, rank + 1) ** -power * float(torch.randn(1, generator=generator).exp())
    return torch.randn(out, rank, generator=generator) * falling, torch.randn(rank, into, generator=generator) * 0.1


def model(count: int = 8, power: float = 1.0) -> list[Factors]:
    shapes = [(64, 48), (48, 64), (160, 48), (48, 160)]
    return [layer_of(*shapes[index % 4], 8, index, power) for index in range(count)]


def moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(2 * size, size, generator=generator).double()
    samples = samples @ torch.randn(size, size, generator=generator).double() * torch.arange(1, size + 1) ** -0.6
    return samples.T @ samples / len(samples)


def metric_of(layers: list[Factors]) -> Metric:
    pairs = [(moment(A.shape[1], 2 * index), moment(B.shape[0], 2 * index + 1)) for index, (B, A) in enumerate(layers)]
    return lambda index: pairs[index]


def in_bytes(layers: list[Factors], size: int, **options: object) -> Compressed:
    return compress(layers, Goal(size=size), **options)  # type: ignore[arg-type]
