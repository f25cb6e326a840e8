"""An adapter fitted to a base model that may be of another class over the same body (bare, or with a head)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents
from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site, linear_sites, target_modules, unsupported_modules
from surgery.models.tasks import TASK_TABLE

__all__ = ["located", "own_task", "sites_on_base", "with_place_for"]


def located(name: str, names: Collection[str], base: BaseModel) -> str | None:
    """A name of an adapter as it is in the base: the same, or with or without the prefix of a class with a head.

    Args:
        name: of a module or a parameter.
        names: those of the base.
        base: the base model.
    """
    prefix = getattr(base.model, "base_model_prefix", "")
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in names), None)


def with_place_for(base: BaseModel, adapter: Adapter, contents: Contents, trust_remote_code: bool = False) -> BaseModel:
    """The base under a class that has a place for all that is in an adapter.

    That is its own class, or the class of the adapter's task where only that one has them all.
    """
    task = own_task(adapter)
    if _fits(base, contents) or task is None or (base.task is not None and base.task.name == task):
        return base
    other = BaseModel.open(base.name, task, trust_remote_code)
    return other if _fits(other, contents) else base


def sites_on_base(adapter: Adapter, base: BaseModel, modules: Iterable[str]) -> dict[Site, str]:
    """The layers of the base that an adapter changes, in the model's order -> the adapter's names for them.

    Raises:
        AdapterError: the model has no such layer, or one that cannot be changed.
        CheckpointError: the checkpoint has no weight for it.
    """
    linears = {site.module: site for site in linear_sites(base.model)}
    found: dict[str, str] = {}
    for name in modules:
        module = located(name, linears, base)
        if module is None:
            raise AdapterError(f"{adapter.label}: {_no_linear(base, name)}")
        found[module] = name
    absent = [module for module in found if linears[module].parameter not in base.sources]
    if absent:
        raise CheckpointError(f"{base.folder}: no weights for {listing(absent, 3)} in the checkpoint")
    return {site: found[module] for module, site in linears.items() if module in found}


def _fits(base: BaseModel, contents: Contents) -> bool:
    modules = {name for name, _ in base.model.named_modules()}
    return all(located(name, modules, base) for name in contents.modules) and all(
        located(name, base.shapes, base) for name in contents.carried
    )


def _no_linear(base: BaseModel, name: str) -> str:
    refused = unsupported_modules(base.model)
    module = located(name, {n for n, _ in base.model.named_modules()}, base)
    reason = next((refused[n] for n in refused if module and (n == module or n.startswith(f"{module}."))), None)
    if reason is not None:
        return f"changes {name}, which cannot be merged into ({reason})"
    if module is not None:
        return f"changes {name}, which is a {type(base.model.get_submodule(module)).__name__}, not a linear layer"
    return (
        f"changes {name}, which {type(base.model).__name__} ({base.name}) does not have: it is for another base model"
    )


def own_task(adapter: Adapter) -> str | None:
    """The task that the adapter was made for, by its configuration or its history."""
    by_type = {peft_type: name for name, (peft_type, _) in TASK_TABLE.items() if peft_type}
    task = by_type.get(adapter.config.get("task_type") or "") or adapter.provenance.get("task")
    return task if task in TASK_TABLE else None


def fit_to_model(adapter: Adapter, model: Any) -> Adapter:
    """Rename an adapter's modules to those of a model of another class over the same body.

    Returns:
        The adapter itself where its names are the model's, otherwise a renamed copy.

    Raises:
        AdapterError: some of its modules are not in the model, with or without the model's own prefix.
    """
    names = {name for name, _ in model.named_modules()}
    wanted = {module: _unwrapped(module) for module in adapter.modules if module}
    if all(plain in names for plain in wanted.values()):
        return adapter
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = {}
    for module, plain in wanted.items():
        candidates = (plain, f"{prefix}{plain}", plain.removeprefix(prefix))
        found = next((name for name in candidates if name in names), None)
        if found is not None:
            renamed[module] = found + module.removeprefix(plain)
    lost = [module for module in wanted if module not in renamed]
    if lost:
        raise AdapterError(
            f"the adapter does not fit {type(model).__name__}: it changes {listing(lost, 3)}, which this model does "
            f"not have (base: {adapter.config.get('base_model_name_or_path')})"
        )
    return _renamed(adapter, model, renamed)


def _unwrapped(module: str) -> str:
    """A module's name without the level that PEFT's layers and wrappers put below it (trained biases, grown heads)."""
    plain, _, last = module.rpartition(".")
    return plain if last in {"base_layer", "modules_to_save", "original_module"} else module


def _renamed(adapter: Adapter, model: Any, renamed: dict[str, str]) -> Adapter:
    tensors = {}
    for module, parts in adapter.modules.items():
        start = f"{MODEL_PREFIX}{renamed[module]}." if module else TUNER_PREFIX
        tensors.update({f"{start}{short}": tensor for short, tensor in parts.items()})
    linears: dict[str, Site] = {site.module: site for site in linear_sites(model)}
    sites = [linears[name] for name in dict.fromkeys(renamed.values()) if name in linears]
    config = {**adapter.config, "target_modules": target_modules(model, sites)}
    if config.get("packed"):
        config["packed"] = {renamed.get(module, module): shape for module, shape in config["packed"].items()}
    return Adapter(config, tensors, adapter.provenance, adapter.card)
