"""What all step runners of one model have in common: the same protocol and the same checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.errors import CheckpointError, ModelError
from lora.fast.choose import choose_steps
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner, evaluate
from lora.training.step_runner import StepOutcome, StepRunner

CPU = choose_device("cpu", "fp32")
CONFIG = TrainConfig(weight_decay=0.1)
RUNNERS: dict[str, Callable[[Decoder], StepRunner]] = {
    "plain": lambda model: PlainStepRunner(model, loss_for(model), CPU, CONFIG),
    "fast": lambda model: FastStepRunner(model, CPU, CONFIG),
    "captured": lambda model: CapturedStepRunner(model, CPU, CONFIG, compiles=False),
}
every_runner = pytest.mark.parametrize("kind", RUNNERS)
Make = Callable[..., Decoder]
MakeBatch = Callable[..., Batch]


def adapted(make: Make) -> Decoder:
    model = make(dtype=torch.float32)
    apply_lora(model, LoRAConfig(rank=3, init_seed=1))
    return model


def take(steps: StepRunner, make: MakeBatch, numbers: range) -> list[StepOutcome]:
    outcomes = []
    for number in numbers:
        micro = [make(10 * number + n, packed=True).to(steps.batch_device) for n in (0, 1)]
        steps.launch(number + 1, micro, [1e-2])
        outcomes += steps.finished(wait=False)
    return outcomes + steps.finished(wait=True)


@every_runner
def test_a_restored_runner_goes_on_to_the_same_bits(
    tiny_decoder: Make, make_batch: MakeBatch, kind: str
) -> None:
    whole, half, rest = (RUNNERS[kind](adapted(tiny_decoder)) for _ in range(3))
    expected = take(whole, make_batch, range(4))
    take(half, make_batch, range(2))
    rest.restore(copy.deepcopy(half.state()), step=2)
    assert take(rest, make_batch, range(2, 4)) == expected[2:]
    state, others = whole.state(), rest.state()
    assert all(torch.equal(tensor, others[name]) for name, tensor in state.items())


@every_runner
@pytest.mark.parametrize("other", RUNNERS)
def test_each_runner_goes_on_from_the_checkpoints_of_the_others(
    tiny_decoder: Make, make_batch: MakeBatch, kind: str, other: str
) -> None:
    begun, plain = RUNNERS[other](adapted(tiny_decoder)), RUNNERS["plain"](adapted(tiny_decoder))
    take(begun, make_batch, range(2))
    (*_, expected) = take(plain, make_batch, range(3))
    resumed = RUNNERS[kind](adapted(tiny_decoder))
    state = copy.deepcopy(begun.state())
    resumed.restore(state, step=2)
    assert resumed.state().keys() == state.keys() == plain.state().keys()
    (outcome,) = take(resumed, make_batch, range(2, 3))
    assert outcome.losses == [pytest.approx(expected.losses[0], rel=1e-4)]
    assert outcome.gradient_norms == [pytest.approx(expected.gradient_norms[0], rel=1e-3)]


@every_runner
def test_an_outcome_says_what_was_asked_and_what_came_of_it(
    tiny_decoder: Make, make_batch: MakeBatch, kind: str
) -> None:
    (first, second) = take(RUNNERS[kind](adapted(tiny_decoder)), make_batch, range(2))
    batches = [make_batch(n, packed=True) for n in (0, 1)]
    assert (first.step, second.step) == (1, 2)
    assert first.n_tokens == sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    assert first.learning_rates == [1e-2]
    assert not first.not_finite


@every_runner
def test_it_evaluates_what_it_trains(tiny_decoder: Make, make_batch: MakeBatch, kind: str) -> None:
    model = adapted(tiny_decoder)
    steps = RUNNERS[kind](model)
    take(steps, make_batch, range(2))
    batches = [make_batch(n, packed=True) for n in (50, 51)]
    assert steps.evaluate(batches) == [evaluate(model, batches, loss_for(model), CPU.autocast)]


@every_runner
def test_a_state_of_another_model_is_refused(tiny_decoder: Make, kind: str) -> None:
    steps = RUNNERS[kind](adapted(tiny_decoder))
    other = tiny_decoder(dtype=torch.float32)
    apply_lora(other, LoRAConfig(rank=2, init_seed=1))
    with pytest.raises(CheckpointError, match=r"\(2, \d+\) saved, \(3, \d+\) here"):
        steps.restore(RUNNERS["plain"](other).state(), step=1)


@every_runner
def test_what_is_not_finite_is_not_taken_and_its_sequences_are_known(
    tiny_decoder: Make, make_batch: MakeBatch, kind: str
) -> None:
    model = adapted(tiny_decoder)
    with torch.no_grad():  # finite itself, infinite in the matmul
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1e38)
    steps = RUNNERS[kind](model)
    before = {name: tensor.clone() for name, tensor in steps.state().items()}
    (outcome,) = take(steps, make_batch, range(1))
    assert outcome.not_finite.keys() == {0}
    assert outcome.bad_sequences == ((0, 0), (0, 1))
    after = steps.state()
    kept = [name for name in before if name.startswith("model.")]
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_a_model_with_a_loss_of_its_own_takes_the_plain_step() -> None:
    model = nn.Sequential(nn.Linear(3, 1))

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch).square().sum()[None], torch.tensor([len(batch)])

    steps = choose_steps(model, CPU, CONFIG, loss_fn=loss_fn)
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before = steps.evaluate([batch])[0]
    for step in range(1, 6):
        steps.launch(step, [batch], [1e-2])
    assert steps.evaluate([batch])[0] < before
    assert math.isfinite(before)
    with pytest.raises(ModelError, match="loss_fn of your own"):
        choose_steps(model, CPU, CONFIG)
