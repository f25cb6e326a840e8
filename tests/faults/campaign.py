"""Every call of a write, one after the other, is made to fail or is the last: what is then on the disk?"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.tracing import Call, Decision, follow, let_trace
from tests.fuzz.campaign import faults_of
from tests.helpers.isolated import Limits, Outcome, Place, outcome, run, run_and_learn, start

__all__ = ["FAULTS", "OPERATIONS", "Finding", "Operation", "Rehearsal"]

LIMITS = Limits(seconds=120, memory=8 << 30)
KILL = "kill"
# What a disk, or the one who looks after it, answers; and whether it stays so.
FAULTS: dict[str, tuple[int, bool]] = {
    "ENOSPC": (errno.ENOSPC, True),
    "EROFS": (errno.EROFS, True),
    "EACCES": (errno.EACCES, False),
    "EIO": (errno.EIO, False),
}
# What a full disk refuses.
TAKES_SPACE = {
    "write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "openat", "creat", "open", "mkdir",
    "mkdirat", "fallocate", "fsync", "fdatasync", "ftruncate",
}  # fmt: skip
# What a file system that may not be written takes all the same; what needs no right to the file.
READS = {"read", "flock"}
NO_RIGHT = {"write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fsync", "fdatasync", "flock"}


@dataclass(frozen=True)
class Operation:
    """A command that writes.

    Attributes:
        name: what it writes.
        arguments: of the command line; `{out}` is written, the others are in `tests.fuzz.specimens`.
        out: the name of what is written.
        more: how it is run again after a kill.
        hidden: hidden folders that a kill may leave beside the output.
        old: what the output is, where one is replaced: the same command with other options.
        flag: what lets it be replaced.
        stands: the command goes on with what it has written, which stands even if the rest of it fails.
    """

    name: str
    arguments: str
    old: str
    out: str = "out"
    more: str = "--force"
    hidden: int = 1
    flag: str = "--force"
    stands: bool = False


OPERATIONS = (
    Operation(
        "init", "init {model} --method inilora --rank 2 --target q_proj -o {out}",
        "init {model} --method vera --rank 2 -o {out}",
    ),
    Operation(
        "convert", "convert {lora} --to giva --base {model} --rank 1 -o {out}",
        "convert {lora} --to lora --rank 1 -o {out}",
    ),
    Operation(
        "merge", "merge {lora} --base {sharded} -o {out}", "merge {lora} --base {model} --dtype bfloat16 -o {out}"
    ),
    Operation(
        "train", "train {lora} --base {model} --data {data} --steps 1 --batch-size 2 --save-every 1 -o {out}",
        "convert {lora} --to lora --rank 1 -o {out}", hidden=2,
    ),
    Operation(
        "statistics", "convert {lora} --to giva --base {model} --data {data} --samples 4 --rank 1 --dry-run "
        "--stats {out}", "", "moments.safetensors", more="", flag="", stands=True,
    ),
    Operation(
        "picture", "inspect {lora} --plot {out}", "inspect {model} --plot {out}", "picture.png", more="", flag=""
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What is wrong after a fault.

    Attributes:
        where: the operation, the number of the call and the fault.
        call: the call.
        wrong: what is wrong.
        said: what the command printed.
    """

    where: str
    call: str
    wrong: list[str]
    said: str

    def __str__(self) -> str:
        lines = "\n      ".join(self.said.strip().splitlines()[-12:])
        return f"{self.where}, {self.call}: {', '.join(self.wrong)}\n      {lines}"


class Rehearsal:
    """One operation, over an older output or where there is none.

    Args:
        operation: the operation.
        replaces: whether there is an older output.
        specimens: the inputs.
        place: where it runs.
    """

    def __init__(self, operation: Operation, replaces: bool, specimens: Path, place: Place) -> None:
        self.operation, self.replaces, self.specimens, self.place = operation, replaces, specimens, place
        self.out = place.work / operation.out
        self.calls: list[Call] = []
        self.counts: Counter[str] = Counter()

    def prepare(self) -> list[str]:
        """See what the operation does when nothing fails; what is wrong with it."""
        self.place.clear()
        self.old: Any = None
        self.old_bytes = self.place.root.parent / f"{self.place.root.name}-old"
        shutil.rmtree(self.old_bytes, ignore_errors=True)
        if self.replaces:
            made = run_and_learn(self.place, self._words(self.operation.old), LIMITS)
            if made.code != 0:
                return [f"{self.operation.name}: the older output: {made.stderr}"]
            _copy(self.out, self.old_bytes)
            self.old = _content(self.out)
        run_and_learn(self.place, self._arguments(), LIMITS)
        first = _content(self.out)
        self._reset()
        ended = self._followed(self._noting)
        second = _content(self.out)
        if ended.code != 0:
            return [f"{self.operation.name}: {ended.stderr}"]
        # What is another at every run (times, say) is not compared.
        self.same = {name for name, data in first.items() if second.get(name) == data}
        self.new = second
        return [] if set(first) == set(second) and self.same else [f"{self.operation.name}: is another at every run"]

    def findings(self, faults: list[str], step: int = 1) -> Iterator[Finding]:
        """Make every call, or each `step`-th, fail in each of these ways; what is wrong afterwards."""
        for number in range(0, len(self.calls), step):
            for fault in faults:
                if not _can(self.calls[number], fault):
                    continue
                self.counts[fault] += 1
                wrong, said = self._one(number, fault)
                if wrong:
                    where = f"{self.operation.name}{' over an older one' if self.replaces else ''}, {number} {fault}"
                    yield Finding(where, str(self.calls[number]), wrong, said)

    def race(self, processes: int = 3) -> list[str]:
        """Let several processes write the same output at the same time; what is wrong afterwards."""
        self._reset()
        self.counts["race"] += 1
        began = {
            start(self.place, self._arguments(), LIMITS, log=str(number)): str(number) for number in range(processes)
        }
        ends = [
            outcome(self.place, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log) for pid, log in began.items()
        ]
        wrong = [each for end in ends for each in faults_of(end)]
        done = sum(end.code == 0 for end in ends)
        if not done:
            wrong.append("none of them wrote it")
        if self._state() != "new" or self._hidden():
            wrong.append(f"the output is {self._state()}, beside it is {self._hidden()}")
        words = "".join(end.stderr for end in ends if end.code)
        return [f"{self.operation.name}, {processes} at once: {', '.join(wrong)}\n{words}"] if wrong else []

    def denied(self) -> list[str]:
        """Take the rights to the place, and to an older output; what is wrong afterwards."""
        found = []
        for path, mode in ((self.place.work, 0o555), (self.place.work, 0o000), (self.out, 0o555), (self.out, 0o000)):
            self._reset()
            if not path.exists():
                continue
            self.counts["denied"] += 1
            before = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode)
            child = start(self.place, self._arguments(), LIMITS)
            ended = outcome(self.place, _ended(child))
            path.chmod(before)
            wrong = self._after_error(ended)
            if wrong:
                found.append(
                    f"{self.operation.name}, {path.name} with mode {mode:o}: {', '.join(wrong)}\n{ended.stderr}"
                )
        return found

    def _one(self, number: int, fault: str) -> tuple[list[str], str]:
        self._reset()
        seen = 0

        def decide(call: Call) -> Decision:
            nonlocal seen
            if not call.inside(self.place.work):
                return None
            seen += 1
            if fault == KILL:
                return KILL if seen - 1 == number else None
            code, stays = FAULTS[fault]
            return code if seen - 1 == number or (stays and seen - 1 > number and _can(call, fault)) else None

        ended = self._followed(decide)
        return (self._after_kill(ended) if fault == KILL else self._after_error(ended)), ended.stderr

    def _after_error(self, ended: Outcome) -> list[str]:
        wrong = faults_of(ended)
        state = self._state()
        if ended.code == 0 and state != "new":
            wrong.append(f"success, and the output is {state}")
        if ended.code == 1 and state != "old" and not (self.operation.stands and state == "new"):
            wrong.append(f"failure, and the output is {state}")
        return wrong + self._beside()

    def _after_kill(self, ended: Outcome) -> list[str]:
        wrong = [] if ended.code == -9 else [f"exit code {ended.code}"]
        state = self._state()
        if state not in {"old", "new"}:
            wrong.append(f"the output is {state}")
        wrong += self._beside()
        again = run(self.place, [*self._arguments(), *self.operation.more.split()], LIMITS)
        if again.code != 0:
            return [*wrong, f"the next run fails: {again.stderr.strip()[-300:]}"]
        left = self._hidden()
        if left or self._state() != "new":
            wrong.append(f"after the next run the output is {self._state()}, and {left} is left")
        return wrong

    def _state(self) -> str:
        if not self.out.exists():
            return "old" if self.old is None else "lost"
        found = _content(self.out)
        if self.old is not None and found == self.old:
            return "old"
        if set(found) == set(self.new) and all(found[name] == self.new[name] for name in self.same):
            return "new"
        return f"neither the old nor the new one ({sorted(found)[:4]})"

    def _beside(self) -> list[str]:
        beside = self._hidden()
        open_ones = [name for name in beside if not name.startswith(".")]
        if open_ones or len(beside) > self.operation.hidden:
            return [f"beside the output: {', '.join(beside)}"]
        return []

    def _hidden(self) -> list[str]:
        return sorted(path.name for path in self.place.work.iterdir() if path != self.out)

    def _noting(self, call: Call) -> Decision:
        if call.inside(self.place.work):
            self.calls.append(call)
        return None

    def _followed(self, decide: Callable[[Call], Decision]) -> Outcome:
        child = start(self.place, self._arguments(), LIMITS, let_trace)
        return outcome(self.place, follow(child, decide))

    def _arguments(self) -> list[str]:
        words = self._words(self.operation.arguments)
        return [*words, self.operation.flag] if self.replaces and self.operation.flag else words

    def _words(self, text: str) -> list[str]:
        names = {path.stem: str(path) for path in self.specimens.iterdir()}
        return [word.format(**names, out=self.out) for word in text.split()]

    def _reset(self) -> None:
        self.place.clear()
        if self.replaces:
            _copy(self.old_bytes, self.out)


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _can(call: Call, fault: str) -> bool:
    """Whether a call can end in this way."""
    if fault == "ENOSPC":
        return call.name in TAKES_SPACE
    if fault == "EROFS":
        return call.name not in READS | NO_RIGHT
    if fault == "EACCES":
        return call.name not in NO_RIGHT
    return True


def _content(path: Path) -> dict[str, Any]:
    """What is in a file or a folder, with the modes."""
    if not path.is_dir():
        return {"": path.read_bytes()}
    return {
        str(each.relative_to(path)): (stat.S_IMODE(each.stat().st_mode), each.read_bytes() if each.is_file() else None)
        for each in path.rglob("*")
    }


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
