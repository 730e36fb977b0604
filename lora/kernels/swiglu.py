"""silu(gate) · up (arXiv 2002.05202) on gate and up side by side in one tensor, and its gradient.

The gradient is written over its input: no concatenation, no second tensor of twice the width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.jit import jit, row_stride, tl

BLOCK_COLUMNS = 1024


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Changes `out` (N, F) in place: silu(gate) · up of `gate_up` (N, 2F), gate first."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)  # each (N, F)
    out.copy_(F.silu(gate) * up)


def swiglu_backward(gate_up: Tensor, d_out: Tensor, out: Tensor | None) -> None:
    """Changes `gate_up` (N, 2F) in place: it becomes its own gradient; `out` is made again.

    `d_out` is (N, F); `out` (N, F) takes silu(gate) · up, for those who did not keep it.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)  # each (N, F)
    sigmoid, dy = gate.sigmoid(), d_out.to(wide)
    if out is not None:
        out.copy_(gate * sigmoid * up)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up.copy_(torch.cat((d_gate, dy * gate * sigmoid), -1))


@jit
def _swiglu_kernel(gate_up, out, gate_up_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + columns, y.to(out.dtype.element_ty), mask=inside)


def swiglu_triton(gate_up: Tensor, out: Tensor) -> None:
    """The fast twin of `swiglu`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = out.shape
    grid = (rows, -(-width // BLOCK_COLUMNS))
    _swiglu_kernel[grid](
        gate_up, out, row_stride(gate_up), row_stride(out), width, BLOCK=BLOCK_COLUMNS
    )


@jit
def _swiglu_backward_kernel(
    gate_up, d_out, out, gate_up_stride, d_out_stride, out_stride, width,
    KEEPS_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(d_out + row * d_out_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if KEEPS_OUT:
        y = (silu * up).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + columns, y, mask=inside)
    d_gate = dy * up * (sigmoid + silu * (1 - sigmoid))
    kind = gate_up.dtype.element_ty
    tl.store(gate_at, d_gate.to(kind), mask=inside)
    tl.store(gate_at + width, (dy * silu).to(kind), mask=inside)


def swiglu_backward_triton(gate_up: Tensor, d_out: Tensor, out: Tensor | None) -> None:
    """The fast twin of `swiglu_backward`; bf16, on a GPU: within one rounding of bf16."""
    rows, width = d_out.shape
    grid = (rows, -(-width // BLOCK_COLUMNS))
    kept = d_out if out is None else out
    _swiglu_backward_kernel[grid](
        gate_up, d_out, kept, row_stride(gate_up), row_stride(d_out), row_stride(kept), width,
        KEEPS_OUT=out is not None, BLOCK=BLOCK_COLUMNS,
    )  # fmt: skip
