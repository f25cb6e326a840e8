"""Adapters on layers of every kind: tiny bases, and whether each verb does with an adapter what stock PEFT does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import surgery
from tests.helpers.models import VOCAB, load_base, model_inputs, output, save_model

__all__ = ["BASES", "base_of", "inputs_of", "trained", "verbs"]

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _resnet() -> Any:
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=3
    )
    return tf.ResNetForImageClassification(config)


def _wav2vec2() -> Any:
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(2, 2), conv_kernel=(3, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_labels=3,
    )  # fmt: skip
    return tf.Wav2Vec2ForSequenceClassification(config)


def _videomae() -> Any:
    config = tf.VideoMAEConfig(
        image_size=8, patch_size=4, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return tf.VideoMAEForVideoClassification(config)


def _gemma() -> Any:
    config = tf.Gemma3TextConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True
    )
    return tf.Gemma3ForCausalLM(config)


def _qwen() -> Any:
    """A causal model whose attention has biases."""
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def _qwen_moe() -> Any:
    config = tf.Qwen3MoeConfig(
        **SMALL, intermediate_size=48, moe_intermediate_size=12, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> Any:
    """Experts that are stored `(E, in, out)`."""
    config = tf.GptOssConfig(
        **SMALL, intermediate_size=12, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    return tf.GptOssForCausalLM(config)


BASES = {
    "gemma": _gemma,
    "gpt_oss": _gpt_oss,
    "qwen": _qwen,
    "qwen_moe": _qwen_moe,
    "resnet": _resnet,
    "videomae": _videomae,
    "wav2vec2": _wav2vec2,
}


def base_of(kind: str, folder: Path) -> Path:
    """Save a tiny base: one of these, or of `tests.helpers.models`."""
    if kind not in BASES:
        return save_model(kind, folder)
    torch.manual_seed(0)
    BASES[kind]().save_pretrained(folder)
    return folder


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    """A batch that the base's forward takes."""
    generator = torch.Generator().manual_seed(1)
    if kind == "resnet":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if kind == "videomae":
        return {"pixel_values": torch.randn(2, 4, 3, 8, 8, generator=generator)}
    if kind == "wav2vec2":
        return {"input_values": torch.randn(2, 64, generator=generator)}
    return model_inputs(kind)


def trained(base: Path, folder: Path, config: peft.PeftConfig, size: float = 0.1) -> Any:
    """Save an adapter, every trained number of it moved at random; return stock PEFT's model of it."""
    model = peft.get_peft_model(load_base(base), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(load_base(base), folder).eval()


def verbs(kind: str, base: Path, made: Path, folder: Path, forms: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Yield each verb's name, and how far its result is from stock PEFT's logits, over what the adapter does to them.

    Args:
        kind: the base's.
        base: its folder.
        made: the adapter's folder.
        folder: takes what is written.
        forms: what the adapter is converted to, exactly.
    """
    inputs = inputs_of(kind)
    with torch.no_grad():
        bare = output(load_base(base), inputs).double()
        want = output(peft.PeftModel.from_pretrained(load_base(base), made).eval(), inputs).double()

        def off(model: Any) -> float:
            return float((output(model.eval(), inputs).double() - want).norm() / (want - bare).norm())

        assert (want - bare).norm() > 1e-3
        surgery.merge(made, base, folder / "merged")
        yield "merge", off(load_base(folder / "merged"))
        yield "load", off(surgery.load(made, load_base(base)))
        for form in forms:
            options: dict[str, Any] = {"bits": 32} if form == "giva" else {}
            surgery.convert(made, form, folder / form, base=base, energy=1.0, dtype="float32" if not options else None,
                            **options)  # fmt: skip
            yield form, off(surgery.load(folder / form, load_base(base)))
            surgery.merge(folder / form, base, folder / f"{form}-merged")
            yield f"{form} merged", off(load_base(folder / f"{form}-merged"))
        if "lora" in forms:
            yield "lora in PEFT", off(peft.PeftModel.from_pretrained(load_base(base), folder / "lora"))
