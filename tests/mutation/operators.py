"""How a formula can be broken: one small change of one expression, found by its place in the syntax tree."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = ["Mutant", "mutants_of", "sampled"]

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SHIFTED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
# Calls that are left out: `x.sqrt()` and `math.sqrt(x)` become `x`.
DROPPED = frozenset(
    {"sqrt", "square", "abs", "exp", "exp2", "log", "log2", "clamp", "clamp_min", "clip", "rint", "round"}
    | {"flip", "cumsum", "diff", "tril", "triu", "conj"}
)
_PAIRS = ("sum mean", "max min", "amax amin", "argmax argmin", "ceil floor", "all any", "minimum maximum", "zeros ones")
EXCHANGED = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}
LIBRARIES = frozenset({"np", "torch", "math"})
# What these return is text for the user, which other tests read.
TEXTS = frozenset({"notes", "_notes", "_smallest", "capped_rank_note", "__repr__"})


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: the file, from the root of the repository.
        function: the function it is in, with its class.
        line: where, from 1.
        kind: of the change.
        before, after: the expression.
        start, end: its bytes in the file.
        number: tells equal changes of one function apart.
    """

    path: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    number: int = 1

    @property
    def key(self) -> str:
        """Its name, which stays when lines move."""
        twin = f" #{self.number}" if self.number > 1 else ""
        return f"{self.path}::{self.function}: {self.before} -> {self.after}{twin}"

    def applied(self, source: bytes) -> bytes:
        """The file with the change in it."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """Every change of every formula in a file.

    Left out are what is not computed with: annotations, defaults, messages, and the conditions under which an error is
    raised.
    """
    visitor = _Visitor(path, source)
    visitor.visit(ast.parse(source))
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    for mutant in visitor.found:
        seen[mutant.key] = seen.get(mutant.key, 0) + 1
        found.append(replace(mutant, number=seen[mutant.key]))
    return found


def sampled(mutants: Sequence[Mutant], one_in: int, seed: int = 0) -> list[Mutant]:
    """One change in so many of each function, at least one, of as many kinds as there are; the same for one seed."""
    functions: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        functions.setdefault(f"{mutant.path}::{mutant.function}", []).append(mutant)
    chosen = []
    for name, group in functions.items():
        shuffled = sorted(group, key=lambda mutant: mutant.key)
        random.Random(f"{seed} {name}").shuffle(shuffled)
        turns: dict[str, int] = {}
        ranked = []
        for mutant in shuffled:
            turns[mutant.kind] = turns.get(mutant.kind, 0) + 1
            ranked.append((turns[mutant.kind], len(ranked), mutant))
        chosen += [mutant for _, _, mutant in sorted(ranked, key=lambda item: item[:2])[: -(-len(group) // one_in)]]
    return chosen


class _Visitor(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.found: list[Mutant] = []
        self._names: list[str] = []
        self._functions = 0
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node.name, node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in TEXTS:
            self._functions += 1
            self._within(node.name, node.body)
            self._functions -= 1

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error's message."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """For the type checker."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        guards = all(isinstance(statement, ast.Raise) for statement in node.body)
        for child in ([] if guards else [node.test, *node.body]) + node.orelse:
            self.visit(child)

    def generic_visit(self, node: ast.AST) -> None:
        if self._functions and isinstance(node, (ast.expr, ast.AugAssign)):
            for kind, changed in _changes(node):
                self._add(kind, node, changed)
        super().generic_visit(node)

    def _within(self, name: str, body: Sequence[ast.stmt]) -> None:
        self._names.append(name)
        for statement in body:
            self.visit(statement)
        self._names.pop()

    def _add(self, kind: str, node: ast.expr | ast.AugAssign, changed: ast.AST) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(changed))
        if before == after:
            return
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
            after = f"({after})"
        name = ".".join(self._names)
        self.found.append(Mutant(self.path, name, node.lineno, kind, before, after, start, end))


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Kind and result of every change of this one node."""
    match node:
        case ast.BinOp():
            yield from _of_binary(node)
        case ast.AugAssign() if type(node.op) in BINARY:
            yield "operator", _with(node, op=BINARY[type(node.op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield "sign", node.operand
        case ast.Compare(ops=[op]) if type(op) in NEGATED:
            yield "comparison", _with(node, ops=[NEGATED[type(op)]()])
            if type(op) in SHIFTED:
                yield "boundary", _with(node, ops=[SHIFTED[type(op)]()])
        case ast.BoolOp():
            yield "logic", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.IfExp():
            yield "branch", _with(node, body=node.orelse, orelse=node.body)
        case ast.Attribute(attr="T"):
            yield "transpose", node.value
        case ast.Call():
            yield from _of_call(node)
        case ast.Subscript():
            yield from _of_subscript(node)


def _of_binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if _is_text(node.left) or _is_text(node.right):
        return
    if type(node.op) in BINARY:
        yield "operator", _with(node, op=BINARY[type(node.op)]())
    if isinstance(node.op, ast.MatMult):
        yield "operands", _with(node, left=node.right, right=node.left)
        yield "transpose", _with(node, right=_transposed(node.right))
        yield "transpose", _with(node, left=_transposed(node.left))
    if isinstance(node.op, (ast.Mult, ast.Div, ast.Pow, ast.FloorDiv)):
        yield "scale", node.left
    if isinstance(node.op, ast.Mult):
        yield "scale", node.right
    for side in ("left", "right"):
        value = getattr(node, side)
        if isinstance(value, ast.Constant) and type(value.value) in {int, float}:
            yield "number", _with(node, **{side: ast.Constant(_other(value.value))})


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    of_library = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in LIBRARIES
    if name in DROPPED and (node.args if of_library else isinstance(node.func, ast.Attribute)):
        assert isinstance(node.func, ast.Attribute)
        yield "call", node.args[0] if of_library else node.func.value
    if name in EXCHANGED:
        other: ast.expr = ast.Name(EXCHANGED[name])
        if isinstance(node.func, ast.Attribute):
            other = _with(node.func, attr=EXCHANGED[name])
        yield "call", _with(node, func=other)
    if name == "where" and len(node.args) == 3:
        yield "branch", _with(node, args=[node.args[0], node.args[2], node.args[1]])
    if name in {"getattr", "get", "field", "enumerate"}:
        return
    for index, value in enumerate(node.args):
        if isinstance(value, ast.Constant) and type(value.value) in {int, bool}:
            changed: list[ast.expr] = [*node.args]
            changed[index] = ast.Constant(_other(value.value))
            yield "number", _with(node, args=changed)
    for index, keyword in enumerate(node.keywords):
        # `strict` is a check, and what the random state is where nothing is drawn does not matter.
        if keyword.arg in {"strict", "preserve_rng_state"}:
            continue
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool):
            flipped = ast.keyword(keyword.arg, ast.Constant(not keyword.value.value))
            yield "number", _with(node, keywords=[*node.keywords[:index], flipped, *node.keywords[index + 1 :]])


def _of_subscript(node: ast.Subscript) -> Iterator[tuple[str, ast.AST]]:
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for index, part in enumerate(parts):
        for changed in _shifted(part):
            new = [*parts[:index], changed, *parts[index + 1 :]]
            yield "index", _with(node, slice=ast.Tuple(new) if isinstance(node.slice, ast.Tuple) else changed)


def _shifted(part: ast.expr) -> Iterator[ast.expr]:
    if isinstance(part, ast.Slice):
        if part.upper is not None:
            yield _with(part, upper=_plus(part.upper, -1))
        if part.lower is not None:
            yield _with(part, lower=_plus(part.lower, 1))
    elif isinstance(part, ast.Constant) and type(part.value) is int:
        yield ast.Constant(part.value + 1)


def _plus(value: ast.expr, step: int) -> ast.expr:
    if isinstance(value, ast.Constant) and isinstance(value.value, int):
        return ast.Constant(value.value + step)
    return ast.BinOp(value, ast.Add() if step > 0 else ast.Sub(), ast.Constant(abs(step)))


def _other(value: float) -> float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 2 * value if value else 1.0


def _transposed(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.Attribute) and node.attr == "T" else ast.Attribute(node, "T")


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
