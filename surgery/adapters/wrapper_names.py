"""Levels that training wrappers leave in the names of an adapter's tensors, and names without them.

`torch.compile`, FSDP, activation checkpointing and data parallelism each put a module around a module; a model that is
wrapped by PEFT twice has its prefix twice; and a state dict that was saved as it is has the adapter's own name in every
tensor's name. PEFT ignores tensors with such names without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from surgery.adapters.types.registry import type_of
from surgery.errors import AdapterError, listing

__all__ = ["plain_config", "plain_name", "plain_names", "type_prefix"]

# Names of modules that wrappers put in between.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "module")
PEFT_PREFIX = "base_model.model."
# What follows the name of an adapter's part where the adapter's own name is not in between.
ENDS = ("weight", "bias")
# Keys of adapter_config.json that hold names of modules, in a list or as the keys of an object.
NAMED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "packed",
    "kinds",
    "gains",
)
T = TypeVar("T")


def plain_name(name: str) -> str:
    """A name without the levels of wrappers, and with PEFT's prefix once at most."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PEFT_PREFIX * 2):
        name = name.removeprefix(PEFT_PREFIX)
    return name


def type_prefix(peft_type: str) -> str:
    """Return how PEFT begins the names of a type's own parameters; the empty text for an unknown type."""
    kind = type_of({"peft_type": peft_type})
    return "" if kind is None else kind.prefix


def plain_names(tensors: Mapping[str, T], peft_type: str, who: str) -> tuple[dict[str, T], list[str]]:
    """Tensors under their plain names, and a note on what was taken out of the names.

    Args:
        tensors: by their names in the file.
        peft_type: the adapter's PEFT type.
        who: what an error calls the adapter.

    Raises:
        AdapterError: two tensors have the same plain name, or the file holds several adapters.
    """
    short = {name: plain_name(name) for name in tensors}
    own = _adapter_name(short.values(), type_prefix(peft_type), who)
    if own is not None:
        prefix = type_prefix(peft_type)
        short = {name: _without_adapter(plain, prefix, own) for name, plain in short.items()}
    renamed = {name: plain for name, plain in short.items() if plain != name}
    if not renamed:
        return dict(tensors), []
    found: dict[str, str] = {}
    for name, plain in short.items():
        if plain in found:
            raise AdapterError(f"{who}: {name} and {found[plain]} are one name ({plain}) without the names of wrappers")
        found[plain] = name
    example, plain = next(iter(renamed.items()))
    note = f"{len(renamed)} tensors have names of wrappers or of the adapter in theirs ({example}): read as {plain}"
    return {short[name]: tensor for name, tensor in tensors.items()}, [note]


def plain_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """A configuration whose names of modules are plain.

    Args:
        config: `adapter_config.json`.
        modules: the plain names of the changed layers: the targets, where a regular expression named them.
    """
    plain = dict(config)
    for key in NAMED:
        value = config.get(key)
        if isinstance(value, list):
            plain[key] = [plain_name(each) if isinstance(each, str) else each for each in value]
        elif isinstance(value, dict):
            plain[key] = {plain_name(name): each for name, each in value.items()}
    targets = config.get("target_modules")
    if isinstance(targets, str) and any(wrapper in targets for wrapper in WRAPPERS):
        plain["target_modules"] = sorted(modules)
    return plain


def _adapter_name(names: Iterable[str], prefix: str, who: str) -> str | None:
    """The adapter's own name inside the names of its tensors; None where it is not there."""
    found = set()
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if prefix and part.startswith(prefix)), None)
        if place is None or not name.startswith(PEFT_PREFIX):
            continue
        following = parts[place + 1 :]
        if following and following[0] not in ENDS and not following[0].isdigit():
            found.add(following[0])
        elif not following or following[0] in ENDS:
            return None  # as PEFT saves an adapter
    if len(found) > 1:
        raise AdapterError(
            f"{who}: its file holds several adapters ({listing(sorted(found), 4)}); save each by itself, with "
            "PeftModel.save_pretrained"
        )
    return found.pop() if found else None


def _without_adapter(name: str, prefix: str, own: str) -> str:
    parts = name.split(".")
    kept = [
        part
        for i, part in enumerate(parts)
        if not (part == own and i and (parts[i - 1].startswith(prefix) or parts[i - 1] == "modules_to_save"))
    ]
    return ".".join(part for part in kept if part != "modules_to_save")
