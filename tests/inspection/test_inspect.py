"""What `surgery.inspect` says equals what the files and dense decompositions say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.deltas.spectrum import effective_rank
from surgery.errors import AdapterError, CheckpointError, MethodError, OutputError
from surgery.storage import safetensors_read as tensor_files
from tests.helpers.merges import trained
from tests.helpers.models import edit_tensors, llama_config, load_base

FILE = "adapter_model.safetensors"


def test_an_adapter(lora: Path, llama: Path) -> None:
    found = surgery.inspect(lora)
    tensors = load_file(lora / FILE)
    assert (found.kind, found.peft_type, found.task, found.base) == ("adapter", "LORA", "CAUSAL_LM", str(llama))
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == (lora / FILE).stat().st_size and found.dtypes == {"float32": 4 * found.parameters}
    assert found.modules == len(found.sites) == 6
    total = 0.0
    for site in found.sites:
        A, B = (tensors[f"base_model.model.{site.module}.lora_{letter}.weight"].double() for letter in "AB")
        dense = B @ A * 8 / 6
        values = torch.linalg.svdvals(dense)
        shares = values.square().cumsum(0) / values.square().sum()
        assert site.shape == tuple(dense.shape) and site.rank == 6
        assert site.norm == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        assert site.rank_95 == int((shares < 0.95).sum()) + 1 and site.rank_99 == int((shares < 0.99).sum()) + 1
        total += site.norm**2
    assert all(site.energy == pytest.approx(site.norm**2 / total) for site in found.sites)
    roles = {role.role: role for role in found.roles}
    assert set(roles) == {"model.layers.*.self_attn.q_proj", "model.layers.*.mlp.down_proj"}
    down = roles["model.layers.*.mlp.down_proj"]
    assert down.shapes == [(32, 48)] and down.layers == 3 and down.ranks == [6]
    assert sum(role.energy or 0 for role in found.roles) == pytest.approx(1)


def test_a_layer_of_zeros_has_no_rank(lora: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(lora, lambda tensors: tensors[name].zero_(), FILE)
    site = next(s for s in surgery.inspect(lora).sites if s.module == "model.layers.1.self_attn.q_proj")
    assert (site.norm, site.energy, site.rank_95, site.rank_99) == (0.0, 0.0, 0, 0)


def test_a_model_is_told_from_its_headers(model_folder, monkeypatch) -> None:
    def unread(path: Path, name: str) -> torch.Tensor:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(tensor_files, "read_tensor", unread)
    for kind, linears in (("llama-bf16-sharded", 22), ("gpt2", 9), ("vit", 13), ("t5", 37)):
        folder = model_folder(kind)
        found = surgery.inspect(folder)
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        assert found.kind == "model" and found.files == len(files) and found.peft_type is None
        assert found.parameters == sum(tensor.numel() for file in files for tensor in file.values())
        assert found.modules == linears
        assert all(s.shape and s.parameters == s.shape[0] * s.shape[1] and s.norm is None for s in found.sites)
        size = 2 if "bf16" in kind else 4
        assert all(s.bytes == size * s.parameters for s in found.sites)
    assert set(surgery.inspect(model_folder("llama-bf16-sharded")).dtypes) == {"bfloat16"}
    assert {role.layers for role in surgery.inspect(model_folder("vit")).roles} == {1, 2}


def test_spectra_of_a_model_read_its_weights(llama: Path) -> None:
    found = surgery.inspect(llama, spectra=True)
    weights = load_file(llama / "model.safetensors")
    site = found.sites[0]
    values = torch.linalg.svdvals(weights[f"{site.module}.weight"].double())
    assert site.norm == pytest.approx(float(values.square().sum().sqrt()))
    assert site.rank_95 == effective_rank(values, 0.95) < site.rank_99


def test_a_model_of_seventy_billion_answers_in_seconds(tmp_path: Path) -> None:
    """Sparse files of the right sizes: nothing but headers can be read from them."""
    config = llama_config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, tensor in model.state_dict().items():
        if end > 4e9:
            shards, end = [*shards, {}], 0
        start, end = end, end + tensor.numel() * 2
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    for number, entries in enumerate(shards):
        header = json.dumps(entries).encode()
        with (tmp_path / f"{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
    files = {name: f"{number}.safetensors" for number, entries in enumerate(shards) for name in entries}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    started = time.perf_counter()
    found = surgery.inspect(tmp_path)
    assert time.perf_counter() - started < 20
    assert found.parameters > 6.8e10 and found.modules == 561


@pytest.mark.parametrize("method", ["frod", "smoa", "vera", "hira"])
def test_changes_that_depend_on_the_base_want_it(method: str, llama: Path, tmp_path: Path) -> None:
    if method == "hira":
        trained(load_base(llama), peft.HiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    else:
        surgery.init(llama, method, tmp_path / "adapter", target=["q_proj"])
    alone = surgery.inspect(tmp_path / "adapter")
    assert alone.modules == 3 and all(site.norm is None for site in alone.sites)
    assert any("--base MODEL" in note for note in alone.notes)
    based = surgery.inspect(tmp_path / "adapter", base=llama, spectra=True)
    assert all(site.norm is not None and site.rank_95 is not None for site in based.sites)
    assert (sum(site.norm or 0 for site in based.sites) > 0) == (method == "hira")


def test_what_is_not_read_is_still_described(llama: Path, tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])
    found = surgery.inspect(trained(load_base(llama), config, tmp_path / "oft"))
    assert found.modules == 3 and found.parameters > 0 and not found.sites
    assert "rotation" in found.notes[0]


def test_carried_tensors_are_listed(llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert surgery.inspect(trained(load_base(llama), config, tmp_path / "lora")).carried == ["lm_head.weight"]


def test_bad_input_is_named(lora: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"ends with \.png"):
        surgery.inspect(lora, tmp_path / "lora.gif")
    with pytest.raises(OutputError, match="its folder does not exist"):
        surgery.inspect(lora, tmp_path / "nowhere" / "lora.png")
    with pytest.raises(CheckpointError, match="no such folder"):
        surgery.inspect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="not an adapter folder"):
        surgery.inspect(tmp_path / "empty")
    with pytest.raises(AdapterError, match="base belongs to an adapter"):
        surgery.inspect(llama, base=llama)
    (lora / FILE).write_bytes((lora / FILE).read_bytes()[:-10])
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        surgery.inspect(lora)
