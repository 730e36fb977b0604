"""SwiGLU whose rows go into eight bits, with what LoRA has beside it made on the way.

What differs from `lora.kernels.swiglu`: gate and up may come without LoRA's share, h bᵀ, and the
gradient of silu(gate) · up without dh a. The kernels add both where they read, and make the narrow
products of what they write (arXiv 2106.09685): nothing of F columns passes through memory once more
for LoRA. A program holds some rows and walks over their columns. The rows' scales are guessed from
the first ones, with room to spare; rows that prove to hold larger values are coded again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.fp8 import CodedRows, code_tensors, scale_of
from lora.kernels.jit import jit, next_power_of_2, row_stride, tl

ROWS, COLUMNS, WARPS = 32, 128, 8
"""Of the forward kernel."""
BACK_ROWS, BACK_COLUMNS, BACK_WARPS = 32, 128, 8
"""Of the backward kernel."""
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


def _padded(rank: int) -> int:
    """Return the columns that a program takes a narrow tensor of `rank` columns for."""
    return max(16, next_power_of_2(rank))


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
        b_at = b + columns[None, :].to(tl.int64) * b_stride + ranks
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
def _guess(peak):
    """Return a scale, and its inverse, for rows whose first columns have this largest value."""
    scale, inverse = scale_of(peak)
    return scale * 16.0, inverse * 0.0625


@jit
def _swiglu_codes_kernel(
    gate_up, out, codes, scales, h, b, a, low,
    gate_up_stride, out_stride, h_stride, b_stride, a_stride, low_stride,
    n_rows, width, gate_rank, rank, low_rank,
    ADDS: tl.constexpr, MAKES_LOW: tl.constexpr, KEEPS_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n_rows
    kind = gate_up.dtype.element_ty
    x = gate_up + rows[:, None] * gate_up_stride
    codes_at = codes + rows[:, None] * width
    up_rank = rank - gate_rank
    h_gate = _low_tile(h, h_stride, rows, here, gate_rank, ADDS, RANK)
    h_up = _low_tile(h + gate_rank, h_stride, rows, here, up_rank, ADDS, RANK)
    b_of_up = b + width * b_stride + gate_rank
    columns = tl.arange(0, BLOCK)
    low_ranks = tl.arange(0, LOW_RANK)
    gate, _ = _half_tile(x, columns, here, width, h_gate, b, b_stride, gate_rank, ADDS, RANK)
    up, _ = _half_tile(
        x + width, columns, here, width, h_up, b_of_up, b_stride, up_rank, ADDS, RANK
    )
    scale, inverse = _guess(tl.max(tl.abs(gate * tl.sigmoid(gate) * up), 1))  # (rows,)
    peak = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, LOW_RANK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        there = here[:, None] & (at < width)[None, :]
        gate, _ = _half_tile(x, at, here, width, h_gate, b, b_stride, gate_rank, ADDS, RANK)
        up, _ = _half_tile(x + width, at, here, width, h_up, b_of_up, b_stride, up_rank, ADDS, RANK)
        y = (gate * tl.sigmoid(gate) * up).to(kind)
        if KEEPS_OUT:
            tl.store(out + rows[:, None] * out_stride + at[None, :], y, mask=there)
        if MAKES_LOW:
            known = (at < width)[:, None] & (low_ranks < low_rank)[None, :]
            a_at = a + low_ranks[None, :] * a_stride + at[:, None]
            sums = tl.dot(y, tl.load(a_at, mask=known, other=0.0), acc=sums)
        wide = y.to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(wide), 1))
        coded = (wide * inverse[:, None]).to(codes.dtype.element_ty)
        tl.store(codes_at + at[None, :], coded, mask=there)
    if tl.max((peak > scale * 448.0).to(tl.int32), 0) > 0:
        scale, inverse = scale_of(peak)
        tl.debug_barrier()  # another warp may store an element's first code
        for start in range(0, width, BLOCK):
            at = start + columns
            there = here[:, None] & (at < width)[None, :]
            gate, _ = _half_tile(x, at, here, width, h_gate, b, b_stride, gate_rank, ADDS, RANK)
            up, _ = _half_tile(
                x + width, at, here, width, h_up, b_of_up, b_stride, up_rank, ADDS, RANK
            )
            wide = (gate * tl.sigmoid(gate) * up).to(kind).to(tl.float32)
            coded = (wide * inverse[:, None]).to(codes.dtype.element_ty)
            tl.store(codes_at + at[None, :], coded, mask=there)
    tl.store(scales + rows, scale, mask=here)
    if MAKES_LOW:
        low_at = low + rows[:, None] * low_stride + low_ranks[None, :]
        known = here[:, None] & (low_ranks < low_rank)[None, :]
        tl.store(low_at, sums.to(kind), mask=known)


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
    h, b, gate_rank, rank = gate_up, gate_up, 1, 2
    if before is not None and before.h is not None:
        h, b, gate_rank, rank = before.h, before.b, before.gate_rank, before.b.shape[1]
    low, a, low_rank = gate_up, gate_up, 1
    if after is not None and after.h is not None:
        low, a, low_rank = after.h, after.a, len(after.a)
    _swiglu_codes_kernel[(-(-n_rows // ROWS),)](
        gate_up, kept, codes, scales, h, b, a, low,
        row_stride(gate_up), row_stride(kept), row_stride(h), row_stride(b), row_stride(a),
        row_stride(low), n_rows, width, gate_rank, rank, low_rank,
        ADDS=before is not None, MAKES_LOW=after is not None, KEEPS_OUT=out is not None,
        ROWS=ROWS, BLOCK=COLUMNS, RANK=_padded(max(gate_rank, rank - gate_rank)), LOW_RANK=_padded(low_rank),
        num_warps=WARPS,
    )  # fmt: skip


@jit
def _gradients(gate, up, dy):
    """Return silu(gate) · up, and the gradients of gate and up."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


@jit
def _d_out_tile(
    d_out, columns, here, width, low, a, a_stride, rank, ADDS: tl.constexpr, RANK: tl.constexpr
):
    """Return a tile of the gradient of silu(gate) · up."""
    inside = (columns < width)[None, :]
    dy = tl.load(d_out + columns[None, :], mask=here[:, None] & inside, other=0.0).to(tl.float32)
    if ADDS:
        ranks = tl.arange(0, RANK)[:, None]
        known = inside & (ranks < rank)
        a_tile = tl.load(a + ranks * a_stride + columns[None, :], mask=known, other=0.0)
        dy = tl.dot(low, a_tile, acc=dy)
    return dy


@jit
def _swiglu_codes_backward_kernel(
    gate_up, d_out, out, codes, scales, factors, h, b, dh, a, low,
    gate_up_stride, d_out_stride, out_stride, h_stride, b_stride, dh_stride, a_stride, low_stride,
    n_rows, width, gate_rank, rank, low_rank,
    ADDS: tl.constexpr, ADDS_LOW: tl.constexpr, KEEPS_OUT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n_rows
    kind = gate_up.dtype.element_ty
    code_kind = codes.dtype.element_ty
    x = gate_up + rows[:, None] * gate_up_stride
    d_out_at = d_out + rows[:, None] * d_out_stride
    codes_at = codes + rows[:, None] * 2 * width
    up_rank = rank - gate_rank
    h_gate = _low_tile(h, h_stride, rows, here, gate_rank, ADDS, RANK)
    h_up = _low_tile(h + gate_rank, h_stride, rows, here, up_rank, ADDS, RANK)
    b_of_up = b + width * b_stride + gate_rank
    low_tile = _low_tile(low, low_stride, rows, here, low_rank, ADDS_LOW, LOW_RANK)
    columns = tl.arange(0, BLOCK)
    ranks = tl.arange(0, RANK)
    gate, _ = _half_tile(x, columns, here, width, h_gate, b, b_stride, gate_rank, ADDS, RANK)
    up, _ = _half_tile(
        x + width, columns, here, width, h_up, b_of_up, b_stride, up_rank, ADDS, RANK
    )
    dy = _d_out_tile(
        d_out_at, columns, here, width, low_tile, a, a_stride, low_rank, ADDS_LOW, LOW_RANK
    )
    _, left, right = _gradients(gate, up, dy)
    if HAS_FACTORS:
        left *= tl.load(factors + columns, mask=columns < width, other=0.0)[None, :]
        right *= tl.load(factors + width + columns, mask=columns < width, other=0.0)[None, :]
    scale, inverse = _guess(tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1))  # (rows,)
    tl.debug_barrier()  # the first tile has been read by all before it is written
    peak = tl.zeros([ROWS], dtype=tl.float32)
    sums_gate = tl.zeros([ROWS, RANK], dtype=tl.float32)
    sums_up = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        inside = at < width
        there = here[:, None] & inside[None, :]
        gate, b_gate = _half_tile(x, at, here, width, h_gate, b, b_stride, gate_rank, ADDS, RANK)
        up, b_up = _half_tile(
            x + width, at, here, width, h_up, b_of_up, b_stride, up_rank, ADDS, RANK
        )
        dy = _d_out_tile(
            d_out_at, at, here, width, low_tile, a, a_stride, low_rank, ADDS_LOW, LOW_RANK
        )
        y, d_gate, d_up = _gradients(gate, up, dy)
        d_gate, d_up = d_gate.to(kind), d_up.to(kind)
        if KEEPS_OUT:
            tl.store(out + rows[:, None] * out_stride + at[None, :], y.to(kind), mask=there)
        tl.store(x + at[None, :], d_gate, mask=there)
        tl.store(x + width + at[None, :], d_up, mask=there)
        if ADDS:
            sums_gate = tl.dot(d_gate, tl.trans(b_gate), acc=sums_gate)
            sums_up = tl.dot(d_up, tl.trans(b_up), acc=sums_up)
        left, right = d_gate.to(tl.float32), d_up.to(tl.float32)
        if HAS_FACTORS:
            left *= tl.load(factors + at, mask=inside, other=0.0)[None, :]
            right *= tl.load(factors + width + at, mask=inside, other=0.0)[None, :]
        peak = tl.maximum(peak, tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1))
        left, right = left * inverse[:, None], right * inverse[:, None]
        tl.store(codes_at + at[None, :], left.to(code_kind), mask=there)
        tl.store(codes_at + width + at[None, :], right.to(code_kind), mask=there)
    if tl.max((peak > scale * 448.0).to(tl.int32), 0) > 0:
        scale, inverse = scale_of(peak)
        tl.debug_barrier()  # the gradient was written by other warps
        for start in range(0, 2 * width, BLOCK):
            at = start + columns
            there = here[:, None] & (at < 2 * width)[None, :]
            wide = tl.load(x + at[None, :], mask=there, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                wide *= tl.load(factors + at, mask=at < 2 * width, other=0.0)[None, :]
            tl.store(codes_at + at[None, :], (wide * inverse[:, None]).to(code_kind), mask=there)
    tl.store(scales + rows, scale, mask=here)
    if ADDS:
        dh_at = dh + rows[:, None] * dh_stride + ranks[None, :]
        tl.store(dh_at, sums_gate.to(kind), mask=here[:, None] & (ranks < gate_rank)[None, :])
        known = here[:, None] & (ranks < up_rank)[None, :]
        tl.store(dh_at + gate_rank, sums_up.to(kind), mask=known)


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
    h, b, dh, gate_rank, rank = gate_up, gate_up, gate_up, 1, 2
    if before is not None and before.h is not None and before.dh is not None:
        h, b, dh = before.h, before.b, before.dh
        gate_rank, rank = before.gate_rank, before.b.shape[1]
    low, a, low_rank = gate_up, gate_up, 1
    if after is not None and after.dh is not None:
        low, a, low_rank = after.dh, after.a, len(after.a)
    _swiglu_codes_backward_kernel[(-(-n_rows // BACK_ROWS),)](
        gate_up, d_out, kept, codes, scales, factors, h, b, dh, a, low,
        row_stride(gate_up), row_stride(d_out), row_stride(kept), row_stride(h), row_stride(b),
        row_stride(dh), row_stride(a), row_stride(low), n_rows, width, gate_rank, rank, low_rank,
        ADDS=before is not None, ADDS_LOW=after is not None, KEEPS_OUT=out is not None,
        HAS_FACTORS=coded.factors is not None,
        ROWS=BACK_ROWS, BLOCK=BACK_COLUMNS, RANK=_padded(max(gate_rank, rank - gate_rank)), LOW_RANK=_padded(low_rank),
        num_warps=BACK_WARPS,
    )  # fmt: skip
