"""An adapter fitted to a base model that may be of another class over the same body (bare, or with a head)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents, who
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site, linear_sites, unsupported_modules
from surgery.peft_types.loading import own_task

__all__ = ["located", "sites_on_base", "with_place_for"]


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
            raise AdapterError(f"{who(adapter)}: {_no_linear(base, name)}")
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
