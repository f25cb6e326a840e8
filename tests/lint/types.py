"""The control of the type checker: calls of methods that do not exist must fail, on both sides of surgery.converters.

mypy is run with one module replaced in memory by itself and a planted call. Should one of these runs pass, mypy does
not see across the packages, and its silence about the true sources would mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["PLANTED", "problems"]

# A module -> what is added to it, and the error that must come of it.
PLANTED: dict[str, tuple[str, str]] = {
    "surgery/cli/convert.py": (
        "from surgery.converters.report import ConvertReport as _Planted\n_Planted.no_such_method()\n",
        '"type[ConvertReport]" has no attribute "no_such_method"',
    ),
    "surgery/converters/report.py": (
        "from surgery.adapters.adapter import Adapter as _Planted\n_Planted.no_such_method()\n",
        '"type[Adapter]" has no attribute "no_such_method"',
    ),
}
USER = """
import surgery

adapter = surgery.Adapter.open("lora")
made, report = surgery.convert(adapter, to="giva")
report.no_such_method()
made.no_such_method()
"""
USER_ERRORS = (
    '"ConvertReport" has no attribute "no_such_method"',
    '"Adapter" has no attribute "no_such_method"',
)


def problems(root: Path) -> list[str]:
    """Return a line for each planted call that the type checker did not find."""
    found = []
    for module, (lines, expected) in PLANTED.items():
        with tempfile.TemporaryDirectory() as folder:
            planted = Path(folder) / "planted.py"
            planted.write_text((root / module).read_text(encoding="utf-8") + lines, encoding="utf-8")
            output = _mypy(root, "--shadow-file", module, str(planted))
        if expected not in output:
            found.append(f"{module}: mypy does not see a planted call of a method that does not exist")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "user.py"
        script.write_text(USER, encoding="utf-8")
        output = _mypy(Path(folder), "--strict", "--config-file=", str(script))
    found += [f"a user's script: mypy does not report {error}" for error in USER_ERRORS if error not in output]
    return found


def _mypy(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
