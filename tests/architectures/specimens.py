"""Tiny models of many architectures, made from configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

__all__ = ["SPECIMENS", "save_specimen"]

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
QWEN_VISION: dict[str, Any] = {"depth": 2, "patch_size": 4, "num_heads": 2}

# Name -> (class of the model, its configuration class, settings).
SPECIMENS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 8}),
    "gemma3 text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "cohere": ("CohereForCausalLM", "CohereConfig", TEXT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "granite": ("GraniteForCausalLM", "GraniteConfig", TEXT),
    "glm": ("GlmForCausalLM", "GlmConfig", {**TEXT, "head_dim": 8}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**TEXT, "head_dim": 8}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", TEXT),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", TEXT),
    "falcon": ("FalconForCausalLM", "FalconConfig", ENCODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", TEXT),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **TEXT,
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **EXPERTS, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**TEXT, **EXPERTS}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**TEXT, "num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**TEXT, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**TEXT, "num_local_experts": 4, "head_dim": 8}),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", ENCODER),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", ENCODER),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": 2,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **ENCODER,
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VISION),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", VISION),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**ENCODER, "num_attention_heads": 4}, "vision_config": VISION},
    ),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": ENCODER, "vision_config": VISION}),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": tf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
            ),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_queries": 4,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_index": 60,
            "projection_dim": 32,
            "hidden_size": 32,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**TEXT, "head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 60,
        },
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 60,
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {
                **TEXT,
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_scaling": {"rope_type": "default"},
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
            },
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            **QWEN_TOKENS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "fullatt_block_indexes": [1],
            },
            **QWEN_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **QWEN_TOKENS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 16,
            },
            **QWEN_TOKENS,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": VISION, "image_token_id": 60},
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "num_mel_bins": 8,
                "max_source_positions": 16,
            },
            "audio_token_index": 60,
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "num_local_experts": 2,
                "interleave_moe_layer_step": 1,
                "intermediate_size_mlp": 48,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        },
    ),
}


def save_specimen(name: str, folder: Path) -> Any:
    """Save a tiny model with random weights, and return it."""
    cls, config, settings = SPECIMENS[name]
    torch.manual_seed(0)
    model = getattr(tf, cls)(getattr(tf, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, or at one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model
