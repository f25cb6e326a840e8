"""What every conversion starts from: an adapter as one pair of factors for each layer, and what it carries along."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents, contents_of
from surgery.adapters.fitting import sites_on_base, with_names_of
from surgery.adapters.lacking import Lacking, lacking_in
from surgery.adapters.on_base import ChangesOnBase
from surgery.adapters.types.base import Needs
from surgery.deltas.operators import Delta, Gain, LowRank, Sum
from surgery.errors import AdapterError
from surgery.linalg.low_rank import truncated_svd
from surgery.models.base_model import BaseModel
from surgery.models.quantized import unquantized_name
from surgery.models.sites import LINEAR, PARAMETER, PLAIN, Form, Site
from surgery.storage.resume import Parts

__all__ = ["Change", "Source", "refuse_lone_experts", "refuse_other_kinds"]

# One expert of several, by its name.
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Change:
    """The weight change of one layer, `dW = B A`.

    Attributes:
        module: the layer's name in the adapter.
        B: `(out, k)`, float32, with any scale in it.
        A: `(k, in)`, float32.
        site: the layer in the base, where there is one.
        lost: Frobenius norm of what these factors lack of the change, over the change's; 0 where they are exact.
        form: how the layer's weight is stored.
        gain: gains on the base weight that come besides, without the weight; None for none, and where they are not
            asked for apart.
    """

    module: str
    B: torch.Tensor
    A: torch.Tensor
    site: Site | None = None
    lost: float = 0.0
    form: Form = PLAIN
    gain: Gain | None = None

    @classmethod
    def none(cls, module: str, site: Site) -> Change:
        """No change: what stands for a layer where only its name and shape count."""
        return cls(module, torch.empty(site.out_features, 0), torch.empty(0, site.in_features), site)

    @property
    def delta(self) -> Delta:
        """The change as an operator, its gains without the weight that they are on."""
        low_rank = LowRank(self.B, self.A)
        return low_rank if self.gain is None else Sum([(1.0, self.gain), (1.0, low_rank)])

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    @property
    def rank(self) -> int:
        """`k`."""
        return int(self.A.shape[0])


@dataclass
class Source:
    """A trained adapter that is to be converted.

    Attributes:
        adapter: it.
        contents: what is in its file.
        base: its base model, where one was given.
        device: where to compute.
        sites: with a base, its layers -> the adapter's names for them.
        shapes: of layers, where they are known from elsewhere: some types' files do not say how wide a layer is.
        lacking: what its file lacks of what its configuration names.
    """

    adapter: Adapter
    contents: Contents
    base: BaseModel | None
    device: torch.device
    sites: dict[Site, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    lacking: Lacking = field(default_factory=lambda: Lacking([], []))

    @classmethod
    def open(
        cls,
        adapter: Adapter,
        base: BaseModel | None,
        device: torch.device,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        contents: Contents | None = None,
    ) -> Source:
        """Check that an adapter can be read exactly and, where there is a base, that it fits.

        Args:
            adapter: the adapter.
            base: its base model, where there is one.
            device: where to compute.
            shapes: `(out, in)` by layer; with them a type that needs no more of the base needs none.
            contents: the adapter's contents, where they have been sorted already.

        Raises:
            AdapterError: it cannot, or its type needs a base.
            WrongBaseError: it was made from other base weights.
        """
        lacking = lacking_in(adapter, base.names if base is not None else None)
        if base is not None:
            adapter = with_names_of(adapter, base)
        if contents is None or contents.adapter is not adapter:
            contents = contents_of(adapter)
        enough = Needs.NOTHING if shapes is None else Needs.SHAPE
        if base is None and (contents.needs > enough or (contents.needs and contents.lacks_shared)):
            raise AdapterError(
                f"{adapter.label}: the weight change of a {adapter.peft_type} adapter depends on its base model: "
                f"give it with --base{base_named_by(adapter)}"
            )
        sites = sites_on_base(adapter, base, contents.modules) if base is not None else {}
        return cls(adapter, contents, base, device, sites, shapes or {}, lacking)

    def with_same_layers(self, adapter: Adapter) -> Source:
        """Another adapter of this one's layers, such as what it was converted to."""
        shapes = {module: delta.shape for module, _, delta in self.deltas()} if self.base is None else None
        return Source.open(adapter, self.base, self.device, shapes)

    def beside(self, other: Source) -> Iterator[tuple[str, Delta, Delta | None]]:
        """The weight changes of two adapters, layer by layer of this one; None where the other has none.

        One pair is held at a time: a change of full rank holds its base weight.
        """
        kept = set(other.contents.modules)
        theirs = other.deltas([module for module in self.contents.modules if module in kept])
        for module, _, delta in self.deltas():
            yield module, delta, next(theirs)[2] if module in kept else None

    @property
    def carried(self) -> dict[str, torch.Tensor]:
        """What the adapter saves whole, by its name in the file."""
        return self.contents.carried_tensors

    def deltas(
        self, order: Sequence[str] | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Site | None, Delta]]:
        """The weight changes one after the other, in the model's order; without a base in this one, or the file's.

        Layers that are left out are not read.
        """
        if self.base is None:
            for module in self.contents.modules if order is None else order:
                if module in without:
                    continue
                shape = self.shapes.get(module) if self.contents.needs is Needs.SHAPE else None
                # All that is asked of the weight is its shape: one number, seen as many.
                weight = torch.zeros(1, 1).expand(*shape) if shape is not None else None
                yield module, None, self.adapter.delta(module, weight)
            return
        on_base = ChangesOnBase(self.contents, self.base, self.sites, self.device)
        for site, module in self.sites.items():
            if module in without:
                continue
            yield module, site, on_base.delta(site, self.base.weight(site, self.device))

    def changes(
        self,
        rank: int | None = None,
        energy: float | None = None,
        seed: int = 0,
        parts: Parts | None = None,
        gains: bool = False,
    ) -> Iterator[Change]:
        """The weight changes as factors.

        Exact where the type has thin factors; otherwise the truncated singular value decomposition at this rank, or
        at the lowest rank that keeps this share of the energy.

        Args:
            rank: where to cut.
            energy: where to cut, if there is no rank.
            seed: of the decompositions.
            parts: takes the decompositions, and has those of a run that was killed.
            gains: give gains on the base weight apart, where the rest of a change has thin factors.

        Raises:
            AdapterError: a layer has no thin factors, and neither rank nor energy says where to cut.
        """
        parts = parts if parts is not None else Parts()
        sites = {module: site for site, module in self.sites.items()}
        finished = {module for module in sites or self.contents.modules if _unit(module) in parts}
        others = self.deltas(without=finished)
        for module in sites or self.contents.modules:
            if module not in finished:
                _, site, delta = next(others)
                gain, thin = _thin(delta, gains)
                if thin is not None:
                    B, A = (factor.detach().float().cpu() for factor in thin)
                    yield Change(module, B, A, site, form=self.form(module), gain=gain)
                    continue
                if rank is None and energy is None:
                    raise AdapterError(
                        f"{module}: the change of a {self.adapter.peft_type} adapter has full rank; say with --rank or "
                        "--energy how much of it to keep"
                    )
                change = _truncated(module, site, delta.dense().float(), rank, energy, seed)
                cut = {"B": change.B.contiguous(), "A": change.A.contiguous()}
                parts.add(_unit(module), cut, {"lost": change.lost})
            found = parts.tensors(_unit(module))
            lost = parts.facts(_unit(module))["lost"]
            yield Change(module, found["B"], found["A"], sites.get(module), lost, self.form(module))

    def exact_change(self, module: str) -> Change | None:
        """The change of one layer, for types that need nothing of the base; None where it has no thin factors."""
        factors = self.adapter.delta(module).factors()
        if factors is None:
            return None
        B, A = (factor.detach().float().cpu() for factor in factors)
        return Change(module, B, A, self._site_of.get(module), form=self.form(module))

    def biases(self) -> dict[str, torch.Tensor]:
        """What the adapter adds to the outputs of its layers whatever the input, `(out,)`, where that is not zero."""
        found = {}
        for module in self.contents.modules:
            site = self._site_of.get(module)
            own = f"{site.module}.bias" if site is not None else None
            known = self.base is not None and own in self.base.sources
            bias = self.base.parameter(own) if known and self.base is not None and own is not None else None
            added = self.contents.output_bias(module, bias)
            if added is not None and bool(added.any()):
                found[module] = added
        return found

    def form(self, module: str) -> Form:
        """How the weight of a layer is stored: as the base says, otherwise as the adapter's own files do."""
        own = self.adapter.form(module)
        site = self._site_of.get(module) if own.kind == LINEAR else None
        return own if site is None else site.form

    @cached_property
    def _site_of(self) -> dict[str, Site]:
        return {module: site for site, module in self.sites.items()}


def base_named_by(adapter: Adapter) -> str:
    """Return the base that an adapter names, ready for the end of a message; unquantised where it names a copy."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return ""
    original = unquantized_name(name)
    return f" {original} (it names {name}, a quantised copy)" if original is not None else ""


def refuse_lone_experts(source: Source, to: str) -> None:
    """Refuse single experts where no base says whether the model has them one by one.

    Raises:
        AdapterError: a layer is one expert, and there is no base model.
    """
    expert = next((module for module in source.contents.modules if EXPERT.search(module)), None)
    if source.base is None and expert is not None:
        raise AdapterError(
            f"{source.adapter.label}: changes {expert}, one expert by itself, which transformers 5 joins with the "
            f"others in most models, where PEFT would leave it out of a {to} adapter: give the model with --base"
        )


def refuse_other_kinds(source: Source, to: str) -> None:
    """Refuse layers that are no linears, in a form that holds linears only.

    Raises:
        AdapterError: a layer is an embedding, a convolution or an expert of a fused parameter, or tokens are trained.
    """
    if source.contents.tokens:
        raise AdapterError(
            f"{source.adapter.label}: trains single tokens (trainable_token_indices), which {to} does not hold; use "
            "--to giva or --to lora"
        )
    for module in source.contents.modules:
        form = source.form(module)
        if form.kind not in {LINEAR, PARAMETER}:
            raise AdapterError(
                f"{source.adapter.label}: changes {module}, which is of the kind {form}, and {to} holds linear layers "
                "only; use --to giva or --to lora"
            )


def _thin(delta: Delta, gains: bool) -> tuple[Gain | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the gain in a change, without its weight, and the thin factors of the rest; None where there are none."""
    gain, rest = delta.gain_apart() if gains else (None, delta)
    if gain is None or gain.vector is None:
        return None, delta.factors()
    height, width = delta.shape
    factors = rest.factors() if rest is not None else (torch.zeros(height, 0), torch.zeros(0, width))
    kind, values = gain.vector
    return Gain.of_kind(kind, values.detach().float().cpu(), None, delta.shape), factors


def _unit(module: str) -> str:
    """What the finished decomposition of a layer is called."""
    return f"change {module}"


def _truncated(
    module: str, site: Site | None, dense: torch.Tensor, rank: int | None, energy: float | None, seed: int
) -> Change:
    svd = truncated_svd(dense, rank if rank is not None else _first_guess(dense), seed)
    while energy is not None and rank is None:
        kept = svd.S.double().square().cumsum(0)
        enough = (kept >= energy * svd.energy * (1 - 1e-7)).nonzero()
        if len(enough) or svd.S.shape[0] == min(dense.shape):
            cut = int(enough[0]) + 1 if len(enough) else svd.S.shape[0]
            svd = type(svd)(svd.U[:, :cut], svd.S[:cut], svd.Vh[:cut], svd.energy)
            break
        svd = truncated_svd(dense, min(2 * svd.S.shape[0], *dense.shape), seed)
    B, A = svd.balanced()
    return Change(module, B.cpu(), A.cpu(), site, svd.relative_error)


def _first_guess(dense: torch.Tensor) -> int:
    return max(1, min(dense.shape) // 8)
