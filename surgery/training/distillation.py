"""Distillation: an adapter learns to answer as another adapter of the same base model does.

The teacher is on the same loaded base as the student: while it answers, the student's layers let everything through,
and the teacher's changes are added by hooks. So there is one copy of the base, and two adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F

from surgery.adapters.adapter import Adapter
from surgery.adapters.fitting import located
from surgery.adapters.source import Source
from surgery.adapters.tokens import tokens_on_base, with_rows
from surgery.errors import AdapterError
from surgery.models.base_model import BaseModel
from surgery.passes.examples import IGNORED
from surgery.passes.fidelity import NUMBERS, arguments
from surgery.passes.hooks import applied
from surgery.passes.moments import is_causal, predictions

__all__ = ["Answers", "Divergence", "Teacher", "divergence", "without_adapters"]


@dataclass
class Answers:
    """What a model says to a batch, row by row in the order of the samples.

    Attributes:
        rows: predictions `(items, classes)` where the model has a head, then the hidden states of each layer for what
            is no padding, `(tokens, width)`.
        owners: for each of these which sample of the batch a row is of, `(items,)` or `(tokens,)`.
        headed: whether the first are predictions.
    """

    rows: list[torch.Tensor]
    owners: list[torch.Tensor]
    headed: bool

    @property
    def predictions(self) -> torch.Tensor | None:
        """The predictions, or None for a model without a head."""
        return self.rows[0] if self.headed else None

    @property
    def hidden(self) -> list[torch.Tensor]:
        """The hidden states, layer by layer."""
        return self.rows[1:] if self.headed else self.rows


@dataclass
class Divergence:
    """How far a student's answers to a batch are from its teacher's.

    Attributes:
        kl: mean KL divergence for each item, or mean squared difference of numbers; None without a head.
        hidden: squared distance of the hidden states over the squared norm of the teacher's, mean over the layers.
        sums: `(3,)`: the KL divergence, the items for which both find the same class most probable, and the items,
            summed.
    """

    kl: torch.Tensor | None
    hidden: torch.Tensor
    sums: torch.Tensor


class Teacher:
    """An adapter on the base model that a student's adapter is on.

    Args:
        adapter: the teacher, of any type.
        base: the base model's files, under the class that is loaded.
        model: the student's PEFT model.
        cache: bytes of answers that are kept, for samples that come again; 0 keeps none.

    Raises:
        AdapterError: it does not fit the model.
    """

    def __init__(self, adapter: Adapter, base: BaseModel, model: PeftModel, cache: int = 0) -> None:
        self.model = model
        self.body: Any = model.get_base_model()
        self.layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        device = next(self.body.parameters()).device
        source = Source.open(adapter, base, device)
        self.deltas = {site.module: delta for _, site, delta in source.deltas() if site is not None}
        parameters = dict(self.body.named_parameters())
        self.carried = {}
        for name, key in source.contents.carried.items():
            place = _place(located(name, base.shapes, base), parameters)
            if place is None or parameters[place].shape != adapter.tensors[key].shape:
                raise AdapterError(f"{adapter.label}: saves {name}, for which the student's model has no place")
            self.carried[place] = adapter.tensors[key].to(parameters[place])
        for name, tokens in tokens_on_base(adapter, base).items():
            place = _place(name, parameters)
            if place is not None:
                value = self.carried.get(place, base.parameter(name).to(parameters[place]))
                self.carried[place] = with_rows(value, tokens)
        self.room = cache
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._headed = False

    def answers(self, features: Mapping[str, Any], samples: torch.Tensor | None = None) -> Answers:
        """What the teacher says to a batch, without gradients; the model is in evaluation mode.

        Args:
            features: a batch. Its labels say which tokens' predictions count, and are not given to the model.
            samples: `(batch,)`: numbers under which answers are kept, and found again.
        """
        if samples is not None and all(number in self._kept for number in samples.tolist()):
            return self._from_cache(samples)
        assert not self.body.training, "a teacher answers without dropout"
        with torch.no_grad(), without_adapters(self.layers), applied(self.body, self.deltas, self.carried):
            output = self.body(**arguments(self.body, features), output_hidden_states=True)
        found = answers_of(self.body, output, features)
        if samples is not None and self.room > 0:
            self._keep(found, samples)
        return found

    def _keep(self, answers: Answers, samples: torch.Tensor) -> None:
        count = len(samples)
        split = [_by_sample(rows, owners, count) for rows, owners in zip(answers.rows, answers.owners, strict=True)]
        self._headed = answers.headed
        for place, number in enumerate(samples.tolist()):
            kept = [part[place] for part in split]
            size = sum(tensor.nbytes for tensor in kept)
            if number not in self._kept and size <= self.room:
                self._kept[number] = [tensor.clone() for tensor in kept]
                self.room -= size

    def _from_cache(self, samples: torch.Tensor) -> Answers:
        joined, owners = [], []
        for part in zip(*(self._kept[number] for number in samples.tolist()), strict=True):
            joined.append(torch.cat(part))
            lengths = torch.tensor([len(each) for each in part])
            owners.append(torch.repeat_interleave(torch.arange(len(part)), lengths))
        return Answers(joined, owners, self._headed)


def answers_of(model: Any, output: Any, features: Mapping[str, Any]) -> Answers:
    """A model's output as rows; it must have been asked for hidden states."""
    logits = getattr(output, "logits", None)
    found = Answers([], [], logits is not None)
    if logits is not None:
        causal = is_causal(model)
        found.rows.append(predictions(logits, features, causal))
        whole = logits.ndim == 3
        numbers = predictions(_numbered(logits), features, causal).reshape(-1) if whole else torch.arange(len(logits))
        found.owners.append(numbers)
    for layers, mask in _layers(output, features):
        for layer in layers:
            kept, numbers = _tokens(layer, mask)
            found.rows.append(kept)
            found.owners.append(numbers)
    return found


def divergence(model: Any, output: Any, features: Mapping[str, Any], teacher: Answers) -> Divergence:
    """How far a student's output is from the teacher's answers, differentiable in the student's."""
    student = answers_of(_inner(model), output, features)
    distances = []
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        scale = theirs.float().square().sum().clamp_min(1e-30)
        distances.append((ours.float() - theirs.float()).square().sum() / scale)
    zero = torch.zeros((), device=student.hidden[0].device) if student.hidden else torch.zeros(())
    hidden = torch.stack(distances).mean() if distances else zero
    if student.predictions is None or teacher.predictions is None:
        return Divergence(None, hidden, torch.zeros(3))
    ours, theirs = student.predictions.float(), teacher.predictions.float()
    if _numbers(model, ours):
        return Divergence((ours - theirs).square().mean(), hidden, torch.zeros(3))
    log_p, log_q = F.log_softmax(theirs, -1), F.log_softmax(ours, -1)
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    same = (ours.detach().argmax(-1) == theirs.argmax(-1)).float()
    return Divergence(each.mean(), hidden, torch.stack([each.detach().sum(), same.sum(), torch.ones_like(same).sum()]))


@contextlib.contextmanager
def without_adapters(layers: Sequence[Any]) -> Iterator[None]:
    """PEFT's layers as the base's alone. Which parameters train stays as it is, unlike with `disable_adapter`."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _place(name: str | None, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """A parameter of the base under its name in the student's model, where PEFT has wrapped its module."""
    if name is None:
        return None
    module, _, last = name.rpartition(".")
    candidates = (name, f"{module}.original_module.{last}", f"{module}.base_layer.{last}")
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _inner(model: Any) -> Any:
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def _numbers(model: Any, rows: torch.Tensor) -> bool:
    """Whether outputs are numbers to be met, not scores of classes."""
    return rows.shape[-1] == 1 or getattr(_inner(model).config, "problem_type", None) in NUMBERS


def _numbered(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, 1)`: the number of the sample."""
    return torch.arange(tensor.shape[0], device=tensor.device)[:, None, None].expand(-1, tensor.shape[1], 1)


def _layers(output: Any, features: Mapping[str, Any]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor | None]]:
    """The hidden states of an output, each with its padding mask, without the embeddings, which no adapter changes."""
    mask, labels = features.get("attention_mask"), features.get("labels")
    answered = labels != IGNORED if labels is not None and labels.ndim == 2 else None
    for name, given in (("hidden_states", mask), ("encoder_hidden_states", mask), ("decoder_hidden_states", answered)):
        found = getattr(output, name, None)
        if found:
            yield list(found[1:]), given


def _tokens(layer: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(tokens, width)` without padding, and which sample each is of."""
    flat = layer.reshape(layer.shape[0], -1, layer.shape[-1])
    owners = torch.arange(flat.shape[0], device=flat.device)[:, None].expand(-1, flat.shape[1])
    if mask is None or mask.shape != flat.shape[:2]:
        return flat.flatten(0, 1), owners.reshape(-1)
    kept = mask.bool()
    return flat[kept], owners[kept]


def _by_sample(tensor: torch.Tensor, owners: torch.Tensor, count: int) -> list[torch.Tensor]:
    return list(tensor.split(torch.bincount(owners.cpu(), minlength=count).tolist()))
