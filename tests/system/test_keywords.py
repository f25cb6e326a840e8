"""Keywords in the field's spelling and in short: both are taken, not together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import surgery
from surgery.errors import OptionError
from surgery.system.keywords import SHORT_SPELLINGS, keywords
from tests.helpers.calls import VERBS

# Keyword -> its short spelling, and the calls that take both.
KEYWORDS: dict[str, tuple[str, set[str]]] = {
    "target_modules": ("target", {"init"}),
    "lora_alpha": ("alpha", {"init"}),
    "max_steps": ("steps", {"train"}),
    "learning_rate": ("lr", {"train"}),
    "gradient_accumulation_steps": ("accumulate", {"train"}),
    "lr_scheduler_type": ("schedule", {"train"}),
    "warmup_ratio": ("warmup", {"train"}),
    "save_steps": ("save_every", {"train"}),
    "overwrite": ("force", {"init", "convert", "train", "merge", "export", "Adapter.save", "Adapter.save_pretrained"}),
}
PAIRS = [(call, name, short) for name, (short, calls) in KEYWORDS.items() for call in sorted(calls)]


def call_named(name: str) -> Callable[..., Any]:
    found: Any = surgery
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_table_of_keywords_is_complete() -> None:
    assert {name: short for name, (short, _) in KEYWORDS.items()} == dict(SHORT_SPELLINGS)
    for verb in (*VERBS, "Adapter.save", "Adapter.save_pretrained", "Adapter.open"):
        taken = set(inspect.signature(call_named(verb)).parameters)
        assert taken & set(KEYWORDS) == {name for name, (_, calls) in KEYWORDS.items() if verb in calls}, verb
        assert not taken & set(SHORT_SPELLINGS.values()), verb


@pytest.mark.parametrize(("call", "name", "short"), PAIRS)
def test_both_spellings_are_taken_and_not_together(call: str, name: str, short: str) -> None:
    function = call_named(call)
    with pytest.raises(OptionError, match=f"{name} and {short}, two spellings of one option"):
        function(**{name: 1, short: 1})
    # Whatever a call lacks besides, it is not this keyword: Python names what is missing.
    for spelling in (name, short):
        with pytest.raises(TypeError, match="missing"):
            function(**{spelling: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        function(no_such_option=1)


def test_spellings_reach_the_call() -> None:
    @keywords()
    def verb(first: int, *, max_steps: int = 1, overwrite: bool = False) -> tuple[int, int, bool]:
        return first, max_steps, overwrite

    assert verb(3) == (3, 1, False)
    assert verb(3, steps=5, force=True) == verb(3, max_steps=5, overwrite=True) == (3, 5, True)  # type: ignore[call-arg]
    assert verb(first=3) == (3, 1, False)
    with pytest.raises(TypeError):
        verb(3, first=4)  # type: ignore[misc]
    with pytest.raises(TypeError):
        verb(3, 4)  # type: ignore[misc]
