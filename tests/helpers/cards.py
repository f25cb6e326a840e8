"""The names on the cards of the tests."""

from __future__ import annotations

REPO, BASE = "org/small", "bases/llama"
