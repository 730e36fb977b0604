"""SwiGLU, silu(gate) · up (arXiv 2002.05202), on gate and up in one tensor, and its gradient.

GeGLU beside it: gelu(gate) · up, with GELU's tanh approximation (arXiv 1606.08415). Both are
gate · sigmoid(z) · up: z = gate in SiLU; in GELU twice the argument of the tanh, because
1 + tanh(a) = 2 sigmoid(2a).

The gradient is written over its input: no concatenation, no second tensor of twice the width. Where
results are also written in fp8, one program computes a whole row, whose largest value sets the
scale.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.step.fp8 import Fp8Rows, fp8_tensors, scale_of, store_codes, warps_of
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

BLOCK_COLUMNS = 1024
"""Of a row that one program computes; without fp8 a row has no common scale and can be split."""
MAX_BLOCK_IN_REGISTERS = 16384
"""Gradients of wider rows leave their program's registers: it takes them in chunks, twice."""
CHUNK_COLUMNS, CHUNK_WARPS = 4096, 8
"""Of such a row, at once."""
GELU_LINEAR = 2 * (2 / math.pi) ** 0.5
GELU_CUBIC = 0.044715 * GELU_LINEAR
"""z = GELU_LINEAR · gate + GELU_CUBIC · gate³."""


def swiglu(
    gate_up: Tensor, out: Tensor, fp8_out: Fp8Rows | None = None, *, gelu: bool = False
) -> None:
    """Changes `out` (N, F) in place: silu(gate) · up of `gate_up` (N, 2F), gate first.

    `fp8_out` also receives `out`, in fp8. `gelu`: GELU in place of SiLU.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)  # each (N, F)
    out.copy_((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up)
    if fp8_out is not None:
        fp8_out.write(out)


def swiglu_backward(
    gate_up: Tensor,
    d_out: Tensor,
    out: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    gelu: bool = False,
) -> None:
    """Changes `gate_up` (N, 2F) in place: it becomes its own gradient.

    `d_out` is (N, F). `out` (N, F), where it was not stored, is recomputed on the way: silu(gate) ·
    up. `fp8_out` also receives the gradient, in fp8.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)  # each (N, F)
    z, slope = _argument(gate, gelu=gelu)
    sigmoid, dy = z.sigmoid(), d_out.to(wide)  # each (N, F)
    if out is not None:  # before gate and up are overwritten
        out.copy_(gate * sigmoid * up)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid) * slope)  # (N, F)
    gate_up.copy_(torch.cat((d_gate, dy * gate * sigmoid), -1))
    if fp8_out is not None:
        fp8_out.write(gate_up)


def _argument(gate: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor | float]:
    """Return z (N, F), whose sigmoid multiplies the gate, and dz / dgate."""
    if not gelu:
        return gate, 1.0
    square = gate * gate
    return gate * (GELU_LINEAR + GELU_CUBIC * square), GELU_LINEAR + 3 * GELU_CUBIC * square


@jit
def _z(gate, GELU: tl.constexpr):
    if GELU:  # GELU_LINEAR, GELU_CUBIC: kernels read no globals
        gate = gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate)
    return gate


@jit
def _silu(gate, GELU: tl.constexpr):
    return gate * tl.sigmoid(_z(gate, GELU))


@jit
def _swiglu_kernel(
    gate_up, out, gate_up_stride, out_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    y = _silu(gate, GELU) * up
    tl.store(out + row * out_stride + columns, y.to(out.dtype.element_ty), mask=inside)


@jit
def _swiglu_row_kernel(
    gate_up, out, codes, scales, factors, gate_up_stride, out_stride, width,
    HAS_FACTORS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    y = (_silu(gate, GELU) * up).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, y, mask=inside)
    codes_at = codes + row * width + columns
    wide = y.to(tl.float32)  # the rounded values, as quantising `out` later would see them
    store_codes(wide, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def swiglu_triton(
    gate_up: Tensor, out: Tensor, fp8_out: Fp8Rows | None = None, *, gelu: bool = False
) -> None:
    """The fast twin of `swiglu`; bf16, on a GPU: agrees within one rounding of bf16."""
    rows, width = out.shape
    if fp8_out is not None:
        block = next_power_of_2(width)
        _swiglu_row_kernel[(rows,)](
            gate_up, out, *fp8_tensors(fp8_out, out), row_stride(gate_up), row_stride(out), width,
            HAS_FACTORS=fp8_out.factors is not None, GELU=gelu,
            BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
        return
    grid = (rows, -(-width // BLOCK_COLUMNS))
    _swiglu_kernel[grid](
        gate_up, out, row_stride(gate_up), row_stride(out), width, GELU=gelu, BLOCK=BLOCK_COLUMNS
    )


@jit
def _differentiate(
    gate_at, dy_at, out_at, width, inside, WRITES_OUT: tl.constexpr, GELU: tl.constexpr
):
    """Store the gradients of gate and up over them, and return both, rounded as they are stored."""
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
    kind = gate_at.dtype.element_ty
    sigmoid = tl.sigmoid(_z(gate, GELU))
    silu = gate * sigmoid
    if WRITES_OUT:  # free here: gate and up are in registers anyway
        y = (silu * up).to(out_at.dtype.element_ty)
        tl.store(out_at, y, mask=inside)
    slope = silu * (1 - sigmoid)
    if GELU:
        slope *= 1.5957691216057308 + 0.21406444881780073 * gate * gate
    d_gate = (dy * up * (sigmoid + slope)).to(kind)
    d_up = (dy * silu).to(kind)
    # Over gate and up, which this program alone reads, and has read by now.
    tl.store(gate_at, d_gate, mask=inside)
    tl.store(gate_at + width, d_up, mask=inside)
    return d_gate, d_up


@jit
def _times_factors(d_gate, d_up, factors_at, width, inside, HAS_FACTORS: tl.constexpr):
    """Return both halves of a row in fp32, from the rounded values, times their factors."""
    # As bf16 both halves stay in registers until the row's scale is known.
    left, right = d_gate.to(tl.float32), d_up.to(tl.float32)
    if HAS_FACTORS:
        left *= tl.load(factors_at, mask=inside, other=0.0)
        right *= tl.load(factors_at + width, mask=inside, other=0.0)
    return left, right


@jit
def _swiglu_backward_kernel(
    gate_up, d_out, out, gate_up_stride, d_out_stride, out_stride, width,
    WRITES_OUT: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    dy_at, out_at = d_out + row * d_out_stride + columns, out + row * out_stride + columns
    _differentiate(gate_at, dy_at, out_at, width, inside, WRITES_OUT, GELU)


@jit
def _swiglu_backward_row_kernel(
    gate_up, d_out, out, codes, scales, factors,
    gate_up_stride, d_out_stride, out_stride, width,
    WRITES_OUT: tl.constexpr, HAS_FACTORS: tl.constexpr, GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = gate_up + row * gate_up_stride + columns
    dy_at, out_at = d_out + row * d_out_stride + columns, out + row * out_stride + columns
    d_gate, d_up = _differentiate(gate_at, dy_at, out_at, width, inside, WRITES_OUT, GELU)
    left, right = _times_factors(d_gate, d_up, factors + columns, width, inside, HAS_FACTORS)
    scale, inverse = scale_of(tl.maximum(tl.max(tl.abs(left), 0), tl.max(tl.abs(right), 0)))
    tl.store(scales + row, scale)
    codes_at = codes + row * 2 * width + columns
    tl.store(codes_at, (left * inverse).to(codes.dtype.element_ty), mask=inside)
    tl.store(codes_at + width, (right * inverse).to(codes.dtype.element_ty), mask=inside)


@jit
def _swiglu_backward_chunks_kernel(
    gate_up, d_out, out, codes, scales, factors,
    gate_up_stride, d_out_stride, out_stride, width,
    WRITES_OUT: tl.constexpr, HAS_FACTORS: tl.constexpr, GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peaks = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate_at = gate_up + row * gate_up_stride + columns
        dy_at, out_at = d_out + row * d_out_stride + columns, out + row * out_stride + columns
        d_gate, d_up = _differentiate(gate_at, dy_at, out_at, width, inside, WRITES_OUT, GELU)
        left, right = _times_factors(d_gate, d_up, factors + columns, width, inside, HAS_FACTORS)
        peaks = tl.maximum(peaks, tl.maximum(tl.abs(left), tl.abs(right)))
    scale, inverse = scale_of(tl.max(peaks, 0))
    tl.store(scales + row, scale)
    tl.debug_barrier()  # a thread may read below what another of the program has written above
    # The gradient is still in the L2 cache: 115 kB a row at the width of 70B models.
    for start in range(0, 2 * width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < 2 * width
        value = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0)
        value = value.to(tl.float32)
        if HAS_FACTORS:
            value *= tl.load(factors + columns, mask=inside, other=0.0)
        codes_at = codes + row * 2 * width + columns
        tl.store(codes_at, (value * inverse).to(codes.dtype.element_ty), mask=inside)


def swiglu_backward_triton(
    gate_up: Tensor,
    d_out: Tensor,
    out: Tensor | None,
    fp8_out: Fp8Rows | None = None,
    *,
    gelu: bool = False,
) -> None:
    """The fast twin of `swiglu_backward`; bf16, on a GPU: within one rounding of bf16."""
    rows, width = d_out.shape
    out_or_any = d_out if out is None else out  # the kernel needs a pointer, and leaves it alone
    if fp8_out is not None:
        block, kernel = next_power_of_2(width), _swiglu_backward_row_kernel
        warps = warps_of(block)
        if block > MAX_BLOCK_IN_REGISTERS:
            block, kernel, warps = CHUNK_COLUMNS, _swiglu_backward_chunks_kernel, CHUNK_WARPS
        kernel[(rows,)](
            gate_up, d_out, out_or_any, *fp8_tensors(fp8_out, d_out),
            row_stride(gate_up), row_stride(d_out), row_stride(out_or_any), width,
            WRITES_OUT=out is not None, HAS_FACTORS=fp8_out.factors is not None, GELU=gelu,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return
    grid = (rows, -(-width // BLOCK_COLUMNS))
    _swiglu_backward_kernel[grid](
        gate_up, d_out, out_or_any,
        row_stride(gate_up), row_stride(d_out), row_stride(out_or_any), width,
        WRITES_OUT=out is not None, GELU=gelu, BLOCK=BLOCK_COLUMNS,
    )  # fmt: skip
