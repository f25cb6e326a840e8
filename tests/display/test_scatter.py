"""Names beside the points of a picture."""

from __future__ import annotations

from surgery.display.scatter import Point, named_points


def test_points_that_lie_together_get_one_name_that_counts_them() -> None:
    points = [Point("a", 0, 0, "LORA"), Point("b", 1, 1, "LORA"), Point("c", 1, 0.99, "LORA"), Point("d", 0.5, 1, "X")]
    assert [name for _, name in named_points(points)] == ["a", "b and 1 more", "d"]
    assert [point.name for point, _ in named_points(points)] == ["a", "b", "d"]


def test_equal_points_and_none_at_all_have_names_too() -> None:
    assert [name for _, name in named_points([Point("a", 2, 3, "X"), Point("b", 2, 3, "X")])] == ["a and 1 more"]
    assert named_points([]) == []
