"""Adapters whose tensors are not all there, or of another version, are refused when they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel

import surgery
from surgery.errors import AdapterError
from surgery.storage.format_version import FORMAT_VERSION
from tests.helpers.bad_input import READS_WEIGHTS, WEIGHTS, Edit, case, check_words, configure_adapter
from tests.helpers.models import edit_tensors, load_base

LATER, UP_TO = FORMAT_VERSION + 1, f"up to {FORMAT_VERSION}"


def drop_last_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(max(tensors)), WEIGHTS)


def drop_all_tensors(folder: Path) -> None:
    edit_tensors(folder, dict.clear, WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        case("lacks-one", drop_last_tensor, AdapterError, ("lacks 1 of", "layers.2.self_attn.v_proj.")),
        case("lacks-all", drop_all_tensors, AdapterError, ("the file lacks",)),
        case(
            "from-the-future", configure_adapter(format_version=LATER), AdapterError, (f"version {LATER}", UP_TO, "pip")
        ),
        case("format-not-a-number", configure_adapter(format_version="x"), AdapterError, ("version x", UP_TO)),
    ],
)
@pytest.mark.parametrize(
    ("method", "through"), [*((method, "peft") for method in READS_WEIGHTS), ("smoa", "surgery.load")]
)
def test_broken_adapter(method: str, edit: Edit, error, words, through: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out")
    edit(tmp_path / "out")
    with pytest.raises(error) as caught:
        if through == "peft":
            PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
        else:
            surgery.load(tmp_path / "out", llama)
    check_words(words, str(caught.value), tmp_path)


@pytest.mark.parametrize(
    ("method", "edit", "word"),
    [
        case("vera-lacks-one", "vera", drop_last_tensor, "lacks 1 of"),
        case("unknown-type", "inilora", configure_adapter(peft_type="NOPE"), "NOPE"),
        case("rank-of-another-file", "inilora", configure_adapter(r=3), "q_proj"),
    ],
)
def test_adapter_that_load_should_refuse(method: str, edit: Edit, word: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out")
    edit(tmp_path / "out")
    with pytest.raises(AdapterError, match=word):
        surgery.load(tmp_path / "out", llama)
