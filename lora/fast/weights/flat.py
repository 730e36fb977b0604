"""All that trains in one flat buffer: values, gradients and AdamW's two moments side by side.

The model's parameters become views of it, so that saving, loading and evaluating see what the
hand-written step trains without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slot:
    """A range of the flat buffer for one tensor of `shape`; its views exist after `allocate`."""

    shape: tuple[int, ...]
    decays: bool
    """Whether weight decay applies."""
    lr_fraction: float = 1.0
    """Of the learning rate."""
    values: Tensor = field(init=False)
    gradients: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    """AdamW's first moment."""
    square: Tensor = field(init=False)
    """AdamW's second moment."""


class FlatParameters:
    """Reserves slots, then allocates all: those with one weight decay and learning rate adjoin.

    Args:
        device: of all tensors.
        dtype: of all tensors.
        n_totals: numbers of a step that are summed over processes with its gradients.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n_totals: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._n_totals = n_totals
        self.slots: list[Slot] = []

    def reserve(self, shape: tuple[int, ...], *, decays: bool, lr_fraction: float = 1.0) -> Slot:
        """Return a slot for a tensor of `shape` that learns at this fraction of the rate."""
        slot = Slot(shape, decays, lr_fraction)
        self.slots.append(slot)
        return slot

    def allocate(self) -> None:
        """Give every slot its views, all zero."""
        # Sorted, so that AdamW is one kernel for each combination, not one for each tensor.
        ordered = sorted(self.slots, key=lambda slot: (not slot.decays, slot.lr_fraction))
        sizes = [torch.Size(slot.shape).numel() for slot in ordered]
        self._stops: dict[tuple[bool, float], int] = {}
        n = sum(sizes)
        # What travels between processes lies together, so that it is one sum.
        self.values, self.sums, self.mean, self.square = (
            torch.zeros(count, dtype=self.dtype, device=self.device)
            for count in (n, n + self._n_totals, n, n)
        )
        self.gradients, self.totals = self.sums[:n], self.sums[n:]  # (n,), (n_totals,)
        start = 0
        for slot, size in zip(ordered, sizes, strict=True):
            part = slice(start, start + size)
            slot.values = self.values[part].view(slot.shape)
            slot.gradients = self.gradients[part].view(slot.shape)
            slot.mean = self.mean[part].view(slot.shape)
            slot.square = self.square[part].view(slot.shape)
            start += size
            self._stops[slot.decays, slot.lr_fraction] = start

    def segments(self, weight_decay: float) -> list[tuple[slice, float, float]]:
        """Return the ranges with one weight decay and learning rate: range, decay, fraction."""
        segments, start = [], 0
        for (decays, lr_fraction), stop in self._stops.items():
            segments.append((slice(start, stop), weight_decay if decays else 0.0, lr_fraction))
            start = stop
        return segments


def accumulate(target: Tensor, gradient: Tensor, *, first: bool) -> None:
    """Changes `target` in place: `gradient` is written if it is the step's `first`, else added."""
    # Written instead of zeroed and added: one pass over the gradients less in every step.
    target.copy_(gradient) if first else target.add_(gradient)
