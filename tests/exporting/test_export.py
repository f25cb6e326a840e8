"""Export: adapter type x target, each file read by the target's own rule and compared with PEFT's merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.format_registry import FORMATS, AdapterParts
from surgery.errors import AdapterError, OptionError, OutputError
from surgery.exporting.export import export_targets, plain_parts, target_format
from tests.helpers.adapters import make_adapter, peft_output, weight_changes
from tests.helpers.exports import NAMES, converted, lora, stock
from tests.helpers.models import load_base, model_inputs, perturb

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf package is not installed")
TARGETS = [
    "vllm",
    "sglang",
    "mlx",
    pytest.param("llama.cpp", marks=needs_gguf),
    pytest.param("ollama", marks=needs_gguf),
]


def own(method: str) -> Callable[[Path, Path], Path]:
    def made(base: Path, folder: Path) -> Path:
        surgery.init(base, method, folder.with_name("start"), target=NAMES)
        model = peft.PeftModel.from_pretrained(load_base(base), folder.with_name("start"), is_trainable=True)
        perturb(model)
        model.save_pretrained(folder)
        return folder

    return made


# Types that a LoRA holds exactly, and those whose change has full rank.
EXACT: dict[str, Callable[[Path, Path], Path]] = {
    "lora": stock(lora),
    "lora with patterns": stock(lambda: lora(rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 11})),
    "rslora": stock(lambda: lora(use_rslora=True)),
    "adalora": stock(lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=NAMES)),
    "loha": stock(lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=NAMES)),
    "lokr": stock(lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=NAMES, decompose_both=True)),
    "vera": stock(lambda: peft.VeraConfig(r=5, target_modules=["q_proj"])),
    "packed giva": converted("giva", energy=1.0),
    "inilora": own("inilora"),
}
FULL: dict[str, Callable[[Path, Path], Path]] = {
    "dora": stock(lambda: lora(use_dora=True)),
    "hira": stock(lambda: peft.HiraConfig(r=4, target_modules=NAMES)),
    "ia3": stock(lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"])),
    "frod": own("frod"),
    "smoa": own("smoa"),
}


def written_changes(to: str, folder: Path, parts: AdapterParts) -> dict[str, torch.Tensor]:
    """dW of the files by the target's rule, under the model's names and with the model's rows."""
    target = target_format(to)
    modules = {place.name: (module, place.rows) for module, place in target.places(parts).items()}
    found = {}
    for name, change in target.changes(folder):
        module, rows = modules[name]
        back = change.clone()
        if rows is not None:
            back[rows] = change
        found[module] = back.double()
    return found


def difference(want: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Root of the summed squared differences over that of the wanted changes; what only one has counts as zeros."""
    zeros = {name: torch.zeros(1, dtype=torch.float64) for name in {*want, *found}}
    lost = sum(float((want.get(name, zeros[name]) - found.get(name, zeros[name])).square().sum()) for name in zeros)
    return (lost / sum(float(change.square().sum()) for change in want.values())) ** 0.5


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", FULL)
def test_a_full_change_is_refused_or_cut_with_its_error(kind: str, to: str, llama: Path, tmp_path: Path) -> None:
    folder = FULL[kind](llama, tmp_path / "adapter")
    want = weight_changes(llama, folder)
    with pytest.raises(AdapterError, match="full rank; say with --rank or --energy"):
        surgery.export(folder, to, tmp_path / "out", base=llama)
    assert not (tmp_path / "out").exists()
    report = surgery.export(folder, to, tmp_path / "out", base=llama, rank=6)
    _, _, parts = plain_parts(surgery.Adapter.open(folder), target_format(to), llama, rank=6)
    error = difference(want, written_changes(to, tmp_path / "out", parts))
    # No matrix of rank 6 is nearer (Eckart and Young).
    tails = [torch.linalg.svdvals(change)[6:].square().sum() for change in want.values()]
    best = float(sum(tails) / sum(change.square().sum() for change in want.values())) ** 0.5
    assert 0.001 < best <= 1.00001 * error and error <= 1.001 * best + 1e-5
    assert report.weight_error == pytest.approx(error, rel=1e-3) and not report.exact and report.rank == 6


def test_the_file_is_one_rank_and_one_scale(llama: Path, tmp_path: Path) -> None:
    folder = EXACT["lora with patterns"](llama, tmp_path / "adapter")
    report = surgery.export(folder, "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}
    assert report.padding_bytes > 0 and any("zeros" in note for note in report.notes)
    assert report.settings == {"max_lora_rank": 8} and "--max-lora-rank 8" in report.commands[0]


def test_a_plain_lora_stays_as_it_is_to_the_last_bit(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora(lora_alpha=7), dtype=torch.bfloat16)
    report = surgery.export(folder, "vllm", tmp_path / "out")
    old, new = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert report.dtype == "bfloat16" and report.weight_error == 0 and old.keys() == new.keys()
    assert surgery.export(folder, "vllm", dry_run=True, dtype=torch.float16).dtype == "float16"
    assert surgery.export(folder, "vllm", dry_run=True, dtype="fp32").dtype == "float32"
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 7


def test_rank_and_energy_cut_and_say_what_is_lost(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter", lora(r=8))
    want = weight_changes(llama, folder)
    by_rank = surgery.export(folder, "vllm", dry_run=True, rank=3)
    tails = sum(torch.linalg.svdvals(change)[3:].square().sum() for change in want.values())
    assert by_rank.weight_error == pytest.approx(
        float(tails / sum(change.square().sum() for change in want.values())) ** 0.5, rel=1e-4
    )
    by_energy = surgery.export(folder, "vllm", dry_run=True, energy=0.9)
    assert all(1 - site.weight_error**2 >= 0.9 for site in by_energy.sites) and 3 < by_energy.rank < 8
    lower = surgery.export(folder, "vllm", dry_run=True, rank=by_energy.rank - 1)
    assert any(1 - site.weight_error**2 < 0.9 for site in lower.sites)
    assert surgery.export(folder, "vllm", dry_run=True, energy=1.0).exact
    assert surgery.export(folder, "vllm", dry_run=True, rank=16).rank == 8


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
