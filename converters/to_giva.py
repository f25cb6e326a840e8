"""Any adapter to a packed GiVA one: integer factors of few bits, with scales, cut and rounded for the whole model."""

from __future__ import annotations

import torch

from surgery.checkpoints.adapter import MODEL_PREFIX, TUNER_PREFIX
from surgery.checkpoints.packing import FACTORS, PLAIN, SCALES
from surgery.checkpoints.tensor_files import file_bytes
from surgery.converters.changes import Change, Source
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.linalg.metric import MetricSVD

__all__ = ["to_giva"]


def to_giva(source: Source, request: Request) -> Result:
    """A GiVA adapter `diag(o) B diag(s) A` with o = 1, which is not stored, and packed factors.

    With 16 or 32 bits B and A are floats; with fewer, or `auto`, they are integers that an entropy coder packs.
    Layers that keep nothing leave the target list.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer.
    """
    changes = changes_of(source, request)
    svds = {change.module: decomposed(change, request) for change in changes}
    if request.bits in PLAIN:
        return _plain(source, request, changes, svds)
    raise NotImplementedError


def _plain(source: Source, request: Request, changes: list[Change], svds: dict[str, MetricSVD]) -> Result:
    bits = int(request.bits)
    dtype = PLAIN[bits]
    spectra = Spectra(
        {module: svd.S for module, svd in svds.items()},
        {change.module: sum(change.shape) * dtype.itemsize + 4 for change in changes},
        {change.module: 0 for change in changes},
    )

    def size(ranks: dict[str, int]) -> int:
        numbers = sum(sum(change.shape) * ranks[change.module] for change in changes)
        planned = {
            f"{TUNER_PREFIX}{FACTORS}": torch.empty(numbers, dtype=dtype, device="meta"),
            f"{TUNER_PREFIX}{SCALES}": torch.empty(sum(ranks.values()), device="meta"),
        }
        return file_bytes({**source.carried, **planned})

    ranks = spectra.ranks(request, size)
    factors = {}
    for change in changes:
        if ranks[change.module]:
            B, A = svds[change.module].cut(change.B, change.A, ranks[change.module])
            in_B, in_A = B.abs().amax(0).clamp_min(1e-30), A.abs().amax(1).clamp_min(1e-30)
            # As the file holds them, so that what is measured is what is read.
            B, A = (B / in_B).to(dtype).float(), (A / in_A[:, None]).to(dtype).float()
            factors[change.module] = (B, A, in_B * in_A)
    return _result(factors, bits, dict.fromkeys(factors, float(bits)), {})


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
