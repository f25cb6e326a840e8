"""`make peft-suite`: PEFT's own tests on our PEFT types, beside four of PEFT's as controls.

    python -m tests.peft_suite [--folder FOLDER] [--only TYPE]... [-k EXPRESSION]

The tests are those of the source distribution of the installed version, taken from the package index; none of them is
in this repository. The models that they name are made here. What is run: the tests that go over a table of types, for
custom models, decoders, encoder-decoders, feature extraction, sequence classification and configurations.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tests.peft_suite.models import make_hub_cache
from tests.peft_suite.outcomes import counted, table

ROOT = Path(__file__).parents[2]
MODULES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)


def main() -> int:
    """Run the tests and print the table; 0 where no test of our types failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".peft-suite", help="where tests and models are kept")
    parser.add_argument("-k", dest="expression", help="only tests whose names match, as in pytest")
    parser.add_argument("--only", action="append", default=[], help="a PEFT type by its name; default all")
    parser.add_argument("--all-models", action="store_true", help="also models of the same layers as others")
    parser.add_argument("--shown", type=int, default=40, help="failures to print at most")
    options = parser.parse_args()
    folder = options.folder.resolve()
    tests = unpacked_tests(folder, importlib.metadata.version("peft"))
    make_hub_cache(folder / "hub")
    started = time.monotonic()
    chosen = {"PEFT_SUITE_TYPES": " ".join(options.only), "PEFT_SUITE_ALL_MODELS": "1" if options.all_models else ""}
    outcomes = run(tests, folder, options.expression, chosen)
    found = counted(outcomes)
    print(table(found, options.shown))
    print(f"{len(outcomes)} tests of peft {importlib.metadata.version('peft')} in {time.monotonic() - started:.0f} s")
    return 1 if any(count.failed for count in found.values() if count.ours) else 0


def unpacked_tests(folder: Path, version: str) -> Path:
    """Return the folder of the tests of a version of PEFT, taken from its source distribution."""
    place = folder / version / "peft_tests"  # not `tests`, which is the package of this repository's
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(scratch), f"peft=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        tests = next(scratch.glob("*/tests"))
        (tests / "__init__.py").touch()
        place.parent.mkdir(exist_ok=True)
        tests.rename(place)
    return place


def run(tests: Path, folder: Path, expression: str | None, chosen: dict[str, str]) -> dict[str, dict[str, str]]:
    """Run the tests that `chosen` asks the plugin for; return type, outcome and message of each by its name."""
    said = folder / "outcomes.json"
    said.unlink(missing_ok=True)
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\naddopts = -q -p no:cacheprovider\n", encoding="utf-8")
    environment = {
        **os.environ,
        **chosen,
        "PEFT_SUITE_OUTCOMES": str(said),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests.parent)]),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(tests.parent), "--no-header"]
    command += ["-p", "tests.peft_suite.plugin", "--tb=no", "-W", "ignore", *(["-k", expression] if expression else [])]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(
            [*command, *(str(tests / module) for module in MODULES)],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if not said.is_file():
        raise SystemExit(f"PEFT's tests did not run; see {folder / 'log.txt'}")
    outcomes: dict[str, dict[str, str]] = json.loads(said.read_text(encoding="utf-8"))["outcomes"]
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
