"""Columns beside the format's own: those that carry context reach the prompt, or are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from lora.data.prompting.pairs import CHOICES, PAIR_COLUMNS
from lora.data.reading.cells import check_text, from_json, is_blank, is_no_list, kind_of
from lora.data.reading.loss_flags import FLAGS
from lora.data.reading.messages import Message, parse_messages
from lora.errors import DataError

Row = Mapping[str, Any]

SYSTEM = ("system", "system_prompt")
CONTEXT = (*SYSTEM, "history", "context", "input", "tools", "functions", "documents")
"""Columns with part of the prompt: each is used, or the row is refused."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_LISTS = frozenset(("history", "tools", "functions", "documents", *MEDIA))
TEXT, LABEL = ("text", "sentence"), ("label_text", "label")
"""Columns of a classification: a text, and the name of its class; the first that is there."""
KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    *PAIR_COLUMNS,
    *TEXT,
    *LABEL,
    "segments",
)
"""Columns of the known formats."""


def text_of(row: Row, key: str) -> str:
    """Return the text in a column; raises DataError if it holds anything else."""
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key} is {kind_of(value)}: a string is needed")
    check_text(value, key)
    return value


def context_of(row: Row, key: str) -> str:
    """Return the text in a column that follows a question; choices are a line each, with a letter.

    Raises DataError if it holds anything else.
    """
    value = from_json(row.get(key), key) if key in CHOICES else row.get(key)
    if key not in CHOICES or isinstance(value, str):
        return text_of(row, key)
    texts, labels = _texts(value, key), list(ascii_uppercase)
    if isinstance(value, Mapping):  # as in ARC
        texts, labels = _texts(value.get("text"), key), _texts(value.get("label"), key)
    if not texts or len(texts) > len(labels):
        raise DataError(
            f"{key} is {kind_of(value)}: a list of at most {len(ascii_uppercase)} texts is needed, "
            "or an object with the lists text and label"
        )
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=False))


def _texts(value: object, name: str) -> list[str]:
    """Return the texts in a list; none if it is something else."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        return []
    for text in value:
        check_text(text, name)
    return list(value)


def with_system(
    row: Row, messages: tuple[Message, ...], default: str | None = None
) -> tuple[Message, ...]:
    """Return the messages with the row's system column as the first, or else with `default`.

    Raises DataError if the conversation has another system message of its own.
    """
    found = {key: text_of(row, key) for key in SYSTEM if not is_blank(row.get(key))}
    has_own = messages[0]["role"] in ("system", "developer")
    if not found:
        add = default is not None and not has_own
        return ({"role": "system", "content": default}, *messages) if add else messages
    key, system = next(iter(found.items()))
    if any(other != system for other in found.values()):
        raise DataError(f"{' and '.join(found)} differ: keep one of them")
    if not has_own:
        return {"role": "system", "content": system}, *messages
    if messages[0]["content"].strip() != system.strip():
        raise DataError(
            f"{key} differs from the conversation's own system message: keep one of them"
        )
    return messages


def history_of(row: Row) -> tuple[Message, ...]:
    """Return the earlier turns in the column `history`: pairs of texts, or messages.

    Raises DataError for anything else.
    """
    if is_no_list(row.get("history")):
        return ()
    turns = from_json(row["history"], "history")
    if not isinstance(turns, list | tuple):
        raise DataError(f"history is {kind_of(turns)}: a list of pairs of texts is needed")
    if all(isinstance(turn, Mapping) for turn in turns):
        return parse_messages(turns, "history")
    messages: list[Message] = []
    for number, pair in enumerate(turns):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{number}] is {kind_of(pair)}: a pair of texts is needed")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            check_text(text, f"history[{number}]")
            messages.append({"role": role, "content": text})
    return tuple(messages)


def check_columns(row: Row, used: Sequence[str], format: str) -> tuple[str, ...]:
    """Return the names of the filled columns that are not used, which carry no part of the prompt.

    Raises DataError for a column with context that this format has no place for, and for images.
    """
    keys = frozenset(key for key, value in row.items() if value is not None)
    rest = _unused(keys, tuple(used))
    if not rest:
        return ()
    filled = [key for key in rest if not _says_nothing(row[key], key)]
    for key in filled:
        word = key.strip().lower()
        if word in MEDIA:
            raise DataError(
                f"the column {key} cannot be used: only text is learned, and a placeholder for it "
                "would be learned as a word; remove these rows, or the column and its placeholders"
            )
        if word in CONTEXT and word != key:
            raise DataError(f"the column {key!r} has no known name. Did you mean {word!r}?")
        if word in CONTEXT:
            raise DataError(
                f"the column {key} has no place in the format {format}: put its text into the "
                f"prompt, name it in a template, or leave it out (columns {key}=)"
            )
    return rest if len(filled) == len(rest) else tuple(filled)


def used_columns(row: Row, unused: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the columns with a value that are not among the unused ones."""
    return _used(tuple(key for key, value in row.items() if value is not None), unused)


def near_names(row: Row) -> str:
    """Return a hint for columns that differ from known ones in case or spaces, or ""."""
    known = (*KEYS, *CONTEXT)
    near = {key: key.strip().lower() for key in row if key not in known}
    found = [repr(word) for word in near.values() if word in known]
    return f" Did you mean {', '.join(found)}?" if found else ""


def _says_nothing(value: object, key: str) -> bool:
    return is_no_list(value) if key.strip().lower() in _LISTS else is_blank(value)


@lru_cache(maxsize=256)
def _used(keys: tuple[str, ...], unused: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key not in unused)  # one tuple for millions of rows


@lru_cache(maxsize=256)
def _unused(keys: frozenset[str], used: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(keys.difference(used, FLAGS)))
