"""Rotary embedding of queries and keys, in place in the fused q/k/v tensor, and its gradient.

The layout is Hugging Face's: dimension d is paired with d + D/2 (arXiv 2104.09864). The gradient is
the rotation by the negative angle; it reads the three gradients that attention returns and writes
them side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

RotaryTables = tuple[Tensor, Tensor]
"""Cosine and sine, each (N, R/2) for R rotated dimensions, fp32 or wider."""


def rotate_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, width: int | None = None
) -> None:
    """Changes `qkv` (N, W) in place: its first `n_heads` heads are rotated.

    `cos` and `sin` are (N, R/2): of each head's `width` dimensions the first R are rotated; None:
    all of them. Heads lie side by side.
    """
    half = cos.shape[1]
    width = width or 2 * half
    whole = qkv[:, : n_heads * width].unflatten(1, (n_heads, width))  # (N, heads, D)
    heads = whole[..., : 2 * half].unflatten(2, (2, half))  # (N, heads, 2, R/2)
    first, second = heads.to(cos.dtype).unbind(2)  # each (N, heads, R/2)
    c, s = cos[:, None], sin[:, None]
    # Both halves are read before either is written: each result needs both.
    heads.copy_(torch.stack((first * c - second * s, second * c + first * s), 2))


def gather_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor
) -> None:
    """Changes `out` (N, W) in place: dq and dk, their rotation undone, and dv, side by side.

    The gradients are (N, heads, D) with any stride between tokens and heads; without `cos` nothing
    is rotated.
    """
    flat = torch.cat([d.flatten(1) for d in (dq, dk, dv)], 1)  # (N, W)
    out.copy_(flat)
    if cos is not None and sin is not None:
        rotate_heads(out, cos, -sin, dq.shape[1] + dk.shape[1], dq.shape[2])


@jit
def _rotate_kernel(
    qkv, cos, sin, qkv_stride, heads,
    WIDTH: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # Powers of two, as Triton's ranges must be; masked beyond the half and beyond `heads`.
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)
    real = lane < HALF
    c = tl.load(cos + row * HALF + lane, mask=real, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + lane, mask=real, other=0.0)[None, :]
    at = qkv + row * qkv_stride + head[:, None] * WIDTH + lane[None, :]
    inside = (head[:, None] < heads) & real[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    tl.store(at, (first * c - second * s).to(kind), mask=inside)
    tl.store(at + HALF, (second * c + first * s).to(kind), mask=inside)


def rotate_heads_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, width: int | None = None
) -> None:
    """The fast twin of `rotate_heads`; within one rounding of bf16."""
    rows, half = cos.shape
    _rotate_kernel[(rows,)](
        qkv, cos, sin, row_stride(qkv), n_heads, WIDTH=width or 2 * half, HALF=half,
        LANES=next_power_of_2(half), HEADS=next_power_of_2(n_heads),
    )  # fmt: skip


@jit
def _gather_part(
    source, out, c, s, row, token_stride, head_stride, heads, first_head,
    ROTATES: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)
    inside = (head[:, None] < heads) & (lane < HALF)[None, :]
    at = source + row * token_stride + head[:, None] * head_stride + lane[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if ROTATES:
        rotated = first * c + second * s  # sine's sign is flipped: the inverse rotation
        second = second * c - first * s
        first = rotated
    to = out + (first_head + head[:, None]) * WIDTH + lane[None, :]
    kind = out.dtype.element_ty
    tl.store(to, first.to(kind), mask=inside)
    tl.store(to + HALF, second.to(kind), mask=inside)


@jit
def _copy_rest(
    source, out, row, token_stride, head_stride, heads, first_head,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store the dimensions of each head from FIRST on, which are not rotated."""
    lane = FIRST + tl.arange(0, LANES)
    head = tl.arange(0, HEADS)
    inside = (head[:, None] < heads) & (lane < WIDTH)[None, :]
    at = source + row * token_stride + head[:, None] * head_stride + lane[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    to = out + (first_head + head[:, None]) * WIDTH + lane[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)


@jit
def _gather_kernel(
    dq, dk, dv, cos, sin, out, q_token, q_head, k_token, k_head, v_token, v_head, out_stride,
    heads, shared, ROTATES: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, ALL_LANES: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < HALF
    c = tl.load(cos + row * HALF + lane, mask=real, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + lane, mask=real, other=0.0)[None, :]
    to = out + row * out_stride
    _gather_part(dq, to, c, s, row, q_token, q_head, heads, 0, ROTATES, WIDTH, HALF, LANES, HEADS)
    _gather_part(
        dk, to, c, s, row, k_token, k_head, shared, heads, ROTATES, WIDTH, HALF, LANES, SHARED
    )
    if 2 * HALF < WIDTH:
        _copy_rest(dq, to, row, q_token, q_head, heads, 0, 2 * HALF, WIDTH, ALL_LANES, HEADS)
        _copy_rest(dk, to, row, k_token, k_head, shared, heads, 2 * HALF, WIDTH, ALL_LANES, SHARED)
    _copy_rest(dv, to, row, v_token, v_head, shared, heads + shared, 0, WIDTH, ALL_LANES, SHARED)


def gather_gradients_triton(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor
) -> None:
    """The fast twin of `gather_gradients`; within one rounding of bf16."""
    rows, heads, width = dq.shape
    shared = dk.shape[1]
    half = width // 2 if cos is None else cos.shape[1]
    # Without a rotation the kernel loads no tables' values that it uses, but needs pointers.
    tables = (dq, dq) if cos is None or sin is None else (cos, sin)
    for gradient in (dq, dk, dv):
        assert gradient.stride(-1) == 1, "a head's columns must lie side by side"
    _gather_kernel[(rows,)](
        dq, dk, dv, *tables, out, *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
        row_stride(out), heads, shared, ROTATES=cos is not None, WIDTH=width, HALF=half,
        LANES=next_power_of_2(half), ALL_LANES=next_power_of_2(width),
        HEADS=next_power_of_2(heads), SHARED=next_power_of_2(shared),
    )  # fmt: skip
