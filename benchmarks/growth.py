"""How time and memory grow with depth, width, rank and tokens: exponents of fitted power laws.

python benchmarks/growth.py                   # everything, on the CPU
python benchmarks/growth.py --case depth

An exponent of 1 is growth in proportion, 0 none. Memory that does not follow the depth lets a model of any depth
through; time should follow depth, and no more than what the operations do follow width.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Case, main
from benchmarks.models import Llama, write_llama, write_lora
from benchmarks.process import Measured

DEPTHS, WIDTHS, RANKS, TOKENS = (4, 8, 16, 32), (512, 1024, 2048, 4096), (8, 16, 32, 64), (256, 1024, 4096)
WIDTH, DEPTH = 256, 4
METHODS = ("vera", "inilora", "frod", "smoa")

Kind = Callable[[Bench, Llama, Path], Measured]


def depth(bench: Bench) -> None:
    """From few layers to many, at one width; `scale.py depth` tells whether whole processes stay flat."""
    values, hidden = ((2, 4), 64) if bench.quick else (DEPTHS, WIDTH)
    for name, kind in _kinds().items():
        _exponents(bench, f"{name}, depth", {v: _measured(bench, kind, _shape(v, hidden)) for v in values})


def width(bench: Bench) -> None:
    """From narrow layers to wide ones, two of them."""
    for name, kind in _kinds().items():
        if name == "init frod":
            continue  # its own exponent, 3, is minutes at 4096 on a CPU: see rank and depth
        values = (64, 128) if bench.quick else WIDTHS
        _exponents(bench, f"{name}, width", {v: _measured(bench, kind, _shape(2, v)) for v in values})


def rank(bench: Bench) -> None:
    """What a method's rank costs."""
    shape = _shape(2, 64) if bench.quick else _shape(DEPTH, 1024)
    for method in ("inilora", "smoa", "vera"):
        values = (2, 4) if bench.quick else RANKS
        kinds = {v: lambda b, _, model, m=method, r=v: b.init(model, m, rank=r) for v in values}
        found = {value: _measured(bench, kind, shape) for value, kind in kinds.items()}
        _exponents(bench, f"init {method}, rank", found)


def tokens(bench: Bench) -> None:
    """What the calibration data of GiVA costs: its gradient pass by tokens."""
    llama = _shape(2, 64) if bench.quick else _shape(DEPTH, 512)
    # The tokens that the pass draws are from 1,000 on.
    shape = {**vars(llama), "num_key_value_heads": llama.num_attention_heads, "vocab_size": 2048}
    values = (16, 32) if bench.quick else TOKENS
    found = {
        value: bench.work(
            "giva_bases", model="random", samples=max(value // 128, 1), tokens=min(value, 128), rank=8, **shape
        )
        for value in values
    }
    _exponents(bench, "init giva, tokens", found)


def _kinds() -> dict[str, Kind]:
    kinds: dict[str, Kind] = {f"init {m}": (lambda b, _, model, m=m: b.init(model, m)) for m in METHODS}
    kinds["convert --to giva --ratio 20"] = lambda b, _, model: b.work(
        "convert", adapter=str(model.parent / "lora"), to="giva", ratio=20
    )
    kinds["merge"] = lambda b, _, model: b.work(
        "merge", model=str(model), adapter=str(model.parent / "lora"), out=str(model.parent / "merged")
    )
    return kinds


def _shape(layers: int, hidden: int) -> Llama:
    return Llama(layers, hidden, hidden * 11 // 4, max(hidden // 64, 1), 256)


def _measured(bench: Bench, kind: Kind, shape: Llama) -> Measured:
    folder = bench.folder / "one"
    folder.mkdir()
    model = write_llama(folder / "model", shape)
    write_lora(folder / "lora", shape, 16)
    try:
        return bench.alternating(lambda: _once(bench, kind, shape, model))[0]
    finally:
        shutil.rmtree(folder)


def _once(bench: Bench, kind: Kind, shape: Llama, model: Path) -> Measured:
    found = kind(bench, shape, model)
    shutil.rmtree(model.parent / "merged", ignore_errors=True)
    return found


def _exponents(bench: Bench, name: str, found: dict[int, Measured]) -> None:
    sizes = list(found)
    said = ", ".join(f"{size}: {one['seconds']:.3g} s, {one['bytes'] / 1e6:.0f} MB" for size, one in found.items())
    time, memory = (exponent(sizes, [one[figure] for one in found.values()]) for figure in ("seconds", "bytes"))
    bench.note(f"{name}: time grows with exponent {time:.2f}, peak memory with {memory:.2f} ({said})")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


CASES: dict[str, Case] = {"depth": depth, "width": width, "rank": rank, "tokens": tokens}

if __name__ == "__main__":
    main(CASES, "Measure how costs grow.")
