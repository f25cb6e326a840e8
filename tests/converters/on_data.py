"""What data gains a conversion, worked out from the files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import surgery
from surgery.converters.report import ConvertReport
from tests.helpers.conversions import dense
from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

__all__ = ["output_errors"]


def output_errors(
    lora: Path, to: str, dense_of: Callable[[Path, Any, str], torch.Tensor], place: Path
) -> tuple[ConvertReport, float, float]:
    """Convert an adapter of the tiny Llama to a form with data and without.

    Args:
        lora: the adapter.
        to: the form.
        dense_of: `dW (out, in)` of a layer, float64, from a folder of that form and the base.
        place: where to write.

    Returns:
        The report with data, the true relative error of the outputs then, and the one without data.
    """
    base = save_tokenizer(save_model("llama", place / "text-llama"))
    data = write_rows(place / "texts.jsonl", text_rows(96))
    options = {"base": base, "data": data, "samples": 48, "accept_loss": True, "stats": place / "stats.safetensors"}
    _, measured = surgery.convert(lora, to, place / "with", **options)
    surgery.convert(lora, to, place / "without", base=base, accept_loss=True)
    moments = load_file(place / "stats.safetensors")
    model = load_base(base)
    found = []
    for name in ("with", "without"):
        lost = total = 0.0
        for site in measured.sites:
            C = moments[f"{site.module.removeprefix('model.')}.C"].double()
            dW = dense(lora, site.module)
            difference = dW - dense_of(place / name, model, site.module)
            lost += float(((difference @ C) * difference).sum())
            total += float(((dW @ C) * dW).sum())
        found.append((lost / total) ** 0.5)
    return measured, *found
