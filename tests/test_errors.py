"""The errors that users catch."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery import errors


def test_all_are_exported_and_children_of_one() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len(kinds) > 8
    for kind in kinds:
        assert issubclass(kind, surgery.SurgeryError) and getattr(surgery, kind.__name__) is kind
        assert kind.__name__ in surgery.__all__


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"device": "tpu7"}, {"dtype": "int8"}, {"num_labels": 0, "task": "seq-cls"}]
)
def test_a_wrong_option_is_a_value_error(options: dict, llama: Path) -> None:
    with pytest.raises(ValueError) as caught:
        surgery.init(llama, "vera", dry_run=True, **options)
    assert type(caught.value) is surgery.OptionError


def test_what_is_not_finite_has_a_name(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.NumericsError, match="is not finite in"):
        surgery.init(llama, "inilora", alpha=1e-30, dtype="float16")
