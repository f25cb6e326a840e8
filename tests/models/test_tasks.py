"""Tasks: those of the table, and those that a base model has no class for."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import CheckpointError
from tests.helpers.bad_input import check_refused


@pytest.mark.parametrize("task", ["image-cls", "masked-lm", "seq2seq-lm"])
def test_task_without_a_class(task: str, llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, CheckpointError, (task, "'llama'"), llama, task=task)
