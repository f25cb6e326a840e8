"""PEFT's `hotswap_adapter` for our types: the tensors of a loaded adapter are replaced by those of another file.

PEFT knows the swap for LoRA alone. Two of its functions are wrapped, the check of the configurations and the swap
itself; what is not ours goes on to PEFT.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from surgery.adapters.packing import is_packed
from surgery.errors import AdapterError, listing
from surgery.methods.base import OwnConfig
from surgery.peft_types.attachment import Attachment
from surgery.peft_types.tuner import attachment_of

__all__ = ["enable_hot_swap"]

# Settings that may differ, since the tensors and their names say what they say.
FREE = frozenset(
    {
        "auto_mapping", "base_fingerprint", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "init_weights", "layers_pattern", "layers_to_transform", "peft_version", "revision", "seed", "target_modules",
        "task_type",
    }
)  # fmt: skip
# Of these, what belongs to the tensors and is saved with them.
SWAPPED = ("base_fingerprint", "seed")


def enable_hot_swap(module: Any) -> None:
    """Let `hotswap_adapter` swap adapters of our types; called with the module `peft.utils.hotswap`."""
    check, swap = module.check_hotswap_configs_compatible, module.hotswap_adapter_from_state_dict

    @functools.wraps(check)
    def check_configs(config0: Any, config1: Any) -> None:
        if isinstance(config0, OwnConfig) and type(config0) is type(config1):
            _check_settings(config0, config1)
        else:
            check(config0, config1)

    @functools.wraps(swap)
    def swap_tensors(
        model: torch.nn.Module,
        state_dict: dict[str, torch.Tensor],
        adapter_name: str,
        config: Any,
        *rest: Any,
        **more: Any,
    ) -> None:
        if isinstance(config, OwnConfig):
            _swap(model, state_dict, adapter_name, config)
        else:
            swap(model, state_dict, adapter_name, config, *rest, **more)

    module.check_hotswap_configs_compatible = check_configs
    module.hotswap_adapter_from_state_dict = swap_tensors


def _check_settings(loaded: OwnConfig, new: OwnConfig) -> None:
    """Refuse adapters whose settings differ: the layers are built for those of the loaded one.

    Raises:
        AdapterError: they differ, or the adapter is packed.
    """
    if is_packed(loaded.to_dict()) or is_packed(new.to_dict()):
        raise AdapterError(
            "hotswap_adapter: packed adapters have shapes of their own; load the new one beside the old with "
            "load_adapter, and call set_adapter and delete_adapter"
        )
    ours, theirs = loaded.to_dict(), new.to_dict()
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    refused = [f"{name} ({ours.get(name)} and {theirs.get(name)})" for name in differing if name not in FREE]
    if "seed" in differing and not new.store_bases:
        refused.append("seed")
    if refused:
        raise AdapterError(
            f"hotswap_adapter: the adapters differ in {listing(refused)}; load the new one with load_adapter"
        )


def _swap(model: torch.nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str, config: OwnConfig) -> None:
    """Copy the new adapter's tensors into the loaded one's; where it cannot be, all is as it was.

    Raises:
        AdapterError: the adapter is not there or is merged, or the file's tensors are not those of its layers.
        WrongBaseError: the new adapter was made from another base.
    """
    model = getattr(model, "_orig_mod", model)
    attachment = attachment_of(model, adapter_name)
    if attachment is None:
        raise AdapterError(f"hotswap_adapter: the model has no adapter {adapter_name!r} of this type")
    layers: Any = attachment.layers
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise AdapterError(f"hotswap_adapter: adapter {adapter_name!r} is merged; call unmerge_adapter first")
    names = {id(module): name for name, module in model.named_modules()}
    prefix = attachment.method.prefix
    wanted = {
        f"{names[id(layer)]}.{prefix}{short}.{adapter_name}": (site, short, tensor)
        for site, layer in layers.items()
        for short, tensor in layer.stored(adapter_name).items()
    }
    _check_tensors(wanted, state_dict)
    new: dict[Any, dict[str, torch.Tensor]] = {site: {} for site in layers}
    for name, (site, short, _) in wanted.items():
        new[site][short] = state_dict[name]
    _replace(attachment, new, config)


def _check_tensors(wanted: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - state_dict.keys()), sorted(state_dict.keys() - wanted.keys())
    if missing or unknown:
        what = (
            f"lacks {listing(missing, 2)}" if missing else f"has {listing(unknown, 2)}, which hot swapping leaves alone"
        )
        raise AdapterError(f"hotswap_adapter: the file {what}; load it with load_adapter")
    for name, (_, _, tensor) in wanted.items():
        if tensor.shape != state_dict[name].shape:
            raise AdapterError(
                f"hotswap_adapter: {name} has shape {tuple(state_dict[name].shape)} in the file and "
                f"{tuple(tensor.shape)} in the model; load it with load_adapter"
            )


def _replace(attachment: Attachment, new: dict[Any, dict[str, torch.Tensor]], config: OwnConfig) -> None:
    """Put tensors and what belongs to them in place, and check them against the base; undone where the check fails."""
    old = {
        site: {short: tensor.detach().clone() for short, tensor in layer.stored(attachment.name).items()}
        for site, layer in attachment.layers.items()
    }
    before = {name: getattr(attachment.config, name) for name in SWAPPED}
    try:
        _put(attachment, new, {name: getattr(config, name) for name in SWAPPED})
        attachment.prepare()
    except BaseException:
        _put(attachment, old, before)
        raise


def _put(attachment: Attachment, tensors: dict[Any, dict[str, torch.Tensor]], settings: dict[str, Any]) -> None:
    with torch.no_grad():
        for site, layer in attachment.layers.items():
            layer.set_stored(attachment.name, tensors[site])
    for name, value in settings.items():
        setattr(attachment.config, name, value)
    attachment.invalidate()
