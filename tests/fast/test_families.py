"""Every family on the hand-written step: one step in fp64 on a CPU against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_hand_written
from lora.kernels.step.ops import PLAIN
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from tests.decoder.conftest import CASES, GPT2_SIZES, LLAMA_SIZES, LONG_CASE
from tests.tiny_llama import random_decoder

REFUSED = {
    "gpt2": "places its norms otherwise",
    "gpt2-scaled": "places its norms otherwise",
}
"""What the step does not train, and why."""


def build(name: str) -> Decoder:
    transformers = pytest.importorskip("transformers")
    config_class, _, differences = LONG_CASE if name == "long" else CASES[name]
    sizes = GPT2_SIZES if name.startswith("gpt2") else LLAMA_SIZES
    config = getattr(transformers, config_class)(**{**sizes, **differences}).to_dict()
    return random_decoder(decoder_config(config), torch.float64)


def test_every_family_has_a_case() -> None:
    covered = {build(name).config.family for name in CASES}
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
        apply_lora(plain, LoRAConfig(rank=3, alpha=6.0, init_seed=0))
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in lora_layers(plain).values():
                layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=draw))
    fast = copy.deepcopy(plain)
    step = FastStep(fast, PLAIN, torch.float64, merges=full)
    batches = [make_batch(0, packed=True), make_batch(1, packed=False)]
    step.launch(batches, 1e-2)
    expected = train_step(plain, batches, loss_for(plain), build_optimizer(plain, 1e-2, 0.0))
    assert step.report[0].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert step.report[2].item() == pytest.approx(expected.gradient_norm.item(), rel=1e-5)
    others = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        difference = (parameter - others[key]).norm()
        assert difference <= 1e-5 * others[key].norm().clamp(min=1e-9), key
