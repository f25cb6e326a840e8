"""Types and variants that are not read are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.adapters.contents import contents_of
from surgery.errors import AdapterError
from tests.helpers.models import load_base
from tests.helpers.stock_adapters import REFUSED, saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, llama: Path, tmp_path: Path) -> None:
    config, target, message = REFUSED[name]
    config.target_modules = {target}
    saved(llama, config, tmp_path)
    adapter = surgery.Adapter.open(tmp_path)
    with pytest.raises(AdapterError, match=message):
        contents_of(adapter)
    module = next(module for module in adapter.modules if target in module and not module.endswith("base_layer"))
    with pytest.raises(AdapterError, match=message):
        adapter.delta(module, load_base(llama).get_submodule("model.layers.0.self_attn.q_proj").weight)
