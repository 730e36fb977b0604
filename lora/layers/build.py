"""Siblings of LoRALinear for other base layers, and the one table that chooses between them.

`Conv1D` is what transformers' GPT-2 calls its linears: the weight lies transposed, (I, O). A linear
in fp32 (or fp64) without dropout gets `FusedLoRALinear`, one in eight bits `LoRAFp8Linear`,
everything else the plain layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised import Fp8Linear, Fp8Weight
from lora.errors import TargetError
from lora.kernels.linear import Adapted, lora_linear, lora_linears
from lora.kernels.together import Joinable
from lora.lora_module import LoRALayer, LoRALinear


class LoRAConv1D(LoRALayer):
    """LoRA on transformers' Conv1D: y = x W + b + (dropout(x) Aᵀ) Bᵀ · scaling, W (I, O)."""

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        scaling: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        in_features, out_features = cast(Tensor, base.weight).shape
        sizes = in_features, out_features
        super().__init__(base, *sizes, rank, alpha, dropout, scaling=scaling, generator=generator)
        self.plain_type: type[nn.Module] = type(base)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        flat = torch.addmm(
            cast(Tensor, self.bias), x.reshape(-1, self.in_features), self.weight
        )  # (·, O)
        y = flat.view(*x.shape[:-1], self.out_features)  # (..., O)
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., R)
        return y + (F.linear(low, self.lora_B) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return a Conv1D with weight W + (scaling · B A)ᵀ; this layer stays as it is."""
        merged = self.weight + self.delta_weight().T  # (I, O)
        return self._plain(nn.Parameter(merged.to(self.weight.dtype), requires_grad=False))

    def unwrap(self) -> nn.Module:
        return self._plain(self.weight)

    def _plain(self, weight: nn.Parameter) -> nn.Module:
        with torch.device("meta"):
            plain = cast(Any, self.plain_type)(self.out_features, self.in_features)
        plain.weight, plain.bias = weight, self.bias
        return cast(nn.Module, plain).train(self.training)


class FusedLoRALinear(LoRALinear, Joinable):
    """LoRALinear without dropout as one operation: fewer passes, less kept for the backward.

    Agrees with LoRALinear within 1e-5 in fp32, outputs and gradients (‖difference‖/‖reference‖).
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            return super().forward(x)  # whose operations autocast knows
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)

    def join(self, layers: Sequence[Joinable], x: Tensor) -> list[Tensor]:
        members = cast("Sequence[FusedLoRALinear]", layers)
        return lora_linears(
            x, [Adapted(m.weight, m.bias, m.lora_A, m.lora_B, m.scaling) for m in members]
        )


class LoRAFp8Linear(LoRALayer, Fp8Weight):
    """LoRA on a linear in eight bits: W is its codes and scales, A and B are fp32."""

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
        """Raise TargetError: a sum rounded to eight bits would lose what was learned."""
        raise TargetError(
            "Merging was asked for on a base in fp8: W + s·B·A rounded to eight bits would lose "
            "most of what LoRA learned. Save the adapter, load its base without fp8 and merge it "
            "there: lora merge does so."
        )

    def unwrap(self) -> Fp8Linear:
        with torch.device("meta"):  # no storage: all is replaced at once
            plain = Fp8Linear(nn.Linear(self.in_features, self.out_features, bias=False))
        plain.weight, plain.bias = self.weight, self.bias
        plain.weight_scale, plain.sample = self.weight_scale, self.sample
        return plain.train(self.training)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D; never imports transformers."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA can wrap `module`.

    Linears with a forward or a computed weight of their own (quantised, parametrised) cannot be
    wrapped, nor the output projection inside nn.MultiheadAttention, whose weight is read without
    calling the layer.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return False
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or is_conv1d(module) or isinstance(module, Fp8Linear)


def is_computed(module: nn.Module) -> bool:
    """Whether `module` is a linear in all but its weight: quantised (bitsandbytes, GPTQ), say."""
    if isinstance(module, LoRALayer) or is_adaptable(module):
        return False
    if isinstance(module, nn.Linear):
        attention = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention
        return not isinstance(module, attention)
    sizes = (vars(module).get(name) for name in ("in_features", "out_features"))
    return "Linear" in type(module).__name__ and all(isinstance(size, int) for size in sizes)


def build_lora_layer(
    base: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    scaling: float,
    generator: torch.Generator | None = None,
) -> LoRALayer:
    """Return the LoRA layer that fits `base`. Raises TargetError if none does."""
    if not is_adaptable(base):
        raise TargetError(
            f"LoRA was asked for a layer of type {type(base).__name__}: allowed are nn.Linear and "
            "transformers' Conv1D. Leave this layer out of the targets."
        )
    if is_conv1d(base):
        return LoRAConv1D(base, rank, alpha, dropout, scaling=scaling, generator=generator)
    if isinstance(base, Fp8Linear):
        return LoRAFp8Linear(base, rank, alpha, dropout, scaling=scaling, generator=generator)
    linear = cast(nn.Linear, base)
    is_wide = linear.weight.dtype in (torch.float32, torch.float64)
    kind = FusedLoRALinear if dropout == 0 and is_wide else LoRALinear
    return kind(linear, rank, alpha, dropout, scaling=scaling, generator=generator)
