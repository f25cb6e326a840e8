"""One layer's factors as a few bytes and back, without an adapter or a file: the codec for whoever builds on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.codec.factors import decode_factors
from surgery.codec.model import DoesNotFit, Goal, compress
from surgery.errors import OptionError

__all__ = ["CodedLayer", "decode_layer", "encode_layer"]


@dataclass(frozen=True)
class CodedLayer:
    """A low-rank weight change as bytes.

    Attributes:
        data: the codes and scales, uint8; a checksum tells when they are damaged.
        shape: out, in and rank, which `decode_layer` needs.
        error: the relative error of the change, in the Frobenius norm.
    """

    data: NDArray[np.uint8]
    shape: tuple[int, int, int]
    error: float

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decoded factors `B (out, rank)` and `A (rank, in)`, float32."""
        return decode_layer(self.data, self.shape)


def encode_layer(
    B: torch.Tensor,
    A: torch.Tensor,
    *,
    size: int | None = None,
    error: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    bits: int | None = None,
) -> CodedLayer:
    """Code the weight change `B A` in few bits. Give one of `size`, `error`, `energy` and `rank`.

    Args:
        B: `(out, r)`, any floating dtype.
        A: `(r, in)`.
        size: bytes of the coded data, at most.
        error: the relative error, at most.
        energy: share of the squared norm that is kept, at least.
        rank: of the result; its codes are fine.
        bits: 2, 3, 4 or 8: limits codes to `2^bits - 1` values; None chooses for each column.

    Raises:
        OptionError: the shapes do not match, none or several goals are given, or the goal cannot be reached.
    """
    given = {"size": size, "error": error, "energy": energy, "rank": rank}
    if sum(value is not None for value in given.values()) != 1:
        raise OptionError("give one of size, error, energy and rank")
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise OptionError(f"B {tuple(B.shape)} and A {tuple(A.shape)} are no factors: B is (out, r), A is (r, in)")
    if not (bool(torch.isfinite(B).all()) and bool(torch.isfinite(A).all())):
        raise OptionError("the factors hold values that are not finite")
    try:
        found = compress([(B.detach().cpu(), A.detach().cpu())], Goal(**given), bits=bits, restored=0.0)  # type: ignore[arg-type]
    except DoesNotFit as fault:
        raise OptionError(f"size {size} holds nothing of the layer; {fault.enough} bytes do") from None
    except ValueError as fault:
        raise OptionError(str(fault)) from None
    coded = found.layers[0]
    return CodedLayer(found.data, (B.shape[0], A.shape[1], coded.rank), found.relative_error)


def decode_layer(data: NDArray[np.uint8], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors `B (out, rank)` and `A (rank, in)`, float32, of a layer that `encode_layer` has coded.

    Args:
        data: `CodedLayer.data`.
        shape: `CodedLayer.shape`.

    Raises:
        ValueError: the data is damaged, or of another shape.
    """
    return decode_factors(data, [shape])[0].factors()
