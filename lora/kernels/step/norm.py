"""Residual addition and RMS norm (arXiv 1910.07467) as one operation, and its gradient as another.

Each Triton kernel has its plain twin here. The sum is rounded to the dtype of its tensors,
everything after it is fp32 (fp64 for fp64) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.fp8 import Fp8Rows, fp8_tensors, store_codes, warps_of
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

ROWS_A_PARTIAL = 64
"""Rows that one program sums into its partial gradient of the norm's weight."""


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    normed: Tensor,
    rstd: Tensor,
    fp8_out: Fp8Rows | None = None,
) -> None:
    """Changes `total`, `normed` (N, C) and `rstd` (N,) in place.

    total = residual + delta; rstd = 1 / rms(total); normed = total · rstd · weight. `total` may be
    `residual` itself. `fp8_out` also receives `normed`, in fp8.
    """
    x = residual if delta is None else residual + delta  # (N, C)
    total.copy_(x)
    # The rounded sum, as the backward pass will read it, so that rstd belongs to those values.
    wide = x.to(rstd.dtype)
    rstd.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
    normed.copy_(wide * rstd[:, None] * weight.to(rstd.dtype))
    if fp8_out is not None:
        fp8_out.write(normed)


def norm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d_residual: Tensor | None,
    out: Tensor,
    fp8_out: Fp8Rows | None = None,
) -> None:
    """Changes `out` (N, C) in place: the gradient of x, through the norm and along the residual.

    `d_residual` (N, C) is the gradient of the residual stream after the norm's block; None: none.
    `out` may be x itself. `fp8_out` also receives `out`, in fp8.
    """
    kind = rstd.dtype
    unit = x.to(kind) * rstd[:, None]  # (N, C), recomputed: cheaper than storing it
    scaled = d_normed.to(kind) * weight.to(kind)  # (N, C)
    grad = (scaled - unit * (unit * scaled).mean(-1, keepdim=True)) * rstd[:, None]
    out.copy_(grad if d_residual is None else grad + d_residual.to(kind))
    if fp8_out is not None:
        fp8_out.write(out)


def norm_weight_gradient(d_normed: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of the norm's weight, (C,) in the dtype of `rstd`."""
    kind = rstd.dtype
    return (d_normed.to(kind) * x.to(kind) * rstd[:, None]).sum(0)


@jit
def _add_norm_kernel(
    residual, delta, weight, total, normed, rstd, codes, scales, factors,
    residual_stride, delta_stride, total_stride, normed_stride, width, eps,
    HAS_DELTA: tl.constexpr, CODES: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64-bit, as in all kernels here: rows · width exceeds 32 bits with long batches of wide models.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        # In the tensors' dtype, as torch adds a residual: the sum is what later blocks see.
        x = x + tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0)
    tl.store(total + row * total_stride + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    tl.store(rstd + row, scale)
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    y = (wide * scale * gains).to(normed.dtype.element_ty)
    tl.store(normed + row * normed_stride + columns, y, mask=inside)
    if CODES:
        codes_at = codes + row * width + columns
        # From the rounded y: the codes are then the same whether they are made here or later.
        wide = y.to(tl.float32)
        store_codes(wide, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def add_norm_triton(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    normed: Tensor,
    rstd: Tensor,
    fp8_out: Fp8Rows | None = None,
) -> None:
    """The fast twin of `add_norm`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = residual.shape
    block = next_power_of_2(width)  # a whole row in one program, so that it is read once
    other = residual if delta is None else delta
    _add_norm_kernel[(rows,)](
        residual, other, weight, total, normed, rstd, *fp8_tensors(fp8_out, rstd),
        row_stride(residual), row_stride(other), row_stride(total), row_stride(normed), width, eps,
        HAS_DELTA=delta is not None, CODES=fp8_out is not None,
        HAS_FACTORS=fp8_out is not None and fp8_out.factors is not None,
        BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


@jit
def _norm_backward_kernel(
    d_normed, x, rstd, weight, d_residual, out, codes, scales, factors,
    d_normed_stride, x_stride, d_residual_stride, out_stride, width,
    HAS_RESIDUAL: tl.constexpr, CODES: tl.constexpr, HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(rstd + row)
    unit = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
    dy = tl.load(d_normed + row * d_normed_stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy = dy * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    grad = (dy - unit * (tl.sum(unit * dy) / width)) * scale
    if HAS_RESIDUAL:
        beside = tl.load(d_residual + row * d_residual_stride + columns, mask=inside, other=0.0)
        grad += beside.to(tl.float32)
    y = grad.to(out.dtype.element_ty)
    # `out` may be x: this program alone reads the row, and has read it by now.
    tl.store(out + row * out_stride + columns, y, mask=inside)
    if CODES:
        codes_at = codes + row * width + columns
        wide = y.to(tl.float32)
        store_codes(wide, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def norm_backward_triton(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d_residual: Tensor | None,
    out: Tensor,
    fp8_out: Fp8Rows | None = None,
) -> None:
    """The fast twin of `norm_backward`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = x.shape
    block = next_power_of_2(width)
    beside = x if d_residual is None else d_residual
    _norm_backward_kernel[(rows,)](
        d_normed, x, rstd, weight, beside, out, *fp8_tensors(fp8_out, rstd),
        row_stride(d_normed), row_stride(x), row_stride(beside), row_stride(out), width,
        HAS_RESIDUAL=d_residual is not None, CODES=fp8_out is not None,
        HAS_FACTORS=fp8_out is not None and fp8_out.factors is not None,
        BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


@jit
def _norm_weight_kernel(
    d_normed, x, rstd, partial, d_normed_stride, x_stride, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # Columns stay in one program's registers while it walks down its rows.
    for offset in range(ROWS):
        row = program * ROWS + offset
        there = inside & (row < rows)
        unit = tl.load(x + row * x_stride + columns, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(d_normed + row * d_normed_stride + columns, mask=there, other=0.0)
        total += dy.to(tl.float32) * unit * tl.load(rstd + row, mask=row < rows, other=0.0)
    tl.store(partial + program * width + columns, total, mask=inside)


def norm_weight_gradient_triton(d_normed: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The fast twin of `norm_weight_gradient`; on a GPU, the sum in fp32: 1e-5."""
    rows, width = x.shape
    # Two stages without atomics: partial sums by program, then their sum in a fixed order.
    programs = -(-rows // ROWS_A_PARTIAL)
    partial = rstd.new_empty(programs, width)  # (programs, C), fp32
    block = next_power_of_2(width)
    _norm_weight_kernel[(programs,)](
        d_normed, x, rstd, partial, row_stride(d_normed), row_stride(x), rows, width,
        ROWS=ROWS_A_PARTIAL, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return partial.sum(0)  # (C,)
