"""LoRA on a linear whose frozen weight is stored in FP8, with A and B in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised import Fp8Linear, Fp8Weight
from lora.errors import TargetError
from lora.lora_module import LoRALayer


class LoRAFp8Linear(LoRALayer, Fp8Weight):
    """LoRA on an FP8 linear: W is stored as float8 codes and scales, A and B are fp32."""

    def __init__(
        self,
        base: Fp8Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        scaling: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        sizes = base.in_features, base.out_features
        super().__init__(base, *sizes, rank, alpha, dropout, scaling=scaling, generator=generator)
        self.register_buffer("weight_scale", base.weight_scale)
        self.register_buffer("sample", base.sample, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = self.multiply(x)  # (..., O)
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., R)
        return y + (F.linear(low, self.lora_B) * self.scaling).to(y.dtype)

    def merge(self) -> nn.Module:
        """Raise TargetError: rounding W + scaling · B A to FP8 would lose what LoRA learned."""
        raise TargetError(
            "Cannot merge into a base in FP8: rounding W + s·B·A to FP8 would lose most of what "
            "LoRA learned. Save the adapter, load its base without fp8 and merge it there: "
            "lora merge does so."
        )

    def unwrap(self) -> Fp8Linear:
        with torch.device("meta"):  # no storage: all is replaced at once
            plain = Fp8Linear(nn.Linear(self.in_features, self.out_features, bias=False))
        plain.weight, plain.bias = self.weight, self.bias
        plain.weight_scale, plain.sample = self.weight_scale, self.sample
        return plain.train(self.training)
