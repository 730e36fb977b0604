"""Activation checkpointing: which tensors of a block are stored, recomputed or offloaded.

A stored tensor has memory of its own in each block until the backward pass has read it; a
recomputed one shares a single scratch tensor with all blocks. Full recomputation stores only the
residuals between blocks. These may wait in pinned host memory, copied on a stream of their own
while the blocks compute.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

N_DEVICE_SLOTS = 3
"""Residuals on the device when the others are on the host: a block's input and output, and one in
transfer."""
HOST_CHUNK_BYTES = 2**26
"""torch rounds pinned allocations up to powers of two: chunks of nearly that size waste little."""

_RECORD_NAMES = {
    "stores_norms": "norms",
    "n_stored_gate_up": "gate_up",
    "n_stored_qkv": "inner",
    "offloads_residuals": "offloads",
    "n_stored_attention": "attended",
}
"""Names of the fields in run records, which stay as the first version wrote them."""


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Which activations each block stores between forward and backward."""

    stores_norms: bool = True
    """Outputs of the norms; if not, weight gradients are computed block by block too."""
    n_stored_gate_up: int | None = None
    """Blocks, counted from the last, that store gate and up; None: all."""
    n_stored_qkv: int | None = None
    """Blocks, counted from the last, that store queries, keys, values, the attention output and the
    residual after it; None: all."""
    offloads_residuals: bool = False
    """The residuals between blocks wait in host memory."""
    n_stored_attention: int = 0
    """Blocks, counted from the last, that store the attention output, if more than
    `n_stored_qkv`."""

    @property
    def mode(self) -> str:
        """The name of the mode that this belongs to."""
        if self.stores_norms:
            return "none"
        if self.n_stored_qkv is None:
            return "cheap"
        return "full+offload" if self.offloads_residuals else "full"

    def n_stored(self, n_layers: int) -> tuple[int, int, int]:
        """Return how many of `n_layers` blocks store gate/up, q/k/v, and the attention output."""
        n_qkv = n_layers if self.n_stored_qkv is None else min(self.n_stored_qkv, n_layers)
        wanted = n_layers if self.n_stored_gate_up is None else self.n_stored_gate_up
        # A block whose q, k and v are gone is recomputed as a whole, gate and up included.
        n_gate_up = min(n_qkv, wanted)
        return n_gate_up, n_qkv, max(n_qkv, min(self.n_stored_attention, n_layers))

    def to_record(self) -> dict[str, Any]:
        """Return the fields as run records hold them."""
        return {_RECORD_NAMES[name]: value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ActivationCheckpointing:
        """Return what `to_record` wrote. Raises KeyError for a field that is not there."""
        return cls(**{name: record[old] for name, old in _RECORD_NAMES.items()})


MODES = {
    "none": ActivationCheckpointing(),
    "cheap": ActivationCheckpointing(stores_norms=False),
    "full": ActivationCheckpointing(stores_norms=False, n_stored_gate_up=0, n_stored_qkv=0),
    "full+offload": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=0, n_stored_qkv=0, offloads_residuals=True
    ),
}
"""From the fastest to the smallest."""


class BlockTensors:
    """One tensor (N, columns) for each of the last `n_stored` blocks; the others share scratch.

    `scratch` (scratch_rows, columns) is a part of a larger one; None: it is allocated here.
    """

    def __init__(
        self,
        like: Tensor,
        n_layers: int,
        n_stored: int,
        rows: int,
        columns: int,
        scratch_rows: int,
        scratch: Tensor | None = None,
    ) -> None:
        # The last blocks store: those before the first trained one never need to.
        self.first_stored = n_layers - n_stored
        self.stored = like.new_empty(n_stored, rows, columns)  # (stored, N, columns)
        n_scratch = scratch_rows if self.first_stored else 0
        self.scratch = (
            like.new_empty(n_scratch, columns) if scratch is None else scratch[:n_scratch]
        )

    def is_stored(self, layer: int) -> bool:
        """Whether the block has a tensor of its own."""
        return layer >= self.first_stored

    def __getitem__(self, layer: int) -> Tensor:
        return self.stored[layer - self.first_stored] if self.is_stored(layer) else self.scratch

    def chunk(self, layer: int, tokens: slice) -> Tensor:
        """Return the rows of `tokens`; scratch has room for one such chunk only."""
        if self.is_stored(layer):
            return self[layer][tokens]
        return self.scratch[: tokens.stop - tokens.start]


class Residuals:
    """The residual before each block, and after the last: (N, columns) each, on the device.

    Where backward reads no values of them, they may all be in one tensor, and their gradients.
    The methods say when a residual is written and read; nothing has to happen here then.
    """

    def __init__(self, like: Tensor, count: int, rows: int, columns: int) -> None:
        self.stored = like.new_empty(count, rows, columns)  # (L + 1 or 1, N, columns)

    def __getitem__(self, index: int) -> Tensor:
        return self.stored[index % len(self.stored)]

    def reserve_slot(self, index: int) -> None:
        """Forward: residual `index` is about to be written."""

    def offload(self, index: int) -> None:
        """Forward: residual `index` will not be read again before the backward pass."""

    def fetch(self, index: int, lowest: int) -> None:
        """Backward: `index` is read now, and the one before it next unless that is below
        `lowest`."""

    def join(self) -> None:
        """Wait for all copies: work forked inside a graph capture must join its stream."""


class OffloadedResiduals(Residuals):
    """The residuals in host memory, three of them on the device at a time."""

    def __init__(self, like: Tensor, count: int, rows: int, columns: int) -> None:
        super().__init__(like, min(count, N_DEVICE_SLOTS), rows, columns)
        n_rows = max(1, HOST_CHUNK_BYTES // (columns * like.element_size()))
        self.chunks = [slice(n, min(n + n_rows, rows)) for n in range(0, rows, n_rows)]
        device = "meta" if like.is_meta else "cpu"
        self.host = [
            [
                torch.empty(
                    chunk.stop - chunk.start,
                    columns,
                    dtype=like.dtype,
                    device=device,
                    # Only from pinned memory does the device copy without the host waiting.
                    pin_memory=like.is_cuda,
                )
                for chunk in self.chunks
            ]
            for _ in range(count - N_DEVICE_SLOTS)  # the last ones never leave the device
        ]
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self._copies: dict[int, torch.cuda.Event] = {}
        """The newest copy of each residual, in either direction."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(chunk.nbytes for chunks in self.host for chunk in chunks)

    def __getitem__(self, index: int) -> Tensor:
        return self.stored[index % N_DEVICE_SLOTS]

    def reserve_slot(self, index: int) -> None:
        """Wait until the former residual in the slot of `index` is on the host."""
        self._wait(index - N_DEVICE_SLOTS)

    def offload(self, index: int) -> None:
        """Begin to copy `index` to the host; the last ones stay, since backward begins there."""
        if index < len(self.host):
            self._copy(index, to_host=True)

    def fetch(self, index: int, lowest: int) -> None:
        """Wait for `index`, and begin to copy the one before it back."""
        if index < len(self.host):
            self._wait(index)
        if lowest <= index - 1 < len(self.host):
            self._copy(index - 1, to_host=False)

    def join(self) -> None:
        """Wait for the stream of the copies."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        # An event recorded in one graph capture must not be waited for in another.
        self._copies.clear()

    def _copy(self, index: int, *, to_host: bool) -> None:
        if self.stream is None:
            self._copy_chunks(index, to_host=to_host)
            return
        # The copy reads (or overwrites) what the current stream has just written (or read).
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._copy_chunks(index, to_host=to_host)
        self._copies[index] = self.stream.record_event()

    def _copy_chunks(self, index: int, *, to_host: bool) -> None:
        for chunk, host in zip(self.chunks, self.host[index], strict=True):
            device = self[index][chunk]
            target, source = (host, device) if to_host else (device, host)
            target.copy_(source, non_blocking=True)

    def _wait(self, index: int) -> None:
        # Streams wait for each other on the device; the host never does.
        if index in self._copies:
            torch.cuda.current_stream().wait_event(self._copies[index])
