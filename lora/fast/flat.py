"""All that trains in one flat buffer: values, gradients and AdamW's two moments side by side.

The model's parameters become views of it, so that saving, loading and evaluating see what the
fast step trains without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slot:
    """A place in the flat buffer for one tensor of `shape`; the tensors are there after `fill`."""

    shape: tuple[int, ...]
    decays: bool
    values: Tensor = field(init=False)
    gradients: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def receive(self, gradient: Tensor, *, first: bool) -> None:
        """Changes `gradients` in place: `gradient` replaces it in a step's first micro-batch."""
        if first:
            self.gradients.copy_(gradient)
        else:
            self.gradients.add_(gradient)


class FlatParameters:
    """Reserves slots, then allocates them together: those that decay first."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots: list[Slot] = []

    def reserve(self, shape: tuple[int, ...], *, decays: bool) -> Slot:
        """Return a slot for a tensor of `shape`."""
        slot = Slot(shape, decays)
        self.slots.append(slot)
        return slot

    def allocate(self) -> None:
        """Give every slot its views, all zero."""
        ordered = sorted(self.slots, key=lambda slot: not slot.decays)
        sizes = [torch.Size(slot.shape).numel() for slot in ordered]
        self.n_decaying = sum(n for n, slot in zip(sizes, ordered, strict=True) if slot.decays)
        self.values, self.gradients, self.mean, self.square = (
            torch.zeros(sum(sizes), dtype=self.dtype, device=self.device) for _ in range(4)
        )
        start = 0
        for slot, size in zip(ordered, sizes, strict=True):
            part = slice(start, start + size)
            slot.values = self.values[part].view(slot.shape)
            slot.gradients = self.gradients[part].view(slot.shape)
            slot.mean = self.mean[part].view(slot.shape)
            slot.square = self.square[part].view(slot.shape)
            start += size

    def segments(self, weight_decay: float) -> list[tuple[slice, float]]:
        """Return the parts of the buffer with one decay each."""
        n = self.values.numel()
        parts = [
            (slice(0, self.n_decaying), weight_decay),
            (slice(self.n_decaying, n), 0.0),
        ]
        return [(part, decay) for part, decay in parts if part.stop > part.start]
