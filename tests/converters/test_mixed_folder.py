"""A folder of 24 adapters, 8 of them bad in 8 ways: the table, the JSON, the second run, a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import cli
from tests.helpers.tiny_loras import write_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GOOD = 16


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def with_config(folder: Path, **changed: Any) -> None:
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({key: v for key, v in {**known, **changed}.items() if v is not None}))


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: with_tensors(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})


def half_of_the_ranks(folder: Path) -> None:
    """Cut the layers of block 1 to rank 2, by a pattern."""

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if ".1." not in name:
                return tensor
            return (tensor[:2] if "lora_A" in name else tensor[:, :2]).contiguous()

        return {name: part(name, tensor) for name, tensor in tensors.items()}

    with_tensors(folder, cut)
    with_config(folder, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 4})


def as_loha(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LOHA", "task_type": "CAUSAL_LM", "r": 2, "alpha": 2, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config))


def with_head(folder: Path) -> None:
    name = "base_model.model.score.weight"
    with_tensors(folder, lambda tensors: {**tensors, name: torch.ones(3, 32)})
    with_config(folder, task_type="SEQ_CLS", modules_to_save=["score"])


def with_wrappers(folder: Path) -> None:
    with_tensors(folder, lambda tensors: {f"base_model.model._orig_mod.{n[17:]}": t for n, t in tensors.items()})


VARIANTS: dict[str, Callable[[Path], None]] = {
    "bf16": in_dtype(torch.bfloat16),
    "f16": in_dtype(torch.float16),
    "rslora": lambda folder: with_config(folder, use_rslora=True),
    "pattern": half_of_the_ranks,
    "loha": as_loha,
    "head": with_head,
    "wrapped": with_wrappers,
}


def narrower_than_its_other_half(folder: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t[:, :3].contiguous() if n.endswith("layers.0.self_attn.q_proj.lora_B.weight") else t
                for n, t in tensors.items()}  # fmt: skip

    with_tensors(folder, cut)


def not_a_number(folder: Path) -> None:
    def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(tensors.values()))[0, 0] = torch.nan
        return tensors

    with_tensors(folder, spoilt)


def wider_than_said(folder: Path) -> None:
    with_config(folder, r=16)


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


# What spoils an adapter, and what its one line must name: the file or tensor, and the cause or remedy.
BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "bad-cut": (cut_short, (WEIGHTS,)),
    "bad-json": (lambda folder: (folder / CONFIG).write_text('{"peft_type": '), (CONFIG,)),
    "bad-kind": (lambda folder: with_config(folder, peft_type="NEW_KIND"), ("NEW_KIND",)),
    "bad-nan": (not_a_number, ("lora_", "NaN")),
    "bad-pair": (narrower_than_its_other_half, ("layers.0.self_attn.q_proj",)),
    "bad-prompt": (lambda folder: with_config(folder, peft_type="PROMPT_TUNING"), ("prompt tuning",)),
    "bad-rank": (wider_than_said, ("16", "4")),
    "bad-weights": (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS,)),
}  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """The folder."""
    folder = tmp_path / "mixed"
    variants = list(VARIANTS.items())
    for index in range(GOOD):
        name, change = variants[index] if index < len(variants) else ("plain", lambda folder: None)
        change(write_lora(folder / f"{index:02}-{name}", index))
    for seed, (name, (spoil, _)) in enumerate(BAD.items()):
        spoil(write_lora(folder / name, 100 + seed))
    return folder


def run(folder: Path, *more: str) -> Result:
    words = ["convert", str(folder), "--to", "giva", "--ratio", "2", "-o", str(folder.parent / "out"), *more]
    return CliRunner().invoke(cli, words)


def stamps(folder: Path) -> dict[str, int]:
    """When each output was written; hidden folders are not there yet."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"[!.]*/{WEIGHTS}")}


def test_each_bad_adapter_costs_one_clear_row(mixed: Path) -> None:
    out, names = mixed.parent / "out", sorted(path.name for path in mixed.iterdir())
    first = run(mixed)
    header, *rows = first.stdout.strip().splitlines()
    assert first.exit_code == 1 and header.split()[:2] == ["adapter", "kind"]
    told = dict(zip(names, rows, strict=False))
    assert [row.split()[0] for row in rows[: len(names)]] == names
    for name, (_, words) in BAD.items():
        _, state, reason = told[name].partition("failed: ")
        assert state and all(word in reason for word in words), told[name]
        assert "Traceback" not in reason and "unexpected" not in reason
    assert rows[-2].startswith("16 done, 8 failed: ") and str(out) in rows[-2]
    assert rows[-1] == f'Load it:  import surgery; PeftModel.from_pretrained(base, "{out / names[0]}")'
    # Every good one is written and is what a call of its own makes; of the bad ones nothing is there.
    assert sorted(path.name for path in out.iterdir()) == [name for name in names if name not in BAD]
    alone, _ = surgery.convert(mixed / "04-loha", "giva", ratio=2)
    assert surgery.Adapter.open(out / "04-loha").same_as(alone)

    before = stamps(out)
    shutil.copy(mixed / "00-bf16" / WEIGHTS, mixed / "bad-weights")
    again = run(mixed, "--json")
    told = json.loads(again.stdout)
    found = {each["adapter"]: each for each in told["adapters"]}
    assert again.exit_code == 1 and told["command"] == "convert" and list(found) == names
    for name, each in found.items():
        if name in BAD and name != "bad-weights":
            assert each["state"] == "failed" and all(word in each["error"] for word in BAD[name][1])
        else:
            assert each["state"] == ("done" if name == "bad-weights" else "skipped") and "error" not in each
            assert each["bytes"] > 0 and 0 <= each["weight_error"] < 1
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before


def test_a_kill_in_the_middle_costs_nothing_that_was_finished(mixed: Path) -> None:
    out = mixed.parent / "out"
    call = [sys.executable, "-m", "surgery", "convert", mixed, "--to", "giva", "--ratio", "2", "-o", out, "-q"]
    process = subprocess.Popen(
        list(map(str, call)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 300
    while len(stamps(out)) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = stamps(out)
    assert 3 <= len(finished) < GOOD
    told = json.loads(run(mixed, "--json").stdout)["adapters"]
    states = [each["state"] for each in told]
    assert states.count("skipped") == len(finished) and states.count("done") == GOOD - len(finished)
    assert {name: stamp for name, stamp in stamps(out).items() if name in finished} == finished
    # The hidden folder of the adapter that it was killed in is gone, too.
    assert sorted(path.name for path in out.iterdir()) == sorted(
        each["adapter"] for each in told if each["state"] != "failed"
    )
