"""Kills at random moments of `surgery init`, `convert` and `merge`: what resumed runs come to, and what is left.

python benchmarks/kills.py                  # 20 kills of each case
python benchmarks/kills.py --kills 3 --case "init frod"

A run is killed (SIGKILL) some times in a row, each time a little later or earlier, and then left to its end. Its output
must be that of a run in one go to the last byte, with nothing beside it. Runs are forked from a process that has done
its imports, so that kills fall into the work. Units are written as soon as they are finished, which a run of a few
seconds would not do by itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import Llama, write_llama, write_lora
from surgery.display.tables import table

SHAPE = Llama(num_hidden_layers=4, hidden_size=256, intermediate_size=704, num_attention_heads=4, vocab_size=256)
IN_A_ROW = 4
CASES = {
    "init inilora": ("init", "model", "--method", "inilora"),
    "init frod": ("init", "model", "--method", "frod"),
    "init smoa": ("init", "model", "--method", "smoa"),
    "convert lora to smoa": ("convert", "lora", "--to", "smoa", "--base", "model", "--accept-loss"),
    "convert lora to giva": ("convert", "lora", "--to", "giva"),
    "merge": ("merge", "lora", "--base", "model"),
}


@dataclass
class Tally:
    """What was seen of one case: kills in the work, runs that found parts, and what went wrong."""

    kills: int = 0
    late: int = 0
    resumed: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Kill and resume; returns 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description="Kill runs of surgery at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--case", choices=list(CASES), action="append", help="default all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _prepare()
    draw = random.Random(options.seed)
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        os.chdir(place)
        _write_inputs()
        for name in options.case or CASES:
            tally = _case(CASES[name], options.kills, draw)
            faults += [f"{name}: {fault}" for fault in tally.faults]
            state = "all byte-equal, nothing left" if not tally.faults else f"{len(tally.faults)} FAULTS"
            rows.append([name, str(tally.kills), str(tally.late), str(tally.resumed), str(tally.finished), state])
        os.chdir("/")
    header = ["case", "kills in the work", "after its end", "runs that found parts", "resumed to the end", "results"]
    print(table(header, rows, right=(1, 2, 3, 4)))
    print("\n".join(faults))
    return 1 if faults else 0


def _prepare() -> None:
    """All imports, before anything is forked; one thread, as threads do not outlive a fork."""
    import torch

    from surgery.storage import resume as parts

    for module in (
        "transformers.models.llama.modeling_llama",
        "surgery.converters.convert",
        "surgery.initialization.init",
    ):
        importlib.import_module(module)
    importlib.import_module("surgery.merging.merge")
    torch.set_num_threads(1)
    parts.BYTES, parts.SECONDS = 0, 0.0


def _write_inputs() -> None:
    write_llama(Path("model"), SHAPE, shards=4)
    write_lora(Path("lora"), SHAPE, 4)


def _case(command: Sequence[str], kills: int, draw: random.Random) -> Tally:
    tally = Tally()
    started = time.perf_counter()
    assert _run((*command, "-o", "expected/out")) == 0, command
    seconds = time.perf_counter() - started
    expected = _contents(Path("expected/out"))
    while tally.kills < kills:
        for _ in range(draw.randint(1, IN_A_ROW)):
            if tally.kills == kills or Path("work/out").exists():
                break
            tally.resumed += bool(_parts())
            if _killed((*command, "-o", "work/out"), draw.uniform(0, seconds)):
                tally.kills += 1
            else:
                tally.late += 1
        if not Path("work/out").exists():
            tally.resumed += bool(_parts())
            code = _run((*command, "-o", "work/out"))
            if code:
                tally.faults.append(f"the resumed run ended with {code}")
        tally.finished += 1
        left = sorted(path.name for path in Path("work").iterdir() if path.name != "out")
        if left:
            tally.faults.append(f"left beside the output: {', '.join(left)}")
        if not Path("work/out").is_dir() or _contents(Path("work/out")) != expected:
            tally.faults.append("the result is not that of a run in one go")
        shutil.rmtree("work")
    shutil.rmtree("expected")
    return tally


def _parts() -> list[Path]:
    """The finished parts of a run that was killed."""
    return list(Path("work").glob(".out.partial/.parts/*.safetensors"))


def _killed(command: Sequence[str], after: float) -> bool:
    """Begin a run and kill it; whether it had not ended before."""
    child = _started(command)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _run(command: Sequence[str]) -> int:
    """Run to the end; returns the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(_started(command), 0)[1])


def _started(command: Sequence[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from surgery.cli.main import cli

        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            cli.main(list(command), prog_name="surgery", standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
