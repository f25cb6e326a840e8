"""The members of a blend as the command line names them."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import OptionError

__all__ = ["parsed_member"]


def parsed_member(text: str) -> tuple[str, float]:
    """Split `ADAPTER=WEIGHT` into both; the weight of a name alone is 1.

    Raises:
        OptionError: the weight is no number.
    """
    name, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise OptionError(f"{text}: {weight!r} is no number; write ADAPTER=WEIGHT, as in lora/=0.5") from None
