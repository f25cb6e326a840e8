"""Some of the matrix in each run of the tests; `python -m tests.architectures` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.matrix import trial

# Each of another kind: renamed, split, joined, experts, an encoder, a text model inside another model.
NAMES = ["gpt2", "mixtral", "qwen3_moe", "nemotron_h", "vit", "siglip", "llava", "mllama", "qwen2_5_vl", "detr"]


@pytest.mark.parametrize("names", ["files", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_merge_load_and_convert_give_the_dense_sum(name: str, names: str, tmp_path: Path) -> None:
    found = trial(name, tmp_path, names)
    assert set(found.values()) == {"equal"}, found
