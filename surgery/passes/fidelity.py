"""How two adapters of one base model answer the same data: one loaded model, which carries them in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from surgery.deltas.on_layers import added_output
from surgery.deltas.operators import Delta
from surgery.errors import MethodError, NumericsError
from surgery.passes.examples import IGNORED, Examples, batches
from surgery.passes.hooks import applied
from surgery.passes.loaded_model import on_device, prepared
from surgery.passes.moments import is_causal, predictions
from surgery.system.progress import Progress

__all__ = ["Applied", "Fidelity", "LayerOutput", "Scores", "arguments", "fidelity"]

# Predictions are compared some rows at a time: this many numbers in double precision.
ROWS_AT_A_TIME = 1 << 22
# Models whose outputs are numbers to be met, not scores of classes of which one is right.
NUMBERS = {"regression", "multi_label_classification"}


@dataclass(frozen=True)
class Applied:
    """What an adapter does to a loaded model, by the model's names (see `surgery.passes.hooks`).

    Attributes:
        deltas: weight changes by module.
        carried: values by parameter, which take the place of the model's.
    """

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerOutput:
    """What a change adds to a layer's output, over all tokens that are not padding, with the reference on the model.

    Attributes:
        energy: sum of `|dW x|^2` for the reference's change.
        lost: sum of `|dW x - dW' x|^2`.
    """

    energy: float
    lost: float

    @property
    def error(self) -> float | None:
        """`sqrt(tr(R C R^T) / tr(dW C dW^T))` with `R = dW - dW'`, `C = E[x x^T]`; None where the reference adds 0."""
        if self.lost == 0:
            return 0.0
        return math.sqrt(self.lost / self.energy) if self.energy > 0 else None


@dataclass(frozen=True)
class Scores:
    """How well the labels of the data are met.

    Attributes:
        name: `accuracy`, `perplexity`, or `squared error` for a model whose output is a number.
        reference: of the reference.
        other: of the other.
        bare: of the model with neither; None where that was not asked for.
    """

    name: str
    reference: float
    other: float
    bare: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """The other adapter's answers beside the reference's.

    Attributes:
        unit: what an item is: `token` or `sample`.
        items: how many answers were compared.
        kl: mean KL divergence of the other's predictions from the reference's, in nats for each item; None for
            a model that predicts no classes.
        agreement: share of items for which both find the same class most probable; None likewise.
        squared_error: mean squared difference of the outputs, for a model whose output is numbers.
        cosine: mean cosine similarity of the embeddings (the mean of the last hidden states over the tokens that are
            not padding), for a model without a head.
        scores: against the labels, where the data has any that the model understands.
        layers: by module, where layers were asked for.
    """

    unit: str
    items: int
    kl: float | None = None
    agreement: float | None = None
    squared_error: float | None = None
    cosine: float | None = None
    scores: Scores | None = None
    layers: dict[str, LayerOutput] = field(default_factory=dict)


def fidelity(
    model: nn.Module,
    examples: Examples,
    reference: Applied,
    other: Applied,
    batch_size: int = 32,
    *,
    bare: Applied | None = None,
    layers: bool = False,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare what a model answers with one adapter and with another.

    Each batch is run with the reference and then with the other, so that the outputs of one batch are held. The same
    object given twice is run once, and differs from itself by exactly nothing.

    Args:
        model: the base model, loaded; afterwards it is as it was.
        examples: the data; where it has labels the answers are scored, too.
        reference: the adapter that is right by definition.
        other: the adapter that is judged by it.
        batch_size: samples run at a time.
        bare: what is on the model where it is scored without either adapter (the reference's head, say); by default
            it is not.
        layers: measure as well what each layer's difference does to the layer's output.
        progress: called after each batch.

    Raises:
        MethodError: outputs are not finite, or the model's output is of a kind that is not compared here.
        AdapterError: an adapter does not fit the model.
    """
    tally = _Tally(model, same=other is reference)
    watch = _Watch(model, reference.deltas, other.deltas)
    parameter = next(model.parameters())
    feed = on_device(parameter.device, parameter.dtype, batches(examples, batch_size))
    with torch.no_grad(), prepared(model, False, examples):
        for number, batch in enumerate(feed, 1):
            features = {name: value for name, value in batch.items() if name != "share"}
            with watch.over(features) if layers else ExitStack():
                first = _answers(model, features, reference)
            second = first if other is reference else _answers(model, features, other)
            scorable = bare is not None and tally.scorable(features, first)
            third = _answers(model, features, bare) if bare is not None and scorable else None
            tally.add(features, first, second, third)
            if progress is not None:
                progress(min(number * batch_size, len(examples.features)), len(examples.features), "samples")
    return tally.result(watch.layers)


@dataclass(frozen=True)
class _Answers:
    """What a model says to one batch: rows of class scores, of numbers, or of embeddings."""

    kind: str  # "classes", "numbers", "embeddings"
    rows: torch.Tensor  # (items, width)
    unit: str


def _answers(model: nn.Module, features: Mapping[str, Any], adapter: Applied) -> _Answers:
    with applied(model, adapter.deltas, adapter.carried):
        output = model(**arguments(model, features))
    logits, hidden = getattr(output, "logits", None), getattr(output, "last_hidden_state", None)
    if logits is not None:
        unit = "token" if logits.ndim == 3 else "sample"
        numbers = logits.shape[-1] == 1 or getattr(_config(model), "problem_type", None) in NUMBERS
        rows = predictions(logits, features, is_causal(model))
        return _Answers("numbers" if numbers else "classes", rows, unit)
    if hidden is None:
        raise MethodError(
            f"{type(output).__name__} holds neither class scores nor hidden states: this model's answers are not "
            "compared here"
        )
    return _Answers("embeddings", _pooled(hidden, features.get("attention_mask")), "sample")


def arguments(model: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a model's arguments, without labels: they would cost a loss. An encoder-decoder reads on from them."""
    if getattr(_config(model), "is_encoder_decoder", False):
        return dict(features)
    return {name: value for name, value in features.items() if name != "labels"}


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _pooled(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens that are not padding: `(batch, width)`."""
    hidden = hidden.double()
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.flatten(1, -2).mean(1)
    weights = mask.to(hidden)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def _targets(features: Mapping[str, Any], answers: _Answers, causal: bool) -> torch.Tensor | None:
    """The labels of the rows, row for row; None where there are none that say how good an answer is."""
    labels = features.get("labels")
    if labels is None or answers.kind == "embeddings":
        return None
    if labels.ndim == 2 and answers.unit == "token":
        labels = labels[:, 1:] if causal else labels
        labels = labels[labels != IGNORED]
    if answers.kind == "classes":
        return labels if labels.ndim == 1 and labels.shape[0] == answers.rows.shape[0] else None
    return labels.reshape(answers.rows.shape) if labels.numel() == answers.rows.numel() else None


class _Tally:
    """Sums over the batches."""

    def __init__(self, model: nn.Module, same: bool) -> None:
        self.causal, self.same = is_causal(model), same
        self.kind, self.unit = "", ""
        self.items = self.scored = 0
        self.sums = {"kl": 0.0, "agreement": 0.0, "squared_error": 0.0, "cosine": 0.0}
        self.scores = [0.0, 0.0, 0.0]
        self.bare = False

    def scorable(self, features: Mapping[str, Any], answers: _Answers) -> bool:
        """Whether the data says what the right answers are."""
        return _targets(features, answers, self.causal) is not None

    def add(self, features: Mapping[str, Any], first: _Answers, second: _Answers, third: _Answers | None) -> None:
        """One batch."""
        self.kind, self.unit = first.kind, first.unit
        self.items += first.rows.shape[0]
        self.bare |= third is not None
        for start, size in _slices(first.rows):
            pair = [each.rows[start : start + size].double() for each in (first, second)]
            if first.kind == "classes":
                self._add_classes(*pair)
            elif first.kind == "numbers":
                self.sums["squared_error"] += float((pair[0] - pair[1]).square().mean(-1).sum())
            else:
                unit = [F.normalize(each, dim=-1) for each in pair]
                # 1 - |u - v|^2 / 2, which is exactly 1 for equal ones.
                self.sums["cosine"] += float((1 - (unit[0] - unit[1]).square().sum(-1) / 2).sum())
        targets = _targets(features, first, self.causal)
        if targets is not None:
            self._score(targets, [first, second, third])

    def _add_classes(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        self.sums["agreement"] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        log_p, log_q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
        # A class that is ruled out (-inf) by both counts nothing.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        self.sums["kl"] += float(terms.sum())

    def _score(self, targets: torch.Tensor, all_answers: list[_Answers | None]) -> None:
        known = targets != IGNORED if not targets.is_floating_point() else ~targets.isnan()
        rows = known if known.ndim == 1 else known.all(-1)
        self.scored += int(rows.sum())
        for index, answers in enumerate(all_answers):
            if answers is None:
                continue
            found, wanted = answers.rows[rows], targets[rows]
            if answers.kind == "numbers":
                score = (found.double() - wanted.double()).square().mean(-1).sum()
            elif answers.unit == "token":
                score = F.cross_entropy(found.float(), wanted, reduction="none").double().sum()
            else:
                score = (found.argmax(-1) == wanted).sum()
            self.scores[index] += float(score)

    def result(self, layers: dict[str, LayerOutput]) -> Fidelity:
        """The means.

        Raises:
            MethodError: they are not finite.
        """
        if not all(math.isfinite(value) for value in [*self.sums.values(), *self.scores]):
            raise NumericsError("the model's answers on the data are not finite: compute in float32 (--dtype float32)")
        mean = {name: value / max(self.items, 1) for name, value in self.sums.items()}
        classes = self.kind == "classes"
        return Fidelity(
            self.unit,
            self.items,
            kl=max(mean["kl"], 0.0) if classes else None,
            agreement=mean["agreement"] if classes else None,
            squared_error=mean["squared_error"] if self.kind == "numbers" else None,
            cosine=mean["cosine"] if self.kind == "embeddings" else None,
            scores=self._scores(),
            layers=layers,
        )

    def _scores(self) -> Scores | None:
        if not self.scored:
            return None
        found = [score / self.scored for score in self.scores]
        if self.kind == "numbers":
            name = "squared error"
        elif self.unit == "token":
            name = "perplexity"
            found = [math.exp(min(each, 700.0)) for each in found]
        else:
            name = "accuracy"
        return Scores(name, found[0], found[1], found[2] if self.bare else None)


def _slices(rows: torch.Tensor) -> Iterator[tuple[int, int]]:
    size = max(1, ROWS_AT_A_TIME // max(rows.shape[-1], 1))
    for start in range(0, rows.shape[0], size):
        yield start, size


class _Watch:
    """Measures, in the reference's own pass, what two changes of each layer make of the layer's input."""

    def __init__(self, model: nn.Module, first: Mapping[str, Delta], second: Mapping[str, Delta]) -> None:
        self.model, self.first, self.second = model, first, second
        # An expert is no module: nothing shows its input.
        modules = {name for name, _ in model.named_modules()}
        self.names = [name for name in dict.fromkeys([*first, *second]) if name in modules]
        self.sums = {name: torch.zeros(2, dtype=torch.float64) for name in self.names}
        self._tokens = _Tokens(model)

    @property
    def layers(self) -> dict[str, LayerOutput]:
        """What was found."""
        return {name: LayerOutput(*map(float, sums)) for name, sums in self.sums.items()}

    @contextmanager
    def over(self, features: Mapping[str, Any]) -> Iterator[None]:
        """Watch the layers while one batch is run."""
        with ExitStack() as stack:
            stack.enter_context(self._tokens.of(features))
            for name in self.names:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = self._tokens.only(module, args[0] if args else next(iter(named.values())))
            old, new = self.first.get(name), self.second.get(name)
            ours = added_output(module, old, x) if old is not None else None
            theirs = ours if new is old else (added_output(module, new, x) if new is not None else None)
            energy = ours.square().sum(dtype=torch.float64) if ours is not None else 0.0
            if ours is not None and theirs is not None:
                lost: Any = (ours - theirs).square().sum(dtype=torch.float64)
            else:
                lost = energy if theirs is None else theirs.square().sum(dtype=torch.float64)
            self.sums[name] += torch.tensor([float(energy), float(lost)], dtype=torch.float64)

        return see


class _Tokens:
    """Which rows of a layer's input are tokens, not padding."""

    def __init__(self, model: Any) -> None:
        self.encoder = model.get_encoder() if getattr(_config(model), "is_encoder_decoder", False) else None
        self._inside = set(self.encoder.modules()) if self.encoder is not None else set()
        self._encoded: int | None = None
        self._given: torch.Tensor | None = None
        self._answered: torch.Tensor | None = None

    @contextmanager
    def of(self, features: Mapping[str, Any]) -> Iterator[None]:
        """Look at one batch."""
        self._given = features.get("attention_mask")
        labels = features.get("labels")
        self._answered = labels != IGNORED if labels is not None and labels.ndim == 2 else None
        handle = self.encoder.register_forward_hook(self._remember) if self.encoder is not None else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def only(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The rows `(tokens, in)`, float32; all where the mask does not speak of them (poolers, routed experts).

        Of an embedding the tokens `(tokens,)`; the input of a convolution as it is.
        """
        if isinstance(module, _ConvNd):
            return x.float()
        rows = x.reshape(-1) if isinstance(module, nn.Embedding) else x.float().reshape(-1, x.shape[-1])
        mask = self._given
        if self.encoder is not None and module not in self._inside and x.data_ptr() != self._encoded:
            mask = self._answered
        if mask is None or mask.numel() != rows.shape[0]:
            return rows
        return rows[mask.reshape(-1).bool()]

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        # The decoder's cross-attention reads the encoder's output, which has the encoder's padding.
        self._encoded = output[0].data_ptr()
