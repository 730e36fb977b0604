"""Tensors that there is one of for each block: kept on the device, shared, or away on the host.

What stays of a block until its gradient has its own tensor; what is made again shares one. The
residuals between blocks are all that full recomputation keeps; they may wait in pinned host memory,
copied on a stream of their own while the blocks compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLOTS = 3
"""Residuals on the device when the others are on the host: one block's two, and one on its way."""
HOST_PIECE_BYTES = 2**26
"""torch rounds pinned memory up to powers of two: pieces of nearly that size waste little."""


@dataclass(frozen=True)
class Keep:
    """What stays of each block between the way forward and the way back."""

    norms: bool = True
    """What the norms gave; if not, weights' gradients are made block by block as well."""
    gate_up: int | None = None
    """Blocks, the last ones, whose gate and up stay; None: all."""
    inner: int | None = None
    """Blocks, the last ones, whose queries, keys, values, attention and residual stay."""
    offloads: bool = False
    """The residuals between blocks wait in host memory."""
    attended: int = 0
    """Blocks, the last ones, whose attention's output stays, if these are more than `inner`."""

    @property
    def mode(self) -> str:
        """The name of the mode that this belongs to."""
        if self.norms:
            return "none"
        if self.inner is None:
            return "cheap"
        return "full+offload" if self.offloads else "full"

    def counts(self, n_layers: int) -> tuple[int, int, int]:
        """Return of how many blocks gate and up stay, the inner tensors, attention's output."""
        inner = n_layers if self.inner is None else min(self.inner, n_layers)
        gate_up = min(inner, n_layers if self.gate_up is None else self.gate_up)
        return gate_up, inner, max(inner, min(self.attended, n_layers))


MODES = {
    "none": Keep(),
    "cheap": Keep(norms=False),
    "full": Keep(norms=False, gate_up=0, inner=0),
    "full+offload": Keep(norms=False, gate_up=0, inner=0, offloads=True),
}
"""From the fastest to the smallest."""


class Blocks:
    """One tensor (N, columns) for each of the last `stays` blocks; the others share one."""

    def __init__(
        self, like: Tensor, n_layers: int, stays: int, rows: int, columns: int, shared_rows: int
    ) -> None:
        self.first = n_layers - stays
        self.kept = like.new_empty(stays, rows, columns)
        self.shared = like.new_empty(shared_rows if self.first else 0, columns)

    def stays(self, layer: int) -> bool:
        """Whether the block has a tensor of its own."""
        return layer >= self.first

    def __getitem__(self, layer: int) -> Tensor:
        return self.kept[layer - self.first] if self.stays(layer) else self.shared

    def part(self, layer: int, tokens: slice) -> Tensor:
        """Return the rows of `tokens`; a shared tensor has room for them alone."""
        if self.stays(layer):
            return self[layer][tokens]
        return self.shared[: tokens.stop - tokens.start]


class Residuals:
    """The residual before each block, and after the last: (N, columns) each, on the device."""

    def __init__(self, like: Tensor, count: int, rows: int, columns: int) -> None:
        self.kept = like.new_empty(count, rows, columns)

    def __getitem__(self, place: int) -> Tensor:
        return self.kept[place]

    def make_room(self, place: int) -> None:
        """Forward: number `place` is about to be written."""

    def store(self, place: int) -> None:
        """Forward: number `place` will not be read again before the way back."""

    def fetch(self, place: int, least: int) -> None:
        """Back: number `place` is wanted now, and the one before it next unless below `least`."""

    def join(self) -> None:
        """All copies must have been made: a captured stream has to come back."""


class OffloadedResiduals(Residuals):
    """The residuals in host memory, three of them on the device at a time."""

    def __init__(self, like: Tensor, count: int, rows: int, columns: int) -> None:
        super().__init__(like, min(count, SLOTS), rows, columns)
        a_piece = max(1, HOST_PIECE_BYTES // (columns * like.element_size()))
        self.pieces = [slice(n, min(n + a_piece, rows)) for n in range(0, rows, a_piece)]
        device = "meta" if like.is_meta else "cpu"
        self.host = [
            [
                torch.empty(
                    piece.stop - piece.start,
                    columns,
                    dtype=like.dtype,
                    device=device,
                    pin_memory=like.is_cuda,
                )
                for piece in self.pieces
            ]
            for _ in range(count - SLOTS)
        ]
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self._done: dict[int, torch.cuda.Event] = {}
        """The newest copy of each residual, either way."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(piece.nbytes for pieces in self.host for piece in pieces)

    def __getitem__(self, place: int) -> Tensor:
        return self.kept[place % SLOTS]

    def make_room(self, place: int) -> None:
        """Wait until what was in the slot of number `place` has been stored."""
        self._wait(place - SLOTS)

    def store(self, place: int) -> None:
        """Begin to copy number `place` to the host; the last ones stay on the device."""
        if place < len(self.host):
            self._copy(place, to_host=True)

    def fetch(self, place: int, least: int) -> None:
        """Wait for number `place`, and begin to copy the one before it back."""
        if place < len(self.host):
            self._wait(place)
        if least <= place - 1 < len(self.host):
            self._copy(place - 1, to_host=False)

    def join(self) -> None:
        """Wait for the stream of the copies."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self._done.clear()

    def _copy(self, place: int, *, to_host: bool) -> None:
        if self.stream is None:
            self._copy_pieces(place, to_host=to_host)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._copy_pieces(place, to_host=to_host)
        self._done[place] = self.stream.record_event()

    def _copy_pieces(self, place: int, *, to_host: bool) -> None:
        for piece, host in zip(self.pieces, self.host[place], strict=True):
            device = self[place][piece]
            target, source = (host, device) if to_host else (device, host)
            target.copy_(source, non_blocking=True)

    def _wait(self, place: int) -> None:
        if place in self._done:
            torch.cuda.current_stream().wait_event(self._done[place])
