"""What a device holds of a model whose weights PyTorch's FSDP2 shards.

It keeps a share of every parameter, and gathers a block at a time. What the hand-written step
shards by itself is in `lora.fast.sharded`, and planned by `lora.fast.memory.fast_step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.decoder.decoder import Decoder

GATHERED_BLOCKS = 3
"""Blocks whose whole weights exist at once: of the one that computes, and of the next both what
arrives in one piece and the parameters that this is copied into."""
REDUCED_BYTES = 4
"""Of a gradient's element while it is summed: in fp32."""


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together: a block, or a tensor outside of all blocks."""

    n_elements: int
    n_bytes: int
    """In the dtype in which they are stored."""


@dataclass(frozen=True)
class FsdpWeights:
    """The weights of a model that are sharded."""

    blocks: tuple[Unit, ...]
    others: tuple[Unit, ...]
    """The embedding, the head, and what else is outside of the blocks."""

    @property
    def n_bytes(self) -> int:
        """Of all of them, whole."""
        return sum(unit.n_bytes for unit in self.blocks + self.others)

    def shard_bytes(self, devices: int) -> int:
        """Return the bytes of one device's share."""
        return sum(-(-unit.n_bytes // devices) for unit in self.blocks + self.others)

    def gathered_bytes(self, dtype: torch.dtype | None = None) -> tuple[int, int]:
        """Return what is gathered: while blocks compute, and for the whole step the rest.

        `dtype` is the one in which weights are gathered; None: that in which they are stored.
        """

        def size(unit: Unit) -> int:
            return unit.n_bytes if dtype is None else unit.n_elements * dtype.itemsize

        return GATHERED_BLOCKS * max(map(size, self.blocks)), sum(map(size, self.others))

    def gradient_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return what gradients take beside a device's share of their sums, computed in `dtype`.

        First while blocks compute: those of a block until they are summed, and those of the head,
        which wait for the end of the backward pass. Then at that end, of all outside of the blocks.
        """
        block = max(unit.n_elements for unit in self.blocks)
        head = max(unit.n_elements for unit in self.others)
        others = sum(unit.n_elements for unit in self.others)
        summed = dtype.itemsize + REDUCED_BYTES
        return block * summed + head * dtype.itemsize, others * summed


def recompute_blocks(model: Decoder) -> None:
    """Changes `model` in place: its blocks are recomputed in the backward pass, as on a GPU."""
    for block in model.trunk.blocks():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def fsdp_weights(model: Decoder) -> FsdpWeights:
    """Return what is sharded of `model`: what is frozen, or in full fine-tuning everything."""
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    seen: set[int] = set()

    def take(modules: nn.Module) -> list[Tensor]:
        """Return the tensors of `modules` that no earlier unit has: a tied head has none."""
        # Scales of fp8 weights are buffers.
        tensors = chain(modules.parameters(), modules.buffers())
        sharded = (t for t in tensors if t.numel() and (trains_all or not t.requires_grad))
        found = [t for t in sharded if id(t) not in seen]
        seen.update(map(id, found))
        return found

    blocks = [_unit(take(block)) for block in model.trunk.blocks()]
    return FsdpWeights(tuple(blocks), tuple(_unit([tensor]) for tensor in take(model)))


def _unit(tensors: Iterable[Tensor]) -> Unit:
    sizes = [(tensor.numel(), tensor.nbytes) for tensor in tensors]
    return Unit(sum(n for n, _ in sizes), sum(n for _, n in sizes))
