"""What a Llama-style decoder consists of in the fast step: projections, norms, embeddings.

Linears that read the same input are one projection. The way through them is in
`lora.fast.llama.passes`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.attention import Attention
from lora.decoder.config import RopeConfig
from lora.decoder.decoder import Decoder, LlamaTrunk
from lora.decoder.layers import GatedFeedForward, PreNormBlock
from lora.decoder.quantised import has_fp8_base
from lora.decoder.rope import Rope
from lora.fast.llama.buffers import Buffers, Widths
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.fp8 import Fp8Buffers, fp8_projection
from lora.fast.weights.adapted import (
    ConcatenatedLoRAProjection,
    DropoutMasks,
    MergedProjection,
    SeparateLoRAProjection,
)
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.norms_and_embeddings import WeightGroup
from lora.fast.weights.projections import FrozenProjection, FullProjection, Projection
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_projection import MergedStackedProjection, StackedProjection
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer
from lora.stacked.layers import StackedLoRALinear

OWN_ATTENTION_TOKENS = 2048
"""Packed rows up to this length go through our kernels of attention; beyond, torch's are faster."""
OWN_ATTENTION_WIDTHS = (16, 32, 64, 128)

HalfTables = tuple[Tensor, Tensor]
"""Cosine and sine, each (N, D/2), fp32 or wider."""


class FastNetwork:
    """A decoder's hidden states and their gradients; parameters become views of its tensors."""

    def __init__(
        self,
        model: Decoder,
        flat: FlatParameters | StackedFlat,
        ops: Ops,
        dtype: torch.dtype,
        *,
        trains_all: bool,
        merges: bool,
        masks: DropoutMasks | None = None,
        own_attention: bool | None = None,
    ) -> None:
        self.model, self.config, self.ops, self.dtype = model, model.config, ops, dtype
        self.trains_all, self.own_attention = trains_all, own_attention
        self.drops = masks is not None
        self.codes = Fp8Buffers(ops) if has_fp8_base(model) else None
        trunk = cast(LlamaTrunk, model.trunk)
        blocks = [cast(PreNormBlock, block) for block in trunk.layers]
        heads = [block.self_attn for block in blocks]
        feeds = [block.mlp for block in blocks]

        def project(parts: list[list[nn.Module]]) -> Projection:
            if self.codes is not None and isinstance(flat, FlatParameters):
                return fp8_projection(parts, flat, dtype, ops, masks, self.codes)
            if not trains_all and not any(has_lora(module) for part in parts for module in part):
                return FrozenProjection(parts, dtype)
            if isinstance(flat, StackedFlat):
                if merges:
                    return MergedStackedProjection(parts, flat, dtype, ops)
                return StackedProjection(parts, flat, dtype)
            if trains_all:
                return FullProjection(parts, flat, dtype)
            if masks is not None:
                return SeparateLoRAProjection(parts, flat, dtype, ops, masks)
            if merges:
                return MergedProjection(parts, flat, dtype, ops)
            return ConcatenatedLoRAProjection(parts, flat, dtype)

        self.qkv = project([[a.q_proj, a.k_proj, a.v_proj] for a in heads])
        self.output = project([[a.o_proj] for a in heads])
        self.gate_up = project([[f.gate_proj, f.up_proj] for f in feeds])
        self.down = project([[f.down_proj] for f in feeds])
        self.projections = (self.qkv, self.output, self.gate_up, self.down)
        norms = [m for b in blocks for m in (b.input_layernorm, b.post_attention_layernorm)]
        self.norms = WeightGroup([*norms, trunk.norm], flat, dtype, trains=trains_all)
        self.embedding = WeightGroup([trunk.embed_tokens], flat, dtype, trains=trains_all)
        self.head = self.embedding
        if not model.config.tie_word_embeddings:
            self.head = WeightGroup([model.lm_head], flat, dtype, trains=trains_all, decays=True)
        self.weights = [self.norms, self.embedding]
        if self.head is not self.embedding:
            self.weights.append(self.head)
        self.ropes = trunk.ropes
        self.first = 0 if trains_all else self._first_adapted(heads, feeds)

    def _first_adapted(self, heads: list[Attention], feeds: list[GatedFeedForward]) -> int:
        """Return the first block in which something trains: gradients end there."""
        for number, (attention, feed) in enumerate(zip(heads, feeds, strict=True)):
            parts = (*attention.modules(), *feed.modules())
            if any(has_lora(module) for module in parts):
                return number
        return len(heads)

    def fill(self) -> None:
        """Put all values into their slots, once these are allocated."""
        for projection in self.projections:
            projection.fill()
        for weights in self.weights:
            weights.fill()

    def refresh(self) -> None:
        """Bring everything that products read up to date with the slots."""
        for projection in self.projections:
            projection.refresh()
        for weights in self.weights:
            weights.refresh()

    def buffers(
        self, rows: int, tokens: int, checkpointing: ActivationCheckpointing | None = None
    ) -> Buffers:
        """Return the tensors that a step over `rows` × `tokens` tokens writes."""
        self.prepare(tokens)
        if self.codes is not None:
            self.codes.release()
        sizes = self.config
        inner = sizes.num_attention_heads * sizes.head_dim
        widths = Widths(
            hidden=sizes.hidden_size,
            qkv=(self.qkv.outputs, self.qkv.extra),
            inner=(inner, self.output.extra),
            gate_up=(self.gate_up.outputs, self.gate_up.extra),
            feed_forward=(sizes.intermediate_size, self.down.extra),
            vocabulary=sizes.vocab_size,
        )
        like = self.embedding.tensors[0]
        buffers = Buffers(
            self.qkv.n_layers,
            rows,
            tokens,
            widths,
            like,
            self.wide,
            first=self.first,
            checkpointing=checkpointing,
            in_parts=not self.drops,  # a mask belongs to all tokens of a batch
        )
        if self.owns_attention(tokens):
            buffers.add_attention(sizes.num_attention_heads, sizes.head_dim)
        if self.codes is not None:
            self.codes.allocate(buffers, (self.qkv, self.output, self.gate_up, self.down))
        return buffers

    @property
    def wide(self) -> torch.dtype:
        """Type of sums: fp32, or fp64 where the products are."""
        return torch.promote_types(self.dtype, torch.float32)

    def owns_attention(self, tokens: int) -> bool:
        """Whether packed rows of `tokens` tokens go through our kernels of attention."""
        if self.own_attention is not None:
            return self.own_attention
        return tokens <= OWN_ATTENTION_TOKENS and self.config.head_dim in OWN_ATTENTION_WIDTHS

    def prepare(self, tokens: int) -> None:
        """Make cosines and sines for all positions of a row of `tokens` tokens."""
        positions = torch.arange(tokens, device=self.embedding.tensors[0].device)[None]

        def halves(rope: Rope) -> HalfTables:
            cos, sin = rope.tables(positions, self.wide)  # (1, T, 1, D)
            half = cos.shape[-1] // 2
            return cos[0, :, 0, :half].contiguous(), sin[0, :, 0, half:].contiguous()  # (T, D/2)

        self.all_tables = {config: halves(rope) for config, rope in self.ropes.items()}

    def tables(self, position_ids: Tensor) -> dict[RopeConfig, HalfTables]:
        """Return cosine and sine for `position_ids` (N,), by kind of rotation."""
        return {
            config: (cos.index_select(0, position_ids), sin.index_select(0, position_ids))
            for config, (cos, sin) in self.all_tables.items()
        }

    def receive(self, buffers: Buffers, *, first: bool) -> None:
        """Put the gradients of all weights that wait for it into their slots, after the way back.

        Where blocks are made again, each has done so by itself.
        """
        layers = slice(self.first, self.qkv.n_layers)
        if not buffers.recomputes:
            pairs = (
                (self.qkv, buffers.attention_in, buffers.qkv),
                (self.output, buffers.attention_out, buffers.mid_residual),
                (self.gate_up, buffers.feed_forward_in, buffers.gate_up),
            )
            for projection, x, dy in pairs:
                projection.receive(layers, x.stored, dy.stored, first=first)
        if buffers.stores_swiglu:
            dy_of_down = buffers.residuals.stored[self.first + 1 :]
            self.down.receive(layers, buffers.swiglu_out.stored, dy_of_down, first=first)


def has_lora(module: nn.Module) -> bool:
    """Whether LoRA of one adapter or of several is on this linear."""
    return isinstance(module, LoRALayer | StackedLoRALinear)
