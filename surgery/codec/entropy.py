"""Integers to bytes and back: an entropy coder for what rounding makes.

Asymmetric numeral systems (Duda, arXiv 1311.2540), in the range variant with 16-bit words, over lanes that numpy
steps side by side. The numbers come in segments, each of a class: a distribution, Gaussian or two-sided exponential,
with a width from a fixed grid. Tables follow from the class alone and are made by correctly rounded decimal
arithmetic, so that every machine makes the same ones.

Layout, little-endian: number of escapes (uint32); states (lanes of uint32); escapes (int16 each); words (uint16 each).
Lanes follow from the count of numbers; number `i` belongs to lane `i % lanes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Context, Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

__all__ = [
    "CLASSES",
    "LARGEST",
    "WIDTHS",
    "best_classes",
    "class_bits",
    "decode",
    "decode_parts",
    "encode",
    "lanes_for",
]

LARGEST = 32767  # magnitude of a number
WIDTHS = 60  # of a distribution: 2^-3 .. 2^11.75, four to the octave
CLASSES = 2 * WIDTHS  # Gaussian, then exponential
PRECISION = 14
TOTAL = 1 << PRECISION
LOW = 1 << 16  # a state is at least this, and below 2^32
# Fewer numbers for a lane cost bytes for states, more cost steps.
NUMBERS_PER_LANE = 16384
MOST_LANES = 4096
# Up to so many lanes Python steps faster through the numbers than numpy does, whose call costs more than a few of them.
FEW_LANES = 8
PART = 1 << 16  # numbers that are prepared at a time
# Numbers beyond are escapes, coded in 16 bits each, as is what lies beyond five widths.
WIDEST_ALPHABET = 2047
ESCAPE_BITS = PRECISION + 16
ARITHMETIC = Context(prec=30)

Classes = NDArray[np.uint8]
Numbers = NDArray[np.int16]
Bytes = NDArray[np.uint8]
States = NDArray[np.int64]


def encode(numbers: Numbers, lengths: Sequence[int], classes: Sequence[int]) -> Bytes:
    """Encode segments of integers.

    Args:
        numbers: all segments, one after the other, int16 `(n,)`, magnitudes up to `LARGEST`.
        lengths: numbers in each segment.
        classes: of each segment, below `CLASSES`.

    Returns:
        The bytes, uint8.

    Raises:
        ValueError: lengths and numbers disagree, or a number is too small.
    """
    tables = _Tables(classes)
    table = tables.of_numbers(lengths)
    if numbers.shape != (table.size,):
        raise ValueError(f"{numbers.size} numbers, but {table.size} in the segments")
    if numbers.size and int(numbers.min()) < -LARGEST:
        raise ValueError(f"a number is below {-LARGEST}")
    lanes = lanes_for(numbers.size)
    states = np.full(lanes, LOW, dtype=np.int64)
    push = _push_singly if lanes <= FEW_LANES else _push
    words: list[NDArray[np.uint16]] = []
    escapes: list[Numbers] = []
    for part in reversed(_parts_of(numbers.size, lanes)):
        cells, escaped = tables.cells(numbers[part], table[part])
        escapes.append(numbers[part][escaped])
        states, pushed = push(cells, states, tables)
        words.append(pushed)
    parts = [
        np.array([sum(map(len, escapes))], dtype="<u4"),
        states.astype("<u4"),
        np.concatenate([np.zeros(0, np.int16), *escapes[::-1]]).astype("<i2"),
        np.concatenate([np.zeros(0, np.uint16), *words[::-1]]).astype("<u2"),
    ]
    return np.frombuffer(b"".join(part.tobytes() for part in parts), dtype=np.uint8)


def _push(cells: NDArray[np.intp], states: States, tables: _Tables) -> tuple[States, NDArray[np.uint16]]:
    """Put symbols into the states, the last one first.

    Args:
        cells: of the symbols, `(n,)`.
        states: of the lanes.
        tables: of the classes.

    Returns:
        The states then, and the words that they gave away, as a reader wants them.
    """
    # Whole numbers below 2^53 are exact in float64, and so is the floor of what two of them below 2^32 divide to;
    # processors divide these side by side, which they do not for integers.
    moved = states.astype(np.float64)
    lanes, words = moved.size, []
    for start in reversed(range(0, cells.size, lanes)):
        cell = cells[start : start + lanes]
        frequency = tables.frequency.take(cell)
        state = moved[: cell.size]
        full = np.flatnonzero(state >= frequency * 2.0 ** (32 - PRECISION))
        if full.size:
            high, low = np.divmod(state[full].astype(np.uint32), LOW)
            words.append(low.astype(np.uint16))
            state[full] = high
        # It becomes quotient * TOTAL + remainder + start of the symbol's slots.
        state += np.floor(state / frequency) * (TOTAL - frequency) + tables.first.take(cell)
    return moved.astype(np.int64), np.concatenate([np.zeros(0, np.uint16), *words[::-1]])


def _push_singly(cells: NDArray[np.intp], states: States, tables: _Tables) -> tuple[States, NDArray[np.uint16]]:
    """Do what `_push` does, a number at a time."""
    moved, words = states.tolist(), []
    frequencies, firsts = tables.whole_frequency.take(cells).tolist(), tables.whole_first.take(cells).tolist()
    lanes = len(moved)
    for index in range(cells.size - 1, -1, -1):
        state, frequency = moved[index % lanes], frequencies[index]
        if state >= frequency << (32 - PRECISION):
            words.append(state & (LOW - 1))
            state >>= 16
        moved[index % lanes] = state + state // frequency * (TOTAL - frequency) + firsts[index]
    return np.array(moved, dtype=np.int64), np.array(words[::-1], dtype=np.uint16)


def decode(data: Bytes, lengths: Sequence[int], classes: Sequence[int]) -> Numbers:
    """The integers that `encode` was given.

    Memory and time follow `lengths` and the length of the data, not what the data says.

    Args:
        data: uint8, the whole of what `encode` returned.
        lengths: numbers in each segment.
        classes: of each segment, below `CLASSES`.

    Raises:
        ValueError: the data is not what `encode` returns for these segments.
    """
    return np.concatenate([np.zeros(0, np.int16), *decode_parts(data, lengths, classes)])


def decode_parts(data: Bytes, lengths: Sequence[int], classes: Sequence[int]) -> Iterator[Numbers]:
    """Yield what `decode` returns, in parts of at most 65,536 numbers, whatever the segments.

    That the data is whole is known at the end only: what was yielded before counts for nothing where it raises.

    Args:
        data, lengths, classes: as for `decode`.

    Raises:
        ValueError: as for `decode`.
    """
    tables = _Tables(classes)
    if tables.fewest_bits(lengths) > 8 * data.size:
        raise ValueError("the coded numbers are cut short")
    table = tables.of_numbers(lengths)
    states, escapes, words = _read(data, table.size)
    lanes, used, escaped = states.size, 0, 0
    pull = _pull_singly if lanes <= FEW_LANES else _pull
    for part in _parts_of(table.size, lanes):
        here = table[part]
        # A number takes one word at most. As integers of the states' width they are read faster.
        symbols, states, read = pull(here, states, words[used : used + here.size].astype(np.int64), tables)
        used += read
        escapes_here = np.flatnonzero(symbols == tables.escape[here])
        values = escapes[escaped : escaped + escapes_here.size]
        symbols -= tables.reach[here]
        # What has a symbol is no escape; -32768 has no magnitude in int16 and is negative here.
        if values.size < escapes_here.size or (np.abs(values) <= tables.reach[here[escapes_here]]).any():
            raise ValueError("the coded numbers are damaged")
        symbols[escapes_here] = values
        escaped += values.size
        yield symbols
    # Encoding began with these states: whatever does not lead back to them is damaged.
    if used != words.size or not (states == LOW).all() or escaped != escapes.size:
        raise ValueError("the coded numbers are damaged")


def _pull(
    table: NDArray[np.uint8], states: States, words: NDArray[np.int64], tables: _Tables
) -> tuple[Numbers, States, int]:
    """Take symbols out of the states.

    Args:
        table: of each symbol, `(n,)`.
        states: of the lanes; changed.
        words: that the states take in.
        tables: of the classes.

    Returns:
        The symbols, int16 `(n,)`, the states then, and how many words were read.

    Raises:
        ValueError: there are too few words.
    """
    lanes, used = states.size, 0
    slots, cells = table.astype(np.intp) << PRECISION, table.astype(np.intp) * tables.width
    symbols = np.empty(table.size, dtype=np.int16)
    for start in range(0, table.size, lanes):
        end = min(start + lanes, table.size)
        state = states[: end - start]
        slot = state & (TOTAL - 1)
        symbol = tables.lookup.take(slots[start:end] + slot)
        symbols[start:end] = symbol
        cell = cells[start:end] + symbol
        state >>= PRECISION
        state *= tables.whole_frequency.take(cell)
        state += slot - tables.whole_first.take(cell)
        empty = np.flatnonzero(state < LOW)
        if empty.size:
            read = words[used : used + empty.size]
            if read.size < empty.size:
                raise ValueError("the coded numbers are cut short")
            state[empty] = (state[empty] << 16) | read
            used += empty.size
    return symbols, states, used


def _pull_singly(
    table: NDArray[np.uint8], states: States, words: NDArray[np.int64], tables: _Tables
) -> tuple[Numbers, States, int]:
    """Do what `_pull` does, a number at a time."""
    moved, symbols, used = states.tolist(), [], 0
    # Views, not lists: what is copied is what is asked for.
    lookup, word = tables.lookup.data, words.data
    frequency, first = tables.whole_frequency.data, tables.whole_first.data
    lanes, width = len(moved), tables.width
    for index, which in enumerate(table.tolist()):
        state = moved[index % lanes]
        slot = state & (TOTAL - 1)
        symbol = lookup[(which << PRECISION) + slot]
        symbols.append(symbol)
        cell = which * width + symbol
        state = (state >> PRECISION) * frequency[cell] + slot - first[cell]
        if state < LOW:
            if used == len(word):
                raise ValueError("the coded numbers are cut short")
            state = state << 16 | word[used]
            used += 1
        moved[index % lanes] = state
    return np.array(symbols, dtype=np.int16), np.array(moved, dtype=np.int64), used


def class_bits(largest: int) -> NDArray[np.float64]:
    """What a number costs: bits by magnitude and class, `(largest + 1, CLASSES)`, of either sign; within 2 %."""
    return _class_bits(1 << largest.bit_length())[: largest + 1]


@cache
def _class_bits(count: int) -> NDArray[np.float64]:
    magnitude = np.arange(count)[:, None]
    widths = 2.0 ** ((np.arange(WIDTHS) - 12) / 4)
    edges = np.concatenate([[[0.0]], magnitude + 0.5])
    tails = [ndtr(-edges / widths), np.exp(-edges * 2**0.5 / widths) / 2]
    masses = np.concatenate([tail[:-1] - tail[1:] for tail in tails], 1)
    masses[0] *= 2
    reach = np.minimum(np.floor(5 * widths) + 2, WIDEST_ALPHABET)
    share = 1 - 2 * (reach + 1) / TOTAL
    bits = -np.log2(masses * np.tile(share, 2) + 1 / TOTAL)
    return np.where(magnitude > np.tile(reach, 2), ESCAPE_BITS, bits)


def best_classes(histograms: NDArray[np.integer], bits: NDArray[np.float64]) -> tuple[Classes, NDArray[np.float64]]:
    """The class that codes each segment in the fewest bits.

    Args:
        histograms: `(segments, magnitudes)`, how often each magnitude occurs.
        bits: from `class_bits`, for at least as many magnitudes.

    Returns:
        Classes `(segments,)` and the bits that each segment takes in its class, `(segments,)`.
    """
    costs = histograms @ bits[: histograms.shape[1]]
    return costs.argmin(1).astype(np.uint8), costs.min(1)


def lanes_for(count: int) -> int:
    """How many lanes so many numbers go into; each costs 4 bytes."""
    return max(1, min(MOST_LANES, count // NUMBERS_PER_LANE))


def _parts_of(count: int, lanes: int) -> list[slice]:
    """Whole steps of all lanes, few enough that what is in between stays in the cache."""
    size = max(PART // lanes, 1) * lanes
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _read(data: Bytes, count: int) -> tuple[NDArray[np.int64], Numbers, NDArray[np.uint16]]:
    """States, escapes and words; the words are where the data is."""
    lanes, raw = lanes_for(count), np.ascontiguousarray(data).data
    head = 4 + 4 * lanes
    if len(raw) < head or len(raw) % 2:
        raise ValueError("the coded numbers are cut short")
    escapes = int(np.frombuffer(raw, "<u4", 1)[0])
    if escapes > min(count, (len(raw) - head) // 2):
        raise ValueError("the coded numbers are damaged")
    states = np.frombuffer(raw, "<u4", lanes, 4).astype(np.int64)
    numbers = np.frombuffer(raw, "<i2", escapes, head).astype(np.int16)
    return states, numbers, np.frombuffer(raw, "<u2", -1, head + 2 * escapes)


class _Tables:
    """The tables of the classes in use, side by side.

    Attributes:
        reach: by table, the largest magnitude that has a symbol; the symbol of a number is `number + reach`.
        escape: by table, the symbol of all other numbers.
        width: symbols that a table has room for.
        frequency, first: by `table * width + symbol`, slots of the symbol and the first of them.
        whole_frequency, whole_first: the same as integers.
        lookup: by `table * TOTAL + slot`, the symbol.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        if any(not 0 <= which < CLASSES for which in classes):
            raise ValueError("a class is not known")
        used = sorted({int(which) for which in classes})
        lists = [_frequencies(which) for which in used]
        self._of_segments = np.searchsorted(np.array(used, dtype=np.int32), np.array(classes, dtype=np.int32))
        self.escape = np.array([len(frequencies) - 1 for frequencies in lists], dtype=np.int16)
        self.reach = (self.escape - 1) // 2
        self.width = int(self.escape.max(initial=0)) + 1
        padded = np.zeros((len(used), self.width), dtype=np.int64)
        for row, frequencies in zip(padded, lists, strict=True):
            row[: len(frequencies)] = frequencies
        self.whole_frequency = padded.reshape(-1)
        self.whole_first = (np.cumsum(padded, 1) - padded).reshape(-1)
        self.frequency, self.first = self.whole_frequency.astype(np.float64), self.whole_first.astype(np.float64)
        symbols = [np.repeat(np.arange(len(each), dtype=np.int16), each) for each in lists]
        self.lookup = np.concatenate([np.zeros(0, dtype=np.int16), *symbols])

    def of_numbers(self, lengths: Sequence[int]) -> _OfNumbers:
        """The table of every number."""
        self._check(lengths)
        return _OfNumbers(self._of_segments.astype(np.uint8), lengths)

    def fewest_bits(self, lengths: Sequence[int]) -> float:
        """What so many numbers take at least, all of them the commonest of their class."""
        self._check(lengths)
        common = self.whole_frequency.reshape(-1, self.width).max(1, initial=1)
        return float(np.dot(np.log2(TOTAL / common)[self._of_segments], np.array(lengths, dtype=np.float64)))

    def _check(self, lengths: Sequence[int]) -> None:
        if len(lengths) != len(self._of_segments):
            raise ValueError(f"{len(lengths)} segments, but {len(self._of_segments)} classes")

    def cells(self, numbers: Numbers, table: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where the symbols of numbers are in `frequency`, and which numbers are escapes."""
        reach = self.reach[table]
        escaped = np.flatnonzero(np.abs(numbers) > reach)
        symbols = numbers + reach
        symbols[escaped] = self.escape[table[escaped]]
        return table * np.intp(self.width) + symbols, escaped


class _OfNumbers:
    """A value for each number, the same in a segment, told for a part of the numbers at a time.

    Attributes:
        size: how many numbers there are.
    """

    def __init__(self, values: NDArray[np.uint8], lengths: Sequence[int]) -> None:
        self._values, self._ends = values, np.cumsum(np.array(lengths, dtype=np.int64))
        self.size = int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        first, last = np.searchsorted(self._ends, [part.start, part.stop - 1], "right")
        inside = np.minimum(self._ends[first : last + 1], part.stop) - part.start
        return np.repeat(self._values[first : last + 1], np.diff(inside, prepend=0))


@cache
def _frequencies(which: int) -> tuple[int, ...]:
    """Slots of the symbols of a class, `TOTAL` in all: numbers -reach .. reach, then the escape."""
    exponential, index = divmod(which, WIDTHS)
    # Decimal roots and exponentials are correctly rounded, thus the same everywhere; those of a processor are not.
    with localcontext(ARITHMETIC):
        width = (Decimal(2) ** (index - 12)).sqrt().sqrt()
        masses = (_exponential if exponential else _gaussian)(width, min(int(5 * width) + 2, WIDEST_ALPHABET))
        scale = (TOTAL - 2 * len(masses)) / (2 * sum(masses) - masses[0])
        half = [1 + int(mass * scale) for mass in masses]
    half[0] += TOTAL - 1 - (2 * sum(half) - half[0])
    return (*half[:0:-1], *half, 1)


def _exponential(width: Decimal, reach: int) -> list[Decimal]:
    """Masses of 0 .. reach of a two-sided exponential of this standard deviation, over unit cells."""
    rate = Decimal(2).sqrt() / width
    step = (-rate).exp()
    masses = [1 - (-rate / 2).exp(), (-rate / 2).exp() * (1 - step) / 2]
    for _ in range(reach - 1):
        masses.append(masses[-1] * step)
    return masses


def _gaussian(width: Decimal, reach: int) -> list[Decimal]:
    """Masses of 0 .. reach of a Gaussian of this standard deviation, over unit cells, by Simpson's rule."""
    cuts = 16 if width < 2 else 2
    points = [Decimal(index) / (cuts * width) for index in range(cuts * reach + cuts // 2 + 1)]
    density = [(-point * point / 2).exp() for point in points]
    weights = [1, *([4, 2] * (cuts // 2 - 1)), 4, 1]

    def mass(lowest: int) -> Decimal:
        part = [density[abs(index)] for index in range(lowest, lowest + cuts + 1)]
        return sum((weight * value for weight, value in zip(weights, part, strict=True)), Decimal(0))

    return [mass(cuts * number - cuts // 2) for number in range(reach + 1)]
