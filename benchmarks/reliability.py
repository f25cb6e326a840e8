"""`make reliability`: every proof of reliability in one table, which is written into docs/reliability.md.

A row is a command that prints one JSON object as its last line, and what of it is counted. All rows together take
hours; with `--folder` what each call found is kept there, and a call whose result is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.mutation.equivalent import reason_for

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts -->", "<!-- end of counts -->"
Counts = list[tuple[str, str, int]]  # what was tried, how much of it, how many went wrong


@dataclass(frozen=True)
class Row:
    """One proof.

    Attributes:
        name: what is proved.
        module: of `python -m`.
        parts: arguments of each call; several calls where one would be long. `{file}` is a file for the result, which
            is otherwise the last line that is printed.
        counts: from the results of the calls to rows of the table.
        shown: what a reader would type, after `python -m`.
    """

    name: str
    module: str
    parts: Sequence[Sequence[str]]
    counts: Callable[[list[Any]], Counts]
    shown: str

    @property
    def command(self) -> str:
        """What a reader would type."""
        return f"python -m {self.shown}"

    def run(self, kept: Path | None, report_only: bool) -> Counts | None:
        """Run what is not kept yet; None where nothing is there to count."""
        found = []
        for number, arguments in enumerate(self.parts):
            place = None if kept is None else kept / f"{self.name}-{number}.json"
            if place is not None and place.is_file():
                found.append(json.loads(place.read_text(encoding="utf-8")))
            elif not report_only:
                found.append(self._result(arguments))
                if place is not None:
                    place.write_text(json.dumps(found[-1]) + "\n", encoding="utf-8")
        return self.counts(found) if found else None

    def _result(self, arguments: Sequence[str]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            command = [sys.executable, "-m", self.module, *(each.format(file=file) for each in arguments)]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=_environment())
            sys.stderr.write(ended.stderr)
            if file.is_file():
                return json.loads(file.read_text())
            lines = ended.stdout.strip().splitlines()
            if not lines:
                raise SystemExit(f"{' '.join(command[1:])} printed no result:\n{ended.stderr[-3000:]}")
            return json.loads(lines[-1]) if lines[-1].startswith("{") else lines[-1]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _fuzz(found: list[dict[str, Any]]) -> Counts:
    wrong = sum(len(each["wrong"]) for each in found)
    kinds: dict[str, int] = {}
    for each in found:
        for name, count in each["counts"].items():
            kind = name.partition(" ")[2]
            kinds[kind] = kinds.get(kind, 0) + count
    detail = ", ".join(f"{kinds.get(kind, 0):,} {kind}" for kind in ("refused", "accepted", "no memory"))
    return [
        ("broken inputs through every command", detail, sum(each["mutants"] for each in found)),
        ("", "wrong", wrong),
    ]


def _faults(found: list[dict[str, Any]]) -> Counts:
    total: dict[str, int] = {}
    for each in found:
        for counts in each["operations"].values():
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
    errors = ", ".join(f"{total.get(name, 0):,} {name}" for name in ("ENOSPC", "EROFS", "EACCES", "EIO"))
    injected = sum(total.get(name, 0) for name in ("ENOSPC", "EROFS", "EACCES", "EIO"))
    return [
        ("kills, each before another system call of a write", f"{total.get('calls', 0):,} calls", total.get("kill", 0)),
        ("injected errors of system calls", errors, injected),
        ("writers of one output at the same time, rights taken away", *_places(total)),
        ("", "lost, half-written or left behind", total.get("wrong", 0)),
    ]


def _places(total: dict[str, int]) -> tuple[str, int]:
    races, denied = total.get("race", 0), total.get("denied", 0)
    return f"{races} and {denied}", races + denied


def _properties(found: list[str]) -> Counts:
    """From the last line of pytest."""
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", " ".join(found))}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    rows = [("properties on random inputs", "each on many examples", counts.get("passed", 0) + failed)]
    return [*rows, ("", "failed", failed)]


def _mutations(found: list[dict[str, Any]]) -> Counts:
    """A formula that is broken and not noticed is no error of the tool, but one that a test could have noticed."""
    results = {key: each["caught"] for state in found for key, each in state["results"].items()}
    missed = [key for key, caught in results.items() if not caught]
    same = sum(reason_for(key) is not None for key in missed)
    noticed, survived = len(results) - len(missed), len(missed) - same
    share = noticed / max(noticed + survived, 1)
    detail = f"{noticed:,} noticed by the tests, {same:,} change nothing, {survived:,} survived: {share:.1%} noticed"
    return [("formulas broken one by one", detail, len(results))]


FUZZ_PART = 1000
WRITES = ("init", "convert", "merge", "train", "statistics", "picture")
ROWS = [
    Row(
        "fuzz",
        "tests.fuzz",
        [["--json", "--mutants", str(FUZZ_PART), "--first", str(first)] for first in range(0, 5000, FUZZ_PART)],
        _fuzz,
        "tests.fuzz",
    ),
    Row("faults", "tests.faults", [["--json", "--only", name] for name in WRITES], _faults, "tests.faults"),
    Row("properties", "pytest", [["tests/properties"]], _properties, "pytest tests/properties"),
    Row("mutations", "tests.mutation", [["--json", "{file}"]], _mutations, "tests.mutation"),
]


def main() -> int:
    """Exit code 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], help="one row; repeatable")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--folder", type=Path, help="where results are kept from one run to the next")
    parser.add_argument("--report-only", action="store_true", help="run nothing: the table of what is kept")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    lines, wrong = ["| what | of which | count | command |", "|---|---|---:|---|"], 0
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        counts = row.run(options.folder, options.report_only)
        if counts is None:
            print(f"{row.name}: nothing is kept of {row.command}", file=sys.stderr)
            continue
        for what, detail, count in counts:
            lines.append(f"| {what} | {detail} | {count:,} | {f'`{row.command}`' if what else ''} |")
        wrong += sum(count for what, _, count in counts if not what)
    table = "\n".join(lines)
    print(table)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        where = f"{platform.system()}, Python {platform.python_version()}"
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n\nMeasured on {where}.\n{END}{after}", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
