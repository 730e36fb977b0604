"""Every family on the hand-written step: one step in fp64 on a CPU against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora.config import BaseWeights, LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.config import DecoderConfig, FeedForwardConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.decoder.quantised.base import quantised_modules
from lora.device import choose_device
from lora.fast.llama.checkpointing import MODES
from lora.fast.stacked_step import StackedFastStep
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_hand_written, why_not_stacked_hand_written
from lora.kernels.step.ops import PLAIN
from lora.layers.quantised_model import use_quantised_linears
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.decoder.conftest import CASES, GPT2_SIZES, LLAMA_SIZES, LONG_CASE
from tests.fast.conftest import apply_random_lora, apply_random_stacked, relative
from tests.tiny_llama import changed, llama_config, random_decoder

REFUSED = {
    "gpt2": "places its norms otherwise",
    "gpt2-scaled": "places its norms otherwise",
}
"""What the step does not train, and why."""


def config_of(name: str) -> DecoderConfig:
    transformers = pytest.importorskip("transformers")
    config_class, _, differences = LONG_CASE if name == "long" else CASES[name]
    sizes = GPT2_SIZES if name.startswith("gpt2") else LLAMA_SIZES
    config = getattr(transformers, config_class)(**{**sizes, **differences}).to_dict()
    return decoder_config(config)


def build(name: str) -> Decoder:
    return random_decoder(config_of(name), torch.float64)


def test_every_family_has_a_case() -> None:
    covered = {config_of(name).family for name in CASES}
    assert covered >= set(FAMILIES)


@pytest.mark.parametrize("name", [*CASES, "long"])
@pytest.mark.parametrize("full", [False, True])
def test_one_step_equals_the_plain_one(
    name: str, full: bool, make_batch: Callable[..., Batch]
) -> None:
    plain = build(name)
    why = why_not_hand_written(plain)
    if name in REFUSED:
        assert why is not None
        assert REFUSED[name] in why
        return
    assert why is None
    if not full:
        apply_random_lora(plain)
    fast = copy.deepcopy(plain)
    step = FastStep(fast, PLAIN, torch.float64, merges=full)
    batches = [make_batch(0, packed=True), make_batch(1, packed=False)]
    step.launch(batches, 1e-2)
    expected = train_step(plain, batches, loss_for(plain), build_optimizer(plain, 1e-2, 0.0))
    assert step.report[0].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert step.report[2].item() == pytest.approx(expected.gradient_norm.item(), rel=1e-5)
    others = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        assert relative(parameter, others[key]) <= 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*CASES, "long") if name not in REFUSED])
def test_one_step_over_nf4_equals_the_plain_one(
    name: str, make_batch: Callable[..., Batch]
) -> None:
    plain = build(name)
    weights = {n: m.weight for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    use_quantised_linears(plain, BaseWeights("nf4"))
    for key, module in quantised_modules(plain).items():
        module.load(weights[key].detach(), key)
    apply_random_lora(plain, torch.float64)
    fast = copy.deepcopy(plain)
    assert why_not_hand_written(plain) is None
    step = FastStep(fast, PLAIN, torch.float64, checkpointing=MODES["full"])
    batches = [make_batch(0, packed=True), make_batch(1, packed=False)]
    step.launch(batches, 1e-2)
    expected = train_step(plain, batches, loss_for(plain), build_optimizer(plain, 1e-2, 0.0))
    assert step.report[0].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    others = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter, others[key]) <= 1e-5, key


@pytest.mark.parametrize("name", [name for name in (*CASES, "long") if name not in REFUSED])
def test_stacked_adapters_step_as_in_the_plain_step(
    name: str, make_batch: Callable[..., Batch]
) -> None:
    plain = build(name)
    fast, config = copy.deepcopy(plain), TrainConfig(weight_decay=0.1)
    adapters = [LoRAConfig(rank=rank, alpha=6.0, init_seed=rank) for rank in (3, 2)]
    reference, stacked = (apply_random_stacked(model, adapters) for model in (plain, fast))
    assert why_not_stacked_hand_written(fast, stacked) is None
    loss_fn, choice = StackedDecoderLoss(reference), choose_device("cpu", "fp32")
    training = PlainStackedRunner(plain, reference, loss_fn, [config, config], choice)
    step = StackedFastStep(
        fast, stacked, PLAIN, torch.float64, weight_decays=[0.1, 0.1], max_grad_norms=[1.0, 1.0]
    )
    batches = [stack_batches([make_batch(n, packed=n == 0), make_batch(n + 9, packed=True)])
               for n in (0, 1)]  # fmt: skip
    training.launch(1, batches, (1e-2, 2e-2))
    step.launch(batches, (1e-2, 2e-2))
    (expected,) = training.finished(wait=True)
    assert step.report[:, 0].tolist() == pytest.approx(expected.losses, rel=1e-6)
    assert step.report[:, 2].tolist() == pytest.approx(expected.gradient_norms, rel=1e-5)
    for k in (0, 1):
        values = stacked.values(k)
        for key, other in reference.values(k).items():
            assert relative(values[key], other) <= 1e-5, (k, key)


@pytest.mark.parametrize(
    ("sizes", "changes", "why"),
    [
        ({}, {"feed_forward": FeedForwardConfig(56, "gelu")}, "the activation is gelu, not silu"),
        ({"heads": (2, 1, 264)}, {}, "the head width is 264, not an even number up to 256"),
        ({"hidden_size": 44}, {}, "the hidden or feed-forward width is not a multiple of 8"),
        ({"feed_forward": 60}, {}, "the hidden or feed-forward width is not a multiple of 8"),
        ({"heads": (6, 3, 12)}, {}, "the width of all key/value heads is not a multiple of 8"),
        ({"heads": (6, 2, 12)}, {}, None),
        ({"heads": (2, 1, 256)}, {}, None),
    ],
)
def test_sizes_that_kernels_cannot_take_are_refused_by_name(
    sizes: dict[str, Any], changes: dict[str, Any], why: str | None
) -> None:
    model = build_empty_decoder(changed(llama_config(**sizes), **changes))
    said = why_not_hand_written(model)
    assert said is None if why is None else said is not None and said.startswith(why)
