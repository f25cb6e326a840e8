"""MLX: read by its rule, written by its rule, refused where it is something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.adapter import Adapter
from surgery.adapters.format_registry import AdapterParts
from surgery.errors import AdapterError
from surgery.formats.mlx import MLX
from tests.helpers.models import load_base, model_inputs, output

SCALE = 2.5


def mlx_adapter(folder: Path, dora: bool = False, **settings: Any) -> dict[str, torch.Tensor]:
    """Write what mlx-lm writes for q and v of two blocks of the tiny Llama, and return its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in (0, 1):
        for name, rows in (("q_proj", 32), ("v_proj", 16)):
            module = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_a"] = torch.randn(32, 3, generator=generator) * 0.2
            tensors[f"{module}.lora_b"] = torch.randn(3, rows, generator=generator) * 0.2
            if dora:
                tensors[f"{module}.m"] = torch.rand(rows, generator=generator) + 0.5
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": SCALE, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "lora_parameters": parameters, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def changed(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The model with MLX's rule applied to its weights in float64."""
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in tensors}:
            weight = model.get_submodule(name).weight
            new = weight.double() + SCALE * (tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double()).T
            if f"{name}.m" in tensors:
                new = new * (tensors[f"{name}.m"].double() / new.norm(dim=1))[:, None]
            weight.copy_(new)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_mlx_wrote_is_merged_and_loaded_by_its_rule(dora: bool, llama: Path, tmp_path: Path) -> None:
    tensors = mlx_adapter(tmp_path / "mlx", dora)
    inputs = model_inputs("llama")
    with torch.no_grad():
        bare = output(load_base(llama), inputs)
        want = output(changed(load_base(llama), tensors), inputs)
        surgery.merge(tmp_path / "mlx", llama, tmp_path / "merged")
        merged = output(load_base(tmp_path / "merged"), inputs)
        loaded = output(surgery.load(tmp_path / "mlx", load_base(llama)).eval(), inputs)
    effect = (want - bare).norm()
    assert effect > 1e-2
    assert (merged - want).norm() <= 1e-5 * effect and (loaded - want).norm() <= 1e-5 * effect


def test_written_and_read_back_by_its_rule(llama: Path, tmp_path: Path) -> None:
    tensors = mlx_adapter(tmp_path / "mlx")
    adapter = Adapter.open(tmp_path / "mlx")
    assert adapter.notes and adapter.config["r"] == 3
    (tmp_path / "again").mkdir()
    size = MLX.write(AdapterParts(adapter.config, adapter.tensors), tmp_path / "again", "again")
    assert size == (tmp_path / "again" / "adapters.safetensors").stat().st_size
    found = dict(MLX.changes(tmp_path / "again"))
    assert set(found) == {name.rpartition(".")[0] for name in tensors}
    for module, change in found.items():
        want = SCALE * (tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()).T
        assert torch.allclose(change.double(), want, rtol=1e-5, atol=1e-7)
        assert torch.allclose(adapter.delta(module).dense().double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full'.*mlx_lm.fuse"),
        ({"lora_parameters": None}, "no lora_parameters"),
        ({"lora_parameters": {"rank": 3, "scale": "2"}}, "scale '2', expected a number"),
    ],
)
def test_what_is_no_adapter_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    mlx_adapter(tmp_path / "mlx", **settings)
    with pytest.raises(AdapterError, match=message):
        Adapter.open(tmp_path / "mlx")


def test_half_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    tensors = mlx_adapter(tmp_path / "mlx")
    del tensors["model.layers.1.self_attn.q_proj.lora_b"]
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"lacks lora_a or lora_b of model\.layers\.1\.self_attn\.q_proj"):
        Adapter.open(tmp_path / "mlx")


def test_ranks_that_differ_are_not_written(llama: Path, tmp_path: Path) -> None:
    mlx_adapter(tmp_path / "mlx")
    adapter = Adapter.open(tmp_path / "mlx")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    cut = {
        f"{name}A.weight": adapter.tensors[f"{name}A.weight"][:2],
        f"{name}B.weight": adapter.tensors[f"{name}B.weight"][:, :2],
    }
    config = {**adapter.config, "rank_pattern": {"model.layers.0.self_attn.q_proj": 2}}
    with pytest.raises(AdapterError, match=r"one rank for all layers.*2, 3"):
        MLX.write(AdapterParts(config, {**adapter.tensors, **cut}), tmp_path, "out")


def test_the_file_holds_nothing_else(llama: Path, tmp_path: Path) -> None:
    mlx_adapter(tmp_path / "mlx")
    made, _ = surgery.convert(tmp_path / "mlx", "lora", tmp_path / "lora")
    assert made.peft_type == "LORA" and set(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == set(
        made.tensors
    )
