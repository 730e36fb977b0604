"""Rows in eight bits: float8_e4m3fn codes with one scale a row, and the product of such matrices.

A row's scale is its largest value over 448, the largest that e4m3 holds (arXiv 2209.05433), so a
value keeps three bits behind its leading one: half of 2⁻³ is the largest relative error, as long as
it is at least 2⁻¹⁵ of the row's largest. Scales are those of the codes: value = code · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""That e4m3 holds."""
MIN_PEAK = 1e-30
"""Rows whose largest value is smaller are taken for rows with this one: 1 / scale stays finite."""
SIZES_STEP = 16
"""The device's product wants inputs and outputs in multiples of this."""
TILE = 64


@dataclass(frozen=True)
class Fp8Rows:
    """Where the maker of rows (N, W) puts them in eight bits too."""

    codes: Tensor
    """(N, W), contiguous. Of a type wider than eight bits, nothing is rounded and scales are 1."""
    scales: Tensor
    """(N, 1), fp32."""
    factors: Tensor | None = None
    """(W,): what each column is multiplied by first."""

    def put(self, x: Tensor) -> None:
        """Changes `codes` and `scales` in place: the rows `x` (N, W)."""
        quantise_rows(x, self)


def quantise_rows(x: Tensor, into: Fp8Rows) -> None:
    """Changes `into` in place: the rows `x` (N, W) as codes with a scale each."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide) if into.factors is None else x.to(wide) * into.factors.to(wide)
    if into.codes.element_size() > 1:
        into.codes.copy_(values)
        into.scales.fill_(1.0)
        return
    peak = values.abs().amax(-1, keepdim=True).clamp(min=MIN_PEAK)  # (N, 1)
    into.scales.copy_(peak / LARGEST)
    into.codes.copy_((values * (LARGEST / peak)).to(FP8))


def scaled_matmul(
    x: Fp8Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Changes `out` (N, O) in place: the rows x (N, I) times weight (O, I), both codes.

    `scales` (1, O) are the weight's, fp32; `bias` is (O,).
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    y = (x.codes.to(wide) @ weight.to(wide).T) * x.scales.to(wide) * scales.to(wide)
    out.copy_(y if bias is None else y + bias.to(wide))


def scaled_matmul_device(
    x: Fp8Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """The fast twin of `scaled_matmul`, cuBLASLt's: capability 9.0, I and O multiples of 16.

    Sums are those of the matrix units, 14 bits over 32 products each: agrees within 2e-3, beside
    `out`'s rounding to bf16.
    """
    torch._scaled_mm(
        x.codes, weight.T, x.scales, scales, bias,
        out_dtype=out.dtype, use_fast_accum=True, out=out,
    )  # fmt: skip


def transpose_codes(weight: Tensor, out: Tensor) -> None:
    """Changes `out` (I, O) in place: `weight` (O, I) transposed."""
    out.copy_(weight.T)


@jit
def scale_of(peak):
    """Return the scale of a row with this largest value, and its inverse."""
    peak = tl.maximum(peak, 1e-30)  # MIN_PEAK, LARGEST: kernels read no globals
    return peak / 448.0, 448.0 / peak


@jit
def store_codes(y, codes_at, scale_at, factors_at, inside, HAS_FACTORS: tl.constexpr):
    """Store a whole row `y`, fp32 values that bf16 holds, as codes and their scale."""
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
    y = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    codes_at = codes + row * width + columns
    store_codes(y, codes_at, scales + row, factors + columns, inside, HAS_FACTORS)


def quantise_rows_triton(x: Tensor, into: Fp8Rows) -> None:
    """The fast twin of `quantise_rows`; on a GPU: the same scales, a code may be the next one."""
    rows, width = x.shape
    block = next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x, *fp8_tensors(into, x), row_stride(x), width,
        HAS_FACTORS=into.factors is not None, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


@jit
def _turn_kernel(weight, out, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(weight + row[:, None] * columns + column[None, :], mask=there)
    there = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=there)


def transpose_codes_triton(weight: Tensor, out: Tensor) -> None:
    """The fast twin of `transpose_codes`, for codes of eight bits; on a GPU: the same bytes."""
    rows, columns = weight.shape
    grid = (-(-columns // TILE), -(-rows // TILE))
    as_bytes = weight.view(torch.uint8), out.view(torch.uint8)
    _turn_kernel[grid](*as_bytes, rows, columns, TILE=TILE)


def warps_of(block: int) -> int:
    """Return the warps of a program that holds a row of `block` columns."""
    return min(max(block // 512, 1), 16)


def fp8_tensors(coded: Fp8Rows | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and factors for a kernel; `other` stands where it reads nothing."""
    if coded is None:
        return other, other, other
    return coded.codes, coded.scales, other if coded.factors is None else coded.factors
