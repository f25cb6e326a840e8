"""Regular expressions that come with an adapter: refused where matching them could take too long.

PEFT matches them with `re`, which nothing stops once it has begun. An engine with a time limit (`regex`) would not
tell: it shortens many patterns that `re` takes hours for. So what is bounded is the number of ways in which `re` can
try one name, from its own parse of the pattern; names are then tried one after the other against the clock.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from surgery.errors import AdapterError

__all__ = ["check_patterns"]

SECONDS = 10.0  # far more than any honest pattern needs for the names of a large model
MOST_WAYS = 2.0**28  # of one name: five `.*` in a row, a few seconds; the widest honest patterns have four
MOST_CHARACTERS = 4_000_000  # every layer of a large model of experts by its full name takes a quarter of this
FEW_COUNTS, FEW_ALTERNATIVES = 4, 16
MOST_BITS, MOST_RUNS = 64, 64  # beyond reason, and beyond what a float holds
GREEDY = re.compile(r"[*+?{(|]")  # without these a pattern cannot take long
# What PEFT makes of the patterns under a key; a list under the first ones holds names.
WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")
KEYS = {
    **dict.fromkeys(WHOLE, "%s"),
    "layers_pattern": r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?(%s)$"),
    **dict.fromkeys(("n_frequency_pattern", "block_size_pattern"), r".*\.%s$"),
}


def check_patterns(where: Path | None, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that matching an adapter's patterns with module names ends in reasonable time.

    Args:
        where: the adapter's folder, for the message.
        config: its configuration.
        names: of the model's modules.

    Raises:
        AdapterError: it does not.
    """
    longest = max(map(len, names), default=0)
    limit = time.monotonic() + SECONDS
    for key, pattern in _patterns(config):
        if len(pattern) > MOST_CHARACTERS:
            raise _refused(where, key, pattern, f"is longer than {MOST_CHARACTERS:,} characters")
        whole = KEYS[key] % pattern
        try:
            if _ways(whole, longest) > MOST_WAYS:
                raise _refused(where, key, pattern, "can be matched in too many ways (repetition inside repetition)")
            for name in names:
                (re.fullmatch if key in WHOLE else re.match)(whole, name)
                if time.monotonic() > limit:
                    raise _refused(where, key, pattern, f"takes longer than {SECONDS:.0f} s to match")
        except RecursionError:
            raise _refused(where, key, pattern, "is nested too deeply") from None
        except (re.error, ArithmeticError):
            pass  # no pattern: whoever uses it says so


def _refused(where: Path | None, key: str, pattern: str, why: str) -> AdapterError:
    return AdapterError(f"{where}: {key} holds a pattern that {why}: {pattern!r:.80}; name the modules instead")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in KEYS:
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else () if key in WHOLE else value or ():
            if isinstance(pattern, str) and GREEDY.search(pattern):
                yield key, pattern


@lru_cache(maxsize=16)
def _ways(pattern: str, longest: int) -> float:
    """At most so many ways has `re` to try a pattern on a name of `longest` characters, before it gives up.

    Raises:
        re.error, OverflowError: it is no pattern.
    """
    bits, runs = _freedom(parser.parse(pattern), longest)
    if runs > MOST_RUNS or bits > MOST_BITS:
        return math.inf
    return 2.0**bits * math.comb(longest + runs, runs) * max(1.0, pattern.count("|") / FEW_ALTERNATIVES)


def _freedom(nodes: Any, longest: int) -> tuple[float, int]:
    """(bits, runs) of a sequence: 2^bits choices, and `runs` places where it may stop anywhere in the name."""
    bits, runs = 0.0, 0
    for (kind, value), following in pairwise([*nodes, (None, None)]):
        match str(kind):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                more = (0.0, 0) if _ends_at(value[2], *following) else _repeated(value, longest)
            case "BRANCH":
                more = _one_of(value[1], longest)
            case "GROUPREF_EXISTS":
                more = _one_of([each for each in value[1:] if each is not None], longest)
            case "SUBPATTERN":
                more = _freedom(value[3], longest)
            case "ASSERT" | "ASSERT_NOT":
                more = _freedom(value[1], longest)
            case "ATOMIC_GROUP":
                more = _freedom(value, longest)
            case _:
                continue  # one character, a position, what a group has matched: there is one way
        bits, runs = bits + more[0], runs + more[1]
    return bits, runs


def _repeated(repeat: tuple[int, int, Any], longest: int) -> tuple[float, int]:
    least, most, body = repeat
    bits, runs = _freedom(body, longest)
    shortest = body.getwidth()[0]
    times = int(min(most, longest // shortest if shortest else longest + least))
    counts = max(times - least, 0) + 1
    if not bits and not runs:
        return (math.log2(counts), 0) if counts <= FEW_COUNTS else (0.0, 1)
    return bits * times + math.log2(counts), runs * times


def _ends_at(body: Any, kind: Any, letter: Any) -> bool:
    """Whether a run of one kind of character has one possible end: the letter that follows is not of that kind."""
    single = len(body) == 1 and str(body[0][0]) in {"IN", "LITERAL", "NOT_LITERAL"}
    return single and str(kind) == "LITERAL" and compiler.compile(body).match(chr(letter)) is None


def _one_of(alternatives: Sequence[Any], longest: int) -> tuple[float, int]:
    """Of alternatives only those can match at one place whose first letters agree as far as both go."""
    starts = [_start(each) for each in alternatives]
    known = Counter(starts)
    agreeing = max(sum(known[start[:length]] for length in range(len(start) + 1)) for start in starts)
    each = [_freedom(alternative, longest) for alternative in alternatives]
    return max(bits for bits, _ in each) + math.log2(agreeing), max(runs for _, runs in each)


def _start(nodes: Any) -> str:
    """The letters that a sequence begins with."""
    letters = []
    for kind, value in nodes:
        if str(kind) != "LITERAL":
            break
        letters.append(chr(value))
    return "".join(letters)
