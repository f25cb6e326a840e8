"""A model that the caller has loaded, where a base model on disk is expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from surgery.checkpoints.base_model import BaseModel
from surgery.sites import Site, select_sites

__all__ = ["LiveModel"]


class LiveModel(BaseModel):
    """A loaded `nn.Module`: its layers and their names, no files.

    Args:
        model: any module; a transformers model also brings its name and configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = getattr(model, "name_or_path", "") or ""
        self.folder = Path(self.name)
        self.config = getattr(model, "config", None)
        self.model = model
        self.live = model
        self.task = None
        self._sources = {}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def select(self, targets: Sequence[str] = (), present: bool = True) -> list[Site]:
        """The sites that `targets` name, see `select_sites`."""
        return select_sites(self.model, targets)

    def refuse_quantized(self) -> None:
        """Quantised layers are as good as others where only gradients are read."""
