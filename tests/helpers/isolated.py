"""One command of the tool in a child process of this one: within limits, without root's rights, seen from outside.

The libraries are imported once, in the parent; a child begins where the parent is, in a few milliseconds. The parent
must have no threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import io
import logging
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Limits", "Outcome", "Place", "confine", "import_everything", "outcome", "run", "run_and_learn", "run_here",
    "snapshot", "start",
]  # fmt: skip

CAPABILITY_VERSION_3 = 0x20080522
# Rights of root to read and to write whatever the modes of files say: DAC_OVERRIDE, DAC_READ_SEARCH.
OVERRIDES = 0b110
MODULES = ("init", "convert", "compare", "export", "inspect", "merge", "methods", "push", "train")


@dataclass(frozen=True)
class Limits:
    """What a command may take.

    Attributes:
        seconds: until it is killed.
        memory: bytes that its address space may grow by.
        file_size: of one file that it writes.
    """

    seconds: float = 20.0
    memory: int = 1 << 30
    file_size: int = 64 << 20


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal; None where it ran out of time.
        stdout: what it printed.
        stderr: the same, of errors.
    """

    code: int | None
    stdout: str
    stderr: str


@dataclass
class Place:
    """The folders in which commands run: `input/`, `work/` (the working directory, outputs go there), and the
    surroundings, which must stay as they are."""

    root: Path
    input: Path = field(init=False)
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.input, self.work = self.root / "input", self.root / "work"

    def clear(self) -> None:
        """Make it anew."""
        shutil.rmtree(self.root, onerror=_removed_all_the_same)
        for name in ("input", "work", "tmp", "home", "elsewhere"):
            (self.root / name).mkdir(parents=True, exist_ok=True)


def _removed_all_the_same(function: Any, path: str, error: Any) -> None:
    if isinstance(error[1], FileNotFoundError):
        return
    Path(path).parent.chmod(0o700)
    with contextlib.suppress(OSError):
        Path(path).chmod(0o700)
    function(path)


def import_everything(cache: Path) -> None:
    """Import what the commands import when they run, and see to it that nothing uses a second thread.

    Args:
        cache: a folder for what libraries keep of data files.
    """
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
        HF_DATASETS_CACHE=str(cache),
    )
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(f"surgery.cli.{name}")
    for name in (
        "initialization.init", "comparison.compare", "comparison.picture", "inspection.inspect", "inspection.picture",
        "merging.merge", "exporting.export", "training.train", "training.recovery", "publishing.push",
        "publishing.picture", "converters.convert", "converters.to_giva", "converters.to_vera", "converters.to_lora",
        "converters.to_frod", "converters.to_smoa",
    ):  # fmt: skip
        importlib.import_module(f"surgery.{name}")


def snapshot(folder: Path, content: bool = False) -> dict[str, tuple[Any, ...]]:
    """Every path below a folder, with what tells whether it was touched: kind and mode, size, time, target of a link.

    Args:
        folder: where to look; links are not followed.
        content: compare the bytes instead of the times: for what may be replaced by the same.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            status = path.lstat()
            link = str(path.readlink()) if path.is_symlink() else None
            facts: tuple[Any, ...] = (status.st_mode, link)
            if name not in folders:
                data = path.read_bytes() if content and stat.S_ISREG(status.st_mode) else None
                facts += (status.st_size, data if content else status.st_mtime_ns)
            found[str(path.relative_to(folder))] = facts
    return found


def run(place: Place, arguments: Sequence[Any], limits: Limits, finish: Callable[[], None] | None = None) -> Outcome:
    """Run `surgery` with these arguments in `place.work`, in a child process.

    Args:
        place: where.
        arguments: of the command line.
        limits: what it may take.
        finish: called in the child after the command.
    """
    pid = start(place, arguments, limits, finish=finish)
    watched = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([watched], [], [], limits.seconds)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(watched)
    return outcome(place, os.waitstatus_to_exitcode(status) if ended else None)


def run_and_learn(place: Place, arguments: Sequence[Any], limits: Limits) -> Outcome:
    """As `run`; what the command imports is imported here too, so that the next child has it."""
    listed = place.root / "modules"

    def finish() -> None:
        listed.write_text("\n".join(name for name in sys.modules if name.isidentifier() or "." in name))

    found = run(place, arguments, limits, finish)
    for name in listed.read_text().splitlines() if listed.exists() else ():
        if name not in sys.modules and not name.startswith("transformers_modules"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    listed.unlink(missing_ok=True)
    return found


def outcome(place: Place, code: int | None, log: str = "") -> Outcome:
    """The ending of the command that ran last in a place, with this log."""
    paths = [place.root / f"{name}{log}" for name in ("stdout", "stderr")]
    # A process that was ended before it began has left none.
    texts = [path.read_bytes().decode("utf-8", errors="replace") if path.exists() else "" for path in paths]
    for path in paths:
        path.unlink(missing_ok=True)
    return Outcome(code, *texts)


def start(
    place: Place,
    arguments: Sequence[Any],
    limits: Limits,
    prepare: Callable[[], None] | None = None,
    finish: Callable[[], None] | None = None,
    log: str = "",
) -> int:
    """Begin a command in a child process; its id.

    Args:
        place: where.
        arguments: of the command line.
        limits: what it may take; of the time, the caller sees to it.
        prepare: called in the child before the command.
        finish: called in the child after it.
        log: tells what it prints from what others print, which run at the same time.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stderr = _settled(place, log)
        faulthandler.dump_traceback_later(max(limits.seconds - 1, 0.5), file=stderr)
        confine(limits)
        if prepare is not None:
            prepare()
        code = _main([str(each) for each in arguments])
        if finish is not None:
            finish()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def confine(limits: Limits) -> None:
    """Bound what this process may take, and let the modes of files hold for it."""
    _limit(resource.RLIMIT_AS, _address_space() + limits.memory)
    _limit(resource.RLIMIT_FSIZE, limits.file_size)
    _limit(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself
    _drop_overrides()


def run_here(place: Place, arguments: Sequence[Any], limits: Limits) -> Outcome:
    """As `run`, in this process, which is a child and confined; its caller sees to the time."""
    faulthandler.dump_traceback_later(max(limits.seconds - 1, 0.5), file=_settled(place, ""))
    try:
        code = _main([str(each) for each in arguments])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        faulthandler.cancel_dump_traceback_later()
    logging.getLogger().handlers.clear()  # what -v has set
    logging.getLogger().setLevel(logging.WARNING)
    return outcome(place, code)


def _settled(place: Place, log: str) -> Any:
    """Make a place this process's own: working directory, temporary files, home, and what is printed; stderr."""
    os.chdir(place.work)
    os.environ.update(TMPDIR=str(place.root / "tmp"), HOME=str(place.root / "home"), COLUMNS="100")
    tempfile.tempdir = None
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(place.root / f"{name}{log}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    return sys.stderr


def _limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _drop_overrides() -> None:
    """Let the modes of files hold for root too, as they do for everybody else."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~OVERRIDES
    sets[1] &= ~OVERRIDES
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _main(arguments: list[str]) -> int:
    """The console script, and what the interpreter does with how it ends."""
    from surgery.cli.main import main

    sys.argv = ["surgery", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
