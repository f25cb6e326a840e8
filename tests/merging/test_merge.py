"""Merged folders open with transformers alone and compute what PEFT's merge of the same adapter computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.errors import CheckpointError, MethodError, WrongBaseError
from tests.helpers.command_line import contents
from tests.helpers.merges import STOCK, TARGETS, check_merged, trained
from tests.helpers.models import (
    edit_tensors,
    load_base,
    perturb,
)


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_on_every_kind_of_model(kind: str, model_folder, tmp_path: Path) -> None:
    base = model_folder(kind)
    adapter = trained(load_base(base), peft.LoraConfig(r=4, target_modules=TARGETS[kind]), tmp_path / "lora")
    report = check_merged(adapter, base, kind, tmp_path / "merged")
    before, after = contents(base), contents(tmp_path / "merged")
    assert set(after) == {*before, "surgery.json"}
    shards = [name for name in before if name.endswith(".safetensors")]
    assert report.files == sorted(shards) and report.bytes == sum(len(after[name] or b"") for name in shards)
    assert all(before[name] == after[name] for name in before if name not in {*shards, "model.safetensors.index.json"})
    changed = {f"{site.module}.weight" for site in report.sites}
    assert len(changed) == report.modules > 1
    for name in shards:
        old, new = load_file(base / name), load_file(tmp_path / "merged" / name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old if not key.endswith(tuple(changed)) and kind != "vit")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_type(name: str, llama: Path, tmp_path: Path) -> None:
    config = type(STOCK[name])(**{**STOCK[name].to_dict(), "target_modules": TARGETS["llama"]})
    check_merged(trained(load_base(llama), config, tmp_path / "adapter"), llama, "llama", tmp_path / "merged")


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["inilora", "inilora-beta", "frod", "smoa"])
def test_own_types(method: str, kind: str, store: bool, model_folder, tmp_path: Path) -> None:
    base = model_folder(kind)
    options = {} if store else {"store_bases": False}
    surgery.init(base, method, tmp_path / "start", target=TARGETS[kind], **options)
    model = PeftModel.from_pretrained(load_base(base), tmp_path / "start", is_trainable=True)
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    check_merged(tmp_path / "trained", base, kind, tmp_path / "merged")


@pytest.mark.parametrize("method", ["frod", "smoa", "inilora"])
def test_another_base_is_refused_for_adapters_that_depend_on_it(method: str, llama: Path, tmp_path: Path) -> None:
    options = {"store_bases": False} if method == "inilora" else {}
    surgery.init(llama, method, tmp_path / "start", target=["q_proj"], **options)
    shutil.copytree(llama, tmp_path / "other")
    edit_tensors(tmp_path / "other", lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.001))
    surgery.merge(tmp_path / "start", llama, tmp_path / "merged")
    with pytest.raises(WrongBaseError, match="other base weights"):
        surgery.merge(tmp_path / "start", tmp_path / "other", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


class TestDtypes:
    """The result's dtype is the base's, or the one that is asked for."""

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_half_precision_base_to_float32_keeps_all_of_the_change(self, adapter, model_folder, tmp_path) -> None:
        base = model_folder("llama-bf16-sharded")
        kept = surgery.merge(adapter, base, tmp_path / "kept")
        wide = surgery.merge(adapter, base, tmp_path / "wide", dtype="float32")
        assert max(site.rounding for site in kept.sites) > 1e-3 and max(site.rounding for site in wide.sites) == 0
        assert set(wide.dtypes) == {"float32"} and wide.bytes > 1.8 * kept.bytes
        opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
        assert opened.dtype == torch.float32
        expected = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
        name = "model.layers.2.self_attn.q_proj.weight"
        torch.testing.assert_close(opened.get_parameter(name), expected.get_parameter(name), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_float32_base_to_half_precision_rounds_once(self, dtype, adapter, llama, tmp_path: Path) -> None:
        surgery.merge(adapter, llama, tmp_path / "merged", dtype=dtype)
        surgery.merge(adapter, llama, tmp_path / "exact")
        found, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exact"))
        assert all(torch.equal(found[name], exact[name].to(getattr(torch, dtype))) for name in exact)
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype

    def test_overflow_is_refused(self, adapter, llama, tmp_path: Path) -> None:
        edit_tensors(adapter, lambda t: [x.mul_(1e4) for x in t.values()], "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"q_proj.weight: the merged values are not finite in torch.float16"):
            surgery.merge(adapter, llama, tmp_path / "merged", dtype="float16")
        assert not (tmp_path / "merged").exists()

    def test_unknown_dtype(self, adapter, llama, tmp_path: Path) -> None:
        with pytest.raises(MethodError, match="unknown dtype 'int8'"):
            surgery.merge(adapter, llama, tmp_path / "merged", dtype="int8")
