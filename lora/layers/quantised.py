"""LoRA on a linear whose frozen weight is quantised, with A and B in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Weight
from lora.decoder.quantised.int8 import Int8Weight
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.errors import TargetError
from lora.lora_module import LoRALayer


class LoRAQuantisedLinear(LoRALayer, QuantisedWeight):
    """LoRA on a quantised linear: W stays codes and scales, A and B are fp32.

    A subclass for each kind also inherits from the kind's weight.
    """

    def __init__(
        self,
        base: QuantisedWeight,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        scaling: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        sizes = base.in_features, base.out_features
        super().__init__(base, *sizes, rank, alpha, dropout, scaling=scaling, generator=generator)
        self.share_packed(base)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = self.multiply(x)  # (..., O)
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., R)
        return y + (F.linear(low, self.lora_B) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return a plain layer with the unpacked weight + scaling · B A; this one stays as it is.

        The sum is fp32 and rounded once, to the dtype of the weight before it was quantised.
        """
        merged = self.unpacked(torch.float32) + self.delta_weight()
        return self.plain_layer(merged.to(self.value_dtype))

    def unwrap(self) -> nn.Module:
        return self.plain_twin()


class LoRANf4Linear(LoRAQuantisedLinear, Nf4Weight):
    """LoRA on an nf4 linear."""


class LoRAInt8Linear(LoRAQuantisedLinear, Int8Weight):
    """LoRA on an int8 linear."""


class LoRAFp8Linear(LoRAQuantisedLinear, Fp8Weight):
    """LoRA on an FP8 linear."""

    def merge(self) -> nn.Module:
        """Raise TargetError: rounding W + scaling · B A to FP8 would lose what LoRA learned."""
        raise TargetError(
            "Cannot merge into a base in FP8: rounding W + s·B·A to FP8 would lose most of what "
            "LoRA learned. Save the adapter, load its base without fp8 and merge it there: "
            "lora merge does so."
        )


LORA_LINEARS: dict[str, type[LoRAQuantisedLinear]] = {
    kind.kind: kind for kind in (LoRAFp8Linear, LoRANf4Linear, LoRAInt8Linear)
}
"""By kind of the weight."""
