"""What a layer's output grows by is the difference that the changed weight makes, for every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from surgery.deltas.on_layers import added_output
from surgery.deltas.operators import LowRank, WithBias

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "convolution": (nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 9)),
    "convolution of signals": (nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 8)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_difference_of_two_layers(kind: str, bias: bool) -> None:
    layer, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    width = layer.weight[0].numel()
    low_rank = LowRank(torch.randn(5, 2, generator=generator), torch.randn(2, width, generator=generator))
    grown = torch.randn(5, generator=generator)
    x = torch.randn(shape, generator=generator)
    changed = copy.deepcopy(layer).double()
    with torch.no_grad():
        changed.weight += low_rank.dense().double().reshape(changed.weight.shape)
        if bias:
            changed.bias += grown
        expected = changed(x.double()) - copy.deepcopy(layer).double()(x.double())
        found = added_output(layer, WithBias(low_rank, grown) if bias else low_rank, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_embeddings_look_their_change_up_and_scale_it(scale: float | None) -> None:
    layer = nn.Embedding(11, 6)
    if scale is not None:
        layer.embed_scale = scale
    delta = LowRank(torch.randn(6, 2), torch.randn(2, 11))  # the transpose of the table's change
    tokens = torch.tensor([[3, 0, 10]])
    torch.testing.assert_close(added_output(layer, delta, tokens), delta.dense().T[tokens] * (scale or 1.0))
