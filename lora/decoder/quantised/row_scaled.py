"""Frozen linears of codes with one fp32 scale per output: fp8 and int8.

What differs from the textbook: a layer multiplies by its codes and scales the result, so the only
temporary copy of the weight is the codes cast to the compute dtype, and autograd saves nothing but
codes and scales. This runs on any device; fp8 GEMMs are in `lora.fast`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import (
    PackedRows,
    QuantisedLinear,
    QuantisedWeight,
    sample_values,
    with_autocast,
)
from lora.kernels.int8 import PIECE_ELEMENTS, pieces_of


class RowScaledWeight(QuantisedWeight):
    """Base of every layer with a scale for each row: value = weight · weight_scale."""

    code_dtype: ClassVar[torch.dtype]
    packed_names = ("weight_scale",)
    weight_scale: Tensor
    """(O, 1), fp32."""

    @classmethod
    @abstractmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes (O, I) and scales (O, 1) of `weight`, whose values are finite."""

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y: Tensor = _Multiply.apply(with_autocast(x), self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        rows = slice(first_row, first_row + len(out))
        out.copy_(self.weight[rows].float() * self.weight_scale[rows])

    def load(self, weight: Tensor, name: str) -> None:
        self.check_finite(weight, name)
        codes, scales = self.quantise(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale, self.sample = scales, sample_values(weight)
        self.value_dtype = weight.dtype

    @property
    def n_scales(self) -> int:
        return self.out_features

    def quantise_rows(self, values: Tensor, rows: slice, name: str) -> PackedRows:
        # Rows are quantised one by one, so that a part of them gets the codes of the whole.
        self.check_finite(values, name, rows.start)
        codes, scales = self.quantise(values)
        return PackedRows(codes, scales.flatten(), rows.start)

    def set_scales(self, scales: Tensor) -> None:
        self.weight_scale = scales[:, None]


class RowScaledLinear(QuantisedLinear, RowScaledWeight):
    """Base of the frozen linears with a scale for each row, without values until `load`.

    Args:
        linear: the one that it replaces, with its sizes, bias and device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.take_sizes(linear)
        codes = torch.empty_like(linear.weight, dtype=self.code_dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = codes.new_empty(len(codes), 1, dtype=torch.float32)
        self.register_buffer("weight_scale", scales)


class _Multiply(torch.autograd.Function):
    """x (codes · scale)ᵀ with the scale applied to the outputs; saves codes and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return _linear(x, codes).mul_(scale.squeeze(1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        (dy,) = grads
        return _linear_back(dy * scale.squeeze(1).to(dy.dtype), codes), None, None


def _linear(x: Tensor, codes: Tensor) -> Tensor:  # (..., I) -> (..., O)
    if not _takes_pieces(x, codes):
        return F.linear(x, codes.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1])  # (N, I)
    y = x.new_empty(len(rows), len(codes))
    for piece in pieces_of(codes):
        torch.mm(rows, codes[piece].to(x.dtype).T, out=y[:, piece])
    return y.view(*x.shape[:-1], len(codes))


def _linear_back(dy: Tensor, codes: Tensor) -> Tensor:  # (..., O) -> (..., I)
    if not _takes_pieces(dy, codes):
        return dy @ codes.to(dy.dtype)
    rows = dy.reshape(-1, dy.shape[-1])  # (N, O)
    dx = dy.new_zeros(len(rows), codes.shape[1])
    for piece in pieces_of(codes):
        dx.addmm_(rows[:, piece], codes[piece].to(dy.dtype))
    return dx.view(*dy.shape[:-1], codes.shape[1])


def _takes_pieces(x: Tensor, codes: Tensor) -> bool:
    """Whether a few rows of codes at a time are cast for a matmul: they stay in a CPU's cache.

    Of a weight of 4096² in fp32 the copy alone took a quarter of the matmul of 256 tokens. Sums in
    bf16 would be rounded once more for each piece.
    """
    is_wide = x.dtype in (torch.float32, torch.float64)
    is_large = codes.dtype is torch.int8 and codes.numel() > PIECE_ELEMENTS
    return codes.device.type == "cpu" and is_wide and is_large
