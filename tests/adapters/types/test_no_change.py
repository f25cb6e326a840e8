"""Types without a weight change are known by name, and refused with the reason."""

from __future__ import annotations

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from surgery.adapters.types.no_change import NO_CHANGE
from surgery.adapters.types.registry import type_of


@pytest.mark.parametrize("name", NO_CHANGE)
def test_each_is_a_type_of_peft_that_is_refused_with_its_reason(name: str) -> None:
    assert name in peft.PeftType.__members__
    entry = type_of({"peft_type": name})
    assert entry is not None and entry is NO_CHANGE[name]
    assert entry.reason.startswith(f"{entry.title} ") and "with PEFT" in entry.reason


def test_every_type_of_peft_is_read_or_refused_by_what_it_is() -> None:
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        found = type_of({"peft_type": str(getattr(kind, "value", kind))})
        assert found is not None, kind
