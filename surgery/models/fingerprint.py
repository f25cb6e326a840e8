"""Digests of base weights, by which an adapter recognises the model that it was made from.

A base is loaded in float32 here and in bfloat16 there; rounding is deterministic, so one digest is kept for the
values as they are in float32, and one for the values rounded to each half precision (of every eighth row: rounding all
of them would cost more than reading them). The digests guard against mistakes, not against attackers: a fast
non-cryptographic hash is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from surgery.system.dtypes import DTYPES

__all__ = ["Fingerprint", "matches"]

ROW_STRIDE = {"float32": 1, "bfloat16": 8, "float16": 8}
LOADED_IN = ("float32", "bfloat16", "float16")


class Fingerprint:
    """Collects weights one at a time, in any order, each counted once."""

    def __init__(self) -> None:
        self._digests: dict[str, dict[str, str]] = {}

    def add(self, key: str, weight: torch.Tensor, dtypes: tuple[str, ...] = LOADED_IN) -> None:
        """Take in one weight, `(out, in)`, under a name; a name already known is skipped."""
        if key in self._digests:
            return
        self._digests[key] = {
            name: xxhash.xxh3_128_hexdigest(_bytes(weight.detach()[:: ROW_STRIDE[name]].to(DTYPES[name])))
            for name in dtypes
        }

    @property
    def taken(self) -> dict[str, dict[str, str]]:
        """The digests of every weight taken in, by name and dtype: what `take` gives to another fingerprint."""
        return self._digests

    def take(self, taken: Mapping[str, dict[str, str]]) -> None:
        """Take in weights that another fingerprint has; a name already known is skipped."""
        self._digests = {**taken, **self._digests}

    def digests(self) -> dict[str, str]:
        """One digest for each dtype, over all weights taken in."""
        result = {}
        for dtype in LOADED_IN:
            lines = [f"{key} {self._digests[key].get(dtype)}" for key in sorted(self._digests)]
            if all(dtype in digests for digests in self._digests.values()):
                result[dtype] = xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
        return result


def matches(expected: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether these weights are the fingerprinted ones, possibly rounded to half precision.

    Args:
        expected: as from `Fingerprint.digests`.
        weights: by the same names, in the dtype they are used in.
    """
    found = {name for name in LOADED_IN if any(weight.dtype == DTYPES[name] for weight in weights.values())}
    halves = found - {"float32"}
    # Some models keep a few layers in float32 when the rest is halved; and a base rounded to half precision may since
    # have been widened again.
    candidates = sorted(halves) if halves else ["float32", "bfloat16", "float16"]
    for candidate in candidates:
        if not halves and candidate != "float32" and not _representable(weights, candidate):
            continue
        fingerprint = Fingerprint()
        for key, weight in weights.items():
            fingerprint.add(key, weight, (candidate,))
        if candidate in expected and fingerprint.digests().get(candidate) == expected[candidate]:
            return True
    return False


def _representable(weights: Mapping[str, torch.Tensor], name: str) -> bool:
    return all(bool((weight == weight.to(DTYPES[name]).to(weight.dtype)).all()) for weight in weights.values())


def _bytes(weight: torch.Tensor) -> Any:
    return weight.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
