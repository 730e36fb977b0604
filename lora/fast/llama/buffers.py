"""The tensors of one fast step, allocated once: what is kept for the gradient, and the passing.

Gradients are written over what they are gradients of: a block's sum of residuals becomes the
gradient that its linears read, gate and up become theirs, queries, keys and values theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.fast.llama.blocks import Blocks, Keep, OffloadedResiduals, Residuals
from lora.kernels.step.fp8 import FP8

KEPT_ACTIVATIONS_BYTES = 400e6
"""Up to this size silu(gate) · up of all blocks is kept; beyond, it is made again."""
LOGITS_ELEMENTS = 2**28
"""Logits that exist at once."""
LEAN_LOGITS_ELEMENTS = 2**26
"""The same where blocks are made again: to save memory."""
PART_TOKENS = 4096
"""Tokens that go through a feed-forward at once where blocks are made again."""


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
    """What a step over N tokens writes, for L blocks.

    Args:
        n_layers: L.
        first: the first block that is gone back over; nothing stays of those before it.
        rows: of the batch, B.
        tokens: of a row, T.
        widths: columns.
        like: a tensor of the products' type, on the device.
        wide: type of sums.
        keep: what stays of which blocks.
        in_parts: whether feed-forwards may take their tokens in parts.
    """

    def __init__(
        self,
        n_layers: int,
        rows: int,
        tokens: int,
        widths: Widths,
        like: Tensor,
        wide: torch.dtype,
        *,
        first: int = 0,
        keep: Keep | None = None,
        in_parts: bool = True,
    ) -> None:
        keep = keep or Keep()
        n = rows * tokens
        self.rows, self.tokens, self.n_tokens = rows, tokens, n
        c, (qkv, qkv_extra) = widths.hidden, widths.qkv
        inner, inner_extra = widths.inner
        gate_up, gate_up_extra = widths.gate_up
        feed, feed_extra = widths.feed_forward
        self.is_lean = not keep.norms
        gate_up_stays, inner_stays, attended_stays = keep.counts(n_layers - first)
        norms_stay = n_layers - first if keep.norms else 0
        a_part = min(n, PART_TOKENS) if self.is_lean and in_parts else n
        self.parts = [slice(start, min(start + a_part, n)) for start in range(0, n, a_part)]
        """Tokens that go through a feed-forward together."""

        def blocks(stays: int, columns: int, shared_rows: int = n) -> Blocks:
            return Blocks(like, n_layers, stays, n, columns, shared_rows)

        # The residual before each block and, as the last one, after them; it becomes the gradient
        # that the linear before it reads: down's of the block before.
        residuals = OffloadedResiduals if keep.offloads else Residuals
        self.before = residuals(like, n_layers + 1, n, c + feed_extra)
        self.between = blocks(inner_stays, c + inner_extra)
        self.attention_in = blocks(norms_stay, c + qkv_extra)
        self.qkv = blocks(inner_stays, qkv + qkv_extra)
        self.attended = blocks(attended_stays, inner + inner_extra)
        self.feed_in = blocks(norms_stay, c + gate_up_extra)
        self.gate_up = blocks(gate_up_stays, gate_up + gate_up_extra, a_part)
        size = n_layers * n * feed * like.element_size()
        self.keeps_activations = not self.is_lean and size <= KEPT_ACTIVATIONS_BYTES
        stays = n_layers - first if self.keeps_activations else 0
        self.activated = blocks(stays, feed + feed_extra, a_part)
        # LoRA's narrow products, where what they lie beside is made again without them.
        narrow = Blocks(like, n_layers, 0, 0, 0, 0)
        self.attention_low = blocks(inner_stays, qkv_extra, 0) if self.is_lean else narrow
        self.feed_low = blocks(gate_up_stays, gate_up_extra, 0) if self.is_lean else narrow
        self.activated_low = narrow if self.keeps_activations else blocks(n_layers, feed_extra, 0)
        self.rstd = torch.empty(2 * n_layers + 1, n, dtype=wide, device=like.device)
        self.hidden = like.new_empty(n, c)  # what passes: outputs forward, gradients backward
        self.final = like.new_empty(n, c)
        # Strides as those of `attended`: cuDNN wants an output and its gradient alike.
        wide_inner = inner + inner_extra
        passing = like.new_empty(max(n * wide_inner, a_part * feed))
        self.d_attended = passing[: n * wide_inner].view(n, wide_inner)[:, :inner]
        self.d_activated = passing[: a_part * feed].view(a_part, feed)
        elements = LEAN_LOGITS_ELEMENTS if self.is_lean else LOGITS_ELEMENTS
        self.logits = like.new_empty(
            max(1, min(n, elements // widths.vocabulary)), widths.vocabulary
        )
        self.losses = torch.empty(n, dtype=wide, device=like.device)

    def add_attention(self, n_heads: int, width: int) -> None:
        """Make room for what our kernels of attention keep and pass."""
        n_layers, stays = len(self.rstd) // 2, len(self.attended.kept)
        self.lse = Blocks(self.rstd, n_layers, stays, n_heads, self.n_tokens, n_heads)
        self.partial = self.rstd.new_empty(self.n_tokens, n_heads, 2, width)

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """Return what is allocated on the device, logits left out; some of it more than once."""
        for name, value in vars(self).items():
            owned = vars(value).values() if isinstance(value, Blocks | Residuals) else [value]
            for tensor in owned:
                if isinstance(tensor, Tensor) and name != "logits":
                    yield tensor.untyped_storage()

    def add_codes(self, rows: int, inputs: int, turned: int, kind: torch.dtype) -> None:
        """Make room for rows in eight bits that pass to a product, and for weights turned around.

        Args:
            rows: codes of all rows that are there at once.
            inputs: of the widest projection.
            turned: codes of the largest weight.
            kind: of rows' codes.
        """
        device = self.hidden.device
        self.row_codes = torch.empty(rows, dtype=kind, device=device)
        self.row_scales = torch.empty(4, self.n_tokens, 1, dtype=torch.float32, device=device)
        self.turned_codes = torch.empty(turned, dtype=FP8, device=device)
        self.unit_scales = torch.ones(1, inputs, dtype=torch.float32, device=device)


@dataclass
class Inputs:
    """A micro-batch where the captured step reads it, flat over its N tokens."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    bounds: Tensor
    """(documents + 1,) int32: where each document begins among the N tokens, then N."""
