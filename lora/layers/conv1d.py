"""LoRA on transformers' Conv1D, the linear of GPT-2, whose weight is stored transposed: (I, O)."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.lora_module import LoRALayer


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
        # The class of the base, which `_plain` builds again: transformers is never imported here.
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
        """Return a Conv1D with weight W + (scaling · B A)ᵀ; this layer is not changed."""
        merged = self.weight + self.delta_weight().T  # (I, O)
        return self._plain(nn.Parameter(merged.to(self.weight.dtype), requires_grad=False))

    def unwrap(self) -> nn.Module:
        return self._plain(self.weight)

    def _plain(self, weight: nn.Parameter) -> nn.Module:
        with torch.device("meta"):  # no storage: both parameters are replaced at once
            plain = cast(Any, self.plain_type)(self.out_features, self.in_features)
        plain.weight, plain.bias = weight, self.bias
        return cast(nn.Module, plain).train(self.training)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D; never imports transformers."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)
