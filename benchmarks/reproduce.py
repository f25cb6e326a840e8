"""What each method delivers when trained: the papers' claims, measured again on three small tasks.

python benchmarks/reproduce.py --folder runs                            # everything; hours on a laptop
python benchmarks/reproduce.py --folder runs --task digits --steps 150  # one task
python benchmarks/reproduce.py --folder runs --report docs/results.md   # also writes the tables and plots

Every way of adapting gets the same steps and the same batches, and the learning rate that the same small sweep finds
for it by the training loss: three rates a factor of three apart, and further ones while the best is at the edge. What
is finished is kept in the folder: the same command goes on where it was stopped, and processes with different tasks
may share the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from benchmarks.adapted_tasks import TASKS, Batch, Task
from benchmarks.claims import write_report
from benchmarks.contenders import CONTENDERS, trained_bytes

STEPS = 150
FACTOR = 3.0  # between the rates of a sweep
WIDEST = 6  # rates tried at most
SWEEP_SEED = 100  # its order and start are of no run that counts
END = 5  # the last fifth of the steps is what a loss at the end is the mean of
WARM = 3  # steps whose time does not count
HEAD_RATE = 0.03
WARM_UP = 10  # the rate rises over a tenth of the steps

Result = dict[str, Any]


def train(model: Any, batches: Iterator[Batch], steps: int, rate: float, head: str | None) -> tuple[list[float], float]:
    """AdamW without weight decay, a linear schedule after a warm-up, gradients clipped at norm 1.

    A new head has a rate of its own, the same for all: it needs a high one, and at a method's low one it would
    decide the outcome.

    Returns:
        The loss of every step, and the processor's seconds for a step.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    of_head = [p for name, p in named if head is not None and head in name.split(".")]
    rest = [p for name, p in named if head is None or head not in name.split(".")]
    groups = [{"params": rest or of_head, "lr": rate}]
    if rest and of_head:
        groups.append({"params": of_head, "lr": HEAD_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // WARM_UP, steps)
    model.train()
    losses: list[float] = []
    begun = time.process_time()
    for step in range(steps):
        if step == WARM:
            begun = time.process_time()
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            losses += [math.inf] * (steps - len(losses))
            break
    model.eval()
    return losses, (time.process_time() - begun) / max(steps - WARM, 1)


def at_end(losses: Sequence[float]) -> float:
    """Mean loss over the last steps."""
    last = losses[-max(len(losses) // END, 1) :]
    return sum(last) / len(last)


class Runs:
    """The runs of one task, kept in a file.

    Args:
        task: the task.
        folder: where results are kept.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"runs-{task.name}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.found: list[Result] = [json.loads(line) for line in lines]

    def run(self, contender: str, seed: int, rate: float, steps: int) -> Result:
        """One training; the kept one where there is one. Seeds from `SWEEP_SEED` on are not evaluated."""
        key = {"task": self.task.name, "contender": contender, "seed": seed, "rate": rate, "steps": steps}
        for result in self.found:
            if all(result[name] == value for name, value in key.items()):
                return result
        model = CONTENDERS[contender].prepare(self.task, seed)
        torch.manual_seed(seed)
        head = self.task.head if self.task.carried else None
        losses, seconds = train(model, self.task.batches(seed), steps, rate, head)
        result = {**key, "loss": at_end(losses)}
        if seed < SWEEP_SEED:
            result |= {
                "losses": [round(loss, 5) for loss in losses],
                "seconds": seconds,
                "score": self.task.evaluate(model),
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "bytes": trained_bytes(model),
            }
        shown = {name: value for name, value in result.items() if name != "losses"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.found.append(result)
        return result

    def best_rate(self, contender: str, steps: int) -> float:
        """The rate with the lowest loss at the end of runs whose seed does not count."""
        middle = CONTENDERS[contender].rate

        def loss(power: int) -> float:
            found = self.run(contender, SWEEP_SEED, float(f"{middle * FACTOR**power:.2g}"), steps)["loss"]
            return float(found) if math.isfinite(found) else math.inf

        losses = {power: loss(power) for power in (-1, 0, 1)}
        while len(losses) < WIDEST:
            best = min(losses, key=lambda power: losses[power])
            if best not in (min(losses), max(losses)):
                break
            further = best + (1 if best == max(losses) else -1)
            losses[further] = loss(further)
        best = min(losses, key=lambda power: losses[power])
        return float(f"{middle * FACTOR**best:.2g}")


def main() -> None:
    """Sweep, train, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and results are kept")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task; repeatable")
    parser.add_argument("--method", action="append", choices=list(CONTENDERS), help="only this one; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a run that counts (default: {STEPS})")
    parser.add_argument("--sweep-steps", type=int, help="of a run that finds the rate (default: as many)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables there and plots beside it")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sweep = options.sweep_steps or options.steps  # short ones favour rates that a longer run does not bear
    results: list[Result] = []
    for name in options.task or TASKS:
        runs = Runs(TASKS[name](options.folder), options.folder)
        for seed in options.seeds if not options.report_only else []:
            for contender in options.method or CONTENDERS:
                if contender == "giva-8-warm" and not runs.task.carried:
                    continue  # no new head that could be warmed up
                runs.run(contender, seed, runs.best_rate(contender, sweep), options.steps)
        counted = [run for run in runs.found if run["seed"] < SWEEP_SEED]
        # Of runs of several lengths in the folder the latest counts, and of several rates of one method the latest.
        counted = [run for run in counted if run["steps"] == counted[-1]["steps"]]
        rates = {run["contender"]: run["rate"] for run in counted}
        results += [run for run in counted if run["rate"] == rates[run["contender"]]]
    if options.report:
        write_report(results, options.report)


if __name__ == "__main__":
    main()
