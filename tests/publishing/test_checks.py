"""What is checked before a push: bad folders are refused in one line, and whatever PEFT saves is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import surgery
from surgery.errors import SurgeryError
from surgery.publishing import checks
from surgery.publishing.checks import check_adapter
from tests.helpers.hub import KINDS, make_adapter
from tests.helpers.models import edit_tensors, load_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "bases/llama"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function from a method or a PEFT configuration to a folder that holds such an adapter, made once."""
    made: dict[str, Path] = {}

    def folder(kind: Any) -> Path:
        if str(kind) not in made:
            out = tmp_path_factory.mktemp("adapter") / "made"
            if isinstance(kind, str):
                make_adapter(kind, model_folder("llama"), out)
            else:
                peft.get_peft_model(load_base(model_folder("llama")), kind).save_pretrained(out)
            made[str(kind)] = out
        return made[str(kind)]

    return folder


def edited(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None, **config) -> Path:
    """A copy with other tensors or other entries of the configuration."""
    shutil.copytree(folder, out)
    if edit is not None:
        edit_tensors(out, edit, WEIGHTS)
    values = {**json.loads((out / CONFIG).read_text()), **config}
    (out / CONFIG).write_text(json.dumps(values))
    return out


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit that changes the last number of a tensor."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit that leaves a tensor out."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return edit


CASES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None] | None, dict[str, Any], str]] = {
    "nan": (put(f"{QUERY}.lora_A.weight", float("nan")), {}, f"{QUERY}.lora_A.weight holds NaN or Inf"),
    "inf": (put(f"{QUERY}.lora_B.weight", -float("inf")), {}, f"{QUERY}.lora_B.weight holds NaN or Inf"),
    "half": (without(f"{QUERY}.lora_A.weight"), {}, r"lacks lora_A.weight of .*layers\.1\.self_attn\.q_proj"),
    "rank": (None, {"r": 8}, "r"),
    "not-targeted": (None, {"target_modules": ["v_proj"]}, "q_proj, .* does not name as target"),
    "not-matched": (None, {"target_modules": r".*\.v_proj"}, "q_proj, .* does not name as target"),
    "head": (None, {"modules_to_save": ["score"]}, "lists score in modules_to_save"),
    "other-type": (None, {"peft_type": "VERA"}, "changes no layer"),
    "unknown-type": (None, {"peft_type": "NOVEL"}, "known neither to PEFT nor to surgery"),
    "foreign": (lambda t: t.update({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}), {}, "kohya"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_bad_adapter_is_refused(case: str, saved, tmp_path: Path) -> None:
    edit, config, words = CASES[case]
    with pytest.raises(SurgeryError, match=words) as error:
        check_adapter(edited(saved("lora"), tmp_path / "bad", edit, **config), BASE)
    assert "\n" not in str(error.value)


def test_of_the_names_that_peft_lists_for_a_classifier_one_is_there(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4)).save_pretrained(tmp_path / "lora")
    assert set(json.loads((tmp_path / "lora" / CONFIG).read_text())["modules_to_save"]) == {"classifier", "score"}
    check_adapter(tmp_path / "lora", BASE)
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "score" not in k}, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(SurgeryError, match="in modules_to_save"):
        check_adapter(tmp_path / "lora", BASE)


def test_incomplete_folders_are_refused(saved, llama: Path, tmp_path: Path) -> None:
    for name, words in ((CONFIG, f"no {CONFIG}"), (WEIGHTS, f"no {WEIGHTS}")):
        folder = shutil.copytree(saved("lora"), tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(SurgeryError, match=words):
            check_adapter(folder, BASE)
    cut = shutil.copytree(saved("lora"), tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(SurgeryError, match="not a complete safetensors file"):
        check_adapter(cut, BASE)
    pickled = shutil.copytree(saved("lora"), tmp_path / "pickled")
    torch.save(load_file(pickled / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    with pytest.raises(SurgeryError, match=r"its tensors are in adapter_model\.bin"):
        check_adapter(pickled, BASE)
    latin = shutil.copytree(saved("lora"), tmp_path / "latin")
    (latin / "README.md").write_bytes("für".encode("latin-1"))
    with pytest.raises(SurgeryError, match=r"README\.md: is not UTF-8 text"):
        check_adapter(latin, BASE)
    with pytest.raises(SurgeryError, match="this is a base model, not an adapter"):
        check_adapter(llama, BASE)
    with pytest.raises(SurgeryError, match="no such folder; give the folder of an adapter"):
        check_adapter(Path("org/name"), BASE)


@pytest.mark.parametrize(
    ("named", "given", "found"),
    [
        ("org/base", None, ("org/base", None)),
        ("org/base", "other/base@v1", ("other/base", "v1")),
        ("/data/models/base", "org/base", ("org/base", None)),
        (None, "org/base", ("org/base", None)),
        ("/data/models/base", None, "'base' on a disk"),
        ("./base", None, "'base' on a disk"),
        ("base", None, "'base' on a disk"),
        ("ckpt/base", None, "'base' on a disk"),
        ("a/b/c", None, "'c' on a disk"),
        (None, None, "names no base model"),
        ("org/base", "base", "--base-model base: is no Hub id"),
        ("org/base", "/data/base", "--base-model /data/base: is no Hub id"),
    ],
)
def test_the_base_model(named, given, found, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt" / "base").mkdir(parents=True)
    config = {"base_model_name_or_path": named}
    if isinstance(found, tuple):
        assert checks.base_model_id(tmp_path / "small", config, given) == found
        return
    with pytest.raises(SurgeryError, match=found) as error:
        checks.base_model_id(tmp_path / "small", config, given)
    assert "/data/models" not in str(error.value)


def test_the_revision_of_the_base_model(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "org/base", "revision": "v2"}
    assert checks.base_model_id(tmp_path, config, None) == ("org/base", "v2")
    assert checks.base_model_id(tmp_path, config, "other/base") == ("other/base", None)


TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PEFTS = {
    "dora": peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}, **TARGETS),
    "regex": peft.LoraConfig(r=4, target_modules=r".*\.(q|k)_proj", task_type="CAUSAL_LM"),
    "bias": peft.LoraConfig(r=4, bias="all", **TARGETS),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "head": peft.LoraConfig(r=4, modules_to_save=["lm_head"], **TARGETS),
    "tokens": peft.LoraConfig(r=4, trainable_token_indices=[1, 2], **TARGETS),
    "loha": peft.LoHaConfig(r=4, **TARGETS),
    "lokr": peft.LoKrConfig(r=4, **TARGETS),
    "vera": peft.VeraConfig(r=4, save_projection=False, **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, **TARGETS),
    "ia3": peft.IA3Config(feedforward_modules=[], **TARGETS),
    "oft": peft.OFTConfig(oft_block_size=4, **TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "hra": peft.HRAConfig(r=4, **TARGETS),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "layernorm": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", list(PEFTS))
def test_what_peft_saves_is_accepted(kind: str, saved) -> None:
    checked = check_adapter(saved(PEFTS[kind]), BASE)
    tensors = load_file(saved(PEFTS[kind]) / WEIGHTS)
    assert checked.bytes == (saved(PEFTS[kind]) / WEIGHTS).stat().st_size
    assert checked.modules or kind == "prompt"
    assert 0 < checked.parameters <= sum(tensor.numel() for tensor in tensors.values())
    measured = {"rslora", "regex", "bias", "embedding", "head", "tokens", "loha", "lokr", "adalora"}
    assert bool(checked.layers) == (kind in measured)
    assert bool(checked.carried) == (kind in {"embedding", "head", "tokens", "prompt"}), checked.carried


@pytest.mark.parametrize("method", ["lora", *KINDS])
def test_layers_are_measured_as_inspect_does(method: str, saved) -> None:
    folder = saved(method)
    checked, inspected = check_adapter(folder, BASE), surgery.inspect(folder)
    expected = {site.module: (site.shape, site.norm, site.rank_95, site.rank_99) for site in inspected.sites}
    assert checked.modules == inspected.modules
    assert bool(checked.layers) == (method not in {"vera", "frod", "smoa"})
    for layer in checked.layers:
        shape, norm, rank_95, rank_99 = expected[layer.module]
        assert (layer.shape, layer.rank_95, layer.rank_99) == (shape, rank_95, rank_99)
        assert layer.norm == pytest.approx(norm, rel=1e-12) and norm > 0


def test_trainable_parameters_are_those_of_the_method(saved, llama: Path, tmp_path: Path) -> None:
    _, report = surgery.init(llama, "vera", tmp_path / "vera", rank=8)
    assert check_adapter(tmp_path / "vera", BASE).parameters == report.trainable_parameters


def test_packed_codes_are_read(llama: Path, saved, tmp_path: Path) -> None:
    surgery.convert(saved("lora"), "giva", tmp_path / "small", bits=4, ratio=1.2)
    checked = check_adapter(tmp_path / "small", BASE)
    assert checked.peft_type == "GIVA" and checked.layers and checked.modules == len(checked.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_broken_number_is_found_in_every_dtype(dtype: torch.dtype, saved, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    folder = edited(saved("lora"), tmp_path / "narrow", narrow)
    assert check_adapter(folder, BASE).layers
    tensors = load_file(folder / WEIGHTS)
    broken = tensors[f"{QUERY}.lora_A.weight"].float()
    broken[0, 0] = float("nan")
    tensors[f"{QUERY}.lora_A.weight"] = broken.to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="holds NaN or Inf"):
        check_adapter(folder, BASE)
