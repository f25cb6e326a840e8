"""The loss curve of a training: rows for programs, a picture for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import OptionError
from surgery.system.extras import extra_package

__all__ = ["COLUMNS", "CURVE_FILE", "PICTURE_FILE", "curve", "write_curve"]

CURVE_FILE, PICTURE_FILE = "loss.jsonl", "loss.png"
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "epoch")
# The smooth line is a mean over about this share of the steps.
SMOOTH = 0.05


def curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The rows of a `Trainer`'s history that are steps of a training."""
    return [{name: row[name] for name in COLUMNS if name in row} for row in history if "loss" in row]


def write_curve(rows: Sequence[Mapping[str, float]], folder: Path, title: str) -> str | None:
    """Write `loss.jsonl`, a row for each step that was logged, and `loss.png`; returns why there is no picture.

    Args:
        rows: step, loss, learning_rate and so on.
        folder: where to.
        title: of the picture.
    """
    (folder / CURVE_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        extra_package("matplotlib.figure", f"{PICTURE_FILE}, the picture of the loss,", OptionError)
    except OptionError as missing:
        return str(missing)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = max(1, round(SMOOTH * len(losses)))
    if window > 1:
        axes.plot(steps, losses, color="0.7", linewidth=0.8, label="loss")
    label = "running mean" if window > 1 else "loss"
    axes.plot(steps, _smooth(losses, window), color="#1f5a96", linewidth=1.6, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / PICTURE_FILE, format="png")
    return None


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last steps."""
    sums, found = 0.0, []
    for index, value in enumerate(values):
        sums += value - (values[index - window] if index >= window else 0.0)
        found.append(sums / min(index + 1, window))
    return found
