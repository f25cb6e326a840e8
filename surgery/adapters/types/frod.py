"""Stock PEFT's FROD (doi 10.1609/aaai.v40i31.39813): its file lacks U, so that it is opened as our portable type."""

from __future__ import annotations

from surgery.adapters.types.refused import RefusedType

__all__ = ["FROD"]

FROD = RefusedType(
    "FROD",
    "FRoD",
    "doi 10.1609/aaai.v40i31.39813",
    "a stock FROD file lacks U; surgery.load(adapter, base) opens it as FROD_PORTABLE, which save_pretrained writes",
    opened_as="surgery.adapters.stock_frod:portable_frod",
)
