"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress"]

# Called with the number of steps done, the number of all steps, and the name of the step that is next.
Progress = Callable[[int, int, str], None]
