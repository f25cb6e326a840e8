"""Registries: names without imports, entries when they are asked for, and plugins that fail cost their entry alone."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint

import pytest

from surgery.system import registry as module
from surgery.system.registry import Registry


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two installed plugins, of which one cannot be imported."""
    found = [
        EntryPoint("good", "string:ascii_letters", "surgery.test"),
        EntryPoint("broken", "no_such_module:x", "surgery.test"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: found if group == "surgery.test" else [])


@pytest.mark.usefixtures("points")
def test_own_entries_come_first_and_broken_plugins_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    registry: Registry[str] = Registry("surgery.test", "word", str, {"own": "string:digits"})
    assert registry.names() == ["own", "good", "broken"]
    assert "good" in registry and "none" not in registry and registry.get("none") is None
    assert registry.is_plugin("good") and not registry.is_plugin("own")
    with caplog.at_level(logging.WARNING, "surgery"):
        assert list(registry) == ["0123456789", sys.modules["string"].ascii_letters]
    assert "word 'broken' cannot be imported and is left out" in caplog.text
    assert registry.names() == ["own", "good"]
