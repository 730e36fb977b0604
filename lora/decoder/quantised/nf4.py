"""Frozen nf4 linears: 4-bit codes with a scale for each block of values (QLoRA, arXiv 2305.14314).

A layer unpacks its weight for each matmul, forward and backward; autograd saves codes and scales
only. The format is in `lora.kernels.nf4`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import (
    PackedRows,
    QuantisedLinear,
    QuantisedWeight,
    sample_values,
    with_autocast,
)
from lora.errors import ModelError
from lora.kernels.nf4 import GROUP, Nf4Tensor, n_blocks, pack_scales, quantise_nf4
from lora.kernels.unpack.matmul import nf4_linear
from lora.kernels.unpack.nf4 import unpack_nf4_on_device, unpack_nf4_rows_on_device


class Nf4Weight(QuantisedWeight):
    """Base of every layer with an nf4 weight; `weight` has two codes a byte, (O, I/2)."""

    kind = "nf4"
    why_finite = "A block's scale would be infinite."
    packed_names = ("weight_scales", "weight_group_scales", "weight_offset")
    weight_scales: Tensor
    """Of the blocks: uint8 with double quantisation, else fp32."""
    weight_group_scales: Tensor
    """Of the scales, fp32; empty without double quantisation."""
    weight_offset: Tensor
    """(), fp32."""
    block: int
    double_quant: bool

    @property
    def packed(self) -> Nf4Tensor:
        """The weight as the kernels take it."""
        return Nf4Tensor(
            self.weight,
            self.weight_scales,
            self.weight_group_scales,
            self.weight_offset,
            self.block,
        )

    @packed.setter
    def packed(self, packed: Nf4Tensor) -> None:
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.weight_scales, self.weight_offset = packed.scales, packed.offset
        self.weight_group_scales = packed.group_scales
        self.block, self.double_quant = packed.block, packed.is_double

    def share_packed(self, other: QuantisedWeight) -> None:
        super().share_packed(other)
        if isinstance(other, Nf4Weight):
            self.block, self.double_quant = other.block, other.double_quant

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = nf4_linear(with_autocast(x), self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        unpack_nf4_on_device(self.packed, out, first_row)

    def unpack_rows_into(self, ids: Tensor, out: Tensor) -> None:
        """Changes `out` (N, I) in place: the values of the rows `ids` (N,)."""
        unpack_nf4_rows_on_device(self.packed, ids, out)

    def load(self, weight: Tensor, name: str) -> None:
        self.check_finite(weight, name)
        packed = quantise_nf4(weight, self.block, double_quant=self.double_quant)
        if not bool(torch.isfinite(packed.offset)):
            raise ModelError(
                f"Cannot quantise {name} to nf4: its values are so large that the mean of their "
                "scales is infinite. Use nf4_double_quant=false, which has no mean."
            )
        self.packed = packed
        self.sample, self.value_dtype = sample_values(weight), weight.dtype

    @property
    def n_scales(self) -> int:
        return n_blocks(self.out_features * self.in_features, self.block)

    def rows_to_read(self, rows: slice) -> slice:
        values = self._values_of_blocks(rows)
        return slice(values.start // self.in_features, -(-values.stop // self.in_features))

    def quantise_rows(self, values: Tensor, rows: slice, name: str) -> PackedRows:
        read, width = self.rows_to_read(rows), self.in_features
        self.check_finite(values, name, read.start)
        blocks = self._values_of_blocks(rows)
        skipped = blocks.start - read.start * width
        # As one row: what is a block of the whole weight is one here, the shorter last one too.
        flat = values.reshape(1, -1)[:, skipped : skipped + blocks.stop - blocks.start]
        packed = quantise_nf4(flat, self.block, double_quant=False)
        first, stop = (place * width for place in (rows.start, rows.stop))
        own = packed.codes[0, (first - blocks.start) // 2 : (stop - blocks.start) // 2]
        # Of a block that two processes have a part of: the scale is the first one's.
        scales = slice(n_blocks(first, self.block), n_blocks(stop, self.block))
        start = blocks.start // self.block
        return PackedRows(
            own.view(rows.stop - rows.start, width // 2),
            packed.scales[scales.start - start : scales.stop - start],
            scales.start,
        )

    def _values_of_blocks(self, rows: slice) -> slice:
        """Return which values of the flattened weight the blocks are that `rows` have part in."""
        if rows.start == rows.stop:
            return slice(rows.start * self.in_features, rows.stop * self.in_features)
        start, stop = rows.start * self.in_features, rows.stop * self.in_features
        end = n_blocks(stop, self.block) * self.block
        n_values = self.out_features * self.in_features
        return slice(start // self.block * self.block, min(end, n_values))

    def set_scales(self, scales: Tensor) -> None:
        scales, groups, offset = pack_scales(scales, double_quant=self.double_quant)
        self.weight_scales, self.weight_group_scales, self.weight_offset = scales, groups, offset

    def plain_twin(self) -> Nf4Linear:
        return self.twin_of(Nf4Linear)


class Nf4Linear(QuantisedLinear, Nf4Weight):
    """A frozen nf4 linear, without values until `load`.

    Args:
        linear: the one that it replaces, with its sizes, bias and device; its inputs are even.
        block: values that share a scale.
        double_quant: whether the scales are 8-bit codes too.
    """

    def __init__(self, linear: nn.Linear, block: int = 64, *, double_quant: bool = True) -> None:
        super().__init__()
        self.take_sizes(linear)
        self.block, self.double_quant = block, double_quant
        like, half = linear.weight, linear.in_features // 2
        codes = like.new_empty(linear.out_features, half, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        n_scales = n_blocks(like.numel(), block)
        n_groups = n_blocks(n_scales, GROUP) if double_quant else 0
        kind = torch.uint8 if double_quant else torch.float32
        self.register_buffer("weight_scales", like.new_empty(n_scales, dtype=kind))
        groups = like.new_empty(n_groups, dtype=torch.float32)
        self.register_buffer("weight_group_scales", groups)
        self.register_buffer("weight_offset", like.new_empty((), dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, double_quant={self.double_quant}"


def check_even(linear: nn.Linear, name: str) -> None:
    """Raise ModelError for a linear whose rows would end inside a byte of codes."""
    if linear.in_features % 2:
        raise ModelError(
            f"Cannot store {name} in nf4: it has {linear.in_features} inputs, and two codes share "
            "a byte. Allowed: an even number. Use base_dtype int8 or fp8, or leave it out."
        )
