"""Target tokens from target characters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lora.data.chat.template import Span
from lora.data.tokenizers.offsets import Ints, TokenOffsets


def find_targets(
    text: str,
    spans: Sequence[Span],
    ids: Sequence[int],
    offsets: TokenOffsets,
    stop_ids: Collection[int],
) -> NDArray[np.bool_]:
    """Return which tokens are targets, (n,): those that hold a character of a span.

    A token that crosses a span's border is a target. The token that ends a turn is a target where
    it is the last of a span or directly follows it; the white space after it (many templates end
    turns with a newline) is not, because generation stops before it.

    Args:
        text: the tokenised text.
        spans: the characters to train on.
        ids: the tokens, (n,).
        offsets: the characters of each token.
        stop_ids: tokens that end a turn.
    """
    is_target = np.zeros(len(ids), np.bool_)
    starts, ends = offsets
    for start, stop in spans:
        # By the tokens' ends: some tokenizers leave the space before a word out of its offsets.
        first, last = bisect_right(ends, start), bisect_right(ends, stop)
        if last < len(ids) and starts[last] < stop:
            last += 1
        is_target[first : _find_end(text, first, last, stop, ids, ends, stop_ids)] = True
    return is_target


def _find_end(
    text: str,
    first: int,
    last: int,
    stop: int,
    ids: Sequence[int],
    ends: Sequence[int] | Ints,
    stop_ids: Collection[int],
) -> int:
    """Return the index after the token that ends the turn, if one does; else `last`."""
    index = last
    while index > first and not text[ends[index - 1] : stop].strip():
        if ids[index - 1] in stop_ids:
            return index
        index -= 1
    return last + 1 if last < len(ids) and ids[last] in stop_ids else last
