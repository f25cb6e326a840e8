"""The entropy coder against a decoder of one number at a time, ideal sizes, and damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from surgery.codec import entropy
from surgery.codec.entropy import CLASSES, LARGEST, WIDTHS, best_classes, class_bits, decode, encode, lanes_for

GAUSSIAN, EXPONENTIAL = 20, WIDTHS + 20  # of width 4


def width(which: int) -> float:
    return 2.0 ** ((which % WIDTHS - 12) / 4)


def draw(which: int, count: int, seed: int = 0) -> NDArray[np.int16]:
    """Numbers of a class's distribution."""
    rng = np.random.default_rng([seed, which])
    if which < WIDTHS:
        numbers = rng.normal(0, width(which), count)
    else:
        numbers = rng.laplace(0, width(which) / math.sqrt(2), count)
    return np.rint(numbers).clip(-LARGEST, LARGEST).astype(np.int16)


def mass(which: int, number: int) -> float:
    """Probability of the unit cell around a number, by the textbook formulas."""
    low, high = abs(number) - 0.5, abs(number) + 0.5
    if which < WIDTHS:
        return (math.erfc(low / width(which) / math.sqrt(2)) - math.erfc(high / width(which) / math.sqrt(2))) / 2
    rate = math.sqrt(2) / width(which)
    if number == 0:
        return 1 - math.exp(-rate / 2)
    return (math.exp(-rate * low) - math.exp(-rate * high)) / 2


def coded_size(numbers: NDArray[np.int16], which: int) -> float:
    """Bytes without the head; of the states what they hold beyond what they began with."""
    data = encode(numbers, [numbers.size], [which])
    lanes = lanes_for(numbers.size)
    states = np.frombuffer(data.tobytes(), "<u4", lanes, 4)
    return data.size - 4 - 4 * lanes + float((np.log2(states) - 16).sum()) / 8


@pytest.fixture(name="quick")
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """More lanes take fewer steps."""
    monkeypatch.setattr(entropy, "NUMBERS_PER_LANE", 50)


def decoded_one_by_one(data: NDArray[np.uint8], lengths: list[int], classes: list[int]) -> list[int]:
    """What the layout says, in Python's integers, with lists searched through."""
    tables = [
        entropy._frequencies(which) for which, length in zip(classes, lengths, strict=True) for _ in range(length)
    ]
    raw, lanes = data.tobytes(), lanes_for(len(tables))
    escapes = int.from_bytes(raw[:4], "little")
    states = [int.from_bytes(raw[4 + 4 * lane : 8 + 4 * lane], "little") for lane in range(lanes)]
    start = 4 + 4 * lanes
    numbers = [int.from_bytes(raw[start + 2 * i : start + 2 * i + 2], "little", signed=True) for i in range(escapes)]
    start += 2 * escapes
    words = [int.from_bytes(raw[at : at + 2], "little") for at in range(start, len(raw), 2)]
    result = []
    for index, table in enumerate(tables):
        lane = index % lanes
        slot, symbol, first = states[lane] % 2**14, 0, 0
        while first + table[symbol] <= slot:
            first += table[symbol]
            symbol += 1
        states[lane] = table[symbol] * (states[lane] // 2**14) + slot - first
        if states[lane] < 2**16:
            states[lane] = states[lane] * 2**16 + words.pop(0)
        result.append(numbers.pop(0) if symbol == len(table) - 1 else symbol - (len(table) - 2) // 2)
    assert not words and not numbers and set(states) == {2**16}
    return result


@pytest.mark.parametrize("which", range(CLASSES))
def test_tables_are_the_distributions(which: int) -> None:
    table = entropy._frequencies(which)
    reach = (len(table) - 2) // 2
    assert sum(table) == 2**14 and min(table) >= 1 and len(table) % 2 == 0
    assert table[:-1] == table[-2::-1]  # symmetric; the last is the escape
    assert 5 * width(which) <= reach + 1 or reach == entropy.WIDEST_ALPHABET
    scale = (2**14 - 2 * (reach + 1)) / sum(mass(which, number) for number in range(-reach, reach + 1))
    wanted = [1 + mass(which, number) * scale for number in range(-reach, reach + 1)]
    wrong = np.abs(np.array(table[:-1]) - wanted)
    wrong[reach] -= 2 * reach + 2  # what rounding down leaves goes to 0
    assert wrong.max() <= 1 + 1e-6


def test_all_classes_come_back() -> None:
    lengths = [0 if which % 17 == 3 else 300 + which for which in range(CLASSES)]
    numbers = np.concatenate([draw(which, length) for which, length in enumerate(lengths)])
    data = encode(numbers, lengths, range(CLASSES))
    assert data.dtype == np.uint8
    found = decode(data, lengths, range(CLASSES))
    assert found.dtype == np.int16 and (found == numbers).all()


@pytest.mark.parametrize("which", range(0, CLASSES, 11))
def test_a_decoder_of_one_number_at_a_time_reads_it(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "NUMBERS_PER_LANE", 100)
    classes, lengths = [which, GAUSSIAN], [333, 70]
    numbers = np.concatenate([draw(which, 333), draw(EXPONENTIAL, 70) * 9])  # the last ones far too wide
    data = encode(numbers, lengths, classes)
    assert decoded_one_by_one(data, lengths, classes) == numbers.tolist()
    with pytest.raises((AssertionError, IndexError)):  # control: another table
        decoded_one_by_one(data, lengths, [which, GAUSSIAN + 8])


@pytest.mark.parametrize("which", [0, GAUSSIAN, WIDTHS - 1, WIDTHS, EXPONENTIAL, CLASSES - 1])
def test_escapes(which: int) -> None:
    reach = (len(entropy._frequencies(which)) - 2) // 2
    edge = [0, reach, -reach, min(reach + 1, LARGEST), -reach - 1, LARGEST, -LARGEST]
    numbers = np.array(edge * 5, dtype=np.int16)
    data = encode(numbers, [numbers.size], [which])
    assert (decode(data, [numbers.size], [which]) == numbers).all()
    assert int.from_bytes(data[:4].tobytes(), "little") == 20


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0], [3, 0, 2]])
def test_few_numbers(lengths: list[int]) -> None:
    numbers = draw(GAUSSIAN, sum(lengths))
    classes = [GAUSSIAN + index for index in range(len(lengths))]
    data = encode(numbers, lengths, classes)
    assert data.size <= 8 + 2 * sum(lengths)
    assert (decode(data, lengths, classes) == numbers).all()


@pytest.mark.parametrize(
    ("count", "per_lane"), [(1, 1), (2, 1), (100, 1), (4097, 1), (9001, 2), (10007, 10), (70001, 7)]
)
def test_many_lanes(count: int, per_lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "NUMBERS_PER_LANE", per_lane)
    monkeypatch.setattr(entropy, "PART", 1 << 12)
    numbers = draw(GAUSSIAN, count)
    assert lanes_for(count) == min(max(count // per_lane, 1), entropy.MOST_LANES)
    assert (decode(encode(numbers, [count], [GAUSSIAN]), [count], [GAUSSIAN]) == numbers).all()


@pytest.mark.parametrize(("count", "lanes"), [(1, 1), (5000, 1), (5003, 3), (9001, 8)])
def test_few_lanes_give_the_same_bytes_by_either_road(count: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "NUMBERS_PER_LANE", count // lanes)
    monkeypatch.setattr(entropy, "PART", 1 << 11)
    numbers = draw(EXPONENTIAL, count)
    numbers[:: max(count // 7, 1)] = LARGEST
    split = [count // 3, count - count // 3], [EXPONENTIAL, GAUSSIAN]
    singly = encode(numbers, *split)
    assert lanes_for(count) == lanes <= entropy.FEW_LANES and (decode(singly, *split) == numbers).all()
    if count > 1:
        with pytest.raises(ValueError, match="cut short"):
            decode(singly[:-2], *split)
    monkeypatch.setattr(entropy, "FEW_LANES", 0)
    side_by_side = encode(numbers, *split)
    assert singly.tobytes() == side_by_side.tobytes() and (decode(side_by_side, *split) == numbers).all()


@pytest.mark.parametrize("which", [4, 12, GAUSSIAN, 30, 40, WIDTHS + 4, WIDTHS + 12, EXPONENTIAL, WIDTHS + 30])
@pytest.mark.usefixtures("quick")
def test_size_is_close_to_the_entropy(which: int) -> None:
    count = 200_000
    numbers = draw(which, count)
    ideal = -sum(math.log2(max(mass(which, int(number)), 1e-300)) for number in numbers) / 8
    taken = coded_size(numbers, which)
    # A slot for every symbol, however rare, costs most where there are many symbols.
    assert taken < (1.005 if width(which) < 30 else 1.02) * ideal + 2
    assert taken > 0.999 * ideal
    # Control: the table of twice the width.
    assert coded_size(numbers, which + 4) > 1.02 * taken


@pytest.mark.usefixtures("quick")
def test_numbers_and_distributions_that_differ_cost_what_they_are_said_to() -> None:
    for which in (8, GAUSSIAN, 33, EXPONENTIAL):
        for coded_as in (which - 2, which + 3, EXPONENTIAL + 2):
            numbers = draw(which, 50_000)
            histogram = np.bincount(np.abs(numbers))
            said = float(histogram @ class_bits(len(histogram) - 1)[:, coded_as]) / 8
            assert said == pytest.approx(coded_size(numbers, coded_as), rel=0.01)


@pytest.mark.usefixtures("quick")
def test_the_best_class_is_the_one_of_the_numbers() -> None:
    drawn = [4, 13, GAUSSIAN, 31, WIDTHS + 13, EXPONENTIAL, WIDTHS + 31]
    numbers = [draw(which, 10_000) for which in drawn]
    largest = max(int(np.abs(part).max()) for part in numbers)
    histograms = np.stack([np.bincount(np.abs(part), minlength=largest + 1) for part in numbers])
    found, bits = best_classes(histograms, class_bits(largest + 100))
    assert np.abs(found.astype(int) - drawn).max() <= 1
    for which, part, said in zip(found, numbers, bits, strict=True):
        sizes = [coded_size(part, other) for other in range(CLASSES)]
        assert sizes[which] <= 1.002 * min(sizes)
        assert said / 8 == pytest.approx(min(sizes), rel=0.01)


def test_what_cannot_be_encoded() -> None:
    numbers = draw(GAUSSIAN, 10)
    with pytest.raises(ValueError, match="10 numbers, but 9"):
        encode(numbers, [4, 5], [GAUSSIAN, GAUSSIAN])
    with pytest.raises(ValueError, match="2 segments, but 1 classes"):
        encode(numbers, [4, 6], [GAUSSIAN])
    for which in (-1, CLASSES):
        with pytest.raises(ValueError, match="class is not known"):
            encode(numbers, [10], [which])
    with pytest.raises(ValueError, match="below -32767"):
        encode(np.array([-32768], dtype=np.int16), [1], [GAUSSIAN])


LENGTHS, KINDS = [150, 0, 90], [GAUSSIAN, 3, EXPONENTIAL]


@pytest.fixture(name="coded", params=[1, 9])
def _coded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[NDArray[np.uint8], int]:
    """Data with two escapes, and how many lanes it has."""
    monkeypatch.setattr(entropy, "NUMBERS_PER_LANE", 240 // request.param)
    numbers = np.concatenate([draw(GAUSSIAN, 150), draw(EXPONENTIAL, 90)])
    numbers[[30, 200]] = -500, 3000
    return encode(numbers, LENGTHS, KINDS), lanes_for(240)


def test_every_changed_byte_is_found(coded: tuple[NDArray[np.uint8], int]) -> None:
    data, lanes = coded
    whole = decode(data, LENGTHS, KINDS)
    head = 4 + 4 * lanes
    for index in range(data.size):
        for flip in (1, 0x80):
            damaged = data.copy()
            damaged[index] ^= flip
            if head <= index < head + 4:  # an escape is written as it is
                try:
                    found = decode(damaged, LENGTHS, KINDS)
                except ValueError:
                    continue
                assert set(np.flatnonzero(found != whole)) <= {30, 200}
            else:
                with pytest.raises(ValueError, match="coded numbers are"):
                    decode(damaged, LENGTHS, KINDS)


def test_cut_and_extended(coded: tuple[NDArray[np.uint8], int]) -> None:
    data, _ = coded
    for size in range(data.size):
        with pytest.raises(ValueError, match="coded numbers are"):
            decode(data[:size], LENGTHS, KINDS)
    for more in (1, 2, 4, 1000):
        with pytest.raises(ValueError, match="coded numbers are"):
            decode(np.concatenate([data, np.zeros(more, np.uint8)]), LENGTHS, KINDS)


def test_other_segments(coded: tuple[NDArray[np.uint8], int]) -> None:
    data, _ = coded
    for lengths in ([150, 0, 89], [150, 1, 90], [0, 0, 0], [10**6, 0, 90]):
        with pytest.raises(ValueError, match="coded numbers are"):
            decode(data, lengths, KINDS)
    with pytest.raises(ValueError, match="class is not known"):
        decode(data, LENGTHS, [GAUSSIAN, CLASSES, EXPONENTIAL])


@pytest.mark.parametrize("size", [0, 2, 8, 64, 300])
def test_random_data(size: int) -> None:
    rng = np.random.default_rng(size)
    for trial in range(100):
        data = rng.integers(0, 256, size, dtype=np.uint8)
        if trial % 2:
            data[:4] = 0  # else the number of escapes gives it away
        with pytest.raises(ValueError, match="coded numbers are"):
            decode(data, LENGTHS, KINDS)


def test_more_numbers_than_the_data_can_hold_are_not_made_room_for() -> None:
    data = encode(np.zeros(100, np.int16), [100], [GAUSSIAN])
    with pytest.raises(ValueError, match="cut short"):
        decode(data, [10**15], [GAUSSIAN])


def test_an_escape_that_has_a_symbol_is_damage() -> None:
    numbers = np.array([0, 9000, 1], dtype=np.int16)
    data = encode(numbers, [3], [GAUSSIAN])
    for value in (5, -5, -32768):
        damaged = data.copy()
        damaged[8:10] = np.frombuffer(np.array([value], "<i2").tobytes(), np.uint8)
        with pytest.raises(ValueError, match="damaged"):
            decode(damaged, [3], [GAUSSIAN])
