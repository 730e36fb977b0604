"""LoRA on a linear whose frozen weight is quantised, with A and B in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Weight
from lora.decoder.quantised.int8 import Int8Weight
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.errors import TargetError
from lora.kernels.packed_linear import PackedLinear, packed_lora_linears
from lora.kernels.shared_input import SharedInputLinear
from lora.kernels.unpack.matmul import unpacked_nf4
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


class LoRANf4Linear(LoRAQuantisedLinear, Nf4Weight, SharedInputLinear):
    """LoRA on an nf4 linear; without dropout and in one dtype it is one autograd operation."""

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        if not self._is_one_operation(x):
            return super().forward(x)
        return packed_lora_linears(x, [self._as_packed()])[0]

    def forward_all(self, layers: Sequence[SharedInputLinear], x: Tensor) -> list[Tensor]:
        members = cast("Sequence[LoRANf4Linear]", layers)
        if not all(member._is_one_operation(x) for member in members):
            return [layer(x) for layer in layers]
        return packed_lora_linears(x, [member._as_packed() for member in members])

    def _is_one_operation(self, x: Tensor) -> bool:
        # Beside inputs in bf16, A and B would be fp32; under autocast all would be cast.
        is_plain = isinstance(self.dropout, nn.Identity) and x.dtype is self.lora_A.dtype
        is_cast = torch.is_autocast_enabled(x.device.type)
        return is_plain and not is_cast and not torch.compiler.is_compiling()

    def _as_packed(self) -> PackedLinear:
        lora = self.lora_A, self.lora_B, self.scaling
        unpack = partial(unpacked_nf4, block=self.block)
        return PackedLinear(self.packed.tensors, unpack, self.bias, *lora)


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
