"""Our types are registered as soon as peft is there, and no module is executed twice for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONCE = """
import sys, {module} as first
assert sys.modules[{module!r}] is first and first.__spec__.origin == first.__file__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from surgery.methods.base import OwnConfig, Role
from surgery.methods.frod import FRoD, FrodPortableConfig
from surgery.methods.registry import method_named
assert PEFT_TYPE_TO_CONFIG_MAPPING["FROD_PORTABLE"] is FrodPortableConfig and issubclass(FrodPortableConfig, OwnConfig)
assert type(method_named("frod")) is FRoD and method_named("frod").specs[0].role is Role.TRAINABLE
"""


@pytest.mark.parametrize("module", ["surgery.methods.base", "surgery.methods.frod", "surgery.peft_types.layer"])
def test_the_first_module_is_imported_once(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    code = ONCE.format(module=module)
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
