"""LoRA (arXiv 2106.09685), PEFT's own type: `dW = s B A`.

The file holds A `(r, in)` and B `(out, r)` whatever the orientation of the layer's weight, Conv1D included. Of an
embedding `(num, dim)` it is the transpose that is changed: A `(r, num)`, B `(dim, r)`. Of a convolution A is
`(r, in, *kernel)` and B `(out, r, 1, ...)`, factors of its weight as a matrix `(out, in * kernel)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import MERGE_IN_PEFT, TensorType
from surgery.adapters.types.config_rules import A_NUMBER, A_SWITCH
from surgery.adapters.types.patterns import pattern_value
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.models.sites import CONVOLUTION, EMBEDDING, EXPERT, LINEAR, Form
from surgery.system.tensors import TensorMap

__all__ = [
    "A_NAME",
    "BIAS_NAME",
    "B_NAME",
    "EMBEDDING_NAMES",
    "FUSED_EXPERTS",
    "LORA",
    "LORA_RULES",
    "expert_of",
    "factor_names",
    "factors_of",
    "lora_delta",
    "lora_form",
    "lora_output_bias",
    "lora_tensors",
    "parameter_key",
    "refuse_variants",
]

A_NAME, B_NAME, BIAS_NAME = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EMBEDDING_NAMES = ("lora_embedding_A", "lora_embedding_B")
# The experts of a layer in one parameter, which `target_parameters` names.
FUSED_EXPERTS = "fused experts"
# Settings under which a layer computes something else than W x + s B A x.
VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which acts on the tokens after its invocation only: no weight change does that",
    "use_qalora": f"QALoRA, which pools its input by the groups of a quantised base: {MERGE_IN_PEFT}",
    "use_bdlora": f"BD-LoRA, whose factors are block-diagonal: {MERGE_IN_PEFT}",
    "arrow_config": "Arrow, which routes each token to one of several LoRAs: give one of them",
    "kasa_config": f"KaSA, which cuts the base weight's smallest singular values: {MERGE_IN_PEFT}",
    "monteclora_config": f"Monteclora, which samples its factors: {MERGE_IN_PEFT}",
    "layer_replication": f"on replicated layers, which the base model does not have: {MERGE_IN_PEFT}",
}
# Starts that change the base weight. PEFT's conversion on saving writes init_lora_weights=true, so that a file which
# still names one of them is relative to the changed base.
MUTATING = ("pissa", "olora", "corda", "lora_ga")
RELATIVE_TO_CHANGED_BASE = (
    "the file's weight change is relative to a base weight that this start has changed; save the trained model with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER of the adapter at its start), which makes it "
    "a plain LoRA"
)
RELATIVE_TO_QUANTIZED_BASE = (
    "the file's weight change is relative to a quantised base weight; give an adapter trained on the base as it is, or "
    "merge it with PEFT into the base that it was trained on"
)


def refuse_variants(config: Mapping[str, Any], label: str) -> None:
    """Refuse a LoRA whose weight change is not `s B A` on the base weight as it is.

    Args:
        config: `adapter_config.json`.
        label: the adapter's name in the message.

    Raises:
        AdapterError: it is one of PEFT's variants, or made with a start that changes the base weight.
    """
    for key, reason in VARIANTS.items():
        if config.get(key):
            raise AdapterError(f"{label}: is a LoRA of the kind {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MUTATING):
        raise AdapterError(f"{label}: was made with init_lora_weights={start!r}: {RELATIVE_TO_CHANGED_BASE}")
    if isinstance(start, str) and start.lower() == "loftq":
        raise AdapterError(f"{label}: was made with init_lora_weights={start!r}: {RELATIVE_TO_QUANTIZED_BASE}")


def lora_delta(
    config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None = None
) -> LowRank:
    """The weight change of one layer of a stock LoRA, `(out, in)` for every kind of layer.

    Args:
        config: `adapter_config.json`.
        module: the layer's name.
        tensors: its tensors, by their names after the module's.

    Raises:
        AdapterError: the factors are no pair, or of another rank than the configuration says.
    """
    A, B = factors_of(module, tensors)
    return LowRank(B.float(), A.float(), scaling_of(config, module, int(A.shape[0])))


def factors_of(module: str, tensors: TensorMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A `(r, in)` and B `(out, r)` of a layer of any kind, in the dtype of the file.

    Raises:
        AdapterError: they are no pair of factors of a weight.
    """
    A_name, B_name = EMBEDDING_NAMES if EMBEDDING_NAMES[0] in tensors else (A_NAME, B_NAME)
    A, B = tensors[A_name], tensors[B_name]
    found = f"{A_name.removesuffix('.weight')} {tuple(A.shape)} and {B_name.removesuffix('.weight')} {tuple(B.shape)}"
    if A.ndim != B.ndim or not 2 <= A.ndim <= 5 or any(size != 1 for size in B.shape[2:]):
        raise AdapterError(f"{module}: {found} are no pair of factors")
    if A.ndim > 2 and B.shape[1] and A.shape[0] != B.shape[1] and A.shape[0] % B.shape[1] == 0:
        raise AdapterError(
            f"{module}: {found} are of a convolution in {A.shape[0] // B.shape[1]} groups, where PEFT's LoRA mixes the "
            "groups: no change of the weight does that; use it with PEFT as it is, or train without that layer"
        )
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"{module}: {found} are no pair of factors")
    return A.flatten(1), B.flatten(1)


def lora_form(config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
    """Return what kind of layer a LoRA's tensors are for."""
    if any(name in tensors for name in EMBEDDING_NAMES):
        return Form(EMBEDDING)
    if expert_of(config, module) is not None:
        return Form(EXPERT)
    A = tensors.get(A_NAME)
    if A is not None and A.ndim in {3, 4, 5}:
        return Form(CONVOLUTION, tuple(int(size) for size in A.shape[2:]))
    return Form()


def parameter_key(config: Mapping[str, Any], module: str) -> str | None:
    """Return the name of the parameter that a layer of a LoRA is, or one expert of; None for a module."""
    targets = [str(target) for target in config.get("target_parameters") or ()]

    def named(name: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for target in targets)

    if not targets:
        return None
    if named(module):
        return module
    owner, _, index = module.rpartition(".")
    return owner if index.isdigit() and named(owner) else None


def expert_of(config: Mapping[str, Any], module: str) -> tuple[str, int] | None:
    """Return the parameter and the index of a layer that is one expert; None for another layer."""
    key = parameter_key(config, module)
    return None if key is None or key == module else (key, int(module.rpartition(".")[2]))


def factor_names(form: Form) -> tuple[str, str]:
    """Return the short names of A and B in a LoRA on a layer of this form."""
    return EMBEDDING_NAMES if form.kind == EMBEDDING else (A_NAME, B_NAME)


def lora_tensors(form: Form, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA of A `(r, in)` and B `(out, r)` by short name, as PEFT has them in such a layer."""
    A_name, B_name = factor_names(form)
    if form.kernel:
        A, B = A.reshape(A.shape[0], -1, *form.kernel), B.reshape(*B.shape, *(1 for _ in form.kernel))
    return {B_name: B, A_name: A}


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`s` of one layer: alpha over the rank, or over its root for rsLoRA, with the layer's own alpha if it has one.

    Raises:
        AdapterError: the configuration says another rank for the layer, or no numbers.
    """
    module = parameter_key(config, module) or module
    alpha = pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    expected = pattern_value(config, "rank_pattern", module, config.get("r", 8))
    if expected != rank:
        raise AdapterError(
            f"{module}: its factors have rank {rank}, adapter_config.json says {expected:g} (r, rank_pattern), so that "
            "the scale alpha / r is in doubt: correct adapter_config.json"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def lora_output_bias(
    config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return what the bias of B (`lora_bias`) adds to the layer's outputs, `(out,)` float32; None without one."""
    if BIAS_NAME not in tensors:
        return None
    return tensors[BIAS_NAME].float() * scaling_of(config, module, int(tensors[A_NAME].shape[0]))


LORA_RULES = {"lora_alpha": A_NUMBER, "use_rslora": A_SWITCH, "use_dora": A_SWITCH}

LORA = TensorType(
    "LORA",
    "LoRA",
    layouts=(frozenset({A_NAME, B_NAME}), frozenset({A_NAME, B_NAME, BIAS_NAME}), frozenset(EMBEDDING_NAMES)),
    formula=lora_delta,
    paper="arXiv 2106.09685",
    change="s B A",
    prefix="lora_",
    starts_idle=True,
    bias_setting="lora_only",
    refused={"lora_magnitude_vector": "a DoRA layer, though its configuration says use_dora=false"},
    dimensions={BIAS_NAME: 1},
    rules=LORA_RULES,
    check=refuse_variants,
    bias=lora_output_bias,
    forms=lora_form,
    layers=(LINEAR, EMBEDDING, CONVOLUTION, FUSED_EXPERTS, "single tokens"),
)
