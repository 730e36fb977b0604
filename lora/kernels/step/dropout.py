"""Dropout whose mask is a function of a seed and an index, so that it is recomputed, never stored.

The mask is a counter hashed to 32 bits: the same on every device, in both twins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, row_stride, tl

BLOCK_COLUMNS = 1024
_MASK = 0xFFFFFFFF
# 2³² / golden ratio, to spread layers, and multipliers of a 32-bit integer hash.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def keep_mask(
    seed: Tensor, layer: int, rows: int, width: int, p: float, first_row: int = 0
) -> Tensor:
    """Return (rows, width) bool, true with probability 1 − `p`; `seed` is () int64.

    The rows are those from `first_row` on of a larger mask.
    """
    index = torch.arange(rows * width, device=seed.device).view(rows, width) + first_row * width
    # int64 masked to 32 bits: torch's uint32 lacks most operations.
    x = (index + (seed + layer * _GOLDEN) * _FIRST) & _MASK  # (rows, width)
    for shift, factor in ((16, _FIRST), (15, _SECOND)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    x = x ^ (x >> 16)
    return x >= int(p * 2**32)


def drop(x: Tensor, out: Tensor, seed: Tensor, layer: int, p: float, first_row: int = 0) -> None:
    """Changes `out` (N, I) in place: `x` / (1 − p) where the mask keeps it, 0 elsewhere."""
    mask = keep_mask(seed, layer, len(x), x.shape[1], p, first_row)
    out.copy_(torch.where(mask, x * (1 / (1 - p)), 0))


def add_dropped(
    low: Tensor, out: Tensor, seed: Tensor, layer: int, p: float, first_row: int = 0
) -> None:
    """Changes `out` (N, I) in place: adds the gradient `low` (N, I) through `drop`'s mask."""
    mask = keep_mask(seed, layer, len(low), low.shape[1], p, first_row)
    out.add_(torch.where(mask, low * (1 / (1 - p)), 0))


@jit
def _keeps(seed, layer, row, columns, width, threshold):
    # Tensors, not literals: Triton types literals below 2³² with 32 bits, and products would wrap.
    golden = tl.full([], 0x9E3779B9, tl.int64)
    first = tl.full([], 0x7FEB352D, tl.int64)
    second = tl.full([], 0x846CA68B, tl.int64)
    mask = tl.full([], 0xFFFFFFFF, tl.int64)
    x = (row * width + columns + (tl.load(seed) + layer * golden) * first) & mask
    x = ((x ^ (x >> 16)) * first) & mask
    x = ((x ^ (x >> 15)) * second) & mask
    x = x ^ (x >> 16)
    return x >= threshold


@jit
def _drop_kernel(
    x, out, seed, x_stride, out_stride, layer, first_row, width, threshold, factor,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    keeps = _keeps(seed, layer, row + first_row, columns, width, threshold)
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * factor
    value = tl.where(keeps, value, 0.0)  # not a product with the mask: 0 · ∞ would be NaN
    at = out + row * out_stride + columns
    if ADDS:
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, value.to(out.dtype.element_ty), mask=inside)


def drop_triton(
    x: Tensor, out: Tensor, seed: Tensor, layer: int, p: float, first_row: int = 0
) -> None:
    """The fast twin of `drop`: the same mask, values within one rounding of bf16."""
    _launch(x, out, seed, layer, p, first_row, adds=False)


def add_dropped_triton(
    low: Tensor, out: Tensor, seed: Tensor, layer: int, p: float, first_row: int = 0
) -> None:
    """The fast twin of `add_dropped`: the same mask, values within one rounding of bf16."""
    _launch(low, out, seed, layer, p, first_row, adds=True)


def _launch(
    x: Tensor, out: Tensor, seed: Tensor, layer: int, p: float, first_row: int, *, adds: bool
) -> None:
    rows, width = x.shape
    _drop_kernel[(rows, -(-width // BLOCK_COLUMNS))](
        x, out, seed, row_stride(x), row_stride(out), layer, first_row, width,
        int(p * 2**32), 1 / (1 - p), ADDS=adds, BLOCK=BLOCK_COLUMNS,
    )  # fmt: skip
