"""All that trains of K stacked adapters in one buffer (K, n), one row for each adapter.

With a row each, an adapter's gradient norm, finiteness check and AdamW step are those of one row,
and no sum runs over two adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.fast.weights.flat import Slot


class StackedFlat:
    """Reserves slots of one shape for every adapter, then allocates them together.

    A slot of shape (a, b) has tensors (K, a, b), whose adapters lie n numbers apart.
    """

    def __init__(self, n_adapters: int, device: torch.device, dtype: torch.dtype) -> None:
        self.n_adapters, self.device, self.dtype = n_adapters, device, dtype
        self.slots: list[Slot] = []

    def reserve(self, shape: tuple[int, ...], *, decays: bool) -> Slot:
        """Return a slot for a tensor of `shape` for each adapter; all of them decay."""
        assert decays, "an adapter's matrices decay"
        slot = Slot(shape, decays)
        self.slots.append(slot)
        return slot

    def allocate(self) -> None:
        """Give every slot its views, all zero."""
        sizes = [torch.Size(slot.shape).numel() for slot in self.slots]
        self.values, self.gradients, self.mean, self.square = (
            torch.zeros(self.n_adapters, sum(sizes), dtype=self.dtype, device=self.device)
            for _ in range(4)
        )  # each (K, n)
        start = 0
        for slot, size in zip(self.slots, sizes, strict=True):
            part = slice(start, start + size)
            shape = (self.n_adapters, *slot.shape)
            slot.values = self.values[:, part].view(shape)
            slot.gradients = self.gradients[:, part].view(shape)
            slot.mean = self.mean[:, part].view(shape)
            slot.square = self.square[:, part].view(shape)
            start += size

    def moments(self, parameter: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return adapter `k`'s moments of `parameter` (K, …), which is a view of `values`."""
        # A parameter of a smaller rank than its slot is a strided view: its moments have the same
        # offset and strides in their own buffers.
        start = (parameter[k].data_ptr() - self.values.data_ptr()) // self.values.element_size()
        shape, strides = parameter.shape[1:], parameter.stride()[1:]
        mean = self.mean.as_strided(shape, strides, start)
        return mean, self.square.as_strided(shape, strides, start)
