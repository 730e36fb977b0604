"""The LoRA linear as one operation: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen.

What differs from the textbook: the low-rank part is added inside the matrix product that makes it
(no extra pass over y or dx), and the backward saves x and x Aᵀ alone, never forms dW, and leaves
out dx where nothing before needs it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The plain twin: x (..., I), weight (O, I), bias (O), a (R, I), b (O, R) -> (..., O)."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scaling


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The fast twin: agrees with the plain one within 1e-5 (fp32, ‖difference‖ / ‖reference‖).

    Shapes as in `plain_lora_linear`. Gradients flow to x, a and b only; all tensors have one type.
    """
    return _LoRALinear.apply(x, weight, bias, a, b, scaling)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        low = flat @ a.T  # (N, R)
        y = F.linear(flat, weight, bias)  # (N, O)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])  # (..., O)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        dlow = (dy @ b).mul_(ctx.scaling)  # (N, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dlow, a)  # (N, I)
            dx = dx.view(*grads[0].shape[:-1], weight.shape[1])  # (..., I)
        da = dlow.T @ flat  # (R, I)
        db = (dy.T @ low).mul_(ctx.scaling)  # (O, R)
        return dx, None, None, da, db, None
