"""Types and devices as torch has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtypes_and_devices_as_torch_has_them(dtype: Any, calls_place: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(calls_place / "model", "inilora", rank=2, dtype=dtype, device=torch.device("cpu"))
    assert {tensor.dtype for tensor in adapter.tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    made, _ = surgery.convert(calls_place / "lora", "lora", dtype=dtype, device=torch.device("cpu"))
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    report = surgery.merge(
        calls_place / "lora", calls_place / "model", tmp_path / "merged", dtype=dtype, device=torch.device("cpu")
    )
    assert set(report.dtypes) == {"bfloat16"}
    written = surgery.export(calls_place / "lora", "vllm", tmp_path / "served", dtype=dtype, device=torch.device("cpu"))
    assert written.out == str(tmp_path / "served")
    compared = surgery.compare(calls_place / "lora", made, dtype=dtype, device=torch.device("cpu"))
    assert compared.weight_error < 0.01
    model = surgery.trainable(calls_place / "lora", calls_place / "model", dtype=dtype, device="auto", task="causal-lm")
    assert model.get_base_model().dtype == torch.bfloat16
    assert (
        surgery.load(calls_place / "lora", calls_place / "model", dtype=torch.bfloat16).get_base_model().dtype
        == torch.bfloat16
    )
