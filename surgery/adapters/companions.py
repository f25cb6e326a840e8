"""The files beside an adapter that belong to it: tokenizer, chat templates, processors and generation settings.

Trainers save them with the adapter, because it was trained with them: a base that gives other token ids, or another
template, makes another model of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from surgery.errors import CheckpointError
from surgery.storage.folder_checks import check_link
from surgery.storage.json_files import read_json

__all__ = ["companion_files", "copy_companions", "is_companion", "replaced_by"]

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that hold the vocabulary of a tokenizer by themselves.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "vocab.txt",
    "vocab.model",
    "vocab.bpe",
    "vocab-*.json",
    "*.tiktoken",
    "bpe.codes",
)
TOKENIZER = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    "added_tokens.json",
    "special_tokens_map.json",
    "merges.txt",
    "normalizer.json",
    "dict.txt",
    "prompts.txt",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
OTHERS = (
    "preprocessor_config.json",
    "processor_config.json",
    "*_preprocessor_config.json",
    "*_processor_config.json",
    "feature_extractor_config.json",
    "generation_config.json",
)


def is_companion(name: str) -> bool:
    """Return whether a file of this name, relative to its folder, belongs to an adapter beside it."""
    return _is_one_of(name, (*TOKENIZER, *TEMPLATES, *OTHERS))


def companion_files(folder: Path) -> dict[str, Path]:
    """Return the files in an adapter's folder that belong to it, by their names relative to the folder.

    Raises:
        CheckpointError: one is a link that leads out of the folder.
    """
    found = {}
    for path in [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]:
        name = path.relative_to(folder).as_posix()
        if is_companion(name) and path.is_file():
            check_link(path, folder)
            found[name] = path
    return dict(sorted(found.items()))


def replaced_by(companions: Mapping[str, Path], names: Iterable[str]) -> list[str]:
    """Return those of a base's files in whose place an adapter's companions are.

    A whole tokenizer replaces all files of the base's: what is left of two would be a third one.

    Args:
        companions: the adapter's, from `companion_files`.
        names: of the base's files, relative to its folder.
    """
    whole = TOKENIZER_CONFIG in companions and any(_is_one_of(name, VOCABULARIES) for name in companions)
    template = any(name in companions for name in TEMPLATES[:2]) or (whole and _has_template(companions))
    return [
        name
        for name in names
        if name in companions or (whole and _is_one_of(name, TOKENIZER)) or (template and _is_one_of(name, TEMPLATES))
    ]


def copy_companions(companions: Mapping[str, Path], folder: Path) -> None:
    """Copy an adapter's companions into a folder, replacing files of their names."""
    for name, source in companions.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def _has_template(companions: Mapping[str, Path]) -> bool:
    """Return whether the configuration of a tokenizer holds a chat template."""
    try:
        return bool(read_json(companions[TOKENIZER_CONFIG]).get("chat_template"))
    except CheckpointError:
        return False


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
