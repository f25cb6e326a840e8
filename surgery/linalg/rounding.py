"""One layer's low-rank weight change as integers, at a given error in each number.

That error, D, sets the step of every column, `D = pivot * step^2 / 12`, so that strong directions get many bits and
weak ones few; the price of a bit, `2 ln(2) D`, at which rounding trades error for bits; and which directions are worth
their bits at all (reverse water-filling). Then, in turn, each factor is the best one for the other as it is rounded, by
a small linear system, and is rounded itself, with feedback of errors and with the price of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.linalg.coded import CodedFactors, code_bits, rounded_scales
from surgery.linalg.entropy import WIDTHS, class_bits
from surgery.linalg.feedback import Curvature, RoundingRule
from surgery.linalg.metric import metric_svd

__all__ = ["LIMITS", "Coded", "Factors", "Spectrum", "code_layer", "spectrum_of"]

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r), A (r, in)
Curves = tuple[Curvature, Curvature]  # of the inputs, of the outputs
Matrix = NDArray[np.float64]

SWEEPS = 3
# A rank's two classes and its scale, as they are coded.
RANK_BITS = 20
LARGEST_CODE = 4095
# By bits of a code: the step, in standard deviations, and the squared error, in variances, of the best uniform
# quantiser with 2^bits - 1 levels on a Gaussian. With so few levels a finer step would only clip.
LIMITS = {None: (0.0015, 2e-7), 2: (1.224, 0.190), 3: (0.651, 0.0469), 4: (0.353, 0.0132), 8: (0.0309, 1.1e-4)}
MOST_RESTORED = 1.5


@dataclass(frozen=True)
class Spectrum:
    """What the search knows of a layer between passes.

    Attributes:
        left, right: the singular directions in terms of the factors, `(r, k)` and `(k, r)`.
        energy: squared singular values `(k,)`.
        variance: of the numbers of B's columns and A's rows, what they would count if they were all lost, `(2, k)`.
        sizes: out and in.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: Matrix
    variance: Matrix
    sizes: tuple[int, int]

    def plan(self, D: float, bits: int | None) -> tuple[int, float, float]:
        """For an error D in each number: how many ranks are worth their bits, what those take, and what is lost."""
        floor = 0.0 if bits is None else LIMITS[bits][1]
        numbers = np.array(self.sizes)[:, None]
        noise = np.maximum(D, self.variance * floor)
        rate = 0.5 * np.log2(1 + self.variance / noise)
        lost = (numbers * noise * self.variance / (noise + self.variance)).sum(0)
        spent = (numbers * rate).sum(0) + RANK_BITS
        worth = self.energy - lost > 2 * math.log(2) * D * spent
        rank = int(np.logical_and.accumulate(worth).sum())
        return rank, float(spent[:rank].sum()), float(lost[:rank].sum() + self.energy[rank:].sum())


@dataclass(frozen=True)
class Coded:
    """A layer's factors, what they take (bits), and the error in the metric."""

    factors: CodedFactors
    bits: float
    error: float


def spectrum_of(layer: Factors, curves: Curves) -> Spectrum:
    """Singular values and directions of a layer's change in the metric."""
    B, A = (factor.double() for factor in layer)
    inputs, outputs = curves
    svd = metric_svd(B, A, outputs.product(B, B), inputs.product(A.T, A.T))
    energy = svd.S.square().numpy()
    sides = (
        (B @ svd.left).square().mean(0).numpy() * outputs.pivot,
        (svd.right @ A).square().mean(1).numpy() * inputs.pivot,
    )
    return Spectrum(svd.left, svd.right, energy, energy * np.stack(sides), (B.shape[0], A.shape[1]))


def code_layer(
    layer: Factors,
    spectrum: Spectrum,
    curves: Curves,
    rank: int,
    D: float,
    *,
    bits: int | None = None,
    fineness: int = 9,
    restored: float = 1.0,
) -> Coded | None:
    """Round the leading `rank` directions of a layer.

    Args:
        layer: `B (out, r)` and `A (r, in)`.
        spectrum: of this layer, from `spectrum_of`.
        curves: the moments of the inputs and of the gradients at the outputs.
        rank: at least 1.
        D: squared error in each number.
        bits: limits the codes.
        fineness: how many scales there are to the octave, as a binary logarithm.
        restored: see `surgery.linalg.compress.compress`.

    Returns:
        The sweep that cost least in error and bits; None if nothing but zeros is left.
    """
    return _LayerCoder(layer, spectrum, curves, rank, D, bits, fineness).best(restored)


class _LayerCoder:
    """One layer at one D.

    The change is `W_B W_A` with both factors scaled so that errors of B and of A count alike. In turn each factor is
    the best one for the other as it is rounded (a small linear system), and is rounded itself.
    """

    def __init__(
        self,
        layer: Factors,
        spectrum: Spectrum,
        curves: tuple[Curvature, Curvature],
        rank: int,
        D: float,
        bits: int | None,
        fineness: int,
    ) -> None:
        self.inputs, self.outputs = curves
        root = torch.from_numpy(spectrum.energy[:rank] ** 0.25)
        self.B = layer[0].double() @ spectrum.left[:, :rank] * root
        self.A = root[:, None] * (spectrum.right[:rank] @ layer[1].double())
        self.energy, self.price, self.fineness = float(spectrum.energy.sum()), 2 * math.log(2) * D, fineness
        self.kept = float(spectrum.energy[:rank].sum())
        strength = spectrum.energy[:rank] ** 0.5
        least, _ = LIMITS[bits]
        self.largest = LARGEST_CODE if bits is None else 2 ** (bits - 1) - 1
        step_B, step_A = (
            np.maximum(np.sqrt(12 * D / (strength * curve.pivot)), least * columns.square().mean(0).sqrt().numpy())
            for curve, columns in ((self.outputs, self.B), (self.inputs, self.A.T))
        )
        # The product is what is stored.
        self.steps = step_B, rounded_scales(step_B * step_A, fineness) / step_B

    def best(self, restored: float) -> Coded | None:
        """The sweep that cost least in error and bits; None if nothing but zeros is left."""
        found: list[tuple[float, Coded]] = []
        A = self.A
        class_B: NDArray[np.uint8] | None = None
        class_A: NDArray[np.uint8] | None = None
        step_B, step_A = self.steps
        for _ in range(SWEEPS):
            G = self.inputs.product(A.T, A.T)
            targets = self.B @ self.inputs.product(self.A.T, A.T) @ _inverse(G)
            codes_B = self._rounded(self.outputs, targets, G, step_B, class_B)
            kept = codes_B.any(0)
            codes_B, step_B, step_A = codes_B[:, kept], step_B[kept], step_A[kept]
            B = torch.from_numpy(codes_B * step_B)
            G = self.outputs.product(B, B)
            targets = (_inverse(G) @ self.outputs.product(B, self.B) @ self.A).T
            codes_A = self._rounded(self.inputs, targets, G, step_A, None if class_A is None else class_A[kept])
            kept = codes_A.any(0)
            codes_B, codes_A, step_B, step_A = codes_B[:, kept], codes_A[:, kept], step_B[kept], step_A[kept]
            if not kept.any():
                break
            A = torch.from_numpy((codes_A * step_A).T)
            (class_B, bits_B), (class_A, bits_A) = code_bits(codes_B), code_bits(codes_A)
            s, error = self._scaled(codes_B, codes_A, step_B * step_A, restored)
            factors = CodedFactors(codes_B.astype(np.int16), codes_A.T.astype(np.int16), s)
            bits = float(bits_B.sum() + bits_A.sum()) + RANK_BITS * len(s)
            found.append((error + self.price * bits, Coded(factors, bits, error)))
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def _rounded(
        self, curve: Curvature, targets: torch.Tensor, G: torch.Tensor, step: Matrix, classes: NDArray[np.uint8] | None
    ) -> NDArray[np.int32]:
        aims = targets.numpy() / step
        if classes is None:
            deviation = np.sqrt((aims**2).mean(0)).clip(1e-9)
            classes = np.rint(4 * np.log2(deviation) + 12).clip(0, WIDTHS - 1).astype(np.uint8)
        reach = min(self.largest, 2 * int(np.abs(aims).max(initial=0)) + 7)
        rule = RoundingRule(G.diagonal().numpy() * step**2, self.price * class_bits(reach)[:, classes])
        return curve.rounded(aims, rule).astype(np.int32)

    def _scaled(
        self, codes_B: NDArray[np.int32], codes_A: NDArray[np.int32], s: Matrix, restored: float
    ) -> tuple[Matrix, float]:
        """The scales, and the error with them."""
        B, A = torch.from_numpy(codes_B.astype(np.float64)), torch.from_numpy(codes_A.astype(np.float64))
        cross = (self.outputs.product(self.B, B) * self.inputs.product(self.A.T, A)).sum(0).numpy()
        own = (self.outputs.product(B, B) * self.inputs.product(A, A)).numpy()
        projection = float(cross @ s)
        if projection > 0:
            gain = min(self.energy / projection, MOST_RESTORED) ** restored
            s = rounded_scales(s * gain, self.fineness)
        return s, max(self.energy - 2 * float(cross @ s) + float(s @ own @ s), 0.0)


def _inverse(G: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(G, rtol=1e-9, hermitian=True)
