"""Long texts in bounded memory: tokenised in pieces, cut into rows as the tokens come."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

PIECE_CHARACTERS = 1 << 14

# Before a space between two letters, or behind the only newline before a word (some tokenizers
# join signs across a newline): no byte-level tokenizer in use has a token across these, and the
# tokens are those of the whole text. One that puts a space before a text puts it before each piece.
_BORDER = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\w)")


def cut_text(text: str, piece_characters: int) -> Iterator[str]:
    """Yield `text` in pieces of about `piece_characters`, ended where no token crosses.

    The last piece is longer where the rest of the text has no such place.
    """
    first = 0
    while len(text) - first > piece_characters:
        border = _BORDER.search(text, first + piece_characters)
        if border is None:
            break
        yield text[first : border.end()]
        first = border.end()
    yield text[first:]


class RowCutter:
    """Cuts a run of tokens into rows of at most `row_tokens`, T ≥ 2.

    A row begins with the last token of the one before, so that every token but the first is a
    target once.
    """

    def __init__(self, row_tokens: int) -> None:
        self._row_tokens = row_tokens
        self._ids, self._learned = np.empty(0, np.int32), np.empty(0, np.bool_)
        self.n_tokens = 0
        """Tokens so far."""

    def cut(self, ids: Ids, learned: Mask) -> Iterator[tuple[Ids, Mask]]:
        """Yield the rows that `ids` and their `learned`, (n,), fill behind what came before."""
        self.n_tokens += len(ids)
        ids = np.concatenate([self._ids, ids])
        learned = np.concatenate([self._learned, learned])
        first = 0
        while len(ids) - first > self._row_tokens:
            row = slice(first, first + self._row_tokens)
            yield ids[row], learned[row]
            first += self._row_tokens - 1
        self._ids, self._learned = ids[first:].copy(), learned[first:].copy()

    def rest(self) -> tuple[Ids, Mask]:
        """Return the last row, which may be short."""
        return self._ids, self._learned
