"""Sequence packing: best-fit decreasing, in windows of a shuffled order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora.errors import DataError

Ints = NDArray[np.int64]

WINDOW_DOCUMENTS = 8192
"""Documents sorted by length together. Larger windows fill sequences slightly better; smaller ones
spread long and short documents more evenly over the epoch."""

_PADDED_TO, _PACKED_TO = 8, 64
"""Multiples that T is rounded up to. The larger one is that of attention's blocks on a GPU, and
leaves data that fill their sequences to nine tenths with the T that is given."""


@dataclass(frozen=True)
class Layout:
    """Documents by sequence: sequence s holds `members[starts[s] : starts[s + 1]]`, in order."""

    members: Ints
    """Indices of the documents, sequence after sequence; each document appears once, (M,)."""
    starts: Ints
    """Offset of each sequence in `members`, and the end, (sequences + 1,)."""

    @property
    def n_sequences(self) -> int:
        return len(self.starts) - 1


def pack(
    lengths: Ints, sequence_length: int, seed: int, *, window_documents: int = WINDOW_DOCUMENTS
) -> Layout:
    """Return a layout in which each sequence's documents have at most `sequence_length` tokens.

    Best-fit decreasing: in each window the longest document goes first, into the fullest sequence
    that still has room. The same seed gives the same layout.

    Args:
        lengths: tokens of each document, (M,).
        sequence_length: T.
        seed: of the order in which documents are assigned to windows.
        window_documents: documents in a window.

    Raises:
        DataError: a document is empty or has more than `sequence_length` tokens.
    """
    _check_lengths(lengths, sequence_length)
    order = np.random.default_rng(seed).permutation(len(lengths))
    sequences: list[list[int]] = []
    for first in range(0, len(order), window_documents):
        window = order[first : first + window_documents]
        # Room for more than all documents changes no choice, and would only take memory.
        room = min(sequence_length, int(lengths[window].sum()))
        sequences += _pack_window(window, lengths[window], room)
    return _layout(sequences)


def padded_length(lengths: Ints, sequence_length: int) -> int:
    """Return T without packing: the longest document's tokens, rounded up to a multiple of 8.

    It is at most `sequence_length`, and exactly that if there are no documents.
    """
    return _rounded_length(lengths, sequence_length, _PADDED_TO)


def packed_length(layout: Layout, lengths: Ints, sequence_length: int) -> int:
    """Return T with packing: the fullest sequence's tokens, rounded up to a multiple of 64.

    It is at most `sequence_length`, and exactly that if there are no sequences. So data that fill
    their sequences have `sequence_length`, and short data are not padded to it.
    """
    if not layout.n_sequences:
        return sequence_length
    tokens = np.add.reduceat(lengths[layout.members], layout.starts[:-1])
    return _rounded_length(tokens, sequence_length, _PACKED_TO)


def _rounded_length(lengths: Ints, sequence_length: int, multiple: int) -> int:
    longest = int(lengths.max()) if len(lengths) else sequence_length
    return min(sequence_length, -(-longest // multiple) * multiple)


def unpacked_layout(lengths: Ints, sequence_length: int) -> Layout:
    """Return the layout in which every document has its own sequence, in the given order.

    Raises DataError if a document is empty or has more than `sequence_length` tokens.
    """
    _check_lengths(lengths, sequence_length)
    return Layout(np.arange(len(lengths)), np.arange(len(lengths) + 1))


def _pack_window(documents: Ints, lengths: Ints, sequence_length: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0  # bit r is set while some sequence has room for exactly r more tokens
    longest_first = np.argsort(-lengths, kind="stable")
    for document, length in zip(
        documents[longest_first].tolist(), lengths[longest_first].tolist(), strict=True
    ):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # lowest set bit: the best fit
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            sequences[sequence].append(document)
        else:
            room, sequence = sequence_length, len(sequences)
            sequences.append([document])
        by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return sequences


def _layout(sequences: list[list[int]]) -> Layout:
    sizes = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
    documents = (document for sequence in sequences for document in sequence)
    members = np.fromiter(documents, np.int64, int(sizes.sum()))
    return Layout(members, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _check_lengths(lengths: Ints, sequence_length: int) -> None:
    if not len(lengths):
        return
    if lengths.min() < 1 or lengths.max() > sequence_length:
        raise DataError(
            f"Cannot build sequences of {sequence_length} tokens: the documents have "
            f"{lengths.min()} to {lengths.max()} tokens. Allowed: 1 to {sequence_length}. "
            "Truncate, split or drop the long ones first."
        )
