"""Which unquantised model a quantised one was made from, by the names that their makers give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["unquantized_advice", "unquantized_name"]

# How the names of quantised copies end. Unsloth's copies lie beside their originals; others' need not.
ENDINGS = re.compile(
    r"[-_.](unsloth-bnb-4bit|bnb-4bit|bnb-8bit|4bit|8bit|int4|int8|w4a16|w8a8|w8a16|awq|gptq|fp8|fp8-dynamic|nf4|hqq|aqlm"
    r"|gptq-int[48]|awq-int4|quantized\.[\w.-]+)$",
    re.IGNORECASE,
)


def unquantized_name(name: str, config: Mapping[str, Any] | None = None) -> str | None:
    """Return the name of the model that a quantised one is a copy of; None where nothing says so.

    Args:
        name: a Hub id or a folder's name.
        config: its `config.json`, where `_name_or_path` may name the original.
    """
    told = str((config or {}).get("_name_or_path") or "")
    for each in (told, name):
        plain = each.partition("@")[0].rstrip("/")
        while ENDINGS.search(plain):
            plain = ENDINGS.sub("", plain)
        is_id = plain.count("/") == 1 and not plain.startswith((".", "/", "~"))
        if is_id and plain != name and (each == told or plain != each):
            return plain
    return None


def unquantized_advice(name: str, config: Mapping[str, Any] | None = None) -> str:
    """Return what to give in place of a quantised model."""
    found = unquantized_name(name, config)
    return "give the unquantised model" + (f", which by its name is {found}: --base {found}" if found else "")
