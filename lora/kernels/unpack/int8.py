"""Unpacking of int8 rows in one pass on a GPU, the fast twin of `lora.kernels.int8.unpack_int8`."""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.int8 import unpack_int8
from lora.kernels.step.jit import HAS_TRITON, jit, row_stride, tl
from lora.kernels.unpack.tracing import is_traced_as_on_gpu

COLUMNS = 2048
"""Values of one program, all in one row: eight a thread."""
WARPS = 8


@jit
def _unpack_kernel(codes, scales, out, codes_stride, out_stride, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    code = tl.load(codes + row * codes_stride + column, mask=inside, other=0)
    value = code.to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def unpack_int8_triton(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """The fast twin of `unpack_int8`, to the bit; `out` may have gaps between its rows."""
    rows, width = out.shape
    _unpack_kernel[(rows, -(-width // COLUMNS))](
        codes, scales.contiguous(), out, row_stride(codes), row_stride(out), width,
        COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def unpack_int8_on_device(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Changes `out` (O, I) in place: by the kernel on a GPU, where Triton is installed."""
    if is_traced_as_on_gpu():
        return
    if not (HAS_TRITON and out.is_cuda):
        unpack_int8(codes, scales, out)
        return
    with torch.cuda.device_of(out):  # a kernel is launched on the current device
        unpack_int8_triton(codes, scales, out)
