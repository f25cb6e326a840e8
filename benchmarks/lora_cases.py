"""Trained LoRAs to convert, and what a conversion of them is judged by.

A case is made at run time from what is installed: a small real model, texts, stock PEFT. The first one is a
classifier: all-MiniLM-L6-v2 learns to tell from the first paragraph of a docstring which Python package it comes
from. Everything made is kept in a folder that the caller names, so that it is made once.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.models import minilm_folder

__all__ = ["Fidelity", "LoraCase", "Moments", "docstring_case"]

PACKAGES = ("numpy", "scipy", "torch", "sklearn", "pandas", "transformers", "matplotlib", "sympy")
TRAIN, TEST = 800, 200  # of each package
LONGEST = 64  # tokens
RANK, STEPS, BATCH = 16, 400, 32
LEARNING_RATE = 5e-4
ENCODER_LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r) with the scale in it, A (r, in)


@dataclass(frozen=True)
class Fidelity:
    """How a model with a converted adapter compares with the same model and the LoRA, on held-out texts.

    Attributes:
        accuracy: share of the texts that are labelled correctly.
        agreement: share of the texts that both label alike.
        kl: mean of KL(LoRA || converted) over the texts, in nats.
    """

    accuracy: float
    agreement: float
    kl: float


class Moments:
    """Second moments of one layer: `C (in, in)` of its inputs, `F (out, out)` of the gradients at its output."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.C = torch.zeros(in_features, in_features, dtype=torch.float64)
        self.F = torch.zeros(out_features, out_features, dtype=torch.float64)


class LoraCase:
    """A trained LoRA with its base model and texts.

    Args:
        folder: what `docstring_case` made: the adapter as PEFT saves it, texts and labels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        self.train: list[tuple[str, int]] = [tuple(pair) for pair in texts["train"]]
        self.test: list[tuple[str, int]] = [tuple(pair) for pair in texts["test"]]

    @property
    def adapter(self) -> Path:
        """The LoRA's folder."""
        return self.folder / "lora"

    @property
    def source_bytes(self) -> int:
        """Size of the LoRA's safetensors file, the head included."""
        return (self.adapter / "adapter_model.safetensors").stat().st_size

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Layer name to the LoRA's factors, in the order of the layers."""
        config = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
        found = load_file(self.adapter / "adapter_model.safetensors")
        start, end = "base_model.model.", ".lora_A.weight"
        names = [name.removeprefix(start).removesuffix(end) for name in found if name.endswith(end)]
        order = [name for name, _ in self.model.named_modules()]
        return {
            name: (found[f"{start}{name}.lora_B.weight"] * scale, found[f"{start}{name}{end}"])
            for name in sorted(names, key=order.index)
        }

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base model with the trained head, without the adapter."""
        model = _classifier()
        head = load_file(self.adapter / "adapter_model.safetensors")
        for name in ("weight", "bias"):
            getattr(model.classifier, name).data.copy_(head[f"base_model.model.classifier.{name}"])
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm_folder())

    @cached_property
    def lora_log_probs(self) -> torch.Tensor:
        """`(texts, labels)`: what the LoRA says on the held-out texts."""
        return self.log_probs(self.factors)

    def log_probs(self, factors: Mapping[str, Factors]) -> torch.Tensor:
        """Log-probabilities `(texts, labels)` on the held-out texts with these weight changes, none where unnamed."""
        with self.changed(factors) as model, torch.no_grad():
            rows = [
                F.log_softmax(model(**inputs).logits.double(), -1)
                for inputs, _ in _batches(self.tokenizer, self.test, 100)
            ]
        return torch.cat(rows)

    def fidelity(self, factors: Mapping[str, Factors]) -> Fidelity:
        """What these weight changes in place of the LoRA's do to the answers."""
        theirs, ours = self.lora_log_probs, self.log_probs(factors)
        labels = torch.tensor([label for _, label in self.test])
        return Fidelity(
            float((ours.argmax(-1) == labels).double().mean()),
            float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
            float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        )

    def changed(self, factors: Mapping[str, Factors]) -> _Changed:
        """A context in which the base model's weights hold these changes."""
        return _Changed(self.model, factors)

    def moments(self, sentences: int = 512, samples: int = 4, seed: int = 0) -> dict[str, Moments]:
        """Second moments of every adapted layer, under the LoRA, from training texts without their labels.

        The gradients are those of the log-likelihood of labels drawn from the model's own predictions, so that
        `tr(R^T F R C)` is the second-order part of the KL divergence that an error `R` of the weights causes, up
        to the Kronecker factorisation.

        Args:
            sentences: how many texts.
            samples: labels drawn for each.
            seed: of the draws.
        """
        texts = random.Random(seed).sample(self.train, sentences)
        found = {name: Moments(B.shape[0], A.shape[1]) for name, (B, A) in self.factors.items()}
        generator = torch.Generator().manual_seed(seed)
        with self.changed(self.factors) as model, _Watched(model, found) as watched:
            for inputs, _ in _batches(self.tokenizer, texts, 32):
                real = inputs["attention_mask"].bool()
                log_probs = F.log_softmax(model(**inputs).logits, -1)
                labels = torch.multinomial(log_probs.detach().exp(), samples, replacement=True, generator=generator)
                for draw in range(samples):
                    loss = -log_probs.gather(1, labels[:, draw : draw + 1]).sum()
                    model.zero_grad()
                    loss.backward(retain_graph=draw + 1 < samples)
                    watched.add(real, samples)
        tokens = watched.tokens
        for moment in found.values():
            moment.C /= tokens
            # Summed over the tokens of a text, averaged over texts and draws: the metric is KL per text.
            moment.F /= sentences * samples
        return found


class _Changed:
    """Adds `B A` to the weights of named layers, and takes it away again."""

    def __init__(self, model: torch.nn.Module, factors: Mapping[str, Factors]) -> None:
        self.model, self.factors = model, factors
        self.before: dict[str, torch.Tensor] = {}

    def __enter__(self) -> torch.nn.Module:
        for name, (B, A) in self.factors.items():
            weight = self.model.get_submodule(name).weight
            self.before[name] = weight.data
            weight.data = weight.data + (B.double() @ A.double()).to(weight.dtype)
        return self.model

    def __exit__(self, *failure: object) -> None:
        for name, weight in self.before.items():
            self.model.get_submodule(name).weight.data = weight


class _Watched:
    """Hooks that see inputs and output gradients of layers."""

    def __init__(self, model: torch.nn.Module, moments: Mapping[str, Moments]) -> None:
        self.moments = moments
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.last_inputs: dict[str, torch.Tensor] = {}
        self.handles = [
            model.get_submodule(name).register_forward_hook(self._hook(name), always_call=False) for name in moments
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient.detach()))

        return forward

    def add(self, real: torch.Tensor, samples: int) -> None:
        """Add what was seen in the last backward pass, padding left out."""
        first = self.last_inputs.get("") is not real
        for name, moment in self.moments.items():
            gradients = self.gradients[name][real].double()
            moment.F += gradients.T @ gradients
            if first:
                inputs = self.inputs[name][real].double()
                moment.C += inputs.T @ inputs
        if first:
            self.tokens += int(real.sum())
            self.last_inputs[""] = real

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self.handles:
            handle.remove()


def docstring_case(folder: Path, seed: int = 0, progress: Callable[[str], None] = print) -> LoraCase:
    """The docstring case: trained where the folder does not hold it yet.

    Args:
        folder: where cases are kept.
        seed: of the training.
        progress: is told what is done.
    """
    place = folder / f"docstrings-{seed}"
    if not (place / "lora" / "adapter_model.safetensors").exists():
        place.mkdir(parents=True, exist_ok=True)
        train, test = _docstring_texts()
        (place / "texts.json").write_text(json.dumps({"train": train, "test": test}), encoding="utf-8")
        _train(place, train, seed, progress)
    return LoraCase(place)


def _docstring_texts() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    train, test = [], []
    for label, package in enumerate(PACKAGES):
        found = sorted(set(_first_paragraphs(package)))
        random.Random(label).shuffle(found)
        here = len(found) * TRAIN // (TRAIN + TEST)
        kept = min(here, TRAIN)
        train += [(text, label) for text in found[:kept]]
        test += [(text, label) for text in found[kept : kept + min(len(found) - kept, TEST)]]
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(test)
    return train, test


def _first_paragraphs(package: str) -> Iterator[str]:
    """First paragraphs of the docstrings in a package's sources, those left out that name the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraph = re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0]
                text = " ".join(paragraph.split())
                if 5 <= len(text.split()) <= 60 and package not in text.lower():
                    yield text


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_labels=len(PACKAGES), attn_implementation="eager", dtype=torch.float32
    )


def _batches(
    tokenizer: Any, texts: Sequence[tuple[str, int]], size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        inputs = tokenizer(
            [text for text, _ in part], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        yield dict(inputs), torch.tensor([label for _, label in part])


def _train(place: Path, train: Sequence[tuple[str, int]], seed: int, progress: Callable[[str], None]) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoTokenizer, get_linear_schedule_with_warmup

    model = _classifier()
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=ENCODER_LINEARS,
        modules_to_save=["classifier"],
    )
    peft_model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    order = random.Random(seed)
    step = 0
    while step < STEPS:
        shuffled = order.sample(list(train), len(train))
        for inputs, labels in _batches(tokenizer, shuffled, BATCH):
            loss = F.cross_entropy(peft_model(**inputs).logits, labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                progress(f"docstrings, seed {seed}: step {step}, loss {float(loss):.3f}")
            if step == STEPS:
                break
    peft_model.save_pretrained(place / "lora")
