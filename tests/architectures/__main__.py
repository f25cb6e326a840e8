"""`python -m tests.architectures [NAME...]`: the whole matrix, a line for each architecture and kind of names."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import transformers

from tests.architectures.matrix import trial
from tests.architectures.specimens import SPECIMENS


def main() -> None:
    """Run the named architectures, or all of them; exit 1 if a verb does not give what dense maths gives."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    bad = 0
    for name in sys.argv[1:] or SPECIMENS:
        for names in ("files", "model"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = trial(name, Path(folder), names)
                except Exception as error:
                    found = {"specimen": f"{type(error).__name__}: {str(error)[:300]}"}
            wrong = {verb: what for verb, what in found.items() if what != "equal"}
            bad += bool(wrong)
            print(f"{'WRONG' if wrong else 'ok':6}{name}, names of the {names}", flush=True)
            for verb, what in wrong.items():
                print(f"      {verb}: {what[:400]}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
