"""Batches of token sequences: shifted labels, separate documents, a reproducible order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora.data.sequences.documents import IGNORE, Documents
from lora.data.sequences.packing import Layout, pack, packed_length, padded_length, unpacked_layout
from lora.device import WHOLE, Share
from lora.errors import DataError

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "TokenSequences",
    "build_sequences",
    "ordered_batches",
]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, each field (B, T) int64.

    A token attends only to earlier tokens of its own document, and to itself.
    """

    input_ids: Tensor
    labels: Tensor
    """Already shifted: the token to predict at each position, or IGNORE (-100)."""
    position_ids: Tensor
    """Start at 0 in each document; 0 on padding."""
    document_ids: Tensor
    """0, 1, 2 … within a sequence; -1 on padding."""
    is_causal: bool = field(default=False, kw_only=True)
    """Known to need no more than a causal mask: see `needs_mask`."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; a copy to a GPU does not block the host."""
        device = torch.device(device)
        return Batch(
            *(_copy(tensor, device) for tensor in self._tensors()), is_causal=self.is_causal
        )

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.input_ids, self.labels, self.position_ids, self.document_ids


def needs_mask(batch: Batch) -> bool:
    """Whether `batch` needs more than a causal mask: several documents, or padding in front.

    Padding at the end needs none, nor does a sequence of padding: no learned token attends to it.
    The batch is read on the host, where it still is.
    """
    documents = batch.document_ids
    before, after = documents[:, :-1], documents[:, 1:]
    begins_late = (documents[:, 0] != 0) & (documents != -1).any(1)
    return bool(begins_late.any() or ((after != before) & (after != -1)).any())


def find_bounds(document_ids: Tensor) -> Tensor:
    """Return where runs of one document begin among the N tokens of (B, T), and N: int32."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)  # (B, T)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    offsets = starts.flatten().nonzero().squeeze(1)  # (documents,)
    return F.pad(offsets, (0, 1), value=document_ids.numel()).to(torch.int32)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # async only from pinned memory
    return tensor.to(device)


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of `sequence_length` tokens, packed or padded, assembled on request."""

    documents: Documents
    layout: Layout
    sequence_length: int
    """T, in tokens."""
    pad_id: int

    def __len__(self) -> int:
        return self.layout.n_sequences

    @property
    def n_target_tokens(self) -> int:
        """Tokens that count in the loss, in one pass over all sequences."""
        return int((self.documents.labels != IGNORE).sum())

    @property
    def fill_fraction(self) -> float:
        """Fraction of the positions that hold a token rather than padding."""
        return len(self.documents.ids) / max(1, len(self) * self.sequence_length)

    def example_indices(self, sequences: Sequence[int]) -> list[int]:
        """Return the indices of the examples with tokens in these sequences, each once."""
        starts, members = self.layout.starts, self.layout.members
        found = [
            self.documents.example_indices[members[starts[s] : starts[s + 1]]] for s in sequences
        ]
        return list(dict.fromkeys(np.concatenate(found).tolist())) if found else []

    def fingerprint(self) -> str:
        """Return a digest of the tokens, labels and order of all sequences."""
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

    def batch(self, sequences: Sequence[int] | Ints) -> Batch:
        """Return the sequences with these indices, (B, T); index -1 is a sequence of padding."""
        starts, stops, slots, document_ids = self._segments(np.asarray(sequences, np.int64))
        lengths = stops - starts
        first = np.cumsum(lengths) - lengths  # each document's offset among the batch's tokens
        positions = np.arange(lengths.sum()) - np.repeat(first, lengths)
        sources = np.repeat(starts, lengths) + positions
        begins = _document_offsets(slots, lengths, self.sequence_length)
        targets = np.repeat(begins, lengths) + positions
        shape = (len(sequences), self.sequence_length)
        return Batch(
            input_ids=_fill(shape, self.pad_id, targets, self.documents.ids[sources]),
            labels=_fill(shape, IGNORE, targets, self.documents.labels[sources]),
            position_ids=_fill(shape, 0, targets, positions),
            document_ids=_fill(shape, -1, targets, np.repeat(document_ids, lengths)),
        )

    def _segments(self, sequences: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return, per document: start, stop, its sequence's slot in the batch, document id."""
        real = np.flatnonzero(sequences >= 0)
        firsts = self.layout.starts[sequences[real]]
        counts = self.layout.starts[sequences[real] + 1] - firsts
        document_ids = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        members = self.layout.members[np.repeat(firsts, counts) + document_ids]
        starts = self.documents.starts
        return starts[members], starts[members + 1], np.repeat(real, counts), document_ids


def _document_offsets(slots: Ints, lengths: Ints, sequence_length: int) -> Ints:
    """Return the offset of each document's first token in the flat (B·T) batch."""
    before = np.cumsum(lengths) - lengths
    is_first = np.diff(slots, prepend=-1) != 0
    sequence_begins = np.maximum.accumulate(np.where(is_first, before, 0))
    return slots * sequence_length + before - sequence_begins


def _fill(shape: tuple[int, int], filler: int, indices: Ints, values: NDArray[Any]) -> Tensor:
    flat = np.full(shape[0] * shape[1], filler, np.int64)
    flat[indices] = values
    return torch.from_numpy(flat).view(shape)  # (B, T)


def build_sequences(
    documents: Documents, sequence_length: int, *, packing: bool, pad_id: int, seed: int
) -> TokenSequences:
    """Return the documents as sequences.

    With packing, all sequences are as long as the fullest, rounded up to a multiple of 64. Without,
    each document gets its own sequence, as long as the longest document, rounded up to a multiple
    of 8. Both have at most `sequence_length` tokens.
    """
    lengths = np.diff(documents.starts)
    if packing:
        layout = pack(lengths, sequence_length, seed)
        packed = packed_length(layout, lengths, sequence_length)
        return TokenSequences(documents, layout, packed, pad_id)
    padded = padded_length(lengths, sequence_length)
    return TokenSequences(documents, unpacked_layout(lengths, padded), padded, pad_id)


class BatchStream:
    """Endless batches of B sequences, reshuffled every epoch.

    The n-th sequence of a run depends on the seed and n alone, so neither the batch size nor the
    split into micro-batches changes which sequences a run sees, and a resumed run continues
    exactly. Every batch has B sequences: a batch that the end of an epoch would leave short is
    filled from the next epoch. One of several processes gets its part of each batch; parts have one
    size, so smaller ones end with a sequence of padding.

    Args:
        sequences: at least one.
        batch_size: B, of all processes together.
        seed: of the order.
        device: of the batches.
        share: this process's part of each batch.

    Raises:
        DataError: there are no sequences.
    """

    def __init__(
        self,
        sequences: TokenSequences,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        share: Share = WHOLE,
    ) -> None:
        if not len(sequences):
            raise DataError("Cannot build batches: there are no sequences. Give more examples.")
        self._sequences, self._batch_size, self._seed = sequences, batch_size, seed
        self._fingerprint = sequences.fingerprint()
        self._device, self._share = torch.device(device), share
        self._n_drawn = 0
        self._shuffled: tuple[int, Ints] | None = None

    def __next__(self) -> Batch:
        drawn = range(self._n_drawn, self._n_drawn + self._batch_size)
        indices = self.sequence_indices(drawn[self._share.part(self._batch_size)])
        padding = self._share.largest(self._batch_size) - len(indices)
        self._n_drawn += self._batch_size
        return self._sequences.batch(indices + padding * [-1]).to(self._device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def sequence_indices(self, draws: Iterable[int]) -> list[int]:
        """Return the indices of the sequences drawn n-th in the run, for each n, from 0."""
        return [self._index_of(draw) for draw in draws]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the run, and of which data, as values that JSON can hold.

        A "row" is a sequence: the keys are those of the checkpoints on disk.
        """
        return {
            "row": self._n_drawn,
            "seed": self._seed,
            "rows_per_epoch": len(self._sequences),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the sequence that `state_dict` named.

        Raises DataError if the state is of another seed or of other sequences.
        """
        own = self.state_dict()
        faults = [
            f"{key} was {state.get(key)!r} and is {own[key]!r} now"
            for key in ("seed", "rows_per_epoch", "fingerprint")
            if state.get(key) != own[key]
        ]
        if faults:
            raise DataError(
                f"Cannot continue the batch order of the run: {'; '.join(faults)}. Resume with "
                "the same data, tokenizer, data settings and seed, or start a new run."
            )
        self._n_drawn = int(state["row"])

    def _index_of(self, draw: int) -> int:
        epoch, position = divmod(draw, len(self._sequences))
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sequences))
            self._shuffled = epoch, order
        return int(self._shuffled[1][position])


def ordered_batches(
    sequences: TokenSequences,
    batch_size: int,
    device: torch.device | str = "cpu",
    share: Share = WHOLE,
) -> Iterator[Batch]:
    """Yield every sequence once, in order, `batch_size` at a time; padding fills the last batch.

    Several processes get batches in turn, the same number each: the last ones may be padding only.
    """
    for first in range(0, len(sequences), batch_size * share.size):
        start = first + share.rank * batch_size
        indices = np.arange(start, start + batch_size)
        indices[indices >= len(sequences)] = -1
        yield sequences.batch(indices).to(device)
