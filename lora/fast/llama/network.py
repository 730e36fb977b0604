"""A Llama-style decoder as the hand-written step reads it: projections, norms, embeddings.

Linears that read the same input are one projection. The passes through them are in
`lora.fast.llama.passes`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.attention import Attention
from lora.decoder.decoder import Decoder, GemmaTrunk, LlamaTrunk
from lora.decoder.layers import GatedFeedForward, OffsetRMSNorm
from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import has_fp8_base
from lora.fast.llama.attention import is_own_attention_faster, needs_own_attention
from lora.fast.llama.buffers import Buffers, Widths
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.fp8 import Fp8Buffers, fp8_projection
from lora.fast.llama.junctions import branches_of, list_norms
from lora.fast.llama.rope_tables import RopeTables
from lora.fast.sharded.packed import sharded_fp8_projection, sharded_unpacked_projection
from lora.fast.sharded.projections import ShardedProjection, ShardedTable, sharded_projection
from lora.fast.sharded.ring import EMBEDDING, ShardRing, block_unit
from lora.fast.weights.adapted import (
    ConcatenatedLoRAProjection,
    DropoutMasks,
    MergedProjection,
    SeparateLoRAProjection,
    has_lora,
)
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.norms_and_embeddings import WeightGroup
from lora.fast.weights.packed_tables import PackedTable
from lora.fast.weights.projections import FrozenProjection, FullProjection, Projection
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_projection import MergedStackedProjection, StackedProjection
from lora.fast.weights.token_tables import TokenTable
from lora.fast.weights.unpacked import (
    UnpackedProjection,
    WeightScratch,
    is_packed,
    unpacked_projection,
)
from lora.kernels.step.ops import Ops

GELU_NAMES = ("gelu_pytorch_tanh", "gelu_new")
"""Names of GELU's tanh approximation, which the step computes as it does SiLU."""

QKV_NAMES = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)
GATE_UP_NAMES = ("gate_proj", "up_proj"), ("gate_up_proj",)
"""Linears that read the same input, or the one that stands for all of them: its rows are theirs,
in the same order."""


class FastNetwork:
    """A decoder's weights as tensors of the step; its parameters become views of these.

    Args:
        model: the decoder.
        flat: where what trains reserves its slots.
        ops: operations between the matmuls.
        dtype: compute dtype.
        trains_all: all weights train.
        merges: LoRA is merged into the weights once a step.
        masks: dropout on LoRA's inputs; None: none.
        own_attention: our own kernels for packed sequences; None decides by their length and the
            width of a head. Attention that torch's kernels cannot do goes through ours anyway.
        ring: gathers the frozen weights, which are sharded; None: this process has all of them.
        whole_rate_fraction: of the learning rate, for what trains beside LoRA.
    """

    rope_tables: RopeTables
    """Of sequences as long as those that `buffers` was last called for."""

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
        ring: ShardRing | None = None,
        whole_rate_fraction: float = 1.0,
    ) -> None:
        self.ring = ring
        self.lr_fraction = 1.0 if trains_all else whole_rate_fraction
        self.model, self.config, self.ops, self.dtype = model, model.config, ops, dtype
        self.flat, self.masks, self.merges = flat, masks, merges
        self.trains_all, self.own_attention = trains_all, own_attention
        self.fp8_buffers = Fp8Buffers(ops) if has_fp8_base(model) else None
        self.scratch = WeightScratch() if any(map(is_packed, model.modules())) else None
        trunk = cast(LlamaTrunk, model.trunk)
        blocks = list(trunk.layers)
        heads = [cast(Attention, block.self_attn) for block in blocks]
        feeds = [cast(GatedFeedForward, block.mlp) for block in blocks]
        # Slots are reserved in this order, which is the layout of the flat buffer: in another one
        # the gradient norm would be summed in another order, and differ in its last bits.
        self.qkv = self._project([_linears(a, QKV_NAMES) for a in heads])
        self.output = self._project([[a.o_proj] for a in heads])
        self.gate_up = self._project([_linears(f, GATE_UP_NAMES) for f in feeds])
        self.down = self._project([[f.down_proj] for f in feeds])
        self.projections = (self.qkv, self.output, self.gate_up, self.down)
        norms, self.junctions = list_norms(self.config, blocks, trunk.norm)
        self.norms = WeightGroup(norms, flat, dtype, lr_fraction=self.lr_fraction)
        self.branches = branches_of(self.config)
        self.has_gelu = self.config.feed_forward.activation in GELU_NAMES
        self.head_norms = self._head_norms(heads)
        self.head_norm_offset = 1.0 if isinstance(heads[0].q_norm, OffsetRMSNorm) else 0.0
        """Added to the weights of queries' and keys' norms."""
        self.embedding, self.head = self._tables(trunk.embed_tokens, model.lm_head)
        head = self.head
        tables = (self.embedding, self.embedding.rows, head, head.rows, head.lora)
        whole = [self.norms, *(self.head_norms or ()), *(t for t in tables if t is not None)]
        self.weights = list(dict.fromkeys(whole))
        """What is beside the projections, each once."""
        self.embedding_scale = _embedding_scale(trunk, dtype)
        self.ropes = trunk.ropes
        self.first_trained = 0 if self.embedding.trains else self._first_trained(trunk.layers)

    def _head_norms(self, heads: list[Attention]) -> tuple[WeightGroup, WeightGroup] | None:
        """Return the norms of queries and of keys, if the model has any."""
        if self.config.attention.qk_norm is None:
            return None
        groups = [a.q_norm for a in heads], [a.k_norm for a in heads]
        queries, keys = (
            WeightGroup(group, self.flat, self.dtype, lr_fraction=self.lr_fraction)
            for group in groups
        )
        return queries, keys

    def _tables(self, embedding: nn.Module, head: nn.Module) -> tuple[TokenTable, TokenTable]:
        """Return the embedding and the output head: tied, they are one."""
        flat, dtype, fraction = self.flat, self.dtype, self.lr_fraction
        if self.ring is not None:
            first = ShardedTable(embedding, flat, dtype, self.ring, fraction)
            is_tied = self.config.tie_word_embeddings
            return first, ShardedTable(head, flat, dtype, self.ring, fraction, first, is_tied)
        table = self._table(embedding)
        # By identity: a trained copy of one of them is no longer tied to the other.
        if table.slot is not None and head.weight is embedding.weight:
            return table, table  # one slot, to which both gradients are added
        return table, self._table(head, decays=True, other=table)

    def _table(
        self, module: nn.Module, *, decays: bool = False, other: TokenTable | None = None
    ) -> TokenTable:
        """Return the embedding, or the output head beside the `other` table."""
        flat, dtype, fraction = self.flat, self.dtype, self.lr_fraction
        if self.scratch is not None and isinstance(module, QuantisedWeight):
            return PackedTable(module, flat, dtype, self.scratch)
        return TokenTable(module, flat, dtype, decays=decays, lr_fraction=fraction, other=other)

    def _project(self, blocks: list[list[nn.Module]]) -> Projection:
        """Return the projection of linears that read the same input, given by block."""
        flat, dtype, ops = self.flat, self.dtype, self.ops
        if self.ring is not None and isinstance(flat, FlatParameters):
            return self._sharded(blocks, flat, self.ring)
        # Stacked adapters over an fp8 base take the plain step (`lora.fast.why_not`).
        if self.fp8_buffers is not None and isinstance(flat, FlatParameters):
            return fp8_projection(blocks, flat, dtype, ops, self.masks, self.fp8_buffers)
        has_packed = any(is_packed(module) for block in blocks for module in block)
        if self.scratch is not None and has_packed:
            return unpacked_projection(blocks, flat, dtype, ops, self.masks, self.scratch)
        if not self.trains_all and not has_lora(blocks):
            return FrozenProjection(blocks, dtype)
        if isinstance(flat, StackedFlat):
            if self.merges:
                return MergedStackedProjection(blocks, flat, dtype, ops)
            return StackedProjection(blocks, flat, dtype)
        if self.trains_all:
            return FullProjection(blocks, flat, dtype)
        if self.masks is not None:
            # Dropout is on LoRA's inputs alone, so LoRA needs matmuls of its own.
            return SeparateLoRAProjection(blocks, flat, dtype, ops, self.masks)
        if self.merges:
            return MergedProjection(blocks, flat, dtype, ops)
        return ConcatenatedLoRAProjection(blocks, flat, dtype)

    def _sharded(
        self, blocks: list[list[nn.Module]], flat: FlatParameters, ring: ShardRing
    ) -> ShardedProjection:
        arguments = blocks, flat, self.dtype, self.ops, self.masks
        if self.fp8_buffers is not None:
            return sharded_fp8_projection(*arguments, self.fp8_buffers, ring)
        if self.scratch is not None:
            return sharded_unpacked_projection(*arguments, self.scratch, ring)
        return sharded_projection(*arguments, ring)

    def _first_trained(self, blocks: nn.ModuleList) -> int:
        """Return the first block in which something trains: the backward pass ends there."""
        trains = (any(p.requires_grad for p in block.parameters()) for block in blocks)
        return next((index for index, found in enumerate(trains) if found), len(blocks))

    @property
    def needs_input_gradient(self) -> bool:
        """Whether backward goes on to the input of the first trained block, and its norm."""
        return self.embedding.trains or bool(self.norms.trained)

    def fill(self) -> None:
        """Put all values into their slots, once these are allocated."""
        if self.ring is not None:
            self._load_shards(self.ring)
        for projection in self.projections:
            projection.fill()
        for weights in self.weights:
            weights.fill()

    def _load_shards(self, ring: ShardRing) -> None:
        ring.allocate()
        owners = [
            owner
            for owner in (*self.projections, *self.weights)
            if isinstance(owner, ShardedProjection | ShardedTable)
        ]

        def read() -> None:
            for owner in owners:
                owner.read()

        if ring.device.type != "meta":
            ring.base.world.on_all(read, "the shards of all processes")
        for owner in owners:
            owner.use_slots()
        ring.connect()

    def refresh(self) -> None:
        """Bring everything that matmuls and norms read up to date with the slots."""
        if self.ring is not None:
            self.ring.wait()  # a gather may still read the adapters that are written now
        for projection in self.projections:
            projection.refresh()
        for weights in self.weights:
            weights.refresh()
        if self.ring is not None:
            self.ring.refresh()

    def expect(self, n_passes: int) -> None:
        """Before forward and backward passes over so many micro-batches."""
        if self.ring is not None:
            self.ring.expect(n_passes, self.first_trained)

    def catch_up(self) -> None:
        """After passes that ran out of memory here: gather what other processes gather."""
        if self.ring is not None:
            self.ring.catch_up()

    def release(self) -> None:
        """Drop the scratch of a former step that projections hold."""
        if self.fp8_buffers is not None:
            self.fp8_buffers.release()
        if self.scratch is not None:
            self.scratch.release()

    def begin_pass(self) -> None:
        """Before the forward pass of a micro-batch."""
        if self.scratch is not None:
            self.scratch.forget()

    def use_embedding(self) -> None:
        """Before the embedding is read: it is gathered, where the weights are sharded."""
        if self.ring is not None:
            self.ring.enter(EMBEDDING, block_unit(0))

    def use_block(self, layer: int, then: int) -> None:
        """Before a block is computed; `then` is the block that follows, L the head.

        −1 or less: none follows in this pass.
        """
        if self.ring is not None:
            self.ring.enter(block_unit(layer), block_unit(then) if then >= 0 else EMBEDDING)

    def use_head(self) -> None:
        """Before the output head is read."""
        if self.ring is not None:
            self.ring.enter(self.ring.head, self.ring.head - 1)

    def buffers(
        self, batch_size: int, tokens: int, checkpointing: ActivationCheckpointing | None = None
    ) -> Buffers:
        """Return the tensors that a step over `batch_size` × `tokens` tokens writes."""
        device = self.embedding.tensors[0].device
        self.rope_tables = RopeTables(self.ropes, tokens, self.wide, device)
        self.release()  # before new ones are allocated beside them
        sizes = self.config
        attention = sizes.num_attention_heads * sizes.head_dim
        widths = Widths(
            hidden=sizes.hidden_size,
            qkv=(self.qkv.outputs, self.qkv.extra),
            attention=(attention, self.output.extra),
            gate_up=(self.gate_up.outputs, self.gate_up.extra),
            feed_forward=(sizes.intermediate_size, self.down.extra),
            vocabulary=sizes.vocab_size,
        )
        n_partial = 0
        if self.uses_own_attention(tokens):
            n_partial = batch_size * tokens * 2 * attention
        buffers = Buffers(
            self.qkv.n_layers,
            batch_size,
            tokens,
            widths,
            self.embedding.tensors[0],
            self.wide,
            branches=self.branches,
            n_norms=len(self.norms.tensors),
            first_trained=self.first_trained,
            checkpointing=checkpointing,
            # A dropout mask is drawn for all tokens of a batch at once.
            chunks_feed_forward=self.masks is None,
            shares_phases=self.scratch is not None,
            n_partial=n_partial,
        )
        if self.head_norms is not None:
            shared = sizes.num_key_value_heads * sizes.head_dim
            buffers.add_head_norms(attention + shared)
        if self.uses_own_attention(tokens):
            buffers.add_document_attention(sizes.num_attention_heads, sizes.head_dim)
        if self.fp8_buffers is not None:
            self.fp8_buffers.allocate(buffers, self.projections)
        if self.scratch is not None:
            packed = [p for p in self.projections if isinstance(p, UnpackedProjection)]
            tables = [t for t in (self.embedding, self.head) if isinstance(t, PackedTable)]
            down = [p for p in packed if p is self.down]
            self.scratch.allocate(
                buffers, [*(p for p in packed if p is not self.down), *tables], down
            )
        return buffers

    @property
    def wide(self) -> torch.dtype:
        """Dtype of sums: fp32, or fp64 where the compute dtype is."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def needs_own_attention(self) -> bool:
        """Whether torch's attention kernels cannot do what this model's does."""
        return needs_own_attention(self.config)

    def uses_own_attention(self, tokens: int, *, packed: bool = True) -> bool:
        """Whether sequences of `tokens` tokens go through our own attention kernels.

        `packed`: of several documents each, or with windows; others only where they have to.
        """
        if self.needs_own_attention or not packed:
            return self.needs_own_attention
        if self.own_attention is not None:
            return self.own_attention
        return is_own_attention_faster(self.config, tokens)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the first hidden states (N, C)."""
        embedded = self.embedding.embed(input_ids)  # a copy
        return embedded if self.embedding_scale == 1 else embedded.mul_(self.embedding_scale)

    def accumulate_gradients(self, buffers: Buffers, *, first: bool) -> None:
        """After backward: put the weight gradients that waited for it into their slots.

        With activation checkpointing each block has done so by itself, while its inputs were in
        scratch.
        """
        layers = slice(self.first_trained, self.qkv.n_layers)
        if not buffers.recomputes:
            is_changed = self.branches.is_changed
            d_output = buffers.attention_branch if is_changed else buffers.mid_residual
            pairs = (
                (self.qkv, buffers.attention_in, buffers.qkv),
                (self.output, buffers.attention_out, d_output),
                (self.gate_up, buffers.feed_forward_in, buffers.gate_up),
            )
            for projection, x, dy in pairs:
                if len(dy.stored):  # a branch's gradient may be in scratch: its block has done so
                    projection.accumulate_gradients(layers, x.stored, dy.stored, first=first)
        if buffers.stores_swiglu:
            d_down = buffers.residuals.stored[self.first_trained + 1 :]  # (layers, N, C + R)
            if self.branches.is_changed:
                d_down = buffers.feed_branch.stored
            x = buffers.swiglu_out
            self.down.accumulate_gradients(layers, x.stored, d_down, first=first)


def _linears(module: nn.Module, names: tuple[tuple[str, ...], tuple[str, ...]]) -> list[nn.Module]:
    """Return the linears that `module` has of `names`: several, or one for all of them."""
    children = dict(module.named_children())
    several, one = names
    return [children[name] for name in (one if one[0] in children else several)]


def _embedding_scale(trunk: LlamaTrunk, dtype: torch.dtype) -> float:
    """Return what embeddings are multiplied by, as `trunk` does it in this dtype."""
    return trunk.scales[dtype] if isinstance(trunk, GemmaTrunk) else trunk.config.embedding_scale
