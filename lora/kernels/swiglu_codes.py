"""SwiGLU whose rows go into eight bits, with what LoRA has beside it made on the way.

What differs from `lora.kernels.swiglu`: gate and up may come without LoRA's share, h bᵀ, and the
gradient of silu(gate) · up without dh a. The kernels add both where they read, and make the narrow
products of what they write (arXiv 2106.09685): nothing of F columns passes through memory once more
for LoRA. A program takes some rows and some of their columns. The rows' scales are guessed from the
first columns, with room to spare; rows that prove to hold larger values are coded again. Sums over
columns are kept by program and added up afterwards, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.fp8 import CodedRows, code_tensors, scale_of
from lora.kernels.jit import jit, next_power_of_2, row_stride, tl

ROWS, COLUMNS, WARPS = 64, 64, 4
"""Of a tile of the forward kernel; rows in sixteens for each warp."""
BACK_ROWS, BACK_COLUMNS, BACK_WARPS = 64, 32, 4
"""Of a tile of the backward kernel."""
A_PROGRAM = 1024
"""Columns that a program walks over."""
WIDEST_RANK = 128
"""Columns of h that a program can hold."""


@dataclass(frozen=True)
class LowRank:
    """LoRA's tensors of one linear: y = x Wᵀ + h bᵀ with h = x aᵀ; dx = dy W + dh a with dh = dy b.

    Which of h and dh a kernel reads, which it makes and which it leaves alone is said there.
    """

    a: Tensor
    """(R, I)."""
    b: Tensor
    """(O, R), scaled."""
    h: Tensor | None
    """(N, R)."""
    dh: Tensor | None
    """(N, R)."""
    gate_rank: int = 0
    """Of gate and up together: the first columns of h, which are gate's; the others are up's."""


def swiglu_codes(
    gate_up: Tensor,
    out: Tensor | None,
    coded: CodedRows,
    before: LowRank | None = None,
    after: LowRank | None = None,
) -> None:
    """Changes `coded`, `out` and `after.h` in place: silu(gate) · up of `gate_up` (N, 2F).

    `out` (N, F) takes it in its own type. `before` is LoRA of gate and up: its h bᵀ is added to
    them first. `after` is LoRA of the linear that reads the result: its h is made.
    """
    gate, up = _with_low_rank(gate_up, before).chunk(2, -1)  # each (N, F)
    y = (F.silu(gate) * up).to(gate_up.dtype)
    if out is not None:
        out.copy_(y)
    if after is not None and after.h is not None:
        after.h.copy_(y.to(gate.dtype) @ after.a.to(gate.dtype).T)
    coded.put(y)


def swiglu_codes_backward(
    gate_up: Tensor,
    d_out: Tensor,
    out: Tensor | None,
    coded: CodedRows,
    before: LowRank | None = None,
    after: LowRank | None = None,
) -> None:
    """Changes `gate_up` (N, 2F), `coded`, `out` and `before.dh` in place.

    `gate_up` becomes its own gradient, which `coded` takes in eight bits; `out` takes silu(gate) ·
    up again. `before.h` bᵀ is added to gate and up first, and its dh made of their gradient;
    `after.dh` a is added to `d_out` (N, F).
    """
    both = _with_low_rank(gate_up, before)
    gate, up = both.chunk(2, -1)  # each (N, F)
    dy = d_out.to(both.dtype)
    if after is not None and after.dh is not None:
        dy = dy + after.dh.to(both.dtype) @ after.a.to(both.dtype)
    sigmoid = gate.sigmoid()
    if out is not None:
        out.copy_(gate * sigmoid * up)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up.copy_(torch.cat((d_gate, dy * gate * sigmoid), -1))
    if before is not None and before.dh is not None:
        before.dh.copy_(gate_up.to(both.dtype) @ before.b.to(both.dtype))
    coded.put(gate_up)


def _with_low_rank(gate_up: Tensor, before: LowRank | None) -> Tensor:
    """Return gate and up (N, 2F) with LoRA's share, in fp32 or wider."""
    both = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    if before is None or before.h is None:
        return both
    return both + before.h.to(both.dtype) @ before.b.to(both.dtype).T


@dataclass(frozen=True)
class _Reads:
    """A kernel's view of LoRA on one side; without it, placeholders of which nothing is read."""

    narrow: Tensor
    wide: Tensor
    gate_rank: int
    rank: int

    @property
    def padded(self) -> int:
        """Columns that a program takes one of the two narrow tensors for."""
        return max(16, next_power_of_2(max(self.gate_rank, self.rank - self.gate_rank)))


def _reads(narrow: Tensor | None, wide: Tensor | None, other: Tensor, gate_rank: int = 0) -> _Reads:
    if narrow is None or wide is None:
        return _Reads(other, other, 0, 1)
    assert wide.is_contiguous(), "LoRA's matrices must be contiguous"
    return _Reads(narrow, wide, gate_rank, narrow.shape[1])


@jit
def _half_tile(
    x, columns, here, width, h, b, b_stride, rank, ADDS: tl.constexpr, RANK: tl.constexpr
):
    """Return a tile of gate or up, and the tile of b, (RANK, columns), that went into it."""
    inside = (columns < width)[None, :]
    y = tl.load(x + columns[None, :], mask=here[:, None] & inside, other=0.0).to(tl.float32)
    b_tile = h
    if ADDS:
        ranks = tl.arange(0, RANK)[:, None]
        b_at = b + columns[None, :] * b_stride + ranks
        b_tile = tl.load(b_at, mask=inside & (ranks < rank), other=0.0)
        y = tl.dot(h, b_tile, acc=y)
    return y, b_tile


@jit
def _low_tile(low, low_stride, rows, here, rank, HAS: tl.constexpr, RANK: tl.constexpr):
    """Return (rows, RANK) of a narrow tensor, or a placeholder."""
    ranks = tl.arange(0, RANK)[None, :]
    tile = ranks
    if HAS:
        known = here[:, None] & (ranks < rank)
        tile = tl.load(low + rows[:, None] * low_stride + ranks, mask=known, other=0.0)
    return tile


@jit
def _store_guess(y, scales, rows, here):
    """Store scales for rows whose first columns are `y`, with room for sixteen times as much."""
    scale, _ = scale_of(tl.max(tl.abs(y), 1))
    tl.store(scales + rows, scale * 16.0, mask=here)


@jit
def _row_peaks(peaks, rows, here, n_rows, programs, ROWS: tl.constexpr):
    """Return the largest value of each row."""
    peak = tl.zeros([ROWS], dtype=tl.float32)
    for place in range(programs):
        found = tl.load(peaks + place * n_rows + rows, mask=here, other=0.0)
        peak = tl.maximum(peak, found)
    return peak


@jit
def _store_sums(
    sums, at, out, out_stride, rows, here, rank, n_rows, programs,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Store the programs' sums (programs, N, WIDTH), of columns from `at` on, added up."""
    ranks = tl.arange(0, RANK)[None, :]
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for place in range(programs):
        row = place * n_rows + rows[:, None]
        total += tl.load(sums + row * WIDTH + at + ranks, mask=here[:, None], other=0.0)
    out_at = out + rows[:, None] * out_stride + ranks
    tl.store(out_at, total.to(out.dtype.element_ty), mask=here[:, None] & (ranks < rank))


@jit
def _silu_tile(
    x, columns, here, width, h_gate, h_up, b, gate_rank, rank,
    ADDS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Return a tile of silu(gate) · up, fp32."""
    up_rank = rank - gate_rank
    b_of_up = b + width * rank + gate_rank
    gate, _ = _half_tile(x, columns, here, width, h_gate, b, rank, gate_rank, ADDS, RANK)
    up, _ = _half_tile(x + width, columns, here, width, h_up, b_of_up, rank, up_rank, ADDS, RANK)
    return gate * tl.sigmoid(gate) * up


@jit
def _swiglu_codes_kernel(
    gate_up, out, codes, scales, h, b, a, peaks, sums, low,
    gate_up_stride, out_stride, h_stride, low_stride, n_rows, width, gate_rank, rank, low_rank,
    programs, STAGE: tl.constexpr,
    ADDS: tl.constexpr, MAKES_LOW: tl.constexpr, KEEPS_OUT: tl.constexpr, A_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """In three stages: guess the scales; make everything; finish what goes over all columns."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n_rows
    kind = gate_up.dtype.element_ty
    x = gate_up + rows[:, None] * gate_up_stride
    codes_at = codes + rows[:, None] * width
    h_gate = _low_tile(h, h_stride, rows, here, gate_rank, ADDS, RANK)
    h_up = _low_tile(h + gate_rank, h_stride, rows, here, rank - gate_rank, ADDS, RANK)
    columns = tl.arange(0, BLOCK)
    if STAGE == 0:
        y = _silu_tile(x, columns, here, width, h_gate, h_up, b, gate_rank, rank, ADDS, RANK)
        _store_guess(y, scales, rows, here)
    if STAGE == 1:
        program = tl.program_id(1)
        inverse = 1.0 / tl.load(scales + rows, mask=here, other=1.0)
        ranks = tl.arange(0, LOW_RANK)[None, :]
        peak = tl.zeros([ROWS], dtype=tl.float32)
        total = tl.zeros([ROWS, LOW_RANK], dtype=tl.float32)
        for start in range(program * A_PROGRAM, min((program + 1) * A_PROGRAM, width), BLOCK):
            at = start + columns
            inside = at < width
            there = here[:, None] & inside[None, :]
            y = _silu_tile(x, at, here, width, h_gate, h_up, b, gate_rank, rank, ADDS, RANK).to(
                kind
            )
            if KEEPS_OUT:
                tl.store(out + rows[:, None] * out_stride + at[None, :], y, mask=there)
            if MAKES_LOW:
                known = inside[:, None] & (ranks < low_rank)
                a_tile = tl.load(a + ranks * width + at[:, None], mask=known, other=0.0)
                total = tl.dot(y, a_tile, acc=total)
            wide = y.to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(wide), 1))
            coded = (wide * inverse[:, None]).to(codes.dtype.element_ty)
            tl.store(codes_at + at[None, :], coded, mask=there)
        place = program * n_rows + rows
        tl.store(peaks + place, peak, mask=here)
        if MAKES_LOW:
            tl.store(sums + place[:, None] * LOW_RANK + ranks, total, mask=here[:, None])
    if STAGE == 2:
        if MAKES_LOW:
            _store_sums(
                sums, 0, low, low_stride, rows, here, low_rank, n_rows, programs,
                ROWS, LOW_RANK, LOW_RANK,
            )  # fmt: skip
        peak = _row_peaks(peaks, rows, here, n_rows, programs, ROWS)
        guessed = tl.load(scales + rows, mask=here, other=1.0)
        if tl.max((peak > guessed * 448.0).to(tl.int32), 0) > 0:
            scale, inverse = scale_of(peak)
            tl.store(scales + rows, scale, mask=here)
            for start in range(0, width, BLOCK):
                at = start + columns
                y = _silu_tile(x, at, here, width, h_gate, h_up, b, gate_rank, rank, ADDS, RANK).to(
                    kind
                )
                coded = (y.to(tl.float32) * inverse[:, None]).to(codes.dtype.element_ty)
                there = here[:, None] & (at < width)[None, :]
                tl.store(codes_at + at[None, :], coded, mask=there)


def swiglu_codes_triton(
    gate_up: Tensor,
    out: Tensor | None,
    coded: CodedRows,
    before: LowRank | None = None,
    after: LowRank | None = None,
) -> None:
    """The fast twin of `swiglu_codes`; bf16, on a GPU: agrees within one rounding of bf16."""
    n_rows, width = coded.codes.shape
    codes, scales, _ = code_tensors(coded, gate_up)
    kept = gate_up if out is None else out
    first, second = _reads(None, None, gate_up), _reads(None, None, gate_up)
    if before is not None:
        first = _reads(before.h, before.b, gate_up, before.gate_rank)
    if after is not None:
        second = _reads(after.h, after.a, gate_up)
    programs = -(-width // A_PROGRAM)
    peaks = scales.new_empty(programs, n_rows)
    low_rank = max(16, next_power_of_2(second.rank))
    sums = scales.new_empty(programs, n_rows, low_rank) if after is not None else peaks
    for stage in range(3):
        grid = (-(-n_rows // ROWS), programs if stage == 1 else 1)
        _swiglu_codes_kernel[grid](
            gate_up, kept, codes, scales, first.narrow, first.wide, second.wide, peaks, sums,
            second.narrow,
            row_stride(gate_up), row_stride(kept), row_stride(first.narrow),
            row_stride(second.narrow), n_rows, width, first.gate_rank, first.rank, second.rank,
            programs, STAGE=stage,
            ADDS=before is not None, MAKES_LOW=after is not None, KEEPS_OUT=out is not None,
            A_PROGRAM=A_PROGRAM, ROWS=ROWS, BLOCK=COLUMNS, RANK=first.padded, LOW_RANK=low_rank,
            num_warps=WARPS,
        )  # fmt: skip


@jit
def _gradient_tiles(
    x, d_out, columns, here, width, h_gate, h_up, b, low, a, gate_rank, rank, low_rank,
    ADDS: tl.constexpr, ADDS_LOW: tl.constexpr, RANK: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """Return tiles of silu(gate) · up, of the gradients of gate and up, and of b for both."""
    up_rank = rank - gate_rank
    b_of_up = b + width * rank + gate_rank
    gate, b_gate = _half_tile(x, columns, here, width, h_gate, b, rank, gate_rank, ADDS, RANK)
    up, b_up = _half_tile(x + width, columns, here, width, h_up, b_of_up, rank, up_rank, ADDS, RANK)
    inside = (columns < width)[None, :]
    dy = tl.load(d_out + columns[None, :], mask=here[:, None] & inside, other=0.0).to(tl.float32)
    if ADDS_LOW:
        ranks = tl.arange(0, LOW_RANK)[:, None]
        known = inside & (ranks < low_rank)
        dy = tl.dot(
            low, tl.load(a + ranks * width + columns[None, :], mask=known, other=0.0), acc=dy
        )
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu, b_gate, b_up


@jit
def _scaled(y, factors, columns, width, HAS_FACTORS: tl.constexpr):
    """Return a tile with its columns multiplied by their factors."""
    wide = y.to(tl.float32)
    if HAS_FACTORS:
        wide *= tl.load(factors + columns, mask=columns < width, other=0.0)[None, :]
    return wide


@jit
def _code_again(
    x, codes_at, factors, inverse, here, width, BLOCK: tl.constexpr, HAS_FACTORS: tl.constexpr
):
    """Store whole rows as codes once more."""
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = here[:, None] & (at < width)[None, :]
        y = tl.load(x + at[None, :], mask=there, other=0.0)
        wide = _scaled(y, factors, at, width, HAS_FACTORS) * inverse[:, None]
        tl.store(codes_at + at[None, :], wide.to(codes_at.dtype.element_ty), mask=there)


@jit
def _finish_sums(
    sums, dh, dh_stride, rows, here, gate_rank, rank, n_rows, programs,
    ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Store dh of gate and of up, added up over the programs."""
    _store_sums(
        sums, 0, dh, dh_stride, rows, here, gate_rank, n_rows, programs, ROWS, 2 * RANK, RANK
    )
    up, up_rank = dh + gate_rank, rank - gate_rank
    _store_sums(
        sums, RANK, up, dh_stride, rows, here, up_rank, n_rows, programs, ROWS, 2 * RANK, RANK
    )


@jit
def _swiglu_codes_backward_kernel(
    gate_up, d_out, out, codes, scales, factors, h, b, low, a, peaks, sums, dh,
    gate_up_stride, d_out_stride, out_stride, h_stride, low_stride, dh_stride,
    n_rows, width, gate_rank, rank, low_rank, programs, STAGE: tl.constexpr,
    ADDS: tl.constexpr, ADDS_LOW: tl.constexpr, KEEPS_OUT: tl.constexpr,
    HAS_FACTORS: tl.constexpr, A_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """In the forward kernel's three stages."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n_rows
    kind = gate_up.dtype.element_ty
    code_kind = codes.dtype.element_ty
    x, dy = gate_up + rows[:, None] * gate_up_stride, d_out + rows[:, None] * d_out_stride
    codes_at = codes + rows[:, None] * 2 * width
    h_gate = _low_tile(h, h_stride, rows, here, gate_rank, ADDS, RANK)
    h_up = _low_tile(h + gate_rank, h_stride, rows, here, rank - gate_rank, ADDS, RANK)
    low_tile = _low_tile(low, low_stride, rows, here, low_rank, ADDS_LOW, LOW_RANK)
    columns = tl.arange(0, BLOCK)
    if STAGE == 0:
        _, left, right, _, _ = _gradient_tiles(
            x, dy, columns, here, width, h_gate, h_up, b, low_tile, a, gate_rank, rank, low_rank,
            ADDS, ADDS_LOW, RANK, LOW_RANK,
        )  # fmt: skip
        left = _scaled(left, factors, columns, width, HAS_FACTORS)
        right = _scaled(right, factors + width, columns, width, HAS_FACTORS)
        _store_guess(tl.maximum(tl.abs(left), tl.abs(right)), scales, rows, here)
    if STAGE == 1:
        program = tl.program_id(1)
        inverse = 1.0 / tl.load(scales + rows, mask=here, other=1.0)[:, None]
        peak = tl.zeros([ROWS], dtype=tl.float32)
        of_gate = tl.zeros([ROWS, RANK], dtype=tl.float32)
        of_up = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for start in range(program * A_PROGRAM, min((program + 1) * A_PROGRAM, width), BLOCK):
            at = start + columns
            there = here[:, None] & (at < width)[None, :]
            y, d_gate, d_up, b_gate, b_up = _gradient_tiles(
                x, dy, at, here, width, h_gate, h_up, b, low_tile, a, gate_rank, rank, low_rank,
                ADDS, ADDS_LOW, RANK, LOW_RANK,
            )  # fmt: skip
            d_gate, d_up = d_gate.to(kind), d_up.to(kind)
            if KEEPS_OUT:
                tl.store(out + rows[:, None] * out_stride + at[None, :], y.to(kind), mask=there)
            tl.store(x + at[None, :], d_gate, mask=there)
            tl.store(x + width + at[None, :], d_up, mask=there)
            if ADDS:
                of_gate = tl.dot(d_gate, tl.trans(b_gate), acc=of_gate)
                of_up = tl.dot(d_up, tl.trans(b_up), acc=of_up)
            left = _scaled(d_gate, factors, at, width, HAS_FACTORS)
            right = _scaled(d_up, factors + width, at, width, HAS_FACTORS)
            peak = tl.maximum(peak, tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1))
            tl.store(codes_at + at[None, :], (left * inverse).to(code_kind), mask=there)
            tl.store(codes_at + width + at[None, :], (right * inverse).to(code_kind), mask=there)
        tl.store(peaks + program * n_rows + rows, peak, mask=here)
        if ADDS:
            place = program * n_rows + rows
            sums_at = sums + place[:, None] * (2 * RANK) + tl.arange(0, RANK)[None, :]
            tl.store(sums_at, of_gate, mask=here[:, None])
            tl.store(sums_at + RANK, of_up, mask=here[:, None])
    if STAGE == 2:
        if ADDS:
            _finish_sums(sums, dh, dh_stride, rows, here, gate_rank, rank, n_rows,
                         programs, ROWS, RANK)  # fmt: skip
        peak = _row_peaks(peaks, rows, here, n_rows, programs, ROWS)
        guessed = tl.load(scales + rows, mask=here, other=1.0)
        if tl.max((peak > guessed * 448.0).to(tl.int32), 0) > 0:
            scale, inverse = scale_of(peak)
            tl.store(scales + rows, scale, mask=here)
            _code_again(x, codes_at, factors, inverse, here, 2 * width, BLOCK, HAS_FACTORS)


def swiglu_codes_backward_triton(
    gate_up: Tensor,
    d_out: Tensor,
    out: Tensor | None,
    coded: CodedRows,
    before: LowRank | None = None,
    after: LowRank | None = None,
) -> None:
    """The fast twin of `swiglu_codes_backward`; bf16, on a GPU: within one rounding of bf16."""
    n_rows, width = d_out.shape
    codes, scales, factors = code_tensors(coded, gate_up)
    kept = gate_up if out is None else out
    first, second, dh = _reads(None, None, gate_up), _reads(None, None, gate_up), gate_up
    if before is not None and before.dh is not None:
        first, dh = _reads(before.h, before.b, gate_up, before.gate_rank), before.dh
    if after is not None:
        second = _reads(after.dh, after.a, gate_up)
    programs = -(-width // A_PROGRAM)
    peaks = scales.new_empty(programs, n_rows)
    sums = scales.new_empty(programs, n_rows, 2 * first.padded) if before is not None else peaks
    for stage in range(3):
        grid = (-(-n_rows // BACK_ROWS), programs if stage == 1 else 1)
        _swiglu_codes_backward_kernel[grid](
            gate_up, d_out, kept, codes, scales, factors, first.narrow, first.wide, second.narrow,
            second.wide, peaks, sums, dh,
            row_stride(gate_up), row_stride(d_out), row_stride(kept), row_stride(first.narrow),
            row_stride(second.narrow), row_stride(dh), n_rows, width, first.gate_rank, first.rank,
            second.rank, programs, STAGE=stage,
            ADDS=before is not None, ADDS_LOW=after is not None, KEEPS_OUT=out is not None,
            HAS_FACTORS=coded.factors is not None, A_PROGRAM=A_PROGRAM, ROWS=BACK_ROWS,
            BLOCK=BACK_COLUMNS, RANK=first.padded, LOW_RANK=max(16, next_power_of_2(second.rank)),
            num_warps=BACK_WARPS,
        )  # fmt: skip
