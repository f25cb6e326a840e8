"""Changes that no test can or should notice, and why: by the name of the mutant."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

EQUIVALENT: dict[str, str] = {}
