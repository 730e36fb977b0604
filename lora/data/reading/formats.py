"""Data formats: rows of known columns become one `Example` each.

Known formats, in the order in which they are tried:

    messages                             chat: role and content, tool_calls; column tools
    conversations                        ShareGPT: from and value
    prompt + completion                  two strings (one turn each, or plain text), or two
                                         lists of messages
    instruction + output (or response)   Alpaca, Dolly; optional columns input and context
    question + answer (or response)      unless there is a column text; optional column context
    text                                 plain text

Conversations of all formats have a system message in a column `system` or `system_prompt`; those
with a prompt have earlier turns in `history`, which are context. Other columns are not used: those
that would carry context are refused, the others are reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lora.data.prompting.rules import ReadingRules
from lora.data.reading.cells import is_blank, kind_of
from lora.data.reading.columns import (
    SYSTEM,
    Row,
    check_columns,
    history_of,
    near_names,
    text_of,
    with_system,
)
from lora.data.reading.loss_flags import read_row_flags, take_message_flags
from lora.data.reading.messages import Message, parse_messages
from lora.data.reading.tool_calls import parse_objects, parse_tools
from lora.errors import DataError

COMPLETION = "prompt and completion"
FORMATS = (
    "messages",
    "conversations",
    COMPLETION,
    "instruction and output",
    "question and answer",
    "text",
)
"""Names of the known formats in error messages."""
_RULES = ReadingRules()
_NO_FLAGS: Mapping[int, str] = {}  # one for all examples: there are millions
_CONTEXT = {"instruction": ("input", "context"), "question": ("context",)}
"""By the question's column: columns whose texts follow it."""
_CHAT_COLUMNS = (*SYSTEM, "tools", "functions", "documents")


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a conversation, a prompt with its completion, or a text."""

    source: str
    """Where it comes from: "file:line", or "row n"."""
    format: str
    """One of FORMATS."""
    messages: tuple[Message, ...] | None = None
    n_prompt_messages: int = 0
    """Leading messages that belong to the prompt: answers in them are not trained on."""
    prompt: str | None = None
    """With `completion`: plain text, which no chat template formats."""
    completion: str | None = None
    text: str | None = None
    is_file: bool = False
    """The text is a whole file, which is always split into sequences."""
    tools: tuple[dict[str, Any], ...] | None = None
    documents: tuple[dict[str, Any], ...] | None = None
    off_flags: Mapping[int, str] = field(default_factory=lambda: _NO_FLAGS)
    """Messages that are context because of a loss flag: the flag's name by index of the message;
    of a plain row, index 0 is the row."""
    unused_columns: tuple[str, ...] = ()
    """Columns with a value that is not used."""

    @property
    def is_context(self) -> bool:
        """Whether loss flags leave nothing to learn in it."""
        if not self.off_flags:
            return False
        return self.messages is None or not self.answers

    @property
    def answers(self) -> list[int]:
        """Indices of the messages to train on."""
        numbered = list(enumerate(self.messages or ()))[self.n_prompt_messages :]
        return [
            number
            for number, message in numbered
            if message["role"] == "assistant" and number not in self.off_flags
        ]

    @property
    def has_empty_answer(self) -> bool:
        """Whether an answer to train on is empty."""
        if self.completion is not None:
            return not self.completion.strip()
        messages = self.messages or ()
        answers = [messages[number] for number in self.answers]
        return any(not m["content"].strip() and "tool_calls" not in m for m in answers)

    @property
    def n_characters(self) -> int:
        """Characters of its texts and turns, before any chat template."""
        texts = (self.text, self.prompt, self.completion)
        n_said = sum(len(message["content"]) for message in self.messages or ())
        return n_said + sum(len(text) for text in texts if text is not None)

    def content_key(self) -> bytes:
        """Return a digest that is equal for examples with equal content."""
        content = (
            self.messages,
            self.n_prompt_messages,
            self.prompt,
            self.completion,
            self.text,
            self.tools,
            self.documents,
            sorted(self.off_flags),
        )
        packed = json.dumps(content, sort_keys=True, default=str)
        return hashlib.blake2b(packed.encode(), digest_size=16).digest()


def example_from_row(row: object, source: str, rules: ReadingRules = _RULES) -> Example:
    """Return the example in a row, as `rules` say.

    Raises DataError if the row is not an object, its keys fit no format, a value has the wrong
    type, or what it says cannot be used; the message does not repeat `source`.
    """
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise DataError(f"the row is {kind_of(row)}: an object with named fields is needed")
    filled = frozenset(key for key, value in row.items() if value is not None)
    parse = _find_parser(filled) or _find_parser(frozenset(row))
    if parse is None:
        keys = ", ".join(sorted(row)) or "none"
        near = near_names(row)
        raise DataError(f"the keys {keys} fit no format. Allowed: {'; '.join(FORMATS)}.{near}")
    return parse(row, source, rules)


def example_from_file(text: str, source: str) -> Example:
    """Return a whole text file as one example."""
    return Example(source, "text", text=text, is_file=True)


@lru_cache(maxsize=256)
def _find_parser(keys: frozenset[str]) -> Callable[[Row, str, ReadingRules], Example] | None:
    if "messages" in keys:
        return _parse_messages_row
    if "conversations" in keys:
        return _parse_conversations_row
    if {"prompt", "completion"} <= keys:
        return _parse_completion_row
    if "instruction" in keys and keys & {"output", "response"}:
        return _parse_instruction_row
    if "question" in keys and keys & {"answer", "response"} and "text" not in keys:
        return _parse_question_row
    return _parse_text_row if "text" in keys else None


def _parse_messages_row(row: Row, source: str, rules: ReadingRules) -> Example:
    messages = parse_messages(row["messages"], "messages")
    return _chat(row, source, rules, "messages", messages, ("messages",))


def _parse_conversations_row(row: Row, source: str, rules: ReadingRules) -> Example:
    messages = parse_messages(row["conversations"], "conversations")
    return _chat(row, source, rules, "conversations", messages, ("conversations",))


def _parse_completion_row(row: Row, source: str, rules: ReadingRules) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    format, used = COMPLETION, ("prompt", "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if rules.as_turns:
            return _question(row, source, rules, format, *used)
        _refuse_system(rules, format)
        return Example(
            source,
            format,
            prompt=text_of(row, "prompt"),
            completion=text_of(row, "completion"),
            off_flags=read_row_flags(row, ()),
            unused_columns=check_columns(row, used, f"{format} as plain text"),
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = history_of(row) + parse_messages(prompt, "prompt")
        messages = asked + parse_messages(completion, "completion")
        return _chat(row, source, rules, format, messages, (*used, "history"), len(asked))
    raise DataError(
        f"prompt is {kind_of(prompt)} and completion {kind_of(completion)}. Allowed: two strings "
        "or two lists of messages"
    )


def _parse_instruction_row(row: Row, source: str, rules: ReadingRules) -> Example:
    answer = "response" if row.get("output") is None and "response" in row else "output"
    return _question(row, source, rules, "instruction and output", "instruction", answer)


def _parse_question_row(row: Row, source: str, rules: ReadingRules) -> Example:
    answer = "response" if row.get("answer") is None and "response" in row else "answer"
    return _question(row, source, rules, "question and answer", "question", answer)


def _parse_text_row(row: Row, source: str, rules: ReadingRules) -> Example:
    _refuse_system(rules, "text")
    return Example(
        source,
        "text",
        text=text_of(row, "text"),
        off_flags=read_row_flags(row, ()),
        unused_columns=check_columns(row, ("text",), "text"),
    )


def _question(
    row: Row, source: str, rules: ReadingRules, format: str, question: str, answer: str
) -> Example:
    """Return a question with its context and one answer, after the turns in `history`."""
    asked, answered = text_of(row, question), text_of(row, answer)
    if question == "prompt":  # of a text and what continues it: turns have no space between them
        asked, answered = asked.rstrip(), answered.lstrip()
    context = _CONTEXT.get(question, ())
    parts = [asked, *(text_of(row, key) for key in context if not is_blank(row.get(key)))]
    history = history_of(row)
    messages = (
        *history,
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": answered},
    )
    used = (question, *context, answer, "history")
    return _chat(row, source, rules, format, messages, used, len(history) + bool(history))


def _refuse_system(rules: ReadingRules, format: str) -> None:
    if rules.system is not None:
        raise DataError(
            f"the setting system has no place in the format {format} as plain text: put it into "
            "the text, or leave it out"
        )


def _chat(
    row: Row,
    source: str,
    rules: ReadingRules,
    format: str,
    messages: tuple[Message, ...],
    used: tuple[str, ...],
    n_prompt_messages: int = 0,
) -> Example:
    """Return a conversation; `used` are the columns that `messages` come from."""
    if rules.only_raw:
        raise DataError(
            f"the setting raw is for prompt and completion or text: {format} needs a chat "
            "template. Leave raw out"
        )
    name = used[0]
    n_given = len(messages)
    off_flags = take_message_flags(messages, name, n_prompt_messages)
    off_flags |= read_row_flags(row, messages, n_prompt_messages)
    messages = with_system(row, messages, rules.system)
    n_added = len(messages) - n_given
    return Example(
        source,
        format,
        messages=messages,
        n_prompt_messages=n_prompt_messages + n_added if n_prompt_messages else 0,
        tools=parse_tools(row),
        documents=parse_objects(row.get("documents"), "documents"),
        off_flags={index + n_added: flag for index, flag in off_flags.items()},
        unused_columns=check_columns(row, (*used, *_CHAT_COLUMNS), format),
    )
