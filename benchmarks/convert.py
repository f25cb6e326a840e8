"""The cost of `surgery convert`: a LoRA of a 7B shape into few bits, and VeRA to LoRA against PEFT's own conversion.

python benchmarks/convert.py                      # everything
python benchmarks/convert.py --quick              # small shapes: only checks that the script works

How good conversions are is measured by compress.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Case, at_least, main
from benchmarks.floor import Work
from benchmarks.models import LLAMA_2_7B, Llama, block_linears, write_llama, write_lora
from benchmarks.rows import Row

MOST_SECONDS, MOST_BYTES = 30.0, 1.5e9
VERA_RANK = 32


def convert_7b(bench: Bench) -> None:
    """A LoRA of rank 16 on all linears of a 7B, without data."""
    shape = Llama(2, 64, 176, 4, 256) if bench.quick else LLAMA_2_7B
    lora = write_lora(bench.folder / "lora", shape, 16)
    for name, options in {
        "every rank in 4 bits": {"bits": 4, "rank": 16},
        "1/20 of the bytes, codes of any width": {"ratio": 20},
    }.items():
        (ours,) = bench.alternating(
            lambda options=options: bench.work("convert", adapter=str(lora), to="giva", **options)
        )
        bench.row(
            f"LoRA r = 16, {ours['modules']} linears, {name}", ours, None, "<= 30 s, <= 1.5 GB",
            lambda row: row.ours["seconds"] <= MOST_SECONDS and row.ours["process_bytes"] <= MOST_BYTES,
            # What bytes alone take: how many codes must be tried nobody knows.
            floor=Work(read=ours["source_bytes"], written=ours["file_bytes"]),
        )  # fmt: skip
        bench.note(
            f"{name}: {ours['source_bytes'] / 1e6:.1f} MB to {ours['file_bytes'] / 1e6:.1f} MB, weight error "
            f"{ours['weight_error']:.2%}, peak of the whole process {ours['process_bytes'] / 1e9:.2f} GB"
        )


def export(bench: Bench) -> None:
    """A trained VeRA of a Llama with 2048 features, as a LoRA."""
    shape = Llama(1, 64, 176, 4, 256) if bench.quick else Llama(2, 2048, 2048, 16, 256)
    model = write_llama(bench.folder / "model", shape)
    vera = str(bench.folder / "vera")
    bench.work("trained_vera", model=str(model), out=vera, rank=VERA_RANK)
    options = {"adapter": vera, "model": str(model)}
    ours, theirs = bench.alternating(
        lambda: bench.work("exported", **options), lambda: bench.work("peft_exported", rank=VERA_RANK, **options)
    )
    fast = at_least("seconds", 50)
    bench.row(
        f"VeRA r = {VERA_RANK} to LoRA, {ours['modules']} linears of {shape.hidden_size}: PEFT's convert_to_lora",
        ours, theirs, ">= 50 x, error no larger", lambda row: fast(row) and _no_worse(row),
        # The projections are read, and the factors written, in memory.
        floor=Work(memory=2 * 4.0 * VERA_RANK * sum(map(sum, block_linears(model).values()))),
    )  # fmt: skip
    bench.note(f"largest relative error of a layer's change: ours {ours['error']:.1e}, PEFT's {theirs['error']:.1e}")


def _no_worse(row: Row) -> bool:
    return bool(row.ours["error"] <= (row.reference or {})["error"])


CASES: dict[str, Case] = {"convert-7b": convert_7b, "export": export}

if __name__ == "__main__":
    main(CASES, "Measure the cost of conversions against their references.")
