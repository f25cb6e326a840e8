"""The picture on a card: where an adapter's weight change sits, layers by roles."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.inspection.picture import draw_inspection
from surgery.inspection.report import InspectedSite, Inspection
from surgery.publishing.checks import Checked

__all__ = ["draw_layers"]


def draw_layers(checked: Checked, title: str, path: Path) -> bool:
    """Draw the layers that were measured; False where there is nothing to see.

    Args:
        checked: the adapter.
        title: of the picture.
        path: the file to write.
    """
    total = sum(layer.norm**2 for layer in checked.layers)
    if not total:
        return False
    sites = []
    for layer in checked.layers:
        found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", layer.module)
        role = layer.module if found is None else layer.module[: found.start(1)] + "*" + layer.module[found.end(1) :]
        block = None if found is None else int(found[1])
        site = InspectedSite(layer.module, role, block, layer.shape, "", 0, 0, layer.rank, layer.norm)
        site.energy, site.rank_95, site.rank_99 = layer.norm**2 / total, layer.rank_95, layer.rank_99
        sites.append(site)
    inspection = Inspection(
        path=title,
        kind="adapter",
        peft_type=checked.peft_type,
        model_class=None,
        base=checked.base,
        task=None,
        modules=len(sites),
        parameters=0,
        bytes=0,
        dtypes={},
        files=1,
        sites=sites,
    )
    draw_inspection(inspection, path)
    return True
