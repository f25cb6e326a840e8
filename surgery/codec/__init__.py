"""The codec of packed factors: integers of few bits, chosen for the whole model, and their bytes.

`encode_layer` and `decode_layer` do one layer's factors. They are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.codec.one_layer import CodedLayer, decode_layer, encode_layer

__all__ = ["CodedLayer", "decode_layer", "encode_layer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'surgery.codec' has no attribute {name!r}")
    from surgery.codec import one_layer

    return getattr(one_layer, name)
