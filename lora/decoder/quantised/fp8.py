"""Frozen fp8 linears: float8_e4m3fn codes and one fp32 scale per output.

What differs from the textbook: a layer multiplies by its codes and scales the result, so the only
temporary copy of the weight is the codes cast to the compute dtype, and autograd saves nothing but
codes and scales. This runs on any device; fp8 GEMMs are in `lora.fast`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import (
    QuantisedWeight,
    not_finite,
    sample_values,
    with_autocast,
)
from lora.kernels.step.fp8 import FP8, Fp8Rows


class Fp8Weight(QuantisedWeight):
    """Base of every layer with an fp8 weight: value = weight · weight_scale."""

    kind = "fp8"
    packed_names = ("weight_scale",)
    weight_scale: Tensor
    """(O, 1), fp32."""

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y: Tensor = _Multiply.apply(with_autocast(x), self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpack_into(self, out: Tensor, first_row: int = 0) -> None:
        rows = slice(first_row, first_row + len(out))
        out.copy_(self.weight[rows].float() * self.weight_scale[rows])

    def load(self, weight: Tensor, name: str) -> None:
        rows = quantise_weight(weight, name)
        self.weight = nn.Parameter(rows.codes, requires_grad=False)
        self.weight_scale, self.sample = rows.scales, sample_values(weight)
        self.value_dtype = weight.dtype

    def plain_twin(self) -> Fp8Linear:
        with torch.device("meta"):  # no storage: all is replaced at once
            plain = Fp8Linear(nn.Linear(self.in_features, self.out_features, bias=False))
        plain.weight, plain.bias = self.weight, self.bias
        plain.share_packed(self)
        return plain.train(self.training)


class _Multiply(torch.autograd.Function):
    """x (codes · scale)ᵀ with the scale applied to the outputs; saves codes and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype)).mul_(scale.squeeze(1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        (dy,) = grads
        return (dy * scale.squeeze(1).to(dy.dtype)) @ codes.to(dy.dtype), None, None


class Fp8Linear(Fp8Weight):
    """A frozen fp8 linear, without values until `load`.

    Args:
        linear: the one that it replaces, with its sizes, bias and device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.take_sizes(linear)
        like = linear.weight
        self.weight = nn.Parameter(torch.empty_like(like, dtype=FP8), requires_grad=False)
        self.register_buffer("weight_scale", like.new_empty(len(like), 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8"


def quantise_weight(weight: Tensor, name: str, *, first_row: int = 0) -> Fp8Rows:
    """Return codes and scales of `weight` (O, I), or of its rows from `first_row` on.

    Raises ModelError if a value is not finite.
    """
    rows = Fp8Rows(
        torch.empty_like(weight, dtype=FP8),
        weight.new_empty(len(weight), 1, dtype=torch.float32),
    )
    rows.write(weight)
    # The host waits once per tensor. A row with a value that is not finite has no scale.
    if not bool(torch.isfinite(rows.scales).all()) or bool(weight.isnan().any()):
        raise not_finite(weight, name, "fp8", "float8_e4m3fn has no infinity.", first_row)
    return rows


def has_fp8_base(model: nn.Module) -> bool:
    """Whether `model` has linears with an fp8 weight."""
    return any(isinstance(module, Fp8Weight) for module in model.modules())
