"""int8 rows: codes from −127 to 127 with one fp32 scale a row, its largest magnitude over 127.

value = code · scale. The code −128 is not used, so that the codes of −w are those of w, negated.
Codes are whole numbers below 2⁸, which bf16 holds exactly: a matmul may take them as they are and
scale its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127.0
MIN_PEAK = 1e-30
"""Rows whose largest magnitude is smaller are scaled as if it were this: 1 / scale stays finite."""
PIECE_ELEMENTS = 2**20
"""Of a weight that is widened at once, so that a large one is never there twice."""


@dataclass(frozen=True)
class Int8Rows:
    """A weight (O, I) in int8."""

    codes: Tensor
    """(O, I), int8."""
    scales: Tensor
    """(O, 1), fp32; not finite where a value of the row was not."""


def quantise_int8(weight: Tensor) -> Int8Rows:
    """Return the codes and scales of the rows of `weight` (O, I)."""
    rows = Int8Rows(
        torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format),
        weight.new_empty(len(weight), 1, dtype=torch.float32),
    )
    for piece in pieces_of(weight):
        values = weight[piece].float()
        peak = values.abs().amax(1, keepdim=True).clamp_(min=MIN_PEAK)  # (rows, 1); keeps NaN
        rows.scales[piece] = peak / INT8_MAX
        # A row that is not finite has no codes: its scale says so.
        codes = (values * (INT8_MAX / peak)).round_().nan_to_num_(0.0)
        rows.codes[piece] = codes.clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return rows


def unpack_int8(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Changes `out` (O, I) in place: code · scale in fp32, rounded to the dtype of `out`."""
    for piece in pieces_of(codes):
        out[piece] = codes[piece] * scales[piece]  # int8 · fp32 is fp32


def pieces_of(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of `weight` (O, I) in pieces of at most PIECE_ELEMENTS, or one row."""
    step = max(1, PIECE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
