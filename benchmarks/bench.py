"""What all benchmarks share: measuring in fresh processes, sides taking turns, rows with targets, a command line.

Every measurement runs in a fresh process; ours and the reference take turns. Memory is the peak of resident memory
above what is resident once the imports are done, on both sides alike. A ratio is the reference's figure over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.floor import Work
from benchmarks.process import Measured, alternating, in_process
from benchmarks.rows import Row, show

__all__ = ["Bench", "Case", "at_least", "at_most", "below", "main"]

# Freed memory goes back to the system at once: the peak is then what is alive, not what the allocator has kept.
# It costs time, so that time is measured without.
LIVE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
WORKERS = Path(__file__).resolve().with_name("workers.py")


class Bench:
    """One case's surroundings: settings, a folder for models and adapters, and what has been measured."""

    def __init__(self, folder: Path, device: str, runs: int, quick: bool, threads: int | None) -> None:
        self.device = device
        self.threads = 1 if quick else threads
        self.runs = runs
        self.quick = quick
        self.folder = folder
        folder.mkdir()
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._made = 0

    def work(self, worker: str, threads: int | None = None, live: bool = False, **options: Any) -> Measured:
        """Do one piece of work in a fresh process; see workers.py. With `live`, for its memory."""
        environment = LIVE_MEMORY if live else {}
        arguments = [worker, json.dumps({"device": self.device, **options})]
        result = in_process(WORKERS, *arguments, threads=threads or self.threads, environment=environment)
        what = f"{worker} {options['method']}" if "method" in options else worker
        took = f"{result['seconds']:.3g} s" if "seconds" in result else "done"
        print(f"{self.folder.name}: {what}: {took}", file=sys.stderr, flush=True)
        return result

    def time_and_memory(self, worker: str, **options: Any) -> Measured:
        """One piece of work twice: once for its time, once for the peak of what is alive."""
        timed = self.work(worker, **options)
        if "bytes" not in timed or self.device.startswith("cuda"):
            return timed
        return {**timed, "bytes": self.work(worker, live=True, **options)["bytes"]}

    def init(self, model: Path, method: str, keep: bool = False, **options: Any) -> Measured:
        """`surgery.init` in a fresh process. The adapter goes again unless it is kept: its folder is in `out`."""
        self._made += 1
        out = self.folder / f"adapter-{self._made}"
        result = self.work("init", model=str(model), method=method, out=str(out), **options)
        if keep:
            return {**result, "out": str(out)}
        shutil.rmtree(out)
        return result

    def alternating(self, *sides: Callable[[], Measured]) -> list[Measured]:
        """The medians of all runs, the sides taking turns."""
        return alternating(self.runs, *sides)

    def row(
        self,
        case: str,
        ours: Measured,
        reference: Measured | None = None,
        target: str = "",
        holds: Callable[[Row], bool] | None = None,
        floor: Work | None = None,
    ) -> None:
        """Add a row; a target is not judged on the small shapes of a quick run, nor a floor worked out."""
        row = Row(case, ours, reference, target)
        met = holds(row) if holds and not self.quick else None
        # The rates are measured on the CPU.
        seconds = floor.seconds() if floor and not self.quick and self.device == "cpu" else None
        self.rows.append(Row(case, ours, reference, target, met, seconds))

    def note(self, text: str) -> None:
        """Add a line to what is printed below the table."""
        self.notes.append(text)


def at_least(figure: str, factor: float) -> Callable[[Row], bool]:
    """Whether the reference's figure is so many times ours."""
    return lambda row: (row.ratio(figure) or 0.0) >= factor


def below(figure: str, limit: float) -> Callable[[Row], bool]:
    """Whether our figure is below a limit."""
    return lambda row: row.ours[figure] < limit


def at_most(figure: str, factor: float) -> Callable[[Row], bool]:
    """Whether our figure is at most so many times the reference's."""
    return lambda row: row.ours[figure] <= factor * (row.reference or {})[figure]


Case = Callable[[Bench], None]


def surroundings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "scipy", "numpy")}
    return {
        **settings,
        "cores": os.cpu_count(),
        "machine": f"{_processor()}, {platform.machine()}",
        "python": platform.python_version(),
        **packages,
    }


def _processor() -> str:
    """What the processor calls itself, where the system says it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")


def arguments(cases: Mapping[str, Case], description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--runs", type=int, help="measurements of each side, of which the median counts (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch, BLAS and LAPACK, on both sides (default: every core)")
    parser.add_argument("--case", action="append", choices=list(cases), help="only this case; repeatable")
    parser.add_argument("--quick", action="store_true", help="small shapes and one run: checks that the script works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the rows")
    return parser.parse_args()


def possible(cases: Mapping[str, Case], device: str, gpu_only: frozenset[str]) -> dict[str, Case]:
    """The cases that a device can run."""
    return {case: work for case, work in cases.items() if device.startswith("cuda") or case not in gpu_only}


def measure(cases: Mapping[str, Case], settings: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Measure these cases, with settings as in `Bench`.

    Returns:
        The rows and the notes.
    """
    quick = settings["quick"]
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:

        def one(case: str) -> Bench:
            bench = Bench(Path(folder) / case, **settings)
            cases[case](bench)
            return bench

        # One at a time: only where no figure counts may two of them share the machine.
        with ThreadPoolExecutor(max_workers=2 if quick else 1) as pool:
            benches = list(pool.map(one, cases))
    return [row for bench in benches for row in bench.rows], [note for bench in benches for note in bench.notes]


def main(
    cases: Mapping[str, Case],
    description: str,
    gpu_only: frozenset[str] = frozenset(),
    more_rows: Callable[[list[Row], bool], list[Row]] | None = None,
) -> None:
    """Measure, print, save.

    Args:
        cases: by name, in order.
        description: for `--help`.
        gpu_only: cases that are left out without a GPU unless they are asked for.
        more_rows: rows that follow from others; called with them and whether the shapes are small.
    """
    options = arguments(cases, description)
    wanted = {case: work for case, work in cases.items() if case in (options.case or cases)}
    chosen = wanted if options.case else possible(wanted, options.device, gpu_only)
    runs = options.runs or (1 if options.quick else 3)
    settings = {"device": options.device, "runs": runs, "quick": options.quick, "threads": options.threads}
    rows, notes = measure(chosen, settings)
    rows += more_rows(rows, options.quick) if more_rows else []
    if rows:
        print(show(rows))
        print("\nratio: the reference's figure over ours; memory is above what the imports take")
    if notes:
        print("\n".join(notes))
    judged = [row for row in rows if row.met is not None]
    if judged:
        print(f"{sum(bool(row.met) for row in judged)} of {len(judged)} targets met")
    if options.json:
        saved = {**surroundings(settings), "rows": [row.to_dict() for row in rows], "notes": notes}
        options.json.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
