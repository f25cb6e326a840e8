"""Names that wrappers leave in an adapter's tensors are read as the plain ones, with a note."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from surgery.adapters.adapter import Adapter, bits_equal
from surgery.adapters.wrapper_names import plain_name, plain_names
from surgery.errors import AdapterError
from tests.helpers.models import edit_tensors, load_base, model_inputs, output, save_model

Rename = Callable[[str], str]
WRAPPED: dict[str, Rename] = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled, outermost": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
    "checkpointed": lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "data parallel": lambda name: f"module.{name}",
    "data parallel, inside": lambda name: name.replace("base_model.model.", "base_model.model.module."),
    "PEFT twice": lambda name: f"base_model.model.{name}",
    "PEFT three times": lambda name: f"base_model.model.base_model.model.{name}",
    "state dict": lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name),
    "all": lambda name: "module._orig_mod." + re.sub(r"(lora_[AB])\.", r"\1.mine.", name).replace("mlp", "module.mlp"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import peft

    from tests.helpers.stock_adapters import randomise

    folder = tmp_path_factory.mktemp("wrapped")
    base = save_model("llama", folder / "base")
    model = peft.get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    model.save_pretrained(folder / "lora")
    return base, folder / "lora"


def _rename(folder: Path, rename: Rename) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    edit_tensors(folder, edit, "adapter_model.safetensors")


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_adapter_is_the_plain_one(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    base, lora = pair
    shutil.copytree(lora, tmp_path / "wrapped")
    rename = WRAPPED[kind]
    _rename(tmp_path / "wrapped", rename)
    plain, read = Adapter.open(lora), Adapter.open(tmp_path / "wrapped")
    assert read.notes and "names of wrappers" in read.notes[0]
    assert read.tensors.keys() == plain.tensors.keys()
    assert all(bits_equal(tensor, plain.tensors[name]) for name, tensor in read.tensors.items())
    with torch.no_grad():
        want = output(surgery.load(lora, base), model_inputs("llama"))
        assert torch.equal(output(surgery.load(tmp_path / "wrapped", base), model_inputs("llama")), want)
    assert any("names of wrappers" in note for note in surgery.inspect(tmp_path / "wrapped").notes)


def test_names_in_the_configuration_are_plain_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "adapter_config.json"
    config = json.loads(file.read_text())
    name = "model.layers.0.self_attn.q_proj"
    config.update(target_modules=r".*\._orig_mod\..*(q_proj|down_proj)", alpha_pattern={f"_orig_mod.{name}": 3})
    file.write_text(json.dumps(config))
    _rename(tmp_path / "wrapped", WRAPPED["compiled"])
    read = Adapter.open(tmp_path / "wrapped")
    assert read.config["alpha_pattern"] == {name: 3}
    assert set(read.config["target_modules"]) == {module for module in read.modules if module}
    assert float(read.delta(name).norm()) == pytest.approx(float(Adapter.open(pair[1]).delta(name).norm()) * 3 / 8)


def test_two_tensors_of_one_name_are_refused() -> None:
    names = ["base_model.model.a.lora_A.weight", "base_model.model._orig_mod.a.lora_A.weight"]
    with pytest.raises(AdapterError, match="one name"):
        plain_names(dict.fromkeys(names, torch.zeros(1)), "LORA", "x")


def test_several_adapters_in_a_file_are_refused() -> None:
    names = [f"base_model.model.a.lora_A.{own}.weight" for own in ("one", "two")]
    with pytest.raises(AdapterError, match="several adapters"):
        plain_names(dict.fromkeys(names, torch.zeros(1)), "LORA", "x")


@pytest.mark.parametrize(
    "name", ["base_model.model.modules.a.weight", "base_model.vera_A", "base_model.model.my_module.b"]
)
def test_plain_names_stay(name: str) -> None:
    assert plain_name(name) == name
