"""Devices that are not there are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery.errors import MethodError
from tests.helpers.bad_input import check_refused


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(device: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_refused(tmp_path, MethodError, (device, "not available", "0 CUDA devices"), llama, device=device)


def test_gpu_beyond_the_last(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_refused(tmp_path, MethodError, ("cuda:2", "2 CUDA devices"), llama, device="cuda:2")
