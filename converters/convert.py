"""`surgery.convert`: a trained adapter in another form, smaller or loadable elsewhere, with the loss known."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter, identity_of
from surgery.adapters.contents import refuse_output_biases
from surgery.adapters.fitting import old_names_note
from surgery.adapters.source import Source, refuse_lone_experts
from surgery.converters.figures import converted_sites, largest_difference, overall
from surgery.converters.report import ConvertReport
from surgery.converters.request import Budget, Metric, Progress, Request, Result
from surgery.converters.shared_base import Base, DataSettings, Measured
from surgery.errors import MethodError, OutputError
from surgery.storage.atomic_folder import check_output, resumable_folder
from surgery.storage.format_version import FIRST_VERSION
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.resume import Parts, run_key
from surgery.storage.safetensors_read import file_bytes
from surgery.system.devices import resolve_device
from surgery.system.memory import release_freed
from surgery.version import __version__

__all__ = ["FORMS", "convert"]

# Form -> its converter, a module and function of this name below surgery.converters.
FORMS = {"giva": "to_giva", "vera": "to_vera", "lora": "to_lora", "frod": "to_frod", "smoa": "to_smoa"}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
BITS = ("auto", "32", "16", "8", "4", "3", "2")
# LoRA -> giva without a budget.
DEFAULT_RATIO = 20.0
# Forms that cannot hold every change; what keeps less than half of its energy is of no use.
LOSSY_FORMS = {"vera", "frod", "smoa"}
LEAST_ENERGY = 0.5
# What every PEFT configuration has, and a conversion leaves as it is.
COMMON_KEYS = ("auto_mapping", "base_model_name_or_path", "bias", "modules_to_save", "revision", "task_type")
TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def convert(
    adapter: str | Path | Adapter | Sequence[str | Path | Adapter],
    to: str,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = 512,
    batch_size: int = 32,
    max_length: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: int | None = None,
    ratio: float | None = None,
    bits: int | str | None = None,
    basis: str | None = None,
    variant: str | None = None,
    recover: int | None = None,
    accept_loss: bool = False,
    stats: str | Path | None = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Bring a trained adapter into another form, and measure what that loses.

    Heads, biases and whatever else the adapter saves whole are carried along bit for bit. The result is reopened and
    compared with what was meant before it takes its name. A long conversion keeps its finished layers (decompositions
    of changes of full rank, fits of SMoA and FRoD) in the hidden folder beside `out`, and after a kill goes on with the
    next one when it is called again.

    Args:
        adapter: a folder, a Hub id or an opened `Adapter`, of a type that `Adapter.delta` knows; or several of one
            base, which then share its calibration.
        to: `giva` (integer factors of few bits with scales), `lora`, `vera`, `frod` or `smoa`.
        out: the folder to write; for several adapters, the folder that gets one for each. None writes nothing.
        base: their base model, a folder or a Hub id; needed with data, and for types whose change depends on it.
        data: a data file, labels not needed: errors are then measured in what they do to the model's predictions.
        samples: how many samples are drawn from it.
        batch_size: samples run at a time.
        max_length: tokens of the longest sample.
        rank: per layer; shared for VeRA. At most one of this and the next four.
        energy: share of each layer's squared norm to keep.
        max_error: largest relative error over all layers together.
        size: bytes of the whole `adapter_model.safetensors`.
        ratio: the source's file over the new one; for giva 20 where nothing else is given.
        bits: giva: `auto`, 32, 16, 8, 4, 3 or 2 for each number.
        basis: vera: `fitted` (stored, made from the adapter) or `random` (seeded: vectors only; needs base and data).
        variant: smoa: `components` of the spectrum (default), or the published `blocks`, which hold about 1/K of a
            general change, and are written with accept_loss.
        recover: steps of distillation: the original's answers on the calibration samples are learnt, in no more bytes.
        accept_loss: write even what keeps less than half of the adapter's energy.
        stats: calibration statistics: read where the file exists, written where it does not.
        task: what the model is for, which chooses its class.
        device: where to compute: auto, cpu, cuda.
        dtype: of the stored factors: float32, bfloat16, float16, and for lora float8_e4m3fn; default the source's.
        seed: of everything drawn at random.
        dry_run: do all but write.
        force: replace an output folder that exists.
        resume: use the finished layers that a conversion which was killed has left.
        trust_remote_code: run model code that comes with the base.
        progress: called after each layer.

    Returns:
        The new adapter and the report; for several adapters a list of such pairs.

    Raises:
        AdapterError: an adapter cannot be read exactly, or does not fit the base.
        MethodError: options do not go together, or the budget is too small.
        DataError: the data cannot be used.
        OutputError: the output cannot be written.
    """
    several = not isinstance(adapter, (str, Path, Adapter))
    adapters: list[Any] = list(adapter) if several else [adapter]  # type: ignore[arg-type]
    budget = Budget(rank, energy, max_error, size, ratio)
    options = _Options(to, budget, bits, basis, variant, dtype, recover, accept_loss, seed, dry_run, force)
    options.check(data, stats, base)
    opened = [each if isinstance(each, Adapter) else Adapter.open(each) for each in adapters]
    outs = _outputs(opened, out, several)
    for each, folder in zip(opened, outs, strict=True):
        _check_place(folder, each, base, force)
    where = resolve_device(device)
    settings = DataSettings(data, samples, batch_size, max_length, seed, stats)
    with Base.open(base, settings, task, where, trust_remote_code, progress) as shared:
        pairs = [
            _kept(each, given, folder, shared, options, resume, where, progress)
            for each, given, folder in zip(opened, adapters, outs, strict=True)
        ]
    return pairs if several else pairs[0]


@dataclass(frozen=True)
class _Options:
    to: str
    budget: Budget
    bits: int | str | None
    basis: str | None
    variant: str | None
    dtype: str | None
    recover: int | None
    accept_loss: bool
    seed: int
    dry_run: bool
    force: bool

    def check(self, data: Any, stats: Any, base: Any) -> None:
        """Refuse what does not go together, before any work."""
        if self.to not in FORMS:
            raise MethodError(f"unknown form {self.to!r}: use {', '.join(FORMS)}")
        if self.recover is not None and (base is None or data is None):
            raise MethodError("recover (--recover) trains on data with the base model: give base and data")
        if self.recover is not None and self.recover < 1:
            raise MethodError(f"recover is a number of steps, at least 1, got {self.recover}")
        if self.bits is not None and self.to != "giva":
            raise MethodError(f"bits belongs to giva; {self.to} takes dtype")
        if self.bits is not None and str(self.bits) not in BITS:
            raise MethodError(f"bits must be {', '.join(BITS)}, got {self.bits!r}")
        if self.basis is not None and (self.to != "vera" or self.basis not in {"fitted", "random"}):
            raise MethodError("basis belongs to vera, and is fitted or random")
        if self.variant is not None and (self.to != "smoa" or self.variant not in {"components", "blocks"}):
            raise MethodError("variant belongs to smoa, and is components or blocks")
        if self.variant == "blocks" and not self.accept_loss:
            raise MethodError(
                "variant blocks of smoa holds about half of a general change, before any rank is cut: use --variant "
                "components, or --to giva, which holds all of it; --accept-loss makes the blocks"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise MethodError(f"unknown dtype {self.dtype!r}: use {', '.join(DTYPES)}")
        if self.dtype == "float8_e4m3fn" and self.to != "lora":
            raise MethodError("float8_e4m3fn belongs to lora")
        if self.dtype is not None and self.to == "giva" and str(self.bits or "auto") not in {"32", "16"}:
            raise MethodError("giva stores codes, not numbers of a dtype: leave out dtype, or give bits 16 or 32")
        if (data is not None or stats is not None) and base is None:
            raise MethodError("data and stats say something about a model: give it with base")

    def request(self, source_bytes: int, source_dtype: torch.dtype, metric: Metric | None, device: torch.device,
                progress: Progress | None, parts: Parts) -> Request:  # fmt: skip
        """What a converter is asked for."""
        budget = self.budget
        if self.to == "giva" and not budget.given:
            budget = Budget(ratio=DEFAULT_RATIO)
        return Request(
            budget=budget,
            source_bytes=source_bytes,
            dtype=DTYPES[self.dtype] if self.dtype is not None else source_dtype,
            metric=metric,
            bits="auto" if self.bits in {None, "auto"} else int(str(self.bits)),
            basis=self.basis or "fitted",
            variant=self.variant or "components",
            seed=self.seed,
            device=device,
            accept_loss=self.accept_loss,
            progress=progress,
            parts=parts,
        )


def _kept(
    adapter: Adapter,
    given: Any,
    out: Path | None,
    shared: Base,
    options: _Options,
    resume: bool,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Adapter, ConvertReport]:
    """Convert one adapter, whose finished layers are kept beside its output until that is there."""
    started = time.perf_counter()
    if out is None or options.dry_run:
        made, report, *_ = _convert(adapter, shared, options, Parts(), device, progress)
    else:
        decisive = {**vars(options), "budget": vars(options.budget), "force": None, "device": device.type}
        inputs = {"adapter": identity_of(adapter, given), **shared.identity}
        with resumable_folder(out, options.force, run_key("convert", decisive, inputs), resume) as output:
            made, report, source, files = _convert(adapter, shared, options, output.parts, device, progress)
            with output.writing() as folder:
                report.bytes = made.write(folder, str(out), files)
                # Before it has its name: once the output is in place nothing may fail.
                report.reload_difference = largest_difference(Adapter.open(folder), made, source)
        report.out = str(out)
    report.dry_run = options.dry_run
    report.device, report.base = str(device), shared.name
    report.seconds = time.perf_counter() - started
    return made, report


def _convert(
    adapter: Adapter,
    shared: Base,
    options: _Options,
    parts: Parts,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Adapter, ConvertReport, Source, dict[str, torch.Tensor]]:
    """The new adapter, its figures, where it comes from, and its tensors as the file will hold them."""
    source = Source.open(adapter, shared.model_for(adapter), device)
    adapter = source.adapter
    refuse_output_biases(source.contents)
    old_names = old_names_note(source.contents.modules) if shared.opened is None else []
    if options.to != "lora":
        refuse_lone_experts(source, options.to)
    measured = shared.measured(source)
    source_bytes = adapter.file_size
    request = options.request(source_bytes, _dtype_of(source), measured.metric, device, progress, parts)
    module = importlib.import_module(f"surgery.converters.{FORMS[options.to]}")
    converter: Callable[[Source, Request], Result] = getattr(module, FORMS[options.to])
    result = converter(source, request)
    made = _adapter(source, result, options, shared)
    if options.recover is not None:
        made = measured.recovered(made, options.recover, options.seed, device, progress)
        made.companions = dict(source.adapter.companions)
    release_freed()  # what the decompositions took: coding the tensors, and reading them back, take as much
    files = made.file_tensors()
    report = _report(source, made, result, measured, options, source_bytes, file_bytes(files))
    report.notes += old_names
    _refuse_useless(report, options)
    _check_budget(report, request)
    report.agreement, report.kl = measured.fidelity(made)
    made.provenance["report"] = {
        name: getattr(report, name) for name in ("bytes", "weight_error", "output_error", "modules", "agreement", "kl")
    }
    return made, report, source, files


def _adapter(source: Source, result: Result, options: _Options, shared: Base) -> Adapter:
    """The result with what every configuration has, what the source carries, and how it came about."""
    old = source.adapter.config
    config = {key: old.get(key) for key in COMMON_KEYS} | {"bias": old.get("bias") or "none"}
    named = "target_modules" in result.config  # by a type that does not know all of the keys
    if not named and set(result.ranks) == set(source.contents.modules) and old.get("target_modules"):
        config.update({key: old[key] for key in TARGET_KEYS if key in old})
    elif not named:
        config["target_modules"] = sorted(result.ranks)
    config.update(result.config)
    config["inference_mode"] = True
    given = {name: value for name, value in vars(options.budget).items() if value is not None}
    provenance = {
        "format_version": config.get("format_version", FIRST_VERSION),
        "tool": "surgery",
        "version": __version__,
        "command": "convert",
        "to": options.to,
        "options": {
            **given,
            "bits": options.bits,
            "basis": options.basis,
            "variant": options.variant,
            "dtype": options.dtype,
            "recover": options.recover,
            "seed": options.seed,
        },
        "source": {"peft_type": source.adapter.peft_type, "bytes": source.adapter.file_size},
        "base": shared.label,
        "data": shared.data_name,
        "task": source.adapter.provenance.get("task"),
        "labels": source.adapter.provenance.get("labels"),
    }
    made = Adapter(config, {**source.carried, **result.tensors}, provenance)
    made.companions = dict(source.adapter.companions)
    return made


def _report(
    source: Source, made: Adapter, result: Result, measured: Measured, options: _Options, source_bytes: int, size: int
) -> ConvertReport:
    sites = converted_sites(source, made, result, measured.input_moments)
    weight_error, output_error = overall(sites)
    return ConvertReport(
        out=None,
        to=options.to,
        peft_type=made.peft_type,
        source=source.adapter.name or "the adapter",
        source_type=source.adapter.peft_type,
        modules=len(result.ranks),
        trainable_parameters=result.trainable + sum(tensor.numel() for tensor in source.carried.values()),
        bytes=size,
        source_bytes=source_bytes,
        ratio=source_bytes / size,
        weight_error=weight_error,
        output_error=output_error,
        notes=source.adapter.notes + result.notes + measured.notes,
        sites=sites,
    )


def _refuse_useless(report: ConvertReport, options: _Options) -> None:
    error = report.output_error if report.output_error is not None else report.weight_error
    kept = 1 - error**2
    if options.to not in LOSSY_FORMS or kept >= LEAST_ENERGY or options.accept_loss:
        return
    what = "of what the adapter does to the layers' outputs" if report.output_error is not None else "of its energy"
    raise MethodError(
        f"as {options.to} of {report.bytes} bytes the adapter keeps {max(kept, 0.0):.1%} {what}: use --to giva, which "
        "holds it in few bits, a larger budget, or --basis random with --recover and training; --accept-loss writes "
        "it all the same"
    )


def _check_budget(report: ConvertReport, request: Request) -> None:
    limit = request.budget.bytes(request.source_bytes)
    if limit is not None and report.bytes > limit:
        raise MethodError(f"the result has {report.bytes} bytes, more than the {limit} allowed: a fault of surgery")


def _outputs(adapters: Sequence[Adapter], out: str | Path | None, several: bool) -> list[Path | None]:
    if out is None:
        return [None] * len(adapters)
    if not several:
        return [Path(out)]
    names = [adapter.name or f"adapter-{i}" for i, adapter in enumerate(adapters)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise OutputError(f"several adapters are called {sorted(twice)[0]}: convert them one at a time")
    return [Path(out) / name for name in names]


def _check_place(out: Path | None, adapter: Adapter, base: str | Path | None, force: bool) -> None:
    if out is None:
        return
    refuse_inputs(out, adapter.folder, base, called="the adapter or its base model")
    check_output(out, force)


def _dtype_of(source: Source) -> torch.dtype:
    """The floating dtype that most of the source's factors have; float32 for one that is narrower than 16 bits."""
    counts: dict[torch.dtype, int] = {}
    for name, tensor in source.adapter.tensors.items():
        if tensor.is_floating_point() and name not in source.contents.carried.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
    return most if most in {torch.float32, torch.bfloat16, torch.float16} else torch.float32
