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
    )
}
