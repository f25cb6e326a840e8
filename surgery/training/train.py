"""`surgery.train`: light training of an adapter, or its distillation from another one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from surgery.catalogue import method_for_config, training_rate
from surgery.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from surgery.checkpoints.atomic import atomic_folder
from surgery.checkpoints.packing import is_packed
from surgery.checkpoints.tensor_files import file_bytes
from surgery.devices import resolve_device
from surgery.errors import MethodError
from surgery.methods.contents import who
from surgery.training.curve import curve, write_curve
from surgery.training.data import Examples, read_examples
from surgery.training.distillation import Teacher
from surgery.training.evaluation import Evaluation, evaluate
from surgery.training.interruption import Interruption, TrainingInterrupted
from surgery.training.preparing import Prepared, prepare
from surgery.training.processes import Processes, processes
from surgery.training.train_report import TrainReport
from surgery.training.trainer import (
    SAMPLE,
    AdapterTrainer,
    Batches,
    DistillingTrainer,
    Progress,
    Watch,
    last_checkpoint,
    random_state,
    silence,
)
from surgery.training.unfinished import Unfinished

__all__ = ["TrainSettings", "train"]

# Samples that evaluation runs before and after, at most.
EVALUATED = 512
# Bytes of a teacher's answers that are kept, where that is asked for.
CACHE = 1 << 30


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        steps: optimizer steps.
        lr: learning rate; None takes the one of the adapter's method.
        batch_size: samples of a step, over all processes.
        accumulate: parts in which they are run, one after the other.
        schedule: of the learning rate, one of transformers' (`linear`, `cosine`, `constant`, ...).
        warmup: share of the steps in which the rate rises from 0.
        hidden_weight: distillation: weight of the hidden states' distance beside the predictions' KL divergence.
        cache: distillation: bytes of the teacher's answers that are kept for samples that come again.
        save_every: steps between checkpoints; None takes a tenth of them, but at least ten.
        gradient_checkpointing: compute activations twice instead of holding them.
        seed: of the order of the samples, and of dropout.
        arguments: other `transformers.TrainingArguments`, by name.
    """

    steps: int = 200
    lr: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    schedule: str = "linear"
    warmup: float = 0.0
    hidden_weight: float = 1.0
    cache: int = 0
    save_every: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise MethodError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.save_every is not None and self.save_every < 1:
            raise MethodError(f"save_every must be at least 1, got {self.save_every}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise MethodError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise MethodError(f"warmup is a share of the steps, from 0 to below 1, got {self.warmup}")
        if not self.hidden_weight >= 0:
            raise MethodError(f"hidden_weight must not be negative, got {self.hidden_weight}")
        if not 0 <= self.seed < 2**32:
            raise MethodError(f"seed must be at least 0 and below 2^32, got {self.seed}")

    def part(self, group: Processes) -> int:
        """Samples that a process runs at a time.

        Raises:
            MethodError: the batch does not divide into equal parts.
        """
        parts = group.count * self.accumulate
        if self.batch_size % parts:
            raise MethodError(
                f"batch_size {self.batch_size} does not divide into {group.count} processes times {self.accumulate} "
                "parts"
            )
        return self.batch_size // parts


def train(
    adapter: str | Path | Adapter,
    base: str | Path,
    data: str | Path,
    eval_data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    steps: int = 200,
    lr: float | None = None,
    resume: bool = False,
    teacher: str | Path | Adapter | None = None,
    hidden_weight: float = 1.0,
    cache_teacher: bool = False,
    batch_size: int = 32,
    accumulate: int = 1,
    schedule: str = "linear",
    warmup: float = 0.0,
    max_length: int | None = None,
    only: Sequence[str] = (),
    save_every: int | None = None,
    gradient_checkpointing: bool = False,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Adapter, TrainReport]:
    """Train what an adapter's type trains, and the heads that it carries; all else stays as it is, bit for bit.

    The training is transformers' `Trainer` with its defaults (AdamW, no weight decay, gradients clipped at norm 1), so
    that a stock `Trainer` with the same arguments comes to the same result. Under `torchrun` or `accelerate launch`
    the processes share each batch. With a teacher the adapter learns to answer as that one does; no labels are needed.

    Args:
        adapter: a folder, a Hub id, or an opened `Adapter`, of any type.
        base: its base model, a folder or a Hub id.
        data: what is trained on: `.jsonl`, `.txt`, `.csv` or `.parquet`, for images also a folder.
        eval_data: what the adapter is evaluated on before and after; default the first of `data`'s samples.
        out: the folder to write; None writes nothing.
        steps: optimizer steps.
        lr: learning rate; default the one of the adapter's method (`surgery methods`).
        resume: go on with a training of `out` that was interrupted or killed; where there is none, start.
        teacher: an adapter of the same base whose answers are learnt.
        hidden_weight: weight of the hidden states' distance beside the predictions' KL divergence.
        cache_teacher: keep up to 1 GiB of the teacher's answers, for samples that come again.
        batch_size: samples of a step, over all processes.
        accumulate: run them in so many parts, one after the other.
        schedule: of the learning rate: `linear`, `cosine`, `constant`, or any other that transformers knows.
        warmup: share of the steps in which the rate rises from 0.
        max_length: tokens of the longest sample.
        only: train these parts alone, by the last part of their names (`giva_s`, `lora_A`, `classifier`).
        save_every: steps between checkpoints; default a tenth of them, but at least ten.
        gradient_checkpointing: compute activations twice instead of holding them.
        task: chooses the model class; default the task that the adapter was made for.
        device: where: auto, cpu, cuda.
        dtype: of the base in memory, float32 or bfloat16; the adapter trains in float32.
        seed: of the order of the samples, and of dropout.
        arguments: other `transformers.TrainingArguments`, by name.
        dry_run: check everything, train nothing.
        force: replace an output folder that exists, and an unfinished training of it.
        trust_remote_code: run model code that comes with the base.
        progress: called after each step.

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
    settings = TrainSettings(
        steps, lr, batch_size, accumulate, schedule, warmup, hidden_weight, CACHE if cache_teacher else 0, save_every,
        gradient_checkpointing, seed, dict(arguments or {}),
    )  # fmt: skip
    if cache_teacher and teacher is None:
        raise MethodError("cache_teacher belongs to a training with a teacher")
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    taught_by = teacher if isinstance(teacher, Adapter) or teacher is None else Adapter.open(teacher)
    unfinished = Unfinished(Path(out)) if out is not None and not dry_run else None
    if unfinished is not None:
        unfinished.check(resume, force)
    where = resolve_device(device)
    group = processes(where)
    settings.part(group)
    place = _own_device(where, group)
    prepared = prepare(
        opened, base, task=task, only=only, dtype=dtype, device=place, trust_remote_code=trust_remote_code
    )
    feed = _Feed.read(prepared, data, eval_data, max_length, seed, labelled=taught_by is None)
    run = _Run(prepared, feed, settings, group, place, taught_by, progress)
    report = run.report(str(base), eval_data is not None)
    if dry_run:
        report.dry_run = True
    else:
        run.go(report, unfinished, resume, {**_identity(opened, data), **_named(only=list(only), task=task)})
    report.seconds = time.perf_counter() - started
    return run.adapter, report


def _own_device(device: torch.device, group: Processes) -> torch.device:
    if group.count == 1 or device.type == "cpu":
        return device
    from accelerate import PartialState

    found: torch.device = PartialState().device
    return found


def _named(**values: Any) -> dict[str, Any]:
    return values


def _identity(adapter: Adapter, data: str | Path) -> dict[str, Any]:
    """What tells one training from another, besides its settings."""
    first = next(iter(adapter.tensors.values()))
    return {
        "peft_type": adapter.peft_type,
        "bytes": file_bytes(adapter.file_tensors()),
        "first": float(first.double().sum()),
        "data": Path(data).name,
    }


@dataclass
class _Feed:
    """The samples.

    Attributes:
        examples: those that are trained on.
        evaluated: those that are evaluated.
        notes: what the user should know of them.
    """

    examples: Examples
    evaluated: Examples
    notes: list[str]

    @classmethod
    def read(
        cls,
        prepared: Prepared,
        data: str | Path,
        eval_data: str | Path | None,
        max_length: int | None,
        seed: int,
        labelled: bool,
    ) -> _Feed:
        """Read the files, each row once."""
        examples = read_examples(data, prepared.base, None, max_length, seed, labelled)
        if eval_data is None:
            return cls(examples, _first(examples, EVALUATED), examples.notes)
        evaluated = read_examples(eval_data, prepared.base, None, max_length, seed, labelled)
        notes = examples.notes + [f"{eval_data}: {note}" for note in evaluated.notes]
        return cls(examples, evaluated, notes)


def _first(examples: Examples, count: int) -> Examples:
    return Examples(examples.features[:count], examples.counts[:count], examples.padding)


class _Run:
    """One training of one adapter."""

    def __init__(
        self,
        prepared: Prepared,
        feed: _Feed,
        settings: TrainSettings,
        group: Processes,
        device: torch.device,
        teacher: Adapter | None,
        progress: Progress | None,
    ) -> None:
        self.prepared, self.feed, self.settings, self.group = prepared, feed, settings, group
        self.device, self.progress = device, progress
        self.adapter = prepared.adapter
        self.lr = settings.lr if settings.lr is not None else default_rate(prepared.adapter)
        self.teacher_adapter = teacher
        self.teacher: Teacher | None = None
        if teacher is not None:
            self.teacher = Teacher(teacher, prepared.base, prepared.model, settings.cache)

    def report(self, base: str, own_eval: bool) -> TrainReport:
        """What is known before a step is done."""
        parameters = self.prepared.parameters
        source = self.prepared.adapter
        info = method_for_config(source.config)
        teacher = self.teacher_adapter
        report = TrainReport(
            out=None,
            method=info.name if info is not None else source.peft_type.lower(),
            peft_type=source.peft_type,
            modules=sum(1 for tensors in source.modules.values() if len(tensors) > 0),
            trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
            trained=sorted({_short(name) for name in parameters}),
            bytes=_bytes_of(source),
            source_bytes=_bytes_of(source),
            steps=self.settings.steps,
            learning_rate=self.lr,
            batch_size=self.settings.batch_size,
            samples=len(self.feed.examples.features),
            base=base,
            model_class=type(self.prepared.model.get_base_model()).__name__,
            device=str(self.device),
            processes=self.group.count,
            evaluated_on="eval_data" if own_eval else "data",
            teacher=who(teacher) if teacher is not None else None,
            notes=list(self.feed.notes),
        )
        return report

    def go(self, report: TrainReport, unfinished: Unfinished | None, resume: bool, identity: dict[str, Any]) -> None:
        """Evaluate, train, evaluate, write."""
        with _folder(unfinished) as folder:
            noted = self._begin(unfinished, resume, identity)
            report.before = self._before(noted, unfinished)
            checkpoint = last_checkpoint(folder) if resume else None
            if resume and checkpoint is None:
                report.notes.append("there was no step to go on from: the training starts")
            with Interruption(self.group, self.device) as stop:
                trainer = self._trained(folder, checkpoint, stop, unfinished is not None, report)
                if not stop.number:
                    report.after = self._evaluation(stop)
                self.adapter = self._result(trainer, report)
                if unfinished is not None:
                    self._write(unfinished, report, finished=not stop.number)
            if stop.number:
                raise TrainingInterrupted(stop.number, report.out, report.steps_done)

    def _begin(self, unfinished: Unfinished | None, resume: bool, identity: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.settings).items() if name not in {"cache", "save_every"}}
        self._options = {**options, "lr": self.lr, "teacher": self.teacher is not None, **identity}
        if unfinished is None:
            return {}
        noted = unfinished.begin(self._options, resume) if self.group.first else {}
        self.group.wait()
        return noted

    def _before(self, noted: dict[str, Any], unfinished: Unfinished | None) -> Evaluation | None:
        if noted.get("before") is not None and self.group.count == 1:
            return Evaluation(**noted["before"])
        found = self._evaluation(None)
        if unfinished is not None and self.group.first and found is not None and "before" not in noted:
            unfinished.note({"options": self._options, "before": asdict(found)})
        return found

    def _evaluation(self, stop: Interruption | None) -> Evaluation | None:
        size = self.settings.batch_size
        evaluated = self.feed.evaluated
        model = self.prepared.model
        return evaluate(model, evaluated, size, self.device, self.group, teacher=self.teacher, stop=stop)

    def _trained(
        self, folder: Path, checkpoint: Path | None, stop: Interruption, saves: bool, report: TrainReport
    ) -> AdapterTrainer:
        features = self.feed.examples.features
        common: dict[str, Any] = {
            "model": self.prepared.model,
            "args": self._arguments(folder, saves),
            "data_collator": Batches(self.feed.examples.padding),
            "callbacks": [Watch(stop, self.lr, self.progress if self.group.first else None)],
        }
        if self.teacher is None:
            trainer = AdapterTrainer(train_dataset=features, **common)
        else:
            numbered = [{**each, SAMPLE: torch.tensor(number)} for number, each in enumerate(features)]
            weight = self.settings.hidden_weight
            trainer = DistillingTrainer(train_dataset=numbered, teacher=self.teacher, hidden_weight=weight, **common)
        silence(trainer)
        random_state(self.settings.seed)
        began, first = time.perf_counter(), 0
        if checkpoint is not None:
            first = int(checkpoint.name.rpartition("-")[2])
        with _ready(self.prepared.model, self.feed.examples):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        report.steps_done = trainer.state.global_step
        report.loss = curve(trainer.state.log_history)
        done = report.steps_done - first
        report.seconds_per_step = (time.perf_counter() - began) / done if done else None
        return trainer

    def _arguments(self, folder: Path, saves: bool) -> TrainingArguments:
        settings = self.settings
        given: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.part(self.group),
            "gradient_accumulation_steps": settings.accumulate,
            "learning_rate": self.lr,
            "lr_scheduler_type": settings.schedule,
            "warmup_steps": round(settings.warmup * settings.steps),
            "logging_steps": max(1, settings.steps // 200),
            "logging_nan_inf_filter": False,
            "save_strategy": "steps" if saves else "no",
            "save_steps": settings.save_every or max(10, settings.steps // 10),
            "save_total_limit": 2,
            "seed": settings.seed,
            "use_cpu": self.device.type == "cpu",
            "dataloader_pin_memory": self.device.type != "cpu",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["labels"],
        }
        if settings.gradient_checkpointing:
            given["gradient_checkpointing"] = True
        try:
            return TrainingArguments(**{**given, **settings.arguments})
        except (TypeError, ValueError) as error:
            raise MethodError(f"transformers' TrainingArguments: {error}") from None

    def _result(self, trainer: AdapterTrainer, report: TrainReport) -> Adapter:
        """The adapter with what was trained in place of what it was, all else as it is."""
        source = self.prepared.adapter
        trained = _values(trainer, self.prepared)
        tensors = {name: _stored(source, name, trained[name]) if name in trained else value
                   for name, value in source.tensors.items()}  # fmt: skip
        from surgery import __version__

        provenance = {
            **source.provenance,
            "format_version": 1,
            "tool": "surgery",
            "version": __version__,
            "command": "train",
            "options": {"steps": report.steps, "lr": self.lr, "batch_size": report.batch_size,
                        "seed": self.settings.seed, "schedule": self.settings.schedule},
            "steps_done": report.steps_done,
            "trained": report.trained,
            "distilled": self.teacher is not None,
            "before": asdict(report.before) if report.before is not None else None,
            "after": asdict(report.after) if report.after is not None else None,
            "from": source.provenance.get("command"),
        }  # fmt: skip
        return Adapter(source.config, tensors, provenance, source.card)

    def _write(self, unfinished: Unfinished, report: TrainReport, finished: bool) -> None:
        if self.group.first:
            report.bytes = _save(self.adapter, unfinished.out, report)
            if finished:
                unfinished.remove()
            else:
                unfinished.release()
        self.group.wait()
        report.out = str(unfinished.out)
        if report.bytes > report.source_bytes and is_packed(self.adapter.config):
            report.notes.append(
                f"o is stored now that it is trained: the file has grown from {report.source_bytes:,} to "
                f"{report.bytes:,} bytes; --only giva_s keeps its size"
            )


@contextlib.contextmanager
def _folder(unfinished: Unfinished | None) -> Iterator[Path]:
    """Where checkpoints go; without an output, a folder that does not last."""
    if unfinished is not None:
        try:
            yield unfinished.folder
        finally:
            unfinished.release()
        return
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _ready(model: Any, examples: Examples) -> Iterator[None]:
    """A model that keeps no cache, and knows what fills batches up; afterwards its configuration is as it was."""
    config = model.get_base_model().config
    changes: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
    if "input_ids" in examples.padding:
        changes["pad_token_id"] = examples.padding["input_ids"]
    before = {name: getattr(config, name, None) for name in changes}
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def default_rate(adapter: Adapter) -> float:
    """The learning rate of an adapter's method.

    Packed factors are whole numbers, and s their scale: a step is in proportion to it.
    """
    rate = training_rate(adapter.config)
    if not is_packed(adapter.config):
        return rate
    scales = [tensor.abs().float().reshape(-1) for name, tensor in adapter.tensors.items() if name.endswith(".giva_s")]
    return rate * float(torch.cat(scales).median())


def _values(trainer: AdapterTrainer, prepared: Prepared) -> dict[str, torch.Tensor]:
    """What was trained, by name in the file, on the CPU."""
    if not trainer.is_fsdp_enabled:
        return {name: parameter.detach().cpu() for name, parameter in prepared.parameters.items()}
    # Each process holds a part of every parameter.
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: whole[inner].detach().cpu() for name, inner in prepared.names.items()}


def _stored(source: Adapter, name: str, value: torch.Tensor) -> torch.Tensor:
    """A trained tensor in the file's dtype; scales that half precision held exactly are rounded to it again."""
    old = source.tensors[name]
    if is_packed(source.config) and name.endswith(".giva_s") and torch.equal(old.half().to(old), old):
        value = value.half().float()
    return value.to(old.dtype).clone()


def _bytes_of(adapter: Adapter) -> int:
    """Size of its file, or of what would be one."""
    if adapter.folder is not None:
        return (adapter.folder / WEIGHTS_FILE).stat().st_size
    return file_bytes(adapter.file_tensors())


def _short(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1] in {"weight", "bias"} else parts[-1]


def _save(adapter: Adapter, out: Path, report: TrainReport) -> int:
    """Write the adapter and its loss curve, all or nothing."""
    with atomic_folder(out, force=True) as partial:
        size = adapter.save(partial / "adapter")
        for path in sorted((partial / "adapter").iterdir()):
            shutil.move(path, partial / path.name)
        (partial / "adapter").rmdir()
        write_curve(report.loss, partial, f"{out.name}: {report.method}, {report.steps_done} steps")
    assert (out / CONFIG_FILE).is_file() and (out / WEIGHTS_FILE).is_file()
    return size
