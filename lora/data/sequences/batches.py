"""Batches of token rows: labels shifted, documents apart, order repeatable to the row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.data.sequences.documents import IGNORE, Documents
from lora.data.sequences.packing import Layout, one_a_row, pack, padded_width
from lora.errors import DataError

__all__ = ["IGNORE", "Batch", "BatchStream", "TokenRows", "build_rows", "ordered_batches"]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each field (B, T) int64.

    A token attends to tokens of the same document that do not stand later.
    """

    input_ids: Tensor
    labels: Tensor
    """Already shifted: the token to predict from each position, or IGNORE (-100)."""
    position_ids: Tensor
    """From 0 in each document; 0 on padding."""
    document_ids: Tensor
    """0, 1, 2 … within a row; -1 on padding."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; copies to a GPU do not make the host wait."""
        device = torch.device(device)
        return Batch(*(_copy(tensor, device) for tensor in self._tensors()))

    @property
    def n_target_tokens(self) -> int:
        """Tokens that are learned from. The host waits for the device."""
        return int((self.labels != IGNORE).sum())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.input_ids, self.labels, self.position_ids, self.document_ids


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class TokenRows:
    """Rows of `row_tokens` tokens that are put together when they are asked for."""

    documents: Documents
    layout: Layout
    row_tokens: int
    """T."""
    pad_id: int

    def __len__(self) -> int:
        return self.layout.n_rows

    @property
    def n_target_tokens(self) -> int:
        """Tokens that are learned from in one pass over all rows."""
        return int((self.documents.labels != IGNORE).sum())

    @property
    def fill_fraction(self) -> float:
        """Share of the rows' places that hold tokens and no padding."""
        return len(self.documents.ids) / max(1, len(self) * self.row_tokens)

    def owners(self, rows: Sequence[int]) -> list[int]:
        """Return the numbers of the examples whose tokens are in these rows, each once."""
        starts, members = self.layout.starts, self.layout.members
        found = [self.documents.owners[members[starts[r] : starts[r + 1]]] for r in rows]
        return list(dict.fromkeys(np.concatenate(found).tolist())) if found else []

    def fingerprint(self) -> str:
        """Return a digest of all rows' tokens, labels and order."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (
            self.documents.ids,
            self.documents.labels,
            self.documents.starts,
            self.layout.members,
            self.layout.starts,
        ):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the rows of these numbers, (B, T); number -1 is a row of padding."""
        starts, stops, row_numbers, numbers_in_row = self._segments(np.asarray(rows, np.int64))
        lengths = stops - starts
        first = np.cumsum(lengths) - lengths  # each document's place among the batch's tokens
        positions = np.arange(lengths.sum()) - np.repeat(first, lengths)
        sources = np.repeat(starts, lengths) + positions
        places = np.repeat(_places(row_numbers, lengths, self.row_tokens), lengths) + positions
        shape = (len(rows), self.row_tokens)
        return Batch(
            input_ids=_fill(shape, self.pad_id, places, self.documents.ids[sources]),
            labels=_fill(shape, IGNORE, places, self.documents.labels[sources]),
            position_ids=_fill(shape, 0, places, positions),
            document_ids=_fill(shape, -1, places, np.repeat(numbers_in_row, lengths)),
        )

    def _segments(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Return, for each document of the batch: first token, end, row of the batch, number."""
        real = np.flatnonzero(rows >= 0)
        firsts, ends = self.layout.starts[rows[real]], self.layout.starts[rows[real] + 1]
        counts = ends - firsts
        numbers_in_row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        members = self.layout.members[np.repeat(firsts, counts) + numbers_in_row]
        starts = self.documents.starts
        return starts[members], starts[members + 1], np.repeat(real, counts), numbers_in_row


def _places(
    row_numbers: NDArray[np.int64], lengths: NDArray[np.int64], row_tokens: int
) -> NDArray[np.int64]:
    """Return where each document begins in the flat (B·T) batch."""
    before = np.cumsum(lengths) - lengths
    is_first = np.diff(row_numbers, prepend=-1) != 0
    row_begins = np.maximum.accumulate(np.where(is_first, before, 0))
    return row_numbers * row_tokens + before - row_begins


def _fill(
    shape: tuple[int, int], filler: int, places: NDArray[np.int64], values: NDArray[Any]
) -> Tensor:
    flat = np.full(shape[0] * shape[1], filler, np.int64)
    flat[places] = values
    return torch.from_numpy(flat).view(shape)  # (B, T)


def build_rows(
    documents: Documents, row_tokens: int, *, packing: bool, pad_id: int, seed: int
) -> TokenRows:
    """Return rows of the documents.

    With packing, rows have exactly `row_tokens` tokens. Without, each document has its own row, as
    long as the longest document (rounded up to a multiple of 8), at most `row_tokens`.
    """
    lengths = np.diff(documents.starts)
    if packing:
        return TokenRows(documents, pack(lengths, row_tokens, seed), row_tokens, pad_id)
    width = padded_width(lengths, row_tokens)
    return TokenRows(documents, one_a_row(lengths, width), width, pad_id)


class BatchStream:
    """Endless batches of B rows, shuffled anew in each epoch.

    Row number n of a run depends on the seed and n alone, so neither the batch size nor the split
    into micro-batches changes which rows a run sees, and a resumed run goes on exactly. Every batch
    has B rows: one that the end of an epoch would leave short is filled from the next epoch.

    Args:
        rows: at least one.
        batch_rows: B.
        seed: of the order.
        device: where the batches are put.

    Raises:
        DataError: there are no rows.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_rows: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(rows):
            raise DataError("Batches were asked for, and there are no rows: give more examples.")
        self._rows, self._batch_rows, self._seed = rows, batch_rows, seed
        self._fingerprint = rows.fingerprint()
        self._device = torch.device(device)
        self._row = 0
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None

    @property
    def epoch(self) -> float:
        """Passes over all rows so far."""
        return self._row / len(self._rows)

    def __next__(self) -> Batch:
        numbers = self.numbers(range(self._row, self._row + self._batch_rows))
        self._row += self._batch_rows
        return self._rows.batch(numbers).to(self._device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def numbers(self, places: Iterable[int]) -> list[int]:
        """Return which rows stand at these places of the run, counted from 0."""
        return [self._number(place) for place in places]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in, as values that JSON holds."""
        return {
            "row": self._row,
            "seed": self._seed,
            "rows_per_epoch": len(self._rows),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the row that `state_dict` returned.

        Raises DataError if the state is of another seed or of other rows.
        """
        own = self.state_dict()
        faults = [
            f"{key} was {state.get(key)!r} and is {own[key]!r} now"
            for key in ("seed", "rows_per_epoch", "fingerprint")
            if state.get(key) != own[key]
        ]
        if faults:
            raise DataError(
                f"The batches cannot go on where they stopped: {'; '.join(faults)}. "
                "Resume with the same data, tokenizer, data settings and seed, or begin anew."
            )
        self._row = int(state["row"])

    def _number(self, row: int) -> int:
        epoch, place = divmod(row, len(self._rows))
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
            self._shuffled = epoch, order
        return int(self._shuffled[1][place])


def ordered_batches(
    rows: TokenRows, batch_rows: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Yield every row once, in order, `batch_rows` at a time; the last batch ends in padding."""
    for first in range(0, len(rows), batch_rows):
        numbers = np.arange(first, first + batch_rows)
        numbers[numbers >= len(rows)] = -1
        yield rows.batch(numbers).to(device)
