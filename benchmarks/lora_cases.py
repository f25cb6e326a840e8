"""Trained LoRAs to convert, and what a conversion of them is judged by.

A case is made at run time from what is installed: a small real model, texts, stock PEFT. The first is a classifier:
all-MiniLM-L6-v2 learns to tell from the first paragraph of a docstring which Python package it comes from. The second
is a language model trained here on Python sources, which learns the prose of docstrings. Everything made is kept in a
folder that the caller names, so that it is made once.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.models import minilm_folder

__all__ = [
    "HELD_OUT_WINDOWS",
    "Factors",
    "Fidelity",
    "LoraCase",
    "code_case",
    "docstring_case",
    "docstring_texts",
    "prose_windows",
]

PACKAGES = ("numpy", "scipy", "torch", "sklearn", "pandas", "transformers", "matplotlib", "sympy")
TRAIN, TEST = 800, 200  # of each package
LONGEST = 64  # tokens
RANK, STEPS, BATCH = 16, 400, 32
LEARNING_RATE = 5e-4
ENCODER_LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"

CODE_PACKAGES = ("numpy", "scipy", "sklearn", "pandas")
VOCABULARY, WINDOW = 2048, 128
CODE_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CODE_STEPS, PROSE_STEPS, CODE_BATCH = 400, 250, 16
CODE_RATE, PROSE_RATE = 2e-3, 2e-3
CODE_CHARACTERS = 6_000_000
HELD_OUT_WINDOWS = 96

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r) with the scale in it, A (r, in)


@dataclass(frozen=True)
class Fidelity:
    """How a model with a converted adapter compares with the same model and the LoRA, on held-out texts.

    Attributes:
        score: of the task: accuracy of a classifier, perplexity of a language model.
        agreement: share of the predictions whose most likely answer is the LoRA's.
        kl: mean of KL(LoRA || converted) over the predictions, in nats.
    """

    score: float
    agreement: float
    kl: float


class LoraCase(ABC):
    """A trained LoRA with its base model and texts.

    Args:
        folder: where the adapter lies as PEFT saved it, `lora`, and `calibration.jsonl`.

    Attributes:
        score: what `Fidelity.score` is.
    """

    score: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def base(self) -> Path:
        """The base model's folder."""

    @cached_property
    @abstractmethod
    def model(self) -> Any:
        """The base model with the trained head, without the adapter."""

    @abstractmethod
    def predictions(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `(predictions, answers)` on the held-out texts, and the right answers."""

    @abstractmethod
    def scored(self, log_probs: torch.Tensor, answers: torch.Tensor) -> float:
        """The task's score."""

    @property
    def adapter(self) -> Path:
        """The LoRA's folder."""
        return self.folder / "lora"

    @property
    def calibration(self) -> Path:
        """Texts to calibrate with, unlabelled."""
        return self.folder / "calibration.jsonl"

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
    def of_lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The LoRA's own predictions."""
        return self._predictions(self.factors)

    def fidelity(self, factors: Mapping[str, Factors]) -> Fidelity:
        """What these weight changes in place of the LoRA's do to the answers; layers without any have none."""
        theirs, answers = self.of_lora
        ours, _ = self._predictions(factors)
        kl = (theirs.double().exp() * (theirs.double() - ours)).sum(-1).mean()
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
        return Fidelity(self.scored(ours, answers), float(agreement), float(kl))

    def _predictions(self, factors: Mapping[str, Factors]) -> tuple[torch.Tensor, torch.Tensor]:
        with _Changed(self.model, factors) as model, torch.no_grad():
            return self.predictions(model)


class DocstringCase(LoraCase):
    """A classifier of texts."""

    score = "accuracy"

    @property
    def base(self) -> Path:
        """all-MiniLM-L6-v2."""
        return Path(minilm_folder())

    @cached_property
    def model(self) -> Any:
        """With the trained head."""
        model = _classifier()
        head = load_file(self.adapter / "adapter_model.safetensors")
        for name in ("weight", "bias"):
            getattr(model.classifier, name).data.copy_(head[f"base_model.model.classifier.{name}"])
        return model.eval()

    def predictions(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One for each text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        test = json.loads((self.folder / "texts.json").read_text(encoding="utf-8"))["test"]
        parts = [
            (F.log_softmax(model(**inputs).logits.double(), -1), labels)
            for inputs, labels in _batches(tokenizer, test, 100)
        ]
        return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])

    def scored(self, log_probs: torch.Tensor, answers: torch.Tensor) -> float:
        """Accuracy."""
        return float((log_probs.argmax(-1) == answers).double().mean())


class CodeCase(LoraCase):
    """A language model."""

    score = "perplexity"

    @property
    def base(self) -> Path:
        """The model of Python sources."""
        return self.folder / "base"

    @cached_property
    def model(self) -> Any:
        """It."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def predictions(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One for each token."""
        windows = torch.tensor(json.loads((self.folder / "held_out.json").read_text(encoding="utf-8")))
        rows = [F.log_softmax(model(part).logits[:, :-1], -1).flatten(0, 1) for part in windows.split(16)]
        return torch.cat(rows), windows[:, 1:].flatten()

    def scored(self, log_probs: torch.Tensor, answers: torch.Tensor) -> float:
        """Perplexity."""
        return math.exp(-float(log_probs.gather(1, answers[:, None]).double().mean()))


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


def docstring_case(folder: Path, seed: int = 0, progress: Callable[[str], None] = print) -> LoraCase:
    """The classifier of docstrings: trained where the folder does not hold it yet.

    Args:
        folder: where cases are kept.
        seed: of the training.
        progress: is told what is done.
    """
    place = folder / f"docstrings-{seed}"
    if not (place / "lora" / "adapter_model.safetensors").exists():
        place.mkdir(parents=True, exist_ok=True)
        train, test = docstring_texts()
        (place / "texts.json").write_text(json.dumps({"train": train, "test": test}), encoding="utf-8")
        _train(place, train, seed, progress)
    if not (place / "calibration.jsonl").exists():
        train = json.loads((place / "texts.json").read_text(encoding="utf-8"))["train"]
        _write_texts(place / "calibration.jsonl", [text for text, _ in train])
    return DocstringCase(place)


def code_case(folder: Path, seed: int = 0, progress: Callable[[str], None] = print) -> LoraCase:
    """A small Llama trained on Python sources, and its LoRA trained on docstrings; made where the folder lacks them."""
    place = folder / f"code-{seed}"
    if not (place / "lora" / "adapter_model.safetensors").exists():
        place.mkdir(parents=True, exist_ok=True)
        _train_code(place, seed, progress)
    return CodeCase(place)


def _write_texts(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def docstring_texts() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """First paragraphs of docstrings with the number of their package, to train on and to test on."""
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
    for path in _sources(package):
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


def _sources(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:
        yield from (path for path in sorted(Path(spec.origin).parent.rglob("*.py")) if "tests" not in path.parts)


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


def _train_code(place: Path, seed: int, progress: Callable[[str], None]) -> None:
    """The base from scratch on sources without their docstrings' prose in view, then a LoRA on that prose."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    paths = [path for package in CODE_PACKAGES for path in _sources(package)]
    random.Random(0).shuffle(paths)
    code = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)[:CODE_CHARACTERS]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(code), eos_token="<end>", pad_token="<end>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=WINDOW, **CODE_SHAPE))
    _fit(model, _windows(tokenizer, code), CODE_STEPS, CODE_RATE, seed, progress, "sources")
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    windows = prose_windows(tokenizer)
    (place / "held_out.json").write_text(json.dumps(windows[:HELD_OUT_WINDOWS].tolist()), encoding="utf-8")
    train = windows[HELD_OUT_WINDOWS:]
    _write_texts(place / "calibration.jsonl", [tokenizer.decode(window) for window in train[:1200]])
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    _fit(adapted, train, PROSE_STEPS, PROSE_RATE, seed, progress, "docstrings")
    adapted.save_pretrained(place / "lora")


def prose_windows(tokenizer: Any) -> torch.Tensor:
    """`(windows, WINDOW)` of token ids of docstrings, shuffled; the first `HELD_OUT_WINDOWS` are not trained on."""
    prose = [text for package in PACKAGES for text in sorted(set(_first_paragraphs(package)))]
    random.Random(1).shuffle(prose)
    return _windows(tokenizer, "<end>".join(prose))


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text[:2_000_000].splitlines(keepends=True), trainer)
    return tokenizer


def _windows(tokenizer: Any, text: str) -> torch.Tensor:
    """`(windows, WINDOW)` of token ids, shuffled."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def _fit(
    model: Any, windows: torch.Tensor, steps: int, rate: float, seed: int, progress: Callable[[str], None], what: str
) -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (CODE_BATCH,), generator=generator)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress(f"{what}, seed {seed}: step {step}, loss {float(loss.detach()):.3f}")
