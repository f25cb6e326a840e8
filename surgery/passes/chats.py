"""Conversations as a model reads them: written with the tokenizer's chat template, learnt in the assistant's turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import DataError, first_line

__all__ = ["Chat", "ChatWriter", "read_template"]

Message = dict[str, Any]
LONGEST_REASON = 160


@dataclass(frozen=True)
class Chat:
    """A conversation in tokens.

    Attributes:
        ids: its tokens.
        learnt: for each token, whether the assistant says it.
    """

    ids: list[int]
    learnt: list[bool]


def read_template(path: str | Path) -> str:
    """Read a chat template.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the chat template cannot be read ({first_line(error, LONGEST_REASON)})") from None
    if not text.strip():
        raise DataError(f"{path}: the chat template is empty")
    return text


class ChatWriter:
    """Writes conversations with a tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.
        folder: where it lies, for messages.
        template: a template that takes the place of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, folder: Path, template: str | None = None) -> None:
        self.tokenizer, self.folder = tokenizer, folder
        if template is not None:
            tokenizer.chat_template = template
        self.written = self.ended = self.hidden = 0

    def text(self, messages: Any, where: str, tools: Any = None) -> str:
        """Return a whole conversation as text."""
        return self._rendered(_checked(messages, where), where, tools)

    def chat(self, messages: Any, where: str, first: int = 0, tools: Any = None) -> Chat:
        """Return a conversation's tokens, and which of them are learnt.

        A turn of the assistant begins where the prompt for it ends, and ends where the next turn begins, so that the
        token that ends the turn is learnt with it. Where the template ends the last turn with no special token, the
        tokenizer's end token is appended.

        Args:
            messages: dictionaries of `role` and `content`.
            where: the file and the row, for messages.
            first: turns before this one are only read.
            tools: what the template may list as tools.

        Raises:
            DataError: they are no messages, or the template cannot write them.
        """
        messages = _checked(messages, where)
        whole = self._rendered(messages, where, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            span = self._span(messages, number, whole, where, tools)
            if span is None:
                self.hidden += 1
            else:
                spans.append(span)
        self.written += 1
        chat = self._tokens(whole, spans)
        return self._ended(chat, spans[-1][1] == len(whole) if spans else False)

    def notes(self) -> list[str]:
        """Return what the user should know of the conversations that were written."""
        if not self.written:
            return []
        end = self.tokenizer.eos_token
        added = f"{end} is appended to {self.ended:,} of them" if self.ended else "nothing is appended"
        notes = [
            f"{self.written:,} conversations are written with the chat template, the loss is on the assistant's turns; "
            f"{added}"
        ]
        if self.hidden:
            notes.append(
                f"{self.hidden:,} of the assistant's turns are written in another way when other turns follow, and are "
                "not learnt"
            )
        return notes

    def _span(
        self, messages: Sequence[Message], number: int, whole: str, where: str, tools: Any
    ) -> tuple[int, int] | None:
        """Return where a turn begins and ends in the text; None where the template does not write turn after turn."""
        end = self._rendered(messages[: number + 1], where, tools)
        if not whole.startswith(end):
            return None
        for prompt in (True, False):
            # Some templates refuse a conversation of nothing: the text then begins with the turn itself.
            start = self._rendered(messages[:number], where, tools, prompt) if number else ""
            if end.startswith(start):
                return len(start), len(end)
        return None

    def _rendered(self, messages: Sequence[Message], where: str, tools: Any, prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.folder}: its tokenizer has no chat template, which conversations need; give one with "
                "--chat-template FILE"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template raises what it likes, and jinja what it knows
            raise DataError(
                f"{where}: the chat template cannot write the conversation ({first_line(error, LONGEST_REASON)})"
            ) from None

    def _tokens(self, whole: str, spans: Sequence[tuple[int, int]]) -> Chat:
        if self.tokenizer.is_fast:
            found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end if end > start else -1 for start, end in found["offset_mapping"]]
            return Chat(list(found["input_ids"]), [any(a < end <= b for a, b in spans) for end in ends])
        ids: list[int] = []
        learnt: list[bool] = []
        edges = [0, *(edge for span in spans for edge in span), len(whole)]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            part = list(self.tokenizer(whole[start:end], add_special_tokens=False)["input_ids"])
            ids += part
            learnt += [number % 2 == 1] * len(part)
        return Chat(ids, learnt)

    def _ended(self, chat: Chat, last_is_learnt: bool) -> Chat:
        """Append the end token where the assistant's last turn ends with no special token."""
        end = self.tokenizer.eos_token_id
        if end is None or not last_is_learnt or not any(chat.learnt):
            return chat
        # What stands after the last word of the turn: a special token, and perhaps a line break.
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        if special & set(chat.ids[-2:]):
            return chat
        self.ended += 1
        return Chat([*chat.ids, end], [*chat.learnt, True])


def _checked(messages: Any, where: str) -> list[Message]:
    """Return messages that have a role and a content.

    Raises:
        DataError: they have not.
    """
    sound = isinstance(messages, (list, tuple)) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages
    )
    if not sound or not messages:
        raise DataError(f"{where}: messages is {str(messages)[:60]!r}, expected a list of {{role, content}}")
    # A file of several kinds of messages has all their keys in each, most of them empty.
    return [{name: value for name, value in each.items() if value is not None} for each in messages]
