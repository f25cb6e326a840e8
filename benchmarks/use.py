"""What adapters cost in use: loading, training steps, forward passes, merging.

python benchmarks/use.py                      # everything, on the CPU
python benchmarks/use.py --quick              # small shapes: only checks that the script works
python benchmarks/use.py --case frod --device cuda
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Case, at_least, at_most, main
from benchmarks.floor import Work
from benchmarks.models import Llama, block_linears, file_bytes, write_llama, write_lora
from benchmarks.process import Measured

SAMPLES, MANY_SAMPLES, TOKENS = 4, 16, 128
FORMS = ("vera", "giva packed", "inilora", "frod", "smoa")
OWN_METHODS = {"vera", "inilora", "frod", "smoa"}


def _model(bench: Bench, layers: int, width: int, dtype: str = "F32") -> tuple[Path, Llama]:
    shape = Llama(2, 64, 176, 4, 256) if bench.quick else Llama(layers, width, width * 11 // 4, width // 64, 1024)
    folder = bench.folder / "model"
    return (folder if folder.exists() else write_llama(folder, shape, dtype)), shape


def _sizes(bench: Bench) -> dict[str, int]:
    return {"samples": 1, "tokens": 8} if bench.quick else {"samples": SAMPLES, "tokens": TOKENS}


def frod(bench: Bench) -> None:
    """A FRoD adapter after it is saved: loading it, and training it, beside PEFT's FRoD and a LoRA."""
    model, _ = _model(bench, 8, 512)
    sides = {}
    for form in ("frod", "peft-frod", "lora"):
        out = bench.folder / form
        bench.work("started", model=str(model), form=form, out=str(out))
        sides[form] = {"model": str(model), "adapter": str(out)}
    ours, theirs = bench.alternating(
        *(lambda s=sides[form]: bench.work("loaded", **s) for form in ("frod", "peft-frod"))
    )
    quicker, lighter = at_least("seconds", 1), at_least("bytes", 1)
    bench.row(
        "load FRoD: PEFT's", ours, theirs, "no slower, no larger", lambda row: quicker(row) and lighter(row),
        floor=Work(read=file_bytes(bench.folder / "frod")),
    )  # fmt: skip
    for samples in (SAMPLES,) if bench.quick else (SAMPLES, MANY_SAMPLES):
        _frod_step(bench, model, sides, samples)


def _frod_step(bench: Bench, model: Path, sides: dict[str, dict[str, str]], samples: int) -> None:
    sizes = {**_sizes(bench), "samples": 1 if bench.quick else samples}
    step, peft_step, lora_step = bench.alternating(
        *(lambda s=side: bench.work("training_step", **s, **sizes) for side in sides.values())
    )
    tokens = sizes["samples"] * sizes["tokens"]
    # Forward, and back to the inputs; what an adapter adds to the base's own products is left out.
    numbers = sum(rows * columns for rows, columns in block_linears(model).values())
    floor = Work(float32=4.0 * tokens * numbers)
    case = f"training step of FRoD, {tokens:,} tokens"
    bench.row(f"{case}: PEFT's", step, peft_step, "no slower", at_least("seconds", 1), floor)
    bench.row(f"{case}: of a LoRA r = 8", step, lora_step, "<= 1.8 x", at_most("seconds", 1.8), floor)


def forms(bench: Bench) -> None:
    """Every form after load: memory of the adapter, and a forward pass, beside a LoRA of rank 8."""
    model, shape = _model(bench, 8, 512)
    lora = write_lora(bench.folder / "lora", shape, 8)
    adapters = {"lora": lora}
    for form in FORMS:
        out = adapters[form] = bench.folder / form.replace(" ", "-")
        if form in OWN_METHODS:
            bench.work("started", model=str(model), form=form, out=str(out))
        else:
            bench.work("convert", adapter=str(lora), to="giva", out=str(out), ratio=20)
    places = {form: {"model": str(model), "adapter": str(path)} for form, path in adapters.items()}
    loads = bench.alternating(*(lambda p=place: bench.work("loaded", **p) for place in places.values()))
    passes = bench.alternating(
        *(lambda p=place: bench.work("forward_pass", **p, **_sizes(bench)) for place in places.values()),
        lambda: bench.work("forward_pass", model=str(model), adapter=None, **_sizes(bench)),
    )
    base = passes.pop()
    bench.row("forward pass of a LoRA r = 8: of the base alone", passes[0], base)
    for form, load, forward in list(zip(places, loads, passes, strict=True))[1:]:
        bench.row(f"load {form}: a LoRA r = 8", load, loads[0])
        bench.row(f"forward pass of {form}: of a LoRA r = 8", _time(forward), _time(passes[0]))


def merge(bench: Bench) -> None:
    """A LoRA of rank 16 into its base: PEFT's merge and save."""
    model, shape = _model(bench, 16, 1024)
    lora = write_lora(bench.folder / "lora", shape, 16)
    size = (model / "model.safetensors").stat().st_size
    options = {"model": str(model), "adapter": str(lora)}
    ours, theirs = bench.alternating(
        lambda: _merged(bench, "merge", options), lambda: _merged(bench, "peft_merge", options)
    )
    quicker, lighter = at_least("seconds", 1), at_least("bytes", 1)
    changed = shape.num_hidden_layers * sum(rows * columns for rows, columns in shape.linears().values())
    bench.row(
        f"merge LoRA r = 16 into {size / 1e9:.2g} GB: PEFT's merge_and_unload, save_pretrained", ours, theirs,
        "no slower, no larger", lambda row: quicker(row) and lighter(row),
        # Read, written, and read again to compare.
        floor=Work(read=2 * size, written=size, float32=2.0 * 16 * changed),
    )  # fmt: skip


def _merged(bench: Bench, worker: str, options: dict[str, str]) -> Measured:
    out = bench.folder / "merged"
    result = bench.work(worker, out=str(out), **options)
    shutil.rmtree(out)
    return result


def _time(found: Measured) -> Measured:
    return {"seconds": found["seconds"]}


def smoa(bench: Bench) -> None:
    """A training step of SMoA, as published, on linears of 1024 alone: a LoRA's of the same rank."""
    size, layers, rank = (64, 2, 8) if bench.quick else (1024, 8, 32)
    for tokens in (8,) if bench.quick else (512, 2048):
        ours, lora = bench.alternating(
            *(
                lambda form=form, tokens=tokens: bench.work(
                    "stack_step", form=form, layers=layers, size=size, rank=rank, tokens=tokens
                )
                for form in ("smoa", "lora")
            )
        )
        case = f"training step of SMoA, {layers} linears of {size}, {tokens:,} tokens: of a LoRA r = {rank}"
        target = ("<= 1.4 x", at_most("seconds", 1.4)) if tokens == 2048 else ("", None)
        bench.row(case, _time(ours), _time(lora), *target)


CASES: dict[str, Case] = {"frod": frod, "forms": forms, "smoa": smoa, "merge": merge}

if __name__ == "__main__":
    main(CASES, "Measure what adapters cost in use.")
