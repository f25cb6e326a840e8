"""Tiny adapters as text, one file for each kind and format version, with what their weight changes add up to.

    python -m tests.compat.stored KIND...

writes the examples of these kinds, each under the format version that its configuration names. Those that a released
version wrote are never written again.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import llama_config

__all__ = ["EXAMPLES", "base_in", "examples", "sums", "unfolded"]

EXAMPLES = Path(__file__).parent / "examples"
LARGEST = 4096
TARGETS = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
FILES = ("adapter_config.json", "surgery.json")
WEIGHTS = "adapter_model.safetensors"


def base_in(folder: Path) -> Path:
    """The base of all examples: a Llama whose weights come from whole numbers, the same on every machine."""
    config = llama_config(
        vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            place = torch.arange(parameter.numel()) * 7919 + number * 104729
            parameter.copy_((place % 251 - 125).reshape(parameter.shape) / 256)
    model.save_pretrained(folder)
    return folder


def examples() -> Iterator[Path]:
    """The files, oldest version first."""
    yield from sorted(EXAMPLES.glob("v*/*.json"))


def unfolded(example: Path, folder: Path) -> dict[str, list[float]]:
    """Write an example as the adapter folder that it was.

    Returns:
        By module, the sums of its weight change.
    """
    stored = json.loads(example.read_text())
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(json.dumps(stored[name]))
    (folder / WEIGHTS).write_bytes(base64.b64decode(stored[WEIGHTS]))
    expected: dict[str, list[float]] = stored["sums"]
    return expected


def sums(change: torch.Tensor) -> list[float]:
    """Three numbers that tell a weight change: its sum, its squares' sum, and one in which every place counts
    otherwise.
    """
    wide = change.detach().double()
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in wide.shape)
    return [float(wide.sum()), float(wide.square().sum()), float(rows @ wide @ columns)]


def changes(adapter: Path, base: Path) -> dict[str, list[float]]:
    """The sums of every layer of an adapter on its base."""
    from surgery.adapters.adapter import Adapter
    from surgery.adapters.source import Source
    from surgery.models.base_model import BaseModel

    source = Source.open(Adapter.open(adapter), BaseModel.open(base), torch.device("cpu"))
    return {module: sums(delta.dense()) for module, _, delta in source.deltas()}


def _kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> method and options of `surgery.init`."""
    return {
        "vera": ("vera", {"rank": 3}),
        "giva": ("giva", {"rank": 2}),
        "giva-regenerated": ("giva", {"rank": 2, "store_bases": False}),
        "inilora": ("inilora", {"rank": 2}),
        "inilora-regenerated": ("inilora", {"rank": 2, "store_bases": False}),
        "inilora-beta-regenerated": ("inilora-beta", {"rank": 2, "store_bases": False}),
        "frod": ("frod", {}),
        "frod-regenerated": ("frod", {"store_bases": False}),
        "smoa": ("smoa", {"rank": 2, "variant": "components"}),
        "smoa-blocks": ("smoa", {"rank": 3, "alpha": 6}),
        "smoa-blocks-regenerated": ("smoa", {"rank": 2, "store_bases": False}),
    }


def _write(folder: Path, name: str, base: Path) -> None:
    stored: dict[str, Any] = {each: json.loads((folder / each).read_text()) for each in FILES}
    version = stored[FILES[0]].get("format_version", stored[FILES[1]]["format_version"])
    stored[WEIGHTS] = base64.b64encode((folder / WEIGHTS).read_bytes()).decode()
    stored["sums"] = changes(folder, base)
    text = json.dumps(stored, separators=(",", ":"), sort_keys=True) + "\n"
    path = EXAMPLES / f"v{version}" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"{path.name}: {len(text)} bytes, of which the file {(folder / WEIGHTS).stat().st_size}")


def main(wanted: list[str]) -> None:
    """Write the examples of these kinds."""
    import surgery
    from tests.helpers.models import distance

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_in(folder / "base")
        batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 1, 3]])}
        for kind, (method, options) in _kinds().items():
            if kind not in {*wanted, "inilora"}:
                continue
            more: dict[str, Any] = {"data": [batch], "loss": distance} if method == "giva" else {}
            adapter, _ = surgery.init(base, method, folder / kind, target=TARGETS, **options, **more)
            for number, (key, value) in enumerate(sorted(adapter.tensors.items())):
                if key.rpartition("_")[2] in {"b", "d", "o", "s", "l", "A", "B"} and not _frozen(method, key):
                    place = torch.arange(value.numel()) * 31 + number * 17
                    adapter.tensors[key] = value + (place % 13 - 6).reshape(value.shape) / 32
            adapter.save(folder / kind, force=True)
            if kind in wanted:
                _write(folder / kind, kind, base)
        if "giva-kinds" in wanted:
            made = _lora_with_embedding(base, folder / "embedding")
            surgery.convert(made, "giva", folder / "giva-kinds", base=base, energy=1.0, bits=16)
            _write(folder / "giva-kinds", "giva-kinds", base)
        for kind, options in (("giva-gains", {"max_error": 0.05}), ("giva-gains-floats", {"bits": 16, "rank": 1})):
            if kind in wanted:
                made = _dora(base, folder / f"{kind}-source")
                surgery.convert(made, "giva", folder / kind, base=base, **options)
                _write(folder / kind, kind, base)
        for kind, to, options in (
            ("giva-codes", "giva", {"ratio": 1.5}),
            ("giva-floats", "giva", {"bits": 16, "rank": 2}),
            ("lora", "lora", {"rank": 2}),
            ("vera-fitted", "vera", {"energy": 1.0}),
        ):
            if kind in wanted:
                surgery.convert(folder / "inilora", to, folder / kind, base=base, **options)
                _write(folder / kind, kind, base)


def _lora_with_embedding(base: Path, folder: Path) -> Path:
    """A LoRA on a linear and an embedding, of whole numbers."""
    return _lora(base, folder, ["model.embed_tokens", "model.layers.1.mlp.down_proj"])


def _dora(base: Path, folder: Path) -> Path:
    """A DoRA of whole numbers, with the norms of the base for magnitudes."""
    return _lora(base, folder, [f"model.{name}" for name in TARGETS], use_dora=True)


def _lora(base: Path, folder: Path, targets: list[str], **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                place = torch.arange(parameter.numel()) * 31 + number * 17
                parameter.copy_((place % 13 - 6).reshape(parameter.shape) / 8)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _frozen(method: str, key: str) -> bool:
    return key.endswith(("vera_A", "vera_B")) or (method == "giva" and key.endswith(("giva_A", "giva_B")))


if __name__ == "__main__":
    main(sys.argv[1:])
