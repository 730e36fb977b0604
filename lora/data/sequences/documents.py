"""Tokens of many documents in flat arrays, which stay small and slice quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position that does not count in the loss."""
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Documents:
    """M documents with N tokens in total; a document never attends to another."""

    ids: NDArray[np.int32]
    """Token ids, (N,)."""
    labels: NDArray[np.int32]
    """The token to predict at each position, or IGNORE, as at each document's last token, (N,)."""
    starts: NDArray[np.int64]
    """Offset of each document's first token, and the end, (M + 1,)."""
    example_indices: NDArray[np.int64]
    """Index of the example that each document comes from, (M,)."""

    def __len__(self) -> int:
        return len(self.example_indices)

    @property
    def n_target_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORE).sum())

    def tokens(self, document: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return a document's ids and which of them are targets, both (n,)."""
        part = slice(self.starts[document], self.starts[document + 1])
        is_target = np.zeros(part.stop - part.start, np.bool_)
        is_target[1:] = self.labels[part][:-1] != IGNORE
        return self.ids[part], is_target


class DocumentsBuilder:
    """Collects documents one at a time; nothing is held twice, not even while it is joined."""

    def __init__(self) -> None:
        self._ids, self._labels = _Blocks(), _Blocks()
        self._lengths: list[int] = []
        self._example_indices: list[int] = []

    def add(
        self, ids: Sequence[int] | NDArray[np.int32], is_target: NDArray[np.bool_], example: int
    ) -> None:
        """Add the document `ids`, (n,), of the example with this index.

        `is_target`, (n,), says which tokens count in the loss. The first token never does, because
        nothing precedes it; nothing is predicted across documents.
        """
        tokens = np.asarray(ids, np.int32)
        labels = np.full(len(tokens), IGNORE, np.int32)
        np.copyto(labels[:-1], tokens[1:], where=is_target[1:])
        self._ids.add(tokens)
        self._labels.add(labels)
        self._lengths.append(len(tokens))
        self._example_indices.append(example)

    def build(self) -> Documents:
        """Return all documents in the order in which they were added, and empty the builder."""
        starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        example_indices = np.asarray(self._example_indices, np.int64)
        self._lengths, self._example_indices = [], []
        return Documents(self._ids.take(), self._labels.take(), starts, example_indices)


class _Blocks:
    """A long array that grows by blocks; each block is freed as soon as it is copied."""

    def __init__(self) -> None:
        self._full: list[NDArray[np.int32]] = []
        self._last, self._n_in_last = np.empty(0, np.int32), 0

    def add(self, values: NDArray[np.int32]) -> None:
        end = self._n_in_last + len(values)
        if end > len(self._last):
            self._full.append(self._last[: self._n_in_last])
            self._last = np.empty(max(_BLOCK_TOKENS, len(values)), np.int32)
            end = len(values)
        self._last[end - len(values) : end] = values
        self._n_in_last = end

    def take(self) -> NDArray[np.int32]:
        blocks = [*self._full, self._last[: self._n_in_last]]
        self._full, self._last, self._n_in_last = [], np.empty(0, np.int32), 0
        joined, start = np.empty(sum(map(len, blocks)), np.int32), 0
        for number, block in enumerate(blocks):
            joined[start : start + len(block)] = block
            start += len(block)
            blocks[number] = block[:0].copy()  # drops the last reference to the block's memory
        return joined
