"""`make compat`: a part of the tests on released versions of PEFT, transformers and huggingface_hub.

    python -m tests.compat.matrix --folder FOLDER [--only NAME]

Each combination gets a folder with the packages that differ from the installed ones, which comes first in Python's
path; everything else, torch above all, is what is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What huggingface_hub below 2 asks the Hub with, and newer ones no longer bring; what transformers below 5.17 cuts
# texts with.
HTTPX = {"httpx": "0.28.1", "httpcore": "1.0.9", "certifi": "2026.10.19.post1"}
OLD = {"tokenizers": "0.22.2", **HTTPX}
# Name -> package versions that differ from the installed ones, each set as the packages ask for it. `peft` from the
# oldest supported to the newest, transformers and huggingface_hub from the oldest of pyproject.toml. PEFT before 0.21.2
# gets a transformers of its time: with 5.20 and newer it opens no encoder-decoder model, whichever the adapter.
COMBINATIONS: dict[str, dict[str, str]] = {
    "as installed": {},
    "peft 0.21.1": {"peft": "0.21.1", "transformers": "5.13.1", "huggingface-hub": "1.33.0", **OLD},
    "transformers 5.10": {"transformers": "5.10.1", "huggingface-hub": "1.33.0", **OLD},
    "transformers 5.13": {"transformers": "5.13.1", "huggingface-hub": "1.33.0", **OLD},
    "transformers 5.17": {"transformers": "5.17.0", "huggingface-hub": "1.33.0", **HTTPX},
    "transformers 5.20": {"transformers": "5.20.2"},
    "transformers 5.24": {"transformers": "5.24.0"},
    "huggingface_hub 1.33": {"transformers": "5.20.2", "huggingface-hub": "1.33.0", **HTTPX},
    "all the oldest": {"peft": "0.21.0", "transformers": "5.10.1", "huggingface-hub": "1.33.0", **OLD},
}
TESTS = (
    "tests/compat/test_stored.py",
    "tests/peft_types/test_registry.py",
    "tests/peft_types/test_loading.py",
    "tests/peft_types/test_layer.py",
    "tests/models/test_module_names.py",
    "tests/serving/test_store.py",
    "tests/adapters/test_contents.py",
    "tests/storage/test_hub_cache.py",
)


def main() -> int:
    """Run every combination; 0 where all passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat.matrix", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the packages are kept from one run to the next")
    parser.add_argument("--only", action="append", help="a combination by its name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder.resolve() if options.folder is not None else Path(name)
        chosen = {name: COMBINATIONS[name] for name in options.only or COMBINATIONS}
        outcomes = {name: _tried(packages, folder) for name, packages in chosen.items()}
    for name, (passed, said) in outcomes.items():
        print(f"{name:22} {'passed' if passed else 'FAILED'}: {said}")
    return 0 if all(passed for passed, _ in outcomes.values()) else 1


def _tried(packages: dict[str, str], folder: Path) -> tuple[bool, str]:
    """Whether the tests pass with these packages, and what they say."""
    place = folder / "_".join(f"{name}-{version}" for name, version in packages.items()) if packages else None
    if place is not None and not place.is_dir():
        wanted = [f"{name}=={version}" for name, version in packages.items()]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), *wanted]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
    path = os.pathsep.join(map(str, [*([place] if place is not None else []), ROOT]))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    lines = done.stdout.strip().splitlines()
    said = lines[-1] if lines else done.stderr.strip()[-300:]
    return done.returncode == 0, "; ".join([said, *failed, _versions(path)])


def _versions(path: str) -> str:
    """What was really imported."""
    names = "peft transformers huggingface_hub tokenizers"
    code = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names.split()}), sep=', ')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
