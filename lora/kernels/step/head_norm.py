"""RMS norms of queries and keys with their rotary embedding, in one pass, and the gradient.

What differs from the textbook: the raw queries and keys stay where the projection wrote them, so
that the normed ones need no memory of their own in each block: they are computed again before the
backward pass reads them. 1 / rms is cheaper to compute again than to store. Everything between
reading and writing is fp32 (fp64 for fp64), rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.attention import Heads
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl
from lora.kernels.step.rotary import RotaryTables, rotate_heads

ROWS_A_PARTIAL = 16
"""Tokens that one program sums into its partial gradient of the norms' weights."""
LANES_A_WARP = 512
"""Of a program's tile of queries: 16 values a thread, so that all tiles stay in registers."""


@dataclass(frozen=True)
class HeadNorms:
    """The norms of one block's queries and keys."""

    heads: Heads
    queries: Tensor
    """Weight: (D,), of every head, or (H · D,), where one norm is over all heads together."""
    keys: Tensor
    """The same with the key/value heads."""
    eps: float
    offset: float = 0.0
    """Added to the weights: 1 where they are kept as their difference from 1."""

    @property
    def is_whole(self) -> bool:
        """Whether one norm is over all heads together."""
        return len(self.queries) != self.heads[2]

    def parts(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield for queries, then for keys: their columns, their heads, the weight."""
        n_heads, shared, width = self.heads
        yield slice(0, n_heads * width), n_heads, self.queries
        yield slice(n_heads * width, (n_heads + shared) * width), shared, self.keys


def norm_heads(qkv: Tensor, norms: HeadNorms, tables: RotaryTables | None, out: Tensor) -> None:
    """Changes `out` (N, (H + heads) · D) in place: queries and keys of `qkv`, normed and rotated.

    `tables` None: they are not rotated.
    """
    kind = torch.promote_types(qkv.dtype, torch.float32)
    normed = torch.empty(out.shape, dtype=kind, device=out.device)
    for columns, count, weight in norms.parts():
        x = qkv[:, columns].to(kind)
        unit = x * _inverse_rms(x, count, norms)  # (N, columns)
        normed[:, columns] = unit * _gains(weight, count, norms, kind)
    if tables is not None:
        rotate_heads(normed, *tables, norms.heads[0] + norms.heads[1], norms.heads[2])
    out.copy_(normed)


def norm_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    norms: HeadNorms,
    tables: RotaryTables | None,
    qkv: Tensor,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor] | None:
    """Changes `qkv` (N, W) in place: raw queries, keys and values become their gradients.

    dq, dk and dv are (N, heads, parts, D) with any stride between tokens, heads and parts: the
    gradients of what attention has read, which are summed over their parts. `trains`: returns the
    gradients of both norms' weights, in fp32 or wider.
    """
    kind = torch.promote_types(qkv.dtype, torch.float32)
    dy = torch.cat([d.to(kind).sum(2).flatten(1) for d in (dq, dk)], 1)  # (N, (H + heads) · D)
    if tables is not None:  # a rotation's gradient is the rotation by the negative angle
        rotate_heads(dy, tables[0], -tables[1], norms.heads[0] + norms.heads[1], norms.heads[2])
    found = []
    for columns, count, weight in norms.parts():
        x = qkv[:, columns].to(kind)
        scale = _inverse_rms(x, count, norms)
        unit, own = x * scale, dy[:, columns]
        scaled = own * _gains(weight, count, norms, kind)
        mean = _mean_by_norm(unit * scaled, count, norms)
        gradient = (own * unit).sum(0)  # (columns,)
        found.append(gradient if norms.is_whole else gradient.unflatten(0, (count, -1)).sum(0))
        qkv[:, columns] = ((scaled - unit * mean) * scale).to(qkv.dtype)
    qkv[:, (norms.heads[0] + norms.heads[1]) * norms.heads[2] :] = dv.to(kind).sum(2).flatten(1)
    return (found[0], found[1]) if trains else None


def _mean_by_norm(x: Tensor, count: int, norms: HeadNorms) -> Tensor:
    """Return for each value of `x` (N, count · D) the mean of those that share its norm."""
    if norms.is_whole:
        return x.mean(1, keepdim=True)
    width = norms.heads[2]
    return x.unflatten(1, (count, width)).mean(2).repeat_interleave(width, 1)


def _inverse_rms(x: Tensor, count: int, norms: HeadNorms) -> Tensor:
    return torch.rsqrt(_mean_by_norm(x.square(), count, norms) + norms.eps)


def _gains(weight: Tensor, count: int, norms: HeadNorms, kind: torch.dtype) -> Tensor:
    gains = weight.to(kind) + norms.offset
    return gains if norms.is_whole else gains.repeat(count)


@jit
def _partner(lane, HALF: tl.constexpr):
    """Return the dimension that each is rotated with: itself where none is."""
    return tl.where(lane < HALF, lane + HALF, tl.where(lane < 2 * HALF, lane - HALF, lane))


@jit
def _angles(cos, sin, row, rows, lane, HALF: tl.constexpr):
    """Return cosine, and sine with the sign of the half that it is multiplied into, by lane."""
    rotated = (lane < 2 * HALF) & (row < rows)
    at = row * HALF + tl.where(lane < HALF, lane, lane - HALF)
    c = tl.load(cos + at, mask=rotated, other=1.0)
    s = tl.load(sin + at, mask=rotated, other=0.0)
    return c[None, :], tl.where(lane < HALF, -s, s)[None, :]


@jit
def _inverse(x, eps, heads, WHOLE: tl.constexpr, WIDTH: tl.constexpr):
    """Return 1 / rms of `x` (HEADS, LANES), zero beyond its heads: by head, or one for all."""
    squares = tl.sum(x * x, 1)  # (HEADS,)
    if WHOLE:
        squares = tl.sum(squares, 0) + tl.zeros_like(squares)
        mean = squares / (heads * WIDTH)
    else:
        mean = squares / WIDTH
    return (1 / tl.sqrt(mean + eps))[:, None]


@jit
def _norm_part(
    source, weight, cos, sin, out, row, heads, eps, offset,
    ROTATES: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (lane < WIDTH)[None, :]
    own_weight = weight + head * WIDTH if WHOLE else weight + head * 0
    x = tl.load(source + head * WIDTH + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = _inverse(x, eps, heads, WHOLE, WIDTH)
    gains = tl.load(own_weight + lane[None, :], mask=inside, other=0.0).to(tl.float32) + offset
    y = x * scale * gains
    if ROTATES:
        # The partner again from memory: it is in the cache, and in another thread's registers.
        other = _partner(lane, HALF)[None, :]
        c, s = _angles(cos, sin, row, row + 1, lane, HALF)
        x = tl.load(source + head * WIDTH + other, mask=inside, other=0.0).to(tl.float32)
        gains = tl.load(own_weight + other, mask=inside, other=0.0).to(tl.float32) + offset
        y = y * c + x * scale * gains * s
    tl.store(out + head * WIDTH + lane[None, :], y.to(out.dtype.element_ty), mask=inside)


@jit
def _norm_heads_kernel(
    qkv, q_weight, k_weight, cos, sin, out, qkv_stride, out_stride, heads, shared, eps, offset,
    ROTATES: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source, to = qkv + row * qkv_stride, out + row * out_stride
    _norm_part(
        source, q_weight, cos, sin, to, row, heads, eps, offset,
        ROTATES, WHOLE, HALF, WIDTH, LANES, HEADS,
    )  # fmt: skip
    source, to = source + heads * WIDTH, to + heads * WIDTH
    _norm_part(
        source, k_weight, cos, sin, to, row, shared, eps, offset,
        ROTATES, WHOLE, HALF, WIDTH, LANES, SHARED,
    )  # fmt: skip


def norm_heads_triton(
    qkv: Tensor, norms: HeadNorms, tables: RotaryTables | None, out: Tensor
) -> None:
    """The fast twin of `norm_heads`; bf16, on a GPU: agrees within one rounding of bf16."""
    n_heads, shared, _ = norms.heads
    # Without a rotation the kernel loads no tables, but needs pointers.
    cos, sin = (qkv, qkv) if tables is None else tables
    _norm_heads_kernel[(len(qkv),)](
        qkv, norms.queries, norms.keys, cos, sin, out, row_stride(qkv), row_stride(out),
        n_heads, shared, norms.eps, norms.offset, **_shape(norms, tables),
    )  # fmt: skip


def _shape(norms: HeadNorms, tables: RotaryTables | None) -> dict[str, int | bool]:
    """Return what is fixed when a kernel is compiled."""
    n_heads, shared, width = norms.heads
    lanes, heads = next_power_of_2(width), next_power_of_2(n_heads)
    return {
        "ROTATES": tables is not None,
        "WHOLE": norms.is_whole,
        "HALF": width // 2 if tables is None else tables[0].shape[1],
        "WIDTH": width,
        "LANES": lanes,
        "HEADS": heads,
        "SHARED": next_power_of_2(shared),
        "num_warps": min(16, max(1, heads * lanes // LANES_A_WARP)),
    }


@jit
def _summed(
    source, head, lane, head_stride, part_stride, inside,
    PARTS: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([HEADS, LANES], tl.float32)
    # In a fixed order, so that the sum repeats to the bit.
    for part in tl.static_range(PARTS):
        at = source + head * head_stride + part * part_stride + lane[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return total


@jit
def _norm_backward_part(
    source, head_stride, part_stride, weight, cos, sin, at, row, rows, heads, eps, offset,
    ROTATES: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store the gradient of raw heads over them; return their share of the weight's."""
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (lane < WIDTH)[None, :] & (row < rows)
    own_weight = weight + head * WIDTH if WHOLE else weight + head * 0
    dy = _summed(source, head, lane, head_stride, part_stride, inside, PARTS, LANES, HEADS)
    if ROTATES:
        other = _partner(lane, HALF)
        c, s = _angles(cos, sin, row, rows, lane, HALF)
        beside = _summed(source, head, other, head_stride, part_stride, inside, PARTS, LANES, HEADS)
        dy = dy * c - beside * s  # sine's sign is flipped: the inverse rotation
    own = at + head * WIDTH + lane[None, :]
    x = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    scale = _inverse(x, eps, heads, WHOLE, WIDTH)
    unit = x * scale
    gains = tl.load(own_weight + lane[None, :], mask=inside, other=0.0).to(tl.float32) + offset
    scaled = dy * gains
    along = tl.sum(unit * scaled, 1)  # (HEADS,)
    if WHOLE:
        along = (tl.sum(along, 0) + tl.zeros_like(along)) / (heads * WIDTH)
    else:
        along = along / WIDTH
    gradient = (scaled - unit * along[:, None]) * scale
    # Over the raw values, which this program alone reads, each thread only where it writes.
    tl.store(own, gradient.to(at.dtype.element_ty), mask=inside)
    return dy * unit


@jit
def _norm_heads_backward_kernel(
    dq, dk, dv, q_token, q_head, k_token, k_head, k_part, v_token, v_head, v_part,
    q_weight, k_weight, cos, sin, qkv, qkv_stride, partial, rows, heads, shared, eps, offset,
    ROTATES: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, TRAINS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)[:, None]
    key = tl.arange(0, SHARED)[:, None]
    q_total = tl.zeros([HEADS, LANES], tl.float32)
    k_total = tl.zeros([SHARED, LANES], tl.float32)
    for offset_row in range(ROWS):
        row = program * ROWS + offset_row
        at = qkv + row * qkv_stride
        gained = _norm_backward_part(
            dq + row * q_token, q_head, 0, q_weight, cos, sin, at, row, rows, heads, eps, offset,
            ROTATES, WHOLE, HALF, WIDTH, 1, LANES, HEADS,
        )  # fmt: skip
        if TRAINS:
            q_total += gained
        at += heads * WIDTH
        gained = _norm_backward_part(
            dk + row * k_token, k_head, k_part, k_weight, cos, sin, at, row, rows, shared, eps,
            offset, ROTATES, WHOLE, HALF, WIDTH, PARTS, LANES, SHARED,
        )  # fmt: skip
        if TRAINS:
            k_total += gained
        inside = (key < shared) & (lane < WIDTH)[None, :] & (row < rows)
        value = _summed(dv + row * v_token, key, lane, v_head, v_part, inside, PARTS, LANES, SHARED)
        to = at + shared * WIDTH + key * WIDTH + lane[None, :]
        tl.store(to, value.to(qkv.dtype.element_ty), mask=inside)
    if TRAINS:
        real = lane < WIDTH
        if WHOLE:
            to = partial + program * (heads + shared) * WIDTH + lane[None, :]
            tl.store(to + head * WIDTH, q_total, mask=(head < heads) & real[None, :])
            to += heads * WIDTH
            tl.store(to + key * WIDTH, k_total, mask=(key < shared) & real[None, :])
        else:
            to = partial + program * 2 * WIDTH + lane
            tl.store(to, tl.sum(q_total, 0), mask=real)
            tl.store(to + WIDTH, tl.sum(k_total, 0), mask=real)


def norm_heads_backward_triton(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    norms: HeadNorms,
    tables: RotaryTables | None,
    qkv: Tensor,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor] | None:
    """The fast twin of `norm_heads_backward`; bf16, on a GPU: within two roundings of bf16."""
    n_heads, shared, _ = norms.heads
    rows = len(qkv)
    for gradient in (dq, dk, dv):
        assert gradient.stride(-1) == 1, "a head's columns must lie side by side"
    assert dq.shape[2] == 1, "queries have one part"
    assert dk.shape[2] == dv.shape[2], "keys have as many parts as values"
    cos, sin = (qkv, qkv) if tables is None else tables
    # Two stages without atomics: partial sums by program, then their sum in a fixed order.
    together = ROWS_A_PARTIAL if trains else 1
    programs = -(-rows // together)
    sizes = len(norms.queries), len(norms.keys)
    partial = qkv.new_empty(programs if trains else 0, sum(sizes), dtype=torch.float32)
    _norm_heads_backward_kernel[(programs,)](
        dq, dk, dv, *dq.stride()[:2], *dk.stride()[:3], *dv.stride()[:3],
        norms.queries, norms.keys, cos, sin, qkv, row_stride(qkv), partial, rows,
        n_heads, shared, norms.eps, norms.offset,
        PARTS=dk.shape[2], TRAINS=trains, ROWS=together, **_shape(norms, tables),
    )  # fmt: skip
    if not trains:
        return None
    queries, keys = partial.sum(0).split(sizes)
    return queries, keys
