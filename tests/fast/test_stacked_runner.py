"""The fast stacked step as a sweep takes it: chosen, read late, restored, stopped one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.stacked_runner import FastStackedRunner, choose_stacked_runner
from lora.fast.why_not import why_not_stacked_hand_written
from lora.stacked.apply import apply_stacked
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner, StackedStepRunner
from lora.training.optim import learning_rate_at

CPU = choose_device("cpu")
STEPS = 6
ADAPTERS = [LoRAConfig(rank=rank, alpha=4.0, init_seed=k) for k, rank in enumerate((2, 5, 1))]
TRAIN = [
    TrainConfig(steps=STEPS, learning_rate=1e-2, schedule="cosine"),
    TrainConfig(steps=STEPS, learning_rate=3e-3, schedule="linear"),
    TrainConfig(steps=STEPS, learning_rate=5e-3, schedule="constant"),
]
Make = Callable[..., Decoder]
MakeBatch = Callable[..., Batch]


def begin(make: Make, *, late: int = 0) -> FastStackedRunner:
    model = make(dtype=torch.float32)
    stacked = apply_stacked(model, ADAPTERS, (0, 1, 2))
    training = FastStackedRunner(model, stacked, TRAIN, CPU)
    training.late_steps = late
    return training


def go(training: StackedStepRunner, make: MakeBatch, numbers: Sequence[int]) -> list[list[float]]:
    outcomes = []
    for number in numbers:
        batch = stack_batches([make(10 * number + k, packed=True) for k in range(3)])
        training.launch(number + 1, [batch], [learning_rate_at(number, c) for c in TRAIN])
        outcomes += training.finished(wait=False)
    return [outcome.losses for outcome in outcomes + training.finished(wait=True)]


def test_it_stands_in_for_the_plain_training(tiny_decoder: Make, make_batch: MakeBatch) -> None:
    model = tiny_decoder(dtype=torch.float32)
    stacked = apply_stacked(model, ADAPTERS, (0, 1, 2))
    plain = PlainStackedRunner(model, stacked, StackedDecoderLoss(stacked), TRAIN, CPU)
    fast = begin(tiny_decoder, late=1)
    expected, found = (go(one, make_batch, range(STEPS)) for one in (plain, fast))
    assert torch.tensor(found).allclose(torch.tensor(expected), rtol=1e-4)
    for k in range(3):
        own, other = fast.state(adapter=k), plain.state(adapter=k)
        assert own.keys() == other.keys()
        assert all(own[name].shape == other[name].shape for name in own)
        for name in own:
            if not name.startswith("dropout"):
                assert (own[name] - other[name]).norm() <= 1e-3 * other[name].norm(), name


def test_restored_training_continues_with_the_same_bits(
    tiny_decoder: Make, make_batch: MakeBatch
) -> None:
    whole, half, rest = (begin(tiny_decoder) for _ in range(3))
    go(whole, make_batch, range(STEPS))
    go(half, make_batch, range(3))
    for k in range(3):
        rest.restore(half.state(k), step=3, adapter=k)
    go(rest, make_batch, range(3, STEPS))
    for name in ("values", "mean", "square"):
        assert torch.equal(getattr(rest.step.flat, name), getattr(whole.step.flat, name))


def test_one_that_fails_is_reported_late_and_takes_no_step_meanwhile(
    tiny_decoder: Make, make_batch: MakeBatch
) -> None:
    training = begin(tiny_decoder, late=1)
    go(training, make_batch, [0])
    next(iter(training.stacked.layers.values())).lora_A.data[1, 0, 0] = math.nan
    training.step.refresh()
    batch = stack_batches([make_batch(k, packed=False) for k in range(3)])
    training.launch(2, [batch], [1e-3] * 3)
    assert not training.finished(wait=False)
    assert not training.failures
    training.launch(3, [batch], [1e-3] * 3)
    (outcome,) = training.finished(wait=False)
    assert math.isnan(outcome.losses[1])
    assert outcome.not_finite == training.failures == {1: training.failures[1]}
    assert training.failures[1].startswith("step 2: the loss is nan and the gradient norm nan")
    training.finished(wait=True)
    assert training.step.update.taken_steps.tolist() == [3.0, 1.0, 3.0]


def test_one_that_is_dropped_stays_where_it_is(tiny_decoder: Make, make_batch: MakeBatch) -> None:
    training = begin(tiny_decoder)
    go(training, make_batch, [0])
    training.drop(2, "its held-out loss is not finite")
    before = training.step.flat.values.clone()
    go(training, make_batch, [1, 2])
    assert training.failures == {2: "its held-out loss is not finite"}
    assert torch.equal(training.step.flat.values[2], before[2])
    assert not torch.equal(training.step.flat.values[0], before[0])


def test_weights_that_lie_right_are_not_moved_again(tiny_decoder: Make) -> None:
    training = begin(tiny_decoder)
    model, before = training.step.model, training.step.network.down.base
    again = FastStackedRunner(model, training.stacked, TRAIN, CPU)
    assert again.step.network.down.base.data_ptr() == before.data_ptr()
    assert torch.equal(again.step.network.down.base, before)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, None),
        ({"dropout": 0.1}, "each candidate draws its own dropout"),
        ({"modules_to_save": ("embed_tokens",)}, "model.embed_tokens trains beside the blocks"),
        ({"targets": ("q_proj", "lm_head")}, "lm_head trains beside the blocks"),
    ],
)
def test_what_it_does_not_know_is_named(
    tiny_decoder: Make, settings: dict[str, object], why: str | None
) -> None:
    model = tiny_decoder(tied=False)
    configs = [LoRAConfig(rank=2, init_seed=0, **settings)] * 2  # type: ignore[arg-type]
    assert why_not_stacked_hand_written(model, apply_stacked(model, configs, (0, 1))) == why


def test_a_cpu_takes_the_plain_step_without_a_word(tiny_decoder: Make) -> None:
    model, said = tiny_decoder(dtype=torch.float32), list[str]()
    stacked = apply_stacked(model, ADAPTERS, (0, 1, 2))
    built = choose_stacked_runner(model, stacked, TRAIN, CPU, on_message=said.append)
    assert isinstance(built, PlainStackedRunner)
    assert not said
