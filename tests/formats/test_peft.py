"""A broken adapter folder is refused with the file and what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import surgery
from surgery.errors import AdapterError, CheckpointError, SurgeryError
from tests.helpers.bad_input import (
    INCOMPLETE,
    NOT_JSON,
    WEIGHTS,
    Edit,
    case,
    check_words,
    configure_adapter,
    replace_by_file,
    rewrite,
    write,
)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        case("no-such-folder", shutil.rmtree, CheckpointError, ("no such folder",)),
        case("a-file", replace_by_file, CheckpointError, ("is a file",)),
        case(
            "no-config",
            lambda folder: (folder / "adapter_config.json").unlink(),
            AdapterError,
            ("no adapter_config.json", "not an adapter folder"),
        ),
        case("config-not-json", write("adapter_config.json", "{"), AdapterError, ("adapter_config.json", NOT_JSON)),
        case("config-a-list", write("adapter_config.json", "[]"), AdapterError, ("adapter_config.json", "list")),
        case("no-type", configure_adapter(peft_type=...), AdapterError, ("adapter_config.json", "peft_type")),
        case("no-weights", lambda folder: (folder / WEIGHTS).unlink(), AdapterError, (WEIGHTS,)),
        case(
            "a-pickle-that-is-none",
            lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
            AdapterError,
            ("adapter_model.bin", "cannot be read"),
        ),
        case("weights-cut", rewrite(lambda data: data[: len(data) // 2], WEIGHTS), AdapterError, (WEIGHTS, INCOMPLETE)),
        case("weights-garbage", write(WEIGHTS, "nonsense" * 9), AdapterError, (WEIGHTS, INCOMPLETE)),
        case("provenance-not-json", write("surgery.json", "{"), AdapterError, ("surgery.json", NOT_JSON)),
    ],
)
def test_broken_adapter_folder(edit: Edit, error, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "vera", tmp_path / "out", rank=4)
    edit(tmp_path / "out")
    with pytest.raises(SurgeryError) as caught:
        surgery.Adapter.open(tmp_path / "out")
    assert isinstance(caught.value, error)
    check_words(("PLACE/out", *words), str(caught.value), tmp_path)
