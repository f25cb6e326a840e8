"""diffusers and kohya (sd-scripts): export targets that are known by name and not written yet."""

from __future__ import annotations

from surgery.formats.server import ServerFormat

__all__ = ["DIFFUSERS", "KOHYA"]


class DiffusionFormat(ServerFormat):
    """Adapters of diffusion models."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.planned = f"{title} reads adapters of diffusion models, which are not written yet"


DIFFUSERS, KOHYA = DiffusionFormat("diffusers"), DiffusionFormat("kohya (sd-scripts)")
