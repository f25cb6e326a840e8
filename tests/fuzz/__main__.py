"""`python -m tests.fuzz`: break inputs, run every command over them, and count."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.isolated import Limits, Place, import_everything


def main() -> int:
    """Exit code 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=5000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one: part of a run, or one again")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    parser.add_argument("--seconds", type=float, default=20, help="limit of a command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--show", action="store_true", help="print what every mutant came to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-fuzz-") as folder:
        import_everything(Path(folder) / "cache")
        from tests.fuzz.campaign import Campaign, table
        from tests.fuzz.specimens import make_specimens
        from tests.helpers.guard import sitecustomize

        for owner, attribute, checked in sitecustomize.guards():
            setattr(owner, attribute, checked)
        make_specimens(Path(folder) / "specimens")
        campaign = Campaign(
            Path(folder) / "specimens", Place(Path(folder) / "place"), options.seed, Limits(seconds=options.seconds)
        )
        counts: Counter[tuple[str, str]] = Counter()
        wrong = campaign.controls()
        began = time.perf_counter()
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
        for verdict in campaign.verdicts(range(options.first, options.first + options.mutants)):
            counts[verdict.mutant.scenario.command, verdict.kind] += 1
            if verdict.wrong:
                wrong.append(str(verdict))
                print(verdict, file=sys.stderr, flush=True)
            elif options.show:
                last = (verdict.outcome.stderr.strip().splitlines() or [""])[-1]
                mutant = verdict.mutant
                took = f"{mutant.scenario.name}, {mutant.adapter}, {mutant.seconds:.2f} s"
                print(f"{mutant.number} {verdict.kind} ({took}): {mutant.done} {last}", file=sys.stderr)
        campaign.place.clear()
    seconds = time.perf_counter() - began
    if options.json:
        rows = {f"{command} {kind}": count for (command, kind), count in sorted(counts.items())}
        print(json.dumps({"mutants": options.mutants, "seconds": round(seconds, 1), "counts": rows, "wrong": wrong}))
    else:
        print(table(counts))
        print(f"seed {options.seed}, mutants {options.first} to {options.first + options.mutants - 1}, {seconds:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
