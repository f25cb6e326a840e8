"""Quantised checkpoints: refused where values are needed, enough where shapes are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery.errors import CheckpointError
from tests.helpers.bad_input import READS_WEIGHTS, check_refused, configure, tensor
from tests.helpers.command_line import invoke
from tests.helpers.models import edit_tensors
from tests.helpers.texts import text_rows, write_rows

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("kind", list(QUANTISED))
@pytest.mark.parametrize("method", READS_WEIGHTS)
def test_quantised_checkpoint_is_refused(method: str, kind: str, model: Path, tmp_path: Path) -> None:
    configure(quantization_config=QUANTISED[kind])(model)
    words = ("PLACE/model:", "quantised", kind, "give the unquantised model")
    check_refused(tmp_path, CheckpointError, words, model, method)
    check_refused(tmp_path, CheckpointError, words, model, method, dry_run=True)


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_quantised_checkpoint_is_enough_for_vera(kind: str, model: Path, tmp_path: Path) -> None:
    configure(quantization_config=QUANTISED[kind])(model)
    tensor(lambda weight: weight.reshape(-1, 1).to(torch.uint8))(model)  # packed: another shape, no floating point
    assert invoke("init", model, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0


def test_quantised_checkpoint_with_other_names_is_refused_as_such(model: Path, tmp_path: Path) -> None:
    configure(quantization_config={"quant_method": "gptq", "bits": 4})(model)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)

    edit_tensors(model, pack)
    check_refused(tmp_path, CheckpointError, ("quantised", "gptq"), model)


def test_quantised_checkpoint_that_cannot_be_loaded_here(learner: Path, tmp_path: Path) -> None:
    """GiVA takes any layer that runs, so what is missing is what transformers says: the package, or the device."""
    configure(quantization_config=QUANTISED["bitsandbytes"])(learner)
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(
        tmp_path, CheckpointError, ("PLACE/model: cannot be loaded", "bitsandbytes"), learner, "giva", data=data
    )
