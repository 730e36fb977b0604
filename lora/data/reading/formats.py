"""Data formats: rows of known columns become one `Example` each.

Known formats, in the order in which they are tried:

    messages                             chat: role and content, tool_calls; column tools
    conversations                        ShareGPT: from and value
    prompt + completion                  two strings, or two lists of messages
    instruction + output (or response)   Alpaca, Dolly; optional column input or context
    question + answer                    unless there is a column text or context
    text                                 plain text
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora.data.reading.messages import Message, check_text, kind_of, parse_messages, parse_objects
from lora.errors import DataError

Row = Mapping[str, Any]

FORMATS = (
    "messages",
    "conversations",
    "prompt and completion",
    "instruction and output",
    "question and answer",
    "text",
)
"""Names of the known formats in error messages."""


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
    """With `completion`: never formatted with a chat template."""
    completion: str | None = None
    text: str | None = None
    is_file: bool = False
    """The text is a whole file, which is always split into sequences."""
    tools: tuple[dict[str, Any], ...] | None = None
    documents: tuple[dict[str, Any], ...] | None = None

    @property
    def has_empty_answer(self) -> bool:
        """Whether an answer to train on is empty."""
        if self.completion is not None:
            return not self.completion.strip()
        answers = (self.messages or ())[self.n_prompt_messages :]
        return any(
            m["role"] == "assistant" and not m["content"].strip() and "tool_calls" not in m
            for m in answers
        )

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
        )
        packed = json.dumps(content, sort_keys=True, default=str)
        return hashlib.blake2b(packed.encode(), digest_size=16).digest()


def example_from_row(row: object, source: str) -> Example:
    """Return the example in a row.

    Raises DataError if the row is not an object, its keys fit no format, or a value has the wrong
    type; the message does not repeat `source`.
    """
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise DataError(f"the row is {kind_of(row)}: an object with named fields is needed")
    filled = frozenset(key for key, value in row.items() if value is not None)
    parse = _find_parser(filled) or _find_parser(frozenset(row))
    if parse is None:
        keys = ", ".join(sorted(row)) or "none"
        raise DataError(f"the keys {keys} fit no format. Allowed: {'; '.join(FORMATS)}")
    return parse(row, source)


def example_from_file(text: str, source: str) -> Example:
    """Return a whole text file as one example."""
    return Example(source, "text", text=text, is_file=True)


@lru_cache(maxsize=256)
def _find_parser(keys: frozenset[str]) -> Callable[[Row, str], Example] | None:
    if "messages" in keys:
        return _parse_messages_row
    if "conversations" in keys:
        return _parse_conversations_row
    if {"prompt", "completion"} <= keys:
        return _parse_completion_row
    if "instruction" in keys and keys & {"output", "response"}:
        return _parse_instruction_row
    if {"question", "answer"} <= keys and not keys & {"text", "context"}:
        return _parse_question_row
    return _parse_text_row if "text" in keys else None


def _parse_messages_row(row: Row, source: str) -> Example:
    return _chat(row, source, "messages", parse_messages(row["messages"], "messages"))


def _parse_conversations_row(row: Row, source: str) -> Example:
    messages = parse_messages(row["conversations"], "conversations")
    return _chat(row, source, "conversations", _with_system(row, messages))


def _parse_completion_row(row: Row, source: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return Example(source, "prompt and completion", prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = parse_messages(prompt, "prompt")
        messages = asked + parse_messages(completion, "completion")
        return _chat(row, source, "prompt and completion", messages, len(asked))
    raise DataError(
        f"prompt is {kind_of(prompt)} and completion {kind_of(completion)}. Allowed: two strings "
        "or two lists of messages"
    )


def _parse_instruction_row(row: Row, source: str) -> Example:
    parts = [_text(row, "instruction")]
    key = "input" if "input" in row else "context"
    if row.get(key) is not None and _text(row, key).strip():
        parts.append(row[key])
    answer = "response" if row.get("output") is None and "response" in row else "output"
    messages = _turns("\n\n".join(parts), _text(row, answer))
    return _chat(row, source, "instruction and output", _with_system(row, messages))


def _parse_question_row(row: Row, source: str) -> Example:
    messages = _turns(_text(row, "question"), _text(row, "answer"))
    return _chat(row, source, "question and answer", _with_system(row, messages))


def _parse_text_row(row: Row, source: str) -> Example:
    return Example(source, "text", text=_text(row, "text"))


def _chat(
    row: Row, source: str, format: str, messages: tuple[Message, ...], n_prompt_messages: int = 0
) -> Example:
    return Example(
        source,
        format,
        messages=messages,
        n_prompt_messages=n_prompt_messages,
        tools=parse_objects(row.get("tools"), "tools"),
        documents=parse_objects(row.get("documents"), "documents"),
    )


def _turns(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if row.get("system") is None or messages[0]["role"] == "system":
        return messages
    system = _text(row, "system")
    return ({"role": "system", "content": system}, *messages) if system.strip() else messages


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key} is {kind_of(value)}: a string is needed")
    check_text(value, key)
    return value
