"""The conversion of one adapter: opened, measured, made within its budget, judged, written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter, identity_of
from surgery.adapters.contents import contents_of, refuse_output_biases
from surgery.adapters.fitting import old_names_note
from surgery.adapters.packing import is_packed
from surgery.adapters.source import Source, refuse_lone_experts, refuse_other_kinds
from surgery.converters.budget import Budget
from surgery.converters.figures import converted_sites, largest_difference, overall
from surgery.converters.forms import Form, form_named
from surgery.converters.kept import (
    ENOUGH,
    LEAST,
    WORTH_HAVING,
    size_option,
    smallest_keeping,
    what_is_kept,
)
from surgery.converters.report import ConvertReport
from surgery.converters.request import BudgetError, Request, Result
from surgery.converters.saved_tensors import SavedTensors, saved_tensors
from surgery.converters.shared_base import Answers, Base, Measured
from surgery.errors import MethodError, listing
from surgery.storage.atomic_folder import resumable_folder
from surgery.storage.format_version import FIRST_VERSION, KINDS_VERSION
from surgery.storage.provenance import provenance_of
from surgery.storage.resume import Parts, run_key
from surgery.storage.safetensors_read import file_bytes
from surgery.system.dtypes import DTYPES
from surgery.system.memory import release_freed
from surgery.system.progress import Progress
from surgery.system.tensors import TensorMap
from surgery.system.text import human_bytes

__all__ = ["ConvertOptions", "convert_one"]

# Keys that every PEFT configuration has, and a conversion leaves as they are.
COMMON_KEYS = ("auto_mapping", "base_model_name_or_path", "bias", "modules_to_save", "revision", "task_type")
TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `surgery.convert` that do not depend on the adapter.

    Attributes:
        to: the form's name.
        budget: how much to keep.
        form_options: values of the form's own options; None for those that were not given.
        dtype: of the stored factors; None for the source's.
        recover: steps of distillation.
        accept_loss: write what keeps less than half.
        seed: of everything drawn at random.
        dry_run: write nothing.
        force: replace an output.
        resume: use the finished layers of a run that was killed.
    """

    to: str
    budget: Budget = field(default_factory=Budget)
    form_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    recover: int | None = None
    accept_loss: bool = False
    seed: int = 0
    dry_run: bool = False
    force: bool = False
    resume: bool = True

    @property
    def form(self) -> Form:
        """The form.

        Raises:
            MethodError: there is none of this name.
        """
        return form_named(self.to)

    def check(self, has_data: bool, has_base: bool) -> None:
        """Refuse options that do not go together, before any work.

        Raises:
            MethodError: they do not.
        """
        form = self.form
        if self.recover is not None and not (has_base and has_data):
            raise MethodError("recover (--recover) trains on data with the base model: give base and data")
        if self.recover is not None and self.recover < 1:
            raise MethodError(f"recover is a number of steps, at least 1, got {self.recover}")
        chosen = form.chosen(self.form_options)
        form.check_dtype(self.dtype, chosen)
        if not self.accept_loss:
            form.check_loss(chosen)
        given = [name for name, value in vars(self.budget).items() if value is not None]
        if given and given[0] not in form.budgets:
            taken = " or ".join(f"--{name.replace('_', '-')}" for name in form.budgets)
            raise MethodError(f"{self.to} takes {taken} as its budget, not --{given[0].replace('_', '-')}")
        if form.needs_base and not has_base:
            raise MethodError(f"--to {self.to} {form.needs_base}: give the base with --base")

    def decisive(self) -> dict[str, Any]:
        """Return all that decides the result, as plain values."""
        return {
            "to": self.to,
            "budget": vars(self.budget),
            "options": self.form.chosen(self.form_options),
            "dtype": self.dtype,
            "recover": self.recover,
            "accept_loss": self.accept_loss,
            "seed": self.seed,
        }


@dataclass
class _Made:
    """A result that is not written yet."""

    adapter: Adapter
    report: ConvertReport
    files: TensorMap


def convert_one(
    adapter: Adapter,
    given: Any,
    out: Path | None,
    shared: Base,
    options: ConvertOptions,
    device: torch.device,
    progress: Progress | None,
    mark: Mapping[str, Any] | None = None,
) -> tuple[Adapter, ConvertReport]:
    """Convert one adapter and write the result, whose finished layers are kept beside its output until that is there.

    Args:
        adapter: the source.
        given: what the caller named it by.
        out: the folder to write, or None.
        shared: its base, if there is one.
        options: how.
        device: where to compute.
        progress: called after each layer.
        mark: added to the result's `surgery.json`.

    Raises:
        AdapterError: the adapter cannot be read exactly, or does not fit the base.
        MethodError: the budget is too small, or too little is kept.
        OutputError: the output cannot be written.
    """
    started = time.perf_counter()
    work = _Conversion.open(adapter, shared, options, device, progress)
    if out is None or options.dry_run:
        made = work.run(Parts())
    else:
        decisive = {**options.decisive(), "device": device.type}
        inputs = {"adapter": identity_of(adapter, given), "stats": work.measured.identity, **shared.identity}
        with resumable_folder(out, options.force, run_key("convert", decisive, inputs), options.resume) as output:
            made = work.run(output.parts)
            made.adapter.provenance.update(mark or {})
            with output.writing() as folder:
                made.report.bytes = made.adapter.write(folder, str(out), made.files)
                # Before it has its name: once the output is in place nothing may fail.
                made.report.reload_difference = largest_difference(Adapter.open(folder), made.adapter, work.source)
        made.report.out = str(out)
    report = made.report
    report.dry_run = options.dry_run
    report.device, report.base = str(device), shared.name
    report.seconds = time.perf_counter() - started
    return made.adapter, report


@dataclass
class _Conversion:
    """An adapter with all that its conversion needs."""

    source: Source
    measured: Measured
    saved: SavedTensors
    shared: Base
    options: ConvertOptions
    device: torch.device
    progress: Progress | None
    source_bytes: int

    @classmethod
    def open(
        cls, adapter: Adapter, shared: Base, options: ConvertOptions, device: torch.device, progress: Progress | None
    ) -> _Conversion:
        # Sorted and checked once, and handed on.
        contents = contents_of(adapter) if shared.opened is not None else None
        base = shared.model_for(contents) if contents is not None else None
        source = Source.open(adapter, base, device, contents=contents)
        # Gains on a layer's outputs have its bias with them.
        if not (options.form.output_biases or (options.form.gains and source.contents.type.scales_bias)):
            refuse_output_biases(source.contents, source.biases())
        if not options.form.single_experts:
            refuse_lone_experts(source, options.to)
        if not options.form.every_kind:
            refuse_other_kinds(source, options.to)
        saved, measured = saved_tensors(source), shared.measured(source, options.form.gains)
        return cls(source, measured, saved, shared, options, device, progress, source.adapter.file_size)

    @property
    def name(self) -> str:
        """What messages call the adapter."""
        return self.source.adapter.name or "the adapter"

    def run(self, parts: Parts) -> _Made:
        """Make the result: within the budget, or by default within the form's own, unless that keeps too little.

        Raises:
            MethodError: the budget holds nothing, or the result keeps less than half.
        """
        form, budget = self.options.form, self.options.budget
        try:
            if budget.given or not form.default_budget:
                made = self._attempt(budget, parts, self.options.recover)
            else:
                made = self._by_default(Budget(**form.default_budget), parts)  # type: ignore[arg-type]
        except BudgetError as error:
            raise self._too_small(error) from None
        self._judge(made)
        return made

    def _by_default(self, budget: Budget, parts: Parts) -> _Made:
        """Make the result within the default budget, or where that keeps little the smallest one worth having."""
        made, refused = None, None
        try:
            made = self._attempt(budget, parts, self.options.recover)
        except BudgetError as error:
            refused = error
        if made is None or made.report.kept < ENOUGH:
            found = self._worth_having(self.options)
            if found is not None:
                size, better = found
                if self.options.recover is not None:
                    better = self._attempt(Budget(size=size), Parts(), self.options.recover)
                kept = f"keeps {made.report.kept:.0%} only" if made is not None else "holds nothing of any layer"
                better.report.notes.insert(
                    0,
                    f"the default, {budget.describe()}, {kept}: this is {size_option(size)}, the smallest that keeps "
                    f"{WORTH_HAVING:.0%}",
                )
                return better
        if made is None:
            assert refused is not None
            raise refused
        if budget.ratio is None:
            made.report.notes.append(f"the default is {budget.describe()}")
        return made

    def _attempt(self, budget: Budget, parts: Parts, recover: int | None, form: Form | None = None) -> _Made:
        """Make the result within a budget, and measure it."""
        form = form or self.options.form
        own = self.options.form_options if form is self.options.form else {}
        request = Request(
            budget=budget,
            source_bytes=self.source_bytes,
            source_saved=self.saved.source_bytes,
            saved=self.saved.tensors,
            dtype=DTYPES[self.options.dtype] if self.options.dtype is not None else _dtype_of(self.source),
            metric=self.measured.metric,
            options=form.chosen(own),
            seed=self.options.seed,
            device=self.device,
            progress=self.progress,
            parts=parts,
        )
        result = form.load()(self.source, request)
        made = self._adapter(result, budget, form)
        if recover is not None:
            made = self.measured.recovered(made, recover, self.options.seed, self.device, self.progress)
            made.companions = dict(self.source.adapter.companions)
        release_freed()  # what the decompositions took: coding the tensors, and reading them back, take as much
        files = made.file_tensors()
        report = self._report(made, result, form, file_bytes(files), self.measured.answers(made))
        if request.limit is not None and report.bytes > request.limit:
            raise AssertionError(f"the result has {report.bytes} bytes, more than the {request.limit} allowed")
        made.provenance["report"] = {
            name: value
            for name, value in report.to_dict().items()
            # What few results have stands in those alone.
            if name not in {"sites", "notes", "out", "source"} and (value or name != "gain_bytes")
        }
        return _Made(made, report, files)

    def _worth_having(self, options: ConvertOptions, form: Form | None = None) -> tuple[int, _Made] | None:
        """The smallest size at which the form keeps what a suggestion should keep, and the result of it."""
        form = form or options.form
        if not {"max_error", "size"} <= set(form.budgets):
            return None
        return smallest_keeping(WORTH_HAVING, lambda budget: self._attempt(budget, Parts(), None, form))

    def _suggestion(self) -> str:
        """The option that gives a result worth having; empty where none does."""
        form = self.options.form
        found = self._worth_having(self.options)
        if found is not None:
            return f"use {size_option(found[0])} or more, which keeps {WORTH_HAVING:.0%}"
        plain = dataclasses.replace(self.options, to="giva", form_options={}, dtype=None)
        if form.name == "giva" and not self.options.form_options.get("bits"):
            return ""
        found = self._worth_having(plain, plain.form)
        more = f"{form.name} does not hold so much in any size; " if form.lossy else ""
        return f"{more}use --to giva {size_option(found[0])}, which keeps {WORTH_HAVING:.0%}" if found else ""

    def _too_small(self, error: BudgetError) -> MethodError:
        named = f"{self.name}: {error}"
        if self.options.accept_loss:
            return BudgetError(f"{named}; use --size {error.needed} or more", error.needed)
        suggestion = self._suggestion() or f"use --size {error.needed} or more"
        return BudgetError(f"{named}; {suggestion}", error.needed)

    def _judge(self, made: _Made) -> None:
        """Refuse a result that keeps less than half, and note one that keeps little.

        Raises:
            MethodError: it does, and the loss was not accepted.
        """
        report, options = made.report, self.options
        given = options.budget.describe()
        if report.kept < LEAST and not options.accept_loss:
            budget = f" with {given}" if given else ""
            suggestion = self._suggestion()
            raise MethodError(
                f"{self.name}: as {options.to}{budget} it keeps {max(report.kept, 0.0):.0%} {what_is_kept(report)}; "
                f"{suggestion + '; ' if suggestion else ''}--accept-loss writes it all the same"
            )
        if report.kept < ENOUGH and options.budget.given:
            better = "" if self.measured.model is not None else ", and --base with --data loses less in the same size"
            report.notes.append(
                f"keeps {report.kept:.0%} {what_is_kept(report)}: less --ratio, or more --size, keeps more{better}"
            )

    def _adapter(self, result: Result, budget: Budget, form: Form) -> Adapter:
        """The result with what every configuration has, what the source saves whole, and how it came about."""
        source = self.source
        old = source.adapter.config
        config = {key: old.get(key) for key in COMMON_KEYS} | {"bias": old.get("bias") or "none"}
        config["modules_to_save"] = self.saved.modules_to_save
        named = "target_modules" in result.config  # by a type that does not know all of the keys
        whole = set(result.ranks) == set(source.contents.modules) and not source.lacking.notes
        if not named and whole and old.get("target_modules"):
            config.update({key: old[key] for key in TARGET_KEYS if key in old})
        elif not named:
            config["target_modules"] = sorted(result.ranks)
        if source.contents.tokens:
            config["trainable_token_indices"] = old["trainable_token_indices"]
            if result.config.get("format_version") is not None:
                config["format_version"] = KINDS_VERSION
        config.update({key: value for key, value in result.config.items() if key != "format_version"})
        if "format_version" in result.config:
            config["format_version"] = max(config.get("format_version", 0), result.config["format_version"])
        config["inference_mode"] = True
        given = {name: value for name, value in vars(budget).items() if value is not None}
        options = {"dtype": self.options.dtype, "recover": self.options.recover, "seed": self.options.seed}
        provenance = provenance_of(
            "convert",
            config.get("format_version", FIRST_VERSION),
            to=form.name,
            options={**given, **self.options.form_options, **options},
            source={"peft_type": source.adapter.peft_type, "bytes": self.source_bytes},
            base=self.shared.label,
            data=self.shared.data_name,
            task=source.adapter.provenance.get("task"),
            labels=source.adapter.provenance.get("labels"),
        )
        made = Adapter(config, {**self.saved.tensors, **result.tensors}, provenance)
        made.companions = dict(source.adapter.companions)
        return made

    def _report(self, made: Adapter, result: Result, form: Form, size: int, answers: Answers) -> ConvertReport:
        measured, saved = self.measured, self.saved
        sites = converted_sites(self.source, made, result, measured.input_moments)
        weight_error, output_error = overall(sites)
        error = output_error if output_error is not None and measured.model is None else weight_error
        figures = {name: value for name, value in vars(answers).items() if name != "kept"}
        return ConvertReport(
            out=None,
            to=form.name,
            peft_type=made.peft_type,
            source=self.name,
            source_type=self.source.adapter.peft_type,
            modules=len(result.ranks),
            trainable_parameters=result.trainable + sum(tensor.numel() for tensor in saved.tensors.values()),
            bytes=size,
            source_bytes=self.source_bytes,
            ratio=(self.source_bytes - saved.source_bytes) / max(size - saved.bytes, 1),
            weight_error=weight_error,
            output_error=output_error,
            kept=answers.kept if answers.kept is not None else 1 - error**2,
            saved_bytes=saved.bytes,
            saved_modules=saved.modules,
            source_bytes_bf16=_bytes_in_bf16(self.source, self.source_bytes),
            padding_bytes=result.padding,
            gain_bytes=result.gain_bytes,
            notes=[
                *self.source.adapter.notes,
                *self.source.lacking.notes,
                *result.notes,
                *measured.notes,
                *self._notes(),
            ],
            sites=sites,
            **figures,
        )

    def _notes(self) -> list[str]:
        notes = self.saved.notes()
        if self.shared.opened is None:
            notes += old_names_note(self.source.contents.modules)
        if self.saved.tensors and self.options.budget.ratio is not None:
            notes.append(
                f"--ratio counts the factors: {human_bytes(self.saved.bytes)} of {listing(self.saved.modules, 3)} are "
                "kept as they are (before 0.2.0 it counted the whole file)"
            )
        unreached = self.measured.unreached()
        if unreached:
            notes.append(
                f"no gradient reaches {listing(unreached, 3)} on this data: measured by the error of the weights alone"
            )
        return notes


def _factors(source: Source) -> dict[str, torch.Tensor]:
    """The tensors that are not saved whole."""
    whole = {*source.contents.carried.values(), *source.contents.spare}
    return {name: tensor for name, tensor in source.adapter.tensors.items() if name not in whole}


def _dtype_of(source: Source) -> torch.dtype:
    """The floating dtype that most of the source's factors have; float32 for one that is narrower than 16 bits."""
    counts: dict[torch.dtype, int] = {}
    for tensor in _factors(source).values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
    return most if most in {torch.float32, torch.bfloat16, torch.float16} else torch.float32


def _bytes_in_bf16(source: Source, source_bytes: int) -> int | None:
    """The size of the source's file if its wider factors were bfloat16; None where it has none, or is packed."""
    if is_packed(source.adapter.config):
        return None
    wider = [each for each in _factors(source).values() if each.is_floating_point() and each.itemsize > 2]
    return source_bytes - sum(each.numel() * (each.itemsize - 2) for each in wider) if wider else None
