"""Stock PEFT FROD folders to our portable type.

PEFT stores V, the pattern of S, l and S's values, but not U: on load it solves U for a V that it regenerates on the
machine at hand, and then puts the stored V beside it. Here U belongs to the stored V, as when the adapter was trained.
"""

from __future__ import annotations

from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX
from surgery.errors import AdapterError
from surgery.linalg.joint import right_inverse_transposed
from surgery.methods.base import OwnMethod
from surgery.methods.frod import column_norms, narrow_positions
from surgery.methods.registry import method_named
from surgery.models.fingerprint import Fingerprint
from surgery.models.sites import Site, linear_sites

__all__ = ["portable_frod"]

# How stock PEFT names its tensors.
VECTOR, VALUES = "frod_lambda_l", "frod_lambda_s_values"
OWN_PREFIX = "base_model.frod_"
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
        AdapterError: the projections are not stored, the adapter does not fit the model, or it was trained through
            columns of U that are nothing but rounding.
    """
    if not adapter.config.get("save_projection", True) or not any(n.startswith(V_PREFIX) for n in adapter.tensors):
        raise AdapterError(
            f"{adapter.folder}: a stock FROD adapter without its projections cannot be opened reliably: V depends on "
            "the machine that made it. Save it with save_projection=True there"
        )
    method = method_named("frod")
    assert isinstance(method, OwnMethod)
    sites = _adapted_sites(adapter, model)
    tensors = {name: t for name, t in adapter.tensors.items() if not _is_frod(name)}
    fingerprint = Fingerprint()
    for group in method.groups(sites):
        V, positions = _projections(adapter, group[0].module)
        inverse = right_inverse_transposed(V)
        for site in group:
            weight = model.get_submodule(site.module).weight.detach()
            weight = site.matrix(weight)
            fingerprint.add(site.key, weight)
            parts = adapter.layer(site.module)
            own = {"l": parts[VECTOR], "s": parts[VALUES], "l0": column_norms(weight.float().cpu(), inverse)}
            _refuse_rounding(site, own, positions)
            if site is group[0]:
                own.update(V=V, positions=narrow_positions(positions, site.in_features))
            for name, tensor in own.items():
                kept = tensor.float() if tensor.is_floating_point() else tensor
                tensors[f"{MODEL_PREFIX}{site.module}.{method.prefix}{name}"] = kept
    return Adapter(_config(adapter, fingerprint), tensors, adapter.provenance, adapter.card)


def _refuse_rounding(site: Site, own: dict[str, torch.Tensor], positions: torch.Tensor) -> None:
    """Refuse a layer that has been trained through columns of U which are nothing but rounding.

    PEFT makes a unit column of any norm above 1e-12, so a layer without a part in some direction (all layers of the
    role together have fewer rows than columns, say) has columns that another machine would not reproduce.
    """
    absent = own["l0"] == 0
    moved = own["l"].float().abs() > 1e-4 * own["l0"].max()
    rows = positions[own["s"] != 0] // site.in_features
    if bool((absent & moved).any()) or bool(absent[rows].any()):
        raise AdapterError(
            f"{site.module}: has no part in {int(absent.sum())} of the {site.in_features} directions of its basis; "
            "stock FROD trained through columns of U made of rounding there, which cannot be recovered from its file"
        )


def _adapted_sites(adapter: Adapter, model: Any) -> list[Site]:
    """The adapter's sites in the model's order."""
    adapted = {module for module, parts in adapter.modules.items() if VECTOR in parts}
    sites = [site for site in linear_sites(model) if site.module in adapted]
    lost = adapted - {site.module for site in sites}
    if lost:
        raise AdapterError(f"{adapter.folder}: it changes {min(lost)}, which {type(model).__name__} does not have")
    return sites


def _is_frod(name: str) -> bool:
    return name.startswith(OWN_PREFIX) or name.rpartition(".")[2] in {VECTOR, VALUES}


def _config(adapter: Adapter, fingerprint: Fingerprint) -> dict[str, Any]:
    return {
        **{key: adapter.config.get(key) for key in CARRIED},
        "peft_type": "FROD_PORTABLE",
        "dropout": adapter.config.get("frod_dropout", 0.0),
        "sparse_rate": adapter.config.get("sparse_rate", 0.01),
        "regularization": adapter.config.get("regularization_alpha", 1e-3),
        "seed": adapter.config.get("projection_prng_key", 0),
        "init_weights": False,
        "base_fingerprint": fingerprint.digests(),
    }


def _projections(adapter: Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`V (in, in)`, and the places of S's nonzeros, `row * in + column`."""
    from peft.tuners.frod.model import _category_from_key

    category = _category_from_key(module)
    try:
        V, indices = adapter.tensors[f"{V_PREFIX}{category}"], adapter.tensors[f"{INDICES_PREFIX}{category}"]
    except KeyError:
        raise AdapterError(f"{adapter.folder}: no projection for category {category} of {module}") from None
    return V.float(), indices[0].long() * V.shape[0] + indices[1].long()
