"""Causal attention of short rows by batched products, and its gradient, for CPUs.

What differs from the textbook: queries, keys and values come side by side in one tensor, as one
product makes them, and so do their gradients; the probabilities of all pairs are kept. On rows of
32 tokens this takes less than half the time of torch's fused attention, which is made for long
ones; from some hundred tokens on the pairs (B·H, T, T) are too many to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOKENS = 256
"""Longest rows that this is meant for."""


@dataclass(frozen=True)
class Sizes:
    """What all blocks have in common."""

    rows: int
    tokens: int
    heads: int
    width: int
    """Of a head."""
    dtype: torch.dtype

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(shape, dtype=self.dtype)


class Scratch:
    """Tensors that the blocks share, and views of them: at small sizes making these takes long."""

    def __init__(self, sizes: Sizes) -> None:
        b, t, h, d = sizes.rows, sizes.tokens, sizes.heads, sizes.width
        self.future = torch.full((t, t), -torch.inf, dtype=sizes.dtype).triu_(1)  # (T, T)
        """What keeps a token from those after it."""
        self.d_logits = sizes.empty(b * h, t, t)
        self.d_logits_turned = self.d_logits.mT
        self.mixed = sizes.empty(b * h, t, d)  # the result, or its gradient
        self.mixed_heads = self.mixed.view(b, h, t, d).transpose(1, 2)  # (B, T, H, D)
        grads = sizes.empty(3, b, h, t, d)
        self.dq, self.dk, self.dv = grads.view(3, b * h, t, d).unbind(0)  # each (B·H, T, D)
        self.grads_heads = grads.permute(1, 3, 0, 2, 4)  # (B, T, 3, H, D)


class DenseAttention:
    """Attention of one block, for batches of one shape; keeps what its gradient needs."""

    def __init__(self, sizes: Sizes, scratch: Scratch) -> None:
        b, t, h, d = sizes.rows, sizes.tokens, sizes.heads, sizes.width
        self.sizes, self.scratch, self.scale = sizes, scratch, d**-0.5
        heads = sizes.empty(3, b, h, t, d)
        self.heads = heads.permute(1, 3, 0, 2, 4)  # (B, T, 3, H, D)
        self.q, self.k, self.v = heads.view(3, b * h, t, d).unbind(0)  # each (B·H, T, D)
        self.k_turned, self.v_turned = self.k.mT, self.v.mT
        self.probabilities = sizes.empty(b * h, t, t)
        self.probabilities_turned = self.probabilities.mT

    def forward(self, qkv: Tensor, out: Tensor | None = None) -> Tensor:
        """Return softmax(q kᵀ / √D) v, (B·T, C = H·D), in `out` if that is given.

        `qkv` is (B·T, 3·C): queries, keys, values.
        """
        scratch, probabilities = self.scratch, self.probabilities
        self.heads.copy_(qkv.view(self.heads.shape))
        torch.baddbmm(scratch.future, self.q, self.k_turned, alpha=self.scale, out=probabilities)
        torch.softmax(probabilities, -1, out=probabilities)
        torch.bmm(probabilities, self.v, out=scratch.mixed)
        return _flatten(scratch.mixed_heads, len(qkv), out)

    def backward(self, d_out: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the gradient (B·T, 3·C) of `qkv` from the result's (B·T, C), in `out` if given."""
        scratch, scale, d_logits = self.scratch, self.scale, self.scratch.d_logits
        scratch.mixed_heads.copy_(d_out.view(scratch.mixed_heads.shape))
        torch.bmm(self.probabilities_turned, scratch.mixed, out=scratch.dv)
        torch.bmm(scratch.mixed, self.v_turned, out=d_logits)
        torch._softmax_backward_data(
            d_logits, self.probabilities, -1, d_logits.dtype, grad_input=d_logits
        )
        dq, dk = scratch.dq, scratch.dk
        torch.baddbmm(dq, d_logits, self.k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, scratch.d_logits_turned, self.q, beta=0, alpha=scale, out=dk)
        return _flatten(scratch.grads_heads, len(d_out), out)


def _flatten(split: Tensor, rows: int, out: Tensor | None) -> Tensor:
    """Return `split` (B, T, …) as (B·T, …), in `out` if that is given."""
    if out is None:
        return split.reshape(rows, -1)
    out.view(split.shape).copy_(split)
    return out
