"""Our types are known to PEFT."""

from __future__ import annotations

import pytest

from tests.helpers.plugin_methods import FORMULAS

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
