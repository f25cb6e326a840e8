"""What an adapter's configuration promises and its file lacks: tensors, layers, saved modules, biases.

A training that ended early, a file of one process of several, or weights that were never gathered leave such files.
Where PEFT itself opens a file, and leaves what is missing as it is in the base, the same is done here, with a note;
otherwise the file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.lora import A_NAME, B_NAME, BIAS_NAME
from surgery.errors import AdapterError, listing

__all__ = ["check_saved", "starts_otherwise", "without_halves"]

# PEFT lists both names that a classifier's head may have; a model has one of them.
HEADS = {"classifier", "score"}
STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")
NOT_GATHERED = (
    "a placeholder of weights that were not gathered from all processes when they were saved (DeepSpeed ZeRO-3, FSDP); "
    "save the adapter with them gathered (zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save)"
)


def check_saved(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Check that the tensors of a file have numbers, and that all modules which are saved whole are there.

    Raises:
        AdapterError: they do not, or one is not.
    """
    # Sorted, since a file gives tensors of one place in no order, and these have no bytes.
    empty = sorted(name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,))
    if empty:
        raise AdapterError(f"{label}: {listing(empty, 3)} has size 0: {NOT_GATHERED}")
    parts = [name.split(".") for name in tensors]
    listed = [str(module) for module in config.get("modules_to_save") or ()]
    missing = [module for module in listed if not any(_holds(each, module.split(".")) for each in parts)]
    if len(HEADS & set(missing)) < len(HEADS & set(listed)):
        missing = [module for module in missing if module not in HEADS]
    if missing:
        raise AdapterError(
            f"{label}: adapter_config.json lists {listing(missing, 3)} in modules_to_save, the file lacks it; save the "
            "adapter again"
        )
    if config.get("trainable_token_indices") and not any("token_adapter" in each for each in parts):
        raise AdapterError(
            f"{label}: the file lacks the tokens that adapter_config.json names in trainable_token_indices"
        )


def _holds(parts: list[str], module: list[str]) -> bool:
    return any(parts[start : start + len(module)] == module for start in range(len(parts)))


def without_halves(
    config: Mapping[str, Any], by_module: Mapping[str, Mapping[str, str]], label: str
) -> tuple[list[str], list[str]]:
    """Look for layers of a LoRA that lack one of their factors.

    Args:
        config: `adapter_config.json`.
        by_module: module -> short name -> name in the file.
        label: the adapter's name in messages.

    Returns:
        The names of tensors that change nothing, since PEFT starts the other factor at zero, and notes.

    Raises:
        AdapterError: A is missing, which PEFT would draw at random.
    """
    idle: list[str] = []
    lone = []
    for module, tensors in by_module.items():
        if B_NAME in tensors and A_NAME not in tensors:
            raise AdapterError(
                f"{label}: the file lacks {A_NAME} of {module}, which PEFT would draw at random; save the adapter again"
            )
        if A_NAME in tensors and B_NAME not in tensors and len(tensors) == 1:
            if starts_otherwise(config):
                raise AdapterError(f"{label}: the file lacks {B_NAME} of {module}; save the adapter again")
            lone.append(module)
            idle.append(tensors[A_NAME])
    notes = []
    if lone:
        notes.append(
            f"the file lacks {B_NAME} of {listing(lone, 3)}: PEFT starts it at zero, which changes nothing there"
        )
    biased = [module for module, tensors in by_module.items() if B_NAME in tensors and BIAS_NAME not in tensors]
    if config.get("lora_bias") and biased:
        notes.append(f"the file lacks {BIAS_NAME} of {listing(biased, 3)} (lora_bias): PEFT starts it at zero")
    return idle, notes


def starts_otherwise(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration asks for a start that changes the layers."""
    return any(config.get(key) is False for key in STARTS)
