"""Frozen linears in eight bits: float8_e4m3fn codes and one fp32 scale an output.

What differs from the textbook: a layer multiplies by its codes and scales the product afterwards,
so no weight is ever made again whole in another type than the products', and autograd keeps the
codes alone. Any device can compute so; products of eight bits are in `lora.fast`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.errors import ModelError
from lora.kernels.step.fp8 import FP8, Fp8Rows
from lora.runs.tensor_files import sample_values


class Fp8Weight(nn.Module):
    """What every layer with a weight in eight bits has: value = weight · weight_scale."""

    weight: nn.Parameter
    """Codes (O, I), float8_e4m3fn, frozen."""
    weight_scale: Tensor
    """(O, 1), fp32."""
    sample: Tensor
    """Some of the values before they were rounded, for the base's fingerprint."""
    bias: nn.Parameter | None

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Return x Wᵀ + b, in the type that autocast says or that `x` has."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Multiply.apply(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Multiply(torch.autograd.Function):
    """x (codes · scale)ᵀ, with the scale on the outputs; keeps codes and scale."""

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
    """A frozen linear in eight bits, without values until `load`.

    Args:
        linear: whose place it takes: sizes, bias and device are its own.
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
        """Changes this layer in place: it takes the values `weight` (O, I), called `name`.

        Raises ModelError if one of them is not finite.
        """
        rows = Fp8Rows(
            torch.empty_like(weight, dtype=FP8),
            weight.new_empty(len(weight), 1, dtype=torch.float32),
        )
        rows.put(weight)
        # The host waits once a tensor: what is not finite has no scale.
        if not bool(torch.isfinite(rows.scales).all()) or bool(weight.isnan().any()):
            damaged = (~torch.isfinite(weight)).any(1).nonzero().flatten().tolist()
            raise ModelError(
                f"{name} was to be kept in fp8 and has values that are not finite, in rows "
                f"{', '.join(map(str, damaged[:8]))}{' …' if len(damaged) > 8 else ''}: fp8 has no "
                "infinity, and such a row no scale. Fetch the weights again."
            )
        self.weight = nn.Parameter(rows.codes, requires_grad=False)
        self.weight_scale, self.sample = rows.scales, sample_values(weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8"


def use_fp8_linears(model: Decoder) -> None:
    """Changes `model` in place: its blocks' linears become Fp8Linears without values.

    The embedding, the output head, norms and biases stay as they are.
    """
    blocks = model.trunk.blocks()
    for owner in list(blocks.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                owner.add_module(name, Fp8Linear(child))


def has_fp8_base(model: nn.Module) -> bool:
    """Whether linears of `model` are kept in eight bits."""
    return any(isinstance(module, Fp8Weight) for module in model.modules())
