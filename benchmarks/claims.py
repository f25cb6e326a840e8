"""Tables, plots and verdicts from the runs of reproduce.py."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.adapted_tasks import TASKS
from benchmarks.contenders import CONTENDERS

__all__ = ["write_report"]

START, STOP = "<!-- figures -->", "<!-- end of figures -->"
REFERENCE = "lora-8"  # whose training loss is what the others' steps are counted to
MEANT = 2.0  # standard errors that make a difference
CLOSE = 0.02  # of the score: as good, unless seeds say worse
# Of the methods, distinct with every kind of colour vision (Okabe and Ito); within a method shapes differ.
COLOURS = {
    "head": "#999999",
    "full": "#000000",
    "lora": "#0072B2",
    "vera": "#E69F00",
    "giva": "#009E73",
    "inilora": "#CC79A7",
    "frod": "#D55E00",
    "smoa": "#56B4E9",
}
SHAPES = (("o", "-"), ("s", "--"), ("^", ":"))
WINDOW = 10  # steps over which a training loss is averaged


@dataclass(frozen=True)
class Outcome:
    """One contender on one task, over the seeds.

    Attributes:
        score: mean.
        spread: standard deviation over the seeds, 0 of one seed.
        seeds: how many.
        loss: mean training loss at the end.
        steps: until the reference's training loss is reached, the median over the seeds; None where most never do.
        curve: training loss by step, mean over the seeds.
    """

    score: float
    spread: float
    seeds: int
    loss: float
    rate: float
    parameters: int
    bytes: int
    seconds: float
    steps: int | None
    curve: list[float]

    @property
    def error(self) -> float:
        """Standard error of the mean score."""
        return self.spread / math.sqrt(self.seeds)


Outcomes = dict[str, Outcome]


def outcomes(results: Sequence[Mapping[str, Any]]) -> Outcomes:
    """By contender, of one task."""
    level = _level([run["losses"] for run in results if run["contender"] == REFERENCE])
    found = {}
    for name in CONTENDERS:
        runs = [run for run in results if run["contender"] == name]
        if not runs:
            continue
        scores = [run["score"] for run in runs]
        reached = [_reached(run["losses"], level) for run in runs]
        steps = statistics.median([math.inf if step is None else step for step in reached])
        found[name] = Outcome(
            score=statistics.mean(scores),
            spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seeds=len(scores),
            loss=statistics.mean(run["loss"] for run in runs),
            rate=runs[0]["rate"],
            parameters=runs[0]["parameters"],
            bytes=runs[0]["bytes"],
            seconds=statistics.median(run["seconds"] for run in runs),
            steps=int(steps) if math.isfinite(steps) else None,
            curve=_smooth([statistics.mean(step) for step in zip(*(run["losses"] for run in runs), strict=True)]),
        )
    return found


def _smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.mean(losses[max(step - WINDOW + 1, 0) : step + 1]) for step in range(len(losses))]


def _level(of_reference: Sequence[Sequence[float]]) -> float:
    """What the reference's training loss has come to after two thirds of its steps; without runs of it, nothing."""
    if not of_reference:
        return -math.inf
    return statistics.mean(_smooth(losses)[len(losses) * 2 // 3] for losses in of_reference)


def _reached(losses: Sequence[float], level: float) -> int | None:
    smooth = _smooth(losses)
    return next((step + 1 for step in range(WINDOW - 1, len(smooth)) if smooth[step] <= level), None)


def _table(found: Outcomes, score: str) -> list[str]:
    lines = [
        f"| | {score} | training loss | learning rate | steps to the same loss | trained parameters | file | s/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        spread = f" ± {one.spread:.2g}" if one.seeds > 1 else ""
        steps = one.steps if one.steps is not None else "not reached"
        lines.append(
            f"| {CONTENDERS[name].title} | {one.score:.4g}{spread} | {one.loss:.3f} | {one.rate:g} | {steps} | "
            f"{one.parameters:,} | {_size(one.bytes)} | {one.seconds:.3f} |"
        )
    return lines


def _size(count: int) -> str:
    return f"{count / 1024:,.0f} KiB" if count < 1024 * 1024 else f"{count / 1024 / 1024:,.1f} MiB"


@dataclass(frozen=True)
class Comparison:
    """How much better one contender is than another on a task, in its score."""

    ours: Outcome
    theirs: Outcome
    higher: bool

    @property
    def gain(self) -> float:
        """Positive where ours is better."""
        return (self.ours.score - self.theirs.score) * (1 if self.higher else -1)

    @property
    def error(self) -> float:
        """Standard error of the gain."""
        return math.hypot(self.ours.error, self.theirs.error)

    @property
    def told(self) -> bool:
        """Whether there are seeds enough to tell."""
        return min(self.ours.seeds, self.theirs.seeds) > 1

    @property
    def better(self) -> bool:
        """Beyond what seeds explain."""
        return self.gain > MEANT * self.error

    @property
    def worse(self) -> bool:
        """Beyond what seeds explain."""
        return self.gain < -MEANT * self.error

    def __str__(self) -> str:
        return f"{self.ours.score:.3g} against {self.theirs.score:.3g}"


Verdict = Callable[[Outcomes, bool], str]


def _pair(name: str, other: str, said: Callable[[Comparison], str]) -> Verdict:
    """What is said of two contenders, with their scores and the share of the parameters."""

    def verdict(found: Outcomes, higher: bool) -> str:
        if not {name, other} <= found.keys():
            return "not run"
        pair = Comparison(found[name], found[other], higher)
        share = pair.ours.parameters / pair.theirs.parameters
        return f"{said(pair) if pair.told else 'one seed'}: {pair} with {share:.2g} of the parameters"

    return verdict


def _as_good(name: str, other: str) -> Verdict:
    """Not worse beyond the spread, and close."""

    def said(pair: Comparison) -> str:
        close = pair.gain >= -CLOSE * abs(pair.theirs.score)
        return "fails" if pair.worse else "holds" if close else "unclear"

    return _pair(name, other, said)


def _better(name: str, other: str) -> Verdict:
    return _pair(name, other, lambda pair: "holds" if pair.better else "fails" if pair.worse else "no difference")


def _as_fast(name: str, other: str) -> Verdict:
    def verdict(found: Outcomes, higher: bool) -> str:
        if not {name, other} <= found.keys():
            return "not run"
        ratio = found[name].seconds / found[other].seconds
        return f"{'holds' if ratio <= 1.1 else 'fails'}: {ratio:.2f} of its step"

    return verdict


def _fastest(name: str) -> Verdict:
    """Fewest steps to the common training loss, of the adapters."""

    def verdict(found: Outcomes, higher: bool) -> str:
        if name not in found:
            return "not run"
        steps = {other: one.steps for other, one in found.items() if one.steps is not None and other != "full"}
        if name not in steps:
            return "fails: the loss is not reached"
        first = min(steps, key=lambda other: steps[other])
        if steps[name] <= steps[first]:
            return f"holds: {steps[name]} steps"
        return f"fails: {steps[name]} steps, {CONTENDERS[first].title} {steps[first]}"

    return verdict


CLAIMS: list[tuple[str, Verdict]] = [
    ("VeRA r 256 is as good as LoRA r 16 with about a tenth of the parameters", _as_good("vera-256", "lora-16")),
    ("VeRA r 64 is as good as LoRA r 8", _as_good("vera-64", "lora-8")),
    ("GiVA r 8 is as good as VeRA r 64", _as_good("giva-8", "vera-64")),
    ("GiVA r 32 is as good as VeRA r 256", _as_good("giva-32", "vera-256")),
    ("GiVA r 8 trains in LoRA's time", _as_fast("giva-8", "lora-8")),
    ("IniLoRA is better than LoRA, r 8", _better("inilora-8", "lora-8")),
    ("IniLoRA-alpha is better than LoRA, r 8", _better("inilora-alpha-8", "lora-8")),
    ("IniLoRA-beta is better than LoRA, r 8", _better("inilora-beta-8", "lora-8")),
    ("FRoD is as good as full fine-tuning", _as_good("frod", "full")),
    ("FRoD converges fastest of the adapters", _fastest("frod")),
    ("SMoA components r 8 is better than LoRA r 16, which has twice the parameters", _better("smoa-8", "lora-16")),
    ("SMoA components r 8 is better than LoRA r 8", _better("smoa-8", "lora-8")),
    ("SMoA r 16 is better than LoRA r 16, which has twice the parameters", _better("smoa-blocks-16", "lora-16")),
    ("SMoA r 16 is better than LoRA r 8, which has as many parameters", _better("smoa-blocks-16", "lora-8")),
    ("SMoA r 8 is better than LoRA r 8, which has twice the parameters", _better("smoa-blocks-8", "lora-8")),
]


def write_report(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Put tables, plots and verdicts between the marks of a page, or make the page."""
    by_task = {name: outcomes([run for run in results if run["task"] == name]) for name in TASKS}
    by_task = {name: found for name, found in by_task.items() if found}
    steps = {run["task"]: run["steps"] for run in results}
    lines = [START, "", "## Which claims hold here", ""]
    lines += ["| claim | " + " | ".join(by_task) + " |", "|---|" + "---|" * len(by_task)]
    lines += [
        f"| {claim} | " + " | ".join(verdict(found, TASKS[name].higher) for name, found in by_task.items()) + " |"
        for claim, verdict in CLAIMS
    ]
    for name, found in by_task.items():
        picture = path.with_name(f"{path.stem}-{name}.png")
        _plot(found, TASKS[name].score, TASKS[name].title, picture)
        seeds = max(one.seeds for one in found.values())
        lines += ["", f"## {TASKS[name].title}", "", f"![{name}]({picture.name})", ""]
        lines += [
            f"{steps[name]} steps, {seeds} seeds; the same loss is what LoRA r = 8 has after two thirds of them.",
            "",
        ]
        lines += _table(found, TASKS[name].score)
    lines += ["", STOP]
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Results\n\n{START}\n{STOP}\n"
    before, _, rest = text.partition(START)
    path.write_text(before + "\n".join(lines) + rest.partition(STOP)[2], encoding="utf-8")


def _plot(found: Outcomes, score: str, title: str, path: Path) -> None:
    """Score by trained parameters, and training loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    drawn: Counter[str] = Counter()
    for name, one in found.items():
        family = name.partition("-")[0]
        marker, style = SHAPES[drawn[family]]
        drawn[family] += 1
        look = {"color": COLOURS[family], "label": CONTENDERS[name].title}
        left.errorbar(one.parameters, one.score, yerr=one.spread, marker=marker, linestyle="", capsize=3, **look)
        right.plot(range(1, len(one.curve) + 1), one.curve, linestyle=style, linewidth=1.5, marker=marker, **look,
                   markevery=max(len(one.curve) // 6, 1), markersize=4)  # fmt: skip
    left.set(xscale="log", xlabel="trained parameters", ylabel=f"{score}, mean and spread over seeds")
    right.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    if score == "perplexity":
        left.set_yscale("log")
        for formatted in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            formatted("{x:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)
