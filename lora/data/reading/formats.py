"""Data formats: rows of known columns become one `Example` each.

Known formats, in the order in which they are tried:

    messages                             chat: role and content, tool_calls; column tools
    conversations                        ShareGPT: from and value
    prompt + completion                  two strings (one turn each, or plain text), or two
                                         lists of messages
    a question and its answer            in the columns of `lora.data.prompting.pairs`: instruction
                                         and output (Alpaca, Dolly), question and answer, prompt and
                                         response, input and output …, with their context
    text + label                         classification; see `lora.data.prompting.labels`
    text                                 plain text
    segments                             axolotl's plain text in parts; the last are learned

The setting `columns` gives columns these names; a `template` takes the place of all formats.

Conversations of all formats have a system message in a column `system` or `system_prompt`; those
with a prompt have earlier turns in `history`, which are context. Other columns are not used: those
that would carry context are refused, the others are reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from lora.data.prompting.column_map import left_out, map_columns
from lora.data.prompting.pairs import PAIRS, Pair, find_pair
from lora.data.prompting.row_template import RowTemplate, text_of_value
from lora.data.prompting.rules import ReadingRules
from lora.data.reading.cells import check_text, from_json, is_blank, kind_of
from lora.data.reading.columns import (
    LABEL,
    SYSTEM,
    TEXT,
    Row,
    check_columns,
    context_of,
    history_of,
    near_names,
    text_of,
    used_columns,
    with_system,
)
from lora.data.reading.loss_flags import FLAGS, read_row_flags, take_message_flags
from lora.data.reading.messages import Message, parse_messages
from lora.data.reading.tool_calls import parse_objects, parse_tools
from lora.errors import DataError

COMPLETION, LABELLED, TEMPLATE = "prompt and completion", "text and label", "template"
SEGMENTS = "segments"
FORMATS = (
    *("messages", "conversations", COMPLETION),
    *(pair.format for pair in PAIRS[:5]),
    *(LABELLED, "text", SEGMENTS),
)
"""Names of the usual formats in error messages."""
_RULES = ReadingRules()
_NO_FLAGS: Mapping[int, str] = {}  # one for all examples: there are millions
_NEEDS_LABEL = (
    "a row of a classification needs its label. Fill it in, remove the row, or learn the texts "
    "alone (columns label=)"
)
_CHAT_COLUMNS = (*SYSTEM, "tools", "functions", "documents")


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a conversation, a prompt with its completion, or a text."""

    source: str
    """Where it comes from: "file:line", or "row n"."""
    format: str
    """One of FORMATS, the format of one of PAIRS, or TEMPLATE."""
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
    columns: tuple[str, ...] = ()
    """Columns that it comes from, with the part's name where that is another."""
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
    if rules.template is not None:
        return _parse_template_row(row, source, rules, rules.template)
    if rules.columns:
        return _parse_mapped_row(row, source, rules)
    return _find_parser_of(row)(row, source, rules)


def example_from_file(text: str, source: str) -> Example:
    """Return a whole text file as one example."""
    return Example(source, "text", text=text, is_file=True)


Parser = Callable[[Row, str, ReadingRules], Example]


def _find_parser_of(row: Row) -> Parser:
    filled = frozenset(key for key, value in row.items() if value is not None)
    parse = _find_parser(filled) or _find_parser(frozenset(row))
    if parse is None:
        raise DataError(_fits_none(row))
    return parse


@lru_cache(maxsize=256)
def _find_parser(keys: frozenset[str]) -> Parser | None:
    if "messages" in keys:
        return _parse_messages_row
    if "conversations" in keys:
        return _parse_conversations_row
    if {"prompt", "completion"} <= keys:
        return _parse_completion_row
    pair = find_pair(keys)
    if pair is not None:
        return partial(_parse_pair_row, pair)
    if not keys.isdisjoint(TEXT) and not keys.isdisjoint(LABEL):
        return _parse_labelled_row
    if "text" in keys:
        return _parse_text_row
    return _parse_segments_row if "segments" in keys else None


def _fits_none(row: Row) -> str:
    keys = list(row)
    text = (
        f"the keys {', '.join(sorted(row)) or 'none'} fit no format. Allowed: {'; '.join(FORMATS)}."
    )
    if {"chosen", "rejected"} & row.keys():
        text += " chosen and rejected are preference data, which lora does not train on."
    elif len(keys) > 1:
        text += (
            f" Or say which columns to learn, as in columns prompt={keys[0]},completion={keys[1]} "
            f"or template '{{{keys[0]}}}\\n{{{keys[1]}}}'."
        )
    return text + near_names(row)


def _parse_mapped_row(row: Row, source: str, rules: ReadingRules) -> Example:
    mapped = map_columns(row, rules.columns)
    named = frozenset(part for part, column in rules.columns.items() if column)
    parse = _find_parser(named) or _find_parser_of(mapped)
    example = parse(mapped, source, rules)
    lost = named.difference(example.columns, (k for k in named if is_blank(mapped[k])))
    if lost:
        raise DataError(
            f"the setting columns gives {', '.join(sorted(lost))}, and the format {example.format} "
            "has no place for it: leave it out, or take a template"
        )
    return dataclasses.replace(
        example,
        columns=_with_parts(example.columns, tuple(rules.columns.items())),
        unused_columns=(*example.unused_columns, *left_out(row, rules.columns)),
    )


@lru_cache(maxsize=256)
def _with_parts(columns: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    named = {part: column for part, column in pairs if column}
    return tuple(f"{named[key]} (as {key})" if key in named else key for key in columns)


def _parse_template_row(
    row: Row, source: str, rules: ReadingRules, template: RowTemplate
) -> Example:
    prompt, completion = template.fill(row)
    # What a template leaves out was left out on purpose.
    rest = {k: v for k, v in row.items() if k in (*template.columns, *_CHAT_COLUMNS, *FLAGS)}
    example = _exchange(rest, source, rules, TEMPLATE, (prompt, completion), template.columns)
    chosen = set(rest)
    unused = tuple(k for k, v in row.items() if k not in chosen and not is_blank(v))
    return dataclasses.replace(example, unused_columns=unused) if unused else example


def _parse_messages_row(row: Row, source: str, rules: ReadingRules) -> Example:
    messages = parse_messages(row["messages"], "messages")
    return _chat(row, source, rules, "messages", messages, ("messages",))


def _parse_conversations_row(row: Row, source: str, rules: ReadingRules) -> Example:
    messages = parse_messages(row["conversations"], "conversations")
    return _chat(row, source, rules, "conversations", messages, ("conversations",))


def _parse_completion_row(row: Row, source: str, rules: ReadingRules) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(row.get("label"), bool):
        raise DataError(
            "label is true or false beside prompt and completion: preference data, which lora does "
            "not train on. Keep the rows to learn, and leave label out (columns label=)"
        )
    used = ("prompt", "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _exchange(row, source, rules, COMPLETION, (prompt, completion), used)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = history_of(row) + parse_messages(prompt, "prompt")
        messages = asked + parse_messages(completion, "completion")
        return _chat(row, source, rules, COMPLETION, messages, (*used, "history"), len(asked))
    raise DataError(
        f"prompt is {kind_of(prompt)} and completion {kind_of(completion)}. Allowed: two strings "
        "or two lists of messages"
    )


def _exchange(
    row: Row,
    source: str,
    rules: ReadingRules,
    format: str,
    texts: tuple[str, str],
    used: tuple[str, ...],
) -> Example:
    """Return a prompt and what follows it: as two turns after those in `history`, or plain text."""
    prompt, completion = texts
    for key in used:
        if isinstance(row.get(key), str):
            check_text(row[key], key)
    if rules.as_turns:
        asked = history_of(row)
        # Turns have no space between them.
        texts = prompt.rstrip(), completion.lstrip()
        messages = (*asked, *_turns(*texts))
        used = (*used, "history")
        return _chat(row, source, rules, format, messages, used, len(asked) + bool(asked))
    _refuse_system(rules, format)
    unused = check_columns(row, used, f"{format} as plain text")
    return Example(
        source,
        format,
        prompt=prompt,
        completion=completion,
        off_flags=read_row_flags(row, ()),
        columns=used_columns(row, unused),
        unused_columns=unused,
    )


def _turns(asked: str, answered: str) -> tuple[Message, Message]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def _parse_pair_row(pair: Pair, row: Row, source: str, rules: ReadingRules) -> Example:
    """Return a question with its context and one answer, after the turns in `history`."""
    answer = _first_filled(row, pair.answers)
    parts = [text_of(row, pair.question)]
    parts += [context_of(row, key) for key in pair.context if not is_blank(row.get(key))]
    history = history_of(row)
    messages = (*history, *_turns("\n\n".join(parts), text_of(row, answer)))
    used = (pair.question, *pair.context, answer, "history")
    return _chat(row, source, rules, pair.format, messages, used, len(history) + bool(history))


def _parse_labelled_row(row: Row, source: str, rules: ReadingRules) -> Example:
    """Return a text and its label, which `ask_for_labels` makes a question and its answer."""
    text, label = _first_filled(row, TEXT), _first_filled(row, LABEL)
    name = text_of_value(row, label).strip()
    if not name:
        raise DataError(f"{label} is empty: {_NEEDS_LABEL}")
    texts = text_of(row, text), name
    used = (text, *(key for key in LABEL if key in row)) if label == LABEL[0] else (text, label)
    return _exchange(row, source, rules, LABELLED, texts, used)


def _first_filled(row: Row, keys: tuple[str, ...]) -> str:
    """Return the first of `keys` that has a value, or else the first that is there."""
    present = [key for key in keys if key in row]
    return next((key for key in present if row[key] is not None), present[0])


def ask_for_labels(example: Example, template: RowTemplate) -> Example:
    """Return a LABELLED example with the question of `template` around its text."""
    if example.messages is None:
        row = {"text": example.prompt, "label": example.completion}
        prompt, completion = template.fill(row)
        return dataclasses.replace(example, prompt=prompt, completion=completion)
    *before, asked, answered = example.messages
    prompt, completion = template.fill({"text": asked["content"], "label": answered["content"]})
    turns = {**asked, "content": prompt.rstrip()}, {**answered, "content": completion.lstrip()}
    return dataclasses.replace(example, messages=(*before, *turns))


def _parse_text_row(row: Row, source: str, rules: ReadingRules) -> Example:
    _refuse_system(rules, "text")
    nulls = [key for key in LABEL if key in row and row[key] is None]
    if nulls:
        raise DataError(f"{nulls[0]} is null: {_NEEDS_LABEL}")
    unused = check_columns(row, ("text",), "text")
    return Example(
        source,
        "text",
        text=text_of(row, "text"),
        off_flags=read_row_flags(row, ()),
        columns=used_columns(row, unused),
        unused_columns=unused,
    )


def _parse_segments_row(row: Row, source: str, rules: ReadingRules) -> Example:
    """Return parts of a plain text, each with its label: whether it is learned."""
    parts = from_json(row["segments"], "segments")
    is_list = isinstance(parts, list | tuple) and all(isinstance(part, Mapping) for part in parts)
    if not is_list or not all(
        isinstance(part.get("text"), str) and isinstance(part.get("label"), bool) for part in parts
    ):
        raise DataError(
            f"segments is {kind_of(parts)}: a list of objects with text and label (true or false) "
            "is needed"
        )
    labels = [part["label"] for part in parts]
    if not any(labels) or labels != sorted(labels):
        raise DataError(
            "segments must be context first (label false) and what is learned last (label true): "
            "make one row for each part to learn"
        )
    texts = [part["text"] for part in parts]
    for text in texts:
        check_text(text, "segments")
    n_context = labels.index(True)
    halves = "".join(texts[:n_context]), "".join(texts[n_context:])
    plain = dataclasses.replace(rules, as_turns=False)
    return _exchange(row, source, plain, SEGMENTS, halves, ("segments",))


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
    unused = check_columns(row, (*used, *_CHAT_COLUMNS), format)
    return Example(
        source,
        format,
        messages=messages,
        n_prompt_messages=n_prompt_messages + n_added if n_prompt_messages else 0,
        tools=parse_tools(row),
        documents=parse_objects(row.get("documents"), "documents"),
        off_flags={index + n_added: flag for index, flag in off_flags.items()},
        columns=used_columns(row, unused),
        unused_columns=unused,
    )
