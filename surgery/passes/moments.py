"""Second moments of a model's layers on calibration data: what the error of a weight does to the model's output.

For a layer with inputs x and, at its output, gradients g of the log-likelihood of answers drawn from the model's own
predictions, `C = E[x x^T]` and `F = E[g g^T]`. A change R of the weight moves the predictions by a KL divergence of
about `tr(R^T F R C) / 2` for each item (the Kronecker-factored Fisher, arXiv 1503.05671), so that errors of different
layers can be compared and added up. No labels are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto

from surgery.errors import NumericsError
from surgery.models.sites import Site
from surgery.passes.examples import IGNORED
from surgery.passes.gradients import GradientPass, frozen
from surgery.system.progress import Progress

__all__ = ["Moments", "gather_moments", "moment_bytes", "sampled_loss"]

Projections = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Moments:
    """Second moments of one layer, float32 on the CPU.

    Attributes:
        C: of its inputs, mean over tokens: `(in, in)`; or of `A x`, `(r, r)`, where only these were gathered.
        F: of the gradients at its output, sum over an item's tokens, mean over items: `(out, out)`; or of `B^T g`.
        tokens: how many tokens C is a mean over.
    """

    C: torch.Tensor
    F: torch.Tensor
    tokens: int = 0


def moment_bytes(sites: Iterable[Site]) -> int:
    """What the full moments of these layers take."""
    return sum(4 * (site.in_features**2 + site.out_features**2) for site in sites)


def gather_moments(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    sites: Sequence[Site],
    *,
    projections: Projections | None = None,
    draws: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Return the second moments of every layer that a gradient reaches, by module name.

    Args:
        model: a transformers model, bare or with an adapter, whose layers are found by the sites' names.
        batches: the model's arguments, as tensors on its device.
        sites: the layers.
        projections: by module name, factors `B (out, r)` and `A (r, in)`: gather the moments of `B^T g` and `A x`,
            which are r x r and all that cutting ranks needs.
        draws: how many answers are drawn for every item; each takes a backward pass.
        seed: of the answers.
        progress: called after each layer of each batch.

    Raises:
        MethodError: an output is not finite.
    """
    work = _MomentPass(model, sites, projections, progress)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    counts: list[int] = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        value, count = sampled_loss(model, batch, generator)
        counts.append(count)
        return value

    with work.attached(), frozen(model):
        for number, batch in enumerate(batches, 1):
            for _ in range(draws):
                work.run(loss, batch, number, last=True)
    return {name: _mean(moments, sum(counts)) for name, moments in work.sums.items()}


def sampled_loss(model: Any, batch: Mapping[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """The negative log-likelihood of answers drawn from the model's predictions, summed, and how many there are.

    A model without predictions (bare, or of one number) is taken to answer with unit Gaussian noise about its output.

    Raises:
        MethodError: the predictions are not finite.
    """
    features = {name: value for name, value in batch.items() if name != "share"}
    output = model(**features)
    logits = getattr(output, "logits", None)
    if logits is None:
        hidden = output.last_hidden_state
        return _gaussian(hidden, features.get("attention_mask"), generator)
    if logits.shape[-1] == 1:
        return _gaussian(logits, None, generator)
    rows = predictions(logits, features, causal=is_causal(model))
    log_probs = F.log_softmax(rows.float(), -1)
    if not bool(torch.isfinite(log_probs).all()):
        raise NumericsError("the model's predictions are not finite on this data: check its weights, or try float32")
    drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(rows.device)
    return -log_probs.gather(1, drawn).sum(), int(rows.shape[0])


def is_causal(model: Any) -> bool:
    """Whether a model's prediction at a position is of the token after it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) or name in _causal_classes()


@functools.cache
def _causal_classes() -> frozenset[str]:
    """transformers' classes for the task, some of which are named for what else they take (Gemma3ForConditional...)."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return frozenset(each for name in names for each in ((name,) if isinstance(name, str) else name))


def predictions(logits: torch.Tensor, features: Mapping[str, Any], causal: bool) -> torch.Tensor:
    """The predictions that count, one row each: `(items, classes)`.

    A sequence classifier's are all of them; of a language model's, those of tokens that have a label.
    """
    if logits.ndim == 2:
        return logits
    labels = features.get("labels")
    if labels is None or labels.shape != logits.shape[:-1]:
        mask = features.get("attention_mask")
        kept = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
    else:
        kept = labels != IGNORED
    if causal:
        logits, kept = logits[:, :-1], kept[:, 1:]
    return logits[kept.to(logits.device)]


def _gaussian(output: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    noise = torch.randn(output.shape, generator=generator).to(output)
    if mask is not None:
        noise = noise * mask[..., None].to(noise)
    return (output * noise).sum(), int(output.shape[0])


class _MomentPass(GradientPass):
    """Adds up second moments where a gradient pass would reduce gradients."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], projections: Projections | None, progress: Progress | None
    ) -> None:
        super().__init__(model, sites, 1, {}, 0, None, progress)
        self.projections = projections
        self.sums: dict[str, Moments] = {}

    def _reduce(self, name: str) -> None:
        for D, X in self._pairs.pop(name):
            self._add(name, D, X)
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, 0, self.sites[name].role)

    def _add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        # A token whose output the loss does not feel, padding above all, has no part in either.
        felt = D.abs().amax(1) > 0
        D, X = D[felt].float(), X[felt].float()
        if self.projections is not None:
            B, A = self.projections[name]
            D, X = D @ B.to(D), X @ A.T.to(X)
        if name not in self.sums:
            C, F = (torch.zeros(each.shape[1], each.shape[1], device=each.device) for each in (X, D))
            self.sums[name] = Moments(C, F)
        sums = self.sums[name]
        sums.C.addmm_(X.T, X)
        sums.F.addmm_(D.T, D)
        sums.tokens += int(X.shape[0])


def _mean(sums: Moments, items: int) -> Moments:
    return Moments(sums.C.cpu() / max(sums.tokens, 1), sums.F.cpu() / max(items, 1), sums.tokens)
