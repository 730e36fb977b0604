"""Sharded projections over quantised weights: codes are gathered, every process has all scales.

fp8 codes are multiplied as they arrive in the slot; those of nf4 and int8 are unpacked from it into
the scratch that all blocks share, where LoRA's matrices are written too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import PackedRows, QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Weight
from lora.distributed.shards import set_whole_scales
from lora.fast.llama.fp8 import Fp8BaseProjection, Fp8Buffers, Fp8Projection, FrozenFp8Projection
from lora.fast.sharded.base import fill_packed_part
from lora.fast.sharded.projections import ShardedProjection
from lora.fast.sharded.ring import ShardRing
from lora.fast.weights.adapted import DropoutMasks, has_lora
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import weight_of
from lora.fast.weights.unpacked import (
    UnpackedConcatenatedProjection,
    UnpackedFrozenProjection,
    UnpackedProjection,
    UnpackedSeparateProjection,
    WeightScratch,
)
from lora.kernels.step.ops import Ops


class _ShardedCodes(ShardedProjection):
    """A quantised weight: its codes are in the ring, its scales in the modules."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.own_scales: list[list[list[PackedRows]]] = []
        """By block and member, until `use_slots`: what this process has of the scales."""
        super().__init__(*args, **more)

    def read_block(self, layer: int, part: Tensor) -> None:
        matrix, base = self.matrix, self.ring.base
        modules = [cast(QuantisedWeight, m.modules[layer]) for m in self.members]
        found = fill_packed_part(matrix, layer, part, base, self.dtype, modules)
        self.own_scales.append(found)

    def use_slots(self) -> None:
        super().use_slots()
        rows, world = self.ring.base.rows, self.ring.base.world
        for layer, of_block in enumerate(self.own_scales):  # none in a plan
            sources = self.matrix.sources[layer]
            for member, (name, _), own in zip(self.members, sources, of_block, strict=True):
                module = cast(QuantisedWeight, member.modules[layer])
                set_whole_scales(module, name, own, rows, self.device, world)
        self.own_scales = []


class _ShardedFp8Base(_ShardedCodes, Fp8BaseProjection):
    """The scales of a block's members are one tensor."""

    def bind_base(self) -> None:
        self.reserve(weight_of(self.members[0].modules[0]).dtype)

    def use_slots(self) -> None:
        super().use_slots()
        shape = self.n_layers, self.outputs, 1
        self.scales = torch.empty(shape, dtype=torch.float32, device=self.device)
        for member in self.members:
            for layer, module in enumerate(member.modules):
                view = self.scales[layer, member.rows]
                view.copy_(cast(Fp8Weight, module).weight_scale)
                cast(Fp8Weight, module).weight_scale = view


class ShardedFp8Projection(_ShardedFp8Base, Fp8Projection):
    """LoRA in the compute dtype, beside weights in fp8."""


class ShardedFrozenFp8Projection(_ShardedFp8Base, FrozenFp8Projection):
    """No linear of it trains."""


class _ShardedPackedBase(_ShardedCodes, UnpackedProjection):
    """The slot has codes; what the twins multiply by is the scratch."""

    def bind_base(self) -> None:
        self.reserve(weight_of(self.members[0].modules[0]).dtype)
        super().bind_base()

    def bind_weights(self) -> None:
        """Leave `weights` to the scratch."""


class ShardedUnpackedFrozenProjection(_ShardedPackedBase, UnpackedFrozenProjection):
    """No linear of it trains."""


class ShardedUnpackedConcatenatedProjection(_ShardedPackedBase, UnpackedConcatenatedProjection):
    """LoRA's matrices in the same tensor as W, written into the scratch."""


class ShardedUnpackedSeparateProjection(_ShardedPackedBase, UnpackedSeparateProjection):
    """LoRA in matmuls of its own, for dropout on its inputs."""


def sharded_fp8_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters,
    dtype: torch.dtype,
    ops: Ops,
    masks: DropoutMasks | None,
    fp8: Fp8Buffers,
    ring: ShardRing,
) -> ShardedProjection:
    """Return the projection of fp8 linears that read the same input, given by block."""
    if has_lora(blocks):
        return ShardedFp8Projection(blocks, flat, dtype, ops, masks, fp8, ring=ring)
    return ShardedFrozenFp8Projection(blocks, dtype, fp8, ring=ring)


def sharded_unpacked_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters,
    dtype: torch.dtype,
    ops: Ops,
    masks: DropoutMasks | None,
    scratch: WeightScratch,
    ring: ShardRing,
) -> ShardedProjection:
    """Return the projection of packed linears that read the same input, given by block."""
    shared = {"scratch": scratch, "ring": ring}
    if not has_lora(blocks):
        return ShardedUnpackedFrozenProjection(blocks, dtype, **shared)
    if masks is not None:
        return ShardedUnpackedSeparateProjection(blocks, flat, dtype, ops, masks, **shared)
    return ShardedUnpackedConcatenatedProjection(blocks, flat, dtype, **shared)
