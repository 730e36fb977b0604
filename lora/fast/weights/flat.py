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
    share: float = 1.0
    """Of the learning rate."""
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
    """Reserves slots, then allocates them together: those alike in decay and rate side by side."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots: list[Slot] = []

    def reserve(self, shape: tuple[int, ...], *, decays: bool, share: float = 1.0) -> Slot:
        """Return a slot for a tensor of `shape` that takes this `share` of the rate."""
        slot = Slot(shape, decays, share)
        self.slots.append(slot)
        return slot

    def allocate(self) -> None:
        """Give every slot its views, all zero."""
        ordered = sorted(self.slots, key=lambda slot: (not slot.decays, slot.share))
        sizes = [torch.Size(slot.shape).numel() for slot in ordered]
        self._stops: dict[tuple[bool, float], int] = {}
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
            self._stops[slot.decays, slot.share] = start

    def segments(self, weight_decay: float) -> list[tuple[slice, float, float]]:
        """Return the parts of the buffer with one decay and one share of the rate, and both."""
        parts, start = [], 0
        for (decays, share), stop in self._stops.items():
            parts.append((slice(start, stop), weight_decay if decays else 0.0, share))
            start = stop
        return parts
