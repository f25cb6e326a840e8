"""Methods of installed packages: found by name, by type and by configuration, and known to PEFT like our own."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
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

# One file holds the row and the formulas: dW = diag(t), a vector on the diagonal of a square weight.
FORMULAS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from surgery.deltas.operators import LowRank
from surgery.methods.base import OwnConfig, OwnMethod, Role, Spec
from surgery.methods.catalogue import MethodInfo

INFO = MethodInfo(
    name="tilt", title="Tilt", peft_type="TILT", module="tilting", change="diag(t)", trains="t (out)",
    stores="nothing", paper="none", reads_weights=False,
)

@dataclass
class TiltConfig(OwnConfig):
    info: ClassVar[MethodInfo] = INFO

class Tilt(OwnMethod):
    config_class = TiltConfig
    high, wide = ("t",), ()
    specs = (Spec("t", Role.TRAINABLE),)

    def make_config(self, options, common):
        return TiltConfig(**common)

    def shapes(self, config, site):
        return {"t": (site.out_features,)}

    def trainables(self, config, site, frozen):
        return {"t": torch.zeros(site.out_features)}

    def delta(self, config, tensors, weight, module=""):
        return LowRank(torch.diag(tensors["t"]), torch.eye(len(tensors["t"])))

METHODS = {"tilt": Tilt(INFO)}
"""


@pytest.fixture
def installed(tmp_path: Path):
    """Install a package with an entry point `name = value` beside its modules; returns how to run code with it."""

    def install(modules: dict[str, str], name: str = "tilt", value: str = "tilting:INFO"):
        place = tmp_path / "site"
        for module, text in modules.items():
            (place / module).parent.mkdir(parents=True, exist_ok=True)
            (place / module).write_text(text)
        (place / "tilting-1.dist-info").mkdir()
        (place / "tilting-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tilting\nVersion: 1\n")
        (place / "tilting-1.dist-info" / "entry_points.txt").write_text(f"[surgery.methods]\n{name} = {value}\n")
        paths = os.pathsep.join([str(place), str(Path(__file__).parents[2])])

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "PYTHONPATH": paths}
            return subprocess.run(
                [sys.executable, *arguments], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
            )

        return run

    return install


KNOWN_TO_PEFT = """
import torch, peft, pickle
from torch import nn
base = nn.Sequential(nn.Linear(4, 4))
model = peft.get_peft_model(base, tilting.TiltConfig(target_modules=["0"]))
with torch.no_grad():
    model.get_parameter("base_model.model.0.tilt_t.default").fill_(0.5)
x = torch.randn(2, 4)
expected = base(x)
model.save_pretrained("saved")
again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), "saved")
again.base_model.model[0].base_layer.load_state_dict(base[0].base_layer.state_dict())
assert torch.equal(again(x), expected)
assert torch.equal(pickle.loads(pickle.dumps(again))(x), expected)
import surgery
assert surgery.Adapter.open("saved").delta("0").dense().diagonal().tolist() == [0.5] * 4
"""


@pytest.mark.parametrize("first", ["import tilting", "import peft, surgery, tilting", "import surgery, peft, tilting"])
def test_a_plugins_type_is_known_to_peft_whatever_is_imported_first(installed, first: str) -> None:
    result = installed({"tilting.py": FORMULAS})("-c", first + KNOWN_TO_PEFT)
    assert result.returncode == 0, result.stderr


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
