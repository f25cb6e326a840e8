"""What a folder that comes from elsewhere is not allowed: files that are none, sizes beyond reason, code of its own."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import AdapterError, CheckpointError

__all__ = ["check_adapter_config", "check_files", "check_link", "check_model_config", "limited_modules"]

# More than any model has. A library that is told more makes so many of them before it looks at the weights.
MOST_LAYERS = 10_000
MOST_LABELS = 1_000_000
# Modules of a model: some without weights of their own, and few for each tensor of its files.
SPARE_MODULES, MODULES_A_TENSOR = 5_000, 20
COUNTS_OF_LAYERS = ("layer", "block", "depth")
KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")


def check_files(folder: Path) -> None:
    """Check that a folder may be looked into, and that what is in it are files and folders.

    A pipe would make whoever reads it wait, and a device may have no end.

    Raises:
        CheckpointError: it may not, or something else is in it.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nowhere: whoever needs the file says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a pipe, a socket or a device, not a file; take it out of the folder")


def check_link(path: Path, folder: Path) -> None:
    """Check that a file whose content is passed on is in its folder: a link may lead to somebody's secrets.

    The links of the Hub's cache, from a snapshot to the repository's own `blobs`, are no such links.

    Raises:
        CheckpointError: it is a link that leads out of the folder.
    """
    if not path.is_symlink():
        return
    home, target = (Path(os.path.realpath(each)) for each in (folder, path))  # which stands a link to itself
    cache = next((parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"), home)
    if home not in target.parents and cache not in target.parents:
        raise CheckpointError(f"{path}: is a link that leads out of its folder; put the file itself there")


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


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def _is_name(value: Any) -> bool:
    return value is None or _is_text(value)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_is_text(each) for each in value))


def _is_pattern(value: Any) -> bool:
    return _is_name(value) or _are_names(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) < 1 << 53)  # NaN is not


def _is_rank(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 24)


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _is_width(value: Any) -> bool:
    return _is_rank(value) or _is_text(value)


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_text(key) for key in value))


def _are_numbers(value: Any) -> bool:
    return _is_table(value) and all(_is_number(each) and each is not None for each in (value or {}).values())


def _are_heights(value: Any) -> bool:
    return _is_table(value) and all(
        isinstance(each, list) and all(_is_rank(height) and height for height in each)
        for each in (value or {}).values()
    )


def _are_layers(value: Any) -> bool:
    return _is_rank(value) or (isinstance(value, list) and all(_is_rank(each) and each is not None for each in value))


# What PEFT's and our own configurations hold under the keys that are read, and what a message calls it.
ADAPTER_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_text, "a name"),
    "task_type": (_is_name, "a name"),
    "base_model_name_or_path": (_is_name, "a name"),
    "revision": (_is_name, "a name"),
    "target_modules": (_is_pattern, "a pattern or a list of names"),
    "exclude_modules": (_is_pattern, "a pattern or a list of names"),
    "layers_pattern": (_is_pattern, "a pattern or a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "layers_to_transform": (_are_layers, "a list of numbers"),
    "r": (_is_rank, "a whole number from 0 on"),
    "groups": (_is_rank, "a whole number from 0 on"),
    "variant": (_is_name, "a name"),
    "split": (_are_heights, "an object of lists of heights"),
    "bits": (_is_width, "a number of bits or auto"),
    "sparse_rate": (_is_number, "a number"),
    "store_bases": (_is_switch, "true or false"),
    "save_projection": (_is_switch, "true or false"),
    "use_rslora": (_is_switch, "true or false"),
    "use_dora": (_is_switch, "true or false"),
    "seed": (_is_seed, "a whole number"),
    "projection_prng_key": (_is_seed, "a whole number"),
    "alpha": (_is_number, "a number"),
    "lora_alpha": (_is_number, "a number"),
    "randlora_alpha": (_is_number, "a number"),
    "rank_pattern": (_are_numbers, "an object of numbers"),
    "alpha_pattern": (_are_numbers, "an object of numbers"),
    "packed": (_is_table, "an object of shapes"),
    "base_fingerprint": (_is_table, "an object of digests"),
}


def check_adapter_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check that `adapter_config.json` holds values of the kinds that PEFT writes, under the keys that are read.

    Raises:
        AdapterError: it does not.
    """
    if "peft_type" not in config:
        raise AdapterError(f"{path}: has no peft_type")
    for key, (fits, kind) in ADAPTER_KEYS.items():
        if key in config and not fits(config[key]):
            raise AdapterError(f"{path}: {key} is {config[key]!r:.80}, expected {kind}")
