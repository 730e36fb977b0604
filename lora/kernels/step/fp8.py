"""FP8 rows: float8_e4m3fn codes with one scale a row, and the matmul of such matrices.

A row's scale is its largest magnitude over 448, the largest that e4m3 holds (arXiv 2209.05433). A
value keeps three bits behind its leading one, so the relative error is at most 2⁻⁴ as long as the
value is at least 2⁻¹⁵ of the row's largest. value = code · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

FP8 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_PEAK = 1e-30
"""Rows whose largest magnitude is smaller are scaled as if it were this: 1 / scale stays finite."""
FP8_GEMM_MULTIPLE = 16
"""The device's fp8 GEMM wants inputs and outputs in multiples of this."""
TILE = 64


@dataclass(frozen=True)
class Fp8Rows:
    """Where an operation also writes its output (N, W) in fp8, for the matmul that reads it."""

    codes: Tensor
    """(N, W), contiguous. In a wider dtype nothing is rounded, and scales are 1."""
    scales: Tensor
    """(N, 1), fp32."""
    factors: Tensor | None = None
    """(W,): what each column is multiplied by before it is rounded."""

    def write(self, x: Tensor) -> None:
        """Changes `codes` and `scales` in place: the rows `x` (N, W)."""
        quantise_rows(x, self)


def quantise_rows(x: Tensor, into: Fp8Rows) -> None:
    """Changes `into` in place: the rows `x` (N, W) as codes with a scale each."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide) if into.factors is None else x.to(wide) * into.factors.to(wide)
    if into.codes.element_size() > 1:  # tests compare everything but the rounding in fp64
        into.codes.copy_(values)
        into.scales.fill_(1.0)
        return
    peak = values.abs().amax(-1, keepdim=True).clamp(min=MIN_PEAK)  # (N, 1)
    into.scales.copy_(peak / E4M3_MAX)
    into.codes.copy_((values * (E4M3_MAX / peak)).to(FP8))  # (N, W)


def scaled_matmul(
    x: Fp8Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Changes `out` (N, O) in place: x weightᵀ for x (N, I) and weight (O, I), both codes.

    `scales` (1, O) are the weight's, fp32; `bias` is (O,).
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    # Scales belong to rows of x and of the weight, so they can wait until after the sum over I.
    y = (x.codes.to(wide) @ weight.to(wide).T) * x.scales.to(wide) * scales.to(wide)  # (N, O)
    out.copy_(y if bias is None else y + bias.to(wide))


def scaled_matmul_device(
    x: Fp8Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """The fast twin of `scaled_matmul`, cuBLASLt's: capability 9.0, I and O multiples of 16.

    The tensor cores accumulate 32 terms with 14 bits: agrees within 2e-3, beside `out`'s rounding
    to bf16.
    """
    # At 8B fast accumulation runs at 1385-1510 TFLOP/s, accumulation in fp32 at 1155-1340.
    torch._scaled_mm(
        x.codes, weight.T, x.scales, scales, bias,
        out_dtype=out.dtype, use_fast_accum=True, out=out,
    )  # fmt: skip


def transpose_codes(weight: Tensor, out: Tensor) -> None:
    """Changes `out` (I, O) in place: `weight` (O, I) transposed."""
    out.copy_(weight.T)


@jit
def scale_of(peak):
    """Return the scale of a row with this largest magnitude, and its inverse."""
    peak = tl.maximum(peak, 1e-30)  # MIN_PEAK, E4M3_MAX: kernels read no globals
    return peak / 448.0, 448.0 / peak


@jit
def store_codes(y, codes_at, scale_at, factors_at, inside, HAS_FACTORS: tl.constexpr):
    """Store a whole row `y`, fp32 values already rounded to bf16, as codes and their scale."""
    if HAS_FACTORS:
        y = y * tl.load(factors_at, mask=inside, other=0.0)
    scale, inverse = scale_of(tl.max(tl.abs(y), 0))
    tl.store(scale_at, scale)
    tl.store(codes_at, (y * inverse).to(codes_at.dtype.element_ty), mask=inside)


@jit
def _quantise_kernel(
    x, codes, scales, factors, x_stride, width, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    # Zeros beyond the width, so that they never are the row's largest magnitude.
    y = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    codes_at = codes + row * width + columns
    store_codes(y, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def quantise_rows_triton(x: Tensor, into: Fp8Rows) -> None:
    """The fast twin of `quantise_rows`; on a GPU: the same scales, a code may be the next one."""
    rows, width = x.shape
    # One program holds a whole row: its largest magnitude must be known before the first code.
    block = next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x, *fp8_tensors(into, x), row_stride(x), width,
        HAS_FACTORS=into.factors is not None, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


@jit
def _transpose_kernel(weight, out, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(weight + row[:, None] * columns + column[None, :], mask=there)  # (TILE, TILE)
    there = (column[:, None] < columns) & (row[None, :] < rows)
    # Transposed inside the tile, so that both loads and stores run along contiguous memory.
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=there)


def transpose_codes_triton(weight: Tensor, out: Tensor) -> None:
    """The fast twin of `transpose_codes`, for one-byte codes; on a GPU: the same bytes."""
    rows, columns = weight.shape
    grid = (-(-columns // TILE), -(-rows // TILE))
    # As bytes: nothing is computed, and the kernel needs no fp8 type.
    as_bytes = weight.view(torch.uint8), out.view(torch.uint8)
    _transpose_kernel[grid](*as_bytes, rows, columns, TILE=TILE)


def warps_of(block: int) -> int:
    """Return the warps of a program that holds a row of `block` columns."""
    # 512 columns a warp: 16 values a thread, so that the row stays in registers.
    return min(max(block // 512, 1), 16)


def fp8_tensors(fp8_out: Fp8Rows | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and factors for a kernel; `other` stands where it reads nothing."""
    if fp8_out is None:
        return other, other, other
    return fp8_out.codes, fp8_out.scales, other if fp8_out.factors is None else fp8_out.factors
