"""The command: which broken formulas do the tests notice?

python -m tests.mutation --json run.json --seconds 300     # again and again, until nothing is left to do
python -m tests.mutation --json run.json --retry           # the survivors, against the tests as they are now
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutation.equivalent import reason_for
from tests.mutation.operators import Mutant, mutants_of, sampled
from tests.mutation.server import Server
from tests.mutation.table import modules, tests_of

ROOT = Path(__file__).parents[2]
GOAL = 0.95


def main() -> int:
    """Run, print, and tell whether enough was caught."""
    options = _options()
    state: dict[str, Any] = {"controls": [], "results": {}}
    if options.json is not None and options.json.is_file():
        state = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory(prefix="surgery-mutation-") as folder:
        tree = Path(folder) / "tree" if options.json is None else options.json.resolve().with_suffix(".tree")
        if options.retry:
            shutil.rmtree(tree, ignore_errors=True)
            state["controls"] = []
            state["results"] = {key: each for key, each in state["results"].items() if each["caught"]}
        if not options.report:
            _work(options, state, tree)
    return _summary(state["results"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--json", type=Path, help="results: read where there are some, written after every mutant")
    parser.add_argument("--only", action="append", default=[], help="a module, or the beginning of its path")
    parser.add_argument("--limit", type=int, help="so many mutants at most")
    parser.add_argument("--one-in", type=int, default=20, help="of each function's mutants, at least one")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--most", type=float, default=90, help="seconds of processor time for one mutant")
    parser.add_argument("--retry", action="store_true", help="run the survivors again, on a fresh copy")
    parser.add_argument("--report", action="store_true", help="only print what was found so far")
    return parser.parse_args()


def _work(options: argparse.Namespace, state: dict[str, Any], tree: Path) -> None:
    began = time.monotonic()
    chosen = _chosen(options, tree)
    server = Server(ROOT, tree)
    done, wanted = 0, [mutant for mutant in chosen if mutant.key not in state["results"]]
    wanted = wanted[: options.limit]
    for mutant in wanted:
        if time.monotonic() - began > options.seconds:
            break
        with server.changed(mutant.path, mutant.applied(server.source(mutant.path).read_bytes())):
            outcome = server.run(tests_of(mutant.path), options.most)
        entry = {**asdict(mutant), "caught": not outcome.passed, "by": outcome.by, "seconds": outcome.seconds}
        state["results"][mutant.key] = entry
        done += 1
        print(f"{'SURVIVED' if outcome.passed else 'caught  '} {outcome.seconds:5.1f} s {mutant.key}", flush=True)
        _save(options, state)
    print(f"{done} of {len(wanted)} run in {time.monotonic() - began:.0f} s")
    if done == len(wanted):
        _control(server, state)
        _save(options, state)


def _control(server: Server, state: dict[str, Any]) -> None:
    """The tests that caught something pass on the unchanged copy, or what they caught does not count.

    Raises:
        SystemExit: one fails there.
    """
    named = {each["by"] for each in state["results"].values() if each["caught"] and "::" in each["by"]}
    new = sorted(named - set(state["controls"]))
    if not new:
        return
    outcome = server.run([f"tests/{name}" for name in new], 600)
    if not outcome.passed:
        raise SystemExit(f"{outcome.by} fails without any change")
    state["controls"] += new
    print(f"the {len(new)} tests that caught something pass unchanged")


def _save(options: argparse.Namespace, state: dict[str, Any]) -> None:
    if options.json is not None:
        options.json.write_text(json.dumps(state, indent=1))


def _chosen(options: argparse.Namespace, tree: Path) -> list[Mutant]:
    """Mutants of the copy, where there is one: its lines are the ones that are changed."""
    found = []
    for module in modules(ROOT):
        copied = tree / (f"surgery/{module}" if module.startswith("converters/") else module)
        if not options.only or any(module.startswith(name) for name in options.only):
            found += mutants_of(module, (copied if copied.is_file() else ROOT / module).read_bytes())
    chosen = sampled(found, options.one_in, options.seed)
    # In an order that visits all modules alike, so that what is done after a part of the run stands for the whole.
    random.Random(options.seed).shuffle(chosen)
    return chosen


def _summary(results: dict[str, dict[str, Any]]) -> int:
    survived = [key for key, each in results.items() if not each["caught"]]
    equivalent = [key for key in survived if reason_for(key)]
    left = sorted(set(survived) - set(equivalent))
    caught = len(results) - len(survived)
    print(f"\n{'module':34} made caught equivalent survived")
    for module in sorted({each["path"] for each in results.values()}):
        own = [key for key, each in results.items() if each["path"] == module]
        counts = Counter("caught" if results[k]["caught"] else "same" if reason_for(k) else "left" for k in own)
        print(f"{module:34} {len(own):4} {counts['caught']:6} {counts['same']:10} {counts['left']:8}")
    for key in left:
        print(f"survived: {key} (line {results[key]['line']})")
    for key in equivalent:
        print(f"equivalent: {key} ({reason_for(key)})")
    counted = caught + len(left)
    share = caught / counted if counted else 0.0
    print(
        f"{len(results)} mutants: {caught} caught, {len(equivalent)} equivalent, {len(left)} survived: "
        f"{share:.1%} of those that change anything are caught (at least {GOAL:.0%} wanted)"
    )
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
