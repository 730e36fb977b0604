"""From learned characters to learned tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lora.data.chat.template import Span
from lora.data.tokenizers.offsets import Ints, Places


def find_learned(
    text: str,
    spans: Sequence[Span],
    ids: Sequence[int],
    places: Places,
    stop_ids: Collection[int],
) -> NDArray[np.bool_]:
    """Return which tokens are learned, (n,): those that hold a character of a span.

    A token that stands over a span's border is learned. The token that ends a turn is learned where
    it is the last of a span or comes right behind it; the white space behind it (many templates end
    turns in a newline) is not, for nobody lets the model write it.

    Args:
        text: what was tokenised.
        spans: characters to learn.
        ids: the tokens, (n,).
        places: the characters of each token.
        stop_ids: tokens that end a turn.
    """
    learned = np.zeros(len(ids), np.bool_)
    starts, ends = places
    for start, stop in spans:
        # By where tokens end: some tokenizers count the space before a word out of its offsets.
        first, last = bisect_right(ends, start), bisect_right(ends, stop)
        if last < len(ids) and starts[last] < stop:
            last += 1
        learned[first : _find_end(text, first, last, stop, ids, ends, stop_ids)] = True
    return learned


def _find_end(
    text: str,
    first: int,
    last: int,
    stop: int,
    ids: Sequence[int],
    ends: Sequence[int] | Ints,
    stop_ids: Collection[int],
) -> int:
    """Return the token behind the one that ends the turn, if one does; else `last`."""
    place = last
    while place > first and not text[ends[place - 1] : stop].strip():
        if ids[place - 1] in stop_ids:
            return place
        place -= 1
    return last + 1 if last < len(ids) and ids[last] in stop_ids else last
