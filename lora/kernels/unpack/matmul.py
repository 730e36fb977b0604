"""x Wᵀ over an nf4 weight: W is unpacked for the forward pass, and again for the backward one.

Under torch.compile it is one operation that the compiler does not look into. It would otherwise
see the same W unpacked twice, and keep it in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lora.kernels.nf4 import Nf4Tensor
from lora.kernels.unpack.nf4 import unpack_nf4_on_device


def nf4_linear(x: Tensor, packed: Nf4Tensor) -> Tensor:  # (..., I) -> (..., O)
    """Return x Wᵀ in the dtype of `x`; autograd saves codes and scales only."""
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.lora_lm.nf4_linear(x, *packed.tensors, packed.block)
        return compiled
    y: Tensor = _Nf4Linear.apply(x, packed.block, *packed.tensors)
    return y


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.block = block
        return _forward(x, *tensors, block=block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx = _backward(grads[0], *ctx.saved_tensors, block=ctx.block)
        return dx, None, None, None, None, None


def _forward(x: Tensor, *tensors: Tensor, block: int) -> Tensor:
    return F.linear(x, _unpacked(*tensors, block=block, dtype=x.dtype))


def _backward(dy: Tensor, *tensors: Tensor, block: int) -> Tensor:
    return dy @ _unpacked(*tensors, block=block, dtype=dy.dtype)


def unpacked_nf4(tensors: Sequence[Tensor], dtype: torch.dtype, *, block: int) -> Tensor:
    """Return W (O, I), of the tensors of an Nf4Tensor."""
    return _unpacked(*tensors, block=block, dtype=dtype)


def _unpacked(*tensors: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    codes, scales, group_scales, offset = tensors
    packed = Nf4Tensor(codes, scales, group_scales, offset, block)
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    unpack_nf4_on_device(packed, out)
    return out


@torch.library.custom_op("lora_lm::nf4_linear", mutates_args=())
def _linear_op(
    x: Tensor, codes: Tensor, scales: Tensor, group_scales: Tensor, offset: Tensor, block: int
) -> Tensor:
    return _forward(x, codes, scales, group_scales, offset, block=block)


@torch.library.custom_op("lora_lm::nf4_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor, codes: Tensor, scales: Tensor, group_scales: Tensor, offset: Tensor, block: int
) -> Tensor:
    return _backward(dy, codes, scales, group_scales, offset, block=block)


@_linear_op.register_fake
def _(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_backward_op.register_fake
def _(dy: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], 2 * codes.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.block = inputs[5]


@functools.partial(_linear_op.register_autograd, setup_context=_save)
def _(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.lora_lm.nf4_linear_backward(dy, *ctx.saved_tensors, ctx.block)
    return dx, None, None, None, None, None


@register_flop_formula([torch.ops.lora_lm.nf4_linear, torch.ops.lora_lm.nf4_linear_backward])
def _flops(x_shape: Any, codes_shape: Any, *others: Any, out_shape: Any = None, **more: Any) -> int:
    # Told, because what costs nothing the compiler computes again in the backward pass.
    rows = 2 * int(torch.Size(x_shape[:-1]).numel())
    return int(rows * codes_shape[0] * 2 * codes_shape[1])
