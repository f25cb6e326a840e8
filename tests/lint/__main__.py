"""`python -m tests.lint [types]`: print what breaks a rule of the house, and exit 1 if anything does."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lint import imports, mirror, types

ROOT = Path(__file__).resolve().parents[2]

if sys.argv[1:] == ["types"]:
    found = types.problems(ROOT)
else:
    found = imports.problems(imports.import_graph(ROOT)) + mirror.problems(ROOT)
for line in found:
    print(line)
sys.exit(1 if found else 0)
