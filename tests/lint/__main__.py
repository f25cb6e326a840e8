"""`python -m tests.lint`: print what breaks a rule of the house, and exit 1 if anything does."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lint.imports import import_graph, problems

ROOT = Path(__file__).resolve().parents[2]

found = problems(import_graph(ROOT))
for line in found:
    print(line)
sys.exit(1 if found else 0)
