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


def is_rebuildable(tensor: torch.Tensor) -> bool:
    """Whether `rebuild(tensor.grad_fn)` gives this tensor, found by doing it, for the batch's first sample if it can.

    False under checkpointing and other hooks on saved tensors, where what autograd keeps is not at hand.
    """
    if tensor.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    with torch.no_grad():
        found = rebuild(tensor.grad_fn, first=True)
        if found is None:
            found = rebuild(tensor.grad_fn)
    if found is None or found.dtype != tensor.dtype or found.shape[1:] != tensor.shape[1:]:
        return False
    wanted = tensor.detach()[: found.shape[0]]
    if found.shape != wanted.shape or not found.numel():
        return False
    if found.data_ptr() == wanted.data_ptr():
        return True
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= TOLERANCE.get(tensor.dtype, 0.0) * scale


def rebuild(node: Any, depth: int = DEPTH, first: bool = False) -> torch.Tensor | None:
    """The tensor that a node of the autograd graph produced; None where the node is of no known kind.

    To be called before the node's own backward has run, without gradients.

    Args:
        node: `tensor.grad_fn`.
        depth: how many steps may be repeated.
        first: only for the first entry of every operand's first dimension, which is the batch.
    """
    if node is None or depth == 0:
        return None
    name = type(node).__name__  # a node that was written in Python may have anything as its `name`
    known = _KNOWN.get(name)
    try:
        if known is not None:
            return known(node, depth, first)
        # Attention kernels and some activations keep their result.
        kept = getattr(node, "_saved_output", None) if "Attention" in name else None
        return _part(kept if kept is not None else getattr(node, "_saved_result", None), first)
    except (AttributeError, RuntimeError, TypeError):  # saved otherwise than known here, changed in place, or freed
        return None


def _part(tensor: Any, first: bool) -> Any:
    return tensor[:1] if first and tensor is not None and tensor.ndim >= 2 else tensor


def _before(node: Any, depth: int, first: bool, index: int = 0) -> torch.Tensor | None:
    """The operand of a node, rebuilt in its turn."""
    return rebuild(node.next_functions[index][0], depth - 1, first)


def _metadata(node: Any) -> Any:
    return node._input_metadata[0]


def _layer_norm(node: Any, depth: int, first: bool) -> torch.Tensor | None:
    x, mean, scale = (_part(t, first) for t in (node._saved_input, node._saved_result1, node._saved_result2))
    # In place: fresh memory costs more than the arithmetic.
    normed = torch.sub(x, mean).mul_(scale)
    if node._saved_weight is not None:
        normed.mul_(node._saved_weight)
    if node._saved_bias is not None:
        normed.add_(node._saved_bias)
    return normed.to(_metadata(node).dtype)


def _multiply(node: Any, depth: int, first: bool) -> torch.Tensor | None:
    # Of two factors autograd keeps each only for the other one's gradient.
    left, right = node._saved_self, node._saved_other
    left = _before(node, depth, first, 0) if left is None else _part(left, first)
    right = _before(node, depth, first, 1) if right is None else _part(right, first)
    return None if left is None or right is None else left * right


def _then(change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[Any, int, bool], torch.Tensor | None]:
    """A step that changes its operand's shape or dtype alone."""

    def again(node: Any, depth: int, first: bool) -> torch.Tensor | None:
        before = _before(node, depth, first)
        return None if before is None else change(before, node)

    return again


def _signed(dimension: int) -> int:
    """Negative dimensions are kept as unsigned 64-bit numbers."""
    return dimension - (1 << 64) if dimension >= 1 << 63 else dimension


_RESHAPED = _then(lambda x, node: x.reshape(-1, *_metadata(node).shape[1:]))
_KNOWN: dict[str, Callable[[Any, int, bool], torch.Tensor | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _multiply,
    "GeluBackward0": lambda node, _, first: F.gelu(_part(node._saved_self, first), approximate=node._saved_approximate),
    "SiluBackward0": lambda node, _, first: F.silu(_part(node._saved_self, first)),
    "ViewBackward0": _RESHAPED,
    "UnsafeViewBackward0": _RESHAPED,
    "ReshapeAliasBackward0": _RESHAPED,
    "CloneBackward0": _then(lambda x, node: x),
    "TransposeBackward0": _then(lambda x, node: x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1))),
    "ToCopyBackward0": _then(lambda x, node: x.to(_metadata(node).dtype)),
}
