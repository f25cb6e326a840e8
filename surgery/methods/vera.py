"""VeRA (arXiv 2310.11454), PEFT's own type: `dW = diag(b) B diag(d) A` with one random pair A, B for the model.

A and B are PEFT's to the last bit: Kaiming-uniform, drawn on the CPU from one generator seeded with
`projection_prng_key`, A first, at the largest width of the adapted layers. Only shapes are needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import VeraConfig

from surgery.deltas.operators import Delta, LowRank
from surgery.errors import AdapterError
from surgery.linalg.seeded import kaiming_uniform
from surgery.methods.base import Method, Start, WeightReader, positive_rank
from surgery.methods.catalogue import VERA
from surgery.models.sites import Site
from surgery.system.tensors import Tensors


class VeRA(Method):
    """Vectors on a random projection that all layers share."""

    info = VERA

    @property
    def trainable_names(self) -> list[str]:
        return ["vera_lambda_b", "vera_lambda_d"]

    def rank_at(self, config: VeraConfig, site: Site) -> int:
        # The projections are shared and random: their rank is not capped by a layer's size.
        return config.r

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> VeraConfig:
        # PEFT's name for the seed; the rest of `common` is named alike.
        settings = {**common, "projection_prng_key": common["seed"]}
        del settings["seed"]
        with warnings.catch_warnings():
            # PEFT warns that a projection that is not saved depends on the random generator; the notes say it too.
            warnings.simplefilter("ignore")
            return VeraConfig(
                r=positive_rank(options.get("rank", self.info.rank)),
                save_projection=options.get("store_bases", True),
                **settings,
            )

    def notes(self, config: VeraConfig, sites: Sequence[Site]) -> list[str]:
        if config.save_projection:
            return []
        return ["the projections are not stored: PEFT draws them again from the seed when the adapter is loaded"]

    def start(self, config: VeraConfig, sites: Sequence[Site], weight: WeightReader | None) -> Start:
        tensors: Tensors = {}
        for site in sites:
            tensors[f"{site.module}.vera_lambda_b"] = torch.zeros(site.out_features)
            tensors[f"{site.module}.vera_lambda_d"] = torch.full((config.r,), float(config.d_initial))
        if config.save_projection:
            A, B = projections(config.r, sites, config.projection_prng_key)
            tensors[".vera_A"], tensors[".vera_B"] = A, B
        return Start(tensors)

    def delta(self, config: VeraConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        assert weight is not None
        A, B = tensors["vera_A"], tensors["vera_B"]
        rank, (height, width) = d.numel(), weight.shape
        thin = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] == rank
        if not thin or b.shape != (height,) or d.ndim != 1 or B.shape[0] < height or A.shape[1] < width:
            found = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(tensors))
            raise AdapterError(f"{module or 'vera'}: {found} do not fit a weight of {height} x {width}")
        # One pair for all layers, as large as the largest: each takes the corner that fits it.
        B, A = B[:height], A[:, :width]
        used = d.detach().nonzero()[:, 0]
        if 0 < len(used) < len(d) and not d.requires_grad:
            # Fitted bases hold the ranks of all layers; each selects its own.
            B, A, d = B[:, used], A[used], d[used]
        return LowRank(b[:, None] * B, d[:, None] * A)


def projections(rank: int, sites: Sequence[Site], key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (r, largest in)` and `B (largest out, r)`, float32, as PEFT draws them."""
    generator = torch.Generator(device="cpu").manual_seed(key)
    A = kaiming_uniform((rank, max(site.in_features for site in sites)), generator)
    B = kaiming_uniform((max(site.out_features for site in sites), rank), generator)
    return A, B


METHODS = {"vera": VeRA()}
