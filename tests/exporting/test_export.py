"""Export: adapter type x target, each file read by the target's own rule and compared with PEFT's merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import surgery
from docs.generate import server_cell
from surgery.adapters.format_registry import FORMATS
from surgery.adapters.types.registry import all_types
from surgery.errors import AdapterError, OptionError, OutputError
from surgery.exporting.export import export_targets, plain_parts, target_format
from tests.helpers.adapters import make_adapter, peft_output, weight_changes
from tests.helpers.exports import EXACT, FULL, TARGETS, difference, lora, written_changes
from tests.helpers.models import model_inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", EXACT)
def test_the_server_computes_what_peft_does(kind: str, to: str, llama: Path, tmp_path: Path) -> None:
    folder = EXACT[kind](llama, tmp_path / "adapter")
    want = weight_changes(llama, folder)
    report = surgery.export(folder, to, tmp_path / "out", base=llama)
    _, _, parts = plain_parts(surgery.Adapter.open(folder), target_format(to), llama)
    assert difference(want, written_changes(to, tmp_path / "out", parts)) <= 1e-5
    assert report.exact and report.weight_error <= 1e-6 and report.to == to and report.modules == len(report.sites)


def test_the_table_of_the_docs_has_an_example_for_each_type(llama: Path, tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for name, make in {**EXACT, **FULL}.items():
        folder = make(llama, tmp_path / name.replace(" ", "-") / "adapter")
        kind = surgery.Adapter.open(folder).type
        assert kind is not None
        found[kind.title] = server_cell(kind)
        said = found[kind.title].startswith("exact")
        assert said == (name in EXACT) or "else cut" in found[kind.title], name
    assert set(found) == {kind.title for kind in all_types() if kind.readable}


def test_a_dry_run_says_what_the_run_says_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    folder = EXACT["lora with patterns"](llama, tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))
    dry = surgery.export(folder, "sglang", tmp_path / "out", base=llama, dry_run=True, dtype="bfloat16")
    assert sorted(tmp_path.rglob("*")) == before and dry.dry_run and dry.out is None
    real = surgery.export(folder, "sglang", tmp_path / "out", base=llama, dtype="bfloat16")
    assert dry.weight_error == real.weight_error > 0 and dry.sites == real.sites
    assert 0 < real.bytes - dry.bytes < 20_000  # the header


def test_a_model_without_its_head_gets_the_names_of_the_base(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora())
    tensors = load_file(folder / "adapter_model.safetensors")
    bare = {name.replace("base_model.model.model.", "base_model.model."): each for name, each in tensors.items()}
    save_file(bare, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.0.*a name of a model without its head.*--base"):
        surgery.export(folder, "vllm", tmp_path / "out")
    surgery.export(folder, "vllm", tmp_path / "out", base=llama)
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("tgi", {}, "unknown target 'tgi': use .*vllm"),
        ("kohya", {}, "not written yet"),
        ("diffusers", {}, "not written yet"),
        ("vllm", {"dtype": "q8_0"}, "vLLM reads no dtype 'q8_0'"),
        ("vllm", {"rank": 0}, "rank must be at least 1"),
        ("vllm", {"energy": 1.5}, "energy is a share"),
        ("vllm", {"rank": 2, "energy": 0.5}, "one of rank and energy"),
        ("llama.cpp", {}, "needs the base model"),
    ],
)
def test_options_that_make_no_sense(
    to: str, options: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora())
    with pytest.raises(OptionError, match=message):
        surgery.export(folder, to, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", TARGETS)
def test_what_the_server_cannot_hold_is_refused_by_name(to: str, llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match=r"cannot hold it: .*lm_head\.weight is saved whole"):
        surgery.export(folder, to, tmp_path / "out", base=llama)
    biased = make_adapter(llama, tmp_path / "biased", lora(lora_bias=True))
    with pytest.raises(AdapterError, match="adds a bias to the outputs of"):
        surgery.export(biased, to, tmp_path / "out", base=llama)
    embedding = make_adapter(llama, tmp_path / "embedding", lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(AdapterError, match=r"changes model\.embed_tokens, which is of the kind embedding, and"):
        surgery.export(embedding, to, tmp_path / "out", base=llama)
    tokens = make_adapter(llama, tmp_path / "tokens", lora(trainable_token_indices=[3, 5]))
    with pytest.raises(AdapterError, match=r"trains single tokens \(model\.embed_tokens\)"):
        surgery.export(tokens, to, tmp_path / "out", base=llama)
    assert not (tmp_path / "out").exists()


def test_a_rank_above_vllms_largest(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora(r=600, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="rank 600 is above vLLM's largest max_lora_rank, 512; cut it with --rank"):
        surgery.export(folder, "vllm", tmp_path / "out")
    assert surgery.export(folder, "vllm", tmp_path / "out", rank=32).settings == {"max_lora_rank": 32}


def test_numbers_that_a_type_cannot_hold(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: each * (1e7 if "lora_B" in name else 1e-7) for name, each in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(OutputError, match=r"q_proj: as float16 vLLM would lose .* to rounding; use --dtype float32"):
        surgery.export(folder, "vllm", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_back_as_something_else_does_not_get_its_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora())
    target = target_format("vllm")
    read = type(target).changes
    monkeypatch.setattr(
        type(target), "changes", lambda self, where: ((name, 1.01 * each) for name, each in read(self, where))
    )
    with pytest.raises(OutputError, match="would compute another change of"):
        surgery.export(folder, "vllm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_outputs_are_safe(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora())
    with pytest.raises(OutputError, match="choose another output"):
        surgery.export(folder, "vllm", folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        surgery.export(folder, "vllm", tmp_path / "out")
    surgery.export(folder, "vllm", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_every_target_is_a_format() -> None:
    known = {"vllm", "sglang", "llama.cpp", "ollama", "mlx", "diffusers", "kohya"}
    assert known <= set(export_targets()) <= set(FORMATS.names())


@pytest.mark.filterwarnings("ignore")
def test_peft_opens_what_vllm_reads(llama: Path, tmp_path: Path) -> None:
    folder = EXACT["lora with patterns"](llama, tmp_path / "adapter")
    surgery.export(folder, "vllm", tmp_path / "out")
    inputs = model_inputs("llama")
    want, found = peft_output(llama, folder, inputs), peft_output(llama, tmp_path / "out", inputs)
    assert float((want - found).abs().max()) <= 1e-5 * float(want.abs().max())
