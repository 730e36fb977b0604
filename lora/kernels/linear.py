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

from lora.kernels.products import product, transposed_product


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
        ctx.merges = merges(flat, weight)
        low = product(flat, a).mul_(scaling)  # (N, R)
        if ctx.merges:
            weight = torch.addmm(weight, b, a, alpha=scaling)  # (O, I)
            y = product(flat, weight, bias)  # (N, O)
        else:
            y = product(flat, weight, bias).addmm_(low, b.T)  # (N, O)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])  # (..., O)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        dlow = product(dy, b.T).mul_(ctx.scaling)  # (N, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight.T)  # (N, I)
            if not ctx.merges:
                dx.addmm_(dlow, a)
            dx = dx.view(*grads[0].shape[:-1], weight.shape[1])  # (..., I)
        da = transposed_product(dlow, flat)  # (R, I)
        db = transposed_product(low, dy).T  # (O, R); dyᵀ low is several times slower on a CPU
        return dx, None, None, da, db, None


def merges(x: Tensor, weight: Tensor) -> bool:
    """Whether W + s·B·A is made for these inputs x (N, I): it then costs less than adding apart.

    On a CPU, where W (O, I) is at most a quarter of what the layer reads and writes.
    """
    n_out, n_in = weight.shape
    return x.is_cpu and len(x) * (n_in + n_out) >= 4 * n_in * n_out
