"""The picture of an inspection: heat maps of layers by roles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.display.heat_maps import _grid, _places, draw_grids, short_number, short_roles
from surgery.errors import MethodError

__all__ = ["draw_inspection"]
if TYPE_CHECKING:
    from surgery.inspection.report import InspectedSite, Inspection


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Draw where a model's numbers, or an adapter's energy and ranks, are: layers by roles.

    Raises:
        MethodError: there is no layer to draw.
        OutputError: the picture cannot be written.
    """
    sites = inspection.sites
    if not sites:
        raise MethodError(
            f"{inspection.path}: has no layer to draw ({'; '.join(inspection.notes) or 'none is linear'})"
        )
    rows, roles = _places(sites)
    grids = []
    if any(site.energy is not None for site in sites):
        what = "change |dW|²" if inspection.kind == "adapter" else "weights |W|²"
        grids.append(_grid(f"share of the squared norm of the {what} (%)", sites, rows, roles, _energy, short_number))
    if any(site.rank_95 is not None for site in sites):
        grids.append(_grid("rank for 95 % of a layer's squared norm", sites, rows, roles, _rank, "{:.0f}".format))
    if not grids:
        grids.append(_grid("parameters (millions)", sites, rows, roles, _millions, "{:.3g}".format))
    name = Path(inspection.path).resolve().name if os.path.isdir(inspection.path) else inspection.path
    draw_grids(
        grids, rows, short_roles(roles), f"{name}: {inspection.model_class or f'{inspection.peft_type} adapter'}", path
    )


def _energy(site: InspectedSite) -> float | None:
    return None if site.energy is None else 100 * site.energy


def _rank(site: InspectedSite) -> float | None:
    return site.rank_95


def _millions(site: InspectedSite) -> float:
    return site.parameters / 1e6
