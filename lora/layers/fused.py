"""LoRALinear as one autograd operation: fewer passes over memory, fewer saved activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lora.kernels.linear import AdaptedLinear, lora_linear, lora_linears
from lora.kernels.shared_input import SharedInputLinear
from lora.lora_module import LoRALinear


class FusedLoRALinear(LoRALinear, SharedInputLinear):
    """LoRALinear without dropout as one autograd operation, for weights in fp32 or fp64.

    Agrees with LoRALinear within 1e-5 in fp32, outputs and gradients (‖difference‖/‖reference‖).
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            # The fused operation follows autocast on CUDA only (its custom_fwd says so).
            return super().forward(x)
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)

    def forward_all(self, layers: Sequence[SharedInputLinear], x: Tensor) -> list[Tensor]:
        members = cast("Sequence[FusedLoRALinear]", layers)
        return lora_linears(
            x, [AdaptedLinear(m.weight, m.bias, m.lora_A, m.lora_B, m.scaling) for m in members]
        )
