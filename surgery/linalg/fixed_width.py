"""Small integers in few bits each, and factors rounded to them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["largest_code", "pack", "rounded_columns", "unpack"]

# Steps that are tried, as shares of the one that just reaches the largest entry.
CLIPS = torch.linspace(0.25, 1.0, 61, dtype=torch.float64)


def largest_code(bits: int) -> int:
    """The largest magnitude of a code: codes are symmetric about 0."""
    return (1 << (bits - 1)) - 1


def rounded_columns(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every column to integers times a step of its own, the one of least squared error.

    Args:
        matrix: `(n, r)`.
        bits: of a code.

    Returns:
        Codes `(n, r)` and steps `(r,)`, float64; a column of zeros has step 1.
    """
    limit = largest_code(bits)
    wide = matrix.double()
    reach = wide.abs().amax(0) / limit
    reach = torch.where(reach > 0, reach, torch.ones_like(reach))
    best = torch.full_like(reach, float("inf"))
    codes, steps = torch.zeros_like(wide), reach.clone()
    for clip in CLIPS:
        step = reach * clip
        found = (wide / step).round().clamp(-limit, limit)
        error = (wide - found * step).square().sum(0)
        better = error < best
        best = torch.where(better, error, best)
        codes[:, better], steps[better] = found[:, better], step[better]
    return codes, torch.where(wide.abs().amax(0) > 0, steps, torch.ones_like(steps))


def pack(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Codes `(n,)` of magnitude up to `largest_code(bits)` in `bits` bits each, most significant first.

    Raises:
        ValueError: a code is too large.
    """
    limit = largest_code(bits)
    if codes.size and int(np.abs(codes.astype(np.int32)).max()) > limit:
        raise ValueError(f"a code is larger than {limit}, the largest of {bits} bits")
    shifted = (codes.astype(np.int32) + limit).astype(np.uint8)
    planes = np.unpackbits(shifted[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(planes.reshape(-1))


def unpack(data: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int16]:
    """The `count` codes that `pack` was given.

    Raises:
        ValueError: the data is of another length, or holds a code that is never written.
    """
    if data.size != -(-count * bits // 8):
        raise ValueError(f"{data.size} bytes do not hold {count} codes of {bits} bits")
    planes = np.unpackbits(data)[: count * bits].reshape(count, bits)
    padded = np.concatenate([np.zeros((count, 8 - bits), dtype=np.uint8), planes], axis=1)
    limit = largest_code(bits)
    codes = np.packbits(padded, axis=1)[:, 0].astype(np.int16) - limit
    if codes.size and int(codes.max()) > limit:
        raise ValueError("the codes are damaged")
    return codes
