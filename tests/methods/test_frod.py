"""FRoD against PEFT's implementation and its own definition in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import FrodConfig, PeftModel, get_peft_model

import surgery
from surgery.methods.frod import narrow_positions
from tests.helpers.joint_reference import reference_basis, separated, up_to_signs
from tests.helpers.models import load_base


def stock_frod(folder: Path, targets: list[str]):
    """PEFT's own FRoD on the same layers."""
    return get_peft_model(load_base(folder), FrodConfig(target_modules=targets, progressbar=False))


@pytest.mark.parametrize("category", ["self_query", "output_dense", "intermediate_dense"])
def test_basis_on_real_weights(category: str, model_folder) -> None:
    """V equals PEFT's to PEFT's own precision and the float64 reference to 1e-6; every weight is reconstructed."""
    folder = model_folder("minilm")
    target = {"self_query": "query", "output_dense": "output.dense", "intermediate_dense": "intermediate.dense"}
    regex = r"encoder\.layer\.\d+\.output\.dense" if category == "output_dense" else target[category]
    adapter, _ = surgery.init(folder, "frod", target=[regex])
    stock = stock_frod(folder, [target[category]])
    base = load_base(folder)
    modules = [m for m in adapter.modules if m]
    weights = [base.get_submodule(m).weight.detach() for m in modules]
    V = adapter.modules[modules[0]]["frod_portable_V"]
    expected, values = reference_basis(weights)
    clear = separated(values, 1e-6)
    assert float(up_to_signs(V, expected)[clear].max()) < 1e-6
    theirs = stock.base_model.frod_V[category]["default"]
    assert float(up_to_signs(V, theirs)[separated(values, 1e-3)].max()) < 1e-2

    P = torch.linalg.inv(V.double()).T
    for module, W in zip(modules, weights, strict=True):
        l0 = adapter.modules[module]["frod_portable_l0"].double()
        U = (W.double() @ P) / l0
        assert torch.allclose(U.norm(dim=0), torch.ones(len(l0), dtype=torch.float64), atol=1e-4)
        layer = stock.base_model.model.get_submodule(module)
        U_peft, l_peft = layer.frod_U["default"].double(), layer.frod_lambda_l["default"].detach().double()
        ours = float(((U * l0) @ V.double().T - W).norm() / W.norm())
        peft = float(((U_peft * l_peft) @ theirs.double().T - W).norm() / W.norm())
        assert ours <= peft
        sure = separated(values, 1e-3)
        assert torch.allclose(l_peft[sure], l0[sure], rtol=2e-2, atol=1e-3 * float(l0.max()))


def test_change_follows_the_definition(llama: Path, tmp_path: Path) -> None:
    """dW = U (diag(l) + S) V^T - W, built densely in float64 from the stored tensors and the base."""
    surgery.init(llama, "frod", tmp_path / "out", sparse_rate=0.05)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "out", is_trainable=True)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        layer = model.base_model.model.get_submodule(name)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            layer.frod_portable_l["default"].mul_(1.2).add_(0.05)
            layer.frod_portable_s["default"].copy_(
                torch.randn(layer.frod_portable_s["default"].shape, generator=generator)
            )
        owner = layer.attachments["default"].owner(layer.site)
        assert (owner is layer) == (name.split(".")[2] == "0" or ("k_proj" in name and "layers.0" in name))
        V = owner.frod_portable_V["default"].double()
        W = layer.linear.weight.detach().double()
        BV = W @ torch.linalg.inv(V).T
        U = BV / BV.norm(dim=0)
        S = torch.zeros(V.numel(), dtype=torch.float64)
        S[owner.frod_portable_positions["default"].long()] = layer.frod_portable_s["default"].detach().double()
        middle = torch.diag(layer.frod_portable_l["default"].detach().double()) + S.reshape(V.shape)
        expected = U @ middle @ V.T - W
        assert torch.allclose(layer.get_delta_weight("default").double(), expected, atol=2e-5)


def test_roles_keep_encoder_and_decoder_apart(model_folder) -> None:
    """PEFT's categories collide for T5; ours hold one basis for each place in the block, of each stack."""
    adapter, _ = surgery.init(model_folder("t5"), "frod", target=["SelfAttention.q"])
    owners = sorted(m for m, t in adapter.modules.items() if "frod_portable_V" in t)
    assert owners == ["decoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"]


def test_basis_is_stored_once_for_a_role(llama: Path) -> None:
    adapter, report = surgery.init(llama, "frod")
    owners = [m for m, t in adapter.modules.items() if "frod_portable_V" in t]
    assert len(owners) == 7 and all(".layers.0." in m for m in owners)
    assert report.modules == 21


WITHOUT_SURGERY = """
import sys
from peft import PeftConfig
PeftConfig.from_pretrained(sys.argv[1])
"""


def test_stock_peft_refuses_by_type(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "frod", tmp_path / "out")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_SURGERY, str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode != 0 and "FROD_PORTABLE" in result.stderr


def test_sparse_rate_counts(llama: Path) -> None:
    adapter, _ = surgery.init(llama, "frod", target=["q_proj"], sparse_rate=0.1)
    tensors = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert tensors["frod_portable_s"].shape == (int(32 * 32 * 0.1),)
    nothing, report = surgery.init(llama, "frod", target=["q_proj"], sparse_rate=0.0)
    assert nothing.modules["model.layers.0.self_attn.q_proj"]["frod_portable_s"].numel() == 0
    assert report.trainable_parameters == 3 * 32


def test_config_keeps_what_loading_needs(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "frod", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "FROD_PORTABLE" and config["init_weights"] is False
    assert set(config["base_fingerprint"]) == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize(("size", "dtype"), [(46_340, torch.int32), (46_341, torch.int64)])
def test_places_are_stored_in_as_many_bits_as_they_need(size: int, dtype: torch.dtype) -> None:
    last = narrow_positions(torch.tensor([0, size * size - 1]), size)
    assert last.dtype == dtype and last.tolist() == [0, size * size - 1]
