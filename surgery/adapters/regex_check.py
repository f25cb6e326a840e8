"""Regular expressions that come with an adapter: tried out where they can be stopped, before anybody waits for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import AdapterError

__all__ = ["check_patterns"]

SECONDS = 10.0  # far more than any honest pattern needs for the names of a large model
GREEDY = re.compile(r"[*+?{(]")  # without these a pattern cannot take long
# What PEFT makes of the patterns under a key.
KEYS = {
    "target_modules": "%s",
    "exclude_modules": "%s",
    "layers_pattern": r".*\.%s\.(\d+)\.",
    "rank_pattern": r"(.*\.)?(%s)$",
    "alpha_pattern": r"(.*\.)?(%s)$",
}
# The engine that will match them, in a process of its own: nothing else stops it.
TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    print(json.dumps(pattern), flush=True)
    try:
        for name in names:
            re.fullmatch(pattern, name)
    except (re.error, ArithmeticError, RuntimeError):
        pass  # whoever uses it says so
"""


def check_patterns(where: Path | None, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that matching an adapter's patterns with module names ends in reasonable time.

    Args:
        where: the adapter's folder, for the message.
        config: its configuration.
        names: of the model's modules.

    Raises:
        AdapterError: it does not.
    """
    patterns = {KEYS[key] % pattern: (key, pattern) for key, pattern in _patterns(config)}
    if not patterns or not sys.executable:
        return
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        work = json.dumps([list(patterns), list(names)])
        subprocess.run(command, check=False, input=work, text=True, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        begun = (output if isinstance(output, str) else output.decode()).splitlines()
        key, pattern = patterns[json.loads(begun[-1])] if begun else next(iter(patterns.values()))
        raise AdapterError(
            f"{where}: {key} holds a pattern that takes longer than {SECONDS:.0f} s to match ({pattern!r:.80}); "
            "name the modules instead"
        ) from None


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in KEYS:
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else value or ():
            if GREEDY.search(pattern):
                yield key, pattern
