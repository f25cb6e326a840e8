"""What a step of `surgery train` costs beside a bare `Trainer`, and what a teacher adds to it.

python benchmarks/train.py                     # everything, on the CPU
python benchmarks/train.py --quick             # a few short steps: only checks that the script works

A step's time is the slope of two runs of different lengths, so that loading, evaluating and writing do not count. On
the CPU it is the processor's time, which others on the machine disturb least. The sides take turns.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from transformers import AutoTokenizer, Trainer, TrainingArguments

import surgery
from benchmarks.bench import Bench, Case, at_most, main
from benchmarks.models import minilm_folder
from benchmarks.process import alternating

STEPS, FIRST, BATCH, RATE = 24, 4, 32, 1e-3


def texts(path: Path, count: int) -> Path:
    """Paragraphs of docstrings from the standard library, with labels that mean nothing."""
    found: list[str] = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found += [" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")]
    chosen = random.Random(0).sample([text for text in found if len(text.split()) > 20], count)
    rows = [json.dumps({"text": text, "label": index % 2}) + "\n" for index, text in enumerate(chosen)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def bare(adapter: Path, data: Path, tokens: int, device: str) -> Callable[[int], None]:
    """A stock `Trainer` on tokens that are there already."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    samples = [{**tokenizer(row["text"], truncation=True, max_length=tokens), "labels": row["label"]} for row in rows]

    def run(steps: int) -> None:
        model = surgery.trainable(adapter, minilm_folder())
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE,
                use_cpu=device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            collator = transformers.DataCollatorWithPadding(tokenizer)
            trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    return run


def ours(adapter: Path, data: Path, tokens: int, device: str, **options: Any) -> Callable[[int], None]:
    """`surgery.train` with its evaluations, checkpoints and output."""

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            surgery.train(
                adapter, minilm_folder(), data, out=Path(folder) / "out", steps=steps, lr=RATE, batch_size=BATCH,
                max_length=tokens, device=device, **options,
            )  # fmt: skip

    return run


def slope(run: Callable[[int], None], steps: int, first: int, device: str) -> dict[str, float]:
    """Seconds a step."""
    clock = time.process_time if device == "cpu" else time.perf_counter

    def taken(count: int) -> float:
        began = clock()
        run(count)
        return clock() - began

    return {"seconds": (taken(first + steps) - taken(first)) / steps}


def step(bench: Bench) -> None:
    """MiniLM with a GiVA adapter of rank 8 and a head."""
    steps, first, tokens = (2, 1, 16) if bench.quick else (STEPS, FIRST, 64)
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench.folder.mkdir(parents=True, exist_ok=True)
    data = texts(bench.folder / "data.jsonl", 128)
    few = texts(bench.folder / "few.jsonl", BATCH)
    adapter = bench.folder / "adapter"
    surgery.init(minilm_folder(), "giva", adapter, task="seq-cls", data=data, max_length=tokens)
    place = (tokens, bench.device)
    taught = {"teacher": adapter}
    sides = [
        bare(adapter, data, *place),
        ours(adapter, data, *place),
        ours(adapter, data, *place, **taught),
        bare(adapter, few, *place),
        ours(adapter, few, *place, **taught, cache_teacher=True),
    ]
    timed = [lambda run=run: slope(run, steps, first, bench.device) for run in sides]
    stock, plain, teacher, stock_few, cached = alternating(bench.runs, *timed)
    bench.row("train, MiniLM: bare Trainer", plain, stock, "<= 1.05 x time", at_most("seconds", 1.05))
    bench.row("train --teacher, MiniLM: bare Trainer", teacher, stock, "<= 1.8 x time", at_most("seconds", 1.8))
    bench.row(
        "train --teacher --cache-teacher, later epochs: bare Trainer",
        cached,
        stock_few,
        "less than 1.8 x time",
        at_most("seconds", 1.5),
    )


CASES: dict[str, Case] = {"step": step}

if __name__ == "__main__":
    main(CASES, "Measure what a step of training costs beside a bare Trainer.")
