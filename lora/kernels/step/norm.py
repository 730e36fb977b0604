"""Residual addition and RMS norm (arXiv 1910.07467) as one operation, and its gradient as another.

Each Triton kernel has its plain twin here. The sum is rounded to the dtype of its tensors,
everything after it is fp32 (fp64 for fp64) and rounded once. What is added may go through a norm
of its own and a factor first (`Branch`): then both norms and the sum are still one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.fp8 import Fp8Rows, fp8_tensors, store_codes, warps_of
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

ROWS_A_PARTIAL = 64
"""Rows that one program sums into its partial gradient of the norm's weight."""


@dataclass(frozen=True)
class Branch:
    """What a branch's output goes through before it is added to the residual stream."""

    weight: Tensor | None = None
    """(C,), of an RMS norm; None: no norm."""
    rstd: Tensor | None = None
    """(N,): 1 / rms of the branch's output, of that norm."""
    factor: float = 1.0
    """Multiplied in last."""


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
    rstd: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    branch: Branch | None = None,
    offset: bool = False,
) -> None:
    """Changes `total`, `normed` (N, C), `rstd` (N,) and that of `branch` in place.

    total = residual + delta; rstd = 1 / rms(total); normed = total · rstd · weight. `total` may be
    `residual` itself. `fp8_out` also receives `normed`, in fp8. `delta` first goes through
    `branch`. Without a `weight` there is no norm: `normed` is a copy of `total`. `offset`: norms
    multiply by 1 + weight.
    """
    kind = torch.promote_types(residual.dtype, torch.float32)
    if delta is not None and branch is not None:
        delta = _through_branch(delta, branch, eps, kind, offset=offset)
    x = residual if delta is None else residual + delta  # (N, C)
    total.copy_(x)
    if weight is None or rstd is None:
        normed.copy_(x)
    else:
        # The rounded sum, as the backward pass will read it, so that rstd belongs to those values.
        wide = x.to(kind)
        rstd.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
        normed.copy_(wide * rstd[:, None] * _gains(weight, kind, offset=offset))
    if fp8_out is not None:
        fp8_out.write(normed)


def norm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    d_residual: Tensor | None,
    out: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    branch: Branch | None = None,
    d_branch: Tensor | None = None,
    offset: bool = False,
) -> None:
    """Changes `out` (N, C) in place: the gradient of x, through the norm and along the residual.

    `d_residual` (N, C) is the gradient of the residual stream after the norm's block; None: none.
    `out` may be x itself; None: only `d_branch` is wanted. Without a `weight` there is no norm.
    `d_branch` (N, C), the output of the branch that was added to make x, becomes its own gradient,
    through `branch`. `fp8_out` also receives, in fp8, `d_branch` where there is one, else `out`.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    grad = d_normed.to(kind)
    if weight is not None and rstd is not None:
        grad = _through_norm_backward(grad, x, rstd, weight, offset=offset)
    # Rounded: what the branch reads is what the residual stream carries on.
    total = (grad if d_residual is None else grad + d_residual.to(kind)).to(x.dtype)
    if out is not None:
        out.copy_(total)
    if branch is not None and d_branch is not None:
        grad = total.to(kind) * branch.factor
        if branch.weight is not None and branch.rstd is not None:
            own = branch.rstd, branch.weight
            grad = _through_norm_backward(grad, d_branch, *own, offset=offset)
        d_branch.copy_(grad)
    if fp8_out is not None:
        fp8_out.write(total if d_branch is None else d_branch)


def _through_branch(
    delta: Tensor, branch: Branch, eps: float, kind: torch.dtype, *, offset: bool
) -> Tensor:
    """Return what is added (N, C), rounded after the norm and after the factor."""
    if branch.weight is not None and branch.rstd is not None:
        wide = delta.to(kind)
        branch.rstd.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
        gains = _gains(branch.weight, kind, offset=offset)
        delta = (wide * branch.rstd[:, None] * gains).to(delta.dtype)
    return delta if branch.factor == 1 else delta * branch.factor


def _through_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, offset: bool
) -> Tensor:
    """Return the gradient of a norm's input x (N, C), from that of its output."""
    unit = x.to(grad.dtype) * rstd[:, None]  # (N, C), recomputed: cheaper than storing it
    scaled = grad * _gains(weight, grad.dtype, offset=offset)  # (N, C)
    return (scaled - unit * (unit * scaled).mean(-1, keepdim=True)) * rstd[:, None]


def _gains(weight: Tensor, kind: torch.dtype, *, offset: bool) -> Tensor:
    # Added in the wide dtype: 1 + weight in bf16 would lose the weight's last bits.
    return weight.to(kind) + 1 if offset else weight.to(kind)


def norm_weight_gradient(d_normed: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of the norm's weight, (C,) in the dtype of `rstd`."""
    kind = rstd.dtype
    return (d_normed.to(kind) * x.to(kind) * rstd[:, None]).sum(0)


@jit
def _load_gains(weight, columns, inside, OFFSET: tl.constexpr):
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        gains += 1
    return gains


@jit
def _add_norm_kernel(
    residual, delta, weight, total, normed, rstd, codes, scales, factors,
    branch_weight, branch_rstd,
    residual_stride, delta_stride, total_stride, normed_stride, width, eps, branch_factor,
    HAS_DELTA: tl.constexpr, CODES: tl.constexpr, HAS_FACTORS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BRANCH_NORM: tl.constexpr, HAS_BRANCH_FACTOR: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64-bit, as in all kernels here: rows · width exceeds 32 bits with long batches of wide models.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0)
        kind = added.dtype
        if HAS_BRANCH_NORM:
            wide = added.to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(wide * wide) / width + eps)
            tl.store(branch_rstd + row, scale)
            gains = _load_gains(branch_weight, columns, inside, OFFSET)
            added = (wide * scale * gains).to(kind)
        if HAS_BRANCH_FACTOR:
            added = (added.to(tl.float32) * branch_factor).to(kind)
        # In the tensors' dtype, as torch adds a residual: the sum is what later blocks see.
        x = x + added
    tl.store(total + row * total_stride + columns, x, mask=inside)
    y = x
    if HAS_NORM:
        wide = x.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(wide * wide) / width + eps)
        tl.store(rstd + row, scale)
        gains = _load_gains(weight, columns, inside, OFFSET)
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
    weight: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
    rstd: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    branch: Branch | None = None,
    offset: bool = False,
) -> None:
    """The fast twin of `add_norm`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = residual.shape
    block = next_power_of_2(width)  # a whole row in one program, so that it is read once
    other = residual if delta is None else delta
    _add_norm_kernel[(rows,)](
        residual, other, _or(weight, residual), total, normed, _or(rstd, total),
        *fp8_tensors(fp8_out, total), *_branch_tensors(branch, total),
        row_stride(residual), row_stride(other), row_stride(total), row_stride(normed), width, eps,
        1.0 if branch is None else branch.factor,
        HAS_DELTA=delta is not None, CODES=fp8_out is not None,
        HAS_FACTORS=fp8_out is not None and fp8_out.factors is not None,
        HAS_NORM=weight is not None, **_branch_switches(branch), OFFSET=offset,
        BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return `tensor`, or `other` where a kernel needs a pointer that it leaves alone."""
    return other if tensor is None else tensor


def _branch_tensors(branch: Branch | None, other: Tensor) -> tuple[Tensor, Tensor]:
    if branch is None:
        return other, other
    return _or(branch.weight, other), _or(branch.rstd, other)


def _branch_switches(branch: Branch | None) -> dict[str, bool]:
    return {
        "HAS_BRANCH_NORM": branch is not None and branch.weight is not None,
        "HAS_BRANCH_FACTOR": branch is not None and branch.factor != 1,
    }


@jit
def _through_norm(dy, x, gains, scale, width):
    """Return the gradient of a norm's input `x`, a row in fp32, from that of its output."""
    unit = x * scale
    dy = dy * gains
    return (dy - unit * (tl.sum(unit * dy) / width)) * scale


@jit
def _norm_backward_kernel(
    d_normed, x, rstd, weight, d_residual, out, codes, scales, factors,
    branch_weight, branch_rstd, d_branch,
    d_normed_stride, x_stride, d_residual_stride, out_stride, d_branch_stride, width,
    branch_factor,
    HAS_RESIDUAL: tl.constexpr, CODES: tl.constexpr, HAS_FACTORS: tl.constexpr,
    HAS_NORM: tl.constexpr, WRITES_OUT: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_BRANCH_NORM: tl.constexpr, HAS_BRANCH_FACTOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    kind = x.dtype.element_ty
    grad = tl.load(d_normed + row * d_normed_stride + columns, mask=inside, other=0.0)
    grad = grad.to(tl.float32)
    if HAS_NORM:
        value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gains = _load_gains(weight, columns, inside, OFFSET)
        grad = _through_norm(grad, value, gains, tl.load(rstd + row), width)
    if HAS_RESIDUAL:
        beside = tl.load(d_residual + row * d_residual_stride + columns, mask=inside, other=0.0)
        grad += beside.to(tl.float32)
    y = grad.to(kind)
    if WRITES_OUT:
        # `out` may be x: this program alone reads the row, and has read it by now.
        tl.store(out + row * out_stride + columns, y, mask=inside)
    if HAS_BRANCH:
        grad = y.to(tl.float32)
        if HAS_BRANCH_FACTOR:
            grad = grad * branch_factor
        branch_at = d_branch + row * d_branch_stride + columns
        if HAS_BRANCH_NORM:
            value = tl.load(branch_at, mask=inside, other=0.0).to(tl.float32)
            gains = _load_gains(branch_weight, columns, inside, OFFSET)
            grad = _through_norm(grad, value, gains, tl.load(branch_rstd + row), width)
        y = grad.to(kind)
        tl.store(branch_at, y, mask=inside)
    if CODES:
        codes_at = codes + row * width + columns
        wide = y.to(tl.float32)
        store_codes(wide, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def norm_backward_triton(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    d_residual: Tensor | None,
    out: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    branch: Branch | None = None,
    d_branch: Tensor | None = None,
    offset: bool = False,
) -> None:
    """The fast twin of `norm_backward`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = x.shape
    block = next_power_of_2(width)
    beside, total, by_branch = _or(d_residual, x), _or(out, x), _or(d_branch, x)
    _norm_backward_kernel[(rows,)](
        d_normed, x, _or(rstd, x), _or(weight, x), beside, total, *fp8_tensors(fp8_out, x),
        *_branch_tensors(branch, x), by_branch,
        row_stride(d_normed), row_stride(x), row_stride(beside), row_stride(total),
        row_stride(by_branch), width, 1.0 if branch is None else branch.factor,
        HAS_RESIDUAL=d_residual is not None, CODES=fp8_out is not None,
        HAS_FACTORS=fp8_out is not None and fp8_out.factors is not None,
        HAS_NORM=weight is not None, WRITES_OUT=out is not None,
        HAS_BRANCH=branch is not None and d_branch is not None, **_branch_switches(branch),
        OFFSET=offset, BLOCK=block, num_warps=warps_of(block),
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
