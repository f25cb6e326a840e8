"""FRoD (doi 10.1609/aaai.v40i31.39813, arXiv 2512.23485): `dW = U (diag(l) + S) V^T - W`.

The layers of one role share the right basis V; `W = U diag(l0) V^T` with unit columns in U. Since
`U = W V^-T diag(1 / l0)`,

    dW = W T,   T = V^-T diag(1 / l0) (diag(l - l0) + S) V^T,

so the adapted layer computes `W (x + T x)`. No U is stored, the start is exactly the base in every dtype, and U
always belongs to the V in use: a file cannot be opened with a U that does not fit. Training in float32 holds `W V^-T`
of every layer, a copy of the adapted weights, and computes `W V^-T (I + diag(1 / l0) (diag(l - l0) + S)) V^T x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from surgery.deltas.operators import Delta, InputMap
from surgery.deltas.sparse import Pattern
from surgery.errors import AdapterError, MethodError
from surgery.linalg.joint import joint_basis, left_norms, right_inverse_transposed
from surgery.linalg.seeded import generator_for, off_diagonal_pattern
from surgery.methods.base import Bases, OwnConfig, OwnMethod, Role, Spec, WeightReader
from surgery.methods.catalogue import FROD, MethodInfo
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

DEFAULT_SPARSE_RATE = 0.01
ROUNDING = 1e-5
LEFT = "WP"  # W V^-T, what training holds of each layer
FALLBACKS = {
    "single matrix": "one layer alone has nothing to share; its basis is its own right singular basis",
    "few rows": "all layers together have fewer rows than columns; the basis is their right singular basis",
    "rank-deficient": "the stacked weights are rank-deficient; their basis is completed by an orthonormal one",
}


@dataclass
class FrodPortableConfig(OwnConfig):
    """Configuration of a `FROD_PORTABLE` adapter.

    Attributes:
        sparse_rate: share of the entries of S `(in, in)` that train, off the diagonal.
        regularization: `a`, the ridge in the joint decomposition.
    """

    info: ClassVar[MethodInfo] = FROD
    sparse_rate: float = field(default=DEFAULT_SPARSE_RATE, metadata={"help": "Share of S that trains."})
    regularization: float = field(default=1e-3, metadata={"help": "Ridge of the joint decomposition."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate < 1:
            raise MethodError(f"sparse rate must be at least 0 and below 1, got {self.sparse_rate}")
        if not self.regularization > 0:
            raise MethodError(f"regularization must be positive, got {self.regularization}")


class FRoD(OwnMethod):
    """Joint decomposition across the layers of a role."""

    config_class = FrodPortableConfig
    trains_as_one = True
    on_base_weight = True
    thin = False
    high, wide = (), ("V",)
    specs = (
        Spec("l", Role.TRAINABLE),
        Spec("s", Role.TRAINABLE),
        Spec("l0", Role.KEPT),
        Spec("V", Role.BASE, shared=True),
        Spec("positions", Role.BASE, shared=True),
        Spec("P", Role.DERIVED, shared=True),
        Spec("starts", Role.DERIVED, shared=True),
        Spec("columns", Role.DERIVED, shared=True),
        Spec("order", Role.DERIVED, shared=True),
    )

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> FrodPortableConfig:
        rate = options.get("sparse_rate")
        return FrodPortableConfig(
            sparse_rate=DEFAULT_SPARSE_RATE if rate is None else rate,
            store_bases=options.get("store_bases", True),
            **common,
        )

    @property
    def passes(self) -> int:
        # The sum of the Gram matrices, their inverses, and the column norms of U.
        return 3

    def group_key(self, site: Site) -> str:
        return f"{site.role}|{site.in_features}"

    def shapes(self, config: FrodPortableConfig, site: Site) -> dict[str, tuple[int, ...]]:
        size = site.in_features
        count = nonzeros(size, config.sparse_rate)
        return {
            "l": (size,),
            "s": (count,),
            "l0": (size,),
            "V": (size, size),
            "positions": (count,),
            "check": (2, 9),
        }

    def dtype(self, name: str, site: Site) -> torch.dtype:
        if name == "positions":
            return narrow_positions(torch.empty(0, dtype=torch.int64), site.in_features).dtype
        return super().dtype(name, site)

    def bases(self, config: FrodPortableConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        size = sites[0].in_features
        joint = joint_basis(lambda start: weight.each(sites[start:]), size, config.regularization)
        generator = generator_for(config.seed, self.group_key(sites[0]))
        positions = off_diagonal_pattern(size, nonzeros(size, config.sparse_rate), generator)
        shared = {
            "V": joint.V.to(torch.float32),
            "P": joint.inverse_transposed.to(torch.float32),
            "positions": narrow_positions(positions, size),
            **_compressed(positions, size),
        }
        notes = [f"{sites[0].role}: {FALLBACKS[joint.fallback]}"] if joint.fallback else []
        return Bases(shared, [{} for _ in sites], notes)

    def kept(self, config: FrodPortableConfig, site: Site, bases: Tensors, weight: torch.Tensor | None) -> Tensors:
        assert weight is not None
        return {"l0": column_norms(weight, bases["P"])}

    def trainables(self, config: FrodPortableConfig, site: Site, frozen: Tensors) -> Tensors:
        count = nonzeros(site.in_features, config.sparse_rate)
        return {"l": frozen["l0"].clone(), "s": torch.zeros(count)}

    def shared_derived(self, config: FrodPortableConfig, bases: Tensors) -> Tensors:
        V, positions = bases["V"], bases["positions"]
        if V.ndim != 2 or V.shape[0] != V.shape[1]:
            raise AdapterError(f"frod_portable_V has shape {tuple(V.shape)}, which is no square")
        size = V.shape[0]
        if positions.is_floating_point() or positions.ndim != 1:
            raise AdapterError(f"frod_portable_positions is {positions.dtype} {tuple(positions.shape)}, not places")
        places = positions.to(torch.int64)
        if not V.is_meta and places.numel() and not bool(((places >= 0) & (places < size * size)).all()):
            raise AdapterError(f"frod_portable_positions has places outside of a matrix of {size} x {size}")
        if not V.is_meta and places.unique().numel() < places.numel():
            raise AdapterError("frod_portable_positions names a place twice")
        try:
            return {"P": right_inverse_transposed(V), **_compressed(places, size)}
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise AdapterError("frod_portable_V has no inverse: the file is broken") from None

    def delta(
        self, config: FrodPortableConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = ""
    ) -> Delta:
        l0 = tensors["l0"]
        gain = torch.where(l0 > 0, 1.0 / torch.where(l0 > 0, l0, 1.0), 0.0).to(l0.dtype)
        diagonal, values = tensors["l"] - l0, tensors["s"][tensors["order"]]
        pattern = Pattern(tensors["starts"], tensors["columns"])
        return InputMap(weight, tensors["P"], gain, diagonal, values, pattern, tensors["V"], tensors.get(LEFT))

    def held(self, config: FrodPortableConfig, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        left = weight @ tensors["P"]
        error = torch.linalg.matrix_norm(left @ tensors["V"].T - weight) / torch.linalg.matrix_norm(weight)
        # A basis too ill-conditioned would train at another base than the one it is used with.
        return {LEFT: left} if bool(error <= ROUNDING) else {}


def _compressed(places: torch.Tensor, size: int) -> Tensors:
    """The places of S as compressed rows, and the order that sorts its values into them."""
    ascending, order = torch.sort(places)
    pattern = Pattern.of(ascending, size)
    return {"starts": pattern.starts, "columns": pattern.columns, "order": order}


def narrow_positions(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Places in a `(size, size)` matrix as they are stored: 32 bits are enough for up to 46,340 columns."""
    return positions.to(torch.int32) if size * size < 2**31 else positions


def column_norms(weight: torch.Tensor, V_inverse_transposed: torch.Tensor) -> torch.Tensor:
    """`l0` of one layer, `(in,)` float32: the column norms of `W V^-T`.

    Norms that are rounding next to the largest are set to zero, and their columns of U with them: the layer has no
    part in that direction (it has fewer rows than columns, say), and a column made of rounding would be another one
    on every machine.
    """
    norms = left_norms(weight, V_inverse_transposed)
    return torch.where(norms > ROUNDING * norms.max(), norms, 0.0)


def nonzeros(size: int, sparse_rate: float) -> int:
    """How many entries of S `(size, size)` train: at least one where the rate is not zero and there is room."""
    available = size * (size - 1)
    count = min(int(size * size * sparse_rate), available)
    return max(count, 1) if sparse_rate > 0 and available else count


METHODS = {"frod": FRoD(FROD)}
