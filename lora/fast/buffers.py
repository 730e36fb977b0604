"""The tensors of one fast step, allocated once: what is kept for the gradient, and the passing.

Gradients are written over what they are gradients of: a block's sum of residuals becomes the
gradient that its linears read, gate and up become theirs, queries, keys and values theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_ACTIVATIONS_BYTES = 400e6
"""Up to this size silu(gate) · up of all blocks is kept; beyond, it is made again."""
LOGITS_ELEMENTS = 2**28
"""Logits that exist at once."""


@dataclass(frozen=True)
class Widths:
    """Columns of the step's tensors; the second of a pair is what LoRA adds."""

    hidden: int
    qkv: tuple[int, int]
    inner: tuple[int, int]
    gate_up: tuple[int, int]
    feed_forward: tuple[int, int]
    vocabulary: int


class Buffers:
    """What a step over N tokens writes, for L blocks."""

    def __init__(
        self, n_layers: int, rows: int, tokens: int, widths: Widths, like: Tensor, wide: torch.dtype
    ) -> None:
        n = rows * tokens
        self.rows, self.tokens, self.n_tokens = rows, tokens, n
        c, (qkv, qkv_extra) = widths.hidden, widths.qkv
        inner, inner_extra = widths.inner
        gate_up, gate_up_extra = widths.gate_up
        feed, feed_extra = widths.feed_forward

        def stack(count: int, columns: int) -> Tensor:
            return like.new_empty(count, n, columns)

        # The residual before each block and, as the last one, after them; it becomes the gradient
        # that the linear before it reads: down's of the block before.
        self.before = stack(n_layers + 1, c + feed_extra)
        self.between = stack(n_layers, c + inner_extra)
        self.attention_in = stack(n_layers, c + qkv_extra)
        self.qkv = stack(n_layers, qkv + qkv_extra)
        self.attended = stack(n_layers, inner + inner_extra)
        self.feed_in = stack(n_layers, c + gate_up_extra)
        self.gate_up = stack(n_layers, gate_up + gate_up_extra)
        size = n_layers * n * feed * like.element_size()
        self.keeps_activations = size <= KEPT_ACTIVATIONS_BYTES
        self.activated = stack(n_layers if self.keeps_activations else 1, feed + feed_extra)
        self.activated_low = stack(n_layers, feed_extra)
        self.rstd = torch.empty(2 * n_layers + 1, n, dtype=wide, device=like.device)
        self.hidden = like.new_empty(n, c)  # what passes: outputs forward, gradients backward
        self.final = like.new_empty(n, c)
        self.wide = like.new_empty(n, max(inner, feed))  # gradients of attended and activated
        chunk = max(1, min(n, LOGITS_ELEMENTS // widths.vocabulary))
        self.logits = like.new_empty(chunk, widths.vocabulary)
        self.losses = torch.empty(n, dtype=wide, device=like.device)

    def add_attention(self, n_heads: int, width: int) -> None:
        """Make room for what our kernels of attention keep and pass."""
        n_layers = len(self.qkv)
        self.lse = self.rstd.new_empty(n_layers, n_heads, self.n_tokens)
        self.partial = self.rstd.new_empty(self.n_tokens, n_heads, 2, width)


@dataclass
class Inputs:
    """A micro-batch where the captured step reads it, flat over its N tokens."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    bounds: Tensor
    """(documents + 1,) int32: where each document begins among the N tokens, then N."""
