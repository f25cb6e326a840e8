"""Numbers as text."""

from __future__ import annotations

import re

__all__ = ["human_bytes", "human_seconds", "parse_bytes", "size_change"]

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def human_bytes(count: float) -> str:
    """Return bytes with a binary unit: `1.5 MiB`."""
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            return f"{count:.1f} {unit}"
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """Return a duration in its largest two units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next(index for index, (_, length) in enumerate(units) if whole >= length)
    (name, length), (next_name, next_length) = units[first], units[first + 1]
    rest = whole % length // next_length
    return f"{whole // length} {name}" + (f" {rest} {next_name}" if rest else "")


def size_change(before: float, after: float) -> str:
    """Return how two sizes relate: `20 x smaller`, `75 x larger`, `the same size`.

    Args:
        before: the source's size in bytes, above 0.
        after: the result's size in bytes, above 0.
    """
    times = f"{max(before, after) / min(before, after):.1f}".removesuffix(".0")
    if times == "1":
        return "the same size" if before == after else "about the same size"
    return f"{times} x {'smaller' if after < before else 'larger'}"


def parse_bytes(text: object) -> int:
    """Return a number of bytes written with or without a unit: `65536`, `64KiB`, `1.5MB`.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no size: give bytes, or a unit as in 64KiB or 1.5MB")
    return int(float(found[1]) * UNITS[found[2].upper()])
