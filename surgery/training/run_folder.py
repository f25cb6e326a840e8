"""The hidden folder of a training that is not finished: its options and its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, OptionError
from surgery.storage.atomic_folder import check_output
from surgery.storage.json_files import read_json
from surgery.storage.locks import Held, hold
from surgery.storage.output_paths import unfinished_folder
from surgery.training.trainer import last_checkpoint

__all__ = ["Unfinished"]

OPTIONS_FILE = "run.json"


class Unfinished:
    """A training's folder beside its output.

    Args:
        out: the output; its name with a dot before and `.unfinished` after it names the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = unfinished_folder(out)
        self._lock: Held | None = None

    @property
    def exists(self) -> bool:
        """Whether a training has begun and not ended."""
        return (self.folder / OPTIONS_FILE).is_file()

    def check(self, resume: bool, force: bool) -> None:
        """Check that the output may be written, before any work is done.

        Raises:
            OutputError: it may not.
        """
        if resume and self.exists:
            return  # what is in the output is this training's own
        check_output(self.out, force)

    @property
    def step(self) -> int:
        """The step of the last checkpoint; 0 where there is none."""
        found = last_checkpoint(self.folder)
        return int(found.name.rpartition("-")[2]) if found is not None else 0

    def begin(self, options: Mapping[str, Any], resume: bool, overwrite: bool) -> dict[str, Any]:
        """Make the folder, or take it over.

        Args:
            options: all that decides what comes out.
            resume: go on with what is there.
            overwrite: discard what a training with other options has left.

        Returns:
            What was noted of the training that goes on; empty where one starts.

        Raises:
            MethodError: the training that is to go on had other options.
            BlockingIOError: another process is at it.
            OSError: the folder cannot be written.
        """
        noted: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.folder)
        if self.exists and resume:
            noted = read_json(self.folder / OPTIONS_FILE)
            if not isinstance(noted.get("options"), dict):
                raise CheckpointError(f"{self.folder / OPTIONS_FILE}: has no options; start again with --force")
            changed = [name for name, value in options.items() if noted["options"].get(name) != value]
            if changed:
                if not overwrite:
                    raise OptionError(self._other_options(noted["options"], options, changed))
                noted = {}
        if not noted:
            for left in self.folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self.note({"options": dict(options)})
        return noted

    def _other_options(self, before: Mapping[str, Any], now: Mapping[str, Any], changed: list[str]) -> str:
        was = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in changed)
        return (
            f"{self.out}: a training of it with other options was not finished, {self.step} steps are kept ({was}); "
            "repeat its options to go on with it, or start again with --force"
        )

    def note(self, values: Mapping[str, Any]) -> None:
        """Write down what a resumed training needs to know, whole or not at all."""
        path = self.folder / OPTIONS_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(path)

    def remove(self) -> None:
        """Remove the folder: the training is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def abandon(self) -> None:
        """After an error: remove what cannot be gone on with, a folder of this process without a checkpoint."""
        if self._lock is not None and not self.step:
            self.remove()

    def release(self) -> None:
        """Let others go on with it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
