"""Settings of the data that are not understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bad_input import check_usage_error


@pytest.mark.parametrize("value", ["q_proj", "q_proj=", "=3", "q_proj=two", "q_proj=0", "q_proj=16,-16"])
def test_split_that_is_not_understood(value: str, learner: Path, tmp_path: Path) -> None:
    args = ["init", learner, "--method", "giva", "--data", "data.jsonl", "--split", value]
    check_usage_error(tmp_path, f"'--split': {value!r} is not NAME=N or NAME=A,B,C", *args)
