"""surgery compare does what the library call does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import surgery
from tests.helpers.command_line import contents, flags, invoke


def test_command_equals_library_call(pair, llama: Path, texts: Path) -> None:
    options = {"base": llama, "data": texts, "batch_size": 4, "samples": 8, "seed": 3}
    result = invoke("compare", *pair, *flags(**options), "--no-latency", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    library = surgery.compare(*pair, **options, latency=False).to_dict()
    assert report.pop("seconds") > 0 and library.pop("seconds") > 0
    for path in ("a", "b", "base"):
        library[path] = str(library[path])
    assert report == json.loads(json.dumps(library))
    assert {"command", "a", "b", "base", "weight_error", "output_error", "agreement", "kl"} <= set(report)
    assert {"source_bytes", "bytes", "ratio", "sites"} <= set(report) and report["command"] == "compare"
    assert {"module", "rank_a", "rank_b", "weight_error", "output_error"} <= set(report["sites"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.jsonl"], "--base MODEL"),
        (["--samples", "4"], "--samples"),
        (["--no-latency", "--max-length", "9"], "--max-length, --no-latency"),
        (["--task", "causal-lm"], "--base MODEL"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, pair) -> None:
    result = invoke("compare", *pair, *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_a_named_error_is_one_line(pair, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = invoke("compare", pair[0], tmp_path / "missing")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    assert contents(tmp_path) == before


def test_progress(pair, llama: Path, texts: Path) -> None:
    told: list[tuple[int, int, str]] = []
    surgery.compare(*pair, base=llama, data=texts, batch_size=4, latency=False, progress=lambda *a: told.append(a))
    assert [each[:2] for each in told] == [*((n, 9) for n in range(1, 10)), (4, 11), (8, 11), (11, 11)]
