"""The layer that replaces an adapted one (linear, embedding, convolution), for all our PEFT types."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from surgery.deltas.on_layers import added_output, by_channel, gained_output
from surgery.deltas.operators import Delta, Gain, InputMap
from surgery.errors import AdapterError
from surgery.methods.base import CHECK, OwnMethod, Role
from surgery.models.sites import LINEAR, Site
from surgery.peft_types.attachment import Attachment, missing_value
from surgery.system.tensors import Tensors

__all__ = ["AdapterLayer"]


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of adapters of one method.

    It computes `base(x + sum_a T_a x) + sum_a dW_a x`: an adapter acts on the layer's input or adds to its output,
    as its method's `Delta` says. Gains on the layer's outputs are on what it computes, and take no product of their
    own. In training, where one adapter is active and its method can, base and change are one product.
    """

    def __init__(self, base_layer: nn.Module, method: OwnMethod, site: Site) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.method = method
        self.site = site
        self.adapter_layer_names = tuple(f"{method.prefix}{name}" for name in method.names(Role.TRAINABLE))
        frozen = [*method.names(Role.KEPT, Role.BASE, Role.DERIVED), CHECK]
        self.other_param_names = (*(f"{method.prefix}{name}" for name in frozen), "adapter_dropout", "attachments")
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        for name in frozen:
            setattr(self, f"{method.prefix}{name}", BufferDict())
        self.adapter_dropout = nn.ModuleDict()
        self.attachments: dict[str, Attachment] = {}
        self.in_features, self.out_features = site.in_features, site.out_features
        self.fan_in_fan_out = site.transposed
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._weight_before_merge: torch.Tensor | None = None
        self._bias_before_merge: torch.Tensor | None = None
        self._held: dict[str, tuple[list[tuple[int, int]], Tensors]] = {}
        self._copies: dict[tuple[str, str, torch.device], tuple[torch.Tensor, int, torch.Tensor]] = {}

    @property
    def linear(self) -> Any:
        """The linear layer at the bottom, below any other adapter layers."""
        return BaseTunerLayer.get_base_layer(self)

    @property
    def device(self) -> torch.device:
        """Where the base weight lies."""
        return self.linear.weight.device

    @property
    def is_quantized(self) -> bool:
        """Whether the base layer is a quantised replacement of a linear."""
        weight = getattr(self.linear, "weight", None)
        return weight is None or hasattr(weight, "quant_state") or not weight.is_floating_point()

    def update_layer(self, adapter_name: str, config: Any, attachment: Attachment, inference_mode: bool) -> None:
        """Allocate an adapter's tensors, to be filled by its start or by loading.

        Raises:
            AdapterError: accelerate has moved the base weight away.
        """
        if self.device.type == "meta" and hasattr(self.linear, "_hf_hook"):
            raise AdapterError(_offloaded(self.site.module, "the base weight"))
        self.attachments[adapter_name] = attachment
        owner = attachment.add(self.site, self)
        shapes = self.method.shapes(config, self.site)
        device = self.device if self.device.type != "meta" else torch.device("cpu")
        trainable = self.method.names(Role.TRAINABLE)
        for name in self.method.stored(config, owner):
            dtype = self.method.dtype(name, self.site)
            tensor = torch.full(shapes[name], missing_value(dtype), dtype=dtype, device=device)
            if name in trainable:
                self._dict(name)[adapter_name] = nn.Parameter(tensor)
            else:
                self._dict(name).register_buffer(adapter_name, tensor, persistent=True)
        dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.adapter_dropout[adapter_name] = dropout
        BaseTunerLayer.set_adapter(self, self._active(), inference_mode=inference_mode)

    def stored(self, adapter_name: str) -> Tensors:
        """The tensors that this layer keeps in the adapter's file, by short name."""
        config = self.attachments[adapter_name].config
        owner = self.attachments[adapter_name].owner(self.site) is self
        return {name: self._dict(name)[adapter_name] for name in self.method.stored(config, owner)}

    def all_tensors(self, adapter_name: str, shared: bool | None = None) -> Tensors:
        """The tensors that are on this layer, by short name; with `shared`, only those a group shares or not."""
        names = [spec.name for spec in self.method.specs if shared in (None, spec.shared)]
        return {name: self._dict(name)[adapter_name] for name in names if adapter_name in self._dict(name)}

    def set_stored(self, adapter_name: str, tensors: Tensors) -> None:
        """Copy values into the stored tensors, keeping their dtype and device."""
        for name, tensor in tensors.items():
            self._dict(name)[adapter_name].data.copy_(tensor)
        self._drop_caches(adapter_name)  # torch does not count what is written through `data`

    def set_unstored(self, adapter_name: str, tensors: Tensors) -> None:
        """Hold regenerated or derived tensors, which are in no state dict."""
        dtype = next(iter(self.all_tensors(adapter_name).values())).dtype
        for name, tensor in tensors.items():
            kept = tensor.to(self.device, dtype if tensor.is_floating_point() else tensor.dtype)
            self._dict(name).register_buffer(adapter_name, kept, persistent=False)

    def copy_on(self, device: torch.device, adapter_name: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A shared tensor on another device, copied there once."""
        key = (adapter_name, name, device)
        source, version, copy = self._copies.get(key, (None, -1, tensor))
        if source is not tensor or version != tensor._version:
            copy = tensor.to(device)
            self._copies[key] = (tensor, tensor._version, copy)
        return copy

    def write_weight(self, value: torch.Tensor) -> None:
        """Put another weight into the base layer."""
        self.linear.weight.data = value

    def pristine_weight(self) -> torch.Tensor:
        """The base weight without any merged adapter, `(out, in)`, in its own dtype."""
        weight: torch.Tensor = self.linear.weight.detach()
        if weight.is_meta:
            raise AdapterError(_offloaded(self.site.module, "the base weight"))
        if self._weight_before_merge is not None:
            weight = self._weight_before_merge.to(weight)
        return self.site.matrix(weight)

    def delta(self, adapter_name: str, in_training: bool = False, with_weight: bool = True) -> Delta:
        """The weight change of one adapter, as a structured operator.

        Args:
            adapter_name: its name.
            in_training: with what the method holds while it trains.
            with_weight: with the base weight, where the change is made of its values; gains can do without.
        """
        attachment = self.attachments[adapter_name]
        tensors = attachment.tensors(self.site)
        if any(tensor.is_meta for tensor in tensors.values()):
            raise AdapterError(_offloaded(self.site.module, f"adapter {adapter_name!r}"))
        if in_training:
            tensors = {**tensors, **self._holding(adapter_name, tensors)}
        weight = self.pristine_weight() if with_weight and self._needs_weight(attachment) else None
        return self.method.delta(attachment.config, tensors, weight, self.site.module)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight change in the base weight's own orientation, float32."""
        with torch.no_grad():
            attachment = self.attachments[adapter]
            tensors = {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in attachment.tensors(self.site).items()
            }
            weight = self.pristine_weight().float() if self._needs_weight(attachment) else None
            dense = self.method.delta(attachment.config, tensors, weight, self.site.module).dense()
        return self.site.stored(dense)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output with the active adapters, or with one adapter for each sample.

        Args:
            x: `(..., in)`; with `adapter_names` its first axis is the batch.
            args: for the base layer.
            kwargs: for the base layer, and `adapter_names`: an adapter's name, or `__base__`, for each sample.
        """
        each = kwargs.pop("adapter_names", None)
        if each is not None and not self.disable_adapters:
            return self._mixed_batch(x, list(each), args, kwargs)
        return self._forward(x, *args, **kwargs)

    def _mixed_batch(self, x: torch.Tensor, each: list[str], args: Any, kwargs: Any) -> torch.Tensor:
        if len(each) != len(x):
            raise ValueError(f"adapter_names has {len(each)} names for a batch of {len(x)}: give one for each sample")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter first")
        result: torch.Tensor | None = None
        for name in dict.fromkeys(each):
            rows = torch.tensor([index for index, other in enumerate(each) if other == name], device=x.device)
            part = self._with([name] if name in self.attachments else [], x[rows], *args, **kwargs)
            result = part.new_empty((len(x), *part.shape[1:])) if result is None else result
            result = result.index_copy(0, rows, part)
        assert result is not None
        return result

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._with([name for name in self._active() if name in self.attachments], x, *args, **kwargs)

    def _with(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output with these adapters."""
        as_one = len(names) == 1 and not args and not kwargs and self._trains_as_one(names[0], x)
        deltas = [self.delta(name, in_training=True) if as_one else self._delta_on_output(name) for name in names]
        adapted = deltas[0].adapted(x, self.linear.bias) if as_one else None
        if adapted is not None:
            return adapted
        shift: torch.Tensor | None = None
        added: torch.Tensor | None = None
        gains: list[tuple[Gain, torch.Tensor]] = []
        for name, whole in zip(names, deltas, strict=True):
            # Tokens of an embedding are neither cast nor dropped.
            h = x
            if x.is_floating_point():
                h = self.adapter_dropout[name](BaseTunerLayer._cast_input_dtype(self, x, self._dtype(name)))
            gain, delta = whole.gain_apart()
            linear = self.site.form.kind == LINEAR
            columns = gain.columns if gain is not None and gain.rows is None and linear else None
            if columns is not None:
                shift = h * columns if shift is None else shift + h * columns
            elif gain is not None:
                gains.append((gain, h))
            if isinstance(delta, InputMap):
                part = delta.input_shift(h)
                shift = part if shift is None else shift + part
            elif delta is not None:
                part = added_output(self.linear, delta, h)
                added = part if added is None else added + part
        result = self.base_layer(x if shift is None else x + shift.to(x.dtype), *args, **kwargs)
        own = result if shift is None and self.base_layer is self.linear else None
        for gain, h in gains:
            part = self._gained(gain, h, own)
            added = part if added is None else added + part
        return result if added is None else result + added.to(result.dtype)

    def _gained(self, gain: Gain, x: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """What gains add to the layer's output; `output` is what it computes by itself, None where that is not at hand.

        Raises:
            AdapterError: it is not at hand, and the base layer is quantised.
        """
        if output is None and self.is_quantized:
            raise AdapterError(
                f"{self.site.module}: the layer is quantised, where gains on its outputs work alone, not beside an "
                "adapter that acts on its input"
            )
        added = gained_output(self.linear, gain, x, output)
        bias = getattr(self.linear, "bias", None)
        if gain.outputs and gain.rows is not None and bias is not None:
            added = added + by_channel(self.linear, gain.rows * bias).to(added)
        return added

    def _delta_on_output(self, adapter_name: str) -> Delta:
        """The weight change of one adapter, its gains without the weight that they are on."""
        attachment = self.attachments[adapter_name]
        return self.delta(adapter_name, with_weight=self.method.needs_base(attachment.config))

    def _trains_as_one(self, name: str, x: torch.Tensor) -> bool:
        """Whether base and adapter may be computed together: a plain frozen linear in training, one dtype throughout.

        Half precision keeps them apart, so that rounding leaves the base's own output as it is.
        """
        linear = self.base_layer
        if (
            not (self.training and self.method.trains_as_one)
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or type(linear) not in {nn.Linear, Conv1D}
            or self.is_quantized
        ):
            return False
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        return (
            not weight.requires_grad
            and not _is_watched(linear)
            and weight.dtype in {torch.float32, torch.float64}
            and x.dtype == self._dtype(name) == weight.dtype
            and x.device == weight.device
            and not torch.is_autocast_enabled(x.device.type)
            and isinstance(self.adapter_dropout[name], nn.Identity)
        )

    def _holding(self, adapter_name: str, tensors: Tensors) -> Tensors:
        """What the method holds in training, computed anew when what it comes from changes."""
        weight = self.pristine_weight()
        names = self.method.names(Role.KEPT, Role.BASE, Role.DERIVED)
        frozen = [tensors[name] for name in names if name in tensors]
        # The parameter too: what is written into it is not counted by its `data`.
        sources = [(t.data_ptr(), t._version) for t in (weight, self.linear.weight, *frozen)]
        if adapter_name not in self._held or self._held[adapter_name][0] != sources:
            with torch.no_grad():
                held = self.method.held(self.attachments[adapter_name].config, tensors, weight)
            self._held[adapter_name] = sources, held
        return self._held[adapter_name][1]

    def train(self, mode: bool = True) -> AdapterLayer:
        """Training or evaluation; evaluation holds nothing for training."""
        if not mode:
            self._held.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterLayer:
        """What is held for training does not stay where the layer was, or as it was."""
        self._held.clear()
        super()._apply(fn, recurse)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weight changes to the base weight, keeping what `unmerge` puts back.

        Raises:
            ValueError: `safe_merge` is set and the merged weight is not finite.
            AdapterError: the base layer is quantised.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.attachments]
        if not names:
            return
        weight = self.linear.weight
        if self.is_quantized:
            raise AdapterError(f"{self.site.module}: cannot merge into a quantised layer")
        changes, biases = [self.get_delta_weight(name) for name in names], self._bias_changes(names)
        merged = weight.data.float()
        for change in changes:
            merged = merged + change
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaN or Inf in the merged weights of {self.site.module}: adapters {', '.join(names)}")
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.data.detach().clone()
        self.write_weight(merged.to(weight.dtype))
        if biases:
            bias = self.linear.bias
            if self._bias_before_merge is None:
                self._bias_before_merge = bias.data.detach().clone()
            bias.data = (bias.data.float() + torch.stack(biases).sum(0)).to(bias.dtype)
        self.merged_adapters.extend(names)

    def _bias_changes(self, names: list[str]) -> list[torch.Tensor]:
        """What adapters add to the layer's bias, `(out,)` float32, of those that do."""
        bias = getattr(self.linear, "bias", None)
        if bias is None:
            return []
        before = bias.detach() if self._bias_before_merge is None else self._bias_before_merge.to(bias)
        with torch.no_grad():
            found = [
                self.method.output_bias(
                    self.attachments[name].config, self.site.module, self.attachments[name].tensors(self.site), before
                )
                for name in names
            ]
        return [each for each in found if each is not None]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The linear itself, with the adapters merged if wanted; nothing is kept to undo it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._weight_before_merge = self._bias_before_merge = None
        return self.base_layer

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the copies made of what it shares."""
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self._drop_caches(adapter_name)

    def _drop_caches(self, adapter_name: str) -> None:
        """Drop what was computed or copied from an adapter's tensors."""
        self._copies = {key: value for key, value in self._copies.items() if key[0] != adapter_name}
        self._held.pop(adapter_name, None)

    def unmerge(self) -> None:
        """Put the base weight back as it was, to the last bit."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.write_weight(self._weight_before_merge.to(self.linear.weight))
        if self._bias_before_merge is not None:
            self.linear.bias.data = self._bias_before_merge.to(self.linear.bias)
        self._weight_before_merge = self._bias_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """All our changes are additive in the weight."""
        return True

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast an adapter's floating-point tensors, trained and frozen alike."""
        for spec in self.method.specs:
            holder = self._dict(spec.name)
            if adapter_name not in holder or not holder[adapter_name].is_floating_point():
                continue
            if isinstance(holder, nn.ParameterDict):
                holder[adapter_name].data = holder[adapter_name].data.to(dtype)
            else:
                holder._buffers[adapter_name] = holder[adapter_name].to(dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Whoever loads new tensors, what was derived from the old ones is out of date."""
        super()._load_from_state_dict(*args, **kwargs)
        for attachment in self.attachments.values():
            attachment.invalidate()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but never round: PEFT's own would pass a bfloat16 base's dtype on to float32 tensors."""
        target = self.device if device is None else device
        for spec in self.method.specs:
            holder = self._dict(spec.name)
            if adapter_name in holder and holder[adapter_name].device.type != "meta":
                if isinstance(holder, nn.ParameterDict):
                    holder[adapter_name].data = holder[adapter_name].data.to(target)
                else:
                    holder._buffers[adapter_name] = holder[adapter_name].to(target)

    def _dict(self, name: str) -> Any:
        return getattr(self, f"{self.method.prefix}{name}")

    def _dtype(self, adapter_name: str) -> torch.dtype:
        dtype: torch.dtype = self._dict(self.method.names(Role.TRAINABLE)[0])[adapter_name].dtype
        return dtype

    def _active(self) -> list[str]:
        active: Any = self.active_adapters
        return list(active)

    def _needs_weight(self, attachment: Attachment) -> bool:
        return self.method.needs_base(attachment.config) or self.method.uses_weight(attachment.config)

    def __repr__(self) -> str:
        return f"surgery.{self.method.info.title}{super().__repr__().removeprefix(type(self).__name__)}"


def _offloaded(module: str, what: str) -> str:
    return (
        f"{module}: {what} is on the meta device, moved away by accelerate (cpu_offload, or a device_map with cpu or "
        "disk); surgery's adapters compute with tensors that stay on a device: load the model without offloading, or "
        "merge the adapter first (surgery merge)"
    )


def _is_watched(linear: nn.Module) -> bool:
    """Whether somebody wants to see the layer's inputs, outputs or their gradients, or computes it in another way."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return any(hooks) or "forward" in vars(linear) or hasattr(linear, "_hf_hook")
