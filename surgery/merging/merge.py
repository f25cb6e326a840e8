"""`surgery.merge`: an adapter's weight changes added to its base model, file by file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter, identity_of
from surgery.adapters.contents import contents_of
from surgery.errors import OutputError
from surgery.merging.folder import MergedFolder
from surgery.merging.plan import MergePlan
from surgery.merging.report import MergeReport
from surgery.models.base_model import BaseModel
from surgery.models.tasks import TaskName
from surgery.storage.atomic_folder import check_output, resumable_folder
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.provenance import provenance_of
from surgery.storage.resume import file_identities, run_key
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import FloatDtype, dtype_name, dtype_named
from surgery.system.keywords import keywords
from surgery.system.progress import Progress

__all__ = ["merge"]

STORED_IN = ("float32", "bfloat16", "float16")
# Share of a layer's change that rounding may take before the user is told.
MUCH_LOST = 0.05


@keywords()
def merge(
    adapter: str | Path | Adapter,
    base: str | Path,
    out: str | Path | None = None,
    *,
    dtype: FloatDtype | None = None,
    device: Device = "auto",
    task: TaskName | None = None,
    layout: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add an adapter to its base model: a model folder that needs no adapter, and no PEFT.

    The base's files are read and written one tensor at a time, under their own names; `W + dW` is computed in float32
    and rounded once. What the adapter saves whole (heads, biases, embeddings) replaces the base's. All other files of
    the base's folder are copied, but for weights in other formats. The result is read back before it takes its name.
    A merge that was killed goes on with the next weight file when it is called again.

    Args:
        adapter: a folder, a Hub id or an opened `Adapter`, of a type that `Adapter.delta` knows.
        base: the base model: a folder or a Hub id.
        out: the folder to write; it may be None for a dry run.
        dtype: of the result's floating-point tensors: float32, bfloat16, float16; default each as in the base.
        device: where to compute: auto, cpu, cuda.
        task: what the model is for, which chooses its class; default the base's own class, or, for an adapter with
            a head that this class does not have, the class of the adapter's task.
        overwrite: replace an output folder that exists.
        resume: keep the finished files that a merge which was killed has left.
        dry_run: check everything and report the sizes, but compute and write nothing.
        layout: of a LoRA on fused experts whose numbers are not in PEFT's order: `unsloth` for older files of it.
        trust_remote_code: run model code that comes with the base.
        progress: called before each tensor that is written.

    Returns:
        The report.

    Raises:
        AdapterError: the adapter cannot be read exactly, or does not fit the base.
        CheckpointError: the base cannot be used: a file is broken, it is quantised, a changed weight cannot be written
            back into it exactly.
        WrongBaseError: the adapter was made from other base weights.
        OutputError: the output cannot be written.
    """
    started = time.perf_counter()
    stored = None if dtype is None else dtype_named(dtype, STORED_IN)
    if out is None and not dry_run:
        raise OutputError("merge needs an output folder")
    where = resolve_device(device)
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter, layout)
    contents = contents_of(opened)
    model = BaseModel.open(base, task, trust_remote_code)
    if out is not None:
        _check_place(Path(out), model.folder, opened.folder, overwrite)
    plan = MergePlan.make(opened, contents, model, where, task is None, trust_remote_code)
    folder = MergedFolder(plan, stored)
    report = _report(plan, folder, where)
    if dry_run:
        plan.check_shapes()
        if out is not None:
            folder.check_space(Path(out))
        report.dry_run = True
    else:
        assert out is not None
        folder.check_space(Path(out))
        key = _key(plan, adapter if layout is None else opened, None if dtype is None else dtype_name(dtype), where)
        with resumable_folder(Path(out), overwrite, key, resume) as output, output.writing() as partial:
            report.bytes = folder.write(partial, _provenance(report), output.parts, progress)
            folder.verify(partial, str(out), trust_remote_code)
        report.out = str(out)
        report.sites = plan.figures()
        report.notes += _change_notes(report)
    report.seconds = time.perf_counter() - started
    return report


def _check_place(out: Path, base: Path, adapter: Path | None, force: bool) -> None:
    refuse_inputs(out, base, adapter, called="the base model or the adapter")
    if base.resolve() in out.resolve().parents:
        raise OutputError(f"{out}: lies in the base model's folder, which is copied; choose another output with -o")
    check_output(out, force)


def _report(plan: MergePlan, folder: MergedFolder, device: torch.device) -> MergeReport:
    return MergeReport(
        out=None,
        peft_type=plan.adapter.peft_type,
        modules=len(plan.sites),
        parameters=folder.parameters,
        bytes=folder.bytes,
        seconds=0.0,
        base=plan.base.name,
        model_class=type(plan.target.model).__name__,
        device=str(device),
        dtypes=folder.dtypes,
        files=folder.weight_files,
        replaced=sorted(plan.replaced),
        added=sorted(plan.added),
        left_out=folder.left_out,
        notes=[*plan.notes, *folder.notes],
    )


def _key(plan: MergePlan, given: Any, dtype: str | None, device: torch.device) -> str:
    """What recognises the run: its finished files are of use to no other one."""
    decisive = {"dtype": dtype, "device": device.type, "class": type(plan.target.model).__name__}
    inputs = {"adapter": identity_of(plan.adapter, given), "base": file_identities(plan.base.folder)}
    return run_key("merge", decisive, inputs)


def _change_notes(report: MergeReport) -> list[str]:
    """What stands out in the figures of the layers."""
    lost = max((site.rounding for site in report.sites if site.rounding is not None), default=None)
    if lost is None:
        return ["the adapter changes no weight: it is at its start, where dW = 0"]
    if lost > MUCH_LOST:
        return [
            f"rounding W + dW to the file's dtype takes up to {lost:.0%} of dW in a layer; --dtype float32 keeps it"
        ]
    return []


def _provenance(report: MergeReport) -> dict[str, Any]:
    """`surgery.json`: how the model came about, without paths of the machine it was made on."""
    base = Path(report.base)
    return provenance_of(
        "merge",
        peft_type=report.peft_type,
        base=base.resolve().name if base.is_dir() else report.base,
        modules=report.modules,
        replaced=report.replaced,
        added=report.added,
        notes=report.notes,
    )
