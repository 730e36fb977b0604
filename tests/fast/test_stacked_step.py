"""The stacked hand-written step against the plain one, in fp64 on a CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.llama import buffers
from lora.fast.stacked_step import StackedFastStep, whole_tiles
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_stacked_hand_written
from lora.kernels.step.ops import PLAIN
from lora.stacked.apply import StackedAdapters
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner
from tests.fast.conftest import CAPPED, GEMMA, GRANITE, OLMO, PHI, apply_random_stacked, relative

STEPS = 3
RATES = (1e-2, 2e-2, 5e-3)
TRAIN = [
    TrainConfig(steps=STEPS, schedule="constant", warmup_fraction=0.0, weight_decay=0.1),
    TrainConfig(steps=STEPS, schedule="constant", warmup_fraction=0.0, max_grad_norm=0.05),
    TrainConfig(steps=STEPS, schedule="constant", warmup_fraction=0.0, max_grad_norm=0.0),
]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"up_proj": 2.0}}),
    "untied": ({"tied": False}, {}),
    "biases": ({"bias": True}, {}),
    "window": ({"window": 4}, {}),
    "one block": ({}, {"layers": (1,)}),
    "two targets": ({}, {"targets": ("q_proj", "down_proj")}),
    "Qwen": ({"qk_norm": "head"}, {}),
    "Gemma": (GEMMA, {}),
    "Granite": (GRANITE, {}),
    "capped": (CAPPED, {}),
    "OLMo": (OLMO, {}),
    "Phi": (PHI, {}),
}


def configs(**settings: Any) -> list[LoRAConfig]:
    return [
        LoRAConfig(rank=3, alpha=6.0, init_seed=0, **settings),
        LoRAConfig(rank=7, alpha=5.0, init_seed=1, **settings),
        LoRAConfig(rank=1, alpha=2.0, init_seed=2, **settings),
    ]


def build(
    model: Decoder, stacked: StackedAdapters, train: list[TrainConfig], **settings: Any
) -> StackedFastStep:
    return StackedFastStep(
        model,
        stacked,
        PLAIN,
        torch.float64,
        weight_decays=[config.weight_decay for config in train],
        max_grad_norms=[config.max_grad_norm for config in train],
        **settings,
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_plain_steps(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    packed: bool,
) -> None:
    sizes, settings = CASES[name]
    n_micro = 2 if packed else 1
    monkeypatch.setattr(buffers, "MAX_STORED_SWIGLU_BYTES", 1e9 if packed else 0)
    monkeypatch.setattr(buffers, "MAX_LOGITS_ELEMENTS", 97 * 20)  # the head in parts
    adapters = configs(**settings)
    plain = tiny_decoder(**sizes)
    fast = copy.deepcopy(plain)
    frozen = {n: p.detach().clone() for n, p in plain.named_parameters()}
    reference, own = apply_random_stacked(plain, adapters), apply_random_stacked(fast, adapters)
    loss_fn = StackedDecoderLoss(reference)
    training = PlainStackedRunner(plain, reference, loss_fn, TRAIN, choose_device("cpu", "fp32"))
    step = build(fast, own, TRAIN, own_attention=packed, merges=packed)
    for number in range(STEPS):
        batches = [
            stack_batches([make_batch(seed + 10 * number + k, packed=packed) for k in (0, 1, 2)])
            for seed in range(0, 100 * n_micro, 100)
        ]
        training.launch(number + 1, batches, RATES)
        (outcome,) = training.finished(wait=True)
        step.launch(batches, RATES, number + 1)
        assert step.report[:, 0].tolist() == pytest.approx(outcome.losses, rel=1e-6)
        assert step.report[:, 3].tolist() == [1.0, 1.0, 1.0]
    for k in range(len(adapters)):
        values, moments = own.values(k), training.optimizer.moments(k)
        for key, expected in reference.values(k).items():
            assert relative(values[key], expected) < 1e-5  # rates and scales are fp32, (k, key)
            layer, part = key.rsplit(".", 1)
            mean, square = step.flat.moments(getattr(own.layers[layer], part), k)
            rank = own.layers[layer].ranks[k]
            cut = (slice(rank),) if part == "lora_A" else (slice(None), slice(rank))
            assert relative(mean[cut], moments[f"mean.{key}"]) < 1e-5, (k, key)
            assert relative(square[cut], moments[f"square.{key}"]) < 1e-5, (k, key)
    for key, parameter in fast.named_parameters():
        if key in frozen:
            assert torch.equal(parameter, frozen[key]), key


def test_sequences_of_capped_models_fill_whole_tiles(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    """One tile of our attention kernels, which no other can replace, then reads one adapter."""
    assert [whole_tiles(size, 65) for size in (1, 2, 3, 64)] == [128, 96, 128, 65]
    model = tiny_decoder(**CAPPED)
    stacked = apply_random_stacked(model, configs())
    assert why_not_stacked_hand_written(model, stacked) is None
    step = build(model, stacked, TRAIN)
    step.launch([stack_batches([make_batch(k, packed=True) for k in range(3)])], RATES)
    assert step.buffers is not None
    assert (step.buffers.batch_size, step.buffers.tokens) == (6, 32)


def test_padding_stays_zero(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    model = tiny_decoder()
    stacked = apply_random_stacked(model, configs())
    step = build(model, stacked, TRAIN)
    batch = stack_batches([make_batch(k, packed=False) for k in range(3)])
    for number in range(STEPS):
        step.launch([batch], RATES, number + 1)
    for layer in stacked.layers.values():
        for k, rank in enumerate(layer.ranks):
            assert not layer.lora_A[k, rank:].any()
            assert not layer.lora_B[k, :, rank:].any()


def test_one_stacked_adapter_trains_as_in_a_step_of_its_own(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    adapter, config = configs()[1], TRAIN[0]
    model, other = tiny_decoder(), apply_lora(tiny_decoder(), configs()[1])
    stacked = apply_random_stacked(model, [adapter])
    values = stacked.values(0)
    with torch.no_grad():
        for name, layer in lora_layers(other).items():
            layer.lora_A.copy_(values[f"{name}.lora_A"])
            layer.lora_B.copy_(values[f"{name}.lora_B"])
    step = build(model, stacked, [config])
    one = FastStep(other, PLAIN, torch.float64, weight_decay=0.1)  # type: ignore[arg-type]
    for number in range(STEPS):
        batches = [make_batch(number, packed=True)]
        step.launch(batches, [1e-2], number + 1)
        one.launch(batches, 1e-2, number + 1)
        assert step.report[0].tolist() == pytest.approx(one.report.tolist(), rel=1e-5)
    for name, layer in lora_layers(other).items():
        assert relative(stacked.values(0)[f"{name}.lora_A"], layer.lora_A) < 1e-6
        assert relative(stacked.values(0)[f"{name}.lora_B"], layer.lora_B) < 1e-6


@pytest.mark.parametrize(("packed", "own"), [(False, None), (True, True), (True, False)])
def test_an_adapter_that_is_not_finite_is_stopped_and_the_others_keep_their_bits(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    packed: bool,
    own: bool | None,
) -> None:
    def train(break_at: int) -> tuple[StackedFastStep, list[list[float]]]:
        model = tiny_decoder()
        stacked = apply_random_stacked(model, configs())
        step, taken = build(model, stacked, TRAIN, own_attention=own), []
        for number in range(5):
            if number == break_at:
                lora_a = next(iter(stacked.layers.values())).lora_A
                with torch.no_grad():
                    lora_a[1, 0, 0] = math.nan
                step.refresh()
            batch = stack_batches([make_batch(10 * k + number, packed=packed) for k in range(3)])
            step.launch([batch], RATES, number + 1)
            taken.append(step.report[:, 3].tolist())
            if number == break_at:  # whole again, and still stopped
                with torch.no_grad():
                    lora_a[1, 0, 0] = 0.1
                step.refresh()
        return step, taken

    whole, _ = train(-1)
    broken, taken = train(2)
    assert [row[1] for row in taken] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(row[0] == row[2] == 1.0 for row in taken)
    assert broken.update.taken_steps.tolist() == [5.0, 2.0, 5.0]
    for k in (0, 2):
        for name in ("values", "mean", "square"):
            assert torch.equal(getattr(whole.flat, name)[k], getattr(broken.flat, name)[k])
    assert bool(broken.flat.values.isfinite().all())
    assert bool(broken.flat.square.isfinite().all())
