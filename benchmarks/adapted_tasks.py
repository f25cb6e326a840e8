"""Small tasks on which every method can be trained in minutes: texts, images, a language model.

Everything is made at run time from what is installed, and kept in a folder that the caller names.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_cases import HELD_OUT_WINDOWS, PACKAGES, code_case, docstring_texts, prose_windows
from benchmarks.models import minilm_folder

__all__ = ["TASKS", "Batch", "Task"]

Batch = dict[str, torch.Tensor]
TEXT_BATCH, IMAGE_BATCH, WINDOW_BATCH = 16, 32, 8
LONGEST = 64  # tokens
GRADIENT_SAMPLES = 32  # GiVA's one batch
IMAGE_SHAPE = {"image_size": 8, "patch_size": 2, "num_channels": 1}
VIT_SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
VIT_STEPS, VIT_RATE = 400, 1e-3
DIGITS = 5  # of ten: the first five are learnt at first, the others are adapted to


class Task(ABC):
    """A base model, what to adapt it to, and how the result is judged.

    Args:
        folder: where models are kept.

    Attributes:
        name: on the command line.
        title: for people.
        score: what `evaluate` returns.
        higher: whether a higher score is the better one.
        kind: as `--task` of the command line.
        head: the module that is the head.
        carried: whether the head is trained and saved beside every adapter.
    """

    name: str
    title: str
    score: str
    higher: bool
    kind: str
    head: str
    carried: bool

    def __init__(self, folder: Path) -> None:
        self.folder = folder / f"task-{self.name}"

    def base(self, seed: int) -> Path:
        """Folder of the base model, its head drawn with a seed where it is new."""
        place = self.folder / f"base-{seed}"
        if not (place / "model.safetensors").exists():
            self.make_base(place, seed)
        return place

    @abstractmethod
    def make_base(self, place: Path, seed: int) -> None:
        """Write the base model's folder."""

    @abstractmethod
    def model(self, seed: int) -> Any:
        """The base model, loaded."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches to train on, without end, in an order of the seed's."""

    @abstractmethod
    def gradient_batch(self, seed: int) -> Batch:
        """The batch of 32 samples that a gradient-informed start is made from."""

    @abstractmethod
    def evaluate(self, model: Any) -> float:
        """The score on samples that are not trained on."""


class Docstrings(Task):
    """all-MiniLM-L6-v2 learns which Python package the first paragraph of a docstring is from."""

    name, title = "docstrings", "all-MiniLM-L6-v2, docstring to package (8 classes)"
    score, higher, kind, head, carried = "accuracy", True, "seq-cls", "classifier", True

    def make_base(self, place: Path, seed: int) -> None:
        """The real weights with a new head."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(PACKAGES))
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(place)

    def model(self, seed: int) -> Any:
        """As a classifier."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.base(seed), dtype=torch.float32)

    @cached_property
    def texts(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """To train on and to test on."""
        return docstring_texts()

    @cached_property
    def tokenizer(self) -> Any:
        """MiniLM's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm_folder())

    def batches(self, seed: int) -> Iterator[Batch]:
        """Texts of like length together, which saves padding."""
        order = random.Random(seed)
        train = self.texts[0]
        pool = 16 * TEXT_BATCH
        while True:
            shuffled = order.sample(train, len(train))
            for start in range(0, len(shuffled) - pool + 1, pool):
                like = sorted(shuffled[start : start + pool], key=lambda pair: len(pair[0]))
                parts = [like[at : at + TEXT_BATCH] for at in range(0, pool, TEXT_BATCH)]
                order.shuffle(parts)
                yield from (self._batch(part) for part in parts)

    def gradient_batch(self, seed: int) -> Batch:
        """Of the texts that are trained on."""
        return self._batch(random.Random(seed).sample(self.texts[0], GRADIENT_SAMPLES))

    def evaluate(self, model: Any) -> float:
        """Accuracy."""
        test = sorted(self.texts[1], key=lambda pair: len(pair[0]))
        return _accuracy(model, (self._batch(test[at : at + 50]) for at in range(0, len(test), 50)))

    def _batch(self, pairs: list[tuple[str, int]]) -> Batch:
        texts = [text for text, _ in pairs]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([label for _, label in pairs])}


class Digits(Task):
    """A small ViT that has learnt five of the ten digits learns the other five."""

    name, title = "digits", "a small ViT trained on the digits 0 to 4, adapted to 5 to 9"
    score, higher, kind, head, carried = "accuracy", True, "image-cls", "classifier", True

    @cached_property
    def images(self) -> dict[str, Batch]:
        """The first five digits, and the others to train on and to test on."""
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(found.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        pixels, labels = pixels[order], labels[order]
        first = labels < DIGITS
        others = {"pixel_values": pixels[~first], "labels": labels[~first] - DIGITS}
        held_out = len(others["labels"]) // 3
        return {
            "first": {"pixel_values": pixels[first], "labels": labels[first]},
            "train": {name: tensor[held_out:] for name, tensor in others.items()},
            "test": {name: tensor[:held_out] for name, tensor in others.items()},
        }

    def make_base(self, place: Path, seed: int) -> None:
        """The trained body with a new head."""
        from transformers import ViTForImageClassification

        trained = self.folder / "trained"
        if not (trained / "model.safetensors").exists():
            self._train(trained)
        model = ViTForImageClassification.from_pretrained(trained)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
        torch.nn.init.zeros_(model.classifier.bias)
        model.save_pretrained(place)

    def _train(self, place: Path) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**IMAGE_SHAPE, **VIT_SHAPE, num_labels=DIGITS)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=VIT_RATE)
        for _, batch in zip(range(VIT_STEPS), _drawn(self.images["first"], 0, IMAGE_BATCH), strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(place)

    def model(self, seed: int) -> Any:
        """As a classifier."""
        from transformers import ViTForImageClassification

        return ViTForImageClassification.from_pretrained(self.base(seed))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Images of the other digits."""
        return _drawn(self.images["train"], seed, IMAGE_BATCH)

    def gradient_batch(self, seed: int) -> Batch:
        """Of the images that are trained on."""
        return next(_drawn(self.images["train"], seed, GRADIENT_SAMPLES))

    def evaluate(self, model: Any) -> float:
        """Accuracy."""
        return _accuracy(model, [self.images["test"]])


class Prose(Task):
    """A small Llama trained on Python sources learns the prose of docstrings."""

    name, title = "prose", "a small Llama trained on Python sources, adapted to the prose of docstrings"
    score, higher, kind, head, carried = "perplexity", False, "causal-lm", "lm_head", False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cases = folder

    def base(self, seed: int) -> Path:
        """One for all seeds: it has no new head."""
        return code_case(self.cases).base

    def make_base(self, place: Path, seed: int) -> None:
        """Nothing: `code_case` trains it."""

    def model(self, seed: int) -> Any:
        """As a language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base(seed), dtype=torch.float32)

    @cached_property
    def windows(self) -> torch.Tensor:
        """Token ids, `(windows, tokens)`; the first are held out."""
        from transformers import AutoTokenizer

        return prose_windows(AutoTokenizer.from_pretrained(self.base(0)))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Windows of prose."""
        ids = self.windows[HELD_OUT_WINDOWS:]
        return _drawn({"input_ids": ids, "labels": ids}, seed, WINDOW_BATCH)

    def gradient_batch(self, seed: int) -> Batch:
        """Of the windows that are trained on."""
        ids = self.windows[HELD_OUT_WINDOWS:]
        return next(_drawn({"input_ids": ids, "labels": ids}, seed, GRADIENT_SAMPLES))

    def evaluate(self, model: Any) -> float:
        """Perplexity."""
        with torch.no_grad():
            losses = [
                float(model(input_ids=part, labels=part).loss) for part in self.windows[:HELD_OUT_WINDOWS].split(16)
            ]
        return float(torch.tensor(losses).mean().exp())


TASKS: dict[str, type[Task]] = {task.name: task for task in (Docstrings, Digits, Prose)}


def _drawn(samples: Batch, seed: int, size: int) -> Iterator[Batch]:
    """Batches of shuffled samples, without end."""
    generator = torch.Generator().manual_seed(seed)
    count = len(samples["labels"])
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield {name: tensor[order[start : start + size]] for name, tensor in samples.items()}


def _accuracy(model: Any, batches: Any) -> float:
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
            right += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    return right / total
