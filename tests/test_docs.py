"""The docs say what is true: generated parts are fresh, commands are mentioned, README's code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from surgery.catalogue import METHODS
from surgery.cli.main import COMMANDS
from tests.models import minilm_folder
from tests.texts import docstring_rows, write_rows

ROOT = Path(__file__).parents[1]


def test_generated_parts_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_command_and_method_is_documented() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text()
    methods = (ROOT / "docs" / "methods.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"## surgery {name}\n" in reference
        assert f"surgery {name}" in readme
    for info in METHODS.values():
        assert f"`{info.name}`" in methods and info.paper in methods


def test_local_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_code_runs(tmp_path: Path) -> None:
    """The command and the Python blocks, one after another in one folder, with `model` and data in it."""
    (tmp_path / "model").symlink_to(minilm_folder())
    write_rows(tmp_path / "train.jsonl", [{**row, "label": row["label"] % 4} for row in docstring_rows(4)])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    surgery = Path(sys.executable).with_name("surgery")
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^\$ surgery (.+)$", readme, re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert commands and len(blocks) >= 2
    runs = [[str(surgery), *command.split()] for command in commands] + [[sys.executable, "-c", b] for b in blocks]
    for run in runs:
        result = subprocess.run(run, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, f"{run}\n{result.stderr}"
