"""A tensor again, from what autograd keeps for the backward pass anyway.

The input of a linear layer is needed beside the gradient at its output, but autograd keeps it only for weights that
train. Most such inputs come from a normalisation, an activation or an attention whose own operands autograd does
keep; computing that last step again costs next to nothing, holding its result for every layer costs as much memory
as all the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["is_rebuildable", "rebuild"]

# How far the repeated step may be from the first, relative to the largest entry, by dtype: other kernels round
# otherwise.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DEPTH = 8
# Entries that are compared; what is wrong with a rebuilt tensor is wrong nearly everywhere in it.
SAMPLE = 1 << 14


def is_rebuildable(tensor: torch.Tensor) -> bool:
    """Whether `rebuild(tensor.grad_fn)` gives this tensor, found by doing it.

    False under checkpointing and other hooks on saved tensors, where what autograd keeps is not at hand.
    """
    if tensor.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    with torch.no_grad():
        found = rebuild(tensor.grad_fn)
    if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
        return False
    if found.data_ptr() == tensor.data_ptr():
        return True
    first, again = (_sample(each).float() for each in (tensor.detach(), found))
    return float((again - first).abs().max()) <= TOLERANCE.get(tensor.dtype, 0.0) * float(first.abs().max())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Entries from all over a tensor: whole last rows of it, evenly spread."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows[:: max(1, tensor.numel() // SAMPLE)]


def rebuild(node: Any, depth: int = DEPTH) -> torch.Tensor | None:
    """The tensor that a node of the autograd graph produced; None where the node is of no known kind.

    To be called before the node's own backward has run, without gradients.
    """
    if node is None or depth == 0:
        return None
    name = type(node).__name__  # a node that was written in Python may have anything as its `name`
    known = _KNOWN.get(name)
    try:
        if known is not None:
            return known(node, depth)
        # Attention kernels and some activations keep their result.
        kept = getattr(node, "_saved_output", None) if "Attention" in name else None
        return kept if kept is not None else getattr(node, "_saved_result", None)
    except (AttributeError, RuntimeError, TypeError):  # saved otherwise than known here, changed in place, or freed
        return None


def _before(node: Any, depth: int, index: int = 0) -> torch.Tensor | None:
    """The operand of a node, rebuilt in its turn."""
    return rebuild(node.next_functions[index][0], depth - 1)


def _metadata(node: Any) -> Any:
    return node._input_metadata[0]


def _layer_norm(node: Any, depth: int) -> torch.Tensor | None:
    x, weight, bias = node._saved_input, node._saved_weight, node._saved_bias
    normed = (x - node._saved_result1) * node._saved_result2
    if weight is not None:
        normed = normed * weight
    return (normed if bias is None else normed + bias).to(_metadata(node).dtype)


def _multiply(node: Any, depth: int) -> torch.Tensor | None:
    # Of two factors autograd keeps each only for the other one's gradient.
    first, second = node._saved_self, node._saved_other
    first = _before(node, depth, 0) if first is None else first
    second = _before(node, depth, 1) if second is None else second
    return None if first is None or second is None else first * second


def _then(change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[Any, int], torch.Tensor | None]:
    """A step that changes its operand's shape or dtype alone."""

    def again(node: Any, depth: int) -> torch.Tensor | None:
        before = _before(node, depth)
        return None if before is None else change(before, node)

    return again


def _signed(dimension: int) -> int:
    """Negative dimensions are kept as unsigned 64-bit numbers."""
    return dimension - (1 << 64) if dimension >= 1 << 63 else dimension


_RESHAPED = _then(lambda x, node: x.reshape(tuple(_metadata(node).shape)))
_KNOWN: dict[str, Callable[[Any, int], torch.Tensor | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _multiply,
    "GeluBackward0": lambda node, depth: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node, depth: F.silu(node._saved_self),
    "ViewBackward0": _RESHAPED,
    "UnsafeViewBackward0": _RESHAPED,
    "ReshapeAliasBackward0": _RESHAPED,
    "CloneBackward0": _then(lambda x, node: x),
    "TransposeBackward0": _then(lambda x, node: x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1))),
    "ToCopyBackward0": _then(lambda x, node: x.to(_metadata(node).dtype)),
}
