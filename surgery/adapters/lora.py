"""LoRA (arXiv 2106.09685), PEFT's own type: `dW = s B A`. Read, not made: it has no start of its own here.

The file holds A `(r, in)` and B `(out, r)` whatever the orientation of the layer's weight, Conv1D included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError

__all__ = ["A_NAME", "BIAS_NAME", "B_NAME", "lora_delta", "pattern_value", "refuse_variants", "scaling_of"]

A_NAME, B_NAME, BIAS_NAME = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MERGE_IN_PEFT = "merge it with PEFT (merge_and_unload)"
# Settings under which a layer computes something else than W x + s B A x.
VARIANTS = {
    "use_dora": f"DoRA, whose change depends on the norms of the base weight: {MERGE_IN_PEFT}",
    "alora_invocation_tokens": "aLoRA, which acts on the tokens after its invocation only: no weight change does that",
    "use_qalora": f"QALoRA, which pools its input by the groups of a quantised base: {MERGE_IN_PEFT}",
    "use_bdlora": f"BD-LoRA, whose factors are block-diagonal: {MERGE_IN_PEFT}",
    "arrow_config": "Arrow, which routes each token to one of several LoRAs: give one of them",
    "kasa_config": "KaSA, which cuts the base weight's smallest singular values: merge it with PEFT (merge_and_unload)",
    "monteclora_config": f"Monteclora, which samples its factors: {MERGE_IN_PEFT}",
    "target_parameters": f"on target_parameters (fused expert weights), not on linear layers: {MERGE_IN_PEFT}",
    "layer_replication": f"on replicated layers, which the base model does not have: {MERGE_IN_PEFT}",
}
# Starts that change the base weight. PEFT's conversion on saving writes init_lora_weights=true, so that a file which
# still names one of them is relative to the changed base.
MUTATING = ("pissa", "olora", "corda", "lora_ga")
CONVERTIBLE = (
    "the file's weight change is relative to a base weight that this start has changed; save the trained model with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER of the adapter at its start), which makes it "
    "a plain LoRA"
)
LOFTQ = (
    "the file's weight change is relative to a quantised base weight; give an adapter trained on the base as it is, or "
    "merge it with PEFT into the base that it was trained on"
)


def refuse_variants(config: Mapping[str, Any], who: str) -> None:
    """Refuse a LoRA whose weight change is not `s B A` on the base weight as it is.

    Args:
        config: `adapter_config.json`.
        who: what an error calls the adapter.

    Raises:
        AdapterError: it is one of PEFT's variants, or made with a start that changes the base weight.
    """
    for key, reason in VARIANTS.items():
        if config.get(key):
            raise AdapterError(f"{who}: is a LoRA of the kind {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MUTATING):
        raise AdapterError(f"{who}: was made with init_lora_weights={start!r}: {CONVERTIBLE}")
    if isinstance(start, str) and start.lower() == "loftq":
        raise AdapterError(f"{who}: was made with init_lora_weights={start!r}: {LOFTQ}")


def lora_delta(config: Mapping[str, Any], module: str, tensors: Mapping[str, torch.Tensor]) -> LowRank:
    """The weight change of one layer of a stock LoRA, `(out, in)` for every kind of layer.

    Args:
        config: `adapter_config.json`.
        module: the layer's name.
        tensors: its tensors, by their names after the module's.

    Raises:
        AdapterError: the factors are no pair, or of another rank than the configuration says.
    """
    A, B = tensors[A_NAME], tensors[B_NAME]
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"{module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors")
    return LowRank(B.float(), A.float(), scaling_of(config, module, int(A.shape[0])))


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`s` of one layer: alpha over the rank, or over its root for rsLoRA, with the layer's own alpha if it has one.

    Raises:
        AdapterError: the configuration says another rank for the layer, or no numbers.
    """
    alpha = pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    expected = pattern_value(config, "rank_pattern", module, config.get("r", 8))
    if expected != rank:
        raise AdapterError(
            f"{module}: its factors have rank {rank}, adapter_config.json says {expected:g} (r, rank_pattern), so that "
            "the scale alpha / r is in doubt: correct adapter_config.json"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def pattern_value(config: Mapping[str, Any], key: str, module: str, default: Any) -> float:
    """The number that a layer has by `rank_pattern` or `alpha_pattern`, by PEFT's own rule of matching.

    Raises:
        AdapterError: a pattern is no valid expression, or the value is no finite number.
    """
    patterns = config.get(key) or {}
    try:
        value = patterns.get(get_pattern_key(patterns.keys(), module), default)
        number = float(value)
    except (re.error, AttributeError, TypeError, ValueError):
        raise AdapterError(f"{module}: adapter_config.json has no usable {key} ({patterns!r:.80})") from None
    if not 0 <= abs(number) < float("inf"):
        raise AdapterError(f"{module}: adapter_config.json gives {value!r} ({key}), which is not finite")
    return number
