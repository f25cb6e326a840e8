"""Tests of members as the command line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.blending.naming import parsed_member
from surgery.errors import OptionError


def test_a_name_with_a_weight_and_without(tmp_path: Path) -> None:
    assert parsed_member("lora/=0.7") == ("lora/", 0.7)
    assert parsed_member("org/name=-1e-1") == ("org/name", -0.1)
    assert parsed_member("lora") == ("lora", 1.0)
    odd = tmp_path / "rank=8"
    odd.mkdir()
    assert parsed_member(str(odd)) == (str(odd), 1.0)
    assert parsed_member(f"{odd}=2") == (str(odd), 2.0)


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(OptionError, match=r"lora=much: 'much' is no number; write ADAPTER=WEIGHT"):
        parsed_member("lora=much")
