"""Nothing that comes with a model or an adapter runs, unless the flag is given that says so."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
from safetensors.torch import load_file

import surgery
from surgery.errors import CheckpointError
from tests.fuzz.files import Canary
from tests.helpers.command_line import invoke
from tests.helpers.training_resumed import stopped
from tests.security.conftest import Folders

COMMANDS = list(Folders(Path()).commands())
READS_WEIGHTS = [name for name in COMMANDS if name != "push"]


def write_pickle(path: Path, canary: Path) -> None:
    """A file that makes the folder `canary` when it is unpickled."""
    with path.open("wb") as file:
        pickle.dump(Canary(canary), file)


def configure(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_pickle_would_run(tmp_path: Path) -> None:
    write_pickle(tmp_path / "x.bin", tmp_path / "canary")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("name", READS_WEIGHTS)
def test_model_that_is_a_pickle(name: str, folders: Folders) -> None:
    (folders.model / "model.safetensors").unlink()
    write_pickle(folders.model / "pytorch_model.bin", folders.root / "canary")
    result = invoke(*folders.commands()[name])
    assert not (folders.root / "canary").exists()
    assert result.exit_code == 1 and "only pickle weights (pytorch_model.bin)" in result.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if "init" not in name and name != "inspect a model"])
def test_adapter_that_is_a_pickle(name: str, folders: Folders) -> None:
    (folders.lora / "adapter_model.safetensors").unlink()
    write_pickle(folders.lora / "adapter_model.bin", folders.root / "canary")
    result = invoke(*folders.commands()[name])
    assert not (folders.root / "canary").exists()
    assert result.exit_code == 1 and "a pickle, which can run code when opened" in result.stderr


@pytest.mark.parametrize("name", ["init on data", "convert on data", "compare", "train", "merge"])
def test_pickles_beside_the_weights_are_not_opened(name: str, folders: Folders) -> None:
    for folder in (folders.model, folders.lora):
        for file in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"):
            write_pickle(folder / file, folders.root / "canary")
    result = invoke(*folders.commands()[name])
    assert not (folders.root / "canary").exists()
    assert result.exit_code == 0
    assert not [path for path in folders.out.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_of_a_training_is_numbers_alone(file: str, tmp_path: Path, folders: Folders) -> None:
    place = tmp_path / "training"
    place.mkdir()
    (place / "bert").symlink_to(folders.model)
    (place / "start").symlink_to(folders.lora)
    (place / "data.jsonl").symlink_to(folders.data)
    stopped(place, tmp_path / "out", 12)
    write_pickle(tmp_path / ".out.unfinished" / "checkpoint-12" / file, tmp_path / "canary")
    from tests.helpers.training_resumed import OPTIONS

    with pytest.raises(CheckpointError, match="holds more than numbers, of which nothing was run"):
        surgery.train(folders.lora, folders.model, folders.data, out=tmp_path / "out", resume=True, **OPTIONS)
    assert not (tmp_path / "canary").exists()


MODULE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

os.makedirs({canary!r}, exist_ok=True)


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that brings its own code, which makes a folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    canary = tmp_path / "canary"
    (folders.model / "modeling_own.py").write_text(MODULE.format(canary=str(canary)))
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    configure(
        folders.model / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={kind: f"modeling_own.{name}" for kind, name in names.items()},
    )
    return canary


@pytest.mark.parametrize("name", READS_WEIGHTS)
def test_code_of_a_model_does_not_run(name: str, own_code: Path, folders: Folders) -> None:
    result = invoke(*folders.commands()[name])
    assert not own_code.exists()
    assert result.exit_code == 1
    assert "the model brings its own code; --trust-remote-code runs it, if you trust it" in result.stderr


def test_code_runs_with_the_flag(own_code: Path, folders: Folders) -> None:
    result = invoke(*folders.commands("--trust-remote-code")["init"])
    assert own_code.is_dir()
    assert result.exit_code == 0


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_known_type_does_not_run(known: bool, own_code: Path, folders: Folders) -> None:
    """transformers' own class is taken where it has one."""
    configure(folders.model / "config.json", model_type="llama" if known else "own", architectures=["LlamaForCausalLM"])
    result = invoke(*folders.commands()["merge"])
    assert not own_code.exists()
    assert result.exit_code == (0 if known else 1)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "adapter_config.json"])
def test_code_that_other_configurations_name_does_not_run(file: str, own_code: Path, folders: Folders) -> None:
    configure(folders.model / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=None)
    path = (folders.model if file.startswith("tok") else folders.lora) / file
    configure(
        path,
        auto_map={"AutoTokenizer": ["modeling_own.OwnConfig", None]},
        auto_mapping={"base_model_class": "OwnForCausalLM", "parent_library": "modeling_own"},
    )
    invoke(*folders.commands()["train"])
    assert not own_code.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_of_the_hub_are_code(key: str, nested: bool, folders: Folders) -> None:
    value = {key: "some-org/fast-attention@main:kernel"}
    configure(folders.model / "config.json", **({"text_config": value} if nested else value))
    result = invoke(*folders.commands()["train"])
    assert result.exit_code == 1
    assert f"{key} names code on the Hub ('some-org/fast-attention@main:kernel')" in result.stderr


def test_weights_under_another_name_are_refused(folders: Folders) -> None:
    configure(folders.model / "config.json", transformers_weights="other.safetensors")
    os.link(folders.model / "model.safetensors", folders.model / "other.safetensors")
    result = invoke(*folders.commands()["train"])
    assert result.exit_code == 1 and "transformers_weights" in result.stderr


def test_single_file_wins_over_an_index(folders: Folders) -> None:
    """As in transformers, so that a fit and the model that is loaded for it have the same weights."""
    names = load_file(folders.model / "model.safetensors")
    (folders.model / "other.safetensors").write_bytes(
        (folders.model / "model.safetensors").read_bytes()[:-4] + bytes(4)
    )
    index = {"weight_map": dict.fromkeys(names, "other.safetensors")}
    (folders.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert invoke(*folders.commands()["init"]).exit_code == 0
    base = surgery.models.base_model.BaseModel.open(folders.model)
    assert {path.name for path in base.files.files.values()} == {"model.safetensors"}
