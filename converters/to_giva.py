"""Any adapter to a packed GiVA one: integer factors of few bits, with scales, ranks and bits for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgery.checkpoints.adapter import MODEL_PREFIX, TUNER_PREFIX
from surgery.checkpoints.packing import CODES, FACTORS, PLAIN, SCALES, WIDTHS
from surgery.checkpoints.tensor_files import file_bytes
from surgery.converters.changes import Change, Source
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.errors import MethodError
from surgery.linalg.fixed_width import rounded_columns
from surgery.linalg.metric import MetricSVD

__all__ = ["to_giva"]

SCALE_BYTES = 4


def to_giva(source: Source, request: Request) -> Result:
    """A GiVA adapter `diag(o) B diag(s) A` with o = 1, which is not stored, and packed factors.

    With 16 or 32 bits B and A are floats, with fewer integers; `auto` takes the width whose ranks and rounding together
    lose least.
    Layers that keep nothing leave the target list.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer.
    """
    changes = changes_of(source, request)
    svds = {change.module: decomposed(change, request) for change in changes}
    if request.bits != "auto":
        return _made(source, request, changes, svds, int(request.bits)).result()
    tried = []
    for bits in WIDTHS:
        try:
            tried.append(_made(source, request, changes, svds, bits))
        except MethodError:  # the budget does not hold one direction at this width
            continue
    if not tried:
        return _made(source, request, changes, svds, WIDTHS[0]).result()  # says what would be enough
    return min(tried, key=lambda made: made.lost).result()


@dataclass
class _Made:
    """Factors `B (out, r)`, `A (r, in)` and `s (r,)` by module, and the squared error in the metric."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    bits: int
    lost: float

    def result(self) -> Result:
        """As an adapter."""
        sizes = {
            module: (B.numel() + A.numel()) * self.bits // 8 + 2 * s.numel()
            for module, (B, A, s) in self.factors.items()
        }
        return _result(self.factors, self.bits, dict.fromkeys(self.factors, float(self.bits)), sizes)


def _made(source: Source, request: Request, changes: list[Change], svds: dict[str, MetricSVD], bits: int) -> _Made:
    """Ranks for the budget at one width, and the factors rounded to it."""
    numbers = {change.module: sum(change.shape) for change in changes}
    spectra = Spectra(
        {module: svd.S for module, svd in svds.items()},
        {module: -(-count * bits // 8) + SCALE_BYTES for module, count in numbers.items()},
        dict.fromkeys(numbers, 0),
    )

    def size(ranks: Mapping[str, int]) -> int:
        count = sum(numbers[module] * rank for module, rank in ranks.items())
        name, dtype = (FACTORS, PLAIN[bits]) if bits in PLAIN else (CODES, torch.uint8)
        length = count if bits in PLAIN else -(-count * bits // 8)
        planned = {
            f"{TUNER_PREFIX}{name}": torch.empty(length, dtype=dtype, device="meta"),
            f"{TUNER_PREFIX}{SCALES}": torch.empty(sum(ranks.values()), device="meta"),
        }
        return file_bytes({**source.carried, **planned})

    ranks = spectra.ranks(request, size)
    made = _Made({}, bits, 0.0)
    for change in changes:
        svd, rank = svds[change.module], ranks[change.module]
        if rank:
            B, A = svd.cut(change.B, change.A, rank)
            made.factors[change.module] = _floats(B, A, PLAIN[bits]) if bits in PLAIN else _integers(B, A, bits)
        if bits not in PLAIN:
            made.lost += _lost(change, request, made.factors.get(change.module))
    return made


def _floats(B: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors whose largest entries are 1, as the file holds them, so that what is measured is what is read."""
    in_B, in_A = B.abs().amax(0).clamp_min(1e-30), A.abs().amax(1).clamp_min(1e-30)
    return (B / in_B).to(dtype).float(), (A / in_A[:, None]).to(dtype).float(), in_B * in_A


def _integers(B: torch.Tensor, A: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer factors, and the scale of each rank."""
    codes_B, steps_B = rounded_columns(B, bits)
    codes_A, steps_A = rounded_columns(A.T, bits)
    return codes_B.float(), codes_A.T.contiguous().float(), (steps_B * steps_A).float()


def _lost(change: Change, request: Request, made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None) -> float:
    """`tr(R^T F R C)` of what is missing of one layer; with data in the metric of the whole model."""
    B, A = change.B.double(), change.A.double()
    if made is not None:
        B = torch.cat([B, -made[0].double() * made[2].double()], 1)
        A = torch.cat([A, made[1].double()])
    if request.metric is None:
        return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0))
    full = request.metric.full(change)
    return float(((B.T @ full.F.double() @ B) * (A @ full.C.double() @ A.T)).sum().clamp_min(0))


def _result(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    bits: int | str,
    mean_bits: dict[str, float],
    sizes: dict[str, int],
) -> Result:
    """The adapter of these `B (out, r)`, `A (r, in)` and `s (r,)` by module."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for module, (B, A, s) in factors.items():
        name = f"{MODEL_PREFIX}{module}.giva_"
        tensors.update({f"{name}A": A, f"{name}B": B, f"{name}s": s, f"{name}o": torch.ones(B.shape[0])})
        shapes[module] = [B.shape[0], A.shape[1], A.shape[0]]
    ranks = {module: shape[2] for module, shape in shapes.items()}
    config = {
        "peft_type": "GIVA",
        "r": max(ranks.values()),
        "variant": "vr",
        "packed": shapes,
        "bits": bits,
        "split": None,
        "dropout": 0.0,
        "fan_in_fan_out": False,
        "init_weights": False,
        "store_bases": True,
        "seed": 0,
        "base_fingerprint": None,
        "format_version": 1,
    }
    trainable = sum(shape[0] + shape[2] for shape in shapes.values())
    return Result(config, tensors, ranks, trainable, mean_bits, sizes)
