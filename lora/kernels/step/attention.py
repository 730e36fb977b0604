"""Causal attention within documents, forward and backward, on one tensor of projections.

What differs from the textbook (arXiv 2307.08691): a token sees its document from `begins` on, so
rows of one document and packed rows are the same to the kernel; queries, keys and values are read
from one tensor (N, W) and dq is written over q; heads that share keys leave their parts of dk and
dv apart, and the pass that rotates dq and dk back sums them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, next_power_of_2, row_stride, tl, triton
from lora.kernels.step.rotary import rotate_heads

BLOCK_QUERIES, BLOCK_KEYS = 64, 64
WARPS = 4
LOG2_E = 1.4426950408889634


def find_begins(position_ids: Tensor) -> Tensor:
    """Return the place of the first token of each token's document, (N,) int32.

    `position_ids` (N,) restart at 0 in each document and count up in it.
    """
    place = torch.arange(len(position_ids), device=position_ids.device)
    return (place - position_ids).to(torch.int32)


def find_ends(begins: Tensor) -> Tensor:
    """Return the place after the last token of each token's document, (N,) int32."""
    places = torch.arange(len(begins), device=begins.device, dtype=begins.dtype)
    return torch.searchsorted(begins, begins, right=True).to(torch.int32).maximum(places + 1)


def document_attention(
    qkv: Tensor, begins: Tensor, heads: tuple[int, int, int], scale: float, window_tokens: int
) -> Tensor:
    """Return the attention's output (N, H·D); the twin that autograd follows.

    Document by document, so that a NaN in one goes into no other.
    `qkv` (N, W) holds H heads of queries, then the shared heads of keys, then of values, each of
    width D; `heads` is (H, shared, D). `window_tokens` 0: a token sees all of its document.
    """
    _, sizes = begins.unique_consecutive(return_counts=True)
    parts = qkv.split(sizes.tolist())
    return torch.cat([_attend_one(part, heads, scale, window_tokens) for part in parts])


def _attend_one(
    qkv: Tensor, heads: tuple[int, int, int], scale: float, window_tokens: int
) -> Tensor:
    n_heads, shared, width = heads
    q, k, v = qkv.unflatten(1, (-1, width)).split((n_heads, shared, shared), 1)  # (n, heads, D)
    k, v = (x.repeat_interleave(n_heads // shared, 1) for x in (k, v))  # (n, H, D)
    place = torch.arange(len(qkv), device=qkv.device)
    sees = place <= place[:, None]  # (n, n)
    if window_tokens:
        sees &= place[:, None] - place < window_tokens
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)  # (n, H·D)


def attend(
    qkv: Tensor,
    begins: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Changes `out` (N, H·D) in place; the plain twin of `attend_triton` leaves `lse` alone."""
    out.copy_(document_attention(qkv, begins, heads, scale, window_tokens))


def attend_backward(
    qkv: Tensor,
    begins: Tensor,
    ends: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
    tables: tuple[Tensor, Tensor] | None,
) -> None:
    """Changes `qkv` (N, W) in place; the plain twin of `attend_backward_triton`, by autograd."""
    inputs = qkv.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = document_attention(inputs, begins, heads, scale, window_tokens)
    qkv.copy_(torch.autograd.grad(y, inputs, d_out)[0])
    if tables is not None:
        rotate_heads(qkv, tables[0], -tables[1], heads[0] + heads[1])


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
    highest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
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
        logits = tl.where(sees, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = higher
    y = summed / total[:, None]
    tl.store(
        out + wide_row[:, None] * out_stride + head * WIDTH + lane[None, :],
        y.to(out.dtype.element_ty), mask=real[:, None],
    )  # fmt: skip
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
    last = tl.minimum(first + KEYS, count) - 1
    high = tl.minimum(tl.load(ends + last), last + window)
    for start in range((first // QUERIES) * QUERIES, high, QUERIES):
        row = start + tl.arange(0, QUERIES)
        real = row < count
        wide_row = row.to(tl.int64)[:, None]
        begin = tl.load(begins + row, mask=real, other=count)
        inner = head * WIDTH + lane[None, :]
        q = tl.load(qkv + wide_row * stride + inner, mask=real[:, None], other=0.0)
        dy = tl.load(d_out + wide_row * d_out_stride + inner, mask=real[:, None], other=0.0)
        y = tl.load(out + wide_row * out_stride + inner, mask=real[:, None], other=0.0)
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        level = tl.load(lse + head * count + row, mask=real, other=0.0)
        logits = tl.dot(k, tl.trans(q)) * scale  # (KEYS, QUERIES)
        sees = (key[:, None] >= begin[None, :]) & (key[:, None] <= row[None, :])
        sees &= row[None, :] - key[:, None] < window
        weights = tl.where(sees, tl.exp2(logits - level[None, :]), 0.0)
        dv += tl.dot(weights.to(dy.dtype), dy)
        d_weights = tl.dot(v, tl.trans(dy))  # (KEYS, QUERIES)
        d_logits = weights * (d_weights - delta[None, :])
        dk += tl.dot(d_logits.to(q.dtype), q)
    to = partial + (key.to(tl.int64)[:, None] * HEADS + head) * (2 * WIDTH) + lane[None, :]
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
    tl.store(q_at, dq.to(qkv.dtype.element_ty), mask=real[:, None])


@jit
def _fold_kernel(
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
        tl.store(at, (one * c + two * s).to(kind), mask=inside)
        tl.store(at + HALF, (two * c - one * s).to(kind), mask=inside)
    head = tl.arange(0, SHARED_BLOCK)
    inside = (head < shared)[:, None]
    zeros = tl.zeros([SHARED_BLOCK, HALF], tl.float32)
    k_one, k_two, v_one, v_two = zeros, zeros, zeros, zeros
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
    heads: tuple[int, int, int],
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Changes `out` (N, H·D) and `lse` (H, N) in place: the fast twin of `attend`.

    `lse` is log2 of the sum of powers, for the backward. bf16, on a GPU: within 5e-3.
    """
    n_heads, shared, width = heads
    count = len(qkv)
    _forward_kernel[(triton.cdiv(count, BLOCK_QUERIES), n_heads)](
        qkv, out, lse, begins, row_stride(qkv), row_stride(out), count, scale * LOG2_E,
        window_tokens or 2**30, HEADS=n_heads, GROUP=n_heads // shared, WIDTH=width,
        QUERIES=BLOCK_QUERIES, KEYS=BLOCK_KEYS, num_warps=WARPS, num_stages=3,
    )  # fmt: skip


def attend_backward_triton(
    qkv: Tensor,
    begins: Tensor,
    ends: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
    tables: tuple[Tensor, Tensor] | None,
) -> None:
    """Changes `qkv` (N, W) in place: it becomes its gradient, rotated back by `tables`.

    `partial` (N, H, 2, D) fp32 is room for dk and dv by query head. `tables` are cosine and sine,
    (N, D/2), of the rotation that queries and keys had. bf16, on a GPU: within 1e-2.
    """
    n_heads, shared, width = heads
    count, group, window = len(qkv), n_heads // shared, window_tokens or 2**30
    strides = row_stride(qkv), row_stride(out), row_stride(d_out)
    sizes = {"HEADS": n_heads, "GROUP": group, "WIDTH": width}
    blocks = {"QUERIES": BLOCK_QUERIES, "KEYS": BLOCK_KEYS, "num_warps": WARPS, "num_stages": 2}
    _keys_kernel[(triton.cdiv(count, BLOCK_KEYS), n_heads)](
        qkv, out, d_out, lse, begins, ends, partial, *strides, count, scale * LOG2_E, window,
        **sizes, **blocks,
    )  # fmt: skip
    _queries_kernel[(triton.cdiv(count, BLOCK_QUERIES), n_heads)](
        qkv, out, d_out, lse, begins, *strides, count, scale * LOG2_E, window, **sizes, **blocks
    )
    cos, sin = (partial, partial) if tables is None else tables
    _fold_kernel[(count,)](
        qkv, partial, cos, sin, strides[0], HEADS=n_heads, GROUP=group, HALF=width // 2,
        ROTATES=tables is not None, HEADS_BLOCK=next_power_of_2(n_heads),
        SHARED_BLOCK=next_power_of_2(shared),
    )  # fmt: skip
