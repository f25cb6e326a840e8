"""The files that a push publishes: what belongs to an adapter, without the paths and secrets of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.adapters.companions import companion_files
from surgery.adapters.names import CARD_FILE, CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from surgery.publishing.checks import Checked
from surgery.publishing.private import machine_folders, refuse_private, without_paths
from surgery.storage.folder_checks import check_link
from surgery.storage.json_files import read_json
from surgery.storage.safetensors_write import read_header

__all__ = ["PICTURES", "PlannedFile", "own_picture", "package", "refuse_private_files"]

PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".webp")
PICTURE_NAME = "layers.png"
OTHER_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
TEXTS = (".json", ".md", ".txt", ".svg", ".jinja", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class PlannedFile:
    """One file of a push.

    Attributes:
        path: its name in the repository.
        source: the file on the disk, or what is pushed in its place.
        size: its bytes.
    """

    path: str
    source: Path | bytes
    size: int

    @classmethod
    def of(cls, path: str, source: Path | bytes) -> PlannedFile:
        """A file with its size."""
        return cls(path, source, len(source) if isinstance(source, bytes) else source.stat().st_size)

    def text(self) -> str:
        """Its content as text."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return content.decode("utf-8", errors="replace")


def package(checked: Checked, card: str, picture: Path | None) -> tuple[list[PlannedFile], list[str]]:
    """The files to publish, by name, and the names of those in the folder that are not.

    Args:
        checked: the adapter.
        card: the text of `README.md`.
        picture: one that was drawn for the card.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    folder = checked.folder
    files = {
        CONFIG_FILE: _json_file(folder / CONFIG_FILE, checked.config, _published_config(checked)),
        WEIGHTS_FILE: PlannedFile.of(WEIGHTS_FILE, folder / WEIGHTS_FILE),
        CARD_FILE: PlannedFile.of(CARD_FILE, card.encode()),
    }
    if checked.provenance:
        provenance = checked.provenance
        files[PROVENANCE_FILE] = _json_file(folder / PROVENANCE_FILE, provenance, without_paths(provenance))
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in files and _is_published(path):
            files[path.name] = PlannedFile.of(path.name, path)
    files.update({name: PlannedFile.of(name, path) for name, path in companion_files(folder).items()})
    for name in files:
        if name != WEIGHTS_FILE:  # which is read as tensors, and nothing else
            check_link(folder / name, folder)
    if "tokenizer_config.json" in files:
        found = read_json(folder / "tokenizer_config.json")
        # Only its own entries: what is below them are tokens, which may look like anything.
        clean = {key: without_paths(value) if isinstance(value, str) else value for key, value in found.items()}
        files["tokenizer_config.json"] = _json_file(folder / "tokenizer_config.json", found, clean)
    if picture is not None:
        files[picture.name] = PlannedFile.of(picture.name, picture)
    sent = {name.partition("/")[0] for name in files}
    left_out = [path.name for path in sorted(folder.iterdir()) if path.name not in sent]
    return [files[name] for name in sorted(files)], left_out


def own_picture(folder: Path) -> str | None:
    """The picture in a folder that its card shows: the first by name."""
    return next((path.name for path in sorted(folder.iterdir()) if path.is_file() and _is_picture(path)), None)


def refuse_private_files(files: list[PlannedFile], folder: Path) -> None:
    """Refuse files that hold a token or a path of this machine.

    Raises:
        HubError: one does.
    """
    folders = machine_folders(folder)
    for file in files:
        if file.path.endswith(TEXTS):
            refuse_private(file.path, file.text(), folders, folder / file.path)
    metadata = read_header(folder / WEIGHTS_FILE).metadata
    refuse_private(f"{WEIGHTS_FILE} (its metadata)", json.dumps(metadata, indent=0), folders)


def _published_config(checked: Checked) -> dict[str, Any]:
    """`adapter_config.json` with the base model's Hub id, and without paths."""
    config: dict[str, Any] = without_paths(checked.config)
    config["base_model_name_or_path"] = checked.base
    if checked.revision is not None or "revision" in config:
        config["revision"] = checked.revision
    return config


def _json_file(path: Path, found: Mapping[str, Any], published: Mapping[str, Any]) -> PlannedFile:
    """The file itself where nothing in it changes."""
    if found == published:
        return PlannedFile.of(path.name, path)
    return PlannedFile.of(path.name, (json.dumps(published, indent=2, sort_keys=True) + "\n").encode())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _is_published(path: Path) -> bool:
    return path.name in OTHER_FILES or _is_picture(path)
