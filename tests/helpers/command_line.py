"""Running the command line inside the test process, and seeing what it leaves on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from surgery.cli.main import cli


def invoke(*args: Any) -> Result:
    """Run `surgery` with these arguments; an exception that is not a named error fails the test with its traceback."""
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="surgery", catch_exceptions=False)


def flags(**options: Any) -> list[str]:
    """The options of a library call as they are written on the command line."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "store_bases":
            words += [] if value else ["--no-store-bases"]
        elif name == "branch_ranks":
            words.append(f"{flag}={','.join(map(str, value))}")
        elif isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, dict):
            parts = {key: ",".join(map(str, each if isinstance(each, list) else [each])) for key, each in value.items()}
            words += [f"{flag}={key}={each}" for key, each in parts.items()]
        elif isinstance(value, (list, tuple)):
            words += [f"{flag}={item}" for item in value]
        else:
            words.append(f"{flag}={value}")
    return words


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with the bytes of each file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
