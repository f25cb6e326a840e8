"""The base model of the adapters that are converted: opened once, loaded once, its data read once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents
from surgery.adapters.fitting import located, with_place_for
from surgery.adapters.source import Change, Source
from surgery.converters.calibration import Calibration, StoredMoments, carried_in
from surgery.converters.request import Metric
from surgery.deltas.operators import Delta, Sum, WithBias
from surgery.errors import MethodError
from surgery.models.base_model import BaseModel
from surgery.models.labels import with_labels
from surgery.models.loading import lacking_note
from surgery.models.sites import EMBEDDING
from surgery.passes.examples import Examples, read_examples
from surgery.passes.fidelity import Applied, Fidelity, fidelity
from surgery.passes.loaded_model import RunSettings, load_model, prepared
from surgery.storage.locks import exclusive_folder
from surgery.storage.resume import file_identities
from surgery.system.progress import Progress

__all__ = ["Base", "CalibrationData", "Measured"]

# Of data that is too short for samples of both kinds, this share is held out for measuring the result.
HELD_OUT = 0.25
FEW = 8


@dataclass(frozen=True)
class CalibrationData:
    """Where calibration data comes from.

    Attributes:
        data: the file, or None.
        samples: drawn for calibration, and as many more for measuring the result.
        batch_size: samples run at a time.
        max_length: tokens of the longest sample.
        seed: of the drawing and of the answers drawn.
        stats: a file of statistics: read where it exists; what it lacks is added.
        chat_template: a file with the chat template for data of messages; None for the tokenizer's.
    """

    data: str | Path | None
    samples: int = 512
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0
    stats: str | Path | None = None
    chat_template: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Answers:
    """How the result answers the held-out samples, beside the source.

    Attributes:
        kept: `1 - loss(source, result) / loss(source, base)`, the loss being KL, the cosine loss or the squared error;
            None where the adapter does nothing on these samples.
        kl: mean KL divergence, for a model that predicts classes.
        agreement: share of equal top-1 predictions, for a model that predicts classes.
        cosine: mean cosine similarity of the embeddings, for a model without a head.
        squared_error: mean squared difference, for a model whose output is numbers.
        perplexity: of the result, for a language model.
        source_perplexity: of the source, for a language model.
    """

    kept: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    squared_error: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None


@dataclass
class Measured:
    """The metric of one adapter, and what measures its conversions.

    Attributes:
        metric: second moments, or None without data.
        notes: what the user should know.
        source: the adapter.
        model: the base model, loaded; None without data.
        calibration: the samples that the metric comes from.
        held_out: others.
        batch_size: samples run at a time.
    """

    metric: Metric | None = None
    notes: list[str] = field(default_factory=list)
    source: Source | None = None
    model: Any = None
    calibration: Examples | None = None
    held_out: Examples | None = None
    batch_size: int = 32
    _reference: Applied | None = None
    _effect: float | None = None

    @property
    def identity(self) -> Any:
        """What recognises the file of statistics as it is used, or None."""
        return file_identities(self.metric.path) if isinstance(self.metric, StoredMoments) else None

    def input_moments(self, module: str) -> torch.Tensor | None:
        """`C (in, in)` of a layer's inputs, or None without data or where the data says nothing of the layer."""
        if self.metric is None or self.source is None:
            return None
        site = next(site for site, name in self.source.sites.items() if name == module)
        change = Change.none(module, site)
        C = self.metric.full(change).C
        return C if self.metric.reaches(change) else None

    def unreached(self) -> list[str]:
        """The layers that no gradient reaches on the data, as far as their moments have been asked for."""
        if self.metric is None or self.source is None:
            return []
        changes = [Change.none(module, site) for site, module in self.source.sites.items()]
        return [change.module for change in changes if not self.metric.reaches(change)]

    def answers(self, made: Adapter) -> Answers:
        """Return how the converted adapter answers the held-out samples; nothing where there are none."""
        if self.model is None or self.held_out is None or self.source is None:
            return Answers()
        if self._reference is None:
            self._reference = _applied(self.model, self.source)
        other = _applied(self.model, Source.open(made, self.source.base, self.source.device))
        found = fidelity(self.model, self.held_out, self._reference, other, self.batch_size)
        if self._effect is None:
            # The base with the source's head: what the factors alone do.
            bare = Applied({}, self._reference.carried)
            self._effect = _loss(fidelity(self.model, self.held_out, self._reference, bare, self.batch_size))
        scores = found.scores if found.scores is not None and found.scores.name == "perplexity" else None
        return Answers(
            kept=1 - _loss(found) / self._effect if self._effect > 0 else None,
            kl=found.kl,
            agreement=found.agreement,
            cosine=found.cosine,
            squared_error=found.squared_error,
            perplexity=scores.other if scores is not None else None,
            source_perplexity=scores.reference if scores is not None else None,
        )

    def recovered(
        self, made: Adapter, steps: int, seed: int, device: torch.device, progress: Progress | None
    ) -> Adapter:
        """The converted adapter after so many steps of learning the source's answers on the calibration samples."""
        from surgery.training.recovery import distil
        from surgery.training.settings import TrainSettings

        assert self.source is not None and self.source.base is not None and self.calibration is not None
        settings = TrainSettings(max_steps=steps, batch_size=self.batch_size, seed=seed)
        found = distil(made, self.source.adapter, self.source.base, self.calibration, settings, device, progress)
        return Adapter(found.adapter.config, found.adapter.tensors, made.provenance)


def _loss(found: Fidelity) -> float:
    """What a fidelity differs by: KL, the squared error, or the cosine loss."""
    if found.kl is not None:
        return found.kl
    if found.squared_error is not None:
        return found.squared_error
    return 1 - found.cosine if found.cosine is not None else 0.0


def _applied(model: Any, source: Source) -> Applied:
    deltas: dict[str, Delta] = {}
    biases = source.biases()
    for module, site, delta in source.deltas():
        if site is not None:
            change = _without_weight(delta)
            deltas[site.module] = WithBias(change, biases[module]) if module in biases else change
    return Applied(deltas, carried_in(model, source))


def _without_weight(delta: Delta) -> Delta:
    """A change whose gains are on whatever weight the model has, so that no copy of that is held."""
    gain, rest = delta.gain_apart()
    if gain is None:
        return delta
    bare = gain.on(None)
    return bare if rest is None else Sum([(1.0, bare), (1.0, rest)])


class Base:
    """A base model, if there is one.

    Attributes:
        name: what the user called it, or None.
    """

    def __init__(
        self,
        opened: BaseModel | None,
        settings: CalibrationData,
        device: torch.device,
        trust_remote_code: bool,
        fixed_class: bool,
        progress: Progress | None,
    ) -> None:
        self.opened, self.settings, self.device = opened, settings, device
        self.trust_remote_code, self.fixed_class, self.progress = trust_remote_code, fixed_class, progress
        self.name = opened.name if opened is not None else None
        self._stack = contextlib.ExitStack()
        self._loaded: tuple[BaseModel, Any, Examples, Examples, list[str]] | None = None

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        base: str | Path | None,
        settings: CalibrationData,
        task: str | None,
        device: torch.device,
        trust_remote_code: bool,
        progress: Progress | None,
    ) -> Iterator[Base]:
        """Open the base model; weights are loaded only where data asks for them.

        Raises:
            CheckpointError: it cannot be used.
        """
        opened = BaseModel.open(base, task, trust_remote_code) if base is not None else None
        shared = cls(opened, settings, device, trust_remote_code, task is not None, progress)
        with shared._stack:
            yield shared

    @property
    def label(self) -> str | None:
        """The base's name without a path of this machine."""
        if self.opened is None:
            return None
        return self.opened.folder.resolve().name if Path(self.opened.name).is_dir() else self.opened.name

    @property
    def data_name(self) -> str | None:
        """The data file's own name."""
        return Path(self.settings.data).name if self.settings.data is not None else None

    @property
    def identity(self) -> dict[str, Any]:
        """What recognises the base, its class and the data: all of it that decides what a conversion comes to."""
        settings, data = self.settings, Path(self.settings.data) if self.settings.data is not None else None
        files = sorted(data.rglob("*")) if data is not None and data.is_dir() else [data]
        return {
            "base": file_identities(self.opened.folder) if self.opened is not None else None,
            "class": type(self.opened.model).__name__ if self.opened is not None and self.fixed_class else None,
            "data": file_identities(*files),
            "stats": Path(settings.stats).name if settings.stats is not None else None,
            "template": file_identities(Path(settings.chat_template)) if settings.chat_template is not None else None,
            "settings": [settings.samples, settings.batch_size, settings.max_length, settings.seed],
        }

    def model_for(self, contents: Contents) -> BaseModel:
        """Return the base under the class, and with the number of labels, that an adapter is for."""
        assert self.opened is not None
        adapter, base = contents.adapter, self.opened
        if not self.fixed_class:
            base = with_place_for(base, adapter, contents, self.trust_remote_code)
        config = with_labels(base, _brought(adapter, contents, base))
        if config is not None:
            base = base.with_config(type(base.config).from_dict(copy.deepcopy(config)))
        return base

    def measured(self, source: Source, gains: bool = False) -> Measured:
        """The metric for one adapter, and what measures its conversion; `gains`: its changes are asked for so."""
        settings = self.settings
        table = next((module for module in source.contents.modules if source.form(module).kind == EMBEDDING), None)
        if table is not None and (settings.data is not None or settings.stats is not None):
            raise MethodError(
                f"{source.adapter.label}: changes the embedding {table}, whose errors are not measured on data: leave "
                "out --data and --stats"
            )
        stored = Path(settings.stats) if settings.stats is not None else None
        if source.base is None or (settings.data is None and stored is None):
            return Measured()
        if settings.data is None:
            assert stored is not None
            if not stored.exists():
                raise MethodError(f"{stored}: no such statistics; give data, and they are gathered and written there")
            return Measured(StoredMoments(stored, source), source=source)
        model, calibration, held_out, notes = self._data_for(source)
        own = Calibration(model, source, calibration, settings.batch_size, settings.seed, self.progress, gains)
        metric: Metric = own
        if stored is not None:
            metric, gathered = _grown(stored, source, own)
            notes = list(notes) if gathered else []
            if not gathered:
                notes = [f"the statistics are those of {stored}; {len(held_out.features)} samples measure the result"]
        return Measured(metric, list(notes), source, model, calibration, held_out, settings.batch_size)

    def _data_for(self, source: Source) -> tuple[Any, Examples, Examples, list[str]]:
        """The loaded model and its samples; kept for the next adapter of the same class and labels."""
        base = source.base
        assert base is not None
        if self._loaded is None or not _same_model(self._loaded[0], base):
            settings = self.settings
            assert settings.data is not None
            examples = read_examples(
                settings.data,
                base,
                2 * settings.samples,
                settings.max_length,
                settings.seed,
                labelled=False,
                chat_template=settings.chat_template,
            )
            calibration, held_out, notes = _divided(examples, settings.samples)
            notes = [*notes, *lacking_note(base, _brought(source.adapter, source.contents, base))]
            heads = _of_other_shapes(base, _brought(source.adapter, source.contents, base))
            model = load_model(base, RunSettings(seed=settings.seed, device=self.device), heads)
            self._stack.enter_context(prepared(model, False, examples))
            self._loaded = (base, model, calibration, held_out, notes)
        return self._loaded[1:]


def _grown(path: Path, source: Source, calibration: Calibration) -> tuple[StoredMoments, bool]:
    """Return the statistics in a file, with those of the adapter's layers that it lacked; and whether any were.

    One process at a time adds to it.
    """
    with exclusive_folder(path.resolve().parent):
        missing = StoredMoments(path, source).missing if path.exists() else list(source.sites)
        if missing:
            StoredMoments.add(path, calibration.moments_of(missing))
    return StoredMoments(path, source), bool(missing)


def _brought(adapter: Adapter, contents: Contents, base: BaseModel) -> dict[str, torch.Tensor]:
    """What an adapter saves whole, by the base's names, as far as the base has a place for it."""
    places = {located(name, base.shapes, base): key for name, key in contents.carried.items()}
    return {place: adapter.tensors[key] for place, key in places.items() if place is not None}


def _of_other_shapes(base: BaseModel, brought: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values in place of those that the checkpoint has in another shape: the base's own head of other labels."""
    found = {}
    for name, tensor in brought.items():
        source = base.sources.get(name)
        if source is not None and source.converter is None and base.files.read(source.keys[0][0]).shape != tensor.shape:
            found[name] = tensor
    return found


def _same_model(one: BaseModel, other: BaseModel) -> bool:
    return type(one.model) is type(other.model) and one.shapes == other.shapes


def _divided(examples: Examples, samples: int) -> tuple[Examples, Examples, list[str]]:
    """Samples for calibration and for measuring the result, none in both unless there are too few."""
    count = len(examples.features)
    notes = [note for note in examples.notes if "were asked for" not in note]
    held = count - samples if count >= (1 + HELD_OUT) * samples else int(count * HELD_OUT)
    if count < FEW:
        notes.append(f"the data has {count} samples only: the result is measured on the ones it was calibrated with")
        return examples, examples, notes
    notes.append(f"{count - held} samples calibrate, {held} others measure the result")
    return _part(examples, 0, count - held), _part(examples, count - held, count), notes


def _part(examples: Examples, start: int, end: int) -> Examples:
    return Examples(examples.features[start:end], examples.counts[start:end], examples.padding)
