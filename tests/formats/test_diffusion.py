"""Formats of diffusion models are planned: their names are known, and a run says that they are not written yet."""

from __future__ import annotations

from surgery.formats.diffusion import DIFFUSERS, KOHYA


def test_they_say_that_they_are_planned() -> None:
    assert DIFFUSERS.planned.startswith("diffusers reads adapters of diffusion models")
    assert KOHYA.planned.startswith("kohya (sd-scripts) reads")
