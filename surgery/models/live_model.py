"""A model that the caller has loaded, where a base model on disk is expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from surgery.errors import CheckpointError
from surgery.models.base_model import TASKS, BaseModel, task_of
from surgery.models.sites import Site, select_sites

__all__ = ["LiveModel"]


class LiveModel(BaseModel):
    """A loaded `nn.Module`: its layers and their names, no files.

    Args:
        model: any module; a transformers model also brings its name and configuration.
        task: what it is for; default what its class says.

    Raises:
        CheckpointError: there is no such task.
    """

    def __init__(self, model: nn.Module, task: str | None = None) -> None:
        if task is not None and task not in TASKS:
            raise CheckpointError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
        self.name = getattr(model, "name_or_path", "") or ""
        self.folder = Path(self.name)
        self.config = getattr(model, "config", None)
        self.model = model
        self.live = model
        self.task = TASKS[task] if task is not None else None
        if self.task is None and isinstance(self.config, PretrainedConfig):
            self.task = task_of(type(model), self.config)
        self.values = dict(model.named_parameters())
        self._sources = {}
        self._names = None
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.values.items()}

    @property
    def sources(self) -> dict[str, Any]:
        """Every parameter is there, and nobody asks a live model for the files."""
        return dict.fromkeys(self.values)

    def select(self, targets: Sequence[str] = (), present: bool = True) -> list[Site]:
        """The sites that `targets` name, see `select_sites`."""
        return select_sites(self.model, targets)

    def refuse_quantized(self) -> None:
        """Quantised layers are as good as others where only gradients are read."""

    def parameter(self, name: str, check: bool = False) -> torch.Tensor:
        """A parameter's values, on the CPU."""
        value = self.values[name].detach()
        if value.device.type == "meta":
            raise CheckpointError(f"{name} is kept off the devices until it is used: its values cannot be read")
        return value.cpu()
