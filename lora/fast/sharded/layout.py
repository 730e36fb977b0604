"""Where the rows of frozen weights lie: in each process's shard, and gathered in a slot.

A unit is what is gathered at once: the embedding, a block, the output head. Every matrix of a unit
is split by rows, evenly: all processes hold as many, the last ones padding. Gathered, the rows of
all processes follow each other, so that a matrix is whole and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora.device import Share

ALIGNMENT_BYTES = 256
"""Of every matrix in a slot and in a shard, as CUDA's allocator gives it."""

Source = tuple[str, slice]
"""A parameter's full name, and which rows of the matrix it is."""


@dataclass(frozen=True)
class Span:
    """Bytes that every process has of a matrix, and where all of them lie gathered."""

    slot_offset: int
    shard_offset: int
    n_bytes: int
    """Of one process."""


@dataclass(eq=False)
class ShardedMatrix:
    """A frozen matrix W (O, I) in each of its units; its views of the slots exist after `allocate`.

    In a slot it is (O + R, I + R): right of W and below it there is room for LoRA's s·B and A.
    """

    share: Share
    outputs: int
    """O."""
    inputs: int
    """I."""
    extra: int
    """R."""
    dtype: torch.dtype
    sources: Sequence[Sequence[Source]]
    """By unit: the parameters that make it up, in order."""
    slot_offset: int = 0
    shard_offset: int = 0
    """From the beginning of the unit's part of the shard."""
    views: list[Tensor] = field(default_factory=list)
    """By unit, (O + R, I + R)."""
    add_adapters: Callable[[int, Tensor], None] | None = None
    """Called with a unit's number and its view when W is there: writes what is not gathered."""

    @property
    def columns(self) -> int:
        """Of a row, in elements."""
        return self.inputs + self.extra

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    @property
    def rank_rows(self) -> int:
        """Rows that each process holds, padding included."""
        return self.share.largest(self.outputs)

    @property
    def own_rows(self) -> slice:
        """Return which rows of W this process holds."""
        start = min(self.share.rank * self.rank_rows, self.outputs)
        return slice(start, min(start + self.rank_rows, self.outputs))

    @property
    def shard_bytes(self) -> int:
        """Bytes of one unit in a process's shard."""
        return _aligned(self.rank_rows * self.row_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one unit in a slot."""
        # The padding of the last processes may reach beyond the rows for A.
        rows = max(self.outputs + self.extra, self.share.size * self.rank_rows)
        return _aligned(rows * self.row_bytes)

    def own_part(self, shard: Tensor) -> Tensor:
        """Return this process's rows (rows, I + R) in its `shard` of one unit, bytes."""
        stop = self.shard_offset + self.rank_rows * self.row_bytes
        part = shard[self.shard_offset : stop].view(self.dtype).view(self.rank_rows, self.columns)
        return part[: self.own_rows.stop - self.own_rows.start]

    def view_of(self, slot: Tensor) -> Tensor:
        """Return the whole matrix (O + R, I + R) in a `slot`, bytes."""
        rows = self.outputs + self.extra
        stop = self.slot_offset + rows * self.row_bytes
        return slot[self.slot_offset : stop].view(self.dtype).view(rows, self.columns)


@dataclass(frozen=True)
class Unit:
    """What is gathered at once."""

    name: str
    """For messages; units of one name have the same content."""
    matrices: Sequence[ShardedMatrix]
    index: int
    """Of the unit among those that its matrices have."""
    shard_start: int
    """Where its part of every shard begins, in bytes."""

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard."""
        return sum(matrix.shard_bytes for matrix in self.matrices)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds it."""
        return sum(matrix.slot_bytes for matrix in self.matrices)

    def spans(self) -> list[Span]:
        """Return what has to be gathered."""
        return [
            Span(m.slot_offset, self.shard_start + m.shard_offset, m.rank_rows * m.row_bytes)
            for m in self.matrices
        ]


def place(matrices: Sequence[ShardedMatrix]) -> tuple[int, int]:
    """Changes `matrices` in place: they follow each other in a unit. Returns its bytes of a shard
    and of a slot."""
    shard_offset = slot_offset = 0
    for matrix in matrices:
        matrix.shard_offset, matrix.slot_offset = shard_offset, slot_offset
        shard_offset += matrix.shard_bytes
        slot_offset += matrix.slot_bytes
    return shard_offset, slot_offset


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
