"""Causal attention of short rows by batched products, and its gradient, for CPUs.

What differs from the textbook: queries, keys and values come side by side in one tensor, as one
product makes them, and so do their gradients; the probabilities of all pairs are kept. On rows of
32 tokens this takes less than half the time of torch's fused attention, which is made for long
ones; from some hundred tokens on the pairs (B·H, T, T) are too many to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MOST_TOKENS = 256
"""Longest rows that this is meant for."""


@dataclass(frozen=True)
class Kept:
    """What the gradient needs."""

    heads: Tensor
    """Queries, keys and values, (3, B·H, T, D)."""
    probabilities: Tensor
    """(B·H, T, T)."""


@cache
def _future(n_tokens: int, dtype: torch.dtype) -> Tensor:
    """Return what keeps a token from those after it, (T, T): −∞ above the diagonal."""
    return torch.full((n_tokens, n_tokens), -torch.inf, dtype=dtype).triu_(1)


def attend_dense(
    qkv: Tensor, rows: int, n_heads: int, out: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """Return softmax(q kᵀ / √D) v, (B·T, C), of causal rows, and what its gradient needs.

    `qkv` is (B·T, 3·C), B = `rows`: queries, keys, values of `n_heads` heads of width D = C / H.
    The result is in `out` if that is given.
    """
    n_tokens, width = qkv.shape[0] // rows, qkv.shape[1] // (3 * n_heads)
    split = qkv.view(rows, n_tokens, 3, n_heads, width).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    heads = split.reshape(3, rows * n_heads, n_tokens, width)
    q, k, v = heads.unbind(0)  # each (B·H, T, D)
    logits = torch.baddbmm(_future(n_tokens, qkv.dtype), q, k.mT, alpha=width**-0.5)  # (B·H, T, T)
    probabilities = logits.softmax(-1)
    attended = torch.bmm(probabilities, v).view(rows, n_heads, n_tokens, width).transpose(1, 2)
    return _flatten(attended, (len(qkv), n_heads * width), out), Kept(heads, probabilities)


def attend_dense_backward(
    d_out: Tensor, rows: int, kept: Kept, out: Tensor | None = None
) -> Tensor:
    """Return the gradient (B·T, 3·C) of `qkv` from that of the result, `d_out` (B·T, C).

    It is in `out` if that is given.
    """
    q, k, v = kept.heads.unbind(0)  # each (B·H, T, D)
    n_heads, n_tokens, width = q.shape[0] // rows, q.shape[1], q.shape[2]
    split = d_out.view(rows, n_tokens, n_heads, width).transpose(1, 2)  # (B, H, T, D)
    d_out = split.reshape(q.shape)
    grads = torch.empty_like(kept.heads)
    torch.bmm(kept.probabilities.mT, d_out, out=grads[2])
    d_probabilities = torch.bmm(d_out, v.mT)  # (B·H, T, T)
    d_logits = torch._softmax_backward_data(d_probabilities, kept.probabilities, -1, d_out.dtype)
    scale = width**-0.5
    torch.baddbmm(grads[0], d_logits, k, beta=0, alpha=scale, out=grads[0])
    torch.baddbmm(grads[1], d_logits.mT, q, beta=0, alpha=scale, out=grads[1])
    split = grads.view(3, rows, n_heads, n_tokens, width).permute(1, 3, 0, 2, 4)  # (B, T, 3, H, D)
    return _flatten(split, (rows * n_tokens, 3 * n_heads * width), out)


def _flatten(split: Tensor, shape: tuple[int, int], out: Tensor | None) -> Tensor:
    """Return `split` (B, T, …) as rows of `shape`, in `out` if that is given."""
    if out is None:
        return split.reshape(shape)
    out.view(split.shape).copy_(split)
    return out
