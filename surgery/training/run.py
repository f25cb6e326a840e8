"""One training of one adapter: evaluated, trained, evaluated, written."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from surgery.adapters.adapter import Adapter
from surgery.adapters.experts import experts_apart, experts_joined
from surgery.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from surgery.adapters.packing import is_packed
from surgery.errors import OptionError
from surgery.methods.registry import info_for_config, training_rate
from surgery.passes.examples import Examples, read_examples
from surgery.storage.atomic_file import named_errors
from surgery.storage.atomic_folder import atomic_folder
from surgery.storage.provenance import provenance_of
from surgery.storage.safetensors_read import file_bytes
from surgery.system.keywords import short_of
from surgery.system.processes import Processes
from surgery.system.progress import Progress
from surgery.training.curve import curve, write_curve
from surgery.training.distillation import Teacher
from surgery.training.evaluation import Evaluation, evaluate
from surgery.training.interruption import Interruption, TrainingInterrupted
from surgery.training.packed_codes import RATE, CodeTraining
from surgery.training.preparing import Prepared
from surgery.training.report import TrainReport
from surgery.training.run_folder import Unfinished
from surgery.training.settings import CACHE, TrainSettings
from surgery.training.trainer import (
    SAMPLE,
    AdapterTrainer,
    Announce,
    Batches,
    DistillingTrainer,
    Watch,
    last_checkpoint,
    random_state,
    silence,
)

__all__ = ["Feed", "Run", "default_rate"]

# Samples that evaluation runs before and after, at most.
EVALUATED = 512
# Settings that do not decide what comes out.
IDLE = ("cache_teacher", "save_steps")


@dataclass
class Feed:
    """The samples.

    Attributes:
        examples: those that are trained on.
        evaluated: those that are evaluated; None where nothing is.
        notes: what the user should know of them.
    """

    examples: Examples
    evaluated: Examples | None
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
        chat_template: str | Path | None = None,
    ) -> Feed:
        """Read the files, each row once."""
        examples = read_examples(data, prepared.base, None, max_length, seed, labelled, chat_template)
        if eval_data is None:
            return cls(examples, _first(examples, EVALUATED), examples.notes)
        evaluated = read_examples(eval_data, prepared.base, None, max_length, seed, labelled, chat_template)
        notes = examples.notes + [f"{eval_data}: {note}" for note in evaluated.notes]
        return cls(examples, evaluated, notes)


def _first(examples: Examples, count: int) -> Examples:
    return Examples(examples.features[:count], examples.counts[:count], examples.padding)


class Run:
    """One training of one adapter."""

    def __init__(
        self,
        prepared: Prepared,
        feed: Feed,
        settings: TrainSettings,
        group: Processes,
        device: torch.device,
        teacher: Adapter | None,
        progress: Progress | None,
        announce: Announce | None = None,
    ) -> None:
        self.prepared, self.feed, self.settings, self.group = prepared, feed, settings, group
        self.device, self.progress = device, progress
        self.announce = announce if group.first else None
        self.adapter = prepared.adapter
        self.teacher_adapter = teacher
        self.teacher: Teacher | None = None
        self.codes: CodeTraining | None = None
        if teacher is not None:
            self.teacher = Teacher(teacher, prepared.base, prepared.model, CACHE if settings.cache_teacher else 0)
            parts = {_short(name) for name in prepared.names}
            if is_packed(prepared.adapter.config) and "giva_s" in parts:
                # o would have to be stored, and the head is the teacher's already.
                self.codes = CodeTraining(prepared.model, codes=parts != {"giva_s"})
        rate = RATE if self.codes is not None else default_rate(prepared.adapter)
        self.lr = settings.learning_rate if settings.learning_rate is not None else rate

    def report(self, base: str, own_eval: bool) -> TrainReport:
        """What is known before a step is done."""
        source = self.prepared.adapter
        if self.codes is not None:
            counts = self.codes.counts
        else:
            counts = {name: parameter.numel() for name, parameter in self.prepared.parameters.items()}
        info = info_for_config(source.config)
        teacher = self.teacher_adapter
        report = TrainReport(
            out=None,
            method=info.name if info is not None else source.peft_type.lower(),
            peft_type=source.peft_type,
            modules=sum(1 for tensors in source.modules.values() if len(tensors) > 0),
            trainable_parameters=sum(counts.values()),
            trained=sorted({_short(name) for name in counts}),
            bytes=source.file_size,
            source_bytes=source.file_size,
            steps=self.settings.max_steps,
            learning_rate=self.lr,
            batch_size=self.settings.batch_size,
            samples=len(self.feed.examples.features),
            base=base,
            model_class=type(self.prepared.model.get_base_model()).__name__,
            device=str(self.device),
            processes=self.group.count,
            evaluated_on="eval_data" if own_eval else "data",
            teacher=teacher.label if teacher is not None else None,
            notes=[*self.prepared.notes, *self.feed.notes],
        )
        return report

    def go(
        self,
        report: TrainReport,
        unfinished: Unfinished | None,
        resume: bool,
        overwrite: bool,
        identity: dict[str, Any],
    ) -> None:
        """Evaluate, train, evaluate, write.

        Args:
            report: what is filled in.
            unfinished: the hidden folder beside the output; None writes nothing.
            resume: go on with what a training with the same options has left there.
            overwrite: start again where it was left with other options.
            identity: what tells this training from another, besides its settings.
        """
        with _folder(unfinished) as folder:
            noted = self._begin(unfinished, resume, overwrite, identity)
            report.before = self._before(noted, unfinished)
            checkpoint = last_checkpoint(folder) if resume else None
            if checkpoint is not None:
                step = checkpoint.name.rpartition("-")[2]
                report.notes.append(
                    f"goes on after step {step} of a training that was stopped; --no-resume starts again"
                )
            stop = Interruption(self.group, self.device)
            # Without an output there is nothing to save: a signal does what it does elsewhere.
            with stop if unfinished is not None else contextlib.nullcontext():
                trainer = self._trained(folder, checkpoint, stop, unfinished is not None, report)
                trained = self._tensors(trainer, report)
                if not stop.number:
                    report.after = self._evaluation(stop)
                self.adapter = self._result(trained, report)
                if unfinished is not None:
                    self._write(unfinished, report, finished=not stop.number)
            if stop.number:
                raise TrainingInterrupted(stop.number, report.out, report.steps_done)

    def _begin(
        self, unfinished: Unfinished | None, resume: bool, overwrite: bool, identity: dict[str, Any]
    ) -> dict[str, Any]:
        # By the short spellings, as in the hidden folders of 0.1.0.
        options = {short_of(name): value for name, value in asdict(self.settings).items() if name not in IDLE}
        self._options = {**options, "lr": self.lr, "teacher": self.teacher is not None, **identity}
        if unfinished is None:
            return {}
        noted = unfinished.begin(self._options, resume, overwrite) if self.group.first else {}
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
        if evaluated is None:
            return None
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
            "callbacks": [Watch(stop, self.lr, self.progress if self.group.first else None, self.announce)],
        }
        if self.teacher is None:
            trainer = AdapterTrainer(train_dataset=features, **common)
        else:
            numbered = [{**each, SAMPLE: torch.tensor(number)} for number, each in enumerate(features)]
            weight = self.settings.hidden_weight
            trainer = DistillingTrainer(train_dataset=numbered, teacher=self.teacher, hidden_weight=weight, **common)
        trainer.codes = self.codes
        silence(trainer)
        random_state(self.settings.seed)
        if self.announce is not None:
            self.announce(self.settings.described(self.lr, self.settings.learning_rate is not None, len(features)))
        began, first = time.perf_counter(), 0
        if checkpoint is not None:
            first = int(checkpoint.name.rpartition("-")[2])
        model = self.prepared.model
        attached = self.codes.attached(model) if self.codes is not None else contextlib.nullcontext()
        with _ready(model, self.feed.examples), attached:
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
            "max_steps": settings.max_steps,
            "per_device_train_batch_size": settings.part(self.group),
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "learning_rate": self.lr,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_steps": round(settings.warmup_ratio * settings.max_steps),
            "logging_steps": max(1, settings.max_steps // 200),
            "logging_nan_inf_filter": False,
            "save_strategy": "steps" if saves else "no",
            "save_steps": settings.save_steps or max(10, settings.max_steps // 10),
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
            raise OptionError(f"transformers' TrainingArguments: {error}") from None

    def _tensors(self, trainer: AdapterTrainer, report: TrainReport) -> dict[str, torch.Tensor]:
        """What was trained, by name in the file; codes in no more bytes than they were."""
        source = self.prepared.adapter
        if self.codes is None:
            return _values(trainer, self.prepared)
        return self.codes.fit(lambda found: _bytes_with(source, found), _bytes_with(source, {}))

    def _result(self, trained: dict[str, torch.Tensor], report: TrainReport) -> Adapter:
        """The adapter with what was trained in place of what it was, all else as it is."""
        source = self.prepared.adapter
        tensors = dict(experts_joined(source.config, source.tensors))  # under the names of the file
        tensors |= {name: _stored(source, tensors.get(name), name, value) for name, value in trained.items()}
        apart, _ = experts_apart(source.config, tensors, source.label)
        made = provenance_of(
            "train",
            options={
                "steps": report.steps,
                "lr": self.lr,
                "batch_size": report.batch_size,
                "seed": self.settings.seed,
                "schedule": self.settings.lr_scheduler_type,
            },
            steps_done=report.steps_done,
            trained=report.trained,
            distilled=self.teacher is not None,
            before=asdict(report.before) if report.before is not None else None,
            after=asdict(report.after) if report.after is not None else None,
        )
        provenance = {**source.provenance, **made, "from": source.provenance.get("command")}
        result = Adapter(source.config, apart, provenance, source.card)
        result.companions = dict(source.companions)
        return result

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
            stored = "each of o and the gains is stored" if self.adapter.config.get("gains") else "o is stored"
            report.notes.append(
                f"{stored} now that it is trained: the file has grown from {report.source_bytes:,} to "
                f"{report.bytes:,} bytes; --only giva_s keeps its size"
            )


@contextlib.contextmanager
def _folder(unfinished: Unfinished | None) -> Iterator[Path]:
    """Where checkpoints go; without an output, a folder that does not last."""
    if unfinished is not None:
        with named_errors(unfinished.out):
            try:
                yield unfinished.folder
            except Exception:
                unfinished.abandon()
                raise
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
    for ending in (".giva_s", ".giva_g"):  # gains alone have no scales
        found = [tensor.abs().float().reshape(-1) for name, tensor in adapter.tensors.items() if name.endswith(ending)]
        if any(each.numel() for each in found):
            return rate * float(torch.cat(found).median())
    return rate


def _values(trainer: AdapterTrainer, prepared: Prepared) -> dict[str, torch.Tensor]:
    """What was trained, by name in the file, on the CPU."""
    if not trainer.is_fsdp_enabled:
        return {name: parameter.detach().cpu() for name, parameter in prepared.parameters.items()}
    # Each process holds a part of every parameter.
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: whole[inner].detach().cpu() for name, inner in prepared.names.items()}


def _stored(source: Adapter, old: torch.Tensor | None, name: str, value: torch.Tensor) -> torch.Tensor:
    """A trained tensor in the file's dtype; scales that half precision held exactly are rounded to it again."""
    if old is None:  # the file lacked it
        return value.clone()
    if is_packed(source.config) and name.endswith(".giva_s") and torch.equal(old.half().to(old), old):
        value = value.half().float()
    return value.to(old.dtype).clone()


def _bytes_with(source: Adapter, tensors: Mapping[str, torch.Tensor]) -> int:
    return file_bytes(Adapter(source.config, {**source.tensors, **tensors}).file_tensors())


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
        missing = write_curve(report.loss, partial, f"{out.name}: {report.method}, {report.steps_done} steps")
    if missing is not None:
        report.notes.append(missing)
    assert (out / CONFIG_FILE).is_file() and (out / WEIGHTS_FILE).is_file()
    return size
