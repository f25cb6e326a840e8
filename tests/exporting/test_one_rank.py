"""One rank for the whole file: exact, or cut with the stated error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError
from surgery.exporting.export import plain_parts, target_format
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.exports import EXACT, FULL, TARGETS, difference, lora, written_changes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", FULL)
def test_a_full_change_is_refused_or_cut_with_its_error(kind: str, to: str, llama: Path, tmp_path: Path) -> None:
    folder = FULL[kind](llama, tmp_path / "adapter")
    want = weight_changes(llama, folder)
    with pytest.raises(AdapterError, match="full rank; say with --rank or --energy"):
        surgery.export(folder, to, tmp_path / "out", base=llama)
    assert not (tmp_path / "out").exists()
    report = surgery.export(folder, to, tmp_path / "out", base=llama, rank=2)
    _, _, parts = plain_parts(surgery.Adapter.open(folder), target_format(to), llama, rank=2)
    error = difference(want, written_changes(to, tmp_path / "out", parts))
    # No matrix of rank 2 is nearer (Eckart and Young).
    tails = [torch.linalg.svdvals(change)[2:].square().sum() for change in want.values()]
    best = float(sum(tails) / sum(change.square().sum() for change in want.values())) ** 0.5
    assert 0.001 < best <= 1.00001 * error and error <= 1.001 * best + 1e-5
    assert report.weight_error == pytest.approx(error, rel=1e-3) and not report.exact and report.rank == 2


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
