"""Frozen fp8 linears: float8_e4m3fn codes and one fp32 scale per output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.decoder.quantised.row_scaled import RowScaledLinear, RowScaledWeight
from lora.kernels.step.fp8 import FP8, Fp8Rows


class Fp8Weight(RowScaledWeight):
    """Base of every layer with an fp8 weight: value = weight · weight_scale."""

    kind = "fp8"
    code_dtype = FP8
    why_finite = "float8_e4m3fn has no infinity."

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
        rows = Fp8Rows(torch.empty_like(weight, dtype=FP8), scales)
        rows.write(weight)
        return rows.codes, rows.scales

    def plain_twin(self) -> Fp8Linear:
        return self.twin_of(Fp8Linear)


class Fp8Linear(RowScaledLinear, Fp8Weight):
    """A frozen fp8 linear, without values until `load`."""


def has_fp8_base(model: nn.Module) -> bool:
    """Whether `model` has linears with an fp8 weight."""
    return any(isinstance(module, Fp8Weight) for module in model.modules())
