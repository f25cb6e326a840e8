"""Every cost that is measured, in one run, and the page that states them.

python benchmarks/all.py --report docs/performance.md    # everything: an hour or more on two cores
python benchmarks/all.py --only use --only growth        # parts
python benchmarks/all.py --quick                         # small shapes: only checks that the scripts work

A part's rows are kept as JSON in `--folder` when it is done, so that parts can be measured at different times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import convert, giva, growth, init, train, use
from benchmarks.bench import Case, measure, possible, surroundings
from benchmarks.floor import rates
from benchmarks.rows import Row, markdown, show

START, STOP = "<!-- figures -->", "<!-- end of figures -->"
# Name, title, cases, rows that follow from others.
MoreRows = Callable[[list[Row], bool], list[Row]]
PARTS: dict[str, tuple[str, Mapping[str, Case], MoreRows | None]] = {
    "init": ("`surgery init`", init.CASES, init.frod_growth),
    "giva": ("GiVA's gradient pass", giva.CASES, None),
    "convert": ("`surgery convert`", convert.CASES, None),
    "use": ("Adapters in use, and merging", use.CASES, None),
    "train": ("`surgery train`", train.CASES, None),
    "growth": ("Growth", growth.CASES, None),
}
GPU_ONLY = init.GPU_ONLY | giva.GPU_ONLY


def part(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one part."""
    _, cases, more = PARTS[name]
    rows, notes = measure(possible(cases, settings["device"], GPU_ONLY), dict(settings))
    rows += more(rows, settings["quick"]) if more else []
    print(show(rows))
    print("\n".join(notes))
    return {**surroundings(dict(settings)), "rows": [vars(row) for row in rows], "notes": notes}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The measured parts as Markdown."""
    lines: list[str] = []
    for name, (title, _, _) in PARTS.items():
        if name not in found:
            continue
        rows = [Row(**row) for row in found[name]["rows"]]
        lines += [f"## {title}", "", *markdown(rows), ""]
        lines += [f"- {note}" for note in found[name]["notes"]] + [""]
    return "\n".join(lines)


def write(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the figures between the marks of the page."""
    one = next(iter(found.values()))
    versions = ", ".join(f"{name} {one[name]}" for name in ("torch", "transformers", "peft", "scipy", "numpy"))
    rate = rates()
    head = (
        f"{one['cores']} cores, {one['machine']}, Python {one['python']}, {versions}. Medians of {one['runs']} runs. "
        f"Rates that floors are worked out with: {rate.read / 1e9:.1f} GB/s read (from the system's cache), "
        f"{rate.written / 1e9:.1f} GB/s written, {rate.memory / 1e9:.1f} GB/s copied in memory, "
        f"{rate.float32 / 1e9:.0f} and {rate.float64 / 1e9:.0f} GFLOP/s in matrix products of float32 and float64."
    )
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Performance\n\n{START}\n{STOP}\n"
    before, _, rest = text.partition(START)
    path.write_text(f"{before}{START}\n\n{head}\n\n{page(found)}{STOP}{rest.partition(STOP)[2]}", encoding="utf-8")


def main() -> None:
    """Measure, keep, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=list(PARTS), help="only this part; repeatable")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median counts (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch, BLAS and LAPACK (default: every core)")
    parser.add_argument("--quick", action="store_true", help="small shapes and one run")
    parser.add_argument("--folder", type=Path, default=Path("bench-out"), help="where rows are kept")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page, of all parts that are kept")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("device", "quick", "threads")}
    settings["runs"] = 1 if options.quick else options.runs
    for name in [] if options.report_only else options.only or PARTS:
        print(f"== {PARTS[name][0]}", flush=True)
        rows = json.dumps(part(name, settings), indent=1)
        (options.folder / f"{name}.json").write_text(rows + "\n", encoding="utf-8")
    if options.report:
        kept = {name: options.folder / f"{name}.json" for name in PARTS}
        write(options.report, {n: json.loads(p.read_text(encoding="utf-8")) for n, p in kept.items() if p.exists()})


if __name__ == "__main__":
    main()
