"""Stock PEFT FROD folders to our portable type.

PEFT stores V, the pattern of S, l and S's values, but not U: on load it solves U for a V that it regenerates on the
machine at hand, and then puts the stored V beside it. Here U belongs to the stored V, as when the adapter was trained.
"""

from __future__ import annotations

from typing import Any

import torch

from surgery.catalogue import method_named
from surgery.checkpoints.adapter import MODEL_PREFIX, Adapter
from surgery.checkpoints.fingerprint import Fingerprint
from surgery.errors import AdapterError
from surgery.linalg.joint import right_inverse_transposed
from surgery.methods.base import OwnMethod
from surgery.methods.frod import column_norms
from surgery.sites import linear_sites

__all__ = ["portable_frod"]

# How stock PEFT names its tensors.
VECTOR, VALUES = "frod_lambda_l", "frod_lambda_s_values"
V_PREFIX, INDICES_PREFIX = "base_model.frod_V.", "base_model.frod_s_indices."
CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
)


def portable_frod(adapter: Adapter, model: Any) -> Adapter:
    """Turn a stock FROD adapter into a FROD_PORTABLE one of the same weight change.

    Args:
        adapter: a stock FROD adapter that stores its projections.
        model: the base model with its weights.

    Raises:
        AdapterError: the projections are not stored, or the adapter does not fit the model.
    """
    if not adapter.config.get("save_projection", True) or not any(n.startswith(V_PREFIX) for n in adapter.tensors):
        raise AdapterError(
            f"{adapter.folder}: a stock FROD adapter without its projections cannot be opened reliably: V depends on "
            "the machine that made it. Save it with save_projection=True there"
        )
    sites = {site.module: site for site in linear_sites(model)}
    weights = {name: module for name, module in model.named_modules() if name in sites}
    method = method_named("frod")
    assert isinstance(method, OwnMethod)
    fingerprint = Fingerprint()
    tensors: dict[str, torch.Tensor] = {}
    inverses: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for module, parts in adapter.modules.items():
        if VECTOR not in parts:
            tensors.update(
                {
                    f"{MODEL_PREFIX}{module}.{s}": t
                    for s, t in parts.items()
                    if f"{MODEL_PREFIX}{module}.{s}" in adapter.tensors
                }
            )
            continue
        if module not in sites:
            raise AdapterError(f"{adapter.folder}: it changes {module}, which {type(model).__name__} does not have")
        site = sites[module]
        V, indices = _projections(adapter, module)
        category = method.group_key(site)
        if category not in inverses:
            inverses[category] = right_inverse_transposed(V)
        raw = weights[module].weight.detach()
        weight = raw.T if site.transposed else raw
        fingerprint.add(site.key, weight)
        own = {"l": parts[VECTOR], "s": parts[VALUES], "l0": column_norms(weight.float().cpu(), inverses[category])}
        if category not in seen:
            own.update(V=V, positions=(indices[0] * V.shape[0] + indices[1]).to(torch.int32))
            seen.add(category)
        tensors.update(
            {
                f"{MODEL_PREFIX}{module}.{method.prefix}{s}": t.float() if t.is_floating_point() else t
                for s, t in own.items()
            }
        )
    config = {key: adapter.config.get(key) for key in CARRIED}
    config.update(
        peft_type="FROD_PORTABLE",
        dropout=adapter.config.get("frod_dropout", 0.0),
        sparse_rate=adapter.config.get("sparse_rate", 0.01),
        regularization=adapter.config.get("regularization_alpha", 1e-3),
        seed=adapter.config.get("projection_prng_key", 0),
        init_weights=False,
        base_fingerprint=fingerprint.digests(),
    )
    return Adapter(config, tensors, adapter.provenance, adapter.card)


def _projections(adapter: Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    from peft.tuners.frod.model import _category_from_key

    category = _category_from_key(module)
    try:
        V, indices = adapter.tensors[f"{V_PREFIX}{category}"], adapter.tensors[f"{INDICES_PREFIX}{category}"]
    except KeyError:
        raise AdapterError(f"{adapter.folder}: no projection for category {category} of {module}") from None
    return V.float(), indices.long()
