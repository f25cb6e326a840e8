"""`surgery.init`: an adapter at its method's start, from a base model's files."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.catalogue import MethodInfo, method_info
from surgery.checkpoints.adapter import CONFIG_FILE, MODEL_PREFIX, TUNER_PREFIX, Adapter
from surgery.checkpoints.atomic import check_output
from surgery.checkpoints.base_model import BaseModel
from surgery.checkpoints.fingerprint import Fingerprint
from surgery.checkpoints.live_model import LiveModel
from surgery.devices import resolve_device
from surgery.errors import DataError, MethodError, OutputError, TargetError, listing
from surgery.heads import carried_modules, carried_tensors, missing_modules
from surgery.memory import release_freed
from surgery.methods.base import Method, OwnMethod, Start
from surgery.methods.giva import GradientSource
from surgery.reports.report import Report, SiteReport
from surgery.sites import Site, target_modules, unsupported_modules
from surgery.training.data import labels_in
from surgery.training.gradients import Gradients
from surgery.training.processes import Processes
from surgery.training.start import GradientRun, GradientSettings, gradient_run, is_file

__all__ = ["init"]

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
CLASS_TASKS = {"seq-cls", "image-cls"}
FEW_LABELS = 10_000  # more are no classes
# (layers done so far, layers to do, what is being done)
Progress = Callable[[int, int, str], None]


def init(
    model: str | Path | nn.Module,
    method: str,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    sparse_rate: float | None = None,
    groups: int | None = None,
    store_bases: bool | None = None,
    data: str | Path | Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    gradient_checkpointing: bool | None = None,
    variant: str | None = None,
    split: Mapping[str, int | Sequence[int]] | None = None,
    target: str | Sequence[str] = (),
    task: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    dry_run: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Adapter, Report]:
    """Make an adapter that starts well from a base model, without loading the model.

    Weights are read one at a time; the base checkpoint is not touched. GiVA alone loads the model, for one forward
    and backward pass over `data` in which no weight's gradient is held. The adapter starts at a weight change of
    zero, and opens with `PeftModel.from_pretrained` (after `import surgery` for our own types).

    Args:
        model: a folder with `config.json` and safetensors, or a Hub id; for GiVA also a loaded model of any kind.
        method: a name from `surgery methods`.
        out: the adapter folder to write; None writes nothing.
        rank: for the methods that have one; see the method table for the defaults.
        alpha: numerator of the scale `alpha / rank`.
        sparse_rate: FRoD: share of the entries of S that train.
        groups: SMoA: number of spectral groups K.
        store_bases: store the frozen bases (default), or regenerate and check them on load.
        data: GiVA: a data file (`.jsonl`, `.txt`, `.csv`, `.parquet`, for images also a folder), or batches:
            dictionaries of the model's arguments with labels, or whatever `loss` takes.
        loss: GiVA: `loss(model, batch)` for batches of one's own; default the loss that the model returns.
        samples: GiVA: how many samples are drawn from a data file; default 32.
        batch_size: GiVA: how many of them are run at a time, over all processes; default 32.
        max_length: GiVA: tokens of the longest sample.
        gradient_checkpointing: GiVA: compute activations twice instead of holding them.
        variant: GiVA: `vr`, `vru2r`, `vrur` or `vrurand`; see `surgery.methods.giva`.
        split: GiVA: fused layers to be treated in parts: the end of the module's name -> how many parts, or their
            heights. Known for GPT-2, Phi-3 and GLM.
        target: module names, endings of names, or regular expressions; default every linear of the blocks.
        task: what the model is for, which chooses its class; default the class that `config.json` names.
        seed: of everything drawn at random.
        device: where to compute: auto, cpu, cuda.
        dtype: of the stored floating-point tensors: float32, bfloat16, float16 (fp32, bf16, fp16); for GiVA also of
            the model while its gradient is computed.
        dry_run: check everything and report sizes, but read no weights and write nothing.
        force: replace an output folder that exists.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called after each weight that is read.

    Returns:
        The adapter and the report. After a dry run the adapter holds no tensors.

    Raises:
        CheckpointError: the base model cannot be used.
        TargetError: a target matches nothing that can be adapted.
        MethodError: an option is out of range, or the method does not take it.
        OutputError: the output cannot be written.
    """
    started = time.perf_counter()
    given = {
        "rank": rank, "alpha": alpha, "sparse_rate": sparse_rate, "groups": groups, "store_bases": store_bases,
        "data": data, "loss": loss, "samples": samples, "batch_size": batch_size, "max_length": max_length,
        "gradient_checkpointing": gradient_checkpointing, "variant": variant, "split": split,
    }  # fmt: skip
    options = _checked(method, {name: value for name, value in given.items() if value is not None}, seed, dtype)
    info = method_info(method)
    where = resolve_device(device)
    base = _opened(model, info, task, options.get("data"), trust_remote_code)
    if out is not None:
        _check_place(Path(out), base, force)
    if info.reads_weights:
        base.refuse_quantized()
    # A quantised checkpoint may hold its weights under other names.
    present = info.reads_weights or (info.reads_gradients and not base.is_quantized)
    sites = base.select([target] if isinstance(target, str) else target, present=present)
    formulas = info.load()
    options = formulas.complete(options, sites, base.config)
    config = formulas.make_config(options, _common_config(base, sites, seed))
    notes = formulas.notes(config, sites)
    carried, fresh = carried_tensors(base, seed)
    notes += _missing_notes(base, fresh, bool(carried), info.reads_weights or info.reads_gradients)
    reader = _Reader(base, len(sites) * formulas.passes, where, _needs_base(formulas, config), progress)
    run = None
    if info.reads_gradients:
        settings = _settings(options, DTYPES[dtype], seed, where, spread=device == "auto")
        wanted = formulas.gradient_parts(config, sites)
        run = _gradients(base, sites, wanted, options, settings, carried, dry_run, progress)
        sites = [site for site in sites if site.module not in run.found.absent]
        config = formulas.make_config(options, _common_config(base, sites, seed))
        notes += run.notes
    start = _start(formulas, config, sites, run, reader, dry_run)
    tensors = {_file_name(name): _stored(name, tensor, DTYPES[dtype]) for name, tensor in start.tensors.items()}
    tensors.update({f"{MODEL_PREFIX}{name}": tensor for name, tensor in carried.items()})
    adapter = Adapter(_config_dict(config), tensors)
    report = _report(adapter, base, sites, formulas, config, notes + _merged(start.notes))
    report.device = str(where) if info.reads_weights or info.reads_gradients else "cpu"
    report.dry_run = dry_run
    report.labels = int(base.config.num_labels) if base.labels is not None else None
    if run is not None:
        report.loss, report.samples = run.found.loss, run.samples
    elif not dry_run:
        _add_weight_figures(report, adapter, formulas, config, reader.energies)
    adapter.provenance = _provenance(report, options, seed, dtype, base)
    if dry_run:
        adapter.tensors = {}
    elif out is not None:
        if run is None or run.processes.first:
            report.bytes = adapter.save(out, force)
        if run is not None:
            run.processes.wait()
        report.out = str(out)
    report.seconds = time.perf_counter() - started
    return adapter, report


def _opened(
    model: str | Path | nn.Module, info: MethodInfo, task: str | None, data: Any, trust_remote_code: bool
) -> BaseModel:
    """The base model; a classifier that the checkpoint lacks gets as many outputs as the data has labels."""
    if info.reads_gradients and data is None:
        raise MethodError(f"{info.name} starts from the gradient of a loss: give the data for it with --data FILE")
    if isinstance(model, nn.Module):
        if not info.reads_gradients:
            raise MethodError(
                f"{info.name} reads a model's files: give its folder, or call peft.get_peft_model(model, config)"
            )
        return LiveModel(model, task)
    base = BaseModel.open(model, task, trust_remote_code)
    if is_file(data) and base.task is not None and base.task.name in CLASS_TASKS and base.head_is_free:
        labels = labels_in(data, base)
        if any(isinstance(label, float) for label in labels):
            raise DataError(
                f"{data}: its labels are floating-point numbers, not classes; for a regression give a model whose "
                "config.json has one label in id2label"
            )
        numbers = [label for label in labels if isinstance(label, int)]
        highest = max(numbers, default=0)
        if min(numbers, default=0) < 0:
            raise DataError(f"{data}: has the label {min(numbers)}; classes are counted from 0")
        if max(len(labels), highest) >= FEW_LABELS:
            raise DataError(f"{data}: has {len(labels)} labels up to {highest}, more than a classifier has classes")
        if len(labels) < 2:
            raise DataError(f"{data}: has the label {listing(map(str, labels))} alone, nothing to tell apart")
        return BaseModel.open(model, task, trust_remote_code, labels=labels)
    return base


def _settings(
    options: dict[str, Any], dtype: torch.dtype, seed: int, device: torch.device, spread: bool
) -> GradientSettings:
    names = ("samples", "batch_size", "max_length", "gradient_checkpointing")
    given = {name: options[name] for name in names if name in options}
    return GradientSettings(dtype=dtype, seed=seed, device=device, spread=spread, **given)


def _gradients(
    base: BaseModel,
    sites: Sequence[Site],
    wanted: tuple[int, dict[str, list[int]]],
    options: dict[str, Any],
    settings: GradientSettings,
    carried: dict[str, torch.Tensor],
    dry_run: bool,
    progress: Progress | None,
) -> GradientRun:
    """The gradients that a method starts from; for a dry run the data is read, but the model is not."""
    data = options["data"]
    if dry_run:
        examples = settings.examples(data, base)
        return GradientRun(Gradients(), None, Processes(), examples.notes if examples is not None else [])
    rank, parts = wanted
    run = gradient_run(
        base, sites, rank, parts, data, options.get("loss"), settings, carried=carried, progress=progress
    )
    if run.found.absent:
        run.notes.append(f"no gradient reaches {listing(run.found.absent, 4)}: left out")
    if not run.found.svds:
        raise TargetError(f"no gradient reaches any of the {len(sites)} layers: the loss does not depend on them")
    return run


def _start(
    formulas: Method, config: Any, sites: Sequence[Site], run: GradientRun | None, reader: _Reader, dry_run: bool
) -> Start:
    if dry_run:
        return _planned(formulas, config, sites)
    if run is not None:
        return formulas.start(config, sites, GradientSource(run.found.svds))
    start = formulas.start(config, sites, reader)
    if reader.fingerprinted:
        config.base_fingerprint = reader.fingerprint.digests()
    return start


def _checked(method: str, options: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    for name in options:
        if name not in method_info(method).options:
            raise MethodError(f"method {method} takes no {name}")
    if not 0 <= seed < 2**63:
        raise MethodError(f"seed must be at least 0 and below 2^63, got {seed}")
    if dtype not in DTYPES:
        raise MethodError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    return options


def _needs_base(method: Method, config: Any) -> bool:
    return isinstance(method, OwnMethod) and method.needs_base(config)


def _missing_notes(base: BaseModel, fresh: list[str], carries: bool, reads_weights: bool) -> list[str]:
    notes = [f"the checkpoint has no {name}: a fresh one, seeded, is saved with the adapter" for name in fresh]
    missing = missing_modules(base) if reads_weights and not carries else []
    if missing:
        notes.append(f"the checkpoint has no {listing(missing, 3)}: transformers draws them anew at every load")
    return notes


class _Reader:
    """Reads weights for a method, counting them and taking their squared norms and, where wanted, fingerprint."""

    def __init__(
        self, base: BaseModel, reads: int, device: torch.device, fingerprinted: bool, progress: Progress | None
    ) -> None:
        self.base = base
        self.device = device
        self.fingerprint = Fingerprint()
        self.fingerprinted = fingerprinted
        self.progress = progress
        self.total = reads
        self.count = 0
        self.energies: dict[str, float] = {}

    def __call__(self, site: Site) -> torch.Tensor:
        self._tell(site)
        return self._read(site).to(self.device)

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        """Read one weight ahead of the one that is worked on."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            upcoming = deque([pool.submit(self._read, site) for site in sites[:1]])
            for index, site in enumerate(sites):
                upcoming.extend(pool.submit(self._read, following) for following in sites[index + 1 : index + 2])
                self._tell(site)
                yield upcoming.popleft().result().to(self.device)
                release_freed()

    def _tell(self, site: Site) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, self.total, site.role)

    def _read(self, site: Site) -> torch.Tensor:
        first = site.module not in self.energies
        raw = self.base.raw_weight(site, check=False)
        if first:
            norm = float(torch.linalg.vector_norm(raw.float()))
            if not math.isfinite(norm):
                self.base.raw_weight(site, check=True)  # names what is wrong with it
            if self.fingerprinted:
                self.fingerprint.add(site.key, raw)
            self.energies[site.module] = norm**2
        return raw.to(torch.float32)


def _check_place(out: Path, base: BaseModel, force: bool) -> None:
    folder, target = base.folder.resolve(), out.resolve()
    if base.live is None and (target == folder or target in folder.parents):
        raise OutputError(f"{out}: holds the base model; choose another output with -o")
    check_output(out, force)


def _common_config(base: BaseModel, sites: Sequence[Site], seed: int) -> dict[str, Any]:
    name, _, revision = base.name.partition("@") if not Path(base.name).is_dir() else (base.name, "", "")
    return {
        "target_modules": target_modules(base.model, sites),
        "task_type": base.task.peft_task_type if base.task else None,
        "base_model_name_or_path": name.rstrip("/") or name or None,
        "revision": revision or None,
        "modules_to_save": carried_modules(base) or None,
        "fan_in_fan_out": all(site.transposed for site in sites),
        "seed": seed,
        "inference_mode": True,
    }


def _config_dict(config: Any) -> dict[str, Any]:
    """`adapter_config.json` exactly as PEFT writes it."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        result: dict[str, Any] = json.loads((Path(folder) / CONFIG_FILE).read_text())
    return result


def _file_name(name: str) -> str:
    """Tensors above the model are marked by a leading dot."""
    return f"{TUNER_PREFIX}{name[1:]}" if name.startswith(".") else f"{MODEL_PREFIX}{name}"


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the dtype of the file.

    Raises:
        MethodError: it is not finite there.
    """
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if tensor.device.type != "meta" and not torch.isfinite(stored).all():
        raise MethodError(f"{name} is not finite in {dtype}: the weights, or alpha, are too large or too small for it")
    return stored


def _planned(method: Method, config: Any, sites: Sequence[Site]) -> Start:
    """The tensors that would be made, on the meta device."""
    if not isinstance(method, OwnMethod):
        return Start({name: t.to("meta") for name, t in method.start(config, sites, None).tensors.items()})
    planned = {}
    for group in method.groups(sites):
        for index, site in enumerate(group):
            shapes = method.shapes(config, site)
            for name in method.stored(config, owner=index == 0):
                empty = torch.empty(shapes[name], dtype=method.dtype(name, site), device="meta")
                planned[f"{site.module}.{method.prefix}{name}"] = empty
    return Start(planned)


def _report(
    adapter: Adapter, base: BaseModel, sites: Sequence[Site], method: Method, config: Any, notes: list[str]
) -> Report:
    modules = adapter.modules
    trainable = set(method.trainable_names)
    entries = []
    for site in sites:
        tensors = modules[site.module]
        parameters = sum(tensor.numel() for name, tensor in tensors.items() if name in trainable)
        size = sum(tensor.nbytes for tensor in tensors.values())
        shape = (site.out_features, site.in_features)
        entries.append(SiteReport(site.module, shape, method.rank_at(config, site), parameters, size))
    carried = sum(tensor.numel() for name, tensor in adapter.tensors.items() if name.startswith(_head_prefixes(config)))
    return Report(
        command="init",
        out=None,
        method=method.info.name,
        peft_type=adapter.peft_type,
        modules=len(sites),
        trainable_parameters=sum(entry.parameters for entry in entries) + carried,
        bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
        seconds=0.0,
        base=base.name,
        model_class=type(base.model).__name__,
        device="cpu",
        notes=notes,
        not_adapted=unsupported_modules(base.model),
        sites=entries,
    )


def _merged(notes: list[str]) -> list[str]:
    """Notes that say the same of several roles, as one."""
    by_text: dict[str, list[str]] = {}
    for note in notes:
        role, _, text = note.partition(": ")
        by_text.setdefault(text, []).append(role)
    return [f"{listing(roles, 3)}: {text}" for text, roles in by_text.items()]


def _add_weight_figures(
    report: Report, adapter: Adapter, method: Method, config: Any, energies: dict[str, float]
) -> None:
    """Name weights that are zero, and state how much of each weight a start holds that approximates it."""
    zero = [module for module, energy in energies.items() if energy == 0]
    if zero:
        report.notes.append(f"the weights of {listing(zero, 3)} are zero: what starts from them does not train")
    if not isinstance(method, OwnMethod):
        return
    modules = adapter.modules
    for entry in report.sites:
        tensors = {name.removeprefix(method.prefix): tensor for name, tensor in modules[entry.module].items()}
        approximation = method.approximation(config, tensors)
        if approximation is not None and energies.get(entry.module):
            # The approximation is an orthogonal projection, so what it holds is its own norm.
            entry.captured = min(float(approximation.norm()) ** 2 / energies[entry.module], 1.0)
    shares = [entry.captured for entry in report.sites if entry.captured is not None]
    if shares:
        low, mean, high = min(shares), sum(shares) / len(shares), max(shares)
        report.notes.append(
            f"A0 and B0 capture {mean:.1%} of the weights' squared norm ({low:.1%} to {high:.1%} by layer); "
            "a higher rank captures more"
        )


def _head_prefixes(config: Any) -> tuple[str, ...]:
    return tuple(f"{MODEL_PREFIX}{name}." for name in config.modules_to_save or ())


def _provenance(report: Report, options: dict[str, Any], seed: int, dtype: str, base: BaseModel) -> dict[str, Any]:
    """`surgery.json`: how the adapter came about, without paths of the machine it was made on."""
    from surgery import __version__

    # A Hub id says which model it was; of a folder only its own name is kept.
    name = base.folder.resolve().name if base.name and Path(base.name).is_dir() else base.name
    data, kept = options.get("data"), {k: v for k, v in options.items() if k not in {"data", "loss"}}
    return {
        "format_version": 1,
        "tool": "surgery",
        "version": __version__,
        "command": "init",
        "method": report.method,
        "options": {**kept, "seed": seed, "dtype": dtype},
        "data": Path(str(data)).name if is_file(data) else None,
        "labels": base.labels,
        "task": base.task.name if base.task else None,
        "base": name,
        "modules": report.modules,
        "trainable_parameters": report.trainable_parameters,
        "notes": report.notes,
    }
