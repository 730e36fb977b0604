"""A decoder sharded with PyTorch's FSDP2: every process stores some rows of each weight.

The blocks are units of their own: a block's weights are gathered just before it computes and let
go after it. Embedding, final norm and head belong to the whole model, and stay gathered from its
forward pass until its backward pass has ended. Gradients are summed over the processes, never
averaged: a step divides once, by all target tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lora.decoder.attention import AttentionInputs
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import PackedRows, QuantisedWeight
from lora.decoder.sizes import stored_bytes
from lora.device import DeviceChoice
from lora.distributed.shards import Rows, read_packed, set_whole_scales, shard_of
from lora.distributed.world import World
from lora.errors import ModelError

GATHERED_BLOCKS = 3
"""Blocks whose whole weights or gradients exist at once: one computes, its neighbours move."""
RESERVED_FRACTION = 0.08
"""Of a GPU's memory: for NCCL, libraries, and what the allocator loses between blocks of memory."""


@torch.no_grad()
def shard_decoder(
    model: Decoder,
    rows: Rows,
    world: World,
    choice: DeviceChoice,
    *,
    recompute: bool = False,
) -> None:
    """Changes `model` in place: what is on the meta device becomes this process's shards of `rows`.

    What is on a device already stays whole in every process: LoRA's A and B. With `recompute` the
    blocks' activations are computed again in the backward pass. Raises ModelError, the same in
    every process, if one of them cannot read or quantise its rows.
    """
    whole = {p for p in model.parameters() if not p.is_meta}
    mesh = DeviceMesh.from_group(_group(world), choice.device.type)
    policy = _policy(model, choice)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for block in model.trunk.blocks():
        if recompute:
            # The method, not the module: FSDP's hooks gather the weights for both passes, outside.
            block.forward = BlockForward(block)
        shard(block)
    shard(model)
    register_fsdp_forward_method(model, "hidden_states")
    model.is_sharded = True
    # The loss and the head read hidden states and never write into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if policy.param_dtype is not None:
        model.cache_dtype = policy.param_dtype
    _load_shards(model, rows, world, choice.device, choice.compute_dtype)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # FSDP takes over the shards, padded to one size, when it gathers for the first time.
        module.unshard()
        module.reshard()


class BlockForward:
    """A block's forward pass, recomputed in the backward pass if `recompute`.

    Not compiled: of an 8B model the first step with compiled blocks had not ended after a minute.
    """

    def __init__(self, block: nn.Module) -> None:
        self.recompute = True
        self._block, self._stored = block, block.forward

    def __call__(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        is_recomputed = self.recompute and torch.is_grad_enabled()
        y: Tensor = (
            _recomputed(self._block, x, inputs) if is_recomputed else self._stored(x, inputs)
        )
        return y


def _recomputed(block: nn.Module, x: Tensor, inputs: AttentionInputs) -> Any:
    return checkpoint(type(block).forward, block, x, inputs, use_reentrant=False)


def set_recompute(model: Decoder, n_blocks: int) -> None:
    """Changes `model` in place: `n_blocks` of its blocks recompute in the backward pass."""
    for number, block in enumerate(model.trunk.blocks()):
        # The last blocks are first in the backward pass: what they store is let go soon.
        vars(block)["forward"].recompute = number < n_blocks


def blocks_to_recompute(model: Decoder, n_tokens: int, world: World, device: torch.device) -> int:
    """Return how many blocks must recompute for a step to fit into the GPU's free memory.

    Called before the first step of full fine-tuning, with the tokens of a micro-batch of each
    process. It is the same number in every process.
    """
    n_blocks = len(model.trunk.blocks())
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = free - RESERVED_FRACTION * total - _step_bytes(model, n_tokens)
    n_stored = int(max(0, room) / stored_bytes(model.config, n_tokens))
    return n_blocks - min(n_blocks, *world.gather(n_stored, "the free memory of each device"))


def _step_bytes(model: Decoder, n_tokens: int) -> int:
    """Return what a step allocates beside what blocks store that do not recompute."""
    width, blocks = model.config.hidden_size, model.trunk.blocks()
    own = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    of_block = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    others = sum(p.numel() for p in model.parameters()) - of_block * len(blocks)
    gradients_and_moments = 3 * 4 * own
    # Gathered in bf16, with gradients in bf16 that are summed in fp32. Embedding and head are whole
    # for a step, and the loss forms the head's gradient in fp32; of blocks there are three.
    gathered = (2 + 2 + 4) * others + 4 * others + GATHERED_BLOCKS * (2 + 2 + 4) * of_block
    inputs = len(blocks) * n_tokens * width * 2
    return gradients_and_moments + gathered + inputs + 2 * stored_bytes(model.config, n_tokens)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the units of a model that is sharded with FSDP2, and none of another."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _group(world: World) -> torch.distributed.ProcessGroup:
    if world.device_group is None:
        raise ModelError("Cannot shard a model in one process. Start several: --devices N.")
    return world.device_group


def _policy(model: Decoder, choice: DeviceChoice) -> MixedPrecisionPolicy:
    trains_all = all(p.requires_grad for p in model.parameters())
    if not trains_all or choice.compute_dtype is not torch.bfloat16:
        return MixedPrecisionPolicy()
    # Weights travel in the compute dtype, gradients are summed in that of the weights.
    return MixedPrecisionPolicy(param_dtype=choice.compute_dtype, reduce_dtype=torch.float32)


def _load_shards(
    model: Decoder, rows: Rows, world: World, device: torch.device, dtype: torch.dtype
) -> None:
    """Changes `model` in place: its sharded parameters get their values, read one by one."""
    quantised: list[tuple[QuantisedWeight, str, PackedRows]] = []
    like = torch.empty(0, dtype=dtype, device=device)

    def read() -> None:
        for name, owners, parameter in _sharded_parameters(model):
            module, key = owners[0]
            part = shard_of(len(parameter), world.share)
            if isinstance(module, QuantisedWeight) and key == "weight":
                own = read_packed(module, name, part, rows, like)
                quantised.append((module, name, own))
                _set_shard(owners, parameter, own.codes)
            else:
                _set_shard(owners, parameter, rows(name, part).to(device))

    world.on_all(read, "the shards of all processes")
    for module, name, own in quantised:
        set_whole_scales(module, name, [own], rows, device, world)


def _sharded_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, list[tuple[nn.Module, str]], DTensor]]:
    """Yield each sharded parameter once: its name, the modules that hold it, and itself."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, key))
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, DTensor):
            yield name, owners[id(parameter)], parameter


def _set_shard(owners: list[tuple[nn.Module, str]], former: DTensor, values: Tensor) -> None:
    """Changes the modules of `owners` in place: their parameter's own rows become `values`."""
    whole = DTensor.from_local(
        values.to(former.dtype),
        former.device_mesh,
        former.placements,
        run_check=False,
        shape=former.shape,
        stride=former.stride(),
    )
    new = nn.Parameter(whole, requires_grad=former.requires_grad)
    for module, key in owners:
        setattr(module, key, new)
