"""`surgery.train`: light training of an adapter, or its distillation from another one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.errors import OptionError
from surgery.models.tasks import TaskName
from surgery.passes.data_settings import DataSettings
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.safetensors_read import file_bytes
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import LoadedDtype
from surgery.system.keywords import keywords
from surgery.system.processes import Processes, processes
from surgery.system.progress import Progress
from surgery.training.new_head import with_new_head
from surgery.training.preparing import prepare
from surgery.training.report import TrainReport
from surgery.training.run import Feed, Run
from surgery.training.run_folder import Unfinished
from surgery.training.settings import Schedule, TrainSettings
from surgery.training.trainer import Announce

__all__ = ["train"]


@keywords(data=DataSettings, settings=TrainSettings)
def train(
    adapter: str | Path | Adapter,
    base: str | Path,
    data: str | Path | DataSettings,
    eval_data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    max_steps: int = 200,
    learning_rate: float | None = None,
    resume: bool = True,
    teacher: str | Path | Adapter | None = None,
    hidden_weight: float = 1.0,
    cache_teacher: bool = False,
    batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    lr_scheduler_type: Schedule = "linear",
    warmup_ratio: float = 0.0,
    max_length: int | None = None,
    chat_template: str | Path | None = None,
    only: Sequence[str] = (),
    save_steps: int | None = None,
    gradient_checkpointing: bool = False,
    task: TaskName | None = None,
    device: Device = "auto",
    dtype: LoadedDtype = "float32",
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    settings: TrainSettings | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    new_head: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> tuple[Adapter, TrainReport]:
    """Train what an adapter's type trains, and the heads that it carries; all else stays as it is, bit for bit.

    The training is transformers' `Trainer` with its defaults (AdamW, no weight decay, gradients clipped at norm 1), so
    that a stock `Trainer` with the same arguments comes to the same result. Under `torchrun` or `accelerate launch`
    the processes share each batch. With a teacher the adapter learns to answer as that one does; no labels are needed.

    Args:
        adapter: a folder, a Hub id, or an opened `Adapter`, of any type.
        base: its base model, a folder or a Hub id.
        data: what is trained on: `.jsonl`, `.txt`, `.csv` or `.parquet`, for images also a folder; or `DataSettings`.
        eval_data: what the adapter is evaluated on before and after; default the first of `data`'s samples.
        out: the folder to write; None writes nothing.
        max_steps: optimizer steps.
        learning_rate: default the one of the adapter's method (`surgery methods`).
        resume: go on with a training of `out` with the same options that was interrupted or killed.
        teacher: an adapter of the same base whose answers are learnt.
        hidden_weight: weight of the hidden states' distance beside the predictions' KL divergence.
        cache_teacher: keep up to 1 GiB of the teacher's answers, for samples that come again.
        batch_size: samples of a step, over all processes.
        gradient_accumulation_steps: run them in so many parts, one after the other.
        lr_scheduler_type: of the learning rate: `linear`, `cosine`, `constant`, or any other that transformers knows.
        warmup_ratio: share of the steps in which the rate rises from 0.
        max_length: tokens of the longest sample.
        chat_template: a file with the chat template to use in place of the tokenizer's.
        only: train these parts alone, by the last part of their names (`giva_s`, `lora_A`, `classifier`).
        save_steps: steps between checkpoints; default a tenth of them, but at least ten.
        gradient_checkpointing: compute activations twice instead of holding them.
        task: chooses the model class; default the task that the adapter was made for.
        device: where: auto, cpu, cuda.
        dtype: of the base in memory, float32 or bfloat16; the adapter trains in float32.
        seed: of the order of the samples, and of dropout.
        arguments: other `transformers.TrainingArguments`, by name.
        settings: how to train, as one object in place of the keywords of its fields.
        dry_run: check everything, train nothing.
        overwrite: replace an output folder that exists, and an unfinished training of it.
        trust_remote_code: run model code that comes with the base.
        new_head: make a head for the labels of `data`, in place of the adapter's or where it has none.
        progress: called after each step.
        announce: called with a line that explains rate, schedule and steps before the first step, and with one that
            estimates the time after the first steps.

    Returns:
        The trained adapter and the report.

    Raises:
        AdapterError: the adapter, or the teacher, does not fit the base.
        DataError: the data cannot be used.
        MethodError: options do not go together, or the loss is not finite.
        OutputError: the output cannot be written.
        TrainingInterrupted: Ctrl-C or SIGTERM; `out` holds the adapter as it was then.
    """
    started = time.perf_counter()
    assert not isinstance(data, DataSettings) and settings is None  # `keywords` has taken them apart
    settings = TrainSettings(
        max_steps, learning_rate, batch_size, gradient_accumulation_steps, lr_scheduler_type, warmup_ratio,
        hidden_weight, cache_teacher, save_steps, gradient_checkpointing, seed, dict(arguments or {}),
    )  # fmt: skip
    if cache_teacher and teacher is None:
        raise OptionError("cache_teacher belongs to a training with a teacher")
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    taught_by = teacher if isinstance(teacher, Adapter) or teacher is None else Adapter.open(teacher)
    unfinished = Unfinished(Path(out)) if out is not None and not dry_run else None
    if unfinished is not None:
        refuse_inputs(unfinished.out, opened.folder, base, taught_by.folder if taught_by is not None else None)
    if unfinished is not None and int(os.environ.get("RANK", "0")) == 0:
        unfinished.check(resume, overwrite)
    where = resolve_device(device)
    group = processes(where)
    settings.part(group)
    place = _own_device(where, group)
    if new_head:
        opened = with_new_head(opened, base, data, task, seed, trust_remote_code)
    prepared = prepare(
        opened, base, task=task, only=only, dtype=dtype, device=place, trust_remote_code=trust_remote_code
    )
    feed = Feed.read(prepared, data, eval_data, max_length, seed, taught_by is None, chat_template)
    run = Run(prepared, feed, settings, group, place, taught_by, progress, announce)
    report = run.report(str(base), eval_data is not None)
    if dry_run:
        report.dry_run = True
    else:
        run.go(report, unfinished, resume, overwrite, {**_identity(opened, data), "only": list(only), "task": task})
    report.seconds = time.perf_counter() - started
    return run.adapter, report


def _own_device(device: torch.device, group: Processes) -> torch.device:
    if group.count == 1 or device.type == "cpu":
        return device
    from accelerate import PartialState

    found: torch.device = PartialState().device
    return found


def _identity(adapter: Adapter, data: str | Path) -> dict[str, Any]:
    """What tells one training from another, besides its settings."""
    first = next(iter(adapter.tensors.values()))
    return {
        "peft_type": adapter.peft_type,
        "bytes": file_bytes(adapter.file_tensors()),
        "first": float(first.double().sum()),
        "data": Path(data).name,
    }
