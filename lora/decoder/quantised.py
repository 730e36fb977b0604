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

from lora.decoder.decoder import Decoder
from lora.errors import ModelError
from lora.kernels.step.fp8 import FP8, Fp8Rows

SAMPLES_PER_TENSOR = 64


class Fp8Weight(nn.Module):
    """Base of every layer with an fp8 weight: value = weight · weight_scale."""

    weight: nn.Parameter
    """Codes (O, I), float8_e4m3fn, frozen."""
    weight_scale: Tensor
    """(O, 1), fp32."""
    sample: Tensor
    """Some of the values before quantisation, for the base's fingerprint."""
    bias: nn.Parameter | None

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Return x Wᵀ + b in autocast's dtype, or without autocast in that of `x`."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Multiply.apply(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


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
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = linear.weight
        self.weight = nn.Parameter(torch.empty_like(like, dtype=FP8), requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("weight_scale", like.new_empty(len(like), 1, dtype=torch.float32))
        self.register_buffer("sample", like.new_empty(0, dtype=torch.int16), persistent=False)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.multiply(x)

    def load(self, weight: Tensor, name: str) -> None:
        """Changes this layer in place: quantises `weight` (O, I), which is called `name`.

        Raises ModelError if a value is not finite.
        """
        rows = quantise_weight(weight, name)
        self.weight = nn.Parameter(rows.codes, requires_grad=False)
        self.weight_scale, self.sample = rows.scales, sample_values(weight)

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
        damaged = (~torch.isfinite(weight)).any(1).nonzero().flatten() + first_row
        shown = ", ".join(map(str, damaged[:8].tolist()))
        raise ModelError(
            f"Cannot quantise {name} to fp8: it has values that are not finite, in rows "
            f"{shown}{' …' if len(damaged) > 8 else ''}. "
            "float8_e4m3fn has no infinity. Download the weights again."
        )
    return rows


def use_fp8_linears(model: Decoder) -> None:
    """Changes `model` in place: its blocks' linears become Fp8Linears without values.

    The embedding, the output head, norms and biases keep their dtype.
    """
    blocks = model.trunk.blocks()
    for owner in list(blocks.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                owner.add_module(name, Fp8Linear(child))


def has_fp8_base(model: nn.Module) -> bool:
    """Whether `model` has linears with an fp8 weight."""
    return any(isinstance(module, Fp8Weight) for module in model.modules())


def sample_values(tensor: Tensor) -> Tensor:
    """Return the bits of at most 64 evenly spaced values of `tensor` in bf16, int16."""
    count = min(SAMPLES_PER_TENSOR, tensor.numel())
    indices = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(1, count - 1)
    # By coordinates, so that neither a transposed nor a sliced tensor is copied whole.
    picked = tensor[torch.unravel_index(indices, tensor.shape)] if tensor.dim() else tensor.view(1)
    return picked.to(torch.bfloat16).view(torch.int16)
