"""The picture of an adapter or a model."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures(ending: str, lora: Path, model_folder, tmp_path: Path) -> None:
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    for name, path, options in (
        ("lora", lora, {}),
        ("model", model_folder("t5"), {}),
        ("spectra", model_folder("gpt2"), {"spectra": True}),
    ):
        picture = tmp_path / f"{name}{ending}"
        assert surgery.inspect(path, picture, **options).out == str(picture)
        assert picture.read_bytes().startswith(begins) and picture.stat().st_size > 5000
    assert not list(tmp_path.glob(".*"))


def test_a_picture_shows_every_layer_and_role(lora: Path, tmp_path: Path) -> None:
    surgery.inspect(lora, tmp_path / "lora.svg")
    text = (tmp_path / "lora.svg").read_text()
    for words in ("self_attn.q_proj", "mlp.down_proj", "share of the squared norm", "lora: LORA adapter"):
        assert f"<!-- {words}" in text
