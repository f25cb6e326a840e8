"""Counts of outcomes by type, and why a test cannot apply to a type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.peft_suite.tables import CONFIGS, OURS

__all__ = ["Counts", "counted", "table"]

# What a failed test says -> why it cannot apply.
REASONS: tuple[tuple[str, str], ...] = (
    ("Regex pattern did not match", "refused as PEFT refuses it, but the test wants PEFT's words"),
    ("is not a linear layer", "on an embedding or convolution: refused by name, linear layers only"),
    (
        "was made from other base weights",
        "the test opens it on other random weights: refused by the base's fingerprint",
    ),
    ("test_from_pretrained_cache_dir", "asks the Hub"),
    (
        r"test_only_params_are_updated\[Vanilla MLP [34] FROD_PORTABLE",
        "FRoD's four sparse entries get no gradient on the test's weight of two rows",
    ),
    (r"isinstance\(\[.*, set\)", "target_modules stays a list in order, where PEFT makes a set of it"),
)


@dataclass
class Counts:
    """Outcomes of the tests of one type."""

    ours: bool
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    cannot_apply: Counter[str] = field(default_factory=Counter)


def counted(outcomes: Mapping[str, Mapping[str, str]]) -> dict[str, Counts]:
    """Return the counts of each type."""
    found = {name: Counts(name in OURS.values()) for name in CONFIGS.values()}
    for test, outcome in outcomes.items():
        counts = found[outcome["type"]]
        if outcome["outcome"] == "passed":
            counts.passed += 1
            continue
        reason = _reason(test, outcome)
        if reason is None:
            counts.failed[test] = outcome["said"]
        else:
            counts.cannot_apply[reason] += 1
    return found


def _reason(test: str, outcome: Mapping[str, str]) -> str | None:
    said = f"{test} {outcome['said']}"
    for pattern, reason in REASONS:
        if re.search(pattern, said):
            return reason
    return f"PEFT: {outcome['said'].partition(': ')[2]}" if outcome["outcome"] == "skipped" else None


def table(found: Mapping[str, Counts], shown: int) -> str:
    """Return the counts as text: a row for each type, then the reasons, then what failed."""
    lines = ["| type | passed | failed | cannot apply |", "|---|---|---|---|"]
    for name, counts in found.items():
        lines.append(f"| {name} | {counts.passed} | {len(counts.failed)} | {counts.cannot_apply.total()} |")
    for name, counts in found.items():
        lines += ["", f"{name}: cannot apply"] if counts.cannot_apply else []
        lines += [f"  {number:4d}  {reason}" for reason, number in counts.cannot_apply.most_common()]
    for name, counts in found.items():
        lines += ["", f"{name}: failed"] if counts.failed else []
        lines += [f"  {test}: {said[:300]}" for test, said in list(counts.failed.items())[:shown]]
    return "\n".join(lines)
