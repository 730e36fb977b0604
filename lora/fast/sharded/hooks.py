"""The own forward of a sharded model, for evaluations and samples: each block is gathered first."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lora.decoder.decoder import Decoder
from lora.errors import ModelError
from lora.fast.sharded.ring import EMBEDDING, ShardRing, block_unit


def gather_in_forward(model: Decoder, ring: ShardRing) -> None:
    """Changes `model` in place: its forward gathers the weights that it is about to read.

    With a collective gather every process must call the model as often as the others. Without
    gradients only: the hooks raise ModelError where autograd would save weights for later.
    """
    model.is_sharded = model.is_forward_only = True
    trunk = model.trunk
    _before(trunk.embedding(), ring, EMBEDDING, block_unit(0))
    for layer, block in enumerate(trunk.blocks()):
        _before(block, ring, block_unit(layer), block_unit(layer + 1))
    # The loss reads the head's weight without calling the head. The next forward begins with the
    # embedding.
    _before(trunk.final_norm(), ring, ring.head, EMBEDDING)


def _before(module: nn.Module, ring: ShardRing, number: int, then: int) -> None:
    module.register_forward_pre_hook(partial(_enter, ring, number, then))


def _enter(ring: ShardRing, number: int, then: int, module: nn.Module, inputs: Any) -> None:
    if torch.is_grad_enabled():
        raise ModelError(
            "Cannot compute gradients through the forward of a sharded model: its weights are "
            "gathered block by block, and gone before the backward pass. Call it within "
            "torch.no_grad(), and train it through its step."
        )
    ring.enter(number, then)
