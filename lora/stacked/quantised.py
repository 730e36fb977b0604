"""K stacked adapters on a linear whose frozen weight is quantised.

The weight is unpacked once for the tokens of all adapters, in the forward pass and in the backward
pass; A and B are as on a plain linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Weight
from lora.decoder.quantised.int8 import Int8Weight
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.stacked.layers import FusedStackedLoRALinear, Stack, StackedLoRALinear


class StackedQuantisedLinear(StackedLoRALinear, QuantisedWeight):
    """Stacked adapters on a quantised linear, whose tensors it shares.

    A subclass for each kind also inherits from the kind's weight.
    """

    def __init__(
        self,
        base: QuantisedWeight,
        stack: Stack,
        ranks: Sequence[int],
        scalings: Sequence[float],
        dropouts: Sequence[float],
    ) -> None:
        super().__init__(base, stack, ranks, scalings, dropouts)
        self.share_packed(base)

    def forward(self, x: Tensor) -> Tensor:  # (K·B, ..., I) or (K, B, ..., I) -> (..., O)
        return self.add_low_rank(self.multiply(x), x)

    def unwrap(self) -> nn.Module:
        """Return the quantised linear without adapters, with the same tensors."""
        return self.plain_twin()


class StackedNf4Linear(StackedQuantisedLinear, Nf4Weight):
    """Stacked adapters on an nf4 linear."""


class StackedFp8Linear(StackedQuantisedLinear, Fp8Weight):
    """Stacked adapters on an fp8 linear."""


class StackedInt8Linear(StackedQuantisedLinear, Int8Weight):
    """Stacked adapters on an int8 linear."""


STACKED_LINEARS: dict[str, type[StackedQuantisedLinear]] = {
    kind.kind: kind for kind in (StackedFp8Linear, StackedNf4Linear, StackedInt8Linear)
}
"""By kind of the weight."""


def build_stacked_linear(
    base: nn.Module,
    stack: Stack,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dropouts: Sequence[float],
) -> StackedLoRALinear:
    """Return the layer for `base`: the fused one for a plain linear in fp32 or fp64, no dropout."""
    if isinstance(base, QuantisedWeight):
        return STACKED_LINEARS[base.kind](base, stack, ranks, scalings, dropouts)
    linear = cast(nn.Linear, base)
    is_wide = linear.weight.dtype in (torch.float32, torch.float64)
    fused = is_wide and not any(dropouts)
    kind = FusedStackedLoRALinear if fused else StackedLoRALinear
    return kind(linear, stack, ranks, scalings, dropouts)
