"""Triton kernels of causal attention within documents, forward and backward (arXiv 2307.08691).

What differs from the textbook: a token sees its document from `begins` on, so one document a
sequence and packed sequences are the same to the kernel; queries and keys are read from one tensor,
values from another, which may be columns of one; dq is written over q; query heads that share a
key/value head leave their parts of dk and dv apart, and the pass that undoes the rotation of dq and
dk sums them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.attention import AttentionSettings
from lora.kernels.step.jit import jit, next_power_of_2, row_stride, soft_cap, tl, triton
from lora.kernels.step.rotary import RotaryTables


@dataclass(frozen=True)
class Tiles:
    """How much of the batch a kernel's programs take, and how they run."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Of loads that are ahead of the loop."""


BLOCK_TOKENS = 64
"""All sizes of tiles divide it."""
NARROW = {
    "forward": Tiles(64, 64, 4, 3),
    "keys": Tiles(64, 64, 4, 2),
    "queries": Tiles(64, 64, 4, 2),
}
"""By kernel. At 135M on an H200 a step takes 6.5 ms so, 7.3 with 128 queries, 7.2 with 32 keys."""
WIDE_HEAD = 128
WIDE = {
    "forward": Tiles(64, 32, 4, 2),
    "keys": Tiles(32, 64, 8, 2),
    "queries": Tiles(64, 32, 8, 2),
}
"""Of heads wider than that: smaller, so that they stay in registers and shared memory. Matmuls of
64 rows or more have instructions of their own on Hopper."""
MIN_LANES = 16
"""Columns of a tile that tl.dot takes."""
RESERVED_BYTES = 2048
"""Of a multiprocessor's shared memory: what CUDA keeps, and the kernels' small tensors."""
NO_WINDOW = 2**30
"""Tokens: more than any sequence has, so that the kernels need no case of their own."""
LOG2_E = 1.4426950408889634
"""Exponentials are taken to base 2, which the device has an instruction for."""


@jit
def _inside(there, lane, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Return which values of a tile exist: `there` (rows, 1), and of each row the first WIDTH."""
    if LANES != WIDTH:  # no mask over columns where there is none beyond the width
        there = there & (lane < WIDTH)[None, :]
    return there


@jit
def _values(
    keys_at, v_at, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Return where the head's values begin: in one tensor with queries and keys, or in their own.

    In one tensor keys and values have the same offsets, which saves registers: with offsets of
    their own one program less fits on a multiprocessor.
    """
    at = v_at + (head // GROUP) * WIDTH
    if TOGETHER:
        at = keys_at + (HEADS // GROUP) * WIDTH
    return at


@jit
def _of_values(at, key, lane, v_stride, TOGETHER: tl.constexpr):
    """Return the offsets of values, where those of keys are `at`."""
    if not TOGETHER:
        at = key.to(tl.int64)[:, None] * v_stride + lane[None, :]
    return at


@jit
def _capped(logits, cap, CAPS: tl.constexpr):
    if CAPS:
        logits = soft_cap(logits, cap)
    return logits


@jit
def _times_slope(gradient, capped, cap, CAPS: tl.constexpr):
    """Return `gradient`, of logits that were capped, before they were: times 1 − tanh²."""
    if CAPS:
        gradient = gradient * (1 - (capped / cap) * (capped / cap))
    return gradient


@jit
def _forward_kernel(
    qk, v_at, out, lse, begins, stride, v_stride, out_stride, count, scale, window, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    TOGETHER: tl.constexpr, CAPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    lane = tl.arange(0, LANES)
    real = row < count
    wide_row = row.to(tl.int64)
    q = tl.load(
        qk + wide_row[:, None] * stride + head * WIDTH + lane[None, :],
        mask=_inside(real[:, None], lane, WIDTH, LANES), other=0.0,
    )  # fmt: skip
    begin = tl.load(begins + row, mask=real, other=0)
    keys_at = qk + (HEADS + head // GROUP) * WIDTH
    values_at = _values(keys_at, v_at, head, HEADS, GROUP, WIDTH, TOGETHER)
    # Not −inf: a query that sees no key of a tile would compute −inf − −inf, which is NaN.
    highest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    summed = tl.zeros([QUERIES, LANES], dtype=tl.float32)
    # `begins` never decreases, so the tile's first query sees the furthest back.
    low = tl.load(begins + first)
    low = tl.maximum(low, first - window + 1)
    low = (low // KEYS) * KEYS
    for start in range(low, tl.minimum(first + QUERIES, count), KEYS):
        key = start + tl.arange(0, KEYS)
        there = _inside((key < count)[:, None], lane, WIDTH, LANES)
        at = key.to(tl.int64)[:, None] * stride + lane[None, :]
        k = tl.load(keys_at + at, mask=there, other=0.0)
        at = _of_values(at, key, lane, v_stride, TOGETHER)
        v = tl.load(values_at + at, mask=there, other=0.0)
        logits = _capped(tl.dot(q, tl.trans(k)) * scale, cap, CAPS)  # (QUERIES, KEYS)
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
        y.to(out.dtype.element_ty), mask=_inside(real[:, None], lane, WIDTH, LANES),
    )  # fmt: skip
    # All that backward needs to recompute the weights: (H, N) instead of (H, N, N).
    tl.store(lse + head * count + row, highest + tl.log2(total), mask=real)


@jit
def _keys_kernel(
    qk, v_at, out, d_out, lse, begins, ends, partial, stride, v_stride, out_stride, d_out_stride,
    count, scale, window, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    TOGETHER: tl.constexpr, CAPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    key = first + tl.arange(0, KEYS)
    lane = tl.arange(0, LANES)
    there = key < count
    keys_at = qk + (HEADS + head // GROUP) * WIDTH
    values_at = _values(keys_at, v_at, head, HEADS, GROUP, WIDTH, TOGETHER)
    exists = _inside(there[:, None], lane, WIDTH, LANES)
    at = key.to(tl.int64)[:, None] * stride + lane[None, :]
    k = tl.load(keys_at + at, mask=exists, other=0.0)
    at = _of_values(at, key, lane, v_stride, TOGETHER)
    v = tl.load(values_at + at, mask=exists, other=0.0)
    dk = tl.zeros([KEYS, LANES], dtype=tl.float32)
    dv = tl.zeros([KEYS, LANES], dtype=tl.float32)
    # Of the tile's keys the last one is seen by the furthest query, in its document or its window.
    last = tl.minimum(first + KEYS, count) - 1
    high = tl.minimum(tl.load(ends + last), last + window)
    for start in range((first // QUERIES) * QUERIES, high, QUERIES):
        row = start + tl.arange(0, QUERIES)
        real = row < count
        wide_row = row.to(tl.int64)[:, None]
        begin = tl.load(begins + row, mask=real, other=count)  # queries beyond the end see nothing
        inner = head * WIDTH + lane[None, :]
        filled = _inside(real[:, None], lane, WIDTH, LANES)
        q = tl.load(qk + wide_row * stride + inner, mask=filled, other=0.0)
        dy = tl.load(d_out + wide_row * d_out_stride + inner, mask=filled, other=0.0)
        y = tl.load(out + wide_row * out_stride + inner, mask=filled, other=0.0)
        # Σ y · dy, the softmax's share of the gradient, without a pass and a buffer of its own.
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)  # (QUERIES,)
        level = tl.load(lse + head * count + row, mask=real, other=0.0)
        logits = _capped(tl.dot(k, tl.trans(q)) * scale, cap, CAPS)  # (KEYS, QUERIES)
        sees = (key[:, None] >= begin[None, :]) & (key[:, None] <= row[None, :])
        sees &= row[None, :] - key[:, None] < window
        # Normalised already: `level` holds the logarithm of the sum.
        weights = tl.where(sees, tl.exp2(logits - level[None, :]), 0.0)
        dv += tl.dot(weights.to(dy.dtype), dy)
        d_weights = tl.dot(v, tl.trans(dy))  # (KEYS, QUERIES)
        d_logits = _times_slope(weights * (d_weights - delta[None, :]), logits, cap, CAPS)
        dk += tl.dot(d_logits.to(q.dtype), q)
    # In fp32 for each query head: atomic sums over the group would depend on the order of programs.
    to = partial + (key.to(tl.int64)[:, None] * HEADS + head) * (2 * WIDTH) + lane[None, :]
    # `scale` carries LOG2_E for exp2; the gradient has the scale alone. Kernels read no globals.
    tl.store(to, dk * (scale / 1.4426950408889634), mask=exists)
    tl.store(to + WIDTH, dv, mask=exists)


@jit
def _queries_kernel(
    qk, v_at, out, d_out, lse, begins, stride, v_stride, out_stride, d_out_stride,
    count, scale, window, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    TOGETHER: tl.constexpr, CAPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    lane = tl.arange(0, LANES)
    real = row < count
    wide_row = row.to(tl.int64)[:, None]
    inner = head * WIDTH + lane[None, :]
    q_at = qk + wide_row * stride + inner
    filled = _inside(real[:, None], lane, WIDTH, LANES)
    q = tl.load(q_at, mask=filled, other=0.0)
    dy = tl.load(d_out + wide_row * d_out_stride + inner, mask=filled, other=0.0)
    y = tl.load(out + wide_row * out_stride + inner, mask=filled, other=0.0)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    level = tl.load(lse + head * count + row, mask=real, other=0.0)
    begin = tl.load(begins + row, mask=real, other=0)
    keys_at = qk + (HEADS + head // GROUP) * WIDTH
    values_at = _values(keys_at, v_at, head, HEADS, GROUP, WIDTH, TOGETHER)
    dq = tl.zeros([QUERIES, LANES], dtype=tl.float32)
    low = tl.load(begins + first)
    low = tl.maximum(low, first - window + 1)
    low = (low // KEYS) * KEYS
    for start in range(low, tl.minimum(first + QUERIES, count), KEYS):
        key = start + tl.arange(0, KEYS)
        there = _inside((key < count)[:, None], lane, WIDTH, LANES)
        at = key.to(tl.int64)[:, None] * stride + lane[None, :]
        k = tl.load(keys_at + at, mask=there, other=0.0)
        at = _of_values(at, key, lane, v_stride, TOGETHER)
        v = tl.load(values_at + at, mask=there, other=0.0)
        logits = _capped(tl.dot(q, tl.trans(k)) * scale, cap, CAPS)
        sees = (key[None, :] >= begin[:, None]) & (key[None, :] <= row[:, None])
        sees &= row[:, None] - key[None, :] < window
        weights = tl.where(sees, tl.exp2(logits - level[:, None]), 0.0)
        d_weights = tl.dot(dy, tl.trans(v))
        d_logits = _times_slope(weights * (d_weights - delta[:, None]), logits, cap, CAPS)
        dq += tl.dot(d_logits.to(k.dtype), k)
    dq = dq * (scale / 1.4426950408889634)
    # Over q, which no other program reads: the kernel of keys has run before this one.
    tl.store(q_at, dq.to(qk.dtype.element_ty), mask=filled)


@jit
def _sum_and_rotate_kernel(
    qkv, partial, cos, sin, stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROTATES: tl.constexpr, LANES: tl.constexpr, ALL_LANES: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    kind = qkv.dtype.element_ty
    shared: tl.constexpr = HEADS // GROUP
    c = tl.full([1, LANES], 1.0, tl.float32)
    s = tl.zeros([1, LANES], tl.float32)
    if ROTATES:
        c = tl.load(cos + row * HALF + lane, mask=lane < HALF, other=1.0)[None, :]
        s = tl.load(sin + row * HALF + lane, mask=lane < HALF, other=0.0)[None, :]
        head = tl.arange(0, HEADS_BLOCK)
        inside = _inside((head < HEADS)[:, None], lane, HALF, LANES)
        at = qkv + row * stride + head[:, None] * WIDTH + lane[None, :]
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        # Sine's sign is flipped: the inverse rotation.
        tl.store(at, (one * c + two * s).to(kind), mask=inside)
        tl.store(at + HALF, (two * c - one * s).to(kind), mask=inside)
    head = tl.arange(0, SHARED_BLOCK)
    inside = _inside((head < shared)[:, None], lane, HALF, LANES)
    zeros = tl.zeros([SHARED_BLOCK, LANES], tl.float32)
    k_one, k_two, v_one, v_two = zeros, zeros, zeros, zeros
    # In a fixed order, so that the sum repeats to the bit.
    for part in tl.static_range(GROUP):
        at = partial + (row * HEADS + head[:, None] * GROUP + part) * (2 * WIDTH) + lane[None, :]
        k_one += tl.load(at, mask=inside, other=0.0)
        k_two += tl.load(at + HALF, mask=inside, other=0.0)
        v_one += tl.load(at + WIDTH, mask=inside, other=0.0)
        v_two += tl.load(at + WIDTH + HALF, mask=inside, other=0.0)
    to = qkv + row * stride + (HEADS + head[:, None]) * WIDTH + lane[None, :]
    tl.store(to, (k_one * c + k_two * s).to(kind), mask=inside)
    tl.store(to + HALF, (k_two * c - k_one * s).to(kind), mask=inside)
    tl.store(to + shared * WIDTH, v_one.to(kind), mask=inside)
    tl.store(to + shared * WIDTH + HALF, v_two.to(kind), mask=inside)
    if 2 * HALF < WIDTH:  # dimensions that are not rotated
        lane = 2 * HALF + tl.arange(0, ALL_LANES)
        inside = (head < shared)[:, None] & (lane < WIDTH)[None, :]
        k_rest = tl.zeros([SHARED_BLOCK, ALL_LANES], tl.float32)
        v_rest = tl.zeros([SHARED_BLOCK, ALL_LANES], tl.float32)
        for part in tl.static_range(GROUP):
            at = partial + (row * HEADS + head[:, None] * GROUP + part) * (2 * WIDTH)
            k_rest += tl.load(at + lane[None, :], mask=inside, other=0.0)
            v_rest += tl.load(at + WIDTH + lane[None, :], mask=inside, other=0.0)
        to = qkv + row * stride + (HEADS + head[:, None]) * WIDTH + lane[None, :]
        tl.store(to, k_rest.to(kind), mask=inside)
        tl.store(to + shared * WIDTH, v_rest.to(kind), mask=inside)


def fitting_stages(name: str, tiles: Tiles, lanes: int, shared_bytes: int) -> int:
    """Return the stages for which a multiprocessor with so much shared memory has room.

    GPUs without a data centre's shared memory have less than half; results are the same.
    """
    own, other = tiles.queries, tiles.keys
    if name == "keys":
        own, other = other, own
    # Rows of bf16: of the program's own tile q, or q and dy, or k and v; and two for each stage.
    rows = (shared_bytes - RESERVED_BYTES) // (2 * lanes)
    held = own if name == "forward" else 2 * own
    return max(1, min(tiles.stages, (rows - held) // (2 * other)))


def _launch(
    name: str, settings: AttentionSettings, qk: Tensor, v: Tensor
) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """Return the programs of kernel `name`, tiles and heads, and what they are compiled for."""
    n_heads, shared, width = settings.heads
    tiles = (NARROW if width <= WIDE_HEAD else WIDE)[name]
    lanes, stages = max(MIN_LANES, next_power_of_2(width)), tiles.stages
    if qk.is_cuda:
        about = torch.cuda.get_device_properties(qk.device)
        stages = fitting_stages(name, tiles, lanes, about.shared_memory_per_multiprocessor)
    size = tiles.keys if name == "keys" else tiles.queries
    follows = v.data_ptr() == qk.data_ptr() + settings.split * qk.element_size()
    return (triton.cdiv(len(qk), size), n_heads), {
        "HEADS": n_heads,
        "GROUP": n_heads // shared,
        "WIDTH": width,
        "LANES": lanes,
        "TOGETHER": follows and qk.stride(0) == v.stride(0),
        "CAPS": settings.softcap > 0,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": stages,
    }


def _numbers(settings: AttentionSettings, count: int) -> tuple[int, float, int, float]:
    """Return tokens, scale, window and cap as the kernels take them."""
    window = settings.window_tokens or NO_WINDOW
    return count, settings.scale * LOG2_E, window, settings.softcap * LOG2_E


def attend_triton(
    qk: Tensor, v: Tensor, begins: Tensor, settings: AttentionSettings, out: Tensor, lse: Tensor
) -> None:
    """Changes `out` (N, H·D) and `lse` (H, N) in place: the fast twin of `attend`.

    `lse` is log2 of the softmax's sum, for the backward pass. bf16, on a GPU: within 5e-3.
    """
    grid, shape = _launch("forward", settings, qk, v)
    _forward_kernel[grid](
        qk, v, out, lse, begins, row_stride(qk), row_stride(v), row_stride(out),
        *_numbers(settings, len(qk)), **shape,
    )  # fmt: skip


def attend_gradients_triton(
    qk: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    settings: AttentionSettings,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
) -> None:
    """Changes `qk` and `partial` (N, H, 2, D), fp32, in place: dq, and dk and dv by query head.

    dq is written over the queries. bf16, on a GPU: within 1e-2.
    """
    strides = row_stride(qk), row_stride(v), row_stride(out), row_stride(d_out)
    numbers = *strides, *_numbers(settings, len(qk))
    # First the kernel that still needs q; the next one overwrites it.
    grid, shape = _launch("keys", settings, qk, v)
    _keys_kernel[grid](qk, v, out, d_out, lse, begins, ends, partial, *numbers, **shape)
    grid, shape = _launch("queries", settings, qk, v)
    _queries_kernel[grid](qk, v, out, d_out, lse, begins, *numbers, **shape)


def attend_backward_triton(
    qkv: Tensor,
    begins: Tensor,
    ends: Tensor,
    settings: AttentionSettings,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
    tables: RotaryTables | None,
) -> None:
    """Changes `qkv` (N, W) in place: it becomes its gradient, with the rotation undone.

    `partial` (N, H, 2, D) fp32 is scratch for dk and dv of each query head. `tables` are cosine and
    sine, (N, R/2), of the rotation that R dimensions of queries and keys had. bf16, on a GPU:
    within 1e-2.
    """
    n_heads, shared, width = settings.heads
    qk, v = qkv[:, : settings.split], qkv[:, settings.split :]
    attend_gradients_triton(qk, v, begins, ends, settings, out, lse, d_out, partial)
    half = width // 2 if tables is None else tables[0].shape[1]
    cos, sin = (partial, partial) if tables is None else tables
    # Without a rotation the kernel loads no tables, but needs pointers.
    _sum_and_rotate_kernel[(len(qkv),)](
        qkv, partial, cos, sin, row_stride(qkv), HEADS=n_heads, GROUP=n_heads // shared,
        WIDTH=width, HALF=half, ROTATES=tables is not None, LANES=next_power_of_2(half),
        ALL_LANES=next_power_of_2(width), HEADS_BLOCK=next_power_of_2(n_heads),
        SHARED_BLOCK=next_power_of_2(shared),
    )  # fmt: skip
