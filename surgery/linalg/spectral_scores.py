"""Division of a weight's rows and columns into blocks by where in the spectrum their energy lies (SMoA).

With `W = U diag(s) V^T`, singular values falling, the score of row i is the mean spectral index of its energy,
`sum_j j U_ij^2 s_j^2 / sum_j U_ij^2 s_j^2`; the score of a column is the same with V. Rows and columns are sorted by
score and cut into K consecutive parts each.
"""

from __future__ import annotations

import contextlib

import torch

from surgery.linalg.single_spectrum import single_spectrum
from surgery.linalg.symmetric import add_gram_
from surgery.system.threads import one_torch_thread

__all__ = ["block_labels", "pack_labels", "packed_length", "part_sizes", "spectral_scores", "unpack_labels"]

CHUNK = 512  # rows widened to float64 at a time
SMALL = 1 << 20  # below this many entries one thread is faster than several
# Rows whose norm is this share of the largest are rounding: the eigenvectors say nothing of them.
SILENT = 1e-12
# From so many singular values on float32 is tried; below, float64 takes milliseconds.
LARGE = 512
# Columns whose norm is this share of a typical one, or less, are left to float64.
FAINT = 1e-2
# Error of scores by float32, as a share of the number of singular values.
TOLERANCE = 1e-6
# Scores are compared in steps of this share of one spectral index: what is equal but for rounding is a tie.
STEP = 1e-6
WORD_VALUES = 2**31  # of a non-negative int32


def spectral_scores(weight: torch.Tensor, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the spectral scores of the rows `(out,)` and columns `(in,)` of a weight, float64, on its device.

    One eigendecomposition of the Gram matrix of the smaller side gives the scores of that side; one product with the
    eigenvectors gives those of the other, `W v_j = s_j u_j`. A chunk of rows is widened at a time, so that memory is
    a few matrices of the smaller side. Singular values that are equal but for rounding share their mean index: which
    singular vectors they have is arbitrary. A row or column without energy has the score 0.

    The decomposition of a large Gram matrix is in float32 where that is accurate enough (`single_spectrum`): scores
    are then right to `TOLERANCE` of the number of singular values. All else is in float64.

    Args:
        weight: `(out, in)`, finite, of any floating dtype.
        exact: float64 throughout, for an order that another machine can find again.
    """
    small = weight.device.type == "cpu" and weight.numel() < SMALL
    with one_torch_thread() if small else contextlib.nullcontext():
        if weight.shape[0] >= weight.shape[1]:
            return _tall_scores(weight, exact)
        columns, rows = _tall_scores(weight.T, exact)
        return rows, columns


def _tall_scores(weight: torch.Tensor, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of a weight with at least as many rows as columns."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for chunk in weight.split(CHUNK):
        add_gram_(gram, chunk.double())
    energies = gram.diagonal().clone()
    vectors = None if exact or size < LARGE or _uneven(energies) else single_spectrum(gram)
    if vectors is None:
        values, vectors = torch.linalg.eigh(gram)  # rising, from the lower triangle
        index = _mean_indices(values.clamp_min(0))
    else:
        index = torch.arange(size - 1, -1, -1, dtype=torch.float64, device=weight.device)
    del gram
    parts, norms, values = [], [], torch.zeros_like(index)
    for chunk in weight.split(CHUNK):
        norms.append(chunk.double().square().sum(1))
        squares = (chunk.to(vectors.dtype) @ vectors).double().square_()
        values += squares.sum(0)  # the squared singular values, as |W v_j|^2
        parts.append(_means(squares, index))
    columns = torch.cat([_means(chunk.double().square_().mul_(values), index) for chunk in vectors.split(CHUNK)])
    return _silenced(torch.cat(parts), torch.cat(norms)), _silenced(columns, energies)


def _uneven(energies: torch.Tensor) -> bool:
    """Whether some column, which has energy, has too little for float32."""
    loud = energies[energies > SILENT**2 * energies.max()]
    return bool(loud.numel() == 0 or loud.min() < FAINT**2 * loud.mean())


def _mean_indices(values: torch.Tensor) -> torch.Tensor:
    """The spectral index of each eigenvalue of a rising list, `(n,)` float64; equal ones share their mean index."""
    size = values.numel()
    index = torch.arange(size - 1, -1, -1, dtype=torch.float64, device=values.device)
    if size < 2:
        return index
    same = values.diff() <= size * torch.finfo(torch.float64).eps * values[-1]
    cluster = torch.cat([same.new_zeros(1), ~same]).cumsum(0)
    sums = torch.zeros_like(index).index_add_(0, cluster, index)
    counts = torch.zeros_like(index).index_add_(0, cluster, torch.ones_like(index))
    return (sums / counts.clamp_min(1))[cluster]


def _means(squares: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The mean index of each row's energies, `(n, size)` by singular value."""
    return (squares @ index) / squares.sum(1).clamp_min(torch.finfo(torch.float64).tiny)


def _silenced(scores: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """The scores, 0 where there is no energy."""
    return torch.where(energies > SILENT**2 * energies.max(), scores, 0.0)


def block_labels(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the block of each row (or column), `(n,)` int64 on the CPU: sorted by score, cut into consecutive parts.

    Ties are sorted by index.

    Args:
        scores: `(n,)`.
        groups: K, at most n.
    """
    order = torch.argsort((scores.cpu() / STEP).round(), stable=True)
    sizes = torch.tensor(part_sizes(order.numel(), groups))
    labels = torch.empty_like(order)
    labels[order] = torch.arange(groups).repeat_interleave(sizes)
    return labels


def part_sizes(count: int, groups: int) -> list[int]:
    """`count` divided as evenly as possible, the first parts taking the remainder."""
    return [count // groups + (index < count % groups) for index in range(groups)]


def _digits(groups: int) -> int:
    """How many labels below `groups` go into one non-negative int32."""
    digits = 0
    while groups ** (digits + 1) <= WORD_VALUES:
        digits += 1
    return digits


def packed_length(count: int, groups: int) -> int:
    """Return how many int32 words `pack_labels` gives for `count` labels; none where all labels are the same."""
    return -(-count // _digits(groups)) if groups > 1 else 0


def pack_labels(labels: torch.Tensor, groups: int) -> torch.Tensor:
    """Return labels `0 <= label < groups` as digits of int32 words: at two groups 31 labels in four bytes."""
    if groups == 1:
        return torch.empty(0, dtype=torch.int32)
    digits, words = _digits(groups), packed_length(labels.numel(), groups)
    padded = torch.zeros(words * digits, dtype=torch.int64)
    padded[: labels.numel()] = labels.to("cpu", torch.int64)
    return (padded.view(words, digits) * _powers(groups, digits)).sum(1).to(torch.int32)


def unpack_labels(words: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """Return the `count` labels of `pack_labels`, int64 on the CPU.

    Raises:
        ValueError: no labels give these words.
    """
    if groups == 1:
        return torch.zeros(count, dtype=torch.int64)
    powers = _powers(groups, _digits(groups))
    found = (words.to("cpu", torch.int64)[:, None] // powers) % groups
    labels = found.flatten()[:count]
    if labels.numel() < count or not torch.equal(pack_labels(labels, groups), words.cpu()):
        raise ValueError(f"the words are no {count} labels below {groups}")
    return labels


def _powers(groups: int, digits: int) -> torch.Tensor:
    return torch.tensor([groups**place for place in range(digits)])
