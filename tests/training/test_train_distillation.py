"""One adapter learns another's answers, on one copy of the base."""

from __future__ import annotations

ADAPTERS = {"llama": ("vera", "inilora"), "bert": ("vera", "giva")}
