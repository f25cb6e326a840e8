"""The leading singular vectors of the loss's gradient with respect to every adapted weight, in one backward pass.

No weight's gradient is held, and no base weight needs one: beside every adapted linear a node in the autograd graph
receives the gradient at its output, takes the layer's input, and reduces the two to a few vectors at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.errors import MethodError, NumericsError
from surgery.linalg.low_rank import TruncatedSVD
from surgery.linalg.token_products import TokenProduct, leading_svd
from surgery.models.sites import Site
from surgery.passes.rebuilding import is_rebuildable, rebuild
from surgery.system.processes import Reduce
from surgery.system.progress import Progress

__all__ = ["GradientPass", "Gradients", "frozen", "gradients"]

# A weight as several matrices, one above the other: their heights.
Parts = Mapping[str, Sequence[int]]
Loss = Callable[[Any, Any], torch.Tensor]
Batch = Any
# Between batches this many times the wanted rank is kept of the gradient so far.
MARGIN = 4


@dataclass
class Gradients:
    """What a gradient pass found.

    Attributes:
        svds: for each site that received a gradient, by module name: the leading singular triplets of its gradient,
            one for each part of a fused weight.
        absent: names of the sites that received none.
        loss: the mean loss.
        batches: how many batches there were.
    """

    svds: dict[str, list[TruncatedSVD]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    loss: float = math.nan
    batches: int = 0


def gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    sites: Sequence[Site],
    rank: int,
    *,
    parts: Parts | None = None,
    seed: int = 0,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
) -> Gradients:
    """Reduce the gradient of the summed losses, with respect to each site's weight, to its leading singular triplets.

    One batch: exact up to the range finder. Several: after each the sum so far is cut to four times the rank, which
    keeps what the top `rank` of the whole sum capture to well within 1 %. Weights need no gradient and their dtype,
    or a quantised form, does not matter: only activations are looked at.

    Args:
        model: any module that holds the sites; its parameters are left as they are.
        batches: whatever `loss` takes. Only one is held at a time, and the next.
        loss: `loss(model, batch)`, a scalar. Weight it where batches are of different size: losses are summed.
        sites: the layers.
        rank: triplets wanted of each part of a layer, capped at its smaller side.
        parts: by module name, for fused weights that hold several matrices one above the other: their heights.
        seed: of the range finder.
        reduce: sums a tensor over the processes that share the samples of every batch; all must come to the same
            number of batches.
        progress: called after each layer that is reduced.

    Raises:
        MethodError: there is no batch, a loss or a gradient is not finite, or the loss does not depend on the layers.
    """
    work = GradientPass(model, sites, rank, parts or {}, seed, reduce, progress)
    found = Gradients()
    total = 0.0
    with work.attached(), frozen(model):
        for batch, last in _with_last(batches):
            found.batches += 1
            total += work.run(loss, batch, found.batches, last)
    if not found.batches:
        raise MethodError("the data gave no batch")
    found.loss = total
    for site in sites:
        svds = work.kept.get(site.module)
        if svds is None or not any(float(svd.S[0]) > 0 for svd in svds):
            found.absent.append(site.module)
        else:
            found.svds[site.module] = svds
    return found


class GradientPass:
    """The state of one pass: hooks on the layers, and what is kept of their gradients."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        rank: int,
        parts: Parts,
        seed: int,
        reduce: Reduce | None,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.sites = {site.module: site for site in sites}
        self.rank, self.parts, self.seed = rank, parts, seed
        self.reduce, self.progress = reduce, progress
        self.kept: dict[str, list[TruncatedSVD]] = {}
        self.last = True
        self.number = 0
        self.copies = False
        self._in_forward = False
        self._calls: dict[str, int] = {}
        self._pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._rebuilt: tuple[Any, torch.Tensor] | None = None
        self._done = 0
        # Something that needs a gradient, so that a layer whose input needs none gets a node too.
        self._anchor = torch.zeros((), requires_grad=True)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the layers, for as long as it lasts."""
        handles = [
            self.model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True)
            for name in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, loss: Loss, batch: Batch, number: int, last: bool) -> float:
        """One forward and backward pass; returns the loss."""
        self.last, self.number = last, number
        self._calls, self._pairs = {}, {}
        try:
            value = self._forward(loss, batch)
        except RuntimeError as error:
            if "is a view and is being modified inplace" not in str(error) or self.copies:
                raise
            # The model goes on to change a layer's output in place, which autograd allows on a copy only.
            self.copies = True
            value = self._forward(loss, batch)
        self._check_calls()
        number_found = float(value.detach())
        if not math.isfinite(number_found):
            raise NumericsError(f"the loss is {number_found} on batch {number}: check the data, or try float32")
        if not value.requires_grad:
            raise MethodError("the loss does not depend on any of the adapted layers")
        value.backward()
        self._rebuilt = None
        for name in [name for name, pairs in self._pairs.items() if pairs]:
            self._reduce(name)  # a call of a layer on which the loss does not depend
        return number_found

    def _forward(self, loss: Loss, batch: Batch) -> torch.Tensor:
        self._in_forward = True
        self._calls = {}
        try:
            with torch.enable_grad():
                return loss(self.model, batch)
        finally:
            self._in_forward = False

    def _check_calls(self) -> None:
        """Processes that add up a layer's products must all have run it: one that has not would be waited for."""
        if self.reduce is None:
            return
        calls = torch.tensor([float(self._calls.get(name, 0)) for name in self.sites])
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), calls.device)
        total = calls.to(device, copy=True)
        self.reduce(total)
        uneven = total.cpu() != calls * torch.distributed.get_world_size()
        if uneven.any():
            name = list(self.sites)[int(uneven.nonzero()[0])]
            raise MethodError(f"{name} does not run in every process: leave it out with --target, or use one process")

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            if self._in_forward:
                self._calls[name] = self._calls.get(name, 0) + 1
            if not torch.is_grad_enabled():  # the first pass of a reentrant checkpoint: what counts is the second
                return output
            x: torch.Tensor = args[0] if args else next(iter(named.values()))
            producer = x.grad_fn if is_rebuildable(x) else None
            tapped: torch.Tensor = _Tap.apply(output, x, self._anchor, producer, self, name)
            return tapped

        return hook

    def rebuilt(self, producer: Any) -> torch.Tensor | None:
        """A layer's input, once for the layers in a row that share it, as query, key and value do."""
        if self._rebuilt is None or self._rebuilt[0] is not producer:
            self._rebuilt = None  # let go of the last one before making the next
            found = rebuild(producer)
            if found is None:
                return None
            self._rebuilt = (producer, found)
        return self._rebuilt[1]

    def receive(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        """Take one call's output gradient and input; reduce them when they are the layer's last."""
        pairs = self._pairs.setdefault(name, [])
        # A model that is spread over devices may bring a layer's input from another one.
        X = X.detach().to(D.device)
        pairs.append((D.detach().reshape(-1, D.shape[-1]), X.reshape(-1, X.shape[-1])))
        if len(pairs) >= self._calls.get(name, 1):
            self._reduce(name)

    def _reduce(self, name: str) -> None:
        pairs = self._pairs.pop(name)
        height, width = pairs[0][0].shape[1], pairs[0][1].shape[1]
        heights = self.parts.get(name, (height,))
        before = self.kept.get(name)
        svds = []
        start = 0
        for index, rows in enumerate(heights):
            part = [(D[:, start : start + rows], X) for D, X in pairs]
            if before is not None and self._first_process():
                part.append(_as_tokens(before[index]))
            rank = self.rank if self.last else _kept_rank(self.rank, rows, width)
            try:
                svds.append(leading_svd(TokenProduct(part, self.reduce), rank, self.seed))
            except RuntimeError as error:  # what LAPACK says of numbers that are not finite
                if all(bool(torch.isfinite(D).all() and torch.isfinite(X).all()) for D, X in part):
                    raise
                raise MethodError(
                    f"the gradient at {name} is not finite on batch {self.number}: check the data, or try float32"
                ) from error
            start += rows
        self.kept[name] = svds
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, len(self.sites) if self.last and before is None else 0, self.sites[name].role)

    def _first_process(self) -> bool:
        return self.reduce is None or torch.distributed.get_rank() == 0


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward gives the layer's input and output gradient to the pass."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,
        producer: Any,
        work: GradientPass,
        name: str,
    ) -> torch.Tensor:
        ctx.work, ctx.module, ctx.producer = work, name, producer
        if producer is None:
            # Through autograd, not by hand: so checkpointing drops it, and gives it back when it computes it again.
            ctx.save_for_backward(x)
        return output.clone() if work.copies else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, D: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        X = ctx.saved_tensors[0] if ctx.producer is None else ctx.work.rebuilt(ctx.producer)
        if X is None:
            raise RuntimeError(f"{ctx.module}: the layer's input was freed before its gradient arrived")
        ctx.work.receive(ctx.module, D, X)
        return D if ctx.needs_input_grad[0] else None, None, None, None, None, None


def _as_tokens(svd: TruncatedSVD) -> tuple[torch.Tensor, torch.Tensor]:
    """A decomposition as if it came from tokens: `D^T X = U diag(S) Vh`."""
    return (svd.U * svd.S).T, svd.Vh


def _kept_rank(rank: int, rows: int, columns: int) -> int:
    """How many triplets are kept between batches: never more numbers than the gradient itself has."""
    return max(min(MARGIN * rank, rows * columns // (rows + columns)), min(rank, rows, columns))


def _with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Every batch, and whether it is the last."""
    iterator = iter(batches)
    with contextlib.suppress(StopIteration):
        current = next(iterator)
        for following in iterator:
            yield current, False
            current = following
        yield current, True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient, for as long as it lasts."""
    # By name: a model whose weights are fetched when they are used has other parameters afterwards.
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)
