"""Random matrices that are the same on every machine: drawn on the CPU from a seeded generator."""

from __future__ import annotations

import hashlib
import math

import torch

__all__ = ["generator_for", "kaiming_normal", "kaiming_uniform", "normal", "off_diagonal_pattern", "sketch"]

SKETCH_PROBES = 8


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named tensor: independent of the order in which tensors are drawn."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator, gain: float = math.sqrt(2.0)) -> torch.Tensor:
    """Kaiming-uniform (fan_in = columns): entries uniform in +-gain * sqrt(3 / fan_in). Returns float32 `shape`."""
    # The bound is built in this order of operations because PEFT's VeRA is: equal to the last bit.
    bound = math.sqrt(3.0) * (gain / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def kaiming_normal(shape: tuple[int, int], generator: torch.Generator, gain: float = math.sqrt(2.0)) -> torch.Tensor:
    """Kaiming-normal (fan_in = columns): standard deviation gain / sqrt(fan_in). Returns float32 `shape`."""
    return normal(shape, gain / math.sqrt(shape[1]), generator)


def normal(shape: tuple[int, int], std: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian entries of mean 0 and standard deviation `std`. Returns float32 `shape`."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def off_diagonal_pattern(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` different off-diagonal positions of a `(size, size)` matrix, uniformly.

    Positions are drawn with replacement and deduplicated until there are enough, so that memory follows `count`
    and not `size ** 2`.

    Args:
        size: rows and columns.
        count: how many positions, at most `size * (size - 1)`.
        generator: a CPU generator.

    Returns:
        Sorted positions `row * size + column`, int64 `(count,)`.
    """
    available = size * (size - 1)
    if count > available:
        raise ValueError(f"a {size} x {size} matrix has {available} off-diagonal entries, {count} were asked for")
    if 4 * count > available:
        drawn = torch.randperm(available, generator=generator)[:count]
    else:
        drawn = torch.empty(0, dtype=torch.int64)
        while drawn.numel() < count:
            more = torch.randint(available, (count - drawn.numel() + 64,), generator=generator)
            drawn = torch.unique(torch.cat([drawn, more]))
        # Dropping a random subset, not the tail, keeps every position equally likely.
        drawn = drawn[torch.randperm(drawn.numel(), generator=generator)[:count]]
    # Number k runs over the matrix without its diagonal: row k // (size - 1), the column skipping the diagonal.
    row, column = drawn // max(size - 1, 1), drawn % max(size - 1, 1)
    return torch.sort(row * size + column + (column >= row))[0]


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """A few random projections of a tensor, by which a regenerated copy is recognised up to rounding.

    Args:
        tensor: any real tensor, `(rows, ...)`.

    Returns:
        `(9,)` float64: the Frobenius norm, then 8 projections on seeded random sign vectors. A single column
        with its sign turned moves them by about twice that column's norm over the square root of its length.
    """
    if tensor.numel() == 0:
        return torch.zeros(SKETCH_PROBES + 1, dtype=torch.float64)
    flat = tensor.detach().to(device="cpu", dtype=torch.float64).reshape(tensor.shape[0], -1)
    generator = torch.Generator(device="cpu").manual_seed(0)
    left = torch.randint(0, 2, (SKETCH_PROBES, flat.shape[0]), generator=generator).double() * 2 - 1
    right = torch.randint(0, 2, (SKETCH_PROBES, flat.shape[1]), generator=generator).double() * 2 - 1
    return torch.cat([flat.norm().reshape(1), ((left @ flat) * right).sum(1)])
