"""Merged weights W + B·A for all blocks in one pass over W: nothing else of its size is read.

With K adapters on each block's W their B and A follow one another; the merged weights are K times
the size of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, tl

ROWS, COLUMNS = 64, 128
"""Of the tile of W that one program merges."""
MAX_RANK = 512
"""Of all adapters of a projection together: (ROWS + COLUMNS) · 512 bf16 values are 197 kB of shared
memory, of which an H100 has 227."""


def add_low_rank(base: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """Changes `out` (L·K, O, I) in place: base + b (L·K, O, R) · a (L·K, R, I), rounded once.

    `base` is (L, O, I); K, the adapters on each, follows from the shapes.
    """
    # baddbmm copies `base` into `out` before it adds: one pass over W more than the kernel's.
    torch.baddbmm(base.repeat_interleave(len(b) // len(base), 0), b, a, out=out)  # (L·K, O, I)


@jit
def _add_low_rank_kernel(
    base, b, a, out, outputs, inputs, adapters,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    right = column[None, :] < inputs
    left = row[:, None] < outputs
    b_at = b + (layer * outputs + row[:, None]) * RANK + rank[None, :]
    a_at = a + (layer * RANK + rank[:, None]) * inputs + column[None, :]
    # The whole rank at once: it is small, so there is no loop over the reduced dimension.
    low = tl.dot(tl.load(b_at, mask=left, other=0.0), tl.load(a_at, mask=right, other=0.0))
    at = (layer * outputs + row[:, None]) * inputs + column[None, :]
    # The K adapters of a block follow one another and share its base.
    base_at = (layer // adapters * outputs + row[:, None]) * inputs + column[None, :]
    inside = left & right
    # Added in fp32, so that the merged weight is rounded once.
    total = tl.load(base + base_at, mask=inside, other=0.0).to(tl.float32) + low
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add_low_rank_triton(base: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """The fast twin of `add_low_rank`; R is a power of two from 16 on, as tl.dot wants.

    Agrees within one rounding of bf16. Ranks above MAX_RANK are left to it.
    """
    if b.shape[2] > MAX_RANK:
        add_low_rank(base, b, a, out)
        return
    layers, outputs, inputs = out.shape
    adapters = layers // len(base)
    grid = (-(-inputs // COLUMNS), -(-outputs // ROWS), layers)
    _add_low_rank_kernel[grid](
        base, b, a, out, outputs, inputs, adapters, RANK=b.shape[2], ROWS=ROWS, COLUMNS=COLUMNS
    )  # fmt: skip
