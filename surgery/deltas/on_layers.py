"""What a weight change adds to the output of a layer of torch: a linear, an embedding, a convolution."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from surgery.deltas.operators import Delta, WithBias

__all__ = ["added_output"]


def added_output(layer: nn.Module, delta: Delta, x: torch.Tensor) -> torch.Tensor:
    """Return what a layer's output grows by when its weight, as a matrix `(out, in)`, and its bias change by `delta`.

    Args:
        layer: the layer at the bottom, below any wrapper.
        delta: the change; of an embedding `(num, dim)` that of its transpose, of a convolution that of its weight as
            a matrix `(out, in * kernel)`.
        x: the layer's input; tokens for an embedding.
    """
    bias = delta.bias.to(x.device) if isinstance(delta, WithBias) else None
    if isinstance(layer, nn.Embedding):
        added = delta.looked_up(x)
        scale = getattr(layer, "embed_scale", None)  # Gemma's embeddings multiply what they look up
        added = added if scale is None else added * torch.as_tensor(scale).to(added)
    elif isinstance(layer, _ConvNd):
        weight = delta.dense().reshape(layer.weight.shape).to(x.dtype)
        # The layer's own padding, stride and dilation.
        return layer._conv_forward(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        added = delta.apply(x)
    return added if bias is None else added + bias.to(added)
