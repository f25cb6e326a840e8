"""A package that is installed beside surgery adds a method, an adapter type, a form and a format: one file each.

`tests/plugin` is installed into a folder of its own, without network or build isolation, and used from the command line
and from PEFT in processes that have that folder on their path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import load_base

ROOT = Path(__file__).parents[1]
TRAIN = """
import sys, torch, transformers, peft, surgery
base, start, out = sys.argv[1:]
load = transformers.AutoModelForCausalLM.from_pretrained
model = peft.PeftModel.from_pretrained(load(base), start, is_trainable=True)
tokens = torch.arange(24).reshape(2, 12) % 90
with torch.no_grad():
    before = model(tokens).logits
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
model.save_pretrained(out)
with torch.no_grad():
    trained = model.eval()(tokens).logits
again = peft.PeftModel.from_pretrained(load(base), out).eval()
with torch.no_grad():
    assert torch.equal(again(tokens).logits, trained)
assert (trained - before).abs().max() > 1e-4
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the installed package."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "plugin", source)  # building leaves files beside the sources
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    path = os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surgery", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_a_method_is_started_trained_in_peft_and_merged(environment, llama: Path, tmp_path: Path) -> None:
    assert "outer" in run(environment, "methods").stdout
    run(environment, "init", "--method", "outer", llama, "--target", "q_proj", "-o", tmp_path / "start")
    script = [sys.executable, "-W", "ignore", "-c", TRAIN, llama, tmp_path / "start", tmp_path / "trained"]
    subprocess.run([str(word) for word in script], env=environment, check=True)
    run(environment, "merge", tmp_path / "trained", "--base", llama, "-o", tmp_path / "merged")
    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        before = load_base(llama).state_dict()[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.outer_u" in tensors:
            change = torch.outer(tensors[f"{module}.outer_u"].double(), tensors[f"{module}.outer_v"].double())
            assert change.abs().max() > 0
            assert torch.allclose(weight.double(), before.double() + change, atol=1e-6)
        else:
            assert torch.equal(weight, before)


def test_an_adapter_type_is_inspected_and_cut_to_a_lora(environment, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "stripes").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.stripes_s"
    save_file({name: torch.linspace(-1, 1, 32)}, tmp_path / "stripes" / "adapter_model.safetensors")
    config = {"peft_type": "STRIPES", "target_modules": ["model.layers.0.self_attn.q_proj"]}
    (tmp_path / "stripes" / "adapter_config.json").write_text(json.dumps(config))
    assert "STRIPES" in run(environment, "inspect", tmp_path / "stripes").stdout
    run(environment, "convert", tmp_path / "stripes", "--to", "lora", "--base", llama, "-o", tmp_path / "lora")
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    change = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
    assert torch.allclose(change, torch.linspace(-1, 1, 32)[:, None].expand(32, 32), atol=1e-6)


def test_a_format_is_read_into_a_form(environment, tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "numpy").mkdir()
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator)
    np.savez(tmp_path / "numpy" / "adapter.npz", **{"block.0.fc.B": B.numpy(), "block.0.fc.A": A.numpy()})
    result = run(
        environment, "convert", tmp_path / "numpy", "--to", "mean", "--accept-loss", "--json", "-o", tmp_path / "mean"
    )
    assert json.loads(result.stdout)["to"] == "mean"
    found = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    module = "base_model.model.block.0.fc"
    change = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
    want = (B.double() @ A.double()).mean(1, keepdim=True).expand(5, 7)
    assert torch.allclose(change.double(), want, atol=1e-6)
    assert "mean" in run(environment, "convert", "--help").stdout


def test_a_plugin_that_cannot_be_imported_costs_its_entry_alone(environment, tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[surgery.methods]\nbroken = no_such_module:INFO\n")
    path = os.pathsep.join([str(tmp_path / "site"), environment["PYTHONPATH"]])
    done = run({**environment, "PYTHONPATH": path}, "methods")
    assert "outer" in done.stdout and "broken" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if "broken" in line]
    assert len(lines) == 1 and "the method 'broken' cannot be imported and is left out" in lines[0]
