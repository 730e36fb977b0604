"""Special tokens that are spelt out in messages: split, so that they stay text.

A chat template marks turns with special tokens. Where a message itself has such a spelling, the
tokenizer would read it as the token: a user's text could end its turn and begin another. A mark, a
noncharacter that Unicode reserves for internal use, is put into each spelling before the template
sees it; the text is tokenised in parts that meet where the marks were.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora.data.reading.formats import Example
from lora.data.reading.messages import Message
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

_MARK = "\ufdd2"
_MARKS = re.compile(r"\ufdd2|\\ufdd2")  # the second is what JSON in ASCII makes of it


class ControlTokens:
    """The spellings of a tokenizer's special tokens, but for its `content_tokens`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        words = _words(tokenizer)
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        found = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(found) if words else None

    def mark(self, example: Example) -> tuple[Example, int]:
        """Return the example with its spellings marked, and their number; 0: it is unchanged.

        Raises DataError if a mark is already in its text.
        """
        values: dict[str, Any] = {
            "messages": example.messages,
            "tools": example.tools,
            "documents": example.documents,
        }
        marked = {name: self._mark(value) for name, value in values.items()}
        n_found = sum(count for _, count in marked.values())
        if not n_found:
            return example, 0
        _check_unmarked(values)
        return dataclasses.replace(example, **{k: v for k, (v, _) in marked.items()}), n_found

    def mark_messages(self, messages: Sequence[Message]) -> tuple[Sequence[Message], int]:
        """Return messages with their spellings marked, and their number; see `mark`."""
        marked, n_found = self._mark(tuple(messages))
        if n_found:
            _check_unmarked(messages)
        return (marked, n_found) if n_found else (messages, 0)

    def _mark(self, value: Any) -> tuple[Any, int]:
        """Return a copy of `value` with marks in its texts, and their number; keys stay."""
        if self._pattern is None:
            return value, 0
        if isinstance(value, str):
            return self._pattern.subn(lambda found: found[0][0] + _MARK + found[0][1:], value)
        if isinstance(value, dict):
            pairs = {key: self._mark(each) for key, each in value.items()}
            n_found = sum(count for _, count in pairs.values())
            return {key: each for key, (each, _) in pairs.items()}, n_found
        if isinstance(value, list | tuple):
            items = [self._mark(each) for each in value]
            return type(value)(each for each, _ in items), sum(count for _, count in items)
        return value, 0


def special_ids(tokenizer: TextTokenizer) -> NDArray[np.bool_]:
    """Return which ids are special tokens that no text should spell out, (V,)."""
    numbers = tokenizer.ids_of(sorted(_words(tokenizer)))
    table = np.zeros(max([tokenizer.vocab_size, *(number + 1 for number in numbers)]), np.bool_)
    table[numbers] = True
    return table


def _words(tokenizer: TextTokenizer) -> set[str]:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    words = {token.content for token in added if token.special and len(token.content) > 1}
    return words - set(tokenizer.content_tokens)


def unmark(text: str) -> tuple[str, list[int]]:
    """Return a rendered text without marks, and the characters before which they stood."""
    parts = _MARKS.split(text)
    cuts, length = [], 0
    for part in parts[:-1]:
        length += len(part)
        cuts.append(length)
    return "".join(parts), cuts


def unmark_offset(text: str, offset: int) -> int:
    """Return where the character at `offset` of a marked text is in the text without marks."""
    return offset - sum(len(mark) for mark in _MARKS.findall(text[:offset]))


def encode_marked(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the ids of a rendered text whose marks part the spellings of special tokens."""
    whole, cuts = unmark(text)
    borders = [0, *cuts, len(whole)]
    parts = [whole[a:b] for a, b in itertools.pairwise(borders)]
    return [token for part in parts if part for token in tokenizer.encode(part)]


def _check_unmarked(values: object) -> None:
    if _MARK in json.dumps(values, ensure_ascii=False, default=str):
        raise DataError(
            "Cannot split the special tokens in the conversation: it has U+FDD2, which is not a "
            "character. Remove it."
        )
