"""`surgery.convert`: a trained adapter in another form, smaller or loadable elsewhere, with the loss known."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Literal, overload

from surgery.adapters.adapter import Adapter
from surgery.converters.adapter_folders import adapter_folders
from surgery.converters.batch import BatchOptions, convert_batch
from surgery.converters.batch_members import members_of
from surgery.converters.budget import Budget
from surgery.converters.conversion import ConvertOptions, convert_one
from surgery.converters.forms import FormName
from surgery.converters.report import BatchEntry, BatchReport, ConvertReport
from surgery.converters.shared_base import Base, CalibrationData
from surgery.errors import MethodError
from surgery.models.tasks import TaskName
from surgery.passes.data_settings import DataSettings
from surgery.storage.atomic_folder import check_output
from surgery.storage.output_paths import refuse_inputs
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import FloatDtype, dtype_name
from surgery.system.keywords import keywords
from surgery.system.progress import Progress

__all__ = ["convert"]

Given = str | Path | Adapter
Bits = Literal["auto", "32", "16", "8", "4", "3", "2", 32, 16, 8, 4, 3, 2]


@overload
def convert(  # type: ignore[overload-overlap]  # text is a sequence of texts, too
    adapter: Given,
    to: FormName,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    data: str | Path | DataSettings | None = None,
    samples: int = 512,
    batch_size: int = 32,
    max_length: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: int | str | None = None,
    ratio: float | None = None,
    budget: Budget | None = None,
    bits: Bits | None = None,
    basis: Literal["fitted", "random"] | None = None,
    per_layer_ranks: bool = False,
    variant: Literal["components", "blocks"] | None = None,
    form_options: Mapping[str, Any] | None = None,
    recover: int | None = None,
    accept_loss: bool = False,
    stats: str | Path | None = None,
    chat_template: str | Path | None = None,
    task: TaskName | None = None,
    layout: str | None = None,
    device: Device = "auto",
    dtype: FloatDtype | None = None,
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    plot: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, ConvertReport]: ...


@overload
def convert(
    adapter: Sequence[Given],
    to: FormName,
    out: str | Path | None = None,
    *,
    base: str | Path | Sequence[str | Path] | None = None,
    data: str | Path | DataSettings | None = None,
    samples: int = 512,
    batch_size: int = 32,
    max_length: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: int | str | None = None,
    ratio: float | None = None,
    budget: Budget | None = None,
    bits: Bits | None = None,
    basis: Literal["fitted", "random"] | None = None,
    per_layer_ranks: bool = False,
    variant: Literal["components", "blocks"] | None = None,
    form_options: Mapping[str, Any] | None = None,
    recover: int | None = None,
    accept_loss: bool = False,
    stats: str | Path | None = None,
    chat_template: str | Path | None = None,
    task: TaskName | None = None,
    layout: str | None = None,
    device: Device = "auto",
    dtype: FloatDtype | None = None,
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    plot: str | Path | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    on_entry: Callable[[BatchEntry, int, int], None] | None = None,
    progress: Progress | None = None,
) -> BatchReport: ...


@keywords(budget=Budget, data=DataSettings)
def convert(
    adapter: Given | Sequence[Given],
    to: FormName,
    out: str | Path | None = None,
    *,
    base: str | Path | Sequence[str | Path] | None = None,
    data: str | Path | DataSettings | None = None,
    samples: int = 512,
    batch_size: int = 32,
    max_length: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: int | str | None = None,
    ratio: float | None = None,
    budget: Budget | None = None,
    bits: Bits | None = None,
    basis: Literal["fitted", "random"] | None = None,
    per_layer_ranks: bool = False,
    variant: Literal["components", "blocks"] | None = None,
    form_options: Mapping[str, Any] | None = None,
    recover: int | None = None,
    accept_loss: bool = False,
    stats: str | Path | None = None,
    chat_template: str | Path | None = None,
    task: TaskName | None = None,
    layout: str | None = None,
    device: Device = "auto",
    dtype: FloatDtype | None = None,
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    plot: str | Path | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    on_entry: Callable[[BatchEntry, int, int], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, ConvertReport] | BatchReport:
    """Convert a trained adapter, or many of them, to another form, and measure what that loses.

    Heads, biases and whatever else the adapter saves whole are kept bit for bit. The result is reopened and compared
    with what was meant before it takes its name. A long conversion keeps its finished layers (decompositions of changes
    of full rank, fits of SMoA and FRoD) in the hidden folder beside `out`, and after a kill goes on with the next one
    when it is called again.

    Of a list each member is tried; one that fails costs its own entry, never the batch. A second call with the same
    options skips the members that are finished, and converts those whose source or options changed.

    Args:
        adapter: a folder, a Hub id or an opened `Adapter`, of a type that `Adapter.delta` knows; or a list of these
            and of folders of adapters.
        to: `giva` (integer factors of few bits with scales), `lora`, `vera`, `frod`, `smoa`, or a form that an
            installed package adds.
        out: the folder to write; for a list, the folder that gets one for each. None writes nothing.
        base: their base model, a folder or a Hub id; needed with data, and for types whose change depends on it. For a
            list also several: each adapter takes the one that its configuration names, or that it fits.
        data: a data file or `DataSettings`, labels not needed: errors are then measured in what they do to the model's
            predictions.
        samples: how many samples are drawn from it.
        batch_size: samples run at a time.
        max_length: tokens of the longest sample.
        rank: per layer; shared for VeRA. At most one of this and the next four.
        energy: share of each layer's squared norm to keep.
        max_error: largest relative error over all layers together.
        size: bytes of the whole `adapter_model.safetensors`, or text as in `64KiB`.
        ratio: bytes of the source's factors over those of the new ones; tensors that are saved whole do not count. For
            giva 20 where nothing else is given, or where that keeps less than 80 % the smallest size that keeps 90 %.
        budget: one of these as an object, in place of its keyword.
        bits: giva: `auto`, 32, 16, 8, 4, 3 or 2 for each number.
        basis: vera: `fitted` (stored, made from the adapter) or `random` (seeded: vectors only; needs base and data).
        per_layer_ranks: lora: ranks that differ by layer, in place of one for all.
        variant: smoa: `components` of the spectrum (default), or the published `blocks`, which hold about 1/K of a
            general change, and are written with accept_loss.
        form_options: options of a form that an installed package adds.
        recover: steps of distillation: the original's answers on the calibration samples are learnt, in no more bytes.
        accept_loss: write even what keeps less than half of the adapter.
        stats: a file of calibration statistics: read where it exists; what it lacks is gathered and added.
        chat_template: a file with the chat template for data of messages, in place of the tokenizer's.
        task: what the model is for, which chooses its class.
        device: where to compute: auto, cpu, cuda.
        dtype: of the stored factors: float32, bfloat16, float16, and for lora float8_e4m3fn; default the source's.
        seed: of everything drawn at random.
        dry_run: do all but write.
        overwrite: replace an output folder that exists.
        resume: use the finished layers that a conversion which was killed has left; in a list, skip finished members.
        layout: of a LoRA on fused experts whose numbers are not in PEFT's order: `unsloth` for older files of it.
        trust_remote_code: run model code that comes with the base.
        plot: a picture to draw, `.png`, `.svg` or `.pdf`: size against error, a point for each adapter of a list, or
            for each layer of one.
        jobs: of a list: how many processes work on it.
        executor: of a list: who works on it instead, such as `dask.distributed.Client().get_executor()`.
        on_entry: of a list: called with each entry as it is finished, how many are, and of how many.
        progress: called after each layer.

    Returns:
        The new adapter and the report. For a list a `BatchReport`: a sequence of such pairs, whose `entries` hold a
        report or an error for each.

    Raises:
        AdapterError: an adapter cannot be read exactly, or does not fit the base.
        MethodError: options do not go together, the budget is too small, or too little of the adapter is kept.
        DataError: the data cannot be used.
        OutputError: the output cannot be written.
    """
    assert not isinstance(data, DataSettings) and budget is None  # `keywords` has taken them apart
    own = {"bits": bits, "basis": basis, "variant": variant, "per_layer_ranks": per_layer_ranks or None}
    own = {name: value for name, value in own.items() if value is not None}
    options = ConvertOptions(
        to=to,
        budget=Budget(rank, energy, max_error, size, ratio),
        form_options={**(form_options or {}), **own},
        dtype=None if dtype is None else dtype_name(dtype),
        recover=recover,
        accept_loss=accept_loss,
        seed=seed,
        dry_run=dry_run,
        force=overwrite,
        resume=resume,
    )
    settings = CalibrationData(data, samples, batch_size, max_length, seed, stats, chat_template)
    if plot is not None:
        from surgery.display.heat_maps import check_picture

        check_picture(Path(plot))
    if layout is not None:
        if not isinstance(adapter, (str, Path, Adapter)):
            adapter = [each if isinstance(each, Adapter) else Adapter.open(each, layout) for each in adapter]
        elif not isinstance(adapter, Adapter):
            adapter = Adapter.open(adapter, layout)
    if not isinstance(adapter, (str, Path, Adapter)):
        bases = [base] if isinstance(base, (str, Path)) else list(base or ())
        options.check(data is not None, bool(bases) or data is not None)
        names = [str(each) for each in bases]
        work = BatchOptions(options, settings, names, task, str(device), trust_remote_code)
        batch = convert_batch(members_of(adapter, out), work, out, jobs, executor, on_entry, progress)
        if plot is not None:
            from surgery.converters.picture import draw_batch

            draw_batch(batch, Path(plot))
        return batch
    if base is not None and not isinstance(base, (str, Path)):
        raise MethodError("one adapter has one base: give a list of adapters for several")
    options.check(data is not None, base is not None)
    if (data is not None or stats is not None) and base is None:
        raise MethodError("data and stats say something about a model: give it with base")
    pair = _one(adapter, out, base, options, settings, task, device, trust_remote_code, progress)
    if plot is not None:
        from surgery.converters.picture import draw_layers

        draw_layers(pair[1], Path(plot))
    return pair


def _one(
    adapter: Given,
    out: str | Path | None,
    base: str | Path | None,
    options: ConvertOptions,
    settings: CalibrationData,
    task: str | None,
    device: Device,
    trust_remote_code: bool,
    progress: Progress | None,
) -> tuple[Adapter, ConvertReport]:
    started = time.perf_counter()
    if not isinstance(adapter, Adapter):
        inside = adapter_folders(Path(adapter))
        if inside:
            raise MethodError(f"{adapter}: is a folder of {len(inside)} adapters: give it in a list")
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    folder = None if out is None else Path(out)
    if folder is not None:
        refuse_inputs(folder, opened.folder, base, called="the adapter or its base model")
        check_output(folder, options.force)
    where = resolve_device(device)
    with Base.open(base, settings, task, where, trust_remote_code, progress) as shared:
        made, report = convert_one(opened, adapter, folder, shared, options, where, progress)
    report.seconds = time.perf_counter() - started
    return made, report
