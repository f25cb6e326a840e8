"""Adapter formats of other tools, recognised by the names of their tensors, so that they are refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["foreign_format"]

READ_BY_DIFFUSERS = "diffusers' load_lora_weights reads it"
# How a name gives away the tool that wrote it; the first that matches counts.
FORMATS = (
    ("kohya (sd-scripts)", r"(lora_(unet|te\d?|transformer)|lycoris)_|.*\.lora_(up|down)\.", READ_BY_DIFFUSERS),
    ("diffusers", r".*(\.|_)lora\.(up|down)\.|.*\.processor\.|.*\blora_linear_layer\.", READ_BY_DIFFUSERS),
    ("ComfyUI", r"diffusion_model\.", READ_BY_DIFFUSERS),
    ("diffusers", r"(unet|text_encoder(_\d)?|transformer)\..*\.lora", READ_BY_DIFFUSERS),
    ("MLX", r".*\.lora_[ab]$", "mlx_lm.fuse merges it into its base"),
    ("a bare state dict", r"(?!base_model\.)", "save the adapter with PeftModel.save_pretrained"),
    (
        "a state dict with the adapter's name in it",
        r".*\.lora_[AB]\.(?!(weight|bias)$)",
        "save the adapter with PeftModel.save_pretrained",
    ),
)


def foreign_format(names: Collection[str]) -> str | None:
    """Say which other tool's format these tensor names are of, and what to do; None for PEFT's."""
    for tool, pattern, advice in FORMATS:
        name = next((name for name in names if re.match(pattern, name)), None)
        if name is not None:
            return f"its tensors are named as by {tool} ({name}), not as PEFT saves an adapter; {advice}"
    return None
