"""One linear with K adapters: all rows meet one weight, and each adapter's rows its A and B.

`stacked_product` is three products; its fast twin is one kernel, which makes x · A while it goes
through x for x · W and adds the low-rank part before it writes: faster where launches count more
than arithmetic, in narrow models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.jit import jit, row_stride, tl, triton

ROWS, COLUMNS, DEPTH = 128, 64, 64
WARPS, STAGES = 4, 3


def stacked_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    low: Tensor,
    out: Tensor,
) -> None:
    """Changes `low` and `out` in place: x · first, and x · weight + bias + low · second.

    `x` is (K, N, I), `weight` (I, O), `bias` (O,), `first` (K, I, R), `second` (K, R, O), `low`
    (K, N, R) and `out` (K, N, O). x, low and out may lie among other columns; the rows of an
    adapter follow those of the one before.
    """
    torch.bmm(x, first, out=low)
    rows, all_rows = x.flatten(0, 1), out.flatten(0, 1)  # views: (K·N, I), (K·N, O)
    if bias is None:
        torch.mm(rows, weight, out=all_rows)
    else:
        torch.addmm(bias, rows, weight, out=all_rows)
    out.baddbmm_(low, second)


@jit
def _stacked_kernel(
    x, weight, bias, first, second, low, out, count, inputs, outputs,
    x_row, weight_in, weight_out, first_adapter, first_in, first_rank,
    second_adapter, second_rank, second_out, low_row, out_row,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = (row < count)[:, None], (column < outputs)[None, :]
    place = (adapter * count + row)[:, None]  # among the rows of all adapters
    x_at = x + place * x_row + depth[None, :]
    weight_at = weight + depth[:, None] * weight_in + column[None, :] * weight_out
    first_at = first + adapter * first_adapter
    first_at += depth[:, None] * first_in + rank[None, :] * first_rank
    wide = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    narrow = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(0, inputs, DEPTH):
        left = depth < inputs - start
        part = tl.load(x_at, mask=is_row & left[None, :], other=0.0)
        wide = tl.dot(part, tl.load(weight_at, mask=left[:, None] & is_column, other=0.0), wide)
        narrow = tl.dot(part, tl.load(first_at, mask=left[:, None], other=0.0), narrow)
        x_at += DEPTH
        weight_at += DEPTH * weight_in
        first_at += DEPTH * first_in
    kind = out.dtype.element_ty
    rounded = narrow.to(kind)
    second_at = second + adapter * second_adapter
    second_at += rank[:, None] * second_rank + column[None, :] * second_out
    wide = tl.dot(rounded, tl.load(second_at, mask=is_column, other=0.0), wide)
    if HAS_BIAS:
        wide += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place * out_row + column[None, :], wide.to(kind), mask=is_row & is_column)
    if tl.program_id(0) == 0:
        tl.store(low + place * low_row + rank[None, :], rounded, mask=is_row)


def fused_stacked_product_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    low: Tensor,
    out: Tensor,
    blocks: tuple[int, int, int, int, int] = (ROWS, COLUMNS, DEPTH, WARPS, STAGES),
) -> None:
    """The fast twin of `stacked_product`; R a power of two from 16 on; one rounding of bf16.

    `blocks`: rows, columns and depth of a tile, warps and stages.
    """
    adapters, count, inputs = x.shape
    outputs, rank = out.shape[2], low.shape[2]
    rows, columns, depth, warps, stages = blocks
    grid = (triton.cdiv(outputs, columns), triton.cdiv(count, rows), adapters)
    _stacked_kernel[grid](
        x, weight, x if bias is None else bias, first, second, low, out, count, inputs, outputs,
        row_stride(x[0]), *weight.stride(), *first.stride(), *second.stride(),
        row_stride(low[0]), row_stride(out[0]), HAS_BIAS=bias is not None, RANK=rank,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
