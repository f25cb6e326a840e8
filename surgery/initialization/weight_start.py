"""The start of a method that is computed from the base's weights, unit by unit: a layer, or the layers of a role.

Finished units go into `Parts`, so that memory does not grow with the number of layers and a run that was killed goes on
with the next unit. Units do not depend on one another: processes and GPUs share them out, and what comes out is the
same to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.errors import NumericsError, OutputError, SurgeryError
from surgery.methods.base import Method, OwnMethod
from surgery.models.base_model import BaseModel
from surgery.models.fingerprint import Fingerprint
from surgery.models.sites import Site
from surgery.storage.atomic_file import named_errors
from surgery.storage.atomic_folder import PartialFolder, resumable_folder
from surgery.storage.resume import Parts, PartTensors
from surgery.system.memory import release_freed
from surgery.system.processes import Processes
from surgery.system.progress import Progress
from surgery.system.tensors import Tensors

__all__ = ["Sharing", "WeightStart", "file_name", "stored", "weight_start"]


@dataclass
class WeightStart:
    """A start that was computed from weights.

    Attributes:
        tensors: by name in the file, in its dtype, read when they are looked up.
        notes: what the user should know about how they were computed.
        energies: squared norm of each weight that was read, by module.
        held: squared norm of what approximates it in the start, for a method that has such a thing.
        fingerprint: of the weights, by dtype; None where the method needs none.
    """

    tensors: PartTensors
    notes: list[str]
    energies: dict[str, float]
    held: dict[str, float]
    fingerprint: dict[str, str] | None


def weight_start(
    method: Method,
    config: Any,
    sites: Sequence[Site],
    base: BaseModel,
    dtype: torch.dtype,
    sharing: Sharing,
    devices: Sequence[torch.device],
    progress: Progress | None = None,
) -> WeightStart:
    """Compute a method's start.

    Args:
        method: one that reads no gradients.
        config: its configuration.
        sites: the layers.
        base: the base model.
        dtype: of the floating-point tensors in the file.
        sharing: the processes that share out the units, and their parts; units that are there are not computed again.
        devices: where to compute; they share out the process's units.
        progress: called before each weight that is read.

    Raises:
        MethodError: a tensor is not finite in `dtype`.
        CheckpointError: a weight cannot be used.
    """
    group, parts = sharing.group, sharing.parts
    work = _Work(method, config, base, dtype, progress if group.first else None)
    units = _units(method, sites)
    finished = set(group.gathered(list(parts))[0])
    left = [unit for unit in units if unit.name not in finished]
    mine = [left[index] for index in group.share([unit.cost for unit in left])]
    work.expect(units, left, mine)
    with group.in_step():
        try:
            work.run(mine, parts, devices, sharing.failed)
            if group.count > 1:
                parts.flush()
        except SurgeryError:
            sharing.fail()
            raise
    if group.count > 1:
        parts.look()
    return _collected(method, config, units, parts)


def _collected(method: Method, config: Any, units: Sequence[_Unit], parts: Parts) -> WeightStart:
    found = WeightStart(PartTensors(parts, [unit.name for unit in units]), [], {}, {}, None)
    fingerprint = Fingerprint()
    for unit in units:
        facts = parts.facts(unit.name)
        found.notes += facts["notes"]
        found.energies.update(facts["energies"])
        found.held.update(facts["held"])
        fingerprint.take(facts["digests"])
    if isinstance(method, OwnMethod) and method.needs_base(config):
        found.fingerprint = fingerprint.digests()
    return found


@dataclass(frozen=True)
class _Unit:
    """What is computed at a time.

    Attributes:
        name: of the unit.
        sites: the layers.
        cost: about how much work it is, next to the others.
    """

    name: str
    sites: Sequence[Site]
    cost: float


def _units(method: Method, sites: Sequence[Site]) -> list[_Unit]:
    if not isinstance(method, OwnMethod):
        return [_Unit(method.info.name, sites, 1.0)]  # only shapes count: quickly done
    return [_Unit(method.group_key(group[0]), group, _cost(group)) for group in method.groups(sites)]


def _cost(sites: Sequence[Site]) -> float:
    """Products of the weight with its smaller side: what all decompositions are made of."""
    return float(sum(site.out_features * site.in_features * site.max_rank for site in sites))


class _Work:
    """Computes units."""

    def __init__(
        self, method: Method, config: Any, base: BaseModel, dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self.method, self.config, self.base, self.dtype, self.progress = method, config, base, dtype, progress
        self.fingerprinted = isinstance(method, OwnMethod) and method.needs_base(config)
        self._done = self._total = 0
        self._lock = threading.Lock()
        # By module: squared norm and digests of each weight that was read and whose unit is not finished.
        self._seen: dict[str, tuple[float, dict[str, dict[str, str]]]] = {}

    def expect(self, units: Sequence[_Unit], left: Sequence[_Unit], mine: Sequence[_Unit]) -> None:
        """How many weights there are to read, those of finished units counted as read."""
        whole, rest, own = (sum(len(unit.sites) for unit in each) for each in (units, left, mine))
        self._done = (whole - rest) * self.method.passes
        self._total = self._done + own * self.method.passes

    def run(
        self, units: Sequence[_Unit], parts: Parts, devices: Sequence[torch.device], failed: Callable[[], bool]
    ) -> None:
        """Compute units and add them to the parts; every device takes the next one when it is ready."""
        left = deque(units)
        if len(devices) == 1:
            self._drain(left, parts, devices[0], failed, alone=True)
            return
        with ThreadPoolExecutor(len(devices)) as pool:
            workers = [pool.submit(self._drain, left, parts, device, failed, False) for device in devices]
            try:
                for worker in workers:
                    worker.result()
            finally:
                left.clear()  # after an error, or an interruption, the others end with what they are at

    def _drain(
        self, left: deque[_Unit], parts: Parts, device: torch.device, failed: Callable[[], bool], alone: bool
    ) -> None:
        ahead = _Ahead(self._read)
        while not failed():
            try:
                unit = left.popleft()
            except IndexError:
                return
            following = left[0].sites[0] if alone and left and self._reads_once(unit) else None
            try:
                tensors, facts = self._made(unit, _Reader(self, ahead, device, following))
            except BaseException:
                left.clear()
                raise
            parts.add(unit.name, tensors, facts)
            del tensors
            release_freed()

    def _reads_once(self, unit: _Unit) -> bool:
        return len(unit.sites) == 1 and self.method.passes == 1

    def _made(self, unit: _Unit, reader: _Reader) -> tuple[Tensors, dict[str, Any]]:
        """The tensors of a unit as the file holds them, and what is to be known of it."""
        made: Tensors = {}
        notes: list[str] = []
        held: dict[str, float] = {}
        if isinstance(self.method, OwnMethod):
            found, notes = self.method.start_group(self.config, unit.sites, reader)
            for site, short in zip(unit.sites, found, strict=True):
                named = {
                    name: self._stored(f"{site.module}.{self.method.prefix}{name}", t) for name, t in short.items()
                }
                approximation = self.method.approximation(self.config, named)
                if approximation is not None:
                    # The approximation is an orthogonal projection, so what it holds is its own norm.
                    held[site.module] = float(approximation.norm()) ** 2
                made.update({file_name(f"{site.module}.{self.method.prefix}{name}"): t for name, t in named.items()})
        else:
            start = self.method.start(self.config, unit.sites, None)
            made, notes = {file_name(name): self._stored(name, t) for name, t in start.tensors.items()}, start.notes
        seen = {site.module: self._seen.pop(site.module) for site in unit.sites if site.module in self._seen}
        digests = {key: value for _, taken in seen.values() for key, value in taken.items()}
        energies = {module: energy for module, (energy, _) in seen.items()}
        return made, {"notes": notes, "energies": energies, "held": held, "digests": digests}

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Copied: equal starting values must be tensors of their own in the file.
        return stored(name, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format), self.dtype)

    def tell(self, site: Site) -> None:
        """A weight is asked for."""
        with self._lock:
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self._total, site.role)

    def _read(self, site: Site) -> torch.Tensor:
        """A weight, float32; its norm and fingerprint are taken when it is read for the first time."""
        weight = self.base.raw_weight(site, check=False).to(torch.float32)
        if site.module not in self._seen:
            norm = float(torch.linalg.vector_norm(weight))
            if not math.isfinite(norm):
                self.base.raw_weight(site, check=True)  # names what is wrong with it
            fingerprint = Fingerprint()
            if self.fingerprinted:
                fingerprint.add(site.key, weight)  # widened it is the same number
            self._seen[site.module] = norm**2, fingerprint.taken
        return weight


class _Ahead:
    """Reads the weight that will be wanted next while one is worked on."""

    def __init__(self, read: Callable[[Site], torch.Tensor]) -> None:
        self._read = read
        self._expected: dict[Site, Future[torch.Tensor]] = {}

    def expect(self, site: Site | None) -> None:
        """Begin to read a weight."""
        if site is not None and site not in self._expected:
            weight = self._expected[site] = Future()
            # No pool: an interrupted run would wait at its end for what the pool still reads.
            threading.Thread(target=self._fetch, args=(site, weight), daemon=True).start()

    def _fetch(self, site: Site, weight: Future[torch.Tensor]) -> None:
        try:
            weight.set_result(self._read(site))
        except BaseException as error:
            weight.set_exception(error)

    def take(self, site: Site, following: Site | None) -> torch.Tensor:
        """A weight; the next one is begun when it is there."""
        self.expect(site)
        weight = self._expected.pop(site).result()
        self.expect(following)
        return weight


class _Reader:
    """Gives a method the weights of one unit."""

    def __init__(self, work: _Work, ahead: _Ahead, device: torch.device, following: Site | None) -> None:
        self.work, self.ahead, self.device, self.following = work, ahead, device, following

    def __call__(self, site: Site) -> torch.Tensor:
        self.work.tell(site)
        return self.ahead.take(site, self.following).to(self.device)

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        for index, site in enumerate(sites):
            self.work.tell(site)
            following = sites[index + 1] if index + 1 < len(sites) else self.following
            yield self.ahead.take(site, following).to(self.device)
            release_freed()


@dataclass
class Sharing:
    """The processes of a run, and where their finished units go.

    Attributes:
        group: the processes.
        output: in the first process, where there is an output, its hidden folder.
        parts: the finished units.
        failure: where there are several processes, the file in the folder of the parts that says that one has failed.
    """

    group: Processes
    output: PartialFolder | None
    parts: Parts
    failure: Path | None = None

    def failed(self) -> bool:
        """Whether another process has failed."""
        return self.failure is not None and self.failure.exists()

    def fail(self) -> None:
        """Let the others know that this one has failed, so that they do not go on to their end."""
        if self.failure is not None:
            with contextlib.suppress(OSError):
                self.failure.touch()

    @classmethod
    @contextlib.contextmanager
    def open(cls, group: Processes, out: Path | None, force: bool, key: str, resume: bool) -> Iterator[Sharing]:
        """The output takes its name when the block ends. Of one process without an output, units stay in memory.

        Args:
            group: the processes.
            out: the output, in whose hidden folder the parts are; without one they are in a folder that goes.
            force: replace an output that is there.
            key: what recognises the run.
            resume: use what a run of this key has left.

        Raises:
            OutputError: the output cannot be written, or the processes do not see the same folder.
        """
        with contextlib.ExitStack() as stack:
            output, place = None, None
            with group.in_step():
                if group.first and out is not None:
                    output = stack.enter_context(resumable_folder(out, force, key, resume))
                    place = output.parts_folder() if group.count > 1 else None
                elif group.first and group.count > 1:
                    place = Path(tempfile.mkdtemp(prefix="surgery-"))
                    stack.callback(shutil.rmtree, place, ignore_errors=True)
            if group.count == 1:
                yield cls(group, output, output.parts if output is not None else Parts())
                return
            # A name of this run's own: what a process of another one leaves there does not stop it.
            failure = Path(group.gathered(place and place / f"failed-{uuid.uuid4().hex}")[0])
            folder = failure.parent
            with group.in_step():
                if not folder.is_dir():
                    raise OutputError(f"{out or folder}: not all processes see it; give an output on a disk they share")
            parts = output.parts if output is not None else Parts(lambda: _writing(folder, out or folder), folder, key)
            yield cls(group, output, parts, failure)


@contextlib.contextmanager
def _writing(folder: Path, target: Path) -> Iterator[Path]:
    """A folder to write into; what the system refuses is a named error of the target."""
    with named_errors(target):
        yield folder


def file_name(name: str) -> str:
    """The name in the file of a tensor of a start; those above the model are marked by a leading dot."""
    return f"{TUNER_PREFIX}{name[1:]}" if name.startswith(".") else f"{MODEL_PREFIX}{name}"


def stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the dtype of the file.

    Raises:
        MethodError: it is not finite there.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if tensor.device.type != "meta" and not torch.isfinite(cast).all():
        raise NumericsError(
            f"{name} is not finite in {dtype}: the weights, or alpha, are too large or too small for it"
        )
    return cast
