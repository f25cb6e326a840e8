"""`surgery.compare`: how far one adapter is from another, in weights, outputs, answers, size and time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.adapter import Adapter, bits_equal
from surgery.comparison.pair import Layer, Pair, Side
from surgery.comparison.report import (
    CarriedTensor,
    ComparedAdapter,
    ComparedSite,
    Comparison,
    Costs,
    TaskScores,
)
from surgery.deltas.operators import Delta, WithBias
from surgery.errors import OptionError
from surgery.models.sites import Site
from surgery.models.tasks import TaskName
from surgery.passes.data_settings import DataSettings
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import LoadedDtype, dtype_named
from surgery.system.keywords import keywords
from surgery.system.progress import Progress
from surgery.system.threads import one_torch_thread

if TYPE_CHECKING:
    from surgery.models.base_model import BaseModel
    from surgery.passes.examples import Examples
    from surgery.passes.fidelity import Fidelity
    from surgery.passes.loaded_model import RunSettings

__all__ = ["compare"]

RUN_IN = ("float32", "bfloat16")
# Factors of fewer numbers are decomposed by one thread.
SMALL = 1 << 20
Deltas = dict[str, Delta]


@keywords(data=DataSettings)
def compare(
    a: str | Path | Adapter,
    b: str | Path | Adapter,
    *,
    base: str | Path | None = None,
    data: str | Path | DataSettings | None = None,
    samples: int = 512,
    batch_size: int = 32,
    max_length: int | None = None,
    chat_template: str | Path | None = None,
    task: TaskName | None = None,
    device: Device = "auto",
    dtype: LoadedDtype = "float32",
    seed: int = 0,
    plot: str | Path | None = None,
    latency: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two adapters of one base model. A is the reference.

    Weight errors come from the files alone, through the factors, wherever the adapters' types allow it. With data the
    base is loaded once and carries A and B in turn: what they add to each layer's output, and what they answer.

    Args:
        a: the reference: a folder, a Hub id, or an opened `Adapter`.
        b: the adapter that is compared with it.
        base: their base model, a folder or a Hub id; needed with data, and for the types whose weight change depends
            on it (FRoD, SMoA, HiRA, VeRA, RandLoRA, and bases that are not stored).
        data: a data file for the model's task, or `DataSettings`; labels are not needed, and used where they are there.
        samples: how many samples are drawn from it.
        batch_size: samples run at a time.
        max_length: tokens of the longest sample.
        chat_template: a file with the chat template to use in place of the tokenizer's.
        task: what the model is for, which chooses its class; default the base's own class, or that of the adapters'
            task where only that one has a place for what they bring.
        device: where to compute: auto, cpu, cuda.
        dtype: of the loaded model: float32 or bfloat16.
        seed: of the drawing.
        plot: a picture to draw, layers by roles: `.png`, `.svg` or `.pdf`.
        latency: with data, time forward passes of the base, of A and of B under PEFT, and weigh their memory.
        trust_remote_code: run model code that comes with the base.
        progress: called after each layer, and after each batch.

    Returns:
        The comparison.

    Raises:
        AdapterError: an adapter cannot be read exactly, needs its base, or is for another base than the other.
        CheckpointError: the base cannot be used.
        DataError: the data cannot be used.
        MethodError: options do not go together, or an answer is not finite.
        OutputError: the picture cannot be written.
        WrongBaseError: an adapter was made from other base weights.
    """
    started = time.perf_counter()
    assert not isinstance(data, DataSettings)  # `keywords` has taken them apart
    if data is not None and base is None:
        raise OptionError("data says something about a model's answers: give the base model with --base")
    run_in = dtype_named(dtype, RUN_IN)
    where = resolve_device(device)

    if plot is not None:
        from surgery.display.heat_maps import check_picture

        check_picture(Path(plot))
    opened = [each if isinstance(each, Adapter) else Adapter.open(each) for each in (a, b)]
    pair = Pair.open(opened[0], opened[1], None if base is None else str(base), task, where, trust_remote_code)
    with torch.no_grad():
        if data is None:
            sites = _measured(pair, _from_files(pair.base, where), progress)
            found = _comparison(a, b, pair, sites)
        else:
            from surgery.passes.loaded_model import RunSettings  # brings transformers, which files alone do not need

            settings = RunSettings(
                samples, batch_size, max_length, False, run_in, seed, where, chat_template=chat_template
            )
            found = _on_data(a, b, pair, data, settings, latency, progress)
    found.device = str(where)
    if plot is not None:
        from surgery.comparison.picture import draw_comparison

        draw_comparison(found, Path(plot))
        found.out = str(plot)
    found.seconds = time.perf_counter() - started
    return found


def _on_data(
    a: Any, b: Any, pair: Pair, data: str | Path, settings: RunSettings, latency: bool, progress: Progress | None
) -> Comparison:
    from surgery.passes.fidelity import Applied, fidelity
    from surgery.passes.loaded_model import load_model, prepared

    base = pair.base
    assert base is not None
    notes = pair.check_answers()
    examples = settings.examples(data, base, labelled=False)
    assert examples is not None
    model = load_model(base, settings, pair.lacking())
    kept: tuple[Deltas, Deltas] = ({}, {})
    sites = _measured(pair, lambda site: _live_weight(model, site), progress, kept)
    reference = Applied(kept[0], pair.values(pair.a))
    other = reference if pair.same else Applied(kept[1], pair.values(pair.b))
    found = _comparison(a, b, pair, sites)
    with prepared(model, False, examples):
        result = fidelity(
            model,
            examples,
            reference,
            other,
            settings.batch_size,
            bare=Applied({}, pair.head()),
            layers=True,
            progress=progress,
        )
        _add_answers(found, result)
        del kept, reference, other
        if latency:
            found.latency = _costs(model, pair, examples, settings)
    found.notes += [*notes, *examples.notes]
    return found


def _from_files(base: BaseModel | None, device: torch.device) -> Callable[[Site], torch.Tensor] | None:
    return None if base is None else lambda site: base.weight(site, device)


def _live_weight(model: Any, site: Site) -> torch.Tensor:
    """The weight of a loaded layer, `(out, in)`; no copy where the model is float32."""
    return site.matrix(model.get_parameter(site.parameter).detach()).float()


def _measured(
    pair: Pair,
    weight_of: Callable[[Site], torch.Tensor] | None,
    progress: Progress | None,
    kept: tuple[Deltas, Deltas] | None = None,
) -> list[ComparedSite]:
    """The weight errors, layer by layer; the changes are kept where that is asked for, else dropped one by one."""
    sites = []
    for number, (layer, ours, theirs) in enumerate(pair.deltas(weight_of), 1):
        sites.append(_site(layer, ours, theirs))
        for side, delta, place in zip((pair.a, pair.b), (ours, theirs), kept or (), strict=False):
            if delta is not None:
                place[layer.module] = _with_bias(delta, side.bias(layer))
        if progress is not None:
            progress(number, len(pair.layers), layer.role)
    return sites


def _with_bias(delta: Delta, bias: torch.Tensor | None) -> Delta:
    return delta if bias is None else WithBias(delta, bias)


def _site(layer: Layer, ours: Delta | None, theirs: Delta | None) -> ComparedSite:
    # Decompositions of matrices of a few columns are many times slower where threads have to be woken for each.
    with one_torch_thread() if _is_small(ours) and _is_small(theirs) else contextlib.nullcontext():
        return _compared(layer, ours, theirs)


def _is_small(delta: Delta | None) -> bool:
    factors = delta.factors() if delta is not None else ()
    return factors is not None and all(factor.numel() < SMALL for factor in factors)


def _compared(layer: Layer, ours: Delta | None, theirs: Delta | None) -> ComparedSite:
    norm_a, norm_b = (float(delta.norm()) if delta is not None else 0.0 for delta in (ours, theirs))
    # Where only one changes the layer, the other's norm is 0.
    difference = norm_a + norm_b if ours is None or theirs is None else _distance(ours, theirs)
    return ComparedSite(
        module=layer.module,
        role=layer.role,
        layer=layer.layer,
        rank_a=_rank(ours),
        rank_b=_rank(theirs),
        norm_a=norm_a,
        norm_b=norm_b,
        difference=difference,
        weight_error=_ratio(difference, norm_a),
    )


def _distance(ours: Delta, theirs: Delta) -> float:
    """`|dW_A - dW_B|`; the same factors differ by nothing, not even by rounding."""
    if ours is theirs:
        return 0.0
    first, second = ours.factors(), theirs.factors()
    if first is not None and second is not None and all(map(torch.equal, first, second)):
        return 0.0
    return float(ours.minus(theirs).norm())


def _ratio(difference: float, norm: float) -> float | None:
    """A relative error; None where there is nothing that it could be relative to."""
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else None


def _rank(delta: Delta | None) -> int | None:
    factors = delta.factors() if delta is not None else None
    return int(factors[1].shape[0]) if factors is not None else None


def _comparison(a: Any, b: Any, pair: Pair, sites: list[ComparedSite]) -> Comparison:
    names = [_name(each, letter) for each, letter in ((a, "A"), (b, "B"))]
    sides = [
        _described(name, side, ranks)
        for name, side, ranks in zip(
            names, (pair.a, pair.b), ([s.rank_a for s in sites], [s.rank_b for s in sites]), strict=True
        )
    ]
    found = Comparison(
        a=names[0],
        b=names[1],
        base=pair.base.name if pair.base is not None else None,
        adapter_a=sides[0],
        adapter_b=sides[1],
        modules=len(sites),
        weight_error=_ratio(_root(s.difference for s in sites), _root(s.norm_a for s in sites)),
        source_bytes=sides[0].bytes,
        bytes=sides[1].bytes,
        ratio=sides[0].bytes / sides[1].bytes,
        carried=_carried(pair),
        model_class=type(pair.base.model).__name__ if pair.base is not None else None,
        notes=list(pair.notes),
        sites=sites,
    )
    for letter, norms in (("A", [s.norm_a for s in sites]), ("B", [s.norm_b for s in sites])):
        if not any(norms):
            found.notes.append(f"{letter} changes no weight: it is at its start, where dW = 0")
    return found


def _name(adapter: Any, letter: str) -> str:
    if isinstance(adapter, Adapter):
        return str(adapter.folder) if adapter.folder is not None else letter
    return str(adapter)


def _described(name: str, side: Side, ranks: Iterable[int | None]) -> ComparedAdapter:
    adapter = side.adapter
    return ComparedAdapter(
        name=name,
        peft_type=adapter.peft_type,
        bytes=adapter.file_size,
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        modules=len(side.names),
        ranks=sorted({rank for rank in ranks if rank is not None}),
        base=adapter.config.get("base_model_name_or_path"),
    )


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _carried(pair: Pair) -> list[CarriedTensor]:
    """What either brings whole, compared."""
    ours, theirs = pair.a.carried, pair.b.carried
    entries = []
    for name in dict.fromkeys([*ours, *theirs]):
        first, second = ours.get(name), theirs.get(name)
        shapes = [list(each.shape) if each is not None else None for each in (first, second)]
        if first is None or second is None:
            state, difference = f"only in {'b' if first is None else 'a'}", None
        else:
            state = "equal" if bits_equal(first, second) else "differs"
            difference = _relative(first, second) if first.shape == second.shape else None
        entries.append(CarriedTensor(name, state, difference, shapes[0], shapes[1]))
    return entries


def _relative(first: torch.Tensor, second: torch.Tensor) -> float | None:
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    return _ratio(float(torch.linalg.vector_norm(first - second)), float(torch.linalg.vector_norm(first)))


def _add_answers(found: Comparison, result: Fidelity) -> None:
    found.kl, found.agreement = result.kl, result.agreement
    found.squared_error, found.cosine = result.squared_error, result.cosine
    found.cosine_loss = None if result.cosine is None else 1 - result.cosine
    found.items, found.unit = result.items, result.unit
    if result.scores is not None:
        scores = result.scores
        found.scores = TaskScores(scores.name, scores.reference, scores.other, scores.bare)
    for site in found.sites:
        outputs = result.layers.get(site.module)
        if outputs is None:
            continue
        reached = outputs.energy > 0 or outputs.lost > 0 or site.norm_a == site.norm_b == 0
        site.output_error = outputs.error if reached else None
    layers = result.layers.values()
    lost, energy = math.fsum(each.lost for each in layers), math.fsum(each.energy for each in layers)
    found.output_error = _ratio(math.sqrt(lost), math.sqrt(energy))


def _costs(model: Any, pair: Pair, examples: Examples, settings: RunSettings) -> Costs:
    """Time and memory under PEFT, one form after the other on the same model."""
    from surgery.comparison.cost import loaded_cost

    inputs = [_inputs(model, examples, size) for size in (1, settings.batch_size)]
    base, ours, theirs = (loaded_cost(model, adapter, inputs) for adapter in (None, pair.a.adapter, pair.b.adapter))
    unit = "token" if "attention_mask" in inputs[0][0] else "sample"
    return Costs(unit, min(settings.batch_size, len(examples.features)), base, ours, theirs)


def _inputs(model: Any, examples: Examples, size: int) -> tuple[dict[str, Any], int]:
    """The first batch of this size without labels, and how many tokens, or samples without tokens, it has."""
    from surgery.passes.examples import batches
    from surgery.passes.fidelity import arguments
    from surgery.passes.loaded_model import on_device

    parameter = next(model.parameters())
    batch = next(on_device(parameter.device, parameter.dtype, batches(examples, size)))
    kept = arguments(model, {name: value for name, value in batch.items() if name != "share"})
    mask = kept.get("attention_mask")
    return kept, int(mask.sum()) if mask is not None else min(size, len(examples.features))
