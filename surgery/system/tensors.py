"""Names for the two types of which most signatures speak."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["TensorMap", "Tensors"]

Tensors = dict[str, torch.Tensor]
# Tensors by name that the receiver only reads.
TensorMap = Mapping[str, torch.Tensor]
