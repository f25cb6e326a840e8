"""Calibration data turned into the metric in which a conversion measures its errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.fitting import located
from surgery.adapters.source import Change, Source
from surgery.deltas.operators import LowRank
from surgery.errors import DataError
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site
from surgery.passes.examples import Examples, batches
from surgery.passes.gradients import Progress
from surgery.passes.hooks import applied
from surgery.passes.loaded_model import on_device
from surgery.passes.moments import Moments, gather_moments, moment_bytes
from surgery.storage.atomic_file import atomic_file
from surgery.storage.safetensors_read import read_tensor, tensor_names
from surgery.storage.safetensors_write import write_tensors

__all__ = ["Calibration", "StoredMoments"]

# Full moments of so many bytes are held at a time; where all layers' are more, layers take turns.
HELD = 4 << 30


class Calibration:
    """The second moments of an adapted model's layers, gathered when they are asked for.

    Where all of them fit into `HELD` bytes one pass over the data gathers them. Where not, cutting ranks takes one
    pass that gathers r x r moments, and rounding one pass for each group of layers that fits.

    Args:
        model: the base model, loaded, in evaluation mode.
        source: the adapter, whose changes are on the model while it is measured.
        examples: the data.
        batch_size: samples run at a time.
        seed: of the answers that are drawn.
        progress: called after each layer of each batch.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        examples: Examples,
        batch_size: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.source, self.examples = model, source, examples
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self._full: dict[str, Moments] = {}
        self._projected: dict[str, Moments] = {}

    @property
    def all_fit(self) -> bool:
        """Whether one pass gathers all that can be asked for."""
        return moment_bytes(self.source.sites) <= HELD

    def projected(self, change: Change) -> Moments:
        """Moments `(r, r)` of `A x` and `B^T g`."""
        if self.all_fit:
            full = self.full(change)
            B, A = change.B.double(), change.A.double()
            return Moments(A @ full.C.double() @ A.T, B.T @ full.F.double() @ B, full.tokens)
        if not self._projected:
            self._projected = self._gathered(list(self.source.sites), projected=True)
        return self._projected[change.module]

    def full(self, change: Change) -> Moments:
        """Moments `(in, in)` of x and `(out, out)` of g."""
        if change.module not in self._full:
            assert change.site is not None
            self._full = self._gathered(self._group(change.site))
        return self._full[change.module]

    def all_moments(self) -> dict[Site, Moments]:
        """The full moments of every layer, to be stored."""
        moments = {}
        for site, module in self.source.sites.items():
            moments[site] = self.full(Change.none(module, site))
        return moments

    def _group(self, site: Site) -> list[Site]:
        """The layers that are measured with one: all of them, or as many from it on as fit."""
        if self.all_fit:
            return list(self.source.sites)
        order = list(self.source.sites)
        group = [site]
        for other in order[order.index(site) + 1 :]:
            if moment_bytes([*group, other]) > HELD:
                break
            group.append(other)
        return group

    def _gathered(self, sites: Sequence[Site], projected: bool = False) -> dict[str, Moments]:
        with self.adapted():
            changes = {site.module: change for site, change in self._changes.items()}
            found = gather_moments(
                self.model,
                self.feed(),
                sites,
                projections={site.module: changes[site.module] for site in sites} if projected else None,
                seed=self.seed,
                progress=self.progress,
            )
        return {self.source.sites[site]: found[site.module] for site in sites}

    @property
    def _changes(self) -> Mapping[Site, tuple[torch.Tensor, torch.Tensor]]:
        return {
            change.site: (change.B, change.A) for change in self.source.changes(energy=1.0) if change.site is not None
        }

    def adapted(self) -> Any:
        """The model with the source's changes and what it carries, for the time of a block."""
        device = next(self.model.parameters()).device
        deltas = {site.module: LowRank(B.to(device), A.to(device)) for site, (B, A) in self._changes.items()}
        return applied(self.model, deltas, carried_in(self.model, self.source))

    def feed(self) -> Iterator[Any]:
        """The batches, on the model's device."""
        return on_device(next(self.model.parameters()).device, None, batches(self.examples, self.batch_size))


def carried_in(model: Any, source: Source) -> dict[str, torch.Tensor]:
    """What an adapter saves whole, by the names of the model's parameters and buffers.

    What the model's class has no place for has no part in its answers, and is left out.
    """
    assert source.base is not None
    # By every name: a weight that is tied to another is replaced under its own name alone.
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    found = {}
    for parameter, name in source.contents.carried.items():
        place = located(parameter, names, source.base)
        if place is not None:
            found[place] = source.adapter.tensors[name]
    return found


class StoredMoments:
    """Moments from a file: gathered once on a base model, they serve all its adapters.

    Args:
        path: a safetensors file as `save` writes it.
        base: the base model that they must belong to.

    Raises:
        DataError: it is none, or of another base.
    """

    def __init__(self, path: Path, base: BaseModel) -> None:
        self.path = path
        self.names = set(tensor_names(path))
        self.base = base

    @staticmethod
    def save(path: Path, moments: Mapping[Site, Moments]) -> None:
        """Write moments by the sites' keys, which are the same in every class over the same body."""
        tensors = {}
        for site, each in moments.items():
            tensors[f"{site.key}.C"], tensors[f"{site.key}.F"] = each.C.contiguous(), each.F.contiguous()
        with atomic_file(path.resolve()) as written:
            # Not the library's own writer, which makes a file of its own beside it.
            write_tensors(written, tensors, {"format": "pt", "kind": "surgery calibration"})

    def full(self, change: Change) -> Moments:
        """Moments `(in, in)` of x and `(out, out)` of g."""
        assert change.site is not None
        key = change.site.key
        if f"{key}.C" not in self.names or f"{key}.F" not in self.names:
            raise DataError(f"{self.path}: has no moments for {change.module}; make it again with --data")
        C, F = (read_tensor(self.path, f"{key}.{part}").clone() for part in "CF")
        if C.shape[0] != change.shape[1] or F.shape[0] != change.shape[0]:
            raise DataError(f"{self.path}: moments of {change.module} are for another base model")
        return Moments(C, F)

    def projected(self, change: Change) -> Moments:
        """Moments `(r, r)` of `A x` and `B^T g`."""
        full = self.full(change)
        B, A = change.B.double(), change.A.double()
        return Moments(A @ full.C.double() @ A.T, B.T @ full.F.double() @ B)
