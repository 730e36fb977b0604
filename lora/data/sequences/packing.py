"""Which documents share a row: best-fit decreasing, in windows of a shuffled order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora.errors import DataError

Ints = NDArray[np.int64]

WINDOW_DOCUMENTS = 8192
"""Documents sorted by length together. Larger windows fill rows a little better; smaller ones mix
long and short documents more evenly over the rows."""

_PADDED_TO = 8


@dataclass(frozen=True)
class Layout:
    """Documents by row: row r holds `members[starts[r] : starts[r + 1]]`, in this order."""

    members: Ints
    """Numbers of the documents, row after row; each document stands exactly once, (M,)."""
    starts: Ints
    """First place of each row in `members`, and the end, (rows + 1,)."""

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1


def pack(
    lengths: Ints, row_tokens: int, seed: int, *, window_documents: int = WINDOW_DOCUMENTS
) -> Layout:
    """Return a layout in which each row's documents have at most `row_tokens` tokens together.

    Best-fit decreasing: in each window the longest document goes first, into the fullest row that
    still has room. The same seed gives the same layout.

    Args:
        lengths: tokens of each document, (M,).
        row_tokens: T.
        seed: of the order in which documents fall into windows, and of documents in a row.
        window_documents: documents of a window.

    Raises:
        DataError: a document is empty or has more than `row_tokens` tokens.
    """
    _check_lengths(lengths, row_tokens)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for first in range(0, len(order), window_documents):
        window = order[first : first + window_documents]
        rows += _pack_window(window, lengths[window], row_tokens)
    return _layout(rows)


def padded_width(lengths: Ints, row_tokens: int) -> int:
    """Return T for rows of one document each: the longest one's, rounded up to a multiple of 8.

    It is at most `row_tokens`, and that where there are no documents.
    """
    longest = int(lengths.max()) if len(lengths) else row_tokens
    return min(row_tokens, -(-longest // _PADDED_TO) * _PADDED_TO)


def one_a_row(lengths: Ints, row_tokens: int) -> Layout:
    """Return the layout in which every document has a row of its own, in the given order.

    Raises DataError if a document is empty or has more than `row_tokens` tokens.
    """
    _check_lengths(lengths, row_tokens)
    return Layout(np.arange(len(lengths)), np.arange(len(lengths) + 1))


def _pack_window(documents: Ints, lengths: Ints, row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = 0  # bit r is set while some row has room for exactly r tokens more
    longest_first = np.argsort(-lengths, kind="stable")
    for document, length in zip(
        documents[longest_first].tolist(), lengths[longest_first].tolist(), strict=True
    ):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # lowest set bit: the best fit
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(document)
        else:
            room, row = row_tokens, len(rows)
            rows.append([document])
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def _layout(rows: list[list[int]]) -> Layout:
    sizes = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    members = np.fromiter((d for row in rows for d in row), np.int64, int(sizes.sum()))
    return Layout(members, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _check_lengths(lengths: Ints, row_tokens: int) -> None:
    if not len(lengths):
        return
    if lengths.min() < 1 or lengths.max() > row_tokens:
        raise DataError(
            f"Rows of {row_tokens} tokens were asked for, and the documents have "
            f"{lengths.min()} to {lengths.max()} tokens: allowed are 1 to {row_tokens}. "
            "Truncate, split or drop the long ones first."
        )
