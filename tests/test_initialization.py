"""Every method on every kind of model: PEFT opens the start, it changes nothing, it trains, it survives saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from surgery.catalogue import METHODS
from tests.models import distance, load_base, model_inputs, output, relative_difference, start_options

KINDS = ("minilm", "bert", "llama", "gpt2", "t5", "vit", "llama-bf16-sharded")
# Exact zero by construction, except where the frozen bases are regenerated (tested further down).
START_TOLERANCE = 1e-5

ADAPTED = {"minilm": 36, "bert": 12, "llama": 21, "gpt2": 8, "t5": 36, "vit": 12, "llama-bf16-sharded": 21}


def perturb(model: torch.nn.Module) -> None:
    """Move every trained tensor by a seeded step, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype) * 0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(METHODS))
def test_start_trains_and_survives(method: str, kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    rank = {} if method == "frod" else {"rank": 6}
    _, report = surgery.init(folder, method=method, out=tmp_path / "start", **rank, **start_options(method, kind))
    assert report.modules == ADAPTED[kind]
    inputs = model_inputs(kind.removesuffix("-bf16-sharded"))
    base = load_base(folder)
    with torch.no_grad():
        expected = output(base, inputs)
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).eval()
    with torch.no_grad():
        start = output(model, inputs)
    assert relative_difference(start, expected) <= START_TOLERANCE

    # VeRA's projections and heads aside, what trains is what the report counts.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for _, p in trained) == report.trainable_parameters

    optimizer = torch.optim.Adam([p for _, p in trained], lr=0.02)
    touched: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        distance(model, inputs).backward()
        assert all(p.grad is not None for _, p in trained)
        touched |= {name for name, p in trained if p.grad.abs().max() > 0}
        optimizer.step()
    assert touched == {name for name, _ in trained}
    with torch.no_grad():
        moved = output(model, inputs)
    assert relative_difference(moved, expected) > 1e-3

    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "trained").eval()
    with torch.no_grad():
        assert relative_difference(output(again, inputs), moved) <= 1e-6


FRESH_PROCESS = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
import surgery
from pathlib import Path
from peft import PeftModel
from tests.models import load_base, model_inputs, output
model = PeftModel.from_pretrained(load_base(Path(sys.argv[1])), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(output(model, model_inputs(sys.argv[5])), sys.argv[4])
"""


def in_fresh_process(folder: Path, adapter: Path, threads: int, kind: str, tmp_path: Path) -> torch.Tensor:
    """The output of an adapted model, computed by another process with so many threads."""
    path = tmp_path / f"out-{threads}.pt"
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder), str(adapter), str(threads), str(path), kind],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vera", {}),
        ("giva", {"store_bases": False}),
        ("inilora", {}),
        ("inilora", {"store_bases": False}),
        ("inilora-beta", {"store_bases": False}),
        ("frod", {}),
        ("frod", {"store_bases": False}),
        ("smoa", {}),
    ],
)
def test_fresh_process_with_other_thread_count(method, options, model_folder, tmp_path: Path) -> None:
    folder = model_folder("minilm")
    surgery.init(folder, method=method, out=tmp_path / "start", **options, **start_options(method, "minilm"))
    model = PeftModel.from_pretrained(load_base(folder), tmp_path / "start", is_trainable=True).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    inputs = model_inputs("minilm")
    with torch.no_grad():
        here = output(model, inputs)
        base = output(load_base(folder), inputs)
    for threads in (1, 2):
        there = in_fresh_process(folder, tmp_path / "trained", threads, "minilm", tmp_path)
        assert relative_difference(there, here) <= 1e-5
    # The control: the adapter does something.
    assert relative_difference(here, base) > 1e-2


@pytest.mark.parametrize("method", ["inilora", "frod"])
def test_no_store_bases_is_smaller_and_regenerates_the_same(method: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder("minilm")
    _, stored = surgery.init(folder, method=method, out=tmp_path / "stored")
    bare_adapter, bare = surgery.init(folder, method=method, out=tmp_path / "bare", store_bases=False)
    assert bare.bytes < 0.6 * stored.bytes
    model = PeftModel.from_pretrained(load_base(folder), tmp_path / "bare").eval()
    if method == "frod":
        bases = surgery.Adapter.open(tmp_path / "stored").modules
        expected = {m: t["frod_portable_V"] for m, t in bases.items() if "frod_portable_V" in t}
        found = {m: model.base_model.model.get_submodule(m).frod_portable_V["default"] for m in expected}
    else:
        # The trained factors start as the bases that were left out.
        expected = {m: t["inilora_A"] for m, t in bare_adapter.modules.items()}
        found = {m: model.base_model.model.get_submodule(m).inilora_A0["default"] for m in expected}
    for module, tensor in expected.items():
        assert relative_difference(found[module], tensor) < 1e-5, module


def test_dry_run_reads_and_writes_nothing(llama: Path, tmp_path: Path, monkeypatch) -> None:
    from surgery.checkpoints.base_model import BaseModel

    monkeypatch.setattr(BaseModel, "raw_weight", lambda *args: pytest.fail("a weight was read"))
    adapter, plan = surgery.init(llama, method="frod", out=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert adapter.tensors == {}
    monkeypatch.undo()
    _, report = surgery.init(llama, method="frod", out=tmp_path / "out")
    assert plan.trainable_parameters == report.trainable_parameters
    assert [s.bytes for s in plan.sites] == [s.bytes for s in report.sites]
    assert plan.bytes <= report.bytes <= plan.bytes + 20_000  # the header comes on top


def test_provenance_has_no_absolute_path(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method="inilora", out=tmp_path / "out")
    text = (tmp_path / "out" / "surgery.json").read_text()
    assert str(llama) not in text and str(tmp_path) not in text
    assert json.loads(text)["method"] == "inilora"


def test_dtype_halves_the_file_and_keeps_the_start(llama: Path, tmp_path: Path) -> None:
    _, wide = surgery.init(llama, method="inilora", out=tmp_path / "wide")
    _, narrow = surgery.init(llama, method="inilora", out=tmp_path / "narrow", dtype="bfloat16")
    assert narrow.bytes < 0.7 * wide.bytes
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "narrow").eval()
    inputs = model_inputs("llama")
    with torch.no_grad():
        assert relative_difference(output(model, inputs), output(load_base(llama), inputs)) <= START_TOLERANCE


def test_fresh_head_is_seeded_and_saved(model_folder, tmp_path: Path) -> None:
    """A classifier on a checkpoint without one: PEFT's own type needs the head in the file."""
    import transformers

    folder = model_folder("bert")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, report = surgery.init(folder, method="vera", rank=4, task="seq-cls", seed=seed, out=tmp_path / name)
        assert any("classifier" in line for line in report.notes)
    heads = {n: surgery.Adapter.open(tmp_path / n).modules["classifier"]["weight"] for n in "abc"}
    assert torch.equal(heads["a"], heads["b"]) and not torch.equal(heads["a"], heads["c"])
    assert 0.005 < float(heads["a"].std()) < 0.1
    base = transformers.BertForSequenceClassification.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, heads["a"])
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad


def test_inilora_states_what_its_start_holds(model_folder) -> None:
    """The share in the report equals the one computed from the weights."""
    folder = model_folder("minilm")
    adapter, report = surgery.init(folder, "inilora", rank=8, alpha=16, target=["query"])
    base = load_base(folder)
    for entry in report.sites:
        W = base.get_submodule(entry.module).weight.detach().double()
        tensors = adapter.modules[entry.module]
        start = 2.0 * tensors["inilora_B0"].double() @ tensors["inilora_A0"].double()
        expected = 1 - float((W - start).square().sum() / W.square().sum())
        assert entry.captured == pytest.approx(expected, rel=0.01)
    assert any("squared norm" in line for line in report.notes)


def test_fallbacks_of_the_joint_decomposition_are_named(llama: Path) -> None:
    _, report = surgery.init(llama, "frod", target=["model.layers.0.self_attn.q_proj"])
    assert any("one layer alone" in line for line in report.notes)


def test_the_base_folder_is_never_the_output(llama: Path) -> None:
    before = sorted(path.name for path in llama.iterdir())
    for out in (llama, llama / ".", llama.parent):
        with pytest.raises(surgery.errors.OutputError, match="holds the base model"):
            surgery.init(llama, "vera", out, force=True)
    assert sorted(path.name for path in llama.iterdir()) == before


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_on_request(llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(llama, folder)
    (folder / "own_model.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config.update(
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(surgery.errors.CheckpointError, match="--trust-remote-code"):
        surgery.init(folder, "inilora", tmp_path / "out")
    _, report = surgery.init(folder, "inilora", tmp_path / "out", trust_remote_code=True)
    assert report.modules == 21
