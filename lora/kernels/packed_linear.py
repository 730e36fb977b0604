"""Linears with LoRA over packed weights that read one input, as one autograd function.

What `lora.kernels.linear` is over plain weights, for weights that are stored as codes and scales:
each is unpacked for its matmul, forward and again backward, and only one is unpacked at a time.
Autograd saves x, x Aᵀ and the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.kernels.linear import shaped_as
from lora.kernels.matmul import matmul_nt, matmul_tn

Unpack = Callable[[Sequence[Tensor], torch.dtype], Tensor]
"""Returns W (O, I) in a dtype, of its codes and scales."""


@dataclass(frozen=True)
class PackedLinear:
    """The tensors of a linear with LoRA over a packed weight, as in `plain_lora_linear`."""

    tensors: tuple[Tensor, ...]
    """Codes and scales."""
    unpack: Unpack
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


def packed_lora_linears(x: Tensor, layers: Sequence[PackedLinear]) -> list[Tensor]:
    """Return x Wᵀ + b + s (x Aᵀ) Bᵀ of each of `layers`: x (..., I) -> (..., O).

    Gradients flow to x and to A and B, which have the dtype of x.
    """
    tensors = [t for m in layers for t in (m.bias, m.a, m.b)]
    codes = [t for m in layers for t in m.tensors]
    outputs: tuple[Tensor, ...] = _PackedLinears.apply(x, layers, *tensors, *codes)
    return list(outputs)


class _PackedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[PackedLinear], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        parts = [layer.a for layer in layers]
        a = parts[0] if len(parts) == 1 else torch.cat(parts)  # (all R, I): one matmul for all
        lows = matmul_nt(flat, a).split([len(part) for part in parts], 1)  # each (N, R)
        outputs = []
        for layer, low in zip(layers, lows, strict=True):
            y = matmul_nt(flat, layer.unpack(layer.tensors, flat.dtype), layer.bias)  # (N, O)
            outputs.append(shaped_as(y.addmm_(low, layer.b.T, alpha=layer.scaling), x))
        ctx.save_for_backward(flat, a, *lows, *(m.b for m in layers), *tensors[3 * len(layers) :])
        # Not the layers, which hold tensors that autograd could not follow.
        ctx.how = [(layer.unpack, layer.scaling, len(layer.tensors)) for layer in layers]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, *saved = ctx.saved_tensors
        count = len(grads)
        lows, all_b, codes = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dys = [dy.reshape(len(flat), -1) for dy in grads]  # each (N, O)
        scalings = [scaling for _, scaling, _ in ctx.how]
        dlows = [matmul_nt(dy, b.T).mul_(s) for dy, b, s in zip(dys, all_b, scalings, strict=True)]
        dlow = dlows[0] if count == 1 else torch.cat(dlows, 1)  # (N, all R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dys, codes, ctx.how)
            dx = dx.addmm_(dlow, a).view(*grads[0].shape[:-1], -1)  # (..., I)
        all_da = matmul_tn(dlow, flat).split([low.shape[1] for low in lows])  # (R, I)
        found: list[Tensor | None] = [dx, None]
        for dy, low, da, scaling in zip(dys, lows, all_da, scalings, strict=True):
            found += [None, da, matmul_tn(low, dy).T.mul_(scaling)]  # dB is (O, R)
        return (*found, *(None for _ in codes))


def _input_gradient(
    dys: Sequence[Tensor], codes: Sequence[Tensor], how: Sequence[tuple[Unpack, float, int]]
) -> Tensor:
    """Return the sum of dy W over the linears, (N, I)."""
    total, start = None, 0
    for dy, (unpack, _, n_tensors) in zip(dys, how, strict=True):
        part = matmul_nt(dy, unpack(codes[start : start + n_tensors], dy.dtype).T)  # (N, I)
        start += n_tensors
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
