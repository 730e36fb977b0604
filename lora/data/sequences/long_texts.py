"""Long texts in bounded memory: tokenised in pieces, cut into sequences as the tokens arrive."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

PIECE_CHARACTERS = 1 << 14

# Before a space between two letters, or after the only newline before a word (some tokenizers
# merge punctuation across a newline): no byte-level tokenizer in use has a token across these, so
# the tokens equal those of the whole text. A tokenizer that prepends a space to a text prepends it
# to each piece.
_BETWEEN = r"(?:(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\w))"
_BORDER = re.compile(_BETWEEN)
LAST_BORDER = re.compile(rf"(?s).*{_BETWEEN}")
"""Matches up to the last place that no token reaches over."""


def cut_text(text: str, piece_characters: int) -> Iterator[str]:
    """Yield `text` in pieces of about `piece_characters`, cut where no token crosses.

    The last piece is longer if the rest of the text has no such border.
    """
    first = 0
    while len(text) - first > piece_characters:
        border = _BORDER.search(text, first + piece_characters)
        if border is None:
            break
        yield text[first : border.end()]
        first = border.end()
    yield text[first:]


class SequenceCutter:
    """Cuts a stream of tokens into sequences of at most `sequence_length` tokens, T ≥ 2.

    A sequence begins with the last token of the one before, so that every token but the first is a
    target once.
    """

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._ids, self._is_target = np.empty(0, np.int32), np.empty(0, np.bool_)
        self.n_tokens = 0
        """Tokens so far."""

    def cut(self, ids: Ids, is_target: Mask) -> Iterator[tuple[Ids, Mask]]:
        """Yield the full sequences once `ids` and `is_target`, (n,), are appended."""
        self.n_tokens += len(ids)
        ids = np.concatenate([self._ids, ids])
        is_target = np.concatenate([self._is_target, is_target])
        first = 0
        while len(ids) - first > self._sequence_length:
            part = slice(first, first + self._sequence_length)
            yield ids[part], is_target[part]
            first += self._sequence_length - 1
        self._ids, self._is_target = ids[first:].copy(), is_target[first:].copy()

    def rest(self) -> tuple[Ids, Mask]:
        """Return the last sequence, which may be short."""
        return self._ids, self._is_target
