"""The hand-written step against the plain one, in fp64 on a CPU: losses, parameters, moments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora.adapters.apply import lora_layers
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.fast.llama import buffers
from lora.fast.step import FastStep
from lora.kernels.step.dropout import drop
from lora.kernels.step.ops import PLAIN
from lora.training.checkpoint import restore_training_tensors, training_tensors
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.fast.conftest import (
    CAPPED,
    GEMMA,
    GRANITE,
    OLMO,
    PHI,
    RATES,
    apply_random_lora,
    check_steps,
    relative,
)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 2.0}}),
    "untied": ({"tied": False}, {}),
    "biases": ({"bias": True}, {}),
    "window": ({"window": 4}, {}),
    "normed heads": ({"qk_norm": "head"}, {}),
    "normed heads, window, full": ({"qk_norm": "head", "window": 4}, None),
    "one block": ({}, {"layers": (1,)}),
    "Gemma with a factor": ({**GEMMA, "residual_multiplier": 0.4}, {"layers": (1, 2)}),
    "Gemma, full": (GEMMA, None),
    "Granite, untied": ({**GRANITE, "tied": False}, {"layers": (1, 2)}),
    "Granite, full": (GRANITE, None),
    "capped, full": ({**CAPPED, "tied": False, "window": 4}, None),
    "OLMo": (OLMO, {"layers": (1, 2)}),
    "OLMo with a factor, full": ({**OLMO, "residual_multiplier": 0.4}, None),
    "Phi": (PHI, {"rank_pattern": {"gate_up_proj": 2}}),
    "Phi, two targets": (PHI, {"targets": ("qkv_proj", "down_proj")}),
    "Phi, full": (PHI, None),
    "two targets": ({}, {"targets": ("q_proj", "down_proj")}),
    "full": ({}, None),
    "full, untied, biases": ({"tied": False, "bias": True}, None),
}


def adapt(model: Decoder, settings: dict[str, Any] | None) -> Decoder:
    """Return `model` with LoRA of these settings; None: all of it trains."""
    if settings is None:
        return model.requires_grad_(True)
    return apply_random_lora(model, **settings)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_plain_steps(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    packed: bool,
    merges: bool,
) -> None:
    sizes, settings = CASES[name]
    n_micro = 2 if packed else 1
    monkeypatch.setattr(buffers, "MAX_STORED_SWIGLU_BYTES", 1e9 if merges else 0)
    monkeypatch.setattr(buffers, "MAX_LOGITS_ELEMENTS", 97 * 20)  # the head in two parts
    plain = adapt(tiny_decoder(**sizes), settings)
    step = FastStep(
        copy.deepcopy(plain),
        PLAIN,
        torch.float64,
        weight_decay=0.1,
        merges=merges,
        own_attention=merges,
    )
    batches = [
        [make_batch(10 * number + index, packed=packed) for index in range(n_micro)]
        for number in range(len(RATES))
    ]
    check_steps(step, plain, build_optimizer(plain, 1.0, 0.1), batches)


class SharedMask(nn.Module):
    """Dropout with the hand-written step's masks, in place of a LoRA layer's own."""

    def __init__(self, step: FastStep, number: int, share: float) -> None:
        super().__init__()
        self.step, self.number, self.share = step, number, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.step.masks is not None
        flat = torch.ones_like(x.flatten(0, -2))
        drop(flat.clone(), flat, self.step.masks.seed, self.number, self.share)
        return x * flat.view(x.shape)


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_equals_the_plain_one_under_the_same_masks(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], packed: bool
) -> None:
    plain = adapt(tiny_decoder(), {"dropout": 0.3})
    fast = copy.deepcopy(plain)
    step = FastStep(fast, PLAIN, torch.float64, seed=5)
    order = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    order += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    group = (0, 0, 0, 1, 2, 2, 3)
    for name, layer in lora_layers(plain).items():
        block, part = name.split(".layers.")[1].split(".", 1)
        number = 3 * group[order.index(part)] + int(block)
        layer.dropout = SharedMask(step, number, 0.3)  # type: ignore[assignment]
    optimizer = build_optimizer(plain, 1e-2, 0.0)
    losses = set()
    for number in (1, 2, 3):
        batches = [make_batch(0, packed=packed)]
        step.launch(batches, 1e-2, number)
        expected = train_step(plain, batches, loss_for(plain), optimizer)
        assert step.report[0].item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert step.report[2].item() == pytest.approx(expected.gradient_norm.item(), rel=1e-5)
        losses.add(step.report[0].item())
    assert len(losses) == 3
    others = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        assert relative(parameter, others[key]) < 1e-5, key


def test_a_step_that_is_not_finite_is_not_taken(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    model = adapt(tiny_decoder(), {})
    step = FastStep(model, PLAIN, torch.float64)
    step.launch([make_batch(0, packed=False)], 1e-2)
    before = step.flat.values.clone(), step.flat.mean.clone(), step.flat.square.clone()
    norm = step.network.norms.tensors[3]
    whole = norm.clone()
    norm[5] = float("nan")
    step.launch([make_batch(1, packed=False)], 1e-2)
    assert step.report[3] == 0
    assert step.taken_steps == 1
    for kept, now in zip(before, (step.flat.values, step.flat.mean, step.flat.square), strict=True):
        assert torch.equal(kept, now)
    norm.copy_(whole)
    step.launch([make_batch(1, packed=False)], 1e-2)
    assert step.report[3] == 1
    assert step.report.isfinite().all()


def test_a_saved_optimizer_state_is_restored(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(number, packed=True) for number in range(4)]
    whole = adapt(tiny_decoder(), {})
    halves = copy.deepcopy(whole)
    step, first = (FastStep(model, PLAIN, torch.float64) for model in (whole, halves))
    for number, batch in enumerate(batches):
        step.launch([batch], 1e-2, number + 1)
    for number in (0, 1):
        first.launch([batches[number]], 1e-2, number + 1)
    saved = copy.deepcopy(training_tensors(halves, first.optimizer_state()))
    resumed = adapt(tiny_decoder(), {})
    second = FastStep(resumed, PLAIN, torch.float64)
    second.load_optimizer_state(restore_training_tensors(resumed, saved))
    for number in (2, 3):
        second.launch([batches[number]], 1e-2, number + 1)
    assert torch.equal(second.flat.values, step.flat.values)
    assert torch.equal(second.flat.square, step.flat.square)
