"""`surgery.init`: an adapter at its method's start, from a base model's files."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import CONFIG_FILE, MODEL_PREFIX, WEIGHTS_FILE
from surgery.errors import MethodError, OptionError, TargetError, listing
from surgery.initialization.class_labels import HeadRequest
from surgery.initialization.gradient_start import GradientRun, gradient_run
from surgery.initialization.report import Report, SiteReport
from surgery.initialization.weight_start import Sharing, WeightStart, file_name, stored, weight_start
from surgery.methods.base import Method, OwnMethod
from surgery.methods.catalogue import MethodInfo, MethodName
from surgery.methods.giva import GradientSource
from surgery.methods.registry import load_formulas, method_info
from surgery.models.base_model import BaseModel
from surgery.models.heads import carried_modules, carried_tensors, missing_modules
from surgery.models.live_model import LiveModel
from surgery.models.sites import Site, unsupported_modules
from surgery.models.sites import target_modules as names_to_match
from surgery.models.tasks import TaskName
from surgery.passes.data_settings import DataSettings
from surgery.passes.loaded_model import RunSettings, is_file
from surgery.storage.atomic_folder import check_output
from surgery.storage.format_version import FIRST_VERSION
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.provenance import provenance_of
from surgery.storage.resume import file_identities, run_key
from surgery.storage.safetensors_read import read_tensors
from surgery.system.devices import Device, resolve_device, working_devices
from surgery.system.dtypes import FloatDtype, FloatName, dtype_name, dtype_named
from surgery.system.keywords import keywords
from surgery.system.processes import Processes, processes
from surgery.system.progress import Progress

__all__ = ["init"]

Variant = Literal["vr", "vru2r", "vrur", "vrurand", "blocks", "components"] | str
STORED_IN = ("float32", "bfloat16", "float16")


@keywords(data=DataSettings)
def init(
    model: str | Path | nn.Module,
    method: MethodName,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    lora_alpha: float | None = None,
    sparse_rate: float | None = None,
    groups: int | None = None,
    branch_ranks: Sequence[int] | None = None,
    store_bases: bool | None = None,
    data: str | Path | DataSettings | Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    chat_template: str | Path | None = None,
    gradient_checkpointing: bool | None = None,
    variant: Variant | None = None,
    split: Mapping[str, int | Sequence[int]] | None = None,
    target_modules: str | Sequence[str] = (),
    task: TaskName | None = None,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: FloatDtype = "float32",
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Adapter, Report]:
    """Make an adapter that starts well from a base model, without loading the model.

    Weights are read one at a time; the base checkpoint is not touched. GiVA alone loads the model, for one forward
    and backward pass over `data` in which no weight's gradient is held. The adapter starts at a weight change of
    zero, and opens with `PeftModel.from_pretrained` (after `import surgery` for our own types).

    A long run of a method that starts from the weights keeps its finished layers in the hidden folder beside `out`:
    called again after a kill, with the same options on the same files, it goes on with the next one. Under `torchrun`
    the processes share out the layers; the first one writes.

    Args:
        model: a folder with `config.json` and safetensors, or a Hub id; for GiVA also a loaded model of any kind.
        method: a name from `surgery methods`.
        out: the adapter folder to write; None writes nothing.
        rank: for the methods that have one; see the method table for the defaults.
        lora_alpha: numerator of the scale `lora_alpha / rank`.
        sparse_rate: FRoD: share of the entries of S that train.
        groups: SMoA: number of blocks K (`components`: of spectral groups).
        branch_ranks: SMoA: the rank of each block; default the rank split evenly.
        store_bases: store the frozen bases (default), or regenerate and check them on load.
        data: for a classifier that the checkpoint lacks also the other methods': its labels are counted. GiVA: a
            data file (`.jsonl`, `.txt`, `.csv`, `.parquet`, for images also a folder), or batches:
            dictionaries of the model's arguments with labels, or whatever `loss` takes. A file also as
            `DataSettings`, with how it is read.
        loss: GiVA: `loss(model, batch)` for batches of one's own; default the loss that the model returns.
        samples: GiVA: how many samples are drawn from a data file; default 32.
        batch_size: GiVA: how many of them are run at a time, over all processes; default 32.
        max_length: GiVA: tokens of the longest sample.
        chat_template: GiVA: a file with the chat template to use in place of the tokenizer's.
        gradient_checkpointing: GiVA: compute activations twice instead of holding them.
        variant: GiVA: `vr`, `vru2r`, `vrur` or `vrurand`; see `surgery.methods.giva`. SMoA: `blocks`, the published
            form (default), or `components`, that of 0.1.0; see `surgery.methods.smoa`.
        split: GiVA: fused layers to be treated in parts: the end of the module's name -> how many parts, or their
            heights. Known for GPT-2, Phi-3 and GLM.
        target_modules: module names, endings of names, or regular expressions; default every linear of the blocks.
        task: what the model is for, which chooses its class; default the class that `config.json` names.
        num_labels: classes of a task that has them (seq-cls, token-cls, image-cls); 1 is a regression.
        labels: their names, in order.
        seed: of everything drawn at random.
        device: where to compute: auto, cpu, cuda, cuda:1; methods that start from the weights use all GPUs for cuda.
        dtype: of the stored floating-point tensors: float32, bfloat16, float16 (fp32, bf16, fp16); for GiVA also of
            the model while its gradient is computed.
        dry_run: check everything and report sizes, but read no weights and write nothing.
        overwrite: replace an output folder that exists.
        resume: use the finished layers that a run which was killed has left.
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
    assert not isinstance(data, DataSettings)  # `keywords` has taken them apart
    dtype = cast(FloatName, dtype_name(dtype))
    given = {
        "rank": rank, "alpha": lora_alpha, "sparse_rate": sparse_rate, "groups": groups,
        "branch_ranks": list(branch_ranks) if branch_ranks is not None else None, "store_bases": store_bases,
        "loss": loss, "samples": samples, "batch_size": batch_size, "max_length": max_length,
        "gradient_checkpointing": gradient_checkpointing, "variant": variant, "split": split,
    }  # fmt: skip
    options = _checked(method, {name: value for name, value in given.items() if value is not None}, seed, dtype)
    info = method_info(method)
    if info.reads_gradients:
        options["data"] = data
    if chat_template is not None and not (info.reads_gradients and is_file(data)):
        raise OptionError("chat_template says how messages of a data file are written: give the file with data")
    where = resolve_device(device)
    place = Path(out) if out is not None else None
    group = processes(where) if not (info.reads_gradients or dry_run) else Processes()
    with group.in_step():
        head = HeadRequest(num_labels, labels, data if is_file(data) else None)
        base = _opened(model, info, task, data, head, trust_remote_code)
        if place is not None and group.first:
            _check_place(place, base, overwrite)
        targets = [target_modules] if isinstance(target_modules, str) else target_modules
        plan = _Plan.make(info, base, options, targets, seed, dtype)
        plan.chat_template = chat_template
    if dry_run:
        if info.reads_gradients:
            plan.notes += _examples_notes(plan, where)
        made = _planned(plan)
    elif info.reads_gradients:
        made = _from_gradients(plan, where, device == "auto", place, overwrite, progress)
    else:
        made = _from_weights(plan, where, group, place, overwrite, resume, progress)
    adapter, report = made
    report.device = str(where) if info.reads_weights or info.reads_gradients else "cpu"
    report.dry_run = dry_run
    report.out = str(out) if place is not None and not dry_run else None
    report.seconds = time.perf_counter() - started
    return adapter, report


@dataclass
class _Plan:
    """What is to be made: the base, its layers, the method and its configuration.

    Attributes:
        formulas: the method.
        base: the base model.
        options: of the method, complete.
        sites: the layers.
        config: the PEFT configuration.
        carried: parameters that are saved with the adapter, by name in the model.
        notes: what the user should know.
        seed: of everything drawn at random.
        dtype_name: of the stored floating-point tensors.
        chat_template: a file with the chat template for the data, in place of the tokenizer's.
    """

    formulas: Method
    base: BaseModel
    options: dict[str, Any]
    sites: list[Site]
    config: Any
    carried: dict[str, torch.Tensor]
    notes: list[str]
    seed: int
    dtype_name: str
    chat_template: str | Path | None = None

    @classmethod
    def make(
        cls, info: MethodInfo, base: BaseModel, options: dict[str, Any], target: Sequence[str], seed: int, dtype: str
    ) -> _Plan:
        """Choose the layers, and check the options on them."""
        if info.reads_weights:
            base.refuse_quantized()
        # A quantised checkpoint may hold its weights under other names.
        present = info.reads_weights or (info.reads_gradients and not base.is_quantized)
        sites = base.select(target, present=present)
        formulas = load_formulas(info)
        options = formulas.complete(options, sites, base.config)
        config = formulas.make_config(options, _common_config(base, sites, seed))
        notes = formulas.notes(config, sites)
        if info.changed is not None and "variant" not in options:
            notes.insert(0, info.changed)
        carried, fresh = carried_tensors(base, seed)
        notes += _missing_notes(base, fresh, bool(carried), info.reads_weights or info.reads_gradients)
        return cls(formulas, base, options, sites, config, carried, notes, seed, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored floating-point tensors."""
        return dtype_named(self.dtype_name, STORED_IN)

    @property
    def carried_in_file(self) -> dict[str, torch.Tensor]:
        """The carried parameters by name in the file."""
        return {f"{MODEL_PREFIX}{name}": tensor for name, tensor in self.carried.items()}

    def key(self, device: torch.device) -> str:
        """What recognises the run: its finished parts are of use to no other one."""
        decisive = {
            **self.options,
            "method": self.formulas.info.name,
            "seed": self.seed,
            "dtype": self.dtype_name,
            "device": device.type,
            "class": type(self.base.model).__name__,
            "sites": [site.module for site in self.sites],
        }
        return run_key("init", decisive, {"base": file_identities(self.base.folder)})

    def adapter(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Adapter, Report]:
        """The adapter of these tensors, and the report without what only a run can tell."""
        adapter = Adapter(_config_dict(self.config), tensors)
        report = _report(adapter, self)
        report.labels = int(self.base.config.num_labels) if self.base.labels is not None else None
        return adapter, report


def _from_weights(
    plan: _Plan,
    device: torch.device,
    group: Processes,
    out: Path | None,
    force: bool,
    resume: bool,
    progress: Progress | None,
) -> tuple[Adapter, Report]:
    """The start of a method that reads weights, or nothing but shapes."""
    key = plan.key(device) if out is not None else ""
    with group.in_step(), Sharing.open(group, out, force, key, resume) as sharing:
        devices = working_devices(device)
        start = weight_start(plan.formulas, plan.config, plan.sites, plan.base, plan.dtype, sharing, devices, progress)
        if start.fingerprint is not None:
            plan.config.base_fingerprint = start.fingerprint
        plan.notes += _merged(start.notes)
        streamed = sharing.parts.on_disk
        tensors = start.tensors.beside(plan.carried_in_file)
        # By shape alone: the first of several processes may have put the output in place already.
        adapter, report = plan.adapter(tensors.shapes())
        _add_weight_figures(report, start)
        adapter.provenance = _provenance(report, plan)
        if not streamed:
            adapter.tensors = dict(tensors)
        elif out is None:
            adapter.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            group.wait()
        if sharing.output is not None:
            with sharing.output.writing() as folder:
                report.bytes = adapter.write(folder, str(out), tensors if streamed else None)
                if streamed:
                    # Before it has its name: once the output is in place nothing may fail.
                    adapter.tensors = read_tensors(folder / WEIGHTS_FILE)
    if out is not None and sharing.output is None:  # another process has written it
        report.bytes = (out / WEIGHTS_FILE).stat().st_size
        if streamed:
            adapter.tensors = read_tensors(out / WEIGHTS_FILE)
    return adapter, report


def _from_gradients(
    plan: _Plan, device: torch.device, spread: bool, out: Path | None, force: bool, progress: Progress | None
) -> tuple[Adapter, Report]:
    """The start of a method that reads the gradient of a loss."""
    settings = _settings(plan, device, spread)
    wanted = plan.formulas.gradient_parts(plan.config, plan.sites)
    run = _gradients(plan, wanted, settings, progress)
    plan.sites = [site for site in plan.sites if site.module not in run.found.absent]
    plan.config = plan.formulas.make_config(plan.options, _common_config(plan.base, plan.sites, plan.seed))
    plan.notes += run.notes
    start = plan.formulas.start(plan.config, plan.sites, GradientSource(run.found.svds))
    plan.notes += _merged(start.notes)
    tensors = {file_name(name): stored(name, tensor, plan.dtype) for name, tensor in start.tensors.items()}
    adapter, report = plan.adapter({**tensors, **plan.carried_in_file})
    report.loss, report.samples = run.found.loss, run.samples
    adapter.provenance = _provenance(report, plan)
    if out is not None:
        if run.processes.first:
            report.bytes = adapter.save(out, force)
        run.processes.wait()
    return adapter, report


def _opened(
    model: str | Path | nn.Module,
    info: MethodInfo,
    task: str | None,
    data: Any,
    head: HeadRequest,
    trust_remote_code: bool,
) -> BaseModel:
    """The base model; its head has the classes that were asked for, or, where the checkpoint lacks it, the data's."""
    if info.reads_gradients and data is None:
        raise MethodError(f"{info.name} starts from the gradient of a loss: give the data for it with --data FILE")
    if isinstance(model, nn.Module):
        if not info.reads_gradients:
            raise MethodError(
                f"{info.name} reads a model's files: give its folder, or call peft.get_peft_model(model, config)"
            )
        if head.explicit:
            raise OptionError("a loaded model has its head: num_labels and labels belong to a model's files")
        return LiveModel(model, task)
    base = BaseModel.open(model, task, trust_remote_code)
    wanted = head.classes(base, idle_for=None if info.reads_gradients else info.name)
    return base if wanted is None else BaseModel.open(model, task, trust_remote_code, labels=wanted)


def _settings(plan: _Plan, device: torch.device, spread: bool) -> RunSettings:
    names = ("samples", "batch_size", "max_length", "gradient_checkpointing")
    given = {name: plan.options[name] for name in names if name in plan.options}
    return RunSettings(
        dtype=plan.dtype, seed=plan.seed, device=device, spread=spread, chat_template=plan.chat_template, **given
    )


def _examples_notes(plan: _Plan, device: torch.device) -> list[str]:
    """What is to be said of the data, which is read, though the model is not."""
    examples = _settings(plan, device, spread=False).examples(plan.options["data"], plan.base)
    return examples.notes if examples is not None else []


def _gradients(
    plan: _Plan, wanted: tuple[int, dict[str, list[int]]], settings: RunSettings, progress: Progress | None
) -> GradientRun:
    """The gradients that a method starts from."""
    rank, parts = wanted
    data, loss = plan.options["data"], plan.options.get("loss")
    run = gradient_run(
        plan.base, plan.sites, rank, parts, data, loss, settings, carried=plan.carried, progress=progress
    )
    if run.found.absent:
        run.notes.append(f"no gradient reaches {listing(run.found.absent, 4)}: left out")
    if not run.found.svds:
        raise TargetError(f"no gradient reaches any of the {len(plan.sites)} layers: the loss does not depend on them")
    return run


def _checked(method: str, options: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    for name in options:
        if name not in method_info(method).options:
            raise MethodError(f"method {method} takes no {name}")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be at least 0 and below 2^63, got {seed}")
    dtype_named(dtype, STORED_IN)
    return options


def _missing_notes(base: BaseModel, fresh: list[str], carries: bool, reads_weights: bool) -> list[str]:
    notes = [f"the checkpoint has no {name}: a fresh one, seeded, is saved with the adapter" for name in fresh]
    missing = missing_modules(base) if reads_weights and not carries else []
    if missing:
        notes.append(f"the checkpoint has no {listing(missing, 3)}: transformers draws them anew at every load")
    return notes


def _check_place(out: Path, base: BaseModel, force: bool) -> None:
    if base.live is None:
        refuse_inputs(out, base.folder, called="the base model")
    check_output(out, force)


def _common_config(base: BaseModel, sites: Sequence[Site], seed: int) -> dict[str, Any]:
    name, _, revision = base.name.partition("@") if not Path(base.name).is_dir() else (base.name, "", "")
    return {
        "target_modules": names_to_match(base.model, sites),
        "task_type": base.task.peft_task_type if base.task else None,
        "base_model_name_or_path": name.rstrip("/") or name or None,
        "revision": revision or None,
        "modules_to_save": carried_modules(base) or None,
        "fan_in_fan_out": all(site.transposed for site in sites),
        "seed": seed,
        "inference_mode": True,
    }


def _config_dict(config: Any) -> dict[str, Any]:
    """`adapter_config.json` as PEFT writes it, but with its sets in order: theirs changes from process to process."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        result: dict[str, Any] = json.loads((Path(folder) / CONFIG_FILE).read_text())
    sets = {name for name, value in vars(config).items() if isinstance(value, (set, frozenset))}
    return {name: sorted(value) if name in sets else value for name, value in result.items()}


def _planned(plan: _Plan) -> tuple[Adapter, Report]:
    """The adapter that would be made, its tensors on the meta device; in the end it holds none."""
    planned: dict[str, torch.Tensor] = {}
    method, config = plan.formulas, plan.config
    if isinstance(method, OwnMethod):
        for group in method.groups(plan.sites):
            for index, site in enumerate(group):
                shapes = method.shapes(config, site)
                for name in method.stored(config, owner=index == 0):
                    empty = torch.empty(shapes[name], dtype=method.dtype(name, site), device="meta")
                    planned[f"{site.module}.{method.prefix}{name}"] = empty
    else:
        planned = {name: t.to("meta") for name, t in method.start(config, plan.sites, None).tensors.items()}
    tensors = {file_name(name): stored(name, tensor, plan.dtype) for name, tensor in planned.items()}
    adapter, report = plan.adapter({**tensors, **plan.carried_in_file})
    adapter.provenance, adapter.tensors = _provenance(report, plan), {}
    return adapter, report


def _report(adapter: Adapter, plan: _Plan) -> Report:
    method, config, base = plan.formulas, plan.config, plan.base
    modules = adapter.modules
    trainable = set(method.trainable_names)
    entries = []
    for site in plan.sites:
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
        modules=len(plan.sites),
        trainable_parameters=sum(entry.parameters for entry in entries) + carried,
        bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
        seconds=0.0,
        base=base.name,
        model_class=type(base.model).__name__,
        device="cpu",
        notes=plan.notes,
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


def _add_weight_figures(report: Report, start: WeightStart) -> None:
    """Name weights that are zero, and state how much of each weight a start holds that approximates it."""
    zero = [module for module, energy in start.energies.items() if energy == 0]
    if zero:
        report.notes.append(f"the weights of {listing(zero, 3)} are zero: what starts from them does not train")
    for entry in report.sites:
        if entry.module in start.held and start.energies.get(entry.module):
            entry.captured = min(start.held[entry.module] / start.energies[entry.module], 1.0)
    shares = [entry.captured for entry in report.sites if entry.captured is not None]
    if shares:
        low, mean, high = min(shares), sum(shares) / len(shares), max(shares)
        report.notes.append(
            f"A0 and B0 capture {mean:.1%} of the weights' squared norm ({low:.1%} to {high:.1%} by layer); "
            "a higher rank captures more"
        )


def _head_prefixes(config: Any) -> tuple[str, ...]:
    return tuple(f"{MODEL_PREFIX}{name}." for name in config.modules_to_save or ())


def _provenance(report: Report, plan: _Plan) -> dict[str, Any]:
    """`surgery.json`: how the adapter came about, without paths of the machine it was made on."""
    base = plan.base
    # A Hub id says which model it was; of a folder only its own name is kept.
    name = base.folder.resolve().name if base.name and Path(base.name).is_dir() else base.name
    data = plan.options.get("data")
    kept = {name: value for name, value in plan.options.items() if name not in {"data", "loss"}}
    return provenance_of(
        "init",
        getattr(plan.config, "format_version", FIRST_VERSION),
        method=report.method,
        options={**kept, "seed": plan.seed, "dtype": plan.dtype_name},
        data=Path(str(data)).name if is_file(data) else None,
        labels=base.labels,
        task=base.task.name if base.task else None,
        base=name,
        modules=report.modules,
        trainable_parameters=report.trainable_parameters,
        notes=report.notes,
    )
