"""Triton kernels of causal attention within documents, forward and backward (arXiv 2307.08691).

What differs from the textbook: a token sees its document from `begins` on, so one document a
sequence and packed sequences are the same to the kernel; queries, keys and values are read from one
tensor (N, W), and dq is written over q; query heads that share a key/value head leave their parts
of dk and dv apart, and the pass that undoes the rotation of dq and dk sums them.
"""

from __future__ import annotations

from torch import Tensor

from lora.kernels.step.attention import Heads
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl, triton

BLOCK_QUERIES, BLOCK_KEYS = 64, 64
"""Tile sizes: at 135M on an H200 a step takes 6.5 ms so, 7.3 with 128 queries, 7.2 with 32
keys."""
WARPS = 4
NO_WINDOW = 2**30
"""Tokens: more than any sequence has, so that the kernels need no case of their own."""
LOG2_E = 1.4426950408889634
"""Exponentials are taken to base 2, which the device has an instruction for."""


@jit
def _forward_kernel(
    qkv, out, lse, begins, stride, out_stride, count, scale, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    lane = tl.arange(0, WIDTH)
    real = row < count
    wide_row = row.to(tl.int64)
    q = tl.load(
        qkv + wide_row[:, None] * stride + head * WIDTH + lane[None, :],
        mask=real[:, None], other=0.0,
    )  # fmt: skip
    begin = tl.load(begins + row, mask=real, other=0)
    keys_at = qkv + (HEADS + head // GROUP) * WIDTH
    values_at = keys_at + (HEADS // GROUP) * WIDTH
    # Not −inf: a query that sees no key of a tile would compute −inf − −inf, which is NaN.
    highest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    # `begins` never decreases, so the tile's first query sees the furthest back.
    low = tl.load(begins + first)
    low = tl.maximum(low, first - window + 1)
    low = (low // KEYS) * KEYS
    for start in range(low, tl.minimum(first + QUERIES, count), KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < count)[:, None]
        at = key.to(tl.int64)[:, None] * stride + lane[None, :]
        k = tl.load(keys_at + at, mask=there, other=0.0)
        v = tl.load(values_at + at, mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * scale  # (QUERIES, KEYS)
        sees = (key[None, :] >= begin[:, None]) & (key[None, :] <= row[:, None])
        sees &= row[:, None] - key[None, :] < window
        logits = tl.where(sees, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        # Sums so far were taken relative to a lower maximum.
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        # Weights in bf16, for the tensor cores; the sum stays fp32.
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = higher
    y = summed / total[:, None]
    tl.store(
        out + wide_row[:, None] * out_stride + head * WIDTH + lane[None, :],
        y.to(out.dtype.element_ty), mask=real[:, None],
    )  # fmt: skip
    # All that backward needs to recompute the weights: (H, N) instead of (H, N, N).
    tl.store(lse + head * count + row, highest + tl.log2(total), mask=real)


@jit
def _keys_kernel(
    qkv, out, d_out, lse, begins, ends, partial, stride, out_stride, d_out_stride,
    count, scale, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    key = first + tl.arange(0, KEYS)
    lane = tl.arange(0, WIDTH)
    there = key < count
    keys_at = qkv + (HEADS + head // GROUP) * WIDTH
    values_at = keys_at + (HEADS // GROUP) * WIDTH
    at = key.to(tl.int64)[:, None] * stride + lane[None, :]
    k = tl.load(keys_at + at, mask=there[:, None], other=0.0)
    v = tl.load(values_at + at, mask=there[:, None], other=0.0)
    dk = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    dv = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    # Of the tile's keys the last one is seen by the furthest query, in its document or its window.
    last = tl.minimum(first + KEYS, count) - 1
    high = tl.minimum(tl.load(ends + last), last + window)
    for start in range((first // QUERIES) * QUERIES, high, QUERIES):
        row = start + tl.arange(0, QUERIES)
        real = row < count
        wide_row = row.to(tl.int64)[:, None]
        begin = tl.load(begins + row, mask=real, other=count)  # queries beyond the end see nothing
        inner = head * WIDTH + lane[None, :]
        q = tl.load(qkv + wide_row * stride + inner, mask=real[:, None], other=0.0)
        dy = tl.load(d_out + wide_row * d_out_stride + inner, mask=real[:, None], other=0.0)
        y = tl.load(out + wide_row * out_stride + inner, mask=real[:, None], other=0.0)
        # Σ y · dy, the softmax's share of the gradient, without a pass and a buffer of its own.
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)  # (QUERIES,)
        level = tl.load(lse + head * count + row, mask=real, other=0.0)
        logits = tl.dot(k, tl.trans(q)) * scale  # (KEYS, QUERIES)
        sees = (key[:, None] >= begin[None, :]) & (key[:, None] <= row[None, :])
        sees &= row[None, :] - key[:, None] < window
        # Normalised already: `level` holds the logarithm of the sum.
        weights = tl.where(sees, tl.exp2(logits - level[None, :]), 0.0)
        dv += tl.dot(weights.to(dy.dtype), dy)
        d_weights = tl.dot(v, tl.trans(dy))  # (KEYS, QUERIES)
        d_logits = weights * (d_weights - delta[None, :])
        dk += tl.dot(d_logits.to(q.dtype), q)
    # In fp32 for each query head: atomic sums over the group would depend on the order of programs.
    to = partial + (key.to(tl.int64)[:, None] * HEADS + head) * (2 * WIDTH) + lane[None, :]
    # `scale` carries LOG2_E for exp2; the gradient has the scale alone. Kernels read no globals.
    tl.store(to, dk * (scale / 1.4426950408889634), mask=there[:, None])
    tl.store(to + WIDTH, dv, mask=there[:, None])


@jit
def _queries_kernel(
    qkv, out, d_out, lse, begins, stride, out_stride, d_out_stride, count, scale, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    lane = tl.arange(0, WIDTH)
    real = row < count
    wide_row = row.to(tl.int64)[:, None]
    inner = head * WIDTH + lane[None, :]
    q_at = qkv + wide_row * stride + inner
    q = tl.load(q_at, mask=real[:, None], other=0.0)
    dy = tl.load(d_out + wide_row * d_out_stride + inner, mask=real[:, None], other=0.0)
    y = tl.load(out + wide_row * out_stride + inner, mask=real[:, None], other=0.0)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    level = tl.load(lse + head * count + row, mask=real, other=0.0)
    begin = tl.load(begins + row, mask=real, other=0)
    keys_at = qkv + (HEADS + head // GROUP) * WIDTH
    values_at = keys_at + (HEADS // GROUP) * WIDTH
    dq = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    low = tl.load(begins + first)
    low = tl.maximum(low, first - window + 1)
    low = (low // KEYS) * KEYS
    for start in range(low, tl.minimum(first + QUERIES, count), KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < count)[:, None]
        at = key.to(tl.int64)[:, None] * stride + lane[None, :]
        k = tl.load(keys_at + at, mask=there, other=0.0)
        v = tl.load(values_at + at, mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * scale
        sees = (key[None, :] >= begin[:, None]) & (key[None, :] <= row[:, None])
        sees &= row[:, None] - key[None, :] < window
        weights = tl.where(sees, tl.exp2(logits - level[:, None]), 0.0)
        d_weights = tl.dot(dy, tl.trans(v))
        d_logits = weights * (d_weights - delta[:, None])
        dq += tl.dot(d_logits.to(k.dtype), k)
    dq = dq * (scale / 1.4426950408889634)
    # Over q, which no other program reads: the kernel of keys has run before this one.
    tl.store(q_at, dq.to(qkv.dtype.element_ty), mask=real[:, None])


@jit
def _sum_and_rotate_kernel(
    qkv, partial, cos, sin, stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ROTATES: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, HALF)
    kind = qkv.dtype.element_ty
    width: tl.constexpr = 2 * HALF
    shared: tl.constexpr = HEADS // GROUP
    c = tl.full([1, HALF], 1.0, tl.float32)
    s = tl.zeros([1, HALF], tl.float32)
    if ROTATES:
        c = tl.load(cos + row * HALF + lane)[None, :]
        s = tl.load(sin + row * HALF + lane)[None, :]
        head = tl.arange(0, HEADS_BLOCK)
        inside = (head < HEADS)[:, None]
        at = qkv + row * stride + head[:, None] * width + lane[None, :]
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        # Sine's sign is flipped: the inverse rotation.
        tl.store(at, (one * c + two * s).to(kind), mask=inside)
        tl.store(at + HALF, (two * c - one * s).to(kind), mask=inside)
    head = tl.arange(0, SHARED_BLOCK)
    inside = (head < shared)[:, None]
    zeros = tl.zeros([SHARED_BLOCK, HALF], tl.float32)
    k_one, k_two, v_one, v_two = zeros, zeros, zeros, zeros
    # In a fixed order, so that the sum repeats to the bit.
    for part in tl.static_range(GROUP):
        at = partial + (row * HEADS + head[:, None] * GROUP + part) * (2 * width) + lane[None, :]
        k_one += tl.load(at, mask=inside, other=0.0)
        k_two += tl.load(at + HALF, mask=inside, other=0.0)
        v_one += tl.load(at + width, mask=inside, other=0.0)
        v_two += tl.load(at + width + HALF, mask=inside, other=0.0)
    to = qkv + row * stride + (HEADS + head[:, None]) * width + lane[None, :]
    tl.store(to, (k_one * c + k_two * s).to(kind), mask=inside)
    tl.store(to + HALF, (k_two * c - k_one * s).to(kind), mask=inside)
    tl.store(to + shared * width, v_one.to(kind), mask=inside)
    tl.store(to + shared * width + HALF, v_two.to(kind), mask=inside)


def attend_triton(
    qkv: Tensor,
    begins: Tensor,
    heads: Heads,
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Changes `out` (N, H·D) and `lse` (H, N) in place: the fast twin of `attend`.

    `lse` is log2 of the softmax's sum, for the backward pass. bf16, on a GPU: within 5e-3.
    """
    n_heads, shared, width = heads
    count = len(qkv)
    _forward_kernel[(triton.cdiv(count, BLOCK_QUERIES), n_heads)](
        qkv, out, lse, begins, row_stride(qkv), row_stride(out), count, scale * LOG2_E,
        window_tokens or NO_WINDOW, HEADS=n_heads, GROUP=n_heads // shared, WIDTH=width,
        QUERIES=BLOCK_QUERIES, KEYS=BLOCK_KEYS, num_warps=WARPS, num_stages=3,
    )  # fmt: skip


def attend_backward_triton(
    qkv: Tensor,
    begins: Tensor,
    ends: Tensor,
    heads: Heads,
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
    tables: tuple[Tensor, Tensor] | None,
) -> None:
    """Changes `qkv` (N, W) in place: it becomes its gradient, with the rotation undone.

    `partial` (N, H, 2, D) fp32 is scratch for dk and dv of each query head. `tables` are cosine and
    sine, (N, D/2), of the rotation that queries and keys had. bf16, on a GPU: within 1e-2.
    """
    n_heads, shared, width = heads
    count, group, window = len(qkv), n_heads // shared, window_tokens or NO_WINDOW
    strides = row_stride(qkv), row_stride(out), row_stride(d_out)
    sizes = {"HEADS": n_heads, "GROUP": group, "WIDTH": width}
    blocks = {"QUERIES": BLOCK_QUERIES, "KEYS": BLOCK_KEYS, "num_warps": WARPS, "num_stages": 2}
    # First the kernel that still needs q; the next one overwrites it.
    _keys_kernel[(triton.cdiv(count, BLOCK_KEYS), n_heads)](
        qkv, out, d_out, lse, begins, ends, partial, *strides, count, scale * LOG2_E, window,
        **sizes, **blocks,
    )  # fmt: skip
    _queries_kernel[(triton.cdiv(count, BLOCK_QUERIES), n_heads)](
        qkv, out, d_out, lse, begins, *strides, count, scale * LOG2_E, window, **sizes, **blocks
    )
    cos, sin = (partial, partial) if tables is None else tables
    # Without a rotation the kernel loads no tables, but needs pointers.
    _sum_and_rotate_kernel[(count,)](
        qkv, partial, cos, sin, strides[0], HEADS=n_heads, GROUP=group, HALF=width // 2,
        ROTATES=tables is not None, HEADS_BLOCK=next_power_of_2(n_heads),
        SHARED_BLOCK=next_power_of_2(shared),
    )  # fmt: skip
