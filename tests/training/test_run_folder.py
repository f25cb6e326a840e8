"""The hidden folder of a training: what is gone on with, and what is not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.errors import MethodError, OutputError
from surgery.training.run_folder import Unfinished
from tests.helpers.training_resumed import OPTIONS, STEPS, assert_same_end, stopped


def test_a_checkpoint_that_a_kill_cut_short_is_not_used(begun_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(begun_place, out, 34)
    last = tmp_path / ".out.unfinished" / "checkpoint-34"
    (last / "complete").unlink()
    (last / "optimizer.pt").write_bytes(b"cut")
    assert Unfinished(out).step == 30
    surgery.train(
        begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, resume=True, **OPTIONS
    )
    assert_same_end(out, begun_place)


def test_resume_without_anything_to_go_on_from(begun_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(
        begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, resume=True, **OPTIONS
    )
    assert not any("goes on" in note for note in report.notes)
    assert_same_end(out, begun_place)


def test_other_options_are_not_gone_on_with(begun_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    error = stopped(begun_place, out, 12)
    assert (error.signal, error.step, error.out) == (signal.SIGINT, 12, str(out))
    with pytest.raises(MethodError, match=r"12 steps are kept \(lr 0.003, now 0.01\); repeat .* --force"):
        surgery.train(
            begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, **{**OPTIONS, "lr": 0.01}
        )
    surgery.train(begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, **OPTIONS)
    assert_same_end(out, begun_place)


@pytest.mark.parametrize("options", [{"lr": 0.01, "overwrite": True}, {"resume": False, "overwrite": True}])
def test_a_training_that_starts_again(options: dict[str, Any], begun_place: Path, tmp_path: Path) -> None:
    """With other options and `overwrite`, or without `resume`: the steps that were kept count for nothing."""
    out = tmp_path / "out"
    stopped(begun_place, out, 12)
    with pytest.raises(OutputError, match="exists and is not empty"):  # the adapter as it was is not replaced
        surgery.train(
            begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, resume=False, **OPTIONS
        )
    given = {**OPTIONS, **options}
    _, report = surgery.train(begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, **given)
    assert report.steps_done == STEPS and not any("goes on" in note for note in report.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
