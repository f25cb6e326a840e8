"""The best `U X V^T` for a weight change, where X has a diagonal and a few other entries, the same ones in all layers.

`||(dW - U X V^T) C^(1/2)||` is a least-squares problem in the entries of X: with `G_u = U^T U`, `G_v = V^T C V` and
`H = U^T dW C V` its normal equations are `G_u X G_v = H` on the support. Neither U's columns nor V's are orthogonal,
so they are solved by conjugate gradients, each row of X preconditioned by its own small system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["Problem", "RoleFit", "fit_role", "solved"]

# The pattern grows in so many steps: what the entries of one step explain is left to them before the next is chosen.
STAGES = 4
SURPLUS = 1.0  # of the entries wanted; the weakest are given up again
ROUGH, FINE = 20, 150  # iterations while the pattern grows, and at the end
TOLERANCE = 1e-4  # of the solution's norm in the metric: 1e-8 of what it holds
# Rows of more entries than this are preconditioned by their diagonal alone.
LONGEST_BLOCK = 64
RIDGE = 1e-12


@dataclass(frozen=True)
class Problem:
    """The least-squares problem of one layer, float64.

    Attributes:
        U: `(out, n)`; a column of zeros where the layer has no part in a direction.
        right: `G_v = V^T C V (n, n)`.
        target: `H = U^T dW C V (n, n)`.
        energy: `||dW C^(1/2)||^2`.
    """

    U: torch.Tensor
    right: torch.Tensor
    target: torch.Tensor
    energy: float

    @cached_property
    def left(self) -> torch.Tensor | None:
        """`G_u = U^T U (n, n)`, or None where products with U itself are cheaper: it has few rows."""
        rows, columns = self.U.shape
        return self.U.T @ self.U if 3 * rows >= 2 * columns else None

    @cached_property
    def norms(self) -> torch.Tensor:
        """Squared norms of U's columns `(n,)`: of the rows of X, those above zero do something."""
        return self.U.square().sum(0)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """`(n, n)`: squared norm of what each entry of X is multiplied by."""
        return self.norms[:, None] * self.right.diagonal()

    def image(self, X: torch.Tensor) -> torch.Tensor:
        """`G_u X G_v`, `(n, n)`."""
        if self.left is not None:
            return self.left @ X @ self.right
        return self.U.T @ (self.U @ X @ self.right)

    def residual(self, X: torch.Tensor) -> torch.Tensor:
        """What of H a solution leaves, `(n, n)`."""
        return self.target - self.image(X)

    def lost(self, X: torch.Tensor) -> float:
        """`||(dW - U X V^T) C^(1/2)||^2`."""
        return max(self.energy - float((X * (self.target + self.residual(X))).sum()), 0.0)

    def gains(self, X: torch.Tensor) -> torch.Tensor:
        """By how much each entry alone would lower what a solution loses, `(n, n)`."""
        sizes = self.sizes
        return torch.where(sizes > 0, self.residual(X).square() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)


@dataclass
class RoleFit:
    """The fit of all layers of one role.

    Attributes:
        positions: sorted places `row * n + column` of the entries off the diagonal, int64.
        diagonals: of X, `(n,)` for each layer.
        values: of the entries, `(count,)` for each layer.
        lost: squared norm that is not held, over all layers.
    """

    positions: torch.Tensor
    diagonals: list[torch.Tensor]
    values: list[torch.Tensor]
    lost: float


def fit_role(count: int, layers: int, problem: Callable[[int], Problem]) -> RoleFit:
    """Fit the diagonal of X and `count` entries off it to all layers of a role.

    Two patterns are tried, and the better one is kept: the entries that explain most, and those that explain most with
    every row taking about equally many. Where inputs have one strong direction in common, the first crowds into what
    belongs to it.

    Args:
        count: entries off the diagonal, in the same places in all layers.
        layers: how many there are.
        problem: makes the problem of one of them; called again and again, so that one is held at a time.
    """
    roles = [_grown(count, layers, problem, evenly) for evenly in (False, True)[: 2 if count else 1]]
    best = min(roles, key=lambda role: role.lost)
    best.solve(FINE)
    return best.fit()


@dataclass
class _Role:
    """The layers of a role and the solution on a support that they share.

    Attributes:
        places: of the support, the diagonal first.
        found: X there, for each layer.
        gains: `(n, n)`, what each entry off the support would gain, over all layers.
        worth: what each entry of the support holds by itself, over all layers.
        lost: squared norm that is not held, over all layers.
    """

    layers: int
    problem: Callable[[int], Problem]
    size: int
    places: torch.Tensor
    found: list[torch.Tensor]
    gains: torch.Tensor
    worth: torch.Tensor
    lost: float = 0.0

    @classmethod
    def with_diagonal(cls, layers: int, problem: Callable[[int], Problem]) -> _Role:
        """Nothing but a diagonal of zeros."""
        first = problem(0).right
        size = first.shape[0]
        places = torch.arange(size, device=first.device) * (size + 1)
        zeros = torch.zeros_like(first.diagonal())
        return cls(layers, problem, size, places, [zeros] * layers, torch.zeros_like(first), zeros)

    def grow(self, count: int, evenly: bool) -> None:
        """Take in the entries that gain most."""
        more = _chosen(self.gains, self.places, count, evenly)
        self.places = torch.cat([self.places, more])
        self.found = [torch.cat([values, torch.zeros_like(more, dtype=values.dtype)]) for values in self.found]

    def prune(self, count: int) -> None:
        """Keep the diagonal and the `count` entries that hold most."""
        best = self.worth[self.size :].topk(count).indices + self.size
        kept = torch.cat([torch.arange(self.size, device=best.device), best])
        self.places, self.found = self.places[kept], [values[kept] for values in self.found]

    def solve(self, iterations: int) -> None:
        """Fit every layer on the support, from what it has."""
        self.gains, self.worth, self.lost = torch.zeros_like(self.gains), torch.zeros_like(self.found[0]), 0.0
        support = torch.zeros_like(self.gains, dtype=torch.bool).flatten().index_fill(0, self.places, True)
        for layer in range(self.layers):
            work = self.problem(layer)
            X = _matrix(self.found[layer], self.places, self.size)
            X = solved(work, support.view_as(X), X, iterations)
            self.found[layer] = X.flatten()[self.places]
            self.gains += work.gains(X)
            self.worth += (X.square() * work.sizes).flatten()[self.places]
            self.lost += work.lost(X)

    def fit(self) -> RoleFit:
        """What there is, with its places in order."""
        off = torch.sort(self.places[self.size :])
        values = [each[self.size :][off.indices] for each in self.found]
        return RoleFit(off.values, [each[: self.size] for each in self.found], values, self.lost)


def _grown(count: int, layers: int, problem: Callable[[int], Problem], evenly: bool) -> _Role:
    """The support of one kind, roughly fitted."""
    role = _Role.with_diagonal(layers, problem)
    size = role.size
    if count:
        # More than are kept: what is chosen first is not always what is wanted beside the rest.
        most = min(count + int(SURPLUS * count), size * (size - 1))
        stages = min(STAGES, most)
        role.solve(ROUGH)
        for stage in range(stages):
            role.grow(most * (stage + 1) // stages - most * stage // stages, evenly)
            role.solve(ROUGH)
        role.prune(count)
    role.solve(ROUGH)
    return role


def _matrix(values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    empty = torch.zeros(size * size, dtype=torch.float64, device=values.device)
    return empty.scatter_(0, places, values.double()).reshape(size, size)


def _chosen(score: torch.Tensor, taken: torch.Tensor, count: int, evenly: bool) -> torch.Tensor:
    """The places of the highest scores that are not taken yet; `evenly`: first of those highest in their own row."""
    size = score.shape[0]
    score = score.flatten().index_fill(0, taken, -1.0).reshape(size, size)
    if evenly:
        each = min(-(-count // size), size)
        best = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(each, 1).indices, True)
        # Others only where there are not enough of these.
        score = torch.where(best & (score >= 0), score + float(score.max()) + 1, score)
    return score.flatten().topk(count).indices


def solved(problem: Problem, support: torch.Tensor, X: torch.Tensor, iterations: int) -> torch.Tensor:
    """Solve the normal equations on a support by preconditioned conjugate gradients.

    Args:
        problem: the layer's.
        support: `(n, n)`, bool.
        X: a first guess, on the support.
        iterations: at most.

    Returns:
        X `(n, n)`, zero off the support and in rows that do nothing.
    """
    support = support & (problem.norms > 0)[:, None]
    precondition = _row_blocks(problem, support)
    X = X * support
    R = problem.residual(X) * support
    Z = precondition(R)
    direction, product = Z, float((R * Z).sum())
    least = TOLERANCE**2 * float((problem.target * support * precondition(problem.target * support)).sum())
    for _ in range(iterations):
        if product <= least:
            break
        image = problem.image(direction) * support
        step = product / float((direction * image).sum())
        X, R = X + step * direction, R - step * image
        Z = precondition(R)
        before, product = product, float((R * Z).sum())
        direction = Z + product / before * direction
    return X


def _row_blocks(problem: Problem, support: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of the problem with G_u cut to its diagonal: one small system for each row of X."""
    sizes = problem.norms
    diagonal = problem.sizes
    inverse = torch.where(support & (diagonal > 0), 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny), 0.0)
    counts = support.sum(1)
    rows = ((counts > 0) & (counts <= LONGEST_BLOCK)).nonzero()[:, 0]
    if not len(rows):
        return lambda R: R * inverse
    width = int(counts[rows].max())
    # The columns of each row's entries, then others that fill it up and are left alone.
    columns = support[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    real = (torch.arange(width, device=rows.device) < counts[rows, None]).double()
    blocks = problem.right[columns[:, :, None], columns[:, None, :]] * sizes[rows, None, None]
    blocks = blocks * real[:, :, None] * real[:, None, :]
    ridge = RIDGE * blocks.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    blocks.diagonal(dim1=1, dim2=2).add_(torch.where(real > 0, ridge, 1.0))
    inverses = torch.linalg.inv(blocks)

    def apply(R: torch.Tensor) -> torch.Tensor:
        result = R * inverse
        inner = R[rows[:, None], columns] * real
        result[rows] = 0.0
        result[rows[:, None], columns] = (inverses @ inner[:, :, None])[:, :, 0] * real
        return result

    return apply
