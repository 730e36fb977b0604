"""Which linears LoRA can wrap, and which LoRA layer each of them gets."""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.tables import Nf4Embedding
from lora.errors import TargetError
from lora.layers.conv1d import LoRAConv1D, is_conv1d
from lora.layers.fused import FusedLoRALinear
from lora.layers.quantised import LORA_LINEARS
from lora.lora_module import LoRALayer, LoRALinear


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
    plain = plain or _is_falcons(module)
    return plain or is_conv1d(module) or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a quantised linear of ours, which LoRA does not yet wrap."""
    is_other = isinstance(module, LoRALayer | Nf4Embedding)
    return isinstance(module, QuantisedWeight) and not is_other


def _is_falcons(module: nn.Module) -> bool:
    """Whether `module` is a linear of Falcon, whose own forward computes what nn.Linear's does."""
    loaded = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return loaded is not None and type(module) is loaded.FalconLinear


def has_computed_weight(module: nn.Module) -> bool:
    """Whether `module` is a linear whose weight is quantised (bitsandbytes, GPTQ) or computed."""
    if isinstance(module, LoRALayer) or is_adaptable(module):
        return False
    if isinstance(module, nn.Linear):
        attention = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention
        return not isinstance(module, attention)
    sizes = (vars(module).get(name) for name in ("in_features", "out_features"))
    return "Linear" in type(module).__name__ and all(isinstance(size, int) for size in sizes)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module` is a linear of transformers that computes something else: a router."""
    kind = type(module)
    is_theirs = isinstance(module, nn.Linear) and kind.__module__.startswith("transformers.models.")
    return is_theirs and not isinstance(module, LoRALayer) and not is_adaptable(module)


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
            f"Cannot wrap a layer of type {type(base).__name__} in LoRA. Allowed: nn.Linear and "
            "transformers' Conv1D. Leave this layer out of the targets."
        )
    if is_conv1d(base):
        return LoRAConv1D(base, rank, alpha, dropout, scaling=scaling, generator=generator)
    if isinstance(base, QuantisedWeight):
        wrapped = LORA_LINEARS[base.kind]
        return wrapped(base, rank, alpha, dropout, scaling=scaling, generator=generator)
    linear = cast(nn.Linear, base)
    # The fused operation takes one dtype for all: beside W in bf16, A and B would be fp32.
    is_wide = linear.weight.dtype in (torch.float32, torch.float64)
    kind = FusedLoRALinear if dropout == 0 and is_wide else LoRALinear
    return kind(linear, rank, alpha, dropout, scaling=scaling, generator=generator)
