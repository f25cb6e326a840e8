"""The picture of a comparison: heat maps of layers by roles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.display.heat_maps import _grid, _places, draw_grids, short_number, short_roles

__all__ = ["draw_comparison"]
if TYPE_CHECKING:
    from surgery.comparison.report import Comparison


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw where two adapters differ: relative errors of weights, and of outputs where they were measured.

    Raises:
        OutputError: the picture cannot be written.
    """
    sites = comparison.sites
    rows, roles = _places(sites)
    if any(site.weight_error is not None for site in sites):
        title = "|dW_A - dW_B| / |dW_A| (%)"
        grids = [_grid(title, sites, rows, roles, lambda site: _percent(site.weight_error), short_number)]
    else:  # A changes nothing that errors could be relative to
        grids = [_grid("|dW_A - dW_B|", sites, rows, roles, lambda site: site.difference, short_number)]
    if any(site.output_error is not None for site in sites):
        title = "|dW_A x - dW_B x| / |dW_A x|, at the outputs (%)"
        grids.append(_grid(title, sites, rows, roles, lambda site: _percent(site.output_error), short_number))
    names = [Path(name).name or name for name in (comparison.a, comparison.b)]
    draw_grids(grids, rows, short_roles(roles), f"A = {names[0]}, B = {names[1]}", path)


def _percent(error: float | None) -> float | None:
    return None if error is None else 100 * error
