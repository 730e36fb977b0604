"""The embedding or the output head in nf4: single rows are unpacked, or slices of the vocabulary.

A whole head of a large vocabulary would be the largest tensor of a step, so its matmuls take as
many rows at a time as the scratch holds, which the blocks' weights share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.token_tables import TokenTable
from lora.fast.weights.unpacked import WeightScratch

MIN_UNPACKED_VALUES = 2**24
"""Of a head, at least: the scratch of narrow blocks would make slices many and thin."""
ROW_MULTIPLE = 64
"""Rows of a slice are a multiple of this, so that the columns of its logits are aligned."""


class PackedTable(TokenTable):
    """A frozen table whose values (V, C) are packed; LoRA may be on a head.

    Args:
        module: whose weight it is.
        flat: where LoRA on the head gets its slots.
        dtype: compute dtype.
        scratch: where the rows are unpacked.
    """

    def __init__(
        self,
        module: QuantisedWeight,
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        scratch: WeightScratch,
    ) -> None:
        self.module, self.scratch, self.dtype = module, scratch, dtype
        self.slot, self.trained = None, {}
        self.n_rows, self.width = module.out_features, module.in_features
        # No values: what the step's buffers are like, in dtype and device.
        self.tensors = [torch.empty(0, dtype=dtype, device=module.weight.device)]
        self.room = self.tensors[0]
        self.find_trained(module, flat, 1.0, None)

    @property
    def n_unpacked(self) -> int:
        """Values that have to lie in the scratch at once, at least."""
        rows = -(-self.n_rows // ROW_MULTIPLE) * ROW_MULTIPLE
        return min(rows * self.width, max(MIN_UNPACKED_VALUES, ROW_MULTIPLE * self.width))

    def use_scratch(self, room: Tensor) -> None:
        """Unpack into `room`, which is flat."""
        self.room = room

    def packed_tensors(self) -> Iterator[Tensor]:
        """Yield the codes and scales, which the module keeps."""
        yield self.module.weight
        yield from self.module.buffers(recurse=False)

    def look_up(self, ids: Tensor) -> Tensor:
        out = torch.empty(len(ids), self.width, dtype=self.dtype, device=ids.device)
        cast(Nf4Weight, self.module).unpack_rows_into(ids, out)
        return out

    def multiply(self, hidden: Tensor, logits: Tensor) -> None:
        for rows, weight in self._slices():
            torch.mm(hidden, weight.T, out=logits[:, rows])

    def multiply_back(self, d_logits: Tensor, d_hidden: Tensor) -> None:
        for rows, weight in self._slices():
            if rows.start == 0:
                torch.mm(d_logits[:, rows], weight, out=d_hidden)
            else:
                d_hidden.addmm_(d_logits[:, rows], weight)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the vocabulary, and their rows (rows, C) unpacked."""
        at_once = len(self.room) // self.width // ROW_MULTIPLE * ROW_MULTIPLE
        for start in range(0, self.n_rows, at_once):
            rows = slice(start, min(start + at_once, self.n_rows))
            weight = self.room[: (rows.stop - start) * self.width].view(-1, self.width)
            if not self.scratch.holds(self, start, weight):
                self.module.unpack_into(weight, start)
            yield rows, weight
