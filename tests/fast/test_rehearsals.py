"""Steps of several micro-batches whose passes are rehearsed before they are captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.captured import CapturedStep, decoder_forward, loss_of_head
from lora.fast.graphs import WARM_UP_PASSES, Graphs
from lora.fast.step import FastStep
from lora.kernels.step.ops import PLAIN


class RehearsedGraphs(Graphs):
    """Calls a function as often as a GPU does: a new one is rehearsed, with updates off."""

    def __init__(self, device: torch.device, is_live: torch.Tensor) -> None:
        super().__init__(device, is_live)
        self.known: set[tuple[Any, ...]] = set()

    def run(self, key: tuple[Any, ...], function: Callable[[], Any]) -> bool:
        """Rehearse `function` if `key` is new, then call it."""
        is_new = key not in self.known
        self.known.add(key)
        self.is_live.fill_(False)
        for _ in range(WARM_UP_PASSES if is_new else 0):
            function()
        self.is_live.fill_(True)
        function()
        return is_new

    def clear(self) -> None:
        """Forget what is known."""
        self.known.clear()


def _fast(model: Decoder) -> FastStep:
    return FastStep(model, PLAIN, torch.float32, own_attention=False)


def _captured(model: Decoder) -> CapturedStep:
    loss = loss_of_head(model, PLAIN)
    return CapturedStep(model, decoder_forward(model), PLAIN, choose_device("cpu"), loss=loss)


@pytest.mark.parametrize("build", [_fast, _captured])
def test_rehearsed_passes_are_not_counted(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    build: Callable[[Decoder], FastStep | CapturedStep],
) -> None:
    model = tiny_decoder()
    apply_lora(model, LoRAConfig(rank=3, init_seed=0))
    for layer in lora_layers(model).values():
        layer.lora_B.data.fill_(0.1)
    plain, rehearsed = build(model), build(copy.deepcopy(model))
    rehearsed.graphs = RehearsedGraphs(rehearsed.device, rehearsed.graphs.is_live)
    # Packed ones after others: a new kind of pass in the middle of a later step too.
    for number, kinds in enumerate([(False, False, False), (False, True, True)], 1):
        batches = [make_batch(10 * number + i, packed=kind) for i, kind in enumerate(kinds)]
        for step in (plain, rehearsed):
            step.launch(batches, 1e-2, number)
        assert torch.equal(rehearsed.report, plain.report)
    assert torch.equal(
        torch.cat([p.flatten() for p in rehearsed.model.parameters()]),
        torch.cat([p.flatten() for p in plain.model.parameters()]),
    )
