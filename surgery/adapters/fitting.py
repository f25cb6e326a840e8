"""An adapter fitted to a base model that may be of another class over the same body (bare, or with a head)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents
from surgery.adapters.fused import as_lora, fused_parts, with_fused
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.renaming import renamed_adapter
from surgery.adapters.types.lora import A_NAME, B_NAME, LORA
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.models.base_model import BaseModel
from surgery.models.module_names import FusedPart, ModelNames
from surgery.models.sites import EXPERT, LINEAR, PARAMETER, Site, adaptable_sites, unsupported_modules
from surgery.models.tasks import TASK_TABLE

__all__ = [
    "fit_to_model",
    "located",
    "old_names_note",
    "own_task",
    "sites_on_base",
    "with_names_of",
    "with_place_for",
]

# What only names of transformers 4 look like.
OLD_NAMES = re.compile(r"(^|\.)language_model\.model\.|\.block_sparse_moe\.|\.experts\.\d+\.")


def located(name: str, names: Collection[str], base: BaseModel) -> str | None:
    """The base's own name for a module or a parameter of an adapter; None where the base has none.

    Args:
        name: of a module or a parameter, by any name that transformers has given it (see `ModelNames`).
        names: those of the base.
        base: the base model.
    """
    return base.names.located(name, names)


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
    linears = {site.module: site for site in adaptable_sites(base.model)}
    found: dict[str, str] = {}
    for name in modules:
        module = located(name, linears, base)
        if module is None:
            site = _site_in_files(base, name)
            if site is None:
                raise AdapterError(f"{adapter.label}: {_no_linear(base, name)}")
            module = site.module
            linears[module] = site
        _check_form(adapter, name, linears[module])
        if module in found:
            raise AdapterError(f"{adapter.label}: changes {found[module]} and {name}, which are one layer of the base")
        found[module] = name
    absent = [module for module in found if linears[module].parameter not in base.sources]
    if absent:
        raise CheckpointError(f"{base.folder}: no weights for {listing(absent, 3)} in the checkpoint")
    return {site: found[module] for module, site in linears.items() if module in found}


def _check_form(adapter: Adapter, name: str, site: Site) -> None:
    """Check that the base has a layer of the kind that the adapter's tensors are for."""
    form = adapter.form(name)
    if adapter.type is not None and adapter.type.form_by_base and form.kind == LINEAR:
        return  # the formula finds out whether the shapes fit
    same_kind = form.kind == site.form.kind or {form.kind, site.form.kind} == {LINEAR, PARAMETER}
    if not same_kind or form.kernel != site.form.kernel:
        raise AdapterError(
            f"{adapter.label}: changes {name} as the weight of a layer of the kind {form}, the base has one of the "
            f"kind {site.form} there: it is for another base model"
        )


def _site_in_files(base: BaseModel, module: str) -> Site | None:
    """A layer that is one tensor of the base's files, which transformers joins with others or splits while loading."""
    part = base.names.fused_part(f"{module}.weight")
    if part is None or part.target not in base.sources:
        return None
    keys = (key for key, _ in base.sources[part.target].keys if base.names.same_key(key, part.key))
    return next((base.file_site(key) for key in keys), None)


def _fits(base: BaseModel, contents: Contents) -> bool:
    modules = base.names.modules
    return all(located(name, modules, base) or _site_in_files(base, name) for name in contents.modules) and all(
        located(name, base.shapes, base)
        for name in (*contents.carried, *(f"{module}.weight" for module in contents.tokens))
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
    known = ModelNames(model)
    wanted = {module: _unwrapped(module) for module in adapter.modules if module}
    experts = {module for module in wanted if adapter.form(module).kind in {EXPERT, PARAMETER}}
    if all(plain in known.modules or _is_parameter(plain, known) for plain in wanted.values()):
        return _right_way_round(adapter, known, experts)
    parts = fused_parts(known, (plain for module, plain in wanted.items() if module not in experts))
    if parts:
        return fit_to_model(_with_parts(adapter, known, parts, type(model).__name__), model)
    renamed = {}
    for module, plain in wanted.items():
        found = known.located(plain, known.modules)
        if found is None and module in experts:
            name, _, index = plain.rpartition(".") if plain.rpartition(".")[2].isdigit() else (plain, "", "")
            held = known.located(name, known.parameters)
            found = f"{held}.{index}".removesuffix(".") if held is not None else None
        if found is not None:
            renamed[module] = found + module.removeprefix(plain)
    lost = [module for module in wanted if module not in renamed]
    if lost:
        raise AdapterError(
            f"the adapter does not fit {type(model).__name__}: it changes {listing(lost, 3)}, which this model does "
            f"not have (base: {adapter.config.get('base_model_name_or_path')})"
        )
    return _right_way_round(renamed_adapter(adapter, renamed, model), known, {renamed[module] for module in experts})


def _is_parameter(module: str, names: ModelNames) -> bool:
    """Whether the name of a layer is that of a parameter, or of one expert of it."""
    owner, _, index = module.rpartition(".")
    return module in names.parameters or (index.isdigit() and owner in names.parameters)


def _right_way_round(adapter: Adapter, names: ModelNames, experts: Collection[str]) -> Adapter:
    """A LoRA on fused experts with in and out as today's PEFT takes them: PEFT 0.18 took them the other way round."""
    tensors = {}
    for module in experts:
        name, factors = module.rpartition(".")[0], adapter.layer(module)
        if adapter.type is not LORA or name not in names.parameters or set(factors) != {A_NAME, B_NAME}:
            continue
        height, width = names.parameters[name].shape[-2:]
        if bool(getattr(names.modules[name.rpartition(".")[0]], "is_transposed", False)):
            height, width = width, height
        A, B = factors[A_NAME], factors[B_NAME]
        if (B.shape[0], A.shape[1]) == (width, height) != (height, width):
            tensors[f"{MODEL_PREFIX}{module}.{A_NAME}"] = B.T.contiguous()
            tensors[f"{MODEL_PREFIX}{module}.{B_NAME}"] = A.T.contiguous()
    return adapter.like(adapter.config, {**adapter.tensors, **tensors}) if tensors else adapter


def with_names_of(adapter: Adapter, base: BaseModel) -> Adapter:
    """An adapter under the names of a base's class, where it has those of another version or of a text model alone.

    Names that lack or have only the prefix of a class with a head stay. A LoRA on matrices that transformers joins or
    splits while loading becomes one on the model's own; experts stay, each by itself, as the base's files have them.

    Returns:
        The adapter itself where its names are those of the base, otherwise a copy with a note.
    """
    names, before = base.names, adapter
    parts = fused_parts(names, map(_unwrapped, filter(None, adapter.modules)))
    if parts and adapter.type is LORA:
        adapter = with_fused(adapter, names, parts, experts=False)
    renamed = {}
    for module in filter(None, adapter.modules):
        plain = _unwrapped(module)
        if not names.has(plain, names.modules) and plain not in parts:
            found = names.translated(plain, names.modules)
            if found is not None:
                renamed[module] = found + module.removeprefix(plain)
    if renamed:
        adapter = renamed_adapter(adapter, renamed, base.model)
    if adapter is not before:
        old = next(iter(renamed or parts))
        adapter.notes.append(f"names of another version or class of the model ({old}): written under today's names")
    return adapter


def old_names_note(modules: Iterable[str]) -> list[str]:
    """A note where names are those of an older transformers, by what they look like, and no base says today's."""
    old = next((module for module in modules if OLD_NAMES.search(module)), None)
    if old is None:
        return []
    return [f"{old} looks like a name of transformers 4: it is kept; with --base it is written under today's name"]


def _with_parts(adapter: Adapter, names: ModelNames, parts: Mapping[str, FusedPart], model: str) -> Adapter:
    """An adapter on tensors that transformers joins or splits, as a LoRA on the model's own parameters.

    Raises:
        AdapterError: the changes are not those of a LoRA, or cannot be brought there.
    """
    if adapter.type is not LORA:
        first, part = next(iter(parts.items()))
        try:
            adapter = as_lora(adapter)
        except AdapterError as error:
            raise AdapterError(
                f"{adapter.label}: changes {first}, which {model} has as a part of {part.target}, where a "
                f"{adapter.peft_type} adapter has no place ({error}); add it to its base with surgery merge, or "
                "convert it with --to lora and --base"
            ) from None
        adapter.notes.append(f"{model} has {first} as a part of {part.target}: opened as a LoRA, which can be both")
    return with_fused(adapter, names, parts)


def _unwrapped(module: str) -> str:
    """A module's name without the level that PEFT's layers and wrappers put below it (trained biases, grown heads)."""
    plain, _, last = module.rpartition(".")
    return plain if last in {"base_layer", "modules_to_save", "original_module", "token_adapter"} else module
