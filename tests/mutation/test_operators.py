"""The changes that the mutation check makes."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.operators import mutants_of, sampled


def changes(expression: str) -> set[str]:
    """What is made of one expression, without its outer parentheses."""
    source = f"def f(a, b, c):\n    return {expression}\n".encode()
    texts = [mutant.applied(source).decode() for mutant in mutants_of("m.py", source)]
    return {ast.unparse(ast.parse(text).body[0].body[0].value) for text in texts}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a + b", {"a - b"}),
        ("a * b", {"a / b", "a", "b"}),
        ("a / 2", {"a * 2", "a", "a / 3"}),
        ("a @ b.T", {"b.T @ a", "a @ b", "a.T @ b.T"}),
        ("-a", {"a"}),
        ("a < b", {"a >= b", "a <= b"}),
        ("a and b", {"a or b"}),
        ("b if a else c", {"c if a else b"}),
        ("a.sqrt()", {"a"}),
        ("math.sqrt(a)", {"a"}),
        ("a.sum(0)", {"a.mean(0)", "a.sum(1)"}),
        ("max(a, b)", {"min(a, b)"}),
        ("torch.where(a, b, c)", {"torch.where(a, c, b)"}),
        ("a[:b]", {"a[:b - 1]"}),
        ("a[1:, b]", {"a[2:, b]"}),
        ("f(a, keepdim=True)", {"f(a, keepdim=False)"}),
        ("'text' + a", set()),
        ("f'{a + b}'", set()),
    ],
)
def test_what_is_made_of_an_expression(expression: str, expected: set[str]) -> None:
    assert changes(expression) == expected


def test_only_formulas_are_broken() -> None:
    source = b"""
LIMIT = 2 * 3

def f(a: int | None = 1 + 1) -> None:
    assert a > 0
    if a > 3:
        raise ValueError(f"{a + 1}")
    if a > 4:
        a += 1

class C:
    def notes(self, a):
        return a * 2

    def g(self, a):
        return a * a
"""
    found = mutants_of("m.py", source)
    assert {(m.function, m.before) for m in found} == {("f", "a > 4"), ("f", "a += 1"), ("C.g", "a * a")}
    # Two of equal text are told apart, and every one of them can be read.
    assert [m.key for m in found if m.after == "(a)"] == [
        "m.py::C.g: a * a -> (a)",
        "m.py::C.g: a * a -> (a) #2",
    ]
    for mutant in found:
        ast.parse(mutant.applied(source))
        assert mutant.applied(source) != source


def test_places_are_counted_in_bytes() -> None:
    source = 'def f(a):\n    """σ."""\n    return "σ", a - 1\n'.encode()
    texts = {mutant.applied(source).decode() for mutant in mutants_of("m.py", source)}
    assert 'def f(a):\n    """σ."""\n    return "σ", (a + 1)\n' in texts


def test_samples_are_fair_and_the_same_again() -> None:
    source = b"def f(a):\n    return a * a + a @ a - a[:2] * 3\n\ndef g(a):\n    return -a\n"
    mutants = mutants_of("m.py", source)
    chosen = sampled(mutants, 4)
    assert [m.function for m in chosen] == ["f", "f", "f", "g"]
    assert {m.key for m in chosen} == {m.key for m in sampled(mutants[::-1], 4)}
    assert len({m.kind for m in chosen[:3]}) == 3
    assert len(sampled(mutants, 1)) == len(mutants) and len(sampled(mutants, 100)) == 2
