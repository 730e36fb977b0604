"""All tensors that a hand-written step writes, allocated once.

buffer               shape         after forward            after backward           stored in modes
-------------------  ------------  -----------------------  -----------------------  ---------------
residuals[l]         (N, C + R)    input of block l, l = L  its gradient, which      all modes;
                                   of the final norm        down of l − 1 reads 6.   1. offloaded
attention_in[l]      (N, C + R)    first norm's output 7.   the same                 none
qkv[l]               (N, W + R)    8. rotated q and k, v    their gradients, before  none, cheap
                                                            the rotation
normed_heads         (N, (H+S)·D)  normed, rotated q and k  8. the same              scratch
attention_out[l]     (N, H·D + R)  attention output         the same                 none, cheap
lse[l]               (H, N)        log-sum-exp by query     the same                 2. none, cheap
attention_branch[l]  (N, C + R)    output of o_proj         its gradient, which      6. none, cheap
                                                            o_proj reads
mid_residual[l]      (N, C + R)    residual after           its gradient, which      7. none, cheap
                                   attention                o_proj reads 6.
feed_forward_in[l]   (N, C + R)    second norm's output 7.  the same                 none
gate_up[l]           (N, 2F + R)   gate and up              their gradients          none, cheap
swiglu_out[l]        (N, F + R)    act(gate) · up           the same                 3. none
feed_branch[l]       (N, C + R)    output of down           its gradient, which      6. none, cheap
                                                            down reads
qkv_low_rank[l]      (N, R)        + R of attention_in      the same                 4. cheap
gate_up_low_rank[l]  (N, R)        + R of feed_forward_in   the same                 4. cheap
down_low_rank[l]     (N, R)        + R of swiglu_out        the same                 4. cheap, full
rstd[i]              (norms, N)    1 / rms at each norm     the same                 all modes
final                (N, C)        final norm's output      the same                 all modes
logits               (chunk, V)    logits, then their                                scratch
                                   gradient
losses               (N,)          loss of each token       the same                 all modes
hidden               (N, C)        output of o_proj, down   gradient of a norm's     scratch
                                                            output
d_attention_out      (N, H·D)                               gradient of              scratch, shared
                                                            attention_out            with the next
d_swiglu_out         (chunk, F)                             gradient of swiglu_out   scratch
dkv_partial          (N, H, 2, D)                           dk and dv by query head  2. scratch
fp8_codes            (codes,)      a matmul's input         an output's gradient     5. scratch
fp8_scales           (4, N, 1)     its scales               its scales               5. scratch
transposed_codes     (I · O,)                               one weight, transposed   5. scratch
unit_scales          (1, I)        ones                     ones                     5. all modes
unpacked             (I' · O',)    weights of q/k/v, o_proj or gate/up of a block,   9. scratch
                                   or rows of the output head
unpacked_down        (I' · O',)    weights of down of one block                      9. scratch

N tokens, L blocks, C hidden width, H heads of width D, S key/value heads, W columns of q/k/v, F
feed-forward width, V vocabulary, I inputs and O outputs of the widest linear. + R columns hold
LoRA's low-rank activations where LoRA is not merged: x Aᵀ beside an input x, s · dy B beside an
output gradient dy.

none, cheap, full and full+offload are the modes of activation checkpointing, from the fastest to
the smallest. What a mode does not store is recomputed into one scratch tensor that all blocks
share, gate_up and swiglu_out by chunks of tokens. `ActivationCheckpointing` can move single blocks:
in cheap, gate_up of the first blocks is recomputed where memory demands it; in full, the last
blocks' qkv, attention_out and mid_residual are stored where there is room.

1. In full+offload they wait in host memory, three on the device at a time.
2. Where sequences may go through our own attention kernels only.
3. If all blocks' are small; else it is recomputed in every mode.
4. Where the tensor beside which they lie is recomputed: norms and SwiGLU do not write them.
5. For an fp8 base only.
6. Only where a half's output goes through a norm or a factor before it is added to the residual:
   then o_proj and down read the gradient of what they have written, and residuals have no + R. In
   blocks without a stored feed_branch the backward pass recomputes it by chunks of tokens. Where
   there is a factor alone, nothing is needed of forward, and the gradients are stored with 3.
7. Where a half has no norm before it: a copy of the residual. none stores no residual then, and all
   blocks share one.
8. Where queries and keys have norms, qkv[l] holds them raw, and normed_heads what attention reads:
   normed and rotated, computed again before a block's backward pass. Our own attention kernels
   write the gradient of the normed queries over them.
9. For a packed base only (nf4, int8). I' and O' are I + R and O + R where LoRA's matrices are in
   the same tensor as W. Over such a base, taken where memory is short, scratch of phases that
   follow one another is one tensor: gate_up's and swiglu_out's, dkv_partial, and the logits.

A gradient overwrites what it is the gradient of. So at the end of the backward pass the inputs and
the output gradients of all stored linears lie here, and the weight gradients of all blocks are a
few batched matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.fast.llama.checkpointing import (
    ActivationCheckpointing,
    BlockTensors,
    OffloadedResiduals,
    Residuals,
)
from lora.fast.llama.junctions import Branches
from lora.fast.llama.phases import PhaseScratch
from lora.kernels.step.fp8 import FP8

MAX_STORED_SWIGLU_BYTES = 400e6
"""act(gate) · up is stored if all blocks' takes no more; recomputing it is one cheap pass."""
MAX_LOGITS_ELEMENTS = 2**28
"""Logits that exist at once."""
MAX_LOGITS_ELEMENTS_RECOMPUTING = 2**26
"""The same with activation checkpointing, where memory counts for more than long matmuls."""
ROW_STEP = 8
"""Columns from one row of logits to the next are a multiple of this."""
FEED_FORWARD_CHUNK_TOKENS = 4096
"""Tokens that go through a feed-forward at once with activation checkpointing."""


@dataclass(frozen=True)
class Widths:
    """Columns of the step's tensors; the second of a pair is what LoRA adds, + R."""

    hidden: int
    qkv: tuple[int, int]
    attention: tuple[int, int]
    gate_up: tuple[int, int]
    feed_forward: tuple[int, int]
    vocabulary: int


class Buffers:
    """The tensors of a step over N = B · T tokens, for L blocks; see the table above.

    Args:
        n_layers: L.
        batch_size: sequences of a micro-batch, B.
        tokens: of a sequence, T.
        widths: columns.
        like: a tensor of the compute dtype, on the device.
        wide: dtype of sums: fp32 or wider.
        branches: how blocks add what they compute.
        n_norms: of all blocks, and the final one.
        first_trained: the block at which the backward pass ends; nothing is stored of blocks
            before it.
        checkpointing: what is stored of which blocks; None: nearly all.
        chunks_feed_forward: whether feed-forwards may take their tokens in chunks.
        shares_phases: whether scratch of feed-forwards, of attention's backward and of the head is
            one tensor.
        n_partial: values of `dkv_partial`, if any.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        tokens: int,
        widths: Widths,
        like: Tensor,
        wide: torch.dtype,
        *,
        branches: Branches,
        n_norms: int,
        first_trained: int = 0,
        checkpointing: ActivationCheckpointing | None = None,
        chunks_feed_forward: bool = True,
        shares_phases: bool = False,
        n_partial: int = 0,
    ) -> None:
        checkpointing = checkpointing or ActivationCheckpointing()
        n, n_trained = batch_size * tokens, n_layers - first_trained
        self.batch_size, self.tokens, self.n_tokens, self.n_layers = batch_size, tokens, n, n_layers
        c, (qkv, qkv_extra) = widths.hidden, widths.qkv
        attention, attention_extra = widths.attention
        gate_up, gate_up_extra = widths.gate_up
        feed, feed_extra = widths.feed_forward
        self.recomputes = not checkpointing.stores_norms
        n_gate_up, n_qkv, n_attention = checkpointing.n_stored(n_trained)
        n_inputs = n_trained if checkpointing.stores_norms else 0
        # All blocks count, those before the first trained one too: the bound is a rough one.
        size = n_layers * n * feed * like.element_size()
        self.stores_swiglu = not self.recomputes and size <= MAX_STORED_SWIGLU_BYTES
        n_swiglu = n_trained if self.stores_swiglu else 0
        n_mid = n_qkv if branches.has_norm_before or self.recomputes else 0
        # The columns + R of the residuals are for the linears that read their gradients.
        attention_beside, feed_beside = (
            (0, 0) if branches.is_changed else (attention_extra, feed_extra)
        )
        in_chunks = self.recomputes and chunks_feed_forward
        chunk = min(n, FEED_FORWARD_CHUNK_TOKENS) if in_chunks else n
        self.chunks = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        """Tokens that go through a feed-forward together."""

        def blocks(
            n_stored: int, columns: int, scratch_rows: int = n, scratch: Tensor | None = None
        ) -> BlockTensors:
            return BlockTensors(like, n_layers, n_stored, n, columns, scratch_rows, scratch)

        residuals = OffloadedResiduals if checkpointing.offloads_residuals else Residuals
        n_residuals = n_layers + 1 if branches.has_norm_before or self.recomputes else 1
        self.residuals = residuals(like, n_residuals, n, c + feed_beside)
        self.attention_in = blocks(n_inputs, c + qkv_extra)  # (N, C + R)
        self.qkv = blocks(n_qkv, qkv + qkv_extra)  # (N, W + R)
        self.attention_out = blocks(n_attention, attention + attention_extra)  # (N, H·D + R)
        self.mid_residual = blocks(n_mid, c + attention_beside)  # (N, C + R)
        self.feed_forward_in = blocks(n_inputs, c + gate_up_extra)  # (N, C + R)
        rows = [chunk if n < n_layers else 0 for n in (n_gate_up, n_swiglu)]
        self.phases = (
            self._phase_scratch(like, wide, widths, rows, n_partial) if shares_phases else None
        )
        feeding = [(rows[0], gate_up + gate_up_extra), (rows[1], feed + feed_extra)]
        shared = [self._of_phase("feed-forward", i, *shape) for i, shape in enumerate(feeding)]
        # (N or chunk, 2F + R), (N or chunk, F + R)
        self.gate_up = blocks(n_gate_up, gate_up + gate_up_extra, chunk, shared[0])
        self.swiglu_out = blocks(n_swiglu, feed + feed_extra, chunk, shared[1])
        self._add_branches(blocks, widths, branches, n_qkv, n_swiglu, chunk)
        self._add_low_rank(blocks, widths, n_qkv)
        self.rstd = torch.empty(n_norms, n, dtype=wide, device=like.device)
        self.final = like.new_empty(n, c)  # (N, C)
        self.hidden = like.new_empty(n, c)  # (N, C)
        self._add_scratch(widths, chunk)

    def _phase_scratch(
        self, like: Tensor, wide: torch.dtype, widths: Widths, rows: list[int], n_partial: int
    ) -> PhaseScratch:
        """Return one tensor for feed-forwards, attention's backward and the head.

        A block's feed-forward is done with its scratch before its attention goes backward, and the
        head comes between the two passes. `rows` are those of gate_up's and swiglu_out's scratch.
        """
        feed = [
            n * sum(pair)
            for n, pair in zip(rows, (widths.gate_up, widths.feed_forward), strict=True)
        ]
        n_partial *= wide.itemsize // like.element_size()
        head = math.prod(self._logits_shape(widths))
        phases = {"feed-forward": feed, "attention": [n_partial], "head": [head]}
        return PhaseScratch(like, phases)

    def _of_phase(self, phase: str, number: int, *shape: int) -> Tensor | None:
        """Return scratch that other phases share; None: the tensor gets its own."""
        return None if self.phases is None else self.phases.take(phase, number, *shape)

    def _logits_shape(self, widths: Widths) -> tuple[int, int]:
        elements = MAX_LOGITS_ELEMENTS_RECOMPUTING if self.recomputes else MAX_LOGITS_ELEMENTS
        n_logits = max(1, min(self.n_tokens, elements // widths.vocabulary))
        # Added tokens make V odd; rows that begin at multiples of 16 bytes keep matmuls fast.
        return n_logits, -(-widths.vocabulary // ROW_STEP) * ROW_STEP

    def _add_branches(
        self,
        blocks: Callable[[int, int, int], BlockTensors],
        widths: Widths,
        branches: Branches,
        n_qkv: int,
        n_swiglu: int,
        chunk: int,
    ) -> None:
        """Add what halves of blocks compute; empty where it is added to the residual as it is."""
        n_stored = n_qkv if branches.has_norm else n_swiglu
        unstored = 0 if branches.has_norm and not self.recomputes else chunk
        rows = self.n_tokens
        if not branches.is_changed:
            n_stored = unstored = rows = 0
        c, attention_extra, feed_extra = widths.hidden, widths.attention[1], widths.feed_forward[1]
        self.attention_branch = blocks(n_stored, c + attention_extra, rows)  # (N, C + R)
        self.feed_branch = blocks(n_stored, c + feed_extra, unstored)  # (N or chunk, C + R)

    def _add_low_rank(
        self, blocks: Callable[[int, int, int], BlockTensors], widths: Widths, n_qkv: int
    ) -> None:
        """Add copies of the + R columns of what is recomputed.

        What a norm or SwiGLU recomputes lacks them: the matmul that wrote them does not run again.
        They are narrow, so they are stored.
        """
        n_qkv = n_qkv if self.recomputes else 0
        n_down = 0 if self.stores_swiglu else self.n_layers
        self.qkv_low_rank = blocks(n_qkv, widths.qkv[1], 0)  # (N, R)
        self.gate_up_low_rank = blocks(n_qkv, widths.gate_up[1], 0)  # (N, R)
        self.down_low_rank = blocks(n_down, widths.feed_forward[1], 0)  # (N, R)

    def _add_scratch(self, widths: Widths, chunk: int) -> None:
        """Add gradients that all blocks share, and logits; `chunk` tokens of a feed-forward."""
        like, n, feed = self.hidden, self.n_tokens, widths.feed_forward[0]
        attention = widths.attention[0]
        # One scratch tensor for both: a block's feed-forward is done with it before its attention
        # begins. d_attention_out has the strides of attention_out, because cuDNN's backward wants
        # an output and its gradient laid out alike.
        columns = sum(widths.attention)
        scratch = like.new_empty(max(n * columns, chunk * feed))
        self.d_attention_out = scratch[: n * columns].view(n, columns)[:, :attention]  # (N, H·D)
        self.d_swiglu_out = scratch[: chunk * feed].view(chunk, feed)  # (chunk, F)
        shape = self._logits_shape(widths)
        logits = self._of_phase("head", 0, *shape)
        logits = like.new_empty(shape) if logits is None else logits
        self.logits = logits[:, : widths.vocabulary]  # (chunk, V)
        self.losses = torch.empty(n, dtype=self.rstd.dtype, device=like.device)  # (N,)

    def add_head_norms(self, columns: int) -> None:
        """Add scratch for normed queries and keys, `columns` together."""
        self.normed_heads = self.hidden.new_empty(self.n_tokens, columns)  # (N, (H + S) · D)

    def add_document_attention(self, n_heads: int, width: int) -> None:
        """Add what our own attention kernels store and use as scratch."""
        n_stored = len(self.attention_out.stored)
        # Like `rstd`, not like `attention_out`: logarithms of sums need fp32. (H, N) each.
        self.lse = BlockTensors(self.rstd, self.n_layers, n_stored, n_heads, self.n_tokens, n_heads)
        shape = self.n_tokens, n_heads, 2, width
        if self.phases is None:
            self.dkv_partial = self.rstd.new_empty(shape)  # (N, H, 2, D)
            return
        narrow = math.prod(shape) * self.rstd.element_size() // self.hidden.element_size()
        flat = self.phases.take("attention", 0, narrow)
        self.dkv_partial = flat.view(self.rstd.dtype).view(shape)  # (N, H, 2, D)

    def add_fp8(self, n_codes: int, inputs: int, n_transposed: int, dtype: torch.dtype) -> None:
        """Add scratch for a matmul's inputs in fp8, and for one transposed weight.

        Args:
            n_codes: codes of all rows that exist at once.
            inputs: of the widest projection, I.
            n_transposed: codes of the largest weight, I · O.
            dtype: of the rows' codes.
        """
        device = self.hidden.device
        self.fp8_codes = torch.empty(n_codes, dtype=dtype, device=device)
        self.fp8_scales = torch.empty(4, self.n_tokens, 1, dtype=torch.float32, device=device)
        self.transposed_codes = torch.empty(n_transposed, dtype=FP8, device=device)
        self.unit_scales = torch.ones(1, inputs, dtype=torch.float32, device=device)

    def add_unpacked(self, n_values: int, n_down: int) -> None:
        """Add scratch for packed weights: of one block's down, and of others in turn."""
        self.unpacked = self.hidden.new_empty(n_values)
        self.unpacked_down = self.hidden.new_empty(n_down)

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """Return what is allocated on the device, some of it more than once.

        Logits are left out, unless they are in scratch that other phases share.
        """
        for name, value in vars(self).items():
            is_many = isinstance(value, BlockTensors | Residuals | PhaseScratch)
            for tensor in vars(value).values() if is_many else [value]:
                if isinstance(tensor, Tensor) and name != "logits":
                    yield tensor.untyped_storage()


@dataclass
class Inputs:
    """A micro-batch at the addresses that a captured step reads, flat over its N tokens."""

    input_ids: Tensor
    """(N,) int64."""
    labels: Tensor
    """(N,) int64, −100 where nothing is learned."""
    position_ids: Tensor
    """(N,) int64."""
    bounds: Tensor
    """(documents + 1,) int32: where each document begins among the N tokens, then N."""
