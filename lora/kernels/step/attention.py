"""Causal attention within the documents of packed sequences, on the fused q/k/v tensor.

The plain twins of `lora.kernels.step.attention_triton`, and where documents begin and end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.kernels.step.rotary import rotate_heads

Heads = tuple[int, int, int]
"""Query heads H, key/value heads (fewer where query heads share them), width of a head D."""


def find_begins(position_ids: Tensor) -> Tensor:
    """Return the index of the first token of each token's document, (N,) int32.

    `position_ids` (N,) restart at 0 in each document and count up in it.
    """
    index = torch.arange(len(position_ids), device=position_ids.device)
    return (index - position_ids).to(torch.int32)


def find_ends(begins: Tensor) -> Tensor:
    """Return the index after the last token of each token's document, (N,) int32."""
    index = torch.arange(len(begins), device=begins.device, dtype=begins.dtype)
    # At least the token itself, whatever the position ids are.
    return torch.searchsorted(begins, begins, right=True).to(torch.int32).maximum(index + 1)


def document_attention(
    qkv: Tensor, begins: Tensor, heads: Heads, scale: float, window_tokens: int
) -> Tensor:
    """Return the attention output (N, H·D), through operations that autograd can follow.

    `qkv` (N, W) holds the heads of queries, then of keys, then of values, side by side.
    `window_tokens` 0: a token sees all of its document before it.
    """
    # Document by document, not by a mask over all: 0 · NaN is NaN, so one document's NaN would
    # reach the others through a masked softmax.
    _, sizes = begins.unique_consecutive(return_counts=True)
    parts = qkv.split(sizes.tolist())
    return torch.cat([_attend_one(part, heads, scale, window_tokens) for part in parts])


def _attend_one(qkv: Tensor, heads: Heads, scale: float, window_tokens: int) -> Tensor:
    n_heads, n_kv_heads, width = heads
    split = n_heads, n_kv_heads, n_kv_heads
    q, k, v = qkv.unflatten(1, (-1, width)).split(split, 1)  # (n, heads, D)
    k, v = (x.repeat_interleave(n_heads // n_kv_heads, 1) for x in (k, v))  # (n, H, D)
    index = torch.arange(len(qkv), device=qkv.device)
    sees = index <= index[:, None]  # (n, n)
    if window_tokens:
        sees &= index[:, None] - index < window_tokens
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale  # (H, n, n)
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)  # (n, H·D)


def attend(
    qkv: Tensor,
    begins: Tensor,
    heads: Heads,
    scale: float,
    window_tokens: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Changes `out` (N, H·D) in place; the plain twin of `attend_triton`, which leaves `lse` as
    it is."""
    out.copy_(document_attention(qkv, begins, heads, scale, window_tokens))


def attend_backward(
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
    """Changes `qkv` (N, W) in place; the plain twin of `attend_backward_triton`, by autograd."""
    # A copy, because `qkv` is overwritten by its gradient.
    inputs = qkv.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = document_attention(inputs, begins, heads, scale, window_tokens)
    qkv.copy_(torch.autograd.grad(y, inputs, d_out)[0])
    if tables is not None:  # a rotation's gradient is the rotation by the negative angle
        rotate_heads(qkv, tables[0], -tables[1], heads[0] + heads[1])
