"""A task's way from a row of a data file to what its model takes."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from surgery.errors import DataError, listing
from surgery.models.base_model import BaseModel
from surgery.passes.chats import ChatWriter
from surgery.passes.data_files import Rows
from surgery.system.stdout import nothing_printed

__all__ = [
    "ENCODERS",
    "IGNORED",
    "Classes",
    "Encoder",
    "Features",
    "Images",
    "encoder_for",
    "is_number",
    "vocabulary_size",
]

IGNORED = -100  # transformers' mark for positions that a loss leaves out
DEFAULT_LENGTH = 512
MASKED_SHARE = 0.15
# A row made ready: the model's arguments but for the batch dimension.
Features = dict[str, torch.Tensor]


def vocabulary_size(base: BaseModel) -> float:
    """Return how many tokens the model has rows for; infinity for a class that does not say where they are."""
    try:
        return float(getattr(base.model.get_input_embeddings(), "num_embeddings", math.inf))
    except NotImplementedError:
        return math.inf


def is_number(name: str) -> bool:
    """Return whether a class's name is a whole number."""
    return name.isascii() and name.isdigit()


def _check_texts(values: Sequence[Any], path: str) -> None:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{path}: expected text, found {type(value).__name__} ({str(value)[:40]!r})")


class Encoder(ABC):
    """A task's way from a row to a model's arguments."""

    task: str
    columns: tuple[tuple[str, ...], ...]  # the sets of columns that will do
    padding: Mapping[str, int] = {}

    def unlabelled(self) -> None:  # noqa: B027 - most tasks have no labels but the texts themselves
        """Do without labels where the file has none."""

    def check(self, found: Sequence[str], path: str) -> None:
        """Check that a file has the columns."""
        if not any(set(wanted) <= set(found) for wanted in self.columns):
            wanted = " or ".join(" + ".join(names) for names in self.columns)
            raise DataError(f"{path}: has the columns {listing(found)}; {self.task} needs {wanted}")

    def use_template(self, template: str) -> None:
        """Take a chat template in place of the tokenizer's.

        Raises:
            DataError: this task reads no conversations.
        """
        raise DataError(f"{self.task} reads no conversations: leave out --chat-template")

    def see_all(self, rows: Rows, path: str) -> None:  # noqa: B027 - most tasks look at the drawn samples alone
        """Look at all rows before any is drawn: a label that the model lacks is an error wherever it stands."""

    @abstractmethod
    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        """One row's features."""

    def count(self, features: Features) -> int:
        """Over how many items the model's loss on this sample is a mean."""
        return 1

    def notes(self, samples: int) -> list[str]:
        """What the user should know after `samples` rows."""
        return []


class _Texts(Encoder):
    """What the tasks on text share: tokenizer and length."""

    def __init__(self, base: BaseModel, max_length: int | None) -> None:
        self.tokenizer = _processor(base, "tokenizer")
        self.length = _length(base, self.tokenizer, max_length)
        self.chosen = max_length is not None
        self.cut = 0
        # The model's own first: some find a text's end, or count positions, by it. A tokenizer may have got one more
        # than the model has rows.
        known = (
            getattr(base.config.get_text_config(), "pad_token_id", None),
            self.tokenizer.pad_token_id,
            self.tokenizer.eos_token_id,
        )
        self.folder = base.folder
        self.chats = ChatWriter(self.tokenizer, base.folder)
        size = vocabulary_size(base)
        pad = next((number for number in known if isinstance(number, int) and 0 <= number < size), 0)
        self.padding = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "token_type_ids": 0}

    def use_template(self, template: str) -> None:
        self.tokenizer.chat_template = template

    def text(self, row: dict[str, Any], index: int, path: str) -> Any:
        """Return a row's text; of a conversation, all of it as the chat template writes it."""
        if row.get("messages") is None:
            return row.get("text")
        return self.chats.text(row["messages"], _row_name(path, index), row.get("tools"))

    def tokens(self, *texts: Any, path: str) -> dict[str, list[int]]:
        """The tokenizer's output for one text or pair of texts, cut to length."""
        _check_texts(texts, path)
        found = self.tokenized(*texts, truncation=False)
        if len(found["input_ids"]) > self.length:
            self.cut += 1
            found = self.tokenized(*texts, truncation=True, max_length=self.length)
        return found

    def tokenized(self, *texts: Any, **options: Any) -> dict[str, list[int]]:
        """What the tokenizer makes of texts.

        Raises:
            DataError: it fails.
        """
        try:
            return dict(self.tokenizer(*texts, **options))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{self.folder}: its tokenizer does not work ({str(error).strip()[:160]})") from None

    def notes(self, samples: int) -> list[str]:
        hint = "" if self.chosen else "; --max-length changes that"
        return [f"{self.cut} of {samples} samples were cut at {self.length} tokens{hint}"] if self.cut else []


class _CausalLM(_Texts):
    task = "causal-lm"
    columns = (("text",), ("prompt", "completion"), ("messages",))

    def __init__(self, base: BaseModel, max_length: int | None) -> None:
        super().__init__(base, max_length)
        self.ended = 0

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        turns, first = _turns(row)
        if turns is not None:
            chat = self.chats.chat(turns, _row_name(path, index), first, row.get("tools"))
            ids, learnt = chat.ids, chat.learnt
        elif row.get("completion") is None and "text" in row:
            ids = self.tokens(row["text"], path=path)["input_ids"]
            learnt = [True] * len(ids)
        else:
            prompt, completion = self._pair(row, path)
            ids, learnt = prompt + completion, [False] * len(prompt) + [True] * len(completion)
        self.cut += len(ids) > self.length
        labels = [number if said else IGNORED for number, said in zip(ids, learnt, strict=True)][: self.length]
        tensor = torch.tensor(ids[: self.length], dtype=torch.int64)
        return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor), "labels": torch.tensor(labels)}

    def _pair(self, row: dict[str, Any], path: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and those of its completion with the end token."""
        _check_texts((row.get("prompt"), row.get("completion")), path)
        prompt = self.tokenized(row["prompt"])["input_ids"]
        end = self.tokenizer.eos_token_id
        if prompt and prompt[-1] == end and len(prompt) > 1:
            prompt = prompt[:-1]  # some tokenizers end every text
        completion = self.tokenized(row["completion"], add_special_tokens=False)["input_ids"]
        if end is not None:
            self.ended += 1
        return list(prompt), list(completion) + ([end] if end is not None else [])

    def notes(self, samples: int) -> list[str]:
        notes = [*super().notes(samples), *self.chats.notes()]
        if self.ended:
            notes.append(f"{self.tokenizer.eos_token} is appended to {self.ended:,} completions, and is learnt")
        return notes

    def count(self, features: Features) -> int:
        # The model predicts every token but the first.
        return int((features["labels"][1:] != IGNORED).sum())


def _row_name(path: str, index: int) -> str:
    return f"{path}: sample {index + 1}"


def _turns(row: dict[str, Any]) -> tuple[Any, int]:
    """Return a row's conversation, and the first turn that may be learnt; None for a row that is none."""
    if row.get("messages") is not None:
        return row["messages"], 0
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, (list, tuple)) and not isinstance(completion, (list, tuple)):
        return None, 0
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion or ())
    return [*asked, *said], len(asked)


class _MaskedLM(_Texts):
    task = "masked-lm"
    columns = (("text",),)

    def __init__(self, base: BaseModel, max_length: int | None, seed: int) -> None:
        super().__init__(base, max_length)
        self.seed = seed
        if self.tokenizer.mask_token is None:
            raise DataError(f"{base.folder}: its tokenizer has no mask token, which masked-lm needs")

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        from transformers import DataCollatorForLanguageModeling

        # A generator for each sample: the masks do not depend on how samples are shared out.
        seed = zlib.crc32(f"{self.seed}:{index}".encode())
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=MASKED_SHARE, seed=seed)
        masked = collator([self.tokens(row["text"], path=path)])
        return {name: tensor[0] for name, tensor in masked.items()}

    def count(self, features: Features) -> int:
        return int((features["labels"] != IGNORED).sum())


class _Seq2SeqLM(_Texts):
    task = "seq2seq-lm"
    columns = (("prompt", "completion"),)

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        given = self.tokens(row["prompt"], path=path)
        _check_texts((row["completion"],), path)
        target = self.tokenized(text_target=row["completion"], truncation=True, max_length=self.length)
        names = ("input_ids", "attention_mask")
        return {name: torch.tensor(given[name]) for name in names} | {"labels": torch.tensor(target["input_ids"])}

    def count(self, features: Features) -> int:
        return int((features["labels"] != IGNORED).sum())


class Classes(Encoder):
    """Labels as numbers, as names of the model's classes, or as numbers to be met where the model has one output."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.number = int(base.config.num_labels)
        try:
            self.ids: Mapping[str, int] = {str(k): int(v) for k, v in (base.config.label2id or {}).items()}
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            raise DataError(f"{base.folder / 'config.json'}: label2id is no table of names and numbers") from None
        # What the numbers in a file stand for, where it says: the names of image folders, for one.
        self.names: list[str] | None = None
        self.optional = False
        self.unused: str | None = None  # why the file's labels are left out

    def unlabelled(self) -> None:
        self.optional = True
        self.columns = tuple(tuple(name for name in names if name != "label") for names in self.columns)

    @staticmethod
    def check_label(found: Sequence[str], path: str) -> None:
        if "label" not in found:
            raise DataError(f"{path}: has the columns {listing(found)}; classification needs label")

    def see_all(self, rows: Rows, path: str) -> None:
        if "label" not in rows.columns:
            return
        self.names = rows.label_names
        if self.number > 1 or self.optional:
            try:
                for label in rows.labels():
                    self.label(label, path)
            except DataError as error:
                if not self.optional:
                    raise
                self.unused = str(error)

    def label(self, value: Any, path: str) -> torch.Tensor:
        value = self._meant(value)
        if self.number == 1 and isinstance(value, (int, float)):
            return torch.tensor(float(value))
        if isinstance(value, str) and value in self.ids:
            return torch.tensor(self.ids[value])
        if isinstance(value, int) and 0 <= value < self.number:
            return torch.tensor(int(value))
        names = sorted(self.ids, key=lambda name: self.ids[name])
        raise DataError(
            f"{path}: label {value!r} is none of the model's {self.number} classes ({listing(names, 4)}), which "
            f"num_labels, id2label and label2id in {self.base.folder / 'config.json'} name; surgery init --labels and "
            "surgery train --new-head make a head for other classes"
        )

    def labels(self, row: dict[str, Any], path: str) -> Features:
        """The label of a row, where the file has any that the model understands."""
        return {"labels": self.label(row["label"], path)} if "label" in row and self.unused is None else {}

    def notes(self, samples: int) -> list[str]:
        notes = super().notes(samples)
        return notes if self.unused is None else [*notes, f"labels are left out: {self.unused}"]

    def _meant(self, value: Any) -> Any:
        """What a number of the file stands for: a name that the model knows, or a number in its own count."""
        if self.names is None or not isinstance(value, int) or not 0 <= value < len(self.names):
            return value
        name = self.names[value]
        if name in self.ids:
            return name
        if is_number(name):
            return int(name)
        unnamed = all(known == f"LABEL_{number}" for known, number in self.ids.items())
        return value if unnamed else name


class _TextClasses(Classes, _Texts):
    task = "seq-cls"
    columns = (("text", "label"), ("messages", "label"))

    def __init__(self, base: BaseModel, max_length: int | None) -> None:
        Classes.__init__(self, base)
        _Texts.__init__(self, base, max_length)
        # A class is one number: it is stacked, not padded.
        self.padding = {name: value for name, value in self.padding.items() if name != "labels"}

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        texts = [self.text(row, index, path), *([row["text_pair"]] if row.get("text_pair") is not None else [])]
        found = self.tokens(*texts, path=path)
        names = [name for name in self.tokenizer.model_input_names if name in found]
        return {name: torch.tensor(found[name]) for name in names} | self.labels(row, path)


class _PlainTexts(_Texts):
    """For a model without a head: what it makes of a text is its output itself."""

    task = "a model without a head"
    columns = (("text",), ("messages",))

    def __init__(self, base: BaseModel, max_length: int | None) -> None:
        if base.config.is_encoder_decoder:
            raise DataError(f"{type(base.model).__name__} answers a prompt: say with --task seq2seq-lm how")
        super().__init__(base, max_length)

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        found = self.tokens(self.text(row, index, path), path=path)
        return {name: torch.tensor(found[name]) for name in self.tokenizer.model_input_names if name in found}


class Images(Classes):
    task = "image-cls"
    columns = (("image", "label"),)

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base)
        self.processor = _processor(base, "image processor")

    def encode(self, row: dict[str, Any], index: int, path: str) -> Features:
        image = row["image"]
        if not hasattr(image, "convert"):
            raise DataError(f"{path}: the column image holds {type(image).__name__}, not images")
        pixels = self.processor([image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels} | self.labels(row, path)


def _images(base: BaseModel, max_length: int | None, seed: int) -> Encoder:
    if max_length is not None:
        raise DataError("images have no length: leave out --max-length")
    return Images(base)


# A task that has a loss on a data file -> what makes its rows ready: (base, tokens of the longest sample, seed).
ENCODERS: dict[str, Callable[[BaseModel, int | None, int], Encoder]] = {
    "causal-lm": lambda base, max_length, seed: _CausalLM(base, max_length),
    "masked-lm": _MaskedLM,
    "seq2seq-lm": lambda base, max_length, seed: _Seq2SeqLM(base, max_length),
    "seq-cls": lambda base, max_length, seed: _TextClasses(base, max_length),
    "image-cls": _images,
}


def encoder_for(base: BaseModel, max_length: int | None, seed: int, labelled: bool) -> Encoder:
    """Return what makes rows ready for a model, by its task.

    Args:
        base: the model.
        max_length: tokens of the longest sample.
        seed: of the masks of masked language modelling.
        labelled: whether a loss is wanted.

    Raises:
        DataError: the task has no loss on a data file, or the model no tokenizer or image processor.
    """
    found = _task_encoder(base, max_length, seed, labelled)
    if not labelled:
        found.unlabelled()
    return found


def _task_encoder(base: BaseModel, max_length: int | None, seed: int, labelled: bool) -> Encoder:
    task = base.task.name if base.task is not None else None
    if task in ENCODERS:
        return ENCODERS[task](base, max_length, seed)
    if not labelled:
        return _PlainTexts(base, max_length)
    named = f"{type(base.model).__name__} ({task or 'no task known here'})"
    raise DataError(f"{named} has no loss for a data file: say with --task which of {', '.join(ENCODERS)} it is for")


def _processor(base: BaseModel, kind: str) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    loader = AutoTokenizer if kind == "tokenizer" else AutoImageProcessor
    try:
        with nothing_printed():
            return loader.from_pretrained(base.folder, local_files_only=True)
    except Exception as error:  # what is missing shows as errors of many kinds
        reason = str(error).strip().split("\n")[0][:160]
        raise DataError(f"{base.folder}: has no usable {kind}, which the data needs ({reason})") from None


def _length(base: BaseModel, tokenizer: Any, wanted: int | None) -> int:
    """Tokens of the longest sample.

    Raises:
        DataError: more are wanted than the model has positions.
    """
    text = base.config.get_text_config()
    positions = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in base.model.named_modules():
        # RoBERTa and its kin begin to count after the number that stands for padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions.append(module.num_embeddings - module.padding_idx - 1)
    limit = min((each for each in positions if isinstance(each, int) and 0 < each < 1 << 24), default=1 << 24)
    if wanted is not None and wanted > limit:
        raise DataError(f"--max-length {wanted}: {base.folder} takes at most {limit} tokens")
    if wanted is not None and wanted < 2:
        raise DataError(f"--max-length must be at least 2, got {wanted}")
    return wanted if wanted is not None else min(DEFAULT_LENGTH, limit)
