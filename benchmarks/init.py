"""The cost of `surgery init`: every claim against its reference, measured in the same run.

Every measurement runs in a fresh process; ours and the reference take turns. Memory is the peak of resident memory
above what is resident once the imports are done, on both sides alike. A ratio is the reference's figure over ours.

    python benchmarks/init.py                      # everything, on the CPU
    python benchmarks/init.py --quick              # small shapes: only checks that the script works
    python benchmarks/init.py --case frod-12 --json rows.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import LLAMA_2_7B, Llama, minilm_folder, write_llama
from benchmarks.process import Measured, alternating, command_seconds, in_process
from benchmarks.rows import Row, show

# The `surgery` command sets this itself, before torch starts its threads (surgery/cli/main.py); a call of
# surgery.init from Python has to be given it. The references run as they would for anybody.
OURS_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
QV = ["query", "value"]
# Every linear of MiniLM's blocks, which is what surgery adapts by default; PEFT's own would add the pooler.
BLOCK_LINEARS = r"encoder\.layer\..*\.(query|key|value|dense)"
RANK = 8


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

    def work(self, worker: str, threads: int | None = None, **options: Any) -> Measured:
        """Do one piece of work in a fresh process; see workers.py."""
        ours = not worker.startswith(("peft", "adam"))
        environment = OURS_ENVIRONMENT if ours else {}
        arguments = ["--worker", worker, json.dumps({"device": self.device, **options})]
        script, threads = Path(__file__).resolve(), threads or self.threads
        result = in_process(script, *arguments, threads=threads, environment=environment)
        what = f"{worker} {options['method']}" if "method" in options else worker
        took = f"{result['seconds']:.3g} s" if "seconds" in result else "done"
        print(f"{self.folder.name}: {what}: {took}", file=sys.stderr, flush=True)
        return result

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
    ) -> None:
        """Add a row; a target is not judged on the small shapes of a quick run."""
        row = Row(case, ours, reference, target)
        met = holds(row) if holds and not self.quick else None
        self.rows.append(Row(case, ours, reference, target, met))

    def note(self, text: str) -> None:
        """Add a line to what is printed below the table."""
        self.notes.append(text)


def at_least(figure: str, factor: float) -> Callable[[Row], bool]:
    """Whether the reference's figure is so many times ours."""
    return lambda row: (row.ratio(figure) or 0.0) >= factor


def below(figure: str, limit: float) -> Callable[[Row], bool]:
    """Whether our figure is below a limit."""
    return lambda row: row.ours[figure] < limit


def frod_12(bench: Bench) -> None:
    """FRoD on 12 layers, against PEFT's; and whether both are right."""
    _frod(bench, 12)
    small = Llama(4, 64 if bench.quick else 256, 176 if bench.quick else 704, 4, 256)
    model = write_llama(bench.folder / "frod-small", small)
    found = bench.work("frod_errors", model=str(model), out=str(bench.folder / "frod-small-adapter"))
    bench.note(
        f"frod: 4 layers of {small.hidden_size}, largest of {found['modules']} linears: |W - U diag(l) V^T| / |W| is "
        f"{found['error']:.1e}, PEFT's {found['peft_error']:.1e}; columns of U are off unit length by "
        f"{found['unit']:.1e}, PEFT's by {found['peft_unit']:.1e}; our V as stored, up to signs, "
        f"differs from PEFT's by {found['V']:.1e}, from PEFT's procedure in float64 by {found['V_double']:.1e}"
    )
    bench.rows.append(Row("frod correctness", {"errors": found}))


def frod_24(bench: Bench) -> None:
    """FRoD on twice the layers: memory must not follow the depth."""
    _frod(bench, 24)


def frod_growth(rows: list[Row], quick: bool) -> list[Row]:
    """How our peak grows with depth, where both depths were measured."""
    peaks = {row.case: {"bytes": row.ours["bytes"]} for row in rows if row.case in {"frod-12", "frod-24"}}
    if len(peaks) < 2:
        return []
    shallow, deep = peaks["frod-12"], peaks["frod-24"]
    growth = deep["bytes"] / shallow["bytes"] - 1
    case = f"frod, our peak: 24 layers against 12 ({growth:+.1%})"
    return [Row(case, deep, shallow, "grows < 10 %", None if quick else growth < 0.1)]


def _frod(bench: Bench, layers: int) -> None:
    shape = Llama(layers, 64, 176, 4, 256) if bench.quick else Llama(layers, 1024, 2816, 16, 256)
    model = write_llama(bench.folder / f"frod-{layers}-model", shape)
    ours, reference = bench.alternating(
        lambda: bench.init(model, "frod"), lambda: bench.work("peft_frod", model=str(model))
    )
    shutil.rmtree(model)
    _same_layers(ours, reference)
    case = f"frod-{layers}"
    memory, faster = at_least("bytes", 4), at_least("seconds", 2)
    bench.row(case, ours, reference, ">= 2 x faster, peak <= 1/4", lambda row: memory(row) and faster(row))
    alone = {"seconds": reference["seconds"] - reference["loading"]}
    bench.row(f"{case}, reference without loading", ours, alone, ">= 2 x faster", faster)


def _same_layers(ours: Measured, reference: Measured) -> None:
    if ours["modules"] != reference["modules"]:
        raise SystemExit(f"ours adapts {ours['modules']} layers, the reference {reference['modules']}")


def inilora(bench: Bench) -> None:
    """IniLoRA on MiniLM's query and value projections, against the paper's fit by Adam; PiSSA beside it."""
    model = minilm_folder()
    settings = {"model": str(model), "rank": RANK, "targets": QV}
    steps, error_steps = (20, 200) if bench.quick else (200, 2000)
    whole, factors, adam = bench.alternating(
        lambda: bench.init(model, "inilora", rank=RANK, target=QV),
        lambda: bench.work("inilora_factors", **settings),
        # One thread: matrices this small gain nothing from more, and lose much where the cores are shared.
        lambda: bench.work("adam_factors", threads=1, **settings, steps=steps, error_steps=error_steps),
    )
    target, holds = ">= 1,000 x faster", at_least("seconds", 1000)
    # The memory of a fit says nothing: the weights are there before it starts.
    reference = {name: value for name, value in adam.items() if name != "bytes"}
    bench.row("inilora, whole init against Adam's steps", whole, reference, target, holds)
    bench.row("inilora, factors alone against Adam's steps", factors, reference, target, holds)
    ours, fitted, least = (adam["errors"][name] for name in ("ours", "adam", "least"))
    bench.note(
        f"inilora: Adam's time is {steps} steps on 3 layers ({adam['step_seconds'] * 1e3:.2f} ms a step), scaled to "
        f"20,000 on each of {adam['layers']} layers; the least squared error on the first layer is {least:.6g}, ours "
        f"is {ours / least:.7f} times that, after {error_steps:,} steps of Adam it is {fitted / least:.7f} times"
    )
    ours, pissa = bench.alternating(
        lambda: bench.init(model, "inilora", rank=RANK),
        lambda: bench.work("peft_pissa", model=str(model), rank=RANK, targets=BLOCK_LINEARS),
    )
    _same_layers(ours, pissa)
    bench.row("inilora, all linears, against PEFT's PiSSA", ours, pissa)
    alone = {"seconds": pissa["seconds"] - pissa["loading"]}
    bench.row("inilora, all linears, PiSSA without loading", ours, alone)


def vera_7b(bench: Bench) -> None:
    """VeRA needs only shapes: no weight of a 7B is read, and the files hold none."""
    shape = Llama(4, 64, 176, 4, 256) if bench.quick else LLAMA_2_7B
    model = write_llama(bench.folder / "vera-model", shape, dtype="BF16", shards=3, sparse=True)
    seeded, stored = bench.alternating(
        lambda: bench.init(model, "vera", store_bases=False), lambda: bench.init(model, "vera")
    )
    shutil.rmtree(model)
    quick, small = below("seconds", 1.0), below("bytes", 100e6)
    bench.row("vera-7b, projections not stored", seeded, None, "< 1 s, < 100 MB", lambda row: quick(row) and small(row))
    bench.row("vera-7b, projections stored", stored)


def command_line(bench: Bench) -> None:
    """How long the command takes to say something, from the shell's point of view."""
    surgery = str(Path(sys.executable).parent / "surgery")
    usage, methods = bench.alternating(
        lambda: command_seconds(surgery, "--help"), lambda: command_seconds(surgery, "methods")
    )
    bench.row("surgery --help, whole process", usage, None, "< 0.3 s", below("seconds", 0.3))
    bench.row("surgery methods, whole process", methods)


def smoa(bench: Bench) -> None:
    """SMoA on all linears of MiniLM: the start, and the load, which rebuilds the masks."""
    model = minilm_folder()
    adapters: list[str] = []

    def start() -> Measured:
        result = bench.init(model, "smoa", keep=True, groups=2)
        adapters.append(result.pop("out"))
        return result

    started, loaded = bench.alternating(start, lambda: bench.work("load", model=str(model), adapter=adapters[-1]))
    bench.row("smoa, K = 2, all linears of MiniLM: init", started)
    bench.row("smoa, K = 2, all linears of MiniLM: load", loaded)


def minilm(bench: Bench) -> None:
    """Every method's start on all linears of MiniLM."""
    from surgery.catalogue import METHODS

    model = minilm_folder()
    methods = list(METHODS)[:1] if bench.quick else list(METHODS)
    results = bench.alternating(*(lambda method=method: bench.init(model, method) for method in methods))
    for method, result in zip(methods, results, strict=True):
        bench.row(f"init {method}, all linears of MiniLM", result)


def frod_7b(bench: Bench) -> None:
    """The decomposition behind FRoD for all seven linears of a 7B, on a GPU."""
    on_gpu = bench.device.startswith("cuda")
    device = bench.device if on_gpu or bench.quick else "cuda"
    shape = Llama(3, 64, 176, 4, 256) if bench.quick else LLAMA_2_7B
    result = bench.work("joint", layers=shape.num_hidden_layers, shapes=shape.linears(), device=device)
    if "seconds" not in result:
        bench.note("frod-7b: no GPU is available here, so nothing was measured; the case is ready for one")
        return
    bench.row("frod-7b, decomposition", result, None, "<= 120 s", lambda row: row.ours["seconds"] <= 120)
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in result["role_seconds"].items())
    bench.note(f"frod-7b: one run on {result['device_name']}, reading and writing left out: {seconds}")


CASES: dict[str, Callable[[Bench], None]] = {
    "frod-12": frod_12,
    "frod-24": frod_24,
    "inilora": inilora,
    "vera-7b": vera_7b,
    "help": command_line,
    "smoa": smoa,
    "minilm": minilm,
    "frod-7b": frod_7b,
}


def surroundings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "scipy", "numpy")}
    return {
        **settings,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **packages,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the cost of `surgery init` against its references.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--runs", type=int, help="measurements of each side, of which the median counts (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch, BLAS and LAPACK, on both sides (default: every core)")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this case; repeatable")
    parser.add_argument("--quick", action="store_true", help="small shapes and one run: checks that the script works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the rows")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(cases: list[str], settings: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Measure these cases, with settings as in `Bench`.

    Returns:
        The rows and the notes.
    """
    quick = settings["quick"]
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:

        def one(case: str) -> Bench:
            bench = Bench(Path(folder) / case, **settings)
            CASES[case](bench)
            return bench

        # One at a time: only where no figure counts may two of them share the machine.
        with ThreadPoolExecutor(max_workers=2 if quick else 1) as pool:
            benches = list(pool.map(one, cases))
    rows = [row for bench in benches for row in bench.rows]
    return rows + frod_growth(rows, quick), [note for bench in benches for note in bench.notes]


def main() -> None:
    """Measure, print, save."""
    options = arguments()
    if options.worker:
        from benchmarks.workers import run

        run(*options.worker)
        return
    on_gpu = options.device.startswith("cuda")
    cases = [
        case for case in CASES if case in (options.case or CASES) and (options.case or on_gpu or case != "frod-7b")
    ]
    runs = options.runs or (1 if options.quick else 3)
    settings = {"device": options.device, "runs": runs, "quick": options.quick, "threads": options.threads}
    rows, notes = measure(cases, settings)
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


if __name__ == "__main__":
    main()
