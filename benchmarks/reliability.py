"""`make reliability`: every proof of reliability in one table, which is written into docs/reliability.md.

A row is a command that prints one JSON object as its last line, and what of it is counted. Rows whose module is not
there yet are left out of the table, and said to be.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
        there: what has to be importable.
    """

    name: str
    module: str
    parts: Sequence[Sequence[str]]
    counts: Callable[[list[Any]], Counts]
    there: str

    @property
    def command(self) -> str:
        """What a reader would type."""
        where = "" if self.there == self.module else f" {self.there.replace('.', '/')}"
        return f"python -m {self.module}{where}"

    def run(self) -> Counts:
        """Run it."""
        return self.counts([self._result(arguments) for arguments in self.parts])

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
        ("", "lost, half-written or left behind", total.get("wrong", 0)),
    ]


def _properties(found: list[str]) -> Counts:
    """From the last line of pytest."""
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", " ".join(found))}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    rows = [("properties on random inputs", "each on many examples", counts.get("passed", 0) + failed)]
    return [*rows, ("", "failed", failed)]


def _mutations(found: list[dict[str, Any]]) -> Counts:
    """A formula that is broken and not noticed is listed with its reasons, and is no error of the tool."""
    results = [each for state in found for each in state["results"].values()]
    caught = sum(bool(each["caught"]) for each in results)
    return [("formulas broken one by one", f"{caught:,} noticed by the tests", len(results))]


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
    Row("properties", "pytest", [["-q", "tests/properties"]], _properties, "tests.properties"),
    Row("mutations", "tests.mutation", [["--json", "{file}"]], _mutations, "tests.mutation"),
]


def main() -> int:
    """Exit code 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], help="one row; repeatable")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    lines, wrong = ["| what | of which | count | command |", "|---|---|---:|---|"], 0
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        if find_spec(row.there) is None:
            print(f"{row.name}: {row.command} is not there yet", file=sys.stderr)
            continue
        counts = row.run()
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
