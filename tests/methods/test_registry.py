"""Methods of installed packages: found by name, by type and by configuration, and known to PEFT like our own."""

from __future__ import annotations

import copy
import json
import pickle
from enum import Enum
from pathlib import Path

import pytest

from surgery.errors import MethodError
from surgery.methods.own_types import peft_type_member
from surgery.methods.registry import (
    info_for_config,
    info_for_type,
    load_formulas,
    method_info,
    method_infos,
    method_named,
    method_names,
    own_infos,
    own_types,
)
from tests.helpers.plugin_methods import FORMULAS


def test_a_plugins_method_is_on_the_command_line(installed, model_folder, tmp_path: Path) -> None:
    run = installed({"tilting.py": FORMULAS})
    rows = json.loads(run("-m", "surgery", "methods", "--json").stdout)["methods"]
    assert rows[-1]["name"] == "tilt" and rows[-1]["module"] == "tilting" and len(rows) == len(method_infos()) + 1
    made = run("-m", "surgery", "init", "--method", "tilt", str(model_folder("llama")), "--target", "q_proj", "-o", "t")
    assert made.returncode == 0 and "import surgery; " in made.stdout, made.stderr
    assert json.loads((tmp_path / "t" / "adapter_config.json").read_text())["peft_type"] == "TILT"
    assert "TILT" in run("-m", "surgery", "inspect", "t").stdout
    names = run(
        "-c", "import sys; from surgery.methods.registry import *; print(method_names(), 'torch' in sys.modules)"
    )
    assert "'tilt'] False" in names.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("INFO = 3", "tilting:INFO is a int, not a MethodInfo"),
        (FORMULAS.replace('"TILT"', '"LORA"'), "PEFT has a type LORA already"),
        (FORMULAS.replace('{"tilt"', '{"other"'), "tilting.METHODS has no 'tilt'"),
    ],
)
def test_a_broken_plugin_is_named_in_one_line_and_left_out(installed, text: str, reason: str) -> None:
    result = installed({"tilting.py": text})(
        "-c", "import surgery, peft; from surgery.methods.registry import *; print([i.name for i in method_infos()])"
    )
    assert result.returncode == 0 and str(method_names()) in result.stdout
    assert result.stderr.count("tilting: the method 'tilt' cannot be imported and is left out") == 1
    assert reason in result.stderr and "Traceback" not in result.stderr


def test_every_method_is_found_by_name_type_and_configuration() -> None:
    for info in method_infos():
        method = method_named(info.name)
        assert method.info is info is method_info(info.name) and load_formulas(info) is method
        named = info_for_type(info.peft_type)
        assert named is not None and named.peft_type == info.peft_type
        variant = info.name.partition("-")[2] or None
        found = info_for_config({"peft_type": info.peft_type, "variant": variant})
        assert found is not None and found.name == info.name
    assert info_for_type("LORA") is None and info_for_config({"peft_type": "LORA"}) is None
    assert own_types() == {info.peft_type for info in own_infos()} == {"GIVA", "INILORA", "FROD_PORTABLE", "SMOA"}
    with pytest.raises(MethodError, match="unknown method 'nope'; the methods are vera, giva"):
        method_info("nope")


@pytest.mark.parametrize("name", sorted(own_types()))
def test_a_types_member_is_one_string_also_when_copied(name: str) -> None:
    member = peft_type_member(name)
    assert isinstance(member, str) and isinstance(member, Enum) and member == name and member.value == name
    assert member is peft_type_member(name) is copy.deepcopy(member) is pickle.loads(pickle.dumps(member))
    assert json.dumps(member) == f'"{name}"' and hash(member) == hash(name)
