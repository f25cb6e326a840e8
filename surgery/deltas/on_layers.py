"""What a weight change adds to the output of a layer of torch: a linear, an embedding, a convolution."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from surgery.deltas.operators import Delta, Gain, WithBias

__all__ = ["added_output", "by_channel", "gained_output"]


def added_output(layer: nn.Module, delta: Delta, x: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
    """Return what a layer's output grows by when its weight, as a matrix `(out, in)`, and its bias change by `delta`.

    Args:
        layer: the layer at the bottom, below any wrapper.
        delta: the change; of an embedding `(num, dim)` that of its transpose, of a convolution that of its weight as
            a matrix `(out, in * kernel)`.
        x: the layer's input; tokens for an embedding.
        output: the layer's own output for this input, where it is at hand: gains on rows need no product then.
    """
    bias = delta.bias.to(x.device) if isinstance(delta, WithBias) else None
    gain, rest = (delta.change if isinstance(delta, WithBias) else delta).gain_apart()
    if gain is None:
        return _added(layer, delta, x, bias)
    added = gained_output(layer, gain, x, output)
    if rest is not None:
        added = added + _added(layer, rest, x, None)
    return added if bias is None else added + by_channel(layer, bias).to(added)


def gained_output(layer: nn.Module, gain: Gain, x: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
    """Return what gains on a layer's weight add to its output; its bias has none of them.

    Args:
        layer: the layer at the bottom.
        gain: the gains; without a weight they are on that of the layer.
        x: the layer's input.
        output: the layer's own output for this input, or None.
    """
    if gain.rows is not None and gain.columns is None and output is not None:
        own = output.to(gain.rows.dtype)
        bias = getattr(layer, "bias", None)
        own = own if bias is None else own - by_channel(layer, bias).to(own)
        return own * by_channel(layer, gain.rows)
    if gain.weight is None:
        vector = gain.rows if gain.rows is not None else gain.columns
        assert vector is not None
        gain = gain.on(_matrix(layer).detach().to(vector.dtype))
    return _added(layer, gain, x, None)


def _added(layer: nn.Module, delta: Delta, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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


def by_channel(layer: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    """Return a vector `(out,)` in the shape in which it meets the layer's output."""
    return vector.reshape(-1, *(1 for _ in layer.kernel_size)) if isinstance(layer, _ConvNd) else vector


def _matrix(layer: nn.Module) -> torch.Tensor:
    """Return a layer's weight as a matrix `(out, in)`: a view."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, _ConvNd):
        return weight.flatten(1)
    # transformers' Conv1D stores (in, out), as embeddings do.
    return weight.T if isinstance(layer, nn.Embedding) or hasattr(layer, "nf") else weight
