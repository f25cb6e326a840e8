"""Types of PEFT that train something else than a change that is added to weights."""

from __future__ import annotations

from surgery.adapters.types.refused import RefusedType

__all__ = ["NO_CHANGE"]

TURNED = (
    "has no weight change that is added to W: it multiplies the weight by a rotation; merge it with PEFT "
    "(merge_and_unload)"
)
PROMPT = "has no weight change: it trains inputs of the model, not its weights; use it with PEFT as it is"
MIXED = "has no weight change: it mixes its factors anew for each input; use it with PEFT as it is"
ONE_VECTOR = (
    "keeps one vector for all layers, and its file does not say which: that is not read here; merge it with PEFT "
    "(merge_and_unload)"
)
INSERTED = "has no weight change: it adds layers of its own to the model; use it with PEFT as it is"

BIASES = "changes no weight matrix: it trains biases; merge it with PEFT (merge_and_unload)"
NORMS = (
    "has no factors: it saves the layers that it trains whole, as a fine-tuned model does; merge it with PEFT "
    "(merge_and_unload)"
)
ROUTED = "has no single weight change: it mixes several LoRAs by the task or the input; use it with PEFT as it is"
ON_DECOMPOSITION = (
    "has a weight change that is relative to a decomposition of the base weight made while it was loaded, which is not "
    "read here; merge it with PEFT (merge_and_unload)"
)
WITH_BIASES = (
    "changes the layer's bias by its weight as well, which is not read here; merge it with PEFT (merge_and_unload)"
)
DRAWN = "trains a distribution of vectors, which is not read here; merge it with PEFT (merge_and_unload)"
TOKENS = (
    "trains single rows of embeddings and nothing else, which is read here only as a part of a LoRA "
    "(trainable_token_indices); merge it with PEFT (merge_and_unload)"
)
SPARSE = "trains single numbers of the weights, which is not read here; merge it with PEFT (merge_and_unload)"

NO_CHANGE = {
    peft_type: RefusedType(peft_type, title, paper, f"{title} {reason}")
    for peft_type, title, paper, reason in (
        ("OFT", "OFT", "arXiv 2306.07280", TURNED),
        ("BOFT", "BOFT", "arXiv 2311.06243", TURNED),
        ("HRA", "HRA", "arXiv 2405.17484", TURNED),
        ("PROMPT_TUNING", "prompt tuning", "arXiv 2104.08691", PROMPT),
        ("MULTITASK_PROMPT_TUNING", "multitask prompt tuning", "arXiv 2303.02861", PROMPT),
        ("PREFIX_TUNING", "prefix tuning", "arXiv 2101.00190", PROMPT),
        ("P_TUNING", "P-tuning", "arXiv 2103.10385", PROMPT),
        ("CPT", "CPT", "arXiv 2410.17222", PROMPT),
        ("CARTRIDGE", "cartridge", "arXiv 2506.06266", PROMPT),
        ("LILY", "Lily", None, MIXED),
        ("UNILORA", "UniLoRA", None, ONE_VECTOR),
        ("TINYLORA", "TinyLoRA", None, ONE_VECTOR),
        ("ADAPTION_PROMPT", "LLaMA-Adapter", "arXiv 2303.16199", INSERTED),
        ("SHADOW", "ShadowPEFT", None, INSERTED),
        ("OSF", "OSF", None, ON_DECOMPOSITION),
        ("ADAMSS", "AdaMSS", None, ON_DECOMPOSITION),
        ("BEFT", "BEFT", None, BIASES),
        ("LN_TUNING", "LN tuning", None, NORMS),
        ("TRAINABLE_TOKENS", "trainable tokens", None, TOKENS),
        ("POLY", "Poly", "arXiv 2202.13914", ROUTED),
        ("XLORA", "X-LoRA", None, ROUTED),
        ("GLORA", "GLoRA", None, WITH_BIASES),
        ("PVERA", "PVeRA", "arXiv 2512.07703", DRAWN),
        ("SUPERTUNING", "Super-Tuning", "arXiv 2607.09287", SPARSE),
    )
}
