"""Calibration data turned into the metric in which a conversion measures its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.fitting import located
from surgery.adapters.source import Change, Source
from surgery.adapters.tokens import tokens_on_base, with_rows
from surgery.deltas.operators import Delta, Gain, WithBias
from surgery.errors import DataError, MethodError, listing
from surgery.models.sites import LINEAR, Site
from surgery.passes.examples import Examples, batches
from surgery.passes.hooks import applied
from surgery.passes.loaded_model import on_device
from surgery.passes.moments import Moments, gather_moments, moment_bytes
from surgery.storage.atomic_file import atomic_file
from surgery.storage.safetensors_read import read_tensor, tensor_names
from surgery.storage.safetensors_write import write_tensors
from surgery.system.progress import Progress

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
        gains: changes are asked for with their gains apart.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        examples: Examples,
        batch_size: int,
        seed: int = 0,
        progress: Progress | None = None,
        gains: bool = False,
    ) -> None:
        self.gains = gains
        self.model, self.source, self.examples = model, source, examples
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self._full: dict[str, Moments] = {}
        self._projected: dict[str, Moments] = {}
        self._unreached: set[str] = set()

    def reaches(self, change: Change) -> bool:
        """Whether a gradient reaches a layer, as far as moments have been asked for."""
        return change.module not in self._unreached

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

    def moments_of(self, sites: Iterable[Site]) -> dict[Site, Moments | None]:
        """Return the full moments of some layers, to be stored; None for a layer that no gradient reaches."""
        moments: dict[Site, Moments | None] = {}
        for site in sites:
            change = Change.none(self.source.sites[site], site)
            found = self.full(change)
            moments[site] = found if self.reaches(change) else None
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
        # Of embeddings, convolutions and single experts no moments are gathered: theirs are those of others.
        linear = [site for site in sites if site.form.kind == LINEAR]
        found: Mapping[str, Moments] = {}
        if linear:
            with self.adapted():
                changes = {site.module: (each.B, each.A) for site, each in self._changes.items()}
                found = gather_moments(
                    self.model,
                    self.feed(),
                    linear,
                    projections={site.module: changes[site.module] for site in linear} if projected else None,
                    seed=self.seed,
                    progress=self.progress,
                )
        return self._completed(sites, found, projected)

    def _completed(self, sites: Sequence[Site], found: Mapping[str, Moments], projected: bool) -> dict[str, Moments]:
        """Return moments of all layers; for those that no gradient reaches, multiples of the identity.

        Their factors are the means of the other layers', so that their errors count as others of their size do.

        Raises:
            MethodError: no gradient reaches any layer.
        """
        if not found and any(site.form.kind == LINEAR for site in sites):
            raise MethodError(f"{sites[0].module}: no gradient reaches it, or any other layer, on this data")
        missing = [site for site in sites if site.module not in found]
        self._unreached |= {self.source.sites[site] for site in missing}
        plain = like_others(found.values())
        changes = {site: (each.B, each.A) for site, each in self._changes.items()} if missing and projected else {}
        moments = {self.source.sites[site]: found[site.module] for site in sites if site.module in found}
        for site in missing:
            whole = plain(site.out_features, site.in_features)
            if projected:
                B, A = (each.double() for each in changes[site])
                c, f = float(whole.C[0, 0]), float(whole.F[0, 0])
                whole = Moments(c * (A @ A.T), f * (B.T @ B), whole.tokens)
            moments[self.source.sites[site]] = whole
        return moments

    @property
    def _changes(self) -> Mapping[Site, Change]:
        changes = self.source.changes(energy=1.0, gains=self.gains)
        return {change.site: change for change in changes if change.site is not None}

    def adapted(self) -> Any:
        """The model with the source's changes and what it carries, for the time of a block."""
        device = next(self.model.parameters()).device
        deltas: dict[str, Delta] = {site.module: _on(change, device).delta for site, change in self._changes.items()}
        biases = self.source.biases()
        for site, module in self.source.sites.items():
            if module in biases:
                deltas[site.module] = WithBias(deltas[site.module], biases[module].to(device))
        return applied(self.model, deltas, carried_in(self.model, self.source))

    def feed(self) -> Iterator[Any]:
        """The batches, on the model's device."""
        return on_device(next(self.model.parameters()).device, None, batches(self.examples, self.batch_size))


def _on(change: Change, device: torch.device) -> Change:
    gain = change.gain
    if gain is not None and gain.vector is not None:
        kind, values = gain.vector
        gain = Gain.of_kind(kind, values.to(device), None, change.shape)
    return replace(change, B=change.B.to(device), A=change.A.to(device), gain=gain)


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
    for parameter, tokens in tokens_on_base(source.adapter, source.base).items():
        if parameter in names:
            found[parameter] = with_rows(found.get(parameter, source.base.parameter(parameter)), tokens)
    return found


def like_others(found: Iterable[Moments]) -> Callable[[int, int], Moments]:
    """Return what makes moments for a layer of `(out, in)` of which data says nothing: those of others, in the mean.

    They are multiples of the identity: errors of such a layer are those of its weights.
    """
    means = [(float(each.C.diagonal().mean()), float(each.F.diagonal().mean()), each.tokens) for each in found]
    if not means:
        return lambda rows, columns: Moments(torch.eye(columns), torch.eye(rows))
    c, f = (sum(mean[part] for mean in means) / len(means) for part in (0, 1))
    tokens = max(mean[2] for mean in means)
    return lambda rows, columns: Moments(c * torch.eye(columns), f * torch.eye(rows), tokens)


class StoredMoments:
    """Moments from a file: gathered for some adapters of a base model, they serve all that change the same layers.

    Args:
        path: a safetensors file as `add` writes it.
        source: the adapter whose layers are asked for.

    Raises:
        DataError: it is none.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.names = set(tensor_names(path))
        other = sorted(name for name in self.names if not name.endswith((".C", ".F")))
        if other:  # an adapter or a model, say: nothing is added to it
            raise DataError(
                f"{path}: holds no calibration statistics, but {listing(other, 2)}; give --stats another file"
            )

    @property
    def missing(self) -> list[Site]:
        """The adapter's layers of which the file does not have moments."""
        return [site for site in self.source.sites if f"{site.key}.C" not in self.names]

    @staticmethod
    def add(path: Path, moments: Mapping[Site, Moments | None]) -> None:
        """Add moments to the file, or make it; by the sites' keys, which are the same in every class over one body.

        A layer that no gradient reaches is stored with empty moments.
        """
        tensors = {name: read_tensor(path, name) for name in tensor_names(path)} if path.exists() else {}
        for site, each in moments.items():
            empty = torch.zeros(0, 0)
            tensors[f"{site.key}.C"] = each.C.contiguous() if each is not None else empty
            tensors[f"{site.key}.F"] = each.F.contiguous() if each is not None else empty.clone()
        with atomic_file(path.resolve()) as written:
            # Not the library's own writer, which makes a file of its own beside it.
            write_tensors(written, tensors, {"format": "pt", "kind": "surgery calibration"})

    def reaches(self, change: Change) -> bool:
        """Whether the data said anything of a layer."""
        return self._read(change).C.numel() > 0

    def full(self, change: Change) -> Moments:
        """Moments `(in, in)` of x and `(out, out)` of g."""
        found = self._read(change)
        if not found.C.numel():
            return self._plain(*change.shape)
        if found.C.shape[0] != change.shape[1] or found.F.shape[0] != change.shape[0]:
            raise DataError(f"{self.path}: moments of {change.module} are for another base model")
        return found

    def _read(self, change: Change) -> Moments:
        assert change.site is not None
        key = change.site.key
        if f"{key}.C" not in self.names or f"{key}.F" not in self.names:
            raise DataError(f"{self.path}: has no moments for {change.module}; give --data, and they are added")
        C, F = (read_tensor(self.path, f"{key}.{part}").clone() for part in "CF")
        return Moments(C, F)

    @cached_property
    def _plain(self) -> Callable[[int, int], Moments]:
        changes = [Change.none(module, site) for site, module in self.source.sites.items()]
        found = [moments for moments in map(self._read, changes) if moments.C.numel()]
        if not found and any(site.form.kind == LINEAR for site in self.source.sites):
            raise DataError(f"{self.path}: no gradient reached any of the adapter's layers")
        return like_others(found)

    def projected(self, change: Change) -> Moments:
        """Moments `(r, r)` of `A x` and `B^T g`."""
        full = self.full(change)
        B, A = change.B.double(), change.A.double()
        return Moments(A @ full.C.double() @ A.T, B.T @ full.F.double() @ B)
