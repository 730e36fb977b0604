"""The plan of a device of a model whose weights PyTorch's FSDP2 shards.

It keeps a share of every parameter, and gathers a block at a time. What the hand-written step
shards by itself is in `lora.fast.sharded`, and planned by `lora.fast.memory.fast_step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.config import MemoryConfig
from lora.decoder.decoder import Decoder
from lora.decoder.sizes import stored_bytes
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.pretrained.load.models import as_decoder_config

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
        # The scales of quantised weights are buffers, which every process has whole.
        tensors: Iterable[Tensor] = modules.parameters()
        sharded = (t for t in tensors if t.numel() and (trains_all or not t.requires_grad))
        found = [t for t in sharded if id(t) not in seen]
        seen.update(map(id, found))
        return found

    blocks = [_unit(take(block)) for block in model.trunk.blocks()]
    return FsdpWeights(tuple(blocks), tuple(_unit([tensor]) for tensor in take(model)))


def plan_fsdp(
    inputs: PlanInputs, whole: MemoryPlan, sharded: FsdpWeights, size: int, memory: MemoryConfig
) -> MemoryPlan:
    """Return `whole`, the plan of a plain step of `size` sequences, with its weights sharded.

    On a GPU it is one that recomputes all blocks: full fine-tuning stores as many as fit.
    """
    n_blocks = inputs.config.num_hidden_layers if inputs.device_type == "cuda" else None
    whole = replace(whole, recomputed_blocks=n_blocks)
    input_bytes = size * inputs.tokens * inputs.config.hidden_size * inputs.compute_dtype.itemsize
    # What a block stores beside its input, which it stores when it is recomputed too.
    each = stored_bytes(as_decoder_config(inputs.config), size * inputs.tokens) - input_bytes
    if inputs.lora is None:
        return _plan_full(inputs, whole, sharded, memory, each, input_bytes)
    weights = whole.weights - sharded.n_bytes + sharded.shard_bytes(inputs.devices)
    held = replace(whole, weights=weights + sum(sharded.gathered_bytes()))
    return held if memory.memory != "none" else _storing(held, n_blocks or 0, each)


def _plan_full(
    inputs: PlanInputs,
    whole: MemoryPlan,
    sharded: FsdpWeights,
    memory: MemoryConfig,
    each: int,
    input_bytes: int,
) -> MemoryPlan:
    """Return the plan of full fine-tuning, of blocks that store `each` and `input_bytes`."""
    n_blocks, gb = whole.recomputed_blocks, memory.memory_gb
    blocks, others = sharded.gathered_bytes(inputs.compute_dtype)
    share = -(-4 * whole.parameters // inputs.devices)
    within, at_end = sharded.gradient_bytes(inputs.compute_dtype)
    held = replace(whole, weights=share + blocks + others, gradients=within, optimizer=2 * share)
    if n_blocks is not None:
        # The trace is of the loss or of a block, whatever takes more. In the loss no block is
        # gathered and has gradients; a block is recomputed beside its backward pass.
        traced = whole.activations + whole.loss - blocks - within
        peak = max(traced, 2 * each + n_blocks * input_bytes)
        loss = min(whole.loss, peak)
        held = replace(held, activations=peak - loss, loss=loss)
        if memory.memory == "none":
            held = _storing(held, n_blocks, each)
        elif gb is not None and memory.memory == "auto":
            room = round(gb * 1e9) - held.total - share
            held = _storing(held, min(n_blocks, max(0, room) // each), each)
    # Shares become more as activations become fewer, unless micro-batches add to them.
    first = within + (share if inputs.micro_batches > 1 else 0)
    at_end += share - held.activations - held.loss
    held = replace(held, gradients=max(first, at_end))
    if gb is None or n_blocks is None:
        return held
    recomputed = f"FSDP2 recomputes about {held.recomputed_blocks} of {n_blocks} blocks"
    return replace(held, reason=f"{recomputed}; {held.total / 1e9:.1f} GB planned of {gb:.1f} GB")


def _storing(plan: MemoryPlan, n_stored: int, each: int) -> MemoryPlan:
    """Return `plan` with `n_stored` of the blocks that it recomputes stored instead."""
    if plan.recomputed_blocks is None:  # on a CPU none is recomputed
        return plan
    return replace(
        plan,
        activations=plan.activations + n_stored * each,
        recomputed_blocks=plan.recomputed_blocks - n_stored,
    )


def _unit(tensors: Iterable[Tensor]) -> Unit:
    sizes = [(tensor.numel(), tensor.nbytes) for tensor in tensors]
    return Unit(sum(n for n, _ in sizes), sum(n for _, n in sizes))
