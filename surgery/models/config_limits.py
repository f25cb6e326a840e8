"""What a folder that comes from elsewhere is not allowed: files that are none, sizes beyond reason, code of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import CheckpointError

__all__ = ["check_model_config", "limited_modules"]

# More than any model has. A library that is told more makes so many of them before it looks at the weights.
MOST_LAYERS = 10_000
MOST_LABELS = 1_000_000
# Modules of a model: some without weights of their own, and few for each tensor of its files.
SPARE_MODULES, MODULES_A_TENSOR = 5_000, 20
COUNTS_OF_LAYERS = ("layer", "block", "depth")
KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")


def check_model_config(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Check a model's configuration before any library acts on it.

    Args:
        path: of `config.json`, for the message.
        config: what it holds.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: it asks for more layers or labels than any model has, for weights under another name, or for
            code from the Hub without leave.
    """
    for key, value in _entries(config):
        number = _together(value) if isinstance(value, list) and "depth" in key else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if _counts_layers(key) else None
            if most is not None and not abs(number) <= most:
                raise CheckpointError(f"{path}: {key} is {value!r:.80}, more than any model has")
        if key in {"id2label", "label2id"} and hasattr(value, "__len__") and len(value) > MOST_LABELS:
            raise CheckpointError(f"{path}: {key} has {len(value)} entries, more than any model has")
        if key.strip("_") in KERNELS and not trust_remote_code and "/" in str(value):
            raise CheckpointError(
                f"{path}: {key} names code on the Hub ({value!r:.80}); --trust-remote-code runs it, if you trust it"
            )
    if config.get("transformers_weights") not in (None, "model.safetensors", "model.safetensors.index.json"):
        raise CheckpointError(
            f"{path}: names other weights (transformers_weights); call the file model.safetensors and leave that out"
        )


def _counts_layers(key: str) -> bool:
    return any(word in key for word in COUNTS_OF_LAYERS) and not any(word in key for word in ("size", "norm", "_id"))


def _together(depths: list[Any]) -> int | float:
    """Of the layers of several stages: a number that is too many by itself, otherwise how many they are together.

    Libraries count them out one by one before they make a module.
    """
    counts = [abs(each) for each in depths if isinstance(each, (int, float))]
    beyond = [count for count in counts if not count <= MOST_LAYERS]
    return beyond[0] if beyond else sum(counts)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry of a configuration and of those inside it, with its key; in lists, the key of the list."""
    left = [(str(key), value) for key, value in config.items()]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, Mapping):
            left += [(str(inner), each) for inner, each in value.items()]
        elif isinstance(value, list):
            left += [(key, each) for each in value if isinstance(each, (Mapping, list))]


@contextlib.contextmanager
def limited_modules(tensors: int) -> Iterator[None]:
    """While the block builds a model, refuse one of far more modules than there are tensors to fill them.

    Raises:
        CheckpointError: it is.
    """
    most, made = SPARE_MODULES + MODULES_A_TENSOR * tensors, 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CheckpointError(f"the model of config.json has more than {most} modules, its files {tensors} tensors")

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
