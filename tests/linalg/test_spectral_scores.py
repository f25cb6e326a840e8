"""Scores of rows and columns against a full decomposition; blocks, ties, and labels in few bytes."""

from __future__ import annotations

import pytest
import torch

from surgery.linalg import spectral_scores as spectral
from surgery.linalg.single_spectrum import single_spectrum
from surgery.linalg.spectral_scores import (
    block_labels,
    pack_labels,
    packed_length,
    part_sizes,
    spectral_scores,
    unpack_labels,
)
from tests.helpers.smoa_reference import parts_of, score


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return score(U, S), score(Vh.T, S)


@pytest.mark.parametrize("shape", [(9, 9), (40, 17), (17, 40), (600, 33), (33, 1100), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_full_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(*shape).to(dtype)
    for found, wanted in zip(spectral_scores(weight), full(weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_rank_deficient_weight_has_the_same_scores(shape: tuple[int, int]) -> None:
    weight = drawn(shape[0], 3) @ drawn(3, shape[1], seed=1)
    for found, wanted in zip(spectral_scores(weight), full(weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_has_no_energy_has_the_score_zero() -> None:
    weight = drawn(12, 8)
    weight[3], weight[7, :], weight[:, 2] = 0, 1e-30, 0
    rows, columns = spectral_scores(weight)
    assert rows[3] == rows[7] == columns[2] == 0
    assert (rows > 0).sum() == 10 and (columns > 0).sum() == 7
    rows, columns = spectral_scores(torch.zeros(4, 6))
    assert not rows.any() and not columns.any()


def test_a_view_and_its_transpose_have_each_others_scores() -> None:
    weight = drawn(20, 30)
    for turned in (weight.T, weight.T.contiguous()):
        rows, columns = spectral_scores(turned)
        expected_columns, expected_rows = spectral_scores(weight)
        torch.testing.assert_close(rows, expected_rows)
        torch.testing.assert_close(columns, expected_columns)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(31, 23), (23, 31), (10, 10)])
def test_blocks_are_those_of_the_reference(shape: tuple[int, int], groups: int) -> None:
    weight = drawn(*shape, seed=groups)
    labels = [block_labels(each, groups) for each in spectral_scores(weight)]
    for number, (rows, columns) in enumerate(parts_of(weight, groups)):
        for found, wanted in zip(labels, (rows, columns), strict=True):
            assert torch.equal((found == number).nonzero().flatten(), wanted.sort().values)


def test_ties_are_sorted_by_index() -> None:
    """Equal rows, and singular values that are all equal: rounding must not decide."""
    row = drawn(1, 40)
    rows, _ = spectral_scores(torch.cat([row, drawn(6, 40, seed=1), row.repeat(9, 1)]))
    tied = [0, *range(7, 16)]
    assert torch.allclose(rows[tied], rows[0].expand(10))
    labels = block_labels(rows, 16)
    assert [int(labels[index]) for index in tied] == sorted(int(labels[index]) for index in tied)
    orthogonal = torch.linalg.qr(drawn(12, 12, seed=3))[0]
    for weight in (torch.eye(12), orthogonal, -2.5 * orthogonal):
        for scores in spectral_scores(weight):
            assert torch.allclose(scores, torch.full_like(scores, 5.5))
            assert block_labels(scores, 3).tolist() == sorted([0, 1, 2] * 4)


def falling(rows: int, columns: int, outliers: int = 0) -> torch.Tensor:
    """A weight whose singular values fall by 10, below outliers of 30 to 60 times the largest of these."""
    size = min(rows, columns)
    U, V = (torch.linalg.qr(drawn(side, size, seed=side)).Q for side in (rows, columns))
    values = torch.linspace(1, 0.1, size, dtype=torch.float64)
    values[:outliers] *= torch.linspace(60, 30, outliers, dtype=torch.float64)
    return (U * values) @ V.T


@pytest.mark.parametrize("outliers", [0, 1, 9])
@pytest.mark.parametrize(("shape", "dtype"), [((600, 520), torch.float32), ((520, 1100), torch.bfloat16)])
def test_large_weights_are_decomposed_in_float32(
    shape: tuple[int, int], dtype: torch.dtype, outliers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are right to the stated tolerance; outliers in the spectrum are no harm."""
    made: list[torch.Tensor | None] = []
    monkeypatch.setattr(
        spectral, "single_spectrum", lambda gram: made.append(single_spectrum(gram)) or made[-1]
    )  # fmt: skip
    weight = falling(*shape, outliers=outliers).to(dtype)
    found, exact = spectral_scores(weight), spectral_scores(weight, exact=True)
    assert [vectors is not None and vectors.dtype == torch.float32 for vectors in made] == [True]
    for ours, theirs, wanted in zip(found, exact, full(weight), strict=True):
        torch.testing.assert_close(theirs, wanted, rtol=1e-8, atol=1e-7)
        assert 0 < float((ours - wanted).abs().max()) < spectral.TOLERANCE * min(shape)


def test_what_float32_cannot_tell_is_decomposed_in_float64() -> None:
    """A degenerate spectrum, one without scale, a column of almost no energy."""
    orthogonal, steep, faint = torch.linalg.qr(drawn(512, 512)).Q, falling(512, 512), falling(600, 512)
    steep = steep * torch.logspace(0, -6, 512, dtype=torch.float64)
    faint[:, 7] *= 1e-3
    low = drawn(600, 3) @ drawn(3, 512, seed=1)
    for weight in (orthogonal, steep, faint, low):
        for found, exact in zip(spectral_scores(weight), spectral_scores(weight, exact=True), strict=True):
            assert torch.equal(found, exact)
    assert torch.allclose(spectral_scores(orthogonal)[0], torch.tensor(255.5, dtype=torch.float64))
    zero = torch.zeros(512, 512)
    assert not any(scores.any() for scores in spectral_scores(zero))


def test_parts_are_those_of_tensor_split() -> None:
    for count in (5, 7, 12):
        for groups in (1, 2, 3, 5):
            assert part_sizes(count, groups) == [len(part) for part in torch.arange(count).tensor_split(groups)]


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 16, 129, 40_000])
def test_labels_come_back_from_few_bytes(groups: int) -> None:
    for count in (1, 30, 31, 32, 1000):
        labels = torch.randint(groups, (count,), generator=torch.Generator().manual_seed(count))
        words = pack_labels(labels, groups)
        assert words.dtype == torch.int32 and words.numel() == packed_length(count, groups) and bool((words >= 0).all())
        assert torch.equal(unpack_labels(words, count, groups), labels)
    # A bit for each label at two groups, and a remainder: 4096 rows and 4096 columns take 1,060 bytes.
    assert packed_length(8192, 2) * 4 == 1060


@pytest.mark.parametrize("words", [[-1, 0], [2**31 - 1, 2**30], [0], [0, 0, 0]])
def test_words_that_are_no_labels_are_refused(words: list[int]) -> None:
    with pytest.raises(ValueError, match="40 labels below 2"):
        unpack_labels(torch.tensor(words, dtype=torch.int32), 40, 2)
