"""The cost of `surgery init`: every claim against its reference, measured in the same run.

python benchmarks/init.py                      # everything, on the CPU
python benchmarks/init.py --quick              # small shapes: only checks that the script works
python benchmarks/init.py --case frod-12 --json rows.json
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Case, at_least, below, main
from benchmarks.floor import Work
from benchmarks.models import LLAMA_2_7B, LLAMA_3_70B, Llama, block_linears, file_bytes, minilm_folder, write_llama
from benchmarks.process import Measured, command_seconds
from benchmarks.rows import Row

QV = ["query", "value"]
# Every linear of MiniLM's blocks, which is what surgery adapts by default; PEFT's own would add the pooler.
BLOCK_LINEARS = r"encoder\.layer\..*\.(query|key|value|dense)"
RANK = 8


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
    peaks = {row.case: {"bytes": row.ours["bytes"]} for row in rows if row.case in map(_frod_case, (12, 24))}
    if len(peaks) < 2:
        return []
    shallow, deep = (peaks[_frod_case(layers)] for layers in (12, 24))
    growth = deep["bytes"] / shallow["bytes"] - 1
    case = f"frod, our peak: 24 layers against 12 ({growth:+.1%})"
    return [Row(case, deep, shallow, "grows < 10 %", None if quick else growth < 0.1)]


def _frod(bench: Bench, layers: int) -> None:
    shape = Llama(layers, 64, 176, 4, 256) if bench.quick else Llama(layers, 1024, 2816, 16, 256)
    model = write_llama(bench.folder / f"frod-{layers}-model", shape)
    ours, reference = bench.alternating(
        lambda: bench.init(model, "frod"), lambda: bench.work("peft_frod", model=str(model))
    )
    floor = _frod_floor(model, ours["file_bytes"])
    shutil.rmtree(model)
    _same_layers(ours, reference)
    case = _frod_case(layers)
    memory, faster = at_least("bytes", 4), at_least("seconds", 2)
    bench.row(case, ours, reference, ">= 2 x faster, peak <= 1/4", lambda row: memory(row) and faster(row), floor)
    alone = {"seconds": reference["seconds"] - reference["loading"]}
    bench.row(f"{case} without loading", ours, alone, ">= 2 x faster", faster, floor)


def _frod_case(layers: int) -> str:
    return f"frod, {layers} layers of 1024: PEFT's FrodConfig"


def _frod_floor(model: Path, written: int) -> Work:
    """Two visits to each weight: its Gram matrix, the inverse's, and the norms of its columns; for each role one basis.

    Of a symmetric result half is computed. An eigendecomposition is counted as its reduction to a tridiagonal matrix
    (4/3 n^3) and the vectors' way back (2 n^3).
    """
    linears = block_linears(model)
    widths = {name.split(".", 3)[-1]: columns for name, (_, columns) in linears.items()}
    return Work(
        read=2 * file_bytes(model),
        written=written,
        float32=sum(2.0 * rows * columns**2 for rows, columns in linears.values()),
        float64=sum(2.0 * rows * columns**2 + columns**3 for rows, columns in linears.values())
        + sum(10 / 3 * columns**3 for columns in widths.values()),
    )


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
    chosen = [shape for name, shape in block_linears(model).items() if any(target in name for target in QV)]
    floor = _low_rank_floor(chosen, whole["file_bytes"])
    bench.row("inilora, whole init against Adam's steps", whole, reference, target, holds, floor)
    floor = _low_rank_floor(chosen, 0, from_memory=True)
    bench.row("inilora, factors alone against Adam's steps", factors, reference, target, holds, floor)
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
    floor = _low_rank_floor(list(block_linears(model).values()), ours["file_bytes"])
    target, quicker, lighter = "no slower, no larger", at_least("seconds", 1), at_least("bytes", 1)
    bench.row(
        "inilora, all linears, against PEFT's PiSSA", ours, pissa, target,
        lambda row: quicker(row) and lighter(row), floor,
    )  # fmt: skip
    alone = {"seconds": pissa["seconds"] - pissa["loading"]}
    bench.row("inilora, all linears, PiSSA without loading", ours, alone, "no slower", quicker, floor)


def _low_rank_floor(shapes: list[tuple[int, int]], written: int, from_memory: bool = False) -> Work:
    """Each float32 weight read once; two products with as many columns as the rank, for its two factors."""
    numbers = sum(rows * columns for rows, columns in shapes)
    products = 4.0 * RANK * numbers
    return Work(float32=products) if from_memory else Work(read=4 * numbers, written=written, float32=products)


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
    """How long the command takes to say something, and the package to be imported, from the shell's point of view."""
    surgery = str(Path(sys.executable).parent / "surgery")
    usage, methods, ours, peft = bench.alternating(
        lambda: command_seconds(surgery, "--help"),
        lambda: command_seconds(surgery, "methods"),
        lambda: command_seconds(sys.executable, "-c", "import surgery"),
        lambda: command_seconds(sys.executable, "-c", "import peft"),
    )
    bench.row("surgery --help, whole process", usage, None, "< 0.3 s", below("seconds", 0.3))
    bench.row("surgery methods, whole process", methods)
    bench.row("import surgery, whole process: import peft", ours, peft)


def smoa(bench: Bench) -> None:
    """SMoA on all linears of MiniLM: the start, and the load, of both variants; and the scores of one weight."""
    model = minilm_folder()
    adapters: list[str] = []

    def start(variant: str) -> Measured:
        result = bench.init(model, "smoa", keep=True, groups=2, variant=variant)
        adapters.append(result.pop("out"))
        return result

    for variant in ("blocks", "components"):
        started, loaded = bench.alternating(
            lambda variant=variant: start(variant),
            lambda: bench.work("loaded", model=str(model), adapter=adapters[-1]),
        )
        bench.row(f"smoa {variant}, K = 2, all linears of MiniLM: init", started)
        bench.row(f"smoa {variant}, K = 2, all linears of MiniLM: load", loaded)
    sizes = (128,) if bench.quick else (1024, 2048, 4096)
    for rows, columns in [(size, size) for size in sizes] + [(4 * size, size) for size in sizes]:
        shape = {"rows": rows, "columns": columns}
        ours, theirs = bench.alternating(
            *(lambda side=side, shape=shape: bench.work(side, **shape) for side in ("smoa_scores", "smoa_full_svd"))
        )
        case = (
            f"smoa blocks, order of a weight of {rows} x {columns}: by the full SVD in float32, as in the authors' code"
        )
        bench.row(case, ours, theirs, "<= 1/2 of the time", at_least("seconds", 2))


def minilm(bench: Bench) -> None:
    """Every method's start on all linears of MiniLM."""
    from surgery.methods.registry import method_infos

    model = minilm_folder()
    names = [info.name for info in method_infos() if not info.reads_gradients]  # those have a benchmark of their own
    methods = names[:1] if bench.quick else names
    results = bench.alternating(*(lambda method=method: bench.init(model, method) for method in methods))
    for method, result in zip(methods, results, strict=True):
        bench.row(f"init {method}, all linears of MiniLM", result)


def vera(bench: Bench) -> None:
    """VeRA on all linears of MiniLM, to the verified file, against PEFT's, which is not saved."""
    model, rank = minilm_folder(), 256
    ours, theirs = bench.alternating(
        lambda: bench.init(model, "vera", rank=rank),
        lambda: bench.work("peft_vera", model=str(model), rank=rank, targets=BLOCK_LINEARS),
    )
    _same_layers(ours, theirs)
    case = f"vera, r = {rank}, all linears of MiniLM, to the file: PEFT's loading and get_peft_model"
    bench.row(case, ours, theirs, "no slower", at_least("seconds", 1))


def frod_7b(bench: Bench) -> None:
    """The decomposition behind FRoD for all seven linears of a 7B, on a GPU."""
    _decomposition(bench, "frod-7b", LLAMA_2_7B, 120)


def frod_70b(bench: Bench) -> None:
    """The same for a 70B: what its widest role, 28672, takes in double precision."""
    _decomposition(bench, "frod-70b", LLAMA_3_70B, None)


def _decomposition(bench: Bench, case: str, llama: Llama, limit: float | None) -> None:
    on_gpu = bench.device.startswith("cuda")
    device = bench.device if on_gpu or bench.quick else "cuda"
    shape = Llama(3, 64, 176, 4, 256) if bench.quick else llama
    result = bench.work("joint", layers=shape.num_hidden_layers, shapes=shape.linears(), device=device)
    if "seconds" not in result:
        bench.note(f"{case}: no GPU is available here, so nothing was measured; the case is ready for one")
        return
    target, holds = (f"<= {limit:g} s", below("seconds", limit)) if limit else ("", None)
    bench.row(f"{case}, decomposition", result, None, target, holds)
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in result["role_seconds"].items())
    bench.note(f"{case}: one run on {result['device_name']}, reading and writing left out: {seconds}")


CASES: dict[str, Case] = {
    "frod-12": frod_12,
    "frod-24": frod_24,
    "inilora": inilora,
    "vera": vera,
    "vera-7b": vera_7b,
    "help": command_line,
    "smoa": smoa,
    "minilm": minilm,
    "frod-7b": frod_7b,
    "frod-70b": frod_70b,
}

GPU_ONLY = frozenset({"frod-7b", "frod-70b"})

if __name__ == "__main__":
    main(
        CASES,
        "Measure the cost of `surgery init` against its references.",
        gpu_only=GPU_ONLY,
        more_rows=frod_growth,
    )
