"""Writing a folder so that it appears whole or not at all.

The files are written to a hidden folder beside the target, flushed to the disk, checked, and only then renamed. An
output that is replaced stays in place until the moment its successor takes its name. Work that is long keeps its
finished parts in the hidden folder: after a kill the next run of the same key goes on with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import OutputError
from surgery.storage.atomic_file import flush, named_errors
from surgery.storage.locks import Held, hold
from surgery.storage.output_paths import check_output
from surgery.storage.resume import Parts

__all__ = ["PartialFolder", "atomic_folder", "check_output", "resumable_folder"]

PARTIAL = ".partial"
# Inside it: the finished parts, and what says whose they are.
PARTS, KEY = ".parts", "key"


class PartialFolder:
    """The hidden folder beside a target in which it is made, and the finished parts in it.

    Args:
        target: the folder to appear.
        key: what recognises the run; parts of another one are not used. None keeps no parts.
        resume: go on with what a run of this key has left.

    Attributes:
        given: the target as it was given.
        target: the target, from the root on.
        path: the hidden folder.
        parts: the finished parts.

    Raises:
        BlockingIOError: another process is writing the target.
    """

    def __init__(self, target: Path, key: str | None = None, resume: bool = True) -> None:
        self.given, self.target = target, target.absolute()
        self.path = self.target.parent / f".{self.target.name}{PARTIAL}"
        self.parts = Parts(None if key is None else self._for_parts, self.path / PARTS, key or "")
        self._key = key
        self._new_parents = [folder for folder in self.target.parents if not folder.exists()]
        self._held: Held | None = None
        if key is not None and self.path.is_dir():
            self._held = hold(self.path)
            try:
                found = resume and _text(self.path / PARTS / KEY) == key
                if found:
                    self.parts.look()
            except BaseException:
                self.release()
                raise
            if not found:
                self.release()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Give the hidden folder to write into; what the system refuses is a named error.

        Raises:
            OutputError: it does.
        """
        with named_errors(self.given):
            yield self._made()

    def parts_folder(self) -> Path:
        """Where the parts lie, for other processes to write theirs into."""
        with self._for_parts() as folder:
            return folder

    @contextlib.contextmanager
    def _for_parts(self) -> Iterator[Path]:
        """The folder of the parts; made when it is first asked for."""
        with self.writing() as whole:
            folder = whole / PARTS
            if not folder.is_dir():
                folder.mkdir()
                (folder / KEY).write_text(str(self._key), encoding="ascii")
            yield folder

    def _made(self) -> Path:
        """The hidden folder; made, in place of what another run left, when it is first asked for."""
        if self._held is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _remove(self.path)  # left by a run that was killed
            self.path.mkdir()
            self._held = hold(self.path)
        return self.path

    def put_in_place(self) -> None:
        """Give the folder its name."""
        with self.writing() as folder:
            if (folder / PARTS).is_dir():
                shutil.rmtree(folder / PARTS)
            _flush(folder)
            assert self._held is not None
            _put_in_place(folder, self.target, self._held)

    def keep(self) -> bool:
        """Leave finished parts to the next run, if there are any; returns whether there are."""
        if not self.parts.on_disk:
            return False
        with contextlib.suppress(OutputError):
            self.parts.flush()
        return True

    def discard(self) -> None:
        """Remove the folder and whatever was made for it, unless it is another process's."""
        with contextlib.suppress(OSError):
            if self._held is None:
                self._held = hold(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._new_parents:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty

    def release(self) -> None:
        """Let others write the target."""
        if self._held is not None:
            self._held.release()
            self._held = None


@contextlib.contextmanager
def atomic_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Give a folder to write into that becomes `target` when the block ends without an error.

    Args:
        target: the folder to appear.
        force: replace a folder that is there.

    Raises:
        OutputError: the target may not be written, or writing fails (disk full, permission).
    """
    with resumable_folder(target, force) as output, output.writing() as folder:
        yield folder


@contextlib.contextmanager
def resumable_folder(
    target: Path, force: bool = False, key: str | None = None, resume: bool = True
) -> Iterator[PartialFolder]:
    """As `atomic_folder`, for work that is long: its finished parts outlive a kill or an interruption.

    They do not outlive an error. An interruption (Ctrl-C, SIGTERM) that leaves parts gets a note that says so.

    Args:
        target: the folder to appear.
        force: replace a folder that is there.
        key: what recognises the run (see `run_key`); None keeps nothing.
        resume: use the parts that a run of this key has left.

    Raises:
        OutputError: as for `atomic_folder`; or the target has been filled since the beginning, and `force` is not set.
    """
    check_output(target, force)
    try:
        output = PartialFolder(target, key, resume)
    except OSError as error:
        taken = isinstance(error, BlockingIOError)
        reason = "another run is writing it" if taken else f"cannot be written ({error.strerror or error})"
        raise OutputError(f"{target}: {reason}") from None
    try:
        yield output
        check_output(target, force)  # what has come there since the run began is not ours to replace
        output.put_in_place()
    except Exception:
        output.discard()
        raise
    except BaseException as interruption:
        if output.keep():
            interruption.add_note(f"finished parts are kept beside {target}, the same command goes on with them.")
        else:
            output.discard()
        raise
    finally:
        output.release()


def _text(path: Path) -> str | None:
    """What is in a small file; None where there is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii")
    return None


def _remove(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder that no process is writing; until it is gone, none may begin to.

    Raises:
        BlockingIOError: one is.
    """
    lock = hold(folder)
    try:
        shutil.rmtree(folder, ignore_errors)
    finally:
        lock.release()


def _flush(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        flush(path)


def _put_in_place(partial: Path, target: Path, held: Held) -> None:
    if target.exists() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        _exchange(partial, target)
        # The new one is in place: what is left of the old one is no failure, and the next run clears it.
        with contextlib.suppress(OSError):
            partial.chmod(0o700)
            if held.by_name:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _remove(partial, ignore_errors=True)
    else:
        os.rename(partial, target)
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened and flushed
        flush(target.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders: in one step where the system can, else so that the old one is never lost."""
    if sys.platform == "linux":
        at_current_folder, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and not libc.renameat2(
            at_current_folder, os.fsencode(first), at_current_folder, os.fsencode(second), exchange
        ):
            return
    aside = first.with_name(f"{first.name}.old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)
