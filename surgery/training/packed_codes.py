"""Packed GiVA adapters learn in their own form: integers through their rounding, scales on their grid.

In `dW = diag(o) B diag(s) A` of a packed adapter B and A are integers that the file holds as codes, and s lies on a
grid of powers of two. What is trained are real numbers that round to them: the forward pass uses the rounded ones, and
the gradient passes through the rounding as if it were not there (the straight-through estimator, arXiv 1308.3432). So
what is measured while training is what the file will hold. Gains on the base weight, which are whole numbers of steps
too, learn in the same way. o stays at one, which is not stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from surgery.adapters.names import MODEL_PREFIX
from surgery.codec.factors import grid_of
from surgery.deltas.operators import Delta, Gain, LowRank, Sum
from surgery.peft_types.layer import AdapterLayer
from surgery.system.tensors import Tensors
from surgery.training.preparing import ACTIVE

__all__ = ["RATE", "CodeTraining"]

# Adam's step for a number, relative to the root mean square of its column.
RATE = 1e-2
SEARCHED = 8


class CodeTraining(nn.Module):
    """Stands in for the packed factors of a PEFT model while they are trained.

    Args:
        model: the model; nothing of it but what is here requires a gradient afterwards.
        codes: train the integers; otherwise the scales alone.
    """

    def __init__(self, model: PeftModel, codes: bool = True) -> None:
        super().__init__()
        model.requires_grad_(False)
        layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, AdapterLayer)}
        # In a tuple, so that the layers are not modules of this one.
        self.layers: tuple[dict[str, AdapterLayer]] = (layers,)
        stored = [layer.all_tensors(ACTIVE) for layer in layers.values()]
        scales = torch.cat([tensors["s"].detach().reshape(-1) for tensors in stored])
        fineness = grid_of(scales.double().cpu().numpy())
        gains = [(layer.attachments[ACTIVE].config.gains or {}).get(layer.site.module) for layer in layers.values()]
        self.factors = nn.ModuleList(
            _Factors(tensors, codes, fineness, kind) for tensors, kind in zip(stored, gains, strict=True)
        )

    @property
    def pairs(self) -> Iterator[tuple[str, Any, _Factors]]:
        """Name, layer and what stands in for its factors."""
        for (name, layer), factors in zip(self.layers[0].items(), self.factors, strict=True):
            assert isinstance(factors, _Factors)
            yield name, layer, factors

    @property
    def counts(self) -> dict[str, int]:
        """How many numbers are trained, by name in the adapter's file."""
        parts = (("A", "A"), ("B", "B"), ("exponent", "s"), ("gain", "g"))
        return {
            f"{MODEL_PREFIX}{name}.giva_{short}": getattr(factors, own).numel()
            for name, _, factors in self.pairs
            for own, short in parts
            if getattr(factors, own).requires_grad and getattr(factors, own).numel()
        }

    @contextlib.contextmanager
    def attached(self, model: PeftModel) -> Iterator[None]:
        """The model computing with what is trained here; afterwards with what came of it."""
        model.add_module("packed_factors", self)
        for _, layer, factors in self.pairs:
            layer.delta = factors.delta
        try:
            yield
        finally:
            self.tensors()
            for _, layer, _ in self.pairs:
                del layer.delta
            del model.packed_factors

    def tensors(self, least: float = 0.0, least_scale: float = 0.0) -> Tensors:
        """What came of it, by name in the adapter's file; the adapter in the model has it, too.

        Args:
            least: a number that has moved by less than this keeps its old code.
            least_scale: a scale whose binary logarithm has moved by less than this keeps its old value.
        """
        found = {}
        for name, layer, factors in self.pairs:
            values = factors.kept(least, least_scale)
            layer.set_stored(ACTIVE, values)
            found.update({f"{MODEL_PREFIX}{name}.giva_{key}": v.detach().cpu().clone() for key, v in values.items()})
        return found

    def fit(self, size: Callable[[Tensors], int], limit: int) -> Tensors:
        """What came of it in so many bytes: where it takes more, what has moved least is as it was again.

        Args:
            size: bytes of a file with these tensors.
            limit: how many it may have, at least those of a file in which nothing has moved.
        """
        if size(found := self.tensors()) <= limit:
            return found
        far = [factors.farthest() for _, _, factors in self.pairs]
        codes, scales = (max(moved) + 1.0 for moved in zip(*far, strict=True))
        # Scales are few, and felt most: as many of them as fit beside the old codes, and then codes.
        scale = _least(lambda value: size(self.tensors(codes, value)) <= limit, scales)
        code = _least(lambda value: size(self.tensors(value, scale)) <= limit, codes)
        return self.tensors(code, scale)

    def save(self, path: Path) -> None:
        """Save the real numbers, for a training that goes on."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """Take them up again."""
        self.load_state_dict(load_file(path))


class _Factors(nn.Module):
    """One layer: real numbers over their columns' root mean squares, and the logarithms of scales."""

    in_A: torch.Tensor
    in_B: torch.Tensor
    sign: torch.Tensor
    o: torch.Tensor
    old_A: torch.Tensor
    old_B: torch.Tensor
    old_s: torch.Tensor
    in_g: torch.Tensor
    old_g: torch.Tensor
    step: torch.Tensor

    def __init__(self, tensors: Tensors, codes: bool, fineness: int | None, kind: str | None = None) -> None:
        super().__init__()
        A, B, s, o = (tensors[name].detach().float() for name in ("A", "B", "s", "o"))
        in_A, in_B = (X.square().mean(dim, keepdim=True).sqrt().clamp_min(0.5) for X, dim in ((A, 1), (B, 0)))
        g = tensors["g"].detach().float() if kind is not None else torch.zeros(0, device=A.device)
        t = tensors["t"].detach().float() if kind is not None else torch.zeros(1, device=A.device)
        in_g = g.square().mean().sqrt().clamp_min(1e-6) if kind is not None else torch.ones((), device=A.device)
        held = {"in_A": in_A, "in_B": in_B, "sign": s.sign(), "o": o, "old_A": A, "old_B": B, "old_s": s}
        held |= {"in_g": in_g, "old_g": g, "step": t}
        for name, value in held.items():
            self.register_buffer(name, value.clone(), persistent=False)
        self.fineness = fineness
        # Packed factors of 16 or 32 bits are no integers.
        self.whole = torch.equal(A, A.round()) and torch.equal(B, B.round())
        self.A = nn.Parameter(A / in_A, requires_grad=codes and self.whole)
        self.B = nn.Parameter(B / in_B, requires_grad=codes and self.whole)
        self.exponent = nn.Parameter(s.abs().clamp_min(1e-30).log2())
        self.kind = kind
        # Gains that are on no grid are stored as they are, and stay.
        self.gain = nn.Parameter(g / in_g, requires_grad=codes and kind is not None and bool((t > 0).all()))

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A as real numbers; exactly the old ones where they do not train."""
        if not self.A.requires_grad:
            return self.old_B, self.old_A
        return self.B * self.in_B, self.A * self.in_A

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`B (out, r)`, `s (r,)` and `A (r, in)` as the file holds them; gradients pass through the rounding."""
        B, A = self.numbers()
        if self.A.requires_grad:
            B, A = _through(B, B.round()), _through(A, A.round())
        exponent: torch.Tensor = self.exponent
        if self.fineness is not None:
            exponent = _through(exponent, (exponent * 2**self.fineness).round() / 2**self.fineness)
        return B, self.sign * exponent.exp2(), A

    def gains(self) -> torch.Tensor:
        """The gains less one as the file holds them, `(n,)`."""
        if not self.gain.requires_grad:
            return self.old_g
        g = self.gain * self.in_g
        return _through(g, (g / self.step).round() * self.step)

    @torch.no_grad()
    def kept(self, least: float, least_scale: float) -> Tensors:
        """What is stored, with the old values where they have moved by less."""
        (B, A), olds = self.numbers(), (self.old_B, self.old_A)
        B, A = (
            torch.where((new - old).abs() < least, old, new.round() if self.whole else new)
            for new, old in zip((B, A), olds, strict=True)
        )
        found = {"A": A, "B": B, "s": torch.where(self._moved() < least_scale, self.old_s, self.rounded()[1])}
        if self.kind is not None:
            found["g"] = torch.where(self._moved_gains() < least, self.old_g, self.gains())
        return found

    @torch.no_grad()
    def farthest(self) -> tuple[float, float]:
        """How far the number that has moved most has moved, and the scale's logarithm."""
        B, A = self.numbers()
        moved = [(B - self.old_B).abs(), (A - self.old_A).abs(), self._moved_gains()]
        return max(_largest(each) for each in moved), _largest(self._moved())

    def _moved_gains(self) -> torch.Tensor:
        """How far the gains have moved, in steps."""
        if not self.gain.requires_grad:
            return torch.zeros_like(self.old_g)
        return (self.gain * self.in_g - self.old_g).abs() / self.step

    def _moved(self) -> torch.Tensor:
        return (self.exponent - self.old_s.abs().clamp_min(1e-30).log2()).abs()

    def delta(self, adapter_name: str, in_training: bool = False, with_weight: bool = False) -> Delta:
        """In place of `AdapterLayer.delta`; without the weight that gains are on."""
        B, s, A = self.rounded()
        change = LowRank(self.o[:, None] * B, s[:, None] * A)
        if self.kind is None:
            return change
        return Sum([(1.0, Gain.of_kind(self.kind, self.gains(), None, change.shape)), (1.0, change)])


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The rounded value, with the gradient of the value itself."""
    return value + (rounded - value).detach()


def _least(fits: Callable[[float], bool], high: float) -> float:
    """The least of the numbers up to `high` that fits, about; `high` itself does."""
    low = 0.0
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
