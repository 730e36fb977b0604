"""Tokens of many documents in three flat arrays, which stay small and are quick to slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position from which nothing is learned."""


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
    """Collects documents one at a time."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int32]] = []
        self._learned: list[NDArray[np.bool_]] = []
        self._owners: list[int] = []

    def add(
        self, ids: Sequence[int] | NDArray[np.int32], learned: NDArray[np.bool_], owner: int
    ) -> None:
        """Add the document of `ids`, (n,), of which those `learned`, (n,), are targets.

        The first token is never a target, for nothing stands before it.
        """
        self._ids.append(np.asarray(ids, np.int32))
        self._learned.append(learned)
        self._owners.append(owner)

    def build(self) -> Documents:
        """Return all documents that were added, in their order."""
        lengths = np.fromiter((len(ids) for ids in self._ids), np.int64, len(self._ids))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = np.concatenate([*self._ids, np.empty(0, np.int32)])
        learned = np.concatenate([*self._learned, np.empty(0, np.bool_)])
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[:-1] = np.where(learned[1:], ids[1:], IGNORE)
        labels[starts[1:] - 1] = IGNORE  # nothing is predicted across documents
        return Documents(ids, labels, starts, np.asarray(self._owners, np.int64))
