"""A tiny base model as the GGUF file that llama.cpp opens, with a vocabulary of as many made-up tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.models import load_base

__all__ = ["write_base"]


def write_base(folder: Path, path: Path) -> Path:
    """Write a saved model of transformers as GGUF in float32."""
    import gguf

    model = load_base(folder)
    config, kind = model.config, model.config.model_type
    name = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}[kind]
    arch = gguf.MODEL_ARCH[name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _settings(writer, config)
    _vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key.endswith((".attn.bias", ".masked_bias")):
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        data = tensor.float().numpy()
        if kind == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if kind == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = data.T
        writer.add_tensor(found, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(writer: Any, config: Any) -> None:
    writer.add_context_length(getattr(config, "n_positions", 256))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_key_length(config.hidden_size // config.num_attention_heads)
        writer.add_value_length(config.hidden_size // config.num_attention_heads)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_file_type(0)


def _vocabulary(writer: Any, size: int) -> None:
    """Add tokens for sentencepiece's kind of tokenizer; prompts are given as numbers."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, size))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3, *([1] * (size - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
