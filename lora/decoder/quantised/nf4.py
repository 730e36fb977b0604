"""Frozen nf4 linears: 4-bit codes with a scale for each block of values (QLoRA, arXiv 2305.14314).

A layer unpacks its weight for each matmul, forward and backward; autograd saves codes and scales
only. The format is in `lora.kernels.nf4`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import (
    QuantisedWeight,
    not_finite,
    sample_values,
    with_autocast,
)
from lora.errors import ModelError
from lora.kernels.nf4 import GROUP, Nf4Tensor, n_blocks, quantise_nf4
from lora.kernels.unpack.nf4 import unpack_nf4_on_device, unpack_nf4_rows_on_device


class Nf4Weight(QuantisedWeight):
    """Base of every layer with an nf4 weight; `weight` has two codes a byte, (O, I/2)."""

    kind = "nf4"
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
        packed = self.packed
        tensors = packed.codes, packed.scales, packed.group_scales, packed.offset
        y: Tensor = _Multiply.apply(with_autocast(x), packed.block, *tensors)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        unpack_nf4_on_device(self.packed, out, first_row)

    def unpack_rows_into(self, ids: Tensor, out: Tensor) -> None:
        """Changes `out` (N, I) in place: the values of the rows `ids` (N,)."""
        unpack_nf4_rows_on_device(self.packed, ids, out)

    def load(self, weight: Tensor, name: str) -> None:
        # The host waits once per tensor.
        if not bool(torch.isfinite(weight).all()):
            raise not_finite(weight, name, "nf4", "A block's scale would be infinite.")
        self.packed = quantise_nf4(weight, self.block, double_quant=self.double_quant)
        self.sample, self.value_dtype = sample_values(weight), weight.dtype

    def plain_twin(self) -> Nf4Linear:
        with torch.device("meta"):  # no storage: all is replaced at once
            plain = Nf4Linear(nn.Linear(self.in_features, self.out_features, bias=False))
        plain.weight, plain.bias = self.weight, self.bias
        plain.share_packed(self)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as nn.Module does; the scales keep their dtype, which is part of the format."""
        former = {name: self.get_buffer(name) for name in self.packed_names}
        super()._apply(fn, recurse)
        for name, buffer in former.items():
            moved = self.get_buffer(name)
            if moved.dtype is not buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class _Multiply(torch.autograd.Function):
    """x Wᵀ with W unpacked for it, and again for the backward pass; saves codes and scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.block = block
        codes, scales, group_scales, offset = tensors
        packed = Nf4Tensor(codes, scales, group_scales, offset, block)
        return F.linear(x, _unpacked(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        codes, scales, group_scales, offset = ctx.saved_tensors
        packed = Nf4Tensor(codes, scales, group_scales, offset, ctx.block)
        return dy @ _unpacked(packed, dy.dtype), None, None, None, None, None


def _unpacked(packed: Nf4Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    unpack_nf4_on_device(packed, out)
    return out


class Nf4Linear(Nf4Weight):
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

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.multiply(x)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, nf4, block={self.block}, double_quant={self.double_quant}"


def check_even(linear: nn.Linear, name: str) -> None:
    """Raise ModelError for a linear whose rows would end inside a byte of codes."""
    if linear.in_features % 2:
        raise ModelError(
            f"Cannot store {name} in nf4: it has {linear.in_features} inputs, and two codes share "
            "a byte. Allowed: an even number. Use base_dtype fp8, or leave it out."
        )
