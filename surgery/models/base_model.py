"""A base model folder, opened without loading it: configuration, sites, and weights one tensor at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from surgery.errors import CheckpointError, listing
from surgery.models.checkpoint_names import Source, parameter_sources
from surgery.models.config_limits import check_model_config, limited_modules
from surgery.models.module_names import ModelNames
from surgery.models.quantized import unquantized_advice
from surgery.models.sites import Site, role_by_name, select_sites
from surgery.models.tasks import TASK_TABLE
from surgery.storage.folder_checks import check_files
from surgery.storage.hub_cache import local_folder
from surgery.storage.json_files import read_json
from surgery.storage.safetensors_read import TensorFiles

__all__ = ["TASKS", "BaseModel", "Task", "task_of"]


class Task:
    """What a model is used for: the name on the command line, PEFT's task type, and transformers' model class."""

    def __init__(self, name: str, peft_task_type: str | None, mapping: str) -> None:
        self.name = name
        self.peft_task_type = peft_task_type
        self.mapping = mapping

    def model_class(self, config: PretrainedConfig) -> type[Any]:
        """The transformers class for this task and configuration.

        Raises:
            CheckpointError: transformers has no such class for the configuration's model type.
        """
        classes = getattr(modeling_auto, self.mapping)
        try:
            found = classes[type(config)]
        except KeyError:
            raise CheckpointError(
                f"transformers has no {self.name} class for model type {config.model_type!r}"
            ) from None
        return found[0] if isinstance(found, tuple) else found


TASKS = {name: Task(name, peft_type, mapping) for name, (peft_type, mapping) in TASK_TABLE.items()}


class BaseModel:
    """A base model on disk.

    Attributes:
        name: what the user called it: a folder or a Hub id.
        folder: where its files lie.
        config: transformers' configuration.
        model: the model on the meta device: names, classes and shapes, no values.
        task: the task whose class was chosen, or None for a class that serves none of the known tasks.
        files: the checkpoint's tensors.
        shapes: shape of every parameter of the model.
        live: the model with its values, where it was loaded by the caller; else None.
        labels: the classes that were given to a head which the checkpoint lacks; else None.
    """

    live: Any = None
    labels: list[int | str] | None = None

    def __init__(
        self, name: str, folder: Path, config: PretrainedConfig, model: Any, task: Task | None, files: TensorFiles
    ) -> None:
        self.name = name
        self.folder = folder
        self.config = config
        self.model = model
        self.task = task
        self.files = files
        self._sources: dict[str, Source] | None = None
        self._names: ModelNames | None = None
        self._file_shapes: dict[str, tuple[int, int]] = {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @classmethod
    def open(
        cls,
        model: str | Path,
        task: str | None = None,
        trust_remote_code: bool = False,
        labels: Sequence[int | str] | None = None,
    ) -> BaseModel:
        """Open a folder or Hub id; no weight is read.

        Args:
            model: a folder with `config.json` and safetensors, or a Hub id (`org/name`, `org/name@revision`).
            task: a key of `TASKS`; without it the class that the configuration names.
            trust_remote_code: run model code that comes with the checkpoint.
            labels: the classes of a head, where the checkpoint does not say.

        Raises:
            CheckpointError: the folder or one of its files is missing, broken or unsupported.
        """
        folder = local_folder(str(model))
        if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder}: is an adapter, not a base model; give the model that it is for")
        check_files(folder)
        check_model_config(folder / "config.json", read_json(folder / "config.json"), trust_remote_code)
        files = TensorFiles.open(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers validates a configuration with errors of many kinds
            raise CheckpointError(f"{folder / 'config.json'}: {_reason(folder, error, trust_remote_code)}") from None
        if labels is not None:
            _set_labels(config, labels)
        model_class, chosen = _model_class(folder, config, task, trust_remote_code)
        config = _config_for(model_class, config)
        base = cls(str(model), folder, config, _on_meta(folder, model_class, config, files), chosen, files)
        base.labels = list(labels) if labels is not None else None
        return base

    @property
    def head_is_free(self) -> bool:
        """Whether neither the weights nor the configuration say how many classes there are."""
        known = {"num_labels", "id2label", "label2id"} & set(read_json(self.folder / "config.json"))
        head = [name for name, _ in self.model.named_parameters() if not name.startswith(self._body)]
        return not known and all(name not in self.sources for name in head)

    @property
    def _body(self) -> str:
        return f"{self.model.base_model_prefix}."

    @property
    def is_text_part(self) -> bool:
        """Whether the model is the text model of a composite one, whose configuration `config.json` is."""
        return bool(read_json(self.folder / "config.json").get("model_type") != self.config.model_type)

    def config_from(self, raw: dict[str, Any]) -> PretrainedConfig:
        """The configuration of this model from what a `config.json` holds, which may be that of a composite one."""
        text = raw.get("text_config")
        if isinstance(text, dict) and raw.get("model_type") != self.config.model_type:
            raw = {**text, **{key: raw[key] for key in ("tie_word_embeddings",) if key in raw}}
        found: PretrainedConfig = type(self.config).from_dict(copy.deepcopy(raw))
        return found

    def with_config(self, config: PretrainedConfig) -> BaseModel:
        """The same files under a changed configuration (another number of labels, untied embeddings).

        Raises:
            CheckpointError: no model can be built from the configuration.
        """
        model = _on_meta(self.folder, type(self.model), config, self.files)
        return BaseModel(self.name, self.folder, config, model, self.task, self.files)

    def select(self, targets: Sequence[str] = (), present: bool = True) -> list[Site]:
        """The sites that `targets` name (see `select_sites`); with `present`, each of them is in the checkpoint.

        Raises:
            TargetError: nothing matches.
            CheckpointError: a matched layer has no weight in the checkpoint.
        """
        sites = select_sites(self.model, targets)
        absent = [site.module for site in sites if present and site.parameter not in self.sources]
        if absent:
            raise CheckpointError(f"{self.folder}: no weights for {listing(absent, 4)} in the checkpoint")
        return sites

    @property
    def sources(self) -> dict[str, Source]:
        """Where each parameter of the model comes from in the checkpoint."""
        if self._sources is None:
            self._sources = parameter_sources(self.model, self.files.files)
        return self._sources

    def file_site(self, key: str) -> Site:
        """A matrix of the files as a layer of its own, which transformers joins with others, or splits, while loading.

        Afterwards `parameter` reads it, and `sources` has it, under its name in the files.

        Raises:
            CheckpointError: it cannot be read, or is no matrix.
        """
        tensor = self.files.read(key)
        if tensor.ndim != 2:
            raise CheckpointError(f"{self.folder}: {key} has shape {tuple(tensor.shape)}, expected a matrix")
        self.sources.setdefault(key, Source(key, [(key, key)]))
        self._file_shapes[key] = (int(tensor.shape[0]), int(tensor.shape[1]))
        module = key.removesuffix(".weight")
        role, layer = role_by_name(module)
        return Site(module, module, role, layer, *self._file_shapes[key])

    @property
    def names(self) -> ModelNames:
        """The names of the model's modules and parameters, with those of other versions and classes."""
        if self._names is None or self._names.model is not self.model:
            self._names = ModelNames(self.model)
        return self._names

    @property
    def is_quantized(self) -> bool:
        """Whether the linear weights are stored in a quantised form."""
        return bool(getattr(self.config, "quantization_config", None))

    def refuse_quantized(self) -> None:
        """Refuse a checkpoint whose linear weights are stored in a quantised form.

        Raises:
            CheckpointError: the configuration has a `quantization_config`.
        """
        if self.is_quantized:
            quantization: Any = self.config.quantization_config
            as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
            kind = as_dict.get("quant_method", "unknown")
            raise CheckpointError(
                f"{self.folder}: the checkpoint is quantised ({kind}); this needs the true weights: "
                + unquantized_advice(self.name, read_json(self.folder / "config.json"))
            )

    def parameter(self, name: str, check: bool = False) -> torch.Tensor:
        """Read one parameter onto the CPU, in the checkpoint's dtype and the model's orientation.

        Raises:
            CheckpointError: the checkpoint lacks it, its shape is not the model's, or, with `check`, it holds NaN or
                Inf.
        """
        if name not in self.sources:
            raise CheckpointError(f"{self.folder}: no tensor for {name} in the checkpoint")
        source = self.sources[name]
        try:
            tensor = source.read(name, self.model, self.files.read)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # of transformers' rules
            if source.converter is None:
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{self.folder}: transformers joins or splits {len(source.keys)} tensors ({source.keys[0][0]}, ...) "
                f"for {name}, and they do not go together: one is missing or of another shape ({reason})"
            ) from None
        expected = self.shapes[name] if name in self.shapes else self._file_shapes[name]
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, the model of config.json wants {expected}"
            )
        if check and tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(f"{self.folder}: {name} holds NaN or Inf")
        return tensor

    def raw_weight(self, site: Site, check: bool = True) -> torch.Tensor:
        """The weight of `site`, `(out, in)`, on the CPU in the checkpoint's dtype; `check` looks for NaN and Inf.

        Raises:
            CheckpointError: it is missing, of another shape, not floating point, or holds NaN or Inf.
        """
        tensor = self.parameter(site.parameter, check)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.folder}: {site.parameter} is {tensor.dtype}, not floating point")
        return site.matrix(tensor)

    def weight(self, site: Site, device: torch.device | str = "cpu") -> torch.Tensor:
        """The weight of `site`, `(out, in)`, float32, on `device`."""
        return self.raw_weight(site).to(device=device, dtype=torch.float32)


def _config_for(model_class: type[Any], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite configuration that a text model is made from, as transformers' auto classes take it."""
    parts: Any = getattr(config, "sub_configs", None) or {}
    text: Any = parts.get("text_config")
    if text is None or getattr(model_class, "config_class", None) is not text or type(config) is text:
        return config
    inner: Any = config.get_text_config()
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        inner.quantization_config = quantization
    found: PretrainedConfig = inner
    return found


def _set_labels(config: PretrainedConfig, labels: Sequence[int | str]) -> None:
    """Name the classes: whole numbers stand for themselves, names are numbered in order."""
    if all(isinstance(label, int) for label in labels):
        config.num_labels = max(int(label) for label in labels) + 1
        return
    config.id2label = {index: str(label) for index, label in enumerate(labels)}
    config.label2id = {str(label): index for index, label in enumerate(labels)}


def _reason(folder: Path, error: Exception, trust_remote_code: bool) -> str:
    if read_json(folder / "config.json").get("auto_map") and not trust_remote_code:
        return "the model brings its own code; --trust-remote-code runs it, if you trust it"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _model_class(
    folder: Path, config: PretrainedConfig, task: str | None, trust_remote_code: bool
) -> tuple[type[Any], Task | None]:
    if task is not None:
        if task not in TASKS:
            raise CheckpointError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
        return TASKS[task].model_class(config), TASKS[task]
    architectures = getattr(config, "architectures", None) or []
    if not architectures:
        raise CheckpointError(
            f"{folder / 'config.json'}: names no architectures; say what the model is for with --task"
        )
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise CheckpointError(f"{folder / 'config.json'}: architectures is {architectures!r}, expected a list of names")
    name = architectures[0]
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        return _remote_class(folder, name, auto_map), None
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        version = transformers.__version__
        raise CheckpointError(f"{folder / 'config.json'}: transformers {version} has no model class {name}")
    return model_class, task_of(model_class, config)


def task_of(model_class: type[Any], config: PretrainedConfig) -> Task | None:
    """The task that a class of transformers serves; None for one that serves none of the known tasks."""
    for task in TASKS.values():
        with contextlib.suppress(CheckpointError):
            if task.model_class(config) is model_class:
                return task
    return None


def _remote_class(folder: Path, name: str, auto_map: dict[str, str]) -> type[Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for reference in auto_map.values():
        if isinstance(reference, str) and reference.split(".")[-1] == name:
            return get_class_from_dynamic_module(reference, folder)
    raise CheckpointError(f"{folder / 'config.json'}: auto_map does not say where {name} is")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all entries are finite; NaN and Inf survive a sum, so its value mostly settles the question."""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor.float()).all())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' advice while a model without values is built: nothing is loaded."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _on_meta(folder: Path, model_class: type[Any], config: PretrainedConfig, files: TensorFiles) -> Any:
    try:
        with _quiet(), torch.device("meta"), limited_modules(len(files.files)):
            return model_class(config)
    except Exception as error:  # whatever a model's own code raises for sizes that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{folder / 'config.json'}: {model_class.__name__} cannot be built from it ({reason})"
        ) from None
