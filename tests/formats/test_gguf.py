"""GGUF adapters: names, order of rows, types and header, read with the gguf package's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import AdapterError
from tests.helpers.adapters import make_adapter
from tests.helpers.exports import gguf_lora, qwen

gguf = pytest.importorskip("gguf")


def test_header_names_and_shapes(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", gguf_lora(["q_proj", "down_proj"]))
    surgery.export(folder, "llama.cpp", tmp_path / "out", base=llama)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    facts = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert facts == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == [32, 4] and shapes["blk.1.attn_q.weight.lora_b"] == [4, 32]
    assert shapes["blk.2.ffn_down.weight.lora_a"] == [48, 4] and len(shapes) == 12


def test_q_and_k_of_llama_are_in_the_order_of_pairs(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", gguf_lora(["q_proj", "k_proj", "v_proj"]))
    surgery.export(folder, "llama.cpp", tmp_path / "out", base=llama)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    adapter = surgery.Adapter.open(folder)
    for name, short, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        B = adapter.layer(f"model.layers.0.self_attn.{name}")["lora_B.weight"] * 1.5
        if heads is not None:  # rows 0, 4, 1, 5, ... of each head of 8
            B = B.reshape(heads, 2, 4, 4).transpose(1, 2).reshape(B.shape)
        torch.testing.assert_close(found[f"blk.0.{short}.weight.lora_b"], B)


@pytest.mark.parametrize(
    ("dtype", "expected", "error"),
    [
        ("float32", {"F32"}, 1e-7),
        ("float16", {"F16"}, 1e-3),
        ("bfloat16", {"BF16"}, 8e-3),
        ("q8_0", {"Q8_0", "F16"}, 1e-2),
    ],
)
def test_types(dtype: str, expected: set[str], error: float, tmp_path: Path) -> None:
    base = qwen(tmp_path / "model")
    folder = make_adapter(base, tmp_path / "lora", gguf_lora(["q_proj"]))
    report = surgery.export(folder, "llama.cpp", tmp_path / "out", base=base, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == expected
    assert report.weight_error <= error and report.dtype == dtype
    if dtype == "q8_0":  # rows of B have 4 numbers, a block 32
        kinds = {tensor.name[-6:]: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"} and report.weight_error > 1e-4


def test_what_llama_cpp_does_not_adapt_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", gguf_lora(["q_proj", "lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head is the output head, which llama\.cpp does not adapt"):
        surgery.export(folder, "llama.cpp", tmp_path / "out", base=llama)


def test_another_kind_of_model_is_refused_by_name(model_folder, tmp_path: Path) -> None:
    base = model_folder("mixtral")
    folder = make_adapter(base, tmp_path / "lora", gguf_lora(["q_proj"]))
    with pytest.raises(
        AdapterError, match=r"models of the type mixtral are not exported to llama\.cpp yet, only .*llama"
    ):
        surgery.export(folder, "llama.cpp", tmp_path / "out", base=base)


def test_conv1d_of_gpt2(model_folder, tmp_path: Path) -> None:
    base = model_folder("gpt2")
    folder = make_adapter(base, tmp_path / "lora", gguf_lora(["c_attn"], fan_in_fan_out=True))
    surgery.export(folder, "llama.cpp", tmp_path / "out", base=base)
    shapes = {t.name: [int(n) for n in t.shape] for t in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    assert shapes["blk.0.attn_qkv.weight.lora_b"] == [4, 96]


def test_a_folder_of_gguf_is_named_when_it_is_read(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", gguf_lora(["q_proj"]))
    surgery.export(folder, "llama.cpp", tmp_path / "out", base=llama)
    with pytest.raises(AdapterError, match=r"adapters for llama\.cpp are written, not read"):
        surgery.Adapter.open(tmp_path / "out")
