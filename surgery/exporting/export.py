"""`surgery.export`: an adapter written for a server, and read back by the rule by which that server computes dW."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.format_registry import FORMATS, AdapterParts
from surgery.adapters.source import Change, Source
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError, OptionError, OutputError, listing
from surgery.exporting.one_rank import (
    MadeChanges,
    OneRank,
    lora_tensors,
    one_rank,
    one_rank_on_demand,
    planned_changes,
)
from surgery.exporting.report import ExportedSite, ExportReport
from surgery.formats.server import FLOAT_TYPES, Factors, Place, ServerFormat, factors_of
from surgery.models.base_model import BaseModel
from surgery.storage.atomic_folder import atomic_folder, check_output
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.provenance import provenance_of
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import FloatDtype, dtype_name
from surgery.system.keywords import keywords
from surgery.system.progress import Progress
from surgery.system.tensors import MadeTensors, TensorMap
from surgery.system.text import human_bytes
from surgery.system.threads import one_torch_thread

__all__ = ["export", "export_targets", "plain_parts", "target_format"]

# Our own; an installed package may add others.
ServerName = Literal["vllm", "sglang", "llama.cpp", "ollama", "mlx", "diffusers", "kohya"] | str
# Relative difference between dW as the server computes it and as the rounded factors give it: float32 sums.
READ_BACK = 1e-5
# The share of a layer's change that rounding to the file's type may take.
MOST_ROUNDING = 0.05
# The first part of a module's name that only a model without its head has.
BARE = re.compile(r"(layers|h|blocks)\.\d+\.")


def export_targets() -> list[str]:
    """Return the names that `to` takes, those of installed packages included."""
    return [name for name in FORMATS.names() if isinstance(FORMATS.get(name), ServerFormat)]


@keywords()
def export(
    adapter: str | Path | Adapter,
    to: ServerName,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: FloatDtype | Literal["q8_0"] | None = None,
    device: Device = "auto",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write an adapter in the form that a server reads, so that the server computes what PEFT does.

    The result is a plain LoRA of one rank and one scale in the target's own files. It is read back by the target's own
    rule, and the weight change of every layer is compared, before it takes its name. What the target cannot hold is
    refused by name. Types whose changes have full rank (FRoD, SMoA, DoRA, HiRA) are cut where `rank` or `energy` says
    how; the report has the error.

    Args:
        adapter: a folder, a Hub id or an opened `Adapter`.
        to: the target: `vllm`, `sglang`, `llama.cpp`, `ollama`, `mlx`.
        out: the folder to write; it may be None for a dry run.
        base: the base model, a folder or a Hub id: for types that depend on it, and for llama.cpp and Ollama.
        rank: cut every layer to at most this rank.
        energy: cut to the lowest common rank at which every layer keeps this share of its squared norm.
        dtype: of the file's numbers: float32, bfloat16, float16, and q8_0 for llama.cpp and Ollama; default the
            adapter's own.
        device: where to compute: auto, cpu, cuda.
        seed: of the decompositions of changes of full rank.
        overwrite: replace an output folder that exists.
        dry_run: check everything and report what the server would compute; write nothing.
        progress: called after each layer that was read back.

    Returns:
        The report.

    Raises:
        AdapterError: the adapter cannot be read exactly, or the target cannot hold it.
        OptionError: the target or an option is unknown.
        OutputError: the output cannot be written, or the target would compute something else from it.
    """
    started = time.perf_counter()
    target = target_format(to)
    if out is None and not dry_run:
        raise OutputError("export needs an output folder")
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    if out is not None:
        refuse_inputs(Path(out), opened.folder, base, called="the adapter or its base model")
        check_output(Path(out), overwrite)
    source, lora, parts = plain_parts(opened, target, base, rank, energy, dtype, str(device), seed)
    stored = target.stored(parts)
    report = _report(to, target, source, lora, parts, stored)
    _refuse_rounding(report, target)
    if dry_run:
        report.dry_run = True
    else:
        assert out is not None
        with atomic_folder(Path(out), overwrite) as partial:
            report.bytes = target.write(parts, partial, str(out))
            _read_back(target, parts, stored, partial, str(out), progress)
        report.out = str(out)
    report.commands = target.commands(parts, str(out) if out is not None else "OUT")
    report.seconds = time.perf_counter() - started
    return report


def target_format(to: str) -> ServerFormat:
    """Return the format of a target.

    Raises:
        OptionError: there is none of this name, or it is not written yet.
    """
    target = FORMATS.get(to) if to in FORMATS else None
    if not isinstance(target, ServerFormat):
        raise OptionError(f"unknown target {to!r}: use {', '.join(export_targets())}")
    if target.planned is not None:
        raise OptionError(f"{to}: {target.planned}")
    return target


def plain_parts(
    adapter: Adapter,
    target: ServerFormat,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_demand: bool = False,
) -> tuple[Source, OneRank, AdapterParts]:
    """Return an adapter as the plain LoRA that a target is to hold, after every check that needs no file.

    Args:
        adapter, base, rank, energy, dtype, device, seed: as for `export`.
        target: the target.
        on_demand: make the factors of a layer each time they are asked for, where the type allows that, so that
            memory is that of the adapter and of one layer.

    Raises:
        AdapterError: the adapter cannot be read exactly, or the target cannot hold it.
        OptionError: an option does not fit the target.
    """
    wanted = None if dtype is None else dtype_name(dtype)
    if wanted is not None and wanted not in target.dtypes:
        raise OptionError(f"{target.title} reads no dtype {wanted!r}: use {', '.join(target.dtypes)}")
    if target.needs_base is not None and base is None:
        raise OptionError(f"{target.title} needs the base model, because {target.needs_base}: give it with --base")
    model = BaseModel.open(base) if base is not None else None
    source = Source.open(adapter, model, resolve_device(device))
    _refuse_kinds(source, target)
    made = one_rank_on_demand(source) if on_demand and rank is None and energy is None else None
    lora = _in_pieces(made or one_rank(source, rank, energy, seed), target, model)
    parts = _parts(source, lora, wanted or _own_dtype(source))
    bare = next((module for module in lora.changes if BARE.match(module)), None)
    if bare is not None:
        raise AdapterError(
            f"{adapter.label}: changes {bare}, a name of a model without its head, which {target.title} would not "
            "find: give the model with --base"
        )
    refused = target.refusals(parts)
    if refused:
        raise AdapterError(f"{adapter.label}: {target.title} cannot hold it: {_problems(refused)}")
    return source, lora, target.prepared(parts)


def _refuse_kinds(source: Source, target: ServerFormat) -> None:
    """Refuse what is no change of a layer that the target reads.

    Raises:
        AdapterError: a layer is of another kind, single tokens are trained, or a bias is added to outputs.
    """
    label = source.adapter.label
    if source.contents.tokens:
        raise AdapterError(
            f"{label}: trains single tokens ({next(iter(source.contents.tokens))}), which {target.title} does not "
            "read; add the adapter to its base with surgery merge"
        )
    for module in source.contents.modules:
        form = source.form(module)
        if form.kind not in target.kinds:
            raise AdapterError(
                f"{label}: changes {module}, which is of the kind {form}, and {target.title} reads changes of "
                f"{' and '.join(target.kinds)} layers; add the adapter to its base with surgery merge"
            )
    biases = source.biases()
    if biases:
        raise AdapterError(
            f"{label}: adds a bias to the outputs of {listing(biases, 2)} (lora_bias or IA3), which {target.title} "
            "does not read; add the adapter to its base with surgery merge"
        )


def _in_pieces(lora: OneRank, target: ServerFormat, base: BaseModel | None) -> OneRank:
    """Return the changes under the names, and with the rows, that the target has layers for."""
    planned, ranks, whole = {}, {}, {}
    for module, change in planned_changes(lora).items():
        for place in target.pieces(module, change.shape[0], base):
            planned[place.name], ranks[place.name] = _piece(change, place), lora.ranks[module]
            whole[place.name] = module, place
    if not isinstance(lora.changes, MadeChanges):
        return replace(lora, changes=planned, ranks=ranks)

    def made(name: str) -> Change:
        module, place = whole[name]
        return _piece(lora.changes[module], place)

    return replace(lora, changes=MadeChanges(planned, made), ranks=ranks)


def _piece(change: Change, place: Place) -> Change:
    return change if place.rows is None else replace(change, B=change.B[place.rows])


def _problems(refused: list[str]) -> str:
    more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    return "; ".join(refused[:3]) + more


def _parts(source: Source, lora: OneRank, dtype: str) -> AdapterParts:
    adapter = source.adapter
    config = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": _number(lora.scale * lora.rank),
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(lora.changes),
        "modules_to_save": adapter.config.get("modules_to_save") if source.contents.carried else None,
        "base_model_name_or_path": _base_name(source),
        "task_type": adapter.config.get("task_type"),
        "bias": "none",
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out", False)),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    source_facts = {"peft_type": adapter.peft_type, "bytes": adapter.file_size}
    return AdapterParts(
        config,
        _with_carried(lora_tensors(lora), source.carried),
        provenance=provenance_of("export", source=source_facts),
        companions=adapter.companions,
        base=source.base,
        dtype=dtype,
    )


def _with_carried(factors: MadeTensors, carried: TensorMap) -> MadeTensors:
    return MadeTensors({**carried, **factors.planned}, factors.__getitem__)


def _base_name(source: Source) -> Any:
    """Return the base's name as a server is to compare it: the Hub id that was given, or the adapter's own word."""
    if source.base is not None and not Path(source.base.name).is_dir():
        return source.base.name.partition("@")[0]
    return source.adapter.config.get("base_model_name_or_path")


def _own_dtype(source: Source) -> str:
    """Return the type of the source's factors where a server reads it; otherwise float32."""
    found = {
        tensor.dtype
        for name, tensor in source.adapter.tensors.items()
        if name not in source.contents.carried.values() and tensor.is_floating_point()
    }
    name = dtype_name(found.pop()) if len(found) == 1 else "float32"
    return name if name in FLOAT_TYPES else "float32"


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _report(
    to: str,
    target: ServerFormat,
    source: Source,
    lora: OneRank,
    parts: AdapterParts,
    stored: dict[str, Factors],
) -> ExportReport:
    places = target.places(parts)
    sites, difference, energy = [], 0.0, 0.0
    with one_torch_thread():
        meant = factors_of(parts)
        for module, change in lora.changes.items():
            norm, error = _rounding(meant[module], stored[module])
            whole = norm / max(1 - change.lost**2, 1e-12) ** 0.5
            lost = (change.lost**2 * whole**2 + error**2) ** 0.5
            share = lost / whole if whole > 0 else 0.0
            sites.append(ExportedSite(module, places[module].name, change.shape, lora.ranks[module], share))
            difference, energy = difference + lost**2, energy + whole**2
    numbers = sum(factor.numel() for pair in stored.values() for factor in pair)
    notes = [*source.adapter.notes, *source.lacking.notes, *target.notes(parts)]
    report = ExportReport(
        out=None,
        to=to,
        title=target.title,
        peft_type=source.adapter.peft_type,
        source=source.adapter.name or "the adapter",
        modules=len(sites),
        rank=lora.rank,
        dtype=parts.dtype or "float32",
        trainable_parameters=numbers + sum(tensor.numel() for tensor in source.carried.values()),
        bytes=_bytes(numbers, parts.dtype) + sum(tensor.nbytes for tensor in source.carried.values()),
        source_bytes=source.adapter.file_size,
        padding_bytes=_bytes(lora.padding, parts.dtype),
        exact=all(change.lost == 0 for change in lora.changes.values()),
        weight_error=(difference / energy) ** 0.5 if energy > 0 else 0.0,
        base=source.base.name if source.base is not None else None,
        settings=target.settings(parts),
        notes=notes,
        sites=sites,
    )
    if report.padding_bytes:
        notes.append(f"zeros that bring all layers to rank {lora.rank} take {human_bytes(report.padding_bytes)}")
    return report


def _rounding(meant: Factors, stored: Factors) -> tuple[float, float]:
    """Return the norm of a change, and the norm of what rounding its factors takes from it; float64, thin."""
    exact, rounded = (LowRank(B.double(), A.double()) for B, A in (meant, stored))
    same = all(torch.equal(first, second) for first, second in zip(meant, stored, strict=True))
    return float(exact.norm()), 0.0 if same else float(exact.minus(rounded).norm())


def _bytes(numbers: int, dtype: str | None) -> int:
    return int(numbers * {"float32": 4.0, "q8_0": 34 / 32}.get(dtype or "float32", 2.0))


def _refuse_rounding(report: ExportReport, target: ServerFormat) -> None:
    if not report.exact:
        return
    worst = next((site for site in report.sites if not site.weight_error <= MOST_ROUNDING), None)
    if worst is not None:
        raise OutputError(
            f"{worst.module}: as {report.dtype} {target.title} would lose {worst.weight_error:.0%} of its change to "
            "rounding; use --dtype float32"
        )


def _read_back(
    target: ServerFormat,
    parts: AdapterParts,
    stored: dict[str, Factors],
    folder: Path,
    label: str,
    progress: Progress | None,
) -> None:
    """Compare every dW of the written files, by the server's rule, with what was meant.

    Raises:
        OutputError: one differs, is missing, or is one too many.
    """
    places = target.places(parts)
    modules = {place.name: module for module, place in places.items()}
    total = len(modules)
    for name, found in target.changes(folder):
        module = modules.pop(name, None)
        if module is None:
            raise OutputError(f"{label}: {target.title} finds {name} in the file, which was not meant")
        B, A = stored[module]
        rows = places[module].rows
        want = (B if rows is None else B[rows]) @ A
        if want.shape != found.shape or not bool((found - want).norm() <= READ_BACK * want.norm()):
            raise OutputError(f"{label}: {target.title} would compute another change of {module}: a fault of surgery")
        if progress is not None:
            progress(total - len(modules), total, module)
    if modules:
        raise OutputError(f"{label}: {target.title} does not find {listing(modules, 3)} in the file")
