"""Ways to break base models, adapters and outputs, and the check that what is broken is refused in one line.

`model` and `learner` are fixtures of every test (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import SurgeryError
from surgery.storage.safetensors_write import write_tensors
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.models import edit_tensors
from tests.helpers.texts import save_tokenizer

READS_WEIGHTS = ("frod", "inilora", "smoa")
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Edit = Callable[[Path], Any]


def case(name: str, *values: Any, bug: str | None = None) -> Any:
    """One row of a table of cases; `bug` says what is still wrong in surgery."""
    return pytest.param(*values, id=name, marks=[pytest.mark.xfail(strict=True, reason=bug)] if bug else [])


def check_refused(
    place: Path,
    error: type[SurgeryError],
    words: tuple[str, ...],
    model: Path,
    method: str = "inilora",
    out: Path | None = None,
    **options: Any,
) -> None:
    """The library raises `error`, the command line prints it in one line, and nothing in `place` changes."""
    before = contents(place)
    out = out or place / "out"
    with pytest.raises(error) as caught:
        surgery.init(model, method, out, **options)
    assert isinstance(caught.value, error)
    assert contents(place) == before
    result = invoke("init", model, "--method", method, "-o", out, *flags(**options))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {' '.join(str(caught.value).split())}\n"
    check_words(words, result.stderr, place)
    assert contents(place) == before


def check_words(words: tuple[str, ...], message: str, place: Path) -> None:
    """Every word is in the message; the name of the test, which is part of the path to `place`, does not count."""
    message = message.replace(str(place), "PLACE")
    assert [word for word in words if word not in message] == []


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def write(name: str, data: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def configure(**changes: Any) -> Edit:
    """Change entries of config.json; an ellipsis removes one."""

    def edit(folder: Path) -> None:
        settings = {**json.loads((folder / CONFIG).read_text()), **changes}
        write(CONFIG, json.dumps({key: value for key, value in settings.items() if value is not ...}))(folder)

    return edit


def rewrite(change: Callable[[bytes], bytes], name: str = SINGLE) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = Q_PROJ) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def without_tensor(name: str = Q_PROJ) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


NOT_JSON = "cannot be read as JSON"
INCOMPLETE = "not a complete safetensors file"


def entry(value: float) -> Edit:
    """Put a value into the last entry of a weight."""
    return tensor(lambda weight: weight.clone().index_put_((torch.tensor(-1), torch.tensor(-1)), torch.tensor(value)))


def check_usage_error(place: Path, word: str, *args: Any) -> None:
    """Exit code 2, one line that begins with `Error: ` after click's hint, and nothing in `place` changes."""
    before = contents(place)
    with contextlib.chdir(place):
        result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert word in errors[0]
    assert contents(place) == before


@pytest.fixture
def learner(model: Path) -> Path:
    """The tiny Llama with a tokenizer, to be broken."""
    return save_tokenizer(model)


def nothing(folder: Path) -> None:
    """Leave the model as it is."""


def occupy(folder: Path) -> Path:
    """Put something at the output that must not be lost."""
    (folder / "sub").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "sub" / ".hidden").write_text("hidden")
    return folder


def fail(error: BaseException) -> Callable[..., None]:
    def act(*args: Any, **kwargs: Any) -> None:
        raise error

    return act


def half_then(act: Callable[..., None]) -> Callable[..., None]:
    """A `write_tensors` that writes half of the file before something happens."""

    def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        write_tensors(path, tensors, metadata)
        os.truncate(path, path.stat().st_size // 2)
        act()

    return save


def configure_adapter(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return edit
