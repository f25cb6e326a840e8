"""`python -m tests.faults`: let every call of every write fail, and count."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.campaign import FAULTS, KILL, OPERATIONS, Rehearsal
from tests.faults.tracing import available
from tests.helpers.isolated import Place, import_everything

RACES = 6


def _write_in_place() -> None:
    import contextlib

    from surgery.display import heat_maps as plots

    plots.atomic_file = contextlib.nullcontext


def main() -> int:
    """Exit code 1 where anything is lost or half-written."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", help="one operation; repeatable")
    parser.add_argument("--fault", action="append", choices=[KILL, *FAULTS], help="one kind of fault; repeatable")
    parser.add_argument("--step", type=int, default=1, help="each N-th call only")
    parser.add_argument("--control", action="store_true", help="write pictures in place, which must be found wrong")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not available():
        print("calls are traced on Linux on x86-64 only", file=sys.stderr)
        return 2
    rows: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="surgery-faults-") as folder:
        import_everything(Path(folder) / "cache")
        from tests.fuzz.specimens import make_specimens

        if options.control:
            _write_in_place()
        make_specimens(Path(folder) / "specimens")
        for operation in OPERATIONS:
            if options.only and operation.name not in options.only:
                continue
            counts = rows.setdefault(operation.name, Counter())
            for replaces in (False, True) if operation.old else (False,):
                place = Place(Path(folder) / "place")
                rehearsal = Rehearsal(operation, replaces, Path(folder) / "specimens", place)
                said = rehearsal.prepare()
                counts["calls"] += len(rehearsal.calls)
                faults = options.fault or [KILL, *FAULTS]
                if not said:
                    for number in range(RACES if options.step == 1 else 1):
                        said += rehearsal.race(2 + number % 3)
                    said += rehearsal.denied()
                    said += map(str, rehearsal.findings(faults, options.step))
                print(*said, sep="\n", end="\n" if said else "", file=sys.stderr, flush=True)
                counts.update(rehearsal.counts)
                counts["wrong"] += len(said)
                wrong += said
    seconds = time.perf_counter() - began
    if options.json:
        print(json.dumps({"operations": rows, "wrong": wrong, "seconds": round(seconds, 1)}))
    else:
        columns = ["calls", KILL, *FAULTS, "race", "denied", "wrong"]
        print(f"{'operation':<12}" + "".join(f"{name:>8}" for name in columns))
        for name, counts in rows.items():
            print(f"{name:<12}" + "".join(f"{counts[column]:>8}" for column in columns))
        print(f"{seconds:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
