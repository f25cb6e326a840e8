"""Tests of the members that a blend refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import AdapterError, OptionError


def _edited(folder: Path, out: Path, **changes: object) -> Path:
    adapter = surgery.Adapter.open(folder)
    adapter.config |= changes
    adapter.save(out)
    return out


def test_what_cannot_be_blended_is_refused_by_name(members: dict[str, Path], tmp_path: Path) -> None:
    lora, rslora = members["lora"], members["rslora"]
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=f"{lora.name}: is the same adapter as .*--repeated"):
        surgery.blend([lora, lora], out)
    with pytest.raises(OptionError, match="no finite number"):
        surgery.blend([(lora, float("nan")), rslora], out)
    with pytest.raises(OptionError, match="all weights are zero"):
        surgery.blend([(lora, 0.0), (rslora, 0.0)], out)
    with pytest.raises(OptionError, match="at least two"):
        surgery.blend([lora], out)
    with pytest.raises(AdapterError, match=r"is of one, .*is of two: blend adds adapters of one base"):
        surgery.blend(
            [
                _edited(lora, tmp_path / "one", base_model_name_or_path="one"),
                _edited(rslora, tmp_path / "two", base_model_name_or_path="two"),
            ],
            out,
        )
    wider = surgery.Adapter.open(rslora)
    name = next(name for name in wider.tensors if "lora_A" in name)
    wider.tensors[name] = torch.cat([wider.tensors[name], wider.tensors[name]], 1)
    wider.save(tmp_path / "wider")
    with pytest.raises(AdapterError, match="in different members"):
        surgery.blend([lora, tmp_path / "wider"], out)
    with pytest.raises(AdapterError, match="depends on its base model"):
        surgery.blend([lora, members["dora"]], out)
    assert not out.exists()
    made, _ = surgery.blend([lora, lora], out, repeated=True)
    assert made.peft_type == "LORA"
