"""Unpacking of nf4 weights in one pass on a GPU, the fast twin of `lora.kernels.nf4.unpack_nf4`.

A program takes some cells: runs of values that lie in one row and in one block, and so have one
scale. Each byte of codes is read once, each value written once, and nothing else of the weight's
size is touched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora.kernels.nf4 import (
    GROUP,
    Nf4Tensor,
    dynamic_levels,
    nf4_pairs,
    unpack_nf4,
    unpack_nf4_rows,
)
from lora.kernels.step.jit import HAS_TRITON, jit, row_stride, tl
from lora.kernels.unpack.tracing import is_traced_as_on_gpu

MAX_CELL = 128
"""Values of a cell at most: longer blocks are several cells with the same scale."""
VALUES = 4096
"""Of one program."""
WARPS = 8


@jit
def _unpack_kernel(
    codes, scales, group_scales, offset, pairs, scale_levels, ids, out,
    out_stride, cells_per_row, cells_per_block, first_row, n_cells, HAS_IDS: tl.constexpr,
    IS_DOUBLE: tl.constexpr, GROUP: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = own < n_cells
    row, in_row = own // cells_per_row, own % cells_per_row
    if HAS_IDS:
        source = tl.load(ids + row, mask=inside, other=0).to(tl.int32)
    else:
        source = first_row + row
    cell = source * cells_per_row + in_row
    block = cell // cells_per_block
    if IS_DOUBLE:
        scale_code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(group_scales + block // GROUP, mask=inside, other=0.0)
        scale = tl.load(scale_levels + scale_code) * group + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    at = cell.to(tl.int64)[:, None] * (CELL // 2) + tl.arange(0, CELL // 2)[None, :]
    code = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    # A byte's two values follow one another, the one in its high four bits first.
    code = tl.interleave(code >> 4, code & 15)  # (CELLS, CELL)
    # From shared memory, where the levels are in as many banks: half as long again from the cache
    # (benchmarks/nf4_unpack.py). The first 16 pairs end in the 16 levels.
    levels = tl.load(pairs + 2 * tl.arange(0, 16) + 1)
    level = tl.reshape(tl.gather(levels, tl.reshape(code, [CELLS * CELL]), 0), [CELLS, CELL])
    values = (level * scale[:, None]).to(out.dtype.element_ty)
    start = out + row.to(tl.int64) * out_stride + in_row * CELL
    tl.store(start[:, None] + tl.arange(0, CELL)[None, :], values, mask=inside[:, None])


def unpack_nf4_triton(packed: Nf4Tensor, out: Tensor, first_row: int = 0) -> None:
    """The fast twin of `unpack_nf4`, to the bit; `out` may have gaps between its rows."""
    _launch(packed, out, first_row, None)


def unpack_nf4_rows_triton(packed: Nf4Tensor, ids: Tensor, out: Tensor) -> None:
    """The fast twin of `unpack_nf4_rows`, to the bit."""
    _launch(packed, out, 0, ids)


def _launch(packed: Nf4Tensor, out: Tensor, first_row: int, ids: Tensor | None) -> None:
    rows, inputs = out.shape
    # Powers of two, of which the row is a multiple: no cell lies in two rows or in two blocks.
    cell = min(math.gcd(inputs, packed.block), MAX_CELL)
    per_row, cells = inputs // cell, max(1, VALUES // cell)
    n_cells, codes = rows * per_row, packed.codes
    _unpack_kernel[(-(-n_cells // cells),)](
        codes, packed.scales, packed.group_scales, packed.offset,
        nf4_pairs(packed.codes), dynamic_levels(packed.codes), codes if ids is None else ids, out,
        row_stride(out), per_row, packed.block // cell, first_row, n_cells,
        HAS_IDS=ids is not None, IS_DOUBLE=packed.is_double, GROUP=GROUP, CELL=cell, CELLS=cells,
        num_warps=WARPS,
        # A product and a sum that are fused round once, where torch rounds twice.
        enable_fp_fusion=False,
    )  # fmt: skip


def unpack_nf4_on_device(packed: Nf4Tensor, out: Tensor, first_row: int = 0) -> None:
    """Changes `out` (rows, I) in place: by the kernel on a GPU, where Triton is installed."""
    if is_traced_as_on_gpu():
        return
    if not (HAS_TRITON and out.is_cuda):
        unpack_nf4(packed, out, first_row)
        return
    with torch.cuda.device_of(out):  # a kernel is launched on the current device
        unpack_nf4_triton(packed, out, first_row)


def unpack_nf4_rows_on_device(packed: Nf4Tensor, ids: Tensor, out: Tensor) -> None:
    """Changes `out` (N, I) in place: the rows `ids` (N,), by the kernel on a GPU."""
    if is_traced_as_on_gpu():
        return
    if not (HAS_TRITON and out.is_cuda):
        unpack_nf4_rows(packed, ids, out)
        return
    with torch.cuda.device_of(out):
        unpack_nf4_rows_triton(packed, ids, out)
