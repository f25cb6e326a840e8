"""The PEFT tuner for all our adapter types."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from surgery.adapters.packing import is_packed, packed, packed_prefix, unpacked
from surgery.errors import AdapterError, TargetError, listing
from surgery.methods.base import OwnMethod
from surgery.models.sites import LINEAR, expert_sites, site_of
from surgery.peft_types.attachment import Attachment
from surgery.peft_types.experts_layer import ExpertsLayer
from surgery.peft_types.layer import AdapterLayer
from surgery.system.tensors import whole

__all__ = ["AdapterModel", "tuner_class"]


class AdapterModel(BaseTuner):
    """Replaces the target linears of a model by `AdapterLayer`s. One subclass for each PEFT type."""

    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    method: OwnMethod

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the adapter's layers and, unless they will be loaded, compute its start."""
        config: Any = self.peft_config[adapter_name]
        # Which of the -alpha and -beta variants it is, is in the configuration: the formulas are one method's.
        self._attachment = Attachment(adapter_name, self.method, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        on_meta = any(p.device.type == "meta" for layer in self._attachment.layers.values() for p in layer.parameters())
        if on_meta:
            return
        if config.init_weights:
            self._attachment.start()
            return
        twin = self._twin(self._attachment)
        if twin is not None:
            self._attachment.copy_from(twin)

    def _twin(self, attachment: Attachment) -> Attachment | None:
        """Return a loaded adapter with the configuration and the layers of one that is new, or None."""
        wanted = _settings(attachment.config)
        for name, config in self.peft_config.items():
            other = attachment_of(self.model, name) if name != attachment.name else None
            if other is None or _settings(config) != wanted or other.layers.keys() != attachment.layers.keys():
                continue
            if other.loaded:
                return other
        return None

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise TargetError(
                f"{current_key}: nn.MultiheadAttention never calls this layer, an adapter would do nothing"
            )
        if optional_kwargs.get("parameter_name") is not None:
            self._add_experts(config, adapter_name, target, target_name, parent, current_key)
            return
        if isinstance(target, AdapterLayer):
            if target.method.info.peft_type != self.method.info.peft_type:
                carried = target.method.info.peft_type
                raise AdapterError(f"{current_key}: carries an adapter of type {carried}; one type to a model")
            target.update_layer(adapter_name, config, self._attachment, config.inference_mode)
            return
        site = site_of(self.model, current_key, _linear(target))
        if site.form.kind != LINEAR and not is_packed(config.to_dict()):
            raise TargetError(
                f"{current_key}: {type(target).__name__} is not a linear layer (nn.Linear or Conv1D); only a packed "
                "GiVA adapter changes others"
            )
        layer = AdapterLayer(target, self.method, site)
        layer.update_layer(adapter_name, config, self._attachment, config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _add_experts(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, key: str
    ) -> None:
        """Put an adapter on the experts of one parameter, as far as its packed factors name them."""
        wrapper = target if isinstance(target, ExpertsLayer) else ExpertsLayer(target)
        owner, short = wrapper.base_layer, key.rpartition(".")[2]
        listed = config.packed or {}
        sites = [site for site in expert_sites(self.model, key, getattr(owner, short)) if site.module in listed]
        if any(site.expert is None for site in sites) or not is_packed(config.to_dict()):
            raise TargetError(f"{key}: only the experts of a packed GiVA adapter are adapted, each by itself")
        for site in sites:
            layer = wrapper.add(short, site, self.method)
            layer.update_layer(adapter_name, config, self._attachment, config.inference_mode)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
        if wrapper is not target:
            setattr(parent, target_name, wrapper)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Called by PEFT to put a layer in the place of another; a module of experts has no weight to hand on."""
        if isinstance(child, ExpertsLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around every forward pass: hands `adapter_names`, one for each sample, to the layers.

        Raises:
            ValueError: the model is in training, or has no adapter of a name.
        """
        each = kwargs.get("adapter_names")
        if each is None:
            yield
            return
        each = _for_each_beam(list(each), kwargs.get("num_beams"))
        self._check_adapter_names(each)
        handles = [
            module.register_forward_pre_hook(functools.partial(_add_adapter_names, each), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, each: list[str]) -> None:
        if self.training:
            raise ValueError("adapter_names cannot be used while the model is in training: call eval() first")
        unknown = sorted(set(each) - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names: the model has no adapter {listing(unknown)}, it has {listing(self.peft_config)}"
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse by name what PEFT offers for LoRA alone.

        Raises:
            AdapterError: always.
        """
        title = self.method.info.title
        raise AdapterError(
            f"add_weighted_adapter: a sum of {title} adapters is in general no {title} adapter; activate several "
            "at once (base_model.set_adapter([...])), or add LoRAs made of them by surgery convert --to lora"
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Called by PEFT after creating and after loading an adapter.

        Tensors are float32 throughout; only on request do they take the dtype of the base. Rounding trained and
        frozen tensors alike keeps a start at zero change.
        """
        attachment = attachment_of(self.model, adapter_name)
        if attachment is None:
            return
        for layer in attachment.layers.values():
            base_dtype = layer.linear.weight.dtype
            if not autocast_adapter_dtype and base_dtype.is_floating_point:
                layer.cast(adapter_name, base_dtype)
            elif autocast_adapter_dtype:
                layer.cast(adapter_name, torch.float32)
        if attachment.loaded:
            attachment.prepare()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Called by PEFT to select what is saved: integers are saved as codes."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not is_packed(config.to_dict()):
            return selected
        named = {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in selected.items()}
        wrapped = any(name.startswith("base_model.model.") for name in named)
        above, inside = ("base_model.", "base_model.model.") if wrapped else ("", "")
        return packed(config.to_dict(), named, above, inside)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuse a file that does not hold this adapter's tensors: PEFT alone would ignore that."""
        attachment = attachment_of(model, adapter_name)
        above = packed_prefix(state_dict)
        if above is not None and is_packed(config.to_dict()):
            state_dict = whole(unpacked(config.to_dict(), state_dict, above, f"{above}model." if above else ""))
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if attachment is None:
            return remapped
        attachment.forget()
        names = {id(module): name for name, module in model.named_modules()}
        prefix = cls.method.prefix
        missing = [
            f"{names[id(layer)]}.{prefix}{short}"
            for layer in attachment.layers.values()
            for short in layer.stored(adapter_name)
            if f"{names[id(layer)]}.{prefix}{short}.{adapter_name}" not in remapped
        ]
        if missing:
            found = sorted(key for key in state_dict if f".{prefix}" in key)
            hint = f"; the file has {listing(found, 2)}" if found else ""
            raise AdapterError(
                f"the file lacks {len(missing)} of the adapter's tensors ({listing(missing, 2)}){hint}. An adapter "
                "made for another model class (bare or with a head) opens with surgery.load"
            )
        return remapped


def _for_each_beam(each: list[str], beams: Any) -> list[str]:
    """Return the names as `generate` repeats the samples: each as often as there are beams."""
    return [name for name in each for _ in range(beams)] if isinstance(beams, int) and beams > 1 else each


def _add_adapter_names(each: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": each}


def attachment_of(model: nn.Module, adapter_name: str) -> Attachment | None:
    """The attachment of an adapter of ours in a model, if it has one."""
    for module in model.modules():
        if isinstance(module, AdapterLayer) and adapter_name in module.attachments:
            return module.attachments[adapter_name]
    return None


def tuner_class(method: OwnMethod) -> type[AdapterModel]:
    """Return the tuner for a method's PEFT type; an attribute of this module, so that pickle finds it."""
    name = "".join(part.capitalize() for part in method.info.peft_type.split("_")) + "Model"
    if name not in globals():
        made = type(name, (AdapterModel,), {"method": method, "prefix": method.prefix, "__module__": __name__})
        globals()[name] = made
    found: type[AdapterModel] = globals()[name]
    return found


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "inference_mode"}


def _linear(target: Any) -> nn.Module:
    while hasattr(target, "base_layer"):
        target = target.base_layer
    return target
