"""Projections whose frozen weights are gathered for each block: views of the ring's slots.

They compute what their unsharded twins in `lora.fast.weights` do, with the same matmuls. LoRA's A
and B are whole in every process; where they are part of the weight's tensor they are written into
the slot after each gather, from copies in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised.fp8 import Fp8Weight
from lora.fast.llama.fp8 import Fp8BaseProjection, Fp8Buffers, Fp8Projection, FrozenFp8Projection
from lora.fast.sharded.base import fill_fp8_part, fill_part, gather_scales
from lora.fast.sharded.layout import ShardedMatrix, Source
from lora.fast.sharded.ring import ShardRing
from lora.fast.weights.adapted import (
    ConcatenatedLoRAProjection,
    DropoutMasks,
    SeparateLoRAProjection,
)
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import FrozenProjection, Projection
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.token_tables import TokenTable
from lora.kernels.step.fp8 import FP8
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer


class ShardedProjection(Projection):
    """What the sharded projections share: a matrix of every block in the ring.

    Room is reserved when they are made; when the ring is allocated, `read` and `use_slots` follow.

    Args:
        args: those of the unsharded twin's constructor.
        ring: where they get their room.
    """

    matrix: ShardedMatrix
    weights: list[Tensor]
    """By block, (O + R, I + R): what the unsharded twins multiply by."""

    def __init__(self, *args: Any, ring: ShardRing) -> None:
        self.ring = ring  # before the twin's constructor, which calls `bind_base`
        super().__init__(*args)

    def bind_base(self) -> None:
        """Called by the unsharded twins where they allocate: here the ring does, later."""
        self.reserve(self.dtype)

    def reserve(self, dtype: torch.dtype, extra: int = 0) -> None:
        """Ask the ring for room, with `extra` rows and columns for LoRA."""
        self.device = self.ring.device
        sources: list[list[Source]] = [
            [(self.ring.name_of(m.modules[layer]), m.rows) for m in self.members]
            for layer in range(self.n_layers)
        ]
        self.matrix = self.ring.reserve_block_matrix(
            self.outputs, self.inputs, dtype, sources, extra=extra
        )

    def read(self) -> None:
        """Fill this process's shard."""
        for layer in range(self.n_layers):
            self.read_block(layer, self.ring.part_of_block(layer))

    def read_block(self, layer: int, part: Tensor) -> None:
        """Changes `part`, the bytes of a block in this process's shard, in place: its rows."""
        fill_part(self.matrix, layer, part, self.ring.base)

    def use_slots(self) -> None:
        """Changes the modules in place: their weights become views of the slots."""
        self.weights = self.matrix.views
        for layer in range(self.n_layers):
            weight = self.weights[layer][: self.outputs, : self.inputs]  # (O, I)
            for member in self.members:
                module = member.modules[layer]
                # A new parameter: one on the meta device cannot become a view of memory.
                module.weight = nn.Parameter(weight[member.rows], requires_grad=False)
        self._bind_biases()


class ShardedFrozenProjection(ShardedProjection, FrozenProjection):
    """No linear of it trains."""


class ShardedConcatenatedProjection(ShardedProjection, ConcatenatedLoRAProjection):
    """LoRA's matrices in the same tensor as W, written there after every gather."""

    def bind_base(self) -> None:
        self.reserve(self.dtype, extra=self.width)
        self.a = self.empty(self.n_layers, self.width, self.inputs)
        # Zeros in the blocks of B that pair one member's outputs with another's ranks.
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()

    def use_slots(self) -> None:
        super().use_slots()
        self.matrix.add_adapters = self._add_adapters

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)

    def _add_adapters(self, layer: int, whole: Tensor) -> None:
        """Changes `whole` (O + R, I + R) in place: [[W, s·B], [A, …]]; nothing reads the corner."""
        whole[self.outputs :, : self.inputs].copy_(self.a[layer])
        whole[: self.outputs, self.inputs :].copy_(self.b[layer])


class ShardedSeparateProjection(ShardedProjection, SeparateLoRAProjection):
    """LoRA in matmuls of its own, for dropout on its inputs."""


class _ShardedFp8Base(ShardedProjection, Fp8BaseProjection):
    """Codes are gathered; the scales of all rows are in every process."""

    def bind_base(self) -> None:
        self.reserve(FP8)
        # Of the rows of this process, padded as its shard is.
        shape = self.n_layers, self.matrix.rank_rows, 1
        self.own_scales = torch.ones(shape, dtype=torch.float32, device=self.device)

    def read_block(self, layer: int, part: Tensor) -> None:
        scales = self.own_scales[layer]
        fill_fp8_part(self.matrix, layer, part, self.ring.base, self.dtype, scales)

    def use_slots(self) -> None:
        super().use_slots()
        if self.device.type == "meta":
            self.scales = self.own_scales.new_empty(self.n_layers, self.outputs, 1)
        else:
            self.scales = gather_scales(self.matrix, self.own_scales, self.ring.base)
        del self.own_scales
        for member in self.members:
            for layer, module in enumerate(member.modules):
                cast(Fp8Weight, module).weight_scale = self.scales[layer, member.rows]


class ShardedFp8Projection(_ShardedFp8Base, Fp8Projection):
    """LoRA in the compute dtype, beside weights in fp8."""


class ShardedFrozenFp8Projection(_ShardedFp8Base, FrozenFp8Projection):
    """No linear of it trains."""


class ShardedTable(TokenTable):
    """The embedding or the output head: a unit of the ring by itself; what trains of it is whole.

    Args:
        module: whose weight it is.
        flat: where its trained rows get their slot.
        dtype: compute dtype.
        ring: where it gets its room.
        lr_fraction: of the learning rate, for its rows.
        embedding: the other table, for a head.
        is_tied: the head has the embedding's rows, maybe in the other slot.
    """

    def __init__(
        self,
        module: nn.Module,
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        ring: ShardRing,
        lr_fraction: float,
        embedding: ShardedTable | None = None,
        is_tied: bool = False,
    ) -> None:
        self.module, self.ring, self.dtype = module, ring, dtype
        self.slot, self.is_tied = None, is_tied
        rows, columns = module.get_parameter("weight").shape
        self.matrix: ShardedMatrix = (
            embedding.matrix
            if embedding is not None and is_tied
            else ring.reserve_table(rows, columns, dtype, ring.name_of(module))
        )
        self.find_trained(module, flat, lr_fraction, embedding)

    def read(self) -> None:
        """Fill this process's shard."""
        if not self.is_tied:
            fill_part(self.matrix, 0, self.ring.part_of_table(self.matrix), self.ring.base)

    def use_slots(self) -> None:
        """Changes the module in place: its weight becomes a view of its slot."""
        self.tensors = [self.matrix.views[-1 if self.is_tied else 0]]
        self.module.weight = nn.Parameter(self.tensors[0], requires_grad=False)


def sharded_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters,
    dtype: torch.dtype,
    ops: Ops,
    masks: DropoutMasks | None,
    fp8: Fp8Buffers | None,
    ring: ShardRing,
) -> ShardedProjection:
    """Return the projection of linears that read the same input, given by block."""
    is_adapted = any(isinstance(module, LoRALayer) for block in blocks for module in block)
    if fp8 is not None:
        if is_adapted:
            return ShardedFp8Projection(blocks, flat, dtype, ops, masks, fp8, ring=ring)
        return ShardedFrozenFp8Projection(blocks, dtype, fp8, ring=ring)
    if not is_adapted:
        return ShardedFrozenProjection(blocks, dtype, ring=ring)
    if masks is not None:
        # Dropout is on LoRA's inputs alone, so LoRA needs matmuls of its own.
        return ShardedSeparateProjection(blocks, flat, dtype, ops, masks, ring=ring)
    return ShardedConcatenatedProjection(blocks, flat, dtype, ring=ring)
