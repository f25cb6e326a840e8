"""The servers themselves read what was exported: their predictions, and vLLM's weights, against PEFT's.

`make servers` installs llama.cpp (xllamacpp) and mlx-lm in an environment of their own, unpacks vLLM beside them, and
runs these tests with SURGERY_SERVERS at that Python and SURGERY_VLLM at vLLM's folder. Without these they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.helpers.adapters import peft_output, weight_changes
from tests.helpers.exports import converted, lora, qwen, stock
from tests.helpers.gguf_base import write_base
from tests.helpers.models import load_base

PYTHON = os.environ.get("SURGERY_SERVERS")
READERS = Path(__file__).parents[1] / "helpers" / "readers"
PROMPTS = [[1, 5, 7, 33], [1, 9, 10], [1, 20, 4, 4, 60, 11]]
KL = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "lora": stock(lambda: lora(target_modules=ALL)),
    "ranks by layer, rslora": stock(
        lambda: lora(target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 2, "down_proj": 1})
    ),
    "packed giva": converted("giva", energy=1.0),
}

VLLM = os.environ.get("SURGERY_VLLM")
pytestmark = pytest.mark.filterwarnings("ignore")
needs_servers = pytest.mark.skipif(
    PYTHON is None or find_spec("gguf") is None,
    reason="make servers installs the servers and sets SURGERY_SERVERS; the gguf package writes GGUF",
)
needs_vllm = pytest.mark.skipif(VLLM is None, reason="make servers unpacks vLLM and sets SURGERY_VLLM")


def read(script: str, base: Path, adapter: Path | str) -> torch.Tensor:
    """The log-probabilities of the next token after each prompt, `(prompts, vocabulary)`, by a server."""
    command = [str(PYTHON), str(READERS / f"{script}.py"), str(base), str(adapter), json.dumps(PROMPTS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[Any] = json.loads(result.stdout.strip().splitlines()[-1])
    rows = [[row[str(n)] for n in range(len(row))] if isinstance(row, dict) else row for row in found]
    return torch.tensor(rows, dtype=torch.float64).log_softmax(1)


def by_peft(base: Path, adapter: Path | None) -> torch.Tensor:
    """The same by PEFT, or by the base alone."""
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            inputs = {"input_ids": torch.tensor([prompt])}
            logits = load_base(base)(**inputs).logits if adapter is None else peft_output(base, adapter, inputs)
            rows.append(logits[0, -1].double().log_softmax(0))
    return torch.stack(rows)


def divergence(want: torch.Tensor, found: torch.Tensor) -> float:
    return float((want.exp() * (want - found)).sum(1).max())


def check(base: Path, adapter: Path, read_with: Callable[[Path | str], torch.Tensor], out: Path | str) -> None:
    want, bare = by_peft(base, adapter), by_peft(base, None)
    assert divergence(bare, read_with("-")) <= KL, "the server computes another base model"
    assert divergence(want, bare) > 100 * KL, "the adapter does nothing"
    assert divergence(want, read_with(out)) <= KL


@needs_servers
@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp(kind: str, model: str, llama: Path, tmp_path: Path) -> None:
    base = llama if model == "llama" else qwen(tmp_path / "qwen2")
    adapter = KINDS[kind](base, tmp_path / "adapter")
    surgery.export(adapter, "llama.cpp", tmp_path / "out", base=base)
    file = write_base(base, tmp_path / "base.gguf")
    check(base, adapter, lambda path: read("llama_cpp_reader", file, path), tmp_path / "out" / "adapter.gguf")


@needs_servers
def test_llama_cpp_on_gpt2(model_folder, tmp_path: Path) -> None:
    base = model_folder("gpt2")
    config = lora(target_modules=["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    adapter = stock(lambda: config)(base, tmp_path / "adapter")
    surgery.export(adapter, "llama.cpp", tmp_path / "out", base=base)
    file = write_base(base, tmp_path / "base.gguf")
    check(base, adapter, lambda path: read("llama_cpp_reader", file, path), tmp_path / "out" / "adapter.gguf")


@needs_servers
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_llama_cpp_reads_every_type(dtype: str, tmp_path: Path) -> None:
    base = qwen(tmp_path / "qwen2")
    adapter = KINDS["lora"](base, tmp_path / "adapter")
    surgery.export(adapter, "llama.cpp", tmp_path / "out", base=base, dtype=dtype)
    file = write_base(base, tmp_path / "base.gguf")
    found = read("llama_cpp_reader", file, tmp_path / "out" / "adapter.gguf")
    want, bare = by_peft(base, adapter), by_peft(base, None)
    assert divergence(want, found) <= 0.01 * divergence(want, bare)


@needs_servers
@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx(kind: str, model: str, llama: Path, tmp_path: Path) -> None:
    base = llama if model == "llama" else qwen(tmp_path / "qwen2")
    adapter = KINDS[kind](base, tmp_path / "adapter")
    surgery.export(adapter, "mlx", tmp_path / "out", base=base)
    check(base, adapter, lambda path: read("mlx_reader", base, path), tmp_path / "out")


@needs_servers
def test_mlx_where_only_early_layers_are_adapted(llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["v_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    adapter = stock(lambda: config)(llama, tmp_path / "adapter")
    surgery.export(adapter, "mlx", tmp_path / "out")
    want, bare, found = by_peft(llama, adapter), by_peft(llama, None), read("mlx_reader", llama, tmp_path / "out")
    assert divergence(want, found) <= 1e-3 * divergence(want, bare)


def by_vllm(adapter: Path, out: Path, max_rank: int = 16) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(READERS / "vllm_reader.py"), str(VLLM), str(adapter), str(max_rank), str(out)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@needs_vllm
@pytest.mark.parametrize("kind", KINDS)
def test_vllm(kind: str, llama: Path, tmp_path: Path) -> None:
    adapter = KINDS[kind](llama, tmp_path / "adapter")
    report = surgery.export(adapter, "vllm", tmp_path / "out")
    result = by_vllm(tmp_path / "out", tmp_path / "read", report.settings["max_lora_rank"])
    assert result.returncode == 0, result.stderr[-3000:]
    found, want = load_file(tmp_path / "read"), weight_changes(llama, adapter)
    assert len(found) == 2 * len(want)
    for name, change in want.items():
        mine = found[f"{name}.B"].double() @ found[f"{name}.A"].double()
        assert float((mine - change).norm() / change.norm()) <= 1e-5, name


@needs_vllm
def test_vllm_refuses_what_the_export_refuses(llama: Path, tmp_path: Path) -> None:
    """That the reader can fail: DoRA, and a rank above the server's."""
    dora = stock(lambda: lora(use_dora=True))(llama, tmp_path / "dora")
    assert "DoRA" in by_vllm(dora, tmp_path / "read").stderr
    plain = KINDS["lora"](llama, tmp_path / "plain")
    assert "is greater than max_lora_rank 1" in by_vllm(plain, tmp_path / "read", 1).stderr
