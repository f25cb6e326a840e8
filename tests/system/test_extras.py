"""Packages that come with an extra."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

import surgery
from surgery.errors import DataError, OptionError
from surgery.system.extras import EXTRAS, extra_package
from surgery.training.curve import CURVE_FILE, PICTURE_FILE, write_curve

ROOT = Path(__file__).parents[2]


def test_the_extras_are_pyprojects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"PIL": "pillow"}
    for module, extra in EXTRAS.items():
        package = names.get(module, module)
        assert any(entry.startswith(f"{package}>=") for entry in project["optional-dependencies"][extra])
        assert not any(entry.startswith(f"{package}>=") for entry in project["dependencies"])


def test_a_missing_package_names_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^x needs the package datasets: pip install 'adapter-surgery\[train\]'"):
        extra_package("datasets", "x", DataError)
    assert extra_package("json", "x", DataError).__name__ == "json"


def test_pictures_without_matplotlib(monkeypatch, llama: Path, tmp_path: Path) -> None:
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "matplotlib"), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"adapter-surgery\[plot\]"):
        surgery.inspect(llama, plot=tmp_path / "a.png")
    rows = [{"step": 1, "loss": 0.5}]
    assert "adapter-surgery[plot]" in str(write_curve(rows, tmp_path, "title"))
    assert (tmp_path / CURVE_FILE).is_file() and not (tmp_path / PICTURE_FILE).exists()
