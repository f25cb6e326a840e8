"""A base model with its values, loaded by transformers from the files of its folder and nothing else."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import transformers

from surgery.errors import CheckpointError, listing
from surgery.models.base_model import BaseModel

__all__ = ["lacking_note", "load_from_files", "own_files"]

ADAPTER_CONFIG = "adapter_config.json"


def load_from_files(base: BaseModel, **options: Any) -> Any:
    """Load a base model under its class and configuration.

    Args:
        base: the opened base.
        options: for `from_pretrained` of its class.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with own_files(base.folder) as folder:
            model = type(base.model).from_pretrained(folder, config=base.config, use_safetensors=True, **options)
    # Of its configurations transformers makes errors of every kind.
    except (ImportError, OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{base.name}: cannot be loaded ({str(error).strip().split(chr(10))[0]})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.name_or_path = model.config._name_or_path = str(base.folder)
    return model


@contextlib.contextmanager
def own_files(folder: Path) -> Iterator[Path]:
    """The folder of a base model, without an adapter that lies in it: transformers would attach that by itself."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="surgery-") as plain:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                try:
                    (Path(plain) / path.name).symlink_to(path.resolve())
                except OSError:  # a system that lets nobody make links
                    if path.is_file():
                        shutil.copyfile(path, Path(plain) / path.name)
        yield Path(plain)


def lacking_note(base: BaseModel, brought: Collection[str] = ()) -> list[str]:
    """A note on parameters that neither the base's files have nor an adapter brings: they are drawn at random.

    Args:
        base: the base model.
        brought: parameters that an adapter brings whole, by the model's names.
    """
    ignored = [re.compile(str(each)) for each in getattr(base.model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name, _ in base.model.named_parameters()
        if name not in base.sources and name not in brought and not any(each.search(name) for each in ignored)
    ]
    if not missing:
        return []
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
    return [f"the base's files have no weights for {listing(modules, 3)}: transformers draws them at random"]
