"""Projections whose frozen weights are gathered for each block: views of the ring's slots.

They compute what their unsharded twins in `lora.fast.weights` do, with the same matmuls. LoRA's A
and B are whole in every process; where they are part of the weight's tensor they are written into
the slot after each gather, from copies in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.fast.sharded.base import fill_part
from lora.fast.sharded.layout import ShardedMatrix, Source
from lora.fast.sharded.ring import ShardRing
from lora.fast.weights.adapted import (
    ConcatenatedLoRAProjection,
    DropoutMasks,
    SeparateLoRAProjection,
    has_lora,
)
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import FrozenProjection, Projection, weight_of
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.token_tables import TokenTable
from lora.kernels.step.ops import Ops


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

    def __init__(self, *args: Any, ring: ShardRing, **more: Any) -> None:
        self.ring = ring  # before the twin's constructor, which calls `bind_base`
        super().__init__(*args, **more)

    def reserve(self, dtype: torch.dtype, extra: int = 0) -> None:
        """Ask the ring for room, with `extra` rows and columns for LoRA.

        The unsharded twins call `bind_base` where they allocate: here the ring does, later.
        """
        self.device = self.ring.device
        columns = weight_of(self.members[0].modules[0]).shape[1]  # of codes there may be fewer
        sources: list[list[Source]] = [
            [(self.ring.name_of(m.modules[layer]), m.rows) for m in self.members]
            for layer in range(self.n_layers)
        ]
        self.matrix = self.ring.reserve_block_matrix(
            self.outputs, columns, dtype, sources, extra=extra
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
        self.bind_weights()
        for layer in range(self.n_layers):
            # Without the room for LoRA's matrices.
            weight = self.matrix.views[layer][: self.outputs, : self.matrix.inputs]  # (O, I)
            for member in self.members:
                module = member.modules[layer]
                # A new parameter: one on the meta device cannot become a view of memory.
                module.weight = nn.Parameter(weight[member.rows], requires_grad=False)
        self._bind_biases()

    def bind_weights(self) -> None:
        """Let the twin multiply by what lies in the slots."""
        self.weights = self.matrix.views


class ShardedFrozenProjection(ShardedProjection, FrozenProjection):
    """No linear of it trains."""

    def bind_base(self) -> None:
        self.reserve(self.dtype)


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

    def bind_base(self) -> None:
        self.reserve(self.dtype)


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
    ring: ShardRing,
) -> ShardedProjection:
    """Return the projection of plain linears that read the same input, given by block."""
    if not has_lora(blocks):
        return ShardedFrozenProjection(blocks, dtype, ring=ring)
    if masks is not None:
        # Dropout is on LoRA's inputs alone, so LoRA needs matmuls of its own.
        return ShardedSeparateProjection(blocks, flat, dtype, ops, masks, ring=ring)
    return ShardedConcatenatedProjection(blocks, flat, dtype, ring=ring)
