"""The tensors of one fast step, allocated once: what is kept for the gradient, and the passing.

Gradients are written over what they are gradients of: a block's sum of residuals becomes the
gradient that its linears read, gate and up become theirs, queries, keys and values theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.fast.llama.checkpointing import (
    ActivationCheckpointing,
    BlockTensors,
    OffloadedResiduals,
    Residuals,
)
from lora.kernels.step.fp8 import FP8

MAX_STORED_SWIGLU_BYTES = 400e6
"""Up to this size silu(gate) · up of all blocks is kept; beyond, it is made again."""
MAX_LOGITS_ELEMENTS = 2**28
"""Logits that exist at once."""
MAX_LOGITS_ELEMENTS_RECOMPUTING = 2**26
"""The same where blocks are made again: to save memory."""
FEED_FORWARD_CHUNK_TOKENS = 4096
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
        checkpointing: ActivationCheckpointing | None = None,
        in_parts: bool = True,
    ) -> None:
        checkpointing = checkpointing or ActivationCheckpointing()
        n = rows * tokens
        self.rows, self.tokens, self.n_tokens = rows, tokens, n
        c, (qkv, qkv_extra) = widths.hidden, widths.qkv
        inner, inner_extra = widths.inner
        gate_up, gate_up_extra = widths.gate_up
        feed, feed_extra = widths.feed_forward
        self.recomputes = not checkpointing.stores_norms
        gate_up_stays, inner_stays, attended_stays = checkpointing.n_stored(n_layers - first)
        norms_stay = n_layers - first if checkpointing.stores_norms else 0
        a_part = min(n, FEED_FORWARD_CHUNK_TOKENS) if self.recomputes and in_parts else n
        self.parts = [slice(start, min(start + a_part, n)) for start in range(0, n, a_part)]
        """Tokens that go through a feed-forward together."""

        def blocks(is_stored: int, columns: int, shared_rows: int = n) -> BlockTensors:
            return BlockTensors(like, n_layers, is_stored, n, columns, shared_rows)

        # The residual before each block and, as the last one, after them; it becomes the gradient
        # that the linear before it reads: down's of the block before.
        residuals = OffloadedResiduals if checkpointing.offloads_residuals else Residuals
        self.residuals = residuals(like, n_layers + 1, n, c + feed_extra)
        self.mid_residual = blocks(inner_stays, c + inner_extra)
        self.attention_in = blocks(norms_stay, c + qkv_extra)
        self.qkv = blocks(inner_stays, qkv + qkv_extra)
        self.attention_out = blocks(attended_stays, inner + inner_extra)
        self.feed_forward_in = blocks(norms_stay, c + gate_up_extra)
        self.gate_up = blocks(gate_up_stays, gate_up + gate_up_extra, a_part)
        size = n_layers * n * feed * like.element_size()
        self.stores_swiglu = not self.recomputes and size <= MAX_STORED_SWIGLU_BYTES
        is_stored = n_layers - first if self.stores_swiglu else 0
        self.swiglu_out = blocks(is_stored, feed + feed_extra, a_part)
        # LoRA's narrow products, where what they lie beside is made again without them.
        narrow = BlockTensors(like, n_layers, 0, 0, 0, 0)
        self.qkv_low_rank = blocks(inner_stays, qkv_extra, 0) if self.recomputes else narrow
        self.gate_up_low_rank = (
            blocks(gate_up_stays, gate_up_extra, 0) if self.recomputes else narrow
        )
        self.down_low_rank = narrow if self.stores_swiglu else blocks(n_layers, feed_extra, 0)
        self.rstd = torch.empty(2 * n_layers + 1, n, dtype=wide, device=like.device)
        self.hidden = like.new_empty(n, c)  # what passes: outputs forward, gradients backward
        self.final = like.new_empty(n, c)
        # Strides as those of `attention_out`: cuDNN wants an output and its gradient alike.
        wide_inner = inner + inner_extra
        passing = like.new_empty(max(n * wide_inner, a_part * feed))
        self.d_attention_out = passing[: n * wide_inner].view(n, wide_inner)[:, :inner]
        self.d_swiglu_out = passing[: a_part * feed].view(a_part, feed)
        elements = MAX_LOGITS_ELEMENTS_RECOMPUTING if self.recomputes else MAX_LOGITS_ELEMENTS
        self.logits = like.new_empty(
            max(1, min(n, elements // widths.vocabulary)), widths.vocabulary
        )
        self.losses = torch.empty(n, dtype=wide, device=like.device)

    def add_attention(self, n_heads: int, width: int) -> None:
        """Make room for what our kernels of attention keep and pass."""
        n_layers, is_stored = len(self.rstd) // 2, len(self.attention_out.stored)
        self.lse = BlockTensors(self.rstd, n_layers, is_stored, n_heads, self.n_tokens, n_heads)
        self.partial = self.rstd.new_empty(self.n_tokens, n_heads, 2, width)

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """Return what is allocated on the device, logits left out; some of it more than once."""
        for name, value in vars(self).items():
            owned = vars(value).values() if isinstance(value, BlockTensors | Residuals) else [value]
            for tensor in owned:
                if isinstance(tensor, Tensor) and name != "logits":
                    yield tensor.untyped_storage()

    def add_fp8(self, rows: int, inputs: int, turned: int, kind: torch.dtype) -> None:
        """Make room for rows in eight bits that pass to a product, and for weights turned around.

        Args:
            rows: codes of all rows that are there at once.
            inputs: of the widest projection.
            turned: codes of the largest weight.
            kind: of rows' codes.
        """
        device = self.hidden.device
        self.fp8_codes = torch.empty(rows, dtype=kind, device=device)
        self.fp8_scales = torch.empty(4, self.n_tokens, 1, dtype=torch.float32, device=device)
        self.transposed_codes = torch.empty(turned, dtype=FP8, device=device)
        self.unit_scales = torch.ones(1, inputs, dtype=torch.float32, device=device)


@dataclass
class Inputs:
    """A micro-batch where the captured step reads it, flat over its N tokens."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    bounds: Tensor
    """(documents + 1,) int32: where each document begins among the N tokens, then N."""
