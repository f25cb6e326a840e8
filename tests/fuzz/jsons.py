"""Ways in which a JSON file can be wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["STRANGE_NAMES", "mutate_json"]

STRANGE_NAMES = (
    "", " ", ".", "..", "/", "../../elsewhere/model.safetensors", "/etc/passwd", "a/../b", "a\\b", "model.layers.0",
    "\x00", "\x1b[2J\x07", "\n\nError: all is well", "\ud800", "ü😀", "%s{0}", "(", "x" * 5000, "base_model.model.",
    "__class__", "None", "-o",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 1000, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**40, 2**63, 10**30,
    -(10**30),
)  # fmt: skip


def nested(depth: int, value: Any = 0) -> Any:
    """A value inside so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def strange(rng: random.Random) -> Any:
    """A value that is hardly what was expected."""
    return rng.choice(
        (
            lambda: rng.choice((None, True, False)),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(STRANGE_NAMES),
            lambda: rng.choice(([], {}, [[]], [None], [1, 2, 3], ["q_proj"], {"": 0}, {"a": {"b": None}})),
            lambda: nested(rng.choice((50, 500))),
            lambda: [rng.choice(NUMBERS)] * rng.choice((1, 3, 2000)),
        )
    )()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key in it."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


Edit = Callable[[Any, Any, random.Random], str]


def _replace(container: Any, key: Any, rng: random.Random) -> str:
    container[key] = strange(rng)
    return f"{key!r:.60} = {container[key]!r:.60}"


def _rescale(container: Any, key: Any, rng: random.Random) -> str:
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _replace(container, key, rng)
    container[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)))
    return f"{key!r:.60}: {value!r} -> {container[key]!r}"


def _remove(container: Any, key: Any, rng: random.Random) -> str:
    del container[key]
    return f"without {key!r:.60}"


def _rename(container: Any, key: Any, rng: random.Random) -> str:
    if not isinstance(container, dict):
        return _replace(container, key, rng)
    name = rng.choice(STRANGE_NAMES)
    container[name] = container.pop(key)
    return f"{key!r:.60} renamed {name!r:.60}"


def _wrap(container: Any, key: Any, rng: random.Random) -> str:
    container[key] = rng.choice(([container[key]], {"value": container[key]}, [container[key], container[key]]))
    return f"{key!r:.60} wrapped"


def _swap(container: Any, key: Any, rng: random.Random) -> str:
    other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]
    return f"{key!r:.60} and {other!r:.60} swapped"


def _add(container: Any, key: Any, rng: random.Random) -> str:
    if isinstance(container, dict):
        name = rng.choice(STRANGE_NAMES)
        container[name] = strange(rng)
        return f"with {name!r:.60} = {container[name]!r:.60}"
    container.append(strange(rng))
    return f"{container[-1]!r:.60} appended"


EDITS: tuple[Edit, ...] = (_replace, _replace, _replace, _rescale, _rescale, _remove, _rename, _wrap, _swap, _add)


def mutate_json(path: Path, rng: random.Random) -> str:
    """Change one entry of a JSON file; what was done."""
    value = json.loads(path.read_text())
    found = places(value)
    # The outermost entries are what is looked at most.
    outer = [place for place in found if place[0] is value]
    container, key = rng.choice(outer if outer and rng.random() < 0.6 else found)
    if rng.random() < 0.06 and isinstance(container, dict):
        text = json.dumps(value)
        again = json.dumps({str(key): strange(rng)})[1:-1]
        path.write_text(f"{text[:-1]}, {again}}}" if rng.random() < 0.5 else f"{{{again}, {text[1:]}")
        return f"{path.name}: {again:.60} twice"
    done = rng.choice(EDITS)(container, key, rng)
    path.write_text(json.dumps(value))
    return f"{path.name}: {done}"
