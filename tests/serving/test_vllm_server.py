"""A vLLM server that serves packed adapters from a store, asked over loopback, against PEFT.

Needs the Python of an environment with vLLM and surgery in SURGERY_VLLM_SERVER: `make vllm` makes one and runs this.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as tf

import surgery
from tests.helpers.adapters import make_adapter

PYTHON = os.environ.get("SURGERY_VLLM_SERVER")
PROMPTS = [[5, 7, 33], [9, 10, 20, 4], [60, 11]]
# The first answer waits for kernels to be compiled.
PATIENCE = 900
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="SURGERY_VLLM_SERVER names no Python with vLLM: see make vllm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny Llama in `base`, and a packed adapter of it in `adapters/packed`."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlamaConfig(
        vocab_size=96, num_key_value_heads=1, head_dim=32, max_position_embeddings=128, initializer_range=0.3, **sizes
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 96)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    make_adapter(
        folder / "base", folder / "lora", peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"), size=0.3
    )
    surgery.convert(folder / "lora", "giva", folder / "adapters" / "packed", rank=4, bits=8, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """Address of a server of the base, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = ["--model", str(place / "base"), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-dtype", "float32"]
    small = ["--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4"]
    store = {"SURGERY_ADAPTERS": str(place / "adapters"), "SURGERY_ADAPTERS_CACHE": str(place / "cache")}
    store["SURGERY_ADAPTERS_DTYPE"] = "float32"
    with (place / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *served, *lora, *small],
            env={**os.environ, **SETTINGS, **store},
            stdout=log,
            stderr=log,
        )
    try:
        found = f"http://127.0.0.1:{port}"
        until = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{found}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (place / "log.txt").read_text()[-3000:]
                time.sleep(1)
        yield found
    finally:
        server.terminate()
        server.wait(60)


def _asked(address: str, model: str, prompt: list[int]) -> dict[int, float]:
    """The server's twenty largest log-probabilities of the next token."""
    question: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**question, "return_tokens_as_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        found = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.partition(":")[2]): value for token, value in found.items()}


def test_an_adapter_of_the_store_answers_as_peft_does(address: str, place: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        bare = [base(torch.tensor([prompt])).logits[0, -1].log_softmax(0) for prompt in PROMPTS]
        tuned = peft.PeftModel.from_pretrained(base, place / "adapters" / "packed").eval()
        want = [tuned(torch.tensor([prompt])).logits[0, -1].log_softmax(0) for prompt in PROMPTS]
    for name, expected in ((str(place / "base"), bare), ("packed", want)):
        for prompt, reference in zip(PROMPTS, expected, strict=True):
            found = _asked(address, name, prompt)
            assert max(abs(float(reference[token]) - value) for token, value in found.items()) < 1e-4
    assert max(float((one - other).abs().max()) for one, other in zip(bare, want, strict=True)) > 0.1


def test_an_adapter_that_is_not_there_is_refused(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _asked(address, "absent", PROMPTS[0])
