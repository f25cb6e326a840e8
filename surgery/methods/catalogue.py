"""The rows of our own adapter methods: what each is called, what it needs, and its published defaults.

Importing this module imports neither torch nor peft, so that the command line can list methods and check options at
once. The formulas are in one module per method, named in `MethodInfo.module`; methods are looked up by
`surgery.methods.registry`, which also knows those of installed plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = [
    "DATA_OPTIONS",
    "FROD",
    "GIVA",
    "INILORA",
    "INILORA_ALPHA",
    "INILORA_BETA",
    "SMOA",
    "VERA",
    "MethodInfo",
    "MethodName",
]

# Our own; an installed package may add others.
MethodName = Literal["vera", "giva", "inilora", "inilora-alpha", "inilora-beta", "frod", "smoa"] | str

# Options of `surgery init` for methods that need data.
DATA_OPTIONS = frozenset({"data", "loss", "samples", "batch_size", "max_length", "gradient_checkpointing"})


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table.

    Attributes:
        name: as on the command line.
        title: as in the paper.
        peft_type: the `peft_type` of the adapters it makes.
        module: the module with its formulas, whose `METHODS` maps `name` to a `Method`.
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
        own_type: PEFT knows `peft_type` through surgery only.
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
    own_type: bool = True
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    unnamed_variant: str | None = None
    changed: str | None = None

    def of_variant(self, variant: str | None) -> MethodInfo:
        """The row of a variant; this row itself for the default one, or None."""
        different = self.variants.get(variant or "")
        return replace(self, **different) if different else self


_INILORA: dict[str, Any] = {
    "peft_type": "INILORA",
    "module": "surgery.methods.inilora",
    "change": "s (B A - B0 A0)",
    "trains": "A (r, in), B (out, r)",
    "paper": "arXiv 2510.03731",
    "rank": 8,
}
_RANKED = frozenset({"rank", "alpha", "store_bases"})

VERA = MethodInfo(
    name="vera",
    title="VeRA",
    peft_type="VERA",
    module="surgery.methods.vera",
    change="diag(b) B diag(d) A",
    trains="b (out), d (r)",
    stores="A, B once for the model, or their seed",
    paper="arXiv 2310.11454",
    options=frozenset({"rank", "store_bases"}),
    rank=256,
    training_rate=4e-3,
    reads_weights=False,
    own_type=False,
)

GIVA = MethodInfo(
    name="giva",
    title="GiVA",
    peft_type="GIVA",
    module="surgery.methods.giva",
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
)

INILORA = MethodInfo(
    name="inilora",
    title="IniLoRA",
    stores="A0, B0: the weight's best rank-r approximation",
    options=_RANKED,
    training_rate=2e-3,
    **_INILORA,
)

INILORA_ALPHA = MethodInfo(
    name="inilora-alpha",
    title="IniLoRA-alpha",
    stores="A0, B0: Gaussian, or their seed",
    options=_RANKED,
    learning_rate=2e-5,
    training_rate=2e-5,
    reads_weights=False,
    **_INILORA,
)

INILORA_BETA = MethodInfo(
    name="inilora-beta",
    title="IniLoRA-beta",
    stores="A0, B0: Kaiming-normal, or their seed",
    options=_RANKED,
    learning_rate=2e-5,
    training_rate=2e-5,
    reads_weights=False,
    **_INILORA,
)

FROD = MethodInfo(
    name="frod",
    title="FRoD",
    peft_type="FROD_PORTABLE",
    module="surgery.methods.frod",
    change="U (diag(l) + S) V^T - W",
    trains="l (in), the nonzeros of a sparse S (in, in)",
    stores="V once for each role, or what recognises it",
    paper="doi 10.1609/aaai.v40i31.39813",
    options=frozenset({"sparse_rate", "store_bases"}),
    training_rate=5e-3,
)

SMOA = MethodInfo(
    name="smoa",
    title="SMoA",
    peft_type="SMOA",
    module="surgery.methods.smoa",
    change="s (B_k A_k) * W_k",
    trains="A_k (r_k, in / K), B_k (out / K, r_k)",
    stores="which row and column is in which of K blocks W_k, or a digest of that",
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
)
