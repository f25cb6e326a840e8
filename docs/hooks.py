"""Hooks of the docs site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Pages that measurements write; they take their place in the navigation as soon as they are there.
MEASURED = {"results.md", "reliability.md", "scale.md"}


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that are yet to be measured; any other missing page fails the build."""
    absent = {page for page in MEASURED if not (Path(config.docs_dir) / page).exists()}
    config.nav = _without(config.nav, absent)
    return config


def _without(nav: Any, absent: set[str]) -> Any:
    if isinstance(nav, list):
        return [kept for entry in nav if (kept := _without(entry, absent)) is not None]
    if isinstance(nav, dict):
        kept = {title: _without(entry, absent) for title, entry in nav.items()}
        return {title: entry for title, entry in kept.items() if entry is not None} or None
    return None if nav in absent else nav
