"""What a short distillation gives back of what a conversion lost, on the docstring classifier.

python benchmarks/recovery.py --folder cases              # the LoRA is trained once and kept there
python benchmarks/recovery.py --folder cases --seed 1 --sizes 29

Packed GiVA at sizes besides the head, and seeded VeRA: from the closed-form fit, and from VeRA's own start. The adapter
learns the LoRA's answers on the training texts, without their labels; it is judged on texts of which none was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import surgery
from benchmarks.compress import Curve, factors_of
from benchmarks.lora_cases import docstring_case
from surgery.display.tables import table

TARGETS = {29: 0.007, 15: 0.07}  # KL after 200 steps
VERA_RANK = 256
VECTORS = ("vera_lambda_b", "vera_lambda_d")
DISTINCT = 0.1  # VeRA's own start of d


class Recovery:
    """Conversions of one LoRA and what they become.

    Args:
        folder: where cases are kept.
        seed: of the LoRA's training.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.case = docstring_case(folder, seed)
        self.curve = Curve("docstrings", self.case, seed)
        self.rows: list[list[str]] = []

    def giva(self, size: float, steps: int) -> None:
        """Packed factors at `size` KiB besides the head."""
        made, report = self.curve.converted("giva", size=self.curve.carried + int(size * 1024))
        before = self._kl(made)
        trained, seconds = self._distilled(made, steps)
        after = self._kl(trained)
        limit = TARGETS.get(int(size))
        met = "-" if limit is None else f"<= {limit}: {'met' if after <= limit else 'MISSED'}"
        self._row(f"giva, {report.bytes - self.curve.carried:,} bytes", steps, before, after, seconds, met)

    def vera(self, fitted_steps: int, own_steps: Sequence[int]) -> None:
        """Vectors on seeded bases, from the fit and from VeRA's own start."""
        fitted, _ = self.curve.converted("vera", basis="random", rank=VERA_RANK, accept_loss=True)
        trained, seconds = self._distilled(fitted, fitted_steps, only=VECTORS)
        reached = self._kl(trained)
        own = surgery.Adapter(fitted.config, {name: _own_start(name, t) for name, t in fitted.tensors.items()})
        unchanged, after = self.case.fidelity({}).kl, {}
        self._row(f"vera r = {VERA_RANK}, from the fit", fitted_steps, self._kl(fitted), reached, seconds, "-")
        for steps in own_steps:
            trained, seconds = self._distilled(own, steps, only=VECTORS)
            after[steps] = self._kl(trained)
            sooner = "met" if reached <= after[steps] else "MISSED"
            self._row(f"vera r = {VERA_RANK}, from its own start", steps, unchanged, after[steps], seconds, sooner)

    def _distilled(self, adapter: surgery.Adapter, steps: int, **options: Any) -> tuple[surgery.Adapter, float]:
        begun = time.perf_counter()
        trained, _ = surgery.train(
            adapter, self.case.base, self.case.calibration, teacher=self.case.adapter, steps=steps, max_length=64,
            **options,
        )  # fmt: skip
        return trained, time.perf_counter() - begun

    def _kl(self, adapter: surgery.Adapter) -> float:
        exact = adapter if adapter.peft_type == "GIVA" else surgery.convert(adapter, "lora", base=self.case.base)[0]
        return self.case.fidelity(factors_of(exact)).kl

    def _row(self, name: str, steps: int, before: float, after: float, seconds: float, met: str) -> None:
        self.rows.append([name, str(steps), f"{before:.4g}", f"{after:.4g}", f"{seconds:.0f}", met])
        print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)


def _own_start(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith(VECTORS[0]):
        return torch.zeros_like(tensor)
    return torch.full_like(tensor, DISTINCT) if name.endswith(VECTORS[1]) else tensor


def main() -> None:
    """Convert, distil, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where cases are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the LoRA's training (default: 0)")
    parser.add_argument("--sizes", type=float, nargs="*", default=[29, 15], help="KiB (default: 29 15)")
    parser.add_argument("--steps", type=int, default=200, help="of a distillation (default: 200)")
    parser.add_argument("--vera", type=int, nargs="*", default=[200, 300], help="steps from VeRA's own start")
    options = parser.parse_args()
    recovery = Recovery(options.folder, options.seed)
    for size in options.sizes:
        recovery.giva(size, options.steps)
    if options.vera:
        recovery.vera(options.steps // 2, options.vera)
    columns = ["adapter", "steps", "KL before", "KL after", "s", "target"]
    print(table(columns, recovery.rows, range(1, 5)))


if __name__ == "__main__":
    main()
