"""Texts whose parts are tokenised apart, so that training and generation meet the same tokens.

A prompt is tokenised alone when it is asked. In the text with its answer a token may reach over the
prompt's end (a last space joins the answer's first word), or its last tokens may be others (two
newlines). Such a text is cut at the prompt's end, and its parts are tokenised one by one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Sequence

import numpy as np
from tokenizers import Encoding

from lora.data.chat.template import Span
from lora.data.sequences.long_texts import LAST_BORDER
from lora.data.tokenizers.offsets import Ids, OffsetFinder, TokenOffsets
from lora.data.tokenizers.subword import TextTokenizer

_MAX_TAILS = 100_000  # that are remembered
_WINDOW_CHARACTERS = 200
_SHOWN_CHARACTERS = 12
_NOT_A_NEWLINE = " \t"


def show_border(text: str, border: int) -> tuple[str, str]:
    """Return a few characters before and after a border in a text."""
    before = max(0, border - _SHOWN_CHARACTERS)
    return text[before:border], text[border : border + _SHOWN_CHARACTERS]


def _begins_a_word(text: str, start: int) -> bool:
    """Return whether a space and a word follow something else, which no token depends on."""
    is_word = text[start] == " " and text[start + 1 : start + 2].isalpha()
    return is_word and not text[start - 1].isspace()


class PromptEnds:
    """Finds the prompts of a text whose tokens are others when they are asked."""

    def __init__(self, tokenizer: TextTokenizer, offsets: OffsetFinder) -> None:
        self._tokenizer, self._is_byte_level = tokenizer, offsets.computes
        self._added = frozenset(tokenizer.backend.get_added_tokens_decoder())
        self._tails: dict[str, list[int]] = {}

    def find_cuts(
        self, text: str, spans: Sequence[Span], ids: Sequence[int], offsets: TokenOffsets
    ) -> list[int]:
        """Return the starts of `spans` at which the tokens `ids`, (n,), are not those of a prompt.

        `offsets` are the tokens' characters in `text`.
        """
        starts, ends = offsets
        cuts = []
        for start, _ in spans:
            if not 0 < start < len(text):
                continue
            index = bisect_right(ends, start)  # the first token that ends after the prompt
            crosses = index < len(ids) and starts[index] < start
            if not crosses and self._is_byte_level and _begins_a_word(text, start):
                continue  # the common case needs no second look
            if crosses or not self._are_asked(text, start, ids[:index], offsets):
                cuts.append(start)
        return cuts

    def _are_asked(self, text: str, end: int, ids: Sequence[int], offsets: TokenOffsets) -> bool:
        """Return whether `ids` are the tokens of the prompt text[:end] alone."""
        first = 0
        if self._is_byte_level:
            first, begin = self._tail(text, end, ids, offsets)
        elif text[end - 1] in _NOT_A_NEWLINE:
            begin = 0
        else:
            return True  # offsets show every token that reaches over the end
        tail = text[begin:end]
        if tail not in self._tails:
            if len(self._tails) == _MAX_TAILS:
                self._tails.clear()
            self._tails[tail] = self._tokenizer.encode(tail)
        return self._tails[tail] == list(ids[first:])

    def _tail(
        self, text: str, end: int, ids: Sequence[int], offsets: TokenOffsets
    ) -> tuple[int, int]:
        """Return the token and the character from which on the prompt's end is compared.

        No token reaches over that character: an added token ends there, or a word.
        """
        starts, ends = offsets
        window = max(0, end - _WINDOW_CHARACTERS)
        border = LAST_BORDER.match(text, window, end)
        begin = border.end() if border else 0
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self._added:
                return index + 1, int(ends[index])
            if starts[index] == begin:
                return index, begin
            if starts[index] < begin:
                break
        return 0, 0


class ApartEncoder:
    """Tokenises a text in parts, with the parts' offsets in the whole text."""

    def __init__(self, offsets: OffsetFinder) -> None:
        self._offsets = offsets

    def encode(self, text: str, cuts: Collection[int]) -> tuple[list[int], Ids, TokenOffsets]:
        """Return the ids of `text`, (n,), as a list and an array, and the tokens' offsets."""
        borders = [0, *sorted(set(cuts)), len(text)]
        pairs = [(a, b) for a, b in itertools.pairwise(borders) if a < b]
        encodings: list[Encoding] = self._offsets.encode([text[a:b] for a, b in pairs])
        ids: list[int] = []
        starts, ends = [], []
        for (first, last), encoding in zip(pairs, encodings, strict=True):
            part = encoding.ids
            tokens = np.asarray(part, np.int32)
            begins, stops = self._offsets.find(text[first:last], encoding, part, tokens)
            ids += part
            starts.append(np.asarray(begins, np.int64) + first)
            ends.append(np.asarray(stops, np.int64) + first)
        return ids, np.asarray(ids, np.int32), (np.concatenate(starts), np.concatenate(ends))
