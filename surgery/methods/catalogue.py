"""The table of adapter methods: what each is called, what it needs, and its published defaults.

Reading this table imports neither torch nor peft, so that the command line can list methods and check options at
once. The formulas are in one module per method, named in `module`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import MethodError

if TYPE_CHECKING:
    from surgery.methods.base import Method


# Options of `surgery init` for methods that need data.
DATA_OPTIONS = frozenset({"data", "loss", "samples", "batch_size", "max_length", "gradient_checkpointing"})

__all__ = ["DATA_OPTIONS", "METHODS", "OWN_TYPES", "MethodInfo", "method_for_config", "method_info", "training_rate"]


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table.

    Attributes:
        name: as on the command line.
        title: as in the paper.
        peft_type: the `peft_type` of the adapters it makes.
        module: where its formulas are, below `surgery.methods`.
        change: its formula for the weight change.
        trains: what a trainer changes.
        stores: what an adapter folder holds besides.
        paper: where the method was published.
        options: the options of `surgery init` that it takes besides those of every method.
        rank: default rank, or None for a method without one.
        alpha: default `alpha`; None stands for "equal to the rank" where the method has one.
        learning_rate: the published setting, or None where we know of none for all tasks.
        training_rate: what `surgery train` takes: the published setting, or the best of a sweep (docs/training.md).
        reads_weights: its start depends on the values of the base weights.
        reads_gradients: its start depends on the gradient of a loss, so on data.
        variants: what differs in variants other than the default one, by their names in the configuration.
        unnamed_variant: the variant of a saved configuration that names none.
        changed: what its name means now and meant before, for a run that does not choose the variant.
    """

    name: str
    title: str
    peft_type: str
    module: str
    change: str
    trains: str
    stores: str
    paper: str
    options: frozenset[str] = frozenset()
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    training_rate: float = 1e-3
    reads_weights: bool = True
    reads_gradients: bool = False
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    unnamed_variant: str | None = None
    changed: str | None = None

    def of_variant(self, variant: str | None) -> MethodInfo:
        """The row of a variant; this row itself for the default one, or None."""
        different = self.variants.get(variant or "")
        return replace(self, **different) if different else self

    def load(self) -> Method:
        """Import the method's formulas (this imports torch and peft)."""
        method: Method = importlib.import_module(f"surgery.methods.{self.module}").METHODS[self.name]
        return method


_INILORA: dict[str, Any] = {
    "peft_type": "INILORA",
    "module": "inilora",
    "change": "s (B A - B0 A0)",
    "trains": "A (r, in), B (out, r)",
    "paper": "arXiv 2510.03731",
    "rank": 8,
}
_RANKED = frozenset({"rank", "alpha", "store_bases"})

METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            name="vera",
            title="VeRA",
            peft_type="VERA",
            module="vera",
            change="diag(b) B diag(d) A",
            trains="b (out), d (r)",
            stores="A, B once for the model, or their seed",
            paper="arXiv 2310.11454",
            options=frozenset({"rank", "store_bases"}),
            rank=256,
            training_rate=4e-3,
            reads_weights=False,
        ),
        MethodInfo(
            name="giva",
            title="GiVA",
            peft_type="GIVA",
            module="giva",
            change="diag(o) B diag(s) A",
            trains="o (out), s (r)",
            stores="A (r, in): the gradient's leading directions; B (out, r), or its seed",
            paper="arXiv 2604.21901",
            options=frozenset({"rank", "store_bases", "variant", "split"}) | DATA_OPTIONS,
            rank=8,
            learning_rate=1e-2,
            training_rate=1e-2,
            reads_weights=False,
            reads_gradients=True,
        ),
        MethodInfo(
            name="inilora",
            title="IniLoRA",
            stores="A0, B0: the weight's best rank-r approximation",
            options=_RANKED,
            training_rate=2e-3,
            **_INILORA,
        ),
        MethodInfo(
            name="inilora-alpha",
            title="IniLoRA-alpha",
            stores="A0, B0: Gaussian, or their seed",
            options=_RANKED,
            learning_rate=2e-5,
            training_rate=2e-5,
            reads_weights=False,
            **_INILORA,
        ),
        MethodInfo(
            name="inilora-beta",
            title="IniLoRA-beta",
            stores="A0, B0: Kaiming-normal, or their seed",
            options=_RANKED,
            learning_rate=2e-5,
            training_rate=2e-5,
            reads_weights=False,
            **_INILORA,
        ),
        MethodInfo(
            name="frod",
            title="FRoD",
            peft_type="FROD_PORTABLE",
            module="frod",
            change="U (diag(l) + S) V^T - W",
            trains="l (in), the nonzeros of a sparse S (in, in)",
            stores="V once for each role, or what recognises it",
            paper="doi 10.1609/aaai.v40i31.39813",
            options=frozenset({"sparse_rate", "store_bases"}),
            training_rate=5e-3,
        ),
        MethodInfo(
            name="smoa",
            title="SMoA",
            peft_type="SMOA",
            module="smoa",
            change="s (B_k A_k) * W[rows_k, columns_k]",
            trains="A_k (r_k, in / K), B_k (out / K, r_k)",
            stores="which of K blocks each row and column is in, or a digest of that; W is the anchor",
            paper="arXiv 2601.07507",
            options=_RANKED | {"groups", "branch_ranks", "variant"},
            rank=32,
            learning_rate=1e-3,
            training_rate=1e-3,
            variants={
                "components": {
                    "title": "SMoA (components)",
                    "change": "sum_k M_k * (B_k A_k)",
                    "trains": "A_k (r_k, in), B_k (out, r_k)",
                    "stores": "where W's spectrum is cut; the masks M_k come from W",
                    "paper": "arXiv 2601.07507v1",
                    "learning_rate": None,
                    "training_rate": 8e-3,
                }
            },
            unnamed_variant="components",
            changed="smoa is the published form since 0.2.0: K diagonal blocks, about 1/K of a LoRA's trained numbers; "
            "what 0.1.0 made is --variant components",
        ),
    )
}

# The PEFT types that only surgery knows, with the module of their formulas.
OWN_TYPES: dict[str, str] = {
    info.peft_type: info.module for info in METHODS.values() if info.peft_type not in {"LORA", "VERA"}
}


# What `surgery train` takes for the types that stock PEFT makes.
STOCK_RATES = {"LORA": 5e-4}
STOCK_RATE = 1e-3


def method_for_config(config: Mapping[str, Any]) -> MethodInfo | None:
    """The row of the method that made an adapter, by its `adapter_config.json`; None for none of ours."""
    peft_type, variant = config.get("peft_type"), config.get("variant")
    rows = [info for info in METHODS.values() if info.peft_type == peft_type]
    if len(rows) < 2:
        return rows[0].of_variant(variant or rows[0].unnamed_variant) if rows else None
    return next((info for info in rows if variant is not None and info.name.endswith(f"-{variant}")), rows[0])


def training_rate(config: Mapping[str, Any]) -> float:
    """The learning rate that `surgery train` takes for an adapter, by its `adapter_config.json`."""
    info = method_for_config(config)
    return info.training_rate if info is not None else STOCK_RATES.get(str(config.get("peft_type")), STOCK_RATE)


def method_info(name: str) -> MethodInfo:
    """The row called `name`.

    Raises:
        MethodError: there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise MethodError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}") from None
