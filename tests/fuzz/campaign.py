"""Mutants by number: each is made, run through its command, and judged by what can be seen from outside."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import re
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from tests.fuzz.files import mutate_file
from tests.fuzz.jsons import mutate_json
from tests.fuzz.scenarios import SCENARIOS, Scenario
from tests.fuzz.tensors import mutate_header, mutate_tensors
from tests.helpers.isolated import Limits, Outcome, Place, confine, outcome, run, run_and_learn, run_here, snapshot

__all__ = ["Campaign", "Mutant", "Verdict", "faults_of"]

SECRET = "kept-elsewhere-71c3"
LONGEST = 4000
NOT_ENOUGH = "not enough memory for these options"
# Notes, and the course that a training announces.
PLEASANT = re.compile(r"^(Note|Warning): |^[\d,]+ steps of ")
ATTEMPTS = 20
# Mutants that one child process takes: starting one takes longer than most commands.
A_CHILD = 25
# The first time a command runs it imports libraries.
CONTROL = Limits(seconds=120, memory=8 << 30)
# Scenarios that are tried on every whole adapter first.
READS_ALL = {"merge", "inspect"}
# A Llama has no biases that a bias of lora_B could be added to.
REFUSED_WHOLE = {("merge", "lora-biases")}


@dataclass
class Mutant:
    """One broken input.

    Attributes:
        number: which, of the seed's.
        scenario: the command over it.
        adapter: the kind of adapter.
        done: what was changed.
        arguments: the command line.
        seconds: the time that it took.
    """

    number: int
    scenario: Scenario
    adapter: str
    done: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Verdict:
    """What became of a mutant: `accepted`, `refused`, `no memory`, or what is wrong."""

    mutant: Mutant
    outcome: Outcome
    wrong: list[str]

    @property
    def kind(self) -> str:
        """In one word."""
        if self.wrong:
            return "wrong"
        if NOT_ENOUGH in self.outcome.stderr:
            return "no memory"
        return "accepted" if self.outcome.code == 0 else "refused"

    def __str__(self) -> str:
        mutant = self.mutant
        said = self.outcome.stderr.strip() or self.outcome.stdout.strip()
        end = "\n      ".join(said.splitlines()[-25:])
        changes = "; ".join(mutant.done)
        return (
            f"mutant {mutant.number} ({mutant.scenario.name}, {mutant.adapter}): {', '.join(self.wrong)}\n"
            f"    {changes}\n    surgery {' '.join(mutant.arguments)}\n      {end}"
        )


class Campaign:
    """Mutants of a seed.

    Args:
        specimens: the whole folders (`make_specimens`).
        place: where commands run.
        seed: of all choices.
        limits: of each command.
    """

    def __init__(self, specimens: Path, place: Place, seed: int, limits: Limits) -> None:
        self.specimens, self.place, self.seed, self.limits = specimens, place, seed, limits

    def controls(self) -> list[str]:
        """Run every scenario on whole folders; what is wrong with those that do not succeed."""
        wrong = []
        for scenario in SCENARIOS:
            # Every kind of adapter is merged, since a refusal of a broken one means something only where a whole one is
            # not refused.
            for adapter in scenario.adapters if scenario.name in READS_ALL else scenario.adapters[:1]:
                mutant = Mutant(-1, scenario, adapter)
                self._lay_out(mutant)
                ended = run_and_learn(self.place, mutant.arguments, CONTROL)
                if ended.code != 0 and (scenario.name, adapter) not in REFUSED_WHOLE:
                    wrong.append(f"{scenario.name} on a whole {adapter}: {ended.code} {ended.stderr[-2000:]}")
        if run(self.place, ["methods"], Limits(seconds=1), finish=lambda: time.sleep(60)).code is not None:
            wrong.append("a command without an end is not ended")
        # What the parent holds is not looked at again in every child, which would copy it.
        gc.collect()
        gc.freeze()
        return wrong

    def verdicts(self, numbers: range) -> Iterator[Verdict]:
        """Make and run these mutants, one after the other, some of them in each child process."""
        left = list(numbers)
        while left:
            mine, left = left[:A_CHILD], left[A_CHILD:]
            done = 0
            for verdict in self._in_a_child(mine):
                done += 1
                yield verdict
            left = mine[done:] + left

    def _in_a_child(self, numbers: Sequence[int]) -> Iterator[Verdict]:
        """The verdicts of a child process; where it dies or hangs, on the mutant that it died of."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._serve(numbers, writing)
        os.close(writing)
        with open(reading, "rb", buffering=0) as answers:  # noqa: PTH123
            for number in numbers:
                ready, _, _ = select.select([answers], [], [], self.limits.seconds)
                verdict = _received(answers) if ready else None
                if verdict is None:
                    os.kill(child, signal.SIGKILL)
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    yield self._death(number, code if ready else None)
                    return
                yield verdict
        os.waitpid(child, 0)

    def _serve(self, numbers: Sequence[int], writing: int) -> NoReturn:
        try:
            confine(self.limits)
            for number in numbers:
                data = pickle.dumps(self.verdict(number))
                os.write(writing, len(data).to_bytes(8, "little") + data)
        finally:
            os._exit(0)

    def _death(self, number: int, code: int | None) -> Verdict:
        said = outcome(self.place, code)
        wrong = faults_of(said) or ["died"]
        return Verdict(self.made(number), said, wrong)

    def verdict(self, number: int) -> Verdict:
        """Make and run one mutant, in this process, which is a child."""
        mutant = self.made(number)
        place = self.place
        before, began = snapshot(place.root), time.perf_counter()
        ended = run_here(place, mutant.arguments, self.limits)
        mutant.seconds = time.perf_counter() - began
        wrong = faults_of(ended, mutant.scenario.writes)
        wrong += _left(before, snapshot(place.root), ended.code, place)
        return Verdict(mutant, ended, wrong)

    def made(self, number: int) -> Mutant:
        """A mutant's inputs in the place, and what it is."""
        rng = random.Random(f"{self.seed}/{number}")
        scenario = rng.choices(SCENARIOS, [scenario.weight for scenario in SCENARIOS])[0]
        mutant = Mutant(number, scenario, rng.choice(scenario.adapters))
        self._lay_out(mutant)
        for _ in range(1 if rng.random() < 0.8 else 2):
            victim = rng.choice(scenario.victims)
            mutant.done.append(f"{victim}/{_mutated(self.place.input / victim, rng, self.place.root)}")
        return mutant

    def _lay_out(self, mutant: Mutant) -> None:
        place, scenario = self.place, mutant.scenario
        place.clear()
        shutil.copytree(self.specimens / mutant.adapter, place.input / "adapter")
        shutil.copytree(self.specimens / scenario.model, place.input / "model")
        if scenario.other is not None:
            shutil.copytree(self.specimens / scenario.other, place.input / "other")
        _elsewhere(place.root / "elsewhere", self.specimens)
        out = place.work / "out"
        if "--force" in scenario.arguments:
            out.mkdir()
            (out / "precious.txt").write_text("an older output")
        names = {name: str(place.input / name) for name in ("model", "adapter", "other")}
        files = {name: str(self.specimens / f"{name}.jsonl") for name in ("data", "labelled")}
        mutant.arguments = [each.format(**names, **files, out=out) for each in scenario.arguments.split()]


def _received(answers: IO[bytes]) -> Verdict | None:
    """What a child sends; None where it has ended."""
    found = b""
    while len(found) < 8 or len(found) < 8 + int.from_bytes(found[:8], "little"):
        piece = answers.read(1 << 16)
        if not piece:
            return None
        found += piece
    verdict: Verdict = pickle.loads(found[8:])
    return verdict


def _elsewhere(folder: Path, specimens: Path) -> None:
    """What links may lead to."""
    (folder / "secret.txt").write_text(f"{SECRET}\n")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(specimens / "classifier" / name, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": SECRET}))
    shutil.copyfile(specimens / "classifier" / "model.safetensors", folder / "model.safetensors")


def _mutated(folder: Path, rng: random.Random, root: Path) -> str:
    """Break one file of a folder; what was done."""
    for _ in range(ATTEMPTS):
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        if not files:
            return "empty already"
        # What says what the folder is, twice as often.
        main = [path for path in files if path.name in {"adapter_config.json", "config.json"}]
        try:
            return _changed(rng.choice(files + main), rng, root)
        except Exception:  # a second change finds the file broken, and not to be changed in this way
            continue
    return "as it was"


def _changed(path: Path, rng: random.Random, root: Path) -> str:
    kinds: list[Callable[[], str]] = [lambda: mutate_file(path, rng, root)]
    if path.suffix == ".json":
        kinds += 3 * [lambda: mutate_json(path, rng)]
    if path.suffix == ".safetensors":
        kinds += 2 * [lambda: mutate_header(path, rng), lambda: mutate_tensors(path, rng)]
    return rng.choice(kinds)()


def faults_of(outcome: Outcome, writes: bool = True) -> list[str]:
    """What is wrong with the way in which a command ended, as far as its words tell."""
    lines = outcome.stderr.splitlines()
    wrong = []
    if outcome.code is None:
        return ["ran out of time"]
    if outcome.code not in {0, 1}:
        wrong.append(f"exit code {outcome.code}")
    if "Traceback (most recent call last)" in outcome.stderr:
        wrong.append("traceback")
    if SECRET in outcome.stdout + outcome.stderr:
        wrong.append("tells what is elsewhere")
    if any(character in outcome.stdout + outcome.stderr for character in "\x1b\x07\x00"):
        wrong.append("control characters")
    if outcome.code == 1:
        said = [line for line in lines if line.startswith("Error: ")]
        if len(said) != 1 or not lines or lines[-1] != said[0]:
            wrong.append(f"{len(said)} error lines")
        elif len(said[0]) > LONGEST:
            wrong.append(f"an error of {len(said[0])} characters")
        elif len(said[0]) < len("Error: ") + 12:
            wrong.append("an error that says little")
        if outcome.stdout and not _is_told_as_json(outcome.stdout):
            wrong.append("output before an error")
    if any(line and not PLEASANT.match(line) and not line.startswith("Error: ") for line in lines) and not wrong:
        wrong.append("other lines on stderr")
    return wrong


def _is_told_as_json(text: str) -> bool:
    """Return whether a command that failed said so in one JSON object, as `--json` asks for."""
    try:
        said = json.loads(text)
    except ValueError:
        return False
    return isinstance(said, dict) and bool(said.get("command")) and ("error" in said or "adapters" in said)


def _left(
    before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]], code: int | None, place: Place
) -> list[str]:
    """What is wrong with what a command left on the disk."""
    wrong = []
    allowed = "work/" if code == 0 else None
    changed = sorted(
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and not (allowed and path.startswith(allowed))
    )
    # Folders that caches of libraries make in the user's home are theirs.
    changed = [path for path in changed if not path.startswith("home/.cache")]
    if changed:
        wrong.append(f"touched {', '.join(changed[:3])}")
    hidden = [path.name for path in place.work.iterdir() if path.name.startswith(".")]
    if hidden:
        wrong.append(f"left {hidden[0]}")
    if any(SECRET.encode() in path.read_bytes() for path in place.work.rglob("*") if path.is_file()):
        wrong.append("copied what is elsewhere")
    return wrong


def table(verdicts: Counter[tuple[str, str]]) -> str:
    """Counts by command."""
    kinds = ("accepted", "refused", "no memory", "wrong")
    commands = sorted({command for command, _ in verdicts})
    rows = [[command, *(verdicts[command, kind] for kind in kinds)] for command in commands]
    rows.append(["all", *(sum(verdicts[command, kind] for command in commands) for kind in kinds)])
    lines = [f"{'command':<10}{'mutants':>9}" + "".join(f"{kind:>11}" for kind in kinds)]
    lines += [f"{row[0]:<10}{sum(row[1:]):>9}" + "".join(f"{count:>11}" for count in row[1:]) for row in rows]
    return "\n".join(lines)
