"""The adapters of a batch: found in folders, named, and matched with their base models."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import CONFIG_FILE
from surgery.adapters.source import Source
from surgery.converters.adapter_folders import adapter_folders
from surgery.errors import AdapterError, OutputError, SurgeryError
from surgery.models.base_model import BaseModel
from surgery.storage.hub_cache import local_folder
from surgery.storage.json_files import read_json

__all__ = ["Member", "base_of", "members_of"]


@dataclass(frozen=True)
class Member:
    """One adapter of a batch.

    Attributes:
        name: what it is called, in the batch alone.
        given: a folder, a Hub id, or the adapter.
        out: the folder to write, or None.
    """

    name: str
    given: str | Path | Adapter
    out: Path | None = None


def members_of(given: Iterable[str | Path | Adapter], out: str | Path | None) -> list[Member]:
    """Return the members of a batch: each adapter once, folders of adapters opened out, each with its own output.

    Members of equal names are told apart by the folders that they are in.

    Raises:
        AdapterError: a folder holds nothing but checkpoints of one run.
        OutputError: two members would write to one folder.
    """
    listed: list[str | Path | Adapter] = []
    for each in given:
        inside = [] if isinstance(each, Adapter) else adapter_folders(Path(each))
        listed += inside or [each]
    seen: set[Any] = set()
    unique = []
    for each in listed:
        place = (
            id(each) if isinstance(each, Adapter) else str(Path(each).resolve()) if Path(each).is_dir() else str(each)
        )
        if place not in seen:
            seen.add(place)
            unique.append(each)
    names = [_name(each, index) for index, each in enumerate(unique)]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [_longer(each, name) if name in twice else name for each, name in zip(unique, names, strict=True)]
    again, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise OutputError(f"several adapters are called {again}: convert them in calls of their own")
    folder = None if out is None else Path(out)
    return [
        Member(name, each, None if folder is None else folder / name) for name, each in zip(names, unique, strict=True)
    ]


def _name(given: str | Path | Adapter, index: int) -> str:
    if isinstance(given, Adapter):
        return given.name or f"adapter-{index}"
    if Path(given).is_dir():
        return Path(given).resolve().name
    return str(given).partition("@")[0].rstrip("/").rpartition("/")[2] or f"adapter-{index}"


def _longer(given: str | Path | Adapter, name: str) -> str:
    """The name with the folder, or the organisation, that the adapter is in."""
    if isinstance(given, Adapter):
        return f"{given.folder.resolve().parent.name}-{name}" if given.folder is not None else name
    above = Path(given).resolve().parent.name if Path(given).is_dir() else str(given).rpartition("/")[0]
    return f"{above.replace('/', '-')}-{name}"


def base_of(member: Member, bases: Sequence[str], wanted: bool, task: str | None, trust: bool) -> str | None:
    """Return the base model of a member, None for none.

    Args:
        member: the adapter.
        bases: those that the caller named.
        wanted: without any, take the one that the adapter's configuration names.
        task: what the model is for.
        trust: run model code that comes with a base.

    Raises:
        AdapterError: it has none of these, or fits none of them.
    """
    if len(bases) == 1:
        return bases[0]
    named = _named_base(member) if bases or wanted else None
    if not bases:
        if wanted and not named:
            raise AdapterError(f"{member.name}: its configuration names no base model: give it with --base")
        return named
    same = [base for base in bases if named and (named == base or _same_folder(named, base))]
    if not same and named:
        last = named.rstrip("/").rpartition("/")[2]
        same = [base for base in bases if base.rstrip("/").rpartition("/")[2] == last]
    if len(same) == 1:
        return same[0]
    fitting = [base for base in bases if _fits(member, base, task, trust)]
    if len(fitting) != 1:
        raise AdapterError(
            f"{member.name}: its base, {named or 'which its configuration does not name'}, is none of "
            f"{', '.join(bases)}, and it fits {'several' if fitting else 'none'} of them: convert it with the right "
            "--base alone"
        )
    return fitting[0]


def _named_base(member: Member) -> str | None:
    if isinstance(member.given, Adapter):
        found = member.given.config.get("base_model_name_or_path")
    else:
        path = local_folder(str(member.given)) / CONFIG_FILE
        found = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return found if isinstance(found, str) and found else None


def _same_folder(one: str, other: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)
    return False


def _fits(member: Member, base: str, task: str | None, trust: bool) -> bool:
    """Whether a base has all layers of an adapter, of the right shapes."""
    try:
        adapter = member.given if isinstance(member.given, Adapter) else Adapter.open(member.given)
        source = Source.open(adapter, BaseModel.open(base, task, trust), torch.device("cpu"))
        return all(
            site is not None and tuple(delta.shape) == (site.out_features, site.in_features)
            for _, site, delta in source.deltas()
        )
    except SurgeryError:
        return False
