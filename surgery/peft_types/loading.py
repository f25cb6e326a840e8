"""`surgery.load`: an adapter on its base model, whichever class of the model it was made for."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import get_peft_model_state_dict

from surgery.adapters.adapter import Adapter
from surgery.adapters.fitting import fit_to_model, own_task
from surgery.adapters.lacking import lacking_in
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.regex_check import check_patterns
from surgery.errors import AdapterError, CheckpointError, SurgeryError, listing
from surgery.models.base_model import BaseModel
from surgery.models.labels import with_labels
from surgery.models.loading import lacking_note, load_from_files
from surgery.models.module_names import ModelNames
from surgery.models.quantized import unquantized_name
from surgery.models.tasks import TaskName
from surgery.system.dtypes import FloatDtype

__all__ = ["attached", "load"]


def load(
    adapter: str | Path | Adapter,
    base: str | Path | torch.nn.Module | None = None,
    *,
    task: TaskName | None = None,
    layout: str | None = None,
    is_trainable: bool = False,
    device_map: Any = None,
    dtype: FloatDtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> PeftModel:
    """Open an adapter on its base model.

    Unlike `PeftModel.from_pretrained`, which ignores tensors that find no place, an adapter made for another class
    of the same model (bare, or with a head) is fitted, and one that does not fit is refused. A base that is loaded here
    gets as many labels as the adapter's own head has. Stock FROD adapters are opened as our portable type, with U
    belonging to the stored V.

    Args:
        adapter: a folder, a Hub id, or an opened `Adapter`.
        base: a model, a folder or a Hub id; default the one that the adapter names.
        task: chooses the model class where `base` is not a model; default the task that the adapter was made for, or
            the class that the base's configuration names.
        is_trainable: leave the adapter trainable.
        device_map: passed to transformers where the model is loaded here.
        dtype: of the base model, where it is loaded here.
        layout: of a LoRA on fused experts whose numbers are not in PEFT's order: `unsloth` for older files of it.
        trust_remote_code: run model code that comes with the base.

    Returns:
        The model with the adapter active.

    Raises:
        AdapterError: the adapter does not fit the model, or its configuration is not understood.
        WrongBaseError: the adapter was made from other base weights.
    """
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter, layout)
    model = base if isinstance(base, torch.nn.Module) else None
    if model is None:
        name = str(base) if base is not None else _named_base(opened)
        try:
            model = _load_base(name, opened, task or own_task(opened), device_map, dtype, trust_remote_code)
        except CheckpointError as error:
            if base is not None:
                raise
            advice = f"give base={unquantized_name(name) or '...'}"
            raise CheckpointError(f"{opened.folder}: names its base model {name!r}; {error}; {advice}") from None
    model, notes = attached(opened, model, is_trainable)
    for note in notes:
        logging.getLogger("surgery").warning("%s: %s", opened.label, note)
    return model


def attached(adapter: Adapter, model: Any, is_trainable: bool = False) -> tuple[PeftModel, list[str]]:
    """Return an adapter on a loaded base model, and what the user should know of its file.

    Args:
        adapter: the adapter.
        model: its base model.
        is_trainable: leave the adapter trainable.

    Raises:
        AdapterError: the adapter does not fit the model, or its configuration is not understood.
        WrongBaseError: the adapter was made from other base weights.
    """
    opened = adapter.opened_on(model)
    if opened.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(f"{opened.folder}: PEFT type {opened.peft_type} is known neither to PEFT nor to surgery")
    lacking = lacking_in(opened, ModelNames(model))
    notes = [*opened.notes, *lacking.notes]
    fitted = fit_to_model(opened, model)
    if fitted is opened and opened.folder is not None and opened.as_stored:
        return _open(model, opened, opened.folder, is_trainable, lacking.layers), notes
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        alone = fitted.like(fitted.config, fitted.tensors)
        alone.companions = {}  # PEFT reads none of them
        alone.save(Path(folder) / "adapter")
        return _open(model, fitted, Path(folder) / "adapter", is_trainable, lacking.layers), notes


def _open(model: Any, adapter: Adapter, folder: Path, is_trainable: bool, lacking: Collection[str] = ()) -> PeftModel:
    """PEFT's loading, but what it reports in many lines, or not at all, is an error.

    Args:
        model: the base.
        adapter: the adapter, which fits it.
        folder: where it lies.
        is_trainable: leave it trainable.
        lacking: layers that its file lacks, by its names, which PEFT leaves as they are.
    """
    check_patterns(folder, adapter.config, [name for name, _ in model.named_modules()])
    try:
        with _names_as_they_are():
            loaded = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except SurgeryError:
        raise
    except KeyError as error:  # a module to save that the file lacks
        raise AdapterError(f"{folder}: the file lacks {error.args[0] if error.args else error}") from None
    except RuntimeError as error:  # torch's list of tensors whose shapes do not fit
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise AdapterError(f"{folder}: {lines[0] if lines else str(error).splitlines()[0]}") from None
    except (TypeError, ValueError, AttributeError, ImportError, IndexError, OverflowError, re.error) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__  # of a configuration that PEFT cannot use
        raise AdapterError(f"{folder}: PEFT cannot open it ({reason})") from None
    wanted = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    names = ModelNames(model)
    places = {names.located(module, names.modules) or module for module in lacking}
    starts = tuple(f"{MODEL_PREFIX}{place}." for place in places)
    there = adapter.file_tensors()
    missing = sorted(name for name in wanted if name not in there and not (starts and name.startswith(starts)))
    if missing:
        raise AdapterError(f"{folder}: the file lacks {len(missing)} of the adapter's tensors: {listing(missing, 3)}")
    lost = [name for name, tensor in wanted.items() if name in there and not _is_loaded(tensor, there[name])]
    if lost:
        raise AdapterError(
            f"{folder}: PEFT {peft.__version__} does not load {listing(lost, 3)} on {type(model).__name__}; add the "
            "adapter to its base with surgery merge"
        )
    return loaded


def _is_loaded(mine: torch.Tensor, stored: torch.Tensor) -> bool:
    """Return whether a tensor of the opened adapter has the file's values, as far as their shapes are the same."""
    if mine.is_meta or mine.shape != stored.shape:  # offloaded, or kept in another form than in the file
        return True
    given = stored.to(mine.device, mine.dtype)
    # Equal but for rounding: PEFT keeps some tensors in another form, such as VB-LoRA's weights as their logarithms.
    return bool(torch.equal(mine.detach(), given)) or (
        mine.is_floating_point() and torch.allclose(mine.detach(), given, rtol=1e-3, atol=1e-6)
    )


@contextlib.contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Keep PEFT from translating names, all of which are today's already.

    It takes targets of dense layers (`gate_proj` outside of experts) for those of joined experts, by the last part of
    their names alone; and names that a rule of transformers leads from, and to, it translates twice.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a PEFT that translates nothing
        yield
        return
    neutral: dict[str, Any] = {
        "_MODEL_TO_CONVERSION_PATTERN": {},
        "convert_peft_adapter_state_dict_for_transformers": lambda *_, adapter_state_dict, **__: adapter_state_dict,
    }
    before = {name: getattr(conversion, name) for name in neutral if hasattr(conversion, name)}
    try:
        for name in before:
            setattr(conversion, name, neutral[name])
        yield
    finally:
        for name, value in before.items():
            setattr(conversion, name, value)


def _named_base(adapter: Adapter) -> str:
    name, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    if not name:
        raise AdapterError(f"{adapter.folder}: names no base model; give it")
    return f"{name}@{revision}" if revision and not Path(name).is_dir() else str(name)


def _load_base(
    name: str, adapter: Adapter, task: str | None, device_map: Any, dtype: Any, trust_remote_code: bool
) -> Any:
    """The base model; its head has as many labels as the one that the adapter brings."""
    opened = BaseModel.open(name, task, trust_remote_code)
    brought = {tensor.removeprefix(MODEL_PREFIX): value for tensor, value in adapter.tensors.items()}
    labelled = with_labels(opened, {name: value for name, value in brought.items() if name in opened.shapes})
    if labelled is not None:
        opened = opened.with_config(type(opened.config).from_dict(labelled))
    for note in lacking_note(opened, _brought(adapter, opened)):
        logging.getLogger("surgery").warning("%s: %s", name, note)
    return load_from_files(
        opened,
        dtype=dtype,
        device_map=device_map,
        ignore_mismatched_sizes=labelled is not None,  # of the base's own head, which the adapter replaces
    )


def _brought(adapter: Adapter, base: BaseModel) -> set[str]:
    """The parameters of the base that an adapter saves whole."""
    names = (name.removeprefix(MODEL_PREFIX) for name in adapter.tensors if name not in adapter.names.owners)
    return {place for place in (base.names.located(name, base.shapes) for name in names) if place is not None}
