"""Tables and summaries, in terminals of any width."""

from __future__ import annotations

import pytest

from surgery.display.tables import summary, table

HEADER = ["role", "layers", "shape", "rank"]
ROWS = [["layer.*.query", "6", "384 x 384", "1 to 16"], ["head", "1", "4 x 384", "-"]]


def test_columns_are_aligned() -> None:
    lines = table(HEADER, ROWS, right=(1,)).splitlines()
    assert lines[0] == "role           layers  shape      rank"
    assert lines[2] == "layer.*.query       6  384 x 384  1 to 16"
    assert table(HEADER, ROWS, right=(1,), width=len(lines[1])).splitlines() == lines


@pytest.mark.parametrize("width", [24, 30, 40])
def test_a_table_that_is_too_wide_becomes_paragraphs(width: int) -> None:
    text = table(HEADER, ROWS, right=(1,), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert " ".join(text.split()) == (
        "layer.*.query layers 6; shape 384 x 384; rank 1 to 16 head layers 1; shape 4 x 384; rank -"
    )
    assert all("384 x 384" in text and cell in text for cell in ("1 to 16", "4 x 384"))  # no cell is broken


def test_a_long_value_goes_on_below_itself() -> None:
    pairs = [("A", "lora/: LORA, 36 layers, rank 16, 1,327,104 parameters"), ("agreement", "99.1 % of the samples")]
    assert summary(pairs, width=40) == (
        "A          lora/: LORA, 36 layers, rank\n           16, 1,327,104 parameters\nagreement  99.1 % of the samples"
    )
    assert summary(pairs, width=15) == summary(pairs)  # too narrow for columns
    assert len(summary(pairs).splitlines()) == 2
    path = "/a/path/that/nobody/wants/broken/in/two/because-it-is-copied"
    assert path in summary([("written", path)], width=40)
