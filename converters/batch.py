"""Many adapters in one call: each is tried, finished ones are skipped the next time, in one process or in many."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from surgery.adapters.adapter import Adapter, identity_of
from surgery.adapters.names import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from surgery.converters.batch_members import Member, base_of
from surgery.converters.conversion import ConvertOptions, convert_one
from surgery.converters.report import BatchEntry, BatchReport, ConvertReport
from surgery.converters.shared_base import Base, CalibrationData
from surgery.errors import SurgeryError, first_line
from surgery.storage.atomic_folder import check_output
from surgery.storage.hub_cache import local_folder
from surgery.storage.json_files import read_json
from surgery.storage.output_paths import refuse_inputs
from surgery.storage.resume import file_identities
from surgery.system.devices import resolve_device
from surgery.system.memory import release_freed
from surgery.system.progress import Progress

__all__ = ["BatchOptions", "convert_batch"]

# Of larger batches the reports are kept without their layers, so that memory stays flat.
SITES_KEPT = 100
KEY = "run_key"
CHUNK = 1 << 24

OnEntry = Callable[[BatchEntry, int, int], None]
Entries = Generator[tuple[int, BatchEntry], None, None]


@dataclass(frozen=True)
class BatchOptions:
    """The options of a batch, as any process can receive them.

    Attributes:
        convert: how each adapter is converted.
        data: where calibration data comes from.
        bases: base models, by the names that the caller gave.
        task: what the model is for.
        device: where to compute.
        trust: run model code that comes with a base.
        sites: keep the layers in the reports.
    """

    convert: ConvertOptions
    data: CalibrationData
    bases: Sequence[str]
    task: str | None
    device: str
    trust: bool
    sites: bool = True

    @property
    def wants_base(self) -> bool:
        """Whether an adapter's own base is opened where the caller names none."""
        return self.data.data is not None or self.data.stats is not None or bool(self.convert.form.needs_base)


def convert_batch(
    members: Sequence[Member],
    options: BatchOptions,
    out: str | Path | None,
    jobs: int = 1,
    executor: Executor | None = None,
    on_entry: OnEntry | None = None,
    progress: Progress | None = None,
) -> BatchReport:
    """Convert the members of a batch; one that fails costs its own entry.

    An interruption gets a note of how many are finished.

    Args:
        members: the adapters.
        options: how.
        out: the folder that gets one for each, or None.
        jobs: how many processes work on them.
        executor: who works on them instead.
        on_entry: called with each entry as it is finished, how many are, and of how many.
        progress: called after each layer; not from other processes.
    """
    started = time.perf_counter()
    options = replace(options, sites=len(members) <= SITES_KEPT)
    found: dict[int, BatchEntry] = {}
    entries: Entries
    if executor is not None:
        entries = _elsewhere(members, options, executor)
    elif jobs > 1 and len(members) > 1:
        entries = _in_processes(members, options, min(jobs, len(members)))
    else:
        entries = _one_by_one(members, options, progress)
    try:
        with contextlib.closing(entries):
            for index, entry in entries:
                found[index] = entry
                if on_entry is not None:
                    on_entry(entry, len(found), len(members))
    except BaseException as interruption:
        done = sum(1 for entry in found.values() if entry.state != "failed")
        place = f"finished and in {out}" if out is not None and not options.convert.dry_run else "finished"
        interruption.add_note(f"{done} of {len(members)} adapters are {place}; the same command goes on with the rest.")
        raise
    listed = [found[index] for index in range(len(members))]
    return BatchReport(None if out is None else str(out), options.convert.to, listed, time.perf_counter() - started)


def _one_by_one(members: Sequence[Member], options: BatchOptions, progress: Progress | None) -> Entries:
    """Convert in this process, the members of one base after the other."""
    with _Bases(options, progress) as bases:
        for index in _by_base(members, options):
            yield index, _entry(members[index], bases)


def _by_base(members: Sequence[Member], options: BatchOptions) -> list[int]:
    """The order in which members of one base come together, otherwise as they were given."""
    if len(options.bases) == 1 or not (options.bases or options.wants_base):
        return list(range(len(members)))
    bases = [_base_or_none(member, options) for member in members]
    first = {base: bases.index(base) for base in bases}
    return sorted(range(len(members)), key=lambda index: first[bases[index]])


def _base_or_none(member: Member, options: BatchOptions) -> str | None:
    with contextlib.suppress(SurgeryError, OSError):
        return base_of(member, options.bases, options.wants_base, options.task, options.trust)
    return None  # its own entry says why


def _elsewhere(members: Sequence[Member], options: BatchOptions, executor: Executor) -> Entries:
    """Convert by an executor, whoever stands behind it. One that breaks costs what it has not finished."""
    waiting: dict[Future[BatchEntry], int] = {}
    refused: list[tuple[int, BatchEntry]] = []
    try:
        for index, member in _ordered(members, options):
            try:
                waiting[executor.submit(_work_in_turn, member, options)] = index
            except RuntimeError as error:  # a broken executor takes nothing more, nor does one that was shut down
                refused.append((index, _broken(member, error)))
        yield from refused
        for future in as_completed(list(waiting)):
            index = waiting.pop(future)
            yield index, _answer(future, members[index])
    finally:
        for future in waiting:
            future.cancel()


def _ordered(members: Sequence[Member], options: BatchOptions) -> list[tuple[int, Member]]:
    return [(index, members[index]) for index in _by_base(members, options)]


def _answer(future: Future[BatchEntry], member: Member) -> BatchEntry:
    try:
        return future.result()
    except BrokenExecutor as error:
        return _broken(member, error)
    except Exception as error:  # whatever an executor makes of a worker that is gone
        reason = f"{type(error).__name__}: {first_line(error)}"
        return BatchEntry(member.name, "failed", error=f"its worker failed ({reason})")


def _broken(member: Member, error: RuntimeError) -> BatchEntry:
    """The entry of a member that an executor can no longer take, or has lost with one of its workers."""
    return BatchEntry(
        member.name,
        "failed",
        error=f"the executor broke before this adapter was finished ({first_line(error)}); the same call with a new "
        "executor goes on with it",
    )


def _in_processes(members: Sequence[Member], options: BatchOptions, jobs: int) -> Entries:
    """Convert in processes of our own. Where one is killed, those that may have been in it are tried alone."""
    left = dict(_ordered(members, options))
    broken = False
    while left:
        # A pool works in the order of submission, and hands out one more than it has processes.
        tried = list(left.items())[: jobs + 1] if broken else list(left.items())
        for group in [[pair] for pair in tried] if broken else [tried]:
            for index, entry in _in_pool(group, options, 1 if broken else jobs):
                if entry is None and not broken:
                    continue
                del left[index]
                yield index, entry or BatchEntry(members[index].name, "failed", error="its process was killed")
        broken = not broken


def _in_pool(
    members: Sequence[tuple[int, Member]], options: BatchOptions, jobs: int
) -> Generator[tuple[int, BatchEntry | None], None, None]:
    """Convert in one pool; None for those that are not finished when a process of it is killed."""
    pool = _pool(jobs)
    waiting = {pool.submit(_work, member, options): (index, member) for index, member in members}
    try:
        for future in as_completed(waiting):
            index, member = waiting[future]
            lost = isinstance(future.exception(), BrokenExecutor)
            yield index, None if lost else _answer(future, member)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(jobs: int) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    threads = max(1, torch.get_num_threads() // jobs)
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_prepare, initargs=(threads,))


def _prepare(threads: int) -> None:
    """Set up a worker: its share of the threads; Ctrl-C is the parent's."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


_worker_bases: list[_Bases] = []  # of a worker: one at most
_turn = threading.Lock()


def _work_in_turn(member: Member, options: BatchOptions) -> BatchEntry:
    """Convert one member in a worker of an executor; the threads of one process share the base, and take turns."""
    with _turn:
        return _work(member, options)


def _work(member: Member, options: BatchOptions) -> BatchEntry:
    """Convert one member in a worker, which keeps its base model for the next one."""
    if not _worker_bases or _worker_bases[0].options != options:
        while _worker_bases:
            _worker_bases.pop().close()
        _worker_bases.append(_Bases(options, None))
    return _entry(member, _worker_bases[0])


class _Bases:
    """The base model that is open in this process: one at a time, and None.

    Args:
        options: of the batch.
        progress: called after each layer.
    """

    def __init__(self, options: BatchOptions, progress: Progress | None) -> None:
        self.options, self.progress = options, progress
        self.device = resolve_device(options.device)
        self._open: dict[str | None, Base] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Bases:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model."""
        self._stack.close()
        self._open.clear()

    def of(self, name: str | None) -> Base:
        """Return the base of this name; one that was open is let go of.

        Raises:
            CheckpointError: it cannot be used.
        """
        if name not in self._open:
            self.close()
            options = self.options
            data = options.data if name is not None else replace(options.data, data=None, stats=None)
            opened = Base.open(name, data, options.task, self.device, options.trust, self.progress)
            self._open[name] = self._stack.enter_context(opened)
        return self._open[name]


def _entry(member: Member, bases: _Bases) -> BatchEntry:
    """Convert one member, or find it finished; whatever goes wrong is its entry's error."""
    started = time.perf_counter()
    try:
        entry = _converted(member, bases)
    except SurgeryError as error:
        entry = BatchEntry(member.name, "failed", _kind(member), error=str(error))
    except (OSError, MemoryError) as error:
        entry = BatchEntry(member.name, "failed", _kind(member), error=first_line(error))
    except Exception as error:  # a fault of ours costs this adapter, and is logged whole
        logging.getLogger("surgery").debug("%s", member.name, exc_info=True)
        entry = BatchEntry(
            member.name, "failed", _kind(member), error=f"unexpected {type(error).__name__}: {first_line(error)}"
        )
    entry.seconds = time.perf_counter() - started
    release_freed()
    return entry


def _converted(member: Member, bases: _Bases) -> BatchEntry:
    options, convert = bases.options, bases.options.convert
    base = base_of(member, options.bases, options.wants_base, options.task, options.trust)
    folder = None if isinstance(member.given, Adapter) else local_folder(str(member.given))
    key, writes = "", member.out is not None and not convert.dry_run
    if writes:
        assert member.out is not None
        key = _key(member, folder, base, options)
        before = _history(member.out)
        if before.get(KEY) == key and _is_whole(member.out, before) and convert.resume and not convert.force:
            report = _report_of(before, member)
            return BatchEntry(member.name, "skipped", report.source_type, str(member.out), report=report)
        # An output of an earlier batch, of another source or other options, or damaged, is ours to replace.
        convert = replace(convert, force=convert.force or KEY in before)
        refuse_inputs(member.out, folder, base, called="the adapter or its base model")
        check_output(member.out, convert.force)
    adapter = member.given if isinstance(member.given, Adapter) else Adapter.open(member.given)
    out = member.out if writes else None
    made, report = convert_one(
        adapter, member.given, out, bases.of(base), convert, bases.device, _named(bases.progress, member), {KEY: key}
    )
    if not options.sites:
        report.sites = []
    kept = None if writes else made
    return BatchEntry(member.name, "done", report.source_type, report.out, report=report, made=kept)


def _named(progress: Progress | None, member: Member) -> Progress | None:
    """Return the callback for one member, whose steps begin with its name."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{member.name}: {what}" if what else member.name)


def _key(member: Member, folder: Path | None, base: str | None, options: BatchOptions) -> str:
    """What an output's `surgery.json` remembers it by: the source's bytes, the options, the base and the data."""
    data = options.data
    told = {
        "options": options.convert.decisive(),
        "source": _digest(folder) if folder is not None else identity_of(member.given, member.given),  # type: ignore[arg-type]
        "base": _model_identity(base),
        "data": file_identities(Path(data.data)) if data.data is not None else None,
        "settings": [data.samples, data.batch_size, data.max_length, data.seed, options.task],
        "template": file_identities(Path(data.chat_template)) if data.chat_template is not None else None,
        "stats": Path(data.stats).name if data.stats is not None else None,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())


def _model_identity(base: str | None) -> Any:
    return file_identities(local_folder(base)) if base is not None else None


def _digest(folder: Path) -> str:
    """The digest of an adapter's configuration and tensors as they lie in its folder."""
    digest = xxhash.xxh3_128()
    paths = [folder / CONFIG_FILE, *sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])]
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
    return digest.hexdigest()


def _history(out: Path) -> dict[str, Any]:
    """The `surgery.json` of an output; empty where there is none that can be read."""
    with contextlib.suppress(SurgeryError, OSError):
        if (out / PROVENANCE_FILE).is_file():
            return read_json(out / PROVENANCE_FILE)
    return {}


def _is_whole(out: Path, history: Mapping[str, Any]) -> bool:
    """Whether an output has its files, of the size that its history says."""
    stated, weights = history.get("report"), out / WEIGHTS_FILE
    if not isinstance(stated, Mapping) or not weights.is_file() or not (out / CONFIG_FILE).is_file():
        return False
    return stated.get("bytes") == weights.stat().st_size


def _report_of(history: Mapping[str, Any], member: Member) -> ConvertReport:
    """The report of an earlier run, as far as its output remembers it."""
    known = {each.name for each in fields(ConvertReport)} - {"sites", "notes", "out", "source"}
    figures = {name: value for name, value in history["report"].items() if name in known}
    return ConvertReport(out=str(member.out), source=member.name, **figures)


def _kind(member: Member) -> str | None:
    """The PEFT type of a member, as far as its configuration can be read."""
    with contextlib.suppress(SurgeryError, OSError):
        if isinstance(member.given, Adapter):
            return member.given.peft_type
        found = read_json(local_folder(str(member.given)) / CONFIG_FILE).get("peft_type")
        return found if isinstance(found, str) else None
    return None
