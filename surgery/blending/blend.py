"""Blend adapters of one base: their weighted sum, or TIES or DARE, in any form and within any budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from surgery.adapters.adapter import Adapter, bits_equal
from surgery.adapters.contents import contents_of
from surgery.adapters.source import Source
from surgery.blending.combinations import Combination, combination_named
from surgery.blending.members import Blended, Member, blended, check_members, in_order
from surgery.blending.naming import parsed_member
from surgery.blending.report import BlendedMember, BlendReport
from surgery.converters.budget import Budget
from surgery.converters.convert import convert
from surgery.converters.forms import FormName
from surgery.converters.report import ConvertReport
from surgery.converters.request import Request
from surgery.converters.shared_base import Base, CalibrationData
from surgery.converters.to_lora import to_lora
from surgery.deltas.operators import Delta
from surgery.errors import OptionError, listing
from surgery.models.tasks import TaskName
from surgery.storage.output_paths import check_output, refuse_inputs
from surgery.system.devices import Device, resolve_device
from surgery.system.keywords import keywords
from surgery.system.progress import Progress

__all__ = ["blend"]

# Keys of a configuration that belong to what an adapter saves whole.
SAVED_KEYS = ("auto_mapping", "bias", "modules_to_save", "task_type", "trainable_token_indices")
# More than any layer has: its change is decomposed whole.
EVERY_RANK = 1 << 30
Given = str | Path | Adapter


@keywords()
def blend(
    members: Sequence[Given | tuple[Given, float]],
    out: str | Path | None = None,
    to: FormName = "lora",
    *,
    how: Literal["sum", "ties", "dare", "dare-ties"] = "sum",
    density: float | None = None,
    head: Given | None = None,
    base: str | Path | None = None,
    repeated: bool = False,
    device: Device = "auto",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    task: TaskName | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Adapter, BlendReport]:
    """Combine the weight changes of adapters of one base model into one adapter.

    The sum is exact, whatever the types: thin factors are stacked, nothing is formed. TIES and DARE drop entries of
    each change, which makes changes of full rank; say with `rank` how much to keep, or every layer is decomposed
    whole. The result is brought into a form and a budget as `surgery.convert` does it, with base and data in the
    metric of the model's answers.

    Args:
        members: adapters (a folder, a Hub id, `ADAPTER=WEIGHT` as on the command line, or an opened `Adapter`), or
            pairs of one and its weight; without one the weight is 1.
        out: the folder to write; None writes nothing.
        to: the form of the result, as for `surgery.convert`.
        how: `sum`, `ties` (arXiv 2306.01708), `dare` or `dare-ties` (arXiv 2311.03099).
        density: ties, dare: the share of each member's entries that is kept.
        head: the member whose saved modules (heads, biases, embeddings) the result takes; needed where several have
            some.
        base: their base model, a folder or a Hub id; needed for types whose change depends on it, and for data.
        repeated: the same member may be given twice.
        device: where to compute: auto, cpu, cuda.
        seed: of everything drawn at random.
        overwrite: replace an output folder that exists.
        dry_run: do all but write.
        task: what the model is for, which chooses its class.
        trust_remote_code: run model code that comes with the base.
        progress: called after each layer.
        options: others of `surgery.convert`: budgets, data, dtype, options of the form.

    Returns:
        The new adapter and the report.

    Raises:
        AdapterError: a member cannot be read exactly, or they are of different bases.
        OptionError: weights or options cannot be used.
        MethodError: the budget is too small, or too little of the blend is kept.
        OutputError: the output cannot be written.
    """
    rule = combination_named(how, density)
    parsed = [_parsed(member) for member in members]
    opened = [Adapter.open(given) if not isinstance(given, Adapter) else given for given, _ in parsed]
    if out is not None:
        for adapter in opened:
            refuse_inputs(Path(out), adapter.folder, base, called="a member or its base model")
        check_output(Path(out), overwrite)
    where = resolve_device(device)
    settings = CalibrationData(None, seed=seed)
    with Base.open(base, settings, task, where, trust_remote_code, progress) as shared:
        chosen = _head(opened, parsed, head)
        model = shared.model_for(contents_of(opened[chosen or 0])) if shared.opened is not None else None
        joined = [
            Member(_name(given, adapter), weight, Source.open(adapter, model, where))
            for (given, weight), adapter in zip(parsed, opened, strict=True)
        ]
        notes = check_members(joined, None if base is None else str(base), repeated)
        combined = blended(joined, joined[chosen or 0], rule, density, seed)
        whole = _as_lora(combined, chosen is not None, _first_cut(rule, combined, options), seed)
        made, report = _convert(
            whole,
            to,
            out,
            base=base,
            device=device,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            task=task,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **options,
        )
        report.source, report.source_type = "the exact blend", "LORA"
        rows = _remains(combined, Source.open(made, model, where, _shapes(whole)))
    used = rule.density if density is None else density
    taken = joined[chosen].name if chosen is not None else None
    return made, BlendReport(how, used, rows, taken, report, [*notes, *_head_notes(joined, chosen)])


def _convert(whole: Adapter, to: FormName, out: str | Path | None, **options: Any) -> tuple[Adapter, ConvertReport]:
    """`surgery.convert` of one adapter, with keywords that are passed on."""
    return convert(whole, to, out, **options)


def _parsed(member: Given | tuple[Given, float]) -> tuple[Given, float]:
    if isinstance(member, tuple):
        return member[0], float(member[1])
    return parsed_member(member) if isinstance(member, str) else (member, 1.0)


def _name(given: Given, adapter: Adapter) -> str:
    return adapter.name or "the adapter" if isinstance(given, Adapter) else str(given)


def _head(opened: Sequence[Adapter], parsed: Sequence[tuple[Given, float]], head: Given | None) -> int | None:
    """The place of the member whose saved modules are taken; None where no member has any.

    Raises:
        OptionError: several have some and none is named, or the named one is no member, or has none.
    """
    having = [place for place, adapter in enumerate(opened) if contents_of(adapter).carried_tensors]
    names = [_name(given, adapter) for (given, _), adapter in zip(parsed, opened, strict=True)]
    if head is None:
        saved = [contents_of(opened[place]).carried_tensors for place in having]
        if any(not _equal(saved[0], each) for each in saved[1:]):
            raise OptionError(
                f"{listing([names[place] for place in having])} each save modules whole (heads, biases, embeddings), "
                f"which cannot be added: say with --head whose to take, as in --head {names[having[0]]}"
            )
        return having[0] if having else None
    place = next((place for place, (given, _) in enumerate(parsed) if given is head or str(given) == str(head)), None)
    if place is None:
        raise OptionError(f"head: {head} is no member of the blend: use one of {', '.join(names)}")
    if place not in having:
        raise OptionError(f"head: {names[place]} saves no module whole")
    return place


def _equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(bits_equal(first[name], second[name]) for name in first)


def _head_notes(members: Sequence[Member], chosen: int | None) -> list[str]:
    if chosen is None:
        return []
    left = [
        member.name
        for place, member in enumerate(members)
        if place != chosen
        and member.source.carried
        and not _equal(members[chosen].source.carried, member.source.carried)
    ]
    lost = f"; what {listing(left, 3)} saves whole is left out" if left else ""
    return [f"saved modules are those of {members[chosen].name}{lost}"]


def _first_cut(rule: Combination, combined: Blended, options: dict[str, Any]) -> Budget:
    """How changes of full rank become factors: at the rank that is asked for, otherwise whole."""
    thin = rule.rule is None and all(member.source.contents.type.thin for member in combined.members)
    given = options.get("rank") or getattr(options.get("budget"), "rank", None)
    return Budget() if thin else Budget(rank=given if given is not None else EVERY_RANK)


def _as_lora(combined: Blended, with_saved: bool, cut: Budget, seed: int) -> Adapter:
    """The combined changes as one LoRA in memory, float32, each layer of its own rank."""
    saved = combined.carried if with_saved else {}
    request = Request(
        cut,
        source_bytes=0,
        saved=saved,
        dtype=torch.float32,
        options={"per_layer_ranks": True},
        seed=seed,
        device=combined.device,
    )
    result = to_lora(combined, request)
    old = combined.adapter.config
    config = {key: old[key] for key in SAVED_KEYS if with_saved and old.get(key) is not None}
    names = (member.adapter.config.get("base_model_name_or_path") for member in combined.members)
    config |= {
        "base_model_name_or_path": next(filter(None, names), None),
        "bias": config.get("bias") or "none",
        "task_type": old.get("task_type"),
        "target_modules": sorted(result.ranks),
        "inference_mode": True,
        **result.config,
    }
    made = Adapter(config, {**saved, **result.tensors})
    made.companions = dict(combined.adapter.companions)
    made.name = "-".join(Path(member.name).name for member in combined.members)
    made.provenance = {
        "blend": [{"adapter": Path(member.name).name, "weight": member.weight} for member in combined.members]
    }
    return made


def _shapes(whole: Adapter) -> dict[str, tuple[int, int]]:
    """`(out, in)` of each layer of a LoRA."""
    return {module: whole.delta(module).shape for module in contents_of(whole).modules}


def _remains(combined: Blended, result: Source) -> list[BlendedMember]:
    """How much of each member is in the result, over all layers together; one layer of each is held at a time."""
    if combined.base is None:
        made_names = {module: module for module in result.contents.modules}
    else:
        made_names = {combined.sites[site]: name for site, name in result.sites.items() if site in combined.sites}
    rows = []
    for member, names in zip(combined.members, combined.names, strict=True):
        products = torch.zeros(3, dtype=torch.float64)
        modules = combined.contents.modules
        for own, made in zip(
            in_order(member.source, names, modules), in_order(result, made_names, modules), strict=True
        ):
            products += torch.tensor([_inner(own, made), _inner(own, own), _inner(made, made)], dtype=torch.float64)
        inner, squared, of_result = products.tolist()
        rows.append(
            BlendedMember(
                member.name,
                member.adapter.peft_type,
                member.weight,
                len(names),
                inner / squared if squared else 0.0,
                inner / math.sqrt(squared * of_result) if squared and of_result else 0.0,
            )
        )
    return rows


def _inner(first: Delta | None, second: Delta | None) -> float:
    """The inner product of two changes of one layer, through thin factors where both have some; 0 where one is not."""
    if first is None or second is None:
        return 0.0
    left, right = first.factors(), second.factors()
    if left is None or right is None:
        return float((first.dense().double() * second.dense().double()).sum())
    (B1, A1), (B2, A2) = ([factor.double() for factor in pair] for pair in (left, right))
    return float(((B1.T @ B2) * (A1 @ A2.T)).sum())
