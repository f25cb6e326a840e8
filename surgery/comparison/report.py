"""The figures that a comparison of two adapters returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CarriedTensor", "ComparedAdapter", "ComparedSite", "Comparison", "Cost", "Costs", "TaskScores"]


@dataclass
class ComparedAdapter:
    """One of the two adapters.

    Attributes:
        name: what the user called it.
        peft_type: its PEFT type.
        bytes: size of `adapter_model.safetensors`.
        parameters: numbers in it.
        modules: layers that it changes.
        ranks: the ranks of its factors, each once; none where the type has no thin factors.
        base: the base model that it names, or None.
    """

    name: str
    peft_type: str
    bytes: int
    parameters: int
    modules: int
    ranks: list[int]
    base: str | None


@dataclass
class ComparedSite:
    """One layer that either adapter changes.

    Attributes:
        module: its name, the base's where there is one.
        role: the same with the block's index replaced by `*`.
        layer: the block's index, or None outside the blocks.
        rank_a: rank of A's factors; None where A does not change the layer, or has no thin factors there.
        rank_b: the same of B.
        norm_a: Frobenius norm of A's change; 0 where it does not change the layer.
        norm_b: the same of B.
        difference: Frobenius norm of the difference of the changes.
        weight_error: the difference over `norm_a`; None where only B changes the layer.
        output_error: the same for what the changes add to the layer's output on the data; None without data, where
            only B changes the layer, or where no sample reaches it.
    """

    module: str
    role: str
    layer: int | None
    rank_a: int | None
    rank_b: int | None
    norm_a: float
    norm_b: float
    difference: float
    weight_error: float | None
    output_error: float | None = None


@dataclass
class CarriedTensor:
    """A parameter that an adapter brings whole: a head, a bias, an embedding.

    Attributes:
        name: the parameter.
        state: `equal` bit for bit, `differs`, `only in a` or `only in b`.
        difference: norm of the difference over that of A's values; None where only one brings it, the shapes differ,
            or A's are zero and B's not.
        shape_a: A's shape, or None.
        shape_b: B's shape, or None.
    """

    name: str
    state: str
    difference: float | None
    shape_a: list[int] | None
    shape_b: list[int] | None


@dataclass
class TaskScores:
    """How well the labels of the data are met: `accuracy`, `perplexity`, or `squared error` of a number.

    Attributes:
        name: which.
        a: with A.
        b: with B.
        base: with neither, but with A's head where it brings one.
    """

    name: str
    a: float
    b: float
    base: float | None


@dataclass
class Cost:
    """What a form of the model costs as PEFT runs it, after `surgery.load`.

    Attributes:
        one: seconds of a forward pass, for each token (or sample) of a batch of one; median.
        batch: the same for a whole batch.
        bytes: parameters and buffers that the adapter adds to the base in memory; for the base all of its own.
    """

    one: float
    batch: float
    bytes: int


@dataclass
class Costs:
    """Time and memory of the base, and of the base with each adapter.

    Attributes:
        unit: `token` or `sample`: what times are divided by.
        batch_size: samples in the batch.
        base: without an adapter.
        a: with A.
        b: with B.
    """

    unit: str
    batch_size: int
    base: Cost
    a: Cost
    b: Cost


@dataclass
class Comparison:
    """The result of `surgery.compare`, with the keys of its `--json` output. A is the reference.

    Attributes:
        a: what the user called A.
        b: what the user called B.
        base: what the base model was called, or None.
        adapter_a: A.
        adapter_b: B.
        modules: layers that either changes.
        weight_error: root of the summed squared differences over all layers, over the same of A's changes; a layer
            that one of them leaves alone counts in full. None where A changes nothing and B does.
        output_error: the same for what the changes add to the layers' outputs on the data; None without data.
        kl: mean KL divergence of B's predictions from A's, in nats for each item; None without data and for a model
            that predicts no classes.
        agreement: share of items for which A and B find the same class most probable; None likewise.
        squared_error: mean squared difference of the outputs, for a model whose output is numbers.
        cosine: mean cosine similarity of the embeddings, for a model without a head.
        cosine_loss: 1 - cosine, which stays readable where B is close to A.
        items: how many answers were compared; 0 without data.
        unit: what an item is, `token` or `sample`.
        scores: against the labels, where the data has any that the model understands.
        source_bytes: size of A's `adapter_model.safetensors`.
        bytes: size of B's.
        ratio: A's size over B's.
        carried: what either brings whole.
        latency: time and memory after loading, or None where that was not measured.
        model_class: the transformers class, where there is a base.
        device: where it was computed.
        seconds: time that it took.
        out: the picture that was drawn, or None.
        notes: what the user should know.
        sites: one entry for each layer.
        command: the command.
    """

    a: str
    b: str
    base: str | None
    adapter_a: ComparedAdapter
    adapter_b: ComparedAdapter
    modules: int
    weight_error: float | None
    source_bytes: int
    bytes: int
    ratio: float
    output_error: float | None = None
    kl: float | None = None
    agreement: float | None = None
    squared_error: float | None = None
    cosine: float | None = None
    cosine_loss: float | None = None
    items: int = 0
    unit: str | None = None
    scores: TaskScores | None = None
    carried: list[CarriedTensor] = field(default_factory=list)
    latency: Costs | None = None
    model_class: str | None = None
    device: str = "cpu"
    seconds: float = 0.0
    out: str | None = None
    notes: list[str] = field(default_factory=list)
    sites: list[ComparedSite] = field(default_factory=list)
    command: str = "compare"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values, ready for JSON."""
        return asdict(self)
