"""The LoRA linear as one autograd function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen.

What differs from the textbook: the low-rank part is added by the matmul that computes it (no extra
pass over y or dx), backward needs only x and x Aᵀ, never forms dW, and leaves out dx where nothing
before needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.matmul import matmul_nt, matmul_tn


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
        ctx.merges = is_merged_cheaper(flat, weight)
        low = matmul_nt(flat, a).mul_(scaling)  # (N, R), scaled here: narrower than y
        if ctx.merges:
            # The merged weight is saved too, since dx = dy (W + s·B·A) needs it again.
            weight = torch.addmm(weight, b, a, alpha=scaling)  # (O, I)
            y = matmul_nt(flat, weight, bias)  # (N, O)
        else:
            y = matmul_nt(flat, weight, bias).addmm_(low, b.T)  # (N, O)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling = scaling
        return shaped_as(y, x)  # (..., O)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        dlow = matmul_nt(dy, b.T).mul_(ctx.scaling)  # (N, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul_nt(dy, weight.T)  # (N, I)
            if not ctx.merges:  # else the low-rank part is in `weight`
                dx.addmm_(dlow, a)
            dx = dx.view(*grads[0].shape[:-1], weight.shape[1])  # (..., I)
        da = matmul_tn(dlow, flat)  # (R, I)
        db = matmul_tn(low, dy).T  # (O, R); dyᵀ low is several times slower on a CPU
        return dx, None, None, da, db, None


@dataclass(frozen=True)
class AdaptedLinear:
    """The tensors of a linear with LoRA; shapes as in `plain_lora_linear`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


def lora_linears(x: Tensor, layers: Sequence[AdaptedLinear]) -> list[Tensor]:
    """Return what `lora_linear` returns for each of the layers, which all read x (..., I).

    All A are one matmul, and so are their gradients: below rank 16 three A take as long as one.
    """
    flat = x.reshape(-1, x.shape[-1])  # (N, I)
    if any(is_merged_cheaper(flat, layer.weight) for layer in layers):
        return [lora_linear(x, m.weight, m.bias, m.a, m.b, m.scaling) for m in layers]
    tensors = [t for m in layers for t in (m.weight, m.bias, m.a, m.b)]
    return list(_LoRALinears.apply(x, [m.scaling for m in layers], *tensors))


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: list[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        # Autograd takes a flat list of tensors: four of each layer, one after the other.
        weights, biases, all_a, all_b = (tensors[start::4] for start in range(4))
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        parts = cast("tuple[Tensor, ...]", all_a)
        a = torch.cat(parts)  # (all R, I)
        lows = matmul_nt(flat, a).split([len(part) for part in parts], 1)  # each (N, R)
        outputs = []
        for weight, bias, b, low, scaling in zip(
            weights, biases, all_b, lows, scalings, strict=True
        ):
            assert weight is not None
            assert b is not None
            y = matmul_nt(flat, weight, bias).addmm_(low, b.T, alpha=scaling)  # (N, O)
            outputs.append(shaped_as(y, x))
        ctx.save_for_backward(flat, a, *lows, *weights, *all_b)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, *saved = ctx.saved_tensors
        count = len(grads)
        lows, weights, all_b = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dys = [dy.reshape(len(flat), -1) for dy in grads]  # each (N, O)
        # One matmul with all A for dx and one for dA, from the gradients of x Aᵀ side by side.
        dlow = torch.cat(
            [matmul_nt(dy, b.T).mul_(s) for dy, b, s in zip(dys, all_b, ctx.scalings, strict=True)],
            1,
        )  # (N, all R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul_nt(dys[0], weights[0].T)  # (N, I)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx += matmul_nt(dy, weight.T)  # not addmm_, which torch gives to MKL
            dx = dx.addmm_(dlow, a).view(*grads[0].shape[:-1], -1)  # (..., I)
        all_da = matmul_tn(dlow, flat).split([low.shape[1] for low in lows])  # (R, I)
        found: list[Tensor | None] = [dx, None]
        for dy, low, da, scaling in zip(dys, lows, all_da, ctx.scalings, strict=True):
            db = matmul_tn(low, dy).T.mul_(scaling)  # (O, R)
            found += [None, None, da, db]
        return tuple(found)


def shaped_as(y: Tensor, x: Tensor) -> Tensor:
    """Return y (N, O) with the leading shape of x (..., I)."""
    # Not y.view: a view that a custom function returns must not be changed in place, and some
    # models do so (Falcon adds to it, OLMo clamps it). y itself is used nowhere else.
    shape = [*x.shape[:-1], y.shape[-1]]
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, shape))


def is_merged_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether merging W + s·B·A for inputs x (N, I) costs less than a low-rank part of its own.

    On a CPU, where W (O, I) is at most a quarter of what the layer reads and writes.
    """
    n_out, n_in = weight.shape
    return x.is_cpu and len(x) * (n_in + n_out) >= 4 * n_in * n_out
