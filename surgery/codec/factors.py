"""Factors of small integers, and all layers' factors in one run of bytes.

Layout: the CRC-32 of all that follows (uint32); one byte, the binary logarithm of how many scales there are to the
octave; three bytes, the entropy coder's classes for what describes the ranks; how many bytes follow of it (uint32);
those; the codes, entropy-coded. What describes the ranks: the classes of B's columns, those of A's rows, the logarithms
of the scales, each as differences from the rank before (in a layer's first rank: from the layer before).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.codec.entropy import CLASSES, LARGEST, best_classes, class_bits, decode, decode_parts, encode

__all__ = [
    "LARGEST_CODE",
    "LIMITS",
    "RANK_BITS",
    "CodedFactors",
    "code_bits",
    "decode_factors",
    "decoded_layers",
    "encode_factors",
    "grid_of",
    "rounded_scales",
]

HEAD = 12
FINEST_SCALES = 9
LARGEST_EXPONENT = 63
# A rank's two classes and its scale, as they are coded.
RANK_BITS = 20
LARGEST_CODE = 4095
# By bits of a code: the step, in standard deviations, and the squared error, in variances, of the best uniform
# quantiser with 2^bits - 1 levels on a Gaussian. With so few levels a finer step would only clip.
LIMITS = {None: (0.0015, 2e-7), 2: (1.224, 0.190), 3: (0.651, 0.0469), 4: (0.353, 0.0132), 8: (0.0309, 1.1e-4)}
OFF_GRID = 2.0**-21  # what a scale in float32 may lie off its grid, in octaves


@dataclass(frozen=True)
class CodedFactors:
    """A weight change `B diag(s) A` with integer B and A.

    Attributes:
        B: int16 `(out, r)`.
        A: int16 `(r, in)`.
        s: positive scales, float64 `(r,)`, powers of two with exponents from a grid.
    """

    B: NDArray[np.int16]
    A: NDArray[np.int16]
    s: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """How many ranks there are, possibly none."""
        return len(self.s)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """`B diag(s)` and `A`."""
        return torch.from_numpy(self.B * self.s).to(dtype), torch.from_numpy(self.A.astype(np.float32)).to(dtype)


def rounded_scales(s: NDArray[np.float64], fineness: int) -> NDArray[np.float64]:
    """Positive scales rounded to `2^(i / 2^fineness)`."""
    return _scales(np.rint(np.log2(s) * 2**fineness), fineness)


def grid_of(s: NDArray[np.float64]) -> int | None:
    """The coarsest fineness of a grid that has all of these scales, told from float32; None where none has."""
    if bool((s <= 0).any()) or not bool(np.isfinite(s).all()):
        return None
    exponents = np.log2(s)
    if bool((np.abs(exponents) > LARGEST_EXPONENT).any()):
        return None
    for fineness in range(FINEST_SCALES + 1):
        steps = exponents * 2**fineness
        if bool((np.abs(steps - np.rint(steps)) < OFF_GRID * 2**fineness).all()):
            return fineness
    return None


def code_bits(codes: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The best classes for the columns of codes `(n, r)`, and what each takes there in bits."""
    histograms = column_histograms(np.abs(codes))
    return best_classes(histograms, class_bits(histograms.shape[1] - 1))


def column_histograms(magnitudes: NDArray[np.integer]) -> NDArray[np.intp]:
    """`(r, largest + 1)`: how often each magnitude occurs in each column of `(n, r)`."""
    columns = magnitudes.shape[1]
    size = int(magnitudes.max(initial=0)) + 1
    flat = magnitudes.astype(np.intp) + np.arange(columns) * size
    return np.bincount(flat.reshape(-1), minlength=columns * size).reshape(columns, size)


def encode_factors(layers: Sequence[CodedFactors], fineness: int) -> NDArray[np.uint8]:
    """All layers' codes and scales.

    Args:
        layers: in an order that the reader knows, with their shapes and ranks.
        fineness: as the scales were rounded, at most 9.

    Raises:
        ValueError: a scale is not on the grid, or out of its range (2^-63 to 2^63).
    """
    classes = [np.stack([code_bits(layer.B)[0], code_bits(layer.A.T)[0]]) for layer in layers if layer.rank]
    exponents = [np.log2(layer.s) * 2**fineness for layer in layers if layer.rank]
    ranks = [layer.rank for layer in layers if layer.rank]
    of_B, of_A = np.concatenate([np.zeros((2, 0), np.uint8), *classes], 1)
    exponent = np.concatenate([np.zeros(0), *exponents])
    whole = np.rint(exponent)
    if not 0 <= fineness <= FINEST_SCALES or bool((np.abs(exponent - whole) > OFF_GRID * 2**fineness).any()):
        raise ValueError("the scales are not on their grid")
    if bool((np.abs(whole) > LARGEST_EXPONENT * 2**fineness).any()):
        raise ValueError("a scale is too large or too small to be coded")
    described = [_differences(values.astype(np.int64), ranks) for values in (of_B, of_A, whole)]
    kinds = [int(code_bits(values[:, None])[0][0]) for values in described]
    side = encode(np.concatenate(described), [len(of_B)] * 3, kinds)
    coded = encode(
        _in_a_row(layers),
        _lengths([(layer.B.shape[0], layer.A.shape[1], layer.rank) for layer in layers]),
        _by_layer(of_B, of_A, ranks),
    )
    data = b"".join([bytes([fineness, *kinds]), side.size.to_bytes(4, "little"), side.tobytes(), coded.tobytes()])
    return np.frombuffer(zlib.crc32(data).to_bytes(4, "little") + data, dtype=np.uint8)


def decode_factors(data: NDArray[np.uint8], shapes: Sequence[tuple[int, int, int]]) -> list[CodedFactors]:
    """The layers that `encode_factors` was given.

    Memory and time follow the shapes, whatever the data says.

    Args:
        data: uint8.
        shapes: `(out, in, rank)` of each layer.

    Raises:
        ValueError: the data is not what `encode_factors` returns for these shapes.
    """
    return list(decoded_layers(data, shapes))


def decoded_layers(data: NDArray[np.uint8], shapes: Sequence[tuple[int, int, int]]) -> Iterator[CodedFactors]:
    """Yield the layers that `encode_factors` was given; memory is that of the data and of one layer.

    Args:
        data: uint8.
        shapes: `(out, in, rank)` of each layer.

    Raises:
        ValueError: the data is not what `encode_factors` returns for these shapes; layers may have been yielded.
    """
    # Escapes are written as they are: only a checksum tells that one has changed.
    found = zlib.crc32(np.ascontiguousarray(data[4:]).data)
    if data.size < HEAD or found != int.from_bytes(data[:4].tobytes(), "little"):
        raise ValueError("the coded factors are damaged or cut short")
    fineness, kinds = int(data[4]), data[5:8].tolist()
    if fineness > FINEST_SCALES:
        raise ValueError("the coded factors are damaged or cut short")
    middle = HEAD + int.from_bytes(data[8:HEAD].tobytes(), "little")
    ranks = [rank for _, _, rank in shapes if rank]
    count = sum(ranks)
    described = decode(data[HEAD:middle], [count] * 3, kinds).reshape(3, count)
    of_B, of_A, exponents = (_sums(values, ranks) for values in described)
    classes = np.concatenate([of_B, of_A])
    if bool(((classes < 0) | (classes >= CLASSES)).any()) or bool(
        (np.abs(exponents) > LARGEST_EXPONENT * 2**fineness).any()
    ):
        raise ValueError("the description of the ranks is damaged")
    parts = decode_parts(data[middle:], _lengths(shapes), _by_layer(of_B, of_A, ranks))
    scales, first = _scales(exponents, fineness), 0
    sizes = [(height + width) * rank for height, width, rank in shapes]
    for (height, width, rank), numbers in zip(shapes, _in_sizes(parts, sizes), strict=True):
        B, A = numbers[: height * rank].reshape(rank, height).T.copy(), numbers[height * rank :].reshape(rank, width)
        yield CodedFactors(B, A, scales[first : first + rank])
        first += rank


def _in_sizes(parts: Iterator[NDArray[np.int16]], sizes: Sequence[int]) -> Iterator[NDArray[np.int16]]:
    """Yield runs of these sizes of what comes in parts of other sizes, each in memory of its own, and use up the parts.

    A last run that comes before the parts have ended would escape their check: the end is awaited first.
    """
    left = np.empty(0, np.int16)
    for place, size in enumerate(sizes):
        run, filled = np.empty(size, np.int16), 0
        while filled < size:
            if not left.size:
                left = next(parts)
            taken = min(left.size, size - filled)
            run[filled : filled + taken] = left[:taken]
            left, filled = left[taken:], filled + taken
        if place == len(sizes) - 1:
            for _ in parts:
                pass
        yield run


def _in_a_row(layers: Sequence[CodedFactors]) -> NDArray[np.int16]:
    """All codes, layer by layer: B's columns, A's rows."""
    numbers = np.empty(sum(layer.B.size + layer.A.size for layer in layers), np.int16)
    start = 0
    for layer in layers:
        for part in (layer.B.T, layer.A):
            numbers[start : start + part.size].reshape(part.shape)[...] = part
            start += part.size
    return numbers


def _scales(exponents: NDArray[np.integer] | NDArray[np.float64], fineness: int) -> NDArray[np.float64]:
    scales: NDArray[np.float64] = np.exp2(exponents / 2**fineness)
    return scales


def _lengths(shapes: Iterable[tuple[int, int, int]]) -> list[int]:
    return [count for height, width, rank in shapes for count in [height] * rank + [width] * rank]


def _by_layer(of_B: NDArray[np.integer], of_A: NDArray[np.integer], ranks: Sequence[int]) -> list[int]:
    """Classes in the order of the segments: a layer's columns of B, then its rows of A."""
    ends = np.cumsum(ranks).tolist()
    parts = [part[end - rank : end] for rank, end in zip(ranks, ends, strict=True) for part in (of_B, of_A)]
    return [int(which) for part in parts for which in part]


def _differences(values: NDArray[np.int64], ranks: Sequence[int]) -> NDArray[np.int16]:
    firsts = np.cumsum([0, *ranks])[:-1]
    result = np.diff(values, prepend=0)
    result[firsts] = np.diff(values[firsts], prepend=0)
    if bool((np.abs(result) > LARGEST).any()):
        raise ValueError("scales of neighbouring ranks differ too much to be coded")
    return result.astype(np.int16)


def _sums(differences: NDArray[np.int16], ranks: Sequence[int]) -> NDArray[np.int64]:
    wide = differences.astype(np.int64)
    firsts = np.cumsum([0, *ranks])[:-1]
    starts = np.cumsum(wide[firsts])
    wide[firsts] = starts
    running = np.cumsum(wide)
    before = np.concatenate([[0], running])[firsts]
    return running - np.repeat(before, ranks)
