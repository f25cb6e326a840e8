"""Adapter folders: carried whole, written atomically, verified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import surgery
from surgery.adapters import adapter as module
from surgery.adapters.adapter import Adapter
from surgery.errors import OutputError
from surgery.storage import safetensors_write as rewriting
from tests.helpers.models import load_base, model_inputs, output


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def stock_lora(llama: Path, tmp_path: Path) -> Path:
    """A stock LoRA with a saved head, a card, and rank patterns: much that surgery only carries."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"v_proj": 2},
        use_rslora=True,
    )
    get_peft_model(load_base(llama), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_what_is_not_interpreted_is_carried(stock_lora: Path, llama: Path, tmp_path: Path) -> None:
    opened = Adapter.open(stock_lora)
    assert opened.peft_type == "LORA"
    opened.save(tmp_path / "copy")
    again = Adapter.open(tmp_path / "copy")
    assert again.config == opened.config == json.loads((stock_lora / "adapter_config.json").read_text())
    assert again.card == (stock_lora / "README.md").read_text()
    assert again.tensors.keys() == opened.tensors.keys()
    assert any("lm_head" in name for name in opened.tensors)
    for name, tensor in opened.tensors.items():
        assert torch.equal(tensor, again.tensors[name]) and tensor.dtype == again.tensors[name].dtype
    models = [PeftModel.from_pretrained(load_base(llama), folder).eval() for folder in (stock_lora, tmp_path / "copy")]
    with torch.no_grad():
        assert torch.equal(*(output(model, model_inputs("llama")) for model in models))


def test_modules_group_tensors(llama: Path) -> None:
    adapter, _ = surgery.init(llama, "vera", rank=4, target=["q_proj"])
    modules = adapter.modules
    assert set(modules[""]) == {"vera_A", "vera_B"}
    assert set(modules["model.layers.0.self_attn.q_proj"]) == {"vera_lambda_b", "vera_lambda_d"}


def test_replacing_needs_force_and_loses_nothing_on_failure(llama: Path, tmp_path: Path, monkeypatch) -> None:
    adapter, _ = surgery.init(llama, "inilora", rank=2, target=["q_proj"])
    out = tmp_path / "out"
    adapter.save(out)
    (out / "notes.txt").write_text("mine")
    before = {name: (out / name).read_bytes() for name in listing(out)}
    with pytest.raises(OutputError, match="--force"):
        adapter.save(out)

    def full(*args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        adapter.save(out, force=True)
    assert {name: (out / name).read_bytes() for name in listing(out)} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    monkeypatch.undo()
    adapter.save(out, force=True)
    assert not (out / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_exchange_without_the_system_call(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """Systems that cannot swap two folders in one step."""
    adapter, _ = surgery.init(llama, "inilora", rank=2, target=["q_proj"])
    adapter.save(tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    monkeypatch.setattr(sys, "platform", "other")
    adapter.save(tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_corrupted_write_is_caught(llama: Path, tmp_path: Path, monkeypatch) -> None:
    adapter, _ = surgery.init(llama, "inilora", rank=2, target=["q_proj"])
    write = module.write_tensors

    def corrupting(path, tensors, metadata):
        digests = write(path, tensors, metadata)
        content = bytearray(Path(path).read_bytes())
        content[-3] ^= 1
        Path(path).write_bytes(content)
        return digests

    monkeypatch.setattr(module, "write_tensors", corrupting)
    with pytest.raises(OutputError, match="read back differs"):
        adapter.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, os, time, pathlib
from surgery.storage import atomic_folder as atomic
from surgery.adapters.adapter import Adapter
atomic._flush = lambda folder: (print("writing", flush=True), time.sleep(60))
Adapter.open(sys.argv[1]).save(sys.argv[2], force=True)
"""


def test_kill_leaves_the_old_output_and_one_hidden_partial(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "inilora", tmp_path / "source", rank=2, target=["q_proj"])
    surgery.init(llama, "inilora", tmp_path / "out", rank=3, target=["q_proj"])
    before = {name: (tmp_path / "out" / name).read_bytes() for name in listing(tmp_path / "out")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in listing(tmp_path / "out")} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out", "source"]
    # The next run clears what the killed one left.
    Adapter.open(tmp_path / "source").save(tmp_path / "out", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("chunk", [1, 300, 1 << 26])
def test_files_are_read_back_whole(chunk: int, tmp_path: Path, monkeypatch) -> None:
    """However much is read at a time, every tensor is compared: its bytes, its dtype and its shape."""
    monkeypatch.setattr(rewriting, "CHUNK", chunk)
    numbers = torch.arange(60, dtype=torch.float32)
    tensors = {"a": numbers, "b": numbers.reshape(6, 10), "c": numbers.bfloat16()[::2], "d": numbers[:0]}
    file = tmp_path / "file"
    digests = rewriting.write_tensors(file, tensors, {"format": "pt"})
    rewriting.verify_file(file, digests, "out")
    for name, changed in [
        ("a", numbers + torch.eye(60)[59]),
        ("b", tensors["b"].reshape(10, 6)),
        ("b", tensors["b"].view(torch.int32)),
        ("c", tensors["c"].view(torch.float16)),
        ("d", numbers[:1]),
    ]:
        rewriting.write_tensors(file, {**tensors, name: changed}, {"format": "pt"})
        with pytest.raises(OutputError, match=f"out: tensor {name} read back differs"):
            rewriting.verify_file(file, digests, "out")
    rewriting.write_tensors(file, {**tensors, "e": numbers}, {"format": "pt"})
    with pytest.raises(OutputError, match="tensor e"):
        rewriting.verify_file(file, digests, "out")
    rewriting.write_tensors(file, {n: t for n, t in tensors.items() if n != "a"}, {"format": "pt"})
    with pytest.raises(OutputError, match="tensor a"):
        rewriting.verify_file(file, digests, "out")


def test_the_same_adapter_is_recognised(stock_lora: Path, tmp_path: Path) -> None:
    one, two = Adapter.open(stock_lora), Adapter.open(stock_lora)
    one.config["layers"] = (1, 2)
    two.config["layers"] = [1, 2]  # as a file has it
    assert one.same_as(two)
    name = next(iter(two.tensors))
    for changed in (two.tensors[name] + 1, two.tensors[name].double(), two.tensors[name][:1]):
        assert not one.same_as(Adapter(two.config, {**two.tensors, name: changed}))
    assert not one.same_as(Adapter({**two.config, "r": 5}, two.tensors))
    assert not one.same_as(Adapter(two.config, {n: t for n, t in two.tensors.items() if n != name}))
    nan = torch.full((2,), float("nan"))
    assert module.bits_equal(nan, nan.clone()) and not module.bits_equal(torch.zeros(1), -torch.zeros(1))
