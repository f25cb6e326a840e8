"""`surgery.inspect`: what is in a model or adapter folder."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents, contents_of
from surgery.adapters.lacking import lacking_in
from surgery.adapters.names import CONFIG_FILE
from surgery.adapters.tokens import ROWS
from surgery.deltas.operators import Delta
from surgery.deltas.spectrum import effective_rank, has_cheap_spectrum, singular_values
from surgery.errors import AdapterError, listing
from surgery.inspection.report import InspectedRole, InspectedSite, Inspection
from surgery.models.sites import Site, linear_sites, role_by_name, unsupported_modules
from surgery.storage.hub_cache import local_folder
from surgery.storage.safetensors_write import DTYPE_OF_CODE, Tensor, read_header

if TYPE_CHECKING:
    from surgery.adapters.on_base import ChangesOnBase
    from surgery.models.base_model import BaseModel

__all__ = ["inspect"]


def inspect(
    path: str | Path,
    plot: str | Path | None = None,
    *,
    base: str | Path | None = None,
    spectra: bool = False,
    trust_remote_code: bool = False,
) -> Inspection:
    """Look into a model or adapter folder.

    Of a model only headers and configuration are read, so that a folder of any size answers at once. Of an adapter the
    weight change of every layer is read: its norm, and its singular values where they come from thin factors.

    Args:
        path: a folder or a Hub id, of a model or an adapter.
        plot: a picture to draw, layers by roles: `.png`, `.svg` or `.pdf`.
        base: an adapter's base model, for the types whose changes depend on it (HiRA, FRoD, SMoA, VeRA, RandLoRA).
        spectra: decompose dense matrices too: a model's weights, and changes that have no thin factors. Slow.
        trust_remote_code: run model code that comes with a model.

    Returns:
        The inspection.

    Raises:
        AdapterError: an adapter's files are broken.
        CheckpointError: a model's files are broken, or there is no such folder.
        MethodError: the picture's name has another ending.
        OutputError: the picture cannot be written.
    """
    started = time.perf_counter()
    if plot is not None:
        from surgery.display.heat_maps import check_picture

        check_picture(Path(plot))
    folder = local_folder(str(path))
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file():
        found = _adapter(str(path), Adapter.open(folder), base, spectra, trust_remote_code)
    else:
        if base is not None:
            raise AdapterError(f"{path}: is a base model; base belongs to an adapter")
        from surgery.models.base_model import BaseModel  # brings transformers, which an adapter by itself does not need

        found = _model(str(path), BaseModel.open(folder, None, trust_remote_code), spectra)
    found.roles = _by_role(found.sites)
    if plot is not None:
        from surgery.inspection.picture import draw_inspection

        draw_inspection(found, Path(plot))
        found.out = str(plot)
    found.seconds = time.perf_counter() - started
    return found


def _adapter(
    path: str, adapter: Adapter, base: str | Path | None, spectra: bool, trust_remote_code: bool
) -> Inspection:
    assert adapter.weights is not None
    in_header = adapter.weights.suffix == ".safetensors"
    header = read_header(adapter.weights).tensors if in_header else _like(adapter.tensors)
    found = _started(path, "adapter", header, [adapter.weights])
    found.notes += [*adapter.notes, *lacking_in(adapter).notes]
    found.peft_type = adapter.peft_type
    found.base = adapter.config.get("base_model_name_or_path")
    found.task = adapter.config.get("task_type")
    try:
        contents = contents_of(adapter)
    except AdapterError as error:
        found.modules = len([module for module in adapter.modules if module])
        found.notes.append(f"its weight changes are not read: {error}")
        return found
    found.carried = sorted([*contents.carried, *(f"{module}.{ROWS}" for module in contents.tokens)])
    found.modules = len(contents.modules)
    changes = _Changes(adapter, contents, base, trust_remote_code)
    modules, unread, gains = adapter.modules, {}, contents.type.gains(adapter.config)
    if gains:
        found.notes.append(f"{len(gains)} layers have gains on the base weight: {_counted(gains.values())}")
    for name in contents.modules:
        role, layer = role_by_name(name)
        entry = _site(name, role, layer, None, _like(modules[name]))
        entry.gains = gains.get(name)
        found.sites.append(entry)
        try:
            delta = changes.delta(name)
        except AdapterError as error:
            if base is not None:
                raise
            unread[name] = str(error).removeprefix(f"{name}: ")
            continue
        _measure(entry, delta, spectra)
    _share_energy(found.sites)
    if unread:
        reason = next(iter(unread.values()))
        found.notes.append(
            f"the changes of {len(unread)} layers are not read without the base, --base MODEL ({reason})"
        )
    elif all(site.norm == 0 for site in found.sites):
        found.notes.append("the adapter changes no weight: it is at its start, where dW = 0")
    return found


class _Changes:
    """The weight changes of an adapter, on its base where that is given."""

    def __init__(self, adapter: Adapter, contents: Contents, base: str | Path | None, trust_remote_code: bool) -> None:
        self.adapter = adapter
        self.sites: dict[str, Site] = {}
        self.on_base: ChangesOnBase | None = None
        if base is None:
            return
        from surgery.adapters.fitting import sites_on_base, with_place_for
        from surgery.adapters.on_base import ChangesOnBase
        from surgery.models.base_model import BaseModel

        opened = with_place_for(BaseModel.open(base, None, trust_remote_code), adapter, contents, trust_remote_code)
        opened.refuse_quantized()
        sites = sites_on_base(adapter, opened, contents.modules)
        self.sites = {name: site for site, name in sites.items()}
        self.on_base = ChangesOnBase(contents, opened, sites, torch.device("cpu"))

    def delta(self, module: str) -> Delta:
        """The change of one layer."""
        if self.on_base is None:
            return self.adapter.delta(module)
        site = self.sites[module]
        return self.on_base.delta(site, self.on_base.base.weight(site))


def _model(path: str, base: BaseModel, spectra: bool) -> Inspection:
    files = sorted(set(base.files.files.values()))
    header = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
    found = _started(path, "model", header, files)
    found.model_class = type(base.model).__name__
    found.not_adapted = unsupported_modules(base.model)
    sites = linear_sites(base.model)
    missing = [site.module for site in sites if site.parameter not in base.sources]
    for site in sites:
        if site.parameter not in base.sources:
            continue
        tensors = {key: header[key] for key, _ in base.sources[site.parameter].keys if key in header}
        shape = (site.out_features, site.in_features)
        entry = _site(site.module, site.role, site.layer, shape, tensors)
        # A tensor of the file may hold several layers' weights (a fused qkv).
        entry.bytes = entry.bytes * math.prod(shape) // max(entry.parameters, 1)
        entry.parameters = math.prod(shape)
        found.sites.append(entry)
        if spectra:
            base.refuse_quantized()
            _set_spectrum(entry, torch.linalg.svdvals(base.weight(site).double()))
    _share_energy(found.sites)
    found.modules = len(found.sites)
    if missing:
        found.notes.append(f"the checkpoint has no weights for {listing(missing, 3)}")
    if getattr(base.config, "quantization_config", None):
        found.notes.append("the checkpoint is quantised: several numbers may be packed into one")
    return found


def _started(path: str, kind: str, header: Mapping[str, Tensor], files: Iterable[Path]) -> Inspection:
    paths = list(files)
    dtypes: dict[str, int] = {}
    for tensor in header.values():
        dtypes[_dtype(tensor)] = dtypes.get(_dtype(tensor), 0) + tensor.size
    return Inspection(
        path=path,
        kind=kind,
        peft_type=None,
        model_class=None,
        base=None,
        task=None,
        modules=0,
        parameters=sum(math.prod(tensor.shape) for tensor in header.values()),
        bytes=sum(file.stat().st_size for file in paths),
        dtypes=dtypes,
        files=len(paths),
    )


def _site(
    module: str, role: str, layer: int | None, shape: tuple[int, int] | None, tensors: Mapping[str, Tensor]
) -> InspectedSite:
    dtypes = dict.fromkeys(_dtype(tensor) for tensor in tensors.values())
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return InspectedSite(
        module, role, layer, shape, "+".join(dtypes), numbers, sum(tensor.size for tensor in tensors.values())
    )


def _like(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: Tensor.like(tensor) for name, tensor in tensors.items()}


def _dtype(tensor: Tensor) -> str:
    known = DTYPE_OF_CODE.get(tensor.dtype)
    return tensor.dtype if known is None else str(known).removeprefix("torch.")


def _measure(entry: InspectedSite, delta: Delta, spectra: bool) -> None:
    """Norm and spectrum of a change."""
    entry.shape = delta.shape
    factors = delta.factors()
    entry.rank = None if factors is None else int(factors[1].shape[0])
    if spectra or has_cheap_spectrum(delta):
        _set_spectrum(entry, singular_values(delta))
    else:
        entry.norm = float(delta.norm())


def _set_spectrum(entry: InspectedSite, values: torch.Tensor) -> None:
    entry.norm = float(values.square().sum().sqrt())
    entry.rank_95, entry.rank_99 = effective_rank(values, 0.95), effective_rank(values, 0.99)


def _share_energy(sites: list[InspectedSite]) -> None:
    total = sum(site.norm**2 for site in sites if site.norm is not None)
    for site in sites:
        if site.norm is not None:
            site.energy = site.norm**2 / total if total else 0.0


def _by_role(sites: list[InspectedSite]) -> list[InspectedRole]:
    grouped: dict[str, list[InspectedSite]] = {}
    for site in sites:
        grouped.setdefault(site.role, []).append(site)
    return [
        InspectedRole(
            role,
            len(group),
            sorted({site.shape for site in group if site.shape is not None}),
            sorted({site.dtype for site in group}),
            sum(site.parameters for site in group),
            sum(site.bytes for site in group),
            sorted({site.rank for site in group if site.rank is not None}),
            _sum(site.energy for site in group),
            _extremes(site.rank_95 for site in group),
            _extremes(site.rank_99 for site in group),
        )
        for role, group in grouped.items()
    ]


def _counted(kinds: Iterable[str]) -> str:
    """How often each occurs: `3 on rows, 1 on inputs`."""
    listed = list(kinds)
    return ", ".join(f"{listed.count(kind)} on {kind}" for kind in dict.fromkeys(listed))


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _extremes(values: Iterable[int | None]) -> tuple[int, int] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
