"""Our PEFT types are known whichever of peft and surgery is imported first, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = """
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as c, PEFT_TYPE_TO_TUNER_MAPPING as t
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as p
for name in ("INILORA", "SMOA", "FROD_PORTABLE"):
    assert c[name] and t[name] and p[name], name
    assert hasattr(next(key for key in c if key == name), "value")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "first",
    [
        "import peft; import surgery",
        "import surgery; import peft",
        "import transformers, peft.tuners.lora; import surgery",
    ],
)
def test_either_import_order(first: str) -> None:
    result = run(first + KNOWN)
    assert result.returncode == 0, result.stderr


def test_without_surgery_they_are_unknown() -> None:
    """The control."""
    assert run(KNOWN).returncode != 0


# At least one from every package: each may be the first import of a user's program.
MODULES = (
    "surgery.models.sites",
    "surgery.initialization.init",
    "surgery.methods.base",
    "surgery.methods.smoa",
    "surgery.methods.regeneration",
    "surgery.methods.registry",
    "surgery.adapters.packing",
    "surgery.peft_types.attachment",
    "surgery.peft_types.layer",
    "surgery.peft_types.loading",
    "surgery.adapters.adapter",
    "surgery.models.base_model",
    "surgery.adapters.stock_frod",
)

FORKED = """
import os, sys, importlib, torch, transformers
assert "peft" not in sys.modules and "surgery" not in sys.modules
failed = []
for module in {modules!r}:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
            exec({known!r})
        except BaseException as error:
            print(module, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
sys.exit(bool(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks after the heavy imports, to do them once")
def test_any_module_can_be_imported_first() -> None:
    """Importing peft registers our types at once, so no module may be half imported when it first imports peft."""
    result = run(FORKED.format(modules=MODULES, known=KNOWN))
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names() -> None:
    code = "import surgery\nfor name in surgery.__all__:\n    assert getattr(surgery, name) is not None, name\n"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert run("import surgery; surgery.nonsense").returncode != 0
