"""The cost of GiVA's gradient pass, against one training step with frozen weights and against the plain recipe.

python benchmarks/giva.py                      # everything, on the CPU
python benchmarks/giva.py --quick              # small shapes: only checks that the script works
python benchmarks/giva.py --device cuda --case giva-7b
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Case, at_most, main
from benchmarks.floor import Work
from benchmarks.models import LLAMA_2_7B, Llama, block_linears, minilm_folder
from benchmarks.rows import Row

# About 300 million parameters.
LLAMA_300M = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TINY = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def giva_minilm(bench: Bench) -> None:
    """A real classifier; and how much of the gradient is captured."""
    options = {"model": str(minilm_folder()), "samples": 32, "tokens": 128}
    _compared(bench, "giva, MiniLM", options)
    for rank in (8, 32):
        found = bench.work("giva_energy", **options, rank=rank)
        bench.note(
            f"giva, MiniLM, r = {rank}: of what the exact top {rank} singular vectors of a layer's gradient capture, "
            f"ours capture {found['mean']:.4%} (least of all layers {found['least']:.4%}), svd_lowrank's "
            f"{found['plain_mean']:.4%} ({found['plain_least']:.4%})"
        )
        bench.rows.append(Row("giva energy", {"captured": found, "rank": rank}))


def giva_llama(bench: Bench) -> None:
    """A random Llama of 300 million parameters."""
    options = {"model": "random", "samples": 32, "tokens": 128, **LLAMA_300M}
    _compared(bench, "giva, Llama 300M", options)


def giva_7b(bench: Bench) -> None:
    """A 7B in bfloat16, 32 samples of 512 tokens, on a GPU."""
    shape = {**vars(LLAMA_2_7B), "num_key_value_heads": LLAMA_2_7B.num_attention_heads}
    options: dict[str, Any] = {"model": "random", "samples": 32, "tokens": 512, "dtype": "bfloat16", **shape}
    _compared(bench, "giva, Llama 7B", options, ranks=(8,), judged=False)


def _compared(
    bench: Bench, case: str, options: dict[str, Any], ranks: tuple[int, ...] = (8, 32), judged: bool = True
) -> None:
    if bench.quick:
        small = {} if options["model"] != "random" else TINY
        options = {**options, "samples": 2, "tokens": 16, **small}
    for checkpointing in (False, True):
        name = f"{case}, checkpointing" if checkpointing else case
        for rank in ranks if not checkpointing else ranks[:1]:
            settings = {**options, "rank": rank, "checkpointing": checkpointing}
            ours, frozen, plain = bench.alternating(
                lambda settings=settings: bench.time_and_memory("giva_bases", **settings),
                lambda settings=settings: bench.time_and_memory("frozen_step", **settings),
                lambda settings=settings: bench.time_and_memory("plain_recipe", **settings),
            )
            judge = judged and rank == 8
            _rows(bench, f"{name}, r = {rank}", [ours, frozen, plain], _floor(settings), judge)


def _floor(settings: dict[str, Any]) -> Work:
    """A pass forward, a second one with checkpointing, one back to the inputs; two products with the rank's columns."""
    if settings["model"] == "random":
        fields = [settings[name] for name in Llama.__dataclass_fields__]
        shapes = list(Llama(*fields).linears().values()) * settings["num_hidden_layers"]
    else:
        shapes = list(block_linears(Path(settings["model"])).values())
    passes = 3 if settings["checkpointing"] else 2
    each = sum(2 * passes * rows * columns + 2 * settings["rank"] * (rows + columns) for rows, columns in shapes)
    return Work(float32=float(settings["samples"] * settings["tokens"] * each))


def _rows(bench: Bench, case: str, sides: list[Any], floor: Work, judged: bool) -> None:
    ours, frozen, plain = sides
    memory = "gpu_bytes" if "gpu_bytes" in ours else "bytes"
    light, quick, cheap = at_most(memory, 1.1), at_most("seconds", 1.3), at_most("seconds", 0.85)
    bench.row(
        f"{case}: frozen step",
        ours,
        frozen,
        "<= 1.3 x time, <= 1.1 x memory" if judged else "",
        (lambda row: quick(row) and light(row)) if judged else None,
        floor,
    )
    if "seconds" not in plain:
        bench.note(f"{case}: the plain recipe ran out of memory")
        return
    smaller = at_most(memory, 1.0)
    bench.row(
        f"{case}: plain recipe",
        ours,
        plain,
        "<= 0.85 x time, less memory" if judged else "",
        (lambda row: cheap(row) and smaller(row)) if judged else None,
        floor,
    )


CASES: dict[str, Case] = {"giva-minilm": giva_minilm, "giva-llama": giva_llama, "giva-7b": giva_7b}
GPU_ONLY = frozenset({"giva-7b"})

if __name__ == "__main__":
    main(CASES, "Measure the cost of GiVA's start against its references.", gpu_only=GPU_ONLY)
