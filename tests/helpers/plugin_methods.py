"""A method of another package."""

from __future__ import annotations

# One file holds the row and the formulas: dW = diag(t), a vector on the diagonal of a square weight.
FORMULAS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from surgery.deltas.operators import LowRank
from surgery.methods.base import OwnConfig, OwnMethod, Role, Spec
from surgery.methods.catalogue import MethodInfo

INFO = MethodInfo(
    name="tilt", title="Tilt", peft_type="TILT", module="tilting", change="diag(t)", trains="t (out)",
    stores="nothing", paper="none", reads_weights=False,
)

@dataclass
class TiltConfig(OwnConfig):
    info: ClassVar[MethodInfo] = INFO

class Tilt(OwnMethod):
    config_class = TiltConfig
    high, wide = ("t",), ()
    specs = (Spec("t", Role.TRAINABLE),)

    def make_config(self, options, common):
        return TiltConfig(**common)

    def shapes(self, config, site):
        return {"t": (site.out_features,)}

    def trainables(self, config, site, frozen):
        return {"t": torch.zeros(site.out_features)}

    def delta(self, config, tensors, weight, module=""):
        return LowRank(torch.diag(tensors["t"]), torch.eye(len(tensors["t"])))

METHODS = {"tilt": Tilt(INFO)}
"""
