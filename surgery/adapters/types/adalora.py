"""AdaLoRA (arXiv 2303.10512)."""

from __future__ import annotations

from surgery.adapters.types.refused import RefusedType

__all__ = ["ADALORA"]

ADALORA = RefusedType(
    "ADALORA",
    "AdaLoRA",
    "arXiv 2303.10512",
    "AdaLoRA prunes ranks while it trains; merge it with PEFT (merge_and_unload)",
)
