"""Frozen int8 linears: codes from −127 to 127 and one fp32 scale per output."""

from __future__ import annotations

import torch
from torch import Tensor

from lora.decoder.quantised.row_scaled import RowScaledLinear, RowScaledWeight
from lora.kernels.int8 import quantise_int8
from lora.kernels.unpack.int8 import unpack_int8_on_device


class Int8Weight(RowScaledWeight):
    """Base of every layer with an int8 weight: value = weight · weight_scale."""

    kind = "int8"
    code_dtype = torch.int8
    why_finite = "A row's scale would be infinite."

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = quantise_int8(weight)
        return rows.codes, rows.scales

    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        rows = slice(first_row, first_row + len(out))
        unpack_int8_on_device(self.weight[rows], self.weight_scale[rows], out)

    def plain_twin(self) -> Int8Linear:
        return self.twin_of(Int8Linear)


class Int8Linear(RowScaledLinear, Int8Weight):
    """A frozen int8 linear, without values until `load`."""
