"""Projections whose frozen weights are packed (nf4, int8): unpacked for each matmul into scratch.

They compute what their plain twins do, with the same matmuls, over the unpacked values. Modules
keep their packed tensors; nothing of the weights' size in the compute dtype stays but the scratch,
which all blocks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.fast.llama.buffers import Buffers
from lora.fast.weights.adapted import (
    ConcatenatedLoRAProjection,
    DropoutMasks,
    SeparateLoRAProjection,
    has_lora,
)
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import FrozenProjection, Projection, weight_of
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_projection import StackedProjection
from lora.kernels.step.ops import Ops


class ScratchUser(Protocol):
    """What unpacks its weights into scratch."""

    @property
    def n_unpacked(self) -> int:
        """Values that have to lie there at once."""

    def use_scratch(self, room: Tensor) -> None:
        """Unpack into `room`, which is flat, from now on; an empty one is no longer used."""


class WeightScratch:
    """Room for the unpacked weights of one projection of one block, and for those of one down.

    Down has room of its own: where a feed-forward takes its tokens in chunks, gate/up and down
    alternate, and neither is unpacked again for the next chunk.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[ScratchUser, int]] = {}
        """By the address of a scratch tensor: whose weights lie there, and of which block."""
        self._users: Sequence[ScratchUser] = ()

    def release(self) -> None:
        """Drop the tensors of a former step."""
        self.forget()
        for user in self._users:
            user.use_scratch(torch.empty(0))
        self._users = ()

    def allocate(
        self, buffers: Buffers, users: Sequence[ScratchUser], down: Sequence[ScratchUser]
    ) -> None:
        """Changes `buffers` in place: adds the scratch of all `users`, and of `down` apart."""
        rooms = [max((user.n_unpacked for user in some), default=0) for some in (users, down)]
        buffers.add_unpacked(*rooms)
        self._users = (*users, *down)
        for user in users:
            user.use_scratch(buffers.unpacked)
        for user in down:
            user.use_scratch(buffers.unpacked_down)

    def holds(self, user: ScratchUser, part: int, room: Tensor) -> bool:
        """Whether `room` has this part of its weights; from now on it counts as having it."""
        key, wanted = room.data_ptr(), (user, part)
        held = self._held.get(key) == wanted
        self._held[key] = wanted
        return held

    def forget(self) -> None:
        """Before a pass: a replayed pass finds what another one left, and adapters have changed."""
        self._held.clear()


class UnpackedProjection(Projection):
    """What the projections over packed weights share; a twin's forward and backward follow.

    Args:
        args: those of the plain twin's constructor.
        scratch: where the weights are unpacked.
    """

    weights: list[Tensor]
    """By block, all the same scratch: (O, I), or (O + R, I + R) with LoRA's matrices."""
    extra_weights = 0
    """Rows and columns of them for LoRA's matrices."""

    def __init__(self, *args: Any, scratch: WeightScratch) -> None:
        self.scratch = scratch  # before the twin's constructor, which calls `bind_base`
        super().__init__(*args)

    def bind_base(self) -> None:
        """Called by the plain twins where they copy the weights: here these stay in the modules."""
        self.weights = []
        self._bind_biases()

    @property
    def n_unpacked(self) -> int:
        """Values of the unpacked weights of one block."""
        return (self.outputs + self.extra_weights) * (self.inputs + self.extra_weights)

    def packed_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that the modules keep: codes and scales, or plain weights."""
        for member in self.members:
            for module in member.modules:
                yield weight_of(module)
                yield from module.buffers(recurse=False)

    def use_scratch(self, room: Tensor) -> None:
        """Take the first values of `room`, which is flat, as the weights of every block."""
        columns = self.inputs + self.extra_weights
        weights = room[: self.n_unpacked].view(-1, columns)
        self.weights = [weights] * self.n_layers if len(weights) else []

    def unpack(self, layer: int) -> None:
        """Changes the scratch in place: it has the weights of this block, if it did not."""
        whole = self.weights[layer]
        if not self.scratch.holds(self, layer, whole):
            self.unpack_base(layer, whole[: self.outputs, : self.inputs])
            self.add_adapters(layer, whole)

    def unpack_base(self, layer: int, out: Tensor) -> None:
        """Changes `out` (O, I) in place: the weights of all members."""
        for member in self.members:
            module = member.modules[layer]
            if isinstance(module, QuantisedWeight):
                module.unpack_into(out[member.rows])
            else:  # folders in 4 bits leave single linears as they are
                out[member.rows].copy_(weight_of(module))

    def add_adapters(self, layer: int, whole: Tensor) -> None:
        """Changes `whole` in place: LoRA's matrices, where they are in the same tensor."""

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.unpack(layer)
        super().forward(layer, x, out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None or self.extra_weights:  # where nothing needs dx, LoRA still needs B
            self.unpack(layer)
        super().backward(layer, dy, dx)


class UnpackedFrozenProjection(UnpackedProjection, FrozenProjection):
    """No linear of it trains."""


class UnpackedConcatenatedProjection(UnpackedProjection, ConcatenatedLoRAProjection):
    """LoRA's matrices in the same tensor as W, written there whenever it is unpacked."""

    def bind_base(self) -> None:
        super().bind_base()
        self.extra_weights = self.width
        _, columns, slot, _ = self.adapted[0]
        fills_rows = self.outputs * self.width == slot.shape[1] * (columns.stop - columns.start)
        self.has_zeros = len(self.adapted) > 1 or not fills_rows
        """Whether parts of s·B are zero: members without LoRA, pairs of two members, padding."""

    def add_adapters(self, layer: int, whole: Tensor) -> None:
        a, b = whole[self.outputs :, : self.inputs], whole[: self.outputs, self.inputs :]
        if self.has_zeros:  # other projections have written here
            b.zero_()
        self.copy_adapters(a[None], b[None], slice(layer, layer + 1))


class UnpackedSeparateProjection(UnpackedProjection, SeparateLoRAProjection):
    """LoRA in matmuls of its own, for dropout on its inputs."""


class UnpackedStackedProjection(UnpackedProjection, StackedProjection):
    """LoRA of K adapters beside W, which is unpacked once for the rows of all of them."""


def unpacked_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters | StackedFlat,
    dtype: torch.dtype,
    ops: Ops,
    masks: DropoutMasks | None,
    scratch: WeightScratch,
) -> Projection:
    """Return the projection of packed linears that read the same input, given by block."""
    if not has_lora(blocks):
        return UnpackedFrozenProjection(blocks, dtype, scratch=scratch)
    if isinstance(flat, StackedFlat):
        return UnpackedStackedProjection(blocks, flat, dtype, scratch=scratch)
    if masks is not None:
        # Dropout is on LoRA's inputs alone, so LoRA needs matmuls of its own.
        return UnpackedSeparateProjection(blocks, flat, dtype, ops, masks, scratch=scratch)
    return UnpackedConcatenatedProjection(blocks, flat, dtype, scratch=scratch)


def is_packed(module: nn.Module) -> bool:
    """Whether a linear's weight has to be unpacked for a matmul in the compute dtype."""
    return isinstance(module, QuantisedWeight) and module.kind != "fp8"
