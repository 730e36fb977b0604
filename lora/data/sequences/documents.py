"""Tokens of many documents in three flat arrays, which stay small and are quick to slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position from which nothing is learned."""
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Documents:
    """M documents of N tokens together; a document never sees another."""

    ids: NDArray[np.int32]
    """Token ids, (N,)."""
    labels: NDArray[np.int32]
    """The token to predict from each place, or IGNORE, also at each document's last token, (N,)."""
    starts: NDArray[np.int64]
    """First place of each document, and the end, (M + 1,)."""
    owners: NDArray[np.int64]
    """Number of the example that each document comes from, (M,)."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def n_target_tokens(self) -> int:
        """Tokens that are learned from."""
        return int((self.labels != IGNORE).sum())

    def tokens(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return a document's ids and which of them are learned, both (n,)."""
        place = slice(self.starts[number], self.starts[number + 1])
        learned = np.zeros(place.stop - place.start, np.bool_)
        learned[1:] = self.labels[place][:-1] != IGNORE
        return self.ids[place], learned


class DocumentsBuilder:
    """Collects documents one at a time; nothing is held twice, also while they are put together."""

    def __init__(self) -> None:
        self._ids, self._labels = _Blocks(), _Blocks()
        self._lengths: list[int] = []
        self._owners: list[int] = []

    def add(
        self, ids: Sequence[int] | NDArray[np.int32], learned: NDArray[np.bool_], owner: int
    ) -> None:
        """Add the document of `ids`, (n,), of which those `learned`, (n,), are targets.

        The first token is never a target, for nothing stands before it; nothing is predicted
        across documents.
        """
        tokens = np.asarray(ids, np.int32)
        labels = np.full(len(tokens), IGNORE, np.int32)
        np.copyto(labels[:-1], tokens[1:], where=learned[1:])
        self._ids.add(tokens)
        self._labels.add(labels)
        self._lengths.append(len(tokens))
        self._owners.append(owner)

    def build(self) -> Documents:
        """Return all documents that were added, in their order; the builder is empty then."""
        starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        owners = np.asarray(self._owners, np.int64)
        self._lengths, self._owners = [], []
        return Documents(self._ids.take(), self._labels.take(), starts, owners)


class _Blocks:
    """A long array that grows by blocks, each given back as soon as it is copied."""

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
        whole, place = np.empty(sum(map(len, blocks)), np.int32), 0
        for number, block in enumerate(blocks):
            whole[place : place + len(block)] = block
            place += len(block)
            blocks[number] = block[:0].copy()
        return whole
