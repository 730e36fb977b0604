"""Attention with capped logits (Gemma 2, arXiv 2408.00118, section 2), for any device.

What differs from the textbook: torch's scaled_dot_product_attention cannot cap, so this is plain
matmuls; queries go in chunks, and backward computes each chunk's probabilities again, so that at
most MAX_CHUNK_LOGITS logits exist at once and none are saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAX_CHUNK_LOGITS = 2**24
"""Attention logits that exist at once, over sequences and heads; a chunk has a query or more."""


def plain_capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """The plain twin: softmax(softcap · tanh(q kᵀ · scale / softcap)) v, (B, H, T, D).

    q (B, H, T, D), k and v (B, heads, S, D); mask (B or 1, 1, T, S) is true where a query may
    attend to a key, and no row of it is empty.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
    logits = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap  # (B, H, T, S)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    *,
    is_causal: bool = False,
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> Tensor:
    """The chunked twin: agrees with the plain one within 1e-6 (fp32, ‖difference‖ / ‖reference‖).

    `is_causal`, without a mask: query t attends to keys up to t, of as many (S = T).
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    y: Tensor = _CappedAttention.apply(q, k, v, mask, scale, softcap, is_causal, max_chunk_logits)
    return y


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
        is_causal: bool,
        max_chunk_logits: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.settings = settings = _Settings(scale, softcap, is_causal, max_chunk_logits)
        out = torch.empty_like(q)
        for chunk in settings.chunks(q, k):
            probabilities, _ = settings.probabilities(q, k, mask, chunk)
            part = probabilities.to(v.dtype) @ _keys(v, chunk)  # (B, heads, H/heads · n, D)
            out[:, :, chunk[0] : chunk[1]] = part.view(out[:, :, chunk[0] : chunk[1]].shape)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        settings: _Settings = ctx.settings
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for chunk in settings.chunks(q, k):
            p, slope = settings.probabilities(q, k, mask, chunk)  # (B, heads, H/heads · n, S)
            dy = _queries(grads[0], k, chunk)  # (B, heads, H/heads · n, D)
            end = chunk[2]
            dv[:, :, :end] += p.to(v.dtype).transpose(-1, -2) @ dy
            dp = (dy @ _keys(v, chunk).transpose(-1, -2)).to(wide)
            # Softmax's gradient, then tanh's: dz = p · (dp − Σ p dp) · (1 − tanh²) · scale.
            dz = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p).mul_(slope).mul_(settings.scale)
            dz = dz.to(q.dtype)
            dk[:, :, :end] += dz.transpose(-1, -2) @ _queries(q, k, chunk)
            part = dq[:, :, chunk[0] : chunk[1]]
            part.copy_((dz @ _keys(k, chunk)).view(part.shape))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


Chunk = tuple[int, int, int]
"""First query, end of the queries, end of the keys that they may attend to."""


class _Settings:
    """What is the same for all chunks."""

    def __init__(self, scale: float, softcap: float, is_causal: bool, max_logits: int) -> None:
        self.scale, self.softcap = scale, softcap
        self.is_causal, self.max_logits = is_causal, max_logits

    def chunks(self, q: Tensor, k: Tensor) -> list[Chunk]:
        """Return the chunks of queries q (B, H, T, D) to keys k (B, heads, S, D)."""
        n_queries, n_keys = q.shape[2], k.shape[2]
        step = max(1, self.max_logits // max(1, q.shape[0] * q.shape[1] * n_keys))
        ends = [(first, min(first + step, n_queries)) for first in range(0, n_queries, step)]
        return [(first, end, end if self.is_causal else n_keys) for first, end in ends]

    def probabilities(
        self, q: Tensor, k: Tensor, mask: Tensor | None, chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """Return a chunk's probabilities and 1 − tanh², (B, heads, H/heads · n, S), fp32 or wider.

        Heads that share keys lie one after the other, so that one matmul serves them all.
        """
        first, end, n_keys = chunk
        wide = torch.promote_types(q.dtype, torch.float32)
        z = _queries(q, k, chunk) @ _keys(k, chunk).transpose(-1, -2)  # (B, heads, H/heads · n, S)
        tanh = z.to(wide).mul_(self.scale / self.softcap).tanh_()
        logits = tanh * self.softcap
        by_head = logits.unflatten(2, (-1, end - first))  # (B, heads, H/heads, n, S)
        if mask is not None:
            by_head.masked_fill_(~mask[:, :, None, first:end, :n_keys], -math.inf)
        elif self.is_causal:
            future = torch.ones(end - first, n_keys, dtype=torch.bool, device=q.device)
            by_head.masked_fill_(future.triu_(first + 1), -math.inf)
        return logits.softmax(-1), tanh.square_().neg_().add_(1)


def _queries(x: Tensor, k: Tensor, chunk: Chunk) -> Tensor:
    """Return a chunk of x (B, H, T, D) as (B, heads, H/heads · n, D)."""
    part = x[:, :, chunk[0] : chunk[1]]
    return part.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _keys(x: Tensor, chunk: Chunk) -> Tensor:
    return x[:, :, : chunk[2]]
